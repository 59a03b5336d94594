"""Linear layers: bias, activation, gate and residual in every order; near misses stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import nodes, parse

import rewrite

K, N = 8, 6
RNG = np.random.default_rng(5)


def array(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


WEIGHTS = {
    "w": array(K, N), "wt": array(N, K), "v": array(K, N), "vt": array(N, K), "other": array(K, N + 1), "both": array(K, 2 * N), "botht": array(2 * N, K),
    "b": array(N), "c": array(N), "b2": array(2 * N), "b3": array(1, 1, N), "half": np.float32(0.5),
    "slope": np.float32(1.702), "square": np.float32(2), "sizes": np.array([N, N]), "uneven": np.array([N - 1, N + 1]),
    "zero": np.array([0]), "middle": np.array([N]), "far": np.array([2**40]), "last": np.array([-1]), "one": np.array([1]), "early": np.array([N - 1]),
}  # fmt: skip


def model(body, inputs="float[n, s, 8] x", output="float[n, s, 6] y", opset=20, **more):
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return parse(f"({inputs}) => ({output}) {{ {body} }}", opset, **{k: v for k, v in {**WEIGHTS, **more}.items() if k in words})


def plugin(body, **options):
    """The one node that a body becomes: its name, its inputs, its attributes."""
    after = rewrite.optimize(model(body, **options)).model.proto
    onnx.checker.check_model(after, full_check=True)
    assert len(after.graph.node) == 1, nodes(after)
    node = after.graph.node[0]
    return node.op_type, list(node.input), {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def unchanged_operators(body, **options):
    return nodes(rewrite.optimize(model(body, **options)).model.proto)


LINEAR = {
    "MatMul, bias": ("m = MatMul(x, w) s = Add(m, b)", "w", 0),
    "bias, MatMul": ("m = MatMul(x, w) s = Add(b, m)", "w", 0),
    "MatMul": ("s = MatMul(x, w)", "w", 0),
    "tied": ("t = Transpose<perm = [1, 0]>(wt) m = MatMul(x, t) s = Add(m, b)", "wt", 1),
    "tied, no bias": ("t = Transpose<perm = [1, 0]>(wt) s = MatMul(x, t)", "wt", 1),
    "Gemm": ("s = Gemm(x, w, b)", "w", 0),
    "Gemm, transposed": ("s = Gemm<transB = 1>(x, wt, b)", "wt", 1),
    "Gemm, no bias": ("s = Gemm<transB = 1>(x, wt)", "wt", 1),
}
ACTIVATIONS = {
    "none": "y = Identity(s)",
    "gelu": "y = Gelu(s)",
    "gelu_tanh": 'y = Gelu<approximate = "tanh">(s)',
    "relu": "y = Relu(s)",
    "tanh": "y = Tanh(s)",
    "sigmoid": "y = Sigmoid(s)",
    "swish": "z = Sigmoid(s) y = Mul(s, z)",
    "quick_gelu": "q = Mul(s, slope) z = Sigmoid(q) y = Mul(s, z)",
    "relu2": "r = Relu(s) y = Pow(r, square)",
}


def sizes(linear, residual=False):
    rank = "n, " if "Gemm" in linear else "n, s, "
    inputs = f"float[{rank}8] x" + (f", float[{rank}6] r" if residual else "")
    return {"inputs": inputs, "output": f"float[{rank}6] y"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("linear", LINEAR)
def test_linear_with_activation(linear, activation):
    body, weight, trans = LINEAR[linear]
    if activation == "none":
        body, tail = body.replace("s = ", "y = "), ""
    else:
        tail = ACTIVATIONS[activation]
    op, inputs, attributes = plugin(f"{body} {tail}", **sizes(linear))
    assert op == "MatMulAct"
    assert inputs == (["x", weight] if "no bias" in linear or linear == "MatMul" else ["x", weight, "b"])
    assert attributes.get("activation", b"none").decode() == activation
    assert attributes.get("trans_w", 0) == trans


@pytest.mark.parametrize("activation", ["none", "gelu", "relu", "swish"])
@pytest.mark.parametrize("linear", LINEAR)
def test_linear_with_residual(linear, activation):
    body, weight, _ = LINEAR[linear]
    tail = "a = Identity(s)" if activation == "none" else ACTIVATIONS[activation].replace("y = ", "a = ")
    op, inputs, attributes = plugin(f"{body} {tail} y = Add(r, a)", **sizes(linear, residual=True))
    assert op == "MatMulAct"
    assert inputs[:2] == ["x", weight]
    assert inputs[3] == "r"
    assert attributes.get("activation", b"none").decode() == activation


def test_residual_before_the_bias():
    assert plugin("m = MatMul(x, w) a = Add(m, r) y = Add(a, b)", **sizes("", residual=True))[1] == ["x", "w", "b", "r"]


def test_an_activation_after_the_residual_stays_outside():
    assert unchanged_operators("m = MatMul(x, w) s = Add(m, b) a = Add(s, r) y = Relu(a)", **sizes("", residual=True)) == ["rewrite.MatMulAct", "Relu"]


def test_a_residual_that_is_broadcast_stays_an_add():
    found = unchanged_operators("m = MatMul(x, w) y = Add(m, r)", inputs="float[n, s, 8] x, float[1, s, 6] r")
    assert found == ["rewrite.MatMulAct", "Add"]


def test_a_product_read_twice_is_computed_once():
    """The sum before the activation is an output too: the activation stays outside of the product."""
    found = unchanged_operators("m = MatMul(x, w) s = Add(m, b) y = Relu(s)", output="float[n, s, 6] y, float[n, s, 6] s")
    assert found == ["rewrite.MatMulAct", "Relu"]


NEAR = {
    "activations": ("y = MatMul(x, z)", {"inputs": "float[n, s, 8] x, float[n, 8, 6] z"}, ["MatMul"]),
    "two inputs of two dimensions": ("m = MatMul(x, z) y = Relu(m)", {"inputs": "float[n, 8] x, float[8, 6] z", "output": "float[n, 6] y"}, ["MatMul", "Relu"]),
    "alpha": ("y = Gemm<alpha = 0.5>(x, w, b)", {"inputs": "float[n, 8] x", "output": "float[n, 6] y"}, ["Gemm"]),
    "beta": ("y = Gemm<beta = 0.5>(x, w, b)", {"inputs": "float[n, 8] x", "output": "float[n, 6] y"}, ["Gemm"]),
    "transposed input": ("y = Gemm<transA = 1>(x, w, b)", {"inputs": "float[8, n] x", "output": "float[n, 6] y"}, ["Gemm"]),
    "integers": ("y = MatMul(x, wi)", {"inputs": "int32[n, s, 8] x", "output": "int32[n, s, 6] y", "wi": np.ones((K, N), np.int32)}, ["MatMul"]),
    "a weight for each head": ("y = MatMul(x, w3)", {"inputs": "float[n, s, 8] x", "w3": array(1, K, N)}, ["MatMul"]),
    "a bias of three dimensions": ("m = MatMul(x, w) y = Add(m, b3)", {}, ["rewrite.MatMulAct", "Add"]),
    "weight on the left": ("y = MatMul(q, x)", {"inputs": "float[n, 6, 8] x", "output": "float[n, 6, 8] y", "q": array(6, 6)}, ["MatMul"]),
    "leaky": ("m = MatMul(x, w) y = LeakyRelu(m)", {}, ["rewrite.MatMulAct", "LeakyRelu"]),
    "swish with another slope": ("m = MatMul(x, w) t = Mul(m, half) z = Sigmoid(t) y = Mul(m, z)", {}, ["rewrite.MatMulAct", "rewrite.Swish"]),
    "cubed relu": ("m = MatMul(x, w) r = Relu(m) y = Pow(r, cube)", {"cube": np.float32(3)}, ["rewrite.MatMulAct", "Pow"]),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(case):
    body, options, expected = NEAR[case]
    assert unchanged_operators(body, **options) == expected


# --- gates --------------------------------------------------------------------------------------------------------------
GATE_ACTIVATIONS = {"gelu": "a = Gelu(g)", "gelu_tanh": 'a = Gelu<approximate = "tanh">(g)', "swish": "z = Sigmoid(g) a = Mul(z, g)", "relu": "a = Relu(g)", "sigmoid": "a = Sigmoid(g)"}


@pytest.mark.parametrize("product", ["y = Mul(a, u)", "y = Mul(u, a)"])
@pytest.mark.parametrize("activation", GATE_ACTIVATIONS)
def test_gated(activation, product):
    op, inputs, attributes = plugin(f"g = MatMul(x, w) u = MatMul(x, v) {GATE_ACTIVATIONS[activation]} {product}")
    assert (op, inputs, attributes["activation"].decode()) == ("GatedMatMulAct", ["x", "w", "v"], activation)


def test_gated_with_biases_and_gemm():
    assert plugin("g0 = MatMul(x, w) g = Add(g0, b) u0 = MatMul(x, v) u = Add(c, u0) a = Gelu(g) y = Mul(a, u)")[1] == ["x", "w", "v", "b", "c"]
    op, inputs, attributes = plugin("g = Gemm<transB = 1>(x, wt, b) u = Gemm<transB = 1>(x, vt, c) a = Gelu(g) y = Mul(a, u)", **sizes("Gemm"))
    assert (op, inputs, attributes["trans_w"]) == ("GatedMatMulAct", ["x", "wt", "vt", "b", "c"], 1)


CUTS = {
    "split": "p, q = Split<axis = -1, num_outputs = 2>(m)",
    "split along axis 2": "p, q = Split<axis = 2, num_outputs = 2>(m)",
    "split by sizes": "p, q = Split<axis = -1>(m, sizes)",
    "slices": "p = Slice(m, zero, middle, last, one) q = Slice(m, middle, far, last, one)",
    "slices without steps": "p = Slice(m, zero, middle, last) q = Slice(m, middle, far, last)",
}


@pytest.mark.parametrize("order", ["gate_up", "up_gate"])
@pytest.mark.parametrize("cut", CUTS)
def test_merged_gate(cut, order):
    names = ("g", "u") if order == "gate_up" else ("u", "g")
    parts = f"{names[0]} = Identity(p) {names[1]} = Identity(q)"
    for product, inputs in (("m = MatMul(x, both)", ["x", "both"]), ("m0 = MatMul(x, both) m = Add(m0, b2)", ["x", "both", "", "b2"])):
        op, found, attributes = plugin(f"{product} {CUTS[cut]} {parts} z = Sigmoid(g) a = Mul(g, z) y = Mul(a, u)")
        assert (op, found, attributes["merged"].decode(), attributes["activation"]) == ("GatedMatMulAct", inputs, order, b"swish")


def test_merged_gate_of_gemm_cut_by_computed_bounds():
    """TorchScript's chunk: the bounds are computed from the shape of the product itself."""
    body = """m = Gemm<transB = 1>(x, botht, b2) sh = Shape(m) n0 = Gather(sh, last) k = Div(n0, two) e = Mul(k, two)
        g = Slice(m, zero, k, last) u = Slice(m, k, e, last) a = Gelu(g) y = Mul(a, u)"""
    op, inputs, attributes = plugin(body, two=np.array([2]), **sizes("Gemm"))
    assert (op, inputs, attributes["merged"], attributes["trans_w"]) == ("GatedMatMulAct", ["x", "botht", "", "b2"], b"gate_up", 1)


