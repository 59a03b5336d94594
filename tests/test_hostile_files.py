"""Files made to hang, crash or exhaust: one line and exit code 2; external data outside the folder is never opened."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

import rewrite
from rewrite import sandbox, validity, verify
from rewrite.cli import main
from rewrite.model import module_scope

SECRET = b"the secret outside" * 4096


def write(path, made, functions=(), shape=(2,)):
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n in "xy"]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    path.write_bytes(helper.make_model(helper.make_graph(made, "g", values[:1], values[1:]), opset_imports=opsets, functions=list(functions), ir_version=8).SerializeToString())
    return path


def function(name, made):
    return helper.make_function("f", name, ["x"], ["y"], made, [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)])


def call(name, x="x", y="y"):
    return helper.make_node(name, [x], [y], domain="f")


def laughs(depth):
    return [function("f0", [helper.make_node("Neg", ["x"], ["y"])])] + [function(f"f{i}", [call(f"f{i - 1}", "x", "m"), call(f"f{i - 1}", "m", "y")]) for i in range(1, depth)]


CASES = {
    "dots": ([helper.make_node("Einsum", ["x"], ["y"], equation="..i->")], (), "is none"),
    "four dots": ([helper.make_node("Einsum", ["x"], ["y"], equation="....")], (), "is none"),
    "laughs": ([call("f39")], laughs(40), "1.6e+12 nodes"),
    "itself": ([call("a")], [function("a", [call("a")])], "calls itself"),
    "each other": ([call("a")], [function("a", [call("b")]), function("b", [call("a")])], "calls itself"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line(tmp_path, case):
    made, functions, reason = CASES[case]
    path = write(tmp_path / "m.onnx", made, functions)
    started = time.perf_counter()
    with pytest.raises(rewrite.RewriteError, match=reason.replace("+", r"\+")):
        rewrite.optimize(path, rules=[])
    assert time.perf_counter() - started < 10


def test_a_hang_that_only_onnx_sees_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "READ_SECONDS", 1)
    node = helper.make_node("Einsum", ["x"], ["y"])
    node.attribute.add(name="equation", type=onnx.AttributeProto.STRING, ref_attr_name="e")
    body = helper.make_function("f", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)], ["e"])
    path = write(tmp_path / "m.onnx", [helper.make_node("F", ["x"], ["y"], domain="f", e="..i->")], [body])
    for _ in range(2):  # the child is started again
        with pytest.raises(rewrite.RewriteError, match=r"more than 1 s"):
            rewrite.load(path)


def test_sizes_that_double_with_each_node(tmp_path):
    made = [helper.make_node("Shape", ["x"], ["s0"]), *(helper.make_node("Mul", [f"s{i}"] * 2, [f"s{i + 1}"]) for i in range(60)), helper.make_node("Expand", ["x", "s60"], ["y"])]
    for shape in ((3,), ("n",)):
        started = time.process_time()
        after = rewrite.optimize(write(tmp_path / "m.onnx", made, shape=shape), rules=[], verify=False).model.proto
        assert [n.op_type for n in after.graph.node] == [n.op_type for n in made]
        assert time.process_time() - started < 5  # a formula of 2^60 factors would take for ever


ESCAPES = [
    "../secret", "/etc/passwd", "sub/../../secret", "", "..", ".", "./..", "./../secret", "a/../../secret", "a/../..", "//etc/passwd", "/", "sub/..", "../in/../secret", "../../secret",
    "..\\secret", "C:\\secret", "C:secret", "\\\\server\\share", "\\secret", "sub\\..\\secret", "file:///etc/passwd", "file://secret", "http://x/y", "/proc/self/fd/0", "/proc/self/environ",
    "....//secret",
    "/dev/stdin", "/dev/zero", "/dev/null", "/dev/fd/0", "~/secret", "~root/secret", "$HOME/secret", "${HOME}/secret", "．．/secret", "‥/secret", ".. /secret", ".../secret", " ../secret",
    "../secret ", "secret\0", "../secret\0.bin", "%2e%2e/secret", "link", "folder/secret", "hard", "pipe", "sub", "sub/", "m.onnx/../../secret",
    "a" * 300, "é" * 200, "a/" * 1000 + "../" * 1000 + "../secret", "a/" * 2500 + "secret", "a/" * 100_000 + "secret",  # longer than names and paths may be
]  # fmt: skip
AUDITED = """
import os, sys
home, secret = sys.argv[1], os.stat(sys.argv[2])
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if path == os.path.realpath(sys.argv[2]) or path.startswith(("/etc/passwd", "/dev/zero", "/dev/stdin")) or path.endswith(("/pipe", "/hard")):
            print("OPENED", path, flush=True)
        if path.endswith("/sound"):
            print("READ", path, flush=True)
