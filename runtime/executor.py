"""Walking a plan's steps. One executor; what a segment, a plugin and an array are is the backend's affair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.partition import Step

if TYPE_CHECKING:
    from rewrite.runtime.plan import Plan

Array = np.ndarray[Any, Any]
Call = Callable[[list[Any]], list[Any]]


class Backend(Protocol):
    """Where a plan runs."""

    def upload(self, array: Array) -> Any:
        """The array where segments and plugins can read it."""

    def download(self, value: Any) -> Array:
        """The array as NumPy has it."""

    def compile(self, step: Step) -> Call:
        """What computes the step's outputs from its inputs, in order; an absent input is None."""


def make_backend(plan: Plan) -> Backend:
    """The backend for the plan's device. Raises RewriteError if the device or its software is missing."""
    if plan.device == "cpu":
        from rewrite.runtime.cpu import CpuBackend

        return CpuBackend(plan)
    raise RewriteError("device cuda: this version runs plans on the CPU only; use --device cpu")


class Executor:
    """A plan, loaded. A value is dropped after its last reader."""

    def __init__(self, plan: Plan, backend: Backend):
        self.backend, self.outputs = backend, plan.manifest.outputs
        self.weights = {name: backend.upload(array) for name, array in plan.weights.items()}
        steps = plan.manifest.steps
        self.calls = [(step, backend.compile(step)) for step in steps]
        last = {name: index for index, step in enumerate(steps) for name in (*step.inputs, *step.outputs)}
        kept = {*self.outputs.values(), *self.weights}
        self.dropped: list[list[str]] = [[] for _ in steps]
        for name, index in last.items():
            if name and name not in kept:
                self.dropped[index].append(name)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = {**self.weights, **{name: self.backend.upload(array) for name, array in inputs.items()}}
        for (step, call), dropped in zip(self.calls, self.dropped, strict=True):
            results = call([values[name] if name else None for name in step.inputs])
            values.update(zip(step.outputs, results, strict=True))
            for name in dropped:
                values.pop(name, None)
        return {name: self.backend.download(values[value]) for name, value in self.outputs.items()}
