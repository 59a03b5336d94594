"""Matrix products with what follows them: bias, residual, activation, gate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rewrite.plugins.activations import Array, activate, wide
from rewrite.plugins.cuda_gemm import ACTIVATIONS
from rewrite.plugins.cuda_matmul import gated_link, gated_matmul_act, matmul_act, matmul_link, merged_matmul_act
from rewrite.registry import plugin

TOLERANCE = {"float64": (1e-9, 1e-9), "float32": (3e-5, 1e-5), "float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 8e-3)}


def sample(rng: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Weights shrunk by the square root of their rows, so that products stay near 1."""
    if name.startswith("w") and len(shape) == 2:
        return np.asarray(rng.standard_normal(shape) / np.sqrt(max(shape[0], 1))).astype(dtype)
    return None


def product(x: Array, w: Array, bias: Array | None, trans_w: int) -> Array:
    y = np.matmul(wide(x), wide(w.T if trans_w else w))
    return y if bias is None else y + wide(bias)


def product_operations(inputs: list[Any], outputs: list[Any], **_: Any) -> int:
    return int(2 * math.prod(outputs[0]) * inputs[0][-1])


def gated_operations(inputs: list[Any], outputs: list[Any], **_: Any) -> int:
    return 2 * product_operations(inputs, outputs)


@plugin
class MatMulAct:
    """y = activation(x @ w + bias) + residual.

    x [..., K], w [K, N] (or [N, K] with trans_w), bias [N], residual like y [..., N]. `activation` is none, gelu,
    gelu_tanh, quick_gelu (x * sigmoid(1.702 x)), swish, relu, relu2 (squared), tanh or sigmoid.
    """

    inputs = ("x", "w", "bias?", "residual?")
    attributes = {"activation": "none", "trans_w": 0}
    kinds = ACTIVATIONS[1:]
    tolerance = TOLERANCE
    sample = sample
    cuda = matmul_act
    merged = merged_matmul_act
    link = matmul_link
    transposable = ("w",)
    operations = product_operations

    def reference(x: Array, w: Array, bias: Array | None = None, residual: Array | None = None, *, activation: str, trans_w: int) -> Array:
        y = activate(product(x, w, bias, trans_w), activation)
        return (y if residual is None else y + wide(residual)).astype(x.dtype)


@plugin
class GatedMatMulAct:
    """y = activation(x @ w_gate + bias_gate) * (x @ w_up + bias_up): SwiGLU, GeGLU and their kin.

    x [..., K], w_gate and w_up [K, N] (or [N, K] with trans_w), biases [N], y [..., N]. With `merged` "gate_up" or
    "up_gate", w_gate [K, 2N] and bias_gate [2N] hold both, in this order, and w_up and bias_up are absent.
    """

    inputs = ("x", "w_gate", "w_up?", "bias_gate?", "bias_up?")
    attributes = {"activation": "swish", "merged": "none", "trans_w": 0}
    kinds = (*ACTIVATIONS[1:], "gate_up", "up_gate")
    tolerance = TOLERANCE
    sample = sample
    cuda = gated_matmul_act
    link = gated_link
    transposable = ("w_gate", "w_up")
    operations = gated_operations

    def reference(
        x: Array, w_gate: Array, w_up: Array | None = None, bias_gate: Array | None = None, bias_up: Array | None = None, *, activation: str, merged: str, trans_w: int
    ) -> Array:
        gate = product(x, w_gate, bias_gate, trans_w)
        if w_up is None:
            first, second = np.split(gate, 2, axis=-1)
            gate, up = (first, second) if merged == "gate_up" else (second, first)
        else:
            up = product(x, w_up, bias_up, trans_w)
        return (activate(gate, activation) * up).astype(x.dtype)
