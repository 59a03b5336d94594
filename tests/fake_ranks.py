"""Several ranks, each with a GPU made of NumPy: NCCL and our kernel by what the processes (or threads) tell one another.

Every sum is an exchange that all ranks wait for: whoever makes another one, or one more, hangs or is seen by its size.
"""

from __future__ import annotations

import ctypes
import gc
import queue
import threading
from types import SimpleNamespace

import fake_gpu
import numpy as np

from rewrite.registry import library
from rewrite.runtime import cuda, cuda_ranks
from rewrite.runtime.nccl import local_rank

ALONE = 30  # seconds after which a rank that waits for the others gives up


class Threads:
    """A communicator between threads, as far as ranks with GPUs need one."""

    def __init__(self, rank, size, shared):
        self.rank, self.size, self.shared = rank, size, shared

    def exchange(self, data):
        self.shared.parts[self.rank] = data
        self.shared.barrier.wait(ALONE)
        found = [self.shared.parts[r] for r in range(self.size)]
        self.shared.barrier.wait(ALONE)
        assert len({len(d) for d in found}) == 1, [len(d) for d in found]  # as MPI's buffers want it
        return found

    def split(self, size):
        first = self.rank // size * size
        return Threads(self.rank - first, size, self.shared.groups.setdefault((first, size), _shared(size)))

    def send(self, x, rank):
        self.shared.messages.setdefault((self.rank, rank), queue.Queue()).put(np.array(x))

    def receive(self, x, rank):
        x[...] = self.shared.messages.setdefault((rank, self.rank), queue.Queue()).get(timeout=ALONE)

    def broadcast(self, x):
        x.reshape(-1).view(np.uint8)[...] = np.frombuffer(self.exchange(x.tobytes())[0], np.uint8)


def _shared(size):
    return SimpleNamespace(parts={}, barrier=threading.Barrier(size), groups={}, messages={})


def together(size, work):
    """What `work(communicator)` returns on each rank. Raises what any of them raises."""
    shared, found, wrong = _shared(size), {}, []

    def run(rank):
        try:
            found[rank] = work(Threads(rank, size, shared))
        except BaseException as error:
            wrong.append(error)
            for each in (shared, *shared.groups.values()):
                each.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise next((e for e in wrong if not isinstance(e, threading.BrokenBarrierError)), wrong[0])
    return [found[r] for r in range(size)]


class Nccl:
    """Sums and joins as NCCL makes them; it ends only when nothing captured is left in this process."""

    def __init__(self, host):
        self.host, self.made = host, []

    def _parts(self, x):
        assert x.flags.c_contiguous
        return [np.frombuffer(d, x.dtype).reshape(x.shape) for d in self.host.exchange(np.asarray(x).tobytes())]

    def all_reduce_into(self, x, y):
        self.made.append(("sum", x.shape))
        y[...] = sum(p.astype(np.float32) for p in self._parts(x)).astype(x.dtype)

    def gather_into(self, x, parts):
        self.made.append(("join", x.shape))
        parts[...] = np.stack(self._parts(x)).reshape(parts.shape)

    def send(self, x, rank):
        assert x.flags.c_contiguous
        self.made.append(("send", x.shape))
        self.host.send(np.asarray(x), rank)

    def receive(self, x, rank):
        self.made.append(("receive", x.shape))
        self.host.receive(np.asarray(x), rank)

    def broadcast(self, x, root):
        self.made.append(("broadcast", x.shape))
        x[...] = self._parts(x)[root]

    def close(self):
        if threading.current_thread() is threading.main_thread():
            gc.collect()
            assert not [o for o in gc.get_objects() if isinstance(o, cuda.Frame)]


class OneShot(Nccl):
    """Our kernel: sums in float32 with all that is added, and the norm."""

    def __init__(self, host, most):
        super().__init__(host)
        self.most = most

    def sum(self, x, y, bias=None, residual=None, way="push"):
        if x.nbytes > self.most:
            return None

        def launch():
            self.made.append(("sum", x.shape))
            y[...] = library([]).plugins["AllReduce"].reference(sum(p.astype(np.float32) for p in self._parts(x)), bias, residual).astype(x.dtype)

        return launch

    def sum_norm(self, x, y, z, scale, epsilon, bias=None, residual=None):
        summed, norm = self.sum(x, y, bias, residual), library([]).plugins["RMSNormalization"].reference
        if summed is None:
            return None

        def launch():
            z[...] = np.nan  # a kernel writes rows of z while others are still read
            summed()
            self.made[-1] = ("sum and norm", x.shape)
            z[...] = norm(np.asarray(y), np.asarray(scale), axis=-1, epsilon=epsilon)

        return launch

    def close(self, host):
        pass


def install(monkeypatch, near=True, free=1 << 30, most=1 << 20):
    """Plans for several ranks run with `device="cuda"`, a rank a process or thread. Near ones have our kernel for up to `most` bytes. Returns `cupy`."""
    cupy = fake_gpu.install(monkeypatch, free)
    cupy.cuda.runtime.deviceCanAccessPeer = lambda mine, other: near
    cupy.cuda.runtime.memsetAsync = lambda address, value, size, stream: ctypes.memset(address, value, size)
    monkeypatch.setattr(cuda_ranks, "choose_device", lambda: int(name) if (name := threading.current_thread().name).isdecimal() else local_rank())
    monkeypatch.setattr(cuda_ranks, "check_engines", lambda *_: None)
    monkeypatch.setattr(cuda_ranks, "Nccl", Nccl)
    monkeypatch.setattr(cuda_ranks, "OneShot", lambda host, _: OneShot(host, most))
    monkeypatch.setattr(cuda_ranks, "add", lambda y, bias, residual: None if bias is residual is None else lambda: _add(y, bias, residual))
    return cupy


def _add(y, bias, residual):
    y[...] = library([]).plugins["AllReduce"].reference(y, bias, residual)
