"""The rules and plugins as a page for people: `rewrite list --markdown`, which is docs/rules.md."""

from __future__ import annotations

from collections import Counter

from rewrite import pattern as P
from rewrite.registry import Library, Plugin, Rule

INFIX = {"Add": (" + ", 1), "Sub": (" - ", 1), "Mul": (" * ", 2), "Div": (" / ", 2), "MatMul": (" @ ", 2)}
LETTERS = "stuvabcdefghijklmnopqrwxyz"

INTRODUCTION = """# Rules and plugins

Written by `rewrite list --markdown`; a test keeps it up to date. Rules are tried tier by tier, in each tier by falling
priority. A pattern's lines read like the maths: `|` separates alternatives, `Cast?(x)` may be absent, `+` and `*`
stand for every operand order and bracketing, and a division by a constant counts as a product.
"""


class Formula:
    """A pattern in lines: values used twice and alternatives get lines of their own."""

    def __init__(self, outputs: tuple[P.Value, ...]):
        self.uses: Counter[int] = Counter()
        self.taken = {v.name for o in outputs for v in P.walk(o) if isinstance(v, (P.Var, P.Scalar))}
        self.names: dict[str, str] = {}  # by what the value is: equal parts share a line
        self.pending: list[P.Value] = []
        seen: set[int] = set()
        for output in outputs:
            self._count(output, seen)
        self.lines: list[str] = []
        targets = ["y"] if len(outputs) == 1 else [f"y{i}" for i in range(len(outputs))]
        for target, output in zip(targets, outputs, strict=True):
            self._line(target, output)
        while self.pending:
            value = self.pending.pop(0)
            self._line(self.names[P.text(value)], value)

    def _count(self, value: P.Value, seen: set[int]) -> None:
        self.uses[id(value)] += 1
        if id(value) in seen:
            return
        seen.add(id(value))
        for inner in _below(value):
            self._count(inner, seen)

    def _line(self, name: str, value: P.Value) -> None:
        value = value.value if isinstance(value, P.Tag) else value
        alternatives = value.alternatives if isinstance(value, P.AnyOf) and not _is_optional(value) else (value,)
        texts = list(dict.fromkeys(self._expand(a, 0) for a in alternatives))
        self.lines.append(f"{name} = {texts[0]}")
        self.lines += [" " * len(name) + f" | {t}" for t in texts[1:]]

    def _text(self, value: P.Value, binding: int) -> str:
        """A reference to a value: in place, or by the name of its own line."""
        if isinstance(value, P.Tag):
            return self._text(value.value, binding)
        shared = isinstance(value, P.Op) and self.uses[id(value)] > 1
        if shared or (isinstance(value, P.AnyOf) and not _is_optional(value)):
            if P.text(value) not in self.names:
                self.names[P.text(value)] = self._fresh()
                self.pending.append(value)
            return self.names[P.text(value)]
        return self._expand(value, binding)

    def _fresh(self) -> str:
        names = (f"{c}{n}" for n in ["", *range(1, 100)] for c in LETTERS)
        name = next(n for n in names if n not in self.taken and n != "y")
        self.taken.add(name)
        return name

    def _expand(self, value: P.Value, binding: int) -> str:
        if isinstance(value, P.Tag):
            return self._expand(value.value, binding)
        if isinstance(value, P.Output):
            return f"{self._text(value.node, 3)}[{value.index}]"
        if isinstance(value, P.AnyOf) and _is_optional(value):
            operator = value.alternatives[0]
            assert isinstance(operator, P.Op)
            return f"{operator.name}?({self._text(operator.inputs[0], 0)})"
        if not isinstance(value, P.Op):
            return self._text(value, binding) if isinstance(value, P.AnyOf) else P.text(value)
        if value.name in INFIX and len(value.inputs) > 1:
            sign, strength = INFIX[value.name]
            text = sign.join(self._text(i, strength + (k > 0 and value.name in ("Sub", "Div", "MatMul"))) for k, i in enumerate(value.inputs))
            return f"({text})" if strength < binding else text
        if value.name == "Neg":
            return f"-{self._text(value.inputs[0], 3)}"
        attributes = [f"{k}={_attribute(v)}" for k, v in value.attributes.items()]
        return f"{value.name}({', '.join([self._text(i, 0) for i in value.inputs] + attributes)})"


def _attribute(wanted: object) -> str:
    if isinstance(wanted, P.Attr):
        return wanted.name
    return getattr(wanted, "__name__", str(wanted)).strip("_")


def _below(value: P.Value) -> tuple[P.Value, ...]:
    if isinstance(value, P.Op):
        return value.inputs
    if isinstance(value, P.AnyOf):
        return value.alternatives
    return (value.value,) if isinstance(value, P.Tag) else (value.node,) if isinstance(value, P.Output) else ()


def _is_optional(value: P.AnyOf) -> bool:
    first = value.alternatives[0]
    return len(value.alternatives) == 2 and isinstance(first, P.Op) and len(first.inputs) == 1 and first.inputs[0] is value.alternatives[1]


def _rule(rule: Rule) -> list[str]:
    lines = [f"### {rule.name}", "", rule.doc, "", f"Tier {rule.tier}, priority {rule.priority}, `{_file(rule.source)}`.", ""]
    if rule.find is not None:
        lines += ["It has no pattern: a function of its own finds where it applies.", ""]
    else:
        lines += ["```", *Formula(rule.pattern).lines, "```", ""]
    return lines


def _plugin(plugin: Plugin) -> list[str]:
    attributes = ", ".join(f"{k}={v}" for k, v in plugin.attributes.items())
    tolerance = ", ".join(f"{k} {relative:g}" for k, (relative, _) in plugin.tolerance.items())
    kind = f"ONNX has it from opset {plugin.since} on" if plugin.since else "with kernels of its own"
    call = f"{', '.join(plugin.outputs)} = {plugin.name}({', '.join(plugin.inputs)}{'; ' + attributes if attributes else ''})"
    return [f"### {plugin.name}", "", plugin.doc, "", f"`{_file(plugin.source)}`, {kind}; relative tolerance: {tolerance}.", "", "```", call, "```", ""]


def _file(module: str) -> str:
    """Where a module of the package lies in the repository: `rewrite.patterns.x` in `patterns/x.py`."""
    return module.removeprefix("rewrite.").replace(".", "/") + ".py"


def markdown(library: Library) -> str:
    """The page: every rule with its tier, priority, pattern and file, then every plugin."""
    lines = [INTRODUCTION]
    for tier in dict.fromkeys(r.tier for r in library.rules):
        lines += [f"## Rules of the tier {tier}", ""]
        lines += [line for r in library.rules if r.tier == tier for line in _rule(r)]
    lines += ["## Plugins", ""]
    lines += [line for p in sorted(library.plugins.values(), key=lambda p: p.name) for line in _plugin(p)]
    return "\n".join(lines).rstrip() + "\n"
