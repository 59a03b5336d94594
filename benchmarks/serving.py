"""A load as a server sees it: requests of mixed lengths that arrive at random, by our `Generator` and by transformers' continuous batching.

    python benchmarks/serving.py                      Llama-3.2-1B's shape, random weights, bfloat16, 256 requests
    python benchmarks/serving.py --rates 20,60        requests a second; all at once first; without: 0.75 of what each of the two did then

Prompts have 32 to 1,024 random tokens, outputs 16 to 256, both drawn evenly; gaps between arrivals are exponential. Both get the same
requests at the same times, greedy, every output in full length. Times count from the arrival: to the first token, to the end, and from
one token to the next. transformers runs as `generate_batch` sets it up (its attention is sdpa where flash-attn is not installed).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decode_peers as peers
import llamas
import numpy as np
import record
import torch

PERCENTILES = (50, 90, 99)
OURS, THEIRS = "ours", "transformers, continuous batching"
PACKAGES = ("torch", "transformers", "triton", "onnx", "cupy-cuda13x", "numpy")


@dataclass
class Arrival:
    """A request: seconds after the start when it comes, its prompt, and how many tokens it wants."""

    at: float
    prompt: list[int]
    new: int


@dataclass
class Served:
    """What became of one: seconds after the start at which it got each of its tokens."""

    arrival: Arrival
    times: list[float]


def arrivals(count: int, rate: float, vocabulary: int, seed: int = 0, prompts: tuple[int, int] = (32, 1024), outputs: tuple[int, int] = (16, 256)) -> list[Arrival]:
    """Requests at `rate` a second, Poisson; at an infinite rate all come at once. Prompts and lengths do not depend on the rate."""
    random = np.random.default_rng(seed)
    lengths, wanted = random.integers(prompts[0], prompts[1] + 1, count), random.integers(outputs[0], outputs[1] + 1, count)
    gaps = random.exponential(1.0, count)
    times = np.cumsum(gaps) / rate if np.isfinite(rate) else np.zeros(count)
    return [Arrival(float(t), random.integers(0, vocabulary, n).tolist(), int(w)) for t, n, w in zip(times, lengths, wanted, strict=True)]


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Throughput, and percentiles of the latencies in milliseconds. Raises ValueError if a request got too few tokens."""
    short = next((s for s in served if len(s.times) != s.arrival.new), None)
    if short is not None:
        raise ValueError(f"a request got {len(short.times)} tokens of {short.arrival.new}")
    end = max(s.times[-1] for s in served)
    gaps = np.concatenate([np.diff(s.times) for s in served])
    latencies = {"first_token": [s.times[0] - s.arrival.at for s in served], "between_tokens": gaps, "end_to_end": [s.times[-1] - s.arrival.at for s in served]}
    tokens = sum(s.arrival.new for s in served)
    found: dict[str, Any] = {"requests": len(served), "seconds": end, "output_tokens": tokens, "prompt_tokens": sum(len(s.arrival.prompt) for s in served),
                             "requests_per_second": len(served) / end, "output_tokens_per_second": tokens / end}  # fmt: skip
    for name, values in latencies.items():
        found[name] = {"mean": 1e3 * float(np.mean(values)), **{f"p{p}": 1e3 * float(np.percentile(values, p)) for p in PERCENTILES}}
    return found


def by_generator(generator: Any, load: Sequence[Arrival]) -> list[Served]:
    """One thread that takes in what has arrived, and steps."""
    served = [Served(a, []) for a in load]
    started = time.perf_counter()
    waiting = sorted(served, key=lambda s: s.arrival.at)[::-1]

    def sink(one: Served) -> Callable[[Any], None]:
        return lambda output: one.times.extend([time.perf_counter() - started] * len(output.tokens))

    while waiting or generator.scheduler.unfinished:
        now = time.perf_counter() - started
        while waiting and waiting[-1].arrival.at <= now:
            one = waiting.pop()
            generator.add(generator.request(one.arrival.prompt, None, True, {"max_new_tokens": one.arrival.new}), sink(one))
        if generator.scheduler.unfinished:
            generator.step()
        else:
            time.sleep(max(0.0, waiting[-1].arrival.at - (time.perf_counter() - started)))
    return served


def by_transformers(manager: Any, load: Sequence[Arrival]) -> list[Served]:
    """Requests are handed in by one thread as they arrive; it notes itself when it made each token."""
    served = [Served(a, []) for a in load]
    names: dict[str, Served] = {}
    started = time.perf_counter()

    def arrive() -> None:
        for one in sorted(served, key=lambda s: s.arrival.at):
            time.sleep(max(0.0, one.arrival.at - (time.perf_counter() - started)))
            name = f"{started}-{len(names)}"
            names[name] = one
            manager.add_request(one.arrival.prompt, request_id=name, max_new_tokens=one.arrival.new, record_timestamps=True, eos_token_id=-1)

    thread = threading.Thread(target=arrive)
    thread.start()
    left = len(served)
    while left:
        if (result := peers.finished(manager)) is not None:
            names[result.request_id].times = [t - started for t in result.timestamps]
            left -= 1
    thread.join()
    return served


