"""The kernel of `plugins/sampling.cu`, compiled for the CPU (`cuda_on_cpu.h`) and given what `SamplerState` would upload."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import rewrite.plugins
from rewrite.runtime.cuda_sampling import HEAD, LISTS, ROW, Past, asked, pack, template, unpack
from rewrite.runtime.sampling import Row, Samples

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
CALL = """
extern "C" void run(const void* logits, void* tokens, Row* rows, int vocabulary, int part, int wide, u32 ranks, u32 count, u32 seed) {
    for (u32 row = 0; row < count; ++row)
        runCluster(ranks, count, row, THREADS, HEAD + 4 * part, seed + row, [=] { choose(logits, tokens, rows, vocabulary, part, wide); });
}
"""


@cache
def kernel(folder: Path, threads: int, few: int, bins: int, bits: int) -> Any:
    """`run` of the compiled kernel."""
    source = (Path(rewrite.plugins.__file__).parent / "sampling.cu").read_text()
    for name in ("overlap", "sixteen", "cluster"):
        source = source.replace(f'#include "{name}.cuh"\n', "")
    source = source.replace("extern __shared__ __align__(16) u8 memory[];", "")
    file = folder / f"sampling_{threads}_{few}_{bins}_{bits}.cpp"
    file.write_text(f'#include "cuda_on_cpu.h"\n{source}\n{CALL}')
    defines = [f"-DTHREADS={threads}", f"-DHEAD={HEAD}", f"-DLOGITS={bits}", f"-DFEW={few}", f"-DBINS={bins}"]
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-w", f"-I{HERE}", *defines]
    library = file.with_suffix(".so")
    made = subprocess.run([COMPILER, *options, str(file), "-o", str(library)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[:3000]
    return ctypes.CDLL(str(library)).run


class OnCpu:
    """As CudaSampler and its state, with `ranks` blocks a row."""

    def __init__(self, folder: Path, ranks: int, threads: int = 64, few: int = 512, bins: int = 1024, bits: int = 32):
        self.ranks, self.run = ranks, kernel(folder, threads, few, bins, bits)

    def load(self, rows: Sequence[Row], vocabulary: int, steps: int = 1, index: Sequence[int] | None = None, out: Any = None) -> None:
        masks, self.errors = asked(rows, vocabulary)
        table, lists, self.records = pack(rows, steps, masks, template, Past)
        table["index"] = np.arange(len(rows)) if index is None else index
        if out is not None:
            table["out"] = out.ctypes.data + np.arange(len(rows), dtype=np.uint64) * np.uint64(4 * vocabulary)
            table["logprobs"] = -1
        self.loaded = table.copy()
        table["steps"][[error is not None for error in self.errors]] = 0
        self.lists = np.zeros(len(lists) + 16, np.uint8)[:len(lists)]
        self.lists[:] = lists
        for name in LISTS:
            table[name] = np.where(table[name] > 0, table[name] + np.uint64(self.lists.ctypes.data), 0)
        self.table = np.zeros(table.nbytes, np.uint8)
        self.table[:] = table.view(np.uint8)

    def enqueue(self, logits: np.ndarray, tokens: np.ndarray, seed: int = 0) -> None:
        part = -(-logits.shape[1] // (8 * self.ranks)) * 8
        self.run(*(ctypes.c_void_p(a.ctypes.data) for a in (logits, tokens, self.table)), logits.shape[1], part, int(tokens.itemsize == 8), self.ranks, len(tokens), seed)

    def samples(self) -> list[Samples]:
        return unpack(self.lists[self.records :].view(np.int32), self.loaded, self.errors)

    def sample(self, logits: np.ndarray, index: Sequence[int], rows: Sequence[Row], seed: int = 0) -> Samples:
        self.load(rows, logits.shape[1], index=index)
        self.enqueue(logits, np.full(len(rows), -77, np.int64), seed)
        return self.samples()[0]

    def states(self) -> np.ndarray:
        """The rows as the kernel left them."""
        return self.table.view(ROW)
