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
from rewrite.verify import check_models, file_session, run_model

# Fused nodes a layer.
MLP = {"minilm": "gelu", "bert": "gelu", "gpt2": "gelu_tanh", "llama": "swish", "qwen3": "swish", "gemma3": "gelu_tanh"}
GATED = ("llama", "qwen3", "gemma3")
MATRIX = list(itertools.product(exported.MODELS, exported.EXPORTERS, ("eager", "sdpa"), (True, False)))


def broken(name, exporter, opset, masked):
    """What PyTorch's exporters cannot do: the reason they give, or None."""
    if masked or name not in exported.DECODERS:
        return None
    if exporter == "torchscript":
        return "aten::diff"
    return "RotaryEmbedding|opset 20" if opset == 23 and name in GATED else None


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
    reason = broken(name, *exporter, masked)
    if reason is not None:
        with pytest.raises(RewriteError, match=reason):
            exported.exported(name, *exporter, attention, masked)
        return
    result = rewrite.optimize(exported.exported(name, *exporter, attention, masked))
    layers = exported.LAYERS.get(name, 2)
    assert result.report.plugins.get("FusedAttention") == layers, result.report.plugins
    assert result.report.plugins.get("GatedMatMulAct", 0) == (layers if name in GATED else 0)
    assert activations(result.model).get(MLP[name]) == layers
    left = result.report.operators_after
    assert not {"Softmax", "Erf", "Sigmoid", "Attention", "MatMul", "Gemm", "RotaryEmbedding"} & set(left), left
    assert result.report.plugins.get("Rotary", 0) == (2 * layers if name in GATED else 0)
    source = exported.source(name, attention, masked)
    compare_with_torch(source, result.model)  # three shapes; left, right and no padding; to 1e-4
    plan = rewrite.build(result.model, tmp_path / "plan", engines=False, verify=False)
    assert check_plan(plan, result.model, 1e-5 if name == "minilm" else 1e-4) < 1e-4


@pytest.mark.parametrize("name", exported.MODELS)
def test_all_rows_are_those_of_the_original(name):
    """Rows of padding, too: what the rewriting keeps is the export, whatever PyTorch says of them."""
    path = exported.exported(name, "dynamo", 20)
    result = rewrite.optimize(path)
    source = exported.source(name, "eager", True)
    before, after = file_session(rewrite.load(path)), file_session(result.model)
    for seed, shape in enumerate(SHAPES):
        for padding in PADDINGS:
            feeds = {n: t.numpy() for n, t in make_inputs(source, dict(zip(("batch", "sequence"), shape, strict=True)), padding, seed).items()}
            want, got = before.run(None, feeds)[0], after.run(None, feeds)[0]
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(("exporter", "attention"), [(("dynamo", 20), "eager"), (("dynamo", 23), "sdpa"), (("torchscript", 18), "sdpa")])
def test_minilm_embeddings_are_those_of_pytorch(exporter, attention, tmp_path):
    source = exported.source("minilm", attention, True)
    result = rewrite.optimize(exported.exported("minilm", *exporter, attention))
    plan = rewrite.build(result.model, tmp_path / "plan", engines=False, verify=False)
    for padding in PADDINGS:
        inputs = make_inputs(source, {"batch": 4, "sequence": 24}, padding, 0)
        feeds = {n: t.numpy() for n, t in inputs.items()}
        with torch.no_grad():
            want = embed(source.module(**inputs).numpy(), feeds["attention_mask"])
        for got in (run_model(result.model, feeds), plan.run(feeds)):
            assert np.abs(embed(got["last_hidden_state"], feeds["attention_mask"]) - want).max() < 1e-5


def embed(hidden, mask):
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["minilm", "gemma3"])
def test_the_rewritten_file_is_an_ordinary_model(name, tmp_path):
    """Checker, strict inference, Polygraphy's inspector and runner, and back again by unfusing."""
    before = exported.exported(name, "dynamo", 20)
    path = tmp_path / "fused.onnx"
    result = rewrite.optimize(before)
    result.model.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    tool = [str(Path(sys.executable).parent / "polygraphy")]
    shown = subprocess.run([*tool, "inspect", "model", str(path)], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    assert "3 Graph Input(s)" in shown.stdout or "2 Graph Input(s)" in shown.stdout
    ran = subprocess.run([*tool, "run", "--onnxrt", str(path), "--input-shapes", *(f"{i.name}:[2,7]" for i in result.model.proto.graph.input)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    plain = rewrite.load(rewrite.unfuse(result.model.proto))
    assert not plain.plugin_nodes()
    assert not plain.proto.functions
    assert check_models(rewrite.load(before), plain) < 1e-5
