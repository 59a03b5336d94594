"""Attention in every spelling becomes one node; near misses stay as they are."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import nodes, parse

import rewrite

E = 8
CONSTANTS = {
    "c": np.float32(E**-0.5), "root": np.float32(E**-0.25), "size": np.float32(E**0.5), "low": np.float32(-1e9),
    "lowest": np.float32(-3.4028235e38), "never": np.float32(-np.inf), "zero": np.float32(0), "one": np.float32(1),
    "cap": np.float32(2), "cap_inverse": np.float32(0.5), "each": np.linspace(0.5, 1.5, E).astype(np.float32), "two": np.array([2]), "three": np.array([3]), "first": np.array([1]),
    "grouped": np.array([1, 1, 2, 1, 1]), "grouped_3": np.array([1, 1, 1, 2, 1]), "heads": np.array([0, 4, -1, E]), "heads_3": np.array([0, -1, 4, E]), "tiled": np.array([1, 2, 1, 1]),
    "other_group": np.array([1, 2, 1, 1, 1]),
}  # fmt: skip

Q4, K4, V4 = "float[B, 4, S, 8] q", "float[B, 4, T, 8] k", "float[B, 4, T, 8] v"
TURN, SCORES, TAIL = "kt = Transpose<perm = [0, 1, 3, 2]>(k)", "m = MatMul(q, kt) s = Mul(m, c)", "p = Softmax<axis = -1>(s) y = MatMul(p, v)"


def model(body, inputs=(Q4, K4, V4), output="float[B, 4, S, 8] y", opset=18):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return parse(f"({', '.join(inputs)}) => ({output}) {{ {body} }}", opset, **{k: v for k, v in CONSTANTS.items() if k in words})


def fused(body, **options):
    """The attributes of the attention that a body becomes, and its inputs."""
    after = rewrite.optimize(model(body, **options)).model.proto
    onnx.checker.check_model(after, full_check=True)
    assert [n for n in nodes(after) if "FusedAttention" in n] == ["rewrite.FusedAttention"], nodes(after)
    assert "Softmax" not in nodes(after)
    node = next(n for n in after.graph.node if n.op_type.startswith("FusedAttention"))
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}, list(node.input)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("scale", "number"), [("s = Div(m, c)", E**0.5), ("s = Mul(c, m)", E**-0.5)])
def test_16_bit_scales(dtype, scale, number):
    kind = np.dtype(dtype).name
    inputs = ", ".join(i.replace("float[", f"{kind}[") for i in (Q4, K4, V4))
    text = f"({inputs}) => ({kind}[B, 4, S, 8] y) {{ {TURN} m = MatMul(q, kt) {scale} {TAIL} }}"
    after = rewrite.optimize(parse(text, 18, c=np.asarray(number, dtype))).model.proto
    (node,) = after.graph.node
    assert node.op_type.startswith("FusedAttention")
    assert {a.name: a.f for a in node.attribute}["scale"] == pytest.approx(E**-0.5, rel=2**-8)


SCALES = {
    "on the scores": f"{TURN} m = MatMul(q, kt) s = Mul(m, c)",
    "first factor": f"{TURN} m = MatMul(q, kt) s = Mul(c, m)",
    "divided": f"{TURN} m = MatMul(q, kt) s = Div(m, size)",
    "on q": f"{TURN} qs = Mul(q, c) s = MatMul(qs, kt)",
    "q divided": f"{TURN} qs = Div(q, size) s = MatMul(qs, kt)",
    "on k before the transpose": "ks = Mul(k, c) kt = Transpose<perm = [0, 1, 3, 2]>(ks) s = MatMul(q, kt)",
    "on k after the transpose": f"{TURN} ks = Mul(c, kt) s = MatMul(q, ks)",
    "on both": f"{TURN} qs = Mul(q, root) ks = Mul(kt, root) s = MatMul(qs, ks)",
}


@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale):
    attributes, inputs = fused(f"{SCALES[scale]} {TAIL}")
    assert attributes["scale"] == pytest.approx(E**-0.5, rel=1e-6)
    assert inputs == ["q", "k", "v"]


def test_no_scale_at_all():
    assert fused(f"{TURN} s = MatMul(q, kt) {TAIL}")[0].get("scale", 1.0) == 1.0


def test_a_scale_for_each_element_of_the_head_stays_outside():
    attributes, inputs = fused(f"{TURN} qs = Mul(q, each) s = MatMul(qs, kt) {TAIL}")
    assert attributes.get("scale", 1.0) == 1.0
    assert inputs[0] == "qs"


MASKS = {
    "added": ("a = Add(s, mask)", "float[B, 1, S, T] mask"),
    "added first": ("a = Add(mask, s)", "float[1, 1, S, T] mask"),
    "for every head": ("a = Add(s, mask)", "float[1, 4, S, T] mask"),
    "two dimensions": ("a = Add(s, mask)", "float[S, T] mask"),
    "where": ("a = Where(mask, s, low)", "bool[B, 1, S, T] mask"),
    "where not": ("a = Where(mask, low, s)", "bool[B, 1, S, T] mask"),
    "where inverted": ("inverse = Not(mask) a = Where(inverse, low, s)", "bool[B, 1, 1, T] mask"),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("guard", [False, True])
def test_masks(mask, guard):
    body, given = MASKS[mask]
    tail = "p0 = Softmax<axis = -1>(a) g = IsNaN(p0) p = Where(g, zero, p0) y = MatMul(p, v)" if guard else "p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    attributes, inputs = fused(f"{TURN} {SCORES} {body} {tail}", inputs=(Q4, K4, V4, given))
    assert inputs == ["q", "k", "v", "mask"]
    assert attributes.get("zero_masked", 0) == int(guard)


@pytest.mark.parametrize("axis", ["-1", "3"])
def test_softmax_axis(axis):
    fused(f"{TURN} {SCORES} p = Softmax<axis = {axis}>(s) y = MatMul(p, v)")


def test_soft_cap_before_the_mask():
    body = f"{TURN} {SCORES} i = Div(s, cap) t = Tanh(i) o = Mul(t, cap) a = Add(o, mask) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    attributes, _ = fused(body, inputs=(Q4, K4, V4, "float[B, 1, S, T] mask"))
    assert attributes["softcap"] == 2.0
    assert attributes["scale"] == pytest.approx(E**-0.5, rel=1e-6)


BIASES = {
    "scaled together": ("b = Add(m, mask) a = Mul(b, c)", "float[B, 4, 1, T] mask"),
    "scaled together, then masked": ("b = Add(mask, m) d = Div(b, size) a = Add(d, more)", "float[B, 4, 1, T] mask, float[B, 1, S, T] more"),
    "hidden after the bias": ("s = Mul(m, c) b = Add(s, mask) a = Where(keep, b, lowest)", "float[B, 4, S, T] mask, bool[B, 1, S, T] keep"),
    "dropped after the bias": ("s = Mul(m, c) b = Add(s, mask) a = Where(keep, lowest, b)", "float[B, 4, S, T] mask, bool[B, 1, S, T] keep"),
    "to minus infinity": ("s = Mul(m, c) b = Add(s, mask) a = Where(keep, b, never)", "float[B, 4, S, T] mask, bool[B, 1, S, T] keep"),
}


@pytest.mark.parametrize("bias", BIASES)
def test_biases_join_the_mask(bias):
    """Falcon's ALiBi, DeBERTa's relative positions."""
    body, given = BIASES[bias]
    attributes, inputs = fused(f"{TURN} m = MatMul(q, kt) {body} p = Softmax<axis = -1>(a) y = MatMul(p, v)", inputs=(Q4, K4, V4, given))
    assert attributes["scale"] == pytest.approx(E**-0.5, rel=1e-6)
    assert inputs[:3] == ["q", "k", "v"]
    assert inputs[3] not in ("", "mask")


def test_a_row_that_sees_nothing_keeps_a_bias_that_is_not_absorbed():
    """-1e9 + score differs from -1e9: such a row would no longer be uniform."""
    body = f"{TURN} {SCORES} b = Add(s, mask) a = Where(keep, b, low) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    result = rewrite.optimize(model(body, inputs=(Q4, K4, V4, "float[B, 4, S, T] mask", "bool[B, 1, S, T] keep")), explain=True)
    assert "Softmax" in nodes(result.model.proto)
    assert any(m.rule == "chosen_bias" and "hidden scores become -1e+09" in m.reason for m in result.report.near_misses)


@pytest.mark.parametrize(("low", "fused"), [(-65504, False), (-np.inf, True)])
def test_in_half_precision_no_finite_number_is_absorbed(low, fused):
    """The kernel adds in float32: -65504 + score would tell the keys of a row apart that sees none."""
    half = "(float16[B, 4, S, 8] q, float16[B, 4, T, 8] k, float16[B, 4, T, 8] v, float16[B, 4, S, T] bias, bool[B, 1, S, T] keep) => (float16[B, 4, S, 8] y)"
    body = f"{TURN} m = MatMul(q, kt) b = Add(m, bias) a = Where(keep, b, low) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    result = rewrite.optimize(parse(f"{half} {{ {body} }}", 18, low=np.float16(low)))
    assert result.report.rules["chosen_bias"].applied == int(fused)


@pytest.mark.parametrize(("keep", "left"), [(np.ones((1, 1, 5, 1), bool), False), (np.tri(5, dtype=bool).reshape(1, 1, 5, 5), True)])
def test_a_mask_that_hides_nothing(keep, left):
    """ViT in transformers: an encoder's mask without padding."""
    body = f"{TURN} {SCORES} e = Expand(keep, to) b = Where(e, zero, low) a = Add(s, b) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    shapes = "(float[2, 4, 5, 8] q, float[2, 4, 5, 8] k, float[2, 4, 5, 8] v) => (float[2, 4, 5, 8] y)"
    before = parse(f"{shapes} {{ {body} }}", 18, keep=keep, to=np.array([2, 1, 5, 5]), **{n: CONSTANTS[n] for n in ("c", "zero", "low")})
    after = rewrite.optimize(before).model.proto
    (node,) = [n for n in after.graph.node if n.op_type.startswith("FusedAttention")]
    assert (len(node.input) == 4) == left


