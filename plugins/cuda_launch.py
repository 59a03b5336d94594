"""CUDA kernels from the `.cu` files beside this one: compiled by NVRTC for the GPU at hand, kept on disk, launched by the driver.

CuPy's own launches know no clusters and no programmatic dependent launch. With the latter a kernel may start while the one
before it still runs: it does what depends on nothing (barriers, weights) and waits with `griddepcontrol.wait` for the rest.

Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__EXEC.html (cuLaunchKernelEx)
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from rewrite.errors import RewriteError

Launch = Callable[[], None]
CLUSTER, OVERLAP = 4, 6  # CUlaunchAttributeID: cluster dimension, programmatic stream serialization
SHARED_MEMORY = 8  # CUfunction_attribute: largest dynamic shared memory
MAP_TYPES = {"float16": 6, "bfloat16": 9}  # CUtensorMapDataType
INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)
MOST_SHARED = 227 << 10  # bytes a block may have on Hopper


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)]


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    """Raises RewriteError with the driver's words if `status` is no success."""
    if not status:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    raise RewriteError(f"{what} fails: {(text.value or b'').decode() or f'CUDA error {status}'}")


@cache
def capability() -> int:
    """Compute capability of the current GPU, 90 for 9.0."""
    import cupy

    return int(cupy.cuda.Device().compute_capability)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rewrite" / "kernels"


def _binary(source: str, options: tuple[str, ...]) -> bytes:
    """The compiled module, from the cache if it is there. A cache that cannot be read or written costs time only."""
    from cupy.cuda import nvrtc

    key = hashlib.sha256(repr((source, options, nvrtc.getVersion())).encode()).hexdigest()
    path = _folder() / f"{key}.cubin"
    with contextlib.suppress(OSError):
        found = path.read_bytes()
        digest, binary = found[:32], found[32:]
        if hashlib.sha256(binary).digest() == digest:
            return binary
    program = nvrtc.createProgram(source, "rewrite.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        raise RewriteError(f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} refuses a kernel: {nvrtc.getProgramLog(program).strip().splitlines()[0]}") from error
    binary = bytes(nvrtc.getCUBIN(program))
    nvrtc.destroyProgram(program)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(hashlib.sha256(binary).digest() + binary)
        temporary.replace(path)
    return binary


def compiled(name: str, dtype: str, defines: tuple[str, ...], changes: tuple[tuple[str, str], ...], target: int) -> bytes:
    """The binary of `name`.cu for float16 or bfloat16 and compute capability `target`, with macros NAME=VALUE and texts replaced in it."""
    folder = resources.files(__package__)
    source = (folder / f"{name}.cu").read_text()
    for header in INCLUDE.findall(source):
        source = source.replace(f'#include "{header}"', (folder / header).read_text())
    for old, new in changes:
        source = source.replace(old, new)
    options = ("--std=c++17", f"-arch=sm_{target}{'a' if target == 90 else ''}", f"-DBFLOAT16={int(dtype == 'bfloat16')}", *(f"-D{d}" for d in defines))
    return _binary(source, options)


@cache
def module(name: str, dtype: str, defines: tuple[str, ...] = (), changes: tuple[tuple[str, str], ...] = ()) -> Any:
    """The CuPy module of what `compiled` gives for the GPU at hand."""
    import cupy

    made = cupy.cuda.function.Module()
    made.load(compiled(name, dtype, defines, changes, capability()))
    return made


def wgmma(*tiles: int, dtype: str) -> str:
    """C++ for d[64, tile] += a[64, 16] b[tile, 16]^T by wgmma: `Wgmma<tile>::add` with both in shared memory, `set` the same for d = a b^T,
    `addTransposed` with a in registers and b stored [16, tile].
    """
    kind, made = "bf16" if dtype == "bfloat16" else "f16", ["template <int N> struct Wgmma;"]
    for tile in sorted(set(tiles)):
        count = tile // 2
        registers, operands = ", ".join(f"%{i}" for i in range(count)), ", ".join(f'"+f"(d[{i}])' for i in range(count))
        code = f"wgmma.mma_async.sync.aligned.m64n{tile}k16.f32.{kind}.{kind} {{{registers}}}"
        add = f'asm volatile("{code}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;" : {operands} : "l"(a), "l"(b));'
        fresh = f'asm volatile("{code}, %{count}, %{count + 1}, 0, 1, 1, 0, 0;" : {operands.replace("+f", "=f")} : "l"(a), "l"(b));'
        four = ", ".join(f"%{count + i}" for i in range(4))
        turned = f'asm volatile("{code}, {{{four}}}, %{count + 4}, 1, 1, 1, 1;" : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));'
        made.append(f"template <> struct Wgmma<{tile}> {{")
        made.append(f"    static __device__ __forceinline__ void add(float (&d)[{count}], u64 a, u64 b) {{ {add} }}")
        made.append(f"    static __device__ __forceinline__ void set(float (&d)[{count}], u64 a, u64 b) {{ {fresh} }}")
        made.append(f"    static __device__ __forceinline__ void addTransposed(float (&d)[{count}], const u32 (&a)[4], u64 b) {{ {turned} }}")
        made.append("};")
    return "\n".join(made) + "\n"


