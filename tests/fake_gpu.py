"""A GPU made of NumPy, enough for the CUDA executor and the model of a generator: memory with addresses, streams that do things at once.

Segments run in ONNX Runtime on the memory at their addresses, plugins by their references, the sampler by the NumPy one. Nothing can be
captured, so frames run their launches one by one. Every array begins as 0xFF (not a number): what reads it before it is written is seen.
"""

from __future__ import annotations

import ctypes
import dataclasses
import types
from contextlib import nullcontext

import numpy as np
import onnx

from rewrite.precision import widen_arrays, widen_model
from rewrite.runtime import cuda, cuda_model, engine
from rewrite.runtime.advance import advance
from rewrite.runtime.batch import Batch
from rewrite.runtime.sampling import Sampler
from rewrite.verify import has_bfloat16, session


class Address:
    """A place in an array of bytes."""

    def __init__(self, memory, offset):
        self.memory, self.offset = memory, offset
        self.ptr = memory.ctypes.data + offset

    def __add__(self, offset):
        return Address(self.memory, self.offset + offset)


class Array(np.ndarray):
    """An array on the device: NumPy's, whose data have an address."""

    @property
    def data(self):
        return Address(self, 0)

    def get(self):
        return np.array(self)

    def set(self, array):
        self[...] = array


class OutOfMemory(Exception):
    pass


class Cupy:
    """The module `cupy`, as far as it is used. `free` bytes are left; `allocated` counts allocations."""

    def __init__(self, free=1 << 30):
        self.left, self.allocated = free, 0
        pool = types.SimpleNamespace(free_all_blocks=lambda: None)
        self.get_default_memory_pool = lambda: pool
        nothing = lambda malloc: nullcontext()  # noqa: E731
        self.cuda = types.SimpleNamespace(
            Stream=lambda non_blocking: Stream(), Event=lambda disable_timing=False: Event(), MemoryPool=lambda: types.SimpleNamespace(malloc=None), using_allocator=nothing,
            alloc_pinned_memory=lambda size: bytearray(size), memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemory),
            get_elapsed_time=lambda begin, end: 0.5,
            runtime=types.SimpleNamespace(memGetInfo=lambda: (self.left, 1 << 32), memcpyAsync=lambda to, source, size, kind, stream: ctypes.memmove(to, source, size)),
        )  # fmt: skip

    def ndarray(self, shape, dtype, address):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        flat = address.memory.reshape(-1).view(np.uint8)[address.offset : address.offset + size]
        return np.asarray(flat).view(dtype).reshape(shape).view(Array)

    def empty(self, shape, dtype=np.float32):
        made = np.empty(shape, dtype).view(Array)
        if made.nbytes > self.left:
            raise OutOfMemory
        made.reshape(-1).view(np.uint8)[...] = 0xFF
        self.allocated += 1
        return made

    def zeros(self, shape, dtype=np.float32):
        made = self.empty(shape, dtype)
        made[...] = 0
        return made

    def ones(self, shape, dtype=np.float32):
        made = self.empty(shape, dtype)
        made[...] = 1
        return made

    def asarray(self, array):
        return array.view(Array)

    def concatenate(self, arrays):
        return np.concatenate(arrays).view(Array)

    def asnumpy(self, array, stream=None):
        return np.array(array)

    def ascontiguousarray(self, array):
        return np.ascontiguousarray(array).view(Array)


class Stream:
    ptr = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def synchronize(self):
        return None


class Event:
    def record(self, stream=None):
        return None

    def synchronize(self):
        return None


class Engine:
    """A segment in ONNX Runtime."""

    def __init__(self, model):
        self.model, self.wide = model, has_bfloat16(model)  # which ONNX Runtime has no kernels for
        self.runner = session(widen_model(model) if self.wide else model)
        self.names = [v.name for v in (*model.graph.input, *model.graph.output)]
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__


class Context:
    def __init__(self, made):
        self.engine, self.shapes, self.addresses = made, {}, {}
        self.set_input_shape, self.set_tensor_address = self.shapes.__setitem__, self.addresses.__setitem__

    def _array(self, name, shape, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)

    def execute_async_v3(self, stream):
        graph = self.engine.model.graph
        types_ = {v.name: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)) for v in (*graph.input, *graph.output)}
        assert all(address % 16 == 0 for address in self.addresses.values())
        given = {v.name: self._array(v.name, self.shapes[v.name], types_[v.name]).copy() for v in graph.input if v.name in self.shapes}
        results = self.engine.runner.run(None, widen_arrays(given) if self.engine.wide else given)
        for value, result in zip(graph.output, results, strict=True):
            self._array(value.name, result.shape, types_[value.name])[...] = result.astype(types_[value.name])
        return True


