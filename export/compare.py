"""An exported model against the PyTorch module it came from, at several sizes and paddings."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

from rewrite.errors import CheckFailed, RewriteError
from rewrite.export.source import Source, first_line
from rewrite.model import Model
from rewrite.precision import widen_model
from rewrite.verify import file_session

SHAPES = ((2, 7), (1, 12), (3, 5))
PADDINGS = ("none", "right", "left")
# Largest difference from PyTorch, relative to an output's largest value.
# That of bfloat16 is for constants alone, which the exporter rounded (to 8 bits): all else is computed in float32.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-3}


def make_inputs(source: Source, sizes: Mapping[str, int], padding: str, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of other sizes: masks padded on one side, positions that count real tokens, integers from the example's range."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for name, example in source.inputs.items():
        shape = [sizes.get(source.dynamic.get(name, {}).get(i, ""), n) for i, n in enumerate(example.shape)]
        if _is_mask(name, example):
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
            lowest, limit = (0, source.limits[name]) if name in source.limits else (int(example.min()), int(example.max()) + 1)
            made[name] = torch.randint(lowest, limit, shape, generator=generator).to(example.dtype)
    masks = [t for n, t in made.items() if _is_mask(n, t)]
    for name, tensor in made.items():
        if masks and "position" in name and tensor.shape == masks[0].shape:
            made[name] = (masks[0].long().cumsum(1) - 1).clamp(min=0).to(tensor.dtype)
    return made


def _is_mask(name: str, tensor: torch.Tensor) -> bool:
    return "mask" in name and tensor.dim() == 2 and not tensor.is_floating_point()


def _mask(shape: list[int], padding: str, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.ones(shape, dtype=dtype)
    for row in range(shape[0]):
        hidden = 0 if padding == "none" else min(row + 1, shape[1] - 1) if shape[0] > 1 or padding == "left" else 1
        if hidden and padding == "right":
            mask[row, shape[1] - hidden :] = 0
        elif hidden:
            mask[row, :hidden] = 0
    return mask


def compare_with_torch(source: Source, model: Model) -> tuple[float, list[dict[str, int]]]:
    """Run PyTorch and ONNX Runtime at several sizes and paddings; returns the largest relative difference and the sizes.

    Rows of padding are not compared: their attention sees nothing, and exporters differ there. A bfloat16 model, for
    which ONNX Runtime has no kernels on the CPU, is compared with its weights and arithmetic widened to float32.

    Raises CheckFailed, naming the output and the sizes, if the difference is above the tolerance of the module's dtype.
    """
    dtypes = {t.dtype for t in (*source.module.parameters(), *source.inputs.values())}
    dtype = next((t for t in (torch.bfloat16, torch.float16, torch.float32, torch.float64) if t in dtypes), torch.float32)
    if dtype == torch.bfloat16:
        source, model = _widened(source), _widened_model(model)
    runner, worst = file_session(model), 0.0
    given = {i.name for i in runner.get_inputs()}
    masked = [n for n, t in source.inputs.items() if _is_mask(n, t)]
    compared = []
    for seed, planned in enumerate(_plans(source)):
        for padding in PADDINGS if masked else PADDINGS[:1]:
            sizes, inputs, expected = _reference(source, planned, padding, seed)
            where = f"at {sizes}" + (f" with {'no' if padding == 'none' else padding} padding" if masked else "")
            try:
                actual = runner.run(source.outputs, {n: t.numpy() for n, t in inputs.items() if n in given})
            except Exception as error:
                raise CheckFailed(f"the exported model fails in ONNX Runtime {where}: {first_line(error)}") from error
            real = inputs[masked[0]].bool().numpy() if masked else None
            for name, want, got in zip(source.outputs, expected, actual, strict=True):
                worst = max(worst, _difference(name, want.detach().double().numpy(), np.asarray(got, np.float64), real, TOLERANCE.get(dtype, 1e-4), where))
        compared.append(sizes)
    return worst, compared


def _plans(source: Source) -> Iterator[dict[str, int]]:
    names = list(dict.fromkeys(n for axes in source.dynamic.values() for n in axes.values()))
    for shape in SHAPES if names else SHAPES[:1]:
        yield dict(zip(names, (*shape, *range(4, 4 + len(names))), strict=False))


def _reference(source: Source, sizes: dict[str, int], padding: str, seed: int) -> tuple[dict[str, int], dict[str, torch.Tensor], list[torch.Tensor]]:
    """PyTorch's outputs at these sizes; where it fails (no positions left, no multiple of 32), only the first axis differs from the example."""
    inputs = make_inputs(source, sizes, padding, seed)
    try:
        return sizes, inputs, source.run(inputs)
    except RewriteError:
        batch = {axes[0] for axes in source.dynamic.values() if 0 in axes}
        own = {name: source.inputs[n].shape[a] for n, axes in source.dynamic.items() for a, name in axes.items()}
        sizes = {n: size if n in batch else own[n] for n, size in sizes.items()}
        inputs = make_inputs(source, sizes, padding, seed)
        return sizes, inputs, source.run(inputs)


def _widened(source: Source) -> Source:
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in source.inputs.items()}
    return replace(source, module=copy.deepcopy(source.module).float(), inputs=inputs)


def _widened_model(model: Model) -> Model:
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    if model.external:
        if sum(file.stat().st_size for file in model.external.values()) * 2 > onnx.checker.MAXIMUM_PROTOBUF:
            raise RewriteError(f"{model.name}: a bfloat16 model of this size cannot be compared on the CPU; export without comparing (--no-verify), or in float32")
        onnx.load_external_data_for_model(proto, str(model.folder))
    return Model(widen_model(proto), None, model.name)


def _difference(name: str, want: Any, got: Any, real: Any, tolerance: float, where: str) -> float:
    if want.shape != got.shape:
        raise CheckFailed(f"output '{name}' has shape {list(got.shape)} instead of {list(want.shape)} {where}")
    if real is not None and want.shape[:2] == real.shape:
        want, got = want[real], got[real]
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        raise CheckFailed(f"output '{name}' is NaN or infinite where PyTorch's is not (or the other way round) {where}")
    size = max(float(np.abs(want[finite]).max(initial=0.0)), 1e-6)
    error = float(np.abs(want[finite] - got[finite]).max(initial=0.0)) / size
    if error > tolerance:
        raise CheckFailed(f"output '{name}' differs from PyTorch by {error:.1e} of its largest value, allowed {tolerance:.0e}, {where}")
    return error
