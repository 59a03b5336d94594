"""Ranks with GPUs, without any: NCCL and CUDA's shared memory are faked by threads and NumPy; the kernels themselves are benchmarks/all_reduce.py's."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import sys
import threading
from importlib import resources
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import parse
from fake_ranks import Threads, together

import rewrite
from rewrite.errors import RewriteError
from rewrite.plugins import cuda_collectives
from rewrite.plugins.cuda_collectives import BLOCKS, RANKS, SLOTS, OneShot, blocks_of, workspace_bytes
from rewrite.registry import library
from rewrite.runtime import cuda_ranks, nccl
from rewrite.runtime.cuda_ranks import DeviceRanks, open_rank
from rewrite.runtime.nccl import Nccl, choose_device, local_rank
from rewrite.runtime.plan import Plan

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
SOURCE = (resources.files("rewrite.plugins") / "one_shot.cu").read_text()


class DeviceArray(np.ndarray):
    """An array of NumPy that tells where it lies as CuPy's do."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def on_device(array):
    return np.ascontiguousarray(array).view(DeviceArray)


class Communicator:
    """NcclCommunicator as CuPy has it, for threads, on arrays of float32."""

    groups: dict = {}
    destroyed: list = []

    def __init__(self, size, number, rank):
        assert isinstance(number, bytes)
        assert len(number) == 128
        group = self.groups.setdefault(number, SimpleNamespace(barrier=threading.Barrier(size), at={}, mail={}))
        self.size, self.rank, self.group = size, rank, group
        group.barrier.wait(20)

    def _all(self, address, count):
        self.group.at[self.rank] = np.frombuffer((ctypes.c_float * count).from_address(address), np.float32).copy()
        self.group.barrier.wait(20)
        found = [self.group.at[r] for r in range(self.size)]
        self.group.barrier.wait(20)
        return found

    def allReduce(self, given, made, count, kind, operation, stream):  # noqa: N802
        assert (kind, operation, stream) == ("kind float32", "sum", 77)
        np.frombuffer((ctypes.c_float * count).from_address(made), np.float32)[:] = sum(self._all(given, count))

    def allGather(self, given, made, count, kind, stream):  # noqa: N802
        assert (kind, stream) == ("kind float32", 77)
        np.frombuffer((ctypes.c_float * (count * self.size)).from_address(made), np.float32)[:] = np.concatenate(self._all(given, count))

    def send(self, given, count, kind, peer, stream):
        self.group.mail[self.rank, peer] = np.frombuffer((ctypes.c_float * count).from_address(given), np.float32).copy()
        self.group.barrier.wait(20)

    def recv(self, made, count, kind, peer, stream):
        self.group.barrier.wait(20)
        np.frombuffer((ctypes.c_float * count).from_address(made), np.float32)[:] = self.group.mail[peer, self.rank]

    def destroy(self):
        self.destroyed.append(self.rank)


class Runtime:
    """CUDA's memory by NumPy's: an address is its own handle."""

    def __init__(self):
        self.blocks, self.opened, self.reached = {}, [], True

    def malloc(self, size):
        block = np.full(size, 7, np.uint8)
        self.blocks[block.ctypes.data] = block
        return block.ctypes.data

    def memset(self, address, value, size):
        self.blocks[address][:size] = value

    def ipcGetMemHandle(self, address):  # noqa: N802
        return address.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle):  # noqa: N802
        self.opened.append(handle)
        return int.from_bytes(handle, "little")

    def ipcCloseMemHandle(self, address):  # noqa: N802
        self.opened.remove(self.ipcGetMemHandle(address))

    def free(self, address):
        del self.blocks[address]

    def deviceSynchronize(self):  # noqa: N802
        pass

    def getDeviceCount(self):  # noqa: N802
        return 4

    def deviceCanAccessPeer(self, mine, other):  # noqa: N802
        return self.reached and mine != other


@pytest.fixture
def gpu(monkeypatch):
    """CuPy as far as ranks use it."""
    cupy, cuda, library_ = ModuleType("cupy"), ModuleType("cupy.cuda"), ModuleType("cupy.cuda.nccl")
    library_.NcclCommunicator, library_.get_unique_id = Communicator, lambda: bytes(range(128))
    library_.NCCL_SUM = "sum"
    monkeypatch.setattr(nccl.Nccl, "_type", lambda self, x: f"kind {x.dtype.name}")
    cupy.cuda, cuda.nccl, cuda.runtime = cuda, library_, Runtime()
    cuda.used = []
    cuda.Device = lambda number=0: SimpleNamespace(use=lambda: cuda.used.append(number))
    cuda.get_current_stream = lambda: SimpleNamespace(ptr=77)
    cupy.empty = lambda shape, dtype: np.full(shape, np.nan, dtype).view(DeviceArray)
    for name, module in (("cupy", cupy), ("cupy.cuda", cuda), ("cupy.cuda.nccl", library_)):
        monkeypatch.setitem(sys.modules, name, module)
    Communicator.groups.clear()
    Communicator.destroyed.clear()
    return cupy