import rewrite
from rewrite.model import read
from pathlib import Path
sys.addaudithook(watch)
for path in sorted(Path(home).glob("*.onnx")):
    for how in (lambda p: read(p, p.read_bytes()), rewrite.load):
        try:
            how(path)
            print("ACCEPTED", path, flush=True)
        except rewrite.RewriteError as error:
            print("refused", str(error)[:300].replace(chr(10), " "))
"""


def branches(name):
    """A model with an If."""
    made = [helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [True]))]
    inner = [helper.make_graph([helper.make_node("Neg", ["x"], [f"y{i}"])], f"b{i}", [], [helper.make_tensor_value_info(f"y{i}", 1, [2])]) for i in range(2)]
    made.append(helper.make_node("If", ["c"], ["y"], then_branch=inner[0], else_branch=inner[1]))
    values = [helper.make_tensor_value_info(n, 1, [2]) for n in "xy"]
    return helper.make_model(helper.make_graph(made, name, values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def sparse_of(tensor, place):
    if place == "indices":
        tensor.data_type = 7
        return onnx.SparseTensorProto(values=helper.make_tensor("sparse", 1, [2], [1, 2]), indices=tensor, dims=[2])
    return onnx.SparseTensorProto(values=tensor, indices=helper.make_tensor("i", 7, [2], [0, 1]), dims=[2])


def in_attribute(model, name, **fields):
    (attribute := model.graph.node[0].attribute.add(name=name)).type = getattr(onnx.AttributeProto, name.upper())
    for field, value in fields.items():
        target = getattr(attribute, field)
        target.CopyFrom(value) if hasattr(target, "CopyFrom") and not hasattr(target, "append") else target.append(value)


def in_training(model, part, tensor):
    getattr(model.training_info.add(), part).initializer.append(tensor)


PLACES = {
    "initializer": lambda m, t: m.graph.initializer.append(t),
    "sparse values": lambda m, t: m.graph.sparse_initializer.append(sparse_of(t, "values")),
    "sparse indices": lambda m, t: m.graph.sparse_initializer.append(sparse_of(t, "indices")),
    "attribute": lambda m, t: in_attribute(m, "tensor", t=t),
    "attribute of tensors": lambda m, t: in_attribute(m, "tensors", tensors=t),
    "sparse attribute": lambda m, t: in_attribute(m, "sparse_tensor", sparse_tensor=sparse_of(t, "values")),
    "attribute of sparse tensors": lambda m, t: in_attribute(m, "sparse_tensors", sparse_tensors=sparse_of(t, "indices")),
    "branch": lambda m, t: m.graph.node[1].attribute[0].g.initializer.append(t),
    "function": lambda m, t: m.functions.append(function("F", [helper.make_node("Constant", [], ["y"], value=t)])),
    "initialization": lambda m, t: in_training(m, "initialization", t),
    "algorithm": lambda m, t: in_training(m, "algorithm", t),
}


def test_no_form_of_escape_is_opened(tmp_path):
    """Each form in each place that a tensor can have in a model; a weight that may be read is seen by the same watch."""
    assert len(ESCAPES) >= 40
    home = tmp_path / "in"
    (home / "sub").mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    (home / "link").symlink_to(secret)
    (home / "folder").symlink_to(tmp_path)
    os.link(secret, home / "hard")
    os.mkfifo(home / "pipe")
    (home / "sound").write_bytes(bytes(16))
    for index, location in enumerate([*ESCAPES, "sound"]):
        for number, put in enumerate(PLACES.values()):
            tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
            for key, value in (("location", location), ("length", "16" if number in (2, 6) else "8")):
                tensor.external_data.add(key=key, value=value)
            put(model := branches("g"), tensor)
            (home / f"m{index:02}-{number:02}.onnx").write_bytes(model.SerializeToString())
    done = subprocess.run([sys.executable, "-c", AUDITED, home, secret], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-500:]
    sound = [line for line in lines if not line.startswith("refused")]
    assert [line for line in sound if not line.endswith("/sound") and f"/m{len(ESCAPES):02}-" not in line] == []
    assert sum(line.startswith("READ ") for line in sound) == 2 * len(PLACES), "the watch sees what is opened"
    assert sum(line.startswith("ACCEPTED ") for line in sound) == 2 * len(PLACES)
    assert len(lines) - len(sound) == 2 * len(ESCAPES) * len(PLACES)
    assert sum("tensor 'w'" in line for line in lines) == 2 * len(ESCAPES) * len(PLACES), "refused for the place of its data"


def test_unknown_and_repeated_keys(tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(8))
    for extra in ("location", "offset", "basepath"):
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", "w.bin"), ("offset", "0"), (extra, "0")):
            tensor.external_data.add(key=key, value=value)
        path = write(tmp_path / "m.onnx", [helper.make_node("Constant", [], ["c"], value=tensor), helper.make_node("Add", ["x", "c"], ["y"])])
        with pytest.raises(rewrite.RewriteError, match="has the key"):
            rewrite.load(path)


def test_a_cycle_of_50_000_values_is_told_in_short(tmp_path):
    count = 50_000
    made = [helper.make_node("Neg", [f"v{(i - 1) % count}"], [f"v{i}"]) for i in range(count)] + [helper.make_node("Add", ["x", "v0"], ["y"])]
    path = write(tmp_path / "m.onnx", made)
    started = time.perf_counter()
    with pytest.raises(rewrite.RewriteError, match=r"a cycle, through the values .* … -> 'v") as told:
        rewrite.load(path)
    assert time.perf_counter() - started < 8
    assert len(str(told.value)) < len(str(path)) + 250
    values = [f"v{i}" for i in range(400)]
    makers = {v: helper.make_node("Neg", [values[i - 1]], [v]) for i, v in enumerate(values)}
    assert validity._cycle("v0", makers) == [*values, "v0"]  # each is computed from the one before


BROKEN_SCOPES = ["[", "['a', ", "[" * 5000, "[" + "-" * 5000 + "1]", "['a', 'b', " + "'c', " * 10**6 + "]", "[1, 2]", "['\\x']", "[b'a', b'b']", "[x]", "['a\0', 'b']", "[" + "9" * 5000 + "]",
                 "['layer." + "9" * 5000 + "', 'b']", "['layer.²', 'b']", "['a' + 'b', 'c']", "[{}.a, {}]", "[*x]"]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_SCOPES, ids=range(len(BROKEN_SCOPES)))
def test_broken_metadata_is_no_reason_to_fail(tmp_path, text):
    made = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"], "swish")]
    for node in made:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    path = write(tmp_path / "m.onnx", made)
    started = time.perf_counter()
    done = CliRunner().invoke(main, ["optimize", str(path), "--expect", "swish>=0", "--no-verify"])
    assert done.exit_code == 0, (done.output[-300:], done.exception)
    assert time.perf_counter() - started < 8


def test_scopes_that_are_none_name_no_module():
    node = helper.make_node("Neg", ["x"], ["y"], "/a/b/Neg")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layer.0', 'layer.0.norm', 'neg']")
    assert module_scope(node) == "layer.0.norm"
    for text in BROKEN_SCOPES[:10]:
        node.metadata_props[0].value = text
        assert module_scope(node) == ""


@pytest.mark.parametrize("command", ["optimize", "verify", "run"])
def test_advice_names_options_that_the_command_has(tmp_path, monkeypatch, command):
    made = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("Mul", ["x", "s"], ["y"])]
    path, feeds = write(tmp_path / "m.onnx", made), tmp_path / "x.npz"
    np.savez(feeds, x=np.ones(2, np.float32))

    def die(*_):
        raise sandbox.Died("it takes more than 1 s")

    monkeypatch.setattr(sandbox, "rehearse", lambda *_: None)
    monkeypatch.setattr(sandbox, "_ask", die)
    rest = {"optimize": [], "verify": [path], "run": ["--inputs", feeds]}[command]
    done = CliRunner().invoke(main, [command, str(path), *map(str, rest)])
    assert done.exit_code == 2
    assert "does not end well" in done.stderr
    options = {o for parameter in main.commands[command].params for o in (*parameter.opts, *parameter.secondary_opts)}
    advised = set(re.findall(r"--[a-z-]+", done.stderr))
    assert advised
    assert advised <= options


def site(made, inputs=("x",)):
    return helper.make_function("f", "F", list(inputs), ["y"], made, [helper.make_opsetid("", 18)])


def test_sites_run_here_only_if_every_size_is_known(monkeypatch):
    asked = []
    run_there = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *a: asked.append(a) or run_there(*a))
    x, many = np.ones(2, np.float32), np.array([1 << 40, 2])
    assert verify.run_function(site([helper.make_node("Neg", ["x"], ["y"])]), [], {"x": x})[0].tolist() == [-1, -1]
    assert verify.run_function(site([helper.make_node("Expand", ["x", "n"], ["y"])], "xn"), [], {"x": x, "n": np.array([3, 2])})[0].shape == (3, 2)
    assert not asked
    with pytest.raises(rewrite.RewriteError, match=r"2\.2e\+12 elements"):
        verify.run_function(site([helper.make_node("Expand", ["x", "n"], ["y"])], "xn"), [], {"x": x, "n": many})
    assert not asked
    assert verify.run_function(site([helper.make_node("NonZero", ["x"], ["y"])]), [], {"x": x})[0].tolist() == [[0, 1]]
    assert len(asked) == 1
    with pytest.raises(rewrite.RewriteError, match="elements, too many"):
        verify.make_inputs([verify.Spec("x", np.dtype(np.float32), (1 << 20, 1 << 20))], 0, None)


def test_a_site_that_loops_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "RUN_SECONDS", 2)
    made = loop(1 << 62)
    with pytest.raises(rewrite.RewriteError, match="does not end well: it takes more than"):
        verify.run_function(site(made), [], {"x": np.ones(2, np.float32)})


def graph_model(made, shape=(2,), functions=(), result=None):
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", result))]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    return helper.make_model(helper.make_graph(made, "g", values[:1], values[1:]), opset_imports=opsets, functions=list(functions), ir_version=8)


def integers(name, *values):
    return helper.make_node("Constant", [], [name], value=helper.make_tensor(name, 7, [len(values)] if len(values) != 1 else [], values))


def swish(x, y):
    """Something to fuse, so that the model is run whole."""
    return [helper.make_node("Sigmoid", [x], [f"{x}s"]), helper.make_node("Mul", [x, f"{x}s"], [y])]


def loop(trips, start="x", end="y"):
    values = [helper.make_tensor_value_info(n, kind, shape) for n, kind, shape in (("i", 7, []), ("c", 9, []), ("v", 1, [2]), ("d", 9, []), ("w", 1, [2]))]
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Neg", ["v"], ["w"])], "b", values[:3], values[3:])
    return [integers("n", trips), helper.make_node("Loop", ["n", "", start], [end], body=body)]


def chain(depth):
    """Functions, each of which calls the one before."""
    return [function("f0", [helper.make_node("Neg", ["x"], ["y"])]), *(function(f"f{i}", [call(f"f{i - 1}")]) for i in range(1, depth))]


def nested(depth):
    """A model with graphs inside graphs."""
    model = graph_model([integers("n", 1)])
    graph = model.graph
    for _ in range(depth):
        (attribute := graph.node.add(op_type="If", input=["n"], output=["y"]).attribute.add(name="then_branch")).type = onnx.AttributeProto.GRAPH
        graph = attribute.g
    return model


MANY = 1 << 40
BOMBS = {
    "ConstantOfShape": lambda: graph_model([integers("n", 1 << 20, 1 << 20), helper.make_node("ConstantOfShape", ["n"], ["z"]), *swish("z", "y")]),
    "Expand": lambda: graph_model([integers("n", 1 << 39, 2), helper.make_node("Expand", ["x", "n"], ["z"]), *swish("z", "y")]),
    "Tile": lambda: graph_model([integers("n", 1 << 20, 1 << 20), helper.make_node("Tile", ["x", "n"], ["z"]), *swish("z", "y")], (1, 1)),
    "Range": lambda: graph_model([integers("a", 0), integers("n", MANY), integers("i", 1), helper.make_node("Range", ["a", "n", "i"], ["r"]),
                                  helper.make_node("Cast", ["r"], ["z"], to=1), *swish("z", "y")]),
    "OneHot": lambda: graph_model([helper.make_node("Cast", ["x"], ["i"], to=7), integers("n", MANY), helper.make_node("Constant", [], ["v"], value=helper.make_tensor("v", 1, [2], [0, 1])),
                                   helper.make_node("OneHot", ["i", "n", "v"], ["z"]), *swish("z", "y")]),
    "input": lambda: graph_model(swish("x", "y"), (1 << 20, 1 << 20)),
    "Loop": lambda: graph_model([*swish("x", "z"), *loop(1 << 62, "z")], result=(2,)),
    "nested": lambda: nested(1000),
    "recursive": lambda: graph_model([call("a")], functions=[function("a", [call("b")]), function("b", [call("a")])]),
    "functions 100 deep": lambda: graph_model([call("f99")], functions=chain(100)),
    "functions 1000 deep": lambda: graph_model([call("f999")], functions=chain(1000)),
    "laughs": lambda: graph_model([call("f39")], functions=laughs(40)),
}  # fmt: skip
COMMANDS = {
    "optimize": ["-o", "out.onnx"],
    "explain": [],
    "unfuse": ["-o", "out.onnx"],
    "verify": ["m.onnx"],
    "build": ["--no-engines", "-o", "plan"],
    "inspect": ["--steps", "--attributes"],
    "run": ["--inputs", "x.npz"],
}
TIMED = """
import json, os, sys
child = os.posix_spawn(sys.executable, sys.argv[1:], os.environ)
status, usage = os.wait4(child, 0)[1:]
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))  # with those of its own children
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_ends_in_one_line_in_time_and_memory(tmp_path, bomb, command):
    if bomb == "Loop" and command == "run":
        pytest.skip("the user's own inputs may take as long as the user waits")
    (tmp_path / "m.onnx").write_bytes(BOMBS[bomb]().SerializeToString())
    np.savez(tmp_path / "x.npz", x=np.ones((1, 1) if bomb == "Tile" else 2, np.float32))
    asked = [sys.executable, "-m", "rewrite.cli", command, "m.onnx", *COMMANDS[command]]
    done = subprocess.run([sys.executable, "-c", TIMED, *asked], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    *_, told = done.stdout.splitlines()
    code, cpu, peak = json.loads(told)
    assert code in (0, 2), done.stderr[-300:]
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("rewrite: ")]
    assert len(said) == (code == 2), done.stderr[-600:]
    if code == 2:
        assert command == "build" or len(done.stderr.splitlines()) == 1  # that one tells its progress there
        assert not (tmp_path / "out.onnx").exists()
        assert not (tmp_path / "plan").exists()
    assert cpu < 10
    assert peak < 2048


