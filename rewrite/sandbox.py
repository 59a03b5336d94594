"""A child process that meets a file first, and that runs whole models: what hangs, crashes or eats the memory does it there.

onnx and ONNX Runtime are C++ that trusts what it reads: an `Einsum` of 92 bytes keeps them busy for ever. So `rehearse`
has a file parsed, checked and its shapes inferred in a child under limits of time and memory; the caller does the same
only after that came to an end. `compare` and `run` let ONNX Runtime execute a model there and bring back the outcome.

One child serves all calls of a process. It has imported what it needs, has one thread, and forks for each request, so
that a request costs milliseconds; `start` starts it while the caller is still importing. Models and arrays go to and
fro as files in memory (protobuf, .npz), questions and answers as lines of JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import CheckFailed, RewriteError, Unfinished

if TYPE_CHECKING:
    import numpy as np

    from rewrite.model import Model

GIGABYTE = 1 << 30
READ_SECONDS, READ_RATE = 8, 10e6  # of processor time for a small file; bytes of a large one for which there is a second more
RUN_SECONDS, RUN_RATE = 6, 10e6  # the same for running a model
PATIENCE = 6  # a child may be kept waiting by others: so much longer by the clock
ASKED_FOR = 600  # times as long for inputs that the user gave, which may be large
READ_MEMORY, READ_FACTOR = 7 * GIGABYTE // 4, 8  # bytes for a small file (with the interpreter itself below 2 GiB); more for each byte of a large one
FREE = 0.9  # of the memory that the machine has free, at most
MESSAGE = 1 << 16
MOST_FILES = 250  # in one message, by the kernel
BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from rewrite.sandbox import serve; serve(int(sys.argv[1]))"
SMALLER = "give smaller inputs with --inputs FILE.npz"  # what to do about it
SITE = "it is left as it is"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Died(Exception):
    """The child did not answer: the message says how it ended."""


# --- in the caller --------------------------------------------------------------------------------------------------
class Child:
    """The serving process and our end of the line to it."""

    def __init__(self) -> None:
        if not sys.executable:
            raise RewriteError("there is no Python interpreter (sys.executable) to read files in a process of its own; give an onnx.ModelProto instead of a path")
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-c", BOOT, str(theirs.fileno()), json.dumps([os.path.abspath(p) for p in sys.path])]
            quiet = subprocess.DEVNULL
            self.process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, pass_fds=[theirs.fileno()], env={**os.environ, **ONE_THREAD}, start_new_session=True)

    def ask(self, request: Mapping[str, Any], files: list[int], seconds: float) -> dict[str, Any]:
        """The child's answer. Raises Died if there is none in time."""
        self.socket.settimeout(seconds)
        try:
            with _in_memory(json.dumps(request).encode()) as question:
                socket.send_fds(self.socket, [b"?"], [question, *files])
            answer = self.socket.recv(MESSAGE)
        except TimeoutError as error:
            raise Died(f"it takes more than {seconds:.0f} s") from error
        except OSError as error:
            raise Died(f"its process is gone ({error.strerror})") from error
        if not answer:
            raise Died("its process is gone")
        found: dict[str, Any] = json.loads(answer)
        if "died" in found:
            raise Died(found["died"])
        return found

    def close(self) -> None:
        """End it, and whatever it is busy with."""
        self.socket.close()
        if self.owner == os.getpid():  # a fork of the caller leaves it alone
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


_child: Child | None = None
_lock = threading.RLock()


def start() -> None:
    """Have the child ready. Returns at once; the child goes on starting meanwhile."""
    global _child
    with _lock:
        if _child is None or _child.owner != os.getpid() or _child.process.poll() is not None:
            stop()
            _child = Child()


@atexit.register
def stop() -> None:
    """End the child, if there is one; the next request starts another."""
    global _child
    with _lock:
        old, _child = _child, None
        if old is not None:
            old.close()


def _ask(request: Mapping[str, Any], files: list[int], seconds: float) -> dict[str, Any]:
    with _lock:
        start()
        assert _child is not None
        try:
            return _child.ask(request, files, seconds)
        except BaseException:  # it may be busy still, or answer later
            stop()
            raise


def rehearse(path: Path, file: int, size: int) -> None:
    """Parse, check and infer an open model file in the child. Raises RewriteError if that hangs, crashes, or takes too much memory.

    An error in the file is none here: the caller meets it, too, and tells it.
    """
    seconds, memory = READ_SECONDS + size / READ_RATE, min(READ_MEMORY + READ_FACTOR * size, _free_memory())
    request = {"do": "rehearse", "path": str(path), "seconds": seconds, "memory": memory}
    try:
        _ask(request, [file], PATIENCE * seconds)
    except Died as reason:
        raise RewriteError(f"{path}: refused, because reading it does not end well: {reason}; export the model again, or split it if it is sound") from reason


