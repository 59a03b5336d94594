"""Attention of many new tokens over a paged cache: the CUDA kernel beside the reference in float64, and how its work is divided."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import subprocess
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rewrite.plugins import cuda_paged_prefill
from rewrite.plugins.cuda_launch import MOST_SHARED, compiled
from rewrite.plugins.cuda_paged_prefill import CUTS, FAR, packed, prefill, shared_bytes, takes, tiles, variant
from rewrite.plugins.paged_attention import PagedAttention

gpu = pytest.mark.gpu


# --- without a GPU ------------------------------------------------------------------------------------------------
def test_the_heads_of_a_tile_are_a_part_of_a_group():
    assert [packed(*n) for n in ((4, 4), (32, 8), (24, 8), (8, 1), (16, 1), (32, 1), (71, 1), (40, 2))] == [1, 4, 3, 8, 16, 16, 1, 10]


def test_no_batch_has_more_tiles_than_are_counted():
    rng = np.random.default_rng(0)
    for _ in range(300):
        span, batch = int(rng.choice([4, 16, 42, 128])), int(rng.integers(1, 9))
        counts = rng.integers(0, 3 * span, batch + 1)  # the last one: tokens of no sequence
        assert -(-counts // span).sum() <= tiles(int(counts.sum()), batch, span)


@pytest.mark.parametrize("size", CUTS)
def test_every_cut_fits_the_gpu(size):
    cut = CUTS[size]
    assert shared_bytes(size, cut) <= MOST_SHARED
    for page in (16, 32, 48, 64, 128):  # a lane of a warp has a box each of keys and values
        box = (page | cut.keys) & -(page | cut.keys)
        assert page % box == cut.keys % box == box % 16 == 0
        assert cut.keys // box * (size // (32 if size % 64 else 64)) <= 32
    name, _, defines, ((mark, code),) = variant(size, 16, 4, "bfloat16", False, cut)
    source = (Path(cuda_paged_prefill.__file__).parent / f"{name}.cu").read_text()
    assert source.count(mark) == 1
    assert all(source.count(d.split("=")[0]) > 1 for d in defines)
    assert {f"struct Wgmma<{n}> {{" for n in (cut.keys, size)} <= {line.removeprefix("template <> ") for line in code.splitlines()}


def described(shape, dtype="float16", strides=None, address=256):
    packed_strides = [2 * int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    return types.SimpleNamespace(shape=shape, dtype=np.dtype(dtype), strides=tuple(strides or packed_strides), data=types.SimpleNamespace(ptr=address))


def test_what_the_kernel_does_not_take_is_refused(monkeypatch):
    monkeypatch.setattr(cuda_paged_prefill, "capability", lambda: 90)
    q, cache = described((1, 8, 5, 64)), described((10, 16, 2, 64))
    view = described((1, 8, 5, 64), strides=(5120, 128, 1024, 2))
    assert takes(q, cache, cache, view, 0.1, 0.0)
    assert takes(q, cache, cache, q, -0.1, 5.0)
    small = described((10, 16, 2, 40))
    refused = [
        (described((1, 8, 5, 64), "float32"), cache, cache, q, 0.1), (described((1, 8, 5, 40)), small, small, described((1, 8, 5, 40)), 0.1),
        (q, described((10, 8, 2, 64)), described((10, 8, 2, 64)), q, 0.1), (q, described((10, 16, 3, 64)), described((10, 16, 3, 64)), q, 0.1),
        (q, cache, described((10, 16, 2, 32)), described((1, 8, 5, 32)), 0.1), (q, cache, cache, q, 0.0), (q, cache, cache, described((1, 8, 5, 64), address=8), 0.1),
        (described((1, 8, 5, 64), strides=(5120, 8, 1024, 16)), cache, cache, q, 0.1), (described((1, 8, 0, 64)), cache, cache, described((1, 8, 0, 64)), 0.1),
        (q, described((10, 16, 2, 64), "int16"), cache, q, 0.1),
    ]  # fmt: skip
    assert not any(takes(*arrays, 0.0) for arrays in refused)
    monkeypatch.setattr(cuda_paged_prefill, "capability", lambda: 80)
    assert not takes(q, cache, cache, view, 0.1, 0.0)
    assert prefill(q, cache, cache, view, None, None, None, scale=0.1, window=0, softcap=0.0) is None


FIND = """
#include <cstdio>
#include "one_warp.hpp"
#define KT {keys}
#define SPAN {span}
{source}
int main() {{
    int batch, tokens, slices, window, room;
    while (scanf("%d %d %d %d %d", &batch, &tokens, &slices, &window, &room) == 5) {{
        std::vector<int> starts(batch + 1), lengths(batch);
        for (int& n : starts) scanf("%d", &n);
        for (int& n : lengths) scanf("%d", &n);
        Prefill c{{}};
        c.starts = starts.data(), c.lengths = lengths.data(), c.batch = batch, c.tokens = tokens, c.slices = slices, c.window = window;
        Tile t;
        warp([&] {{
            for (int i = 0; i < room; ++i) {{
                find(c, survey(c), i, &t);
                if (threadIdx.x == 0) printf("%d %d %d %d %d %d %d %d\\n", t.token, t.tokens, t.position, t.length, t.sequence, t.slice, t.first, t.end);
                __syncwarp();
            }}
        }});
    }}
}}
"""


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize(("keys", "span"), [(128, 32), (64, 128), (128, 42)])
def test_every_tile_is_found_once_and_the_heaviest_first(keys, span, tmp_path):
    """The text of the kernel's own source, run by 32 threads."""
    source = (Path(cuda_paged_prefill.__file__).parent / "paged_prefill.cu").read_text()
    wanted = source[source.index("struct Prefill {") : source.index("#define INF")] + source[source.index("struct Sequence {") : source.index("// --- products")]
    (tmp_path / "find.cpp").write_text(FIND.format(keys=keys, span=span, source=wanted))
    subprocess.run(["g++", "-std=c++20", "-O1", "-pthread", "-w", f"-I{Path(__file__).parent}", "-o", tmp_path / "find", tmp_path / "find.cpp"], check=True)
    rng, asked, wants = np.random.default_rng(keys + span), [], []
    for batch, slices, padding, window in [(1, 8, 0, FAR), (3, 2, 5, FAR), (32, 1, 150, 300), (33, 1, 0, FAR), (70, 1, 1, keys), (2, 1, 0, 1)]:
        counts = rng.choice([1, 1, 2, span - 1, span, span + 1, 3 * span, 0], batch)
        lengths = counts + rng.choice([0, 0, 1, keys - 1, keys, keys + 1, 500], batch)
        counts[0] += 1  # a sequence whose length is wrong: its first token stands nowhere
        starts = np.r_[0, np.cumsum(counts)]
        want = []
        for b, (count, length) in enumerate(zip([*counts, padding], [*lengths, 0], strict=True)):
            for place, slice_ in itertools.product(range(0, count, span), range(slices)):
                position, tokens = length - count + place, min(span, count - place)
                want.append((starts[b] + place, tokens, position, length, b, slice_, max(0, position - window + 1) // keys, -(-max(0, position + tokens) // keys)))
        wants.append((want, window))
        numbers = [batch, counts.sum() + padding, slices, window, len(want) + 3, *starts, *lengths]
        asked.append(" ".join(map(str, numbers)))
    lines = subprocess.run([tmp_path / "find"], input="\n".join(asked), capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    for want, window in wants:
        got, lines = [tuple(map(int, line.split())) for line in lines[: len(want) + 3]], lines[len(want) + 3 :]
        assert sorted(got[:-3]) == sorted(want)
        assert all(t[1] == 0 for t in got[-3:])
        weights = [min(t[7], (window + span) // keys + 2) for t in got[:-3]]
        assert weights == sorted(weights, reverse=True)
    assert not lines


# --- on a GPU -----------------------------------------------------------------------------------------------------
LIMITS = {"float16": 2e-3, "bfloat16": 1.2e-2}  # ||got - want|| / ||want|| of the worst token and head


class Step:
    """A ragged batch: queries of some tokens at the end of each sequence, caches whose blocks lie anywhere, and the answer in float64.

    What must not matter is poison: unused blocks, positions past a sequence, entries of the table past its blocks, y itself.
    """

    def __init__(self, counts, histories, heads, kv_heads, size, page, dtype, *, padding=0, strided=False, columns=0, seed=0):
        import cupy

        rng = np.random.default_rng(seed)
        counts, histories = np.asarray(counts), np.asarray(histories)
        self.counts, self.lengths = counts, (counts + histories).astype(np.int32)
        self.starts = np.r_[0, np.cumsum(counts)].astype(np.int32)
        self.heads, self.kv_heads, self.size, self.page, self.dtype, tokens = heads, kv_heads, size, page, dtype, int(counts.sum()) + padding
        needed = -(-self.lengths // page)
        blocks = int(needed.sum()) + 5
        order = rng.permutation(blocks)
        self.tables = rng.choice([-7, blocks, 1 << 30, -(1 << 31)], (len(counts), max(int(needed.max()), columns))).astype(np.int32)
        exact = [rng.standard_normal((blocks, page, kv_heads, size)).astype(np.float32) for _ in range(2)]
        used = np.zeros((blocks, page), bool)
        for b, count in enumerate(needed):
            mine = order[needed[:b].sum() : needed[: b + 1].sum()]
            self.tables[b, :count] = mine
            used[mine] = (np.arange(count * page) < self.lengths[b]).reshape(count, page)
        queries = rng.standard_normal((tokens, heads, size)).astype(np.float32)
        narrow = lambda a: cupy.asarray(a).astype(dtype)  # noqa: E731
        whole = lambda a: a.astype(cupy.float64).get()  # noqa: E731
        self.caches = [narrow(np.where(used[:, :, None, None], a, np.nan)) for a in exact]
        wide = narrow(np.concatenate([queries, queries + 1], 2)) if strided else narrow(queries)  # heads with something between them
        self.q = wide[:, :, :size].transpose(1, 0, 2)[None]
        room = cupy.full((tokens, heads * (2 if strided else 1), size), np.nan, dtype)
        self.y, self.between = room[:, :heads].transpose(1, 0, 2)[None], room[:, heads:]
        self.clean = [np.where(used[:, :, None, None], whole(a), 0) for a in self.caches]
        self.indices = [cupy.asarray(a) for a in (self.tables, self.starts, self.lengths)]

    def launch(self, scale=0.25, window=0, softcap=0.0, cut=None):
        made = prefill(self.q, *self.caches, self.y, *self.indices, scale=scale, window=window, softcap=softcap, cut=cut)
        assert made is not None
        return made

    def want(self, scale=0.25, window=0, softcap=0.0):
        import cupy

        q = self.q.astype(cupy.float64).get()
        nothing, nowhere = np.zeros((1, self.kv_heads, q.shape[2], self.size)), np.full(q.shape[2], -1, np.int32)
        tables = np.where((self.tables >= 0) & (self.tables < len(self.clean[0])), self.tables, 0)
        attributes = {"heads": self.heads, "kv_heads": self.kv_heads, "size": self.size, "scale": scale, "window": window, "softcap": softcap, "layer": 0}
        return PagedAttention.reference(q, nothing, nothing, *self.clean, nowhere, tables, self.starts, self.lengths, **attributes)[0]

    def check(self, what, **options):
        """Nothing, or a line about the worst token and head."""
        import cupy

        want, got = self.want(**options), self.y.astype(cupy.float64).get()
        size = np.linalg.norm(want, axis=-1)
        error = np.linalg.norm(got - want, axis=-1) / np.where(size > 0, size, 1)
        error = np.where(np.isnan(error), np.inf, error)[0]
        worst = float(error.max())
        if not bool(cupy.isnan(self.between).all()):
            return [f"{what} {options}: written beside the heads"]
        if worst < LIMITS[self.dtype]:
            return []
        head, token = np.unravel_index(int(error.argmax()), error.shape)
        b = int(np.searchsorted(self.starts, token, "right")) - 1
        where = f"head {head}, token {token} (of sequence {b}: {list(zip(self.counts, self.lengths, strict=True))[b] if b < len(self.counts) else 'none'})"
        return [f"{what} {options}: {worst:.1e} at {where}; wrong {(error >= LIMITS[self.dtype]).mean():.1%}"]


# heads, kv_heads, size, page, options
CASES = [
    (4, 4, 128, 16, {}), (8, 4, 128, 16, {}), (6, 2, 128, 16, {}), (8, 2, 128, 16, {}), (8, 1, 128, 16, {}), (17, 1, 128, 16, {}), (32, 1, 128, 32, {}),
    (8, 2, 128, 48, {}), (8, 2, 128, 64, {}), (8, 2, 128, 128, {}), (8, 2, 128, 16, {"window": 1}), (8, 2, 128, 16, {"window": 100}), (4, 4, 128, 16, {"window": 128}),
    (8, 2, 128, 16, {"softcap": 3.0}), (8, 2, 128, 16, {"softcap": 50.0, "window": 200}), (8, 2, 64, 16, {}), (4, 4, 64, 16, {}), (6, 2, 64, 32, {"window": 77}), (8, 1, 64, 128, {"softcap": 5.0}),
    (4, 2, 32, 16, {}), (6, 3, 96, 16, {}), (4, 4, 96, 32, {"window": 50}), (6, 2, 192, 16, {}), (4, 2, 256, 16, {}), (4, 1, 256, 64, {"window": 60, "softcap": 30.0}),
    (8, 2, 128, 16, {"scale": -0.2, "softcap": 9.0}),
]  # fmt: skip


def variants():
    """What `compiled` needs for all cases."""
    found = {variant(size, page, packed(heads, kv), dtype, bool(options.get("softcap")), CUTS[size]) for (heads, kv, size, page, options), dtype in itertools.product(CASES, LIMITS)}
    return sorted(found)


def compile_one(wanted):
    compiled(*wanted, 90)


@pytest.fixture(scope="module")
def kernels():
    """All kernels in the cache, compiled by all processors."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, variants()))


def batches(span, keys, page):
    """Numbers of new tokens and of those before them, around every edge of tiles, steps and blocks."""
    edges = [max(1, n) for n in (1, 2, span - 1, span, span + 1, 2 * span + 3)]
    history = (0, 1, page - 1, page, keys - 1, keys, keys + 1, 2 * keys + page + 5)
    for shift in (0, 3):
        yield tuple(edges) * 2, tuple(np.roll(history, shift)) + tuple(np.roll(history, -shift)[:4])
    yield (keys - 1, keys, keys + 1, 3 * keys + 7), (0, 0, 0, 0)
    yield (1,), (0,)
    yield (1,) * 40, tuple(range(0, 400, 10))
    yield (0, 5, 0, 0, 300, 0, 1), (0, 40, 0, 9, 200, 0, 700)


@gpu
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[:4])) + "".join(f"-{k}{v}" for k, v in c[4].items()))
def test_ragged_batches(case, dtype, kernels):
    heads, kv_heads, size, page, options = case
    cut, wrong = CUTS[size], []
    span = 64 * cut.groups // packed(heads, kv_heads)
    for n, (counts, histories) in enumerate(batches(span, cut.keys, page)):
        padding, strided = (0, span + 3, 7)[n % 3], n % 2 == 1
        step = Step(counts, histories, heads, kv_heads, size, page, dtype, padding=padding, strided=strided, columns=n % 2 * 60, seed=n)
        step.launch(**options)()
        wrong += step.check(f"{case[:4]} {dtype} batch {n} padding {padding} strided {strided}", **options)
    print(f"prefill {case} {dtype}: {wrong or 'right'}", flush=True)
    assert not wrong


@gpu
@pytest.mark.parametrize("size", [64, 128])
def test_more_tiles_than_processors(size, kernels):
    rng = np.random.default_rng(1)
    counts, histories = rng.integers(1, 700, 12), rng.choice([0, 0, 33, 900], 12)
    step = Step(counts, histories, 8, 2, size, 16, "float16", padding=5)
    step.launch()()
    assert not step.check(f"many {size}")


@gpu
def test_a_captured_launch_reads_other_contents(kernels):
    import cupy

    batches = [((200, 1, 60), (0, 500, 77), 9), ((3, 260, 0), (900, 0, 0), 7), ((0, 0, 270), (12, 0, 640), 0)]
    steps = [Step(counts, histories, 8, 2, 128, 16, "bfloat16", padding=padding, columns=80, seed=n) for n, (counts, histories, padding) in enumerate(batches)]
    q, y, indices = (steps[0].q.copy(), steps[0].y.copy(), [a.copy() for a in steps[0].indices])
    caches = [cupy.full((max(len(s.clean[0]) for s in steps), *steps[0].clean[0].shape[1:]), np.nan, "bfloat16") for _ in range(2)]
    launch = prefill(q, *caches, y, *indices, scale=0.25, window=0, softcap=0.0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        launch()
        launch()
        graph = stream.end_capture()
    for n in (1, 0, 2, 1):
        step = steps[n]
        for to, source in zip([q, *indices], [step.q, *step.indices], strict=True):
            to[...] = source
        for to, source in zip(caches, step.caches, strict=True):
            to[: len(source)] = source
        y[...] = np.nan
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        step.y = y
        assert not step.check(f"contents {n}")
