"""Rotary position embedding."""

from __future__ import annotations

import numpy as np

from rewrite.plugins.activations import Array, wide
from rewrite.plugins.cuda_rotary import rotary
from rewrite.registry import plugin


@plugin
class Rotary:
    """Rotary position embedding: y = x * cos + rotate(x) * sin on the first `size` elements of the last axis (0: all).

    x [..., D]. rotate(x) is (-second half, first half), or with `interleaved` (-odd, even) in pairs. cos and sin have
    `size` elements in the last dimension, or half as many, which then serve both members of each pair; they broadcast
    to x, but of shape [B, S, n] for x [B, H, S, D] they serve every head.
    """

    inputs = ("x", "cos", "sin")
    attributes = {"interleaved": 0, "size": 0}
    tolerance = {"float64": (1e-12, 1e-12), "float32": (1e-6, 1e-6), "float16": (1e-3, 1e-3), "bfloat16": (8e-3, 8e-3)}
    cuda = rotary
    strided = True

    def reference(x: Array, cos: Array, sin: Array, *, interleaved: int, size: int) -> Array:
        size = size or x.shape[-1]
        part, kept = wide(x[..., :size]), x[..., size:]
        angles = []
        for turn in (wide(cos), wide(sin)):
            if x.ndim == 4 and turn.ndim == 3:
                turn = turn[:, None]
            if turn.shape[-1] * 2 == size:
                turn = np.repeat(turn, 2, -1) if interleaved else np.concatenate([turn, turn], -1)
            angles.append(turn)
        if interleaved:
            turned = np.stack([-part[..., 1::2], part[..., 0::2]], -1).reshape(part.shape)
        else:
            turned = np.concatenate([-part[..., size // 2 :], part[..., : size // 2]], -1)
        y = (part * angles[0] + turned * angles[1]).astype(x.dtype)
        return np.concatenate([y, kept], -1) if kept.shape[-1] else y
