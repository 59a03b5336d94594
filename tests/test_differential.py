"""Random graphs: rules alone, together and in random subsets change no output; planted patterns are found, near misses left.

`python tests/random_graphs.py --count 10000 --record` is the long run. Hypothesis draws the structure of further graphs, and
makes one at which something is wrong as small as it can.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest
from drawn_graphs import graphs
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from planted import NEWEST, PLANTS, Block
from random_graphs import Case, check, difference, expected, finish, make_case, plant, problems

import rewrite
from rewrite import optimizer
from rewrite.registry import library

PARTS, GRAPHS = 20, 1000
RULES = [r.name for r in library([]).rules if r.tier != "transform"]  # those are for generators, which are compared as wholes
DRAWN = settings(derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
MISSES = 20  # near misses of each rule, at least


@pytest.mark.parametrize("part", range(PARTS))
def test_random_graphs_compute_the_same(part):
    counts, found = Counter[str](), list[str]()
    for seed in range(part, GRAPHS, PARTS):
        found += check(seed, counts, alone=1, verify=seed % 50 == part)
    assert not found, "\n".join(found[:10])
    assert counts["rewrites"] >= 3 * GRAPHS // PARTS
    assert counts["sites"] > GRAPHS // PARTS


@DRAWN
@given(graphs(), st.lists(st.sampled_from(RULES), min_size=1, max_size=12, unique=True))
def test_graphs_of_drawn_structure_compute_the_same(case, some):
    want = expected(case)
    assert problems(case, want, None) + problems(case, want, some) == []


def test_the_graph_at_which_a_wrong_rule_shows_is_made_small(monkeypatch):
    """A GELU of another scale: from some thirty nodes among noise to those that the rule replaces, and one that reads them."""
    everything = library([])
    right = next(r for r in everything.rules if r.name == "gelu_erf")
    wrong = dataclasses.replace(right, replace=lambda op, x: op.Gelu(op.Mul(x, op.constant(1.1, x.dtype))))
    rules = dataclasses.replace(everything, rules=[wrong if r is right else r for r in everything.rules])
    sizes, apply = [], optimizer.apply_rules

    def shows(case):
        if not any("differs" in p for p in problems(case, expected(case), None)):
            return False
        sizes.append(len(case.model.graph.node))
        return True

    monkeypatch.setattr(optimizer, "apply_rules", lambda source, _, **options: apply(source, rules, **options))
    case = find(graphs(), shows, settings=settings(DRAWN, max_examples=400))
    left = [n.op_type for n in case.model.graph.node if n.op_type != "Constant"]
    assert sorted(left[:5]) == ["Add", "Div", "Erf", "Mul", "Mul"]
    assert len(left) <= 6
    assert [p.rule for p in case.plants] == ["gelu_erf"]
    assert sizes[0] >= 3 * len(case.model.graph.node)


def test_every_rule_is_planted():
    assert set(PLANTS) == set(RULES)


def one_plant(rule: str, seed: int, wrong: bool) -> Case | None:
    """A graph of a single plant: right, or a near miss by form or by an operator in its middle."""
    rng = np.random.default_rng([seed, len(rule)])
    block = Block(rng, 23 if rule in NEWEST else int(rng.choice([18, 20, 21, 23])))
    for _ in range(10):
        made = plant(block, rule, f"p{len(block.nodes)}_")
        if bool(made.wrong) == wrong and made.barrier:
            made_case = Case(seed, finish(block), [made], block.sizes)
            return made_case
        block = Block(rng, block.opset)
    return None


@pytest.mark.parametrize("rule", sorted(PLANTS))
def test_near_misses_are_left_alone(rule):
    """At least twenty near misses of each rule, different graphs all; and the right form beside them is found."""
    cases = [c for c in (one_plant(rule, s, True) for s in range(2 * MISSES)) if c is not None]
    texts = {onnx.printer.to_text(c.model) for c in cases}
    assert len(texts) >= MISSES
    for case in cases:
        assert problems(case, expected(case), None) == []
    right = next(c for c in (one_plant(rule, s, False) for s in range(MISSES)) if c is not None)
    assert problems(right, expected(right), None, verify=True) == []


def test_the_same_seed_gives_the_same_graph():
    assert make_case(11).model.SerializeToString() == make_case(11).model.SerializeToString()
    assert make_case(11).model.SerializeToString() != make_case(12).model.SerializeToString()


def test_a_wrong_rule_is_found(monkeypatch):
    """The harness can fail: a Swish with another factor changes outputs, and a rule that never fires misses its plants."""
    case = one_plant("swish_sigmoid", 1, False)
    assert case is not None
    wrong = rewrite.optimize(case.model, rules=[], verify=False).model.proto
    for node in wrong.graph.node:
        if node.op_type == "Abs":
            node.op_type = "Neg"
    assert problems(case, [[a + 0.01 for a in outputs] for outputs in expected(case)], None)
    monkeypatch.setattr(rewrite.optimizer, "apply_rules", lambda source, rules, **kwargs: _nothing(source, rules))
    assert any("was not found" in p for p in problems(case, expected(case), None))


def _nothing(source, rules):
    report = rewrite.report.Report()
    report.start(rules.rules)
    return rewrite.optimizer.Result(source, report)


def test_differences_are_relative_and_infinities_count():
    one = np.array([1.0, 100.0], np.float32)
    assert difference(one, one) == 0
    assert difference(one, one + 1) == pytest.approx(0.01)
    assert difference(one, np.array([np.nan, 100.0], np.float32)) == np.inf
    assert difference(one * np.inf, one * -np.inf) == np.inf
