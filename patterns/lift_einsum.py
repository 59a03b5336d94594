"""Einsum of two operands that is a product of matrices -> Transpose, MatMul, Transpose."""

from __future__ import annotations

from rewrite.pattern import attr
from rewrite.registry import rule


@rule(tier="lift", priority=25)
class EinsumProduct:
    """einsum("bqhd,bkhd->bhqk", a, b) -> transpose(a) @ transpose(b), with any letters in any order."""

    def pattern(op, a, b):
        return op.Einsum(a, b, equation=attr("equation"))

    def check(a, b, equation):
        letters = _letters(equation)
        if letters is None:
            return f"the equation '{equation}' is no product of two operands, each letter once in each"
        one, two, result = letters
        shared = set(one) & set(two)
        summed, lonely = shared - set(result), (set(one) ^ set(two)) - set(result)
        if len(summed) != 1 or lonely:
            return f"the equation '{equation}' sums over {', '.join(sorted(summed | lonely)) or 'nothing'}, expected one letter, which both operands have"
        rows, columns = [[c for c in result if c in x and c not in shared] for x in (one, two)]
        batched = shared & set(result)
        if not columns or not rows or (max(len(rows), len(columns)) > 1 and (batched or min(len(rows), len(columns)) > 1)):
            return f"the equation '{equation}' keeps {len(rows)} and {len(columns)} letters of one operand alone; a product of matrices keeps one of each"
        if (a.rank, b.rank) != (len(one), len(two)):
            return f"the operands have shapes {a.shape} and {b.shape}, expected {len(one)} and {len(two)} dimensions"
        letter = summed.pop()
        sizes = a.shape[one.index(letter)], b.shape[two.index(letter)]
        return None if sizes[0] is not None and sizes[0] == sizes[1] else f"the sizes of '{letter}' are not known to be equal: {sizes[0]} and {sizes[1]}"

    def replace(op, a, b, equation):
        one, two, result = _letters(equation)
        if _is_after(result, one, two):
            a, b, one, two = b, a, two, one
        shared = [c for c in result if c in one and c in two]
        summed = next(c for c in one if c in two and c not in result)
        rows, columns = [[c for c in result if c in x and c not in shared] for x in (one, two)]
        product = op.MatMul(_ordered(op, a, one, [*shared, *rows, summed]), _ordered(op, b, two, [*shared, summed, *columns]))
        return _ordered(op, product, [*shared, *rows, *columns], result)


def _letters(equation):
    """The letters of both operands and of the result; None if it is anything but that."""
    left, arrow, result = "".join(equation.split()).partition("->")
    terms = [*left.split(","), result]
    plain = arrow and len(terms) == 3 and all(t.isalpha() and len(set(t)) == len(t) for t in terms)
    return [list(t) for t in terms] if plain and set(result) <= set(left) else None


def _is_after(result, one, two):
    """Whether the second operand gives the rows of the result: the one with several letters of its own, or else that which comes first."""
    own = [[c for c in result if c in x and c not in y] for x, y in ((one, two), (two, one))]
    return len(own[1]) > 1 or (len(own[0]) == 1 and result.index(own[1][0]) < result.index(own[0][0]))


def _ordered(op, x, letters, wanted):
    perm = [letters.index(c) for c in wanted]
    return x if perm == sorted(perm) else op.Transpose(x, perm=perm)
