"""Which tokens the model computes in each step, for many requests at once.

Every request has a place in one order: by arrival, where each unit of priority counts as `patience` steps of having come
earlier. The order of two requests never changes, so whoever waits long enough is first, and who is first is always served:
when blocks or seats run out, it is the last in the order that gives its own back. Its tokens stay, and it is computed again
when its turn comes (preemption by recomputation, with what the cache still holds).

A step first takes every sequence that needs one token only, then prompts, in chunks, until the token budget is used up.
Nobody is admitted past one who waits for blocks. A request that would not fit even alone is refused when it is added.
"""

from __future__ import annotations

import operator
import secrets
import time
from bisect import insort
from collections.abc import Callable, Iterator
from heapq import merge
from typing import Any

import numpy as np

from rewrite.errors import RewriteError, blame
from rewrite.runtime.batch import Batch
from rewrite.runtime.beam_search import BeamSearch
from rewrite.runtime.kv_cache import BlockPool, BlockTable, OutOfBlocks
from rewrite.runtime.metrics import Metrics
from rewrite.runtime.requests import Model, Output, Refused, Request
from rewrite.runtime.sampling import Logprob, Row, Sampler
from rewrite.runtime.text_stream import TextStream

Array = np.ndarray[Any, Any]


class _Job:
    """A request on its way."""

    def __init__(self, number: int, request: Request, order: int, now: float):
        self.number = number
        self.request = request
        self.order = order
        self.seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
        self.groups: list[_Group] = []
        self.arrived = now
        self.started = False
        self.spoke = False


class _Sequence:
    def __init__(self, row: Row, table: BlockTable | None = None):
        self.row = row
        self.table = table

    @property
    def remaining(self) -> int:
        return len(self.row.tokens) - (self.table.length if self.table is not None else 0)

    def commit(self, count: int) -> None:
        assert self.table is not None
        length = self.table.length
        self.table.commit(self.row.tokens[length - count : length])


class _Group:
    """Sequences that get their next token in the same step: one, or the beams of a request."""

    def __init__(self, job: _Job, row: Row, table: BlockTable | None = None):
        self.job = job
        self.key = (job.order, job.number, row.choice)
        self.sequences = [_Sequence(row, table)]
        self.beams = BeamSearch(job.request.sampling) if job.request.sampling.beams > 1 else None
        self.forks = row.choice == 0 and self.beams is None and job.request.sampling.n > 1  # before its first token
        self.text = TextStream(job.request.decode, job.request.sampling.stop) if job.request.decode and self.beams is None else None
        self.last = 0.0  # when it got its last token
        self.running = table is not None

    @property
    def seats(self) -> int:
        return self.job.request.sampling.beams

    @property
    def decodes(self) -> bool:
        return all(s.table is not None and s.remaining == 1 for s in self.sequences)


def _order(group: _Group) -> tuple[int, int, int]:
    return group.key


