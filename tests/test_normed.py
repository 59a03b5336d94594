"""Norms in the launch of the product before them: which steps, and where their results lie. What needs a GPU is marked `gpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_cuda_chain import Array, frame_of

import rewrite
from rewrite.plugins import cuda_gemm, tuning
from rewrite.plugins.cuda_gemm import Normed, Product, Shape
from rewrite.runtime import normed
from rewrite.runtime.partition import Step
from rewrite.verify import model_inputs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import graphs

gpu = pytest.mark.gpu


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(cuda_gemm, "capability", lambda: 90)


def plan_of(path, kind, width=384):
    model = graphs.half(graphs.model(2, kind, width=width, hidden=2 * width), onnx.TensorProto.BFLOAT16)
    return rewrite.build(rewrite.optimize(model).model, path, engines=False, verify=False)


def found(plan, monkeypatch):
    """The steps of each joined launch by name, and whether the sum is written, too."""
    made = []
    monkeypatch.setattr(cuda_gemm, "product", lambda x, products, shape, norm: made.append((products[0], norm, str(shape))))
    monkeypatch.setattr(tuning, "pick", lambda key, candidates, default: next(iter(candidates.values()))())
    frame, indices = frame_of(plan, 500), list(range(len(plan.manifest.steps)))
    pairs = [p for p in indices if normed.at(frame, indices, p) is not None]
    return pairs, made


def test_every_norm_of_an_encoder_follows_its_product_and_no_sum_is_written(tmp_path, hopper, monkeypatch):
    plan = plan_of(tmp_path / "p", "bert")
    pairs, made = found(plan, monkeypatch)
    names = [s.name for s in plan.manifest.steps]
    assert [names[p : p + 2] for p in pairs] == [["MatMulAct", "LayerNormalization"]] * 4
    assert all(product.y is None and product.residual is not None and product.bias is not None for product, _, _ in made)
    assert {(norm.kind, norm.bias is None, layout) for _, norm, layout in made} == {("layer", False, "turns 128 / 3")}


def test_a_decoder_keeps_the_sums_that_are_residuals(tmp_path, hopper, monkeypatch):
    pairs, made = found(plan_of(tmp_path / "p", "llama"), monkeypatch)
    assert len(pairs) == len(made) == 3
    assert all(product.y is not None and norm.kind == "rms" for product, norm, _ in made)


def test_a_width_that_does_not_divide_has_launches_of_its_own(tmp_path, hopper, monkeypatch):
    assert found(plan_of(tmp_path / "p", "bert", width=320), monkeypatch) == ([], [])
    assert cuda_gemm.normed_shapes(520) == cuda_gemm.normed_shapes(128) == []  # 128: one block has the row
    assert cuda_gemm.normed_shapes(768) == [Shape("turns", 128, 6), Shape("turns", 192, 4)]


def test_a_norm_is_not_written_over_what_the_product_reads(hopper):
    x, residual = Array(500, 384), Array(500, 384)
    product, norm = Product(Array(500, 384), Array(384, 384), None, residual), Normed("layer", Array(500, 384), Array(384), None, 1e-5)
    assert normed.layouts_of(x, product, norm)
    for other in (x, residual, product.y):
        norm.y.data.ptr = other.data.ptr + 384 * 2 * 100
        assert not normed.layouts_of(x, product, norm)
    norm.y.data.ptr = x.data.ptr + x.nbytes
    assert normed.layouts_of(x, product, norm)
    norm.scale.dtype = type(x.dtype)(name="float32")
    assert not normed.layouts_of(x, product, norm)


def test_what_norms_make_lives_while_their_product_is_computed():
    steps = [Step("plugin", "MatMulAct", ["x", "w"], ["y"]), Step("segment", "other", ["a"], ["b"])]
    steps += [Step("plugin", "LayerNormalization", ["y", "s"], ["z"]), Step("plugin", "RMSNormalization", ["b", "s"], ["c"])]
    lives = {"x": (0, 0), "y": (0, 2), "z": (2, 4), "c": (3, 4)}
    normed.keep_apart(steps, lives)
    assert lives == {"x": (0, 0), "y": (0, 2), "z": (0, 4), "c": (3, 4)}


def test_where_layouts_in_turns_are_tried(hopper):
    x = Array(4096, 384)
    plain = Product(Array(4096, 1536), Array(1536, 384))
    assert {"turns 128", "turns 192"} <= set(cuda_gemm.candidates(x, [plain], "gelu"))
    plain.residual = plain.y
    assert {"turns 128", "turns 192"} <= set(cuda_gemm.candidates(x, [plain], "none"))
    assert not any(n.startswith("turns") for n in cuda_gemm.candidates(x, [plain], "gelu"))  # the residual would be activated, too
    assert not any(n.startswith("turns") for n in cuda_gemm.candidates(x, [plain, plain], "swish", gated=True))
    assert not any(n.startswith("turns") for n in cuda_gemm.candidates(Array(128, 384), [plain], "none"))


def test_memory_of_every_layout_is_there():
    for tile, stages in cuda_gemm.TURNS.items():
        for split in range(1, 9):
            if split == 1 or any(Shape("turns", tile, split) in cuda_gemm.normed_shapes(w) for w in (384, 768, 1024)):
                assert cuda_gemm._shared(Shape("turns", tile, split), stages) <= cuda_gemm.MOST_SHARED


# --- with a GPU ------------------------------------------------------------------------------------------------------
@gpu
@pytest.mark.parametrize("what", ["turns", "normed"])
def test_kernels_are_right_against_float64(what):
    import normed_speed

    assert all(row["right"] for row in getattr(normed_speed, f"check_{what}")())


@gpu
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_plan_with_joined_norms_gives_what_the_cpu_gives(kind, tmp_path, monkeypatch):
    model = graphs.half(graphs.model(3, kind, width=384, hidden=768))
    rewrite.build(rewrite.optimize(model).model, tmp_path / "p", profile="batch=1:2:8,seq=1:16:256", verify=False)
    on_cpu, on_gpu = rewrite.Plan(tmp_path / "p"), rewrite.Plan(tmp_path / "p", device="cuda")
    monkeypatch.setattr(normed, "default", lambda tokens, layouts: str(layouts[0]))
    for seed, (batch, seq) in enumerate([(2, 16), (3, 77), (8, 256)]):
        feeds = model_inputs(model, seed, {"batch": batch, "seq": seq})
        want, got = on_cpu.run(feeds)["y"].astype(np.float64), on_gpu.run(feeds)["y"]
        frame = on_gpu.executor.frames[next(reversed(on_gpu.executor.frames))]
        assert sum(len(indices) == 2 for indices, _ in frame.work) >= 5
        assert np.abs(got - want).max() <= 2e-2 * np.abs(want).max(), (batch, seq)
