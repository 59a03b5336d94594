"""How fast a plan runs, and where the time goes: the whole, each segment and each plugin, beside what the machine could do.

The ceilings are measured on the spot: a copy of a large array for the memory, a product of large matrices for the
arithmetic. What a step moves (its inputs and outputs, once) and computes is counted from the shapes at hand. On a GPU, the
whole is the plan's CUDA graph between two events; the steps are launched one by one, each between two events, behind a kernel that
spins until all are enqueued, so that the time of enqueueing is not measured with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.registry import library
from rewrite.runtime.partition import Step
from rewrite.runtime.profile import SIZE
from rewrite.verify import model_inputs

if TYPE_CHECKING:
    from rewrite.runtime.cpu import CpuExecutor
    from rewrite.runtime.cuda import CudaExecutor, Frame
    from rewrite.runtime.plan import Plan

PERCENTILES = (50, 90, 99)
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far more than caches hold
PRODUCT = {"cpu": 1536, "cuda": 8192}  # rows of the square matrices
SPIN_US = 40  # for each step: longer than it takes to enqueue one
CLOCK_MHZ = 2000  # about; of the GPU that spins
SPIN = 'extern "C" __global__ void spin(long long cycles) { long long start = clock64(); while (clock64() - start < cycles) {} }'
FREE = {"Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze", "Flatten", "Constant", "Cast", "Transpose", "Concat", "Slice", "Split", "Gather", "Expand"}  # compute nothing


@dataclass(frozen=True)
class Work:
    """What a step has to do: bytes to move, operations to compute."""

    bytes: int
    operations: int


@dataclass(frozen=True)
class Times:
    """What was measured, in nanoseconds: each run as a whole, and of other runs each step; how long a run took its caller, inputs and
    outputs on the host; runs in a second one after another; how long it took to enqueue one (on a GPU)."""

    runs: list[float]
    steps: list[list[float]]
    calls: list[float]
    per_second: float
    enqueue: float | None


def parse_sizes(text: str | None, plan: Plan) -> dict[str, int]:
    """The size of each named dimension: those of `batch=8,seq=128`, others as the profile calls best. Raises RewriteError."""
    sizes = {name: best for name, (_, best, _) in plan.manifest.profile.ranges.items()}
    given: set[str] = set()
    for item in filter(None, (text or "").replace(" ", "").split(",")):
        found = re.fullmatch(rf"([^=]+)={SIZE}", item, re.ASCII)
        if found is None or not int(found[2]):
            raise RewriteError(f"--size {item!r}: write NAME=SIZE, for example batch=8")
        name = found[1]
        if name not in sizes:
            raise RewriteError(f"--size {name}: the plan has no dimension of this name; it has {', '.join(sizes) or 'none'}")
        if name in given:
            raise RewriteError(f"--size {name} is given twice; a plan is measured at one size of each dimension")
        given.add(name)
        sizes[name] = int(found[2])
    return sizes


def make_inputs(plan: Plan, sizes: Mapping[str, int]) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of these sizes: random numbers, padding masks, positions; token ids are 0 and 1."""
    infos = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.numpy), list(v.shape)) for n, v in plan.inputs.items()]
    return model_inputs(onnx.helper.make_model(onnx.helper.make_graph([], "inputs", infos, [])), 0, sizes, "a plan is measured on generated inputs alone")


