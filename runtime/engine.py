"""TensorRT engines from ONNX segments. Building needs no GPU; TensorRT for RTX is used, else the full TensorRT."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from rewrite.errors import RewriteError, interrupted
from rewrite.files import write_atomically
from rewrite.graph import Dim
from rewrite.runtime.profile import Profile

# What an engine can read and write.
TYPES = {getattr(onnx.TensorProto, k) for k in ("FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT4E2M1", "INT4", "INT8", "UINT8", "INT32", "INT64", "BOOL")}


@cache
def tensorrt() -> ModuleType:
    """The installed TensorRT module. Raises RewriteError if there is none."""
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            return __import__(name)
        except ImportError as error:
            if interrupted(error):
                raise
    raise RewriteError("TensorRT is not installed; `pip install 'tensorrt-rtx>=1.6,<1.7'`, or build with --no-engines for the CPU alone")


def version() -> str:
    return f"{tensorrt().__name__} {tensorrt().__version__}"


@cache
def logger() -> Any:
    """TensorRT's logger of this process."""
    trt = tensorrt()

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        """Keeps what TensorRT complains about, for our error messages; prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(message.strip())

    return Log()


def build_engine(segment: onnx.ModelProto, shapes: Mapping[str, tuple[Dim, ...]], profile: Profile, names: Mapping[str, str] | None = None) -> bytes:
    """Compile one segment; `shapes` gives the shape of each of its inputs in the model's named dimensions, `names` what
    its inputs and outputs are called in the model, for errors.

    Precision is what the model says (strongly typed, no TF32); TensorRT lacks float64, and computes it in float32 inside a segment.
    Raises RewriteError that names the node TensorRT stops at, or the input or output of a type that it lacks.
    """
    called = names or {}
    for value in (*segment.graph.input, *segment.graph.output):
        element = value.type.tensor_type.elem_type
        if element not in TYPES:  # float64 it would take for float32, and read and write other bytes than there are
            kind = onnx.TensorProto.DataType.Name(element).lower()
            raise RewriteError(f"TensorRT has no {kind}, which '{called.get(value.name, value.name)}' is; cast it when exporting, or build with --no-engines for the CPU alone")
    trt, log = tensorrt(), logger()
    log.lines.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(segment.SerializeToString()):
        raise RewriteError(_parse_error(parser, log.lines))
    _decompose_attention(trt, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if any(not isinstance(d, int) for shape in shapes.values() for d in shape):
        ranges = builder.create_optimization_profile()
        for name, shape in shapes.items():
            ranges.set_shape(name, *profile.shapes(called.get(name, name), shape))
        config.add_optimization_profile(ranges)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RewriteError(f"TensorRT cannot build the segment at the profile's sizes ({profile}): {_first(log.lines)}. Give others with --profile if the model has no such sizes. {_ADVICE}")
    return bytes(plan)


_ADVICE = "Fuse that node into a plugin (`rewrite list` shows them, the README how to write one), or build with --no-engines for the CPU alone"


def _first(lines: list[str]) -> str:
    return lines[0].splitlines()[0][:300] if lines else "it gives no reason"


def _parse_error(parser: Any, lines: list[str]) -> str:
    if not parser.num_errors:
        return f"TensorRT cannot read the segment: {_first(lines)}. {_ADVICE}"
    error = parser.get_error(0)
    name = error.node_name() or "?"
    # The first line repeats the name; a further one that names the API's error says what is wrong.
    reasons = [x.strip() for x in error.desc().splitlines() if x.strip() and "Cuda Runtime" not in x]
    reason = next((x for x in reasons if "Error Code" in x), reasons[0] if reasons else "it gives no reason")
    return f"TensorRT cannot compile node '{name}' ({error.node_operator()}): {reason[:300]}. {_ADVICE}"


def _decompose_attention(trt: ModuleType, network: Any) -> None:
    """Allow TensorRT to split ONNX Attention where it has no kernel for its types (fp32, boolean masks)."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to downcast a layer
            layer.attention.decomposable = True


# --- running ------------------------------------------------------------------------------------------------------
def complaint() -> str:
    """What TensorRT last complained about."""
    lines = logger().lines
    return lines[-1].splitlines()[0][:300] if lines else "it gives no reason"


def runtime() -> Any:
    """What deserializes engines. Engines that hold code for the host, which would run as us, are refused by it."""
    made = tensorrt().Runtime(logger())
    made.engine_host_code_allowed = False
    return made


