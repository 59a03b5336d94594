"""Decoders without a cache become generators: eleven architectures, token for token as transformers, in mixed batches."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import exported
import numpy as np
import onnx
import pytest
import torch
import transformers
from click.testing import CliRunner
from greedy import greedy

import rewrite
from rewrite.cli import main
from rewrite.errors import RewriteError
from rewrite.export.huggingface import as_flat, load_gguf
from rewrite.export.source import Source
from rewrite.export.torch_export import export
from rewrite.runtime.plan_model import PlanModel
from rewrite.verify_generator import generator_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from architectures import ARCHITECTURES

NAMES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "GPT-2", "OPT", "GPT-NeoX", "Phi-3", "Falcon (rotary)"]
OTHERS = ["Phi", "GPT-J", "StarCoder2", "Nemotron", "GLM", "OLMo 2"]
ALWAYS = ["Gemma 2", "OPT"]  # windows, soft caps and grouped heads; learned positions with an offset, shapes that are computed
LENGTHS = (1, 3, 8, 5, 17, 2, 24, 11)  # of eight prompts in flight; each has 32 tokens to come
STEPS = 32


@cache
def source(name: str) -> Source:
    """Layers times 6 and tables by 10: a model whose embedding outweighs its layers says one token for ever."""
    made = next(a for a in ARCHITECTURES if a.name == name).source()
    tables = {id(m.weight) for m in made.module.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in made.module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1 if id(parameter) in tables else 6)
    return made


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [[int(t) for t in rng.integers(3, 100, n)] for n in LENGTHS]


def by_transformers(flat: torch.nn.Module, prompt: list[int]) -> list[int]:
    """One prompt alone, with transformers' own cache; no token ends it."""
    ids = torch.tensor([prompt])
    made = flat.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in [*NAMES, *OTHERS]])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    made = source(name)
    expected = [by_transformers(made.module, p) for p in prompts()]
    assert len({t for tokens in expected for t in tokens}) > 15
    export(made, tmp_path / "model.onnx")
    result = rewrite.optimize(tmp_path / "model.onnx", generate=True)
    assert result.report.plugins["PagedAttention"] == 2
    assert "FusedAttention" not in result.report.plugins
    assert "AttentionMask" not in result.report.plugins
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert result.report.model_error < 1e-5
    plan = rewrite.build(result.model, tmp_path / "plan", engines=False)
    assert greedy(PlanModel(plan, memory=1 << 22), prompts(), STEPS) == expected


DECODERS = ("llama", "gemma3", "gpt2", "qwen3")
EXPORTS = [(n, e, a, m) for n in DECODERS for e in exported.EXPORTERS for a in ("eager", "sdpa") for m in (True, False) if not (e[0] == "torchscript" and not m)]
OFTEN = [("llama", ("dynamo", 23), "sdpa", False), ("gemma3", ("torchscript", 18), "sdpa", True)]


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in OFTEN else pytest.mark.slow) for c in EXPORTS], ids=lambda c: f"{c[0]}-{c[1][0]}{c[1][1]}-{c[2]}-{'mask' if c[3] else 'nomask'}")
def test_every_export_becomes_a_generator(case):
    """Both exporters, opsets 17 to 24, both attentions, with mask and position ids and without: positions are found in each."""
    name, exporter, attention, masked = case
    result = rewrite.optimize(exported.exported(name, *exporter, attention, masked), generate=True)
    assert result.report.plugins["PagedAttention"] == 2
    assert result.report.model_error < 1e-5
    windows = [layer["window"] for layer in generator_of(result.model.proto)["layers"]]
    assert windows == ([4, 0] if name == "gemma3" else [0, 0])


def test_from_a_hugging_face_directory_to_text(tmp_path):
    """Four commands: the tokenizer and the token that ends a text go along."""
    import tokenizers

    made = source("Llama").module.model
    made.generation_config.eos_token_id = [2, 7]
    made.save_pretrained(tmp_path / "llama")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path / "llama")
    model, fused, plan = (str(tmp_path / n) for n in ("model.onnx", "fused.onnx", "plan"))
    for command in (["export", str(tmp_path / "llama"), "-o", model], ["optimize", model, "-o", fused, "--generate", "--expect", "paged_attention=2"], ["build", fused, "-o", plan, "--no-engines"]):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    found = rewrite.Plan(plan).manifest.generator
    assert found["eos"] == [2, 7]
    assert found["positions"] == 64
    shown = CliRunner().invoke(main, ["generate", plan, "--prompt", "w11 w12", "--max-new-tokens", "8", "--ignore-eos", "--kv-memory", "4M"])
    for option, reason in (("--rules", "nothing.py"), ("--key", "nothing.py")):
        refused = CliRunner().invoke(main, ["generate", plan, "--prompt", "w11", option, str(tmp_path / "nothing.py")])
        assert (refused.exit_code, reason in refused.stderr, refused.stderr.count("\n")) == (2, True, 1), refused.output
    expected = made.generate(torch.tensor([[11, 12]]), attention_mask=torch.ones(1, 2, dtype=torch.int64), max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert shown.stdout == " ".join(["w11 w12", *(f"w{t}" for t in expected[0, 2:].tolist())]) + "\n"


def test_no_gguf_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"GGML....")
    with pytest.raises(RewriteError, match="not a GGUF file"):
        load_gguf(tmp_path / "a.gguf")
    with pytest.raises(RewriteError, match="no such file"):
        load_gguf(tmp_path / "b.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF....")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RewriteError, match=r"reading GGUF files needs gguf; install the extra"):
        load_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(RewriteError, match="cannot be loaded"):
        load_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_sixteen_bits(dtype, tmp_path):
    """Caches have the model's type; on the CPU bfloat16 is computed in float32 and rounded between plugins."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(exported.config("llama")).to(getattr(torch, dtype)).eval()
    exported.amplify(model)
    export(as_flat(model), tmp_path / "model.onnx")
    result = rewrite.optimize(tmp_path / "model.onnx", generate=True)
    assert [layer["dtype"] for layer in generator_of(result.model.proto)["layers"]] == [dtype] * 2
    assert result.model.proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    plan = PlanModel(rewrite.build(result.model, tmp_path / "plan", engines=False), 1 << 20)
    assert {c.dtype.name for caches in plan.caches for c in caches.values()} == {dtype}
    texts, seen = [[5, 6, 7, 8, 9]], {}
    tokens = greedy(plan, texts, 4, seen=seen)[0]
    with torch.no_grad():
        logits = model.float()(torch.tensor([texts[0] + tokens])).logits[0].numpy()
    for (_, length), row in seen.items():
        assert np.abs(row - logits[length - 1]).max() < 0.03 * np.abs(logits).max()
