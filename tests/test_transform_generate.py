"""What becomes a generator, what does not and why: small decoders in ONNX text, before and after."""

from __future__ import annotations

import json

import decoder as d
import numpy as np
import onnx
import pytest
from conftest import nodes
from decoder import decoder

import rewrite
from rewrite.errors import CheckFailed, RewriteError
from rewrite.functions import FunctionTable
from rewrite.registry import library
from rewrite.verify_generator import check_attentions, check_generator, generator_of

MASKED = "int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask"
PLACED = "int64[batch, sequence] input_ids, int64[batch, sequence] position_ids"

PADDING = """mid = Constant<value = int64[2] {1, 2}>() kept = Cast<to = 9>(attention_mask) kept4 = Unsqueeze(kept, mid)
    sizes = Shape(attention_mask) size0 = Gather(sizes, first) size1 = Gather(sizes, second) room = Concat<axis = 0>(size0, second, size1, size1)
    seen = Expand(kept4, room) a = Attention<scale = 0.4>(q, k, v, seen)"""


def generator(**parts: str) -> rewrite.Model:
    return rewrite.optimize(decoder(**parts), generate=True).model


def test_before_and_after():
    model = generator(after="n = Tanh(s) r = Mul(n, ones)")
    assert nodes(model.proto) == [
        "Gather", "Identity", "Identity", "rewrite.MatMulAct_2", "rewrite.MatMulAct_2", "rewrite.MatMulAct_2", "Reshape", "Reshape", "Reshape",
        "Transpose", "Transpose", "Transpose", "rewrite.PagedAttention", "Transpose", "Reshape", "rewrite.MatMulAct", "Gather", "Tanh", "Mul", "rewrite.MatMulAct_2", "Reshape",
    ]  # fmt: skip
    rows = next(n for n in model.proto.graph.node if "logit_rows" in n.input)
    assert rows.input[0] == "s"  # right after the residual: norm and head see no other row
    assert {i.name: [x.dim_value or x.dim_param for x in i.type.tensor_type.shape.dim] for i in model.proto.graph.input} == {
        "input_ids": [1, "tokens"], "position_ids": [1, "tokens"], "slots": ["tokens"], "block_tables": ["sequences", "table"], "query_starts": ["starts"],
        "context_lengths": ["sequences"], "logit_rows": ["rows"], "key_cache_0": ["blocks", 16, 2, 8], "value_cache_0": ["blocks", 16, 2, 8],
    }  # fmt: skip
    assert [o.name for o in model.proto.graph.output] == ["logits", "keys_0", "values_0"]
    onnx.checker.check_model(model.proto, full_check=True)
    paged = next(n for n in model.proto.graph.node if n.op_type == "PagedAttention")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in paged.attribute}
    assert attributes == {"heads": 4, "kv_heads": 2, "size": 8, "layer": 0, "scale": pytest.approx(0.4)}


