"""Shape arithmetic of exporters, made static where the shapes tell the answer: `Reshape` to [0, 0, 12, 32]."""

from __future__ import annotations

from math import prod

from rewrite.pattern import any_of, attr
from rewrite.registry import rule


def _static_target(source, target):
    """The constant operand of a `Reshape` from shape `source` to shape `target`: 0 copies, one -1 is what is left."""
    if source is None or target is None:
        return None
    dims = []
    for i, dim in enumerate(target):
        if isinstance(dim, int) and dim > 0:
            dims.append(dim)
        elif isinstance(dim, str) and i < len(source) and source[i] == dim:
            dims.append(0)
        else:
            dims.append(-1)
    return dims if dims.count(-1) <= 1 else None


@rule(tier="lift", priority=10, exact=True)
class StaticReshape:
    """Reshape by computed shape -> Reshape by constant shape."""

    def pattern(op, x, shape):
        return op.Reshape(x, shape)

    def check(x, shape, output):
        if shape.is_constant:
            return "the target shape is constant already"
        if _static_target(x.shape, output.shape) is None:
            return f"from {x.shape} to {output.shape} leaves more than one dimension open"
        return None

    def replace(op, x, output):
        return op.Reshape(x, _static_target(x.shape, output.shape))


def _gemm(op, *inputs):
    return op.Gemm(*inputs, transA=0, transB=attr("trans"), alpha=1.0, beta=1.0)


@rule(tier="lift", priority=10)
class FlatGemm:
    """Reshape to two dimensions -> Gemm -> Reshape back (GPT-2's Conv1D), as a MatMul with bias."""

    def pattern(op, x, flat, w, b, shape):
        return op.Reshape(any_of(_gemm(op, op.Reshape(x, flat), w, b), _gemm(op, op.Reshape(x, flat), w)), shape)

    def check(x, w, b, trans, output):
        if trans or w.shape is None or (b is not None and b.rank != 1):
            return f"the weight {w.shape} is transposed, or the bias {b} has not one dimension"
        if x.shape is None or output.shape is None or None in output.shape or list(x.shape[: output.rank - 1]) != list(output.shape[:-1]):
            return f"the leading dimensions change, from {x.shape} to {output.shape}"
        merged = x.shape[output.rank - 1 :]
        if output.shape[-1] != w.shape[1] or not all(isinstance(n, int) for n in merged) or prod(merged) != w.shape[0]:
            return f"the last dimension is split: {x.shape}, {w.shape} -> {output.shape}"
        return None

    def replace(op, x, w, b, output):
        if x.rank != output.rank:  # heads [B, S, H, D], put together by the same reshape
            x = op.Reshape(x, [0] * (output.rank - 1) + [w.shape[0]])
        return op.MatMul(x, w) if b is None else op.Add(op.MatMul(x, w), b)
