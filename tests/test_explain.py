"""A stranger understands why a model is not fused further: three models made by hand, and what is said of them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse

import rewrite
from rewrite.cli import main
from rewrite.explain import unfused


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def explain(tmp_path):
    def of(model, *arguments):
        path = tmp_path / "m.onnx"
        onnx.save(model, path)
        done = run("explain", path, *arguments, "--json")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return of


ATTENTION = """(float[b, 2, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v) => (float[b, 2, s, 8] y) {{
    kt = Transpose<perm=[0,1,3,2]>(k)
    s0 = MatMul(q, kt)
    c = Constant<value_float=0.35>()
    s1 = Mul(s0, c)
    p = Softmax<axis={axis}>(s1)
    {middle}
    y = MatMul(p1, v)
}}"""


def attention(axis=-1, middle="p1 = Identity(p)"):
    return parse(ATTENTION.format(axis=axis, middle=middle))


def test_a_fused_attention_is_told_and_nothing_else(explain):
    told = explain(attention())
    assert [s["rule"] for s in told["fused"]] == ["attention"]
    assert told["unfused"] == []
    assert told["near_misses"] == []


def test_an_attention_over_the_wrong_axis(explain):
    (one,) = explain(attention(axis=2))["unfused"]
    assert (one["kind"], one["node"], one["rule"]) == ("attention", "Softmax 'p'", "attention")
    assert "axis 2" in one["reason"]


def test_an_attention_with_an_operator_in_between(explain):
    (one,) = explain(attention(middle="p1 = Relu(p)"))["unfused"]
    assert (one["kind"], one["node"]) == ("attention", "Softmax 'p'")
    assert "Relu" in one["reason"]
    assert "expected" in one["reason"]


def test_an_attention_of_which_the_weights_are_an_output():
    model = attention()
    model.graph.output.append(onnx.helper.make_tensor_value_info("p", 1, ["b", 2, "s", "s"]))
    result = rewrite.optimize(model, explain=True)
    (one,) = unfused(result.model.proto, result.report)
    assert one.node == "Softmax 'p'"
    assert "'p' inside the match is needed elsewhere: it is an output of the graph" in one.reason


MLP = """(float[n, 8] x) => (float[n, 4] y) {{
    m0 = MatMul(x, w0)
    t0 = Add(m0, b0)
    a0 = Relu(t0)
    m1 = MatMul(a0, w1)
    t1 = Add(m1, b1)
    a1 = {second}(t1)
    y = MatMul(a1, w2)
}}"""


def mlp(second, rng):
    weights = {"w0": (8, 16), "b0": (16,), "w1": (16, 16), "b1": (16,), "w2": (16, 4)}
    return parse(MLP.format(second=second), 20, **{n: rng.standard_normal(s).astype(np.float32) for n, s in weights.items()})


def test_the_activation_that_no_rule_knows_is_the_one_told(explain, rng):
    told = explain(mlp("Softplus", rng))
    assert [(u["kind"], u["node"]) for u in told["unfused"]] == [("activation after a product", "Softplus 'a1'")]
    assert "no rule" in told["unfused"][0]["reason"] or "expected" in told["unfused"][0]["reason"]


def test_an_attention_of_onnx_that_stays_is_told(explain):
    """With three dimensions and a cache it is not the plain one that is fused."""
    text = "(float[b, s, 16] q, float[b, s, 16] k, float[b, s, 16] v) => (float[b, s, 16] y) { y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v) }"
    (one,) = explain(parse(text, 23))["unfused"]
    assert (one["kind"], one["node"], one["rule"]) == ("attention", "Attention 'y'", "native_attention")
    assert "expected four dimensions" in one["reason"]


def test_an_attention_with_a_column_more_is_told(explain):
    """gpt-oss: its sinks are cut off between the softmax and the product."""
    body = """kt = Transpose<perm = [0, 1, 3, 2]>(k) s0 = MatMul(q, kt) s = Concat<axis = -1>(s0, sinks) p = Softmax<axis = -1>(s)
        zero = Constant<value_ints = [0]>() end = Constant<value_ints = [-1]>() p1 = Slice(p, zero, end, end) y = MatMul(p1, v)"""
    text = f"(float[b, 2, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v, float[b, 2, s, 1] sinks) => (float[b, 2, s, 8] y) {{ {body} }}"
    (one,) = explain(parse(text))["unfused"]
    assert (one["kind"], one["node"], one["rule"]) == ("attention", "Softmax 'p'", "attention")
    assert "at Slice 'p1': expected Where or Cast or Softmax, found Slice" in one["reason"]


def test_nothing_is_told_where_all_is_fused(explain, rng):
    told = explain(mlp("Gelu", rng))
    assert told["unfused"] == []
    assert told["near_misses"] == []


GELU = """(float[n, 8] x) => (float[n, 16] y) {{
    m = MatMul(x, w)
    half = Constant<value_float = 0.5>()
    one = Constant<value_float = {one}>()
    root = Constant<value_float = 1.4142135>()
    d = Div(m, root)
    e = Erf(d)
    s = Add(e, one)
    h = Mul(m, half)
    y = Mul(h, s)
}}"""


def test_the_number_that_is_wrong_is_named(explain, rng):
    (one,) = explain(parse(GELU.format(one=1.1), w=rng.standard_normal((8, 16)).astype(np.float32)))["unfused"]
    assert (one["node"], one["rule"]) == ("Erf 'e'", "gelu_erf")
    assert "'one' is 1.1, not 1" in one["reason"]


def test_what_is_there_of_a_near_miss_is_told_when_asked(tmp_path, rng):
    """The nodes that were found, and what the pattern's variables stand for."""
    onnx.save(parse(GELU.format(one=1.1), w=rng.standard_normal((8, 16)).astype(np.float32)), tmp_path / "m.onnx")
    words = " ".join(run("explain", tmp_path / "m.onnx", "--rule", "gelu_erf").stdout.split())
    assert "'one' is 1.1, not 1 (4 of at least 4 operators found)" in words
    assert "Mul 'y', Mul 'h', Add 's', Erf 'e', Div 'd'; x = m" in words
    assert "x = m" not in run("explain", tmp_path / "m.onnx").stdout


def test_what_the_variables_of_a_refused_match_stand_for_is_told(explain):
    (miss,) = [m for m in explain(attention(axis=2), "--rule", "attention")["near_misses"] if m["part"] == "check"]
    assert {n: miss["bound"][n] for n in ("q", "k", "v", "axis")} == {"q": "q", "k": "k", "v": "v", "axis": "2"}
    assert float(miss["bound"]["s_scale"]) == pytest.approx(0.35)
    assert "mask" not in miss["bound"]


def test_operators_that_merely_share_a_root_are_no_near_miss(explain, rng):
    """A plain product or sum is the root of many rules, and none of them came near."""
    model = parse("(float[n, 8] x, float[n, 8] z) => (float[n, 8] y) { a = Add(x, z) b = Mul(a, z) c = Transpose(b) d = Transpose(c) y = Sub(d, x) }")
    told = explain(model)
    assert told["near_misses"] == []
    assert told["unfused"] == []


def test_every_attempt_of_a_rule_is_told_when_asked(explain):
    told = explain(attention(axis=2), "--rule", "attention")
    assert {m["rule"] for m in told["near_misses"]} == {"attention"}
    assert any(m["at"] == "MatMul 'y'" and "axis 2" in m["reason"] for m in told["near_misses"])


def test_what_all_rules_say_of_a_node(explain):
    told = explain(attention(axis=2), "--node", "y")
    assert told["near_misses"]
    assert {m["at"] for m in told["near_misses"]} == {"MatMul 'y'"}


def test_a_rule_that_holds_a_node_or_stops_there_says_so_of_it(explain):
    """Not only those of which it is the root: the softmax lies in the middle of an attention."""
    told = explain(attention(axis=2), "--node", "p")
    assert [(u["node"], u["rule"]) for u in told["unfused"]] == [("Softmax 'p'", "attention")]
    first = told["near_misses"][0]
    assert (first["rule"], first["at"], first["part"]) == ("attention", "MatMul 'y'", "check")
    assert explain(attention(axis=2), "--node", "p", "--rule", "attention")["near_misses"] == [first]
    stopped = explain(attention(middle="p1 = Relu(p)"), "--node", "p1", "--rule", "attention")["near_misses"]
    assert [(m["at"], m["node"]) for m in stopped] == [("MatMul 'y'", "Relu 'p1'")]


def test_what_is_fused_at_a_node_is_told_alone(explain):
    model = parse("(float[n, 8] x) => (float[n, 8] y, float[n, 8] z) { s = Sigmoid(x) y = Mul(x, s) r = Relu(x) z = Mul(r, r) }")
    assert {s["rule"] for s in explain(model)["fused"]} == {"swish_sigmoid", "squared_relu"}
    assert [s["rule"] for s in explain(model, "--node", "s")["fused"]] == ["swish_sigmoid"]


def test_what_lies_in_a_function_of_the_model_is_told(explain):
    """Rules do not look there; zero fusions must not be silent."""
    model = attention()
    body = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.add(op_type="Attend", domain="mine", input=["q", "k", "v"], output=["y"])
    model.functions.append(onnx.helper.make_function("mine", "Attend", ["q", "k", "v"], ["y"], body, model.opset_import))
    model.opset_import.add(domain="mine", version=1)
    onnx.checker.check_model(model)
    for asked in ((), ("--node", "p")):
        (one,) = explain(model, *asked)["unfused"]
        assert (one["kind"], one["node"]) == ("attention", "Softmax 'p'")
        assert "in the function mine::Attend, and rules do not look into functions: inline it" in one["reason"]


def test_a_node_that_is_not_there(tmp_path):
    onnx.save(attention(), tmp_path / "m.onnx")
    done = run("explain", tmp_path / "m.onnx", "--node", "nonsense")
    assert done.exit_code == 2
    assert "no node 'nonsense'" in done.stderr


def test_the_tables_name_rule_node_and_reason(tmp_path):
    onnx.save(attention(axis=2), tmp_path / "m.onnx")
    done = run("explain", tmp_path / "m.onnx")
    words = " ".join(done.stdout.split())
    assert "Not fused" in words
    assert "Softmax 'p'" in words
    assert "the softmax is over axis 2" in words


@pytest.mark.parametrize("name", ["a\\[/foo]", "[red]", "[/]", "\\[", "[link=x]y[/link]"])
def test_a_name_that_looks_like_markup_is_a_name(tmp_path, name):
    model = attention(axis=2)
    model.graph.node[-1].name = name
    onnx.save(model, tmp_path / "m.onnx")
    assert f"MatMul '{name}'" in run("explain", tmp_path / "m.onnx", "--node", name).stdout


def test_optimize_counts_what_is_left_and_tells_how_to_ask(tmp_path, rng):
    onnx.save(mlp("Softplus", rng), tmp_path / "m.onnx")
    done = run("optimize", tmp_path / "m.onnx")
    assert "not fused: 1 × activation after a product; `rewrite explain` tells why" in done.stdout


def test_explaining_changes_no_result(rng):
    model = mlp("Softplus", rng)
    plain, explained = (rewrite.optimize(model, explain=e) for e in (False, True))
    assert plain.model.proto.SerializeToString(deterministic=True) == explained.model.proto.SerializeToString(deterministic=True)
    assert [s.rule for s in plain.report.sites] == [s.rule for s in explained.report.sites]
