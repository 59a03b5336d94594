"""Beam search gives the sequences and scores of `transformers`, on a small random GPT-2."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rewrite.runtime.beam_search import BeamSearch, best
from rewrite.runtime.sampling import Row, Sampler, Sampling

VOCABULARY = 14


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2, initializer_range=0.35, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).eval()


def search(model: GPT2LMHeadModel, prompt: list[int], s: Sampling) -> list[tuple[list[int], float]]:
    beams = BeamSearch(s)
    while not beams.done:
        rows = [Row(s, [*prompt, *tokens], len(prompt)) for tokens in beams.running]
        with torch.no_grad():
            logits = model(torch.tensor([r.tokens for r in rows])).logits[:, -1].numpy()
        scores, errors = Sampler().log_probabilities(logits, range(len(rows)), rows)
        assert errors == [None] * len(rows)
        beams.advance(scores, lambda tokens: tokens[-1] in s.stop_tokens or len(tokens) >= s.max_new_tokens)
    return [(list(b.tokens), b.score) for b in beams.outputs()]


CASES = list(itertools.product([2, 3, 5], [True, False, "never"], [-1.0, 0.0, 1.0, 2.5], [(), (3,), (3, 7, 9)]))


@pytest.mark.parametrize(("beams", "early", "penalty", "stop"), [pytest.param(*case, marks=() if i % 5 == 0 else pytest.mark.slow) for i, case in enumerate(CASES)])
def test_sequences_and_scores_are_those_of_transformers(model, beams, early, penalty, stop):
    rng = np.random.default_rng(CASES.index((beams, early, penalty, stop)))
    options = [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2}, {"min_new_tokens": 3}][int(rng.integers(4))]
    prompt = rng.integers(0, VOCABULARY, int(rng.integers(1, 6))).tolist()
    s = Sampling(beams=beams, n=beams, early_stopping=early, length_penalty=penalty, stop_tokens=stop, max_new_tokens=9, **options)
    theirs = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=beams, num_return_sequences=beams, early_stopping=early, length_penalty=penalty,
        eos_token_id=list(stop) or None, pad_token_id=0, max_new_tokens=9, do_sample=False, repetition_penalty=s.repetition_penalty, no_repeat_ngram_size=s.no_repeat_ngram,
        min_new_tokens=s.min_new_tokens or None, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    ours = search(model, prompt, s)
    for (tokens, score), sequence, expected in zip(ours, theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True):
        new = sequence[len(prompt) :]
        assert tokens == new[: len(tokens)]
        assert set(new[len(tokens) :]) <= {0, *stop[:1]}, "only padding comes after"
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_fewer_outputs_than_beams_are_the_best_ones(model):
    every = search(model, [1, 2], Sampling(beams=4, n=4, stop_tokens=[3], max_new_tokens=8))
    assert search(model, [1, 2], Sampling(beams=4, n=2, stop_tokens=[3], max_new_tokens=8)) == every[:2]
    assert [score for _, score in every] == sorted((score for _, score in every), reverse=True)


def test_of_equal_scores_the_first_is_taken():
    values, where = best(np.array([1, 3, 3, 2, 3], np.float32), 2)
    assert (values.tolist(), where.tolist()) == ([3, 3], [1, 2])
