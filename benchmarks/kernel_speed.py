"""Our CUDA kernels one by one: right against float64, and how fast against the libraries and the ceilings of the card.

    python benchmarks/kernel_speed.py                       everything (about 2 minutes on an H100)
    python benchmarks/kernel_speed.py --only products       products, decoding, chains, attention or norms

Each time is the median of the GPU time of one launch among 20 in a CUDA graph. Weights are different ones in turn where a model's
would not stay in the L2 cache. Ceilings: a product of 8192 x 8192 x 8192 by cuBLASLt, and a copy of 1 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import cupy
import numpy as np
import record

from rewrite.plugins import cuda_attention, cuda_chain, cuda_gemm, cuda_matmul, cuda_norms
from rewrite.plugins.cublaslt import product as library_product
from rewrite.plugins.cuda_launch import compiled

WIDTHS = {"minilm": (384, 12, 1536), "bert-base": (768, 12, 3072), "bert-large": (1024, 16, 4096)}  # width, heads, hidden
POISON = float("nan")


def median_us(launches: Sequence[Callable[[], None]], rounds: int = 7, least: int = 20) -> float:
    """GPU time of one launch: the launches in turn, captured in one graph."""
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for launch in launches:
            launch()
        stream.synchronize()
        repeats = -(-least // len(launches))
        stream.begin_capture()
        for _ in range(repeats):
            for launch in launches:
                launch()
        graph = stream.end_capture()
        times = []
        for _ in range(rounds):
            first, last = cupy.cuda.Event(), cupy.cuda.Event()
            first.record(stream)
            graph.launch(stream)
            last.record(stream)
            last.synchronize()
            times.append(cupy.cuda.get_elapsed_time(first, last) * 1e3 / (repeats * len(launches)))
    return statistics.median(times[1:])


def random(rng: Any, *shape: int, dtype: str = "float16", scale: float = 1.0) -> Any:
    return (rng.standard_normal(shape, dtype=np.float32) * scale).astype(dtype)


def error(got: Any, want: Any) -> float:
    """||got - want|| / ||want||; NaN never passes."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    size = float(cupy.linalg.norm(want))
    value = float(cupy.linalg.norm(got - want)) / (size or 1.0)
    return value if value == value else float("inf")


def ceilings() -> dict[str, float]:
    rng = cupy.random.default_rng(0)
    a, b, y = (random(rng, 1, 8192, 8192) for _ in range(3))
    us = median_us([library_product(y, a, b, trans_w=True)], least=3)
    big, other = cupy.zeros(1 << 29, np.uint8), cupy.empty(1 << 29, np.uint8)
    copy = median_us([lambda: cupy.cuda.runtime.memcpyAsync(other.data.ptr, big.data.ptr, big.nbytes, 3, cupy.cuda.get_current_stream().ptr)], least=3)
    return {"tflops": 2 * 8192**3 / us / 1e6, "gbs": 2 * big.nbytes / copy / 1e3}


ACTIVATE = {"none": lambda v: v, "gelu": lambda v: 0.5 * v * (1 + _erf(v / 2**0.5)), "swish": lambda v: v / (1 + cupy.exp(-v))}


def _erf(x: Any) -> Any:
    from cupyx.scipy.special import erf

    return erf(x)


