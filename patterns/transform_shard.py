"""A model after the lift and fuse rules -> the same in shards: column and row pairs, slices of their weights, sums and joins of the ranks.

What is split is found in the graph: the heads of each attention with the products before and after it, pairs of products
with nothing between them that looks along the width, the table of the tokens by columns, the last product by rows of the
vocabulary. The model stays whole (AllReduce and AllGather of one rank change nothing); its metadata say what a rank has.
"""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.errors import RewriteError
from rewrite.functions import FunctionTable
from rewrite.graph import DOMAIN, Graph, canonical, decode, describe
from rewrite.model import Model, names_in, open_graph
from rewrite.patterns.shard_axes import Cut, Spread, Unsplit, bounds_of
from rewrite.patterns.transform_generate import drop_functions
from rewrite.plugins import shards_onnx
from rewrite.shapes import SymbolicShapes
from rewrite.shards import KEY, Shards, Slice, shards_of, width
from rewrite.verify_generator import generator_of

PRODUCTS = ("MatMulAct", "GatedMatMulAct")


def to_shards(model: Model, world: int) -> tuple[Model, list[str]]:
    """`model`, after the lift and fuse rules, in shards for `world` ranks; and what stays whole on each, a line each with the reason.

    Raises RewriteError, naming the node, if heads or the width of a pair do not divide by `world`, or an attention cannot be split.
    """
    if shards_of(model.proto) is not None:
        raise RewriteError(f"{model.name}: it is in shards already")
    if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for n in model.proto.graph.node for a in n.attribute):
        raise RewriteError(f"{model.name}: it has branches or loops, which cannot be split over ranks")
    if model.opset < 15:
        raise RewriteError(f"{model.name}: it is of opset {model.opset}; export it at opset 15 or later to split it")
    return _Transform(model, world).run()


