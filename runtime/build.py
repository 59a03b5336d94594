"""From a rewritten model to a plan: cut, compile each distinct segment, write the directory whole or not at all."""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import rewrite
from rewrite import sandbox
from rewrite.errors import CheckFailed, RewriteError, Unfinished
from rewrite.files import swap_directory
from rewrite.model import Model, load
from rewrite.registry import library
from rewrite.runtime import engine, seal, weights
from rewrite.runtime.machine import CAPABILITY, TUNED_ON, fingerprint
from rewrite.runtime.partition import Partition, partition
from rewrite.runtime.plan import MANIFEST, WEIGHTS, Manifest, Plan
from rewrite.runtime.plan_model import PlanModel
from rewrite.runtime.profile import GENERATOR, Profile
from rewrite.runtime.rank_model import local_generator, partition_ranks
from rewrite.runtime.tokenizer import copy_tokenizer, eos_of, tokenizer_folder
from rewrite.shards import Shards, shards_of
from rewrite.validity import check_tolerance
from rewrite.verify import MODEL_TOLERANCE, SIZES, compare, model_inputs, names_in
from rewrite.verify_generator import Texts, at_once, compare_steps, generator_of

TUNING_MEMORY = 64 << 20  # bytes for the caches of a text generator whose kernels are timed
PARTS = {MANIFEST, seal.SEAL, seal.SIGNATURE, WEIGHTS, "segments", "engines", "tokenizer"}  # of a plan's folder
Progress = Callable[[str], None]
UNCHECKED = "build with --no-verify and compare yourself"


