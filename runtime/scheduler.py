"""Which tokens the model computes in each step, for many requests at once.

Every request has a place in one order: by arrival, where each unit of priority counts as `patience` steps of having come
earlier. The order of two requests never changes, so whoever waits long enough is first, and who is first is always served:
when blocks or seats run out, it is the last in the order that gives its own back. Its tokens stay, and it is computed again
when its turn comes (preemption by recomputation, with what the cache still holds).

A step first takes every sequence that needs one token only, then prompts, in chunks, until the token budget is used up.
Nobody is admitted past one who waits for blocks. A request that would not fit even alone is refused when it is added.
"""

from __future__ import annotations

import time
from array import array
from bisect import insort
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from heapq import merge
from typing import Any, cast

import numpy as np

from rewrite.errors import RewriteError, blame
from rewrite.runtime.groups import Group, Job, Plan, Sequence, arrays, order
from rewrite.runtime.kv_cache import BlockPool, BlockTable, OutOfBlocks
from rewrite.runtime.metrics import Metrics
from rewrite.runtime.requests import Decoder, Model, Output, Refused, Request
from rewrite.runtime.sampling import IMPOSSIBLE, Logprob, Row, Sampler, Samples
from rewrite.runtime.text_stream import TextStream

Array = np.ndarray[Any, Any]


