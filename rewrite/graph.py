"""Questions asked of an onnx-graphsurgeon graph, and the edits rules make to it.

A `Graph` wraps one `gs.Graph` (the main graph or the body of an If, Loop or Scan). Nodes are removed lazily: a node says
itself whether it is there, and the consumer lists of its inputs are filtered when they are read, so that an edit never
scans the consumers of a constant that ten thousand nodes share.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError
from rewrite.nodes import DOMAIN as DOMAIN
from rewrite.nodes import Constant, Node, Variable

SMALL = 4096  # elements: a constant up to this size may be read while matching and written into a function body

WIDE = 64  # inputs: a node with more is not searched each time that one of them changes

MOVES = {"Transpose", "Split", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Concat", "Gather"}

NOTHING = Variable("")  # the output of a node that is about to be removed

Dim = int | str | None


def canonical(node: gs.Node) -> str:
    """The operator's name as patterns write it: `Gelu` for ONNX's and for ours, `domain::Op` for others."""
    return node.canonical  # type: ignore[no-any-return]


@cache
def _default_attribute(op: str, name: str, opset: int) -> object:
    try:
        attribute = onnx.defs.get_schema(op, opset, "").attributes[name]
    except (onnx.defs.SchemaError, KeyError):
        return None
    if attribute.default_value.type == onnx.AttributeProto.UNDEFINED:
        return None
    return decode(onnx.helper.get_attribute_value(attribute.default_value))


def decode(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


@cache
def dtype_name(dtype: object) -> str:
    if isinstance(dtype, int):  # a type NumPy lacks, by its ONNX number
        return str(onnx.TensorProto.DataType.Name(dtype)).lower()
    return str(np.dtype(dtype).name)  # type: ignore[call-overload]


class Graph:
    """One graph being rewritten: its live nodes, an index from operator to nodes, and the opset it is written in."""

    def __init__(self, graph: gs.Graph, opset: int, names: set[str] | None = None, overridable: frozenset[str] = frozenset(), kinds: dict[Any, int] | None = None):
        """`names` are taken in the whole model; initializers called as in `overridable` are inputs, too: no constants.

        Graphs of one model number their `kinds` of nodes and constants together, for they share constants.
        """
        self.gs = graph
        self.opset = opset
        self.shuffled = False  # some node was put where it computes what nodes before it read
        self.nodes: list[Node] = []  # in the order in which they entered; some are dead
        self.counts: dict[str, int] = {}
        self.outputs = {id(t) for t in graph.outputs}
        self.names = {t.name for t in (*graph.inputs, *graph.outputs)} if names is None else names
        self._numbered: dict[str, int] = {}  # the last number given to a stem
        self._slots: dict[Node, dict[int, list[int]]] = {}  # of wide nodes: where they read a tensor
        self.overridable = overridable
        # Values an inner graph (If, Loop, Scan) reads from this one are used, though no node here lists them.
        self.captured: set[int] = set()
        # Integers that are computed, but the same for every input, by tensor: `Shape(x)[3] // 2` is 8.
        self.known: dict[int, np.ndarray] = {}
        # All integers that shapes determine, by tensor: the value of `Shape(x)[1]` is ["seq"]. `known` are those without names.
        self.symbolic: dict[int, list[Dim]] = {}
        self.functions: Mapping[str, onnx.FunctionProto] = {}  # that plugin nodes call
        self.kinds = {} if kinds is None else kinds
        self.bodies: dict[Any, Any] = {}  # subgraphs captured before, as functions, by what they are made of
        self.scalars: set[int] = set()  # those of them that have no dimensions
        for index, node in enumerate(graph.nodes):
            self._enter(node, float(index))
            if names is None:
                self.names.update(t.name for t in (*node.inputs, *node.outputs))
        for holder in (n for n in graph.nodes if n.holds_graphs):
            for inner in holder.subgraphs(recursive=True):
                self.captured.update(id(t) for n in inner.nodes for t in n.inputs)
                self.captured.update(id(t) for t in inner.outputs)
        self.needed = self.outputs | self.captured  # whatever nodes read them

    def _enter(self, node: Node, position: float) -> None:
        node.graph, node.position = self, position
        self.nodes.append(node)
        self.counts[node.canonical] = self.counts.get(node.canonical, 0) + 1

    def __iter__(self) -> Iterator[Node]:
        return iter(sorted([n for n in self.nodes if not n.dead], key=operator.attrgetter("position")))

    def release(self) -> None:
        """Forget everything: nothing asks any more, but closures that name one another still hold this."""
        for found in (self.nodes, self.known, self.symbolic, self.kinds, self.bodies, self.names, self._slots):
            found.clear()
        self.gs = gs.Graph()

    # --- questions ---------------------------------------------------------------------------------------------
    def producer(self, tensor: gs.Tensor) -> Node | None:
        """The node of this graph that computes `tensor`; None for inputs, constants and values of an outer graph."""
        for node in tensor.inputs:
            if node.graph is self:
                return node  # type: ignore[no-any-return]
        return None

    def consumers(self, tensor: gs.Tensor) -> list[Node]:
        users = tensor.outputs
        alive = [n for n in users if n.graph is self]
        if len(alive) * 2 < len(users):  # mostly dead: compact, so that the cost stays amortized
            users[:] = [n for n in users if not n.dead]
        return alive

    def is_read_beside(self, tensor: gs.Tensor, nodes: Container[Node]) -> bool:
        """Whether anything but `nodes` reads `tensor`."""
        for user in reversed(tensor.outputs):  # the newest first: of a value that thousands of replaced nodes read, these are alive
            if user.graph is self and user not in nodes:
                return True
        return id(tensor) in self.needed

    def is_used_outside(self, tensor: gs.Tensor, nodes: Container[Node]) -> str | None:
        """Who else reads `tensor`: a description of the first user not in `nodes`, or None."""
        if id(tensor) in self.outputs:
            return "it is an output of the graph"
        if id(tensor) in self.captured:
            return "an inner graph (If, Loop or Scan) reads it"
        user = next((u for u in reversed(tensor.outputs) if u.graph is self and u not in nodes), None)
        return None if user is None else f"{describe(user)} reads it too"

    def attribute(self, node: gs.Node, name: str) -> object:
        """The value of an attribute, or its default by the ONNX specification, or None."""
        if name in node.attrs:
            return node.attrs[name]
        lifted = node.domain == DOMAIN  # an operator of a newer ONNX, perhaps, with that one's defaults
        return _default_attribute(canonical(node), name, onnx.defs.onnx_opset_version() if lifted else self.opset)

    def constant(self, tensor: gs.Tensor, limit: int = SMALL) -> np.ndarray | None:
        """The value of a constant of at most `limit` elements: initializer, `Constant` node, or one moved by no-ops."""
        if id(tensor) in self.known:
            value = self.known[id(tensor)]
            if tensor.dtype is not None and not isinstance(tensor.dtype, int):
                value = value.astype(tensor.dtype)  # `Equal` of two sizes is a boolean
            return value.reshape(()) if id(tensor) in self.scalars else value
        for _ in range(4):
            if isinstance(tensor, gs.Constant):
                return None if tensor.name in self.overridable else small_values(tensor, limit)
            node = self.producer(tensor)
            if node is None or (node.domain or "") not in ("", "ai.onnx"):
                return None
            if node.op == "Constant":
                return _constant_node(node, limit)
            if node.op not in ("Identity", "Unsqueeze", "Squeeze"):
                return None
            tensor = node.inputs[0]
        return None

    def is_constant(self, tensor: gs.Tensor) -> bool:
        node = self.producer(tensor)
        if isinstance(tensor, gs.Constant):
            return tensor.name not in self.overridable
        return node is not None and node.op == "Constant"

    def is_weight(self, tensor: gs.Tensor) -> bool:
        """Whether `tensor` is a constant, or moved or cut out of constants alone: what a build step can fold."""
        if self.is_constant(tensor):
            return True
        node = self.producer(tensor)
        return node is not None and node.op in MOVES and all(self.is_weight(t) for t in node.inputs if not t.is_empty())

    # --- edits -------------------------------------------------------------------------------------------------
    def fresh(self, stem: str) -> str:
        """A name that nothing has yet: `stem`, or with the first number that is free."""
        name = stem
        if name in self.names:
            index = self._numbered.get(stem, 0) + 1
            while (name := f"{stem}_{index}") in self.names:
                index += 1
            self._numbered[stem] = index
        self.names.add(name)
        return name

    def add(self, node: Node, before: Node) -> None:
        """Enter a new node at the place of `before`; the order among equals is settled when the graph is sorted."""
        self._enter(node, before.position)

    def remove(self, node: Node) -> None:
        node.graph, node.dead = None, True
        self.counts[node.canonical] -= 1

    def discard(self, nodes: Iterable[Node]) -> None:
        """Remove new nodes of which nothing is to stay."""
        for node in nodes:
            self.remove(node)
            for tensor in node.inputs:
                _drop(tensor.outputs, node)
            node.inputs.clear()

    def remove_dead(self, candidates: list[Node]) -> None:
        """Remove those of `candidates`, and what only they used, that no longer reach an output."""
        needed = self.needed
        while candidates:  # of a match the first reads the others: once it is gone, they go at the first look
            read: list[gs.Tensor] = []
            for node in candidates:
                if node.graph is not self:
                    continue
                for tensor in node.outputs:
                    users = tensor.outputs
                    if id(tensor) in needed or (users and not users[-1].dead) or (len(users) > 1 and self.is_read_beside(tensor, ())):
                        break
                else:
                    self.remove(node)
                    read += node.inputs
            candidates = [p for t in read for p in t.inputs if p.graph is self and not (t.outputs and t.outputs[-1].graph is self)]

    def replace_uses(self, old: gs.Tensor, new: gs.Tensor) -> list[Node]:
        """Let every reader of `old` read `new`; returns the readers."""
        users = self.consumers(old)
        for user in users:
            user.rewired = True
            for index in self._reads_at(user, old, new):
                user.inputs[index] = new
                list.append(new.outputs, user)
        old.outputs[:] = [u for u in old.outputs if u.graph is not self]
        return users

    def _reads_at(self, user: Node, old: gs.Tensor, new: gs.Tensor) -> list[int]:
        """At which of its inputs `user` reads `old`, and from now on `new`."""
        if len(user.inputs) <= WIDE:
            return [i for i, t in enumerate(user.inputs) if t is old]
        slots = self._slots.get(user)
        if slots is None:
            slots = self._slots[user] = {}
            for i, tensor in enumerate(user.inputs):
                slots.setdefault(id(tensor), []).append(i)
        found = slots.pop(id(old), [])
        slots.setdefault(id(new), []).extend(found)
        return found

    def hand_over(self, tensor: gs.Tensor, old: Node, new: Node, result: gs.Tensor) -> None:
        """`new`, not `old`, computes `tensor` from now on: as its output `result`, which is no value of the graph any more."""
        slot = _place(old.outputs, tensor) if len(old.outputs) > 1 else 0
        spare = Variable(self.fresh(f"{tensor.name}_replaced"), tensor.dtype, tensor.shape) if len(old.outputs) > 1 else NOTHING
        tensor.inputs.clear()
        old.outputs[slot], old.rewired = spare, True
        if spare is not NOTHING:
            spare.inputs.append(old)
        new.outputs[_place(new.outputs, result) if len(new.outputs) > 1 else 0] = tensor
        list.append(tensor.inputs, new)
        result.inputs.clear()
        if result.outputs:
            self.replace_uses(result, tensor)

    def sort(self) -> None:
        """Write the live nodes back in an order in which every value is computed before it is read (stable)."""
        order = list(self)
        self.gs.nodes = order if self._is_sorted(order) else self._sorted(order)

    def _is_sorted(self, order: list[Node]) -> bool:
        """Whether each node stands after those that it reads from: where no rule moved work ahead, it does.

        Of a graph that is not `shuffled` only nodes that are new, or read something new, can stand elsewhere.
        """
        for place, node in enumerate(order):
            node.position = float(place)
        for node in order if self.shuffled else [n for n in order if n.source is None or n.rewired]:
            for tensor in reads(node) if node.holds_graphs else node.inputs:
                for producer in tensor.inputs:
                    if producer.position >= node.position and producer.graph is self:
                        return False
        return True

    def _sorted(self, order: list[Node]) -> list[Node]:
        waiting: list[int] = []
        readers: dict[int, list[int]] = {}
        for i, node in enumerate(order):
            sources = {int(p.position) for t in reads(node) if (p := self.producer(t)) is not None}
            waiting.append(len(sources))
            for source in sources:
                readers.setdefault(source, []).append(i)
        ready = [i for i, count in enumerate(waiting) if count == 0]
        found = []
        while ready:
            i = heapq.heappop(ready)
            found.append(order[i])
            for j in readers.get(i, ()):
                waiting[j] -= 1
                if waiting[j] == 0:
                    heapq.heappush(ready, j)
        if len(found) < len(order):
            stuck = next(n for i, n in enumerate(order) if waiting[i])
            raise RewriteError(f"the rewritten graph has a cycle at {describe(stuck)}: a replacement reads what is computed from it; disable the rule that made it")
        return found


def _drop(nodes: list[Node], node: Node) -> None:
    """Take `node` out once; new ones stand last."""
    place = len(nodes) - 1
    while nodes[place] is not node:
        place -= 1
    del nodes[place]


def _place(tensors: list[gs.Tensor], tensor: gs.Tensor) -> int:
    """Where `tensor` itself stands; one of the same name is equal to it."""
    place = 0
    while tensors[place] is not tensor:
        place += 1
    return place


def reads(node: Node) -> list[gs.Tensor]:
    """All values a node reads, those its inner graphs take from outside included."""
    return [*node.inputs, *_inner_reads(node)] if node.holds_graphs else node.inputs


def _inner_reads(node: Node) -> Iterator[gs.Tensor]:
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            inner = {id(t) for n in value.nodes for t in n.outputs} | {id(t) for t in value.inputs}
            yield from (t for n in value.nodes for t in reads(n) if id(t) not in inner)
            yield from (t for t in value.outputs if id(t) not in inner)


def describe(node: gs.Node) -> str:
    name = node.name or (node.outputs[0].name if node.outputs else "?")
    return f"{node.canonical} '{name}'"


def small_values(tensor: Constant, limit: int = SMALL) -> np.ndarray | None:
    """The values of a constant of at most `limit` elements that is stored in the model file itself, else None."""
    if tensor.array is None:
        proto = getattr(tensor._values, "tensor", None)
        if not isinstance(proto, onnx.TensorProto) or proto.data_location == onnx.TensorProto.EXTERNAL:
            return None
        if math.prod(tensor.shape) > limit or proto.data_type == onnx.TensorProto.STRING:
            return None
        tensor.array = np.asarray(onnx.numpy_helper.to_array(proto))
    return tensor.array if tensor.array.size <= limit else None


def _constant_node(node: gs.Node, limit: int) -> np.ndarray | None:
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return small_values(value, limit)
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64)):
        if key in node.attrs:
            return np.asarray(node.attrs[key], dtype)
    return None
