"""The benchmarks of text generation: what they count, and that all of it runs, on tiny models on the CPU."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import decode
import decode_peers as peers
import generation_page
import llamas
import record
import serving
from decode_peers import Timing

import rewrite

SHAPE = llamas.SHAPES["tiny"]
BUDGET = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Hugging Face directory in float32, and the plan of it."""
    folder = tmp_path_factory.mktemp("llama")
    directory = llamas.make_directory(SHAPE, folder / "model", torch.float32)
    seconds = llamas.make_plan(directory, folder, BUDGET, 8, engines=False)
    assert list(seconds) == ["load", "export", "optimize", "build"]
    assert not (folder / "model.onnx").exists()  # the plan has the weights
    return directory, folder / "plan"


def test_weights_put_into_a_graph_without_any_give_the_same_plan(made, tmp_path):
    llamas.make_graph(SHAPE, tmp_path / "tiny.onnx", torch.float32)
    seconds = llamas.make_plan(made[0], tmp_path, BUDGET, 8, engines=False, graph=tmp_path / "tiny.onnx")
    assert list(seconds) == ["weights", "build"]
    prompts = [[1, 2, 3, 4], [5, 6, 7]]
    found, expected = (rewrite.Generator(plan, token_budget=BUDGET).generate(prompts, max_new_tokens=8) for plan in (tmp_path / "plan", made[1]))
    assert [t.tokens for t in found] == [t.tokens for t in expected]
    assert len(set(expected[0].tokens)) > 2


@pytest.fixture(scope="module")
def model(made):
    return peers.load(made[0], "cpu")


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, SHAPE.vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(model, prompts):
    """Nine greedy tokens after each prompt, without any cache."""
    texts = prompts
    with torch.no_grad():
        for _ in range(9):
            texts = torch.cat([texts, model(texts, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    found = texts[:, prompts.shape[1] :].tolist()
    assert len({t for text in found for t in text}) > 4
    return found


def generator(made, **options):
    return rewrite.Generator(made[1], kv_memory=1 << 20, token_budget=BUDGET, reuse=False, **options)


# --- counting -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_step_are_those_of_the_weights_and_of_the_cache(tied):
    shape = llamas.Shape(2, 64, 4, 2, 16, 96, 50, tied)
    config = shape.config(torch.float32)
    with torch.device("meta"):
        whole = peers.transformers.LlamaForCausalLM(config)
    weights = sum(p.numel() for n, p in whole.named_parameters() if tied or "embed" not in n)
    cache = 3 * 100 * 2 * (2 + 2) * 16  # texts, positions, layers, keys and values of two heads each
    assert shape.step_bytes(3, 100, 2) == 2 * (weights + cache + (0 if tied else 3 * 64))


def test_sizes_are_those_of_the_published_models():
    one, eight = llamas.SHAPES["1b"], llamas.SHAPES["8b"]
    assert one.step_bytes(0, 0) == 2 * 1_235_814_400
    assert eight.step_bytes(0, 0) == 2 * (8_030_261_248 - 128256 * 4096)
    assert eight.step_bytes(1, 1024) - eight.step_bytes(1, 0) == 128 * 1024 * 1024  # 128 KiB a position


def test_operations_of_a_prompt():
    shape = llamas.Shape(2, 8, 4, 2, 4, 16, 32, True)
    layer = 8 * 16 + 2 * 8 * 8 + 16 * 8 + 3 * 8 * 16
    attention = sum(2 * 2 * 4 * 4 * seen for seen in range(1, 6))  # two products of four heads of four
    assert shape.prompt_operations(5) == 2 * (2 * 5 * layer + attention) + 2 * 32 * 8


def test_a_row_has_its_rate_and_share():
    rows = decode.Rows("1b", llamas.SHAPES["1b"], 3e12, lambda: None)
    rows.decode("ours", 8, Timing(steps=[0.003, 0.001, 0.002]))
    (row,) = rows.rows
    size = llamas.SHAPES["1b"].step_bytes(8, 1024)
    assert row["ms"] == pytest.approx(2)
    assert row["tokens_per_second"] == pytest.approx(4000)
    assert row["gbs"] == pytest.approx(size / 2e-3 / 1e9)
    assert row["share"] == pytest.approx(size / 2e-3 / 3e12)


def test_divergence():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]])
    found = decode.divergence((p + 1e-30).log() + 3, (q + 1e-30).log())
    assert found == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0], abs=1e-9)
    assert decode.equal_beginnings([[1, 2, 3], [1]], [[1, 2, 4], [1]]) == [2, 1]


