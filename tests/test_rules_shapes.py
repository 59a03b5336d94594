"""Shape arithmetic, heads and identities: detours of exporters made plain; near misses stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import nodes, parse

import rewrite
from rewrite.shapes import settle

CONSTANTS = {
    "i0": np.array(0), "i1": np.array(1), "zero": np.array([0]), "minus": np.array([-1]), "four": np.array([4]), "eight": np.array([8]), "two": np.array([2]), "three": np.array([3]),
    "merged": np.array([0, 0, 32]), "flat": np.array([-1, 8]), "unit": np.float32(1), "nearly": np.float32(1.0005), "wide": np.ones((3, 1, 1), np.float32),
    "expand": np.array([1, 1, 2, 1, 1]), "heads": np.array([0, 4, -1, 8]),
}  # fmt: skip


def model(body, inputs, output, opset=18, **more):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return parse(f"({inputs}) => ({output}) {{ {body} }}", opset, **{k: v for k, v in {**CONSTANTS, **more}.items() if k in words})


def after(body, inputs, output, **options):
    return rewrite.optimize(model(body, inputs, output, **options)).model.proto


B, S = "sh = Shape(x) b0 = Gather(sh, i0) b = Unsqueeze(b0, zero)", "s0 = Gather(sh, i1) s = Unsqueeze(s0, zero)"


def test_reshape_by_computed_shape():
    proto = after(f"{B} {S} to = Concat<axis = 0>(b, s, four, eight) y = Reshape(x, to)", "float[batch, seq, 32] x", "float[batch, seq, 4, 8] y")
    assert nodes(proto) == ["Reshape"]
    assert [list(np.frombuffer(i.raw_data, np.int64)) for i in proto.graph.initializer] == [[0, 0, 4, 8]]


def test_reshape_with_two_open_dimensions_stays():
    before = model(f"{B} {S} n = Mul(b, s) k = Div(n, two) to = Concat<axis = 0>(k, two, minus) y = Reshape(x, to)", "float[batch, seq, 32] x", "float[p, 2, q] y")
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


def test_keys_transposed_through_three_dimensions():
    body = """sh = Shape(k) h = Slice(sh, zero, two) t = Slice(sh, two, three) d = Slice(sh, three, four) folded = Concat<axis = 0>(minus, t, d) k3 = Reshape(k, folded)
        k3t = Transpose<perm = [0, 2, 1]>(k3) back = Concat<axis = 0>(h, d, t) y = Reshape(k3t, back)"""
    proto = after(body, "float[batch, 4, seq, 8] k", "float[batch, 4, 8, seq] y")
    assert nodes(proto) == ["Transpose"]
    assert list(proto.graph.node[0].attribute[0].ints) == [0, 1, 3, 2]


def test_another_permutation_stays():
    body = "k3 = Reshape(k, flat3) k3t = Transpose<perm = [0, 2, 1]>(k3) y = Reshape(k3t, back)"
    proto = after(body, "float[2, 4, 6, 8] k", "float[2, 4, 6, 8] y", flat3=np.array([8, 6, 8]), back=np.array([2, 4, 6, 8]))
    assert nodes(proto) == ["Reshape", "Transpose", "Reshape"]


HEADS = {"bmm": "q3 = Reshape(q, fq) k3 = Reshape(k, fq) kt = Transpose<perm = [0, 2, 1]>(k3) m = MatMul(q3, kt) y = Reshape(m, fs)"}


def test_scores_of_bmm_in_four_dimensions():
    proto = after(HEADS["bmm"], "float[2, 4, 5, 8] q, float[2, 4, 5, 8] k", "float[2, 4, 5, 5] y", fq=np.array([8, 5, 8]), fs=np.array([2, 4, 5, 5]))
    assert nodes(proto) == ["Transpose", "MatMul"]


def test_scores_unfolded_into_other_heads_stay():
    proto = after(HEADS["bmm"], "float[2, 4, 5, 8] q, float[2, 4, 5, 8] k", "float[4, 2, 5, 5] y", fq=np.array([8, 5, 8]), fs=np.array([4, 2, 5, 5]))
    assert nodes(proto) == ["Reshape", "Reshape", "Transpose", "MatMul", "Reshape"]


BIASED = "q3 = Reshape(q, fq) k3 = Reshape(k, fq) kt = Transpose<perm = [0, 2, 1]>(k3) m = MatMul(q3, kt) s = Mul(m, half) a = Add(s, bias) y = Reshape(a, fs)"


@pytest.mark.parametrize("bias", ["float[8, 5, 5] bias", "float[8, 1, 5] bias", "float[8, 5, 1] bias"])
def test_scores_of_baddbmm_with_their_bias(bias):
    """BLOOM's ALiBi, DeBERTa's relative positions: the bias is unfolded alone."""
    options = {"fq": np.array([8, 5, 8]), "fs": np.array([2, 4, 5, 5]), "half": np.float32(0.5)}
    proto = after(BIASED, f"float[2, 4, 5, 8] q, float[2, 4, 5, 8] k, {bias}", "float[2, 4, 5, 5] y", **options)
    assert nodes(proto) == ["Transpose", "MatMul", "Mul", "Unsqueeze", "Reshape", "Add"]


@pytest.mark.parametrize("bias", ["float[1, 5, 5] bias", "float[5, 5] bias"])
def test_a_bias_without_heads_stays(bias):
    options = {"fq": np.array([8, 5, 8]), "fs": np.array([2, 4, 5, 5]), "half": np.float32(0.5)}
    proto = after(BIASED, f"float[2, 4, 5, 8] q, float[2, 4, 5, 8] k, {bias}", "float[2, 4, 5, 5] y", **options)
    assert nodes(proto) == ["Reshape", "Reshape", "Transpose", "MatMul", "Mul", "Add", "Reshape"]


def test_keys_scaled_while_folded():
    body = HEADS["bmm"].replace("m = MatMul(q3, kt)", "ks = Mul(kt, half) m = MatMul(q3, ks)")
    proto = after(body, "float[2, 4, 5, 8] q, float[2, 4, 5, 8] k", "float[2, 4, 5, 5] y", fq=np.array([8, 5, 8]), fs=np.array([2, 4, 5, 5]), half=np.float32(0.5))
    assert nodes(proto) == ["Transpose", "Mul", "MatMul"]


def test_a_product_folded_for_itself_alone():
    body = "p3 = Reshape(p, fp) v3 = Reshape(v, fv) m = MatMul(p3, v3) y = Reshape(m, back)"
    options = {"fp": np.array([8, 5, 5]), "fv": np.array([8, 5, 8]), "back": np.array([2, 4, 5, 8])}
    assert nodes(after(body, "float[2, 4, 5, 5] p, float[2, 4, 5, 8] v", "float[2, 4, 5, 8] y", **options)) == ["MatMul"]
    other = after(body, "float[4, 2, 5, 5] p, float[2, 4, 5, 8] v", "float[2, 4, 5, 8] y", **options)
    assert nodes(other) == ["Reshape", "Reshape", "MatMul", "Reshape"]


@pytest.mark.parametrize(("dim", "found"), [("((4*batch)//batch)", 4), ("((seq**2)//seq)", "seq"), ("(batch*seq)//(2*seq)", "(batch*seq)//(2*seq)"), ("seq//2", "seq//2"),
                                            ("6*batch//3", "2*batch"), ("max(a, b)//a", "max(a, b)//a"), ("a//", "a//"), (7, 7), (None, None)])  # fmt: skip
def test_quotients_that_come_out_even(dim, found):
    assert settle(dim) == found


def test_weighting_of_bmm_in_four_dimensions():
    body = "s3 = Reshape(s, fs) p = Softmax<axis = -1>(s3) v3 = Reshape(v, fv) m = MatMul(p, v3) y = Reshape(m, back)"
    options = {"fs": np.array([8, 5, 5]), "fv": np.array([8, 5, 8]), "back": np.array([2, 4, 5, 8])}
    assert nodes(after(body, "float[2, 4, 5, 5] s, float[2, 4, 5, 8] v", "float[2, 4, 5, 8] y", **options)) == ["Softmax", "MatMul"]
    near = body.replace("axis = -1", "axis = 1")
    assert nodes(after(near, "float[2, 4, 5, 5] s, float[2, 4, 5, 8] v", "float[2, 4, 5, 8] y", **options)) == ["Reshape", "Softmax", "Reshape", "MatMul", "Reshape"]


def test_repetition_of_heads_with_constant_shapes():
    proto = after("l = Unsqueeze(k, two) t = Tile(l, expand) y = Reshape(t, heads)", "float[batch, 2, seq, 8] k", "float[batch, 4, seq, 8] y")
    assert nodes(proto) == ["Unsqueeze", "Expand", "Reshape"]


def test_a_linear_layer_on_two_dimensions_in_between():
    body = "f = Reshape(x, flat) g = Gemm(f, w, b) y = Reshape(g, back)"
    w, b = np.ones((8, 6), np.float32), np.ones(6, np.float32)
    proto = after(body, "float[2, seq, 8] x", "float[2, seq, 6] y", w=w, b=b, back=np.array([2, -1, 6]))
    assert nodes(proto) == ["rewrite.MatMulAct"]
    split = after(body, "float[2, seq, 8] x", "float[2, seq, 2, 3] y", w=w, b=b, back=np.array([2, -1, 2, 3]))
    assert nodes(split) == ["Reshape", "rewrite.MatMulAct", "Reshape"]


def test_heads_put_together_by_the_reshape_before_a_linear_layer():
    """GPT-2's projection after attention: [B, S, 4, 2] -> [B * S, 8] -> Gemm -> [B, S, 6], then the residual."""
    body = "t = Transpose<perm = [0, 2, 1, 3]>(x) f = Reshape(t, flat) g = Gemm(f, w, b) o = Reshape(g, back) y = Add(o, r)"
    options = {"w": np.ones((8, 6), np.float32), "b": np.ones(6, np.float32), "back": np.array([2, -1, 6])}
    assert nodes(after(body, "float[2, 4, seq, 2] x, float[2, seq, 6] r", "float[2, seq, 6] y", **options)) == ["Transpose", "Reshape", "rewrite.MatMulAct"]