class Scheduler:
    """In-flight batching over one model; not for several threads at once.

    model         see `Model`
    pool          its blocks
    token_budget  most tokens of a step
    seats         most sequences of a step; at most the token budget
    patience      how many steps one unit of priority is worth
    context       most tokens of a sequence, prompt included; None: what fits in the cache
    lookahead     most steps of one call of the model's `decode`, if it has one: while nobody waits and no prompt is unread, or whoever waits
                  could not be admitted. It goes on from call to call of `step`, and ends early if this changes, or more than a quarter of its
                  outputs are over. What it computed after an output's end is thrown away
    sampler       chooses tokens; the NumPy reference, if none is given
    clock         seconds, for the metrics
    """

    def __init__(self, model: Model, pool: BlockPool, token_budget: int = 512, seats: int = 64, patience: int = 1000, context: int | None = None,
                 lookahead: int = 1, sampler: Sampler | None = None, clock: Callable[[], float] = time.perf_counter):  # fmt: skip
        for name, value in (("token_budget", token_budget), ("seats", seats), ("patience", patience), ("lookahead", lookahead)):
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
        self.lookahead = lookahead if isinstance(model, Decoder) else 1
        self.metrics = Metrics()
        self._sampler = sampler or Sampler()
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._added = 0
        self._waiting: list[Group] = []  # both in order
        self._running: list[Group] = []
        self._plan: Plan = {}
        self._ahead = 1  # steps that are done at once
        self._flight: tuple[list[Group], Generator[list[Samples], None, None]] | None = None  # a `decode` that has not ended, and whom it is for
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
        job = Job(number, request, self.metrics.steps - request.priority * self.patience, self._clock())
        self._jobs[number] = job
        self._enter(Group(job, Row(request.sampling, prompt, len(prompt), job.seed)))
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

        If the model or the sampler raises, the sequences of the step are computed again later, and the error goes on to the caller.
        """
        outputs, self._notices = self._notices, []
        if self._fly(outputs):
            return outputs
        self._schedule()
        if not self._plan:
            if self._running or self._waiting:
                raise RuntimeError("scheduler: no request can advance; this is a bug, please report it")
            return outputs
        planned, self._plan = self._plan, {}
        batch, wanted = arrays(planned, self.pool.block_size, self._ahead)
        try:
            copies = self.pool.take_copies()
            if copies:
                self.model.copy_blocks(copies)
            if self._ahead > 1:
                parts = cast(Decoder, self.model).decode(batch, [group.sequences[0].row for group in planned], self._ahead, self._goes_on)
            else:
                logits = self.model.step(batch)
        except BaseException:
            self._notices = outputs
            for group in planned:
                self._preempt(group)
            raise
        self.metrics.copied_blocks += len(copies)
        if self._ahead > 1:
            self._flight = list(planned), parts
            self._fly(outputs)
            return outputs
        self._count(1, len(batch.tokens))
        now = self._clock()
        for sequence, count in (part for parts in planned.values() for part in parts):
            sequence.commit(count)
        try:
            self._speak(outputs, logits, wanted, now)
        except BaseException:
            self._notices = outputs
            for group in [g for g in self._running if any(s.remaining == 0 for s in g.sequences)]:
                self._preempt(group)  # it got no token: its logits are wanted again
            raise
        return outputs

    def run(self) -> Iterator[Output]:
        """Step until nothing is left."""
        while self.unfinished:
            yield from self.step()

    def _count(self, steps: int, tokens: int) -> None:
        m = self.metrics
        m.steps += steps
        m.computed_tokens += steps * tokens
        m.cache_used = self.pool.used / self.pool.blocks
        m.cache_peak = max(m.cache_peak, m.cache_used)

    # Several steps at once

    def _fly(self, outputs: list[Output]) -> bool:
        """Take the next tokens of what is under way; False if nothing is, or if it has come to its end."""
        if self._flight is None:
            return False
        groups, parts = self._flight
        try:
            samples = next(parts, None)
        except BaseException:
            self._give_up(outputs)
            raise
        if samples is None:
            self._flight = None
            for group in groups:
                if group.running:
                    group.sequences[0].settle()
            return False
        now = self._clock()
        self._count(len(samples), len(groups))
        try:
            for i, group in enumerate(groups):
                if group.running:
                    outputs.append(self._accept(group, [int(s.tokens[i]) for s in samples], [s.logprobs[i] for s in samples], [s.errors[i] for s in samples], now))
        except BaseException:  # the others' tokens of this part are lost
            self._give_up(outputs)
            raise
        if not any(group.running for group in groups):
            parts.close()
            self._flight = None
        return True

    def _give_up(self, outputs: list[Output]) -> None:
        """End what is under way; whoever is in it is computed again."""
        assert self._flight is not None
        groups, parts = self._flight
        self._flight, self._notices = None, outputs
        for group in groups:
            if group.running:
                self._preempt(group)
        parts.close()

    def _goes_on(self) -> bool:
        """Whether what is under way is worth its while: nobody waits who could be admitted, and most outputs are not over."""
        assert self._flight is not None
        groups = self._flight[0]
        return 4 * sum(not group.running for group in groups) <= len(groups) and not self._one_comes()

    def _one_comes(self) -> bool:
        """Whether somebody waits who could be admitted, as far as seats are concerned."""
        return bool(self._waiting) and (self._waiting[0].key < self._running[-1].key or self._taken() + self._waiting[0].seats <= self.seats)

    # What can be served

    def _admissible(self, request: Request) -> array[int]:
        """The prompt, int64, if the request can be served."""
        try:
            prompt = array("Q", request.prompt)  # made in a quarter of the time that "q" takes
            good = np.asarray(prompt).max(initial=0) < self.model.vocabulary
        except TypeError:
            raise Refused("request: the prompt has to be a list of tokens, which are whole numbers") from None
        except OverflowError:
            good = False
        if not good:
            bad = next(t for t in request.prompt if not 0 <= t < self.model.vocabulary)
            raise Refused(f"request: the prompt has token {bad}; the model's tokens are 0 to {self.model.vocabulary - 1}")
        s, size = request.sampling, len(prompt)
        if not size:
            raise Refused("request: the prompt is empty; it has to have at least one token")
        s.check(self.model.vocabulary)
        if s.stop and request.decode is None:
            raise Refused("request: stop strings need text; give Request.decode, or build the plan with --tokenizer FOLDER")
        longest = size + s.max_new_tokens
        if self.context is not None and longest > self.context:
            raise Refused(f"request: {size} tokens and {s.max_new_tokens} new ones are more than the model's {self.context}; shorten one of them")
        if s.beams > self.seats:
            raise Refused(f"request: {s.beams} beams are more than the {self.seats} sequences of a step")
        blocks = self._blocks_for(size, longest - 1, s.beams)  # the last token is never computed
        if blocks > self.pool.blocks:
            raise Refused(f"request: {size} tokens and {s.max_new_tokens} new ones need {blocks} blocks of the KV cache, which has {self.pool.blocks}; "
                          "shorten it, ask for fewer beams, or give the cache more memory")  # fmt: skip
        return array("q", prompt.tobytes())

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
        self._ahead = self._steps_ahead()
        if self._ahead > 1:
            for group in self._running:
                self._grow(group, group.sequences[0], self._ahead)
            return
        for group in list(self._running):
            if group.running and group.decodes:
                self._advance(group)
        for group in merge(list(self._running), list(self._waiting), key=order):
            if group in self._plan:
                continue
            if not self._left and not self._preempt_after(group):
                return
            if group.running or self._admit(group):
                self._advance(group)
                continue
            for later in [g for g in self._running if g.key > group.key and g not in self._plan]:
                if later.running:  # nobody is admitted any more, and those in flight go on
                    self._advance(later)
            return

    def _steps_ahead(self) -> int:
        """How many steps can be done at once: nobody waits who could be admitted, everyone draws, nothing has to be asked in between."""
        if self.lookahead == 1 or not self._running or self._one_comes():
            return 1
        left = []
        for group in self._running:
            s, row = group.job.request.sampling, group.sequences[0].row
            if group.beams is not None or group.forks or s.allowed is not None or not group.decodes:
                return 1
            left.append(row.prompt + s.max_new_tokens - len(row.tokens))
        count = min(self.lookahead, sorted(left)[len(left) // 4])  # a quarter of the outputs may end meanwhile
        if self.context is not None:
            count = min(count, self.context - max(len(group.sequences[0].row.tokens) for group in self._running))
        tables = [table for group in self._running if (table := group.sequences[0].table) is not None]
        while count > 1 and self.pool.needed([(table, count) for table in tables]) > self.pool.available:
            count //= 2
        return count

    def _admit(self, group: Group) -> bool:
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
        insort(self._running, group, key=order)
        self.metrics.reused_tokens += first.table.length
        if not group.job.started:
            group.job.started = True
            self.metrics.queue.append(self._clock() - group.job.arrived)
        return True

    def _advance(self, group: Group) -> None:
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

    def _take(self, group: Group, sequence: Sequence, wanted: int) -> None:
        """Plan up to so many tokens of one sequence, as many as there are blocks and budget for."""
        count = min(wanted, self._left)
        assert sequence.table is not None
        while count:
            try:
                return self._grow(group, sequence, count)
            except OutOfBlocks:
                if not self._preempt_after(group):
                    count = min(count, self.pool.room(sequence.table))

    def _grow(self, group: Group, sequence: Sequence, count: int) -> None:
        assert sequence.table is not None
        sequence.table.extend(count)
        self._plan.setdefault(group, []).append((sequence, count))
        self._left -= count

    # Who is where

    def _taken(self) -> int:
        return sum(group.seats for group in self._running)

    def _enter(self, group: Group) -> None:
        group.job.groups.append(group)
        insort(self._running if group.running else self._waiting, group, key=order)

    def _preempt_after(self, group: Group) -> bool:
        """Take everything from the last in the order, if it comes after this one."""
        if not self._running or self._running[-1].key <= group.key:
            return False
        self._preempt(self._running[-1])
        return True

    def _preempt(self, group: Group) -> None:
        self._left += sum(count for _, count in self._plan.pop(group, ()))
        self._release(group)
        insort(self._waiting, group, key=order)
        self.metrics.preempted += 1

    def _release(self, group: Group) -> None:
        for sequence in group.sequences:
            if sequence.table is not None:
                sequence.table.free()
                sequence.table = None
        if group.running:
            self._running.remove(group)
            group.running = False

    def _finish(self, group: Group) -> bool:
        """It is over; True if this was the last of its request."""
        if self._flight is not None and group in self._flight[0]:
            group.sequences[0].settle()
        if not group.running:
            self._waiting.remove(group)
        self._release(group)
        group.job.groups.remove(group)
        if group.job.groups:
            return False
        del self._jobs[group.job.number]
        return True

    # What comes out

    def _speak(self, outputs: list[Output], logits: Array, wanted: list[tuple[Group, list[int]]], now: float) -> None:
        """Choose the next token of every group whose known tokens are all computed."""
        speakers: list[tuple[Group, int]] = []
        for group, at in wanted:
            if group.beams is None:
                speakers += [(g, at[0]) for g in self._fork(group)]
        if speakers:
            samples = self._sampler.sample(logits, [i for _, i in speakers], [g.sequences[0].row for g, _ in speakers])
            for i, (group, _) in enumerate(speakers):
                outputs.append(self._accept(group, [int(samples.tokens[i])], [samples.logprobs[i]], [samples.errors[i]], now))
        for group, at in wanted:
            if group.beams is not None:
                outputs += self._search(group, logits, at, now)

    def _fork(self, group: Group) -> list[Group]:
        """The group, and before its first token the other outputs of the request; who finds no seat waits for one."""
        if not group.forks:
            return [group]
        group.forks = False
        job, row, table = group.job, group.sequences[0].row, group.sequences[0].table
        assert table is not None
        for choice in range(1, job.request.sampling.n):
            seat = self._taken() < self.seats
            self._enter(Group(job, Row(row.sampling, row.tokens[:], row.prompt, row.seed, choice), table.fork() if seat else None))
        return list(job.groups)

    def _accept(self, group: Group, tokens: list[int], logprobs: list[Logprob | None], errors: list[str | None], now: float) -> Output:
        """More tokens, those of steps that follow one another, up to the output's end, or the reason why there are none."""
        job, row, s = group.job, group.sequences[0].row, group.job.request.sampling
        begin, text, finished, error = len(row.tokens), "", None, None
        for token, error in zip(tokens, errors, strict=True):
            if error is not None:
                break
            row.tokens.append(token)
            if token in s.stop_tokens:
                finished = "stop"
            elif len(row.tokens) - row.prompt >= s.max_new_tokens:
                finished = "length"
            try:
                if group.text is not None:
                    text += group.text.add(token) if finished != "stop" else ""
                    if finished:
                        text += group.text.end()
                    if group.text.found is not None:
                        finished = "stop"
            except Exception as wrong:  # of the user's decode: it ends this output and no other
                row.tokens.pop()
                error = f"decode: {blame(wrong)}"
            except BaseException:  # Ctrl-C: as if none of these tokens had come
                del row.tokens[begin:]
                group.text = group.stream(row.tokens[row.prompt :])
                raise
            if finished or error is not None:
                break
        new = tuple(row.tokens[begin:])
        said = tuple(p for p in logprobs[: len(new)] if p)
        if new:
            self._timed(group, now, len(new))
        if error is not None:
            return replace(self._fail(group, error), tokens=new, text=text, logprobs=said)
        return Output(job.number, row.choice, new, text, said, finished, done=self._end(group) if finished else False)

    def _fail(self, group: Group, error: str) -> Output:
        group.job.failed = True
        return Output(group.job.number, group.sequences[0].row.choice, finished="error", error=error, done=self._end(group))

    def _fail_all(self, group: Group, error: str) -> list[Output]:
        """Of beams: none of the outputs comes."""
        failed, last = self._fail(group, error), group.job.request.sampling.n - 1
        return [replace(failed, choice=i, done=i == last) for i in range(last + 1)]

    def _end(self, group: Group) -> bool:
        """It has all its tokens, or failed; True if this was the last of its request, which is counted."""
        done = self._finish(group)
        self.metrics.failed += done and group.job.failed
        self.metrics.finished += done and not group.job.failed
        return done

    def _timed(self, group: Group, now: float, tokens: int) -> None:
        if group.last:
            self.metrics.between.extend([(now - group.last) / tokens] * tokens)
        if not group.job.spoke:
            self.metrics.first_token.append(now - group.job.arrived)
        group.last, group.job.spoke = now, True
        self.metrics.generated_tokens += tokens

    def _search(self, group: Group, logits: Array, at: list[int], now: float) -> list[Output]:
        """One step of beam search: the running beams take their tables from those they come from."""
        beams, s, old = group.beams, group.job.request.sampling, group.sequences
        assert beams is not None
        scores, errors = self._sampler.log_probabilities(logits, at, [b.row for b in old])
        error = next((e for e in errors if e), None)
        if error is not None:
            return self._fail_all(group, error)
        if len(old) == 1:
            scores = np.repeat(scores, s.beams, axis=0)
        try:
            parents = [] if beams.done else beams.advance(scores, lambda tokens: self._ended(group, tokens))  # done: its texts were interrupted
            if beams.done:
                return self._best(group, now)
        except Exception as wrong:  # of the user's decode
            return self._fail_all(group, f"decode: {blame(wrong)}")
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
        prompt = array("q", row.tokens[: row.prompt])
        group.sequences = [Sequence(Row(s, prompt + array("q", tokens), row.prompt, row.seed), table) for tokens, table in zip(beams.running, tables, strict=True)]
        return []

    def _ended(self, group: Group, tokens: tuple[int, ...]) -> bool:
        s, decode = group.job.request.sampling, group.job.request.decode
        if tokens[-1] in s.stop_tokens or len(tokens) >= s.max_new_tokens:
            return True
        return bool(s.stop) and decode is not None and any(string in decode(list(tokens)) for string in s.stop)

    def _best(self, group: Group, now: float) -> list[Output]:
        """The n best beams, whole."""
        job, s = group.job, group.job.request.sampling
        assert group.beams is not None
        found = []
        for choice, beam in enumerate(group.beams.outputs()):
            if not beam.tokens:  # nothing was left that could follow
                job.failed = True
                found.append(Output(job.number, choice, finished="error", error=IMPOSSIBLE, done=choice == s.n - 1))
                continue
            stopped = bool(beam.tokens) and beam.tokens[-1] in s.stop_tokens
            stream = TextStream(job.request.decode, s.stop) if job.request.decode else None
            text = "".join(stream.add(t) for t in beam.tokens[: len(beam.tokens) - stopped]) + stream.end() if stream else ""
            reason = "stop" if stopped or (stream and stream.found) else "length"
            found.append(Output(job.number, choice, beam.tokens, text, finished=reason, score=beam.score, done=choice == s.n - 1))
        if any(o.tokens for o in found):
            self._timed(group, now, sum(len(o.tokens) for o in found))
        self._end(group)
        return found
