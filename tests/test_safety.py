"""What is done about plans that were damaged, changed, or made for something else: refused in one line, before anything is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse

import rewrite
from rewrite.cli import main
from rewrite.registry import library, load_rules_file
from rewrite.runtime import cpu, engine, machine, schema, seal, weights
from rewrite.runtime.plan import Manifest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import record

LAYER = "p{i} = MatMul(h{i}, w{i})\n q{i} = Add(p{i}, b{i})\n a{i} = Relu(q{i})\n s{i} = Add(a{i}, h{i})\n h{j} = LayerNormalization<axis = -1>(s{i}, g{i}, c{i})\n"
KEY = b"sixteen bytes or more"
FLIPS = 1000


def model(count=2):
    rng = np.random.default_rng(0)
    body = "".join(LAYER.format(i=i, j=i + 1) for i in range(count)).replace("h0", "x").replace(f"h{count}", "y")
    made = {f"{n}{i}": rng.standard_normal((8, 8) if n == "w" else 8).astype(np.float32) for i in range(count) for n in "wbgc"}
    return parse(f"(float[batch, seq, 8] x) => (float[batch, seq, 8] y) {{ {body} }}", **made)


FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A signed plan with engines; the key is beside it."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "key").write_bytes(KEY)
    rewrite.build(rewrite.optimize(model()).model, folder / "p", profile="batch=1:2:4,seq=1:8:16", sign_key=folder / "key")
    np.savez(folder / "x.npz", **FEEDS)
    return folder / "p"


@pytest.fixture
def plan(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "p"))


@pytest.fixture
def unseen(monkeypatch):
    """Nothing may reach ONNX Runtime, ONNX or TensorRT."""

    def reached(*_, **__):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(cpu, "session", reached)
    monkeypatch.setattr(onnx, "load_model_from_string", reached)
    monkeypatch.setattr(engine, "deserialize", reached)
    monkeypatch.setattr(engine, "runtime", reached)


def run(path, *options):
    return CliRunner().invoke(main, ["run", str(path), "--inputs", str(path.parent / "x.npz"), *map(str, options)])


def refusal(path, key=None):
    """The one line with which the plan at `path` is refused when it is run."""
    with pytest.raises(rewrite.RewriteError) as caught:
        rewrite.Plan(path, key=key).run(FEEDS)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 2
    return text


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file())


def change_manifest(path, change):
    """Change the manifest as one who can seal it again."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))
    (path / "manifest.hmac").unlink(missing_ok=True)
    seal.seal(path, None)


def rewrite_file(path, name, content):
    """The same for another file."""
    (path / name).write_bytes(content)
    change_manifest(path, lambda d: d["files"].update({name: [len(content), seal.digests(content)]}))


# --- damage -------------------------------------------------------------------------------------------------------
def test_the_plan_itself_runs(built):
    assert {p.suffix for p in files(built)} == {".json", ".sha256", ".hmac", ".safetensors", ".onnx", ".engine"}
    want = rewrite.Plan(built).run(FEEDS)["y"]
    np.testing.assert_array_equal(rewrite.Plan(built, key=built.parent / "key").run(FEEDS)["y"], want)


REASONS = ("does not fit", "another size than", "is not signed with this key")


def truncate(path, lengths):
    """Cut each file at each length, the longest first; returns how many, and what was said. None of it was loaded."""
    said = Counter()
    for file in files(path):
        whole = file.read_bytes()
        for length in sorted(lengths(len(whole)), reverse=True):
            os.truncate(file, length)
            text = refusal(path)
            said[next(r for r in REASONS if r in text)] += 1
        file.write_bytes(whole)
    return said