def tensor_map(array: Any, box: Sequence[int]) -> Any:
    """A TMA descriptor of an array of 16-bit floats, for boxes of `box` elements along its last axes (1 along the others).

    The last axis is packed and its box 32 or 64 elements (swizzled by 64 or 128 bytes); the strides of the others are multiples of
    16 bytes. What a box has beyond the array is read as zero.
    """
    room = ctypes.create_string_buffer(192)
    base = -(-ctypes.addressof(room) // 64) * 64
    made = (ctypes.c_char * 128).from_address(base)
    made._room = room  # type: ignore[attr-defined]
    rank = array.ndim
    whole = [1] * (rank - len(box)) + list(box)
    sizes, boxes = (ctypes.c_uint64 * rank)(*array.shape[::-1]), (ctypes.c_uint32 * rank)(*whole[::-1])
    strides, steps = (ctypes.c_uint64 * max(1, rank - 1))(*array.strides[-2::-1]), (ctypes.c_uint32 * rank)(*[1] * rank)
    swizzle, promotion = {32: 2, 64: 3}[box[-1]], 2  # 64 or 128 bytes; L2 promotion to 128 bytes
    address = ctypes.c_void_p(int(array.data.ptr))
    status = _driver().cuTensorMapEncodeTiled(ctypes.c_void_p(base), MAP_TYPES[array.dtype.name], rank, address, sizes, strides, boxes, steps, 0, swizzle, promotion, 0)
    check(status, f"cuTensorMapEncodeTiled of {list(array.shape)}, strides {list(array.strides)}")
    return made


def launcher(function: Any, grid: Sequence[int], block: int, arguments: Sequence[Any], *, shared: int = 0, cluster: int = 1, keep: Any = None) -> Launch:
    """A function that enqueues one kernel on the current stream; it may start before the preceding kernel ends.

    `arguments` are ctypes values, CuPy arrays (their address) or None (a null pointer); `cluster` blocks along the first
    axis of the grid form a cluster; `keep` is held as long as the function is.
    """
    import cupy

    driver = _driver()
    allowed = ctypes.c_int()
    check(driver.cuFuncGetAttribute(ctypes.byref(allowed), SHARED_MEMORY, ctypes.c_void_p(function.ptr)), "a kernel's shared memory")
    if shared > allowed.value:  # never less: other launches of this kernel may need what it has
        check(driver.cuFuncSetAttribute(ctypes.c_void_p(function.ptr), SHARED_MEMORY, shared), f"a kernel with {shared} bytes of shared memory")
    values = [a if isinstance(a, (ctypes._SimpleCData, ctypes.Structure, ctypes.Array)) else ctypes.c_void_p(0 if a is None else int(a.data.ptr)) for a in arguments]
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
    wanted = [_Attribute(OVERLAP, 0, (ctypes.c_uint32 * 16)(1))] if capability() >= 90 else []
    wanted += [_Attribute(CLUSTER, 0, (ctypes.c_uint32 * 16)(cluster, 1, 1))] if cluster > 1 else []
    attributes = (_Attribute * 2)(*wanted)
    dimensions = (*grid, 1, 1)[:3]
    config = _Config((ctypes.c_uint * 3)(*dimensions), (ctypes.c_uint * 3)(block, 1, 1), shared, None, attributes, len(wanted))
    handle, call, reference = ctypes.c_void_p(function.ptr), driver.cuLaunchKernelEx, ctypes.byref(config)
    kept = (function, values, attributes, list(arguments), keep)

    def launch() -> None:
        config.stream = cupy.cuda.get_current_stream().ptr
        check(call(reference, handle, pointers, None), f"a kernel launch of {dimensions} x {block}, {len(kept[1])} arguments")

    return launch
