"""Matrix products on Hopper by our own kernels (`gemm.cu`): which of them, in what shape, and the launch.

Weights lie [N, K] (`trans_w`), inputs and outputs are packed, float16 or bfloat16. Several products of one input share a launch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rewrite.plugins.cuda_launch import MOST_SHARED, Launch, capability, launcher, module, tensor_map, wgmma

ACTIVATIONS = ("none", "relu", "relu2", "gelu", "gelu_tanh", "swish", "quick_gelu", "tanh", "sigmoid")  # by their number in gemm.cu
NARROW, WIDE = (16, 32, 64, 128), {128: 6, 192: 5, 256: 4}  # tokens of a narrow tile; features of a wide one, and its stages
MOST_JOBS = 3
LEAST_PART = 64  # features of a part of a row of which a product tells the sums
TRIED = 4  # layouts that are measured, of those that the estimate likes best
CLUSTERS = (1, 2, 4, 8)


class Job(ctypes.Structure):
    _fields_ = [("y", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("features", ctypes.c_longlong)]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p), ("shift", ctypes.c_void_p * 3), ("bias", ctypes.c_void_p * 3), ("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p),
        *((n, ctypes.c_int) for n in ("parts", "part", "width", "centred")), *((n, ctypes.c_float) for n in ("epsilon", "by", "back", "share")),
    ]  # fmt: skip


class _Told(ctypes.Structure):
    _fields_ = [("rows", ctypes.c_void_p), ("z", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("by", ctypes.c_float)]


class _Call(ctypes.Structure):
    _fields_ = [("job", Job * 3), *((n, ctypes.c_int) for n in ("jobs", "tokens", "inner", "token_tiles", "feature_tiles", "stages")), ("norm", _Norm), ("told", _Told)]


@dataclass
class Product:
    """y = activation(x @ w^T + bias) + residual: CuPy arrays w [N, K], bias [N], residual and y [M, N]."""

    y: Any
    w: Any
    bias: Any = None
    residual: Any = None


@dataclass
class Told:
    """What a product that a norm follows writes for those that take the norm over: z = y * scale * by [M, N], and of each row and `part` features, of
    y, the sum and the squares around their mean: rows, float32 [parts, M, 2]. Its own y may be None then, where nobody else reads it.

    scale [N] is the norm's, and `by` a power of two that makes none of it larger than 1. `part` is what the product chose: LEAST_PART, or a wide tile.
    """

    z: Any
    rows: Any
    scale: Any
    by: float
    part: int = LEAST_PART


@dataclass
class Norm:
    """The norm of y that a product takes over, whose x or residual is `told.z`: layer norm, or with `centred` False root mean square.

    Of x: for each product shift = by * (w @ scale) and bias = w @ offset + its own, float32 [N] or None, which take the place of its bias. Of the
    residual: offset, the norm's bias [N] or None.
    """

    told: Told
    epsilon: float
    centred: bool
    of_x: bool
    shifts: Sequence[Any] = ()
    biases: Sequence[Any] = ()
    offset: Any = None

    @property
    def kind(self) -> int:
        """NORMED in gemm.cu."""
        return 1 if self.of_x else 2


@dataclass(frozen=True)
class Shape:
    """How a product is laid out: `kind` "narrow" (tile: tokens; split: blocks that share the inner dimension) or "wide" (tile: features)."""

    kind: str
    tile: int
    split: int = 1

    def __str__(self) -> str:
        return f"{self.kind} {self.tile}{f' / {self.split}' if self.split > 1 else ''}"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def supported(x: Any, products: Sequence[Product]) -> bool:
    """Whether the kernels take these arrays on the GPU at hand."""
    if capability() != 90 or x.dtype.name not in ("float16", "bfloat16") or len(products) > MOST_JOBS:
        return False
    arrays = [a for p in products for a in (p.y, p.w, p.bias, p.residual) if a is not None]
    if any(a.dtype != x.dtype or not a.flags.c_contiguous or a.data.ptr % 16 for a in (x, *arrays)):
        return False
    return x.shape[-1] % 8 == 0 and all(p.w.shape[0] % 8 == 0 for p in products)


def shapes(tokens: int, features: int, inner: int) -> list[Shape]:
    """The layouts worth measuring for a product."""
    steps = ceil_div(inner, 64)
    tiles = [t for t in NARROW if t < 2 * tokens or t == NARROW[0]]
    found = [Shape("narrow", t, s) for t in tiles for s in CLUSTERS if s <= steps and t >= s and ceil_div(tokens, t) * ceil_div(features, 64) * s <= 132 * 16]
    found += [Shape("wide", t) for t in WIDE if tokens > 64]
    return found or [Shape("narrow", tiles[-1])]  # few tokens of very many features: a head of 262,144 words


def choose(tokens: int, widths: Sequence[int], inner: int) -> list[Shape]:
    """The layouts worth trying for products of one input and so many features each, best first by estimate: the waves of blocks, each with
    the time of its tile."""
    return sorted(shapes(tokens, sum(widths), inner), key=lambda s: estimate(s, tokens, widths, inner))[:TRIED]


def estimate(shape: Shape, tokens: int, widths: Sequence[int], inner: int) -> float:
    """About how many microseconds a layout takes on an H100. A tile is of one product."""
    steps = ceil_div(inner, 64)
    if shape.kind == "wide":
        waves = ceil_div(ceil_div(tokens, 128) * sum(ceil_div(w, shape.tile) for w in widths), 132)
        return waves * (steps * shape.tile * 0.00236 + 2.55 + 0.0095 * shape.tile)
    per, stages = ceil_div(steps, shape.split), _stages(shape, inner)
    together = max(1, min(12, MOST_SHARED // (_shared(shape, stages) + 1024)))  # blocks of a multiprocessor
    blocks = ceil_div(tokens, shape.tile) * sum(ceil_div(w, 64) for w in widths) * shape.split
    active, waves = min(together, max(1.0, blocks / 132)), ceil_div(blocks, 132 * together)
    step = max(0.249 + 0.00009 * shape.tile, active * (8192 + 128 * shape.tile) * 1.9e-5)
    return 0.14 + 1.29 * (shape.split > 1) + 0.36 * shape.split + waves * (per * step + 1.6 * active**0.486)


def _shared(shape: Shape, stages: int) -> int:
    """Bytes of shared memory of a block."""
    if shape.kind == "narrow":
        return 1024 + stages * (8192 + shape.tile * 128 + 16) + shape.tile * 280
    return 1024 + stages * (16384 + shape.tile * 128 + 16) + shape.tile * 32 + 2080


def _stages(shape: Shape, inner: int) -> int:
    steps = ceil_div(ceil_div(inner, 64), shape.split)
    # Small tiles leave half of the memory free: there the next kernel's blocks can fetch their weights while these still run.
    memory = MOST_SHARED // 2 - 1024 if shape.tile <= 64 else MOST_SHARED
    return max(1, min(steps, (memory - 1024 - shape.tile * 280) // (8192 + shape.tile * 128 + 16)))


def _threads(shape: Shape) -> int:
    return 160 if shape.kind == "narrow" else 384


def variant(shape: Shape, dtype: str, activation: str, gated: bool, normed: int = 0, tells: bool = False) -> tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `cuda_launch.module` needs for a layout."""
    second = WIDE[shape.tile] if shape.kind == "wide" else shape.split
    values = {"ACTIVATION": ACTIVATIONS.index(activation), "GATED": str(gated).lower(), "NORMED": normed, "TELLS": int(tells), "THREADS": _threads(shape)}
    return "gemm", dtype, (*(f"{n}={v}" for n, v in values.items()), f"KERNEL={shape.kind}<{shape.tile}, {second}>"), (("WGMMA\n", wgmma(shape.tile, dtype=dtype)),)


