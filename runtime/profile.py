"""The sizes a plan is built for: each named dimension from the smallest to the largest, and the one to be best at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rewrite.errors import RewriteError
from rewrite.graph import Dim
from rewrite.verify import resolve

BATCH, OTHER = (1, 8, 32), (1, 128, 512)
GENERATOR = {"tokens": (1, 64, 2048), "rows": (1, 64, 256)}  # of a step of a text generator
MOST = 2**31 - 1  # what TensorRT takes
SIZE = r"(\d{1,19})"  # Python refuses to read thousands of digits


@dataclass(frozen=True)
class Profile:
    """Smallest, best and largest size of each named dimension."""

    ranges: Mapping[str, tuple[int, int, int]]

    @staticmethod
    def parse(text: str | None, names: Iterable[str], usual: Mapping[str, tuple[int, int, int]] | None = None) -> Profile:
        """`batch=1:8:32,seq=512` for the dimensions `names`; those not given get what is `usual`, else 1:8:32 (a batch) or 1:128:512.

        Raises RewriteError for a name that is unknown or given twice, or sizes that are not positive and in order.
        """
        known = list(names)
        ranges = {n: (usual or {}).get(n, BATCH if "batch" in n.lower() else OTHER) for n in known}
        given: set[str] = set()
        for item in filter(None, (text or "").replace(" ", "").split(",")):
            found = re.fullmatch(rf"([^=]+)={SIZE}(?::{SIZE}:{SIZE})?", item, re.ASCII)
            if found is None:
                raise RewriteError(f"--profile {item!r}: write NAME=MIN:BEST:MAX or NAME=SIZE, for example batch=1:8:32")
            name, low, best, high = found[1], int(found[2]), int(found[3] or found[2]), int(found[4] or found[2])
            if name not in ranges:
                raise RewriteError(f"--profile {name}: the model has no dimension of this name; it has {', '.join(known) or 'none'}")
            if not 0 < low <= best <= high:
                raise RewriteError(f"--profile {item}: sizes must be positive and in order, MIN <= BEST <= MAX")
            if high > MOST:
                raise RewriteError(f"--profile {item}: a size may be {MOST} at most")
            if name in given:
                raise RewriteError(f"--profile {name} is given twice; a plan has one range for each dimension, so give the smallest and the largest of both")
            given.add(name)
            ranges[name] = (low, best, high)
        return Profile(ranges)

    def shapes(self, name: str, shape: tuple[Dim, ...]) -> list[tuple[int, ...]]:
        """The shape of value `name` at the smallest, the best and the largest size.

        Raises RewriteError for a dimension that does not follow from the named ones.
        """

        def unknown() -> int:
            dims = f"those of the model's inputs ({', '.join(self.ranges)})" if self.ranges else "the model's inputs, whose dimensions have no names"
            raise RewriteError(f"'{name}' has shape {list(shape)}, which does not follow from {dims}; name its dimensions in the model, or build with --no-engines for the CPU alone")

        return [tuple(resolve(d, {n: r[i] for n, r in self.ranges.items()}, unknown) for d in shape) for i in range(3)]

    def __str__(self) -> str:
        return ", ".join(f"{n} {low}:{best}:{high}" for n, (low, best, high) in self.ranges.items()) or "static shapes"
