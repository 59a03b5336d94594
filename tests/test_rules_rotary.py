"""Rotary embedding in its spellings becomes one node; near misses stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import nodes, parse

import rewrite

D, R = 8, 4
CONSTANTS = {
    "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "four": np.array([4]), "three": np.array([3]), "far": np.array([2**40]), "last": np.array([-1]), "axis3": np.array([3]),
    "halves": np.array([4, 4]), "uneven": np.array([3, 5]), "heads": np.array([1]), "pairs": np.array([0, 0, 0, 4, 2]), "flat": np.array([0, 0, 0, 8]), "i0": np.array(0), "i1": np.array(1),
}  # fmt: skip

X, FULL, HALF = "float[B, 2, S, 8] x", "float[B, 1, S, 8] cos, float[B, 1, S, 8] sin", "float[B, 1, S, 4] cos, float[B, 1, S, 4] sin"


def model(body, inputs, output="float[B, 2, S, 8] y", opset=18):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return parse(f"({inputs}) => ({output}) {{ {body} }}", opset, **{k: v for k, v in CONSTANTS.items() if k in words})


def rotary(body, inputs, **options):
    """The attributes and inputs of the one node that a body becomes."""
    after = rewrite.optimize(model(body, inputs, **options)).model.proto
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) == 1, nodes(after)
    node = after.graph.node[0]
    assert node.op_type.startswith("Rotary")
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, list(node.input)


CUTS = {
    "slices": "f = Slice(x, zero, four, last, one) g = Slice(x, four, far, last, one)",
    "slices along axis 3": "f = Slice(x, zero, four, axis3, one) g = Slice(x, four, far, axis3, one)",
    "slices without steps": "f = Slice(x, zero, four, last) g = Slice(x, four, far, last)",
    "split": "f, g = Split<axis = -1, num_outputs = 2>(x)",
    "split by sizes": "f, g = Split<axis = 3>(x, halves)",
}
WHOLE = "n = Neg(g) r = Concat<axis = -1>(n, f) a = Mul(x, cos) b = Mul(r, sin) y = Add(a, b)"
PARTS = "a = Mul(f, cos) b = Mul(g, sin) s = Sub(a, b) c = Mul(g, cos) d = Mul(f, sin) t = Add(c, d) y = Concat<axis = -1>(s, t)"


@pytest.mark.parametrize("cut", CUTS)
def test_halves(cut):
    assert rotary(f"{CUTS[cut]} {WHOLE}", f"{X}, {FULL}") == ({}, ["x", "cos", "sin"])
    assert rotary(f"{CUTS[cut]} {PARTS}", f"{X}, {HALF}") == ({}, ["x", "cos", "sin"])


def test_operands_in_any_order():
    assert rotary(f"{CUTS['split']} n = Neg(g) r = Concat<axis = 3>(n, f) a = Mul(cos, x) b = Mul(sin, r) y = Add(b, a)", f"{X}, {FULL}")[1] == ["x", "cos", "sin"]
    parts = "a = Mul(cos, f) b = Mul(sin, g) s = Sub(a, b) c = Mul(g, cos) d = Mul(sin, f) t = Add(d, c) y = Concat<axis = 3>(s, t)"
    assert rotary(f"{CUTS['split']} {parts}", f"{X}, {HALF}")[1] == ["x", "cos", "sin"]


PICKS = {
    "strided slices": "e = Slice(x, zero, far, last, two) o = Slice(x, one, far, last, two)",
    "pairs": "p = Reshape(x, pairs) e = Gather<axis = -1>(p, i0) o = Gather<axis = -1>(p, i1)",
    "pairs along axis 4": "p = Reshape(x, pairs) e = Gather<axis = 4>(p, i0) o = Gather<axis = 4>(p, i1)",
}
WEAVE = "u = Unsqueeze({0}, last) v = Unsqueeze({1}, last) w = Concat<axis = -1>(u, v) {2} = Reshape(w, flat)"


@pytest.mark.parametrize("pick", PICKS)
def test_interleaved(pick):
    whole = f"{PICKS[pick]} n = Neg(o) {WEAVE.format('n', 'e', 'r')} a = Mul(x, cos) b = Mul(r, sin) y = Add(a, b)"
    assert rotary(whole, f"{X}, {FULL}") == ({"interleaved": 1}, ["x", "cos", "sin"])
    parts = f"{PICKS[pick]} a = Mul(e, cos) b = Mul(o, sin) s = Sub(a, b) c = Mul(o, cos) d = Mul(e, sin) t = Add(c, d) {WEAVE.format('s', 't', 'y')}"
    assert rotary(parts, f"{X}, {HALF}") == ({"interleaved": 1}, ["x", "cos", "sin"])


@pytest.mark.parametrize("cut", ["q = Slice(x, zero, four, last, one) k = Slice(x, four, far, last, one)", "q, k = Split<axis = -1>(x, halves)"])
def test_partial(cut):
    """The first four of eight elements turn."""
    turn = "f, g = Split<axis = -1, num_outputs = 2>(q) n = Neg(g) r = Concat<axis = -1>(n, f) a = Mul(q, cos) b = Mul(r, sin) z = Add(a, b)"
    assert rotary(f"{cut} {turn} y = Concat<axis = -1>(z, k)", f"{X}, {HALF}") == ({"size": 4}, ["x", "cos", "sin"])


@pytest.mark.parametrize(("attributes", "expected"), [("", {}), ("interleaved = 1", {"interleaved": 1}), ("rotary_embedding_dim = 4", {"size": 4})])
def test_the_operator_of_opset_23(attributes, expected):
    size = 2 if "dim" in attributes else 4
    found = rotary(f"y = RotaryEmbedding<{attributes}>(x, cos, sin)".replace("<>", ""), f"{X}, float[B, S, {size}] cos, float[B, S, {size}] sin", opset=23)
    assert found == (expected, ["x", "cos", "sin"])


NEAR = {
    "the other half negated": (f"{CUTS['split']} n = Neg(f) r = Concat<axis = -1>(n, g) a = Mul(x, cos) b = Mul(r, sin) y = Add(a, b)", FULL),
    "not negated": (f"{CUTS['split']} r = Concat<axis = -1>(g, f) a = Mul(x, cos) b = Mul(r, sin) y = Add(a, b)", FULL),
    "uneven parts": (f"f, g = Split<axis = -1>(x, uneven) {WHOLE}", FULL),
    "cut elsewhere": (f"f = Slice(x, zero, three, last, one) g = Slice(x, three, far, last, one) {WHOLE}", FULL),
    "another value turned": (f"z = Exp(x) {CUTS['split'].replace('(x)', '(z)')} {WHOLE}", FULL),
    "difference": (f"{CUTS['split']} n = Neg(g) r = Concat<axis = -1>(n, f) a = Mul(x, cos) b = Mul(r, sin) y = Sub(a, b)", FULL),
    "sum and difference exchanged": (f"{CUTS['split']} {PARTS.replace('Concat<axis = -1>(s, t)', 'Concat<axis = -1>(t, s)')}", HALF),
    "odd before even": (f"{PICKS['strided slices']} n = Neg(e) {WEAVE.format('n', 'o', 'r')} a = Mul(x, cos) b = Mul(r, sin) y = Add(a, b)", FULL),
    "heads without an axis in cos": (f"{CUTS['split']} {WHOLE}", "float[2, S, 8] cos, float[2, S, 8] sin"),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_stay(case):
    body, turns = NEAR[case]
    before = model(body, f"{X}, {turns}")
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


def test_the_operator_of_opset_23_with_position_ids_stays():
    before = model("y = RotaryEmbedding(x, cos, sin, ids)", f"{X}, float[64, 4] cos, float[64, 4] sin, int64[B, S] ids", opset=23)
    assert nodes(rewrite.optimize(before).model.proto) == ["RotaryEmbedding"]
