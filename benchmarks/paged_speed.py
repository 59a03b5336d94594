"""Attention over a paged cache on the GPU: right against float64, and how near the speed of memory.

    python benchmarks/paged_speed.py                    check, then time (about 40 seconds on an H100)
    python benchmarks/paged_speed.py --only check       or time, or variants (how the work is divided, reading early)

Times are the medians of one launch in a CUDA graph, as in `kernel_speed.py`; caches are different ones in turn where they would stay
in the L2 cache. Bytes are the keys and values read, over 2961 GB/s, the copy that was measured on the H100.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import record
from kernel_speed import median_us

from rewrite.plugins import cuda_paged, cuda_rotary
from rewrite.plugins.cuda_launch import compiled
from rewrite.plugins.cuda_paged import Cut, Shape, Turn, cut, variant
from rewrite.plugins.rotary import Rotary

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from paged_cases import LIMITS, Case, cases

COPY = 2961e3  # bytes a microsecond
L2 = 60 << 20
HEADS = 32
SHAPES = list(itertools.product((1, 8, 32, 64), (128, 1024, 8192), ((8, 64), (8, 128), (32, 128))))


def compile_all(wanted: Iterable[tuple[Any, ...]]) -> None:
    """Fill the cache of compiled kernels with all processors."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, sorted(set(wanted))))


def _compile(wanted: tuple[Any, ...]) -> None:
    compiled(*wanted, (), 90)