def test_truncations_are_refused(plan, unseen):
    """All of files up to 600 bytes, and a sample of the others with both ends."""
    count = sum(truncate(plan, lambda n: range(n) if n <= 600 else {*range(0, n, n // 200), *range(n - 16, n), *range(16)}).values())
    assert count > 1000


def test_removals_are_refused(plan, unseen):
    for file in files(plan):
        whole = file.read_bytes()
        file.unlink()
        text = refusal(plan)
        assert "is missing" in text or "not a plan" in text or "does not fit" in text, text
        file.mkdir()
        assert "not a regular file" in refusal(plan), file
        file.rmdir()
        file.write_bytes(whole)
    assert rewrite.Plan(plan).manifest.steps


def flip(path, count, seed, *options):
    """Flip a bit, run the command, flip it back, `count` times over all files; returns how often in which."""
    random_ = random.Random(seed)
    hit = Counter()
    for _ in range(count):
        file = random_.choice(files(path))
        data = bytearray(file.read_bytes())
        data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        whole = file.read_bytes()
        file.write_bytes(data)
        done = run(path, *options)
        where = f"{file.name}: {done.output}"
        assert done.exit_code == 2, where
        assert len(done.stderr.strip().splitlines()) == 1, where
        assert done.stderr.startswith("rewrite: "), where
        assert isinstance(done.exception, SystemExit), where
        file.write_bytes(whole)
        hit[file.relative_to(path).as_posix()] += 1
    return hit


def test_bit_flips_are_refused_by_the_command(plan, unseen, built):
    shutil.copy(built.parent / "x.npz", plan.parent)
    hit = flip(plan, FLIPS, 0)
    assert sum(hit.values()) == FLIPS
    assert min(hit[p.relative_to(plan).as_posix()] for p in files(plan)) > FLIPS / 20


def test_a_flip_that_leaves_a_valid_manifest_is_refused(plan, unseen):
    text = (plan / "manifest.json").read_text()
    (plan / "manifest.json").write_text(text.replace('"LayerNormalization', '"LayerNormalizatioo').replace("batch", "batcj"))
    json.loads((plan / "manifest.json").read_text())
    assert "manifest.sha256: does not fit manifest.json and manifest.hmac" in refusal(plan)


@pytest.mark.slow
def test_every_truncation_and_many_flips(plan, unseen, built):
    """At every length of every file; recorded."""
    shutil.copy(built.parent / "x.npz", plan.parent)
    sizes, started = {p.relative_to(plan).as_posix(): p.stat().st_size for p in files(plan)}, time.perf_counter()
    said = truncate(plan, range)
    assert sum(said.values()) == sum(sizes.values())
    hit = flip(plan, 5 * FLIPS, 1)
    results = {"files": sizes, "truncations": sum(said.values()), "said": dict(said), "flips": dict(hit), "seconds": round(time.perf_counter() - started, 1)}
    record.write("damaged_plans", record.cpu(), record.versions("onnx", "onnxruntime", "tensorrt-rtx"), results)


# --- names, links, kinds of files -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "segments/../../secret", "a/b/c", "..", ".", "", "a//b", "segments/x\n", "\\x", "manifest.json", "a\0b", ".hidden"])
def test_names_stay_inside_the_plan(plan, unseen, name):
    (plan.parent / "secret").write_text("secret")
    change_manifest(plan, lambda d: d["files"].update({name: [6, seal.digests(b"secret")]}))
    assert "not the name of a file inside a plan" in refusal(plan)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "weights.safetensors", "engines"])
def test_links_are_not_followed(plan, unseen, name):
    shutil.move(plan / name, plan.parent / "elsewhere")
    (plan / name).symlink_to(plan.parent / "elsewhere")
    assert "is a link" in refusal(plan)


def test_a_pipe_is_not_waited_for(plan, unseen):
    (plan / "weights.safetensors").unlink()
    os.mkfifo(plan / "weights.safetensors")
    assert "not a regular file" in refusal(plan)


@pytest.mark.parametrize(("name", "reason"), [("nothing", "there is no such directory"), ("p/manifest.json", "a file"), ("p/segments", "it has no manifest.json")])
def test_what_is_no_plan(plan, name, reason):
    assert f"not a plan: {reason}" in refusal(plan.parent / name)


# --- signatures -----------------------------------------------------------------------------------------------------
def test_a_plan_made_by_another_is_refused_where_a_key_is_given(plan, built, unseen, monkeypatch):
    key = built.parent / "key"
    other = plan.parent / "other"
    other.write_bytes(b"another key of enough bytes")
    assert "not signed with this key" in refusal(plan, other)
    change_manifest(plan, lambda d: d.update(model="evil.onnx"))
    assert rewrite.Plan(plan).manifest.model == "evil.onnx"  # sealed again: without a key nobody can tell
    assert "the plan is not signed" in refusal(plan, key)
    shutil.copy(built / "manifest.hmac", plan)
    seal_text = "".join(f"{seal.digests((plan / n).read_bytes())[0]}  {n}\n" for n in ("manifest.json", "manifest.hmac"))
    (plan / "manifest.sha256").write_text(seal_text)
    assert "not signed with this key, or was changed" in refusal(plan, key)
    monkeypatch.setenv("REWRITE_PLAN_KEY", str(key))
    assert "not signed with this key" in refusal(plan)


def test_the_seal_is_what_sha256sum_reads(built):
    lines = dict(reversed(x.split("  ")) for x in (built / "manifest.sha256").read_text().splitlines())
    assert list(lines) == ["manifest.json", "manifest.hmac"]
    assert all(seal.digests((built / n).read_bytes()) == [d] for n, d in lines.items())


@pytest.mark.parametrize(("content", "reason"), [(None, "cannot be read"), (b"short", "it has 5 bytes, a key has 16 to 4096"), (b"x" * 5000, "it has more bytes")])
def test_bad_keys(plan, unseen, content, reason):
    key = plan.parent / "k"
    if content is not None:
        key.write_bytes(content)
    assert reason in refusal(plan, key)
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.build(model(1), plan.parent / "q", engines=False, sign_key=key)
    assert not (plan.parent / "q").exists()


def test_a_key_without_a_name_is_refused(plan, unseen, monkeypatch):  # --key "$KEY", where nobody set KEY, would check nothing
    monkeypatch.setenv("REWRITE_PLAN_KEY", "")  # as if it were not set
    assert rewrite.Plan(plan).manifest.steps
    assert "key file '': cannot be read" in refusal(plan, "")
    with pytest.raises(rewrite.RewriteError, match="key file '': cannot be read"):
        rewrite.build(model(1), plan.parent / "q", engines=False, sign_key="")


def test_keys_of_the_commands(tmp_path):
    onnx.save(model(1), tmp_path / "m.onnx")
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "other").write_bytes(KEY[::-1])
    call = CliRunner().invoke
    for signed in (True, False):
        done = call(main, ["build", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "p"), "--no-engines", "--no-verify", *(["--sign-key", str(tmp_path / "key")] if signed else [])])
        assert done.exit_code == 0, done.output
        codes = [call(main, ["inspect", str(tmp_path / "p"), *options]).exit_code for options in ([], ["--key", str(tmp_path / "key")], ["--key", str(tmp_path / "other")])]
        assert codes == ([0, 0, 2] if signed else [0, 2, 2])


