"""The CUDA kernel of AttentionMask (`masks.cu`)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from rewrite.plugins.cuda_launch import Launch, launcher, module

TYPES = {"int64": "long long", "int32": "int", "bool": "u8", "uint8": "u8", "int8": "signed char", "float32": "float", "float64": "double"}
TESTS = ("!=", "==", ">")


class _Call(ctypes.Structure):
    _fields_ = [
        ("y", ctypes.c_void_p), ("padding", ctypes.c_void_p), *((n, ctypes.c_longlong) for n in ("pitch", "yb", "yh", "ys", "yt")),
        *((n, ctypes.c_int) for n in ("heads", "keys", "all", "offset", "causal", "window", "test", "unmask")), ("against", ctypes.c_double),
        *((n, ctypes.c_uint64) for n in ("seen", "fill", "padding_fill", "both_fill")),
    ]  # fmt: skip


def attention_mask(
    inputs: list[Any], outputs: list[Any], *, causal: int, window: int, align: str, test: str, against: float, binary: int, unmask_empty: int, layout: str, heads: int,
    dtype: str, invert: int, fill: float, split: int, padding_fill: float, both_fill: float, batch_axis: int, query_axis: int, past_axis: int,
) -> Launch | None:  # fmt: skip
    (padding, source, past), y = inputs, outputs[0]
    if padding is not None and (padding.dtype.name not in TYPES or not padding.flags.c_contiguous):
        return None
    queries = (source if source is not None else padding).shape[query_axis]
    keys = queries if padding is None else padding.shape[1]
    if past is not None:
        keys = past.shape[past_axis] + queries
    width = y.dtype.itemsize

    def bits(value: Any) -> int:
        return int(np.array(value).astype(y.dtype).view(f"uint{8 * width}"))

    hidden = (fill, padding_fill if split else fill, both_fill if split else fill) if dtype != "bool" else (bool(invert),) * 3
    strides = {letter: s // width for letter, s, n in zip(layout, y.strides, y.shape, strict=True) if letter != "1" and n > 1}
    sizes = dict(zip(layout, y.shape, strict=True))
    rounded = 0.0 if padding is None else float(padding.dtype.type(against))
    call = _Call(
        int(y.data.ptr), None if padding is None else int(padding.data.ptr), 0 if padding is None else padding.shape[1], *(strides.get(n, 0) for n in "BHST"),
        sizes.get("H", 1) if strides.get("H", 0) else 1, sizes.get("T", 1), keys, keys - queries if align == "end" else 0, causal, window, TESTS.index(test), unmask_empty, rounded,
        bits(not invert if dtype == "bool" else 0.0), *(bits(v) for v in hidden),
    )  # fmt: skip
    kind = "u8" if padding is None else TYPES[padding.dtype.name]
    function = module("masks", "float16", (f"PADDING={kind}", f"OUT=u{8 * width}")).get_function("mask")
    grid = (sizes.get("S", 1) if strides.get("S", 0) else 1, sizes.get("B", 1) if strides.get("B", 0) else 1)
    return launcher(function, grid, 128, [call], keep=(padding, y))


def view(y: Any, *, causal: int, window: int, layout: str, **others: Any) -> Any:
    """The result as a view of one query's row where all have the same mask, so that it is written and read once."""
    if causal or window or "S" not in layout:
        return y
    axis = layout.index("S")
    import cupy

    return cupy.broadcast_to(y[(slice(None),) * axis + (slice(0, 1),)], y.shape)
