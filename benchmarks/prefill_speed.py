"""Attention of new tokens over a paged cache (`plugins/paged_prefill.cu`) beside cuDNN over contiguous keys, in one run.

    python benchmarks/prefill_speed.py                      every shape (about a minute on an H100)
    python benchmarks/prefill_speed.py --all-cuts           every way to divide the work, too

Each time is the median of the GPU time of one launch among 20 in a CUDA graph. Work counted: two products of each query with the
keys it sees. cuDNN has the same numbers in contiguous arrays, ragged batches padded to the longest. Ceiling: a product of
8192 x 8192 x 8192 by cuBLASLt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
import record
from kernel_speed import ceilings, compile_all, error, median_us, random

from rewrite.plugins.cuda_attention import _cudnn
from rewrite.plugins.cuda_paged_prefill import CUTS, Cut, packed, prefill, variant

PAGE = 16
HEADS = {"llama-8b": (32, 8, 128), "llama-1b": (32, 8, 64), "gemma2-9b": (16, 8, 256), "llama2-7b": (32, 32, 128)}
MORE = {64: [Cut(128, 3, 4), Cut(192, 2, 3)], 128: [Cut(64, 2, 4), Cut(144, 2, 2)], 256: [Cut(80, 2, 2)]}  # what else was tried


def workloads() -> dict[str, tuple[list[int], list[int]]]:
    """New tokens and those before them, by sequence."""
    found = {f"1 x {n}": ([n], [0]) for n in (512, 1024, 2048, 4096, 8192)}
    ragged = [int(n) for n in np.random.default_rng(0).integers(32, 1024, 32)]
    found |= {"8 x 512": ([512] * 8, [0] * 8), "32 ragged": (ragged, [0] * 32), "512 after 4096": ([512], [4096]), "512 and 31 x 1 after 1024": ([1] * 31 + [512], [1024] * 32)}
    return found


def cudnn(q: Any, k: Any, v: Any, y: Any, scale: float) -> Callable[[], None]:
    """Causal attention, the last query at the last key."""
    library, handle = _cudnn()
    kind = library.data_type.BFLOAT16 if q.dtype.name == "bfloat16" else library.data_type.HALF
    graph = library.pygraph(io_data_type=kind, intermediate_data_type=library.data_type.FLOAT, compute_data_type=library.data_type.FLOAT, handle=handle)
    tensors = [graph.tensor(dim=list(a.shape), stride=[n // 2 for n in a.strides], data_type=kind) for a in (q, k, v)]
    same = q.shape[2] == k.shape[2]
    out, _ = graph.sdpa(q=tensors[0], k=tensors[1], v=tensors[2], attn_scale=scale, use_causal_mask=same, use_causal_mask_bottom_right=not same, is_inference=True)
    out.set_output(True).set_dim(list(y.shape)).set_stride([n // 2 for n in y.strides])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([library.heur_mode.A, library.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = cupy.empty(max(graph.get_workspace_size(), 1), cupy.uint8)
    pack = {t: int(a.data.ptr) for t, a in zip([*tensors, out], [q, k, v, y], strict=True)}

    def launch() -> None:
        library.set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
        graph.execute(pack, workspace.data.ptr, handle=handle)

    return launch


def measure(name: str, counts: Sequence[int], before: Sequence[int], heads: tuple[int, int, int], cuts: Sequence[Cut], dtype: str) -> dict[str, Any]:
    rng, (many, groups, size) = cupy.random.default_rng(0), heads
    lengths, tokens, batch, scale = np.add(counts, before), sum(counts), len(counts), heads[2] ** -0.5
    needed = -(-lengths // PAGE)
    order, tables = np.random.default_rng(1).permutation(int(needed.sum())).astype(np.int32), np.full((batch, int(needed.max())), -1, np.int32)
    for b, n in enumerate(needed):
        tables[b, :n] = order[needed[:b].sum() : needed[: b + 1].sum()]
    starts = np.r_[0, np.cumsum(counts)].astype(np.int32)
    keys, values = (random(rng, int(needed.sum()), PAGE, groups, size, dtype=dtype) for _ in range(2))
    q, y = (random(rng, tokens, many, size, dtype=dtype).transpose(1, 0, 2)[None] for _ in range(2))
    indices = [cupy.asarray(a) for a in (tables, starts, lengths.astype(np.int32))]
    seen = sum(n * h + n * (n + 1) // 2 for n, h in zip(counts, before, strict=True))
    row: dict[str, Any] = {"work": name, "heads": heads, "dtype": dtype, "gflop": 4 * seen * size * many / 1e9}
    row["cuts_us"] = {}
    cupy.cuda.Device().synchronize()  # the stream of the timing waits for no other
    for cut in cuts:
        launch = prefill(q, keys, values, y, *indices, scale=scale, window=0, softcap=0.0, cut=cut)
        assert launch is not None
        row["cuts_us"][str(cut)] = median_us([launch])
    row["us"] = row["cuts_us"][str(cuts[0])]
    row["tflops"] = row["gflop"] / row["us"] * 1e3
    # The same keys and queries for cuDNN, padded: sequences begin at the left, so that the mask is the same.
    longest, most, alike = int(lengths.max()), max(counts), len(set(counts)) == len(set(before)) == 1
    if not alike and any(before):
        return row
    wide = [cupy.zeros((batch, n, h, size), dtype) for n, h in ((most, many), (longest, groups), (longest, groups), (most, many))]
    for b in range(batch):
        wide[0][b, : counts[b]] = q[0].transpose(1, 0, 2)[starts[b] : starts[b + 1]]
        for to, cache in ((wide[1], keys), (wide[2], values)):
            to[b, : lengths[b]] = cache[cupy.asarray(tables[b, : needed[b]])].reshape(-1, groups, size)[: lengths[b]]
    try:
        cupy.cuda.Device().synchronize()
        theirs = cudnn(*(a.transpose(0, 2, 1, 3) for a in wide), scale)
        row["cudnn_us"] = median_us([theirs])
        row["difference"] = max(error(y[0].transpose(1, 0, 2)[starts[b] : starts[b + 1]], wide[3][b, : counts[b]]) for b in range(batch))
    except Exception as problem:
        row["cudnn_error"] = str(problem)[:200]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all-cuts", action="store_true", help="time every way to divide the work, not only the chosen one")
    parser.add_argument("--heads", default=",".join(HEADS), help="models by whose heads to measure")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", default="prefill_speed")
    options = parser.parse_args()
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    limits = ceilings()
    print(f"{device}: {limits['tflops']:.0f} TFLOP/s", flush=True)
    chosen = {name: HEADS[name] for name in options.heads.split(",")}
    cuts = {size: [CUTS[size], *(MORE.get(size, []) if options.all_cuts else [])] for _, _, size in chosen.values()}
    compile_all(variant(size, PAGE, packed(many, groups), options.dtype, False, cut) for many, groups, size in chosen.values() for cut in cuts[size])
    rows = []
    print(f"{'heads':10} {'work':26} {'us':>8} {'TFLOP/s':>8} {'of peak':>8} {'cuDNN us':>9} {'differs':>8}", flush=True)
    for model, heads in chosen.items():
        for name, (counts, before) in workloads().items():
            row = measure(name, counts, before, heads, cuts[heads[2]], options.dtype)
            rows.append({"model": model, **row})
            others = " ".join(f"{k} {v:.1f}" for k, v in row["cuts_us"].items())
            theirs = f"{row.get('cudnn_us', float('nan')):9.1f} {row.get('difference', float('nan')):8.1e} {row.get('cudnn_error', '')}"
            print(f"{model:10} {name:26} {row['us']:8.1f} {row['tflops']:8.0f} {row['tflops'] / limits['tflops']:8.0%} {theirs} {others}", flush=True)
    path = record.write(options.output, device, record.versions("cupy-cuda13x", "numpy", "nvidia-cudnn-frontend"), {"ceilings": limits, "rows": rows})
    print(json.dumps({"written": str(path)}))


if __name__ == "__main__":
    main()
