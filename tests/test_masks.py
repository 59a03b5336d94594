"""Attention masks: recognised as what they are, by what they compute; masks of other kinds stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import nodes, parse

import rewrite
from rewrite.registry import library

# Queries i [s, 1] and keys j [1, t] as positions, S and T as sizes. `keep` (boolean) or `bias` (added) is the mask.
POSITIONS = """
    S = Shape<start=2, end=3>(q)  T = Shape<start=2, end=3>(k)
    S0 = Squeeze(S)  T0 = Squeeze(T)
    i0 = Range(zero, S0, one)  j0 = Range(zero, T0, one)
    i = Unsqueeze(i0, ax1)  j = Unsqueeze(j0, ax0)
"""
BOOLEAN = "masked = Where(keep, scores, low)"
ADDED = "masked = Add(scores, bias)"
NUMBERS = {
    "zero": np.array(0), "one": np.array(1), "two": np.array(2), "three": np.array(3), "four": np.array(4), "big": np.array(4096), "below": np.array(4095),
    "ax0": np.array([0]), "ax1": np.array([1]), "ax12": np.array([1, 2]), "ax123": np.array([1, 2, 3]), "start": np.array([0]), "last2": np.array([-2, -1]),
    "low": np.float32(-3.4028235e38), "flow": np.float32(-3.4028235e38), "fzero": np.float32(0), "fone": np.float32(1), "soft": np.float32(-1e4),
    "inf": np.float32(-np.inf), "slope": np.float32(0.5), "yes": np.array(True),
}  # fmt: skip


def attention(mask: str, end: str = BOOLEAN, inputs: str = "int64[b, t] pad", keys: str = "t", sizes: tuple[str, str] = ("b", "s"), **tables) -> onnx.ModelProto:
    """softmax(q @ k^T, masked) @ v with the mask computed by these lines."""
    b, s = sizes
    text = f"""(float[{b}, 2, {s}, 8] q, float[{b}, 2, {keys}, 8] k, float[{b}, 2, {keys}, 8] v{', ' + inputs if inputs else ''}) => (float[{b}, 2, {s}, 8] y) {{
    kt = Transpose<perm=[0, 1, 3, 2]>(k)
    scores = MatMul(q, kt)
    {mask}
    {end}
    w = Softmax<axis=-1>(masked)
    y = MatMul(w, v)
    }}"""
    used = {n: np.asarray(a) for n, a in {**NUMBERS, **tables}.items() if n in text.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    return parse(text, 18, **used)


def found(model: onnx.ModelProto, **options):
    """The AttentionMask of a model, as (words, attributes), or the reason why there is none."""
    result = rewrite.optimize(model, **options)
    onnx.checker.check_model(result.model.proto, full_check=True)
    fused = [n for n in result.model.proto.graph.node if n.op_type.startswith("FusedAttention")]
    assert len(fused) == 1, [str(n) for n in result.report.near_misses]
    producer = [n.op_type for n in result.model.proto.graph.node if fused[0].input[3] in n.output]
    sites = [s for s in result.report.sites if s.rule == "attention_mask"]
    assert (producer == ["AttentionMask"]) == bool(sites)
    if sites:
        assert not {"Range", "And", "Trilu", "LessOrEqual"} & set(nodes(result.model.proto)), "the mask is not computed twice"
        return sites[0].note, sites[0].attributes
    reasons = [n.reason for n in result.report.near_misses if n.rule == "attention_mask"]
    assert len(reasons) == 1
    return reasons[0]


PADDED = "p0 = Cast<to=9>(pad)  p = Unsqueeze(p0, ax12)"
CAUSAL = POSITIONS + "c = LessOrEqual(j, i)  keep = And(c, yes)"
BIAS = "bias = Where(keep, fzero, low)"


def test_causal():
    note, attributes = found(attention(CAUSAL, inputs="", keys="s"))
    assert note == "causal"
    assert attributes == {"causal": 1, "layout": "ST", "query_axis": 2}


def test_causal_upper_left_where_keys_have_nothing_to_do_with_queries():
    note, attributes = found(attention(POSITIONS + PADDED + "c = LessOrEqual(j, i)  keep = And(c, p)"))
    assert (note, attributes) == ("causal + padding", {"causal": 1, "align": "start", "query_axis": 2})


def test_causal_and_padding():
    note, attributes = found(attention(POSITIONS + PADDED + " c = LessOrEqual(j, i)  keep = And(c, p)", keys="s", inputs="int64[b, s] pad"))
    assert note == "causal + padding"
    assert attributes == {"causal": 1}


def test_added_padding_as_older_bert_does_it():
    lines = "m = Cast<to=1>(pad)  u = Unsqueeze(m, ax12)  inverse = Sub(fone, u)  bias = Mul(inverse, soft)"
    note, attributes = found(attention(lines, ADDED, keys="s", inputs="int64[b, s] pad"))
    assert note == "padding"
    assert attributes == {"layout": "B11T", "dtype": "float32", "fill": -1e4, "binary": 1}


def test_pytorchs_key_padding_mask_is_true_where_hidden():
    note, attributes = found(attention("u = Unsqueeze(pad, ax12)  bias = Where(u, inf, fzero)", ADDED, keys="s", inputs="bool[b, s] pad"))
    assert note == "padding"
    assert attributes == {"layout": "B11T", "dtype": "float32", "fill": -np.inf, "test": "=="}


def test_padding_told_from_token_ids():
    note, attributes = found(attention("e = Equal(pad, four)  n = Not(e)  keep = Unsqueeze(n, ax12)", keys="s", inputs="int64[b, s] pad"))
    assert note == "padding"
    assert attributes == {"layout": "B11T", "against": 4.0}


def test_causal_and_padding_added_to_one_another():
    lines = POSITIONS + "c = LessOrEqual(j, i)  c1 = Where(c, fzero, low)  m = Cast<to=1>(pad)"
    lines += "  u = Unsqueeze(m, ax12)  n = Sub(fone, u)  p = Mul(n, low)  bias = Add(c1, p)"
    note, attributes = found(attention(lines, ADDED, keys="s", inputs="int64[b, s] pad"))
    assert note == "causal + padding"
    assert (attributes["split"], attributes["both_fill"], attributes["binary"]) == (1, -np.inf, 1)
    assert attributes["fill"] == attributes["padding_fill"] == float(np.float32(-3.4028235e38))


SEVERAL = {
    "added": "c1 = Where(c, fzero, low)  s1 = Add(scores, c1)  b1 = Where(p, fzero, soft)  masked = Add(b1, s1)",
    "chosen, then added": "s1 = Where(c, scores, low)  b1 = Where(p, fzero, low)  masked = Add(s1, b1)",
    "chosen twice": "s1 = Where(c, scores, low)  masked = Where(p, s1, low)",
    "dropped twice": "nc = Not(c)  np = Not(p)  s1 = Where(nc, low, scores)  masked = Where(np, low, s1)",
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_masks_become_one(name):
    lines = POSITIONS + PADDED + " c = LessOrEqual(j, i)"
    note, _ = found(attention(lines, SEVERAL[name], keys="s", inputs="int64[b, s] pad"))
    assert note == "causal + padding"


def test_products_that_are_added_stay_apart():
    """A relative position bias computed from the queries is no mask."""
    lines = POSITIONS + "c = LessOrEqual(j, i)  c1 = Where(c, fzero, low)  s1 = MatMul(q, kt)  s2 = Add(scores, s1)"
    result = rewrite.optimize(attention(lines, "masked = Add(s2, c1)", inputs="", keys="s"), explain=True)
    assert result.report.rules["added_masks"].applied == 0


def test_rows_without_keys_that_see_everything():
    """transformers 4.36 to 4.47 did this for sdpa."""
    lines = (
        POSITIONS + PADDED + " c = LessOrEqual(j, i)  k1 = And(c, p)  b1 = Where(k1, fzero, low)  e = Equal(b1, low)  e1 = Cast<to=1>(e)"
        " all = ReduceMin<keepdims=1>(e1, last)  none = Sub(fone, all)  bias = Mul(b1, none)"
    )
    note, attributes = found(attention(lines, ADDED, keys="s", inputs="int64[b, s] pad", last=np.array([-1])))
    assert (note, attributes["unmask_empty"]) == ("causal + padding", 1)


@pytest.mark.parametrize("width", [3, 4, 40])
def test_sliding_window(width):
    lines = CAUSAL.replace("And(c, yes)", "And(c, near)").replace("keep", "d = Sub(i, j)  near = Less(d, width)  keep")
    note, attributes = found(attention(lines, inputs="", keys="s", width=np.array(width)))
    assert (note, attributes["window"]) == (f"causal, window {width}", width)


@pytest.mark.parametrize(("test", "number", "window"), [("Less", "big", 4096), ("LessOrEqual", "big", 4097), ("Less", "below", 4095)])
def test_a_window_larger_than_can_be_tried(test, number, window):
    lines = CAUSAL.replace("And(c, yes)", "And(c, near)").replace("keep", f"d = Sub(i, j)  near = {test}(d, {number})  keep")
    note, attributes = found(attention(lines, inputs="", keys="s"))
    assert (note, attributes["window"]) == (f"causal, window {window}", window)


def test_window_to_both_sides():
    lines = POSITIONS + "d = Sub(i, j)  a = Abs(d)  keep = LessOrEqual(a, three)"
    note, attributes = found(attention(lines, inputs="", keys="s"))
    assert (note, attributes["window"]) == ("window 4", 4)


def test_everything_seen():
    assert found(attention(POSITIONS + "d = Sub(i, j)  a = Abs(d)  keep = GreaterOrEqual(a, zero)", inputs="", keys="s"))[0] == "everything seen"


def test_cached_keys():
    """More keys than queries: the queries are the last ones."""
    lines = POSITIONS + PADDED + " P = Shape<start=2, end=3>(past)  P0 = Squeeze(P)  ip = Add(i, P0)  c = LessOrEqual(j, ip)  keep = And(c, p)"
    model = attention(lines, inputs="int64[b, t] pad, float[b, 2, past, 8] past, int64[b, s] ids")
    for dim in (d for value in model.graph.input for d in value.type.tensor_type.shape.dim if d.dim_param == "t"):
        dim.dim_param = "past + s"
    note, attributes = found(model)
    assert note == "causal + padding"
    assert attributes == {"causal": 1}


def test_stored_triangle():
    """GPT-2's buffer, cut to the sequence."""
    lines = "S = Shape<start=2, end=3>(q)  ends = Concat<axis=0>(S, S)  begins = Concat<axis=0>(start, start)  keep = Slice(tril, begins, ends, last2)"
    note, attributes = found(attention(lines, inputs="", keys="s", tril=np.tri(70, dtype=bool)[None, None]))
    assert (note, attributes["layout"]) == ("causal", "11ST")


