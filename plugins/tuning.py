"""Which of several kernels computes a call the fastest: measured where asked for, else an estimate's choice.

A plugin offers its candidates by name; what was measured is a table, key -> candidate -> microseconds, that a plan keeps.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from rewrite.plugins.cuda_launch import Launch

Times = dict[str, dict[str, float]]
REPEATS, ROUNDS = 20, 5

_state: ContextVar[tuple[Times, bool]] = ContextVar("tuning", default=({}, False))


@contextlib.contextmanager
def using(times: Times, measure: bool = False) -> Iterator[None]:
    """Choose by `times` meanwhile; with `measure`, time what is not in it, on the current stream, and enter that."""
    token = _state.set((times, measure))
    try:
        yield
    finally:
        _state.reset(token)


def pick(key: str, candidates: Mapping[str, Callable[[], Launch]], default: str) -> Launch:
    """The launch of the fastest candidate for the call that `key` describes; `default` where nothing was measured."""
    times, measure = _state.get()
    if measure and key not in times:
        times[key] = {name: round(microseconds(make()), 2) for name, make in candidates.items()}
    known = {name: us for name, us in times.get(key, {}).items() if name in candidates}
    return candidates[min(known, key=known.__getitem__) if known else default]()


def microseconds(launch: Launch) -> float:
    """GPU time of one launch: the median over graphs of several in a row."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    launch()  # what is compiled or allocated at first is not captured
    stream.synchronize()
    stream.begin_capture()
    for _ in range(REPEATS):
        launch()
    graph = stream.end_capture()
    times = []
    for _ in range(ROUNDS + 1):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record(stream)
        graph.launch(stream)
        last.record(stream)
        last.synchronize()
        times.append(cupy.cuda.get_elapsed_time(first, last) * 1e3 / REPEATS)
    return statistics.median(times[1:])
