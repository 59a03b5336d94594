"""CUDA kernels of attention over a paged cache (`paged_attention.cu`).

Up to one token a sequence, 16-bit floats: one launch (`decode`). More tokens: keys and values are stored first (`store`), then a kernel
for prompts reads all from the caches, if there is one that takes these arrays, else `decode`. float32: `store` and `plain`.

Grids depend on shapes alone and lengths are read on the device, so a captured launch may be replayed with other contents.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

from rewrite.plugins.cuda_launch import Launch, capability, launcher, module
from rewrite.plugins.cuda_paged_prefill import prefill

FEW = 1024  # positions that a block of a cluster reads quickly enough
SM_SHARED = 228 << 10  # bytes of shared memory of an SM, of which each block takes 1 KB more than it asks for
_early: ContextVar[bool] = ContextVar("early", default=False)
_scratch: dict[tuple[int, int, str, str], Any] = {}


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "cos", "sin", "q_scale", "k_scale", "y", "keys", "values", "turned", "slots", "tables", "starts", "lengths", "parts", "arrived")),
        *((n, ctypes.c_longlong * 2) for n in ("qs", "ks", "vs", "ys", "ts")), ("angles", ctypes.c_longlong),
        *((n, ctypes.c_int) for n in ("tokens", "sequences", "width", "blocks", "window")), *((n, ctypes.c_float) for n in ("scale", "cap", "epsilon")),
    ]  # fmt: skip


class Shape(NamedTuple):
    """What the kernels are compiled for: the type of floats, heads, key heads, elements of a key and of a value, positions of a block."""

    dtype: str
    heads: int
    kv_heads: int
    size: int
    value_size: int
    block_size: int
    window: bool = False
    softcap: bool = False


class Turn(NamedTuple):
    """How rows are normalized and turned: `kind` 0 not at all, 1 by halves, 2 by pairs; the first `size` elements by `angles` of cosines.

    `norm`: 0 none, 1 with weights of the rows' type, 2 of float32.
    """

    kind: int = 0
    size: int = 2
    angles: int = 2
    norm: int = 0

    def defines(self) -> tuple[str, ...]:
        return (f"ROTARY={self.kind}", f"TURN={self.size}", f"ANGLES={self.angles}", f"NORM={self.norm}")


class Cut(NamedTuple):
    """How `decode` divides the work: warps of a block, tiles of 16 positions that each has under way, blocks an SM is to hold; the work of
    all heads in equal parts of at least `least` tiles a block, or each head of a token to a cluster of `cluster` blocks.
    """

    warps: int
    stages: int
    blocks: int
    least: int = 8
    cluster: int = 0

    def __str__(self) -> str:
        return f"{self.blocks} of {self.warps}x{self.stages} {f'cluster {self.cluster}' if self.cluster else f'least {self.least}'}"

    def shared(self, size: int, value_size: int, repeats: int) -> int:
        """Bytes of shared memory of a block."""
        key, value = (-(-n // 16) * 16 + 8 for n in (size, value_size))
        kept = 4 * min(repeats, 16) * (value_size + 4) if self.cluster else 16
        return 32 * key + self.warps * self.stages * 32 * (key + value) + self.warps * 128 + kept


def cut(size: int, value_size: int, repeats: int, *, warps: int = 4, blocks: int = 2, least: int = 8, cluster: int = 0) -> Cut:
    """As many tiles under way, up to 6, as there is room for with so many blocks an SM; with fewer blocks, or warps, if that leaves less than two."""
    for fewer in range(blocks, 0, -1):
        for stages in range(6, 1, -1):
            made = Cut(warps, stages, fewer, least, cluster)
            if (made.shared(size, value_size, repeats) + 1024) * fewer <= SM_SHARED:
                return made
    return cut(size, value_size, repeats, warps=warps // 2, blocks=blocks, least=least, cluster=cluster)


def choose(size: int, value_size: int, repeats: int, pairs: int, positions: int) -> Cut:
    """The cut for `pairs` heads of tokens and up to so many positions, by `benchmarks/results/paged_divisions.json`.

    Clusters where half of the SMs are enough for all of them, unless a few blocks would read very long texts; equal parts for more.
    """
    cluster = next((n for n in (8, 4) if pairs * n <= processors() // 2), 0) if capability() >= 90 else 0
    if cluster and (pairs >= 8 or positions <= FEW * cluster):
        return cut(size, value_size, repeats, warps=8, blocks=1, cluster=cluster)
    return cut(size, value_size, repeats)


def grid(tokens: int, groups: int, width: int, block_size: int, made: Cut) -> tuple[int, int]:
    """The grid of `decode`: clusters by heads of tokens, or the blocks that the GPU holds at once, or as many as there could be work for by the shapes."""
    if made.cluster:
        return made.cluster, tokens * groups
    tiles = tokens * groups * (-(-width * block_size // 16) + 1)
    return max(1, min(processors() * made.blocks, -(-tiles // made.least))), 1


@contextlib.contextmanager
def reading_early() -> Iterator[None]:
    """Launches made meanwhile read tables, lengths, and the keys and values of earlier steps before the kernels that precede them end.

    Right if none of these writes any of that: in a graph in which tables and lengths come from outside, or change at its very end.
    """
    token = _early.set(True)
    try:
        yield
    finally:
        _early.reset(token)


@cache
def processors() -> int:
    """Multiprocessors of the current GPU."""
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def scratch(what: str, count: int, dtype: Any) -> Any:
    """An array [count or more], zeros at first: one of each kind for all launches of a stream, which follow one another."""
    import cupy

    key = (cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr, what, str(dtype))
    if key not in _scratch or _scratch[key].size < count:
        _scratch[key] = cupy.zeros(count, dtype)
    return _scratch[key]


def rows_of(turn: Any, tokens: int) -> Any:
    """Cosines or sines of any shape that Rotary takes for one row of tokens, as [tokens, n] (or [1, n] for all); None if heads have their own."""
    if turn.ndim == 4 and turn.shape[1] != 1:
        return None
    return turn.reshape(-1, turn.shape[-1]) if turn.size // turn.shape[-1] in (1, tokens) else None


def turn_of(cos: Any, sin: Any, scale: Any, size: int, interleaved: int, turned: int) -> Turn | None:
    """What is done to queries and keys of `size` elements first; None if there is no kernel for it."""
    norm = 0 if scale is None else 2 if scale.dtype.name == "float32" else 1
    if cos is None:
        return Turn(norm=norm)
    turned = turned or size
    if cos.shape[-1] not in (turned, turned // 2) or sin.shape != cos.shape or turned % 2 or turned > size:
        return None
    return Turn(2 if interleaved else 1, turned, cos.shape[-1], norm)


def takes(q: Any, k: Any, v: Any, key_cache: Any, value_cache: Any, y: Any, integers: tuple[Any, ...], angles: tuple[Any, Any], scales: tuple[Any, Any]) -> bool:
    """Whether the kernels take these arrays on the GPU at hand: one type of float, packed sizes of 8 to 256, aligned to 16 bytes."""
    sizes = (q.shape[-1], v.shape[-1])
    if capability() < 80 or q.dtype.name not in ("float16", "bfloat16", "float32") or any(n % 8 or not 8 <= n <= 256 for n in sizes) or q.shape[1] % k.shape[1]:
        return False
    for pair in (angles, scales):  # both or none
        if (pair[0] is None) != (pair[1] is None) or (pair[0] is not None and (pair[0].dtype != pair[1].dtype or not pair[0].flags.c_contiguous or not pair[1].flags.c_contiguous)):
            return False
    if any(a.dtype != q.dtype for a in (k, v, key_cache, value_cache, y, *(a for a in angles if a is not None))):
        return False
    if scales[0] is not None and scales[0].dtype.name not in (q.dtype.name, "float32"):
        return False
    if any(a.dtype.name != "int32" or not a.flags.c_contiguous for a in integers) or not key_cache.flags.c_contiguous or not value_cache.flags.c_contiguous:
        return False
    if any(a.data.ptr % 16 for a in angles if a is not None):
        return False
    size = q.dtype.itemsize
    return all(a.strides[-1] == size and a.data.ptr % 16 == 0 and all(n % 16 == 0 for n in a.strides[1:-1]) for a in (q, k, v, y)) and all(a.data.ptr % 16 == 0 for a in (key_cache, value_cache))


def variant(shape: Shape, turn: Turn, fresh: bool, made: Cut | None = None, early: bool = False) -> tuple[str, str, tuple[str, ...]]:
    """What `cuda_launch.module` needs."""
    dtype, heads, kv_heads, size, value_size, block_size, window, cap = shape
    values = {"D": size, "E": value_size, "S": block_size, "REPEATS": heads // kv_heads, "KVHEADS": kv_heads, "CAP": int(cap), "WINDOW": int(window), "FLOAT32": int(dtype == "float32")}
    values["PIECE"] = next((n for n in (4, 2) if size >= 32 * n and (turn.kind != 1 or turn.size % (2 * n) == 0)), 1)  # 4: all lanes of a warp have work
    if dtype != "float32":
        made = made or cut(size, value_size, heads // kv_heads)
        values |= {"WARPS": made.warps, "STAGES": made.stages, "FRESH": int(fresh), "LEAST": made.least, "EARLY": int(early), "CLUSTER": made.cluster}
    return "paged_attention", dtype, (*(f"{n}={v}" for n, v in values.items()), *turn.defines())


def paged_attention(
    inputs: list[Any], outputs: list[Any], *, heads: int, kv_heads: int, size: int, scale: float, window: int, softcap: float, layer: int,
    interleaved: int = 0, turned: int = 0, epsilon: float = 1e-6, made: Cut | None = None, early: bool | None = None,
) -> Launch | None:  # fmt: skip
    """The launch, or None where there is no kernel for these arrays. Outputs `keys` and `values` are best the caches themselves: else
    they are copied first. `made`: how the work is divided, else what `choose` says; `early`: see `reading_early`, which is asked if it is None.
    """
    q, k, v, key_cache, value_cache, slots, tables, starts, lengths, cos, sin, q_scale, k_scale = inputs
    y, keys, values = outputs
    if not takes(q, k, v, keys, values, y, (slots, tables, starts, lengths), (cos, sin), (q_scale, k_scale)):
        return None
    turn = turn_of(cos, sin, q_scale, size, interleaved, turned)
    tokens, value_size, block_size = q.shape[2], v.shape[3], keys.shape[1]
    angles = [] if cos is None else [rows_of(a, tokens) for a in (cos, sin)]
    if turn is None or any(a is None for a in angles):
        return None
    if not tokens:
        return lambda: None
    copies = [(a, b) for a, b in ((key_cache, keys), (value_cache, values)) if a.data.ptr != b.data.ptr]
    dtype, few = q.dtype.name, tokens <= lengths.size and q.dtype.itemsize == 2
    call = _Call(
        *(0 if a is None else int(a.data.ptr) for a in (q, k, v, cos, sin, q_scale, k_scale, y, keys, values, None, slots, tables, starts, lengths, None, None)),
        *((ctypes.c_longlong * 2)(*(n // a.itemsize for n in a.strides[1:3])) for a in (q, k, v, y)), (ctypes.c_longlong * 2)(), 0 if not angles or angles[0].shape[0] == 1 else angles[0].shape[1],
        tokens, lengths.size, tables.shape[1], keys.shape[0], window, scale, softcap, epsilon,
    )  # fmt: skip
    shape = Shape(dtype, heads, kv_heads, size, value_size, block_size, bool(window), bool(softcap))
    keep = (*inputs, *outputs)
    if few:
        return _after(copies, [_decode(call, shape, turn, True, made, _early.get() if early is None else early, keep)])
    launches, queries = [], q
    if turn.kind or turn.norm:
        queries = scratch("queries", tokens * heads * size, q.dtype)[: tokens * heads * size].reshape(1, tokens, heads, size).transpose(0, 2, 1, 3)
        call.turned, call.ts = int(queries.data.ptr), (ctypes.c_longlong * 2)(size, heads * size)
    rows = (heads if queries is not q else 0) + 2 * kv_heads
    launches.append(launcher(module(*variant(shape, turn, False)).get_function("store"), (tokens, -(-rows // 4)), 128, [call], keep=(keep, queries)))
    from_caches = _Call.from_buffer_copy(call)
    if queries is not q:
        from_caches.q, from_caches.qs = call.turned, call.ts
    found = prefill(queries, keys, values, y, tables, starts, lengths, scale=scale, window=window, softcap=softcap) if q.dtype.itemsize == 2 else None
    if found is None and q.dtype.itemsize == 2:
        found = _decode(from_caches, shape, Turn(), False, made, False, (keep, queries))
    if found is None:
        found = launcher(module(*variant(shape, Turn(), False)).get_function("plain"), (tokens, heads), 128, [from_caches], keep=(keep, queries))
    return _after(copies, [*launches, found])


def _decode(call: _Call, shape: Shape, turn: Turn, fresh: bool, made: Cut | None, early: bool, keep: Any) -> Launch:
    _, heads, kv_heads, size, value_size, block_size, _, _ = shape
    repeats = heads // kv_heads
    groups = kv_heads * -(-repeats // 16)
    made = made or choose(size, value_size, repeats, call.tokens * groups, call.width * block_size)
    blocks = grid(call.tokens, groups, call.width, block_size, made)
    if not made.cluster:
        parts = scratch("parts", blocks[0] * 2 * min(repeats, 16) * (value_size + 4), "float32")
        arrived = scratch("arrived", call.tokens * groups, "int32")  # launches leave zeros
        call.parts, call.arrived, keep = int(parts.data.ptr), int(arrived.data.ptr), (keep, parts, arrived)
    function = module(*variant(shape, turn, fresh, made, early)).get_function("decode")
    return launcher(function, blocks, 32 * made.warps, [call], shared=made.shared(size, value_size, repeats), cluster=max(1, made.cluster), keep=keep)


def _after(copies: list[tuple[Any, Any]], launches: list[Launch]) -> Launch:
    if not copies and len(launches) == 1:
        return launches[0]

    def launch() -> None:
        for source, target in copies:
            target[...] = source
        for one in launches:
            one()

    return launch
