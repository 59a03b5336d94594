"""CUDA kernels of the matrix products: the product by cuBLAS, bias, activation, gate and residual in one pass after it.

Sums are in float32. The pass reads and writes each element once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

Launch = Callable[[], None]

# y = f(v), in float32. erff and tanhf are the accurate ones.
ACTIVATIONS = {
    "none": "v",
    "gelu": "0.5f * v * (1.f + erff(v * 0.70710678f))",
    "gelu_tanh": "0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)))",
    "swish": "v / (1.f + expf(-v))",
    "relu": "v < 0.f ? 0.f : v",
    "tanh": "tanhf(v)",
    "sigmoid": "1.f / (1.f + expf(-v))",
}


@cache
def _epilogue(activation: str, bias: bool, residual: bool) -> Any:
    """y = activation(y + bias) + residual, in place; n is the number of columns."""
    import cupy

    lines = [f"float v = (float)y{' + (float)bias[i % n]' if bias else ''};", f"v = {ACTIVATIONS[activation]};"]
    if residual:
        lines.append("v += (float)residual;")
    inputs = ["raw T bias"] * bias + ["T residual"] * residual + ["int64 n"]
    return cupy.ElementwiseKernel(", ".join(inputs), "T y", " ".join([*lines, "y = (T)v;"]), f"epilogue_{activation}_{int(bias)}{int(residual)}")


@cache
def _gate(activation: str, bias_gate: bool, bias_up: bool) -> Any:
    """y = activation(gate + bias_gate) * (up + bias_up)."""
    import cupy

    first = f"float v = (float)gate{' + (float)bias_gate[i % n]' if bias_gate else ''};"
    second = f"float u = (float)up{' + (float)bias_up[i % n]' if bias_up else ''};"
    inputs = ["T gate", "T up"] + ["raw T bias_gate"] * bias_gate + ["raw T bias_up"] * bias_up + ["int64 n"]
    return cupy.ElementwiseKernel(", ".join(inputs), "T y", f"{first} {second} y = (T)(({ACTIVATIONS[activation]}) * u);", f"gate_{activation}_{int(bias_gate)}{int(bias_up)}")


def _supported(*arrays: Any) -> bool:
    return all(a is None or a.dtype.name in ("float16", "float32") for a in arrays)


def matmul_act(inputs: list[Any], outputs: list[Any], *, activation: str, trans_w: int) -> Launch | None:
    import cupy

    x, w, bias, residual = inputs
    if not _supported(*inputs):
        return None
    rows, columns = x.reshape(-1, x.shape[-1]), outputs[0].shape[-1]
    weight, flat = (w.T if trans_w else w), outputs[0].reshape(-1, columns)
    if bias is None and residual is None and activation == "none":
        return lambda: cupy.matmul(rows, weight, out=flat) and None
    kernel = _epilogue(activation, bias is not None, residual is not None)
    operands = [a for a in (bias, None if residual is None else residual.reshape(flat.shape)) if a is not None]

    def launch() -> None:
        cupy.matmul(rows, weight, out=flat)
        kernel(*operands, columns, flat)

    return launch


def gated_matmul_act(inputs: list[Any], outputs: list[Any], *, activation: str, merged: str, trans_w: int) -> Launch | None:
    import cupy

    x, w_gate, w_up, bias_gate, bias_up = inputs
    if not _supported(*inputs) or merged != "none" or w_up is None:
        return None
    rows, columns = x.reshape(-1, x.shape[-1]), outputs[0].shape[-1]
    flat = outputs[0].reshape(-1, columns)
    gate, up = cupy.empty_like(flat), cupy.empty_like(flat)
    weights = [w.T if trans_w else w for w in (w_gate, w_up)]
    kernel = _gate(activation, bias_gate is not None, bias_up is not None)
    biases = [b for b in (bias_gate, bias_up) if b is not None]

    def launch() -> None:
        cupy.matmul(rows, weights[0], out=gate)
        cupy.matmul(rows, weights[1], out=up)
        kernel(gate, up, *biases, columns, flat)

    return launch
