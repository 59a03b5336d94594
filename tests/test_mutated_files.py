"""5,000 mutated files (`python tests/mutated_files.py --count 100000` is the long run)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from mutated_files import GROWTHS, SIZE, WEIGHTS, mutant, outcomes
from random_graphs import make_case

import rewrite

PARTS, COUNT = 10, 5000


@pytest.mark.parametrize("part", range(PARTS))
def test_a_mutated_file_is_rewritten_or_refused(part):
    size = COUNT // PARTS
    found = list(outcomes(range(part * size, (part + 1) * size)))
    assert [f for f in found if f[1] not in ("rewritten", "refused")] == []
    counts = Counter(outcome for _, outcome in found)
    assert counts["rewritten"] + counts["refused"] == size
    assert min(counts.values()) > size // 50, "mutants reach both ends"


def test_crashes_and_tracebacks_are_seen(monkeypatch):
    assert mutant(5) == mutant(5) != mutant(6)

    def crash(path, **options):
        if path.read_bytes() == mutant(2):
            __import__("os").abort()
        raise KeyError("x")

    monkeypatch.setattr(rewrite, "optimize", crash)
    assert dict(outcomes(range(4)))[2] == "signal SIGABRT"


@pytest.mark.parametrize("growth", GROWTHS)
def test_what_is_added_before_the_mutation_is_sound(tmp_path, growth):
    """So that what is refused is refused for the mutation."""
    (tmp_path / WEIGHTS).write_bytes(bytes(SIZE))
    for seed in range(8):
        model = make_case(seed).model
        before = model.SerializeToString()
        GROWTHS[growth](model, np.random.default_rng(seed))
        assert model.SerializeToString() != before
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        found = rewrite.load(tmp_path / "m.onnx").proto
        count = {"external": sum(i.data_location == 1 for i in found.graph.initializer), "function": len(found.functions), "sparse": len(found.graph.sparse_initializer),
                 "branches": sum(n.op_type == "If" for n in found.graph.node)}[growth]  # fmt: skip
        assert count
