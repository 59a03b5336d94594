"""Time of a rewritten model against the original, both in plain ONNX Runtime on the CPU, default optimizations.

    python benchmarks/ort_ratio.py         MiniLM with its weights, and five architectures with 4 layers of width 256

The two are run in turn, many times, on two threads; the ratio is that of the medians, of the time on the clock and of
the CPU time, which other work on the machine hardly touches. Rewriting must not cost users of plain ONNX Runtime
anything: at most 1.05.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import record
import torch
import transformers

import rewrite
from rewrite.export.compare import make_inputs
from rewrite.export.huggingface import as_flat
from rewrite.export.source import Source
from rewrite.export.torch_export import export

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import exported

WIDE = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024, "vocab_size": 1000, "max_position_embeddings": 256}
SIZES = {"batch": 8, "sequence": 128}


def source(name: str) -> Source:
    if name == "minilm":
        return exported.source(name, "eager", True)
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM if name in exported.DECODERS else transformers.AutoModel
    return as_flat(kind.from_config(exported.config(name, **WIDE), attn_implementation="eager").eval())


def runner(model: rewrite.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting is no CPU time
    return onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def medians(before: rewrite.Model, after: rewrite.Model, feeds: dict[str, np.ndarray], rounds: int) -> list[tuple[float, float]]:
    """Of the original and the rewritten model: milliseconds on the clock and of CPU time, run in turn."""
    sessions = [runner(before), runner(after)]
    times: list[list[tuple[float, float]]] = [[], []]
    for turn in range(rounds + 2):
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter(), time.process_time()
            sessions[which].run(None, feeds)
            times[which].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return [(statistics.median(c for c, _ in t[2:]) * 1e3, statistics.median(p for _, p in t[2:]) * 1e3) for t in times]


def measure(name: str, exporter: str, opset: int, rounds: int) -> dict[str, object]:
    made = source(name)
    with tempfile.TemporaryDirectory() as folder:
        export(made, Path(folder) / "m.onnx", opset=opset, exporter=exporter, verify=False)
        before = rewrite.load(Path(folder) / "m.onnx")
    after = rewrite.optimize(before).model
    feeds = {n: t.numpy() for n, t in make_inputs(made, SIZES, "right", 0).items()}
    (clock, cpu), (new_clock, new_cpu) = medians(before, after, feeds, rounds)
    return {
        "model": name, "exporter": f"{exporter} {opset}", "nodes": sum(before.operators().values()), "rewritten_nodes": sum(after.operators().values()),
        "ms": round(clock, 2), "rewritten_ms": round(new_clock, 2), "ratio": round(new_clock / clock, 3),
        "cpu_ms": round(cpu, 2), "rewritten_cpu_ms": round(new_cpu, 2), "cpu_ratio": round(new_cpu / cpu, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    rows = []
    for name in exported.MODELS:
        for exporter, opset in (("dynamo", 20), ("torchscript", 18)):
            rows.append(measure(name, exporter, opset, rounds))
            if len(rows) == 1:
                print(*(f"{k:>16}" for k in rows[0]))
            print(*(f"{v:>16}" for v in rows[-1].values()), flush=True)
    path = record.write("ort_ratio", record.cpu(), record.versions("onnx", "onnxruntime", "torch", "transformers"), {"sizes": SIZES, "rounds": rounds, "models": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
