"""The paged KV cache: what it shares, what it copies, what it forgets, and 20,000 random steps beside a simple model."""

from __future__ import annotations

import pytest
from cache_model import run

from rewrite.errors import RewriteError
from rewrite.runtime import kv_cache
from rewrite.runtime.kv_cache import HIDDEN, BlockPool, BlockTable, CacheError, Content, OutOfBlocks, block_count


def write(pool: BlockPool, table: BlockTable, tokens: list[int]) -> None:
    table.extend(len(tokens))
    pool.take_copies()
    table.commit(tokens)
    pool.check()


def filled(pool: BlockPool, tokens: list[int]) -> BlockTable:
    table = pool.open(tokens)
    write(pool, table, tokens[table.length :])
    return table


def test_random_steps_beside_a_simple_model():
    counts = run(20_000)
    assert min(counts[k] for k in ("add", "grow", "fork", "cancel", "preempt", "resume", "out of memory", "evictions", "hit tokens")) > 500


def test_colliding_hashes_corrupt_nothing(monkeypatch):
    monkeypatch.setattr(kv_cache, "digest", lambda parent, tokens: hash((parent, tokens)) % 3)
    counts = run(4_000, exact=False)
    assert counts["hit tokens"] > 50, "what did not collide is still found"


def unverified(pool, parent, tokens):
    return pool._index.get(kv_cache.digest(parent.digest, tokens))


