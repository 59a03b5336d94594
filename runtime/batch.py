"""One step of a generator: the tokens of many sequences packed one after the other, and where their keys and values lie."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Batch:
    """T new tokens of B sequences; R of the tokens are those whose logits are wanted.

    tokens int64 [T]; positions int64 [T], each in its own sequence; slots int32 [T], block * block size + offset where the
    key and value of each token are stored; block_tables int32 [B, M]; query_starts int32 [B + 1], where the tokens of each
    sequence begin, and T; context_lengths int32 [B], keys of each sequence with the new ones; logit_rows int64 [R], indices
    of tokens. Prefill, a chunk of it and decoding differ in nothing but how many tokens a sequence has.
    """

    tokens: Array
    positions: Array
    slots: Array
    block_tables: Array
    query_starts: Array
    context_lengths: Array
    logit_rows: Array

    def parts(self, count: int) -> list[Batch]:
        """Up to `count` batches of about as many tokens, to be computed one after the other: a text may be cut, and goes on in the next."""
        size = len(self.tokens)
        bounds = sorted({size * i // count for i in range(count + 1)})
        return [self._part(begin, end) for begin, end in itertools.pairwise(bounds)]

    def order(self, parts: Sequence[Batch]) -> Array:
        """Where each of the batch's rows of logits is among those of all its `parts`, one after the other."""
        ends = np.cumsum([len(p.tokens) for p in parts])
        return np.argsort(np.argsort(np.searchsorted(ends, self.logit_rows, "right"), kind="stable"))

    def _part(self, begin: int, end: int) -> Batch:
        starts = np.clip(self.query_starts, begin, end)
        mine = starts[1:] > starts[:-1]
        after = self.query_starts[1:] - starts[1:]  # tokens of each text that come in a later part
        rows = self.logit_rows[(self.logit_rows >= begin) & (self.logit_rows < end)] - begin
        return Batch(
            self.tokens[begin:end],
            self.positions[begin:end],
            self.slots[begin:end],
            self.block_tables[mine],
            np.concatenate([starts[:1], starts[1:][mine]]) - begin,
            (self.context_lengths - after)[mine].astype(self.context_lengths.dtype),
            rows,
        )
