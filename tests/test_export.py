"""Exporting: what is accepted, what is written, what PyTorch's exporters get wrong and what becomes of it."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import exported
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import rewrite
from rewrite.cli import main
from rewrite.export.compare import PADDINGS, compare_with_torch, make_inputs
from rewrite.export.huggingface import as_flat, load_directory
from rewrite.export.torch_export import Source, as_source, export


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class TinyNorm(torch.nn.Module):
    """Its epsilon is what the exporter's optimizer drops: a row of zeros becomes NaN."""

    def forward(self, x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-9)


def dims(path):
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input}


def test_dimensions_are_dynamic_and_named(tmp_path):
    done = export(as_source(Mlp(), torch.randn(4, 3, 8), {"x": {0: "batch", 1: "seq"}}), tmp_path / "m.onnx")
    assert dims(tmp_path / "m.onnx") == {"x": ["batch", "seq", 8]}
    assert done.error < 1e-5
    assert len(done.shapes) == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


def test_an_example_batch_of_one_stays_dynamic(tmp_path):
    export(as_source(Mlp(), torch.randn(1, 8)), tmp_path / "m.onnx")
    assert dims(tmp_path / "m.onnx") == {"x": ["batch", 8]}


def with_buffer(value):
    class Buffered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("small", torch.tensor(value))

        def forward(self, x):
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.small)

    return Buffered()


class Calls(torch.nn.Module):
    """A module of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def mean_square(x):
    return (x * x).mean(-1, keepdim=True)


@pytest.mark.parametrize("module", [
    TinyNorm(),
    with_buffer(1e-12),
    Calls(lambda x: x / torch.sqrt(mean_square(x) - -1e-12)),
    Calls(lambda x: x / torch.sqrt(torch.add(mean_square(x), 1, alpha=1e-12))),
    Calls(lambda x: x * (mean_square(x).sum() + 1e-9) / (mean_square(x).sum() + 1e-9)),
], ids=["add", "buffer", "sub", "alpha", "scalar"])  # fmt: skip
def test_a_tiny_epsilon_survives(module, tmp_path):
    """PyTorch's own export divides zero by zero here."""
    export(as_source(module, torch.randn(2, 8)), tmp_path / "m.onnx")
    (out,) = rewrite.verify.run_model(rewrite.load(tmp_path / "m.onnx"), {"x": np.zeros((3, 8), np.float32)}).values()
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("function", [lambda x: x * 1.000008, lambda x: 1.000008 * x, lambda x: x / 0.999992], ids=["mul", "mul_first", "div"])
def test_a_factor_near_one_survives(function, tmp_path):
    done = export(as_source(Calls(function), torch.randn(2, 8)), tmp_path / "m.onnx")
    assert done.error < 1e-6  # 8e-6 without the factor, which is within the tolerance of the comparison


def test_what_is_neutral_is_still_optimized_away(tmp_path):
    export(as_source(Calls(lambda x: torch.relu((x + 0.0) * 1.0)), torch.randn(2, 8)), tmp_path / "m.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node] == ["Relu"]


@pytest.mark.parametrize("verify", [True, False])
def test_a_dimension_the_module_fixes_is_refused(tmp_path, verify):
    with pytest.raises(rewrite.RewriteError, match=r"Calls fixes dimension 'batch' \(axis 0 of input x\) at 2"):
        export(as_source(Calls(lambda x: x + torch.ones(2, 8)), torch.randn(2, 8)), tmp_path / "m.onnx", verify=verify)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_the_module_does_not_take_are_not_asked_for(tmp_path):
    """There are positions for eight tokens; the usual twelve fail in PyTorch."""

    class Positions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(8, 4)

        def forward(self, ids):
            return self.table(torch.arange(ids.shape[1], device=ids.device)) + ids[..., None]

    done = export(as_source(Positions(), torch.ones(2, 8, dtype=torch.long)), tmp_path / "m.onnx")
    assert [tuple(s.values()) for s in done.shapes] == [(2, 7), (1, 8), (3, 5)]


@pytest.mark.parametrize("mode", [True, False])
def test_the_module_keeps_its_mode(tmp_path, mode):
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).train(mode)
    export(as_source(module, torch.randn(2, 8)), tmp_path / "m.onnx")
    assert [m.training for m in module.modules()] == [mode] * 3
    with pytest.raises(rewrite.RewriteError):
        export(as_source(module, torch.randn(2, 9)), tmp_path / "m.onnx")
    assert [m.training for m in module.modules()] == [mode] * 3


