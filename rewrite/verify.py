"""Checks by computing: a fused site against the subgraph it replaced, a whole model against another.

A site is checked on inputs made from the shapes and dtypes of its values: ordinary magnitudes, large and small ones,
for 16-bit floats also ones near the largest, and what the plugin's own `sample` makes (masks with fully masked rows,
say). Non-finite results must be non-finite in the same places. The side that is computed by ONNX Runtime runs with
graph optimizations off, so that it is what the file says.

A 16-bit site is compared with its subgraph as it is, and with the same subgraph in float32: a fused kernel, which
accumulates in float32, may be right where the subgraph overflows, and must be near one of the two in every element.
"""

from __future__ import annotations

import ast
import contextlib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite.errors import CheckFailed, RewriteError, Unfinished
from rewrite.graph import DOMAIN, Dim
from rewrite.precision import is_narrow, makes_bfloat16, widen_arrays, widen_function, widen_model
from rewrite.registry import Plugin
from rewrite.validity import no_tensor, subgraphs

# (relative, absolute), for plain rewrites: what another order of summation may change.
TOLERANCE = {"float64": (1e-9, 1e-9), "float32": (2e-5, 2e-5), "float16": (2e-3, 1e-3), "bfloat16": (1.6e-2, 8e-3)}
MODEL_TOLERANCE = {"float64": 0.0, "float32": 0.0, "float16": 1e-2, "bfloat16": 5e-2}
SIZES = ((2, 5, 7, 3, 4, 6), (1, 4, 4, 2, 3, 5), (3, 8, 8, 1, 2, 2))
ENOUGH, DOUBLINGS = 3, 14  # what an expression of sizes that would be empty is brought to, and how often a size is doubled for it
SCALES = (1.0, 8.0, 1e-3)  # one for each attempt; 16-bit sites have one attempt more
LARGE = 1 << 22  # elements of one input
MOST = 1 << 28  # elements of one value of a site: no array larger than this is made to check one
MOST_INPUT = 1 << 31  # elements of an input that is generated
TOO_MANY = f"too many to check ({MOST:.1e} are allowed); export the model with smaller fixed sizes, or leave the check out with --no-verify"
STRINGS = ("0", "1", "2.5", "-3")  # of inputs: a Cast may read them as numbers
NEAR_LARGEST = 0.92  # of the largest finite value, in that attempt: 6e4 in float16