def bench(plan: Plan, sizes: Mapping[str, int], *, warmup: int = 5, iterations: int = 50) -> dict[str, Any]:
    """Measure a plan at these sizes of its dimensions; the result is what `rewrite bench --json` writes.

    Times are in microseconds, rates in bytes and operations a second, fractions of the ceilings from 0 to 1.
    Raises RewriteError for sizes that the plan was not built for, and what running it raises.
    """
    if plan.manifest.world > 1:
        raise RewriteError(f"{plan.directory}: it is for {plan.manifest.world} ranks, and only plans for one are measured yet")
    if plan.manifest.generator is not None:
        raise RewriteError(f"{plan.directory}: a text generator, whose inputs depend on each other; measure it with `rewrite bench-generate`")
    inputs = make_inputs(plan, sizes)
    plan.check(inputs)
    measure = _on_cpu if plan.device == "cpu" else _on_cuda
    steps, work, times, kind = measure(plan, inputs, warmup, iterations)
    ceilings = _ceilings(plan, kind)
    medians = [statistics.median(t) for t in times.steps]
    listed = [_rated({"step": i, "kind": s.kind, "name": s.name, "nodes": s.nodes[:1], "us": t / 1e3}, w, t, ceilings) for i, (s, w, t) in enumerate(zip(steps, work, medians, strict=True))]
    groups = [_group(name, [r for r in listed if r["name"] == name], sum(medians), ceilings) for name in dict.fromkeys(s.name for s in steps)]
    whole = Work(sum(w.bytes for w in work), sum(w.operations for w in work))
    middle = statistics.median(times.runs)
    batch = math.prod(n for name, n in sizes.items() if "batch" in name.lower())
    return {
        "plan": str(plan.directory), "model": plan.manifest.model, "device": _device(plan), "versions": plan.manifest.versions, "sizes": dict(sizes),
        "warmup": warmup, "iterations": iterations,
        "latency_us": _percentiles(times.runs), "call_us": _percentiles(times.calls), "enqueue_us": None if times.enqueue is None else times.enqueue / 1e3,
        "runs_per_second": times.per_second, "items_per_second": times.per_second * batch,
        "ceilings": {"bytes_per_second": ceilings[0], "operations_per_second": ceilings[1], "dtype": kind},
        "whole": _rated({"us": middle / 1e3}, whole, middle, ceilings),
        "parts": sorted(groups, key=lambda g: -g["us"]), "steps": listed, "run": _middle_run(times.steps),
    }  # fmt: skip


def _percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(times, p)) / 1e3 for p in PERCENTILES} | {"min": min(times) / 1e3, "mean": statistics.mean(times) / 1e3}


def _rated(told: dict[str, Any], work: Work, nanoseconds: float, ceilings: tuple[float, float]) -> dict[str, Any]:
    moved, computed = (n / max(nanoseconds, 1) * 1e9 for n in (work.bytes, work.operations))
    rates = {"bytes_per_second": moved, "operations_per_second": computed, "of_memory": moved / ceilings[0], "of_compute": computed / ceilings[1]}
    return {**told, "bytes": work.bytes, "operations": work.operations, **rates}


def _group(name: str, rows: list[dict[str, Any]], total: float, ceilings: tuple[float, float]) -> dict[str, Any]:
    """All steps of one segment or plugin together."""
    microseconds = sum(r["us"] for r in rows)
    told = {"kind": rows[0]["kind"], "name": name, "first": rows[0]["nodes"], "calls": len(rows), "us": microseconds, "share": microseconds * 1e3 / max(total, 1)}
    return _rated(told, Work(sum(r["bytes"] for r in rows), sum(r["operations"] for r in rows)), microseconds * 1e3, ceilings)


def _middle_run(steps: list[list[float]]) -> list[float]:
    """Of the runs measured step by step the one of median length: the microseconds of its steps."""
    runs = sorted(zip(*steps, strict=True), key=sum)
    return [t / 1e3 for t in runs[len(runs) // 2]] if runs else []


def trace(report: Mapping[str, Any]) -> dict[str, Any]:
    """One run, the median one, as Chrome trace events, which chrome://tracing and ui.perfetto.dev show.

    Source: the "Trace Event Format" of the Chromium project.
    """
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": f"{report['model']} on {report['device']}"}},
        *({"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": name}} for tid, name in enumerate(("plugins", "segments"))),
    ]
    now = 0.0
    for step, duration in zip(report["steps"], report["run"], strict=True):
        told = {k: step[k] for k in ("step", "bytes", "operations", "of_memory", "of_compute")} | {"node": "".join(step["nodes"])}
        events.append({"name": step["name"], "cat": step["kind"], "ph": "X", "ts": now, "dur": duration, "pid": 0, "tid": int(step["kind"] == "segment"), "args": told})
        now += duration
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": {"sizes": report["sizes"]}}


