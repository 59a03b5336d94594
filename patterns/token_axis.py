"""Is a graph computed token by token? For each value: along which axis the tokens lie, and that no operator mixes them.

A generator packs the tokens of many sequences one after the other, which is right only if, attention aside, what is
computed for a token depends on that token alone, and not even on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError
from rewrite.graph import Dim, Graph, canonical, describe
from rewrite.shapes import product

TOKENS, ROWS = "tokens", "rows"  # names of the dimension: all tokens, and those whose logits are wanted


@dataclass(frozen=True)
class Along:
    """Tokens lie along `axis`, whose size is the dimension `dim`."""

    axis: int
    dim: str


class Count:
    """Integers that depend on how many tokens there are: they may shape values, and nothing else."""


COUNT = Count()
Place = Along | Count | None  # None: the same for all tokens


class Mixed(Exception):
    """An operator is not computed token by token; the message is the reason."""


class TokenAxes:
    """Where the tokens lie in each value of a graph, by `id` of the tensor. Raises RewriteError for a graph that mixes them."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Along], name: str = "model"):
        self.graph = graph
        self.places: dict[int, Place] = {id(t): inputs.get(t.name) for t in graph.gs.inputs}
        for node in graph:
            operator = canonical(node)
            try:
                found = self._outputs(node, operator)
            except Mixed as reason:
                raise RewriteError(f"{name}: cannot become a generator: {describe(node)} is not computed token by token: {reason}") from reason
            for tensor, place in zip(node.outputs, found, strict=False):
                self.places[id(tensor)] = place

    def of(self, tensor: gs.Tensor) -> Place:
        return None if id(tensor) in self.graph.known else self.places.get(id(tensor))

    def _outputs(self, node: gs.Node, operator: str) -> list[Place]:
        places = [None if t.is_empty() else self.of(t) for t in node.inputs]
        if operator == "Shape":
            dims = self.graph.symbolic.get(id(node.outputs[0]))
            return [None if dims is not None and all(isinstance(d, int) for d in dims) else COUNT]
        if all(p is None for p in places) or operator == "Size":
            return [None if operator != "Size" else COUNT] * len(node.outputs)
        handler = RULES.get(operator)
        if handler is None and all(p is None or p is COUNT for p in places) and operator in ARITHMETIC:
            return [COUNT] * len(node.outputs)
        if handler is None:
            raise Mixed("nothing is known of this operator")
        made = handler(self, node, places)
        return made if isinstance(made, list) else [made] * len(node.outputs)


def _rank(tensor: gs.Tensor) -> int:
    if tensor.shape is None:
        raise Mixed(f"the shape of '{tensor.name}' is not known")
    return len(tensor.shape)


def _one(places: list[Place], index: int = 0) -> Along:
    """The place of operand `index`, the only one in which tokens may lie."""
    place = places[index]
    if any(p is not None for i, p in enumerate(places) if i != index and p is not COUNT):
        raise Mixed("two operands depend on tokens")
    if not isinstance(place, Along):
        raise Mixed("it depends on how many tokens there are")
    return place


def _axes(node: gs.Node, graph: Graph, operand: int) -> list[int] | None:
    """Axes given as an attribute or as operand `operand`, or None."""
    if "axes" in node.attrs:
        return [int(a) for a in node.attrs["axes"]]
    if len(node.inputs) <= operand or node.inputs[operand].is_empty():
        return None
    values = graph.constant(node.inputs[operand])
    if values is None:
        raise Mixed("its axes are computed")
    return [int(a) for a in values.reshape(-1)]


