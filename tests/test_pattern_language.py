"""What the pattern language offers, one by one: what must match, what must not, and what a rule gets to see."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from conftest import nodes, parse
from hypothesis import given, settings
from hypothesis import strategies as st

import rewrite
from rewrite.pattern import any_of, attr, ints, maybe, rest, scalar, tag, trace, typed, unless_nan
from rewrite.pattern import names as names_in_pattern
from rewrite.registry import library


def declare(pattern, replace=None, check=None, name="Tried", tier="lift", priority=50, doc="tried."):
    """A rule that belongs to no program: made for one test, used where it is given."""
    from rewrite import registry

    parts = {"pattern": pattern, "__doc__": doc, **({"check": check} if check else {}), "replace": replace or (lambda op, x: op.Identity(x))}
    with registry._declared_in(registry.Source("test")):
        return rewrite.rule(tier=tier, priority=priority)(type(name, (), parts))


def fits(pattern, text, opset=18, **weights):
    """What the pattern binds in the model, at each match in turn; the rule refuses each."""
    seen = []
    outputs, variables = trace(pattern)
    names = sorted({*variables}.union(*(names_in_pattern(o) for o in outputs)))
    namespace: dict = {}
    exec(f"def check({', '.join(names)}):\n    seen.append(dict({', '.join(f'{n}={n}' for n in names)}))\n    return 'seen'", {"seen": seen}, namespace)
    made = declare(pattern, replace=eval(f"lambda op{''.join(', ' + n for n in names)}: None"), check=namespace["check"])
    model = parse(text, opset, **weights) if isinstance(text, str) else text
    rewrite.optimize(model, rules=[made], only=["tried"], verify=False)
    return seen


def test_a_pattern_reads_as_the_maths():
    seen = fits(lambda op, x, y: -(x + y) / x @ y, "(float[4, 4] x, float[4, 4] y) => (float[4, 4] z) { a = Add(x, y) n = Neg(a) d = Div(n, x) z = MatMul(d, y) }")
    assert len(seen) == 1
    assert (seen[0]["x"].name, seen[0]["y"].name) == ("x", "y")


# --- commutativity and re-association -------------------------------------------------------------------------------
@pytest.mark.parametrize("op", ["Add", "Mul", "Max", "Min", "Equal", "And", "Or", "Xor"])
def test_operands_in_any_order(op):
    kind = "bool" if op in ("And", "Or", "Xor") else "float"
    inner = "Not" if kind == "bool" else "Neg"
    result = "bool" if op == "Equal" or kind == "bool" else "float"
    for order in ("n, x", "x, n"):
        text = f"({kind}[4] x) => ({result}[4] y) {{ n = {inner}(x)\n y = {op}({order}) }}"
        assert len(fits(lambda o, x: getattr(o, op)(x, getattr(o, inner)(x)), text)) == 1
    assert not fits(lambda o, x: getattr(o, op)(x, getattr(o, inner)(x)), f"({kind}[4] x, {kind}[4] w) => ({result}[4] y) {{ n = {inner}(x)\n y = {op}(n, w) }}")


@pytest.mark.parametrize("op", ["Sub", "Div", "MatMul", "Pow"])
def test_the_order_of_others_counts(op):
    def pattern(o, x):
        return getattr(o, op)(o.Neg(x), o.Abs(x))

    for order, count in (("n, a", 1), ("a, n", 0)):
        assert len(fits(pattern, f"(float[4, 4] x) => (float[4, 4] y) {{ n = Neg(x)\n a = Abs(x)\n y = {op}({order}) }}")) == count


def bracketings(parts):
    if len(parts) == 1:
        yield parts[0]
    for cut in range(1, len(parts)):
        yield from itertools.product(bracketings(parts[:cut]), bracketings(parts[cut:]))


def chain(tree, op, between=()):
    """ONNX text that computes a tree of operands with a binary operator into `y`; no-ops from `between` after inner ones."""
    lines, count = [], itertools.count()
    spice = iter(between)

    def emit(part, last=False):
        if isinstance(part, str):
            return part
        left, right = emit(part[0]), emit(part[1])
        name = "y" if last else f"t{next(count)}"
        lines.append(f"{name} = {op}({left}, {right})")
        noop = None if last else next(spice, None)
        if noop:
            lines.append(f"{name}i = {noop}({name})")
            return f"{name}i"
        return name

    emit(tree, True)
    return "\n".join(lines)


LEAVES = "n = Neg(x)\n a = Abs(x)\n e = Exp(x)\n c = Constant<value_float=0.3>()\n"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.permutations(["n", "a", "e", "c"]), st.data(), st.sampled_from(["Add", "Mul"]))
def test_every_order_and_bracketing_matches(order, data, op):
    tree = data.draw(st.sampled_from(list(bracketings(order))))
    between = data.draw(st.lists(st.sampled_from([None, "Identity"]), max_size=2))

    def pattern(o, x):
        combine = getattr(o, op)
        return combine(combine(o.Neg(x), combine(o.Abs(x), o.Exp(x))), 0.3)

    text = f"(float[4] x) => (float[4] y) {{ {LEAVES} {chain(tree, op, between)} }}"
    assert len(fits(pattern, text)) == 1
    wrong = text.replace("0.3", "0.4")
    assert not fits(pattern, wrong)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations(["n", "a", "e", "c"]), st.data())
def test_a_replaced_chain_is_verified_in_every_order(order, data):
    def replace(op, x, c):
        return op.Mul(op.Exp(op.Identity(x)), op.Mul(op.Mul(op.Abs(x), op.Neg(x)), op.constant([c], "float32")))

    def check(x):
        return "replaced before" if any(u.op == "Identity" for u in x.graph.consumers(x.tensor)) else None

    tree = data.draw(st.sampled_from(list(bracketings(order))))
    made = declare(lambda op, x: op.Neg(x) * op.Abs(x) * op.Exp(x) * scalar("c"), replace, check)
    result = rewrite.optimize(parse(f"(float[4] x) => (float[4] y) {{ {LEAVES} {chain(tree, 'Mul')} }}"), rules=[made], only=["tried"])
    assert result.report.rules["tried"].applied == 1
    assert result.report.model_error < 1e-6


def test_a_constant_divisor_is_a_factor_and_a_constant_subtrahend_a_term():
    for text in ("c = Constant<value_float=0.5>() y = Mul(x, c)", "c = Constant<value_float=2.0>() y = Div(x, c)"):
        assert len(fits(lambda op, x: x * 0.5, f"(float[4] x) => (float[4] y) {{ {text} }}")) == 1
    for text in ("c = Constant<value_float=3.0>() y = Add(x, c)", "c = Constant<value_float=-3.0>() y = Sub(x, c)"):
        assert len(fits(lambda op, x: x + 3.0, f"(float[4] x) => (float[4] y) {{ {text} }}")) == 1
    assert not fits(lambda op, x: x * 0.5, "(float[4] x) => (float[4] y) { c = Constant<value_float=0.5>() y = Div(x, c) }")
    assert not fits(lambda op, x: x * 0.5, "(float[4] x) => (float[4] y) { c = Constant<value_float=2.0>() y = Div(c, x) }")


def test_one_variable_is_one_value():
    assert fits(lambda op, x: x * x, "(float[4] x) => (float[4] y) { y = Mul(x, x) }")
    assert not fits(lambda op, x: x * x, "(float[4] x, float[4] z) => (float[4] y) { y = Mul(x, z) }")


# --- optional nodes and alternatives --------------------------------------------------------------------------------
def test_optional_nodes():
    def pattern(op, x):
        return op.Exp(maybe(op.Neg, x))

    assert fits(pattern, "(float[4] x) => (float[4] y) { n = Neg(x) y = Exp(n) }")[0]["x"].name == "x"
    assert fits(pattern, "(float[4] x) => (float[4] y) { a = Abs(x) y = Exp(a) }")[0]["x"].name == "a"


def test_variables_of_alternatives_not_taken_are_none():
    def pattern(op, x, y):
        return op.Exp(any_of(op.Add(x, y), op.Mul(x, scalar("s")), x))

    seen = fits(pattern, "(float[4] x) => (float[4] y) { c = Constant<value_float=3.0>() m = Mul(x, c) y = Exp(m) }")[0]
    assert (seen["x"].name, seen["y"], seen["s"]) == ("x", None, 3.0)
    seen = fits(pattern, "(float[4] x, float[4] z) => (float[4] y) { m = Add(x, z) y = Exp(m) }")[0]
    assert seen["s"] is None
    assert {seen["x"].name, seen["y"].name} == {"x", "z"}


def test_an_alternative_that_leads_nowhere_is_taken_back():
    def pattern(op, x, y):
        return op.Exp(any_of(op.Add(x, y), op.Add(x, 1.0))) * x

    text = "(float[4] x, float[4] z) => (float[4] y) { c = Constant<value_float=1.0>() a = Add(z, c) e = Exp(a) y = Mul(e, z) }"
    assert all(s["x"].name == "z" for s in fits(pattern, text))


@pytest.mark.parametrize("tree", list(bracketings(["n", "a", "e"])))
def test_alternatives_take_part_in_re_association(tree):
    def pattern(op, x):
        return any_of(op.Neg(x) * op.Abs(x), op.Neg(x)) * op.Exp(x)

    assert len(fits(pattern, f"(float[4] x) => (float[4] y) {{ {LEAVES} {chain(tree, 'Mul')} }}")) == 1
    assert len(fits(pattern, "(float[4] x) => (float[4] y) { n = Neg(x) e = Exp(x) y = Mul(e, n) }")) == 1


def test_tags_tell_the_alternative():
    def pattern(op, x):
        return any_of(tag(op.Relu(x), kind="relu"), tag(op.Tanh(x), kind="tanh"))

    assert fits(pattern, "(float[4] x) => (float[4] y) { y = Tanh(x) }")[0]["kind"] == "tanh"
    assert fits(pattern, "(float[4] x) => (float[4] y) { y = Relu(x) }")[0]["kind"] == "relu"


def test_optional_inputs():
    def pattern(op, x):
        return op.Clip(x, None, scalar("high"))

    assert fits(pattern, "(float[4] x, float high) => (float[4] y) { y = Clip(x, , high) }") == []
    assert fits(pattern, "(float[4] x) => (float[4] y) { h = Constant<value_float=2.0>() y = Clip(x, , h) }")[0]["high"] == 2.0
    assert fits(pattern, "(float[4] x) => (float[4] y) { h = Constant<value_float=2.0>() y = Clip(x, h, h) }") == []


# --- no-ops ---------------------------------------------------------------------------------------------------------
def through(noop, kind="float", shape="n, 4", opset=18):
    """Does Exp(Neg(x)) match with `noop` (text from `a` to `b`) in between?"""
    text = f"({kind}[{shape}] x) => ({kind}[{shape}] y) {{ a = Neg(x)\n {noop}\n y = Exp(b) }}"
    return len(fits(lambda op, x: op.Exp(op.Neg(x)), text, opset)) == 1


@pytest.mark.parametrize(("noop", "kind"), [
    ("b = Identity(a)", "float"),
    ("c = Identity(a) b = Identity(c)", "float"),
    ("b = Dropout(a)", "float"),
    ("r = Constant<value_float=0.5>() t = Constant<value=bool {0}>() b, m = Dropout(a, r, t)", "float"),
    ("b = Cast<to=1>(a)", "float"),
    ("c = Cast<to=1>(a) b = Cast<to=10>(c)", "float16"),
    ("c = Cast<to=11>(a) b = Cast<to=1>(c)", "float"),
    ("c = Transpose<perm=[1,0]>(a) b = Transpose<perm=[1,0]>(c)", "float"),
    ("c = Transpose(a) b = Transpose(c)", "float"),
    ("b = Transpose<perm=[0,1]>(a)", "float"),
    ("s = Constant<value_ints=[-1,2,2]>() t = Constant<value_ints=[-1,4]>() c = Reshape(a, s) b = Reshape(c, t)", "float"),
    ("i = Constant<value_ints=[1]>() c = Unsqueeze(a, i) b = Squeeze(c, i)", "float"),
    ("s = Constant<value_ints=[0,4]>() b = Reshape(a, s)", "float"),
    ("c = Identity(a) d = Cast<to=11>(c) e = Identity(d) f = Cast<to=1>(d) b = Identity(f)", "float"),
])  # fmt: skip
def test_no_ops_are_looked_through(noop, kind):
    assert through(noop, kind)


@pytest.mark.parametrize(("noop", "kind"), [
    ("b = Abs(a)", "float"),
    ("c = Cast<to=10>(a) b = Cast<to=1>(c)", "float"),  # loses digits
    ("c = Cast<to=7>(a) b = Cast<to=1>(c)", "float"),
    ("c = Transpose<perm=[1,0]>(a) s = Constant<value_ints=[-1,4]>() b = Reshape(c, s)", "float"),
    ("r = Constant<value_float=0.5>() t = Constant<value=bool {1}>() b, m = Dropout(a, r, t)", "float"),
    ("n = IsNaN(a) z = Constant<value_float=0.0>() b = Where(n, z, a)", "float"),
])  # fmt: skip
def test_what_changes_something_is_not_looked_through(noop, kind):
    assert not through(noop, kind)


def test_three_transposes_that_cancel_together():
    assert through("c = Transpose<perm=[1,2,0]>(a) d = Transpose<perm=[1,2,0]>(c) b = Transpose<perm=[1,2,0]>(d)", shape="n, 4, 5")
    assert not through("c = Transpose<perm=[1,2,0]>(a) d = Transpose<perm=[1,2,0]>(c) b = Transpose<perm=[0,1,2]>(d)", shape="4, 4, 4")


def test_a_mask_of_dropout_is_no_copy_of_its_input():
    dropped = "(float[4] x) => (bool[4] y) { a = Neg(x)\n d, m = Dropout(a)\n y = Not(m) }"
    assert fits(lambda op, x: op.Not(op.Neg(x)), dropped) == []


def test_what_is_looked_through_is_replaced_and_verified():
    made = declare(lambda op, x: op.Exp(op.Neg(x)), lambda op, x: op.Reciprocal(op.Exp(x)))
    result = rewrite.optimize(parse("(float16[4, 8] x) => (float16[4, 8] y) { a = Neg(x) c = Cast<to=1>(a) b = Cast<to=10>(c) y = Exp(b) }"), rules=[made], only=["tried"])
    assert nodes(result.model.proto) == ["Exp", "Reciprocal"]


def test_nan_guards_are_asked_for():
    def pattern(op, x):
        return op.Exp(unless_nan(op, op.Neg(x), "guard"))

    guarded = "(float[4] x) => (float[4] y) { a = Neg(x) n = IsNaN(a) z = Constant<value_float=0.5>() b = Where(n, z, a) y = Exp(b) }"
    assert fits(pattern, guarded)[0]["guard"] == 0.5
    assert fits(pattern, "(float[4] x) => (float[4] y) { a = Neg(x) y = Exp(a) }")[0]["guard"] is None
    assert not fits(pattern, guarded.replace("IsNaN(a)", "IsNaN(x)"))


# --- predicates -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("number", "matches"), [("-inf", 1), ("inf", 0), ("-3.4e38", 0), ("nan", 0)])
def test_an_infinite_constant(number, matches):
    text = "(float[4] x, bool[4] m) => (float[4] y) { y = Where(m, x, low) }"
    assert len(fits(lambda op, x, m: op.Where(m, x, float("-inf")), text, low=np.float32(number))) == matches


def test_constants():
    text = "(float[4] x) => (float[4] y) {{ c = Constant<value_float={}>() y = Mul(x, c) }}"
    assert fits(lambda op, x: x * 0.044715, text.format(0.044715))
    assert fits(lambda op, x: x * 0.044715, text.format(0.0447))  # as half precision stores it
    assert not fits(lambda op, x: x * 0.044715, text.format(0.05))
    assert fits(lambda op, x: x * scalar("s"), text.format(0.25))[0]["s"] == 0.25
    vector = "(float[4] x) => (float[4] y) { c = Constant<value_floats=[1.0,2.0,3.0,4.0]>() y = Mul(x, c) }"
    assert not fits(lambda op, x: x * scalar("s"), vector)
    assert fits(lambda op, x: x * scalar("s"), vector.replace("[1.0,2.0,3.0,4.0]", "[7.0]"))[0]["s"] == 7.0


def test_one_name_for_two_scalars_means_one_number():
    text = "(float[4] x) => (float[4] y) {{ c = Constant<value_float=2.0>() d = Constant<value_float={}>() m = Mul(x, c) y = Add(m, d) }}"
    assert fits(lambda op, x: x * scalar("s") + scalar("s"), text.format(2.0))
    assert not fits(lambda op, x: x * scalar("s") + scalar("s"), text.format(3.0))


def test_vectors_of_integers():
    text = "(float[2, 3, 4] x) => (float[2, 12] y) { s = Constant<value_ints=[0,-1]>() y = Reshape(x, s) }"
    assert fits(lambda op, x: op.Reshape(x, ints("shape")), text)[0]["shape"] == [0, -1]
    assert fits(lambda op, x: op.Reshape(x, [0, -1]), text)
    assert not fits(lambda op, x: op.Reshape(x, [0, 12]), text)


def test_attributes():
    text = "(float[2, 3] x) => (float[2, 3] y) { y = Softmax<axis=1>(x) }"
    assert fits(lambda op, x: op.Softmax(x, axis=1), text)
    assert not fits(lambda op, x: op.Softmax(x, axis=0), text)
    assert fits(lambda op, x: op.Softmax(x, axis=attr("axis")), text)[0]["axis"] == 1
    assert fits(lambda op, x: op.Softmax(x, axis=lambda a: a in (-1, 1)), text)
    assert not fits(lambda op, x: op.Softmax(x, axis=lambda a: a == 0), text)


def test_an_attribute_left_out_has_its_default():
    assert fits(lambda op, x: op.Softmax(x, axis=-1), "(float[2, 3] x) => (float[2, 3] y) { y = Softmax(x) }")
    assert fits(lambda op, x: op.LeakyRelu(x, alpha=0.01), "(float[3] x) => (float[3] y) { y = LeakyRelu(x) }")


def test_attributes_are_single_precision_and_lists_are_lists():
    assert fits(lambda op, x: op.LeakyRelu(x, alpha=0.1), "(float[3] x) => (float[3] y) { y = LeakyRelu<alpha=0.1>(x) }")
    assert not fits(lambda op, x: op.LeakyRelu(x, alpha=0.1), "(float[3] x) => (float[3] y) { y = LeakyRelu<alpha=0.1001>(x) }")
    assert fits(lambda op, x: op.Transpose(x, perm=(1, 0)), "(float[2, 3] x) => (float[3, 2] y) { y = Transpose<perm=[1,0]>(x) }")


def test_one_name_for_two_attributes_means_one_value():
    text = "(float[2, 3] x) => (float[2, 3] y) {{ a = Softmax<axis=1>(x) y = Softmax<axis={}>(a) }}"
    assert fits(lambda op, x: op.Softmax(op.Softmax(x, axis=attr("a")), axis=attr("a")), text.format(1))
    assert not fits(lambda op, x: op.Softmax(op.Softmax(x, axis=attr("a")), axis=attr("a")), text.format(0))


def test_what_a_check_sees():
    seen = fits(lambda op, x, w: x @ w, "(float[batch, seq, 8] x) => (float[batch, seq, 4] y) { y = MatMul(x, w) }", w=np.ones((8, 4), np.float32))[0]
    x, w = seen["x"], seen["w"]
    assert (x.shape, x.rank, x.dtype, x.is_constant, x.value) == (["batch", "seq", 8], 3, "float32", False, None)
    assert (w.shape, w.rank, w.is_constant) == ([8, 4], 2, True)
    np.testing.assert_array_equal(w.value, np.ones((8, 4)))


MATMUL = "(float[batch, seq, 8] x, float[8, 4] w) => (float[batch, seq, 4] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize(("x", "w", "ok"), [
    (("B", "S", "K"), ("K", "N"), True), ((..., "K"), ("K", 4), True), (("B", "B", "K"), ("K", "N"), False), ((..., "K"), ("N", "K"), False),
    (("K",), ("K", "N"), False), ((None, None, 8), (8, None), True), ((None, None, 9), (8, None), False), (("B", ..., "K"), (..., "K", "N"), True),
    (("B", "S", "K", ...), ("K", "N"), True), (("B", "S", "T", "K", ...), ("K", "N"), False),
])  # fmt: skip
def test_named_dimensions(x, w, ok):
    def pattern(op, a, b):
        return typed(a, *x) @ typed(b, *w)

    seen = fits(pattern, MATMUL)
    assert bool(seen) == ok
    if ok and "K" in x:
        assert seen[0]["K"] == 8


def test_named_dimensions_reach_the_check_as_what_they_are():
    seen = fits(lambda op, x, w: typed(x, "B", ..., "K") @ typed(w, "K", "N"), MATMUL)[0]
    assert (seen["B"], seen["K"], seen["N"]) == ("batch", 8, 4)


def test_dtypes_and_weights():
    assert fits(lambda op, x, w: typed(x, dtype="float32") @ w, MATMUL)
    assert not fits(lambda op, x, w: typed(x, dtype="float16") @ w, MATMUL)
    assert fits(lambda op, x, w: typed(x, dtype=("float16", "float32")) @ w, MATMUL)
    assert not fits(lambda op, x, w: x @ typed(w, constant=True), MATMUL)
    text = "(float[n, 8] x) => (float[n, 4] y) { y = MatMul(x, w) }"
    assert fits(lambda op, x, w: x @ typed(w, constant=True), text, w=np.ones((8, 4), np.float32))


def test_a_typed_operator():
    def pattern(op, x):
        return op.Exp(typed(op.Neg(x), "n", 4))

    assert fits(pattern, "(float[k, 4] x) => (float[k, 4] y) { a = Neg(x) y = Exp(a) }")[0]["n"] == "k"
    assert not fits(pattern, "(float[k, 5] x) => (float[k, 5] y) { a = Neg(x) y = Exp(a) }")


# --- several outputs, variadic inputs, nesting, domains -------------------------------------------------------------
def test_a_node_with_several_outputs():
    def pattern(op, x):
        a, b = op.Split(x, outputs=2, axis=1)
        return b * a

    two = "(float[4, 6] x) => (float[4, 3] y) { a, b = Split<axis=1, num_outputs=2>(x) y = Mul(a, b) }"
    assert fits(pattern, two)
    assert not fits(pattern, "(float[4, 6] x) => (float[4, 2] y) { a, b, c = Split<axis=1, num_outputs=3>(x) y = Mul(a, b) }")
    assert not fits(lambda op, x: (lambda a, b: a - b)(*op.Split(x, outputs=2, axis=1)), two.replace("Mul(a, b)", "Sub(b, a)"))


BOTH = "(float[4] x) => (float[4] s, float[4] c) { n = Neg(x) a = Abs(n) s = Sin(a) c = Cos(a) }"


@pytest.mark.parametrize("text", [BOTH, BOTH.replace("s = Sin(a) c = Cos(a)", "c = Cos(a) s = Sin(a)"), BOTH.replace("c = Cos(a)", "i = Identity(a) c = Cos(i)")])
def test_several_outputs(text):
    def pattern(op, x):
        a = op.Abs(op.Neg(x))
        return op.Sin(a), op.Cos(a)

    made = declare(pattern, lambda op, x: (op.Sin(op.Abs(x)), op.Cos(op.Abs(x))))
    result = rewrite.optimize(parse(text), rules=[made], only=["tried"])
    assert "Neg" not in nodes(result.model.proto)
    assert [o.name for o in result.model.proto.graph.output] == ["s", "c"]


def test_further_outputs_are_found_several_operators_away():
    def pattern(op, x, y):
        return op.Sin(x), op.Exp(op.Neg(op.Mul(x, y) * 2.0))

    text = "(float[4] x, float[4] z) => (float[4] s, float[4] e) { c = Constant<value_float=2.0>() s = Sin(x) m = Mul(c, z) k = Mul(m, x) n = Neg(k) e = Exp(n) }"
    assert len(fits(pattern, text)) == 1


def test_outputs_of_which_one_feeds_the_inputs_make_no_cycle():
    """Fusing both would compute `s` from `t`, which is computed from `s`."""

    def pattern(op, x, y):
        return op.Sin(x), op.Cos(x) + y

    made = declare(pattern, lambda op, x, y: (op.Sin(x), op.Add(y, op.Cos(x))))
    model = parse("(float[4] x) => (float[4] z) { s = Sin(x) t = Exp(s) c = Cos(x) z = Add(c, t) }")
    result = rewrite.optimize(model, rules=[made], only=["tried"])
    assert result.report.rules["tried"].applied == 0
    assert nodes(result.model.proto) == nodes(model)


def test_variadic_inputs():
    def pattern(op, x):
        return op.Concat(op.Neg(x), rest("others"), axis=0)

    text = "(float[4] x, float[4] z) => (float[16] y) { n = Neg(x) y = Concat<axis=0>(n, z, x, n) }"
    assert [o.name for o in fits(pattern, text)[0]["others"]] == ["z", "x", "n"]
    assert fits(pattern, "(float[4] x) => (float[4] y) { n = Neg(x) y = Concat<axis=0>(n) }")[0]["others"] == []


def test_variadic_inputs_in_a_replacement():
    made = declare(lambda op: op.Sum(rest("terms")), lambda op, terms: terms[0] if len(terms) == 1 else _sum(op, terms))
    result = rewrite.optimize(parse("(float[4] a, float[4] b, float[4] c) => (float[4] y) { y = Sum(a, b, c) }"), rules=[made], only=["tried"])
    assert nodes(result.model.proto) == ["Add", "Add"]


def _sum(op, terms):
    total = terms[0]
    for term in terms[1:]:
        total = op.Add(total, term)
    return total


def test_patterns_nest_as_functions_and_as_rules():
    inner = declare(lambda op, x: 0.5 * x * (1.0 + op.Erf(x / 2**0.5)), name="Inner")

    def pattern(op, x, w):
        return inner(op, x @ w)

    gelu = "r = Constant<value_float=1.4142135>() o = Constant<value_float=1.0>() h = Constant<value_float=0.5>() d = Div(m, r) e = Erf(d) s = Add(e, o) p = Mul(m, s) y = Mul(p, h)"
    assert fits(pattern, f"(float[4, 4] x, float[4, 4] w) => (float[4, 4] y) {{ m = MatMul(x, w) {gelu} }}")
    assert not fits(pattern, f"(float[4, 4] x) => (float[4, 4] y) {{ m = Neg(x) {gelu} }}")


def test_other_domains():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "com.acme" : 1]>
        g (float[4] x) => (float[4] y) { d = com.acme.Foo(x)  y = Neg(d) }""")
    assert fits(lambda op, x: op.Neg(op.domain("com.acme").Foo(x)), model)
    assert not fits(lambda op, x: op.Neg(op.Foo(x)), model)
    assert not fits(lambda op, x: op.Neg(op.domain("com.other").Foo(x)), model)