def compare_generator(decoder: Model, generator: Model, tolerance: float) -> float:
    """`rewrite.verify_generator.check_generator` in the child. Raises RewriteError if it hangs, crashes, or takes too much memory."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_in_memory(m.proto.SerializeToString())) for m in (decoder, generator)]
        request = {"do": "generate", "models": [_description(decoder), _description(generator)], "tolerance": tolerance}
        return float(_run(decoder, request, files, False, "leave the check out with --no-verify")["error"])


def compare(one: Model, other: Model, inputs: list[dict[str, np.ndarray[Any, Any]]] | None, tolerance: float, advice: str = SMALLER) -> float:
    """`rewrite.verify.check_models` in the child. Raises RewriteError, with the advice, if it hangs, crashes, or takes too much memory."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_in_memory(m.proto.SerializeToString())) for m in (one, other)]
        files += [stack.enter_context(_arrays(feeds)) for feeds in inputs or ()]
        request = {"do": "compare", "models": [_description(one), _description(other)], "generate": inputs is None, "tolerance": tolerance}
        return float(_run(one, request, files, bool(inputs), advice)["error"])


def run(model: Model, inputs: Mapping[str, np.ndarray[Any, Any]], advice: str = SMALLER) -> dict[str, np.ndarray[Any, Any]]:
    """`rewrite.verify.run_model` in the child: the outputs by name. Raises RewriteError as `compare` does.

    With the usual advice the inputs are the user's, who may want to wait; with another, generated.
    """
    (result,) = run_each(model, [inputs], advice)
    if isinstance(result, RewriteError):
        raise result
    return result


