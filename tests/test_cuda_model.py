"""The model of a text generator on the GPU, on a GPU made of NumPy: buckets, padding, the next batch, caches in place, errors."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
from decoder import BY_INPUT, BY_RANGE, VOCABULARY, WINDOW, decoder
from greedy import greedy
from hypothesis import given, settings
from hypothesis import strategies as st

import rewrite
from rewrite.errors import RewriteError
from rewrite.runtime import buckets, cuda_model
from rewrite.runtime.advance import advance
from rewrite.runtime.batch import Batch
from rewrite.runtime.bench_generate import measure
from rewrite.runtime.buckets import Limits, Sizes, few, many, sizes_of
from rewrite.runtime.cuda import Frame
from rewrite.runtime.lookahead import step_by_step
from rewrite.runtime.plan_model import PlanModel
from rewrite.runtime.sampling import Row, Sampling

LENGTHS = (1, 3, 8, 5, 17, 2, 24, 11)
ANY = Limits((1, 4096), (1, 4096))
KINDS = {"range": {"positions": BY_RANGE}, "window": {"attention": WINDOW}, "input": {"positions": BY_INPUT, "inputs": "int64[batch, sequence] input_ids, int64[batch, sequence] position_ids"}}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """A plan of each kind; one ends its texts with token 0."""
    target = tmp_path_factory.mktemp("plans")
    for name, parts in KINDS.items():
        model = rewrite.optimize(decoder(**parts), generate=True, block_size=4).model
        rewrite.build(model, target / name, engines=False)
        entry = model.proto.metadata_props.add()
        entry.key, entry.value = "rewrite.eos", "[0]"
        rewrite.build(model, target / f"{name} with end", engines=False)
    return target


def prompts():
    rng = np.random.default_rng(3)
    return [[int(t) for t in rng.integers(0, VOCABULARY, n)] for n in LENGTHS]


def random_batch(rng, model, most=7):
    """Ragged: sequences of one token, of several, with earlier keys or none; some of the tokens wanted."""
    counts = rng.integers(1, rng.choice([2, 6]), rng.integers(1, most))
    lengths = (counts + rng.integers(0, 20, len(counts))).astype(np.int32)
    width = -(-int(lengths.max()) // model.block_size)
    tables = rng.permutation(model.blocks)[: len(counts) * width].reshape(len(counts), width).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
    owner = np.repeat(np.arange(len(counts)), counts)
    slots = (tables[owner, positions // model.block_size] * model.block_size + positions % model.block_size).astype(np.int32)
    rows = np.flatnonzero(rng.random(len(positions)) < 0.6)
    return Batch(rng.integers(0, VOCABULARY, len(positions)), positions, slots, tables, starts, lengths, rows)


def same(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(1, np.abs(want).max(initial=0)))


# --- sizes --------------------------------------------------------------------------------------------------------
def test_few_and_many_are_few_sizes_that_waste_little():
    assert [few(n) for n in (1, 2, 3, 8, 9, 16, 17, 24, 25, 33, 64, 65, 97)] == [1, 2, 4, 8, 16, 16, 24, 24, 32, 48, 64, 96, 128]
    assert [many(n) for n in (1, 9, 64, 65, 129, 513, 1025)] == [8, 16, 64, 80, 160, 640, 1280]
    for n in range(1, 5000):
        assert n <= few(n) < max(2 * n, 2)
        assert n <= many(n) < 5 / 4 * n or n < 32
    assert len({few(n) for n in range(1, 1025)}) == 17
    assert len({many(n) for n in range(1, 4097)}) < 36


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 30), st.integers(1, 300), st.integers(1, 6), st.integers(0, 100))
def test_a_bucket_holds_its_batch_and_tells_single_tokens_from_others(counts, rows, width, low, more):
    rows, tokens = min(rows, sum(counts)), sum(counts)
    batch = Batch(np.zeros(tokens, np.int64), np.zeros(tokens, np.int64), np.zeros(tokens, np.int32), np.zeros((len(counts), width), np.int32),
                  np.cumsum([0, *counts]).astype(np.int32), np.ones(len(counts), np.int32), np.arange(rows))  # fmt: skip
    limits = Limits((low, max(tokens, low) + more), (low, max(rows, low) + more))
    limits.check(batch, "")
    sizes = sizes_of(batch, limits)
    assert sizes.tokens >= tokens
    assert sizes.sequences >= len(counts)
    assert sizes.table >= width
    assert (sizes.rows >= rows) if rows else sizes.rows == 0
    assert low <= sizes.tokens <= limits.tokens[1]
    assert not rows or low <= sizes.rows <= limits.rows[1]
    assert (sizes.tokens == sizes.sequences) == (max(counts) == 1)
    assert sizes.table in ((8, 16, 32, 64, 128, 256, 512) if max(counts) == 1 else (8, 32, 128, 512))
    assert sizes.tokens >= sizes.sequences
    made = buckets.padded(batch, sizes)
    assert made.query_starts[-1] == tokens
    assert (made.slots[tokens:] == -1).all()
    assert not made.context_lengths[len(counts) :].any()


def test_more_than_the_engines_take_is_one_line():
    batch = random_batch(np.random.default_rng(0), PlanLike)
    with pytest.raises(RewriteError, match=r"a step has \d+ tokens, and the engines were built for 3; take a smaller token budget, or build with --profile tokens=1:64:\d+"):
        Limits((1, 3), (1, 64)).check(dataclasses.replace(batch, tokens=np.zeros(9, np.int64)), "plan")


class PlanLike:
    blocks, block_size = 300, 4


# --- padding changes nothing --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_the_same_logits_and_keys(plans, kind):
    """On the CPU, whose plugins are the references."""
    model, other = (PlanModel(rewrite.Plan(plans / kind), 1 << 18) for _ in range(2))
    rng = np.random.default_rng(0)
    for name, cache in model.caches[0].items():
        cache[...] = rng.standard_normal(cache.shape)
        other.caches[0][name][...] = cache
    for _ in range(40):
        batch = random_batch(rng, model)
        want = model.step(batch)
        got = other.step(buckets.padded(batch, sizes_of(batch, ANY)))
        assert len(want) == len(batch.logit_rows)
        same(got[: len(want)], want)
        for name, cache in model.caches[0].items():
            same(other.caches[0][name], cache)
    before = {n: c.copy() for n, c in model.caches[0].items()}
    model.step(buckets.padded(buckets.nothing(), Sizes(16, 8, 8, 8)))  # what runs while a frame is made
    for name, cache in model.caches[0].items():
        np.testing.assert_array_equal(cache, before[name])


# --- the next batch -----------------------------------------------------------------------------------------------
def test_the_next_batch_is_the_schedulers(plans):
    """Steps that `advance` makes, beside those of a scheduler that is asked each time."""

    class Watched(PlanModel):
        def step(self, batch):
            seen.append(batch)
            return super().step(batch)

    runs = []
    for ahead in (1, 5):
        seen: list[Batch] = []
        generator = rewrite.Generator(rewrite.Plan(plans / "range"), kv_memory=1 << 18, lookahead=ahead)
        generator.scheduler.model = Watched(generator.plan, 1 << 18)
        tokens = [g.tokens for g in generator.generate(prompts(), max_new_tokens=16)]
        runs.append((tokens, seen))
        assert generator.stats()["steps"] == len(seen)
    (tokens, one), (same, several) = runs
    assert tokens == same
    assert len(one) == len(several)
    for a, b in zip(one, several, strict=True):
        for field in ("tokens", "positions", "query_starts", "context_lengths", "logit_rows"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)


def test_padding_does_not_advance():
    batch = Batch(np.array([7, 0]), np.array([3, 0]), np.array([11, -1], np.int32), np.array([[2, 5], [0, 0]], np.int32), np.array([0, 1, 1], np.int32), np.array([4, 0], np.int32), np.arange(2))
    made = advance(batch, np.array([9, 8]), 4)
    assert made.tokens.tolist() == [9, 0]
    assert made.positions.tolist() == [4, 0]
    assert made.slots.tolist() == [20, -1]
    assert made.context_lengths.tolist() == [5, 0]


def test_steps_end_when_all_texts_do(plans):
    generator = rewrite.Generator(plans / "range with end", kv_memory=1 << 18, lookahead=16)
    plain = rewrite.Generator(plans / "range with end", kv_memory=1 << 18)
    for prompt in prompts():
        assert generator.generate(prompt, max_new_tokens=40) == plain.generate(prompt, max_new_tokens=40)
    assert any(g.choices[0].finished == "stop" for g in plain.generate(prompts(), max_new_tokens=40))
    assert generator.stats()["steps"] == generator.stats()["generated_tokens"]  # no step after a text's end
    assert generator.scheduler.pool.used == 0


# --- on the GPU of NumPy ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_cpu(plans, kind, monkeypatch):
    fake_gpu.install(monkeypatch)
    expected = PlanModel(rewrite.Plan(plans / kind), 1 << 18)
    model = PlanModel(rewrite.Plan(plans / kind, device="cuda"), 1 << 18, tokens=24, sequences=8)
    assert model.blocks == expected.blocks
    rng, made = np.random.default_rng(1), set()
    for _ in range(60):
        batch = random_batch(rng, model)
        want, got = expected.step(batch), model.step(batch)
        assert isinstance(got, fake_gpu.Array)
        made.add(len(batch.logit_rows))
        same(got.get(), want)
        pairs = rng.permutation(model.blocks)[:6].reshape(3, 2).tolist()
        expected.copy_blocks([(a, b) for a, b in pairs])
        model.copy_blocks([(a, b) for a, b in pairs])
        for name, cache in expected.caches[0].items():
            same(model.caches[0][name], cache)
    assert 0 in made
    assert len(model.device.buckets) < 40


FEW = 12 * 4 * 2 * 16 * 4  # bytes for twelve blocks


@pytest.mark.parametrize("options", [
    {}, {"token_budget": 7}, {"seats": 2}, {"seats": 3, "lookahead": 5}, {"lookahead": 1}, {"lookahead": 16}, {"kv_memory": FEW}, {"kv_memory": FEW, "lookahead": 6}, {"reuse": False},
], ids=str)  # fmt: skip
def test_texts_are_those_of_the_cpu(plans, options, monkeypatch):
    """Chunks, few seats, waiting, preemption, several steps at once: the tokens are the same."""
    expected = greedy(PlanModel(rewrite.Plan(plans / "range"), 1 << 20), prompts(), 20, chunk=64)
    fake_gpu.install(monkeypatch)
    generator = rewrite.Generator(plans / "range", device="cuda", **{"kv_memory": 1 << 18, **options})
    made = generator.generate(prompts(), max_new_tokens=20)
    assert [g.tokens for g in made] == expected
    generator.scheduler.pool.check()
    assert generator.scheduler.pool.used == 0
    if "kv_memory" in options:
        assert generator.stats()["preempted"] > 0
    if options.get("lookahead") != 1:
        assert any(decoding for _, decoding in generator.model.device.buckets)


def test_every_kind_of_sampling_is_that_of_the_cpu(plans, monkeypatch):
    requests = [
        ({"temperature": 30.0, "seed": 5, "n": 3, "top_p": 0.9}), ({"beams": 3, "n": 2}), ({"allowed": lambda tokens: [len(tokens) % 7, 9]}), ({"logprobs": 3}),
        ({"repetition_penalty": 1.3, "no_repeat_ngram": 2}), ({"stop_tokens": list(range(0, 60, 5))}),
    ]  # fmt: skip
    plan = plans / "range with end"
    generator = rewrite.Generator(plan, kv_memory=1 << 18)
    expected = [generator.generate(prompts()[3], max_new_tokens=14, **options) for options in requests]
    fake_gpu.install(monkeypatch)
    generator = rewrite.Generator(plan, device="cuda", kv_memory=1 << 18, lookahead=4)
    for options, want in zip(requests, expected, strict=True):
        got = generator.generate(prompts()[3], max_new_tokens=14, **options)
        assert [c.tokens for c in got[0].choices] == [c.tokens for c in want[0].choices], options
        assert [c.finished for c in got[0].choices] == [c.finished for c in want[0].choices]
        assert [p.token for c in got[0].choices for p in c.logprobs] == [p.token for c in want[0].choices for p in c.logprobs]


def test_the_next_steps_are_on_their_way_before_tokens_are_told(plans, monkeypatch):
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(cuda_model, "PART", 3)
    model = PlanModel(rewrite.Plan(plans / "range", device="cuda"), 1 << 18)
    batch = Batch(np.array([3, 4]), np.zeros(2, np.int64), np.array([0, 40], np.int32), np.array([[0, 1, 2, 3], [10, 11, 12, 13]], np.int32), np.arange(3, dtype=np.int32),
                  np.ones(2, np.int32), np.arange(2))  # fmt: skip
    rows = [Row(Sampling(max_new_tokens=20), [t], 1) for t in (3, 4)]
    replays, replay = [], Frame.replay
    monkeypatch.setattr(Frame, "replay", lambda self: (replays.append(1), replay(self)))
    for asked, told, begun in (([True] * 9, [3, 3, 2], [6, 8, 8]), ([True, False, False], [3, 3], [6, 6]), ([False, False], [3], [3])):
        answers, found, seen = iter(asked), [], []
        replays.clear()
        for samples in model.decode(batch, [dataclasses.replace(r, tokens=list(r.tokens)) for r in rows], 8, lambda answers=answers: next(answers)):
            found += samples
            seen.append((len(samples), len(replays)))
        assert seen == list(zip(told, begun, strict=True))
        want = [s for part in step_by_step(model.step, model.sampler, batch, rows, len(found), lambda: True, 4) for s in part]
        assert [s.tokens.tolist() for s in found] == [s.tokens.tolist() for s in want]


def test_nothing_is_allocated_once_the_frames_are_there(plans, monkeypatch):
    cupy = fake_gpu.install(monkeypatch)
    generator = rewrite.Generator(plans / "range", device="cuda", kv_memory=1 << 18, reuse=False)
    first = generator.generate(prompts(), max_new_tokens=20)
    before, arena = cupy.allocated, generator.plan.executor._arena
    assert generator.generate(prompts(), max_new_tokens=20) == first
    assert cupy.allocated == before
    frames = [bucket.frame for bucket in generator.model.device.buckets.values()]
    assert all(frame.arena is arena for frame in frames)
    for frame in frames:  # caches and integers are read where they lie, and the caches' results are the caches
        assert all(frame.values[n] is a for n, a in generator.model.caches[0].items())
        assert frame.values["keys_0"] is frame.values["key_cache_0"]


def test_frames_that_were_not_used_for_longest_are_dropped(plans, monkeypatch):
    fake_gpu.install(monkeypatch)
    monkeypatch.setattr(cuda_model, "FRAMES", 3)
    model = PlanModel(rewrite.Plan(plans / "range", device="cuda"), 1 << 18)
    expected, rng = PlanModel(rewrite.Plan(plans / "range"), 1 << 18), np.random.default_rng(2)
    for _ in range(20):
        batch = random_batch(rng, model)
        same(model.step(batch).get(), expected.step(batch))
        assert len(model.device.buckets) <= 3


def test_what_does_not_fit_is_one_line(plans, monkeypatch):
    fake_gpu.install(monkeypatch, free=1 << 20)
    with pytest.raises(RewriteError, match=r"out of GPU memory: .*the keys and values need 1000 MB, 1 MB are free; give less with --kv-memory"):
        rewrite.Generator(plans / "range", device="cuda", kv_memory=1_000_000_000)
    model = PlanModel(rewrite.Plan(plans / "range", device="cuda"))
    assert 0.7 * (1 << 20) < model.blocks * model.block_bytes <= 0.8 * (1 << 20)
    with pytest.raises(RewriteError, match="a block of keys and values takes"):
        PlanModel(rewrite.Plan(plans / "range", device="cuda"), 10)


def test_a_plan_of_the_gpu_runs_without_touching_its_inputs(plans, monkeypatch):
    fake_gpu.install(monkeypatch)
    plan, rng = rewrite.Plan(plans / "range", device="cuda"), np.random.default_rng(0)
    batch = random_batch(rng, PlanModel(rewrite.Plan(plans / "range"), 1 << 18))
    caches = {n: rng.standard_normal((200, 4, 2, 8)).astype(np.float32) for n in ("key_cache_0", "value_cache_0")}
    feeds = {
        "input_ids": batch.tokens[None], "position_ids": batch.positions[None], "slots": batch.slots % 800, "block_tables": batch.block_tables % 200, "query_starts": batch.query_starts,
        "context_lengths": batch.context_lengths, "logit_rows": np.arange(2),
    }  # fmt: skip
    before = {n: c.copy() for n, c in caches.items()}
    want = rewrite.Plan(plans / "range").run({**feeds, **caches})
    for _ in range(2):
        got = plan.run({**feeds, **caches})
        for name, array in want.items():
            same(got[name], array)
    for name, array in before.items():
        np.testing.assert_array_equal(caches[name], array)


def test_kernels_are_timed_at_the_sizes_that_decoding_has(plans, monkeypatch):
    fake_gpu.install(monkeypatch)
    model, seen = PlanModel(rewrite.Plan(plans / "range", device="cuda"), 1 << 18), []
    make = cuda_model.Bucket.__init__
    monkeypatch.setattr(cuda_model.Bucket, "__init__", lambda self, model, sizes, *rest, **more: (seen.append((sizes, more)), make(self, model, sizes, *rest, **more))[1])
    before = {n: np.array(c) for n, c in model.caches[0].items()}
    model.tune()
    assert [s.tokens for s, _ in seen if s.tokens == s.sequences] == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert [s.tokens for s, _ in seen if s.tokens != s.sequences] == [64, 128, 256, 512, 1024, 2048]
    assert all(more == {"measure": True} for _, more in seen)
    for name, cache in before.items():
        np.testing.assert_array_equal(model.caches[0][name], cache)
    with pytest.raises(RewriteError, match="there is nothing to tune on the CPU"):
        PlanModel(rewrite.Plan(plans / "range"), 1 << 18).tune()
    with pytest.raises(RewriteError, match="a text generator is tuned when it is built"):
        rewrite.Plan(plans / "range", device="cuda").tune({})


def test_decoding_neither_picks_rows_nor_widens_logits(tmp_path, monkeypatch):
    """Each token has its row, and the sampler reads 16 bits: two segments less than a step."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import graphs

    model = rewrite.optimize(graphs.half(decoder(head="logits = MatMul(r, head)", **KINDS["range"])), generate=True, block_size=4).model
    rewrite.build(model, tmp_path / "plan", engines=False)
    expected = rewrite.Generator(tmp_path / "plan", kv_memory=1 << 17).generate(prompts()[:4], max_new_tokens=6)
    fake_gpu.install(monkeypatch)
    generator = rewrite.Generator(tmp_path / "plan", device="cuda", kv_memory=1 << 17, token_budget=16)
    assert generator.generate(prompts()[:4], max_new_tokens=6) == expected
    batch = random_batch(np.random.default_rng(0), generator.model, 2)
    generator.model.step(batch)
    frames = {decoding: bucket.frame for (_, decoding), bucket in generator.model.device.buckets.items()}
    assert frames[False].values["logits"].dtype == np.float32
    assert len(frames[True].work) == len(frames[False].work) - 2
    assert len(frames[True].launches) == len(frames[True].work) + 2


