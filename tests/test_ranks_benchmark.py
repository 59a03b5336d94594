"""Plans without weights, and the random ones that `benchmarks/ranks_decode.py` gives them: the same whole weight for any number of ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from fake_ranks import together
from greedy import greedy

from rewrite.errors import RewriteError
from rewrite.runtime.plan import Plan
from rewrite.runtime.plan_model import PlanModel

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import ranks_decode


@pytest.mark.parametrize(("axis", "sections"), [(0, [[48, 12]]), (1, [[32, 4]]), (1, [[16, 4], [8, 1], [8, 8]]), (0, [[40, 8], [8, 2]])])
def test_slices_of_random_weights_are_those_of_the_whole(axis, sections):
    """Of the whole, of two ranks and four; with fewer units than ranks one is shared."""
    told = {"world": 1, "slices": {"w": [axis, sections]}, "values": {}}
    whole = np.empty((48, 32), ml_dtypes.bfloat16)
    ranks_decode.random_weight(whole, "w", {**told, "slices": {}}, 0, 0.5)
    assert 0.4 < whole.astype(np.float32).std() < 0.6
    assert len(np.unique(whole.view(np.uint16))) > 400
    for world in (2, 4):
        for rank in range(world):
            part = ranks_decode.Slice("w", axis, sections).take(whole, rank, world)
            made = np.full(part.shape, np.nan, part.dtype)
            ranks_decode.random_weight(made, "w", {**told, "world": world}, rank, 0.5)
            np.testing.assert_array_equal(made.view(np.uint16), part.view(np.uint16))


def test_one_rank_times_the_kernels_for_all(monkeypatch):
    made = []

    class Model:
        device = None

        def __init__(self, plan, memory, only):
            made.append(only)

        def tune(self):
            return {"product": {"ours": 1.5, "theirs": 2.0}}

    monkeypatch.setattr(ranks_decode, "PlanModel", Model)
    for world in (1, 3):
        plan = SimpleNamespace(manifest=SimpleNamespace(world=world))
        found = [ranks_decode.timed(plan, None)] if world == 1 else together(world, lambda communicator, plan=plan: ranks_decode.timed(plan, communicator))
        assert found == [{"product": {"ours": 1.5, "theirs": 2.0}}] * world
    assert made == [None, 0]


@pytest.mark.slow
def test_a_plan_without_weights_gets_some(tmp_path):
    import hollow_plans

    hollow_plans.SHAPES["tiny"].config(hollow_plans.torch.bfloat16).save_pretrained(tmp_path / "tiny")
    hollow_plans.export(hollow_plans.load_hollow(tmp_path / "tiny"), tmp_path / "tiny.onnx", verify=False)
    seen, prompts = [], [[5, 6, 7], list(range(40, 60))]
    for world in (1, 2):
        plan = tmp_path / f"tiny-{world}"
        hollow_plans.make_plan(tmp_path / "tiny.onnx", world, plan)
        with pytest.raises(RewriteError, match="its content is not what was built"):
            _ = Plan(plan).weights
        ranks_decode.make_usable(plan)
        ranks_decode.write_weights(plan, 0.12)
        logits: dict = {}
        greedy(PlanModel(Plan(plan), 1 << 22), prompts, 1, chunk=32, seen=logits)
        seen.append(np.array([logits[i, len(p)] for i, p in enumerate(prompts)]))
    assert np.abs(seen[0]).max() > 1
    assert np.abs(seen[0] - seen[1]).max() < 0.03 * np.abs(seen[0]).max()
    assert json.loads((tmp_path / "tiny-2.json").read_text())["world"] == 2