def compile_all(wanted: Iterable[tuple[Any, ...]]) -> None:
    """Fill the cache of compiled kernels with all processors."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, sorted(set(wanted))))


def _compile(wanted: tuple[Any, ...]) -> None:
    compiled(*wanted, 90)


def check_products() -> list[dict[str, Any]]:
    """Every layout on awkward sizes against float64; outputs poisoned."""
    rows, rng = [], cupy.random.default_rng(0)
    layouts = cuda_gemm.shapes(1000, 520, 1032)
    compile_all(cuda_gemm.variant(s, d, a, g) for s in layouts for d in ("float16", "bfloat16") for a in ACTIVATE for g in (False, True))
    cases = [(1, 64, 64), (7, 72, 40), (33, 200, 328), (130, 384, 1536), (257, 1152, 384), (1000, 520, 1032)]
    for dtype, (tokens, features, inner), gated in itertools.product(("float16", "bfloat16"), cases, (False, True)):
        x = random(rng, tokens, inner, dtype=dtype)
        jobs = []
        for index in range(2):
            w, bias = random(rng, features, inner, dtype=dtype, scale=inner**-0.5), random(rng, features, dtype=dtype)
            jobs.append(cuda_gemm.Product(cupy.empty((tokens, features), dtype), w, bias, random(rng, tokens, features, dtype=dtype) if index == 0 and not gated else None))
        wide = [j.w.astype(np.float64) for j in jobs]
        sums = [x.astype(np.float64) @ w.T + j.bias.astype(np.float64) for w, j in zip(wide, jobs, strict=True)]
        for activation in ACTIVATE:
            act = ACTIVATE[activation]
            want = [act(sums[0]) * sums[1]] if gated else [act(sums[0]) + jobs[0].residual.astype(np.float64), act(sums[1])]
            for shape in [*cuda_gemm.shapes(tokens, features, inner), cuda_gemm.Shape("wide", 256)]:
                for job in jobs:
                    job.y[...] = POISON
                cuda_gemm.product(x, jobs, activation, gated, shape)()
                worst = max(error(j.y, w) for j, w in zip(jobs, want, strict=False))
                limit = 1e-3 if dtype == "float16" else 8e-3
                if not worst < limit:
                    print(f"WRONG product {dtype} {tokens}x{features}x{inner} gated={gated} {activation} {shape}: {worst:.1e}", flush=True)
                rows.append({"dtype": dtype, "sizes": [tokens, features, inner], "gated": gated, "activation": activation, "layout": str(shape), "error": worst, "right": worst < limit})
    print(f"products: {sum(r['right'] for r in rows)} of {len(rows)} right, worst {max(r['error'] for r in rows):.1e}", flush=True)
    return rows


def time_products(limits: dict[str, float], all_layouts: bool) -> list[dict[str, Any]]:
    rows, rng = [], cupy.random.default_rng(0)
    print(f"{'product':34} {'library':>8} {'ours':>8} {'layout':>12} {'chosen':>8} {'TFLOP/s':>8} {'of peak':>8} {'GB/s':>6}")
    for name, (width, _, hidden) in WIDTHS.items():
        for tokens in (32, 128, 256, 512, 1024, 4096, 16384):
            for what, parts, features, inner, activation in (("qkv", 3, width, width, "none"), ("out", 1, width, width, "none"), ("up", 1, hidden, width, "gelu"), ("down", 1, width, hidden, "none")):
                sets = max(1, min(8, (100 << 20) // (parts * features * inner * 2))) if name != "minilm" else 1
                x = random(rng, tokens, inner)
                calls = []
                for _ in range(sets):
                    residual = random(rng, tokens, features) if what in ("out", "down") else None
                    w = [random(rng, features, inner, scale=inner**-0.5) for _ in range(parts)]
                    calls.append([cuda_gemm.Product(cupy.empty((tokens, features), np.float16), one, random(rng, features), residual) for one in w])
                library = []
                for jobs in calls:
                    for j in jobs:
                        library.append(library_product(j.y[None], x[None], j.w[None], trans_w=True, bias=j.bias, residual=None if j.residual is None else j.residual[None]))
                        if activation != "none":
                            library.append(cuda_matmul.elementwise(cuda_matmul.ACTIVATIONS[activation], j.y, j.y))
                row: dict[str, Any] = {"model": name, "what": what, "tokens": tokens, "features": features * parts, "inner": inner, "library_us": median_us(library) * len(library) / sets}
                chosen = cuda_gemm.choose(tokens, [features] * parts, inner)[0]
                times = {}
                for shape in cuda_gemm.shapes(tokens, features * parts, inner) if all_layouts else [chosen]:
                    times[str(shape)] = median_us([cuda_gemm.product(x, jobs, activation, shape=shape) for jobs in calls])
                best = min(times, key=times.__getitem__)
                row |= {"layouts_us": times, "best": best, "best_us": times[best], "chosen": str(chosen), "chosen_us": times[str(chosen)]}
                row["tflops"] = 2 * tokens * features * parts * inner / times[best] / 1e6
                row["gbs"] = 2 * (parts * features * inner + tokens * (inner + parts * features)) / times[best] / 1e3
                rows.append(row)
                label = f"{name} {what} {tokens} x {features * parts} x {inner}"
                us, share = f"{row['library_us']:8.1f} {row['best_us']:8.1f} {best:>12} {row['chosen_us']:8.1f}", row["tflops"] / limits["tflops"]
                print(f"{label:34} {us} {row['tflops']:8.0f} {share:8.0%} {row['gbs']:6.0f}", flush=True)
    return rows


DECODERS = {"llama-1b": (2048, (2048, 512, 512), 8192, 128256), "llama-8b": (4096, (4096, 1024, 1024), 14336, 128256)}  # width, Q K V, hidden, words


def time_decoding(limits: dict[str, float], all_layouts: bool) -> list[dict[str, Any]]:
    """The products of one token of each of a few texts: weights are nearly all that is moved, and come from memory each time."""
    rows, rng, dtype = [], cupy.random.default_rng(0), "bfloat16"
    cases = []
    for name, (width, heads, hidden, words) in DECODERS.items():
        products = [("qkv", heads, width), ("out", (width,), width), ("gate, up", (hidden, hidden), width), ("down", (width,), hidden), ("head", (words,), width)]
        for (what, parts, inner), tokens in itertools.product(products, (1, 8, 32, 64)):
            layouts = cuda_gemm.shapes(tokens, sum(parts), inner) if all_layouts else cuda_gemm.choose(tokens, [sum(parts)] if what == "gate, up" else parts, inner)
            cases.append((name, what, parts, inner, tokens, layouts))
    compile_all(cuda_gemm.variant(s, dtype, "swish" if what == "gate, up" else "none", what == "gate, up") for _, what, _, _, _, layouts in cases for s in layouts)
    print(f"{'decoding':38} {'library':>8} {'ours':>8} {'layout':>14} {'chosen':>8} {'GB/s':>6} {'of copy':>8}")
    for name, what, parts, inner, tokens, layouts in cases:
        gated, features, sets = what == "gate, up", sum(parts), -(-(200 << 20) // (sum(parts) * inner * 2))
        x = random(rng, tokens, inner, dtype=dtype)
        calls, library = [], []
        for _ in range(sets):
            residual = random(rng, tokens, features, dtype=dtype) if what in ("out", "down") else None
            jobs = [cuda_gemm.Product(cupy.empty((tokens, n), dtype), random(rng, n, inner, dtype=dtype, scale=inner**-0.5), None, residual) for n in parts]
            calls.append(jobs)
            library += [library_product(j.y[None], x[None], j.w[None], trans_w=True, residual=None if residual is None else residual[None]) for j in jobs]
        activation = "swish" if gated else "none"
        times = {str(s): median_us([cuda_gemm.product(x, jobs, activation, gated, s) for jobs in calls]) for s in layouts}
        best, chosen = min(times, key=times.__getitem__), str(cuda_gemm.choose(tokens, [features] if gated else parts, inner)[0])
        moved = 2 * (features * inner + tokens * (inner + features))
        row = {"model": name, "what": what, "tokens": tokens, "features": features, "inner": inner, "library_us": median_us(library) * len(library) / sets, "layouts_us": times}
        row |= {"best": best, "best_us": times[best], "chosen": chosen, "chosen_us": times[chosen], "gbs": moved / times[best] / 1e3}
        rows.append(row)
        label, share = f"{name} {what} {tokens} x {features} x {inner}", row["gbs"] / limits["gbs"]
        print(f"{label:38} {row['library_us']:8.2f} {row['best_us']:8.2f} {best:>14} {row['chosen_us']:8.2f} {row['gbs']:6.0f} {share:8.0%}", flush=True)
    return rows


def check_chains() -> list[dict[str, Any]]:
    """Layers of a decoder (output product, norm, gated product, the one after it, norm, queries, keys and values) against float64; outputs poisoned.

    What a link reads of those before it is taken as they wrote it, so that each is measured alone; twice, since a launch leaves its counters as it found them.
    """
    rows, rng = [], cupy.random.default_rng(0)
    compile_all(cuda_chain.variant(d, a) for d in ("float16", "bfloat16") for a in ("swish", "gelu"))
    sizes = [(1, 2048, (2048, 512, 512), 8192), (1, 4096, (4096, 1024, 1024), 14336), (4, 4096, (4096, 1024, 1024), 14336), (3, 256, (256, 64, 64), 512), (7, 1024, (1024,) * 3, 4096)]
    sizes += [(2, 520, (72, 40, 40), 1000), (6, 2048, (512, 512, 512), 768), (5, 384, (384,) * 3, 1536), (8, 64, (64, 8, 8), 64)]
    for dtype, (tokens, width, heads, hidden), biased, layers in itertools.product(("bfloat16", "float16"), sizes, (False, True), (1, 3)):
        normed, limit = dtype == "bfloat16", 1e-3 if dtype == "float16" else 8e-3
        activation, epsilon = "gelu" if biased else "swish", 1e-5

        def new(*shape: int, scale: float = 1.0, dtype: str = dtype) -> Any:
            return random(rng, *shape, dtype=dtype, scale=scale)

        def empty(n: int, tokens: int = tokens, dtype: str = dtype) -> Any:
            return cupy.full((tokens, n), POISON, dtype)

        def weight(n: int, k: int, y: Any = None, residual: Any = None, biased: bool = biased, empty: Any = empty, new: Any = new) -> cuda_gemm.Product:
            return cuda_gemm.Product(empty(n) if y is None else y, new(n, k, scale=k**-0.5), new(n) if biased else None, residual)

        links = []
        read = new(tokens, heads[0])
        stream = new(tokens, width)
        for _ in range(layers):
            out = weight(width, heads[0], residual=stream)
            first = cuda_chain.Norm(out.y, new(width), empty(width), epsilon) if normed else None
            links.append(cuda_chain.Link(read, [out], norm=first))
            gate = [weight(hidden, width), weight(hidden, width)]
            links.append(cuda_chain.Link(first.y if first else out.y, gate, activation, True))
            down = weight(width, hidden, residual=out.y)
            second = cuda_chain.Norm(down.y, new(width), empty(width), epsilon) if normed else None
            links.append(cuda_chain.Link(gate[0].y, [down], norm=second))
            links.append(cuda_chain.Link(second.y if second else down.y, [weight(n, width) for n in heads]))
            read, stream = links[-1].products[0].y, down.y
        parts = [links[i : i + 4] for i in range(0, len(links), 4)]  # a layer each
        assert all(cuda_chain.refusal(part) is None for part in parts), [cuda_chain.refusal(part) for part in parts]
        memory, worst = cuda_chain.new_memory(max(map(cuda_chain.memory_bytes, parts))), 0.0
        launches = [cuda_chain.chain(part, memory) for part in parts]
        for _ in range(2):
            for link in links:
                for p in link.outputs:
                    p.y[...] = POISON
            for launch in launches:
                launch()
            before: Any = None
            for link in links:
                x = link.x.astype(np.float64)
                if before is not None and before.norm is not None:
                    y = before.products[0].y.astype(np.float64)
                    x = (y * before.norm.scale.astype(np.float64)) / cupy.sqrt((y * y).mean(-1, keepdims=True) + before.norm.epsilon)
                sums = [x @ p.w.astype(np.float64).T + (0 if p.bias is None else p.bias.astype(np.float64)) for p in link.products]
                act = ACTIVATE[link.activation]
                want = [act(sums[0]) * sums[1]] if link.gated else [act(s) for s in sums]
                for p, value in zip(link.outputs, want, strict=True):
                    worst = max(worst, error(p.y, value + (0 if p.residual is None else p.residual.astype(np.float64))))
                before = link
        if not worst < limit:
            print(f"WRONG chain {dtype} {tokens} tokens, {width}, {heads}, {hidden}, bias {biased}, {layers} layers: {worst:.1e}", flush=True)
        rows.append({"dtype": dtype, "tokens": tokens, "sizes": [width, *heads, hidden], "bias": biased, "layers": layers, "error": worst, "right": worst < limit})
    print(f"chains: {sum(r['right'] for r in rows)} of {len(rows)} right, worst {max(r['error'] for r in rows):.1e}", flush=True)
    return rows


def time_chains(limits: dict[str, float], batches: tuple[int, ...] = (1, 2, 4, 8)) -> list[dict[str, Any]]:
    """All products of a decoding step but the head, one layer a launch; beside launches one by one."""
    rows, rng, dtype = [], cupy.random.default_rng(0), "bfloat16"
    for name, layers in (("llama-1b", 16), ("llama-8b", 12)):
        width, heads, hidden, _ = DECODERS[name]
        weights = []
        for _ in range(layers):
            made = {"out": (width, width), "gate": (hidden, width), "up": (hidden, width), "down": (width, hidden), "q": (heads[0], width), "k": (heads[1], width), "v": (heads[2], width)}
            weights.append({n: random(rng, *s, dtype=dtype, scale=s[1] ** -0.5) for n, s in made.items()} | {"s": random(rng, width, dtype=dtype)})
        moved = sum(a.nbytes for w in weights for a in w.values())
        for tokens in batches:
            values = {n: cupy.zeros((tokens, s), dtype) for n, s in (("x", width), ("normed", width), ("q", heads[0]), ("k", heads[1]), ("v", heads[2]), ("gate", hidden))}
            x, P = values["x"], cuda_gemm.Product
            chains, single = [], []
            for w in weights:
                norm = cuda_chain.Norm(x, w["s"], values["normed"], 1e-5)
                qkv = [P(values[n], w[n]) for n in "qkv"]
                gated = [P(values["gate"], w["gate"]), P(values["gate"], w["up"])]
                chains.append([
                    cuda_chain.Link(values["q"], [P(x, w["out"], None, x)], norm=norm), cuda_chain.Link(values["normed"], gated, "swish", True),
                    cuda_chain.Link(values["gate"], [P(x, w["down"], None, x)], norm=norm), cuda_chain.Link(values["normed"], qkv),
                ])  # fmt: skip
                normed = cuda_norms.norm("rms", x, w["s"], None, values["normed"], 1e-5)
                single += [cuda_gemm.product(values["q"], [P(x, w["out"], None, x)]), normed, cuda_gemm.product(values["normed"], gated, "swish", True)]
                single += [cuda_gemm.product(values["gate"], [P(x, w["down"], None, x)]), normed, cuda_gemm.product(values["normed"], qkv)]
            row: dict[str, Any] = {"model": name, "tokens": tokens, "layers": layers, "bytes": moved}
            for kind, launches in (("single", single), ("layer", [cuda_chain.chain(c) for c in chains])):
                row[f"{kind}_us"] = median_us(launches, least=3) * len(launches)
            rows.append(row)
            told = ", ".join(f"{k} {row[f'{k}_us']:.0f} us ({moved / row[f'{k}_us'] / 1e3:.0f} GB/s)" for k in ("single", "layer"))
            print(f"chain {name} x {layers} layers, {tokens} tokens: {told}", flush=True)
    return rows


def check_attention() -> list[dict[str, Any]]:
    from rewrite.registry import library

    reference = library().plugins["FusedAttention"].reference
    rows, rng = [], cupy.random.default_rng(0)
    flags = [(m, r, c, p, not p) for m, r, p in ((0, True, False), (2, True, False), (2, False, True), (1, False, False), (2, False, False)) for c in (True, False)]
    compile_all(cuda_attention.variant(cut, d, dtype, *f) for d in (16, 32, 64, 96, 128) for cut in cuda_attention.cuts(d, 90) for dtype in ("float16", "bfloat16") for f in flags)
    sizes = [(2, 4, 2, 17, 17, 16), (1, 3, 3, 1, 130, 32), (2, 2, 1, 33, 77, 64), (3, 2, 2, 128, 128, 32), (1, 4, 2, 200, 200, 128), (2, 2, 2, 65, 65, 96)]
    for dtype, (b, h, g, s, t, d), kind, causal in itertools.product(("float16", "bfloat16"), sizes, ("none", "row", "full", "bool", "nan"), (0, 1)):
        q, k, v = random(rng, b, s, h, d, dtype=dtype).transpose(0, 2, 1, 3), random(rng, b, t, g, d, dtype=dtype).transpose(0, 2, 1, 3), random(rng, b, g, t, d, dtype=dtype)
        mask = None
        if kind != "none":
            seen = rng.random((b, 1, 1 if kind == "row" else s, t)) < 0.7
            seen[..., 0] = True
            if kind in ("bool", "nan"):
                seen[0, 0, -1] = False
            lowest = -np.inf if kind == "nan" else -60000.0
            mask = seen if kind == "bool" else cupy.where(seen, 0, lowest).astype(dtype)
        options = {"scale": 0.2, "softcap": 5.0 if kind == "full" else 0.0, "fill": -3.4e38, "drop": 0, "zero_masked": int(kind == "nan"), "causal": causal}
        exact = [None if a is None else a.get() if a.dtype == bool else a.get().astype(np.float64) for a in (q, k, v, mask)]
        with np.errstate(all="ignore"):
            want = cupy.asarray(reference(*exact, **options))
        for cut in cuda_attention.cuts(d, 90):
            y = cupy.full((b, s, h, d), POISON, dtype).transpose(0, 2, 1, 3)
            cuda_attention.flash(q, k, v, mask, y, tuple(options.values()), cut)()
            worst = error(y, want)
            limit = 2e-3 if dtype == "float16" else 1.2e-2
            if not worst < limit:
                print(f"WRONG attention {dtype} {[b, h, g, s, t, d]} {kind} causal={causal} {cut}: {worst:.1e}", flush=True)
            rows.append({"dtype": dtype, "sizes": [b, h, g, s, t, d], "mask": kind, "causal": causal, "cut": str(cut), "error": worst, "right": worst < limit})
    print(f"attention: {sum(r['right'] for r in rows)} of {len(rows)} right, worst {max(r['error'] for r in rows):.1e}", flush=True)
    return rows


def time_attention(limits: dict[str, float]) -> list[dict[str, Any]]:
    rows, rng = [], cupy.random.default_rng(0)
    print(f"{'attention':26} {'mask':5} {'cuDNN':>8} {'ours':>8} {'cut':>12} {'TFLOP/s':>8} {'of peak':>8}")
    for (b, s), (h, d), kind in itertools.product(itertools.product((1, 8, 32, 128), (32, 128, 512)), ((12, 32), (12, 64), (16, 64)), ("none", "row", "full")):
        q, k, v, y = (random(rng, b, s, h, d).transpose(0, 2, 1, 3) for _ in range(4))
        mask = None
        if kind != "none":  # padding on the right: an eighth
            mask = cupy.zeros((b, 1, 1 if kind == "row" else s, s), np.float16)
            mask[..., s - s // 8 :] = -10000
        row: dict[str, Any] = {"batch": b, "heads": h, "length": s, "size": d, "mask": kind}
        try:
            wide = mask if kind != "row" else cupy.broadcast_to(mask, (b, 1, s, s))
            row["cudnn_us"] = median_us([cuda_attention._fused(q, k, v, wide, y, 0.125, False)])
        except Exception as problem:
            row["cudnn_us"], row["cudnn_error"] = float("nan"), str(problem)[:200]
        times = {}
        for cut in cuda_attention.cuts(d, 90):
            times[str(cut)] = median_us([cuda_attention.flash(q, k, v, mask, y, (0.125, 0.0, 0.0, 0, 0, 0), cut)])
        best = min(times, key=times.__getitem__)
        row |= {"cuts_us": times, "best": best, "best_us": times[best], "tflops": 4 * b * h * s * s * d / times[best] / 1e6}
        rows.append(row)
        print(f"{f'{b} x {h} x {s} x {d}':26} {kind:5} {row['cudnn_us']:8.1f} {row['best_us']:8.1f} {best:>12} {row['tflops']:8.0f} {row['tflops'] / limits['tflops']:8.0%}", flush=True)
    for problem in {r["cudnn_error"] for r in rows if "cudnn_error" in r}:
        print("cuDNN:", problem)
    return rows


def norms(limits: dict[str, float]) -> list[dict[str, Any]]:
    rows, rng = [], cupy.random.default_rng(0)
    for kind, tokens, width, dtype in itertools.product(("layer", "rms"), (32, 1001, 16384), (384, 768, 1024, 1032, 4096, 8192), ("float16", "bfloat16")):
        x, scale, bias, y = random(rng, tokens, width, dtype=dtype), random(rng, width, dtype=dtype), random(rng, width, dtype=dtype), cupy.full((tokens, width), POISON, dtype)
        launch = cuda_norms.norm(kind, x, scale, bias, y, 1e-5)
        assert launch is not None
        launch()
        w = x.astype(np.float64)
        w -= w.mean(-1, keepdims=True) if kind == "layer" else 0
        want = w / cupy.sqrt((w * w).mean(-1, keepdims=True) + 1e-5) * scale.astype(np.float64) + bias.astype(np.float64)
        worst, us = error(y, want), median_us([launch])
        right, gbs = worst < (1e-3 if dtype == "float16" else 8e-3), 4 * tokens * width / us / 1e3
        rows.append({"kind": kind, "dtype": dtype, "tokens": tokens, "width": width, "error": worst, "right": right, "us": us, "gbs": gbs})
    print(f"norms: {sum(r['right'] for r in rows)} of {len(rows)} right, worst {max(r['error'] for r in rows):.1e}")
    for r in rows:
        if r["dtype"] == "float16" and r["kind"] == "layer":
            print(f"norm {r['tokens']} x {r['width']}: {r['us']:.1f} us, {r['gbs']:.0f} GB/s, {r['gbs'] / limits['gbs']:.0%}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="products,decoding,chains,attention,norms")
    parser.add_argument("--all-layouts", action="store_true", help="time every layout of a product, not only the chosen one")
    parser.add_argument("--output", default="kernel_speed")
    options = parser.parse_args()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    limits = ceilings()
    print(f"{device}: {limits['tflops']:.0f} TFLOP/s, {limits['gbs']:.0f} GB/s", flush=True)
    results: dict[str, Any] = {"ceilings": limits}
    if "products" in options.only:
        results["products_right"], results["products"] = check_products(), time_products(limits, options.all_layouts)
    if "decoding" in options.only:
        results["decoding"] = time_decoding(limits, options.all_layouts)
    if "chains" in options.only:
        results["chains_right"], results["chains"] = check_chains(), time_chains(limits)
    if "attention" in options.only:
        results["attention_right"], results["attention"] = check_attention(), time_attention(limits)
    if "norms" in options.only:
        results["norms"] = norms(limits)
    path = record.write(options.output, device, record.versions("cupy-cuda13x", "numpy"), results)
    print(json.dumps({"written": str(path)}))


if __name__ == "__main__":
    main()