def candidates(x: Any, products: Sequence[Product], activation: str, gated: bool = False, norm: Norm | None = None, told: Told | None = None) -> dict[str, Callable[[], Launch]]:
    """The layouts of `product` worth trying by name, best first by estimate."""
    tokens, inner = x.shape
    widths = [p.w.shape[0] for p in products]
    return {str(s): partial(product, x, products, activation, gated, s, norm, told) for s in choose(tokens, [sum(widths)] if gated else widths, inner)}


def key(x: Any, products: Sequence[Product], activation: str, gated: bool = False, norm: Norm | None = None, told: Told | None = None) -> str:
    """What tells one call from another where time is concerned."""
    widths = "+".join(str(p.w.shape[0]) for p in products)
    also = {"bias": products[0].bias is not None, "residual": products[0].residual is not None, "gated": gated, "normed": norm is not None, "for a norm": told is not None}
    extras = "".join(f" {n}" for n, there in also.items() if there)
    return f"product {x.dtype.name} {x.shape[0]}x{widths}x{x.shape[1]} {activation}{extras}"


def product(x: Any, products: Sequence[Product], activation: str = "none", gated: bool = False, shape: Shape | None = None, norm: Norm | None = None,
            told: Told | None = None) -> Launch:  # fmt: skip
    """A function that enqueues the products of x [M, K]; with `gated`, the one y = activation(x @ w^T + bias) * (x @ w'^T + bias') of two.

    A gated call has two products, whose second gives w' and bias' alone. Call only where `supported` says so. With `norm`, x or the residual is
    what that norm makes of its z; with `told`, which one product alone may have, a norm follows.
    """
    tokens, inner = x.shape
    outputs = products[:1] if gated else products
    shape = shape or choose(tokens, [p.w.shape[0] * (2 if gated else 1) for p in outputs], inner)[0]
    narrow = shape.kind == "narrow"
    width = (64 if narrow else shape.tile) // (2 if gated else 1)
    feature_tiles = sum(ceil_div(p.w.shape[0], width) for p in outputs)
    token_tiles = ceil_div(tokens, shape.tile if narrow else 128)
    stages = _stages(shape, inner) if narrow else WIDE[shape.tile]
    call = _Call(jobs=len(outputs), tokens=tokens, inner=inner, token_tiles=token_tiles, feature_tiles=feature_tiles, stages=stages)
    for index, p in enumerate(products):
        call.job[index] = Job(address(p.y), address(p.bias), address(p.residual), p.w.shape[0])
    if norm is not None:
        width = norm.told.scale.shape[0]
        call.norm = _Norm(
            rows=address(norm.told.rows), scale=address(norm.told.scale), offset=address(norm.offset), parts=ceil_div(width, norm.told.part), part=norm.told.part, width=width,
            centred=norm.centred, epsilon=norm.epsilon, by=norm.told.by, back=1 / norm.told.by, share=1 / width,
        )  # fmt: skip
        for index, (shift, bias) in enumerate(zip(norm.shifts, norm.biases, strict=True)):
            call.norm.shift[index], call.norm.bias[index] = address(shift), address(bias)
    if told is not None:
        told.part = LEAST_PART if narrow else shape.tile
        call.told = _Told(address(told.rows), address(told.z), address(told.scale), told.by)
    w = [tensor_map(p.w, (32 if narrow else shape.tile // 2, 64)) for p in products]
    arguments = [tensor_map(x, (shape.tile if narrow else 128, 64)), *(w + w[:1] * 2)[:3], call]
    function, block = module(*variant(shape, x.dtype.name, activation, gated, norm.kind if norm else 0, told is not None)).get_function("multiply"), _threads(shape)
    grid = (shape.split, feature_tiles, token_tiles) if narrow else (min(132, token_tiles * feature_tiles),)
    return launcher(function, grid, block, arguments, shared=_shared(shape, stages), cluster=shape.split, keep=(x, products, norm, told))


def address(array: Any) -> int | None:
    return None if array is None else int(array.data.ptr)
