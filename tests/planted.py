"""Instances of what each built-in rule looks for, as random graphs plant them; `tests/random_graphs.py` makes the noise around.

A plant is a function of a `Block`, the graph under construction; it draws its form and its sizes from `block.rng`. `wrong`
asks for a near miss instead, a number that chooses one: the same thing with a constant, an axis or a shape that makes the
rule wrong. Further near misses come from putting an operator on an edge inside a plant, which needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

Make = Callable[..., str]


class Block:
    """A graph under construction: nodes, inputs, weights; values are names, `shapes` tells their sizes.

    Named dimensions are those of the graph's inputs: `B`, `S`, `T`; their sizes stand in `sizes`.
    """

    def __init__(self, rng: np.random.Generator, opset: int):
        self.rng, self.opset = rng, opset
        self.sizes = {"B": int(rng.integers(1, 4)), "S": int(rng.integers(2, 7)), "T": int(rng.integers(2, 8))}
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, tuple[int, tuple[Any, ...]]] = {}
        self.weights: dict[str, np.ndarray] = {}
        self.pool: list[tuple[str, tuple[Any, ...]]] = []  # float values that anything may read, with their shapes
        self.prefix, self.count = "", 0

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{self.prefix}{stem}{self.count}"

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [self.name(op_type.lower()) for _ in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op_type, list(inputs), names, name=names[0] + "_node", **attributes))
        return names[0] if outputs == 1 else names

    def weight(self, array: Any) -> str:
        """A constant, as an initializer or a Constant node."""
        array = np.asarray(array)
        name = self.name("c")
        if array.size <= 8 and self.rng.random() < 0.4:
            self.nodes.append(onnx.helper.make_node("Constant", [], [name], name=f"{name}_node", value=onnx.numpy_helper.from_array(array)))
        else:
            self.weights[name] = array
        return name

    def scalar(self, value: float) -> str:
        return self.weight(np.full([] if self.rng.random() < 0.7 else [1], value, np.float32))

    def ints(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def matrix(self, *shape: int, amplify: float = 1.5) -> str:
        """Amplified weights: bugs hide where every score is nearly zero."""
        return self.weight((self.rng.standard_normal(shape) * amplify / np.sqrt(shape[0])).astype(np.float32))

    def vector(self, size: int) -> str:
        return self.weight((self.rng.random(size) + 0.5).astype(np.float32) * self.rng.choice([-1, 1], size).astype(np.float32))

    def value(self, *shape: Any) -> str:
        """A float value of this shape: one that is there, or a new input of the graph."""
        fitting = [n for n, s in self.pool if s == shape]
        if fitting and self.rng.random() < 0.6:
            return str(self.rng.choice(fitting))
        name = f"in{len(self.inputs)}"
        self.inputs[name] = (onnx.TensorProto.FLOAT, shape)
        if self.rng.random() < 0.3:
            self.pool.append((name, shape))
        return name

    def given(self, elem: int, *shape: Any) -> str:
        name = f"in{len(self.inputs)}"
        self.inputs[name] = (elem, shape)
        return name

    def either(self, op_type: str, a: str, b: str) -> str:
        """A commutative operator with its operands in either order."""
        return str(self.op(op_type, a, b) if self.rng.random() < 0.5 else self.op(op_type, b, a))

    def mul(self, a: str, b: str) -> str:
        return self.either("Mul", a, b)

    def add(self, a: str, b: str) -> str:
        return self.either("Add", a, b)

    def flip(self, chance: float = 0.5) -> bool:
        return bool(self.rng.random() < chance)

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def mean(self, x: str, axis: int = -1) -> str:
        if self.opset >= 18:
            return str(self.op("ReduceMean", x, self.ints(axis), keepdims=1))
        return str(self.op("ReduceMean", x, axes=[axis], keepdims=1))

    def split(self, x: str, length: int, first: int, rank: int) -> tuple[str, str]:
        """Two parts of the last axis."""
        kind = self.pick("split", "slice", "step")
        if kind == "split":
            if self.opset >= 18 and 2 * first == length and self.flip():
                return tuple(self.op("Split", x, outputs=2, axis=-1, num_outputs=2))
            return tuple(self.op("Split", x, self.ints(first, length - first), outputs=2, axis=self.pick(-1, rank - 1)))
        axis, end = self.ints(-1), self.pick(length, 2**63 - 1)
        step = (self.ints(1),) if kind == "step" else ()
        return str(self.op("Slice", x, self.ints(0), self.ints(first), axis, *step)), str(self.op("Slice", x, self.ints(first), self.ints(end), axis, *step))


def off(block: Block, value: float, wrong: int | None) -> float:
    """A constant of a rule, or, for a near miss, one that is near it."""
    if wrong is None:
        return value
    return value * (1 + (0.01, -0.01, 0.05, -0.05, 0.3, -0.3, 1.0, -2.0)[wrong % 8]) + (0.0 if value else 0.1)


# --- activations ----------------------------------------------------------------------------------------------------
def gelu_erf(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    place = None if wrong is None else wrong % 3
    root, one, half = (off(b, v, wrong // 3 if place == i else None) for i, v in enumerate((2**0.5, 1.0, 0.5)))
    inner = b.op("Div", x, b.scalar(root)) if b.flip() else b.mul(x, b.scalar(1 / root))
    s = b.add(b.op("Erf", inner), b.scalar(one))
    if b.flip():
        return b.mul(b.mul(x, b.scalar(half)), s)
    return b.mul(b.mul(x, s), b.scalar(half)) if b.flip() else b.mul(x, b.mul(s, b.scalar(half)))


def gelu_tanh(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    place = None if wrong is None else wrong % 4
    c, r, one, half = (off(b, v, wrong // 4 if place == i else None) for i, v in enumerate((0.044715, (2 / np.pi) ** 0.5, 1.0, 0.5)))
    cube = b.op("Pow", x, b.scalar(3.0)) if b.flip() else b.mul(b.mul(x, x), x)
    t = b.op("Tanh", b.mul(b.add(x, b.mul(cube, b.scalar(c))), b.scalar(r)))
    s = b.add(t, b.scalar(one))
    return b.mul(b.mul(x, b.scalar(half)), s) if b.flip() else b.mul(x, b.mul(s, b.scalar(half)))


def swish_sigmoid(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    if wrong is None:
        return b.mul(x, b.op("Sigmoid", x))
    if wrong % 2:
        return b.mul(b.op("Sin", x), b.op("Sigmoid", x))
    return b.mul(x, b.op(b.pick("HardSigmoid", "Tanh", "Softsign", "Softplus"), x))


def squared_relu(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    if wrong is None:
        y = b.op("Relu", x)
        return str(b.op("Mul", y, y))
    first = b.op("Relu", x)
    if wrong % 2:  # of two values
        return b.mul(first, b.op("Relu", b.op("Sin", x)))
    return b.mul(first, b.op(b.pick("Elu", "Softplus", "Softsign", "HardSigmoid", "LeakyRelu"), x))


# --- norms ----------------------------------------------------------------------------------------------------------
def _normed(b: Block, x: str, centred: str, axis: int = -1, power: float = 2.0) -> str:
    square = b.mul(centred, centred) if power == 2.0 and b.flip() else b.op("Pow", centred, b.scalar(power))
    total = b.add(b.mean(square, axis), b.scalar(b.pick(1e-6, 1e-5, 1e-3)))
    form = b.pick("reciprocal", "divide", "div", "pow")
    if form == "pow":
        return b.mul(centred, b.op("Pow", total, b.scalar(-0.5)))
    root = b.op("Sqrt", total)
    if form == "div":
        return str(b.op("Div", centred, root))
    return b.mul(centred, b.op("Reciprocal", root) if form == "reciprocal" else b.op("Div", b.scalar(1.0), root))


def _axis(b: Block, wrong: int | None) -> tuple[int, float]:
    """(axis, power): a mean along another axis, or of another power."""
    if wrong is None:
        return b.pick(-1, 2), 2.0
    return ((1, 2.0), (0, 2.0), (-2, 2.0), (-1, 4.0), (2, 6.0))[wrong % 5]


def rms_norm(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    axis, power = _axis(b, wrong)
    return b.mul(_normed(b, x, x, axis, power), b.vector(8))


def rms_norm_plain(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    axis, power = _axis(b, wrong)
    return _normed(b, x, x, axis, power)


def _layer(b: Block, wrong: int | None) -> str:
    x = b.value("B", "S", 8)
    axis, power = _axis(b, wrong)
    return _normed(b, x, b.op("Sub", x, b.mean(x, axis)), axis, power)


def layer_norm_plain(b: Block, wrong: int | None = None) -> str:
    return _layer(b, wrong)


def layer_norm_no_bias(b: Block, wrong: int | None = None) -> str:
    return b.mul(_layer(b, wrong), b.vector(8))


def layer_norm(b: Block, wrong: int | None = None) -> str:
    return b.add(b.mul(_layer(b, wrong), b.vector(8)), b.vector(8))


# --- products -------------------------------------------------------------------------------------------------------
def _product(b: Block, x: str, rows: int, columns: int, wrong: int | None, bias: bool, extra: bool = False) -> str:
    """x @ w (+ bias); near misses: a weight that is computed, a batch of weights, a bias of two dimensions."""
    if wrong is None:
        w = b.matrix(rows, columns)
        if b.flip(0.25):
            w = b.op("Transpose", b.matrix(columns, rows), perm=[1, 0])
    else:
        w = b.value(rows, columns) if wrong % 2 else b.weight((b.rng.standard_normal((1, rows, columns)) / 2).astype(np.float32))
    y = b.op("MatMul", x, w)
    return b.add(y, b.vector(columns)) if bias else y


ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "Gelu", "Swish")


def _activate(b: Block, x: str, among: tuple[str, ...] = ACTIVATIONS, wrong: int | None = None) -> str:
    if wrong is not None:
        kind = b.pick("Softsign", "HardSigmoid", "Softplus", "Elu", "Sin", "LeakyRelu")
        return str(b.op(kind, x))
    kind = b.pick(*among)
    if kind == "Swish":
        return b.mul(x, b.op("Sigmoid", x))
    if kind == "Gelu":
        if b.opset >= 20 and b.flip():
            return str(b.op("Gelu", x, approximate=b.pick("none", "tanh")))
        return b.mul(b.mul(x, b.scalar(0.5)), b.add(b.op("Erf", b.op("Div", x, b.scalar(2**0.5))), b.scalar(1.0)))
    return str(b.op(kind, x))


def _third(wrong: int | None, place: int, places: int = 3) -> int | None:
    """Where a near miss may be at several places: its number for this one, or None."""
    return None if wrong is None or wrong % places != place else wrong // places


def linear(b: Block, wrong: int | None = None) -> str:
    if wrong is None and b.flip(0.3):
        gemm = b.op("Gemm", b.value("S", 8), b.matrix(6, 8), b.vector(6), transB=1) if b.flip() else b.op("Gemm", b.value("S", 8), b.matrix(8, 6), b.vector(6))
        return str(gemm)
    if wrong is not None and wrong % 3 == 0:
        return str(b.op("Gemm", b.value("S", 8), b.matrix(8, 6), b.vector(6), alpha=0.5 + wrong) if wrong % 2 else b.op("Gemm", b.value(8, "S"), b.matrix(8, 6), b.vector(6), transA=1))
    return _product(b, b.value("B", "S", 8), 8, 6, wrong, False)


def linear_bias(b: Block, wrong: int | None = None) -> str:
    if wrong is not None and wrong % 3 == 0:  # a bias of its own for each position
        return b.add(b.op("MatMul", b.value("B", 3, 8), b.matrix(8, 6)), b.weight(b.rng.standard_normal((3, 6)).astype(np.float32)))
    return _product(b, b.value("B", "S", 8), 8, 6, wrong, True)


def linear_activation(b: Block, wrong: int | None = None) -> str:
    return _activate(b, _product(b, b.value("B", "S", 8), 8, 6, _third(wrong, 0, 2), b.flip()), wrong=_third(wrong, 1, 2))


def _residual(b: Block, wrong: int | None) -> str:
    return b.given(onnx.TensorProto.FLOAT, "B", "S", 6) if wrong is None else b.value("S", 6) if wrong % 2 else b.value("B", "S", 1)


def linear_activation_residual(b: Block, wrong: int | None = None) -> str:
    y = _activate(b, _product(b, b.value("B", "S", 8), 8, 6, _third(wrong, 0), b.flip()), wrong=_third(wrong, 1))
    return b.add(y, _residual(b, _third(wrong, 2)))


def linear_squared_relu(b: Block, wrong: int | None = None) -> str:
    y = _product(b, b.value("B", "S", 8), 8, 6, _third(wrong, 0), b.flip())
    positive = b.op(b.pick("Elu", "Softplus", "Softsign") if _third(wrong, 1) is not None else "Relu", y)
    power = _third(wrong, 2)
    return str(b.op("Mul", positive, positive) if power is None and b.flip() else b.op("Pow", positive, b.scalar(off(b, 2.0, power))))


def linear_bias_residual(b: Block, wrong: int | None = None) -> str:
    y = _product(b, b.value("B", "S", 8), 8, 6, _third(wrong, 0, 2), True)
    return b.add(y, _residual(b, _third(wrong, 1, 2)))


def linear_residual(b: Block, wrong: int | None = None) -> str:
    y = _product(b, b.value("B", "S", 8), 8, 6, _third(wrong, 0, 2), False)
    return b.add(y, _residual(b, _third(wrong, 1, 2)))


def gated_linear(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    bias = b.flip()
    if _third(wrong, 0) is not None:
        gate = _product(b, x, 8, 6, _third(wrong, 0), bias)
    else:  # both weights are stored the same way
        gate = b.op("MatMul", x, b.matrix(8, 6))
        gate = b.add(gate, b.vector(6)) if bias else gate
    up = b.op("MatMul", x if _third(wrong, 1) is None else b.op("Sin", x), b.matrix(8, 6))
    up = b.add(up, b.vector(6)) if bias else up
    return b.mul(_activate(b, gate, ("Relu", "Sigmoid", "Gelu", "Swish"), _third(wrong, 2)), up)


def merged_gated_linear(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    both = b.op("MatMul", x, b.matrix(8, 12) if wrong != 3 else b.value(8, 12))
    if b.flip():
        both = b.add(both, b.vector(12))
    if wrong is not None and wrong % 3 == 0:  # overlapping parts
        first, second = b.op("Slice", both, b.ints(0), b.ints(6), b.ints(-1)), b.op("Slice", both, b.ints(5), b.ints(11), b.ints(-1))
    else:
        first, second = b.split(both, 12, 6, 3)
    if b.flip():
        first, second = second, first
    if wrong is not None and wrong % 3 == 1:
        second = b.op("Sin", second)
    return b.mul(_activate(b, first, ("Relu", "Sigmoid", "Gelu", "Swish"), wrong if wrong is not None and wrong % 3 == 2 else None), second)


def flat_gemm(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    if wrong is not None and wrong % 2:
        rows = int(b.pick(4, 2))
        flat = b.op("Reshape", x, b.ints(-1, rows))
        return str(b.op("Reshape", b.op("Gemm", flat, b.matrix(rows, 6), b.vector(6)), b.ints(0, -1, 6) if b.flip() else b.ints(-1, 6)))
    flat = b.op("Reshape", x, b.ints(-1, 8))
    y = b.op("Gemm", flat, b.matrix(8, 6), b.vector(6), **({} if wrong is None else {"alpha": 0.5 + wrong}))
    shape = b.op("Concat", b.op("Shape", x, start=0, end=2), b.ints(6), axis=0)
    return str(b.op("Reshape", y, shape))


# --- rotary ---------------------------------------------------------------------------------------------------------
def _turns(b: Block, size: int, rank: int = 4) -> tuple[str, str]:
    shape = ("B", 1, "S", size)[4 - rank :]
    return b.value(*shape), b.given(onnx.TensorProto.FLOAT, *shape)


def rotary_halves(b: Block, wrong: int | None = None) -> str:
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8)
    cos, sin = _turns(b, 8)
    first, second = b.split(x, 8, 4 if wrong is None or wrong % 3 else int(b.pick(2, 3, 5, 6)), 4)
    if wrong is not None and wrong % 3 == 1:
        first, second = b.op("Neg", first), second
        turned = b.op("Concat", first, second, axis=-1)
    else:
        turned = b.op("Concat", b.op("Neg" if wrong is None or wrong % 3 == 0 else b.pick("Sin", "Abs", "Floor", "Tanh"), second), first, axis=b.pick(-1, 3))
    return b.add(b.mul(x, cos), b.mul(turned, sin))


def rotary_parts(b: Block, wrong: int | None = None) -> str:
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8)
    cos, sin = _turns(b, 4)
    first, second = b.split(x, 8, 4, 4)
    if wrong is not None and wrong % 2:
        first, second = second, first
    minus = "Add" if wrong is not None and wrong % 4 == 0 else "Sub"
    left = b.op(minus, b.mul(first, cos), b.mul(second, sin))
    right = b.op("Sub", b.mul(second, cos), b.mul(first, sin)) if wrong is not None and wrong % 4 == 2 else b.add(b.mul(second, cos), b.mul(first, sin))
    return str(b.op("Concat", left, right, axis=-1))


def _evens(b: Block, x: str, wrong: int | None) -> tuple[str, str]:
    if wrong is None and b.flip():
        pairs = b.op("Reshape", x, b.ints(0, 0, 0, 4, 2))
        axis = b.pick(-1, 4)
        return str(b.op("Gather", pairs, b.weight(np.array(0)), axis=axis)), str(b.op("Gather", pairs, b.weight(np.array(1)), axis=axis))
    axes, end, step = b.ints(-1), b.ints(2**63 - 1), b.ints(2)
    first, second = (0, 1) if wrong is None else (1, 0) if wrong % 2 else (0, 0)
    return str(b.op("Slice", x, b.ints(first), end, axes, step)), str(b.op("Slice", x, b.ints(second), end, axes, step))


def _woven(b: Block, even: str, odd: str) -> str:
    return str(b.op("Reshape", b.op("Concat", b.op("Unsqueeze", even, b.ints(-1)), b.op("Unsqueeze", odd, b.ints(-1)), axis=-1), b.ints(0, 0, 0, 8)))


def rotary_pairs(b: Block, wrong: int | None = None) -> str:
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8)
    cos, sin = _turns(b, 8)
    even, odd = _evens(b, x, wrong)
    return b.add(b.mul(x, cos), b.mul(_woven(b, b.op("Neg", odd), even), sin))


def rotary_pair_parts(b: Block, wrong: int | None = None) -> str:
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8)
    cos, sin = _turns(b, 4)
    even, odd = _evens(b, x, wrong)
    return _woven(b, b.op("Sub", b.mul(even, cos), b.mul(odd, sin)), b.add(b.mul(odd, cos), b.mul(even, sin)))


def rotary_partial(b: Block, wrong: int | None = None) -> str:
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 12)
    if wrong is None or wrong % 2:
        first, rest = b.split(x, 12, 8, 4)
    else:  # a part is used twice, or elements are left out
        first, rest = b.op("Slice", x, b.ints(0), b.ints(8), b.ints(-1)), b.op("Slice", x, b.ints(int(b.pick(4, 5, 6, 7, 9))), b.ints(12), b.ints(-1))
    cos, sin = _turns(b, 8)
    one, two = b.split(first, 8, 4, 4)
    turned = b.add(b.mul(first, cos), b.mul(b.op("Concat", b.op("Neg", two), one, axis=-1), sin))
    return str(b.op("Concat", *((rest, turned) if wrong is not None and wrong % 2 else (turned, rest)), axis=-1))


def native_rotary(b: Block, wrong: int | None = None) -> str:
    if wrong is None:
        x, n = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8), 4
        cos, sin = b.given(onnx.TensorProto.FLOAT, "B", "S", n), b.given(onnx.TensorProto.FLOAT, "B", "S", n)
        return str(b.op("RotaryEmbedding", x, cos, sin, interleaved=b.pick(0, 1)))
    if wrong % 2:  # heads folded into the last dimension
        x = b.given(onnx.TensorProto.FLOAT, "B", "S", 16)
        return str(b.op("RotaryEmbedding", x, *(b.given(onnx.TensorProto.FLOAT, "B", "S", 4) for _ in range(2)), num_heads=2))
    x, table = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8), b.weight(b.rng.standard_normal((16, 4)).astype(np.float32))
    return str(b.op("RotaryEmbedding", x, table, table, b.given(onnx.TensorProto.INT64, "B", "S")))


# --- heads ----------------------------------------------------------------------------------------------------------
def _shape_of(b: Block, x: str, *parts: Any) -> str:
    """A target shape computed as exporters do: an integer of `parts` is that axis of x, a tuple a constant."""
    made = [b.op("Unsqueeze", b.op("Gather", b.op("Shape", x), b.weight(np.array(p)), axis=0), b.ints(0)) if isinstance(p, int) else b.ints(*p) for p in parts]
    return str(b.op("Concat", *made, axis=0))


def static_reshape(b: Block, wrong: int | None = None) -> str:
    if wrong is None:
        x = b.value("B", "S", 8)
        return str(b.op("Reshape", x, _shape_of(b, x, 0, 1, (b.pick(2, 4),), (-1,))))
    x = b.value("B", "S", 8)
    if wrong % 2:  # constant already
        return str(b.op("Reshape", x, b.ints(0, 0, b.pick(2, 4, 8), -1)))
    return str(b.op("Reshape", x, _shape_of(b, x, 1, 0, (8,))))  # both sizes move


def factor_one(b: Block, wrong: int | None = None) -> str:
    x = b.value("B", "S", 8)
    if wrong is None:
        return b.mul(x, b.scalar(1.0))
    if wrong % 4 == 0:
        return b.mul(x, b.weight(np.ones((2, 1, 1, 1), np.float32)))  # broadcasts
    return b.mul(x, b.scalar(off(b, 1.0, wrong)))


def key_transpose(b: Block, wrong: int | None = None) -> str:
    k = b.value("B", 2, "T", 8)
    folded = b.op("Reshape", k, _shape_of(b, k, (-1,), 2, 3))
    turned = b.op("Transpose", folded, perm=[0, 2, 1] if wrong is None or wrong % 2 else b.pick([2, 1, 0], [1, 0, 2], [0, 1, 2], [1, 2, 0]))
    if wrong is not None and wrong % 2:
        return str(b.op("Reshape", turned, _shape_of(b, k, 0, *((3, 1, 2) if wrong % 4 == 1 else (1, 2, 3)))))
    if wrong is not None:
        return str(b.op("Reshape", turned, b.ints(-1, 2)))
    return str(b.op("Reshape", turned, _shape_of(b, k, 0, 1, 3, 2)))


def einsum_product(b: Block, wrong: int | None = None) -> str:
    """Scores or linear layers; near misses: other letters are summed, an outer product, a size that may be 1."""
    q, k = b.value("B", 2, "S", 8), b.value("B", 2, "T", 8)
    if wrong is None:
        form = b.pick("scores", "turned", "heads last", "linear")
        if form == "linear":
            return str(b.op("Einsum", b.value("B", "S", 8), b.matrix(8, 6), equation=b.pick("bsd,de->bse", "b s d, d e -> b s e", "bsd,de->ebs")))
        if form == "heads last":
            return str(b.op("Einsum", b.value("B", "S", 2, 8), b.value("B", "T", 2, 8), equation="bqhd,bkhd->bhqk"))
        return str(b.op("Einsum", q, k, equation="bhqd,bhkd->bhqk" if form == "scores" else "bhqd,bhkd->bkqh"))
    letters = b.rng.permutation(list("abcdefghij"))
    names = dict(zip("bhqkde", (str(c) for c in letters), strict=False))

    def spelled(equation: str) -> str:
        return "".join(names.get(c, c) for c in equation)

    equations = ("bhqd,bhkd->bhq", "bhqd,bhkd->bqk", "bhqd,bhkd->bhqkd", "bhqd,bhkd->hk", "bhqd,bhkd->b", "bhqd,bhkd->qkh", "bhqd,bhkd->dqk")
    if wrong % 3 == 0:
        return str(b.op("Einsum", q, k, equation=spelled(equations[(wrong // 3) % len(equations)])))
    if wrong % 3 == 1:
        return str(b.op("Einsum", q, b.matrix(2, 8, 6), equation=spelled(b.pick("bhqd,hde->bhqe", "bhqd,hde->bqe", "bhqd,hde->bqhe"))))
    return str(b.op("Einsum", b.value("B", "S", 8), b.value("S", 1, 4), equation=spelled("bqd,qke->bqdke")))


def merged_key_transpose(b: Block, wrong: int | None = None) -> str:
    q, k = b.value("B", 2, "S", 8), b.value("B", "T", 2, 8)
    turned = b.op("Transpose", k, perm=[0, 2, 3, 1])
    if wrong is None:
        return str(b.op("MatMul", q, b.mul(turned, b.scalar(0.5)) if b.flip() else turned))
    if wrong % 2:
        return str(b.op("MatMul", q, b.mul(turned, b.weight(b.rng.standard_normal((8, 1)).astype(np.float32)))))
    return str(b.op("MatMul", b.op("Transpose", b.value("B", 2, 8, "S"), perm=[0, 1, 3, 2]), b.op("Transpose", b.value("T", 2, 8, "B"), perm=[3, 1, 2, 0])))


def merged_folded_key_transpose(b: Block, wrong: int | None = None) -> str:
    if wrong is not None and wrong % 2:
        return str(b.op("MatMul", b.value("S", 8), b.op("Transpose", b.value("T", 4, 8), perm=[1, 2, 0])))
    if wrong is not None:
        return str(b.op("MatMul", b.value(4, "S", 8), b.op("Transpose", b.value("T", 8, 4), perm=[2, 1, 0])))
    return str(b.op("MatMul", b.value(4, "S", 8), b.op("Transpose", b.value("T", 4, 8), perm=[1, 2, 0])))


def unfolded_scores(b: Block, wrong: int | None = None) -> str:
    q, k = b.value("B", 2, "S", 8), b.value("B", 2, "T", 8)
    fq, fk = b.op("Reshape", q, _shape_of(b, q, (-1,), 2, 3)), b.op("Reshape", k, _shape_of(b, k, (-1,), 2, 3))
    y = b.op("MatMul", fq, b.op("Transpose", fk, perm=[0, 2, 1]))
    if wrong is not None:
        if wrong % 2:
            return str(b.op("Reshape", y, b.op("Concat", b.ints(2, -1), b.op("Shape", q, start=2, end=3), b.op("Shape", k, start=2, end=3), axis=0)))
        return str(b.op("Reshape", y, b.op("Concat", b.op("Shape", q, start=0, end=2), b.ints(-1), axis=0)))
    return str(b.op("Reshape", y, b.op("Concat", b.op("Shape", q, start=0, end=3), b.op("Shape", k, start=2, end=3), axis=0)))


def unfolded_weighting(b: Block, wrong: int | None = None) -> str:
    s, v = b.value("B", 2, "S", "T"), b.value("B", 2, "T", 8)
    w = b.op("Softmax", b.op("Reshape", s, _shape_of(b, s, (-1,), 2, 3)), axis=b.pick(-1, 2) if wrong is None or wrong % 2 else b.pick(1, 0))
    y = b.op("MatMul", w, b.op("Reshape", v, _shape_of(b, v, (-1,), 2, 3)))
    if wrong is not None and wrong % 2:
        return str(b.op("Reshape", y, b.op("Concat", b.ints(2, -1), b.op("Shape", s, start=2, end=3), b.ints(8), axis=0)))
    return str(b.op("Reshape", y, b.op("Concat", b.op("Shape", s, start=0, end=3), b.ints(8), axis=0)))


def unfolded_product(b: Block, wrong: int | None = None) -> str:
    x, y = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", "T"), b.given(onnx.TensorProto.FLOAT, "B", 2, "T", 8)
    product = b.op("MatMul", b.op("Reshape", x, _shape_of(b, x, (-1,), 2, 3)), b.op("Reshape", y, _shape_of(b, y, (-1,), 2, 3)))
    if wrong is None:
        return str(b.op("Reshape", product, b.op("Concat", b.op("Shape", x, start=0, end=3), b.ints(8), axis=0)))
    if wrong % 2:  # the heads come first
        return str(b.op("Reshape", product, b.op("Concat", b.ints(2, -1), b.op("Shape", x, start=2, end=3), b.ints(8), axis=0)))
    columns = int(b.pick(1, 2, 4))  # other parts of the rows, as if they were positions
    return str(b.op("Reshape", product, b.op("Concat", b.op("Shape", x, start=0, end=2), b.ints(-1, columns), axis=0)))


def static_repeat(b: Block, wrong: int | None = None) -> str:
    k = b.value("B", 2, "T", 8)
    lifted = b.op("Unsqueeze", k, b.ints(2 if wrong is None or wrong % 2 == 0 else 1))
    if wrong is not None and wrong % 2 == 0:
        return str(b.op("Reshape", b.op("Expand", lifted, b.ints(1, 1, 3, 1, 1)), b.ints(0, 6, -1, 8)))  # constant already
    grown = b.op("Expand", lifted, _shape_of(b, k, 0, (2,), (3,), 2, (8,)) if wrong is None else _shape_of(b, k, 0, (3,), (2,), 2, (8,)))
    return str(b.op("Reshape", grown, _shape_of(b, k, 0, (6,), 2, (8,))))


def repeat_before_transpose(b: Block, wrong: int | None = None) -> str:
    k = b.value("B", "T", 2, 8)
    lifted = b.op("Unsqueeze", k, b.ints(3 if wrong is None or wrong % 2 == 0 else 2))
    grown = b.op("Expand", lifted, b.ints(1, 1, 1, 3, 1) if wrong is None or wrong % 2 == 0 else b.ints(1, 1, 3, 1, 1))
    return str(b.op("Transpose", b.op("Reshape", grown, b.ints(0, 0, 6, 8)), perm=[0, 2, 1, 3] if wrong is None or wrong % 2 else b.pick([0, 2, 3, 1], [0, 1, 3, 2], [0, 3, 2, 1])))


# --- attention ------------------------------------------------------------------------------------------------------
LOW = float(np.finfo(np.float32).min)


def _scores(b: Block) -> tuple[str, str]:
    """(scores, v), scores [B, 2, S, T] scaled in one of several ways."""
    q, k, v = b.value("B", 2, "S", 8), b.value("B", 2, "T", 8), b.value("B", 2, "T", 8)
    scale, turned = b.scalar(float(b.pick(0.35355339, 1.0, 0.7))), b.op("Transpose", k, perm=[0, 1, 3, 2])
    form = b.pick("scores", "query", "both", "none")
    if form in ("query", "both"):
        q = b.mul(q, scale)
    if form == "both":
        turned = b.mul(turned, scale)
    s = b.op("MatMul", q, turned)
    return (b.mul(s, scale) if form == "scores" else s), v


def _masked(b: Block, s: str) -> str:
    kind = b.pick("none", "float", "bool", "not")
    if kind == "none":
        return s
    if kind == "float":
        return b.add(s, b.value("B", 1, "S", "T"))
    mask = b.given(onnx.TensorProto.BOOL, "B", 1, "S", "T")
    if kind == "not":
        return str(b.op("Where", b.op("Not", mask), b.scalar(LOW), s))
    return str(b.op("Where", mask, s, b.scalar(LOW)))


def attention(b: Block, wrong: int | None = None) -> str:
    s, v = _scores(b)
    if b.flip(0.2):
        s = b.mul(b.op("Tanh", b.mul(s, b.scalar(0.2))), b.scalar(5.0))
    s = _masked(b, s)
    if wrong is not None and wrong % 3 == 1:
        w = b.op(b.pick("LogSoftmax", "Hardmax", "Sigmoid"), s)
    else:
        w = b.op("Softmax", s, axis=b.pick(-1, 3) if wrong is None or wrong % 3 else b.pick(1, 2, 0))
    if wrong is None and b.flip(0.2):
        w = b.op("Where", b.op("IsNaN", w), b.scalar(0.0), w)
    if wrong is not None and wrong % 3 == 2:
        w = b.op("Where", b.op("IsNaN", w), b.scalar(1.0 + wrong), w)
    return str(b.op("MatMul", w, v))


def native_attention(b: Block, wrong: int | None = None) -> str:
    if wrong is None:
        q, k, v = b.value("B", 2, "S", 8), b.value("B", 2, "T", 8), b.value("B", 2, "T", 8)
        mask = b.pick((), (b.value("B", 2, "S", "T"),))
        return str(b.op("Attention", q, k, v, *mask, **b.pick({}, {"scale": 0.7}, {"softcap": 3.0})))
    q, k, v = b.value("B", "S", 16), b.value("B", "T", 16), b.value("B", "T", 16)
    return str(b.op("Attention", q, k, v, q_num_heads=2, kv_num_heads=2, scale=float(0.5 + wrong)))


def added_masks(b: Block, wrong: int | None = None) -> str:
    s, _ = _scores(b)
    one, two = b.value("B", 1, "S", "T"), b.value(1, 1, "S", "T")
    if wrong is not None and wrong % 2:
        return str(b.op("Softmax", b.op("Add", s, b.op("Add", one, two)), axis=-1))  # added to one another already
    if wrong is not None:
        return str(b.op("Softmax", b.add(b.add(b.op("Sin", b.value("B", 2, "S", "T")), one), two), axis=-1))  # no product
    return str(b.op("Softmax", b.op("Add", b.op("Add", s, one), two), axis=-1))


def chosen_and_added_masks(b: Block, wrong: int | None = None) -> str:
    s, _ = _scores(b)
    if wrong is not None and wrong % 2:
        s = b.op("Sin", b.value("B", 2, "S", "T"))  # a value may be a product of another plant
    keep = b.given(onnx.TensorProto.BOOL, "B", 1, "S", "T")
    low = b.scalar(LOW if wrong is None or wrong % 2 else float(b.pick(-1e9, -1e4, -100.0, -1.0, 0.0, 5.0)))
    chosen = b.op("Where", keep, s, low) if b.flip() else b.op("Where", keep, low, s)
    return str(b.op("Softmax", b.add(chosen, b.value(1, 1, "S", "T")), axis=-1))


def chosen_masks(b: Block, wrong: int | None = None) -> str:
    s, _ = _scores(b)
    if wrong is not None and wrong % 2:
        s = b.op("Sin", b.value("B", 2, "S", "T"))
    one, two = b.given(onnx.TensorProto.BOOL, "B", 1, 1, "T"), b.given(onnx.TensorProto.BOOL, 1, 1, "S", "T")
    low = b.pick(-1e4, LOW)
    other = low if wrong is None or wrong % 2 else low / 2
    if b.flip():
        return str(b.op("Softmax", b.op("Where", one, b.op("Where", two, s, b.scalar(other)), b.scalar(low)), axis=-1))
    return str(b.op("Softmax", b.op("Where", one, b.scalar(low), b.op("Where", two, b.scalar(other), s)), axis=-1))


def scaled_masks(b: Block, wrong: int | None = None) -> str:
    s = b.op("MatMul", b.value("B", 2, "S", 8), b.op("Transpose", b.value("B", 2, "T", 8), perm=[0, 1, 3, 2]))
    if wrong is not None and wrong % 2:
        s = b.op("Sin", b.value("B", 2, "S", "T"))  # no product
    one, factor = b.given(onnx.TensorProto.FLOAT, "B", 1, "S", "T"), b.scalar(float(b.pick(0.25, 0.7, 2.0)))
    if wrong is not None and wrong % 2 == 0:  # each column has a scale of its own
        factor = b.given(onnx.TensorProto.FLOAT, "B", 1, 1, "T")
    y = b.mul(b.add(s, one), factor)
    return str(b.op("Softmax", b.add(y, b.given(onnx.TensorProto.FLOAT, 1, 1, "S", "T")) if b.flip() else y, axis=b.pick(-1, 3)))


def chosen_bias(b: Block, wrong: int | None = None) -> str:
    s = b.op("MatMul", b.value("B", 2, "S", 8), b.op("Transpose", b.value("B", 2, "T", 8), perm=[0, 1, 3, 2]))
    if wrong is not None and wrong % 2:
        s = b.op("Sin", b.value("B", 2, "S", "T"))  # no product
    low = b.scalar(LOW if wrong is None or wrong % 2 else float(b.pick(-1e9, -1e4, -100.0, -1.0, 0.0, 5.0)))
    keep, biased = b.given(onnx.TensorProto.BOOL, "B", 1, "S", "T"), b.add(s, b.given(onnx.TensorProto.FLOAT, 1, 2, "S", "T"))
    return str(b.op("Softmax", b.op("Where", keep, biased, low) if b.flip() else b.op("Where", keep, low, biased), axis=b.pick(-1, 3)))


def nothing_hidden(b: Block, wrong: int | None = None) -> str:
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, 3, 4)
    keep = np.ones((1, 1, 3, 4), bool)
    shown = 0.0
    if wrong is not None and wrong % 3 == 0:
        keep.flat[b.rng.integers(12)] = False
    elif wrong is not None and wrong % 3 == 1:
        shown = off(b, 0.0, wrong // 3)
    elif wrong is not None:
        x = b.given(onnx.TensorProto.FLOAT, 2, 1, 4)  # the mask makes it larger
    return b.add(x, b.op("Where", b.weight(keep), b.scalar(shown), b.scalar(float(b.pick(LOW, -1e4)))))


def attention_mask(b: Block, wrong: int | None = None) -> str:
    """Causal, a window or padding, [B, 1, S, S]; near misses: every second key, a table of random cells, another distance."""
    x = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8)
    k, v = b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8), b.given(onnx.TensorProto.FLOAT, "B", 2, "S", 8)
    s = b.op("MatMul", x, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    size = b.op("Squeeze", b.op("Shape", x, start=2, end=3))
    steps = b.op("Range", b.weight(np.array(0)), size, b.weight(np.array(1)))
    i, j = b.op("Unsqueeze", steps, b.ints(1)), b.op("Unsqueeze", steps, b.ints(0))
    if wrong is None:
        keep = b.op("LessOrEqual", j, i)
        if b.flip():
            keep = b.op("And", keep, b.op("Less", b.op("Sub", i, j), b.weight(np.array(int(b.pick(2, 3, 5))))))
    elif wrong % 2:
        keep = b.op("Equal", b.op("Mod", b.op("Sub", i, j), b.weight(np.array(2 + wrong))), b.weight(np.array(0)))
    else:
        keep = b.op("LessOrEqual", b.op("Mul", j, b.weight(np.array(2 + wrong))), i)
    w = b.op("Softmax", b.op("Where", keep, s, b.scalar(LOW)), axis=-1)
    b.op("MatMul", w, v)
    return str(keep)  # the output of the block is the last node's; the mask is what the rule replaces


PLANTS: dict[str, Make] = {
    f.__name__: f for f in (
        gelu_erf, gelu_tanh, swish_sigmoid, rms_norm, rms_norm_plain, layer_norm_plain, layer_norm_no_bias, layer_norm, linear, linear_bias,
        linear_activation, linear_activation_residual, linear_bias_residual, linear_residual, gated_linear, merged_gated_linear, flat_gemm,
        einsum_product, rotary_halves, rotary_parts, rotary_pairs, rotary_pair_parts, rotary_partial, native_rotary, static_reshape, factor_one, key_transpose,
        merged_key_transpose, merged_folded_key_transpose, unfolded_scores, unfolded_weighting, static_repeat, repeat_before_transpose,
        attention, native_attention, added_masks, chosen_and_added_masks, chosen_masks, attention_mask,
        squared_relu, linear_squared_relu, unfolded_product, scaled_masks, chosen_bias, nothing_hidden,
    )
}  # fmt: skip
NEWEST = {"native_rotary", "native_attention"}  # from opset 23 on
