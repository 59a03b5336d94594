"""Which CUDA kernel computes a call: the estimate, what is measured, and what a plan keeps of it. Nothing here needs a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest

import rewrite
from rewrite.plugins import cuda_attention, cuda_gemm, cuda_launch, tuning
from rewrite.plugins.cuda_gemm import Product, Shape
from rewrite.registry import library
from rewrite.runtime import seal
from rewrite.runtime.cuda import CudaExecutor, Frame
from rewrite.runtime.plan import MANIFEST, Manifest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import graphs

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


# --- choosing -----------------------------------------------------------------------------------------------------
def made(name, log):
    return lambda: log.append(name) or (lambda: None)


def test_the_default_is_taken_where_nothing_was_measured():
    log: list[str] = []
    tuning.pick("call", {"a": made("a", log), "b": made("b", log)}, "b")
    assert log == ["b"]


def test_what_is_measured_is_kept_and_the_fastest_taken(monkeypatch):
    speed = {"a": 5.0, "b": 2.0, "c": 3.0}
    candidates = {n: (lambda n=n: n) for n in speed}
    monkeypatch.setattr(tuning, "microseconds", lambda launch: speed[launch])
    times: tuning.Times = {}
    with tuning.using(times, measure=True):
        assert tuning.pick("call", candidates, "a") == "b"
    assert times == {"call": speed}
    monkeypatch.setattr(tuning, "microseconds", lambda launch: pytest.fail("measured twice"))
    with tuning.using(times, measure=True):
        assert tuning.pick("call", candidates, "a") == "b"
    with tuning.using(times):
        assert tuning.pick("call", candidates, "a") == "b"
        assert tuning.pick("call", {"a": candidates["a"], "c": candidates["c"]}, "a") == "c"  # the fastest is there no more
        assert tuning.pick("another call", candidates, "a") == "a"
    assert tuning.pick("call", candidates, "a") == "a"  # outside, nothing is known


# --- layouts ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [1, 7, 32, 129, 1024, 20000])
@pytest.mark.parametrize(("features", "inner"), [(8, 8), (384, 384), (1152, 384), (1024, 4096), (14336, 4096), (262144, 640)])
def test_every_layout_fits_the_gpu(tokens, features, inner):
    found = cuda_gemm.choose(tokens, [features], inner)
    assert found
    for shape in cuda_gemm.shapes(tokens, features, inner):
        stages = cuda_gemm._stages(shape, inner) if shape.kind == "narrow" else cuda_gemm.WIDE[shape.tile]
        assert 1 <= stages <= max(6, -(-inner // 64))
        assert cuda_gemm._shared(shape, stages) <= 227 << 10
        assert shape.kind == "wide" or (shape.tile % shape.split == 0 and shape.split <= 8)
        assert cuda_gemm.estimate(shape, tokens, [features], inner) > 0
    assert len({str(s) for s in cuda_gemm.shapes(tokens, features, inner)}) == len(cuda_gemm.shapes(tokens, features, inner))


def test_the_estimate_was_near_the_best_where_all_layouts_were_measured():
    rows = json.loads((RESULTS / "kernel_speed.json").read_text())["results"]["products"]
    lost, best_of_tried = [], []
    for row in rows:
        times = row["layouts_us"]
        ordered = [str(s) for s in cuda_gemm.choose(row["tokens"], [row["features"]], row["inner"]) if str(s) in times]
        lost.append(times[ordered[0]] / min(times.values()))
        best_of_tried.append(min(times[n] for n in ordered) / min(times.values()))
    assert len(rows) == 84
    assert np.mean(lost) < 1.10
    assert np.mean(best_of_tried) < 1.02
    assert max(best_of_tried) < 1.25


def test_tiles_of_products_of_one_launch_are_each_products_own():
    """2048, 512 and 512 features in tiles of 192 are 17 tiles, not 16: two rounds of 132 blocks for 1,024 tokens, which took 40 us against 26."""
    assert str(cuda_gemm.choose(1024, [2048, 512, 512], 2048)[0]) == "wide 256"
    assert str(cuda_gemm.choose(1024, [3072], 2048)[0]) == "wide 192"


def test_every_variant_has_its_source_and_constants():
    for shape, dtype, gated in itertools.product([Shape("narrow", 16, 4), Shape("wide", 256)], ["float16", "bfloat16"], [False, True]):
        name, kind, defines, changes = cuda_gemm.variant(shape, dtype, "gelu", gated)
        source = (Path(cuda_gemm.__file__).parent / f"{name}.cu").read_text()
        assert kind == dtype
        assert f"ACTIVATION={cuda_gemm.ACTIVATIONS.index('gelu')}" in defines
        assert f"GATED={'true' if gated else 'false'}" in defines
        ((old, new),) = changes
        assert source.count(old) == 1
        assert f"m64n{shape.tile}k16.f32.{'bf16' if dtype == 'bfloat16' else 'f16'}" in new
    for size in (16, 32, 64, 96, 128):
        for cut in cuda_attention.cuts(size, 90):
            name, _, defines, _ = cuda_attention.variant(cut, size, "float16", 2, True, False, False, True)
            source = (Path(cuda_gemm.__file__).parent / f"{name}.cu").read_text()
            assert all(d.split("=")[0] in source for d in defines)
            assert cut.hopper <= (size in (32, 64, 128))
    assert not any(c.hopper for c in cuda_attention.cuts(64, 80))


def test_activations_are_numbered_as_in_the_source():
    source = (Path(cuda_gemm.__file__).parent / "products.cuh").read_text()
    cases = {int(line.split("case ")[1].split(":")[0]) for line in source.splitlines() if "case " in line}
    assert cases == set(range(1, len(cuda_gemm.ACTIVATIONS)))


def test_the_polynomial_of_gelu_is_gelu():
    """The coefficients as they stand in the source, in float32."""
    source = (Path(cuda_gemm.__file__).parent / "products.cuh").read_text()
    line = next(line for line in source.splitlines() if "1.0001281f" in line)
    numbers = [np.float32(part) for part in line.split('"f"(')[1].replace("z * ", "").replace("(", "").replace(")", "").replace(";", "").replace("f", "").split(" + ")]
    x = np.linspace(-12, 12, 200001, dtype=np.float32)
    p = np.full_like(x, numbers[-1])
    for number in numbers[-2::-1]:
        p = p * np.abs(x) + number
    q = np.exp2(p)
    got = x * np.where(x > 0, 1 - q, q)
    want = library().plugins["Gelu"].reference(x.astype(np.float64), approximate="none")
    assert np.abs(got - want).max() < 3e-6
    assert abs(got[0]) < 1e-30


# --- calls --------------------------------------------------------------------------------------------------------
def test_a_key_tells_calls_apart():
    x, w, y = np.empty((32, 64), np.float16), np.empty((128, 64), np.float16), np.empty((32, 128), np.float16)
    keys = [
        cuda_gemm.key(x, [Product(y, w)], "none"), cuda_gemm.key(x, [Product(y, w, w[:, 0])], "none"), cuda_gemm.key(x, [Product(y, w, None, y)], "none"),
        cuda_gemm.key(x, [Product(y, w)], "gelu"), cuda_gemm.key(x, [Product(y, w)] * 3, "none"), cuda_gemm.key(x, [Product(y, w)] * 2, "swish", gated=True),
        cuda_gemm.key(x[:16], [Product(y[:16], w)], "none"), cuda_gemm.key(x.astype(np.float32), [Product(y, w)], "none"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert keys[1] == "product float16 32x128x64 none bias"


def test_neighbours_that_read_one_value_share_a_launch(tmp_path):
    """Queries, keys and values of each layer; what has a residual stands alone."""
    fused = rewrite.optimize(graphs.half(graphs.model(2, "bert"))).model
    plan = rewrite.build(fused, tmp_path / "p", engines=False, verify=False)
    executor = CudaExecutor.__new__(CudaExecutor)
    plugins = library().plugins
    executor.plugins = {**plugins, "MatMulAct": dataclasses.replace(plugins["MatMulAct"], merged=lambda calls, **_: f"{len(calls)} at once")}
    executor.plan, executor.steps, executor.turned, executor.ranks = plan, plan.manifest.steps, set(), None
    frame = Frame.__new__(Frame)
    frame.executor, frame.copied = executor, {}
    frame._segment = lambda step: step.name
    frame.arguments = lambda step, plugin: ([step.inputs[0], step.inputs[1]], [step.outputs[0]])
    frame._plugin = lambda plugin, inputs, outputs, attributes: plugin.name
    work = list(frame._launches(list(range(len(plan.manifest.steps))), chain=False))
    assert [launch for _, launch in work if "at once" in str(launch)] == ["3 at once"] * 2
    assert sorted(i for indices, _ in work for i in indices) == list(range(len(plan.manifest.steps)))
    assert sum(launch == "MatMulAct" for _, launch in work) == 2 * 3
    assert sum(launch == "LayerNormalization" for _, launch in work) == 2 * 2


# --- bfloat16 -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_bfloat16_is_fused_as_float16_is(kind):
    """Constants in bfloat16 are numbers, too."""
    narrow, brain = (rewrite.optimize(graphs.half(graphs.model(2, kind), dtype)) for dtype in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16))
    assert brain.model.plugin_nodes() == narrow.model.plugin_nodes()
    assert brain.model.plugin_nodes()["FusedAttention"] == 2
    assert brain.report.model_error <= 5e-2


def test_matrices_are_turned_once_where_one_product_alone_reads_them(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 18]> g (float16[n, 2] x) => (float16[n, 3] a, float16[n, 2] b, float16[n, 2] c)
        <float16[2, 3] own = {1, 2, 3, 4, 5, 6}, float16[2, 2] both = {1, 2, 3, 4}> { a = MatMul(x, own)  b = MatMul(x, both)  d = Neg(x)  c = MatMul(d, both) }"""
    plan = rewrite.build(rewrite.optimize(onnx.parser.parse_model(text)).model, tmp_path / "p", engines=False)
    executor = CudaExecutor.__new__(CudaExecutor)
    executor.steps, executor.outputs, executor.plugins, executor.cupy, executor.weights = plan.manifest.steps, plan.manifest.outputs, library().plugins, np, dict(plan.weights)
    turned = executor._turn_weights()
    assert [plan.manifest.steps[i].inputs[1] for i in turned] == ["own"]
    np.testing.assert_array_equal(executor.weights["own"], plan.weights["own"].T)
    assert executor.weights["own"].flags.c_contiguous
    assert len(np.unique(plan.weights["own"])) == 6
    assert executor.weights["both"] is plan.weights["both"]  # two read it


