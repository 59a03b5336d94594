"""The CUDA backend. What needs no GPU runs everywhere; the rest is marked `gpu` and run by hand on a GPU machine."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import parse

import rewrite
from rewrite.registry import library
from rewrite.runtime import cuda, layout
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


# --- layout -------------------------------------------------------------------------------------------------------
HEADS = [("reshape", (0, 0, 4, 8)), ("transpose", (0, 2, 1, 3))]
BACK = [("transpose", (0, 2, 1, 3)), ("reshape", (0, 0, -1))]


def test_heads_are_a_view_and_back_is_one_of_the_result():
    packed = np.arange(2 * 5 * 32).reshape(2, 5, 32)
    assert layout.is_view(packed, HEADS)
    heads = layout.apply(packed, HEADS)
    assert not layout.is_view(np.ascontiguousarray(heads), BACK)
    back = layout.inverse((2, 4, 5, 8), BACK)
    assert layout.is_view(packed, back)
    np.testing.assert_array_equal(layout.apply(packed, back), heads)


def test_segments_that_compute_are_no_layout():
    assert layout.changes(parse("(float[n, 8] x) => (float[8, n] y) { t = Transpose<perm = [1, 0]>(x)\n y = Identity(t) }")) == {"y": ("x", [("transpose", (1, 0))])}
    assert layout.changes(parse("(float[n, 8] x) => (float[n, 8] y) { y = Neg(x) }")) is None
    assert layout.changes(parse("(float[n, 8] x, int64[1] s) => (float[m] y) { y = Reshape(x, s) }")) is None


def views_of(plan, sizes):
    manifest = plan.manifest
    shapes = {n: tuple(sizes.get(d, d) for d in v.shape) for n, v in {**manifest.inputs, **manifest.values}.items()}
    shapes |= {n: a.shape for n, a in plan.weights.items()}
    plugins = library().plugins
    segments = {s.name: onnx.load_model_from_string(plan.segment(s.name)) for s in manifest.steps if s.kind == "segment"}
    fixed = {*manifest.inputs, *manifest.outputs.values(), *plan.weights}
    return layout.Views(manifest.steps, segments.get, shapes, lambda s: s.kind == "plugin" and plugins[s.name].strided, fixed)


def test_the_transposes_around_attention_cost_nothing(tmp_path):
    plan = plan_on(tmp_path / "p", graphs.model(3, "bert"), engines=False)
    views = views_of(plan, {"batch": 2, "seq": 5})
    steps = plan.manifest.steps
    attentions = [s for s in steps if s.name == "FusedAttention"]
    assert len(attentions) == 3
    for step in attentions:
        assert {*step.inputs[:3], *step.outputs} <= set(views.of)
        assert not {*step.inputs[:3], *step.outputs} & {views.root(n) for n in views.of}
    left = [s for i, s in enumerate(steps) if s.kind == "segment" and i not in views.skipped]
    assert all({n.op_type for n in onnx.load_model_from_string(plan.segment(s.name)).graph.node} - layout.OPERATORS for s in left)


def test_values_that_engines_read_stay_packed(tmp_path):
    plan = plan_on(tmp_path / "p", graphs.model(1, "llama"), engines=False)
    views = views_of(plan, {"batch": 2, "seq": 5})
    for index, step in enumerate(plan.manifest.steps):
        if index not in views.skipped and not (step.kind == "plugin" and library().plugins[step.name].strided):
            assert not set(step.inputs) & set(views.of)


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


class Exhausted(Exception):
    pass


def pretended(free=5_000_000):
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    cuda = types.SimpleNamespace(memory=types.SimpleNamespace(OutOfMemoryError=Exhausted), runtime=types.SimpleNamespace(memGetInfo=lambda: (free, 80_000_000)))
    return types.SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool)


def test_out_of_memory_says_how_much_is_needed():
    message = "out of GPU memory: the values need 7 MB, 5 MB are free; run smaller batches"
    with pytest.raises(rewrite.RewriteError, match=message), cuda.memory(pretended(), "the values", 7_000_000, "run smaller batches"):
        raise Exhausted
    with pytest.raises(ZeroDivisionError), cuda.memory(pretended(), "the values", 1, ""):
        raise ZeroDivisionError


class Named(str):
    """A frame of which nothing is asked."""

    def capture(self):
        pass


def test_frames_that_were_not_used_for_longest_make_room(monkeypatch):
    made = []

    def frame(executor, sizes):
        made.append(dict(sizes))
        if len(executor.frames) > 1:
            raise cuda.OutOfMemory("out of GPU memory")
        return Named(sizes["n"])

    monkeypatch.setattr(cuda, "Frame", frame)
    executor = cuda.CudaExecutor.__new__(cuda.CudaExecutor)
    executor.cupy, executor.times, executor.frames, executor.ranks = pretended(), {}, OrderedDict(), None
    assert [executor.frame({"n": n}) for n in (1, 2, 1, 3)] == ["1", "2", "1", "3"]
    assert list(executor.frames) == [(1,), (3,)]
    assert made == [{"n": n} for n in (1, 2, 3, 3)]
    monkeypatch.setattr(cuda, "Frame", lambda *_: (_ for _ in ()).throw(cuda.OutOfMemory("out of GPU memory")))
    with pytest.raises(rewrite.RewriteError, match="out of GPU memory"):
        executor.frame({"n": 4})
    assert not executor.frames


def test_only_so_many_frames_are_kept(monkeypatch):
    monkeypatch.setattr(cuda, "Frame", lambda executor, sizes: Named(sizes["n"]))
    executor = cuda.CudaExecutor.__new__(cuda.CudaExecutor)
    executor.cupy, executor.times, executor.frames, executor.ranks = pretended(), {}, OrderedDict(), None
    for n in range(cuda.GRAPHS + 3):
        executor.frame({"n": n})
    assert list(executor.frames) == [(n,) for n in range(3, cuda.GRAPHS + 3)]


# --- with one -----------------------------------------------------------------------------------------------------
@gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_plan_computes_on_the_gpu_what_it_does_on_the_cpu(kind, dtype, tmp_path):
    model = graphs.model(3, kind) if dtype == "float32" else graphs.half(graphs.model(3, kind))
    plan_on(tmp_path / "p", model, verify=False)
    on_cpu, on_gpu = rewrite.Plan(tmp_path / "p"), rewrite.Plan(tmp_path / "p", device="cuda")
    for seed, (batch, seq) in enumerate([(2, 16), (1, 1), (3, 77), (8, 256), (2, 16), (5, 33)]):
        feeds = model_inputs(model, seed, {"batch": batch, "seq": seq})
        want = on_cpu.run(feeds)["y"]
        for _ in range(2):
            got = on_gpu.run(feeds)["y"]
            tolerance = 2e-4 if dtype == "float32" else 2e-2
            assert np.abs(got.astype(np.float64) - want).max() <= tolerance * np.abs(want).max(), (batch, seq)


CASES = {
    "MatMulAct": [
        ({"x": (3, 5, 24), "w": (24, 40)}, {}),
        ({"x": (3, 5, 24), "w": (24, 40), "bias": (40,)}, {"activation": "gelu"}),
        ({"x": (1, 24), "w": (40, 24), "bias": (40,), "residual": (1, 40)}, {"activation": "swish", "trans_w": 1}),
        ({"x": (2, 33, 24), "w": (24, 7), "residual": (2, 33, 7)}, {"activation": "gelu_tanh"}),
        *[({"x": (4, 16), "w": (16, 16), "bias": (16,)}, {"activation": a}) for a in ("relu", "tanh", "sigmoid", "quick_gelu", "relu2")],
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
    verdict = kernel_verdict(name, shapes, attributes, dtype)
    assert verdict.ok, verdict.reason


def kernel_verdict(name, shapes, attributes, dtype):
    """A kernel against its reference in float64, outputs poisoned first."""
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
    return compare([want.astype(dtype)], [output.get()], plugin.tolerance)


SIXTEEN = {
    "MatMulAct": [
        ({"x": (3, 5, 24), "w": (40, 24), "bias": (40,), "residual": (3, 5, 40)}, {"trans_w": 1}),
        ({"x": (70, 520), "w": (264, 520), "bias": (264,)}, {"activation": "gelu", "trans_w": 1}),
        *[({"x": (300, 64), "w": (72, 64), "bias": (72,)}, {"activation": a, "trans_w": 1}) for a in ("relu", "relu2", "gelu_tanh", "swish", "quick_gelu", "tanh", "sigmoid")],
    ],
    "GatedMatMulAct": [({"x": (130, 64), "w_gate": (72, 64), "w_up": (72, 64), "bias_gate": (72,), "bias_up": (72,)}, {"trans_w": 1})],
    "FusedAttention": [
        ({"q": (2, 4, 130, 64), "k": (2, 2, 130, 64), "v": (2, 2, 130, 64), "mask": (2, 1, 1, 130)}, {"scale": 0.1}),
        ({"q": (1, 2, 77, 128), "k": (1, 2, 77, 128), "v": (1, 2, 77, 128)}, {"scale": 0.1, "causal": 1}),
        ({"q": (3, 9, 32), "k": (3, 33, 32), "v": (3, 33, 32)}, {"scale": 0.2}),
    ],
    "LayerNormalization": [({"x": (5, 7, 384), "scale": (384,), "bias": (384,)}, {}), ({"x": (3, 5000), "scale": (5000,)}, {"epsilon": 1e-12})],
    "RMSNormalization": [({"x": (33, 1032), "scale": (1032,)}, {}), ({"x": (2, 8192), "scale": (8192,)}, {})],
}


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "shapes", "attributes"), [(n, s, a) for n, cases in SIXTEEN.items() for s, a in cases])
def test_kernels_of_our_own_are_their_references(name, shapes, attributes, dtype):
    verdict = kernel_verdict(name, shapes, attributes, dtype)
    assert verdict.ok, verdict.reason


@gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_one_input_share_a_launch(dtype):
    import cupy

    plugin, rng = library().plugins["MatMulAct"], np.random.default_rng(0)
    x = cupy.asarray(rng.standard_normal((2, 33, 64)).astype(dtype))
    calls, wanted = [], []
    for features in (128, 64, 72):
        w, bias = rng.standard_normal((features, 64)).astype(dtype), rng.standard_normal(features).astype(dtype)
        calls.append(([x, cupy.asarray(w), cupy.asarray(bias), None], [cupy.full((2, 33, features), np.nan, dtype)]))
        wanted.append(x.get().astype(np.float64) @ w.T.astype(np.float64) + bias.astype(np.float64))
    launch = plugin.merged(calls, activation="none", trans_w=1)
    launch()
    for (_, (y,)), want in zip(calls, wanted, strict=True):
        assert np.abs(y.get().astype(np.float64) - want).max() <= (2e-2 if dtype == "float16" else 1.5e-1)


@gpu
@pytest.mark.parametrize("options", [
    {"layout": "B1ST", "dtype": "float16", "fill": -65504.0}, {"layout": "B1ST", "dtype": "float32", "fill": -3.4e38, "causal": 1},
    {"layout": "BHST", "dtype": "bool", "heads": 3, "causal": 1, "window": 4},
    {"layout": "B11T", "dtype": "bool", "invert": 1}, {"layout": "B1ST", "dtype": "float16", "fill": -1.0, "causal": 1, "split": 1, "padding_fill": -2.0, "both_fill": -3.0, "unmask_empty": 1},
    {"layout": "ST", "dtype": "bool", "causal": 1},
])  # fmt: skip
def test_masks_are_their_references(options):
    import cupy

    plugin, padding = library().plugins["AttentionMask"], np.ones((3, 10), np.int64)
    padding[1, :6], padding[2] = 0, 0
    attributes = {**plugin.attributes, **options}
    want = plugin.reference(padding, np.empty((3, 10)), None, **attributes)
    y = cupy.zeros(want.shape, want.dtype)
    y[...] = 7
    plugin.cuda([cupy.asarray(padding), cupy.asarray(np.empty((3, 10))), None], [y], **attributes)()
    np.testing.assert_array_equal(y.get(), want)
    part = plugin.view(cupy.zeros(want.shape, want.dtype), **attributes)
    plugin.cuda([cupy.asarray(padding), cupy.asarray(np.empty((3, 10))), None], [part], **attributes)()
    np.testing.assert_array_equal(part.get(), want)


@gpu
def test_a_tuned_plan_keeps_its_results_and_no_pointer_is_stale(tmp_path):
    """Frames are made, replayed and dropped in turn, sixty times over more sizes than are kept."""
    model = graphs.half(graphs.model(2, "bert"))
    plan_on(tmp_path / "p", model, verify=False)
    plan, rng = rewrite.Plan(tmp_path / "p", device="cuda"), np.random.default_rng(0)
    sizes = [{"batch": int(b), "seq": int(s)} for b, s in zip(rng.integers(1, 8, 11), rng.integers(1, 200, 11), strict=True)]
    feeds = [model_inputs(model, i, s) for i, s in enumerate(sizes)]
    first = [plan.run(f)["y"] for f in feeds]
    times = plan.tune(feeds[0])
    assert times
    assert all(us > 0 for found in times.values() for us in found.values())
    for index in rng.integers(0, len(feeds), 60):
        got = plan.run(feeds[index])["y"]
        assert np.abs(got.astype(np.float64) - first[index]).max() <= 2e-2 * np.abs(first[index]).max()
    assert len(plan.executor.frames) <= 8


@gpu
def test_a_plan_in_bfloat16_is_near_the_one_in_float32(tmp_path):
    import ml_dtypes

    exact = graphs.model(2, "bert")
    model = graphs.half(exact, onnx.TensorProto.BFLOAT16)
    plan_on(tmp_path / "p", model, verify=False)
    plan_on(tmp_path / "q", exact, verify=False)
    feeds = model_inputs(exact, 0, {"batch": 2, "seq": 40})
    want = rewrite.Plan(tmp_path / "q").run(feeds)["y"]
    got = rewrite.Plan(tmp_path / "p", device="cuda").run({n: a.astype(ml_dtypes.bfloat16) for n, a in feeds.items()})["y"]
    assert np.abs(got.astype(np.float64) - want).max() <= 6e-2 * np.abs(want).max()


@gpu
def test_a_thousand_captures_replay_what_eager_launches_compute(tmp_path):
    """Capture, replay, free, a thousand times over twenty sizes, while others' frames and memory come and go between."""
    model = graphs.half(graphs.model(1, "bert"))
    plan_on(tmp_path / "p", model, verify=False)
    plan, rng = rewrite.Plan(tmp_path / "p", device="cuda"), np.random.default_rng(0)
    sizes = [{"batch": int(b), "seq": int(s)} for b, s in zip(rng.integers(1, 8, 20), rng.integers(1, 200, 20), strict=True)]
    feeds, executor = [model_inputs(model, i, s) for i, s in enumerate(sizes)], plan.executor
    for cycle, index in enumerate(rng.integers(0, len(feeds), 1000)):
        executor.frames.clear()
        if cycle % 7 == 0:
            executor.cupy.get_default_memory_pool().free_all_blocks()
        got = plan.run(feeds[index])["y"]
        frame = executor.frame(plan.check(feeds[index]))
        with executor.stream:
            frame.arena[...] = 0xFF  # NaN: what is not computed again would tell
            frame._take(feeds[index])
            for launch in frame.launches:
                launch()
        executor.stream.synchronize()
        np.testing.assert_array_equal(executor.cupy.asnumpy(frame.values[plan.manifest.outputs["y"]]), got, err_msg=f"cycle {cycle}")


@gpu
def test_steady_runs_take_no_memory_from_the_device(tmp_path):
    import cupy

    class Count(cupy.cuda.MemoryHook):
        name, taken = "count", 0

        def alloc_preprocess(self, **_):
            self.taken += 1

    model = graphs.half(graphs.model(2, "bert"))
    plan_on(tmp_path / "p", model, verify=False)
    plan = rewrite.Plan(tmp_path / "p", device="cuda")
    feeds = [model_inputs(model, i, {"batch": b, "seq": s}) for i, (b, s) in enumerate([(1, 16), (8, 100), (3, 33)])]
    with Count() as hook:
        for feed in feeds * 2:
            plan.run(feed)
        assert hook.taken  # the hook counts what the first runs take
        hook.taken = 0
        for feed in feeds * 20:
            plan.run(feed)
    assert hook.taken == 0


@gpu
def test_a_run_is_enqueued_in_less_than_thirty_microseconds(tmp_path):
    from rewrite.runtime.bench import bench

    plan_on(tmp_path / "p", graphs.half(graphs.model(12, "bert")), verify=False)
    measured = bench(rewrite.Plan(tmp_path / "p", device="cuda"), {"batch": 1, "seq": 32})
    assert 0 < measured["enqueue_us"] < 30
