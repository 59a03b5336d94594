"""Text from plans for several ranks, each with a GPU made of NumPy: the tokens are those of one process, whatever the schedule."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import fake_ranks
import numpy as np
import pytest
from click.testing import CliRunner
from decoder import BY_RANGE, VOCABULARY, decoder
from fake_ranks import together
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda_model import random_batch
from test_ranks import mpirun, needs_mpi

import rewrite
from rewrite.cli import main
from rewrite.errors import RewriteError
from rewrite.runtime import cuda_model
from rewrite.runtime.cuda import OutOfMemory
from rewrite.runtime.plan import Plan
from rewrite.runtime.sampling import Row, Sampling
from rewrite.runtime.told_rows import pack, unpack

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
LENGTHS = (1, 3, 8, 5, 17, 2, 24, 11)
MLP = "n = MatMul(s, wq) g = Gelu(n) d = MatMul(g, wo) r = Add(s, d)"
NORM = "r = RMSNormalization<axis = -1, epsilon = 0.00001>(s, ones)"


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Path:
    """Plans of one decoder in float32, and of one with a norm in float16, for 1 and 2 ranks, called `float32 1` and so on."""
    import graphs

    folder = tmp_path_factory.mktemp("plans")
    for name, source in (("float32", decoder(positions=BY_RANGE)), ("float16", graphs.half(decoder(positions=BY_RANGE, after=NORM)))):
        for world in (1, 2):
            model = rewrite.optimize(source, generate=True, tensor_parallel=world, block_size=4).model
            entry = model.proto.metadata_props.add()
            entry.key, entry.value = "rewrite.eos", "[0]"
            rewrite.build(model, folder / f"{name} {world}", engines=False)
    return folder


def prompts(count=8):
    rng = np.random.default_rng(3)
    return [[int(t) for t in rng.integers(0, VOCABULARY, n)] for n in LENGTHS[:count]]


def texts(plan, given, sampling, **options):
    """What two ranks generate: generations, the frames of each, the sums of each, and the scheduler's statistics."""

    def work(communicator):
        generator = rewrite.Generator(Plan(plan, device="cuda"), communicator=communicator, **options)
        device, ranks = generator.model.device, generator.model.others
        seen = []
        if communicator.rank:
            end = generator.model._end
            generator.model._end = lambda: (seen.extend(device.buckets), end())
            generator.model.follow()
            return None, seen, ranks.nccl.made + (ranks.one_shot.made if ranks.one_shot else []), None
        made = [generator.generate(p, **s) for p, s in zip(given, sampling, strict=True)]
        generator.scheduler.pool.check()
        seen = list(device.buckets)
        generator.model.stop()
        assert not device.buckets
        return made, seen, ranks.nccl.made + (ranks.one_shot.made if ranks.one_shot else []), generator.stats()

    (made, frames, sums, stats), (_, other_frames, other_sums, _) = together(2, work)
    assert frames == other_frames
    assert sums == other_sums
    return made, frames, sums, stats


FEW = 12 * 4 * 2 * 8 * 4  # bytes of a rank for twelve blocks


@pytest.mark.parametrize("options", [{}, {"lookahead": 1}, {"lookahead": 16, "seats": 3}, {"token_budget": 7}, {"kv_memory": FEW}, {"reuse": False, "near": False}], ids=str)
def test_texts_are_those_of_one_process(plans, options, monkeypatch):
    options = {"kv_memory": 1 << 18, **options}
    generator = rewrite.Generator(plans / "float32 1", kv_memory=1 << 18)
    expected = generator.generate(prompts(), max_new_tokens=20, ignore_eos=True)
    fake_ranks.install(monkeypatch, near=options.pop("near", True))
    (made,), frames, sums, stats = texts(plans / "float32 2", [prompts()], [{"max_new_tokens": 20, "ignore_eos": True}], **options)
    assert [g.tokens for g in made] == [g.tokens for g in expected]
    assert any(decoding for _, decoding in frames) == (options.get("lookahead") != 1)
    assert {kind for kind, _ in sums} == {"sum", "join"}
    if options["kv_memory"] == FEW:
        assert stats["preempted"] > 0


