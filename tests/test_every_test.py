"""Every test can fail by what it finds: none only checks that nothing was raised."""

from __future__ import annotations

import ast
import re
from pathlib import Path

CHECKS = {"raises", "fail", "assert_allclose", "assert_array_equal"}


def checks(node, helpers):
    """Whether an `assert`, `pytest.raises` or a function that has one stands in these lines."""
    return any(
        isinstance(n, ast.Assert) or (isinstance(n, ast.Attribute) and n.attr in CHECKS) or (isinstance(n, ast.Call) and getattr(n.func, "id", "") in helpers) for n in ast.walk(node)
    )


def idle_tests(text):
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    helpers = {f.name for f in functions if not f.name.startswith("test_") and checks(f, set())}
    return [f.name for f in functions if f.name.startswith("test_") and not checks(f, helpers)]


def test_every_test_checks_something():
    found = {file.name: idle_tests(file.read_text()) for file in sorted(Path(__file__).parent.glob("test_*.py"))}
    assert len(found) > 30
    assert {name: tests for name, tests in found.items() if tests} == {}


def test_a_test_that_checks_nothing_is_seen():
    assert idle_tests("def test_it():\n    work()\n") == ["test_it"]
    assert idle_tests("def same(a):\n    assert a\ndef test_it():\n    same(work())\n") == []


def test_every_link_of_the_documents_leads_somewhere():
    root = Path(__file__).parent.parent
    links = [(page, target) for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))) for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())]
    assert len(links) > 20
    assert [f"{page.name}: {target}" for page, target in links if "://" not in target and not (page.parent / target).exists()] == []
