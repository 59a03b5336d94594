"""The `op` a rule's replacement is called with: it adds nodes to the graph in the notation that patterns use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError
from rewrite.graph import DOMAIN, Graph
from rewrite.matcher import BoundValue
from rewrite.nodes import Constant, Node, Variable
from rewrite.registry import Plugin
from rewrite.shapes import infer


class GraphBuilder:
    """`op.Name(inputs..., attribute=value)` makes a node. Operators of plugins newer than the graph's opset, or with
    no counterpart in ONNX, are made in the domain `rewrite`."""

    def __init__(self, graph: Graph, plugins: dict[str, Plugin], anchor: Node, domain: str = ""):
        self._graph, self._plugins, self._anchor, self._domain = graph, plugins, anchor, domain
        self._made: list[Node] = []

    def domain(self, name: str) -> GraphBuilder:
        other = GraphBuilder(self._graph, self._plugins, self._anchor, name)
        other._made = self._made
        return other

    def constant(self, value: Any, dtype: Any = None) -> BoundValue:
        array = np.asarray(value, dtype)
        name = self._graph.fresh(f"{self._anchor.outputs[0].name}_const")
        return BoundValue(self._graph, Constant(name, np.ascontiguousarray(array).reshape(array.shape)))

    @property
    def opset(self) -> int:
        return self._graph.opset

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        return partial(self._build, name)

    def _tensor(self, x: Any) -> gs.Tensor:
        if isinstance(x, BoundValue):
            return x.tensor
        if isinstance(x, gs.Constant) and not isinstance(x, Constant):
            return Constant(x.name, x.values)
        if isinstance(x, gs.Tensor):
            return x
        if x is None:
            return Variable("")
        if isinstance(x, (list, tuple)) or (isinstance(x, int) and not isinstance(x, bool)):
            return self.constant(x, np.int64).tensor
        if isinstance(x, np.ndarray):
            return self.constant(x).tensor
        raise RewriteError(f"operand {x!r}: a float constant needs its type; write op.constant(value, dtype)")

    def _build(self, name: str, /, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        graph, anchor, domain = self._graph, self._anchor, self._domain or None
        plugin = None if domain else self._plugins.get(name)
        if plugin is not None and (plugin.since is None or graph.opset < plugin.since):
            domain = DOMAIN
        operands = [x.tensor if type(x) is BoundValue else self._tensor(x) for x in inputs]
        while operands and not operands[-1].name:
            operands.pop()
        stem = anchor.outputs[0].name
        results = [Variable(graph.fresh(f"{stem}_{name}")) for _ in range(outputs)]
        given = {k: v for k, v in attributes.items() if v is not None} if attributes else {}
        node = Node(name, graph.fresh(f"{anchor.name or stem}_{name}"), given, operands, results, domain)
        graph.add(node, anchor)
        self._made.append(node)
        if domain is None:
            infer(node, graph)
        return BoundValue(graph, results[0]) if outputs == 1 else tuple([BoundValue(graph, r) for r in results])
