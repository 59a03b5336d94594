"""The paged key-value cache: which block of device memory holds the keys and values of which tokens.

Memory is cut into blocks of `block_size` tokens. A `BlockPool` counts who uses each block; a `BlockTable` lists the blocks
of one sequence. No array is held here: the model keeps the keys and values, this file says where they lie.

A full block is known by its content: its tokens and everything before them. Contents are found by a chained hash and then
compared token by token and parent by parent, so that two prefixes whose hashes collide are never taken for each other.
Blocks that nobody uses keep their content until they are needed; the least recently used goes first. One content lies in
one block: a table that has computed what another one holds takes the other's block and gives its own back.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

from rewrite.errors import RewriteError

HIDDEN = -1  # in a table: a block given back because it lies before the window


class OutOfBlocks(RuntimeError):
    """There are too few free blocks. Nothing was changed: free or preempt a sequence and ask again."""


class CacheError(RuntimeError):
    """The cache was used wrongly (a table freed twice, ...) or, from `check`, an invariant does not hold."""


def digest(parent: int, tokens: bytes) -> int:
    """The chained hash of a block's content. A collision costs a hit, nothing else."""
    return hash((parent, tokens))


def block_count(memory: int, block_bytes: int) -> int:
    """How many blocks fit in `memory` bytes.

    block_bytes: of one block over all layers, 2 * layers * block_size * KV heads * head size * bytes an element.
    Raises RewriteError if not one fits.
    """
    if block_bytes < 1 or memory < block_bytes:
        raise RewriteError(f"KV cache: {memory} bytes hold no block of {block_bytes} bytes; give it more memory or choose a smaller block size")
    return memory // block_bytes


class Content:
    """What a full block holds: its tokens, after everything that its parents hold. Equal contents are one object."""

    __slots__ = ("__weakref__", "block", "digest", "indexed", "parent", "tokens")

    def __init__(self, parent: Content | None, tokens: bytes, key: int):
        self.parent = parent
        self.tokens = tokens
        self.digest = key
        self.block: int | None = None  # where it lies, if it does
        self.indexed = False  # False after a collision: it cannot be found, so it is never shared


