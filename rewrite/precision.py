"""The same computation in float32: what a 16-bit function or model would give if it did not round or overflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

NARROW = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def is_narrow(dtype: Any) -> bool:
    return np.dtype(dtype).name in ("float16", "bfloat16")


def widen_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k: v.astype(np.float32) if is_narrow(v.dtype) else v for k, v in arrays.items()}


def widen_function(function: onnx.FunctionProto) -> onnx.FunctionProto:
    """The function with every 16-bit constant and cast in float32; its inputs are to be given in float32."""
    result = onnx.FunctionProto()
    result.CopyFrom(function)
    for node in result.node:
        _widen_node(node)
    return result


def widen_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every 16-bit float (weights, constants, casts, inputs, outputs) in float32."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _widen_graph(result.graph)
    for function in result.functions:
        for node in function.node:
            _widen_node(node)
    return result


def _widen_graph(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        _widen_node(node)
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    del graph.value_info[:]


def makes_bfloat16(function: onnx.FunctionProto) -> bool:
    """Whether a function has constants of bfloat16, or casts to it."""
    wide = onnx.TensorProto.BFLOAT16
    return any((a.HasField("t") and a.t.data_type == wide) or (a.name in ("to", "dtype") and a.i == wide) for n in function.node for a in n.attribute)


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        if attribute.HasField("g"):
            _widen_graph(attribute.g)
        if attribute.name in ("to", "dtype", "stash_type", "output_dtype") and attribute.i in NARROW:
            attribute.i = onnx.TensorProto.FLOAT


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in NARROW:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