def run_each(model: Model, inputs: list[Mapping[str, np.ndarray[Any, Any]]], advice: str = SMALLER) -> list[dict[str, np.ndarray[Any, Any]] | RewriteError]:
    """The same for several inputs at once, which costs the transfer of the model once; those it cannot run on have their error."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_in_memory(model.proto.SerializeToString()))
        feeds = [stack.enter_context(_arrays(f)) for f in inputs]
        results = [stack.enter_context(_in_memory(b"")) for _ in inputs]
        answer = _run(model, {"do": "run", "models": [_description(model)]}, [file, *feeds, *results], advice == SMALLER, advice)
        return [RewriteError(reason) if reason else read_arrays(os.dup(r)) for reason, r in zip(answer["reasons"], results, strict=True)]


def _run(model: Model, request: dict[str, Any], files: list[int], asked_for: bool, advice: str) -> dict[str, Any]:
    from rewrite.weights import external_size

    size = os.fstat(files[0]).st_size + external_size(model.external)  # the first file is the model
    seconds, memory = (RUN_SECONDS + size / RUN_RATE) * (ASKED_FOR if asked_for else 1), _free_memory()
    if not asked_for:
        memory = min(memory, READ_MEMORY + READ_FACTOR * size)
    if model.external:
        seconds *= os.cpu_count() or 1  # it runs on all of them
    try:
        answer = _ask({**request, "seconds": seconds, "memory": memory}, files, PATIENCE * seconds)
    except Died as reason:
        raise Unfinished(f"{model.name}: running it in ONNX Runtime does not end well: {reason}; {advice}") from reason
    if "failed" in answer:
        raise CheckFailed(answer["failed"])
    if "refused" in answer:
        raise RewriteError(answer["refused"])
    return answer


def _description(model: Model) -> dict[str, Any]:
    return {"name": model.name, "folder": None if model.folder is None else str(model.folder), "external": {n: str(p) for n, p in model.external.items()}}


def _free_memory() -> int:
    """Bytes that can be used without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(FREE * 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    except (OSError, StopIteration, ValueError):
        return 8 * GIGABYTE


@contextlib.contextmanager
def _in_memory(data: bytes) -> Iterator[int]:
    file = os.memfd_create("rewrite")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def _arrays(arrays: Mapping[str, Any]) -> Iterator[int]:
    with _in_memory(b"") as file:
        write_arrays(file, list(arrays), list(arrays.values()))
        yield file


def write_arrays(file: int, names: list[str], values: list[Any]) -> None:
    """Arrays as .npz; strings that came as Python objects are written as text, other objects refused."""
    import numpy as np

    plain = {}
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        try:
            array = np.asarray(value)
        except ValueError as error:  # a sequence of tensors of several shapes
            raise RewriteError(f"'{name}' is no array of numbers or strings") from error
        if array.dtype.kind == "O":
            if not all(isinstance(x, str) for x in array.reshape(-1)):
                raise RewriteError(f"'{name}' is no array of numbers or strings")
            array = array.astype(str)
        plain[f"a{index}"] = array
    plain["names"], plain["types"] = np.array(names, str), np.array([np.asarray(v).dtype.name for v in values], str)
    with os.fdopen(os.dup(file), "wb") as stream:
        np.savez(stream, allow_pickle=False, **plain)


def read_arrays(file: int) -> dict[str, Any]:
    """What `write_arrays` wrote; closes the file."""
    import ml_dtypes  # noqa: F401  gives NumPy the names of its types
    import numpy as np

    with os.fdopen(file, "rb") as stream:
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as arrays:
            kinds = [str(k) for k in arrays["types"]]
            return {str(n): _as(arrays[f"a{i}"], kinds[i]) for i, n in enumerate(arrays["names"])}


def _as(array: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    import numpy as np

    return array.view(np.dtype(kind)) if array.dtype.kind == "V" else array.astype(object) if kind == "object" else array


# --- in the child ---------------------------------------------------------------------------------------------------
def serve(line: int) -> None:
    """Answer requests until the caller is gone. Each is answered by a fork of this process, under the request's limits."""
    import rewrite.model  # noqa: F401  what each fork needs

    with socket.socket(fileno=line) as caller:
        while True:
            message, files, _, _ = socket.recv_fds(caller, 1, MOST_FILES)
            if not message:
                os._exit(0)
            with os.fdopen(files.pop(0), "rb") as question:
                question.seek(0)
                request = json.load(question)
            if request["do"] != "rehearse":
                import onnxruntime  # noqa: F401
            fork = os.fork()
            if fork == 0:
                _answer(caller, request, files)
            for file in files:
                os.close(file)
            ended = _how_it_ended(os.wait4(fork, 0)[1], request["seconds"])
            if ended:
                caller.sendall(json.dumps({"died": ended}).encode())


def _how_it_ended(status: int, seconds: float) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return f"it takes more than {seconds:.0f} s"
    if code == MEMORY_CODE:
        return "it takes more memory than a file of its size may, or than is free"
    return f"it ends by {signal.Signals(-code).name}" if code < 0 else f"it ends with code {code}" if code else ""


MEMORY_CODE = 17


def _answer(caller: socket.socket, request: dict[str, Any], files: list[int]) -> None:
    """Do what is asked for, say so, and end."""
    code = 1
    try:
        _limit(request["seconds"], request["memory"])
        caller.sendall(json.dumps(WORK[request["do"]](request, files)).encode())
        code = 0
    except MemoryError:
        code = MEMORY_CODE
    finally:
        os._exit(code)


def _limit(seconds: float, memory: int) -> None:
    """Of this process, from here on: processor time, memory, no core dump."""
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + memory
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))
    cpu = int(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _rehearse(request: dict[str, Any], files: list[int]) -> dict[str, Any]:
    from rewrite.model import infer, read

    path = Path(request["path"])
    try:
        with os.fdopen(files[0], "rb") as stream:
            infer(read(path, stream.read()))
    except MemoryError:
        raise
    except Exception:  # the caller will meet it, too, and tell it
        return {}
    return {}


def _models(request: dict[str, Any], files: list[int]) -> list[Model]:
    import onnx

    from rewrite.model import Model

    made = []
    for told, file in zip(request["models"], files, strict=False):
        with os.fdopen(file, "rb") as stream:
            stream.seek(0)
            proto = onnx.load_model_from_string(stream.read())
        made.append(Model(proto, None if told["folder"] is None else Path(told["folder"]), told["name"], {n: Path(p) for n, p in told["external"].items()}))
    return made


def _compare(request: dict[str, Any], files: list[int]) -> dict[str, Any]:
    from rewrite.verify import check_models

    one, other = _models(request, files)
    try:
        return {"error": check_models(one, other, None if request["generate"] else [read_arrays(f) for f in files[2:]], request["tolerance"])}
    except CheckFailed as error:
        return {"failed": str(error)}
    except RewriteError as error:
        return {"refused": str(error)}


def _compare_generator(request: dict[str, Any], files: list[int]) -> dict[str, Any]:
    from rewrite.verify_generator import check_generator

    decoder, generator = _models(request, files)
    try:
        return {"error": check_generator(decoder, generator, request["tolerance"])}
    except CheckFailed as error:
        return {"failed": str(error)}
    except RewriteError as error:
        return {"refused": str(error)}


def _run_model(request: dict[str, Any], files: list[int]) -> dict[str, Any]:
    from rewrite.verify import file_session, run_session

    (model,) = _models(request, files[:1])
    feeds, results = files[1 : len(files) // 2 + 1], files[len(files) // 2 + 1 :]
    try:
        runner = file_session(model)
    except RewriteError as error:
        return {"refused": str(error)}
    reasons = []
    for given, made in zip(feeds, results, strict=True):
        reason = ""
        try:
            found = run_session(runner, read_arrays(given), model.name)
            write_arrays(made, list(found), list(found.values()))
        except RewriteError as error:
            reason = str(error)
        reasons.append(reason)
    return {"reasons": reasons}


WORK = {"rehearse": _rehearse, "compare": _compare, "run": _run_model, "generate": _compare_generator}