@pytest.mark.parametrize("batch", [1, 3])
def test_the_speed_of_a_step_is_that_of_one_of_several(plans, batch, monkeypatch):
    """With several steps in a call, too; beside the speed of a copy on the device."""
    fake_gpu.install(monkeypatch)
    found = measure(plans / "range", batch, 20, 17, 1, device="cuda", kv_memory=1 << 18)
    monkeypatch.undo()
    single = measure(plans / "range", batch, 20, 17, 1, kv_memory=1 << 18)
    assert 0.1 * single["decode_ms"] < found["decode_ms"] < 10 * single["decode_ms"]
    assert found["memory_gb_per_second"] == pytest.approx(2 * (1 << 28) / 0.5e-3 / 1e9)
    assert found["weight_bytes"] == single["weight_bytes"]


def test_a_table_that_is_also_the_head_is_stored_once(tmp_path, monkeypatch):
    model = rewrite.optimize(decoder(head="turned = Transpose<perm = [1, 0]>(table) logits = MatMul(r, turned)"), generate=True, block_size=4).model
    plan = rewrite.build(model, tmp_path / "plan", engines=False)
    readers = [s.name for s in plan.manifest.steps if "table" in s.inputs]
    assert readers[-1] == "MatMulAct"
    assert len(readers) == 2
    fake_gpu.install(monkeypatch)
    executor = PlanModel(rewrite.Plan(tmp_path / "plan", device="cuda"), 1 << 16).plan.executor
    assert [n for n, a in executor.weights.items() if VOCABULARY in a.shape] == ["table"]


