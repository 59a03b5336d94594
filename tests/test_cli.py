"""The command: exit codes, one-line errors, nothing half-written."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import nodes, parse

import rewrite
from rewrite.cli import main
from rewrite.runtime import engine


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { s = Sigmoid(x)\n y = Mul(x, s) }"), path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_optimize_writes_the_model_and_the_report(model, tmp_path):
    out, report = str(tmp_path / "o.onnx"), tmp_path / "r.json"
    done = run("optimize", model, "-o", out, "--report", str(report), "--expect", "swish=1")
    assert done.exit_code == 0, done.output
    assert nodes(onnx.load(out)) == ["rewrite.Swish"]
    assert json.loads(report.read_text())["rules"]["swish_sigmoid"]["applied"] == 1


def test_the_time_told_is_what_is_not_verification(model, tmp_path):
    """The check of the whole model takes longer than matching: it counts to neither, or to both."""
    report = rewrite.optimize(model).report
    assert report.seconds > report.verify_seconds > 0
    assert "in -" not in run("optimize", model).stdout


def test_a_missing_fusion_is_exit_code_1_and_writes_nothing(model, tmp_path):
    out = tmp_path / "o.onnx"
    done = run("optimize", model, "-o", str(out), "--expect", "attention=6")
    assert done.exit_code == 1
    assert "expected attention=6, found 0" in done.output
    assert not out.exists()


def test_expectations_count_by_attribute(tmp_path):
    path = tmp_path / "m.onnx"
    w = np.eye(8, dtype=np.float32)
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, w) d = Gelu(c) y = MatMul(d, w) }", 20, w=w), path)
    assert run("optimize", str(path), "--expect", "matmul_act=3", "--expect", "matmul_act:gelu=1", "--expect", "MatMulAct:relu=1", "--expect", "matmulact:tanh=0").exit_code == 0
    done = run("optimize", str(path), "--expect", "matmul_act:gelu=2")
    assert done.exit_code == 1
    assert "expected matmul_act:gelu=2, found 1" in done.output


def test_an_expectation_that_does_not_hold_is_explained(tmp_path):
    """At least, at most and exactly so many; what fails is told with the reason of the nearest miss, and nothing is written."""
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    heads = "float[b, 2, s, 8] q, float[b, 2, s, 8] k, float[b, 2, s, 8] v"
    body = "kt = Transpose<perm = [0, 1, 3, 2]>(k) m = MatMul(q, kt) p = Softmax<axis = 2>(m) a = MatMul(p, v) h = MatMul(a, w) y = MatMul(h, w)"
    onnx.save(parse(f"({heads}) => (float[b, 2, s, 8] y) {{ {body} }}", w=np.eye(8, dtype=np.float32)), path)
    for holds in ("matmul_act>=2", "matmul_act>=1", "matmul_act=2", "attention<=0", "linear<=2", "attention=0"):
        assert run("optimize", str(path), "--expect", holds).exit_code == 0, holds
    for fails in ("matmul_act>=3", "linear<=1", "attention>=1"):
        done = run("optimize", str(path), "-o", str(out), "--expect", "matmul_act=2", "--expect", fails)
        assert done.exit_code == 1
        assert f"expected {fails}, found {0 if 'attention' in fails else 2}" in done.stderr
        assert "attention at Softmax 'p': rule attention: the pattern fits, but the softmax is over axis 2 of 4, not over the last" in done.stderr
        assert "nothing was written" in done.stderr
        assert not out.exists()


def test_a_missing_fusion_is_explained_by_what_is_left_or_left_out(tmp_path):
    path = str(tmp_path / "m.onnx")
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { m = MatMul(x, w) y = Mish(m) }", 20, w=np.eye(8, dtype=np.float32)), path)
    assert "activation after a product at Mish 'y': no rule comes near it" in run("optimize", path, "--expect", "matmul_act:gelu=1").stderr
    assert "only these rules were used: attention, gelu_erf" in run("optimize", path, "--only", "attention", "--only", "gelu_erf", "--expect", "linear=1").stderr
    assert run("optimize", path, "--only", "attention", "--expect", "linear=0").exit_code == 0
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { y = Neg(x) }"), path)
    assert "nothing else looks like a fusion; `rewrite explain" in run("optimize", path, "--expect", "attention=1").stderr


def test_what_is_fused_inside_a_graph_of_a_node_is_counted(tmp_path):
    """By what pins fusions, and by what takes them out again."""
    path, fused, plain = (str(tmp_path / name) for name in ("m.onnx", "f.onnx", "p.onnx"))
    branches = "then_branch = t () => (float[n, 8] r) { a = MatMul(x, w) r = Relu(a) }, else_branch = e () => (float[n, 8] o) { o = Neg(x) }"
    onnx.save(parse(f"(float[n, 8] x, bool c) => (float[n, 8] y) {{ y = If (c) < {branches} > }}", w=np.eye(8, dtype=np.float32)), path)
    done = run("optimize", path, "-o", fused, "--expect", "matmul_act=1", "--expect", "matmul_act:relu=1")
    assert done.exit_code == 0, done.output
    assert f"{path}: 4 operators -> 3" in done.stdout
    assert run("optimize", path, "--expect", "matmul_act=0").exit_code == 1
    assert "1 plugin nodes unfused" in run("unfuse", fused, "-o", plain).stdout
    assert rewrite.load(plain).operators() == {"If": 1, "MatMul": 1, "Neg": 1, "Relu": 1}


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a" * 7])
def test_what_is_no_model_is_exit_code_2_in_one_line(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    done = run("optimize", str(path))
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1
    assert str(path) in done.output


def test_a_truncated_model_is_exit_code_2(model, tmp_path):
    data = Path(model).read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: len(data) // 2])
    done = run("optimize", str(path))
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1


def test_unfuse_and_verify(model, tmp_path):
    fused, plain = str(tmp_path / "f.onnx"), str(tmp_path / "p.onnx")
    assert run("optimize", model, "-o", fused).exit_code == 0
    assert run("unfuse", fused, "-o", plain).exit_code == 0
    assert nodes(onnx.load(plain)) == ["Sigmoid", "Mul"]
    assert run("verify", model, fused).exit_code == 0


def test_verify_tells_models_apart(model, tmp_path):
    other = tmp_path / "o.onnx"
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { y = Sigmoid(x) }"), other)
    done = run("verify", model, str(other))
    assert done.exit_code == 1
    assert "output 'y'" in done.output


def test_verify_of_models_with_other_inputs(tmp_path):
    for name in "ab":
        onnx.save(parse(f"(float[n, 8] {name}) => (float[n, 8] y) {{ y = Neg({name}) }}"), tmp_path / name)
    done = run("verify", str(tmp_path / "a"), str(tmp_path / "b"))
    assert done.exit_code == 1
    assert done.stderr == "rewrite: the inputs differ: the second model needs 'b' too, the first has a\n"


def test_list_names_every_rule_with_its_line():
    done = subprocess.run([sys.executable, "-m", "rewrite.cli", "list", "--json"], capture_output=True, text=True)  # this process knows other tests' plugins
    found = json.loads(done.stdout)
    assert {"attention", "gelu_erf"} <= {r["name"] for r in found["rules"]}
    assert all(r["doc"] for r in found["rules"] + found["plugins"])


def test_explain_of_what_is_fused_does_not_say_that_nothing_is(tmp_path):
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { m = MatMul(x, w) y = Relu(m) }", w=np.ones((8, 8), np.float32)), tmp_path / "m.onnx")
    assert run("optimize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "f.onnx")).exit_code == 0
    assert run("explain", str(tmp_path / "f.onnx")).stdout == "nothing more is fused; no near miss\n"


def test_explain_names_the_stop(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(parse("(float[n, 8] x, float[n, 8] z) => (float[n, 8] y) { s = Sigmoid(z)\n y = Mul(x, s) }"), path)
    done = run("explain", str(path), "--rule", "swish_sigmoid")
    assert done.exit_code == 0
    assert "'z'" in done.output or "'x'" in done.output


def test_modules_are_summed_up():
    from rewrite.report import common_scope, summarize_scopes

    assert common_scope(["a.b.0.c", "a.b.0.d", "", "a.b.0"]) == "a.b.0"
    assert common_scope(["a.b", "a.b"]) == "a.b"
    assert common_scope(["", ""]) == ""
    assert summarize_scopes(["l.0.a", "l.1.a", "l.2.a", "l.5.a", "h.m", ""]) == "l.{0-2,5}.a, h.m"


# --- what is printed for people, and for programs ---------------------------------------------------------------------
@pytest.fixture
def plan(tmp_path):
    w, source = np.eye(8, dtype=np.float32), str(tmp_path / "source.onnx")
    onnx.save(parse("(float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w) y = Gelu(a) }", 20, w=w), source)
    made = str(tmp_path / "fused.onnx")
    assert run("optimize", source, "-o", made).exit_code == 0
    return made, str(tmp_path / "plan")


def test_a_plan_is_built_shown_and_run(plan, tmp_path):
    model, folder = plan
    told = json.loads(run("build", model, "-o", folder, "--no-engines", "--json").stdout)
    assert [s["kind"] for s in told["steps"]] == ["plugin"]
    shown = " ".join(run("inspect", folder, "--steps").stdout.split())
    assert "plugin attributes calls MatMulAct" in shown
    assert "activation=gelu" in shown
    assert "step calls inputs outputs of shape MB at best 0 MatMulAct" in shown
    x = np.arange(16, dtype=np.float32).reshape(2, 8)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x)
    for file in ("x.npy", "x.npz"):  # a single input needs no name
        out = tmp_path / f"{file}.out.npz"
        done = run("run", folder, "--inputs", str(tmp_path / file), "-o", str(out))
        assert done.exit_code == 0, done.output
        assert "y float32 [2, 8] 0 " in " ".join(done.stdout.split())
        np.testing.assert_allclose(np.load(out)["y"][0, :3], [0, 0.841345, 1.9545], rtol=1e-4)
    refused = run("run", model, "--inputs", str(tmp_path / "x.npz"), "--device", "cuda")
    assert refused.exit_code == 2
    assert "a model runs on the CPU; `rewrite build` makes a plan of it" in refused.stderr


@pytest.mark.parametrize(("kind", "given", "expected"), [
    ("bfloat16", np.array([1.5, -2], ml_dtypes.bfloat16), np.array([1.5, -2], ml_dtypes.bfloat16).view("V2")), ("string", np.array(["a", "bc"]), np.array(["a", "bc"])),
])  # fmt: skip
@pytest.mark.parametrize("name", ["y", "file", "allow_pickle"])
def test_files_hold_what_numpy_has_no_word_for(tmp_path, kind, given, expected, name):
    onnx.save(parse(f"({kind}[n] x) => ({kind}[n] {name}) {{ {name} = Identity(x) }}"), tmp_path / "m.onnx")
    rewrite.build(tmp_path / "m.onnx", tmp_path / "p", engines=False)
    np.savez(tmp_path / "in.npz", x=given)
    for path in ("p", "m.onnx") if kind == "string" else ("p",):
        assert run("run", str(tmp_path / path), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")).exit_code == 0
        np.testing.assert_array_equal(np.load(tmp_path / "out.npz")[name], expected)


def test_one_array_for_several_inputs_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(parse("(float[n] a, float[n] b) => (float[n] y) { y = Add(a, b) }"), path)
    np.save(tmp_path / "x.npy", np.ones(3, np.float32))
    done = run("run", str(path), "--inputs", str(tmp_path / "x.npy"))
    assert done.exit_code == 2
    assert "an .npy file holds one array, but there are 2 inputs (a, b); give an .npz file" in done.stderr


def test_a_model_is_shown_as_json_and_as_text(plan):
    model, _ = plan
    assert json.loads(run("inspect", model, "--json").stdout) == {"opset": 20, "operators": {"rewrite::MatMulAct": 1}, "plugins": {"MatMulAct": 1}}
    assert "plugin nodes: MatMulAct 1" in run("inspect", model).stdout


def test_rules_and_plugins_are_listed_in_tables():
    words = " ".join(run("list").stdout.split())
    assert "Rules tier rule what" in words
    assert "Plugins plugin what" in words
    assert "AttentionMask The mask of an attention" in words


def test_without_a_command_the_help_is_shown():
    done = run()
    assert "Usage:" in done.output
    assert "optimize" in done.output


def test_a_reader_that_goes_away_is_no_traceback(model):
    """`rewrite list | head -1`"""
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m rewrite.cli list | head -1"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "Rules"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("command", "redirected", "code"), [
    ("list", "stdout", 141), ("list --json", "stdout", 141), ("optimize nothing.onnx", "stderr", 2), ("optimize --nothing", "stderr", 2), ("nothing", "stderr", 2), ("list", "stderr", 0),
])  # fmt: skip
def test_the_exit_code_is_the_same_where_nobody_reads_what_is_told(command, redirected, code):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as stream:
        done = subprocess.run([sys.executable, "-m", "rewrite.cli", *command.split()], **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, redirected: stream}, timeout=120)
    assert done.returncode == code
    assert not done.stderr


def test_without_a_standard_output_nothing_is_shown():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m rewrite.cli list >&-"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_is_one_line(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rewrite.registry.library", interrupt)
    done = run("list")
    assert (done.exit_code, done.stderr) == (130, "rewrite: interrupted\n")


@pytest.mark.parametrize("module", ["onnxruntime", "tensorrt_rtx"])
def test_ctrl_c_while_a_module_is_imported(monkeypatch, model, module):
    def interrupted(name, *arguments, **options):
        if name == module:
            raise ImportError("initialization failed") from KeyboardInterrupt()  # as pybind11 does
        return imported(name, *arguments, **options)

    imported = builtins.__import__
    engine.tensorrt.cache_clear()
    monkeypatch.setattr("builtins.__import__", interrupted)
    done = run("build", model, "-o", f"{model}.plan", "--no-verify")
    monkeypatch.undo()
    engine.tensorrt.cache_clear()
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (130, "rewrite: interrupted")


ENDED = """
import os, signal, sys
from rewrite.cli import main
import rewrite.runtime.build as build
number = int(sys.argv.pop())
signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP, and so would its children
def swap(*_):
    os.kill(os.getpid(), number)
build.swap_directory = swap
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_build_that_is_told_to_end_leaves_nothing(tmp_path, model, number):
    done = subprocess.run([sys.executable, "-c", ENDED, "build", model, "-o", tmp_path / "p", "--no-engines", "--no-verify", str(int(number))], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + number, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
