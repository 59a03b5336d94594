"""Text generation on a GPU: logits, caches and greedy tokens are the CPU's, whatever the schedule; nothing is allocated once all is made."""

from __future__ import annotations

import os
from pathlib import Path

import generate_cases as cases
import numpy as np
import pytest

from rewrite.runtime.advance import advance
from rewrite.runtime.batch import Batch

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Made here, or before, by `generate_cases.py FOLDER` where exporting is quick, and named by GENERATE_CASES=FOLDER."""
    made = {}

    def plan(name, dtype):
        if ready := os.environ.get("GENERATE_CASES"):
            return Path(ready, f"{name}-{dtype}", "plan")
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{dtype}")
            cases.make_plan(name, dtype, folder)
            made[name, dtype] = folder / "plan"
        return made[name, dtype]

    return plan


@pytest.mark.parametrize(("name", "dtype"), cases.CASES)
def test_logits_and_caches_are_the_cpus(plans, name, dtype):
    assert cases.compare_logits(plans(name, dtype), dtype) == ""


@pytest.mark.parametrize(("name", "dtype"), cases.CASES)
def test_texts_are_the_cpus(plans, name, dtype):
    lines = cases.compare_texts(plans(name, dtype), dtype)
    assert all(line.endswith(": ok") for line in lines), "\n".join(lines)


def test_nothing_is_allocated_once_the_frames_are_there(plans):
    assert cases.allocations(plans("llama", "bfloat16")) == 0


def test_a_step_is_enqueued_in_less_than_a_tenth_of_a_millisecond(plans):
    assert cases.enqueue_us(plans("llama", "bfloat16")) < 100


@pytest.mark.parametrize("rows", [1, 5, 64, 1500])
def test_the_kernel_makes_the_next_batch(rows):
    import cupy

    from rewrite.plugins import cuda_decoding

    rng = np.random.default_rng(rows)
    width, block, real = 6, 16, max(1, rows * 3 // 4)
    positions = rng.integers(0, (width - 1) * block, rows)
    tables = rng.integers(0, 5000, (rows, width)).astype(np.int32)
    slots = np.where(np.arange(rows) < real, tables[np.arange(rows), positions // block] * block + positions % block, -1).astype(np.int32)
    batch = Batch(rng.integers(0, 999, rows), positions, slots, tables, np.arange(rows + 1), (positions + 1).astype(np.int32), np.arange(rows))
    at = {n: cupy.asarray(a) for n, a in {"tokens": batch.tokens, "positions": positions, "slots": slots, "lengths": batch.context_lengths, "tables": tables}.items()}
    chosen = cupy.zeros(rows, np.int64)
    launch = cuda_decoding.advance(chosen, *at.values(), block)
    for _ in range(3):
        tokens = rng.integers(0, 9, rows)
        chosen.set(tokens)
        launch()
        cupy.cuda.get_current_stream().synchronize()
        batch = advance(batch, tokens, block)
        for name, want in (("tokens", batch.tokens), ("positions", batch.positions), ("slots", batch.slots), ("lengths", batch.context_lengths)):
            np.testing.assert_array_equal(at[name].get(), want, name)


def test_blocks_are_copied_in_all_caches():
    import cupy

    from rewrite.plugins.cuda_decoding import BlockCopies

    rng = np.random.default_rng(0)
    caches = [rng.standard_normal((40, *shape)).astype(dtype) for shape, dtype in (((16, 2, 64), "float16"), ((16, 2, 8), "float32"), ((1, 1, 3), "float16"))]
    on_device = [cupy.asarray(c) for c in caches]
    pairs = rng.permutation(40)[:20].reshape(10, 2).astype(np.int32)
    BlockCopies(on_device).copy(cupy.asarray(pairs))
    for cache, found in zip(caches, on_device, strict=True):
        cache[pairs[:, 1]] = cache[pairs[:, 0]]
        np.testing.assert_array_equal(found.get(), cache)
