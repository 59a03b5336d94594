"""Bad input: exit code 2, one line that says what, where and how; nothing written, what was there intact."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import nodes, parse

import rewrite
from rewrite.cli import main

SWISH = "(float[n, 8] x) => (float[n, 8] y) { s = Sigmoid(x)\n y = Mul(x, s) }"
PLAIN = "(float[n, 8] x) => (float[n, 8] y) { y = Neg(x) }"


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


LONG = "a" * 300  # characters: no file has such a name


def refused(done, *parts):
    """The command ended with exit code 2 and one line on standard error that has all `parts`."""
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("rewrite: ")
    for part in parts:
        assert str(part) in lines[0], lines[0]
    assert "Traceback" not in done.output


def save(model, path):
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def model(tmp_path):
    return save(parse(SWISH), tmp_path / "m.onnx")


# --- files that are no model ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [["optimize"], ["explain"], ["unfuse"], ["verify"]])
@pytest.mark.parametrize(("content", "reason"), [
    (b"", "empty"), (b"hello, I am no model", "not an ONNX model"), (b"\x08\x0a" * 7, "no graph"), (b"\x00" * 1000, "not an ONNX model"),
    (b"PK\x03\x04" + bytes(100), "not an ONNX model"),
])  # fmt: skip
def test_not_a_model(tmp_path, command, content, reason):
    path, out = tmp_path / "bad.onnx", tmp_path / "out.onnx"
    path.write_bytes(content)
    extra = {"optimize": ["-o", out], "unfuse": ["-o", out], "verify": [path], "explain": []}[command[0]]
    refused(run(*command, path, *extra), path, reason)
    assert not out.exists()
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.load(path)


def test_truncated_anywhere(model, tmp_path):
    data, path = model.read_bytes(), tmp_path / "cut.onnx"
    accepted = []
    for length in range(1, len(data) - 1):
        path.write_bytes(data[:length])
        done = run("optimize", path)
        if done.exit_code == 0:
            accepted.append(length)  # a protobuf without its last fields is a protobuf
            onnx.checker.check_model(onnx.load(path))
        else:
            refused(done, path)
    assert len(accepted) < 3


def test_bytes_flipped_anywhere_never_end_in_a_traceback(tmp_path, rng):
    weights = rng.standard_normal((8, 8)).astype(np.float32)
    data = bytearray(parse("(float[n, 8] x) => (float[n, 8] y) { m = MatMul(x, w)\n y = Relu(m) }", w=weights).SerializeToString())
    path = tmp_path / "flipped.onnx"
    for _ in range(80):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 2):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(broken)
        done = run("optimize", path, "--no-verify")
        assert done.exit_code in (0, 2), (bytes(broken), done.exception)
        if done.exit_code == 2:
            refused(done)


@pytest.mark.parametrize(("path", "reason"), [
    ("/nowhere/m.onnx", "no such file"), ("/tmp", "a directory"), ("/dev/null", "no regular file"), ("/proc/self/mem", "cannot be read"), (LONG, "no such file"),
])  # fmt: skip
def test_not_a_readable_file(path, reason):
    refused(run("optimize", path), path, reason)


def test_no_permission_to_read(model, monkeypatch):
    def denied(self, *_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(run("optimize", model), model, "cannot be read: Permission denied")


@pytest.mark.parametrize("source", [None, 3, b"bytes", ["m.onnx"]])
def test_what_is_no_path_is_refused_by_the_api(source):
    with pytest.raises(rewrite.RewriteError, match="give a path"):
        rewrite.load(source)


# --- external data --------------------------------------------------------------------------------------------------
def external(tmp_path, location="w.bin", data=True, **fields):
    """A model of which a weight of 64 x 128 floats lies in `location`."""
    weights = np.arange(64 * 128, dtype=np.float32).reshape(64, 128) / 8192
    built = parse("(float[n, 64] x) => (float[n, 128] y) { m = MatMul(x, w)\n y = Relu(m) }", w=weights)
    tensor = built.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=str(value))
    if data:
        (tmp_path / "w.bin").write_bytes(weights.tobytes())
    return save(built, tmp_path / "m.onnx")


def test_external_data_is_found_and_copied_with_the_model(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = external(tmp_path / "a", length=32768)
    assert run("optimize", path, "-o", tmp_path / "b" / "m.onnx").exit_code == 0
    assert (tmp_path / "b" / "w.bin").read_bytes() == (tmp_path / "a" / "w.bin").read_bytes()
    assert run("verify", path, tmp_path / "b" / "m.onnx").exit_code == 0


def test_weights_of_another_model_are_not_overwritten(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    path = external(tmp_path / "a", length=32768)
    (tmp_path / "b" / "w.bin").write_bytes(b"precious")
    assert run("optimize", path, "-o", tmp_path / "b" / "m.onnx").exit_code == 0
    assert (tmp_path / "b" / "w.bin").read_bytes() == b"precious"
    assert run("verify", path, tmp_path / "b" / "m.onnx").exit_code == 0
    before = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert run("optimize", path, "-o", tmp_path / "b" / "m.onnx").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == before


def test_missing_external_data(tmp_path):
    refused(run("optimize", external(tmp_path, data=False)), "tensor 'w'", "missing", "w.bin")


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/../../w.bin", "", ".."])
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "in").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(32768))
    refused(run("optimize", external(tmp_path / "in", location=location)), "tensor 'w'", "outside the model's folder")


def test_external_data_through_links(tmp_path):
    (tmp_path / "in").mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(32768))
    path = external(tmp_path / "in", data=False)
    (tmp_path / "in" / "w.bin").symlink_to(secret)
    refused(run("optimize", path), "symbolic link")
    (tmp_path / "in" / "w.bin").unlink()
    os.link(secret, tmp_path / "in" / "w.bin")
    refused(run("optimize", path), "hard link")
    (tmp_path / "in" / "folder").symlink_to(tmp_path)
    refused(run("optimize", external(tmp_path / "in", location="folder/secret", data=False)), "symbolic link")


@pytest.mark.parametrize(("fields", "reason"), [
    ({"offset": 1}, "passes the end"), ({"offset": 40000, "length": 32768}, "passes the end"), ({"length": 40000}, "passes the end"),
    ({"offset": -1, "length": 32768}, "got -1"), ({"length": -5}, "got -5"), ({"offset": "many"}, "broken"), ({"length": 16}, "needs 32768 bytes"),
])  # fmt: skip
def test_external_data_of_another_size(tmp_path, fields, reason):
    refused(run("optimize", external(tmp_path, **fields)), "tensor 'w'", reason)


def test_a_protobuf_with_external_data_leads_nowhere(tmp_path):
    with pytest.raises(rewrite.RewriteError, match="tensor 'w' lies in an external file"):
        rewrite.load(onnx.load(external(tmp_path), load_external_data=False))


# --- graphs that cannot be right ------------------------------------------------------------------------------------
def node(op, inputs, outputs, name="", **attributes):
    return onnx.helper.make_node(op, inputs, outputs, name, **attributes)


def graph_of(made, inputs=("x",), outputs=("y",), **kwargs):
    def values(names):
        return [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in names]

    return onnx.helper.make_graph(made, "g", values(inputs), values(outputs), **kwargs)


def broken(made, inputs=("x",), outputs=("y",), opset=18, ir_version=10, **kwargs):
    return onnx.helper.make_model(graph_of(made, inputs, outputs, **kwargs), opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)


def branch(*made, output="o"):
    return onnx.helper.make_graph(list(made), "branch", [], [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [4])])


WEIGHT = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
CASES = {
    "cycle": (broken([node("Add", ["x", "b"], ["a"], "one"), node("Neg", ["a"], ["b"], "two"), node("Neg", ["a"], ["y"])]), "a cycle, through the values"),
    "self": (broken([node("Add", ["x", "y"], ["y"], "one")]), "a cycle"),
    "order": (broken([node("Neg", ["a"], ["y"], "late"), node("Neg", ["x"], ["a"], "early")]), "out of order"),
    "twice": (broken([node("Neg", ["x"], ["y"], "one"), node("Abs", ["x"], ["y"], "two")]), "computed twice, by Neg 'one' and by Abs 'two'"),
    "input": (broken([node("Neg", ["x"], ["x"], "one"), node("Abs", ["x"], ["y"])]), "computed twice"),
    "initializer": (broken([node("Neg", ["x"], ["w"], "one"), node("Abs", ["w"], ["y"])], initializer=[WEIGHT]), "computed twice"),
    "two inputs": (broken([node("Neg", ["x"], ["y"])], inputs=("x", "x")), "input 'x' occurs twice"),
    "two initializers": (broken([node("Add", ["x", "w"], ["y"])], initializer=[WEIGHT, WEIGHT]), "initializer 'w' occurs twice"),
    "nothing": (broken([node("Add", ["x", "ghost"], ["y"], "sum")]), "'ghost' is read by Add 'sum', but nothing computes it"),
    "output": (broken([node("Neg", ["x"], ["a"])]), "output 'y' of graph 'g' is never computed"),
    "branch": (
        broken([node("Greater", ["x", "x"], ["c"]), node("If", ["c"], ["y"], then_branch=branch(node("Neg", ["ghost"], ["o"], "in")), else_branch=branch(node("Neg", ["x"], ["o"])))]),
        "'ghost' is read by Neg 'in'",
    ),
    "branch order": (
        broken([node("If", ["b"], ["y"], then_branch=branch(node("Neg", ["late"], ["o"], "in")), else_branch=branch(node("Neg", ["x"], ["o"]))), node("Neg", ["x"], ["late"])], inputs=("x", "b")),
        "'late' is read by Neg 'in'",
    ),
    "opset 12": (broken([node("Neg", ["x"], ["y"])], opset=12), "opset 12 is not supported (13 to"),
    "opset 99": (broken([node("Neg", ["x"], ["y"])], opset=99), "opset 99 is not supported"),
    "ir": (broken([node("Neg", ["x"], ["y"])], ir_version=99), "IR version 99"),
    "no opset": (onnx.helper.make_model(graph_of([node("Neg", ["x"], ["y"])]), opset_imports=[onnx.helper.make_opsetid("com.acme", 1)], ir_version=10), "imports no ONNX operator set"),
    "function": (broken([onnx.helper.make_node("MatMulAct", ["x"], ["y"], "call", domain="rewrite")]), "which the model lacks"),
    "short tensor": (broken([node("Add", ["x", "w"], ["y"])], initializer=[onnx.TensorProto(name="w", dims=[4], data_type=1, raw_data=bytes(12))]), "12 bytes of data instead of 16"),
    "negative": (broken([node("Add", ["x", "w"], ["y"])], initializer=[onnx.TensorProto(name="w", dims=[-4], data_type=1, raw_data=bytes(16))]), "shape [-4]"),
    "few elements": (broken([node("Add", ["x", "w"], ["y"])], initializer=[onnx.TensorProto(name="w", dims=[4], data_type=1, float_data=[1, 2, 3])]), "has 3 elements instead of 4"),
    "no data": (broken([node("Add", ["x", "w"], ["y"])], initializer=[onnx.TensorProto(name="w", dims=[4], data_type=1)]), "has 0 elements instead of 4"),
    "type": (broken([node("Add", ["x", "w"], ["y"])], initializer=[onnx.TensorProto(name="w", dims=[4], data_type=99)]), "is of type 99"),
    "node names": (broken([node("Neg", ["x"], ["a"], "same"), node("Abs", ["a"], ["y"], "same")]), "nodes (Neg and Abs) share the name 'same'"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_cannot_be_right(tmp_path, case):
    built, reason = CASES[case]
    path, out = save(built, tmp_path / "m.onnx"), tmp_path / "out.onnx"
    refused(run("optimize", path, "-o", out), "m.onnx", reason)
    assert not out.exists()
    with pytest.raises(rewrite.RewriteError, match=re.escape(reason)):
        rewrite.load(built)


def test_types_that_do_not_go_together(tmp_path):
    made = [node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["a"]), node("Add", ["a", "w"], ["y"])]
    path = save(broken(made, initializer=[onnx.numpy_helper.from_array(np.ones(4, np.int64), "w")]), tmp_path / "m.onnx")
    refused(run("optimize", path, "-o", tmp_path / "o.onnx"), "m.onnx", "Type Error")
    assert not (tmp_path / "o.onnx").exists()


def test_text_that_is_not_utf8(model):
    model.write_bytes(model.read_bytes().replace(b"Sigmoid", b"Sig\xff\xfeid"))
    refused(run("optimize", model), "UTF-8")


def test_a_name_that_is_not_utf8(tmp_path):
    path = save(broken([node("Neg", ["x"], ["y"], "strange")]), tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"strange", b"str\xffnge"))
    done = run("optimize", path)
    assert done.exit_code in (0, 2)
    if done.exit_code:
        refused(done, "UTF-8")


# --- strange, but right ---------------------------------------------------------------------------------------------
def test_unknown_operators_are_kept_and_named(tmp_path):
    made = [onnx.helper.make_node("Foo", ["x"], ["f"], "strange", domain="com.acme"), node("Sigmoid", ["f"], ["s"]), node("Mul", ["f", "s"], ["y"])]
    built = broken(made)
    built.opset_import.append(onnx.helper.make_opsetid("com.acme", 3))
    built.graph.value_info.append(onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [4]))
    out = tmp_path / "out.onnx"
    done = run("optimize", save(built, tmp_path / "m.onnx"), "-o", out)
    assert done.exit_code == 0, done.output
    assert "com.acme::Foo 'strange'" in done.stdout
    assert "the whole model was not run" in done.stdout
    assert nodes(onnx.load(out)) == ["com.acme.Foo", "rewrite.Swish"]
    assert onnx.load(out).graph.node[0] == built.graph.node[0]
    assert json.loads(run("optimize", tmp_path / "m.onnx", "--json").stdout)["unknown"] == {"com.acme::Foo": ["strange"]}


def test_no_match_is_said_and_nothing_changes(tmp_path):
    path, out = save(parse(PLAIN), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    done = run("optimize", path, "-o", out)
    assert done.exit_code == 0
    assert "No rule matched; the model is unchanged." in done.stdout
    assert onnx.load(out) == onnx.load(path)


def test_no_match_tells_the_near_miss(tmp_path, rng):
    weights = rng.standard_normal((8, 8)).astype(np.float32)
    built = parse("(float[n, 8] x) => (float[n, 8] y, float[n, 8] m) { m = MatMul(x, w)\n y = Relu(m) }", w=weights)
    done = run("optimize", save(built, tmp_path / "m.onnx"), "--only", "attention")
    assert done.exit_code == 0
    assert "No rule matched" in done.stdout
    assert "Relu 'y'" in done.stdout


def test_an_initializer_that_is_an_input_may_be_replaced_by_the_caller():
    text = "(float[4] x) => (float[4] y) { a = Div(x, c)\n e = Erf(a)\n s = Add(e, one)\n h = Mul(x, s)\n y = Mul(h, half) }"
    constants = {"c": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    assert nodes(rewrite.optimize(parse(text, 20, **constants)).model.proto) == ["Gelu"]
    built = parse(text, 20, **constants)
    built.graph.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, []))
    assert nodes(rewrite.optimize(built).model.proto) == nodes(built)
    built.ir_version = 3  # where every initializer had to be an input
    assert "Gelu" in "".join(nodes(rewrite.optimize(built).model.proto))


def test_sequences_optionals_and_strings_stay(tmp_path):
    made = [
        node("SequenceConstruct", ["x", "x"], ["q"]), node("ConcatFromSequence", ["q"], ["c"], axis=0), node("Optional", ["x"], ["o"]),
        node("OptionalGetElement", ["o"], ["g"]), node("Sigmoid", ["g"], ["s"]), node("Mul", ["g", "s"], ["y"]), node("Identity", ["words"], ["t"]),
    ]  # fmt: skip
    words = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [2], [b"a\xff", b"b"])
    built = broken(made, outputs=("y",), initializer=[words])
    built.graph.output.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [8]))
    built.graph.output.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.STRING, [2]))
    after = rewrite.optimize(built, verify=False).model.proto
    assert nodes(after) == ["SequenceConstruct", "ConcatFromSequence", "Optional", "OptionalGetElement", "rewrite.Swish", "Identity"]
    assert list(after.graph.node)[:4] == list(built.graph.node)[:4]
    assert after.graph.initializer[0] == words


def test_functions_of_others_stay(tmp_path):
    built = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18, "acme" : 1]>
        g (float[4] x) => (float[4] y) { d = acme.Double(x)  s = Sigmoid(d)  y = Mul(d, s) }
        <opset_import: ["" : 18], domain: "acme"> Double (a) => (b) { b = Add(a, a) }""")
    after = rewrite.optimize(built).model.proto
    assert nodes(after) == ["acme.Double", "rewrite.Swish"]
    assert after.functions[0] == built.functions[0]
    assert rewrite.unfuse(after).functions[0] == built.functions[0]