class _Transform:
    """The graph, what is split in it, and the copy that is being changed."""

    def __init__(self, model: Model, world: int):
        self.model, self.world = model, world
        self.graph = Graph(open_graph(model).graph, model.opset)
        SymbolicShapes(self.graph).run()
        generator = generator_of(model.proto)
        caches = [] if generator is None else [layer[k] for layer in generator["layers"] for k in ("key_cache", "value_cache", "keys", "values")]
        self.spread = Spread(self.graph, world, caches)
        self.whole: list[str] = []
        self.reasons: dict[str, str] = {}  # why a product is no column of a pair, by its output
        self.gathered: set[str] = set()  # values of which each rank makes a part

    def run(self) -> tuple[Model, list[str]]:
        self._attentions()
        self._pairs()
        if not self.spread.found.places:
            raise RewriteError(f"{self.model.name}: it has no attention and no pair of products that can be split; `rewrite explain` tells what the rules did not fuse")
        self._head()
        self._embeddings()
        found = self.spread.found
        self.whole += [reason for name, reason in self.reasons.items() if name not in found.columns | found.rows]
        return _Writer(self).run(), self.whole

    def _refuse(self, node: gs.Node, reason: object) -> RewriteError:
        return RewriteError(f"{self.model.name}: cannot be split over {self.world} ranks: {describe(node)}: {reason}")

    # --- what is split -------------------------------------------------------------------------------------------
    def _attentions(self) -> None:
        for node in [n for n in self.graph if canonical(n) in ("FusedAttention", "PagedAttention")]:
            q, k = node.inputs[:2]
            heads, kv_heads = (t.shape[1] if t.shape is not None and len(t.shape) == 4 else None for t in (q, k))
            if isinstance(heads, int) and heads % self.world:
                raise self._refuse(node, f"its {heads} heads do not divide by {self.world}")
            if isinstance(kv_heads, int) and kv_heads % self.world and self.world % kv_heads:
                raise self._refuse(node, f"its {kv_heads} key heads do not divide by {self.world}, nor {self.world} by them, so that ranks could share one")
            try:
                self._check(self.spread.run([(node.outputs[0], Cut(1, ((heads or 0, heads or 0),)))]))
            except Unsplit as reason:
                raise self._refuse(node, f"it cannot be split by heads: {reason}") from reason

    def _pairs(self) -> None:
        for node in [n for n in self.graph if canonical(n) in PRODUCTS]:
            y, found = node.outputs[0], self.spread.found
            if y.name in found.columns | found.rows or y.shape is None or not isinstance(y.shape[-1], int):
                continue
            size = y.shape[-1]
            try:
                self._check(self.spread.run([(y, Cut(len(y.shape) - 1, ((size, size),)))]))
            except Unsplit as reason:
                where = describe(node)
                self.reasons[y.name] = str(reason) if str(reason).startswith(where) else f"{where}: {reason}"

    def _check(self, names: set[str]) -> None:
        """Refuse splits that do not divide."""
        found = self.spread.found
        for node in self.graph:
            for tensor in node.outputs:
                if tensor.name not in names:
                    continue
                for size, units in found.places[tensor.name].sections:
                    try:
                        width(size, units, self.world)
                    except ValueError as reason:
                        raise self._refuse(node, f"of a width of {size}, {reason}") from reason

    def _head(self) -> None:
        """The product that gives the logits: each rank has some of the vocabulary."""
        tensor = self.graph.gs.outputs[0]
        node = self.graph.producer(tensor)
        while node is not None and canonical(node) not in PRODUCTS:
            data = [t for t in node.inputs if not t.is_empty() and not self.graph.is_constant(t) and self.graph.producer(t) is not None]
            if len(data) != 1:
                return
            node = self.graph.producer(data[0])
        found = self.spread.found
        if node is None or canonical(node) != "MatMulAct" or node.outputs[0].name in found.columns | found.rows:
            return
        y = node.outputs[0]
        size, residual = y.shape[-1], len(node.inputs) > 3 and not node.inputs[3].is_empty()
        if residual or not self.graph.is_constant(node.inputs[1]):
            return
        if size % self.world:
            self.reasons[y.name] = f"{describe(node)}: {size} logits do not divide by {self.world}"
            return
        turned = int(node.attrs.get("trans_w", 0))
        self.spread.use(node, 1, Cut(0 if turned else 1, ((size, size),)))
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            self.spread.use(node, 2, Cut(0, ((size, size),)))
        found.columns.add(y.name)
        self.gathered.add(y.name)

    def _embeddings(self) -> None:
        """Tables of tokens, by columns."""
        for node in self.graph:
            if canonical(node) != "Gather" or node.attrs.get("axis", 0) != 0 or not self._by_tokens(node.inputs[1]):
                continue
            table, y = node.inputs[0], node.outputs[0]
            if not self.graph.is_weight(table) or _rank(table) != 2 or _rank(y) < 2 or id(y) in self.graph.outputs or self.spread.of(y) is not None:
                continue
            size = table.shape[1]
            if size % self.world:
                self.whole.append(f"{describe(node)}: a width of {size} does not divide by {self.world}")
                continue
            self.spread.use(node, 0, Cut(1, ((size, size),)))
            self.gathered.add(y.name)

    def _by_tokens(self, tensor: gs.Tensor) -> bool:
        node = self.graph.producer(tensor)
        while node is not None and canonical(node) in ("Cast", "Reshape", "Identity"):
            tensor = node.inputs[0]
            node = self.graph.producer(tensor)
        return node is None and "position" not in tensor.name.lower() and any(t is tensor for t in self.graph.gs.inputs)


def _rank(tensor: gs.Tensor) -> int:
    return -1 if tensor.shape is None else len(tensor.shape)


