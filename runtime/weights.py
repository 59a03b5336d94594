"""Weights: read from an ONNX model where they lie, written to a safetensors file, and mapped back from it.

Nothing is held in memory at once: a tensor of the model is mapped from its file, and written in pieces. The reader is
ours because `safetensors.numpy` has no bfloat16 and no float8; the format is the library's.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

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


class Sink(Protocol):
    def write(self, data: bytes | memoryview, /) -> object: ...


def write(file: Sink, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
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
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return parse(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b"", path)


def parse(data: bytes | mmap.mmap, path: Path) -> dict[str, Array]:
    """The tensors in the content of a safetensors file, not copied; `path` is for errors. Raises RewriteError as `read` does."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise RewriteError(f"{path}: not a safetensors file, or a truncated one; build the plan again")
    start, found = 8 + length, {}
    try:
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            dtype, shape, (begin, end) = TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            count = math.prod(shape)
            if begin < 0 or any(n < 0 for n in shape) or end - begin != count * dtype.itemsize:
                raise ValueError(f"tensor '{name[:100]}' has another size than its shape says")
            if end > len(data) - start:
                raise RewriteError(f"{path}: the file ends before its tensors do; build the plan again")
            found[name] = (np.frombuffer(data, dtype, count, start + begin) if count else np.zeros(0, dtype)).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RewriteError(f"{path}: not a safetensors file ({error}); build the plan again") from error
    return found


def header_size(data: bytes | mmap.mmap, path: Path) -> int:
    """Bytes before the first tensor of a safetensors file. Raises RewriteError if it is not one."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise RewriteError(f"{path}: not a safetensors file, or a truncated one; build the plan again")
    return 8 + length


def places(data: bytes | mmap.mmap, path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends, in bytes of the file. Raises RewriteError if it is not one."""
    start = header_size(data, path)
    try:
        header = json.loads(data[8:start])
        return {name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise RewriteError(f"{path}: not a safetensors file ({error}); build the plan again") from error
