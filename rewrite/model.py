"""Reading, holding and writing ONNX models without losing anything that the rewriting did not change.

onnx-graphsurgeon drops node metadata and types it does not know. So the protobuf that was read stays the model's
source: a node that no rule touched is written back as it came, and only new nodes are made from the graph.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]
from onnx.external_data_helper import ExternalDataInfo
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.logger import G_LOGGER

from rewrite import sandbox
from rewrite.errors import RewriteError
from rewrite.files import check_apart, check_target, write_atomically
from rewrite.graph import DOMAIN, reads
from rewrite.nodes import Node
from rewrite.opening import Opening
from rewrite.validity import all_nodes, byte_size, check_validity, subgraphs, tensors
from rewrite.weights import embedded, place, relocated

G_LOGGER.severity = G_LOGGER.CRITICAL + 1  # what it says it raises, too, and we tell that in one line
KEYS = ("location", "offset", "length", "checksum")  # of a reference to external data
PYTORCH = (b"PK\x03\x04", b"\x80")  # how zip files and pickles begin
SCOPE_HINT = "pkg.torch.onnx.name_scopes"  # under which PyTorch notes the modules that a node came from
SCOPES = 10_000  # characters of a hint that are read
WEIGHTS = {getattr(onnx.TensorProto, k) for k in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8")}  # what inference has no use for
SCALES = 1024  # elements: no list of floats that tells a shape is longer
LONGEST = 4096  # characters of a path, which Linux takes no longer either
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

    def check_target(self, path: str | os.PathLike[str], *, embed: bool = False) -> None:
        """Can the model be saved so, and its weights stay whole? Asked before long work. Raises RewriteError with the reason if not."""
        check_target(path)
        check_apart(path, self.weight_files(None if embed else path))

    def weight_files(self, path: str | os.PathLike[str] | None = None) -> list[tuple[str, Path]]:
        """The files of the external weights, and those beside the model saved as `path`, each with what it is."""
        found = list(self.external.values())
        found += [Path(path).parent / name for name in self.external] if path is not None else []
        return [("a file of the model's weights", file) for file in found]

    def save(self, path: str | os.PathLike[str], *, embed: bool = False) -> None:
        """Write the model, whole or not at all.

        External weights stay where they are if that is beside the new file, and are copied there if not, without being
        read into memory; with `embed` they are put into the file. Raises RewriteError if the file cannot be written.
        """
        path = Path(path)
        self.check_target(path, embed=embed)
        if embed and self.external:
            Model(embedded(self.proto, self.external, str(path))).save(path)
            return
        if self.proto.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
            raise RewriteError(f"{path}: the model is over 2 GiB; store its weights as external data")
        moved = {name: place(source, path.parent, name) for name, source in self.external.items()}
        proto = relocated(self.proto, {a: b for a, b in moved.items() if a != b})
        data = proto.SerializeToString(deterministic=True)
        write_atomically(path, lambda f: f.write(data))

    def counts(self) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
        """Nodes by operator, without constants; those that call plugins by plugin; and these by attribute, where it is a name:
        `MatMulAct:gelu` counts those whose activation is gelu. Nodes inside If, Loop and Scan count, too."""
        operators: dict[str, int] = {}
        plugins: dict[str, int] = {}
        kinds: dict[str, int] = {}
        for node in all_nodes(self.proto.graph):
            if node.op_type == "Constant":
                continue
            label = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{base_name(node)}"
            operators[label] = operators.get(label, 0) + 1
            if node.domain != DOMAIN:
                continue
            plugin = base_name(node)
            plugins[plugin] = plugins.get(plugin, 0) + 1
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.STRING:
                    kind = f"{plugin}:{attribute.s.decode()}"
                    kinds[kind] = kinds.get(kind, 0) + 1
        return dict(sorted(operators.items(), key=lambda kv: (-kv[1], kv[0]))), plugins, kinds

    def operators(self) -> dict[str, int]:
        """How many nodes of each operator there are."""
        return self.counts()[0]

    def plugin_nodes(self) -> dict[str, int]:
        """How many nodes call each plugin."""
        return self.counts()[1]


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
        check_validity(proto, "model")
        outside = next((t.name for t in tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL), None)
        if outside is not None:
            raise RewriteError(f"model: tensor '{outside}' lies in an external file, which a protobuf alone does not lead to; give the path of the model instead")
        return Model(proto)
    if not isinstance(source, (str, os.PathLike)):
        raise RewriteError(f"cannot load a {type(source).__name__}; give a path, an onnx.ModelProto or what rewrite.load returned")
    path = Path(source)
    return read(path, _bytes(path))


def _bytes(path: Path) -> bytes:
    """The content of a model file that a child process has read to a good end."""
    if b"\0" in os.fsencode(path):
        raise RewriteError(f"{str(path)!r}: no such file; give the path of an .onnx file")
    if not os.path.isfile(path):
        what = "a directory" if os.path.isdir(path) else "no regular file" if os.path.exists(path) else "no such file"
        raise RewriteError(f"{path}: {what}; give the path of an .onnx file")
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            sandbox.rehearse(path, file.fileno(), before.st_size)
            file.seek(0)
            data = file.read()
            after = os.fstat(file.fileno())
    except OSError as error:
        raise RewriteError(f"{path}: cannot be read: {error.strerror or error}") from error
    if (before.st_size, before.st_mtime_ns, before.st_ctime_ns) != (after.st_size, after.st_mtime_ns, after.st_ctime_ns):
        raise RewriteError(f"{path}: it changed while it was read; wait until it is written, and try again")
    return data


def read(path: Path, data: bytes) -> Model:
    """The model in `data`, the content of the file at `path`, with its external data found. Raises RewriteError."""
    proto = _parse(path, data)
    model = Model(proto, path.resolve().parent, path.name)
    _find_external(model, path)
    check_validity(proto, str(path))
    return model


def _parse(path: Path, data: bytes) -> onnx.ModelProto:
    if not data:
        raise RewriteError(f"{path}: an empty file; export the model again")
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt") and data.startswith(PYTORCH):
        raise RewriteError(f"{path}: a PyTorch file, which is never read, for it may run code; export the model to ONNX (`rewrite export` takes a folder or a function)")
    try:
        proto = onnx.load_model_from_string(data)
    except MemoryError:
        raise
    except Exception as error:
        raise RewriteError(f"{path}: not an ONNX model, or a truncated one ({_line(error)}); export it again") from error
    if not proto.graph.node and not proto.graph.output:
        raise RewriteError(f"{path}: not an ONNX model: it has no graph; export it again")
    return proto


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


def _find_external(model: Model, path: Path) -> None:
    """Check every reference to external data; read small tensors in, remember the files of the others."""
    assert model.folder is not None
    sizes: dict[str, int] = {}  # of the files
    for tensor in tensors(model.proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = f"{path}: tensor '{tensor.name}'"
        if any(isinstance(text, bytes) for e in tensor.external_data for text in (e.key, e.value)):
            raise RewriteError(f"{where}: its reference to external data is not UTF-8 text; export the model again")
        keys = [e.key for e in tensor.external_data]
        strange = next((k for k in keys if k not in KEYS or keys.count(k) > 1), None)
        if strange is not None:
            raise RewriteError(f"{where}: its reference to external data has the key {strange[:40]!r} {'twice' if strange in KEYS else 'that ONNX does not define'}; export the model again")
        try:
            info = ExternalDataInfo(tensor)
        except ValueError as error:
            raise RewriteError(f"{where}: its reference to external data is broken ({_line(error)}); export the model again") from error
        if info.location not in sizes:
            sizes[info.location] = external_file(model.folder, info.location, where).stat().st_size
        file, size = model.folder / info.location, sizes[info.location]
        needed = byte_size(tensor)
        offset, length = info.offset or 0, info.length if info.length is not None else needed
        if offset < 0 or (length or 0) < 0:
            raise RewriteError(f"{where}: its data in {info.location} has offset {offset} and length {length}; export the model again")
        if offset + (length or 0) > size:
            raise RewriteError(f"{where}: its data ({offset} + {length} bytes) passes the end of {info.location} ({size} bytes); the file is truncated, or another model's")
        if needed is not None and length != needed:
            raise RewriteError(f"{where}: its shape {list(tensor.dims)} needs {needed} bytes, but {length} are given in {info.location}; export the model again")
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
    if len(location) > LONGEST:
        raise RewriteError(f"{where}: external data {location[:200]!r}... has a name of {len(location)} characters; refused")
    relative = Path(location)
    odd = set(location) & set("\\\0:") or any(part.strip(". ") == "" or part != part.strip() for part in relative.parts)
    if not location or relative.is_absolute() or ".." in relative.parts or odd:
        raise RewriteError(f"{where}: external data {location[:200]!r} points outside the model's folder; refused")
    file = folder / relative
    step = folder
    for part in relative.parts:
        step = step / part
        if os.path.islink(step):
            raise RewriteError(f"{where}: external data '{location}' is reached by a symbolic link; refused. Put the file itself there")
    if not os.path.isfile(file):
        raise RewriteError(f"{where}: external data file '{str(file)[:300]}' is missing; put it beside the model")
    if file.stat().st_nlink > 1:
        raise RewriteError(f"{where}: external data '{location}' is a hard link; refused. Put a copy there")
    return file


# --- between the protobuf and the graph the rules edit ------------------------------------------------------------
@dataclass
class Imported:
    """A model opened for rewriting: the graph, its nodes and those of graphs inside it, and which protobuf each graph came from."""

    model: Model
    graph: gs.Graph
    graphs: dict[int, onnx.GraphProto]
    nodes: list[Node]
    names: set[str]  # of all values and nodes: no new one may be equal to any

    def release(self, made: list[Node]) -> None:
        """Take the graph apart, nodes `made` by rules included: all name one another, which Python's cycle collector takes long to find out."""
        for node in (*self.nodes, *made):
            for tensor in (*node.inputs, *node.outputs):  # not more: a rule may have kept its name and shape
                tensor.inputs.clear()
                tensor.outputs.clear()
            node.inputs.clear()
            node.outputs.clear()