def test_every_kind_of_sampling_is_that_of_one_process(plans, monkeypatch):
    """Steps on all ranks at once, one step at a time (beams, hooks), and what looks at earlier tokens."""
    requests = [
        {"temperature": 30.0, "seed": 5, "n": 3, "top_p": 0.9}, {"beams": 3, "n": 2}, {"allowed": lambda tokens: [len(tokens) % 7, 9]}, {"logprobs": 3, "temperature": np.float32(2)},
        {"repetition_penalty": 1.3, "no_repeat_ngram": 2}, {"stop_tokens": list(range(0, 60, 5)), "min_new_tokens": 3}, {"logit_bias": {3: -np.inf, 4: 2.5}, "bad_words": [[5, 6], [7]]},
    ]  # fmt: skip
    requests = [{"max_new_tokens": 14, "seed": 2**64 - 1, **r} for r in requests]
    single = rewrite.Generator(plans / "float32 1", kv_memory=1 << 18)
    expected = [single.generate(prompts(4), **r) for r in requests]
    fake_ranks.install(monkeypatch)
    made, _, _, _ = texts(plans / "float32 2", [prompts(4)] * len(requests), requests, kv_memory=1 << 18, lookahead=4)
    for got, want, request in zip(made, expected, requests, strict=True):
        assert [(c.tokens, c.finished) for g in got for c in g.choices] == [(c.tokens, c.finished) for g in want for c in g.choices], request


def test_all_ranks_end_at_the_same_step(plans, monkeypatch):
    single = rewrite.Generator(plans / "float32 1", kv_memory=1 << 18)
    expected = [single.generate(p, max_new_tokens=40) for p in prompts()]
    stopped = sum(g.choices[0].finished == "stop" for made in expected for g in made)
    assert stopped
    fake_ranks.install(monkeypatch)
    made, _, _, stats = texts(plans / "float32 2", prompts(), [{"max_new_tokens": 40}] * len(LENGTHS), kv_memory=1 << 18, lookahead=16)
    assert [g.tokens for m in made for g in m] == [g.tokens for m in expected for g in m]
    assert stats["generated_tokens"] <= stats["steps"] <= stats["generated_tokens"] + stopped  # one more is under way when it is seen


@pytest.mark.parametrize("most", [1 << 20, 16 * 2 * 4], ids=["few bytes", "many bytes"])
def test_a_norm_joins_the_sum_before_it(plans, most, monkeypatch):
    """In float16, where norms are steps; sums of more than four tokens are NCCL's in the second case."""
    expected = rewrite.Generator(plans / "float16 1", kv_memory=1 << 18).generate(prompts(), max_new_tokens=8, ignore_eos=True)
    fake_ranks.install(monkeypatch, most=most)
    (made,), _, sums, _ = texts(plans / "float16 2", [prompts()], [{"max_new_tokens": 8, "ignore_eos": True}], kv_memory=1 << 18)
    apart = sum(a.tokens != b.tokens for a, b in zip(made, expected, strict=True))
    assert apart <= 2  # ties, which sums of halves decide another way
    assert "sum and norm" in {kind for kind, _ in sums} or most < 1 << 20
    assert all(shape[1] * 32 <= most for kind, shape in sums if kind == "sum and norm")


