"""Products of matrices written as Einsum; every other equation stays."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import nodes, parse

import rewrite

Q, K = "float[batch, 4, seq, 8] q", "float[batch, 4, keys, 8] k"


def after(equation, inputs, output, opset=18, **weights):
    body = f'y = Einsum<equation = "{equation}">({", ".join([i.split()[-1] for i in inputs] + list(weights))})'
    return rewrite.optimize(parse(f"({', '.join(inputs)}) => ({output} y) {{ {body} }}", opset, **weights), only=["einsum_product"]).model.proto


def perms(proto):
    return [list(n.attribute[0].ints) for n in proto.graph.node if n.op_type == "Transpose"]


@pytest.mark.parametrize(
    ("equation", "one", "two", "output", "expected"),
    [
        ("bhqd,bhkd->bhqk", Q, K, "float[batch, 4, seq, keys]", [[0, 1, 3, 2]]),
        ("bqhd,bkhd->bhqk", "float[batch, seq, 4, 8] q", "float[batch, keys, 4, 8] k", "float[batch, 4, seq, keys]", [[0, 2, 1, 3], [0, 2, 3, 1]]),
        ("bhqk,bhkd->bhqd", "float[batch, 4, seq, keys] p", K, "float[batch, 4, seq, 8]", []),
        ("bhqk,bkhd->bqhd", "float[batch, 4, seq, keys] p", "float[batch, keys, 4, 8] v", "float[batch, seq, 4, 8]", [[0, 2, 1, 3], [0, 2, 1, 3]]),
        (" b h k d , b h q d -> b h q k ", K, Q, "float[batch, 4, seq, keys]", [[0, 1, 3, 2]]),
        ("bhid,bhjd->bijh", Q, K, "float[batch, seq, keys, 4]", [[0, 1, 3, 2], [0, 2, 3, 1]]),
        ("ij,jk->ki", "float[n, 5] a", "float[5, m] b", "float[m, n]", [[1, 0], [1, 0]]),
    ],
)
def test_a_product_of_matrices(equation, one, two, output, expected):
    """ "ki" is the product the other way round, of both transposed."""
    proto = after(equation, [one, two], output)
    assert sorted(nodes(proto)) == ["MatMul", *["Transpose"] * len(expected)]
    assert perms(proto) == expected


@pytest.mark.parametrize(("equation", "shape", "left"), [("bsd,de->bse", [8, 6], ["MatMul"]), ("bsd,ed->bse", [6, 8], ["MatMul", "Transpose"]), ("bsd,de->ebs", [8, 6], ["MatMul", "Transpose"])])
def test_a_linear_layer(equation, shape, left):
    output = "float[6, batch, seq]" if equation.endswith("ebs") else "float[batch, seq, 6]"
    assert sorted(nodes(after(equation, ["float[batch, seq, 8] x"], output, w=np.ones(shape, np.float32)))) == left


@pytest.mark.parametrize(
    ("equation", "one", "two", "output"),
    [
        ("bhqd,bhkd->bhq", Q, K, "float[batch, 4, seq]"),  # sums over the keys, too
        ("bhqd,bhkd->bqk", Q, K, "float[batch, seq, keys]"),  # sums over the heads, too
        ("bhqd,bhkd->bhqkd", Q, K, "float[batch, 4, seq, keys, 8]"),  # sums over nothing
        ("bsd,dhe->bshe", "float[batch, seq, 8] x", "float[8, 4, 2] w", "float[batch, seq, 4, 2]"),  # two letters of each
        ("bhsd,hde->bhse", "float[batch, 4, seq, 8] x", "float[4, 8, 2] w", "float[batch, 4, seq, 2]"),  # two letters beside a shared one
        ("ii,ij->j", "float[8, 8] a", "float[8, 4] b", "float[4]"),  # a diagonal
        ("...ij,...jk->...ik", "float[batch, 5, 8] a", "float[batch, 8, 4] b", "float[batch, 5, 4]"),
        ("ij,jk", "float[5, 8] a", "float[8, 4] b", "float[5, 4]"),  # no result named
        ("ij,ij->ij", "float[5, 8] a", "float[5, 8] b", "float[5, 8]"),  # element by element
        ("ij,jk->ik", "float[5, 8] a", "float[n, 4] b", "float[5, 4]"),  # n may be 1, which Einsum repeats
        ("i,ij->j", "float[8] a", "float[8, 4] b", "float[4]"),  # a vector
    ],
)
def test_other_equations_stay(equation, one, two, output):
    assert nodes(after(equation, [one, two], output)) == ["Einsum"]


def test_three_operands_stay():
    proto = after("ij,jk,kl->il", ["float[5, 8] a", "float[8, 4] b", "float[4, 3] c"], "float[5, 3]")
    assert nodes(proto) == ["Einsum"]


def test_an_attention_by_einsum_is_fused():
    body = """s = Einsum<equation = "bqhd,bkhd->bhqk">(q, k) t = Mul(s, c) p = Softmax<axis = -1>(t) y = Einsum<equation = "bhqk,bkhd->bqhd">(p, v)"""
    proto = parse(f"(float[b, s, 4, 8] q, float[b, t, 4, 8] k, float[b, t, 4, 8] v) => (float[b, s, 4, 8] y) {{ {body} }}", c=np.float32(0.3))
    assert nodes(rewrite.optimize(proto).model.proto) == ["Transpose", "Transpose", "Transpose", "rewrite.FusedAttention", "Transpose"]
