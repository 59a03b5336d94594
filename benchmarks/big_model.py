"""Time and peak memory of `rewrite optimize` on a model with 16 GB of external weights (a sparse file: it needs no disk).

    python benchmarks/big_model.py [--gigabytes 16] [--folder DIR]

The model is Llama-like, 4096 wide. It is rewritten twice, each time in a child process: with the output beside the
weights, which stay where they are, and with the output in another folder, where the kernel copies them (holes as holes).
The peak is that of the command and that of its own child, which reads the file first, added up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import graphs
import onnx
import record

SIZES = (4096, 32, 8, 14336)  # width, heads, groups of heads, width inside the MLP
FILE = "model.data"
LIMIT_MB = 1024
ALIGN = 4096
# Both peaks, once the command has ended its child: what is registered first is called last.
MEASURED = """
import atexit, json, resource, sys
from pathlib import Path
kinds, file = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), Path(sys.argv.pop(1))
atexit.register(lambda: file.write_text(json.dumps([resource.getrusage(kind).ru_maxrss / 1024 for kind in kinds])))
from rewrite.cli import main
main()
"""


class SparseWriter(graphs.Writer):
    """Weights are places in a file of zeros."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.end = 0

    def weight(self, *shape: int) -> str:
        name = f"weight_{len(self.initializers)}"
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", FILE), ("offset", self.end), ("length", 4 * math.prod(shape))):
            tensor.external_data.add(key=key, value=str(value))
        self.end += -(-4 * math.prod(shape) // ALIGN) * ALIGN
        self.initializers[name] = tensor
        return name


def make_model(folder: Path, gigabytes: float) -> tuple[Path, int, int]:
    """Write `folder/model.onnx` and its weights; returns its path, the number of nodes, the size of the weights in bytes."""
    model, size, layers = onnx.ModelProto(), 0, 0
    while size < gigabytes * 1e9:
        layers = max(layers + 1, int(gigabytes * 1e9 * layers / size) if size else 1)
        model = graphs.model(layers, "llama", *SIZES, writer=SparseWriter)
        size = sum(int(e.value) for i in model.graph.initializer for e in i.external_data if e.key == "length")
    path = folder / "model.onnx"
    onnx.save(model, path)
    with (folder / FILE).open("wb") as file:
        file.truncate(size + ALIGN * len(model.graph.initializer))
    return path, len(model.graph.node), size


def run(path: Path, output: Path) -> dict[str, Any]:
    """`rewrite optimize` in a child process: seconds, peak resident memory, what it said."""
    report, peaks = output.with_suffix(".json"), output.with_suffix(".peaks")
    command = [sys.executable, "-c", MEASURED, str(peaks), "optimize", str(path), "-o", str(output), "--report", str(report)]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = os.posix_spawn(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"}, file_actions=[(os.POSIX_SPAWN_DUP2, said.fileno(), 1), (os.POSIX_SPAWN_DUP2, said.fileno(), 2)])
        _, status, usage = os.wait4(child, 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    own, child_of_it = json.loads(peaks.read_text())
    found = {"seconds": time.perf_counter() - started, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": own + child_of_it, "peak_of_command_mb": own, "peak_of_child_mb": child_of_it}
    found["exit"] = os.waitstatus_to_exitcode(status)
    if found["exit"] == 0:
        told = json.loads(report.read_text())
        found.update(sites=len(told["sites"]), verified=told["verified"], not_run=told["not_run"])
    else:
        found["said"] = text[-400:]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--folder", default=None, help="where to make the sparse file; a temporary folder if not given")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        path, nodes, size = make_model(folder, arguments.gigabytes)
        (folder / "elsewhere").mkdir()
        print(f"{nodes} nodes, {size / 1e9:.1f} GB of weights")
        for label, output in (("weights in place", folder / "out.onnx"), ("weights copied", folder / "elsewhere" / "out.onnx")):
            found = results[label] = run(path, output)
            print(f"{label}: {found['seconds']:.1f} s ({found['cpu']:.1f} s of processor), peak {found['peak_mb']:.0f} MB of {LIMIT_MB}; {found.get('sites', found.get('said'))} sites")
        copy = folder / "elsewhere" / FILE
        if copy.is_file():
            results["disk used by the copy, MB"] = copy.stat().st_blocks * 512 / 1e6
    result = record.write("big_model", record.cpu(), record.versions("onnx", "onnxruntime"), {"nodes": nodes, "bytes": size, "runs": results})
    print(f"written to {result}")
    if any(r["exit"] or r["peak_mb"] > LIMIT_MB for r in results.values() if isinstance(r, dict)):
        sys.exit(1)


if __name__ == "__main__":
    main()
