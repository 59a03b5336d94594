"""A local Hugging Face directory as something to export: the model's class from its config, inputs from its kind."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.export.source import Source, first_line, quiet

try:
    import transformers
except ImportError as error:
    raise RewriteError("reading a Hugging Face directory needs transformers; install the extra: pip install 'rewrite-onnx[export]'") from error

EXAMPLE = (2, 8)  # batch, sequence


class Flat(torch.nn.Module):  # type: ignore[misc]
    """A transformers model that takes tensors by name, keeps no cache, and returns its main tensor."""

    def __init__(self, model: Any, output: str):
        super().__init__()
        self.model, self.output = model, output


class FlatEncoder(Flat):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output]  # type: ignore[no-any-return]


class FlatDecoder(Flat):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)[self.output]  # type: ignore[no-any-return]


class FlatVision(Flat):
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values)[self.output]  # type: ignore[no-any-return]


def configuration(directory: Path) -> Any:
    """What a local directory's config.json says. Raises RewriteError if there is none, and what transformers raises for a bad one."""
    if not (directory / "config.json").is_file():
        raise RewriteError(f"{directory}: not a Hugging Face directory: it has no config.json")
    return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_directory(path: str | os.PathLike[str], *, attention: str = "eager") -> Source:
    """The model of a local directory (config.json and safetensors), without its cache, ready to export.

    Text models take input_ids and attention_mask [batch, sequence], decoders position_ids too; vision models
    pixel_values [batch, channels, height, width]. `attention` is transformers' implementation, eager or sdpa: eager
    (the default) keeps even the rows that see nothing as PyTorch computes them.

    Raises RewriteError for a directory that holds no such model. Nothing is downloaded and no code of it is run.
    """
    directory = Path(path)
    try:
        with quiet():
            config = configuration(directory)
            names = config.architectures or []
            kind = getattr(transformers, names[0], None) if names else transformers.AutoModel
            if kind is None:
                raise RewriteError(f"{directory}: architecture {names[0]} is unknown to transformers {transformers.__version__}; export it with MODULE:CALLABLE")
            options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True, "attn_implementation": attention}
            model, loading = kind.from_pretrained(directory, output_loading_info=True, **options)
    except RewriteError:
        raise
    except Exception as error:
        raise RewriteError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would give them random values
        raise RewriteError(f"{directory}: the weights lack {len(missing)} of {type(model).__name__}'s tensors, first {missing[0]}; correct 'architectures' in config.json")
    source = as_flat(model)
    describe_text(source, model)
    if (directory / "tokenizer_config.json").is_file():
        source.metadata["rewrite.tokenizer"] = str(directory.resolve())
    return source


def load_gguf(path: str | os.PathLike[str], *, attention: str = "eager") -> Source:
    """The model of a GGUF file, its weights in float32, and its tokenizer, which is saved beside the exported model.

    Raises RewriteError for a file that transformers cannot read, or a missing library (`gguf`, `accelerate`).
    """
    file = Path(path)
    if not os.path.isfile(file):
        raise RewriteError(f"{file}: no such file; give a GGUF file, a Hugging Face directory or MODULE:CALLABLE")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise RewriteError(f"{file}: not a GGUF file; convert the model again, or give its Hugging Face directory")
    for library in ("gguf", "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise RewriteError(f"{file}: reading GGUF files needs {library}; install the extra: pip install 'rewrite-onnx[gguf]'")
    options = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, attn_implementation=attention, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    except Exception as error:
        raise RewriteError(f"{file}: cannot be loaded: {first_line(error)}") from error
    source = as_flat(model)
    describe_text(source, model)
    source.tokenizer = tokenizer
    return source


def describe_text(source: Source, model: Any) -> None:
    """What a text generator wants to know: the tokens that end a text, and how many positions the model was made for."""
    if not isinstance(source.module, FlatDecoder):
        return
    ends = [getattr(getattr(model, name, None), "eos_token_id", None) for name in ("generation_config", "config")]
    end: Any = next((e for e in ends if e is not None), [])
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    source.metadata["rewrite.eos"] = json.dumps(end if isinstance(end, list) else [end])
    if isinstance(limit, int):
        source.metadata["rewrite.positions"] = str(limit)


def as_flat(model: Any) -> Source:
    """A loaded transformers model as a Source. Raises RewriteError for encoder-decoder models and other inputs."""
    config = model.config
    if config.is_encoder_decoder:
        raise RewriteError(f"{type(model).__name__} is an encoder-decoder model; export its parts with MODULE:CALLABLE")
    if model.main_input_name == "pixel_values":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        inputs = {"pixel_values": torch.zeros(EXAMPLE[0], config.num_channels, side, side)}
        return _source(FlatVision, model, inputs, {"pixel_values": {0: "batch"}}, {})
    if model.main_input_name != "input_ids":
        raise RewriteError(f"{type(model).__name__} takes {model.main_input_name}; only input_ids and pixel_values are known. Export it with MODULE:CALLABLE")
    decoder = any(part in type(model).__name__ for part in ("CausalLM", "LMHead")) or getattr(config, "is_decoder", False)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, EXAMPLE, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if decoder:
        inputs["position_ids"] = torch.arange(EXAMPLE[1]).expand(*EXAMPLE).clone()
    dynamic = {n: {0: "batch", 1: "sequence"} for n in inputs}
    return _source(FlatDecoder if decoder else FlatEncoder, model, inputs, dynamic, {"input_ids": vocabulary})


def _source(kind: type[Flat], model: Any, inputs: dict[str, torch.Tensor], dynamic: dict[str, dict[int, str]], limits: dict[str, int]) -> Source:
    with torch.no_grad():
        result = model.eval()(**inputs)
    if not isinstance(result, Mapping):
        raise RewriteError(f"{type(model).__name__} returns {type(result).__name__}, not named outputs; export it with MODULE:CALLABLE")
    output = next(n for n in ("logits", "last_hidden_state", *result) if n in result)
    return Source(kind(model, output), inputs, dynamic, [output], limits)
