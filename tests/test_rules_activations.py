"""Activations: text before and after, in every operand order; near misses stay as they are."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import nodes, parse

import rewrite

GELU = """(float[n, 8] x) => (float[n, 8] y) {{
    half = Constant<value_float = {half}>()
    one = Constant<value_float = {one}>()
    root = Constant<value_float = {root}>()
    d = {scale}(x, root)
    e = Erf(d)
    s = Add({sum})
    {product}
}}"""


def gelu(half=0.5, one=1.0, root=1.41421354, scale="Div", sum="e, one", product="t = Mul(x, half)\n y = Mul(t, s)"):
    return parse(GELU.format(half=half, one=one, root=root, scale=scale, sum=sum, product=product))


PRODUCTS = [f"t = Mul({a}, {b})\n y = Mul({c})" for a, b in itertools.permutations(["x", "half", "s"], 2) for z in [({"x", "half", "s"} - {a, b}).pop()] for c in (f"t, {z}", f"{z}, t")]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("total", ["e, one", "one, e"])
def test_gelu_in_every_order(product, total):
    result = rewrite.optimize(gelu(product=product, sum=total))
    assert nodes(result.model.proto) == ["rewrite.Gelu"]
    assert result.report.rules["gelu_erf"].applied == 1
    onnx.checker.check_model(result.model.proto, full_check=True)


def test_gelu_with_the_reciprocal_factor():
    assert nodes(rewrite.optimize(gelu(scale="Mul", root=0.70710677)).model.proto) == ["rewrite.Gelu"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("scale", "root"), [("Div", 1.41421354), ("Mul", 0.70710677)])
def test_gelu_with_constants_of_another_type(dtype, scale, root):
    kind = np.dtype(dtype).name
    text = f"({kind}[n, 8] x) => ({kind}[n, 8] y) {{ d = {scale}(x, root) e = Erf(d) s = Add(e, one) t = Mul(x, half) y = Mul(t, s) }}"
    before = parse(text, half=np.asarray(0.5, dtype), one=np.asarray(1, dtype), root=np.asarray(root, dtype))
    assert nodes(rewrite.optimize(before).model.proto) == ["rewrite.Gelu"]


@pytest.mark.parametrize("change", [{"half": 0.51}, {"one": 1.01}, {"root": 1.5}, {"scale": "Mul"}, {"sum": "one, one"}])
def test_gelu_near_misses_stay(change):
    before = gelu(**change)
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


def test_gelu_is_standard_from_opset_20_on():
    before = gelu()
    before.opset_import[0].version = 20
    assert nodes(rewrite.optimize(before).model.proto) == ["Gelu"]


def test_an_interior_value_that_is_an_output_stays_computed():
    before = parse("(float[4] x) => (float[4] y, float[4] s) { s = Sigmoid(x)\n y = Mul(x, s) }")
    after = rewrite.optimize(before).model.proto
    assert sorted(nodes(after)) == ["Sigmoid", "rewrite.Swish"]
    assert [o.name for o in after.graph.output] == ["y", "s"]


def test_unfuse_gives_back_the_original_nodes():
    before = gelu()
    fused = rewrite.optimize(before).model.proto
    assert sorted(nodes(rewrite.unfuse(fused))) == sorted(nodes(before))


def test_optimizing_twice_changes_nothing_more():
    once = rewrite.optimize(gelu()).model.proto
    assert rewrite.optimize(once).model.proto.SerializeToString() == once.SerializeToString()


# --- others --------------------------------------------------------------------------------------------------------------
def constants(body, output="y", **values):
    made = " ".join(f"{n} = Constant<value_float = {v}>()" for n, v in values.items())
    return parse(f"(float[n, 8] x) => (float[n, 8] {output}) {{ {made} {body} }}")


TANH = {
    "x outside of the sum": "a = Mul(x, inner) b = Mul(a, x) c = Add(b, one) d = Mul(x, root) e = Mul(d, c)",
    "the square apart": "a = Mul(x, x) b = Mul(a, inner) c = Add(one, b) d = Mul(root, x) e = Mul(c, d)",
    "x inside": "a = Mul(x, x) b = Mul(a, x) c = Mul(b, inner) d = Add(x, c) e = Mul(d, root)",
}


@pytest.mark.parametrize("form", TANH)
def test_gelu_of_the_hyperbolic_tangent(form):
    before = constants(f"{TANH[form]} t = Tanh(e) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)", inner=0.044715, one=1.0, root=0.7978845608, half=0.5)
    after = rewrite.optimize(before).model.proto
    assert nodes(after) == ["rewrite.Gelu"]
    assert after.graph.node[0].attribute[0].s == b"tanh"


@pytest.mark.parametrize("change", [{"inner": 0.05}, {"one": 0.9}, {"root": 0.7}, {"half": 0.4}])
def test_gelu_of_the_hyperbolic_tangent_with_other_numbers_stays(change):
    before = constants(f"{TANH['x outside of the sum']} t = Tanh(e) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)", **{"inner": 0.044715, "one": 1.0, "root": 0.7978845608, "half": 0.5, **change})
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


@pytest.mark.parametrize("body", ["s = Mul(x, slope) g = Sigmoid(s) y = Mul(x, g)", "s = Mul(slope, x) g = Sigmoid(s) y = Mul(g, x)"])
def test_swish_with_a_slope(body):
    after = rewrite.optimize(constants(body, slope=1.702)).model.proto
    assert nodes(after) == ["rewrite.Swish"]
    assert after.graph.node[0].attribute[0].f == pytest.approx(1.702)


def test_swish_of_another_value_stays():
    before = constants("s = Mul(x, slope) g = Sigmoid(s) z = Neg(x) y = Mul(z, g)", slope=1.702)
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)


def test_squared_relu():
    assert nodes(rewrite.optimize(constants("r = Relu(x) y = Mul(r, r)")).model.proto) == ["Relu", "Pow"]
    before = constants("r = Relu(x) z = Neg(x) q = Relu(z) y = Mul(r, q)")
    assert nodes(rewrite.optimize(before).model.proto) == nodes(before)