def test_cross_attention_with_values_of_another_size():
    fused(f"{TURN} {SCORES} {TAIL}", inputs=(Q4, "float[B, 4, memory, 8] k", "float[B, 4, memory, 6] v"), output="float[B, 4, S, 6] y")


# --- grouped heads ------------------------------------------------------------------------------------------------------
def repeat(x, form):
    """`x` [B, 2, T, E] for four query heads: each key head serves two neighbours."""
    return {
        "expand": f"{x}5 = Unsqueeze({x}, two) {x}e = Expand({x}5, grouped) {x}r = Reshape({x}e, heads)",
        "tile": f"{x}5 = Unsqueeze({x}, two) {x}e = Tile({x}5, grouped) {x}r = Reshape({x}e, heads)",
        "modulo": f"{x}r = Tile({x}, tiled)",  # torch.repeat: head 2 is head 0 again, another grouping
        "wrong axis": f"{x}5 = Unsqueeze({x}, first) {x}e = Expand({x}5, other_group) {x}r = Reshape({x}e, heads)",
    }[form]


GROUPED = (Q4, "float[B, 2, T, 8] k", "float[B, 2, T, 8] v")


@pytest.mark.parametrize("form", ["expand", "tile"])
def test_grouped_heads(form):
    _, inputs = fused(f"{repeat('k', form)} {repeat('v', form)} kt = Transpose<perm = [0, 1, 3, 2]>(kr) {SCORES} p = Softmax<axis = -1>(s) y = MatMul(p, vr)", inputs=GROUPED)
    assert inputs == ["q", "k", "v"]


