"""CUDA kernels of attention over a paged cache (`paged_attention.cu`).

Up to one token a sequence, 16-bit floats: one launch (`decode`). More tokens: keys and values are stored first (`store`), then a kernel
for prompts reads all from the caches, if there is one that takes these arrays, else `decode`. float32: `store` and `plain`.

Grids depend on shapes alone and lengths are read on the device, so a captured launch may be replayed with other contents.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

from rewrite.plugins.cuda_launch import MOST_SHARED, Launch, capability, launcher, module
from rewrite.plugins.cuda_paged_prefill import prefill

WARPS, LEAST = 4, 4  # of a block of `decode`; tiles of 16 positions that it takes at least
_scratch: dict[tuple[int, int], tuple[Any, Any]] = {}


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "cos", "sin", "q_scale", "k_scale", "y", "keys", "values", "turned", "slots", "tables", "starts", "lengths", "parts", "arrived")),
        *((n, ctypes.c_longlong * 2) for n in ("qs", "ks", "vs", "ys", "ts")), ("angles", ctypes.c_longlong),
        *((n, ctypes.c_int) for n in ("tokens", "sequences", "width", "blocks", "window")), *((n, ctypes.c_float) for n in ("scale", "cap", "epsilon")),
    ]  # fmt: skip


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
    """How `decode` is made for a size of keys and values: tiles of a warp under way, blocks an SM holds, bytes of shared memory of each."""

    stages: int
    blocks: int
    shared: int


def cut(size: int, value_size: int) -> Cut:
    """As many tiles under way as there is room for with two blocks an SM, or with one."""
    pitches = [-(-n // 16) * 16 + 8 for n in (size, value_size)]
    queries, tile = 32 * pitches[0], 32 * sum(pitches)
    for blocks, room in ((2, (MOST_SHARED >> 1) - 2048), (1, MOST_SHARED - 2048)):
        stages = min((room - queries) // (WARPS * tile), 6)
        if stages >= 3 or blocks == 1:
            break
    return Cut(stages, blocks, queries + WARPS * stages * tile)


def grid(tokens: int, groups: int, width: int, block_size: int, most: int, least: int = LEAST) -> int:
    """Blocks of `decode`: `most`, those that the GPU holds at once, or as many as there could be work for by the shapes."""
    tiles = tokens * groups * (-(-width * block_size // 16) + 1)
    return max(1, min(most, -(-tiles // least)))


@cache
def processors() -> int:
    """Multiprocessors of the current GPU."""
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def scratch(parts: int, counters: int) -> tuple[Any, Any]:
    """float32 [parts] and int32 [counters], zeros that launches leave zero: one pair for all launches of a stream, which follow one another."""
    import cupy

    key = (cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr)
    known = _scratch.get(key)
    if known is None or known[0].size < parts or known[1].size < counters:
        sizes = (0, 0) if known is None else (known[0].size, known[1].size)
        known = _scratch[key] = (cupy.empty(max(parts, sizes[0]), cupy.float32), cupy.zeros(max(counters, sizes[1]), cupy.int32))
    return known


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
    size = q.dtype.itemsize
    return all(a.strides[-1] == size and a.data.ptr % 16 == 0 and all(n % 16 == 0 for n in a.strides[1:-1]) for a in (q, k, v, y)) and all(a.data.ptr % 16 == 0 for a in (key_cache, value_cache))


def variant(dtype: str, heads: int, kv_heads: int, size: int, value_size: int, block_size: int, window: bool, cap: bool, turn: Turn, fresh: bool,
            least: int = LEAST, early: bool = False) -> tuple[str, str, tuple[str, ...]]:  # fmt: skip
    """What `cuda_launch.module` needs."""
    values = {"D": size, "E": value_size, "S": block_size, "REPEATS": heads // kv_heads, "KVHEADS": kv_heads, "CAP": int(cap), "WINDOW": int(window), "FLOAT32": int(dtype == "float32")}
    if dtype != "float32":
        values |= {"WARPS": WARPS, "STAGES": cut(size, value_size).stages, "FRESH": int(fresh), "LEAST": least, "EARLY": int(early)}
    return "paged_attention", dtype, (*(f"{n}={v}" for n, v in values.items()), *turn.defines())


def paged_attention(
    inputs: list[Any], outputs: list[Any], *, heads: int, kv_heads: int, size: int, scale: float, window: int, softcap: float, layer: int,
    interleaved: int = 0, turned: int = 0, epsilon: float = 1e-6, least: int = LEAST, early: bool = False,
) -> Launch | None:  # fmt: skip
    """The launch, or None where there is no kernel for these arrays. Outputs `keys` and `values` are best the caches themselves: else
    they are copied first. `early`: the tables, lengths and older keys are not written by the kernels just before, so they are read before those end.
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
    shape = (dtype, heads, kv_heads, size, value_size, block_size, bool(window), bool(softcap))
    keep = (*inputs, *outputs)
    if few:
        return _after(copies, [_decode(call, shape, turn, True, least, early, keep)])
    launches, queries = [], q
    if turn.kind or turn.norm:
        import cupy

        queries = cupy.empty((1, tokens, heads, size), q.dtype).transpose(0, 2, 1, 3)
        call.turned, call.ts = int(queries.data.ptr), (ctypes.c_longlong * 2)(size, heads * size)
    rows = (heads if queries is not q else 0) + 2 * kv_heads
    launches.append(launcher(module(*variant(*shape, turn, False)).get_function("store"), (tokens, -(-rows // 4)), 128, [call], keep=(keep, queries)))
    from_caches = _Call.from_buffer_copy(call)
    if queries is not q:
        from_caches.q, from_caches.qs = call.turned, call.ts
    found = prefill(queries, keys, values, y, tables, starts, lengths, scale=scale, window=window, softcap=softcap) if q.dtype.itemsize == 2 else None
    if found is None and q.dtype.itemsize == 2:
        found = _decode(from_caches, shape, Turn(), False, least, False, (keep, queries))
    if found is None:
        found = launcher(module(*variant(*shape, Turn(), False)).get_function("plain"), (tokens, heads), 128, [from_caches], keep=(keep, queries))
    return _after(copies, [*launches, found])


def _decode(call: _Call, shape: tuple[Any, ...], turn: Turn, fresh: bool, least: int, early: bool, keep: Any) -> Launch:
    _, heads, kv_heads, size, value_size, block_size, *_ = shape
    repeats, made = heads // kv_heads, cut(size, value_size)
    groups = kv_heads * -(-repeats // 16)
    blocks = grid(call.tokens, groups, call.width, block_size, processors() * made.blocks, least)
    parts, arrived = scratch(blocks * 2 * min(repeats, 16) * (value_size + 4), call.tokens * groups)
    call.parts, call.arrived = int(parts.data.ptr), int(arrived.data.ptr)
    function = module(*variant(*shape, turn, fresh, least, early)).get_function("decode")
    return launcher(function, (blocks,), 32 * WARPS, [call], shared=made.shared, keep=(keep, parts, arrived))


def _after(copies: list[tuple[Any, Any]], launches: list[Launch]) -> Launch:
    if not copies and len(launches) == 1:
        return launches[0]

    def launch() -> None:
        for source, target in copies:
            target[...] = source
        for one in launches:
            one()

    return launch