def test_optimized_again_nothing_changes(model, tmp_path):
    once, twice = tmp_path / "1.onnx", tmp_path / "2.onnx"
    assert run("optimize", model, "-o", once).exit_code == 0
    assert run("optimize", once, "-o", twice).exit_code == 0
    assert twice.read_bytes() == once.read_bytes()


def test_in_place(model):
    assert run("optimize", model, "-o", model).exit_code == 0
    assert nodes(onnx.load(model)) == ["rewrite.Swish"]


# --- rules files ----------------------------------------------------------------------------------------------------
RULE = """
import rewrite
@rewrite.rule(tier="lift", priority=99)
class Mine:
    '''neg.'''
    def pattern(op, x):
        {pattern}
    def check(x):
        {check}
    def replace(op, x):
        {replace}
"""


PLUGIN = """
import rewrite
@rewrite.plugin
class A:
    inputs = ("x",)
    attributes = {"k": 1}
    tolerance = {}
    def reference(x, *, kk): return x
"""


def rules(tmp_path, pattern="return op.Neg(x)", check="return None", replace="return op.Neg(x)", text=None):
    path = tmp_path / "my_rules.py"
    path.write_text(text or RULE.format(pattern=pattern, check=check, replace=replace))
    return path


@pytest.mark.parametrize(("kwargs", "parts"), [
    ({"text": "import rewrite\n1 / 0\n"}, ["my_rules.py:2", "ZeroDivisionError"]),
    ({"text": "import rewrite\ndef f(:\n"}, ["my_rules.py:2", "syntax"]),
    ({"text": "import no_such_package_here\n"}, ["no_such_package_here"]),
    ({"text": "import sys\nsys.exit(3)\n"}, ["SystemExit"]),
    ({"text": "x = 1\n"}, ["neither a rule nor a plugin"]),
    ({"text": "raise ValueError('a\\nb\\nc')\n"}, ["ValueError: a b c"]),
    ({"text": "import rewrite\n@rewrite.rule\nclass A:\n    pass\n"}, ["rule A", "no function 'pattern(op, ...)'"]),
    ({"text": "import rewrite\n@rewrite.rule(tier='best')\nclass A:\n    pass\n"}, ["tier 'best' is unknown"]),
    ({"text": PLUGIN}, ["plugin A", "reference cannot be called"]),
    ({"pattern": "return 1 / 0"}, ["my_rules.py:7", "pattern cannot be traced", "ZeroDivisionError"]),
    ({"pattern": "return x"}, ["pattern cannot be traced"]),
    ({"check": "return 1 / 0"}, ["rule 'mine'", "check fails at Neg 'y'", "my_rules.py:9", "ZeroDivisionError"]),
    ({"check": "return False"}, ["rule 'mine'", "check returned False"]),
    ({"replace": "return 1 / 0"}, ["rule 'mine'", "replacement fails at Neg 'y'", "my_rules.py:11", "ZeroDivisionError"]),
    ({"replace": "return None"}, ["rule 'mine'", "replacement returned None"]),
    ({"replace": "return op.Add(x, 0.5)"}, ["rule 'mine'", "0.5: a float constant needs its type"]),
    ({"replace": "return op.Negg(x)"}, ["rule 'mine'", "operator 'Negg', which neither ONNX nor a plugin is; did you mean 'Neg'?"]),
    ({"replace": "return op.Qqqqqqq(x)"}, ["rule 'mine'", "declare a plugin of this name, or write op.domain('its domain').Qqqqqqq(...)"]),
    ({"replace": "return op.TensorScatter(x, x)"}, ["rule 'mine'", "which ONNX has from opset 24 on, and the model is of opset 18"]),
])  # fmt: skip
def test_a_faulty_rules_file(tmp_path, kwargs, parts):
    path, out = save(parse(PLAIN), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    file = rules(tmp_path, **kwargs)
    refused(run("optimize", path, "--rules", file, "-o", out), "my_rules.py", *parts)
    assert not out.exists()
    with pytest.raises(rewrite.RewriteError):
        rewrite.optimize(path, rules=[file])


def test_a_misspelled_name_in_a_rule(tmp_path):
    text = "import rewrite\n@rewrite.rule\nclass A:\n    def pattern(op, weight):\n        return op.Neg(weight)\n    def replace(op, wieght):\n        return op.Neg(wieght)\n"
    refused(run("list", "--rules", rules(tmp_path, text=text)), "takes 'wieght', which the pattern does not bind; did you mean 'weight'?")


def test_an_operator_sign_in_a_replacement(tmp_path):
    path = save(parse(PLAIN), tmp_path / "m.onnx")
    refused(run("optimize", path, "--rules", rules(tmp_path, replace="return x * x")), "its replacement fails at Neg 'y'", "op.Mul(a, b)")


@pytest.mark.parametrize(("arguments", "reason"), [
    ({"only": "attention"}, "only: give a list"), ({"inputs": {"x": 1}}, "inputs: give a list"), ({"tolerance": float("nan")}, "tolerance nan"),
])  # fmt: skip
def test_arguments_of_a_wrong_kind(model, arguments, reason):
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.optimize(str(model), **arguments)


def test_a_profile_is_text(model, tmp_path):
    with pytest.raises(rewrite.RewriteError, match="profile: a dict"):
        rewrite.build(str(model), tmp_path / "plan", profile={"n": (1, 2, 3)}, engines=False)


@pytest.mark.parametrize(("arrays", "reason"), [
    ({"x": np.zeros((2, 8))}, "'x' is float64, the model needs float32"), ({"z": np.zeros(2)}, "no input 'z'"), ({"x": np.zeros(8, np.float32)}, "shape [8]"),
])  # fmt: skip
def test_a_model_is_run_on_what_it_takes(tmp_path, model, arrays, reason):
    np.savez(tmp_path / "in.npz", **arrays)
    refused(run("run", model, "--inputs", tmp_path / "in.npz"), reason)


@pytest.mark.parametrize("option", [["--segment", "a"], ["--check"], ["--key", "k"]])
def test_what_only_plans_have(model, option):
    refused(run("inspect", model, *option), "are for plans")


@pytest.mark.parametrize(("file", "reason"), [("none.py", "no such file"), (".", "a directory"), ("rules.txt", "must end in .py"), (LONG, "no such file")])
def test_no_rules_file(tmp_path, model, file, reason):
    (tmp_path / "rules.txt").write_text("x = 1")
    refused(run("optimize", model, "--rules", tmp_path / file), "rules file", reason)


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
@pytest.mark.parametrize(("replace", "reason"), [
    ("return op.Cast(op.Neg(x), to=10)", "is float16 instead of float32"),
    ("return op.Unsqueeze(op.Neg(x), [0])", "has shape [1, 'n', 8] instead of ['n', 8]"),
    ("return op.Slice(op.Neg(x), [0], [4], [1])", "instead of ['n', 8]"),
    ("return op.Neg(x), op.Neg(x)", "the pattern has 1 outputs, the replacement 2"),
])  # fmt: skip
def test_a_replacement_of_another_dtype_or_shape_is_rejected_at_the_site(tmp_path, verify, replace, reason):
    path, out, report = save(parse(PLAIN), tmp_path / "m.onnx"), tmp_path / "out.onnx", tmp_path / "r.json"
    done = run("optimize", path, "--rules", rules(tmp_path, replace=replace), "-o", out, "--report", report, verify)
    assert done.exit_code == 0, done.output
    assert "mine at Neg 'y': REJECTED" in done.stdout
    assert reason in " ".join(done.stdout.split())
    found = json.loads(report.read_text())
    assert found["rules"]["mine"]["rejected"] == 1
    assert any(m["rule"] == "mine" and m["part"] == "replacement" and reason in m["reason"] for m in found["near_misses"])
    assert onnx.load(out) == onnx.load(path)


def test_a_wrong_replacement_is_rejected_and_named(tmp_path):
    path = save(parse(PLAIN), tmp_path / "m.onnx")
    done = run("optimize", path, "--rules", rules(tmp_path, replace="return op.Abs(x)"))
    assert done.exit_code == 0
    assert "mine at Neg 'y': REJECTED: the replacement differs" in done.stdout


def test_a_rejection_is_told_where_another_rule_takes_the_node(tmp_path):
    """Else whoever writes a plugin for what a built-in rule does, too, never learns that its reference is wrong."""
    text = """import numpy as np, rewrite
@rewrite.plugin
class Wrong:
    inputs, tolerance = ("x",), {"float32": (1e-5, 1e-5)}
    def reference(x):
        return np.zeros_like(x)
@rewrite.rule(priority=10)
class Mine:
    def pattern(op, x):
        return op.Neg(op.Neg(x))
    def replace(op, x):
        return op.Wrong(x)
@rewrite.rule
class Other:
    def pattern(op, x):
        return op.Neg(op.Neg(x))
    def replace(op, x):
        return op.Identity(x)
"""
    path = save(parse("(float[n, 8] x) => (float[n, 8] y) { a = Neg(x)\n y = Neg(a) }"), tmp_path / "m.onnx")
    file = rules(tmp_path, text=text)
    done = run("optimize", path, "--rules", file)
    assert done.exit_code == 0, done.output
    told = "mine at Neg 'y': REJECTED: plugin Wrong differs"
    assert "other" in done.stdout
    assert told in done.stdout
    assert told in run("optimize", path, "--rules", file, "--expect", "wrong=1").stderr
    assert "REJECTED" in run("explain", path, "--rules", file, "--rule", "mine").stdout


@pytest.mark.parametrize("replace", ["return op.Neg(x)", "return op.Neg(op.Neg(op.Neg(x)))", "return op.Neg(op.Identity(x))"])
def test_a_rule_that_loops_for_ever(tmp_path, replace):
    path, out = save(parse(PLAIN), tmp_path / "m.onnx"), tmp_path / "out.onnx"
    started = time.perf_counter()
    done = run("optimize", path, "--rules", rules(tmp_path, replace=replace), "-o", out)
    refused(done, "rule 'mine'", "keeps changing the graph", "add a check")
    assert len(done.stderr) < 400 + len(str(tmp_path))
    assert time.perf_counter() - started < 20
    assert not out.exists()


def test_two_rules_that_undo_each_other(tmp_path):
    text = """
import rewrite
@rewrite.rule(tier="lift")
class There:
    def pattern(op, x): return op.Neg(x)
    def replace(op, x): return op.Sub(op.constant(0.0, "float32"), x)
@rewrite.rule(tier="lift")
class Back:
    def pattern(op, x): return op.Sub(0.0, x)
    def replace(op, x): return op.Neg(x)
"""
    refused(run("optimize", save(parse(PLAIN), tmp_path / "m.onnx"), "--rules", rules(tmp_path, text=text)), "keeps changing the graph")


def test_names_of_rules(tmp_path, model):
    refused(run("optimize", model, "--only", "atention"), "rule 'atention' is unknown; did you mean 'attention'?")
    refused(run("explain", model, "--rule", "zzz"), "rule 'zzz' is unknown", "rewrite list")
    text = RULE.format(pattern="return op.Neg(x)", check="return None", replace="return op.Abs(x)").replace("class Mine", "class Attention")
    refused(run("optimize", model, "--rules", rules(tmp_path, text=text)), "two rules are called 'attention'", "my_rules.py")
    with pytest.raises(rewrite.RewriteError, match="give a list"):
        rewrite.optimize(str(model), rules="my_rules.py")
    with pytest.raises(rewrite.RewriteError, match=r"decorate it with @rewrite\.rule"):
        rewrite.optimize(str(model), rules=[int])


# --- options --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("expectation", "reason"), [
    ("attention", "write NAME=COUNT"), ("attention=x", "write NAME=COUNT"), ("=3", "write NAME=COUNT"), ("atention=3", "did you mean 'attention'?"), ("zzz=1", "neither a plugin nor a rule"),
    ("linear:gelu=0", "no plugin; did you mean"), ("attention:causal=0", "plugin FusedAttention has no attribute that is a name"),  # which would hold for ever
    ("matmul_act:bogus=0", "plugin MatMulAct has no form 'bogus'; use one of relu, relu2, gelu,"), ("MatMulAct:geluu=0", "did you mean 'gelu'?"),
    ("matmul_act:none=0", "no form 'none'"), ("gated_mat_mul_act:gate_upp=0", "did you mean 'gate_up'?"), ("attention_mask:BIST=0", "did you mean"), ("gelu:erf=0", "use one of tanh"),
])  # fmt: skip
def test_expectations(model, expectation, reason):
    output = model.with_name("o.onnx")
    refused(run("optimize", model, "-o", output, "--expect", expectation), "--expect", reason)
    assert not output.exists()


