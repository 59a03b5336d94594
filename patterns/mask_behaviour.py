"""What a mask is, told from what it computes.

The mask, captured as a function of a padding and of sizes, is computed on chosen inputs. From the results follow the
attributes of an AttentionMask; the mask is taken for that if both then agree, exactly, on every input tried. The inputs
are chosen so that other masks would show: sizes beyond every constant in the function (a window shows only beyond its
length), padding of all kinds and with elements around every constant, cached keys. A constant too large for that is
replaced, twice, by a small one: a mask that turns into a window of just that length, both times, has a window of the
original one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.functions import fingerprint
from rewrite.graph import Dim
from rewrite.plugins.masks import TESTS, AttentionMask
from rewrite.verify import function_model, resolve, session

REACH = 300  # constants up to this are exceeded by the sizes tried; larger ones are replaced by small ones
TABLE = 16  # elements: longer constants are tables, read from their start up to a size
LONGEST = 2048  # positions: masks stored for more are not read
FAR_ELEMENTS = (-70000.0, -300.0, 20.0, 60.0, 200.0, 1000.0, 9000.0, 70000.0, 200000.0)  # of a padding: it could be token ids
HIDDEN = -1000.0  # an added score from which on softmax gives nothing

Shaped = Mapping[str, tuple[Any, tuple[Dim, ...]]]
Found = tuple[dict[str, Any], str]


@dataclass(frozen=True)
class Sizes:
    """The dimensions of the attention: expressions of named dimensions, or numbers."""

    batch: Dim
    queries: Dim
    keys: Dim


@dataclass(frozen=True)
class Test:
    """Which elements of the padding are seen; `pool` are elements to try, `binary` if no others are allowed."""

    test: str
    against: float
    pool: tuple[float, ...]
    binary: bool = False

    @property
    def kept(self) -> list[float]:
        return [x for x in self.pool if TESTS[self.test](x, self.against)]

    @property
    def dropped(self) -> list[float]:
        return [x for x in self.pool if not TESTS[self.test](x, self.against)]


class Differs(Exception):
    """The mask is not of the kind that is being tried; the message is the reason, `stage` how far it came."""

    def __init__(self, reason: str, stage: int = 0):
        super().__init__(reason)
        self.stage = stage


_known: dict[str, Found | str] = {}


def recognise(body: onnx.FunctionProto, inputs: Shaped, sizes: Sizes, axes: Mapping[str, int], invert: bool) -> Found | str:
    """Attributes of the AttentionMask that equals `body` and a few words on it, or the reason why there is none.

    Args:
        body: the mask as a function of "padding", "source" and "past", of which it may read the latter two's shapes alone.
        inputs: their dtypes and shapes.
        sizes: of the attention, in the dimensions of these shapes.
        axes: the axes of AttentionMask at which the inputs tell the sizes.
        invert: a boolean mask is True where nothing is seen.
    """
    key = f"{fingerprint(body)}|{[(n, str(d), s) for n, (d, s) in inputs.items()]}|{sizes}|{axes}|{invert}"
    if key not in _known:  # a pure function of its arguments: layers that compute their masks anew ask the same
        try:
            _known[key] = _recognise(body, inputs, sizes, axes, invert)
        except (Differs, RewriteError) as error:
            _known[key] = str(error)
    return _known[key]


def _recognise(body: onnx.FunctionProto, inputs: Shaped, sizes: Sizes, axes: Mapping[str, int], invert: bool) -> Found:
    constants = _constants(body)
    large = sorted({int(c) for c in constants.numbers if REACH < c < 2**31 and c == int(c)})
    if not large:
        attributes = Mask(body, inputs, sizes, axes, invert).attributes()
        return attributes, describe_mask(attributes, "padding" in inputs)
    groups: list[list[int]] = []
    for number in large:
        if groups and number - groups[-1][-1] <= 2:
            groups[-1].append(number)
        else:
            groups.append([number])
    results = []
    for first, step in ((11, 7), (14, 9)):
        small = {n: first + step * i + n - group[0] for i, group in enumerate(groups) for n in group}
        results.append(Mask(_replace_numbers(body, small), inputs, sizes, axes, invert).attributes())
    one, two = (r.pop("window", None) for r in results)
    attributes = results[0]
    if results[0] != results[1] or (one is None) != (two is None):
        raise Differs(f"it depends on the number {large[0]} in a way that is no window")
    if one is not None:
        found = [g[0] + one - (11 + 7 * i) for i, g in enumerate(groups) if one - (11 + 7 * i) == two - (14 + 9 * i)]
        if one == two:
            found.append(one)
        if len(found) != 1:
            raise Differs(f"it depends on the number {large[0]} in a way that is no window")
        attributes["window"] = found[0]
    return attributes, describe_mask(attributes, "padding" in inputs)


def describe_mask(attributes: Mapping[str, Any], padding: bool) -> str:
    """A mask in a few words: "causal, window 4 + padding"."""
    window = f"window {attributes['window']}" if attributes.get("window") else ""
    position = ", ".join(w for w in ("causal" if attributes.get("causal") else "", window) if w)
    return " + ".join(w for w in (position, "padding" if padding else "") if w) or "everything seen"


# --- constants ----------------------------------------------------------------------------------------------------
@dataclass
class Constants:
    """The numbers in a function and the lengths of its tables."""

    numbers: set[float] = field(default_factory=set)
    tables: list[int] = field(default_factory=list)


def _values(node: onnx.NodeProto) -> np.ndarray | None:
    if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
        return np.asarray(onnx.numpy_helper.to_array(node.attribute[0].t))
    return None


def _constants(body: onnx.FunctionProto) -> Constants:
    found = Constants()
    for node in body.node:
        array = _values(node)
        if array is None or array.dtype.kind not in "iufb":
            continue
        if array.size <= TABLE:
            found.numbers.update(float(x) for x in array.reshape(-1) if np.isfinite(x))
            continue
        flat = array.reshape(-1)
        if max(array.shape) <= LONGEST:
            found.tables += [n for n in array.shape if n > 1]
        elif array.dtype.kind not in "iu" or np.unique(np.diff(flat)).size > 1:  # positions 0, 1, 2, ... go on like that
            raise Differs(f"it reads a table of {list(array.shape)} elements, too large to check")
    return found


def _replace_numbers(body: onnx.FunctionProto, small: Mapping[int, int]) -> onnx.FunctionProto:
    result = onnx.FunctionProto()
    result.CopyFrom(body)
    for node in result.node:
        array = _values(node)
        if array is None or array.dtype.kind not in "iuf" or array.size > TABLE:
            continue
        changed = array.copy()
        for old, new in small.items():
            changed[array == old] = new
        node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(changed))
    return result


# --- one mask -----------------------------------------------------------------------------------------------------
@dataclass
class Trial:
    """Sizes to try; `sizes` are those of the named dimensions."""

    batch: int
    queries: int
    keys: int
    sizes: dict[str, int]


class Mask:
    """A function taken for a mask, and the search for what it is."""

    def __init__(self, body: onnx.FunctionProto, inputs: Shaped, sizes: Sizes, axes: Mapping[str, int], invert: bool):
        self.inputs, self.sizes, self.axes, self.invert = inputs, sizes, axes, invert
        self.constants = _constants(body)
        self.session = _dynamic_session(body, inputs)
        self.parameters = set(body.input)

    def attributes(self) -> dict[str, Any]:
        """The attributes of the AttentionMask that equals it. Raises Differs."""
        best = Differs("", -1)
        for test in self._tests():
            try:
                return self._with(test)
            except Differs as error:
                best = max(best, error, key=lambda e: e.stage)
        raise best

    # --- computing it ------------------------------------------------------------------------------------------
    def trial(self, batch: int, queries: int, past: int) -> Trial:
        """Sizes near the wanted ones: what is a number in the model stays that."""
        sizes: dict[str, int] = {}
        if isinstance(self.sizes.batch, str):
            sizes[self.sizes.batch] = batch
        if isinstance(self.sizes.queries, str):
            sizes[self.sizes.queries] = queries

        def resolved(dim: Dim, wanted: int) -> int:
            return resolve(dim, sizes, lambda: wanted)

        rows, columns = resolved(self.sizes.batch, batch), resolved(self.sizes.queries, queries)
        # Names that only the number of keys has: cached ones, or keys that have nothing to do with the queries.
        alone = isinstance(self.sizes.keys, str) and self.sizes.keys.isidentifier()
        keys = resolved(self.sizes.keys, columns + past if alone else past)
        return Trial(rows, columns, keys, sizes)

    def feeds(self, trial: Trial, padding: np.ndarray | None) -> dict[str, np.ndarray]:
        made = {}
        for name, (dtype, shape) in self.inputs.items():
            sizes = dict(trial.sizes)
            if name == "padding":
                assert padding is not None
                made[name] = padding.astype(dtype)
            else:
                made[name] = np.zeros([resolve(d, sizes, lambda: 1) for d in shape], dtype)
        return made

    def run(self, trial: Trial, padding: np.ndarray | None) -> np.ndarray:
        """The mask for a padding [batch, keys]. Raises Differs if it cannot be computed at these sizes."""
        feeds = {n: a for n, a in self.feeds(trial, padding).items() if n in self.parameters}
        try:
            return np.asarray(self.session.run(None, feeds)[0])
        except Exception as error:
            sizes = f"batch {trial.batch}, {trial.queries} queries, {trial.keys} keys"
            raise Differs(f"it cannot be computed for {sizes}: {str(error).strip().splitlines()[-1][-160:]}") from error

    # --- what it is --------------------------------------------------------------------------------------------
    def _tests(self) -> list[Test]:
        """Ways to read the padding, the likeliest first."""
        if "padding" not in self.inputs:
            return [Test("!=", 0, (0, 1))]
        dtype = np.dtype(self.inputs["padding"][0])
        if dtype == np.bool_:
            return [Test("!=", 0, (0, 1)), Test("==", 0, (0, 1))]
        numbers = sorted(n for n in self.constants.numbers if abs(n) < 1e5 and (dtype.kind == "f" or n == int(n)))[:12]
        step = 0.25 if dtype.kind == "f" else 1
        limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)  # type: ignore[type-var]
        around = {n + d for n in (0.0, 1.0, 7.0, *numbers) for d in (-step, 0, step)}
        pool = tuple(sorted(float(n) for n in around | set(FAR_ELEMENTS) if limits.min <= n <= limits.max))
        general = [Test(t, n, pool) for n in dict.fromkeys((0.0, 1.0, *numbers)) for t in ("!=", "==", ">")]
        # Arithmetic on the padding, `(1 - padding) * -10000`, means something for 0 and 1 alone.
        return [*general[:3], Test("!=", 0, (0, 1), True), Test("==", 0, (0, 1), True), *general[3:]]

    def _with(self, test: Test) -> dict[str, Any]:
        """The attributes if the padding is read in this way."""
        if not test.kept:
            raise Differs("no element of the padding keeps a key")
        far, plain = self._far(test)
        attributes = {**self.axes, **_layout(plain, far)}
        attributes["dtype"] = str(plain.dtype.name)
        if plain.dtype == np.bool_:
            attributes["invert"] = int(self.invert)
        elif plain.dtype.kind != "f":
            raise Differs(f"its elements are {plain.dtype}")
        attributes.update(_band(self._seen(plain), far))
        if "padding" in self.inputs:
            attributes.update(test=test.test, against=float(test.against), binary=int(test.binary))
        if plain.dtype != np.bool_:
            attributes.update(self._fills(plain, attributes, test))
        if test.binary:
            self._needs_binary()
        reason = ""
        for unmask in (0, 1) if "padding" in self.inputs else (0,):
            attributes["unmask_empty"] = unmask
            try:
                self._check(test, attributes, far)
            except Differs as error:
                reason = reason or str(error)
                continue
            defaults = AttentionMask.attributes
            return {k: v for k, v in attributes.items() if v != defaults[k]}
        raise Differs(reason, 2)

    def _far(self, test: Test) -> tuple[Trial, np.ndarray]:
        """Sizes beyond every window, and the mask without padding at these; tables are read in full."""
        reach = max([9, *(int(n) + 4 for n in self.constants.numbers if 1 < n <= REACH)])
        for size in sorted({reach, *self.constants.tables}, reverse=True)[:-1]:
            try:
                trial = self.trial(2, size, 3)
                return trial, self.run(trial, self._all_kept(test, trial))
            except Differs:  # beyond a table
                continue
        trial = self.trial(2, min([reach, *self.constants.tables]), 3)
        return trial, self.run(trial, self._all_kept(test, trial))

    def _all_kept(self, test: Test, trial: Trial) -> np.ndarray | None:
        if "padding" not in self.inputs:
            return None
        return np.resize(np.asarray(test.kept), (trial.batch, trial.keys))

    def _seen(self, y: np.ndarray) -> np.ndarray:
        """Which keys are seen, from a mask of any form. Raises Differs if its numbers are not those of a mask."""
        if y.dtype == np.bool_:
            return np.asarray(y ^ self.invert)
        wrong = y[~((y == 0) | (y <= HIDDEN))]
        if wrong.size:
            raise Differs(f"it adds {wrong.reshape(-1)[0]:.6g} to a score; a mask adds 0 or a number that hides")
        return np.asarray(y == 0)

    def _fills(self, plain: np.ndarray, attributes: Mapping[str, Any], test: Test) -> dict[str, Any]:
        """What is added to hidden scores."""
        if "padding" not in self.inputs:
            numbers = np.unique(plain[plain != 0])
            return {"fill": float(numbers[0])} if numbers.size else {}
        trial = self.trial(4, 8, 3)
        padding = self._random(test, trial, 0)
        y = self.run(trial, padding)
        self._seen(y)
        near = _reference({**attributes, "dtype": "bool", "invert": 0}, self.feeds(trial, self._all_kept(test, trial)))
        kept = TESTS[test.test](padding, test.against).reshape(trial.batch, 1, 1, trial.keys)
        near, kept, y = np.broadcast_arrays(near, kept, y)
        kinds = [np.unique(y[where & (y != 0)]) for where in (~near & kept, near & ~kept, ~near & ~kept)]
        if any(len(k) > 1 for k in kinds):
            raise Differs(f"it adds several numbers to hidden scores: {', '.join(f'{x:.6g}' for x in np.unique(np.concatenate(kinds)))}", 1)
        fills = {name: float(k[0]) for name, k in zip(("fill", "padding_fill", "both_fill"), kinds, strict=True) if k.size}
        if len(set(fills.values())) > 1:
            return {"split": 1, **fills}
        return {"fill": next(iter(fills.values()))} if fills else {}

    def _needs_binary(self) -> None:
        """Other elements than 0 and 1 must make no mask at all; if they do, the mask reads the elements in its own way."""
        trial = self.trial(2, 8, 3)
        try:
            self._seen(self.run(trial, np.full((trial.batch, trial.keys), 2.0)))
            self._seen(self.run(trial, np.full((trial.batch, trial.keys), -1.0)))
        except Differs:
            return
        raise Differs("it depends on the elements of the padding in a way that is no comparison with a number", 1)

    # --- is it that? -------------------------------------------------------------------------------------------
    def _check(self, test: Test, attributes: Mapping[str, Any], far: Trial) -> None:
        """Compare with the reference of AttentionMask on all inputs that matter."""
        trials = [far, self.trial(1, 1, 6), self.trial(7, 8, 5), self.trial(3, 6, 0), self.trial(1, 40 if not self.constants.tables else 5, 1)]
        for seed, trial in enumerate(trials):
            for padding in self._paddings(test, trial, seed):
                feeds = self.feeds(trial, padding)
                with np.errstate(all="ignore"):
                    expected, found = _reference(attributes, feeds), self.run(trial, padding)
                if expected.shape != found.shape or expected.dtype != found.dtype or not np.array_equal(expected, found):
                    raise Differs(_difference(attributes, expected, found, trial))

    def _paddings(self, test: Test, trial: Trial, seed: int) -> list[np.ndarray | None]:
        if "padding" not in self.inputs:
            return [None]
        kept, dropped = np.resize(test.kept, trial.keys), np.resize(test.dropped or test.kept, trial.keys)
        place, keys = np.arange(trial.keys), trial.keys
        shapes = [place >= 0, place >= keys // 3, place < keys - keys // 3, place % 2 == 0, place % 3 != 0, place < 0, place == keys - 1, place == 0]
        rows = [np.where(keep, kept, dropped) for keep in shapes]
        count = max(1, trial.batch)
        batches: list[np.ndarray | None] = [self._random(test, trial, seed)]
        step = count if keys <= 64 else len(rows)
        for start in range(0, len(rows), step):
            batches.append(np.stack([rows[(start + i) % len(rows)] for i in range(count)]))
        return batches

    def _random(self, test: Test, trial: Trial, seed: int) -> np.ndarray:
        """Any elements, those that keep a key and those that do not equally often."""
        rng, shape = np.random.default_rng(seed), (trial.batch, trial.keys)
        return np.where(rng.random(shape) < 0.5, rng.choice(test.kept, shape), rng.choice(test.dropped or test.kept, shape))


def _reference(attributes: Mapping[str, Any], feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    reference: Callable[..., Any] = AttentionMask.reference
    values = {**AttentionMask.attributes, **attributes}
    return np.asarray(reference(*(feeds.get(n) for n in ("padding", "source", "past")), **values))


def _dynamic_session(body: onnx.FunctionProto, inputs: Shaped) -> Any:
    """ONNX Runtime on the function, for inputs of any size."""
    model = function_model(body, [], {n: np.zeros([1] * len(s), d) for n, (d, s) in inputs.items()}, 8)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return session(model)


def _layout(y: np.ndarray, trial: Trial) -> dict[str, Any]:
    """The letters of the mask's dimensions. Raises Differs if they are not those of a mask."""
    shape = f"its shape is {list(y.shape)} for batch {trial.batch}, {trial.queries} queries and {trial.keys} keys"
    if not 2 <= y.ndim <= 4 or y.shape[-1] != trial.keys or y.shape[-2] not in (1, trial.queries):
        raise Differs(shape)
    if y.ndim == 4 and y.shape[0] not in (1, trial.batch):
        raise Differs(shape)
    rows = "S" if y.shape[-2] == trial.queries and trial.queries != 1 else "1"
    batch = "B" if y.ndim == 4 and y.shape[0] == trial.batch and trial.batch != 1 else "1"
    heads = y.shape[-3] if y.ndim > 2 else 1
    return {"layout": (batch + ("1" if heads == 1 else "H") + rows + "T")[-y.ndim :], "heads": heads}


