"""Every attention, MLP and norm of the architectures in docs/coverage.md is fused; each is exported anew, which is slow."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from architectures import ARCHITECTURES

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("coverage_benchmark", ROOT / "benchmarks" / "coverage.py")  # `coverage` is a package that measures lines
coverage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(coverage)

ALWAYS = ("BLOOM", "DeBERTa-v2", "Nemotron", "CLIP text")  # what no other test has: folded biases, relative positions, their activations


@pytest.mark.parametrize("architecture", [pytest.param(a, id=a.name, marks=() if a.name in ALWAYS else pytest.mark.slow) for a in ARCHITECTURES])
def test_everything_is_fused(architecture, tmp_path):
    row = coverage.measure(architecture, tmp_path, "dynamo", 20, "eager")
    for kind in ("attention", "mlp", "norm"):
        total, fused = row[kind]
        assert total > 0
        assert fused == total, (kind, row[kind], row["left"])
    assert row["rejected"] == []
    errors = [row["error_original"], row["error_torch"], row["error_kernels"]]
    if architecture.name == "Falcon (ALiBi)":  # its slopes: ONNX Runtime has no bfloat16 kernels on the CPU
        assert errors.pop() is None
    assert max(errors) < 1e-4


def test_the_page_has_every_architecture():
    """If this fails: `python benchmarks/coverage.py`."""
    page = (ROOT / "docs" / "coverage.md").read_text()
    names = re.findall(r"^\| ([^|]+?) \| \d", page, re.MULTILINE)
    assert names == [a.name for a in ARCHITECTURES]
    assert len(names) >= 20


def test_a_miss_is_counted_and_told():
    row = {"name": "M", "attention": [2, 1], "mlp": [2, 2], "norm": [0, 0], "rotary": 0, "mask": [2, 2], "nodes": [9, 5], "error_original": 0.0, "error_kernels": 1e-7, "error_torch": None,
           "left": [{"kind": "attention", "rule": "attention", "reason": "'p' is 2"}], "torch_reason": "differs"}  # fmt: skip
    assert coverage.line(row) == "| M | **1/2** | 2/2 | – | – | 2/2 | 9 → 5 | 0e+00 | 1e-07 | – |"
    assert list(coverage.reasons(row)) == ["attention: … is 2 (rule `attention`)", "PyTorch: differs"]