# --- plans --------------------------------------------------------------------------------------------------------
def test_norms_in_16_bits_are_steps_of_their_own(tmp_path):
    for kind, name in (("bert", "LayerNormalization"), ("llama", "RMSNormalization")):
        wide, narrow = graphs.model(2, kind), graphs.half(graphs.model(2, kind))
        steps = {}
        for dtype, model in (("float32", wide), ("float16", narrow)):
            plan = rewrite.build(rewrite.optimize(model).model, tmp_path / f"{kind}-{dtype}", engines=False)  # compared with the model
            steps[dtype] = [s for s in plan.manifest.steps if s.name == name]
        assert not steps["float32"]  # there is no kernel: TensorRT has them
        assert len(steps["float16"]) == 4
        assert all(s.attributes["axis"] == -1 and "stash_type" not in s.attributes for s in steps["float16"])


def test_a_norm_over_other_axes_stays_in_its_segment(tmp_path):
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float16[n, 4, 8] x) => (float16[n, 4, 8] y) <float16[4, 8] w = {%s}> { y = LayerNormalization<axis = -2>(x, w) }'
    model = onnx.parser.parse_model(text % ", ".join(["1"] * 32))
    plan = rewrite.build(model, tmp_path / "p", engines=False, verify=False)
    assert [s.kind for s in plan.manifest.steps] == ["segment"]


