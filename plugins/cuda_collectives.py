"""Sums over GPUs of one host by a kernel of ours (`one_shot.cu`), which reads and writes the memory of the other ranks over NVLink.

Each rank allocates a workspace and tells the others its handle (CUDA IPC), once; a sum is then one launch, with bias, residual
and, if wanted, the norm that follows. No multicast of NVLink is used.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from rewrite.errors import RewriteError
from rewrite.plugins.cuda_launch import Launch, launcher, module

RANKS, BLOCKS, SLOTS = 8, 132, 8192  # as in one_shot.cu
WORLDS = (2, 4, 8)
PUSH_MOST = 1 << 20  # bytes up to which a sum is pushed or pulled at all
REASON = 120  # bytes of what an error says


class Host(Protocol):
    """What is needed of a communicator between the processes."""

    rank: int
    size: int

    def exchange(self, data: bytes) -> list[bytes]:
        """What each rank gives, all of the same length, by rank."""


class _Peers(ctypes.Structure):
    _fields_ = [("mine", ctypes.c_void_p), ("at", ctypes.c_void_p * RANKS)]


def workspace_bytes(most: int) -> int:
    """Of sums up to `most` bytes: counters and flags, two halves of pushed values of all ranks (doubled by their epochs), two of own ones."""
    vectors = -(-most // 16)
    return SLOTS + 16 * vectors * (4 * RANKS + 2)


def blocks_of(vectors: int) -> tuple[int, int]:
    """Blocks and threads for so many vectors of 8 values: one each, while there are that many multiprocessors."""
    threads = 128 if vectors <= 128 * BLOCKS else 512
    return min(BLOCKS, -(-vectors // threads)), threads


class OneShot:
    """The workspaces of all ranks, mapped here. Every rank makes it, and every sum, in the same order.

    `most` is the size in bytes up to which it sums. Raises RewriteError, on all ranks, if the GPUs of one cannot map the memory of the others.
    """

    def __init__(self, host: Host, most: int = PUSH_MOST):
        import cupy

        self.runtime, self.rank, self.size = cupy.cuda.runtime, host.rank, host.size
        self.vectors = -(-most // 16)
        total = -(-workspace_bytes(most) // (2 << 20)) * (2 << 20)  # whole pages: a handle leads to the beginning of a page
        self.base = self.runtime.malloc(total)
        self.runtime.memset(self.base, 0, total)
        self.runtime.deviceSynchronize()
        handles = host.exchange(bytes(self.runtime.ipcGetMemHandle(self.base)))
        self.opened: dict[int, int] = {}
        reason = b""
        try:
            for rank in [r for r in range(host.size) if r != host.rank]:
                self.opened[rank] = self.runtime.ipcOpenMemHandle(handles[rank])
        except Exception as error:  # CUDARuntimeError, which CuPy has only where there is CUDA
            reason = f"{error}".encode()[:REASON]
        reasons = host.exchange(reason.ljust(REASON))  # all have mapped all, or one tells why not
        failed = next((f"rank {r}: {text.decode(errors='replace').strip()}" for r, text in enumerate(reasons) if text.strip()), None)
        if failed is not None:
            self.close(host)
            raise RewriteError(f"GPUs of this host cannot map one another's memory ({failed}); sums are left to NCCL")
        places = [self.opened.get(rank, self.base) for rank in range(host.size)]
        self.peers = _Peers(self.base, (ctypes.c_void_p * RANKS)(*places))

    def close(self, host: Host) -> None:
        """Give the memory back, when all ranks are through."""
        self.runtime.deviceSynchronize()
        host.exchange(b" ")
        for place in self.opened.values():
            self.runtime.ipcCloseMemHandle(place)
        host.exchange(b" ")
        self.runtime.free(self.base)

    def fits(self, *arrays: Any) -> bool:
        """Whether there is a kernel for these arrays, of which the first is summed; None is none."""
        x, given = arrays[0], [a for a in arrays if a is not None]
        alike = all(a.dtype == x.dtype and a.flags.c_contiguous and a.data.ptr % 16 == 0 for a in given)
        return self.size in WORLDS and x.dtype.name in ("float16", "bfloat16") and alike and x.shape[-1] % 8 == 0 and 0 < x.size <= 8 * self.vectors

    def sum(self, x: Any, y: Any, bias: Any = None, residual: Any = None, way: str = "push") -> Launch | None:
        """y = sum over ranks of x + bias + residual; None where there is no kernel for these arrays. `way` is push or pull."""
        if not self.fits(x, y, bias, residual):
            return None
        vectors, width = x.size // 8, x.shape[-1] // 8
        blocks, threads = blocks_of(vectors)
        function = module("one_shot", x.dtype.name).get_function(f"{way}_{self.size}")
        whole = [ctypes.c_int(n) for n in (self.rank, self.vectors, vectors, width)]
        return launcher(function, (blocks,), threads, [y, x, bias, residual, self.peers, *whole], keep=self)

    def sum_norm(self, x: Any, y: Any, z: Any, scale: Any, epsilon: float, bias: Any = None, residual: Any = None) -> Launch | None:
        """The same, and z = the RMS norm of y's rows times scale [N]; None where there is no kernel for these arrays."""
        width = x.shape[-1] // 8
        if not self.fits(x, y, z, scale, bias, residual) or width > 4 * 512:
            return None
        vectors = next(n for n in (1, 2, 4) if width <= 512 * n)
        threads, rows = min(512, -(-width // (32 * vectors)) * 32), x.size // x.shape[-1]
        function = module("one_shot", x.dtype.name).get_function(f"push_norm_{vectors}_{self.size}")
        whole = [ctypes.c_int(n) for n in (self.rank, self.vectors, rows, width)]
        return launcher(function, (min(BLOCKS, rows),), threads, [y, z, x, bias, residual, scale, ctypes.c_float(epsilon), self.peers, *whole], keep=self)


def add(y: Any, bias: Any, residual: Any) -> Launch | None:
    """y += bias + residual, where y is a sum that was made elsewhere; None if there is neither. In float32 by our kernel for 16-bit floats."""
    if bias is None and residual is None:
        return None
    given = [a for a in (y, bias, residual) if a is not None]
    if y.dtype.name in ("float16", "bfloat16") and y.shape[-1] % 8 == 0 and all(a.dtype == y.dtype and a.flags.c_contiguous and a.data.ptr % 16 == 0 for a in given):
        vectors, width = y.size // 8, y.shape[-1] // 8
        function = module("one_shot", y.dtype.name).get_function("addRest")
        return launcher(function, (min(8 * BLOCKS, -(-vectors // 256)),), 256, [y, bias, residual, ctypes.c_longlong(vectors), ctypes.c_int(width)])

    def launch() -> None:
        for more in given[1:]:
            y[...] += more

    return launch
