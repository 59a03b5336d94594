"""What is known of GPUs: measured where we had one, else from datasheets, and marked so.

Measured (DESIGN's facts): the copy of large arrays on H100 and H200, the matrix ceiling on H100, NCCL's sums of two H200. Of others the
datasheet's bandwidth and matrix rate count by the share that an H100 reaches of its own (2961 of 3350 GB/s, 660 of 990 TFLOP/s).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import pairwise

from rewrite.errors import RewriteError

COPY_SHARE, MATRIX_SHARE = 2961 / 3350, 660 / 990
STREAM_SHARE = 2600 / 2961  # of the copy's bandwidth, what products of few tokens with large weights reach (cuBLAS and our kernels on an H100)
LAUNCH_US = 2.3  # a small kernel in a CUDA graph, measured: no call takes less
# Bytes and microseconds of NCCL's sum over two H200 (NV18 links of 450 GB/s each way), captured in a CUDA graph.
NCCL_POINTS = ((8 << 10, 6.7), (64 << 10, 7.2), (1 << 20, 13.8), (16 << 20, 74.0))
NCCL_LINK = 450.0
HOP_US = 1.0  # assumed: each rank more than two makes a sum so much later
NETWORK_GB, NETWORK_US = 50.0, 15.0  # assumed between hosts: one 400 Gb/s adapter a GPU, and the time until the first byte
SEND_US = 5.0  # assumed: the time until the first byte of a message between GPUs of one host


@dataclass(frozen=True)
class Device:
    """A GPU: memory in bytes, bandwidth in GB/s, matrix rates in TFLOP/s of 16-bit and 32-bit floats, its link to others in GB/s each way.

    `source` says of what is not measured where it comes from.
    """

    name: str
    memory: int
    bandwidth: float
    rate16: float
    rate32: float
    link: float
    source: str

    def sum_us(self, size: int, ranks: int, hosts: int = 1) -> float:
        """Microseconds of a sum of so many bytes over ranks."""
        if ranks == 1:
            return 0.0
        share = 2 * (ranks - 1) / ranks  # of its bytes, what each rank sends; 1 for two
        if hosts > 1:
            return NETWORK_US + size * share / NETWORK_GB / 1e3
        base = NCCL_POINTS[0][1]
        return base + (_between(size * share) - base) * NCCL_LINK / self.link + HOP_US * (ranks - 2)

    def join_us(self, size: int, ranks: int, hosts: int = 1) -> float:
        """Microseconds of a join to so many bytes: half of what a sum of them sends."""
        return self.sum_us(size // 2, ranks, hosts)

    def send_us(self, size: int, hosts: int = 1) -> float:
        """Microseconds of a message to a rank of the next stage."""
        return NETWORK_US + size / NETWORK_GB / 1e3 if hosts > 1 else SEND_US + size / self.link / 1e3


def _between(size: float) -> float:
    """Microseconds on the line through the measured points; beyond them at the rate of the last two."""
    if size <= NCCL_POINTS[0][0]:
        return NCCL_POINTS[0][1]
    for (a, low), (b, high) in pairwise(NCCL_POINTS):
        if size <= b:
            return low + (high - low) * (size - a) / (b - a)
    (a, low), (b, high) = NCCL_POINTS[-2:]
    return high + (high - low) * (size - b) / (b - a)


def _datasheet(name: str, gigabytes: float, bandwidth: float, rate16: float, rate32: float, link: float) -> Device:
    return Device(name, int(gigabytes * 1e9), bandwidth * COPY_SHARE, rate16 * MATRIX_SHARE, rate32 * MATRIX_SHARE, link, "datasheet, times what an H100 reaches of its own")


DEVICES = {
    "H100": Device("H100", 80_000_000_000, 2961.0, 660.0, 67 * MATRIX_SHARE, 450.0, "measured; link and float32 from the datasheet, NCCL's times measured on two H200"),
    "H200": Device("H200", 141_000_000_000, 4259.0, 660.0, 67 * MATRIX_SHARE, 450.0, "measured; matrix rate that of the H100, link and float32 from the datasheet"),
    "A100": _datasheet("A100", 80, 2039, 312, 19.5, 300),
    "L40S": _datasheet("L40S", 48, 864, 362, 91.6, 32),
    "B200": _datasheet("B200", 180, 8000, 2250, 80, 900),
}


def parse_gpus(text: str) -> tuple[Device, int]:
    """`4xH100`, `16 H200`, `H100` as the device and how many. Raises RewriteError for anything else."""
    count, _, name = text.strip().replace("*", "x").replace(" ", "x").rpartition("x")
    found = next((d for n, d in DEVICES.items() if n.lower() == name.lower()), None)
    if found is None:
        close = difflib.get_close_matches(name.upper(), DEVICES, 1, 0.4)
        raise RewriteError(f"--gpus {text!r}: there is no description of {name!r}; {f'did you mean {close[0]!r}?' if close else 'known are ' + ', '.join(DEVICES)} Write for example 4xH100")
    if count and (not count.isdecimal() or not 0 < int(count) <= 4096):
        raise RewriteError(f"--gpus {text!r}: {count!r} is no number of GPUs; write for example 4xH100")
    return found, int(count or 1)
