"""ONNX's own tests as models: what ONNX Runtime computes rightly before rewriting, it does after.

    python tests/onnx_cases.py [--record]

The operators' cases are made in memory; light, simple and PyTorch's models lie in the package, all of opsets that are
refused (6 to 12), so ONNX's version converter brings them to opset 18 first. `--record` writes the counts to
benchmarks/results/onnx_cases.json.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import rewrite
from rewrite.errors import RewriteError
from rewrite.validity import MIN_OPSET


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


def check_cases(some: Sequence[Any], counts: Counter[str]) -> list[str]:
    """Rewrite these cases of operators with all rules; counts what was there, and returns what is not as it was."""
    problems = []
    for case in some:
        opset = next((o.version for o in case.model.opset_import if o.domain == ""), MIN_OPSET)
        counts["cases"] += 1
        if opset < MIN_OPSET:
            counts["refused"] += 1
            problems += refusal(case.name, case.model, opset)
            continue
        result = rewrite.optimize(case.model, verify=False)
        counts["rewritten"] += bool(result.report.sites)
        for inputs, outputs in case.data_sets or []:
            feeds = {i.name: v for i, v in zip(case.model.graph.input, inputs, strict=True)}
            counts["data sets"] += 1
            try:
                before = run(case.model, feeds)
            except Exception:  # ONNX Runtime lacks the operator or a type
                counts["not run by ONNX Runtime"] += 1
                continue
            if not same(list(outputs), before, case.rtol, max(case.atol, 1e-6)):
                counts["wrong in ONNX Runtime before"] += 1
                continue
            counts["checked"] += 1
            if not same(list(outputs), run(result.model.proto, feeds), case.rtol, max(case.atol, 1e-6)):
                problems.append(f"{case.name}: changed by {result.report.sites}")
    return problems


def refusal(name: str, model: onnx.ModelProto, opset: int) -> list[str]:
    """Whether a model of an old opset is refused in so many words."""
    try:
        rewrite.optimize(model)
    except RewriteError as error:
        return [] if f"opset {opset} is not supported" in str(error) else [f"{name}: refused with {error}"]
    return [f"{name}: of opset {opset}, but not refused"]


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


def check_disk(kind: str, counts: Counter[str]) -> list[str]:
    """The same for the models of one kind on disk."""
    problems = []
    for path in on_disk()[kind]:
        old = onnx.load(path)
        problems += refusal(str(path), old, next(o.version for o in old.opset_import if o.domain == ""))
        model = onnx.version_converter.convert_version(old, 18)
        result = rewrite.optimize(model, verify=False)
        counts["models"] += 1
        counts["rewritten"] += bool(result.report.sites)
        for inputs, outputs in data_of(path, old):
            feeds = dict(zip([i.name for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}], inputs, strict=False))
            try:
                before = run(model, feeds)
            except Exception:  # ONNX Runtime lacks the operator, or the converter left something out
                counts["not run by ONNX Runtime"] += 1
                continue
            if not same(list(outputs), before, 1e-3, 1e-5):
                counts["wrong in ONNX Runtime before"] += 1
                continue
            counts["checked"] += 1
            after = run(result.model.proto, feeds)
            if not same(before, after, 1e-5, 1e-6) or not same(list(outputs), after, 1e-3, 1e-5):
                problems.append(f"{path}: changed by {result.report.sites}")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/onnx_cases.json")
    arguments = parser.parse_args()
    started, counts, problems = time.perf_counter(), {}, []
    for kind in ("operators", *on_disk()):
        counts[kind] = Counter[str]()
        problems += check_cases(cases(), counts[kind]) if kind == "operators" else check_disk(kind, counts[kind])
        print(kind, dict(counts[kind]), flush=True)
    print("\n".join(problems) or "no problem")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        data = {**{k: dict(c) for k, c in counts.items()}, "problems": len(problems), "seconds": round(time.perf_counter() - started)}
        print(record.write("onnx_cases", record.cpu(), record.versions("onnx", "onnxruntime"), data))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