def values(rank, *shape):
    return np.random.default_rng(rank).standard_normal(shape).astype(np.float32)


# --- NCCL -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3])
def test_sums_joins_and_messages(gpu, size):
    def work(host):
        ranks = Nccl(host)
        x, total, parts = on_device(values(host.rank, 5, 4)), on_device(np.empty((5, 4), np.float32)), on_device(np.empty((size, 5, 4), np.float32))
        ranks.all_reduce_into(x, total)
        ranks.gather_into(x, parts)
        if host.rank == 0:
            ranks.send(x, 1)
        elif host.rank == 1:
            ranks.receive(x, 0)
        else:
            ranks.communicator.group.barrier.wait(20)
        ranks.close()
        return total, parts, x

    found = together(size, work)
    expected = [values(r, 5, 4) for r in range(size)]
    for total, parts, _ in found:
        assert np.array_equal(total, sum(expected))
        assert np.array_equal(parts, expected)
    assert np.array_equal(found[1][2], expected[0])
    assert sorted(Communicator.destroyed) == list(range(size))


def test_an_id_of_signed_numbers_is_taken_too(gpu):
    gpu.cuda.nccl.get_unique_id = lambda: tuple(range(-64, 64))
    together(2, lambda host: Nccl(host).close())
    assert list(Communicator.groups) == [bytes(range(192, 256)) + bytes(range(64))]


def test_types_and_a_missing_library(monkeypatch, gpu):
    monkeypatch.undo()
    made = Nccl.__new__(Nccl)
    assert made._type(SimpleNamespace(dtype=SimpleNamespace(name="bfloat16"))) == 9
    with pytest.raises(RewriteError, match="NCCL sums no complex64; it sums float16, bfloat16"):
        made._type(np.zeros(1, np.complex64))
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", ModuleType("cupy.cuda"))
    with pytest.raises(RewriteError, match=r"NCCL cannot be used \(.*\); install nvidia-nccl-cu13"):
        Nccl(Threads(0, 1, None))


def test_a_library_that_cupy_does_not_find_is_one_line(gpu):
    gpu.cuda.nccl.available = False
    with pytest.raises(RewriteError, match=r"NCCL cannot be used \(CuPy does not find it\); install nvidia-nccl-cu13"):
        together(1, Nccl)


def test_what_nccl_refuses_names_the_rank(gpu):
    def refuse(*_):
        raise RuntimeError("NCCL_ERROR_INVALID_USAGE: invalid\nusage")

    gpu.cuda.nccl.NcclCommunicator = refuse
    with pytest.raises(RewriteError, match="NCCL refuses rank 0 of 1: NCCL_ERROR_INVALID_USAGE: invalid usage"):
        together(1, Nccl)


def test_the_device_of_a_rank(monkeypatch, gpu):
    for name in nccl.LOCAL:
        monkeypatch.delenv(name, raising=False)
    assert local_rank() == 0
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert (local_rank(), choose_device(), gpu.cuda.used) == (3, 3, [3])
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "4")
    with pytest.raises(RewriteError, match="rank 4 of this host has no GPU: there are 4; start as many ranks on a host as it has GPUs"):
        choose_device()


# --- the one-shot kernel's host ---------------------------------------------------------------------------------------
def test_numbers_of_the_kernel_are_those_of_its_host():
    constants = dict(re.findall(r"(\w+) = (\d+)(?=[,;])", next(line for line in SOURCE.splitlines() if line.startswith("constexpr int RANKS"))))
    assert (int(constants["RANKS"]), int(constants["BLOCKS"]), int(constants["SLOTS"])) == (RANKS, BLOCKS, SLOTS)
    assert int(constants["FLAGS"]) + RANKS * BLOCKS * 4 <= SLOTS
    vectors = 1000  # where the last own value ends
    assert SLOTS + 16 * ((4 * RANKS + 1) * vectors + vectors) == workspace_bytes(16 * vectors)


