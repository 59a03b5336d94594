"""What a request asks of its tokens, and the NumPy reference that chooses them.

Logits are changed in the order of `transformers`:

    logit bias, repetition penalty, presence and frequency penalty, no-repeat n-gram, bad words, min new tokens, allowed tokens
    (beam search ends here), temperature, top-k, top-p, min-p, typical-p, draw

Presence and frequency penalties, which `transformers` lacks, stand beside the repetition penalty and count, as in OpenAI's
API, generated tokens only; repetition penalty and n-grams see the prompt, too. Equal logits at the edge of top-k, top-p, min-p
or typical-p are all kept, so that no result depends on the order of a sort.

A draw takes the largest of `logit - log(E)`, E exponentially distributed (`philox.exponentials`), which is a draw from the
softmax (Gumbel). Its random numbers depend on seed, position, choice and token alone: the same seed gives the same tokens
whatever else is in the batch. Of equal values the lowest token wins.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from rewrite.errors import RewriteError, blame
from rewrite.runtime.philox import exponentials, exponentials_of_all

Array = np.ndarray[Any, Any]
Allowed = Callable[[Sequence[int]], Any]
LARGEST_NOISE = np.float32(22.9)  # -log(E) is at most -log(2^-33)
NEVER = np.float32(-np.inf)
LEAST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
IMPOSSIBLE = "no token is possible: every logit is -inf, or one is not a number"
TOLD = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram", "bad_words", "min_new_tokens",
    "max_new_tokens", "stop_tokens",
)  # fmt: skip
MOST = 1024  # outputs, or beams, of a request
CACHED = 1 << 18  # logits worked on at once: more leave the processor's cache, which takes five times as long


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen; the defaults give the most likely ones. Raises RewriteError for what makes no sense.

    temperature         0: the most likely token, and what restricts draws has no effect
    top_k               draw from the k most likely; 0: from all
    top_p               ... from the most likely that together have this probability
    min_p               ... from those at least this probable, as a part of the most likely one's probability
    typical_p           ... from those whose information is nearest to the entropy, with this probability together
    repetition_penalty  divides the positive and multiplies the negative logits of tokens seen in prompt or output
    presence_penalty    is subtracted from the logits of generated tokens
    frequency_penalty   ... once for each time
    no_repeat_ngram     no n tokens in a row occur twice, prompt included; 0: they may
    logit_bias          token: what is added to its logit
    bad_words           sequences of tokens that are never completed
    allowed             called with the tokens generated so far; returns the tokens allowed next, bool [V] or token numbers
    min_new_tokens      before that, no stop token is chosen; a stop string ends the text all the same
    max_new_tokens      ends the output with the reason "length"
    stop_tokens         end the output, which contains them, with the reason "stop"
    stop                strings that end the output; its text stops before them
    n                   so many outputs, at most 1024; with beams, the n best
    beams               more than 1: beam search; at most 1024
    length_penalty      beams are compared by log-probability / tokens ** length_penalty
    early_stopping      True: end when there are `beams` finished outputs; False: when the best running beam is worse than
                        all finished ones at its present length; "never": ... at any length it may reach
    logprobs            log-probabilities of the model, before everything above: of the chosen and this many likeliest
                        tokens; None: none
    seed                0 to 2^64 - 1; None: the scheduler draws one
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[Sequence[int]] = ()
    allowed: Allowed | None = None
    min_new_tokens: int = 0
    max_new_tokens: int = 64
    stop_tokens: Sequence[int] = ()
    stop: Sequence[str] = ()
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    logprobs: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        self._number("temperature", 0)
        self._number("top_p", 0, 1, above=True)
        self._number("min_p", 0, 1)
        self._number("typical_p", 0, 1, above=True)
        self._number("repetition_penalty", 0, above=True)
        self._number("presence_penalty")
        self._number("frequency_penalty")
        self._number("length_penalty", -5, 5)
        for name in ("top_k", "no_repeat_ngram", "min_new_tokens"):
            self._integer(name, 0)
        self._integer("max_new_tokens", 1)
        for name in ("n", "beams"):
            self._integer(name, 1, MOST)
        if self.logprobs is not None:
            self._integer("logprobs", 0)
        if self.seed is not None:
            self._integer("seed", 0, 2**64 - 1)
        if self.min_new_tokens > self.max_new_tokens:
            self._wrong("min_new_tokens", f"it has to be at most max_new_tokens, {self.max_new_tokens}")
        if self.allowed is not None and not callable(self.allowed):
            self._wrong("allowed", "it has to be a function of the tokens generated so far")
        if self.early_stopping not in (True, False, "never"):
            self._wrong("early_stopping", 'it has to be True, False or "never"')
        if self.beams > 1 and self.temperature > 0:
            self._wrong("temperature", f"beam search ({self.beams} beams) draws nothing; set it to 0")
        if self.beams > 1 and self.n > self.beams:
            self._wrong("n", f"it has to be at most the number of beams, {self.beams}")
        if self.beams > 1 and self.logprobs is not None:
            self._wrong("logprobs", f"beam search ({self.beams} beams) gives none; leave it out")
        self._sequences()

    def _sequences(self) -> None:
        """The containers, copied, so that nobody changes them later."""
        if not isinstance(self.logit_bias, Mapping):
            self._wrong("logit_bias", "it has to map tokens to numbers")
        bias: dict[int, float] = {}
        for token, value in self.logit_bias.items():
            if not isinstance(value, (int, float, np.number)):
                self._wrong("logit_bias", "it has to map tokens to numbers")
            number = as_float(value)
            if not (number == -math.inf or abs(number) <= LARGEST):
                self._wrong("logit_bias", "its values have to be finite in float32, or -inf")
            bias[self._token("logit_bias", token)] = number
        if isinstance(self.stop, str) or not isinstance(self.stop, Iterable) or not all(isinstance(s, str) and s for s in self.stop):
            self._wrong("stop", "it has to be a list of strings that are not empty")
        if not isinstance(self.bad_words, Iterable) or any(isinstance(w, str) or not isinstance(w, Collection) or not len(w) for w in self.bad_words):
            self._wrong("bad_words", "it has to be a list of lists of tokens that are not empty")
        if not isinstance(self.stop_tokens, Iterable) or isinstance(self.stop_tokens, str):
            self._wrong("stop_tokens", "it has to be a list of tokens")
        object.__setattr__(self, "logit_bias", bias)
        object.__setattr__(self, "bad_words", tuple(tuple(self._token("bad_words", t) for t in w) for w in self.bad_words))
        object.__setattr__(self, "stop_tokens", tuple(self._token("stop_tokens", t) for t in self.stop_tokens))
        object.__setattr__(self, "stop", tuple(self.stop))

    def check(self, vocabulary: int) -> None:
        """Raises RewriteError if a token is named that the model does not have, or more log-probabilities than tokens."""
        for name, tokens in (("logit_bias", self.logit_bias), ("stop_tokens", self.stop_tokens), ("bad_words", [t for w in self.bad_words for t in w])):
            for token in tokens:
                if token >= vocabulary:
                    raise RewriteError(f"Sampling: {name} names token {token}; the model's tokens are 0 to {vocabulary - 1}")
        if self.logprobs is not None and self.logprobs > vocabulary:
            self._wrong("logprobs", f"the model has {vocabulary} tokens")

    @cached_property
    def processed(self) -> bool:
        """Whether anything is done to the logits before the temperature."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.no_repeat_ngram
            or self.bad_words or (self.min_new_tokens and self.stop_tokens) or self.allowed
        )  # fmt: skip

    @cached_property
    def told(self) -> str:
        """All that a token depends on, but for `allowed`, as JSON: other ranks make a Sampling of it (`from_told`)."""
        return json.dumps([*(getattr(self, name) for name in TOLD), list(self.logit_bias.items())], default=lambda number: number.item())

    @staticmethod
    def from_told(text: str) -> Sampling:
        *values, bias = json.loads(text)
        return Sampling(**dict(zip(TOLD, values, strict=True)), logit_bias=dict(bias))

    def _wrong(self, name: str, fix: str) -> None:
        raise RewriteError(f"Sampling: {name} is {getattr(self, name)!r}; {fix}")

    def _number(self, name: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> None:
        value = getattr(self, name)
        number = as_float(value) if isinstance(value, (int, float, np.number)) and not isinstance(value, bool) else math.nan
        held = abs(number) <= LARGEST and (number == 0 or abs(number) >= LEAST)
        if held and (low < number if above else low <= number) and number <= high:
            return
        if math.isfinite(number) and not held:
            self._wrong(name, f"logits are float32, which knows sizes from {LEAST:.1e} to {LARGEST:.1e}")
        span = [f"{'above' if above else 'at least'} {low}"] * (low > -math.inf) + [f"at most {high}"] * (high < math.inf)
        self._wrong(name, f"it has to be a number{' ' if span else ''}{' and '.join(span)}")

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        good = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not good or value < low or (high is not None and value > high):
            self._wrong(name, f"it has to be a whole number, at least {low}" + (f" and at most {high}" if high is not None else ""))

    def _token(self, name: str, value: Any) -> int:
        try:
            token = operator.index(value)
        except TypeError:
            token = -1
        if token < 0:
            raise RewriteError(f"Sampling: {name} has {value!r} where a token belongs; tokens are whole numbers from 0")
        return token


def as_float(value: Any) -> float:
    """A number as a float; infinite if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


@dataclass
class Row:
    """One sequence whose next token is chosen: its parameters, all tokens so far, and what its random numbers are keyed by."""

    sampling: Sampling
    tokens: MutableSequence[int]  # of a scheduler an array of int64: thousands are copied and hashed as they lie
    prompt: int  # so many of the tokens are the prompt
    seed: int = 0
    choice: int = 0  # which of the n outputs


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a chosen token, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Samples:
    """tokens int64 [R], -1 where there is none; of each row why there is none, and its log-probabilities, if it wants any."""

    tokens: Array
    errors: list[str | None]
    logprobs: list[Logprob | None]


class Sampler:
    """The NumPy reference of sampling. A sampler for a device has the same two methods."""

    def sample(self, logits: Array, index: Sequence[int], rows: Sequence[Row]) -> Samples:
        """The next token of each of R rows; row i reads logits[index[i]] of float32 [N, V]. The logits stay as they are."""
        tokens = np.full(len(rows), -1, np.int64)
        plain = [i for i, row in enumerate(rows) if not row.sampling.processed and row.sampling.temperature == 0]
        if plain:
            whole = [index[i] for i in plain] == list(range(len(logits)))
            lines = logits if whole else logits[[index[i] for i in plain]]
            tokens[plain] = np.where(np.isfinite(lines.max(axis=1)), lines.argmax(axis=1), -1)
        rest = sorted(set(range(len(rows))) - set(plain))
        errors: list[str | None] = [None] * len(rows)
        if rest:
            scores = np.array(logits[[index[i] for i in rest]], np.float32)
            chosen = [rows[i] for i in rest]
            for i, error in zip(rest, _process(scores, chosen), strict=True):
                errors[i] = error
            tokens[rest] = choose(scores, chosen)
        for i in range(len(rows)):
            if errors[i]:
                tokens[i] = -1
            elif tokens[i] < 0:
                errors[i] = IMPOSSIBLE
        wanted = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and tokens[i] >= 0]
        logprobs: list[Logprob | None] = [None] * len(rows)
        for i in wanted:
            logprobs[i] = likeliest(logits[index[i]], int(tokens[i]), rows[i].sampling.logprobs or 0)
        return Samples(tokens, errors, logprobs)

    def log_probabilities(self, logits: Array, index: Sequence[int], rows: Sequence[Row]) -> tuple[Array, list[str | None]]:
        """For beam search: log-probabilities float32 [R, V] with everything before the temperature done to them, and errors."""
        lines = np.array(logits[list(index)], np.float32)
        errors = [None if good else IMPOSSIBLE for good in np.isfinite(lines.max(axis=1))]
        with np.errstate(invalid="ignore"):
            scores = log_softmax(lines)
        return scores, [error or later for error, later in zip(errors, _process(scores, rows), strict=True)]


def _process(scores: Array, rows: Sequence[Row]) -> list[str | None]:
    """`process` for each row; returns what its hook raised, which ends that request and no other."""
    errors: list[str | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if not row.sampling.processed:
            continue
        try:
            process(scores[i], row)
        except Exception as error:
            errors[i] = f"allowed: {error if isinstance(error, RewriteError) else blame(error)}"
    return errors


def process(line: Array, row: Row) -> None:
    """Change the logits float32 [V] of one sequence in place, by everything before the temperature."""
    s, size = row.sampling, len(line)
    generated = len(row.tokens) - row.prompt
    if s.logit_bias:
        line[list(s.logit_bias)] += np.array(list(s.logit_bias.values()), np.float32)
    if s.repetition_penalty != 1:
        seen = np.unique(row.tokens)
        seen = seen[seen < size]
        penalty = np.float32(s.repetition_penalty)
        line[seen] = np.where(line[seen] < 0, line[seen] * penalty, line[seen] / penalty)
    if (s.presence_penalty or s.frequency_penalty) and generated:
        seen, count = np.unique(row.tokens[row.prompt :], return_counts=True)
        line[seen] -= np.float32(s.presence_penalty) + np.float32(s.frequency_penalty) * count.astype(np.float32)
    if s.no_repeat_ngram and len(row.tokens) >= s.no_repeat_ngram:
        line[repeating(row.tokens, s.no_repeat_ngram, size)] = NEVER
    for word in s.bad_words:
        # as in transformers, a stop token alone is no bad word
        if tuple(row.tokens[len(row.tokens) - len(word) + 1 :]) == word[:-1] and not (len(word) == 1 and word[0] in s.stop_tokens):
            line[word[-1]] = NEVER
    if generated < s.min_new_tokens:
        line[list(s.stop_tokens)] = NEVER
    if s.allowed is not None:
        allow(line, s.allowed(tuple(row.tokens[row.prompt :])))


def repeating(tokens: Sequence[int], n: int, vocabulary: int) -> Array:
    """The tokens that would make the last n equal to n before."""
    history = np.asarray(tokens)
    windows = np.lib.stride_tricks.sliding_window_view(history, n)
    found = windows[(windows[:, : n - 1] == history[len(history) - n + 1 :]).all(axis=1), n - 1]
    return found[found < vocabulary]  # type: ignore[no-any-return]


def allow(line: Array, allowed: Any) -> None:
    """Keep the allowed tokens only; if all of them are impossible by now, they get 0, as in transformers."""
    keep = permitted(allowed, len(line))
    line[~keep] = NEVER
    if line.max() == NEVER:
        line[keep] = 0


def permitted(allowed: Any, vocabulary: int) -> Array:
    """The mask, bool [V], of what a hook returned. Raises RewriteError if that is no mask and no tokens, or allows none."""
    given = np.asarray(allowed)
    keep = given if given.dtype == bool else np.zeros(vocabulary, bool)
    if keep.shape != (vocabulary,):
        raise RewriteError(f"a mask of shape {keep.shape} came back; it has to be [{vocabulary}]")
    if given.dtype != bool and given.size:
        if given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= vocabulary:
            raise RewriteError(f"it has to return a mask or tokens from 0 to {vocabulary - 1}")
        keep[given] = True
    if not keep.any():
        raise RewriteError("no token is allowed")
    return keep


def choose(scores: Array, rows: Sequence[Row]) -> Array:
    """Tokens int64 [R] from processed logits float32 [R, V], which are overwritten; -1 where none is possible."""
    best = scores.max(axis=1)
    possible = np.isfinite(best)  # a nan is the maximum of its row
    tokens = np.where(possible, scores.argmax(axis=1), -1)
    drawn = [i for i, row in enumerate(rows) if possible[i] and row.sampling.temperature > 0]
    few = [i for i in drawn if 0 < rows[i].sampling.top_k < scores.shape[1]]
    step = max(1, CACHED // scores.shape[1])
    for group in (few, sorted(set(drawn) - set(few))):
        for part in (group[i : i + step] for i in range(0, len(group), step)):
            tokens[part] = draw(*restrict(scores[part], [rows[i].sampling for i in part]), [rows[i] for i in part])
    return tokens  # type: ignore[no-any-return]


def restrict(scores: Array, samplings: Sequence[Sampling]) -> tuple[Array, Array | None]:
    """Temperature, top-k, top-p, min-p and typical-p, on logits float32 [R, V] with a finite maximum in each row.

    Returns logits float32 [R, C], -inf where a token is excluded, and the tokens that the columns stand for, int64 [R, C];
    None stands for all V.
    """
    temperature = np.array([s.temperature for s in samplings], np.float32)[:, None]
    with np.errstate(over="ignore"):
        scores = (scores - scores.max(axis=1, keepdims=True)) / temperature
    tokens: Array | None = None
    size = scores.shape[1]
    top_k = np.array([s.top_k if 0 < s.top_k < size else size for s in samplings])
    if (top_k < size).any():
        edge = np.full(len(scores), NEVER)
        for k in np.unique(top_k[top_k < size]):
            edge[top_k == k] = np.partition(scores[top_k == k], size - k, axis=1)[:, size - k]
        scores, tokens = compact(scores, tokens, (scores >= edge[:, None]) & (scores > NEVER))
    for keep, values in ((keep_top_p, [s.top_p for s in samplings]), (keep_min_p, [s.min_p for s in samplings]), (keep_typical_p, [s.typical_p for s in samplings])):
        off = 0.0 if keep is keep_min_p else 1.0
        use = [i for i, value in enumerate(values) if value != off]
        if use:
            part = scores[use]
            scores[use] = np.where(keep(part, np.array([values[i] for i in use])[:, None]), part, NEVER)
    return scores, tokens


def keep_top_p(scores: Array, p: Array) -> Array:
    """Those that less likely than p comes before: a token stays if all likelier ones together have less than p."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    total = e.sum(axis=1, keepdims=True)
    # those below a share of (1 - p) / V have less than 1 - p together, so none of them stays, and few are sorted
    few, _ = compact(scores, None, e * np.float32(scores.shape[1]) > (1 - p) * total)
    ordered = -np.sort(-few, axis=1)
    mass = np.cumsum(np.exp(ordered - ordered[:, :1]) / total, axis=1, dtype=np.float64)
    before = np.concatenate([np.zeros((len(scores), 1)), mass[:, :-1]], axis=1)
    last = ((before < p) & (ordered > NEVER)).sum(axis=1, keepdims=True) - 1
    return scores >= np.take_along_axis(ordered, last, axis=1)  # type: ignore[no-any-return]


def keep_min_p(scores: Array, p: Array) -> Array:
    probability = softmax(scores)
    return probability >= p.astype(np.float32) * probability.max(axis=1, keepdims=True)  # type: ignore[no-any-return]


def keep_typical_p(scores: Array, p: Array) -> Array:
    logs = log_softmax(scores)
    probability = np.exp(logs)
    entropy = -(np.where(probability > 0, logs, 0) * probability).sum(axis=1, keepdims=True)
    distance = np.abs(-logs - entropy)
    order = np.argsort(distance, axis=1, kind="stable")
    mass = np.cumsum(np.take_along_axis(probability, order, axis=1), axis=1, dtype=np.float64)
    last = np.minimum((mass < p).sum(axis=1, keepdims=True), scores.shape[1] - 1)
    return distance <= np.take_along_axis(distance, np.take_along_axis(order, last, axis=1), axis=1)  # type: ignore[no-any-return]


def compact(scores: Array, tokens: Array | None, keep: Array) -> tuple[Array, Array]:
    """The kept columns of each row side by side, in order, with -inf after them."""
    row, column = np.nonzero(keep)
    counts = keep.sum(axis=1)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    few = np.full((len(scores), max(1, counts.max(initial=0))), NEVER)
    few[row, place] = scores[row, column]
    which = np.zeros(few.shape, np.int64)
    which[row, place] = column if tokens is None else tokens[row, column]
    return few, which


def draw(scores: Array, tokens: Array | None, rows: Sequence[Row]) -> Array:
    """One token int64 [R] of each row of logits float32 [R, C], each with the probability that its softmax gives it."""
    position = np.array([len(row.tokens) for row in rows], np.uint64)
    choice = np.array([row.choice for row in rows], np.uint64)
    seed = np.array([row.seed for row in rows], np.uint64)
    best = scores.argmax(axis=1)[:, None]
    likeliest = best if tokens is None else np.take_along_axis(tokens, best, axis=1)
    keys = position[:, None], choice[:, None], seed[:, None]
    reached = np.take_along_axis(scores, best, axis=1) - np.log(exponentials(likeliest, *keys))
    keep = scores >= reached - LARGEST_NOISE  # no noise lifts the others above the likeliest token with its own
    keep[np.arange(len(rows)), best[:, 0]] = True
    if tokens is None and keep.mean() > 0.2:
        return (scores - np.log(exponentials_of_all(scores.shape[1], position, choice, seed))).argmax(axis=1)  # type: ignore[no-any-return]
    few, which = compact(scores, tokens, keep)
    winner = (few - np.log(exponentials(which, *keys))).argmax(axis=1)[:, None]
    return np.take_along_axis(which, winner, axis=1)[:, 0]  # type: ignore[no-any-return]


def likeliest(line: Array, token: int, count: int) -> Logprob:
    logs = log_softmax(line[None])[0]
    top = np.argpartition(-logs, count - 1)[:count] if 0 < count < len(logs) else np.arange(len(logs))[: count or 0]
    top = top[np.lexsort((top, -logs[top]))]
    return Logprob(token, float(logs[token]), tuple((int(t), float(logs[t])) for t in top))


def log_softmax(x: Array) -> Array:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]
