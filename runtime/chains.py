"""Steps of a plan that make one launch because each reads the one before it: products of few tokens, with norms between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rewrite.plugins import cuda_chain, tuning

if TYPE_CHECKING:
    from rewrite.runtime.cuda import Frame

Launch = Callable[[], None]


def at(frame: Frame, indices: list[int], place: int) -> tuple[int, Launch] | None:
    """How many of the steps from indices[place] on are a chain, and its launch; None if they are none."""
    items: list[Any] = []
    for index in indices[place:]:
        item = _item(frame, index)
        if item is None or (not items and (isinstance(item, cuda_chain.Norm) or len(item.x) > cuda_chain.TOKENS)):
            break
        items.append(item)
    links, ends = cuda_chain.compose(items)
    for count in range(min(len(links), cuda_chain.MOST_LINKS), 1, -1):
        steps = indices[place : place + ends[count - 1]]
        part = [*links[: count - 1], replace(links[count - 1], norm=None)]
        if cuda_chain.refusal(part) is None and not _lost(frame, steps, items):
            return len(steps), _pick(frame, steps, _kept(frame, steps, ends, part))
    return None


def _item(frame: Frame, index: int) -> Any:
    plugin, attributes = frame.of(index)
    if plugin is None or plugin.link is None:
        return None
    return plugin.link(*frame.arguments(frame.executor.steps[index], plugin), **attributes)


def _lost(frame: Frame, steps: list[int], items: list[Any]) -> bool:
    """Whether something else reads the result of a norm, which a chain does not write."""
    return any(isinstance(item, cuda_chain.Norm) and not _read_within(frame, index, steps) for index, item in zip(steps, items, strict=False))


def _kept(frame: Frame, steps: list[int], ends: list[int], links: list[cuda_chain.Link]) -> list[cuda_chain.Link]:
    """The links, of which those write their results that somebody else reads. (Addresses do not tell results apart: memory is used again.)"""
    return [replace(link, kept=len(link.outputs) > 1 or not _read_within(frame, steps[end - 1], steps)) for link, end in zip(links[:-1], ends, strict=False)] + links[-1:]


def _read_within(frame: Frame, index: int, steps: list[int]) -> bool:
    made = frame.executor.steps[index].outputs
    return all(frame.readers.get(frame.root(name), set()) <= set(steps) for name in made)


def _pick(frame: Frame, steps: list[int], links: list[cuda_chain.Link]) -> Launch:
    """The chain, or its steps one by one where that was measured to be faster."""
    executor = frame.executor

    def chain() -> Launch:
        needed = cuda_chain.memory_bytes(links)
        if executor.chain_memory is None or executor.chain_memory.nbytes < 512 + 2 * needed:
            executor.chain_memory = cuda_chain.new_memory(needed)
        return cuda_chain.chain(links, executor.chain_memory)

    def single() -> Launch:
        launches = frame.launches_of(steps)

        def launch() -> None:
            for one in launches:
                one()

        return launch

    return tuning.pick(cuda_chain.key(links), {"chain": chain, "one by one": single}, "chain")