# --- If, Loop and Scan ----------------------------------------------------------------------------------------------
IF = """(float[n, 8] x, bool c) => (float[n, 8] y) {
    k = Neg(x)
    y = If (c) <
        then_branch = one () => (float[n, 8] a) { s = Sigmoid(k)  a = Mul(k, s) },
        else_branch = two () => (float[n, 8] b) { t = Sigmoid(x)  u = Mul(x, t)  b = Abs(u) }
    >
}"""


def inner_nodes(proto):
    return {a.g.name: [n.op_type for n in a.g.node] for n in proto.graph.node for a in n.attribute if a.HasField("g")}


def test_matches_inside_if_read_values_from_outside():
    result = rewrite.optimize(parse(IF))
    assert inner_nodes(result.model.proto) == {"one": ["Swish"], "two": ["Swish", "Abs"]}
    assert nodes(result.model.proto) == ["Neg", "If"]
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert inner_nodes(rewrite.unfuse(result.model.proto)) == {"one": ["Sigmoid", "Mul"], "two": ["Sigmoid", "Mul", "Abs"]}


def test_a_value_that_a_branch_reads_stays_computed():
    model = parse("""(float[n, 8] x, bool c) => (float[n, 8] y, float[n, 8] z) {
        s = Sigmoid(x)
        z = Mul(x, s)
        y = If (c) < then_branch = one () => (float[n, 8] a) { a = Neg(s) }, else_branch = two () => (float[n, 8] b) { b = Neg(x) } >
    }""")
    result = rewrite.optimize(model)
    assert sorted(nodes(result.model.proto)) == ["If", "Sigmoid", "rewrite.Swish"]


