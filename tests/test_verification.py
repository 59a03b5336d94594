"""Verification catches what it is there for: for each plugin, a reference with a planted bug is rolled back and named."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import nodes, parse

import rewrite
from rewrite import registry
from rewrite.errors import CheckFailed
from rewrite.model import load
from rewrite.verify import TOLERANCE, Spec, check_models, check_site, compare, model_inputs

RNG = np.random.default_rng(7)
W, W2, B = RNG.standard_normal((8, 8)), RNG.standard_normal((8, 8)), RNG.standard_normal(8)


def text(body: str, inputs: str, output: str, dtype: str) -> str:
    return f"({inputs}) => ({output}) {{ {body} }}".replace("float[", f"{dtype}[")


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 model in float16 throughout (the text format has no float16 constants)."""
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if attribute.name == "value_float":
                node.attribute.remove(attribute)
                node.attribute.append(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.array(attribute.f, np.float16))))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.checker.check_model(model, full_check=True)
    return model


def typed(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    return half(model) if dtype == "float16" else model


def gelu(dtype, approximate="none"):
    if approximate == "tanh":
        body = """three = Constant<value_float = 3.0>() c = Constant<value_float = 0.044715>() r = Constant<value_float = 0.7978845608>()
            one = Constant<value_float = 1.0>() half = Constant<value_float = 0.5>()
            p = Pow(x, three) cp = Mul(p, c) u = Add(x, cp) a = Mul(u, r) t = Tanh(a) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)"""
    else:
        body = """root = Constant<value_float = 1.41421354>() one = Constant<value_float = 1.0>() half = Constant<value_float = 0.5>()
            d = Div(x, root) e = Erf(d) s = Add(e, one) h = Mul(x, half) y = Mul(h, s)"""
    return typed(parse(text(body, "float[n, 8] x", "float[n, 8] y", "float")), dtype)


def swish(dtype):
    return parse(text("s = Sigmoid(x) y = Mul(x, s)", "float[n, 8] x", "float[n, 8] y", dtype))


def cast(dtype):
    return {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]


def rms_norm(dtype, epsilon=1e-6):
    body = f"""two = Constant<value_float = 2.0>() eps = Constant<value_float = {epsilon}>() axes = Constant<value_ints = [-1]>()
        c = Cast<to = 1>(x) p = Pow(c, two) m = ReduceMean(p, axes) a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r) n1 = Mul(c, i)
        h = Cast<to = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(cast(dtype)))}>(n1) y = Mul(w, h)"""
    return parse(text(body, "float[n, 8] x", "float[n, 8] y", dtype), w=(RNG.random(8) + 0.5).astype(cast(dtype)))


def layer_norm(dtype, epsilon=1e-12):
    """At opset 16, which has no LayerNormalization: the plugin stands for it."""
    body = f"""two = Constant<value_float = 2.0>() eps = Constant<value_float = {epsilon}>()
        m = ReduceMean<axes = [-1]>(x) c = Sub(x, m) p = Pow(c, two) v = ReduceMean<axes = [-1]>(p) a = Add(v, eps) r = Sqrt(a) d = Div(c, r) s = Mul(d, w) y = Add(s, b)"""
    return parse(text(body, "float[n, 8] x", "float[n, 8] y", dtype), opset=16, w=(RNG.random(8) + 0.5).astype(cast(dtype)), b=B.astype(cast(dtype)))


def matmul(dtype, tail="y = Gelu(s)", opset=20, transposed=False):
    product = "s = Gemm<transB = 1>(x, w, b)" if transposed else "m = MatMul(x, w) s = Add(m, b)"
    return parse(text(f"{product} {tail}", "float[n, 8] x, float[n, 8] z", "float[n, 8] y", dtype), opset, w=W.astype(cast(dtype)), b=B.astype(cast(dtype)))


def gated(dtype):
    body = "g = MatMul(x, w) u = MatMul(x, v) s = Sigmoid(g) a = Mul(g, s) y = Mul(a, u)"
    return parse(text(body, "float[n, 8] x", "float[n, 8] y", dtype), w=W.astype(cast(dtype)), v=W2.astype(cast(dtype)))


def merged(dtype):
    body = "m = MatMul(x, w) g, u = Split<axis = -1, num_outputs = 2>(m) s = Sigmoid(g) a = Mul(g, s) y = Mul(a, u)"
    return parse(text(body, "float[n, 8] x", "float[n, 8] y", dtype), w=np.concatenate([W, W2], 1).astype(cast(dtype)))


def attention(dtype, mask="float", cap=False):
    apply = {
        "float": "a = Add(s, mask) p = Softmax<axis = -1>(a)",
        "bool": "low = Constant<value_float = -65504.0>() a = Where(mask, s, low) p = Softmax<axis = -1>(a)",
        "none": "p = Softmax<axis = -1>(s)",
    }[mask]
    capped = "i = Constant<value_float = 0.5>() o = Constant<value_float = 2.0>() sc = Mul(s0, i) th = Tanh(sc) s = Mul(th, o)" if cap else "s = Identity(s0)"
    body = f"k = Transpose<perm = [0, 1, 3, 2]>(key) c = Constant<value_float = 0.35355339>() m = MatMul(q, k) s0 = Mul(m, c) {capped} {apply} y = MatMul(p, v)"
    given = {"float": ", float[B, 1, S, T] mask", "bool": ", bool[B, 1, S, T] mask", "none": ""}[mask]
    return typed(parse(text(body, f"float[B, 4, S, 8] q, float[B, 4, T, 8] key, float[B, 4, T, 8] v{given}", "float[B, 4, S, 8] y", "float")), dtype)


def grouped(dtype):
    """Two key heads for four query heads."""
    repeat = "u{0} = Unsqueeze({0}, two) e{0} = Expand(u{0}, times) {1} = Reshape(e{0}, heads)"
    body = f"""two = Constant<value_ints = [2]>() times = Constant<value_ints = [1, 1, 2, 1, 1]>() heads = Constant<value_ints = [0, 4, -1, 8]>()
        {repeat.format("key", "k4")} {repeat.format("v", "v4")} k = Transpose<perm = [0, 1, 3, 2]>(k4) c = Constant<value_float = 0.35355339>()
        m = MatMul(q, k) s = Mul(m, c) p = Softmax<axis = -1>(s) y = MatMul(p, v4)"""
    return typed(parse(text(body, "float[B, 4, S, 8] q, float[B, 2, T, 8] key, float[B, 2, T, 8] v", "float[B, 4, S, 8] y", "float")), dtype)


def rotary(dtype, interleaved=False):
    if interleaved:
        turn = """zero = Constant<value_ints = [0]>() one = Constant<value_ints = [1]>() two = Constant<value_ints = [2]>() last = Constant<value_ints = [-1]>() big = Constant<value_ints = [8]>()
            even = Slice(x, zero, big, last, two) odd = Slice(x, one, big, last, two) n1 = Neg(odd) a = Unsqueeze(n1, last) b = Unsqueeze(even, last)
            st = Concat<axis = -1>(a, b) to = Constant<value_ints = [0, 0, 0, 8]>() r = Reshape(st, to)"""
    else:
        turn = "f, g = Split<axis = -1, num_outputs = 2>(x) n1 = Neg(g) r = Concat<axis = -1>(n1, f)"
    return parse(text(f"{turn} xc = Mul(x, cos) rs = Mul(r, sin) y = Add(xc, rs)", "float[B, 2, S, 8] x, float[B, 1, S, 8] cos, float[B, 1, S, 8] sin", "float[B, 2, S, 8] y", dtype))


def bug(**changes):
    """Attributes changed: by a factor, or to a value."""

    def plant(reference):
        def wrong(*inputs, **attributes):
            for name, change in changes.items():
                attributes[name] = change(attributes[name]) if callable(change) else change
            return reference(*inputs, **attributes)

        return wrong

    return plant


def without(position):
    """One input ignored."""

    def plant(reference):
        return lambda *inputs, **attributes: reference(*(None if i == position else x for i, x in enumerate(inputs)), **attributes)

    return plant


def altered(position, change):
    def plant(reference):
        return lambda *inputs, **attributes: reference(*(change(x) if i == position else x for i, x in enumerate(inputs)), **attributes)

    return plant


def output(change):
    return lambda reference: lambda *inputs, **attributes: change(reference(*inputs, **attributes))


def swapped_halves(x):
    return np.concatenate(np.split(x, 2, -1)[::-1], -1)


def in_turn(reference):
    """The wrong grouping: query heads take the key heads by turns, 0 1 0 1, where it is 0 0 1 1."""
    return lambda q, k, v, *others, **attributes: reference(q, np.tile(k, (1, 2, 1, 1)), np.tile(v, (1, 2, 1, 1)), *others, **attributes)


def without_cast(y):
    """The result as it was computed, in float32."""
    return y.astype(np.float32)


def skewed(y):
    y = y.copy()
    y.reshape(-1)[-1] *= 1.01  # one element, by one percent
    return y


TYPES = ("float", "float16")
PLANTED = [
    # plugin, the model that holds it, the bug
    # The two forms of Gelu differ by 5e-4, which is within the rounding of float16.
    *[("Gelu", gelu, (t,), output(lambda y: y * y.dtype.type(1.01)), "1 % off") for t in TYPES],
    ("Gelu", gelu, ("float",), bug(approximate="tanh"), "other form"),
    ("Gelu", gelu, ("float", "tanh"), bug(approximate="none"), "other form"),
    *[("Swish", swish, (t,), b, n) for t in TYPES for b, n in ((bug(alpha=1.01), "alpha 1 % off"), (output(skewed), "one element"))],
    *[("RMSNormalization", rms_norm, (t,), b, n) for t in TYPES for b, n in ((bug(epsilon=lambda e: 10 * e), "epsilon x 10"), (altered(1, lambda w: w[::-1]), "weight reversed"))],
    ("LayerNormalization", layer_norm, ("float",), bug(epsilon=lambda e: 10 * e), "epsilon x 10"),
    ("LayerNormalization", layer_norm, ("float",), without(2), "no bias"),
    *[("MatMulAct", matmul, (t,), b, n) for t in TYPES for b, n in ((without(2), "no bias"), (bug(activation="relu"), "relu"), (bug(activation="none"), "none"))],
    ("MatMulAct", matmul, ("float",), bug(activation="gelu_tanh"), "other gelu"),
    *[("MatMulAct", matmul, (t, "y = Add(s, z)"), b, n) for t in TYPES for b, n in ((without(3), "no residual"), (altered(3, lambda r: r * r.dtype.type(1.01)), "residual 1 % off"))],
    *[("MatMulAct", matmul, (t, "y = Identity(s)", 18, True), bug(trans_w=0), "not transposed") for t in TYPES],
    *[("GatedMatMulAct", gated, (t,), b, n) for t in TYPES for b, n in ((bug(activation="gelu"), "gelu for swish"), (lambda r: lambda x, g, u, **a: r(x, u, g, **a), "gate and up swapped"))],
    *[("GatedMatMulAct", merged, (t,), bug(merged="up_gate"), "halves swapped") for t in TYPES],
    *[("FusedAttention", attention, (t, m), b, n) for t in TYPES for m, b, n in (
        ("none", bug(scale=lambda s: s * 1.01), "scale 1 % off"),
        ("float", without(3), "no mask"),
        ("float", altered(3, lambda m: m[..., ::-1]), "mask mirrored"),
        ("bool", altered(3, np.logical_not), "mask inverted"),
        ("none", altered(2, lambda v: v[:, ::-1]), "heads reversed"),
    )],
    *[("FusedAttention", grouped, (t,), in_turn, "wrong grouping") for t in TYPES],
    *[(p, m, ("float16",), output(without_cast), "lost cast") for p, m in (("FusedAttention", attention), ("RMSNormalization", rms_norm), ("MatMulAct", matmul), ("Rotary", rotary))],
    *[("FusedAttention", attention, (t, "none", True), b, n) for t in TYPES for b, n in ((bug(softcap=0.0), "no soft cap"), (bug(softcap=lambda c: c * 1.02), "soft cap 2 % off"))],
    *[("Rotary", rotary, (t,), b, n) for t in TYPES for b, n in ((bug(interleaved=1), "interleaved"), (altered(2, np.negative), "other way"), (altered(1, swapped_halves), "halves swapped"))],
    *[("Rotary", rotary, (t, True), bug(interleaved=0), "not interleaved") for t in TYPES],
]


@pytest.mark.parametrize(("plugin", "model", "arguments", "plant", "name"), PLANTED, ids=[f"{p}-{'-'.join(map(str, a))}-{n}" for p, _, a, _, n in PLANTED])
def test_a_planted_bug_is_rolled_back_and_named(monkeypatch, plugin, model, arguments, plant, name):
    before = model(*arguments)
    good = rewrite.optimize(before).model
    assert good.plugin_nodes().get(plugin) == 1, "the right plugin is accepted"
    right = registry._builtin.plugins[plugin]
    monkeypatch.setitem(registry._builtin.plugins, plugin, dataclasses.replace(right, reference=plant(right.reference)))
    result = rewrite.optimize(before)
    assert nodes(result.model.proto) != nodes(good.proto)
    assert any(f"plugin {plugin} differs" in m.reason for m in result.report.near_misses)


def test_an_unverified_run_is_said_to_be_one():
    result = rewrite.optimize(swish("float"), verify=False)
    assert not result.report.verified
    assert result.model.plugin_nodes() == {"Swish": 1}


# --- 16-bit sites ----------------------------------------------------------------------------------------------------
def test_a_half_precision_norm_that_overflows_is_fused_still():
    """Without the casts to float32, x * x overflows at 256: the fused norm, which does not, is right, and accepted."""
    body = """two = Constant<value_float = 2.0>() eps = Constant<value_float = 0.0001>() axes = Constant<value_ints = [-1]>()
        p = Pow(x, two) m = ReduceMean(p, axes) a = Add(m, eps) r = Sqrt(a) d = Div(x, r) y = Mul(d, w)"""
    model = half(parse(text(body, "float[n, 8] x", "float[n, 8] y", "float"), w=np.ones(8, np.float32)))
    assert nodes(rewrite.optimize(model).model.proto) == ["rewrite.RMSNormalization"]


def test_values_near_the_largest_are_tried(monkeypatch):
    """A Swish in float16 that overflows above 5e4 is caught by the inputs near 6e4 alone."""
    right = registry._builtin.plugins["Swish"]

    def overflows(x, *, alpha):
        y = right.reference(x, alpha=alpha)
        return np.where(y > 5e4, np.float16(np.inf), y)

    monkeypatch.setitem(registry._builtin.plugins, "Swish", dataclasses.replace(right, reference=overflows))
    assert nodes(rewrite.optimize(swish("float16")).model.proto) == ["Sigmoid", "Mul"]


def test_fully_masked_rows_are_tried(monkeypatch):
    """A row whose scores are all the lowest value is the mean of the values; a kernel that gives 0 there is caught."""
    right = registry._builtin.plugins["FusedAttention"]

    def zero_when_masked(q, k, v, mask=None, **attributes):
        y = right.reference(q, k, v, mask, **attributes)
        return y if mask is None else np.where(np.broadcast_to(mask.any(-1, keepdims=True), y.shape), y, 0).astype(y.dtype)

    monkeypatch.setitem(registry._builtin.plugins, "FusedAttention", dataclasses.replace(right, reference=zero_when_masked))
    result = rewrite.optimize(attention("float", "bool"))
    assert "FusedAttention" not in result.model.plugin_nodes()


@pytest.mark.parametrize("mask", ["none", "float", "bool"])
def test_attention_in_half_precision_with_a_softmax_in_float32(mask):
    model = attention("float16", mask)
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.input[0], node.output[0] = "wide", "soft"
    scores = "s" if mask == "none" else "a"
    at = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Softmax")
    model.graph.node.insert(at + 1, onnx.helper.make_node("Cast", ["soft"], ["p"], to=onnx.TensorProto.FLOAT16))
    model.graph.node.insert(at, onnx.helper.make_node("Cast", [scores], ["wide"], to=onnx.TensorProto.FLOAT))
    onnx.checker.check_model(model, full_check=True)
    assert nodes(rewrite.optimize(model).model.proto) == ["rewrite.FusedAttention"]


def test_bfloat16_is_checked_in_float32(monkeypatch):
    model = parse("(bfloat16[n, 8] x) => (bfloat16[n, 8] y) { m = MatMul(x, w) s = Add(m, b) y = Relu(s) }", w=W.astype(ml_dtypes.bfloat16), b=B.astype(ml_dtypes.bfloat16))
    assert nodes(rewrite.optimize(model).model.proto) == ["rewrite.MatMulAct"]
    right = registry._builtin.plugins["MatMulAct"]
    monkeypatch.setitem(registry._builtin.plugins, "MatMulAct", dataclasses.replace(right, reference=without(2)(right.reference)))
    assert nodes(rewrite.optimize(model).model.proto) == ["rewrite.MatMulAct", "Add", "Relu"]  # the product without a bias is right


# --- comparing ---------------------------------------------------------------------------------------------------------
def test_compare_wants_the_same_shape_type_and_infinities():
    one = np.ones((2, 3), np.float32)
    assert compare([one], [one], TOLERANCE).ok
    for other, reason in ((one[:1], "shape"), (one.astype(np.float64), "float64"), (one * np.nan, "one side only"), (one * np.inf, "one side only"), (one * 1.001, "differs")):
        verdict = compare([one], [other], TOLERANCE)
        assert not verdict.ok
        assert reason in verdict.reason
    assert compare([one * np.inf], [one * np.inf], TOLERANCE).ok
    assert not compare([one * np.inf], [one * -np.inf], TOLERANCE).ok
    assert not compare([np.arange(3)], [np.arange(3) + 1], TOLERANCE).ok


def test_compare_accepts_what_is_exact_where_the_subgraph_overflows():
    want, exact = np.array([np.inf, 1.0], np.float16), np.array([100.0, 1.0], np.float32)
    assert not compare([want], [np.array([100.0, 1.0], np.float16)], TOLERANCE).ok
    assert compare([want], [np.array([100.0, 1.0], np.float16)], TOLERANCE, [exact]).ok
    assert not compare([want], [np.array([90.0, 1.0], np.float16)], TOLERANCE, [exact]).ok


def test_what_overflows_counts_as_the_largest_value_of_a_result():
    """Elsewhere in a product whose terms are near 6e4, a difference of 0.003 is rounding."""
    want, got, exact = np.array([np.inf, 0.578], np.float16), np.array([np.inf, 0.5747], np.float16), np.array([5e9, 0.578], np.float32)
    assert compare([want], [got], TOLERANCE, [exact]).ok
    small, near = np.array([0.9, 0.578], np.float32), np.array([0.9, 0.5747], np.float16)
    assert not compare([small.astype(np.float16)], [near], TOLERANCE, [small]).ok
    masked = np.array([-np.inf, 0.578], np.float32)  # infinite in float32, too: that is no overflow
    assert not compare([masked.astype(np.float16)], [np.array([-np.inf, 0.5747], np.float16)], TOLERANCE, [masked]).ok


# --- whole models ------------------------------------------------------------------------------------------------------
def test_whole_model_inputs_use_the_whole_vocabulary_and_pad_on_both_sides_and_anywhere():
    body = "g = Gather(table, input_ids) c = Cast<to = 1>(attention_mask) ax = Constant<value_ints = [-1]>() u = Unsqueeze(c, ax) y = Mul(g, u)"
    table = RNG.standard_normal((1000, 4)).astype(np.float32)
    proto = parse(f"(int64[batch, seq] input_ids, int64[batch, seq] attention_mask) => (float[batch, seq, 4] y) {{ {body} }}", table=table)
    seen = [model_inputs(proto, i) for i in range(3)]
    assert max(int(s["input_ids"].max()) for s in seen) > 100
    right, left, anywhere = (s["attention_mask"] for s in seen)
    assert (np.diff(right) <= 0).all()
    assert (right == 0).any()
    assert (np.diff(left) >= 0).all()
    assert (left == 0).any()
    assert (anywhere[0] == 1).all()
    steps = np.diff(anywhere[1:].astype(int))
    assert (steps > 0).any()
    assert (steps < 0).any()
    assert (anywhere.sum(1) > 0).all()


def value(name, kind, shape):
    return onnx.helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize(("given", "told"), [
    (value("x", onnx.TensorProto.COMPLEX64, [2]), "input 'x' is complex64; give inputs with --inputs FILE.npz"),
    (value("x", onnx.TensorProto.FLOAT, None), "input 'x' has no known tensor shape; give inputs with --inputs FILE.npz"),
    (onnx.helper.make_tensor_sequence_value_info("x", onnx.TensorProto.FLOAT, [2]), "input 'x' is of type sequence, no tensor, and only tensors are generated"),
])  # fmt: skip
def test_inputs_that_cannot_be_made_are_asked_for(given, told):
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [given], []))
    with pytest.raises(rewrite.RewriteError) as error:
        model_inputs(model, 0)
    assert told in str(error.value)


