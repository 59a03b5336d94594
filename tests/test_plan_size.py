"""`rewrite plan-size`: cases computed by hand, plans against their models, and predicted memory against that of a real rank."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import decoder as d
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse
from decoder import decoder

import rewrite
from rewrite.cli import main
from rewrite.errors import RewriteError
from rewrite.runtime.devices import DEVICES, LAUNCH_US, NCCL_POINTS, STREAM_SHARE, Device, parse_gpus
from rewrite.runtime.plan_size import plan_size

GPU = Device("test", 10**9, 1000.0, 500.0, 100.0, 450.0, "made up")
WEIGHTS = 4 * (60 * 16 + 16 * 32 + 2 * 16 * 16 + 32 * 16 + 16 * 60)  # table, queries, keys and values, output, head
PRODUCTS = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 16 * 60


@pytest.fixture
def model(tmp_path):
    onnx.save(decoder(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_rank_by_hand(model, tokens):
    batch, context = 2, 40
    found = plan_size(model, GPU, batch=batch, context=context, tokens=tokens)
    stage, rows = found["stages"][0], batch * tokens
    assert found["note"] == ""
    assert stage["memory"]["weights"] == WEIGHTS
    assert stage["memory"]["kv"] == batch * 48 * 2 * (8 + 8) * 4  # three blocks of 16 positions, 2 heads, keys and values
    assert stage["read"]["kv"] == batch * context * 2 * (8 + 8) * 4
    assert stage["read"]["weights"] == 4 * (PRODUCTS + rows * 16)  # of the table the rows of the new tokens
    pairs = sum(context - i for i in range(tokens))
    logits = 16 * 60 * (rows - batch)  # only of the last token of each text
    assert stage["operations"] == 2 * (rows * PRODUCTS - logits) + 2 * batch * pairs * (4 * 8 + 4 * 8)
    assert stage["collectives"] == {"count": 0, "bytes": 0, "us": 0.0}
    assert stage["us"] == pytest.approx(LAUNCH_US * stage["calls"])  # so small that nothing takes longer than a kernel
    assert found["new_tokens"] == rows
    assert found["tokens_per_second"] == pytest.approx(rows / found["step_us"] * 1e6)


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_window_by_hand(tmp_path, tokens):
    onnx.save(decoder(attention=d.WINDOW), tmp_path / "model.onnx")
    stage = plan_size(tmp_path / "model.onnx", GPU, batch=2, context=40, tokens=tokens)["stages"][0]
    assert stage["read"]["kv"] == 2 * min(40, 5 + tokens - 1) * 2 * (8 + 8) * 4  # all that any of the new tokens sees
    pairs = sum(min(5, 40 - i) for i in range(tokens))
    logits = 16 * 60 * 2 * (tokens - 1)
    assert stage["operations"] == 2 * (2 * tokens * PRODUCTS - logits) + 2 * 2 * pairs * (4 * 8 + 4 * 8)


def test_a_large_call_takes_as_long_as_its_bytes_or_its_operations(tmp_path):
    width = 1024
    weights = {n: np.zeros((width, width), np.float32) for n in ("w1", "w2")}
    onnx.save(parse(f"(float[batch, {width}] x) => (float[batch, {width}] y) {{ h = MatMul(x, w1) g = Relu(h) y = MatMul(g, w2) }}", 20, **weights), tmp_path / "m.onnx")
    slow = Device("slow", 10**9, 0.001, 1e9, 1e9, 450.0, "made up")
    found = plan_size(tmp_path / "m.onnx", slow, batch=2, context=2)
    moved = 2 * (4 * width * width + 2 * 2 * width * 4)
    assert found["step_us"] == pytest.approx(moved / (0.001 * STREAM_SHARE) / 1e3)
    assert "it is no text generator" in found["note"]
    weak = Device("weak", 10**9, 1e9, 1.0, 0.001, 450.0, "made up")
    assert plan_size(tmp_path / "m.onnx", weak, batch=2, context=2)["step_us"] == pytest.approx(2 * 2 * 2 * width * width / 0.001 / 1e6)  # float32: the slower rate


def test_ranks_by_hand(model):
    found = plan_size(model, GPU, 2, batch=2, context=40)
    stage = found["stages"][0]
    assert (found["tensor_parallel"], found["pipeline_parallel"], stage["ranks"]) == (2, 1, [0, 1])
    assert stage["memory"]["weights"] == WEIGHTS / 2
    assert stage["memory"]["kv"] == 2 * 48 * 1 * (8 + 8) * 4
    sizes = [2 * 16 * 4, 2 * 16 * 4, 2 * 60 * 4]  # the table's join, the sum, the join of the logits
    assert stage["collectives"]["count"] == 3
    assert stage["collectives"]["bytes"] == sum(sizes)
    assert stage["collectives"]["us"] == pytest.approx(3 * NCCL_POINTS[0][1])


def test_stages_by_hand(model):
    found = plan_size(model, GPU, 2, pipeline_parallel=2, batch=2, context=40)
    first, second = found["stages"]
    assert first["memory"]["weights"] + second["memory"]["weights"] == WEIGHTS
    assert (first["memory"]["kv"] > 0, second["memory"]["kv"]) == (True, 0)
    assert (first["sent_bytes"], second["sent_bytes"]) == (2 * 16 * 4, 0)
    assert first["send_us"] == pytest.approx(GPU.send_us(128))
    assert found["step_us"] == pytest.approx(first["us"] + second["us"] + first["send_us"])
    apart = plan_size(model, GPU, 2, pipeline_parallel=2, batch=2, context=40, host=1)
    assert apart["stages"][0]["send_us"] == pytest.approx(GPU.send_us(128, hosts=2))


@pytest.mark.parametrize("kind", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_plan_has_the_numbers_of_its_model(model, kind, tmp_path):
    world, stages = kind
    made = rewrite.optimize(model, generate=True, tensor_parallel=world, pipeline_parallel=stages).model
    made.save(tmp_path / "made.onnx")
    rewrite.build(made, tmp_path / "plan", engines=False)
    expected = plan_size(model, GPU, world * stages, tensor_parallel=world, pipeline_parallel=stages, batch=3, context=33)
    for path in (tmp_path / "made.onnx", tmp_path / "plan"):
        found = plan_size(path, GPU, world * stages, batch=3, context=33)
        for one, other in zip(expected["stages"], found["stages"], strict=True):
            for part in ("read", "operations", "collectives", "sent_bytes"):
                if part == "read":
                    assert one[part]["weights"] == other[part]["weights"]
                    assert one[part]["kv"] == other[part]["kv"]
                else:
                    assert one[part] == other[part], part
            assert one["memory"]["weights"] == other["memory"]["weights"]
            assert one["memory"]["kv"] == other["memory"]["kv"]


def test_stages_of_whole_sequences_send_them_whole(tmp_path):
    weights = {n: np.ones((8, 8), np.float32) for n in ("w1", "w2")}
    text = "(float[batch, sequence, 8] x) => (float[batch, sequence, 8] y) { p = MatMul(x, w1) g = Gelu(p) q = MatMul(g, w2) h = Gelu(q) y = MatMul(h, w1) }"
    rewrite.optimize(parse(text, 20, **weights), pipeline_parallel=2).model.save(tmp_path / "m.onnx")
    rewrite.build(tmp_path / "m.onnx", tmp_path / "plan", engines=False)
    for path in (tmp_path / "m.onnx", tmp_path / "plan"):
        assert plan_size(path, GPU, 2, batch=3, context=50)["stages"][0]["sent_bytes"] == 3 * 50 * 8 * 4


def test_a_message_that_any_rank_sends_to_another_host_is_as_slow(model):
    found = plan_size(model, GPU, 6, tensor_parallel=2, pipeline_parallel=3, context=40, host=3)
    assert found["stages"][1]["send_us"] == pytest.approx(GPU.send_us(64, hosts=2))  # rank 2 to rank 4; 3 and 5 are neighbours


def test_devices():
    h200 = DEVICES["H200"]
    for size, us in NCCL_POINTS:
        assert h200.sum_us(size, 2) == pytest.approx(us)
    assert h200.sum_us(1 << 20, 1) == 0
    assert h200.sum_us(100, 2) == pytest.approx(6.7)
    assert h200.sum_us(32 << 20, 2) == pytest.approx(74.0 + (74.0 - 13.8) * 16 / 15)
    assert h200.sum_us(1 << 20, 4) > h200.sum_us(1 << 20, 2)
    assert DEVICES["A100"].sum_us(1 << 20, 2) > h200.sum_us(1 << 20, 2)
    assert parse_gpus("16xh200") == (h200, 16)
    assert parse_gpus("B200") == (DEVICES["B200"], 1)
    assert all(("measured" in dev.source) == (name in ("H100", "H200")) for name, dev in DEVICES.items())


ERRORS = {
    "an unknown GPU": (["--gpus", "2xH10"], "there is no description of 'H10'; did you mean 'H100'?"),
    "no number": (["--gpus", "axH100"], "'a' is no number of GPUs"),
    "heads that do not divide": (["--gpus", "3xH100", "--tensor-parallel", "3"], "its 4 heads do not divide by 3"),
    "a product that is not --gpus": (["--gpus", "4xH100", "--tensor-parallel", "3"], "are 3, and there are 4 GPUs"),
    "too many stages": (["--gpus", "9xH100", "--pipeline-parallel", "9"], "cannot be cut into 9 stages"),
    "no batch": (["--batch", "0"], "--batch is 0; give 1 or more"),
    "too many tokens": (["--tokens", "50", "--context", "20"], "50 new tokens of 20 make no sense"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(model, name):
    options, message = ERRORS[name]
    done = CliRunner().invoke(main, ["plan-size", str(model), "--context", "64", *options])
    assert done.exit_code == 2
    assert message in done.output
    assert done.output.count("\n") == 1


def test_a_split_model_on_other_gpus_is_refused(model, tmp_path):
    rewrite.optimize(model, generate=True, tensor_parallel=2).model.save(tmp_path / "two.onnx")
    with pytest.raises(RewriteError, match="it is made for 2 ranks; give as many --gpus, or the model that it was made of"):
        plan_size(tmp_path / "two.onnx", GPU, 4)


def test_sizes_that_do_not_follow_are_refused(tmp_path):
    text = """(float[batch, 8] x) => (float[many, 8] y) {
        zero = Constant<value = float {0.0}>() seen = Greater(x, zero) found = NonZero(seen) first = Constant<value = int64 {0}>() rows = Gather(found, first)
        picked = Gather(x, rows) h = MatMul(picked, w) y = Relu(h) }"""
    onnx.save(parse(text, 20, w=np.ones((8, 8), np.float32)), tmp_path / "m.onnx")
    done = CliRunner().invoke(main, ["plan-size", str(tmp_path / "m.onnx")])
    assert done.exit_code == 2
    assert "does not follow from the sizes of its inputs" in done.output
    assert done.output.count("\n") == 1


def test_positions_are_a_limit(tmp_path):
    onnx.save(decoder(positions=d.BY_SLICE), tmp_path / "m.onnx")
    with pytest.raises(RewriteError, match="it was made for 80 positions, and --context is 81; give less"):
        plan_size(tmp_path / "m.onnx", GPU, context=81)
    assert plan_size(tmp_path / "m.onnx", GPU)["context"] == 80


def test_command(model):
    arguments = ["plan-size", str(model), "--gpus", "2xL40S", "--context", "64"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "on 2 x L40S, 2 ranks; 1 x 64 tokens, 1 new" in shown.output
    assert "datasheet" in shown.output
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert found["fits"]
    assert found["stages"][0]["memory"]["weights"] == WEIGHTS / 2
    tiny = plan_size(model, Device("tiny", 1000, 1.0, 1.0, 1.0, 1.0, "made up"), context=64)
    assert not tiny["fits"]


MEASURED = '''
import sys
import numpy as np
from rewrite.runtime.batch import Batch
from rewrite.runtime.plan import Plan
from rewrite.runtime.plan_model import PlanModel

class Alone:
    """A rank whose others are as it is: its sums are its own."""
    def __init__(self, rank, size): self.rank, self.size = rank, size
    def all_reduce(self, x): return x
    def all_gather(self, x): return np.concatenate([x] * self.size, -1)
    def exchange(self, data): return [data] * self.size
    def broadcast(self, x): pass
    def send(self, x, rank): pass
    def receive(self, x, rank): x[...] = 0
    def split(self, size): return Alone(self.rank % size, size)

def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))

path, kv, small, rank, size = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])

def step(model, block, position):
    one = np.array([1])
    batch = Batch(one, np.array([position]), np.array([0], np.int32), np.arange(model.blocks, dtype=np.int32)[None], np.array([0, 1], np.int32), np.array([position + 1], np.int32), np.array([0]))
    model._step(batch)

step(PlanModel(Plan(small), 1 << 16, Alone(rank, size)), 0, 1)  # what every process needs is there before
before = resident()
model = PlanModel(Plan(path), kv, Alone(rank, size))
loaded = resident()
for cache in model.caches[0].values():
    cache[...] = 1  # as after the blocks of all texts were written
for _ in range(3):
    step(model, 0, 20)
print(loaded - before, resident() - before)
'''


def large_decoder(monkeypatch, vocabulary=8000, width=1024):
    for name, value in (("VOCABULARY", vocabulary), ("WIDTH", width), ("HEADS", 16), ("KEY_HEADS", 8), ("SIZE", width // 16)):
        monkeypatch.setattr(d, name, value)
    return decoder(outputs=f"float[batch, sequence, {vocabulary}] logits")


def grown(plan, small, kv, rank, size):
    """Bytes by which a process grows that is a rank of a plan: when it has loaded it, and when all its caches are written."""
    command = [sys.executable, "-c", MEASURED, str(plan), str(kv), str(small), str(rank), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    loaded, used = map(int, done.stdout.split())
    return loaded, used


def test_predicted_memory_is_that_of_a_rank(tmp_path, monkeypatch):
    rewrite.build(rewrite.optimize(decoder(), generate=True, tensor_parallel=2, verify=False).model, tmp_path / "small", engines=False, verify=False)
    rewrite.build(rewrite.optimize(large_decoder(monkeypatch), generate=True, tensor_parallel=2, verify=False).model, tmp_path / "plan", engines=False, verify=False)
    memory = plan_size(tmp_path / "plan", GPU, 2, batch=4, context=2048)["stages"][0]["memory"]
    assert memory["weights"] > 30 << 20
    assert memory["kv"] == 4 * 2048 * 4 * 128 * 4
    loaded, used = grown(tmp_path / "plan", tmp_path / "small", memory["kv"], 1, 2)
    assert loaded <= 1.2 * memory["weights"]
    assert used == pytest.approx(memory["total"], rel=0.05)


def test_a_model_without_weights(tmp_path):
    pytest.importorskip("transformers")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4,
              "num_hidden_layers": 1, "vocab_size": 32000, "dtype": "bfloat16", "max_position_embeddings": 4096}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = tmp_path / "model.onnx"
    done = CliRunner().invoke(main, ["export", str(tmp_path), "-o", str(target), "--no-weights"])
    assert done.exit_code == 0, done.output
    assert "NOT compared with PyTorch (--no-weights)" in done.output
    data = (tmp_path / "model.onnx.data").stat()
    assert data.st_size > 50 << 20
    assert data.st_blocks * 512 < 1 << 20
    layer = 1024 * (1024 + 512 + 512 + 1024) + 3 * 1024 * 2048 + 2 * 1024
    found = plan_size(target, DEVICES["H100"], 2, context=4096)
    whole = 2 * (layer + 2 * 32000 * 1024 + 1024)
    assert found["note"] == ""
    assert found["stages"][0]["memory"]["weights"] == pytest.approx(whole / 2, rel=1e-3)
    assert math.isclose(found["stages"][0]["memory"]["kv"], 4096 * 2 * 256 * 2)
    refused = CliRunner().invoke(main, ["export", str(tmp_path), "-o", str(target), "--no-weights", "--exporter", "torchscript"])
    assert refused.exit_code == 2
    assert "without weights is exported by the dynamo exporter" in refused.output