LOOP = """(float[4] x, int64 n) => (float[4] y) {
    true = Constant<value = bool {1}>()
    y = Loop (n, true, x) <
        body = step (int64 i, bool go, float[4] state) => (bool on, float[4] next) { on = Identity(go)  s = Sigmoid(state)  m = Mul(s, state)  next = Add(m, x) }
    >
}"""
SCAN = """(float[3, 4] x, float[4] z) => (float[4] last, float[3, 4] y) {
    last, y = Scan <num_scan_inputs = 1, body = step (float[4] state, float[4] e) => (float[4] next, float[4] out) { s = Sigmoid(e)  m = Mul(s, e)  next = Add(m, state)  out = Identity(next) }> (z, x)
}"""


@pytest.mark.parametrize("text", [LOOP, SCAN])
def test_matches_inside_loop_and_scan(text):
    result = rewrite.optimize(parse(text))
    (inner,) = inner_nodes(result.model.proto).values()
    assert "Swish" in inner
    assert "Sigmoid" not in inner
    onnx.checker.check_model(result.model.proto, full_check=True)


def test_an_initializer_of_a_branch_is_a_constant():
    inner = onnx.parser.parse_graph("then () => (float[n, 8] o) { m = Mul(x, half)  e = Div(x, root)  f = Erf(e)  s = Add(f, one)  o = Mul(m, s) }")
    for name, value in (("half", 0.5), ("root", 2**0.5), ("one", 1.0)):
        inner.initializer.append(onnx.numpy_helper.from_array(np.float32(value), name))
    model = parse("(float[n, 8] x, bool c) => (float[n, 8] y) { y = Identity(x) }", 20)
    other = onnx.parser.parse_graph("way () => (float[n, 8] q) { q = Neg(x) }")
    model.graph.node[0].CopyFrom(onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other))
    assert sorted(inner_nodes(rewrite.optimize(model).model.proto).items()) == [("then", ["Gelu"]), ("way", ["Neg"])]


