"""The CPU backend: segments in ONNX Runtime, plugins by their NumPy references."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.precision import widen_arrays, widen_model
from rewrite.registry import library
from rewrite.runtime.partition import Step
from rewrite.verify import has_bfloat16, session

if TYPE_CHECKING:
    from rewrite.runtime.communication import Communicator
    from rewrite.runtime.plan import Plan

Array = np.ndarray[Any, Any]
TOLD = ("AllReduce", "AllGather", "Send", "Recv")  # what a rank does with others
Call = Callable[[list[Any]], list[Any]]


class CpuExecutor:
    """A plan on the CPU: one ONNX Runtime session for each distinct segment; a value is dropped after its last reader.

    Of a plan for several ranks it is one rank, which needs a `communicator` to the others; `all_ranks.AllRanks` has them all.
    """

    def __init__(self, plan: Plan, rank: int = 0, communicator: Communicator | None = None):
        self.plan, self.plugins, self.rank, self.communicator = plan, library().plugins, rank, communicator
        self.group = communicator.split(plan.manifest.ranks_of_stage) if communicator is not None and plan.manifest.stages > 1 else communicator  # those of this stage
        self.sessions: dict[str, Any] = {}
        self.weights = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in plan.weights_of(rank).items()}
        steps, self.inputs, self.outputs = plan.steps_of(rank), plan.inputs_of(rank), plan.outputs_of(rank)
        self.calls = [(step, self._segment(step) if step.kind == "segment" else self._plugin(step)) for step in steps]
        last = {name: index for index, step in enumerate(steps) for name in (*step.inputs, *step.outputs)}
        self.updated = [self._updated(step) for step in steps]
        kept = {*self.outputs.values(), *self.weights}
        self.dropped: list[list[str]] = [[] for _ in steps]
        for name, index in last.items():
            if name and name not in kept:
                self.dropped[index].append(name)

    def run(self, inputs: Mapping[str, Array], in_place: frozenset[str] = frozenset()) -> dict[str, Array]:
        """The outputs by name. Plugins that update an input (a cache) overwrite a copy, but those inputs named in `in_place` themselves."""
        walk = self.walk(inputs, in_place)
        try:
            step, x = next(walk)
            while True:
                step, x = walk.send(self._tell(step, x))
        except StopIteration as done:
            return dict(done.value)

    def _tell(self, step: Step, x: Array) -> Array:
        assert self.communicator is not None
        assert self.group is not None
        if step.name in ("AllReduce", "AllGather"):
            return self.group.all_reduce(x) if step.name == "AllReduce" else self.group.all_gather(x)
        away = (step.attributes["target"] - step.attributes["source"]) * self.plan.manifest.ranks_of_stage
        if step.name == "Send":
            self.communicator.send(x, self.rank + away)
        else:
            self.communicator.receive(x, self.rank - away)
        return x

    def walk(self, inputs: Mapping[str, Array], in_place: frozenset[str] = frozenset()) -> Generator[tuple[Step, Array], Array, dict[str, Array]]:
        """`run`, step by step: yields what is to be summed, joined or sent, or an empty array to receive, and is sent the result."""
        sizes = self.plan.check(inputs, self.rank)
        values = {**self.weights, **{name: np.ascontiguousarray(a).reshape(a.shape) for name, a in inputs.items()}}
        for (step, call), dropped, updated in zip(self.calls, self.dropped, self.updated, strict=True):
            operands = [values[name] if name else None for name in step.inputs]
            for index in updated:
                if step.inputs[index] not in in_place:
                    operands[index] = operands[index].copy()  # type: ignore[union-attr]
            if step.name in TOLD and self.plan.manifest.world > 1:
                x = operands[0] if operands else self._empty(step.outputs[0], sizes)
                assert x is not None
                told = yield step, x
                results = [r.astype(x.dtype) for r in call([told, *operands[1:]])] if step.outputs else []
            else:
                results = call(operands)
            values.update(zip(step.outputs, results, strict=True))
            for name in dropped:
                values.pop(name, None)
        return {name: values[value] for name, value in self.outputs.items()}

    def _empty(self, name: str, sizes: Mapping[str, int]) -> Array:
        """Room for a value that will be received."""
        kind = self.plan.manifest.values[name]
        shape = [sizes[d] if isinstance(d, str) else d for d in kind.shape]
        return np.empty([d or 0 for d in shape], kind.numpy)

    def _updated(self, step: Step) -> list[int]:
        """The inputs that a step overwrites, by index."""
        plugin = self.plugins.get(step.name) if step.kind == "plugin" else None
        return [] if plugin is None else [i for i, name in enumerate(plugin.inputs) if name.rstrip("?") in plugin.updates]

    def _segment(self, step: Step) -> Call:
        if step.name not in self.sessions:
            proto = onnx.load_model_from_string(self.plan.segment(step.name))
            # ONNX Runtime has no kernels for bfloat16: it is computed in float32, and rounded where a value leaves the segment.
            self.sessions[step.name] = session(widen_model(proto) if has_bfloat16(proto) else proto, optimize=True), has_bfloat16(proto)
        runner, wide = self.sessions[step.name]
        names = [i.name for i in runner.get_inputs()]
        dtypes = [np.dtype(self.plan.manifest.values[name].dtype) for name in step.outputs]

        def call(inputs: list[Array]) -> list[Array]:
            feeds = dict(zip(names, inputs, strict=True))
            try:
                results = runner.run(None, widen_arrays(feeds) if wide else feeds)
                return [r.astype(dtype) for r, dtype in zip(results, dtypes, strict=True)] if wide else list(results)
            except Exception as error:
                raise RewriteError(f"segment {step.name} ({step.nodes[0]} ...) fails: {str(error).strip().splitlines()[0][:300]}") from error

        return call

    def _plugin(self, step: Step) -> Call:
        plugin = self.plugins[step.name]
        attributes = {**plugin.attributes, **step.attributes}

        def call(inputs: list[Array]) -> list[Array]:
            with np.errstate(all="ignore"):
                result = plugin.reference(*inputs, **attributes)
            return [np.asarray(r) for r in result] if isinstance(result, tuple) else [np.asarray(result)]

        return call
