"""What the ranks of a model in shards or stages tell one another: sums, joins, messages. An executor with several ranks does them by its communicator."""

from __future__ import annotations

from rewrite.plugins.activations import Array, wide
from rewrite.registry import plugin

TOLERANCE = {"float64": (1e-12, 1e-12), "float32": (1e-6, 1e-6), "float16": (1e-3, 1e-3), "bfloat16": (8e-3, 8e-3)}


@plugin
class AllReduce:
    """y = the sum of x over all ranks + bias + residual, on every rank.

    x [..., N], of every rank its part of a sum; bias [N] and residual like x [..., N] are the same on all ranks and added once.
    Summed in float32 (float64 for float64) in the order of the ranks, so every rank gets the same bits. The reference is that of one rank.
    """

    inputs = ("x", "bias?", "residual?")
    tolerance = TOLERANCE

    def reference(x: Array, bias: Array | None = None, residual: Array | None = None) -> Array:
        y = wide(x)
        if bias is not None:
            y = y + wide(bias)
        return (y if residual is None else y + wide(residual)).astype(x.dtype)


@plugin
class AllGather:
    """y = the x of all ranks, one after the other along the last axis, on every rank.

    x [..., N / world], y [..., N]. The reference is that of one rank, which has everything.
    """

    inputs = ("x",)
    tolerance = TOLERANCE

    def reference(x: Array) -> Array:
        return x


@plugin
class Send:
    """y = x, on its way from the ranks of stage `source` to those of stage `target`, each to the one in its place there."""

    inputs = ("x",)
    attributes = {"source": 0, "target": 1}
    tolerance = TOLERANCE

    def reference(x: Array, *, source: int, target: int) -> Array:
        return x


@plugin
class Recv:
    """y = x, as it came from stage `source`."""

    inputs = ("x",)
    attributes = {"source": 0, "target": 1}
    tolerance = TOLERANCE

    def reference(x: Array, *, source: int, target: int) -> Array:
        return x
