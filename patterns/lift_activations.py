"""Activations as exporters spell them -> ONNX's own operators."""

from __future__ import annotations

from math import pi, sqrt

from rewrite.pattern import any_of, scalar
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
    """x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) -> Gelu(x, approximate="tanh"); BLOOM takes x out of the sum."""

    def pattern(op, x):
        cube, square = any_of(op.Pow(x, 3.0), x * x * x), any_of(op.Pow(x, 2.0), x * x)
        inner = any_of(sqrt(2 / pi) * (x + 0.044715 * cube), sqrt(2 / pi) * x * (1.0 + 0.044715 * square))
        return 0.5 * x * (1.0 + op.Tanh(inner))

    def replace(op, x):
        return op.Gelu(x, approximate="tanh")


@rule(tier="lift")
class SwishSigmoid:
    """x * sigmoid(alpha * x) -> Swish(x, alpha): 1 is SiLU, 1.702 CLIP's quick GELU."""

    def pattern(op, x):
        return x * op.Sigmoid(any_of(x * scalar("alpha"), x))

    def replace(op, x, alpha):
        return op.Swish(x, alpha=alpha)


@rule(tier="lift")
class SquaredRelu:
    """relu(x) * relu(x) -> relu(x)^2 (Primer, Nemotron)."""

    def pattern(op, x):
        positive = op.Relu(x)
        return positive * positive

    def replace(op, x):
        positive = op.Relu(x)
        return op.Pow(positive, op.constant(2, x.dtype))