def _band(seen: np.ndarray, trial: Trial) -> dict[str, Any]:
    """Causality and window from what each query sees when nothing is padding. Raises Differs for anything else."""
    seen = np.broadcast_to(seen, (*seen.shape[:-2], trial.queries, trial.keys)).reshape(-1, trial.queries, trial.keys)
    first = seen[0]
    if not (seen == first).all():
        raise Differs("it hides other keys for each head or in each row of the batch though nothing is padding")
    if first.all():
        return {"causal": 0, "window": 0, "align": "end"}
    for align, offset in (("end", trial.keys - trial.queries), ("start", 0)):
        distance = np.arange(trial.queries)[:, None] + offset - np.arange(trial.keys)
        if not first.any():
            break
        causal = int(distance[first].min() == 0 and not first[distance < 0].any())
        reach = int(distance[first].max())
        window = reach + 1 if reach < distance.max() else 0
        near = (distance >= 0 if causal else np.ones_like(first)) & (np.abs(distance) < (window or trial.keys + trial.queries))
        if np.array_equal(near, first):
            return {"causal": causal, "window": window, "align": align}
    raise Differs("which keys a query sees is neither causal nor a window")


def _difference(attributes: Mapping[str, Any], expected: np.ndarray, found: np.ndarray, trial: Trial) -> str:
    kind = describe_mask(attributes, "test" in attributes)
    where = f"at batch {trial.batch}, {trial.queries} queries, {trial.keys} keys"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"it looks like {kind}, but {where} it is {found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)}"
    return f"it looks like {kind}, but {where} {int((expected != found).sum())} of {found.size} elements differ"
