"""The pattern language: a Python function, traced once, becomes a small graph of `Value`s that reads like the maths.

    def pattern(op, x):
        return 0.5 * x * (1.0 + op.Erf(x / 2**0.5))

Operators are written `op.Name(inputs..., attribute=value)` or with `+ - * / @`. `+` and `*` are commutative and
associative in the matcher: one spelling covers every operand order and bracketing, and division by a constant counts
as multiplication by its reciprocal. `op.domain("com.acme").Name(...)` reaches operators of other domains.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

ASSOCIATIVE = {"Add", "Mul", "And", "Or"}
COMMUTATIVE = ASSOCIATIVE | {"Xor", "Equal", "Max", "Min", "Sum"}


class Value:
    """A value in a pattern. Arithmetic on values builds pattern nodes."""

    def __add__(self, other: Any) -> Value:
        return _node("Add", (self, other))

    def __mul__(self, other: Any) -> Value:
        return _node("Mul", (self, other))

    def __sub__(self, other: Any) -> Value:
        return _node("Sub", (self, other))

    def __truediv__(self, other: Any) -> Value:
        if isinstance(other, (int, float)):
            return _node("Mul", (self, 1.0 / other))
        return _node("Div", (self, other))

    def __matmul__(self, other: Any) -> Value:
        return _node("MatMul", (self, other))

    def __neg__(self) -> Value:
        return _node("Neg", (self,))

    def __radd__(self, other: Any) -> Value:
        return _node("Add", (other, self))

    def __rmul__(self, other: Any) -> Value:
        return _node("Mul", (other, self))

    def __rsub__(self, other: Any) -> Value:
        return _node("Sub", (other, self))

    def __rtruediv__(self, other: Any) -> Value:
        return _node("Div", (other, self))


@dataclass(eq=False)
class Var(Value):
    """Any value; the same variable used twice must be the same value. Parameters of a pattern are variables."""

    name: str


@dataclass(eq=False)
class Const(Value):
    """A scalar constant equal to `value` within a relative `tolerance` (exporters store 2**0.5 in fp16, too)."""

    value: float
    tolerance: float = 2e-3


@dataclass(eq=False)
class Scalar(Value):
    """Any scalar constant; bound as a Python number under `name`."""

    name: str


@dataclass(eq=False)
class Ints(Value):
    """A constant vector of integers; equal to `value` if one is given, bound as a list under `name` if one is given."""

    value: tuple[int, ...] | None = None
    name: str | None = None


@dataclass(eq=False)
class Missing(Value):
    """An optional input that is absent."""


@dataclass(eq=False)
class Rest(Value):
    """All remaining inputs of a node (of any number); bound as a list under `name`."""

    name: str


@dataclass(eq=False)
class AnyOf(Value):
    """The first alternative that matches."""

    alternatives: tuple[Value, ...]


@dataclass(eq=False)
class Tag(Value):
    """`value`, and `label` bound under `name`: tells `check` and `replace` which alternative was taken."""

    name: str
    label: Any
    value: Value


@dataclass(eq=False)
class Typed(Value):
    """`value` if its shape, its dtype and whether it is constant are as asked for; names in `dims` are bound."""

    value: Value
    dims: tuple[Any, ...] | None
    dtypes: tuple[str, ...]
    constant: bool


@dataclass(eq=False)
class Attr:
    """In place of an attribute's value: bind whatever value the node has under `name`."""

    name: str