def test_what_was_measured_stays_with_the_plan_and_is_shown(tmp_path):
    plan = rewrite.build(graphs.model(1, "bert"), tmp_path / "p", engines=False, verify=False)
    plan.manifest.tuning = {"product float16 32x64x64 none bias": {"narrow 16": 2.75, "cuBLASLt": 3.5}}
    plan.manifest.versions["tuned on"] = "NVIDIA H100 80GB HBM3"
    (tmp_path / "p" / MANIFEST).write_text(plan.manifest.to_json())
    seal.seal(tmp_path / "p", None)
    assert rewrite.Plan(tmp_path / "p").manifest.tuning == plan.manifest.tuning
    shown = subprocess.run([sys.executable, "-m", "rewrite.cli", "inspect", str(tmp_path / "p")], capture_output=True, text=True, check=True).stdout
    assert "kernels, timed on NVIDIA H100 80GB HBM3" in shown
    assert "product float16 32x64x64 none bias  narrow 16  2.8  cuBLASLt 3.5" in shown
    for wrong in ({"call": {"narrow 16": "2"}}, {"call": 2.0}, []):
        data = json.loads(plan.manifest.to_json())
        data["tuning"] = wrong
        with pytest.raises(ValueError, match="tuning"):
            Manifest.from_json(json.dumps(data))


