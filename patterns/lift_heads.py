"""The heads of an attention: repeated, folded into the batch, transposed through detours -> four plain dimensions."""

from __future__ import annotations

from rewrite.pattern import any_of, scalar, tag
from rewrite.registry import rule
from rewrite.shapes import times


@rule(tier="lift", priority=10, exact=True)
class StaticRepeat:
    """The repetition of key heads for their query heads, by Expand or Tile, with constant shapes."""

    def pattern(op, k, expanded, shape):
        lifted = op.Unsqueeze(k, [2])
        return op.Reshape(any_of(op.Expand(lifted, expanded), tag(op.Tile(lifted, expanded), tiled=1)), shape)

    def check(k, expanded, shape, tiled, output):
        if expanded.is_constant and shape.is_constant and not tiled:
            return "both shapes are constant already"
        return _check_repeat(k, output, heads=1)

    def replace(op, k, output):
        (_, g, _, d), h = k.shape, output.shape[1]
        return op.Reshape(op.Expand(op.Unsqueeze(k, [2]), [1, 1, h // g, 1, 1]), [0, h, -1, d])


def _check_repeat(k, output, heads):
    """From [B, G, T, D] to [B, H, T, D], the heads at axis `heads`."""
    if k.rank != 4 or output.rank != 4:
        return f"expected four dimensions, found {k.shape} -> {output.shape}"
    before, after = list(k.shape), list(output.shape)
    g, h, d = before.pop(heads), after.pop(heads), k.shape[3]
    if not (isinstance(g, int) and isinstance(h, int) and isinstance(d, int)) or before != after or h % g:
        return f"expected [B, G, T, D] -> [B, H, T, D] with known heads, found {k.shape} -> {output.shape}"
    return None


@rule(tier="lift", priority=11, exact=True)
class RepeatBeforeTranspose:
    """Key heads repeated while positions still come first, [B, T, G, D]: transposed first, then repeated."""

    def pattern(op, k, expanded, shape):
        lifted = op.Unsqueeze(k, [3])
        return op.Transpose(op.Reshape(any_of(op.Expand(lifted, expanded), op.Tile(lifted, expanded)), shape), perm=[0, 2, 1, 3])

    def check(k, output):
        if output.rank != 4:
            return f"the result has shape {output.shape}, expected [B, H, T, D]"
        if k.rank != 4 or not all(isinstance(n, int) for n in (k.shape[2], k.shape[3], output.shape[1])) or output.shape[1] % k.shape[2]:
            return f"expected [B, T, G, D] -> [B, H, T, D] with known heads, found {k.shape} -> {output.shape}"
        return None

    def replace(op, k, output):
        (_, _, g, d), h = k.shape, output.shape[1]
        return op.Reshape(op.Expand(op.Unsqueeze(op.Transpose(k, perm=[0, 2, 1, 3]), [2]), [1, 1, h // g, 1, 1]), [0, h, -1, d])


@rule(tier="lift", priority=20, exact=True)
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


@rule(tier="lift", priority=10)
class MergedFoldedKeyTranspose:
    """The same for keys [T, B * H, D] of nn.MultiheadAttention: heads to the front, then keys transposed."""

    def pattern(op, q, k):
        return op.MatMul(q, op.Transpose(k, perm=[1, 2, 0]))

    def check(q, k):
        return None if q.rank == 3 and k.rank == 3 else f"expected three dimensions, found {q.shape} and {k.shape}"

    def replace(op, q, k):
        return op.MatMul(q, op.Transpose(op.Transpose(k, perm=[1, 0, 2]), perm=[0, 2, 1]))


@rule(tier="lift", priority=12)
class UnfoldedScores:
    """q @ k^T with the heads folded into the batch (bmm) and unfolded after: as a product of four dimensions.

    Scales and a bias (ALiBi, relative positions) may join before the heads are unfolded.
    """

    def pattern(op, q, k, bias, folded_q, folded_k, shape):
        turned = op.Transpose(op.Reshape(k, folded_k), perm=[0, 2, 1])
        scores = op.MatMul(op.Reshape(q, folded_q), any_of(turned * scalar("k_scale"), turned))
        scaled = any_of(scores * scalar("scale"), scores)
        return op.Reshape(any_of(scaled + bias, scaled), shape)

    def check(q, k, bias, output):
        reason = _check_unfolded(q, k, output, columns=2)
        if reason or bias is None:
            return reason
        if bias.rank != 3 or bias.shape[0] != times(q.shape[0], q.shape[1]):
            return f"the bias has shape {bias.shape}, expected {times(q.shape[0], q.shape[1])} in the first of three dimensions"
        return None if isinstance(q.shape[1], int) else f"the number of heads is not known: q has shape {q.shape}"

    def replace(op, q, k, bias, k_scale, scale):
        turned = op.Transpose(k, perm=[0, 1, 3, 2])
        scores = op.MatMul(q, turned if k_scale is None else op.Mul(turned, op.constant(k_scale, k.dtype)))
        scaled = scores if scale is None else op.Mul(scores, op.constant(scale, q.dtype))
        return scaled if bias is None else op.Add(scaled, op.Reshape(op.Unsqueeze(bias, [0]), [-1, q.shape[1], 0, 0]))


def _last_of_three(axis):
    return axis in (-1, 2)


@rule(tier="lift", priority=12)
class UnfoldedProduct:
    """a @ b, both folded into three dimensions for the product alone: the weights of BLOOM and DeBERTa with their values."""

    def pattern(op, a, b, folded_a, folded_b, shape):
        return op.Reshape(op.MatMul(op.Reshape(a, folded_a), op.Reshape(b, folded_b)), shape)

    def check(a, b, output):
        return _check_unfolded(a, b, output, columns=3)

    def replace(op, a, b):
        return op.MatMul(a, b)


@rule(tier="lift", priority=12)
class UnfoldedWeighting:
    """softmax(scores) @ v with the heads folded into the batch before the softmax and unfolded after the product."""

    def pattern(op, scores, v, folded_s, folded_v, shape):
        weights = op.Softmax(op.Reshape(scores, folded_s), axis=_last_of_three)
        return op.Reshape(op.MatMul(weights, op.Reshape(v, folded_v)), shape)

    def check(scores, v, output):
        return _check_unfolded(scores, v, output, columns=3)

    def replace(op, scores, v):
        return op.MatMul(op.Softmax(scores, axis=-1), v)


def _check_unfolded(a, b, output, columns):
    """a [B, H, S, .] and b [B, H, ., .] give [B, H, S, N]; the size of `b` at `columns` is N."""
    if a.rank != 4 or b.rank != 4 or output.rank != 4:
        return f"expected four dimensions, found {a.shape}, {b.shape} -> {output.shape}"
    if None in output.shape or list(output.shape) != [*a.shape[:3], b.shape[columns]] or list(a.shape[:2]) != list(b.shape[:2]):
        return f"the batch and the heads change: {a.shape}, {b.shape} -> {output.shape}"
    return None
