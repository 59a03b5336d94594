"""Rules and plugins: how they are declared, where they are found.

Importing `rewrite` loads none of them. A rule is known from where it was declared: built in, in an installed package
(entry point group `rewrite.rules`), in a rules file, or with the decorator in the user's own program. `library()` always
holds the first two; what it adds of the others is said by its caller, so that a rule made for one model never acts on
another unasked. Plugins stay known once declared, because models that call them must run.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from rewrite import pattern as P
from rewrite.errors import RewriteError, blame

TIERS = ("lift", "fuse", "transform")
FILE_MODULE = "rewrite_rules_"  # what the modules of rules files are called


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
    function: Callable[..., Any] | None = None
    find: Callable[..., Any] | None = None
    exact: bool = False  # the replacement gives the same bits, not only the same numbers up to rounding
    forms: tuple[Any, ...] = ()  # of a rule from PyTorch: what each exporter and opset gave

    def __call__(self, op: Any, *values: Any) -> Any:
        """The pattern on other values: a rule's pattern stands inside another rule's."""
        if self.function is None:
            why = "its pattern comes from PyTorch and cannot" if self.forms else "finds its matches itself; it has no pattern that could"
            raise RewriteError(f"rule '{self.name}' {why} stand in another")
        return self.function(op, *values)

    def call(self, function: Callable[..., Any], bindings: Mapping[str, Any], *first: Any) -> Any:
        """Call `check` or `replace` with the bindings it names; variables of untaken alternatives are None."""
        return function(*first, *map(bindings.get, _parameters(function, len(first))))


@cache
def _parameters(function: Callable[..., Any], skipped: int) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[skipped:]


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
    cuda: Callable[..., Any] | None
    merged: Callable[..., Any] | None
    link: Callable[..., Any] | None
    view: Callable[..., Any] | None
    kernels: tuple[str, ...]
    transposable: tuple[str, ...]
    strided: bool
    updates: Mapping[str, str]
    source: str
    operations: Callable[..., int] | None = None
    kinds: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> list[str]:
        """The names of the inputs."""
        return [n.rstrip("?") for n in self.inputs]

    @property
    def fused(self) -> bool:
        """Whether nodes of this plugin have kernels of their own; lifted ONNX operators do not."""
        return self.since is None


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@dataclass
class Source:
    """What one place declared: the built-in rules, the installed packages, a file, the user's program."""

    label: str
    rules: dict[str, Rule] = field(default_factory=dict)
    plugins: dict[str, Plugin] = field(default_factory=dict)


_builtin, _installed, _program = Source("built in"), Source("installed packages"), Source("")
_files: dict[Path, tuple[tuple[int, int], Source]] = {}
_declaring: list[Source] = [_program]


@contextlib.contextmanager
def _declared_in(source: Source) -> Iterator[None]:
    """What the decorators declare meanwhile belongs to `source`."""
    _declaring.append(source)
    try:
        yield
    finally:
        _declaring.pop()


def _origin(module: str) -> str:
    """Where a declaration stands, for people: the file of a rules file, else the module."""
    return _declaring[-1].label if module.startswith(FILE_MODULE) else module


def rule(cls: type | None = None, *, tier: str = "fuse", priority: int = 0, exact: bool = False) -> Any:
    """Declare a fusion rule.

    The class has `pattern(op, x, ...)` and `replace(op, x, ...)`, functions of the same values, and may have
    `check(x, ...)`, which returns None to accept a match or the reason, one line, to refuse it. `check` and
    `replace` name the variables, scalars and attributes they want. Rules of higher `priority` are tried first;
    equals in the order of their declaration. `tier` is "lift", "fuse" or "transform": tiers run in this order. `exact`
    says that the replacement only moves data, or computes the very same bits: such rules alone run under `--bitwise`.

    Where no pattern can say what to look for, the class has instead `root`, the names of operators, and
    `find(graph, node)`, called with each node of these operators: it returns a `rewrite.matcher.Match`, the reason, one
    line, why there is none, or None where there was nothing to look for.

    Raises RewriteError if the class is incomplete.
    """

    def declare(cls: type) -> Rule:
        where = f"rule {cls.__name__} ({_origin(cls.__module__)})"
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
            raise RewriteError(f"{where}: its pattern cannot be traced: {blame(error)}") from error
        if find is None:
            _check_parameters(cls, outputs, variables, where)
        made = Rule(
            name=_snake(cls.__name__),
            tier=tier,
            doc=inspect.getdoc(cls) or "",
            pattern=outputs,
            variables=variables,
            replace=cls.replace,  # type: ignore[attr-defined]
            check=getattr(cls, "check", None),
            priority=priority,
            source=_origin(cls.__module__),
            roots=frozenset(P.roots(outputs[0]) if outputs else root),
            required=frozenset().union(*(P.required(o) for o in outputs)),
            function=getattr(cls, "pattern", None),
            find=find,
            exact=exact,
        )
        _declaring[-1].rules[made.name] = made
        return made

    return declare if cls is None else declare(cls)