@pytest.mark.parametrize(("body", "left"), [("e = Exp(x) y = Mul(e, unit)", ["Exp"]), ("e = Exp(x) y = Mul(unit, e)", ["Exp"]), ("e = Exp(x) y = Div(e, unit)", ["Exp"]),
                                            ("e = Exp(x) y = Mul(e, nearly)", ["Exp", "Mul"]), ("e = Exp(x) y = Add(e, unit)", ["Exp", "Add"])])  # fmt: skip
def test_a_factor_of_one(body, left):
    assert [n for n in nodes(after(body, "float[n, 8] x", "float[n, 8] y")) if n != "Identity"] == left


def test_a_factor_of_ones_that_broadcasts_stays():
    assert nodes(after("e = Exp(x) y = Mul(e, wide)", "float[1, n, 8] x", "float[3, n, 8] y")) == ["Exp", "Mul"]


def test_a_value_replaced_by_another_leaves_no_dead_node():
    """TorchScript's baddbmm: both factors of one vanish with the nodes that computed them."""
    proto = after("a = Mul(x, unit) b = Mul(z, unit) y = Add(a, b)", "float[n, 8] x, float[n, 8] z", "float[n, 8] y")
    assert nodes(proto) == ["Add"]
    assert list(proto.graph.node[0].input) == ["x", "z"]


def test_sums_of_sizes_have_one_spelling():
    """PyTorch writes "seq + past" and "past + seq" for the sizes of caches in one model."""
    from rewrite.shapes import minus, ordered, plus

    assert ordered("seq + past") == plus("seq", "past") == plus("past", "seq") == "past + seq"
    assert (minus("past + seq", "seq"), minus("past + seq", "past"), minus("a + b + c", "b")) == ("past", "seq", "a + c")
    assert (plus("seq", 1), plus("seq + 1", -1), plus("seq", -3), minus("seq + 1", "seq"), plus(2, 3)) == ("seq + 1", "seq", "seq - 3", 1, 5)
    assert (ordered("b//2 + a"), minus("seq", "past")) == ("b//2 + a", "seq - (past)")
