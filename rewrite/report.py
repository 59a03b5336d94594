"""What a run did: sites, counts, refusals, near misses and times; for people as tables, for programs as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rewrite.registry import Rule


@dataclass
class RuleStats:
    """Counts of one rule. `seconds` includes matching, checking and verification."""

    tier: str
    matches: int = 0
    applied: int = 0
    refusals: int = 0
    seconds: float = 0.0


@dataclass
class Site:
    """One replacement: the rule, the plugin (empty for plain rewrites), the values computed, the nodes replaced.

    `where` is the PyTorch module they came from, if the exporter tells.
    """

    rule: str
    plugin: str
    outputs: list[str]
    nodes: list[str]
    error: float = 0.0
    attributes: dict[str, Any] = field(default_factory=dict)  # of the plugin node, without those left at their defaults
    note: str = ""  # what the site is, in a few words, where that says more than the plugin's name: "causal + padding"
    where: str = ""


def common_scope(scopes: list[str]) -> str:
    """The innermost module that holds all of these (those unknown, "", left aside)."""
    paths = [s.split(".") for s in scopes if s]
    if not paths:
        return ""
    length = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths)))
    return ".".join(paths[0][:length])


def summarize_scopes(scopes: list[str]) -> str:
    """Many modules in short: `encoder.layer.{0-5}.attention` for the six of them."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for scope in scopes:
        parts = scope.split(".")
        template = ".".join("{}" if p.isdigit() else p.replace("{", "").replace("}", "") for p in parts)
        groups.setdefault(template, []).append(tuple(int(p) for p in parts if p.isdigit()))
    texts = []
    for template, numbers in groups.items():
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        texts.append(template.format(*(_ranges(c) for c in columns)))
    return ", ".join(t for t in texts if t)


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return "{" + ",".join("-".join(map(str, p)) for p in parts) + "}"


@dataclass
class NearMiss:
    """Where a rule almost matched: the pattern's part and the graph node at which it stopped, and why."""

    rule: str
    at: str
    part: str
    node: str
    reason: str
    bound: dict[str, str]
    depth: int = 0

    def __str__(self) -> str:
        where = f" at {self.node}" if self.node and self.node != self.at else ""
        return f"{self.rule} at {self.at}: {self.part}{where}: {self.reason}"


@dataclass
class Report:
    """The outcome of `optimize`."""

    rules: dict[str, RuleStats] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    operators_before: dict[str, int] = field(default_factory=dict)
    operators_after: dict[str, int] = field(default_factory=dict)
    plugins: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)  # plugin nodes by attribute: `MatMulAct:gelu`
    verified: bool = False
    model_error: float | None = None
    seconds: float = 0.0
    verify_seconds: float = 0.0

    def start(self, rules: list[Rule]) -> None:
        self.rules = {r.name: RuleStats(r.tier) for r in rules}

    def add(self, site: Site) -> None:
        self.sites.append(site)
        self.rules[site.rule].applied += 1

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