class Scheduler:
    """In-flight batching over one model; not for several threads at once.

    model         see `Model`
    pool          its blocks
    token_budget  most tokens of a step
    seats         most sequences of a step; at most the token budget
    patience      how many steps one unit of priority is worth
    context       most tokens of a sequence, prompt included; None: what fits in the cache
    sampler       chooses tokens; the NumPy reference, if none is given
    clock         seconds, for the metrics
    """

    def __init__(self, model: Model, pool: BlockPool, token_budget: int = 512, seats: int = 64, patience: int = 1000, context: int | None = None,
                 sampler: Sampler | None = None, clock: Callable[[], float] = time.perf_counter):  # fmt: skip
        for name, value in (("token_budget", token_budget), ("seats", seats), ("patience", patience)):
            if value < 1:
                raise RewriteError(f"Scheduler: {name} is {value}; it has to be at least 1")
        if pool.block_size != model.block_size or pool.blocks > model.blocks:
            raise RewriteError(f"Scheduler: the pool has {pool.blocks} blocks of {pool.block_size} tokens, the model {model.blocks} of {model.block_size}")
        self.model = model
        self.pool = pool
        self.token_budget = token_budget
        self.seats = min(seats, token_budget)
        self.patience = patience
        self.context = context
        self.metrics = Metrics()
        self._sampler = sampler or Sampler()
        self._clock = clock
        self._jobs: dict[int, _Job] = {}
        self._added = 0
        self._waiting: list[_Group] = []  # both in order
        self._running: list[_Group] = []
        self._plan: dict[_Group, list[tuple[_Sequence, int]]] = {}  # of this step: sequences and how many new tokens
        self._left = token_budget  # of this step
        self._notices: list[Output] = []

    @property
    def unfinished(self) -> int:
        """Requests that still have something to say."""
        return len(self._jobs) + len(self._notices)

    def add(self, request: Request) -> int:
        """Queue a request; returns its number. Raises Refused if it can never be served, another RewriteError for what it asks wrongly."""
        try:
            prompt = self._admissible(request)
        except RewriteError:
            self.metrics.refused += 1
            raise
        number = self._added
        self._added += 1
        job = _Job(number, request, self.metrics.steps - request.priority * self.patience, self._clock())
        self._jobs[number] = job
        self._enter(_Group(job, Row(request.sampling, prompt, len(prompt), job.seed)))
        self.metrics.added += 1
        self.metrics.prompt_tokens += len(prompt)
        return number

    def cancel(self, number: int) -> bool:
        """Give up a request at once; the next step says so. False if it is not there (any more)."""
        job = self._jobs.get(number)
        if job is None:
            return False
        self.metrics.cancelled += 1
        for group in list(job.groups):
            done = self._finish(group)
            self._notices.append(Output(number, group.sequences[0].row.choice, finished="cancelled", done=done))
        return True

    def step(self) -> list[Output]:
        """Compute one batch; returns what is new. With nothing to do it computes nothing.

        If the model raises, the sequences of the step are computed again later, and the error goes on to the caller.
        """
        outputs, self._notices = self._notices, []
        self._schedule()
        if not self._plan:
            if self._running or self._waiting:
                raise RuntimeError("scheduler: no request can advance; this is a bug, please report it")
            return outputs
        planned, self._plan = self._plan, {}
        batch, wanted = _batch(planned, self.pool.block_size)
        try:
            copies = self.pool.take_copies()
            if copies:
                self.model.copy_blocks(copies)
            logits = self.model.step(batch)
        except BaseException:
            self._notices = outputs
            for group in planned:
                self._preempt(group)
            raise
        for sequence, count in (part for parts in planned.values() for part in parts):
            sequence.commit(count)
        m = self.metrics
        m.steps += 1
        m.computed_tokens += len(batch.tokens)
        m.copied_blocks += len(copies)
        m.cache_used = self.pool.used / self.pool.blocks
        m.cache_peak = max(m.cache_peak, m.cache_used)
        return outputs + self._speak(logits, wanted, self._clock())

    def run(self) -> Iterator[Output]:
        """Step until nothing is left."""
        while self.unfinished:
            yield from self.step()

    # What can be served

    def _admissible(self, request: Request) -> list[int]:
        """The prompt, if the request can be served."""
        try:
            prompt = [operator.index(t) for t in request.prompt]
        except TypeError:
            raise Refused("request: the prompt has to be a list of tokens, which are whole numbers") from None
        s, size = request.sampling, len(prompt)
        if not size:
            raise Refused("request: the prompt is empty; it has to have at least one token")
        bad = next((t for t in prompt if not 0 <= t < self.model.vocabulary), None)
        if bad is not None:
            raise Refused(f"request: the prompt has token {bad}; the model's tokens are 0 to {self.model.vocabulary - 1}")
        s.check(self.model.vocabulary)
        if s.stop and request.decode is None:
            raise Refused("request: stop strings need text; give Request.decode")
        longest = size + s.max_new_tokens
        if self.context is not None and longest > self.context:
            raise Refused(f"request: {size} tokens and {s.max_new_tokens} new ones are more than the model's {self.context}; shorten one of them")
        if s.beams > self.seats:
            raise Refused(f"request: {s.beams} beams are more than the {self.seats} sequences of a step")
        blocks = self._blocks_for(size, longest - 1, s.beams)  # the last token is never computed
        if blocks > self.pool.blocks:
            raise Refused(f"request: {size} tokens and {s.max_new_tokens} new ones need {blocks} blocks of the KV cache, which has {self.pool.blocks}; "
                          "shorten it, ask for fewer beams, or give the cache more memory")  # fmt: skip
        return prompt

    def _blocks_for(self, prompt: int, length: int, beams: int) -> int:
        """The most blocks that the request must be able to hold alone. Beams share the whole blocks of their prompt."""
        each = self.pool.blocks_for(length)
        if beams == 1:
            return each
        shared = prompt // self.pool.block_size if self.pool.reuse and self.pool.window is None else 0
        return shared + beams * (each - shared)

    # One step

    def _schedule(self) -> None:
        """Fill the plan: sequences that need one token first, then prompts; both in order."""
        self._left = self.token_budget
        for group in list(self._running):
            if group.running and group.decodes:
                self._advance(group)
        blocked = False
        for group in merge(list(self._running), list(self._waiting), key=_order):
            if not self._left:
                break
            if group in self._plan:
                continue
            if not group.running:
                blocked = blocked or not self._admit(group)
            if group.running:
                self._advance(group)

    def _admit(self, group: _Group) -> bool:
        """Give it seats and what the cache holds of it, if there is room for all its known tokens.

        Each running sequence before it may want a block in the next step; that many stay free, so that it is not thrown out
        at once.
        """
        while self._taken() + group.seats > self.seats:
            if not self._preempt_after(group):
                return False
        first = group.sequences[0]
        first.table = self.pool.open(first.row.tokens)
        held = sum(b >= 0 for b in first.table.blocks)
        needed = max(0, self.pool.blocks_for(len(first.row.tokens)) - held)
        needed += sum(g.seats for g in self._running if g.key < group.key)
        while self.pool.available < needed and self._preempt_after(group):
            pass
        if self._running and self.pool.available < needed:
            first.table.free()
            first.table = None
            return False
        self._waiting.remove(group)
        group.running = True
        insort(self._running, group, key=_order)
        self.metrics.reused_tokens += first.table.length
        if not group.job.started:
            group.job.started = True
            self.metrics.queue.append(self._clock() - group.job.arrived)
        return True

    def _advance(self, group: _Group) -> None:
        """Plan what can be computed of the group in this step. Several beams get their next token together."""
        if len(group.sequences) == 1:
            return self._take(group, group.sequences[0], group.sequences[0].remaining)
        for sequence in group.sequences:
            if sequence.table is None:  # preempted: opened one after the other, so that each finds what they share
                sequence.table = self.pool.open(sequence.row.tokens)
                self.metrics.reused_tokens += sequence.table.length
            if sequence.remaining > 1:
                return self._take(group, sequence, sequence.remaining - 1)
        if len(group.sequences) > self._left:
            return None
        while self.pool.needed([(s.table, 1) for s in group.sequences if s.table]) > self.pool.available:
            if not self._preempt_after(group):
                return None
        for sequence in group.sequences:
            self._grow(group, sequence, 1)

    def _take(self, group: _Group, sequence: _Sequence, wanted: int) -> None:
        """Plan up to so many tokens of one sequence, as many as there are blocks and budget for."""
        count = min(wanted, self._left)
        assert sequence.table is not None
        while count:
            try:
                return self._grow(group, sequence, count)
            except OutOfBlocks:
                if not self._preempt_after(group):
                    count = min(count, self.pool.room(sequence.table))

    def _grow(self, group: _Group, sequence: _Sequence, count: int) -> None:
        assert sequence.table is not None
        sequence.table.extend(count)
        self._plan.setdefault(group, []).append((sequence, count))
        self._left -= count

    # Who is where

    def _taken(self) -> int:
        return sum(group.seats for group in self._running)

    def _enter(self, group: _Group) -> None:
        group.job.groups.append(group)
        insort(self._running if group.running else self._waiting, group, key=_order)

    def _preempt_after(self, group: _Group) -> bool:
        """Take everything from the last in the order, if it comes after this one."""
        if not self._running or self._running[-1].key <= group.key:
            return False
        self._preempt(self._running[-1])
        return True

    def _preempt(self, group: _Group) -> None:
        self._left += sum(count for _, count in self._plan.pop(group, ()))
        self._release(group)
        group.running = False
        insort(self._waiting, group, key=_order)
        self.metrics.preempted += 1

    def _release(self, group: _Group) -> None:
        for sequence in group.sequences:
            if sequence.table is not None:
                sequence.table.free()
                sequence.table = None
        if group.running:
            self._running.remove(group)

    def _finish(self, group: _Group) -> bool:
        """It is over; True if this was the last of its request."""
        if not group.running:
            self._waiting.remove(group)
        self._release(group)
        group.job.groups.remove(group)
        if group.job.groups:
            return False
        del self._jobs[group.job.number]
        return True

    # What comes out

    def _speak(self, logits: Array, wanted: list[tuple[_Group, list[int]]], now: float) -> list[Output]:
        """Choose the next token of every group whose known tokens are all computed."""
        outputs: list[Output] = []
        speakers: list[tuple[_Group, int]] = []
        for group, at in wanted:
            if group.beams is None:
                speakers += [(g, at[0]) for g in self._fork(group)]
        if speakers:
            samples = self._sampler.sample(logits, [i for _, i in speakers], [g.sequences[0].row for g, _ in speakers])
            for i, (group, _) in enumerate(speakers):
                outputs.append(self._accept(group, int(samples.tokens[i]), samples.logprobs[i], samples.errors[i], now))
        for group, at in wanted:
            if group.beams is not None:
                outputs += self._search(group, logits, at, now)
        return outputs

    def _fork(self, group: _Group) -> list[_Group]:
        """The group, and before its first token the other outputs of the request; who finds no seat waits for one."""
        if not group.forks:
            return [group]
        group.forks = False
        job, row, table = group.job, group.sequences[0].row, group.sequences[0].table
        assert table is not None
        for choice in range(1, job.request.sampling.n):
            seat = self._taken() < self.seats
            self._enter(_Group(job, Row(row.sampling, list(row.tokens), row.prompt, row.seed, choice), table.fork() if seat else None))
        return list(job.groups)

    def _accept(self, group: _Group, token: int, logprob: Logprob | None, error: str | None, now: float) -> Output:
        """One more token, or the reason why there is none."""
        job, row, s = group.job, group.sequences[0].row, group.job.request.sampling
        if error is not None:
            return self._fail(group, error)
        row.tokens.append(token)
        self._timed(group, now, 1)
        text, finished = "", None
        if token in s.stop_tokens:
            finished = "stop"
        elif len(row.tokens) - row.prompt >= s.max_new_tokens:
            finished = "length"
        try:
            if group.text is not None:
                text = group.text.add(token) if finished != "stop" else ""
                if finished:
                    text += group.text.end()
                if group.text.found is not None:
                    finished = "stop"
        except Exception as wrong:  # of the user's decode: it ends this output and no other
            return self._fail(group, f"decode: {blame(wrong)}")
        done = self._finish(group) if finished else False
        self.metrics.finished += done
        return Output(job.number, row.choice, (token,), text, (logprob,) if logprob else (), finished, done=done)

    def _fail(self, group: _Group, error: str) -> Output:
        done = self._finish(group)
        self.metrics.failed += 1
        return Output(group.job.number, group.sequences[0].row.choice, finished="error", error=error, done=done)

    def _timed(self, group: _Group, now: float, tokens: int) -> None:
        if group.last:
            self.metrics.between.append(now - group.last)
        if not group.job.spoke:
            self.metrics.first_token.append(now - group.job.arrived)
        group.last, group.job.spoke = now, True
        self.metrics.generated_tokens += tokens

    def _search(self, group: _Group, logits: Array, at: list[int], now: float) -> list[Output]:
        """One step of beam search: the running beams take their tables from those they come from."""
        beams, s, old = group.beams, group.job.request.sampling, group.sequences
        assert beams is not None
        scores, errors = self._sampler.log_probabilities(logits, at, [b.row for b in old])
        error = next((e for e in errors if e), None)
        if error is not None:
            return [self._fail(group, error)]
        if len(old) == 1:
            scores = np.repeat(scores, s.beams, axis=0)
        try:
            parents = beams.advance(scores, lambda tokens: self._ended(group, tokens))
        except Exception as wrong:  # of the user's decode
            return [self._fail(group, f"decode: {blame(wrong)}")]
        if beams.done:
            return self._best(group, now)
        tables: list[BlockTable] = []
        taken: set[int] = set()
        for parent in (min(p, len(old) - 1) for p in parents):
            table = old[parent].table
            assert table is not None
            tables.append(table.fork() if parent in taken else table)
            taken.add(parent)
        for parent in set(range(len(old))) - taken:
            unused = old[parent].table
            assert unused is not None
            unused.free()
        row = old[0].row
        prompt = row.tokens[: row.prompt]
        group.sequences = [_Sequence(Row(s, [*prompt, *tokens], row.prompt, row.seed), table) for tokens, table in zip(beams.running, tables, strict=True)]
        return []

    def _ended(self, group: _Group, tokens: tuple[int, ...]) -> bool:
        s, decode = group.job.request.sampling, group.job.request.decode
        if tokens[-1] in s.stop_tokens or len(tokens) >= s.max_new_tokens:
            return True
        return bool(s.stop) and decode is not None and any(string in decode(list(tokens)) for string in s.stop)

    def _best(self, group: _Group, now: float) -> list[Output]:
        """The n best beams, whole."""
        job, s = group.job, group.job.request.sampling
        assert group.beams is not None
        found = []
        for choice, beam in enumerate(group.beams.outputs()):
            stopped = bool(beam.tokens) and beam.tokens[-1] in s.stop_tokens
            stream = TextStream(job.request.decode, s.stop) if job.request.decode else None
            text = "".join(stream.add(t) for t in beam.tokens[: len(beam.tokens) - stopped]) + stream.end() if stream else ""
            reason = "stop" if stopped or (stream and stream.found) else "length"
            found.append(Output(job.number, choice, beam.tokens, text, finished=reason, score=beam.score, done=choice == s.n - 1))
        self._timed(group, now, sum(len(o.tokens) for o in found))
        self._finish(group)
        self.metrics.finished += 1
        return found