def test_new_names_are_new_in_the_whole_model():
    """What a rule makes in a branch may not be called like a value outside, which the branch would then read instead."""
    made = declare(lambda op, x: op.Sigmoid(x), lambda op, x: op.Reciprocal(op.Add(op.Exp(op.Neg(x)), op.constant(1.0, "float32"))))
    model = parse(IF.replace("k = Neg(x)", "s_const = Neg(x)\n s_Neg = Exp(s_const)\n k = Abs(s_Neg)"))
    result = rewrite.optimize(model, rules=[made], only=["tried"])
    outer = {o for n in result.model.proto.graph.node for o in n.output}
    inner = {o for n in result.model.proto.graph.node for a in n.attribute for m in a.g.node for o in m.output}
    assert not outer & inner
    assert result.report.rules["tried"].applied == 2


# --- order, overlaps, fixpoint --------------------------------------------------------------------------------------
def to(name, pattern, operator, **options):
    return declare(pattern, lambda op, x: getattr(op, operator)(x), name=name, **options)


def test_higher_priority_first_and_the_loser_finds_its_nodes_gone():
    text = "(float[4] x) => (float[4] y) { a = Neg(x) b = Neg(a) y = Neg(b) }"
    low = declare(lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.Identity(x), name="Low", priority=1)
    high = declare(lambda op, x: op.Neg(op.Neg(op.Neg(x))), lambda op, x: op.Neg(x), name="High", priority=2)
    result = rewrite.optimize(parse(text), rules=[low, high], only=["low", "high"])
    assert (result.report.rules["high"].applied, result.report.rules["low"].applied) == (1, 0)