def test_functions_that_call_functions_100_deep_are_read_and_unfused(tmp_path):
    done = rewrite.optimize(write(tmp_path / "m.onnx", [call("f99")], chain(100)), rules=[])
    assert len(done.model.proto.functions) == 100
    with pytest.raises(rewrite.RewriteError, match="more than 100 deep, at 'f::f100'"):
        rewrite.load(write(tmp_path / "m.onnx", [call("f100")], chain(101)))


def test_graphs_inside_graphs_over_100_deep_are_refused_in_memory():
    started = time.perf_counter()
    with pytest.raises(rewrite.RewriteError, match="more than 100 deep"):
        rewrite.load(nested(1000))
    assert time.perf_counter() - started < 5


def plant(kind, path, outside):
    """Something that is no file of the folder's own, in the way."""
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(outside.with_name("nothing"))
    elif kind == "hard link":
        os.link(outside, path)
    elif kind == "link to a folder":
        path.symlink_to(outside.parent)
    elif kind == "link to a device":
        path.symlink_to("/dev/full")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


OBSTACLES = {"link": 0, "dangling link": 0, "hard link": 0, "link to a folder": 2, "link to a device": 2, "pipe": 2, "folder": 2}


@pytest.mark.parametrize("command", ["optimize", "unfuse"])
@pytest.mark.parametrize("kind", OBSTACLES)
def test_a_model_is_never_written_through_what_is_in_its_place(tmp_path, kind, command):
    path, outside = write(tmp_path / "m.onnx", swish("x", "y")), tmp_path / "outside" / "old"
    outside.parent.mkdir()
    outside.write_bytes(SECRET)
    target = tmp_path / "out.onnx"
    plant(kind, target, outside)
    before = target.lstat()
    done = CliRunner().invoke(main, [command, str(path), "-o", str(target)])
    assert done.exit_code == OBSTACLES[kind], done.output
    assert outside.read_bytes() == SECRET
    assert sorted(p.name for p in outside.parent.iterdir()) == ["old"]
    if done.exit_code:
        assert "cannot be written: it is a" in done.stderr
        assert (target.lstat().st_ino, target.lstat().st_mode) == (before.st_ino, before.st_mode)
    else:
        assert not target.is_symlink()
        assert target.stat().st_nlink == 1
        assert len(rewrite.load(target).proto.graph.node) == (1 if command == "optimize" else 2)


