"""CUDA kernels of the normalizations (`norms.cu`)."""

from __future__ import annotations

import ctypes
from typing import Any

from rewrite.plugins.cuda_chain import Norm
from rewrite.plugins.cuda_launch import Launch, launcher, module

VECTORS = {1: (1, 2, 3, 4), 8: (1, 2, 4, 8)}  # by warps a row: how many times 8 elements a thread may hold


def _layout(width: int) -> tuple[int, int] | None:
    """Vectors a thread and warps a row for a width, or None if it is too large."""
    for warps, counts in VECTORS.items():
        for count in counts:
            if width <= count * warps * 256:
                return count, warps
    return None


def norm(kind: str, x: Any, scale: Any, bias: Any, y: Any, epsilon: float) -> Launch | None:
    """y = the `kind` ("layer" or "rms") norm of the rows of x [..., N]; None where there is no kernel for these arrays."""
    arrays = [a for a in (x, scale, bias, y) if a is not None]
    width = x.shape[-1]
    layout = _layout(width)
    if x.dtype.name not in ("float16", "bfloat16") or layout is None or width % 8 or scale.shape != (width,):
        return None
    if any(a.dtype != x.dtype or not a.flags.c_contiguous or a.data.ptr % 16 for a in arrays):
        return None
    count, warps = layout
    rows = x.size // width
    function = module("norms", x.dtype.name).get_function(f"{kind}_{count}_{warps}")
    grid, block = ((-(-rows // 4),), 128) if warps == 1 else ((rows,), 256)
    return launcher(function, grid, block, [y, x, scale, bias, ctypes.c_int(rows), ctypes.c_int(width), ctypes.c_float(epsilon)])


def layer_norm(inputs: list[Any], outputs: list[Any], *, axis: int, epsilon: float) -> Launch | None:
    x, scale, bias = inputs
    return norm("layer", x, scale, bias, outputs[0], epsilon)


def rms_norm(inputs: list[Any], outputs: list[Any], *, axis: int, epsilon: float) -> Launch | None:
    x, scale = inputs
    return norm("rms", x, scale, None, outputs[0], epsilon)


def rms_link(inputs: list[Any], outputs: list[Any], *, axis: int, epsilon: float) -> Norm | None:
    x, scale = inputs
    width = x.shape[-1]
    return Norm(x.reshape(-1, width), scale, outputs[0].reshape(-1, width), epsilon) if scale.shape == (width,) else None
