"""Planted near misses: `rewrite explain` names the node at which it fails, and the reason."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse

import rewrite
from rewrite.cli import main

HEADS = "float[B, 4, S, 8] q, float[B, 4, T, 8] k, float[B, 4, T, 8] v"
TURN = "kt = Transpose<perm = [0, 1, 3, 2]>(k)"
SCORES = f"{TURN} m = MatMul(q, kt) s = Mul(m, c)"
TAIL = "p = Softmax<axis = -1>(s) y = MatMul(p, v)"
Y = "float[B, 4, S, 8] y"
RNG = np.random.default_rng(3)
CONSTANTS = {
    "c": np.float32(0.35), "two": np.float32(2), "half": np.float32(0.5), "one": np.float32(1), "root": np.float32(1.4142135), "eps": np.float32(1e-6),
    "w": RNG.standard_normal((8, 8)).astype(np.float32), "weight": RNG.standard_normal(8).astype(np.float32), "bias": np.ones(8, np.float32), "last": np.array([-1]), "axis2": np.array([2]),
    "expand": np.array([1, 1, 2, 1, 1]), "to3": np.array([0, 6, -1, 8]), "grouped": np.array([0, 3, 2, 0, 8]),
    "thin": np.ones((8, 1), np.float32), "ones": np.ones((1, 1), np.float32), "flat": np.array([-1, 8]), "turned": np.array([2, -1, 8]), "folded": np.array([6, 5, 8]),
    "cut": np.array([3, 2, 4, 10]), "four": np.array([0, 5, -1, 8]),
}  # fmt: skip

# What is written: inputs, nodes, outputs. What is told: the kind, the node of the site, the rule, and what the reason says.
MISSES = {
    "softmax over the wrong axis": (
        HEADS, f"{SCORES} p = Softmax<axis = 2>(s) y = MatMul(p, v)", Y,
        ("attention", "Softmax 'p'", "attention", ["softmax is over axis 2", "not over the last"]),
    ),
    "an interior value read elsewhere": (
        HEADS, f"{SCORES} p = Softmax<axis = -1>(s) y = MatMul(p, v) z = Neg(p)", f"{Y}, float[B, 4, S, T] z",
        ("attention", "Softmax 'p'", "attention", ["'p' inside the match is needed elsewhere", "Neg 'z' reads it too"]),
    ),
    "a scale that is not constant": (
        f"{HEADS}, float[B, 4, S, 1] temperature", f"{TURN} m = MatMul(q, kt) s = Mul(m, temperature) {TAIL}", Y,
        ("attention", "Softmax 'p'", "attention", ["'temperature' is not a small constant"]),
    ),
    "a mask of five dimensions": (
        f"{HEADS}, float[1, B, 1, S, T] mask", f"{SCORES} a = Add(s, mask) p = Softmax<axis = -1>(a) y = MatMul(p, v)", "float[1, B, 4, S, 8] y",
        ("attention", "Softmax 'p'", "attention", ["the mask has shape", "at most 4 dimensions"]),
    ),
    "key heads that do not divide the query heads": (
        "float[B, 4, S, 8] q, float[B, 1, T, 8] k, float[B, 4, T, 8] v", f"{SCORES} {TAIL}", Y,
        ("attention", "Softmax 'p'", "attention", ["4 query heads, 1 key heads and 4 value heads do not go together"]),
    ),
    "a weight computed from an input": (
        "float[B, S, 8] x, float[8, 8] z", "m = MatMul(x, z) y = Relu(m)", "float[B, S, 8] y",
        ("activation after a product", "Relu 'y'", "linear_activation", ["the weight 'z' is computed from the inputs"]),
    ),
    "an epsilon that is not constant": (
        "float[B, S, 8] x, float[1] e", "s = Mul(x, x) m = ReduceMean<keepdims = 1>(s, last) a = Add(m, e) r = Sqrt(a) d = Div(x, r) y = Mul(d, weight)", "float[B, S, 8] y",
        ("normalization", "Sqrt 'r'", "rms_norm", ["'e' is not a small constant"]),
    ),
    "heads permuted in three dimensions": (
        "float[N, S, 8] q, float[T, N, 8] k, float[N, S, 8] v", "kt = Transpose<perm = [1, 2, 0]>(k) m0 = MatMul(q, kt) t = Transpose<perm = [0, 2, 1]>(m0) p = Softmax<axis = -1>(t) y = MatMul(p, v)",
        "float[N, T, 8] y", ("attention", "Softmax 'p'", "attention", ["Transpose 't'", "expected"]),
    ),
    "a sum read elsewhere, which a weaker rule takes": (
        "float[B, S, 8] x", "m = MatMul(x, w) s = Add(m, bias) y = Gelu(s) z = Neg(s)", "float[B, S, 8] y, float[B, S, 8] z",
        ("activation after a product", "Gelu 'y'", "linear_activation", ["'s' inside the match is needed elsewhere", "Neg 'z' reads it too"]),
    ),
    "a bias of two dimensions, which a weaker rule takes for a residual": (
        "float[S, 8] x, float[S, 8] b", "m = MatMul(x, w) s = Add(m, b) y = Gelu(s)", "float[S, 8] y",
        ("activation after a product", "Gelu 'y'", "linear_activation", ["the bias 'b' has shape ['S', 8], expected one dimension"]),
    ),
    "an activation of two different values": (
        "float[B, S, 8] x, float[B, S, 8] x2", "m = MatMul(x, w) d = Div(m, root) e = Erf(d) s = Add(e, one) h = Mul(x2, half) y = Mul(h, s)", "float[B, S, 8] y",
        ("activation after a product", "Erf 'e'", "gelu_erf", ["'x2' is not 'm', which x stands for"]),
    ),
    "a norm of two different values": (
        "float[B, S, 8] x, float[B, S, 8] x2", "s = Mul(x, x) m = ReduceMean<keepdims = 1>(s, last) a = Add(m, eps) r = Sqrt(a) d = Div(x2, r) y = Mul(d, weight)", "float[B, S, 8] y",
        ("normalization", "Sqrt 'r'", "rms_norm", ["'x' is not 'x2', which x stands for"]),
    ),
    "an unknown activation": (
        "float[B, S, 8] x", "m = MatMul(x, w) y = Mish(m)", "float[B, S, 8] y",
        ("activation after a product", "Mish 'y'", "", ["no rule comes near it"]),
    ),
    "a cast to lower precision in the middle": (
        HEADS, f"{SCORES} low = Cast<to = 10>(s) high = Cast<to = 1>(low) p = Softmax<axis = -1>(high) y = MatMul(p, v)", Y,
        ("attention", "Softmax 'p'", "attention", ["at Cast 'low'", "found Cast of float32 to float16"]),
    ),
}  # fmt: skip


def planted(inputs, body, outputs, opset=20):
    """The model, with those of the constants that it reads."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return parse(f"({inputs}) => ({outputs}) {{ {body} }}", opset, **{n: a for n, a in CONSTANTS.items() if n in words})


