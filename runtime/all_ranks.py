"""All ranks of a plan in one process, in turn: to debug, and to compare a plan for several ranks with its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.communication import summed
from rewrite.runtime.cpu import Array, CpuExecutor

if TYPE_CHECKING:
    from rewrite.runtime.plan import Plan


class AllRanks:
    """An executor of each rank, on the CPU; they take turns from one sum or join to the next."""

    def __init__(self, plan: Plan):
        if plan.device != "cpu":
            raise RewriteError(f"{plan.directory}: it is for {plan.manifest.world} ranks, which run on the CPU yet; use device cpu")
        self.plan = plan
        self.ranks = [CpuExecutor(plan, rank) for rank in range(plan.manifest.world)]
        generator = plan.manifest.generator
        layers = [] if generator is None else generator["layers"]
        self.caches = {layer[k]: layer["kv_heads"] for layer in layers for k in ("key_cache", "value_cache", "keys", "values")}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name. Caches, in and out, hold the heads of all ranks, one rank after the other."""
        count = range(len(self.ranks))
        given = [{n: a[:, :, r * self.caches[n] : (r + 1) * self.caches[n]] if n in self.caches and np.ndim(a) == 4 else a for n, a in inputs.items()} for r in count]
        found = self.run_each(given)
        return {n: np.concatenate([f[n] for f in found], 2) if n in self.caches else a for n, a in found[0].items()}

    def run_each(self, inputs: list[dict[str, Array]], in_place: frozenset[str] = frozenset()) -> list[dict[str, Array]]:
        """The outputs of each rank from its inputs."""
        walks = [executor.walk(given, in_place) for executor, given in zip(self.ranks, inputs, strict=True)]
        found: list[dict[str, Array]] = []
        told: list[Array | None] = [None] * len(walks)
        while True:
            asked: list[tuple[str, Array]] = []
            for walk, answer in zip(walks, told, strict=True):
                try:
                    asked.append(next(walk) if answer is None else walk.send(answer))
                except StopIteration as done:
                    found.append(done.value)
            if found:
                return found
            parts = [x for _, x in asked]
            result = summed(parts) if asked[0][0] == "AllReduce" else np.concatenate(parts, -1)
            told = [result] * len(walks)
