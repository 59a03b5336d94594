"""Matching one pattern at one node, with backtracking over operand orders, bracketings and alternatives.

The matcher walks from the node that produces the pattern's (first) output towards its inputs, with a list of goals: which
value of the pattern is to stand for which value of the graph. Where a goal leaves no choice, the next one follows in a
loop; where there is a choice, each is tried with the goals that are left, and what it bound is undone. It looks through
nodes that change nothing (see `look_through`).
A `Trace` given to it records how far the best attempt came and why it stopped there; that is what `explain` prints.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import onnx_graphsurgeon as gs

from rewrite import pattern as P
from rewrite.graph import Dim, Graph, describe
from rewrite.graph import dtype_name as dtype_name
from rewrite.match import BoundValue as BoundValue
from rewrite.match import Match as Match
from rewrite.nodes import Node, Variable
from rewrite.noops import look_through
from rewrite.outlook import possible, viable
from rewrite.trace import Trace

Operand = tuple[gs.Tensor, str]  # how is "Div" or "Sub" for a constant that the graph divides by or subtracts
Goals = tuple[Any, Any, Any]  # a value of the pattern, what it is to stand for, the goals after it (None after the last)
Step = Goals | None | Iterable[Goals | None]  # what a goal leads to: the goals that are left, or a choice among several such


@dataclass
class _Fit:
    """A goal that is met where an alternative fits: why others did not is then no reason why the whole does not."""

    noted: Trace
    met: bool = False


@dataclass
class _Refusal:
    """A goal that nothing meets: the node has an operand too many, or lacks one."""

    op: P.Op
    node: Node
    reason: str


class _Failed:
    """What a goal leads to that nothing meets."""


FAILED = cast(Goals, _Failed())  # a step like others to the type checker, no tuple to `_advance`


class Matcher:
    """One attempt to match `outputs` (the traced pattern) in `graph`."""

    def __init__(self, graph: Graph, outputs: tuple[P.Value, ...], trace: Trace | None = None):
        self.graph, self.pattern, self.trace = graph, outputs, trace
        self.bindings: dict[str, Any] = {}
        self.matched: dict[int, Node] = {}  # id(pattern node) -> graph node
        self.nodes: list[Node] = []  # every node covered, no-ops looked through included

    def at(self, node: Node) -> Iterable[Match]:
        """All ways in which the pattern matches with its first output computed by `node`."""
        first = self.pattern[0]
        index = first.index if isinstance(first, P.Output) else 0
        if index >= len(node.outputs):
            return ()
        output = node.outputs[index]
        step = self._advance((first, output, None))
        if step is FAILED:
            return ()
        if step is None and len(self.pattern) == 1:  # no choice on the way: the only match
            return (Match(self.graph, [output], self.bindings, list(dict.fromkeys(self.nodes))),)
        return self._others(1, [output], step)

    def _match(self, outputs: list[gs.Tensor]) -> Match:
        return Match(self.graph, outputs, dict(self.bindings), list(dict.fromkeys(self.nodes)))

    def _others(self, position: int, found: list[gs.Tensor], step: Step) -> Iterator[Match]:
        """The matches to which a step leads that is the last for the first `position` outputs, `found`."""
        for _ in self._ways(step):
            if position == len(self.pattern):
                yield self._match(found)
            else:
                yield from self._next(position, found)

    def _next(self, position: int, found: list[gs.Tensor]) -> Iterator[Match]:
        value = self.pattern[position]
        op = value.node if isinstance(value, P.Output) else value
        index = value.index if isinstance(value, P.Output) else 0
        known = self.matched.get(id(op))
        for node in [known] if known is not None else self._siblings(value):
            if index < len(node.outputs):
                mark = self._mark()
                step = self._advance((value, node.outputs[index], None))
                yield from self._others(position + 1, [*found, node.outputs[index]], step)
                self._undo(mark)

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
                if user.canonical in op.ops:
                    found.append(user)
                passes = user.canonical in op.ops and op.name in P.ASSOCIATIVE
                for output in user.outputs:
                    if id(output) not in seen and (passes or look_through(self.graph, user, output) is not None):
                        seen.add(id(output))
                        front.append(output)
        return found

    # --- goals -------------------------------------------------------------------------------------------------
    def _advance(self, goals: Goals | None) -> Step:
        """Meet goals up to a choice: returns it, None if none is left, or FAILED. What was bound is left for the caller to undo."""
        step: Step = goals
        while type(step) is tuple:
            value, tensor, rest = step
            if type(value) is P.Var and value.name not in self.bindings:  # the commonest goal, without a call
                self.bindings[value.name] = tensor
                step = rest
            else:
                step = MEETS[type(value)](self, value, tensor, rest)
        return step

    def _ways(self, step: Step) -> Iterator[None]:
        """Once for each way in which a step leads to the end of its goals, with what that way binds."""
        if step is None:
            yield
            return
        mark = self._mark()
        for choice in () if step is FAILED else step:
            left = self._advance(choice)
            if left is None:
                yield
            elif left is not FAILED:
                yield from self._ways(left)
            self._undo(mark)

    def _mark(self) -> tuple[int, int, int]:
        return len(self.bindings), len(self.matched), len(self.nodes)

    def _undo(self, mark: tuple[int, int, int]) -> None:
        """Forget what was bound, matched and covered since: dictionaries give back the newest first."""
        for found, length in ((self.bindings, mark[0]), (self.matched, mark[1])):
            while len(found) > length:
                found.popitem()
        del self.nodes[mark[2] :]

    # --- values ------------------------------------------------------------------------------------------------
    def _variable(self, value: P.Var, tensor: gs.Tensor, rest: Goals | None) -> Goals | None:
        return rest if self.bindings[value.name] is tensor else self._differs(value.name, tensor)

    def _equal(self, name: str, bound: Any, rest: Goals | None) -> Goals | None:
        if name not in self.bindings:
            self.bindings[name] = bound
            return rest
        return rest if self.bindings[name] == bound else self._differs(name, bound)

    def _differs(self, name: str, bound: Any) -> Goals:
        if self.trace is None:
            return FAILED
        other = self.bindings[name]
        return self._stop(f"variable {name}", None, f"'{getattr(bound, 'name', bound)}' is not '{getattr(other, 'name', other)}', which {name} stands for")

    def _rest(self, value: P.Rest, tensors: Any, rest: Goals | None) -> Goals | None:
        if not isinstance(tensors, list):
            return FAILED
        if value.name not in self.bindings:
            self.bindings[value.name] = tensors
        return rest

    def _tagged(self, value: P.Tag, tensor: gs.Tensor, rest: Goals | None) -> Goals | None:
        return self._equal(value.name, value.label, (value.value, tensor, rest))

    def _missing(self, value: P.Missing, tensor: gs.Tensor, rest: Goals | None) -> Goals | None:
        return FAILED if tensor.name else rest

    def _any_of(self, value: P.AnyOf, tensor: gs.Tensor, rest: Goals | None) -> Step:
        if self.trace is not None:
            return self._any_traced(value, tensor, rest, self.trace)
        choices = viable(self.graph, value, tensor)
        if len(choices) == 1:
            return choices[0], tensor, rest
        return [(choice, tensor, rest) for choice in choices]

    def _any_traced(self, value: P.AnyOf, tensor: gs.Tensor, rest: Goals | None, trace: Trace) -> Iterator[Goals]:
        fit = _Fit(trace.copy())
        for alternative in sorted(value.alternatives, key=lambda a: not isinstance(a, P.Var)):  # another value says more than another operator
            yield alternative, tensor, (fit, None, rest)
        if fit.met:
            trace.restore(fit.noted)

    def _fitted(self, fit: _Fit, _: None, rest: Goals | None) -> Iterator[Goals | None]:
        assert self.trace is not None
        self.trace.restore(fit.noted)
        fit.met = True
        yield rest
        fit.noted = self.trace.copy()

    def _refused(self, refusal: _Refusal, _: None, rest: Goals | None) -> Step:
        return self._stop(refusal.op.name, refusal.node, refusal.reason)

    def _typed(self, value: P.Typed, tensor: gs.Tensor, rest: Goals | None) -> Goals | None:
        """`tensor` is of the dtype and shape asked for; names of dimensions are bound, the same everywhere."""
        what, shape = P.text(value.value) if self.trace is not None else "", tensor.shape
        dtype = None if tensor.dtype is None else dtype_name(tensor.dtype)
        if value.dtypes and dtype not in value.dtypes:
            return self._stop(what, None, f"'{tensor.name}' is {dtype or 'of unknown type'}, not {' or '.join(value.dtypes)}", 0.5)
        if value.constant and not self.graph.is_constant(tensor):
            return self._stop(what, None, f"'{tensor.name}' is computed, not a constant", 0.5)
        if value.dims is None:
            return value.value, tensor, rest
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
        return value.value, tensor, rest

    def _constant(self, value: P.Const | P.Scalar | P.Ints, tensor: gs.Tensor, rest: Goals | None) -> Goals | None:
        array = self.graph.constant(tensor)
        if array is None:
            return FAILED if self.trace is None else self._stop(P.text(value), self.graph.producer(tensor), f"'{tensor.name}' is not a small constant")
        if isinstance(value, P.Ints):
            return self._integers(value, array, tensor, rest)
        if array.size != 1 or not _is_number(array):
            reason = f"has {array.size} elements, not one" if array.size != 1 else f"is of type {array.dtype}, no number"
            return self._stop(P.text(value), None, f"'{tensor.name}' {reason}")
        return self._number(value, float(array.reshape(())), tensor.name, rest)

    def _integers(self, value: P.Ints, array: np.ndarray, tensor: gs.Tensor, rest: Goals | None) -> Goals | None:
        found = [int(i) for i in array.reshape(-1)] if array.dtype.kind in "iu" else None
        if found is None or (value.value is not None and tuple(found) != value.value):
            return self._stop(P.text(value), None, f"'{tensor.name}' is {found}, not {list(value.value or ()) or 'a list of integers'}", 0.5)
        return rest if value.name is None else self._equal(value.name, found, rest)

    def _number(self, value: P.Const | P.Scalar, number: float, name: str, rest: Goals | None) -> Goals | None:
        if isinstance(value, P.Scalar):
            return self._equal(value.name, number, rest)
        if number == value.value or abs(number - value.value) <= value.tolerance * abs(value.value) < math.inf:
            return rest
        return self._stop(P.text(value), None, f"'{name}' is {number:.6g}, not {value.value:.6g}", 0.5)

    # --- nodes -------------------------------------------------------------------------------------------------
    def _output(self, value: P.Output, tensor: gs.Tensor, rest: Goals | None) -> Step:
        return self._produced(value.node, tensor, rest, value.index)

    def _produced(self, op: P.Op, tensor: gs.Tensor, rest: Goals | None, index: int = 0) -> Step:
        """`tensor` is output `index` of a node that matches `op`, perhaps behind nodes that change nothing."""
        graph, known = self.graph, self.matched.get(id(op))
        while True:
            for node in tensor.inputs:  # its producer
                if node.graph is graph:
                    break
            else:
                return self._unexpected(op.name, None, tensor)
            produces = index < len(node.outputs) and node.outputs[index] is tensor
            if known is node:
                return rest if produces else FAILED
            if produces and known is None and node.canonical in op.ops:
                break
            through = look_through(graph, node, tensor)
            if through is None:
                return self._unexpected(op.name, node, tensor)
            tensor, passed = through
            self.nodes += passed
        if op.outputs > 1 and sum(1 for t in node.outputs if t.name) != op.outputs:
            return self._stop(op.name, node, f"it has {len(node.outputs)} outputs, the pattern {op.outputs}")
        if op.attributes and not self._attributes(op, node):
            return FAILED
        self.matched[id(op)] = node
        self.nodes.append(node)
        if op.name in P.ASSOCIATIVE:
            return self._associated(op, node, rest)
        if op.name in P.COMMUTATIVE and len(op.inputs) == len(node.inputs) == 2:
            return self._either(_ordered(op, self.trace is not None)[0], node.inputs, rest)
        return self._in_order(op, node, rest)

    def _attributes(self, op: P.Op, node: Node) -> bool:
        """Whether all attributes are as the pattern has them; those that it leaves open are bound."""
        captured: dict[str, Any] = {}
        for name, wanted in op.attributes.items():
            actual = self.graph.attribute(node, name)
            if isinstance(wanted, P.Attr):
                known = captured.get(wanted.name, self.bindings.get(wanted.name, actual))
                if not same_attribute(actual, known):
                    self._stop(op.name, node, f"attribute {name} is {actual!r}, but {wanted.name} stands for {known!r} already", 0.5)
                    return False
                captured[wanted.name] = actual
            elif not (wanted(actual) if callable(wanted) else same_attribute(actual, wanted)):
                if self.trace is not None:
                    asked = str(inspect.getdoc(wanted) or getattr(wanted, "__name__", "another")).rstrip(".") if callable(wanted) else repr(wanted)
                    self._stop(op.name, node, f"attribute {name} is {actual!r}, wanted: {asked}", 0.5)
                return False
        for name, actual in captured.items():
            if name not in self.bindings:
                self.bindings[name] = actual
        return True

    def _in_order(self, op: P.Op, node: Node, rest: Goals | None) -> Goals | None:
        values, given = op.inputs, node.inputs
        if op.variables is not None and len(given) == len(values) and self.trace is None:
            for name, tensor in zip(op.variables, given, strict=True):
                if not tensor.name or self.bindings.setdefault(name, tensor) is not tensor:
                    return FAILED
            return rest
        if op.tail is not None:
            rest = (op.tail, given[len(values) - 1 :], rest)
        elif len(given) > len(values) and any(t.name for t in given[len(values) :]):
            rest = (_Refusal(op, node, f"it has {len(given)} inputs, the pattern has {len(values)}"), None, rest)
        for index, value in op.backwards:
            tensor = given[index] if index < len(given) else Variable("")
            if tensor.name or _may_be_missing(value):
                rest = value, tensor, rest
            else:
                rest = (_Refusal(op, node, f"input {index} is absent"), None, rest)
        return rest

    # --- commutative and associative operators -------------------------------------------------------------------
    def _associated(self, op: P.Op, node: Node, rest: Goals | None) -> Step:
        lists = _ordered(op, self.trace is not None)
        if len(lists) > 1 or len(lists[0]) > 2:
            return self._bracketings(op, lists, node, rest)
        if node.canonical == op.name:
            return self._either(lists[0], node.inputs, rest)
        operands = self._split(op, node)
        return FAILED if operands is None else self._assign(lists[0], operands, rest)

    def _either(self, values: tuple[P.Value, ...], tensors: list[gs.Tensor], rest: Goals | None) -> Step:
        """Two values stand for two operands, in either order."""
        if self.trace is not None:
            return self._assign(values, [(t, "") for t in tensors], rest)
        (first, second), (left, right) = values, tensors
        orders = []
        if possible(self.graph, first, left):
            orders.append((first, left, (second, right, rest)))
        if left is not right and possible(self.graph, first, right):  # the same value twice is tried once
            orders.append((first, right, (second, left, rest)))
        return orders[0] if len(orders) == 1 else orders

    def _bracketings(self, op: P.Op, lists: list[tuple[P.Value, ...]], node: Node, rest: Goals | None) -> Iterator[Goals]:
        for values in lists:
            for operands, covered in self._decompositions(op, len(values), node):
                self.nodes += covered
                yield values, operands, rest

    def _decompositions(self, op: P.Op, count: int, node: Node) -> Iterator[tuple[list[Operand], list[Node]]]:
        """The operand lists of length `count` that `node` has under re-association, and the nodes between them."""
        start = self._split(op, node)
        stack: list[tuple[list[Operand], list[Node]]] = [] if start is None else [(start, [])]
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

    def _inner(self, op: P.Op, tensor: gs.Tensor) -> tuple[Node | None, list[Node]]:
        """The node of the same operator that computes `tensor`, and the no-ops in between."""
        between: list[Node] = []
        node = self.graph.producer(tensor)
        while node is not None and node.canonical not in op.ops:
            through = look_through(self.graph, node, tensor)
            if through is None:
                return None, []
            tensor, passed = through
            between += passed
            node = self.graph.producer(tensor)
        return node, between

    def _split(self, op: P.Op, node: Node) -> list[Operand] | None:
        if node.canonical == op.name:
            return [(t, "") for t in node.inputs]
        if self.graph.constant(node.inputs[1]) is None:  # x / y and x - y only with constant y
            self._stop(op.name, node, f"expected {op.name}, found {node.canonical} by a value that is not a small constant")
            return None
        return [(node.inputs[0], ""), (node.inputs[1], node.canonical)]

    def _assign(self, values: tuple[P.Value, ...], operands: list[Operand], rest: Goals | None) -> Step:
        """The first of `values` stands for one of `operands`, the others for the rest of them."""
        if len(values) == 1:
            return self._assigned(values, operands, 0, rest)
        options = self._options(values[0], operands)
        if len(options) == 1:
            return self._assigned(values, operands, options[0], rest)
        first = {id(operands[i][0]): i for i in reversed(options)}  # the same value twice is tried once
        return (self._assigned(values, operands, i, rest) for i in options if first[id(operands[i][0])] == i)

    def _options(self, value: P.Value, operands: list[Operand]) -> list[int]:
        """Which operands `value` can stand for: of those by which the graph divides, or which it subtracts, only a number."""
        number = isinstance(value, (P.Const, P.Scalar))
        options = [i for i, (tensor, how) in enumerate(operands) if (number or not how) and possible(self.graph, value, tensor)]
        return options if self.trace is None or (number and options) else list(range(len(operands)))

    def _assigned(self, values: tuple[P.Value, ...], operands: list[Operand], index: int, rest: Goals | None) -> Goals | None:
        tensor, how = operands[index]
        if len(values) == 2 and not operands[1 - index][1]:
            rest = (values[1], operands[1 - index][0], rest)
        elif len(values) > 1:
            rest = (values[1:], operands[:index] + operands[index + 1 :], rest)
        return self._inverse(values[0], tensor, how, rest) if how else (values[0], tensor, rest)

    def _inverse(self, value: P.Value, tensor: gs.Tensor, how: str, rest: Goals | None) -> Goals | None:
        """A divisor (or subtrahend) met where the pattern multiplies (or adds)."""
        array = self.graph.constant(tensor)
        if array is None or array.size != 1 or not _is_float(array) or not isinstance(value, (P.Const, P.Scalar)):
            return FAILED
        number = float(array.reshape(()))
        if how == "Div" and number == 0:
            return FAILED
        return self._number(value, 1.0 / number if how == "Div" else -number, tensor.name, rest)

    # --- why not -------------------------------------------------------------------------------------------------
    def _stop(self, part: str, node: Node | None, reason: str, more: float = 0.0) -> Goals:
        """Note why this attempt ends here; `more` than the operators matched so far speaks for it."""
        depth = len(self.matched) + more
        if self.trace is not None and depth > self.trace.depth:
            self.trace.stop(depth, part, describe(node) if node is not None else "", reason, *self._state())
        return FAILED

    def _unexpected(self, op: str, node: Node | None, tensor: gs.Tensor) -> Goals:
        depth = len(self.matched)
        if self.trace is not None and depth >= self.trace.depth:
            self.trace.unexpected(depth, op, describe(node) if node is not None else "", _found(node, tensor), *self._state())
        return FAILED

    def _state(self) -> tuple[dict[str, str], list[str]]:
        return {k: getattr(v, "name", str(v)) for k, v in self.bindings.items()}, [describe(n) for n in self.nodes]


MEETS: dict[type, Callable[..., Step]] = {
    P.Var: Matcher._variable, P.Const: Matcher._constant, P.Scalar: Matcher._constant, P.Ints: Matcher._constant, P.AnyOf: Matcher._any_of,
    P.Tag: Matcher._tagged, P.Typed: Matcher._typed, P.Missing: Matcher._missing, P.Output: Matcher._output, P.Op: Matcher._produced,
    P.Rest: Matcher._rest, tuple: Matcher._assign, _Fit: Matcher._fitted, _Refusal: Matcher._refused,
}  # fmt: skip


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"  # whose kind is "V" to NumPy


def _is_number(array: np.ndarray) -> bool:
    return array.dtype.kind in "iub" or _is_float(array)


def _found(node: Node | None, tensor: gs.Tensor) -> str:
    """What stands where another operator is expected; of a Cast also the types, which are what it stands in the way with."""
    if node is None:
        return f"the constant '{tensor.name}'" if isinstance(tensor, gs.Constant) else f"'{tensor.name}', an input of the graph"
    types = [t.dtype for t in (node.inputs[0], node.outputs[0])] if node.canonical == "Cast" else [None]
    return node.canonical if None in types else f"Cast of {' to '.join(map(dtype_name, types))}"


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
def _ordered(op: P.Op, traced: bool) -> list[tuple[P.Value, ...]]:
    """The operand lists of a commutative node, each with what fails soonest first; when tracing, with what tells most: a wrong number is seen when all else is there."""
    return [tuple(sorted(values, key=lambda v: _rank(v, traced))) for values in (op.operand_lists if op.name in P.ASSOCIATIVE else [op.inputs])]


def _rank(value: P.Value, traced: bool) -> int:
    if isinstance(value, (P.Tag, P.Typed)):
        return _rank(value.value, traced)
    if isinstance(value, P.Const):
        return 3 if traced else 0
    if isinstance(value, (P.Op, P.Output)):
        return 1
    return 2 if isinstance(value, P.AnyOf) else 3 if isinstance(value, P.Scalar) else 4
