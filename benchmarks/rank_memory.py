"""Memory of each rank's process on the CPU: while loading against its weights, and with full caches against what plan-size predicts.

`python benchmarks/rank_memory.py` writes results/rank_memory.json: a decoder of about 600 MB of weights (two tables of 32,000 x 2,048, one layer),
over 1, 2 and 4 ranks, tensor and pipeline parallel; 8 texts of 4,096 tokens. No other rank is there: sums are a rank's own.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from decoder import decoder
from test_plan_size import GPU, grown, large_decoder

import rewrite
from rewrite.runtime.plan_size import plan_size


def main() -> None:
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        small, models = decoder(), []
        for world, stages in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
            models.append((world, stages, rewrite.optimize(small, generate=True, tensor_parallel=world, pipeline_parallel=stages, verify=False).model))
        large = large_decoder(patch, 32000, 2048)
        for world, stages, tiny in models:
            if world * stages == 1:
                continue
            rewrite.build(tiny, folder / "small", engines=False, verify=False)
            rewrite.build(rewrite.optimize(large, generate=True, tensor_parallel=world, pipeline_parallel=stages, verify=False).model, folder / "plan", engines=False, verify=False)
            found = plan_size(folder / "plan", GPU, world * stages, batch=8, context=4096)["stages"]
            for rank in range(world * stages):
                memory = found[rank // world]["memory"]
                loaded, used = grown(folder / "plan", folder / "small", max(memory["kv"], 1 << 16), rank, world * stages)
                runs.append({
                    "tensor parallel": world, "pipeline parallel": stages, "rank": rank, "weights MB": memory["weights"] / 1e6, "loaded / weights": round(loaded / memory["weights"], 3),
                    "predicted MB": round(memory["total"] / 1e6, 1), "measured MB": round(used / 1e6, 1), "measured / predicted": round(used / memory["total"], 3),
                })  # fmt: skip
                print(runs[-1], file=sys.stderr, flush=True)
    print(record.write("rank_memory", record.cpu(), record.versions("numpy", "onnxruntime"), runs))


if __name__ == "__main__":
    main()
