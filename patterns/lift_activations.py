"""Activations as exporters spell them -> ONNX's own operators."""

from __future__ import annotations

from math import pi, sqrt

from rewrite.pattern import any_of
from rewrite.registry import rule


@rule(tier="lift")
class GeluErf:
    """x * 0.5 * (1 + erf(x / sqrt(2))) -> Gelu(x), any order of the factors."""

    def pattern(op, x):
        return 0.5 * x * (1.0 + op.Erf(x / sqrt(2)))

    def replace(op, x):
        return op.Gelu(x)


@rule(tier="lift")
class GeluTanh:
    """x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) -> Gelu(x, approximate="tanh")."""

    def pattern(op, x):
        cube = any_of(op.Pow(x, 3.0), x * x * x)
        return 0.5 * x * (1.0 + op.Tanh(sqrt(2 / pi) * (x + 0.044715 * cube)))

    def replace(op, x):
        return op.Gelu(x, approximate="tanh")


@rule(tier="lift")
class SwishSigmoid:
    """x * sigmoid(x) -> Swish(x)."""

    def pattern(op, x):
        return x * op.Sigmoid(x)

    def replace(op, x):
        return op.Swish(x)
