"""Batches padded to few sizes, so that a bounded number of CUDA graphs serves them all.

What is added does nothing: tokens of no sequence, whose keys and values are stored nowhere (slot -1), sequences without tokens and
keys, blocks that no sequence reaches, rows of logits that nobody reads.

A step in which each sequence has at most one token has as many tokens as sequences; any other has more, so that kernels may tell
one from the other by the shapes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.batch import Batch

Array = np.ndarray[Any, Any]
NARROWEST = 8  # blocks of a table


@dataclass(frozen=True)
class Sizes:
    """tokens, sequences, blocks of a table and rows of logits of a step; of rows there are none, or as many as sequences if the engines allow."""

    tokens: int
    sequences: int
    table: int
    rows: int


@dataclass(frozen=True)
class Limits:
    """What a plan's engines were built for: the fewest and most tokens and rows of a step."""

    tokens: tuple[int, int]
    rows: tuple[int, int]

    def check(self, batch: Batch, where: str) -> None:
        """Raises RewriteError for a step that has more."""
        for name, count, (_, most) in (("tokens", len(batch.tokens), self.tokens), ("rows", len(batch.logit_rows), self.rows)):
            if count > most:
                raise RewriteError(f"{where}: a step has {count} {name}, and the engines were built for {most}; take a smaller token budget, or build with --profile {name}=1:64:{count}")


def few(count: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ...: the next one from `count`. Above 16 at most a third is padding."""
    most = power(count)
    return most * 3 // 4 if most > 16 and count <= most * 3 // 4 else most


def many(count: int) -> int:
    """The next of four sizes in each power of two, multiples of 8: from 32 on at most a quarter of it is padding."""
    step = max(8, power(count) // 8)
    return -(-count // step) * step


def power(count: int) -> int:
    """The next power of two from `count`."""
    return 1 << max(count - 1, 0).bit_length()


def sizes_of(batch: Batch, limits: Limits) -> Sizes:
    """The bucket of a batch that `Limits.check` accepts. Where prompts are read there are fewer sizes: such steps come in every mixture."""
    tokens, sequences, rows = len(batch.tokens), len(batch.context_lengths), len(batch.logit_rows)
    table = max(NARROWEST, power(batch.block_tables.shape[1]))
    singles = tokens <= sequences and bool((np.diff(batch.query_starts) <= 1).all())
    if singles:
        place = max(few(sequences), limits.tokens[0])
        length = place = place if place <= limits.tokens[1] else sequences
    else:
        length = min(max(many(tokens), limits.tokens[0]), limits.tokens[1])
        place = max(sequences, min(power(sequences), length - 1))
        while power(table // NARROWEST).bit_length() % 2 == 0:
            table *= 2  # 8, 32, 128, ...
    wanted = min(max(place, rows, limits.rows[0]), limits.rows[1]) if rows else 0
    return Sizes(length, place, table, wanted)


def largest(tokens: int, sequences: int, limits: Limits) -> Sizes:
    """The bucket that takes the most memory, of steps of at most so many tokens and sequences."""
    length = min(max(many(tokens), limits.tokens[0]), limits.tokens[1])
    place = min(few(sequences), length)
    return Sizes(length, place, NARROWEST, min(max(place, limits.rows[0]), limits.rows[1]))


INPUTS = {"input_ids": 0, "position_ids": 0, "slots": -1, "block_tables": 0, "query_starts": None, "context_lengths": 0, "logit_rows": 0}  # and what fills them up


def shapes(sizes: Sizes) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Type and shape of a plan's inputs but the caches, by their names, in a bucket."""
    long, short = np.dtype(np.int64), np.dtype(np.int32)
    return {
        "input_ids": (long, (1, sizes.tokens)), "position_ids": (long, (1, sizes.tokens)), "logit_rows": (long, (sizes.rows,)), "slots": (short, (sizes.tokens,)),
        "block_tables": (short, (sizes.sequences, sizes.table)), "query_starts": (short, (sizes.sequences + 1,)), "context_lengths": (short, (sizes.sequences,)),
    }  # fmt: skip


def fill(views: Mapping[str, Array], batch: Batch) -> None:
    """Write a batch into arrays of its bucket's `shapes`, with what does nothing in the rest."""
    given = {
        "input_ids": batch.tokens[None], "position_ids": batch.positions[None], "logit_rows": batch.logit_rows, "slots": batch.slots,
        "block_tables": batch.block_tables, "query_starts": batch.query_starts, "context_lengths": batch.context_lengths,
    }  # fmt: skip
    for name, array in given.items():
        view, rest = views[name], INPUTS[name]
        view.fill(len(batch.tokens) if rest is None else rest)
        view[tuple(map(slice, array.shape))] = array


def padded(batch: Batch, sizes: Sizes) -> Batch:
    """The batch, filled up to a bucket."""
    views = {name: np.empty(shape, dtype) for name, (dtype, shape) in shapes(sizes).items()}
    fill(views, batch)
    return Batch(
        tokens=views["input_ids"][0], positions=views["position_ids"][0], slots=views["slots"], block_tables=views["block_tables"], query_starts=views["query_starts"],
        context_lengths=views["context_lengths"], logit_rows=views["logit_rows"],
    )  # fmt: skip


def nothing() -> Batch:
    """A batch of no tokens: filled up to a bucket, it is a step that changes no cache."""
    none, short = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return Batch(none, none, short, np.zeros((0, 0), np.int32), np.zeros(1, np.int32), short, none)