# --- the peers, and ours --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", peers.KINDS)
def test_each_way_to_attend_gives_the_tokens(model, prompts, expected, kind):
    timing = peers.decode(model, prompts, 8, kind, repeat=2, backend="eager")
    assert timing.tokens == expected
    assert len(timing.steps) == 2
    assert model.config._attn_implementation == "sdpa"


def test_prefill_gives_the_first_token(model, prompts, expected):
    assert peers.prefill(model, prompts[:1], repeat=1, backend="eager").tokens == [expected[0][:1]]


def test_generate_and_continuous_batching_give_the_tokens(model, prompts, expected):
    timing = peers.generate(model, prompts, 8, repeat=1)
    assert timing.tokens == expected
    assert timing.first[0] > 0 < timing.steps[0]
    with peers.serving(model, 9, 24, 2, num_blocks=64, max_batch_tokens=64) as manager:
        timing = peers.batched(manager, prompts.tolist(), 8, repeat=1)
    assert timing.tokens == expected
    assert timing.first[0] > 0 < timing.steps[0]


def test_ours_gives_the_tokens_and_leaves_nothing_behind(made, prompts, expected):
    found = generator(made)
    timing = decode.run_generator(found, prompts.tolist(), 8, repeat=2)
    assert timing.tokens == expected
    assert len(timing.steps) == len(timing.first) == 2
    assert decode.run_generator(found, prompts[:1].tolist(), 0, repeat=1).steps == []
    assert found.scheduler.pool.used == 0


def test_logits_of_a_plan_are_those_of_the_model(made, model, prompts):
    found = decode.compare_logits(model, model(prompts[:1]).logits[0].detach() + torch.randn(24, SHAPE.vocabulary), generator(made).model, prompts[0].tolist(), chunk=7, singles=4)
    assert found["ours"]["max"] < 1e-9
    assert found["ours"]["same_token"] == 24
    assert found["transformers"]["mean"] > 0.1  # those were disturbed


# --- a load ---------------------------------------------------------------------------------------------------------
def test_arrivals_are_poisson_and_the_same_at_every_rate():
    slow, fast, at_once = (serving.arrivals(4000, rate, 100, prompts=(3, 9), outputs=(2, 5)) for rate in (10.0, 40.0, math.inf))
    assert [(a.prompt, a.new) for a in slow] == [(a.prompt, a.new) for a in fast] == [(a.prompt, a.new) for a in at_once]
    assert all(a.at == 0 for a in at_once)
    gaps = np.diff([0, *(a.at for a in slow)])
    assert gaps.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps.std() == pytest.approx(0.1, rel=0.08)  # exponential: as large as the mean
    assert [a.at for a in fast] == pytest.approx([a.at / 4 for a in slow])
    assert {len(a.prompt) for a in slow} == set(range(3, 10))
    assert {a.new for a in slow} == {2, 3, 4, 5}


def test_percentiles_of_a_load():
    arrival = serving.Arrival(1.0, [1, 2], 3)
    served = [serving.Served(arrival, [2.0, 2.5, 2.75]), serving.Served(serving.Arrival(0.0, [1], 1), [4.0])]
    found = serving.summary(served)
    assert (found["output_tokens"], found["prompt_tokens"], found["seconds"], found["output_tokens_per_second"]) == (4, 3, 4.0, 1.0)
    assert found["first_token"]["p50"] == pytest.approx(2500)
    assert found["between_tokens"]["mean"] == pytest.approx(375)
    assert found["end_to_end"]["p50"] == pytest.approx(2875)
    with pytest.raises(ValueError, match="1 tokens of 3"):
        serving.summary([serving.Served(arrival, [2.0])])


def test_both_serve_the_same_load(made, model):
    load = serving.arrivals(12, 400.0, SHAPE.vocabulary, prompts=(2, 20), outputs=(1, 6))
    mine = serving.by_generator(generator(made, seats=4), load)
    with peers.serving(model, 6, 20, 12, num_blocks=64, max_batch_tokens=64) as manager:
        theirs = serving.by_transformers(manager, load)
    for served in (mine, theirs):
        assert [s.arrival for s in served] == load
        assert serving.summary(served)["requests"] == 12
        assert all(s.times == sorted(s.times) and s.times[0] > s.arrival.at for s in served)


