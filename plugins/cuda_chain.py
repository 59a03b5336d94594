"""Chains of products of few tokens in one launch (`chain.cu`): which steps make one, their memory, and the launch.

Weights lie [N, K], inputs and outputs are packed, float16 or bfloat16, at most 8 tokens, on Hopper.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from rewrite.plugins import cuda_gemm
from rewrite.plugins.cuda_gemm import ACTIVATIONS, Job, Product, address, ceil_div
from rewrite.plugins.cuda_launch import Launch, launcher, module, tensor_map, wgmma

TOKENS = 8  # of a tile: the most there may be
RING = 160 << 10  # bytes of shared memory for what is fetched ahead: leaves room for the blocks of an attention beside
TILE = 64  # rows of weights
STAGE = 8192 + TOKENS * 128  # bytes of 64 inner elements
WINDOW = 8  # stages that are on their way at a time: more would keep what the blocks tell each other waiting
MOST_LINKS = 7  # that the arguments of a kernel have room for
PIECE, PART = 4.0, 2.0  # a piece of a tile and a part of a sum, in steps: what they cost beside what is fetched


@dataclass
class Norm:
    """y = x / sqrt(mean(x^2) + epsilon) * scale, x and y [M, N], scale [N]. In a chain y is not written."""

    x: Any
    scale: Any
    y: Any
    epsilon: float


@dataclass
class Link:
    """Products of x [M, K], as in `cuda_gemm.product`; with `norm` the next link reads norm.y. Results are only written if `kept`."""

    x: Any
    products: Sequence[Product]
    activation: str = "none"
    gated: bool = False
    norm: Norm | None = None
    kept: bool = True

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
        ("maps", ctypes.c_char * 128 * 3), ("job", Job * 3), ("x", ctypes.c_void_p), ("scale", ctypes.c_void_p),
        *((n, ctypes.c_int) for n in ("source", "residual", "sent", "scaled", "squares", "normed", "parts", "room")),
        ("epsilon", ctypes.c_float), *((n, ctypes.c_int) for n in ("normed_tiles", "jobs", "inner", "tiles", "gated", "activated", "grain")), ("_", ctypes.c_char * 16),
    ]  # fmt: skip


class _Chain(ctypes.Structure):
    _fields_ = [
        ("link", _Link * MOST_LINKS), *((n, ctypes.c_int) for n in ("count", "tokens", "stages", "size")), ("state", ctypes.c_void_p), ("memory", ctypes.c_void_p),
        ("_", ctypes.c_char * 32),
    ]  # fmt: skip


def compose(items: Sequence[Link | Norm]) -> tuple[list[Link], list[int]]:
    """The longest chain that `items`, in the order of their steps, begin with; and how many of them each link ends with.

    Products of one input that stand side by side make one link.
    """
    links: list[Link] = []
    ends: list[int] = []
    norm: Norm | None = None
    for index, item in enumerate(items):
        last = links[-1] if links else None
        if isinstance(item, Norm):
            if last is None or norm is not None or len(last.outputs) > 1 or not _same(item.x, last.products[0].y):
                break
            norm = item
        elif last is not None and norm is None and _joins(last, item):
            links[-1] = replace(last, products=[*last.products, *item.products])
            ends[-1] = index + 1
        elif last is None or (len(last.outputs) == 1 and _same(item.x, norm.y if norm else last.products[0].y)):
            if last is not None:
                links[-1] = replace(last, norm=norm)
            links.append(item)
            ends.append(index + 1)
            norm = None
        else:
            break
    return links, ends


def _same(a: Any, b: Any) -> bool:
    return int(a.data.ptr) == int(b.data.ptr) and a.shape == b.shape


def _joins(last: Link, item: Link) -> bool:
    return not last.gated and not item.gated and item.activation == last.activation and _same(item.x, last.x) and len(last.products) + len(item.products) <= cuda_gemm.MOST_JOBS


def refusal(links: Sequence[Link]) -> str | None:
    """Why there is no kernel for these links on the GPU at hand, or None."""
    tokens = links[0].x.shape[0]
    if tokens > TOKENS:
        return f"{tokens} tokens, at most {TOKENS}"
    if len(links) > MOST_LINKS:
        return f"{len(links)} links, at most {MOST_LINKS}"
    if not all(cuda_gemm.supported(link.x, link.products) for link in links):
        return "types, sizes or the GPU"
    if len({link.activation for link in links} - {"none"}) > 1:
        return "two activations"
    for before, link in pairwise(links):
        norm = before.norm
        if not _same(link.x, norm.y if norm else before.products[0].y) or (norm and len(before.outputs) > 1):
            return "a product that does not read the one before it"
        if norm is not None and (norm.scale.dtype != before.x.dtype or before.x.dtype.name != "bfloat16"):
            return "a norm of another type, or of float16, for which y * scale may be too large"
    normed: set[int | None] = set()  # what earlier links read lay where these came later, perhaps
    for link in links:
        if any(address(p.residual) in normed for p in link.products):
            return "the result of a norm as a residual"
        normed |= {address(link.norm.y)} if link.norm else set()
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


def variant(dtype: str, activation: str) -> tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `cuda_launch.module` needs."""
    defines = {"ACTIVATION": ACTIVATIONS.index(activation), "WINDOW": WINDOW, "LINKS": MOST_LINKS}
    return "chain", dtype, tuple(f"{n}={v}" for n, v in defines.items()), (("WGMMA\n", wgmma(TOKENS, dtype=dtype)),)


