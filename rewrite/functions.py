"""Plugin nodes as calls of model-local functions: the body of each is the subgraph the node replaced."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from rewrite.graph import DOMAIN, SMALL, Dim, Graph, describe, small_values
from rewrite.nodes import Constant, Node

# Cheap operators on shapes and positions: where a match reads a value they compute, the body may compute it again.
REDERIVED = {
    "Shape", "Size", "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Range",
    "ConstantOfShape", "Equal", "Where", "Reshape", "Expand", "Identity", "Constant", "Max", "Min", "ReduceProd", "Neg",
}  # fmt: skip

TABLE = 2**22  # elements: the largest constant (a causal mask for 2048 positions) that becomes part of a body


Kind = int | str  # what a node computes: the same for nodes of equal operators and attributes
# A node of a body: its kind, inputs and outputs, which together are its key; operator, domain and attributes, which the kind stands for.
Step = tuple[tuple[Kind, tuple[str, ...], tuple[str, ...]], str, str, Mapping[str, Any]]


class CaptureError(Exception):
    """The match cannot become a function; the message is the reason, for the report."""


@dataclass
class Body:
    """A subgraph as a function, and its fingerprint. Equal subgraphs of a graph share one, which nobody may change."""

    function: onnx.FunctionProto
    digest: str
    called: str = ""  # the name under which nodes call it, if it is in the table of functions
    made_of: Any = None  # what ids in its key are those of: alive, so that these stay theirs


class Signature(NamedTuple):
    """What a function is called, and its own names for inputs, outputs and attributes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...] = ()


@cache
def numbered(name: str, inputs: int, outputs: int) -> Signature:
    """A function whose inputs are i0, i1, ..., and its outputs o0, o1, ..."""
    return Signature(name, tuple(f"i{n}" for n in range(inputs)), tuple(f"o{n}" for n in range(outputs)))


def capture(
    graph: Graph, nodes: list[Node], signature: Signature, inputs: list[gs.Tensor], outputs: list[gs.Tensor], dims: Mapping[str, tuple[str, int]] | None = None
) -> Body:
    """The part of `graph` made of `nodes` that computes `outputs` from `inputs`, as a function of this signature.

    It may have inputs that it does not read; a value that is there twice is read as the first. Inner values are numbered,
    so that equal subgraphs give equal functions: one layer's is built, the others' looked up.
    Small constants become `Constant` nodes of the body. With `dims`, where each named dimension is to be read (input and
    axis), every integer that shapes determine is computed from these, wherever the graph reads it,
    and constants up to `TABLE` elements are taken in. Raises CaptureError if a value comes from elsewhere and cannot be
    derived from the inputs again.
    """
    wiring = _wiring(graph, nodes, inputs, outputs) if dims is None else None
    if wiring is None:
        return _capture(graph, nodes, signature, inputs, outputs, dims)
    key = (signature, *wiring)
    body: Body | None = graph.bodies.get(key)
    if body is None:
        body = graph.bodies[key] = _capture(graph, nodes, signature, inputs, outputs, dims)
    return body


def _wiring(graph: Graph, nodes: list[Node], inputs: list[gs.Tensor], outputs: list[gs.Tensor]) -> list[Any] | None:
    """Equal for nodes of equal kinds, wired alike; None if they read or have what is rare, or what none of them computes."""
    known, places = graph.known, {id(t): place for place, t in enumerate(inputs) if t.name}
    found: list[Any] = []
    left = len(inputs) - len(places)  # places of no value
    if left:
        found.append(tuple([place for place, t in enumerate(inputs) if not t.name]))
        if len(found[0]) < left:  # one is there twice
            return None
    for node in nodes:
        if node.kind is None:
            if node.holds_graphs:
                return None
            node.kind = _kind(graph, node.op, node.domain or "", node.attrs) if node.attrs or node.domain else node.op
        found += (node.kind, len(node.inputs), len(node.outputs))
        for tensor in node.outputs:
            identity = id(tensor)
            if not tensor.name or identity in known:
                return None
            if identity not in places:
                places[identity] = len(places) + left
    first, values = len(found), [t for n in nodes for t in n.inputs]
    found += map(places.get, map(id, values))
    found += map(places.get, map(id, outputs))
    while None in found:
        at = found.index(None)
        constant = values[at - first] if at - first < len(values) else None
        if type(constant) is not Constant or constant.kind is None:
            return None
        found[at] = len(places) + left + constant.kind
    return found


def _capture(
    graph: Graph, nodes: list[Node], signature: Signature, inputs: list[gs.Tensor], outputs: list[gs.Tensor], dims: Mapping[str, tuple[str, int]] | None
) -> Body:
    made = _Capture(graph, nodes, given(signature.inputs, inputs), dims)
    results = [made.value(t) for t in outputs]
    rename = dict(zip(results, signature.outputs, strict=True))
    if len(rename) != len(results) or any(r in signature.inputs for r in results):
        raise CaptureError("an output of the match is one of its inputs")
    key = (signature, tuple(results), tuple([s[0] for s in made.steps]))
    body: Body | None = graph.bodies.get(key)
    if body is None:
        domains = {domain for _, _, domain, _ in made.steps} - {"", "ai.onnx"}
        opsets = [onnx.helper.make_opsetid("", graph.opset), *(onnx.helper.make_opsetid(d, 1) for d in sorted(domains))]
        protos = [_build(s, rename) for s in made.steps]
        function = onnx.helper.make_function(DOMAIN, signature.name, signature.inputs, signature.outputs, protos, opsets, signature.attributes)
        body = graph.bodies[key] = Body(function, fingerprint(function), made_of=made.steps)
    return body


