"""The CUDA kernel of attention over a paged cache for many new tokens: `paged_prefill.cu`, for Hopper.

Heads of 32, 64, 96, 128, 192 and 256 elements in float16 or bfloat16; cache blocks of any multiple of 16 positions.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from rewrite.plugins.cuda_launch import Launch, capability, launcher, module, tensor_map, wgmma

LOG2E = 1.4426950408889634
FAR = 1 << 30  # a window that reaches to the first key
MOST_PACKED = 16  # query heads in a tile


class Cut(NamedTuple):
    """How the work is divided: keys a step, groups of 64 rows (queries by heads) a tile, steps that are fetched ahead."""

    keys: int
    groups: int
    stages: int

    def __str__(self) -> str:
        return f"{64 * self.groups}x{self.keys}"


CUTS = {32: Cut(128, 2, 4), 64: Cut(128, 2, 4), 96: Cut(128, 2, 3), 128: Cut(128, 2, 2), 192: Cut(64, 2, 3), 256: Cut(64, 2, 2)}


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("y", "tables", "starts", "lengths")), ("head", ctypes.c_longlong), ("token", ctypes.c_longlong),
        *((n, ctypes.c_int) for n in ("tokens", "batch", "columns", "slices", "share", "window")), ("by", ctypes.c_float), ("squash", ctypes.c_float),
    ]  # fmt: skip


def packed(heads: int, kv_heads: int) -> int:
    """How many query heads of one key head share a tile: all of them or the largest part that is not too many."""
    group = heads // kv_heads
    return max(n for n in range(1, min(group, MOST_PACKED) + 1) if group % n == 0)


def tiles(tokens: int, batch: int, span: int) -> int:
    """As many tiles of `span` tokens as there can be, whatever part of the tokens each sequence has and however many are left."""
    return min(tokens, tokens // span + batch + 1)


def shared_bytes(size: int, cut: Cut) -> int:
    """Shared memory of a block: queries of a tile or two, keys and values of each stage, barriers, tiles; 1024 to align."""
    ahead = 1 if size > 128 else 2
    return 1024 + (ahead * 64 * cut.groups + 2 * cut.stages * cut.keys) * size * 2 + 8 * (2 * ahead + 4 * cut.stages) + 32 * (ahead + 1)


def variant(size: int, page: int, pack: int, dtype: str, softcap: bool, cut: Cut) -> tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `cuda_launch.module` needs."""
    values = {"D": size, "PAGE": page, "KT": cut.keys, "WGS": cut.groups, "STAGES": cut.stages, "PACK": pack, "CAP": int(softcap)}
    return "paged_prefill", dtype, tuple(f"{n}={v}" for n, v in values.items()), (("WGMMA\n", wgmma(cut.keys, size, dtype=dtype)),)


def takes(q: Any, key_cache: Any, value_cache: Any, y: Any, scale: float, softcap: float) -> bool:
    """Whether the kernel takes these arrays on the GPU at hand."""
    (_, heads, tokens, size), (_, page, kv_heads, _) = q.shape, key_cache.shape
    if capability() != 90 or q.dtype.name not in ("float16", "bfloat16") or size not in CUTS or page % 16 or heads % kv_heads or not tokens:
        return False
    if q.shape[0] != 1 or y.shape != q.shape or value_cache.shape != key_cache.shape or key_cache.shape[3] != size or (scale <= 0 and not softcap):
        return False
    return all(a.dtype == q.dtype and a.strides[-1] == 2 and a.data.ptr % 16 == 0 and all(n % 16 == 0 for n in a.strides[:-1]) for a in (q, key_cache, value_cache, y))


def prefill(
    q: Any, key_cache: Any, value_cache: Any, y: Any, block_tables: Any, query_starts: Any, context_lengths: Any, *, scale: float, window: int, softcap: float, cut: Cut | None = None
) -> Launch | None:
    """A launch of causal attention of T packed tokens over the paged keys and values of their sequences, or None without a kernel for it.

    The function of the plugin `PagedAttention` without its first part: key_cache and value_cache [N, S, G, D] hold the keys and
    values of the new tokens already. q and y [1, H, T, D]: also views of [T, H * D]. block_tables int32 [B, M], query_starts
    int32 [B + 1] and context_lengths int32 [B], all contiguous, are read on the device, so that a captured launch can be used
    again with other contents: prompts, chunks with a history and single tokens, mixed. Tokens from query_starts[B] on become
    zeros, as do those of a sequence without keys. Entries of block_tables past a sequence's last block are not read, positions
    of the cache past its length have no influence. `softcap` 0: none; `window` 0: none; `cut` is for measurements.

    There is a kernel for compute capability 9.0, float16 and bfloat16 (all four arrays the same), D of `CUTS`, values as wide
    as keys, S a multiple of 16, any number of heads to a key head, and a positive scale (any with a soft cap); the last axis
    packed, other strides and addresses multiples of 16 bytes.
    """
    if not takes(q, key_cache, value_cache, y, scale, softcap):
        return None
    import cupy

    (_, heads, tokens, size), (_, page, kv_heads, _), (batch, columns) = q.shape, key_cache.shape, block_tables.shape
    cut, pack = cut or CUTS[size], packed(heads, kv_heads)
    span, block = 64 * cut.groups // pack, 32 if size % 64 else 64
    slices = heads // pack
    box = (page | cut.keys) & -(page | cut.keys)
    maps = [tensor_map(q[0].transpose(1, 0, 2), (span, pack, block)), *(tensor_map(a, (box, 1, block)) for a in (key_cache, value_cache))]
    call = _Call(
        *(int(a.data.ptr) for a in (y, block_tables, query_starts, context_lengths)), y.strides[1] // 2, y.strides[2] // 2,
        tokens, batch, columns, slices, slices // kv_heads, min(window, FAR) or FAR, (softcap or scale) * LOG2E, scale / softcap if softcap else 0.0,
    )  # fmt: skip
    function = module(*variant(size, page, pack, q.dtype.name, bool(softcap), cut)).get_function("prefill")
    processors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
    blocks = min(processors, tiles(tokens, batch, span) * slices)
    keep = (q, key_cache, value_cache, y, block_tables, query_starts, context_lengths)
    return launcher(function, (blocks,), 128 * (cut.groups + 1), [*maps, call], shared=shared_bytes(size, cut), keep=keep)
