"""Generators on the GPU beside the CPU: small models with random weights, and what has to be the same. For tests and for `benchmarks/generate_gpu.py`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import rewrite
from rewrite.runtime.batch import Batch
from rewrite.runtime.plan_model import PlanModel

CASES = [(name, dtype) for name in ("llama", "gemma3", "gpt2") for dtype in ("bfloat16", "float16", "float32")]
TOLERANCE = {"float32": 5e-4, "float16": 2e-2, "bfloat16": 8e-2}  # of logits, as a part of the largest
LENGTHS = (1, 3, 70, 5, 17, 200, 24, 33)
NEW, VOCABULARY, BLOCK = 56, 1000, 16


def make_plan(name: str, dtype: str, folder: Path, **options) -> None:
    """`folder/plan`: two layers, 256 wide, heads of 64. Layers times 6 and tables by 10, or else they say one token for ever."""
    import torch
    import transformers

    from rewrite.export.huggingface import as_flat
    from rewrite.export.torch_export import export

    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    heads = {**sizes, "num_key_value_heads": 2, "head_dim": 64}
    config = {
        "llama": lambda: transformers.LlamaConfig(**heads, tie_word_embeddings=True),
        "gemma3": lambda: transformers.Gemma3TextConfig(**heads, sliding_window=32, layer_types=["sliding_attention", "full_attention"]),
        "gpt2": lambda: transformers.GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=512, vocab_size=VOCABULARY),
    }[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1 if id(parameter) in tables else 6)
    folder.mkdir(parents=True, exist_ok=True)
    export(as_flat(model.to(getattr(torch, dtype))), folder / "model.onnx", verify=False)
    made = rewrite.optimize(folder / "model.onnx", generate=True).model
    rewrite.build(made, folder / "plan", verify=False, **options)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [[int(t) for t in rng.integers(3, VOCABULARY, n)] for n in LENGTHS]


def batches(blocks: int, count: int, seed: int = 0) -> list[Batch]:
    """The steps of texts that are read and go on: beginnings, chunks, single tokens, all sequences at one token; their blocks in disorder."""
    rng = np.random.default_rng(seed)
    texts, width = rng.integers(0, VOCABULARY, (6, 180)), -(-180 // BLOCK)
    tables = rng.permutation(blocks)[: 6 * width].reshape(6, width).astype(np.int32)
    done, made = [0] * 6, []
    for number in range(count):
        most = 1 if number % 2 else int(rng.choice([3, 40]))
        chosen = [i for i in range(6) if (rng.random() < 0.8 or i == number % 6) and done[i] < 180] or [0]
        counts = [min(180 - done[i], int(rng.integers(1, most + 1))) for i in chosen]
        chosen, counts = zip(*[(i, c) for i, c in zip(chosen, counts, strict=True) if c > 0], strict=True)
        positions = np.concatenate([np.arange(done[i], done[i] + c) for i, c in zip(chosen, counts, strict=True)])
        owner = np.repeat(chosen, counts)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        rows = starts[1:] - 1 if number % 5 != 2 else np.zeros(0)  # chunks of which no logits are wanted
        slots = (tables[owner, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32)
        for i, c in zip(chosen, counts, strict=True):
            done[i] += c
        lengths = np.array([done[i] for i in chosen], np.int32)
        made.append(Batch(texts[owner, positions].astype(np.int64), positions.astype(np.int64), slots, tables[list(chosen)], starts, lengths, rows.astype(np.int64)))
        if all(d == 180 for d in done):
            break
    return made


def compare_logits(plan: Path, dtype: str, count: int = 24) -> str:
    """Steps on both, logits and caches. Returns what is wrong, "" if nothing."""
    cpu, gpu = PlanModel(rewrite.Plan(plan), 6 << 20), PlanModel(rewrite.Plan(plan, device="cuda"), 6 << 20)
    worst = 0.0
    for number, batch in enumerate(batches(min(cpu.blocks, gpu.blocks), count)):
        want = cpu.step(batch)
        with gpu.device.stream:  # whose work logits are the result of
            got = gpu.step(batch).get()
        if got.shape != want.shape:
            return f"step {number}: logits of shape {got.shape}, expected {want.shape}"
        if len(want):
            worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        if not worst <= TOLERANCE[dtype]:
            return f"step {number} ({len(batch.tokens)} tokens of {len(batch.context_lengths)}): logits differ by {worst:.1e} of the largest"
    for name, cache in cpu.caches[0].items():
        seen, kept = cache.astype(np.float32), gpu.caches[0][name].get().astype(np.float32)
        off = float(np.abs(seen - kept).max() / np.abs(seen).max())
        if not off <= TOLERANCE[dtype]:
            return f"{name} differs by {off:.1e} of the largest"
    return ""


def is_tie(cpu: PlanModel, text: list[int], token: int, other: int, dtype: str) -> bool:
    """Whether two tokens after a text are as likely as makes no difference."""
    count = len(text)
    table = np.arange(-(-count // BLOCK), dtype=np.int32)[None]
    batch = Batch(np.array(text), np.arange(count), np.arange(count, dtype=np.int32), table, np.array([0, count], np.int32), np.array([count], np.int32), np.array([count - 1]))
    logits = np.asarray(cpu.step(batch))[0]
    return bool(abs(logits[token] - logits[other]) <= 2 * TOLERANCE[dtype] * np.abs(logits).max())


def differing(cpu: PlanModel, expected: list[list[int]], got: list[list[int]], dtype: str) -> tuple[int, str]:
    """How many texts differ, and the first that differs where there is no tie."""
    apart = 0
    for prompt, want, have in zip(prompts(), expected, got, strict=True):
        if len(want) != len(have):
            return apart, f"prompt of {len(prompt)}: {len(have)} tokens, expected {len(want)}"
        place = next((i for i, (a, b) in enumerate(zip(want, have, strict=True)) if a != b), None)
        if place is None:
            continue
        apart += 1
        if not is_tie(cpu, prompt + want[:place], want[place], have[place], dtype):
            return apart, f"prompt of {len(prompt)}, token {place}: {have[place]}, expected {want[place]}"
    return apart, ""


VARIANTS = {
    "as it is": {}, "one step at a time": {"lookahead": 1}, "16 steps": {"lookahead": 16}, "chunks": {"token_budget": 48}, "three seats": {"seats": 3},
    "preemption": {"kv_memory": 18}, "preemption, one step": {"kv_memory": 18, "lookahead": 1}, "no reuse": {"reuse": False},
}  # fmt: skip


def compare_texts(plan: Path, dtype: str) -> list[str]:
    """Greedy texts in every way of scheduling, beside the CPU's: a line each, that ends with ok or with what is wrong."""
    lines = []
    cpu = rewrite.Generator(rewrite.Plan(plan), kv_memory=24 << 20)
    expected = [g.tokens for g in cpu.generate(prompts(), max_new_tokens=NEW, ignore_eos=True)]
    loaded = rewrite.Plan(plan, device="cuda")
    for name, options in VARIANTS.items():
        block = cpu.model.block_bytes
        memory = options.get("kv_memory", 200) * block
        generator = rewrite.Generator(loaded, **{**options, "kv_memory": memory})
        got = [g.tokens for g in generator.generate(prompts(), max_new_tokens=NEW, ignore_eos=True)]
        apart, wrong = differing(cpu.model, expected, got, dtype)
        generator.scheduler.pool.check()
        wrong = wrong or ("blocks leak" if generator.scheduler.pool.used else "")
        if "preemption" in name and not generator.stats()["preempted"]:
            wrong = wrong or "nothing was preempted"
        if name == "as it is":  # once more: found in the cache
            again = [g.tokens for g in generator.generate(prompts(), max_new_tokens=NEW, ignore_eos=True)]
            wrong = wrong or differing(cpu.model, expected, again, dtype)[1] or ("" if generator.stats()["reused_tokens"] else "nothing was found again")
        lines.append(f"{name}: {apart} of {len(got)} texts differ at ties; {len(generator.model.device.buckets)} frames: {wrong or 'ok'}")
    return lines


