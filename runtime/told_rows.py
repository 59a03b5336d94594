"""Rows of a sampler as whole numbers, for other ranks that choose the same tokens of the same logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from rewrite.runtime.sampling import Row, Sampling

Array = np.ndarray[Any, Any]
ARRAYS = 4  # that say everything

_sampling = lru_cache(4096)(Sampling.from_told)


def pack(rows: Sequence[Row]) -> list[Array]:
    """ARRAYS arrays of int64: how long the text of the parameters is, the text, numbers of each row, tokens of those rows that look at them."""
    texts = list(dict.fromkeys(row.sampling.told for row in rows))
    places = {text: i for i, text in enumerate(texts)}
    text = json.dumps(texts).encode()
    kept = [row.tokens if row.sampling.processed else [] for row in rows]
    numbers = [[places[row.sampling.told], row.prompt, row.choice, len(row.tokens), len(tokens)] for row, tokens in zip(rows, kept, strict=True)]
    seeds = np.array([row.seed for row in rows], np.uint64).view(np.int64)
    table = np.concatenate([np.array(numbers, np.int64).reshape(-1, 5), seeds[:, None]], 1)
    return [np.array([len(text)]), np.frombuffer(text + bytes(-len(text) % 8), np.int64), table, np.array([t for tokens in kept for t in tokens], np.int64)]


def unpack(arrays: Sequence[Array]) -> list[Row]:
    """The rows, as far as their tokens depend on them: where nothing looks at earlier tokens, these are zeros."""
    length, text, table, tokens = arrays
    samplings = [_sampling(t) for t in json.loads(text.tobytes()[: int(length[0])])]
    seeds, rows, place = np.ascontiguousarray(table[:, 5]).view(np.uint64).tolist(), [], 0
    for (number, prompt, choice, known, kept), seed in zip(table[:, :5].tolist(), seeds, strict=True):
        mine = tokens[place : place + kept].tolist() if kept else [0] * known
        rows.append(Row(samplings[number], mine, prompt, seed, choice))
        place += kept
    return rows
