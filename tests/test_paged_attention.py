"""PagedAttention: the reference beside its ONNX body, and beside attention computed text by text without a cache."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest

from rewrite.plugins.paged_attention import PagedAttention, are_alike
from rewrite.plugins.paged_attention_onnx import body
from rewrite.verify import compare, reference_runner, run_function

HEADS, KEY_HEADS, SIZE, VALUE_SIZE, BLOCK, BLOCKS = 4, 2, 8, 6, 4, 24
LENGTHS = (7, 1, 13, 22)


def attributes(window=0, softcap=0.0):
    return {"heads": HEADS, "kv_heads": KEY_HEADS, "size": SIZE, "scale": 0.3, "window": window, "softcap": softcap, "layer": 0}


class Texts:
    """Whole queries, keys and values of four texts, and where they lie; steps over them."""

    def __init__(self, seed, dtype=np.float32):
        self.rng = np.random.default_rng(seed)
        self.q, self.k, self.v = ([self.rng.standard_normal((1, h, n, s)).astype(dtype) for n in LENGTHS] for h, s in ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, VALUE_SIZE)))
        self.caches = [self.rng.standard_normal((BLOCKS, BLOCK, KEY_HEADS, s)).astype(dtype) for s in (SIZE, VALUE_SIZE)]  # full of what others left
        needed = [-(-n // BLOCK) for n in LENGTHS]
        order = self.rng.permutation(BLOCKS)
        self.tables = np.full((len(LENGTHS), max(needed)), -1, np.int32)
        for i, count in enumerate(needed):
            self.tables[i, :count] = order[sum(needed[:i]) : sum(needed[: i + 1])]

    def feeds(self, chunks, padding=0):
        """The inputs of one step; chunks are (text, from, to). Padding tokens belong to no text and are stored nowhere."""
        def packed(arrays):
            parts = [arrays[i][:, :, a:b] for i, a, b in chunks]
            return np.concatenate([*parts, np.ones_like(arrays[0][:, :, :1]).repeat(padding, 2)], 2)

        starts = np.cumsum([0] + [b - a for _, a, b in chunks]).astype(np.int32)
        places = [(i, p) for i, a, b in chunks for p in range(a, b)]
        slots = [self.tables[i, p // BLOCK] * BLOCK + p % BLOCK for i, p in places] + [-1] * padding
        return {
            "q": packed(self.q), "k": packed(self.k), "v": packed(self.v), "key_cache": self.caches[0], "value_cache": self.caches[1], "slots": np.array(slots, np.int32),
            "block_tables": self.tables[[i for i, _, _ in chunks]], "query_starts": starts, "context_lengths": np.array([b for _, _, b in chunks], np.int32),
        }  # fmt: skip

    def expected(self, text, window, softcap):
        """Attention over a whole text, in float64."""
        q, k, v = (a[text].astype(np.float64) for a in (self.q, self.k, self.v))
        k, v = (np.repeat(a, HEADS // KEY_HEADS, 1) for a in (k, v))
        scores = 0.3 * q @ k.swapaxes(-1, -2)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        distance = np.arange(LENGTHS[text])[:, None] - np.arange(LENGTHS[text])
        seen = (distance >= 0) & (distance < (window or 1000))
        weights = np.exp(np.where(seen, scores, -np.inf))
        return weights / weights.sum(-1, keepdims=True) @ v


def split(rng):
    """Every text in chunks of random sizes, several texts a step."""
    done = [0] * len(LENGTHS)
    while any(d < n for d, n in zip(done, LENGTHS, strict=True)):
        chunks = []
        for i in rng.permutation(len(LENGTHS)):
            if done[i] < LENGTHS[i] and rng.random() < 0.7:
                count = int(rng.integers(1, min(6, LENGTHS[i] - done[i]) + 1)) if rng.random() < 0.5 else 1
                chunks.append((int(i), done[i], done[i] + count))
                done[i] += count
        if chunks:
            yield chunks


@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (0, 2.0), (5, 1.5), (1, 0.0)])
def test_steps_compute_what_the_whole_text_computes(window, softcap):
    for seed in range(4):
        texts = Texts(seed)
        wanted = [texts.expected(i, window, softcap) for i in range(len(LENGTHS))]
        for chunks in split(texts.rng):
            feeds = texts.feeds(chunks, padding=seed % 3)
            y, keys, values = PagedAttention.reference(**feeds, **attributes(window, softcap))
            assert keys is texts.caches[0]  # in place
            assert values is texts.caches[1]
            for (i, a, b), start in zip(chunks, feeds["query_starts"], strict=False):
                np.testing.assert_allclose(y[:, :, start : start + b - a], wanted[i][:, :, a:b], rtol=1e-4, atol=1e-5)
            assert not y[:, :, feeds["query_starts"][-1] :].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (3, 0.0), (4, 1.5)])
def test_the_body_computes_the_same(window, softcap, dtype):
    texts = Texts(7, np.dtype(dtype))
    function = body(attributes(window, softcap), VALUE_SIZE, dtype, 20)
    plugin, given = PagedAttention, attributes(window, softcap)
    run = reference_runner(plugin, given, list(plugin.inputs))
    for step, chunks in enumerate(split(texts.rng)):
        feeds = texts.feeds(chunks, padding=step % 2)
        before = texts.caches[0].copy()
        actual = run(feeds)
        assert np.array_equal(texts.caches[0], before)  # a check leaves its inputs as they are
        verdict = compare(run_function(function, [], feeds), actual, plugin.tolerance)
        assert verdict.ok, verdict.reason
        texts.caches = actual[1:]


@pytest.mark.parametrize(("dtype", "opset"), [("float32", 13), ("float16", 20), ("float64", 24), ("bfloat16", 20)])
@pytest.mark.parametrize(("interleaved", "turned", "full", "norm"), [(0, 0, True, ""), (0, 4, False, "own"), (1, 0, False, ""), (1, 4, True, "own"), (0, 0, True, "float32"), (0, 0, None, "own")])
def test_the_body_normalizes_and_turns(interleaved, turned, full, norm, dtype, opset):
    """`full` None: no angles, else as many as elements are turned, or half as many."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    texts, given = Texts(7, kind), {**attributes(3, 1.0), "interleaved": interleaved, "turned": turned, "epsilon": 1e-5}
    feeds = texts.feeds([(0, 0, 7), (2, 0, 5)], padding=1)
    angles = 0 if full is None else (turned or SIZE) // (1 if full else 2)
    if angles:
        feeds |= {n: texts.rng.standard_normal((1, 1, 13, angles)).astype(kind) for n in ("cos", "sin")}
    if norm:
        feeds |= {n: texts.rng.standard_normal(SIZE).astype(kind if norm == "own" or dtype == "float64" else np.float32) for n in ("q_scale", "k_scale")}
    found = run_function(body(given, VALUE_SIZE, kind, opset, angles, bool(norm)), [], feeds)
    wanted = PagedAttention.reference(**{n: a.copy() for n, a in feeds.items()}, **given)
    assert all(w.dtype == kind for w in wanted)
    verdict = compare([f.astype(kind) for f in found], list(wanted), PagedAttention.tolerance)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("opset", [13, 18, 24])
