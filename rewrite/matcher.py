"""Matching one pattern at one node, with backtracking over operand orders, bracketings and alternatives.

The matcher walks from the node that produces the pattern's (first) output towards its inputs. It looks through nodes
that change nothing (see `look_through`).
A `Trace` given to it records how far the best attempt came and why it stopped there; that is what `explain` prints.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from rewrite import pattern as P
from rewrite.graph import Dim, Graph, canonical, describe
from rewrite.graph import dtype_name as dtype_name
from rewrite.noops import look_through
from rewrite.outlook import may_be

# Never computed twice: an interior value of a match that others read keeps its node alive, and these cost too much.
HEAVY = {"MatMul", "Gemm", "Conv", "Softmax", "Attention", "Einsum", "ConvTranspose", "LSTM", "GRU", "FusedAttention", "MatMulAct", "GatedMatMulAct"}
SHAPE_ARITHMETIC = {"Shape", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Cast", "Add", "Sub", "Mul", "Div"}

Operand = tuple[gs.Tensor, str]


class BoundValue:
    """A graph value bound to a pattern variable, as `check` sees it."""

    def __init__(self, graph: Graph, tensor: gs.Tensor):
        self.graph, self.tensor = graph, tensor

    @property
    def name(self) -> str:
        return str(self.tensor.name)

    @property
    def shape(self) -> list[Dim] | None:
        return None if self.tensor.shape is None else list(self.tensor.shape)

    @property
    def rank(self) -> int | None:
        return None if self.tensor.shape is None else len(self.tensor.shape)

    @property
    def dtype(self) -> str | None:
        return None if self.tensor.dtype is None else dtype_name(self.tensor.dtype)

    @property
    def is_constant(self) -> bool:
        return self.graph.is_constant(self.tensor)

    @property
    def is_weight(self) -> bool:
        """Whether it is a constant, or computed from constants alone (a tied weight, transposed)."""
        return self.graph.is_weight(self.tensor)

    @property
    def value(self) -> np.ndarray | None:
        """The value of a small constant, else None."""
        return self.graph.constant(self.tensor)

    def __repr__(self) -> str:
        return f"{self.name}: {self.dtype}{self.shape}"


@dataclass
class Match:
    """Where a pattern fits: variables bound to graph values, and the nodes they are computed by."""

    graph: Graph
    outputs: list[gs.Tensor]
    bindings: dict[str, Any]
    nodes: list[gs.Node]
    # Of rules that find their matches themselves. Where named dimensions are read, by input of the plugin and axis:
    # the body then reads all its sizes there. Shapes for the check of the site, by tensor, where they differ from the
    # graph's. What was found, in a few words, for the report.
    dims: dict[str, tuple[str, int]] | None = None
    shapes: dict[int, tuple[Dim, ...]] = field(default_factory=dict)
    note: str = ""


@dataclass
class Trace:
    """How far the best attempt of a rule came at one node: operators matched, and what stopped it there."""

    depth: float = -1
    reason: str = ""
    node: str = ""
    part: str = ""
    bound: dict[str, str] = field(default_factory=dict)
    covered: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # operators any of which would have led on, at the same node

    def unexpected(self, depth: int, op: str, node: str, found: str, bound: dict[str, str], covered: list[str]) -> None:
        """Another operator than the pattern has stands there."""
        if depth == self.depth and self.expected and node == self.node:
            if op not in self.expected:
                self.expected.append(op)
        elif depth > self.depth:
            self.stop(depth, op, node, "", bound, covered)
            self.expected = [op]
        else:
            return
        self.reason = f"expected {' or '.join(self.expected)}, found {found}"

    def stop(self, depth: float, part: str, node: str, reason: str, bound: dict[str, str], covered: list[str]) -> None:
        if depth > self.depth:
            self.depth, self.part, self.node, self.reason, self.bound, self.covered, self.expected = depth, part, node, reason, bound, covered, []


    def copy(self) -> Trace:
        return replace(self, expected=list(self.expected))

    def restore(self, noted: Trace) -> None:
        self.__dict__.update(noted.copy().__dict__)


class Matcher:
    """One attempt to match `outputs` (the traced pattern) in `graph`."""

    def __init__(self, graph: Graph, outputs: tuple[P.Value, ...], trace: Trace | None = None):
        self.graph, self.pattern, self.trace = graph, outputs, trace
        self.bindings: dict[str, Any] = {}
        self.matched: dict[int, gs.Node] = {}  # id(pattern node) -> graph node
        self.nodes: list[gs.Node] = []  # every node covered, no-ops looked through included
        self.depth = 0

    def at(self, node: gs.Node) -> Iterator[Match]:
        """All ways in which the pattern matches with its first output computed by `node`."""
        first = self.pattern[0]
        index = first.index if isinstance(first, P.Output) else 0
        if index >= len(node.outputs):
            return
        for _ in self._value(first, node.outputs[index]):
            yield from self._others(1, [node.outputs[index]])

    def _others(self, position: int, found: list[gs.Tensor]) -> Iterator[Match]:
        if position == len(self.pattern):
            yield Match(self.graph, list(found), dict(self.bindings), list({id(n): n for n in self.nodes}.values()))
            return
        value = self.pattern[position]
        op = value.node if isinstance(value, P.Output) else value
        index = value.index if isinstance(value, P.Output) else 0
        known = self.matched.get(id(op))
        for node in [known] if known is not None else self._siblings(value):
            if index < len(node.outputs):
                for _ in self._value(value, node.outputs[index]):
                    yield from self._others(position + 1, [*found, node.outputs[index]])

    def _siblings(self, value: P.Value) -> list[gs.Node]:
        """Nodes that may produce a further output of the pattern: reached upwards from what is bound already."""
        if isinstance(value, P.Output):
            return self._siblings(value.node)
        if isinstance(value, P.Op) and id(value) in self.matched:
            return [self.matched[id(value)]]
        found: dict[int, gs.Node] = {}
        for inner in P.below(value):
            if isinstance(value, P.Op):
                found.update({id(n): n for t in self._reached(inner) for n in self._readers(t, value)})
            else:
                found.update({id(n): n for n in self._siblings(inner)})
            if found and isinstance(value, P.Op):
                break
        return list(found.values())

    def _reached(self, value: P.Value) -> list[gs.Tensor]:
        if isinstance(value, P.Var):
            bound = self.bindings.get(value.name)
            return [bound] if isinstance(bound, gs.Tensor) else []
        index = value.index if isinstance(value, P.Output) else 0
        tensors = [n.outputs[index] for n in self._siblings(value) if index < len(n.outputs)]
        if isinstance(value, P.AnyOf):
            tensors += [t for a in value.alternatives if isinstance(a, P.Var) for t in self._reached(a)]
        return tensors

    def _readers(self, tensor: gs.Tensor, op: P.Op) -> list[gs.Node]:
        """Nodes of an operator that `op` can be, which read `tensor`, also through no-ops and as one of several factors."""
        found: list[gs.Node] = []
        front, seen = [tensor], {id(tensor)}
        while front:
            users = [u for t in front for u in self.graph.consumers(t)]
            front = []
            for user in users:
                if canonical(user) in op.ops:
                    found.append(user)
                passes = canonical(user) in op.ops and op.name in P.ASSOCIATIVE
                for output in user.outputs:
                    if id(output) not in seen and (passes or look_through(self.graph, user, output) is not None):
                        seen.add(id(output))
                        front.append(output)
        return found

    # --- values ------------------------------------------------------------------------------------------------
    def _value(self, value: P.Value, tensor: gs.Tensor) -> Iterator[None]:
        return MATCHES[type(value)](self, value, tensor)

    def _variable(self, value: P.Var, tensor: gs.Tensor) -> Iterator[None]:
        return self._bind(value.name, tensor, tensor is self.bindings.get(value.name, tensor))

    def _fixed(self, value: P.Value, tensor: gs.Tensor) -> Iterator[None]:
        return self._constant(value, self.graph.constant(tensor), tensor)

    def _any_of(self, value: P.AnyOf, tensor: gs.Tensor) -> Iterator[None]:
        if self.trace is not None:
            yield from self._any_traced(value, tensor, self.trace)
            return
        for alternative in value.alternatives:
            if may_be(self.graph, alternative, tensor):
                yield from self._value(alternative, tensor)

    def _tagged(self, value: P.Tag, tensor: gs.Tensor) -> Iterator[None]:
        for _ in self._bind(value.name, value.label, self.bindings.get(value.name, value.label) == value.label):
            yield from self._value(value.value, tensor)

    def _missing(self, value: P.Missing, tensor: gs.Tensor) -> Iterator[None]:
        return iter((None,) if tensor.is_empty() else ())

    def _output(self, value: P.Output, tensor: gs.Tensor) -> Iterator[None]:
        return self._produced(value.node, tensor, value.index)

    def _operator(self, value: P.Op, tensor: gs.Tensor) -> Iterator[None]:
        return self._produced(value, tensor, 0)

    def _nothing(self, value: P.Value, tensor: gs.Tensor) -> Iterator[None]:
        return iter(())

    def _of_type(self, value: P.Typed, tensor: gs.Tensor) -> Iterator[None]:
        for _ in self._typed(value, tensor):
            yield from self._value(value.value, tensor)

    def _any_traced(self, value: P.AnyOf, tensor: gs.Tensor, trace: Trace) -> Iterator[None]:
        """Where one alternative fits, that others do not is no reason why the whole does not: it is not noted."""
        noted, fitted = trace.copy(), False
        for alternative in value.alternatives:
            for _ in self._value(alternative, tensor):
                trace.restore(noted)
                fitted = True
                yield
                noted = trace.copy()
        if fitted:
            trace.restore(noted)

    def _typed(self, value: P.Typed, tensor: gs.Tensor) -> Iterator[None]:
        """`tensor` is of the dtype and shape asked for; names of dimensions are bound, the same everywhere."""
        what, shape = P.text(value.value), tensor.shape
        dtype = None if tensor.dtype is None else dtype_name(tensor.dtype)
        if value.dtypes and dtype not in value.dtypes:
            return self._stop(what, None, f"'{tensor.name}' is {dtype or 'of unknown type'}, not {' or '.join(value.dtypes)}", 0.5)
        if value.constant and not self.graph.is_constant(tensor):
            return self._stop(what, None, f"'{tensor.name}' is computed, not a constant", 0.5)
        if value.dims is None:
            yield
            return
        wanted, found = list(value.dims), None if shape is None else list(shape)
        if ... in wanted and found is not None:
            at = wanted.index(...)
            if len(found) >= len(wanted) - 1:
                wanted[at : at + 1] = [None] * (len(found) - len(wanted) + 1)
        if found is None or len(found) != len(wanted):
            return self._stop(what, None, f"'{tensor.name}' has shape {found or 'unknown'}, not {P.dims_text(value.dims)}", 0.5)
        fresh: dict[str, Dim] = {}
        for want, dim in zip(wanted, found, strict=True):
            known = fresh.get(want, self.bindings.get(want, dim)) if isinstance(want, str) else dim if want is None else want
            if (dim is None and want is not None) or known != dim:
                return self._stop(what, None, f"'{tensor.name}' has shape {found}, not {P.dims_text(value.dims)}{f' with {want} = {known}' if isinstance(want, str) else ''}", 0.5)
            if isinstance(want, str) and want not in self.bindings:
                fresh[want] = dim
        self.bindings.update(fresh)
        yield
        for name in fresh:
            del self.bindings[name]

    def _bind(self, name: str, bound: Any, fits: bool) -> Iterator[None]:
        if not fits:
            other = self.bindings[name]
            self._stop(f"variable {name}", None, f"'{getattr(bound, 'name', bound)}' is not '{getattr(other, 'name', other)}', which {name} stands for")
            return
        fresh = name not in self.bindings
        if fresh:
            self.bindings[name] = bound
        yield
        if fresh:
            del self.bindings[name]

    def _constant(self, value: P.Value, array: np.ndarray | None, tensor: gs.Tensor) -> Iterator[None]:
        if array is None:
            self._stop(P.text(value), self.graph.producer(tensor), f"'{tensor.name}' is not a small constant")
        elif isinstance(value, P.Ints):
            found = [int(i) for i in array.reshape(-1)] if array.dtype.kind in "iu" else None
            if found is None or (value.value is not None and tuple(found) != value.value):
                self._stop(P.text(value), None, f"'{tensor.name}' is {found}, not {list(value.value or ()) or 'a list of integers'}", 0.5)
            elif value.name is None:
                yield
            else:
                yield from self._bind(value.name, found, self.bindings.get(value.name, found) == found)
        elif array.size != 1 or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"):
            self._stop(P.text(value), None, f"'{tensor.name}' has {array.size} elements, not one")
        else:
            yield from self._number(value, float(array.reshape(())), tensor.name)

    def _number(self, value: P.Value, number: float, name: str) -> Iterator[None]:
        if isinstance(value, P.Scalar):
            yield from self._bind(value.name, number, self.bindings.get(value.name, number) == number)
        elif isinstance(value, P.Const):
            if number == value.value or abs(number - value.value) <= value.tolerance * abs(value.value) < math.inf:
                yield
            else:
                self._stop(P.text(value), None, f"'{name}' is {number:.6g}, not {value.value:.6g}", 0.5)

    # --- nodes -------------------------------------------------------------------------------------------------
    def _produced(self, op: P.Op, tensor: gs.Tensor, index: int) -> Iterator[None]:
        """`tensor` is output `index` of a node that matches `op`, perhaps behind nodes that change nothing."""
        node = self.graph.producer(tensor)
        if node is None:
            what = f"the constant '{tensor.name}'" if isinstance(tensor, gs.Constant) else f"'{tensor.name}', an input of the graph"
            return self._unexpected(op.name, None, what)
        known, produces = self.matched.get(id(op)), index < len(node.outputs) and node.outputs[index] is tensor
        if known is node:
            if produces:
                yield
            return
        if known is None and canonical(node) in op.ops and produces:
            if op.outputs > 1 and sum(1 for t in node.outputs if t.name) != op.outputs:
                return self._stop(op.name, node, f"it has {len(node.outputs)} outputs, the pattern {op.outputs}")
            yield from self._node(op, node)
            return
        through = look_through(self.graph, node, tensor)
        if through is None:
            return self._unexpected(op.name, node, _found(node))
        source, nodes = through
        self.nodes.extend(nodes)
        yield from self._produced(op, source, index)
        del self.nodes[len(self.nodes) - len(nodes) :]

    def _node(self, op: P.Op, node: gs.Node) -> Iterator[None]:
        captured: dict[str, Any] = {}
        for name, wanted in op.attributes.items():
            actual = self.graph.attribute(node, name)
            if isinstance(wanted, P.Attr):
                known = captured.get(wanted.name, self.bindings.get(wanted.name, actual))
                if not same_attribute(actual, known):
                    return self._stop(op.name, node, f"attribute {name} is {actual!r}, but {wanted.name} stands for {known!r} already", 0.5)
                captured[wanted.name] = actual
            elif not (wanted(actual) if callable(wanted) else same_attribute(actual, wanted)):
                asked = str(inspect.getdoc(wanted) or getattr(wanted, "__name__", "another")).rstrip(".") if callable(wanted) else repr(wanted)
                return self._stop(op.name, node, f"attribute {name} is {actual!r}, wanted: {asked}", 0.5)
        fresh = {k: v for k, v in captured.items() if k not in self.bindings}
        self.bindings.update(fresh)
        self.matched[id(op)] = node
        self.nodes.append(node)
        self.depth += 1
        yield from self._operands(op, node)
        self.depth -= 1
        self.nodes.pop()
        del self.matched[id(op)]
        for name in fresh:
            del self.bindings[name]

    def _operands(self, op: P.Op, node: gs.Node) -> Iterator[None]:
        if op.name in P.ASSOCIATIVE:
            for values in op.operand_lists:
                for operands, covered in self._decompositions(op, len(values), node):
                    self.nodes.extend(covered)
                    yield from self._assign(_order(values, self.trace is not None), operands)
                    del self.nodes[len(self.nodes) - len(covered) :]
            return
        if op.name in P.COMMUTATIVE and len(op.inputs) == len(node.inputs) == 2:
            yield from self._assign(_order(op.inputs, self.trace is not None), [(t, "") for t in node.inputs])
            return
        yield from self._in_order(op, node, 0)

    def _in_order(self, op: P.Op, node: gs.Node, index: int) -> Iterator[None]:
        if index == len(op.inputs):
            extra = [t for t in node.inputs[index:] if not t.is_empty()]
            if extra:
                return self._stop(op.name, node, f"it has {len(node.inputs)} inputs, the pattern has {index}")
            yield
            return
        value = op.inputs[index]
        if isinstance(value, P.Rest):
            yield from self._bind(value.name, list(node.inputs[index:]), True)
            return
        tensor = node.inputs[index] if index < len(node.inputs) else gs.Variable.empty()
        if tensor.is_empty() and not _may_be_missing(value):
            return self._stop(op.name, node, f"input {index} is absent")
        if type(value) is P.Var:  # most operands; a generator for each would cost more than the rest
            known = self.bindings.get(value.name)
            if known is tensor:
                yield from self._in_order(op, node, index + 1)
                return
            if known is None and value.name not in self.bindings:
                self.bindings[value.name] = tensor
                yield from self._in_order(op, node, index + 1)
                del self.bindings[value.name]
                return
        for _ in self._value(value, tensor):
            yield from self._in_order(op, node, index + 1)

    # --- commutative and associative operators -------------------------------------------------------------------
    def _decompositions(self, op: P.Op, count: int, node: gs.Node) -> Iterator[tuple[list[Operand], list[gs.Node]]]:
        """The operand lists of length `count` that `node` has under re-association.

        An operand is (value, how): how is "Div" or "Sub" for a constant that the graph divides by or subtracts.
        """
        start = self._split(op, node)
        if start is None:
            return
        stack: list[tuple[list[Operand], list[gs.Node]]] = [(start, [])]
        seen: set[tuple[int, ...]] = set()
        while stack:
            operands, covered = stack.pop()
            if len(operands) == count:
                key = tuple(sorted(id(t) for t, _ in operands))
                if key not in seen:
                    seen.add(key)
                    yield operands, covered
                continue
            for i, (tensor, how) in enumerate(operands):
                inner, between = (None, []) if how else self._inner(op, tensor)
                if inner is None:
                    continue
                parts = self._split(op, inner)
                if parts is not None:
                    stack.append(([*operands[:i], *parts, *operands[i + 1 :]], [*covered, *between, inner]))

    def _inner(self, op: P.Op, tensor: gs.Tensor) -> tuple[gs.Node | None, list[gs.Node]]:
        """The node of the same operator that computes `tensor`, and the no-ops in between."""
        between: list[gs.Node] = []
        node = self.graph.producer(tensor)
        while node is not None and canonical(node) not in op.ops:
            through = look_through(self.graph, node, tensor)
            if through is None:
                return None, []
            tensor, passed = through
            between += passed
            node = self.graph.producer(tensor)
        return node, between

    def _split(self, op: P.Op, node: gs.Node) -> list[Operand] | None:
        if canonical(node) == op.name:
            return [(t, "") for t in node.inputs]
        if self.graph.constant(node.inputs[1]) is None:  # x / y and x - y only with constant y
            self._stop(op.name, node, f"expected {op.name}, found {canonical(node)} by a value that is not a small constant")
            return None
        return [(node.inputs[0], ""), (node.inputs[1], canonical(node))]

    def _assign(self, values: tuple[P.Value, ...], operands: list[Operand]) -> Iterator[None]:
        if not values:
            yield
            return
        value, others = values[0], values[1:]
        tried: set[int] = set()
        for i, (tensor, how) in enumerate(operands):
            if id(tensor) in tried:
                continue
            tried.add(id(tensor))
            attempt = self._inverse(value, tensor, how) if how else self._value(value, tensor)
            for _ in attempt:
                yield from self._assign(others, operands[:i] + operands[i + 1 :])

    def _inverse(self, value: P.Value, tensor: gs.Tensor, how: str) -> Iterator[None]:
        """A divisor (or subtrahend) met where the pattern multiplies (or adds)."""
        array = self.graph.constant(tensor)
        if array is None or array.size != 1 or array.dtype.kind != "f" or not isinstance(value, (P.Const, P.Scalar)):
            return
        number = float(array.reshape(()))
        if how == "Div" and number != 0:
            yield from self._number(value, 1.0 / number, tensor.name)
        elif how == "Sub":
            yield from self._number(value, -number, tensor.name)

    def _stop(self, part: str, node: gs.Node | None, reason: str, more: float = 0.0) -> None:
        """Note why this attempt ends here; `more` than the operators matched so far speaks for it."""
        if self.trace is not None and self.depth + more > self.trace.depth:
            self.trace.stop(self.depth + more, part, describe(node) if node is not None else "", reason, *self._state())

    def _unexpected(self, op: str, node: gs.Node | None, found: str) -> None:
        if self.trace is not None and self.depth >= self.trace.depth:
            self.trace.unexpected(self.depth, op, describe(node) if node is not None else "", found, *self._state())

    def _state(self) -> tuple[dict[str, str], list[str]]:
        return {k: getattr(v, "name", str(v)) for k, v in self.bindings.items()}, [describe(n) for n in self.nodes]


MATCHES: dict[type[P.Value], Callable[[Matcher, Any, gs.Tensor], Iterator[None]]] = {
    P.Var: Matcher._variable, P.Const: Matcher._fixed, P.Scalar: Matcher._fixed, P.Ints: Matcher._fixed, P.AnyOf: Matcher._any_of, P.Tag: Matcher._tagged,
    P.Typed: Matcher._of_type, P.Missing: Matcher._missing, P.Output: Matcher._output, P.Op: Matcher._operator, P.Rest: Matcher._nothing,
}  # fmt: skip


def _found(node: gs.Node) -> str:
    """The operator; of a Cast also the types, which are what it stands in the way with."""
    types = [t.dtype for t in (node.inputs[0], node.outputs[0])] if canonical(node) == "Cast" else [None]
    return canonical(node) if None in types else f"Cast of {' to '.join(map(dtype_name, types))}"


def _may_be_missing(value: P.Value) -> bool:
    if isinstance(value, P.Typed):
        return False
    if isinstance(value, P.AnyOf):
        return any(_may_be_missing(a) for a in value.alternatives)
    return isinstance(value, P.Missing)


def same_attribute(actual: object, wanted: object) -> bool:
    """Attributes are stored in single precision, and lists of any kind are lists."""
    if isinstance(actual, (list, tuple)) and isinstance(wanted, (list, tuple)):
        return len(actual) == len(wanted) and all(map(same_attribute, actual, wanted))
    if isinstance(actual, float) and isinstance(wanted, (int, float)):
        return abs(actual - wanted) <= 1e-6 * abs(wanted)
    return type(actual) is type(wanted) and bool(actual == wanted)


@cache
def _order(values: tuple[P.Value, ...], traced: bool) -> tuple[P.Value, ...]:
    """What fails soonest first; when tracing, what tells most: a wrong number is seen when all else is there."""
    return tuple(sorted(values, key=lambda v: _rank(v, traced)))


def _rank(value: P.Value, traced: bool) -> int:
    if isinstance(value, (P.Tag, P.Typed)):
        return _rank(value.value, traced)
    if isinstance(value, P.Const):
        return 3 if traced else 0
    if isinstance(value, (P.Op, P.Output)):
        return 1
    return 2 if isinstance(value, P.AnyOf) else 3 if isinstance(value, P.Scalar) else 4


def interior_use(match: Match) -> str | None:
    """Why a match may not be fused although it fits: a value inside that took costly work is read by others, too."""
    graph, inside = match.graph, {id(n) for n in match.nodes}
    outputs = {id(t) for t in match.outputs}
    costly: dict[int, bool] = {}
    for node in match.nodes:
        for tensor in node.outputs:
            if id(tensor) in outputs or not _is_costly(graph, node, inside, costly):
                continue
            serving = {id(u) for u in graph.consumers(tensor) if id(u) not in inside and _serves(graph, u, inside)}
            use = graph.is_used_outside(tensor, inside | serving)
            if use is not None:
                return f"the value '{tensor.name}' inside the match is needed elsewhere: {use}"
    return None


def _is_costly(graph: Graph, node: gs.Node, inside: set[int], known: dict[int, bool]) -> bool:
    """Whether `node`, or one inside the match that it reads from, is heavy work."""
    if id(node) not in known:
        known[id(node)] = canonical(node) in HEAVY
        known[id(node)] |= any(id(p) in inside and _is_costly(graph, p, inside, known) for t in node.inputs if (p := graph.producer(t)) is not None)
    return known[id(node)]


def _serves(graph: Graph, node: gs.Node, inside: set[int], depth: int = 0) -> bool:
    """Whether shape arithmetic that starts at `node` (`Shape(product)`, to cut the product in two) ends inside the match."""
    if canonical(node) not in (SHAPE_ARITHMETIC if depth else {"Shape"}) or depth > len(SHAPE_ARITHMETIC):
        return False
    if any(id(t) in graph.outputs or id(t) in graph.captured for t in node.outputs):
        return False
    return all(id(u) in inside or _serves(graph, u, inside, depth + 1) for t in node.outputs for u in graph.consumers(t))
