"""Normalizations over the last axis."""

from __future__ import annotations

import numpy as np

from rewrite.plugins.activations import Array, wide
from rewrite.registry import plugin

TOLERANCE = {"float64": (1e-9, 1e-9), "float32": (2e-5, 5e-6), "float16": (3e-3, 2e-3), "bfloat16": (2e-2, 1.6e-2)}


@plugin
class RMSNormalization:
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32."""

    inputs = ("x", "scale")
    attributes = {"axis": -1, "epsilon": 1e-5}
    since = 23
    tolerance = TOLERANCE

    def reference(x: Array, scale: Array, *, axis: int, epsilon: float) -> Array:
        w = wide(x)
        y = w / np.sqrt(np.mean(w * w, axis=-1, keepdims=True) + epsilon)
        return (y * wide(scale)).astype(scale.dtype)


@plugin
class LayerNormalization:
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias over the last axis, computed in float32."""

    inputs = ("x", "scale", "bias?")
    attributes = {"axis": -1, "epsilon": 1e-5}
    since = 17
    tolerance = TOLERANCE

    def reference(x: Array, scale: Array, bias: Array | None = None, *, axis: int, epsilon: float) -> Array:
        w = wide(x)
        centred = w - w.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * wide(scale)
        return (y if bias is None else y + wide(bias)).astype(x.dtype)
