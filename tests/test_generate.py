"""Decoders without a cache become generators: eleven architectures, token for token as transformers, in mixed batches."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from greedy import greedy

import rewrite
from rewrite.export.source import Source
from rewrite.export.torch_export import export
from rewrite.runtime.plan_model import PlanModel

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from architectures import ARCHITECTURES

NAMES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3", "GPT-2", "OPT", "GPT-NeoX", "Phi-3", "Falcon (rotary)"]
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


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in NAMES])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    made = source(name)
    expected = [by_transformers(made.module, p) for p in prompts()]
    assert len({t for tokens in expected for t in tokens}) > 24
    export(made, tmp_path / "model.onnx")
    result = rewrite.optimize(tmp_path / "model.onnx", generate=True)
    assert result.report.plugins["PagedAttention"] == 2
    assert "FusedAttention" not in result.report.plugins
    assert "AttentionMask" not in result.report.plugins
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert result.report.model_error < 1e-5
    plan = rewrite.build(result.model, tmp_path / "plan", engines=False)
    assert greedy(PlanModel(plan, memory=1 << 22), prompts(), STEPS) == expected
