"""What goes into a scheduler and comes out of it: models, requests, outputs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.batch import Batch
from rewrite.runtime.sampling import Logprob, Row, Samples, Sampling
from rewrite.runtime.text_stream import Decode

Array = np.ndarray[Any, Any]


class Model(Protocol):
    """What is scheduled: it keeps keys and values in `blocks` blocks of `block_size` tokens."""

    block_size: int
    blocks: int
    vocabulary: int

    def step(self, batch: Batch) -> Array:
        """Write keys and values of the batch's tokens and return float32 [R, vocabulary], the logits of its logit_rows: what the
        scheduler's sampler takes, NumPy's or a device's array.
        """
        ...

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks, (source, destination), in all layers, before the next step. They may be copied in any order."""
        ...


@runtime_checkable
class Decoder(Model, Protocol):
    """A model that can do several steps at once, so that tokens need not leave the device in between."""

    def decode(self, batch: Batch, rows: list[Row], count: int, more: Callable[[], bool]) -> Generator[list[Samples], None, None]:
        """The samples of up to `count` steps: what `step` and `Sampler.sample` would give, one after the other. They come in parts of one step or
        more, while the next steps may already be on their way; `more` is asked before any that follow the first part are begun. Closed when no
        more are wanted.

        The batch is the first step: one token a sequence, one row each. In the next steps each sequence gets the token just
        chosen, one position on; block_tables have the blocks for them. No row has an `allowed` hook.
        """
        ...


class Refused(RewriteError):
    """A request that cannot be served, now or later; the message says why and what would help."""


@dataclass(frozen=True)
class Request:
    """prompt: tokens, at least one. priority: higher is served earlier. decode: tokens to text, if text is wanted."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    decode: Decode | None = None


@dataclass(frozen=True)
class Output:
    """What is new in one of a request's outputs.

    request   its number, from `Scheduler.add`
    choice    which of its n outputs
    tokens    new ones; of beam search all of them, at the end
    text      new text, "" without Request.decode; held back while it may become a stop string
    logprobs  one for each new token, if asked for
    finished  None, "stop", "length", "cancelled" or "error"
    error     what went wrong, with "error"
    score     of beam search: log-probability / tokens ** length_penalty
    done      this is the last of the request
    """

    request: int
    choice: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprob, ...] = ()
    finished: str | None = None
    error: str | None = None
    score: float | None = None
    done: bool = False
