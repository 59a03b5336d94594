"""How a value is split over ranks, followed through the graph: from heads to the columns of the products before, the rows of those after.

A split is asked for at some values; each operator that touches a split value says how its others are split. It ends at products
with constant weights: whose result is split gets columns of its weight, who reads along the split axis gets rows and leaves
sums to be added up. An operator that is not known, or works along the split axis, is a reason to give up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rewrite.graph import Graph, canonical, describe
from rewrite.shapes import product

Sections = tuple[tuple[int, int], ...]  # (size, units that stay whole), one after the other


class Unsplit(Exception):
    """A value cannot be split so; the message names the node and the reason."""


@dataclass(frozen=True)
class Cut:
    """Split along `axis`, each of the sections of its own."""

    axis: int
    sections: Sections

    def at(self, axis: int) -> Cut:
        return Cut(axis, self.sections)

    def scaled(self, axis: int, up: int = 1, down: int = 1) -> Cut:
        """At another axis, where each element is `up` (or one of `down`) elements; units that would be cut apart stay together."""
        if any(size * up % down for size, _ in self.sections):
            raise ValueError("sections are cut apart")
        return Cut(axis, tuple((size * up // down, math.gcd(units, size * up // down)) for size, units in self.sections))

    def alike(self, other: Cut, world: int) -> bool:
        """Whether each of `world` ranks has the same: those of larger units have smaller ones together."""

        def parts(cut: Cut) -> list[tuple[int, int]]:
            return [(size, world if units % world == 0 else units) for size, units in cut.sections]

        return self.axis == other.axis and parts(self) == parts(other)

    @property
    def size(self) -> int:
        return sum(size for size, _ in self.sections)

    @property
    def units(self) -> int:
        return sum(units for _, units in self.sections)


@dataclass
class Found:
    """Split values by name; split constants by node (its first output) and operand; products that sum; attentions."""

    places: dict[str, Cut] = field(default_factory=dict)
    uses: dict[tuple[str, int], Cut] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)
    attentions: set[str] = field(default_factory=set)

    def copy(self) -> Found:
        return Found(dict(self.places), dict(self.uses), set(self.columns), set(self.rows), set(self.attentions))


class Spread:
    """The splits found so far. `caches` are the names of inputs and outputs that may be split, though the user sees them."""

    def __init__(self, graph: Graph, world: int, caches: Iterable[str] = ()):
        self.graph, self.world, self.caches, self.found = graph, world, set(caches), Found()
        self.queue: list[gs.Tensor] = []

    def run(self, seeds: list[tuple[gs.Tensor, Cut]]) -> set[str]:
        """Split these values and all that follows from it; returns the names of the values split. Raises Unsplit, with nothing changed."""
        before, self.queue = self.found.copy(), []
        try:
            for tensor, cut in seeds:
                self.place(tensor, cut)
            while self.queue:
                tensor = self.queue.pop()
                for node in (self.graph.producer(tensor), *self.graph.consumers(tensor)):
                    if node is not None:
                        self._visit(node)
        except Unsplit:
            self.found = before
            raise
        return {n for n in self.found.places if n not in before.places}

    def _visit(self, node: gs.Node) -> None:
        rule = RULES.get(canonical(node))
        try:
            if rule is None:
                raise Unsplit("nothing is known of this operator")
            rule(self, node)
        except Unsplit as reason:
            text = str(reason)
            raise Unsplit(text if "'" in text.split(":")[0] else f"{describe(node)}: {text}") from reason
        except ValueError as reason:
            raise Unsplit(f"{describe(node)}: {reason}") from reason

    # --- what rules ask and say ----------------------------------------------------------------------------------
    def of(self, tensor: gs.Tensor) -> Cut | None:
        return self.found.places.get(tensor.name) if tensor.name else None

    def place(self, tensor: gs.Tensor, cut: Cut) -> None:
        known = self.of(tensor)
        if known is not None:
            if not known.alike(cut, self.world):
                raise Unsplit(f"'{tensor.name}' would be split in two ways")
            return
        if id(tensor) in self.graph.captured or (id(tensor) in self.graph.outputs and tensor.name not in self.caches):
            raise Unsplit(f"'{tensor.name}' is an output, or read inside a branch")
        if self.graph.producer(tensor) is None and tensor.name not in self.caches:
            raise Unsplit(f"'{tensor.name}' is not computed, so not split")
        shape = tensor.shape
        if shape is None or len(shape) <= cut.axis or shape[cut.axis] != cut.size:
            raise Unsplit(f"'{tensor.name}' has shape {shape}, and {cut.size} were to be split along axis {cut.axis}")
        self.found.places[tensor.name] = cut
        self.queue.append(tensor)

    def use(self, node: gs.Node, index: int, cut: Cut) -> None:
        """A constant operand is split."""
        shape = node.inputs[index].shape
        if shape is None or shape[cut.axis] != cut.size:
            raise Unsplit(f"its operand '{node.inputs[index].name}' has shape {shape}, and {cut.size} were to be split along axis {cut.axis}")
        key = (node.outputs[0].name, index)
        if not self.found.uses.setdefault(key, cut).alike(cut, self.world):
            raise Unsplit(f"its operand '{node.inputs[index].name}' would be split in two ways")

    def constant(self, tensor: gs.Tensor) -> list[int]:
        values = self.graph.constant(tensor)
        if values is None:
            raise Unsplit(f"its operand '{tensor.name}' is computed")
        return [int(v) for v in np.asarray(values).reshape(-1)]

    def same(self, *tensors: gs.Tensor, axis: int | None = None) -> None:
        """These values are split alike. `axis` is one that must stay whole, with all after it."""
        cut = next((c for c in map(self.of, tensors) if c is not None), None)
        if cut is None:
            return
        if axis is not None and cut.axis >= axis:
            raise Unsplit(f"it works along axis {cut.axis}, which would be split")
        for tensor in tensors:
            self.place(tensor, cut)


def _rank(tensor: gs.Tensor) -> int:
    if tensor.shape is None:
        raise Unsplit(f"the shape of '{tensor.name}' is not known")
    return len(tensor.shape)


# --- rules ------------------------------------------------------------------------------------------------------------
def elementwise(s: Spread, node: gs.Node) -> None:
    """Operands are aligned at their last axes."""
    tensors = [t for t in (*node.inputs, *node.outputs) if not t.is_empty()]
    found = next(((c, _rank(t)) for t in tensors if (c := s.of(t)) is not None), None)
    if found is None:
        return
    cut, offset = found[0], found[0].axis - found[1]
    for tensor in tensors:
        axis = _rank(tensor) + offset
        if axis < 0 or tensor.shape[axis] == 1:
            continue
        if s.graph.is_constant(tensor):
            s.use(node, next(i for i, t in enumerate(node.inputs) if t is tensor), cut.at(axis))
        else:
            s.place(tensor, cut.at(axis))


def concat(s: Spread, node: gs.Node) -> None:
    cut = next((c for t in (*node.inputs, *node.outputs) if (c := s.of(t)) is not None), None)
    if cut is not None and node.attrs["axis"] % _rank(node.outputs[0]) == cut.axis:
        raise Unsplit(f"it joins along axis {cut.axis}, which would be split")
    elementwise(s, node)


def transpose(s: Spread, node: gs.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    perm = list(node.attrs.get("perm", range(_rank(x))[::-1]))
    if (cut := s.of(x)) is not None:
        s.place(y, cut.at(perm.index(cut.axis)))
    elif (cut := s.of(y)) is not None:
        s.place(x, cut.at(perm[cut.axis]))


def regrouped(cut: Cut, before: list[Any], after: list[Any]) -> Cut:
    """Where a cut of a value lies when its shape becomes `after`. Raises ValueError if it does not stay one."""
    first = product(before[: cut.axis])
    for axis, start in ((a, b) for a in range(len(after)) for b in range(cut.axis) if product(after[:a]) == product(before[:b])):
        times, size = product(before[start : cut.axis]), after[axis]  # joined with axes before it: as many sections, one after the other
        if isinstance(times, int) and isinstance(size, int) and times > 1 and size % (times * cut.size) == 0:
            one = cut.scaled(axis, up=size // (times * cut.size))
            return Cut(axis, one.sections * times)
    for axis in range(1, len(after)):
        times, size = after[axis - 1], after[axis]  # taken apart again
        if product(after[: axis - 1]) != first or not isinstance(times, int) or not isinstance(size, int) or times < 2 or len(cut.sections) % times:
            continue
        one = Cut(axis, cut.sections[: len(cut.sections) // times])
        if len(cut.sections) > 1 and one.sections * times == cut.sections and one.size % size == 0:
            return one.scaled(axis, down=one.size // size)
    for axis in range(len(after)):
        if product(after[:axis]) != first or not isinstance(after[axis], int):
            continue
        size = after[axis]
        if size == cut.size:
            return cut.at(axis)
        if size > cut.size and size % cut.size == 0 and size > 1:
            return cut.scaled(axis, up=size // cut.size)
        if cut.size % size == 0 and (size > 1 or cut.units == 1):  # one head has an axis of its own, too
            return cut.scaled(axis, down=cut.size // size)
    raise ValueError(f"from {before} to {after} axis {cut.axis} would not stay split")


def reshape(s: Spread, node: gs.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    shapes = [list(t.shape) if t.shape is not None else [] for t in (x, y)]
    if (cut := s.of(x)) is not None:
        s.place(y, regrouped(cut, shapes[0], shapes[1]))
    elif (cut := s.of(y)) is not None:
        s.place(x, regrouped(cut, shapes[1], shapes[0]))
    if cut is not None:
        s.constant(node.inputs[1])


def squeeze(s: Spread, node: gs.Node) -> None:
    """Squeeze and Unsqueeze: axes of one element come and go."""
    short, long = (node.outputs[0], node.inputs[0]) if canonical(node) == "Squeeze" else (node.inputs[0], node.outputs[0])
    given = node.attrs["axes"] if "axes" in node.attrs else s.constant(node.inputs[1])
    gone = {int(a) % _rank(long) for a in given}
    kept = [a for a in range(_rank(long)) if a not in gone]
    if (cut := s.of(short)) is not None:
        s.place(long, cut.at(kept[cut.axis]))
    elif (cut := s.of(long)) is not None:
        if cut.axis in gone:
            raise Unsplit("the axis that would be split goes away")
        s.place(short, cut.at(kept.index(cut.axis)))


def _cut_up(cut: Cut, bounds: list[tuple[int, int]]) -> list[Cut]:
    """The cuts of ranges that begin and end between sections, or between units of one."""
    made = []
    for begin, end in bounds:
        sections, start = [], 0
        for size, units in cut.sections:
            low, high = max(begin, start), min(end, start + size)
            if low < high:
                if (low, high) != (start, start + size):
                    raise Unsplit("it cuts a section that would be split")
                sections.append((size, units))
            start += size
        made.append(Cut(cut.axis, tuple(sections)))
    return made


def _joined(s: Spread, x: gs.Tensor, axis: int, bounds: list[tuple[int, int]], parts: list[gs.Tensor]) -> None:
    """Parts of `x` along `axis`: from all of them follows how `x` is split, and the other way round."""
    if (cut := s.of(x)) is not None:
        for part, piece in zip(parts, _cut_up(cut, bounds), strict=True):
            s.place(part, piece)
        return
    cuts = [s.of(p) for p in parts]
    if all(c is not None and c.axis == axis for c in cuts):
        s.place(x, Cut(axis, tuple(section for c in cuts if c is not None for section in c.sections)))


def split(s: Spread, node: gs.Node) -> None:
    x, axis = node.inputs[0], int(node.attrs.get("axis", 0)) % _rank(node.inputs[0])
    cut = next((c for t in (x, *node.outputs) if (c := s.of(t)) is not None), None)
    if cut is None:
        return
    if cut.axis != axis:
        s.same(x, *node.outputs)
        return
    ends = np.cumsum([0, *(t.shape[axis] for t in node.outputs)]).tolist()
    _joined(s, x, axis, list(pairwise(ends)), list(node.outputs))


def bounds_of(s: Spread, node: gs.Node) -> dict[int, tuple[int, int]]:
    """The range of a Slice along each of its axes. Raises Unsplit if it is computed or has steps."""
    x = node.inputs[0]
    starts, ends = s.constant(node.inputs[1]), s.constant(node.inputs[2])
    axes = s.constant(node.inputs[3]) if len(node.inputs) > 3 and not node.inputs[3].is_empty() else list(range(len(starts)))
    steps = s.constant(node.inputs[4]) if len(node.inputs) > 4 and not node.inputs[4].is_empty() else [1]
    if any(step != 1 for step in steps):
        raise Unsplit("it takes steps")
    found = {}
    for start, end, axis in zip(starts, ends, axes, strict=True):
        size = x.shape[axis % _rank(x)]
        if isinstance(size, int):
            found[axis % _rank(x)] = (max(start + size, 0) if start < 0 else min(start, size), max(end + size, 0) if end < 0 else min(end, size))
    return found


def slice_(s: Spread, node: gs.Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    cut = s.of(x) or s.of(y)
    if cut is None:
        return
    bounds = bounds_of(s, node)
    if cut.axis not in bounds:
        s.same(x, y)
        return
    if s.of(x) is not None:
        s.place(y, _cut_up(cut, [bounds[cut.axis]])[0])
        return
    beside = [n for n in s.graph.consumers(x) if canonical(n) == "Slice" and list(bounds_of(s, n)) == [cut.axis]]
    parts = sorted(((bounds_of(s, n)[cut.axis], n.outputs[0]) for n in beside), key=lambda p: p[0])
    ends = [0, *(b[1] for b, _ in parts)]
    if [b[0] for b, _ in parts] != ends[:-1] or ends[-1] != x.shape[cut.axis]:
        raise Unsplit(f"the slices of '{x.name}' are not one after the other")
    _joined(s, x, cut.axis, [b for b, _ in parts], [t for _, t in parts])


def gather(s: Spread, node: gs.Node) -> None:
    """Rows of a table whose columns are split, as the biases of each head are."""
    table, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    cut = s.of(y)
    if cut is None or int(node.attrs.get("axis", 0)) != 0 or cut.axis < _rank(indices) or not s.graph.is_constant(table):
        raise Unsplit("what it picks from, or the rows it picks, would be split")
    s.use(node, 0, cut.at(cut.axis - _rank(indices) + 1))


def normalization(s: Spread, node: gs.Node) -> None:
    axis = s.graph.attribute(node, "axis")
    s.same(node.inputs[0], node.outputs[0], axis=(int(axis) if isinstance(axis, int) else -1) % _rank(node.inputs[0]))


def over_axis(s: Spread, node: gs.Node) -> None:
    axis = s.graph.attribute(node, "axis")
    if (cut := s.of(node.inputs[0]) or s.of(node.outputs[0])) is not None and cut.axis == (int(axis) if isinstance(axis, int) else -1) % _rank(node.inputs[0]):
        raise Unsplit(f"it works along axis {cut.axis}, which would be split")
    s.same(node.inputs[0], node.outputs[0])


def rotary(s: Spread, node: gs.Node) -> None:
    x = node.inputs[0]
    if any(s.of(t) is not None for t in node.inputs[1:]):
        raise Unsplit("its angles would be split")
    s.same(x, node.outputs[0], axis=_rank(x) - 1)


def linear(s: Spread, node: gs.Node) -> None:
    """MatMulAct: columns if its result is split, rows if what it reads is."""
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if not s.graph.is_constant(w) or _rank(w) != 2:
        raise Unsplit("its weight is computed")
    turned, residual = int(node.attrs.get("trans_w", 0)), node.inputs[3] if len(node.inputs) > 3 else None
    read, made = s.of(x), s.of(y)
    last = _rank(x) - 1
    if read is not None and read.axis != last:
        raise Unsplit("its rows would be split")
    if made is None and residual is not None and not residual.is_empty():
        made = s.of(residual)
    if read is not None and made is not None:
        raise Unsplit("what it reads and what it makes would be split")
    if read is not None:
        if node.attrs.get("activation", "none") != "none":
            raise Unsplit(f"its activation ({node.attrs['activation']}) would see a part of the sum")
        s.use(node, 1, read.at(1 if turned else 0))
        s.found.rows.add(y.name)
        return
    if made is None:
        return
    if made.axis != _rank(y) - 1:
        raise Unsplit("its rows would be split")
    s.place(y, made)
    s.use(node, 1, made.at(0 if turned else 1))
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        if not s.graph.is_constant(node.inputs[2]) or _rank(node.inputs[2]) != 1:
            raise Unsplit("its bias is computed")
        s.use(node, 2, made.at(0))
    if residual is not None and not residual.is_empty():
        s.place(residual, made)
    s.found.columns.add(y.name)


def gated(s: Spread, node: gs.Node) -> None:
    """GatedMatMulAct: columns of both weights."""
    if s.of(node.inputs[0]) is not None:
        raise Unsplit("it reads what would be split, and its activation would see a part of the sum")
    made = s.of(node.outputs[0])
    if made is None:
        return
    if made.axis != _rank(node.outputs[0]) - 1:
        raise Unsplit("its rows would be split")
    if node.attrs.get("merged", "none") != "none":
        made = Cut(made.axis, made.sections * 2)
    for index, tensor in enumerate(node.inputs):
        if index == 0 or tensor.is_empty():
            continue
        if not s.graph.is_constant(tensor):
            raise Unsplit("a weight is computed")
        s.use(node, index, made.at(0 if index > 2 or node.attrs.get("trans_w", 0) else 1))
    s.found.columns.add(node.outputs[0].name)


def attention(s: Spread, node: gs.Node) -> None:
    """Head by head: queries and results alike, keys and values by the heads that serve them."""
    q, k, v = node.inputs[:3]
    if any(_rank(t) != 4 for t in (q, k, v)):
        raise Unsplit("its heads are not an axis of their own")
    heads, kv_heads = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise Unsplit(f"it has {heads} heads and {kv_heads} key heads; both must be known")
    mine, keys = Cut(1, ((heads, heads),)), Cut(1, ((kv_heads, kv_heads),))
    for tensor, cut in ((q, mine), (node.outputs[0], mine), (k, keys), (v, keys)):
        s.place(tensor, cut)
    s.found.attentions.add(node.outputs[0].name)
    if canonical(node) == "PagedAttention":
        if any(s.of(t) is not None for t in node.inputs[9:] if not t.is_empty()):
            raise Unsplit("its angles, or the weights of its norms, would be split")
        for tensor in (*node.inputs[3:5], *node.outputs[1:3]):
            s.place(tensor, keys.at(2))
        return
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None or mask.is_empty() or _rank(mask) < 3 or mask.shape[_rank(mask) - 3] == 1:
        return
    if s.graph.is_constant(mask):
        s.use(node, 3, mine.at(_rank(mask) - 3))
    else:
        s.place(mask, mine.at(_rank(mask) - 3))


Handler = Callable[[Spread, gs.Node], None]
RULES: dict[str, Handler] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Where", "Cast", "Identity", "Neg", "Abs", "Sqrt", "Exp", "Tanh", "Sigmoid", "Relu", "Erf", "Clip", "Min", "Max"), elementwise),
    **dict.fromkeys(("Gelu", "Swish", "Softplus", "Elu", "HardSwish", "LeakyRelu", "Sin", "Cos", "Reciprocal"), elementwise),
    **dict.fromkeys(("RMSNormalization", "LayerNormalization"), normalization),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), squeeze),
    **dict.fromkeys(("FusedAttention", "PagedAttention"), attention),
    "Concat": concat, "Transpose": transpose, "Reshape": reshape, "Split": split, "Slice": slice_, "Gather": gather, "Softmax": over_axis, "Rotary": rotary,
    "MatMulAct": linear, "GatedMatMulAct": gated,
}  # fmt: skip
