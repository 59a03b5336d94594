"""Sampling: each option against transformers, draws against the distribution, seeds against the batch, errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from draws import CASES, processors, statistic
from transformers import TopPLogitsWarper

from rewrite.errors import RewriteError
from rewrite.runtime import sampling
from rewrite.runtime.philox import exponentials, exponentials_of_all, philox4x32
from rewrite.runtime.sampling import Row, Sampler, Sampling, choose, process, restrict

VOCABULARY = 500


def by_us(logits: np.ndarray, s: Sampling, histories: list[list[int]], prompt: int) -> np.ndarray:
    """Logits after processors and warpers, [R, V], shifted so that the largest is 0."""
    scores = logits.copy()
    for line, tokens in zip(scores, histories, strict=True):
        process(line, Row(s, tokens, prompt))
    if s.temperature > 0:
        found, tokens = restrict(scores, [s] * len(scores))
        scores = np.full(logits.shape, -np.inf, np.float32)
        np.put_along_axis(scores, np.arange(VOCABULARY)[None] if tokens is None else tokens, -np.inf, axis=1)
        for line, values, columns in zip(scores, found, tokens if tokens is not None else [np.arange(VOCABULARY)] * len(scores), strict=True):
            line[columns[values > -np.inf]] = values[values > -np.inf]
    return scores - scores.max(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_an_option_does_what_it_does_in_transformers(case, temperature):
    options = {"temperature": temperature, **CASES[case]}
    if temperature == 0:
        options["temperature"] = 0.0
    s = Sampling(**options)
    rng = np.random.default_rng(len(case))
    for length in (1, 2, 30, 200):
        logits = (rng.normal(size=(6, VOCABULARY)) * rng.choice([0.1, 1, 4], size=(6, 1))).astype(np.float32)
        histories = rng.integers(0, 40, (6, length)).tolist()
        prompt = (length + 1) // 2
        expected = processors(s, prompt)(torch.tensor(histories), torch.tensor(logits)).numpy()
        expected = expected - expected.max(axis=1, keepdims=True)
        found = by_us(logits, s, histories, prompt)
        assert ((found > -np.inf) == (expected > -np.inf)).all()
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_the_order_of_the_processors_is_that_of_transformers():
    s = Sampling(**CASES["everything"])
    names = [type(p).__name__ for p in processors(s, 3)]
    assert names == ["SequenceBiasLogitsProcessor", "RepetitionPenaltyLogitsProcessor", "Penalties", "NoRepeatNGramLogitsProcessor", "NoBadWordsLogitsProcessor",
                     "MinNewTokensLengthLogitsProcessor", "PrefixConstrainedLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
                     "MinPLogitsWarper", "TypicalLogitsWarper"]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_distribution(case):
    _, p, impossible = statistic(case, 100_000)
    assert impossible == 0
    assert p > 1e-4


@pytest.mark.parametrize(
    "bug",
    [
        pytest.param(lambda scores, tokens, rows: DRAW(scores * np.float32(1.03), tokens, rows), id="a temperature of 0.97"),
        pytest.param(lambda scores, tokens, rows: DRAW(scores, tokens, [dataclasses.replace(r, seed=r.seed // 2) for r in rows]), id="seeds used twice"),
    ],
)
def test_the_statistic_finds_a_small_bias(monkeypatch, bug):
    monkeypatch.setattr(sampling, "draw", bug)
    assert statistic("temperature 1", 100_000)[1] < 1e-4


DRAW = sampling.draw


def test_philox_gives_the_published_numbers():
    """The known answers of Random123, kat_vectors."""
    answers = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), words in answers.items():
        assert tuple(int(w) for w in philox4x32(counter, key)) == words


def test_noise_depends_on_seed_position_choice_and_token_alone():
    tokens = np.arange(1001)
    seeds = np.array([0, 1, 2**32, 2**64 - 1], np.uint64)
    everything = exponentials_of_all(1001, np.array([5, 5, 5, 6]), np.array([0, 0, 1, 0]), seeds)
    assert everything.dtype == np.float32
    assert np.isfinite(np.log(everything)).all()
    for i in range(4):
        alone = exponentials(tokens[::-1], np.array([5, 5, 5, 6])[i], np.array([0, 0, 1, 0])[i], seeds[i])
        assert (alone[::-1] == everything[i]).all()
    assert len(np.unique(everything)) > 0.99 * everything.size, "no two rows share their numbers"


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_what_cannot_win_is_left_out_without_changing_a_draw(scale):
    rng = np.random.default_rng(3)
    scores = (rng.normal(size=(200, 3000)) * scale).astype(np.float32)
    rows = [Row(Sampling(temperature=1), [1] * i, 0, seed=i * 7919, choice=i % 3) for i in range(200)]
    noise = np.log(exponentials_of_all(3000, np.arange(200), np.arange(200) % 3, np.arange(200) * 7919))
    assert (DRAW(scores, None, rows) == (scores - noise).argmax(axis=1)).all()


def test_the_same_seed_gives_the_same_tokens_whatever_else_is_in_the_batch():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(60, 300)).astype(np.float32)
    every = [{"temperature": 1.0, **options} for options in CASES.values()] + [{"temperature": 0.0}]
    every = [{**o, "allowed": (lambda tokens: list(range(0, 300, 2)))} if "allowed" in o else o for o in every]
    rows = [Row(Sampling(**every[i % len(every)]), rng.integers(0, 300, 5 + i).tolist(), 4, seed=i) for i in range(60)]
    sampler = Sampler()
    alone = [int(sampler.sample(logits[i : i + 1], [0], [rows[i]]).tokens[0]) for i in range(60)]
    for _ in range(5):
        order = rng.permutation(60)[: rng.integers(1, 60)]
        assert sampler.sample(logits, order.tolist(), [rows[i] for i in order]).tokens.tolist() == [alone[i] for i in order]


def test_choices_and_positions_of_one_seed_differ():
    logits = np.zeros((1, 1000), np.float32)
    s = Sampling(temperature=1)
    rows = [Row(s, [1] * length, 1, seed=9, choice=choice) for length in range(1, 20) for choice in range(5)]
    tokens = Sampler().sample(logits, [0] * len(rows), rows).tokens
    assert len(set(tokens.tolist())) > 80


def test_log_probabilities_are_those_of_the_model_before_any_option():
    logits = np.random.default_rng(2).normal(size=(3, 50)).astype(np.float32)
    s = Sampling(temperature=0.3, top_k=2, logit_bias={4: 100.0}, logprobs=5)
    samples = Sampler().sample(logits, [0, 1, 2], [Row(s, [1], 1, seed=4), Row(Sampling(), [1], 1), Row(dataclasses.replace(s, logprobs=0), [1], 1)])
    expected = torch.log_softmax(torch.tensor(logits), dim=-1)
    assert samples.tokens[0] == samples.tokens[2] == 4
    assert samples.logprobs[1] is None
    first, last = samples.logprobs[0], samples.logprobs[2]
    assert first is not None and last is not None  # noqa: PT018
    assert first.logprob == pytest.approx(float(expected[0, 4]), abs=1e-5)
    values, tokens = expected[0].topk(5)
    assert [t for t, _ in first.top] == tokens.tolist()
    assert [v for _, v in first.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert last.top == ()
    everything = Sampler().sample(logits, [0], [Row(Sampling(logprobs=50), [1], 1)]).logprobs[0]
    assert everything is not None
    assert [t for t, _ in everything.top] == expected[0].argsort(descending=True).tolist()


def test_equal_logits_at_the_edge_are_all_kept():
    logits = np.array([[3, 2, 2, 2, 1, 1]], np.float32)
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}):
        scores, tokens = restrict(logits.copy(), [Sampling(temperature=1, **options)])
        kept = np.arange(6)[scores[0] > -np.inf] if tokens is None else tokens[0][scores[0] > -np.inf]
        assert kept.tolist() == [0, 1, 2, 3], options
    assert choose(np.array([[1, 5, 5, 0]], np.float32), [Row(Sampling(), [], 0)]).tolist() == [1], "the lowest of equal tokens"


def test_extreme_parameters():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(1, 300)) * 30).astype(np.float32)
    best = int(logits.argmax())
    for options in ({"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-30, "typical_p": 0.5}):
        s = Sampling(**{"temperature": 1.0, **options})
        assert {int(Sampler().sample(logits, [0], [Row(s, [1], 1, seed=i)]).tokens[0]) for i in range(20)} == {best}, options
    wide = Sampling(temperature=1e30)
    assert len({int(Sampler().sample(logits, [0], [Row(wide, [1], 1, seed=i)]).tokens[0]) for i in range(100)}) > 50
    assert Sampler().sample(logits, [0], [Row(Sampling(temperature=1, top_k=10**9), [1], 1)]).tokens[0] >= 0


def test_a_row_without_a_possible_token_ends_with_a_reason_and_disturbs_no_other():
    logits = np.zeros((4, 3), np.float32)
    logits[1] = [0, np.nan, 1]
    logits[2] = -np.inf
    logits[3] = [np.inf, 0, 0]
    for temperature in (0.0, 1.0):
        rows = [Row(Sampling(temperature=temperature, repetition_penalty=p), [1], 1) for p in (1.0, 1.1)]
        samples = Sampler().sample(logits, [0, 1, 2, 1, 2], [rows[0], rows[0], rows[0], rows[1], rows[1]])
        assert samples.tokens[0] >= 0
        assert samples.tokens[1:].tolist() == [-1] * 4
        assert samples.errors[0] is None
        assert all("no token is possible" in str(e) for e in samples.errors[1:])
    ban = Sampling(bad_words=[[0], [1], [2]])
    assert Sampler().sample(logits, [0], [Row(ban, [], 0)]).tokens[0] == -1


def test_the_hook_for_allowed_tokens():
    logits = np.array([[5, 4, 3, 2, 1]], np.float32)
    seen = []

    def hook(tokens):
        seen.append(tuple(tokens))
        return np.array([False, False, True, True, False])

    assert Sampler().sample(logits, [0], [Row(Sampling(allowed=hook), [7, 8, 9], 2)]).tokens[0] == 2
    assert seen == [(9,)], "only what was generated"
    forced = Sampling(allowed=lambda tokens: [3], logit_bias={3: -math.inf})
    assert Sampler().sample(logits, [0], [Row(forced, [], 0)]).tokens[0] == 3, "as in transformers, the constraint holds"
    nothing, unknown = "no token is allowed", "tokens from 0 to 4"
    for answer, message in (([], nothing), (np.zeros(5, bool), nothing), ([9], unknown), ([0.5], unknown), (np.ones(4, bool), "has to be [5]")):
        samples = Sampler().sample(logits, [0, 0], [Row(Sampling(allowed=lambda tokens, a=answer: a), [], 0), Row(Sampling(), [], 0)])
        assert samples.tokens.tolist() == [-1, 0]
        assert message in str(samples.errors[0])

    def broken(tokens):
        raise KeyError("state")

    assert Sampler().sample(logits, [0], [Row(Sampling(allowed=broken), [], 0)]).errors[0].endswith("KeyError: 'state'")


def test_the_logits_stay_as_they_are():
    logits = np.random.default_rng(0).normal(size=(2, 48)).astype(np.float32)
    before = logits.copy()
    Sampler().sample(logits, [0, 1, 1], [Row(Sampling(**{"temperature": 1.0, **CASES[c]}), [3, 5, 3], 2) for c in ("everything", "top_p", "temperature 1")])
    assert (logits == before).all()


WRONG = [
    ("temperature", -1.0, "number at least 0"), ("temperature", math.nan, "number at least 0"), ("temperature", math.inf, "number"), ("temperature", "hot", "number"),
    ("top_k", -1, "at least 0"), ("top_k", 2.5, "whole number"), ("top_p", 0.0, "above 0 and at most 1"), ("top_p", 1.5, "above 0 and at most 1"),
    ("min_p", -0.1, "at least 0 and at most 1"), ("min_p", 1.1, "at most 1"), ("typical_p", 0, "above 0"), ("typical_p", 2, "at most 1"),
    ("repetition_penalty", 0, "above 0"), ("presence_penalty", math.inf, "has to be a number"), ("frequency_penalty", None, "has to be a number"),
    ("no_repeat_ngram", -2, "at least 0"), ("logit_bias", {-1: 0.5}, "tokens are whole numbers from 0"), ("logit_bias", {1: math.nan}, "finite"), ("temperature", 1e-60, "logits are float32"),
    ("temperature", 1e39, "logits are float32"), ("repetition_penalty", 1e-50, "logits are float32"), ("presence_penalty", -1e300, "logits are float32"), ("logit_bias", {1: math.inf}, "finite"),
    ("logit_bias", [1], "map tokens to numbers"), ("logit_bias", {1: "a"}, "map tokens to numbers"), ("bad_words", [[]], "not empty"), ("bad_words", [3], "list of lists"),
    ("bad_words", [[1, -3]], "-3 where a token belongs"), ("bad_words", ["word"], "list of lists"), ("bad_words", 5, "list of lists"), ("allowed", [1], "function"),
    ("min_new_tokens", -1, "at least 0"), ("min_new_tokens", 99, "at most max_new_tokens, 64"), ("max_new_tokens", 0, "at least 1"), ("stop_tokens", [1.5], "1.5 where a token belongs"),
    ("stop_tokens", 3, "list of tokens"), ("stop", "end", "list of strings"), ("stop", [""], "not empty"), ("n", 0, "at least 1"), ("beams", 0, "at least 1"),
    ("n", 100_000, "at least 1 and at most 1024"), ("beams", 1025, "at most 1024"),
    ("length_penalty", math.nan, "number"), ("early_stopping", "soon", "never"), ("logprobs", -1, "at least 0"), ("seed", -1, "at least 0"), ("seed", 2**64, "at most 18446744073709551615"),
    ("seed", True, "whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_bad_parameter_gives_one_clear_line(name, value, message):
    with pytest.raises(RewriteError, match=message) as error:
        Sampling(**{name: value})
    assert str(error.value).startswith(f"Sampling: {name} ")
    assert "\n" not in str(error.value)


def test_parameters_that_contradict_each_other_are_refused():
    for options, message in (({"beams": 2, "temperature": 1.0}, "draws nothing; set it to 0"), ({"beams": 2, "n": 3}, "at most the number of beams, 2"), ({"beams": 2, "logprobs": 1}, "gives none")):
        with pytest.raises(RewriteError, match=message):
            Sampling(**options)
    outside = [({"logit_bias": {50: 1.0}}, "logit_bias names token 50; the model's tokens are 0 to 49"), ({"stop_tokens": [77]}, "token 77"),
               ({"bad_words": [[1, 60]]}, "token 60"), ({"logprobs": 51}, "50 tokens")]  # fmt: skip
    for options, message in outside:
        with pytest.raises(RewriteError, match=message):
            Sampling(**options).check(50)
    Sampling(logit_bias={49: 1.0}, stop_tokens=[49], bad_words=[[49]], logprobs=50).check(50)


def test_parameters_do_not_change_with_what_they_were_made_of():
    words, bias, stop = [[1, 2]], {3: 1.0}, ["x"]
    s = Sampling(bad_words=words, logit_bias=bias, stop=stop)
    words[0].append(3)
    bias[4] = 1.0
    stop.append("y")
    assert (s.bad_words, s.logit_bias, s.stop) == (((1, 2),), {3: 1.0}, ("x",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        s.top_k = 3


def test_transformers_keeps_what_top_p_keeps_without_ties():
    """The two definitions: ours sums from the top and stops before p, theirs from the bottom and removes up to 1 - p."""
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(50, 400)).astype(np.float32)
    for scale in (0.01, 1, 8):
        for p in (0.001, 0.05, 0.3, 0.9, 0.999):
            theirs = TopPLogitsWarper(p)(None, torch.tensor(scores * np.float32(scale))).numpy() > -np.inf
            assert (sampling.keep_top_p(scores * np.float32(scale), np.full((50, 1), p)) == theirs).all(), (scale, p)