def test_grouped_heads_repeated_before_the_transpose():
    def head(x):
        return f"{x}5 = Unsqueeze({x}, three) {x}e = Expand({x}5, grouped_3) {x}r = Reshape({x}e, heads_3) {x}h = Transpose<perm = [0, 2, 1, 3]>({x}r)"

    body = f"{head('k')} {head('v')} kt = Transpose<perm = [0, 1, 3, 2]>(kh) {SCORES} p = Softmax<axis = -1>(s) y = MatMul(p, vh)"
    after = rewrite.optimize(model(body, inputs=(Q4, "float[B, T, 2, 8] k", "float[B, T, 2, 8] v"))).model.proto
    assert nodes(after) == ["Transpose", "Transpose", "rewrite.FusedAttention"]


@pytest.mark.parametrize("form", ["modulo", "wrong axis"])
def test_another_grouping_keeps_its_repetition(form):
    _, inputs = fused(f"{repeat('k', form)} {repeat('v', form)} kt = Transpose<perm = [0, 1, 3, 2]>(kr) {SCORES} p = Softmax<axis = -1>(s) y = MatMul(p, vr)", inputs=GROUPED)
    assert inputs == ["q", "kr", "vr"]


# --- three dimensions ----------------------------------------------------------------------------------------------------
Q3, K3, V3 = "float[N, S, 8] q", "float[N, T, 8] k", "float[N, T, 8] v"