@pytest.mark.parametrize("expectation", ["matmul_act:gelu_tanh=0", "MatMulAct:Relu2=0", "gated_mat_mul_act:gate_up=0", "attention_mask:b11t=0", "attention_mask:start=0", "gelu:tanh=0"])
def test_names_that_nodes_can_have_are_expected(model, expectation):
    assert run("optimize", model, "--expect", expectation).exit_code == 0


@pytest.mark.parametrize(("arguments", "reason"), [
    ([], "missing argument 'MODEL'"), (["m", "n"], "unexpected extra argument"), (["m", "--foo"], "no such option"),
    (["m", "--tolerance", "much"], "not a valid float"), (["m", "-o"], "requires an argument"),
])  # fmt: skip
def test_usage_is_one_line_too(arguments, reason):
    refused(run("optimize", *arguments), reason, "--help")


@pytest.mark.parametrize("tolerance", ["nan", "-1e-4", "inf"])
@pytest.mark.parametrize("command", ["optimize", "verify", "build"])
def test_a_tolerance_that_compares_nothing(tmp_path, model, command, tolerance):
    extra = {"optimize": ["-o", tmp_path / "out"], "verify": [model], "build": ["-o", tmp_path / "out", "--no-engines"]}[command]
    refused(run(command, model, *extra, "--tolerance", tolerance), "tolerance", "1e-4")
    assert not (tmp_path / "out").exists()


