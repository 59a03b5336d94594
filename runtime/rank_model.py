"""The model of one rank, cut out of a model in shards: what a plan for several ranks is built from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.graph import SMALL
from rewrite.model import Model
from rewrite.registry import Plugin
from rewrite.runtime.partition import Partition, partition
from rewrite.runtime.weights import Array, tensor_array
from rewrite.shards import LocalNodes, dims_of, shards_of, without_graph


def rank_model(model: Model, rank: int, read: dict[str, Array]) -> tuple[Model, dict[str, Array]]:
    """The model of one rank; and its larger weights by name, views of the whole ones where they can be.

    `read` keeps the whole ones that were sliced, for the next rank.
    """
    shards = shards_of(model.proto)
    assert shards is not None
    local = LocalNodes(model, shards)
    proto, arrays = without_graph(model, local.table), {}
    used = {n for node in local.nodes for n in node.input}
    proto.graph.node.extend(local.nodes)
    for name, tensor in local.elements.items():
        if name in shards.constants:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(shards.constants[name], np.int64), name))
        elif name not in shards.weights and name in used:
            proto.graph.initializer.append(tensor)
    for name, s in shards.weights.items():
        if s.of not in read:
            read[s.of] = tensor_array(local.elements[s.of], model.folder)
        part = s.take(read[s.of], rank, shards.world)
        if part.size < 2:
            raise RewriteError(f"{model.name}: a rank would have one element of weight '{s.of}'; split it over fewer ranks")
        if part.size <= SMALL:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(part), name))
            continue
        arrays[name] = part
        made = proto.graph.initializer.add(name=name, data_type=local.elements[s.of].data_type, dims=part.shape, data_location=onnx.TensorProto.EXTERNAL)
        made.external_data.add(key="location", value="elsewhere")
    proto.graph.value_info.extend(model.proto.graph.value_info)
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        if value.name in shards.values and len(dims_of(value)):
            axis, size = shards.values[value.name]
            dims_of(value)[axis].dim_value = size
    return Model(proto, model.folder, model.name, dict(model.external)), arrays


def partition_ranks(model: Model, world: int, plugins: dict[str, Plugin]) -> Partition:
    """The model of a rank, cut, with the weights of all: those that differ are called `rank 0/...` and so on, a rank's one after the other."""
    read: dict[str, Array] = {}
    first: Partition | None = None
    own: list[dict[str, Array]] = []  # of each rank
    shared: dict[str, Array] = {}
    for rank in range(world):
        made, arrays = rank_model(model, rank, read)
        cut = partition(made, plugins, arrays)
        if first is None:
            first, shared = cut, {n: a for n, a in cut.weights.items() if n not in arrays}
        assert cut.steps == first.steps  # nothing but weights tells ranks apart
        assert list(cut.weights) == list(first.weights)
        shared = {n: a for n, a in shared.items() if _equal(a, cut.weights[n])}
        own.append({n: a for n, a in cut.weights.items() if n not in shared})
    assert first is not None
    names = [n for n in first.weights if n not in shared]
    of_first = first.weights  # what another rank has not of its own was equal to that so far
    first.weights = {**shared, **{f"rank {rank}/{n}": weights.get(n, of_first[n]) for rank, weights in enumerate(own) for n in names}}
    return first


def _equal(one: Array, other: Array) -> bool:
    """Whether two arrays are the same: at once for those that lie in one place, as initializers do that are not sliced."""
    if isinstance(one, np.memmap) and isinstance(other, np.memmap) and one.filename == other.filename and one.offset == other.offset:
        return True
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def local_generator(generator: dict[str, Any], model: Model) -> dict[str, Any]:
    """What a generator's runtime must know, of a rank: its heads."""
    shards = shards_of(model.proto)
    assert shards is not None
    layers = []
    for layer in generator["layers"]:
        layers.append({**layer, "kv_heads": shards.values[layer["key_cache"]][1], "heads": layer["heads"] // shards.world})
    return {**generator, "layers": layers}