def test_the_body_is_written_at_the_models_opset(opset):
    function = body(attributes(3, 1.0), VALUE_SIZE, "float32", opset)
    assert function.opset_import[0].version == opset
    assert list(function.attribute) == sorted(attributes())
    feeds = Texts(1).feeds([(0, 0, 7), (2, 0, 5)])
    found = run_function(function, [], feeds)
    wanted = PagedAttention.reference(**{n: a.copy() for n, a in feeds.items()}, **attributes(3, 1.0))
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-5)
    assert onnx.helper.printable_node(function.node[0])


def test_what_a_table_holds_past_its_text_is_not_read():
    texts = Texts(3)
    chunks = [(0, 0, 7), (2, 0, 13)]
    feeds = texts.feeds(chunks)
    first = PagedAttention.reference(**{n: a.copy() for n, a in feeds.items()}, **attributes())[0]
    feeds["block_tables"] = np.where(feeds["block_tables"] < 0, 10**6, feeds["block_tables"]).astype(np.int32)
    assert np.array_equal(PagedAttention.reference(**feeds, **attributes())[0], first)


@pytest.mark.parametrize("chunks", [[(0, 0, 7), (2, 0, 13)], [(1, 0, 1)], [(0, 6, 7), (3, 21, 22), (2, 12, 13)]], ids=["whole", "one", "a token each"])
def test_what_others_left_in_the_cache_does_not_count(chunks):
    """Not even NaN: past the end of a text, and in blocks that are not its own."""
    texts = Texts(3)
    feeds = texts.feeds(chunks)
    wanted = PagedAttention.reference(**{n: a.copy() for n, a in feeds.items()}, **attributes())[0]
    for cache in (feeds["key_cache"], feeds["value_cache"]):
        rows = cache.reshape(-1, *cache.shape[2:])
        own = [texts.tables[i, p // BLOCK] * BLOCK + p % BLOCK for i, _, end in chunks for p in range(end)]
        rows[np.setdiff1d(np.arange(len(rows)), own)] = np.nan
    assert np.array_equal(PagedAttention.reference(**feeds, **attributes())[0], wanted)


def test_texts_of_very_different_lengths_are_not_padded(monkeypatch):
    """One token each, computed together and one by one: the same."""
    texts = Texts(9)
    for chunks in ([(i, 0, n - 1) for i, n in enumerate(LENGTHS) if n > 1], [(i, n - 1, n) for i, n in enumerate(LENGTHS)]):
        feeds = {n: a.copy() for n, a in texts.feeds(chunks).items()}
        together = PagedAttention.reference(**texts.feeds(chunks), **attributes())
        monkeypatch.setattr("rewrite.plugins.paged_attention.are_alike", lambda lengths, window: False)
        alone = PagedAttention.reference(**feeds, **attributes())
        monkeypatch.undo()
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert are_alike(np.array([100, 120]), 0)
    assert are_alike(np.array([1, 30]), 0)  # few
    assert not are_alike(np.array([10, 20, 10_000]), 0)
    assert are_alike(np.array([400, 512, 10_000]), 512)


def test_a_text_may_read_blocks_that_another_wrote():
    """Two texts that start alike: the second computes only its own tokens."""
    texts = Texts(5)
    for arrays in (texts.q, texts.k, texts.v):
        arrays[3][:, :, :8] = arrays[2][:, :, :8]
    wanted = texts.expected(3, 0, 0.0)
    PagedAttention.reference(**texts.feeds([(2, 0, 13)]), **attributes())
    texts.tables[3, :2] = texts.tables[2, :2]
    y = PagedAttention.reference(**texts.feeds([(3, 8, 22)]), **attributes())[0]
    np.testing.assert_allclose(y, wanted[:, :, 8:], rtol=1e-4, atol=1e-5)
