"""Matrix products by cuBLASLt, straight from its C library: CuPy's own calls refuse to be captured in a CUDA graph.

Source: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from rewrite.errors import RewriteError

WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType_t
COMPUTE_32F = 68  # sums in float32; float32 inputs are not rounded to TF32
TRANSPOSE_A, EPILOGUE, BIAS_POINTER = 3, 7, 8  # cublasLtMatmulDescAttributes_t
BATCH_COUNT, BATCH_STRIDE = 5, 6  # cublasLtMatrixLayoutAttribute_t
EPILOGUES = {(False, False): 1, (True, False): 4, (False, True): 2, (True, True): 6}  # by bias, relu


class _Heuristic(ctypes.Structure):
    _fields_ = [("algorithm", ctypes.c_uint64 * 8), ("workspace", ctypes.c_size_t), ("state", ctypes.c_int), ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]


@cache
def _library() -> tuple[Any, ctypes.c_void_p]:
    import cupy  # loads the CUDA libraries of its version

    _ = cupy.cuda.Device().cublas_handle
    for name in ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"):
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        handle = ctypes.c_void_p()
        _check(lib.cublasLtCreate(ctypes.byref(handle)), "cublasLtCreate")
        return lib, handle
    raise RewriteError("libcublasLt is not found; install the extra: pip install 'rewrite-onnx[gpu]'")


@cache
def _workspace() -> Any:
    import cupy

    return cupy.cuda.alloc(WORKSPACE)


def _check(status: int, what: str) -> None:
    if status:
        raise RewriteError(f"{what} fails with status {status}")


def _layout(lib: Any, kind: int, rows: int, columns: int, batch: int) -> ctypes.c_void_p:
    """A packed column-major matrix, `batch` of them in a row."""
    made = ctypes.c_void_p()
    _check(lib.cublasLtMatrixLayoutCreate(ctypes.byref(made), kind, ctypes.c_uint64(rows), ctypes.c_uint64(columns), ctypes.c_int64(rows)), "cublasLtMatrixLayoutCreate")
    if batch > 1:
        for attribute, value in ((BATCH_COUNT, ctypes.c_int32(batch)), (BATCH_STRIDE, ctypes.c_int64(rows * columns))):
            _check(lib.cublasLtMatrixLayoutSetAttribute(made, attribute, ctypes.byref(value), ctypes.sizeof(value)), "cublasLtMatrixLayoutSetAttribute")
    return made


def product(y: Any, x: Any, w: Any, *, trans_w: bool = False, bias: Any = None, residual: Any = None, relu: bool = False) -> Callable[[], None]:
    """A function that enqueues y = relu?(x @ w + bias) or y = x @ w + bias + residual on the current stream.

    CuPy arrays, packed, of one dtype: x [B, M, K], w [B, K, N] ([B, N, K] with `trans_w`), bias [N], residual and y
    [B, M, N]. Raises RewriteError if cuBLASLt has no kernel.
    """
    import cupy

    lib, handle = _library()
    batch, rows, inner = x.shape
    columns, kind = y.shape[-1], TYPES[x.dtype.name]
    description = ctypes.c_void_p()
    _check(lib.cublasLtMatmulDescCreate(ctypes.byref(description), COMPUTE_32F, TYPES["float32"]), "cublasLtMatmulDescCreate")
    settings: list[tuple[int, Any]] = [(EPILOGUE, ctypes.c_int32(EPILOGUES[bias is not None, relu]))]
    if trans_w:
        settings.append((TRANSPOSE_A, ctypes.c_int32(1)))
    if bias is not None:
        settings.append((BIAS_POINTER, ctypes.c_void_p(bias.data.ptr)))
    for attribute, value in settings:
        _check(lib.cublasLtMatmulDescSetAttribute(description, attribute, ctypes.byref(value), ctypes.sizeof(value)), "cublasLtMatmulDescSetAttribute")
    # Column-major, the product is y^T = w^T x^T.
    first = _layout(lib, kind, inner, columns, batch) if trans_w else _layout(lib, kind, columns, inner, batch)
    second, result = _layout(lib, kind, inner, rows, batch), _layout(lib, kind, columns, rows, batch)
    preference, limit = ctypes.c_void_p(), ctypes.c_uint64(WORKSPACE)
    _check(lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "cublasLtMatmulPreferenceCreate")
    _check(lib.cublasLtMatmulPreferenceSetAttribute(preference, 1, ctypes.byref(limit), 8), "cublasLtMatmulPreferenceSetAttribute")
    found, count = (_Heuristic * 1)(), ctypes.c_int()
    status = lib.cublasLtMatmulAlgoGetHeuristic(handle, description, first, second, result, result, preference, 1, found, ctypes.byref(count))
    lib.cublasLtMatmulPreferenceDestroy(preference)
    if status or not count.value:
        raise RewriteError(f"cuBLASLt has no kernel for {x.dtype} [{batch}, {rows}, {inner}] @ [{inner}, {columns}]")
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0 if residual is None else 1.0)
    source = y if residual is None else residual
    pointers = [ctypes.c_void_p(int(a.data.ptr)) for a in (w, x, source, y)]
    workspace = _workspace()
    kept = (x, w, bias, residual, y, workspace, found)  # what the captured call points at

    def launch() -> None:
        stream = ctypes.c_void_p(cupy.cuda.get_current_stream().ptr)
        status = lib.cublasLtMatmul(
            handle, description, ctypes.byref(one), pointers[0], first, pointers[1], second, ctypes.byref(zero), pointers[2], result, pointers[3], result,
            ctypes.byref(kept[-1][0]), ctypes.c_void_p(workspace.ptr), ctypes.c_size_t(WORKSPACE), stream,
        )  # fmt: skip
        _check(status, "cublasLtMatmul")

    return launch
