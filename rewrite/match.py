"""Where a pattern fits: variables bound to values of the graph, and whether the nodes between them may become one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rewrite.graph import Dim, Graph, dtype_name
from rewrite.nodes import Node

# Never computed twice: an interior value of a match that others read keeps its node alive, and these cost too much.
HEAVY = {"MatMul", "Gemm", "Conv", "Softmax", "Attention", "Einsum", "ConvTranspose", "LSTM", "GRU", "FusedAttention", "MatMulAct", "GatedMatMulAct"}
SHAPE_ARITHMETIC = {"Shape", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Cast", "Add", "Sub", "Mul", "Div"}


class BoundValue:
    """A graph value bound to a pattern variable, as `check` sees it."""

    __slots__ = ("graph", "tensor")

    def __init__(self, graph: Graph, tensor: gs.Tensor):
        self.graph, self.tensor = graph, tensor

    @property
    def name(self) -> str:
        return str(self.tensor.name)

    @property
    def shape(self) -> list[Dim] | None:
        return None if self.tensor.shape is None else list(self.tensor.shape)

    @property
    def rank(self) -> int | None:
        return None if self.tensor.shape is None else len(self.tensor.shape)

    @property
    def dtype(self) -> str | None:
        return None if self.tensor.dtype is None else dtype_name(self.tensor.dtype)

    @property
    def is_constant(self) -> bool:
        return self.graph.is_constant(self.tensor)

    @property
    def is_weight(self) -> bool:
        """Whether it is a constant, or computed from constants alone (a tied weight, transposed)."""
        return self.graph.is_weight(self.tensor)

    @property
    def value(self) -> np.ndarray | None:
        """The value of a small constant, else None."""
        return self.graph.constant(self.tensor)

    def __repr__(self) -> str:
        return f"{self.name}: {self.dtype}{self.shape}"

    def _written_out(self, _: Any) -> Any:
        raise TypeError("outside of patterns operators are written out, for example op.MatMul(x, w), op.Add(a, b), op.Mul(a, b)")

    __matmul__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = _written_out


@dataclass
class Match:
    """Where a pattern fits: variables bound to graph values, and the nodes they are computed by."""

    graph: Graph
    outputs: list[gs.Tensor]
    bindings: dict[str, Any]
    nodes: list[Node]
    # Of rules that find their matches themselves. Where named dimensions are read, by input of the plugin and axis:
    # the body then reads all its sizes there. Shapes for the check of the site, by tensor, where they differ from the
    # graph's. What was found, in a few words, for the report.
    dims: dict[str, tuple[str, int]] | None = None
    shapes: dict[int, tuple[Dim, ...]] = field(default_factory=dict)
    note: str = ""


def interior_use(match: Match) -> str | None:
    """Why a match may not be fused although it fits: a value inside that took costly work is read by others, too."""
    graph, inside, outputs = match.graph, set(match.nodes), list(map(id, match.outputs))
    costly: dict[Node, bool] = {}
    for node in match.nodes:
        for tensor in node.outputs:
            users = tensor.outputs
            if len(users) == 1 and users[0] in inside and id(tensor) not in graph.needed:  # nearly all
                continue
            if id(tensor) in outputs or not graph.is_read_beside(tensor, inside) or not _is_costly(graph, node, inside, costly):
                continue
            serving = {u for u in graph.consumers(tensor) if u not in inside and _serves(graph, u, inside)}
            use = graph.is_used_outside(tensor, inside | serving)
            if use is not None:
                return f"the value '{tensor.name}' inside the match is needed elsewhere: {use}"
    return None


def _is_costly(graph: Graph, node: Node, inside: set[Node], known: dict[Node, bool]) -> bool:
    """Whether `node`, or one inside the match that it reads from, is heavy work."""
    if node not in known:
        known[node] = node.canonical in HEAVY
        known[node] |= any(p in inside and _is_costly(graph, p, inside, known) for t in node.inputs if (p := graph.producer(t)) is not None)
    return known[node]


def _serves(graph: Graph, node: Node, inside: set[Node], depth: int = 0) -> bool:
    """Whether shape arithmetic that starts at `node` (`Shape(product)`, to cut the product in two) ends inside the match."""
    if node.canonical not in (SHAPE_ARITHMETIC if depth else {"Shape"}) or depth > len(SHAPE_ARITHMETIC):
        return False
    if any(id(t) in graph.needed for t in node.outputs):
        return False
    return all(u in inside or _serves(graph, u, inside, depth + 1) for t in node.outputs for u in graph.consumers(t))
