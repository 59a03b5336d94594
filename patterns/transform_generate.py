"""A decoder without a cache -> a generator: causal attentions over a paged cache, tokens of many sequences packed, logits where they are wanted.

The graph that comes in has gone through the lift and fuse rules: each attention is a FusedAttention, each mask an
AttentionMask that says what it is. What goes out takes the tokens of one step (`rewrite.runtime.batch.Batch` by the same
names, tokens as input_ids, positions as position_ids) and the caches, and gives logits [R, vocabulary] and the new caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the names of its types
import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.functions import FunctionTable
from rewrite.graph import DOMAIN, Dim, Graph, decode, dtype_name
from rewrite.model import Model, base_name, names_in, open_graph
from rewrite.patterns.generate_logits import Ending, info, typed
from rewrite.patterns.token_axis import ROWS, TOKENS
from rewrite.plugins.paged_attention_onnx import body
from rewrite.shapes import SymbolicShapes
from rewrite.verify_generator import KEY

HIDES = -1e4  # a score so far below the others' has no weight
BLOCK = 16  # positions of a block
INTEGERS = {"slots": [TOKENS], "block_tables": ["sequences", "table"], "query_starts": ["starts"], "context_lengths": ["sequences"]}
Clean = Callable[[Model], Model]


@dataclass
class Roles:
    """The inputs of a decoder by what they are for; `mask` and `positions` may be missing."""

    tokens: onnx.ValueInfoProto
    mask: onnx.ValueInfoProto | None
    positions: onnx.ValueInfoProto | None


def to_generator(model: Model, clean: Clean, block_size: int = BLOCK) -> Model:
    """The generator that `model`, a decoder after the lift and fuse rules, becomes.

    `clean` applies lift rules: shapes that were computed are constant once the batch is 1. Raises RewriteError, naming
    the node and the reason, for a model in which an attention is not known to be causal or tokens mix elsewhere.
    """
    if any(p.key == KEY for p in model.proto.metadata_props):
        raise RewriteError(f"{model.name}: it is a generator already")
    made = _Transform(model, block_size)
    made.attentions()
    made.positions()
    made.drop_dead()
    cleaned = clean(made.model())
    roles = {"tokens": made.roles.tokens, "mask": made.roles.mask, "positions": made.roles.positions}
    inputs = {role: value.name if value is not None else "" for role, value in roles.items()}
    return Ending(cleaned, made.layers, block_size, inputs).run()


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]


def _dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    return found


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: decode(onnx.helper.get_attribute_value(a)) for a in node.attribute}


def find_roles(model: Model) -> Roles:
    """Which input holds tokens, padding and positions. Raises RewriteError if the inputs are not those of a cache-free decoder."""
    graph = model.proto.graph
    initial = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in initial]
    padding = {n.input[0] for n in graph.node if n.domain == DOMAIN and base_name(n) == "AttentionMask" and n.input[0]}
    for value in inputs:
        if _dtype(value).kind not in "iub" or len(_dims(value)) != 2:
            expected = "a decoder without a cache takes token ids, a padding mask and position ids, all [batch, sequence]"
            raise RewriteError(f"{model.name}: input '{value.name}' is {_dtype(value)} {_dims(value)}; {expected}. Export it so")
    masks = [i for i in inputs if i.name in padding or (i.name not in padding and "mask" in i.name.lower())]
    positions = [i for i in inputs if "position" in i.name.lower() and i not in masks]
    tokens = [i for i in inputs if i not in masks and i not in positions]
    if len(tokens) != 1 or len(masks) > 1 or len(positions) > 1:
        names = ", ".join(i.name for i in inputs)
        raise RewriteError(f"{model.name}: which of the inputs {names} are token ids, padding mask and position ids cannot be told; name them input_ids, attention_mask and position_ids")
    batch, sequence = _dims(tokens[0])
    if not isinstance(sequence, str) or not sequence:
        raise RewriteError(f"{model.name}: input '{tokens[0].name}' has a fixed sequence of {sequence}; export it with a dynamic one")
    if batch == sequence:
        raise RewriteError(f"{model.name}: batch and sequence of input '{tokens[0].name}' are both called '{batch}'; export with different names")
    return Roles(tokens[0], masks[0] if masks else None, positions[0] if positions else None)


class _Transform:
    """The graph while attentions, masks and positions are being replaced: a copy, and what is known of its values."""

    def __init__(self, model: Model, block_size: int):
        self.name, self.source, self.block_size = model.name, model, block_size
        self.roles = find_roles(model)
        if len(model.proto.graph.output) != 1:
            names = ", ".join(o.name for o in model.proto.graph.output)
            raise RewriteError(f"{model.name}: its outputs are {names}; a generator needs the logits alone. Export it without cache and hidden states")
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(model.proto)
        self.graph = self.proto.graph
        self.taken = names_in(self.proto)
        self.layers: list[dict[str, Any]] = []
        self._specialise(self.roles)
        opened = open_graph(Model(self.proto, model.folder, model.name, model.external))
        self.shapes = Graph(opened.graph, model.opset)
        SymbolicShapes(self.shapes).run()
        self.tensors = {t.name: t for n in opened.graph.nodes for t in (*n.inputs, *n.outputs)} | {t.name: t for t in opened.graph.inputs}
        self.opened = opened  # ids in `shapes` are those of its tensors

    # --- inputs --------------------------------------------------------------------------------------------------
    def fresh(self, stem: str) -> str:
        name, index = stem, 0
        while name in self.taken:
            index += 1
            name = f"{stem}_{index}"
        self.taken.add(name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return onnx.helper.make_node(op, inputs, [output], name=self.fresh(f"generator_{op}"), **attributes)

    def _specialise(self, roles: Roles) -> None:
        """One row of packed tokens: inputs input_ids and position_ids [1, tokens]; nothing is padding."""
        batch, sequence = _dims(roles.tokens)
        kept = [i for i in self.graph.input if i.name in {i.name for i in self.graph.initializer}]
        first: list[onnx.NodeProto] = []
        del self.graph.input[:]
        self.graph.input.append(info("input_ids", np.int64, [1, TOKENS]))
        self.graph.input.append(info("position_ids", np.int64, [1, TOKENS]))
        for value, name in ((roles.tokens, "input_ids"), (roles.positions, "position_ids")):
            if value is not None and (value.name != name or _dtype(value) != np.int64):
                self._free(name, value.name)
                first.append(self.node("Cast", [name], self._renamed(value.name), to=value.type.tensor_type.elem_type))
        if roles.mask is not None:
            shape = self.fresh("generator_shape")
            ones = onnx.numpy_helper.from_array(np.ones(1, _dtype(roles.mask)))
            first += [self.node("Shape", ["input_ids"], shape), self.node("ConstantOfShape", [shape], roles.mask.name, value=ones)]
        self.mask = roles.mask.name if roles.mask is not None else ""
        self.graph.input.extend(kept)
        old = list(self.graph.node)
        del self.graph.node[:]
        self.graph.node.extend([*first, *old])
        self._rename_dims({str(batch): 1, str(sequence): TOKENS})

    def _rename_dims(self, names: dict[str, Dim]) -> None:
        """Types of all values, with the sizes that they have now."""
        opened = open_graph(self.source)
        SymbolicShapes(Graph(opened.graph, self.source.opset)).run()
        initial = {i.name for i in self.graph.initializer} | {i.name for i in self.graph.input}
        made = onnx.GraphProto()
        for tensor in {t.name: t for n in opened.graph.nodes for t in n.outputs if t.name}.values():
            if tensor.name not in initial and tensor.name != self.graph.output[0].name:
                made.value_info.extend(typed(tensor, names))
        del self.graph.value_info[:]
        self.graph.value_info.extend(made.value_info)
        self.graph.output[0].type.tensor_type.ClearField("shape")

    def _free(self, name: str, owner: str) -> None:
        """Refuse a model in which another value has the name that the new input gets."""
        if name in self.taken and name != owner and name not in {i.name for i in self.source.proto.graph.input}:
            raise RewriteError(f"{self.name}: a value is called '{name}', which is to be an input's name; rename it when exporting")

    def _renamed(self, name: str) -> str:
        """A name for a value that had that of an input: readers read the new one."""
        if name not in ("input_ids", "position_ids"):
            return name
        new = self.fresh(f"{name}_cast")
        for node in self.graph.node:
            node.input[:] = [new if n == name else n for n in node.input]
        return new

    # --- attentions ----------------------------------------------------------------------------------------------
    def attentions(self) -> None:
        """Each FusedAttention becomes a PagedAttention with caches of its own. Raises RewriteError for one that is not causal."""
        table = FunctionTable(list(self.proto.functions))
        makers = {o: n for n in self.graph.node for o in n.output}
        found = [n for n in self.graph.node if n.domain == DOMAIN and base_name(n) == "FusedAttention"]
        if not found:
            raise RewriteError(f"{self.name}: it has no attention that the rules fuse, so it cannot become a generator; `rewrite explain` tells why")
        for name, dims in INTEGERS.items():
            self.graph.input.append(info(name, np.int32, dims))
        self.graph.input.append(info("logit_rows", np.int64, [ROWS]))
        results = {n.output[0] for n in found}
        known = onnx.GraphProto(value_info=[v for v in self.graph.value_info if v.name not in results])  # of these it may lack the tokens
        del self.graph.value_info[:]
        self.graph.value_info.extend(known.value_info)
        for index, node in enumerate(found):
            layer, attributes = self._layer(node, makers, index)
            self.layers.append(layer)
            function = body(attributes, layer["value_size"], layer["dtype"], self.source.opset)
            node.op_type = table.add(function)
            del node.attribute[:]
            node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in sorted(attributes.items()))
            node.input[:] = [*node.input[:3], layer["key_cache"], layer["value_cache"], *INTEGERS]
            node.output.extend([layer["keys"], layer["values"]])
            self.graph.value_info.append(info(node.output[0], layer["dtype"], [1, layer["heads"], TOKENS, layer["value_size"]]))
            for cache, new, size in (("key_cache", "keys", "size"), ("value_cache", "values", "value_size")):
                shape: list[Dim] = ["blocks", self.block_size, layer["kv_heads"], layer[size]]
                self.graph.input.append(info(layer[cache], layer["dtype"], shape))
                self.graph.output.append(info(layer[new], layer["dtype"], shape))
        kept = [f for f in self.proto.functions if f.domain != DOMAIN]
        del self.proto.functions[:]
        self.proto.functions.extend([*kept, *table.functions.values()])
        if self.proto.ir_version < 8:
            self.proto.ir_version = 8

    def _layer(self, node: onnx.NodeProto, makers: dict[str, onnx.NodeProto], index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the runtime and the plugin must know of one attention."""
        given = _attributes(node)
        where = f"{self.name}: FusedAttention '{node.name or node.output[0]}'"
        window = self._window(node, given, makers, where)
        shapes = [self.tensors[n].shape for n in node.input[:3]]
        q, k, v = (list(s) if s is not None else [] for s in shapes)
        if any(len(s) != 4 or not isinstance(s[1], int) or not isinstance(s[3], int) for s in (q, k, v)):  # that tokens lie along axis 2, `TokenAxes` tells
            raise RewriteError(f"{where}: q, k, v have shapes {q}, {k}, {v} for one row of tokens; expected [1, heads, tokens, size] with known heads and sizes")
        dtype = dtype_name(self.tensors[node.input[1]].dtype)
        layer = {
            "heads": q[1], "kv_heads": k[1], "size": q[3], "value_size": v[3], "window": window, "dtype": dtype,
            "key_cache": self.fresh(f"key_cache_{index}"), "value_cache": self.fresh(f"value_cache_{index}"), "keys": self.fresh(f"keys_{index}"), "values": self.fresh(f"values_{index}"),
        }  # fmt: skip
        attributes = {"heads": q[1], "kv_heads": k[1], "size": q[3], "scale": float(given.get("scale", 1.0))}
        if window:
            attributes["window"] = window
        if given.get("softcap"):
            attributes["softcap"] = float(given["softcap"])
        return layer, attributes

    def _window(self, node: onnx.NodeProto, given: dict[str, Any], makers: dict[str, onnx.NodeProto], where: str) -> int:
        """The window of a causal attention, 0 for none. Raises RewriteError if it is not known to be causal."""
        if len(node.input) < 4 or not node.input[3]:
            if not given.get("causal"):
                raise RewriteError(f"{where}: it has no mask, so every token sees all; only causal attention can use a cache")
            return 0
        maker = makers.get(node.input[3])
        if maker is None or maker.domain != DOMAIN or base_name(maker) != "AttentionMask":
            raise RewriteError(f"{where}: its mask '{node.input[3]}' is not known to be causal; `rewrite explain` tells why no AttentionMask was made of it")
        mask = _attributes(maker)
        what = f"its mask '{node.input[3]}'"
        if len(maker.input) > 2 and maker.input[2]:
            raise RewriteError(f"{where}: {what} counts cached keys ('{maker.input[2]}'); export the model without a cache")
        if not mask.get("causal") and not given.get("causal"):
            raise RewriteError(f"{where}: {what} is not causal; only causal attention can use a cache")
        if len(maker.input) and maker.input[0] and maker.input[0] != self.mask:
            raise RewriteError(f"{where}: {what} hides keys by '{maker.input[0]}', which is no input of the model; a cache keeps every key")
        inverted, dropped = int(mask.get("invert", 0)), int(given.get("drop", 0))
        boolean = mask.get("dtype", "bool") == "bool"
        fill = float(given.get("fill", 0.0)) if boolean else float(mask.get("fill", 0.0))
        if fill > HIDES or (boolean and inverted != dropped):
            raise RewriteError(f"{where}: {what} gives hidden keys the score {fill:.6g}, which may show; expected {HIDES:.0e} or less")
        return int(mask.get("window", 0))

    # --- positions -----------------------------------------------------------------------------------------------
    def positions(self) -> None:
        """Values that count the tokens of a sequence are computed from position_ids."""
        changed: list[onnx.NodeProto] = []
        for node in self.graph.node:
            made = {"Range": self._range, "CumSum": self._cumsum, "Slice": self._table}.get(node.op_type if node.domain in ("", "ai.onnx") else "")
            changed += (made(node) if made is not None else None) or [node]
        del self.graph.node[:]
        self.graph.node.extend(changed)

    def _constant(self, name: str) -> np.ndarray[Any, Any] | None:
        tensor = self.tensors.get(name)
        return None if tensor is None else self.shapes.constant(tensor)

    def _is_count(self, name: str) -> bool:
        """Whether a value is the number of tokens."""
        tensor = self.tensors.get(name)
        return tensor is not None and self.shapes.symbolic.get(id(tensor)) == [TOKENS]

    def _flat_positions(self) -> tuple[list[onnx.NodeProto], str]:
        flat, shape = self.fresh("positions"), self.fresh("positions_shape")
        constant = onnx.numpy_helper.from_array(np.array([-1], np.int64))
        return [self.node("Constant", [], shape, value=constant), self.node("Reshape", ["position_ids", shape], flat)], flat

    def _counted(self, positions: str, offset: int, output: str, dtype: Any) -> list[onnx.NodeProto]:
        """`output` = positions + offset, in another dtype."""
        element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        total, constant = self.fresh(f"{output}_sum"), self.fresh(f"{output}_offset")
        literal = onnx.numpy_helper.from_array(np.asarray(offset, np.int64))
        return [self.node("Constant", [], constant, value=literal), self.node("Add", [positions, constant], total), self.node("Cast", [total], output, to=element)]

    def _range(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """Range(start, start + tokens): the positions of one sequence."""
        start, step = self._constant(node.input[0]), self._constant(node.input[2])
        limit = self.shapes.symbolic.get(id(self.tensors[node.input[1]])) if node.input[1] in self.tensors else None
        if start is None or step is None or step.size != 1 or step.item() != 1 or start.dtype.kind not in "iu":
            return None
        if limit != [TOKENS] and limit != [f"{TOKENS} + {int(start.item())}"]:
            return None
        nodes, flat = self._flat_positions()
        return [*nodes, *self._counted(flat, int(start.item()), node.output[0], start.dtype)]

    def _cumsum(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """CumSum of the padding mask: where all are tokens, the position and one."""
        source, axis = node.input[0], self._constant(node.input[1])
        makers = {o: n for n in self.graph.node for o in n.output}
        while source in makers and makers[source].op_type in ("Cast", "Identity"):
            source = makers[source].input[0]
        dtype = self.tensors[node.input[0]].dtype
        given = _attributes(node)
        if source != self.mask or not source or axis is None or axis.item() not in (1, -1) or given.get("reverse") or given.get("exclusive"):
            return None
        return self._counted("position_ids", 1, node.output[0], dtype)

    def _table(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """The first rows of a table, as many as there are tokens: those of the positions."""
        tensor = self.tensors.get(node.input[0])
        if tensor is None or not self.shapes.is_weight(tensor) or len(node.input) < 4:
            return None
        start, axes = self._constant(node.input[1]), self._constant(node.input[3])
        step = self._constant(node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1)
        if start is None or axes is None or step is None or start.tolist() != [0] or axes.size != 1 or step.tolist() != [1] or not self._is_count(node.input[2]):
            return None
        nodes, flat = self._flat_positions()
        return [*nodes, self.node("Gather", [node.input[0], flat], node.output[0], axis=int(axes.item()))]

    # --- the end -------------------------------------------------------------------------------------------------
    def drop_dead(self) -> None:
        """Nodes whose results nothing reads, the masks' among them, and functions that none calls."""
        read = {o.name for o in self.graph.output}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self.graph.node):
            if any(o in read for o in node.output):
                kept.append(node)
                read.update(_reads(node))
        before = {n for node in self.source.proto.graph.node for n in _reads(node)}
        weights = [i for i in self.graph.initializer if i.name in read or i.name not in before]
        alive = onnx.GraphProto(node=kept[::-1], initializer=weights)
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(alive.node)
        self.graph.initializer.extend(alive.initializer)
        drop_functions(self.proto)

    def model(self) -> Model:
        return Model(self.proto, self.source.folder, self.name, dict(self.source.external))


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names a node reads, those of its inner graphs included (their own values do no harm)."""
    found = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            found |= {o.name for o in attribute.g.output}.union(*map(_reads, attribute.g.node))
    return found


def drop_functions(proto: onnx.ModelProto) -> None:
    """Take out functions of ours that nothing calls any more."""
    functions = {f.name: f for f in proto.functions if f.domain == DOMAIN}
    pending = [*proto.graph.node, *(n for f in proto.functions if f.domain != DOMAIN for n in f.node)]
    used: set[str] = set()
    while pending:
        node = pending.pop()
        pending += [n for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node]
        if node.domain == DOMAIN and node.op_type not in used:
            used.add(node.op_type)
            pending += functions[node.op_type].node
    kept = onnx.ModelProto(functions=[f for f in proto.functions if f.domain != DOMAIN or f.name in used])
    del proto.functions[:]
    proto.functions.extend(kept.functions)


def describe_generator(found: dict[str, Any]) -> str:
    """A generator in one line."""
    windows = sorted({layer["window"] for layer in found["layers"] if layer["window"]})
    count = sum(bool(layer["window"]) for layer in found["layers"])
    window = f" ({count} with a window of {', '.join(map(str, windows))})" if windows else ""
    return f"generator: {len(found['layers'])} layers{window} with paged caches in blocks of {found['block_size']}; vocabulary {found['vocabulary']}"