def test_equal_priority_goes_by_place_then_by_declaration():
    text = "(float[4] x) => (float[4] y) { a = Neg(x) b = Neg(a) y = Neg(b) }"
    first = declare(lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.Identity(x), name="First", priority=1)
    second = declare(lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.Abs(op.Abs(x)), name="Second", priority=1)
    result = rewrite.optimize(parse(text), rules=[first, second], only=["first", "second"])
    assert [(s.rule, s.outputs) for s in result.report.sites] == [("first", ["b"])]


def test_tiers_run_in_order():
    fuse = declare(lambda op, x: op.Softsign(x), lambda op, x: op.Div(x, op.Add(op.Abs(x), op.constant(1.0, "float32"))), name="Fuse", tier="fuse", priority=99)
    lift = declare(lambda op, x: op.Div(x, 1.0 + op.Abs(x)), lambda op, x: op.Softsign(x), name="Lift", tier="lift", priority=0)
    text = "(float[4] x) => (float[4] y) { a = Abs(x) o = Constant<value_float=1.0>() s = Add(a, o) y = Div(x, s) }"
    result = rewrite.optimize(parse(text), rules=[fuse, lift], only=["fuse", "lift"])
    assert [s.rule for s in result.report.sites] == ["lift", "fuse"]


def test_a_refusal_leaves_the_site_to_others():
    picky = declare(lambda op, x: op.Neg(x), lambda op, x: op.Abs(x), check=lambda x: "never", name="Picky", priority=9)
    other = declare(lambda op, x: op.Exp(op.Neg(x)), lambda op, x: op.Reciprocal(op.Exp(x)), name="Other", priority=1)
    result = rewrite.optimize(parse("(float[4] x) => (float[4] y) { n = Neg(x) y = Exp(n) }"), rules=[picky, other], only=["picky", "other"])
    assert result.report.rules["picky"].refusals == 1
    assert nodes(result.model.proto) == ["Exp", "Reciprocal"]


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_fixpoint_reaches_far_above_a_change(steps):
    """A rule that failed high above is tried again when one of lower priority changes what it needs, `steps` below."""
    middle = "".join(f"m{i} = {'Sin' if i % 2 else 'Cos'}(m{i - 1}) " for i in range(1, steps))

    def tall(op, x):
        value = op.Softsign(x)
        for i in range(1, steps):
            value = (op.Sin if i % 2 else op.Cos)(value)
        return op.Exp(value)

    def replace(op, x):
        value = op.Softsign(x)
        for i in range(1, steps):
            value = (op.Sin if i % 2 else op.Cos)(value)
        return op.Reciprocal(op.Exp(op.Neg(value)))

    above = declare(tall, replace, name="Above", priority=9)
    below = declare(lambda op, x: op.Div(x, 1.0 + op.Abs(x)), lambda op, x: op.Softsign(x), name="Below", priority=1)
    text = f"(float[4] x) => (float[4] y) {{ a = Abs(x) o = Constant<value_float=1.0>() s = Add(a, o) m0 = Div(x, s) {middle} y = Exp(m{steps - 1}) }}"
    result = rewrite.optimize(parse(text), rules=[above, below], only=["above", "below"])
    assert [s.rule for s in result.report.sites] == ["below", "above"]


