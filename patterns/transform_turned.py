"""What happens to queries and keys before a PagedAttention joins it: rotary embedding, and a norm of each head before that.

The body of what a rule makes is the subgraph that was there, one for each node; `settle` then gives all that compute alike one body.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.functions import FunctionTable
from rewrite.graph import DOMAIN, Graph, canonical, decode, dtype_name
from rewrite.match import Match
from rewrite.model import Model, base_name, names_in
from rewrite.patterns.transform_generate import drop_functions
from rewrite.plugins.paged_attention_onnx import body
from rewrite.registry import rule
from rewrite.verify_generator import generator_of

PLAIN = 9  # inputs of a PagedAttention that takes queries and keys as they are


class Apart(Exception):
    """Rotary or norm stay nodes of their own; the message is the reason."""


@rule(tier="transform")
class TurnedAttention:
    """PagedAttention(Rotary(q, cos, sin), Rotary(k, cos, sin), v, ...), perhaps with an RMS norm of each head before Rotary, is one PagedAttention."""

    root = ("PagedAttention",)

    def find(graph, node):
        if len(node.inputs) > PLAIN or not any(_made_by(graph, t, "Rotary") for t in node.inputs[:2]):
            return None
        try:
            return find_turned(graph, node)
        except Apart as reason:
            return str(reason)

    def replace(op, inputs, attributes):
        return op.PagedAttention(*inputs, outputs=3, **attributes)


def _made_by(graph: Graph, tensor: gs.Tensor, operator: str) -> gs.Node | None:
    node = graph.producer(tensor)
    return node if node is not None and canonical(node) == operator else None


def find_turned(graph: Graph, node: gs.Node) -> Match:
    """The match at a PagedAttention whose queries or keys are turned. Raises Apart."""
    query, key = (_made_by(graph, t, "Rotary") for t in node.inputs[:2])
    if query is None or key is None:
        raise Apart(f"its {'keys' if key is None else 'queries'} are not turned as its {'queries' if key is None else 'keys'} are")
    if any(one is not other for one, other in zip(query.inputs[1:], key.inputs[1:], strict=True)):
        raise Apart(f"queries are turned by '{query.inputs[1].name}' and '{query.inputs[2].name}', keys by '{key.inputs[1].name}' and '{key.inputs[2].name}'")
    forms = [(int(n.attrs.get("interleaved") or 0), int(n.attrs.get("size") or 0)) for n in (query, key)]
    if forms[0] != forms[1]:
        raise Apart(f"queries and keys are turned in different ways: (interleaved, size) {forms[0]} and {forms[1]}")
    for angles in query.inputs[1:]:
        _check_angles(angles, node.inputs[0])
    for tensor in node.inputs[:2]:
        if id(tensor) in graph.outputs or id(tensor) in graph.captured or len(graph.consumers(tensor)) > 1:
            raise Apart(f"'{tensor.name}', turned, is read by other nodes, too")
    inputs, nodes = [query.inputs[0], key.inputs[0]], [query, key, node]
    attributes = {**node.attrs, **({"interleaved": 1} if forms[0][0] else {}), **({"turned": forms[0][1]} if forms[0][1] else {})}
    norms = [_norm(graph, n.inputs[0], node.inputs[0]) for n in (query, key)]
    scales: list[gs.Tensor] = []
    if norms[0] is not None and norms[1] is not None and norms[0][2] == norms[1][2] and norms[0][1].dtype == norms[1][1].dtype:
        inputs, scales = [n[0] for n in norms if n is not None], [n[1] for n in norms if n is not None]
        attributes["epsilon"] = norms[0][2]
        nodes = [*norms[0][3], *norms[1][3], *nodes]
    tokens = node.inputs[0].shape[2]
    caches = {id(t): (tokens, *t.shape[1:]) for t in node.inputs[3:5]}  # for the check: as many sequences and blocks as tokens (`PagedAttention.sample`)
    shapes = {**caches, id(node.inputs[6]): (tokens, 3), id(node.inputs[7]): (f"{tokens} + 1",), id(node.inputs[8]): (tokens,)}
    bindings = {"inputs": [*inputs, *node.inputs[2:PLAIN], *query.inputs[1:], *scales], "attributes": attributes}
    return Match(graph, list(node.outputs), bindings, nodes, shapes=shapes, note="rotary + norm" if scales else "rotary")


def _check_angles(angles: gs.Tensor, turned: gs.Tensor) -> None:
    """Raises Apart unless each token has angles of its own, the same for all heads."""
    shape = angles.shape
    if shape is None or len(shape) not in (2, 3, 4) or any(d != 1 for d in shape[:-2]) or shape[-2] != turned.shape[2] or not isinstance(shape[-1], int):
        raise Apart(f"the angles '{angles.name}' have shape {shape}; expected [1, 1, tokens, size], the same for all heads")
    if angles.dtype is None or dtype_name(angles.dtype) != dtype_name(turned.dtype):
        raise Apart(f"the angles '{angles.name}' are of another type than what they turn")


def _norm(graph: Graph, tensor: gs.Tensor, turned: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor, float, list[Any]] | None:
    """What is normalized, its scale, epsilon and the nodes, if `tensor` is the norm of each head, perhaps computed in float32; else None."""
    nodes: list[Any] = []
    for wanted in ("Cast", "RMSNormalization", "Cast"):
        node = _made_by(graph, tensor, wanted)
        if node is None:
            if wanted == "RMSNormalization":
                return None
            continue
        if id(tensor) in graph.outputs or id(tensor) in graph.captured or len(graph.consumers(tensor)) > 1:
            return None
        nodes.insert(0, node)
        tensor = node.inputs[0]
    norm = next(n for n in nodes if canonical(n) == "RMSNormalization")
    scale, epsilon = norm.inputs[1], graph.attribute(norm, "epsilon")
    last = graph.attribute(norm, "axis") in (None, -1, 3)
    if not last or not graph.is_constant(scale) or scale.shape is None or list(scale.shape) != [turned.shape[-1]] or not isinstance(epsilon, float):
        return None
    if tensor.dtype is None or dtype_name(tensor.dtype) != dtype_name(turned.dtype) or list(tensor.shape or ()) == [] or dtype_name(scale.dtype) not in (dtype_name(turned.dtype), "float32"):
        return None
    return tensor, scale, epsilon, nodes


def norms_by_heads(model: Model) -> Model:
    """Rotary(Transpose(norm(x))) as Rotary(norm(Transpose(x))): a norm over the last axis does not mind where the heads lie (Qwen3)."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    graph, taken = proto.graph, names_in(proto)
    makers, readers = {o: n for n in graph.node for o in n.output}, Counter(name for n in graph.node for name in n.input)
    types, outputs = {v.name: v for v in graph.value_info}, {o.name for o in graph.output}
    swapped: dict[str, onnx.NodeProto] = {}  # the norm that comes after a transpose, by the latter's result
    for turn in [n for n in graph.node if n.domain == DOMAIN and base_name(n) == "Rotary"]:
        transpose = makers.get(turn.input[0])
        norm = makers.get(transpose.input[0]) if transpose is not None and transpose.op_type == "Transpose" else None
        if transpose is None or norm is None or base_name(norm) != "RMSNormalization" or norm.input[0] not in types or readers[norm.output[0]] > 1 or norm.output[0] in outputs:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for n in (transpose, norm) for a in n.attribute}
        if list(attributes.get("perm", ())) != [0, 2, 1, 3] or attributes.get("axis", -1) not in (-1, 3):
            continue
        name = next(n for n in (f"{norm.input[0]}_heads{i or ''}" for i in range(len(taken) + 1)) if n not in taken)
        taken.add(name)
        made = graph.value_info.add()
        made.CopyFrom(types[norm.input[0]])
        made.name = name
        dims = made.type.tensor_type.shape.dim
        second, third = onnx.TensorShapeProto.Dimension(), onnx.TensorShapeProto.Dimension()
        second.CopyFrom(dims[1])
        third.CopyFrom(dims[2])
        dims[1].CopyFrom(third)
        dims[2].CopyFrom(second)
        transpose.input[0], norm.output[0] = norm.input[0], transpose.output[0]
        norm.input[0] = transpose.output[0] = name
        swapped[name] = norm
    behind = {n.output[0] for n in swapped.values()}
    ordered = [n for node in graph.node if not behind.intersection(node.output) for n in ((node, swapped[node.output[0]]) if node.output and node.output[0] in swapped else (node,))]
    kept = onnx.GraphProto(node=ordered, value_info=[v for v in graph.value_info if v.name in {o for n in ordered for o in n.output}])
    del graph.node[:], graph.value_info[:]
    graph.node.extend(kept.node)
    graph.value_info.extend(kept.value_info)
    return Model(proto, model.folder, model.name, dict(model.external))


