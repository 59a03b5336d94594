"""CUDA kernels of `plugins/` on the CPU: the same source, compiled by g++ with `emulated_gpu.h`, one thread block after the other.

Copies into shared memory arrive when they are waited for and not before, what nobody wrote is NaN, the lanes of a warp meet where the
hardware makes them meet. Speed, memory order and the encoding of instructions are the GPU's own: tests marked `gpu` are about those.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

import rewrite.plugins

PLUGINS, SHIM = Path(rewrite.plugins.__file__).parent, Path(__file__).with_name("emulated_gpu.h")
SHIMMED = ("overlap.cuh", "sixteen.cuh", "mma.cuh")
PARAMETERS = {"paged_attention": "Paged", "rotary": "Rotary"}  # what their kernels take
COMPILER = shutil.which("g++")
ENTRY = """
static {parameters} call_;
{bodies}
extern "C" void run(const char* name, void* call, unsigned x, unsigned y, unsigned z, unsigned block, int backwards) {{
    memcpy(&call_, call, sizeof call_);
    {choose}
    runGrid(x, y, z, block, backwards);
}}
"""


class Emulator:
    """What `rewrite.plugins.cuda_launch` has, for this CPU. `backwards`: the last block runs first."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder or Path(tempfile.mkdtemp(prefix="emulated-gpu-"))
        self.backwards, self.grids = False, list[tuple[int, ...]]()

    def module(self, name: str, dtype: str, defines: tuple[str, ...] = (), changes: Any = ()) -> Any:
        source = (PLUGINS / f"{name}.cu").read_text()
        for header in re.findall(r'^#include "([\w.]+)"$', source, re.MULTILINE):
            source = source.replace(f'#include "{header}"', "" if header in SHIMMED else (PLUGINS / header).read_text())
        source = source.replace("extern __shared__ uint4 raw[];", "uint4* raw = (uint4*)dynamicMemory;")
        kernels = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', source)
        kernels = [k for k in kernels if k != "decode" or "FLOAT32=1" not in defines]
        bodies = "\n".join(f"static void body_{k}() {{ {k}(call_); }}" for k in kernels)
        choose = " ".join(f'if (!strcmp(name, "{k}")) body = body_{k};' for k in kernels)
        text = f'#include "{SHIM}"\n{source}\n' + ENTRY.format(parameters=PARAMETERS[name], bodies=bodies, choose=choose)
        options = [f"-DBFLOAT16={int(dtype == 'bfloat16')}", *(f"-D{d}" for d in defines)]
        path = self.folder / hashlib.sha256(repr((text, SHIM.read_text(), options)).encode()).hexdigest()[:16]
        if not path.with_suffix(".so").exists():
            path.with_suffix(".cpp").write_text(text)
            subprocess.run([str(COMPILER), "-std=c++20", "-O1", "-w", "-fPIC", "-shared", *options, str(path.with_suffix(".cpp")), "-o", str(path.with_suffix(".so"))], check=True)
        library = ctypes.CDLL(str(path.with_suffix(".so")))
        return types.SimpleNamespace(get_function=lambda kernel: (library, kernel))

    def launcher(self, function: Any, grid: Any, block: int, arguments: Any, *, shared: int = 0, cluster: int = 1, keep: Any = None) -> Any:
        (library, kernel), sizes, kept = function, (*grid, 1, 1)[:3], (arguments, keep)
        self.grids.append(tuple(grid))

        def launch() -> None:
            library.run(kernel.encode(), ctypes.byref(kept[0][0]), *sizes, block, int(self.backwards))

        return launch


class DeviceArray(np.ndarray[Any, Any]):
    """An array of this CPU with the address that CuPy's arrays tell."""

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.__array_interface__["data"][0])


def on_device(array: Any) -> Any:
    """A copy with the same strides, aligned to 16 bytes."""
    if array is None:
        return None
    axes = np.argsort([-s for s in array.strides], kind="stable")
    packed = array.transpose(axes)
    room = np.empty(array.nbytes + 16, np.uint8)
    first = -room.ctypes.data % 16
    made = room[first : first + array.nbytes].view(array.dtype).reshape(packed.shape)
    made[...] = packed
    return made.transpose(np.argsort(axes)).view(DeviceArray)