@pytest.mark.parametrize(("opset", "exporter", "reason"), [
    (12, "dynamo", "opset 12 is not supported"),
    (99, "dynamo", "opset 99 is not supported"),
    (20, "onnx2torch", "exporter 'onnx2torch' is unknown"),
])  # fmt: skip
def test_what_no_exporter_writes_is_refused(tmp_path, opset, exporter, reason):
    with pytest.raises(rewrite.RewriteError, match=reason):
        export(as_source(Mlp(), torch.randn(2, 8)), tmp_path / "m.onnx", opset=opset, exporter=exporter)


def test_another_opset_than_asked_for_is_refused(tmp_path):
    """The converter of opsets gives up in silence on LayerNormalization, which opset 16 has not."""
    with pytest.raises(rewrite.RewriteError, match="cannot write opset 16: it wrote 18"):
        export(as_source(torch.nn.LayerNorm(8), torch.randn(2, 8)), tmp_path / "m.onnx", opset=16)
    assert list(tmp_path.iterdir()) == []


# --- 16 bits ------------------------------------------------------------------------------------------------------
def half(name, attention, dtype=torch.float16):
    import transformers

    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM if name in exported.DECODERS else transformers.AutoModel
    return as_flat(kind.from_config(exported.config(name), attn_implementation=attention).to(dtype))


@pytest.mark.parametrize(("name", "opset", "exporter", "advice"), [("gemma3", 23, "dynamo", "try opset 20"), ("gpt2", 18, "torchscript", "try the dynamo exporter")])
def test_an_invalid_fp16_graph_is_refused_with_what_works(tmp_path, name, opset, exporter, advice):
    with pytest.raises(rewrite.RewriteError, match=f"made an invalid model at opset {opset}: .*{advice}"):
        export(half(name, "sdpa"), tmp_path / "m.onnx", opset=opset, exporter=exporter, verify=False)
    assert list(tmp_path.iterdir()) == []
    assert 0 < export(half(name, "sdpa"), tmp_path / "m.onnx").error < 1e-2


def test_bfloat16_is_compared_in_float32(tmp_path):
    source = half("llama", "eager", torch.bfloat16)
    assert export(source, tmp_path / "m.onnx").error < 1e-5
    model = rewrite.load(tmp_path / "m.onnx")
    with torch.no_grad():
        source.module.model.lm_head.weight.mul_(1.01)
    with pytest.raises(rewrite.CheckFailed, match=r"output 'logits' differs from PyTorch by 1\.0e-02"):
        compare_with_torch(source, model)


def test_rounded_constants_of_a_bfloat16_model_are_no_difference(tmp_path):
    """Those of GPT-2's Gelu and scale: 0.044715 is 0.0447998 there, and PyTorch in float32 has it exactly."""
    assert 1e-4 < export(half("gpt2", "eager", torch.bfloat16), tmp_path / "m.onnx").error < 5e-3


# --- rotary embeddings at opset 23 ----------------------------------------------------------------------------------
@pytest.mark.parametrize("masked", [True, False])
def test_rotary_without_positions_has_the_batch_it_needs(masked):
    nodes = onnx.load(exported.exported("llama", "dynamo", 23, "sdpa", masked)).graph.node
    expanded = [n.input[1].endswith("_expanded") and n.input[2].endswith("_expanded") for n in nodes if n.op_type == "RotaryEmbedding"]
    assert expanded == [not masked] * 4


# --- outputs --------------------------------------------------------------------------------------------------------
def test_several_outputs_and_inputs_by_name(tmp_path):
    class Pair(torch.nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "parts": (a * 2, b * 3)}

    source = as_source(Pair(), {"b": torch.randn(2, 3), "a": torch.randn(2, 3)})
    export(source, tmp_path / "m.onnx")
    assert [o.name for o in onnx.load(tmp_path / "m.onnx").graph.output] == ["sum", "parts_0", "parts_1"]


@pytest.mark.parametrize(("module", "example", "reason"), [
    (lambda x: x, torch.ones(2), "is a function, expected a torch.nn.Module"),
    (Mlp(), "text", "must be a tensor"),
    (Mlp(), (), "must be a tensor"),
    (Mlp(), (torch.ones(2, 8), torch.ones(2)), "2 example inputs are given, Mlp.forward takes 1: x"),
])  # fmt: skip
def test_what_cannot_be_exported_is_said(module, example, reason):
    with pytest.raises(rewrite.RewriteError, match=reason):
        as_source(module, example)


