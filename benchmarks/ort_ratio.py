"""Time of a rewritten model against the original, both in plain ONNX Runtime on the CPU, default optimizations.

    python benchmarks/ort_ratio.py         MiniLM with its weights, and five architectures with 4 layers of width 256

The two are run in turn, many times; the ratio is that of the medians. Rewriting must not cost users of plain ONNX
Runtime anything: at most 1.05.
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
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ratio(before: rewrite.Model, after: rewrite.Model, feeds: dict[str, np.ndarray], rounds: int) -> tuple[float, float]:
    """Medians of the two, in milliseconds, run in turn."""
    sessions = [runner(before), runner(after)]
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 2):
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            sessions[which].run(None, feeds)
            if turn >= 2:
                times[which].append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    rows = []
    print(f"{'model':8} {'nodes':>6} {'rewritten':>9} {'ms':>8} {'rewritten':>9} {'ratio':>6}")
    for name in exported.MODELS:
        made = source(name)
        with tempfile.TemporaryDirectory() as folder:
            export(made, Path(folder) / "m.onnx", verify=False)
            before = rewrite.load(Path(folder) / "m.onnx")
        after = rewrite.optimize(before).model
        feeds = {n: t.numpy() for n, t in make_inputs(made, SIZES, "right", 0).items()}
        first, second = ratio(before, after, feeds, rounds)
        nodes = sum(before.operators().values()), sum(after.operators().values())
        rows.append({"model": name, "nodes": nodes[0], "rewritten_nodes": nodes[1], "ms": round(first, 3), "rewritten_ms": round(second, 3), "ratio": round(second / first, 4)})
        print(f"{name:8} {nodes[0]:6} {nodes[1]:9} {first:8.2f} {second:9.2f} {second / first:6.3f}", flush=True)
    path = record.write("ort_ratio", record.cpu(), record.versions("onnx", "onnxruntime", "torch", "transformers"), {"sizes": SIZES, "rounds": rounds, "models": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