@pytest.mark.parametrize(("vectors", "expected"), [(1, (1, 128)), (512, (4, 128)), (4096, (32, 128)), (16896, (132, 128)), (16897, (34, 512)), (65536, (128, 512)), (10**6, (132, 512))])
def test_blocks(vectors, expected):
    assert blocks_of(vectors) == expected


def launched(monkeypatch):
    """What would be launched: names, grids, threads and arguments."""
    calls = []
    monkeypatch.setattr(cuda_collectives, "module", lambda name, dtype: SimpleNamespace(get_function=lambda function: (name, dtype, function)))
    monkeypatch.setattr(cuda_collectives, "launcher", lambda function, grid, threads, arguments, keep: calls.append((function, grid, threads, arguments)) or (lambda: None))
    return calls


def parameters(function):
    """How many parameters a kernel has."""
    name = re.sub(r"_\d+$", "_##WORLD", re.sub(r"norm_\d_\d$", "norm_##VECTORS##_##WORLD", function))
    return len(re.search(re.escape(name) + r"\((.*?)\)", SOURCE)[1].split(","))


def test_workspaces_are_mapped_and_given_back(gpu, monkeypatch):
    calls, runtime = launched(monkeypatch), gpu.cuda.runtime

    def work(host):
        ours = OneShot(host, 1 << 16)
        x = on_device(values(host.rank, 4, 64).astype(np.float16))
        y, bias = on_device(np.empty_like(x)), on_device(np.zeros(64, np.float16))
        for array in (x, y, bias):
            assert array.data.ptr % 16 == 0
        made = ours.sum(x, y, bias, x), ours.sum(x, y, way="pull"), ours.sum_norm(x, y, on_device(np.empty_like(x)), bias, 1e-5)
        whole = bytes(ours.runtime.blocks[ours.base])
        places = ours.peers.mine, list(ours.peers.at)[:2]
        ours.close(host)
        return made, whole, places, ours.base

    found = together(2, work)
    for rank, (made, whole, (mine, at), base) in enumerate(found):
        assert all(made)
        assert set(whole) == {0}
        assert len(whole) >= workspace_bytes(1 << 16)
        assert mine == base == at[rank]
        assert at == [f[3] for f in found]
    assert runtime.blocks == {}
    assert runtime.opened == []
    assert {c[0][2] for c in calls} == {"push_2", "pull_2", "push_norm_1_2"}
    for (_, _, function), grid, threads, arguments in calls:
        assert len(arguments) == parameters(function)
        assert grid == ((4,) if "norm" in function else (1,))
        assert threads in (32, 128)


def test_gpus_that_cannot_map_one_another_leave_sums_to_nccl(gpu, monkeypatch):
    """One rank cannot; all find out."""
    opens = gpu.cuda.runtime.ipcOpenMemHandle

    def refuse(handle):
        if threading.current_thread().name == "1":
            raise RuntimeError("cudaErrorMapBufferObjectFailed: mapping failed")
        return opens(handle)

    monkeypatch.setattr(gpu.cuda.runtime, "ipcOpenMemHandle", refuse)

    def work(host):
        with pytest.raises(RewriteError, match=r"GPUs of this host cannot map one another's memory \(rank 1: cudaErrorMap.*\); sums are left to NCCL"):
            OneShot(host, 1 << 12)

    together(2, work)
    assert gpu.cuda.runtime.blocks == {}
    assert gpu.cuda.runtime.opened == []
    monkeypatch.setattr(cuda_ranks, "choose_device", lambda: int(threading.current_thread().name))
    assert together(2, lambda host: DeviceRanks(host).one_shot) == [None, None]


