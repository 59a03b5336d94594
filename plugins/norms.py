"""Normalizations over the last axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewrite.plugins.activations import Array, wide
from rewrite.plugins.cuda_norms import layer_norm, rms_link, rms_norm
from rewrite.registry import plugin

# In float64 no nearer than the attribute epsilon, which ONNX stores in single precision.
TOLERANCE = {"float64": (1e-7, 1e-7), "float32": (2e-5, 5e-6), "float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 8e-3)}
MAGNITUDES = (1.0, 1e-3, 3e-6, 1e3, 3e-2)


def sample(rng: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Rows of magnitudes from 3e-6, where the smallest epsilons in use (1e-12) tell, to 1e3 (6e4 / 3 in float16)."""
    if name != "x" or len(shape) < 2:
        return None
    rows = int(np.prod(shape[:-1]))
    magnitude = np.resize(np.roll(MAGNITUDES, rng.integers(len(MAGNITUDES))), rows).reshape(*shape[:-1], 1)
    if np.dtype(dtype) == np.float16:
        magnitude = np.where(magnitude > 100, 2e4, np.maximum(magnitude, 1e-3))
    return np.asarray(np.clip((rng.standard_normal(shape) + 0.3) * magnitude, -6e4, 6e4)).astype(dtype)


@plugin
class RMSNormalization:
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32."""

    inputs = ("x", "scale")
    attributes = {"axis": -1, "epsilon": 1e-5}
    since = 23
    tolerance = TOLERANCE
    sample = sample
    cuda = rms_norm
    link = rms_link
    kernels = ("float16", "bfloat16")

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
    sample = sample
    cuda = layer_norm
    kernels = ("float16", "bfloat16")

    def reference(x: Array, scale: Array, bias: Array | None = None, *, axis: int, epsilon: float) -> Array:
        w = wide(x)
        centred = w - w.mean(-1, keepdims=True)
        y = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + epsilon) * wide(scale)
        return (y if bias is None else y + wide(bias)).astype(x.dtype)
