"""Decoding with a plan of `hollow_plans.py` on as many GPUs as it has ranks: random weights made on the devices, the same for any number of ranks.

    python benchmarks/ranks_decode.py plans/8b-1
    mpirun -n 2 --bind-to none python benchmarks/ranks_decode.py plans/8b-2          (or --start 2, without MPI)

Through `Generator`, scheduler and sampler included: greedy texts and the logits of a given one, to be compared with those of another number of
ranks, kernels timed before; then milliseconds a step of 1 and 32 texts of about 1,024 positions, beside what a rank must read (its weights, its keys and values) and the
speed of a copy on one device in the same run; then each launch of a step alone. `two_gpus.py` runs all of it. Results: PLAN.result.json.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from all_reduce import Pipes, start

from rewrite.plugins import tuning
from rewrite.runtime import engine, seal
from rewrite.runtime.batch import Batch
from rewrite.runtime.communication import connect, sent, together
from rewrite.runtime.cuda import CudaExecutor
from rewrite.runtime.cuda_model import PART
from rewrite.runtime.cuda_ranks import DeviceRanks
from rewrite.runtime.generator import Generator
from rewrite.runtime.machine import TUNED_ON
from rewrite.runtime.nccl import choose_device
from rewrite.runtime.plan import MANIFEST, WEIGHTS, Plan
from rewrite.runtime.plan_model import PlanModel
from rewrite.runtime.sampling import Row, Sampling
from rewrite.shards import Slice

CONTEXT, NEW = 1024, 64
STD = {"tiny": 0.12}  # of the weights; others as transformers initializes them. A small model would say one token for ever
SOURCE = """
typedef unsigned int u32;
typedef unsigned long long u64;
// bfloat16 of a triangular distribution around 0; each depends on its place in the whole weight alone
extern "C" __global__ void fill(unsigned short* out, long long rows, long long columns, long long stride, long long first_row, long long first_column, long long width, u32 seed, float scale) {
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < rows * columns; i += (long long)gridDim.x * blockDim.x) {
        const long long r = i / columns, c = i % columns;
        u64 h = ((u64)(first_row + r) * width + first_column + c) * 0x9E3779B97F4A7C15ull + seed;
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
        h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
        h ^= h >> 31;
        const float v = ((float)((u32)h >> 8) - (float)((u32)(h >> 32) >> 8)) * (1.f / 16777216.f) * scale;
        u32 bits = __float_as_uint(v);
        out[r * stride + c] = (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}
"""


# --- weights ------------------------------------------------------------------------------------------------------
def fill(out: Any, first_row: int, first_column: int, width: int, seed: int, scale: float) -> None:
    """bfloat16 [R, C] of a whole weight that is `width` wide, of which `out` is the part that begins at these places: NumPy's, or a view on the device."""
    if isinstance(out, np.ndarray):
        places = (np.arange(first_row, first_row + out.shape[0], dtype=np.uint64)[:, None] * np.uint64(width) + np.arange(first_column, first_column + out.shape[1], dtype=np.uint64))
        h = places * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(31)
        low, high = ((h & np.uint64(0xFFFFFFFF)) >> np.uint64(8)).astype(np.float32), (h >> np.uint64(40)).astype(np.float32)
        out[...] = ((low - high) * np.float32(1 / 16777216) * np.float32(scale)).astype(out.dtype)
        return
    import cupy

    kernel = cupy.RawKernel(SOURCE, "fill")
    rows, columns = out.shape
    numbers = [cupy.int64(n) for n in (rows, columns, out.strides[0] // 2, first_row, first_column, width)]
    kernel((4096,), (256,), (out, *numbers, cupy.uint32(seed), cupy.float32(scale)))


def random_weight(out: Any, name: str, told: Mapping[str, Any], rank: int, std: float) -> None:
    """Fill `out`, a rank's part of the weight of this name."""
    if name in told["values"]:
        out[...] = np.array(told["values"][name], np.float32).reshape(out.shape) if isinstance(out, np.ndarray) else _on_device(told["values"][name], out)
    elif out.ndim == 1:
        out.view(np.uint16)[...] = 0x3F80  # one
    else:
        seed, scale = zlib.crc32(name.encode()), std * 6**0.5
        if name not in told["slices"]:
            fill(out, 0, 0, out.shape[1], seed, scale)
            return
        axis, sections = told["slices"][name]
        width, place = sum(size for size, _ in sections) if axis else out.shape[1], 0
        for begin, end in Slice(name, axis, sections).ranges(rank, told["world"]):
            mine = slice(place, place + end - begin)
            fill(out[:, mine] if axis else out[mine], 0 if axis else begin, begin if axis else 0, width, seed, scale)
            place += end - begin


def _on_device(values: list[float], out: Any) -> Any:
    import cupy

    return cupy.asarray(np.array(values, np.float32).reshape(out.shape))


class Named(np.ndarray[Any, Any]):
    """An array without content, which knows whose it stands for."""

    weight: str


def on_devices(told: Mapping[str, Any], rank: int, std: float) -> None:
    """From now on plans' weights are not read: random ones are made on the device."""

    def weights_of(self: Plan, rank: int) -> dict[str, Any]:
        found = {}
        for name, kind in self.types_of(rank).items():
            found[name] = np.broadcast_to(np.zeros((), kind.numpy), kind.shape).view(Named)
            found[name].weight = name
        return found

    def uploaded(self: CudaExecutor, array: Any) -> Any:
        made = self.cupy.empty(array.shape, array.dtype)
        random_weight(made, array.weight, told, rank, std)
        return made

    Plan.weights_of = weights_of  # type: ignore[method-assign]
    Plan.weights = property(lambda self: weights_of(self, 0))  # type: ignore[assignment]
    CudaExecutor._uploaded = uploaded  # type: ignore[method-assign]


def write_weights(plan: Path, std: float) -> None:
    """Random weights in the file of a small plan, and the seal of what is there now: from then on it is a plan like any other."""
    told, file = json.loads(plan.with_suffix(".json").read_text()), plan / WEIGHTS
    loaded = Plan(plan)
    data = np.memmap(file, np.uint8, "r+")
    from rewrite.runtime import weights

    for name, (begin, end) in weights.places(bytes(data), file).items():
        rank, short = (int(name.split("/")[0].split()[1]), name.split("/", 1)[1]) if name.startswith("rank ") else (0, name)
        kind = loaded.types_of(rank)[short]
        random_weight(data[begin:end].view(kind.numpy).reshape(kind.shape), short, told, rank, std)
    data.flush()
    manifest = json.loads((plan / MANIFEST).read_text())
    manifest["files"][WEIGHTS][1] = seal.digests(file.read_bytes())
    (plan / MANIFEST).write_text(json.dumps(manifest))
    seal.seal(plan, None)


def make_usable(plan: Path) -> None:
    """Let this Python's plugins pass for those of the build: another version may write their references in another way."""
    from rewrite.registry import library
    from rewrite.runtime.machine import fingerprint

    manifest = json.loads((plan / MANIFEST).read_text())
    manifest["plugins"] = {name: fingerprint(library().plugins[name]) for name in manifest["plugins"]}
    (plan / MANIFEST).write_text(json.dumps(manifest))
    seal.seal(plan, None)


# --- what rank 0 does ---------------------------------------------------------------------------------------------
def texts(generator: Generator) -> dict[str, Any]:
    """Greedy texts, alone and all at once, with the two likeliest tokens at each place."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, generator.model.vocabulary, n).tolist() for n in (1, 3, 70, 5, 17, 200, 24, 33)]
    made = generator.generate(prompts, max_new_tokens=32, ignore_eos=True, logprobs=2)
    again = [generator.generate(p, max_new_tokens=32, ignore_eos=True, logprobs=2)[0] for p in prompts[:3]]
    drawn = generator.generate(prompts[:3], max_new_tokens=16, ignore_eos=True, temperature=0.8, seed=3)
    return {
        "tokens": [g.tokens for g in made], "top": [[list(map(list, p.top)) for p in g.choices[0].logprobs] for g in made],
        "alone": [g.tokens for g in again], "drawn": [g.tokens for g in drawn],
    }  # fmt: skip


def logits(generator: Generator, target: Path) -> dict[str, Any]:
    """Logits of 96 given tokens, read in chunks and one by one, written to a file."""
    model = generator.model
    assert model.device is not None
    tokens = np.random.default_rng(6).integers(3, model.vocabulary, 96)
    ends, found = [40, 72, *range(73, 97)], []
    table = np.random.default_rng(0).permutation(model.blocks)[: -(-96 // model.block_size)].astype(np.int32)
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        positions = np.arange(begin, end)
        slots = (table[positions // model.block_size] * model.block_size + positions % model.block_size).astype(np.int32)
        starts, lengths = np.array([0, end - begin], np.int32), np.array([end], np.int32)
        made = model.step(Batch(tokens[begin:end], positions, slots, table[None], starts, lengths, np.arange(end - begin)))
        with model.device.stream:
            found.append(np.array(made.get()))
    whole = np.concatenate(found)
    np.save(target, whole.astype(np.float32))
    return {"rows": len(whole), "finite": bool(np.isfinite(whole).all()), "spread": float(whole.std())}


def rank_bytes(generator: Generator, batch: int) -> int:
    """Bytes that a rank cannot do without in a step: weights that plugins read, keys and values of CONTEXT positions."""
    plan, layers = generator.plan, generator.model.found["layers"]
    names = {n for s in plan.manifest.steps if s.kind == "plugin" for n in s.inputs}
    weights = sum(kind.numpy.itemsize * int(np.prod(kind.shape)) for n, kind in plan.types_of(0).items() if n in names)
    return weights + sum(batch * CONTEXT * layer["kv_heads"] * (layer["size"] + layer["value_size"]) * 2 for layer in layers)


def speed(generator: Generator, batch: int, repeat: int, copy: float) -> dict[str, Any]:
    """Steps of `batch` texts while all decode: the mean over a run, on the clock, the median of the runs."""
    rng = np.random.default_rng(batch)
    prompts = rng.integers(3, generator.model.vocabulary, (batch, CONTEXT - NEW // 2)).tolist()
    most = NEW + 2 + batch * CONTEXT // generator.scheduler.token_budget  # early texts get tokens while others are read
    means, reads = [], []
    for turn in range(repeat + 1):  # the first makes what is missing
        for prompt in prompts:
            generator.add(generator.request(prompt, None, True, {"max_new_tokens": most}), lambda output: None)
        ends, metrics = [(time.perf_counter(), 0)], generator.scheduler.metrics
        before = metrics.generated_tokens
        while generator.scheduler.unfinished:
            generator.step()
            ends.append((time.perf_counter(), metrics.generated_tokens - before))
        whole = [i for i, (a, b) in enumerate(itertools.pairwise(ends), 1) if b[1] - a[1] == PART * batch]  # all got as many tokens
        (begin, known), (end, all_of_them) = ends[whole[0]], ends[whole[-1]]
        if turn:
            means.append((end - begin) * batch / (all_of_them - known))
            reads.append(next(t for t, n in ends if n >= batch) - ends[0][0])
    step, size = statistics.median(means), rank_bytes(generator, batch)
    return {"batch": batch, "ms": 1e3 * step, "runs_ms": [1e3 * m for m in means], "tokens_per_second": batch / step, "prompts_ms": 1e3 * statistics.median(reads),
            "rank_bytes": size, "gbs": size / step / 1e9, "share": size / step / copy}  # fmt: skip


def launches(generator: Generator, exchange: Callable[[bytes], Any]) -> list[str]:
    """Of each captured step: its launches, each alone 20 times in a graph, on all ranks at the same time."""
    lines, device = [], generator.model.device
    assert device is not None
    steps = generator.plan.manifest.steps
    for (sizes, decoding), bucket in list(device.buckets.items()):
        if bucket.frame.graph is None:
            lines.append(f"{sizes}: NOT CAPTURED")
        if not decoding or sizes.table * device.block_size < CONTEXT or bucket.frame.graph is None:
            continue
        frame, parts, count = bucket.frame, dict[str, list[float]](), sizes.sequences
        tables = np.arange(count * sizes.table).reshape(count, sizes.table).astype(np.int32) % device.blocks
        positions = np.full(count, CONTEXT - 150)  # each launch of `advance` is one more
        slots = (tables[:, positions[0] // device.block_size] * device.block_size + positions[0] % device.block_size).astype(np.int32)
        batch = Batch(np.arange(count), positions, slots, tables, np.arange(count + 1, dtype=np.int32), (positions + 1).astype(np.int32), np.arange(count))
        names = ["+".join(steps[i].name[:14] for i in indices) for indices, _ in frame.work] + ["sampler", "advance"]
        with device.stream:
            bucket.inputs.fill(batch)
            bucket.state.load([Row(Sampling(), [1] * 8, 8) for _ in range(count)], 400)
            for name, launch in zip(names, frame.launches, strict=True):
                exchange(b" ")
                if len(parts.get(name, ())) < 6:  # of like ones
                    parts.setdefault(name, []).append(tuning.microseconds(launch))
                else:
                    parts[name].append(statistics.median(parts[name]))
            exchange(b" ")
            events = [device.executor.cupy.cuda.Event() for _ in range(30)]
            for event in events:
                event.record(device.stream)
                frame.replay()
            device.stream.synchronize()
        times = [1e3 * device.executor.cupy.cuda.get_elapsed_time(a, b) for a, b in itertools.pairwise(events)]
        told = ", ".join(f"{name} {len(us)} x {statistics.median(us):.1f}" for name, us in parts.items())
        lines.append(f"{sizes}: {statistics.median(times):.0f} us a replay, {len(frame.launches)} launches, alone {sum(map(sum, parts.values())):.0f} us: {told}")
    return lines


def copy_speed(size: int = 1 << 30) -> float:
    """Bytes a second that a copy on this rank's device reads and writes, the best of ten."""
    import cupy

    source, target, times = cupy.ones(size, np.uint8), cupy.empty(size, np.uint8), []
    for _ in range(11):
        events = [cupy.cuda.Event(), cupy.cuda.Event()]
        events[0].record()
        target[...] = source
        events[1].record()
        events[1].synchronize()
        times.append(cupy.cuda.get_elapsed_time(*events) / 1e3)
    del source, target
    cupy.get_default_memory_pool().free_all_blocks()
    return float(2 * size / min(times))


def timed(plan: Plan, communicator: Any) -> tuning.Times:
    """Kernels timed on rank 0's device, without the other ranks, for all of them."""
    times: tuning.Times = {}
    if communicator is None or not communicator.rank:
        model = PlanModel(plan, 64 << 20, only=0 if plan.manifest.world > 1 else None)
        times = model.tune()
        if model.device is not None:
            model.device.close()
    if communicator is None:
        return times
    told = None if communicator.rank else [np.frombuffer(json.dumps(times).encode(), np.uint8)]
    return json.loads(sent(communicator, told, 1)[0].astype(np.uint8).tobytes())  # type: ignore[no-any-return]


class Told:
    """Prints with the time, keeps what was found, and goes on after a failure."""

    def __init__(self, plan: Path, result: Path, quiet: bool):
        self.plan, self.result, self.quiet, self.started, self.found = plan, result, quiet, time.monotonic(), dict[str, Any]()

    def __call__(self, text: str) -> None:
        if not self.quiet:
            print(f"[{time.monotonic() - self.started:6.1f} s] {self.plan.name}: {text}", flush=True)

    def part(self, name: str, work: Callable[[], Any], show: Callable[[Any], str] = lambda found: "done") -> None:
        try:
            self.found[name] = work()
            self(f"{name}: {show(self.found[name])}")
        except Exception as error:
            self.found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            self(f"{name} FAILS: {type(error).__name__}: {str(error)[:500]}\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}")
        if not self.quiet:
            self.result.write_text(json.dumps(self.found))


def told_speed(found: dict[str, Any]) -> str:
    return (f"{found['ms']:.3f} ms a step, {found['tokens_per_second']:.0f} tokens/s, a rank {found['gbs']:.0f} GB/s | {found['share']:.0%} of a copy, "
            f"prompts {found['prompts_ms']:.0f} ms, runs {[round(m, 3) for m in found['runs_ms']]}")  # fmt: skip


def work(communicator: Any, options: argparse.Namespace) -> None:
    plan, rank = options.plan, communicator.rank if communicator is not None else 0
    said = Told(plan, options.result or plan.with_suffix(".result.json"), quiet=rank > 0)
    faulthandler.dump_traceback_later(options.limit, exit=True)  # where it hangs, if it does
    if not options.weights:
        on_devices(json.loads(plan.with_suffix(".json").read_text()), rank, STD.get(plan.name.split("-")[0], 0.02))
    if options.nccl:
        DeviceRanks._near = lambda self: False  # type: ignore[method-assign]
    batches = [int(b) for b in options.batches.split(",")]
    with together(communicator):
        choose_device()
        if not rank:
            said.part("copy", copy_speed, lambda speed: f"{speed / 1e9:.0f} GB/s")
        loaded = Plan(plan, device="cuda")
        if options.tune:
            loaded.manifest.tuning, loaded.manifest.versions[TUNED_ON] = timed(loaded, communicator), engine.gpu_model()
            said(f"{len(loaded.manifest.tuning)} calls timed")
        layers = loaded.manifest.generator["layers"] if loaded.manifest.generator is not None else []
        each = sum(layer["kv_heads"] * (layer["size"] + layer["value_size"]) * 2 for layer in layers)
        generator = Generator(loaded, kv_memory=(max(batches) + 1) * (CONTEXT + 4 * NEW) * each, reuse=False, communicator=communicator)
        end, generator.model._end = generator.model._end, lambda: None  # type: ignore[method-assign]
        device = generator.model.device
        assert device is not None
        free, whole = device.executor.cupy.cuda.runtime.memGetInfo()
        name = device.executor.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        said(f"loaded on {loaded.manifest.world} x {name}; {(whole - free) / 1e9:.1f} of {whole / 1e9:.1f} GB in use, {generator.model.blocks} blocks")
        if rank:
            generator.model.follow()
        else:
            said.found |= {"device": name, "ranks": loaded.manifest.world}
            if not options.speed:
                said.part("texts", lambda: texts(generator))
            said.part("logits", lambda: logits(generator, plan.with_suffix(".logits.npy")), str)
            for batch in batches:
                said.part(f"batch {batch}", lambda b=batch: speed(generator, b, options.repeat, said.found["copy"]), told_speed)
            generator.model.stop()
        faulthandler.dump_traceback_later(40, exit=True)
        said.part("launches", lambda: launches(generator, communicator.exchange if communicator is not None else lambda data: None), "\n".join)
        end()
        said("ended")


class Local(Pipes):
    """Ranks that this program started itself, for machines without MPI."""

    def broadcast(self, x: Any) -> None:
        if x.size:
            x.reshape(-1).view(np.uint8)[...] = np.frombuffer(self.exchange(x.tobytes())[0], np.uint8)

    def abort(self, code: int) -> None:
        import os

        os._exit(code)


def spawned(rank: int, size: int, lines: list[Any], options: argparse.Namespace) -> None:
    import os

    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(rank)
    work(Local(rank, size, lines), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--repeat", type=int, default=3, help="runs, after one to warm up")
    parser.add_argument("--result", type=Path, help="PLAN.result.json")
    parser.add_argument("--nccl", action="store_true", help="no sums by our kernel")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="leave out what `rewrite build --tune` does")
    parser.add_argument("--speed", action="store_true", help="no texts")
    parser.add_argument("--weights", action="store_true", help="read the plan's weights (`write_weights`)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which it ends and says where it was")
    parser.add_argument("--start", type=int, default=0, help="start so many ranks, without MPI")
    options = parser.parse_args()
    if not options.start:
        work(connect(), options)
        return
    if not start(spawned, options.start, options):
        sys.exit("a rank ended with an error")


if __name__ == "__main__":
    main()
