"""What is exported: a PyTorch module with example inputs, given in Python or named as MODULE:CALLABLE."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rewrite.errors import RewriteError


@dataclass
class Source:
    """What is exported: a module, example inputs by the names of its parameters, and their dynamic dimensions.

    `dynamic` gives, for each input, names of dynamic axes: `{"input_ids": {0: "batch", 1: "sequence"}}`. `limits` gives
    the number of values an integer input may take (the vocabulary). `outputs` names the outputs, in order. `metadata` is
    written into the model file; `tokenizer`, of transformers, is saved beside it. Of a `hollow` one all parameters are zero, and are not written.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: list[str] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    tokenizer: Any = None
    hollow: bool = False

    def run(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The module's outputs, flat. Raises RewriteError if it fails or returns no tensors."""
        return list(self.named_outputs(inputs).values())

    def named_outputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Like `run`, by name: the keys of a mapping (`a`, `a_0` for what lies deeper), else `output` or `output_0`, ..."""
        try:
            with torch.no_grad():
                result = self.module(**inputs)
        except Exception as error:
            shapes = {n: list(t.shape) for n, t in inputs.items()}
            raise RewriteError(f"{type(self.module).__name__} fails in PyTorch on inputs {shapes}: {first_line(error)}") from error
        parts = dict(result) if isinstance(result, Mapping) else {"output": result}
        named: dict[str, torch.Tensor] = {}
        for key, part in parts.items():
            tensors = [t for t in torch.utils._pytree.tree_leaves(part) if isinstance(t, torch.Tensor)]
            named.update({str(key) if part is t else f"{key}_{i}": t for i, t in enumerate(tensors)})
        if not named:
            raise RewriteError(f"{type(self.module).__name__} returns no tensor but {type(result).__name__}; wrap it in a module that does")
        return named


def as_source(module: Any, example: Any, dynamic: Any = None) -> Source:
    """A Source from a module and example inputs: a tensor, a tuple of tensors, or tensors by parameter name.

    Without `dynamic`, the first axis of each input is "batch", and the second of integers with two axes "sequence".
    Raises RewriteError for anything else.
    """
    if not isinstance(module, torch.nn.Module):
        raise RewriteError(f"the model to export is a {type(module).__name__}, expected a torch.nn.Module")
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, (tuple, list)):
        names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(example) > len(names):
            raise RewriteError(f"{len(example)} example inputs are given, {type(module).__name__}.forward takes {len(names)}: {', '.join(names)}")
        example = dict(zip(names, example, strict=False))
    if not isinstance(example, Mapping) or not example or not all(isinstance(t, torch.Tensor) for t in example.values()):
        raise RewriteError("the example inputs must be a tensor, a tuple of tensors, or tensors by parameter name")
    if dynamic is None:
        dynamic = {n: {0: "batch", **({1: "sequence"} if t.dim() == 2 and not t.is_floating_point() else {})} if t.dim() else {} for n, t in example.items()}
    elif isinstance(dynamic, (tuple, list)):
        dynamic = dict(zip(example, dynamic, strict=False))
    if not isinstance(dynamic, Mapping) or set(dynamic) - set(example):
        raise RewriteError(f"the dynamic shapes must be given for the inputs {', '.join(example)}: {{name: {{axis: dimension name}}}}")
    axes = {n: dynamic.get(n) or {} for n in example}
    for name, given in axes.items():
        rank = example[name].dim()
        if not isinstance(given, Mapping) or not all(isinstance(a, int) and 0 <= a < rank and isinstance(d, str) and d.isidentifier() for a, d in given.items()):
            raise RewriteError(f"the dynamic shape of input {name} is {given!r}, expected {{axis: dimension name}} with axes from 0 to {rank - 1}")
    return Source(module, dict(example), {n: dict(a) for n, a in axes.items()})


def load_callable(text: str) -> Source:
    """The Source that `module:callable` names; the current folder is searched first.

    Raises RewriteError if it cannot be imported, fails, or returns something else.
    """
    name, colon, attribute = text.partition(":")
    if not colon or not name or not attribute:
        raise RewriteError(f"{text}: neither a folder nor MODULE:CALLABLE; give a local Hugging Face directory, or for example my_models:encoder")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
        if not hasattr(module, attribute):
            raise RewriteError(f"{text}: module {name} has no {attribute}")
        result = _call(text, getattr(module, attribute))
    except RewriteError:
        raise
    except (Exception, SystemExit) as error:
        raise RewriteError(f"{text}: module {name} cannot be imported: {first_line(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if isinstance(result, Source):
        return result
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise RewriteError(f"{text}: it returned {type(result).__name__}, expected (module, example inputs) or (module, example inputs, dynamic shapes)")
    return as_source(*result)


def _call(text: str, function: Any) -> Any:
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise RewriteError(f"{text}: the call fails: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print pages; what matters of it we say ourselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
