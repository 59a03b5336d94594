"""The steps of a text generator on the GPU: batches padded to few sizes, each a CUDA graph; tokens stay on the device.

A step's integers lie together at fixed addresses, filled by one copy from pinned memory; caches are the plan's inputs at their own
addresses, updated in place. `decode` replays a graph that ends with the sampler and with `advance`, which makes the next batch of what
was chosen: the device never waits for the host, which gets the tokens of some steps while the next ones run.

Of several ranks, each with a GPU, all are told the same batches and rows (`PlanModel`). Sums and joins are in the graphs; each rank gets all
logits and chooses the same tokens, because the sampler's depend on nothing else; rank 0 says how long they go on.
"""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from rewrite.plugins import cuda_decoding, cuda_paged, tuning
from rewrite.plugins.cuda_launch import capability
from rewrite.runtime import buckets
from rewrite.runtime.batch import Batch
from rewrite.runtime.buckets import Limits, Sizes
from rewrite.runtime.cuda import DEVICE_TO_DEVICE, HOST_TO_DEVICE, CudaExecutor, Frame, Launch, OutOfMemory, memory
from rewrite.runtime.cuda_sampling import LARGEST_VOCABULARY, CudaSampler, SamplerState, supports
from rewrite.runtime.layout import before_widening
from rewrite.runtime.sampling import Row, Sampler, Samples

Array = np.ndarray[Any, Any]
FRAMES = 128  # kept; the least recently used one is dropped for another
PART = 4  # steps whose tokens the host gets together, while as many others run
MOST_STEPS = 256  # of one `decode`
PLACE = 256  # bytes; what TensorRT wants the addresses of inputs to be multiples of
SHARE = 0.8  # of the free memory, for keys and values, unless the caller says how much
MOST_SLOTS = 2**31 - 1


class Inputs:
    """The integers of a step in device memory, filled by one copy. device: CuPy arrays by name, those of `buckets.shapes`."""

    def __init__(self, executor: CudaExecutor, sizes: Sizes):
        cupy, self.stream = executor.cupy, executor.stream
        kinds, places, self.size = buckets.shapes(sizes), {}, 0
        for name, (dtype, shape) in kinds.items():
            places[name] = self.size
            self.size += -(-max(1, int(np.prod(shape)) * dtype.itemsize) // PLACE) * PLACE
        self.memory = cupy.empty(self.size, np.uint8)
        self.pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(self.size), np.uint8, self.size)
        self.device = {n: cupy.ndarray(shape, dtype, self.memory.data + places[n]) for n, (dtype, shape) in kinds.items()}
        self.host = {n: np.ndarray(shape, dtype, self.pinned[places[n] :].data) for n, (dtype, shape) in kinds.items()}
        self.copied = cupy.cuda.Event(disable_timing=True)
        self.copied.record(self.stream)
        self._copy = partial(cupy.cuda.runtime.memcpyAsync, self.memory.data.ptr, self.pinned.ctypes.data, self.size, HOST_TO_DEVICE, self.stream.ptr)

    def fill(self, batch: Batch) -> None:
        """Enqueue the copy of a batch, padded."""
        self.copied.synchronize()  # or else the last copy still reads
        buckets.fill(self.host, batch)
        self._copy()
        self.copied.record(self.stream)


