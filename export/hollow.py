"""Models without weights: from a configuration alone to a graph whose weights are a sparse file that nobody wrote, as large as they would be.

For what only reads the graph: `rewrite plan-size`, `rewrite optimize --no-verify`. Parameters are views of a single zero while PyTorch
exports, so that a model of any size needs no memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rewrite.errors import RewriteError
from rewrite.export.huggingface import EXAMPLE, FlatDecoder, FlatEncoder, configuration, describe_text
from rewrite.export.source import Source, first_line, quiet

LARGE = 1 << 20  # bytes from which a weight is a place in the sparse file
ALIGN = 4096


@contextlib.contextmanager
def _empty_parameters() -> Iterator[None]:
    """Modules made meanwhile have parameters without memory; buffers, which hold numbers that are computed, are real."""
    register = torch.nn.Module.register_parameter

    def registered(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_hollow(path: str | os.PathLike[str], *, attention: str = "eager") -> Source:
    """The text model that a local directory's config.json describes, its parameters all zero and without memory, in the configuration's dtype.

    Raises RewriteError for a directory without configuration, and for a model that reads no text.
    """
    import transformers
    from transformers.initialization import no_init_weights

    directory = Path(path)
    try:
        with quiet():
            config = configuration(directory)
            names = config.architectures or []
            decoder = any(part in name for name in names for part in ("CausalLM", "LMHead"))
            kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModel
            with _empty_parameters(), no_init_weights():
                model = kind.from_config(config, attn_implementation=attention, dtype=config.dtype or torch.float32)
    except RewriteError:
        raise
    except Exception as error:
        raise RewriteError(f"{directory}: no model can be made of its configuration: {first_line(error)}") from error
    if model.main_input_name != "input_ids" or config.is_encoder_decoder:
        raise RewriteError(f"{type(model).__name__} takes {model.main_input_name}; without weights only encoders or decoders of text can be exported")
    _fill(model)
    ids = torch.zeros(EXAMPLE, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if decoder:
        inputs["position_ids"] = torch.arange(EXAMPLE[1]).expand(*EXAMPLE).clone()
    output = "logits" if decoder else "last_hidden_state"
    source = Source((FlatDecoder if decoder else FlatEncoder)(model, output), inputs, {n: {0: "batch", 1: "sequence"} for n in inputs}, [output], hollow=True)
    describe_text(source, model)
    return source


def _fill(model: torch.nn.Module) -> None:
    """Give each parameter zeros that are one zero, seen many times; shared parameters stay shared."""
    filled: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in filled:
                filled[id(parameter)] = torch.nn.Parameter(torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)
            module._parameters[name] = filled[id(parameter)]


def place_weights(model: Any, file: Path) -> None:
    """Make of each large initializer of `model`, of onnx_ir, a place in a sparse file beside the model."""
    import onnx_ir

    end = 0
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor.nbytes < LARGE:
            continue
        value.const_value = onnx_ir.ExternalTensor(file.name, end, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=file.parent)
        end += -(-tensor.nbytes // ALIGN) * ALIGN
    with file.open("wb") as stream:
        stream.truncate(end)
