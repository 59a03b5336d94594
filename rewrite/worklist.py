"""Which node to visit next, with which rules: ordered by priority, then by place in the graph.

After a change only nodes that the change can matter to are visited again: its readers, and those downstream that are
the root of a rule which has the new operator so far below its root. So no change costs a scan of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from rewrite import pattern as P
from rewrite.graph import Graph, canonical
from rewrite.nodes import Node
from rewrite.registry import Rule

SLACK = 2  # nodes that change nothing, which a match may look through between two operators of its pattern


class Worklist:
    """The (node, rules) pairs of one graph that are still to be tried."""

    def __init__(self, graph: Graph, rules: Iterable[Rule]):
        self.graph = graph
        self._groups: dict[tuple[int, str], list[Rule]] = {}
        self._levels: dict[str, list[int]] = {}
        self._mentions: dict[str, list[tuple[int, int, frozenset[str]]]] = {}  # operator -> (height, level, roots) of rules
        for rule in rules:
            for op in rule.roots:
                self._groups.setdefault((-rule.priority, op), []).append(rule)
            height = max(map(P.height, rule.pattern), default=1)
            for op in set().union(*(P.operators(o) for o in rule.pattern)):
                self._mentions.setdefault(op, []).append((height + SLACK, -rule.priority, rule.roots))
        for level, op in self._groups:
            self._levels.setdefault(op, []).append(level)
        self._queue: list[tuple[int, float, int, Node]] = []
        self._waiting: set[tuple[int, int]] = set()
        self._ticket = 0
        self._blocked: list[Node] = []
        self._changed = False
        for node in graph:
            self.push(node)

    def push(self, node: Node) -> None:
        """Try all rules at a node (again)."""
        for level in self._levels.get(canonical(node), ()):
            self._enter(level, node)

    def _enter(self, level: int, node: Node) -> None:
        if (level, id(node)) in self._waiting or node.graph is not self.graph:
            return
        self._waiting.add((level, id(node)))
        self._ticket += 1
        heapq.heappush(self._queue, (level, node.position, self._ticket, node))

    def __iter__(self) -> Iterator[tuple[Node, list[Rule]]]:
        while self._queue or self._unblock():
            level, _, _, node = heapq.heappop(self._queue)
            self._waiting.discard((level, id(node)))
            if node.graph is self.graph:
                yield node, self._groups.get((level, canonical(node)), [])

    def block(self, node: Node) -> None:
        """A rule fits at `node` but for another reader of a value inside: worth a second look once readers are gone."""
        self._blocked.append(node)

    def _unblock(self) -> bool:
        if not self._changed:
            return False
        self._changed = False
        blocked, self._blocked = self._blocked, []
        for node in blocked:
            self.push(node)
        return bool(self._queue)

    def revisit(self, touched: list[Node], changed: list[Node]) -> None:
        """`touched` nodes read something new; `changed` ones are new, or compute what a pattern may now find below."""
        self._changed = True
        for node in touched:
            self.push(node)
        for node in changed:
            self._climb(node)

    def _climb(self, start: Node) -> None:
        rules = self._mentions.get(canonical(start), ())
        front, seen = [start], {id(start)}
        for distance in range(1, max((height for height, _, _ in rules), default=0)):
            front = [u for n in front for t in n.outputs for u in self.graph.consumers(t) if id(u) not in seen]
            seen.update(map(id, front))
            for node in front:
                op = canonical(node)
                for height, level, roots in rules:
                    if distance < height and op in roots:
                        self._enter(level, node)