def no_copy(self, count):
    shared = self.blocks[-1] if self.blocks else None
    EXTEND(self, count)
    if shared is not None and shared not in self.blocks:
        self.blocks[(self.length - count) // self.pool.block_size] = shared


def put_back_some(pool, block):
    if not pool._references[block] and pool._contents[block] is None and block % 5:
        pool._free.append(block)


def put_back_pinned(pool, block):
    if not pool._references[block]:
        pool._free.append(block) if pool._contents[block] is None else pool._kept.setdefault(block)


EXTEND, RELEASE = BlockTable.extend, BlockPool._release
BUGS = {
    "the tokens of a hit are not compared": (BlockPool, "_find", unverified),
    "a shared block is written": (BlockTable, "extend", no_copy),
    "a released block stays in use": (BlockPool, "_put_back", put_back_some),
    "a block is released twice": (BlockPool, "_release", lambda pool, blocks: RELEASE(pool, [b for block in blocks for b in [block] * (1 + (block == 3))])),
    "the source of a copy may be reused before the copy": (BlockPool, "_put_back", put_back_pinned),
    "an evicted content keeps its block": (BlockPool, "_evict", lambda pool: pool._kept.popitem(last=False)[0]),
    "blocks before the window are kept": (BlockPool, "first_visible", lambda pool, length: 0),
    "the window is one too short": (BlockPool, "first_visible", lambda pool, length: 0 if pool.window is None else max(0, length - pool.window + 2) // pool.block_size),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(monkeypatch, bug):
    if "compared" in bug:
        monkeypatch.setattr(kv_cache, "digest", lambda parent, tokens: hash((parent, tokens)) % 3)
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises((AssertionError, CacheError, IndexError)):
        run(20_000, exact="compared" not in bug)


def test_a_prefix_is_taken_from_the_cache_in_whole_blocks_and_never_all_of_it():
    pool = BlockPool(16, 4)
    first = filled(pool, list(range(12)))
    assert pool.open(list(range(12))).length == 8, "the last token is computed: its logits are wanted"
    assert pool.open(list(range(13))).length == 12
    assert pool.open([*range(7), 99, *range(8, 20)]).length == 4
    assert pool.open([5, *range(1, 12)]).length == 0
    again = pool.open(list(range(13)))
    assert again.blocks == first.blocks
    assert pool.hits == 8 + 12 + 4 + 12
    assert pool.used == 3


def test_what_is_freed_stays_known_until_its_block_is_needed_and_the_oldest_goes_first():
    pool = BlockPool(4, 2)
    filled(pool, [1, 2, 3, 4]).free()
    filled(pool, [5, 6]).free()
    assert pool.used == 0
    assert pool.available == 4
    pool.open([1, 2, 0]).free()  # used again: now younger than [5, 6], but its second block is not
    other = filled(pool, [7, 8, 9, 10])
    assert pool.evictions == 1
    assert pool.open([1, 2, 3, 4, 0]).length == 2
    assert pool.open([5, 6, 0]).length == 2
    other.free()
    pool.check()


def test_the_end_of_a_sequence_is_forgotten_before_its_start():
    pool = BlockPool(3, 2)
    filled(pool, [1, 2, 3, 4, 5, 6]).free()
    filled(pool, [9, 9]).free()
    assert pool.open([1, 2, 3, 4, 5, 6, 7]).length == 4


def test_sequences_that_compute_the_same_share_one_block_afterwards():
    pool = BlockPool(8, 2)
    a, b = pool.open([1, 2, 3]), pool.open([1, 2, 4])
    a.extend(3)
    b.extend(3)
    assert pool.used == 4
    a.commit([1, 2, 3])
    b.commit([1, 2, 4])
    pool.check()
    assert pool.used == 3
    assert a.blocks[0] == b.blocks[0]
    assert a.blocks[1] != b.blocks[1]


def test_a_fork_copies_the_shared_block_once_it_is_written():
    pool = BlockPool(8, 4)
    a = filled(pool, [1, 2, 3, 4, 5, 6])
    b = a.fork()
    assert pool.used == 2
    assert pool.needed([(a, 1)]) == 1
    assert pool.needed([(a, 1), (b, 1)]) == 1
    assert pool.needed([(a, 1), (b, 3)]) == 2
    shared = a.blocks[-1]
    a.extend(1)
    assert pool.take_copies() == [(shared, a.blocks[-1])]
    b.extend(1)
    assert b.blocks[-1] == shared, "the last owner writes in place"
    assert pool.take_copies() == []
    a.commit([7])
    b.commit([8])
    pool.check()
    assert a.blocks[0] == b.blocks[0]
    assert pool.used == 3


def test_the_source_of_a_copy_is_not_reused_before_the_copy():
    pool = BlockPool(2, 4)
    a = filled(pool, [1])
    b = a.fork()
    a.extend(1)
    b.free()
    assert pool.available == 0
    with pytest.raises(OutOfBlocks):
        pool.open([3]).extend(1)
    assert len(pool.take_copies()) == 1
    assert pool.available == 1
    a.commit([2])
    pool.check()


def test_a_copy_for_a_freed_table_is_dropped():
    pool = BlockPool(4, 4)
    a = filled(pool, [1])
    b = a.fork()
    b.extend(1)
    b.free()
    assert pool.take_copies() == []
    assert pool.used == 1
    pool.check()


def test_blocks_before_the_window_are_given_back():
    pool = BlockPool(8, 2, window=3)
    table = pool.open([])
    for length, hidden in ((1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 2), (7, 2), (8, 3)):
        write(pool, table, [length])
        assert table.blocks.count(HIDDEN) == hidden, f"a query at position {length} sees from {max(0, length - 2)}"
    assert pool.used <= pool.blocks_for(1000) == 2


def test_a_window_needs_only_its_last_blocks_for_a_hit():
    pool = BlockPool(8, 2, window=3)
    table = pool.open([])
    for token in range(10):
        write(pool, table, [token])
    table.free()
    pool.open([50, 51]).extend(10)  # takes 5 of the 8 blocks, the first ones of the other sequence among them
    again = pool.open([*range(8), 70])
    assert again.length == 8
    assert list(again.blocks[:3]) == [HIDDEN] * 3
    pool.take_copies()


def test_exhaustion_changes_nothing():
    pool = BlockPool(2, 2)
    table = filled(pool, [1, 2, 3])
    before = table.blocks[:]
    with pytest.raises(OutOfBlocks, match=r"1 blocks are needed and 0 are free"):
        table.extend(2)
    assert table.blocks == before
    assert table.length == 3
    assert pool.room(table) == 1
    pool.check()
    write(pool, table, [4])


def test_slots_that_were_not_used_are_given_back():
    pool = BlockPool(8, 2)
    table = filled(pool, [1, 2, 3])
    table.extend(6)
    assert pool.used == 5
    table.commit([4, 5])
    pool.check()
    assert (table.length, pool.used) == (5, 3)
    table.extend(1)
    with pytest.raises(CacheError, match="2 tokens are committed, and there are slots for 1"):
        table.commit([6, 7])
    table.commit([])
    assert (table.length, pool.used) == (5, 3)


def test_wrong_use_is_refused():
    pool = BlockPool(2, 2)
    table = pool.open([1])
    table.extend(1)
    with pytest.raises(CacheError, match="before its last tokens were committed"):
        table.fork()
    with pytest.raises(CacheError, match="before its last tokens were committed"):
        table.extend(1)
    table.free()
    for use in (table.free, lambda: table.commit([]), table.fork, lambda: table.extend(1)):
        with pytest.raises(CacheError, match="after it was freed"):
            use()
    with pytest.raises(RewriteError, match="block_size is 0; it has to be at least 1"):
        BlockPool(4, 0)
    with pytest.raises(RewriteError, match="hold no block of 100 bytes"):
        block_count(99, 100)
    assert block_count(1000, 100) == 10


def test_contents_that_nobody_needs_are_gone():
    import gc

    pool = BlockPool(300, 1)
    for start in range(0, 3000, 100):
        filled(pool, list(range(start, start + 100))).free()
    gc.collect()
    assert len(pool._index) <= 300
    pool.forget()
    assert not pool._index
    assert pool.available == 300


def test_a_long_chain_of_contents_ends_without_recursion():
    pool = BlockPool(200_000, 1)
    filled(pool, list(range(200_000))).free()
    pool.forget()
    assert not pool._index
    assert Content.__slots__