class _Writer:
    """The changed copy of the model and its description."""

    def __init__(self, made: _Transform):
        self.graph, self.found, self.gathered, self.model, self.world = made.graph, made.spread.found, made.gathered, made.model, made.world
        self.spread = made.spread
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(made.model.proto)
        self.taken = names_in(self.proto)
        self.nodes = {n.output[0]: n for n in self.proto.graph.node if n.output}
        self.table = FunctionTable(list(self.proto.functions))
        self.shards = Shards(made.world)
        self.initial = {i.name: i for i in self.proto.graph.initializer}

    def run(self) -> Model:
        for name, cut in self.found.places.items():
            self.shards.values[name] = [cut.axis, self._width(cut)]
        self._weights()
        for node in list(self.graph):
            self._node(node)
        self._collectives()
        functions = [f for f in self.proto.functions if f.domain != DOMAIN]
        del self.proto.functions[:]
        self.proto.functions.extend([*functions, *self.table.functions.values()])
        if self.proto.ir_version < 8:
            self.proto.ir_version = 8
        drop_functions(self.proto)
        kept = {p.key: p.value for p in self.proto.metadata_props}
        onnx.helper.set_model_props(self.proto, {**kept, KEY: json.dumps(self.shards.to_dict())})
        return Model(self.proto, self.model.folder, self.model.name, dict(self.model.external))

    def _width(self, cut: Cut) -> int:
        return sum(width(size, units, self.world) for size, units in cut.sections)

    def _fresh(self, stem: str) -> str:
        name, index = stem, 1
        while name in self.taken:
            index += 1
            name = f"{stem}_{index}"
        self.taken.add(name)
        return name

    # --- constants -----------------------------------------------------------------------------------------------
    def _weights(self) -> None:
        """Slices: under the weight's own name where all read it alike, else of an Identity."""
        uses: dict[str, dict[Cut, list[tuple[str, int]]]] = defaultdict(lambda: defaultdict(list))
        tensors: dict[str, gs.Tensor] = {}
        for (output, index), cut in self.found.uses.items():
            name = self.nodes[output].input[index]
            uses[name][cut].append((output, index))
            tensors[name] = self._operand(output, index)
        readers: dict[str, int] = defaultdict(int)
        for node in self.proto.graph.node:
            for name in node.input:
                readers[name] += 1
        first: list[onnx.NodeProto] = []
        for name, cuts in uses.items():
            source = self._initializer(name, tensors[name])
            for cut, places in cuts.items():
                mine = source
                if len(cuts) > 1 or readers[name] != len(places) or source != name:
                    mine = self._fresh(f"{name}_part")
                    first.append(onnx.helper.make_node("Identity", [source], [mine], name=mine))
                    for output, index in places:
                        self.nodes[output].input[index] = mine
                self.shards.weights[mine] = Slice(source, cut.axis, [list(s) for s in cut.sections])
        nodes = [*first, *self.proto.graph.node]
        moved = onnx.GraphProto(node=nodes)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(moved.node)
        self.nodes = {n.output[0]: n for n in self.proto.graph.node if n.output}

    def _operand(self, output: str, index: int) -> gs.Tensor:
        if not hasattr(self, "_makers"):
            self._makers = {n.outputs[0].name: n for n in self.graph if n.outputs}
        return self._makers[output].inputs[index]

    def _initializer(self, name: str, tensor: gs.Tensor) -> str:
        """The initializer that holds a constant: one is made of what nodes give or compute."""
        if name in self.initial:
            return name
        value = self.graph.constant(tensor, limit=2**62)
        if value is None:
            raise RewriteError(f"{self.model.name}: the constant '{name}' is computed; `rewrite optimize` without --tensor-parallel first")
        made = self._fresh(f"{name}_weight")
        self.proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), made))
        self.initial[made] = self.proto.graph.initializer[-1]
        return made

    def _integers(self, node: gs.Node, index: int, values: list[int], local: list[int]) -> None:
        """An operand of integers that are others on a rank."""
        if values == local:
            return
        name = self._fresh(f"{node.outputs[0].name}_sizes")
        self.proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
        self.nodes[node.outputs[0].name].input[index] = name
        self.shards.constants[name] = local

    # --- nodes ---------------------------------------------------------------------------------------------------
    def _node(self, node: gs.Node) -> None:
        operator = canonical(node)
        output = node.outputs[0].name if node.outputs else ""
        cut = self.found.places.get(output)
        if operator in ("FusedAttention", "PagedAttention") and output in self.found.attentions:
            self.shards.heads[output] = [self._width(self.found.places[t.name]) for t in node.inputs[:2]]
        elif operator in PRODUCTS and output in self.found.columns | self.found.rows:
            self._product(node)
        elif operator == "Rotary" and cut is not None and node.attrs.get("interleaved"):  # its body has the number of heads in it
            made = self.nodes[output]
            attributes = {a.name: decode(onnx.helper.get_attribute_value(a)) for a in made.attribute}
            made.op_type = self.table.add(shards_onnx.rotary(attributes, node.inputs[0].shape, node.inputs[1].shape, self.model.opset))
        elif operator == "Reshape" and cut is not None:
            values = self.spread.constant(node.inputs[1])
            local = list(values)
            if values[cut.axis] > 0:
                local[cut.axis] = self._width(cut)
            self._integers(node, 1, values, local)
        elif operator == "Split" and (source := self.found.places.get(node.inputs[0].name)) is not None and source.axis == int(node.attrs.get("axis", 0)) % _rank(node.inputs[0]):
            sizes = [self._width(self.found.places[t.name]) for t in node.outputs]
            if len(node.inputs) > 1 and not node.inputs[1].is_empty():
                self._integers(node, 1, self.spread.constant(node.inputs[1]), sizes)
            elif len(set(sizes)) > 1 or "split" in node.attrs:
                raise RewriteError(f"{self.model.name}: {describe(node)} would need other sizes on a rank, and has them as an attribute; export at opset 18 or later")
        elif operator == "Slice" and (source := self.found.places.get(node.inputs[0].name)) is not None:
            self._slice(node, source)

    def _slice(self, node: gs.Node, source: Cut) -> None:
        bounds = bounds_of(self.spread, node)
        if source.axis not in bounds:
            return
        places, start, mine = {0: 0}, 0, 0
        for size, units in source.sections:
            start, mine = start + size, mine + width(size, units, self.world)
            places[start] = mine
        starts, ends = self.spread.constant(node.inputs[1]), self.spread.constant(node.inputs[2])
        axes = self.spread.constant(node.inputs[3]) if len(node.inputs) > 3 and not node.inputs[3].is_empty() else list(range(len(starts)))
        index = [a % _rank(node.inputs[0]) for a in axes].index(source.axis)
        local_starts, local_ends = list(starts), list(ends)
        local_starts[index], local_ends[index] = (places[b] for b in bounds[source.axis])
        self._integers(node, 1, starts, local_starts)
        self._integers(node, 2, ends, local_ends)

    def _product(self, node: gs.Node) -> None:
        """Bodies that hold for any width; where rows are split, bias and residual come after the sum."""
        output = node.outputs[0].name
        made = self.nodes[output]
        attributes = {a.name: decode(onnx.helper.get_attribute_value(a)) for a in made.attribute}
        if output in self.found.rows:
            del made.input[2:]
        names = ("x", "w", "bias", "residual") if canonical(node) == "MatMulAct" else ("x", "w_gate", "w_up", "bias_gate", "bias_up")
        given = [n if i else "" for n, i in zip(names, made.input, strict=False)]
        make = shards_onnx.product if canonical(node) == "MatMulAct" else shards_onnx.gated_product
        made.op_type = self.table.add(make(given, attributes, self.model.opset))

    # --- sums and joins ------------------------------------------------------------------------------------------
    def _collectives(self) -> None:
        originals = {n.output[0]: list(n.input) for n in self.model.proto.graph.node if n.output}
        nodes: list[onnx.NodeProto] = []
        for node in self.proto.graph.node:
            nodes.append(node)
            output = node.output[0] if node.output else ""
            if output not in self.found.rows | self.gathered:
                continue
            part = self._fresh(f"{output}_partial")
            self._typed(output, part)
            node.output[0] = part
            name = self._fresh(f"{node.name or output}_sum" if output in self.found.rows else f"{node.name or output}_join")
            if output in self.found.rows:
                more = originals[output][2:]
                while more and not more[-1]:
                    more.pop()
                given = ["x", *(n if i else "" for n, i in zip(("bias", "residual"), more, strict=False))]
                function = shards_onnx.all_reduce(given, self.model.opset)
                nodes.append(onnx.helper.make_node(self.table.add(function), [part, *more], [output], name=name, domain=DOMAIN))
            else:
                function = shards_onnx.all_gather(1, self.model.opset)
                nodes.append(onnx.helper.make_node(self.table.add(function), [part], [output], name=name, domain=DOMAIN))
        ordered = onnx.GraphProto(node=nodes)
        del self.proto.graph.node[:]
        self.proto.graph.node.extend(ordered.node)

    def _typed(self, output: str, part: str) -> None:
        """The type of a part: of a sum that of the sum, of a join a rank's share of the last axis."""
        known = next((v for v in self.proto.graph.value_info if v.name == output), None)
        tensor = next(t for n in self.graph for t in n.outputs if t.name == output)
        if output in self.gathered:
            self.shards.values[part] = [_rank(tensor) - 1, int(tensor.shape[-1]) // self.world]
        if known is not None:
            made = self.proto.graph.value_info.add()
            made.CopyFrom(known)
            made.name = part