def declare(*, name: str, tier: str, doc: str, pattern: tuple[P.Value, ...], variables: tuple[str, ...], replace: Callable[..., Any],
            check: Callable[..., str | None] | None, priority: int, module: str, exact: bool, forms: tuple[Any, ...]) -> Rule:  # fmt: skip
    """Declare a rule whose pattern was derived. Raises RewriteError for an unknown tier or a name that nothing binds."""
    where = f"rule {name} ({_origin(module)})"
    if tier not in TIERS:
        raise RewriteError(f"{where}: tier {tier!r} is unknown; use one of {', '.join(TIERS)}")
    _check_parameters(type(name, (), {"replace": staticmethod(replace)}), pattern, variables, where)
    roots, needed = frozenset(P.roots(pattern[0])), frozenset().union(*(P.required(o) for o in pattern))
    made = Rule(_snake(name), tier, doc, pattern, variables, replace, check, priority, _origin(module), roots, needed, exact=exact, forms=forms)
    _declaring[-1].rules[made.name] = made
    return made


def _check_parameters(cls: type, outputs: tuple[P.Value, ...], variables: tuple[str, ...], where: str) -> None:
    """`check` and `replace` may ask only for what the pattern binds: a misspelled name would be None for ever."""
    bound = {*variables, "output"}.union(*(P.names(o) for o in outputs))
    for function, skipped in (("check", 0), ("replace", 1)):
        if not hasattr(cls, function):
            continue
        for name in list(inspect.signature(getattr(cls, function)).parameters)[skipped:]:
            if name not in bound:
                close = difflib.get_close_matches(name, sorted(bound), 1)
                hint = f"did you mean '{close[0]}'?" if close else f"it binds {', '.join(sorted(bound))}"
                raise RewriteError(f"{where}: '{function}' takes '{name}', which the pattern does not bind; {hint}")


def plugin(cls: type) -> Plugin:
    """Declare a plugin: an operator that fused nodes call.

    The class has `inputs` and `outputs` (names; a trailing "?" marks an optional input), `attributes` (names and
    defaults), `reference(*inputs, **attributes)` on NumPy arrays (an absent input is None), and `tolerance`, by
    dtype: (relative, absolute) difference that a correct kernel may show. Optional: `sample(rng, name, shape, dtype)`
    makes an input for the check of a fused site, or returns None for the default; `cuda(inputs, outputs, **attributes)`,
    on CuPy arrays at fixed addresses, returns a function that enqueues the kernels on the current stream, or None where it
    has none for these types (then the reference runs on the GPU); `strided` = True tells that `cuda` takes inputs and outputs
    that are not packed; `updates` names inputs that `reference` overwrites, and the output that each of them becomes: who needs the
    old values passes copies; `merged(calls, **attributes)` does the same for several calls, (inputs, outputs) each, of one first input;
    `link(inputs, outputs, **attributes)` gives what `plugins/cuda_chain.py` makes chains of, or None;
    `view(y, **attributes)` gives the part of an output that differs, repeated by strides of 0, for readers that are `strided`;
    `transposable` names the matrices that attribute `trans_w` = 1 says are stored the other way round, which the kernels prefer;
    `operations(inputs, outputs, **attributes)`, on shapes (None for an absent input), counts what `rewrite bench` calls operations,
    by default one for each element of the outputs; `kinds` are the names that attributes of its nodes may have (of what a node leaves out,
    none), so that `--expect` knows a misspelled one; `since` is the opset from which ONNX itself has the operator, and `kernels` the
    dtypes for which such a plugin's `cuda` is worth a step of its own in a plan.

    Raises RewriteError if the class is incomplete.
    """
    where = f"plugin {cls.__name__} ({_origin(cls.__module__)})"
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
        cuda=getattr(cls, "cuda", None),
        merged=getattr(cls, "merged", None),
        link=getattr(cls, "link", None),
        view=getattr(cls, "view", None),
        kernels=tuple(getattr(cls, "kernels", ())),
        transposable=tuple(getattr(cls, "transposable", ())),
        strided=bool(getattr(cls, "strided", False)),
        updates=dict(getattr(cls, "updates", {})),
        source=_origin(cls.__module__),
        operations=getattr(cls, "operations", None),
        kinds=tuple(getattr(cls, "kinds", ())),
    )
    try:
        inspect.signature(made.reference).bind(*made.inputs, **made.attributes)
    except TypeError as error:
        raise RewriteError(f"{where}: its reference cannot be called with inputs {list(made.inputs)} and attributes {list(made.attributes)}: {error}") from error
    _declaring[-1].plugins[made.name] = made
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
                raise RewriteError(unknown_rule(name, known))
        return Library([r for r in self.rules if r.name in names], self.plugins)

    def exact(self) -> Library:
        """Only the rules that change no bit."""
        return Library([r for r in self.rules if r.exact], self.plugins)


