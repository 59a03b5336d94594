"""Cutting the last axis in two, in every way exporters spell `chunk`, `split` and slices."""

from __future__ import annotations

from rewrite.pattern import attr, ints, scalar

STEP = (([1],), ())  # older exports leave the step out


def cuts(op, x):
    """Pairs (first part, second part) of patterns of `x` cut once along its last axis; `check_cut` names what they bind."""
    pairs = [op.Split(x, ints("sizes"), axis=attr("axis"), outputs=2), op.Split(x, axis=attr("axis"), outputs=2)]
    for step in STEP:
        first = op.Slice(x, [0], scalar("first_end"), ints("axes"), *step)
        second = op.Slice(x, scalar("second_start"), scalar("second_end"), ints("axes"), *step)
        pairs.append((first, second))
    return pairs


def check_cut(rank, length, size, sizes, axis, axes, first_end, second_start, second_end):
    """None if the parts are [0:size] and [size:] of the last of `rank` axes, which has `length` elements; else why not."""
    along = axes if axes is not None else [axis]
    if along not in ([-1], [rank - 1]):
        return f"it is cut along axis {along} of {rank}, not along the last"
    if sizes is not None and sizes != [size, length - size]:
        return f"it is split into {sizes}, expected {[size, length - size]}"
    if axis is not None and sizes is None and 2 * size != length:
        return f"it is split in the middle of {length}, expected {size} elements in the first part"
    if axes is not None and (first_end != size or second_start != size or second_end < length):
        return f"it is cut into [0:{first_end:.0f}] and [{second_start:.0f}:{second_end:.0f}], expected [0:{size}] and [{size}:{length}]"
    return None
