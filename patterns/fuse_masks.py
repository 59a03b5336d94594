"""The subgraph that computes an attention's mask -> AttentionMask, which says what the mask is.

Exporters build masks from 10 to 50 nodes in ways that change with every version, so no pattern describes them. The rule
collects all nodes that the mask comes from and recognises the mask by what they compute (`mask_behaviour`).
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rewrite.functions import CaptureError, Signature, capture, flatten
from rewrite.graph import Dim, Graph, canonical, describe, dtype_name, small_values
from rewrite.matcher import Match
from rewrite.patterns.mask_behaviour import Sizes, recognise
from rewrite.precision import widen_function
from rewrite.registry import rule
from rewrite.shapes import is_named, plus

# What masks are made of. Everything else is computed elsewhere: a mask that depends on it is none of these kinds.
MASK_OPERATORS = {
    "Abs", "Add", "And", "AttentionMask", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "Cast", "CastLike", "Clip", "Concat", "Constant", "ConstantOfShape", "CumSum",
    "Div", "Equal", "Expand", "EyeLike", "Flatten", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "Identity", "IsInf",
    "IsNaN", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "Range", "ReduceMax", "ReduceMin", "ReduceProd",
    "ReduceSum", "Reshape", "ScatterElements", "ScatterND", "Shape", "Sign", "Size", "Slice", "Split", "Squeeze", "Sub", "Sum", "Tile",
    "Transpose", "Trilu", "Unsqueeze", "Where", "Xor",
}  # fmt: skip
LARGEST_CONE = 300  # nodes: the largest mask seen in an export has 61


class NoMask(Exception):
    """The mask is none that AttentionMask computes; the message is the reason."""


@dataclass
class Cone:
    """Everything a mask comes from: nodes, the tensors whose content it depends on, the sizes it depends on."""

    nodes: list[gs.Node] = field(default_factory=list)
    data: list[gs.Tensor] = field(default_factory=list)
    sizes: list[Dim] = field(default_factory=list)


@rule(exact=True)
class AttentionMask:
    """The mask of an attention, where it is causal, key padding, a sliding window, or several of these at once."""

    root = ("FusedAttention",)

    def find(graph, node):
        if len(node.inputs) < 4 or node.inputs[3].is_empty():
            return None
        mask = node.inputs[3]
        producer = graph.producer(mask)
        if producer is not None and canonical(producer) == "AttentionMask":
            return None
        try:
            return find_mask(graph, node, mask)
        except (NoMask, CaptureError) as error:
            return f"the mask '{mask.name}' stays as it is: {error}"

    def replace(op, padding, source, past, attributes):
        return op.AttentionMask(padding, source, past, **attributes)


def find_mask(graph: Graph, node: gs.Node, mask: gs.Tensor) -> Match:
    """The mask as a match whose bindings are the inputs and attributes of an AttentionMask. Raises NoMask."""
    if graph.producer(mask) is None and not isinstance(mask, gs.Constant):
        raise NoMask("it is given from outside")
    cone = collect(graph, mask)
    padding = _padding(cone)
    query, key = node.inputs[0].shape, node.inputs[1].shape
    if query is None or key is None or len(query) != 4 or len(key) != 4:
        raise NoMask(f"queries and keys have shapes {query} and {key}, expected [batch, heads, positions, size]")
    batch, queries, keys = query[0], query[2], key[2]
    if not all(is_named(d) for d in (batch, queries, keys)):
        raise NoMask(f"the sizes of queries {query} and keys {key} are not known")
    inputs, dims, axes = choose_inputs(graph, padding, cone.sizes, batch, queries, keys)
    shapes: dict[int, tuple[Dim, ...]] = {}
    if padding is not None:
        shapes[id(padding)] = (batch, keys)
    body = capture(graph, cone.nodes, Signature("AttentionMask", tuple(inputs), ("y",)), list(inputs.values()), [mask], dims)
    shaped = {n: (t.dtype, shapes.get(id(t), tuple(t.shape or ()))) for n, t in inputs.items()}
    function, narrow = flatten(body.function, graph.functions), mask.dtype is not None and dtype_name(mask.dtype) == "bfloat16"
    found = recognise(widen_function(function) if narrow else function, shaped, Sizes(batch, queries, keys), axes, bool(node.attrs.get("drop")))
    if isinstance(found, str):
        raise NoMask(found)
    attributes, note = found
    if narrow:  # ONNX Runtime has no kernels for it: it was computed in float32
        attributes = {**attributes, "dtype": "bfloat16"}
    bindings: dict[str, Any] = {**inputs, "attributes": attributes}
    return Match(graph, [mask], bindings, cone.nodes, dims, shapes, note)


def collect(graph: Graph, mask: gs.Tensor) -> Cone:
    """Everything behind `mask` down to graph inputs, constants and sizes. Raises NoMask at what masks are not made of."""
    cone = Cone()
    seen: set[int] = set()
    refusal = ""
    pending = [mask]
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or tensor.is_empty():
            continue
        seen.add(id(tensor))
        if id(tensor) in graph.symbolic:
            cone.sizes += [d for d in graph.symbolic[id(tensor)] if not isinstance(d, int)]
            continue
        node = graph.producer(tensor)
        if node is None:
            if not isinstance(tensor, gs.Constant):
                cone.data.append(tensor)
            elif _is_bias(tensor):
                raise NoMask(f"it adds the numbers of '{tensor.name}' {list(tensor.shape)} to the scores, a bias, beside hiding some or none")
            continue
        if canonical(node) not in MASK_OPERATORS:
            refusal = refusal or f"it depends on '{tensor.name}', computed by {describe(node)}"
            continue
        if canonical(node) in ("Shape", "Size"):
            raise NoMask(f"it depends on the shape of '{node.inputs[0].name}', which is not known")
        cone.nodes.append(node)
        if len(cone.nodes) > LARGEST_CONE:
            raise NoMask(f"more than {LARGEST_CONE} nodes compute it")
        shape_only = canonical(node) == "AttentionMask"  # of all inputs but the padding; `choose_inputs` chooses the same again
        pending += node.inputs[:1] if shape_only else node.inputs
    if refusal:
        raise NoMask(refusal)
    return cone


def _is_bias(tensor: gs.Constant) -> bool:
    """Whether a constant holds several numbers that no mask is made of: positions and limits are integers."""
    values = small_values(tensor)
    if values is None:
        return False
    numbers = values.reshape(-1).astype(np.float64) if values.dtype.kind == "f" or values.dtype.name == "bfloat16" else np.zeros(0)
    fractions = numbers[np.isfinite(numbers) & (numbers != np.round(numbers))]
    return bool(np.unique(fractions).size > 1)


def _padding(cone: Cone) -> gs.Tensor | None:
    """The key-padding mask among the inputs a mask depends on. Raises NoMask if there is anything else."""
    if not cone.data:
        return None
    if len(cone.data) > 1:
        names = " and ".join(sorted(f"'{t.name}'" for t in cone.data))
        raise NoMask(f"it depends on {names}; at most one input, a key-padding mask, can be told apart")
    data = cone.data[0]
    if data.shape is None or len(data.shape) != 2:
        raise NoMask(f"it depends on '{data.name}' of shape {data.shape}; a key-padding mask has the shape [batch, keys]")
    return data


# --- the inputs of the new node -----------------------------------------------------------------------------------
def choose_inputs(
    graph: Graph, padding: gs.Tensor | None, sizes: list[Dim], batch: Dim, queries: Dim, keys: Dim
) -> tuple[dict[str, gs.Tensor], dict[str, tuple[str, int]], dict[str, int]]:
    """Inputs of AttentionMask that tell all sizes, where each size is read, and the axes. Raises NoMask if one is missing.

    Only inputs of the graph are considered: a mask must not wait for a layer.
    """
    inputs: dict[str, gs.Tensor] = {}
    dims: dict[str, tuple[str, int]] = {}
    axes: dict[str, int] = {}
    free = [t for t in graph.gs.inputs if t.shape is not None and t is not padding]

    def take(name: str, tensor: gs.Tensor) -> None:
        inputs[name] = tensor
        for axis, dim in enumerate(tensor.shape):
            if isinstance(dim, str):
                dims.setdefault(dim, (name, axis))

    if padding is not None:
        take("padding", padding)
    enough = padding is not None and list(padding.shape) == [batch, queries] and all(_told(d, dims) for d in sizes)
    if not enough:
        source = _source(free, batch, queries)
        take("source", source)
        axes = {"batch_axis": list(source.shape).index(batch) if batch in source.shape else 0, "query_axis": _axis(source, batch, queries)}
    if keys != (padding.shape[1] if padding is not None else queries) or not all(_told(d, dims) for d in sizes):
        past, axis = _past(free, queries, keys)
        take("past", past)
        axes["past_axis"] = axis
    missing = [d for d in sizes if not _told(d, dims)]
    if missing:
        raise NoMask(f"it depends on the size '{missing[0]}', which no suitable input of the graph tells")
    order = ("padding", "source", "past")
    return {n: inputs[n] for n in order if n in inputs}, dims, axes


def _told(dim: Dim, dims: dict[str, tuple[str, int]]) -> bool:
    if not isinstance(dim, str) or dim in dims:
        return True
    try:
        names = {n.id for n in ast.walk(ast.parse(dim, mode="eval")) if isinstance(n, ast.Name)}
    except SyntaxError:
        return False
    return names <= dims.keys()


def _axis(tensor: gs.Tensor, batch: Dim, queries: Dim) -> int:
    """The axis of the queries; where the batch has the same size, batch comes first."""
    axes = [i for i, d in enumerate(tensor.shape) if d == queries]
    return axes[1] if batch == queries and len(axes) > 1 else axes[0]


def _source(free: list[gs.Tensor], batch: Dim, queries: Dim) -> gs.Tensor:
    """An input of the graph that tells how many queries there are: token ids rather than anything else."""
    fitting = [t for t in free if queries in list(t.shape) and (batch in list(t.shape) or batch == 1) and len(t.shape) >= 2]
    if not fitting:
        raise NoMask(f"no input of the graph has the sizes of its queries, [{batch}, {queries}]")
    return min(fitting, key=lambda t: (list(t.shape[:2]) != [batch, queries], len(t.shape)))


def _past(free: list[gs.Tensor], queries: Dim, keys: Dim) -> tuple[gs.Tensor, int]:
    """The cached keys: an input with a dimension that is missing between queries and keys."""
    for tensor in free:
        for axis, dim in enumerate(tensor.shape):
            if axis > 0 and keys in (plus(dim, queries), plus(queries, dim)):
                return tensor, axis
    raise NoMask(f"no input of the graph tells how {queries} queries go with {keys} keys")
