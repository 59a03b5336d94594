"""Norms: every spelling becomes one operator; near misses stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import nodes, parse

import rewrite

N = 8
RNG = np.random.default_rng(3)
CONSTANTS = {"two": np.float32(2), "one": np.float32(1), "eps": np.float32(1e-5), "minus_half": np.float32(-0.5), "last": np.array([-1]), "second": np.array([1]), "first": np.array([0])}
WEIGHTS = {"w": (RNG.random(N) + 0.5).astype(np.float32), "b": RNG.standard_normal(N).astype(np.float32), "short": np.full(1, 2, np.float32)}


def model(body, dtype="float", opset=18, shape="n, 8", **more):
    given = {k: v for k, v in {**CONSTANTS, **WEIGHTS, **more}.items() if k in body.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    return parse(f"({dtype}[{shape}] x) => ({dtype}[{shape}] y) {{ {body} }}", opset, **given)


def after(body, **options):
    return nodes(rewrite.optimize(model(body, **options)).model.proto)


SQUARE = {"pow": "p = Pow(x, two)", "mul": "p = Mul(x, x)"}
MEAN = {
    "kept": "m = ReduceMean(p, last)",
    "axis 1": "m = ReduceMean(p, second)",
    "unsqueezed": "m0 = ReduceMean<keepdims = 0>(p, last) m = Unsqueeze(m0, last)",
    "reshaped": "m0 = ReduceMean<keepdims = 0>(p, last) s0 = Shape(m0) s1 = Concat<axis = 0>(s0, second) m = Reshape(m0, s1)",
}
INVERSE = {
    "reciprocal": "a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r) n1 = Mul(x, i)",
    "one over": "a = Add(eps, m) r = Sqrt(a) i = Div(one, r) n1 = Mul(i, x)",
    "divided": "a = Add(m, eps) r = Sqrt(a) n1 = Div(x, r)",
    "power": "a = Add(m, eps) i = Pow(a, minus_half) n1 = Mul(x, i)",
    "no epsilon": "r = Sqrt(m) i = Reciprocal(r) n1 = Mul(x, i)",
}
WEIGHT = {"after": "y = Mul(n1, w)", "before": "y = Mul(w, n1)", "one plus": "w1 = Add(w, one) y = Mul(n1, w1)"}


@pytest.mark.parametrize("weight", WEIGHT)
@pytest.mark.parametrize("inverse", INVERSE)
@pytest.mark.parametrize("square", SQUARE)
def test_rms_norm(square, inverse, weight):
    expected = ["Add", "rewrite.RMSNormalization"] if weight == "one plus" else ["rewrite.RMSNormalization"]
    assert after(" ".join([SQUARE[square], MEAN["kept"], INVERSE[inverse], WEIGHT[weight]])) == expected


@pytest.mark.parametrize("mean", MEAN)
def test_rms_norm_means(mean):
    assert after(" ".join([SQUARE["pow"], MEAN[mean], INVERSE["reciprocal"], WEIGHT["after"]])) == ["rewrite.RMSNormalization"]


def test_rms_norm_at_opset_17_and_23():
    body = "p = Pow(x, two) m = ReduceMean<axes = [-1]>(p) a = Add(m, eps) r = Sqrt(a) n1 = Div(x, r) y = Mul(n1, w)"
    assert after(body, opset=17) == ["rewrite.RMSNormalization"]
    assert after(body.replace("<axes = [-1]>(p)", "(p, last)"), opset=23) == ["RMSNormalization"]


@pytest.mark.parametrize("narrow", ["float16", "double"])
def test_a_cast_to_the_type_of_the_result_stays_where_the_operator_is_onnx_s(narrow):
    text = f"({narrow}[n, 8] x) => (float[n, 8] y) {{ c = Cast<to = 1>(x) p = Mul(c, c) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) n1 = Div(c, r) y = Mul(n1, w) }}"
    given = {"last": CONSTANTS["last"], "eps": CONSTANTS["eps"], "w": WEIGHTS["w"]}
    for opset, expected in ((18, ["rewrite.RMSNormalization"]), (23, ["Cast", "RMSNormalization"])):
        assert nodes(rewrite.optimize(parse(text, opset, **given), verify=False).model.proto) == expected


def test_weight_and_epsilon_are_taken_over():
    result = rewrite.optimize(model(" ".join([SQUARE["pow"], MEAN["kept"], INVERSE["divided"], WEIGHT["after"]])))
    (node,) = result.model.proto.graph.node
    assert list(node.input) == ["x", "w"]
    assert {a.name: a.f for a in node.attribute if a.name == "epsilon"}["epsilon"] == np.float32(1e-5)


def test_weight_multiplied_before_the_division():
    assert after("p = Pow(x, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) xw = Mul(x, w) y = Div(xw, r)") == ["rewrite.RMSNormalization"]


@pytest.mark.parametrize("cast", ["before the weight", "after the weight"])
def test_rms_norm_in_half_precision(cast):
    wide = "c = Cast<to = 1>(x) p = Pow(c, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r) n1 = Mul(c, i)"
    half = WEIGHTS["w"].astype(np.float16)
    if cast == "before the weight":
        assert after(f"{wide} h = Cast<to = 10>(n1) y = Mul(w16, h)", dtype="float16", w16=half) == ["rewrite.RMSNormalization"]
    else:  # the weight is float32, as Gemma has it: the norm gives float32, the last cast stays
        assert after(f"{wide} n2 = Mul(n1, w) y = Cast<to = 10>(n2)", dtype="float16") == ["rewrite.RMSNormalization", "Cast"]


def test_rms_norm_that_casts_for_each_use():
    """T5 in float16, by TorchScript."""
    body = "c = Cast<to = 1>(x) p = Pow(c, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) c2 = Cast<to = 1>({}) n1 = Div(c2, r) h = Cast<to = 10>(n1) y = Mul(w16, h)"
    half = WEIGHTS["w"].astype(np.float16)
    assert after(body.format("x"), dtype="float16", w16=half) == ["rewrite.RMSNormalization"]
    assert "rewrite.RMSNormalization" not in after("z = Exp(x) " + body.format("z"), dtype="float16", w16=half)


def test_rms_norm_without_a_weight_and_wider_than_small_constants():
    assert after("p = Pow(x, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) y = Div(x, r)") == ["rewrite.RMSNormalization"]
    assert after("p = Pow(x, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) y = Div(x, r)", shape="n, 8192") == ["rewrite.RMSNormalization"]


RMS = "p = Pow(x, two) m = ReduceMean(p, last) a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r) n1 = Mul(x, i) y = Mul(n1, w)"
NEAR_RMS = {
    "cube": ("Pow(x, two)", "Pow(x, three)"),
    "sum": ("ReduceMean", "ReduceSum"),
    "other axis": ("ReduceMean(p, last)", "ReduceMean(p, first)"),
    "no root": ("r = Sqrt(a)", "r = Identity(a)"),
    "norm of another value": ("p = Pow(x, two)", "z = Exp(x) p = Pow(z, two)"),
    "epsilon for each column": ("Add(m, eps)", "Add(m, b)"),
}


@pytest.mark.parametrize("change", NEAR_RMS)
def test_rms_norm_near_misses_stay(change):
    body = RMS.replace(*NEAR_RMS[change])
    before = model(body, three=np.float32(3))
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


def test_a_scalar_weight_is_no_weight():
    assert after(RMS.replace("Mul(n1, w)", "Mul(n1, short)")) == ["rewrite.RMSNormalization", "Mul"]


# --- LayerNormalization -------------------------------------------------------------------------------------------------
CENTRE = "mu = ReduceMean(x, last) c = Sub(x, mu)"
VARIANCE = {
    "pow": "p = Pow(c, two) v = ReduceMean(p, last)",
    "mul": "p = Mul(c, c) v = ReduceMean(p, last)",
    "apart": "mu2 = ReduceMean(x, second) c2 = Sub(x, mu2) p = Mul(c2, c2) v = ReduceMean(p, second)",
    "dropped": "p = Mul(c, c) v0 = ReduceMean<keepdims = 0>(p, last) v = Unsqueeze(v0, last)",
}
NORMED = {
    "divided": "a = Add(v, eps) r = Sqrt(a) n1 = Div(c, r)",
    "reciprocal": "a = Add(v, eps) r = Sqrt(a) i = Reciprocal(r) n1 = Mul(c, i)",
    "one over": "a = Add(eps, v) r = Sqrt(a) i = Div(one, r) n1 = Mul(i, c)",
}
TAIL = {"weight and bias": "s = Mul(w, n1) y = Add(b, s)", "bias last": "s = Mul(n1, w) y = Add(s, b)", "no bias": "y = Mul(n1, w)", "neither": "y = Identity(n1)"}


@pytest.mark.parametrize("tail", TAIL)
@pytest.mark.parametrize("normed", NORMED)
@pytest.mark.parametrize("variance", VARIANCE)
def test_layer_norm(variance, normed, tail):
    left = after(" ".join([CENTRE, VARIANCE[variance], NORMED[normed], TAIL[tail]]))
    assert [n for n in left if n != "Identity"] == ["LayerNormalization"]


def test_layer_norm_with_the_weight_before_the_division():
    assert after(f"{CENTRE} {VARIANCE['mul']} a = Add(v, eps) r = Sqrt(a) cw = Mul(w, c) d = Div(cw, r) y = Add(d, b)") == ["LayerNormalization"]


def test_layer_norm_from_an_rms_norm_of_the_centred_value():
    assert after(f"{CENTRE} s = RMSNormalization<epsilon = 0.00001>(c, w) y = Add(s, b)", opset=23) == ["LayerNormalization"]


def test_layer_norm_is_ours_before_opset_17():
    body = " ".join([CENTRE, VARIANCE["pow"], NORMED["divided"], TAIL["bias last"]]).replace("(x, last)", "<axes = [-1]>(x)").replace("(p, last)", "<axes = [-1]>(p)")
    assert after(body, opset=16) == ["rewrite.LayerNormalization"]


@pytest.mark.parametrize(("axis", "left"), [("last", ["LayerNormalization"]), ("first", None)])
def test_layer_norm_in_half_precision_with_its_variance_in_float32(axis, left):
    """x.var(-1, keepdim=True) by the dynamo exporter; the mean that joins it may be over another axis."""
    variance = f"c32 = Cast<to = 1>(x) mu2 = ReduceMean(c32, {axis}) c2 = Sub(c32, mu2) p = Mul(c2, c2) v0 = ReduceMean<keepdims = 0>(p, last) v1 = Unsqueeze(v0, last)"
    spread = "sh = Shape<start = 0, end = 1>(x) es = Concat<axis = 0>(sh, second) v2 = Expand(v1, es) v = Cast<to = 10>(v2)"
    body = f"{CENTRE} {variance} {spread} a = Add(v, e16) r = Sqrt(a) cw = Mul(w16, c) d = Div(cw, r) y = Add(d, b16)"
    half = {"w16": WEIGHTS["w"].astype(np.float16), "b16": WEIGHTS["b"].astype(np.float16), "e16": np.float16(1e-5)}
    found = after(body, dtype="float16", **half)
    assert found == left if left else "LayerNormalization" not in found


NEAR_LAYER = {
    "mean of another value": ("mu = ReduceMean(x, last)", "z = Exp(x) mu = ReduceMean(z, last)"),
    "mean over another axis": ("mu = ReduceMean(x, last)", "mu = ReduceMean(x, first)"),
    "cube": ("Pow(c, two)", "Pow(c, three)"),
    "variance by a sum": ("v = ReduceMean", "v = ReduceSum"),
    "no root": ("Sqrt(a)", "Identity(a)"),
}


@pytest.mark.parametrize("change", NEAR_LAYER)
def test_layer_norm_near_misses_stay(change):
    body = " ".join([CENTRE, VARIANCE["pow"], NORMED["divided"], TAIL["bias last"]]).replace(*NEAR_LAYER[change])
    found = after(body, three=np.float32(3))
    assert "LayerNormalization" not in found


def test_a_residual_before_a_norm_stays_an_add():
    """No plugin joins them: the Add belongs to the product before it, or TensorRT fuses it with the norms around it."""
    body = "t = Add(x, x0) " + RMS.replace("(x", "(t")
    proto = parse(f"(float[n, 8] x, float[n, 8] x0) => (float[n, 8] y, float[n, 8] t) {{ {body} }}", **{k: v for k, v in {**CONSTANTS, **WEIGHTS}.items() if k in ("two", "last", "eps", "w")})
    assert nodes(rewrite.optimize(proto).model.proto) == ["Add", "rewrite.RMSNormalization"]
