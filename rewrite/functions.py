"""Plugin nodes as calls of model-local functions: the body of each is the subgraph the node replaced."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from rewrite.graph import DOMAIN, Graph, canonical, describe

# Cheap operators on shapes and positions: where a match reads a value they compute, the body may compute it again.
REDERIVED = {
    "Shape", "Size", "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Range",
    "ConstantOfShape", "Equal", "Where", "Reshape", "Expand", "Identity", "Constant", "Max", "Min", "ReduceProd", "Neg",
}  # fmt: skip


class CaptureError(Exception):
    """The match cannot become a function; the message is the reason, for the report."""


def capture(
    graph: Graph,
    nodes: list[gs.Node],
    inputs: dict[str, gs.Tensor],
    outputs: dict[str, gs.Tensor],
    name: str,
    attributes: list[str],
) -> onnx.FunctionProto:
    """The part of `graph` made of `nodes` that computes `outputs` from `inputs`, as a function.

    `inputs` and `outputs` give the function's own names; inner values are numbered, so that equal subgraphs give
    equal functions. Small constants become `Constant` nodes of the body. Raises CaptureError if a value comes from
    elsewhere and cannot be derived from the inputs again.
    """
    names = {id(t): n for n, t in inputs.items()}
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
        array = graph.constant(tensor)
        if array is None:
            what = "the weight" if isinstance(tensor, gs.Constant) else "the graph input"
            raise CaptureError(f"{what} '{tensor.name}' is read by the match but is no input of the replacement")
        target = number(tensor)
        body.append(onnx.helper.make_node("Constant", [], [target], value=onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape))))
        return target

    def number(tensor: gs.Tensor) -> str:
        names[id(tensor)] = f"v{len(names) - len(inputs)}"
        return names[id(tensor)]

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


def fingerprint(function: onnx.FunctionProto) -> str:
    """Equal for functions that differ in nothing but their name."""
    bare = onnx.FunctionProto()
    bare.CopyFrom(function)
    bare.name = ""
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()


class FunctionTable:
    """The functions of one model in the domain `rewrite`: equal bodies share one; variants are numbered from 2."""

    def __init__(self, existing: list[onnx.FunctionProto]):
        self.functions: dict[str, onnx.FunctionProto] = {}
        self._by_print: dict[str, str] = {}
        for function in existing:
            if function.domain == DOMAIN:
                self.functions[function.name] = function
                self._by_print[f"{function.name.split('_', 1)[0]}:{fingerprint(function)}"] = function.name

    def add(self, function: onnx.FunctionProto) -> str:
        """Enter a function named for its plugin; returns the name under which nodes call it."""
        key = f"{function.name}:{fingerprint(function)}"
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