class State:
    """The NumPy sampler, loaded for several steps."""

    def __init__(self, seats):
        self.seats, self.rows, self.done = seats, [], []

    def load(self, rows, steps=1):
        assert len(rows) <= self.seats
        self.rows, self.done, self.steps = [dataclasses.replace(r, tokens=list(r.tokens)) for r in rows], [], steps

    def enqueue(self, logits, tokens):
        if not self.rows or len(self.done) == self.steps:
            return
        self.done.append(Sampler().sample(np.asarray(logits), range(len(self.rows)), self.rows))
        tokens[: len(self.rows)] = self.done[-1].tokens
        for row, token in zip(self.rows, self.done[-1].tokens, strict=True):
            row.tokens.append(int(token))

    def fetch(self):
        return Event()

    def samples(self, first=0, last=None):
        return self.done[first:last]


class DeviceSampler(Sampler):
    """Takes the device's arrays, and notes that it did."""

    def __init__(self, stream, vocabulary):
        self.states = {}

    def sample(self, logits, index, rows):
        assert isinstance(logits, Array)
        return super().sample(np.asarray(logits), index, rows)

    def log_probabilities(self, logits, index, rows):
        return super().log_probabilities(np.asarray(logits), index, rows)

    def refuses(self, rows):
        return any(row.sampling.allowed is not None for row in rows)

    def state(self, rows):
        return self.states.setdefault(rows, State(rows))


def enqueue_advance(chosen, tokens, positions, slots, lengths, tables, block_size):
    """`cuda_decoding.advance` by its twin."""

    def launch():
        starts = np.arange(len(tokens) + 1)
        made = advance(Batch(tokens, positions, slots, tables, starts, lengths, starts[:-1]), chosen, block_size)
        for array, new in ((tokens, made.tokens), (positions, made.positions), (slots, made.slots), (lengths, made.context_lengths)):
            array[...] = new

    return launch


class BlockCopies:
    def __init__(self, caches):
        self.caches = caches

    def copy(self, pairs):
        for cache in self.caches:
            before = np.array(cache)
            for source, target in pairs:
                cache[target] = before[source]


def install(monkeypatch, free=1 << 30):
    """Plans without engines, of float32, run with `device="cuda"` on this GPU. Returns its `cupy`."""
    cupy = Cupy(free)
    monkeypatch.setattr(cuda, "device", lambda: cupy)
    monkeypatch.setattr(cuda.Frame, "_capture", lambda self: None)
    monkeypatch.setattr(engine, "runtime", lambda: None)
    monkeypatch.setattr(engine, "gpu", lambda: "none")
    monkeypatch.setattr(engine, "gpu_model", lambda: "none")
    monkeypatch.setattr(engine, "deserialize", lambda runtime, data, where: Engine(onnx.load_model_from_string(data)))
    monkeypatch.setattr(engine, "execution_context", lambda loaded, kernels: Context(loaded))
    monkeypatch.setattr("rewrite.runtime.plan.Plan.engine", lambda self, key: self.segment(key))
    monkeypatch.setattr("rewrite.runtime.executor.check_engines", lambda *_: None)
    monkeypatch.setattr("rewrite.runtime.engine.version", lambda: "none")
    monkeypatch.setattr("rewrite.runtime.engine.capability", lambda: "9.0")
    monkeypatch.setattr(cuda_model, "DeviceSampler", DeviceSampler)
    monkeypatch.setattr(cuda_model.cuda_decoding, "advance", enqueue_advance)
    monkeypatch.setattr(cuda_model.cuda_decoding, "BlockCopies", BlockCopies)
    found = cuda.library

    def without_kernels():
        made = found()
        return dataclasses.replace(made, plugins={n: dataclasses.replace(p, cuda=None, merged=None, view=None, link=None) for n, p in made.plugins.items()})

    monkeypatch.setattr(cuda, "library", without_kernels)
    return cupy
