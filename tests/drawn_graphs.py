"""The random graphs of `random_graphs.py` as a Hypothesis strategy: a graph at which something is wrong is made smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from random_graphs import Case, make_case


class Drawn:
    """Takes the place of a NumPy generator. Single choices are Hypothesis's, who tries simpler ones; arrays come from a seed."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]):
        self.draw, self.arrays = draw, np.random.default_rng(draw(st.integers(0, 3)))

    def integers(self, low: int, high: int | None = None, size: Any = None) -> Any:
        low, high = (0, low) if high is None else (low, high)
        return self.arrays.integers(low, high, size) if size is not None else self.draw(st.integers(low, high - 1))

    def random(self, size: Any = None) -> Any:
        """A single one: 0, 1/16, ... 15/16."""
        return self.arrays.random(size) if size is not None else self.draw(st.integers(0, 15)) / 16

    def choice(self, values: Any, size: Any = None) -> Any:
        return self.arrays.choice(values, size) if size is not None else self.draw(st.sampled_from(list(values)))

    def permutation(self, values: Any) -> Any:
        return self.draw(st.permutations(range(values) if isinstance(values, int) else values))

    def uniform(self, low: float, high: float) -> float:
        return float(self.arrays.uniform(low, high))

    def standard_normal(self, size: Any) -> Any:
        return self.arrays.standard_normal(size)


@st.composite
def graphs(draw: Any, only: str | None = None) -> Case:
    """Graphs of up to four plants (of one rule, with `only`) among noise."""
    case = make_case(0, only, Drawn(draw), least=0)
    assume(case.model.graph.node)
    return case
