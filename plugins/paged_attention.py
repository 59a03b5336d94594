"""Attention of packed tokens over a paged cache of keys and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewrite.plugins.activations import Array, wide
from rewrite.plugins.cuda_paged import paged_attention
from rewrite.plugins.norms import RMSNormalization
from rewrite.plugins.rotary import Rotary
from rewrite.registry import plugin

FEW = 4096  # positions that are padded without asking


def sample(rng: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Integers for as many sequences as tokens, one token each, in blocks that are all the first: up to three keys, which other tokens have just stored."""
    if name == "slots" or name == "query_starts":
        return np.arange(shape[0], dtype=dtype)
    if name == "block_tables":
        return np.zeros(shape, dtype)
    return np.asarray(1 + np.arange(shape[0]) % 3, dtype) if name == "context_lengths" else None


@plugin
class PagedAttention:
    """Causal attention of T new tokens of up to B sequences, packed one after the other, over all keys of their sequences.

    q [1, H, T, D], k [1, G, T, D], v [1, G, T, E]: the new tokens; each of the G key heads serves H / G query heads.
    key_cache [N, S, G, D], value_cache [N, S, G, E]: N blocks of S positions. slots int32 [T]: where the key and value of
    each token are stored, block * S + offset; negative: nowhere. block_tables int32 [B, M]: the blocks of each sequence in
    order, anything where it needs fewer. query_starts int32 [B + 1]: the tokens of sequence b are those from
    query_starts[b] up to query_starts[b + 1]. context_lengths int32 [B]: keys of each sequence, the new ones included; its
    last new token stands at the last of these positions.

    The keys and values are stored first. Then y = softmax(softcap(scale * q @ k^T)) @ v over the keys of the same sequence
    at the token's own position or before; with `window` w > 0 only those less than w before it. `softcap` c > 0:
    c * tanh(score / c). Tokens past the last sequence give 0. y [1, H, T, E]; keys and values are the updated caches, the
    same arrays where an executor updates in place. Softmax is computed in float32. `layer` counts the attentions of a model.

    With q_scale and k_scale [D], of the same type or float32, queries and keys are normalized first: x / sqrt(mean(x^2) + epsilon) * scale, head by head. With cos and
    sin they are turned then, as Rotary turns them: `turned` of their elements (0: all), `interleaved` or by halves. Keys are stored so.
    """

    inputs = ("q", "k", "v", "key_cache", "value_cache", "slots", "block_tables", "query_starts", "context_lengths", "cos?", "sin?", "q_scale?", "k_scale?")
    outputs = ("y", "keys", "values")
    updates = {"key_cache": "keys", "value_cache": "values"}
    attributes = {"heads": 1, "kv_heads": 1, "size": 0, "scale": 1.0, "window": 0, "softcap": 0.0, "layer": 0, "interleaved": 0, "turned": 0, "epsilon": 1e-6}
    tolerance = {"float64": (1e-9, 1e-9), "float32": (5e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (1.6e-2, 1.6e-2)}
    sample = sample
    cuda = paged_attention
    strided = True

    def reference(
        q: Array, k: Array, v: Array, key_cache: Array, value_cache: Array, slots: Array, block_tables: Array, query_starts: Array, context_lengths: Array,
        cos: Array | None = None, sin: Array | None = None, q_scale: Array | None = None, k_scale: Array | None = None,
        *, heads: int, kv_heads: int, size: int, scale: float, window: int, softcap: float, layer: int, interleaved: int = 0, turned: int = 0, epsilon: float = 1e-6,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        if q_scale is not None and k_scale is not None:
            q, k = (RMSNormalization.reference(x, s, axis=-1, epsilon=epsilon).astype(x.dtype) for x, s in ((q, q_scale), (k, k_scale)))
        if cos is not None and sin is not None:
            q, k = (Rotary.reference(x, cos, sin, interleaved=interleaved, size=turned) for x in (q, k))
        store(key_cache, k, slots)
        store(value_cache, v, slots)
        y = np.zeros((1, heads, q.shape[2], v.shape[3]), q.dtype, like=q)
        groups = (kv_heads, heads // kv_heads)
        counts = query_starts[1:] - query_starts[:-1]
        if len(counts) == q.shape[2] and bool((counts == 1).all()) and are_alike(context_lengths, window):  # one new token each: all sequences at once
            queries = q[0].transpose(1, 0, 2).reshape(-1, *groups, 1, q.shape[3])
            found = attend(queries, key_cache, value_cache, block_tables, context_lengths - 1, context_lengths, scale, window, softcap)
            y[0] = found.reshape(-1, heads, v.shape[3]).transpose(1, 0, 2)
            return y, key_cache, value_cache
        for b in range(len(counts)):
            first, last = int(query_starts[b]), int(query_starts[b + 1])
            if first == last:
                continue
            queries = q[0, :, first:last].reshape(1, *groups, last - first, q.shape[3])
            row = slice(b, b + 1)
            found = attend(queries, key_cache, value_cache, block_tables[row], context_lengths[row] - (last - first), context_lengths[row], scale, window, softcap)
            y[0, :, first:last] = found.reshape(heads, last - first, v.shape[3])
        return y, key_cache, value_cache


def are_alike(lengths: Array, window: int) -> bool:
    """Whether texts are so alike in length that they may be padded to the longest: at most half of what is gathered is padding."""
    seen = np.minimum(lengths, window) if window else lengths
    return bool(int(seen.max()) * len(seen) <= max(2 * int(seen.sum()), FEW))


def store(cache: Array, new: Array, slots: Array) -> None:
    """Write new [1, G, T, D] into cache [N, S, G, D] at `slots` [T]; negative ones are left out."""
    rows, places = cache.reshape(-1, *cache.shape[2:]), new[0].transpose(1, 0, 2)
    used = slots >= 0
    rows[slots[used]] = places[used]


def attend(queries: Array, key_cache: Array, value_cache: Array, tables: Array, first: Array, lengths: Array, scale: float, window: int, softcap: float) -> Array:
    """Attention of queries [B, G, R, Q, D], the q-th at position first[b] + q, over the lengths[b] keys of each sequence.

    Only blocks that some query sees are gathered, and of what lies past a sequence's keys nothing counts: a NaN that others left there
    would outlive a weight of 0. Returns [B, G, R, Q, E] in the type of the queries.
    """
    batch, heads, repeats, count, size = queries.shape
    block = key_cache.shape[1]
    begin = np.maximum(first - window + 1, 0) // block if window else np.zeros_like(first)
    most = int(((lengths + block - 1) // block - begin).max())
    columns = begin[:, None] + np.arange(most, like=tables)
    blocks = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), 1)
    blocks = np.where(columns * block < lengths[:, None], blocks, 0)  # what a table holds past its sequence is not read
    lie = _as_slice(blocks[0]) if batch == 1 else blocks  # gathered or, where the blocks of one text follow one another, as they lie
    keys, values = (wide(cache[lie]).reshape(batch, -1, heads, cache.shape[3]) for cache in (key_cache, value_cache))
    places = begin[:, None] * block + np.arange(keys.shape[1], like=tables)
    if batch == 1:
        there = int(lengths[0] - begin[0] * block)
        keys, values, places = keys[:, :there], values[:, :there], places[:, :there]
    else:
        values[places >= lengths[:, None]] = 0
    keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    scores = np.matmul(wide(queries).reshape(batch, heads, repeats * count, size), keys) * np.asarray(scale, values.dtype)
    if softcap:
        scores = np.tanh(scores / softcap) * softcap
    scores = scores.reshape(batch, heads, repeats, count, -1)
    distance = first[:, None, None] + np.arange(count, like=tables)[:, None] - places[:, None]
    seen = (distance >= 0) & (distance < window) if window else distance >= 0
    scores = np.where(seen[:, None, None], scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), np.finfo(np.float32).min))  # a sequence without keys sees nothing
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
    y = np.matmul(weights.reshape(batch, heads, repeats * count, -1), values)
    return y.reshape(batch, heads, repeats, count, -1).astype(queries.dtype)


def _as_slice(blocks: Array) -> Array | slice:
    """Blocks that follow one another as a slice, which copies nothing."""
    start, count = int(blocks[0]), len(blocks)
    follow = start >= 0 and bool((blocks == start + np.arange(count, like=blocks)).all())
    return slice(start, start + count) if follow else blocks
