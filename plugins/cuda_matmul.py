"""CUDA kernels of the matrix products: ours (`gemm.cu`) for 16-bit floats on Hopper, with everything in the epilogue; else cuBLASLt
with bias, ReLU and residual in its epilogue, other activations and the gate in one pass after it. Sums are in float32.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

from rewrite.plugins import cuda_gemm, tuning
from rewrite.plugins.cublaslt import product
from rewrite.plugins.cuda_chain import Link
from rewrite.plugins.cuda_gemm import Product
from rewrite.plugins.cuda_launch import Launch

MANY = 256  # tokens from which a bare product is the library's, where nothing was measured
# Of v, in float32. erff and tanhf are the accurate ones.
ACTIVATIONS = {
    "none": "v",
    "gelu": "0.5f * v * (1.f + erff(v * 0.70710678f))",
    "gelu_tanh": "0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)))",
    "swish": "v / (1.f + expf(-v))",
    "quick_gelu": "v / (1.f + expf(-1.702f * v))",
    "relu": "v < 0.f ? 0.f : v",
    "relu2": "v < 0.f ? 0.f : v * v",
    "tanh": "tanhf(v)",
    "sigmoid": "1.f / (1.f + expf(-v))",
}


SOURCE = r"""
#include <cuda_fp16.h>
template <typename T> __device__ void pass(T* y, const T* a, const T* b, long long n) {  // 16 bytes a thread
    constexpr int W = 16 / sizeof(T);
    const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i * W >= n) return;
    union { uint4 bits; T at[W]; } first, second;
    const long long start = i * W, rest = n - start;
    if (rest >= W) {
        first.bits = ((const uint4*)a)[i];
        if (SECOND) second.bits = ((const uint4*)b)[i];
    } else {
        for (int j = 0; j < rest; ++j) { first.at[j] = a[start + j]; if (SECOND) second.at[j] = b[start + j]; }
    }
    #pragma unroll
    for (int j = 0; j < W; ++j) {
        const float v = (float)first.at[j];
        const float u = SECOND ? (float)second.at[j] : 0.f;
        first.at[j] = (T)(RESULT);
    }
    if (rest >= W) ((uint4*)y)[i] = first.bits;
    else for (int j = 0; j < rest; ++j) y[start + j] = first.at[j];
}
extern "C" __global__ void pass_float32(float* y, const float* a, const float* b, long long n) { pass<float>(y, a, b, n); }
extern "C" __global__ void pass_float16(__half* y, const __half* a, const __half* b, long long n) { pass<__half>(y, a, b, n); }
"""


@cache
def _pass(result: str, second: bool, dtype: str) -> Any:
    """y = result(v of a, u of b), element by element, for packed arrays at addresses that are multiples of 16."""
    import cupy

    code = SOURCE.replace("SECOND", "1" if second else "0").replace("RESULT", result)
    return cupy.RawModule(code=code, options=("--std=c++17",)).get_function(f"pass_{dtype}")


def elementwise(result: str, y: Any, a: Any, b: Any = None) -> Launch:
    """A function that enqueues y = result, an expression in v (an element of `a`) and u (of `b`), in float32."""
    import cupy

    kernel, per = _pass(result, b is not None, y.dtype.name), 16 // y.itemsize
    blocks = -(-y.size // (256 * per))
    arguments = (y, a, a if b is None else b, cupy.int64(y.size))
    return lambda: kernel((blocks,), (256,), arguments)


def _supported(*arrays: Any) -> bool:
    return all(a is None or a.dtype.name in ("float16", "float32") for a in arrays)


def _matrix(a: Any) -> Any:
    """[..., N] as one batch of rows, [1, M, N]."""
    return a.reshape(1, -1, a.shape[-1])


def _rows(a: Any) -> Any:
    return None if a is None else a.reshape(-1, a.shape[-1])


def merged_matmul_act(calls: list[tuple[list[Any], list[Any]]], *, activation: str, trans_w: int) -> Launch | None:
    """Several products of one input, as of queries, keys and values, in one launch."""
    x = _rows(calls[0][0][0])
    products = [Product(_rows(outputs[0]), inputs[1], inputs[2], _rows(inputs[3])) for inputs, outputs in calls]
    if not trans_w or not cuda_gemm.supported(x, products):
        return None
    found = cuda_gemm.candidates(x, products, activation)
    return tuning.pick(cuda_gemm.key(x, products, activation), found, next(iter(found)))


def matmul_link(inputs: list[Any], outputs: list[Any], *, activation: str, trans_w: int) -> Link | None:
    x, w, bias, residual = inputs
    return Link(_rows(x), [Product(_rows(outputs[0]), w, bias, _rows(residual))], activation) if trans_w else None


def gated_link(inputs: list[Any], outputs: list[Any], *, activation: str, merged: str, trans_w: int) -> Link | None:
    x, w_gate, w_up, bias_gate, bias_up = inputs
    if not trans_w or merged != "none" or w_up is None:
        return None
    return Link(_rows(x), [Product(_rows(outputs[0]), w_gate, bias_gate), Product(_rows(outputs[0]), w_up, bias_up)], activation, gated=True)


def matmul_act(inputs: list[Any], outputs: list[Any], *, activation: str, trans_w: int) -> Launch | None:
    x, w, bias, residual = inputs
    products, rows = [Product(_rows(outputs[0]), w, bias, _rows(residual))], _rows(x)
    if not trans_w or not cuda_gemm.supported(rows, products):
        return _library(inputs, outputs, activation, trans_w) if _supported(*inputs) else None
    found = cuda_gemm.candidates(rows, products, activation)
    default = next(iter(found))
    if _supported(*inputs):
        found["cuBLASLt"] = partial(_library, inputs, outputs, activation, trans_w)
        if activation == "none" and len(rows) >= MANY:
            default = "cuBLASLt"
    return tuning.pick(cuda_gemm.key(rows, products, activation), found, default)


def _library(inputs: list[Any], outputs: list[Any], activation: str, trans_w: int) -> Launch:
    x, w, bias, residual = inputs
    y = _matrix(outputs[0])
    added = None if residual is None else _matrix(residual)
    late = activation not in ("none", "relu") or (activation == "relu" and residual is not None)
    multiply = product(
        y, _matrix(x), w[None], trans_w=bool(trans_w), bias=bias, residual=None if late else added, relu=activation == "relu" and not late,
    )  # fmt: skip
    if not late:
        return multiply
    activate = elementwise(f"({ACTIVATIONS[activation]}){' + u' if added is not None else ''}", y, y, added)

    def launch() -> None:
        multiply()
        activate()

    return launch


def gated_matmul_act(inputs: list[Any], outputs: list[Any], *, activation: str, merged: str, trans_w: int) -> Launch | None:
    import cupy

    x, w_gate, w_up, bias_gate, bias_up = inputs
    if trans_w and merged == "none" and w_up is not None:
        products = [Product(_rows(outputs[0]), w_gate, bias_gate), Product(_rows(outputs[0]), w_up, bias_up)]
        if cuda_gemm.supported(_rows(x), products):
            found = cuda_gemm.candidates(_rows(x), products, activation, gated=True)
            return tuning.pick(cuda_gemm.key(_rows(x), products, activation, gated=True), found, next(iter(found)))
    if not _supported(*inputs) or merged != "none" or w_up is None:
        return None
    y = _matrix(outputs[0])
    gate, up = cupy.empty_like(y), cupy.empty_like(y)
    first = product(gate, _matrix(x), w_gate[None], trans_w=bool(trans_w), bias=bias_gate)
    second = product(up, _matrix(x), w_up[None], trans_w=bool(trans_w), bias=bias_up)
    combine = elementwise(f"({ACTIVATIONS[activation]}) * u", y, gate, up)

    def launch() -> None:
        first()
        second()
        combine()

    return launch
