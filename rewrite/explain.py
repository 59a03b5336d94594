"""Why a model is not fused further: the places that look like the heart of a fusion and are none, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx

from rewrite.graph import DOMAIN
from rewrite.report import NearMiss, Report
from rewrite.validity import subgraphs

ACTIVATIONS = {"Gelu", "Swish", "Relu", "Tanh", "Sigmoid", "Erf", "HardSwish", "LeakyRelu", "Elu", "Softplus", "Mish"}
PRODUCTS = {"MatMul", "Gemm", "Einsum", "MatMulAct"}
# What may stand between the product and the softmax, the softmax and the product, the product and its activation.
BEFORE_SOFTMAX = {"Add", "Sub", "Mul", "Div", "Where", "Cast", "Tanh", "Reshape", "Transpose", "Identity", "Clip", "Max", "Min", "Concat"}
AFTER_SOFTMAX = {"Cast", "Where", "IsNaN", "Dropout", "Identity", "Reshape", "Mul", "Div", "Add", "Transpose", "Relu", "Clip", "Slice"}
BEFORE_ACTIVATION = {"Add", "Reshape", "Cast", "Identity", "Mul", "Div"}
# Every model is full of these: a pattern of which nothing else is there says little.
COMMON = {
    "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Concat", "Slice", "Split", "Gather", "Identity", "Cast", "Shape",
    "Add", "Mul", "Sub", "Div", "Where", *PRODUCTS,
}  # fmt: skip
NEAR, NEARER = 1 / 3, 3 / 4  # of a pattern's operators, with and without a telling one: what came less far is noise
FAR = 8  # steps


@dataclass(frozen=True)
class Unfused:
    """A place that looks like the heart of a fusion: what it looks like, its node, the rule that came nearest, and why not."""

    kind: str
    node: str
    rule: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} at {self.node}: {f'rule {self.rule}: ' if self.rule else ''}{self.reason}"


def explained(proto: onnx.ModelProto, report: Report) -> tuple[list[Unfused], list[NearMiss]]:
    """What looks like a fusion and is none, and else the nearest miss at each node, nearest first; misses that say little are left out."""
    left = unfused(proto, report)
    best: dict[str, NearMiss] = {}
    for miss in filter(significant, report.near_misses):
        old = best.get(miss.at)
        if old is None or miss.rank > old.rank:
            best[miss.at] = miss
    told = {(u.rule, u.reason) for u in left}
    return left, sorted((m for m in best.values() if (m.rule, m.why()) not in told), key=lambda m: m.rank, reverse=True)


def unfused(proto: onnx.ModelProto, report: Report) -> list[Unfused]:
    """The attentions, activated products and decomposed norms left in a rewritten model, in the model's order."""
    misses = [m for m in report.near_misses if m.fits or m.depth >= 1]
    fusing = {name for name, stats in report.rules.items() if stats.tier == "fuse"}
    found = [_explain(kind, node, links, misses, fusing) for kind, node, links in _hearts(proto.graph)]
    for function in proto.functions:
        if function.domain != DOMAIN:
            why = f"it lies in the function {function.domain}::{function.name}, and rules do not look into functions: inline it (onnx.inliner.inline_local_functions)"
            found += [Unfused(kind, _name(node), "", why) for kind, node, _ in _hearts(function)]
    return found


def _hearts(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[tuple[str, onnx.NodeProto, _Links]]:
    """The nodes of a graph, and of those inside it, that look like the heart of a fusion, and what of."""
    links = _Links(graph)
    for node in graph.node:
        kind = _kind(node, links)
        if kind:
            yield kind, node, links
    for inner in (g for node in graph.node for g in subgraphs(node)):
        yield from _hearts(inner)


def significant(miss: NearMiss) -> bool:
    """Whether a near miss is worth telling unasked: the pattern, of more than an operator, fits, or a good part of it."""
    if miss.part == "replacement":
        return True
    if miss.fits:
        return len(miss.covered) >= 2 and "already" not in miss.reason
    telling = any(covered.split(" ", 1)[0] not in COMMON for covered in miss.covered)
    return miss.depth >= 2 and miss.nearness >= (NEAR if telling else NEARER)


def _explain(kind: str, node: onnx.NodeProto, links: _Links, misses: Iterable[NearMiss], fusing: set[str]) -> Unfused:
    """The near miss that came furthest among those that got to the node, or looked for it on their way up to it."""
    name, readers = _name(node), links.readers_until(node, PRODUCTS)
    near = [m for m in misses if name in (m.at, m.node) or name in m.covered or (m.at in readers and _operator(node) in m.reason)]
    if not near:
        return Unfused(kind, name, "", "no rule comes near it; `rewrite list` shows what rules there are, --rules adds your own")
    # A pattern that stopped at this very node, wanting another operator there, says less than one that holds it.
    # An attention is fused by one rule; those that bring masks and heads into shape stop early at most of them.
    best = max(near, key=lambda m: (m.fits, kind == "attention" and m.rule in fusing, m.node != name or m.at == name, m.depth, m.size))
    return Unfused(kind, name, best.rule, best.why())


def _operator(node: onnx.NodeProto) -> str:
    """As rules write it: the operators that rules lift to live in our domain."""
    if node.domain == DOMAIN:
        return str(node.op_type).split("_", 1)[0]
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _name(node: onnx.NodeProto) -> str:
    return f"{_operator(node)} '{node.name or (node.output[0] if node.output else '?')}'"


class _Links:
    """Who computes and who reads each value of a graph."""

    def __init__(self, graph: onnx.GraphProto | onnx.FunctionProto):
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

    def readers_until(self, node: onnx.NodeProto, wanted: set[str]) -> set[str]:
        """The names of the nodes that read what `node` computes, directly or not, up to the first of `wanted`."""
        found: set[str] = set()
        front = [node]
        for _ in range(FAR):
            front = [r for n in front for o in n.output for r in self.readers.get(o, ())]
            found.update(map(_name, front))
            front = [n for n in front if _operator(n) not in wanted]
        return found

    @staticmethod
    def _search(node: onnx.NodeProto, through: set[str], wanted: set[str], step: Callable[[onnx.NodeProto], list[onnx.NodeProto]]) -> bool:
        front = [node]
        for _ in range(FAR):
            front = [n for m in front for n in step(m)]
            if any(_operator(n) in wanted for n in front):
                return True
            front = [n for n in front if _operator(n) in through]
        return False


def _kind(node: onnx.NodeProto, links: _Links) -> str:
    op = _operator(node)
    if op == "Softmax" and links.above(node, BEFORE_SOFTMAX, PRODUCTS) and links.below(node, AFTER_SOFTMAX, PRODUCTS):
        return "attention"
    if op == "Attention":
        return "attention"
    if op in ACTIVATIONS and links.above(node, BEFORE_ACTIVATION, PRODUCTS):
        return "activation after a product"
    if op == "Sqrt" and links.above(node, {"Add"}, {"ReduceMean"}):
        return "normalization"
    return ""
