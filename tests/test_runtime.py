"""Plans: where a model is cut, what crosses the borders, and that a plan computes what its model does."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import safetensors
from click.testing import CliRunner
from conftest import parse

import rewrite
from rewrite.cli import main
from rewrite.registry import library
from rewrite.runtime import seal, weights
from rewrite.runtime.partition import partition
from rewrite.runtime.profile import Profile
from rewrite.verify import model_inputs, run_model

LAYER = """
    p{i} = MatMul(h{i}, w{i})
    q{i} = Add(p{i}, b{i})
    a{i} = Relu(q{i})
    s{i} = Add(a{i}, h{i})
    h{j} = LayerNormalization<axis = -1>(s{i}, g{i}, c{i})
"""


def layers(count=3, rng=None):
    """`count` equal layers: MatMul + bias + ReLU, residual, LayerNormalization."""
    rng = rng or np.random.default_rng(0)
    body = "".join(LAYER.format(i=i, j=i + 1) for i in range(count)).replace("h0", "x").replace(f"h{count}", "y")
    made = {}
    for i in range(count):
        made |= {f"w{i}": rng.standard_normal((8, 8)), f"b{i}": rng.standard_normal(8), f"g{i}": rng.standard_normal(8), f"c{i}": rng.standard_normal(8)}
    return parse(f"(float[batch, seq, 8] x) => (float[batch, seq, 8] y) {{ {body} }}", **{n: a.astype(np.float32) for n, a in made.items()})


def cut(model):
    return partition(rewrite.optimize(model).model, library().plugins)


def plan_of(model, path, **options):
    return rewrite.build(rewrite.optimize(model).model, path, **options)


def same(model, plan, attempts=3):
    """The plan's outputs are the model's, on several shapes."""
    loaded = rewrite.load(model)
    for attempt in range(attempts):
        feeds = model_inputs(loaded.proto, attempt)
        expected, actual = run_model(loaded, feeds), plan.run(feeds)
        assert list(actual) == list(expected)
        for name, want in expected.items():
            np.testing.assert_allclose(actual[name], want, rtol=1e-5, atol=1e-5)


# --- partition ----------------------------------------------------------------------------------------------------
def test_equal_layers_share_one_segment():
    part = cut(layers(4))
    assert [s.kind for s in part.steps] == ["plugin", "segment"] * 4
    assert len(part.segments) == 1
    assert {s.name for s in part.steps if s.kind == "plugin"} == {"MatMulAct"}


def test_weights_are_inputs_of_segments_and_scalars_are_inside():
    part = cut(parse(
        "(float[n, 8] x) => (float[n, 8] y) { p = MatMul(x, w)\n a = Relu(p)\n b = Mul(a, half)\n y = Mul(b, g) }",
        w=np.ones((8, 8), np.float32), half=np.array(0.5, np.float32), g=np.ones(8, np.float32)))  # fmt: skip
    (segment,) = part.segments.values()
    assert set(part.weights) == {"w", "g"}
    assert len(segment.graph.input) == 2
    assert [tuple(i.dims) for i in segment.graph.initializer] == [()]


RESHAPED = """(float[batch, seq, 8] x) => (float[batch, seq, 8] y, float[m, 4] z) {
    shape = Shape(x)
    zero = Constant<value = int64 {0}>()
    one = Constant<value = int64 {1}>()
    b = Gather(shape, zero)
    s = Gather(shape, one)
    axes = Constant<value = int64[1] {0}>()
    n = Mul(b, s)
    n1 = Unsqueeze(n, axes)
    eight = Constant<value = int64[1] {8}>()
    flat = Concat<axis = 0>(n1, eight)
    p = MatMul(x, w)
    a = Relu(p)
    r = Reshape(a, flat)
    e = Exp(r)
    q = MatMul(e, v)
    t = Relu(q)
    b1 = Unsqueeze(b, axes)
    s1 = Unsqueeze(s, axes)
    back = Concat<axis = 0>(b1, s1, eight)
    u = Reshape(t, back)
    y = Neg(u)
    four = Constant<value = int64[2] {-1, 4}>()
    z = Reshape(u, four)
}"""


def reshaped():
    rng = np.random.default_rng(0)
    return parse(RESHAPED, w=rng.standard_normal((8, 8)).astype(np.float32), v=rng.standard_normal((8, 8)).astype(np.float32))


def test_shape_arithmetic_never_crosses_a_border(tmp_path):
    part = cut(reshaped())
    assert len(part.segments) >= 2
    assert all(v.dtype == "float32" for v in part.values.values()), part.values
    same(reshaped(), plan_of(reshaped(), tmp_path / "p", engines=False))


def test_a_weight_that_is_only_transposed_is_transposed_once(tmp_path):
    model = parse("(float[n, 8] x) => (float[n, 4] y) { t = Transpose<perm = [1, 0]>(w)\n p = MatMul(x, t)\n y = Relu(p) }", w=np.arange(32, dtype=np.float32).reshape(4, 8))
    part = cut(model)
    assert all("Transpose" not in {n.op_type for n in s.graph.node} for s in part.segments.values())
    same(model, plan_of(model, tmp_path / "p", engines=False))


ODD = {
    "a plugin's result is an output": "(float[n, 8] x) => (float[n, 8] y, float[n, 8] z) { p = MatMul(x, w)\n y = Relu(p)\n z = Exp(y) }",
    "an input is an output": "(float[n, 8] x) => (float[n, 8] y, float[n, 8] x) { p = MatMul(x, w)\n y = Relu(p) }",
    "a weight is an output": "(float[n, 8] x) => (float[n, 8] y, float[8, 8] w) { p = MatMul(x, w)\n y = Relu(p) }",
    "plugins in a row": "(float[n, 8] x) => (float[n, 8] y) { p = MatMul(x, w)\n r = Relu(p)\n q = MatMul(r, w)\n y = Relu(q) }",
    "a weight that a node gives": "(float[n, 8] x) => (float[n, 2] y) { c = Constant<value = float[8, 2] {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}>()\n p = MatMul(x, c)\n y = Relu(p) }",
    "no plugin": "(float[n, 8] x) => (float[n, 8] y) { e = Exp(x)\n y = Neg(e) }",
    "a plugin reads a Constant": "(float[n, 8] x) => (float[n, 8] y) { c = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>()\n p = MatMul(x, w)\n q = Add(p, c)\n y = Relu(q) }",
    "a Constant is an output": "(float[n, 8] x) => (float[n, 8] y, int64[2] c) { c = Constant<value_ints = [1, 2]>()\n y = Exp(x) }",
    "a shape is an output": "(float[n, 8] x) => (float[n, 8] y, int64[2] s) { p = MatMul(x, w)\n y = Relu(p)\n s = Shape(y) }",
    "a plugin inside If": """(float[n, 8] x) => (float[n, 8] y) {
        total = ReduceSum<keepdims = 0>(x)
        zero = Constant<value_float = 0.0>()
        positive = Greater(total, zero)
        h = Exp(x)
        y = If(positive) <
            then_branch = yes () => (float[n, 8] a) { p = MatMul(h, w)\n a = Relu(p) },
            else_branch = no () => (float[n, 8] b) { b = Neg(h) }
        >
    }""",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_a_plan_computes_what_the_model_does(text, tmp_path):
    model = parse(text, **({"w": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)} if "w" in text else {}))
    same(model, plan_of(model, tmp_path / "p", engines=False))


def test_a_model_that_was_not_rewritten_is_one_segment(tmp_path):
    model = layers(2)
    plan = rewrite.build(model, tmp_path / "p", engines=False)
    assert [s.kind for s in plan.manifest.steps] == ["segment"]
    same(model, plan)


def test_values_are_dropped_after_their_last_reader(tmp_path):
    plan = plan_of(layers(3), tmp_path / "p", engines=False)
    steps, dropped = plan.manifest.steps, plan.executor.dropped
    gone = [name for names in dropped for name in names]
    assert len(gone) == len(set(gone))
    assert set(gone) == {n for s in steps for n in (*s.inputs, *s.outputs)} - set(plan.weights) - set(plan.manifest.outputs.values())


# --- engines ------------------------------------------------------------------------------------------------------
def test_tensorrt_builds_an_engine_for_each_distinct_segment(tmp_path):
    plan = plan_of(layers(3), tmp_path / "p", profile="batch=1:2:4,seq=1:8:16")
    engines = [n for n in plan.manifest.files if n.startswith("engines/")]
    assert len(engines) == len({s.name for s in plan.manifest.steps if s.kind == "segment"}) == 1
    assert len(plan.engine(plan.manifest.steps[1].name)) > 1000
    assert "tensorrt" in plan.manifest.versions
    same(layers(3), plan)


def test_a_node_tensorrt_does_not_know_is_named_and_nothing_is_written(tmp_path):
    model = parse("(float[n, 8] x) => (float[n, 8] y) { e = Exp(x)\n y = Hardmax(e) }")
    model.graph.node[1].name = "the_node"
    model.graph.node[1].op_type, model.graph.node[1].domain = "Gelu7", "com.acme"
    model.opset_import.add(domain="com.acme", version=1)
    with pytest.raises(rewrite.RewriteError, match=r"TensorRT cannot compile node 'the_node' \(Gelu7\).*--no-engines"):
        rewrite.build(model, tmp_path / "p", verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "reason"), [
    ("(double[n] x) => (double[n] y) { y = Sqrt(x) }", "no double, which 'x' is"), ("(float[n] x) => (double[n] y) { y = Cast<to = 11>(x) }", "no double, which 'y' is"),
    ("(int16[n] x) => (float[n] y) { y = Cast<to = 1>(x) }", "no int16, which 'x' is"), ("(string[n] x) => (string[n] y) { y = Identity(x) }", "no string, which 'x' is"),
])  # fmt: skip
def test_a_type_that_tensorrt_lacks_is_refused_by_name(tmp_path, text, reason):  # it would read float64 as float32
    with pytest.raises(rewrite.RewriteError, match=f"TensorRT has {reason}; cast it"):
        rewrite.build(parse(text), tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "reason"), [
    ("batch", "write NAME=MIN:BEST:MAX"), ("batch=8:4:9", "in order"), ("batch=0", "positive"), ("width=1:2:3", "no dimension of this name; it has batch, seq"), ("batch=1:2", "write NAME"),
    ("batch=-1", "write NAME"), ("batch=1:2:3:4", "write NAME"), ("=3", "write NAME"), ("batch=1.5", "write NAME"), ("batch=٣", "write NAME"), ("batch=1:0:4", "in order"),
    ("batch=1:2:3000000000", "2147483647 at most"), ("batch=1:2:4,batch=8", "batch is given twice; a plan has one range"), ("Batch=3", "no dimension of this name"),
    pytest.param(f"batch=1:2:{'9' * 5000}", "write NAME", id="5000 digits"),
])  # fmt: skip
def test_bad_profiles(text, reason):
    with pytest.raises(rewrite.RewriteError, match=reason):
        Profile.parse(text, ["batch", "seq"])


def test_a_model_without_dimensions_has_no_profile():
    assert str(Profile.parse(None, [])) == "static shapes"
    with pytest.raises(rewrite.RewriteError, match="it has none"):
        Profile.parse("batch=3", [])


@pytest.mark.parametrize(("text", "ranges"), [
    (None, {"batch": (1, 8, 32), "seq": (1, 128, 512)}), ("", {"batch": (1, 8, 32), "seq": (1, 128, 512)}), (" batch = 4 , ", {"batch": (4, 4, 4), "seq": (1, 128, 512)}),
    ("seq=7:7:7,batch=2:2:3", {"batch": (2, 2, 3), "seq": (7, 7, 7)}),
])  # fmt: skip
def test_profiles(text, ranges):
    assert Profile.parse(text, ["batch", "seq"]).ranges == ranges


def test_a_plan_for_one_size_takes_that_alone(tmp_path):
    plan = plan_of(layers(2), tmp_path / "p", profile="batch=2,seq=3")
    want = run_model(rewrite.load(layers(2)), feeds())
    np.testing.assert_allclose(plan.run(feeds())["y"], want["y"], rtol=1e-5, atol=1e-5)
    for batch in (1, 3):
        with pytest.raises(rewrite.RewriteError, match=f"batch = {batch}; the plan was built for 2 alone"):
            plan.run(feeds(batch=batch))


def test_a_profile_gives_derived_dimensions():
    profile = Profile.parse("batch=2:3:4,seq=5", ["batch", "seq"])
    assert profile.shapes("x", ("batch", "2*seq + 1", "batch*seq", 7)) == [(2, 11, 10, 7), (3, 11, 15, 7), (4, 11, 20, 7)]
    with pytest.raises(rewrite.RewriteError, match=r"'x'.*does not follow from those of the model's inputs \(batch, seq\)"):
        profile.shapes("x", (None,))


def test_a_dimension_without_a_name_is_told_by_the_input(tmp_path):
    with pytest.raises(rewrite.RewriteError, match=r"'x' has shape \[None, 4\].*have no names; name its dimensions"):
        rewrite.build(parse("(float[?, 4] x) => (float[?, 4] y) { y = Exp(x) }"), tmp_path / "p")


def test_dimensions_of_an_empty_name_are_not_one(tmp_path):
    model = parse("(float[a, 4] x, float[b, 4] z) => (float[a, 4] y, float[b, 4] w) { y = Exp(x)\n w = Exp(z) }")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = ""
    plan = rewrite.build(model, tmp_path / "p", engines=False)
    assert [v.shape for v in plan.inputs.values()] == [(None, 4)] * 2
    assert plan.run({"x": np.ones((2, 4), np.float32), "z": np.ones((3, 4), np.float32)})["w"].shape == (3, 4)


@pytest.mark.parametrize(("kind", "reason"), [("complex64[n]", "'x' is complex64"), ("float[1000000, 1000000]", r"'x' would have 1.0e\+12 elements")])
def test_inputs_that_are_not_generated(tmp_path, kind, reason):
    with pytest.raises(rewrite.RewriteError, match=f"{reason}.*; build with --no-verify and compare yourself"):
        rewrite.build(parse(f"({kind} x) => ({kind} y) {{ y = Identity(x) }}"), tmp_path / "p", engines=False)


# --- plans on disk ------------------------------------------------------------------------------------------------
def test_a_derived_dimension_of_an_input_is_checked(tmp_path):
    model = parse("(float[m, 4] mask, float[past, 4] x) => (float[k, 4] y) { y = Concat<axis = 0>(mask, x) }")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "past + 1"
    plan = rewrite.build(model, tmp_path / "p", profile="past=2:4:8")
    assert plan.manifest.profile.ranges == {"past": (2, 4, 8)}

    def run(mask, x):
        return plan.run({"mask": np.ones((mask, 4), np.float32), "x": np.ones((x, 4), np.float32)})

    assert run(9, 8)["y"].shape == (17, 4)
    with pytest.raises(rewrite.RewriteError, match=r"'mask' has size 8 where past \+ 1 = 9 is expected, as past = 8"):  # a GPU has room for 9
        run(8, 8)
    with pytest.raises(rewrite.RewriteError, match="past = 9; the plan was built for 2 to 8"):
        run(10, 9)


def test_sizes_that_tensorrt_refuses_are_told(tmp_path):
    with pytest.raises(rewrite.RewriteError, match=r"cannot build the segment at the profile's sizes \(n 2147483647:.*Give others with --profile"):
        rewrite.build(parse("(float[n, 1024] x) => (float[n, 1024] y) { y = Exp(x) }"), tmp_path / "p", profile="n=2147483647")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "p"
    plan_of(layers(2), path, profile="batch=1:2:4,seq=1:8:16")
    return path


@pytest.fixture
def copy(built, tmp_path):
    import shutil

    return Path(shutil.copytree(built, tmp_path / "p"))


def feeds(batch=2, seq=3, dtype=np.float32):
    return {"x": np.ones((batch, seq, 8), dtype)}


@pytest.mark.parametrize(("given", "reason"), [
    ({}, "input 'x' is missing"),
    ({**feeds(), "z": np.ones(1)}, "input 'z' is unknown; the plan takes x"),
    (feeds(dtype=np.float64), "input 'x' is float64, expected float32"),
    ({"x": np.ones((2, 8), np.float32)}, "expected 3 dimensions"),
    ({"x": np.ones((2, 3, 9), np.float32)}, "has size 9 where 8 is expected"),
    (feeds(batch=5), "batch = 5; the plan was built for 1 to 4"),
])  # fmt: skip
def test_inputs_are_checked(built, given, reason):
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.Plan(built).run(given)


def test_two_inputs_must_agree_on_a_dimension(tmp_path):
    plan = rewrite.build(parse("(float[n, 8] x, float[n, 8] z) => (float[n, 8] y) { y = Add(x, z) }"), tmp_path / "p", engines=False)
    with pytest.raises(rewrite.RewriteError, match="'z' has n = 3, another input has 2"):
        plan.run({"x": np.ones((2, 8), np.float32), "z": np.ones((3, 8), np.float32)})


def damage_cut(path):
    file = next(path.glob("engines/*"))
    file.write_bytes(file.read_bytes()[:-1])
    return "another size"


def damage_change(path):
    file = next(path.glob("segments/*"))
    data = bytearray(file.read_bytes())
    data[10] ^= 1
    file.write_bytes(bytes(data))
    return "SHA-256 differs"


def damage_remove(path):
    (path / "weights.safetensors").unlink()
    return "is missing"


def damage_format(path):
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 99'))
    seal.seal(path, None)
    return "not a manifest of this version"


def damage_manifest(path):
    (path / "manifest.json").write_text("{")
    return "does not fit manifest.json"


@pytest.mark.parametrize("damage", [damage_cut, damage_change, damage_remove, damage_format, damage_manifest])
def test_a_damaged_plan_is_refused(copy, damage):
    reason = damage(copy)
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.Plan(copy)


def test_a_new_plan_replaces_an_old_one_and_a_failed_build_does_not(copy):
    before = (copy / "manifest.json").read_text()
    with pytest.raises(rewrite.RewriteError, match="no dimension of this name"):
        rewrite.build(layers(1), copy, profile="width=3")
    assert (copy / "manifest.json").read_text() == before
    rewrite.build(layers(1), copy, engines=False)
    assert len(rewrite.Plan(copy).manifest.steps) == 1
    assert [p.name for p in copy.parent.iterdir()] == ["p"]


def test_a_directory_that_is_no_plan_is_not_replaced(tmp_path):
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(rewrite.RewriteError, match="exists and is not a plan"):
        rewrite.build(layers(1), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize(("name", "reason"), [("model.onnx", "has 'model.onnx' in it"), ("weights.safetensors", "exists and is not a plan")])
def test_a_folder_with_more_or_less_than_a_plan_is_not_replaced(copy, name, reason):
    if (copy / name).exists():
        (copy / name).unlink()  # what is left may be anyone's: manifest.json is a common name
    else:
        (copy / name).write_text("mine")
    before = sorted(copy.rglob("*"))
    with pytest.raises(rewrite.RewriteError, match=reason):
        rewrite.build(layers(1), copy, engines=False)
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("there", ["p", "nowhere"])
def test_a_link_is_replaced_and_not_followed(copy, there):
    link, before = copy.parent / "link", (copy / "manifest.json").read_bytes()
    link.symlink_to(there)
    assert len(rewrite.build(layers(1), link, engines=False).manifest.steps) == 1
    assert not link.is_symlink()
    assert (copy / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in copy.parent.iterdir()) == ["link", "p"]


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path):
    assert rewrite.build(layers(1), tmp_path / ("p" * 255), engines=False).manifest.steps


def test_a_read_only_folder_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # as the superuser may write everywhere
    monkeypatch.setattr("rewrite.runtime.build.partition", None)
    with pytest.raises(rewrite.RewriteError, match="is read-only"):
        rewrite.build(layers(1), tmp_path / "p")


def test_a_wrong_kernel_fails_the_check_of_the_plan(tmp_path):
    model = rewrite.optimize(layers(2)).model
    plugin = library().plugins["MatMulAct"]
    right = plugin.reference
    object.__setattr__(plugin, "reference", lambda *a, **k: right(*a, **k) * np.linspace(1, 1.001, 8, dtype=np.float32))
    try:
        with pytest.raises(rewrite.CheckFailed, match="output 'y' is not the model's"):
            rewrite.build(model, tmp_path / "p", engines=False)
    finally:
        object.__setattr__(plugin, "reference", right)
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_nobody_declares_is_named(tmp_path):
    model = rewrite.optimize(layers(1)).model
    for part in (*model.proto.graph.node, *model.proto.functions):
        if part.domain == "rewrite":
            setattr(part, "op_type" if isinstance(part, onnx.NodeProto) else "name", "Unheard")
    with pytest.raises(rewrite.RewriteError, match="plugin Unheard, which no loaded rules file declares; give it with --rules"):
        rewrite.build(model, tmp_path / "p", engines=False)


# --- weights ------------------------------------------------------------------------------------------------------
def test_weights_are_a_safetensors_file(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((2, 2), ml_dtypes.bfloat16), "c": np.array(3, np.int64),
        "d": np.array([True, False, True]), "e": np.zeros((0, 4), np.float16), "f": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    }  # fmt: skip
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        weights.write(file, tensors, {"model": "m"})
    read = weights.read(path)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    with safetensors.safe_open(path, "numpy") as library_file:
        assert library_file.metadata() == {"model": "m"}
        np.testing.assert_array_equal(library_file.get_tensor("a"), tensors["a"])
        np.testing.assert_array_equal(library_file.get_tensor("f"), tensors["f"])


@pytest.mark.parametrize("content", [b"", b"\x10", b"\xff" * 8, (20).to_bytes(8, "little") + b"not json at all here", (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(rewrite.RewriteError, match="build the plan again"):
        weights.read(path)


def test_external_weights_are_mapped(tmp_path):
    onnx.save(layers(2), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = rewrite.load(tmp_path / "m.onnx")
    plan = rewrite.build(rewrite.optimize(model).model, tmp_path / "p", engines=False)
    same(layers(2), plan)


# --- the commands -------------------------------------------------------------------------------------------------
def command(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_build_inspect_and_run(tmp_path):
    onnx.save(layers(2), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **feeds())
    np.save(tmp_path / "x.npy", feeds()["x"])
    assert command("optimize", tmp_path / "m.onnx", "-o", tmp_path / "o.onnx").exit_code == 0
    done = command("build", tmp_path / "o.onnx", "-o", tmp_path / "p", "--profile", "batch=1:2:4", "--profile", "seq=1:8:16")
    assert done.exit_code == 0, done.output
    assert "MatMulAct" in done.output
    shown = command("inspect", tmp_path / "p", "--check")
    assert "profile (smallest:best:largest): batch 1:2:4, seq 1:8:16; weights 0.00 MB, engines 0." in shown.output
    steps = command("inspect", tmp_path / "p", "--steps").output
    assert "float32[batch, seq, 8]" in steps
    assert f"{2 * 8 * 8 * 4 / 1e6:.3f}" in steps
    key = json.loads(command("inspect", tmp_path / "p", "--json").stdout)["steps"][1]["name"]
    assert "LayerNormalization" in command("inspect", tmp_path / "p", "--segment", key).output
    assert command("inspect", tmp_path / "p", "--segment", "nothing").exit_code == 2
    assert "leave --json out" in command("inspect", tmp_path / "p", "--segment", key, "--json").stderr
    assert "1 Graph Input(s)" in command("inspect", tmp_path / "o.onnx").output
    results = []
    for path, inputs in (("p", "x.npz"), ("p", "x.npy"), ("m.onnx", "x.npz")):
        done = command("run", tmp_path / path, "--inputs", tmp_path / inputs, "-o", tmp_path / "y.npz")
        assert done.exit_code == 0, done.output
        with np.load(tmp_path / "y.npz") as data:
            results.append(data["y"])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_allclose(results[0], results[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("arguments", "reason"), [
    (["run", "{plan}", "--inputs", "{plan}/none.npz"], "not a readable .npz"),
    (["run", "{plan}", "--inputs", "{plan}/manifest.json"], "not a readable .npz"),
    (["run", "{plan}/segments", "--inputs", "x"], "not a plan"),
    (["run", "{plan}", "--inputs", "x", "-o", "{plan}/weights.safetensors"], "it lies in the plan"),
    (["bench", "{plan}", "--json", "{plan}/manifest.json"], "it lies in the plan"),
    (["inspect", "{plan}/manifest.json"], "not an ONNX model"),
    (["build", "{plan}/nothing.onnx", "-o", "{plan}"], "no such file"),
    (["build", "{plan}", "-o", "{plan}/q"], "a directory"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(built, arguments, reason):
    done = command(*[a.format(plan=built) for a in arguments])
    assert done.exit_code == 2
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
