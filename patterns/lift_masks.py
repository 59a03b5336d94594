"""Several masks of one attention, one after the other -> one mask."""

from __future__ import annotations

from rewrite.graph import canonical
from rewrite.pattern import any_of, attr, scalar
from rewrite.registry import rule

# A score so low that adding another to it gives it back: where every key of a row is hidden, its scores must not show.
# The fused kernel adds in float32 whatever the dtype: float16 has no finite number so low.
ABSORBING = -1e30


def _are_scores(x, depth=6):
    """Whether a value is a product of queries and keys, perhaps scaled."""
    node = x.graph.producer(x.tensor)
    for _ in range(depth):
        if node is None:
            return False
        if canonical(node) in ("MatMul", "Einsum"):
            return True
        if canonical(node) not in ("Mul", "Div", "Cast", "Tanh", "Reshape"):
            return False
        node = max((x.graph.producer(t) for t in node.inputs), key=lambda n: n is not None and canonical(n) != "Constant")
    return False


@rule(tier="lift")
class AddedMasks:
    """softmax((scores + a) + b) -> softmax(scores + (a + b))."""

    def pattern(op, scores, a, b):
        return op.Softmax(scores + a + b, axis=attr("axis"))

    def check(scores, a, b, output):
        if not _are_scores(scores) or _are_scores(a) or _are_scores(b):
            return f"'{scores.name}' is not a product to which '{a.name}' and '{b.name}' are added"
        total = output.graph.producer(output.graph.producer(output.tensor).inputs[0])
        if any(t is scores.tensor for t in total.inputs):
            return "the masks are added to one another already"
        return None

    def replace(op, scores, a, b, axis):
        return op.Softmax(op.Add(scores, op.Add(a, b)), axis=axis)


@rule(tier="lift")
class ChosenAndAddedMasks:
    """softmax(where(keep, scores, low) + b) -> softmax(scores + (where(keep, 0, low) + b))."""

    def pattern(op, keep, scores, b):
        return op.Softmax(any_of(op.Where(keep, scores, scalar("low")) + b, op.Where(keep, scalar("drop_low"), scores) + b), axis=attr("axis"))

    def check(scores, b, low, drop_low):
        if not _are_scores(scores) or _are_scores(b):
            return f"'{scores.name}' is not a product to which '{b.name}' is added"
        if (low if low is not None else drop_low) > ABSORBING:
            return f"hidden scores become {low if low is not None else drop_low}, which may show"
        return None

    def replace(op, keep, scores, b, low, drop_low, axis):
        zero, hidden = op.constant(0, scores.dtype), op.constant(low if low is not None else drop_low, scores.dtype)
        mask = op.Where(keep, zero, hidden) if low is not None else op.Where(keep, hidden, zero)
        return op.Softmax(op.Add(scores, op.Add(mask, b)), axis=axis)


@rule(tier="lift", exact=True)
class ChosenMasks:
    """softmax(where(a, where(b, scores, low), low)) -> softmax(where(a and b, scores, low)), and the other way round."""

    def pattern(op, a, b, scores):
        return op.Softmax(
            any_of(
                op.Where(a, op.Where(b, scores, scalar("low")), scalar("low")),
                op.Where(a, scalar("drop_low"), op.Where(b, scalar("drop_low"), scores)),
            ),
            axis=attr("axis"),
        )

    def check(scores):
        return None if _are_scores(scores) else f"'{scores.name}' is no product of queries and keys"

    def replace(op, a, b, scores, low, drop_low, axis):
        hidden = op.constant(low if low is not None else drop_low, scores.dtype)
        chosen = op.Where(op.And(a, b), scores, hidden) if low is not None else op.Where(op.Or(a, b), hidden, scores)
        return op.Softmax(chosen, axis=axis)


@rule(tier="lift")
class ScaledMasks:
    """softmax((scores + a) * scale + b) -> softmax(scores * scale + (a * scale + b)): Falcon scales its ALiBi, too."""

    def pattern(op, scores, a, b):
        scaled = (scores + a) * scalar("scale")
        return op.Softmax(any_of(scaled + b, scaled), axis=attr("axis"))

    def check(scores, a, b):
        if not _are_scores(scores) or _are_scores(a) or (b is not None and _are_scores(b)):
            return f"'{scores.name}' is not a product to which '{a.name}' is added"
        return None

    def replace(op, scores, a, b, scale, axis):
        factor = op.constant(scale, scores.dtype)
        mask = op.Mul(a, factor)
        return op.Softmax(op.Add(op.Mul(scores, factor), mask if b is None else op.Add(mask, b)), axis=axis)


@rule(tier="lift")
class ChosenBias:
    """softmax(where(keep, scores + bias, low)) -> softmax(scores + where(keep, bias, low)): DeBERTa."""

    def pattern(op, keep, scores, bias):
        biased = scores + bias
        return op.Softmax(any_of(op.Where(keep, biased, scalar("low")), op.Where(keep, scalar("drop_low"), biased)), axis=attr("axis"))

    def check(scores, bias, low, drop_low):
        hidden = low if low is not None else drop_low
        if hidden > ABSORBING:
            return f"hidden scores become {hidden:.6g}; only a lower number (below {ABSORBING:.0e}) stays the same when a score is added to it"
        if not _are_scores(scores) or _are_scores(bias):
            return f"'{scores.name}' is not a product to which '{bias.name}' is added"
        return None

    def replace(op, keep, scores, bias, low, drop_low, axis):
        hidden = op.constant(low if low is not None else drop_low, scores.dtype)
        mask = op.Where(keep, bias, hidden) if low is not None else op.Where(keep, hidden, bias)
        return op.Softmax(op.Add(scores, mask), axis=axis)


@rule(tier="lift")
class NothingHidden:
    """x + where(True, 0, low) -> x: the mask of an encoder without padding (ViT)."""

    def pattern(op, x, keep, shape):
        return x + op.Where(any_of(op.Expand(keep, shape), keep), 0.0, scalar("low"))

    def check(x, keep, output):
        if keep.value is None or not keep.value.all():
            return f"the condition '{keep.name}' is not constantly true"
        return None if x.shape is not None and x.shape == output.shape else f"the sum has shape {output.shape}, x {x.shape}"

    def replace(op, x):
        return x
