"""Rules whose patterns PyTorch's exporters write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import nodes, parse

import rewrite

torch = pytest.importorskip("torch")
from rewrite.export import torch_rules  # noqa: E402  (needs torch)

FEW = (("dynamo", 18), ("torchscript", 17))
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _few_exporters(monkeypatch):
    monkeypatch.setattr(torch_rules, "EXPORTERS", FEW)
    yield
    from rewrite.registry import _program

    _program.rules.clear()


def plugins():
    """A replacement may not be what the rule finds, so each is a plugin."""
    wide = {"float32": (1e-4, 1e-5), "float16": (4e-3, 4e-3)}

    @rewrite.plugin
    class TripleGelu:
        inputs, tolerance = ("x",), wide

        def reference(x):
            from rewrite.plugins.activations import gelu

            return (3 * gelu(x)).astype(x.dtype)

    @rewrite.plugin
    class MaxShift:
        inputs, tolerance = ("x",), wide

        def reference(x):
            return x - x.max(-1, keepdims=True)

    @rewrite.plugin
    class TwoTanh:
        inputs, tolerance = ("x", "w"), wide

        def reference(x, w):
            return np.tanh(x @ w) * 2

    @rewrite.plugin
    class SinCos:
        inputs, outputs, tolerance = ("x", "y"), ("s", "c"), wide

        def reference(x, y):
            return np.sin(x + y), np.cos(np.sin(x + y))


plugins()


def derive(function, example, replace, name="made"):
    return rewrite.rule_from_torch(function, example, replace, name=name)


def gelu_rule():
    return derive(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)) * 3.0, X, "TripleGelu")


def erf_model(factor: float, dims: str = "batch, 5"):
    text = f"(float[{dims}] x) => (float[{dims}] y) {{ a = Div(x, r) b = Erf(a) c = Add(one, b) d = Mul(c, x) e = Mul(d, half) y = Mul(e, f) }}"
    return parse(text, r=np.float32(2**0.5), one=np.float32(1), half=np.float32(0.5), f=np.float32(factor))


def test_it_matches_at_other_sizes_and_ranks_and_a_near_miss_stays():
    rule = gelu_rule()
    for dims in ("batch, 5", "batch, 4, 7, 9"):
        report = rewrite.optimize(erf_model(3.0, dims), rules=[rule]).report
        assert report.rules["made"].applied == 1
        assert report.model_error is not None
        assert report.model_error < 1e-5
    assert rewrite.optimize(erf_model(3.1), rules=[rule]).report.rules["made"].applied == 0


def test_the_graph_that_a_lift_rule_has_changed_matches_too():
    model = parse("(float[b, 5] x) => (float[b, 5] y) { g = Gelu(x) y = Mul(f, g) }", opset=20, f=np.float32(3))
    assert rewrite.optimize(model, rules=[gelu_rule()]).report.rules["made"].applied == 1


def test_every_exporter_and_state_is_told():
    forms = gelu_rule().forms
    assert [(f.exporter, f.opset, f.state) for f in forms] == [(e, o, s) for e, o in FEW for s in ("exported", "lifted", "fused")]
    assert [bool(f.text) for f in forms] == [True] * 6
    assert "Gelu(x" in forms[1].text
    assert "Erf" in forms[0].text


def test_another_axis_is_a_near_miss():
    rule = derive(lambda x: x - x.amax(-1, keepdim=True), X, "MaxShift")
    for axis, applied in ((-1, 1), (0, 0)):
        model = parse("(float[4, 5, 6] x) => (float[4, 5, 6] y) { m = ReduceMax<keepdims=1>(x, a) y = Sub(x, m) }", a=np.array([axis], np.int64))
        assert rewrite.optimize(model, rules=[rule]).report.rules["made"].applied == applied


def test_a_weight_must_be_one():
    rule = derive(lambda x, w: torch.tanh(x @ w) * 2.0, (X, torch.nn.Parameter(torch.randn(8, 4))), "TwoTanh")
    c = np.float32(2)
    constant = parse("(float[b, 5] x) => (float[b, 6] y) { p = MatMul(x, w) t = Tanh(p) y = Mul(t, c) }", w=np.ones((5, 6), np.float32), c=c)
    assert nodes(rewrite.optimize(constant, rules=[rule]).model.proto) == ["rewrite.TwoTanh"]
    computed = parse("(float[b, 5] x, float[5, 6] w) => (float[b, 6] y) { p = MatMul(x, w) t = Tanh(p) y = Mul(t, c) }", c=c)
    result = rewrite.optimize(computed, rules=[rule])
    assert result.report.rules["made"].applied == 0
    assert any("is computed from the inputs" in m.reason for m in result.report.near_misses)


def test_another_dtype_than_the_example_s():
    rule = derive(lambda x: x - x.amax(-1, keepdim=True), X, "MaxShift")
    model = parse("(float16[4, 5] x) => (float16[4, 5] y) { m = ReduceMax<keepdims=1>(x, a) y = Sub(x, m) }", a=np.array([-1], np.int64))
    assert nodes(rewrite.optimize(model, rules=[rule]).model.proto) == ["rewrite.MaxShift"]


def test_weights_of_equal_values_are_told_apart():
    ones = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(2)]
    rule = derive(lambda x, a, b: torch.tanh(x @ a) - x @ b, (X, *ones), lambda op, x, a, b: op.Sub(op.MatMul(x, a), op.MatMul(x, b)))
    assert rule.forms[0].text == "Sub(Tanh(MatMul(x, a)), MatMul(x, b))"
    assert bool((ones[0] == 1).all())


def test_several_outputs():
    def both(x, y):
        s = torch.sin(x + y)
        return s, torch.cos(s)

    rule = derive(both, (X, X.clone()), "SinCos")
    model = parse("(float[b] x, float[b] y) => (float[b] s, float[b] c) { a = Add(y, x) s = Sin(a) c = Cos(s) }")
    assert nodes(rewrite.optimize(model, rules=[rule]).model.proto) == ["rewrite.SinCos"]


def test_what_does_not_depend_on_an_input_is_refused():
    with pytest.raises(rewrite.RewriteError, match="does not depend on 'y'; leave that input out"):
        derive(lambda x, y: torch.relu(x), (X, X.clone()), lambda op, x, y: op.Relu(x))


def test_one_tensor_is_the_example_of_two_inputs():
    w = torch.nn.Parameter(torch.ones(8, 8))
    rule = derive(lambda x, y, a, b: torch.tanh(x @ a) - y @ b, (X, X, w, w), lambda op, x, y, a, b: op.Sub(op.MatMul(x, a), op.MatMul(y, b)))
    assert rule.forms[0].text == "Sub(Tanh(MatMul(x, a)), MatMul(y, b))"
    assert all(f.text for f in rule.forms)


def test_control_flow_is_refused_in_one_line():
    def branching(x):
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(rewrite.RewriteError, match="no exporter gives a pattern") as error:
        derive(branching, X, lambda op, x: op.Mul(x, x))
    assert "\n" not in str(error.value)


def test_a_number_that_depends_on_the_sizes_is_refused_by_name():
    with pytest.raises(rewrite.RewriteError, match="the number 8 in it depends on the sizes or values of the example"):
        derive(lambda x: torch.relu(x) * float(x.shape[-1]), X, lambda op, x: op.Relu(x))


def test_a_number_that_a_module_makes_of_sizes_is_refused_too():
    class ByWidth(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x) / x.shape[-1] ** 0.5

    class ByLength(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(8, 4)  # so that the last dimension is 8

        def forward(self, x):
            return torch.relu(self.up(x)) / float(x.shape[1])

    for module in (ByWidth(), ByLength()):
        with pytest.raises(rewrite.RewriteError, match="depends on the sizes or values of the example"):
            derive(module, X, lambda op, x: op.Relu(x))


@pytest.mark.parametrize("example", [torch.ones(2, 3, 8), X])
def test_a_value_of_the_example_is_no_number_of_the_pattern(example):
    """TorchScript records what Python computes as a constant, and that the largest of ones is 1, then not at all."""
    forms = derive(lambda x: torch.relu(x) * x.max().item(), example, lambda op, x: op.Mul(op.Relu(x), op.ReduceMax(x, keepdims=0))).forms
    assert all("ReduceMax" in f.text for f in forms if f.exporter == "dynamo")
    assert all("depends on the sizes or values of the example" in f.failure for f in forms if f.exporter == "torchscript")


def test_a_failing_exporter_is_visible(monkeypatch):
    monkeypatch.setattr(torch_rules, "_with_dynamo", lambda *_: "the dynamo exporter fails: planted")
    rule = gelu_rule()
    assert [f.failure for f in rule.forms[:3]] == ["the dynamo exporter fails: planted"] * 3
    assert all(f.text for f in rule.forms[3:])


def test_replace_asks_for_what_is_bound():
    with pytest.raises(rewrite.RewriteError, match="'replace' takes 'z', which the pattern does not bind"):
        derive(lambda x: torch.relu(x), X, lambda op, z: op.Relu(z))


def test_the_example_is_a_program_and_a_rules_file():
    file = Path(__file__).parent.parent / "examples/torch_rule.py"
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if ": fused " in line]
    assert len(lines) == 4
    assert all("'GatedSquaredRelu': 1" in line and float(line.rsplit(" ", 1)[1]) < 1e-5 for line in lines)
    listed = subprocess.run([sys.executable, "-m", "rewrite.cli", "list", "--rules", str(file)], capture_output=True, text=True, timeout=300)
    assert "gated_squared_relu" in listed.stdout
