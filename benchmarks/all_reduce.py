"""Sums over two or more GPUs of one host: NCCL in a CUDA graph against our one-shot kernel, right against float64 and how fast.

    python benchmarks/all_reduce.py [--gpus 2]        writes results/all_reduce.json (about 40 s)

One process a GPU, which it starts itself; handles and ids go over pipes here, as they go over MPI elsewhere. Every result is
compared with the sum in float64 on poisoned outputs, over many sums of changing sizes, all ranks bit for bit. Times are the median of
graphs of 50 sums, started together on all ranks, of each graph the slowest rank's.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import statistics
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the names of its types
import numpy as np

KB = 1 << 10
SIZES = (8 * KB, 16 * KB, 64 * KB, 256 * KB, 1024 * KB, 16384 * KB)
WIDTH, COUNT, ROUNDS = 4096, 50, 15


class Pipes:
    """Ranks connected to rank 0 by pipes: `exchange`, as a communicator has it."""

    def __init__(self, rank: int, size: int, lines: list[Any]):
        self.rank, self.size, self.lines = rank, size, lines

    def exchange(self, data: bytes) -> list[bytes]:
        if self.rank:
            self.lines[0].send_bytes(data)
            joined = self.lines[0].recv_bytes()
        else:
            joined = b"".join([data, *(line.recv_bytes() for line in self.lines)])
            for line in self.lines:
                line.send_bytes(joined)
        return [joined[i : i + len(data)] for i in range(0, len(joined), len(data))]


def numbers(host: Pipes, value: float) -> list[float]:
    return [struct.unpack("d", d)[0] for d in host.exchange(struct.pack("d", value))]


def values(rank: int, seed: int, count: int, dtype: str) -> np.ndarray:
    return (np.random.default_rng([seed, rank]).standard_normal(count, np.float32) * 2).astype(dtype)


class Rank:
    """One process: its GPU, NCCL and our workspaces."""

    def __init__(self, host: Pipes):
        import cupy

        from rewrite.plugins.cuda_collectives import OneShot
        from rewrite.runtime.nccl import Nccl

        self.host, self.cupy = host, cupy
        cupy.cuda.Device(host.rank).use()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.nccl = Nccl(host)
        self.ours = OneShot(host)

    def launches(self, way: str, x: Any, y: Any, bias: Any, residual: Any, norm: Any) -> list[Any]:
        """The launches of one sum; [] if there is no kernel."""
        from rewrite.plugins.cuda_norms import norm as norm_kernel

        z, scale = norm if norm is not None else (None, None)
        if way == "nccl":
            rest = [norm_kernel("rms", y, scale, None, z, 1e-5)] if norm is not None else []
            return [lambda: self.nccl.all_reduce_into(x, y), *rest]
        if norm is not None:
            made = self.ours.sum_norm(x, y, z, scale, 1e-5, bias, residual) if way == "push" else None
        else:
            made = self.ours.sum(x, y, bias, residual, way)
        return [] if made is None else [made]

    def check(self, dtype: str) -> dict[str, Any]:
        """Sums of many sizes, one after the other without a pause: the largest error, and whether all ranks have the same bits."""
        cupy, worst, alike, cases = self.cupy, 0.0, True, 0
        rng = np.random.default_rng(1)
        limit = {"float16": 1e-3, "bfloat16": 8e-3}[dtype]
        plans = [(int(rng.choice([1, 2, 3, 7, 33, 100])), int(rng.choice([64, 512, 4096, 5120, 8192])), str(rng.choice(["push", "pull", "norm"])), bool(rng.integers(2))) for _ in range(120)]
        plans = [p for p in plans if p[0] * p[1] * 2 <= 1 << 20]
        done = []
        with self.stream:
            for seed, (rows, width, way, more) in enumerate(plans):
                x = cupy.asarray(values(self.host.rank, seed, rows * width, dtype)).reshape(rows, width)
                bias, residual = (cupy.asarray(values(77, seed + i, n, dtype)) for i, n in ((0, width), (1, rows * width)))
                y, z = (cupy.full((rows, width), 0x7FFF, np.uint16).view(x.dtype) for _ in range(2))  # NaN
                added = (bias, residual.reshape(rows, width)) if more else (None, None)
                scale = cupy.asarray(values(78, seed, width, dtype))
                launches = self.launches("push" if way == "norm" else way, x, y, *added, (z, scale) if way == "norm" else None)
                done.append((seed, rows, width, way, more, x, y, z, launches, added, scale))
            self.stream.synchronize()
            for entry in done:  # back to back
                for launch in entry[8]:
                    launch()
            self.stream.synchronize()
        for seed, rows, width, way, more, _, y, z, launches, *_ in done:
            cases += 1
            if not launches:
                return {"verdict": "NO KERNEL", "case": [rows, width, way, dtype]}
            want = sum(values(r, seed, rows * width, dtype).astype(np.float64) for r in range(self.host.size)).reshape(rows, width)
            if more:
                want = want + values(77, seed, width, dtype).astype(np.float64) + values(77, seed + 1, rows * width, dtype).astype(np.float64).reshape(rows, width)
            got = cupy.asnumpy(y)
            errors = [np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want)]
            if way == "norm":
                stored = got.astype(np.float64)
                normed = stored / np.sqrt((stored**2).mean(-1, keepdims=True) + 1e-5) * values(78, seed, width, dtype).astype(np.float64)
                errors.append(np.linalg.norm(cupy.asnumpy(z).astype(np.float64) - normed) / np.linalg.norm(normed))
            worst = max([worst, *(float(e) if np.isfinite(e) else np.inf for e in errors)])
            digests = self.host.exchange(hashlib.sha256(got.tobytes()).digest())
            alike = alike and len(set(digests)) == 1
        return {"cases": cases, "largest error": worst, "same bits on all ranks": alike, "verdict": "ok" if worst < limit and alike else "WRONG"}

    def time(self, way: str, size: int, dtype: str, residual: bool, norm: bool) -> float | None:
        """Microseconds of one sum of `size` bytes in a graph of many."""
        cupy, width = self.cupy, WIDTH
        with self.stream:
            x, y, z, more = (cupy.asarray(values(self.host.rank, i, size // 2, dtype)).reshape(-1, width) for i in range(4))
            scale = cupy.asarray(values(5, 5, width, dtype))
            launches = self.launches(way, x, y, None, more if residual else None, (z, scale) if norm else None)
            if not launches:
                return None
            for _ in range(3):
                for launch in launches:
                    launch()
            self.stream.synchronize()
            self.stream.begin_capture()
            for _ in range(COUNT):
                for launch in launches:
                    launch()
            graph = self.stream.end_capture()
            times = []
            for _ in range(ROUNDS):
                self.host.exchange(b" ")
                first, last = cupy.cuda.Event(), cupy.cuda.Event()
                first.record(self.stream)
                graph.launch(self.stream)
                last.record(self.stream)
                last.synchronize()
                times.append(max(numbers(self.host, cupy.cuda.get_elapsed_time(first, last) * 1e3 / COUNT)))
        return statistics.median(times[2:])

    def run(self, say: Any) -> dict[str, Any]:
        found: dict[str, Any] = {"device": self.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), "gpus": self.host.size}
        for dtype in ("float16", "bfloat16"):
            found[f"check {dtype}"] = self.check(dtype)
            say(f"check {dtype}: {found[f'check {dtype}']}")
        times: dict[str, Any] = {}
        for residual, norm in ((False, False), (True, False), (True, True)):
            for size in SIZES:
                what = f"{size // KB} KB" + (" + residual" if residual else "") + (" + norm" if norm else "")
                ways = ("nccl", "push", "pull") if not residual else ("nccl", "push") if norm else ("push", "pull")
                times[what] = {way: found_time for way in ways if (found_time := self.time(way, size, "bfloat16", residual, norm)) is not None}
                say(f"{what}: " + ", ".join(f"{way} {us:.2f} us" for way, us in times[what].items()))
        found["microseconds"] = times
        return found

    def close(self) -> None:
        self.ours.close(self.host)
        self.nccl.close()


def work(rank: int, size: int, lines: list[Any]) -> None:
    host = Pipes(rank, size, lines)

    def say(text: str) -> None:
        if not rank:
            print(text, flush=True)

    try:
        made = Rank(host)
        found = made.run(say)
        made.close()
        if not rank:
            import record

            print(f"written to {record.write('all_reduce', found['device'], record.versions('cupy-cuda13x', 'nvidia-nccl-cu13'), found)}", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # NCCL would wait for the others


def start(work: Callable[..., None], size: int, *more: Any) -> bool:
    """Run `work(rank, size, lines, *more)` in a process a rank, `lines` being those of its `Pipes`. False if one ended with an error: then all are killed."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(size - 1)]
    processes = [context.Process(target=work, args=(rank, size, [pairs[rank - 1][1]] if rank else [a for a, _ in pairs], *more)) for rank in range(size)]
    for process in processes:
        process.start()
    while any(p.is_alive() for p in processes):
        for process in processes:
            process.join(0.2)
        if any(p.exitcode for p in processes):
            for process in processes:
                process.kill()
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    size = parser.parse_args().gpus
    if not start(work, size):
        print("VERDICT: FAILED, a rank ended with an error", flush=True)
        sys.exit(1)
    print("VERDICT: done", flush=True)


if __name__ == "__main__":
    main()
