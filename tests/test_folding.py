"""Norms that products take over: which, where what the products tell each other lies, and that nothing changes. The kernel is replaced by its formulas."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import fake_gpu
import numpy as np
import onnx
import pytest

import rewrite
from rewrite.plugins import cuda_gemm, tuning
from rewrite.plugins.activations import activate
from rewrite.runtime import cuda, folding
from rewrite.verify import model_inputs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import graphs

PART = 128  # features of a part of the products that a norm follows


def wide(array):
    return np.asarray(array, np.float32)


def normed(norm):
    """What the norm makes, by what was told alone."""
    told = norm.told
    width = told.scale.shape[0]
    parts = wide(told.rows)[: -(-width // told.part)]
    counts = np.array([min(told.part, width - i) for i in range(0, width, told.part)], np.float32)[:, None]
    mean = parts[..., 0].sum(0) / width if norm.centred else np.float32(0)
    square = (parts[..., 1] + counts * (parts[..., 0] / counts - mean) ** 2).sum(0)
    return np.broadcast_to(mean, square.shape)[:, None], (1 / (np.sqrt(square / width + norm.epsilon) * told.by))[:, None]


def products(x, jobs, activation, gated, shape, norm, told):
    """The launch of gemm.cu, as its head describes it."""

    def launch():
        sums = []
        for number, job in enumerate(jobs):
            v = wide(x) @ wide(job.w).T
            if norm is not None and norm.of_x:
                mean, rate = normed(norm)
                shift, bias = norm.shifts[number], norm.biases[number]
                v = rate * (v - mean * (0 if shift is None else wide(shift))) + (0 if bias is None else wide(bias))
            elif job.bias is not None:
                v = v + wide(job.bias)
            sums.append(v)
        results = [activate(v, activation) for v in sums]
        results = [results[0] * sums[1]] if gated else results
        for job, y in zip(jobs, results, strict=False):
            if job.residual is not None:
                residual = wide(job.residual)
                if norm is not None and not norm.of_x:
                    assert job.residual.ctypes.data == norm.told.z.ctypes.data
                    mean, rate = normed(norm)
                    residual = rate * (residual - mean * norm.told.by * wide(norm.told.scale)) + (0 if norm.offset is None else wide(norm.offset))
                y = y + residual
            y = y.astype(x.dtype)
            if job.y is not None:
                job.y[...] = y
            if told is not None:
                told.z[...] = (wide(y) * wide(told.scale) * told.by).astype(x.dtype)
                for number, start in enumerate(range(0, y.shape[1], told.part)):
                    part = wide(y[:, start : start + told.part])
                    told.rows[number] = np.stack([part.sum(1), part.shape[1] * part.var(1)], -1)

    if told is not None:
        told.part = PART
    return launch


@pytest.fixture
def gpu(monkeypatch):
    """The GPU made of NumPy with products that fold norms. Gives what was launched: (activation, norm, told) and the jobs."""
    found, launched = cuda.library, []
    fake_gpu.install(monkeypatch)

    def with_links():
        made = found()
        return dataclasses.replace(made, plugins={n: dataclasses.replace(p, cuda=None, merged=None, view=None) for n, p in made.plugins.items()})

    def candidates(x, jobs, activation, gated=False, norm=None, told=None):
        launched.append((len(jobs), activation, norm, told, [job.y is not None for job in jobs]))
        return {"numpy": lambda: products(x, jobs, activation, gated, None, norm, told)}

    monkeypatch.setattr(cuda, "library", with_links)
    monkeypatch.setattr(folding, "capability", lambda: 90)
    monkeypatch.setattr(cuda_gemm, "capability", lambda: 80)  # no chains
    monkeypatch.setattr(cuda_gemm, "candidates", candidates)
    return launched


def built(tmp_path, kind, dtype=onnx.TensorProto.FLOAT16, layers=3, change=None):
    wide_model = graphs.model(layers, kind)
    scales = [n.input[1] for n in wide_model.graph.node if n.op_type == "LayerNormalization"]
    for initializer in wide_model.graph.initializer:  # scales that are not 1, one above it
        if initializer.name in scales:
            array = np.random.default_rng(len(initializer.name)).uniform(0.2, 3, initializer.dims).astype(np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
    model = graphs.half(wide_model, dtype)
    if change is not None:
        change(model)
    rewrite.build(rewrite.optimize(model, verify=False).model, tmp_path / "p", engines=False, verify=False)
    return model


def both(tmp_path, model):
    inputs = model_inputs(model, 0, {"batch": 3, "seq": 5})
    plans = [rewrite.Plan(tmp_path / "p", device=device) for device in ("cpu", "cuda")]
    want, got = (plan.run(inputs) for plan in plans)
    return plans[1], {n: wide(a) for n, a in want.items()}, {n: wide(a) for n, a in got.items()}


def test_the_norms_of_an_encoder_are_in_its_products(tmp_path, gpu):
    """All but the last, whose result is the model's; of each, z is a residual once and multiplied once."""
    model = built(tmp_path, "bert")
    plan, want, got = both(tmp_path, model)
    steps = plan.manifest.steps
    norms = [i for i, s in enumerate(steps) if s.name == "LayerNormalization"]
    (frame,) = plan.executor.frames.values()
    assert [fold.norm for fold in frame.folding.folds] == norms[:-1]
    assert len(norms) == 6
    done = {i for indices, _ in frame.work for i in indices}
    assert done & set(norms) == {norms[-1]}
    assert all(fold.bare for fold in frame.folding.folds)
    assert [count for count, *_ in gpu if count > 1] == [3, 3]  # queries, keys and values of the layers after the first
    assert sum(norm is not None and norm.of_x for _, _, norm, _, _ in gpu) == 5
    assert sum(norm is not None and not norm.of_x for _, _, norm, _, _ in gpu) == 5
    assert [kept for _, _, _, told, (kept, *_) in gpu if told is not None] == [False] * 5
    for name, value in want.items():
        assert np.abs(value - got[name]).max() <= 6e-3 * np.abs(value).max()


