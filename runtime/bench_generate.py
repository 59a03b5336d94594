"""How fast a plan reads prompts and generates, beside the speed at which the memory can be read."""

from __future__ import annotations

import math
import os
import statistics
import time
from typing import Any

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.communication import Communicator
from rewrite.runtime.generator import Generator
from rewrite.runtime.plan import Plan

PROBE = 1 << 28  # bytes that are read to measure the memory


def measure(plan: str | os.PathLike[str] | Plan, batch: int, prompt_length: int, new_tokens: int, repeat: int, device: str = "cpu",
            kv_memory: int | None = None, token_budget: int | None = None, communicator: Communicator | None = None) -> dict[str, Any]:  # fmt: skip
    """Medians over `repeat` runs of `batch` texts: milliseconds and tokens a second for prompts and for steps of one token each.

    The weights are counted once a step, an embedding table that is only looked up not at all. Of a plan for several ranks all call it, each
    with its `communicator`: rank 0 measures, the others follow and get nothing; weights and memory are those of rank 0. Raises RewriteError if the
    texts do not fit in the cache together: then they would wait for one another.
    """
    plan = plan if isinstance(plan, Plan) else Plan(plan, device=device)
    if plan.manifest.world > 1 and communicator is None:
        raise RewriteError(f"{plan.directory}: the plan is for {(n := plan.manifest.world)} ranks; start them with `mpirun -n {n} rewrite bench-generate ...`")
    generator = Generator(plan, kv_memory=kv_memory, token_budget=token_budget, seats=max(64, batch), reuse=False, communicator=communicator)
    if communicator is not None and communicator.rank:
        generator.model.follow()
        return {}
    found = _measured(generator, batch, prompt_length, new_tokens, repeat)
    generator.model.stop()
    return found


def _measured(generator: Generator, batch: int, prompt_length: int, new_tokens: int, repeat: int) -> dict[str, Any]:
    needed = batch * -(-(prompt_length + new_tokens) // generator.model.block_size)
    if needed > generator.model.blocks:
        raise RewriteError(f"bench-generate: {batch} texts of {prompt_length + new_tokens} tokens need {needed} blocks, and there are {generator.model.blocks}; give more --kv-memory")
    rng = np.random.default_rng(0)
    prefill, steps = [], []
    for turn in range(repeat + 1):
        prompts = rng.integers(0, generator.model.vocabulary, (batch, prompt_length)).tolist()
        ends: list[tuple[float, int]] = []
        started = time.perf_counter()
        for prompt in prompts:
            generator.add(generator.request(prompt, None, True, {"max_new_tokens": new_tokens}), lambda output: None)
        while generator.scheduler.unfinished:
            before = generator.scheduler.metrics.generated_tokens
            generator.step()
            if generator.scheduler.metrics.generated_tokens > before or not ends:
                ends.append((time.perf_counter(), generator.scheduler.metrics.generated_tokens - before))
        first = next(i for i in range(len(ends)) if sum(n for _, n in ends[: i + 1]) >= batch)  # all have their first token
        if turn:  # the first run warms up
            prefill.append(ends[first][0] - started)
            steps += [(b[0] - a[0]) * batch / b[1] for a, b in zip(ends[first:], ends[first + 1 :], strict=False) if b[1] and b[1] % batch == 0]
    if not steps:
        how = "give more --new-tokens, or a larger --token-budget"
        raise RewriteError(f"bench-generate: no step made a token of each of the {batch} texts: some ended, or found no seat, before the last one's prompt was read; {how}")
    step, read = statistics.median(steps), statistics.median(prefill)
    size = weights_read(generator)
    return {
        "batch": batch, "prompt_length": prompt_length, "new_tokens": new_tokens, "device": generator.plan.device, "prefill_ms": 1e3 * read,
        "prefill_tokens_per_second": batch * prompt_length / read, "decode_ms": 1e3 * step, "decode_tokens_per_second": batch / step,
        "weight_bytes": size, "decode_gb_per_second": size / step / 1e9, "memory_gb_per_second": memory_speed(generator) / 1e9,
    }  # fmt: skip


def weights_read(generator: Generator) -> int:
    """Bytes of the weights that plugins read in each step, of rank 0."""
    names = {n for s in generator.plan.steps_of(0) if s.kind == "plugin" for n in s.inputs}
    return sum(kind.numpy.itemsize * math.prod(int(d or 0) for d in kind.shape) for n, kind in generator.plan.types_of(0).items() if n in names)


def memory_speed(generator: Generator) -> float:
    """Bytes a second at which a product of a matrix and a vector reads its matrix, the best of five; on the GPU what a copy reads and writes."""
    if generator.model.device is not None:
        return generator.model.device.copy_speed()
    matrix, vector = np.ones((PROBE // 4096, 1024), np.float32), np.ones(1024, np.float32)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ vector
        times.append(time.perf_counter() - started)
    return matrix.nbytes / min(times)
