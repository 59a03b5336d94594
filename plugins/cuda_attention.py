"""CUDA kernels of attention, three of them.

`attention.cu`, ours: 16-bit floats, head sizes that are multiples of 16 up to 128, every mask. cuDNN's: long rows, float16, no
soft cap, no boolean mask, no rows of NaN to mend. Products by cuBLAS around a softmax: everything else, float32 too; scores are
read once and weights written once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

from rewrite.plugins import tuning
from rewrite.plugins.cublaslt import product
from rewrite.plugins.cuda_launch import Launch, capability, launcher, module, tensor_map, wgmma

SOFTMAX = r"""
#include <cuda_fp16.h>
#define INF __int_as_float(0x7f800000)
template <typename T, int MASK>  // MASK: 0 none, 1 boolean, 2 added
__device__ void row(T* x, const void* mask, long long t, long long s, int heads, const long long* strides,
                    float scale, float cap, float fill, int drop, int zero, int causal) {
    extern __shared__ float buffer[];
    __shared__ float shared[32];
    const long long r = blockIdx.x;
    const long long q = r % s, h = (r / s) % heads, b = r / s / heads;
    const char* base = nullptr;
    if (MASK) base = (const char*)mask + (b * strides[0] + h * strides[1] + q * strides[2]) * (MASK == 1 ? 1 : (long long)sizeof(T));
    T* p = x + r * t;
    float top = -INF;
    bool broken = false;
    for (long long i = threadIdx.x; i < t; i += blockDim.x) {
        float v = (float)p[i] * scale;
        if (cap != 0.f) v = cap * tanhf(v / cap);
        if (MASK == 1) v = ((((const bool*)base)[i * strides[3]]) != (bool)drop) ? v : fill;
        if (MASK == 2) v += (float)((const T*)base)[i * strides[3]];
        if (causal && i > q) v = -INF;
        buffer[i] = v;
        broken |= isnan(v);
        top = fmaxf(top, v);
    }
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = top;
    __syncthreads();
    top = shared[0];
    for (int i = 1; i < (blockDim.x >> 5); ++i) top = fmaxf(top, shared[i]);
    broken = __syncthreads_or(broken);
    float sum = 0.f;
    for (long long i = threadIdx.x; i < t; i += blockDim.x) { float e = expf(buffer[i] - top); buffer[i] = e; sum += e; }
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0.f;
    for (int i = 0; i < (blockDim.x >> 5); ++i) sum += shared[i];
    if (broken) sum = __int_as_float(0x7fc00000);
    for (long long i = threadIdx.x; i < t; i += blockDim.x) {
        float w = buffer[i] / sum;
        p[i] = (T)((zero && isnan(w)) ? 0.f : w);
    }
}
#define KERNEL(NAME, T, MASK) extern "C" __global__ void NAME(T* x, const void* mask, long long t, long long s, int heads, \
    const long long* strides, float scale, float cap, float fill, int drop, int zero, int causal) \
    { row<T, MASK>(x, mask, t, s, heads, strides, scale, cap, fill, drop, zero, causal); }
KERNEL(softmax_float32_0, float, 0) KERNEL(softmax_float32_1, float, 1) KERNEL(softmax_float32_2, float, 2)
KERNEL(softmax_float16_0, __half, 0) KERNEL(softmax_float16_1, __half, 1) KERNEL(softmax_float16_2, __half, 2)
"""
SHORT = 256  # keys up to which our kernel is the faster one
LONGEST = 12000  # keys: a row of scores lies in 48 KB of shared memory


@cache
def _module() -> Any:
    import cupy

    return cupy.RawModule(code=SOFTMAX, options=("--std=c++17",))


@cache
def _cudnn() -> Any:
    """The cuDNN front end and a handle, or None if it is not installed."""
    try:
        import cudnn
    except ImportError:
        return None
    return cudnn, cudnn.create_handle()


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "y", "mask")), *((n, ctypes.c_longlong * 3) for n in ("qs", "ks", "vs", "ys")), ("ms", ctypes.c_longlong * 4),
        *((n, ctypes.c_int) for n in ("heads", "group", "queries", "keys")), *((n, ctypes.c_float) for n in ("scale", "cap", "fill")),
        *((n, ctypes.c_int) for n in ("drop", "zero", "pairs")),
    ]  # fmt: skip


class Cut(NamedTuple):
    """How `attention.cu` divides the work: tiles of 16 queries a warp, keys a step, warps a block; with wgmma or mma.sync."""

    tiles: int
    keys: int
    warps: int
    hopper: bool = False

    def __str__(self) -> str:
        return f"{'wgmma' if self.hopper else 'mma'} {16 * self.tiles * self.warps}x{self.keys}"

    @property
    def queries(self) -> int:
        return 16 * self.tiles * self.warps


LOG2E, LOWEST, STAGES = 1.4426950408889634, -3e38, 3


def cuts(size: int, target: int) -> list[Cut]:
    """The cuts there are for a head size on a GPU of compute capability `target`."""
    found = [Cut(1, 32, 2), Cut(1, 64, 4)] + ([Cut(2, 64, 4)] if size <= 64 else [])
    if target == 90 and size in (32, 64, 128):
        found += [Cut(1, 64, 8, True)] + ([Cut(1, 128, 8, True)] if size == 128 else [])
    return found


def choose(queries: int, keys: int, size: int) -> Cut:
    """The cut for a number of queries and keys and a head size."""
    known = cuts(size, capability())
    if queries <= 32 and keys <= 32:
        return known[0]
    return known[-1] if known[-1].hopper and queries > 64 else known[1]


def variant(cut: Cut, size: int, dtype: str, mask: int, rows: bool, causal: bool, cap: bool, plain: bool) -> tuple[str, str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What `cuda_launch.module` needs."""
    values = {"D": size, "MT": cut.tiles, "KT": cut.keys, "WARPS": cut.warps, "MASK": mask, "ROWS": int(rows), "CAUSAL": int(causal), "CAP": int(cap), "PLAIN": int(plain), "HOPPER": int(cut.hopper)}
    return "attention", dtype, tuple(f"{n}={v}" for n, v in values.items()), (("WGMMA\n", wgmma(cut.keys, size, dtype=dtype)),) if cut.hopper else ()


