"""Activations: text before and after, in every operand order; near misses stay as they are."""

from __future__ import annotations

import itertools

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