def test_the_norms_of_a_decoder_are_in_its_products(tmp_path, gpu):
    """The stream that they read is a residual, too, so it is written beside z."""
    model = built(tmp_path, "llama", onnx.TensorProto.BFLOAT16)
    plan, want, got = both(tmp_path, model)
    (frame,) = plan.executor.frames.values()
    norms = [i for i, s in enumerate(plan.manifest.steps) if s.name == "RMSNormalization"]
    assert [fold.norm for fold in frame.folding.folds] == norms[1:]
    assert not any(fold.bare for fold in frame.folding.folds)
    assert all(norm.shifts == [None] * len(norm.shifts) for _, _, norm, _, _ in gpu if norm is not None)
    for name, value in want.items():
        assert np.abs(value - got[name]).max() <= 4e-2 * np.abs(value).max()


def test_few_tokens_are_left_to_chains(tmp_path, gpu):
    model = built(tmp_path, "bert")
    plan = rewrite.Plan(tmp_path / "p", device="cuda")
    assert not plan.executor._make_frame({**dict.fromkeys(plan.check(model_inputs(model, 0, {"batch": 1, "seq": 8})), 1), "seq": 8}).folding.folds


def test_a_norm_that_something_else_reads_stays(tmp_path, gpu):
    """An output of the model, or of anything but a product."""

    def shown(model):
        norms = [n for n in model.graph.node if n.op_type == "LayerNormalization"]
        model.graph.output.append(onnx.helper.make_tensor_value_info(norms[0].output[0], onnx.TensorProto.FLOAT16, ["batch", "seq", 64]))
        model.graph.node.append(onnx.helper.make_node("Sin", [norms[2].output[0]], ["sines"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("sines", onnx.TensorProto.FLOAT16, ["batch", "seq", 64]))

    model = built(tmp_path, "bert", change=shown)
    plan, want, got = both(tmp_path, model)
    (frame,) = plan.executor.frames.values()
    norms = [i for i, s in enumerate(plan.manifest.steps) if s.name == "LayerNormalization"]
    assert [fold.norm for fold in frame.folding.folds] == [norms[1], norms[3], norms[4]]
    for name, value in want.items():
        assert np.abs(value - got[name]).max() <= 1e-2 * np.abs(value).max()


def test_what_a_norm_reads_is_written_where_others_read_it(tmp_path, gpu):
    def shown(model):
        read = next(n.input[0] for n in model.graph.node if n.op_type == "LayerNormalization")
        model.graph.output.append(onnx.helper.make_tensor_value_info(read, onnx.TensorProto.FLOAT16, ["batch", "seq", 64]))

    model = built(tmp_path, "bert", change=shown)
    plan, want, got = both(tmp_path, model)
    (frame,) = plan.executor.frames.values()
    assert [fold.bare for fold in frame.folding.folds] == [False, True, True, True, True]
    assert len(want) == 2
    for name, value in want.items():
        assert np.abs(value - got[name]).max() <= 6e-3 * np.abs(value).max()


def test_a_norm_is_left_where_folding_was_measured_to_be_slower(tmp_path, gpu, monkeypatch):
    """Each kind is measured in the whole graph, with the kinds before it decided."""
    model = built(tmp_path, "bert")
    plan = rewrite.Plan(tmp_path / "p", device="cuda")
    counts = []

    def microseconds(frame):  # the first kind gains, the other one loses
        folds = frame.folding.folds
        counts.append(len(folds))
        return 10 - sum(1 if fold.key == min(kinds) else -1 for fold in folds)

    monkeypatch.setattr(cuda.Frame, "microseconds", microseconds)
    monkeypatch.setattr(tuning, "microseconds", lambda launch: 1.0)
    inputs = model_inputs(model, 0, {"batch": 3, "seq": 5})
    kinds = {fold.key for fold in plan.executor._make_frame(plan.check(inputs)).folding.folds}
    assert len(kinds) == 2
    times = plan.executor.tune(inputs)
    (frame,) = plan.executor.frames.values()
    assert {fold.key for fold in frame.folding.folds} == {min(kinds)}
    assert counts == [5, 2, 5, 3] or counts == [5, 3, 5, 2]
    assert times[min(kinds)][folding.FOLDED] < times[min(kinds)][folding.APART]
    assert times[max(kinds)][folding.FOLDED] > times[max(kinds)][folding.APART]


def test_no_element_of_z_is_larger_than_that_of_y(tmp_path, gpu):
    """float16 ends at 65504: a scale above 1 is made smaller by a power of two, which the rate makes good."""

    def large(model):
        scale = next(n.input[1] for n in model.graph.node if n.op_type == "LayerNormalization")
        for initializer in model.graph.initializer:
            if initializer.name == scale:
                initializer.CopyFrom(onnx.numpy_helper.from_array(np.full(initializer.dims, 300, np.float16), scale))

    model = built(tmp_path, "bert", change=large)
    plan, want, got = both(tmp_path, model)
    (frame,) = plan.executor.frames.values()
    first = frame.folding.told[frame.folding.folds[0].norm]
    assert first.by == 2.0**-9
    assert np.abs(wide(first.scale)).max() * first.by <= 1
    for name, value in want.items():
        assert np.isfinite(value).all()
        assert np.abs(value - got[name]).max() <= 2e-2 * np.abs(value).max()


def test_a_scale_that_is_no_number_is_not_folded(tmp_path, gpu):
    def broken(model):
        scale = next(n.input[1] for n in model.graph.node if n.op_type == "LayerNormalization")
        for initializer in model.graph.initializer:
            if initializer.name == scale:
                initializer.CopyFrom(onnx.numpy_helper.from_array(np.full(initializer.dims, np.inf, np.float16), scale))

    model = built(tmp_path, "bert", change=broken)
    plan = rewrite.Plan(tmp_path / "p", device="cuda")
    frame = plan.executor._make_frame(plan.check(model_inputs(model, 0, {"batch": 3, "seq": 5})))
    assert len(frame.folding.folds) == 4
