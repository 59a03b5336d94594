"""The end of a generator: logits at the wanted rows only, types of all values, and what the runtime must know."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError
from rewrite.graph import Dim, Graph, canonical
from rewrite.model import Model, names_in, open_graph
from rewrite.patterns.token_axis import ROWS, TOKENS, Along, TokenAxes
from rewrite.shapes import SymbolicShapes, is_named, substitute
from rewrite.verify_generator import KEY

POSITIONS = "rewrite.positions"  # of the model's metadata: how many it was made for, as `rewrite export` notes it


def info(name: str, dtype: Any, dims: list[Any]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims)


def typed(tensor: gs.Tensor, names: dict[str, Dim]) -> list[onnx.ValueInfoProto]:
    """The type of a value, its dimensions renamed, if it is known."""
    if tensor.dtype is None or tensor.shape is None:
        return []
    element = tensor.dtype if isinstance(tensor.dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    dims = [substitute(d, names) if is_named(d) else None for d in tensor.shape]
    return [onnx.helper.make_tensor_value_info(tensor.name, element, dims)]


class Ending:
    """Logits at the wanted rows only, and the model with its types and what the runtime must know."""

    def __init__(self, model: Model, layers: list[dict[str, Any]], block_size: int, inputs: dict[str, str]):
        self.model, self.layers, self.block_size, self.inputs = model, layers, block_size, inputs
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)

    def run(self) -> Model:
        inputs = {"input_ids": Along(1, TOKENS), "position_ids": Along(1, TOKENS), "slots": Along(0, TOKENS), "logit_rows": Along(0, ROWS)}
        graph = self._open()
        axes = TokenAxes(graph, inputs, self.model.name)
        self._gather_rows(graph, axes)
        graph = self._open()
        axes = TokenAxes(graph, inputs, self.model.name)  # again, with the rows picked
        self._outputs(graph, axes)
        self._types(graph, set())
        declared = next((int(p.value) for p in self.proto.metadata_props if p.key == POSITIONS and p.value.isdecimal() and len(p.value) < 10), None)
        positions = position_limit(graph) or declared
        vocabulary = int(self.proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value)
        tokens = next((n.inputs[0].shape[0] for n in graph if canonical(n) == "Gather" and _comes_from(graph, n.inputs[1], "input_ids")), vocabulary)
        found = {"block_size": self.block_size, "vocabulary": vocabulary, "tokens": int(tokens), "positions": positions, "inputs": self.inputs, "layers": self.layers}
        kept = [(p.key, p.value) for p in self.proto.metadata_props if p.key != KEY]
        onnx.helper.set_model_props(self.proto, {**dict(kept), KEY: json.dumps(found)})
        return Model(self.proto, self.model.folder, self.model.name, dict(self.model.external))

    def _open(self) -> Graph:
        self.opened = open_graph(Model(self.proto, self.model.folder, self.model.name, self.model.external))
        graph = Graph(self.opened.graph, self.model.opset)
        SymbolicShapes(graph).run()
        return graph

    def _gather_rows(self, graph: Graph, axes: TokenAxes) -> None:
        """Pick rows as early as nothing but a chain of operators on one value, norm and head, follows: after the last residual."""
        logits = next(t for t in graph.gs.outputs if t.name == self.proto.graph.output[0].name)
        node, tensor, chain = graph.producer(logits), logits, [logits.name]
        if not isinstance(axes.of(logits), Along):
            raise RewriteError(f"{self.model.name}: output '{logits.name}' does not depend on each token; a generator needs logits [batch, sequence, vocabulary]")
        while node is not None and canonical(node) not in ("PagedAttention", "Gather") and id(tensor) not in graph.captured:
            data = [t for t in node.inputs if not t.is_empty() and axes.of(t) is not None]
            fixed = canonical(node) != "Reshape" or graph.constant(node.inputs[1]) is not None
            if len(data) != 1 or not fixed or (tensor is not logits and len(graph.consumers(tensor)) > 1):
                break
            tensor, node = data[0], graph.producer(data[0])
            chain.append(tensor.name)
        place = axes.of(tensor)
        assert isinstance(place, Along)
        names = names_in(self.proto)
        picked = next(n for n in (f"{tensor.name}_rows{i or ''}" for i in range(len(names) + 1)) if n not in names)
        if tensor is logits:
            self._rename_output(logits.name, picked)
            gather = onnx.helper.make_node("Gather", [picked, "logit_rows"], [logits.name], name=f"{picked}_gather", axis=place.axis)
            self.proto.graph.node.append(gather)
        else:
            gather = onnx.helper.make_node("Gather", [tensor.name, "logit_rows"], [picked], name=f"{picked}_gather", axis=place.axis)
            self._insert(gather, tensor.name, chain[-2])
        self._types(graph, without=set(chain if tensor is logits else chain[:-1]))
        self.proto.graph.output[0].type.tensor_type.ClearField("shape")

    def _insert(self, gather: onnx.NodeProto, value: str, result: str) -> None:
        """The node that computes `result`, on the way to the logits, reads the rows of `value`; others go on reading all."""
        nodes = list(self.proto.graph.node)
        place = next(i for i, n in enumerate(nodes) if result in n.output)
        nodes[place].input[:] = [gather.output[0] if n == value else n for n in nodes[place].input]
        nodes.insert(place, gather)
        ordered = onnx.GraphProto(node=nodes)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(ordered.node)

    def _rename_output(self, old: str, new: str) -> None:
        for node in self.proto.graph.node:
            node.output[:] = [new if n == old else n for n in node.output]
            node.input[:] = [new if n == old else n for n in node.input]

    def _outputs(self, graph: Graph, axes: TokenAxes) -> None:
        """The logits as float32 [rows, vocabulary], called logits."""
        value = self.proto.graph.output[0]
        tensor = next(t for t in graph.gs.outputs if t.name == value.name)
        place, shape = axes.of(tensor), list(tensor.shape or ())
        if not shape or not isinstance(shape[-1], int) or not isinstance(place, Along) or place.axis == len(shape) - 1 or any(d != 1 for i, d in enumerate(shape[:-1]) if i != place.axis):
            raise RewriteError(f"{self.model.name}: output '{value.name}' has shape {shape} for one row of tokens; expected [1, tokens, vocabulary] with a known vocabulary")
        names, nodes = names_in(self.proto), []
        inner = next(n for n in (f"{value.name}_inner{i or ''}" for i in range(len(names) + 1)) if n not in names)
        self._rename_output(value.name, inner)
        shape_name = f"{inner}_shape"
        literal = onnx.numpy_helper.from_array(np.array([-1, shape[-1]], np.int64))
        nodes.append(onnx.helper.make_node("Constant", [], [shape_name], name=shape_name, value=literal))
        nodes.append(onnx.helper.make_node("Reshape", [inner, shape_name], [f"{inner}_flat"], name=f"{inner}_flat"))
        nodes.append(onnx.helper.make_node("Cast", [f"{inner}_flat"], ["logits"], name=f"{inner}_float32", to=onnx.TensorProto.FLOAT))
        if tensor.dtype == np.float32:
            nodes.pop()
            nodes[-1].output[0] = "logits"
        if "logits" in names and value.name != "logits":
            raise RewriteError(f"{self.model.name}: a value is called 'logits' and is not the output; rename it when exporting")
        self.proto.graph.node.extend(nodes)
        outputs = [info("logits", np.float32, [ROWS, shape[-1]]), *list(self.proto.graph.output)[1:]]
        made = onnx.GraphProto(output=outputs)
        del self.proto.graph.output[:]
        self.proto.graph.output.extend(made.output)

    def _types(self, graph: Graph, without: set[str]) -> None:
        """Write down what is known of each value's type, but of those in `without`."""
        known = {v.name for v in (*self.proto.graph.output, *self.proto.graph.input)} | without
        del self.proto.graph.value_info[:]
        for node in graph:
            for tensor in node.outputs:
                if tensor.name not in known:
                    self.proto.graph.value_info.extend(typed(tensor, {}))