def build(
    model: str | os.PathLike[str] | onnx.ModelProto | Model,
    directory: str | os.PathLike[str],
    *,
    profile: str | None = None,
    engines: bool = True,
    verify: bool = True,
    tolerance: float = 1e-4,
    tune: bool = False,
    sign_key: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Compile a model, rewritten or not, into a plan.

    Args:
        model: a path, a protobuf, or what `load` or `optimize` returned.
        directory: where the plan goes; an older plan there is replaced.
        profile: sizes of the named dimensions, `batch=1:8:32,seq=1:128:512` (smallest, best, largest).
        engines: compile the segments with TensorRT; without, the plan runs on the CPU alone.
        verify: run the plan on the CPU and compare its outputs with the model's in ONNX Runtime.
        tolerance: largest difference allowed, relative to each output's largest value.
        tokenizer: of a text generator, the folder of its tokenizer, which is copied into the plan; None: the one that the
            model says it was exported with, if it is there.
        tune: on the GPU at hand, time the kernels that could do each step at the profile's smallest, best and largest sizes; the
            plan keeps the figures, and on a GPU of this name the fastest are used.
        sign_key: name of a key file; the plan is signed with it, so that it can be loaded with `key` (by default that of the
            environment's REWRITE_PLAN_KEY, if there is one).
        progress: called with a line on each step that takes time.

    Raises:
        RewriteError: bad input, or a segment that TensorRT cannot compile; nothing is written.
        CheckFailed: the plan's outputs are not the model's; nothing is written.
    """
    check_tolerance(tolerance)
    if profile is not None and not isinstance(profile, str):
        raise RewriteError(f"profile: a {type(profile).__name__}; write the sizes as text, for example 'batch=1:8:32,sequence=1:128:512'")
    source, target = load(model), Path(directory)
    say: Progress = progress or (lambda line: None)
    _check_target(target)
    if tune:
        engine.gpu_model()  # there is one
    key = seal.read_key(sign_key)
    say("cutting the model at its plugin nodes")
    shards = shards_of(source.proto)
    cut = partition(source, library().plugins) if shards is None else partition_ranks(source, library().plugins)
    generator, folder = generator_of(source.proto), None
    if shards is not None and tune and generator is None:
        raise RewriteError(f"{source.name}: it is for {shards.ranks} ranks, and of such only text generators are timed; build it without --tune")
    if generator is None and tokenizer is not None:
        raise RewriteError(f"{source.name}: not a text generator, so it has no use for a tokenizer; leave --tokenizer out, or make one with `rewrite optimize --generate`")
    if generator is not None and shards is not None:
        generator = local_generator(generator, source)
    if generator is not None:
        folder = tokenizer_folder(source, tokenizer)
        generator = {**generator, "eos": eos_of(source), "tokenizer": "tokenizer" if folder is not None else None}
    named = dict.fromkeys(d for v in cut.inputs.values() for d in v.shape if isinstance(d, str))
    names = [d for d in named if names_in(d) == (d,) or not all(n in named for n in names_in(d))]  # `past + 1` follows from `past`
    sizes = Profile.parse(profile, names, GENERATOR if generator is not None else None)
    compiled = _compile(cut, sizes, say) if engines else {}
    work: Path | None = None
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name[:50]}.", suffix=".tmp", dir=target.parent))
        say("writing the plan")
        if folder is not None:
            copy_tokenizer(folder, work / "tokenizer")
        _write(work, source, cut, sizes, compiled, generator, Shards(1) if shards is None else shards)
        seal.seal(work, key)
        if verify:
            say("comparing the plan's outputs with the model's")
            check_plan(Plan(work, key=sign_key), source, tolerance)
        if tune:
            _tune(work, source, sign_key, key, say)
            if verify and shards is None:
                check_plan(Plan(work, device="cuda", key=sign_key), source, tolerance)
        swap_directory(work, target)  # an older plan stays until the new one stands
    except OSError as error:
        raise RewriteError(f"{target}: cannot be written: {error.strerror or error}; nothing was changed") from error
    finally:
        if work is not None and os.path.islink(work):  # it stood at `target`
            work.unlink()
        elif work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return Plan(target, key=sign_key)


def _check_target(target: Path) -> None:
    """Can a plan be written at `target`, and nothing be lost but an older plan? Raises RewriteError with the reason if not."""
    try:
        names = set(os.listdir(target))
    except FileNotFoundError:
        names = set()
    except OSError as error:
        raise RewriteError(f"{target}: cannot be written: {error.strerror}; name another directory") from error
    if names and not {MANIFEST, WEIGHTS} <= names:
        raise RewriteError(f"{target}: exists and is not a plan; name another directory")
    if strange := sorted(names - PARTS):
        raise RewriteError(f"{target}: has {strange[0]!r} in it, which is of no plan and would be lost; move it, or name another directory")
    if not target.parent.is_dir():
        raise RewriteError(f"{target}: the folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise RewriteError(f"{target}: cannot be written: the folder {target.parent} is read-only; name another")


def _compile(cut: Partition, profile: Profile, say: Progress) -> dict[str, bytes]:
    """The engine of each segment, by its key."""
    engines: dict[str, bytes] = {}
    for index, (key, segment) in enumerate(cut.segments.items(), 1):
        uses = [s for s in cut.steps if s.name == key]
        say(f"TensorRT: segment {index} of {len(cut.segments)}, {len(segment.graph.node)} nodes, used {len(uses)} times")
        shapes = {i.name: tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in i.type.tensor_type.shape.dim) for i in segment.graph.input}
        names = dict(zip((v.name for v in (*segment.graph.input, *segment.graph.output)), (*uses[0].inputs, *uses[0].outputs), strict=True))
        engines[key] = engine.build_engine(segment, shapes, profile, names)
    return engines


def _write(work: Path, source: Model, cut: Partition, profile: Profile, engines: Mapping[str, bytes], generator: dict[str, Any] | None, shards: Shards) -> None:
    os.chmod(work, 0o777 & ~_umask())
    for folder in ("segments", "engines"):
        (work / folder).mkdir()
    for key, segment in cut.segments.items():
        (work / "segments" / f"{key}.onnx").write_bytes(segment.SerializeToString(deterministic=True))
    for key, data in engines.items():
        (work / "engines" / f"{key}.engine").write_bytes(data)
    with (work / WEIGHTS).open("wb") as file, seal.Writer(file) as writer:
        weights.write(writer, cut.weights, {"format": "np", "model": source.name})
        digests = writer.digests()
    import onnxruntime

    versions = {"rewrite": rewrite.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}
    if engines:
        versions["tensorrt"] = engine.version()
        if engine.fixed():  # to the GPU they were built on
            versions[CAPABILITY] = engine.capability()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    manifest = Manifest(source.name, source.opset, cut.inputs, cut.outputs, cut.values, cut.steps, profile, versions, now, generator=generator, world=shards.ranks, stages=shards.stages)
    plugins = library().plugins
    manifest.plugins = {name: fingerprint(plugins[name]) for name in sorted({s.name for s in cut.steps if s.kind == "plugin"})}
    for path in sorted(p for p in work.rglob("*") if p.is_file()):
        name = path.relative_to(work).as_posix()
        manifest.files[name] = (path.stat().st_size, digests if name == WEIGHTS else seal.digests(path.read_bytes()))
    (work / MANIFEST).write_text(manifest.to_json())


def _tune(work: Path, source: Model, sign_key: str | os.PathLike[str] | None, key: bytes | None, say: Progress) -> None:
    """Time the kernels for the plan in `work` and enter the figures in its manifest."""
    plan = Plan(work, device="cuda", key=sign_key)
    ranges, world = plan.manifest.profile.ranges, plan.manifest.world
    for rank in range(0, world, plan.manifest.ranks_of_stage) if plan.manifest.generator is not None else ():  # the ranks of a stage do the same
        say("timing kernels for texts that decode and for prompts" + (f", of rank {rank}" if world > 1 else ""))
        model = PlanModel(plan, TUNING_MEMORY, only=rank if world > 1 else None)
        plan.manifest.tuning |= model.tune()
        if model.device is not None:
            model.device.close()
    for index, name in enumerate(("smallest", "best", "largest") if plan.manifest.generator is None else ()):
        say(f"timing kernels at the profile's {name} sizes")
        plan.manifest.tuning |= plan.tune(model_inputs(source.proto, index, {n: r[index] for n, r in ranges.items()}))
    plan.manifest.versions[TUNED_ON] = engine.gpu_model()
    (work / MANIFEST).write_text(plan.manifest.to_json())
    seal.seal(work, key)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_plan(plan: Plan, model: Model, tolerance: float, attempts: int = 2) -> float:
    """Run a plan and its model on generated inputs; returns the largest difference relative to each output's largest value.

    The model is run first, in a child under limits: what it does not survive, the plan does not come to.
    Raises CheckFailed, naming the output, if they differ by more than `tolerance`; 16-bit outputs may by what their type rounds to.
    """
    if plan.manifest.generator is not None:
        return check_generator_plan(plan, model, tolerance)
    ranges = plan.manifest.profile.ranges if plan.has_engines else {}
    feeds: list[Mapping[str, np.ndarray[Any, Any]]] = []
    for attempt in range(attempts):
        sizes = {n: min(max(size, low), high) for size, (n, (low, _, high)) in zip(SIZES[attempt] * len(ranges), ranges.items(), strict=False)}
        feeds.append(model_inputs(model.proto, attempt, sizes, UNCHECKED))
    try:
        found = sandbox.run_each(model, list(feeds), UNCHECKED)
    except Unfinished:
        raise
    except RewriteError as error:
        raise RewriteError(f"{error}; {UNCHECKED}") from error
    worst, done = 0.0, 0
    for given, expected in zip(feeds, found, strict=True):
        if isinstance(expected, RewriteError):
            continue
        actual = plan.run(given)
        done += 1
        for name in plan.manifest.outputs:
            want = np.asarray(expected[name])
            if actual[name].dtype.name == "bfloat16":  # which ONNX Runtime computes in float32
                want = want.astype(actual[name].dtype)
            limits = {kind: (max(tolerance, least),) * 2 for kind, least in MODEL_TOLERANCE.items()}
            verdict = compare([want], [actual[name]], limits)
            if not verdict.ok:
                raise CheckFailed(f"the plan's output '{name}' is not the model's: {verdict.reason}")
            largest = float(np.abs(want.astype(np.float64)).max(initial=0.0)) if want.dtype.kind in "fV" else 0.0
            worst = max(worst, verdict.error / max(largest, 1e-6))
    if not done:
        raise RewriteError(f"{found[-1]}, in ONNX Runtime on generated inputs; {UNCHECKED}")
    return worst


def check_generator_plan(plan: Plan, model: Model, tolerance: float) -> float:
    """The same for a text generator: random texts in ragged steps by the plan, against the model that reads them at once."""
    found = plan.manifest.generator
    assert found is not None
    tolerance = max([tolerance, *(MODEL_TOLERANCE.get(layer["dtype"], 0.0) for layer in found["layers"])])
    whole = generator_of(model.proto)
    assert whole is not None
    if plan.manifest.world > 1:  # caches of all ranks side by side, as `AllRanks` takes them
        found = {**found, "layers": [{**layer, "kv_heads": plan.manifest.ranks_of_stage * layer["kv_heads"]} for layer in found["layers"]]}
    texts = Texts.random(np.random.default_rng(0), found)
    expected = at_once(whole, texts, lambda feeds: sandbox.run(model, feeds, UNCHECKED))
    return compare_steps(found, texts, expected, plan.run, tolerance, "the plan", singles=2)