# --- scripts and page -----------------------------------------------------------------------------------------------
def test_the_script_measures_everything_it_was_asked_for(made, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(decode, "NEW", 4)
    monkeypatch.setattr(decode, "PROMPT", 40)
    monkeypatch.setattr(decode, "CONTEXT", 40)
    monkeypatch.setattr(llamas, "make_plan", lambda *_: {"export": 1.0})
    options = argparse.Namespace(batches=[1], kinds=["grouped"], only=["prefill", "compile", "ours", "generate", "continuous"], seconds=1e9, device="cpu", backend="eager", output="x", graphs=None,
                                 parts=False, lookahead=None, tune=False, continuous={"num_blocks": 64, "max_batch_tokens": 64})  # fmt: skip

    class Pool:
        def submit(self, function, *arguments):
            return argparse.Namespace(result=lambda: {})

    bench = decode.Bench("tiny", "a CPU", tmp_path, options)
    (tmp_path / "plan").symlink_to(made[1])
    bench.run(Pool())
    data = json.loads((tmp_path / "x_tiny.json").read_text())["results"]
    assert [r for r in data["rows"] if "error" in r] == []
    assert {(r["what"], r["who"], r["batch"]) for r in data["rows"]} == {
        *(("decode", who, 1) for who in ("torch.compile, grouped", "ours", "transformers, static cache", "transformers, continuous batching")),
        *(("prefill", who, 1) for who in ("torch.compile", "ours", "transformers, static cache")),
    }  # fmt: skip
    page = generation_page.section([("from a file", data)], None)
    assert sum(line.startswith("| 1 |") for line in page) == 4
    assert any(line.startswith("Against the fastest torch.compile: ") for line in page)


def test_a_peer_that_fails_is_told_and_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    options = argparse.Namespace(batches=[1], kinds=["sdpa", "grouped"], only=["prefill", "compile"], seconds=1e9, device="cpu", backend="eager", output="x", continuous={})
    monkeypatch.setattr(peers, "decode", lambda model, texts, new, kind, backend: Timing(steps=[1.0]) if kind == "grouped" else 1 / 0)
    monkeypatch.setattr(peers, "prefill", lambda *_, **__: Timing(first=[1.0]))
    rows = decode.Bench("tiny", "a CPU", tmp_path, options).run(None)["rows"]
    assert [r["who"] for r in rows] == ["torch.compile", "torch.compile, sdpa", "torch.compile, grouped"]
    assert [("error" in r) for r in rows] == [False, True, False]


def test_the_page_has_a_section_only_for_results():
    assert generation_page.section([], None) == []
    latency = {"mean": 1.0, "p50": 1.0, "p90": 2.0, "p99": 3.0}
    row = {"who": "ours", "rate": None, "requests_per_second": 5.0, "output_tokens_per_second": 9.0, "first_token": latency, "between_tokens": latency, "end_to_end": latency}
    page = generation_page.section([], ("from there", {"model": "1b", "seats": 4, "token_budget": 8, "rows": [row, {**row, "rate": 2.5, "who": "b"}]}))
    assert "## Text generation" not in page
    assert [line for line in page if line.startswith("| all at once | ours |")]
    assert [line for line in page if line.startswith("| 2.5/s | b |")]


def test_the_page_tells_how_many_times_faster():
    common = {"what": "decode", "batch": 1, "tokens_per_second": 1.0, "gbs": 2.0, "share": 0.5}
    steps = [{**common, "who": who, "ms": ms} for who, ms in (("ours", 1.0), ("torch.compile, flex", 1.5), ("torch.compile, sdpa", 2.0))]
    page = generation_page.decode({"model": "1b", "copy_gbs": 2961.0, "rows": [*steps, {"what": "decode", "who": "x", "batch": 2, "error": "E"}]})
    assert "Against the fastest torch.compile: 1.50 at 1 text." in page
    assert [line.split("|")[-2].strip() for line in page if line.startswith("| 1 |")] == ["", "1.50", "2.00"]