def test_constant_mask():
    """nn.Transformer's square mask, baked in for one length."""
    mask = np.where(np.tri(6, dtype=bool), 0, -np.inf).astype(np.float32)
    note, attributes = found(attention("", "masked = Add(scores, square)", inputs="", keys="6", sizes=("b", "6"), square=mask))
    assert (note, attributes["fill"], attributes["layout"]) == ("causal", -np.inf, "ST")


def test_the_decomposition_of_is_causal():
    lines = "S = Shape<start=2, end=3>(q)  T = Shape<start=2, end=3>(k)  st = Concat<axis=0>(S, T)  ones = Expand(one, st)"
    lines += "  low1 = Trilu<upper=0>(ones)  off = Equal(low1, zero)  bias = Where(off, low, fzero)"
    assert found(attention(lines, ADDED, inputs="", keys="s"))[0] == "causal"


# --- other masks stay ---------------------------------------------------------------------------------------------
NEAR = {
    "strict": ("c = Less(j, i)  keep = And(c, yes)", "neither causal nor a window"),
    "future": ("keep = GreaterOrEqual(j, i)", "neither causal nor a window"),
    "prefix": ("c = LessOrEqual(j, i)  f = Less(j, four)  keep = Or(c, f)", "neither causal nor a window"),
    "sink": ("c = LessOrEqual(j, i)  d = Sub(i, j)  n = Less(d, four)  f = Less(j, one)  o = Or(n, f)  keep = And(c, o)", "neither causal nor a window"),
    "blocks": ("a = Div(i, four)  e = Div(j, four)  keep = Equal(a, e)", "neither causal nor a window"),
    "chunks": ("a = Div(i, big)  e = Div(j, big)  f = Equal(a, e)  c = LessOrEqual(j, i)  keep = And(c, f)", "neither causal nor a window"),
    "dilated": ("d = Sub(i, j)  m = Mod(d, two)  e = Equal(m, zero)  c = LessOrEqual(j, i)  keep = And(c, e)", "neither causal nor a window"),
    "uneven window": ("d = Sub(i, j)  n = LessOrEqual(d, three)  e = Sub(j, i)  f = LessOrEqual(e, two)  keep = And(n, f)", "neither causal nor a window"),
    "window that grows": ("d = Sub(i, j)  h = Div(S0, two)  n = Less(d, h)  c = LessOrEqual(j, i)  keep = And(c, n)", "elements differ"),
    "longer than a number": ("c = LessOrEqual(j, i)  l = Less(S0, big)  o = Not(l)  keep = Or(c, o)", "elements differ"),
}