@pytest.mark.parametrize("axes", [{2: "batch"}, {-1: "batch"}, {0: 3}, {0: "a b"}, ["batch"], {"batch": 0}])
def test_dynamic_shapes_that_are_none_are_refused(axes):
    with pytest.raises(rewrite.RewriteError, match="the dynamic shape of input x is"):
        as_source(Mlp(), torch.ones(2, 8), {"x": axes})


def test_dynamic_shapes_of_unknown_inputs_are_refused():
    with pytest.raises(rewrite.RewriteError, match="must be given for the inputs x"):
        as_source(Mlp(), torch.ones(2, 8), {"y": {0: "batch"}})


def test_a_module_that_fails_is_named_with_its_shapes(tmp_path):
    with pytest.raises(rewrite.RewriteError, match=r"Mlp fails in PyTorch on inputs \{'x': \[2, 9\]\}"):
        export(as_source(Mlp(), torch.ones(2, 9)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_module_the_exporter_cannot_take_leaves_no_file(tmp_path):
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(rewrite.RewriteError, match="PyTorch's dynamo exporter fails on Branches"):
        export(as_source(Branches(), torch.ones(2, 8)), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_is_found_and_not_written(tmp_path):
    """TorchScript bakes a branch in: right for the example, wrong for other inputs."""

    class Baked(torch.nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[0] > 2 else x

    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(rewrite.CheckFailed, match=r"output 'output' differs from PyTorch by .* at {'batch': 3"):
        export(as_source(Baked(), torch.ones(2, 8)), tmp_path / "m.onnx", exporter="torchscript")
    assert (tmp_path / "m.onnx").read_text() == "old"
    export(as_source(Baked(), torch.ones(2, 8)), tmp_path / "m.onnx", exporter="torchscript", verify=False)
    assert dims(tmp_path / "m.onnx") == {"x": ["batch", 8]}


def test_large_weights_are_stored_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("rewrite.export.torch_export.LARGE", 100)
    module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    export(as_source(module, torch.randn(2, 64)), tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    result = rewrite.optimize(tmp_path / "m.onnx")
    assert result.report.plugins


def test_new_large_weights_replace_the_old_ones_only_with_their_model(tmp_path, monkeypatch):
    monkeypatch.setattr("rewrite.export.torch_export.LARGE", 100)
    source, path = as_source(torch.nn.Linear(64, 128), torch.randn(2, 64)), tmp_path / "m.onnx"
    (tmp_path / "m.onnx.data7").write_text("not ours")
    export(source, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        source.module.weight.mul_(2)
    real = os.replace

    def full_disk(old, new):
        if Path(new) == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(old, new)

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(rewrite.RewriteError, match=r"m\.onnx: cannot be written: No space left on device"):
        export(source, path)
    monkeypatch.setattr("os.replace", real)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    export(source, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data1", "m.onnx.data7"]
    (out,) = rewrite.verify.run_model(rewrite.load(path), {"input": np.ones((1, 64), np.float32)}).values()
    np.testing.assert_allclose(out, source.run({"input": torch.ones(1, 64)})[0], rtol=1e-4, atol=1e-5)


def test_what_torchscript_cannot_export_is_one_line(tmp_path, capfd):
    """PyTorch prints the graph, of a large model thousands of lines, from C++."""

    class Singular(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(rewrite.RewriteError, match=r"linalg_svdvals.* is not supported; try the dynamo exporter"):
        export(as_source(Singular(), torch.ones(3, 4)), tmp_path / "m.onnx", exporter="torchscript")
    assert capfd.readouterr() == ("", "")


def test_the_torchscript_exporter_refuses_large_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("rewrite.export.torch_export.LARGE", 100)
    with pytest.raises(rewrite.RewriteError, match=r"TorchScript exporter cannot write .* GB of weights; use the dynamo exporter"):
        export(as_source(Mlp(), torch.randn(2, 8)), tmp_path / "m.onnx", exporter="torchscript")


def test_a_folder_that_takes_no_files_is_one_line():
    with pytest.raises(rewrite.RewriteError, match=r"/proc/m\.onnx: cannot be written"):
        export(as_source(Mlp(), torch.randn(2, 8)), "/proc/m.onnx")


def test_padding_hides_tokens_on_the_right_side():
    source = exported.source("bert", "eager", True)
    sizes = {"batch": 3, "sequence": 6}
    masks = {p: make_inputs(source, sizes, p, 0)["attention_mask"].tolist() for p in PADDINGS}
    assert masks["none"] == [[1] * 6] * 3
    assert masks["right"] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]
    assert masks["left"] == [row[::-1] for row in masks["right"]]


def test_positions_count_real_tokens():
    made = make_inputs(exported.source("llama", "eager", True), {"batch": 1, "sequence": 5}, "left", 0)
    assert made["attention_mask"].tolist() == [[0, 1, 1, 1, 1]]
    assert made["position_ids"].tolist() == [[0, 0, 1, 2, 3]]


def test_a_wrong_model_fails_the_comparison():
    path = exported.exported("llama", "dynamo", 20)
    model = rewrite.load(path)
    for tensor in model.proto.graph.initializer:
        if tensor.dims and len(tensor.dims) == 2 and tensor.dims[0] == 64:
            array = onnx.numpy_helper.to_array(tensor) * 1.01
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
            break
    with pytest.raises(rewrite.CheckFailed, match="output 'logits' differs from PyTorch"):
        compare_with_torch(exported.source("llama", "eager", True), model)


# --- Hugging Face directories -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    import transformers

    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(exported.config("llama")).save_pretrained(path)
    return path


def test_a_directory_is_a_decoder_with_positions(directory):
    source = load_directory(directory)
    assert list(source.inputs) == ["input_ids", "attention_mask", "position_ids"]
    assert source.outputs == ["logits"]
    assert source.limits == {"input_ids": 100}


def test_a_vision_model_takes_pixels(tmp_path):
    import transformers

    small = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16)
    transformers.ViTModel(small).save_pretrained(tmp_path / "vit")
    source = load_directory(tmp_path / "vit")
    assert {n: list(t.shape) for n, t in source.inputs.items()} == {"pixel_values": [2, 3, 32, 32]}
    done = export(source, tmp_path / "m.onnx")
    assert done.error < 1e-4
    assert rewrite.optimize(tmp_path / "m.onnx").report.plugins["FusedAttention"] == 1


def test_a_decoder_without_a_head_keeps_no_cache(tmp_path):
    import transformers

    transformers.AutoModel.from_config(exported.config("llama")).save_pretrained(tmp_path / "llama")
    source = load_directory(tmp_path / "llama", attention="sdpa")
    assert source.outputs == ["last_hidden_state"]
    assert export(source, tmp_path / "m.onnx").error < 1e-5


def break_head(path):
    """The weights of a bare model under the name of one with a head: transformers would draw the head at random."""
    import safetensors.torch

    weights = safetensors.torch.load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, path / "model.safetensors", {"format": "pt"})
    return "the weights lack 1 of LlamaForCausalLM's tensors, first lm_head.weight"


def break_trust(path):
    """Code of the directory's own must not run, nor be asked about."""
    config = json.loads((path / "config.json").read_text())
    (path / "own.py").write_text("raise SystemExit('ran')")
    (path / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    return "custom code"


def break_config(path):
    (path / "config.json").write_text("{")


def break_architecture(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    return "architecture Unheard is unknown"


def break_weights(path):
    for file in path.glob("*.safetensors"):
        file.unlink()


def break_safetensors(path):
    for file in path.glob("*.safetensors"):
        file.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize("damage", [break_config, break_architecture, break_weights, break_safetensors, break_head, break_trust])
def test_a_damaged_directory_is_one_line(directory, tmp_path, damage):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    reason = damage(copy) or "cannot be loaded"
    done = CliRunner().invoke(main, ["export", str(copy), "-o", str(tmp_path / "m.onnx")])
    assert done.exit_code == 2
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "m.onnx").exists()


def test_an_encoder_decoder_is_refused(tmp_path):
    import transformers

    small = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20)
    transformers.T5ForConditionalGeneration(small).save_pretrained(tmp_path / "t5")
    with pytest.raises(rewrite.RewriteError, match="is an encoder-decoder model"):
        load_directory(tmp_path / "t5")


# --- the command --------------------------------------------------------------------------------------------------
@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(textwrap.dedent("""
        import torch
        text = "not callable"
        def good():
            return torch.nn.Linear(8, 4), torch.ones(2, 8)
        def named():
            return torch.nn.Linear(8, 4), (torch.ones(2, 8),), ({0: "rows"},)
        def fails():
            raise ValueError("out of cheese")
        def nothing():
            pass
        def leaves():
            raise SystemExit("bye")
        def three():
            return 1, 2, 3
    """))
    (tmp_path / "broken_models.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "leaving_models.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_models", None)


def command(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_a_callable_is_exported(models):
    done = command("my_models:good", "-o", "m.onnx")
    assert done.exit_code == 0, done.stderr
    assert "equal to PyTorch" in done.stdout
    assert re.search(r", at \w+ \d+", done.stdout)
    assert dims("m.onnx") == {"input": ["batch", 8]}
    assert command("my_models:named", "-o", "m.onnx", "--no-verify").exit_code == 0
    assert dims("m.onnx") == {"input": ["rows", 8]}


def test_json_is_all_that_is_printed(models):
    done = command("my_models:good", "-o", "m.onnx", "--json", "--opset", "18", "--exporter", "torchscript")
    said = json.loads(done.stdout)
    assert said["error"] < 1e-6
    assert (said["opset"], said["exporter"], len(said["shapes"])) == (18, "torchscript", 3)
    assert "exporting with PyTorch's torchscript exporter, opset 18" in done.stderr
    assert onnx.load("m.onnx").opset_import[0].version == 18
    assert json.loads(command("my_models:good", "-o", "m.onnx", "--json", "--no-verify").stdout)["error"] is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_directory_is_exported_with_the_attention_asked_for(directory, tmp_path, attention):
    done = command(directory, "-o", tmp_path / "m.onnx", "--opset", "23", "--attention", attention)
    assert done.exit_code == 0, done.stderr
    assert ("Attention" in {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}) == (attention == "sdpa")


@pytest.mark.parametrize(("source", "reason"), [
    ("nothing", "neither a folder nor MODULE:CALLABLE"),
    ("my_models:", "neither a folder nor MODULE:CALLABLE"),
    ("no_such_module:f", "module no_such_module cannot be imported"),
    ("broken_models:f", "module broken_models cannot be imported: ModuleNotFoundError"),
    ("my_models:absent", "module my_models has no absent"),
    ("my_models:text", "the call fails: TypeError"),
    ("my_models:fails", "the call fails: ValueError: out of cheese"),
    ("my_models:nothing", "it returned NoneType"),
    ("my_models:leaves", "the call fails: SystemExit: bye"),
    ("my_models:three", "the model to export is a int"),
    ("leaving_models:f", "module leaving_models cannot be imported: SystemExit"),
    (".", "it has no config.json"),
])  # fmt: skip
def test_bad_sources_are_one_line(models, source, reason):
    done = command(source, "-o", "m.onnx")
    assert done.exit_code == 2
    assert reason in done.stderr.splitlines()[-1]
    assert not (models / "m.onnx").exists()


@pytest.mark.parametrize("output", ["no/such/folder/m.onnx", "."])
def test_bad_outputs_are_said_before_the_export(models, output):
    done = command("my_models:good", "-o", output)
    assert done.exit_code == 2
    assert "exporting" not in done.stderr


def test_without_torch_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from rewrite.cli import main; main(['export', 'a:b', '-o', 'm.onnx'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "rewrite-onnx[export]" in done.stderr.splitlines()[-1]


def test_the_package_and_its_listing_load_no_torch():
    code = "import sys, rewrite; from rewrite.cli import main; main(['list'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_sources_are_plain_data():
    source = as_source(Mlp(), torch.ones(3, 8))
    assert isinstance(source, Source)
    assert source.dynamic == {"x": {0: "batch"}}
    assert as_source(Mlp(), torch.ones(3, 8, dtype=torch.long)).dynamic == {"x": {0: "batch", 1: "sequence"}}


# --- where it is written --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("target", "reason"), [("pipe", "a device or a pipe"), (".", "is a directory"), ("no/such.onnx", "does not exist")])
def test_what_is_no_file_is_never_replaced(tmp_path, target, reason):
    """An export as root to /dev/null took its place."""
    os.mkfifo(tmp_path / "pipe")
    done = CliRunner().invoke(main, ["export", "no_module:at_all", "-o", str(tmp_path / target)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)  # before PyTorch is loaded
    assert reason in done.stderr
    with pytest.raises(rewrite.RewriteError, match=reason):
        export(as_source(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / target)
    assert [p.is_fifo() for p in tmp_path.iterdir()] == [True]
