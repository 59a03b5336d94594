"""How long `rewrite build` takes for 2 and for 24 layers of BERT-large, and what it spends the time on.

    python benchmarks/build_time.py [--layers 2,24] [--dtype float16] [--repeat 3] [--folder DIR]

Identical layers share their segments, so each is compiled once however many layers there are; what grows with the layers
is the weights, which are written, hashed and flushed to the disk, and the check, which runs the whole model. So the
times are told apart: cutting, TensorRT, writing, checking. Medians of several builds in one process, after one to warm up;
the command as a whole (its start, reading the model) is measured in processes of its own, those of few and many layers in
turns, because the machine may be shared: into a new folder, and in the place of an older plan, which is removed then. The
weights lie beside the model, as external data. NumPy has one thread: its products in the check are small.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import graphs
import onnx
import record

import rewrite

SIZES = (1024, 16, 16, 4096)  # width, heads, groups of heads, width inside the MLP
PROFILE = "batch=1:8:32,seq=1:128:512"
PHASES = {"cutting": "cutting", "TensorRT": "compiling", "writing": "writing", "comparing": "checking"}  # by the first word of the progress
MOST_ENGINES = 5e6  # bytes
COMMANDS = {"command": ["--no-verify"], "command_again": ["--no-verify"], "command_and_check": []}  # options of each


def phases(model: Any, target: Path, verify: bool) -> dict[str, float]:
    """The seconds of each phase of one build, and of all."""
    marks: list[tuple[str, float]] = []
    rewrite.build(model, target, profile=PROFILE, verify=verify, progress=lambda line: marks.append((PHASES[line.split()[0].strip(":")], time.perf_counter())))
    marks.append(("", time.perf_counter()))
    found: dict[str, float] = {}
    for (name, start), (_, end) in itertools.pairwise(marks):
        found[name] = found.get(name, 0.0) + end - start
    return {**found, "all": marks[-1][1] - marks[0][1]}


def measure(layers: int, dtype: str, repeat: int, folder: Path) -> dict[str, Any]:
    made = graphs.model(layers, "bert", *SIZES)
    fused = rewrite.optimize(graphs.half(made) if dtype == "float16" else made, verify=False).model
    del made
    source, target = folder / f"m{layers}.onnx", folder / f"p{layers}"
    onnx.save(fused.proto, source, save_as_external_data=True, location=f"m{layers}.data")
    fused = rewrite.load(source)
    phases(fused, target, False)
    runs = [phases(fused, target, False) for _ in range(repeat)]
    found: dict[str, Any] = {"layers": layers, "seconds": {k: statistics.median(r[k] for r in runs) for k in runs[0]}}
    found["seconds"]["checking"] = phases(fused, target, True)["checking"]
    files = rewrite.Plan(target).manifest.files
    found["engines"], found["engine_bytes"] = sum(n.startswith("engines/") for n in files), sum(s for n, (s, _) in files.items() if n.startswith("engines/"))
    found["weight_bytes"] = files["weights.safetensors"][0]
    return found


def measure_commands(rows: list[dict[str, Any]], repeat: int, folder: Path) -> None:
    """Enter the seconds of each command, by the clock and of the processors, among those of each row."""
    for key, options in COMMANDS.items():
        runs: dict[int, list[tuple[float, float]]] = {row["layers"]: [] for row in rows}
        for layers in list(runs) * repeat:
            target = folder / f"p{layers}"
            if key != "command_again":
                shutil.rmtree(target)
            runs[layers].append(command(folder / f"m{layers}.onnx", target, options))
        for row in rows:
            walls, processors = zip(*runs[row["layers"]], strict=True)
            row["seconds"] |= {key: statistics.median(walls), f"{key}_cpu": statistics.median(processors)}


def command(source: Path, target: Path, options: list[str]) -> tuple[float, float]:
    """Seconds by the clock, and of processor time, that of its own children included."""
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}  # it would have the package compiled in each run
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    line = [sys.executable, "-m", "rewrite.cli", "build", source, "-o", target, "--profile", PROFILE, *options]
    subprocess.run(line, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - started, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,24")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where plans are written; a temporary folder if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = [measure(int(n), arguments.dtype, arguments.repeat, Path(folder)) for n in arguments.layers.split(",")]
        measure_commands(rows, arguments.repeat, Path(folder))
    names = list(rows[0]["seconds"])
    print("  ".join(f"{c:>21}" for c in ("layers", *names, "engines", "engines MB", "weights MB")))
    for row in rows:
        cells = [str(row["layers"]), *(f"{row['seconds'][n]:.2f} s" for n in names), str(row["engines"]), f"{row['engine_bytes'] / 1e6:.2f}", f"{row['weight_bytes'] / 1e6:.0f}"]
        print("  ".join(f"{c:>21}" for c in cells))
    ratios = {n: rows[-1]["seconds"][n] / rows[0]["seconds"][n] for n in names}
    print("  ".join(f"{c:>21}" for c in ("ratio", *(f"{r:.2f}" for r in ratios.values()))))
    versions = record.versions("onnx", "onnxruntime", "tensorrt-rtx")
    print("written to", record.write("build_time", record.cpu(), versions, {"dtype": arguments.dtype, "repeat": arguments.repeat, "load": os.getloadavg()[1], "rows": rows, "ratios": ratios}))
    if rows[0]["engines"] != rows[-1]["engines"] or rows[-1]["engine_bytes"] > MOST_ENGINES:
        sys.exit("identical layers have engines of their own, or engines are large")


if __name__ == "__main__":
    main()