def divisions(case: Case) -> list[Cut]:
    """Equal parts, so small that heads are divided, and clusters."""
    sizes = (case.size, case.value_size or case.size, case.heads // case.kv_heads)
    return [cut(*sizes, least=1), cut(*sizes, cluster=8)]


def wanted_by(case: Case) -> list[tuple[Any, ...]]:
    """The variants that the check of a case may ask for."""
    shape = Shape(case.dtype, case.heads, case.kv_heads, case.size, case.value_size or case.size, case.block, bool(case.window), bool(case.softcap))
    count = (case.turned or case.size) // (1 if case.full else 2)
    norm = 0 if not case.norm else 2 if case.norm == "float32" else 1
    turn = Turn(case.turn, case.turned or case.size, count, norm) if case.turn else Turn(norm=norm)
    few = sum(case.counts) + case.padding <= len(case.counts) + case.empty and case.dtype != "float32"
    return [variant(shape, t, few, made) for t in ({turn} if few else {turn, Turn()}) for made in divisions(case)]


def run_case(case: Case, made: Cut, repeats: int) -> str:
    """Launch a case `repeats` times from the same caches, captured, outputs poisoned; what is wrong with the result."""
    arrays = [None if a is None else cupy.asarray(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) if n < 3 else cupy.asarray(a) for n, a in enumerate(case.inputs())]
    fresh = [a.copy() for a in arrays[3:5]]
    q, v = arrays[0], arrays[2]
    y = cupy.full((1, q.shape[2], case.heads, v.shape[3]), np.nan, q.dtype).transpose(0, 2, 1, 3)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        launch = cuda_paged.paged_attention(arrays, [y, *arrays[3:5]], made=made, **case.attributes())
        if launch is None:
            return "no kernel takes it"
        launch()
        stream.synchronize()
        stream.begin_capture()
        launch()
        graph = stream.end_capture()
        for _ in range(repeats):
            y[...] = np.nan
            for cache, old in zip(arrays[3:5], fresh, strict=True):
                cache[...] = old
            graph.launch(stream)
            stream.synchronize()
            wrong = case.complaint(y.get(), *(a.get() for a in arrays[3:5]))
            if wrong:
                return wrong
    return ""


def check() -> list[dict[str, Any]]:
    rows = []
    compile_all(v for case in cases() for v in wanted_by(case))
    for case, made in [(c, m) for c in cases() for m in divisions(c)]:
        case.make()
        try:
            wrong = run_case(case, made, 3)
        except Exception as problem:
            wrong = f"{type(problem).__name__}: {problem}"[:300]
        rows.append({"case": case.name, "dtype": case.dtype, "division": str(made), "wrong": wrong})
        if wrong:
            print(f"WRONG {case.name} {case.dtype} {made}: {wrong}", flush=True)
    print(f"paged attention: {sum(not r['wrong'] for r in rows)} of {len(rows)} right", flush=True)
    return rows


def check_rotary() -> list[dict[str, Any]]:
    rows, rng = [], np.random.default_rng(0)
    for dtype, shape, kind in itertools.product(LIMITS, ((1, 8, 3, 64), (2, 4, 5, 80), (7, 128)), ("halves", "pairs", "part", "half angles", "flat angles")):
        size = 32 if kind == "part" else shape[-1]
        count = size // 2 if kind == "half angles" else size
        x = cupy.asarray(rng.standard_normal((shape[0], shape[-2], *shape[1:-2], shape[-1])), np.float32).astype(dtype)
        x = x.transpose(0, 2, 1, 3) if x.ndim == 4 else x
        turns = [cupy.asarray(rng.standard_normal((shape[-2], count) if kind == "flat angles" or len(shape) == 2 else (shape[0], shape[-2], count)), np.float32).astype(dtype) for _ in range(2)]
        if kind == "flat angles" and len(shape) == 4:
            turns = [t[None, None] for t in turns]
        y, given = cupy.full(x.shape, np.nan, dtype), {"interleaved": int(kind == "pairs"), "size": 0 if kind != "part" else size}
        launch = cuda_rotary.rotary([x, *turns], [y], **given)
        wrong = "no kernel takes it"
        if launch is not None:
            launch()
            want = Rotary.reference(*(a.get().astype(np.float64) for a in (x, *turns)), **given)
            error = float(np.linalg.norm(y.get().astype(np.float64) - want) / np.linalg.norm(want))
            wrong = "" if error < LIMITS[dtype] else f"differs by {error:.1e}"
        rows.append({"dtype": dtype, "shape": list(shape), "kind": kind, "wrong": wrong})
        if wrong:
            print(f"WRONG rotary {dtype} {shape} {kind}: {wrong}", flush=True)
    print(f"rotary: {sum(not r['wrong'] for r in rows)} of {len(rows)} right", flush=True)
    return rows


class Step:
    """One token each of `batch` texts of `context` keys, as many times as it takes to leave the L2 cache."""

    def __init__(self, batch: int, context: int, kv_heads: int, size: int, *, width: int = 0, dtype: str = "bfloat16", turn: bool = False):
        self.kv_heads, self.size = kv_heads, size
        needed, rng = -(-context // 16), np.random.default_rng(0)
        cache = 2 * batch * needed * 16 * kv_heads * size
        self.bytes = 2 * cache
        one = cupy.random.default_rng(0).standard_normal((batch * needed, 16, kv_heads, size), dtype=np.float32).astype(dtype)
        self.caches = [(one.copy(), one.copy()) for _ in range(max(1, min(24, -(-2 * L2 // (2 * cache)))))]
        tables = np.zeros((batch, max(needed, width)), np.int32)
        tables[:, :needed] = rng.permutation(batch * needed).reshape(batch, needed)
        slots = tables[:, (context - 1) // 16] * 16 + (context - 1) % 16
        self.integers = [cupy.asarray(a.astype(np.int32)) for a in (slots, tables, np.arange(batch + 1), np.full(batch, context))]
        self.q, self.k, self.v = (cupy.asarray(rng.standard_normal((1, batch, h, size)).astype(np.float32)).astype(dtype).transpose(0, 2, 1, 3) for h in (HEADS, kv_heads, kv_heads))
        self.y = cupy.empty((1, batch, HEADS, size), dtype).transpose(0, 2, 1, 3)
        self.angles = [cupy.asarray(rng.standard_normal((1, 1, batch, size)), np.float32).astype(dtype) for _ in range(2)] if turn else [None, None]

    def launches(self, **options: Any) -> list[Any]:
        attributes = {"heads": HEADS, "kv_heads": self.kv_heads, "size": self.size, "scale": 0.1, "window": 0, "softcap": 0.0, "layer": 0}
        made = []
        for keys, values in self.caches:
            launch = cuda_paged.paged_attention([self.q, self.k, self.v, keys, values, *self.integers, *self.angles, None, None], [self.y, keys, values], **attributes, **options)
            assert launch is not None
            made.append(launch)
        return made


def timed(step: Step, **options: Any) -> dict[str, Any]:
    us = median_us(step.launches(**options), rounds=5)
    return {"us": us, "gbs": step.bytes / us / 1e3, "share": step.bytes / us / COPY}


def time() -> list[dict[str, Any]]:
    chosen = {(Shape("bfloat16", HEADS, g, d, d, 16), cuda_paged.choose(d, d, HEADS // g, batch * g, context)) for batch, context, (g, d) in SHAPES}
    compile_all(variant(shape, Turn(), True, made, early) for shape, made in chosen for early in (False, True))
    rows = []
    print(f"{'batch x context x heads x size':32} {'us':>8} {'GB/s':>6} {'of copy':>8}   reading early")
    for batch, context, (kv_heads, size) in SHAPES:
        if 4 * batch * context * kv_heads * size > 12 << 30:
            continue
        step = Step(batch, context, kv_heads, size)
        found, early = timed(step), timed(step, early=True)
        rows.append({"batch": batch, "context": context, "kv_heads": kv_heads, "size": size, **found, "early": early})
        print(f"{f'{batch} x {context} x {kv_heads} x {size}':32} {found['us']:8.2f} {found['gbs']:6.0f} {found['share']:8.0%}   {early['us']:8.2f} {early['share']:8.0%}", flush=True)
    return rows


def variants() -> list[dict[str, Any]]:
    """The choices behind `cuda_paged.choose`, each waiting for the kernel before and reading early."""
    sizes = ((1, 128, 64), (1, 1024, 64), (1, 1024, 128), (1, 8192, 128), (2, 1024, 128), (4, 1024, 128), (8, 1024, 64), (8, 1024, 128), (32, 128, 64), (32, 1024, 64), (32, 1024, 128))
    shapes = [(batch, context, 8, size) for batch, context, size in sizes]

    def choices(batch: int, kv_heads: int, size: int) -> list[Cut]:
        sizes = (size, size, HEADS // kv_heads)
        made = [cut(*sizes, blocks=n, least=least) for n in (2, 3, 4) for least in (4, 8)]
        made += [cut(*sizes, cluster=n, warps=warps, blocks=2) for n, warps in ((16, 4), (8, 4), (8, 8), (4, 4), (4, 8), (2, 4)) if batch * kv_heads * n <= 1024]
        return list(dict.fromkeys(made))

    compile_all(variant(Shape("bfloat16", HEADS, g, d, d, 16), Turn(), True, c, early) for b, _, g, d in shapes for c in choices(b, g, d) for early in (False, True))
    rows = []
    for shape in shapes:
        line, step = [], Step(*shape)
        for choice in choices(shape[0], *shape[2:]):
            try:
                times = [timed(step, made=choice, early=early)["us"] for early in (False, True)]
            except Exception as problem:
                print(choice, str(problem)[:200])
                continue
            rows.append({"shape": shape, "division": str(choice), "us": times[0], "early_us": times[1]})
            line.append(f"{choice}: {times[0]:.2f} {times[1]:.2f}")
        print(" x ".join(map(str, shape)), "|", " | ".join(line), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="check,time")
    parser.add_argument("--output", default="paged_speed")
    options = parser.parse_args()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    results: dict[str, Any] = {}
    if "check" in options.only:
        results["right"], results["rotary"] = check(), check_rotary()
    if "time" in options.only:
        results["times"] = time()
    if "variants" in options.only:
        results["variants"] = variants()
    record.write(options.output, device, record.versions("cupy-cuda13x", "numpy"), results)


if __name__ == "__main__":
    main()