def given(names: Iterable[str], tensors: list[gs.Tensor]) -> dict[str, gs.Tensor]:
    """The inputs by name, those that are absent left out; a value that is there twice has the first of its names."""
    first = {id(t): n for n, t in reversed(list(zip(names, tensors, strict=True))) if t.name}
    return {n: t for n, t in zip(names, tensors, strict=True) if first.get(id(t)) == n}


class _Capture:
    """A body in the making: its nodes so far, and the name that each value has in it."""

    def __init__(self, graph: Graph, nodes: list[Node], inputs: dict[str, gs.Tensor], dims: Mapping[str, tuple[str, int]] | None):
        self.graph, self.dims = graph, dims
        self.names: dict[int | str, str] = {id(t): n for n, t in inputs.items()}
        self.steps: list[Step] = []
        self._given = len(inputs)
        self._inside = nodes
        self._visiting: set[Node] = set()

    def value(self, tensor: gs.Tensor) -> str:
        name = self.names.get(id(tensor))
        if name is not None or not tensor.name:
            return name or ""
        node = self.graph.producer(tensor)
        if node is None or id(tensor) in self.graph.known:
            return self.constant(tensor)
        if self.dims is not None and id(tensor) in self.graph.symbolic:
            return self.integers(tensor)
        if node.canonical not in REDERIVED and node not in self._inside:
            raise CaptureError(f"the match reads '{tensor.name}', which {describe(node)} outside of it computes")
        if node in self._visiting or node.holds_graphs:
            raise CaptureError(f"{describe(node)} cannot be part of a function")
        if node.kind is None:
            node.kind = _kind(self.graph, node.op, node.domain or "", node.attrs)
        self._visiting.add(node)
        operands = tuple([self.value(t) for t in node.inputs])
        results = tuple([self.fresh(id(t)) if t.name else "" for t in node.outputs])
        self.steps.append(((node.kind, operands, results), node.op, node.domain or "", node.attrs))
        return self.names[id(tensor)]

    def constant(self, tensor: gs.Tensor) -> str:
        array = self.graph.constant(tensor, SMALL if self.dims is None else TABLE)
        if array is None:
            what = "the weight" if isinstance(tensor, gs.Constant) else "the graph input"
            raise CaptureError(f"{what} '{tensor.name}' is read by the match but is no input of the replacement")
        if not isinstance(tensor, gs.Constant):
            return self.literal(array, id(tensor))
        if tensor.kind is None:
            tensor.kind = _kind(self.graph, "Constant", "", {"value": array})
        return self._enter(tensor.kind, "Constant", (), id(tensor), {"value": array})

    def literal(self, array: np.ndarray, key: int | str) -> str:
        return self.step("Constant", [], key, value=array)

    def step(self, op: str, operands: list[str], key: int | str, **attributes: Any) -> str:
        return self._enter(_kind(self.graph, op, "", attributes), op, tuple(operands), key, attributes)

    def _enter(self, kind: Kind, op: str, operands: tuple[str, ...], key: int | str, attributes: Mapping[str, Any]) -> str:
        target = self.fresh(key)
        self.steps.append(((kind, operands, (target,)), op, "", attributes))
        return target

    def fresh(self, key: int | str) -> str:
        name = self.names[key] = f"v{len(self.names) - self._given}"
        return name

    def integers(self, tensor: gs.Tensor) -> str:
        """A tensor of integers that shapes determine, from the shapes of the inputs."""
        parts = [self.size(d) for d in self.graph.symbolic[id(tensor)]]
        scalar = id(tensor) in self.graph.scalars
        wide = tensor.dtype in (None, np.int64)
        key: int | str = id(tensor) if wide else f"int64 {id(tensor)}"
        joined = self.step("Squeeze", parts, key) if scalar else self.step("Concat", parts, key, axis=0)
        return joined if wide else self.step("Cast", [joined], id(tensor), to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)))

    def size(self, dim: Dim) -> str:
        """One dimension, as a tensor of one element."""
        assert self.dims is not None
        text = str(dim)
        if f"size {text}" in self.names:
            return self.names[f"size {text}"]
        if isinstance(dim, int):
            return self.literal(np.array([dim], np.int64), f"size {text}")
        if text in self.dims:
            name, axis = self.dims[text]
            index = self.size(axis)
            operation, operands = "Gather", [self.step("Shape", [name], f"shape of {name} for {text}"), index]
        else:
            operation, *terms = _operation(text)
            operands = [self.size(t) for t in terms]
        return self.step(operation, operands, f"size {text}")


