"""A model, perhaps in shards -> the same in stages: cut between layers, where least has to be sent, into parts of about equal cost.

What a step costs is estimated by the weights it reads. A cut may lie wherever as few bytes as anywhere cross it, which in a
transformer is where nothing but the residual does: before and after each attention and each MLP.
"""

from __future__ import annotations

import bisect
import json
import math
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError
from rewrite.functions import FunctionTable
from rewrite.graph import DOMAIN, Graph, canonical
from rewrite.model import Model, names_in, open_graph
from rewrite.patterns.generate_logits import typed
from rewrite.plugins import shards_onnx
from rewrite.shapes import SymbolicShapes
from rewrite.shards import KEY, Shards, shards_of
from rewrite.verify_generator import generator_of

LIGHT = 1 << 20  # elements: what reads no larger constant, and nothing but inputs, is computed by each stage that needs it
HEAVY = ("MatMulAct", "GatedMatMulAct", "FusedAttention", "PagedAttention", "AllReduce", "AllGather")


@dataclass
class Crossing:
    """A place between two nodes and the values that are made before it and read after it."""

    position: int
    names: list[str]
    size: int


def to_stages(model: Model, stages: int) -> Model:
    """`model`, after the lift and fuse rules, in so many stages. Raises RewriteError if there are not enough places to cut it."""
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for n in model.proto.graph.node for a in n.attribute):
        raise RewriteError(f"{model.name}: it has branches or loops, which cannot be cut into stages")
    return _Cutter(model, stages).run()