def test_positions_count_and_sizes_are_computed_from_names():
    proto = parse("(int64[b, s] position_ids, float[b] x) => (float[b] y) { y = Neg(x) }")
    proto.graph.input.append(value("z", onnx.TensorProto.FLOAT, ["2*s + 1", "s - b", "no formula at all", "b"]))
    made = model_inputs(proto, 0)
    b, s = made["position_ids"].shape
    assert made["position_ids"].tolist() == [list(range(s))] * b
    assert made["z"].shape == (2 * s + 1, s - b, made["z"].shape[2], b)


def test_models_with_other_outputs_or_that_fail_are_told_apart():
    one, renamed = parse("(float[b, 8] x) => (float[b, 8] y) { y = Neg(x) }"), parse("(float[b, 8] x) => (float[b, 8] z) { z = Neg(x) }")
    failing = parse("(float[b, 8] x) => (float[p, q] y) { s = Constant<value_ints = [3, 5]>() y = Reshape(x, s) }")
    with pytest.raises(CheckFailed, match=r"the outputs differ: \['y'\] and \['z'\]"):
        check_models(load(one), load(renamed))
    with pytest.raises(CheckFailed, match="the rewritten model fails on the inputs"):
        check_models(load(one), load(failing))
    with pytest.raises(rewrite.RewriteError, match=r"fails on the inputs.*give inputs with --inputs"):
        check_models(load(failing), load(one))
    assert check_models(load(one), load(one)) == 0.0


