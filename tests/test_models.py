"""Every attention and every MLP of six architectures, as every exporter writes them, fused and still right."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import exported
import numpy as np
import onnx
import pytest
import torch

import rewrite
from rewrite.errors import RewriteError
from rewrite.export.compare import PADDINGS, SHAPES, compare_with_torch, make_inputs
from rewrite.runtime.build import check_plan
from rewrite.verify import file_session, run_model

# Fused nodes a layer.
MLP = {"minilm": "gelu", "bert": "gelu", "gpt2": "gelu_tanh", "llama": "swish", "qwen3": "swish", "gemma3": "gelu_tanh"}
GATED = ("llama", "qwen3", "gemma3")
ATTENTIONS = ("eager", "sdpa")
EVERYTHING = list(itertools.product(exported.MODELS, exported.EXPORTERS, ATTENTIONS, (True, False)))


def always(name, exporter, attention, masked):
    """What every run tests: all of MiniLM; of the others, each exporter once, both attentions and masks in turn. The rest is slow."""
    i, j = exported.MODELS.index(name), exported.EXPORTERS.index(exporter)
    has_mask = (i + j // 2) % 2 == 0 or (exporter[0] == "torchscript" and name in exported.DECODERS)
    return name == "minilm" or (attention, masked) == (ATTENTIONS[(i + j) % 2], has_mask)


MATRIX = [pytest.param(*case, marks=() if always(*case) else pytest.mark.slow) for case in EVERYTHING]


def broken(name, exporter, masked):
    """Whether PyTorch cannot do it: the TorchScript exporter has no `aten::diff`, by which decoders find packed sequences without a mask."""
    return exporter == "torchscript" and not masked and name in exported.DECODERS


def activations(model):
    """How many product nodes carry each activation."""
    found = {}
    for node in model.proto.graph.node:
        for attribute in node.attribute:
            if node.domain == "rewrite" and attribute.name == "activation":
                name = attribute.s.decode()
                found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize(("name", "exporter", "attention", "masked"), MATRIX, ids=lambda v: "".join(map(str, v)) if isinstance(v, tuple) else str(v))
def test_every_attention_and_mlp_is_fused(name, exporter, attention, masked, tmp_path):
    if broken(name, exporter[0], masked):
        with pytest.raises(RewriteError, match="aten::diff"):
            exported.exported(name, *exporter, attention, masked)
        return
    original = rewrite.load(exported.exported(name, *exporter, attention, masked))
    assert original.opset == exporter[1]
    result = rewrite.optimize(original)
    check_fused(name, result)
    source = exported.source(name, attention, masked)
    compare_with_torch(source, result.model)  # three shapes; left, right and no padding; to 1e-4
    check_same(source, original, result.model)
    onnx.checker.check_model(result.model.proto, full_check=True)
    onnx.shape_inference.infer_shapes(result.model.proto, check_type=True, strict_mode=True, data_prop=True)
    plan = rewrite.build(result.model, tmp_path / "plan", engines=False, verify=False)
    assert check_plan(plan, result.model, 1e-5 if name == "minilm" else 1e-4) < 1e-4
    if name == "minilm":
        check_embeddings(source, result.model, plan)


def check_fused(name, result):
    """Exactly as many nodes as the model has layers, and nothing left of what they replace."""
    layers = exported.LAYERS.get(name, 2)
    assert result.report.plugins.get("FusedAttention") == layers, result.report.plugins
    assert result.report.plugins.get("GatedMatMulAct", 0) == (layers if name in GATED else 0)
    assert activations(result.model).get(MLP[name]) == layers
    left = result.report.operators_after
    assert not {"Softmax", "Erf", "Sigmoid", "Gelu", "rewrite::Gelu", "rewrite::Swish", "Attention", "MatMul", "Gemm", "RotaryEmbedding"} & set(left), left
    assert result.report.plugins.get("Rotary", 0) == (2 * layers if name in GATED else 0)


def check_same(source, original, rewritten):
    """All rows, those of padding too, are the export's, whatever PyTorch says of them: rewritten, and unfused again."""
    unfused = rewrite.load(rewrite.unfuse(rewritten.proto))
    assert not unfused.plugin_nodes()
    assert not unfused.proto.functions
    before, others = file_session(original), [file_session(rewritten), file_session(unfused)]
    for seed, shape in enumerate(SHAPES):
        for padding in PADDINGS if "attention_mask" in source.inputs else PADDINGS[:1]:
            feeds = numpy_inputs(source, dict(zip(("batch", "sequence"), shape, strict=True)), padding, seed)
            want = before.run(None, feeds)[0]
            for other in others:
                np.testing.assert_allclose(other.run(None, feeds)[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def check_embeddings(source, model, plan):
    """Mean over the tokens, made unit length, as the authors of MiniLM define it: within 1e-5 of PyTorch."""
    for padding in PADDINGS if "attention_mask" in source.inputs else PADDINGS[:1]:
        feeds = numpy_inputs(source, {"batch": 4, "sequence": 24}, padding, 0)
        mask = feeds.get("attention_mask", np.ones_like(feeds["input_ids"]))
        want = embed(source.run({n: torch.from_numpy(a) for n, a in feeds.items()})[0].numpy(), mask)
        for got in (run_model(model, feeds), plan.run(feeds)):
            assert np.abs(embed(got["last_hidden_state"], mask) - want).max() < 1e-5


def numpy_inputs(source, sizes, padding, seed):
    return {n: t.numpy() for n, t in make_inputs(source, sizes, padding, seed).items()}


def embed(hidden, mask):
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["minilm", "gemma3"])
def test_the_rewritten_file_is_an_ordinary_model(name, tmp_path):
    """Polygraphy's inspector and runner take the file; checker and strict inference are tested with each export."""
    before = exported.exported(name, "dynamo", 20)
    path = tmp_path / "fused.onnx"
    result = rewrite.optimize(before)
    result.model.save(path)
    tool = [str(Path(sys.executable).parent / "polygraphy")]
    shown = subprocess.run([*tool, "inspect", "model", str(path)], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert "3 Graph Input(s)" in shown.stdout or "2 Graph Input(s)" in shown.stdout
    ran = subprocess.run([*tool, "run", "--onnxrt", str(path), "--input-shapes", *(f"{i.name}:[2,7]" for i in result.model.proto.graph.input)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
