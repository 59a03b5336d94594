"""Every architecture of docs/coverage.md split over ranks: what is refused, and how far all ranks together are from the whole model.

`python benchmarks/sharding.py` writes benchmarks/results/sharding.json; each model is exported (dynamo, opset 20), rewritten and
split over 2 and 4 ranks, in 2 stages, and in 2 stages of 2 ranks, text generators with and without a cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
from architectures import ARCHITECTURES

import rewrite
from rewrite.errors import RewriteError
from rewrite.export.torch_export import export

CAUSAL = "AutoModelForCausalLM"


SPLITS = {"2 ranks": (2, 1), "4 ranks": (4, 1), "2 stages": (1, 2), "2 stages of 2 ranks": (2, 2)}


def split(model: Path, world: int, stages: int, generate: bool) -> Any:
    """The largest relative difference, or the reason for a refusal."""
    try:
        result = rewrite.optimize(model, tensor_parallel=world, pipeline_parallel=stages, generate=generate)
    except RewriteError as error:
        return str(error).removeprefix(f"{model.name}: ")[:300]
    counts = {what: result.report.plugins.get(plugin, 0) for what, plugin in (("sums", "AllReduce"), ("joins", "AllGather"), ("messages", "Send"))}
    return {"error": float(f"{result.report.model_error:.2e}"), **counts, "ranks": result.report.shards}


def main() -> None:
    found: dict[str, Any] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            model = Path(folder) / "model.onnx"
            try:
                export(architecture.source(), model, verify=False)
            except RewriteError as error:
                found[architecture.name] = {"export": str(error)[:200]}
                continue
            kinds = {"whole": False, "generator": True} if architecture.kind == CAUSAL else {"whole": False}
            found[architecture.name] = {f"{kind}, {name}": split(model, *how, generate) for kind, generate in kinds.items() for name, how in SPLITS.items()}
            print(f"{time.perf_counter() - started:.0f} s: {architecture.name}: {found[architecture.name]}", file=sys.stderr, flush=True)
    print(record.write("sharding", record.cpu(), record.versions("numpy", "onnx", "onnxruntime", "torch", "transformers"), found))


if __name__ == "__main__":
    main()