@dataclass(frozen=True)
class Spec:
    """What is known of one input of a site. Where its content is not free: `value` gives dimensions (a target shape),
    `content` the array itself (a constant that the replacement brings along)."""

    name: str
    dtype: Any
    shape: tuple[Dim, ...] | None
    value: tuple[Dim, ...] | None = None
    content: np.ndarray | None = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check. `error` is the largest difference seen, absolute, over all outputs and inputs tried.

    `reduced`: the sizes over 256 were divided by it for the check; 1 if it was made at those of the model.
    """

    ok: bool
    error: float
    reason: str = ""
    reduced: int = 1


_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Div: operator.floordiv}


def resolve(dim: Dim, sizes: dict[str, int], draw: Callable[[], int]) -> int:
    """The size of a dimension: names are drawn once each; `2*seq + 1` is computed from its names."""
    if isinstance(dim, int):
        return dim
    if dim is None:
        return draw()
    try:
        tree = ast.parse(dim, mode="eval").body
    except SyntaxError:
        tree = ast.Name(dim)

    def evaluate(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return int(_BINARY[type(node.op)](evaluate(node.left), evaluate(node.right)))
        key = ast.unparse(node)
        if key not in sizes:
            sizes[key] = draw()
        return sizes[key]

    return evaluate(tree)


@cache
def names_in(dim: str) -> tuple[str, ...]:
    """The names that a dimension is computed from; of one that is a name itself that alone."""
    found: dict[str, int] = {}
    with contextlib.suppress(ZeroDivisionError):
        resolve(dim, found, lambda: 1)
    return tuple(found)


def enlarge(dims: Iterable[Dim], sizes: dict[str, int], draw: Callable[[], int], fixed: Collection[str] = ()) -> None:
    """Draw the names in `dims`, and double the first of one that would be empty or negative until it is not: `S // 16`, `S - 16`.

    Raises RewriteError if it finds no sizes, those of `fixed` names given, at which each dimension is 1 at least.
    """
    named = list(dict.fromkeys(d for d in dims if isinstance(d, str)))
    for dim in named * 2:  # what one makes larger may be subtracted in another
        if _size(dim, sizes, draw) >= 1:
            continue
        names: dict[str, int] = {}
        _size(dim, names, lambda: 1)
        first = next(iter(names), None)
        for _ in range(DOUBLINGS if first is not None and first not in fixed else 0):
            sizes[str(first)] *= 2
            if _size(dim, sizes, draw) >= ENOUGH:
                break
    empty = next((d for d in named if _size(d, sizes, draw) < 1), None)
    if empty is not None:
        raise RewriteError(f"no sizes are found at which the dimension '{empty}' is 1 or more")


def _size(dim: str, sizes: dict[str, int], draw: Callable[[], int]) -> int:
    try:
        return resolve(dim, sizes, draw)
    except ZeroDivisionError:
        return 0


def draw_sizes(pool: Iterable[int]) -> Callable[[], int]:
    values = list(pool)
    state = {"next": 0}

    def draw() -> int:
        state["next"] += 1
        return values[(state["next"] - 1) % len(values)]

    return draw


def make_inputs(specs: list[Spec], attempt: int, sample: Callable[..., Any] | None) -> dict[str, np.ndarray]:
    """Inputs for the `attempt`-th check of a site; the same arguments give the same numbers."""
    rng = np.random.default_rng(attempt)
    sizes: dict[str, int] = {}
    draw = draw_sizes(SIZES[attempt % len(SIZES)])
    scale = SCALES[attempt] if attempt < len(SCALES) else None
    enlarge((d for s in specs for d in (*(s.shape or ()), *(s.value or ()))), sizes, draw)
    made = {}
    for spec in specs:
        if spec.content is not None:
            made[spec.name] = spec.content
            continue
        if spec.shape is None:
            raise RewriteError(f"the shape of '{spec.name}' is unknown")
        shape = tuple(resolve(d, sizes, draw) for d in spec.shape)
        if math.prod(shape) > MOST:
            raise RewriteError(f"'{spec.name}' has {math.prod(shape):.1e} elements, {TOO_MANY}")
        if spec.value is not None:
            made[spec.name] = np.array([resolve(d, sizes, draw) for d in spec.value], np.int64).reshape(shape)
            continue
        own = sample(rng, spec.name, shape, np.dtype(spec.dtype)) if sample is not None else None
        made[spec.name] = own if own is not None else default_sample(rng, shape, np.dtype(spec.dtype), scale)
    return made


def default_sample(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any], scale: float | None = 1.0) -> np.ndarray:
    """Random data: normal for floats, uniform up to near the largest if `scale` is None; for bools see `coins`; 0..2 for integers."""
    if dtype == np.bool_:
        return coins(rng, shape)
    if dtype.kind in "iu":
        return np.asarray(rng.integers(0, 3, shape)).astype(dtype)
    if scale is None:
        largest = NEAR_LARGEST * float(np.finfo(np.float16).max)
        return np.asarray(rng.uniform(-largest, largest, shape)).astype(dtype)
    return np.asarray(rng.standard_normal(shape) * scale).astype(dtype)


def coins(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Fair coins, but rows (of the last dimension) all false and all true among them: a mask that hides everything, or nothing."""
    found = np.asarray(rng.random(shape) < 0.5)
    if not shape:
        return found
    fate = rng.integers(0, 4, shape[:-1])
    return np.asarray(np.where((fate < 2)[..., None], found, (fate == 2)[..., None]))


