"""Activations that ONNX has from some opset on, and older exports spell out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rewrite.registry import plugin

Array = np.ndarray[Any, Any]


def wide(x: Array) -> Array:
    """In float64 for float64, else in float32: what kernels accumulate in."""
    return x if x.dtype == np.float64 else x.astype(np.float32, copy=False)


# erf(x) = x P(x^2) / Q(x^2) on [-4, 4] in float32, as Eigen and ONNX Runtime compute it.
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02)


def erf(x: Array) -> Array:
    """The error function: to 5e-7 for float32, to 1e-15 for float64 (by the C library)."""
    if x.dtype == np.float64:
        return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x)) if x.size else x
    clipped = np.clip(x, -4, 4)
    square = clipped * clipped
    above, below = np.full_like(square, _ERF_P[0]), np.full_like(square, _ERF_Q[0])
    for factor in _ERF_P[1:]:
        above = above * square + np.float32(factor)
    for factor in _ERF_Q[1:]:
        below = below * square + np.float32(factor)
    return np.asarray(clipped * above / below)


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
    if activation == "quick_gelu":
        return x * sigmoid(np.asarray(np.asarray(1.702, x.dtype) * x))
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "relu2":
        return np.square(np.maximum(x, 0))
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
    kinds = ("tanh",)
    since = 20
    tolerance = TOLERANCE

    def reference(x: Array, *, approximate: str) -> Array:
        return gelu(wide(x), approximate).astype(x.dtype)


@plugin
class Swish:
    """y = x * sigmoid(alpha * x), also called SiLU."""

    inputs = ("x",)
    attributes = {"alpha": 1.0}
    since = 1 << 16  # ONNX has it from 24 on, but ONNX Runtime 1.32 finds no kernel for it in opsets 25 and later
    tolerance = TOLERANCE

    def reference(x: Array, *, alpha: float) -> Array:
        return (wide(x) * sigmoid(np.asarray(alpha * wide(x)))).astype(x.dtype)