def test_a_site_of_which_a_shape_is_unknown_or_that_cannot_run_is_not_verified():
    body = onnx.helper.make_function("rewrite", "F", ["x"], ["y"], [onnx.helper.make_node("Neg", ["x"], ["y"])], [onnx.helper.make_opsetid("", 18)])
    shapeless = check_site(body, [], [Spec("x", np.dtype(np.float32), None)], lambda a: [-a["x"]], TOLERANCE, None)
    assert (shapeless.ok, shapeless.reason) == (False, "the replaced subgraph cannot be computed on its own: the shape of 'x' is unknown")
    failing = onnx.helper.make_function("rewrite", "F", ["x"], ["y"], [onnx.helper.make_node("Gather", ["x", "x"], ["y"])], [onnx.helper.make_opsetid("", 18)])
    for function, reason in ((failing, "cannot be computed on its own"), (body, "the replacement fails: ValueError: no")):
        verdict = check_site(function, [], [Spec("x", np.dtype(np.float32), (2, 2))], _no, TOLERANCE, None)
        assert not verdict.ok
        assert reason in verdict.reason
    few = check_site(body, [], [Spec("x", np.dtype(np.float32), (2, 2))], lambda a: [], TOLERANCE, None)
    assert (few.ok, few.reason) == (False, "0 outputs instead of 1")


