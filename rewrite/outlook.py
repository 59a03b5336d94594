"""Can a pattern match at a node at all? A quick look at the operators around it, before any matching.

The look may be wrong in one way only: it says yes where the matcher then says no. It binds nothing, reads no attribute
and no constant, and takes every no-op for something that might be looked through.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx_graphsurgeon as gs

from rewrite import pattern as P
from rewrite.graph import Graph
from rewrite.noops import PASSING
from rewrite.registry import Rule

Above = tuple[str | None, ...]  # the operator that computes each input of a node; None for inputs of the graph and constants


def may_match(rule: Rule, op: str, above: Above) -> bool:
    """Whether a rule may match at a node of operator `op`."""
    return rule.find is not None or op in PASSING or any(_fits(form, above) for form in _forms(rule.pattern[0]).get(op, ()))


def possible(graph: Graph, value: P.Value, tensor: gs.Tensor) -> bool:
    """Whether `value` can stand for `tensor`."""
    if isinstance(value, (P.Const, P.Scalar)):
        return graph.constant(tensor) is not None
    wanted = _producers(value)
    if wanted is None:
        return True
    for node in tensor.inputs:  # its producer
        if node.graph is graph:
            return node.canonical in wanted
    return False


def viable(graph: Graph, value: P.AnyOf, tensor: gs.Tensor) -> tuple[P.Value, ...]:
    """The alternatives that can stand for `tensor`."""
    node = graph.producer(tensor)
    return _viable(value, None if node is None else node.canonical)


@cache
def _viable(value: P.AnyOf, op: str | None) -> tuple[P.Value, ...]:
    return tuple(a for a in value.alternatives if (wanted := _producers(a)) is None or op in wanted)


def _fits(op: P.Op, above: Above) -> bool:
    if op.name in P.ASSOCIATIVE:
        chained = not op.ops.isdisjoint(a for a in above if a)  # more operands lie further up
        hidden = chained or not PASSING.isdisjoint(a for a in above if a)
        lists = [values for values in op.operand_lists if hidden or len(values) <= len(above)]
        return any(all(_among(v, above) or (chained and len(values) > 2) for v in values) for values in lists)
    if op.name in P.COMMUTATIVE:
        return all(_among(v, above) for v in op.inputs)
    return all(_among(v, (a,)) for v, a in zip(op.inputs, above, strict=False))


def _among(value: P.Value, above: Sequence[str | None]) -> bool:
    wanted = _producers(value)
    return wanted is None or any(a in wanted for a in above)


@cache
def _producers(value: P.Value) -> frozenset[str] | None:
    """The operators that the producer of `value` can have; None if it may have any, or there may be none."""
    if isinstance(value, (P.Tag, P.Typed)):
        return _producers(value.value)
    if isinstance(value, P.AnyOf):
        found = [_producers(a) for a in value.alternatives]
        return None if None in found else frozenset().union(*(f for f in found if f is not None))
    return P.roots(value) | PASSING if isinstance(value, (P.Op, P.Output)) else None


@cache
def _forms(value: P.Value) -> dict[str, list[P.Op]]:
    """The nodes of the pattern that may stand at `value`, by operator."""
    if isinstance(value, (P.Tag, P.Typed)):
        return _forms(value.value)
    alternatives = value.alternatives if isinstance(value, P.AnyOf) else ()
    found: dict[str, list[P.Op]] = {}
    for op in [value] if isinstance(value, P.Op) else [value.node] if isinstance(value, P.Output) else []:
        found.update({name: [op] for name in op.ops})
    for inner in alternatives:
        for name, ops in _forms(inner).items():
            found.setdefault(name, []).extend(ops)
    return found
