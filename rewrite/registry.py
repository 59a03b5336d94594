"""Rules and plugins: how they are declared, where they are found.

Importing `rewrite` loads none of them. `library()` gathers, in this order: the built-in ones, those of installed
packages (entry point group `rewrite.rules`), and those declared with the decorators in the user's own program.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rewrite import pattern as P
from rewrite.errors import RewriteError

TIERS = ("lift", "fuse", "transform")


@dataclass(frozen=True, eq=False)
class Rule:
    """A pattern, its replacement, and the condition under which the one may stand for the other."""

    name: str
    tier: str
    doc: str
    pattern: tuple[P.Value, ...]
    variables: tuple[str, ...]
    replace: Callable[..., Any]
    check: Callable[..., str | None] | None
    priority: int
    source: str
    roots: frozenset[str]
    required: frozenset[str]
    find: Callable[..., Any] | None = None

    def call(self, function: Callable[..., Any], bindings: Mapping[str, Any], *first: Any) -> Any:
        """Call `check` or `replace` with the bindings it names; variables of untaken alternatives are None."""
        names = list(inspect.signature(function).parameters)[len(first):]
        return function(*first, *(bindings.get(n) for n in names))


@dataclass(frozen=True, eq=False)
class Plugin:
    """An operator with a reference in NumPy: what fused (and lifted) nodes call."""

    name: str
    doc: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    reference: Callable[..., Any]
    tolerance: Mapping[str, tuple[float, float]]
    since: int | None
    sample: Callable[..., Any] | None
    source: str

    @property
    def fused(self) -> bool:
        """Whether nodes of this plugin have kernels of their own; lifted ONNX operators do not."""
        return self.since is None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


_registered_rules: dict[str, Rule] = {}
_registered_plugins: dict[str, Plugin] = {}


def rule(cls: type | None = None, *, tier: str = "fuse", priority: int = 0) -> Any:
    """Declare a fusion rule.

    The class has `pattern(op, x, ...)` and `replace(op, x, ...)`, functions of the same values, and may have
    `check(x, ...)`, which returns None to accept a match or the reason, one line, to refuse it. `check` and
    `replace` name the variables, scalars and attributes they want. Rules of higher `priority` are tried first;
    equals in the order of their declaration. `tier` is "lift", "fuse" or "transform": tiers run in this order.

    Where no pattern can say what to look for, the class has instead `root`, the names of operators, and
    `find(graph, node)`, called with each node of these operators: it returns a `rewrite.matcher.Match`, the reason, one
    line, why there is none, or None where there was nothing to look for.

    Raises RewriteError if the class is incomplete.
    """

    def declare(cls: type) -> Rule:
        where = f"rule {cls.__name__} ({cls.__module__})"
        if tier not in TIERS:
            raise RewriteError(f"{where}: tier {tier!r} is unknown; use one of {', '.join(TIERS)}")
        find = getattr(cls, "find", None)
        for needed in ("replace",) if find is not None else ("pattern", "replace"):
            if not inspect.isfunction(getattr(cls, needed, None)):
                raise RewriteError(f"{where}: it has no function '{needed}(op, ...)'; add one")
        root = getattr(cls, "root", ())
        if find is not None and (hasattr(cls, "pattern") or not isinstance(root, tuple) or not root):
            raise RewriteError(f"{where}: a rule with 'find' has no pattern, but a tuple of operator names 'root'")
        outputs: tuple[P.Value, ...] = ()
        variables: tuple[str, ...] = ()
        try:
            if find is None:
                outputs, variables = P.trace(cls.pattern)  # type: ignore[attr-defined]
        except Exception as error:
            raise RewriteError(f"{where}: its pattern cannot be traced: {error}") from error
        made = Rule(
            name=_snake(cls.__name__),
            tier=tier,
            doc=inspect.getdoc(cls) or "",
            pattern=outputs,
            variables=variables,
            replace=cls.replace,  # type: ignore[attr-defined]
            check=getattr(cls, "check", None),
            priority=priority,
            source=cls.__module__,
            roots=frozenset(P.roots(outputs[0]) if outputs else root),
            required=frozenset().union(*(P.required(o) for o in outputs)),
            find=find,
        )
        _registered_rules[made.name] = made
        return made

    return declare if cls is None else declare(cls)


def plugin(cls: type) -> Plugin:
    """Declare a plugin: an operator that fused nodes call.

    The class has `inputs` and `outputs` (names; a trailing "?" marks an optional input), `attributes` (names and
    defaults), `reference(*inputs, **attributes)` on NumPy arrays (an absent input is None), and `tolerance`, by
    dtype: (relative, absolute) difference that a correct kernel may show. Optional: `sample(rng, name, shape, dtype)`
    makes an input for the check of a fused site, or returns None for the default; `since` is the opset from which
    ONNX itself has the operator.

    Raises RewriteError if the class is incomplete.
    """
    where = f"plugin {cls.__name__} ({cls.__module__})"
    for needed in ("inputs", "reference", "tolerance"):
        if not hasattr(cls, needed):
            raise RewriteError(f"{where}: it has no '{needed}'; add one")
    if "_" in cls.__name__:
        raise RewriteError(f"{where}: the name may not contain '_', which separates variants; use CamelCase")
    made = Plugin(
        name=cls.__name__,
        doc=inspect.getdoc(cls) or "",
        inputs=tuple(cls.inputs),  # type: ignore[attr-defined]
        outputs=tuple(getattr(cls, "outputs", ("y",))),
        attributes=dict(getattr(cls, "attributes", {})),
        reference=cls.reference,  # type: ignore[attr-defined]
        tolerance=dict(cls.tolerance),  # type: ignore[attr-defined]
        since=getattr(cls, "since", None),
        sample=getattr(cls, "sample", None),
        source=cls.__module__,
    )
    _registered_plugins[made.name] = made
    return made


@dataclass
class Library:
    """The rules, in the order in which they are tried, and the plugins by name."""

    rules: list[Rule] = field(default_factory=list)
    plugins: dict[str, Plugin] = field(default_factory=dict)

    def select(self, names: list[str]) -> Library:
        """Only the named rules. Raises RewriteError for a name that is not there."""
        known = {r.name for r in self.rules}
        for name in names:
            if name not in known:
                raise RewriteError(f"rule '{name}' is unknown; `rewrite list` shows the {len(known)} known ones")
        return Library([r for r in self.rules if r.name in names], self.plugins)


@cache
def _load_builtin() -> None:
    for package in ("rewrite.plugins", "rewrite.patterns"):
        module = importlib.import_module(package)
        for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda i: i.name):
            importlib.import_module(f"{package}.{info.name}")


@cache
def _load_entry_points() -> None:
    for entry in importlib.metadata.entry_points(group="rewrite.rules"):
        try:
            entry.load()
        except Exception as error:
            raise RewriteError(f"entry point {entry.name} = {entry.value} (group rewrite.rules) fails: {error}") from error


def load_rules_file(path: str | Path) -> ModuleType:
    """Import a user's Python file of rules and plugins. Raises RewriteError with the file and line if it fails."""
    path = Path(path)
    if not path.is_file():
        raise RewriteError(f"rules file {path}: no such file")
    name = "rewrite_rules_" + re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewriteError(f"rules file {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except RewriteError as error:
        del sys.modules[name]
        raise RewriteError(f"rules file {path}: {error}") from error
    except Exception as error:
        del sys.modules[name]
        line = _line_in(path, error)
        raise RewriteError(f"rules file {path}, line {line}: {type(error).__name__}: {error}") from error
    return module


def _line_in(path: Path, error: Exception) -> int | str:
    if isinstance(error, SyntaxError):
        return error.lineno or "?"
    line: int | str = "?"
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def library(files: list[str | Path] | None = None) -> Library:
    """All known rules and plugins, those of `files` included."""
    _load_builtin()
    _load_entry_points()
    for file in files or ():
        load_rules_file(file)
    order = {tier: i for i, tier in enumerate(TIERS)}
    rules = sorted(_registered_rules.values(), key=lambda r: (order[r.tier], -r.priority))
    return Library(rules, dict(_registered_plugins))
