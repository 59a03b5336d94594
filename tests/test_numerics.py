"""`--bitwise`, and same bytes from the same input: under any hash seed, and when optimized twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import nodes, parse
from random_graphs import make_case, session

import rewrite
from rewrite.cli import main
from rewrite.registry import library
from rewrite.verify import same_bits

BOTH = """(float[b, s, 8] x) => (float[b, s, 8] y, float[b, s, 2, 4] z) {
    one = Constant<value_float = 1.0>()  f = Mul(x, one)
    s = Sigmoid(f)  y = Mul(f, s)
    n = Shape<start = 0, end = 2>(x)  heads = Constant<value_ints = [2, 4]>()  to = Concat<axis = 0>(n, heads)  z = Reshape(f, to)
}"""


def test_bitwise_keeps_exact_rules_alone():
    free, bound = rewrite.optimize(parse(BOTH), rules=[]), rewrite.optimize(parse(BOTH), rules=[], bitwise=True)
    assert {s.rule for s in free.report.sites} == {"factor_one", "swish_sigmoid", "static_reshape"}
    assert {s.rule for s in bound.report.sites} == {"factor_one", "static_reshape"}
    assert bound.report.model_error == 0.0
    assert nodes(bound.model.proto) == ["Sigmoid", "Mul", "Reshape"]


def test_a_rule_that_is_exact_by_word_only_is_rejected():
    @rewrite.rule(tier="lift", exact=True)
    class AddedTwice:
        def pattern(op, x):
            return (x + 0.1) + 0.2

        def replace(op, x):
            return op.Add(x, op.constant(0.3, x.dtype))

    model = parse("(float[n, 8] x) => (float[n, 8] y) { a = Constant<value_float = 0.1>() b = Constant<value_float = 0.2>() s = Add(x, a) y = Add(s, b) }")
    assert rewrite.optimize(model, rules=[AddedTwice]).report.rules["added_twice"].applied == 1
    result = rewrite.optimize(model, rules=[AddedTwice], bitwise=True)
    assert result.report.rules["added_twice"].rejected == 1
    assert "bit by bit" in result.report.rejected[0].reason


def test_bitwise_on_the_command_line(tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    path.write_bytes(parse(BOTH).SerializeToString())
    assert CliRunner().invoke(main, ["optimize", str(path), "-o", str(out), "--bitwise"]).exit_code == 0
    refused = CliRunner().invoke(main, ["optimize", str(path), "--bitwise", "--no-verify"])
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("seed", range(0, 40))
def test_bitwise_changes_no_bit_of_random_graphs(seed):
    case = make_case(seed)
    from random_graphs import feeds

    after = rewrite.optimize(case.model, rules=[], bitwise=True).model.proto
    for attempt in range(2):
        one, other = (session(m).run(None, feeds(case, attempt)) for m in (case.model, after))
        assert all(map(same_bits, one, other))


def test_same_bits():
    zero = np.zeros(2, np.float32)
    assert same_bits(zero, zero)
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.astype(np.float64))
    assert not same_bits(zero, np.zeros((2, 1), np.float32))
    assert same_bits(zero * np.nan, -(zero * np.nan))
    assert not same_bits(zero, zero + np.float32(1e-45))
    assert same_bits(np.array(["a", "b"]), np.array(["a", "b"]))
    assert not same_bits(np.array(["a", "b"]), np.array(["a", "c"]))
    assert same_bits(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))


def test_the_page_names_the_exact_rules():
    page = (Path(__file__).parent.parent / "docs" / "numerics.md").read_text()
    named = set(re.findall(r"`(\w+)`", page.split("exact rules:")[1]))
    assert named == {r.name for r in library([]).rules if r.exact}


# --- determinism -------------------------------------------------------------------------------------------------------
SCRIPT = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from random_graphs import make_case
import rewrite
for seed in range(30):
    print(hashlib.sha256(rewrite.optimize(make_case(seed).model, rules=[], verify=seed < 3).model.proto.SerializeToString(deterministic=True)).hexdigest())
"""


def test_the_same_bytes_under_five_hash_seeds():
    here, seen = str(Path(__file__).parent), set()
    for seed in ("0", "1", "2", "3", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", SCRIPT, here], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        assert len(done.stdout.split()) == 30
        seen.add(done.stdout)
    assert len(seen) == 1


@pytest.mark.parametrize("part", range(4))
def test_optimized_twice_gives_the_same_bytes(part):
    for seed in range(part, 100, 4):
        model = make_case(seed).model
        once = rewrite.optimize(model, rules=[], verify=False)
        again = rewrite.optimize(once.model.proto, rules=[], verify=False)
        assert [s.rule for s in again.report.sites] == [], seed
        assert again.model.proto.SerializeToString(deterministic=True) == once.model.proto.SerializeToString(deterministic=True)
        for before, after in ((model.graph.input, once.model.proto.graph.input), (model.graph.output, once.model.proto.graph.output)):
            assert [v.SerializeToString() for v in before] == [v.SerializeToString() for v in after]
