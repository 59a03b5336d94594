"""Text generation on the GPU: right beside the CPU for small models, and where the time of a step goes for wide layers.

    python benchmarks/generate_gpu.py                 small models in three types, then four layers of Llama-3.2-1B's widths
    python benchmarks/generate_gpu.py --only llama-bfloat16,wide

Plans are made by processes of their own meanwhile. Times of a step: the median over single replays of its CUDA graph, and what a
`Generator` takes for a token, all included.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import generate_cases as cases

import rewrite
from rewrite.plugins import tuning
from rewrite.runtime import buckets
from rewrite.runtime.batch import Batch
from rewrite.runtime.sampling import Row, Sampling

BATCHES, CONTEXT = (1, 8, 32), 1024


def make_wide(folder: Path) -> None:
    """Four layers as wide as Llama-3.2-1B's, a vocabulary of 32768, bfloat16."""
    import torch
    import transformers

    from rewrite.export.huggingface import as_flat
    from rewrite.export.torch_export import export

    config = transformers.LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=32768,
                                      max_position_embeddings=4096, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    folder.mkdir(parents=True)
    export(as_flat(model.eval()), folder / "model.onnx", verify=False)
    rewrite.build(rewrite.optimize(folder / "model.onnx", generate=True, verify=False).model, folder / "plan", verify=False)


def told(label: str, check: Callable[[], Any]) -> None:
    started = time.perf_counter()
    try:
        found = check()
    except Exception as error:
        found = f"FAILS: {type(error).__name__}: {str(error)[:300]}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    for line in found if isinstance(found, list) else [found]:
        print(f"{label}: {line if line != '' else 'ok'} ({time.perf_counter() - started:.1f} s)", flush=True)


def wide_times(plan: Path) -> list[str]:
    lines = []
    started = time.perf_counter()
    generator = rewrite.Generator(plan, device="cuda", kv_memory=4 << 30, reuse=False)
    lines.append(f"loaded in {time.perf_counter() - started:.1f} s")
    device, rng = generator.model.device, np.random.default_rng(0)
    assert device is not None
    for batch in BATCHES:
        prompts = rng.integers(0, 32768, (batch, CONTEXT)).tolist()
        for ahead in (8, 1):
            generator.scheduler.lookahead = ahead
            steps, reads = [], []
            for _ in range(2):
                for prompt in prompts:
                    generator.add(generator.request(prompt, None, True, {"max_new_tokens": 48}), lambda output: None)
                ends, total = [(time.perf_counter(), 0)], generator.scheduler.metrics.generated_tokens
                while generator.scheduler.unfinished:
                    generator.step()
                    ends.append((time.perf_counter(), generator.scheduler.metrics.generated_tokens - total))
                began = next(i for i, (_, n) in enumerate(ends) if n >= batch)
                reads.append(ends[began][0] - ends[0][0])
                steps += [(b[0] - a[0]) * batch / (b[1] - a[1]) for a, b in zip(ends[began:], ends[began + 1 :], strict=False) if b[1] > a[1] and (b[1] - a[1]) % batch == 0]
            lines.append(f"batch {batch}, {ahead} steps at once: {1e3 * statistics.median(steps):.3f} ms a step; prompts {1e3 * min(reads):.1f} ms")
    return lines + all_bucket_times(device)


def all_bucket_times(device: Any) -> list[str]:
    """Of each step that was made so far, whose tables reach CONTEXT positions and whose texts have equally many tokens."""
    lines = []
    for (sizes, decoding), bucket in device.buckets.items():
        if sizes.tokens % sizes.sequences == 0 and sizes.table * device.block_size >= CONTEXT:
            lines += bucket_times(device, sizes, decoding, bucket)
    return lines


def bucket_times(device: Any, sizes: buckets.Sizes, decoding: bool, bucket: Any) -> list[str]:
    """A step of texts of CONTEXT positions, or of whole new texts: its graph, and each of its launches alone, 20 in a graph."""
    cupy, count, frame, block = device.executor.cupy, sizes.sequences, bucket.frame, device.block_size
    new = sizes.tokens // count
    table = -(-max(CONTEXT, new) // block)
    tables = np.random.default_rng(0).permutation(device.blocks)[: count * table].reshape(count, table).astype(np.int32)
    positions = np.tile(np.arange(new) + (0 if new > 1 else CONTEXT - 30), count)
    texts = np.repeat(np.arange(count), new)
    slots = (tables[texts, positions // block] * block + positions % block).astype(np.int32)
    starts = np.arange(0, count * new + 1, new, dtype=np.int32)
    batch = Batch(np.arange(count * new), positions, slots, tables, starts, np.full(count, positions[-1] + 1, np.int32), starts[1 : sizes.rows + 1].astype(np.int64) - 1)
    with device.stream:
        if decoding:
            bucket.state.load([Row(Sampling(), [1] * 8, 8) for _ in range(count)], 400)
        bucket.inputs.fill(batch)
        events = [cupy.cuda.Event() for _ in range(25)]
        for event in events:
            event.record(device.stream)
            frame.replay()
        device.stream.synchronize()
        times = [1e3 * cupy.cuda.get_elapsed_time(a, b) for a, b in itertools.pairwise(events)]
        bucket.inputs.fill(batch)
        parts: dict[str, list[float]] = {}
        steps = device.executor.plan.manifest.steps
        names = ["+".join(steps[i].name[:14] for i in indices) for indices, _ in frame.work] + ["sampler", "advance"][: len(frame.launches) - len(frame.work)]
        for name, launch in zip(names, frame.launches, strict=True):
            parts.setdefault(name, []).append(tuning.microseconds(launch))
    told = ", ".join(f"{name} {len(us)} x {statistics.median(us):.1f}" for name, us in parts.items())
    return [f"{sizes} decoding={decoding}: {statistics.median(times):.0f} us a replay, {len(frame.launches)} launches, alone {sum(map(sum, parts.values())):.0f} us: {told}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join([*(f"{n}-{d}" for n, d in cases.CASES), "wide"]))
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    chosen = options.only.split(",")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        made = {"wide": pool.submit(make_wide, Path(folder, "wide"))} if "wide" in chosen else {}
        made |= {label: pool.submit(cases.make_plan, *label.split("-"), Path(folder, label)) for label in chosen if label != "wide"}
        started = time.perf_counter()
        for label in chosen:
            try:
                made[label].result()
            except Exception as error:
                print(f"{label}: no plan: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            print(f"{label}: the plan is there after {time.perf_counter() - started:.0f} s", flush=True)
            plan = Path(folder, label, "plan")
            if label == "wide":
                told("wide", lambda plan=plan: wide_times(plan))
                continue
            dtype = label.split("-")[1]
            told(f"{label} logits", lambda plan=plan, dtype=dtype: cases.compare_logits(plan, dtype))
            told(f"{label} texts", lambda plan=plan, dtype=dtype: cases.compare_texts(plan, dtype))
            if label == "llama-bfloat16":
                told("allocations", lambda plan=plan: cases.allocations(plan))
                told("enqueue, us", lambda plan=plan: cases.enqueue_us(plan))


if __name__ == "__main__":
    main()
