"""A plan of a text generator as the model that a scheduler steps: it owns the pool of keys and values."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes  # noqa: F401  gives NumPy the names of its types
import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.all_ranks import AllRanks
from rewrite.runtime.batch import Batch
from rewrite.runtime.communication import Communicator, sent, smallest
from rewrite.runtime.cpu import CpuExecutor
from rewrite.runtime.lookahead import step_by_step
from rewrite.runtime.plan import Plan
from rewrite.runtime.sampling import Row, Sampler, Samples
from rewrite.runtime.told_rows import ARRAYS, pack, unpack

if TYPE_CHECKING:
    from rewrite.runtime.cuda import CudaExecutor
    from rewrite.runtime.cuda_model import CudaModel
    from rewrite.runtime.cuda_ranks import DeviceRanks

Array = np.ndarray[Any, Any]
STOP, STEP, COPY, DECODE, MORE, ENOUGH = range(6)  # what rank 0 tells the others to do; in the middle of a `decode` whether more steps are begun
FIELDS = [f.name for f in dataclasses.fields(Batch)]
PART = 128  # tokens of a part from which it pays that a stage computes one while the next one computes the part before: with 64 it took as long
SHARE = 0.25  # of the free memory of a host, for the keys and values of all its ranks, unless the caller says how much


class PlanModel:
    """Attributes: `block_size` positions a block, `blocks` in the pool, `vocabulary`, `positions` that a text may have (None: no
    limit), `window` in which all layers look back (None: some see everything).

    Logits are NumPy arrays, on the GPU CuPy arrays (float32, good until the next step, on the stream of `device`); `sampler` is
    the one that takes them. On the GPU `decode` keeps the tokens of several steps on the device.

    Of a plan for several ranks it is all of them, in turn (on the CPU), or with a `communicator` one: rank 0 steps and copies, and `stop`s
    at the end; the others `follow`. With `only` it is that rank on a GPU without the others, whose sums are zero: to time its kernels.

    tokens, sequences: the most of a step; on the GPU memory for them is kept before keys and values get theirs.

    Raises RewriteError if the plan is no generator, or `memory` (bytes, of each rank) holds no block.
    """

    def __init__(self, plan: Plan, memory: int | None = None, communicator: Communicator | None = None, tokens: int = 256, sequences: int = 64, only: int | None = None):
        found = plan.manifest.generator
        if found is None:
            raise RewriteError(f"{plan.directory}: not a text generator; make one with `rewrite optimize --generate` and `rewrite build`")
        self.plan, self.found, self.communicator = plan, found, communicator
        self.rank = communicator.rank if communicator is not None else only or 0
        alone = plan.manifest.world == 1 or communicator is not None or only is not None
        self.ranks = [self.rank] if alone else list(range(plan.manifest.world))  # in this process
        if plan.device != "cpu" and not alone:
            raise RewriteError(f"{plan.directory}: on GPUs each of its {(n := plan.manifest.world)} ranks is a process; start them with `mpirun -n {n} rewrite generate ...`")
        self.sampler, self.device = Sampler(), None
        self.others: DeviceRanks | None = None
        try:
            if plan.device == "cpu":
                self.executor = CpuExecutor(plan, self.rank, communicator) if alone else AllRanks(plan)
            else:
                self.device = self._on_device(self._device_executor(plan, communicator, only), found, tokens, sequences)
                self.sampler = self.device.sampler
            self._make_pool(found, memory)
        except (KeyError, TypeError, ValueError) as error:
            raise RewriteError(f"{plan.directory}: its manifest does not say what a generator needs ({type(error).__name__}: {error}); build the plan again") from error
        self._in_place = frozenset(name for caches in self.caches for name in caches)
        self._under_way: Generator[list[Samples], None, None] | None = None  # what `decode` gave last, with other ranks
        self._told: int | None = None  # by rank 0, and not done yet

    def _device_executor(self, plan: Plan, communicator: Communicator | None, only: int | None) -> CudaExecutor:
        from rewrite.runtime.cuda_ranks import lonely_rank, open_rank

        if communicator is None:
            return plan.executor if only is None else lonely_rank(plan, only)  # type: ignore[return-value]
        executor, self.others = open_rank(plan, communicator)
        return executor

    def _on_device(self, executor: CudaExecutor, found: Mapping[str, Any], tokens: int, sequences: int) -> CudaModel:
        from rewrite.runtime.cuda_model import CudaModel

        kinds = {}
        for layer in self._layers(self.rank):
            for name, size in (("key_cache", "size"), ("value_cache", "value_size")):
                kinds[layer[name]] = ((int(found["block_size"]), layer["kv_heads"], layer[size]), layer["dtype"])
        return CudaModel(executor, int(found["vocabulary"]), int(found["block_size"]), kinds, tokens, sequences)

    def _layers(self, rank: int) -> list[dict[str, Any]]:
        """The layers of a rank's stage."""
        return [layer for layer in self.found["layers"] if layer.get("stage", 0) == rank // self.plan.manifest.ranks_of_stage]

    def _make_pool(self, found: Mapping[str, Any], memory: int | None) -> None:
        self.block_size, self.vocabulary = int(found["block_size"]), int(found["vocabulary"])
        self.positions: int | None = found["positions"]
        windows = [int(layer["window"]) for layer in found["layers"]]
        self.window = max(windows) if all(windows) else None
        mine = [self._layers(rank) for rank in self.ranks]
        sizes = [layer["kv_heads"] * (layer["size"] + layer["value_size"]) * np.dtype(layer["dtype"]).itemsize for layers in mine for layer in layers]
        self.block_bytes = max(self.block_size * sum(sizes), 1)  # a stage may be without attention
        if memory is None:
            memory = self.device.free_memory() if self.device is not None else int(SHARE * free_memory()) // self._sharers()
        addressed = (2**31 - 1) // self.block_size  # slots are int32
        self.blocks = min(memory // self.block_bytes, addressed)
        if self.communicator is not None:
            self.blocks = smallest(self.communicator, self.blocks)
        if self.blocks < 1:
            raise RewriteError(f"{self.plan.directory}: a block of keys and values takes {self.block_bytes} bytes, and there are {memory} (--kv-memory); give more")
        self.caches: list[dict[str, Array]] = [{} for _ in self.ranks]
        if self.device is not None:
            self.device.open(self.blocks)
            self.caches = [self.device.caches]
            return
        for caches, layers in zip(self.caches, mine, strict=True):
            for layer in layers:
                shape = (self.blocks, self.block_size, layer["kv_heads"])
                try:
                    caches[layer["key_cache"]] = np.zeros((*shape, layer["size"]), layer["dtype"])
                    caches[layer["value_cache"]] = np.zeros((*shape, layer["value_size"]), layer["dtype"])
                except MemoryError as error:
                    needed, most = self.blocks * self.block_bytes / 2**20, f", all that can be addressed of the {memory / 2**20:.0f} MiB asked for" * (self.blocks == addressed)
                    raise RewriteError(f"{self.plan.directory}: there is no room for {needed:.0f} MiB of keys and values{most}; give less with --kv-memory") from error

    def _sharers(self) -> int:
        """How many ranks have the memory of this host together."""
        if self.communicator is None:
            return len(self.ranks)
        hosts = self.communicator.exchange(socket.gethostname().encode()[:64].ljust(64))
        return hosts.count(hosts[self.rank])

    def step(self, batch: Batch) -> Any:
        """Store the keys and values of the batch's tokens; returns float32 [R, vocabulary], the logits of its rows."""
        self._tell(STEP, self._batch_arrays(batch))
        return self._step(batch)

    def decode(self, batch: Batch, rows: list[Row], count: int, more: Callable[[], bool]) -> Generator[list[Samples], None, None]:
        """Several steps; see `requests.Decoder`."""
        if self.device is None or not self.device.decodes(batch, rows, count):
            return step_by_step(self.step, self.sampler, batch, rows, count, more, self.block_size)
        if self.communicator is None:
            return self.device.decode(batch, rows, count, more)
        self._under_way = self._decode_together(batch, rows, count, more)
        return self._under_way

    def _decode_together(self, batch: Batch, rows: list[Row], count: int, more: Callable[[], bool]) -> Generator[list[Samples], None, None]:
        """The same on all ranks. Nothing has to be done where it is given up: what was begun all have begun, and the next that the others are told ends it."""
        assert self.device is not None

        def goes_on() -> bool:
            answer = more()
            self._tell(MORE if answer else ENOUGH)
            return answer

        self._tell(DECODE, [*self._batch_arrays(batch), *pack(rows), np.array([count])])
        yield from self.device.decode(batch, rows, count, goes_on)

    def _batch_arrays(self, batch: Batch) -> list[Array]:
        return [getattr(batch, name) for name in FIELDS]

    def _tell(self, what: int, arrays: Sequence[Array] = ()) -> None:
        """Tell the other ranks what to do, and with what."""
        if self.communicator is None:
            return
        sent(self.communicator, [np.array([what])], 1)
        if arrays:
            sent(self.communicator, arrays, len(arrays))

    def tune(self) -> dict[str, dict[str, float]]:
        """On the GPU, time the kernels that could do each step and use the fastest from now on; microseconds by call and kernel."""
        if self.device is None:
            raise RewriteError(f"{self.plan.directory}: there is nothing to tune on the CPU; load the plan with device='cuda'")
        return self.device.tune()

    def _step(self, batch: Batch) -> Any:
        """In parts, if several stages have enough to do: while one computes a part, the one before is at the next."""
        stages = self.plan.manifest.stages
        parts = batch.parts(stages) if stages > 1 and len(batch.tokens) >= stages * PART else [batch]
        if self.device is not None:
            return self.device.step(batch) if len(parts) == 1 else self.device.step_in_parts(parts, batch.order(parts))
        found = [self._part(part) for part in parts]
        if stages > 1 and self.communicator is not None:
            found = [self._passed(logits, len(part.logit_rows)) for logits, part in zip(found, parts, strict=True)]
        return found[0] if len(parts) == 1 or self.rank else np.concatenate(found)[batch.order(parts)]

    def _part(self, batch: Batch) -> Array:
        """The logits, of a rank that makes none an empty array."""
        feeds = {
            "input_ids": batch.tokens[None],
            "position_ids": batch.positions[None],
            "slots": batch.slots,
            "block_tables": batch.block_tables,
            "query_starts": batch.query_starts,
            "context_lengths": batch.context_lengths,
            "logit_rows": batch.logit_rows,
        }
        given = [{**feeds, **caches} for caches in self.caches]
        if isinstance(self.executor, AllRanks):
            return np.asarray(next(f["logits"] for f in self.executor.run_each(given, self._in_place) if "logits" in f))
        return np.asarray(self.executor.run(given[0], in_place=self._in_place).get("logits", np.empty((0, 0))))

    def _passed(self, logits: Array, rows: int) -> Array:
        """From the first rank of the last stage to rank 0, which chooses tokens."""
        assert self.communicator is not None
        last = self.plan.manifest.world - self.plan.manifest.ranks_of_stage
        if self.rank == last:
            self.communicator.send(logits, 0)
        if self.rank == 0:
            kind = self.plan.manifest.values[self.plan.manifest.outputs["logits"]]
            logits = np.empty((rows, self.vocabulary), kind.numpy)
            self.communicator.receive(logits, last)
        return logits

    def copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy blocks (from, to) in every layer."""
        pairs = list(pairs)
        if pairs:
            self._tell(COPY, [np.array(pairs)])
            self._copy_blocks(pairs)

    def _copy_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        if self.device is not None:
            self.device.copy_blocks(pairs)
            return
        for source, target in pairs:
            for caches in self.caches:
                for cache in caches.values():
                    cache[target] = cache[source]

    def follow(self) -> None:
        """Do what rank 0 does, until it stops."""
        communicator = self.communicator
        assert communicator is not None
        while True:
            what = self._next_command()
            if what == STOP:
                return self._end()
            if what == COPY:
                self._copy_blocks([(int(a), int(b)) for a, b in sent(communicator, None, 1)[0]])
                continue
            arrays = sent(communicator, None, len(FIELDS) + (ARRAYS + 1 if what == DECODE else 0))
            batch = Batch(*arrays[: len(FIELDS)])
            narrow = {name: getattr(batch, name).astype(np.int32) for name in ("slots", "block_tables", "query_starts", "context_lengths")}
            batch = dataclasses.replace(batch, **narrow)
            if what == STEP:
                self._step(batch)
            else:
                assert self.device is not None
                for _ in self.device.decode(batch, unpack(arrays[len(FIELDS) : -1]), int(arrays[-1][0]), self._is_told_more):
                    pass

    def _next_command(self) -> int:
        """What rank 0 tells next, or told already."""
        assert self.communicator is not None
        what, self._told = self._told, None
        return int(sent(self.communicator, None, 1)[0][0]) if what is None else what

    def _is_told_more(self) -> bool:
        """Whether more steps are begun. Whatever else rank 0 tells means that they are not, and is done next."""
        what = self._next_command()
        self._told = None if what in (MORE, ENOUGH) else what
        return what == MORE

    def stop(self) -> None:
        """Of rank 0: let the others go. Nothing can be computed any more."""
        if self._under_way is not None:
            self._under_way.close()  # it holds captured work
        self._tell(STOP)
        self._end()

    def _end(self) -> None:
        """What waits for the other ranks ends, on all at the same time: captured work first, for which NCCL would wait."""
        if self.others is not None and self.device is not None:
            self.device.close()
            self.device.executor.close()
            self.others.close()


def free_memory() -> int:
    """Bytes that can be used without swapping; 4 GiB if the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 4 << 30
