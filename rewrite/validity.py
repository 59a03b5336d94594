"""What must hold of a model before rules touch it; a model that breaks it is refused in one line that says where.

`onnx.checker` cannot do this: it refuses operators it does not know, which we keep, and stops at 2 GiB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.graph import DOMAIN

MIN_OPSET = 13
MIN_IR = 3  # the first that writes versions of operator sets
ONNX_RUNTIME = ("com.microsoft", "com.microsoft.nchwc", "com.microsoft.experimental", "com.microsoft.dml", "com.ms.internal.nhwc", "org.pytorch.aten")
PACKED = {"UNDEFINED", "STRING", "INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2"}  # no whole number of bytes an element

EQUATION = re.compile(rb"(?:[A-Za-z]*(?:\.\.\.)?[A-Za-z]*)(?:,[A-Za-z]*(?:\.\.\.)?[A-Za-z]*)*(?:->[A-Za-z]*(?:\.\.\.)?[A-Za-z]*)?")
NESTING = 100  # graphs inside graphs, functions that call functions: what walks them calls itself for each
EXPANDED = 10_000_000  # nodes, all calls of functions replaced by bodies
CYCLE = 6  # values of a cycle that are shown

Scopes = tuple[set[str], ...]


def check_validity(proto: onnx.ModelProto, name: str) -> None:
    """Raises RewriteError, starting with `name`, if the model cannot be rewritten safely."""
    _check_depth(proto, name)
    for text in _texts(proto):
        if isinstance(text, bytes):  # what protobuf makes of text that is none
            raise RewriteError(f"{name}: a name in it is not UTF-8 text ({text[:60]!r}); rename it where the model is made")
    _check_versions(proto, name)
    _check_graph(proto.graph, (), name)
    for tensor in tensors(proto):
        _check_size(tensor, name)
    _check_calls(proto, name)
    _check_nesting(proto, name)
    for node in (*all_nodes(proto.graph), *(inner for f in proto.functions for n in f.node for inner in _with_inner(n))):
        _check_equation(node, name)


def _check_depth(proto: onnx.ModelProto, name: str) -> None:
    bodies = [n for f in proto.functions for n in f.node]
    pending = [(g, 1) for g in (proto.graph, *(t.initialization for t in proto.training_info), *(t.algorithm for t in proto.training_info))]
    pending += [(inner, 2) for node in bodies for inner in subgraphs(node)]
    while pending:
        graph, depth = pending.pop()
        if depth > NESTING:
            raise RewriteError(f"{name}: graphs inside graphs, more than {NESTING} deep; export the model again, or flatten its If and Loop nodes")
        pending += [(inner, depth + 1) for node in graph.node for inner in subgraphs(node)]


def _check_versions(proto: onnx.ModelProto, name: str) -> None:
    if not MIN_IR <= proto.ir_version <= onnx.IR_VERSION:
        found = f"IR version {proto.ir_version}" if proto.ir_version else "a model without an IR version"
        raise RewriteError(f"{name}: {found} is not supported ({MIN_IR} to {onnx.IR_VERSION} are); export the model again, or upgrade onnx if the file is newer")
    newest = onnx.defs.onnx_opset_version()
    versions = {o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")}
    if not versions and any(n.domain in ("", "ai.onnx") for n in proto.graph.node):
        raise RewriteError(f"{name}: it imports no ONNX operator set; export it again at opset {MIN_OPSET} to {newest}")
    for opset in versions:
        if not MIN_OPSET <= opset <= newest:
            raise RewriteError(f"{name}: opset {opset} is not supported ({MIN_OPSET} to {newest} are); export the model at one of these")
    if len(versions) > 1:
        raise RewriteError(f"{name}: it imports the ONNX operator set in {len(versions)} versions ({', '.join(map(str, sorted(versions)))}); keep one")


def _check_graph(graph: onnx.GraphProto, outer: Scopes, name: str) -> None:
    inputs, initial = [i.name for i in graph.input], [i.name for i in graph.initializer] + [i.values.name for i in graph.sparse_initializer]
    for what, names in (("input", inputs), ("initializer", initial)):
        twice = _first_twice(names)
        if twice is not None:
            raise RewriteError(f"{name}: {what} '{twice}' occurs twice; names must be unique")
    twice = _first_twice(n.name for n in graph.node if n.name)
    if twice is not None:
        which = " and ".join(n.op_type for n in graph.node if n.name == twice)
        raise RewriteError(f"{name}: nodes ({which}) share the name '{twice}', which ONNX Runtime refuses; rename one, or leave the names empty")
    sources = {*inputs, *initial}
    makers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for value in filter(None, node.output):
            if value in makers or value in sources:
                first = f"{makers[value].op_type} '{makers[value].name}'" if value in makers else "an input or initializer of the graph"
                raise RewriteError(f"{name}: value '{value}' is computed twice, by {first} and by {node.op_type} '{node.name}'; names must be unique")
            makers[value] = node
    known = set(sources)
    for node in graph.node:
        for value in filter(None, node.input):
            if value not in known and not any(value in scope for scope in outer):
                raise RewriteError(f"{name}: {_why_unknown(graph, value, node, makers)}")
        for inner in subgraphs(node):
            _check_graph(inner, (*outer, known), name)
        known.update(node.output)
    for result in graph.output:
        if result.name not in known and not any(result.name in scope for scope in outer):
            raise RewriteError(f"{name}: output '{result.name}' of graph '{graph.name}' is never computed; export the model again")


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _why_unknown(graph: onnx.GraphProto, value: str, node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> str:
    at = f"{node.op_type} '{node.name}'"
    if value not in makers:
        return f"value '{value}' is read by {at}, but nothing computes it; the model is incomplete, export it again"
    cycle = _cycle(value, makers)
    if cycle:
        shown = [f"'{v[:60]}'" for v in (cycle if len(cycle) <= CYCLE else [*cycle[: CYCLE - 1], cycle[-1]])]
        if len(cycle) > CYCLE:
            shown[-1:-1] = ["…"]
        return f"the graph has a cycle, through the values {' -> '.join(shown)}; no order can compute it, export the model again"
    return f"value '{value}' is read by {at} before {makers[value].op_type} '{makers[value].name}' computes it: the nodes are out of order; sort them (`polygraphy surgeon sanitize` does)"


def _cycle(start: str, makers: dict[str, onnx.NodeProto]) -> list[str]:
    """Values, each computed from the one before, that lead from one back to itself; empty if there is no such round."""
    path: dict[str, None] = {start: None}  # a dict, because a cycle may have 100,000 values
    pending: list[Iterator[str]] = [iter(makers[start].input)]
    done: set[str] = set()
    while pending:
        value = next(pending[-1], None)
        if value is None:
            done.add(path.popitem()[0])
            pending.pop()
        elif value in path:
            values = list(path)
            return [value, *reversed(values[values.index(value) :])]
        elif value in makers and value not in done:
            path[value] = None
            pending.append(iter(makers[value].input))
    return []


def _check_calls(proto: onnx.ModelProto, name: str) -> None:
    functions = {f.name for f in proto.functions if f.domain == DOMAIN}
    bodies = [node for f in proto.functions for node in f.node]
    for node in [*all_nodes(proto.graph), *bodies]:
        if node.domain == DOMAIN and node.op_type not in functions:
            raise RewriteError(f"{name}: {node.op_type} '{node.name}' calls function '{DOMAIN}::{node.op_type}', which the model lacks; rewrite the original model again")


def _check_equation(node: onnx.NodeProto, name: str) -> None:
    """onnx and ONNX Runtime search an equation with stray dots for ever."""
    if node.op_type != "Einsum" or node.domain not in ("", "ai.onnx"):
        return
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"")
    if EQUATION.fullmatch(equation.replace(b" ", b"")) is None:
        shown = equation[:60].decode(errors="replace")
        raise RewriteError(f"{name}: Einsum '{node.name}' has the equation {shown!r}, which is none; export the model again")


def _check_nesting(proto: onnx.ModelProto, name: str) -> None:
    """Functions must not call themselves, nor others through more than `NESTING`, nor become more than `EXPANDED` nodes when all calls are replaced by bodies."""
    functions = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    depths: dict[tuple[str, str], int] = {}
    pending, open_calls = list(functions), set()
    while pending:
        key = pending[-1]
        body = [inner for n in functions[key].node for inner in _with_inner(n)]
        calls = [(n.domain, n.op_type) for n in body if (n.domain, n.op_type) in functions]
        new = [c for c in calls if c not in sizes] if key not in sizes else []
        if any(c in open_calls or c == key for c in new):
            raise RewriteError(f"{name}: function '{key[0]}::{key[1]}' calls itself, directly or through others; export the model again")
        if new:
            open_calls.add(key)
            pending.append(new[0])
            continue
        sizes[key] = len(body) + sum(sizes[c] for c in calls)
        depths[key] = 1 + max((depths[c] for c in calls), default=0)
        if depths[key] > NESTING:
            raise RewriteError(f"{name}: functions call functions, more than {NESTING} deep, at '{key[0]}::{key[1]}'; export the model again, or inline its functions (`onnx.inliner` does)")
        open_calls.discard(key)
        pending.pop()
    total = sum(sizes.get((n.domain, n.op_type), 1) for n in all_nodes(proto.graph))
    if total > EXPANDED:
        raise RewriteError(f"{name}: its functions call each other so often that the model has {total:.1e} nodes ({EXPANDED:.0e} are allowed); export the model again")


def _with_inner(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """A node and all nodes inside its graphs."""
    yield node
    for inner in subgraphs(node):
        yield from all_nodes(inner)


def _check_size(tensor: onnx.TensorProto, name: str) -> None:
    """The data of a tensor must be as long as its shape says."""
    if any(d < 0 for d in tensor.dims):
        raise RewriteError(f"{name}: tensor '{tensor.name}' has the shape {list(tensor.dims)}; export the model again")
    if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type == onnx.TensorProto.UNDEFINED:
        raise RewriteError(f"{name}: tensor '{tensor.name}' is of type {tensor.data_type}, which ONNX {onnx.__version__} does not know; export the model again")
    needed = byte_size(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return
    if not tensor.HasField("raw_data"):
        _check_count(tensor, name)
    elif needed is not None and len(tensor.raw_data) != needed:
        raise RewriteError(f"{name}: tensor '{tensor.name}' of shape {list(tensor.dims)} has {len(tensor.raw_data)} bytes of data instead of {needed}; export the model again")


def _check_count(tensor: onnx.TensorProto, name: str) -> None:
    """Data that is not raw bytes stands in a field of numbers or strings; complex and packed types are left to others."""
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if kind in PACKED - {"STRING"} or kind.startswith("COMPLEX"):
        return
    found, needed = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type))), math.prod(int(d) for d in tensor.dims)
    if found != needed:
        raise RewriteError(f"{name}: tensor '{tensor.name}' of shape {list(tensor.dims)} has {found} elements instead of {needed}; export the model again")


def byte_size(tensor: onnx.TensorProto) -> int | None:
    """How many bytes of raw data the tensor's shape and type ask for; None for strings and types packed in bytes."""
    if tensor.data_type not in onnx.TensorProto.DataType.values() or onnx.TensorProto.DataType.Name(tensor.data_type) in PACKED:
        return None
    itemsize: int = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return itemsize * math.prod(int(d) for d in tensor.dims)


