"""Which spellings of a fusion the rules find, by exporter, opset and type: `docs/forms.md`.

    python benchmarks/forms.py [NAME...] [--columns dyn18,ts17] [--types float32] [--record]

Small PyTorch functions (`tests/blocks.py`, `tests/attention_blocks.py`) are exported with the installed exporters and
optimized with all built-in rules. The cells are printed with their reasons; `--record` writes page and figures.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import record
import torch
from torch import nn

import rewrite
from rewrite.errors import RewriteError
from rewrite.explain import unfused
from rewrite.export.source import first_line, quiet
from rewrite.registry import library
from rewrite.report import Report

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
import attention_blocks  # noqa: E402
import blocks  # noqa: E402

PAGE = ROOT / "docs" / "forms.md"
GROUPS: dict[str, dict[str, blocks.Block]] = {**blocks.BLOCKS, **attention_blocks.BLOCKS}
BLOCKS = {name: block for group in GROUPS.values() for name, block in group.items()}
COLUMNS = ("dyn18", "dyn20", "dyn23", "dyn24", "ts17", "ts18")
TYPES = ("float32", "float16")
# TorchScript bakes B * H into nn.MultiheadAttention.
FIXED_SIZES = {"mha", "mha_weights", "mha_cross", "mha_masked", "mha_batch_second"}
MOVES = {"Reshape", "Transpose", "Gather", "Concat", "Shape", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Tile", "Cast", "Constant"}
GOOD = ("fused", "native")
QUOTED = re.compile(r"'[^']*'")


# --- export -------------------------------------------------------------------------------------------------------
def module_of(name: str, dtype: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The block's module, its vectors moved away from 0 and 1, and its example inputs."""
    torch.manual_seed(0)
    module, inputs = BLOCKS[name].make()
    module = module.eval()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1.0)  # biases of nn.MultiheadAttention start at zero
    kind = getattr(torch, dtype)
    return module.to(kind), tuple(x.to(kind) if x.is_floating_point() else x for x in inputs)


def exports(name: str, columns: tuple[str, ...], dtype: str = "float32") -> Iterator[tuple[str, onnx.ModelProto | str]]:
    """Each column ("dyn18": dynamo, opset 18; "ts17": TorchScript) with the exported model, or why there is none."""
    module, inputs = module_of(name, dtype)
    programs: list[Any] = []
    for column in columns:
        with_exporter = _with_torchscript if column.startswith("ts") else _with_dynamo
        try:
            with quiet():
                made: onnx.ModelProto | str = with_exporter(name, module, inputs, int(column.lstrip("dynts")), programs)
        except Exception as error:
            made = f"the exporter fails: {first_line(error)}"
        yield column, made


def _with_torchscript(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], opset: int, _: list[Any]) -> onnx.ModelProto:
    stream, names = io.BytesIO(), _names(inputs)
    dynamic = {} if name in FIXED_SIZES else {n: axes(x) for n, x in zip(names, inputs, strict=True)}
    torch.onnx.export(module, inputs, stream, opset_version=opset, dynamo=False, input_names=names, dynamic_axes=dynamic)
    return onnx.load_model_from_string(stream.getvalue())


def _with_dynamo(name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], opset: int, programs: list[Any]) -> onnx.ModelProto:
    """`programs` keeps what is the same at every opset."""
    if not programs:
        automatic = tuple(dict.fromkeys(axes(x), torch.export.Dim.AUTO) for x in inputs)
        programs.append(torch.export.export(module, inputs, dynamic_shapes=_nested(module, automatic), strict=False))
    named = _nested(module, tuple(axes(x) for x in inputs))
    made = torch.onnx.export(copy.deepcopy(programs[0]), dynamo=True, opset_version=opset, input_names=_names(inputs), dynamic_shapes=named, verbose=False)
    assert made is not None
    return made.model_proto


def _names(inputs: tuple[torch.Tensor, ...]) -> list[str]:
    return [f"in{i}" for i in range(len(inputs))]


def _nested(module: nn.Module, shapes: tuple[Any, ...]) -> Any:
    """As the parameters of `forward` take them: `Call` has variadic ones only, attentions have them after the first."""
    if isinstance(module, blocks.Call):
        return (shapes,)
    return (shapes[0], shapes[1:]) if isinstance(module, attention_blocks.SelfAttention) and len(shapes) > 1 else shapes


def axes(x: torch.Tensor) -> dict[int, str]:
    """Names of the dynamic dimensions of an input: batch and positions, wherever their sizes stand."""
    sizes = {blocks.B: "batch", blocks.S: "seq", blocks.S + 3: "memory", attention_blocks.P: "past"}
    return {i: sizes[n] for i, n in enumerate(x.shape) if n in sizes and (i == 0 or n != blocks.B)}


# --- a cell -------------------------------------------------------------------------------------------------------
def inventory(model: onnx.ModelProto) -> dict[str, int]:
    """Operators that compute something, and the activations and layouts that plugin nodes name in their attributes.

    An attention that is causal by its attribute knows its mask, too.
    """
    found: dict[str, int] = {}
    for node in model.graph.node:
        names = [node.op_type.split("_")[0]] + [a.s.decode() for a in node.attribute if a.name in ("activation", "merged")]
        names += ["AttentionMask" for a in node.attribute if node.op_type.startswith("FusedAttention") and a.name == "causal" and a.i]
        for name in names:
            if name not in MOVES:
                found[name] = found.get(name, 0) + 1
    return found