def with_weights(folder, location):
    """A model whose weights are 32 KiB outside of it."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[8192], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("length", "32768")):
        tensor.external_data.add(key=key, value=value)
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"])], (8192,))
    model.graph.initializer.append(tensor)
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    (folder / location).write_bytes(np.arange(8192, dtype=np.float32).tobytes())
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


@pytest.mark.parametrize("kind", [*OBSTACLES, "link to the weights"])
def test_weights_are_never_written_through_what_is_in_their_place(tmp_path, kind):
    path, outside, there = with_weights(tmp_path, "w.bin"), tmp_path / "outside" / "old", tmp_path / "there"
    outside.parent.mkdir()
    there.mkdir()
    outside.write_bytes(SECRET)
    plant(kind.replace(" to the weights", ""), there / "w.bin", tmp_path / "w.bin" if "weights" in kind else outside)
    before = (there / "w.bin").lstat()
    rewrite.load(path).save(there / "out.onnx")
    assert outside.read_bytes() == SECRET
    assert (tmp_path / "w.bin").stat().st_nlink == 1
    assert ((there / "w.bin").lstat().st_ino, (there / "w.bin").lstat().st_mode) == (before.st_ino, before.st_mode)
    copied = rewrite.load(there / "out.onnx").external  # refuses links
    assert [f.read_bytes() for f in copied.values()] == [(tmp_path / "w.bin").read_bytes()]
    assert "w.bin" not in copied
    (name,) = copied
    (there / name).write_bytes(b"torn")  # a name of this form is no proof of the content
    rewrite.load(path).save(there / "out.onnx")
    assert (there / name).read_bytes() == (tmp_path / "w.bin").read_bytes()


def test_weights_are_not_written_into_a_folder_that_is_a_link(tmp_path):
    path, outside, there = with_weights(tmp_path, "sub/w.bin"), tmp_path / "outside", tmp_path / "there"
    outside.mkdir()
    there.mkdir()
    (there / "sub").symlink_to(outside)
    with pytest.raises(rewrite.RewriteError, match="sub is a symbolic link; remove it"):
        rewrite.load(path).save(there / "out.onnx")
    assert list(outside.iterdir()) == []
    assert not (there / "out.onnx").exists()


ROOT = Path(__file__).parent.parent
PICKLING = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}


def unpickling(source):
    """What in a module's source can run code out of a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLING]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in PICKLING else []
            found += [f"{node.module}.load" for a in node.names if node.module in ("torch", "numpy") and a.name == "load"]
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            module = ast.unparse(node.args[0]).strip("'").split(".")[0] if node.args else ""
            bad = [
                called.split(".")[-1] in ("__import__", "import_module") and module in PICKLING,
                called.startswith("torch.") and called.endswith((".load", "load_file")) and given.get("weights_only") != "True",
                called in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False",
                called.endswith(("read_pickle", "hub.load")),
            ]
            found += [called] if any(bad) else []
    return found


