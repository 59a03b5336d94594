"""Norms between matrix products that the products take over (`gemm.cu`): the one before writes what is left to do, those after do it.

A norm is folded where one product makes what it reads, products alone read what it makes, and folding was not measured to be slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewrite.plugins import cuda_chain, cuda_gemm, tuning
from rewrite.plugins.cuda_gemm import Norm, Told
from rewrite.plugins.cuda_launch import capability
from rewrite.runtime.layout import Views

if TYPE_CHECKING:
    from rewrite.runtime.cuda import CudaExecutor, Frame

Launch = Callable[[], None]
NORMS = {"LayerNormalization": True, "RMSNormalization": False}  # whether the mean is taken off
PRODUCTS = {"MatMulAct", "GatedMatMulAct"}
FOLDED, APART = "in the products", "apart"  # in a table of times


@dataclass(frozen=True)
class Fold:
    """A norm that products take over: the indices of its step, of the product before it and of those after it; `bare` if nobody else reads
    what that product makes. `key` tells norms apart where time is concerned.
    """

    norm: int
    before: int
    after: tuple[int, ...]
    bare: bool
    key: str

    def z(self, x: str) -> str:
        return f"{x} scaled"

    def rows(self, x: str) -> str:
        return f"{x} rows"


class Folding:
    """The norms of a frame that are folded. It makes room for what the products tell each other, and their launches."""

    def __init__(self, frame: Frame, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, np.dtype[Any]], lives: dict[str, tuple[int, int]], views: Views):
        """Enters the values that take the place of a norm's in `shapes`, `dtypes` and `lives`, and takes out what is not needed then."""
        self.frame, self.steps = frame, frame.executor.plan.manifest.steps
        self.folds: list[Fold] = []
        self.before: dict[int, Fold] = {}
        self.after: dict[int, Fold] = {}
        self.told: dict[int, Told] = {}  # by the norm's step
        for index in self._candidates(shapes, dtypes, lives, views):
            fold = self._fold(index, shapes, dtypes, views)
            if fold is None or tuning.slower(fold.key, FOLDED, APART):
                continue
            self.folds.append(fold)
            self.before[fold.before] = fold
            self.after |= dict.fromkeys(fold.after, fold)
            x, y = self.steps[fold.norm].inputs[0], self.steps[fold.norm].outputs[0]
            z, rows, life = fold.z(x), fold.rows(x), (fold.before, max(fold.after))
            shapes[z], dtypes[z], lives[z] = shapes[x], dtypes[x], life
            shapes[rows], dtypes[rows], lives[rows] = (cuda_gemm.ceil_div(shapes[x][-1], cuda_gemm.LEAST_PART), math.prod(shapes[x][:-1]), 2), np.dtype(np.float32), life
            for name in (y, x) if fold.bare else (y,):
                del lives[name]
        self.skipped = {fold.norm for fold in self.folds}

    def place(self, values: dict[str, Any]) -> None:
        """After the values got their memory: let the norms' results be found where their products have what is left to do."""
        for fold in self.folds:
            step = self.steps[fold.norm]
            x, y, scale = step.inputs[0], step.outputs[0], step.inputs[1]
            z = values[y] = values[fold.z(x)]
            if fold.bare:
                values[x] = z
            self.told[fold.norm] = Told(z.reshape(-1, z.shape[-1]), values[fold.rows(x)], values[scale], _by(self.frame.executor, scale))

    def at(self, indices: list[int], place: int) -> tuple[int, Launch] | None:
        """How many of the steps from indices[place] on share a launch that has to do with a folded norm, and the launch; None if it has not."""
        index = indices[place]
        after, before = self.after.get(index), self.before.get(index)
        if after is None and before is None:
            return None
        group = [index]
        while len(group) < cuda_gemm.MOST_JOBS and place + len(group) < len(indices) and self._joins(index, indices[place + len(group)]):
            group.append(indices[place + len(group)])
        links = [self._link(i) for i in group]
        link, products = links[0], [p for one in links for p in one.products]
        told = None if before is None else self.told[before.norm]
        if before is not None and before.bare:
            products[0].y = None
        norm = None if after is None else self._norm(after, group)
        key = cuda_gemm.key(link.x, products, link.activation, link.gated, norm, told)
        found = cuda_gemm.candidates(link.x, products, link.activation, link.gated, norm, told)
        return len(group), tuning.pick(key, found, next(iter(found)))

    def _joins(self, first: int, other: int) -> bool:
        """Whether two products of one norm's result may share a launch."""
        alone = {first, other} & self.before.keys() or self.after.get(first) is not self.after.get(other) or not self._reads_x(first)
        return not alone and self.steps[other].name == "MatMulAct" and self.frame.of(first) == self.frame.of(other) and self._reads_x(other)

    def _reads_x(self, index: int) -> bool:
        """Whether the norm's result is what the product multiplies; else it is added."""
        return self.steps[index].inputs[0] == self.steps[self.after[index].norm].outputs[0]

    def _link(self, index: int) -> cuda_chain.Link:
        plugin, attributes = self.frame.of(index)
        assert plugin is not None
        assert plugin.link is not None
        return plugin.link(*self.frame.arguments(self.steps[index], plugin), **attributes)  # type: ignore[no-any-return]

    def _norm(self, fold: Fold, group: list[int]) -> Norm:
        step, (_, attributes), executor = self.steps[fold.norm], self.frame.of(fold.norm), self.frame.executor
        offset = step.inputs[2] if len(step.inputs) > 2 and step.inputs[2] else None
        made = Norm(self.told[fold.norm], float(attributes["epsilon"]), NORMS[step.name], self._reads_x(group[0]))
        if not made.of_x:
            made.offset = None if offset is None else executor.weights[offset]
            return made
        pairs = []
        for index in group:
            names = [*self.steps[index].inputs, *[""] * 4]
            pairs += [(names[1], names[3]), (names[2], names[4])] if self.steps[index].name == "GatedMatMulAct" else [(names[1], names[2])]
        terms = [_terms(executor, w, bias or None, step.inputs[1], offset, made) for w, bias in pairs]
        made.shifts, made.biases = [shift for shift, _ in terms], [bias for _, bias in terms]
        return made

    # --- which norms ----------------------------------------------------------------------------------------------------
    def _candidates(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]], lives: Mapping[str, tuple[int, int]], views: Views) -> list[int]:
        """Norms whose types and sizes the kernels take."""
        weights, found = self.frame.executor.weights, []
        for index, step in enumerate(self.steps):
            if step.kind != "plugin" or step.name not in NORMS:
                continue
            x, y = step.inputs[0], step.outputs[0]
            own = x in lives and y in lives and x not in views.of and y not in views.of and all(n in weights for n in step.inputs[1:] if n)
            if own and not self.frame.copied and dtypes[x].itemsize == 2 and math.prod(shapes[x][:-1]) > cuda_chain.TOKENS and {weights[n].dtype for n in step.inputs[1:] if n} == {dtypes[x]}:
                found.append(index)
        return found

    def _fold(self, index: int, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]], views: Views) -> Fold | None:
        step, outputs = self.steps[index], {*self.frame.executor.plan.manifest.outputs.values()}
        x, y = step.inputs[0], step.outputs[0]
        before = next((i for i, s in enumerate(self.steps) if x in s.outputs), None)
        after = tuple(i for i, s in enumerate(self.steps) if y in s.inputs)
        if before is None or not after or y in outputs or shapes[x][-1] % 8 or before in self.before or not np.isfinite(_by(self.frame.executor, step.inputs[1])):
            return None
        told = self.steps[before].name == "MatMulAct" and self._takes(before, shapes, dtypes[x], views) and self.frame.of(before)[1]["activation"] == "none"
        if not told or not all(self._takes(i, shapes, dtypes[x], views) for i in after):
            return None
        for i in after:
            given = [place for place, name in enumerate(self.steps[i].inputs) if name == y]
            if i in self.after or (given != [0] and (given != [3] or self.steps[i].name != "MatMulAct")):
                return None
        bare = x not in outputs and [i for i, s in enumerate(self.steps) if x in s.inputs] == [index]
        widths = "+".join(str(shapes[self.steps[i].outputs[0]][-1]) for i in after)
        tokens = math.prod(shapes[x][:-1])
        return Fold(index, before, after, bare, f"{step.name} {dtypes[x].name} {tokens}x{shapes[x][-1]} of {shapes[self.steps[before].inputs[0]][-1]} for {widths}")

    def _takes(self, index: int, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], views: Views) -> bool:
        """Whether a step is a product by constant matrices that gemm.cu can do on the GPU at hand."""
        step, (plugin, attributes), weights = self.steps[index], self.frame.of(index), self.frame.executor.weights
        if plugin is None or step.name not in PRODUCTS or not attributes["trans_w"] or plugin.link is None:
            return False
        residual = step.inputs[3] if step.name == "MatMulAct" and len(step.inputs) > 3 else ""
        values, constants = [n for n in (step.inputs[0], residual, step.outputs[0]) if n], [n for n in step.inputs[1:] if n and n != residual]
        if step.name == "GatedMatMulAct" and (attributes["merged"] != "none" or not step.inputs[2]):
            return False
        whole = all(views.packed(n) and n not in self.frame.updated and shapes[n][-1] % 8 == 0 for n in values)
        return whole and all(n in weights and weights[n].dtype == dtype and weights[n].flags.c_contiguous for n in constants) and capability() == 90


