"""A product and the norm that reads it, in one launch (`turns` in gemm.cu): rows are normalized where they were summed up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rewrite.plugins import cuda_gemm, tuning
from rewrite.plugins.cuda_gemm import Normed, Product

if TYPE_CHECKING:
    from rewrite.runtime.cuda import Frame
    from rewrite.runtime.partition import Step

Launch = Callable[[], None]
KINDS = {"LayerNormalization": "layer", "RMSNormalization": "rms"}


def keep_apart(steps: Sequence[Step], lives: dict[str, tuple[int, int]]) -> None:
    """Let what norms make live from the step before them on, since it may be written there: not over what that step reads."""
    made = {name: index for index, step in enumerate(steps) for name in step.outputs if step.name == "MatMulAct"}
    for step in steps:
        if step.name in KINDS and step.inputs[0] in made and step.outputs[0] in lives:
            first, last = lives[step.outputs[0]]
            lives[step.outputs[0]] = (min(first, made[step.inputs[0]]), last)


def at(frame: Frame, indices: list[int], place: int) -> tuple[int, Launch] | None:
    """2 and their launch if the steps indices[place] and the one after it are a product and its norm; else None."""
    pair = indices[place : place + 2]
    steps = [frame.executor.plan.manifest.steps[i] for i in pair]
    if len(pair) < 2 or steps[0].name != "MatMulAct" or steps[1].name not in KINDS or frame.root(steps[0].outputs[0]) != frame.root(steps[1].inputs[0]):
        return None
    (plugin, attributes), (norm, options) = frame.of(pair[0]), frame.of(pair[1])
    if plugin is None or plugin.link is None or norm is None:
        return None
    link = plugin.link(*frame.arguments(steps[0], plugin), **attributes)
    if link is None or link.activation != "none":
        return None
    (x, scale, *biases), (y,) = frame.arguments(steps[1], norm)
    width = x.shape[-1]
    after = Normed(KINDS[steps[1].name], y.reshape(-1, width), scale, biases[0] if biases else None, float(options["epsilon"]))
    layouts = layouts_of(link.x, link.products[0], after)
    if not layouts:
        return None
    return 2, _pick(frame, pair, link.x, link.products[0], after, layouts)


def layouts_of(x: Any, product: Product, norm: Normed) -> list[cuda_gemm.Shape]:
    """The layouts in which they are one launch on the GPU at hand."""
    given = [a for a in (norm.scale, norm.bias) if a is not None]
    if not cuda_gemm.supported(x, [product]) or norm.y.shape != product.y.shape or any(a.shape != norm.y.shape[-1:] for a in given):
        return []
    if any(a.dtype != x.dtype or not a.flags.c_contiguous or a.data.ptr % 16 for a in (norm.y, *given)):
        return []
    read = [x] if product.residual is None else [x, product.residual]
    if any(_overlap(norm.y, a) for a in (*read, product.y)):
        return []
    return cuda_gemm.normed_shapes(norm.y.shape[-1])


def _overlap(a: Any, b: Any) -> bool:
    start, other = int(a.data.ptr), int(b.data.ptr)
    return start < other + int(b.nbytes) and other < start + int(a.nbytes)


def _pick(frame: Frame, pair: list[int], x: Any, product: Product, norm: Normed, layouts: list[cuda_gemm.Shape]) -> Launch:
    made = frame.executor.plan.manifest.steps[pair[0]].outputs[0]
    alone = frame.readers.get(frame.root(made), set()) <= {pair[1]}  # nothing else reads the sum
    written = Product(None if alone else product.y, product.w, product.bias, product.residual)

    def single() -> Launch:
        launches = frame.launches_of(pair)

        def launch() -> None:
            for one in launches:
                one()

        return launch

    found: dict[str, Callable[[], Launch]] = {str(s): partial(cuda_gemm.product, x, [written], shape=s, norm=norm) for s in layouts}
    found["one by one"] = single
    key = f"{cuda_gemm.key(x, [product], 'none')}, {norm.kind} norm{'' if alone else ', sum kept'}"
    return tuning.pick(key, found, default(len(x), layouts))


def default(tokens: int, layouts: list[cuda_gemm.Shape]) -> str:
    """What is taken where nothing was measured."""
    return "one by one"
