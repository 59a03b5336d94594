"""Which node to visit next, with which rules: ordered by priority, then by place in the graph.

A node waits only for rules that may match there, as its operator and those that compute its inputs tell: asked once for
all layers, and again when an input has changed. After a change only nodes that the change can matter to are visited again:
its readers, and those downstream that are the root of a rule which has the new operator so far below its root. So no
change costs a scan of the graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from rewrite import pattern as P
from rewrite.graph import WIDE, Graph
from rewrite.nodes import Node
from rewrite.outlook import may_match
from rewrite.registry import Rule

SLACK = 2  # nodes that change nothing, which a match may look through between two operators of its pattern


class Worklist:
    """The (node, rules) pairs of one graph that are still to be tried."""

    def __init__(self, graph: Graph, rules: Iterable[Rule], everything: bool = False):
        """`everything`: also rules that cannot match, where it is of interest how near they come."""
        self.graph, self._everything = graph, everything
        self._groups: dict[str, dict[int, list[Rule]]] = {}  # by operator of the root and level: the lower the sooner
        self._mentions: dict[str, list[tuple[int, int, frozenset[str]]]] = {}  # operator -> (height, level, roots) of rules
        for rule in rules:
            for op in rule.roots:
                self._groups.setdefault(op, {}).setdefault(-rule.priority, []).append(rule)
            height = max(map(P.height, rule.pattern), default=1)
            for op in set().union(*(P.operators(o) for o in rule.pattern)):
                self._mentions.setdefault(op, []).append((height + SLACK, -rule.priority, rule.roots))
        self._hopeful: dict[Any, list[tuple[int, list[Rule]]]] = {}  # those that may match, by the operators at a node and its inputs
        self._queue: list[tuple[int, float, int, Node]] = []  # a heap
        self._waiting: dict[tuple[int, int], list[Rule]] = {}  # by level and node
        self._ticket = 0
        self._blocked: list[Node] = []
        self._changed = False
        for node in graph if self._groups else ():
            if node.canonical in self._groups:
                self._enter(node)
        self._first, self._queue = sorted(self._queue, reverse=True), []  # taken from the end: no heap is needed for what is known beforehand

    def push(self, node: Node) -> None:
        """Try the rules at a node again, now that its inputs have changed: those that may match there now."""
        for level in self._groups.get(node.canonical, ()):
            if (level, id(node)) in self._waiting:
                self._waiting[level, id(node)] = []
        self._enter(node)

    def _enter(self, node: Node, levels: Collection[int] | None = None) -> None:
        """Let the rules that may match at a node, the root of some, wait for it: those of all levels, or of some."""
        if node.graph is not self.graph:
            return
        # A value of an outer graph counts as computed here: then rules are tried that do not match, and none is left out.
        if len(node.inputs) > WIDE:  # what computes them is not looked at, for each may change, and all would be looked at each time
            hopeful = list(self._groups[node.canonical].items())
        else:
            around = (node.canonical, *[t.inputs[0].canonical if t.inputs else None for t in node.inputs])
            if around not in self._hopeful:
                self._hopeful[around] = self._choose(around)
            hopeful = self._hopeful[around]
        for level, rules in hopeful:
            if levels is None or level in levels:
                where = (level, id(node))
                if where not in self._waiting:
                    self._ticket += 1
                    heapq.heappush(self._queue, (level, node.position, self._ticket, node))
                self._waiting[where] = rules

    def _choose(self, around: tuple[Any, ...]) -> list[tuple[int, list[Rule]]]:
        """The rules, by level, that may match at a node of this operator with these at its inputs (None: no operator)."""
        op, above = str(around[0]), around[1:]
        found = [(level, [r for r in rules if self._everything or may_match(r, op, above)]) for level, rules in self._groups[op].items()]
        return [(level, rules) for level, rules in found if rules]

    def __iter__(self) -> Iterator[tuple[Node, list[Rule]]]:
        first, queue = self._first, self._queue
        while first or queue or self._unblock():
            level, _, _, node = first.pop() if first and not (queue and queue[0] < first[-1]) else heapq.heappop(queue)
            rules = self._waiting.pop((level, id(node)))
            if node.graph is self.graph:
                yield node, rules

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
            if node.canonical in self._groups:
                self.push(node)
        for node in changed:
            if node.canonical in self._mentions:
                self._climb(node)

    def _climb(self, start: Node) -> None:
        rules = self._mentions[start.canonical]
        front, seen = [start], {id(start)}
        for distance in range(1, max(height for height, _, _ in rules)):
            front = [u for n in front for t in n.outputs for u in self.graph.consumers(t) if id(u) not in seen]
            seen.update(map(id, front))
            for node in front:
                levels = [level for height, level, roots in rules if distance < height and node.canonical in roots]
                if levels:
                    self._enter(node, levels)