@dataclass(eq=False)
class Op(Value):
    """A node: operator name, operand patterns, attribute values. As a `Value` it stands for its first output."""

    name: str
    inputs: tuple[Value, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    @cached_property
    def ops(self) -> frozenset[str]:
        """The operators whose nodes this pattern can match."""
        return frozenset({"Mul": ("Mul", "Div"), "Add": ("Add", "Sub")}.get(self.name, (self.name,)))

    @cached_property
    def tail(self) -> Rest | None:
        """The operand that stands for all further ones."""
        return self.inputs[-1] if self.inputs and isinstance(self.inputs[-1], Rest) else None

    @cached_property
    def backwards(self) -> list[tuple[int, Value]]:
        """The operands before the tail with their places, last first."""
        return list(enumerate(self.inputs[:-1] if self.tail else self.inputs))[::-1]

    @cached_property
    def variables(self) -> list[str] | None:
        """The names of its operands if all are plain variables, so that nothing has to be found out about them."""
        return [v.name for v in self.inputs if isinstance(v, Var)] if all(type(v) is Var for v in self.inputs) else None

    @cached_property
    def operand_lists(self) -> list[tuple[Value, ...]]:
        """What `flattened` gives, once."""
        return [tuple(values) for values in flattened(self)]


@dataclass(eq=False)
class Output(Value):
    """One output of a node that has several."""

    node: Op
    index: int


def _value(x: Any) -> Value:
    if isinstance(x, Value):
        return x
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return Const(float(x))
    if isinstance(x, (list, tuple)):
        return Ints(tuple(x))
    if x is None:
        return Missing()
    raise TypeError(f"a pattern is made of values, numbers, lists of integers or None, not {x!r}")


def _node(name: str, inputs: tuple[Any, ...], attributes: dict[str, Any] | None = None) -> Op:
    values = [_value(x) for x in inputs]
    if name in ASSOCIATIVE:
        values = [w for v in values for w in (v.inputs if isinstance(v, Op) and v.name == name else (v,))]
    return Op(name, tuple(values), attributes or {})


class PatternBuilder:
    """The `op` a pattern function is called with."""

    def __init__(self, domain: str = ""):
        self._domain = domain

    def domain(self, name: str) -> PatternBuilder:
        return PatternBuilder(name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        full = f"{self._domain}::{name}" if self._domain else name

        def build(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            node = _node(full, inputs, attributes)
            node.outputs = outputs
            return node if outputs == 1 else tuple(Output(node, i) for i in range(outputs))

        return build


def any_of(*alternatives: Any) -> Value:
    """Matches the first of the alternatives that fits; variables of the others stay None."""
    return AnyOf(tuple(_value(a) for a in alternatives))


def maybe(operator: Callable[..., Value], x: Value, *inputs: Any, **attributes: Any) -> Value:
    """An optional node: `maybe(op.Cast, x)` matches `Cast(x)` and plain `x`."""
    return any_of(operator(x, *inputs, **attributes), x)


def scalar(name: str) -> Value:
    """Any scalar constant, handed to `check` and `replace` as a Python number called `name`."""
    return Scalar(name)


def ints(name: str) -> Value:
    """Any constant vector of integers, handed on as a list called `name`."""
    return Ints(None, name)


def attr(name: str) -> Any:
    """Any value of an attribute, handed on under `name`."""
    return Attr(name)


def tag(value: Value, **label: Any) -> Value:
    """`value`, noted when it matches: `any_of(tag(op.Relu(x), kind="relu"), tag(op.Tanh(x), kind="tanh"))` binds `kind`."""
    ((name, content),) = label.items()
    return Tag(name, content, value)


def typed(value: Any, *dims: Any, dtype: str | tuple[str, ...] = (), constant: bool = False) -> Value:
    """`value` of this shape and dtype: `typed(x, "B", ..., "K")`, `typed(w, "K", 64, dtype="float16")`.

    A dimension is an integer, None for any, or a name: the same everywhere in the pattern, and handed to `check` and
    `replace` under it (an integer, or the name of a dynamic dimension). `...` stands for any number of dimensions, once.
    No dimensions: any shape; a scalar is asked for by `scalar`. `constant`: a weight, of any size.
    """
    if dims.count(...) > 1:
        raise TypeError("'...' may stand once in a shape")
    return Typed(_value(value), dims or None, (dtype,) if isinstance(dtype, str) else tuple(dtype), constant)


def unless_nan(op: PatternBuilder, value: Value, name: str) -> Value:
    """`value`, or `value` with its NaNs replaced by a number, bound under `name` (None if there is no such guard).

    A guard changes the result where there is a NaN, so it is never looked through unasked: `replace` has to keep it.
    """
    return any_of(op.Where(op.IsNaN(value), scalar(name), value), value)


def rest(name: str) -> Value:
    """The remaining inputs of a variadic node, handed on as a list called `name`."""
    return Rest(name)


def trace(function: Callable[..., Any]) -> tuple[tuple[Value, ...], tuple[str, ...]]:
    """Run a pattern function on variables; returns its outputs and the names of its variables."""
    names = tuple(inspect.signature(function).parameters)[1:]
    result = function(PatternBuilder(), *(Var(n) for n in names))
    outputs = result if isinstance(result, tuple) else (result,)
    if not outputs or not all(isinstance(o, (Op, AnyOf, Output, Tag, Typed)) for o in outputs):
        raise TypeError("a pattern returns one operator's output or a tuple of them")
    return outputs, names


def walk(value: Value) -> Iterator[Value]:
    """`value` and everything below it, each once: alternatives share what is below them, so a pattern is no tree."""
    stack, seen = [value], {id(value)}
    while stack:
        part = stack.pop()
        yield part
        fresh = {id(v): v for v in below(part) if id(v) not in seen}
        seen.update(fresh)
        stack += fresh.values()


def names(value: Value) -> set[str]:
    """Everything the pattern may bind: variables, scalars, vectors, attributes, dimensions."""
    found: set[str] = set()
    for part in walk(value):
        name = getattr(part, "name", None)
        if isinstance(part, Typed):
            found.update(d for d in part.dims or () if isinstance(d, str))
        elif isinstance(part, Op):
            found.update(a.name for a in part.attributes.values() if isinstance(a, Attr))
        elif name is not None:
            found.add(name)
    return found


@cache
def roots(value: Value) -> frozenset[str]:
    """The operators a node may have to be this value's producer."""
    if isinstance(value, Op):
        return value.ops
    if isinstance(value, Output):
        return value.node.ops
    if isinstance(value, (Tag, Typed)):
        return roots(value.value)
    if isinstance(value, AnyOf):
        return frozenset().union(*(roots(a) for a in value.alternatives))
    return frozenset()


@cache
def required(value: Value) -> frozenset[str]:
    """Operators without which the pattern cannot match at all: a cheap test before any matching."""
    if isinstance(value, (Output, Tag, Typed)):
        return required(below(value)[0])
    if isinstance(value, AnyOf):
        return frozenset.intersection(*(required(a) for a in value.alternatives))
    if isinstance(value, Op):
        own: frozenset[str] = frozenset() if len(value.ops) > 1 else value.ops
        return own.union(*(required(i) for i in value.inputs))
    return frozenset()


@cache
def operators(value: Value) -> frozenset[str]:
    """All operators that nodes of a match may have."""
    return frozenset(op for part in walk(value) if isinstance(part, Op) for op in part.ops)


@cache
def height(value: Value) -> int:
    """How many operators lie on the longest way from the output to an input."""
    own = 1 if isinstance(value, Op) else 0
    return own + max(map(height, below(value)), default=0)


@cache
def size(value: Value) -> int:
    """How many operators a match has at least, optional ones left aside."""
    if isinstance(value, AnyOf):
        return min(map(size, value.alternatives))
    own = 1 if isinstance(value, Op) else 0
    return own + sum(map(size, below(value)))


def below(value: Value) -> tuple[Value, ...]:
    """The values that `value` is made of."""
    if isinstance(value, Op):
        return value.inputs
    if isinstance(value, Output):
        return (value.node,)
    if isinstance(value, (Tag, Typed)):
        return (value.value,)
    return value.alternatives if isinstance(value, AnyOf) else ()


def flattened(op: Op) -> Iterator[list[Value]]:
    """The operands of an associative `op`, with each choice among alternatives that are the same operator taken apart."""

    def choices(value: Value) -> list[tuple[Value, ...]]:
        if isinstance(value, Op) and value.name == op.name:
            return [tuple(w for part in combination for w in part) for combination in itertools.product(*map(choices, value.inputs))]
        if isinstance(value, AnyOf) and any(isinstance(a, Op) and a.name == op.name for a in value.alternatives):
            return [c for a in value.alternatives for c in choices(a)]
        return [(value,)]

    for combination in itertools.product(*map(choices, op.inputs)):
        yield [w for part in combination for w in part]


def dims_text(dims: tuple[Any, ...] | None) -> str:
    return f"[{', '.join('...' if d is ... else '?' if d is None else str(d) for d in dims or ())}]"


def text(value: Value) -> str:
    """The pattern as a person would write it, for reports."""
    if isinstance(value, (Var, Scalar, Rest)):
        return value.name
    if isinstance(value, Const):
        return f"{value.value:.6g}"
    if isinstance(value, Ints):
        return value.name or str(list(value.value or ()))
    if isinstance(value, Missing):
        return "None"
    if isinstance(value, AnyOf):
        return "(" + " | ".join(text(a) for a in value.alternatives) + ")"
    if isinstance(value, (Tag, Typed)):
        return text(value.value)
    if isinstance(value, Output):
        return f"{text(value.node)}[{value.index}]"
    assert isinstance(value, Op)
    attributes = [f"{k}={v.name if isinstance(v, Attr) else getattr(v, '__name__', v)}" for k, v in value.attributes.items()]
    return f"{value.name}({', '.join([text(i) for i in value.inputs] + attributes)})"
