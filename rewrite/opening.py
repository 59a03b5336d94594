"""From the protobuf to the graph that rules edit: what onnx-graphsurgeon's importer makes, in a third of its time.

Nodes and values are our own (`nodes.py`), initializers those of the model itself, not copies. What is rare (types that are
no tensors, sparse tensors, attributes of odd types) is left to onnx-graphsurgeon.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter, get_itemsize, get_onnx_tensor_dtype
from onnx_graphsurgeon.ir.tensor import SparseValues

from rewrite.nodes import Constant, Node, Stored, Variable

INT, FLOAT, INTS, STRING, TENSOR, GRAPH = (getattr(onnx.AttributeProto, k) for k in ("INT", "FLOAT", "INTS", "STRING", "TENSOR", "GRAPH"))


class Opening:
    """One model on its way to graphs: the nodes so far, and which protobuf each graph came from."""

    def __init__(self, hinted: bool) -> None:
        """`hinted`: the exporter may have noted on nodes which modules they came from."""
        self._hinted = hinted
        self.nodes: list[Node] = []
        self.graphs: dict[int, onnx.GraphProto] = {}
        self.names: set[str] = set()  # of all values and nodes
        self._types: dict[bytes, tuple[Any, Any, Any]] = {}  # NumPy's type, shape and kind of type, by what they are in the protobuf

    def graph(self, source: onnx.GraphProto, inferred: onnx.GraphProto, outer: Mapping[str, gs.Tensor], opset: Any) -> gs.Graph:
        """The graph of `source`, with the types that `inferred`, a copy of it, has beside; `outer` are values of graphs around it.

        `opset` is that of the model as onnx-graphsurgeon has it, its imports included. Raises what broken protobufs raise.
        """
        own: dict[str, gs.Tensor] = {}
        visible = ChainMap(own, outer) if outer else own  # type: ignore[arg-type]
        for stored in source.initializer:
            if stored.name not in visible:
                own[stored.name] = _constant(stored)
        for sparse in source.sparse_initializer:
            if sparse.values.name not in visible:
                own[sparse.values.name] = Constant(sparse.values.name, SparseValues(sparse), sparse.values.data_location)
        for value in inferred.value_info:
            self._typed(value, own, visible)
        names = {t.name for t in source.initializer} | {t.values.name for t in source.sparse_initializer}
        inputs = [self._given(v, own) for v in inferred.input if v.name not in names]
        outputs = [self._given(v, own) for v in inferred.output]
        nodes = [self._node(a, b, own, visible, opset) for a, b in zip(source.node, inferred.node, strict=True)]
        self.names.update(own, (n.name for n in nodes))
        made = gs.Graph([], inputs, outputs, source.name, source.doc_string, opset[0], opset[1])
        made.nodes = nodes
        self.graphs[id(made)] = source
        return made

    def _typed(self, value: onnx.ValueInfoProto, own: dict[str, gs.Tensor], visible: Mapping[str, gs.Tensor]) -> None:
        known = own.get(value.name)
        if known is None:
            if value.name not in visible:
                own[value.name] = self._variable(value)
        elif isinstance(known, gs.Variable):
            told = self._variable(value)
            known.dtype, known.shape = known.dtype or told.dtype, known.shape or told.shape

    def _given(self, value: onnx.ValueInfoProto, own: dict[str, gs.Tensor]) -> gs.Tensor:
        if value.name not in own:
            own[value.name] = self._variable(value)
        return own[value.name]

    def _variable(self, value: onnx.ValueInfoProto) -> Variable:
        known = self._types.get(key := value.type.SerializeToString())  # most types are those of other layers' values, too
        if known is None:
            told = OnnxImporter.import_tensor(value)
            known = self._types[key] = told.dtype, told.shape, told.type
        dtype, shape, kind = known
        return Variable(value.name, dtype, None if shape is None else list(shape), kind)

    def _node(self, source: onnx.NodeProto, inferred: onnx.NodeProto, own: dict[str, gs.Tensor], visible: Mapping[str, gs.Tensor], opset: Any) -> Node:
        attributes = self._attributes(source, inferred, visible, opset) if inferred.attribute else {}
        inputs, outputs = [], []
        for name in inferred.input:
            tensor = visible.get(name)
            if tensor is None:
                tensor = Variable(name)
                if name:
                    own[name] = tensor
            inputs.append(tensor)
        for name in inferred.output:
            tensor = own.get(name)
            if tensor is None:
                tensor = Variable(name)
                if name:
                    own[name] = tensor
            outputs.append(tensor)
        node = Node(inferred.op_type, inferred.name, attributes, inputs, outputs, inferred.domain if inferred.HasField("domain") else None)
        if self._hinted or node.name.startswith("/"):
            node.scope = None
        node.source, node.holds_graphs = source, any(a.type == GRAPH for a in inferred.attribute) if attributes else False
        self.nodes.append(node)
        return node

    def _attributes(self, source: onnx.NodeProto, inferred: onnx.NodeProto, visible: Mapping[str, gs.Tensor], opset: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index, attribute in enumerate(inferred.attribute):
            kind = attribute.type
            if attribute.ref_attr_name:
                found.update(OnnxImporter.import_attributes([attribute], {}, {}, opset[0], opset[1]))
            elif kind == INT:
                found[attribute.name] = attribute.i
            elif kind == INTS:
                found[attribute.name] = list(attribute.ints)
            elif kind == FLOAT:
                found[attribute.name] = attribute.f
            elif kind == STRING:
                found[attribute.name] = attribute.s.decode()
            elif kind == TENSOR:
                found[attribute.name] = _constant(attribute.t)
            elif kind == GRAPH:
                found[attribute.name] = self.graph(source.attribute[index].g, attribute.g, visible, opset)
            else:
                found.update(OnnxImporter.import_attributes([attribute], {}, {}, opset[0], opset[1]))
        return found


@cache
def element(code: int) -> Any:
    """NumPy's type for a type of ONNX, or its number where NumPy has none. Raises onnx-graphsurgeon's error for no type at all."""
    found = get_onnx_tensor_dtype(onnx.TensorProto(data_type=code))
    get_itemsize(found)
    return found


def _constant(tensor: onnx.TensorProto) -> Constant:
    return Constant(tensor.name, Stored(tensor, element(tensor.data_type)), tensor.data_location if tensor.HasField("data_location") else None)