def _no(arrays):
    raise ValueError("no")


def test_a_wrong_body_is_found_by_the_check_of_the_whole_model():
    before = matmul("float")
    after = rewrite.optimize(before).model
    next(n for n in after.proto.functions[0].node if n.op_type == "Gelu").attribute.append(onnx.helper.make_attribute("approximate", "tanh"))
    with pytest.raises(CheckFailed, match="output 'y'"):
        check_models(load(before), after)


WRONG = """
import rewrite
@rewrite.rule(priority=50)
class Cubed:
    def pattern(op, x): return op.Pow(op.Relu(x), 2.0)
    def replace(op, x): return op.Pow(op.Relu(x), op.constant(3.0, "float32"))
"""


@pytest.mark.parametrize("size", ["S - 16", "S // 16", "(S - 30) // 2 + 1", "S - B", "2*S - 20", "S // (B - 1)"])
def test_no_site_is_checked_on_empty_arrays(size, tmp_path):
    """Dimensions that are computed from others, as a slice or an unfold makes them: negative or 0 at small sizes."""
    (tmp_path / "wrong.py").write_text(WRONG)
    model = parse("(float[n, 4] x) => (float[n, 4] y) { r = Relu(x) two = Constant<value_float = 2.0>() y = Pow(r, two) }")
    for v in (*model.graph.input, *model.graph.output):
        v.type.tensor_type.shape.dim[0].dim_param = size
    report = rewrite.optimize(model, rules=[tmp_path / "wrong.py"]).report
    assert [(m.rule, "differs" in m.reason) for m in report.rejected] == [("cubed", True)]
    assert all(model_inputs(model, attempt)["x"].size for attempt in range(3))


