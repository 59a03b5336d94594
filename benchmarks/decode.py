"""Decoding and prefill on the GPU: our plan beside torch.compile and transformers, on the same random weights, in one run.

    python benchmarks/decode.py --models 1b                 Llama-3.2-1B's shape; 8b: Llama-3.1-8B's; tiny: everything in seconds
    python benchmarks/decode.py --models 1b --kinds grouped,flex --batches 1,32 --seconds 200

bfloat16. Texts of 992 random tokens are read and 64 tokens follow, so that the positions seen are 1,024 on average. Each figure is the
mean over the tokens of a run, the median of three runs, on the clock. torch.compile (max-autotune) runs a step, argmax included, as one
CUDA graph that the host launches without looking at a token; ours is `Generator`, scheduler, sampler and stop check included, and its
tokens reach the host. What must be read: all weights once (of an untied table the rows looked up), keys and values of 1,024 positions;
the percentage is of the bandwidth of a device copy in the same run.

Then the divergence of the next token's distribution, KL(transformers in float32 || bfloat16), for ours and for transformers.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import decode_peers as peers
import llamas
import numpy as np
import record
import torch
from decode_peers import Timing

CONTEXT, NEW, PROMPT = 1024, 64, 1024
PACKAGES = ("torch", "transformers", "triton", "onnx", "cupy-cuda13x", "numpy")
BUDGET, ROWS = 2048, 64  # tokens and rows of logits of a step of ours
GRAPH = "torch.compile"


def copy_bandwidth(device: str, size: int = 1 << 31) -> float:
    """Bytes a second that a copy on the device reads and writes: the median of ten."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(11):
        peers.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        peers.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size / statistics.median(times[1:])


def run_generator(generator: Any, prompts: Sequence[list[int]], new: int, repeat: int = 3) -> Timing:
    """All prompts at once through a `Generator`: to the first token of all, and from there a step, while all of them decode."""
    timing = Timing()
    slack = 2 + sum(len(p) for p in prompts) // generator.scheduler.token_budget  # tokens that early texts get while others are read
    for turn in range(repeat + 1):  # the first warms up
        tokens: list[list[int]] = [[] for _ in prompts]
        numbers = []
        peers.synchronize()
        began = time.perf_counter()
        for prompt, found in zip(prompts, tokens, strict=True):
            request = generator.request(prompt, None, True, {"max_new_tokens": new + 1 + (slack if len(prompts) > 1 else 0)})
            numbers.append(generator.add(request, lambda output, found=found: found.extend(output.tokens)))
        all_began = counted = None
        last, at = 0.0, 0
        while generator.scheduler.unfinished:
            generator.step()
            now, count = time.perf_counter(), len(tokens[-1])
            if all_began is None and all(tokens):
                all_began, counted = now, count
            if all_began is not None and count - (counted or 0) <= new:
                last, at = now, count
            if any(len(t) > new + slack for t in tokens):
                break
        for number in numbers:
            generator.cancel(number)
        while generator.scheduler.unfinished:
            generator.step()
        if not turn:
            continue
        assert all_began is not None
        assert counted is not None
        timing.first.append(all_began - began)
        if at > counted:
            timing.steps.append((last - all_began) / (at - counted))
        timing.tokens = [t[: new + 1] for t in tokens]
    return timing


def host_times(work: Callable[[], Any]) -> str:
    """Mean microseconds on the clock in each function on the way from a request to its tokens, while `work` runs; callers include callees."""
    from rewrite.runtime import cuda, cuda_model, cuda_sampling, generator, groups, scheduler

    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            spent.setdefault(name, []).append(time.perf_counter() - started)
            return result

        return call

    places: list[tuple[Any, str]] = [
        (generator.Generator, "request"), (generator.Generator, "add"), (generator.Generator, "step"), (scheduler.Scheduler, "_schedule"), (scheduler, "arrays"), (scheduler.Scheduler, "_accept"),
        (cuda_model.CudaModel, "step"), (cuda_model.Inputs, "fill"), (cuda.Frame, "replay"), (cuda_sampling.SamplerState, "load"), (cuda_sampling.SamplerState, "enqueue"),
        (cuda_sampling.SamplerState, "fetch"), (cuda_sampling, "unpack"), (groups.Sequence, "settle"),
    ]  # fmt: skip
    kept = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, function in kept:
            setattr(owner, name, timed(f"{getattr(owner, '__name__', '').rsplit('.')[-1]}.{name}", function))
        work()
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)
    return ", ".join(f"{name} {1e6 * statistics.mean(times):.0f} ({len(times)})" for name, times in spent.items())