def session(model: onnx.ModelProto, optimize: bool = False) -> Any:
    """An ONNX Runtime session on the CPU. Raises RewriteError if ONNX Runtime cannot load the model."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1 if not optimize else 0
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RewriteError(f"ONNX Runtime cannot load it: {str(error).strip().splitlines()[0][:300]}") from error


def function_model(function: onnx.FunctionProto, needed: list[onnx.FunctionProto], inputs: Mapping[str, np.ndarray], ir_version: int) -> onnx.ModelProto:
    """A model whose graph is the function's body, for inputs of these types."""
    values = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
        if n in set(function.input)
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(n) for n in function.output]
    graph = onnx.helper.make_graph(list(function.node), "site", values, outputs)
    opsets = list(function.opset_import)
    if needed and DOMAIN not in {o.domain for o in opsets}:
        opsets.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return onnx.helper.make_model(graph, opset_imports=opsets, functions=needed, ir_version=max(8, ir_version))


def run_function(function: onnx.FunctionProto, needed: list[onnx.FunctionProto], inputs: Mapping[str, np.ndarray], ir_version: int = 8) -> list[np.ndarray]:
    """Compute a function's outputs in ONNX Runtime, bfloat16 (which it lacks on CPUs) in float32. Raises RewriteError if it cannot run."""
    if any(a.dtype.name == "bfloat16" for a in inputs.values()) or any(map(makes_bfloat16, (function, *needed))):
        function, needed, inputs = widen_function(function), [widen_function(f) for f in needed], widen_arrays(inputs)
    model, feeds = function_model(function, needed, inputs, ir_version), {k: v for k, v in inputs.items() if k in set(function.input)}
    if not _is_harmless(model, feeds):
        from rewrite import sandbox
        from rewrite.model import Model

        results = sandbox.run(Model(model, name="the site"), feeds, sandbox.SITE)
        return [results[name] for name in function.output]
    runner = session(model)
    try:
        return list(runner.run(None, feeds))
    except Exception as error:
        raise RewriteError(f"ONNX Runtime fails on it: {str(error).strip().splitlines()[0][:300]}") from error


def _is_harmless(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> bool:
    """Whether a site may run in this process: no loops, and every value of a known size. Raises RewriteError if one is absurd."""
    if any(True for f in (model.graph, *model.functions) for n in f.node for _ in subgraphs(n)):
        return False
    known = onnx.ModelProto()
    known.CopyFrom(model)
    known.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in feeds.items() if a.dtype == np.int64 and a.size <= 64)  # shapes
    try:
        graph = onnx.shape_inference.infer_shapes(known, data_prop=True).graph
    except Exception:  # ONNX Runtime will tell, elsewhere
        return False
    sizes = {}
    for value in (*graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            sizes[value.name] = math.prod(d.dim_value for d in tensor.shape.dim)
            if sizes[value.name] > MOST:
                raise RewriteError(f"'{value.name}' has {sizes[value.name]:.1e} elements, {TOO_MANY}")
    return all(name in sizes for node in graph.node for name in node.output if name) and max(sizes.values(), default=0) <= LARGE


def compare(
    expected: list[np.ndarray], actual: list[Any], tolerance: Mapping[str, tuple[float, float]], exact: list[np.ndarray] | None = None
) -> Verdict:
    """Are two lists of arrays equal within the tolerance of their dtype? Shapes and dtypes must be equal.

    `exact` are the same results in float32, which `actual` may be near instead, element by element.
    """
    worst = 0.0
    if len(expected) != len(actual):
        return Verdict(False, np.inf, f"{len(actual)} outputs instead of {len(expected)}")
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        got = np.asarray(got)
        where = f"output {index}"
        if want.shape != got.shape:
            return Verdict(False, np.inf, f"{where} has shape {list(got.shape)} instead of {list(want.shape)}")
        if want.dtype != got.dtype:
            return Verdict(False, np.inf, f"{where} is {got.dtype} instead of {want.dtype}")
        if want.dtype.kind not in "fV" and want.dtype.name != "bfloat16":
            if not np.array_equal(want, got):
                return Verdict(False, np.inf, f"{where} differs in {int(np.sum(want != got))} of {want.size} elements")
            continue
        limits = tolerance.get(want.dtype.name, TOLERANCE["float32"])
        largest = 0.0 if exact is None else _largest(exact[index], want.dtype)
        difference, bound = _difference(want, got, limits, largest)
        if exact is not None:
            with np.errstate(over="ignore"):
                rounded = exact[index].astype(got.dtype)
            other, other_bound = _difference(rounded, got, limits, largest)
            closer = other / np.maximum(other_bound, 1e-300) < difference / np.maximum(bound, 1e-300)
            difference, bound = np.where(closer, other, difference), np.where(closer, other_bound, bound)
        alone = int(np.isinf(difference).sum())
        if alone:
            return Verdict(False, np.inf, f"{where}: {alone} of {want.size} elements are NaN or infinite on one side only")
        error = float(difference.max(initial=0.0))
        worst = max(worst, error)
        if (difference > bound).any():
            return Verdict(False, error, f"{where} differs by up to {error:.3g}, allowed {float(bound.max()):.3g}")
    return Verdict(True, worst)


def _largest(exact: np.ndarray, dtype: np.dtype[Any]) -> float:
    """The largest value that a 16-bit result would have, those that overflow in it counted as the largest that does not."""
    largest = float(np.finfo(np.float16).max) if dtype == np.float16 else np.inf  # bfloat16 overflows where float32 does
    return min(float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0)), largest)


