"""Segments that only reshape and transpose: on the GPU they cost nothing where plugins read and write strided values.

`q.reshape(B, S, H, D).transpose(0, 2, 1, 3)` of a product is a view of it; and an attention whose result is transposed
back and flattened can write it in its final place at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnx

from rewrite.runtime.partition import Step

Array = np.ndarray[Any, Any]
Change = tuple[str, tuple[int, ...]]  # "reshape" to a target with 0 (copied) and -1 (the rest), or "transpose" by a permutation
OPERATORS = {"Reshape", "Transpose", "Identity"}


def changes(segment: onnx.ModelProto, ordered: Collection[str] = (), operators: Collection[str] = OPERATORS) -> dict[str, tuple[str, list[Change]]] | None:
    """For each output the input it comes from and what is done to it; None if the segment does anything but `operators`.

    Inputs named in `ordered` are 0, 1, 2, ... to the end of what they pick from: a Gather by them changes nothing.
    """
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in segment.graph.initializer}
    came: dict[str, tuple[str, list[Change]]] = {i.name: (i.name, []) for i in segment.graph.input}
    for node in segment.graph.node:
        whole = node.op_type == "Gather" and node.input[1] in ordered
        if (node.op_type not in operators and not whole) or node.domain not in ("", "ai.onnx") or node.input[0] not in came:
            return None
        source, done = came[node.input[0]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Reshape":
            if node.input[1] not in constants or attributes.get("allowzero"):
                return None
            done = [*done, ("reshape", tuple(int(n) for n in constants[node.input[1]]))]
        elif node.op_type == "Transpose":
            if "perm" not in attributes:
                return None
            done = [*done, ("transpose", tuple(attributes["perm"]))]
        came[node.output[0]] = (source, done)
    return {o.name: came[o.name] for o in segment.graph.output}


def before_widening(segment: onnx.ModelProto) -> str | None:
    """The input of a segment that only reshapes it and casts it to float32; None for any other."""
    casts = [n for n in segment.graph.node if n.op_type == "Cast"]
    found = changes(segment, operators={"Reshape", "Identity", "Cast"})
    if len(casts) != 1 or onnx.helper.get_attribute_value(casts[0].attribute[0]) != onnx.TensorProto.FLOAT or found is None or len(found) != 1:
        return None
    return next(iter(found.values()))[0]


def apply(array: Any, done: list[Change]) -> Any:
    for kind, numbers in done:
        if kind == "transpose":
            array = array.transpose(numbers)
        else:
            array = array.reshape([array.shape[i] if n == 0 else n for i, n in enumerate(numbers)])
    return array


def inverse(shape: tuple[int, ...], done: list[Change]) -> list[Change]:
    """What leads back to `shape`."""
    back: list[Change] = []
    array = np.broadcast_to(np.empty(1, np.int8), shape)
    for change in done:
        kind, numbers = change
        back.append(("transpose", tuple(int(i) for i in np.argsort(numbers))) if kind == "transpose" else ("reshape", array.shape))
        array = np.broadcast_to(np.empty(1, np.int8), apply(np.empty(array.shape, np.int8), [change]).shape)
    return back[::-1]


def is_view(array: Array, done: list[Change]) -> bool:
    return bool(np.may_share_memory(array, apply(array, done)))


class Views:
    """Which values are views of others, decided for one set of shapes.

    `of` gives, for a value that needs no memory of its own, the value it views and how; `skipped` the segment steps that
    are done by that.
    """

    def __init__(self, steps: list[Step], segments: Callable[[str], onnx.ModelProto], shapes: Mapping[str, tuple[int, ...]],
                 strided: Callable[[Step], bool], fixed: set[str], ordered: Collection[str] = ()):  # fmt: skip
        """`ordered`: values that are 0, 1, 2, ..., see `changes`."""
        self.of: dict[str, tuple[str, list[Change]]] = {}
        self.skipped: set[int] = set()
        self._shapes = shapes
        self._arrays: dict[str, Array] = {}
        readers: dict[str, list[Step]] = {}
        makers = {name: step for step in steps for name in step.outputs}
        for step in steps:
            for name in step.inputs:
                readers.setdefault(name, []).append(step)
        for index, step in enumerate(steps):
            done = changes(segments(step.name), [f"i{i}" for i, n in enumerate(step.inputs) if n in ordered]) if step.kind == "segment" else None
            if done is None:
                continue
            names = {f"i{i}": n for i, n in enumerate(step.inputs)}
            found: dict[str, tuple[str, list[Change]]] = {}
            for output, (source, change) in zip(step.outputs, done.values(), strict=True):
                value = names[source]
                same = not change and self._array(value).flags.c_contiguous
                if output not in fixed and (same or (all(strided(r) for r in readers.get(output, ())) and is_view(self._array(value), change))):
                    found[output] = (value, change)
                    continue
                back = inverse(shapes[value], change)
                own = value in makers and strided(makers[value]) and value not in fixed and readers[value] == [step] and value not in self.of
                if own and list(step.inputs).count(value) == 1 and len(step.outputs) == 1 and is_view(self._array(output), back):
                    found[value] = (output, back)
            if len(found) == len(step.outputs):
                self.of.update(found)
                self.skipped.add(index)

    def _array(self, name: str) -> Array:
        """Memory of the shape and strides that the value has."""
        if name in self.of:
            source, done = self.of[name]
            return apply(self._array(source), done)  # type: ignore[no-any-return]
        if name not in self._arrays:
            self._arrays[name] = np.empty(self._shapes[name], np.int8)
        return self._arrays[name]

    def root(self, name: str) -> str:
        """The value in whose memory `name` lies."""
        while name in self.of:
            name = self.of[name][0]
        return name