@pytest.mark.parametrize("mask", ["", "float[N, S, T] mask", "float[1, S, T] mask", "float[S, T] mask"])
def test_heads_folded_into_the_batch(mask):
    apply = "a = Add(s, mask)" if mask else "a = Identity(s)"
    body = f"kt = Transpose<perm = [0, 2, 1]>(k) {SCORES} {apply} p = Softmax<axis = 2>(a) y = MatMul(p, v)"
    fused(body, inputs=(Q3, K3, V3, *([mask] if mask else [])), output="float[N, S, 8] y")


def test_keys_with_positions_first():
    """nn.MultiheadAttention: q, k, v [positions, B * H, E], the two transposes of the keys merged."""
    body = "qt = Transpose<perm = [1, 0, 2]>(q) kt = Transpose<perm = [1, 2, 0]>(k) vt = Transpose<perm = [1, 0, 2]>(v) m = MatMul(qt, kt) s = Mul(m, c) p = Softmax<axis = -1>(s) y = MatMul(p, vt)"
    fused(body, inputs=("float[S, N, 8] q", "float[T, N, 8] k", "float[T, N, 8] v"), output="float[N, S, 8] y")


# --- ONNX's own, and near misses ---------------------------------------------------------------------------------------------
def test_the_attention_of_opset_23():
    attributes, inputs = fused("y = Attention<scale = 0.25>(q, k, v, mask)", inputs=(*GROUPED, "bool[B, 1, S, T] mask"), opset=23)
    assert attributes["scale"] == 0.25
    assert inputs == ["q", "k", "v", "mask"]
    assert fused("y = Attention(q, k, v)", opset=23)[0]["scale"] == pytest.approx(E**-0.5)


