"""Sampling on a GPU: what `sampling.Sampler` does, by one kernel (`plugins/sampling.cu`) for all rows of a step.

A row is shared by a cluster of blocks, which keep it in shared memory: it is read once, and nothing is sorted. What a
request's draw depends on is added up in whole numbers, so that its token is the same however the row is shared, whatever else
is in the batch, and each time. The tokens are those of the NumPy reference but where float32 leaves a choice: two values of a
draw within a few units of the last place, or a token at the edge of top-p or typical-p where the sum of those before it is p
to about seven digits.

For single steps, `CudaSampler` has the two methods of `Sampler`. For steps that follow each other on the device, a `SamplerState`
is loaded once, and each `enqueue` (which may be captured in a CUDA graph) draws one token a row, counts it, and goes on:

    state = CudaSampler().state(seats=32, vocabulary=128256)
    state.load(rows, steps=8)
    for _ in range(8):                       # or the replay of a graph
        ...                                  # the model reads `tokens` and writes `logits`
        state.enqueue(logits, tokens)
    samples = state.samples()                # of each step, as Sampler.sample would give them
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewrite.errors import RewriteError, blame
from rewrite.plugins.cuda_launch import Launch, capability, launcher, module
from rewrite.runtime.cuda import DEVICE_TO_HOST
from rewrite.runtime.sampling import IMPOSSIBLE, Logprob, Row, Sampler, Samples, Sampling, likeliest, permitted

Array = np.ndarray[Any, Any]
LOGITS = ("float32", "float16", "bfloat16")
HEAD = 26 << 10  # bytes of shared memory beside the logits
MOST_RANKS = 8  # blocks of a cluster
MOST_LOGPROBS = 64
LARGEST_VOCABULARY = MOST_RANKS * (((227 << 10) - HEAD) // 4 // 8 * 8)
ROOM = 1 << 20  # bytes for lists that are there from the start
# struct Row of sampling.cu; lists are addresses on the device
ROW = np.dtype([
    ("top_p", "f8"), ("typical_p", "f8"), ("history", "u8"), ("seen", "u8"), ("bias", "u8"), ("words", "u8"), ("stops", "u8"), ("mask", "u8"), ("record", "u8"),
    ("chances", "u8"), ("out", "u8"), ("seed", "u8"), ("index", "u4"), ("length", "u4"), ("prompt", "u4"), ("choice", "u4"), ("step", "u4"), ("steps", "u4"), ("top_k", "u4"), ("ngram", "u4"),
    ("min_new", "u4"), ("seen_count", "u4"), ("bias_count", "u4"), ("word_count", "u4"), ("stop_count", "u4"), ("logprobs", "i4"), ("temperature", "f4"), ("min_p", "f4"),
    ("repetition", "f4"), ("presence", "f4"), ("frequency", "f4"), ("dead", "u4"), ("stride", "u4"), ("unused", "u4"),
])  # fmt: skip
COUNTS = {"seen": "seen_count", "bias": "bias_count", "words": "word_count", "stops": "stop_count"}
LISTS = ("history", "seen", "bias", "words", "stops", "mask", "record", "chances")


def supports(row: Row) -> str | None:
    """Why the next tokens of a row cannot be chosen on the device alone, step after step; None if they can."""
    s = row.sampling
    if s.beams > 1:
        return f"beam search ({s.beams} beams) is decided on the host"
    if s.allowed is not None:
        return "allowed is a function on the host, which is asked before each step"
    if (s.logprobs or 0) > MOST_LOGPROBS:
        return f"logprobs is {s.logprobs}; the device finds at most {MOST_LOGPROBS}"
    return None


class CudaSampler(Sampler):
    """`sampling.Sampler` for logits on a GPU: CuPy arrays of float32, float16 or bfloat16, [N, V].

    Needs compute capability 9.0 (clusters), and at most LARGEST_VOCABULARY tokens; RewriteError says so otherwise.
    """

    def __init__(self) -> None:
        if capability() < 90:
            raise RewriteError(f"CudaSampler: this GPU has compute capability {capability() / 10}; needed is 9.0. Copy the logits to the host and use Sampler")
        self._states: dict[int, SamplerState] = {}

    def state(self, seats: int, vocabulary: int) -> SamplerState:
        """Buffers at fixed addresses for the parameters of up to `seats` rows."""
        return SamplerState(seats, vocabulary)

    def sample(self, logits: Any, index: Sequence[int], rows: Sequence[Row]) -> Samples:
        """The next token of each of R rows; row i reads logits[index[i]] of [N, V]. Waits for the result."""
        if not rows:
            return Samples(np.zeros(0, np.int64), [], [])
        state = self._state(len(rows), logits.shape[1])
        state.load(rows, index=index)
        state.enqueue(logits, state.tokens[: len(rows)])
        samples = state.samples()[0]
        for i, row in enumerate(rows):
            count = row.sampling.logprobs or 0
            if count > MOST_LOGPROBS and samples.tokens[i] >= 0:
                samples.logprobs[i] = likeliest(logits[index[i]].get().astype(np.float32), int(samples.tokens[i]), count)
        return samples

    def log_probabilities(self, logits: Any, index: Sequence[int], rows: Sequence[Row]) -> tuple[Array, list[str | None]]:
        """For beam search, on the host: log-probabilities float32 [R, V] with everything before the temperature done, and errors."""
        import cupy

        out = cupy.empty((len(rows), logits.shape[1]), np.float32)
        if not rows:
            return out.get(), []
        state = self._state(len(rows), logits.shape[1])
        state.load(rows, index=index, out=out)
        state.enqueue(logits, state.tokens[: len(rows)])
        return out.get(), state.samples()[0].errors

    def _state(self, rows: int, vocabulary: int) -> SamplerState:
        found = self._states.get(vocabulary)
        if found is None or found.seats < rows:
            found = self._states[vocabulary] = SamplerState(max(64, 2 * rows), vocabulary)
        return found


class SamplerState:
    """What the kernel knows of the rows of a batch, on the device: parameters, positions, histories, and the tokens chosen.

    seats       rows it has room for
    vocabulary  V, the logits of a row
    """

    def __init__(self, seats: int, vocabulary: int):
        import cupy

        if not 0 < vocabulary <= LARGEST_VOCABULARY:
            raise RewriteError(f"SamplerState: a vocabulary of {vocabulary} tokens; the device takes 1 to {LARGEST_VOCABULARY}. Copy the logits to the host and use Sampler")
        self.seats, self.vocabulary = seats, vocabulary
        self._table = -(-seats * ROW.itemsize // 256) * 256
        self._fixed = cupy.zeros(self._table + ROOM, np.uint8)
        self.tokens = cupy.zeros(seats, np.int64)  # of single steps: at one address, so that launches are made once
        self._fetched = np.zeros(0, np.uint8)  # pinned
        self._more: Any = None  # lists for which the fixed room is too small
        self._host = np.frombuffer(cupy.cuda.alloc_pinned_memory(len(self._fixed)), np.uint8, len(self._fixed))
        self._copied = cupy.cuda.Event(disable_timing=True)
        self._templates: dict[int, tuple[Sampling, Any]] = {}
        self._pasts: dict[int, Past] = {}
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self._loaded: Array = np.zeros(0, ROW)
        self._errors: list[str | None] = []
        self._records: Any = self._fixed[:0]

    def supports(self, row: Row) -> str | None:
        """Why the next tokens of a row cannot be chosen on the device alone, step after step; None if they can."""
        return supports(row)

    def load(self, rows: Sequence[Row], steps: int = 1, *, index: Sequence[int] | None = None, out: Any = None) -> None:
        """Upload the parameters, histories and seeds of `rows`, for up to `steps` steps, on the current stream.

        index  which row of the logits each reads; by default row i reads the i-th
        out    float32 [R, V]: takes log-probabilities, for beam search, in the place of draws

        The hooks `allowed` are asked here: with one of them, steps has to be 1. What they raise ends their row and no other.
        Raises RewriteError for more rows than seats, or a row that the device cannot serve (`supports`) for several steps.
        """
        import cupy

        if len(rows) > self.seats:
            raise RewriteError(f"SamplerState: {len(rows)} rows; it has {self.seats} seats")
        for row in rows if steps > 1 else ():
            reason = supports(row)
            if reason is not None:
                raise RewriteError(f"SamplerState: a row for {steps} steps: {reason}")
        masks, self._errors = asked(rows, self.vocabulary)
        table, lists, records = pack(rows, steps, masks, self._template, self._past)
        self._pasts = {id(row): past for row in rows if (past := self._pasts.get(id(row)))}
        table["index"] = np.arange(len(rows)) if index is None else index
        if out is not None:
            table["out"] = out.data.ptr + np.arange(len(rows), dtype=np.uint64) * np.uint64(4 * self.vocabulary)
            table["logprobs"] = -1
        self._loaded = table.copy()
        table["steps"][[error is not None for error in self._errors]] = 0
        fits = len(lists) <= ROOM
        if not fits and (self._more is None or len(self._more) < len(lists)):
            self._more = cupy.empty(2 * len(lists), np.uint8)
        home = self._fixed[self._table :] if fits else self._more
        for name in LISTS:
            table[name] = np.where(table[name] > 0, table[name] + np.uint64(home.data.ptr), 0)
        self._copied.synchronize()  # the host's buffer may still be read
        self._host[: self._table] = 0
        self._host[: table.nbytes] = table.view(np.uint8)
        used = self._table
        if fits:
            self._host[used : used + len(lists)] = lists
            used += len(lists)
        self._fixed.data.copy_from_host_async(self._host.ctypes.data, used)
        self._copied.record()
        if not fits:
            home[: len(lists)].set(lists)
        self._records = home[records : len(lists)]

    def enqueue(self, logits: Any, tokens: Any) -> None:
        """Choose the next token of each loaded row on the current stream; nothing is waited for, and it may be captured.

        logits  float32, float16 or bfloat16 [N, V], packed
        tokens  int64 or int32 [R], R at most `seats`, packed: what the model reads next: the token, or 0 where none is possible
                (`samples` tells). Where no row is loaded it stays as it is.
        """
        key = (logits.data.ptr, logits.shape, logits.dtype, tokens.data.ptr, tokens.shape, tokens.dtype)
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) > 64:
                self._launches.clear()
            launch = self._launches[key] = self._launch(logits, tokens)
        launch()

    def fetch(self) -> Any:
        """Enqueue the copy of what was chosen so far to the host, and return an event after it. Steps that one copy brought may be read while
        the next one is on its way.
        """
        import cupy

        count = self._records.nbytes
        if len(self._fetched) < count:
            self._fetched = np.frombuffer(cupy.cuda.alloc_pinned_memory(2 * count), np.uint8, 2 * count)
        cupy.cuda.runtime.memcpyAsync(self._fetched.ctypes.data, self._records.data.ptr, count, DEVICE_TO_HOST, cupy.cuda.get_current_stream().ptr)
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        return event

    def samples(self, first: int = 0, last: int | None = None) -> list[Samples]:
        """What was chosen in the steps [first, last) since `load`, as `Sampler.sample` gives it: of steps that were fetched, or, without
        `last`, of all that were enqueued, which is waited for.

        Raises RewriteError if there were more steps than it was loaded for.
        """
        if last is None:
            self.fetch().synchronize()
        return unpack(self._fetched[: self._records.nbytes].view(np.int32), self._loaded, self._errors, first, last)

    def _template(self, s: Sampling) -> Any:
        found = self._templates.get(id(s))
        if found is None or found[0] is not s:
            if len(self._templates) > 4096:
                self._templates.clear()
            found = self._templates[id(s)] = (s, template(s))
        return found[1]

    def _past(self, row: Row) -> Past:
        found = self._pasts.get(id(row))
        if found is None or found.row is not row or found.length > len(row.tokens):
            found = self._pasts[id(row)] = Past(row)
        found.follow()
        return found

    def _launch(self, logits: Any, tokens: Any) -> Launch:
        if logits.dtype.name not in LOGITS or logits.ndim != 2 or logits.shape[1] != self.vocabulary or not logits.flags.c_contiguous:
            raise RewriteError(f"SamplerState: logits are {logits.dtype.name} {list(logits.shape)}; supported: packed {', '.join(LOGITS)} [N, {self.vocabulary}]")
        if tokens.dtype.name not in ("int32", "int64") or tokens.ndim != 1 or tokens.size > self.seats or not tokens.flags.c_contiguous:
            raise RewriteError(f"SamplerState: tokens are {tokens.dtype.name} {list(tokens.shape)}; supported: packed int32 or int64 [R], R at most {self.seats}")
        threads, ranks, part = shares(self.vocabulary, tokens.size)
        defines = (f"THREADS={threads}", f"HEAD={HEAD}", f"LOGITS={32 if logits.dtype.itemsize == 4 else 16}")
        function = module("sampling", logits.dtype.name, defines).get_function("choose")
        numbers = [ctypes.c_int(self.vocabulary), ctypes.c_int(part), ctypes.c_int(tokens.dtype.itemsize == 8)]
        return launcher(function, (ranks, tokens.size), threads, [logits, tokens, self._fixed, *numbers], shared=HEAD + 4 * part, cluster=ranks, keep=self)


def shares(vocabulary: int, rows: int) -> tuple[int, int, int]:
    """Threads a block, blocks a row, and logits a block (a multiple of 8)."""
    ranks = 1
    while ranks < MOST_RANKS and vocabulary > 2048 * ranks:
        ranks *= 2
    part = -(-vocabulary // (8 * ranks)) * 8
    two = 2 * (HEAD + 4 * part) <= 226 << 10  # blocks share a multiprocessor
    return (512 if rows > 16 and two else 1024), ranks, part


def template(s: Sampling) -> Any:
    """What of struct Row depends on nothing but the parameters, as one record of ROW."""
    row = np.zeros((), ROW)
    row["top_p"], row["typical_p"], row["min_p"] = s.top_p, s.typical_p, s.min_p
    row["temperature"], row["top_k"] = s.temperature, min(s.top_k, 2**31)
    row["repetition"], row["presence"], row["frequency"] = s.repetition_penalty, s.presence_penalty, s.frequency_penalty
    row["ngram"], row["min_new"] = min(s.no_repeat_ngram, 2**31), min(s.min_new_tokens, 2**31)
    row["logprobs"] = -1 if s.logprobs is None else s.logprobs if s.logprobs <= MOST_LOGPROBS else 0
    return row[()]


def asked(rows: Sequence[Row], vocabulary: int) -> tuple[list[Array | None], list[str | None]]:
    """The masks, bool [V], of the rows with a hook, and what hooks raised."""
    masks: list[Array | None] = [None] * len(rows)
    errors: list[str | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if row.sampling.allowed is None:
            continue
        try:
            masks[i] = permitted(row.sampling.allowed(tuple(row.tokens[row.prompt :])), vocabulary)
        except Exception as error:
            errors[i] = f"allowed: {error if isinstance(error, RewriteError) else blame(error)}"
    return masks, errors


class Past:
    """The tokens of a row as the kernel wants them, kept from load to load: only what is new is looked at."""

    def __init__(self, row: Row):
        self.row, self.first = row, 0 if row.sampling.repetition_penalty != 1 else row.prompt  # from here on tokens are counted
        self.tokens = np.array(row.tokens, np.int32)
        self.length = len(self.tokens)
        found, count = np.unique(self.tokens[self.first :], return_inverse=True)
        self.place = {token: i for i, token in enumerate(found.tolist())}
        self.seen = np.zeros((len(found), 2), np.int32)  # token, how often it was generated
        self.seen[:, 0], self.seen[:, 1] = found, np.bincount(count[row.prompt - self.first :], minlength=len(found))

    def follow(self) -> None:
        """Take in what the row has got since."""
        new = self.row.tokens[self.length :]
        if self.length + len(new) > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.zeros(256 + len(new), np.int32)])
        if len(self.place) + len(new) > len(self.seen):
            self.seen = np.concatenate([self.seen, np.zeros((256 + len(new), 2), np.int32)])
        for token in new:
            self.tokens[self.length] = token
            self.length += 1
            place = self.place.setdefault(token, len(self.place))
            self.seen[place] = token, self.seen[place, 1] + 1

    def history(self, steps: int) -> Array:
        """int32 [length + steps]"""
        return np.concatenate([self.tokens[: self.length], np.zeros(steps, np.int32)])

    def counts(self, steps: int) -> Array:
        """int32 [2 (different tokens + steps)]"""
        return np.concatenate([self.seen[: len(self.place)].ravel(), np.zeros(2 * steps, np.int32)])


def pack(rows: Sequence[Row], steps: int, masks: Sequence[Array | None], made: Callable[[Sampling], Any], past: Callable[[Row], Past]) -> tuple[Array, Array, int]:
    """(ROW [R], the lists they point to, uint8, and where in these the records begin).

    A list's address is its place in the lists, 0 where there is none. Histories and counts have room for `steps` more tokens.
    Records are int32: the steps done [R], the tokens [steps, R], and for rows that want log-probabilities [steps, 1 + 2 n].
    """
    table = np.array([made(row.sampling) for row in rows], ROW)
    table["length"], table["prompt"] = [len(row.tokens) for row in rows], [row.prompt for row in rows]
    table["choice"], table["seed"] = [row.choice for row in rows], np.array([row.seed for row in rows], np.uint64)
    table["steps"], table["stride"] = steps, len(rows)
    lists: list[Array] = [np.zeros(4, np.int32)]  # so that no list begins at 0
    place = 4

    def put(words: Array) -> int:
        nonlocal place
        begin = place
        lists.extend((words, np.zeros(-len(words) % 4, np.int32)))
        place += -(-len(words) // 4) * 4
        return 4 * begin

    for i, row in enumerate(rows):
        for name, (words, count) in (lists_of(row, steps, masks[i], past) if row.sampling.processed else {}).items():
            table[i][name] = put(words)
            if name in COUNTS:
                table[i][COUNTS[name]] = count
    records = put(np.zeros((1 + steps) * len(rows), np.int32))
    table["record"] = records + 4 * np.arange(len(rows))
    for i in np.nonzero(table["logprobs"] >= 0)[0].tolist():
        table[i]["chances"] = put(np.zeros(steps * entry(table[i]), np.int32))
    return table, np.concatenate(lists).view(np.uint8), records


def lists_of(row: Row, steps: int, mask: Array | None, past: Callable[[Row], Past]) -> dict[str, tuple[Array, int]]:
    """What the changes to a row's logits need: int32 words and how many elements they are."""
    s, found = row.sampling, dict[str, tuple[Array, int]]()
    if s.logit_bias:
        pairs = np.zeros((len(s.logit_bias), 2), np.int32)
        pairs[:, 0], pairs[:, 1] = list(s.logit_bias), np.array(list(s.logit_bias.values()), np.float32).view(np.int32)
        found["bias"] = pairs.ravel(), len(pairs)
    counted = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    ordered = s.no_repeat_ngram or any(len(word) > 1 for word in s.bad_words)
    if counted or ordered:
        known = past(row)
        if counted:
            found["seen"] = known.counts(steps), len(known.place)
        if ordered:
            found["history"] = known.history(steps), known.length
    # as in transformers, a stop token alone is no bad word
    words = [word for word in s.bad_words if not (len(word) == 1 and word[0] in s.stop_tokens)]
    if words:
        lengths = np.array([len(word) for word in words])
        spans = np.stack([2 * len(words) + np.cumsum(lengths) - lengths, lengths], axis=1)  # where a word begins, in words from the list's start
        found["words"] = np.concatenate([spans.ravel(), *words]).astype(np.int32), len(words)
    if s.min_new_tokens and s.stop_tokens:
        found["stops"] = np.array(s.stop_tokens, np.int32), len(s.stop_tokens)
    if mask is not None:
        bits = np.packbits(mask, bitorder="little")
        found["mask"] = np.concatenate([bits, np.zeros(-len(bits) % 4, np.uint8)]).view(np.int32), len(mask)
    return found