def test_a_model_is_run_at_sizes_at_which_nothing_inside_is_empty():
    model = parse("(float[B, S, 4] x) => (float[B, T, 4] y) { y = Slice(x, start, end, axis) }", start=np.array([16]), end=np.array([2**31 - 1]), axis=np.array([1]))
    assert all(model_inputs(model, attempt)["x"].shape[1] < 16 for attempt in range(3))  # nobody knows
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "S - 16"
    assert all(model_inputs(model, attempt)["x"].shape[1] > 16 for attempt in range(3))
    assert model_inputs(model, 0, {"S": 5})["x"].shape[1] == 5  # those that were asked for


def test_sizes_that_no_dimension_can_have_are_told():
    model = parse("(float[n, 4] x) => (float[n, 4] y) { s = Sigmoid(x) y = Mul(x, s) }")
    for v in (*model.graph.input, *model.graph.output):
        v.type.tensor_type.shape.dim[0].dim_param = "0 - S"
    reason = "no sizes are found at which the dimension '0 - S' is 1 or more"
    (miss,) = rewrite.optimize(model, verify=True, inputs=[]).report.rejected
    assert reason in miss.reason
    with pytest.raises(rewrite.RewriteError, match=f"{reason}; give inputs with --inputs FILE.npz"):
        model_inputs(model, 0)


