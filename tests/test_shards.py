"""Models split over ranks: what is split, that all ranks together compute the same, and what is refused."""

from __future__ import annotations

import json
import re

import decoder as d
import exported
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import nodes, parse
from decoder import decoder

import rewrite
from rewrite import sandbox
from rewrite.cli import main
from rewrite.errors import CheckFailed, RewriteError
from rewrite.functions import unfuse
from rewrite.model import Model
from rewrite.patterns.shard_axes import Cut, regrouped
from rewrite.plugins import shards_onnx
from rewrite.registry import library
from rewrite.shards import KEY, Slice, all_ranks, shards_of
from rewrite.verify import run_function


def split(world: int, generate: bool = True, **parts: str) -> rewrite.optimizer.Result:
    return rewrite.optimize(decoder(**parts), generate=generate, tensor_parallel=world)


def mlp(width: int = 12, after: str = "y = MatMul(g, w2)", middle: str = "g = Gelu(h)") -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((8, width)), "w2": rng.standard_normal((width, 8)), "b1": rng.standard_normal(width), "b2": rng.standard_normal(8), "w3": rng.standard_normal((8, width))}
    text = f"(float[rows, 8] x) => (float[rows, 8] y) {{ p = MatMul(x, w1) h = Add(p, b1) {middle} {after} }}"
    return parse(text, 20, **{n: w.astype(np.float32) for n, w in weights.items() if n in text})


def test_before_and_after():
    result = split(2, positions=d.BY_RANGE)
    model, shards = result.model, shards_of(result.model.proto)
    assert result.report.model_error < 1e-5
    onnx.checker.check_model(model.proto, full_check=True)
    made = nodes(model.proto)
    assert [n.split(".")[1].split("_")[0] for n in made if n.startswith("rewrite.All")] == ["AllGather", "AllReduce", "AllGather"]
    assert {n: (s.of, s.axis, s.sections) for n, s in shards.weights.items()} == {
        "table": ("table", 1, [[16, 16]]), "wq": ("wq", 1, [[32, 4]]), "wk": ("wk", 1, [[16, 2]]), "wv": ("wv", 1, [[16, 2]]), "wo": ("wo", 0, [[32, 4]]), "head": ("head", 1, [[60, 60]]),
    }  # fmt: skip
    assert list(shards.heads.values()) == [[2, 1]]
    assert shards.values["key_cache_0"] == [2, 1]
    total = next(n for n in model.proto.graph.node if n.op_type.startswith("AllReduce"))
    assert total.input[1] == ""  # no bias; the residual is added once, after the sum
    assert len(total.input) == 3
    before, after = (sum(i.ByteSize() for i in m.graph.initializer) for m in (rewrite.optimize(decoder(positions=d.BY_RANGE), generate=True).model.proto, model.proto))
    assert after < before + 500  # sliced, not copied


def test_ranks_share_key_heads():
    result = split(4)
    shards = shards_of(result.model.proto)
    assert result.report.model_error < 1e-5
    assert list(shards.heads.values()) == [[1, 1]]
    assert [list(shards.weights["wk"].ranges(rank, 4)) for rank in range(4)] == [[(0, 8)], [(0, 8)], [(8, 16)], [(8, 16)]]


