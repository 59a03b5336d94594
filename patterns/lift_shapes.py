"""Shape arithmetic of exporters, made static where the shapes tell the answer: `Reshape` to [0, 0, 12, 32]."""

from __future__ import annotations

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


@rule(tier="lift", priority=10)
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


@rule(tier="lift", priority=10)
class StaticRepeat:
    """The expansion that repeats key heads for their query heads, with constant shapes."""

    def pattern(op, k, expanded, shape):
        return op.Reshape(op.Expand(op.Unsqueeze(k, [2]), expanded), shape)

    def check(k, expanded, shape, output):
        if expanded.is_constant and shape.is_constant:
            return "both shapes are constant already"
        if k.rank != 4 or output.shape is None or len(output.shape) != 4:
            return f"expected [B, G, T, D] -> [B, H, T, D], found {k.shape} -> {output.shape}"
        (b, g, t, d), (b2, h, t2, d2) = k.shape, output.shape
        if not (isinstance(g, int) and isinstance(h, int) and isinstance(d, int)) or (b, t, d) != (b2, t2, d2) or h % g:
            return f"expected [B, G, T, D] -> [B, H, T, D] with known heads, found {k.shape} -> {output.shape}"
        return None

    def replace(op, k, output):
        (_, g, _, d), h = k.shape, output.shape[1]
        return op.Reshape(op.Expand(op.Unsqueeze(k, [2]), [1, 1, h // g, 1, 1]), [0, h, -1, d])


@rule(tier="lift", priority=20)
class KeyTranspose:
    """The transpose of keys that PyTorch's sdpa decomposition takes through three dimensions."""

    def pattern(op, k, folded, shape):
        return op.Reshape(op.Transpose(op.Reshape(k, folded), perm=[0, 2, 1]), shape)

    def check(k, output):
        if k.rank != 4 or output.shape is None or None in k.shape:
            return f"the keys have shape {k.shape}, expected [B, H, T, D]"
        b, h, t, d = k.shape
        if list(output.shape) != [b, h, d, t]:
            return f"from {k.shape} to {output.shape} is no transpose of the last two dimensions"
        return None

    def replace(op, k):
        return op.Transpose(k, perm=[0, 1, 3, 2])


@rule(tier="lift", priority=10)
class MergedKeyTranspose:
    """Two transposes of the keys that the exporter merged, apart again: heads to the front, then keys transposed."""

    def pattern(op, q, k, scale):
        turned = op.Transpose(k, perm=[0, 2, 3, 1])
        return op.MatMul(q, any_of(turned, turned * scale))

    def check(q, k, scale):
        if k.rank != 4 or q.rank != 4:
            return f"expected four dimensions, found {q.shape} and {k.shape}"
        return None if scale is None or (scale.value is not None and scale.value.size == 1) else f"the keys are multiplied by {scale}, no scalar"

    def replace(op, q, k, scale):
        turned = op.Transpose(op.Transpose(k, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2])
        return op.MatMul(q, turned if scale is None else op.Mul(turned, scale))


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
        if x.shape is None or output.shape is None or None in x.shape or list(output.shape[:-1]) != list(x.shape[:-1]):
            return f"the leading dimensions change, from {x.shape} to {output.shape}"
        if output.shape[-1] != w.shape[1] or x.shape[-1] != w.shape[0]:
            return f"the last dimension is split: {x.shape}, {w.shape} -> {output.shape}"
        return None

    def replace(op, x, w, b):
        return op.MatMul(x, w) if b is None else op.Add(op.MatMul(x, w), b)
