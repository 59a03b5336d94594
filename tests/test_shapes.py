"""Sizes as formulas: what shape arithmetic computes is known by name, and is what ONNX Runtime computes at any size."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from conftest import parse

import rewrite
from rewrite import shapes, verify
from rewrite.registry import _program

I = {n: np.array(v, np.int64) for n, v in {
    "i0": 0, "i1": 1, "im1": -1, "v0": [0], "v1": [1], "v2": [2], "v3": [3], "vm1": [-1], "vm2": [-2], "big": [2**63 - 1], "v01": [0, 1], "v12": [1, 2], "ones3": [1, 1, 1],
}.items()}  # fmt: skip

# Nodes that compute the integers `d` from x [batch, seq, 8] and z [batch, 1, 8], and what is known of them.
VALUES = {
    "whole shape": ("d = Shape(x)", ["batch", "seq", 8]),
    "part of a shape": ("d = Shape<start = 1>(x)", ["seq", 8]),
    "part counted from the end": ("d = Shape<start = 0, end = -1>(x)", ["batch", "seq"]),
    "gather of a scalar": ("s = Shape(x) g = Gather(s, i1) d = Unsqueeze(g, v0)", ["seq"]),
    "gather from the end": ("s = Shape(x) g = Gather(s, im1) d = Reshape(g, vm1)", [8]),
    "gather of several": ("s = Shape(x) d = Gather(s, v01)", ["batch", "seq"]),
    "concat": ("s = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) d = Concat<axis = 0>(t, v2, s)", ["seq", 2, "batch"]),
    "slice": ("s = Shape(x) d = Slice(s, v1, big, v0)", ["seq", 8]),
    "slice with a step": ("s = Shape(x) d = Slice(s, v0, big, v0, v2)", ["batch", 8]),
    "slice from the end": ("s = Shape(x) d = Slice(s, vm2, big, v0)", ["seq", 8]),
    "product": ("s = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) p = Mul(s, t) d = Mul(p, v3)", ["3*batch*seq"]),
    "product with nothing": ("t = Shape<start = 1, end = 2>(x) p = Mul(t, v0) d = Add(p, v2)", [2]),
    "sum": ("s = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) d = Add(t, s)", ["batch + seq"]),
    "sum and difference": ("t = Shape<start = 1, end = 2>(x) a = Add(t, v3) d = Sub(a, v1)", ["seq + 2"]),
    "a difference that vanishes": ("t = Shape<start = 1, end = 2>(x) a = Sub(t, t) d = Add(a, v3)", [3]),
    "quotient that comes out even": ("s = Shape<start = 0, end = 1>(x) t0 = Shape<start = 1, end = 2>(x) p = Mul(s, t0) t = Shape<start = 1, end = 2>(x) d = Div(p, t)", ["batch"]),
    "quotient of numbers": ("e = Shape<start = 2, end = 3>(x) d = Div(e, v3)", [2]),
    "remainder": ("e = Shape<start = 2, end = 3>(x) m = Mod(e, v3) d = Concat<axis = 0>(m, e)", [2, 8]),
    "casts between": ("s = Shape(x) c = Cast<to = 6>(s) d = Cast<to = 7>(c)", ["batch", "seq", 8]),
    "an expand that leaves -1 alone": ("s = Shape(x) e = Equal(s, m3) d = Where(e, ones3, s)", ["batch", "seq", 8]),
    "a chosen constant": ("s = Shape<start = 2>(x) e = Equal(s, v8) d = Where(e, v3, s)", [3]),
    "constants of a known length": ("n = Shape<start = 2>(u) d = ConstantOfShape<value: tensor = int64[1] {5}>(n)", [5, 5, 5, 5]),
    "squeezed and back": ("t = Shape<start = 1, end = 2>(x) q = Squeeze(t, v0) d = Unsqueeze(q, v0)", ["seq"]),
    "the size of a concatenation": ("c = Concat<axis = 1>(x, z) d = Shape(c)", ["batch", "seq + 1", 8]),
    "the size of a tile": ("t = Tile(x, times) d = Shape(t)", ["2*batch", "seq", 24]),
    "the size of a tile of a sum": ("c = Concat<axis = 1>(x, z) t = Tile(c, times2) d = Shape<start = 1, end = 2>(t)", ["2*(seq + 1)"]),
    "the size of an expand": ("s = Shape(x) e = Expand(z, s) d = Shape(e)", ["batch", "seq", 8]),
    "the size of a range": ("s = Shape(x) t = Gather(s, i1) r = Range(i1, t, i1) d = Shape(r)", ["seq - 1"]),
    "the size of a slice": ("c = Slice(x, v1, big, v1) d = Shape<start = 0, end = 1>(c)", ["batch"]),
    "the size of a fixed slice": ("c = Slice(x, v1, vm1, v2) d = Shape<start = 2>(c)", [6]),
    "the size of a fixed slice with a step": ("c = Slice(x, v1, big, v2, v3) d = Shape<start = 2>(c)", [3]),
    "the size of a reshape": ("s = Shape<start = 0, end = 2>(x) to = Concat<axis = 0>(s, v2, vm1) r = Reshape(x, to) d = Shape(r)", ["batch", "seq", 2, 4]),
    "the size of a fold": ("e = Shape<start = 2>(x) to = Concat<axis = 0>(vm1, e) r = Reshape(x, to) d = Shape(r)", ["batch*seq", 8]),
}  # fmt: skip
MORE = {"m3": np.array([-1, -1, -1]), "v8": np.array([8]), "times": np.array([2, 1, 3]), "times2": np.array([1, 2, 1])}


def known(nodes, rank):
    """What rules see as the shape of a value that has `d` as its shape, and the model."""
    given = {k: v for k, v in {**I, **MORE}.items() if f" {k}" in nodes.replace("(", " ").replace(",", " ").replace(")", " ") + " "}
    inputs, rank = "float[batch, seq, 8] x, float[batch, 1, 8] z, float[3, 2, 4] u", ", ".join("?" * rank)
    model = parse(f"({inputs}) => (float[{rank}] shrunk, int64[n] y) {{ {nodes} filled = ConstantOfShape(d) shrunk = Shrink(filled) y = Identity(d) }}", **given)
    seen = []

    class Look:
        """Sees the shape, and leaves the value alone."""

        def pattern(op, x):
            return op.Shrink(x)

        def check(x):
            seen.append(list(x.shape))
            return "looked at"

        def replace(op, x):
            return x

    rewrite.rule(tier="lift")(Look)
    try:
        rewrite.optimize(model, only=["look"], verify=False)
    finally:
        _program.rules.clear()
    return seen[0], model


@pytest.mark.parametrize("name", VALUES)
def test_values_are_known_by_name_and_are_those_of_onnx_runtime(name):
    nodes, expected = VALUES[name]
    found, model = known(nodes, len(expected))
    assert found == expected
    run = verify.session(model)
    for batch, seq in ((2, 5), (3, 7), (1, 2)):
        feeds = {"x": np.zeros((batch, seq, 8), np.float32), "z": np.zeros((batch, 1, 8), np.float32), "u": np.zeros((3, 2, 4), np.float32)}
        (values,) = run.run(["y"], feeds)
        assert [eval(str(d), {"batch": batch, "seq": seq}) for d in found] == list(values)


def test_a_sum_of_many_is_that_of_two_and_two_and_reads_each_once(monkeypatch):
    """A Concat of thousands of tensors along a named dimension took quadratic time."""
    dims = ["n", 3, "past + 1", "n", "seq - 2", 0, "n"]
    assert shapes.plus_all(dims) == functools.reduce(shapes.plus, dims) == "n + n + n + past + seq + 2"
    for odd in ([*dims, "2*n"], [*dims, "(a)//2"], ["n", "-(n)"], [None, "n"], []):
        assert shapes.plus_all(odd) == functools.reduce(shapes.plus, odd, 0)
    read, real = [], shapes._terms
    monkeypatch.setattr(shapes, "_terms", lambda d: (read.append(len(str(d))), real(d))[1])
    shapes.plus_all(["n"] * 500)
    assert sum(read) == 500