def test_a_rank_without_memory_makes_all_drop_the_same_frames(plans, monkeypatch):
    expected = rewrite.Generator(plans / "float32 1", kv_memory=1 << 18).generate(prompts(), max_new_tokens=12, ignore_eos=True)
    fake_ranks.install(monkeypatch)
    make = cuda_model.Bucket.__init__

    def scarce(self, model, *rest, **more):
        make(self, model, *rest, **more)
        if len(model.buckets) >= (2 if threading.current_thread().name == "1" else 4):
            raise OutOfMemory("no more")

    monkeypatch.setattr(cuda_model.Bucket, "__init__", scarce)
    (made,), frames, _, _ = texts(plans / "float32 2", [prompts()], [{"max_new_tokens": 12, "ignore_eos": True}], kv_memory=1 << 18, token_budget=16)
    assert [g.tokens for g in made] == [g.tokens for g in expected]
    assert len(frames) <= 2


def test_the_pool_is_as_large_as_the_smallest_rank_allows(plans, monkeypatch):
    fake_ranks.install(monkeypatch)

    def work(communicator):
        model = rewrite.Generator(Plan(plans / "float32 2", device="cuda"), communicator=communicator, kv_memory=(1 << 18) >> communicator.rank).model
        return model.blocks, len(next(iter(model.caches[0].values())))

    (blocks, size), other = together(2, work)
    assert (blocks, size) == other
    assert blocks == size == (1 << 17) // (FEW // 12)


def test_plans_that_gpus_do_not_run_are_refused(plans, tmp_path, monkeypatch):
    fake_gpu.install(monkeypatch)
    with pytest.raises(RewriteError, match="on GPUs each of its 2 ranks is a process; start them with `mpirun -n 2 rewrite generate"):
        rewrite.Generator(plans / "float32 2", device="cuda")
    fake_ranks.install(monkeypatch)
    with pytest.raises(RewriteError, match="it is for 2 ranks, and there are 3 with GPUs; start 2, or give a plan for 3"):
        together(3, lambda communicator: rewrite.Generator(Plan(plans / "float32 2", device="cuda"), communicator=communicator))


# --- stages -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> Path:
    """Plans of a decoder in float32 of two attentions, in 1, 2 and 3 stages, of 1 or 2 ranks: `2 x 1` and so on; and of float16 in 2 stages."""
    import graphs

    folder = tmp_path_factory.mktemp("staged")
    source = decoder(positions=BY_RANGE, after=MLP)
    for name, model, stages, world in (("1 x 1", source, 1, 1), ("2 x 1", source, 2, 1), ("2 x 2", source, 2, 2), ("3 x 1", source, 3, 1),
                                       ("half 1", graphs.half(source), 1, 1), ("half 2", graphs.half(source), 2, 1)):  # fmt: skip
        made = rewrite.optimize(model, generate=True, tensor_parallel=world, pipeline_parallel=stages, block_size=4).model
        entry = made.proto.metadata_props.add()
        entry.key, entry.value = "rewrite.eos", "[0]"
        rewrite.build(made, folder / name, engines=False)
    return folder


def staged_texts(plan, ranks, given, sampling, **options):
    """What the ranks of all stages generate, and of each rank its frames and what it told the others of its stage, and all."""

    def work(communicator):
        generator = rewrite.Generator(Plan(plan, device="cuda"), communicator=communicator, **options)
        model, found, frames = generator.model, None, []
        if communicator.rank:
            end = model._end
            model._end = lambda: (frames.extend(model.device.buckets), end())
            model.follow()
        else:
            found = [generator.generate(p, **s) for p, s in zip(given, sampling, strict=True)]
            generator.scheduler.pool.check()
            frames.extend(model.device.buckets)
            model.stop()
        return found, frames, model.others.nccl.made + (model.others.one_shot.made if model.others.one_shot else []), model.others.between.made

    found = together(ranks, work)
    assert all(frames == found[0][1] for _, frames, _, _ in found)
    return found[0][0], [told for _, _, told, _ in found], [told for _, _, _, told in found]


