"""The CUDA backend: TensorRT engines between plugin kernels, on one stream, captured in a CUDA graph for each set of sizes.

Values between steps lie in one arena, at offsets planned by when they are needed; weights are uploaded once. Frames, the captured
work of a set of sizes each, share the arena: only one runs at a time. Inputs may lie at addresses of the caller's (`CudaExecutor.frame_at`):
they are read, and by plugins that update them written, where they lie. A plugin
without a kernel for the types at hand runs its NumPy reference on CuPy arrays, in a memory pool of its own, so that it
can be captured, too. What is executed was checked against the manifest's SHA-256 before it is deserialized.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.plugins import tuning
from rewrite.registry import Plugin, library
from rewrite.runtime import chains, engine
from rewrite.runtime.cpu import TOLD
from rewrite.runtime.layout import Views, apply
from rewrite.runtime.machine import TUNED_ON
from rewrite.runtime.partition import Step, ValueType
from rewrite.verify import resolve

if TYPE_CHECKING:
    from rewrite.runtime.cuda_ranks import Absent, DeviceRanks
    from rewrite.runtime.plan import Plan

ALIGNMENT = 512  # bytes
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3  # cudaMemcpyKind
GRAPHS = 8  # sets of sizes kept captured; the least recently used one is dropped for a ninth
Array = np.ndarray[Any, Any]
Launch = Callable[[], None]
Finish = Callable[["Frame"], list[Launch]]


def device() -> Any:
    """The CuPy module. Raises RewriteError if CuPy is not installed or sees no GPU."""
    try:
        import cupy
    except ImportError as error:
        raise RewriteError("device cuda needs CuPy; install the extra: pip install 'rewrite-onnx[gpu]', or use --device cpu") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RewriteError(f"device cuda: no usable GPU ({error}); use --device cpu") from error
    if not count:
        raise RewriteError("device cuda: there is no GPU; use --device cpu")
    return cupy


def plan_arena(sizes: Mapping[str, int], lives: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Offsets such that values alive at the same time do not overlap, and the bytes needed.

    `lives` gives the first and last step at which a value is needed. Largest first, each at the lowest free place.
    """
    offsets: dict[str, int] = {}
    total = 0
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        size = -(-max(sizes[name], 1) // ALIGNMENT) * ALIGNMENT
        first, last = lives[name]
        taken = sorted((offsets[o], offsets[o] - (-max(sizes[o], 1) // ALIGNMENT) * ALIGNMENT) for o in offsets if lives[o][0] <= last and first <= lives[o][1])
        place = 0
        for start, end in taken:
            if place + size <= start:
                break
            place = max(place, end)
        offsets[name] = place
        total = max(total, place + size)
    return offsets, total


class OutOfMemory(RewriteError):
    """The GPU has less memory free than is needed; the message says how much."""


@contextlib.contextmanager
def memory(cupy: Any, what: str, needed: int, advice: str) -> Iterator[None]:
    """Raises OutOfMemory if what is done meanwhile finds no memory: `what` needs `needed` bytes."""
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        free = cupy.cuda.runtime.memGetInfo()[0]
        raise OutOfMemory(f"out of GPU memory: {what} need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; {advice}") from error


class CudaExecutor:
    """A plan on the GPU; of a plan for several ranks what one of them does: `steps`, `inputs` and `outputs` are those of its stage."""

    def __init__(self, plan: Plan, rank: int = 0, ranks: DeviceRanks | Absent | None = None):
        """`ranks` are the others of a plan for several, of which this is the `rank`-th (`cuda_ranks.open_rank`)."""
        self.cupy, self.plan, self.ranks = device(), plan, ranks
        self.steps, self.inputs, self.outputs = plan.steps_of(rank), plan.inputs_of(rank), plan.outputs_of(rank)
        self.plugins = library().plugins
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.runtime = engine.runtime()
        self.kernels = engine.KernelCache((f[1][0] for n, f in plan.manifest.files.items() if n.startswith("engines/")), engine.gpu())
        self.models: dict[str, onnx.ModelProto] = {}
        self.engines: dict[str, Any] = {}
        self.contexts: dict[str, Any] = {}
        for key in dict.fromkeys(s.name for s in self.steps if s.kind == "segment"):
            loaded = engine.deserialize(self.runtime, plan.engine(key), f"{plan.directory}: engine {key}")
            self.engines[key] = loaded
            self.contexts[key] = engine.execution_context(loaded, self.kernels)
        weights = plan.weights_of(rank)
        size = sum(array.nbytes for array in weights.values())
        with self.stream, memory(self.cupy, f"{plan.directory}: the weights", size, "end what else uses the GPU, or take a larger one"):
            self.weights = {name: self._uploaded(array) for name, array in weights.items()}
            self.turned = self._turn_weights()
            self.stream.synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()  # what matrices took before they were turned
        self.chain_memory: Any = None  # through which the blocks of chains talk
        self.frames: OrderedDict[tuple[int, ...], Frame] = OrderedDict()
        self._arena: Any = None
        measured = plan.manifest.versions.get(TUNED_ON) == engine.gpu_model()
        self.times: tuning.Times = {key: dict(times) for key, times in plan.manifest.tuning.items()} if measured else {}

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs, as NumPy arrays if all inputs are NumPy's, else as CuPy arrays on the device."""
        host = all(isinstance(a, np.ndarray) for a in inputs.values())
        arrays = {n: a if isinstance(a, np.ndarray) else self._view(a) for n, a in inputs.items()}
        sizes = self.plan.check(arrays)
        with self.stream:
            results = self.frame(sizes).run(arrays)
            if host:
                results = {n: self.cupy.asnumpy(a, stream=self.stream) for n, a in results.items()}
        self.stream.synchronize()
        return results

    def _uploaded(self, array: Array) -> Any:
        """A weight on the device, straight from the mapped file: CuPy would keep a copy in pinned memory."""
        made = self.cupy.empty(array.shape, array.dtype)
        if array.nbytes:
            self.cupy.cuda.runtime.memcpyAsync(made.data.ptr, array.ctypes.data, array.nbytes, HOST_TO_DEVICE, self.stream.ptr)
        return made

    def arena(self, size: int) -> Any:
        """At least so many bytes for the values of a frame. Frames that were made before it grew keep the smaller one."""
        if self._arena is None or self._arena.nbytes < size:
            self._arena = None
            self._arena = self.cupy.empty(max(size, 1), np.uint8)
        return self._arena

    def frame_at(self, sizes: Mapping[str, int], given: Mapping[str, Any], finish: Finish | None = None, measure: bool = False, ordered: Collection[str] = (),
                 without: Collection[int] = ()) -> Frame:  # fmt: skip
        """A frame of the caller's, not kept here and not captured yet, whose inputs, all `given`, are CuPy arrays that lie where they will be. What
        `finish` returns is done at its end. Its work is done twice until it is captured; with `measure`, kernels are timed and the fastest taken.
        `ordered`: inputs that are 0, 1, 2, ... to the end of what they pick from; `without`: steps, by index, that are not done.
        """
        with self.stream, tuning.using(self.times, measure):
            return Frame(self, sizes, {} if measure else None, given, finish, ordered, without)

    def agreed(self) -> contextlib.AbstractContextManager[None]:
        """A context in which frames are made: of several ranks all succeed, or all raise OutOfMemory, so that all keep the same frames."""
        return contextlib.nullcontext() if self.ranks is None else self.ranks.agreed(self.stream, (OutOfMemory, self.cupy.cuda.memory.OutOfMemoryError))

    def close(self) -> None:
        """Let captured work go, which NCCL waits for before it ends."""
        self.frames.clear()
        gc.collect()  # frames and their launches hold one another
        self.stream.synchronize()

    def _turn_weights(self) -> set[int]:
        """Store matrices the way kernels read them, [N, K]; the steps (by index) whose `trans_w` becomes 1 by that."""
        readers = Counter(name for step in self.steps for name in step.inputs)
        turned: set[int] = set()
        for index, step in enumerate(self.steps):
            plugin = self.plugins.get(step.name) if step.kind == "plugin" else None
            if plugin is None or not plugin.transposable or step.attributes.get("trans_w"):
                continue
            names = [n for n, given in zip(step.inputs, plugin.inputs, strict=False) if n and given.rstrip("?") in plugin.transposable]
            own = all(n in self.weights and readers[n] == 1 and self.weights[n].dtype.itemsize == 2 for n in names)
            if not own or set(names) & set(self.outputs.values()):
                continue
            for name in names:
                self.weights[name] = self.cupy.ascontiguousarray(self.weights[name].T)
            turned.add(index)
        return turned

    def segment(self, key: str) -> onnx.ModelProto:
        """The model of a segment, read once."""
        if key not in self.models:
            self.models[key] = onnx.load_model_from_string(self.plan.segment(key))
        return self.models[key]

    def _view(self, array: Any) -> Any:
        if hasattr(array, "__cuda_array_interface__"):
            return self.cupy.asarray(array)
        return self.cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else array  # which `Plan.check` refuses

    def frame(self, sizes: Mapping[str, int]) -> Frame:
        """The captured work for these sizes of the named dimensions; made on first use."""
        key = tuple(sizes.values())
        if key not in self.frames:
            while len(self.frames) >= GRAPHS:
                self.frames.popitem(last=False)
            made = self._make_frame(sizes)
            made.capture()
            self.frames[key] = made
        self.frames.move_to_end(key)
        return self.frames[key]

    def _make_frame(self, sizes: Mapping[str, int]) -> Frame:
        """A new frame; where memory runs out, those that were not used for longest go first."""
        while True:
            try:
                with tuning.using(self.times), self.agreed():
                    return Frame(self, sizes)
            except OutOfMemory:
                if not self.frames:
                    raise
                self.frames.popitem(last=False)
                gc.collect()  # a frame and its launches hold one another
                self.cupy.get_default_memory_pool().free_all_blocks()

    def tune(self, inputs: Mapping[str, Any]) -> tuning.Times:
        """Time the kernels that could do each step on these inputs, and use the fastest from now on. Returns what was measured."""
        arrays = {n: a if isinstance(a, np.ndarray) else self._view(a) for n, a in inputs.items()}
        sizes, known = self.plan.check(arrays), set(self.times)
        with self.stream, tuning.using(self.times, measure=True):
            made = Frame(self, sizes, arrays)
            made.capture()
        self.frames[tuple(sizes.values())] = made
        return {key: times for key, times in self.times.items() if key not in known}


class Frame:
    """A plan's work for one set of sizes: memory with fixed addresses, and the graph that runs it."""

    def __init__(self, executor: CudaExecutor, sizes: Mapping[str, int], inputs: Mapping[str, Any] | None = None, given: Mapping[str, Any] | None = None,
                 finish: Finish | None = None, ordered: Collection[str] = (), without: Collection[int] = ()):  # fmt: skip
        """Everything is done once, and by `capture` once more. `inputs` are for tuning: then each step runs before the next one's kernels are
        measured, on what it will read. For the rest see `CudaExecutor.frame_at`.
        """
        self.executor, self.cupy, manifest = executor, executor.cupy, executor.plan.manifest
        self.sizes, self.given = dict(sizes), dict(given or {})
        types = {**executor.inputs, **manifest.values}
        shapes = {name: self._shape(name, kind) for name, kind in types.items()}
        steps = executor.steps
        lives = {name: (0, len(steps)) for name in (*executor.inputs, *executor.outputs.values())}
        for index, step in enumerate(steps):
            until = index + 2 if executor.ranks is not None and step.name == "AllReduce" else index  # a norm in the same launch writes while it still reads
            for name in (*step.inputs, *step.outputs):
                if name and name not in executor.weights:
                    first, last = lives.get(name, (index, index))
                    lives[name] = (min(first, index), max(last, until))
        self._in_place(lives)
        dtypes = {name: self._dtype(kind) for name, kind in types.items()}
        fixed = {*executor.inputs, *executor.outputs.values(), *executor.weights}
        views = Views(steps, executor.segment, shapes, lambda s: s.kind == "plugin" and executor.plugins[s.name].strided, fixed, ordered)
        for name in views.of:
            first, last = lives.pop(name)
            root = views.root(name)
            if root in lives:
                lives[root] = (min(first, lives[root][0]), max(last, lives[root][1]))
        needed = {n: int(np.prod(shapes[n], dtype=np.int64)) * dtypes[n].itemsize for n in lives if n not in executor.weights}
        offsets, total = plan_arena(needed, lives)
        with memory(self.cupy, f"the values for {self.sizes}", total, "run smaller batches"):
            self.arena = executor.arena(total)
        self.values = {**executor.weights, **self.given}
        for name, offset in offsets.items():
            self.values[name] = self.cupy.ndarray(shapes[name], dtypes[name], self.arena.data + offset)
        for name in (*self.updated, *views.of):
            self._view(name, views)
        self.readers: dict[str, set[int]] = {views.root(n): {len(steps)} for n in executor.outputs.values()}  # by the value whose memory is read
        for index, step in enumerate(steps):
            for name in step.inputs if index not in views.skipped else ():
                self.readers.setdefault(views.root(name), set()).add(index)
        self.root = views.root
        self._repeat(steps)
        self.pool = self.cupy.cuda.MemoryPool()  # what references allocate: kept, so that captured addresses stay theirs
        with self.cupy.cuda.using_allocator(self.pool.malloc):
            self.work: list[tuple[list[int], Launch]] = []
            if inputs is not None:
                self._take(inputs)
            empty = {i for i, s in enumerate(steps) if s.outputs and all(0 in shapes[o] for o in s.outputs)}  # a step of which no logits are wanted
            for indices, launch in self._launches([i for i in range(len(steps)) if i not in views.skipped | empty | set(without)]):
                self.work.append((indices, launch))
                if inputs is not None:
                    launch()
            self.launches = [launch for _, launch in self.work] + (finish(self) if finish is not None else [])
            for launch in self.launches:
                launch()
        self.graph: Any = None

    def capture(self) -> None:
        """Make the graph, if the work can be captured."""
        with self.cupy.cuda.using_allocator(self.pool.malloc):
            for launch in self.launches:  # first runs compile and allocate, which a capture may not
                launch()
            self.executor.stream.synchronize()
            self.executor.kernels.save()
            self.graph = self._capture()

    def _in_place(self, lives: dict[str, tuple[int, int]]) -> None:
        """Decide where results of plugins that update an input lie: in its memory, if it is given or nobody else reads it, else in a
        copy of it. The former leave `lives`, as does what is given.
        """
        self.updated: dict[str, str] = {}  # result: the value that is overwritten
        self.copied: dict[str, str] = {}
        steps = self.executor.steps
        readers = Counter(n for s in steps for n in s.inputs)
        outputs = {*self.executor.outputs.values()}
        for index, step in enumerate(steps):
            plugin, _ = self.of(index)
            if plugin is None:
                continue
            for name, source in zip(plugin.inputs, step.inputs, strict=False):
                target = plugin.updates.get(name.rstrip("?"))
                if target is None or not source:
                    continue
                result = step.outputs[plugin.outputs.index(target)]
                free = source not in self.executor.weights and source not in outputs and readers[source] == 1
                (self.updated if free or source in self.given else self.copied)[result] = source
        for name in (*self.updated, *self.given):
            lives.pop(name, None)
        for source in self.updated.values():
            if source in lives:
                lives[source] = (lives[source][0], len(steps))

    def _view(self, name: str, views: Views) -> Any:
        if name in self.updated:
            self.values[name] = self._view(self.updated[name], views)
        if name not in self.values:
            source, done = views.of[name]
            self.values[name] = apply(self._view(source, views), done)
        return self.values[name]

    def _repeat(self, steps: list[Step]) -> None:
        """Let plugins write only what differs in their results, where all readers take strided values."""
        plugins, outputs = self.executor.plugins, {*self.executor.outputs.values()}
        for index, step in enumerate(steps):
            plugin, attributes = self.of(index)
            if plugin is None or plugin.view is None or step.outputs[0] in outputs:
                continue
            readers = [s for s in steps if step.outputs[0] in s.inputs]
            if all(s.kind == "plugin" and plugins[s.name].strided for s in readers):
                self.values[step.outputs[0]] = plugin.view(self.values[step.outputs[0]], **attributes)

    def _capture(self) -> Any:
        """The launches as a CUDA graph; None if one of them cannot be captured (a reference that calls CuPy's cuBLAS)."""
        stream = self.executor.stream
        stream.begin_capture()
        try:
            for launch in self.launches:
                launch()
        except NotImplementedError:
            with contextlib.suppress(self.cupy.cuda.runtime.CUDARuntimeError):
                stream.end_capture()
            return None
        graph = stream.end_capture()
        graph.upload(stream)
        return graph

    def _shape(self, name: str, kind: ValueType) -> tuple[int, ...]:
        def unknown() -> int:
            raise RewriteError(f"the shape of '{name}', {list(kind.shape)}, does not follow from the sizes of the inputs")

        return tuple(resolve(d, dict(self.sizes), unknown) for d in kind.shape)

    def empty(self, name: str) -> Any:
        """Room of its own for a value that another rank makes."""
        kind = self.executor.plan.manifest.values[name]
        return self.cupy.empty(self._shape(name, kind), self._dtype(kind))

    def _dtype(self, kind: ValueType) -> np.dtype[Any]:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16 if kind.dtype == "bfloat16" else kind.dtype)

    def _segment(self, step: Step) -> Launch:
        loaded, context = self.executor.engines[step.name], self.executor.contexts[step.name]
        names = {loaded.get_tensor_name(i) for i in range(loaded.num_io_tensors)}
        given = {f"i{i}": v for i, v in enumerate(step.inputs) if f"i{i}" in names}
        made = dict(zip([o.name for o in self.executor.segment(step.name).graph.output], step.outputs, strict=True))
        addresses = {n: int(self.values[v].data.ptr) for n, v in {**given, **made}.items()}
        shapes = {n: tuple(self.values[v].shape) for n, v in given.items()}
        stream = self.executor.stream

        def launch() -> None:
            for name, shape in shapes.items():
                context.set_input_shape(name, shape)
            for name, address in addresses.items():
                context.set_tensor_address(name, address)
            if not context.execute_async_v3(stream.ptr):
                raise RewriteError(f"TensorRT fails to run segment {step.name} at {self.sizes}: {engine.complaint()}")

        return launch

    def _launches(self, indices: list[int], chain: bool = True) -> Iterator[tuple[list[int], Launch]]:
        """The work of the steps in order, with their indices; neighbours that read the same value, or each other's, may become one launch."""
        steps = self.executor.steps
        place = 0
        while place < len(indices):
            first = steps[indices[place]]
            plugin, attributes = self.of(indices[place])
            if plugin is None:
                yield [indices[place]], self._segment(first)
                place += 1
                continue
            chained = self._sum_and_norm(indices, place) or (chains.at(self, indices, place) if chain else None)
            if chained is not None:
                count, launch = chained
                yield indices[place : place + count], launch
                place += count
                continue
            most = place + 1
            while most < len(indices) and steps[indices[most]].inputs[:1] == first.inputs[:1] and self.of(indices[most]) == (plugin, attributes):
                most += 1
            for end in range(most, place, -1):
                calls = [self.arguments(steps[i], plugin) for i in indices[place:end]]
                made: Launch | None = plugin.merged(calls, **attributes) if plugin.merged is not None and len(calls) > 1 and not self.copied else None
                if len(calls) == 1:
                    made = self._after_copies(first, self._plugin(plugin, *calls[0], attributes))
                if made is not None:
                    yield indices[place:end], made
                    place = end
                    break

    def _sum_and_norm(self, indices: list[int], place: int) -> tuple[int, Launch] | None:
        """One launch for a sum over ranks and the norm that follows; None if they are not that, or have no such kernel."""
        ranks, steps = self.executor.ranks, [self.executor.steps[i] for i in indices[place : place + 2]]
        if ranks is None or [s.name for s in steps] != ["AllReduce", "RMSNormalization"] or self.root(steps[0].outputs[0]) != self.root(steps[1].inputs[0]):
            return None
        (summed, _), (normed, attributes) = self.of(indices[place]), self.of(indices[place + 1])
        assert summed is not None
        assert normed is not None
        launch = ranks.sum_and_norm(*self.arguments(steps[0], summed), *self.arguments(steps[1], normed), float(attributes["epsilon"]))
        return None if launch is None else (2, launch)

    def launches_of(self, indices: list[int]) -> list[Launch]:
        """The work of the steps without chains."""
        return [launch for _, launch in self._launches(indices, chain=False)]

    def of(self, index: int) -> tuple[Plugin | None, dict[str, Any]]:
        """The plugin of a step, None for a segment, and its attributes."""
        step = self.executor.steps[index]
        if step.kind == "segment":
            return None, {}
        if step.name not in self.executor.plugins:
            raise RewriteError(f"the plan calls plugin {step.name}, which no loaded rules file declares; give it with --rules")
        plugin = self.executor.plugins[step.name]
        return plugin, {**plugin.attributes, **step.attributes, **({"trans_w": 1} if index in self.executor.turned else {})}

    def attributes(self, index: int) -> dict[str, Any]:
        """The attributes of a plugin's step as its kernel gets them: `trans_w` may differ from the plan's."""
        return self.of(index)[1]

    def arguments(self, step: Step, plugin: Plugin) -> tuple[list[Any], list[Any]]:
        copies = {self.copied[o]: o for o in step.outputs if o in self.copied}
        inputs = [self.values[copies.get(n, n)] if n else None for n in step.inputs]
        return inputs + [None] * (len(plugin.inputs) - len(inputs)), [self.values[n] for n in step.outputs]

    def _after_copies(self, step: Step, launch: Launch) -> Launch:
        pairs = [(self.values[o], self.values[self.copied[o]]) for o in step.outputs if o in self.copied]
        if not pairs:
            return launch

        def copy_and_launch() -> None:
            for target, source in pairs:
                target[...] = source
            launch()

        return copy_and_launch

    def _plugin(self, plugin: Plugin, inputs: list[Any], outputs: list[Any], attributes: dict[str, Any]) -> Launch:
        if self.executor.ranks is not None and plugin.name in TOLD:
            return self.executor.ranks.launch(plugin.name, inputs, outputs, **attributes)
        made = plugin.cuda(inputs, outputs, **attributes) if plugin.cuda is not None else None
        if made is not None:
            return made  # type: ignore[no-any-return]

        def launch() -> None:
            result = plugin.reference(*inputs, **attributes)
            for value, target in zip(result if isinstance(result, tuple) else (result,), outputs, strict=True):
                if value is not target:  # an input that was updated
                    target[...] = self.cupy.asarray(value)

        return launch

    def _take(self, inputs: Mapping[str, Any]) -> None:
        for name, array in inputs.items():
            if isinstance(array, np.ndarray):
                self.values[name].set(np.ascontiguousarray(array))
            else:
                self.values[name][...] = array

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the inputs in, replay the graph, copy the outputs out (the arena is overwritten by the next run)."""
        self._take(inputs)
        self.replay()
        return {name: self.values[value].copy() for name, value in self.executor.outputs.items()}

    def replay(self) -> None:
        """Enqueue the work on the executor's stream, which has to be the current one."""
        if self.graph is not None:
            self.graph.launch(self.executor.stream)
        else:
            with self.cupy.cuda.using_allocator(self.pool.malloc):
                for launch in self.launches:
                    launch()
