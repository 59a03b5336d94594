"""The sizes a plan is built for: each named dimension from the smallest to the largest, and the one to be best at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewrite.errors import RewriteError
from rewrite.graph import Dim
from rewrite.verify import resolve

BATCH, OTHER = (1, 8, 32), (1, 128, 512)


@dataclass(frozen=True)
class Profile:
    """Smallest, best and largest size of each named dimension."""

    ranges: Mapping[str, tuple[int, int, int]]

    @staticmethod
    def parse(text: str | None, names: Iterable[str]) -> Profile:
        """`batch=1:8:32,seq=512` for the dimensions `names`; those not given get 1:8:32 (a batch) or 1:128:512.

        Raises RewriteError for an unknown name, or sizes that are not positive and in order.
        """
        known = list(names)
        ranges = {n: BATCH if "batch" in n.lower() else OTHER for n in known}
        for item in filter(None, (text or "").replace(" ", "").split(",")):
            found = re.fullmatch(r"([^=]+)=(\d+)(?::(\d+):(\d+))?", item)
            if found is None:
                raise RewriteError(f"--profile {item!r}: write NAME=MIN:BEST:MAX or NAME=SIZE, for example batch=1:8:32")
            name, low, best, high = found[1], int(found[2]), int(found[3] or found[2]), int(found[4] or found[2])
            if name not in ranges:
                raise RewriteError(f"--profile {name}: the model has no dimension of this name; it has {', '.join(known) or 'none'}")
            if not 0 < low <= best <= high:
                raise RewriteError(f"--profile {item}: sizes must be positive and in order, MIN <= BEST <= MAX")
            ranges[name] = (low, best, high)
        return Profile(ranges)

    def shapes(self, name: str, shape: tuple[Dim, ...]) -> list[tuple[int, ...]]:
        """The shape of value `name` at the smallest, the best and the largest size.

        Raises RewriteError for a dimension that does not follow from the named ones.
        """

        def unknown() -> int:
            raise RewriteError(f"the shape of '{name}', {list(shape)}, does not follow from the model's dimensions {list(self.ranges)}; give it a value_info, or unfuse the model around it")

        return [tuple(resolve(d, {n: r[i] for n, r in self.ranges.items()}, unknown) for d in shape) for i in range(3)]

    def __str__(self) -> str:
        return ", ".join(f"{n} {low}:{best}:{high}" for n, (low, best, high) in self.ranges.items()) or "static shapes"