@pytest.mark.parametrize("name", NEAR)
def test_other_positions_stay(name):
    lines, reason = NEAR[name]
    assert reason in found(attention(POSITIONS + lines, inputs="", keys="s"))


def test_distances_added_to_the_scores_stay():
    lines = POSITIONS + "d = Sub(j, i)  f = Cast<to=1>(d)  a = Mul(f, slope)  c = LessOrEqual(j, i)  bias = Where(c, a, low)"
    assert "adds" in found(attention(lines, ADDED, inputs="", keys="s"))


PADDING = {
    "positions": ("u = Unsqueeze(pad, ax1)  e = Unsqueeze(pad, ax2)  c = LessOrEqual(u, e)  keep = Unsqueeze(c, ax1)", "int64[b, s] pad", ""),
    "packed": ("u = Unsqueeze(pad, ax1)  e = Unsqueeze(pad, ax2)  c = Equal(u, e)  keep = Unsqueeze(c, ax1)", "int64[b, s] pad", ""),
    "rows": ("p0 = Cast<to=9>(pad)  keep = Unsqueeze(p0, ax13)", "int64[b, s] pad", "its shape is"),
    "two inputs": ("p0 = Cast<to=9>(pad)  o = Cast<to=9>(other)  a = And(p0, o)  keep = Unsqueeze(a, ax12)", "int64[b, s] pad, int64[b, s] other", "'other' and 'pad'"),
    "given": ("keep = Identity(pad)", "bool[b, 1, s, s] pad", "[batch, keys]"),
    "range of ids": ("a = Greater(pad, two)  e = Less(pad, four)  n = And(a, e)  keep = Unsqueeze(n, ax12)", "int64[b, s] pad", ""),
    "count": ("n = ReduceSum<keepdims=1>(pad, ax1)  l = Squeeze(n, ax1)  u = Unsqueeze(l, ax123)  " + POSITIONS + "keep = Less(j, u)", "int64[b, s] pad", ""),
    "a queue": ("n = CumSum(pad, one)  e = Less(n, four)  p0 = Cast<to=9>(pad)  a = And(p0, e)  keep = Unsqueeze(a, ax12)", "int64[b, s] pad", ""),
    "ids up to 150": (
        "f = Cast<to=1>(pad)  g = Mul(f, slope)  e = Less(g, f75)  p0 = Cast<to=9>(pad)  a = And(p0, e)  keep = Unsqueeze(a, ax12)",
        "int64[b, s] pad", "",
    ),
}


