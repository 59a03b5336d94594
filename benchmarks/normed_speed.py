"""Products in turns and norms in their launches: right against float64, and how fast against a launch each; attention with a mask for all queries.

    python benchmarks/normed_speed.py --seconds 40

Times are those of `kernel_speed.py`: medians in a CUDA graph, weights in turn. A product that is timed alone is the fastest of cuBLASLt and all our layouts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cupy
import numpy as np
import record
from kernel_speed import ACTIVATE, POISON, WIDTHS, compile_all, error, median_us, random

from rewrite.plugins import cuda_attention, cuda_gemm, cuda_matmul, cuda_norms
from rewrite.plugins.cublaslt import product as library_product
from rewrite.plugins.cuda_gemm import Normed, Product, Shape
from rewrite.plugins.cuda_launch import module

LIMIT = {"float16": 1e-3, "bfloat16": 8e-3}
TURNS = [Shape("turns", t) for t in cuda_gemm.TURNS]
LAYOUTS = [*(Shape("wide", t) for t in cuda_gemm.WIDE), *(Shape("narrow", t, s) for t in (64, 128) for s in (1, 2))]
ATTENTIONS = [(b, 12, s, 32) for b, s in ((1, 512), (8, 512), (32, 512), (1, 128))] + [(b, h, s, 64) for h in (12, 16) for b, s in ((1, 512), (8, 512), (32, 512), (1, 128))]
LATE = (("AHEAD = MASK && ROWS", "AHEAD = false"),)
ONE_BY_ONE = (*LATE, ("if (MASK == 2 && c.pairs && step", "if (false && step"))


def variants() -> Iterator[tuple[Any, ...]]:
    for dtype, activation in (("float16", "none"), ("float16", "gelu"), ("bfloat16", "none")):
        yield from (cuda_gemm.variant(s, dtype, activation, False) for s in TURNS + (LAYOUTS if dtype == "float16" else []))
    for width, kind, dtype in itertools.product((384, 768, 1024), ("layer", "rms"), ("float16", "bfloat16")):
        if (kind, dtype) == ("layer", "float16") or width == 768:
            yield from (cuda_gemm.variant(s, dtype, "none", False, kind) for s in cuda_gemm.normed_shapes(width))
    for size in (32, 64):
        (cut,) = (c for c in cuda_attention.cuts(size, 90) if c.hopper)
        yield cuda_attention.variant(cut, size, "float16", 0, True, False, False, True)
        for name, dtype, defines, changes in (cuda_attention.variant(cut, size, "float16", 2, True, False, False, True),):
            yield from ((name, dtype, defines, changes + more) for more in ((), LATE, ONE_BY_ONE))


def check_turns() -> list[dict[str, Any]]:
    rows, rng = [], cupy.random.default_rng(0)
    for dtype, (tokens, widths, inner), activation in itertools.product(
        ("float16", "bfloat16"), [(1, (64,), 64), (31, (384,), 384), (129, (768,) * 3, 768), (500, (200, 72), 328), (5000, (1152,), 384), (4133, (1032,), 1536)], ("none", "gelu"),
    ):  # fmt: skip
        if (dtype, activation) == ("bfloat16", "gelu"):
            continue
        x, jobs, wants = random(rng, tokens, inner, dtype=dtype), [], []
        for n in widths:
            residual = random(rng, tokens, n, dtype=dtype) if activation == "none" else None
            w, bias = random(rng, n, inner, dtype=dtype, scale=inner**-0.5), random(rng, n, dtype=dtype)
            jobs.append(Product(cupy.empty((tokens, n), dtype), w, bias, residual))
            want = ACTIVATE[activation](x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64))
            wants.append(want if residual is None else want + residual.astype(np.float64))
        for shape in TURNS:
            for _ in range(2):
                for job in jobs:
                    job.y[...] = POISON
                cuda_gemm.product(x, jobs, activation, shape=shape)()
                worst = max(error(j.y, want) for j, want in zip(jobs, wants, strict=True))
                rows.append({"dtype": dtype, "sizes": [tokens, *widths, inner], "activation": activation, "layout": str(shape), "error": worst, "right": worst < LIMIT[dtype]})
    return report("turns", rows)


def check_normed() -> list[dict[str, Any]]:
    """Sums far from zero in half of the cases: the spread is not what is left of the squares."""
    rows, rng = [], cupy.random.default_rng(1)
    assert not cuda_gemm.normed_shapes(520)
    cases = itertools.product(("float16", "bfloat16"), ((384, 384), (384, 1536), (768, 768), (768, 3072), (1024, 1024)), (1, 31, 129, 500, 4133), ("layer", "rms"))
    for index, (dtype, (width, inner), tokens, kind) in enumerate(cases):
        if (kind, dtype) != ("layer", "float16") and width != 768:
            continue
        x, w = random(rng, tokens, inner, dtype=dtype), random(rng, width, inner, dtype=dtype, scale=inner**-0.5)
        bias, scale, shift = (random(rng, width, dtype=dtype) for _ in range(3))
        residual = random(rng, tokens, width, dtype=dtype) + cupy.asarray(20 * (index % 2), dtype) if index % 3 else None
        y = cupy.empty((tokens, width), dtype) if index % 2 else None
        total = x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64) + (0 if residual is None else residual.astype(np.float64))
        centred = total - (total.mean(-1, keepdims=True) if kind == "layer" else 0)
        want = centred / cupy.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * scale.astype(np.float64) + (shift.astype(np.float64) if kind == "layer" else 0)
        for shape in cuda_gemm.normed_shapes(width):
            out, seen = cupy.empty((tokens, width), dtype), []
            launch = cuda_gemm.product(x, [Product(y, w, bias, residual)], shape=shape, norm=Normed(kind, out, scale, shift if kind == "layer" else None, 1e-5))
            for _ in range(3):
                out[...] = POISON
                if y is not None:
                    y[...] = POISON
                launch()
                worst = max(error(out, want), error(y, total) if y is not None else 0.0)
                seen.append(out.copy())
            same = all(bool((s == seen[0]).all()) for s in seen)
            row = {"dtype": dtype, "sizes": [tokens, width, inner], "kind": kind, "layout": str(shape), "y": y is not None, "residual": residual is not None, "error": worst, "same": same}
            rows.append(row | {"right": worst < LIMIT[dtype] and same})
    return report("normed", rows)


def report(what: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        if not row["right"]:
            print("WRONG", what, json.dumps(row), flush=True)
    print(f"{what}: {sum(r['right'] for r in rows)} of {len(rows)} right, worst {max(r['error'] for r in rows):.1e}", flush=True)
    return rows


def time_products(tokens: int, name: str) -> list[dict[str, Any]]:
    """Each product of a layer: the fastest of cuBLASLt and the layouts there were, in turns; for those before a norm, with that in its own launch and in theirs."""
    rows, rng = [], cupy.random.default_rng(2)
    width, _, hidden = WIDTHS[name]
    for what, parts, features, inner, activation in (("out", 1, width, width, "none"), ("down", 1, width, hidden, "none"), ("qkv", 3, width, width, "none"), ("up", 1, hidden, width, "gelu")):
        sets = max(1, min(6, (100 << 20) // (parts * features * inner * 2))) if name != "minilm" else 1
        x, scale, shift, normed = random(rng, tokens, inner), random(rng, features), random(rng, features), cupy.empty((tokens, features), np.float16)
        residual = random(rng, tokens, features) if what in ("out", "down") else None
        calls = [[Product(cupy.empty((tokens, features), np.float16), random(rng, features, inner, scale=inner**-0.5), random(rng, features), residual) for _ in range(parts)] for _ in range(sets)]
        makers: dict[str, Callable[[list[Product]], list[Callable[[], None]]]] = {}
        makers["cuBLASLt"] = lambda jobs: [library(x, j, activation) for j in jobs]  # noqa: B023  called in this round
        for shape in LAYOUTS + TURNS:
            if shape.kind != "narrow" or tokens <= 1024:
                makers[str(shape)] = lambda jobs, shape=shape: [cuda_gemm.product(x, jobs, activation, shape=shape)]  # type: ignore[misc]  # noqa: B023
        times = {label: median_us(made := [one for jobs in calls for one in make(jobs)], rounds=5) * len(made) / sets for label, make in makers.items()}
        before = {k: v for k, v in times.items() if not k.startswith("turns")}
        best, turned = min(before, key=before.__getitem__), min((k for k in times if k.startswith("turns")), key=times.__getitem__)
        row: dict[str, Any] = {"model": name, "what": what, "tokens": tokens, "features": parts * features, "inner": inner, "us": times, "best": best, "turns": turned}
        told = f"{best} {times[best]:.2f}, {turned} {times[turned]:.2f}"
        if residual is not None:
            fastest = min(times, key=times.__getitem__)
            pairs = []
            for jobs in calls:
                norm = cuda_norms.norm("layer", jobs[0].y, scale, shift, normed, 1e-5)
                assert norm is not None
                pairs += [*makers[fastest](jobs), norm]
            row["pair_us"] = median_us(pairs, rounds=5) * 2
            joined = {}
            for shape in cuda_gemm.normed_shapes(features):
                after = Normed("layer", normed, scale, shift, 1e-5)
                joined[str(shape)] = median_us([cuda_gemm.product(x, [Product(None, j[0].w, j[0].bias, j[0].residual)], shape=shape, norm=after) for j in calls], rounds=5)
            row["joined_us"] = joined
            told += f"; {fastest} + norm {row['pair_us']:.2f}, joined {', '.join(f'{k} {v:.2f}' for k, v in joined.items())}"
        rows.append(row)
        print(f"{name} {what} {tokens} x {parts * features} x {inner}: {told}", flush=True)
    return rows


def library(x: Any, p: Product, activation: str) -> Callable[[], None]:
    multiply = library_product(p.y[None], x[None], p.w[None], trans_w=True, bias=p.bias, residual=None if p.residual is None else p.residual[None])
    if activation == "none":
        return multiply
    activate = cuda_matmul.elementwise(cuda_matmul.ACTIVATIONS[activation], p.y, p.y)

    def launch() -> None:
        multiply()
        activate()

    return launch


def masks() -> list[dict[str, Any]]:
    """A mask that is the same for all queries: read one by one when it is needed (as before), in a row, and in a row a step earlier."""
    rows, rng = [], cupy.random.default_rng(3)
    for batch, heads, length, size in ATTENTIONS:
        q, k, v, y = (random(rng, batch, length, heads, size).transpose(0, 2, 1, 3) for _ in range(4))
        mask = cupy.zeros((batch, 1, 1, length), np.float16)
        mask[..., length - length // 8 :] = -10000
        (cut,) = (c for c in cuda_attention.cuts(size, 90) if c.hopper)
        scores = cupy.matmul(q.astype(np.float32), k.astype(np.float32).swapaxes(-1, -2)) * 0.125 + mask.astype(np.float32)
        weights = cupy.exp(scores - scores.max(-1, keepdims=True))
        want = cupy.matmul(weights / weights.sum(-1, keepdims=True), v.astype(np.float32))
        row: dict[str, Any] = {"sizes": [batch, heads, length, size]}
        for label, changes in (("before", ONE_BY_ONE), ("in a row", LATE), ("ahead", ())):
            cuda_attention.module = lambda name, dtype, defines, old, changes=changes: module(name, dtype, defines, old + changes)  # type: ignore[attr-defined]
            launch = cuda_attention.flash(q, k, v, mask, y, (0.125, 0.0, 0.0, 0, 0, 0), cut)
            y[...] = POISON
            launch()
            row[label] = {"us": median_us([launch], rounds=5), "error": error(y, want)}
        row["open_us"] = median_us([cuda_attention.flash(q, k, v, None, y, (0.125, 0.0, 0.0, 0, 0, 0), cut)], rounds=5)
        row["right"] = all(row[n]["error"] < 2e-3 for n in ("before", "in a row", "ahead"))
        rows.append(row)
        told = ", ".join(f"{n} {row[n]['us']:.1f}" for n in ("before", "in a row", "ahead"))
        print(f"attention {row['sizes']}: {told}, no mask {row['open_us']:.1f}, right {row['right']}", flush=True)
    cuda_attention.module = module  # type: ignore[attr-defined]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing further after that")
    parser.add_argument("--output", default="normed_speed")
    options = parser.parse_args()
    started = time.monotonic()
    compile_all(variants())
    print(f"kernels compiled after {time.monotonic() - started:.0f} s", flush=True)
    device, results = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), {}
    parts: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = [("turns", check_turns), ("normed", check_normed)]
    parts += [(f"{name} {tokens}", partial(time_products, tokens, name)) for tokens in (16384, 4096) for name in WIDTHS]
    parts += [("masks", masks), *((f"{name} {tokens}", partial(time_products, tokens, name)) for tokens in (1024, 512, 256) for name in WIDTHS)]
    for label, part in parts:
        if time.monotonic() - started > options.seconds:
            print(f"{label}: left out, time is up", flush=True)
            continue
        try:
            results[label] = part()
        except Exception as problem:  # the rest shall be seen
            print(f"FAILED {label}: {type(problem).__name__}: {str(problem)[:300]}", flush=True)
            results[label] = [{"failed": str(problem)[:300]}]
        record.write(options.output, device, record.versions("cupy-cuda13x", "numpy"), results)
    print(f"done after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
