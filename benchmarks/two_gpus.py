"""Everything about ranks that needs two GPUs, one after the other, each with a time limit of its own; what fails does not stop the rest.

    python benchmarks/hollow_plans.py -o benchmarks/two_gpus.tar.xz          (where PyTorch may take its time; no GPU)
    python benchmarks/two_gpus.py --seconds 540                              (on two GPUs; writes results/all_reduce.json, results/ranks_decode.json)

Stages: sums (all_reduce.py), tests (pytest -m gpu test_cuda_ranks.py), tiny (two layers on one GPU and on two: logits, texts, the command line), 8b
(Llama 3.1 8B's shape, bfloat16, on one GPU and on two: ms a step), 70b (on two), nccl (8b with all sums by NCCL). The last lines are the verdicts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record

from rewrite.runtime.plan import Plan

HERE = Path(__file__).parent
STAGES = ("sums", "tests", "tiny", "8b", "70b", "nccl")
ASKED = {1: 1.6, 32: 1.5}  # how much faster two GPUs shall be than one, by batch
LIMIT = {"tiny": 120, "8b": 170, "70b": 240}  # seconds of one run
ROUNDED = 0.012  # of the largest logit, times the root of the layers: how far bfloat16 may lead two orders of the same sums apart (two layers: 1.2 % seen)
LEAST = 20  # seconds left, with which nothing is begun any more
Run = tuple[str, int, bool]  # model, GPUs, whether all sums are by NCCL
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]


class Runner:
    """Runs commands until the time is up, and collects the verdicts."""

    def __init__(self, seconds: float):
        self.ends, self.started, self.verdicts = time.monotonic() + seconds, time.monotonic(), list[str]()

    def say(self, text: str) -> None:
        print(f"=== [{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def verdict(self, text: str) -> None:
        self.verdicts.append(text)
        self.say(text)

    def run(self, what: str, command: Sequence[str], limit: float, keep: bool = False) -> str | None:
        """What it printed (if `keep`, else ""); None if it failed."""
        limit = min(limit, self.ends - time.monotonic())
        if limit < LEAST:
            self.verdict(f"{what}: left out, time is up")
            return None
        self.say(f"{what}: {' '.join(command)[:300]}")
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE if keep else None, text=True, start_new_session=True, cwd=HERE)
        try:
            output = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            self._end(process)
            print(process.communicate()[0] or "", flush=True)
            self.verdict(f"{what}: ENDED after {limit:.0f} s without a result")
            return None
        if process.returncode:
            self.verdict(f"{what}: FAILED with exit code {process.returncode} after {time.monotonic() - began:.0f} s\n{(output or '')[-2000:]}")
            return None
        self.say(f"{what}: done in {time.monotonic() - began:.0f} s")
        return output or ""

    def _end(self, process: subprocess.Popen[str]) -> None:
        """mpirun ends its ranks when it is asked to."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def has_mpi(runner: Runner) -> bool:
    probe = "from rewrite.runtime.communication import connect; c = connect(); print('ranks', c.size, [d.decode() for d in c.exchange(str(c.rank).encode())])"
    found = runner.run("MPI", [*MPIRUN, sys.executable, "-c", probe], 40, keep=True) if shutil.which("mpirun") else None
    runner.say(f"MPI: {found.split() if found else 'none that works; ranks are started without'}")
    return bool(found)


def compare(runner: Runner, plans: Path, name: str, nccl: bool) -> None:
    """Logits and greedy texts of one GPU and two: texts may part where two tokens are as likely as the logits' difference lets them be."""
    try:
        one, two = (json.loads(result(plans, (name, world, nccl)).read_text()) for world in (1, 2))
        a, b = (np.load(plans / f"{name}-{world}.logits.npy") for world in (1, 2))
        off, alike = float(np.abs(a - b).max()), float((a.argmax(-1) == b.argmax(-1)).mean())
        layers = len((Plan(plans / f"{name}-1").manifest.generator or {})["layers"])
        good = off < ROUNDED * layers**0.5 * float(np.abs(a).max()) and np.isfinite(b).all()
        runner.verdict(f"{name}, logits: {'ok' if good else 'WRONG'}, differ by {off / np.abs(a).max():.1e} of the largest, the same token in {alike:.0%} of {len(a)}")
        parted, wrong = [], []
        for number, (s, t, top) in enumerate(zip(one["texts"]["tokens"], two["texts"]["tokens"], one["texts"]["top"], strict=True)):
            place = next((i for i, (x, y) in enumerate(zip(s, t, strict=True)) if x != y), None)
            if place is None:
                continue
            chances = {int(token): chance for token, chance in top[place]}
            gap = chances[s[place]] - chances.get(t[place], -np.inf)
            parted.append(place)
            wrong += [f"text {number}, token {place}: {gap:.2f} less likely"] if gap > 2 * off else []
        total = len(one["texts"]["tokens"])
        runner.verdict(f"{name}, greedy texts: {'WRONG ' + '; '.join(wrong) if wrong else 'ok'}, {total - len(parted)} of {total} equal, the others part at ties, tokens {parted}")
        drawn = sum(s == t for s, t in zip(one["texts"]["drawn"], two["texts"]["drawn"], strict=True))
        runner.verdict(f"{name}, drawn texts: {drawn} of {len(one['texts']['drawn'])} equal; texts alone as in the batch: {two['texts']['alone'] == two['texts']['tokens'][:3]}")
    except Exception as error:
        runner.verdict(f"{name}: cannot be compared: {type(error).__name__}: {str(error)[:200]}")


