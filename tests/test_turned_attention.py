"""Rotary embedding and norms of heads join PagedAttention: where, where not and why, and that it is checked."""

from __future__ import annotations

import re
import types

import decoder as d
import numpy as np
import onnx
import pytest
from conftest import nodes
from decoder import decoder

import rewrite
from rewrite.model import base_name
from rewrite.plugins.rotary import Rotary
from rewrite.verify_generator import check_attentions

PLACED = "int64[batch, sequence] input_ids, int64[batch, sequence] position_ids"
ANGLES = "w = Gather(places, position_ids) cs, sn = Split<axis = 2, num_outputs = 2>(w) c = Unsqueeze(cs, second) s1 = Unsqueeze(sn, second)"
GAIN = "gain = Constant<value = float[8] {0.5, 1.5, 0.7, 1.0, 1.1, 0.9, 1.2, 0.8}>()"
PAGED = "a = Attention<is_causal = 1, scale = 0.4>(qt, kt, v)"


def halves(x, source, cos="c", sin="s1"):
    return f"""{x}1, {x}2 = Split<axis = 3, num_outputs = 2>({source}) {x}n = Neg({x}2) {x}h = Concat<axis = 3>({x}n, {x}1)
        {x}c = Mul({source}, {cos}) {x}s = Mul({x}h, {sin}) {x}t = Add({x}c, {x}s)"""


def pairs(x, source):
    return f"""p{x} = Constant<value = int64[5] {{0, 0, 0, 4, 2}}>() f{x} = Constant<value = int64[4] {{0, 0, 0, 8}}>() {x}p = Reshape({source}, p{x})
        {x}e = Gather<axis = -1>({x}p, zero) {x}o = Gather<axis = -1>({x}p, one) {x}n = Neg({x}o) {x}nu = Unsqueeze({x}n, last) {x}eu = Unsqueeze({x}e, last)
        {x}j = Concat<axis = -1>({x}nu, {x}eu) {x}h = Reshape({x}j, f{x}) {x}c = Mul({source}, c) {x}s = Mul({x}h, s1) {x}t = Add({x}c, {x}s)"""


def made(attention, **parts):
    return decoder(inputs=PLACED, attention=f"{ANGLES} {attention}", **parts)


FORMS = {
    "halves": f"{halves('q', 'q')} {halves('k', 'k')} {PAGED}",
    "pairs": f"{pairs('q', 'q')} {pairs('k', 'k')} {PAGED}",
    "norm and halves": f"{GAIN} u = RMSNormalization<axis = -1>(q, gain) y = RMSNormalization<axis = -1>(k, gain) {halves('q', 'u')} {halves('k', 'y')} {PAGED}",
    "window": f"{halves('q', 'q')} {halves('k', 'k')} {d.WINDOW.replace('(q, k, v, seen)', '(qt, kt, v, seen)')}",
}


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_before_joins(form):
    result = rewrite.optimize(made(FORMS[form]), generate=True)
    assert result.report.model_error < 1e-5
    (site,) = [s for s in result.report.sites if s.rule == "turned_attention"]
    assert site.note == ("rotary + norm" if "norm" in form else "rotary")
    assert not {"rewrite.Rotary", "RMSNormalization", "Neg"} & set(nodes(result.model.proto))
    (node,) = [n for n in result.model.proto.graph.node if base_name(n) == "PagedAttention"]
    assert len(node.input) == (13 if "norm" in form else 11)
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert given["layer"] == 0
    assert given.get("interleaved", 0) == (form == "pairs")
    assert [f.name for f in result.model.proto.functions if f.name.startswith("PagedAttention")] == [node.op_type]
    onnx.checker.check_model(result.model.proto, full_check=True)


def test_a_norm_before_the_transpose_joins_as_well():
    """Qwen3: each head is normalized while heads are the last axis but one."""
    text = f"{GAIN} u4 = RMSNormalization<axis = -1>(q4, gain) y4 = RMSNormalization<axis = 3>(k4, gain) u = Transpose<perm = [0, 2, 1, 3]>(u4) y = Transpose<perm = [0, 2, 1, 3]>(y4)"
    result = rewrite.optimize(made(f"{text} {halves('q', 'u')} {halves('k', 'y')} {PAGED}"), generate=True)
    assert result.report.model_error < 1e-5
    assert [s.note for s in result.report.sites if s.rule == "turned_attention"] == ["rotary + norm"]
    assert "RMSNormalization" not in nodes(result.model.proto)


