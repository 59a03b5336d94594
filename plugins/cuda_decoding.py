"""Launches of the kernels in `decoding.cu`: the batch of the next token, and copies of blocks of the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewrite.plugins.cuda_launch import Launch, launcher, module

POINTERS = ("chosen", "tokens", "positions", "slots", "lengths", "tables")


class _Rows(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_void_p) for n in POINTERS), *((n, ctypes.c_int) for n in ("rows", "table", "block"))]


class _Cache(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("bytes", ctypes.c_longlong)]


def advance(chosen: Any, tokens: Any, positions: Any, slots: Any, lengths: Any, tables: Any, block_size: int) -> Launch:
    """A function that enqueues what `runtime.advance.advance` does, in place.

    CuPy arrays: chosen int64 [R], tokens and positions int64 [R], slots and lengths int32 [R], tables int32 [R, M].
    """
    rows, table = tables.shape
    arrays = (chosen, tokens, positions, slots, lengths, tables)
    call = _Rows(*[int(a.data.ptr) for a in arrays], rows, table, block_size)
    return launcher(module("decoding", "float16").get_function("advance"), (1,), min(1024, -(-rows // 32) * 32), [call], keep=arrays)


class BlockCopies:
    """Copies of blocks in several caches [N, ...] (CuPy, packed), all in one launch."""

    def __init__(self, caches: Sequence[Any]):
        import cupy

        self.count = len(caches)
        table = np.frombuffer(bytes((_Cache * self.count)(*[_Cache(int(c.data.ptr), c.nbytes // len(c)) for c in caches])), np.uint8)
        self.caches, self.kept = cupy.asarray(table), caches
        self.function = module("decoding", "float16").get_function("copyBlocks")

    def copy(self, pairs: Any) -> None:
        """Enqueue the copies of int32 [n, 2], (from, to), a CuPy array; no block is written that another copy reads or writes."""
        launcher(self.function, (len(pairs), self.count), 256, [self.caches, pairs])()