# --- rules: the place of the outputs from those of the inputs ---------------------------------------------------------
def elementwise(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    """Operands are aligned at their last axes; tokens must lie along the same."""
    if all(p is None or p is COUNT for p in places):
        return COUNT
    if any(p is COUNT for p in places):
        raise Mixed("numbers depend on how many tokens there are")
    found = {(p.axis - _rank(t), p.dim) for t, p in zip(node.inputs, places, strict=True) if isinstance(p, Along)}
    if len(found) > 1:
        raise Mixed("tokens lie along different axes of its operands")
    (offset, dim), *_ = found
    rank = max(_rank(t) for t in node.inputs if not t.is_empty())
    return Along(rank + offset, dim)


def not_last(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    """Elementwise but for the last axis."""
    place = elementwise(axes, node, places)
    if isinstance(place, Along) and place.axis == _rank(node.inputs[0]) - 1:
        raise Mixed("tokens lie along the last axis")
    return place


def normalization(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    place, rank = _one(places), _rank(node.inputs[0])
    axis = axes.graph.attribute(node, "axis")
    first = (int(axis) if isinstance(axis, int) else -1) % rank
    if place.axis >= first:
        raise Mixed(f"it is over the axes from {first}, along which tokens lie")
    return place


def over_axis(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    """Softmax and what else works along one axis and keeps the shape, and Split, which cuts along it."""
    place, rank = _one(places), _rank(node.inputs[0])
    axis = axes.graph.attribute(node, "axis")
    if (int(axis) if isinstance(axis, int) else 0) % rank == place.axis:
        raise Mixed(f"it is along axis {place.axis}, that of the tokens")
    return place


def matmul(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    a, b = node.inputs[:2]
    rank = max(_rank(a), _rank(b))
    left, right = places[:2]
    if isinstance(left, Along) and isinstance(right, Along):
        offset = left.axis - _rank(a)
        if offset != right.axis - _rank(b) or offset >= -2 or left.dim != right.dim:
            raise Mixed("it multiplies tokens with tokens (an attention that no rule has fused?); `rewrite explain` tells why not")
        return Along(rank + offset, left.dim)
    place = left if right is None else right
    if not isinstance(place, Along):
        raise Mixed("numbers depend on how many tokens there are")
    operand, summed = (a, _rank(a) - 1) if right is None else (b, max(_rank(b) - 2, 0))
    if place.axis == summed:
        raise Mixed("it sums over the tokens")
    return Along(rank + place.axis - _rank(operand), place.dim)


def linear(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    """x @ w and more of MatMulAct and GatedMatMulAct; a residual lies as x does."""
    place = places[0]
    if not isinstance(place, Along) or place.axis == _rank(node.inputs[0]) - 1:
        raise Mixed("it sums over the tokens, or a weight depends on them")
    for index, other in enumerate(places[1:], 1):
        residual = canonical(node) == "MatMulAct" and index == 3
        if other is not None and not (residual and other == place and _rank(node.inputs[index]) == _rank(node.inputs[0])):
            raise Mixed("a weight or bias depends on the tokens")
    return place


def gemm(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if node.attrs.get("transA") or places[0] != Along(0, getattr(places[0], "dim", "")) or places[1] is not None:
        raise Mixed("it sums over the tokens, or its weight depends on them")
    if len(places) > 2 and places[2] is not None and places[2] != places[0]:
        raise Mixed("its bias depends on the tokens")
    return places[0]


def transpose(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    place, rank = _one(places), _rank(node.inputs[0])
    return Along(list(node.attrs.get("perm", range(rank)[::-1])).index(place.axis), place.dim)


def reshape(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    """The axis whose size is the tokens', with as many elements before it as there were."""
    if not isinstance(places[0], Along):
        return _shaped(node)
    place = _one(places)
    before, after = list(node.inputs[0].shape or ()), list(node.outputs[0].shape or ())
    for axis, dim in enumerate(after):
        if dim == place.dim and product(after[:axis]) == product(before[: place.axis]):
            return Along(axis, place.dim)
    raise Mixed(f"from {before} to {after} it joins or splits the tokens")


def _shaped(node: gs.Node) -> Place:
    """What fills a shape with equal values: the tokens lie where its size says so."""
    dims: list[Dim] = list(node.outputs[0].shape or ())
    found = [i for i, d in enumerate(dims) if d in (TOKENS, ROWS)]
    if len(found) != 1 or any(not isinstance(d, int) for i, d in enumerate(dims) if i not in found):
        raise Mixed(f"its shape {dims} depends on how many tokens there are")
    return Along(found[0], str(dims[found[0]]))


def expand(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if not isinstance(places[0], Along):
        return _shaped(node)
    place = _one(places)
    return Along(place.axis + _rank(node.outputs[0]) - _rank(node.inputs[0]), place.dim)


def filled(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    return _shaped(node)


def unsqueeze(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if places[0] is COUNT:
        return COUNT
    place = _one(places)
    rank = _rank(node.inputs[0])
    new = _axes(node, axes.graph, 1) or []
    added = {a % (rank + len(new)) for a in new}
    kept = [i for i in range(rank + len(new)) if i not in added]
    return Along(kept[place.axis], place.dim)


def squeeze(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if places[0] is COUNT:
        return COUNT
    place, dims = _one(places), list(node.inputs[0].shape or ())
    gone = _axes(node, axes.graph, 1)
    removed = {a % len(dims) for a in gone} if gone is not None else {i for i, d in enumerate(dims) if d == 1}
    if place.axis in removed or (gone is None and any(not isinstance(d, int) for i, d in enumerate(dims) if i != place.axis)):
        raise Mixed("it removes the axis of the tokens")
    return Along(place.axis - sum(a < place.axis for a in removed), place.dim)


def reduce(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if places[0] is COUNT:
        return COUNT
    place, rank = _one(places), _rank(node.inputs[0])
    given = _axes(node, axes.graph, 1)
    summed = {a % rank for a in given} if given is not None else set(range(rank))
    if place.axis in summed:
        raise Mixed("it reduces over the tokens")
    kept = axes.graph.attribute(node, "keepdims")
    return place if kept in (None, 1) else Along(place.axis - sum(a < place.axis for a in summed), place.dim)


def arg_extreme(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    place = over_axis(axes, node, places)
    assert isinstance(place, Along)
    axis = int(node.attrs.get("axis", 0)) % _rank(node.inputs[0])
    return place if node.attrs.get("keepdims", 1) else Along(place.axis - (axis < place.axis), place.dim)


def slice_(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if places[0] is COUNT:
        return COUNT
    place, rank = _one(places), _rank(node.inputs[0])
    if any(p is COUNT for p in places):
        raise Mixed("where it cuts depends on how many tokens there are")
    cut = _axes(node, axes.graph, 3)
    if cut is None or place.axis in {a % rank for a in cut}:
        raise Mixed("it cuts along the axis of the tokens")
    return place


def concat(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    if all(p is None or p is COUNT for p in places):
        return COUNT
    if len(set(places)) > 1:
        raise Mixed("tokens do not lie along the same axis of all its operands")
    place = places[0]
    if not isinstance(place, Along) or node.attrs["axis"] % _rank(node.inputs[0]) == place.axis:
        raise Mixed("it joins values along the axis of the tokens")
    return place


def gather(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    data, index = places[:2]
    rank = _rank(node.inputs[0])
    axis = int(node.attrs.get("axis", 0)) % rank
    if data is COUNT:
        return COUNT
    if data is None and isinstance(index, Along):  # a table
        return Along(axis + index.axis, index.dim)
    if isinstance(data, Along) and index == Along(0, ROWS) and axis == data.axis and data.dim == TOKENS:
        return Along(axis, ROWS)
    place = _one(places)
    if axis == place.axis:
        raise Mixed("it picks some of the tokens")
    return Along(place.axis + (_rank(node.inputs[1]) - 1 if axis < place.axis else 0), place.dim)


def gather_nd(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    place = _one(places)
    indices = node.inputs[1]
    depth = indices.shape[-1] if indices.shape else None
    if node.attrs.get("batch_dims", 0) or not isinstance(depth, int) or place.axis < depth:
        raise Mixed("it picks some of the tokens")
    return Along(place.axis - depth + _rank(indices) - 1, place.dim)


def tile(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    place, dims = _one(places), list(node.outputs[0].shape or ())
    if len(dims) <= place.axis or dims[place.axis] != place.dim:
        raise Mixed(f"it repeats the tokens: {list(node.inputs[0].shape or ())} becomes {dims}")
    return place


def gather_elements(axes: TokenAxes, node: gs.Node, places: list[Place]) -> Place:
    """Elements picked for each token along another axis: the indices lie as the data do. Or rows of a table."""
    axis = int(node.attrs.get("axis", 0)) % _rank(node.inputs[0])
    if places[0] is None and isinstance(places[1], Along) and places[1].axis == axis:
        return places[1]
    place = elementwise(axes, node, places)
    if not isinstance(place, Along) or place.axis == axis or places[0] != places[1]:
        raise Mixed("it picks some of the tokens, or some for all of them")
    return place


def paged(axes: TokenAxes, node: gs.Node, places: list[Place]) -> list[Place]:
    if any(p != Along(2, TOKENS) for p in places[:3]):
        raise Mixed("tokens do not lie along axis 2 of its queries, keys and values")
    return [Along(2, TOKENS), None, None]


ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Mod", "Min", "Max", "Cast", "Identity", "ReduceProd", "Neg", "Equal", "Where", "Constant"}  # of sizes
ELEMENTWISE = {
    "Abs", "Acos", "Add", "And", "Asin", "Atan", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
    "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mod", "Mul", "Neg",
    "Not", "Or", "PRelu", "Pow", "QuickGelu", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tanh",
    "ThresholdedRelu", "Where", "Xor",
}  # fmt: skip
Handler = Callable[[TokenAxes, gs.Node, list[Place]], Any]
RULES: dict[str, Handler] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), normalization),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Split", "TopK"), over_axis),
    **dict.fromkeys(("ArgMax", "ArgMin"), arg_extreme),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare", "ReduceProd", "ReduceL1"), reduce),
    **dict.fromkeys(("MatMulAct", "GatedMatMulAct"), linear),
    "MatMul": matmul, "Gemm": gemm, "Transpose": transpose, "Reshape": reshape, "Flatten": reshape, "Expand": expand, "ConstantOfShape": filled, "Unsqueeze": unsqueeze,
    "Squeeze": squeeze, "Slice": slice_, "Concat": concat, "Gather": gather, "GatherND": gather_nd, "Rotary": not_last, "Tile": tile, "GatherElements": gather_elements, "PagedAttention": paged,
}  # fmt: skip