def plan_logits(model: Any, tokens: Sequence[int], chunk: int, singles: int) -> np.ndarray[Any, Any]:
    """Logits [tokens, vocabulary] of one text by a plan: read in chunks, the last `singles` one by one, its blocks in disorder."""
    from rewrite.runtime.batch import Batch

    block = model.block_size
    table = np.random.default_rng(0).permutation(model.blocks)[: -(-len(tokens) // block)].astype(np.int32)
    whole = len(tokens) - singles
    ends = [*range(chunk, whole, chunk), *range(whole, len(tokens) + 1)]
    found = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        positions = np.arange(begin, end)
        slots = (table[positions // block] * block + positions % block).astype(np.int32)
        starts, lengths = np.array([0, end - begin], np.int32), np.array([end], np.int32)
        logits = model.step(Batch(np.array(tokens[begin:end], np.int64), positions, slots, table[None], starts, lengths, np.arange(end - begin)))
        peers.synchronize()
        found.append(np.array(logits.get() if hasattr(logits, "get") else logits, np.float32))  # CuPy's arrays have get()
    return np.concatenate(found)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> list[float]:
    """KL(expected || actual) of each row of logits, in nats."""
    p, q = torch.log_softmax(expected.double(), -1), torch.log_softmax(actual.double(), -1)
    return (p.exp() * (p - q)).sum(-1).tolist()  # type: ignore[no-any-return]


def compare_logits(reference: Any, narrow: torch.Tensor, model: Any, tokens: list[int], chunk: int, singles: int) -> dict[str, Any]:
    """KL of a plan, and of transformers in the plan's dtype (`narrow`, its logits), from `reference` in float32, on the same tokens."""
    device = reference.device
    with torch.no_grad():
        expected = reference(torch.tensor([tokens], device=device)).logits[0]
    ours = torch.from_numpy(plan_logits(model, tokens, chunk, singles)).to(device)
    found = {}
    for name, logits in (("ours", ours), ("transformers", narrow)):
        values = divergence(expected, logits)
        agree = int((expected.argmax(-1) == logits.argmax(-1)).sum())
        found[name] = {"mean": float(np.mean(values)), "max": float(np.max(values)), "same_token": agree}
    found["ours"]["mean_of_singles"] = float(np.mean(divergence(expected[-singles:], ours[-singles:])))
    return {"tokens": len(tokens), "singles": singles, **found}


class Rows:
    """The results so far, printed and written one by one."""

    def __init__(self, name: str, shape: llamas.Shape, bandwidth: float, write: Callable[[], None]):
        self.name, self.shape, self.bandwidth, self.write = name, shape, bandwidth, write
        self.rows: list[dict[str, Any]] = []

    def decode(self, who: str, batch: int, timing: Timing, **more: Any) -> None:
        size = self.shape.step_bytes(batch, CONTEXT)
        rate = size / timing.step
        self._add({"what": "decode", "who": who, "batch": batch, "ms": 1e3 * timing.step, "runs_ms": [1e3 * s for s in timing.steps], "tokens_per_second": batch / timing.step,
                   "gbs": rate / 1e9, "share": rate / self.bandwidth, "compile_seconds": timing.compile_seconds, **more})  # fmt: skip

    def prefill(self, who: str, length: int, timing: Timing, **more: Any) -> None:
        work = self.shape.prompt_operations(length)
        self._add({"what": "prefill", "who": who, "batch": 1, "length": length, "ms": 1e3 * timing.prefill, "runs_ms": [1e3 * s for s in timing.first],
                   "tokens_per_second": length / timing.prefill, "tflops": work / timing.prefill / 1e12, "compile_seconds": timing.compile_seconds, **more})  # fmt: skip

    def failed(self, what: str, who: str, batch: int, error: Exception) -> None:
        self._add({"what": what, "who": who, "batch": batch, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"})

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append({"model": self.name, **row})
        if "error" in row:
            print(f"{self.name:5} {row['what']:8} {row['batch']:3} {row['who']:34} {row['error']}", flush=True)
        else:
            ceiling = f"{row['gbs']:6.0f} GB/s | {row['share']:.0%} of {self.bandwidth / 1e9:.0f}" if "gbs" in row else f"{row['tflops']:6.1f} TFLOP/s"
            where = f"{self.name:5} {row['what']:8} {row['batch']:3} {row['who']:34}"
            print(f"{where} {row['ms']:9.3f} ms {row['tokens_per_second']:10.0f} tok/s {ceiling} (compiled in {row['compile_seconds']:.0f} s)", flush=True)
        self.write()


def equal_beginnings(a: list[list[int]], b: list[list[int]]) -> list[int]:
    """Of each pair of texts, how many tokens are the same before the first that is not."""
    return [next((i for i, (x, y) in enumerate(zip(s, t, strict=False)) if x != y), min(len(s), len(t))) for s, t in zip(a, b, strict=True)]


class Bench:
    """All measurements of one model."""

    def __init__(self, name: str, where: str, folder: Path, options: argparse.Namespace):
        self.name, self.device, self.where, self.folder, self.options = name, options.device, where, folder, options
        self.shape, self.dtype = llamas.SHAPES[name], torch.bfloat16 if self.device == "cuda" else torch.float32
        self.started = time.monotonic()
        self.rows = Rows(name, self.shape, copy_bandwidth(self.device, 1 << 31 if self.device == "cuda" else 1 << 24), self.write)
        self.told: dict[str, Any] = {"copy_gbs": self.rows.bandwidth / 1e9}
        self.tokens: dict[int, list[list[int]]] = {}  # of ours, by batch
        random = torch.Generator().manual_seed(0)
        self.texts = torch.randint(0, self.shape.vocabulary, (max(options.batches), CONTEXT - NEW // 2), generator=random)
        self.prompt = torch.randint(0, self.shape.vocabulary, (1, PROMPT), generator=random)

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {self.name}: {line}", flush=True)

    def write(self) -> None:
        record.write(f"{self.options.output}_{self.name}", self.where, record.versions(*PACKAGES), self.result())

    def result(self) -> dict[str, Any]:
        return {"model": self.name, "dtype": str(self.dtype).removeprefix("torch."), "context": CONTEXT, "rows": self.rows.rows, **self.told}

    def parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """What is measured, in order."""
        batches, only = self.options.batches, self.options.only
        if "ours" in only:
            yield "ours", self.ours
        if "prefill" in only:
            yield "torch.compile, prefill", self.compiled_prefill
        if "compile" in only:
            for batch in sorted(batches, key=lambda b: (b not in (1, 32), b)):
                yield f"torch.compile, batch {batch}", lambda batch=batch: self.compiled(batch)
        if "generate" in only:
            yield "generate", self.generate
        if "continuous" in only:
            yield "continuous batching", self.continuous
        if "kl" in only:
            yield "divergence", self.divergence

    def run(self, pool: ProcessPoolExecutor) -> dict[str, Any]:
        stages = llamas.Stages(self.name)
        with stages("weights"):
            directory = llamas.make_directory(self.shape, self.folder / self.name, self.dtype, self.device)
        self.plan: Future[dict[str, float]] | None = None
        if {"ours", "kl"} & set(self.options.only):
            graph = self.options.graphs and self.options.graphs / f"{self.name}.onnx"
            self.plan = pool.submit(llamas.make_plan, directory, self.folder, BUDGET, ROWS, self.device == "cuda", graph)
        with stages("load"):
            self.model = peers.load(directory, self.device) if set(self.options.only) != {"ours"} else None
        self.told["seconds"] = stages.seconds
        for label, part in self.parts():
            if time.monotonic() - self.started > self.options.seconds:
                self.say(f"{label} left out, time is up")
                continue
            try:
                part()
            except Exception as error:
                self.rows.failed(label, "", 0, error)
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()
            self.say(f"{label} done")
        self.write()
        return self.result()

    def compiled(self, batch: int) -> None:
        texts = self.texts[:batch].to(self.device)
        for kind in self.options.kinds:
            try:
                timing = peers.decode(self.model, texts, NEW, kind, backend=self.options.backend)
            except Exception as error:
                self.rows.failed("decode", f"{GRAPH}, {kind}", batch, error)
                continue
            ours = self.tokens.get(batch)
            more = {} if ours is None else {"equal_beginnings": equal_beginnings(ours, timing.tokens)}
            self.rows.decode(f"{GRAPH}, {kind}", batch, timing, **more)

    def compiled_prefill(self) -> None:
        self.rows.prefill(GRAPH, PROMPT, peers.prefill(self.model, self.prompt.to(self.device), backend=self.options.backend))

    def generator(self, tune: bool) -> Any:
        """Ours, with room for the largest batch."""
        import rewrite

        assert self.plan is not None
        self.told["plan_seconds"] = self.plan.result()
        self.say(f"the plan is there, {self.told['plan_seconds']}")
        item = self.dtype.itemsize * self.shape.layers * 2 * self.shape.kv_heads * self.shape.size
        memory = (max(*self.options.batches, 2) + 1) * (PROMPT + 2 * NEW) * item
        started = time.monotonic()
        made = rewrite.Generator(self.folder / "plan", device=self.device, kv_memory=memory, token_budget=BUDGET, reuse=False, lookahead=self.options.lookahead)
        self.told["load_seconds"] = time.monotonic() - started
        if self.device == "cuda" and tune:
            started = time.monotonic()
            made.model.tune()
            self.told["tune_seconds"] = time.monotonic() - started
            self.say(f"tuned in {self.told['tune_seconds']:.0f} s")
        return made

    def ours(self) -> None:
        generator = self.generator(self.options.tune)
        self.say("ours is loaded")
        for batch in self.options.batches:
            try:
                timing = run_generator(generator, self.texts[:batch].tolist(), NEW)
            except Exception as error:
                self.rows.failed("decode", "ours", batch, error)
                continue
            self.tokens[batch] = timing.tokens
            self.rows.decode("ours", batch, timing)
        timing = run_generator(generator, self.prompt.tolist(), 0, repeat=10)
        self.rows.prefill("ours", PROMPT, timing)
        if self.options.parts:
            from generate_gpu import all_bucket_times

            print(*all_bucket_times(generator.model.device), sep="\n", flush=True)
            print("host, us a call, of 20 prompts:", host_times(lambda: run_generator(generator, self.prompt.tolist(), 0, 20)), flush=True)
            print("host, us a call, of all texts:", host_times(lambda: run_generator(generator, self.texts.tolist(), NEW, 1)), flush=True)

    def generate(self) -> None:
        for batch in self.options.batches:
            timing = peers.generate(self.model, self.texts[:batch].to(self.device), NEW)
            self.rows.decode("transformers, static cache", batch, timing)
            if batch == 1:
                self.rows.prefill("transformers, static cache", self.texts.shape[1], timing)

    def continuous(self) -> None:
        with peers.serving(self.model, NEW + 1, self.texts.shape[1], max(self.options.batches), **self.options.continuous) as manager:
            for batch in self.options.batches:
                self.rows.decode("transformers, continuous batching", batch, peers.batched(manager, self.texts[:batch].tolist(), NEW))

    def divergence(self) -> None:
        """On what the model itself would say: 256 tokens, the last 64 one by one."""
        tokens = self.texts[0, :256].tolist()
        with torch.no_grad():
            narrow = self.model(torch.tensor([tokens], device=self.device)).logits[0].float()
        generator = self.generator(False)
        self.model.float()
        found = compare_logits(self.model, narrow, generator.model, tokens, ROWS, 64)
        self.told["divergence"] = found
        print(f"{self.name}: KL from transformers in float32, nats a token: ours {found['ours']['mean']:.2e} (singles {found['ours']['mean_of_singles']:.2e}, largest {found['ours']['max']:.2e}), "
              f"transformers in the same dtype {found['transformers']['mean']:.2e} (largest {found['transformers']['max']:.2e}); same token: ours {found['ours']['same_token']}, "
              f"transformers {found['transformers']['same_token']} of {len(tokens)}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="1b,8b")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--kinds", default=",".join(peers.KINDS), help="how torch.compile's steps attend")
    parser.add_argument("--only", default="ours,prefill,compile,generate,continuous,kl", help="prefill and compile: torch.compile reads a prompt, and decodes; generate and continuous: transformers")
    parser.add_argument("--seconds", type=float, default=1e9, help="of each model: begin nothing after that")
    parser.add_argument("--folder", default=None, help="for weights and plans, three times the size of the weights; /dev/shm if it has room")
    parser.add_argument("--parts", action="store_true", help="of ours: the time of each launch of a step, and of the host's functions, too")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="of ours: leave out what `rewrite build --tune` does on the GPU")
    parser.add_argument("--lookahead", type=int, default=None, help="of ours: steps that are done at once, if not the default")
    parser.add_argument("--graphs", type=Path, default=None, help="what `llamas.py` made, so that nothing is exported here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; eager in tests")
    parser.add_argument("--output", default="decode", help="results/OUTPUT_MODEL.json")
    options = parser.parse_args()
    options.batches, options.kinds, options.only = [int(b) for b in options.batches.split(",")], options.kinds.split(","), options.only.split(",")
    options.continuous = {} if options.device == "cuda" else {"num_blocks": 64, "max_batch_tokens": 256}
    measure(options)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else record.cpu()
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name in options.models.split(","):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                bench = Bench(name, device, Path(folder), options)
                results.append(bench.run(pool))
    return results


if __name__ == "__main__":
    main()
