"""Operators that change nothing -> gone."""

from __future__ import annotations

from rewrite.pattern import scalar
from rewrite.registry import rule


@rule(tier="lift", priority=15, exact=True)
class FactorOne:
    """x * 1 -> x: the alpha and beta of TorchScript's baddbmm."""

    def pattern(op, x):
        return x * scalar("one")

    def check(x, one, output):
        if one != 1.0:
            return f"the factor is {one}"
        return None if x.shape is not None and x.shape == output.shape else f"the product has shape {output.shape}, x {x.shape}"

    def replace(op, x):
        return x


@rule(tier="lift", priority=15, exact=True)
class IdleExpand:
    """Expand to the shape that it has -> x: what the dynamo exporter leaves of a mean that keeps its dimension."""

    def pattern(op, x, shape):
        return op.Expand(x, shape)

    def check(x, output):
        return None if x.shape is not None and None not in x.shape and x.shape == output.shape else f"from {x.shape} to {output.shape} it may repeat"

    def replace(op, x):
        return x