def _kind(graph: Graph, op: str, domain: str, attributes: Mapping[str, Any]) -> Kind:
    """What nodes of this operator with these attributes compute: a number, or the name of an operator of ONNX without attributes."""
    if not attributes and not domain:
        return op
    return graph.kinds.setdefault((op, domain, *[(k, _frozen(v)) for k, v in attributes.items()]), len(graph.kinds))


def _frozen(value: Any) -> Any:
    """What two attribute values have in common if and only if they are the same, types and signs of zero included."""
    if isinstance(value, gs.Tensor):
        small = small_values(value) if isinstance(value, gs.Constant) else None
        if small is None:
            return id(value)
        value = small
    if not isinstance(value, np.ndarray):
        return repr(value)
    return str(value.dtype), value.shape, value.tobytes() if value.size <= SMALL else hashlib.sha256(value.tobytes()).digest()


def _build(step: Step, rename: Mapping[str, str]) -> onnx.NodeProto:
    (_, inputs, outputs), op, domain, attributes = step
    whole = {k: gs.Constant("", np.ascontiguousarray(v).reshape(v.shape)) if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
    node: onnx.NodeProto = OnnxExporter.export_node(gs.Node(op, "", whole, domain=domain or None))
    node.input[:] = [rename.get(n, n) for n in inputs]
    node.output[:] = [rename.get(n, n) for n in outputs]
    return node


def _operation(text: str) -> tuple[str, Dim, Dim]:
    """An expression of dimensions, `past + seq`, as an operator and its two terms."""
    operators = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.FloorDiv: "Div"}
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        tree = ast.Name(text)
    if not isinstance(tree, ast.BinOp) or type(tree.op) not in operators:
        raise CaptureError(f"no input of the replacement tells the size '{text}'")
    left, right = (t.value if isinstance(t, ast.Constant) and isinstance(t.value, int) else ast.unparse(t) for t in (tree.left, tree.right))
    return operators[type(tree.op)], left, right


def fingerprint(function: onnx.FunctionProto) -> str:
    """Equal for functions that differ in nothing but their name."""
    name, function.name = function.name, ""
    try:
        return hashlib.sha256(function.SerializeToString(deterministic=True)).hexdigest()
    finally:
        function.name = name


class FunctionTable:
    """The functions of one model in the domain `rewrite`: equal bodies share one; variants are numbered from 2."""

    def __init__(self, existing: list[onnx.FunctionProto]):
        self.functions: dict[str, onnx.FunctionProto] = {}
        self._by_print: dict[str, str] = {}
        for function in existing:
            if function.domain == DOMAIN:
                self.functions[function.name] = function
                self._by_print[f"{function.name.split('_', 1)[0]}:{fingerprint(function)}"] = function.name

    def add(self, function: onnx.FunctionProto, digest: str = "") -> str:
        """Enter a function named for its plugin, whose fingerprint is `digest`; returns the name under which nodes call it."""
        key = f"{function.name}:{digest or fingerprint(function)}"
        if key not in self._by_print:
            name, index = function.name, 1
            while name in self.functions:
                index += 1
                name = f"{function.name}_{index}"
            self.functions[name] = onnx.FunctionProto()
            self.functions[name].CopyFrom(function)
            self.functions[name].name = name
            self._by_print[key] = name
        return self._by_print[key]

    def needed_by(self, function: onnx.FunctionProto) -> list[onnx.FunctionProto]:
        """The functions that `function` calls, directly or not."""
        found: dict[str, onnx.FunctionProto] = {}
        pending = [function]
        while pending:
            for node in pending.pop().node:
                if node.domain == DOMAIN and node.op_type not in found:
                    found[node.op_type] = self.functions[node.op_type]
                    pending.append(self.functions[node.op_type])
        return list(found.values())


def flatten(function: onnx.FunctionProto, functions: Mapping[str, onnx.FunctionProto]) -> onnx.FunctionProto:
    """The same function without calls of others."""
    if not any(n.domain == DOMAIN for n in function.node):
        return function
    inputs, outputs = ([onnx.helper.make_empty_tensor_value_info(n) for n in names] for names in (function.input, function.output))
    opsets = [*function.opset_import, *([] if any(o.domain == DOMAIN for o in function.opset_import) else [onnx.helper.make_opsetid(DOMAIN, 1)])]
    model = onnx.helper.make_model(onnx.helper.make_graph(list(function.node), "f", inputs, outputs), opset_imports=opsets, functions=list(functions.values()), ir_version=8)
    plain = unfuse(model)
    return onnx.helper.make_function(DOMAIN, function.name, list(function.input), list(function.output), list(plain.graph.node), list(plain.opset_import))


def unfuse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every call of a plugin replaced by the subgraph it stands for."""
    names = [(DOMAIN, f.name) for f in proto.functions if f.domain == DOMAIN]
    if not names:
        return proto
    result = onnx.inliner.inline_selected_functions(proto, names)
    kept = [o for o in result.opset_import if o.domain != DOMAIN]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    props = {p.key: p.value for p in result.metadata_props if p.key != "rewrite.shards"}  # without its sums a model is one whole
    onnx.helper.set_model_props(result, props)
    return result