def unknown_rule(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return f"rule '{name}' is unknown; " + (f"did you mean '{close[0]}'?" if close else f"`rewrite list` shows the {len(names)} known ones")


@cache
def _load_builtin() -> None:
    with _declared_in(_builtin):
        for package in ("rewrite.plugins", "rewrite.patterns"):
            module = importlib.import_module(package)
            for info in sorted(pkgutil.iter_modules(module.__path__), key=lambda i: i.name):
                importlib.import_module(f"{package}.{info.name}")
            _adopt(_builtin, package)


@cache
def _load_entry_points() -> None:
    for entry in importlib.metadata.entry_points(group="rewrite.rules"):
        try:
            with _declared_in(_installed):
                entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "an installed package"
            raise RewriteError(f"rules of {package} (entry point {entry.name} = {entry.value}): {blame(error)}; update or uninstall it") from error
        _adopt(_installed, entry.module)


def _adopt(owner: Source, package: str) -> None:
    """A module that the user's program imported first declared its rules there; they are its owner's all the same."""
    for name in [n for n, r in _program.rules.items() if f"{r.source}.".startswith(f"{package}.")]:
        owner.rules[name] = _program.rules.pop(name)
    for name in [n for n, p in _program.plugins.items() if f"{p.source}.".startswith(f"{package}.")]:
        owner.plugins[name] = _program.plugins.pop(name)


def load_rules_file(path: str | Path) -> Source:
    """Run a user's Python file of rules and plugins. Raises RewriteError with the file and line if it fails."""
    path = Path(path)
    if not os.path.isfile(path):
        raise RewriteError(f"rules file {path}: {'a directory, not a Python file' if os.path.isdir(path) else 'no such file'}")
    state = path.stat()
    version, known = (state.st_mtime_ns, state.st_size), _files.get(path.resolve())
    if known is not None and known[0] == version:
        return known[1]
    name = FILE_MODULE + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RewriteError(f"rules file {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    source = Source(str(path))
    try:
        with _declared_in(source):
            spec.loader.exec_module(module)
    except RewriteError as error:
        del sys.modules[name]
        raise RewriteError(f"rules file {path}: {error}") from error
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RewriteError(f"rules file {path}: {blame(error)}") from error
    if not source.rules and not source.plugins:
        raise RewriteError(f"rules file {path}: it declares neither a rule nor a plugin; decorate a class with @rewrite.rule")
    _files[path.resolve()] = version, source
    return source


def library(sources: Iterable[Rule | ModuleType | str | Path] | None = None) -> Library:
    """The built-in rules and those of installed packages, and those of `sources`: rules, modules, paths of Python files.

    None adds every rule that the program declared with the decorator, an empty list none. Plugins are all there.
    Raises RewriteError for a file that fails, for two rules of one name, and for anything else in `sources`.
    """
    _load_builtin()
    _load_entry_points()
    if isinstance(sources, (str, Path, Rule, ModuleType)):
        raise RewriteError("rules: give a list of rules, modules or paths, also of a single one")
    added = list(_program.rules.values()) if sources is None else [r for s in sources for r in _rules_of(s)]
    rules = {**_builtin.rules}
    for rule in [*_installed.rules.values(), *added]:
        if rules.setdefault(rule.name, rule) is not rule:
            raise RewriteError(f"two rules are called '{rule.name}': of {rules[rule.name].source} and of {rule.source}; rename one class")
    plugins = {**_program.plugins}
    for _, source in _files.values():
        plugins.update(source.plugins)
    for plugin in [*_installed.plugins.values(), *plugins.values()]:
        if plugin.name in _builtin.plugins:
            raise RewriteError(f"plugin {plugin.name} of {plugin.source} has the name of a built-in one; rename the class")
    order = {tier: i for i, tier in enumerate(TIERS)}
    return Library(sorted(rules.values(), key=lambda r: (order[r.tier], -r.priority)), {**_builtin.plugins, **_installed.plugins, **plugins})


def _rules_of(source: Rule | ModuleType | str | Path) -> list[Rule]:
    if isinstance(source, Rule):
        return [source]
    if isinstance(source, ModuleType):
        return [r for r in vars(source).values() if isinstance(r, Rule)]
    if isinstance(source, (str, Path)):
        return list(load_rules_file(source).rules.values())
    hint = "; decorate it with @rewrite.rule" if isinstance(source, type) else ""
    raise RewriteError(f"rules: {source!r} is neither a rule, a module nor the path of a Python file{hint}")
