"""Random work on the KV cache beside a simple model of it (`python tests/cache_model.py --steps 1000000 --record` is the long run).

The model knows no references, no free list and no hashes. It keeps the tokens of each sequence and names for the blocks that
hold them: a full block is named by all tokens up to its end, a partial one by a number that forks share until one of them
writes. From that alone follow how many blocks are in use, what an extension costs and whether it must fail. What the cache
says is also done to a memory of one cell a slot, and each sequence must find its own tokens there.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from pathlib import Path

from rewrite.runtime.kv_cache import HIDDEN, BlockPool, BlockTable, OutOfBlocks

EPISODE = 500  # steps with one pool
GARBAGE = (-1, -1)


class Sequence:
    def __init__(self, table: BlockTable, tokens: list[int], done: int):
        self.table = table
        self.tokens = tokens  # known
        self.done = done  # of which so many are computed
        self.partial: int | None = None  # name of the last block, if it is not full
        self.full: list[object] = []  # names of the full blocks

    def cell(self, position: int) -> tuple[int, int]:
        """What memory holds of a token: itself, and all that it depends on."""
        return self.tokens[position], hash(tuple(self.tokens[: position + 1]))


class Trial:
    """One pool and what is done to it. `step` does something at random and raises AssertionError if cache and model differ."""

    def __init__(self, seed: int, exact: bool = True):
        self.random = random.Random(seed)
        self.exact = exact  # False where hashes collide: equal contents may then lie in two blocks
        size = self.random.choice([1, 2, 3, 4])
        window = self.random.choice([None, None, 1, 2, 5, 9])
        self.pool = BlockPool(self.random.randint(4, 24), size, window, reuse=self.random.random() < 0.9)
        self.live: list[Sequence] = []
        self.waiting: list[list[int]] = []
        self.memory = [GARBAGE] * (self.pool.blocks * size)
        self.names = itertools.count()
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        action = self.random.choices([self.add, self.grow, self.fork, self.cancel, self.preempt, self.resume], [3, 8, 2, 1, 1, 2])[0]
        action()
        self.compare()

    # What is done

    def add(self) -> None:
        """A prompt of few different tokens, so that many start alike."""
        self.open([self.random.randrange(2) for _ in range(self.random.randint(1, 4 * self.pool.block_size))])
        self.counts["add"] += 1

    def resume(self) -> None:
        if not self.waiting:
            return self.add()
        self.open(self.waiting.pop(self.random.randrange(len(self.waiting))))
        self.counts["resume"] += 1

    def open(self, tokens: list[int]) -> None:
        if self.pool.blocks_for(len(tokens)) > self.pool.blocks:
            self.counts["too long"] += 1
            return
        table = self.pool.open(tokens)
        size = self.pool.block_size
        assert table.length % size == 0
        assert table.length < len(tokens)
        sequence = Sequence(table, tokens, table.length)
        sequence.full = [self.name(tokens, n) for n in range(table.length // size)]
        if self.pool.window is None and self.pool.reuse and self.exact:
            held = {name for s in self.live for name in s.full}
            known = next((n for n in range((len(tokens) - 1) // size) if self.name(tokens, n) not in held), (len(tokens) - 1) // size)
            assert table.length >= known * size, "a prefix that another sequence holds was not found"
        self.counts["hit tokens"] += table.length
        self.live.append(sequence)

    def grow(self) -> None:
        """One step of the model: some sequences get their next tokens; who finds no block preempts another or waits."""
        chosen = self.random.sample(self.live, min(len(self.live), self.random.randint(1, 4)))
        grown: list[tuple[Sequence, list[int]]] = []
        for sequence in chosen:
            if sequence not in self.live:
                continue
            count = self.random.randint(1, 2 * self.pool.block_size)
            known = len(sequence.tokens)
            while len(sequence.tokens) < sequence.done + count:
                sequence.tokens.append(self.random.randrange(2))
            slots = self.extend(sequence, count, [s for s, _ in grown])
            if slots is None:
                del sequence.tokens[max(known, sequence.done) :]
                continue
            grown.append((sequence, slots))
        self.finish(grown)
        self.counts["grow"] += 1

    def extend(self, sequence: Sequence, count: int, busy: list[Sequence]) -> list[int] | None:
        size = self.pool.block_size
        while True:
            need = self.need(sequence, count)
            free = self.pool.available
            assert self.pool.needed([(sequence.table, count)]) == need
            try:
                sequence.table.extend(count)
            except OutOfBlocks:
                assert need > free, "out of blocks, and there are enough"
                self.counts["out of memory"] += 1
            else:
                assert need <= free, "blocks were given that do not exist"
                return [sequence.table.blocks[t // size] * size + t % size for t in range(sequence.done, sequence.done + count)]
            others = [s for s in self.live if s is not sequence and s not in busy]
            if others and self.random.random() < 0.7:
                self.drop(self.random.choice(others), keep=True)
            else:
                return None

    def finish(self, grown: list[tuple[Sequence, list[int]]]) -> None:
        size = self.pool.block_size
        copies = self.pool.take_copies()
        sources, destinations = [s for s, _ in copies], [d for _, d in copies]
        assert len(set(destinations)) == len(destinations)
        assert not set(sources) & set(destinations)
        before = list(self.memory)
        for source, destination in copies:
            self.memory[destination * size : (destination + 1) * size] = before[source * size : (source + 1) * size]
        if grown and self.random.random() < 0.2:  # not all of what was reserved is used
            sequence, slots = grown[-1]
            grown[-1] = (sequence, slots[: self.random.randrange(len(slots) + 1)])
            self.counts["given back"] += len(slots) - len(grown[-1][1])
        written = [s for _, slots in grown for s in slots]
        assert len(set(written)) == len(written), "one slot is written twice"
        for sequence, slots in grown:
            if sequence.partial is not None and any(s.partial == sequence.partial for s in self.live if s is not sequence):
                sequence.partial = next(self.names)  # copied, even if none of its slots is used
            for slot in slots:
                self.memory[slot] = sequence.cell(sequence.done)
                sequence.done += 1
                self.place(sequence)
        for sequence, slots in grown:
            sequence.table.commit(sequence.tokens[sequence.done - len(slots) : sequence.done])

    def fork(self) -> None:
        if not self.live:
            return
        parent = self.random.choice(self.live)
        child = Sequence(parent.table.fork(), list(parent.tokens), parent.done)
        child.partial, child.full = parent.partial, list(parent.full)
        self.live.append(child)
        self.counts["fork"] += 1

    def cancel(self) -> None:
        if self.live:
            self.drop(self.random.choice(self.live), keep=False)
            self.counts["cancel"] += 1

    def preempt(self) -> None:
        if self.live:
            self.drop(self.random.choice(self.live), keep=True)

    def drop(self, sequence: Sequence, keep: bool) -> None:
        sequence.table.free()
        self.live.remove(sequence)
        if keep:
            self.counts["preempt"] += 1
            self.waiting.append(sequence.tokens)
            del self.waiting[:-8]

    # The model

    def name(self, tokens: list[int], number: int) -> object:
        return tuple(tokens[: (number + 1) * self.pool.block_size])

    def place(self, sequence: Sequence) -> None:
        """The sequence has one token more: name the block that it lies in."""
        size = self.pool.block_size
        if sequence.partial is None:
            sequence.partial = next(self.names)
        if sequence.done % size == 0:
            number = sequence.done // size - 1
            sequence.full.append(self.name(sequence.tokens, number) if self.pool.reuse else sequence.partial)
            sequence.partial = None

    def need(self, sequence: Sequence, count: int) -> int:
        size = self.pool.block_size
        blocks = -(-(sequence.done + count) // size) - -(-sequence.done // size)
        holders = [s for s in self.live if s.partial is not None and s.partial == sequence.partial and s.table.length == s.done]
        return blocks + (len(holders) > 1)

    def visible(self, sequence: Sequence) -> list[object]:
        """Names of the blocks that the next query sees."""
        size, window = self.pool.block_size, self.pool.window
        oldest = 0 if window is None else sequence.done - window + 1
        names = [n for i, n in enumerate(sequence.full) if (i + 1) * size - 1 >= oldest]
        return names + ([("partial", sequence.partial)] if sequence.partial is not None else [])

    def compare(self) -> None:
        self.pool.check()
        size, window = self.pool.block_size, self.pool.window
        if self.exact:
            used = {name for s in self.live for name in self.visible(s)}
            assert self.pool.used == len(used), f"{self.pool.used} blocks are in use, and the sequences need {len(used)}"
        for sequence in self.live if self.random.random() < 0.1 else self.live[-1:]:
            table = sequence.table
            assert table.length == table.computed == sequence.done
            first = 0 if window is None else max(0, sequence.done - window + 1)
            for position in range(first, sequence.done):
                block = table.blocks[position // size]
                assert block != HIDDEN
                assert self.memory[block * size + position % size] == sequence.cell(position), "a block holds another sequence's tokens"

    def end(self) -> None:
        """Whoever waits can still be served to its end, alone; then nothing is left in use."""
        while self.live:
            self.drop(self.live[0], keep=self.random.random() < 0.5)
        for tokens in self.waiting:
            if self.pool.blocks_for(len(tokens)) > self.pool.blocks:
                continue
            self.open(list(tokens))
            sequence = self.live[0]
            while sequence.done < len(tokens):
                slots = self.extend(sequence, min(len(tokens) - sequence.done, self.pool.room(sequence.table)), [])
                assert slots is not None, "no progress"
                self.finish([(sequence, slots)])
            self.compare()
            self.drop(sequence, keep=False)
        self.compare()
        assert self.pool.used == 0, "leaked blocks"
        self.pool.forget()
        assert sorted(self.pool._free) == list(range(self.pool.blocks))


def run(steps: int, first: int = 0, exact: bool = True) -> Counter[str]:
    """So many steps, in trials of EPISODE steps; returns how often what was done."""
    counts: Counter[str] = Counter()
    for seed in range(first, first + -(-steps // EPISODE)):
        trial = Trial(seed, exact)
        for _ in range(EPISODE):
            trial.step()
        trial.end()
        counts += trial.counts
        counts["evictions"] += trial.pool.evictions
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/cache_model.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    counts = run(arguments.steps)
    seconds = time.perf_counter() - started
    print(f"{arguments.steps} steps in {seconds:.0f} s: {dict(counts)}")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        data = {"steps": arguments.steps, "pools": -(-arguments.steps // EPISODE), "seconds": round(seconds), "done": dict(sorted(counts.items())),
                "leaked": 0, "freed twice": 0, "without progress": 0}  # fmt: skip
        print(record.write("cache_model", record.cpu(), record.versions("numpy"), data))


if __name__ == "__main__":
    main()