class BlockPool:
    """The blocks of one model.

    blocks: how many; block_size: tokens a block.
    window: how many keys a query sees, its own included, if *every* layer has a window (the largest of them); None if any
        layer sees everything. Blocks before the window are given back.
    reuse: keep contents for sequences that start alike.
    """

    def __init__(self, blocks: int, block_size: int, window: int | None = None, reuse: bool = True):
        for name, value in (("blocks", blocks), ("block_size", block_size), ("window", 1 if window is None else window)):
            if value < 1:
                raise RewriteError(f"BlockPool: {name} is {value}; it has to be at least 1")
        self.blocks = blocks
        self.block_size = block_size
        self.window = window
        self.reuse = reuse
        self.hits = 0  # tokens that did not have to be computed
        self.asked = 0  # tokens of the sequences that were opened
        self.evictions = 0
        self._root = Content(None, b"", 0)
        self._index: WeakValueDictionary[int, Content] = WeakValueDictionary()
        self._references = [0] * blocks
        self._contents: list[Content | None] = [None] * blocks
        self._free = list(range(blocks - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # unused blocks with a content, the least recently used first
        self._copies: dict[int, int] = {}  # destination to source, until `take_copies`
        self._pins: Counter[int] = Counter()  # sources of copies: not to be reused before the copy
        self._tables: set[BlockTable] = set()

    @property
    def available(self) -> int:
        """Blocks that can be had now: free ones, and unused ones whose content would be forgotten."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        return self.blocks - self.available

    def blocks_for(self, length: int) -> int:
        """How many blocks a sequence of `length` tokens needs at least, computed one token at a time."""
        whole = -(-length // self.block_size)
        if self.window is None:
            return whole
        return min(whole, -(-(self.window - 1) // self.block_size) + 1)

    def first_visible(self, length: int) -> int:
        """The first block that a query at position `length` can see."""
        return 0 if self.window is None else max(0, length - self.window + 1) // self.block_size

    def open(self, tokens: Sequence[int]) -> BlockTable:
        """A new table that starts with the longest prefix of `tokens` that the cache holds.

        The last token is never taken from the cache, since its logits are wanted. Needs no free block; `table.length` says
        how many tokens need not be computed.
        """
        size = self.block_size
        packed = array("q", tokens).tobytes() if self.reuse else b""
        chain: list[Content] = []
        best = resident = 0  # length of the best prefix; of the run of contents that lie in a block
        parent = self._root
        for number in range((len(tokens) - 1) // size if self.reuse else 0):
            content = self._find(parent, packed[number * size * 8 : (number + 1) * size * 8])
            if content is None:
                break
            chain.append(content)
            parent = content
            resident = resident + 1 if content.block is not None else 0
            if resident and resident >= number + 1 - self.first_visible((number + 1) * size):
                best = number + 1
        table = BlockTable(self)
        first = self.first_visible(best * size)
        for content in chain[first:best]:
            assert content.block is not None
            self._acquire(content.block)
        table.blocks = array("i", [HIDDEN] * first + [c.block for c in chain[first:best] if c.block is not None])
        table.length = table.computed = best * size
        table.tail = chain[best - 1] if best else self._root
        self._tables.add(table)
        self.asked += len(tokens)
        self.hits += table.length
        return table

    def needed(self, growth: Iterable[tuple[BlockTable, int]]) -> int:
        """How many free blocks it takes to extend each table by so many tokens, copies of shared blocks included."""
        count = 0
        references: dict[int, int] = {}
        for table, tokens in growth:
            count += -(-(table.length + tokens) // self.block_size) - len(table.blocks)
            if not tokens or table.length % self.block_size == 0:
                continue
            last = table.blocks[-1]
            holders = references.get(last, self._references[last])
            references[last] = holders - 1
            count += holders > 1
        return count

    def room(self, table: BlockTable) -> int:
        """By how many tokens `table` can be extended now."""
        blocks = self.available
        partial = -table.length % self.block_size
        if partial and self._references[table.blocks[-1]] > 1:
            if not blocks:
                return 0
            blocks -= 1
        return partial + blocks * self.block_size

    def take_copies(self) -> list[tuple[int, int]]:
        """Pairs (source, destination) of blocks to be copied before the next step writes anything.

        No destination is named twice and none is a source, so that all may be copied at once.
        """
        pairs = [(source, destination) for destination, source in self._copies.items()]
        self._copies.clear()
        for source, _ in pairs:
            self._unpin(source)
        return pairs

    def forget(self) -> None:
        """Forget every content that no sequence uses."""
        while self._kept:
            self._free.append(self._evict())

    def _find(self, parent: Content, tokens: bytes) -> Content | None:
        found = self._index.get(digest(parent.digest, tokens))
        if found is None or found.tokens != tokens or found.parent is not parent:
            return None
        return found

    def _intern(self, parent: Content, tokens: bytes) -> Content:
        found = self._find(parent, tokens)
        if found is not None:
            return found
        content = Content(parent, tokens, digest(parent.digest, tokens))
        if content.digest not in self._index:
            self._index[content.digest] = content
            content.indexed = True
        return content

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        content = self._contents[block]
        assert content is not None
        content.block = None
        self._contents[block] = None
        self.evictions += 1
        return block

    def _allocate(self, count: int) -> list[int]:
        if count > self.available:
            raise OutOfBlocks(f"KV cache: {count} blocks are needed and {self.available} are free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _acquire(self, block: int) -> None:
        if not self._references[block]:
            self._kept.pop(block, None)  # it is not there while it is the source of a copy
        self._references[block] += 1

    def _release(self, blocks: Iterable[int]) -> None:
        references, contents = self._references, self._contents
        for block in blocks:
            if references[block] < 1:
                raise CacheError(f"KV cache: block {block} is freed, and nobody holds it")
            references[block] -= 1
            if references[block]:
                continue
            if self._copies or self._pins:
                if block in self._copies:
                    self._unpin(self._copies.pop(block))
                self._put_back(block)
            elif contents[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def _unpin(self, block: int) -> None:
        self._pins[block] -= 1
        if not self._pins[block]:
            del self._pins[block]
        self._put_back(block)

    def _put_back(self, block: int) -> None:
        if self._references[block] or block in self._pins:
            return
        if self._contents[block] is None:
            self._free.append(block)
        else:
            self._kept[block] = None

    def check(self) -> None:
        """Raises CacheError unless every block is accounted for; takes time in proportion to the blocks."""
        held: Counter[int] = Counter()
        for table in self._tables:
            table._check()
            held.update(b for b in table.blocks if b != HIDDEN)
        free, kept = Counter(self._free), set(self._kept)
        if Counter(self._copies.values()) != self._pins:
            raise CacheError(f"KV cache: copies {self._copies} and pins {dict(self._pins)} differ")
        for block in range(self.blocks):
            content = self._contents[block]
            if self._references[block] != held[block]:
                raise CacheError(f"KV cache: block {block} has {self._references[block]} references and {held[block]} holders")
            homes = free[block] + (block in kept) + bool(held[block] or block in self._pins)
            if homes != 1:
                raise CacheError(f"KV cache: block {block} is in {homes} of free, kept and used")
            if content is not None and content.block != block:
                raise CacheError(f"KV cache: block {block} has a content that lies in block {content.block}")
            if (content is None and block in kept) or (content is not None and free[block]):
                raise CacheError(f"KV cache: block {block} is unused and its content is {content}")
            if block in self._copies and not held[block]:
                raise CacheError(f"KV cache: block {block} is the destination of a copy and belongs to nobody")
            if block in self._copies and block in self._pins:
                raise CacheError(f"KV cache: block {block} is both source and destination of a copy")


class BlockTable:
    """The blocks of one sequence. Made by `BlockPool.open` and `fork`; `free` ends it.

    blocks    int32 array: block of tokens 0 to block_size - 1, of the next ones, ...; HIDDEN where they lie before the window
    length    tokens that have a slot: token t the slot blocks[t // block_size] * block_size + t % block_size
    computed  tokens whose keys and values are written; behind `length` between `extend` and `commit`
    """

    def __init__(self, pool: BlockPool):
        self.pool = pool
        self.blocks = array("i")
        self.length = 0
        self.computed = 0
        self.tail = pool._root  # content of the last full block
        self._open = array("q")  # tokens after that block

    def extend(self, count: int) -> None:
        """Slots for the next tokens. A block that others share is replaced by a copy first.

        Raises OutOfBlocks, and changes nothing, if there are too few blocks. The step that writes them, after the copies
        of `BlockPool.take_copies`, is followed by `commit`.
        """
        pool, partial = self.pool, self.length % self.pool.block_size
        self._alive()
        if self.computed != self.length:
            raise CacheError("KV cache: a table is extended before its last tokens were committed")
        shared = partial and count and pool._references[self.blocks[-1]] > 1
        if shared or not partial or partial + count > pool.block_size:
            blocks = pool._allocate(pool.needed([(self, count)]))
            if shared:
                old, own = self.blocks[-1], blocks.pop(0)
                pool._copies[own] = old
                pool._pins[old] += 1
                pool._release([old])
                self.blocks[-1] = own
            self.blocks.extend(blocks)
        self.length += count

    def commit(self, tokens: Sequence[int]) -> None:
        """The step is done. tokens: those that were written, at most as many as the table was extended by; the slots of the
        others are given back. What is full may now be shared, and what no later query can see is given back.
        """
        pool, size = self.pool, self.pool.block_size
        self._alive()
        if self.computed + len(tokens) > self.length:
            raise CacheError(f"KV cache: {len(tokens)} tokens are committed, and there are slots for {self.length - self.computed}")
        first = self.computed // size
        self.length = self.computed = self.computed + len(tokens)
        used = -(-self.length // size)
        if len(self.blocks) > used:
            pool._release(reversed(self.blocks[used:]))
            del self.blocks[used:]
        self._open.extend(tokens)
        full = len(self._open) // size
        for number in range(full if pool.reuse else 0):
            self.tail = pool._intern(self.tail, self._open[number * size : (number + 1) * size].tobytes())
            self._share(first + number)
        if full:
            del self._open[: full * size]
        if pool.window is not None:
            self._hide()

    def _hide(self) -> None:
        for hidden in range(min(self.pool.first_visible(self.length), len(self.blocks)) - 1, -1, -1):
            if self.blocks[hidden] == HIDDEN:
                break
            self.pool._release([self.blocks[hidden]])
            self.blocks[hidden] = HIDDEN

    def _share(self, number: int) -> None:
        """Give the content its block, or take the block that it has."""
        pool, content, own = self.pool, self.tail, self.blocks[number]
        if not content.indexed:
            return
        if content.block is None:
            content.block = own
            pool._contents[own] = content
        elif content.block != own:
            pool._acquire(content.block)
            self.blocks[number] = content.block
            pool._release([own])

    def fork(self) -> BlockTable:
        """A second table with the same tokens; needs no block until one of the two is extended."""
        self._alive()
        if self.computed != self.length:
            raise CacheError("KV cache: a table is forked before its last tokens were committed")
        table = BlockTable(self.pool)
        table.blocks, table.length, table.computed = self.blocks[:], self.length, self.computed
        table.tail, table._open = self.tail, self._open[:]
        for block in self.blocks:
            if block != HIDDEN:
                self.pool._acquire(block)
        self.pool._tables.add(table)
        return table

    def free(self) -> None:
        """Give every block back. The last ones are forgotten first, since they are of use only after the first."""
        self._alive()
        self.pool._tables.remove(self)
        self.pool._release(block for block in reversed(self.blocks) if block != HIDDEN)
        self.blocks = array("i")

    def _alive(self) -> None:
        if self not in self.pool._tables:
            raise CacheError("KV cache: a table is used after it was freed")

    def _check(self) -> None:
        pool, size = self.pool, self.pool.block_size
        seen = [b for b in self.blocks if b != HIDDEN]
        if len(self.blocks) != -(-self.length // size) or len(set(seen)) != len(seen):
            raise CacheError(f"KV cache: {self.length} tokens lie in blocks {list(self.blocks)}")
        first = pool.first_visible(self.computed)
        if HIDDEN in self.blocks[first:] or any(b != HIDDEN for b in self.blocks[:first]):
            raise CacheError(f"KV cache: the window starts at block {first} of {list(self.blocks)}")
        if self.computed != self.length and any(pool._references[b] != 1 for b in self.blocks[self.computed // size :]):
            raise CacheError(f"KV cache: a shared block of {list(self.blocks)} is being written")
        content: Content | None = self.tail
        for block in reversed(self.blocks[: self.computed // size] if pool.reuse else array("i")):
            assert content is not None
            if block != HIDDEN and pool._contents[block] is not (content if content.indexed else None):
                raise CacheError(f"KV cache: block {block} has another content than the table that holds it")
            content = content.parent
        if content is not pool._root:
            raise CacheError("KV cache: a table has more contents than full blocks")
