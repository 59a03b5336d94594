"""Ranks with a GPU each, by NCCL through CuPy: sums and joins on the stream of the computation, which may be captured in a CUDA graph.

NCCL is told who is there over another communicator (MPI). A rank that ends without `close` makes the others wait for ever.
Source: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/colls.html
"""

from __future__ import annotations

import ctypes
import glob
import os
import site
import sys
from typing import Any

from rewrite.errors import RewriteError
from rewrite.plugins.cuda_collectives import Host

LOCAL = ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID", "PMI_LOCAL_RANK")  # what launchers call a rank's number on its host
TYPES = {"float16": 6, "bfloat16": 9, "float32": 7, "float64": 8, "int32": 2, "int64": 4}  # ncclDataType_t, of which CuPy does not name all


def local_rank() -> int:
    """The number of this rank among those of its host, as the launcher tells; 0 if none does."""
    return next((int(os.environ[n]) for n in LOCAL if os.environ.get(n, "").isdecimal()), 0)


def choose_device() -> int:
    """Use the GPU of this rank's number on its host; returns it. Raises RewriteError if there are not so many."""
    import cupy

    count, mine = int(cupy.cuda.runtime.getDeviceCount()), local_rank()
    if mine >= count:
        raise RewriteError(f"rank {mine} of this host has no GPU: there are {count}; start as many ranks on a host as it has GPUs")
    cupy.cuda.Device(mine).use()
    return mine


def load_library() -> None:
    """Load NCCL from the wheel nvidia-nccl, where CuPy does not look for it; nothing if that is not installed."""
    for folder in [*site.getsitepackages(), *sys.path]:
        for library in glob.glob(os.path.join(glob.escape(folder), "nvidia/nccl/lib/libnccl.so.2")):
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
            return


def _id_bytes(found: Any) -> bytes:
    """NCCL's id, of which older versions of CuPy make a tuple of signed numbers, as bytes."""
    return bytes(found) if isinstance(found, (bytes, bytearray)) else bytes(int(b) & 255 for b in found)


class Nccl:
    """The ranks of `host`, each with its current GPU. Arrays are CuPy's; what is done is enqueued on the current stream.

    Raises RewriteError if CuPy has no NCCL, or NCCL refuses.
    """

    def __init__(self, host: Host):
        load_library()
        try:
            from cupy.cuda import nccl
        except ImportError as error:
            raise RewriteError(f"NCCL cannot be used ({str(error)[:200]}); install nvidia-nccl-cu13 beside CuPy") from error
        if not getattr(nccl, "available", True):  # CuPy's own word for a library that it did not find
            raise RewriteError("NCCL cannot be used (CuPy does not find it); install nvidia-nccl-cu13 beside CuPy")
        self.nccl, self.rank, self.size = nccl, host.rank, host.size
        mine = _id_bytes(nccl.get_unique_id()) if host.rank == 0 else bytes(128)
        try:
            self.communicator = nccl.NcclCommunicator(host.size, host.exchange(mine)[0], host.rank)
        except Exception as error:  # NcclError is made by CuPy, where there is NCCL
            raise RewriteError(f"NCCL refuses rank {host.rank} of {host.size}: {' '.join(str(error).split())[:200]}") from error

    def _type(self, x: Any) -> int:
        if x.dtype.name not in TYPES:
            raise RewriteError(f"NCCL sums no {x.dtype.name}; it sums {', '.join(TYPES)}")
        return TYPES[x.dtype.name]

    @staticmethod
    def _stream() -> int:
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)

    def all_reduce_into(self, x: Any, y: Any) -> None:
        """y = the sum of x over ranks, in its own type; both contiguous and of one shape, or the same array."""
        self.communicator.allReduce(x.data.ptr, y.data.ptr, x.size, self._type(x), self.nccl.NCCL_SUM, self._stream())

    def gather_into(self, x: Any, parts: Any) -> None:
        """parts [size, ...] = the x of each rank; both contiguous."""
        self.communicator.allGather(x.data.ptr, parts.data.ptr, x.size, self._type(x), self._stream())

    def send(self, x: Any, rank: int) -> None:
        """Give contiguous `x` to another rank, which receives it."""
        self.communicator.send(x.data.ptr, x.size, self._type(x), rank, self._stream())

    def receive(self, x: Any, rank: int) -> None:
        """Overwrite contiguous `x` by what another rank sends."""
        self.communicator.recv(x.data.ptr, x.size, self._type(x), rank, self._stream())

    def broadcast(self, x: Any, root: int) -> None:
        """Overwrite contiguous `x` by that of rank `root`."""
        self.communicator.bcast(x.data.ptr, x.size, self._type(x), root, self._stream())

    def close(self) -> None:
        """End it, when all ranks are through; without this a rank that ends lets the others wait."""
        self.communicator.destroy()
