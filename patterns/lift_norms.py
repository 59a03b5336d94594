"""Normalizations as exporters spell them -> RMSNormalization, LayerNormalization."""

from __future__ import annotations

from rewrite.pattern import any_of, maybe, scalar
from rewrite.registry import rule


def _mean(op, x):
    """Mean over the last axis; the axis is an input from opset 18 on, an attribute before."""
    return any_of(op.ReduceMean(x, [-1], keepdims=1), op.ReduceMean(x, axes=[-1], keepdims=1))


def _square(op, x):
    return any_of(op.Pow(x, 2.0), x * x)


def _check_scale(x, scale, output):
    if scale.rank != 1 or (x.shape is not None and x.shape[-1] != scale.shape[0]):
        return f"the weight has shape {scale.shape}, expected one element for each of the last dimension of {x.shape}"
    return None


@rule(tier="lift")
class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight -> RMSNormalization; casts to float32 and back included."""

    def pattern(op, x, scale):
        wide = maybe(op.Cast, x)
        root = op.Sqrt(_mean(op, _square(op, wide)) + scalar("epsilon"))
        return any_of(
            wide * any_of(op.Reciprocal(root), 1.0 / root) * scale,
            op.Cast(wide * any_of(op.Reciprocal(root), 1.0 / root)) * scale,
            op.Cast(wide * any_of(op.Reciprocal(root), 1.0 / root) * scale),
            op.Div(wide, root) * scale,
            op.Cast(op.Div(wide, root)) * scale,
        )

    check = _check_scale

    def replace(op, x, scale, epsilon):
        return op.RMSNormalization(x, scale, axis=-1, epsilon=epsilon)


@rule(tier="lift")
class LayerNorm:
    """(x - mean) / sqrt(var + epsilon) * weight + bias -> LayerNormalization."""

    def pattern(op, x, scale, bias):
        centred = op.Sub(x, _mean(op, x))
        root = op.Sqrt(_mean(op, _square(op, centred)) + scalar("epsilon"))
        return any_of(op.Div(centred, root) * scale, centred * op.Reciprocal(root) * scale) + bias

    check = _check_scale

    def replace(op, x, scale, bias, epsilon):
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=epsilon)
