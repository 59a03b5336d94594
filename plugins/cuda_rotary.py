"""The CUDA kernel of Rotary (`rotary.cu`)."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from rewrite.plugins.cuda_launch import Launch, launcher, module
from rewrite.plugins.cuda_paged import Turn


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("y", "x", "cos", "sin")), ("sizes", ctypes.c_int * 4),
        *((n, ctypes.c_longlong * 4) for n in ("ys", "xs", "cs", "ss")),
    ]  # fmt: skip


def steps(array: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Strides, in elements, of the axes of `shape` before the last, 0 where `array` is repeated; None if it does not broadcast to it."""
    axes = (*(1,) * (len(shape) + 1 - array.ndim), *array.shape[:-1])
    strides = (*(0,) * (len(shape) + 1 - array.ndim), *array.strides[:-1])
    if len(axes) != len(shape) or any(a not in (1, n) for a, n in zip(axes, shape, strict=True)):
        return None
    return tuple(0 if a == 1 else n // array.itemsize for a, n in zip(axes, strides, strict=True))


def rotary(inputs: list[Any], outputs: list[Any], *, interleaved: int, size: int) -> Launch | None:
    """The launch; None where there is no kernel for these arrays: more than five dimensions, another type, a last axis that is not packed."""
    x, cos, sin = inputs
    y, width = outputs[0], x.shape[-1]
    size = size or width
    if x.dtype.name not in ("float16", "bfloat16", "float32") or not 2 <= x.ndim <= 5 or any(a.dtype != x.dtype or a.strides[-1] != a.itemsize for a in (x, cos, sin, y)):
        return None
    if size % 2 or size > width or cos.shape[-1] not in (size, size // 2) or sin.shape[-1] != cos.shape[-1] or x.size // width >= 1 << 31:
        return None
    if x.ndim == 4:
        cos, sin = (a[:, None] if a.ndim == 3 else a for a in (cos, sin))
    leading = x.shape[:-1]
    strides = [steps(a, leading) for a in (y, x, cos, sin)]
    if any(s is None for s in strides):
        return None
    if not x.size:
        return lambda: None
    more = 4 - len(leading)
    call = _Call(*(int(a.data.ptr) for a in (y, x, cos, sin)), (ctypes.c_int * 4)(*(1,) * more, *leading), *((ctypes.c_longlong * 4)(*(0,) * more, *(s or ())) for s in strides))
    turn = Turn(2 if interleaved else 1, size, cos.shape[-1])
    function = module("rotary", x.dtype.name, (f"SIZE={width}", f"FLOAT32={int(x.dtype.name == 'float32')}", *turn.defines())).get_function("rotary")
    return launcher(function, (-(-math.prod(leading) // 4),), 128, [call], keep=(x, cos, sin, y))