@pytest.mark.parametrize("name", PADDING)
def test_other_paddings_stay(name):
    lines, inputs, reason = PADDING[name]
    answer = found(attention(lines, inputs=inputs, keys="s", ax2=np.array([2]), ax13=np.array([1, 3]), f75=np.float32(75)))
    assert isinstance(answer, str), answer
    assert reason in answer


def test_a_mask_computed_from_activations_stays():
    lines = "a = MatMul(h, wh)  g = Greater(a, fzero)  s1 = Squeeze(g, lastax)  keep = Unsqueeze(s1, ax12)"
    answer = found(attention(lines, inputs="float[b, s, 4] h", keys="s", wh=np.ones((4, 1), np.float32), lastax=np.array([2])))
    assert "computed by MatMul 'a'" in answer


def test_a_mask_that_differs_by_head_stays():
    lines = POSITIONS + "d = Sub(i, j)  keep = Less(d, widths)"
    answer = found(attention(lines, inputs="", keys="s", widths=np.array([2, 3]).reshape(1, 2, 1, 1)))
    assert "for each head" in answer


def test_a_mask_repeated_for_every_head():
    lines = "u = Unsqueeze(pad, ax12)  n = Not(u)  keep = Expand(n, heads)"
    note, attributes = found(attention(lines, inputs="bool[b, s] pad", keys="s", heads=np.array([1, 2, 1, 1])))
    assert (note, attributes) == ("padding", {"layout": "BH1T", "heads": 2, "test": "=="})


