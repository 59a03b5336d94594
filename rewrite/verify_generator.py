"""A generator against the decoder it was made of: random texts in ragged steps, each logit against the text computed whole.

Steps mix beginnings, chunks and single tokens of several sequences, whose blocks lie scattered over the pool; what the
decoder says at a position must be what the generator says, however the text came to be there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the names of its types
import numpy as np
import onnx

from rewrite.errors import CheckFailed, RewriteError
from rewrite.functions import FunctionTable
from rewrite.graph import DOMAIN
from rewrite.model import Model, base_name
from rewrite.precision import widen_arrays
from rewrite.registry import Plugin
from rewrite.verify import MODEL_TOLERANCE, TOLERANCE, compare, file_session, run_function
from rewrite.weights import external_size

KEY = "rewrite.generator"  # of the model's metadata: what the runtime must know, as JSON
LARGE = 1 << 28  # bytes of weights from which a model is checked in fewer steps
WINDOW = 64  # positions: windows up to this length are exceeded by the texts of a check
Array = np.ndarray[Any, Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]


def generator_of(proto: onnx.ModelProto) -> dict[str, Any] | None:
    """What the model says of itself as a generator; None if it is none. Raises RewriteError if it says what cannot be."""
    text = next((p.value for p in proto.metadata_props if p.key == KEY), None)
    if text is None:
        return None
    try:
        found: dict[str, Any] = json.loads(text)
        _check_described(found, {i.name for i in proto.graph.input}, {o.name for o in proto.graph.output})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RewriteError(f"the model's metadata '{KEY}' are not those of a generator ({type(error).__name__}: {str(error)[:80]}); make it again with `rewrite optimize --generate`") from error
    return found


def _check_described(found: dict[str, Any], inputs: set[str], outputs: set[str]) -> None:
    """Raises ValueError or its like if the description is not one, or not of a model with these inputs and outputs."""
    numbers = [found["block_size"], found["vocabulary"], found["tokens"], *([] if found["positions"] is None else [found["positions"]])]
    for layer in found["layers"]:
        numbers += [layer["heads"], layer["kv_heads"], layer["size"], layer["value_size"], layer["window"] + 1]
        np.dtype(layer["dtype"])
        if not {layer["key_cache"], layer["value_cache"]} <= inputs or not {layer["keys"], layer["values"]} <= outputs:
            raise ValueError("a cache is no input or output")
    if not found["layers"] or not all(type(n) is int and 0 < n < 1 << 31 for n in numbers):
        raise ValueError("a number is missing or absurd")
    if not all(isinstance(found["inputs"][role], str) for role in ("tokens", "mask", "positions")):
        raise ValueError("an input has no name")


@dataclass
class Texts:
    """Random texts, and the blocks of a pool in which each lies."""

    tokens: list[Array]
    tables: Array
    blocks: int
    block_size: int

    @staticmethod
    def random(rng: np.random.Generator, found: Mapping[str, Any]) -> Texts:
        block = found["block_size"]
        windows = [layer["window"] for layer in found["layers"] if 0 < layer["window"] <= WINDOW]
        lengths = [1, block + 3, 7, max([2 * block + 1, *(w + 5 for w in windows)])]
        lengths = [min(n, found["positions"] or n) for n in lengths]
        needed = [-(-n // block) for n in lengths]
        blocks = sum(needed) + 3
        order, tables, first = rng.permutation(blocks), np.full((len(lengths), max(needed)), -1, np.int32), 0
        for row, count in zip(tables, needed, strict=True):
            row[:count] = order[first : first + count]
            first += count
        return Texts([rng.integers(0, found["tokens"], n) for n in lengths], tables, blocks, block)

    def caches(self, found: Mapping[str, Any]) -> dict[str, Array]:
        """Empty caches, by the names of the inputs."""
        made = {}
        for layer in found["layers"]:
            dtype = np.dtype(layer["dtype"])
            made[layer["key_cache"]] = np.zeros((self.blocks, self.block_size, layer["kv_heads"], layer["size"]), dtype)
            made[layer["value_cache"]] = np.zeros((self.blocks, self.block_size, layer["kv_heads"], layer["value_size"]), dtype)
        return made

    def steps(self, rng: np.random.Generator, singles: int = 8) -> Iterator[list[tuple[int, int, int]]]:
        """Chunks (text, from, to) of each step, until all texts are read: a few tokens at once at first, the last `singles` one by one."""
        done = [0] * len(self.tokens)
        while any(d < len(t) for d, t in zip(done, self.tokens, strict=True)):
            chunks: list[tuple[int, int, int]] = []
            for i in rng.permutation(len(self.tokens)):
                left = len(self.tokens[i]) - done[i]
                if not left or (chunks and rng.random() < 0.2):
                    continue
                early = left > singles
                count = int(rng.integers(left // 2, left + 1 - singles)) if early and left > 2 * singles else left - singles if early else 1
                chunks.append((int(i), done[i], done[i] + count))
                done[i] += count
            if chunks:
                yield chunks

    def feeds(self, chunks: list[tuple[int, int, int]], rng: np.random.Generator) -> tuple[dict[str, Array], list[tuple[int, int]]]:
        """The integer inputs of a step, and of which text and position each row of its logits is: some, the last ones among them."""
        starts = np.cumsum([0] + [end - begin for _, begin, end in chunks])
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in chunks])
        owner = np.repeat(np.arange(len(chunks)), np.diff(starts))
        tables = self.tables[[i for i, _, _ in chunks]]
        rows = sorted({int(s) - 1 for s in starts[1:]} | {int(r) for r in rng.integers(0, starts[-1], 2)})
        feeds = {
            "input_ids": np.concatenate([self.tokens[i][begin:end] for i, begin, end in chunks])[None],
            "position_ids": positions[None],
            "slots": (tables[owner, positions // self.block_size] * self.block_size + positions % self.block_size).astype(np.int32),
            "block_tables": tables,
            "query_starts": starts.astype(np.int32),
            "context_lengths": np.array([end for _, _, end in chunks], np.int32),
            "logit_rows": np.array(rows, np.int64),
        }
        return feeds, [(chunks[owner[r]][0], int(positions[r])) for r in rows]


def check_generator(before: Model, after: Model, tolerance: float = 1e-4) -> float:
    """Compare the logits of a generator with those of the decoder it was made of, both in ONNX Runtime; returns the largest relative difference.

    One model is loaded after the other; large ones are compared on one set of texts, in fewer steps. Raises CheckFailed, naming
    the position, if a difference is larger than `tolerance`, RewriteError if a model cannot run.
    """
    found = generator_of(after.proto)
    assert found is not None
    narrow = {name for name in {layer["dtype"] for layer in found["layers"]} if name in MODEL_TOLERANCE}
    tolerance = max([tolerance, *(MODEL_TOLERANCE[name] for name in narrow)])
    large = after.proto.ByteSize() + external_size(after.external) > LARGE
    seeds, singles = (1, 2) if large else (2, 8)
    try:
        texts = [Texts.random(np.random.default_rng(seed), found) for seed in range(seeds)]
        decoder = file_session(before)
        expected = [[run_decoder(decoder, found["inputs"], t) for t in one.tokens] for one in texts]
        del decoder
        generator = file_session(after)
        names = [o.name for o in generator.get_outputs()]

        def step(feeds: dict[str, Array]) -> dict[str, Array]:
            feeds = widen_arrays(feeds) if "bfloat16" in narrow else feeds  # ONNX Runtime has no kernels for it
            return dict(zip(names, generator.run(None, feeds), strict=True))

        return max(compare_steps(found, one, wanted, step, tolerance, "the generator", singles) for one, wanted in zip(texts, expected, strict=True))
    except (CheckFailed, RewriteError):
        raise
    except Exception as error:
        raise RewriteError(f"{after.name}: it cannot be run on generated texts: {str(error).strip().splitlines()[0][:300]}; leave the check out with --no-verify") from error


def run_decoder(session: Any, inputs: Mapping[str, str], tokens: Array) -> Array:
    """The logits [positions, vocabulary] of one text, computed whole. `inputs` are the decoder's inputs by what they are for."""
    values = {"tokens": tokens, "mask": np.ones_like(tokens), "positions": np.arange(len(tokens))}
    types = {i.name: _numpy_type(i.type) for i in session.get_inputs()}
    result = session.run(None, {name: values[role][None].astype(types[name]) for role, name in inputs.items() if name})[0]
    return np.asarray(result).reshape(len(tokens), -1)