def deserialize(runtime: Any, data: bytes, where: str) -> Any:
    """An engine from its bytes, which the caller has compared with their SHA-256. Raises RewriteError with TensorRT's reason."""
    logger().lines.clear()
    loaded = runtime.deserialize_cuda_engine(data)
    if loaded is None:
        said = complaint()
        raise RewriteError(f"{where}: TensorRT refuses it on this GPU: {_invalidity(runtime, data) or said}; build the plan again on this machine")
    return loaded


def _invalidity(runtime: Any, data: bytes) -> str:
    """Why an engine does not fit this machine, as far as TensorRT can tell: `unsupported cc`, `old cuda driver`; or ""."""
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    _, found = runtime.get_engine_validity(data)
    kinds = getattr(tensorrt(), "EngineInvalidityDiagnostics", None)
    names = kinds.__members__.items() if kinds is not None else ()
    return ", ".join(n.lower().replace("_", " ") for n, bit in names if int(found) & int(bit))


def fixed() -> bool:
    """Whether engines run only on the GPU model they were built on; those of TensorRT for RTX run on several."""
    return tensorrt().__name__ == "tensorrt"


def capability() -> str:
    """The compute capability of the present GPU, "9.0". Raises RewriteError if there is none."""
    from rewrite.runtime.cuda import device

    digits = str(device().cuda.Device().compute_capability)
    return f"{digits[:-1]}.{digits[-1]}"


def gpu_model() -> str:
    """The name of the present GPU. Raises RewriteError if there is none."""
    from rewrite.runtime.cuda import device

    runtime = device().cuda.runtime
    return str(runtime.getDeviceProperties(runtime.getDevice())["name"].decode())


def gpu() -> str:
    """The present GPU: its model, compute capability and driver, all that kernels compiled for it depend on."""
    from rewrite.runtime.cuda import device

    return f"{gpu_model()}, {capability()}, driver {device().cuda.runtime.driverGetVersion()}"


def execution_context(loaded: Any, kernels: KernelCache | None = None) -> Any:
    """A context of an engine; TensorRT for RTX compiles kernels for the sizes at hand at once, not in the background, and
    takes those that `kernels` has."""
    trt = tensorrt()
    if not hasattr(loaded, "create_runtime_config"):
        return loaded.create_execution_context()
    config = loaded.create_runtime_config()
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if kernels is not None:
        kernels.attach(config)
    return loaded.create_execution_context(config)


class KernelCache:
    """The kernels that TensorRT for RTX compiled when engines first ran, kept in a file from one start to the next.

    One cache serves all engines of a plan. The file lies in the user's cache folder ($XDG_CACHE_HOME or ~/.cache), is
    named by what its content depends on, and begins with the SHA-256 of the rest. One that is damaged, or that another user could
    have written, is not read: then the kernels are compiled again. TensorRT itself compares versions, driver and GPU.
    """

    def __init__(self, engines: Iterable[str], device: str):
        """`engines` are the digests of the plan's engines, `device` names the GPU and its driver."""
        told = "\n".join([version(), device, *sorted(engines)])
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.path = Path(home) / "rewrite" / "kernels" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.bin"
        self.cache: Any = None
        self.saved = b""

    def attach(self, config: Any) -> None:
        """Let the contexts made with this runtime configuration use the cache; nothing where TensorRT has none."""
        if not hasattr(config, "create_runtime_cache"):
            return
        if self.cache is None:
            self.cache = config.create_runtime_cache()
            content = self.read()
            if content and self.cache.deserialize(content):
                self.saved = hashlib.sha256(content).digest()
        config.set_runtime_cache(self.cache)

    def read(self) -> bytes:
        """The content of the file; nothing if it is missing, damaged, a link, or not ours alone to write."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return b""
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o022:
            os.close(descriptor)
            return b""
        with os.fdopen(descriptor, "rb") as file:
            digest, content = file.read(32), file.read()
        return content if hashlib.sha256(content).digest() == digest else b""

    def save(self) -> None:
        """Write the cache to its file if it has grown; called after engines ran for the first time. A full disk is no error."""
        if self.cache is None:
            return
        memory = self.cache.serialize()
        content = bytes(memory) if memory is not None else b""
        digest = hashlib.sha256(content).digest()
        if not content or digest == self.saved:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(digest + content))
            os.chmod(self.path, 0o600)
            self.saved = digest
        except (OSError, RewriteError):
            return