class Bucket:
    """The captured work for one set of sizes, with its inputs; one for `decode` chooses tokens, too, and makes the next batch of them."""

    def __init__(self, model: CudaModel, sizes: Sizes, decoding: bool, measure: bool = False):
        executor = model.executor
        self.inputs = Inputs(executor, sizes)
        self.inputs.fill(buckets.nothing())  # while the frame is made its work is done, which must change no cache
        if decoding:
            self.chosen = executor.cupy.zeros(sizes.rows, np.int64)
            self.state = model.sampler.state(sizes.rows)
        named = {"tokens": sizes.tokens, "sequences": sizes.sequences, "table": sizes.table, "rows": sizes.rows, "starts": sizes.sequences + 1, "blocks": model.blocks}
        given = {**{n: a for n, a in self.inputs.device.items() if n in executor.inputs}, **model.caches}
        if decoding:  # each token has its row, and the sampler widens logits itself
            logits, without = model.narrow_logits

            def finish(frame: Frame) -> list[Launch]:
                found, shared = model.logits_of(frame, logits)
                return [*shared, *self._finish(found.reshape(sizes.rows, -1), model.block_size)]

            with cuda_paged.reading_early():  # tables and lengths change between replays, and at the end of one
                self.frame = executor.frame_at(named, given, finish, ordered={"logit_rows"}, without=without)
            return

        def told(frame: Frame) -> list[Launch]:
            self.logits, shared = model.logits_of(frame, executor.plan.manifest.outputs["logits"])
            return shared

        with cuda_paged.reading_early():
            self.frame = executor.frame_at(named, given, told, measure=measure)

    def _finish(self, logits: Any, block_size: int) -> list[Launch]:
        """Choose the tokens, and make the next batch of them."""
        at, state, chosen = self.inputs.device, self.state, self.chosen
        batch = (at["input_ids"][0], at["position_ids"][0], at["slots"], at["context_lengths"], at["block_tables"])
        return [lambda: state.enqueue(logits, chosen), cuda_decoding.advance(chosen, *batch, block_size)]


class DeviceSampler(Sampler):
    """`Sampler` for logits on the device, on the stream of the steps. Where the GPU has no clusters, or a vocabulary is too large for
    its kernel, logits are copied to the host.
    """

    def __init__(self, stream: Any, vocabulary: int):
        self.stream, self.vocabulary = stream, vocabulary
        self.kernel = CudaSampler() if capability() >= 90 and vocabulary <= LARGEST_VOCABULARY else None
        self._states: dict[int, SamplerState] = {}

    def sample(self, logits: Any, index: Sequence[int], rows: Sequence[Row]) -> Samples:
        with self.stream:
            return self.kernel.sample(logits, index, rows) if self.kernel is not None else super().sample(logits.get(), index, rows)

    def log_probabilities(self, logits: Any, index: Sequence[int], rows: Sequence[Row]) -> tuple[Array, list[str | None]]:
        with self.stream:
            return self.kernel.log_probabilities(logits, index, rows) if self.kernel is not None else super().log_probabilities(logits.get(), index, rows)

    def refuses(self, rows: Sequence[Row]) -> bool:
        """Whether the tokens of several steps cannot be chosen on the device alone."""
        return self.kernel is None or any(supports(row) is not None for row in rows)

    def state(self, rows: int) -> SamplerState:
        """What several steps of so many rows keep on the device, the same for all batches of about this size: one runs at a time."""
        assert self.kernel is not None
        seats = max(64, 1 << (rows - 1).bit_length())
        if seats not in self._states:
            self._states[seats] = self.kernel.state(seats, self.vocabulary)
        return self._states[seats]


