"""Fault injection: every write, flush, rename and close fails in turn, or the process is killed there.

Afterwards the old file or the new one is there, whole; after an error (not after SIGKILL) nothing else is left behind.
"""

from __future__ import annotations

import builtins
import errno
import gc
import hashlib
import io
import json
import os
import signal
import tempfile
import traceback
from collections import Counter

import numpy as np
import onnx
import pytest
from conftest import parse

import rewrite
import rewrite.files
from rewrite.cli import _write_json

CALLS = ("write", "pwrite", "fsync", "replace", "rename", "close", "mkstemp", "mkdtemp", "mkdir", "chmod", "_exchange")

class Fault:
    """The `number`-th call of one kind fails with this error, or kills the process."""

    def __init__(self, kind, number, how):
        self.kind, self.number, self.how, self.count = kind, number, how, 0

    def __call__(self):
        self.count += 1
        if self.count != self.number:
            return
        if self.how == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, self.how), os.strerror(getattr(errno, self.how)))

    def install(self):
        builtins.open = io.open = self.opened(builtins.open)
        os.fdopen = self.opened(os.fdopen)
        owner = {"mkstemp": tempfile, "mkdtemp": tempfile, "_exchange": rewrite.files}.get(self.kind, os)
        if self.kind not in ("none", "write", "close"):
            original = getattr(owner, self.kind)
            setattr(owner, self.kind, lambda *args, **kwargs: (self(), original(*args, **kwargs))[1])

    def opened(self, original):
        def call(path, mode="r", *args, **kwargs):
            file = original(path, mode, *args, **kwargs)
            return File(file, self) if "w" in mode else file

        return call


class File:
    """A file whose writes and closing may fail; where a write kills, half of it is done."""

    def __init__(self, file, fault):
        self.file, self.fault = file, fault

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.fault.kind == "write":
            if self.fault.how == "KILL" and self.fault.count + 1 == self.fault.number:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
            self.fault()
        return self.file.write(data)

    def close(self):
        self.file.close()
        if self.fault.kind == "close":
            self.fault()


def act(action, kind, number, how, source, target):
    """Write in a child of this process; returns (exit code or minus the signal, the error's text)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code, text = 3, ""
        gc.disable()  # it may find an ONNX Runtime session of the parent, which would wait for threads that are not here
        try:
            Fault(kind, number, how).install()
            if action == "model":
                rewrite.load(source).save(target)
            elif action == "report":
                _write_json(str(target), {"rules": list(range(2000))})
            else:
                rewrite.build(source, target, engines=False, verify=False)
            code = 0
        except rewrite.RewriteError as error:
            code, text = 2, str(error)
        except BaseException:
            text = traceback.format_exc()
        os.write(write, text.encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        text = stream.read()
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), text


def make(folder, seed):
    """A model with weights inside and in a file beside it (which saving elsewhere copies)."""
    weights = np.random.default_rng(seed).standard_normal((64, 128)).astype(np.float32)
    proto = parse("(float[n, 64] x) => (float[n, 128] y) { m = MatMul(x, w)\n y = Relu(m) }", w=weights)
    folder.mkdir()
    onnx.save_model(proto, str(folder / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx"


def content(path):
    """A file's bytes, or those of a folder; what differs from run to run left out: the date of a plan, for whose seal stands whether it holds."""
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file())
        return {p.relative_to(path).as_posix(): _lasting(p) for p in names}
    return path.read_bytes() if path.exists() else None


def _lasting(path):
    if path.suffix == ".sha256":
        return path.read_text() == f"{hashlib.sha256(path.with_suffix('.json').read_bytes()).hexdigest()}  manifest.json\n"
    return json.loads(path.read_text()) | {"created": ""} if path.suffix == ".json" else path.read_bytes()


def prepare(tmp_path, name, action, old):
    folder = tmp_path / name
    folder.mkdir()
    target = folder / ("plan" if action == "plan" else "out")
    if old is None:
        return target
    if action == "plan":
        rewrite.build(old, target, engines=False, verify=False)
    else:
        target.write_bytes(b"old and good")
    return target


@pytest.mark.parametrize("action", ["model", "report", "plan"])
@pytest.mark.parametrize("how", ["ENOSPC", "EIO", "KILL"])
def test_every_call_fails_in_turn(tmp_path, action, how):
    first, second = make(tmp_path / "first", 1), make(tmp_path / "second", 2)
    whole = prepare(tmp_path, "whole", action, None)
    rewrite.build(second, tmp_path / "warm", engines=False, verify=False)  # everything is imported now
    assert act(action, "none", 0, how, second, whole) == (0, "")
    new, tried = content(whole), Counter()
    for kind in CALLS:
        for number in range(1, 100):
            target = prepare(tmp_path, f"{kind}{number}", action, first if number % 3 else None)
            before = content(target)
            code, text = act(action, kind, number, how, second, target)
            after, at = content(target), (kind, number, text[-600:])
            assert after in (before, new), at
            if code == 0:
                assert after == new, at
                break
            tried[kind] += 1
            if how == "KILL":
                assert code == -signal.SIGKILL, at
                continue
            assert code == 2, at
            assert os.strerror(getattr(errno, how)) in text
            left = {p.name for p in target.parent.iterdir()} - {target.name, "w.bin"}
            assert not left, (at, left)
        else:
            pytest.fail(f"{kind} fails for ever")
    assert tried["write"] >= 1
    assert action != "plan" or tried["pwrite"] >= 1
    assert tried["close"] >= 1
    assert tried["rename"] + tried["replace"] + tried["_exchange"] >= 1
    assert tried["fsync"] >= 2, "what was renamed before it reached the disk is lost in a power cut"