def test_commands():
    refused(run("optmize"), "no command 'optmize'; did you mean 'optimize'?")
    assert run("--help").exit_code == 0
    for command in main.commands:
        done = run(command, "--help")
        assert done.exit_code == 0
        assert all(len(line) <= 112 for line in done.stdout.splitlines())


def feeds(tmp_path, **arrays):
    np.savez(tmp_path / "in.npz", **arrays)
    return tmp_path / "in.npz"


GOOD = np.ones((2, 8), np.float32)


@pytest.mark.parametrize("command", ["optimize", "verify"])
@pytest.mark.parametrize(("arrays", "reason"), [
    ({}, "'x' is missing"), ({"x": GOOD, "z": GOOD}, "no input 'z'"), ({"x": GOOD.astype(np.float64)}, "'x' is float64, the model needs float32"),
    ({"x": np.ones((2, 9), np.float32)}, "has shape [2, 9], the model needs [n, 8]"), ({"x": np.ones(8, np.float32)}, "has shape [8]"),
    ({"x": np.array([object()])}, "not a readable .npz"),
])  # fmt: skip
def test_inputs(tmp_path, model, command, arrays, reason):
    file = feeds(tmp_path, **arrays)
    out = tmp_path / "out.onnx"
    refused(run(command, model, *(["-o", out] if command == "optimize" else [model]), "--inputs", file), file, reason)
    assert not out.exists()