# --- what a step has to do ------------------------------------------------------------------------------------------
def plugin_work(step: Step, inputs: Sequence[Any], outputs: Sequence[Any]) -> Work:
    """Of a plugin on these arrays: operations by the plugin's own count, else one for each element of its outputs."""
    plugin = library().plugins[step.name]
    shapes = [None if a is None else tuple(a.shape) for a in inputs] + [None] * (len(plugin.inputs) - len(inputs))
    made = [tuple(a.shape) for a in outputs]
    count = plugin.operations(shapes, made, **{**plugin.attributes, **step.attributes}) if plugin.operations else sum(math.prod(s) for s in made)
    return Work(sum(_bytes(a) for a in (*inputs, *outputs) if a is not None), int(count))


def _bytes(array: Any) -> int:
    return int(math.prod(array.shape)) * int(array.dtype.itemsize)


def segment_work(model: onnx.ModelProto, inputs: Sequence[Any]) -> Work:
    """Of a segment: of tables that are only looked up in, what is found there; of values of which only the shape is read, nothing."""
    shaped = onnx.ModelProto()
    shaped.CopyFrom(model)
    for value, array in zip(shaped.graph.input, inputs, strict=True):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, list(array.shape)))
    for output in shaped.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(shaped, data_prop=True).graph
    known = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    sizes = {n: [d.dim_value for d in t.shape.dim] for n, t in known.items() if t.HasField("shape") and all(d.HasField("dim_value") for d in t.shape.dim)}
    sizes |= {i.name: list(i.dims) for i in graph.initializer}
    width = {n: onnx.helper.tensor_dtype_to_np_dtype(t.elem_type).itemsize for n, t in known.items() if t.elem_type}
    total = sum(_operations(node, sizes) for node in graph.node)
    moved = 0
    for value in graph.input:
        readers = [n for n in graph.node if value.name in n.input]
        looked_up = [n for n in readers if n.op_type == "Gather" and n.input[0] == value.name]
        if len(looked_up) == len(readers):
            moved += sum(math.prod(sizes.get(n.output[0], ())) * width[value.name] for n in looked_up)
        elif any(n.op_type not in ("Shape", "Size") for n in readers):
            moved += math.prod(sizes[value.name]) * width[value.name]
    return Work(moved + sum(math.prod(sizes.get(o.name, ())) * width.get(o.name, 0) for o in graph.output), total)


def _operations(node: onnx.NodeProto, sizes: Mapping[str, list[int]]) -> int:
    """Two for each multiplication and addition of a product or convolution, one for each element that is computed otherwise."""
    if node.op_type in FREE or any(n not in sizes for n in (node.input[0] if node.input else "", node.output[0])):
        return 0
    elements: int = math.prod(sizes[node.output[0]])
    first: list[int] = sizes[node.input[0]]
    if node.op_type in ("MatMul", "MatMulInteger"):
        return 2 * elements * first[-1]
    if node.op_type == "Gemm":
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * elements * first[0 if turned else -1]
    if node.op_type in ("Conv", "ConvInteger", "ConvTranspose") and node.input[1] in sizes:
        return 2 * (math.prod(first) if node.op_type == "ConvTranspose" else elements) * math.prod(sizes[node.input[1]][1:])
    if node.op_type == "Attention" and node.input[1] in sizes and len(node.input) < 5:  # without a cache; heads side by side, or an axis
        keys = sizes[node.input[1]][-2]
        causal = any(a.name == "is_causal" and a.i for a in node.attribute)
        return (keys + 1 if causal else 2 * keys) * (math.prod(first) + elements)
    if node.op_type == "Einsum" and all(n in sizes for n in node.input):
        terms = node.attribute[0].s.decode().replace(" ", "").split("->")[0].split(",")
        if not any("." in t for t in terms):
            return len(terms) * math.prod({label: size for t, n in zip(terms, node.input, strict=True) for label, size in zip(t, sizes[n], strict=True)}.values())
    return max(elements, math.prod(first)) if node.op_type.startswith(("Reduce", "Arg")) else elements


