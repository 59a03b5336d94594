"""Activations that ONNX has from some opset on, and older exports spell out."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewrite.registry import plugin

Array = np.ndarray[Any, Any]


def wide(x: Array) -> Array:
    """In float64 for float64, else in float32: what kernels accumulate in."""
    return x if x.dtype == np.float64 else x.astype(np.float32)


def erf(x: Array) -> Array:
    """The error function, to 1e-7 for float32 and 1e-15 for float64 (by the C library)."""
    import math

    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x), x.dtype) if x.size else x


def gelu(x: Array, approximate: str = "none") -> Array:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / np.sqrt(2).astype(x.dtype)))


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def activate(x: Array, activation: str) -> Array:
    """Apply an activation by the name that plugins carry in their attribute `activation`."""
    if activation == "none":
        return x
    if activation in ("gelu", "gelu_tanh"):
        return gelu(x, "tanh" if activation == "gelu_tanh" else "none")
    if activation == "swish":
        return x * sigmoid(x)
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "tanh":
        return np.tanh(x)
    if activation == "sigmoid":
        return sigmoid(x)
    raise ValueError(f"unknown activation {activation!r}")


TOLERANCE = {"float64": (1e-7, 1e-7), "float32": (2e-5, 2e-6), "float16": (1e-3, 1e-3), "bfloat16": (8e-3, 8e-3)}


@plugin
class Gelu:
    """Gaussian error linear unit, y = x * Phi(x); `approximate` "tanh" replaces Phi by its tanh form."""

    inputs = ("x",)
    attributes = {"approximate": "none"}
    since = 20
    tolerance = TOLERANCE

    def reference(x: Array, *, approximate: str) -> Array:
        return gelu(wide(x), approximate).astype(x.dtype)


@plugin
class Swish:
    """y = x * sigmoid(alpha * x), also called SiLU."""

    inputs = ("x",)
    attributes = {"alpha": 1.0}
    since = 24
    tolerance = TOLERANCE

    def reference(x: Array, *, alpha: float) -> Array:
        return (wide(x) * sigmoid(np.asarray(alpha * wide(x)))).astype(x.dtype)
