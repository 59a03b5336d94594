"""What a run did: sites, counts, refusals, near misses and times; for people as tables, for programs as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rewrite.registry import Rule


@dataclass
class RuleStats:
    """Counts of one rule: where the pattern fits (`matches`), where `check` refuses, where the replacement is rejected
    because it is not what it replaces. `seconds` includes matching, checking and verification."""

    tier: str
    matches: int = 0
    applied: int = 0
    refusals: int = 0
    rejected: int = 0
    seconds: float = 0.0


@dataclass
class Site:
    """One replacement: the rule, the plugin (empty for plain rewrites), the values computed, the nodes replaced.

    `where` is the PyTorch module they came from, if the exporter tells. `reduced`: for the check, its sizes over 256 were
    divided by this (the weights are very large); 1 if it was checked at its own sizes.
    """

    rule: str
    plugin: str
    outputs: list[str]
    nodes: list[str]
    error: float = 0.0
    attributes: dict[str, Any] = field(default_factory=dict)  # of the plugin node, without those left at their defaults
    note: str = ""  # what the site is, in a few words, where that says more than the plugin's name: "causal + padding"
    where: str = ""
    reduced: int = 1


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
        found = [int(p) if p.isdecimal() and len(p) < 10 else None for p in parts]
        template = ".".join("{}" if n is not None else p.replace("{", "").replace("}", "") for p, n in zip(parts, found, strict=True))
        groups.setdefault(template, []).append(tuple(n for n in found if n is not None))
    texts = []
    for template, numbers in groups.items():
        columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        texts.append(template.format(*(_ranges(c) for c in columns)))
    return ", ".join(t for t in texts if t)


def largest_error(sites: list[Site]) -> str:
    """The largest difference seen at these sites, and whether their sizes were reduced to check them: `1.5e-05 at sizes / 64`."""
    factors = sorted({s.reduced for s in sites} - {1})
    of = " (some)" if factors and any(s.reduced == 1 for s in sites) else ""
    return f"{max(s.error for s in sites):.1e}" + (f" at sizes / {'-'.join(map(str, dict.fromkeys((factors[0], factors[-1]))))}{of}" if factors else "")


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
    """Where a rule almost matched: the pattern's part and the graph node at which it stopped, and why.

    `part` is "check" where the pattern fits and the rule's check refuses, "replacement" where the replacement was found
    not to compute the same, "outrun" where another rule took the nodes before. `depth` operators were matched of the `size` that the pattern has at least: the nodes `covered`.
    """

    rule: str
    at: str
    part: str
    node: str
    reason: str
    bound: dict[str, str]
    depth: float = 0
    size: int = 1
    covered: list[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """The whole pattern is there."""
        return self.part in ("check", "replacement", "outrun")

    @property
    def nearness(self) -> float:
        """Which part of the pattern is there: 0 to 1, and 2 if it fits."""
        return 2.0 if self.fits else min(self.depth / max(self.size, 1), 1.0)

    @property
    def rank(self) -> tuple[float, float]:
        """The greater the nearer, among the misses of patterns of all sizes."""
        return self.nearness, self.depth

    def why(self) -> str:
        """The reason, for people."""
        if self.part == "check":
            return f"the pattern fits, but {self.reason}"
        if self.part == "replacement":
            return f"REJECTED: {self.reason}"
        if self.part == "outrun":
            return f"the pattern fits, but {self.reason}"
        where = f"at {self.node}: " if self.node and self.node != self.at else ""
        return f"{where}{self.reason} ({int(self.depth)} of at least {self.size} operators found)"

    def there(self) -> str:
        """The part of the pattern that is there: the nodes found, and what its variables stand for."""
        named = ", ".join(f"{name} = {value}" for name, value in self.bound.items())
        return "; ".join(filter(None, (", ".join(self.covered), named)))

    def __str__(self) -> str:
        return f"{self.rule} at {self.at}: {self.why()}"


@dataclass
class Report:
    """The outcome of `optimize`.

    `verified`: each site was checked. `model_error`: the largest relative difference of the whole model's outputs; None
    if it was not run (`not_run` tells why, if not for unknown operators). `unknown`: operators that neither ONNX, ONNX Runtime nor the model defines, with their nodes.
    """

    rules: dict[str, RuleStats] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    outrun: list[NearMiss] = field(default_factory=list)  # where a rule fits, too, but another took the nodes; noted only when explaining
    _misses: dict[tuple[str, str], NearMiss] = field(default_factory=dict)
    operators_before: dict[str, int] = field(default_factory=dict)
    operators_after: dict[str, int] = field(default_factory=dict)
    plugins: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)  # plugin nodes by attribute: `MatMulAct:gelu`
    unknown: dict[str, list[str]] = field(default_factory=dict)
    verified: bool = False
    model_error: float | None = None
    not_run: str = ""  # why the model as a whole was not run
    generator: dict[str, Any] | None = None  # what the model says of itself, if it became a generator
    shards: str = ""  # of a model that was split over ranks, what each of them has
    whole: list[str] = field(default_factory=list)  # and what stays whole on each, with the reason
    seconds: float = 0.0
    verify_seconds: float = 0.0

    def start(self, rules: list[Rule]) -> None:
        self.rules = {r.name: RuleStats(r.tier) for r in rules}

    @property
    def rejected(self) -> list[NearMiss]:
        """Where a rule fits, but its replacement was found not to compute the same."""
        return [m for m in self.near_misses if m.part == "replacement"]

    def missed(self, miss: NearMiss) -> None:
        """Enter a near miss; of a node visited again what came nearer stays: a weaker rule may have taken the nodes above it since."""
        before = self._misses.get((miss.rule, miss.at))
        if before is None or miss.rank >= before.rank:
            self._misses[miss.rule, miss.at] = miss

    @property
    def attempts(self) -> list[NearMiss]:
        """Every place where a rule came near, nearest first, and how near at most; also where another rule took the node."""
        return sorted(self._unmatched() + self.outrun, key=lambda m: m.rank, reverse=True)

    @property
    def near_misses(self) -> list[NearMiss]:
        """Every place where a rule came near, and how near at most. Where another rule took the node, only rejections are left."""
        taken = {n for s in self.sites for n in s.nodes}
        return [m for m in self._unmatched() if m.part == "replacement" or m.at not in taken]

    def _unmatched(self) -> list[NearMiss]:
        """The near misses but those at nodes that their own rule took after all."""
        matched = {(s.rule, n) for s in self.sites for n in s.nodes}
        return [m for m in self._misses.values() if (m.rule, m.at) not in matched]

    def add(self, site: Site) -> None:
        self.sites.append(site)
        self.rules[site.rule].applied += 1

    def take(self, later: Report) -> None:
        """Enter what rules of another tier did afterwards, to the result of this run."""
        self.sites += later.sites
        self.rules |= later.rules
        self._misses |= later._misses
        self.verify_seconds += later.verify_seconds

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data, for `json.dumps`."""
        found = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        return {**found, "near_misses": [asdict(m) for m in self.near_misses]}
