"""Draws against the distribution they should have (`python tests/draws.py --count 1000000 --record` is the long run).

The reference distribution is that of `transformers`: its processors and warpers, in its order, then softmax in float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

from rewrite.runtime.sampling import Row, Sampling, choose, process

VOCABULARY = 48
PROMPT = [3, 5, 3, 7, 5, 3]
GENERATED = [11, 5, 11, 3, 5]  # the pair (3, 5) and the token 5 have occurred before
ALLOWED = list(range(0, VOCABULARY, 2))
CASES: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.6": {"temperature": 0.6},
    "temperature 1.7": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "presence and frequency": {"presence_penalty": 0.8, "frequency_penalty": 0.3},
    "no_repeat_ngram": {"no_repeat_ngram": 2},
    "logit_bias": {"logit_bias": {2: 2.5, 9: -3.0, 11: float("-inf")}},
    "bad_words": {"bad_words": [[8], [3, 5, 20], [5, 21], [4, 22]]},
    "min_new_tokens": {"min_new_tokens": 9, "stop_tokens": [1, 30]},
    "allowed": {"allowed": lambda tokens: ALLOWED},
    "top_k, top_p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "top_k, min_p, typical_p": {"temperature": 1.3, "top_k": 30, "min_p": 0.02, "typical_p": 0.9},
    "everything": {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.97, "repetition_penalty": 1.2, "presence_penalty": 0.2,
                   "frequency_penalty": 0.1, "no_repeat_ngram": 2, "logit_bias": {2: 1.5}, "bad_words": [[8]], "min_new_tokens": 9, "stop_tokens": [1],
                   "allowed": lambda tokens: ALLOWED},
}  # fmt: skip


class Processors(GenerationMixin):
    """What builds the processors of a model's `generate`, without a model."""

    class Config:
        is_encoder_decoder = False

    config = Config()


class Penalties:
    """Presence and frequency penalty of generated tokens, which transformers lacks, as OpenAI defines them."""

    def __init__(self, presence: float, frequency: float, prompt: int):
        self.presence, self.frequency, self.prompt = presence, frequency, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.stack([torch.bincount(line[self.prompt :], minlength=scores.shape[1]) for line in input_ids])
        return scores - self.presence * (counts > 0) - self.frequency * counts


def processors(s: Sampling, prompt: int) -> LogitsProcessorList:
    """The list that `model.generate` makes of the same options, with Penalties after the repetition penalty."""
    stop = torch.tensor(s.stop_tokens) if s.stop_tokens else None
    config = GenerationConfig(
        do_sample=s.temperature > 0, temperature=s.temperature or None, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p or None, typical_p=s.typical_p,
        repetition_penalty=s.repetition_penalty, no_repeat_ngram_size=s.no_repeat_ngram, min_new_tokens=s.min_new_tokens, num_beams=1,
        bad_words_ids=[list(w) for w in s.bad_words] or None, sequence_bias={(t,): v for t, v in s.logit_bias.items()} or None,
    )  # fmt: skip
    config._eos_token_tensor = stop
    hook = None if s.allowed is None else lambda batch, ids: s.allowed(ids[prompt:].tolist())
    found = Processors()._get_logits_processor(config, prompt, None, hook, LogitsProcessorList(), "cpu", {})
    names = [type(p).__name__ for p in found]
    place = names.index("RepetitionPenaltyLogitsProcessor") + 1 if "RepetitionPenaltyLogitsProcessor" in names else 0
    if not place and isinstance(next(iter(found), None), SequenceBiasLogitsProcessor) and not isinstance(found[0], NoBadWordsLogitsProcessor):
        place = 1
    if s.presence_penalty or s.frequency_penalty:
        found.insert(place, Penalties(s.presence_penalty, s.frequency_penalty, prompt))
    return found


def distribution(logits: np.ndarray, s: Sampling, tokens: list[int], prompt: int) -> np.ndarray:
    """Probabilities float64 [V] of the next token, by transformers."""
    scores = processors(s, prompt)(torch.tensor([tokens]), torch.tensor(logits)[None].clone())
    return torch.softmax(scores.double(), dim=-1)[0].numpy()


def statistic(name: str, count: int, rows: int = 5000) -> tuple[float, float, int]:
    """(chi-square, its p-value, tokens drawn that have probability 0) of so many draws of one case.

    Each draw is a request of its own, with its own seed.
    """
    seed = list(CASES).index(name) << 32
    s = Sampling(**{"temperature": 1.0, **CASES[name]})
    logits = (np.random.default_rng(len(name)).normal(size=VOCABULARY) * 1.5).astype(np.float32)
    tokens = PROMPT + GENERATED
    expected = distribution(logits, s, tokens, len(PROMPT))
    observed = np.zeros(VOCABULARY, np.int64)
    line = logits.copy()
    process(line, Row(s, tokens, len(PROMPT)))
    for start in range(0, count, rows):
        size = min(rows, count - start)
        drawn = choose(np.repeat(line[None], size, axis=0), [Row(s, tokens, len(PROMPT), seed=seed + start + i) for i in range(size)])
        observed += np.bincount(drawn, minlength=VOCABULARY)
    return chi_square(observed, expected, count)


def chi_square(observed: np.ndarray, expected: np.ndarray, count: int) -> tuple[float, float, int]:
    """What `statistic` returns, from how often each token was drawn and its probability."""
    possible = expected > 0
    few = possible & (expected * count < 5)  # together, so that the statistic has its distribution
    parts = [(observed[i], expected[i] * count) for i in np.nonzero(possible & ~few)[0]]
    if few.any() and expected[few].sum() * count >= 5:
        parts.append((observed[few].sum(), expected[few].sum() * count))
    value = float(sum((o - e) ** 2 / e for o, e in parts))
    p = float(torch.special.gammaincc(torch.tensor((len(parts) - 1) / 2, dtype=torch.float64), torch.tensor(value / 2, dtype=torch.float64)))
    return value, p, int(observed[~possible].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/draws.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    started = time.perf_counter()
    for name in CASES:
        value, p, impossible = statistic(name, arguments.count)
        found[name] = {"chi-square": round(value, 1), "p": float(f"{p:.3g}"), "impossible tokens": impossible}
        print(f"{name:26} chi-square {value:7.1f}  p {p:.3g}  impossible {impossible}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        print(record.write("draws", record.cpu(), record.versions("numpy", "transformers", "torch"), {"draws": arguments.count, "cases": found}))


if __name__ == "__main__":
    main()
