"""Steps over a paged cache for the CUDA kernels of PagedAttention, and what float64 makes of them: on the CPU (emulated) and on a GPU alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from rewrite.plugins.norms import RMSNormalization
from rewrite.plugins.paged_attention import PagedAttention
from rewrite.plugins.rotary import Rotary

LIMITS = {"float16": 2e-3, "bfloat16": 1.2e-2, "float32": 5e-6}  # ||got - want|| / ||want||
EPSILON = 1e-5


@dataclass
class Case:
    """`counts[b]` of the `lengths[b]` positions of sequence b are new; `padding` tokens and `empty` sequences follow. `turn`: 1 by halves, 2 by
    pairs, 0 not at all, `turned` elements with a cosine each (`full`) or one for each pair. `unstored`: tokens with a slot of -1."""

    counts: list[int]
    lengths: list[int]
    heads: int = 4
    kv_heads: int = 2
    size: int = 64
    value_size: int = 0
    block: int = 16
    dtype: str = "bfloat16"
    window: int = 0
    softcap: float = 0.0
    turn: int = 0
    turned: int = 0
    full: bool = True
    norm: str = ""  # the type of the weights of norms
    padding: int = 0
    empty: int = 0
    unstored: tuple[int, ...] = ()
    name: str = ""
    arrays: dict[str, Any] = field(default_factory=dict)

    def make(self, seed: int = 0) -> Case:
        """Fill `arrays`, in NumPy. Everything of the caches that is not of a sequence is NaN, and so are the new positions."""
        rng, dtype = np.random.default_rng(seed), np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))
        counts, lengths = [*self.counts, *[0] * self.empty], [*self.lengths, *[0] * self.empty]
        tokens, sizes = sum(counts) + self.padding, (self.size, self.value_size or self.size)
        needed = [-(-n // self.block) for n in lengths]
        blocks = sum(needed) + 3
        order, tables = rng.permutation(blocks), np.full((len(lengths), max(needed) + 1), -1, np.int32)
        for b, count in enumerate(needed):
            tables[b, :count] = order[sum(needed[:b]) : sum(needed[: b + 1])]
        caches = [np.full((blocks * self.block, self.kv_heads, n), np.nan).astype(dtype) for n in sizes]
        slots: list[int] = []
        for b, length in enumerate(lengths):
            places = [int(tables[b, p // self.block]) * self.block + p % self.block for p in range(length)]
            old = places[: length - counts[b]]
            for cache in caches:
                cache[old] = rng.standard_normal((len(old), *cache.shape[1:])).astype(dtype)
            slots += places[length - counts[b] :]
        slots += [-1] * self.padding
        for t in self.unstored:
            for cache in caches:
                cache[slots[t]] = rng.standard_normal(cache.shape[1:]).astype(dtype)
            slots[t] = -1

        def packed(heads: int, size: int) -> Any:  # [1, H, T, D] as a product leaves it
            return rng.standard_normal((1, tokens, heads, size)).astype(dtype).transpose(0, 2, 1, 3)

        made: dict[str, Any] = {"q": packed(self.heads, sizes[0]), "k": packed(self.kv_heads, sizes[0]), "v": packed(self.kv_heads, sizes[1])}
        made |= {n: c.reshape(blocks, self.block, *c.shape[1:]) for n, c in zip(("key_cache", "value_cache"), caches, strict=True)}
        starts = np.cumsum([0, *counts])
        made |= {n: np.array(a, np.int32) for n, a in (("slots", slots), ("block_tables", tables), ("query_starts", starts), ("context_lengths", lengths))}
        if self.turn:
            angles = rng.uniform(-3, 3, (1, 1, tokens, (self.turned or self.size) // (1 if self.full else 2)))
            made |= {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}
        if self.norm:
            made |= {n: rng.uniform(0.5, 2, self.size).astype(getattr(ml_dtypes, self.norm, self.norm)) for n in ("q_scale", "k_scale")}
        self.arrays = made
        return self

    def attributes(self) -> dict[str, Any]:
        return {
            "heads": self.heads, "kv_heads": self.kv_heads, "size": self.size, "scale": 0.2, "window": self.window, "softcap": self.softcap, "layer": 0,
            "interleaved": int(self.turn == 2), "turned": self.turned, "epsilon": EPSILON,
        }  # fmt: skip

    def inputs(self) -> list[Any]:
        return [self.arrays.get(n.rstrip("?")) for n in PagedAttention.inputs]

    def expected(self) -> list[Any]:
        """y, keys, values in float64; queries and keys are rounded once they are turned, as what is stored is."""
        wide = {n: a if a.dtype == np.int32 else np.nan_to_num(a.astype(np.float64)) for n, a in self.arrays.items()}
        for name in ("q", "k"):
            if self.norm:
                wide[name] = RMSNormalization.reference(wide[name], wide.pop(f"{name}_scale"), axis=-1, epsilon=EPSILON)
            if self.turn:
                wide[name] = Rotary.reference(wide[name], wide["cos"], wide["sin"], interleaved=int(self.turn == 2), size=self.turned)
            wide[name] = wide[name].astype(self.arrays["q"].dtype).astype(np.float64)
        with np.errstate(all="ignore"):
            return list(PagedAttention.reference(**{n: a for n, a in wide.items() if n not in ("cos", "sin")}, **self.attributes()))

    def complaint(self, y: Any, keys: Any, values: Any) -> str:
        """What is wrong with the results of a kernel; "" if nothing is: caches are the same bit by bit but where something was stored."""
        want = self.expected()
        error = np.linalg.norm(y.astype(np.float64) - want[0]) / max(float(np.linalg.norm(want[0])), 1e-30)
        if not error < LIMITS[self.dtype]:
            return f"y differs by {error:.1e}"
        written = self.arrays["slots"][self.arrays["slots"] >= 0]
        for name, got, wanted in (("key_cache", keys, want[1]), ("value_cache", values, want[2])):
            old, new, right = (a.reshape(-1, *a.shape[2:]) for a in (self.arrays[name], got, wanted))
            kept = np.ones(len(old), bool)
            kept[written] = False
            if old[kept].tobytes() != new[kept].tobytes():
                return f"{name} is changed where nothing was to be stored"
            if not np.allclose(new[written].astype(np.float64), right[written], rtol=LIMITS[self.dtype] * 2, atol=LIMITS[self.dtype]):
                return f"{name} does not hold what was to be stored"
        return ""


def cases() -> list[Case]:
    """Lengths at the edges of blocks, sequences without keys, all ratios of heads, sizes, blocks, and forms of what comes before."""
    ones = [1, 1, 1]
    found = [
        Case([1], [40], name="one sequence"), Case(ones, [100, 1, 33], 8, name="ragged"), Case(ones, [15, 16, 17], name="edges of blocks", dtype="float16"),
        Case([1, 1], [700, 17], name="split"), Case([1, 1], [20, 16], padding=2, empty=2, name="padding", dtype="float16"), Case(ones, [9, 30, 17], unstored=(1,), name="nothing stored"),
        Case([3, 0, 1], [9, 30, 17], empty=1, name="several tokens where there is room for one each"), Case([5, 1, 3], [20, 16, 9], name="more tokens than sequences", dtype="float16"),
        Case([5, 1, 3], [20, 16, 9], turn=1, norm="float32", name="more tokens, turned"), Case(ones, [300, 5, 64], 4, 4, window=37, name="window"),
    Case(ones, [300, 5, 64], window=1, name="window of one"),
        Case([1, 1], [37, 64], turn=1, name="halves"),
        Case(ones, [100, 5, 64], softcap=3.0, name="soft cap", dtype="float16"), Case([1, 1], [37, 64], turn=1, full=False, name="halves, an angle a pair"),
        Case([1, 1], [37, 64], turn=2, turned=20, name="pairs of a part", dtype="float16"), Case([1, 1], [37, 64], turn=2, full=False, name="pairs, an angle each"),
        Case([1, 1], [37, 64], turn=1, norm="bfloat16", name="norm and halves"), Case([1, 1], [37, 64], norm="bfloat16", name="norm alone"),
        Case([2, 1], [37, 64], turn=1, dtype="float32", norm="float32", name="float32"),
        Case(ones, [300, 5, 64], dtype="float32", window=50, softcap=2.0, name="float32, window and soft cap"),
    ]  # fmt: skip
    found += [Case([1, 1], [260, 40], ratio * 2, 2, name=f"ratio {ratio}") for ratio in (1, 2, 3, 4, 8, 16)]
    found += [Case([1], [100], 71, 1, turn=1, name="71 heads of one key head")]
    found += [Case([1, 1], [100, 40], size=size, turn=1, name=f"size {size}") for size in (32, 80, 96, 128, 256)]
    found += [Case([1, 1], [100, 40], size=40, value_size=72, name="sizes 40 and 72"), *(Case([1, 1, 2], [90, 40, 7], block=block, empty=1, name=f"blocks of {block}") for block in (1, 4, 5, 32))]
    found += [Case([1] * 40, list(range(1, 120, 3)), 2, 1, 32, name="40 sequences"), Case([1] * 72, list(range(1, 73)), 2, 1, 32, name="72 sequences", dtype="float16")]
    return found
