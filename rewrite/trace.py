"""How near a rule comes at a node at which it does not match."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass
class Trace:
    """How far the best attempt of a rule came at one node: operators matched, and what stopped it there."""

    depth: float = -1
    reason: str = ""
    node: str = ""
    part: str = ""
    bound: dict[str, str] = field(default_factory=dict)
    covered: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)  # operators any of which would have led on, at the same node

    def unexpected(self, depth: int, op: str, node: str, found: str, bound: dict[str, str], covered: list[str]) -> None:
        """Another operator than the pattern has stands there."""
        if depth == self.depth and self.expected and node == self.node:
            if op not in self.expected:
                self.expected.append(op)
        elif depth > self.depth:
            self.stop(depth, op, node, "", bound, covered)
            self.expected = [op]
        else:
            return
        self.reason = f"expected {' or '.join(self.expected)}, found {found}"

    def stop(self, depth: float, part: str, node: str, reason: str, bound: dict[str, str], covered: list[str]) -> None:
        if depth > self.depth:
            self.depth, self.part, self.node, self.reason, self.bound, self.covered, self.expected = depth, part, node, reason, bound, covered, []

    def copy(self) -> Trace:
        return replace(self, expected=list(self.expected))

    def restore(self, noted: Trace) -> None:
        self.__dict__.update(noted.copy().__dict__)
