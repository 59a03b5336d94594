"""PyTorch modules to ONNX, with dynamic batch and sequence, compared with PyTorch before the file is written.

What the exporters of PyTorch 2.13 get wrong is avoided here, repaired, or refused with the reason:
- a batch of 1 in the example freezes the dimension: it is doubled; a dimension that the module itself fixes is refused;
- the optimizer drops `+ 1e-9` and `* 1.000004`: such constants are given a form that it leaves alone;
- at opset 23, rotary embeddings without position ids have a batch of 1, which ONNX Runtime refuses: it is expanded;
- an opset that it cannot write becomes another one, and some fp16 graphs are invalid: refused.

The default opset is 20: it has Gelu, its exports are right, and what later opsets have whole (RMSNormalization,
Attention, RotaryEmbedding) the rules find in the decomposed form.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from rewrite.errors import RewriteError
from rewrite.export.compare import compare_with_torch
from rewrite.export.source import Source, first_line, quiet
from rewrite.export.source import as_source as as_source
from rewrite.export.source import load_callable as load_callable
from rewrite.files import check_target, move_into_place
from rewrite.model import Model, load
from rewrite.validity import MIN_OPSET

OPSET = 20
LARGE = 1 << 28  # bytes of weights from which they are stored beside the model

Say = Callable[[str], None]


@dataclass
class Exported:
    """The written file, the largest relative difference from PyTorch (None if not compared) and the shapes compared."""

    path: Path
    error: float | None
    shapes: list[dict[str, int]]


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

    Weights of more than 256 MiB are stored beside the file, as `<name>.data`. The module is exported in evaluation mode,
    and left as it was.

    Raises RewriteError if PyTorch cannot export the module, CheckFailed if the file computes something else.
    """
    target, say = Path(path), progress or (lambda line: None)
    if exporter not in ("dynamo", "torchscript"):
        raise RewriteError(f"exporter {exporter!r} is unknown; use dynamo or torchscript")
    if not MIN_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise RewriteError(f"opset {opset} is not supported ({MIN_OPSET} to {onnx.defs.onnx_opset_version()} are); use {OPSET}")
    check_target(target)
    if source.hollow and (verify or exporter != "dynamo"):
        raise RewriteError("a model without weights is exported by the dynamo exporter, and there is nothing to compare; leave verification out")
    training = [m for m in source.module.modules() if m.training]
    source.module.eval()
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            return _export_in(Path(folder), source, target, opset, exporter, verify, say)
    except OSError as error:
        raise RewriteError(f"{target}: cannot be written: {error.strerror or error}; nothing was changed") from error
    finally:
        for module in training:
            module.training = True


def _export_in(folder: Path, source: Source, target: Path, opset: int, exporter: str, verify: bool, say: Say) -> Exported:
    source = _thawed(source)
    source = replace(source, outputs=source.outputs or list(source.named_outputs(source.inputs)))
    say(f"exporting with PyTorch's {exporter} exporter, opset {opset}")
    file = folder / target.name
    _export(source, file, _data_file(target), opset, exporter)
    saved = target.parent / f"{target.stem}.tokenizer" if source.tokenizer is not None else None
    metadata = source.metadata if saved is None else {**source.metadata, "rewrite.tokenizer": str(saved.resolve())}
    model = _checked(file, source, opset, exporter, metadata)
    model.name = target.name
    difference: float | None = None
    shapes: list[dict[str, int]] = []
    if verify:
        say("comparing with PyTorch")
        difference, shapes = compare_with_torch(source, model)
    if saved is not None:
        with quiet():
            source.tokenizer.save_pretrained(saved)
    # Weights first: until the model itself is in place, the old one and its weights are whole.
    stale = _old_data(target) - set(model.external)
    move_into_place([*(p for p in folder.iterdir() if p != file), file], target.parent)
    for name in stale:
        (target.parent / name).unlink(missing_ok=True)
    return Exported(target, difference, shapes)


def _data_file(target: Path) -> str:
    """A name for the weights that is free, so that a model now at `target` keeps its own until it is replaced."""
    names = (f"{target.name}.data{turn or ''}" for turn in range(1 << 16))
    return next(n for n in names if not (target.parent / n).exists())


