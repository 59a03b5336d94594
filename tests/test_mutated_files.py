"""5,000 mutated files (`python tests/mutated_files.py --count 100000` is the long run)."""

from __future__ import annotations

from collections import Counter

import pytest
from mutated_files import mutant, outcomes

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