def explained(tmp_path, inputs, body, outputs):
    path = tmp_path / "m.onnx"
    onnx.save(planted(inputs, body, outputs), path)
    done = CliRunner().invoke(main, ["explain", str(path), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", MISSES)
def test_the_node_and_the_reason(case, tmp_path):
    inputs, body, outputs, (kind, node, rule, words) = MISSES[case]
    told = explained(tmp_path, inputs, body, outputs)["unfused"]
    assert [(u["kind"], u["node"], u["rule"]) for u in told] == [(kind, node, rule)], told
    for word in words:
        assert word in told[0]["reason"]


LATE = """
import rewrite

@rewrite.rule(priority=-9)
class Late:
    def pattern(op, x, w):
        return op.Relu(x @ w)
    def replace(op, x, w):
        return op.MatMulAct(x, w, activation="relu")
"""


def test_a_rule_that_another_outruns_is_told_if_asked_for(tmp_path):
    path, rules = tmp_path / "m.onnx", tmp_path / "late.py"
    rules.write_text(LATE)
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { m = MatMul(x, w) y = Relu(m) }", w=CONSTANTS["w"]), path)

    def told(*more):
        return json.loads(CliRunner().invoke(main, ["explain", str(path), "--rules", str(rules), "--json", *more]).stdout)["near_misses"]

    (one,) = told("--rule", "late")
    assert (one["at"], one["part"]) == ("Relu 'y'", "outrun")
    assert one["reason"].startswith("rule 'linear_activation' took it before (priority 5 against -9)")
    assert one["covered"] == ["Relu 'y'", "MatMul 'm'"]
    assert {m["rule"] for m in told("--node", "y")} == {"late"}
    assert {m["rule"] for m in told("--node", "m")[:2]} == {"late", "linear"}
    assert told() == []


CUBE = """
import rewrite

@rewrite.rule(priority=20)
class Cube:
    def pattern(op, x, w):
        return op.Pow(op.Relu(x @ w), 3.0)
    def replace(op, x, w):
        return op.MatMulAct(x, w)
"""


def test_a_rule_that_came_near_where_another_fused_is_told_if_asked_for(tmp_path):
    path, rules = str(tmp_path / "m.onnx"), tmp_path / "cube.py"
    rules.write_text(CUBE)
    onnx.save(planted("float[n, 8] x", "m = MatMul(x, w) r = Relu(m) y = Pow(r, two)", "float[n, 8] y"), path)
    done = CliRunner().invoke(main, ["explain", path, "--rules", str(rules), "--rule", "cube", "--json"])
    assert [(m["at"], m["reason"]) for m in json.loads(done.stdout)["near_misses"]] == [("Pow 'y'", "'two' is 2, not 3")]
    done = CliRunner().invoke(main, ["optimize", path, "--rules", str(rules), "--expect", "cube=1"])
    assert done.exit_code == 1
    assert "expected cube=1, found 0\n  cube at Pow 'y': 'two' is 2, not 3" in done.stderr


REFUSALS = {  # by rule: what its check, or its pattern's last condition, refuses
    "attention": (20, "float[B, 1, S, 8] q, float[B, 4, T, 8] k, float[B, 4, T, 8] v", f"{TURN} m = MatMul(q, kt) p = Softmax<axis = -1>(m) y = MatMul(p, v)", Y,
                  "1 query heads, 4 key heads and 4 value heads do not go together"),
    "gated_linear": (20, "float[n, 8] x", "a = MatMul(x, thin) b = MatMul(x, w) g = Sigmoid(a) y = Mul(g, b)", "float[n, 8] y", "the weights have shapes [8, 1] and [8, 8], expected equal ones"),
    "native_attention": (25, HEADS, "y = Attention<left_window_size = 2>(q, k, v)", Y, "attribute left_window_size is 2, wanted: No window"),
    "factor_one": (20, "float[4] x", "y = Mul(x, ones)", "float[1, 4] y", "the product has shape [1, 4], x [4]"),
    "flat_gemm": (20, "float[a, b, 8] x", "f = Reshape(x, flat) g = Gemm(f, w) y = Reshape(g, turned)", "float[c, d, 8] y", "the leading dimensions change, from ['a', 'b', 8] to [2,"),
    "einsum_product": (20, "float[b, 2, 3] p, float[b, 3, 4, 5] q", 'y = Einsum<equation = "bij,bjkl->bikl">(p, q)', "float[b, 2, 4, 5] y", "keeps 1 and 2 letters of one operand alone"),
    "key_transpose": (20, "float[3, 2, 5, 8] k", "f = Reshape(k, folded) t = Transpose<perm = [0, 2, 1]>(f) y = Reshape(t, cut)", "float[3, 2, 4, 10] y", "is no transpose of the last two dimensions"),
    "static_repeat": (20, "float[b, 2, t, 8] k, int64[5] to", "u = Unsqueeze(k, axis2) e = Expand(u, to) y = Reshape(e, four)", "float[b, 5, s, 8] y", "with known heads, found"),
}  # fmt: skip


@pytest.mark.parametrize("rule", REFUSALS)
def test_what_a_check_refuses_it_refuses_with_its_reason(rule):
    """Verification would reject most of these, and say less."""
    opset, inputs, body, outputs, reason = REFUSALS[rule]
    report = rewrite.optimize(planted(inputs, body, outputs, opset), explain=True).report
    assert not report.rules[rule].applied
    assert any(m.rule == rule and reason in m.reason and m.part != "replacement" for m in report.near_misses), list(map(str, report.near_misses))
