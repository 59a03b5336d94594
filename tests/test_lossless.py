"""Nothing is lost: what no rule touched comes back byte for byte, and what is new says where it came from."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from conftest import nodes, parse
from google.protobuf.unknown_fields import UnknownFieldSet

import rewrite


def rich():
    """A model that uses every corner of the format, with one Swish in it."""
    text = """(float[batch, 8] x, float[batch, 8] z) => (float[batch, 8] y, float[batch, 8] other) {
        before = Exp(z)
        s = Sigmoid(x)
        m = Mul(x, s)
        y = Add(m, w)
        gone = Neg(before)
        other = Abs(gone)
    }"""
    model = parse(text, w=np.arange(8, dtype=np.float32), unread=np.ones(3, np.float32))
    model.producer_name, model.producer_version, model.domain, model.model_version, model.doc_string = "pytorch", "2.13", "com.acme", 7, "the model"
    model.metadata_props.add(key="author", value="someone")
    graph = model.graph
    graph.doc_string = "the graph"
    graph.metadata_props.add(key="graph", value="meta")
    for i, node in enumerate(graph.node):
        node.name, node.doc_string = f"n{i}", f"node {i}"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=f"['', 'layer.{i}']")
        node.device_configurations.add(configuration_id="two")
    graph.node[0].attribute.append(onnx.helper.make_attribute("made_up", [1.5, 2.5]))
    graph.node[0].attribute.append(onnx.helper.make_attribute("made_up_type", onnx.helper.make_tensor_type_proto(1, ["q", 3])))
    graph.input[0].doc_string = "the input"
    graph.input[0].type.denotation = "IMAGE"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.input[0].metadata_props.add(key="input", value="meta")
    for name in ("before", "s", "m", "w"):
        value = onnx.helper.make_tensor_value_info(name, 1, [8] if name == "w" else ["batch", 8], f"type of {name}")
        value.metadata_props.add(key="value", value=name)
        graph.value_info.append(value)
    graph.initializer[0].doc_string = "the weight"
    graph.initializer[0].metadata_props.add(key="weight", value="meta")
    values = onnx.helper.make_tensor("sparse", 1, [2], [1.0, 2.0])
    graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, onnx.helper.make_tensor("sparse_i", 7, [2], [1, 3]), [8]))
    annotation = graph.quantization_annotation.add(tensor_name="before")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unread")
    training = model.training_info.add()
    training.algorithm.CopyFrom(onnx.parser.parse_graph("step (float[8] g) => (float[8] new) { new = Sub(w, g) }"))
    training.update_binding.add(key="w", value="new")
    model.functions.append(onnx.helper.make_function("com.acme", "Spare", ["a"], ["b"], [onnx.helper.make_node("Neg", ["a"], ["b"])], [onnx.helper.make_opsetid("", 18)]))
    model.opset_import.append(onnx.helper.make_opsetid("com.acme", 3))
    model.configuration.add(name="two", num_devices=2)
    return model


@pytest.fixture(scope="module")
def pair():
    before = rich()
    return before, rewrite.optimize(before, verify=False).model.proto


def test_the_rule_applied(pair):
    assert nodes(pair[1]) == ["Exp", "rewrite.Swish", "Add", "Neg", "Abs"]


def test_untouched_nodes_are_equal_byte_for_byte(pair):
    before, after = ({n.name: n.SerializeToString(deterministic=True) for n in m.graph.node} for m in pair)
    for name in ("n0", "n3", "n4", "n5"):
        assert before[name] == after[name]


def test_all_else_of_the_model_is_equal(pair):
    before, after = (onnx.ModelProto.FromString(m.SerializeToString()) for m in pair)
    assert [f for f in after.functions if f.domain != "rewrite"] == list(before.functions)
    assert [o for o in after.opset_import if o.domain != "rewrite"] == list(before.opset_import)
    for model in (before, after):
        for field in ("graph", "functions", "opset_import"):
            model.ClearField(field)
    assert before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


def test_all_else_of_the_graph_is_equal(pair):
    before, after = (onnx.GraphProto.FromString(m.graph.SerializeToString()) for m in pair)
    lost = {v.name for v in before.value_info} - {v.name for v in after.value_info}
    assert lost == {"s"}
    assert [v for v in after.value_info if v.name in {v.name for v in before.value_info}] == [v for v in before.value_info if v.name != "s"]
    for graph in (before, after):
        for field in ("node", "value_info"):
            graph.ClearField(field)
    assert before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


def test_new_nodes_say_where_they_came_from(pair):
    (new,) = [n for n in pair[1].graph.node if n.domain == "rewrite"]
    assert {p.key: p.value for p in new.metadata_props} == {"rewrite.rule": "swish_sigmoid", "rewrite.from": "n2 n1"}
    assert new.output == ["m"]  # the value keeps its name


def test_twice_the_same_bytes():
    first, second = (rewrite.optimize(rich(), verify=False).model.proto.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_the_file_is_the_same_twice(tmp_path):
    for name in "ab":
        rewrite.optimize(rich(), verify=False).model.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_argument_is_not_changed():
    model = rich()
    before = model.SerializeToString(deterministic=True)
    rewrite.optimize(model, verify=False)
    assert model.SerializeToString(deterministic=True) == before


def test_without_a_match_all_bytes_are_the_same(tmp_path):
    model = rich()
    after = rewrite.optimize(model, only=["attention"], verify=False).model
    assert after.proto.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_a_replaced_weight_goes_and_the_order_of_the_others_stays():
    text = "(float[n, 4] x) => (float[n, 4] y) { a = Add(x, a1)\n d = Div(a, root)\n e = Erf(d)\n s = Add(e, one)\n h = Mul(a, s)\n g = Mul(h, half)\n y = Add(g, z1) }"
    vector = np.ones(4, np.float32)
    model = parse(text, 20, z1=vector, root=np.float32(2**0.5), a1=vector, one=np.float32(1), half=np.float32(0.5))
    after = rewrite.optimize(model).model.proto
    assert nodes(after) == ["Add", "Gelu", "Add"]
    assert [i.name for i in after.graph.initializer] == ["z1", "a1"]


def test_unfusing_gives_back_all_but_the_new_names():
    model = rich()
    plain = rewrite.unfuse(rewrite.optimize(model, verify=False).model.proto)
    assert sorted(nodes(plain)) == sorted(nodes(model))
    assert [i.SerializeToString() for i in plain.graph.initializer] == [i.SerializeToString() for i in model.graph.initializer]
    assert list(plain.metadata_props) == list(model.metadata_props)
    assert [f.name for f in plain.functions] == ["Spare"]


def test_graphs_inside_keep_what_is_theirs():
    model = parse("""(float[n, 8] x, bool c) => (float[n, 8] y) {
        y = If (c) < then_branch = one () => (float[n, 8] a) { s = Sigmoid(x)  m = Mul(x, s)  a = Neg(m) }, else_branch = two () => (float[n, 8] b) { b = Exp(x) } >
    }""")
    for attribute in model.graph.node[0].attribute:
        attribute.g.doc_string = f"branch {attribute.name}"
        attribute.g.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), f"unread_{attribute.name}"))
        for node in attribute.g.node:
            node.doc_string = "inside"
    before = {a.name: a.g for a in model.graph.node[0].attribute}
    after = {a.name: a.g for a in rewrite.optimize(model).model.proto.graph.node[0].attribute}
    assert after["else_branch"].node[0] == before["else_branch"].node[0]
    assert after["then_branch"].node[-1] == before["then_branch"].node[-1]
    for name in before:
        assert after[name].doc_string == before[name].doc_string
        assert list(after[name].initializer) == list(before[name].initializer)
        assert list(after[name].output) == list(before[name].output)


def test_fields_of_a_newer_onnx_are_kept():
    unknown = b"\xfa\x3f\x03abc"  # field 1023
    model = onnx.load_model_from_string(rich().SerializeToString() + unknown)
    graph = onnx.GraphProto.FromString(model.graph.SerializeToString() + unknown)
    model.graph.CopyFrom(graph)
    after = rewrite.optimize(model, verify=False).model.proto
    assert len(after.functions) > len(model.functions)
    assert len(UnknownFieldSet(after)) == len(UnknownFieldSet(after.graph)) == 1


def test_a_node_made_of_what_rules_made_names_nodes_of_the_model():
    """The Gelu between the two is in neither file."""
    text = "(float[n, 8] x) => (float[n, 8] y) { m = MatMul(x, w) d = Div(m, root) e = Erf(d) s = Add(e, one) h = Mul(m, half) y = Mul(h, s) }"
    before = parse(text, w=np.eye(8, dtype=np.float32), root=np.float32(2**0.5), one=np.float32(1), half=np.float32(0.5))
    (node,) = rewrite.optimize(before).model.proto.graph.node
    found = {p.key: p.value for p in node.metadata_props}
    assert found["rewrite.rule"] == "linear_activation"
    assert sorted(found["rewrite.from"].split()) == ["d", "e", "h", "m", "s", "y"]


def test_an_identity_that_a_rule_leaves_says_what_it_was():
    (node,) = rewrite.optimize(parse("(float[n] x) => (float[n] y) { y = Mul(x, one) }", one=np.float32(1))).model.proto.graph.node
    assert {p.key: p.value for p in node.metadata_props} == {"rewrite.rule": "factor_one", "rewrite.from": "y"}


@pytest.mark.parametrize("annotated", [False, True])
def test_a_constant_of_a_quantization_annotation_stays(annotated):
    """Though no node reads it any more."""
    before = parse("(float[n] x) => (float[n] y) { m = Mul(x, one) y = Neg(m) }", one=np.float32(1))
    if annotated:
        before.graph.quantization_annotation.add(tensor_name="x").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="one")
    after = rewrite.optimize(before).model.proto.graph
    assert [n.op_type for n in after.node] == ["Neg"]
    assert [i.name for i in after.initializer] == ["one"] * annotated
    assert list(after.quantization_annotation) == list(before.graph.quantization_annotation)