class CudaModel:
    """The steps of the plan that `executor` runs, for one caller at a time. Logits stay on the device, and are good until the next step.

    caches              shape of a block and dtype of each cache, by its name
    tokens, sequences   the most of a step, for which memory is kept before the caches get theirs
    sampler             chooses tokens from these logits, for a `Scheduler`
    """

    def __init__(self, executor: CudaExecutor, vocabulary: int, block_size: int, caches: Mapping[str, tuple[tuple[int, ...], str]], tokens: int, sequences: int):
        self.executor, self.stream, self.vocabulary, self.block_size = executor, executor.stream, vocabulary, block_size
        self.where, self.kinds = str(executor.plan.directory), caches
        ranges = executor.plan.manifest.profile.ranges
        self.limits = Limits(*((ranges[n][0], ranges[n][2]) if n in executor.plan.compiled else (1, MOST_SLOTS) for n in ("tokens", "rows")))
        self.sampler = DeviceSampler(executor.stream, vocabulary)
        self.buckets: OrderedDict[tuple[Sizes, bool], Bucket] = OrderedDict()
        self.caches: dict[str, Any] = {}
        self.copies: cuda_decoding.BlockCopies | None = None
        self.open(1)
        self._bucket(buckets.largest(tokens, sequences, self.limits), False)  # what its kernels and values take is taken now
        self.close()

    def open(self, blocks: int) -> None:
        """Make caches of so many blocks. Raises RewriteError if there is no room."""
        self.close()
        cupy, sizes = self.executor.cupy, [int(np.prod(s)) * np.dtype(d).itemsize for s, d in self.kinds.values()]
        with self.stream, memory(cupy, f"{self.where}: the keys and values", blocks * sum(sizes), "give less with --kv-memory, or end what else uses the GPU"):
            self.caches = {name: cupy.zeros((blocks, *shape), np.dtype(dtype)) for name, (shape, dtype) in self.kinds.items()}
        self.blocks, self.copies = blocks, cuda_decoding.BlockCopies(list(self.caches.values())) if self.caches else None

    def close(self) -> None:
        """Give back the memory of caches and frames, but not that of values."""
        self.buckets.clear()
        self.caches, self.copies = {}, None
        gc.collect()  # frames and their launches hold one another
        self.stream.synchronize()
        self.executor.cupy.get_default_memory_pool().free_all_blocks()

    def free_memory(self) -> int:
        """Bytes that caches may have, unless the caller says how many."""
        return int(SHARE * self.executor.cupy.cuda.runtime.memGetInfo()[0])

    def step(self, batch: Batch) -> Any:
        """Enqueue a step, which stores the keys and values of the batch's tokens. Returns float32 [R, vocabulary], CuPy's, the logits of its rows."""
        self.limits.check(batch, self.where)
        bucket = self._bucket(buckets.sizes_of(batch, self.limits), False)
        with self.stream:
            bucket.inputs.fill(batch)
            bucket.frame.replay()
        return bucket.logits[: len(batch.logit_rows)]

    def step_in_parts(self, parts: Sequence[Batch], order: Array) -> Any:
        """`step` of several batches one after the other, whose logits, joined, are put in `order`: of a plan in stages each computes the next part while the
        one after it is at this one."""
        found = []
        for part in parts:
            logits = self.step(part)
            with self.stream:
                found.append(logits.copy())
        with self.stream:
            return self.executor.cupy.concatenate(found)[self.executor.cupy.asarray(order)]

    def decodes(self, batch: Batch, rows: list[Row], count: int) -> bool:
        """Whether so many steps can be done without the host. Raises RewriteError for a step that the engines do not take."""
        self.limits.check(batch, self.where)
        sizes = buckets.sizes_of(batch, self.limits)
        return sizes.tokens == sizes.sequences == sizes.rows and count <= MOST_STEPS and not self.sampler.refuses(rows)

    def decode(self, batch: Batch, rows: list[Row], count: int, more: Callable[[], bool]) -> Generator[list[Samples], None, None]:
        """See `requests.Decoder`. Call only where `decodes` says so."""
        bucket = self._bucket(buckets.sizes_of(batch, self.limits), True)
        with self.stream:
            bucket.inputs.fill(batch)
            bucket.state.load(rows, count)
        begun, parts = 0, deque[tuple[int, int, Any]]()
        while True:
            while begun < count and len(parts) < 2:
                if begun and not more():
                    count = begun
                    break
                until = min(begun + PART, count)
                with self.stream:
                    for _ in range(begun, until):
                        bucket.frame.replay()
                    parts.append((begun, until, bucket.state.fetch()))
                begun = until
            if not parts:
                return
            first, last, fetched = parts.popleft()
            fetched.synchronize()
            yield bucket.state.samples(first, last)

    @cached_property
    def narrow_logits(self) -> tuple[str, set[int]]:
        """The value that the logits are before they become float32, and the steps that are not needed for it."""
        plan = self.executor.plan
        steps, name = plan.steps_of(plan.manifest.world - 1), plan.manifest.outputs["logits"]
        last = steps[-1]
        source = before_widening(self.executor.segment(last.name)) if last.kind == "segment" and last.outputs == [name] else None
        if source is None:
            return name, set()
        return last.inputs[int(source[1:])], {len(steps) - 1} if "logits" in self.executor.outputs else set()

    def logits_of(self, frame: Frame, name: str) -> tuple[Any, list[Launch]]:
        """Where a frame has the value `name`, the logits, and what brings them here from the last stage: every rank chooses the same tokens."""
        if self.executor.plan.manifest.stages == 1:
            return frame.values[name], []
        found = frame.values[name] if "logits" in self.executor.outputs else frame.empty(name)
        assert self.executor.ranks is not None
        return found, [self.executor.ranks.share(found)] if found.size else []

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Enqueue copies of blocks (from, to) in every layer."""
        if self.copies is None:  # a stage without attention
            return
        with self.stream:
            self.copies.copy(self.executor.cupy.asarray(np.array(list(pairs), np.int32)))

    def tune(self, most: int = 64) -> tuning.Times:
        """Time the kernels that could do each step, for up to `most` texts that decode and for prompts up to the engines' most tokens, and
        use the fastest from now on. Returns what was measured, microseconds by call and kernel.
        """
        known, (least, longest) = set(self.executor.times), self.limits.tokens
        singles = {buckets.few(n) for n in range(1, most + 1)}
        prompts = {min(1 << n, longest) for n in range(6, 12)}
        for sizes in [Sizes(n, n, buckets.NARROWEST, n) for n in sorted(singles) if least <= n <= min(longest, self.limits.rows[1])] + [
            Sizes(n, max(1, self.limits.rows[0]), buckets.NARROWEST, max(1, self.limits.rows[0])) for n in sorted(prompts) if n >= least
        ]:
            with self.stream:
                Bucket(self, sizes, False, measure=True)
        self.buckets.clear()  # made by estimates
        return {key: times for key, times in self.executor.times.items() if key not in known}

    def copy_speed(self, size: int = 1 << 28) -> float:
        """Bytes a second that a copy of device memory reads and writes, the best of five."""
        cupy, times = self.executor.cupy, []
        with self.stream, memory(cupy, f"{self.where}: two arrays to measure the memory's speed", 2 * size, "give less with --kv-memory"):
            source, target = cupy.ones(size, np.uint8), cupy.empty(size, np.uint8)
            for _ in range(6):
                events = [cupy.cuda.Event(), cupy.cuda.Event()]
                events[0].record(self.stream)
                cupy.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, size, DEVICE_TO_DEVICE, self.stream.ptr)
                events[1].record(self.stream)
                events[1].synchronize()
                times.append(cupy.cuda.get_elapsed_time(*events) / 1e3)
        return float(2 * size / min(times))

    def _bucket(self, sizes: Sizes, decoding: bool) -> Bucket:
        """The frame for these sizes, made on first use; where memory runs out, those that were not used for longest go."""
        key = (sizes, decoding)
        while key not in self.buckets:
            if len(self.buckets) >= FRAMES:
                self.buckets.popitem(last=False)
            try:
                with self.stream, self.executor.agreed():
                    made = Bucket(self, sizes, decoding)
            except (OutOfMemory, self.executor.cupy.cuda.memory.OutOfMemoryError) as error:
                if not self.buckets:
                    raise OutOfMemory(f"{self.where}: no GPU memory is left for a step of {sizes.tokens} tokens ({error}); give less with --kv-memory, or a smaller token budget") from error
                self.buckets.popitem(last=False)
                gc.collect()
                self.executor.cupy.get_default_memory_pool().free_all_blocks()
                continue
            with self.stream:
                made.frame.capture()
            self.buckets[key] = made
        self.buckets.move_to_end(key)
        return self.buckets[key]
