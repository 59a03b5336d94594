"""Beam search of one request, step by step as `transformers` does it (GenerationMixin._beam_search, version 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewrite.runtime.sampling import Sampling

Array = np.ndarray[Any, Any]
FAR = np.float32(-1e9)  # added to a score to put it behind all others


@dataclass(frozen=True)
class Beam:
    """An output: its generated tokens, and its log-probability divided by tokens ** length_penalty."""

    tokens: tuple[int, ...]
    score: float


class BeamSearch:
    """The running and finished beams of one request. Scores are float32, as in transformers.

    running  generated tokens of each running beam, the best first
    done     no step can improve the result
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.running: list[tuple[int, ...]] = [()] * sampling.beams
        self.done = False
        self._scores = np.full(sampling.beams, FAR)
        self._scores[0] = 0  # all beams are equal before the first token
        self._finished: list[tuple[np.float32, tuple[int, ...], bool]] = [(FAR, (), False)] * sampling.beams
        self._hopeful = True

    def advance(self, logs: Array, ended: Callable[[tuple[int, ...]], bool]) -> list[int]:
        """One token more. Returns, for each beam that runs on, the beam it comes from.

        logs: processed log-probabilities float32 [beams, V] of the next token.
        ended: whether generated tokens are an output: a stop token, a stop string, or the most tokens allowed.
        """
        s, beams, vocabulary = self.sampling, self.sampling.beams, logs.shape[1]
        flat = (logs + self._scores[:, None]).reshape(-1)
        scores, order = best(flat, min(len(flat), max(2, 1 + len(s.stop_tokens)) * beams))
        parents = [int(i) // vocabulary for i in order]
        tokens = [(*self.running[p], int(i) % vocabulary) for p, i in zip(parents, order, strict=True)]
        hit = np.array([ended(t) for t in tokens])
        length = len(tokens[0])
        self._collect(scores, tokens, hit & (np.arange(len(hit)) < beams), length)
        self._scores, chosen = best(np.where(hit, scores + FAR, scores), beams)
        self.running = [tokens[i] for i in chosen]
        longest = s.max_new_tokens if s.early_stopping == "never" and s.length_penalty > 0 else length
        worst = min(score for score, _, _ in self._finished)
        reach = self._scores[0] / np.float32(longest**s.length_penalty)
        self._hopeful = self._hopeful and any(reach > (worst if finished else FAR) for _, _, finished in self._finished)
        full = s.early_stopping is True and all(finished for _, _, finished in self._finished)
        self.done = not self._hopeful or full or bool(hit.all())
        return [parents[i] for i in chosen]

    def _collect(self, scores: Array, tokens: list[tuple[int, ...]], ended: Array, length: int) -> None:
        """Keep the best `beams` of what was and what now is finished."""
        s = self.sampling
        scores = scores / np.float32(length**s.length_penalty)
        if s.early_stopping is True and all(finished for _, _, finished in self._finished):
            scores = scores + FAR
        scores = np.where(ended, scores, scores + FAR)
        every = [*self._finished, *((np.float32(v), t, bool(e)) for v, t, e in zip(scores, tokens, ended, strict=True))]
        _, order = best(np.array([v for v, _, _ in every], np.float32), s.beams)
        self._finished = [every[i] for i in order]

    def outputs(self) -> list[Beam]:
        """The n best finished beams, the best first."""
        return [Beam(tokens, float(score)) for score, tokens, _ in self._finished[: self.sampling.n]]


def best(values: Array, count: int) -> tuple[Array, Array]:
    """The largest values in descending order, and where they are; of equal ones the first."""
    where = np.argpartition(-values, count - 1)[:count] if count < len(values) else np.arange(len(values))
    where = where[np.lexsort((where, -values[where]))]
    return values[where].astype(np.float32), where
