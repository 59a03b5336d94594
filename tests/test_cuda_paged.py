"""CUDA kernels of attention over a paged cache, and of rotary embedding: emulated on the CPU, and on a GPU (marker `gpu`)."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulated_gpu import COMPILER, Emulator, on_device
from paged_cases import LIMITS, Case, cases

from rewrite.plugins import cuda_paged, cuda_rotary
from rewrite.plugins.paged_attention import PagedAttention
from rewrite.plugins.rotary import Rotary

emulated = pytest.mark.skipif(COMPILER is None, reason="there is no g++")


@pytest.fixture(scope="module")
def compiled_kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def gpu(monkeypatch, compiled_kernels):
    """A GPU of three multiprocessors, emulated."""
    made = Emulator(compiled_kernels)

    def scratch(what, count, dtype):
        return on_device(np.zeros(count, np.int32) if what == "arrived" else np.full(count, np.nan).astype(dtype))

    for module in (cuda_paged, cuda_rotary):
        monkeypatch.setattr(module, "module", made.module)
        monkeypatch.setattr(module, "launcher", made.launcher)
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    monkeypatch.setattr(cuda_paged, "processors", lambda: 3)
    monkeypatch.setattr(cuda_paged, "scratch", scratch)
    return made


def division(case, cluster=0, **options):
    """So small parts that heads are divided even in a small test."""
    return cuda_paged.cut(case.size, case.value_size or case.size, case.heads // case.kv_heads, least=1, cluster=cluster, **options)


def launched(case, **options):
    """The results of a case on poisoned outputs, launched twice: what the first leaves in its scratch must not disturb the second."""
    inputs = [on_device(a) for a in case.inputs()]
    q, v = inputs[0], inputs[2]
    y = on_device(np.full((1, q.shape[2], case.heads, v.shape[3]), np.nan).astype(q.dtype).transpose(0, 2, 1, 3))
    launch = cuda_paged.paged_attention(inputs, [y, *inputs[3:5]], **case.attributes(), **options)
    launch()
    y[...] = np.nan
    for cache, old in zip(inputs[3:5], case.inputs()[3:5], strict=True):
        cache[...] = old
    launch()
    return [np.asarray(a) for a in (y, *inputs[3:5])]


OFTEN = {
    "ragged", "padding", "several tokens where there is room for one each", "more tokens, turned", "window", "soft cap", "pairs of a part", "norm and halves", "float32", "sizes 40 and 72",
    "blocks of 5", "ratio 3",
}  # fmt: skip
OFTEN_IN_CLUSTERS = {"padding", "split", "several tokens where there is room for one each"}


@emulated
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=() if c.name in OFTEN else pytest.mark.slow) for c in cases()])
def test_the_emulated_kernels_compute_what_float64_computes(case, gpu):
    assert case.make().complaint(*launched(case, made=division(case))) == ""


@emulated
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=() if c.name in OFTEN_IN_CLUSTERS else pytest.mark.slow) for c in cases() if c.dtype != "float32"])
def test_a_cluster_for_each_head_computes_the_same(case, gpu):
    assert case.make().complaint(*launched(case, made=division(case, 4), early=True)) == ""


@emulated
@pytest.mark.parametrize("backwards", [False, True])
def test_blocks_may_end_in_any_order(gpu, backwards):
    gpu.backwards = backwards
    case = Case([1, 1], [300, 17]).make()
    assert case.complaint(*launched(case, made=division(case))) == ""
    assert gpu.grids[-1] == (6, 1)


# --- rotary ------------------------------------------------------------------------------------------------------------
def rotary_inputs(kind, dtype, rng):
    """x [2, 4, 5, 80] as a view of [2, 5, 4, 80], and angles of `kind`."""
    x = rng.standard_normal((2, 5, 4, 80)).transpose(0, 2, 1, 3)
    shapes = {"of positions": (2, 1, 5, 80), "without heads": (2, 5, 80), "half": (2, 5, 40), "of all": (80,), "a part": (5, 32)}
    return [a.astype(getattr(ml_dtypes, dtype, dtype)) for a in (x, *(rng.standard_normal(shapes[kind]) for _ in range(2)))]


@emulated
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("kind", "interleaved"), [("of positions", 0), ("without heads", 1), ("half", 0), ("half", 1), ("of all", 0), ("a part", 1)])
def test_the_emulated_rotary_computes_what_float64_computes(kind, interleaved, dtype, gpu):
    arrays = rotary_inputs(kind, dtype, np.random.default_rng(0))
    size = 32 if kind == "a part" else 0
    y = on_device(np.full((2, 4, 5, 80), np.nan).astype(arrays[0].dtype))
    cuda_rotary.rotary([on_device(a) for a in arrays], [y], interleaved=interleaved, size=size)()
    want = Rotary.reference(*(a.astype(np.float64) for a in arrays), interleaved=interleaved, size=size)
    assert np.linalg.norm(np.asarray(y).astype(np.float64) - want) < LIMITS[dtype] * np.linalg.norm(want)


def test_rotary_that_no_kernel_takes():
    x, cos = np.zeros((2, 4, 5, 80), np.float16), np.zeros((5, 80), np.float16)
    strange = [a.astype(np.float64) for a in (x, cos, cos)]
    for wrong in (strange, [x, cos.astype(np.float32), cos], [x, cos[:4], cos[:4]], [x[..., ::2], cos[:, :40], cos[:, :40]], [x, cos[:, :24], cos[:, :24]]):
        assert cuda_rotary.rotary(wrong, [wrong[0]], interleaved=0, size=0) is None
    assert cuda_rotary.rotary([x, cos, cos], [x], interleaved=0, size=82) is None
    assert cuda_rotary.steps(cos[None, None], (2, 4, 5)) == (0, 0, 80)
    assert cuda_rotary.steps(np.zeros((2, 1, 5, 80), np.float32), (2, 4, 5)) == (400, 0, 80)
    assert cuda_rotary.steps(cos, (2, 4, 6)) is None


# --- which kernel, and how the work is divided -------------------------------------------------------------------------
def test_shared_memory_suffices_for_every_size_and_division():
    for size in range(8, 257, 8):
        for value_size in (8, size, 256):
            for cluster in (0, 8, 16):
                made = cuda_paged.cut(size, value_size, 4, cluster=cluster)
                assert made.stages >= 2
                assert made.blocks * (made.shared(size, value_size, 4) + 1024) <= 228 << 10
    assert cuda_paged.cut(128, 128, 4).blocks == 2
    assert cuda_paged.cut(256, 256, 4).blocks == 1


def test_grids_depend_on_shapes_alone(monkeypatch):
    monkeypatch.setattr(cuda_paged, "processors", lambda: 132)
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    many = cuda_paged.choose(128, 128, 4, 32 * 8, 1024)
    assert many.cluster == 0
    assert cuda_paged.grid(32, 8, 64, 16, many) == (132 * many.blocks, 1)
    assert cuda_paged.grid(1, 8, 1, 16, many) == (2, 1)  # a table of 16 positions: at most two tiles a head
    one = cuda_paged.choose(128, 128, 4, 8, 1024)
    assert cuda_paged.grid(1, 8, 64, 16, one) == (8, 8)


def test_clusters_serve_few_texts(monkeypatch):
    monkeypatch.setattr(cuda_paged, "processors", lambda: 132)
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    assert [cuda_paged.choose(128, 128, 4, 8 * batch, 1024).cluster for batch in (1, 2, 3, 32)] == [8, 4, 0, 0]
    assert cuda_paged.choose(128, 128, 4, 8, 1 << 17).cluster == 8
    assert cuda_paged.choose(256, 256, 4, 1, 8192).cluster == 8
    assert cuda_paged.choose(256, 256, 4, 1, 1 << 15).cluster == 0  # one key head, long texts: all of the GPU reads them
    monkeypatch.setattr(cuda_paged, "capability", lambda: 80)
    assert cuda_paged.choose(128, 128, 4, 8, 1024).cluster == 0  # clusters are Hopper's


def refused(case, monkeypatch, **changes):
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    inputs = [on_device(a) for a in case.make().inputs()]
    names = [n.rstrip("?") for n in PagedAttention.inputs]
    for name, change in changes.items():
        inputs[names.index(name)] = change(inputs[names.index(name)])
    y = on_device(np.zeros((1, inputs[0].shape[2], case.heads, inputs[2].shape[3])).astype(inputs[0].dtype).transpose(0, 2, 1, 3))
    return cuda_paged.paged_attention(inputs, [y, *inputs[3:5]], **case.attributes()) is None


def test_arrays_that_no_kernel_takes(monkeypatch):
    case = Case([1, 1], [20, 16], turn=1, norm="float32")
    assert refused(case, monkeypatch, q=lambda a: on_device(np.asarray(a).astype(np.float16)))  # of another type than the caches
    assert refused(case, monkeypatch, slots=lambda a: on_device(np.asarray(a).astype(np.int64)))
    assert refused(case, monkeypatch, block_tables=lambda a: a[:, ::2])  # not packed
    assert refused(case, monkeypatch, cos=lambda a: on_device(np.asarray(a).repeat(4, 1)))  # of each head
    assert refused(case, monkeypatch, sin=lambda a: None)
    assert refused(case, monkeypatch, q_scale=lambda a: on_device(np.asarray(a).astype(np.float64)))
    assert refused(Case([1], [20], size=264), monkeypatch)
    assert refused(Case([1], [20], size=36), monkeypatch)
    assert refused(Case([1], [20], size=64, turn=1, turned=66), monkeypatch)
    monkeypatch.setattr(cuda_paged, "_decode", lambda *arguments: "a launch")
    monkeypatch.setattr(cuda_paged, "processors", lambda: 132)
    assert not refused(case, monkeypatch)


def test_reading_early_is_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    monkeypatch.setattr(cuda_paged, "_decode", lambda *arguments: seen.append(arguments[5]))
    inputs = [on_device(a) for a in Case([1], [20], kv_heads=4).make().inputs()]

    def launch(**options):
        cuda_paged.paged_attention(inputs, [inputs[0], *inputs[3:5]], **Case([1], [20], kv_heads=4).attributes(), **options)

    launch()
    with cuda_paged.reading_early():
        launch()
        launch(early=False)
    launch()
    launch(early=True)
    assert seen == [False, True, False, False, True]


def test_launches_of_a_stream_share_their_scratch(monkeypatch):
    now = types.SimpleNamespace(stream=5)
    cuda = types.SimpleNamespace(Device=lambda: types.SimpleNamespace(id=0), get_current_stream=lambda: types.SimpleNamespace(ptr=now.stream))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, zeros=np.zeros))
    monkeypatch.setattr(cuda_paged, "_scratch", {})
    first = cuda_paged.scratch("parts", 100, "float32")
    assert cuda_paged.scratch("parts", 60, "float32") is first
    assert cuda_paged.scratch("arrived", 60, "int32") is not first
    assert cuda_paged.scratch("parts", 101, "float32").size == 101
    now.stream = 6
    assert cuda_paged.scratch("parts", 60, "float32").size == 60


def test_a_step_without_tokens_launches_nothing(monkeypatch):
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    monkeypatch.setattr(cuda_paged, "module", None)
    inputs = [on_device(a) for a in Case([0], [20]).make().inputs()]
    launch = cuda_paged.paged_attention(inputs, [inputs[0], *inputs[3:5]], **Case([0], [20]).attributes())
    assert launch() is None


@emulated
@pytest.mark.parametrize("length", [120, 300])
def test_few_texts_on_a_large_gpu(length, gpu, monkeypatch):
    """A short one is the first block's alone."""
    monkeypatch.setattr(cuda_paged, "processors", lambda: 132)
    case = Case([1, 1], [length, 40], turn=1).make()
    assert case.complaint(*launched(case)) == ""
    assert gpu.grids[-1] == (8, 4)