def test_a_generator_asks_no_more_of_engines_than_they_were_built_for(tmp_path, monkeypatch):
    fake_gpu.install(monkeypatch)
    model = rewrite.optimize(decoder(**KINDS["range"]), generate=True, block_size=4).model
    plan = rewrite.build(model, tmp_path / "plan", engines=False, profile="tokens=2:8:12,rows=1:2:3")
    expected = rewrite.Generator(plan, kv_memory=1 << 17).generate(prompts(), max_new_tokens=9)
    generator = rewrite.Generator(tmp_path / "plan", device="cuda", kv_memory=1 << 17)
    assert generator.generate(prompts(), max_new_tokens=9) == expected
    assert all(2 <= sizes.tokens <= 12 and sizes.rows <= 3 for sizes, _ in generator.model.device.buckets)
    with pytest.raises(RewriteError, match="a step has 13 tokens, and the engines were built for 12"):
        generator.model.step(dataclasses.replace(random_batch(np.random.default_rng(0), generator.model), tokens=np.zeros(13, np.int64)))


def test_where_memory_runs_out_the_oldest_frames_go_and_then_one_line_tells(plans, monkeypatch):
    cupy = fake_gpu.install(monkeypatch)
    model, rng, make = PlanModel(rewrite.Plan(plans / "range", device="cuda"), 1 << 18), np.random.default_rng(0), cuda_model.Bucket.__init__
    expected = PlanModel(rewrite.Plan(plans / "range"), 1 << 18)

    def scarce(self, model, *rest, **more):
        if len(model.buckets) >= room:
            raise cupy.cuda.memory.OutOfMemoryError
        make(self, model, *rest, **more)

    monkeypatch.setattr(cuda_model.Bucket, "__init__", scarce)
    room = 2
    for _ in range(12):
        batch = random_batch(rng, model)
        same(model.step(batch).get(), expected.step(batch))
        assert len(model.device.buckets) <= 2
    room, model.device.buckets = 0, type(model.device.buckets)()
    with pytest.raises(RewriteError, match=r"no GPU memory is left for a step of \d+ tokens .*give less with --kv-memory"):
        model.step(batch)
