"""Models cut into stages: where, that all of them together compute the same, and plans of them in one process and under mpirun."""

from __future__ import annotations

import dataclasses
import itertools
import json

import exported
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import nodes, parse
from decoder import decoder
from greedy import greedy
from test_ranks import PROMPTS, generate, mpirun, needs_mpi

import rewrite
from rewrite.cli import main
from rewrite.errors import CheckFailed, RewriteError
from rewrite.patterns.transform_pipeline import best_cuts
from rewrite.runtime import plan_model
from rewrite.runtime.batch import Batch
from rewrite.runtime.plan import Manifest, Plan
from rewrite.runtime.plan_model import PlanModel
from rewrite.shards import KEY, all_ranks, shards_of
from rewrite.stages import stages_of

MLP = "n = MatMul(s, wq) g = Gelu(n) d = MatMul(g, wo) r = Add(s, d)"


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of one decoder, with an attention and an MLP, by ranks of a stage and stages."""
    folder, made = tmp_path_factory.mktemp("plans"), {}
    for world, stages in ((1, 1), (1, 2), (2, 2), (1, 3)):
        made[world, stages] = folder / f"{world}-{stages}"
        rewrite.build(rewrite.optimize(decoder(after=MLP), generate=True, tensor_parallel=world, pipeline_parallel=stages).model, made[world, stages], engines=False)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_cuts_are_the_best(seed):
    rng = np.random.default_rng(seed)
    costs = [float(c) for c in rng.integers(0, 20, 12)]
    places = sorted(int(p) for p in rng.choice(np.arange(1, 12), 6, replace=False))
    for stages in (2, 3, 4):

        def worst(cuts):
            return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))

        found = best_cuts(costs, places, stages)
        assert set(found) <= set(places)
        assert worst(found) == min(worst(cuts) for cuts in itertools.combinations(places, stages - 1))


def test_before_and_after():
    result = rewrite.optimize(decoder(after=MLP), generate=True, pipeline_parallel=2)
    model = result.model
    onnx.checker.check_model(model.proto, full_check=True)
    assert result.report.model_error < 1e-5
    assert [n for n in nodes(model.proto) if n.startswith(("rewrite.Send", "rewrite.Recv"))] == ["rewrite.Send", "rewrite.Recv"]
    first, second = stages_of(list(model.proto.graph.node), [o.name for o in model.proto.graph.output], 2)
    assert {"wq", "wk", "wv", "wo", "table"} <= first.reads
    assert first.outputs == ["keys_0", "values_0"]
    assert second.outputs == ["logits"]
    assert "head" in second.reads
    assert not {"table", "wk", "key_cache_0"} & second.reads
    assert first.sends == second.receives
    assert len(first.sends) == 1
    assert first.receives == second.sends == []
    assert result.report.shards.startswith("2 ranks in 2 stages: each of a stage has ")


def test_what_inputs_tell_is_computed_by_each_stage():
    rotary = """(float[batch, 8] x, float[batch, 8] angles) => (float[batch, 8] y) {
        c = Cos(angles) a = Mul(x, c) b = MatMul(a, w1) d = Gelu(b) e = MatMul(d, w2) f = Mul(e, c) g = Gelu(f) y = MatMul(g, w3) }"""
    weights = {n: np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32) for i, n in enumerate(("w1", "w2", "w3"))}
    made = rewrite.optimize(parse(rotary, 20, **weights), pipeline_parallel=2).model
    found = stages_of(list(made.proto.graph.node), ["y"], 2)
    assert [sum(n.op_type == "Cos" for n in stage.nodes) for stage in found] == [1, 1]
    assert len(found[0].sends) == 1


def test_too_many_stages_are_refused():
    with pytest.raises(RewriteError, match=r"cannot be cut into 9 stages: there are \d places where one value leads on; use fewer stages"):
        rewrite.optimize(decoder(), generate=True, pipeline_parallel=9)
    with pytest.raises(RewriteError, match="pipeline parallel: 0 stages"):
        rewrite.optimize(decoder(), pipeline_parallel=0)


def swapped(model):
    """The stage after the cut reads what the one before it made: without a message."""
    send, recv = (next(n for n in model.proto.graph.node if n.op_type.startswith(k)) for k in ("Send", "Recv"))
    for node in model.proto.graph.node:
        node.input[:] = [send.input[0] if n == recv.output[0] else n for n in node.input]


def another_stage(model):
    recv = next(n for n in model.proto.graph.node if n.op_type.startswith("Recv"))
    next(a for a in recv.attribute if a.name == "target").i = 5


def test_a_changed_graph_is_refused():
    made = rewrite.optimize(decoder(after=MLP), generate=True, pipeline_parallel=2).model
    another_stage(made)
    with pytest.raises(RewriteError, match=r"it was changed after it was cut into stages: Recv '.*' has no Send of its own; cut it again"):
        all_ranks(made)
    made = rewrite.optimize(decoder(after=MLP), generate=True, pipeline_parallel=2).model
    assert shards_of(made.proto).stages == 2
    onnx.helper.set_model_props(made.proto, {**{p.key: p.value for p in made.proto.metadata_props}, KEY: json.dumps({**shards_of(made.proto).to_dict(), "stages": "x"})})
    with pytest.raises(RewriteError, match="are not those of a model in shards"):
        shards_of(made.proto)


def test_without_its_message_a_stage_is_the_first_again():
    made = rewrite.optimize(decoder(after=MLP), generate=True, pipeline_parallel=2).model
    swapped(made)
    first, second = stages_of(list(made.proto.graph.node), [o.name for o in made.proto.graph.output], 2)
    assert second.nodes == []
    assert "logits" in first.outputs


def random_batch(rng, texts):
    lengths = rng.integers(1, 9, texts)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    before, size = rng.integers(0, 20, texts), int(starts[-1])
    positions = np.concatenate([b + np.arange(n) for b, n in zip(before, lengths, strict=True)])
    rows = rng.permutation(size)[: rng.integers(0, size + 1)]
    return Batch(np.arange(size), positions, np.arange(size, dtype=np.int32), np.arange(3 * texts, dtype=np.int32).reshape(texts, 3), starts, (before + lengths).astype(np.int32), rows)


@pytest.mark.parametrize("seed", range(30))
def test_parts_of_a_batch(seed):
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, int(rng.integers(1, 6)))
    parts, done = batch.parts(int(rng.integers(1, 6))), 0
    for part in parts:
        count, counts = len(part.tokens), np.diff(part.query_starts)
        assert part.tokens.tolist() == list(range(done, done + count))
        assert part.query_starts[0] == 0
        assert part.query_starts[-1] == count
        assert (counts > 0).all()
        assert len(part.block_tables) == len(part.context_lengths) == len(counts)
        for text, (a, b) in enumerate(itertools.pairwise(part.query_starts)):
            assert part.context_lengths[text] == part.positions[b - 1] + 1  # its last token stands at the last position
            whole = int(np.searchsorted(batch.query_starts, done + a, "right")) - 1
            assert part.block_tables[text].tolist() == batch.block_tables[whole].tolist()
        assert [r + done for r in part.logit_rows] == [r for r in batch.logit_rows if done <= r < done + count]
        assert {getattr(part, f.name).dtype for f in dataclasses.fields(Batch)} == {getattr(batch, f.name).dtype for f in dataclasses.fields(Batch)}
        done += count
    assert done == len(batch.tokens)


@pytest.mark.parametrize("part", [128, 2])
@pytest.mark.parametrize("kind", [(1, 2), (2, 2), (1, 3)])
def test_all_stages_in_one_process(plans, kind, part, monkeypatch):
    monkeypatch.setattr(plan_model, "PART", part)
    expected = greedy(PlanModel(Plan(plans[1, 1]), memory=1 << 20), PROMPTS, 12)
    assert len({t for tokens in expected for t in tokens}) > 3
    plan = Plan(plans[kind])
    assert (plan.manifest.ranks_of_stage, plan.manifest.stages) == kind
    assert greedy(PlanModel(plan, memory=1 << 21), PROMPTS, 12) == expected


def test_logits_of_parts_come_in_the_order_of_their_rows(plans, monkeypatch):
    rng, model = np.random.default_rng(0), PlanModel(Plan(plans[1, 2]), memory=1 << 20)
    tokens, rows = rng.integers(0, 50, 12), np.array([11, 3, 7, 0])
    batch = Batch(tokens, np.arange(12), np.arange(12, dtype=np.int32), np.array([[0]], np.int32), np.array([0, 12], np.int32), np.array([12], np.int32), rows)
    expected = model.step(batch)
    monkeypatch.setattr(plan_model, "PART", 3)
    assert np.abs(model.step(batch) - expected).max() < 1e-4
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_a_rank_has_what_its_stage_reads(plans):
    plan = Plan(plans[2, 2])
    first, last = plan.weights_of(0), plan.weights_of(3)
    assert {"table", "wk"} <= set(first)
    assert not {"table", "wk"} & set(last)
    assert "head" in last
    assert first["wk"].shape == (16, 8)
    assert set(plan.inputs_of(3)) == set(plan.inputs) - {"key_cache_0", "value_cache_0"}
    assert set(plan.outputs_of(0)) == {"keys_0", "values_0"}
    assert set(plan.outputs_of(3)) == {"logits"}
    assert not any(n.startswith(("rank", "stage")) for n in (*first, *last))


def test_the_check_of_a_plan_sees_a_wrong_message(tmp_path, monkeypatch):
    from rewrite.runtime.all_ranks import AllRanks

    model, stage = rewrite.optimize(decoder(after=MLP), generate=True, pipeline_parallel=2).model, AllRanks._stage

    def late(self, walks, messages):
        for waiting in messages.values():
            waiting[:] = [x * 1.01 for x in waiting]
        return stage(self, walks, messages)

    monkeypatch.setattr(AllRanks, "_stage", late)
    with pytest.raises(CheckFailed, match="the plan differs from the model"):
        rewrite.build(model, tmp_path / "plan", engines=False)


@pytest.mark.parametrize("change", [{"stage": 1}, {"attributes": {"source": 0, "target": 2}}, {"attributes": {"source": 1, "target": 0}}, {"outputs": ["x"]}])
def test_a_manifest_with_messages_that_lead_nowhere_is_refused(plans, change):
    data = json.loads(Plan(plans[1, 2]).manifest.to_json())
    send = next(s for s in data["steps"] if s["name"] == "Send")
    send.update(change)
    with pytest.raises(ValueError, match=r"steps\[\d+\]"):
        Manifest.from_json(json.dumps(data))


def test_a_model_that_generates_nothing(tmp_path):
    text = "(float[rows, 8] x) => (float[rows, 8] y) { p = MatMul(x, w1) g = Gelu(p) q = MatMul(g, w2) h = Gelu(q) y = MatMul(h, w1) }"
    weights = {n: np.random.default_rng(i).standard_normal((8, 8)).astype(np.float32) for i, n in enumerate(("w1", "w2"))}
    model = parse(text, 20, **weights)
    plan = rewrite.build(rewrite.optimize(model, pipeline_parallel=2).model, tmp_path / "plan", engines=False)
    x = np.random.default_rng(3).standard_normal((5, 8)).astype(np.float32)
    expected = rewrite.build(model, tmp_path / "whole", engines=False).run({"x": x})["y"]
    assert np.abs(plan.run({"x": x})["y"] - expected).max() < 1e-4
    with pytest.raises(RewriteError, match="expected float32"):
        plan.run({"x": x.astype(np.float64)})


def test_command(plans, tmp_path):
    onnx.save(decoder(after=MLP), tmp_path / "model.onnx")
    done = CliRunner().invoke(main, ["optimize", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "split.onnx"), "--generate", "--tensor-parallel", "2", "--pipeline-parallel", "2"])
    assert done.exit_code == 0, done.output
    assert "4 ranks in 2 stages: each of a stage has " in done.output
    arguments = ["--tokens", "5,6,7", "--max-new-tokens", "9", "--kv-memory", "1M"]
    emulated = CliRunner().invoke(main, ["generate", str(plans[2, 2]), "--world", "1", *arguments])
    assert emulated.exit_code == 0, emulated.output
    assert emulated.output == CliRunner().invoke(main, ["generate", str(plans[1, 1]), *arguments]).output


# --- under mpirun -----------------------------------------------------------------------------------------------------
MESSAGES = """
import numpy as np
from rewrite.runtime.communication import connect
c = connect()
pair = c.split(2)
assert (pair.size, pair.rank) == (2, c.rank % 2)
assert pair.all_reduce(np.float32([c.rank])).tolist() == [4 * (c.rank // 2) + 1]
for count in (0, 3, 200_000):
    if c.rank < 2:
        x = np.full(count, c.rank, np.float32)
        c.send(x, c.rank + 2)
        x[:] = 9  # what was sent is what it was
        c.send(x, c.rank + 2)
    else:
        for expected in (c.rank - 2, 9):
            x = np.empty(count, np.float32)
            c.receive(x, c.rank - 2)
            assert (x == expected).all(), (count, expected)
print("fine")
"""


@needs_mpi
def test_messages_and_groups():
    code, output, errors = mpirun(4, "-c", MESSAGES)
    assert code == 0, errors
    assert output.split() == ["fine"] * 4


@needs_mpi
@pytest.mark.parametrize("kind", [(1, 2), (2, 2)])
def test_generate_under_mpirun(plans, kind):
    long = ",".join(str(i % 50) for i in range(70))  # read in parts: a step of 256 tokens, PART for each stage
    assert plan_model.PART * kind[1] <= 256
    arguments = [a for p in (*(",".join(map(str, p)) for p in PROMPTS), *[long] * 4) for a in ("--tokens", p)] + ["--max-new-tokens", "8"]
    expected = CliRunner().invoke(main, ["generate", str(plans[1, 1]), "--kv-memory", "1M", *arguments])
    assert expected.exit_code == 0, expected.output
    code, output, errors = mpirun(kind[0] * kind[1], *generate(plans[kind], *arguments))
    assert code == 0, errors
    assert output == expected.output


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("kind", [(1, 2), (2, 2)])
@pytest.mark.parametrize("name", exported.DECODERS)
def test_greedy_tokens_of_real_exports_under_mpirun(name, kind, tmp_path):
    source = exported.exported(name, "dynamo", 18)
    for world, stages in ((1, 1), kind):
        rewrite.build(rewrite.optimize(source, generate=True, tensor_parallel=world, pipeline_parallel=stages).model, tmp_path / f"{world}-{stages}", engines=False)
    arguments = [*(a for p in PROMPTS for a in ("--tokens", ",".join(map(str, p)))), "--max-new-tokens", "32", "--ignore-eos"]
    expected = CliRunner().invoke(main, ["generate", str(tmp_path / "1-1"), "--kv-memory", "1M", *arguments])
    assert expected.exit_code == 0, expected.output
    code, output, errors = mpirun(kind[0] * kind[1], *generate(tmp_path / f"{kind[0]}-{kind[1]}", *arguments))
    assert code == 0, errors
    assert output == expected.output