NEAR_GATES = {
    "different inputs": ("g = MatMul(x, w) x1 = Exp(x) u = MatMul(x1, v) a = Gelu(g) y = Mul(a, u)", {}),
    "one weight transposed": ("g = Gemm(x, w) u = Gemm<transB = 1>(x, vt) a = Gelu(g) y = Mul(a, u)", sizes("Gemm")),
    "tanh": ("g = MatMul(x, w) u = MatMul(x, v) a = Tanh(g) y = Mul(a, u)", {}),
    "sum": ("g = MatMul(x, w) u = MatMul(x, v) a = Softplus(g) y = Add(a, u)", {}),
    "product read elsewhere": ("g = MatMul(x, w) u = MatMul(x, v) a = Gelu(g) y = Mul(a, u)", {"output": "float[n, s, 6] y, float[n, s, 6] u"}),
    "parts overlap": ("m = MatMul(x, both) p = Slice(m, zero, middle, last) q = Slice(m, early, e2, last) a = Gelu(p) y = Mul(a, q)", {"e2": np.array([2 * N - 1])}),
    "cut along positions": ("m = MatMul(x, w) p, q = Split<axis = 0, num_outputs = 2>(m) a = Gelu(p) y = Mul(a, q)", {"inputs": "float[4, s, 8] x", "output": "float[2, s, 6] y"}),
    "the same half twice": ("m = MatMul(x, both) p, q = Split<axis = -1, num_outputs = 2>(m) a = Gelu(p) y = Mul(a, p)", {}),
}