@pytest.mark.parametrize("options", [{}, {"lookahead": 1}, {"lookahead": 16, "seats": 3}, {"token_budget": 7}, {"reuse": False, "near": False}], ids=str)
@pytest.mark.parametrize(("name", "ranks"), [("2 x 1", 2), ("3 x 1", 3), ("2 x 2", 4)])
def test_texts_of_stages_are_those_of_one_process(staged, name, ranks, options, monkeypatch):
    options = {"kv_memory": 1 << 18, **options}
    expected = rewrite.Generator(staged / "1 x 1", kv_memory=1 << 18).generate(prompts(), max_new_tokens=20)
    fake_ranks.install(monkeypatch, near=options.pop("near", True))
    (made,), sums, messages = staged_texts(staged / name, ranks, [prompts()], [{"max_new_tokens": 20}], **options)
    assert [g.tokens for g in made] == [g.tokens for g in expected]
    kinds = [{kind for kind, _ in told} for told in messages]
    assert kinds[0] >= {"send", "broadcast"}
    assert kinds[-1] >= {"receive", "broadcast"}
    assert "receive" not in kinds[0]
    assert "send" not in kinds[-1]
    assert all(("sum" in {kind for kind, _ in told}) == (name == "2 x 2") for told in sums)


def test_every_kind_of_sampling_over_stages(staged, monkeypatch):
    requests = [{"temperature": 30.0, "seed": 5, "n": 3}, {"beams": 3, "n": 2}, {"allowed": lambda tokens: [len(tokens) % 7, 9]}, {"logprobs": 3}, {"repetition_penalty": 1.3}]
    requests = [{"max_new_tokens": 10, **r} for r in requests]
    single = rewrite.Generator(staged / "1 x 1", kv_memory=1 << 18)
    expected = [single.generate(prompts(4), **r) for r in requests]
    fake_ranks.install(monkeypatch)
    made, _, _ = staged_texts(staged / "2 x 1", 2, [prompts(4)] * len(requests), requests, kv_memory=1 << 18, lookahead=4)
    for got, want, request in zip(made, expected, requests, strict=True):
        assert [(c.tokens, c.finished) for g in got for c in g.choices] == [(c.tokens, c.finished) for g in want for c in g.choices], request


def test_stages_of_halves_hand_on_narrow_logits(staged, monkeypatch):
    expected = rewrite.Generator(staged / "half 1", kv_memory=1 << 18).generate(prompts(), max_new_tokens=8, ignore_eos=True)
    fake_ranks.install(monkeypatch)
    (made,), _, _ = staged_texts(staged / "half 2", 2, [prompts()], [{"max_new_tokens": 8, "ignore_eos": True}], kv_memory=1 << 18)
    assert [g.tokens for g in made] == [g.tokens for g in expected]


def test_a_long_prompt_goes_through_the_stages_in_parts(staged, monkeypatch):
    """So that all of them have something to do; the rows of its logits come in the order of the batch."""
    from rewrite.runtime import plan_model

    monkeypatch.setattr(plan_model, "PART", 6)
    expected = rewrite.Generator(staged / "1 x 1", kv_memory=1 << 18).generate(prompts(), max_new_tokens=6, ignore_eos=True)
    fake_ranks.install(monkeypatch)
    (made,), _, messages = staged_texts(staged / "2 x 1", 2, [prompts()], [{"max_new_tokens": 6, "ignore_eos": True}], kv_memory=1 << 18, token_budget=64)
    assert [g.tokens for g in made] == [g.tokens for g in expected]
    monkeypatch.setattr(plan_model, "PART", 1000)
    whole, _, others = staged_texts(staged / "2 x 1", 2, [prompts()], [{"max_new_tokens": 6, "ignore_eos": True}], kv_memory=1 << 18, token_budget=64)
    assert [g.tokens for g in whole[0]] == [g.tokens for g in expected]
    count = [sum(kind == "send" for kind, _ in told[0]) for told in (messages, others)]
    assert count[0] > count[1]


