"""The CPU backend: segments in ONNX Runtime, plugins by their NumPy references."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.runtime.executor import Array, Call
from rewrite.runtime.partition import Step
from rewrite.verify import session

if TYPE_CHECKING:
    from rewrite.runtime.plan import Plan


class CpuBackend:
    """Arrays are NumPy's; one ONNX Runtime session for each distinct segment."""

    def __init__(self, plan: Plan):
        from rewrite.registry import library

        self.plan, self.plugins = plan, library().plugins
        self.sessions: dict[str, Any] = {}

    def upload(self, array: Array) -> Array:
        return np.ascontiguousarray(array).reshape(array.shape)

    def download(self, value: Array) -> Array:
        return value

    def compile(self, step: Step) -> Call:
        return self._segment(step) if step.kind == "segment" else self._plugin(step)

    def _segment(self, step: Step) -> Call:
        if step.name not in self.sessions:
            self.sessions[step.name] = session(onnx.load(self.plan.segment_file(step.name)), optimize=True)
        runner = self.sessions[step.name]
        names = [i.name for i in runner.get_inputs()]

        def call(inputs: list[Array]) -> list[Array]:
            try:
                return list(runner.run(None, dict(zip(names, inputs, strict=True))))
            except Exception as error:
                raise RewriteError(f"segment {step.name} ({step.nodes[0]} ...) fails: {str(error).strip().splitlines()[0][:300]}") from error

        return call

    def _plugin(self, step: Step) -> Call:
        if step.name not in self.plugins:
            raise RewriteError(f"the plan calls plugin {step.name}, which no loaded rules file declares; give it with --rules")
        plugin = self.plugins[step.name]
        attributes = {**plugin.attributes, **step.attributes}

        def call(inputs: list[Array]) -> list[Array]:
            with np.errstate(all="ignore"):
                result = plugin.reference(*inputs, **attributes)
            return [np.asarray(r) for r in result] if isinstance(result, tuple) else [np.asarray(result)]

        return call
