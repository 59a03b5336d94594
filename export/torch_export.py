"""PyTorch modules to ONNX, with dynamic batch and sequence, compared with PyTorch before the file is written.

What the exporters of PyTorch 2.13 get wrong is avoided here, or found by the comparison and refused with the reason:
a batch of 1 in the example freezes the dimension (it is doubled); epsilons up to 1e-8 are optimized away (the optimizer
is left out for such models); opset 23 gives rotary embeddings of batch 1 that nothing runs; some fp16 graphs are invalid.
The default opset is 20: it has Gelu, its exports are right, and what later opsets have whole (RMSNormalization,
Attention, RotaryEmbedding) the rules find in the decomposed form.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rewrite.errors import CheckFailed, RewriteError
from rewrite.model import Model, load
from rewrite.verify import file_session

try:
    import torch
except ImportError as error:
    raise RewriteError("exporting needs PyTorch; install the extra: pip install 'rewrite-onnx[export]'") from error

OPSET = 20
SHAPES = ((2, 7), (1, 12), (3, 5))
PADDINGS = ("none", "right", "left")
# Largest difference from PyTorch, relative to an output's largest value.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
LARGE = 1 << 30  # bytes of weights from which they are stored beside the model

Say = Callable[[str], None]


@dataclass
class Source:
    """What is exported: a module, example inputs by the names of its parameters, and their dynamic dimensions.

    `dynamic` gives, for each input, names of dynamic axes: `{"input_ids": {0: "batch", 1: "sequence"}}`. `limits` gives
    the number of values an integer input may take (the vocabulary). `outputs` names the outputs, in order.
    """

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: list[str] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)


@dataclass
class Exported:
    """The written file, the largest relative difference from PyTorch (None if not compared) and the shapes compared."""

    path: Path
    error: float | None
    shapes: list[dict[str, int]]


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
    return Source(module, dict(example), {n: dict(dynamic.get(n) or {}) for n in example})


def load_callable(text: str) -> Source:
    """The Source that `module:callable` names; the current folder is searched first.

    Raises RewriteError if it cannot be imported, fails, or returns something else.
    """
    name, colon, attribute = text.partition(":")
    if not colon or not name or not attribute:
        raise RewriteError(f"{text}: neither a folder nor MODULE:CALLABLE; give a local Hugging Face directory, or for example my_models:encoder")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(name), attribute)
    except AttributeError as error:
        raise RewriteError(f"{text}: module {name} has no {attribute}") from error
    except Exception as error:
        raise RewriteError(f"{text}: module {name} cannot be imported: {_line(error)}") from error
    finally:
        sys.path.pop(0)
    try:
        result = function()
    except Exception as error:
        raise RewriteError(f"{text}: the call fails: {_line(error)}") from error
    if isinstance(result, Source):
        return result
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise RewriteError(f"{text}: it returned {type(result).__name__}, expected (module, example inputs) or (module, example inputs, dynamic shapes)")
    return as_source(*result)


def export(
    source: Source,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    exporter: str = "dynamo",
    verify: bool = True,
    progress: Say | None = None,
) -> Exported:
    """Export to ONNX, compare with PyTorch at several shapes, and write the file, whole or not at all.

    Raises RewriteError if PyTorch cannot export the module, CheckFailed if the file computes something else.
    """
    target, say = Path(path), progress or (lambda line: None)
    if exporter not in ("dynamo", "torchscript"):
        raise RewriteError(f"exporter {exporter!r} is unknown; use dynamo or torchscript")
    if not target.parent.is_dir():
        raise RewriteError(f"{target}: the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise RewriteError(f"{target}: is a folder; name a file")
    source = _thawed(source)
    source.module.eval()
    if not source.outputs:
        count = len(_run(source, source.inputs))
        source.outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        file = Path(folder) / target.name
        say(f"exporting with PyTorch's {exporter} exporter, opset {opset}")
        _export(source, file, opset, exporter)
        model = _checked(file)
        model.name = target.name
        difference: float | None = None
        shapes: list[dict[str, int]] = []
        if verify:
            say("comparing with PyTorch")
            difference, shapes = compare_with_torch(source, model)
        for other in Path(folder).iterdir():
            if other != file:
                os.replace(other, target.parent / other.name)
        os.replace(file, target)
    return Exported(target, difference, shapes)


def _checked(file: Path) -> Model:
    """The exported model. Raises RewriteError if ONNX finds it invalid."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:
        raise RewriteError(f"the exporter made an invalid model: {_line(error)}; try opset {OPSET}, or float32") from error
    return load(file)