MERGED = {
    "queries, then the key, then the value": (1, "m = MatMul(h, merged_weight) qf, kf, vf = Split<axis = -1>(m, merged_sizes)"),
    "queries, then keys, then values": (2, "m = MatMul(h, merged_weight) qf, kf, vf = Split<axis = -1>(m, merged_sizes)"),
    "of each group its queries, its key, its value": (2, "m = MatMul(h, merged_weight) m5 = Reshape(m, merged_groups) qf, kf, vf = Split<axis = 3>(m5, group_parts)"),
}


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_share_the_only_key_head(world, monkeypatch):
    monkeypatch.setattr(d, "KEY_HEADS", 1)
    result = split(world)
    assert result.report.model_error < 1e-5
    assert list(shards_of(result.model.proto).heads.values()) == [[4 // world, 1]]


@pytest.mark.parametrize("name", MERGED)
def test_merged_queries_keys_and_values(name, monkeypatch):
    heads, products = MERGED[name]
    monkeypatch.setattr(d, "KEY_HEADS", heads)
    result = split(2, products=products)
    assert result.report.model_error < 1e-5
    assert [s.of for s in shards_of(result.model.proto).weights.values()].count("merged_weight") == 1


def test_a_table_of_tokens_in_a_pair_is_not_joined():
    """Its rows are a factor of the width that is split."""
    text = """(int64[n] ids, float[n, 8] x) => (float[n, 8] y) { p = MatMul(x, w1) g = Gelu(p) e = Gather(table, ids) m = Mul(g, e) y = MatMul(m, w2) }"""
    rng = np.random.default_rng(0)
    weights = {"w1": (8, 12), "table": (30, 12), "w2": (12, 8)}
    result = rewrite.optimize(parse(text, 20, **{n: rng.standard_normal(s).astype(np.float32) for n, s in weights.items()}), tensor_parallel=2)
    assert result.report.model_error < 1e-5
    assert {n: s.axis for n, s in shards_of(result.model.proto).weights.items()} == {"w1": 1, "table": 1, "w2": 0}
    assert result.report.plugins.get("AllGather", 0) == 0


@pytest.mark.parametrize("world", [2, 4])
def test_without_a_cache(world):
    result = split(world, generate=False, positions=d.BY_RANGE)
    assert result.report.model_error < 1e-5
    assert result.report.plugins["AllReduce"] == 1
    assert "PagedAttention" not in result.report.plugins


def test_heads_that_do_not_divide_are_refused_by_name():
    with pytest.raises(RewriteError, match=r"over 3 ranks: PagedAttention '.+': its 4 heads do not divide by 3") as caught:
        split(3)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_divide_stays_whole(monkeypatch):
    monkeypatch.setattr(d, "VOCABULARY", 61)
    result = split(2, outputs="float[batch, sequence, 61] logits")
    assert "head" not in shards_of(result.model.proto).weights
    assert [line for line in result.report.whole if "61 logits do not divide by 2" in line]


def test_a_table_read_twice_is_cut_twice():
    result = split(2, head="turned = Transpose(table) logits = MatMul(r, turned)")
    slices = shards_of(result.model.proto).weights
    cuts = {s.axis: s.of for s in slices.values() if s.of == "table"}
    assert result.report.model_error < 1e-5
    assert set(cuts) <= {0, 1}
    assert cuts


PAIRS = {
    "activation": {},
    "bias after the sum": {"after": "z = MatMul(g, w2) y = Add(z, b2)"},
    "gate": {"middle": "u = MatMul(x, w3) s = Sigmoid(h) a = Mul(h, s) g = Mul(a, u)"},
    "gate, of an activation that no rule knows": {"middle": "u = MatMul(x, w3) s = Softplus(h) g = Mul(s, u)"},
}


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "double"])
def test_types(kind):
    model = mlp(middle="g = Relu(h)")  # ONNX Runtime has no Erf for doubles
    element = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16, "double": onnx.TensorProto.DOUBLE}[kind]
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(element)), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = element
    result = rewrite.optimize(model, tensor_parallel=2, tolerance=2e-2)
    assert result.report.model_error < (1e-10 if kind == "double" else 1e-2)
    assert shards_of(result.model.proto).weights["w2"].axis == 0


def test_old_opsets_are_refused():
    with pytest.raises(RewriteError, match="it is of opset 13; export it at opset 15 or later"):
        rewrite.optimize(parse("(float[n, 4] x) => (float[n, 4] y) { y = MatMul(x, w) }", 13, w=np.eye(4, dtype=np.float32)), tensor_parallel=2)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    result = rewrite.optimize(mlp(**PAIRS[name]), tensor_parallel=4)
    slices = shards_of(result.model.proto).weights
    assert result.report.model_error < 1e-5
    assert (slices["w1"].axis, slices["w2"].axis, slices["b1"].axis) == (1, 0, 0)
    assert "b2" not in slices


def test_a_width_that_does_not_divide_is_refused_by_name():
    with pytest.raises(RewriteError, match=r"over 5 ranks: .*MatMulAct '.+': of a width of 12, 12 do not divide by 5"):
        rewrite.optimize(mlp(), tensor_parallel=5)


