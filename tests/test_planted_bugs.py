"""Each of at least 200 bugs planted in the built-in rules is caught by verification; `planted_bugs.py` makes them."""

from __future__ import annotations

from collections import Counter

import pytest
from planted import PLANTS
from planted_bugs import bugs_of

EXPECTED = 200  # bugs over all rules, at least; the parts of the test print their counts
GROUPS = [sorted(PLANTS)[i::8] for i in range(8)]


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_planted_bugs_are_caught(group):
    bugs = [bug for name in GROUPS[group] for bug in bugs_of(name)]
    counts = Counter(outcome for _, outcome in bugs)
    print(f"group {group}: {dict(counts)}")
    assert [what for what, outcome in bugs if outcome == "MISSED"] == []
    assert counts["caught"] >= EXPECTED // len(GROUPS)