BAD = ["import pickle", "import os, marshal as m", "from shelve import open", "import dill.source", "from joblib import load", "def f():\n import _pickle", "__import__('pickle')",
       "importlib.import_module('pickle')", "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, None, x)", "torch.jit.load(p)", "from torch import load",
       "np.load(p, allow_pickle=True)", "numpy.load(p, allow_pickle=x)", "torch.hub.load(a)"]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_the_scan_for_pickles_sees(source):
    assert unpickling(source)


def test_no_module_reads_pickles():
    modules = [p for folder in ("rewrite", "patterns", "plugins", "export", "runtime") for p in (ROOT / folder).rglob("*.py")]
    assert len({p.parent for p in modules}) >= 5
    assert len(modules) > 60
    assert {str(p.relative_to(ROOT)): found for p in modules if (found := unpickling(p.read_text()))} == {}
    for sound in ("np.load(p)", "np.load(p, allow_pickle=False)", "torch.load(p, weights_only=True)", "import json", "from torch import nn"):
        assert not unpickling(sound)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["zip", "pickle"])
def test_a_pt_file_is_refused_and_not_unpickled(tmp_path, monkeypatch, form, command):
    import pickle

    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"state_dict": Trap()})
    path = tmp_path / "m.pt"
    if form == "pickle":
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    np.savez("x.npz", x=np.ones(2, np.float32))
    done = CliRunner().invoke(main, [command, "m.pt", *(a.replace("m.onnx", "m.pt") for a in COMMANDS[command])])
    assert done.exit_code == 2
    assert re.search(r"rewrite: m\.pt: a PyTorch file, which is never read, for it may run code; .*`rewrite export`", done.stderr.splitlines()[-1])
    assert not (tmp_path / "sprung").exists()
    if command == "run":  # nor are arrays of objects
        np.savez("x.npz", x=np.array([Trap()], object))
        (tmp_path / "m.onnx").write_bytes(graph_model(swish("x", "y")).SerializeToString())
        done = CliRunner().invoke(main, ["run", "m.onnx", "--inputs", "x.npz"])
        assert (done.exit_code, "holds Python objects" in done.stderr) == (2, True)
        assert not (tmp_path / "sprung").exists()