def test_inputs_that_are_no_arrays(tmp_path, model):
    for content in (b"", b"PK\x03\x04 broken", b"text"):
        (tmp_path / "in.npz").write_bytes(content)
        refused(run("optimize", model, "--inputs", tmp_path / "in.npz"), "in.npz", "not a readable .npz")
    whole = feeds(tmp_path, x=GOOD).read_bytes()
    (tmp_path / "in.npz").write_bytes(whole[: len(whole) // 2])
    refused(run("optimize", model, "--inputs", tmp_path / "in.npz"), "in.npz", "not a readable .npz")
    refused(run("optimize", model, "--inputs", tmp_path / "none.npz"), "none.npz")


@pytest.mark.parametrize("command", [
    ("run", "{m}", "--inputs", LONG), ("run", LONG, "--inputs", "x"), ("run", "{m}", "--inputs", "x", "-o", LONG), ("bench", LONG), ("inspect", LONG), ("explain", LONG), ("verify", LONG, LONG),
    ("unfuse", "{m}", "-o", LONG), ("build", "{m}", "-o", LONG, "--no-engines"), ("plan-size", LONG), ("generate", LONG, "--prompt", "a"), ("export", f"{LONG}.gguf", "-o", "x"),
])  # fmt: skip
def test_names_that_are_too_long(model, command):
    done = run(*(model if part == "{m}" else part for part in command))
    assert done.exit_code == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"rewrite: {LONG}")


def test_a_name_as_long_as_may_be(tmp_path, model):
    target = tmp_path / f"{'a' * 250}.onnx"
    assert run("optimize", model, "-o", target).exit_code == 0
    assert target.exists()


def test_good_inputs_are_used(tmp_path, model):
    np.save(tmp_path / "x.npy", GOOD)
    assert run("optimize", model, "--inputs", feeds(tmp_path, x=GOOD), "--inputs", tmp_path / "x.npy").exit_code == 0


# --- writing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", ["-o", "--report"])
@pytest.mark.parametrize(("target", "reason"), [
    ("no/such/out", "does not exist"), (".", "is a directory"), ("/dev/null", "not a regular file"), ("/proc/out", "cannot be written"), (LONG, "File name too long"),
])  # fmt: skip
def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, model, monkeypatch, option, target, reason):
    if target != "/proc/out":  # only trying tells
        monkeypatch.setattr("rewrite.model.load", lambda path: pytest.fail("the work began"))
    other = tmp_path / "other"
    refused(run("optimize", model, option, tmp_path / target, *(["-o", other] if option != "-o" and target != "/proc/out" else [])), reason)
    assert not other.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path, model):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    refused(run("optimize", model, "-o", folder / "o.onnx"), "read-only")