NEAR = {
    "softmax over queries": f"{TURN} {SCORES} p = Softmax<axis = 2>(s) y = MatMul(p, v)",
    "no softmax": f"{TURN} {SCORES} p = Sigmoid(s) y = MatMul(p, v)",
    "log softmax": f"{TURN} {SCORES} p = LogSoftmax<axis = -1>(s) y = MatMul(p, v)",
    "weights changed": f"{TURN} {SCORES} p0 = Softmax<axis = -1>(s) p = Mul(p0, c) y = MatMul(p, v)",
    "NaN becomes one": f"{TURN} {SCORES} p0 = Softmax<axis = -1>(s) g = IsNaN(p0) p = Where(g, one, p0) y = MatMul(p, v)",
    "weights cut": f"{TURN} {SCORES} p0 = Softmax<axis = -1>(s) p = Relu(p0) y = MatMul(p, v)",
    "cap of another kind": f"{TURN} {SCORES} t = Sigmoid(s) o = Mul(t, cap) p = Softmax<axis = -1>(o) y = MatMul(p, v)",
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_stay(case):
    before = model(NEAR[case])
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


def test_keys_that_are_not_transposed_stay():
    before = model("m = MatMul(q, k) s = Mul(m, c) p = Softmax<axis = -1>(s) y = MatMul(p, v)", inputs=(Q4, "float[B, 4, 8, T] k", V4))
    assert "Softmax" in nodes(rewrite.optimize(before).model.proto)


def test_weights_that_are_an_output_stay_computed_here():
    before = model(f"{TURN} {SCORES} {TAIL}", output="float[B, 4, S, 8] y, float[B, 4, S, T] p")
    result = rewrite.optimize(before)
    assert nodes(result.model.proto) == nodes(before)
    assert any("needed elsewhere" in m.reason for m in result.report.near_misses if m.rule == "attention")


def test_head_counts_that_do_not_divide_stay():
    before = model(f"{TURN} {SCORES} {TAIL}", inputs=(Q4, "float[B, 1, T, 8] k", "float[B, 4, T, 8] v"))
    assert "rewrite.FusedAttention" not in nodes(rewrite.optimize(before).model.proto)


@pytest.mark.parametrize("one", ["q", "k", "v"])
def test_a_batch_of_one_for_many_stays(one):
    """The plugin takes queries, keys and values of the same batch; the product broadcasts."""
    inputs = [f"float[{1 if x == one else 'B'}, 4, {n}, 8] {x}" for x, n in (("q", "S"), ("k", "T"), ("v", "T"))]
    result = rewrite.optimize(model(f"{TURN} {SCORES} {TAIL}", inputs=inputs))
    assert "rewrite.FusedAttention" not in nodes(result.model.proto)
    assert any("expected the same for all" in m.reason for m in result.report.near_misses if m.rule == "attention")


WIDENED = {"batch": ("1, 4, S", "B, 1, S, T"), "batch by number": ("1, 4, S", "3, 4, S, T"), "heads": ("B, 1, S", "B, 4, S, T"), "queries": ("B, 4, 1", "S, T"), "one head": ("1, S", "B, S, T")}


@pytest.mark.parametrize("case", WIDENED)
def test_a_mask_that_makes_more_of_the_scores_stays(case):
    """The product broadcasts, and so does the reference; kernels have as many results as queries."""
    lead, mask = WIDENED[case]
    rank = lead.count(",") + 2
    turn = TURN if rank == 4 else "kt = Transpose<perm = [0, 2, 1]>(k)"
    keys = lead.rsplit(",", 1)[0] + ", T"
    inputs = [f"float[{lead}, 8] q", f"float[{keys}, 8] k", f"float[{keys}, 8] v", f"float[{mask}] mask"]
    output = {"batch by number": "3, 4, S", "heads": "B, 4, S", "one head": "B, S"}.get(case, "B, 4, S")
    result = rewrite.optimize(model(f"{turn} {SCORES} a = Add(s, mask) p = Softmax<axis = -1>(a) y = MatMul(p, v)", inputs=inputs, output=f"float[{output}, 8] y"))
    assert "rewrite.FusedAttention" not in nodes(result.model.proto)
    assert any("expected a mask that is broadcast to the scores" in m.reason for m in result.report.near_misses if m.rule == "attention")


def test_a_batch_of_another_name_is_fused_and_does_what_it_did():
    """Exporters may name each input's batch for itself. Where sizes differ, one of them is 1, or both models fail."""
    body = f"{TURN} {SCORES} a = Add(s, mask) p = Softmax<axis = -1>(a) y = MatMul(p, v)"
    before = model(body, inputs=(Q4, K4, V4, "float[M, 1, S, T] mask"))
    fused(body, inputs=(Q4, K4, V4, "float[M, 1, S, T] mask"))
    sessions = [onnxruntime.InferenceSession(m.SerializeToString()) for m in (before, rewrite.optimize(before).model.proto)]
    rng = np.random.default_rng(0)
    for queries, masks in ((2, 2), (2, 1), (1, 2), (2, 3)):
        shapes = {"q": (queries, 4, 3, 8), "k": (queries, 4, 5, 8), "v": (queries, 4, 5, 8), "mask": (masks, 1, 3, 5)}
        feeds = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        if (queries, masks) == (2, 3):
            for session in sessions:
                with pytest.raises(Exception, match="broadcast"):
                    session.run(None, feeds)
            continue
        want, got = (s.run(None, feeds)[0] for s in sessions)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attribute", ["q_num_heads = 4, kv_num_heads = 4"])
def test_attention_of_opset_23_on_three_dimensions_stays(attribute):
    before = model(f"y = Attention<{attribute}>(q, k, v)", inputs=("float[B, S, 32] q", "float[B, T, 32] k", "float[B, T, 32] v"), output="float[B, S, 32] y", opset=23)
    assert nodes(rewrite.optimize(before).model.proto) == ["Attention"]
