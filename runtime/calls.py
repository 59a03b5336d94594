"""What a rank calls in one step, from a model's graph or from a plan: with the sizes of what each call reads and makes, and nothing computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the names of its types
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.graph import Graph, canonical, dtype_name
from rewrite.model import Model, open_graph
from rewrite.registry import Plugin
from rewrite.runtime.partition import ValueType, without_weights
from rewrite.runtime.plan import Plan
from rewrite.shapes import SymbolicShapes
from rewrite.verify import resolve

NORMS = ("RMSNormalization", "LayerNormalization")
PRODUCTS = ("MatMul", "Gemm", "Conv")
VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity")  # of them kernels read and write strided values, or they move nothing


@dataclass(frozen=True)
class Value:
    """A value by name: its dtype (NumPy's name) and shape, with named dimensions."""

    name: str
    kind: ValueType

    def elements(self, sizes: Mapping[str, int]) -> int:
        """How many there are at these sizes of named dimensions. Raises KeyError, with the name, for one that is not among them."""

        def unknown() -> int:
            raise KeyError(self.name)

        return math.prod(resolve(d, dict(sizes), unknown) for d in self.kind.shape)

    def bytes(self, sizes: Mapping[str, int]) -> int:
        return self.elements(sizes) * self.kind.numpy.itemsize


@dataclass
class Call:
    """A plugin's kernel, or what lies between plugins ("segment"): what it reads, makes, and which weights it has.

    `rows` are weights of which only some rows are read: tables.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    weights: list[Value]
    rows: list[Value] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    products: list[Value] = field(default_factory=list)  # weights that are multiplied in a segment


@dataclass
class Part:
    """The calls of a rank of one stage and the bytes of its weights."""

    calls: list[Call]
    weights: int


# --- of a model -----------------------------------------------------------------------------------------------------
def calls_of_model(model: Model, plugins: Mapping[str, Plugin]) -> list[Call]:
    """The calls of a rank's model. Its weights are not read."""
    bare = without_weights(model)
    return _Reader(Graph(open_graph(bare).graph, model.opset), plugins).run()


class _Reader:
    """The graph while its nodes are gathered into calls, as `partition` does it: plugins, and between them segments."""

    def __init__(self, graph: Graph, plugins: Mapping[str, Plugin]):
        self.graph, self.plugins = graph, plugins
        SymbolicShapes(graph).run()
        self.constant: set[int] = set()  # values that depend on weights alone
        self.root: dict[int, gs.Tensor] = {}  # what a view is a view of
        self.stage: dict[int, int] = {}  # of the nodes that are calls, or in one
        self.maker: dict[int, gs.Node] = {}

    def run(self) -> list[Call]:
        members: dict[int, list[gs.Node]] = {}
        fused: dict[int, list[gs.Node]] = {}
        for node in self.graph:
            made = [t for t in node.outputs if not t.is_empty()]
            given = [t for t in node.inputs if not t.is_empty()]
            if all(self._is_constant(t) for t in given):
                self.constant.update(id(t) for t in made)
                continue
            if canonical(node) in VIEWS and not self._is_constant(given[0]):
                self.root[id(made[0])] = self._of(given[0])
                continue
            if all(_counts(t) for t in made):
                continue
            stage = max((self.stage[id(m)] + (self._is_plugin(m) and not self._is_plugin(node)) for t in given if (m := self.maker.get(id(self._of(t)))) is not None), default=0)
            self.stage[id(node)] = stage
            self.maker.update({id(t): node for t in made})
            (fused if self._is_plugin(node) else members).setdefault(stage, []).append(node)
        calls = []
        for stage in sorted({*members, *fused}):
            calls += [self._segment(members[stage])] if stage in members else []
            calls += [self._plugin(node) for node in fused.get(stage, ())]
        return calls

    def _is_plugin(self, node: gs.Node) -> bool:
        name = canonical(node)
        return name in NORMS or (name in self.plugins and self.plugins[name].fused and node.domain not in (None, "", "ai.onnx"))

    def _is_constant(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self.constant or self.graph.is_constant(tensor)

    def _of(self, tensor: gs.Tensor) -> gs.Tensor:
        return self.root.get(id(tensor), tensor)

    def _value(self, tensor: gs.Tensor) -> Value:
        kind = dtype_name(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype) if isinstance(tensor.dtype, int) else tensor.dtype)
        return Value(str(tensor.name), ValueType(kind, tuple(tensor.shape)))

    def _values(self, tensors: Iterable[gs.Tensor], constant: bool) -> list[Value]:
        found = {id(self._of(t)): self._of(t) for t in tensors if not t.is_empty() and self._is_constant(t) == constant}
        return [self._value(t) for t in found.values() if t.shape is not None and t.dtype is not None and not _counts(t)]

    def _plugin(self, node: gs.Node) -> Call:
        return Call(canonical(node), self._values(node.inputs, False), self._values(node.outputs, False), self._values(node.inputs, True), attributes=dict(node.attrs))

    def _segment(self, nodes: list[gs.Node]) -> Call:
        inside = {id(n) for n in nodes}
        made = [t for n in nodes for t in n.outputs if not t.is_empty()]
        own = {id(t) for t in made}
        read = [t for n in nodes for t in n.inputs if not t.is_empty() and id(self._of(t)) not in own]
        left = [t for t in made if id(t) in self.graph.outputs or any(id(n) not in inside for n in self.graph.consumers(t))]
        tables = [n.inputs[0] for n in nodes if canonical(n) == "Gather"]
        weights = [t for n in nodes for i, t in enumerate(n.inputs) if not (canonical(n) == "Gather" and i == 0)]
        picked = [n.outputs[0] for n in nodes if canonical(n) == "Gather" and self._is_constant(n.inputs[0])]
        rows = [self._value(t) for t in picked if t.shape is not None] if any(self._is_constant(t) for t in tables) else []
        products = [t for n in nodes if canonical(n) in PRODUCTS for t in n.inputs]
        return Call("segment", self._values(read, False), self._values(left, False), self._values(weights, True), rows, products=self._values(products, True))


def _counts(tensor: gs.Tensor) -> bool:
    """Whether a value is integers that shapes are made of, or positions: nothing to speak of."""
    return tensor.dtype is not None and not isinstance(tensor.dtype, int) and np.dtype(tensor.dtype).kind in "iub" and (tensor.shape is None or len(tensor.shape) <= 2)


# --- of a plan ------------------------------------------------------------------------------------------------------
def calls_of_plan(plan: Plan, rank: int) -> Part:
    """The calls of a rank of a plan, and its weights; only the header of their file is read."""
    weights = plan.types_of(rank)
    types = {**plan.inputs, **plan.manifest.values, **weights}
    views: dict[str, str] = {}
    calls = []
    for step in plan.steps_of(rank):
        inputs = [Value(views.get(n, n), types[views.get(n, n)]) for n in dict.fromkeys(step.inputs) if n and n not in weights]
        call = Call(step.name, inputs, [Value(n, types[n]) for n in step.outputs], [Value(n, types[n]) for n in dict.fromkeys(step.inputs) if n in weights], attributes=step.attributes)
        if step.kind == "segment":
            nodes = onnx.load_model_from_string(plan.segment(step.name)).graph
            if _only_views(nodes, step.inputs, step.outputs, views):
                continue
            _read_segment(call, nodes, step.inputs, step.outputs, types)
        calls.append(call)
    return Part([_without_counts(c) for c in calls], sum(Value(n, v).bytes({}) for n, v in weights.items()))


def _only_views(graph: onnx.GraphProto, inputs: list[str], outputs: list[str], views: dict[str, str]) -> bool:
    """Whether a segment moves nothing; its results are then what it reads."""
    names = {f"i{i}": n for i, n in enumerate(inputs)}
    for node in graph.node:
        if node.op_type in VIEWS and node.input[0] in names:
            names[node.output[0]] = views.get(names[node.input[0]], names[node.input[0]])
        elif node.op_type not in ("Shape", "Gather", "Concat", "Constant", "Squeeze", "Unsqueeze"):
            return False
    made = {o.name: n for o, n in zip(graph.output, outputs, strict=True)}
    if not all(o in names for o in made):
        return False
    views.update({n: names[o] for o, n in made.items()})
    return True


def _read_segment(call: Call, graph: onnx.GraphProto, inputs: list[str], outputs: list[str], types: Mapping[str, ValueType]) -> None:
    """Which weights a segment multiplies, and of which it picks rows."""
    call.name = "segment"
    names, made = {f"i{i}": n for i, n in enumerate(inputs)}, {o.name: n for o, n in zip(graph.output, outputs, strict=True)}
    whole = {n for node in graph.node for i, n in enumerate(node.input) if not (node.op_type == "Gather" and i == 0)}
    weights = {v.name for v in call.weights}
    call.products = [v for v in call.weights if any(node.op_type in PRODUCTS and names.get(i) == v.name for node in graph.node for i in node.input)]
    picked = [node for node in graph.node if node.op_type == "Gather" and names.get(node.input[0]) in weights]
    call.weights = [v for v in call.weights if any(names.get(n) == v.name for n in whole)]
    for node in picked:
        width, inner = types[names[node.input[0]]].shape[1:], made.get(node.output[0])
        rows = types[inner].shape[: -len(width)] if inner is not None and width else call.outputs[0].kind.shape[:-1] if call.outputs else ()
        call.rows.append(Value(names[node.input[0]], ValueType(types[names[node.input[0]]].dtype, (*rows, *width))))


def _without_counts(call: Call) -> Call:
    def real(values: list[Value]) -> list[Value]:
        return [v for v in values if not (v.kind.numpy.kind in "iub" and len(v.kind.shape) <= 2)]

    call.inputs, call.outputs, call.weights = real(call.inputs), real(call.outputs), real(call.weights)
    return call


def lives(calls: list[Call], kept: set[str]) -> dict[str, tuple[int, int]]:
    """The first and last call at which each value that calls make is needed; `kept` are those that lie elsewhere (caches)."""
    found: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(calls):
        for value in (*call.outputs, *call.inputs):
            if value.name not in kept:
                first, _ = found.get(value.name, (index, index))
                found[value.name] = (first, index)
    return found
