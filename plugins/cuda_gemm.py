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
TRIED = 4  # layouts that are measured, of those that the estimate likes best
CLUSTERS = (1, 2, 4, 8)


class Job(ctypes.Structure):
    _fields_ = [("y", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("features", ctypes.c_longlong)]


class _Call(ctypes.Structure):
    _fields_ = [("job", Job * 3), *((n, ctypes.c_int) for n in ("jobs", "tokens", "inner", "token_tiles", "feature_tiles", "stages"))]


@dataclass
class Product:
    """y = activation(x @ w^T + bias) + residual: CuPy arrays w [N, K], bias [N], residual and y [M, N]."""

    y: Any
    w: Any
    bias: Any = None
    residual: Any = None


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
        return 1024 + stages * (8192 + shape.tile * 128 + 16) + shape.tile * 272
    return 1024 + stages * (16384 + shape.tile * 128 + 16) + shape.tile * 8


def _stages(shape: Shape, inner: int) -> int:
    steps = ceil_div(ceil_div(inner, 64), shape.split)
    # Small tiles leave half of the memory free: there the next kernel's blocks can fetch their weights while these still run.
    memory = MOST_SHARED // 2 - 1024 if shape.tile <= 64 else MOST_SHARED
    return max(1, min(steps, (memory - 1024 - shape.tile * 272) // (8192 + shape.tile * 128 + 16)))


def _threads(shape: Shape) -> int:
    return 160 if shape.kind == "narrow" else 384


def variant(shape: Shape, dtype: str, activation: str, gated: bool) -> tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `cuda_launch.module` needs for a layout."""
    second = WIDE[shape.tile] if shape.kind == "wide" else shape.split
    defines = (f"ACTIVATION={ACTIVATIONS.index(activation)}", f"GATED={str(gated).lower()}", f"THREADS={_threads(shape)}", f"KERNEL={shape.kind}<{shape.tile}, {second}>")
    return "gemm", dtype, defines, (("WGMMA\n", wgmma(shape.tile, dtype=dtype)),)


def candidates(x: Any, products: Sequence[Product], activation: str, gated: bool = False) -> dict[str, Callable[[], Launch]]:
    """The layouts of `product` worth trying by name, best first by estimate."""
    tokens, inner = x.shape
    widths = [p.w.shape[0] for p in products]
    return {str(s): partial(product, x, products, activation, gated, s) for s in choose(tokens, [sum(widths)] if gated else widths, inner)}


def key(x: Any, products: Sequence[Product], activation: str, gated: bool = False) -> str:
    """What tells one call from another where time is concerned."""
    widths = "+".join(str(p.w.shape[0]) for p in products)
    extras = "".join(f" {n}" for n, there in (("bias", products[0].bias is not None), ("residual", products[0].residual is not None), ("gated", gated)) if there)
    return f"product {x.dtype.name} {x.shape[0]}x{widths}x{x.shape[1]} {activation}{extras}"


def product(x: Any, products: Sequence[Product], activation: str = "none", gated: bool = False, shape: Shape | None = None) -> Launch:
    """A function that enqueues the products of x [M, K]; with `gated`, the one y = activation(x @ w^T + bias) * (x @ w'^T + bias') of two.

    A gated call has two products, whose second gives w' and bias' alone. Call only where `supported` says so.
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
    w = [tensor_map(p.w, (32 if narrow else shape.tile // 2, 64)) for p in products]
    arguments = [tensor_map(x, (shape.tile if narrow else 128, 64)), *(w + w[:1] * 2)[:3], call]
    function, block = module(*variant(shape, x.dtype.name, activation, gated)).get_function("multiply"), _threads(shape)
    grid = (shape.split, feature_tiles, token_tiles) if narrow else (min(132, token_tiles * feature_tiles),)
    return launcher(function, grid, block, arguments, shared=_shared(shape, stages), cluster=shape.split, keep=(x, products))


def address(array: Any) -> int | None:
    return None if array is None else int(array.data.ptr)
