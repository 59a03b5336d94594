"""A model in shards, perhaps in stages: what each rank has of it, as the model's metadata tell, and all ranks in one graph, to compare with the whole.

The file holds the whole model, in which AllReduce and AllGather change nothing; the metadata say how a rank's differs: slices
of weights, numbers of heads, integers that shapes are made of, sizes of values. They are the same for all ranks but for where
a slice begins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.functions import FunctionTable
from rewrite.graph import DOMAIN, decode
from rewrite.model import Model, base_name
from rewrite.plugins import paged_attention_onnx, shards_onnx
from rewrite.stages import Message, Stage, kind, stages_of

KEY = "rewrite.shards"  # of the model's metadata, as JSON
Array = np.ndarray[Any, Any]
Sections = Sequence[Sequence[int]]


def width(size: int, units: int, world: int) -> int:
    """Of a section of `size` elements in `units` that stay whole (heads), how many each rank has: with fewer units than ranks, one unit.

    Raises ValueError if they do not divide.
    """
    if units % world == 0:
        return size // world
    if world % units == 0:
        return size // units
    raise ValueError(f"{units} do not divide by {world}")


@dataclass
class Slice:
    """A rank's part of weight `of`: of each section (size, units) along `axis` its own units, one after the other."""

    of: str
    axis: int
    sections: list[list[int]]

    def ranges(self, rank: int, world: int) -> Iterator[tuple[int, int]]:
        """Where the parts of a rank begin and end."""
        start = 0
        for size, units in self.sections:
            each = width(size, units, world)
            first = start + (rank * each if units % world == 0 else rank * units // world * each)
            yield first, first + each
            start += size

    def size(self, world: int) -> int:
        return sum(width(size, units, world) for size, units in self.sections)

    def take(self, array: Array, rank: int, world: int) -> Array:
        """The rank's part: a view of `array` if it has one section, else a copy of that part alone."""
        before = (slice(None),) * self.axis
        parts = [array[(*before, slice(*r))] for r in self.ranges(rank, world)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.axis)


@dataclass
class Shards:
    """How the model of a rank differs from the whole one, for `world` ranks that share each of `stages` stages.

    weights    slices by the name of the initializer, or of the Identity of one, that is replaced
    constants  by the name of an initializer, its values on a rank
    heads      by the first output of an attention, its heads and its key heads on a rank
    values     by name, the axis and the size there that a value has on a rank
    """

    world: int
    weights: dict[str, Slice] = field(default_factory=dict)
    constants: dict[str, list[int]] = field(default_factory=dict)
    heads: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, list[int]] = field(default_factory=dict)
    stages: int = 1

    @property
    def ranks(self) -> int:
        """All of them: those of a stage have numbers that follow one another."""
        return self.world * self.stages

    def to_dict(self) -> dict[str, Any]:
        weights = {n: [s.of, s.axis, s.sections] for n, s in self.weights.items()}
        return {"world": self.world, "weights": weights, "constants": self.constants, "heads": self.heads, "values": self.values, "stages": self.stages}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Shards:
        """Raises ValueError, KeyError or TypeError if `data` is not what `to_dict` makes."""
        made = Shards(data["world"], {n: Slice(*s) for n, s in data["weights"].items()}, dict(data["constants"]), dict(data["heads"]), dict(data["values"]), data.get("stages", 1))
        if any(type(n) is not int or n < 1 for n in (made.world, made.stages)) or not 1 < made.ranks <= 4096:
            raise ValueError(f"{made.stages} stages of {made.world} ranks")
        for s in made.weights.values():
            if type(s.axis) is not int or s.axis < 0 or any(type(n) is not int or n < 1 for section in s.sections for n in section):
                raise ValueError(f"the slice of '{s.of}'")
            s.size(made.world)
        return made


def shards_of(proto: onnx.ModelProto) -> Shards | None:
    """What a model says of its shards; None if it has none. Raises RewriteError if it says what cannot be."""
    text = next((p.value for p in proto.metadata_props if p.key == KEY), None)
    if text is None:
        return None
    try:
        return Shards.from_dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise RewriteError(f"the model's metadata '{KEY}' are not those of a model in shards ({reason}); make it again with `rewrite optimize --tensor-parallel` or `--pipeline-parallel`") from error