POSITIONS = {
    "none": {},
    "an arange of the sequence": {"positions": d.BY_RANGE},
    "the first rows of a table": {"positions": d.BY_SLICE},
    "an input": {"positions": d.BY_INPUT, "inputs": PLACED},
    "the sum of the padding mask": {"positions": d.BY_MASK, "inputs": MASKED},
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_come_from_the_runtime(name):
    source = decoder(**POSITIONS[name])
    result = rewrite.optimize(source, generate=True)
    assert result.report.model_error < 1e-5
    found = generator_of(result.model.proto)
    assert found["positions"] == (None if name in ("none", "the sum of the padding mask") else d.POSITIONS)
    assert not {"Range", "CumSum", "Slice"} & set(nodes(result.model.proto))
    used = any("position_ids" in n.input for n in result.model.proto.graph.node)
    assert used == (name != "none")


def test_a_value_that_others_read_too_keeps_all_its_rows():
    """The head reads the embeddings, which the attention reads as well: rows are picked for the head alone."""
    result = rewrite.optimize(decoder(head="g = Mul(s, zeros) m = MatMul(g, head) u = MatMul(e, head) logits = Add(m, u)"), generate=True)
    assert result.report.model_error < 1e-5
    picked = [n.input[0] for n in result.model.proto.graph.node if "logit_rows" in n.input]
    assert len(picked) == 1
    assert picked[0] not in ("s", "e")


def test_the_block_size_is_the_users():
    model = rewrite.optimize(decoder(positions=d.BY_RANGE), generate=True, block_size=4).model
    assert generator_of(model.proto)["block_size"] == 4
    assert check_generator(rewrite.load(decoder(positions=d.BY_RANGE)), model) < 1e-5


def test_an_input_of_another_name_and_type():
    made = decoder(tokens="words", inputs="int32[n, m] words", outputs=f"float[n, m, {d.VOCABULARY}] y", head="y = MatMul(r, head)")
    result = rewrite.optimize(made, generate=True)
    assert result.report.model_error < 1e-5
    assert next(i for i in result.model.proto.graph.input if i.name == "input_ids").type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_logits_in_float16():
    made = decoder(head="wide = MatMul(r, head) logits = Cast<to = 10>(wide)", outputs=f"float16[batch, sequence, {d.VOCABULARY}] logits")
    result = rewrite.optimize(made, generate=True, tolerance=1e-2)
    assert result.model.proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


# What mixes tokens, or depends on how many there are: the node and the reason.
MIXED = {
    "a mean over the tokens": ({"before": "mean = ReduceMean<keepdims = 1>(x, second) h = Sub(x, mean)"}, r"ReduceMean '.*' is not computed token by token: it reduces over the tokens"),
    "a softmax over the tokens": ({"before": "h = Softmax<axis = 1>(x)"}, "Softmax '.*': it is along axis 1, that of the tokens"),
    "a norm over the tokens": ({"before": "h = InstanceNormalization(x, ones, ones)"}, "InstanceNormalization '.*': nothing is known of this operator"),
    "a running sum": ({"before": "h = CumSum(x, one)"}, "CumSum '.*': nothing is known of this operator"),
    "the token before": ({"before": "pads = Constant<value = int64[6] {0, 1, 0, 0, 0, 0}>() more = Pad(x, pads) h = Slice(more, first, last, second)"}, "Pad '.*': nothing is known of this operator"),
    "tokens in reverse": ({"after": "low = Constant<value = int64[1] {-9999}>() w = Slice(s, last, low, second, last) r = Add(s, w)"}, "Slice '.*': it cuts along the axis of the tokens"),
    "tokens times tokens": ({"after": "turned = Transpose<perm = [0, 2, 1]>(s) g = MatMul(turned, s) r = MatMul(s, g)"}, "MatMul '.*': it multiplies tokens with tokens"),
    "the number of tokens": ({"before": f"{d.COUNT} fc = Cast<to = 1>(count) h = Mul(x, fc)"}, "Mul '.*': numbers depend on how many tokens there are"),
    "the largest over the tokens": ({"after": "most = ReduceMax<keepdims = 1>(s, second) r = Sub(s, most)"}, "ReduceMax '.*': it reduces over the tokens"),
    "tokens repeated": ({"before": "times = Constant<value = int64[3] {1, 2, 1}>() h = Tile(x, times)"}, "Tile '.*': it repeats the tokens"),
    "tokens picked by tokens": ({"after": "ix = Cast<to = 7>(s) w = GatherElements<axis = 1>(s, ix) r = Add(s, w)"}, "GatherElements '.*': it picks some of the tokens"),
    "one of the tokens": ({"after": "l = Gather<axis = 1>(s, first) r = Add(s, l)"}, "Gather '.*': it picks some of the tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_tokens_is_refused_by_name(name):
    parts, reason = MIXED[name]
    pattern = reason.replace(" '.*': ", " '.*' is not computed token by token: ")
    with pytest.raises(RewriteError, match=pattern) as caught:
        generator(**parts)
    assert "\n" not in str(caught.value)


# Near the above, and right: computed token by token.
TOKENWISE = {
    "a mean over the features": {"before": "mean = ReduceMean<keepdims = 1>(x, third) h = Sub(x, mean)"},
    "a softmax over the features": {"before": "h = Softmax<axis = -1>(x)"},
    "a slice of the features": {
        "before": "half = Constant<value = int64[1] {8}>() all = Constant<value = int64[1] {16}>() low = Slice(x, first, half, third) high = Slice(x, half, all, third) h = Concat<axis = 2>(high, low)"
    },
    "tokens flattened": {"before": "fs = Constant<value = int64[2] {-1, 16}>() two_d = Reshape(x, fs) u = Tanh(two_d) sh = Shape(x) h = Reshape(u, sh)"},
    "features repeated": {"before": "times = Constant<value = int64[3] {1, 1, 2}>() more = Tile(x, times) half = Constant<value = int64[1] {16}>() h = Slice(more, first, half, third)"},
    "features picked by features": {"before": "z = Sub(x, x) ix = Cast<to = 7>(z) w = GatherElements<axis = 2>(x, ix) h = Add(x, w)"},
    "a reduction without keepdims": {"before": "m = ReduceSum<keepdims = 0>(x, third) n = Unsqueeze(m, third) h = Add(x, n)"},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENWISE)
def test_what_is_computed_token_by_token_passes(name):
    assert rewrite.optimize(decoder(**TOKENWISE[name]), generate=True).report.model_error < 1e-5


REFUSED = {
    "attention to all": ({"attention": "a = Attention<scale = 0.4>(q, k, v)"}, "FusedAttention '.*': it has no mask, so every token sees all"),
    "a padding mask alone": (
        {"inputs": MASKED, "attention": PADDING},
        "FusedAttention '.*': its mask '.*' is not causal; only causal attention can use a cache",
    ),
    "a mask from outside": ({"inputs": "int64[batch, sequence] input_ids, float[1, 1, sequence, sequence] mask", "attention": "a = Attention<scale = 0.4>(q, k, v, mask)"}, "input 'mask' is float32"),
    "no attention": ({"attention": "z = Identity(k) z2 = Identity(v) a = Tanh(q)"}, "it has no attention that the rules fuse"),
    "two outputs": ({"outputs": f"float[batch, sequence, {d.VOCABULARY}] logits, float[batch, sequence, {d.WIDTH}] s"}, "its outputs are logits, s; a generator needs the logits alone"),
    "a fixed sequence": ({"inputs": "int64[batch, 8] input_ids", "outputs": f"float[batch, 8, {d.VOCABULARY}] logits"}, "input 'input_ids' has a fixed sequence of 8"),
    "one name for both dimensions": ({"inputs": "int64[n, n] input_ids", "outputs": f"float[n, n, {d.VOCABULARY}] logits"}, "both called 'n'"),
    "two inputs of tokens": ({"inputs": "int64[batch, sequence] input_ids, int64[batch, sequence] segments", "before": "g2 = Gather(table, segments) h = Add(x, g2)"}, "cannot be told"),
    "logits of one token only": ({"head": "l = Gather<axis = 1>(r, last) logits = MatMul(l, head)", "outputs": f"float[batch, one_, {d.VOCABULARY}] logits"}, "it picks some of the tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_become_a_generator_is_refused_with_the_reason(name):
    parts, reason = REFUSED[name]
    with pytest.raises(RewriteError, match=reason) as caught:
        generator(**parts)
    assert "\n" not in str(caught.value)


def planted(model: rewrite.Model, change) -> rewrite.Model:
    """The generator with a wrong node in its attention's body."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    function = next(f for f in proto.functions if f.name.startswith("PagedAttention"))
    change({n.output[0]: n for n in function.node}, proto)
    return rewrite.Model(proto)


def set_op(name: str, op: str):
    return lambda made, proto: setattr(made[name], "op_type", op)


def set_constant(name: str, value: np.ndarray):
    return lambda made, proto: made[name].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(value))


WRONG = {
    "a token does not see itself": set_op("before", "Greater"),
    "another scale": set_constant("scale", np.array(0.41, np.float32)),
    "hidden keys show": set_constant("hidden", np.array(0.0, np.float32)),
    "positions one off": lambda made, proto: setattr(made["position"], "op_type", "Add"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_generator_is_found(name):
    source = rewrite.load(decoder(positions=d.BY_RANGE))
    model = generator(positions=d.BY_RANGE)
    assert check_generator(source, model) < 1e-5
    wrong = planted(model, WRONG[name])
    with pytest.raises(CheckFailed, match=r"the generator differs from the model by .* at position"):
        check_generator(source, wrong)
    with pytest.raises(CheckFailed, match=r"plugin PagedAttention at '.*' differs"):
        check_attentions(wrong.proto, library([]).plugins["PagedAttention"])


def test_wrong_positions_are_found():
    source, model = rewrite.load(decoder(positions=d.BY_INPUT, inputs=PLACED)), generator(positions=d.BY_INPUT, inputs=PLACED)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        if node.op_type == "Gather" and "position_ids" in node.input:
            node.input[1] = "input_ids"
    with pytest.raises(CheckFailed, match="the generator differs"):
        check_generator(source, rewrite.Model(proto))


def test_the_body_is_shared_by_layers_alike():
    model = generator(positions=d.BY_RANGE)
    assert [f.name for f in FunctionTable(list(model.proto.functions)).functions.values() if f.name.startswith("Paged")] == ["PagedAttention"]
    unfused = rewrite.unfuse(model.proto)
    assert not unfused.functions
    assert check_generator(rewrite.load(decoder(positions=d.BY_RANGE)), rewrite.Model(unfused)) < 1e-5


HOSTILE = ["", "[]", "{}", "null", '{"block_size": 16}', "[" * 100_000]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:20])
def test_broken_metadata_are_one_line(text, tmp_path):
    model = generator()
    for entry in model.proto.metadata_props:
        entry.value = text if entry.key == "rewrite.generator" else entry.value
    with pytest.raises(RewriteError, match=r"metadata 'rewrite.generator' are not those of a generator") as caught:
        rewrite.build(model, tmp_path / "plan", engines=False)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_absurd_numbers_and_names_are_refused():
    model = generator()
    whole = generator_of(model.proto)
    for change in ({"block_size": 0}, {"vocabulary": 1 << 40}, {"positions": -1}, {"layers": []}, {"block_size": True}, {"layers": [{**whole["layers"][0], "key_cache": "slots2"}]}):
        for entry in model.proto.metadata_props:
            entry.value = json.dumps({**whole, **change})
        with pytest.raises(RewriteError, match="are not those of a generator"):
            generator_of(model.proto)


@pytest.mark.parametrize("metadata", ["positions", "eos"])
def test_other_metadata_that_make_no_sense(metadata, tmp_path):
    made = decoder()
    entry = made.metadata_props.add()
    entry.key, entry.value = f"rewrite.{metadata}", "many"
    model = rewrite.optimize(made, generate=True).model
    assert generator_of(model.proto)["positions"] is None
    if metadata == "eos":
        with pytest.raises(RewriteError, match="no list of token ids"):
            rewrite.build(model, tmp_path / "plan", engines=False)


def test_what_is_a_generator_already():
    with pytest.raises(RewriteError, match="it is a generator already"):
        rewrite.optimize(generator(), generate=True)


@pytest.mark.parametrize(("options", "reason"), [({"block_size": 0}, "a block size of 0"), ({"bitwise": True}, "leave out bitwise"), ({"inputs": []}, "leave out bitwise and inputs")])
def test_options_that_do_not_go_together(options, reason):
    with pytest.raises(RewriteError, match=reason):
        rewrite.optimize(decoder(), generate=True, **options)
