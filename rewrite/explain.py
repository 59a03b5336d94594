"""Why a model is not fused further: the places that look like the heart of a fusion and are none, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx

from rewrite.graph import DOMAIN
from rewrite.report import NearMiss, Report
from rewrite.validity import subgraphs

ACTIVATIONS = {"Gelu", "Swish", "Relu", "Tanh", "Sigmoid", "Erf", "HardSwish", "LeakyRelu", "Elu", "Softplus", "Mish"}
PRODUCTS = {"MatMul", "Gemm"}
# What may stand between the product and the softmax, the softmax and the product, the product and its activation.
BEFORE_SOFTMAX = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Tanh", "Reshape", "Identity", "Clip", "Max", "Min"}
AFTER_SOFTMAX = {"Cast", "Where", "IsNaN", "Dropout", "Identity", "Reshape", "Mul", "Transpose"}
BEFORE_ACTIVATION = {"Add", "Reshape", "Cast", "Identity", "Mul", "Div"}
NEAR = 1 / 3  # of a pattern's operators: what came less far says nothing
FAR = 8  # steps


@dataclass(frozen=True)
class Unfused:
    """A place that looks like the heart of a fusion: what it looks like, its node, the rule that came nearest, and why not."""

    kind: str
    node: str
    rule: str
    reason: str


def unfused(proto: onnx.ModelProto, report: Report) -> list[Unfused]:
    """The attentions, activated products and decomposed norms left in a rewritten model, in the model's order."""
    misses = [m for m in report.near_misses if m.fits or m.depth >= 1]
    found: list[Unfused] = []
    pending = [proto.graph]
    while pending:
        graph = pending.pop(0)
        links = _Links(graph)
        for node in graph.node:
            kind = _kind(node, links)
            if kind:
                found.append(_explain(kind, _name(node), misses))
            pending += subgraphs(node)
    return found


def significant(miss: NearMiss) -> bool:
    """Whether a near miss is worth telling unasked: the pattern fits, or a good part of one that is no mere operator does."""
    if miss.fits:
        return "already" not in miss.reason
    return miss.depth >= 2 and miss.nearness >= NEAR


def _explain(kind: str, node: str, misses: Iterable[NearMiss]) -> Unfused:
    near = [m for m in misses if node == m.at or node == m.node or node in m.covered]
    if not near:
        return Unfused(kind, node, "", "no rule comes near it; `rewrite list` shows what rules there are, --rules adds your own")
    best = max(near, key=lambda m: (m.nearness, m.depth))
    return Unfused(kind, node, best.rule, best.why())


def _name(node: onnx.NodeProto) -> str:
    label = node.op_type.split("_", 1)[0] if node.domain == DOMAIN else node.op_type
    return f"{label} '{node.name or (node.output[0] if node.output else '?')}'"


class _Links:
    """Who computes and who reads each value of a graph."""

    def __init__(self, graph: onnx.GraphProto):
        self.maker: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            self.maker.update({o: node for o in node.output if o})
            for value in set(filter(None, node.input)):
                self.readers.setdefault(value, []).append(node)

    def above(self, node: onnx.NodeProto, through: set[str], wanted: set[str]) -> bool:
        return self._search(node, through, wanted, lambda n: [self.maker[i] for i in n.input if i in self.maker])

    def below(self, node: onnx.NodeProto, through: set[str], wanted: set[str]) -> bool:
        return self._search(node, through, wanted, lambda n: [r for o in n.output for r in self.readers.get(o, ())])

    @staticmethod
    def _search(node: onnx.NodeProto, through: set[str], wanted: set[str], step: Callable[[onnx.NodeProto], list[onnx.NodeProto]]) -> bool:
        front = [node]
        for _ in range(FAR):
            front = [n for m in front for n in step(m)]
            if any(n.op_type in wanted and not n.domain for n in front):
                return True
            front = [n for n in front if n.op_type in through and not n.domain]
        return False


def _kind(node: onnx.NodeProto, links: _Links) -> str:
    own = not node.domain or node.domain == DOMAIN  # lifted operators live in our domain
    op = _name(node).split(" ", 1)[0] if own else ""
    if op == "Softmax" and links.above(node, BEFORE_SOFTMAX, PRODUCTS) and links.below(node, AFTER_SOFTMAX, PRODUCTS):
        return "attention"
    if op == "Attention":
        return "attention"
    if op in ACTIVATIONS and links.above(node, BEFORE_ACTIVATION, PRODUCTS):
        return "activation after a product"
    if op == "Sqrt" and links.above(node, {"Add"}, {"ReduceMean"}):
        return "normalization"
    return ""