@emulated
def test_prompts_go_to_the_kernel_for_prompts_once_all_is_stored(gpu, monkeypatch):
    case, seen = Case([5, 1], [20, 16], turn=1).make(), []

    def prefill(q, keys, values, y, tables, starts, lengths, **options):
        def launch():
            seen.append([np.array(a) for a in (q, keys, values)])
            y[...] = 0

        assert options == {"scale": 0.2, "window": 0, "softcap": 0.0}
        return launch

    monkeypatch.setattr(cuda_paged, "find_spec", lambda name: name == "rewrite.plugins.cuda_paged_prefill")
    monkeypatch.setattr(cuda_paged, "import_module", lambda name: types.SimpleNamespace(prefill=prefill))
    y = launched(case)[0]
    assert not y.any()
    q, keys, values = seen[-1]
    want = case.expected()
    used = case.arrays["slots"]
    for got, wanted in ((keys, want[1]), (values, want[2])):
        np.testing.assert_allclose(got.reshape(-1, 2, 64)[used].astype(np.float64), wanted.reshape(-1, 2, 64)[used], rtol=2e-2, atol=1e-2)
    turned = Rotary.reference(*(case.arrays[n].astype(np.float64) for n in ("q", "cos", "sin")), interleaved=0, size=0)
    np.testing.assert_allclose(q.astype(np.float64), turned, rtol=2e-2, atol=1e-2)


@emulated
def test_outputs_that_are_not_the_caches_get_a_copy(gpu):
    case = Case([1, 1], [20, 16]).make()
    inputs = [on_device(a) for a in case.inputs()]
    keys, values = (on_device(np.zeros_like(np.asarray(a))) for a in inputs[3:5])
    y = on_device(np.full((1, 2, 4, 64), np.nan).astype(inputs[0].dtype).transpose(0, 2, 1, 3))
    cuda_paged.paged_attention(inputs, [y, keys, values], **case.attributes())()
    assert case.complaint(*map(np.asarray, (y, keys, values))) == ""
    assert np.asarray(inputs[3]).tobytes() == case.arrays["key_cache"].tobytes()


# --- on a GPU ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def paged_speed(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import paged_speed

    return paged_speed


@pytest.mark.gpu
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases()])
def test_the_kernels_compute_what_float64_computes(case, paged_speed):
    case.make()
    for made in paged_speed.divisions(case):
        assert paged_speed.run_case(case, made, 3) == ""


@pytest.mark.gpu
def test_rotary_computes_what_float64_computes(paged_speed):
    rows = paged_speed.check_rotary()
    assert [r for r in rows if r["wrong"]] == []
