"""All of ONNX, not the part that exporters use: each opset and IR version, quantized models, values that are also outputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import nodes, parse

import rewrite
from rewrite.errors import CheckFailed
from rewrite.model import load
from rewrite.validity import MIN_IR, MIN_OPSET
from rewrite.verify import check_models

RNG = np.random.default_rng(5)
BODY = """p = Mul(x, x) {mean} a = Add(m, eps) r = Sqrt(a) i = Div(x, r) n = Mul(i, g)
    h = MatMul(n, w) d = Div(h, root) e = Erf(d) f = Add(e, one) k = Mul(h, f) l = Mul(k, half) o = MatMul(l, v) y = Add(o, x)"""
WEIGHTS = {
    "eps": np.float32(1e-5), "root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5), "last": np.array([-1]),
    "g": RNG.random(8).astype(np.float32) + 0.5, "w": RNG.standard_normal((8, 16)).astype(np.float32), "v": RNG.standard_normal((16, 8)).astype(np.float32),
}  # fmt: skip


def block(opset=18, ir_version=10):
    """A norm, a product, a GELU, a product, a residual."""
    body = BODY.format(mean="m = ReduceMean<axes = [-1]>(p)" if opset < 18 else "m = ReduceMean(p, last)")
    graph = onnx.parser.parse_graph(f"g (float[b, s, 8] x) => (float[b, s, 8] y) {{ {body} }}")
    graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in WEIGHTS.items() if n != "last" or opset >= 18)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.mark.parametrize("opset", range(MIN_OPSET, onnx.defs.onnx_opset_version() + 1))
def test_each_opset(opset):
    """The model's opset stays, in the graph and in the bodies; an operator that it lacks is ours, with a body in it."""
    result = rewrite.optimize(block(opset))
    after, report = result.model.proto, result.report
    norm = "RMSNormalization" if opset >= 23 else "rewrite.RMSNormalization"
    assert [n.rsplit("_", 1)[0] for n in nodes(after)] == [norm, "rewrite.MatMulAct", "rewrite.MatMulAct"]
    assert (report.verified, report.rejected) == (True, [])
    assert report.model_error < 1e-6
    assert {o.domain: o.version for o in after.opset_import} == {"": opset, "rewrite": 1}
    assert {o.version for f in after.functions for o in f.opset_import if o.domain == ""} == {opset}
    onnx.checker.check_model(after, full_check=True)


@pytest.mark.parametrize("ir_version", range(MIN_IR, onnx.IR_VERSION + 1))
def test_each_ir_version(ir_version):
    """It stays unless functions need a later one, 8."""
    before = block(ir_version=ir_version)
    if ir_version == 3:  # where every initializer had to be an input
        before.graph.input.extend(onnx.helper.make_tensor_value_info(i.name, i.data_type, i.dims) for i in before.graph.initializer)
    result = rewrite.optimize(before)
    assert result.model.proto.ir_version == max(ir_version, 8)
    assert len(result.report.sites) == 4
    onnx.checker.check_model(result.model.proto, full_check=True)


def quantized():
    """Quantize and dequantize around two products with quantized weights, a SiLU between them."""

    def through(name, x):
        return f"{name}q = QuantizeLinear({x}, s, z) {name} = DequantizeLinear({name}q, s, z)"

    body = f"""{through("a", "x")} wd = DequantizeLinear(w, s, z) m0 = MatMul(a, wd) t = Add(m0, b) {through("c", "t")} g = Sigmoid(c) h = Mul(c, g)
        {through("d", "h")} vd = DequantizeLinear(v, s, z) m1 = MatMul(d, vd) r = Add(m1, x) {through("e", "r")} y = Mul(e, two)"""
    w, v = (RNG.integers(-100, 100, (8, 8)).astype(np.int8) for _ in range(2))
    return parse(f"(float[n, 8] x) => (float[n, 8] y) {{ {body} }}", 21, w=w, v=v, s=np.float32(0.02), z=np.int8(0), b=np.ones(8, np.float32), two=np.float32(2))


def test_a_quantized_model_passes_through():
    """What TensorRT reads the scales from is as it was, byte for byte: each pair, and the products beside them."""
    before = quantized()
    result = rewrite.optimize(before)
    after = result.model.proto
    assert [s.rule for s in result.report.sites] == ["swish_sigmoid"]
    assert result.report.model_error == 0.0
    kept = [n for n in before.graph.node if n.op_type not in ("Sigmoid", "Mul") or n.output[0] == "y"]
    assert [n for n in after.graph.node if n.domain != "rewrite"] == kept
    assert list(after.graph.initializer) == list(before.graph.initializer)
    swish = next(n for n in after.graph.node if n.domain == "rewrite")
    assert (list(swish.input), list(swish.output)) == (["c"], ["h"])


def test_a_dequantized_weight_is_none_that_a_product_takes():
    result = rewrite.optimize(quantized(), explain=True)
    reasons = [m.reason for m in result.report.near_misses if m.rule == "linear_bias" and m.fits]
    assert any("the weight 'wd' is computed from the inputs" in r or "DequantizeLinear" in r for r in reasons), reasons


