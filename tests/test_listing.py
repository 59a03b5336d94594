"""The page of rules: patterns in lines, and docs/rules.md as `rewrite list --markdown` writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rewrite.listing import Formula
from rewrite.pattern import any_of, maybe, scalar, tag, trace


def lines(pattern):
    return Formula(trace(pattern)[0]).lines


def test_a_pattern_reads_like_the_maths():
    assert lines(lambda op, x: 0.5 * x * (1.0 + op.Erf(x / 2.0))) == ["y = 0.5 * x * (1 + Erf(x * 0.5))"]
    assert lines(lambda op, a, b, c: op.Sub(a, op.Sub(b, c))) == ["y = a - (b - c)"]
    assert lines(lambda op, x: op.Concat(op.Neg(x), x + 1.0, axis=-1)) == ["y = Concat(-x, x + 1, axis=-1)"]
    assert lines(lambda op, x: op.Relu(maybe(op.Cast, x))) == ["y = Relu(Cast?(x))"]


def test_alternatives_and_shared_values_get_lines_of_their_own():
    def pattern(op, x, w, b):
        product = op.MatMul(x, w)
        linear = any_of(product + b, product * scalar("c"))
        return any_of(tag(op.Relu(linear), kind="relu"), tag(op.Tanh(linear), kind="tanh"))

    assert lines(pattern) == ["y = Relu(s)", "  | Tanh(s)", "s = t + b", "  | t * c", "t = x @ w"]


def test_the_page_in_docs_is_up_to_date():
    """If this fails: `rewrite list --markdown > docs/rules.md`."""
    page = subprocess.run([sys.executable, "-m", "rewrite.cli", "list", "--markdown"], capture_output=True, text=True, check=True).stdout
    assert (Path(__file__).parent.parent / "docs/rules.md").read_text() == page
    assert page.count("### ") > 30
