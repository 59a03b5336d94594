"""Reading, holding and writing ONNX models without losing anything that the rewriting did not change.

onnx-graphsurgeon drops node metadata and types it does not know. So the protobuf that was read stays the model's
source: a node that no rule touched is written back as it came, and only new nodes are made from the graph.
"""

from __future__ import annotations

import ast
import functools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_graphsurgeon as gs
from onnx.external_data_helper import ExternalDataInfo
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.logger import G_LOGGER

from rewrite.errors import RewriteError
from rewrite.files import write_atomically
from rewrite.graph import DOMAIN

G_LOGGER.severity = G_LOGGER.ERROR
MIN_OPSET = 13
INLINE = 16384  # bytes: external tensors up to this size are read at once, so that rules can see their values


@dataclass
class Model:
    """An ONNX model and the folder its external weights lie in."""

    proto: onnx.ModelProto
    folder: Path | None = None
    name: str = "model"
    external: dict[str, Path] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return int(next((o.version for o in self.proto.opset_import if o.domain in ("", "ai.onnx")), onnx.defs.onnx_opset_version()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, whole or not at all; external weights in another folder are copied beside it.

        Raises RewriteError if the file cannot be written.
        """
        path = Path(path)
        for name, source in self.external.items():
            target = path.parent / name
            if target.exists() and os.path.samefile(source, target):
                continue
            write_atomically(target, functools.partial(_copy, source))
        if self.proto.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
            raise RewriteError(f"{path}: the model is over 2 GiB; store its weights as external data")
        data = self.proto.SerializeToString(deterministic=True)
        write_atomically(path, lambda f: f.write(data))

    def operators(self) -> dict[str, int]:
        """How many nodes of each operator the main graph has; constants are not counted."""
        counts: dict[str, int] = {}
        for node in self.proto.graph.node:
            if node.op_type != "Constant":
                label = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{base_name(node)}"
                counts[label] = counts.get(label, 0) + 1
        return dict(sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))

    def plugin_nodes(self) -> dict[str, int]:
        """How many nodes call each plugin."""
        counts: dict[str, int] = {}
        for node in self.proto.graph.node:
            if node.domain == DOMAIN:
                counts[base_name(node)] = counts.get(base_name(node), 0) + 1
        return counts

    def plugin_kinds(self) -> dict[str, int]:
        """The same by attribute, where an attribute is a name: `MatMulAct:gelu` counts those whose activation is gelu."""
        counts: dict[str, int] = {}
        for node in self.proto.graph.node:
            for attribute in node.attribute if node.domain == DOMAIN else ():
                if attribute.type == onnx.AttributeProto.STRING:
                    kind = f"{base_name(node)}:{attribute.s.decode()}"
                    counts[kind] = counts.get(kind, 0) + 1
        return counts



def _copy(source: Path, target: BinaryIO) -> None:
    with source.open("rb") as stream:
        shutil.copyfileobj(stream, target)


def base_name(node: onnx.NodeProto) -> str:
    """The plugin a node calls: `Attention` for the variants `Attention`, `Attention_2`, ..."""
    name = str(node.op_type)
    return name.split("_", 1)[0] if node.domain == DOMAIN else name


def load(source: str | os.PathLike[str] | onnx.ModelProto | Model) -> Model:
    """Read an ONNX model. Weights stored outside the file are left where they are.

    Raises RewriteError for anything that is not a readable, valid ONNX model.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        return _checked(Model(proto))
    path = Path(source)
    if not path.is_file():
        raise RewriteError(f"{path}: no such file")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:
        raise RewriteError(f"{path}: not an ONNX model, or a truncated one ({_line(error)}); export it again") from error
    if not proto.graph.node and not proto.graph.output:
        raise RewriteError(f"{path}: not an ONNX model: it has no graph; export it again")
    model = Model(proto, path.resolve().parent, path.name)
    _find_external(model, path)
    return _checked(model)


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    found = list(graph.initializer)
    for sparse in graph.sparse_initializer:
        found += [sparse.values, sparse.indices]
    return found + _node_tensors(graph.node)


def _node_tensors(nodes: object) -> list[onnx.TensorProto]:
    found: list[onnx.TensorProto] = []
    for node in nodes:  # type: ignore[attr-defined]
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            found.extend(attribute.tensors)
            for graph in [attribute.g, *attribute.graphs] if attribute.HasField("g") or attribute.graphs else []:
                found.extend(_tensors(graph))
    return found


def _find_external(model: Model, path: Path) -> None:
    """Check every reference to external data; read small tensors in, remember the files of the others."""
    assert model.folder is not None
    tensors = _tensors(model.proto.graph)
    for function in model.proto.functions:
        tensors += _node_tensors(function.node)
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = f"{path}: tensor '{tensor.name}'"
        info = ExternalDataInfo(tensor)
        file = external_file(model.folder, info.location, where)
        offset, length = info.offset or 0, info.length
        size = file.stat().st_size
        if offset < 0 or (length or 0) < 0 or offset + (length or 0) > size:
            raise RewriteError(f"{where}: its data ({offset} + {length} bytes) passes the end of {info.location} ({size} bytes)")
        if length is not None and length <= INLINE:
            with file.open("rb") as stream:
                stream.seek(offset)
                tensor.raw_data = stream.read(length)
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
        else:
            model.external[info.location] = file


def external_file(folder: Path, location: str, where: str) -> Path:
    """The file of external data that `location` names; refuses everything outside the model's folder."""
    relative = Path(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise RewriteError(f"{where}: external data '{location}' points outside the model's folder; refused")
    file = folder / relative
    step = folder
    for part in relative.parts:
        step = step / part
        if step.is_symlink():
            raise RewriteError(f"{where}: external data '{location}' is reached by a symbolic link; refused. Put the file itself there")
    if not file.is_file():
        raise RewriteError(f"{where}: external data file '{file}' is missing; put it beside the model")
    if file.stat().st_nlink > 1:
        raise RewriteError(f"{where}: external data '{location}' is a hard link; refused. Put a copy there")
    return file


def _checked(model: Model) -> Model:
    newest = onnx.defs.onnx_opset_version()
    if model.opset < MIN_OPSET or model.opset > newest:
        raise RewriteError(f"{model.name}: opset {model.opset} is not supported ({MIN_OPSET} to {newest} are); export the model at one of these")
    produced: set[str] = {i.name for i in model.proto.graph.input} | {i.name for i in model.proto.graph.initializer}
    known = set(produced)
    for node in model.proto.graph.node:
        for name in node.output:
            if name and name in produced and name not in {i.name for i in model.proto.graph.input}:
                raise RewriteError(f"{model.name}: value '{name}' is computed twice (second: {node.op_type} '{node.name}'); names must be unique")
            produced.add(name)
    for node in model.proto.graph.node:
        for name in node.input:
            if name and name not in known:
                reason = "is read before it is computed (a cycle, or nodes out of order)" if name in produced else "is read but never computed"
                raise RewriteError(f"{model.name}: value '{name}' {reason}, at {node.op_type} '{node.name}'")
        known.update(node.output)
    for value in model.proto.graph.output:
        if value.name not in known:
            raise RewriteError(f"{model.name}: output '{value.name}' is never computed")
    return model


# --- between the protobuf and the graph the rules edit ------------------------------------------------------------
@dataclass
class Imported:
    """A model opened for rewriting: the graph, and which protobuf node each graph node came from."""

    model: Model
    graph: gs.Graph
    sources: dict[int, onnx.NodeProto]
    graphs: dict[int, onnx.GraphProto]
    kept: list[gs.Node]  # holds the nodes, so that ids in `sources` stay theirs


def open_graph(model: Model) -> Imported:
    """Infer shapes and import the graph. Raises RewriteError if ONNX finds the model inconsistent."""
    bare = onnx.ModelProto()
    try:
        bare = onnx.shape_inference.infer_shapes(model.proto, data_prop=True)
    except Exception as error:
        raise RewriteError(f"{model.name}: shape inference fails: {_line(error)}") from error
    del bare.functions[:]
    graph = gs.import_onnx(bare)
    imported = Imported(model, graph, {}, {}, [])
    _pair(graph, model.proto.graph, imported)
    return imported


def _pair(graph: gs.Graph, proto: onnx.GraphProto, imported: Imported) -> None:
    imported.graphs[id(graph)] = proto
    for node, source in zip(graph.nodes, proto.node, strict=True):
        imported.sources[id(node)] = source
        imported.kept.append(node)
        for attribute in source.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _pair(node.attrs[attribute.name], attribute.g, imported)


def module_scope(node: onnx.NodeProto) -> str:
    """The PyTorch module a node came from, `encoder.layer.0.attention`: a hint that exporters leave, or ""."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value) if entry.value.startswith("[") else []
            return str(scopes[-2]) if len(scopes) > 1 else ""
    name = str(node.name)
    return name[1:].rpartition("/")[0].replace("/", ".") if name.startswith("/") else ""


def close_graph(imported: Imported, functions: dict[str, onnx.FunctionProto], metadata: dict[int, dict[str, str]]) -> Model:
    """The model with the edited graph and its functions. Untouched parts are those of the original, byte for byte."""
    source = imported.model
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    proto.graph.CopyFrom(_export(imported.graph, source.proto.graph, imported, metadata))
    kept = [f for f in source.proto.functions if f.domain != DOMAIN]
    del proto.functions[:]
    proto.functions.extend(kept)
    used = {n.op_type for n in _all_nodes(proto.graph) if n.domain == DOMAIN}
    pending = list(used)
    while pending:
        name = pending.pop()
        for node in functions[name].node:
            if node.domain == DOMAIN and node.op_type not in used:
                used.add(node.op_type)
                pending.append(node.op_type)
    proto.functions.extend(f for name, f in functions.items() if name in used)
    if used and DOMAIN not in {o.domain for o in proto.opset_import}:
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    if used and proto.ir_version < 8:
        proto.ir_version = 8  # the first in which a model carries functions
    return Model(proto, source.folder, source.name, dict(source.external))


def _all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _all_nodes(attribute.g)
    return found


def _export(graph: gs.Graph, source: onnx.GraphProto, imported: Imported, metadata: dict[int, dict[str, str]]) -> onnx.GraphProto:
    result = onnx.GraphProto()
    result.CopyFrom(source)
    del result.node[:]
    del result.initializer[:]
    read: dict[str, gs.Tensor] = {}
    made: set[str] = set()
    for node in graph.nodes:
        result.node.append(_export_node(node, imported, metadata))
        read.update({t.name: t for t in node.inputs})
        made.update(t.name for t in node.outputs)
    needed = set(read) | {o.name for o in source.output} | {i.name for i in source.input}
    for inner in _all_nodes(result):
        needed.update(inner.input)
    for inner_graph in (a.g for n in _all_nodes(result) for a in n.attribute if a.type == onnx.AttributeProto.GRAPH):
        needed.update(o.name for o in inner_graph.output)
    old = {i.name for i in source.initializer}
    result.initializer.extend(i for i in source.initializer if i.name in needed)
    for name, tensor in read.items():
        if isinstance(tensor, gs.Constant) and name not in old and not tensor.inputs and not _is_outer(tensor):
            result.initializer.append(OnnxExporter.export_tensor_proto(tensor))
    _export_types(result, graph, made)
    return result


def _is_outer(tensor: gs.Tensor) -> bool:
    """Constants that were imported come from some graph of the model, which writes them itself."""
    return isinstance(getattr(tensor._values, "tensor", None), onnx.TensorProto)


def _export_types(result: onnx.GraphProto, graph: gs.Graph, made: set[str]) -> None:
    known = {v.name for v in result.value_info}
    alive = [v for v in result.value_info if v.name in made]
    outputs = {o.name for o in result.output}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and tensor.name not in known and tensor.name not in outputs and tensor.dtype is not None:
                if isinstance(tensor, gs.Variable) and tensor.type == "tensor_type" and tensor.shape is not None:
                    alive.append(OnnxExporter.export_value_info_proto(tensor, False))
    del result.value_info[:]
    result.value_info.extend(alive)


def _export_node(node: gs.Node, imported: Imported, metadata: dict[int, dict[str, str]]) -> onnx.NodeProto:
    source = imported.sources.get(id(node))
    inputs, outputs = [t.name for t in node.inputs], [t.name for t in node.outputs]
    if source is None:
        result = OnnxExporter.export_node(node)
        for key, value in metadata.get(id(node), {}).items():
            result.metadata_props.add(key=key, value=value)
        return result
    result = onnx.NodeProto()
    result.CopyFrom(source)
    result.input[:] = inputs
    result.output[:] = outputs
    for attribute in result.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = node.attrs[attribute.name]
            attribute.g.CopyFrom(_export(inner, imported.graphs[id(inner)], imported, metadata))
    return result
