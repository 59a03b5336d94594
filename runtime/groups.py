"""Requests on their way: what gets its next token together, and the arrays of a step."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterable

import numpy as np

from rewrite.runtime.batch import Batch
from rewrite.runtime.beam_search import BeamSearch
from rewrite.runtime.kv_cache import BlockTable
from rewrite.runtime.requests import Request
from rewrite.runtime.sampling import Row
from rewrite.runtime.text_stream import TextStream


class Job:
    """A request on its way."""

    def __init__(self, number: int, request: Request, order: int, now: float):
        self.number = number
        self.request = request
        self.order = order
        self.seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
        self.groups: list[Group] = []
        self.arrived = now
        self.started = False
        self.spoke = False
        self.failed = False  # one of its outputs ended with an error


class Sequence:
    """A row of the sampler and its blocks, if it has any."""

    def __init__(self, row: Row, table: BlockTable | None = None):
        self.row = row
        self.table = table

    @property
    def remaining(self) -> int:
        return len(self.row.tokens) - (self.table.length if self.table is not None else 0)

    def commit(self, count: int) -> None:
        """Its next tokens are written; slots for more are given back."""
        assert self.table is not None
        start = self.table.computed
        self.table.commit(self.row.tokens[start : start + count])

    def settle(self) -> None:
        """After steps that were done at once all its tokens but the last are written."""
        assert self.table is not None
        self.commit(max(0, len(self.row.tokens) - 1 - self.table.computed))


class Group:
    """Sequences that get their next token in the same step: one, or the beams of a request."""

    def __init__(self, job: Job, row: Row, table: BlockTable | None = None):
        self.job = job
        self.key = (job.order, job.number, row.choice)
        self.sequences = [Sequence(row, table)]
        self.beams = BeamSearch(job.request.sampling) if job.request.sampling.beams > 1 else None
        self.forks = row.choice == 0 and self.beams is None and job.request.sampling.n > 1  # before its first token
        self.text = self.stream(row.tokens[row.prompt :])
        self.last = 0.0  # when it got its last token
        self.running = table is not None

    def stream(self, known: Iterable[int]) -> TextStream | None:
        """The text that follows these tokens, if text is wanted as it comes."""
        if self.job.request.decode is None or self.beams is not None:
            return None
        stream = TextStream(self.job.request.decode, self.job.request.sampling.stop)
        for token in known:
            stream.add(token)
        return stream

    @property
    def seats(self) -> int:
        return self.job.request.sampling.beams

    @property
    def decodes(self) -> bool:
        return all(s.table is not None and s.remaining == 1 for s in self.sequences)


def order(group: Group) -> tuple[int, int, int]:
    """What groups are sorted by: who comes first is served first."""
    return group.key


Plan = dict[Group, list[tuple[Sequence, int]]]  # of a step: the sequences of each group, and how many new tokens


def arrays(planned: Plan, size: int, ahead: int) -> tuple[Batch, list[tuple[Group, list[int]]]]:
    """The first step of a plan, and for each group that gets a token the rows of the logits that are its.

    size: of a block. ahead: steps that are done at once; each sequence has slots for the tokens of the later ones, too.
    """
    tokens = array("q")
    starts, lengths, tables = [0], [], []
    wanted: list[tuple[Group, list[int]]] = []
    rows: list[int] = []
    for group, parts in planned.items():
        for sequence, count in parts:
            table, known = sequence.table, sequence.row.tokens
            assert table is not None
            length = table.length - ahead + 1
            tokens.extend(known[table.length - count : length])
            starts.append(len(tokens))
            lengths.append(length)
            tables.append(table.blocks)
        if lengths[-1] == len(known):
            wanted.append((group, list(range(len(rows), len(rows) + len(parts)))))
            rows += [start - 1 for start in starts[-len(parts) :]]
    blocks = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for line, table_blocks in zip(blocks, tables, strict=True):
        line[: len(table_blocks)] = np.frombuffer(table_blocks, np.int32)
    np.maximum(blocks, 0, out=blocks)  # before the window
    begins, keys = np.array(starts, np.int32), np.array(lengths, np.int32)
    counts = begins[1:] - begins[:-1]
    positions = np.arange(len(tokens)) + (keys - begins[1:]).repeat(counts)
    places = positions // size
    slots = positions + (blocks[np.arange(len(tables)).repeat(counts), places] - places) * size
    batch = Batch(
        tokens=np.frombuffer(tokens, np.int64), positions=positions, slots=slots.astype(np.int32), block_tables=blocks, query_starts=begins, context_lengths=keys,
        logit_rows=np.array(rows, np.int64),
    )  # fmt: skip
    return batch, wanted