# --- the CPU --------------------------------------------------------------------------------------------------------
Measured = tuple[list[Step], list[Work], Times, str]


def _on_cpu(plan: Plan, inputs: Mapping[str, Any], warmup: int, iterations: int) -> Measured:
    executor: CpuExecutor = plan.executor  # type: ignore[assignment]
    steps, work = plan.manifest.steps, []
    values = {**executor.weights, **inputs}
    for step, call in executor.calls:
        given = [values[n] if n else None for n in step.inputs]
        made = call(given)
        values.update(zip(step.outputs, made, strict=True))
        work.append(plugin_work(step, given, made) if step.kind == "plugin" else segment_work(onnx.load_model_from_string(plan.segment(step.name)), given))
    for _ in range(warmup):
        executor.run(inputs)
    runs = []
    for _ in range(iterations):
        start = time.perf_counter_ns()
        executor.run(inputs)
        runs.append(float(time.perf_counter_ns() - start))
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(iterations):
        values = {**executor.weights, **inputs}
        for index, ((step, call), dropped) in enumerate(zip(executor.calls, executor.dropped, strict=True)):
            given = [values[n] if n else None for n in step.inputs]
            start = time.perf_counter_ns()
            made = call(given)
            times[index].append(float(time.perf_counter_ns() - start))
            values.update(zip(step.outputs, made, strict=True))
            for name in dropped:
                values.pop(name, None)
    return steps, work, Times(runs, times, runs, 1e9 / statistics.mean(runs), None), "float32"


# --- a GPU ----------------------------------------------------------------------------------------------------------
def _on_cuda(plan: Plan, inputs: Mapping[str, Any], warmup: int, iterations: int) -> Measured:
    executor: CudaExecutor = plan.executor  # type: ignore[assignment]
    cupy, stream = executor.cupy, executor.stream
    calls = [_clock(lambda: plan.run(inputs)) for _ in range(warmup + iterations)][warmup:]  # makes the frame, fills its inputs
    frame = executor.frame(plan.check(inputs))
    launches, steps, work = frame.launches, [], []
    for indices, _ in frame.work:  # several where neighbours share a launch
        each = [_cuda_work(executor, frame, index) for index in indices]
        work.append(Work(sum(w.bytes for w in each), sum(w.operations for w in each)))
        members = [plan.manifest.steps[i] for i in indices]
        steps.append(dataclasses.replace(members[0], outputs=[o for s in members for o in s.outputs], nodes=[n for s in members for n in s.nodes]))

    def run() -> None:
        if frame.graph is not None:
            frame.graph.launch(stream)
            return
        for launch in launches:
            launch()

    with stream, cupy.cuda.using_allocator(frame.pool.malloc):
        for _ in range(warmup):
            run()
        stream.synchronize()
        runs, enqueue = [], []
        for _ in range(iterations):
            events = [cupy.cuda.Event() for _ in range(2)]
            events[0].record(stream)
            enqueue.append(_clock(run))
            events[1].record(stream)
            events[1].synchronize()
            runs.append(cupy.cuda.get_elapsed_time(*events) * 1e6)
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record(stream)
        for _ in range(iterations):
            run()
        last.record(stream)
        last.synchronize()
        per_second = iterations / (cupy.cuda.get_elapsed_time(first, last) / 1e3)
        times = _each_step(cupy, stream, launches, iterations)
    kinds = [v.dtype for v in (*plan.manifest.values.values(), *plan.inputs.values()) if v.dtype in ("float16", "bfloat16", "float32")]
    return steps, work, Times(runs, times, calls, per_second, statistics.median(enqueue)), max(kinds, key=kinds.count, default="float32")