# --- sharing, reference, body -------------------------------------------------------------------------------------
def two_layers(second: str) -> onnx.ModelProto:
    mask = POSITIONS + "c = LessOrEqual(j, i)  keep = And(c, yes)"
    text = f"""(float[b, 2, s, 8] q, float[b, 2, s, 8] k, int64[b, s] ids) => (float[b, 2, s, 8] y) {{
    kt = Transpose<perm=[0, 1, 3, 2]>(k)
    scores = MatMul(q, kt)
    {mask}
    masked = Where(keep, scores, low)
    w = Softmax<axis=-1>(masked)
    x = MatMul(w, k)
    scores2 = MatMul(x, kt)
    {second}
    masked2 = Where(keep2, scores2, low)
    w2 = Softmax<axis=-1>(masked2)
    y = MatMul(w2, k)
    }}"""
    used = {n: np.asarray(a) for n, a in NUMBERS.items() if n in text.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    return parse(text, 18, **used)


def test_layers_share_one_mask():
    """Also where the exporter computes it anew for each layer."""
    for second in ("keep2 = Identity(keep)", "c2 = LessOrEqual(j, i)  keep2 = And(c2, yes)", "n = Not(keep)  keep2 = Not(n)"):
        result = rewrite.optimize(two_layers(second))
        assert sorted(nodes(result.model.proto)) == ["rewrite.AttentionMask", "rewrite.FusedAttention", "rewrite.FusedAttention"]


def test_another_mask_is_another_node():
    result = rewrite.optimize(two_layers("d = Sub(i, j)  n = Less(d, three)  keep2 = And(c, n)"))
    assert {s.note for s in result.report.sites if s.rule == "attention_mask"} == {"causal", "causal, window 3"}
    assert len({n.op_type for n in result.model.proto.graph.node if n.op_type.startswith("AttentionMask")}) == 2, "and another function"


def test_unfuse_gives_back_a_model_without_plugins(rng):
    before = attention(POSITIONS + PADDED + " c = LessOrEqual(j, i)  keep = And(c, p)", keys="s", inputs="int64[b, s] pad")
    result = rewrite.optimize(before)
    plain = rewrite.unfuse(result.model.proto)
    assert not any(n.domain for n in plain.graph.node)
    feeds = {n: rng.standard_normal((2, 2, 5, 8)).astype(np.float32) for n in "qkv"} | {"pad": np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])}
    from rewrite.verify import session

    expected = session(before).run(None, feeds)[0]
    for other in (plain, result.model.proto):
        np.testing.assert_allclose(session(other).run(None, feeds)[0], expected, atol=1e-6)


def test_the_reference_spelled_out():
    reference, defaults = library().plugins["AttentionMask"].reference, library().plugins["AttentionMask"].attributes
    pad = np.array([[0, 1, 1, 1], [1, 1, 1, 0]])
    y = reference(pad, None, None, **{**defaults, "causal": 1, "window": 2})
    assert y.shape == (2, 1, 4, 4)
    assert y[0, 0].tolist() == [[False] * 4, [False, True, False, False], [False, True, True, False], [False, False, True, True]]
    assert y[1, 0].tolist() == [[True, False, False, False], [True, True, False, False], [False, True, True, False], [False, False, True, False]]
    cached = reference(None, np.zeros((1, 2)), np.zeros((1, 1, 3, 1)), **{**defaults, "causal": 1, "layout": "ST", "dtype": "float32", "fill": -9.0})
    assert cached.tolist() == [[0, 0, 0, 0, -9], [0, 0, 0, 0, 0]]