def test_arrays_without_a_kernel_are_left_to_nccl(gpu, monkeypatch):
    launched(monkeypatch)
    ours = together(1, lambda host: OneShot(host, 1 << 12))[0]
    ours.size = 2
    good = on_device(np.zeros((2, 64), np.float16))
    assert ours.sum(good, good) is not None
    wrong = [on_device(np.zeros((2, 64), np.float32)), on_device(np.zeros((2, 63), np.float16)), good.T, on_device(np.zeros((0, 64), np.float16)), on_device(np.zeros((40, 64), np.float16))]
    shifted = on_device(np.zeros(136, np.float16))
    wrong.append(shifted[(16 - shifted.data.ptr % 16) % 16 // 2 + 1 :][:64])
    for array in wrong:
        assert ours.sum(array, array) is None, array.shape
    assert ours.sum(good, good, residual=on_device(np.zeros((2, 64), np.float32))) is None
    ours.size = 3
    assert ours.sum(good, good) is None


# --- steps of a plan --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [(False, False), (True, True), (False, True)])
def test_steps(gpu, monkeypatch, more):
    monkeypatch.setattr(cuda_ranks, "choose_device", lambda: int(threading.current_thread().name))
    launched(monkeypatch)
    bias, residual = (on_device(values(9, 4)) if more[0] else None, on_device(values(8, 3, 4)) if more[1] else None)

    def work(host):
        ranks = DeviceRanks(host)
        assert ranks.one_shot is not None
        x, y = on_device(values(host.rank, 3, 4)), on_device(np.full((3, 4), np.nan, np.float32))
        launch = ranks.launch("AllReduce", [x, bias, residual], [y])
        joined, one = on_device(np.full((3, 8), np.nan, np.float32)), on_device(np.full((1, 8), np.nan, np.float32))
        launches = [launch, ranks.launch("AllGather", [x], [joined]), ranks.launch("AllGather", [x[:1]], [one])]
        for _ in range(2):  # as a graph is replayed
            for call in launches:
                call()
        ranks.nccl.close()
        return y, joined, one

    parts = [values(r, 3, 4) for r in range(2)]
    for y, joined, one in together(2, work):
        expected = library([]).plugins["AllReduce"].reference(parts[0] + parts[1], bias, residual)
        assert np.array_equal(y, expected)
        assert np.array_equal(joined, np.concatenate(parts, -1))
        assert np.array_equal(one, np.concatenate(parts, -1)[:1])


def test_ranks_far_from_one_another_have_no_kernel(gpu, monkeypatch):
    gpu.cuda.runtime.reached = False
    monkeypatch.setattr(cuda_ranks, "choose_device", lambda: int(threading.current_thread().name))
    assert together(2, lambda host: DeviceRanks(host).one_shot) == [None, None]
    assert gpu.cuda.runtime.blocks == {}


def test_plans_that_do_not_fit_the_ranks():
    for world, stages in ((4, 1), (4, 2)):
        plan = SimpleNamespace(directory="plan", manifest=SimpleNamespace(world=world, stages=stages))
        with pytest.raises(RewriteError, match="it is for 4 ranks, and there are 2 with GPUs; start 4, or give a plan for 2"):
            open_rank(plan, SimpleNamespace(size=2))


# --- on two GPUs ------------------------------------------------------------------------------------------------------
def half_mlp(width, inner):
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((width, inner)) / width**0.5, "w2": rng.standard_normal((inner, width)) / inner**0.5, "b1": rng.standard_normal(inner), "b2": rng.standard_normal(width)}
    text = f"(float16[rows, {width}] x) => (float16[rows, {width}] y) {{ p = MatMul(x, w1) h = Add(p, b1) g = Relu(h) q = MatMul(g, w2) z = Add(q, b2) y = Add(z, x) }}"
    return parse(text, 20, **{n: w.astype(np.float16) for n, w in weights.items()})


def gpu_rank(rank, size, lines, plan, rows, found):
    """One process of `test_a_plan_of_two_ranks_on_two_gpus`: its results and the largest difference from run to run."""
    from all_reduce import Pipes

    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(rank)
    executor, ranks = open_rank(Plan(plan, device="cuda"), Pipes(rank, size, lines))
    for count in rows:
        x = (np.random.default_rng(count).standard_normal((count, 512))).astype(np.float16)
        results = [executor.run({"x": x})["y"] for _ in range(3)]
        found.put((rank, count, results[0], all(np.array_equal(r, results[0]) for r in results)))
    executor.close()
    ranks.close()


@pytest.mark.gpu
def test_a_plan_of_two_ranks_on_two_gpus(tmp_path):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    rows = (1, 8, 96, 1500)  # the last one's sum is NCCL's
    model = rewrite.optimize(half_mlp(512, 1024), tensor_parallel=2, tolerance=2e-2).model
    plan = rewrite.build(model, tmp_path / "plan", profile="rows=1:8:2048", tolerance=2e-2)
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    found = context.Queue()
    processes = [context.Process(target=gpu_rank, args=(rank, 2, [far if rank else near], str(tmp_path / "plan"), rows, found), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = [found.get(timeout=50) for _ in range(2 * len(rows))]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    for _, count, y, steady in results:
        want = plan.run({"x": np.random.default_rng(count).standard_normal((count, 512)).astype(np.float16)})["y"].astype(np.float64)
        assert steady
        assert np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want) < 2e-3
    assert all(np.array_equal(a[2], b[2]) for a in results for b in results if a[1] == b[1])  # the same bits on both