# --- the manifest's content -----------------------------------------------------------------------------------------
def step(**changes):
    return lambda d: d["steps"][0].update(changes)


CHANGES = {
    "an unknown key": (lambda d: d.update(extra=1), "unknown key 'extra'"),
    "an unknown key of a step": (step(extra=1), r"steps[0] has an unknown key 'extra'"),
    "a missing key": (lambda d: d.pop("steps"), "has no 'steps'"),
    "a number for a name": (lambda d: d.update(model=1), "model: expected a string, found a whole number"),
    "true for a number": (lambda d: d.update(opset=True), "opset: expected a whole number, found true or false"),
    "a string for a list": (step(inputs="x"), "steps[0].inputs: expected a list, found a string"),
    "an odd dimension": (lambda d: d["inputs"]["x"].update(shape=[1.5]), "inputs.x.shape[0]: expected a whole number, found a number"),
    "a negative dimension": (lambda d: d["inputs"]["x"].update(shape=[-1]), "negative size"),
    "a profile out of order": (lambda d: d.update(profile={"batch": [4, 2, 1]}), "batch is not in order"),
    "a profile of two": (lambda d: d.update(profile={"batch": [1, 2]}), "profile.ranges.batch: expected 3 elements, found 2"),
    "no profile": (lambda d: d.pop("profile"), "profile.ranges: expected an object, found null"),
    "another kind of step": (step(kind="shell"), "steps[0] is a 'shell'"),
    "a segment that is not there": (step(kind="segment", name="../x"), "there is no segment '../x'"),
    "no weights": (lambda d: d["files"].pop("weights.safetensors"), "there is no weights.safetensors"),
    "a value made twice": (lambda d: d["steps"].append(d["steps"][0]), "made twice"),
    "steps in another order": (lambda d: d["steps"].reverse(), "before it is made"),
    "a value that is never made": (lambda d: d["steps"].pop(), "is never made"),
    "a value nobody makes": (step(inputs=["ghost"]), "'ghost', which is neither made nor among the weights"),
    "another format": (lambda d: d.update(format=1), "another format"),
    "a plugin nobody has": (step(name="Unheard"), "calls plugin Unheard, which no loaded rules file declares"),
    "an attribute it does not take": (step(attributes={"shell": "ls"}), "with the attribute 'shell', which it does not take"),
    "too many inputs": (step(inputs=["x"] * 9), "with 9 inputs for 1 outputs"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_is_not_what_is_written(plan, unseen, change, reason):
    change_manifest(plan, change)
    assert reason in refusal(plan)


TEXTS = {
    "[]": "another format", "{": "not a manifest", '{"format": 2, "format": 2}': "a key is there twice", '{"format": NaN}': "NaN is no JSON",
    "[" * 100_000: "nested too deep", "\ud800": "not a manifest", "": "not a manifest",
}  # fmt: skip


@pytest.mark.parametrize(("text", "reason"), TEXTS.items(), ids=[t[:30] for t in TEXTS])
def test_text_that_is_no_manifest(plan, unseen, text, reason):
    (plan / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    (plan / "manifest.hmac").unlink()
    seal.seal(plan, None)
    assert reason in refusal(plan)


def test_the_manifest_reads_back_as_it_was(built):
    manifest = rewrite.Plan(built).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest
    steps = [dataclasses.replace(s, attributes={"fill": float("-inf"), "a": [1, 2.5, "x"]}) for s in manifest.steps]
    odd = dataclasses.replace(manifest, steps=steps)
    assert Manifest.from_json(odd.to_json()) == odd


def test_json_is_not_converted():
    assert schema.typed([1, 2], tuple[int, ...]) == (1, 2)
    assert schema.typed(3, float) == 3.0
    assert schema.typed(None, int | None) is None
    for value, kind in [("1", int), (1, str), (1.0, int), ([1], tuple[int, int]), (True, int | str), ({}, list[int]), ({"a": 1}, dict[str, str])]:
        with pytest.raises(ValueError, match="expected"):
            schema.typed(value, kind)


def entry(shape, offsets, dtype="F32"):
    return {"w0": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = [entry([-1], [0, 4]), entry([2], [-8, 0]), entry([2], [0, 4]), entry([2], [0, 8], "F99"), entry([2], [0, 8, 9]), entry("2", [0, 8]), entry([1.5], [0, 6]), {"w0": 1}, []]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_weights_with_a_header_that_lies(plan, unseen, header):
    text = json.dumps(header).encode()
    rewrite_file(plan, "weights.safetensors", len(text).to_bytes(8, "little") + text + bytes(64))
    assert "not a safetensors file" in refusal(plan)


# --- does it fit --------------------------------------------------------------------------------------------------
SUM = "import numpy as np, rewrite\n\n@rewrite.plugin\nclass SquaredSum:\n    inputs = ('x',)\n    tolerance = {}\n    def reference(x):\n        return np.sum(x) ** 2\n"


def test_another_plugin_of_the_same_name_has_another_fingerprint(tmp_path):
    """A rules file that was changed after the build computes something else than what was verified; a comment does not matter."""
    prints = []
    for index, text in enumerate([SUM, SUM.replace("** 2", "** 2  # squared"), SUM.replace("** 2", "** 3"), SUM.replace("('x',)", "('x', 'z?')").replace("(x):", "(x, z=None):")]):
        (tmp_path / f"r{index}.py").write_text(text)
        prints.append(machine.fingerprint(load_rules_file(tmp_path / f"r{index}.py").plugins["SquaredSum"]))
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_changed_reference_is_named(plan, unseen, monkeypatch):
    plugins = library().plugins
    monkeypatch.setitem(plugins, "MatMulAct", dataclasses.replace(plugins["MatMulAct"], attributes={**plugins["MatMulAct"].attributes, "activation": "relu"}))
    manifest = rewrite.Plan(plan).manifest
    with pytest.raises(rewrite.RewriteError, match=r"plugin MatMulAct of .* is not the one that the plan was built and verified with"):
        machine.check_plugins(manifest, plugins, "p")


@pytest.mark.parametrize(("change", "here", "reason"), [
    ({"tensorrt": "tensorrt_rtx 1.0"}, "9.0", "built with tensorrt_rtx 1.0, this machine has tensorrt_rtx 1.6.1; build it again"),
    ({"compute capability": "8.0"}, "9.0", "for GPUs of compute capability 8.0, this one has 9.0"),
    (None, "9.0", "built without engines"),
    ({}, "9.0", None), ({"compute capability": "9.0"}, "9.0", None),
])  # fmt: skip
def test_engines_must_fit_the_machine(built, change, here, reason):
    manifest = rewrite.Plan(built).manifest
    changed = dataclasses.replace(manifest, versions={**manifest.versions, "tensorrt": "tensorrt_rtx 1.6.1", **(change or {})})
    if change is None:
        changed.files = {n: f for n, f in changed.files.items() if not n.startswith("engines/")}
    if reason is None:
        machine.check_engines(changed, "p", "tensorrt_rtx 1.6.1", here)
        return
    with pytest.raises(rewrite.RewriteError, match=reason):
        machine.check_engines(changed, "p", "tensorrt_rtx 1.6.1", here)


# --- TensorRT -------------------------------------------------------------------------------------------------------
def test_tensorrt_may_not_run_code_of_an_engine_on_the_host():
    """On the real runtime, as it comes from `engine.runtime`, whatever the default of its version."""
    made = engine.runtime()
    assert type(made).__module__.startswith("tensorrt")
    assert made.engine_host_code_allowed is False


def test_what_tensorrt_refuses_is_one_line():
    with pytest.raises(rewrite.RewriteError, match=r"^e\.engine: TensorRT refuses it on this GPU: .+; build the plan again on this machine$") as caught:
        engine.deserialize(engine.runtime(), b"no engine at all", "e.engine")
    assert "\n" not in str(caught.value)


class FakeCache:
    """TensorRT's IRuntimeCache: it needs a GPU."""

    def __init__(self):
        self.content = b""

    def deserialize(self, blob):
        self.content = bytes(blob)
        return True

    def serialize(self):
        return self.content


class FakeConfig:
    def __init__(self):
        self.cache = None

    def create_runtime_cache(self):
        return FakeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A new start each time: what a process has of the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def start(engines=("a", "b"), device="H100 9.0"):
        made = engine.KernelCache(engines, device)
        config = FakeConfig()
        made.attach(config)
        return made, config.cache

    return start


def test_kernels_are_found_at_the_next_start(kernels, tmp_path):
    first, cache = kernels()
    cache.content = b"kernels"
    first.save()
    assert [p.parent for p in tmp_path.rglob("*.bin")] == [tmp_path / "rewrite" / "kernels"]
    assert first.path.stat().st_mode & 0o777 == 0o600
    second, found = kernels()
    assert found.content == b"kernels"
    before = second.path.stat()
    second.save()  # nothing new
    assert second.path.stat().st_ino == before.st_ino
    found.content += b" and more"
    second.save()
    assert kernels()[1].content == b"kernels and more"


def test_one_cache_serves_all_engines_of_a_plan(kernels):
    made, cache = kernels()
    config = FakeConfig()
    made.attach(config)
    assert config.cache is cache


def test_kernels_of_other_engines_or_machines_are_others(kernels):
    paths = {kernels(engines, device)[0].path for engines in (("a", "b"), ("b", "a"), ("a",)) for device in ("H100 9.0", "H100 9.0 driver 13")}
    assert len(paths) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "link", "writable", "directory"])
def test_damaged_kernels_are_compiled_again(kernels, damage, tmp_path):
    first, cache = kernels()
    cache.content = b"kernels" * 10
    first.save()
    path, data = first.path, bytearray(first.path.read_bytes())
    if damage == "link":
        path.rename(tmp_path / "other")
        path.symlink_to(tmp_path / "other")
    elif damage == "writable":
        path.chmod(0o666)
    elif damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        data[40] ^= damage == "flip"
        path.write_bytes({"cut": data[:-1], "flip": data, "empty": b""}[damage])
    again, found = kernels()
    assert found.content == b""
    found.content = b"new"
    again.save()
    if damage != "directory":
        assert kernels()[1].content == b"new"


def test_a_full_disk_costs_only_the_cache(kernels, monkeypatch):
    made, cache = kernels()
    cache.content = b"kernels"

    def full(*_):
        raise rewrite.RewriteError("no space left")

    monkeypatch.setattr(engine, "write_atomically", full)
    made.save()
    assert not made.path.exists()


# --- inputs ---------------------------------------------------------------------------------------------------------
def x(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


BAD_INPUTS = {
    "too large": (x(5, 3, 8), "batch = 5; the plan was built for 1 to 4"),
    "too long": (x(2, 17, 8), "seq = 17; the plan was built for 1 to 16"),
    "empty": (x(0, 3, 8), "batch = 0; the plan was built for 1 to 4"),
    "empty sequence": (x(2, 0, 8), "seq = 0; the plan was built for 1 to 16"),
    "other width": (x(2, 3, 7), "size 7 where 8 is expected"),
    "no width": (x(2, 3, 0), "size 0 where 8 is expected"),
    "float64": (x(2, 3, 8, dtype=np.float64), "float64, expected float32"),
    "float16": (x(2, 3, 8, dtype=np.float16), "float16, expected float32"),
    "bfloat16": (x(2, 3, 8, dtype=ml_dtypes.bfloat16), "bfloat16, expected float32"),
    "int32": (x(2, 3, 8, dtype=np.int32), "int32, expected float32"),
    "bool": (x(2, 3, 8, dtype=bool), "bool, expected float32"),
    "objects": (x(2, 3, 8, dtype=object), "object, expected float32"),
    "complex": (x(2, 3, 8, dtype=np.complex64), "complex64, expected float32"),
    "text": (np.full((2, 3, 8), "x"), "expected float32"),
    "other byte order": (x(2, 3, 8, dtype=">f4"), "of the other byte order, expected float32"),
    "rank 2": (x(2, 8), "expected 3 dimensions"),
    "rank 4": (x(1, 2, 3, 8), "expected 3 dimensions"),
    "scalar": (np.float32(1), "expected 3 dimensions"),
    "a list": ([[[1.0] * 8]], "is a list, expected an array of float32"),
    "nothing": (None, "is a NoneType, expected an array of float32"),
    "a number": (float("nan"), "is a float, expected an array of float32"),
    "a dtype that is none": (type("Tensor", (), {"dtype": "float32", "shape": (2, 3, 8)})(), "is a Tensor, expected an array"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "reason"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_outside_the_profile_are_refused_before_a_launch(built, given, reason):
    plan = rewrite.Plan(built)
    executor = plan.executor

    def launched(_):
        raise AssertionError("a step was run")

    executor.calls = [(s, launched) for s, _ in executor.calls]
    with pytest.raises(rewrite.RewriteError) as caught:
        plan.run({"x": given})
    assert reason in str(caught.value)


def test_views_and_strides_do_not_matter(built):
    plan = rewrite.Plan(built)
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((4, 6, 16)).astype(np.float32)
    readonly = rng.standard_normal((2, 3, 8)).astype(np.float32)
    readonly.flags.writeable = False
    odd = [wide[::2, ::2, ::2], wide[:2, :3, :8][::-1], rng.standard_normal((8, 3, 2)).astype(np.float32).T, np.broadcast_to(np.float32(2), (2, 3, 8)), np.asfortranarray(readonly), readonly]
    for given in odd:
        np.testing.assert_array_equal(plan.run({"x": given})["y"], plan.run({"x": np.ascontiguousarray(given)})["y"])
    nan = np.full((2, 3, 8), np.nan, np.float32)
    assert np.isnan(plan.run({"x": nan})["y"]).all()  # NaN is a value: it is not refused, and comes out


def test_hashes_of_large_files_are_of_pieces(tmp_path, monkeypatch):
    data = bytes(range(256)) * 5
    assert seal.digests(data) == seal.digests(bytes(data))
    whole = seal.digests(data)
    monkeypatch.setattr(seal, "PIECE", 500)
    pieces = seal.digests(data)
    assert len(pieces) == 3
    assert len(whole) == 1
    changed = bytearray(data)
    changed[700] ^= 1
    assert [a == b for a, b in zip(pieces, seal.digests(bytes(changed)), strict=True)] == [True, False, True]
    for cuts in ([], [1], [499], [500], [501], [1000], [0, 500, 1000], [3, 1100]):
        with (tmp_path / "file").open("wb") as file, seal.Writer(file) as writer:
            for start, end in itertools.pairwise([0, *cuts, len(data)]):
                writer.write(data[start:end])
            assert writer.digests() == pieces
        assert (tmp_path / "file").read_bytes() == data
    with (tmp_path / "file").open("wb") as file, seal.Writer(file) as writer:
        assert writer.digests() == seal.digests(b"")
    assert seal.digests(b"") == [seal.hashlib.sha256().hexdigest()]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)  # what is written goes to the disk meanwhile; if that fails, the writer says so
    with (tmp_path / "file").open("wb") as file, seal.Writer(file) as writer:
        writer.write(data[:600])
        with pytest.raises(OSError, match="No space left"):
            writer.digests()


def test_large_files_are_written_in_blocks(tmp_path, monkeypatch):
    """As large as the system takes them, which may be less than a block."""
    sizes, write, data = [], os.pwrite, random.Random(0).randbytes(2100)
    monkeypatch.setattr(seal, "PIECE", 1000)
    monkeypatch.setattr(seal, "BLOCK", 300)
    monkeypatch.setattr(os, "pwrite", lambda file, part, at: sizes.append(len(part)) or write(file, part[:200], at))
    with (tmp_path / "file").open("wb") as file, seal.Writer(file) as writer:
        writer.write(data)
        assert writer.digests() == seal.digests(data)
    assert (tmp_path / "file").read_bytes() == data
    assert Counter(sizes) == {300: 8, 200: 2, 100: 1}


def test_a_writer_that_is_left_early_writes_no_more(tmp_path, monkeypatch):
    """Its file's number may be another file's by then."""
    write = os.pwrite
    monkeypatch.setattr(seal, "PIECE", 1000)
    monkeypatch.setattr(os, "pwrite", lambda *call: time.sleep(0.01) or write(*call))
    with (tmp_path / "file").open("wb") as file:
        with seal.Writer(file) as writer:
            writer.write(bytes(2 * seal.PROCESSORS * 1000))
        assert all(piece.done() for piece in writer.pieces)


def test_weights_without_elements(tmp_path):
    tensors = {"a": np.zeros((0, 3), np.float32), "b": np.float32(7).reshape(())}
    with (tmp_path / "w").open("wb") as file:
        weights.write(file, tensors, {})
    found = weights.read(tmp_path / "w")
    assert found["a"].shape == (0, 3)
    assert found["b"] == 7


def test_the_key_of_the_environment_signs_and_checks(tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(KEY)
    monkeypatch.setenv("REWRITE_PLAN_KEY", str(tmp_path / "key"))
    assert rewrite.build(model(1), tmp_path / "p", engines=False).signed
    rewrite.Plan(tmp_path / "p")
    monkeypatch.delenv("REWRITE_PLAN_KEY")
    assert not rewrite.build(model(1), tmp_path / "p", engines=False).signed
    monkeypatch.setenv("REWRITE_PLAN_KEY", str(tmp_path / "key"))
    assert "the plan is not signed" in refusal(tmp_path / "p")
