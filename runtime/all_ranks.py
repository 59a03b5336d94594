"""All ranks of a plan in one process, in turn: to debug, and to compare a plan for several ranks with its model."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.communication import summed
from rewrite.runtime.cpu import Array, CpuExecutor

if TYPE_CHECKING:
    from rewrite.runtime.partition import Step
    from rewrite.runtime.plan import Plan

Walk = Generator[tuple["Step", Array], Array, dict[str, Array]]


class AllRanks:
    """An executor of each rank, on the CPU; those of a stage take turns from one sum or join to the next, the stages follow one another."""

    def __init__(self, plan: Plan):
        if plan.device != "cpu":
            raise RewriteError(f"{plan.directory}: it is for {plan.manifest.world} ranks, which run on the CPU yet; use device cpu")
        self.plan = plan
        self.ranks = [CpuExecutor(plan, rank) for rank in range(plan.manifest.world)]
        generator, self.world = plan.manifest.generator, plan.manifest.ranks_of_stage
        layers = [] if generator is None else generator["layers"]
        self.caches = {layer[k]: layer["kv_heads"] for layer in layers for k in ("key_cache", "value_cache", "keys", "values")}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name. Caches, in and out, hold the heads of all ranks of a stage, one rank after the other."""
        self.plan.check({n: self._part(n, a, 0) for n, a in inputs.items()})
        given = [{n: self._part(n, inputs[n], rank % self.world) for n in executor.inputs} for rank, executor in enumerate(self.ranks)]
        found = self.run_each(given)
        joined: dict[str, Array] = {}
        for first in range(0, len(found), self.world):
            for name, array in found[first].items():
                joined[name] = np.concatenate([f[name] for f in found[first : first + self.world]], 2) if name in self.caches else array
        return joined

    def _part(self, name: str, array: Array, rank: int) -> Array:
        """A rank's part of an input, which is the whole but for a cache."""
        heads = self.caches.get(name)
        return array if heads is None or np.ndim(array) != 4 else array[:, :, rank * heads : (rank + 1) * heads]

    def run_each(self, inputs: list[dict[str, Array]], in_place: frozenset[str] = frozenset()) -> list[dict[str, Array]]:
        """The outputs of each rank from its inputs, one stage after the other."""
        found: list[dict[str, Array]] = []
        messages: dict[tuple[int, int, int], list[Array]] = {}  # on their way, by the stages they go between and the place of their ranks there
        for first in range(0, len(self.ranks), self.world):
            ranks = slice(first, first + self.world)
            walks = [executor.walk(given, in_place) for executor, given in zip(self.ranks[ranks], inputs[ranks], strict=True)]
            found += self._stage(walks, messages)
        return found

    def _stage(self, walks: list[Walk], messages: dict[tuple[int, int, int], list[Array]]) -> list[dict[str, Array]]:
        """The ranks of a stage take turns, from one step that they do together to the next."""
        found: list[dict[str, Array]] = []
        told: list[Array | None] = [None] * len(walks)
        while True:
            asked: list[tuple[Step, Array]] = []
            for walk, answer in zip(walks, told, strict=True):
                try:
                    asked.append(next(walk) if answer is None else walk.send(answer))
                except StopIteration as done:
                    found.append(done.value)
            if found:
                return found
            step, parts = asked[0][0], [x for _, x in asked]
            if step.name in ("Send", "Recv"):
                for place, x in enumerate(parts):
                    between = messages.setdefault((step.attributes["source"], step.attributes["target"], place), [])
                    if step.name == "Send":
                        between.append(x)
                    else:
                        parts[place] = between.pop(0)
                told = list(parts)
            else:
                told = [summed(parts) if step.name == "AllReduce" else np.concatenate(parts, -1)] * len(walks)
