"""Microseconds of sampling on the GPU: `python benchmarks/sampling_speed.py [--record]`.

One step of sampling, as it stands in the graph of a decode step: graphs of 8 launches are replayed, and the median is divided by 8.
`cold`: the logits come from memory (sets of them are used in turn, 200 MB together); `warm`: from the L2 cache, where the product
before sampling leaves them. Logits: `peaked`, as models have them (a few likely tokens), and `flat`, normal numbers as of random
weights, where top-p keeps half of the vocabulary. Histories: 1,024 tokens of a prompt and 256 generated ones.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import record

from rewrite.runtime import cuda_sampling
from rewrite.runtime.sampling import Row, Sampling

CEILING = 2961e9  # bytes/s of a device copy
LAUNCHES, REPLAYS = 8, 25
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "typical_p 0.9": {"temperature": 0.8, "typical_p": 0.9},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "no_repeat_ngram": 4},
    "greedy, 5 logprobs": {"logprobs": 5},
    "everything": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.95, "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1,
                   "no_repeat_ngram": 4, "logit_bias": {5: 1.0, 70_000: -2.0}, "bad_words": [[9], [5, 8, 7]], "min_new_tokens": 2000, "max_new_tokens": 2000, "stop_tokens": [2]},
}  # fmt: skip


def logits_of(kind: str, sets: int, batch: int, vocabulary: int) -> list[Any]:
    rng = cupy.random.default_rng(batch)
    made = []
    for _ in range(sets):
        x = rng.standard_normal((batch, vocabulary), dtype=cupy.float32)
        made.append(cupy.where(x > 3.4, 2 * x + 8, 2 * x) if kind == "peaked" else x)
    return made


def time_of(kind: dict[str, Any], logits: list[Any], batch: int, vocabulary: int) -> float:
    """Median microseconds of a step."""
    cupy.cuda.Device().synchronize()  # logits are made on another stream
    rng = np.random.default_rng(0)
    rows = [Row(Sampling(**kind), rng.integers(0, vocabulary, 1280).tolist(), 1024, seed=i) for i in range(batch)]
    state = cuda_sampling.CudaSampler().state(batch, vocabulary)
    tokens = cupy.full(batch, -1, np.int64)
    stream, times = cupy.cuda.Stream(non_blocking=True), []
    cupy.cuda.Device().synchronize()
    with stream:
        state.load(rows, steps=LAUNCHES * (2 * len(logits) + REPLAYS))
        graphs = []
        for first in range(0, len(logits), LAUNCHES):
            stream.begin_capture()
            for i in range(LAUNCHES):
                state.enqueue(logits[(first + i) % len(logits)], tokens)
            graphs.append(stream.end_capture())
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        for n in range(REPLAYS + 2):
            begin.record()
            graphs[n % len(graphs)].launch()
            end.record()
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(begin, end) * 1e3 / LAUNCHES)
    assert (tokens.get() >= 0).all()
    assert len(state.samples()) == LAUNCHES * (REPLAYS + 2)
    return float(np.median(times[2:]))


def table(kinds: dict[str, dict[str, Any]], batches: list[int], vocabulary: int, where: list[tuple[str, str]]) -> list[dict[str, Any]]:
    found = []
    for distribution, heat in where:
        for batch in batches:
            size = 4 * batch * vocabulary
            sets = 1 if heat == "warm" else max(LAUNCHES, -(-200_000_000 // size) // LAUNCHES * LAUNCHES)
            logits = logits_of(distribution, sets, batch, vocabulary)
            for name, kind in kinds.items():
                us = time_of(kind, logits, batch, vocabulary)
                part = 100 * size / (us * 1e-6) / CEILING
                found.append({"logits": distribution, "from": heat, "batch": batch, "kind": name, "us": round(us, 2), "percent of copy": round(part, 1)})
                print(f"{distribution:6} {heat:4} batch {batch:2} {name:20} {us:7.2f} us | {part:3.0f} % of 2961 GB/s", flush=True)
            del logits
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--where", nargs="+", default=["peaked cold", "flat cold", "peaked warm", "flat warm"])
    parser.add_argument("--shares", nargs="+", default=[], metavar="THREADSxBLOCKS", help="try these ways to share a row")
    parser.add_argument("--record", action="store_true", help="write results/sampling_speed.json")
    arguments = parser.parse_args()
    kinds, where = {name: KINDS[name] for name in arguments.kinds}, [tuple(w.split()) for w in arguments.where]
    chosen = cuda_sampling.shares
    for way in arguments.shares:
        threads, ranks = map(int, way.split("x"))
        cuda_sampling.shares = lambda vocabulary, rows, t=threads, r=ranks: (t, r, -(-vocabulary // (8 * r)) * 8)
        print(f"--- {way}")
        table(kinds, arguments.batches, arguments.vocabulary, where)
    cuda_sampling.shares = chosen
    found = table(kinds, arguments.batches, arguments.vocabulary, where)
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "sampling_speed.json").write_text(json.dumps(found))
    if arguments.record:
        print(record.write("sampling_speed", device, record.versions("numpy", "cupy-cuda13x"), {"vocabulary": arguments.vocabulary, "times": found}))


if __name__ == "__main__":
    main()
