"""What of many architectures is fused, and why the rest is not: `docs/coverage.md`.

    python benchmarks/coverage.py [NAME...] [--exporter torchscript --opset 18] [--attention sdpa]

Exports are kept in --cache, so that only the first run is slow. With names, or another exporter, the table is printed
and nothing is written.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import record
import torch
from architectures import ARCHITECTURES, Architecture

import rewrite
from rewrite.errors import CheckFailed, RewriteError
from rewrite.explain import unfused
from rewrite.export.compare import compare_with_torch
from rewrite.export.source import Source
from rewrite.export.torch_export import export
from rewrite.runtime.build import check_plan

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
NORMS = {"LayerNormalization", "RMSNormalization", "rewrite::RMSNormalization", "SimplifiedLayerNormalization"}
QUOTED = re.compile(r"'[^']*'")


def count_norms(source: Source) -> int:
    """How often a normalization module is called whose result reaches the output."""
    calls: list[torch.Tensor] = []
    kinds = [m for m in source.module.modules() if re.search(r"(Layer|RMS|Rms)_?Norm", type(m).__name__) and not list(m.children())]
    hooks = [m.register_forward_hook(lambda _module, _inputs, output: calls.append(output)) for m in kinds]
    result = source.module(**source.inputs)
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(result.sum(), calls, allow_unused=True)
    return sum(g is not None for g in gradients)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def nodes_of(proto: onnx.ModelProto, plugin: str) -> Iterator[onnx.NodeProto]:
    return (n for n in proto.graph.node if n.domain == "rewrite" and n.op_type.split("_", 1)[0] == plugin)


def count_mlps(proto: onnx.ModelProto, activation: str, gated: bool) -> int:
    """Products with this activation in their epilogue."""
    nodes = nodes_of(proto, "GatedMatMulAct" if gated else "MatMulAct")
    default = b"swish" if gated else b"none"
    return sum(attribute(n, "activation", default).decode() == activation for n in nodes)


def count_masks(proto: onnx.ModelProto) -> tuple[int, int]:
    """Attentions with a mask, and those whose mask is known by what it is."""
    known = {o for n in nodes_of(proto, "AttentionMask") for o in n.output}
    masks = [n.input[3] for n in nodes_of(proto, "FusedAttention") if len(n.input) > 3 and n.input[3]]
    return len(masks), sum(m in known for m in masks)


def measure(architecture: Architecture, folder: Path, exporter: str, opset: int, attention: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"name": architecture.name}
    source = architecture.source(attention)
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', architecture.name.lower())}-{exporter}{opset}-{attention}.onnx"
    if not path.exists():
        export(source, path, opset=opset, exporter=exporter)
    started = time.perf_counter()
    result = rewrite.optimize(path, rules=[], explain=True)
    proto, report = result.model.proto, result.report
    masks, known = count_masks(proto)
    left = unfused(proto, report)
    norms = count_norms(source)
    row |= {
        "seconds": round(time.perf_counter() - started, 1),
        "nodes": [sum(report.operators_before.values()), sum(report.operators_after.values())],
        "attention": [architecture.attentions, report.plugins.get("FusedAttention", 0)],
        "mlp": [architecture.mlps, count_mlps(proto, architecture.activation, architecture.gated)],
        "norm": [norms, min(norms, sum(report.operators_after.get(n, 0) for n in NORMS))],
        "rotary": report.plugins.get("Rotary", 0),
        "mask": [masks, known],
        "error_original": report.model_error,
        "rejected": [str(m)[:300] for m in report.rejected],
        "left": [{"kind": u.kind, "node": u.node, "rule": u.rule, "reason": u.reason} for u in left],
        "masks_kept": sorted({m.reason for m in report.near_misses if m.rule == "attention_mask"}),
        "operators": dict(sorted(report.operators_after.items())),
    }
    with tempfile.TemporaryDirectory() as plan:
        try:
            row["error_kernels"] = check_plan(rewrite.build(result.model, Path(plan) / "plan", engines=False, verify=False), result.model, 1e-3)
        except RewriteError as error:
            row["error_kernels"], row["kernels_reason"] = None, str(error)
    try:
        row["error_torch"] = compare_with_torch(source, result.model)[0]
    except CheckFailed as error:
        row["error_torch"], row["torch_reason"] = None, str(error)
    return row


# --- the page -----------------------------------------------------------------------------------------------------
def pair(found: list[int]) -> str:
    total, fused = found
    return "–" if not total else f"{fused}/{total}" if fused == total else f"**{fused}/{total}**"


def number(error: float | None) -> str:
    return "–" if error is None else f"{error:.0e}"


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['name']} | not exported: {row['failed']} | | | | | | | | |"
    cells = [row["name"], *(pair(row[k]) for k in ("attention", "mlp", "norm")), str(row["rotary"] or "–"), pair(row["mask"])]
    cells += [f"{row['nodes'][0]} → {row['nodes'][1]}", *(number(row[f"error_{k}"]) for k in ("original", "kernels", "torch"))]
    return f"| {' | '.join(cells)} |"


def reasons(row: dict[str, Any]) -> Iterator[str]:
    """Every miss with its reason, as `rewrite explain` tells it; equal reasons once, with their count."""
    texts: dict[str, int] = {}
    for miss in row.get("left", ()):
        rule = f" (rule `{miss['rule']}`)" if miss["rule"] else ""
        text = f"{miss['kind']}: {QUOTED.sub('…', miss['reason'])}{rule}"
        texts[text] = texts.get(text, 0) + 1
    for reason in row.get("masks_kept", ()):
        text = f"mask: {QUOTED.sub('…', reason)}"
        texts[text] = texts.get(text, 0) + 1
    for text, count in texts.items():
        yield f"{text}{f' ({count} ×)' if count > 1 else ''}"
    for what, key in (("kernels on the CPU", "kernels_reason"), ("PyTorch", "torch_reason")):
        if row.get(key):
            yield f"{what}: {row[key]}"


def page(rows: list[dict[str, Any]], exporter: str, opset: int, attention: str) -> str:
    found = record.versions("torch", "transformers", "onnx", "onnxruntime")
    text = [
        "# Coverage",
        "",
        "Generated by `python benchmarks/coverage.py`; do not edit.",
        "",
        f"Models of {len(rows)} architectures with two layers and random, amplified weights, exported by the {exporter} exporter at opset {opset} "
        f"({attention} attention; {', '.join(f'{n} {v}' for n, v in found.items() if n != 'python')}), then optimized with all built-in rules.",
        "",
        "Attentions and MLPs are counted from the configuration, norms from the calls of the PyTorch modules; a norm counts as fused if it is one operator. "
        "A mask counts as known if the attention reads an AttentionMask, which says what it is (causal, padding, window) instead of holding its elements. "
        "Errors are the largest difference of the outputs relative to their largest value: of the rewritten model to the original in ONNX Runtime (which inlines "
        "the functions, so that only lifting shows), of a plan in which the plugins' NumPy kernels compute the fused nodes to that, and of the rewritten model to "
        "PyTorch at three sizes with no, right and left padding.",
        "",
        "| model | attention | MLP | norm | rotary | masks known | nodes | to original | by kernels | to PyTorch |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(line, rows),
    ]  # fmt: skip
    missed = [(row["name"], list(reasons(row))) for row in rows]
    if any(r for _, r in missed):
        text += ["", "## What is left, and why", "", "As `rewrite explain` tells it, names of values left out.", ""]
        for name, found_reasons in missed:
            text += [f"- **{name}**", *(f"  - {r}" for r in found_reasons)] if found_reasons else []
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all if none is given")
    parser.add_argument("--exporter", default="dynamo", choices=("dynamo", "torchscript"))
    parser.add_argument("--opset", type=int, default=20)
    parser.add_argument("--attention", default="eager", choices=("eager", "sdpa"))
    parser.add_argument("--cache", type=Path, default=Path("/tmp/exports-cover"))
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    chosen = [a for a in ARCHITECTURES if not options.names or a.name in options.names]
    rows = []
    for architecture in chosen:
        try:
            row = measure(architecture, options.cache, options.exporter, options.opset, options.attention)
        except (RewriteError, ImportError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
            row = {"name": architecture.name, "failed": str(error).splitlines()[0][:300]}
        rows.append(row)
        print(line(row), flush=True)
        for reason in reasons(row) if options.names else ():
            print(f"    {reason}")
    if options.names or (options.exporter, options.opset, options.attention) != ("dynamo", 20, "eager"):
        return
    PAGE.write_text(page(rows, options.exporter, options.opset, options.attention))
    packages = record.versions("onnx", "onnxruntime", "torch", "transformers")
    path = record.write("coverage", record.cpu(), packages, {"exporter": options.exporter, "opset": options.opset, "attention": options.attention, "models": rows})
    print(f"written to {PAGE} and {path}")


if __name__ == "__main__":
    main()