def test_results_that_are_empty_at_every_size_are_no_check():
    body = onnx.helper.make_function("rewrite", "F", ["x"], ["y"], [onnx.helper.make_node("Neg", ["x"], ["y"])], [onnx.helper.make_opsetid("", 18)])
    verdict = check_site(body, [], [Spec("x", np.dtype(np.float32), (0, 4))], lambda a: [a["x"]], TOLERANCE, None)
    assert not verdict.ok
    assert "its results are empty at every size that was tried" in verdict.reason


def double_attention(scores):
    inputs = "double[B, 2, S, 8] q, double[B, 2, T, 8] k, double[B, 2, T, 8] v, bool[B, 1, S, T] m"
    text = f"({inputs}) => (double[B, 2, S, 8] y) {{ kt = Transpose<perm = [0, 1, 3, 2]>(k) s0 = MatMul(q, kt) s1 = Mul(s0, c) {scores} p = Softmax<axis = -1>(s) y = MatMul(p, v) }}"
    return parse(text, c=np.float64(0.1), least=np.finfo(np.float64).min, far=np.float64(-1e9))


def test_a_plugin_is_checked_with_the_attributes_that_the_file_will_hold():
    """Single precision, in which the lowest float64 is -inf: the row of a mask that hides everything would be NaN."""
    (site,) = rewrite.optimize(double_attention("s = Where(m, s1, far)")).report.sites
    assert 1e-12 < site.error < 1e-6  # 0.1 has more digits
    report = rewrite.optimize(double_attention("s = Where(m, s1, least)")).report
    assert not report.sites
    assert [(m.rule, "NaN or infinite on one side only" in m.reason) for m in report.rejected] == [("attention", True)]