def open_graph(model: Model) -> Imported:
    """Infer shapes and import the graph. Raises RewriteError if ONNX finds the model inconsistent."""
    inferred, data = _infer(model)
    opening = Opening(hinted=SCOPE_HINT.encode() in data)
    try:
        opset = OnnxImporter.get_opset(inferred), OnnxImporter.get_import_domains(inferred)
        graph = opening.graph(model.proto.graph, inferred.graph, {}, opset)
    except Exception as error:
        raise RewriteError(f"{model.name}: the graph cannot be imported: {type(error).__name__}: {_line(error)}; `onnx.checker.check_model` may tell more") from error
    return Imported(model, graph, opening.graphs, opening.nodes, opening.names)


def infer(model: Model) -> onnx.ModelProto:
    """The model, without its weights, with all types and shapes that ONNX can tell. Raises RewriteError if it finds it inconsistent."""
    return _infer(model)[0]


def _infer(model: Model) -> tuple[onnx.ModelProto, bytes]:
    try:
        data = _without_weights(model.proto).SerializeToString()
        return onnx.shape_inference.infer_shapes(data, data_prop=True), data
    except MemoryError:
        raise
    except Exception as error:
        raise RewriteError(f"{model.name}: shape inference fails: {_line(error)}") from error


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with weights as if they lay in another file: inference reads integers and scales, and would copy the rest four times."""
    light = onnx.ModelProto()
    copy_message(proto, light, without={"graph"})
    copy_message(proto.graph, light.graph, without={"initializer"})
    for tensor in proto.graph.initializer:
        if tensor.data_type in WEIGHTS and math.prod(tensor.dims) > SCALES:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=onnx.TensorProto.EXTERNAL)
        else:
            light.graph.initializer.append(tensor)
    for value in (*light.graph.input, *light.graph.output, *light.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param") and not dim.dim_param:
                dim.Clear()  # no name is not a name that two dimensions share
    return light


def names_in(proto: onnx.ModelProto) -> set[str]:
    """Every name of a value or a node in the model: no new one may be equal to any."""
    found: set[str] = set()
    pending = [proto.graph]
    while pending:
        graph = pending.pop()
        found.update(v.name for v in (*graph.input, *graph.output, *graph.value_info, *graph.initializer))
        found.update(s.values.name for s in graph.sparse_initializer)
        for node in graph.node:
            found.update((node.name, *node.input, *node.output))
            pending += subgraphs(node)
    return found


def overridable(proto: onnx.ModelProto) -> frozenset[str]:
    """Initializers that are inputs as well: defaults that a caller may replace (before IR version 4 all were listed so)."""
    if proto.ir_version < 4:
        return frozenset()
    return frozenset({i.name for i in proto.graph.input} & {i.name for i in proto.graph.initializer})


def module_scope(node: onnx.NodeProto) -> str:
    """The PyTorch module a node came from, `encoder.layer.0.attention`: a hint that exporters leave, or ""."""
    for entry in node.metadata_props:
        if entry.key == SCOPE_HINT:
            scopes = _list_of_names(entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    name = str(node.name)
    return name[1:].rpartition("/")[0].replace("/", ".") if name.startswith("/") else ""


def _list_of_names(text: str | bytes) -> list[str]:
    """The names in a Python list of strings; none in anything else, which is no reason to refuse a model."""
    if not isinstance(text, str) or not text.startswith("[") or len(text) > SCOPES:
        return []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return found if all(isinstance(name, str) for name in found) else []


def close_graph(imported: Imported, functions: dict[str, onnx.FunctionProto]) -> Model:
    """The model with the edited graph and its functions. Untouched parts are those of the original, byte for byte."""
    source = imported.model
    proto = onnx.ModelProto()
    copy_message(source.proto, proto, without={"graph", "functions"})
    _export(imported.graph, source.proto.graph, proto.graph, imported)
    kept = [f for f in source.proto.functions if f.domain != DOMAIN]
    proto.functions.extend(kept)
    bodies = (n for f in kept for n in f.node)
    used = {n.op_type for n in (*all_nodes(proto.graph), *bodies) if n.domain == DOMAIN}
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
    brought = {n.domain for n in all_nodes(proto.graph)} - {"", "ai.onnx"} - {o.domain for o in proto.opset_import}
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, 1) for domain in sorted(brought))  # by a user's replacement
    if used and proto.ir_version < 8:
        proto.ir_version = 8  # the first in which a model carries functions
    return Model(proto, source.folder, source.name, dict(source.external))


def copy_message(source: Any, result: Any, without: Collection[str]) -> None:
    """Copy a message but some of its fields: weights are large, each copy of them counts."""
    if len(UnknownFieldSet(source)):  # of a newer ONNX, perhaps: kept
        result.CopyFrom(source)
        for name in without:
            result.ClearField(name)
        return
    for descriptor, value in source.ListFields():
        name = descriptor.name
        if name in without:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(result, name, value)
        elif hasattr(value, "extend"):
            getattr(result, name).extend(value)
        else:
            getattr(result, name).CopyFrom(value)


def _export(graph: gs.Graph, source: onnx.GraphProto, result: onnx.GraphProto, imported: Imported) -> None:
    copy_message(source, result, without={"node", "initializer"})
    result.node.extend([_exported(n, imported) for n in graph.nodes])
    read = {t.name: t for n in graph.nodes for t in n.inputs}
    gone = set() if imported.model.proto.training_info else _unread(graph, source, read, imported)
    result.initializer.extend([i for i in source.initializer if i.name not in gone] if gone else source.initializer)
    old = {i.name for i in source.initializer}
    for name, tensor in read.items():
        if isinstance(tensor, gs.Constant) and name not in old and not tensor.inputs and not _is_outer(tensor):
            result.initializer.append(OnnxExporter.export_tensor_proto(tensor))
    _export_types(result, source, graph, gone)


def _unread(graph: gs.Graph, source: onnx.GraphProto, read: Collection[str], imported: Imported) -> set[str]:
    """Initializers that only replaced nodes read. One that nothing read before, or that is an input, stays."""
    lost = {name for n in imported.nodes if (n.dead or n.rewired) and n.source is not None for name in n.source.input}
    lost -= {t.name for n in graph.nodes if n.holds_graphs for t in reads(n)}
    quantization = {e.value for a in source.quantization_annotation for e in a.quant_parameter_tensor_names}
    return lost - set(read) - {o.name for o in source.output} - {i.name for i in source.input} - quantization


def _is_outer(tensor: gs.Tensor) -> bool:
    """Constants that were imported come from some graph of the model, which writes them itself."""
    return isinstance(getattr(tensor._values, "tensor", None), (onnx.TensorProto, onnx.SparseTensorProto))


def _export_types(result: onnx.GraphProto, source: onnx.GraphProto, graph: gs.Graph, gone: set[str]) -> None:
    """Types of values that are gone go; those of new values, and inferred ones, come: to a graph that has any.

    One without (TorchScript writes none) stays so: with shapes ONNX Runtime would make SkipLayerNormalization of its
    sums and norms, which takes eight times as long on a CPU, a seventh of MiniLM's time.
    """
    if not source.value_info:
        del result.value_info[:]
        return
    lost = gone | {n for node in source.node for n in node.output} - {n for node in result.node for n in node.output}
    kept = [v for v in source.value_info if v.name not in lost]
    known = {v.name for v in (*kept, *result.output)}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and tensor.name not in known and tensor.dtype is not None:
                if isinstance(tensor, gs.Variable) and tensor.type == "tensor_type" and tensor.shape is not None:
                    kept.append(OnnxExporter.export_value_info_proto(tensor, False))
    del result.value_info[:]
    result.value_info.extend(kept)


def _exported(node: Node, imported: Imported) -> onnx.NodeProto:
    """The node as it was read, if nothing about it has changed."""
    source = node.source
    if source is not None and not node.rewired and not node.holds_graphs:
        return source
    if source is None:
        made: onnx.NodeProto = OnnxExporter.export_node(node)
        for key, value in (node.metadata or {}).items():
            made.metadata_props.add(key=key, value=value)
        return made
    result = onnx.NodeProto()
    result.CopyFrom(source)
    result.input[:] = [t.name for t in node.inputs]
    result.output[:] = [t.name for t in node.outputs]
    for attribute in result.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inner = node.attrs[attribute.name]
            attribute.g.Clear()
            _export(inner, imported.graphs[id(inner)], attribute.g, imported)
    return result