def no_tensor(proto: onnx.ModelProto) -> str:
    """The first input that is no tensor, with its type, for people: such a model is run on no arrays. "" if there is none."""
    kinds = {i.name: i.type.WhichOneof("value") or "tensor_type" for i in proto.graph.input}
    return next((f"input '{n}' is of type {k.removesuffix('_type')}, no tensor" for n, k in kinds.items() if k != "tensor_type"), "")


def check_feeds(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> None:
    """Do these arrays fit the model's inputs, by name, dtype and shape? Raises RewriteError if not."""
    if odd := no_tensor(proto):
        raise RewriteError(f"inputs: {odd}, and arrays are all that can be given; leave them out")
    initial = {i.name for i in proto.graph.initializer}
    inputs = {i.name: i for i in proto.graph.input}
    needed = [n for n in inputs if n not in initial]
    for name in feeds:
        if name not in inputs:
            raise RewriteError(f"inputs: the model has no input '{name}'; it has {', '.join(needed)}")
    for name in needed:
        if name not in feeds:
            raise RewriteError(f"inputs: '{name}' is missing; the model needs {', '.join(needed)}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in feeds.items():
        tensor = inputs[name].type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if array.dtype != dtype and not (tensor.elem_type == onnx.TensorProto.STRING and array.dtype.kind in "SU"):
            raise RewriteError(f"inputs: '{name}' is {array.dtype}, the model needs {dtype}; convert it with .astype('{dtype}')")
        if not tensor.HasField("shape"):
            continue
        wanted = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
        if len(wanted) != array.ndim or any(isinstance(w, int) and w != s for w, s in zip(wanted, array.shape, strict=True)):
            raise RewriteError(f"inputs: '{name}' has shape {list(array.shape)}, the model needs [{', '.join(str(w or '?') for w in wanted)}]")
        for dim, size in zip(wanted, array.shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, (size, name))[0] != size:
                raise RewriteError(f"inputs: dimension '{dim}' is {sizes[dim][0]} in '{sizes[dim][1]}' and {size} in '{name}'; it must be one size")


# --- walking a protobuf -------------------------------------------------------------------------------------------
def _texts(proto: onnx.ModelProto) -> Iterator[str | bytes]:
    """Every name in a model."""
    pending = [proto.graph]
    bodies = [n for f in proto.functions for n in f.node]
    yield from (o.domain for o in proto.opset_import)
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
    while pending or bodies:
        made = bodies
        if pending:
            graph = pending.pop()
            yield graph.name
            for value in (*graph.input, *graph.output, *graph.value_info):
                yield value.name
                if value.type.HasField("tensor_type"):
                    yield from (d.dim_param for d in value.type.tensor_type.shape.dim)
            yield from (t.name for t in graph.initializer)
            made = list(graph.node)
        else:
            bodies = []
        for node in made:
            yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
            yield from (a.name for a in node.attribute)
            pending += subgraphs(node)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node, not those inside of these."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, or of a function's body, and of all graphs inside it."""
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from all_nodes(inner)


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a model: initializers and attributes, of inner graphs, functions and training, too."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)
    for training in proto.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors):
                yield sparse.values
                yield sparse.indices
        for inner in subgraphs(node):
            yield from _graph_tensors(inner)


def unknown_operators(proto: onnx.ModelProto) -> dict[str, list[str]]:
    """Operators that neither ONNX, ONNX Runtime nor the model defines, each with the names of its nodes."""
    own = {(f.domain, f.name) for f in proto.functions}
    found: dict[str, list[str]] = {}
    for node in [*all_nodes(proto.graph), *(n for f in proto.functions for n in f.node)]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (node.domain, node.op_type) in own or domain in ONNX_RUNTIME or onnx.defs.has(node.op_type, domain):
            continue
        label = f"{domain}::{node.op_type}" if domain else str(node.op_type)
        found.setdefault(label, []).append(node.name or (node.output[0] if node.output else "?"))
    return found


def check_tolerance(tolerance: float) -> None:
    """Raises RewriteError for one that lets everything pass (NaN, infinity) or nothing (below zero)."""
    if not 0 <= tolerance < math.inf:
        raise RewriteError(f"tolerance {tolerance}: give a number from 0 on, for example 1e-4; --no-verify leaves the check out")
