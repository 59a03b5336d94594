"""Draws on a GPU against the distribution they should have (`python tests/draws_on_gpu.py --record`): a million of each case of draws.py.

Each draw is a row of its own, with its own seed and its own history. A vocabulary beyond the 48 tokens of the cases, impossible
all of them, makes several blocks share a row, which takes other paths of the kernel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from draws import CASES, GENERATED, PROMPT, VOCABULARY, chi_square, distribution

from rewrite.runtime.cuda_sampling import LISTS, Past, SamplerState, asked, pack, template
from rewrite.runtime.sampling import Row, Sampling

ROWS = 8000


def statistic(name: str, count: int, vocabulary: int = VOCABULARY) -> tuple[float, float, int]:
    """(chi-square, its p-value, tokens drawn that have probability 0) of so many draws of one case."""
    s = Sampling(**{"temperature": 1.0, **CASES[name]})
    logits = (np.random.default_rng(len(name)).normal(size=VOCABULARY) * 1.5).astype(np.float32)
    wide = np.full((1, vocabulary), -np.inf, np.float32)
    wide[0, :VOCABULARY] = logits
    row = Row(s, PROMPT + GENERATED, len(PROMPT))
    state, on_gpu, tokens = SamplerState(ROWS, vocabulary), cupy.asarray(wide), cupy.empty(ROWS, np.int64)
    table, lists, _ = pack([row], 1, asked([row], vocabulary)[0], template, Past)
    many, copies = np.repeat(table, ROWS), cupy.empty(ROWS * len(lists), np.uint8)
    for field in LISTS:
        if table[0][field]:
            many[field] += np.uint64(copies.data.ptr) + np.arange(ROWS, dtype=np.uint64) * np.uint64(len(lists))
    observed = np.zeros(vocabulary, np.int64)
    seed = list(CASES).index(name) << 32
    for start in range(0, count, ROWS):
        many["seed"] = seed + start + np.arange(ROWS)
        copies.set(np.tile(lists, ROWS))
        state._fixed[: many.nbytes].set(many.view(np.uint8))
        tokens[...] = -1
        state.enqueue(on_gpu, tokens)
        observed += np.bincount(tokens.get()[: count - start], minlength=vocabulary)
    value, p, impossible = chi_square(observed[:VOCABULARY], distribution(logits, s, row.tokens, row.prompt), count)
    return value, p, impossible + int(observed[VOCABULARY:].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/draws_gpu.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    started = time.perf_counter()
    for name in CASES:
        for vocabulary in (VOCABULARY, 20_000):
            value, p, impossible = statistic(name, arguments.count, vocabulary)
            found[f"{name}, {vocabulary} tokens"] = {"chi-square": round(value, 1), "p": float(f"{p:.3g}"), "impossible tokens": impossible}
            print(f"{name:26} {vocabulary:6} tokens: chi-square {value:7.1f}  p {p:.3g}  impossible {impossible}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        print(record.write("draws_gpu", device, record.versions("numpy", "cupy-cuda13x", "transformers", "torch"), {"draws": arguments.count, "cases": found}))


if __name__ == "__main__":
    main()
