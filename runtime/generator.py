"""Text from a plan: prompts in, tokens and text out, many at once, whole or as they come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from rewrite.errors import RewriteError
from rewrite.runtime.communication import Communicator
from rewrite.runtime.kv_cache import BlockPool
from rewrite.runtime.plan import Plan
from rewrite.runtime.plan_model import PlanModel
from rewrite.runtime.requests import Output, Request
from rewrite.runtime.sampling import Logprob, Sampling
from rewrite.runtime.scheduler import Scheduler
from rewrite.runtime.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]
Prompt = str | Sequence[int] | Messages
OPTIONS = [f.name for f in dataclasses.fields(Sampling)]


@dataclass
class Choice:
    """One output of a prompt. `finished` says why it ended: "stop", "length", "cancelled" or "error", with `error`."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    finished: str | None = None
    error: str | None = None
    score: float | None = None

    def add(self, output: Output) -> None:
        self.tokens += output.tokens
        self.text += output.text
        self.logprobs += output.logprobs
        self.finished, self.error = output.finished or self.finished, output.error or self.error
        self.score = output.score if output.score is not None else self.score


@dataclass
class Generation:
    """A prompt's tokens and its outputs, `n` of them."""

    prompt: list[int]
    choices: list[Choice]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def tokens(self) -> list[int]:
        return self.choices[0].tokens


