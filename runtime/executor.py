"""Who runs a plan: the CPU (ONNX Runtime and NumPy) or a GPU (TensorRT and CuPy)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rewrite.registry import library
from rewrite.runtime import engine
from rewrite.runtime.machine import check_engines, check_plugins

if TYPE_CHECKING:
    from rewrite.runtime.plan import Plan


class Executor(Protocol):
    """A plan, loaded on a device."""

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs by name. Raises RewriteError for inputs that `Plan.check` refuses."""


def make_executor(plan: Plan) -> Executor:
    """The executor for the plan's device. Raises RewriteError if the device or its software is missing, or does not fit the plan."""
    check_plugins(plan.manifest, library().plugins, str(plan.directory))
    _ = plan.weights  # compared with their SHA-256, before anything is loaded
    if plan.manifest.world > 1:
        from rewrite.runtime.all_ranks import AllRanks

        return AllRanks(plan)
    if plan.device == "cpu":
        from rewrite.runtime.cpu import CpuExecutor

        return CpuExecutor(plan)
    from rewrite.runtime.cuda import CudaExecutor, device

    device()  # or else what is missing is not TensorRT
    check_engines(plan.manifest, str(plan.directory), engine.version(), engine.capability())
    return CudaExecutor(plan)