def key(links: Sequence[Link]) -> str:
    """What tells one chain from another where time is concerned."""

    def told(link: Link) -> str:
        return f"{'+'.join(str(p.w.shape[0]) for p in link.products)}{' gated' if link.gated else ''}"

    return f"chain {links[0].x.dtype.name} {links[0].x.shape[0]}x{links[0].x.shape[1]} > {' > '.join(told(link) for link in links)}"


def chain(links: Sequence[Link], memory: Any = None) -> Launch:
    """A function that enqueues the links in order. Call only where `refusal` is None.

    `memory`, uint8 of 512 bytes of zeros and then two parts of 0xFF, each of `memory_bytes(links)` or more, may be shared by chains that
    never run at the same time.
    """
    tokens, blocks, stages = links[0].x.shape[0], _blocks(), RING // STAGE
    if memory is None:
        memory = new_memory(memory_bytes(links))
    places, _ = _layout(links, blocks)
    base = int(memory.data.ptr)
    call = _Chain(count=len(links), tokens=tokens, stages=stages, size=(memory.nbytes - 512) // 2, state=base, memory=base + 512)
    for index, (link, into, place) in enumerate(zip(links, call.link, places, strict=False)):
        before = links[index - 1].norm if index else None
        w = [tensor_map(p.w, (TILE // 2, 64)) for p in link.products]
        for number, map_ in enumerate((w + w[:1] * 2)[:3]):
            ctypes.memmove(ctypes.byref(into.maps[number]), ctypes.byref(map_), 128)
        for number, p in enumerate(link.products):
            into.job[number] = Job(address(p.y) if link.kept else None, address(p.bias), address(p.residual), p.w.shape[0])
        for name, offset in place.items():
            setattr(into, name, offset)
        into.x, into.scale = address(link.x), address(link.norm.scale) if link.norm else None
        if before is not None:
            into.epsilon, into.normed_tiles = before.epsilon, links[index - 1].tiles
        into.jobs, into.inner, into.tiles, into.gated, into.activated = len(link.outputs), link.x.shape[1], link.tiles, link.gated, link.activation != "none"
        into.grain = best_grain(link.tiles, link.steps, blocks)
    activation = next((link.activation for link in links if link.activation != "none"), "none")
    function = module(*variant(links[0].x.dtype.name, activation)).get_function("multiply")
    shared = 1024 + stages * (STAGE + 24) + TOKENS * 548 + 64
    return launcher(function, (blocks,), 352, [call], shared=shared, keep=(links, memory))


def memory_bytes(links: Sequence[Link]) -> int:
    """Bytes of one of the two memories through which the blocks talk."""
    return _layout(links, _blocks())[1]


def new_memory(size: int) -> Any:
    """What chains of at most `size` bytes each may share."""
    import cupy

    memory = cupy.full(512 + 2 * size, 0xFF, cupy.uint8)
    memory[:512] = 0
    return memory


def _blocks() -> int:
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def _layout(links: Sequence[Link], blocks: int) -> tuple[list[dict[str, int]], int]:
    """Where each link finds and leaves what it shares with others, in bytes; -1: nowhere. And the bytes in all."""
    tokens = links[0].x.shape[0]
    size = 0
    found: list[dict[str, int]] = []

    def room(count: int) -> int:
        nonlocal size
        size += ceil_div(count, 512) * 512
        return size - ceil_div(count, 512) * 512

    written: dict[int | None, int] = {}  # where y of earlier links are sent
    for index, link in enumerate(links):
        y, last = link.products[0].y, index == len(links) - 1
        before = found[-1] if found else None
        later = {address(p.residual) for link in links[index + 1 :] for p in link.products}
        place = {
            "source": -1 if before is None else before["sent"] if links[index - 1].norm is None else before["scaled"],
            "residual": written.get(address(link.products[0].residual), -1), "normed": before["squares"] if before else -1,
            "sent": room(y.nbytes) if not last and (link.norm is None or address(y) in later) else -1,
            "scaled": room(y.nbytes) if link.norm else -1, "squares": room(link.tiles * TOKENS * 4) if link.norm else -1,
            "room": deal(link.tiles, link.steps, best_grain(link.tiles, link.steps, blocks), blocks)[2] - 1,
        }  # fmt: skip
        place["parts"] = room(link.tiles * place["room"] * tokens * 256)
        written[address(y)] = place["sent"]
        found.append(place)
    return found, size
