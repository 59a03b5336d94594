"""What a scheduler did: counts, and times of its last requests."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

KEPT = 10_000  # times of each kind, the last ones


def times() -> deque[float]:
    return deque(maxlen=KEPT)


@dataclass
class Metrics:
    """Counts since the start, and times in seconds.

    finished, cancelled, failed   requests; failed: with an error in one output or more
    queue         from `add` to the first step that computes a token of the request
    first_token   from `add` to its first token
    between       from one token to the next of one output; an output preempted in between shows as a long time
    cache_used    part of the blocks in use after the last step, and the most after any step
    """

    steps: int = 0
    added: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of prompts, or of what a preempted sequence has to compute again: found in the cache
    computed_tokens: int = 0
    generated_tokens: int = 0
    copied_blocks: int = 0
    cache_used: float = 0.0
    cache_peak: float = 0.0
    queue: deque[float] = field(default_factory=times)
    first_token: deque[float] = field(default_factory=times)
    between: deque[float] = field(default_factory=times)

    def summary(self) -> dict[str, float]:
        """The counts, and of each time the mean and the percentiles 50, 95 and 99, in seconds (left out while there are none)."""
        found: dict[str, float] = {k: v for k, v in vars(self).items() if not isinstance(v, deque)}
        for name, values in vars(self).items():
            if isinstance(values, deque) and values:
                found[f"{name}_mean"] = float(np.mean(values))
                found.update({f"{name}_p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)})
        return found
