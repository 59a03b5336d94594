"""The part of docs/benchmarks.md on text generation, from what `decode.py` and `serving.py` measured; without results there is none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MODELS = {"1b": "Llama-3.2-1B's shape", "8b": "Llama-3.1-8B's shape"}
COMPILE = "torch.compile"


def fastest(rows: Iterable[dict[str, Any]], who: str) -> dict[str, Any] | None:
    """Of the rows of a peer, whatever its variant."""
    return min((r for r in rows if r["who"].startswith(who) and "ms" in r), key=lambda r: float(r["ms"]), default=None)


def against(rows: list[dict[str, Any]]) -> str:
    """How many times as fast ours is as the fastest torch.compile."""
    mine, peer = fastest(rows, "ours"), fastest(rows, COMPILE)
    return f"{peer['ms'] / mine['ms']:.2f}" if mine and peer else ""


def decode(data: dict[str, Any]) -> list[str]:
    """Tables of one model."""
    rows = [r for r in data["rows"] if "error" not in r]
    steps, prompts = [r for r in rows if r["what"] == "decode"], [r for r in rows if r["what"] == "prefill"]
    batches = sorted({r["batch"] for r in steps})
    lines = [f"### {MODELS.get(data['model'], data['model'])}", "", f"A device copy in the same run: {data['copy_gbs']:.0f} GB/s.", ""]
    if steps:
        lines += ["| texts | | ms a step | tokens/s | GB/s | of the copy | ours is faster by |", "| ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for batch in batches:
        of_batch = [r for r in steps if r["batch"] == batch]
        lines += [_line(str(batch), r, f"{r['gbs']:.0f} | {r['share']:.0%}", of_batch) for r in sorted(of_batch, key=lambda r: r["ms"])]
    if prompts:
        lines += ["", "| prompt | | ms | tokens/s | TFLOP/s | ours is faster by |", "| ---: | --- | ---: | ---: | ---: | ---: |"]
        for length in sorted({r["length"] for r in prompts}):
            of_length = [r for r in prompts if r["length"] == length]
            lines += [_line(str(length), r, f"{r['tflops']:.0f}", of_length) for r in sorted(of_length, key=lambda r: r["ms"])]
    found = [(b, against([r for r in steps if r["batch"] == b])) for b in batches]
    told = [f"{ratio} at {batch} text{'s' if batch > 1 else ''}" for batch, ratio in found if ratio]
    if told:
        prompt = against(prompts)
        lines += ["", f"Against the fastest torch.compile: {', '.join(told)}" + (f", {prompt} for the prompt." if prompt else ".")]
    return lines + _divergence(data.get("divergence"))


def _line(first: str, row: dict[str, Any], ceiling: str, rows: list[dict[str, Any]]) -> str:
    mine = fastest(rows, "ours")
    times = f"{row['ms'] / mine['ms']:.2f}" if mine and row["who"] != "ours" else ""
    return f"| {first} | {row['who']} | {row['ms']:.3f} | {row['tokens_per_second']:.0f} | {ceiling} | {times} |"


def _divergence(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    mine, peer = found["ours"], found["transformers"]
    return ["", f"KL from `transformers` in float32, over {found['tokens']} tokens, the last {found['singles']} one by one, in nats a token: ours {mine['mean']:.1e} (largest {mine['max']:.1e}), "
            f"`transformers` in bfloat16 {peer['mean']:.1e} (largest {peer['max']:.1e}); the likeliest token is the same for {mine['same_token']} and {peer['same_token']} of them."]  # fmt: skip


def serving(data: dict[str, Any]) -> list[str]:
    head = ["requests/s", "output tokens/s", "first token p50", "p90", "p99", "between tokens mean", "p50", "p99", "whole p50", "p99"]
    lines = [f"| arrivals | | {' | '.join(head)} |", f"| --- | --- | {' | '.join('---:' for _ in head)} |"]
    for r in data["rows"]:
        first, between, whole = r["first_token"], r["between_tokens"], r["end_to_end"]
        wanted = [(first, "p50", 0), (first, "p90", 0), (first, "p99", 0), (between, "mean", 2), (between, "p50", 2), (between, "p99", 1), (whole, "p50", 0), (whole, "p99", 0)]
        cells = [f"{r['requests_per_second']:.1f}", f"{r['output_tokens_per_second']:.0f}", *(f"{found[k]:.{digits}f}" if k in found else "" for found, k, digits in wanted)]
        when = "all at once" if r["rate"] is None else f"{r['rate']:.1f}/s"
        lines.append(f"| {when} | {r['who']} | {' | '.join(cells)} |")
    return lines


def section(decoded: list[tuple[str, dict[str, Any]]], served: tuple[str, dict[str, Any]] | None) -> list[str]:
    """Lines of markdown: `decoded` and `served` are a line about the source and the results; an empty list if there is neither."""
    lines: list[str] = []
    if decoded:
        lines += ["## Text generation", "", "Random weights, bfloat16. Texts of 992 tokens and 64 more, so that 1,024 positions are seen on average; medians of runs, on the clock.",
                  "torch.compile (max-autotune) runs a step, argmax included, as one CUDA graph, with a static cache of just that length: *sdpa* as the",
                  "documentation of `transformers` has it, *grouped* by products in which the heads of a group share their keys, *flex* by flex_attention, as gpt-fast;",
                  "a prompt without a mask, so that the fastest attention kernel runs. `transformers`: `generate` with its static cache, which it compiles itself,",
                  "and continuous batching as `generate_batch` sets it up; flash-attn is not installed. Ours is `Generator`: scheduler, sampler and stop check are in its figures.",
                  "GB/s counts what must be read: each weight once, keys and values of 1,024 positions.", ""]  # fmt: skip
        for source, data in decoded:
            lines += [*decode(data), "", source, ""]
    if served is not None:
        source, data = served
        lines += ["## Serving", "",
                  f"{MODELS.get(data['model'], data['model'])}, random weights, bfloat16: prompts of 32 to 1,024 tokens, outputs of 16 to 256, Poisson arrivals, the same",
                  f"for both. Latencies in milliseconds from the arrival. Ours: at most {data['seats']} texts in flight, {data['token_budget']} tokens a step.",
                  "", *serving(data), "", source, ""]  # fmt: skip
    return lines