NO_PAIRS = {
    "a norm over the width": {"middle": "g = LayerNormalization(h, b1)"},
    "a softmax over the width": {"middle": "g = Softmax(h)"},
    "an activation after the sum": {"after": "z = MatMul(g, w2) y = Relu(z)"},
    "one of the columns": {"after": "z = MatMul(g, w2) i = Constant<value = int64[1] {0}>() o = Gather<axis = 1>(g, i) y = Add(z, o)"},
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_what_looks_along_the_width_is_no_pair(name):
    with pytest.raises(RewriteError, match="it has no attention and no pair of products that can be split"):
        rewrite.optimize(mlp(**NO_PAIRS[name]), tensor_parallel=2)


def test_sections_and_ranks():
    merged = Slice("w", 1, [[8, 4], [4, 2], [4, 2]])  # queries, keys, values of 4, 2 and 2 heads
    array = np.arange(32).reshape(2, 16)
    assert [list(merged.ranges(rank, 2)) for rank in range(2)] == [[(0, 4), (8, 10), (12, 14)], [(4, 8), (10, 12), (14, 16)]]
    assert merged.take(array, 1, 2)[0].tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert [list(merged.ranges(rank, 4))[1] for rank in range(4)] == [(8, 10), (8, 10), (10, 12), (10, 12)]
    assert merged.size(4) == 6


def wrong_weight(model: Model) -> None:
    shards = shards_of(model.proto)
    shards.weights["wk"].sections = [[8, 1], [8, 1]]
    onnx.helper.set_model_props(model.proto, {**{p.key: p.value for p in model.proto.metadata_props}, KEY: json.dumps(shards.to_dict())})


def no_sum(model: Model) -> None:
    node = next(n for n in model.proto.graph.node if n.op_type.startswith("AllReduce"))
    add = onnx.helper.make_node("Add", [node.input[0], node.input[2]], list(node.output))
    node.CopyFrom(add)


@pytest.mark.parametrize("mistake", [wrong_weight, no_sum])
def test_the_check_sees_a_wrong_split(mistake):
    source = decoder()
    made = rewrite.optimize(source, generate=True, tensor_parallel=2).model
    assert sandbox.compare_generator(rewrite.load(source), all_ranks(made), 1e-4) < 1e-5
    mistake(made)
    with pytest.raises((CheckFailed, RewriteError), match=r"differs|cannot"):
        sandbox.compare_generator(rewrite.load(source), all_ranks(made), 1e-4)


def test_options_that_make_no_sense_together():
    made = split(2).model
    with pytest.raises(RewriteError, match="it is a generator already"):
        rewrite.optimize(made, tensor_parallel=2)
    with pytest.raises(RewriteError, match="without bitwise"):
        rewrite.optimize(mlp(), tensor_parallel=2, bitwise=True)
    assert shards_of(unfuse(made.proto)) is None
    changed = rewrite.Model(onnx.ModelProto())
    changed.proto.CopyFrom(made.proto)
    next(i for i in changed.proto.graph.initializer if i.name == "wq").name = "other"
    with pytest.raises(RewriteError, match="it was changed after it was split over ranks: 'wq' is not what its metadata say"):
        all_ranks(changed)
    with pytest.raises(RewriteError, match="it is in shards already"):
        rewrite.optimize(rewrite.optimize(mlp(), tensor_parallel=2).model)
    with pytest.raises(RewriteError, match="it is in shards already"):
        rewrite.optimize(rewrite.optimize(mlp(), tensor_parallel=2).model, tensor_parallel=2)


def test_command(tmp_path):
    onnx.save(decoder(), tmp_path / "model.onnx")
    done = CliRunner().invoke(main, ["optimize", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "split.onnx"), "--generate", "--tensor-parallel", "2"])
    assert done.exit_code == 0, done.output
    assert re.search(r"2 ranks: each has 0.01 of 0.0\d MB of weights; 1 sums and 2 joins a step", done.output)
    assert shards_of(onnx.load(tmp_path / "split.onnx")).world == 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", exported.DECODERS)
def test_real_exports(name, world):
    for exporter, opset in (("dynamo", 18), ("torchscript", 17)):
        result = rewrite.optimize(exported.exported(name, exporter, opset), generate=True, tensor_parallel=world)
        assert result.report.model_error < 1e-5
        assert result.report.plugins["AllReduce"] == 4


def test_a_reshape_that_joins_or_parts_sections():
    cut = Cut(3, ((4, 4),))
    joined = regrouped(cut, ["batch", "sequence", 3, 4, 16], ["batch", "sequence", 192])
    assert joined == Cut(2, ((64, 4), (64, 4), (64, 4)))
    assert regrouped(joined, ["batch", "sequence", 192], ["batch", "sequence", 3, 4, 16]) == cut
    assert regrouped(Cut(2, ((4, 4),)), ["batch", "sequence", 4, 16], ["batch", "sequence", 64]) == Cut(2, ((64, 4),))
    assert regrouped(Cut(2, ((64, 4),)), ["batch", "sequence", 64], ["batch", "sequence", 4, 16]) == Cut(2, ((4, 4),))
    for before, after in ((["n", 12], ["n", 5, 3]), (["n", 4], [4, "n"]), (["n", 4, "m"], ["4*n", "m"])):
        with pytest.raises(ValueError, match=r"would not stay split|sections are cut apart"):
            regrouped(Cut(1, ((before[1], 4),)), before, after)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("angles", [(1, 3, 1), (2, 3), (3,)])
@pytest.mark.parametrize("half", [False, True])
def test_rotary_in_pairs_for_any_number_of_heads(heads, size, angles, half):
    """The body that the ranks share, made for 8 heads, on fewer."""
    plugin = library([]).plugins["Rotary"]
    layout = (2, 3, heads, 8) if len(angles) != 2 else (2, heads, 3, 8)
    turn = (*{(1, 3, 1): (1, 3, 1), (2, 3): (2, 3), (3,): ()}[angles], (size or 8) // (2 if half else 1))
    rng = np.random.default_rng(0)
    x, cos, sin = (rng.standard_normal(s).astype(np.float32) for s in (layout, turn, turn))
    attributes = {"interleaved": 1, **({"size": size} if size else {})}
    body = shards_onnx.rotary(attributes, (*layout[:2], 8, 8), turn, 20)
    expected = plugin.reference(x, cos, sin, **{**plugin.attributes, **attributes})
    found = run_function(body, [], {"x": x, "cos": cos, "sin": sin})[0]
    assert np.abs(found - expected).max() < 1e-6
