"""Matrix products with what follows them: bias, residual, activation, gate."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewrite.plugins.activations import Array, activate, wide
from rewrite.registry import plugin

TOLERANCE = {"float64": (1e-9, 1e-9), "float32": (3e-5, 1e-5), "float16": (4e-3, 4e-3), "bfloat16": (3e-2, 2e-2)}


def sample(rng: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Weights shrunk by the square root of their rows, so that products stay near 1."""
    if name.startswith("w") and len(shape) == 2:
        return np.asarray(rng.standard_normal(shape) / np.sqrt(max(shape[0], 1))).astype(dtype)
    return None


def product(x: Array, w: Array, bias: Array | None) -> Array:
    y = np.matmul(wide(x), wide(w))
    return y if bias is None else y + wide(bias)


@plugin
class MatMulAct:
    """y = activation(x @ w + bias) + residual.

    x [..., K], w [K, N] (or [N, K] with trans_w), bias [N], residual like y [..., N].
    """

    inputs = ("x", "w", "bias?", "residual?")
    attributes = {"activation": "none", "trans_w": 0}
    tolerance = TOLERANCE
    sample = sample

    def reference(x: Array, w: Array, bias: Array | None = None, residual: Array | None = None, *, activation: str, trans_w: int) -> Array:
        y = activate(product(x, w.T if trans_w else w, bias), activation)
        return (y if residual is None else y + wide(residual)).astype(x.dtype)


@plugin
class GatedMatMulAct:
    """y = activation(x @ w_gate + bias_gate) * (x @ w_up + bias_up): SwiGLU, GeGLU and their kin.

    x [..., K], w_gate and w_up [K, N], biases [N], y [..., N].
    """

    inputs = ("x", "w_gate", "w_up", "bias_gate?", "bias_up?")
    attributes = {"activation": "swish"}
    tolerance = TOLERANCE
    sample = sample

    def reference(x: Array, w_gate: Array, w_up: Array, bias_gate: Array | None = None, bias_up: Array | None = None, *, activation: str) -> Array:
        return (activate(product(x, w_gate, bias_gate), activation) * product(x, w_up, bias_up)).astype(x.dtype)
