"""What each rule finds of each exporter's spellings: no cell of docs/forms.md got worse. Exporting is slow, so CI computes a part anew.

If a cell got better, or the page is out of date: `python benchmarks/forms.py --record`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import pytest

import rewrite

pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import forms  # noqa: E402  (needs torch)

RECORDED = json.loads((ROOT / "benchmarks" / "results" / "forms.json").read_text())["results"]
RANK = {"not exported": 0, "does not run": 1, "partly": 2, "fused": 3, "native": 3}

# The dynamo exporter takes about a second for each; TorchScript takes none.
DYNAMO = {
    "dyn18": ["mlp_gelu_new", "phi3_mlp", "gemma_norm", "torch_rms_norm", "rope_partial", "rope_pairs", "rope_gptj", "gemma2", "sdpa", "sdpa_gqa", "bmm", "mha_masked", "decoder_layer", "einsum"],
    "dyn20": ["geglu", "encoder_layer_norm_first", "sdpa_causal_padding"],
    "dyn23": ["hand_layer_norm_pow", "normed", "sdpa_float", "encoder_layer", "cached"],
}
NARROW = {"ts17": ["gelu_python", "phi3_mlp_swapped", "t5_norm", "rope_halves", "eager", "masked_fill", "padding"], "dyn18": ["hand_layer_norm"], "dyn23": ["llama_norm"]}
CASES = [("float32", "ts17", n) for n in forms.BLOCKS if RECORDED["float32"][n]["ts17"]["state"] != "not exported"]
CASES += [("float32", c, n) for c, names in DYNAMO.items() for n in names] + [("float16", c, n) for c, names in NARROW.items() for n in names if n in RECORDED["float16"]]


def worse(found, recorded):
    """In what a cell got worse, "" if in nothing: its state, or rules that are no longer applied though it needs them still."""
    if RANK[found["state"]] < RANK[recorded["state"]]:
        return f"{recorded['state']} became {found['state']}: {found['reason']}"
    lost = sorted(set(recorded.get("rules", {})) - set(found.get("rules", {})))
    return f"no longer applied: {', '.join(lost)}" if lost and RANK[found["state"]] == RANK["partly"] else ""


@pytest.mark.parametrize(("dtype", "column", "name"), CASES, ids=["-".join(case) for case in CASES])
def test_a_cell_is_as_good_as_recorded(dtype, column, name):
    ((_, model),) = forms.exports(name, (column,), dtype)
    assert worse(forms.cell(name, model), RECORDED[dtype][name][column]) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [(t, n) for t in forms.TYPES for n in RECORDED[t]])
def test_a_row_is_as_good_as_recorded(dtype, name):
    found = forms.measure(name, dtype=dtype)
    assert {c: worse(cell, RECORDED[dtype][name][c]) for c, cell in found.items()} == dict.fromkeys(forms.COLUMNS, "")


def test_a_cell_that_gets_worse_is_told(monkeypatch):
    """Without the rule, the cell falls from fused to partly, and the reason is there."""
    ((_, model),) = forms.exports("swiglu", ("ts17",))
    recorded = RECORDED["float32"]["swiglu"]["ts17"]
    assert recorded["rules"] == {"swish_sigmoid": 1, "gated_linear": 1, "linear": 1}
    optimize = rewrite.optimize
    monkeypatch.setattr(rewrite, "optimize", lambda m, **options: optimize(m, only=["swish_sigmoid", "linear"], **options))
    found = forms.cell("swiglu", model)
    assert found["state"] == "partly"
    assert worse(found, recorded).startswith("fused became partly: ")
    assert worse({"state": "not exported", "reason": "the exporter fails: x"}, recorded) == "fused became not exported: the exporter fails: x"
    assert worse({"state": "native", "rules": {}}, recorded) == ""
    assert worse({"state": "partly", "rules": {"linear": 1}}, {"state": "partly", "rules": {"attention": 1, "linear": 1}}) == "no longer applied: attention"


def test_what_is_fused_is_a_whole_model_and_can_be_undone():
    for name in ("swiglu", "gemma2", "padding"):
        ((_, model),) = forms.exports(name, ("ts17",))
        result = rewrite.optimize(model)
        assert result.report.verified
        onnx.checker.check_model(result.model.proto, full_check=True)
        assert forms.inventory(result.model.proto) == forms.BLOCKS[name].goal
        assert not [n for n in rewrite.unfuse(result.model.proto).graph.node if n.domain == "rewrite"]


def test_the_page_is_made_of_the_recorded_figures():
    """If this fails: `python benchmarks/forms.py --record`. The versions stand as they were recorded."""
    page = (ROOT / "docs" / "forms.md").read_text()
    assert list(RECORDED["float32"]) == list(forms.BLOCKS)
    assert set(RECORDED["float16"]) <= set(forms.BLOCKS)
    generated = forms.page(RECORDED)
    strip = "Each line is a small PyTorch function"
    assert [line for line in page.splitlines() if not line.startswith(strip)] == [line for line in generated.splitlines() if not line.startswith(strip)]


def test_every_rule_is_needed_by_some_form():
    applied = {r for rows in RECORDED.values() for row in rows.values() for cell in row.values() for r in cell.get("rules", {})}
    assert {r.name for r in forms.library([]).rules if r.tier != "transform"} - applied == set()