def big(tmp_path):
    """A model of 4 MB that becomes a Swish."""
    weights = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    return save(parse("(float[1024, 1024] x) => (float[1024, 1024] y) { m = Add(x, w)\n s = Sigmoid(m)\n y = Mul(m, s) }", w=weights), tmp_path / "big.onnx")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from rewrite.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("old", [b"old and good", None])
def test_a_full_disk_leaves_the_old_file(tmp_path, old):
    """The limit on the size of files fails a write in the middle, as a full disk does."""
    out = tmp_path / "out" / "o.onnx"
    out.parent.mkdir()
    if old is not None:
        out.write_bytes(old)
    done = subprocess.run([sys.executable, "-c", LIMITED, "optimize", big(tmp_path), "-o", out, "--no-verify"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"{out}: cannot be written" in done.stderr
    assert [p.name for p in out.parent.iterdir()] == ([out.name] if old is not None else [])
    assert old is None or out.read_bytes() == old


def test_no_space_left_is_said(tmp_path, model, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.onnx"
    out.write_bytes(b"old and good")
    monkeypatch.setattr(os, "fsync", full)
    refused(run("optimize", model, "-o", out), out, "No space left on device; nothing was changed")
    assert out.read_bytes() == b"old and good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx"]


@pytest.mark.parametrize("fails", [0, 1])
def test_the_report_and_the_model_are_written_both_or_not_at_all(tmp_path, model, monkeypatch, fails):
    flushed, sync = [], os.fsync

    def full(descriptor):
        flushed.append(descriptor)
        if len(flushed) > fails:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    refused(run("optimize", model, "-o", out, "--report", report), [report, out][fails], "No space left on device; nothing was changed")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


KILLED = """
import os, signal, sys
import rewrite.files
def slow(file):
    file.write(b"half of the new file")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
rewrite.files.write_atomically(sys.argv[1], slow)
"""


def test_killed_in_the_middle_of_writing(tmp_path):
    out = tmp_path / "o.onnx"
    out.write_bytes(b"old and good")
    done = subprocess.run([sys.executable, "-c", KILLED, out], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"old and good"
    left = [p.name for p in tmp_path.iterdir() if p != out]
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)


def test_killed_at_any_time(tmp_path):
    """The real command, killed at five moments: the output is the old file or a whole new one."""
    path, out = big(tmp_path), tmp_path / "o.onnx"
    command = [sys.executable, "-m", "rewrite.cli", "optimize", str(path), "-o", str(out), "--no-verify"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    whole, new = time.perf_counter() - started, out.read_bytes()
    for step in range(5):
        out.write_bytes(b"old and good")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * (0.6 + 0.1 * step))
        process.kill()
        process.wait(timeout=60)
        assert out.read_bytes() in (b"old and good", new)


def test_a_model_over_two_gigabytes_is_refused(tmp_path, model, monkeypatch):
    monkeypatch.setattr(onnx.checker, "MAXIMUM_PROTOBUF", 100)
    refused(run("optimize", model, "-o", tmp_path / "o.onnx"), "over 2 GiB", "external data")
    assert not (tmp_path / "o.onnx").exists()


def test_weights_that_vanish_while_we_work(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    loaded = rewrite.load(external(tmp_path / "a", length=32768))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(rewrite.RewriteError, match=r"w\.bin"):
        loaded.save(tmp_path / "b" / "m.onnx")
    assert list((tmp_path / "b").iterdir()) == []
