"""Cutting a rewritten model at its plugin nodes, into segments that a compiler takes whole.

Nodes are laid in stages: a plain node stands in the latest stage of what it reads, one later if that is a plugin's
result. The plain nodes of a stage are one segment; the plugins of a stage run after it. Segments are made canonical
(weights are inputs, names are counted), so that identical layers give one segment, used many times.

Integers that only depend on shapes never cross a border: each segment computes them again, from the shapes of what
it reads anyway where the symbolic shapes tell that they are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from rewrite.driver import all_graphs
from rewrite.errors import RewriteError
from rewrite.graph import DOMAIN, SMALL, Dim, Graph, canonical, reads
from rewrite.matcher import dtype_name
from rewrite.model import Imported, Model, base_name, copy_message, open_graph
from rewrite.registry import Plugin
from rewrite.runtime.weights import Array, tensor_array
from rewrite.shapes import LARGEST, SymbolicShapes, is_named

# Operators on shapes: cheap, and pure functions of what `Shape` says.
SHAPE_ARITHMETIC = {
    "Gather", "Concat", "Slice", "Unsqueeze", "Squeeze", "Cast", "Add", "Sub", "Mul", "Div", "Mod", "Equal", "Where", "Reshape", "Identity",
    "Max", "Min", "ReduceProd", "ReduceMax", "Neg", "Abs", "ConstantOfShape", "Expand", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Not", "Split",
}  # fmt: skip
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}

INTEGERS = {getattr(onnx.TensorProto, k) for k in ("INT64", "INT32", "INT16", "INT8", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL", "STRING")}


@dataclass(frozen=True)
class ValueType:
    """The dtype (NumPy's name) and shape of a value: numbers, and expressions of the model's named dimensions."""

    dtype: str
    shape: tuple[Dim, ...]

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))


@dataclass
class Step:
    """One call: of a segment by its key, or of a plugin by its name. Inputs and outputs are names of values; "" is an absent input.

    Of a plan in stages it belongs to one of them; Send has no outputs there, and Recv no inputs.
    """

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    stage: int = 0


@dataclass
class Partition:
    """A model as steps: what a plan is made of."""

    inputs: dict[str, ValueType]
    outputs: dict[str, str]
    values: dict[str, ValueType]
    steps: list[Step]
    segments: dict[str, onnx.ModelProto]
    weights: dict[str, Array]


def partition(model: Model, plugins: dict[str, Plugin], arrays: Mapping[str, Array] | None = None) -> Partition:
    """Cut `model` at its plugin nodes. `arrays` are initializers whose data lie elsewhere.

    `outputs` of the result maps each output's name to the value it is. Raises RewriteError for a plugin that is not in
    `plugins`, and for a value that crosses a border and whose shape is not known from the model's inputs.
    """
    imported = open_graph(_inlined(without_weights(model), plugins))
    for inner in all_graphs(imported.graph):
        if inner is not imported.graph:
            SymbolicShapes(Graph(inner, model.opset)).run()
    graph = Graph(imported.graph, model.opset)
    symbols = SymbolicShapes(graph)
    symbols.run()
    return _Cutter(imported, graph, symbols, model, plugins, arrays or {}).run()


def without_weights(model: Model) -> Model:
    """The model with its large initializers emptied, as if their data lay elsewhere: each step of the cutting would copy them."""
    proto = onnx.ModelProto()
    copy_message(model.proto, proto, without={"graph"})
    copy_message(model.proto.graph, proto.graph, without={"initializer"})
    for tensor in model.proto.graph.initializer:
        if math.prod(tensor.dims) > SMALL and tensor.data_location != onnx.TensorProto.EXTERNAL:
            empty = proto.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=onnx.TensorProto.EXTERNAL)
            empty.external_data.add(key="location", value="elsewhere")
        else:
            proto.graph.initializer.append(tensor)
    return Model(proto, model.folder, model.name, model.external)


def _inlined(model: Model, plugins: dict[str, Plugin]) -> Model:
    """The model with every function inlined but those of fused plugins called in its main graph."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for node in proto.graph.node:
        if node.domain == DOMAIN and base_name(node) not in plugins:
            raise RewriteError(f"{model.name}: node '{node.name}' calls plugin {base_name(node)}, which no loaded rules file declares; give it with --rules, or unfuse the model")
    functions = {f.name: f for f in proto.functions if f.domain == DOMAIN}
    inner = [n for node in proto.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in _nodes(a.g) if n.domain == DOMAIN]
    for node in inner:
        copy = onnx.FunctionProto()
        copy.CopyFrom(functions[node.op_type])
        node.op_type = copy.name = f"{node.op_type}_inner"
        if copy.name not in {f.name for f in proto.functions}:
            proto.functions.append(copy)
    types = {i.name: dtype_name(onnx.helper.tensor_dtype_to_np_dtype(i.data_type)) for i in proto.graph.initializer if i.data_type != onnx.TensorProto.STRING}
    kept = {n.op_type for n in proto.graph.node if n.domain == DOMAIN and (plugins[base_name(n)].fused or any(types.get(i) in plugins[base_name(n)].kernels for i in n.input))}
    if any(f.domain != DOMAIN or f.name not in kept for f in proto.functions):
        bodies = [f for f in proto.functions if f.domain == DOMAIN and f.name in kept]
        proto = onnx.inliner.inline_selected_functions(proto, [(DOMAIN, name) for name in sorted(kept)], exclude=True)
        del proto.functions[:]
        proto.functions.extend(bodies)
        # Bodies may call lifted functions that are inlined elsewhere; nothing reads them any more but shape inference.
        for body in bodies:
            known = {f.name for f in proto.functions}
            proto.functions.extend(functions[n.op_type] for n in body.node if n.domain == DOMAIN and n.op_type not in known)
    return Model(proto, model.folder, model.name, model.external)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


class _Cutter:
    """The state of one `partition`."""

    def __init__(self, imported: Imported, graph: Graph, symbols: SymbolicShapes, whole: Model, plugins: dict[str, Plugin], arrays: Mapping[str, Array]):
        self.arrays = arrays
        self.imported, self.graph, self.symbols, self.plugins = imported, graph, symbols, plugins
        self.model = imported.model
        self.protos = {i.name: i for proto in (self.model.proto, whole.proto) for i in proto.graph.initializer}  # the latter have their data
        self.weights: dict[str, Array] = {}
        self.folded: dict[int, str] = {}  # tensors computed from weights alone, by the name of the weight they became
        self.pure: set[int] = set()  # nodes of shape arithmetic
        self.stage: dict[int, int] = {}

    def run(self) -> Partition:
        nodes = list(self.graph)
        self._fold(nodes)
        self._find_pure(nodes)
        plain: dict[int, list[gs.Node]] = {}
        fused: dict[int, list[gs.Node]] = {}
        for node in nodes:
            if id(node) in self.pure or all(id(t) in self.folded for t in node.outputs):
                continue
            stage = self.stage[id(node)] = self._stage_of(node)
            (fused if self.is_plugin(node) else plain).setdefault(stage, []).append(node)
        steps: list[Step] = []
        segments = {stage: _Segment(self, members) for stage, members in plain.items()}
        needed = {name for s in segments.values() for name in s.inputs} | {o.name for o in self.graph.gs.outputs}
        needed |= {t.name for members in fused.values() for n in members for t in n.inputs}
        models: dict[str, onnx.ModelProto] = {}
        for stage in sorted({*plain, *fused}):
            if stage in segments:
                key, proto, computed = segments[stage].finish(needed)
                models.setdefault(key, proto)
                steps.append(Step("segment", key, list(segments[stage].inputs), computed, nodes=[n.name or n.outputs[0].name for n in plain[stage]]))
            steps += [self._plugin_step(n) for n in fused.get(stage, ())]
        steps = _without_dead(steps, {o.name for o in self.graph.gs.outputs})
        outputs = {o.name: self._output(o) for o in self.graph.gs.outputs}
        read = {name for s in steps for name in s.inputs} | set(outputs.values())
        inputs = {t.name: self._type(t) for t in self.graph.gs.inputs if t.name not in self.protos}
        tensors = {t.name: t for n in nodes for t in (*n.inputs, *n.outputs) if not t.is_empty()}
        values = {name: self._type(tensors[name]) for s in steps for name in (*s.inputs, *s.outputs) if name and name not in self.weights and name not in inputs}
        used = {s.name for s in steps if s.kind == "segment"}
        return Partition(inputs, outputs, values, steps, {k: m for k, m in models.items() if k in used}, {n: a for n, a in self.weights.items() if n in read})

    # --- what is constant ----------------------------------------------------------------------------------------
    def is_weight(self, tensor: gs.Tensor) -> bool:
        """A constant that segments take as an input: floats of more than one element, and what was folded."""
        if id(tensor) in self.folded:
            return True
        proto = self.protos.get(tensor.name)
        if proto is None or self.graph.producer(tensor) is not None:
            return False
        return proto.data_type not in INTEGERS and math.prod(proto.dims) > 1

    def weight(self, tensor: gs.Tensor) -> str:
        """Enter a constant among the plan's weights; returns its name there."""
        name = self.folded.get(id(tensor), str(tensor.name))
        if name not in self.weights:
            self.weights[name] = self.constant(tensor)
        return name

    def constant(self, tensor: gs.Tensor) -> Array:
        if tensor.name in self.arrays and tensor.name in self.protos:
            return self.arrays[tensor.name]
        if tensor.name in self.protos:
            return tensor_array(self.protos[tensor.name], self.model.folder)
        value = self.graph.constant(tensor, limit=2**62)
        if value is None:
            raise RewriteError(f"{self.model.name}: the constant '{tensor.name}' cannot be read")
        return np.asarray(value)

    def is_constant(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self.folded or (self.graph.is_constant(tensor) and not (tensor.name in self.protos and tensor.name in {i.name for i in self.graph.gs.inputs}))

    def _fold(self, nodes: list[gs.Node]) -> None:
        """Compute once what depends on weights alone (`Transpose(W)`, `1 + w`), unless that makes it much larger."""
        for node in nodes:
            if not node.inputs or self.is_plugin(node) or node.domain not in (None, "", "ai.onnx") or node.op in RANDOM or len(node.outputs) != 1:
                continue
            if any(isinstance(a, gs.Graph) for a in node.attrs.values()) or not any(self.is_weight(t) for t in node.inputs):
                continue
            operands = [t for t in node.inputs if not t.is_empty()]
            if not all(self.is_weight(t) or self.is_constant(t) for t in operands):
                continue
            arrays = [self.weights[self.folded[id(t)]] if id(t) in self.folded else self.constant(t) for t in operands]
            result = _evaluate(node.source, operands, arrays, self.graph.opset)
            if result is not None and result.nbytes <= 2 * max(a.nbytes for a in arrays):
                self.weights[node.outputs[0].name] = result
                self.folded[id(node.outputs[0])] = node.outputs[0].name

    def _find_pure(self, nodes: list[gs.Node]) -> None:
        for node in nodes:
            outputs = [t for t in node.outputs if not t.is_empty()]
            if canonical(node) not in SHAPE_ARITHMETIC | {"Shape", "Size"} or any(id(t) in self.graph.outputs for t in outputs):
                continue
            if not all(_small_integer(t) for t in outputs):
                continue
            if any(self.is_plugin(u) for t in outputs for u in self.graph.consumers(t)):
                continue
            if canonical(node) in ("Shape", "Size") or all(t.is_empty() or self._is_pure(t) or self.is_constant(t) for t in node.inputs):
                self.pure.add(id(node))

    def _is_pure(self, tensor: gs.Tensor) -> bool:
        node = self.graph.producer(tensor)
        return node is not None and id(node) in self.pure

    def is_plugin(self, node: gs.Node) -> bool:
        """Whether a node is a step of its own: a fused one, or a norm over the last axis for whose types there is a kernel."""
        if (node.domain or "") == DOMAIN:
            return True
        plugin = self.plugins.get(node.op) if node.domain in (None, "", "ai.onnx") else None
        if plugin is None or not plugin.kernels or len(node.inputs) < 2 or not self.is_weight(node.inputs[1]):
            return False
        x = node.inputs[0]
        if x.shape is None or node.attrs.get("axis", -1) not in (-1, len(x.shape) - 1) or any(not t.is_empty() for t in node.outputs[1:]):
            return False
        return all(t.dtype is not None and dtype_name(t.dtype) == dtype_name(x.dtype) in plugin.kernels for t in node.inputs if not t.is_empty())

    # --- stages --------------------------------------------------------------------------------------------------
    def _stage_of(self, node: gs.Node) -> int:
        stage, pending, seen = 0, list(reads(node)), set()
        while pending:
            tensor = pending.pop()
            source = self.graph.producer(tensor)
            if source is None or id(source) in seen or id(tensor) in self.folded:
                continue
            seen.add(id(source))
            if id(source) in self.pure:
                pending += reads(source)
            else:
                later = self.is_plugin(source) and not self.is_plugin(node)
                stage = max(stage, self.stage[id(source)] + later)
        return stage

    def _plugin_step(self, node: gs.Node) -> Step:
        inputs = []
        for tensor in node.inputs:
            constant = not tensor.is_empty() and (self.is_weight(tensor) or self.is_constant(tensor))
            inputs.append(self.weight(tensor) if constant else tensor.name)
        plugin = self.plugins[canonical(node)]
        attributes = {k: v for k, v in node.attrs.items() if k in plugin.attributes or plugin.fused}
        if "axis" in attributes:
            attributes["axis"] = -1
        return Step("plugin", plugin.name, inputs, [t.name for t in node.outputs if not t.is_empty()], attributes, [node.name])

    def _output(self, tensor: gs.Tensor) -> str:
        return self.weight(tensor) if self.is_weight(tensor) or self.is_constant(tensor) else str(tensor.name)

    def _type(self, tensor: gs.Tensor) -> ValueType:
        if tensor.dtype is None or tensor.shape is None:
            raise RewriteError(f"{self.model.name}: the {'type' if tensor.dtype is None else 'rank'} of '{tensor.name}' is not known, and it crosses from one segment to another; give it a value_info")
        return ValueType(dtype_name(tensor.dtype), tuple(d if is_named(d) else None for d in tensor.shape))


class _Segment:
    """One segment being cut out: its nodes with canonical names, and the values it reads from outside."""

    def __init__(self, cutter: _Cutter, members: list[gs.Node]):
        self.cutter, self.graph = cutter, cutter.graph
        self.names: dict[int, str] = {}
        self.tensors: dict[int, gs.Tensor] = {}
        self.inputs: dict[str, gs.Tensor] = {}  # by their name in the model
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.made: list[gs.Tensor] = []
        self.count = 0
        for node in members:
            self._emit(node)

    def _emit(self, node: gs.Node) -> None:
        self.nodes.append(self._copy(node))
        self.made += [t for t in node.outputs if not t.is_empty()]

    def _copy(self, node: gs.Node) -> onnx.NodeProto:
        names = {t.name: self._read(t) for t in reads(node) if not t.is_empty()}
        proto = onnx.NodeProto()
        proto.CopyFrom(node.source)
        proto.input[:] = [names.get(n, "") for n in proto.input]
        proto.output[:] = [self._name(t) if not t.is_empty() else "" for t in node.outputs]
        proto.doc_string = ""
        del proto.metadata_props[:]
        for attribute in proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)
        return proto

    def _name(self, tensor: gs.Tensor) -> str:
        self.names[id(tensor)] = f"v{self.count}"
        self.tensors[id(tensor)] = tensor
        self.count += 1
        return self.names[id(tensor)]

    def _read(self, tensor: gs.Tensor) -> str:
        if id(tensor) in self.names:
            return self.names[id(tensor)]
        cutter = self.cutter
        if cutter.is_weight(tensor):
            return self._input(cutter.weight(tensor), tensor)
        if id(tensor) in self.graph.known or cutter.is_constant(tensor):
            return self._constant(tensor)
        if cutter._is_pure(tensor):
            return self._derive(tensor)
        return self._input(tensor.name, tensor)

    def _input(self, name: str, tensor: gs.Tensor) -> str:
        self.inputs[name] = tensor
        self.names[id(tensor)] = f"i{len(self.inputs) - 1}"
        self.tensors[id(tensor)] = tensor
        return self.names[id(tensor)]

    def _constant(self, tensor: gs.Tensor) -> str:
        array = self.graph.constant(tensor) if id(tensor) in self.graph.known else self.cutter.constant(tensor)
        assert array is not None
        if tensor.dtype is not None and array.dtype != tensor.dtype and not isinstance(tensor.dtype, int):
            array = array.astype(tensor.dtype)
        name = self._name(tensor)
        self.initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    # --- shapes, computed again ------------------------------------------------------------------------------------
    def _derive(self, tensor: gs.Tensor) -> str:
        """Shape arithmetic of elsewhere: from the shapes of values at hand if they tell, else by its own nodes."""
        values = self.cutter.symbols.values.get(id(tensor))
        parts = None if values is None or tensor.dtype != np.int64 else [self._dimension(v) for v in values]
        if parts is None or None in parts:
            node = self.graph.producer(tensor)
            assert node is not None
            self.nodes.append(self._copy(node))
            return self.names[id(tensor)]
        single = [p for p in parts if p is not None]
        joined = single[0] if len(single) == 1 else self._node("Concat", single, axis=0)
        scalar = id(tensor) in self.cutter.symbols.rank0
        if scalar:
            joined = self._node("Squeeze", [joined, self._integers([0])])
        self.names[id(tensor)] = joined
        return joined

    def _dimension(self, dim: Dim) -> str | None:
        """A vector of one element: the size `dim`, read off a value that has it."""
        if isinstance(dim, int):
            return self._integers([dim])
        for key, tensor in self.tensors.items():
            if tensor.shape is not None and dim in list(tensor.shape):
                shape = self._node("Shape", [self.names[key]])
                return self._node("Gather", [shape, self._integers([list(tensor.shape).index(dim)])], axis=0)
        return None

    def _integers(self, values: list[int]) -> str:
        name = f"v{self.count}"
        self.count += 1
        self.initializers.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"v{self.count}"
        self.count += 1
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], **attributes))
        return name

    # --- the finished segment --------------------------------------------------------------------------------------
    def finish(self, needed: set[str]) -> tuple[str, onnx.ModelProto, list[str]]:
        """The segment's key, its model, and the values it computes that `needed` names."""
        outputs = [t for t in self.made if t.name in needed and not self.cutter.is_constant(t)]  # who reads a constant elsewhere has it as a weight
        proto = onnx.helper.make_graph(
            self.nodes,
            "segment",
            [self._info(name, tensor) for name, tensor in self.inputs.items()],
            [self._info(t.name, t) for t in outputs],
            self.initializers,
        )
        source = self.cutter.model.proto
        domains = {n.domain for n in _nodes(proto)} - {"ai.onnx"} | {""}
        opsets = [o for o in source.opset_import if (o.domain or "") in domains]
        model = onnx.helper.make_model(proto, opset_imports=opsets, ir_version=max(8, source.ir_version), producer_name="rewrite")
        bare = onnx.ModelProto()
        bare.CopyFrom(model)
        for node in _nodes(bare.graph):
            node.name = ""
        return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:16], model, [t.name for t in outputs]

    def _info(self, name: str, tensor: gs.Tensor) -> onnx.ValueInfoProto:
        kind = self.cutter._type(tensor)
        if name in self.cutter.weights:
            kind = ValueType(self.cutter.weights[name].dtype.name, self.cutter.weights[name].shape)
        element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind.dtype)) if not isinstance(tensor.dtype, int) else tensor.dtype
        return onnx.helper.make_tensor_value_info(self.names[id(tensor)], element, list(kind.shape))