def _batch(planned: dict[_Group, list[tuple[_Sequence, int]]], size: int) -> tuple[Batch, list[tuple[_Group, list[int]]]]:
    """The arrays of a plan, and for each group that gets a token the rows of the logits that are its. size: of a block."""
    tokens: list[int] = []
    starts, lengths, tables = [0], [], []
    wanted: list[tuple[_Group, list[int]]] = []
    rows: list[int] = []
    for group, parts in planned.items():
        for sequence, count in parts:
            table, known = sequence.table, sequence.row.tokens
            assert table is not None
            tokens += known[table.length - count : table.length]
            starts.append(len(tokens))
            lengths.append(table.length)
            tables.append(table.blocks)
        if lengths[-1] == len(known):
            wanted.append((group, list(range(len(rows), len(rows) + len(parts)))))
            rows += [start - 1 for start in starts[-len(parts) :]]
    blocks = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for line, table_blocks in zip(blocks, tables, strict=True):
        line[: len(table_blocks)] = np.frombuffer(table_blocks, np.int32)
    np.maximum(blocks, 0, out=blocks)  # before the window
    counts = np.diff(starts)
    positions = np.arange(len(tokens)) + np.repeat(np.array(lengths) - starts[1:], counts)
    slots = blocks[np.repeat(np.arange(len(tables)), counts), positions // size] * size + positions % size
    batch = Batch(
        tokens=np.array(tokens, np.int64), positions=positions, slots=slots.astype(np.int32), block_tables=blocks, query_starts=np.array(starts, np.int32),
        context_lengths=np.array(lengths, np.int32), logit_rows=np.array(rows, np.int64),
    )  # fmt: skip
    return batch, wanted
