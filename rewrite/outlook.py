"""Can a pattern match at a node at all? A quick look at the operators above it, before any matching.

The look may be wrong in one way only: it says yes where the matcher then says no. It binds nothing, reads no attribute
and no constant, takes every no-op for something that might be looked through, and goes `DEPTH` operators up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx_graphsurgeon as gs

from rewrite import pattern as P
from rewrite.graph import Graph, canonical
from rewrite.noops import PASSING, look_through

DEPTH = 2


def may_match(graph: Graph, value: P.Value, node: gs.Node) -> bool:
    """Whether `value`, the output of a pattern, can be computed by `node`."""
    op = canonical(node)
    if any(_fits(graph, form, node, DEPTH) for form in _forms(value).get(op, ())):
        return True
    return op in PASSING and any(look_through(graph, node, t) is not None for t in node.outputs)


def may_be(graph: Graph, value: P.Value, tensor: gs.Tensor, depth: int = 1) -> bool:
    """Whether `value` can stand for `tensor`."""
    wanted = _producers(value)
    if wanted is None:
        return True
    node = graph.producer(tensor)
    if node is None:
        return False
    op = canonical(node)
    if depth == 0 or op in PASSING or op not in wanted:
        return op in wanted
    return any(_fits(graph, form, node, depth) for form in _forms(value)[op])


def _fits(graph: Graph, op: P.Op, node: gs.Node, depth: int) -> bool:
    if op.name in P.ASSOCIATIVE:
        return any(all(_among(graph, v, node, op.ops if len(values) > 2 else (), depth - 1) for v in values) for values in op.operand_lists)
    if op.name in P.COMMUTATIVE:
        return all(_among(graph, v, node, (), depth - 1) for v in op.inputs)
    return all(may_be(graph, v, t, depth - 1) for v, t in zip(op.inputs, node.inputs, strict=False))


def _among(graph: Graph, value: P.Value, node: gs.Node, chained: Sequence[str] | frozenset[str], depth: int) -> bool:
    """Whether `value` can be an operand of `node`, or of one of the `chained` operators that compute its operands."""
    if _producers(value) is None:
        return True
    for tensor in node.inputs:
        if may_be(graph, value, tensor, depth):
            return True
        if chained and (producer := graph.producer(tensor)) is not None and canonical(producer) in chained:
            return True
    return False


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
