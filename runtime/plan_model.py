"""A plan of a text generator as the model that a scheduler steps: it owns the pool of keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the names of its types
import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.batch import Batch
from rewrite.runtime.cpu import CpuExecutor
from rewrite.runtime.plan import Plan

Array = np.ndarray[Any, Any]
SHARE = 0.25  # of the free memory, for keys and values, unless the caller says how much


class PlanModel:
    """Attributes: `block_size` positions a block, `blocks` in the pool, `vocabulary`, `positions` that a text may have (None: no
    limit), `window` in which all layers look back (None: some see everything).

    Raises RewriteError if the plan is no generator, or `memory` (bytes) holds no block.
    """

    def __init__(self, plan: Plan, memory: int | None = None):
        found = plan.manifest.generator
        if found is None:
            raise RewriteError(f"{plan.directory}: not a text generator; make one with `rewrite optimize --generate` and `rewrite build`")
        if plan.device != "cpu":
            raise RewriteError(f"{plan.directory}: text generation runs on the CPU; device {plan.device} is not supported yet")
        self.plan, self.found, self.executor = plan, found, CpuExecutor(plan)
        try:
            self._make_pool(found, memory)
        except (KeyError, TypeError, ValueError) as error:
            raise RewriteError(f"{plan.directory}: its manifest does not say what a generator needs ({type(error).__name__}: {error}); build the plan again") from error
        self._in_place = frozenset(self.caches)

    def _make_pool(self, found: Mapping[str, Any], memory: int | None) -> None:
        self.block_size, self.vocabulary = int(found["block_size"]), int(found["vocabulary"])
        self.positions: int | None = found["positions"]
        windows = [int(layer["window"]) for layer in found["layers"]]
        self.window = max(windows) if all(windows) else None
        sizes = [(layer["kv_heads"] * (layer["size"] + layer["value_size"])) * np.dtype(layer["dtype"]).itemsize for layer in found["layers"]]
        self.block_bytes = self.block_size * sum(sizes)
        self.blocks = (memory if memory is not None else int(SHARE * free_memory())) // self.block_bytes
        if self.blocks < 1:
            raise RewriteError(f"{self.plan.directory}: a block of keys and values takes {self.block_bytes} bytes, and there are {memory} (--kv-memory); give more")
        self.caches: dict[str, Array] = {}
        for layer in found["layers"]:
            shape = (self.blocks, self.block_size, layer["kv_heads"])
            for name, size in (("key_cache", "size"), ("value_cache", "value_size")):
                try:
                    self.caches[layer[name]] = np.zeros((*shape, layer[size]), layer["dtype"])
                except MemoryError as error:
                    needed = self.blocks * self.block_bytes / 2**20
                    raise RewriteError(f"{self.plan.directory}: there is no room for {needed:.0f} MiB of keys and values; give less with --kv-memory") from error

    def step(self, batch: Batch) -> Array:
        """Store the keys and values of the batch's tokens; returns float32 [R, vocabulary], the logits of its rows."""
        feeds = {
            "input_ids": batch.tokens[None],
            "position_ids": batch.positions[None],
            "slots": batch.slots,
            "block_tables": batch.block_tables,
            "query_starts": batch.query_starts,
            "context_lengths": batch.context_lengths,
            "logit_rows": batch.logit_rows,
        }
        return np.asarray(self.executor.run({**feeds, **self.caches}, in_place=self._in_place)["logits"])

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in every layer."""
        for source, target in pairs:
            for cache in self.caches.values():
                cache[target] = cache[source]


def free_memory() -> int:
    """Bytes that can be used without swapping; 4 GiB if the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30
