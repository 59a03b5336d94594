"""The steps of a text generator on the GPU: batches padded to few sizes, each a CUDA graph; tokens stay on the device.

A step's integers lie together at fixed addresses, filled by one copy from pinned memory; caches are the plan's inputs at their own
addresses, updated in place. `decode` replays a graph that ends with the sampler and with `advance`, which makes the next batch of what
was chosen: nothing but tokens leaves the device, and the host only watches whether all texts are over.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rewrite.errors import RewriteError
from rewrite.plugins import cuda_decoding
from rewrite.runtime import buckets
from rewrite.runtime.batch import Batch
from rewrite.runtime.buckets import Limits, Sizes
from rewrite.runtime.cuda import HOST_TO_DEVICE, CudaExecutor, Frame, OutOfMemory, memory
from rewrite.runtime.lookahead import step_by_step
from rewrite.runtime.sampling import IMPOSSIBLE, Row, Sampler, Samples, Sampling

Array = np.ndarray[Any, Any]
FRAMES = 64  # kept; the least recently used one is dropped for another
AHEAD = 2  # steps that are enqueued before the host looks whether all texts are over
MOST_STEPS = 64  # of one `decode`
STOPS = 8  # stop tokens of a row that the device watches; of more, the scheduler alone
PLACE = 256  # bytes; what TensorRT wants the addresses of inputs to be multiples of
SHARE = 0.8  # of the free memory, for keys and values, unless the caller says how much


class Inputs:
    """The integers of a step in device memory, and beside them what `decode` keeps for each row; filled by one copy."""

    def __init__(self, executor: CudaExecutor, sizes: Sizes):
        cupy, self.stream = executor.cupy, executor.stream
        short, rows = np.dtype(np.int32), sizes.sequences
        kinds = {**buckets.shapes(sizes), "stops": (short, (rows, STOPS)), "step": (short, (1,)), "ended": (short, (rows,))}
        places, self.size = {}, 0
        for name, (dtype, shape) in kinds.items():
            places[name] = self.size
            self.size += -(-max(1, int(np.prod(shape)) * dtype.itemsize) // PLACE) * PLACE
        self.memory = cupy.empty(self.size, np.uint8)
        self.pinned = cupy.cuda.alloc_pinned_memory(self.size)
        host = np.frombuffer(self.pinned, np.uint8, self.size)
        self.device, self.host = {}, {}
        for name, (dtype, shape) in kinds.items():
            self.device[name] = cupy.ndarray(shape, dtype, self.memory.data + places[name])
            self.host[name] = np.ndarray(shape, dtype, host[places[name] :])
        self.copied = cupy.cuda.Event(disable_timing=True)
        self.copied.record(self.stream)
        self._runtime, self._from = cupy.cuda.runtime, host.ctypes.data

    def fill(self, batch: Batch, stops: Sequence[Sequence[int]] = ()) -> None:
        """Enqueue the copy of a batch, padded, and of the stop tokens of each row."""
        self.copied.synchronize()  # or else the last copy still reads
        buckets.fill(self.host, batch)
        self.host["stops"][...] = -1
        for line, tokens in zip(self.host["stops"], stops, strict=False):
            line[: len(tokens[:STOPS])] = tokens[:STOPS]
        self.host["step"][...] = self.host["ended"][...] = 0
        self._runtime.memcpyAsync(self.memory.data.ptr, self._from, self.size, HOST_TO_DEVICE, self.stream.ptr)
        self.copied.record(self.stream)


class Bucket:
    """A frame for one set of sizes, with its inputs; one for `decode` also has the chosen tokens, and where the host reads them."""

    def __init__(self, model: CudaModel, sizes: Sizes, decoding: bool):
        executor = model.executor
        cupy = executor.cupy
        self.sizes, self.inputs = sizes, Inputs(executor, sizes)
        self.told = self.state = None
        if decoding:
            self.pinned = cupy.cuda.alloc_pinned_memory(MOST_STEPS * (sizes.rows + 1) * 8)
            self.told = np.frombuffer(self.pinned, np.int64, MOST_STEPS * (sizes.rows + 1)).reshape(MOST_STEPS, -1)
            self.chosen = cupy.zeros(sizes.rows, np.int64)
            self.state = model.sampler.state(sizes.rows, model.vocabulary)
        self.inputs.fill(buckets.nothing())  # while the frame is made, its work is done and must change no cache
        names = {"tokens": sizes.tokens, "sequences": sizes.sequences, "table": sizes.table, "rows": sizes.rows, "starts": sizes.sequences + 1, "blocks": model.blocks}
        given = {**{n: a for n, a in self.inputs.device.items() if n in executor.plan.inputs}, **model.caches}
        self.frame = executor.frame_at(names, given, (lambda frame: self._finish(frame, model)) if decoding else None)
        self.logits = self.frame.values[executor.plan.manifest.outputs["logits"]]

    def _finish(self, frame: Frame, model: CudaModel) -> list[Any]:
        """Choose the tokens, and make the next batch of them."""
        logits, at = frame.values[model.executor.plan.manifest.outputs["logits"]], self.inputs.device
        assert self.state is not None
        assert self.told is not None
        state, chosen = self.state, self.chosen
        batch = (at["input_ids"][0], at["position_ids"][0], at["slots"], at["context_lengths"], at["block_tables"])
        onward = cuda_decoding.advance(chosen, *batch, at["stops"], at["step"], at["ended"], self.told, model.block_size)
        return [lambda: state.enqueue(logits, chosen), onward]


class DeviceSampler(Sampler):
    """`Sampler` for logits on the device: copies them to the host where the device's own sampler does not do what a row asks."""


class CudaModel:
    """The steps of the plan that `executor` runs. Calls of one thread at a time; logits are on the device, valid until the next step.

    vocabulary, block_size: of the plan. tokens, sequences: the most of a step, for which memory is kept.
    """

    def __init__(self, executor: CudaExecutor, vocabulary: int, block_size: int, tokens: int, sequences: int):
        self.executor, self.vocabulary, self.block_size = executor, vocabulary, block_size
        self.where = str(executor.plan.directory)
        ranges = executor.plan.manifest.profile.ranges
        self.limits = Limits(*((ranges[n][0], ranges[n][2]) for n in ("tokens", "rows")))
        self.blocks = 1
        self.caches: dict[str, Any] = {}
        self.frames: OrderedDict[tuple[Sizes, bool], Bucket] = OrderedDict()

    def step(self, batch: Batch) -> Any:
        """Enqueue a step: keys and values of the batch's tokens are stored. Returns float32 [R, vocabulary], a CuPy array, the logits of its rows."""
        raise NotImplementedError

    def decode(self, batch: Batch, rows: list[Row], count: int) -> list[Samples]:
        """See `requests.Decoder`."""
        raise NotImplementedError
