"""The child process itself: that it is asked, answers, ends, and is started anew; what hangs or crashes in it is in test_hostile_files."""

from __future__ import annotations

import os
import signal
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import parse

import rewrite
from rewrite import sandbox

MODEL = "(float[n, 2] x) => (float[n, 2] y) { y = Neg(x) }"


def loaded(text=MODEL):
    return rewrite.load(parse(text))


def test_results_come_back_in_their_types():
    text = "(float[n, 2] x, float16[n] h, bool[n] b, int64[n] i) => (float[n, 2] y, float16[n] g, bool[n] c, int64[n] j) { y = Neg(x) g = Neg(h) c = Not(b) j = Neg(i) }"
    feeds = {"x": np.ones((3, 2), np.float32), "h": np.ones(3, np.float16), "b": np.array([True, False, True]), "i": np.arange(3)}
    found = sandbox.run(loaded(text), feeds)
    assert {n: (a.dtype.name, a.shape) for n, a in found.items()} == {"y": ("float32", (3, 2)), "g": ("float16", (3,)), "c": ("bool", (3,)), "j": ("int64", (3,))}
    assert found["j"].tolist() == [0, -1, -2]
    assert found["c"].tolist() == [False, True, False]


def test_strings_come_back_as_strings():
    model = parse("(float[n] x) => (float[n] y, string[m] t) { y = Neg(x) t = Identity(words) }", words=np.array(["a", "bc"], object))
    found = sandbox.run(rewrite.load(model), {"x": np.ones(1, np.float32)})
    assert found["t"].tolist() == ["a", "bc"]


def test_arrays_go_to_and_fro_without_pickle():
    """Types that NumPy lacks keep their names; objects that are no strings are refused."""
    arrays = {"b": np.arange(3).astype(ml_dtypes.bfloat16), "s": np.array(["x", "yz"], object), "empty": np.zeros((0, 2), np.int8)}
    file = os.memfd_create("test")
    sandbox.write_arrays(file, list(arrays), list(arrays.values()))
    found = sandbox.read_arrays(file)
    assert {n: (a.dtype, a.shape) for n, a in found.items()} == {n: (a.dtype, a.shape) for n, a in arrays.items()}
    assert found["b"].tolist() == [0, 1, 2]
    assert found["s"].tolist() == ["x", "yz"]
    with pytest.raises(rewrite.RewriteError, match="'s' is no array of numbers or strings"):
        sandbox.write_arrays(file, ["s"], [[np.ones(2), np.ones(3)]])
    with pytest.raises(rewrite.RewriteError, match="'o' is no array of numbers or strings"):
        sandbox.write_arrays(os.memfd_create("test"), ["o"], [np.array([{}], object)])


def test_a_child_that_was_killed_is_started_again():
    sandbox.start()
    first = sandbox._child.process.pid
    os.kill(first, signal.SIGKILL)
    sandbox._child.process.wait()
    assert sandbox.run(loaded(), {"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[-1, -1]]
    assert sandbox._child.process.pid != first


def test_a_child_that_dies_when_it_is_asked_is_told_and_another_is_started(monkeypatch):
    """Its end of the line is gone while the question is on its way."""
    sandbox.stop()
    sandbox.start()
    dying = sandbox._child
    monkeypatch.setattr(dying.process, "poll", lambda: None)  # it looked alive
    os.kill(dying.process.pid, signal.SIGKILL)
    dying.process.wait()
    with pytest.raises(rewrite.RewriteError, match="its process is gone"):
        sandbox.run(loaded(), {"x": np.ones((1, 2), np.float32)})
    assert sandbox.run(loaded(), {"x": np.ones((1, 2), np.float32)})["y"].shape == (1, 2)


def test_without_an_interpreter_a_file_is_not_read_but_a_protobuf_is(monkeypatch, tmp_path):
    """An application that embeds Python may have none."""
    rewrite.load(parse(MODEL)).save(tmp_path / "m.onnx")
    sandbox.stop()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(rewrite.RewriteError, match=r"there is no Python interpreter .* give an onnx.ModelProto instead of a path"):
        rewrite.load(tmp_path / "m.onnx")
    assert rewrite.load(parse(MODEL)).opset == 18


def test_free_memory_is_what_the_system_says_or_a_guess(monkeypatch, tmp_path):
    assert 1 << 20 < sandbox._free_memory() < 1 << 50
    monkeypatch.setattr(sandbox, "Path", lambda _: tmp_path / "absent")
    assert sandbox._free_memory() == 8 << 30


def test_how_a_child_ended_is_told_in_words():
    assert sandbox._how_it_ended(0, 6) == ""
    assert sandbox._how_it_ended(signal.SIGXCPU, 6) == "it takes more than 6 s"
    assert sandbox._how_it_ended(signal.SIGSEGV, 6) == "it ends by SIGSEGV"
    assert sandbox._how_it_ended(3 << 8, 6) == "it ends with code 3"
    assert "more memory" in sandbox._how_it_ended(sandbox.MEMORY_CODE << 8, 6)