def _comes_from(graph: Graph, tensor: gs.Tensor, name: str) -> bool:
    """Whether a value is the input `name`, perhaps moved or cast."""
    node = graph.producer(tensor)
    while node is not None and canonical(node) in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"):
        tensor = node.inputs[0]
        node = graph.producer(tensor)
    return bool(tensor.name == name)


def position_limit(graph: Graph) -> int | None:
    """How many positions the tables have that position_ids look something up in; None if there is no table."""
    limits = []
    for node in graph:
        if canonical(node) != "Gather" or not graph.is_weight(node.inputs[0]):
            continue
        tensor, offset = node.inputs[1], 0
        while (maker := graph.producer(tensor)) is not None and canonical(maker) in ("Add", "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze"):
            if canonical(maker) == "Add":
                constants = [(i, graph.constant(t)) for i, t in enumerate(maker.inputs)]
                number = next(((i, c) for i, c in constants if c is not None and c.size == 1), None)
                if number is None:
                    break
                offset += int(number[1].item())
                tensor = maker.inputs[1 - number[0]]
            else:
                tensor = maker.inputs[0]
        axis = int(node.attrs.get("axis", 0))
        if tensor.name == "position_ids" and node.inputs[0].shape is not None and isinstance(node.inputs[0].shape[axis], int):
            limits.append(node.inputs[0].shape[axis] - offset)
    return min(limits, default=None)
