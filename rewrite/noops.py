"""Nodes that change nothing, alone or a few in a row: a match looks through them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from rewrite.graph import Graph, canonical, dtype_name

# What a cast to the wider type and back leaves as it is.
WIDENING = {
    ("float16", "float32"), ("float16", "float64"), ("bfloat16", "float32"), ("bfloat16", "float64"), ("float32", "float64"),
    ("int8", "int16"), ("int8", "int32"), ("int8", "int64"), ("int16", "int32"), ("int16", "int64"), ("int32", "int64"),
    ("uint8", "int32"), ("uint8", "int64"), ("bool", "int32"), ("bool", "int64"), ("bool", "float32"), ("bool", "float16"),
    ("int8", "float32"), ("uint8", "float32"), ("int32", "float64"),
}  # fmt: skip
VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}
PASSING = VIEWS | {"Identity", "Dropout", "Cast", "Transpose", "Expand"}  # may change nothing
LONGEST = 4  # nodes in a row that together may change nothing


def look_through(graph: Graph, node: gs.Node, tensor: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """The value that `tensor`, an output of `node`, is equal to, and the nodes in between; None if `node` computes.

    Seen through are Identity, Dropout outside training, Casts to the same type or to a wider one and back, and shapes or
    transposes that change nothing, alone or together.
    """
    op = canonical(node)
    source = node.inputs[0] if node.inputs else None
    if source is None or not node.outputs or node.outputs[0] is not tensor:
        return None
    if op == "Identity" or (op == "Dropout" and not _trains(graph, node)):
        return source, [node]
    if op == "Cast":
        return _cast_back(graph, node, source)
    if op == "Transpose":
        return _transposed_back(graph, node, source)
    if op == "Expand" and same_shape(source, tensor):
        return source, [node]
    return _viewed_back(graph, node, source) if op in VIEWS else None


def _trains(graph: Graph, node: gs.Node) -> bool:
    if len(node.inputs) < 3 or node.inputs[2].is_empty():
        return False
    mode = graph.constant(node.inputs[2])
    return mode is None or bool(mode)


def _cast_back(graph: Graph, node: gs.Node, source: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    if source.dtype is None or node.outputs[0].dtype is None:
        return None
    if source.dtype == node.outputs[0].dtype:
        return source, [node]
    inner = graph.producer(source)
    if inner is None or canonical(inner) != "Cast" or inner.inputs[0].dtype is None:
        return None
    narrow, wide = dtype_name(inner.inputs[0].dtype), dtype_name(source.dtype)
    fits = narrow == dtype_name(node.outputs[0].dtype) and (narrow, wide) in WIDENING
    return (inner.inputs[0], [node, inner]) if fits else None


def _transposed_back(graph: Graph, node: gs.Node, source: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    permutation, nodes = _permutation(node), [node]
    while permutation is not None and permutation != list(range(len(permutation))):
        inner = graph.producer(source)
        if inner is None or canonical(inner) != "Transpose" or len(nodes) == LONGEST:
            return None
        before = _permutation(inner)
        permutation = None if before is None or len(before) != len(permutation) else [before[i] for i in permutation]
        nodes.append(inner)
        source = inner.inputs[0]
    return None if permutation is None else (nodes[-1].inputs[0], nodes)


def _permutation(node: gs.Node) -> list[int] | None:
    found = node.attrs.get("perm")
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    return list(found) if found is not None else None if rank is None else list(reversed(range(rank)))


def _viewed_back(graph: Graph, node: gs.Node, source: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    nodes = [node]
    while not same_shape(source, node.outputs[0]):
        inner = graph.producer(source)
        if inner is None or canonical(inner) not in VIEWS or len(nodes) == LONGEST:
            return None
        nodes.append(inner)
        source = inner.inputs[0]
    return source, nodes


def same_shape(a: gs.Tensor, b: gs.Tensor) -> bool:
    """The two shapes are known and equal, names of dynamic dimensions included."""
    if a.shape is None or b.shape is None or None in a.shape or None in b.shape:
        return False
    return list(a.shape) == list(b.shape)