def allocations(plan: Path) -> int:
    """Allocations from the device while texts are generated a second time."""
    import cupy

    class Count(cupy.cuda.MemoryHook):
        name, count = "count", 0

        def alloc_preprocess(self, **_):
            self.count += 1

    generator = rewrite.Generator(rewrite.Plan(plan, device="cuda"), kv_memory=24 << 20, reuse=False)
    generator.generate(prompts(), max_new_tokens=NEW, ignore_eos=True)
    with Count() as hook:
        generator.generate(prompts(), max_new_tokens=NEW, ignore_eos=True)
    return hook.count


def enqueue_us(plan: Path) -> float:
    """Microseconds of the host to enqueue one more step of `decode`."""
    generator = rewrite.Generator(rewrite.Plan(plan, device="cuda"), kv_memory=24 << 20)
    generator.generate(prompts(), max_new_tokens=NEW, ignore_eos=True)
    device = generator.model.device
    frame = next(b.frame for (_, decoding), b in device.buckets.items() if decoding)
    times = []
    with device.stream:
        for _ in range(50):
            started = time.perf_counter()
            frame.replay()
            times.append(time.perf_counter() - started)
            device.stream.synchronize()
    return 1e6 * float(np.median(times))


if __name__ == "__main__":
    for name, dtype in CASES:
        make_plan(name, dtype, Path(sys.argv[1], f"{name}-{dtype}"))
