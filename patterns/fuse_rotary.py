"""Rotary position embedding in its four spellings, whole or of the first part of each head -> Rotary."""

from __future__ import annotations

from rewrite.pattern import any_of, attr, ints, scalar
from rewrite.patterns.halves import check_cut, cuts
from rewrite.registry import rule


def _last(axis):
    """The last axis of a tensor of two to five dimensions, counted from either end; verification tells them apart."""
    return axis in (-1, 1, 2, 3, 4)


def _check_turn(x, cos, sin, full):
    """cos and sin have one element for each of the last dimension of x (`full`), or for each pair."""
    if x.rank is None or x.rank < 2 or not isinstance(x.shape[-1], int) or x.shape[-1] % 2:
        return f"x has shape {x.shape}, expected an even, known last dimension"
    wanted = x.shape[-1] if full else x.shape[-1] // 2
    for name, turn in (("cos", cos), ("sin", sin)):
        if turn.rank is None or turn.shape[-1] != wanted:
            return f"{name} has shape {turn.shape}, expected {wanted} in the last dimension"
        if turn.rank not in (1, 2, x.rank):
            return f"{name} has {turn.rank} dimensions, x has {x.rank}: insert an Unsqueeze for the heads"
    return None


@rule(priority=8)
class RotaryHalves:
    """x * cos + concat(-second, first) * sin with the halves of x: Llama, Qwen, Gemma, Phi."""

    def pattern(op, x, cos, sin):
        return any_of(*(x * cos + op.Concat(op.Neg(second), first, axis=_last) * sin for first, second in cuts(op, x)))

    def check(x, cos, sin, sizes, axis, axes, first_end, second_start, second_end):
        reason = _check_turn(x, cos, sin, full=True)
        return reason or check_cut(x.rank, x.shape[-1], x.shape[-1] // 2, sizes, axis, axes, first_end, second_start, second_end)

    def replace(op, x, cos, sin):
        return op.Rotary(x, cos, sin)


@rule(priority=8)
class RotaryParts:
    """concat(first * cos - second * sin, second * cos + first * sin): gpt-oss; cos and sin of half the size."""

    def pattern(op, x, cos, sin):
        return any_of(*(op.Concat(op.Sub(first * cos, second * sin), second * cos + first * sin, axis=_last) for first, second in cuts(op, x)))

    def check(x, cos, sin, sizes, axis, axes, first_end, second_start, second_end):
        reason = _check_turn(x, cos, sin, full=False)
        return reason or check_cut(x.rank, x.shape[-1], x.shape[-1] // 2, sizes, axis, axes, first_end, second_start, second_end)

    def replace(op, x, cos, sin):
        return op.Rotary(x, cos, sin)


def _pairs(op, x, shape):
    """(even, odd) elements of the last axis: by strided slices, or by a reshape to pairs."""
    pairs = op.Reshape(x, shape)
    even = op.Slice(x, [0], scalar("even_end"), ints("axes"), [2])
    odd = op.Slice(x, [1], scalar("odd_end"), ints("axes"), [2])
    return [(even, odd), (op.Gather(pairs, 0.0, axis=attr("pair")), op.Gather(pairs, 1.0, axis=attr("pair")))]


def _woven(op, first, second, shape):
    """first[0], second[0], first[1], second[1], ..."""
    return op.Reshape(op.Concat(op.Unsqueeze(first, [-1]), op.Unsqueeze(second, [-1]), axis=_last), shape)


def _check_pairs(x, output, axes, even_end, odd_end, pair):
    if output.shape is None or list(output.shape) != list(x.shape):
        return f"x has shape {x.shape}, the result {output.shape}; expected equal ones"
    if axes is not None and (axes not in ([-1], [x.rank - 1]) or min(even_end, odd_end) < x.shape[-1]):
        return f"the strided slices along {axes} do not take all of the last axis of {x.shape}"
    if pair is not None and pair not in (-1, x.rank):
        return f"the pairs are taken along axis {pair}, expected the last"
    return None


@rule(priority=8)
class RotaryPairs:
    """x * cos + interleave(-odd, even) * sin: GPT-J, Cohere, GLM."""

    def pattern(op, x, cos, sin, paired, shape):
        return any_of(*(x * cos + _woven(op, op.Neg(odd), even, shape) * sin for even, odd in _pairs(op, x, paired)))

    def check(x, cos, sin, output, axes, even_end, odd_end, pair):
        return _check_turn(x, cos, sin, full=True) or _check_pairs(x, output, axes, even_end, odd_end, pair)

    def replace(op, x, cos, sin):
        return op.Rotary(x, cos, sin, interleaved=1)


@rule(priority=8)
class RotaryPairParts:
    """interleave(even * cos - odd * sin, odd * cos + even * sin): Meta's Llama; cos and sin of half the size."""

    def pattern(op, x, cos, sin, paired, shape):
        return any_of(*(_woven(op, op.Sub(even * cos, odd * sin), odd * cos + even * sin, shape) for even, odd in _pairs(op, x, paired)))

    def check(x, cos, sin, output, axes, even_end, odd_end, pair):
        return _check_turn(x, cos, sin, full=False) or _check_pairs(x, output, axes, even_end, odd_end, pair)

    def replace(op, x, cos, sin):
        return op.Rotary(x, cos, sin, interleaved=1)


@rule(priority=8)
class NativeRotary:
    """ONNX's own RotaryEmbedding (opset 23) on [B, H, S, D] without position ids: cos and sin are gathered already."""

    def pattern(op, x, cos, sin):
        return op.RotaryEmbedding(x, cos, sin, interleaved=attr("interleaved"), rotary_embedding_dim=attr("size"))

    def check(x, cos, sin):
        if x.rank != 4 or cos.rank != 3:
            return f"x has shape {x.shape}, cos {cos.shape}; expected [B, H, S, D] and [B, S, size / 2]"
        return None

    def replace(op, x, cos, sin, interleaved, size):
        return op.Rotary(x, cos, sin, interleaved=interleaved or None, size=size or None)


@rule(priority=7)
class RotaryPartial:
    """concat(rotary(x[..., :size]), x[..., size:]): only the first part of each head is turned (Phi, GLM, GPT-NeoX)."""

    def pattern(op, x, cos, sin):
        return any_of(*(op.Concat(op.Rotary(first, cos, sin, interleaved=attr("interleaved")), second, axis=_last) for first, second in cuts(op, x)))

    def check(x, cos, sin, sizes, axis, axes, first_end, second_start, second_end):
        if x.rank is None or not isinstance(x.shape[-1], int):
            return f"x has shape {x.shape}, expected a known last dimension"
        size = sizes[0] if sizes else int(first_end) if first_end is not None else x.shape[-1] // 2
        if cos.shape[-1] not in (size, size // 2):
            return f"cos has shape {cos.shape}, expected {size} or {size // 2} in the last dimension"
        return check_cut(x.rank, x.shape[-1], size, sizes, axis, axes, first_end, second_start, second_end)

    def replace(op, x, cos, sin, interleaved, sizes, first_end):
        size = sizes[0] if sizes else int(first_end) if first_end is not None else x.shape[-1] // 2
        return op.Rotary(x, cos, sin, interleaved=interleaved, size=size)