def _thawed(source: Source) -> Source:
    """Dynamic dimensions of size 1 doubled in the example: the exporter would take a 1 for a constant."""
    inputs = {}
    for name, tensor in source.inputs.items():
        for axis in source.dynamic.get(name, {}):
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], axis)
        inputs[name] = tensor
    return Source(source.module, inputs, source.dynamic, list(source.outputs), source.limits)


def _run(source: Source, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The module's outputs, flat. Raises RewriteError if it fails or returns no tensors."""
    try:
        with torch.no_grad():
            result = source.module(**inputs)
    except Exception as error:
        shapes = {n: list(t.shape) for n, t in inputs.items()}
        raise RewriteError(f"{type(source.module).__name__} fails in PyTorch on inputs {shapes}: {_line(error)}") from error
    leaves = torch.utils._pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    if not tensors:
        raise RewriteError(f"{type(source.module).__name__} returns no tensor but {type(result).__name__}; wrap it in a module that does")
    return tensors


def _line(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print pages; what matters of it we say ourselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _export(source: Source, file: Path, opset: int, exporter: str) -> None:
    size = sum(p.numel() * p.element_size() for p in source.module.parameters())
    names = list(source.inputs)
    try:
        with _quiet(), torch.no_grad():
            if exporter == "torchscript":
                axes = {n: dict(a) for n, a in source.dynamic.items() if a}
                arguments = (*source.inputs.values(),)
                torch.onnx.export(source.module, arguments, str(file), dynamo=False, opset_version=opset, input_names=names, output_names=source.outputs, dynamic_axes=axes)
                return
            shapes = {n: source.dynamic.get(n) or None for n in names}
            program = torch.export.export(source.module, (), dict(source.inputs), dynamic_shapes=_dimensions(shapes), strict=False)
            made = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=names, output_names=source.outputs, dynamic_shapes=shapes,
                optimize=not _has_tiny_epsilon(program), verbose=False,
            )  # fmt: skip
            assert made is not None
            made.save(str(file), external_data=size > LARGE)
    except Exception as error:
        raise RewriteError(f"PyTorch's {exporter} exporter fails on {type(source.module).__name__}: {_reason(error, exporter)}") from error


def _dimensions(shapes: Mapping[str, dict[int, str] | None]) -> dict[str, Any]:
    return {n: None if axes is None else dict.fromkeys(axes, torch.export.Dim.AUTO) for n, axes in shapes.items()}


def _has_tiny_epsilon(program: Any) -> bool:
    """Whether the module adds a constant of at most 1e-8: the exporter's optimizer takes it for zero and drops it."""
    for node in program.graph.nodes:
        if node.op == "call_function" and "add" in str(node.target):
            if any(isinstance(a, float) and 0 < abs(a) <= 1e-8 for a in node.args):
                return True
    return False


def _reason(error: BaseException, exporter: str) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = _line(error)
    if exporter == "torchscript":
        return f"{text}; try the dynamo exporter"
    return text


def make_inputs(source: Source, sizes: Mapping[str, int], padding: str, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of other sizes: masks padded on one side, positions that count real tokens, integers below their limit."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, example in source.inputs.items():
        shape = [sizes.get(source.dynamic.get(name, {}).get(i, ""), n) for i, n in enumerate(example.shape)]
        if "mask" in name and example.dim() == 2 and not example.is_floating_point():
            made[name] = _mask(shape, padding, example.dtype)
        elif "position" in name and example.dim() == 2:
            made[name] = torch.arange(shape[1]).expand(*shape).to(example.dtype)
        elif "token_type" in name:
            made[name] = torch.zeros(shape, dtype=example.dtype)
        elif example.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(example.dtype)
        elif example.dtype == torch.bool:
            made[name] = torch.rand(shape, generator=generator) < 0.5
        else:
            made[name] = torch.randint(0, source.limits.get(name, int(example.max()) + 1), shape, generator=generator).to(example.dtype)
    masks = [t for n, t in made.items() if "mask" in n and t.dim() == 2]
    for name, tensor in made.items():
        if masks and "position" in name and tensor.shape == masks[0].shape:
            made[name] = (masks[0].long().cumsum(1) - 1).clamp(min=0).to(tensor.dtype)
    return made


def _mask(shape: list[int], padding: str, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.ones(shape, dtype=dtype)
    for row in range(shape[0]):
        hidden = 0 if padding == "none" else min(row + 1, shape[1] - 1) if shape[0] > 1 or padding == "left" else 1
        if hidden and padding == "right":
            mask[row, shape[1] - hidden :] = 0
        elif hidden:
            mask[row, :hidden] = 0
    return mask


def compare_with_torch(source: Source, model: Model) -> tuple[float | None, list[dict[str, int]]]:
    """Run PyTorch and ONNX Runtime at several sizes and paddings; returns the largest relative difference and the sizes.

    Rows of padding are not compared: their attention sees nothing, and exporters differ there.
    Raises CheckFailed, naming the output and the sizes, if the difference is above the tolerance of the module's dtype.
    """
    dtype = next((p.dtype for p in source.module.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.bfloat16:
        return None, []  # ONNX Runtime's CPU kernels have no bfloat16
    runner, worst = file_session(model), 0.0
    given = {i.name for i in runner.get_inputs()}
    names = list(dict.fromkeys(n for axes in source.dynamic.values() for n in axes.values()))
    plans = [dict(zip(names, (*shape, *range(4, 4 + len(names))), strict=False)) for shape in SHAPES] if names else [{}]
    masked = [n for n, t in source.inputs.items() if "mask" in n and t.dim() == 2]
    for seed, sizes in enumerate(plans):
        for padding in PADDINGS if masked else PADDINGS[:1]:
            inputs = make_inputs(source, sizes, padding, seed)
            expected = _run(source, inputs)
            where = f"at {sizes}" + (f" with {padding} padding" if masked else "")
            try:
                actual = runner.run(source.outputs, {n: t.numpy() for n, t in inputs.items() if n in given})
            except Exception as error:
                hint = "; rotary embeddings exported at opset 23 are known to fail so: export at opset 20" if model.opset == 23 else ""
                raise CheckFailed(f"the exported model fails in ONNX Runtime {where}: {_line(error)}{hint}") from error
            real = inputs[masked[0]].bool().numpy() if masked else None
            for name, want, got in zip(source.outputs, expected, actual, strict=True):
                worst = max(worst, _difference(name, want.detach().float().numpy(), np.asarray(got), real, TOLERANCE[dtype], where))
    return worst, plans


def _difference(name: str, want: Any, got: Any, real: Any, tolerance: float, where: str) -> float:
    if want.shape != got.shape:
        raise CheckFailed(f"output '{name}' has shape {list(got.shape)} instead of {list(want.shape)} {where}")
    if real is not None and want.shape[:2] == real.shape:
        want, got = want[real], got[real]
    got = got.astype(np.float64)
    if not np.array_equal(np.isfinite(want), np.isfinite(got)):
        raise CheckFailed(f"output '{name}' is NaN or infinite where PyTorch's is not (or the other way round) {where}")
    error = float(np.abs(np.where(np.isfinite(want), want - got, 0)).max(initial=0.0)) / max(float(np.abs(want[np.isfinite(want)]).max(initial=0.0)), 1e-6)
    if error > tolerance:
        raise CheckFailed(f"output '{name}' differs from PyTorch by {error:.1e} of its largest value, allowed {tolerance:.0e}, {where}")
    return error
