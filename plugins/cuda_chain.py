"""Chains of products of few tokens in one launch (`chain.cu`): the links, their memory, and the launch.

Weights lie [N, K], inputs and outputs are packed, float16 or bfloat16, at most 64 tokens, on Hopper.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from rewrite.plugins import cuda_gemm
from rewrite.plugins.cuda_gemm import ACTIVATIONS, Product, ceil_div
from rewrite.plugins.cuda_launch import Launch, launcher, module, tensor_map, wgmma

TOKENS = (16, 32, 64)  # of a tile
RING = 160 << 10  # bytes of shared memory for what is fetched ahead: leaves room for the blocks of an attention beside
TILE = 64  # rows of weights
WINDOW = 6  # stages that are on their way at a time: more would keep what the blocks tell each other waiting
PIECE, PART = 4.0, 2.0  # a piece of a tile and a part of a sum, in steps: what they cost beside what is fetched


@dataclass
class Norm:
    """A root-mean-square norm of a link's result y [M, N], and what the next link reads instead: `scaled` [M, N] = y * scale [N]."""

    scale: Any
    scaled: Any
    epsilon: float


@dataclass
class Link:
    """Products of x [M, K], as in `cuda_gemm.product`; with `norm` the next link reads norm.scaled, and divides by the root of the mean of y's squares."""

    x: Any
    products: Sequence[Product]
    activation: str = "none"
    gated: bool = False
    norm: Norm | None = None

    @property
    def outputs(self) -> Sequence[Product]:
        return self.products[:1] if self.gated else self.products

    @property
    def tiles(self) -> int:
        return sum(ceil_div(p.w.shape[0], TILE // 2 if self.gated else TILE) for p in self.outputs)

    @property
    def steps(self) -> int:
        return ceil_div(self.x.shape[1], 64)


class _Link(ctypes.Structure):
    _fields_ = [
        ("maps", ctypes.c_char * 128 * 4), ("job", cuda_gemm._Job * 3), ("scaled", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("squares", ctypes.c_void_p), ("normed", ctypes.c_void_p),
        ("epsilon", ctypes.c_float), *((n, ctypes.c_int) for n in ("normed_tiles", "jobs", "inner", "tiles", "gated", "activated", "grain")), ("_", ctypes.c_char * 32),
    ]  # fmt: skip


class _Chain(ctypes.Structure):
    _fields_ = [("link", ctypes.c_void_p), *((n, ctypes.c_int) for n in ("count", "tokens", "stages", "room")), *((n, ctypes.c_void_p) for n in ("ready", "arrived", "finished", "parts"))]


def refusal(links: Sequence[Link]) -> str | None:
    """Why there is no kernel for these links on the GPU at hand, or None."""
    tokens = links[0].x.shape[0]
    if tokens > TOKENS[-1]:
        return f"{tokens} tokens, at most {TOKENS[-1]}"
    if not all(cuda_gemm.supported(link.x, link.products) for link in links):
        return "types, sizes or the GPU"
    if len({link.activation for link in links} - {"none"}) > 1:
        return "two activations"
    for before, link in pairwise(links):
        norm = before.norm
        if norm is not None and (len(before.outputs) > 1 or norm.scale.dtype != before.x.dtype or before.x.dtype.name != "bfloat16" or norm.scaled.data.ptr != link.x.data.ptr):
            return "a norm of another type, of float16 (y * scale may be too large for it), or of several products"
    return "a norm behind the last product" if links[-1].norm is not None else None


def deal(tiles: int, steps: int, grain: int, blocks: int) -> tuple[int, int, int]:
    """How `tiles` of `steps` each are shared out in pieces of `grain` steps, as in chain.cu: the most steps and the most pieces of tiles
    that a block gets, and the most blocks that share a tile.
    """
    grains = ceil_div(steps, grain)
    units = tiles * grains
    blocks = min(blocks, units)
    starts = [units * b // blocks for b in range(blocks + 1)]
    places = [u // grains * steps + min(u % grains * grain, steps) for u in starts]
    longest = max(b - a for a, b in pairwise(places))
    pieces = max((b - 1) // grains - a // grains + 1 for a, b in pairwise(starts))
    owners = [ceil_div((u + 1) * blocks, units) - 1 for u in range(units)]
    return longest, pieces, max(owners[t + grains - 1] - owners[t] + 1 for t in range(0, units, grains))


@cache
def best_grain(tiles: int, steps: int, blocks: int) -> int:
    """The grain that keeps every block about equally busy with few pieces."""

    def cost(grain: int) -> float:
        longest, pieces, shared = deal(tiles, steps, grain, blocks)
        return longest + PIECE * pieces + PART * shared * (shared > 1)

    return min((ceil_div(steps, n) for n in (1, 2, 3, 4, 6, 8, 11, 16, steps)), key=cost)


def stages(tile: int) -> int:
    """Steps of 64 inner elements that are on their way at a time, for tiles of `tile` tokens."""
    return RING // (8192 + tile * 128)


def variant(tile: int, dtype: str, activation: str) -> tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `cuda_launch.module` needs."""
    return "chain", dtype, (f"ACTIVATION={ACTIVATIONS.index(activation)}", f"TOKENS={tile}", f"WINDOW={WINDOW}"), (("WGMMA\n", wgmma(tile, dtype=dtype)),)


def chain(links: Sequence[Link], scratch: Any = None) -> Launch:
    """A function that enqueues the links in order, each of which waits for all before it. Call only where `refusal` is None.

    `scratch`, of `scratch_bytes(links)` zeros, may be shared by chains that never run at the same time.
    """
    import cupy

    tokens, blocks = links[0].x.shape[0], cupy.cuda.Device().attributes["MultiProcessorCount"]
    tile = next(t for t in TOKENS if tokens <= t)
    counters, room = _counters(links), _room(links, blocks)
    scratch = scratch if scratch is not None else cupy.zeros(scratch_bytes(links), cupy.uint8)
    squares = [cupy.zeros(link.tiles * tile if link.norm else 0, cupy.float32) for link in links]
    described = (_Link * len(links))()
    for index, (link, into) in enumerate(zip(links, described, strict=True)):
        before = links[index - 1].norm if index else None
        w = [tensor_map(p.w, (TILE // 2, 64)) for p in link.products]
        for place, map_ in enumerate([tensor_map(link.x, (tile, 64)), *(w + w[:1] * 2)[:3]]):
            ctypes.memmove(ctypes.byref(into.maps[place]), ctypes.byref(map_), 128)
        for place, p in enumerate(link.products):
            into.job[place] = cuda_gemm._Job(_address(p.y), _address(p.bias), _address(p.residual), p.w.shape[0])
        if link.norm is not None:
            into.scaled, into.scale, into.squares = _address(link.norm.scaled), _address(link.norm.scale), _address(squares[index])
        if before is not None:
            into.normed, into.epsilon, into.normed_tiles = _address(squares[index - 1]), before.epsilon, links[index - 1].tiles
        into.jobs, into.inner, into.tiles, into.gated, into.activated = len(link.outputs), link.x.shape[1], link.tiles, link.gated, link.activation != "none"
        into.grain = best_grain(link.tiles, link.steps, blocks)
    memory = cupy.asarray(np.frombuffer(described, np.uint8))
    base = int(scratch.data.ptr)
    most = max(link.tiles for link in links)
    call = _Chain(
        link=int(memory.data.ptr), count=len(links), tokens=tokens, stages=stages(tile), room=room,
        finished=base, ready=base + 4, arrived=base + 4 * (1 + len(links)), parts=base + counters,
    )  # fmt: skip
    assert 4 * (1 + len(links) + most) <= counters
    activation = next((link.activation for link in links if link.activation != "none"), "none")
    function = module(*variant(tile, links[0].x.dtype.name, activation)).get_function("multiply")
    shared = 1024 + stages(tile) * (8192 + tile * 128 + 24) + tile * 548 + 64
    return launcher(function, (blocks,), 320, [call], shared=shared, keep=(links, scratch, squares, memory))


def scratch_bytes(links: Sequence[Link]) -> int:
    """Bytes of counters and of parts of sums."""
    import cupy

    tile = next(t for t in TOKENS if links[0].x.shape[0] <= t)
    blocks = cupy.cuda.Device().attributes["MultiProcessorCount"]
    return _counters(links) + max(link.tiles for link in links) * _room(links, blocks) * tile * 256


def _counters(links: Sequence[Link]) -> int:
    return ceil_div(4 * (1 + len(links) + max(link.tiles for link in links)), 512) * 512


def _room(links: Sequence[Link], blocks: int) -> int:
    return max(deal(link.tiles, link.steps, best_grain(link.tiles, link.steps, blocks), blocks)[2] for link in links)


def _address(array: Any) -> int | None:
    return None if array is None else int(array.data.ptr)