class Generator:
    """A text generator: a plan, its pool of keys and values, a scheduler and, if the plan has one, a tokenizer.

    plan          its directory, or the loaded plan
    device        where it runs, if a directory is given
    kv_memory     bytes for keys and values, of each rank; None: a quarter of the free memory, for all ranks of a host together, on the GPU four fifths
    token_budget  most tokens of a step: longer prompts are read in chunks, between the other texts' tokens; None: 256, on the GPU 2048
    seats         most texts in flight; on the GPU of both no more than the plan's engines were built for
    reuse         keep keys and values for prompts that start alike
    lookahead     most steps that are begun without asking who else waits for one; None: 1, on the GPU 64, whose tokens come in parts of a few while the next are computed
    communicator  to the other ranks of a plan for several, each of which makes one with the same options. Rank 0 generates and at the end
                  calls `model.stop()`; the others call `model.follow()` (`plan_model.PlanModel`)

    It may be used from several threads, and from several coroutines of any event loop. A hook or a sink, which runs in the middle of a step,
    may cancel requests and ask for `stats`; whatever else it asks of its own generator is refused. Raises RewriteError if the plan is no
    text generator.
    """

    def __init__(self, plan: str | os.PathLike[str] | Plan, *, device: str = "cpu", kv_memory: int | None = None, token_budget: int | None = None, seats: int = 64, reuse: bool = True,
                 communicator: Communicator | None = None, lookahead: int | None = None):  # fmt: skip
        for name, value in (("kv_memory", kv_memory), ("token_budget", token_budget), ("seats", seats), ("lookahead", lookahead)):
            if value is not None and not isinstance(value, (int, np.integer)):
                raise RewriteError(f"Generator: {name} is {value!r}; it has to be a whole number{', of bytes' * (name == 'kv_memory')}")
        self.plan = plan if isinstance(plan, Plan) else Plan(plan, device=device)
        budget = default_budget(self.plan) if token_budget is None else token_budget
        self.model = PlanModel(self.plan, kv_memory, communicator, budget, max(1, min(seats, budget)))
        if self.model.device is not None:  # engines take so much at most
            budget, seats = min(budget, self.model.device.limits.tokens[1]), min(seats, self.model.device.limits.rows[1])
        pool = BlockPool(self.model.blocks, self.model.block_size, self.model.window, reuse)
        ahead = lookahead if lookahead is not None else (64 if self.plan.device == "cuda" else 1)
        self.scheduler = Scheduler(self.model, pool, budget, seats, context=self.model.positions, lookahead=ahead, sampler=self.model.sampler)
        ends = (int(i) for i in self.model.found.get("eos") or ())
        self.eos = tuple(i for i in ends if 0 <= i < self.model.vocabulary)  # a configuration may name another vocabulary's
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.RLock()  # of the scheduler and the sinks
        self._busy = False  # with the scheduler: whoever comes all the same was called by it
        self._gone: list[int] = []  # cancelled meanwhile
        self._sinks: dict[int, Callable[[Output], None]] = {}

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.model.found.get("tokenizer"))

    @property
    def tokenizer(self) -> Tokenizer:
        """The plan's tokenizer. Raises RewriteError if it has none."""
        if self._tokenizer is None:
            if not self.has_tokenizer:
                raise RewriteError(f"{self.plan.directory}: the plan has no tokenizer, so it takes token ids; build it with --tokenizer FOLDER to give it text")
            self._tokenizer = Tokenizer(Path(self.plan.directory) / str(self.model.found["tokenizer"]))
        return self._tokenizer

    # --- prompts in, texts out -----------------------------------------------------------------------------------
    def generate(self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | None = None, *, ignore_eos: bool = False, **options: Any) -> list[Generation]:
        """Generate for all prompts together.

        Args:
            prompts: a text, token ids, a dialogue ([{"role": "user", "content": ...}]), or a list of these.
            sampling: how tokens are chosen; or give its fields as `options` (`max_new_tokens=100, temperature=0.7`).
            ignore_eos: go on where the model ends its text.

        Returns a Generation for each prompt, in order. Raises RewriteError for a prompt or an option that cannot be served.
        """
        requests = [self.request(p, sampling, ignore_eos, options) for p in as_prompts(prompts)]
        made = [Generation(list(r.prompt), [Choice() for _ in range(r.sampling.n)]) for r in requests]
        numbers: list[int] = []
        try:
            for request, generation in zip(requests, made, strict=True):
                numbers.append(self.add(request, lambda output, g=generation: g.choices[output.choice].add(output)))  # type: ignore[misc]
            while any(n in self._sinks for n in numbers):
                self.step()
        except BaseException:
            for number in numbers:
                self.cancel(number)
            raise
        return made

    def iterate(self, prompt: Prompt, sampling: Sampling | None = None, *, ignore_eos: bool = False, **options: Any) -> Iterator[Output]:
        """What is new in the outputs of one prompt, step by step; see `generate`. Closing the iterator cancels the request."""
        waiting: list[Output] = []
        number = self.add(self.request(prompt, sampling, ignore_eos, options), waiting.append)
        try:
            while True:
                while not waiting:
                    self.step()
                output = waiting.pop(0)
                yield output
                if output.done:
                    return
        finally:
            self.cancel(number)

    async def stream(self, prompt: Prompt, sampling: Sampling | None = None, *, ignore_eos: bool = False, **options: Any) -> AsyncIterator[Output]:
        """The same for coroutines: steps run in threads, and whoever waits for a token makes all texts advance."""
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Output]()

        def sink(output: Output) -> None:
            if loop.is_closed():  # nobody listens any more, and whoever steps is somebody else
                self.cancel(output.request)
            else:
                loop.call_soon_threadsafe(waiting.put_nowait, output)

        numbers: list[int] = []
        closed = threading.Event()

        def begin() -> None:
            numbers.append(self.add(self.request(prompt, sampling, ignore_eos, options), sink))
            if closed.is_set():  # while its thread was still at it
                self.cancel(numbers[0])

        try:
            await asyncio.to_thread(begin)
            while True:
                while waiting.empty():
                    await asyncio.to_thread(self.step)
                output = waiting.get_nowait()
                yield output
                if output.done:
                    return
        finally:
            closed.set()
            for number in numbers:
                self.cancel(number)

    def stats(self) -> dict[str, float]:
        """Counts and times of the scheduler since the start, in seconds."""
        with self._lock:
            return self.scheduler.metrics.summary()

    # --- the scheduler, one caller at a time ---------------------------------------------------------------------
    def request(self, prompt: Prompt, sampling: Sampling | None, ignore_eos: bool, options: dict[str, Any]) -> Request:
        """A prompt as the scheduler takes it. Raises RewriteError for an unknown option, or one that makes no sense."""
        unknown = [o for o in options if o not in OPTIONS]
        if unknown:
            raise RewriteError(f"generate: there is no option {unknown[0]!r}; the options are {', '.join(OPTIONS)}")
        ends = () if ignore_eos else self.eos
        try:
            chosen = dataclasses.replace(sampling, **options) if sampling else Sampling(**{"stop_tokens": ends, **options})
            more = [t for t in ends if t not in chosen.stop_tokens]
            if more:
                chosen = dataclasses.replace(chosen, stop_tokens=(*chosen.stop_tokens, *more))
        except (TypeError, ValueError) as error:
            raise RewriteError(f"generate: {error}") from error
        tokens = self.tokens(prompt)
        return Request(tokens, chosen, decode=self.tokenizer.continuation(tokens) if self.has_tokenizer else None)

    def tokens(self, prompt: Prompt) -> Sequence[int]:
        """The ids of a prompt, a dialogue by the tokenizer's template. Raises RewriteError without tokenizer or template, or for what is no prompt."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, (bytes, bytearray)):
            raise RewriteError(f"generate: the prompt {bytes(prompt[:20])!r} is bytes; give text (.decode()), or a list of token ids")
        if len(prompt) and (isinstance(prompt[0], dict) or isinstance(prompt[-1], dict)):
            messages = [m for m in prompt if isinstance(m, dict)]
            if len(messages) < len(prompt):
                raise RewriteError("generate: a dialogue holds messages {'role': ..., 'content': ...} and nothing else; put several prompts into a list, and each dialogue into one of its own")
            return self.tokenizer.encode_chat(messages)
        return cast(Sequence[int], prompt)

    def add(self, request: Request, sink: Callable[[Output], None]) -> int:
        """Queue a request, whose outputs go to `sink`, in whatever thread steps; returns its number. Raises RewriteError if it can never be served."""
        with self._alone():
            try:
                number = self.scheduler.add(request)
            except ValueError as error:
                raise RewriteError(str(error)) from error
            self._sinks[number] = sink
            return number

    def step(self) -> None:
        """One step for all who wait, each of whom gets what is new. A sink that raises gets no more, and its error goes on when all have theirs."""
        wrong: BaseException | None = None
        with self._alone():
            for output in self.scheduler.step():
                sink = self._sinks.get(output.request)
                try:
                    if sink is not None:
                        sink(output)
                except BaseException as error:
                    wrong = error
                    self._sinks.pop(output.request, None)
                    self.scheduler.cancel(output.request)
                if output.done:  # after its last output: other threads look here whether they have everything
                    self._sinks.pop(output.request, None)
        if wrong is not None:
            raise wrong

    def cancel(self, number: int) -> None:
        """Give up a request, if it is not over: it gets no more outputs, and its blocks are free, in the middle of a step when that ends."""
        with self._lock:
            if self._sinks.pop(number, None) is None:
                return
            self._gone.append(number)
            if not self._busy:
                with self._alone():
                    pass

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The scheduler for one caller. A hook that it calls, or Python's collector, which closes forgotten iterators at any time, may cancel meanwhile."""
        with self._lock:
            if self._busy:
                raise RewriteError("generate: called by a hook or a sink of the same generator, in the middle of its step; call it afterwards, or use another generator")
            self._busy = True
            try:
                yield
            finally:
                while self._gone:
                    self.scheduler.cancel(self._gone.pop())
                self._busy = False


def default_budget(plan: Plan) -> int:
    """Most tokens of a step: on the GPU, what is worth its while."""
    return 256 if plan.device == "cpu" else 2048


def as_prompts(given: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one, or from several. Raises RewriteError for anything else."""
    if isinstance(given, str) or (isinstance(given, Sequence) and len(given) and isinstance(given[0], int)):
        return [given]  # type: ignore[list-item]  # whether all are tokens the scheduler sees
    if not isinstance(given, Sequence) or not all(isinstance(p, (dict, Sequence)) for p in given):
        raise RewriteError("generate: a prompt is a text, a list of token ids, or a list of messages {'role': ..., 'content': ...}; give one or a list of them")
    return [given] if len(given) and isinstance(given[0], dict) else list(given)  # type: ignore[list-item, arg-type]