def takes(q: Any, k: Any, v: Any, mask: Any, y: Any) -> bool:
    """Whether `attention.cu` takes these arrays on the GPU at hand."""
    size = q.shape[-1]
    if capability() < 80 or q.ndim != 4 or q.dtype.name not in ("float16", "bfloat16") or size % 16 or size > 128 or v.shape[-1] != size:
        return False
    if mask is not None and mask.dtype.name not in ("bool", q.dtype.name):
        return False
    return all(a.dtype == q.dtype and a.strides[-1] == 2 and a.data.ptr % 16 == 0 and all(n % 16 == 0 for n in a.strides[:-1]) for a in (q, k, v, y))


def flash(q: Any, k: Any, v: Any, mask: Any, y: Any, options: tuple[Any, ...], cut: Cut | None = None) -> Launch:
    """Our kernel; `options` are scale, softcap, fill, drop, zero_masked, causal. Call only where `takes` says so."""
    import cupy

    scale, softcap, fill, drop, zero_masked, causal = options
    (batch, heads, queries, size), keys = q.shape, k.shape[2]
    strides = [(ctypes.c_longlong * 3)(*(n // 2 for n in a.strides[:3])) for a in (q, k, v, y)]
    steps, pairs = (0, 0, 0, 0), 0
    if mask is not None:
        steps = tuple(n // mask.itemsize for n in cupy.broadcast_to(mask, (batch, heads, queries, keys)).strides)
        pairs = int(steps[3] == 1 and keys % 2 == 0 and mask.data.ptr % 4 == 0 and all(n % 2 == 0 for n in steps[:3]))
    fill2 = fill if fill in (float("-inf"), float("inf")) else max(fill * LOG2E, LOWEST)
    call = _Call(
        *(int(a.data.ptr) for a in (q, k, v, y)), None if mask is None else int(mask.data.ptr), *strides, (ctypes.c_longlong * 4)(*steps),
        heads, heads // k.shape[1], queries, keys, scale, softcap, fill2, int(drop), int(zero_masked), pairs,
    )  # fmt: skip
    cut = cut or choose(queries, keys, size)
    kind = 0 if mask is None else 1 if mask.dtype.name == "bool" else 2
    plain = not softcap and scale > 0
    function = module(*variant(cut, size, q.dtype.name, kind, steps[2] == 0, bool(causal), bool(softcap), plain)).get_function("attention")
    grid, keep = (-(-queries // cut.queries), heads, batch), (q, k, v, mask, y)
    if not cut.hopper:
        return launcher(function, grid, 32 * cut.warps, [call], shared=4 * cut.keys * (size + 8) * 2, keep=keep)
    block = min(size, 64)
    maps = [tensor_map(q, (cut.queries, block)), tensor_map(k, (cut.keys, block)), tensor_map(v, (cut.keys, block))]
    shared = 1024 + (cut.queries + STAGES * 2 * cut.keys) * size * 2 + 8 * (1 + 2 * STAGES)
    return launcher(function, grid, 32 * cut.warps, [*maps, call], shared=shared, keep=keep)


def attention(
    inputs: list[Any], outputs: list[Any], *, scale: float, softcap: float, fill: float, drop: int, zero_masked: int, causal: int
) -> Launch | None:
    q, k, v, mask = inputs
    y, options = outputs[0], (scale, softcap, fill, drop, zero_masked, causal)
    if q.ndim == 3:  # one head
        q, k, v, y = (a[:, None] for a in (q, k, v, y))
        mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
    found: dict[str, Callable[[], Launch]] = {}
    default = ""
    if takes(q, k, v, mask, y):
        default = str(choose(q.shape[2], k.shape[2], q.shape[-1]))
        found = {str(c): partial(flash, q, k, v, mask, y, options, c) for c in cuts(q.shape[-1], capability())}
    if _cudnn_takes(q, k, v, mask, options):
        found["cuDNN"] = partial(_fused, q, k, v, mask, y, scale, bool(causal))
        if not default or _is_long(q, k, mask):
            default = "cuDNN"
    if found:
        shape = f"{'x'.join(map(str, q.shape))} of {k.shape[1]}x{k.shape[2]}"
        kind = "no mask" if mask is None else f"{mask.dtype.name} mask {'x'.join(str(n) if s else '1' for n, s in zip(mask.shape, mask.strides, strict=True))}"
        return tuning.pick(f"attention {q.dtype.name} {shape} {kind}{' causal' if causal else ''}{' softcap' if softcap else ''}", found, default)
    if q.dtype.name not in ("float16", "float32") or k.shape[2] > LONGEST or (mask is not None and mask.dtype.name not in ("bool", q.dtype.name)):
        return None
    return _unfused(q, k, v, mask, y, options)


def _is_long(q: Any, k: Any, mask: Any) -> bool:
    """Where cuDNN is the faster one, by `benchmarks/kernel_speed.py` on an H100."""
    same = mask is None or mask.shape[2] == 1 or mask.strides[2] == 0  # for all queries
    return bool(k.shape[2] > SHORT and (q.shape[-1] > 32 or not same))


def _cudnn_takes(q: Any, k: Any, v: Any, mask: Any, options: tuple[Any, ...]) -> bool:
    _, softcap, _, _, zero_masked, causal = options
    if q.dtype.name != "float16" or softcap or zero_masked or (causal and q.shape[2] != k.shape[2]) or (mask is not None and (mask.dtype.name != "float16" or mask.ndim != 4)):
        return False
    return max(q.shape[-1], v.shape[-1]) <= 128 and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0 and _cudnn() is not None


def _fused(q: Any, k: Any, v: Any, mask: Any, y: Any, scale: float, causal: bool) -> Launch:
    import cupy

    cudnn, handle = _cudnn()
    graph = cudnn.pygraph(io_data_type=cudnn.data_type.HALF, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT, handle=handle)

    def tensor(a: Any) -> Any:
        return graph.tensor(dim=list(a.shape), stride=[n // a.itemsize for n in a.strides], data_type=cudnn.data_type.HALF)

    tensors = [tensor(a) for a in (q, k, v)]
    bias = None if mask is None else tensor(mask)
    out, _ = graph.sdpa(q=tensors[0], k=tensors[1], v=tensors[2], bias=bias, attn_scale=scale, use_causal_mask=causal, is_inference=True)
    out.set_output(True).set_dim(list(y.shape)).set_stride([n // y.itemsize for n in y.strides])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = cupy.empty(max(graph.get_workspace_size(), 1), cupy.uint8)
    pack = {t: int(a.data.ptr) for t, a in zip([*tensors, out], [q, k, v, y], strict=True)}
    if bias is not None:
        pack[bias] = int(mask.data.ptr)

    def launch() -> None:
        cudnn.set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
        graph.execute(pack, workspace.data.ptr, handle=handle)

    return launch


def _unfused(q: Any, k: Any, v: Any, mask: Any, y: Any, options: tuple[Any, ...]) -> Launch:
    import cupy

    given = [(a, a if a.flags.c_contiguous else cupy.empty(a.shape, a.dtype)) for a in (q, k, v, y)]
    (q, k, v, y) = (packed for _, packed in given)
    copies = [(a, packed) for a, packed in given if a is not packed]
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1], k.shape[2]
    scores = cupy.empty((batch, heads, queries, keys), q.dtype)
    kind = 0 if mask is None else 1 if mask.dtype.name == "bool" else 2
    wide = None if mask is None else cupy.broadcast_to(mask, scores.shape)
    strides = cupy.array([n // wide.itemsize for n in wide.strides] if wide is not None else [0] * 4, cupy.int64)
    kernel = _module().get_function(f"softmax_{q.dtype.name}_{kind}")
    scale, softcap, fill, drop, zero_masked, causal = options
    pointer = 0 if mask is None else int(mask.data.ptr)
    f32, i32, i64 = cupy.float32, cupy.int32, cupy.int64
    arguments = (scores, i64(pointer), i64(keys), i64(queries), i32(heads), strides, f32(scale), f32(softcap), f32(fill), i32(drop), i32(zero_masked), i32(causal))
    # One product for each key head: the query heads it serves lie one under another.
    flat, head = batch * groups, heads // groups * queries
    multiply = product(scores.reshape(flat, head, keys), q.reshape(flat, head, -1), k.reshape(flat, keys, -1), trans_w=True)
    weigh = product(y.reshape(flat, head, -1), scores.reshape(flat, head, keys), v.reshape(flat, keys, -1))

    def launch() -> None:
        for source, packed in copies:
            if packed is not y:
                packed[...] = source
        multiply()
        kernel((batch * heads * queries,), (128,), arguments, shared_mem=keys * 4)
        weigh()
        for target, packed in copies:
            if packed is y:
                target[...] = packed

    return launch
