"""CUDA kernels of attention over a paged cache, and of rotary embedding: emulated on the CPU, and on a GPU (marker `gpu`)."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from emulated_gpu import COMPILER, Emulator, on_device
from paged_cases import Case, cases

from rewrite.plugins import cuda_paged, cuda_rotary

emulated = pytest.mark.skipif(COMPILER is None, reason="there is no g++")


@pytest.fixture(scope="module")
def compiled_kernels(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def gpu(monkeypatch, compiled_kernels):
    """A GPU of three multiprocessors, emulated."""
    made = Emulator(compiled_kernels)

    def empty(shape, dtype):
        return on_device(np.full(shape, np.nan, dtype))

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(empty=empty))
    for module in (cuda_paged, cuda_rotary):
        monkeypatch.setattr(module, "module", made.module)
        monkeypatch.setattr(module, "launcher", made.launcher)
    monkeypatch.setattr(cuda_paged, "capability", lambda: 90)
    monkeypatch.setattr(cuda_paged, "prefill", lambda *_, **__: None)  # wgmma is not emulated
    monkeypatch.setattr(cuda_paged, "processors", lambda: 3)
    monkeypatch.setattr(cuda_paged, "scratch", lambda parts, counters: (empty(parts, np.float32), on_device(np.zeros(counters, np.int32))))
    return made


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


@emulated
@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=() if c.name in OFTEN else pytest.mark.slow) for c in cases()])
def test_the_emulated_kernels_compute_what_float64_computes(case, gpu):
    assert case.make().complaint(*launched(case, least=1)) == ""


@emulated
@pytest.mark.parametrize("backwards", [False, True])
def test_blocks_may_end_in_any_order(gpu, backwards):
    gpu.backwards = backwards
    case = Case([1, 1], [300, 17]).make()
    assert case.complaint(*launched(case, least=1)) == ""
    assert gpu.grids[-1] == (6,)
