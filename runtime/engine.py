"""TensorRT engines from ONNX segments. Building needs no GPU; TensorRT for RTX is used, else the full TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import onnx

from rewrite.errors import RewriteError
from rewrite.graph import Dim
from rewrite.runtime.profile import Profile


@cache
def tensorrt() -> ModuleType:
    """The installed TensorRT module. Raises RewriteError if there is none."""
    for name in ("tensorrt_rtx", "tensorrt"):
        try:
            return __import__(name)
        except ImportError:
            continue
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


def build_engine(segment: onnx.ModelProto, shapes: Mapping[str, tuple[Dim, ...]], profile: Profile) -> bytes:
    """Compile one segment; `shapes` gives the shape of each of its inputs in the model's named dimensions.

    Precision is what the model says (strongly typed, no TF32). Raises RewriteError that names the node TensorRT stops at.
    """
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
            ranges.set_shape(name, *profile.shapes(name, shape))
        config.add_optimization_profile(ranges)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RewriteError(f"TensorRT cannot build the segment: {_first(log.lines)}. {_ADVICE}")
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


def execution_context(loaded: Any) -> Any:
    """A context of an engine; TensorRT for RTX compiles kernels for the sizes at hand at once, not in the background."""
    trt = tensorrt()
    if not hasattr(loaded, "create_runtime_config"):
        return loaded.create_execution_context()
    config = loaded.create_runtime_config()
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return loaded.create_execution_context(config)