def _by(executor: CudaExecutor, scale: str) -> float:
    """The power of two that makes no element of a norm's scale larger than 1; not finite where one is not."""
    if (scale, "by") not in executor.constants:
        most = float(np.abs(executor.weights[scale].get().astype(np.float32)).max())
        executor.constants[scale, "by"] = 2.0 ** -max(0, math.ceil(math.log2(most))) if 0 < most < np.inf else 1.0 if most == 0 else math.nan
    return float(executor.constants[scale, "by"])


def _terms(executor: CudaExecutor, w: str, bias: str | None, scale: str, offset: str | None, norm: Norm) -> tuple[Any, Any]:
    """What a product of a norm's z needs: by * (w @ scale), w @ offset + bias, float32 [N]; None where they are nothing."""
    key, weights = (w, bias, scale, offset), executor.weights
    if key not in executor.constants:

        def times(vector: str) -> Any:
            return (weights[w].astype(np.float32) * weights[vector].astype(np.float32)).sum(1)

        shift = times(scale) * np.float32(norm.told.by) if norm.centred else None
        parts = [*([times(offset)] if offset else []), *([weights[bias].astype(np.float32)] if bias else [])]
        executor.constants[key] = (shift, sum(parts[1:], parts[0]) if parts else None)
    return executor.constants[key]  # type: ignore[no-any-return]


def settled(make: Callable[[], Frame]) -> Frame:
    """A frame whose norms are folded where that was measured to be faster: all of a kind, in the whole graph, one kind after the other."""
    made = make()
    times, kinds = made.executor.times, sorted({fold.key for fold in made.folding.folds})
    for key in kinds:
        if key not in times:
            times[key] = {}
            folded = make().microseconds()
            times[key] = {FOLDED: 1.0, APART: 0.0}
            times[key] = {FOLDED: round(folded, 2), APART: round(make().microseconds(), 2)}
    return make() if kinds else made
