"""Plugin nodes as calls of model-local functions: the body of each is the subgraph the node replaced."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from rewrite.graph import DOMAIN, SMALL, Dim, Graph, canonical, describe

# Cheap operators on shapes and positions: where a match reads a value they compute, the body may compute it again.
REDERIVED = {
    "Shape", "Size", "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Range",
    "ConstantOfShape", "Equal", "Where", "Reshape", "Expand", "Identity", "Constant", "Max", "Min", "ReduceProd", "Neg",
}  # fmt: skip

TABLE = 2**22  # elements: the largest constant (a causal mask for 2048 positions) that becomes part of a body


class CaptureError(Exception):
    """The match cannot become a function; the message is the reason, for the report."""


def capture(
    graph: Graph,
    nodes: list[gs.Node],
    inputs: dict[str, gs.Tensor],
    outputs: dict[str, gs.Tensor],
    name: str,
    attributes: list[str],
    dims: Mapping[str, tuple[str, int]] | None = None,
) -> onnx.FunctionProto:
    """The part of `graph` made of `nodes` that computes `outputs` from `inputs`, as a function.

    `inputs` and `outputs` give the function's own names; inner values are numbered, so that equal subgraphs give
    equal functions. Small constants become `Constant` nodes of the body. With `dims`, where each named dimension is to
    be read (input and axis), every integer that shapes determine is computed from these, wherever the graph reads it,
    and constants up to `TABLE` elements are taken in. Raises CaptureError if a value comes from elsewhere and cannot be
    derived from the inputs again.
    """
    names: dict[int | str, str] = {id(t): n for n, t in inputs.items()}
    body: list[onnx.NodeProto] = []
    inside = {id(n) for n in nodes}
    visiting: set[int] = set()
    domains: set[str] = set()

    def value(tensor: gs.Tensor) -> str:
        if tensor.is_empty():
            return ""
        if id(tensor) in names:
            return names[id(tensor)]
        node = graph.producer(tensor)
        if node is None or id(tensor) in graph.known:
            return constant(tensor)
        if dims is not None and id(tensor) in graph.symbolic:
            return integers(tensor)
        if id(node) not in inside and canonical(node) not in REDERIVED:
            raise CaptureError(f"the match reads '{tensor.name}', which {describe(node)} outside of it computes")
        if id(node) in visiting or any(isinstance(a, gs.Graph) for a in node.attrs.values()):
            raise CaptureError(f"{describe(node)} cannot be part of a function")
        visiting.add(id(node))
        emit(node)
        return names[id(tensor)]

    def emit(node: gs.Node) -> None:
        operands = [value(t) for t in node.inputs]
        proto = OnnxExporter.export_node(node)
        proto.name = ""
        proto.input[:] = operands
        proto.output[:] = [number(t) if t.name else "" for t in node.outputs]
        domains.add(proto.domain)
        body.append(proto)

    def constant(tensor: gs.Tensor) -> str:
        array = graph.constant(tensor, SMALL if dims is None else TABLE)
        if array is None:
            what = "the weight" if isinstance(tensor, gs.Constant) else "the graph input"
            raise CaptureError(f"{what} '{tensor.name}' is read by the match but is no input of the replacement")
        return literal(array, id(tensor))

    def literal(array: np.ndarray, key: int | str) -> str:
        target = fresh(key)
        body.append(onnx.helper.make_node("Constant", [], [target], value=onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))))
        return target

    def number(tensor: gs.Tensor) -> str:
        return fresh(id(tensor))

    def fresh(key: int | str) -> str:
        names[key] = f"v{len(names) - len(inputs)}"
        return names[key]

    def integers(tensor: gs.Tensor) -> str:
        """A tensor of integers that shapes determine, from the shapes of the inputs."""
        parts = [size(d) for d in graph.symbolic[id(tensor)]]
        scalar = id(tensor) in graph.scalars
        wide = tensor.dtype in (None, np.int64)
        key: int | str = id(tensor) if wide else f"int64 {id(tensor)}"
        joined = fresh(key)
        body.append(onnx.helper.make_node("Squeeze" if scalar else "Concat", parts, [joined], **({} if scalar else {"axis": 0})))
        if wide:
            return joined
        target = number(tensor)
        body.append(onnx.helper.make_node("Cast", [joined], [target], to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))))
        return target

    def size(dim: Dim) -> str:
        """One dimension, as a tensor of one element."""
        assert dims is not None
        text = str(dim)
        if f"size {text}" in names:
            return names[f"size {text}"]
        if isinstance(dim, int):
            return literal(np.array([dim], np.int64), f"size {text}")
        if text in dims:
            name, axis = dims[text]
            index = size(axis)
            shape = fresh(f"shape of {name} for {text}")
            body.append(onnx.helper.make_node("Shape", [name], [shape]))
            operation, operands = "Gather", [shape, index]
        else:
            operation, *terms = _operation(text)
            operands = [size(t) for t in terms]
        target = fresh(f"size {text}")
        body.append(onnx.helper.make_node(operation, operands, [target]))
        return target

    results = [value(t) for t in outputs.values()]
    rename = dict(zip(results, outputs, strict=True))
    if len(rename) != len(results) or any(r in inputs for r in results):
        raise CaptureError("an output of the match is one of its inputs")
    for proto in body:
        proto.input[:] = [rename.get(n, n) for n in proto.input]
        proto.output[:] = [rename.get(n, n) for n in proto.output]
    opsets = [onnx.helper.make_opsetid("", graph.opset)]
    opsets += [onnx.helper.make_opsetid(d, 1) for d in sorted(domains - {"", "ai.onnx"})]
    return onnx.helper.make_function(DOMAIN, name, list(inputs), list(outputs), body, opsets, attributes)


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
            function.name = name
            self.functions[name] = function
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
    return result