def _old_data(target: Path) -> set[str]:
    """The files of weights that an earlier export to `target` wrote."""
    try:
        proto = onnx.load(target, load_external_data=False)
    except Exception:  # there is none, or it is not ours
        return set()
    found = {entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    return {n for n in found if n.startswith(f"{target.name}.data") and "/" not in n}


def _thawed(source: Source) -> Source:
    """Dynamic dimensions of size 1 doubled in the example: the exporter would take a 1 for a constant."""
    inputs = {}
    for name, tensor in source.inputs.items():
        for axis in source.dynamic.get(name, {}):
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], axis)
        inputs[name] = tensor
    return replace(source, inputs=inputs)


# --- PyTorch's exporters ------------------------------------------------------------------------------------------
def _export(source: Source, file: Path, data: str, opset: int, exporter: str) -> None:
    size = sum(p.numel() * p.element_size() for p in source.module.parameters())
    if exporter == "torchscript" and size > LARGE:
        raise RewriteError(f"the TorchScript exporter cannot write {size / 1e9:.1f} GB of weights; use the dynamo exporter")
    try:
        with quiet(), torch.no_grad():
            if exporter == "torchscript":
                _with_torchscript(source, file, opset)
            else:
                _with_dynamo(source, file, data if size > LARGE or source.hollow else None, opset)
    except RewriteError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # a full disk, say: no fault of the model
            raise
        raise RewriteError(f"PyTorch's {exporter} exporter fails on {type(source.module).__name__}: {_reason(error, exporter)}") from error


def _with_torchscript(source: Source, file: Path, opset: int) -> None:
    axes = {n: dict(a) for n, a in source.dynamic.items() if a}
    arguments = (*source.inputs.values(),)
    log = torch._C._jit_onnx_log  # prints the whole graph where an export fails, past Python's standard output
    torch._C._jit_onnx_log = lambda *_: None
    try:
        torch.onnx.export(source.module, arguments, str(file), dynamo=False, opset_version=opset, input_names=list(source.inputs), output_names=source.outputs, dynamic_axes=axes)
    finally:
        torch._C._jit_onnx_log = log


def _with_dynamo(source: Source, file: Path, data: str | None, opset: int) -> None:
    import onnx_ir

    names = list(source.inputs)
    shapes = {n: source.dynamic.get(n) or None for n in names}
    dimensions = {n: None if axes is None else dict.fromkeys(axes, torch.export.Dim.AUTO) for n, axes in shapes.items()}
    program = torch.export.export(source.module, (), dict(source.inputs), dynamic_shapes=dimensions, strict=False)
    _refuse_fixed(program, source)
    made = torch.onnx.export(program, dynamo=True, opset_version=opset, input_names=names, output_names=source.outputs, dynamic_shapes=shapes, optimize=False, verbose=False)
    assert made is not None
    _simplify(made)
    if source.hollow:
        from rewrite.export.hollow import place_weights

        assert data is not None
        place_weights(made.model, file.parent / data)
        data = None
    onnx_ir.save(made.model, file, external_data=data)


def _refuse_fixed(program: Any, source: Source) -> None:
    """Raise RewriteError for a dynamic dimension that the module fixes: the exporter would write its name all the same."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for name, traced in zip(source.inputs, program.graph_signature.user_inputs, strict=True):
        for axis, dimension in source.dynamic.get(name, {}).items():
            size = values[traced].shape[axis]
            if is_concrete_int(size):
                raise RewriteError(f"{type(source.module).__name__} fixes dimension '{dimension}' (axis {axis} of input {name}) at {size}; leave it out of the dynamic shapes")


def _simplify(program: Any) -> None:
    """The exporter's own optimizer, kept from dropping what is nearly, but not quite, 0 in a sum or 1 in a product.

    It compares scalars with a tolerance, and only scalars: such a constant of one dimension is left alone.
    """
    import onnx_ir
    from onnx_ir.passes.common import InlinePass
    from onnxscript import optimizer

    InlinePass()(program.model)
    optimizer.fold_constants(program.model)
    for node in list(program.model.graph.all_nodes()):
        for index, neutral in _NEUTRAL.get(node.op_type, {}).items():
            tensor, other = onnx_ir.convenience.get_const_tensor(node.inputs[index]), node.inputs[1 - index]
            if tensor is None or tensor.shape.rank() or tensor.dtype.is_integer() or not _is_nearly(float(tensor.numpy()), neutral):
                continue
            if other is None or other.shape is None or len(other.shape) == 0:
                return  # one dimension would change the shape of the result: leave the optimizer out
            shielded = onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(tensor.numpy().reshape(1))})
            node.prepend(shielded)
            node.replace_input_with(index, shielded.outputs[0])
    with _linear_matching():
        program.optimize()


@contextlib.contextmanager
def _linear_matching() -> Iterator[None]:
    """At each node, onnxscript lists all nodes of the graph for patterns of two outputs: here only at nodes that may be the first of them.

    It takes a third of the time of exporting 32 layers, and grows with their square. Left alone if a version has other names.
    """
    from onnxscript.rewriter import _basics, _matcher

    matcher = getattr(_matcher, "SimplePatternMatcher", None)
    if matcher is None or not hasattr(_basics, "MatchResult"):
        yield
        return
    original = matcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if not self.pattern.has_single_output_node and self.pattern.output_nodes[0].op_identifier() not in (None, node.op_identifier()):
            return _basics.MatchResult().fail("another operator")
        return original(self, model, graph, node, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = original


# For each operator, the operand that may be neutral and the value that makes it so.
_NEUTRAL = {"Add": {0: 0.0, 1: 0.0}, "Sub": {1: 0.0}, "Mul": {0: 1.0, 1: 1.0}, "Div": {1: 1.0}}


def _is_nearly(value: float, neutral: float) -> bool:
    """Whether onnxscript's matcher takes `value` for `neutral` though it is not."""
    return value != neutral and math.isclose(value, neutral, rel_tol=1e-5, abs_tol=1e-8)


