"""Exporting: what is accepted, what is written, what PyTorch's exporters get wrong and what becomes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import exported
import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

import rewrite
from rewrite.cli import main
from rewrite.export.compare import PADDINGS, compare_with_torch, make_inputs
from rewrite.export.huggingface import load_directory
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


def test_a_tiny_epsilon_survives(tmp_path):
    export(as_source(TinyNorm(), torch.randn(2, 8)), tmp_path / "m.onnx")
    (out,) = rewrite.verify.run_model(rewrite.load(tmp_path / "m.onnx"), {"x": np.zeros((3, 8), np.float32)}).values()
    np.testing.assert_array_equal(out, 0)


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


@pytest.mark.parametrize("damage", [break_config, break_architecture, break_weights, break_safetensors])
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
    """))
    (tmp_path / "broken_models.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_models", None)


def command(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_a_callable_is_exported(models):
    done = command("my_models:good", "-o", "m.onnx")
    assert done.exit_code == 0, done.stderr
    assert "equal to PyTorch" in done.stdout
    assert dims("m.onnx") == {"input": ["batch", 8]}
    assert command("my_models:named", "-o", "m.onnx", "--no-verify").exit_code == 0
    assert dims("m.onnx") == {"input": ["rows", 8]}


@pytest.mark.parametrize(("source", "reason"), [
    ("nothing", "neither a folder nor MODULE:CALLABLE"),
    ("my_models:", "neither a folder nor MODULE:CALLABLE"),
    ("no_such_module:f", "module no_such_module cannot be imported"),
    ("broken_models:f", "module broken_models cannot be imported: ModuleNotFoundError"),
    ("my_models:absent", "module my_models has no absent"),
    ("my_models:text", "the call fails: TypeError"),
    ("my_models:fails", "the call fails: ValueError: out of cheese"),
    ("my_models:nothing", "it returned NoneType"),
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


def test_sources_are_plain_data():
    source = as_source(Mlp(), torch.ones(3, 8))
    assert isinstance(source, Source)
    assert source.dynamic == {"x": {0: "batch"}}
    assert as_source(Mlp(), torch.ones(3, 8, dtype=torch.long)).dynamic == {"x": {0: "batch", 1: "sequence"}}
