"""What the CUDA executor of one rank does with the others: launches for the sums, joins and messages of a plan, on its stream, that a graph may hold.

Sums of few bytes within one host are our one-shot kernel's, with bias, residual and a norm that follows; all else is NCCL's. A rank that
computes waits for the others on the device, so all of a stage must enqueue the same sums and joins in the same order, and stages the messages
between them: what a rank does alone
(compiling, finding out that memory is short) is done in `agreed`, in which nobody waits for anybody.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rewrite.errors import RewriteError
from rewrite.plugins.cuda_collectives import PUSH_MOST, WORLDS, OneShot, add
from rewrite.plugins.cuda_launch import Launch
from rewrite.registry import library
from rewrite.runtime import engine
from rewrite.runtime.machine import check_engines, check_plugins
from rewrite.runtime.nccl import Nccl, choose_device

if TYPE_CHECKING:
    from rewrite.runtime.communication import Communicator
    from rewrite.runtime.cuda import CudaExecutor
    from rewrite.runtime.plan import Plan


class DeviceRanks:
    """The ranks of `host` (MPI), each with the GPU of its number on its host. All make it, and call it, in the same order.

    Sums and joins are among the ranks of a stage, `stages` of which follow one another.

    Raises RewriteError if a host has too few GPUs, or NCCL cannot be used.
    """

    def __init__(self, host: Communicator, stages: int = 1):
        from rewrite.runtime.cuda import device

        self.cupy, self.host, self.size = device(), host, host.size // stages
        self.group = host if stages == 1 else host.split(self.size)
        self.alone: Any = None  # the stream, in `agreed`
        self.device = choose_device()
        self.nccl = Nccl(self.group)
        self.between = self.nccl if stages == 1 else Nccl(host)  # of all ranks
        self.one_shot: OneShot | None = None
        if self._near():
            with contextlib.suppress(RewriteError):  # raised on all
                self.one_shot = OneShot(self.group, PUSH_MOST)

    def _near(self) -> bool:
        """Whether all ranks of the stage are on one host, their GPUs reach one another, and there is a kernel for so many."""
        card = f"{socket.gethostname()[:60]:<60}{self.device:4d}".encode()
        cards = self.group.exchange(card)
        others = {int(c[60:]) for c in cards} - {self.device}
        reached = len({c[:60] for c in cards}) == 1 and len(others) == self.size - 1 and self.size in WORLDS
        reached = reached and all(self.cupy.cuda.runtime.deviceCanAccessPeer(self.device, other) for other in others)
        return all(d == b"1" for d in self.group.exchange(b"1" if reached else b"0"))

    @contextlib.contextmanager
    def agreed(self, stream: Any, shortage: tuple[type[Exception], ...]) -> Iterator[None]:
        """What is done meanwhile succeeds on all ranks, or raises on all, where one is short of memory (`shortage`: the first of these errors,
        each of which means that). Sums, joins and messages are left out, their results zero.
        """
        self.alone = stream
        try:
            yield
            stream.synchronize()
        except shortage:
            self.host.exchange(b"0")
            raise
        finally:
            self.alone = None
        if b"0" in (told := self.host.exchange(b"1")):
            raise shortage[0](f"rank {told.index(b'0')} is out of GPU memory")

    def launch(self, kind: str, inputs: list[Any], outputs: list[Any], source: int = 0, target: int = 0) -> Launch:
        """One sum ("AllReduce": x, bias, residual), join ("AllGather": x) or message ("Send": x, no output; "Recv": no input) between the ranks at
        the same place of stages `source` and `target`. The arrays stay where they are.
        """
        if kind == "AllReduce":
            x, bias, residual = inputs
            return self._unless_alone(self._sum(x, bias, residual, outputs[0]), outputs)
        if kind == "AllGather":
            return self._unless_alone(self._join(inputs[0], outputs[0]), outputs)
        away = (target - source) * self.size
        if kind == "Send":
            return self._unless_alone(lambda: self.between.send(inputs[0], self.host.rank + away), outputs)
        return self._unless_alone(lambda: self.between.receive(outputs[0], self.host.rank - away), outputs)

    def share(self, x: Any) -> Launch:
        """All ranks get what the first one of the last stage has in `x`."""
        return self._unless_alone(lambda: self.between.broadcast(x, self.host.size - self.size), [x])

    def sum_and_norm(self, inputs: list[Any], outputs: list[Any], norm_inputs: list[Any], norm_outputs: list[Any], epsilon: float) -> Launch | None:
        """A sum and the RMS norm of it in one launch; None where there is no kernel for these arrays."""
        (x, bias, residual), y, z = inputs, outputs[0], norm_outputs[0]
        if self.one_shot is None or norm_inputs[0].shape[-1] != x.shape[-1] or any(_overlap(z, a) for a in (x, residual) if a is not None):
            return None
        made = self.one_shot.sum_norm(x, y, z, norm_inputs[1], epsilon, bias, residual)
        return None if made is None else self._unless_alone(made, [y, z])

    def _unless_alone(self, made: Launch, results: list[Any]) -> Launch:
        def launch() -> None:
            if self.alone is None:
                made()
                return
            _clear(self.cupy, results, self.alone)

        return launch

    def _sum(self, x: Any, bias: Any, residual: Any, y: Any) -> Launch:
        made = self.one_shot.sum(x, y, bias, residual) if self.one_shot is not None else None
        if made is not None:
            return made
        rest = add(y, bias, residual)

        def launch() -> None:
            self.nccl.all_reduce_into(x, y)
            if rest is not None:
                rest()

        return launch

    def _join(self, x: Any, y: Any) -> Launch:
        rows, width = x.size // x.shape[-1], x.shape[-1]
        if rows == 1:  # the parts lie one after the other anyway
            return lambda: self.nccl.gather_into(x, y)
        parts = self.cupy.empty((self.size, rows, width), x.dtype)
        bits = f"uint{8 * x.dtype.itemsize}"
        source, target = parts.view(bits).transpose(1, 0, 2), y.reshape(rows, self.size, width).view(bits)

        def launch() -> None:
            self.nccl.gather_into(x, parts)
            target[...] = source

        return launch

    def close(self) -> None:
        """End what waits for the other ranks, when all are through and no captured work is left (`CudaExecutor.close`)."""
        if self.one_shot is not None:
            self.one_shot.close(self.group)
        self.nccl.close()
        if self.between is not self.nccl:
            self.between.close()


class Absent:
    """In the place of `DeviceRanks` where kernels of one rank are timed, and there are no others: what they would tell is zero."""

    def __init__(self, cupy: Any):
        self.cupy = cupy

    def agreed(self, stream: Any, shortage: tuple[type[Exception], ...]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def launch(self, kind: str, inputs: list[Any], outputs: list[Any], source: int = 0, target: int = 0) -> Launch:
        return lambda: _clear(self.cupy, outputs, self.cupy.cuda.get_current_stream())

    def share(self, x: Any) -> Launch:
        return self.launch("Recv", [], [x])

    def sum_and_norm(self, *_: Any) -> None:
        """There is no such kernel for one."""


def _clear(cupy: Any, arrays: list[Any], stream: Any) -> None:
    for array in arrays:
        cupy.cuda.runtime.memsetAsync(array.data.ptr, 0, array.nbytes, stream.ptr)


def _overlap(a: Any, b: Any) -> bool:
    """Whether two packed arrays share memory: then one that is written row by row spoils the other."""
    first, second = sorted((int(x.data.ptr), int(x.data.ptr) + x.nbytes) for x in (a, b))
    return bool(second[0] < first[1])


def lonely_rank(plan: Plan, rank: int) -> CudaExecutor:
    """A rank of a plan for several, without the others."""
    from rewrite.runtime.cuda import CudaExecutor, device

    check_engines(plan.manifest, str(plan.directory), engine.version(), engine.capability())
    return CudaExecutor(plan, rank, Absent(device()))


def open_rank(plan: Plan, host: Communicator) -> tuple[CudaExecutor, DeviceRanks]:
    """This rank of a plan on its GPU. Raises RewriteError for a plan for another number of ranks."""
    from rewrite.runtime.cuda import CudaExecutor

    if plan.manifest.world != host.size:
        raise RewriteError(f"{plan.directory}: it is for {plan.manifest.world} ranks, and there are {host.size} with GPUs; start {plan.manifest.world}, or give a plan for {host.size}")
    check_plugins(plan.manifest, library().plugins, str(plan.directory))
    ranks = DeviceRanks(host, plan.manifest.stages)
    check_engines(plan.manifest, str(plan.directory), engine.version(), engine.capability())
    return CudaExecutor(plan, host.rank, ranks), ranks
