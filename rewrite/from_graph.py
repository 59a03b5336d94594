"""A pattern from an ONNX graph: its inputs become variables, its constants are compared by value.

What an exporter makes of a small function is a pattern in all but name. Attributes are compared with their defaults
filled in; nodes that change nothing are left out, as the matcher looks through them; target shapes that are computed
from the inputs' shapes may be any, because they follow from the shapes (the check of each site computes them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite import pattern as P
from rewrite.errors import RewriteError
from rewrite.graph import DOMAIN, Graph, canonical, decode, describe
from rewrite.model import Model, open_graph, overridable
from rewrite.noops import look_through
from rewrite.registry import Plugin
from rewrite.shapes import SymbolicShapes

SIZES = {"Reshape": (1,), "Expand": (1,), "ConstantOfShape": (0,), "Tile": (1,)}  # operands that are sizes of the result
UNTOLD = {"allowzero", "saturate", "round_mode"}  # attributes that say nothing about what is computed here


@dataclass
class Derived:
    """A pattern: its outputs, its literals in the order in which they are met, and which weights are stored how."""

    outputs: tuple[P.Value, ...]
    literals: list[tuple[str, Any]] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return ", ".join(map(P.text, self.outputs))


def derive(model: Model, weights: dict[str, np.ndarray[Any, Any]], plugins: dict[str, Plugin]) -> Derived:
    """The pattern that `model` is; initializers equal to one of `weights`, perhaps transposed, become its variable.

    Raises RewriteError, one line, for control flow, an output that no operator computes, a constant that is too large
    to compare or depends on a weight, and an input that the result does not depend on.
    """
    imported = open_graph(model)
    graph = Graph(imported.graph, model.opset, imported.names, overridable(model.proto))
    SymbolicShapes(graph).run()
    return _Derivation(graph, weights, plugins).run()


class _Derivation:
    def __init__(self, graph: Graph, weights: dict[str, np.ndarray[Any, Any]], plugins: dict[str, Plugin]):
        self.graph, self.weights, self.plugins = graph, weights, plugins
        self.variables: dict[int, P.Var] = {id(t): P.Var(str(t.name)) for t in graph.gs.inputs}
        self.nodes: dict[int, P.Op] = {}
        self.read: set[str] = set()
        self.found = Derived(())
        self.sizes = 0

    def run(self) -> Derived:
        outputs = tuple(self.value(t) for t in self.graph.gs.outputs)
        for output in outputs:
            if not isinstance(output, (P.Op, P.Output)):
                raise RewriteError("an output is an input or a constant: no operator computes it")
        unread = [v for v in [*(v.name for v in self.variables.values()), *self.weights] if v not in self.read]
        if unread:
            raise RewriteError(f"the result does not depend on '{unread[0]}'; leave that input out")
        self.found.outputs = outputs
        return self.found

    def value(self, tensor: gs.Tensor) -> P.Value:
        if tensor.is_empty():
            return P.Missing()
        if id(tensor) in self.variables:
            self.read.add(self.variables[id(tensor)].name)
            return self.variables[id(tensor)]
        array = self.graph.constant(tensor, 1 << 24)
        if array is not None:
            return self.constant(array, tensor)
        node = self.graph.producer(tensor)
        if node is None:
            raise RewriteError(f"the constant '{tensor.name}' cannot be read")
        through = look_through(self.graph, node, tensor)
        if through is not None:
            return self.value(through[0])
        made = self.node(node)
        return P.Output(made, node.outputs.index(tensor)) if made.outputs > 1 else made

    def constant(self, array: np.ndarray[Any, Any], tensor: gs.Tensor) -> P.Value:
        for name, weight in self.weights.items():
            for how, form in (("", weight), ("transposed", weight.T)):
                if array.shape == form.shape and np.array_equal(array, form):
                    self.read.add(name)
                    if self.found.stored.setdefault(name, how) != how:
                        raise RewriteError(f"the weight '{name}' is stored both as it is and transposed")
                    return P.Var(name)
        if (array.size == 1 and array.ndim == 0) or (array.size == 1 and array.dtype.kind == "f"):
            self.literal(f"the number {float(array.reshape(())):.6g}", float(array.reshape(())))
            return P.Const(float(array.reshape(())))
        if array.dtype.kind in "iu" and array.ndim == 1:
            numbers = tuple(int(i) for i in array)
            self.literal(f"the size {list(numbers)}", numbers)
            return P.Ints(numbers)
        raise RewriteError(f"it has a constant of shape {list(array.shape)} ('{tensor.name}'), which no pattern compares; make it an input of the function")

    def literal(self, what: str, value: Any) -> None:
        self.found.literals.append((what, value))

    def size(self, tensor: gs.Tensor) -> P.Value | None:
        """A variable for a target shape that is computed from the inputs' shapes."""
        if self.graph.constant(tensor) is not None or id(tensor) not in self.graph.symbolic:
            return None
        self.sizes += 1
        return P.Var(f"size_{self.sizes}")

    def node(self, node: gs.Node) -> P.Op:
        if id(node) in self.nodes:
            return self.nodes[id(node)]
        if any(isinstance(a, gs.Graph) for a in node.attrs.values()):
            raise RewriteError(f"{describe(node)} is control flow; write the function without branches and loops over values")
        op = canonical(node)
        operands = [(self.size(t) if i in SIZES.get(op, ()) else None) or self.value(t) for i, t in enumerate(node.inputs)]
        made = self.inverted(op, node, operands) or P.Op(op, tuple(operands), self.attributes(node))
        if op in P.ASSOCIATIVE:
            made = P._node(op, tuple(operands), made.attributes)
        made.outputs = sum(1 for t in node.outputs if t.name)
        self.nodes[id(node)] = made
        return made

    def inverted(self, op: str, node: gs.Node, operands: list[P.Value]) -> P.Op | None:
        """x / 2 as x * 0.5 and x - 2 as x + -2: so the matcher finds all four."""
        last = operands[-1] if operands else None
        array = self.graph.constant(node.inputs[1]) if len(node.inputs) > 1 and isinstance(last, P.Const) else None
        if not isinstance(last, P.Const) or array is None or array.dtype.kind != "f":
            return None
        if op == "Div" and last.value:
            return P._node("Mul", (operands[0], P.Const(1 / last.value)))
        return P._node("Add", (operands[0], P.Const(-last.value))) if op == "Sub" else None

    def attributes(self, node: gs.Node) -> dict[str, Any]:
        """The attributes the node has, and those it could have, which must then be absent or have their default."""
        given = {k: v for k, v in node.attrs.items() if k not in UNTOLD}
        for name, value in given.items():
            self.literal(f"the attribute {name}={value}", repr(value))
        for name, default in _defaults(node, self.graph.opset, self.plugins).items():
            if name not in given and name not in UNTOLD:
                given[name] = _or_absent(default)
        return given


def _defaults(node: gs.Node, opset: int, plugins: dict[str, Plugin]) -> dict[str, Any]:
    if node.domain == DOMAIN and canonical(node) in plugins:
        return dict(plugins[canonical(node)].attributes)
    try:
        schema = onnx.defs.get_schema(node.op, opset, node.domain or "")
    except onnx.defs.SchemaError:
        return {}
    told = {n: a.default_value for n, a in schema.attributes.items()}
    return {n: None if d.type == onnx.AttributeProto.UNDEFINED else decode(onnx.helper.get_attribute_value(d)) for n, d in told.items()}


def _or_absent(default: Any) -> Callable[[Any], bool]:
    def fits(actual: Any) -> bool:
        return actual is None or actual == default

    fits.__name__ = fits.__doc__ = repr(default)
    return fits


def baked(made: Derived, other: Derived) -> str:
    """What in a pattern depends on the sizes or values of the example, told by that of another example; "" if nothing does."""
    for (what, value), (_, again) in zip(made.literals, other.literals, strict=False):
        if value != again:
            return f"{what} in it depends on the sizes or values of the example; compute it outside and pass it as an input"
    return "" if len(made.literals) == len(other.literals) else "its form depends on the sizes or values of the example; write it so that it does not"