def row(who: str, rate: float, served: Sequence[Served]) -> dict[str, Any]:
    found = {"who": who, "rate": rate if np.isfinite(rate) else None, **summary(served)}
    first, between, end = found["first_token"], found["between_tokens"], found["end_to_end"]
    print(f"{who:34} {'at once' if not np.isfinite(rate) else f'{rate:.1f}/s':>9} {found['requests_per_second']:7.1f} requests/s {found['output_tokens_per_second']:8.0f} tok/s "
          f"first {first['p50']:8.1f} {first['p99']:8.1f} between {between['p50']:6.2f} {between['p99']:7.2f} whole {end['p50']:8.0f} {end['p99']:8.0f} ms (p50 p99)", flush=True)  # fmt: skip
    return found


@contextlib.contextmanager
def ours(plan: Path, options: argparse.Namespace, shape: llamas.Shape, item: int) -> Iterator[Callable[[Sequence[Arrival]], list[Served]]]:
    import rewrite

    memory = options.seats * (options.prompts[1] + options.outputs[1] + 32) * item * shape.layers * 2 * shape.kv_heads * shape.size
    generator = rewrite.Generator(plan, device=options.device, kv_memory=memory, token_budget=options.budget, seats=options.seats, reuse=False)
    yield lambda load: by_generator(generator, load)


@contextlib.contextmanager
def theirs(directory: Path, options: argparse.Namespace) -> Iterator[Callable[[Sequence[Arrival]], list[Served]]]:
    model = peers.load(directory, options.device)
    with peers.serving(model, options.outputs[1], options.prompts[1], options.requests, **options.continuous) as manager:
        yield lambda load: by_transformers(manager, load)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    started, shape, dtype = time.monotonic(), llamas.SHAPES[options.model], torch.bfloat16 if options.device == "cuda" else torch.float32
    device = torch.cuda.get_device_name() if options.device == "cuda" else record.cpu()
    rows: list[dict[str, Any]] = []

    def serve(who: str, rate: float) -> float:
        """Requests a second."""
        served = systems[who](arrivals(options.requests, rate, shape.vocabulary, 0, options.prompts, options.outputs))
        rows.append(row(who, rate, served))
        record.write(options.output, device, record.versions(*PACKAGES), {"model": options.model, "seats": options.seats, "token_budget": options.budget, "rows": rows})
        return float(rows[-1]["requests_per_second"])

    with tempfile.TemporaryDirectory(dir=options.folder) as temporary, contextlib.ExitStack() as stack:
        folder, systems = Path(temporary), {}
        directory = llamas.make_directory(shape, folder / options.model, dtype, options.device)
        if "ours" in options.only:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                graph = options.graphs and options.graphs / f"{options.model}.onnx"
                pool.submit(llamas.make_plan, directory, folder, options.budget, options.seats, options.device == "cuda", graph).result()
            print(f"plan ready after {time.monotonic() - started:.0f} s", flush=True)
            systems[OURS] = stack.enter_context(ours(folder / "plan", options, shape, dtype.itemsize))
        if "transformers" in options.only:
            systems[THEIRS] = stack.enter_context(theirs(directory, options))
        speeds = []
        for who, system in systems.items():
            system(arrivals(options.requests, np.inf, shape.vocabulary, 1, options.prompts, options.outputs))  # other requests of the same kind: every graph and kernel is there
            speeds.append(serve(who, np.inf))
        for rate in options.rates or sorted(0.75 * s for s in speeds):
            for who in systems:
                serve(who, rate)
    print(f"done after {time.monotonic() - started:.0f} s")
    return rows


def span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    return int(low), int(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1b", choices=list(llamas.SHAPES))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompts", type=span, default=(32, 1024), help="shortest:longest")
    parser.add_argument("--outputs", type=span, default=(16, 256))
    parser.add_argument("--rates", type=lambda text: [float(r) for r in text.split(",")], default=None)
    parser.add_argument("--only", default="transformers,ours")
    parser.add_argument("--seats", type=int, default=256, help="texts in flight, of ours")
    parser.add_argument("--budget", type=int, default=2048, help="tokens a step, of ours")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--graphs", type=Path, default=None, help="what `llamas.py` made, so that nothing is exported here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="serving")
    options = parser.parse_args()
    options.only = options.only.split(",")
    options.continuous = {} if options.device == "cuda" else {"num_blocks": 64, "max_batch_tokens": 256}
    measure(options)


if __name__ == "__main__":
    main()
