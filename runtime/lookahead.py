"""Several steps of a model, one after the other: what a `Decoder` does where the tokens have to be chosen on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rewrite.runtime.advance import advance
from rewrite.runtime.batch import Batch
from rewrite.runtime.sampling import Row, Sampler, Samples


def step_by_step(step: Callable[[Batch], Any], sampler: Sampler, batch: Batch, rows: list[Row], count: int, block_size: int) -> list[Samples]:
    """The samples of up to `count` steps, see `requests.Decoder`; fewer where no row has a next token, or all texts are over."""
    rows = [dataclasses.replace(row, tokens=list(row.tokens)) for row in rows]
    every: list[Samples] = []
    over = [False] * len(rows)
    while len(every) < count and not all(over):
        samples = sampler.sample(step(batch), range(len(rows)), rows)
        every.append(samples)
        tokens = samples.tokens.clip(0)  # after a row without a token nobody looks at it any more
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            over[i] = over[i] or samples.tokens[i] < 0 or token in row.sampling.stop_tokens
            row.tokens.append(token)
        batch = advance(batch, tokens, block_size)
    return every
