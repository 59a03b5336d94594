"""Scaled dot-product attention."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rewrite.plugins.activations import Array, wide
from rewrite.plugins.cuda_attention import attention
from rewrite.registry import plugin


def sample_mask(rng: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Masks that hide about a third of the keys, and every key of the last query of the first batch row."""
    if name != "mask" or not shape:
        return None
    keep = rng.random(shape) < 0.67
    keep[..., 0] = True
    if dtype == np.bool_:
        keep.reshape(-1, shape[-1])[-1] = False
        return np.asarray(keep)
    lowest = np.finfo(np.float32).min if np.dtype(dtype).itemsize > 2 else np.finfo(np.float16).min
    return np.where(keep, 0, lowest).astype(dtype)


def operations(inputs: list[Any], outputs: list[Any], *, causal: int, **_: Any) -> int:
    """Of both products, for the keys that a query can see."""
    q, k, v = inputs[:3]
    queries, keys = q[-2], k[-2]
    seen = sum(min(i + 1, keys) for i in range(queries)) if causal else queries * keys
    return int(2 * math.prod(q[:-2]) * seen * (q[-1] + v[-1]))


@plugin
class FusedAttention:
    """y = softmax(softcap(scale * q @ k^T) + mask) @ v, head by head.

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, E] with H a multiple of G (each key head serves H / G query heads),
    or all three without the axis of the heads, which is one head (heads folded into B, as bmm wants them);
    mask broadcast to [B, H, S, T]: boolean (True: attend; others get the score `fill`) or added to the scores,
    y [B, H, S, E]. `drop` inverts a boolean mask. `zero_masked`: rows whose softmax is NaN give 0. `softcap` c > 0:
    c * tanh(score / c). `causal`: query i sees the keys 0 to i alone (as ONNX counts without a cache, whatever T is),
    further narrowed by the mask. Softmax is computed in float32.
    """

    inputs = ("q", "k", "v", "mask?")
    attributes = {"scale": 1.0, "softcap": 0.0, "fill": 0.0, "drop": 0, "zero_masked": 0, "causal": 0}
    # In float64 no nearer than the attribute scale, which ONNX stores in single precision.
    tolerance = {"float64": (1e-6, 1e-6), "float32": (5e-5, 1e-5), "float16": (2e-3, 2e-3), "bfloat16": (1.6e-2, 1.6e-2)}
    sample = sample_mask
    cuda = attention
    operations = operations
    strided = True

    def reference(
        q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float, softcap: float, fill: float, drop: int, zero_masked: int, causal: int
    ) -> Array:
        keys, values = wide(k), wide(v)
        if q.ndim == 4:
            groups = q.shape[1] // k.shape[1]
            keys, values = np.repeat(keys, groups, 1), np.repeat(values, groups, 1)
        scores = np.matmul(wide(q), keys.swapaxes(-1, -2)) * np.asarray(scale, wide(q).dtype)
        if softcap:
            scores = np.tanh(scores / softcap) * softcap
        if mask is not None and mask.dtype == np.bool_:
            scores = np.where(mask ^ bool(drop), scores, np.asarray(fill, scores.dtype))
        elif mask is not None:
            scores = scores + wide(mask)
        if causal:
            scores = np.where(np.arange(scores.shape[-1], like=q) <= np.arange(scores.shape[-2], like=q)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        if zero_masked:
            weights = np.nan_to_num(weights, nan=0.0)
        return np.matmul(weights, values).astype(q.dtype)
