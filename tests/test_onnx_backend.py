"""ONNX's own tests as models stay right (`onnx_cases.py`); run with `-s`, each test prints its counts."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
from onnx_cases import cases, check_cases, check_disk, on_disk

PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
def test_results_stay_those_of_the_package(part):
    counts = Counter()
    assert check_cases(cases()[part::PARTS], counts) == []
    print(f"part {part}: {dict(counts)}")
    assert counts["checked"] > 150
    assert counts["rewritten"] > 10


def test_every_case_of_the_package_is_among_them():
    print(f"{len(cases())} cases of operators, {({k: len(v) for k, v in on_disk().items()})} models on disk")
    assert len(cases()) >= 1884
    assert onnx.__version__ >= "1.23"
    assert {k: len(v) for k, v in on_disk().items()} == {"simple": 23, "pytorch-converted": 82, "pytorch-operator": 35, "light": 9}


@pytest.mark.parametrize("kind", ["simple", "pytorch-converted", "pytorch-operator", pytest.param("light", marks=pytest.mark.slow)])
def test_models_of_the_package_stay_right(kind):
    counts = Counter()
    assert check_disk(kind, counts) == []
    print(f"{kind}: {dict(counts)}")
    assert counts["checked"] >= {"simple": 17, "pytorch-converted": 79, "pytorch-operator": 35, "light": 9}[kind]
