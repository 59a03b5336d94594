"""Fault injection at system calls, by strace: whichever fails or kills, the old file or the new one is there, whole.

    python tests/system_calls.py [--record]

runs `rewrite optimize -o` and `rewrite build -o`, and lets each call with which they change the folder they write to fail in
turn with ENOSPC and with EIO, or kills the process there. `--record` writes the counts to benchmarks/results/system_calls.json.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import parse

CALLS = (
    "write", "writev", "pwrite64", "pwritev", "copy_file_range", "sendfile", "splice", "ioctl", "truncate", "ftruncate", "fallocate", "fsync", "fdatasync", "sync_file_range",
    "open", "openat", "creat", "close", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat",
    "chmod", "fchmod", "fchmodat", "chown", "fchown", "fchownat", "utimensat", "mmap", "msync",
)  # fmt: skip
CLEANING = ("unlink", "unlinkat", "rmdir", "close")  # where one of these fails in removing what was temporary, that is left, hidden, and the command succeeds
READING = re.compile(r"^(open|openat)\(.*O_RDONLY(?!.*O_CREAT)|^mmap\(.*(PROT_READ, MAP|MAP_PRIVATE)|^ioctl\(.*(TCGETS|FIOCLEX)")
SHIFTS = (0, 0, 0, 1, -1, 2, -2)  # a process may make a call more or fewer before: then another call is hit, and it is tried again
HOW = ("ENOSPC", "EIO", "SIGKILL")
PROGRESS = ("cutting the model at its plugin nodes", "writing the plan")  # which `build` tells beside its result
LINE = re.compile(r"^(\w+)\((.*)")


@dataclass
class Call:
    """The `number`-th call of this name that a process makes."""

    name: str
    number: int
    text: str


def model(folder: Path, seed: int) -> Path:
    """A model with weights in a file beside it, which a result in another folder needs a copy of."""
    rng = np.random.default_rng(seed)
    w, v = (rng.standard_normal(s).astype(np.float32) for s in ((64, 128), (128, 64)))
    proto = parse("(float[n, 64] x) => (float[n, 64] y) { m = MatMul(x, w)\n r = Relu(m)\n y = MatMul(r, v) }", w=w, v=v)
    folder.mkdir()
    onnx.save_model(proto, str(folder / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx"


def command(action: str, source: Path, target: Path) -> list[str]:
    return ["optimize", str(source), "-o", str(target), "--no-verify"] if action == "optimize" else ["build", str(source), "-o", str(target), "--no-engines", "--no-verify"]


def run(arguments: list[str], log: Path, *options: str) -> tuple[int, str]:
    """One command in a fork of this process, which has imported everything, under strace. Returns (exit code or minus the signal, stderr)."""
    from rewrite import sandbox
    from rewrite.cli import main

    sandbox.start()
    ready, go = os.pipe()
    errors = log.with_suffix(".stderr")
    child = os.fork()
    if child == 0:
        os.close(go)
        for stream, path in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # what pytest puts in their place writes elsewhere
        assert sandbox._child is not None
        sandbox._child.owner = os.getpid()  # the process that reads files is there already
        os.read(ready, 1)
        try:
            main(arguments, standalone_mode=True)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 3)
        except BaseException as error:
            os.write(2, f"traceback: {error!r}\n".encode())
            os._exit(4)
        os._exit(0)
    os.close(ready)
    tracer = subprocess.Popen(["strace", "-p", str(child), "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join('?' + c for c in CALLS)}", *options], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    told = tracer.stderr.readline()
    if "attached" not in told:
        os.kill(child, signal.SIGKILL)
    os.close(go)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tracer.stderr.close()
    tracer.wait()
    if "attached" not in told:
        raise RuntimeError(f"strace: {told.strip()}")
    return code, errors.read_text()


def calls_of(log: Path, folder: Path) -> list[Call]:
    """The calls that change something below `folder`, in order."""
    counts, found = Counter[str](), []
    for line in log.read_text(errors="replace").splitlines():
        matched = LINE.match(line)
        if matched is None:
            continue
        counts[matched[1]] += 1
        if str(folder) in line and not READING.match(line):
            found.append(Call(matched[1], counts[matched[1]], line))
    return found


def prepare(folder: Path, action: str, old: Path | None, write: Callable[..., Any]) -> Path:
    """A new folder with what an earlier command left there, or empty."""
    folder.mkdir()
    target = folder / ("plan" if action == "build" else "out.onnx")
    if old is not None:
        write(action, old, target)
    return target


def attempts(root: Path, report: Callable[[str], None] = lambda text: None) -> tuple[Counter[str], list[str]]:
    """Every call of both commands, in every way, over an old result and without one. Returns counts and what was wrong."""
    from test_torn_writes import content

    from rewrite.cli import main

    def write(action: str, source: Path, target: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(command(action, source, target), standalone_mode=False)

    counts, problems = Counter[str](), list[str]()
    first, second = model(root / "first", 1), model(root / "second", 2)
    for action in ("optimize", "build"):
        write(action, second, prepare(root / f"{action}-warm", action, first, write))  # everything is imported now
        for old in (first, None):
            folder = root / f"{action}-{'over' if old else 'new'}"
            target = prepare(folder, action, old, write)
            code, text = run(command(action, second, target), root / "log")
            assert code == 0, text
            new, calls = content(target), calls_of(root / "log", folder)
            beside = {p.name for p in folder.iterdir()}
            shutil.rmtree(folder)
            report(f"{action} {'over an old result' if old else 'anew'}: {len(calls)} calls, {dict(Counter(c.name for c in calls))}")
            for call in calls:
                for how in HOW:
                    for shift in SHIFTS:
                        inject = f"inject={call.name}:{'signal' if how == 'SIGKILL' else 'error'}={how}:when={max(1, call.number + shift)}"
                        target = prepare(folder, action, old, write)
                        before = content(target)
                        code, text = run(command(action, second, target), root / "log", "-e", inject)
                        after, left, hit = content(target), {p.name for p in folder.iterdir()} - beside, where_hit(root / "log", how)
                        shutil.rmtree(folder)
                        if str(folder) in hit:
                            break
                    else:
                        problems.append(f"{action}: {how}, {call.text[:160]} was never hit, but {hit}")
                        report(problems[-1])
                        continue
                    counts[f"{action} {call.name} {how}"] += 1
                    if wrong := problem(call, how, code, text, after, before, new, left):
                        problems.append(f"{action} {'over' if old else 'new'} {how} at {call.text[:160]}: {wrong}")
                        report(problems[-1])
    return counts, problems


def where_hit(log: Path, how: str) -> str:
    """The call that failed, or at which the process died: the last that it made."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in lines if "(INJECTED)" in line), "") if how != "SIGKILL" else lines[-2]