def result(plans: Path, run: Run) -> Path:
    name, world, nccl = run
    return plans / f"{name}-{world}{'-nccl' * nccl}.result.json"


def rows(file: Path) -> Iterator[dict[str, Any]]:
    found = json.loads(file.read_text()) if file.exists() else {}
    for part, row in found.items():
        if part.startswith("batch ") and "error" not in row:
            yield {"run": file.name.split(".")[0], "device": found["device"], "copy_gbs": found["copy"] / 1e9, **row}


def scaling(runner: Runner, plans: Path, name: str, nccl: bool) -> None:
    """How much faster two GPUs are than one."""
    one, two = ({r["batch"]: r["ms"] for r in rows(result(plans, (name, world, nccl)))} for world in (1, 2))
    for batch, ms in two.items():
        if batch in one:
            ratio = one[batch] / ms
            runner.verdict(f"{name}, batch {batch}: {one[batch]:.3f} ms on one, {ms:.3f} ms on two: {ratio:.2f} times, asked {ASKED.get(batch, 1)}: "
                           f"{'reached' if ratio >= ASKED.get(batch, 1) else 'MISSED'}")  # fmt: skip


def command_line(runner: Runner, plans: Path) -> None:
    """`rewrite generate` and `bench-generate` of plans whose weights are files."""
    from ranks_decode import STD, write_weights

    for world in (1, 2):
        write_weights(plans / f"tiny-{world}", STD["tiny"])
    cli, memory = [sys.executable, "-m", "rewrite.cli"], ["--device", "cuda", "--kv-memory", "64M"]
    arguments = [*memory, "--tokens", "5,6,7", "--tokens", "900,1,2,3,4,5,6", "--max-new-tokens", "24", "--ignore-eos", "--json"]
    outputs = [runner.run("rewrite generate, one GPU", [*cli, "generate", str(plans / "tiny-1"), *arguments], 60, keep=True),
               runner.run("rewrite generate, two GPUs", [*MPIRUN, *cli, "generate", str(plans / "tiny-2"), *arguments], 60, keep=True)]  # fmt: skip
    if all(outputs):
        one, two = ([g["choices"][0]["tokens"] for g in json.loads(o)] for o in outputs)  # type: ignore[arg-type]
        same = [next((i for i, (x, y) in enumerate(zip(s, t, strict=True)) if x != y), len(s)) for s, t in zip(one, two, strict=True)]
        runner.verdict(f"rewrite generate: of texts of 24 tokens the first {same} are the same on one GPU and two")
    killed_rank(runner, plans / "tiny-2")
    found = runner.run("rewrite bench-generate, two GPUs", [*MPIRUN, *cli, "bench-generate", str(plans / "tiny-2"), *memory], 60, keep=True)
    runner.verdict(f"rewrite bench-generate: {' / '.join(found.splitlines()) if found else 'FAILED'}")