def _small_integer(tensor: gs.Tensor) -> bool:
    """A vector or scalar of a few integers or booleans, of known length: what shapes are computed with."""
    if tensor.dtype is None or isinstance(tensor.dtype, int) or np.dtype(tensor.dtype).kind not in "iub":
        return False
    return tensor.shape is not None and len(tensor.shape) <= 1 and all(isinstance(d, int) and d <= LARGEST for d in tensor.shape)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Let an inner graph read outer values by their new names; its own values move out of the way."""
    own = {n for node in graph.node for n in node.output} | {i.name for i in graph.input} | {i.name for i in graph.initializer}
    local = {**{k: v for k, v in names.items() if k not in own}, **{n: f"{n}_inner" for n in own if n}}
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = local.get(value.name, value.name)
    del graph.value_info[:]
    for node in graph.node:
        node.input[:] = [local.get(n, n) for n in node.input]
        node.output[:] = [local.get(n, n) for n in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, local)


def _evaluate(node: onnx.NodeProto, operands: list[gs.Tensor], arrays: list[Array], opset: int) -> Array | None:
    """The result of one node on constants, or None if ONNX Runtime cannot compute it."""
    from rewrite.verify import session

    feeds = {t.name: a for t, a in zip(operands, arrays, strict=True)}
    infos = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feeds.items()]
    graph = onnx.helper.make_graph([node], "fold", infos, [onnx.helper.make_empty_tensor_value_info(node.output[0])])
    try:
        runner = session(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8))
        return np.asarray(runner.run(None, feeds)[0])
    except Exception:  # not a constant then: the segment computes it
        return None


def _without_dead(steps: list[Step], outputs: set[str]) -> list[Step]:
    """Drop steps none of whose results is read; happens where only shapes of a value were read."""
    needed, kept = set(outputs), []
    for step in reversed(steps):
        if any(o in needed for o in step.outputs):
            kept.append(step)
            needed.update(step.inputs)
    return kept[::-1]


def unknown_dimensions(part: Partition) -> list[str]:
    """Values whose size cannot be told from the sizes of the inputs, a description each."""
    return [f"'{n}' {list(v.shape)}" for n, v in part.values.items() if any(d is None for d in v.shape)]
