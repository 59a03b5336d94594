"""CUDA kernels of the matrix products: cuBLASLt with bias, ReLU and residual in its epilogue; other activations and the
gate in one pass after it. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from rewrite.plugins.cublaslt import product

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
def _epilogue(activation: str, residual: bool) -> Any:
    """y = activation(y) + residual, in place."""
    import cupy

    added = " + (float)residual" if residual else ""
    return cupy.ElementwiseKernel("T residual" if residual else "", "T y", f"float v = (float)y; y = (T)(({ACTIVATIONS[activation]}){added});", f"epilogue_{activation}_{int(residual)}")


@cache
def _gate(activation: str) -> Any:
    """y = activation(gate) * up."""
    import cupy

    return cupy.ElementwiseKernel("T gate, T up", "T y", f"float v = (float)gate; y = (T)(({ACTIVATIONS[activation]}) * (float)up);", f"gate_{activation}")


def _supported(*arrays: Any) -> bool:
    return all(a is None or a.dtype.name in ("float16", "float32") for a in arrays)


def _matrix(a: Any) -> Any:
    """[..., N] as one batch of rows, [1, M, N]."""
    return a.reshape(1, -1, a.shape[-1])


def matmul_act(inputs: list[Any], outputs: list[Any], *, activation: str, trans_w: int) -> Launch | None:
    x, w, bias, residual = inputs
    if not _supported(*inputs):
        return None
    y = _matrix(outputs[0])
    added = None if residual is None else _matrix(residual)
    late = activation not in ("none", "relu") or (activation == "relu" and residual is not None)
    multiply = product(
        y, _matrix(x), w[None], trans_w=bool(trans_w), bias=bias, residual=None if late else added, relu=activation == "relu" and not late,
    )  # fmt: skip
    if not late:
        return multiply
    kernel = _epilogue(activation, residual is not None)
    operands = () if added is None else (added,)

    def launch() -> None:
        multiply()
        kernel(*operands, y)

    return launch


def gated_matmul_act(inputs: list[Any], outputs: list[Any], *, activation: str, merged: str, trans_w: int) -> Launch | None:
    import cupy

    x, w_gate, w_up, bias_gate, bias_up = inputs
    if not _supported(*inputs) or merged != "none" or w_up is None:
        return None
    y = _matrix(outputs[0])
    gate, up = cupy.empty_like(y), cupy.empty_like(y)
    first = product(gate, _matrix(x), w_gate[None], trans_w=bool(trans_w), bias=bias_gate)
    second = product(up, _matrix(x), w_up[None], trans_w=bool(trans_w), bias=bias_up)
    kernel = _gate(activation)

    def launch() -> None:
        first()
        second()
        kernel(gate, up, y)

    return launch