def _reason(error: BaseException, exporter: str) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error) + ("; try the dynamo exporter" if exporter == "torchscript" else "")


# --- what they wrote ----------------------------------------------------------------------------------------------
def _checked(file: Path, source: Source, opset: int, exporter: str, metadata: dict[str, str]) -> Model:
    """The exported model, repaired. Raises RewriteError if it is not what was asked for, or ONNX finds it invalid."""
    proto = onnx.load(file, load_external_data=False)
    found = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if found != opset:
        raise RewriteError(f"PyTorch's {exporter} exporter cannot write opset {opset}: it wrote {found}; use {found} or {OPSET}")
    onnx.helper.set_model_props(proto, {**{p.key: p.value for p in proto.metadata_props}, **metadata})
    if (opset == 23 and _expand_rotary(proto)) or metadata:
        onnx.save(proto, file)
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:
        other = "the dynamo exporter" if exporter == "torchscript" else f"opset {OPSET}" if opset != OPSET else "float32"
        raise RewriteError(f"the {exporter} exporter made an invalid model at opset {opset}: {first_line(error)}; try {other}") from error
    return load(file)


def _expand_rotary(proto: onnx.ModelProto) -> bool:
    """Give cosines and sines of batch 1 the batch of what they turn, as RotaryEmbedding wants; True if any had 1."""
    if not any(n.op_type == "RotaryEmbedding" for n in proto.graph.node):
        return False
    shapes: dict[str, Any] = {}
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    for value in (*inferred.value_info, *inferred.input):
        shapes[value.name] = value.type.tensor_type.shape.dim
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        if node.op_type == "RotaryEmbedding" and len(node.input) == 3:
            for index in (1, 2):
                dims, turned = shapes.get(node.input[index], ()), shapes.get(node.input[0], ())
                if len(dims) == 3 and turned and dims[0].dim_value == 1 and turned[0].dim_value != 1:
                    nodes += _expansion(node, index, node.input[index])
        nodes.append(node)
    changed = len(nodes) > len(proto.graph.node)
    if changed:
        copies = onnx.GraphProto(node=nodes)
        del proto.graph.node[:]
        proto.graph.node.extend(copies.node)
    return changed


def _expansion(node: onnx.NodeProto, index: int, value: str) -> list[onnx.NodeProto]:
    """Nodes that expand `value` [1, S, D] to the batch of the node's first input; the node reads the result."""
    stem = f"{node.output[0]}_{'cos' if index == 1 else 'sin'}"
    node.input[index] = f"{stem}_expanded"
    return [
        onnx.helper.make_node("Shape", [node.input[0]], [f"{stem}_batch"], start=0, end=1),
        onnx.helper.make_node("Constant", [], [f"{stem}_ones"], value_ints=[1, 1]),
        onnx.helper.make_node("Concat", [f"{stem}_batch", f"{stem}_ones"], [f"{stem}_shape"], axis=0),
        onnx.helper.make_node("Expand", [value, f"{stem}_shape"], [f"{stem}_expanded"]),
    ]
