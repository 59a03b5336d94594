"""Normalizations as exporters spell them -> RMSNormalization, LayerNormalization."""

from __future__ import annotations

import numpy as np

from rewrite.pattern import any_of, attr, ints, maybe, scalar
from rewrite.registry import rule


def _mean(op, x, axes="axes", restored=None):
    """Mean over `axes`, an input from opset 18 on, an attribute before; `restored`: the axis dropped and put back."""
    kept = [op.ReduceMean(x, ints(axes), keepdims=1), op.ReduceMean(x, axes=attr(axes), keepdims=1)]
    if restored is None:
        return any_of(*kept)
    dropped = any_of(op.ReduceMean(x, ints(axes), keepdims=0), op.ReduceMean(x, axes=attr(axes), keepdims=0))
    return any_of(*kept, op.Unsqueeze(dropped, restored), op.Reshape(dropped, restored))


def _square(op, x):
    return any_of(op.Pow(x, 2.0), x * x)


def _offset(mean):
    """mean + epsilon; exporters delete an epsilon up to 1e-8."""
    return any_of(mean + scalar("epsilon"), mean)


def _inverse(op, mean):
    """1 / sqrt(mean + epsilon)."""
    root = op.Sqrt(_offset(mean))
    return any_of(op.Reciprocal(root), 1.0 / root, op.Pow(_offset(mean), -0.5))


def _scaled(op, x, scale, mean):
    """x / sqrt(mean + epsilon) * scale, the weight before or after."""
    root = op.Sqrt(_offset(mean))
    return any_of(x * _inverse(op, mean) * scale, op.Div(x, root) * scale, op.Div(x * scale, root))


def _check_axes(x, *axes):
    for found in axes:
        if found is not None and list(found) not in ([-1], [(x.rank or 0) - 1]):
            return f"the mean is over the axes {found} of {x.shape}, not over the last"
    return None


def _check_scale(x, scale, output):
    if x.shape is None or scale.rank != 1 or x.shape[-1] != scale.shape[0]:
        return f"the weight has shape {scale.shape}, expected one element for each of the last dimension of {x.shape}"
    return None


def _check_types(x, output):
    """ONNX Runtime has the operator for one type only; where it is a function of ours (before opset 23), its body casts."""
    if x.graph.opset >= 23 and x.dtype != output.dtype:
        return f"the input is {x.dtype}, the result {output.dtype}: ONNX Runtime has no such RMSNormalization"
    return None


def _ones(op, x, output):
    """The weight of a norm that has none. ONNX's operators require one."""
    return op.constant(np.ones(x.shape[-1]), output.tensor.dtype)


def _check_plain(x):
    return None if x.shape is not None and isinstance(x.shape[-1], int) else f"the last dimension of {x.shape} is not known"


@rule(tier="lift", priority=1)
class RmsNorm:
    """x / sqrt(mean(x^2) + epsilon) * weight -> RMSNormalization; casts to float32 and back included."""

    def pattern(op, x, scale, restored):
        wide = maybe(op.Cast, x)
        mean = _mean(op, _square(op, maybe(op.Cast, x)), restored=restored)  # TorchScript casts for each use
        normed = any_of(wide * maybe(op.Cast, _inverse(op, mean)), op.Div(wide, op.Sqrt(_offset(mean))))
        return any_of(_scaled(op, wide, scale, mean), op.Cast(normed) * scale, wide * op.Cast(_inverse(op, mean)) * scale, op.Cast(_scaled(op, wide, scale, mean)))

    def check(x, scale, axes, output):
        if scale.dtype != output.dtype:
            return f"the weight is {scale.dtype}, the result {output.dtype}: RMSNormalization gives the type of its weight"
        return _check_axes(x, axes) or _check_scale(x, scale, output) or _check_types(x, output)

    def replace(op, x, scale, epsilon):
        return op.RMSNormalization(x, scale, axis=-1, epsilon=epsilon or 0.0)


@rule(tier="lift")
class RmsNormPlain:
    """x / sqrt(mean(x^2) + epsilon) without a weight -> RMSNormalization with ones."""

    def pattern(op, x, restored):
        wide = maybe(op.Cast, x)
        mean = _mean(op, _square(op, maybe(op.Cast, x)), restored=restored)
        normed = any_of(wide * _inverse(op, mean), op.Div(wide, op.Sqrt(_offset(mean))))
        return maybe(op.Cast, normed)

    def check(x, axes, output):
        return _check_axes(x, axes) or _check_plain(x) or _check_types(x, output)

    def replace(op, x, epsilon, output):
        return op.RMSNormalization(x, _ones(op, x, output), axis=-1, epsilon=epsilon or 0.0)


def _centred(op, x, axes):
    return op.Sub(x, _mean(op, x, axes))


def _variance(op, x, restored):
    """Mean square of x - mean(x), which exporters of `var` compute apart from the numerator, float16 in float32 and back."""
    return maybe(op.Cast, _mean(op, _square(op, _centred(op, maybe(op.Cast, x), "axes_inner")), restored=restored))


def _layer_norm(op, x, scale, restored):
    """Spelled out, or as PyTorch's exporter leaves it at opset 23: the RMSNormalization of x - mean(x)."""
    centred = _centred(op, x, "axes_outer")
    return any_of(_scaled(op, centred, scale, _variance(op, x, restored)), op.RMSNormalization(centred, scale, axis=-1, epsilon=attr("epsilon")))


@rule(tier="lift", priority=4)
class LayerNorm:
    """(x - mean) / sqrt(var + epsilon) * weight + bias -> LayerNormalization."""

    def pattern(op, x, scale, bias, restored):
        return _layer_norm(op, x, scale, restored) + bias

    def check(x, scale, bias, axes, axes_inner, axes_outer, output):
        if bias.rank != 1:
            return f"the bias has shape {bias.shape}, expected one dimension"
        return _check_axes(x, axes, axes_inner, axes_outer) or _check_scale(x, scale, output)

    def replace(op, x, scale, bias, epsilon):
        return op.LayerNormalization(x, scale, bias, axis=-1, epsilon=epsilon or 0.0)


@rule(tier="lift", priority=3)
class LayerNormNoBias:
    """(x - mean) / sqrt(var + epsilon) * weight -> LayerNormalization."""

    def pattern(op, x, scale, restored):
        return _layer_norm(op, x, scale, restored)

    def check(x, scale, axes, axes_inner, axes_outer, output):
        return _check_axes(x, axes, axes_inner, axes_outer) or _check_scale(x, scale, output)

    def replace(op, x, scale, epsilon):
        return op.LayerNormalization(x, scale, axis=-1, epsilon=epsilon or 0.0)


@rule(tier="lift", priority=2)
class LayerNormPlain:
    """(x - mean) / sqrt(var + epsilon) without weight and bias -> LayerNormalization with ones."""

    def pattern(op, x, restored):
        centred, variance = _centred(op, x, "axes_outer"), _variance(op, x, restored)
        return any_of(centred * _inverse(op, variance), op.Div(centred, op.Sqrt(_offset(variance))))

    def check(x, axes, axes_inner, axes_outer):
        return _check_axes(x, axes, axes_inner, axes_outer) or _check_plain(x)

    def replace(op, x, epsilon, output):
        return op.LayerNormalization(x, _ones(op, x, output), axis=-1, epsilon=epsilon or 0.0)