def dims_of(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


class LocalNodes:
    """The nodes of a rank's model, which are the same for all ranks."""

    def __init__(self, model: Model, shards: Shards):
        self.model, self.shards = model, shards
        self.table = FunctionTable(list(model.proto.functions))
        self.elements = {i.name: i for i in model.proto.graph.initializer}
        self._check(model.proto.graph)
        types = {v.name: v.type.tensor_type.elem_type for v in (*model.proto.graph.value_info, *model.proto.graph.input, *model.proto.graph.output)}
        self.types = {**types, **{i.name: i.data_type for i in self.elements.values()}}
        self.sizes = {v.name: [d.dim_value for d in dims_of(v)] for v in (*model.proto.graph.value_info, *model.proto.graph.input)}
        self.nodes = [self._node(n) for n in model.proto.graph.node if not (n.op_type == "Identity" and n.output[0] in shards.weights)]

    def _check(self, graph: onnx.GraphProto) -> None:
        """Raises RewriteError if the graph is no longer the one that was split."""
        parts = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Identity"}
        values = {name for node in graph.node for name in node.output} | {i.name for i in graph.input}
        sizes = {n: list(i.dims) for n, i in self.elements.items()}
        slices = self.shards.weights.items()
        wrong = [n for n, s in slices if s.of not in sizes or (n != s.of and parts.get(n) != s.of) or sizes[s.of][s.axis : s.axis + 1] != [sum(size for size, _ in s.sections)]]
        wrong += [n for n in self.shards.constants if n not in self.elements]
        wrong += [n for n in (*self.shards.heads, *self.shards.values) if n not in values]
        if wrong:
            raise RewriteError(f"{self.model.name}: it was changed after it was split over ranks: '{wrong[0]}' is not what its metadata say; split it again")

    def _node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        if node.domain != DOMAIN:
            return made
        name, opset = base_name(node), self.model.opset
        attributes = {a.name: decode(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        if name == "AllGather":
            made.op_type = self.table.add(shards_onnx.all_gather(self.shards.world, opset))
        elif name == "PagedAttention" and node.output[0] in self.shards.heads:
            heads, kv_heads = self.shards.heads[node.output[0]]
            attributes |= {"heads": heads, "kv_heads": kv_heads}
            del made.attribute[:]
            made.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in sorted(attributes.items()))
            cache = next(i for i in self.model.proto.graph.input if i.name == node.input[4])
            dtype = onnx.helper.tensor_dtype_to_np_dtype(cache.type.tensor_type.elem_type)
            angles = self.sizes[node.input[9]][-1] if len(node.input) > 9 and node.input[9] else 0
            made.op_type = self.table.add(paged_attention_onnx.body(attributes, dims_of(cache)[3].dim_value, dtype, opset, angles, norm=len(node.input) > 11))
        elif name == "FusedAttention" and node.output[0] in self.shards.heads:
            mask = node.input[3] if len(node.input) > 3 else ""
            boolean = self.types.get(mask) == onnx.TensorProto.BOOL
            heads, kv_heads = self.shards.heads[node.output[0]]
            made.op_type = self.table.add(shards_onnx.attention(heads, kv_heads, "" if not mask else "bool" if boolean else "float", attributes, opset))
        return made


def without_graph(model: Model, table: FunctionTable) -> onnx.ModelProto:
    """The model without its graph and its description of shards."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    del proto.graph.node[:], proto.graph.initializer[:], proto.graph.value_info[:], proto.functions[:]
    proto.functions.extend([*(f for f in model.proto.functions if f.domain != DOMAIN), *table.functions.values()])
    kept = [p for p in model.proto.metadata_props if p.key != KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    return proto


def local_stages(model: Model, local: LocalNodes, shards: Shards) -> list[Stage]:
    """The stages of a rank's nodes; of a model without stages one. Raises RewriteError if the graph is not what its metadata say."""
    try:
        return stages_of(local.nodes, [o.name for o in model.proto.graph.output], shards.stages)
    except ValueError as error:
        raise RewriteError(f"{model.name}: it was changed after it was cut into stages: {error}; cut it again") from error


def all_ranks(model: Model) -> Model:
    """A model in which all ranks are computed one after the other, each from its own slices, with real sums, joins and messages.

    It has the inputs and outputs of the whole model: caches are cut and joined; other outputs are those of the first rank that has them.
    """
    shards = shards_of(model.proto)
    assert shards is not None
    local = LocalNodes(model, shards)
    proto = without_graph(model, local.table)
    graph, source = proto.graph, model.proto.graph
    graph.initializer.extend(source.initializer)
    for name, values in shards.constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), f"all/{name}"))
    integers: dict[tuple[int, ...], str] = {}
    for index, stage in enumerate(local_stages(model, local, shards)):
        made = _AllRanks(shards, local, {i.name for i in source.input}, index, integers)
        made.weights(graph, stage.reads)
        made.caches(graph, stage.reads)
        for message in stage.receives:
            made.receive(graph, message)
        for node in stage.nodes:
            made.every_rank(graph, node)
        for name in stage.outputs:
            made.output(graph, name)
    from rewrite.patterns.transform_generate import drop_functions

    drop_functions(proto)
    return Model(proto, model.folder, model.name, dict(model.external))


