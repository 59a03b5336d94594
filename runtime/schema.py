"""JSON as the types that dataclasses declare: nothing is converted by guess, missing and unknown keys are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any


def parse(text: str) -> Any:
    """JSON, without the doubled keys, NaN and Infinity that Python's reader lets pass. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"a key is there twice, of {', '.join(found)[:100]}")
        return found

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def typed(value: Any, kind: Any, where: str = "") -> Any:
    """`value`, read from JSON, as `kind`: a dataclass from an object with its fields, a tuple from a list, and so on.

    Raises ValueError that names the place, `steps[3].inputs: expected a list, found a string`.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _record(value, kind, where)
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, arguments, where)
    if origin in (dict, Mapping):
        return {name: typed(v, arguments[1], f"{where}.{name}".lstrip(".")) for name, v in _is(value, dict, where).items()}
    if origin is list:
        return [typed(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(_is(value, list, where))]
    if origin is tuple:
        found = _is(value, list, where)
        kinds = arguments[:1] * len(found) if arguments[-1] is Ellipsis else arguments
        if len(kinds) != len(found):
            raise ValueError(f"{where}: expected {len(kinds)} elements, found {len(found)}")
        return tuple(typed(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(found, kinds, strict=True)))
    return _is(value, kind, where)


_hints = functools.cache(typing.get_type_hints)  # it compiles the text of each annotation anew


def _record(value: Any, kind: type, where: str) -> Any:
    given, hints = _is(value, dict, where), _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in given:
        if name not in fields:
            raise ValueError(f"{where or 'it'} has an unknown key {name[:60]!r}")
    for name, field in fields.items():
        if name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where or 'it'} has no {name!r}")
    return kind(**{name: typed(v, hints[name], f"{where}.{name}".lstrip(".")) for name, v in given.items()})


def _any_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    reason = None
    for kind in kinds:
        try:
            return typed(value, kind, where)
        except ValueError as error:
            reason = reason or error
    assert reason is not None
    raise reason


_WORDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def _is(value: Any, kind: Any, where: str) -> Any:
    """`value`, if it is exactly of this type; a whole number passes for a float."""
    if kind is None:
        kind = type(None)
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise ValueError(f"{where or 'it'}: expected {_WORDS.get(kind, kind.__name__)}, found {_WORDS.get(type(value), type(value).__name__)}")