def test_a_site_held_by_another_reader_is_tried_again_when_that_is_gone(rng):
    wide = declare(lambda op, x, w: op.Exp(x @ w), lambda op, x, w: op.Reciprocal(op.Exp(op.Neg(op.MatMul(x, w)))), name="Wide", priority=9)
    drop = declare(lambda op, c, a, b: op.Where(c, a, b), lambda op, b: b, lambda c: None if c.value is not None and not c.value.any() else "not always false", name="Drop", priority=1)
    text = "(float[4, 4] x) => (float[4, 4] y, float[4, 4] z) {{ m = MatMul(x, w) never = Constant<value=bool {{{}}}>() y = Exp(m) z = Where(never, m, x) }}"
    w = rng.standard_normal((4, 4)).astype(np.float32)
    result = rewrite.optimize(parse(text.format(0), w=w), rules=[wide, drop], only=["wide", "drop"])
    assert [s.rule for s in result.report.sites] == ["drop", "wide"]
    result = rewrite.optimize(parse(text.format(1), w=w), rules=[wide, drop], only=["wide", "drop"])
    assert result.report.sites == []
    assert any("needed elsewhere" in m.reason for m in result.report.near_misses)


def test_a_long_chain_is_folded_to_the_end():
    made = declare(lambda op, x: (x + scalar("a")) + scalar("b"), lambda op, x, a, b: op.Add(x, op.constant(a + b, "float32")))
    text = "c = Constant<value_float=1.0>() t0 = Add(x, c) " + " ".join(f"t{i} = Add(t{i - 1}, c)" for i in range(1, 60)) + " y = Add(t59, c)"
    result = rewrite.optimize(parse(f"(float[4] x) => (float[4] y) {{ {text} }}"), rules=[made], only=["tried"])
    assert nodes(result.model.proto) == ["Add"]
    assert result.report.rules["tried"].applied == 60


# --- registration ---------------------------------------------------------------------------------------------------
SWISH = "(float[n, 8] x) => (float[n, 8] y) { y = Softsign(x) }"
FILE = """
import rewrite

@rewrite.rule(tier="lift")
class FromElsewhere:
    '''softsign, spelled out.'''
    def pattern(op, x):
        return op.Softsign(x)
    def replace(op, x):
        return op.Div(x, op.Add(op.Abs(x), op.constant(1.0, "float32")))
"""