FLAT = "kk = Transpose<perm = [0, 2, 1, 3]>(kt) wide = Constant<value = int64[3] {0, 0, 16}>() kw = Reshape(kk, wide) r = Add(s, kw)"
APART = {
    "queries alone": ({"attention": f"{halves('q', 'q')} kt = Identity(k) {PAGED}"}, "its keys are not turned as its queries are"),
    "keys alone": ({"attention": f"{halves('k', 'k')} qt = Identity(q) {PAGED}"}, "its queries are not turned as its keys are"),
    "other angles": ({"attention": f"{halves('q', 'q')} {halves('k', 'k', 's1', 'c')} {PAGED}"}, "queries are turned by 'c' and 's1', keys by 's1' and 'c'"),
    "other forms": ({"attention": f"{halves('q', 'q')} {pairs('k', 'k')} {PAGED}"}, r"in different ways: \(interleaved, size\) \(0, 0\) and \(1, 0\)"),
    "read elsewhere": ({"attention": f"{halves('q', 'q')} {halves('k', 'k')} {PAGED}", "after": FLAT}, "'.*', turned, is read by other nodes, too"),
    "the same angles everywhere": (
        {"attention": f"one8 = Constant<value = float[8] {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}}>() {halves('q', 'q', 'one8', 'one8')} {halves('k', 'k', 'one8', 'one8')} {PAGED}"},
        r"the angles '.*' have shape \[8\] *; expected \[1, 1, tokens, size\]",
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_stays_apart_and_why(name):
    parts, reason = APART[name]
    result = rewrite.optimize(made(**parts), generate=True)
    assert result.report.model_error < 1e-5
    assert "rewrite.Rotary" in {n.split("_")[0] for n in nodes(result.model.proto)}
    (miss,) = [m for m in result.report.near_misses if m.rule == "turned_attention"]
    assert miss.part == "check"
    assert re.search(reason, miss.reason), miss.reason


def test_norms_of_queries_alone_stay_apart():
    """Rotary joins; a norm that keys do not have does not."""
    result = rewrite.optimize(made(f"{GAIN} u = RMSNormalization<axis = -1>(q, gain) {halves('q', 'u')} {halves('k', 'k')} {PAGED}"), generate=True)
    assert result.report.model_error < 1e-5
    assert [s.note for s in result.report.sites if s.rule == "turned_attention"] == ["rotary"]
    assert "RMSNormalization" in nodes(result.model.proto)


@pytest.mark.parametrize("heads", [d.HEADS, d.KEY_HEADS])
def test_a_site_at_which_queries_or_keys_are_not_turned_is_rejected(heads, monkeypatch):
    def wrong(x, *angles, **attributes):
        return x if x.shape[1] == heads else Rotary.reference(x, *angles, **attributes)

    monkeypatch.setattr("rewrite.plugins.paged_attention.Rotary", types.SimpleNamespace(reference=wrong))
    result = rewrite.optimize(made(FORMS["halves"]), generate=True)
    (miss,) = [m for m in result.report.near_misses if m.rule == "turned_attention"]
    assert miss.part == "replacement"
    assert "differs from the subgraph it would replace" in miss.reason
    assert "rewrite.Rotary" in nodes(result.model.proto)


@pytest.mark.parametrize("form", ["halves", "norm and halves"])
def test_ranks_turn_their_own_heads(form):
    result = rewrite.optimize(made(FORMS[form]), generate=True, tensor_parallel=2)
    assert result.report.model_error < 1e-5
    assert [s.rule for s in result.report.sites if s.rule == "turned_attention"]


def test_the_function_is_compared_with_the_plugin(monkeypatch):
    model = rewrite.optimize(made(FORMS["norm and halves"]), generate=True).model
    plugin = rewrite.registry.library().plugins["PagedAttention"]
    assert check_attentions(model.proto, plugin) < 1e-4
    monkeypatch.setattr("rewrite.plugins.paged_attention.Rotary", types.SimpleNamespace(reference=lambda x, *angles, **attributes: np.asarray(x)))
    with pytest.raises(rewrite.errors.CheckFailed, match=r"plugin PagedAttention at '.*' differs from the function it stands for"):
        check_attentions(model.proto, plugin)
