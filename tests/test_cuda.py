"""The CUDA backend. What needs no GPU runs everywhere; the rest is marked `gpu` and run by hand on a GPU machine."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import rewrite
from rewrite.registry import library
from rewrite.runtime.cuda import ALIGNMENT, plan_arena
from rewrite.verify import compare, model_inputs

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import graphs

gpu = pytest.mark.gpu


# --- the arena ----------------------------------------------------------------------------------------------------
def overlapping(offsets, sizes, lives):
    names = list(offsets)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            together = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            apart = offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
            if together and not apart:
                yield a, b


@pytest.mark.parametrize("seed", range(30))
def test_values_alive_together_do_not_overlap(seed):
    rng = np.random.default_rng(seed)
    sizes = {f"v{i}": int(rng.integers(0, 5000)) for i in range(40)}
    lives = {n: (int(a), int(a + rng.integers(0, 6))) for n, a in zip(sizes, rng.integers(0, 30, 40), strict=True)}
    offsets, total = plan_arena(sizes, lives)
    assert not list(overlapping(offsets, sizes, lives))
    assert all(o % ALIGNMENT == 0 and o + sizes[n] <= total for n, o in offsets.items())


def test_memory_is_used_again():
    sizes = dict.fromkeys("abcdef", 1024)
    offsets, total = plan_arena(sizes, {n: (i, i + 1) for i, n in enumerate("abcdef")})
    assert total == 2 * 1024
    assert len(set(offsets.values())) == 2


# --- without a GPU ------------------------------------------------------------------------------------------------
def plan_on(path, model, **options):
    return rewrite.build(rewrite.optimize(model).model, path, profile="batch=1:2:8,seq=1:16:256", **options)


def test_without_cupy_the_extra_is_named(tmp_path, monkeypatch):
    plan_on(tmp_path / "p", graphs.model(1, "bert"), engines=False)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(rewrite.RewriteError, match=r"device cuda needs CuPy; install the extra: pip install 'rewrite-onnx\[gpu\]'"):
        rewrite.Plan(tmp_path / "p", device="cuda").run({})


def test_an_unknown_device_is_refused(tmp_path):
    plan_on(tmp_path / "p", graphs.model(1, "bert"), engines=False)
    with pytest.raises(rewrite.RewriteError, match="device 'tpu' is unknown"):
        rewrite.Plan(tmp_path / "p", device="tpu")


# --- with one -----------------------------------------------------------------------------------------------------
@gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_plan_computes_on_the_gpu_what_it_does_on_the_cpu(kind, dtype, tmp_path):
    model = graphs.model(3, kind) if dtype == "float32" else graphs.half(graphs.model(3, kind))
    plan_on(tmp_path / "p", model, verify=False)
    cpu, cuda = rewrite.Plan(tmp_path / "p"), rewrite.Plan(tmp_path / "p", device="cuda")
    for seed, (batch, seq) in enumerate([(2, 16), (1, 1), (3, 77), (8, 256), (2, 16), (5, 33)]):
        feeds = model_inputs(model, seed, {"batch": batch, "seq": seq})
        want = cpu.run(feeds)["y"]
        for _ in range(2):
            got = cuda.run(feeds)["y"]
            tolerance = 2e-4 if dtype == "float32" else 2e-2
            assert np.abs(got.astype(np.float64) - want).max() <= tolerance * np.abs(want).max(), (batch, seq)


CASES = {
    "MatMulAct": [
        ({"x": (3, 5, 24), "w": (24, 40)}, {}),
        ({"x": (3, 5, 24), "w": (24, 40), "bias": (40,)}, {"activation": "gelu"}),
        ({"x": (1, 24), "w": (40, 24), "bias": (40,), "residual": (1, 40)}, {"activation": "swish", "trans_w": 1}),
        ({"x": (2, 33, 24), "w": (24, 7), "residual": (2, 33, 7)}, {"activation": "gelu_tanh"}),
        *[({"x": (4, 16), "w": (16, 16), "bias": (16,)}, {"activation": a}) for a in ("relu", "tanh", "sigmoid")],
    ],
    "GatedMatMulAct": [
        ({"x": (3, 5, 24), "w_gate": (24, 40), "w_up": (24, 40)}, {}),
        ({"x": (7, 24), "w_gate": (40, 24), "w_up": (40, 24), "bias_gate": (40,), "bias_up": (40,)}, {"activation": "gelu_tanh", "trans_w": 1}),
    ],
    "FusedAttention": [
        ({"q": (2, 4, 17, 16), "k": (2, 2, 17, 16), "v": (2, 2, 17, 16)}, {"scale": 0.25}),
        ({"q": (2, 4, 64, 32), "k": (2, 4, 64, 32), "v": (2, 4, 64, 32)}, {"scale": 0.2, "causal": 1}),
        ({"q": (2, 4, 9, 16), "k": (2, 2, 33, 16), "v": (2, 2, 33, 24), "mask": (2, 1, 9, 33)}, {"scale": 0.25, "softcap": 5.0}),
        ({"q": (1, 3, 1, 8), "k": (1, 3, 130, 8), "v": (1, 3, 130, 8), "mask": (1, 1, 1, 130)}, {"scale": 0.3, "zero_masked": 1}),
        ({"q": (2, 2, 40, 64), "k": (2, 2, 40, 64), "v": (2, 2, 40, 64), "mask": (40, 40, "bool")}, {"scale": 0.1, "fill": float("-inf"), "zero_masked": 1}),
    ],
}


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "shapes", "attributes"), [(n, s, a) for n, cases in CASES.items() for s, a in cases])
def test_kernels_are_their_references(name, shapes, attributes, dtype):
    """Against the reference in float64, outputs poisoned first."""
    import cupy

    plugin, rng = library().plugins[name], np.random.default_rng(0)
    arrays = []
    for given in plugin.inputs:
        shape = shapes.get(given.rstrip("?"))
        if shape is None:
            arrays.append(None)
            continue
        kind = np.dtype(bool if shape[-1] == "bool" else dtype)
        shape = tuple(n for n in shape if n != "bool")
        made = plugin.sample(rng, given.rstrip("?"), shape, kind)
        arrays.append(made if made is not None else rng.standard_normal(shape).astype(kind))
    options = {**plugin.attributes, **attributes}
    wide = [a.astype(np.float64) if a is not None and a.dtype.kind == "f" else a for a in arrays]
    with np.errstate(all="ignore"):
        want = plugin.reference(*wide, **options)
    inputs = [None if a is None else cupy.asarray(a) for a in arrays]
    output = cupy.full(want.shape, np.nan, dtype)
    launch = plugin.cuda(inputs, [output], **options)
    assert launch is not None
    launch()
    verdict = compare([want.astype(dtype)], [output.get()], plugin.tolerance)
    assert verdict.ok, verdict.reason
