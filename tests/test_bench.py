"""`rewrite bench`: what it counts, what it reports, and the CUDA side on a CuPy made of NumPy."""

from __future__ import annotations

import contextlib
import itertools
import json
import types

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from conftest import parse

import rewrite
from rewrite.cli import main
from rewrite.registry import library
from rewrite.runtime import bench, engine
from rewrite.runtime.partition import Step

LAYER = "p{i} = MatMul(h{i}, w{i})\n q{i} = Add(p{i}, b{i})\n a{i} = Relu(q{i})\n s{i} = Add(a{i}, h{i})\n h{j} = LayerNormalization<axis = -1>(s{i}, g{i}, c{i})\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    rng = np.random.default_rng(0)
    body = "".join(LAYER.format(i=i, j=i + 1) for i in range(2)).replace("h0", "x").replace("h2", "y")
    made = {f"{n}{i}": rng.standard_normal((8, 8) if n == "w" else 8).astype(np.float32) for i in range(2) for n in "wbgc"}
    model = parse(f"(float[batch, seq, 8] x) => (float[batch, seq, 8] y) {{ {body} }}", **made)
    path = tmp_path_factory.mktemp("bench") / "p"
    rewrite.build(rewrite.optimize(model).model, path, profile="batch=1:2:4,seq=1:8:16")
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ceilings of small arrays: the tests need not wait for good ones."""
    monkeypatch.setattr(bench, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(bench, "PRODUCT", {"cpu": 64, "cuda": 64})


def command(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


# --- counting -------------------------------------------------------------------------------------------------------
def arrays(*shapes, dtype=np.float32):
    return [None if s is None else np.zeros(s, dtype) for s in shapes]


@pytest.mark.parametrize(("name", "attributes", "inputs", "outputs", "operations"), [
    ("MatMulAct", {}, [(2, 3, 8), (8, 16), (16,)], [(2, 3, 16)], 2 * 6 * 8 * 16),
    ("MatMulAct", {"trans_w": 1}, [(2, 3, 8), (16, 8), None, (2, 3, 16)], [(2, 3, 16)], 2 * 6 * 8 * 16),
    ("GatedMatMulAct", {}, [(3, 8), (8, 16), (8, 16)], [(3, 16)], 2 * 2 * 3 * 8 * 16),
    ("GatedMatMulAct", {"merged": "gate_up"}, [(3, 8), (8, 32)], [(3, 16)], 2 * 3 * 8 * 32),
    ("FusedAttention", {}, [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 16)], [(2, 4, 5, 16)], 2 * 2 * 4 * 5 * 7 * (8 + 16)),
    ("FusedAttention", {"causal": 1}, [(1, 1, 4, 8), (1, 1, 4, 8), (1, 1, 4, 8)], [(1, 1, 4, 8)], 2 * 10 * 16),
    ("AttentionMask", {}, [(2, 5)], [(2, 1, 5, 5)], 50),
])  # fmt: skip
def test_work_of_plugins(name, attributes, inputs, outputs, operations):
    given, made = arrays(*inputs), arrays(*outputs)
    found = bench.plugin_work(Step("plugin", name, [], [], attributes), given, made)
    assert found.operations == operations
    assert found.bytes == sum(a.nbytes for a in (*given, *made) if a is not None)


SEGMENTS = {
    "a product": ("(float[n, 8] x, float[8, 4] w) => (float[n, 4] y) { y = MatMul(x, w) }", [(3, 8), (8, 4)], 4 * (24 + 32 + 12), 2 * 3 * 8 * 4),
    "Gemm, turned": ("(float[8, n] x, float[8, 4] w) => (float[n, 4] y) { y = Gemm<transA = 1>(x, w) }", [(8, 3), (8, 4)], 4 * (24 + 32 + 12), 2 * 3 * 8 * 4),
    "a convolution": ("(float[1, 3, n, n] x, float[5, 3, 2, 2] w) => (float[1, 5, m, m] y) { y = Conv(x, w) }", [(1, 3, 4, 4), (5, 3, 2, 2)], 4 * (48 + 60 + 45), 2 * 45 * 12),
    "a convolution, transposed": ("(float[1, 3, n, n] x, float[3, 5, 2, 2] w) => (float[1, 5, m, m] y) { y = ConvTranspose(x, w) }", [(1, 3, 4, 4), (3, 5, 2, 2)], 4 * (48 + 60 + 125), 2 * 48 * 20),
    "Einsum": ('(float[b, n, 4] x, float[b, m, 4] w) => (float[b, n, m] y) { y = Einsum<equation = "bid, bjd -> bij">(x, w) }', [(2, 3, 4), (2, 5, 4)], 4 * (24 + 40 + 30), 2 * 2 * 3 * 5 * 4),
    "attention": ("(float[b, 4, n, 8] q, float[b, 2, m, 8] k, float[b, 2, m, 16] v) => (float[b, 4, n, 16] y) { y = Attention(q, k, v) }",
                  [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 16)], 4 * (320 + 224 + 448 + 640), 2 * 2 * 4 * 5 * 7 * (8 + 16)),
    "causal attention": ("(float[b, 1, n, 8] q, float[b, 1, n, 8] k, float[b, 1, n, 8] v) => (float[b, 1, n, 8] y) { y = Attention<is_causal = 1>(q, k, v) }",
                         [(1, 1, 4, 8)] * 3, 4 * 4 * 32, 2 * 10 * 16),
    "elements": ("(float[n] x) => (float[n] y) { e = Exp(x)\n y = Neg(e) }", [(10,)], 80, 20),
    "a reduction": ("(float[n, 8] x) => (float[n, 1] y) { a = Constant<value = int64[1] {1}>()\n y = ReduceSum(x, a) }", [(3, 8)], 4 * 27, 24),
    "a table": ("(float[1000, 8] t, int64[n] i) => (float[n, 8] y) { y = Gather(t, i) }", [(1000, 8), (3,)], 4 * 24 + 8 * 3 + 4 * 24, 0),
    "a shape": ("(float[n, 8] x) => (int64[2] y) { y = Shape(x) }", [(3, 8)], 16, 0),
    "moves": ("(float[n, 8] x) => (float[8, n] y) { t = Transpose<perm = [1, 0]>(x)\n y = Identity(t) }", [(3, 8)], 2 * 96, 0),
}  # fmt: skip


@pytest.mark.parametrize(("text", "shapes", "moved", "operations"), SEGMENTS.values(), ids=SEGMENTS)
def test_work_of_segments(text, shapes, moved, operations):
    model = parse(text, opset=23)
    kinds = [onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in model.graph.input]
    assert bench.segment_work(model, [np.zeros(s, k) for s, k in zip(shapes, kinds, strict=True)]) == bench.Work(moved, operations)


# --- the report -----------------------------------------------------------------------------------------------------
def check(report, plan):
    """What must hold of any report."""
    steps = plan.manifest.steps
    latency = report["latency_us"]
    assert latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
    assert [s["name"] for s in report["steps"]] == [s.name for s in steps]
    assert sum(p["calls"] for p in report["parts"]) == len(steps) == len(report["run"])
    assert sum(p["share"] for p in report["parts"]) == pytest.approx(1)
    assert sum(p["us"] for p in report["parts"]) == pytest.approx(sum(s["us"] for s in report["steps"]))
    times = [p["us"] for p in report["parts"]]
    assert times == sorted(times, reverse=True)
    for row in (*report["parts"], *report["steps"], report["whole"]):
        assert row["of_memory"] == pytest.approx(row["bytes"] / row["us"] * 1e6 / report["ceilings"]["bytes_per_second"])
        assert row["of_compute"] == pytest.approx(row["operations"] / row["us"] * 1e6 / report["ceilings"]["operations_per_second"])
    json.dumps(report, allow_nan=False)


def test_a_report_on_the_cpu(built):
    plan = rewrite.Plan(built)
    report = bench.bench(plan, {"batch": 3, "seq": 5}, warmup=1, iterations=7)
    check(report, plan)
    products = next(p for p in report["parts"] if p["name"] == "MatMulAct")
    assert products["operations"] == 2 * 2 * 15 * 8 * 8
    assert report["items_per_second"] == pytest.approx(3 * report["runs_per_second"])
    assert report["enqueue_us"] is None


def test_the_command_writes_json_and_a_trace(built, tmp_path):
    done = command("bench", built, "--size", "batch=3", "--iterations", 5, "--json", tmp_path / "b.json", "--trace", tmp_path / "t.json")
    assert done.exit_code == 0, done.output
    assert "batch=3, seq=8; 5 runs" in done.output
    lines = {line.split(":")[0]: line for line in done.output.splitlines()}
    assert "ceiling at p50" in lines["one run"]  # what the median run reaches: it is not that of the throughput, which slow runs lower
    assert "%" not in lines["throughput"]
    assert "MatMulAct" in done.output
    report = json.loads((tmp_path / "b.json").read_text())
    check(report, rewrite.Plan(built))
    assert report["sizes"] == {"batch": 3, "seq": 8}
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert [e["name"] for e in spans] == [s["name"] for s in report["steps"]]
    assert all(a["ts"] + a["dur"] == pytest.approx(b["ts"]) for a, b in itertools.pairwise(spans))
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} >= {"plugins", "segments"}


@pytest.mark.parametrize(("options", "reason"), [
    (["--size", "batch"], "write NAME=SIZE"), (["--size", "batch=-1"], "write NAME=SIZE"), (["--size", "batch=0"], "write NAME=SIZE"),
    (["--size", f"batch={'9' * 5000}"], "write NAME=SIZE"), (["--size", "batch=2,batch=3"], "batch is given twice"), (["--size", "seq=9999999999"], "too many to generate; a plan is measured"),
    (["--size", "width=3"], "no dimension of this name; it has batch, seq"),
    (["--size", "batch=5"], "built for 1 to 4"), (["--iterations", "0"], "0 is not in the range"), (["--json", "/nowhere/x.json"], "does not exist"), (["--device", "tpu"], "'tpu' is not one of"),
])  # fmt: skip
def test_bad_options(built, options, reason):
    done = command("bench", built, *options)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


# --- a GPU, pretended ------------------------------------------------------------------------------------------------
class Clock:
    """A GPU's: what is enqueued on it takes its time, one after the other; who asks for an event's time waits for it."""

    now = 0.0


class Event:
    def record(self, stream=None):
        self.at = Clock.now

    def synchronize(self):
        pass


class Stream:
    ptr = 0

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def takes(milliseconds, action=lambda *_: None):
    def launch(*arguments):
        Clock.now += milliseconds
        action(*arguments)

    return launch


@pytest.fixture
def pretended(built, monkeypatch):
    """A plan on a GPU where each plugin takes 2 ms, each segment 1 ms, the graph 5 ms, a copy 4 ms and a product 8 ms."""
    cpu = rewrite.Plan(built)
    values: dict[str, np.ndarray] = {}

    def run(inputs):
        sizes = cpu.check(inputs)
        values.update(cpu.weights)
        values.update({n: np.zeros([sizes.get(d, d) for d in v.shape], v.dtype) for n, v in {**cpu.inputs, **cpu.manifest.values}.items()})
        return {}

    steps = cpu.manifest.steps
    graph = types.SimpleNamespace(launch=takes(5))
    launches, pool = [takes(2 if s.kind == "plugin" else 1) for s in steps], types.SimpleNamespace(malloc=None)
    work, attributes = [([i], launch) for i, launch in enumerate(launches)], lambda i: steps[i].attributes
    frame = types.SimpleNamespace(work=work, attributes=attributes, launches=launches, values=values, graph=graph, pool=pool)
    runtime = types.SimpleNamespace(memGetInfo=lambda: (1 << 30, 1 << 31))
    cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: b.at - a.at, using_allocator=lambda _: contextlib.nullcontext(), runtime=runtime)

    class Array(np.ndarray):
        data = types.SimpleNamespace(copy_from_device_async=takes(4))

    def made(size, dtype):
        return np.zeros(size, dtype).view(Array)

    normal = types.SimpleNamespace(standard_normal=lambda shape, dtype: np.zeros(shape, dtype))
    spun = []
    cupy = types.SimpleNamespace(cuda=cuda, ones=made, empty=made, random=normal, empty_like=np.empty_like, RawKernel=lambda *_: lambda *a: spun.append(a[2][0]))
    executor = types.SimpleNamespace(plan=cpu, cupy=cupy, stream=Stream(), frame=lambda _: frame, segment=lambda key: onnx.load_model_from_string(cpu.segment(key)), run=run)
    from rewrite.plugins import cublaslt

    monkeypatch.setattr(cublaslt, "product", lambda y, x, w: takes(8))
    monkeypatch.setattr(engine, "gpu", lambda: "a pretended GPU")
    plan = rewrite.Plan(built, device="cuda")
    plan.__dict__["executor"] = executor
    return plan, frame, spun


def test_a_report_on_a_gpu(pretended):
    plan, frame, spun = pretended
    report = bench.bench(plan, {"batch": 2, "seq": 8}, warmup=1, iterations=6)
    check(report, plan)
    assert {p: report["latency_us"][p] for p in ("p50", "p99")} == pytest.approx({"p50": 5000, "p99": 5000})
    assert report["runs_per_second"] == pytest.approx(200)
    assert {s["us"] for s in report["steps"] if s["kind"] == "plugin"} == {2000}
    assert {s["us"] for s in report["steps"] if s["kind"] == "segment"} == {1000}
    assert report["ceilings"]["bytes_per_second"] == pytest.approx(2 * (1 << 20) / 4e-3)
    assert report["ceilings"]["operations_per_second"] == pytest.approx(2 * 64**3 / 8e-3)
    assert report["ceilings"]["dtype"] == "float32"
    assert report["enqueue_us"] is not None
    assert report["device"] == "a pretended GPU"
    assert spun == [len(frame.launches) * bench.SPIN_US * bench.CLOCK_MHZ] * 6


def test_a_plan_that_cannot_be_captured_is_launched_step_by_step(pretended):
    plan, frame, _ = pretended
    frame.graph = None
    report = bench.bench(plan, {"batch": 2, "seq": 8}, warmup=1, iterations=3)
    assert report["latency_us"]["p50"] == pytest.approx(1000 * sum(2 if s.kind == "plugin" else 1 for s in plan.manifest.steps))


def test_every_plugin_that_counts_takes_its_own_attributes():
    for plugin in library().plugins.values():
        if plugin.operations is not None:
            shapes = [(2, 4, 4, 4) if plugin.name == "FusedAttention" else (4, 4) for _ in plugin.inputs]
            assert plugin.operations(shapes, [(4, 4)], **plugin.attributes) > 0