def entry(row: Any) -> int:
    """Words that are recorded of each step beside the token: its log-probability, and the likeliest tokens with theirs."""
    return 1 + 2 * int(row["logprobs"])


def unpack(words: Array, made: Array, errors: Sequence[str | None], first: int = 0, last: int | None = None) -> list[Samples]:
    """The samples of the steps [first, last), without `last` of all, from the records, int32; `made` is what `pack` made of the rows."""
    if not len(made):
        return []
    count, steps = len(made), int(made["steps"][0])
    done = int(words[:count].max()) or int(all(error is not None for error in errors))  # rows that a hook ended count no steps
    if done > steps:
        raise RewriteError(f"SamplerState: {done} steps were done; it was loaded for {steps}. Load it again in time, or for more")
    last = done if last is None else last
    tokens = words[count * (1 + first) : count * (1 + last)].reshape(last - first, count).astype(np.int64)
    tokens[:, [error is not None for error in errors]] = -1
    wanted = np.nonzero(made["logprobs"] >= 0)[0].tolist()
    base = int(made["record"][0])
    result = []
    for step, chosen in enumerate(tokens, first):
        reasons = list(errors) if chosen.min() >= 0 else [error or (IMPOSSIBLE if token < 0 else None) for error, token in zip(errors, chosen, strict=True)]
        logprobs: list[Logprob | None] = [None] * count
        for i in wanted:
            if chosen[i] < 0:
                continue
            size = entry(made[i])
            said = words[(int(made[i]["chances"]) - base) // 4 + step * size :][:size]
            values = said.view(np.float32)
            top = tuple((int(t), float(v)) for t, v in zip(said[1::2], values[2::2], strict=True))
            logprobs[i] = Logprob(int(chosen[i]), float(values[0]), top)
        result.append(Samples(chosen, reasons, logprobs))
    return result