def test_rules_of_a_file_act_where_it_is_given_and_nowhere_else(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    assert rewrite.optimize(parse(SWISH), rules=[path]).report.rules["from_elsewhere"].applied == 1
    assert rewrite.optimize(parse(SWISH), rules=[str(path)]).report.rules["from_elsewhere"].applied == 1
    assert "from_elsewhere" not in rewrite.optimize(parse(SWISH)).report.rules
    assert "from_elsewhere" not in {r.name for r in library().rules}
    assert next(r for r in library([path]).rules if r.name == "from_elsewhere").source == str(path)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    library([path])
    path.write_text(FILE.replace("FromElsewhere", "Renamed"))
    assert {"renamed"} <= {r.name for r in library([path]).rules}
    assert "from_elsewhere" not in {r.name for r in library([path]).rules}


def test_rule_objects_and_modules_act_where_they_are_given(tmp_path, monkeypatch):
    (tmp_path / "acme_rules_module.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import acme_rules_module

    try:
        given = rewrite.optimize(parse(SWISH), rules=[acme_rules_module])
        assert given.report.rules["from_elsewhere"].applied == 1
        assert rewrite.optimize(parse(SWISH), rules=[acme_rules_module.FromElsewhere]).report.rules["from_elsewhere"].applied == 1
        assert "from_elsewhere" not in rewrite.optimize(parse(SWISH), rules=[]).report.rules
        assert "from_elsewhere" in rewrite.optimize(parse(SWISH)).report.rules  # declared by this program
    finally:
        from rewrite import registry

        registry._program.rules.pop("from_elsewhere")


def program(code, **environment):
    import os

    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_decorated_rule_acts_in_its_program():
    assert program(FILE + f"""
import onnx
model = onnx.helper.make_model(onnx.parser.parse_graph("g " + {SWISH!r}), opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
print(rewrite.optimize(model).report.rules["from_elsewhere"].applied, "from_elsewhere" in rewrite.optimize(model, rules=[]).report.rules)
""") == "1 False"


@pytest.fixture
def distribution(tmp_path):
    """A folder with an installed package that declares a rule through the entry point group `rewrite.rules`."""
    site = tmp_path / "site"
    (site / "acme_fusions").mkdir(parents=True)
    (site / "acme_fusions" / "__init__.py").write_text("from acme_fusions import rules\n")
    (site / "acme_fusions" / "rules.py").write_text(FILE)
    info = site / "acme_fusions-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-fusions\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rewrite.rules]\nacme = acme_fusions\n")
    return site


LISTED = "import sys; sys.path.insert(0, {site!r}); {before}from rewrite.registry import library; print([r.source for r in library([]).rules if r.name == 'from_elsewhere'])"


@pytest.mark.parametrize("before", ["", "import acme_fusions; "])
def test_rules_of_an_installed_package(distribution, before):
    assert program(LISTED.format(site=str(distribution), before=before)) == "['acme_fusions.rules']"


def test_a_package_whose_rules_fail_is_named(distribution):
    (distribution / "acme_fusions" / "rules.py").write_text("1 / 0\n")
    code = f"import sys; sys.path.insert(0, {str(distribution)!r}); from rewrite.cli import main; main(['list'], standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "rules of acme-fusions (entry point acme = acme_fusions): rules.py:1: ZeroDivisionError" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# --- random graphs --------------------------------------------------------------------------------------------------
UNARY = ["Neg", "Abs", "Exp", "Sigmoid", "Tanh", "Erf", "Sqrt", "Reciprocal", "Relu", "Identity", "Softmax", "Cast<to=1>", "Transpose<perm=[1,0]>"]
BINARY = ["Add", "Mul", "Sub", "Div", "MatMul", "Max"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(UNARY + BINARY), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=14))
def test_random_graphs_stay_right(steps):
    """No rule crashes on a random graph, and what comes out is a valid model that computes the same."""
    values, lines = ["x", "z", "w"], []
    for i, (op, a, b) in enumerate(steps):
        operands = [values[a % len(values)]] + ([values[b % len(values)]] if op in BINARY else [])
        lines.append(f"v{i} = {op}({', '.join(operands)})")
        values.append(f"v{i}")
    model = parse(f"(float[4, 4] x, float[4, 4] z) => (float[4, 4] v{len(steps) - 1}) {{ {' '.join(lines)} }}", 20, w=np.eye(4, dtype=np.float32) / 2)
    result = rewrite.optimize(model, rules=[], explain=True, tolerance=1e-3)
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert [o.name for o in result.model.proto.graph.output] == [o.name for o in model.graph.output]


# --- what a replacement is made of ------------------------------------------------------------------------------------
def test_operators_of_another_domain_in_a_replacement():
    """As in a pattern: `op.domain("com.acme")`; what ONNX Runtime does not know cannot be verified."""
    made = declare(lambda op, x: op.Relu(x), lambda op, x: op.domain("com.acme").Rectify(x, [1, 2], slope=0.5))
    proto = rewrite.optimize(parse("(float[4] x) => (float[4] y) { y = Relu(x) }"), rules=[made], only=["tried"], verify=False).model.proto
    assert nodes(proto) == ["com.acme.Rectify"]
    assert [o.version for o in proto.opset_import if o.domain == "com.acme"] == [1]
    assert onnx.numpy_helper.to_array(proto.graph.initializer[0]).tolist() == [1, 2]


def test_arrays_and_the_opset_in_a_replacement():
    def replace(op, x):
        return op.Mul(x, np.full(3, 2.0, np.float32)) if op.opset < 20 else op.Add(x, x)

    made = declare(lambda op, x: x * 2.0, replace)
    for opset, expected in ((18, ["Mul"]), (20, ["Add"])):
        once = parse("(float[4, 3] x) => (float[4, 3] y) { y = Mul(two, x) }", opset, two=np.float32(2))
        result = rewrite.optimize(once, rules=[made], only=["tried"])
        assert nodes(result.model.proto) == expected
        assert result.report.model_error == 0.0


