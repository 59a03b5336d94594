"""Random valid graphs in which instances and near misses of the built-in rules are planted among noise.

    python tests/random_graphs.py --count 10000 [--start SEED] [--record]

rewrites each with every rule alone, all together and random subsets, and compares outputs in ONNX Runtime on three inputs;
planted instances must be found, near misses left alone. `--record` writes the counts to benchmarks/results/differential.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from planted import NEWEST, PLANTS, Block

import rewrite
from rewrite.registry import library

OPSETS = (17, 18, 20, 21, 23)
UNARY = ("Sin", "Atan", "Softsign", "Cos", "Elu", "Abs", "Neg")
DISTURBING = ("Sin", "Atan", "Softsign", "Cos", "Elu", "Mish")  # on an edge inside a plant: no rule knows them
ATTEMPTS = 3  # inputs for each graph
LIMIT = 2e-4  # largest difference, relative to the largest element of an output
BEFORE_SCORES = {"added_masks", "chosen_and_added_masks", "chosen_masks", "scaled_masks", "chosen_bias"}  # anything may stand before their scores


@dataclass
class Plant:
    """One thing planted: `rule`, the value it computes, how it was made wrong ("" if it was not)."""

    rule: str
    output: str
    nodes: set[str]
    wrong: str = ""
    barrier: bool = True


@dataclass
class Case:
    """A random graph and what is in it."""

    seed: int
    model: onnx.ModelProto
    plants: list[Plant] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


def make_case(seed: int, only: str | None = None, rng: Any = None, least: int = 2) -> Case:
    """The graph of this seed: the same seed gives the same bytes. `only`: plants of one rule. `rng`: where its structure comes
    from instead. `least`: plants, of at most five."""
    rng = rng or np.random.default_rng(seed)
    opset = int(rng.choice(OPSETS))
    names = [n for n in PLANTS if opset >= 23 or n not in NEWEST]
    if only is not None:
        names, opset = [only], 23 if only in NEWEST else opset
    block, plants = Block(rng, opset), []
    for index in range(int(rng.integers(least, 6))):
        noise(block)
        plants.append(plant(block, str(rng.choice(names)), f"p{index}_"))
    noise(block)
    return Case(seed, finish(block), plants, block.sizes)


def plant(block: Block, rule: str, prefix: str) -> Plant:
    block.prefix, start = prefix, len(block.nodes)
    kind = block.pick("right", "right", "wrong", "disturbed")
    number = int(block.rng.integers(24)) if kind == "wrong" else None
    output = PLANTS[rule](block, number)
    wrong = f"form {number}" if number is not None else ""
    if kind == "disturbed":
        wrong = disturb(block, rule, start)
    made = Plant(rule, output, {n.name for n in block.nodes[start:]}, wrong)
    block.prefix = f"{prefix}after_"
    shape = inferred(block).get(output)
    if shape is None or shape[0] != onnx.TensorProto.FLOAT:
        return made
    made.barrier = block.flip(0.7)  # else other rules may take the plant's result into something larger
    after = block.op(str(block.rng.choice(UNARY[:3])), output) if made.barrier else output
    if shape[1] is not None:
        block.pool.append((after, shape[1]))
    return made


def disturb(block: Block, rule: str, start: int) -> str:
    """Put an operator on an edge inside the plant that no rule looks through; returns which, or "" if there is no such edge."""
    nodes, types = block.nodes[start:], inferred(block)
    first = next((i for i, n in enumerate(nodes) if n.op_type == "MatMul"), 0) if rule in BEFORE_SCORES else 0
    made = {o: i for i, n in enumerate(nodes) for o in n.output if n.op_type != "Constant" and i >= first}
    edges = [(i, k, v) for i, n in enumerate(nodes) for k, v in enumerate(n.input) if v in made and types.get(v, (0, None))[0] == onnx.TensorProto.FLOAT]
    if rule == "attention":  # a query may be anything
        edges = [e for e in edges if not (nodes[e[0]].op_type == "MatMul" and e[1] == 0 and i_is_scores(nodes, e[0]))]
    if not edges:
        return ""
    at, position, value = edges[int(block.rng.integers(len(edges)))]
    kind = str(block.rng.choice(DISTURBING[: 5 if block.opset < 18 else 6]))
    block.op(kind, value)
    new = block.nodes.pop()
    nodes[at].input[position] = new.output[0]
    block.nodes.insert(start + at, new)
    return f"{kind} before input {position} of {nodes[at].op_type} {nodes[at].name}"


def i_is_scores(nodes: list[onnx.NodeProto], at: int) -> bool:
    """Whether this MatMul is the first one: that of queries and keys."""
    return all(n.op_type != "MatMul" for n in nodes[:at])


def noise(block: Block) -> None:
    """A few operators on values that are there: element by element, moved about, read twice."""
    block.prefix = "n_"
    for _ in range(int(block.rng.integers(0, 4))):
        if not block.pool:
            block.pool.append((block.given(onnx.TensorProto.FLOAT, "B", "S", 8), ("B", "S", 8)))
        x, shape = block.pool[int(block.rng.integers(len(block.pool)))]
        kind = block.pick("unary", "unary", "binary", "scale", "softmax", "move", "cast", "where")
        if kind == "unary":
            y = block.op(str(block.rng.choice(UNARY)), x)
        elif kind == "binary":
            other = block.pick(*[n for n, s in block.pool if s == shape])
            y = block.op("Tanh", block.op(block.pick("Add", "Mul", "Sub"), x, other))
        elif kind == "scale":
            y = block.op(block.pick("Mul", "Add"), x, block.scalar(float(block.rng.uniform(0.5, 1.5))))
        elif kind == "softmax":
            y = block.op("Softmax", x, axis=int(block.rng.integers(len(shape))))
        elif kind == "move":
            perm = [int(i) for i in block.rng.permutation(len(shape))]
            y, shape = block.op("Transpose", x, perm=perm), tuple(shape[i] for i in perm)
        elif kind == "cast":
            y = block.op("Cast", block.op("Cast", x, to=onnx.TensorProto.DOUBLE), to=onnx.TensorProto.FLOAT)
        else:
            y = block.op("Where", block.op("Greater", x, block.scalar(0.1)), x, block.scalar(0.05))
        block.pool.append((y, shape))


def inferred(block: Block, ranks: dict[str, int] | None = None) -> dict[str, tuple[int, tuple[Any, ...] | None]]:
    """Types and, where known, shapes of the values so far."""
    graph = onnx.helper.make_graph(block.nodes, "g", inputs_of(block), [], [onnx.numpy_helper.from_array(a, n) for n, a in block.weights.items()])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", block.opset)], ir_version=10)
    found = {}
    for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info:
        tensor = value.type.tensor_type
        dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
        known = tensor.HasField("shape") and dims and all(isinstance(d, int) or d in ("B", "S", "T") for d in dims)
        found[value.name] = (tensor.elem_type, dims if known else None)
        if ranks is not None and tensor.HasField("shape"):
            ranks[value.name] = len(dims)
    return found


def inputs_of(block: Block) -> list[onnx.ValueInfoProto]:
    return [onnx.helper.make_tensor_value_info(n, t, s) for n, (t, s) in block.inputs.items()]


def finish(block: Block) -> onnx.ModelProto:
    """The model; whatever nobody reads is an output."""
    ranks: dict[str, int] = {}
    types = inferred(block, ranks)
    read = {i for n in block.nodes for i in n.input}
    ends = [o for n in block.nodes for o in n.output if o not in read and n.op_type != "Constant"]
    outputs = [onnx.helper.make_tensor_value_info(o, types[o][0], [None] * ranks[o]) for o in ends]
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in block.weights.items()]
    graph = onnx.helper.make_graph(block.nodes, "random", inputs_of(block), outputs, weights)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", block.opset)], ir_version=10)


# --- what must hold ----------------------------------------------------------------------------------------------------
def session(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(case: Case, attempt: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([case.seed, attempt])
    made = {}
    for value in case.model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value or case.sizes[d.dim_param] for d in tensor.shape.dim]
        if tensor.elem_type == onnx.TensorProto.BOOL:
            made[value.name] = rng.random(shape) < 0.7
        elif tensor.elem_type == onnx.TensorProto.INT64:
            made[value.name] = rng.integers(0, 16, shape)
        else:
            made[value.name] = (rng.standard_normal(shape) * (1.0, 3.0, 0.1)[attempt % 3]).astype(np.float32)
    return made


def expected(case: Case) -> list[list[np.ndarray]]:
    onnx.checker.check_model(case.model)
    run = session(case.model)
    return [run.run(None, feeds(case, a)) for a in range(ATTEMPTS)]


def difference(want: np.ndarray, got: np.ndarray) -> float:
    """The largest difference relative to the largest element; infinite where shapes or what is finite differ."""
    if want.shape != got.shape or want.dtype != got.dtype or not np.array_equal(np.isfinite(want), np.isfinite(got)):
        return float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(want[~finite], got[~finite], equal_nan=True):
        return float("inf")
    return float(np.abs(want[finite] - got[finite]).max(initial=0.0) / max(1.0, np.abs(want)[finite].max(initial=0.0)))


def problems(case: Case, want: list[list[np.ndarray]], only: list[str] | None, verify: bool = False, counts: Counter[str] | None = None) -> list[str]:
    """Rewrite with these rules (None: all); what does not hold, a line each."""
    result = rewrite.optimize(case.model, rules=[], only=only, verify=verify)
    run, found = session(result.model.proto), []
    names = [o.name for o in case.model.graph.output]
    for attempt, outputs in enumerate(want):
        for name, one, other in zip(names, outputs, run.run(None, feeds(case, attempt)), strict=True):
            error = difference(one, other)
            if error > LIMIT:
                found.append(f"seed {case.seed}, rules {only or 'all'}: output {name} differs by {error:.2g} on input {attempt}")
    sites = result.report.sites
    taken = {(s.rule, o) for s in sites for o in s.outputs}
    covered = {n.split("'")[1] for s in sites for n in s.nodes}
    for one in case.plants:
        is_there = (one.rule, one.output) in taken
        if one.wrong and is_there:
            found.append(f"seed {case.seed}: near miss of {one.rule} ({one.wrong}) was taken at {one.output}")
        if only is None and not one.wrong and not is_there and (one.barrier or not one.nodes & covered):
            found.append(f"seed {case.seed}: planted {one.rule} was not found at {one.output}: {[str(m) for m in result.report.near_misses if m.rule == one.rule][:2]}")
        if counts is not None and only is None:
            counts[f"{'near miss' if one.wrong else 'planted'}: {one.rule}"] += 1
    if counts is not None:
        counts["sites"] += len(sites)
        counts["rewrites"] += 1
    return found


def check(seed: int, counts: Counter[str], alone: int = 2, verify: bool = False) -> list[str]:
    """All rules together, a random subset, and `alone` of the planted rules alone."""
    case = make_case(seed)
    want = expected(case)
    rules = [r.name for r in library([]).rules]
    rng = np.random.default_rng([seed, 7])
    subsets: list[list[str] | None] = [None, [r for r in rules if rng.random() < 0.5] or rules[:1]]
    subsets += [[r] for r in dict.fromkeys(p.rule for p in case.plants[:alone])]
    subsets.append([rules[seed % len(rules)]])
    return [p for s in subsets for p in problems(case, want, s, verify and s is None, counts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/differential.json")
    arguments = parser.parse_args()
    started, counts, failures = time.perf_counter(), Counter[str](), list[str]()
    for seed in range(arguments.start, arguments.start + arguments.count):
        try:
            found = check(seed, counts, verify=seed % 10 == 0)
        except Exception as error:
            found = [f"seed {seed}: {type(error).__name__}: {str(error)[:300]}"]
        failures += found
        for line in found:
            print(line[:400], flush=True)
    seconds = time.perf_counter() - started
    planted, missed = ({k.split(": ")[1]: v for k, v in sorted(counts.items()) if k.startswith(kind)} for kind in ("planted", "near miss"))
    summary = {"graphs": arguments.count, "inputs": ATTEMPTS, "rewrites": counts["rewrites"], "sites": counts["sites"], "problems": len(failures),
               "planted": sum(planted.values()), "near_misses": sum(missed.values()), "seconds": round(seconds, 1)}  # fmt: skip
    print(summary, f"fewest near misses of a rule: {min(missed.items(), key=lambda kv: kv[1], default=None)}")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        print(record.write("differential", record.cpu(), record.versions("onnx", "onnxruntime", "numpy"), {**summary, "planted_by_rule": planted, "near_misses_by_rule": missed}))
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