def ranks_of(plan: Path) -> dict[int, int]:
    """Processes that generate with this plan, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(plan).encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                variables = dict(v.split(b"=", 1) for v in (entry / "environ").read_bytes().split(b"\0") if b"=" in v)
                if b"OMPI_COMM_WORLD_RANK" in variables:
                    found[int(variables[b"OMPI_COMM_WORLD_RANK"])] = int(entry.name)
        except OSError:
            continue
    return found


def killed_rank(runner: Runner, plan: Path) -> None:
    """A rank that is killed while both generate ends the other one, too."""
    runner.say("killed: rank 1 of two that generate")
    arguments = ["generate", str(plan), "--device", "cuda", "--kv-memory", "4G", "--tokens", "5,6", "--max-new-tokens", "100000", "--ignore-eos"]
    process = subprocess.Popen([*MPIRUN, sys.executable, "-m", "rewrite.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=HERE)
    time.sleep(14)  # until they generate
    victims = ranks_of(plan)
    if len(victims) != 2 or process.poll() is not None:
        runner._end(process)
        runner.verdict(f"killed: FAILED, they did not run: {victims} {(process.communicate()[1] or '')[-500:]}")
        return
    os.kill(victims[1], signal.SIGKILL)
    began = time.monotonic()
    try:
        errors = process.communicate(timeout=20)[1]
    except subprocess.TimeoutExpired:
        runner._end(process)
        errors = "it had to be ended"
    lines = [line for line in errors.splitlines() if "rank" in line.lower()]
    runner.verdict(f"killed: ended {time.monotonic() - began:.2f} s after rank 1 was killed, exit code {process.returncode}, left: {ranks_of(plan)}; {lines[:2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--archive", type=Path, default=HERE / "two_gpus.tar.xz", help="of `hollow_plans.py`")
    options = parser.parse_args()
    runner, stages = Runner(options.seconds), options.stages.split(",")
    os.environ.setdefault("REWRITE_PATIENCE", "60")  # a rank that compiles kernels may hold Python's lock
    os.environ["PYTHONUNBUFFERED"] = "1"
    runner.run("GPUs", ["sh", "-c", "nvidia-smi -L; nvidia-smi topo -m; true"], 30)
    python, wrong = sys.executable, False
    with tempfile.TemporaryDirectory() as folder:
        plans = Path(folder)
        try:
            if "sums" in stages:
                output = runner.run("sums", [python, "all_reduce.py", "--gpus", "2"], 120, keep=True) or ""
                print(output, flush=True)
                wrong = output.count("'verdict': 'ok'") < 2
                runner.verdict(f"sums: {'WRONG: from here on all are by NCCL' if wrong else 'ok'}")
            if "tests" in stages:
                done = runner.run("tests", [python, "-m", "pytest", "-q", "-x", "-m", "gpu", "../tests/test_cuda_ranks.py", "-p", "no:cacheprovider"], 120)
                runner.verdict(f"tests: {'passed' if done is not None else 'FAILED'}")
            run_plans(runner, [s for s in stages if s in LIMIT], plans, options.archive, wrong, "nccl" in stages)
        finally:
            files = sorted(plans.glob("*.result.json"))
            found = [row for file in files for row in rows(file)]
            launches = {file.name.split(".")[0]: json.loads(file.read_text()).get("launches") for file in files}
            if found:
                data = {"rows": found, "launches": launches, "verdicts": runner.verdicts}
                runner.say(f"written to {record.write('ranks_decode', found[0]['device'], record.versions('cupy-cuda13x', 'nvidia-nccl-cu13', 'mpi4py', 'numpy'), data)}")
            print("\n".join(["VERDICTS", *runner.verdicts]), flush=True)


def run_plans(runner: Runner, names: Sequence[str], plans: Path, archive: Path, nccl: bool, both: bool) -> None:
    """Each plan on its GPUs; with `nccl` all sums are by NCCL, with `both` in a last run of 8b."""
    from ranks_decode import make_usable

    if not names:
        return
    with tarfile.open(archive) as file:
        file.extractall(plans, filter="data")
    for plan in [p for p in plans.iterdir() if p.is_dir()]:
        make_usable(plan)
    mpi = has_mpi(runner)
    for name in names:
        try:
            for world in [w for w in (1, 2) if (plans / f"{name}-{w}").exists()]:
                run_plan(runner, plans, (name, world, nccl), mpi)
            if name != "70b":
                compare(runner, plans, name, nccl)
                scaling(runner, plans, name, nccl)
            if name == "tiny" and mpi:
                command_line(runner, plans)
        except Exception as error:
            runner.verdict(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    if both and not nccl:
        run_plan(runner, plans, ("8b", 2, True), mpi)


def run_plan(runner: Runner, plans: Path, run: Run, mpi: bool) -> None:
    name, world, nccl = run
    more = {"tiny": ["--repeat", "1"], "70b": ["--repeat", "1", "--speed"]}.get(name, []) + (["--nccl"] if nccl else [])
    command = [sys.executable, "ranks_decode.py", str(plans / f"{name}-{world}"), "--limit", str(LIMIT[name] - 10), "--result", str(result(plans, run)), *more]
    if world > 1:
        command = [*MPIRUN, *command] if mpi else [*command, "--start", str(world)]
    what = f"{name} on {world}{' by NCCL' if nccl else ''}"
    done = runner.run(what, command, LIMIT[name])
    runner.verdict(f"{what}: {'done' if done is not None else 'FAILED'}")
    for row in rows(result(plans, run)):
        runner.verdict(f"{what}, batch {row['batch']}: {row['ms']:.3f} ms, {row['tokens_per_second']:.1f} tokens/s | "
                       f"{row['gbs']:.0f} GB/s a rank, {row['share']:.0%} of {row['copy_gbs']:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
