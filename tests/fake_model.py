"""A model whose logits depend on every token before, read through the paged cache, and what it generates without any of that.

`python tests/fake_model.py --schedules 1000 --record` runs random schedules: prompts that start alike, chunks, forks, beams, preemption,
cancellation, failing steps. Each output is compared with the same request computed alone, from plain lists.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rewrite.runtime.batch import Batch
from rewrite.runtime.beam_search import BeamSearch
from rewrite.runtime.kv_cache import BlockPool
from rewrite.runtime.requests import Output, Refused, Request
from rewrite.runtime.sampling import Row, Sampler, Samples, Sampling
from rewrite.runtime.scheduler import Scheduler

VOCABULARY = 24
MIXERS = [np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def value(token: int, position: int, before: np.ndarray, first: int) -> np.uint64:
    """Stands for key and value of a token: depends on the token, its place, and the values it sees, at `first` and after."""
    with np.errstate(over="ignore"):
        seen = (before * (2 * np.arange(first, first + len(before), dtype=np.uint64) + np.uint64(1))).sum(dtype=np.uint64)
        mixed = np.uint64(token + 1) * MIXERS[0] + seen * MIXERS[1] + np.uint64(position) * MIXERS[2]
        mixed ^= mixed >> np.uint64(31)
        mixed *= MIXERS[3]
        return mixed ^ (mixed >> np.uint64(29))


def logits_of(last: np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        mixed = (last + np.arange(VOCABULARY, dtype=np.uint64)) * MIXERS[3]
        mixed = (mixed ^ (mixed >> np.uint64(32))) * MIXERS[1]
    return ((mixed >> np.uint64(40)).astype(np.float32) * np.float32(4 / 2**24)).astype(np.float32)


def decode(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[t] for t in tokens)


class FakeModel:
    """Keeps values in blocks. `fails` is how often a step raises, before or after it wrote."""

    vocabulary = VOCABULARY

    def __init__(self, blocks: int, block_size: int, window: int | None = None, fails: float = 0.0, seed: int = 0):
        self.blocks, self.block_size, self.window, self.fails = blocks, block_size, window, fails
        self.random = random.Random(seed)
        self.memory = np.random.default_rng(seed).integers(0, 2**63, blocks * block_size).astype(np.uint64)
        self.largest = 0

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        before = self.memory.copy()  # all at once
        for source, destination in pairs:
            size = self.block_size
            self.memory[destination * size : (destination + 1) * size] = before[source * size : (source + 1) * size]

    def step(self, batch: Batch) -> np.ndarray:
        if self.random.random() < self.fails / 2:
            raise ConnectionError("before anything was written")
        assert batch.tokens.dtype == batch.positions.dtype == batch.logit_rows.dtype == np.int64
        assert batch.slots.dtype == batch.block_tables.dtype == batch.query_starts.dtype == batch.context_lengths.dtype == np.int32
        assert len(batch.tokens) == len(batch.positions) == len(batch.slots) == batch.query_starts[-1]
        self.largest = max(self.largest, len(batch.tokens))
        size, values = self.block_size, np.zeros(len(batch.tokens), np.uint64)
        sequences = list(range(len(batch.context_lengths)))
        self.random.shuffle(sequences)  # no sequence may see what another one writes in the same step
        for b in sequences:
            start, stop = batch.query_starts[b], batch.query_starts[b + 1]
            assert batch.positions[stop - 1] == batch.context_lengths[b] - 1
            for t in range(start, stop):
                position = int(batch.positions[t])
                assert batch.slots[t] == batch.block_tables[b, position // size] * size + position % size
                first = 0 if self.window is None else max(0, position - self.window + 1)
                seen = np.arange(first, position)
                values[t] = value(int(batch.tokens[t]), position, self.memory[batch.block_tables[b, seen // size] * size + seen % size], first)
                self.memory[batch.slots[t]] = values[t]
        if self.random.random() < self.fails / 2:
            raise ConnectionError("after it was written")
        return np.stack([logits_of(values[t]) for t in batch.logit_rows]) if len(batch.logit_rows) else np.zeros((0, VOCABULARY), np.float32)

    def decode(self, batch: Batch, rows: list[Row], count: int, more: Callable[[], bool]) -> Iterator[list[Samples]]:
        """Several steps, in parts of several, of which the next is done before one is told; a step may fail in between."""
        rows, every, told, part = [replace(row, tokens=list(row.tokens)) for row in rows], list[Samples](), 0, self.random.randint(1, 3)
        for number in range(count):
            if number and number % part == 0:
                if number > part:
                    yield every[told : told + part]
                    told += part
                if not more():
                    break
            every.append(Sampler().sample(self.step(batch), range(len(rows)), rows))
            tokens, positions = every[-1].tokens, batch.positions + 1
            for row, token in zip(rows, tokens, strict=True):
                row.tokens.append(int(token))
            at = np.arange(len(rows)), np.minimum(positions // self.block_size, batch.block_tables.shape[1] - 1)
            slots = (batch.block_tables[at] * self.block_size + positions % self.block_size).astype(np.int32)
            batch = replace(batch, tokens=tokens, positions=positions, slots=slots, context_lengths=batch.context_lengths + np.int32(1))
        while told < len(every):
            yield every[told : told + part]
            told += part

    def spoil(self, blocks: list[int]) -> None:
        """Overwrite blocks that nobody may read any more."""
        for block in blocks:
            self.memory[block * self.block_size : (block + 1) * self.block_size] = np.uint64(self.random.getrandbits(63))


class FailingSampler(Sampler):
    def __init__(self, fails: float, seed: int):
        self.fails, self.random = fails, random.Random(seed)

    def sample(self, *inputs: Any) -> Samples:
        if self.random.random() < self.fails:
            raise ConnectionError("no sample")
        return super().sample(*inputs)


class Alone:
    """The same model without cache, blocks or batch: one request at a time, from lists."""

    def __init__(self, window: int | None = None):
        self.window = window
        self.known: dict[tuple[int, ...], np.uint64] = {}

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return logits_of(self.values(tokens)[-1])

    def values(self, tokens: Sequence[int]) -> list[np.uint64]:
        values: list[np.uint64] = []
        for position, token in enumerate(tokens):
            key = tuple(tokens[: position + 1])
            if key not in self.known:
                first = 0 if self.window is None else max(0, position - self.window + 1)
                self.known[key] = value(token, position, np.array(values[first:], np.uint64), first)
            values.append(self.known[key])
        return values

    def generate(self, request: Request) -> list[tuple[list[int], str, str]]:
        """Tokens, text and reason of each output."""
        s = request.sampling
        if s.beams > 1:
            return self.search(request)
        found = []
        for choice in range(s.n):
            row = Row(s, list(request.prompt), len(request.prompt), s.seed or 0, choice)
            while True:
                token = int(Sampler().sample(self.logits(row.tokens)[None], [0], [row]).tokens[0])
                row.tokens.append(token)
                new = row.tokens[row.prompt :]
                end = self.end(new, s)
                if end:
                    found.append((new, *end))
                    break
        return found

    def search(self, request: Request) -> list[tuple[list[int], str, str]]:
        s, prompt = request.sampling, list(request.prompt)
        beams = BeamSearch(s)
        while not beams.done:
            rows = [Row(s, [*prompt, *tokens], len(prompt)) for tokens in beams.running]
            logits = np.stack([self.logits(row.tokens) for row in rows])
            beams.advance(Sampler().log_probabilities(logits, range(len(rows)), rows)[0], lambda tokens: self.end(list(tokens), s) is not None)
        return [(list(b.tokens), *(self.end(list(b.tokens), s) or ("", "length"))) for b in beams.outputs()]

    @staticmethod
    def end(tokens: list[int], s: Sampling) -> tuple[str, str] | None:
        """Text and reason, if the output ends here."""
        stopped = tokens[-1] in s.stop_tokens
        text = decode(tokens[:-1] if stopped else tokens)
        cuts = [text.index(string) for string in s.stop if string in text]
        if cuts:
            return text[: min(cuts)], "stop"
        if stopped:
            return text, "stop"
        return (text, "length") if len(tokens) >= s.max_new_tokens else None


def random_request(rng: random.Random, families: list[list[int]]) -> Request:
    """A prompt that starts like others; any kind of sampling."""
    family = rng.choice(families)
    prompt = family[: rng.randint(1, len(family))] + [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 1, 3, 8]))]
    options: dict[str, Any] = {"max_new_tokens": rng.choice([1, 2, 5, 9, 14]), "seed": rng.getrandbits(64)}
    kind = rng.choice(["greedy", "greedy", "draw", "draw", "several", "beams"])
    if kind in ("draw", "several"):
        options["temperature"] = rng.choice([0.5, 1.0, 2.0])
        options.update(rng.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.8}]))
    if kind == "several":
        options["n"] = rng.randint(2, 4)
    if kind == "beams":
        options.update(beams=rng.randint(2, 3), early_stopping=rng.choice([True, False, "never"]), length_penalty=rng.choice([0.0, 1.0, 2.0]))
        options["n"] = rng.randint(1, options["beams"])
    options.update(rng.choice([{}, {}, {"stop_tokens": [0, 1]}, {"stop": ["ab", "c"]}, {"stop": ["ddd", "e", "fg"], "stop_tokens": [2]}]))
    options.update(rng.choice([{}, {}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2, "frequency_penalty": 0.5}]))
    return Request(prompt, Sampling(**options), priority=rng.choice([0, 0, 0, 1, 5]), decode=decode)


def check_contents(pool: BlockPool, model: FakeModel, alone: Alone) -> None:
    """Every block that may be found by its content holds what those tokens give."""
    size = pool.block_size
    for block, content in enumerate(pool._contents):
        tokens: list[int] = []
        while content is not None and content is not pool._root:
            tokens = [*np.frombuffer(content.tokens, np.int64).tolist(), *tokens]
            content = content.parent
        if tokens:
            assert model.memory[block * size : (block + 1) * size].tolist() == [int(v) for v in alone.values(tokens)[-size:]], "a block does not hold its content"


def run_schedule(seed: int) -> Counter[str]:
    """One random schedule to its end; raises AssertionError if anything differs from the requests alone."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4, 5])
    window = rng.choice([None, None, None, 3, 8])
    blocks = rng.randint(-(-40 // size), -(-120 // size))
    pool = BlockPool(blocks, size, window, reuse=rng.random() < 0.8)
    fails = rng.choice([0, 0, 0.1])
    model = FakeModel(blocks + rng.randint(0, 2), size, window, fails, seed)
    scheduler = Scheduler(model, pool, token_budget=rng.choice([3, 5, 16, 64]), seats=rng.choice([3, 4, 8]), patience=rng.choice([1, 5, 50]),
                          lookahead=rng.choice([1, 1, 2, 5, 12]), sampler=FailingSampler(fails / 2, seed))  # fmt: skip
    alone = Alone(window)
    families = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(4, 30))] for _ in range(3)]
    expected: dict[int, list[tuple[list[int], str, str]]] = {}
    got: dict[tuple[int, int], list[Output]] = {}
    left, cancelled, ended = rng.randint(4, 14), set[int](), set[int]()
    counts: Counter[str] = Counter()
    steps = 0
    while left or scheduler.unfinished:
        while left and (rng.random() < 0.5 or not scheduler.unfinished):
            left -= 1
            request = random_request(rng, families)
            try:
                number = scheduler.add(request)
            except Refused:
                counts["refused"] += 1
                continue
            expected[number] = alone.generate(request)
        if expected and rng.random() < 0.03:
            number = rng.choice(list(expected))
            if scheduler.cancel(number):
                cancelled.add(number)
        try:
            outputs = scheduler.step()
        except ConnectionError:
            counts["failed steps"] += 1
            outputs = []
        pool.check()
        model.spoil(pool._free)
        if steps % 8 == 0:
            check_contents(pool, model, alone)
        for output in outputs:
            assert output.request not in ended, "something came after the end"
            ended |= {output.request} if output.done else set()
            got.setdefault((output.request, output.choice), []).append(output)
        steps += 1
        assert steps < 5000, "no progress"
    assert ended == set(expected)
    for (number, choice), outputs in got.items():
        tokens, text, reason = expected[number][choice]
        found = [t for o in outputs for t in o.tokens]
        assert [o.finished for o in outputs[:-1]] == [None] * (len(outputs) - 1)
        if outputs[-1].finished == "cancelled":
            assert number in cancelled
            assert found == tokens[: len(found)]
            assert text.startswith("".join(o.text for o in outputs))
            continue
        assert (found, "".join(o.text for o in outputs), outputs[-1].finished) == (tokens, text, reason), f"request {number}, output {choice}"
        counts["outputs"] += 1
        counts["tokens"] += len(tokens)
    for number in set(expected) - cancelled:
        assert {c for n, c in got if n == number} == set(range(len(expected[number])))
    assert pool.used == 0, "leaked blocks"
    pool.forget()
    assert len(pool._free) == pool.blocks
    assert not pool._index
    assert model.largest <= scheduler.token_budget
    m = scheduler.metrics
    counts.update(schedules=1, steps=m.steps, preempted=m.preempted, reused=m.reused_tokens, computed=m.computed_tokens, copied=m.copied_blocks, cancelled=len(cancelled))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/schedules.json")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    started = time.perf_counter()
    for seed in range(arguments.first, arguments.first + arguments.schedules):
        try:
            counts += run_schedule(seed)
        except BaseException:
            print(f"schedule {seed}")
            raise
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s: {dict(counts)}")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        data = {**dict(sorted(counts.items())), "seconds": round(seconds), "different tokens": 0, "leaked blocks": 0}
        print(record.write("schedules", record.cpu(), record.versions("numpy"), data))


if __name__ == "__main__":
    main()