@pytest.mark.parametrize(("stages", "world", "ranks"), [(1, 2, [0]), (2, 1, [0, 1]), (2, 2, [0, 2])])
def test_kernels_of_ranks_are_timed_one_by_one(stages, world, ranks, tmp_path, monkeypatch):
    """On one GPU, of each stage one rank, with zeros for what others would tell; the plan keeps the figures of all."""
    fake_gpu.install(monkeypatch)
    cupy = fake_ranks.install(monkeypatch)
    cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=0)
    seen, tune = [], cuda_model.CudaModel.tune

    def tuned(self):
        tune(self)
        seen.append(self.executor.steps)
        return {f"stage {self.executor.steps[0].stage}": {"ours": 1.0}}

    monkeypatch.setattr(cuda_model.CudaModel, "tune", tuned)
    model = rewrite.optimize(decoder(positions=BY_RANGE, after=MLP), generate=True, tensor_parallel=world, pipeline_parallel=stages, block_size=4).model
    plan = rewrite.build(model, tmp_path / "plan", engines=False, verify=False, tune=True)
    assert seen == [plan.steps_of(rank) for rank in ranks]
    assert plan.manifest.tuning == {f"stage {i}": {"ours": 1.0} for i in range(stages)}
    assert plan.manifest.versions["tuned on"] == "none"