def _numpy_type(text: str) -> Any:
    """Of what ONNX Runtime says: `tensor(int64)`."""
    return np.dtype(text.removeprefix("tensor(").removesuffix(")"))


def at_once(found: Mapping[str, Any], texts: Texts, run: Run) -> list[Array]:
    """The logits of each text at all positions from one step of a generator, `run`, that takes all texts whole."""
    feeds, _ = texts.feeds([(i, 0, len(t)) for i, t in enumerate(texts.tokens)], np.random.default_rng(0))
    feeds["logit_rows"] = np.arange(feeds["slots"].size)
    logits = run({**feeds, **texts.caches(found)})["logits"]
    return np.split(logits, feeds["query_starts"][1:-1])


def compare_steps(found: Mapping[str, Any], texts: Texts, expected: list[Array], step: Run, tolerance: float, what: str, singles: int = 8) -> float:
    """Read texts step by step; returns the largest difference of a logit, relative to the largest of its row.

    `expected` are the logits of each text at all positions; `step` gives the outputs of one step, caches among them.
    Raises CheckFailed if a difference is above `tolerance`.
    """
    rng = np.random.default_rng(0)
    caches, worst = texts.caches(found), 0.0
    for chunks in texts.steps(rng, singles):
        feeds, rows = texts.feeds(chunks, rng)
        results = step({**feeds, **caches})
        for layer in found["layers"]:
            caches[layer["key_cache"]], caches[layer["value_cache"]] = results[layer["keys"]], results[layer["values"]]
        for got, (text, position) in zip(results["logits"], rows, strict=True):
            want = np.asarray(expected[text][position], np.float64)
            error = float(np.abs(want - got).max()) / max(float(np.abs(want).max()), 1e-6)
            if not error <= tolerance:
                where = f"position {position} of {len(texts.tokens[text])}, in a step of {len(chunks)} sequences and {feeds['slots'].size} tokens"
                raise CheckFailed(f"{what} differs from the model by {error:.1e} of the largest logit, allowed {tolerance:.0e}, at {where}")
            worst = max(worst, error)
    return worst


