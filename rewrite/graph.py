"""Questions asked of an onnx-graphsurgeon graph, and the edits rules make to it.

A `Graph` wraps one `gs.Graph` (the main graph or the body of an If, Loop or Scan). Nodes are removed lazily:
a dead node leaves `live` at once, while the consumer lists of its inputs are filtered when they are read, so that
an edit never scans the consumers of a constant that ten thousand nodes share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError

DOMAIN = "rewrite"
SMALL = 4096  # elements: a constant up to this size may be read while matching and written into a function body

MOVES = {"Transpose", "Split", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Concat", "Gather"}

Dim = int | str | None


def canonical(node: gs.Node) -> str:
    """The operator's name as patterns write it: `Gelu` for ONNX's and for ours, `domain::Op` for others."""
    domain, op = node.domain, node.op  # asked some fifty times for each node of a graph
    if not domain or domain == "ai.onnx":
        return op  # type: ignore[no-any-return]
    return op.split("_", 1)[0] if domain == DOMAIN else f"{domain}::{op}"


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


def dtype_name(dtype: object) -> str:
    if isinstance(dtype, int):  # a type NumPy lacks, by its ONNX number
        return str(onnx.TensorProto.DataType.Name(dtype)).lower()
    return str(np.dtype(dtype).name)  # type: ignore[call-overload]


class Graph:
    """One graph being rewritten: its live nodes, an index from operator to nodes, and the opset it is written in."""

    def __init__(self, graph: gs.Graph, opset: int, names: set[str] | None = None, overridable: frozenset[str] = frozenset()):
        """`names` are taken in the whole model; initializers called as in `overridable` are inputs, too: no constants."""
        self.gs = graph
        self.opset = opset
        self.shuffled = False  # some node was put where it computes what nodes before it read
        self.live: dict[int, gs.Node] = {}
        self.position: dict[int, float] = {}
        self.counts: dict[str, int] = {}
        self.outputs = {id(t) for t in graph.outputs}
        self.names = set() if names is None else names
        self.names.update(t.name for t in (*graph.inputs, *graph.outputs))
        self.overridable = overridable
        # Values an inner graph (If, Loop, Scan) reads from this one are used, though no node here lists them.
        self.captured: set[int] = set()
        # Integers that are computed, but the same for every input, by tensor: `Shape(x)[3] // 2` is 8.
        self.known: dict[int, np.ndarray] = {}
        # All integers that shapes determine, by tensor: the value of `Shape(x)[1]` is ["seq"]. `known` are those without names.
        self.symbolic: dict[int, list[Dim]] = {}
        self.functions: Mapping[str, onnx.FunctionProto] = {}  # that plugin nodes call
        self.bodies: dict[Any, Any] = {}  # subgraphs captured before, as functions, by what they are made of
        self.scalars: set[int] = set()  # those of them that have no dimensions
        for index, node in enumerate(graph.nodes):
            self._enter(node, float(index))
            self.names.update(t.name for t in (*node.inputs, *node.outputs))
        for inner in graph.subgraphs(recursive=True):
            self.captured.update(id(t) for n in inner.nodes for t in n.inputs)
            self.captured.update(id(t) for t in inner.outputs)

    def _enter(self, node: gs.Node, position: float) -> None:
        self.live[id(node)] = node
        self.position[id(node)] = position
        op = canonical(node)
        self.counts[op] = self.counts.get(op, 0) + 1

    def __iter__(self) -> Iterator[gs.Node]:
        return iter(sorted(self.live.values(), key=lambda n: self.position[id(n)]))

    def release(self) -> None:
        """Forget everything: nothing asks any more, but closures that name one another still hold this."""
        for found in (self.live, self.position, self.known, self.symbolic, self.bodies, self.names):
            found.clear()
        self.gs = gs.Graph()

    # --- questions ---------------------------------------------------------------------------------------------
    def producer(self, tensor: gs.Tensor) -> gs.Node | None:
        """The node of this graph that computes `tensor`; None for inputs, constants and values of an outer graph."""
        for node in tensor.inputs:
            if id(node) in self.live:
                return node
        return None

    def consumers(self, tensor: gs.Tensor) -> list[gs.Node]:
        users = tensor.outputs
        alive = [n for n in users if id(n) in self.live]
        if len(alive) * 2 < len(users):  # mostly dead: compact, so that the cost stays amortized
            outer = [n for n in users if getattr(n, "_rewrite_dead", False) is False]
            list.__setitem__(users, slice(None), outer)
        return alive

    def is_used_outside(self, tensor: gs.Tensor, nodes: set[int]) -> str | None:
        """Who else reads `tensor`: a description of the first user not in `nodes`, or None."""
        if id(tensor) in self.outputs:
            return "it is an output of the graph"
        if id(tensor) in self.captured:
            return "an inner graph (If, Loop or Scan) reads it"
        for user in reversed(tensor.outputs):  # the newest first: of a value that thousands of replaced nodes read, these are alive
            if id(user) in self.live and id(user) not in nodes:
                return f"{describe(user)} reads it too"
        return None

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
        name, index = stem, 0
        while name in self.names:
            index += 1
            name = f"{stem}_{index}"
        self.names.add(name)
        return name

    def add(self, node: gs.Node, before: gs.Node) -> None:
        """Enter a new node at the place of `before`; the order among equals is settled when the graph is sorted."""
        self._enter(node, self.position[id(before)])

    def remove(self, node: gs.Node) -> None:
        del self.live[id(node)]
        node._rewrite_dead = True
        self.counts[canonical(node)] -= 1

    def remove_dead(self, candidates: Iterable[gs.Node]) -> None:
        """Remove those of `candidates`, and what only they used, that no longer reach an output."""
        stack = [*candidates][::-1]  # of a match the first reads the others: once it is gone, they go at the first look
        while stack:
            node = stack.pop()
            if id(node) not in self.live or any(self._needed(t) for t in node.outputs):
                continue
            self.remove(node)
            stack.extend(p for t in node.inputs if (p := self.producer(t)) is not None)

    def _needed(self, tensor: gs.Tensor) -> bool:
        if self.producer(tensor) is None:
            return False
        return self.is_used_outside(tensor, set()) is not None

    def replace_uses(self, old: gs.Tensor, new: gs.Tensor) -> list[gs.Node]:
        """Let every reader of `old` read `new`; returns the readers."""
        users = self.consumers(old)
        for user in users:
            for index, tensor in enumerate(user.inputs):
                if tensor is old:
                    list.__setitem__(user.inputs, index, new)
                    list.append(new.outputs, user)
        moved = {id(u) for u in users}
        list.__setitem__(old.outputs, slice(None), [u for u in old.outputs if id(u) not in moved])
        return users

    def sort(self) -> None:
        """Write the live nodes back in an order in which every value is computed before it is read (stable)."""
        order = list(self)
        waiting: dict[int, int] = {}
        readers: dict[int, list[int]] = {}
        index = {id(n): i for i, n in enumerate(order)}
        for i, node in enumerate(order):
            sources = {index[id(p)] for t in reads(node) if (p := self.producer(t)) is not None}
            waiting[i] = len(sources)
            for source in sources:
                readers.setdefault(source, []).append(i)
        import heapq

        ready = [i for i, count in waiting.items() if count == 0]
        heapq.heapify(ready)
        sorted_nodes = []
        while ready:
            i = heapq.heappop(ready)
            sorted_nodes.append(order[i])
            for j in readers.get(i, ()):
                waiting[j] -= 1
                if waiting[j] == 0:
                    heapq.heappush(ready, j)
        if len(sorted_nodes) < len(order):
            stuck = next(n for i, n in enumerate(order) if waiting[i])
            raise RewriteError(f"the rewritten graph has a cycle at {describe(stuck)}: a replacement reads what is computed from it; disable the rule that made it")
        self.gs.nodes = sorted_nodes


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """All values a node reads, those its inner graphs take from outside included."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            inner = {id(t) for n in value.nodes for t in n.outputs} | {id(t) for t in value.inputs}
            yield from (t for n in value.nodes for t in reads(n) if id(t) not in inner)
            yield from (t for t in value.outputs if id(t) not in inner)


def describe(node: gs.Node) -> str:
    name = node.name or (node.outputs[0].name if node.outputs else "?")
    return f"{canonical(node)} '{name}'"


def small_values(tensor: gs.Constant, limit: int = SMALL) -> np.ndarray | None:
    """The values of a constant of at most `limit` elements that is stored in the model file itself, else None."""
    lazy = tensor._values
    proto = getattr(lazy, "tensor", None)
    if isinstance(proto, onnx.TensorProto):
        external = proto.data_location == onnx.TensorProto.EXTERNAL
        if external or math.prod(proto.dims) > limit or proto.data_type == onnx.TensorProto.STRING:
            return None
        cached = getattr(tensor, "_rewrite_values", None)
        if cached is None:
            cached = onnx.numpy_helper.to_array(proto)
            tensor._rewrite_values = cached
        return np.asarray(cached)
    if isinstance(lazy, np.ndarray) and lazy.size <= limit:
        return lazy
    return None


def _constant_node(node: gs.Node, limit: int) -> np.ndarray | None:
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return small_values(value, limit)
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64)):
        if key in node.attrs:
            return np.asarray(node.attrs[key], dtype)
    return None