def cell(name: str, model: onnx.ModelProto | str) -> dict[str, Any]:
    """What became of an export: `state`, the rules applied, and the reason if it is not what it should be.

    States: "native" (as exported already), "fused" (by the rules), "partly", "does not run" (in ONNX Runtime), "not exported".
    """
    if isinstance(model, str):
        return {"state": "not exported", "reason": model}
    try:
        result = rewrite.optimize(model, rules=[], explain=True)
    except RewriteError as error:
        return {"state": "does not run", "reason": str(error).split("; give inputs")[0]}
    proto, report = result.model.proto, result.report
    rules = {n: s.applied for n, s in report.rules.items() if s.applied}
    found, goal = inventory(proto), BLOCKS[name].goal
    if found == goal:
        return {"state": "fused" if rules else "native", "rules": rules}
    return {"state": "partly", "rules": rules, "reason": reason(proto, report, goal, found)}


def reason(proto: onnx.ModelProto, report: Report, goal: dict[str, int], found: dict[str, int]) -> str:
    """Why the goal was not reached, as `explain` tells it."""
    told = [f"{m.rule}: rejected, {m.reason}" for m in report.rejected]
    told += [f"{u.rule or u.kind}: {u.reason}" for u in unfused(proto, report)]
    if goal.get("AttentionMask", 0) > found.get("AttentionMask", 0):
        told += [m.reason for m in report.near_misses if m.rule == "attention_mask"]
    left = {n: c - goal.get(n, 0) for n, c in found.items() if c > goal.get(n, 0)}
    return told[0] if told else f"left beside what was fused: {', '.join(f'{c} {n}' for n, c in left.items())}"


def measure(name: str, columns: tuple[str, ...] = COLUMNS, dtype: str = "float32") -> dict[str, dict[str, Any]]:
    """One row of the matrix: its cells by column."""
    return {column: cell(name, model) for column, model in exports(name, columns, dtype)}


# --- the page -----------------------------------------------------------------------------------------------------
Rows = dict[str, dict[str, dict[str, Any]]]  # function -> column -> cell


class Notes:
    """Numbers for reasons, equal ones once; names of values are left out."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        text = QUOTED.sub("…", text)
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def shown(cells: list[dict[str, Any]], notes: Notes) -> str:
    """A cell of the page: one word if all types have the same."""
    words = [c["state"] if c["state"] in GOOD else f"**{c['state']}** [{notes.number(c['reason'])}]" for c in cells]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def page(results: dict[str, Rows]) -> str:
    found = record.versions("torch", "onnx", "onnxruntime")
    notes, columns = Notes(), list(COLUMNS)
    text = [
        "# Forms",
        "",
        "Generated by `python benchmarks/forms.py --record`; do not edit. `tests/test_forms.py` computes a part of it anew and fails where a cell got worse.",
        "",
        f"Each line is a small PyTorch function, exported by the dynamo exporter at opset 18, 20, 23 and 24 (dyn18, ...) and by the TorchScript exporter (ts17, ts18) with "
        f"dynamic batch and positions ({', '.join(f'{n} {v}' for n, v in found.items() if n != 'python')}), then optimized with all built-in rules. *fused*: the rules made of it what "
        "they should; *native*: the exporter had written that already; *partly*: something is left, the number says why; *not exported*: the exporter fails; *does not run*: "
        f"ONNX Runtime refuses the exported file. Where {TYPES[0]} and {TYPES[1]} differ, both are given, in this order.",
    ]
    for group, members in GROUPS.items():
        text += ["", f"## {group.capitalize()}", "", f"| function | what it computes | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
        for name, block in members.items():
            rows = [by_name[name] for by_name in results.values() if name in by_name]
            cells = [shown([row[c] for row in rows], notes) for c in columns]
            text.append(f"| {name} | `{block.what}` | {' | '.join(cells)} |")
    text += ["", "## Why not", "", *(f"{i}. {note}" for i, note in enumerate(notes.texts, 1))]
    text += ["", "## Rules", "", "In how many of these functions each rule was applied, in either type, and in which of them at all.", ""]
    text += [f"| rule | {' | '.join(columns)} | functions |", f"|---|{'---|' * len(columns)}---|"]
    for rule in (r for r in library([]).rules if r.tier != "transform"):
        per_column = [[n for n in BLOCKS if any(rule.name in rows[n][c].get("rules", {}) for rows in results.values() if n in rows)] for c in columns]
        functions = [n for n in BLOCKS if any(n in names for names in per_column)]
        text.append(f"| {rule.name} | {' | '.join(str(len(names) or '–') for names in per_column)} | {', '.join(functions)} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="functions; all if none is given")
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--record", action="store_true", help="write the page and the figures; those of other functions are kept")
    options = parser.parse_args()
    columns, types = tuple(options.columns.split(",")), options.types.split(",")
    results: dict[str, Rows] = {t: {} for t in types}
    for name in options.names or BLOCKS:
        for dtype in types:
            results[dtype][name] = row = measure(name, columns, dtype)
            print(f"{name:26}{dtype:9}", *(f"{c['state']:13}" for c in row.values()), flush=True)
            for text in dict.fromkeys(c["reason"] for c in row.values() if "reason" in c):
                print(f"    {text}")
    if not options.record or columns != COLUMNS or tuple(types) != TYPES:
        return
    file = record.RESULTS / "forms.json"
    if options.names:
        old = json.loads(file.read_text())["results"]
        results = {t: {n: {**old[t], **results[t]}[n] for n in BLOCKS if n in {**old[t], **results[t]}} for t in TYPES}
    PAGE.write_text(page(results))
    path = record.write("forms", record.cpu(), record.versions("torch", "onnx", "onnxruntime", "onnxscript"), results)
    print(f"written to {PAGE} and {path}")


if __name__ == "__main__":
    main()
