"""ONNX's own tests as models: what ONNX Runtime computes rightly before rewriting, it does after.

The operators' cases are made in memory; light, simple and PyTorch's models lie in the package, all of opsets that are
refused (6 to 12), so ONNX's version converter brings them to opset 18 first. Run with `-s`, each test prints its counts.
"""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path

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
    print(f"part {part}: {len(cases()[part::PARTS])} cases, {checked} data sets checked, {fused} models rewritten")
    assert checked > 150
    assert fused > 10


def test_every_case_of_the_package_is_among_them():
    print(f"{len(cases())} cases of operators, {({k: len(v) for k, v in on_disk().items()})} models on disk")
    assert len(cases()) >= 1884
    assert onnx.__version__ >= "1.23"
    assert {k: len(v) for k, v in on_disk().items()} == {"simple": 23, "pytorch-converted": 82, "pytorch-operator": 35, "light": 9}


# --- on disk -----------------------------------------------------------------------------------------------------------
def on_disk():
    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    found = {kind: sorted(data.glob(f"{kind}/*/model.onnx")) for kind in ("simple", "pytorch-converted", "pytorch-operator")}
    return {**found, "light": sorted(data.glob("light/*.onnx"))}


def tensor(path):
    proto = onnx.TensorProto.FromString(path.read_bytes())
    return onnx.numpy_helper.to_array(proto)


def data_of(path, model):
    """Inputs and expected outputs: tensors beside the model, for light models what the package's runner makes; [] if they are no tensors."""
    if path.name != "model.onnx":
        from onnx.backend.test.runner import Runner

        given = [v for v in model.graph.input if v.name not in {i.name for i in model.graph.initializer}]
        inputs = [Runner.generate_dummy_data(v, seed=0, name=path.stem, random=False) for v in given]
        return [(inputs, [tensor(path.with_name(f"{path.stem}_output_0.pb"))])]
    found = []
    for folder in sorted(path.parent.glob("test_data_set_*")):
        try:
            found.append([[tensor(folder / f"{kind}_{i}.pb") for i in range(len(list(folder.glob(f"{kind}_*.pb"))))] for kind in ("input", "output")])
        except Exception:  # a sequence or an optional
            return []
    return found


@pytest.mark.parametrize("kind", ["simple", "pytorch-converted", "pytorch-operator", pytest.param("light", marks=pytest.mark.slow)])
def test_models_of_the_package_stay_right(kind):
    counts = Counter()
    for path in on_disk()[kind]:
        old = onnx.load(path)
        with pytest.raises(rewrite.RewriteError, match=r"opset \d+ is not supported"):
            rewrite.optimize(old)
        model = onnx.version_converter.convert_version(old, 18)
        result = rewrite.optimize(model, verify=False)
        counts["models"] += 1
        counts["rewritten"] += bool(result.report.sites)
        for inputs, outputs in data_of(path, old):
            feeds = dict(zip([i.name for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}], inputs, strict=False))
            try:
                before = run(model, feeds)
            except Exception:  # ONNX Runtime lacks the operator, or the converter left something out
                continue
            if same(list(outputs), before, 1e-3, 1e-5):
                assert same(before, run(result.model.proto, feeds), 1e-5, 1e-6), (path, result.report.sites)
                assert same(list(outputs), run(result.model.proto, feeds), 1e-3, 1e-5), (path, result.report.sites)
                counts["checked"] += 1
    print(f"{kind}: {dict(counts)}")
    assert counts["checked"] >= {"simple": 17, "pytorch-converted": 79, "pytorch-operator": 35, "light": 9}[kind]