def best_cuts(costs: list[float], places: list[int], stages: int) -> list[int]:
    """Of `places` (a cut before the node of that index) those that make the most expensive of `stages` parts as cheap as can be."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    marks = [0, *places, len(costs)]
    best = [total[m] for m in marks]  # of the nodes up to each mark, the largest part
    last: list[list[int]] = []
    for _ in range(1, stages):
        before, best, chosen = best, [math.inf] * len(marks), [0] * len(marks)
        for end in range(1, len(marks)):
            for start in range(1, end):
                cost = max(before[start], total[marks[end]] - total[marks[start]])
                if cost < best[end]:
                    best[end], chosen[end] = cost, start
        last.append(chosen)
    cuts, end = [], len(marks) - 1
    for chosen in reversed(last):
        end = chosen[end]
        cuts.append(marks[end])
    return cuts[::-1]


class _Cutter:
    """The graph, what is light in it, and the copy that is being cut."""

    def __init__(self, model: Model, stages: int):
        self.model, self.stages = model, stages
        self.shards = shards_of(model.proto) or Shards(1)
        self.opened = open_graph(model)
        self.graph = Graph(self.opened.graph, model.opset)
        SymbolicShapes(self.graph).run()
        self.tensors = {t.name: t for n in self.graph for t in (*n.inputs, *n.outputs) if t.name}
        generator = generator_of(model.proto)
        caches = set() if generator is None else {layer[k] for layer in generator["layers"] for k in ("key_cache", "value_cache")}
        self.nodes = [n for n in model.proto.graph.node if n.output]
        by_output = {n.outputs[0].name: n for n in self.graph if n.outputs}
        self.light = {i.name for i in model.proto.graph.input} - caches | {i.name for i in model.proto.graph.initializer}
        self.heavy: list[int] = []  # nodes that one stage alone computes, by index
        self.costs: list[float] = []
        for index, node in enumerate(self.nodes):
            made = by_output.get(node.output[0])
            self.costs.append(0.0 if made is None or canonical(made) == "Gather" else self._weights(made))
            if made is not None and (canonical(made) in HEAVY or self._large(made) or any(n and n not in self.light for n in node.input)):
                self.heavy.append(index)
                continue
            self.light.update(node.output)

    def _constants(self, node: gs.Node) -> list[gs.Tensor]:
        return [t for t in node.inputs if not t.is_empty() and self.graph.is_weight(t) and t.shape is not None]

    def _large(self, node: gs.Node) -> bool:
        return not self.graph.is_weight(node.outputs[0]) and any(math.prod(t.shape) > LIGHT for t in self._constants(node))

    def _weights(self, node: gs.Node) -> float:
        """Bytes of weights that the node reads."""
        if self.graph.is_weight(node.outputs[0]):
            return 0.0
        return float(sum(math.prod(t.shape) * _itemsize(t) for t in self._constants(node)))

    def run(self) -> Model:
        places = self._places()
        if len(places) < self.stages - 1:
            raise RewriteError(f"{self.model.name}: it cannot be cut into {self.stages} stages: there are {len(places)} places where one value leads on; use fewer stages")
        cuts = best_cuts(self.costs, sorted(places), self.stages)
        return self._written([places[c] for c in cuts])

    # --- where to cut --------------------------------------------------------------------------------------------
    def _places(self) -> dict[int, Crossing]:
        """The places where as few bytes cross as anywhere, some heavy node before and after each, by the index of the node after it."""
        last: dict[str, int] = {}
        for index in self.heavy:
            last.update(dict.fromkeys(filter(None, self.nodes[index].input), index))
        alive: dict[str, int] = {}  # values made so far that are still to be read, by size; -1 for those that cannot be sent
        found: list[Crossing] = []
        for index, after in zip(self.heavy, self.heavy[1:], strict=False):
            alive = {n: size for n, size in alive.items() if last[n] > index}
            alive.update({n: self._size(n) for n in self.nodes[index].output if n and last.get(n, -1) > index})
            if alive and min(alive.values()) >= 0:
                found.append(Crossing(after, sorted(alive), sum(alive.values())))
        least = min((c.size for c in found), default=0)
        return {c.position: c for c in found if c.size == least}

    def _size(self, name: str) -> int:
        """Bytes of a value for one token; -1 if a rank that receives it would not know its shape, or has only a part of it."""
        tensor = self.tensors[name]
        dims = {d for value in self.opened.graph.inputs for d in value.shape or () if isinstance(d, str)}
        if tensor.dtype is None or tensor.shape is None or name in self.shards.values:
            return -1
        if any(not isinstance(d, int) and d not in dims for d in tensor.shape):
            return -1
        return math.prod(d for d in tensor.shape if isinstance(d, int)) * _itemsize(tensor)

    # --- the changed copy ----------------------------------------------------------------------------------------
    def _written(self, cuts: list[Crossing]) -> Model:
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model.proto)
        table, taken = FunctionTable(list(proto.functions)), names_in(proto)
        table_send, table_recv = (table.add(shards_onnx.message(kind, self.model.opset)) for kind in ("Send", "Recv"))
        nodes = [n for n in proto.graph.node if n.output]
        stage = {index: bisect.bisect_right([c.position for c in cuts], index) for index in self.heavy}
        made = {name: stage[index] for index in self.heavy for name in self.nodes[index].output}
        before: dict[int, list[onnx.NodeProto]] = {}
        new: dict[tuple[str, int], str] = {}
        for index in self.heavy:
            for place, name in enumerate(self.nodes[index].input):
                source, target = made.get(name, stage[index]), stage[index]
                if source == target:
                    continue
                if (name, target) not in new:
                    sent, received = (_fresh(taken, f"{name}_{what}_{target}") for what in ("sent", "received"))
                    new[name, target] = received
                    for op, i, o in ((table_send, name, sent), (table_recv, sent, received)):
                        before.setdefault(cuts[target - 1].position, []).append(onnx.helper.make_node(op, [i], [o], name=o, domain=DOMAIN, source=source, target=target))
                        value = typed(self.tensors[name], {})[0]
                        value.name = o
                        proto.graph.value_info.append(value)
                nodes[index].input[place] = new[name, target]
        ordered = onnx.GraphProto(node=[n for index, node in enumerate(nodes) for n in (*before.get(index, ()), node)])
        del proto.graph.node[:], proto.functions[:]
        proto.graph.node.extend(ordered.node)
        proto.functions.extend([*(f for f in self.model.proto.functions if f.domain != DOMAIN), *table.functions.values()])
        proto.ir_version = max(proto.ir_version, 8)
        self.shards.stages = self.stages
        onnx.helper.set_model_props(proto, {**{p.key: p.value for p in proto.metadata_props}, KEY: json.dumps(self.shards.to_dict())})
        return Model(proto, self.model.folder, self.model.name, dict(self.model.external))


def _itemsize(tensor: gs.Tensor) -> int:
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype) if isinstance(tensor.dtype, int) else tensor.dtype
    return int(np.dtype(kind).itemsize) if kind is not None else 4


def _fresh(taken: set[str], stem: str) -> str:
    name, index = stem, 0
    while name in taken:
        index += 1
        name = f"{stem}_{index}"
    taken.add(name)
    return name