def problem(call: Call, how: str, code: int, text: str, after: Any, before: Any, new: Any, left: set[str]) -> str:
    """What is wrong with an outcome, or ""."""
    if after not in (before, new):
        return "neither the old result nor the new one is there"
    if how == "SIGKILL":
        return "" if code == -signal.SIGKILL else f"exit code {code}"
    if code == 0 and after == new and call.name == "mkdir" and "EEXIST" in call.text:
        return ""  # the folder is there, whatever else is said
    if code == 0 and after == new and call.name in CLEANING:
        return "" if all(name.startswith(".") for name in left) else f"left behind: {left}"
    if code != 2:
        return f"exit code {code}: {text[-300:]}"
    lines = [line for line in text.splitlines() if line not in PROGRESS]
    if len(lines) != 1 or not lines[0].startswith("rewrite: ") or os.strerror(getattr(errno, how)) not in text:
        return f"not one clear line: {text[-600:]!r}"
    if after == new != before and "nothing was changed" in text:
        return f"the new result is there, but it says: {text.strip()}"
    return f"left behind: {left}" if left else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/system_calls.json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts, problems = attempts(Path(folder), lambda text: print(text, flush=True))
    summary = {"injections": sum(counts.values()), "problems": len(problems), "seconds": round(time.perf_counter() - started), "by_call": dict(sorted(counts.items()))}
    print(summary)
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        strace = subprocess.run(["strace", "-V"], capture_output=True, text=True, check=True).stdout.split()[3]
        print(record.write("system_calls", record.cpu(), {**record.versions("onnx"), "strace": strace}, summary))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