def test_what_graphsurgeon_says_is_told_once(tmp_path):
    model = graph_model([helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Typed", ["x"], ["z"], domain="other")])
    model.graph.node[1].attribute.add(name="absent", type=onnx.AttributeProto.TENSOR)
    model.opset_import.append(helper.make_opsetid("other", 1))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    done = subprocess.run([sys.executable, "-m", "rewrite.cli", "optimize", "m.onnx"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"rewrite: m.onnx: .*Unsupported type: 0.*\n", done.stderr)
    assert done.stdout == ""


def test_references_that_are_no_text_are_refused(tmp_path):
    path = with_weights(tmp_path, "w.bin")
    for old in (b"w.bin", b"location", b"32768"):
        data = path.read_bytes()
        assert data.count(old) == 1
        (tmp_path / "b.onnx").write_bytes(data.replace(old, b"\xff" * len(old)))
        with pytest.raises(rewrite.RewriteError, match="tensor 'w': its reference to external data is not UTF-8 text"):
            rewrite.load(tmp_path / "b.onnx")


def test_a_site_that_did_not_end_is_not_tried_again(monkeypatch):
    """Neither with the other inputs of its check, nor at the model's sizes after smaller ones."""
    asked = []

    def die(request, files, seconds):
        asked.append(request["seconds"])
        raise sandbox.Died("it takes more than 6 s")

    monkeypatch.setattr(sandbox, "_ask", die)
    large = verify.Spec("x", np.dtype(np.float32), (4096, 4096))
    assert verify.shrink([large])
    here, there = site([helper.make_node("Neg", ["x"], ["y"])]), site([helper.make_node("NonZero", ["x"], ["y"])])
    for body, replacement in ((there, lambda arrays: []), (here, lambda arrays: verify.run_function(there, [], arrays))):
        asked.clear()
        verdict = verify.check_site(body, [], [large], replacement, verify.TOLERANCE, None)
        assert (verdict.ok, "does not end well: it takes more than 6 s" in verdict.reason) == (False, True)
        assert len(asked) == 1
        assert asked[0] < 8
