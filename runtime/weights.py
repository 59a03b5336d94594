"""Weights: read from an ONNX model where they lie, written to a safetensors file, and mapped back from it.

Nothing is held in memory at once: a tensor of the model is mapped from its file, and written in pieces. The reader is
ours because `safetensors.numpy` has no bfloat16 and no float8; the format is the library's.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from rewrite.errors import RewriteError

Array = np.ndarray[Any, Any]

NAMES = {
    "bool": "BOOL", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
TYPES = {code: np.dtype(getattr(ml_dtypes, name, None) or name) for name, code in NAMES.items()}


def tensor_array(tensor: onnx.TensorProto, folder: Path | None) -> Array:
    """The values of an initializer; those of external data are mapped from their file, not read."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    info = ExternalDataInfo(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    assert folder is not None
    return np.memmap(folder / info.location, dtype, "r", info.offset or 0, tuple(tensor.dims))


def write(file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write `tensors` as a safetensors file. Raises RewriteError for a type that the format lacks."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        if array.dtype.name not in NAMES:
            raise RewriteError(f"weight '{name}' is {array.dtype}, which safetensors cannot store; cast it when exporting")
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in tensors.values():
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def read(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file, mapped read-only. Raises RewriteError if it is not one, or was cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise RewriteError(f"{path}: not a safetensors file, or a truncated one; build the plan again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {n: (TYPES[e["dtype"]], tuple(e["shape"]), *e["data_offsets"]) for n, e in header.items()}
        except (ValueError, KeyError, TypeError) as error:
            raise RewriteError(f"{path}: not a safetensors file ({error}); build the plan again") from error
        if any(end > size - 8 - length for _, _, _, end in entries.values()):
            raise RewriteError(f"{path}: the file ends before its tensors do; build the plan again")
        if not any(end for _, _, _, end in entries.values()):
            return {n: np.zeros(shape, dtype) for n, (dtype, shape, _, _) in entries.items()}
        buffer = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if os.name == "posix" else file.read()
    start = 8 + length
    return {n: np.frombuffer(buffer, dtype, int(np.prod(shape, dtype=np.int64)), start + begin).reshape(shape) for n, (dtype, shape, begin, _) in entries.items()}
