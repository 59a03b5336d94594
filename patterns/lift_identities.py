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
