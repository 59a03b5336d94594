"""The model of one rank, cut out of a model in shards or stages: what a plan for several ranks is built from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.graph import SMALL
from rewrite.model import Model
from rewrite.registry import Plugin
from rewrite.runtime.partition import Partition, Step, partition
from rewrite.runtime.weights import Array, tensor_array
from rewrite.shards import LocalNodes, Slice, dims_of, local_stages, shards_of, without_graph
from rewrite.stages import Stage
from rewrite.verify_generator import generator_of


class RankModels:
    """The models of all ranks of `model`: what is the same for all is worked out once, and each weight is read once.

    `hollow` ones have zeros for weights: their shapes are right, and nothing is read.
    """

    def __init__(self, model: Model, hollow: bool = False):
        shards = shards_of(model.proto)
        assert shards is not None
        self.model, self.shards, self.hollow = model, shards, hollow
        self.local = LocalNodes(model, shards)
        self.stages = local_stages(model, self.local, shards)
        self.types = {v.name: v for v in (*model.proto.graph.value_info, *model.proto.graph.input, *model.proto.graph.output)}
        generator = generator_of(model.proto)
        self.caches = set() if generator is None else {layer[k] for layer in generator["layers"] for k in ("key_cache", "value_cache")}
        self.read: dict[str, Array] = {}  # whole ones that were sliced

    def make(self, rank: int) -> tuple[Model, dict[str, Array]]:
        """The model of one rank; and its larger weights by name, views of the whole ones where they can be.

        What it receives are inputs of it, and what it sends are outputs.
        """
        shards, stage = self.shards, self.stages[rank // self.shards.world]
        proto, arrays, used = without_graph(self.model, self.local.table), {}, stage.reads
        proto.graph.node.extend(stage.nodes)
        for name, tensor in self.local.elements.items():
            if name in shards.constants:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shards.constants[name], np.int64), name))
            elif name not in shards.weights and name in used:
                proto.graph.initializer.append(tensor)
        for name in [n for n in shards.weights if n in used]:
            part = self._slice(shards.weights[name], rank % shards.world)
            if part.size <= SMALL:
                proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(part), name))
                continue
            arrays[name] = part
            made = proto.graph.initializer.add(name=name, data_type=self.local.elements[shards.weights[name].of].data_type, dims=part.shape, data_location=onnx.TensorProto.EXTERNAL)
            made.external_data.add(key="location", value="elsewhere")
        self._interface(proto.graph, stage)
        for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
            if value.name in shards.values and len(dims_of(value)):
                axis, size = shards.values[value.name]
                dims_of(value)[axis].dim_value = size
        return Model(proto, self.model.folder, self.model.name, dict(self.model.external)), arrays

    def _slice(self, part: Slice, rank: int) -> Array:
        if self.hollow:
            tensor = self.local.elements[part.of]
            dims = [part.size(self.shards.world) if axis == part.axis else d for axis, d in enumerate(tensor.dims)]
            return np.broadcast_to(np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), dims)
        if part.of not in self.read:
            self.read[part.of] = tensor_array(self.local.elements[part.of], self.model.folder)
        found = part.take(self.read[part.of], rank, self.shards.world)
        if found.size < 2:
            raise RewriteError(f"{self.model.name}: a rank would have one element of weight '{part.of}'; split it over fewer ranks")
        return found

    def _interface(self, graph: onnx.GraphProto, stage: Stage) -> None:
        """The types of values, inputs and outputs; the caches of other stages are none of this one."""
        whole = self.model.proto.graph
        other = {m.received for m in stage.receives} | {*self.shards.weights}  # inputs here, and slices, of which an exporter may have noted the whole shape
        graph.value_info.extend(v for v in whole.value_info if v.name not in other)
        if self.shards.stages == 1:
            return
        inputs = [*(i for i in whole.input if i.name not in self.caches or i.name in stage.reads), *(self.types[m.received] for m in stage.receives)]
        sent = {m.sent: onnx.ValueInfoProto() for m in stage.sends}
        for message in stage.sends:
            sent[message.sent].CopyFrom(self.types[message.received])
            sent[message.sent].name = message.sent
        outputs = [*(o for o in whole.output if o.name in stage.outputs), *sent.values()]
        del graph.input[:], graph.output[:]
        graph.input.extend(inputs)
        graph.output.extend(outputs)

    def cut(self, rank: int, plugins: dict[str, Plugin]) -> tuple[Partition, dict[str, Array]]:
        """The steps of a rank, messages among them; and its slices."""
        made, arrays = self.make(rank)
        found, index = partition(made, plugins, arrays), rank // self.shards.world
        stage = self.stages[index]
        receives = [Step("plugin", "Recv", [], [m.received], {"source": m.source, "target": m.target}) for m in stage.receives]
        sends = [Step("plugin", "Send", [found.outputs[m.sent]], [], {"source": m.source, "target": m.target}) for m in stage.sends]
        found.values.update({m.received: found.inputs.pop(m.received) for m in stage.receives})
        found.outputs = {n: v for n, v in found.outputs.items() if n in stage.outputs}
        found.steps = [dataclasses.replace(s, stage=index) for s in (*receives, *found.steps, *sends)]
        return found, arrays


def partition_ranks(model: Model, plugins: dict[str, Plugin]) -> Partition:
    """The steps of a rank of each stage, and the weights of all ranks.

    Those that differ among the ranks of a stage are called `rank 0/...` and so on, a rank's one after the other; before them lie those
    that only the ranks of a stage have, `stage 0/...`; before all of them, what all ranks have.
    """
    models = RankModels(model)
    world, stages = models.shards.world, models.shards.stages
    firsts: list[Partition] = []
    shared: list[dict[str, Array]] = []  # of each stage, by all its ranks
    own: list[dict[str, Array]] = []  # of each rank
    for rank in range(world * stages):
        cut, arrays = models.cut(rank, plugins)
        if rank % world == 0:
            firsts.append(cut)
            shared.append({n: a for n, a in cut.weights.items() if n not in arrays})
        assert cut.steps == firsts[-1].steps  # nothing but weights tells the ranks of a stage apart
        assert list(cut.weights) == list(firsts[-1].weights)
        shared[-1] = {n: a for n, a in shared[-1].items() if _equal(a, cut.weights[n])}
        own.append(cut.weights)
    common = {n: a for n, a in shared[0].items() if all(n in other and _equal(a, other[n]) for other in shared[1:])}
    weights = dict(common)
    for stage in range(stages):
        if stages > 1:
            weights |= {f"stage {stage}/{n}": a for n, a in shared[stage].items() if n not in common}
        for rank in range(stage * world, (stage + 1) * world):
            weights |= {f"rank {rank}/{n}": a for n, a in own[rank].items() if n not in shared[stage]}
    return _joined(firsts, weights)


def _joined(parts: list[Partition], weights: dict[str, Array]) -> Partition:
    """The stages as one: each has its steps, and a value of several is the same there."""
    made = Partition({}, {}, {}, [s for p in parts for s in p.steps], {}, weights)
    for part in parts:
        made.inputs |= part.inputs
        made.outputs |= part.outputs
        made.values |= part.values
        made.segments |= part.segments
    return made


def _equal(one: Array, other: Array) -> bool:
    """Whether two arrays are the same: at once for those that lie in one place, as initializers do that are not sliced."""
    if isinstance(one, np.memmap) and isinstance(other, np.memmap) and one.filename == other.filename and one.offset == other.offset:
        return True
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def local_generator(generator: dict[str, Any], model: Model) -> dict[str, Any]:
    """What a generator's runtime must know, of a rank: its heads, and the stage of each layer."""
    models = RankModels(model)
    stages = {name: index for index, stage in enumerate(models.stages) for name in stage.reads}
    layers = []
    for layer in generator["layers"]:
        heads, kv_heads = models.shards.heads.get(_attention(model, layer), (layer["heads"], layer["kv_heads"]))
        layers.append({**layer, "kv_heads": kv_heads, "heads": heads, "stage": stages[layer["key_cache"]]})
    return {**generator, "layers": layers}


def _attention(model: Model, layer: dict[str, Any]) -> str:
    """The first output of the attention that has this layer's caches."""
    return next(str(n.output[0]) for n in model.proto.graph.node if layer["keys"] in n.output)