def _cuda_work(executor: CudaExecutor, frame: Frame, index: int) -> Work:
    step = executor.plan.manifest.steps[index]
    given, made = ([frame.values[n] if n else None for n in names] for names in (step.inputs, step.outputs))
    if step.kind == "segment":
        return segment_work(executor.segment(step.name), given)
    return plugin_work(dataclasses.replace(step, attributes=frame.attributes(index)), given, made)


def _clock(action: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    action()
    return float(time.perf_counter_ns() - start)


def _each_step(cupy: Any, stream: Any, launches: Sequence[Callable[[], None]], iterations: int) -> list[list[float]]:
    """Nanoseconds of each launch in each of several runs, on the current stream."""
    spin = cupy.RawKernel(SPIN, "spin")
    times: list[list[float]] = [[] for _ in launches]
    for _ in range(iterations):
        events = [cupy.cuda.Event() for _ in range(len(launches) + 1)]
        spin((1,), (1,), (np.int64(len(launches) * SPIN_US * CLOCK_MHZ),))
        events[0].record(stream)
        for launch, event in zip(launches, events[1:], strict=True):
            launch()
            event.record(stream)
        events[-1].synchronize()
        for index, (before, after) in enumerate(itertools.pairwise(events)):
            times[index].append(cupy.cuda.get_elapsed_time(before, after) * 1e6)
    return times


# --- ceilings -------------------------------------------------------------------------------------------------------
def _ceilings(plan: Plan, kind: str) -> tuple[float, float]:
    """Bytes a second of a copy (read and written) and operations a second of a product; the best of several."""
    rows = PRODUCT[plan.device]
    if plan.device == "cpu":
        data, square = np.ones(COPY_BYTES["cpu"], np.uint8), np.ones((rows, rows), np.float32)
        copy = np.empty_like(data)
        copied, product = min(_clock(lambda: np.copyto(copy, data)) for _ in range(4)), min(_clock(lambda: np.matmul(square, square)) for _ in range(4))
        return 2 * data.nbytes / copied * 1e9, 2 * rows**3 / product * 1e9
    from rewrite.plugins import cublaslt

    executor: CudaExecutor = plan.executor  # type: ignore[assignment]
    cupy, stream = executor.cupy, executor.stream
    with stream:
        size = min(COPY_BYTES["cuda"], cupy.cuda.runtime.memGetInfo()[0] // 4)
        source, target = cupy.ones(size, np.uint8), cupy.empty(size, np.uint8)
        copied = _best(cupy, stream, lambda: target.data.copy_from_device_async(source.data, size, stream))
        dtype = np.float32 if kind == "float32" else np.float16  # the products of both 16-bit types are equally fast
        x, w = (cupy.random.standard_normal((1, rows, rows), np.float32).astype(dtype) for _ in range(2))
        product = _best(cupy, stream, cublaslt.product(cupy.empty_like(x), x, w))
    return 2 * size / copied * 1e9, 2 * rows**3 / product * 1e9


def _best(cupy: Any, stream: Any, launch: Callable[[], object]) -> float:
    found = []
    for _ in range(6):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record(stream)
        launch()
        last.record(stream)
        last.synchronize()
        found.append(cupy.cuda.get_elapsed_time(first, last) * 1e6)
    return float(min(found))


def _device(plan: Plan) -> str:
    if plan.device == "cuda":
        from rewrite.runtime import engine

        return engine.gpu()
    import os
    import platform

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return f"{os.cpu_count()} x {name}"