class _AllRanks:
    """The graph of all ranks of a stage in the making; the values of rank r are called `rank r/name`."""

    def __init__(self, shards: Shards, local: LocalNodes, inputs: set[str], stage: int, integers: dict[tuple[int, ...], str]):
        self.shards, self.local, self.inputs = shards, local, inputs
        self.ranks = range(stage * shards.world, (stage + 1) * shards.world)
        self.constants = integers

    def name(self, name: str, rank: int) -> str:
        shared = not name or (name in self.inputs and name not in self.shards.values) or (name in self.local.elements and name not in self.shards.weights and name not in self.shards.constants)
        return name if shared else f"all/{name}" if name in self.shards.constants else f"rank {rank}/{name}"

    def integers(self, graph: onnx.GraphProto, *values: int) -> str:
        if values not in self.constants:
            self.constants[values] = f"all/{values}"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), self.constants[values]))
        return self.constants[values]

    def part(self, graph: onnx.GraphProto, source: str, ranges: Sequence[tuple[int, int]], axis: int, target: str) -> None:
        """Nodes for these ranges of a value, joined."""
        names = [target] if len(ranges) == 1 else [f"{target}/{i}" for i in range(len(ranges))]
        for name, (begin, end) in zip(names, ranges, strict=True):
            operands = [source, *(self.integers(graph, n) for n in (begin, end, axis))]
            graph.node.append(onnx.helper.make_node("Slice", operands, [name], name=name))
        if len(names) > 1:
            graph.node.append(onnx.helper.make_node("Concat", names, [target], name=target, axis=axis))

    def weights(self, graph: onnx.GraphProto, read: set[str]) -> None:
        for name, s in self.shards.weights.items():
            for rank in self.ranks if name in read else ():
                self.part(graph, s.of, list(s.ranges(rank % self.shards.world, self.shards.world)), s.axis, f"rank {rank}/{name}")

    def _held(self, name: str, heads: int) -> Slice:
        """The key heads of each rank, of a cache with so many."""
        return Slice(name, self.shards.values[name][0], [[heads, heads]])

    def caches(self, graph: onnx.GraphProto, read: set[str]) -> None:
        for value in self.local.model.proto.graph.input:
            if value.name in self.shards.values and value.name in read:
                held = self._held(value.name, dims_of(value)[2].dim_value)
                for rank in self.ranks:
                    self.part(graph, value.name, list(held.ranges(rank % self.shards.world, self.shards.world)), held.axis, f"rank {rank}/{value.name}")

    def receive(self, graph: onnx.GraphProto, message: Message) -> None:
        for rank in self.ranks:
            source = self.name(message.sent, rank - (message.target - message.source) * self.shards.world)
            target = self.name(message.received, rank)
            graph.node.append(onnx.helper.make_node("Identity", [source], [target], name=target))

    def every_rank(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        if node.domain == DOMAIN and base_name(node) in ("AllReduce", "AllGather"):
            self._collective(graph, node)
            return
        for rank in self.ranks:
            made = graph.node.add()
            made.CopyFrom(node)
            made.name = f"rank {rank}/{len(graph.node)} {node.name}"  # of its own even if the node has none
            made.input[:] = [self.name(n, rank) for n in node.input]
            made.output[:] = [self.name(n, rank) for n in node.output]

    def _collective(self, graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
        x, y = node.input[0], node.output[0]
        parts = [self.name(x, rank) for rank in self.ranks]
        if base_name(node) == "AllGather":
            for rank in self.ranks:
                graph.node.append(onnx.helper.make_node("Concat", parts, [self.name(y, rank)], name=self.name(y, rank), axis=-1))
            return
        element = self.local.types.get(y) or self.local.types.get(x, onnx.TensorProto.FLOAT)
        narrow = element in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)

        def wide(name: str, new: str) -> str:
            if not narrow:
                return name
            graph.node.append(onnx.helper.make_node("Cast", [name], [new], name=new, to=onnx.TensorProto.FLOAT))
            return new

        parts = [wide(p, f"{p}/wide") for p in parts]
        for rank in self.ranks:
            target = self.name(y, rank)
            more = [wide(self.name(n, rank), f"{target}/wide {i}") for i, n in enumerate(node.input[1:]) if n]
            terms = [f"{target}/sum", *more]
            graph.node.append(onnx.helper.make_node("Sum", parts, [terms[0]], name=terms[0]))
            for index, term in enumerate(terms[1:]):
                terms[0], before = f"{target}/sum {index}", terms[0]
                graph.node.append(onnx.helper.make_node("Add", [before, term], [terms[0]], name=terms[0]))
            graph.node.append(onnx.helper.make_node("Cast", [terms[0]], [target], name=target, to=element))

    def output(self, graph: onnx.GraphProto, name: str) -> None:
        if name not in self.shards.values:
            graph.node.append(onnx.helper.make_node("Identity", [self.name(name, self.ranks[0])], [name], name=name))
            return
        value = next(o for o in graph.output if o.name == name)
        held = self._held(name, dims_of(value)[2].dim_value)
        ranges = {next(held.ranges(rank % self.shards.world, self.shards.world)): f"rank {rank}/{name}" for rank in self.ranks}
        graph.node.append(onnx.helper.make_node("Concat", [ranges[r] for r in sorted(ranges)], [name], name=name, axis=held.axis))


def weights_of_rank(model: Model, shards: Shards, stage: Stage) -> dict[str, int]:
    """Bytes of each weight that a rank of this stage has: whole ones, and slices by the name under which they are read. Integers of shapes are none."""
    elements, found = {i.name: i for i in model.proto.graph.initializer}, {}
    for name in sorted(stage.reads):
        part = shards.weights.get(name)
        tensor = elements.get(part.of if part is not None else name)
        if tensor is not None and tensor.data_type != onnx.TensorProto.INT64:
            size = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            found[name] = size if part is None else size * part.size(shards.world) // tensor.dims[part.axis]
    return found


def describe_shards(model: Model) -> str:
    """What each rank has of a model in shards or stages, in a line."""
    shards = shards_of(model.proto)
    assert shards is not None
    whole = sum(math.prod(i.dims) * onnx.helper.tensor_dtype_to_np_dtype(i.data_type).itemsize for i in model.proto.graph.initializer)
    stages = local_stages(model, LocalNodes(model, shards), shards)
    mine = ", ".join(f"{sum(weights_of_rank(model, shards, s).values()) / 1e6:.2f}" for s in stages)
    counts = {k: sum(kind(n) == k for n in model.proto.graph.node) for k in ("AllReduce", "AllGather", "Send")}
    made = f"{shards.ranks} ranks" + (f" in {shards.stages} stages" if shards.stages > 1 else "")
    has = f"each of a stage has {mine}" if shards.stages > 1 else f"each has {mine}"
    messages = f", {counts['Send']} messages" if shards.stages > 1 else ""
    return f"{made}: {has} of {whole / 1e6:.2f} MB of weights; {counts['AllReduce']} sums and {counts['AllGather']} joins{messages} a step"
