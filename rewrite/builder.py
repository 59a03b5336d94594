"""The `op` a rule's replacement is called with: it adds nodes to the graph in the notation that patterns use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import onnx
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

    def __init__(self, graph: Graph, plugins: dict[str, Plugin], domain: str = ""):
        self._graph, self._plugins, self._domain = graph, plugins, domain
        self._anchor: Any = None
        self._made: list[Node] = []

    def _begin(self, anchor: Node) -> None:
        """A new replacement, which stands where `anchor` does."""
        self._anchor, self._made = anchor, []

    def domain(self, name: str) -> GraphBuilder:
        other = GraphBuilder(self._graph, self._plugins, name)
        other._anchor, other._made = self._anchor, self._made
        return other

    def constant(self, value: Any, dtype: Any = None) -> BoundValue:
        with np.errstate(over="ignore"):  # beyond what the type can hold it is infinite
            array = np.asarray(value, dtype)
        name = self._graph.fresh(f"{self._anchor.outputs[0].name}_const")
        return BoundValue(self._graph, Constant(name, np.ascontiguousarray(array).reshape(array.shape)))

    @property
    def opset(self) -> int:
        return self._graph.opset

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        operator = self.__dict__[name] = partial(self._build, name)  # asked for once
        return operator

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
        if domain is None and not _in_onnx(name, graph.opset):
            raise RewriteError(f"its replacement asks for operator '{name}', which {_instead(name, graph.opset, self._plugins)}")
        operands = [x.tensor if type(x) is BoundValue else self._tensor(x) for x in inputs]
        while operands and not operands[-1].name:
            operands.pop()
        stem = anchor.outputs[0].name
        results = [Variable(graph.fresh(f"{stem}_{name}"))]
        while len(results) < outputs:
            results.append(Variable(graph.fresh(f"{stem}_{name}")))
        given = {k: v for k, v in attributes.items() if v is not None} if attributes else {}
        node = Node(name, graph.fresh(f"{anchor.name or stem}_{name}"), given, operands, results, domain)
        graph.add(node, anchor)
        self._made.append(node)
        if domain is None:
            infer(node, graph)
        return BoundValue(graph, results[0]) if outputs == 1 else tuple([BoundValue(graph, r) for r in results])


@cache
def _in_onnx(name: str, opset: int) -> bool:
    return bool(onnx.defs.has(name, opset))


def _instead(name: str, opset: int, plugins: Iterable[str]) -> str:
    """Why there is no such operator, and what the author of a replacement can do about it."""
    if onnx.defs.has(name):
        first = min(s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == name and s.domain == "")
        return f"ONNX has from opset {first} on, and the model is of opset {opset}; build it of older operators, or ask for op.opset first"
    close = difflib.get_close_matches(name, [*plugins, *(s.name for s in onnx.defs.get_all_schemas() if s.domain == "")], 1)
    hint = f"did you mean '{close[0]}'?" if close else f"declare a plugin of this name, or write op.domain('its domain').{name}(...)"
    return f"neither ONNX nor a plugin is; {hint}"