@pytest.mark.parametrize(("inner", "left"), [("d", ["Div"]), ("e", ["Div", "Erf"]), ("k", ["Div", "Erf", "Add", "Mul"])])
def test_a_value_inside_a_match_that_is_an_output_is_computed_still(inner, left):
    """By the nodes that computed it: they cost little, so the GELU is fused beside them. Of a softmax it would not be."""
    before = block(20)
    before.graph.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, ["b", "s", 16]))
    result = rewrite.optimize(before)
    after = result.model.proto
    assert [o.name for o in after.graph.output] == ["y", inner]
    assert {"rms_norm", "gelu_erf", "linear_residual"} <= {s.rule for s in result.report.sites}
    assert sorted(n.op_type for n in after.graph.node if n.domain == "" and n.op_type != "Gelu") == sorted(left)
    assert result.report.model_error < 1e-6


def test_a_result_of_a_match_that_is_an_output_keeps_its_name():
    before = block(20)
    before.graph.output.append(onnx.helper.make_tensor_value_info("l", onnx.TensorProto.FLOAT, ["b", "s", 16]))
    after = rewrite.optimize(before).model.proto
    assert [n.rsplit("_", 1)[0] for n in nodes(after)] == ["rewrite.RMSNormalization", "rewrite.MatMulAct", "rewrite.MatMulAct"]
    assert [list(n.output) for n in after.graph.node] == [["n"], ["l"], ["y"]]


def test_inputs_and_outputs_keep_order_types_and_dimensions():
    text = """(float[batch, 8] x, float16[batch, time] h, float[?, 8] z) => (float[batch, 8] y, float16[batch, time] g, float[?, 8] w) {
        s = Sigmoid(x) y = Mul(x, s) t = Sigmoid(h) g = Mul(t, h) u = Sigmoid(z) w = Mul(z, u) }"""
    before = parse(text)
    result = rewrite.optimize(before)
    assert len(result.report.sites) == 3
    assert list(result.model.proto.graph.input) == list(before.graph.input)
    assert list(result.model.proto.graph.output) == list(before.graph.output)


def test_a_sparse_initializer_stays_as_it_is():
    """Read by a node that is kept, or by one that is fused."""
    for body in ("p = Add(x, sparse) s = Sigmoid(x) q = Mul(x, s) y = Add(p, q)", "m = MatMul(x, sparse) y = Relu(m)"):
        values = onnx.helper.make_tensor("sparse", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
        graph = onnx.parser.parse_graph(f"g (float[4, 4] x) => (float[4, 4] y) {{ {body} }}")
        graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, onnx.helper.make_tensor("", onnx.TensorProto.INT64, [3], [0, 5, 10]), [4, 4]))
        result = rewrite.optimize(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8))
        after = result.model.proto.graph
        assert len(result.report.sites) == 1
        assert result.report.model_error < 1e-6
        assert (list(after.sparse_initializer), list(after.initializer)) == (list(graph.sparse_initializer), [])


SILU = "g = Sigmoid(x) q = Mul(x, g)"


def test_a_model_with_an_input_that_is_no_tensor_is_rewritten_but_not_run():
    """No file of arrays holds a sequence, so none can be asked for."""
    model = parse(f"(seq(float[n, 4]) s, float[n, 4] x) => (float[n, 4] y) {{ {SILU} i = Constant<value_int = 0>() r = SequenceAt(s, i) y = Add(q, r) }}")
    report = rewrite.optimize(model).report
    assert (len(report.sites), report.verified, report.model_error) == (1, True, None)
    assert report.not_run == "input 's' is of type sequence, no tensor, and only tensors are generated"
    with pytest.raises(rewrite.RewriteError, match="input 's' is of type sequence, no tensor, and arrays are all that can be given; leave them out"):
        rewrite.optimize(model, inputs=[{"x": np.ones((2, 4), np.float32)}])


def test_strings_are_generated():
    """Numbers, because they may be read as such."""
    report = rewrite.optimize(parse(f"(string[n] s, float[n] x) => (float[n] y, string[n] t) {{ {SILU} t = Identity(s) f = Cast<to = 1>(s) y = Add(q, f) }}")).report
    assert (len(report.sites), report.not_run) == (1, "")
    assert report.model_error < 1e-6


@pytest.mark.parametrize(("output", "node"), [("seq(float[m, 4])", "SplitToSequence(q, two)"), ("optional(float[n, 4])", "Optional(q)"), ("seq(float[n, 4])", "SequenceEmpty()")])
def test_outputs_that_are_no_tensors_are_compared(output, node):
    """The pieces of a sequence may have several shapes."""
    model = parse(f"(float[n, 4] x) => (float[n, 4] q, {output} t) {{ {SILU} two = Constant<value_int = 2>() t = {node} }}")
    result = rewrite.optimize(model)
    assert len(result.report.sites) == 1
    assert result.report.model_error < 1e-6


def test_a_difference_in_a_sequence_is_found():
    one, other = (load(parse(f"(float[n, 4] x) => (seq(float[m, 4]) t) {{ q = {op}(x) two = Constant<value_int = 2>() t = SplitToSequence(q, two) }}")) for op in ("Neg", "Abs"))
    with pytest.raises(CheckFailed, match="output 't': output 0 differs"):
        check_models(one, other)