def test_tuning_needs_a_gpu_and_says_so_first(tmp_path):
    onnx.save(graphs.model(1, "bert"), tmp_path / "m.onnx")
    done = subprocess.run([sys.executable, "-m", "rewrite.cli", "build", "--tune", "m.onnx", "-o", "p"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "device cuda" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "p").exists()
    with pytest.raises(rewrite.RewriteError, match="nothing to tune on the CPU"):
        rewrite.build(graphs.model(1, "bert"), tmp_path / "q", engines=False, verify=False).tune({})


@pytest.mark.parametrize("name", ["gemm", "attention", "paged_prefill", "norms", "masks"])
def test_a_source_is_whole_before_it_is_compiled(name, monkeypatch):
    """NVRTC gets one text: no header is looked for on the user's machine."""
    given: list[tuple[str, tuple[str, ...]]] = []
    monkeypatch.setattr(cuda_launch, "_binary", lambda source, options: given.append((source, options)) or b"")
    cuda_launch.compiled(name, "bfloat16", ("D=64",), (("WGMMA\n", "// here\n"),), 90)
    ((source, options),) = given
    assert "#include" not in source
    assert source.count("typedef unsigned int u32;") == 1
    assert {"-arch=sm_90a", "-DBFLOAT16=1", "-DD=64"} <= set(options)


def test_compiled_kernels_are_kept_and_a_damaged_file_is_compiled_again(tmp_path, monkeypatch):
    compiled = []
    fake = types.SimpleNamespace(
        getVersion=lambda: (13, 0), createProgram=lambda *a: a[0], compileProgram=lambda program, options: compiled.append(program), getCUBIN=lambda p: b"binary", destroyProgram=lambda p: None,
        NVRTCError=ValueError,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=types.SimpleNamespace(nvrtc=fake)))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(nvrtc=fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [cuda_launch._binary("source", ("-a",)) for _ in range(3)] == [b"binary"] * 3
    assert compiled == ["source"]
    (file,) = (tmp_path / "rewrite" / "kernels").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert cuda_launch._binary("source", ("-a",)) == b"binary"
    assert len(compiled) == 2
    assert cuda_launch._binary("source", ("-b",)) == b"binary"
    assert len(compiled) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # a cache that cannot be
    assert cuda_launch._binary("source", ("-a",)) == b"binary"
