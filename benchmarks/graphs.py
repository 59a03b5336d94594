"""Transformer graphs of any size, node for node as PyTorch's dynamo exporter writes them at opset 18 (decomposed)."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper


class Writer:
    """Nodes and initializers of a graph in the making; a node is written as `w("Add", a, b)` and gives its output's name."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int) -> None:
        self.width, self.heads, self.groups, self.size, self.hidden = width, heads, groups, width // heads, hidden
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.rng = np.random.default_rng(0)

    def __call__(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"node_{name}", **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"weight_{len(self.initializers)}"
        self.initializers[name] = onnx.numpy_helper.from_array((self.rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[0]))), name)
        return name

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"constant_{value}".replace(" ", "")
        self.initializers.setdefault(name, onnx.numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(list(values), np.int64)


def model(layers: int, kind: str, width: int = 64, heads: int = 4, groups: int = 2, hidden: int = 128, writer: type[Writer] = Writer) -> onnx.ModelProto:
    """A model of `layers` layers, `kind` "llama" (60 nodes a layer) or "bert" (35), in float32.

    Inputs x [batch, seq, width], mask [batch, 1, seq, seq] (added), angles [batch, 1, seq, width / heads]; output y like x.
    """
    w = writer(width, heads, groups, hidden)
    x = "x"
    shared = {"cos": w("Cos", "angles"), "sin": w("Sin", "angles")}
    for _ in range(layers):
        x = _llama(w, x, shared) if kind == "llama" else _bert(w, x)
    w.nodes[-1].output[0] = "y"
    names = ["batch", "seq", width]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, names), helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1, "seq", "seq"]),
              helper.make_tensor_value_info("angles", TensorProto.FLOAT, ["batch", 1, "seq", w.size])]  # fmt: skip
    graph = helper.make_graph(w.nodes, kind, inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, names)], list(w.initializers.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def nodes_for(count: int, kind: str) -> int:
    """How many layers give about `count` nodes."""
    one, two = len(model(1, kind).graph.node), len(model(2, kind).graph.node)
    return max(1, round((count - one) / (two - one)) + 1)


def _linear(w: Writer, x: str, rows: int, columns: int, bias: bool) -> str:
    y = w("MatMul", x, w.weight(rows, columns))
    return w("Add", y, w.weight(columns)) if bias else y


def _heads(w: Writer, x: str, count: int) -> str:
    return w("Transpose", w("Reshape", x, w.ints(0, 0, count, w.size)), perm=[0, 2, 1, 3])


def _attend(w: Writer, q: str, k: str, v: str) -> str:
    scores = w("Mul", w("MatMul", q, w("Transpose", k, perm=[0, 1, 3, 2])), w.constant(0.25))
    weights = w("Softmax", w("Add", scores, "mask"), axis=-1)
    return w("Reshape", w("Transpose", w("MatMul", weights, v), perm=[0, 2, 1, 3]), w.ints(0, 0, -1))


def _rms_norm(w: Writer, x: str) -> str:
    mean = w("ReduceMean", w("Pow", x, w.constant(2.0)), w.ints(-1), keepdims=1)
    return w("Mul", w.weight(w.width), w("Mul", x, w("Reciprocal", w("Sqrt", w("Add", mean, w.constant(1e-6))))))


def _rotary(w: Writer, x: str, shared: dict[str, str]) -> str:
    half = w.size // 2
    left = w("Slice", x, w.ints(0), w.ints(half), w.ints(3), w.ints(1))
    right = w("Slice", x, w.ints(half), w.ints(2**63 - 1), w.ints(3), w.ints(1))
    turned = w("Concat", w("Neg", right), left, axis=-1)
    return w("Add", w("Mul", x, shared["cos"]), w("Mul", turned, shared["sin"]))


def _repeat(w: Writer, x: str) -> str:
    wide = w("Expand", w("Unsqueeze", x, w.ints(2)), w.ints(1, 1, w.heads // w.groups, 1, 1))
    return w("Reshape", wide, w.ints(0, w.heads, -1, w.size))


def _llama(w: Writer, x: str, shared: dict[str, str]) -> str:
    n = _rms_norm(w, x)
    q = _rotary(w, _heads(w, _linear(w, n, w.width, w.width, False), w.heads), shared)
    k = _rotary(w, _heads(w, _linear(w, n, w.width, w.groups * w.size, False), w.groups), shared)
    v = _heads(w, _linear(w, n, w.width, w.groups * w.size, False), w.groups)
    x = w("Add", x, _linear(w, _attend(w, q, _repeat(w, k), _repeat(w, v)), w.width, w.width, False))
    n = _rms_norm(w, x)
    gate = _linear(w, n, w.width, w.hidden, False)
    gated = w("Mul", w("Mul", gate, w("Sigmoid", gate)), _linear(w, n, w.width, w.hidden, False))
    return w("Add", x, _linear(w, gated, w.hidden, w.width, False))


def _bert(w: Writer, x: str) -> str:
    q, k, v = (_heads(w, _linear(w, x, w.width, w.width, True), w.heads) for _ in range(3))
    x = w("LayerNormalization", w("Add", _linear(w, _attend(w, q, k, v), w.width, w.width, True), x), w.weight(w.width), w.weight(w.width), axis=-1)
    h = _linear(w, x, w.width, w.hidden, True)
    erf = w("Add", w("Erf", w("Div", h, w.constant(1.4142135))), w.constant(1.0))
    h = w("Mul", h, w("Mul", w.constant(0.5), erf))
    return w("LayerNormalization", w("Add", _linear(w, h, w.hidden, w.width, True), x), w.weight(w.width), w.weight(w.width), axis=-1)


def half(model: onnx.ModelProto, kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """The same model in float16, or in bfloat16."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(kind)), tensor.name))
    for value in (*made.graph.input, *made.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    return made