def check_attentions(proto: onnx.ModelProto, plugin: Plugin) -> float:
    """Each distinct PagedAttention's body in ONNX against the plugin's reference; returns the largest difference. Raises CheckFailed."""
    found = generator_of(proto)
    assert found is not None
    table, worst = FunctionTable(list(proto.functions)), 0.0
    types = {v.name: v.type.tensor_type for v in proto.graph.value_info} | {i.name: i for i in proto.graph.initializer}
    done: set[str] = set()
    layers = {layer["keys"]: layer for layer in found["layers"]}
    for node in proto.graph.node:
        if node.domain != DOMAIN or base_name(node) != plugin.name or node.op_type in done:
            continue
        done.add(node.op_type)
        layer, attributes = layers[node.output[1]], {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        rng = np.random.default_rng(0)
        texts = Texts.random(rng, found)
        caches = texts.caches({**found, "layers": [layer]})
        caches = {n: np.asarray(rng.standard_normal(c.shape), c.dtype) for n, c in caches.items()}
        for _, chunks in zip(range(6), texts.steps(rng), strict=False):
            integers, _ = texts.feeds(chunks, rng)
            count = integers["slots"].size
            sizes = {"q": (layer["heads"], layer["size"]), "k": (layer["kv_heads"], layer["size"]), "v": (layer["kv_heads"], layer["value_size"])}
            feeds = {n: rng.standard_normal((1, heads, count, size)).astype(caches[layer["key_cache"]].dtype) for n, (heads, size) in sizes.items()}
            feeds.update(zip(("key_cache", "value_cache"), (c.copy() for c in caches.values()), strict=True))
            feeds.update({n: integers[n] for n in plugin.inputs[5:9]})
            for name, given in zip(plugin.parameters[9:], node.input[9:], strict=False):  # angles and weights
                if given:
                    feeds[name] = _floats(rng, types[given], count)
            function = table.functions[node.op_type]
            expected = run_function(function, table.needed_by(function), feeds)
            actual = plugin.reference(*(feeds[n].copy() if n in feeds else None for n in plugin.parameters), **{**plugin.attributes, **attributes})
            expected = [e.astype(a.dtype) for e, a in zip(expected, actual, strict=True)]  # bfloat16 is computed in float32
            verdict = compare(expected, list(actual), {**TOLERANCE, **plugin.tolerance})
            if not verdict.ok:
                raise CheckFailed(f"plugin {plugin.name} at '{node.name}' differs from the function it stands for: {verdict.reason}")
            worst = max(worst, verdict.error)
    return worst


def _floats(rng: np.random.Generator, kind: Any, tokens: int) -> Array:
    """Random numbers of the type of a value, or of an initializer, in which a named dimension is that of the tokens."""
    if isinstance(kind, onnx.TensorProto):
        return rng.standard_normal(tuple(kind.dims)).astype(onnx.helper.tensor_dtype_to_np_dtype(kind.data_type))
    shape = [d.dim_value if d.HasField("dim_value") else tokens for d in kind.shape.dim]
    return rng.standard_normal(shape).astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
