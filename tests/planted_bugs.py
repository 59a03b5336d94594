"""Built-in rules broken in every way their replacements can be: verification catches each of at least 200 bugs.

    python tests/planted_bugs.py [--record]

The bugs are made from the rules: each one's `replace` is called with an op namespace that, for one node it makes, swaps two
inputs, drops one, turns or negates one, or perturbs one attribute. A changed replacement whose outputs are the same on
purpose-made inputs (a commutative operator swapped) is no bug and does not count. `--record` writes the counts, rule by rule, to
benchmarks/results/planted_bugs.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from planted import PLANTS, Block
from random_graphs import Case, difference, expected, feeds, finish, session

from rewrite import optimizer
from rewrite.builder import GraphBuilder
from rewrite.errors import RewriteError
from rewrite.registry import library


class Spoiler:
    """An op namespace like that of replacements which spoils one node in one way: the bug number `bug`."""

    def __init__(self, op: GraphBuilder, bug: int):
        self.op, self.bug, self.seen, self.what = op, bug, 0, ""

    @property
    def opset(self):
        return self.op.opset

    def constant(self, *arguments):
        return self.op.constant(*arguments)

    def __getattr__(self, name):
        def build(*inputs, outputs=1, **attributes):
            inputs, attributes = self.spoil(name, list(inputs), dict(attributes))
            return getattr(self.op, name)(*inputs, outputs=outputs, **attributes)

        return build

    def spoil(self, name, inputs, attributes):
        for what, change in ways(self.op, inputs, attributes):
            if self.seen == self.bug:
                inputs, attributes = change()
                self.what = f"{name}: {what}"
            self.seen += 1
        return inputs, attributes


def ways(op, inputs, attributes):
    """(what, a function that gives spoiled inputs and attributes) for one node."""
    values = [i for i, x in enumerate(inputs) if hasattr(x, "tensor")]

    def put(position, x):
        return lambda: ([x() if i == position else old for i, old in enumerate(inputs)], attributes)

    for i in values:
        if i:
            yield f"input {i} missing", put(i, lambda: None)
        if inputs[i].dtype in ("float32", "float64"):
            yield f"input {i} negated", put(i, lambda i=i: op.Neg(inputs[i]))
            yield f"input {i} 5 % larger", put(i, lambda i=i: op.Mul(inputs[i], op.constant(1.05, inputs[i].dtype)))
            yield f"input {i} shifted", put(i, lambda i=i: op.Add(inputs[i], op.constant(0.05, inputs[i].dtype)))
        for j in values:
            if j > i:
                yield f"inputs {i} and {j} swapped", lambda i=i, j=j: ([inputs[j] if k == i else inputs[i] if k == j else x for k, x in enumerate(inputs)], attributes)
    for i, x in enumerate(inputs):
        if isinstance(x, list) and len(x) > 1:
            yield f"input {i} reversed", put(i, lambda x=x: x[::-1])
            yield f"input {i} off by one", put(i, lambda x=x: [*x[:-1], x[-1] + 1])
    for key, old in attributes.items():
        for new in others(key, old):
            yield f"{key} {new!r} instead of {old!r}", lambda key=key, new=new: (inputs, {**attributes, key: new})


def others(key, old):
    if isinstance(old, bool) or old is None:
        return [1] if key in ("trans_w", "causal", "drop", "zero_masked") and old is None else []
    if isinstance(old, float):
        return [0.0 if np.isinf(old) else old * 1.05 + (0.05 if old == 0 else 0.0), -1.0 if np.isinf(old) else old * 4 + 0.1]
    if isinstance(old, int):
        return [old + 1, old - 1] if key in ("axis", "window", "size", "past_axis", "query_axis") else [1 - old]
    if isinstance(old, str):
        swaps = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", "swish": "sigmoid", "relu": "swish", "sigmoid": "tanh", "tanh": "relu", "gate_up": "up_gate", "up_gate": "gate_up", "end": "start"}
        return [swaps[old], "none"] if old in swaps else []
    if isinstance(old, list) and len(old) > 1:
        return [[*old[1:], old[0]], old[::-1]]
    return []


def graphs(rule, count=2):
    for seed in range(count):
        block = Block(np.random.default_rng([seed, 99, len(rule)]), 23)
        PLANTS[rule](block)
        yield Case(seed, finish(block), sizes=block.sizes)


def optimize(case, rules, verify):
    return optimizer.apply_rules(optimizer.load(case.model), rules, verify=verify, explain=False)


def differs(case, model):
    """Whether the rewritten model computes something else, or nothing at all: then the bug is a bug."""
    try:
        run = session(model)
        found = [run.run(None, feeds(case, a)) for a in range(3)]
    except Exception:
        return True
    return any(difference(a, b) > 1e-3 for one, other in zip(expected(case), found, strict=True) for a, b in zip(one, other, strict=True))


def bugs_of(name):
    """(what, outcome) for each bug that can be planted in a rule: caught, malformed (no replacement at all), harmless, MISSED."""
    everything = library([])
    rule = next(r for r in everything.rules if r.name == name)
    known = set()
    for case in graphs(name):
        right = optimize(case, everything, True).report.rules[name]
        assert (right.applied, right.rejected) >= (1, 0), f"{name}: the right rule is accepted"
        for bug in range(60):
            spoilers = []
            wrong = dataclasses.replace(rule, replace=make_replace(rule, bug, spoilers))
            rules = dataclasses.replace(everything, rules=[wrong if r is rule else r for r in everything.rules])
            outcome = try_rules(case, rules, name)
            what = next((s.what for s in spoilers if s.what), "")
            if not what:
                break
            if what not in known:
                known.add(what)
                yield f"{name}: {what}", outcome


def try_rules(case, rules, name):
    try:
        result = optimize(case, rules, True)
    except RewriteError:
        return "malformed"
    if result.report.rules[name].applied == 0:
        return "caught"
    return "MISSED" if differs(case, result.model.proto) else "harmless"


def make_replace(rule, bug, spoilers):
    """`replace` with the parameters of the original (the engine passes what a function names), spoiled."""
    def replace(op, *values):
        spoiler = Spoiler(op, bug)
        spoilers.append(spoiler)
        return rule.replace(spoiler, *values)

    replace.__signature__ = inspect.signature(rule.replace)
    return replace


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/planted_bugs.json")
    arguments = parser.parse_args()
    started, counts, missed = time.perf_counter(), {}, []
    for name in sorted(PLANTS):
        bugs = list(bugs_of(name))
        counts[name] = dict(Counter(outcome for _, outcome in bugs))
        missed += [what for what, outcome in bugs if outcome == "MISSED"]
        print(name, counts[name], flush=True)
    total = sum(map(Counter, counts.values()), Counter())
    print(dict(total), "missed:", missed)
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        data = {"rules": len(counts), "outcomes": dict(total), "missed": missed, "seconds": round(time.perf_counter() - started), "by_rule": counts}
        print(record.write("planted_bugs", record.cpu(), record.versions("onnx", "onnxruntime", "numpy"), data))
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
