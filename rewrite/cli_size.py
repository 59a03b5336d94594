"""The command `rewrite plan-size`."""

from __future__ import annotations

import json
import os
from typing import Any

import click


@click.command(name="plan-size", short_help="Predict memory and time of a model on GPUs.")
@click.argument("model")
@click.option("--gpus", default="1xH100", show_default=True, metavar="NxNAME", help="4xH100, 16xH200, 8xA100, L40S, B200.")
@click.option("--tensor-parallel", type=click.IntRange(1, 4096), metavar="N", help="Ranks of a stage; by default as many GPUs as a host has, or fewer.")
@click.option("--pipeline-parallel", type=click.IntRange(1, 4096), metavar="M", help="Stages; by default what --gpus leaves.")
@click.option("--gpus-per-host", default=8, show_default=True)
@click.option("--batch", default=1, show_default=True, help="Texts in flight.")
@click.option("--context", type=int, show_default="4096, or as many as the model takes", help="Tokens of each text, the new ones included.")
@click.option("--tokens", default=1, show_default=True, help="New tokens of each text in the step: 1 generates, more read prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def plan_size(model: str, gpus: str, tensor_parallel: int | None, pipeline_parallel: int | None, gpus_per_host: int, batch: int, context: int | None, tokens: int, as_json: bool) -> None:
    """Predict what one step of MODEL takes on GPUs: memory of each rank, bytes, sums between ranks, time.

    MODEL is an ONNX file, rewritten or not, whose weights need not be there (`rewrite export --no-weights`), or a plan. Nothing is computed.
    """
    from rewrite import sandbox
    from rewrite.runtime.devices import parse_gpus
    from rewrite.runtime.plan_size import plan_size as run

    device, count = parse_gpus(gpus)
    if not os.path.isdir(model):
        sandbox.start()
    found = run(model, device, count, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, batch=batch, context=context, tokens=tokens, host=gpus_per_host)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    print_size(found)


def print_size(found: dict[str, Any]) -> None:
    """The prediction for people."""
    from rewrite.cli import table

    device, world, stages = found["device"], found["tensor_parallel"], found["stages"]
    split = f"{world} ranks a stage, {len(stages)} stages" if len(stages) > 1 else f"{world} ranks" if world > 1 else "one rank"
    texts = f"{found['batch']} x {found['context']} tokens, {found['new_tokens']} new"
    click.echo(f"{found['model']} on {found['gpus']} x {device['name']}, {split}; {texts}")
    if found["note"]:
        click.echo(found["note"])
    rows = []
    for s in stages:
        memory, read, told = s["memory"], s["read"], s["collectives"]
        ranks = "-".join(map(str, dict.fromkeys(s["ranks"])))
        sent = f" + sends {s['sent_bytes'] / 1e3:.1f} KB, {s['send_us']:.0f} µs" if s["send_us"] else ""
        rows.append([
            ranks, f"{memory['weights'] / 1e9:.2f}", f"{memory['kv'] / 1e9:.2f}", f"{memory['activations'] / 1e9:.2f}", f"{memory['total'] / 1e9:.2f}",
            f"{sum(read.values()) / 1e9:.2f}", f"{s['operations'] / 1e12:.3f}", f"{told['count']}: {told['bytes'] / 1e6:.2f} MB, {told['us'] / 1e3:.2f} ms{sent}", f"{s['us'] / 1e3:.2f}",
        ])  # fmt: skip
    table("each rank", ["ranks", "weights GB", "KV GB", "other GB", "all GB", "moved GB", "TFLOP", "between ranks", "step ms"], rows)
    most = max(s["memory"]["total"] for s in stages)
    click.echo(f"\nmemory: {most / 1e9:.1f} of {device['memory'] / 1e9:.0f} GB{'' if found['fits'] else ': DOES NOT FIT'}, without what CUDA itself takes")
    moved = sum(sum(s["read"].values()) * world for s in stages) / found["new_tokens"]
    shares = f"{100 * found['share_of_bandwidth']:.0f} % of {device['gb_per_s']:.0f} GB/s, {100 * found['share_of_rate']:.0f} % of {device['tflops_16bit']:.0f} TFLOP/s"
    click.echo(f"step: {found['step_us'] / 1e3:.2f} ms, {found['tokens_per_second']:.1f} tokens/s | {shares}; {moved / 1e9:.2f} GB a token on all ranks")
    click.echo(f"{device['name']}: {device['gb_per_s']:.0f} GB/s, {device['tflops_16bit']:.0f} TFLOP/s in 16 bits ({device['source']})")