def settle(model: Model) -> Model:
    """A generator whose attentions have a function written for what they compute, the same for all that compute alike, and are counted (`layer`)."""
    found = generator_of(model.proto)
    assert found is not None
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    layers, table = {layer["key_cache"]: layer for layer in found["layers"]}, FunctionTable([])
    sizes = {v.name: v.type.tensor_type.shape.dim for v in (*proto.graph.value_info, *proto.graph.input)}
    for function in proto.functions:
        if function.domain == DOMAIN and function.name.split("_")[0] != "PagedAttention":
            table.functions[function.name] = function
    nodes = [n for n in proto.graph.node if n.domain == DOMAIN and base_name(n) == "PagedAttention"]
    for index, node in enumerate(nodes):
        layer, angles = layers[node.input[3]], sizes[node.input[9]][-1].dim_value if len(node.input) > PLAIN and node.input[9] else 0
        attributes = {**{a.name: decode(onnx.helper.get_attribute_value(a)) for a in node.attribute}, "layer": index}
        node.op_type = table.add(body(attributes, layer["value_size"], np.dtype(layer["dtype"]), model.opset, angles, norm=len(node.input) > 11))
        del node.attribute[:]
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in sorted(attributes.items()))
    kept = onnx.ModelProto(functions=[*(f for f in proto.functions if f.domain != DOMAIN), *table.functions.values()])
    del proto.functions[:]
    proto.functions.extend(kept.functions)
    drop_functions(proto)
    return Model(proto, model.folder, model.name, dict(model.external))