def test_the_report_tells_what_each_mask_is(tmp_path):
    from click.testing import CliRunner

    from rewrite.cli import main

    onnx.save(two_layers("d = Sub(i, j)  n = Less(d, three)  keep2 = And(c, n)"), tmp_path / "m.onnx")
    output = CliRunner().invoke(main, ["optimize", str(tmp_path / "m.onnx"), "--expect", "attention_mask=2"]).output
    assert "AttentionMask: causal " in output
    assert "AttentionMask: causal, window 3 " in output


# --- rules that find their matches themselves -----------------------------------------------------------------------
def test_a_find_that_raises_is_named():
    found = next(r for r in library().rules if r.name == "attention_mask")

    def broken(graph, node):
        raise KeyError("mask")

    old = found.find
    object.__setattr__(found, "find", broken)
    try:
        with pytest.raises(rewrite.RewriteError, match=r"rule 'attention_mask' .*: its find fails at FusedAttention 'y_FusedAttention_1': test_masks.py:[0-9]+: KeyError: 'mask'"):
            rewrite.optimize(attention(CAUSAL, inputs="", keys="s"))
    finally:
        object.__setattr__(found, "find", old)


def test_a_rule_has_a_pattern_or_finds():
    with pytest.raises(rewrite.RewriteError, match="a rule with 'find' has no pattern, but a tuple of operator names 'root'"):
        rewrite.rule(type("Rootless", (), {"find": lambda graph, node: None, "replace": lambda op: None}))


# --- real exports -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 64}
    decoder = {**common, "num_key_value_heads": 1, "head_dim": 16}
    folder = tmp_path_factory.mktemp("masks")

    class Plain(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]

    def export(name: str, config, model, dynamo: bool, opset: int):
        torch.manual_seed(0)
        config.use_cache = False
        wrapped = Plain(model(config)).eval()
        ids = torch.randint(0, 50, (2, 7))
        mask = torch.ones(2, 7, dtype=torch.int64)
        mask[0, :2] = 0
        axes = {0: "batch", 1: "seq"}
        options = {"dynamo": True, "dynamic_shapes": {"input_ids": axes, "attention_mask": axes}} if dynamo else {"dynamo": False, "dynamic_axes": {"input_ids": axes, "attention_mask": axes}}
        path = folder / f"{name}.onnx"
        with torch.no_grad():
            torch.onnx.export(wrapped, (ids, mask), str(path), opset_version=opset, input_names=["input_ids", "attention_mask"], external_data=False, verbose=False, **options)
        return path

    gemma = transformers.Gemma3TextConfig(**decoder, sliding_window=4, layer_types=["sliding_attention", "full_attention"], attn_implementation="sdpa")
    return {
        "bert": export("bert", transformers.BertConfig(**common, attn_implementation="sdpa"), transformers.BertModel, True, 23),
        "gemma": export("gemma", gemma, transformers.Gemma3ForCausalLM, True, 18),
        "llama": export("llama", transformers.LlamaConfig(**decoder, attn_implementation="sdpa"), transformers.LlamaForCausalLM, False, 17),
    }


@pytest.mark.parametrize(("name", "notes"), [("bert", ["padding"]), ("gemma", ["causal + padding", "causal, window 4 + padding"]), ("llama", ["causal + padding"])])
def test_real_exports(exports, name, notes):
    result = rewrite.optimize(exports[name])
    made = [n for n in result.model.proto.graph.node if n.op_type.startswith("AttentionMask")]
    assert len(made) == len(notes)
    assert sorted({s.note for s in result.report.sites if s.rule == "attention_mask"}) == notes
    masks = {n.output[0] for n in made}
    fused = [n for n in result.model.proto.graph.node if n.op_type.startswith("FusedAttention")]
    assert len(fused) == 2
    assert all(n.input[3] in masks for n in fused)
    assert result.report.seconds < 3