@pytest.mark.parametrize("case", NEAR_GATES)
def test_gates_near_misses(case):
    body, options = NEAR_GATES[case]
    assert "rewrite.GatedMatMulAct" not in unchanged_operators(body, **options)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types(dtype):
    name = {np.float16: "float16", np.float64: "double"}[dtype]
    body = "m = MatMul(x, wd) s = Add(m, bd) y = Relu(s)"
    assert plugin(body, inputs=f"{name}[n, s, 8] x", output=f"{name}[n, s, 6] y", wd=array(K, N, dtype=dtype), bd=array(N, dtype=dtype))[0] == "MatMulAct"


@pytest.mark.parametrize("body", [
    "m = MatMul(x, w) s = Add(m, lone) y = Relu(s)", "m = MatMul(x, w) y = Add(m, lone)", "s = Gemm<transB = 1>(flat, wt, lone) y = Relu(s)", "m = MatMul(x, thin) s = Add(m, b) y = Relu(s)",
])  # fmt: skip
def test_a_bias_that_is_broadcast_stays_outside(body):
    """The plugin reads a number for each feature; NumPy, which its reference is in, would find it right all the same."""
    inputs, output = ("float[n, 8] flat", "float[n, 6] y") if "flat" in body else ("float[n, s, 8] x", "float[n, s, 6] y")
    result = rewrite.optimize(model(body, inputs, output, lone=array(1), thin=array(K, 1)))
    for node in result.model.proto.graph.node:
        assert node.domain != "rewrite" or len(node.input) == 2, node
    assert any("one for each feature of the weight" in m.reason for m in result.report.near_misses)
