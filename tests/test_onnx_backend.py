"""ONNX's own operator tests as models: what ONNX Runtime computes rightly before rewriting, it does after."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest

import rewrite
from rewrite.validity import MIN_OPSET

PARTS = 8


@cache
def cases():
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [c for c in collect_testcases(None) if c.model is not None]


def run(model, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def same(want, got, relative, absolute):
    if isinstance(want, list):
        return len(want) == len(got) and all(same(w, g, relative, absolute) for w, g in zip(want, got, strict=True))
    want, got = np.asarray(want), np.asarray(got)
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    if want.dtype.kind in "OUSc":
        return bool((want == got).all())
    return bool(np.allclose(want.astype(np.float64), got.astype(np.float64), rtol=relative, atol=absolute, equal_nan=True))


@pytest.mark.parametrize("part", range(PARTS))
def test_results_stay_those_of_the_package(part):
    checked, fused = 0, 0
    for case in cases()[part::PARTS]:
        opset = next((o.version for o in case.model.opset_import if o.domain == ""), MIN_OPSET)
        if opset < MIN_OPSET:
            with pytest.raises(rewrite.RewriteError, match=f"opset {opset} is not supported"):
                rewrite.optimize(case.model)
            continue
        result = rewrite.optimize(case.model, verify=False)
        fused += bool(result.report.sites)
        for inputs, outputs in case.data_sets or []:
            feeds = {i.name: v for i, v in zip(case.model.graph.input, inputs, strict=True)}
            try:
                before = run(case.model, feeds)
            except Exception:  # ONNX Runtime lacks the operator or a type
                continue
            if same(list(outputs), before, case.rtol, max(case.atol, 1e-6)):
                after = run(result.model.proto, feeds)
                assert same(list(outputs), after, case.rtol, max(case.atol, 1e-6)), (case.name, result.report.sites)
                checked += 1
    assert checked > 150
    assert fused > 10


def test_every_case_of_the_package_is_among_them():
    assert len(cases()) >= 1884
    assert onnx.__version__ >= "1.23"