def _difference(want: np.ndarray, got: np.ndarray, limits: tuple[float, float], largest: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """How far apart each element is (infinitely, if only one is finite), and how far it may be.

    The absolute part is relative to the largest value, `largest` if that is more: rounding in a sum is of its largest term.
    """
    wide, found = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(wide)
    same = np.where(finite, np.isfinite(found), (np.isnan(wide) & np.isnan(found)) | (wide == found))
    size = np.where(finite, np.abs(wide), 0)
    difference = np.where(same, np.abs(np.where(finite & same, found, 0) - np.where(finite & same, wide, 0)), np.inf)
    return difference, limits[0] * size + limits[1] * max(1e-6, largest, float(size.max(initial=0.0)))


def same_bits(one: Any, other: Any) -> bool:
    """Whether two arrays have the same bits; one NaN is as good as another."""
    one, other = np.asarray(one), np.asarray(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.kind in "OUS" or one.size == 0:
        return bool(np.array_equal(one, other))
    same = np.ascontiguousarray(one).view(f"V{one.dtype.itemsize}") == np.ascontiguousarray(other).view(f"V{one.dtype.itemsize}")
    return bool(np.all(same | ((one != one) & (other != other)).reshape(same.shape)))


def check_site(
    body: onnx.FunctionProto,
    needed: list[onnx.FunctionProto],
    specs: list[Spec],
    replacement: Callable[[dict[str, np.ndarray]], list[Any]],
    tolerance: Mapping[str, tuple[float, float]],
    sample: Callable[..., Any] | None,
    bitwise: bool = False,
) -> Verdict:
    """Compare `replacement` with `body` on several inputs. A site that cannot be computed is not verified, so refused.

    Very large weights are first replaced by smaller ones of the same proportions. If that does not pass (the body may
    hold numbers that go with its sizes), the sizes of the model decide. `bitwise`: every bit must be the same, the sign of
    zero included; NaN equals NaN. Then the sizes are always the model's, because the order of a sum may depend on them.
    """
    small = None if bitwise else shrink(specs)
    try:
        if small is not None:
            smaller, factor = small
            verdict = _compare_site(body, needed, smaller, replacement, tolerance, sample, bitwise)
            if verdict.ok:
                return replace(verdict, reduced=factor)
        return _compare_site(body, needed, specs, replacement, tolerance, sample, bitwise)
    except Unfinished as error:  # it took its time once; other inputs would take it again
        return Verdict(False, np.inf, str(error))


def shrink(specs: list[Spec]) -> tuple[list[Spec], int] | None:
    """The inputs with all large dimensions divided by one power of two, and that; None if none is `LARGE`, or they have none in common."""
    sizes = [d for s in specs for d in s.shape or () if isinstance(d, int) and d > 256]
    largest = max((math.prod(d for d in s.shape or () if isinstance(d, int)) for s in specs), default=0)
    if not sizes or largest <= LARGE or any(s.content is not None or s.value is not None or s.shape is None for s in specs):
        return None
    factor = 1
    while min(sizes) // factor > 32 and max(sizes) // factor > 64 and all(d % (2 * factor) == 0 for d in sizes):
        factor *= 2
    if factor == 1:
        return None
    return [replace(s, shape=tuple(d // factor if isinstance(d, int) and d > 256 else d for d in s.shape or ())) for s in specs], factor


def _compare_site(
    body: onnx.FunctionProto,
    needed: list[onnx.FunctionProto],
    specs: list[Spec],
    replacement: Callable[[dict[str, np.ndarray]], list[Any]],
    tolerance: Mapping[str, tuple[float, float]],
    sample: Callable[..., Any] | None,
    bitwise: bool,
) -> Verdict:
    worst, done = 0.0, 0
    last = ""
    narrow = any(is_narrow(s.dtype) for s in specs)
    for attempt in range(len(SCALES) + narrow):
        exact = None
        try:
            inputs = make_inputs(specs, attempt, sample)
            expected = run_function(body, needed, inputs)
            if narrow:
                exact = run_function(widen_function(body), [widen_function(f) for f in needed], widen_arrays(inputs))
        except Unfinished:
            raise
        except RewriteError as error:
            last = str(error)
            continue
        try:
            with np.errstate(all="ignore"):
                actual = replacement(inputs)
        except Unfinished:
            raise
        except Exception as error:
            return Verdict(False, np.inf, f"the replacement fails: {type(error).__name__}: {str(error)[:200]}")
        if any(np.asarray(a).dtype.name == "bfloat16" for a in actual):  # computed in float32: the types of the results are not known
            expected = [e.astype(np.asarray(a).dtype) if e.dtype == np.float32 else e for e, a in zip(expected, actual, strict=False)]
        verdict = compare(expected, actual, tolerance, exact)
        worst = max(worst, verdict.error)
        if not verdict.ok:
            return Verdict(False, worst, verdict.reason)
        if not any(e.size for e in expected):
            last = "its results are empty at every size that was tried"
            continue
        if bitwise and not all(map(same_bits, expected, actual)):
            return Verdict(False, worst, f"it is not the same bit by bit (largest difference {worst:.3g}), which --bitwise asks for")
        done += 1
    if done == 0:
        return Verdict(False, np.inf, f"the replaced subgraph cannot be computed on its own: {last}")
    return Verdict(True, worst)


def reference_runner(plugin: Plugin, attributes: Mapping[str, Any], names: list[str]) -> Callable[[dict[str, np.ndarray]], list[Any]]:
    """The plugin's NumPy reference as a function of the site's inputs."""

    updated = {n.rstrip("?") for n in plugin.inputs} & plugin.updates.keys()

    def run(inputs: dict[str, np.ndarray]) -> list[Any]:
        inputs = {n: a.copy() if n in updated else a for n, a in inputs.items()}
        result = plugin.reference(*(inputs.get(n) if n else None for n in names), **{**plugin.attributes, **attributes})
        return list(result) if isinstance(result, tuple) else [result]

    return run


# --- whole models -------------------------------------------------------------------------------------------------
def index_ranges(proto: onnx.ModelProto) -> dict[str, int]:
    """For each integer input that looks something up in a table (token ids): the rows of the smallest such table."""
    rows = {i.name: int(i.dims[0]) for i in proto.graph.initializer if i.dims}
    source = {i.name: i.name for i in proto.graph.input}
    ranges: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type in ("Cast", "Identity", "Unsqueeze", "Reshape", "Flatten", "Squeeze") and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
        elif node.op_type == "Gather" and node.input[0] in rows and node.input[1] in source:
            name = source[node.input[1]]
            ranges[name] = min(rows[node.input[0]], ranges.get(name, rows[node.input[0]]))
    return ranges


def model_inputs(proto: onnx.ModelProto, attempt: int, sizes: Mapping[str, int] | None = None, advice: str = "give inputs with --inputs FILE.npz") -> dict[str, np.ndarray]:
    """Inputs for a whole model: named dimensions are those of `sizes`; others are drawn once and used everywhere.

    Integer inputs named for masks are padding, by attempt: on the right, on the left, anywhere. Token ids range over the
    table they are looked up in; other integers are 0 or 1. Strings are numbers. Raises RewriteError, which ends with `advice`, for an
    input that cannot be generated.
    """
    if odd := no_tensor(proto):
        raise RewriteError(f"{odd}, and only tensors are generated: the model as a whole cannot be checked")
    rng = np.random.default_rng(1000 + attempt)
    sizes = dict(sizes or {})
    draw = draw_sizes(SIZES[attempt % len(SIZES)])
    initial = {i.name for i in proto.graph.initializer}
    ranges = index_ranges(proto)
    made: dict[str, np.ndarray] = {}
    inputs = [i for i in proto.graph.input if i.name not in initial]
    given, trial = [d for i in inputs for d in _dims(i)], dict(sizes)
    try:
        enlarge(given, trial, draw, sizes)
    except RewriteError as error:
        raise RewriteError(f"{error}; {advice}") from error
    wide = dict(trial)
    with contextlib.suppress(RewriteError):  # as far as possible, nothing inside is empty either
        enlarge((d for v in (*proto.graph.value_info, *proto.graph.output) for d in _dims(v)), wide, draw, sizes)
    sizes = wide if all(_size(d, wide, draw) >= 1 for d in given if isinstance(d, str)) else trial
    for value in inputs:
        if not value.type.tensor_type.HasField("shape"):
            raise RewriteError(f"input '{value.name}' has no known tensor shape; {advice}")
        shape = tuple(resolve(d, sizes, draw) for d in _dims(value))
        if math.prod(shape) > MOST_INPUT:
            raise RewriteError(f"input '{value.name}' would have {math.prod(shape):.1e} elements, too many to generate; {advice}")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        low = value.name.lower()
        if dtype.kind in "iu" and "mask" in low and len(shape) == 2:
            made[value.name] = _padding(rng, shape, attempt).astype(dtype)
        elif dtype.kind in "iu" and "position" in low and shape:
            made[value.name] = np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
        elif dtype.kind in "iu":
            made[value.name] = np.asarray(rng.integers(0, ranges.get(value.name, 2), shape)).astype(dtype)
        elif dtype.kind in "fb" or dtype.name == "bfloat16":
            made[value.name] = default_sample(rng, shape, dtype)
        elif value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            made[value.name] = rng.choice(np.array(STRINGS, object), shape)
        else:
            raise RewriteError(f"input '{value.name}' is {dtype}; {advice}")
    return made


def _dims(value: onnx.ValueInfoProto) -> list[Dim]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in value.type.tensor_type.shape.dim]


def _padding(rng: np.random.Generator, shape: tuple[int, ...], attempt: int) -> np.ndarray:
    """1 for tokens, 0 for padding: on the right, on the left, anywhere. The first of several rows is full."""
    rows, length = shape
    if attempt % 3 == 2 and length:
        anywhere = rng.random(shape) < 0.7
        anywhere[np.arange(rows), rng.integers(0, length, rows)] = True
        anywhere[0] = True
        return anywhere
    lengths = rng.integers(1, max(length, 2), rows)
    if rows > 1:
        lengths[0] = length
    kept = np.arange(length)[None] < lengths[:, None]
    return kept if attempt % 3 == 0 else kept[:, ::-1]


def check_models(
    before: Any,
    after: Any,
    inputs: list[dict[str, np.ndarray]] | None = None,
    tolerance: float = 1e-4,
    attempts: int = 3,
) -> float:
    """Compare two models on given or generated inputs; returns the largest difference relative to the largest value.

    16-bit outputs may differ by what their type rounds to (`MODEL_TOLERANCE`), where that is more than `tolerance`.
    Raises CheckFailed, naming the output, if they differ by more, RewriteError if one cannot run.
    """
    first, second = file_session(before), file_session(after)
    names = [o.name for o in first.get_outputs()]
    if names != [o.name for o in second.get_outputs()]:
        raise CheckFailed(f"the outputs differ: {names} and {[o.name for o in second.get_outputs()]}")
    known = {i.name for i in first.get_inputs()}
    if missing := [i.name for i in second.get_inputs() if i.name not in known]:
        raise CheckFailed(f"the inputs differ: the second model needs '{missing[0]}' too, the first has {', '.join(sorted(known)) or 'none'}")
    worst = 0.0
    for attempt in range(attempts if inputs is None else len(inputs)):
        feeds = inputs[attempt] if inputs is not None else model_inputs(before.proto, attempt)
        if has_bfloat16(before.proto):
            feeds = widen_arrays(feeds)
        try:
            expected = first.run(None, feeds)
        except Exception as error:
            if inputs is None and attempt + 1 < attempts:
                continue
            raise RewriteError(f"{before.name} fails on the inputs: {str(error).strip().splitlines()[0][:300]}; give inputs with --inputs FILE.npz") from error
        try:
            actual = second.run(None, feeds)
        except Exception as error:
            raise CheckFailed(f"the rewritten model fails on the inputs: {str(error).strip().splitlines()[0][:300]}") from error
        for name, want, got in zip(names, expected, actual, strict=True):
            wanted = _tensors(want)
            verdict = compare(wanted, _tensors(got), {k: (max(tolerance, least),) * 2 for k, least in MODEL_TOLERANCE.items()})
            size = max((float(np.abs(a.astype(np.float64)).max(initial=0.0)) for a in wanted if a.dtype.kind == "f"), default=0.0)
            if not verdict.ok:
                raise CheckFailed(f"output '{name}': {verdict.reason}")
            worst = max(worst, verdict.error / max(size, 1e-6))
    return worst


def _tensors(output: Any) -> list[np.ndarray]:
    """The tensors of an output of ONNX Runtime: each of a sequence, keys and values of a map, none of an optional value that is absent."""
    if isinstance(output, list):
        return [a for element in output for a in _tensors(element)]
    if isinstance(output, dict):
        return [np.array(list(output)), np.array(list(output.values()))]
    return [] if output is None else [np.asarray(output)]


def file_session(model: Any) -> Any:
    """A session of a model whose external weights lie in its folder; bfloat16 is computed in float32."""
    import onnxruntime as ort

    if not model.external:
        try:
            return session(widen_model(model.proto) if has_bfloat16(model.proto) else model.proto)
        except RewriteError as error:
            raise RewriteError(f"{model.name}: {error}") from error
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.folder))
    try:
        return ort.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RewriteError(f"ONNX Runtime cannot load {model.name}: {str(error).strip().splitlines()[0][:300]}") from error


def has_bfloat16(proto: onnx.ModelProto) -> bool:
    values = (*proto.graph.input, *proto.graph.output)
    return any(i.data_type == onnx.TensorProto.BFLOAT16 for i in proto.graph.initializer) or any(v.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for v in values)


def spec_of(name: str, tensor: gs.Tensor, value: tuple[Dim, ...] | None = None, content: np.ndarray | None = None) -> Spec:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    dtype = tensor.dtype
    if dtype is None:
        raise RewriteError(f"the dtype of '{tensor.name}' is unknown")
    if isinstance(dtype, int):
        dtype = onnx.helper.tensor_dtype_to_np_dtype(dtype)
    return Spec(name, np.dtype(dtype), shape, value, content)


def accepted(runner: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs as a session takes them: a model of bfloat16 was widened to float32 when it was loaded."""
    wide = {i.name for i in runner.get_inputs() if i.type == "tensor(float)"}
    return {n: a.astype(np.float32) if n in wide and is_narrow(a.dtype) else a for n, a in inputs.items()}


def run_model(model: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a model in ONNX Runtime, by name. Raises RewriteError if it cannot run on these inputs."""
    return run_session(file_session(model), inputs, model.name)


def run_session(runner: Any, inputs: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The same on a session; `name` is the model's, for errors."""
    names = [o.name for o in runner.get_outputs()]
    try:
        return dict(zip(names, runner.run(None, accepted(runner, inputs)), strict=True))
    except Exception as error:
        raise RewriteError(f"{name} fails on the inputs: {str(error).strip().splitlines()[0][:300]}") from error
