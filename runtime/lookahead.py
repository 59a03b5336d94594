"""Several steps of a model, one after the other: what a `Decoder` does where the tokens have to be chosen on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

from rewrite.runtime.advance import advance
from rewrite.runtime.batch import Batch
from rewrite.runtime.sampling import Row, Sampler, Samples


def step_by_step(step: Callable[[Batch], Any], sampler: Sampler, batch: Batch, rows: list[Row], count: int, more: Callable[[], bool], block_size: int) -> Generator[list[Samples], None, None]:
    """The samples of up to `count` steps, each a part of its own; see `requests.Decoder`."""
    rows = [dataclasses.replace(row, tokens=list(row.tokens)) for row in rows]
    for number in range(count):
        if number and not more():
            return
        samples = sampler.sample(step(batch), range(len(rows)), rows)
        yield [samples]
        tokens = samples.tokens.clip(0)  # after a row without a token nobody looks at it any more
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.tokens.append(token)
        batch = advance(batch, tokens, block_size)