@pytest.mark.parametrize(
    ("replace", "told"),
    [
        (lambda op, x: op.Mul(x, 2.0), "operand 2.0: a float constant needs its type; write op.constant(value, dtype)"),
        (lambda op, x: [op.Neg(x), op.Abs(x)], "return the value of op.Name(...), or a tuple of such values"),
    ],
)
def test_a_replacement_that_is_none_is_named(replace, told):
    made = declare(lambda op, x: op.Relu(x), replace)
    with pytest.raises(rewrite.RewriteError, match="tried") as error:
        rewrite.optimize(parse("(float[4] x) => (float[4] y) { y = Relu(x) }"), rules=[made], only=["tried"])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("replace", "told"), [
    (lambda op, x: op.Neg(op.Gelu(x)), "a replacement is either one plugin node or standard nodes only"),
    (lambda op, x: op.Gelu(x, made_up=3), "plugin Gelu takes ['x'] and attributes ['approximate'], not ['made_up']"),
    (lambda op, x: op.Gelu(x, x), "plugin Gelu takes ['x'] and attributes ['approximate'], not 2"),
])  # fmt: skip
def test_a_plugin_node_that_cannot_be_is_rejected_at_its_site(replace, told):
    result = rewrite.optimize(parse("(float[4] x) => (float[4] y) { y = Relu(x) }"), rules=[declare(lambda op, x: op.Relu(x), replace, tier="fuse")], only=["tried"])
    (miss,) = result.report.rejected
    assert told in miss.reason
    assert nodes(result.model.proto) == ["Relu"]


# --- what a pattern is made of ----------------------------------------------------------------------------------------
def test_a_number_before_a_minus():
    text = "(float[4] x) => (float[4] y) {{ y = Sub({}) }}"
    assert len(fits(lambda op, x: 1.0 - x, parse(text.format("one, x"), one=np.float32(1)))) == 1
    assert fits(lambda op, x: 1.0 - x, parse(text.format("x, one"), one=np.float32(1))) == []


@pytest.mark.parametrize(("pattern", "told"), [
    (lambda op, x: op.Relu("x"), "a pattern is made of values, numbers, lists of integers or None, not 'x'"),
    (lambda op, x: op.Relu(typed(x, ..., 3, ...)), "'...' may stand once in a shape"),
    (lambda op, x: op._Relu(x), "_Relu"),
])  # fmt: skip
def test_a_pattern_that_is_none_is_told_when_it_is_declared(pattern, told):
    with pytest.raises(rewrite.RewriteError, match="its pattern cannot be traced") as error:
        declare(pattern)
    assert told in str(error.value)


def test_a_rule_that_finds_its_matches_cannot_stand_in_a_pattern():
    mask = next(r for r in library([]).rules if r.name == "attention_mask")
    with pytest.raises(rewrite.RewriteError, match="rule 'attention_mask' finds its matches itself; it has no pattern that could stand in another"):
        declare(lambda op, x: op.Relu(mask(op, x)))


@pytest.mark.parametrize(("parts", "told"), [
    ({"inputs": ("x",), "tolerance": {}}, "it has no 'reference'; add one"),
    ({"inputs": ("x",), "tolerance": {}, "reference": lambda x, y: x}, "its reference cannot be called with inputs ['x']"),
])  # fmt: skip
def test_a_plugin_that_lacks_something_is_refused(parts, told):
    with pytest.raises(rewrite.RewriteError, match="plugin Lacking") as error:
        rewrite.plugin(type("Lacking", (), parts))
    assert told in str(error.value)


def test_a_plugin_may_not_have_a_name_with_an_underscore_nor_a_built_in_one():
    from rewrite import registry

    parts = {"inputs": ("x",), "tolerance": {}, "reference": lambda x: x}
    with pytest.raises(rewrite.RewriteError, match="the name may not contain '_'"):
        rewrite.plugin(type("My_Gelu", (), parts))
    try:
        rewrite.plugin(type("Gelu", (), parts))
        with pytest.raises(rewrite.RewriteError, match=r"plugin Gelu of .* has the name of a built-in one; rename the class"):
            library()
    finally:
        registry._program.plugins.pop("Gelu")


def test_a_node_of_very_many_inputs_is_not_looked_through_at_each_change(monkeypatch):
    """Each of them is fused: a look at all for each would take quadratic time."""
    from rewrite.worklist import WIDE, Worklist

    looks, choose = [], Worklist._choose
    monkeypatch.setattr(Worklist, "_choose", lambda self, around: looks.append(len(around)) or choose(self, around))
    count = 3 * WIDE
    body = " ".join(f"m{i} = MatMul(x, w) b{i} = Add(m{i}, c{i}) r{i} = Relu(b{i})" for i in range(count))
    model = parse(f"(float[n, 4] x) => (float[n, k] y) {{ {body} y = Concat<axis = 1>({', '.join(f'r{i}' for i in range(count))}) }}", w=np.eye(4, dtype=np.float32),
                  **{f"c{i}": np.full(4, i, np.float32) for i in range(count)})  # fmt: skip
    assert len(rewrite.optimize(model, verify=False).report.sites) == count
    assert max(looks) <= WIDE


def test_a_node_of_very_many_inputs_is_searched_once_whatever_is_replaced_in_it():
    """A value read twice, one that is replaced again, and one that another becomes are found, too."""
    from rewrite.graph import WIDE, Graph
    from rewrite.model import load, open_graph
    from rewrite.nodes import Variable

    class Told(list):
        searches = 0

        def __iter__(self):
            Told.searches += 1
            return super().__iter__()

    count = 3 * WIDE
    body = " ".join(f"r{i} = Relu(x)" for i in range(count))
    source = load(parse(f"(float[n, 4] x) => (float[n, 4] y) {{ {body} y = Sum({', '.join(f'r{i}' for i in (0, *range(count)))}) }}"))
    graph = Graph(open_graph(source).graph, source.opset)
    node = next(n for n in graph.nodes if n.op == "Sum")
    node.inputs = Told(node.inputs)
    old, new = list(node.inputs)[1:], [Variable(f"n{i}") for i in range(count)]
    Told.searches = 0
    for a, b in zip(old, new, strict=True):
        assert set(graph.replace_uses(a, b)) == {node}
    graph.replace_uses(new[0], new[5])
    graph.replace_uses(new[5], old[0])
    assert Told.searches <= 1
    assert [t.name for t in node.inputs] == [{0: "r0", 5: "r0"}.get(i, f"n{i}") for i in (0, *range(count))]
    assert (len(old[0].outputs), [len(t.outputs) for t in new[:6]]) == (3, [0, 1, 1, 1, 1, 0])