def test_a_rank_alone_is_told_zeros(staged, monkeypatch):
    from rewrite.runtime.plan_model import PlanModel

    cupy = fake_ranks.install(monkeypatch)
    cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=0)
    for rank in range(4):
        model = PlanModel(Plan(staged / "2 x 2", device="cuda"), 1 << 16, only=rank)
        batch = random_batch(np.random.default_rng(rank), model)
        logits = model.step(batch)
        assert logits.shape == (len(batch.logit_rows), VOCABULARY)
        assert np.isfinite(np.asarray(logits)).all()  # nothing of it was never written
        assert set(model.caches[0]) == {layer[k] for layer in model.found["layers"] if layer.get("stage", 0) == rank // 2 for k in ("key_cache", "value_cache")}


def test_each_stage_has_the_caches_and_engines_of_its_own_layers(staged, monkeypatch):
    fake_ranks.install(monkeypatch)

    def work(communicator):
        model = rewrite.Generator(Plan(staged / "2 x 1", device="cuda"), communicator=communicator, kv_memory=1 << 18).model
        return set(model.caches[0]), set(model.device.executor.engines), set(model.device.executor.weights)

    first, second = together(2, work)
    whole = Plan(staged / "2 x 1")
    assert not first[0] & second[0]
    assert {*first[0], *second[0]} <= set(whole.inputs)
    assert all({s.name for s in whole.steps_of(rank) if s.kind == "segment"} == engines for rank, (_, engines, _) in enumerate((first, second)))
    assert first[2] != second[2]


# --- rows ---------------------------------------------------------------------------------------------------------
tokens = st.integers(0, 50)
def real(low, high):
    """As logits are: float32."""
    return st.floats(low, high, width=32, allow_subnormal=False)


samplings = st.builds(
    Sampling, temperature=real(0, 5), top_k=st.integers(0, 9), top_p=real(0.0625, 1), min_p=real(0, 1), typical_p=real(0.0625, 1), repetition_penalty=real(0.125, 3),
    presence_penalty=real(-2, 2), frequency_penalty=real(-2, 2), no_repeat_ngram=st.integers(0, 3), logit_bias=st.dictionaries(tokens, real(-9, 9) | st.just(-np.inf), max_size=3),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=2), min_new_tokens=st.integers(0, 9), stop_tokens=st.lists(tokens, max_size=3),
)  # fmt: skip
rows = st.lists(st.builds(Row, st.just(Sampling()) | samplings, st.lists(tokens, min_size=1, max_size=9), st.just(1), st.integers(0, 2**64 - 1), st.integers(0, 3)), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(rows)
def test_rows_are_told_whole(given_rows):
    made = unpack(pack(given_rows))
    for got, want in zip(made, given_rows, strict=True):
        assert got.sampling == want.sampling
        assert (got.prompt, got.seed, got.choice, len(got.tokens)) == (want.prompt, want.seed, want.choice, len(want.tokens))
        assert got.tokens == want.tokens or not want.sampling.processed


# --- the commands under mpirun ------------------------------------------------------------------------------------
SCRIPT = """
import sys
sys.path[:0] = sys.argv[1].split(":")
import fake_ranks, pytest
from rewrite.cli import main
fake_ranks.install(pytest.MonkeyPatch())
main(sys.argv[2:])
"""


def commands(*arguments):
    return mpirun(2, "-c", SCRIPT, str(Path(__file__).parent), *arguments)


@needs_mpi
@pytest.mark.parametrize("how", ["shards", "stages"])
def test_generate_on_two_gpus_of_numpy(plans, staged, how):
    one, two = (plans / "float32 1", plans / "float32 2") if how == "shards" else (staged / "1 x 1", staged / "2 x 1")
    arguments = [a for p in prompts(5) for a in ("--tokens", ",".join(map(str, p)))] + ["--max-new-tokens", "12", "--kv-memory", "1M"]
    expected = CliRunner().invoke(main, ["generate", str(one), *arguments]).output
    code, output, errors = commands("generate", str(two), "--device", "cuda", *arguments)
    assert code == 0, errors
    assert output == expected


@needs_mpi
def test_bench_generate_on_two_ranks(plans, staged):
    for device, plan in (("cuda", plans / "float32 2"), ("cpu", plans / "float32 2"), ("cuda", staged / "2 x 1")):
        code, output, errors = commands("bench-generate", str(plan), "--device", device, "--kv-memory", "1M", "--prompt-length", "9", "--new-tokens", "5", "--repeat", "1")
        assert code == 0, errors
        assert output.count("ms a step") == 1


RAISES = """
import sys
sys.path[:0] = sys.argv[2].split(":")
import fake_ranks, pytest
from rewrite.cli import main
from rewrite.runtime.cuda_model import CudaModel
from rewrite.runtime.nccl import local_rank
fake_ranks.install(pytest.MonkeyPatch())
decode = CudaModel.decode
def failing(self, *arguments):
    for number, part in enumerate(decode(self, *arguments)):
        if number == 2 and local_rank() == int(sys.argv[1]):
            raise MemoryError("no room")
        yield part
CudaModel.decode = failing
main(["generate", sys.argv[3], "--device", "cuda", "--tokens", "5,6", "--max-new-tokens", "60", "--kv-memory", "1M", "--ignore-eos"])
"""


@needs_mpi
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_raises_ends_all(plans, rank):
    code, _, errors = mpirun(2, "-c", RAISES, str(rank), str(Path(__file__).parent), str(plans / "float32 2"))
    assert code != 0
    assert f"rewrite: rank {rank}: MemoryError: no room" in errors
    assert "Traceback" not in errors


# --- steps under way that are given up ----------------------------------------------------------------------------
def on_two_ranks(plan, work, **options):
    """What `work(generator)` gives on rank 0, while the other one follows."""

    def run(communicator):
        generator = rewrite.Generator(Plan(plan, device="cuda"), communicator=communicator, kv_memory=1 << 18, **options)
        if communicator.rank:
            return generator.model.follow()
        found = work(generator)
        generator.model.stop()
        assert not generator.model.device.buckets
        return found

    return together(2, run)[0]


@pytest.mark.parametrize("how", ["shards", "stages"])
@pytest.mark.parametrize("read", [1, 5, 9, 17])
def test_a_text_given_up_under_way_leaves_the_other_rank_where_it_belongs(plans, staged, read, how, monkeypatch):
    one, two = (plans / "float32 1", plans / "float32 2") if how == "shards" else (staged / "1 x 1", staged / "2 x 1")
    expected = rewrite.Generator(one, kv_memory=1 << 18).generate(prompts(4), max_new_tokens=20, ignore_eos=True)
    fake_ranks.install(monkeypatch)

    def work(generator):
        for _ in range(2):
            tokens = []
            for output in generator.iterate(prompts()[3], max_new_tokens=60, ignore_eos=True):
                tokens += output.tokens
                if len(tokens) >= read:
                    break
            assert len(tokens) >= read
        made = generator.generate(prompts(4), max_new_tokens=20, ignore_eos=True)
        generator.scheduler.pool.check()
        assert generator.scheduler.pool.used == 0
        iterator = generator.iterate(prompts()[3], max_new_tokens=60, ignore_eos=True)
        first = [next(iterator).tokens for _ in range(2)]  # the second comes while more are under way; the ranks stop then
        return made, [t for tokens in first for t in tokens]

    made, first = on_two_ranks(two, work)
    assert [g.tokens for g in made] == [g.tokens for g in expected]
    assert first == expected[3].tokens[: len(first)]


@pytest.mark.parametrize("what", ["more", "step", "not begun"])
def test_an_error_under_way_leaves_the_other_rank_where_it_belongs(plans, what, monkeypatch):
    """Rank 0 goes on with something else, when it was asked whether more are begun, when it had a part, or before any."""
    expected = rewrite.Generator(plans / "float32 1", kv_memory=1 << 18).generate(prompts(4), max_new_tokens=20, ignore_eos=True)
    fake_ranks.install(monkeypatch)

    def work(generator):
        scheduler, model, calls = generator.scheduler, generator.model, [0]
        goes_on, decode = scheduler._goes_on, model.decode

        def failing():
            calls[0] += 1
            if calls[0] == 2:
                raise ArithmeticError(what)
            return goes_on()

        def broken(found):
            if what == "step":
                yield next(found)
            raise ArithmeticError(what)

        def parts(*arguments):
            calls[0] += 1
            return broken(decode(*arguments)) if calls[0] == 1 else decode(*arguments)

        if what == "more":
            monkeypatch.setattr(scheduler, "_goes_on", failing)
        else:
            monkeypatch.setattr(model, "decode", parts)
        with pytest.raises(ArithmeticError, match=what):
            generator.generate(prompts(4), max_new_tokens=20, ignore_eos=True)
        made = generator.generate(prompts(4), max_new_tokens=20, ignore_eos=True)
        scheduler.pool.check()
        assert scheduler.pool.used == 0
        return made

    assert [g.tokens for g in on_two_ranks(plans / "float32 2", work)] == [g.tokens for g in expected]


def test_who_comes_while_steps_are_under_way_is_served(plans, monkeypatch):
    single = rewrite.Generator(plans / "float32 1", kv_memory=1 << 18)
    expected = [single.generate(p, max_new_tokens=30, ignore_eos=True)[0].tokens for p in prompts(4)]
    fake_ranks.install(monkeypatch)

    def work(generator):
        made = [[] for _ in range(4)]
        for number, prompt in enumerate(prompts(4)):
            generator.add(generator.request(prompt, None, True, {"max_new_tokens": 30}), lambda output, number=number: made[number].extend(output.tokens))
            for _ in range(2):
                generator.step()
        while generator.scheduler.unfinished:
            generator.step()
        return made

    assert on_two_ranks(plans / "float32 2", work) == expected


def test_one_thread_at_a_time_parses(monkeypatch):
    """Python 3.11 raises SystemError where a thread parses while another one is at it, when both load a plan."""
    from rewrite.registry import library
    from rewrite.runtime import machine

    parse, inside, most = machine.ast.parse, [], [0]

    def watched(source):
        inside.append(1)
        most[0] = max(most[0], len(inside))
        time.sleep(0.01)
        made = parse(source)
        inside.pop()
        return made

    monkeypatch.setattr(machine, "ast", SimpleNamespace(parse=watched, unparse=machine.ast.unparse))
    plugin = library([]).plugins["AllReduce"]
    first, second = together(2, lambda communicator: [machine.fingerprint(plugin) for _ in range(5)])
    assert first == second
    assert most == [1]
