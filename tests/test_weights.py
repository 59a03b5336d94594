"""External weights: left in place, copied by the kernel, embedded; never read to be rewritten."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse

import rewrite
from rewrite import weights
from rewrite.cli import main, print_report
from rewrite.model import external_file
from rewrite.registry import library
from rewrite.report import Report, Site
from rewrite.verify import LARGE, TOLERANCE, Spec, check_site, shrink

HUGE = 3 << 30


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def sparse(folder, rows, columns):
    """y = Relu(x @ w) with `w` in a file of zeros, but for its first and last 64 KiB."""
    folder.mkdir(exist_ok=True)
    built = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> g (float[n, {rows}] x) => (float[n, {columns}] y) {{ m = MatMul(x, w)\n y = Relu(m) }}')
    tensor = built.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=[rows, columns], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", 0), ("length", 4 * rows * columns)):
        tensor.external_data.add(key=key, value=str(value))
    edge = np.random.default_rng(0).standard_normal(1 << 14).astype(np.float32).tobytes()
    with (folder / "w.bin").open("wb") as file:
        file.write(edge)
        file.truncate(4 * rows * columns)
        file.seek(4 * rows * columns - len(edge))
        file.write(edge)
    (folder / "m.onnx").write_bytes(built.SerializeToString())
    return folder / "m.onnx"


def test_weights_stay_where_they_are(tmp_path):
    path = sparse(tmp_path, 512, 1024)
    before = os.stat(tmp_path / "w.bin")
    assert run("optimize", path, "-o", tmp_path / "out.onnx").exit_code == 0
    after = os.stat(tmp_path / "w.bin")
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (before.st_ino, before.st_mtime_ns, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "w.bin"]
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.node] == ["MatMulAct"]


def test_a_file_of_many_weights_is_looked_for_once(tmp_path, monkeypatch):
    made = parse("(float[n, 128] x) => (float[n, 128] y) { a = MatMul(x, v)\n y = MatMul(a, w) }", v=np.ones((128, 128), np.float32), w=np.ones((128, 128), np.float32))
    onnx.save(made, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin")
    names, look = [], external_file
    monkeypatch.setattr("rewrite.model.external_file", lambda folder, name, where: names.append(name) or look(folder, name, where))
    assert rewrite.load(tmp_path / "m.onnx").external == {"w.bin": tmp_path / "w.bin"}
    assert names == ["w.bin"]


@pytest.mark.parametrize("arguments", [
    ("optimize", "a/m.onnx", "-o", "a/w.bin"), ("optimize", "a/m.onnx", "-o", "a/w.bin", "--embed"), ("optimize", "a/m.onnx", "-o", "b/w.bin"), ("unfuse", "a/m.onnx", "-o", "a/w.bin"),
    ("optimize", "a/m.onnx", "--report", "a/w.bin"), ("optimize", "a/m.onnx", "--report", "a/m.onnx"), ("optimize", "a/m.onnx", "-o", "b/o.onnx", "--report", "b/../b/o.onnx"),
    ("optimize", "a/m.onnx", "-o", "b/o.onnx", "--report", "b/w.bin"), ("optimize", "a/m.onnx", "--inputs", "a/x.npz", "-o", "a/x.npz"), ("run", "a/m.onnx", "--inputs", "a/x.npz", "-o", "a/m.onnx"),
    ("run", "a/m.onnx", "--inputs", "a/x.npz", "-o", "a/x.npz"), ("export", "a/m.gguf", "-o", "a/m.gguf"), ("bench", "a", "--json", "b/t.json", "--trace", "b/t.json"),
])  # fmt: skip
def test_no_file_is_written_over_one_that_is_needed(arguments, tmp_path, monkeypatch):
    """The model's weights, what is read, and what the same command writes."""
    sparse(tmp_path / "a", 512, 1024)
    np.savez(tmp_path / "a" / "x.npz", x=np.ones((1, 512), np.float32))
    (tmp_path / "a" / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done = run(*arguments)
    assert done.exit_code == 2
    assert re.fullmatch(r"rewrite: [\w./]+: cannot be written: it is [\w' -]+ as well; choose another name\n", done.stderr)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("refuses", [None, "copy_file_range", "ioctl and copy_file_range"])
def test_weights_are_copied_whole_and_not_linked(tmp_path, monkeypatch, refuses):
    def refuse(*_):
        raise OSError(errno.EXDEV, "no")

    if refuses:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    if refuses == "ioctl and copy_file_range":
        monkeypatch.setattr(weights.fcntl, "ioctl", refuse)
    path = sparse(tmp_path / "a", 512, 1024)
    (tmp_path / "b").mkdir()
    assert run("optimize", path, "-o", tmp_path / "b" / "m.onnx").exit_code == 0
    source, copy = tmp_path / "a" / "w.bin", tmp_path / "b" / "w.bin"
    assert copy.read_bytes() == source.read_bytes()
    assert os.stat(copy).st_ino != os.stat(source).st_ino
    assert os.stat(copy).st_nlink == 1
    assert run("verify", path, tmp_path / "b" / "m.onnx").exit_code == 0


def test_holes_stay_holes(tmp_path):
    path = sparse(tmp_path / "a", 4096, 16384)
    (tmp_path / "b").mkdir()
    rewrite.load(path).save(tmp_path / "b" / "m.onnx")
    with (tmp_path / "a" / "w.bin").open("rb") as one, (tmp_path / "b" / "w.bin").open("rb") as two:
        for place in (0, 1 << 27, (1 << 28) - (1 << 16)):
            one.seek(place)
            two.seek(place)
            assert one.read(1 << 16) == two.read(1 << 16)
    assert os.stat(tmp_path / "b" / "w.bin").st_size == 1 << 28
    if os.stat(tmp_path / "a" / "w.bin").st_blocks * 512 < 1 << 24:  # this filesystem has holes
        assert os.stat(tmp_path / "b" / "w.bin").st_blocks * 512 < 1 << 24


def test_a_failing_copy_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(weights.fcntl, "ioctl", lambda *_: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")))
    path = sparse(tmp_path / "a", 512, 1024)
    (tmp_path / "b").mkdir()
    done = run("optimize", path, "-o", tmp_path / "b" / "m.onnx")
    assert done.exit_code == 2
    assert "No space left" in done.output
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("beside", [True, False])
def test_huge_models_are_rewritten_in_little_memory(tmp_path, beside):
    path = sparse(tmp_path / "a", 1 << 15, HUGE // 4 >> 15)
    target = path.with_name("out.onnx") if beside else tmp_path / "out.onnx"
    command = [sys.executable, "-m", "rewrite.cli", "optimize", str(path), "-o", str(target), "--report", str(tmp_path / "report.json")]
    # Asked by a small process in between: what a child's memory was before `exec` counts as its own, and that is ours.
    ask = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", ask, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    text, _, peak = done.stdout.rpartition("peak ")
    assert done.returncode == 0, text[-500:]
    assert int(peak) / 1024 < 700  # MiB; the weights are 3072
    assert "each site verified; the whole model was NOT run: its weights are 3.0 GiB" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert [s["plugin"] for s in report["sites"]] == ["MatMulAct"]
    assert report["verified"]
    assert report["model_error"] is None
    assert "3.0 GiB" in report["not_run"]
    assert beside or os.stat(tmp_path / "w.bin").st_size == HUGE


def test_embedded_weights(tmp_path):
    path = sparse(tmp_path / "a", 512, 1024)
    (tmp_path / "b").mkdir()
    assert run("optimize", path, "-o", tmp_path / "b" / "m.onnx", "--embed").exit_code == 0
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["m.onnx"]
    made = onnx.load(tmp_path / "b" / "m.onnx")
    assert made.graph.initializer[0].raw_data == (tmp_path / "a" / "w.bin").read_bytes()
    assert run("verify", path, tmp_path / "b" / "m.onnx").exit_code == 0
    assert onnx.load(path, load_external_data=False).graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL


@pytest.mark.parametrize(("what", "told"), [("cut", "the weights of 'w' end too early; the file changed since the model was read"), ("gone", "the weights cannot be read: No such file")])
def test_weights_that_changed_since_they_were_found_are_not_embedded(tmp_path, what, told):
    path = sparse(tmp_path / "a", 512, 1024)
    model = rewrite.load(path)
    file = tmp_path / "a" / "w.bin"
    if what == "cut":
        os.truncate(file, 1000)
    else:
        file.unlink()
    with pytest.raises(rewrite.RewriteError, match=told):
        model.save(tmp_path / "out.onnx", embed=True)
    assert not (tmp_path / "out.onnx").exists()


def test_a_copy_that_the_kernel_cuts_off_or_that_fails_is_told(tmp_path, monkeypatch):
    """Not every failure means that the filesystem cannot: then nothing is tried in another way."""
    path = sparse(tmp_path / "a", 512, 1024)
    (tmp_path / "b").mkdir()
    for name, fails, told in (
        ("copy_file_range", lambda *_: 0, "the weights were cut off while they were copied"),
        ("lseek", _fail(errno.EIO), os.strerror(errno.EIO)),
        ("ioctl", _fail(errno.EIO), os.strerror(errno.EIO)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(weights.fcntl, "ioctl", _fail(errno.EOPNOTSUPP))
            patch.setattr(weights.fcntl if name == "ioctl" else os, name, fails)
            with pytest.raises(rewrite.RewriteError, match=told):
                rewrite.load(path).save(tmp_path / "b" / "m.onnx")
        assert list((tmp_path / "b").iterdir()) == []


def test_a_hole_at_the_end_is_no_data(tmp_path):
    source, target = tmp_path / "s", tmp_path / "t"
    source.write_bytes(b"abc")
    os.truncate(source, 1 << 20)
    with target.open("wb") as file:
        weights.copy(source, file)
    assert target.read_bytes() == b"abc" + bytes((1 << 20) - 3)


def _fail(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_embedding_what_is_too_large_is_refused(tmp_path):
    path = sparse(tmp_path / "a", 1 << 15, HUGE // 4 >> 15)
    done = run("optimize", path, "-o", tmp_path / "m.onnx", "--embed", "--no-verify")
    assert done.exit_code == 2
    assert "3.0 GiB" in done.output
    assert "leave out --embed" in done.output
    assert not (tmp_path / "m.onnx").exists()


# --- the check of a site with very large weights -------------------------------------------------------------------
def body(text):
    graph = parse(text).graph
    return onnx.helper.make_function("rewrite", "F", [i.name for i in graph.input], [o.name for o in graph.output], list(graph.node), [onnx.helper.make_opsetid("", 18)])


def specs(*shapes):
    return [Spec(name, np.dtype(np.float32), shape) for name, shape in zip("xwb", shapes, strict=False)]


def test_large_sizes_shrink_in_proportion():
    made, factor = shrink(specs(("n", 4096), (4096, 14336), (14336,)))
    assert factor == 128
    (_, k), (rows, columns), (bias,) = (s.shape for s in made)
    assert (k, bias) == (rows, columns)
    assert columns * 4096 == rows * 14336
    assert rows * columns <= LARGE


def test_what_is_small_or_has_no_proportion_keeps_its_sizes():
    assert shrink(specs(("n", 512), (512, 1024))) is None
    assert shrink(specs(("n", 4096), (4096, 8191))) is None


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("fixed", [False, True], ids=["any size", "sizes in the body"])
def test_large_sites_are_checked(wrong, fixed):
    product = "m = MatMul(x, w)" if not fixed else "s = Constant<value_ints = [-1, 2048]>()\n z = Reshape(x, s)\n m = MatMul(z, w)"
    found = body(f"(float[n, 2048] x, float[2048, 4096] w, float[4096] b) => (float[n, 4096] y) {{ {product}\n y = Add(m, b) }}")

    def replacement(arrays):
        return [arrays["x"] @ arrays["w"] + arrays["b"] * np.float32(1.01 if wrong else 1)]

    verdict = check_site(found, [], specs((3, 2048), (2048, 4096), (4096,)), replacement, TOLERANCE, None)
    assert verdict.ok is not wrong, verdict
    assert verdict.reduced == (1 if fixed or wrong else 64)  # else the sizes of the model decided


def test_a_site_with_very_large_weights_is_reported_as_checked_at_reduced_sizes():
    """A product with its bias; one whose sizes have nothing in common is checked as it is."""
    w, b = np.ones((4096, 2048), np.float32), np.ones(2048, np.float32)
    proto = parse("(float[n, 4096] x) => (float[n, 2048] y) { m = MatMul(x, w) y = Add(m, b) }", w=w, b=b)
    (site,) = rewrite.optimize(proto).report.sites
    assert (site.rule, site.reduced) == ("linear_bias", 64)
    (site,) = rewrite.optimize(parse("(float[n, 4096] x) => (float[n, 1023] y) { y = MatMul(x, w) }", w=w[:, :1023])).report.sites
    assert (site.rule, site.reduced) == ("linear", 1)


def test_the_report_says_where_a_site_was_checked_at_reduced_sizes(capsys):
    """In the table, one for all sites of a rule, and for each site in the JSON."""
    report = Report(verified=True, model_error=0.0)
    report.start([r for r in library([]).rules if r.name in ("linear", "linear_bias", "gelu_erf")])
    for rule, error, reduced in (("linear", 1e-5, 64), ("linear", 2e-5, 32), ("linear_bias", 3e-6, 64), ("linear_bias", 4e-6, 1), ("gelu_erf", 5e-6, 1)):
        report.add(Site(rule, "", ["y"], ["MatMul 'm'"], error, reduced=reduced))
    print_report(report, "m.onnx", None)
    table = capsys.readouterr().out
    assert "2.0e-05 at sizes / 32-64" in table
    assert "4.0e-06 at sizes / 64 (some)" in table
    assert "5.0e-06 at" not in table
    assert [s["reduced"] for s in report.as_json()["sites"]] == [64, 32, 64, 1, 1]
