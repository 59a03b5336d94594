"""Sampling on a GPU against the NumPy reference. The kernel itself also runs on the CPU, thread by thread (`sampling_on_cpu.py`)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from draws import CASES
from sampling_on_cpu import COMPILER, OnCpu

from rewrite.errors import RewriteError
from rewrite.runtime import cuda_sampling
from rewrite.runtime.cuda_sampling import HEAD, LARGEST_VOCABULARY, MOST_LOGPROBS, ROW, Past, pack, shares, supports, template, unpack
from rewrite.runtime.philox import exponentials_of_all
from rewrite.runtime.sampling import Row, Sampler, Samples, Sampling, process, restrict

gpu = pytest.mark.gpu
compiled = pytest.mark.skipif(COMPILER is None, reason="there is no g++ to compile the kernel with")
# blocks a row, threads a block, how few elements are compared each with each, bins: the later ones need several histograms
SHAPES = [(1, 64, 512, 1024), (4, 64, 512, 1024), (4, 64, 16, 64), (2, 128, 32, 128)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernel")


def random_row(rng, vocabulary, options, length=None):
    """A row with a history of few different tokens, in which pairs come again."""
    length = int(rng.integers(1, 40)) if length is None else length
    tokens = rng.integers(0, min(vocabulary, 12), length).tolist()
    return Row(Sampling(**options), tokens, int(rng.integers(0, length + 1)), seed=int(rng.integers(0, 2**64, dtype=np.uint64)), choice=int(rng.integers(0, 4)))


def options_of(case, vocabulary, temperature):
    """The options of a case for a vocabulary that may be too small for its tokens."""
    o = {"temperature": temperature, **CASES[case]}
    if temperature == 0:
        o["temperature"] = 0.0
    if "allowed" in o:
        o["allowed"] = lambda tokens: list(range(0, vocabulary, 3))
    o["logit_bias"] = {t: v for t, v in o.get("logit_bias", {}).items() if t < vocabulary}
    o["stop_tokens"] = [t for t in o.get("stop_tokens", []) if t < vocabulary]
    o["bad_words"] = [w for w in o.get("bad_words", []) if max(w) < vocabulary]
    return o


def any_options(rng, vocabulary):
    """Each option with some probability; no hook."""
    def some(name, *values, p=0.3):
        return {name: values[rng.integers(len(values))]} if rng.random() < p else {}

    bias = {int(t): float(rng.normal() * 3) for t in rng.integers(0, vocabulary, 5)}
    words = [rng.integers(0, min(vocabulary, 12), rng.integers(1, 4)).tolist() for _ in range(6)]
    return {
        "temperature": float(rng.choice([0, 0.3, 1, 2.5])), **some("top_k", 1, 5, vocabulary // 2, vocabulary), **some("top_p", 1e-6, 0.5, 0.95, 0.99999),
        **some("min_p", 0.01, 0.3, 1.0), **some("typical_p", 0.2, 0.9, 0.999), **some("repetition_penalty", 0.7, 1.3), **some("presence_penalty", -0.5, 1.5),
        **some("frequency_penalty", 0.2), **some("no_repeat_ngram", 1, 2, 3), **some("logit_bias", bias), **some("bad_words", words), **some("min_new_tokens", 20),
        "stop_tokens": [0] if vocabulary > 1 else [], **some("logprobs", 0, min(3, vocabulary), min(MOST_LOGPROBS, vocabulary)),
    }  # fmt: skip


def same(ours, theirs, context=""):
    assert ours.tokens.tolist() == theirs.tokens.tolist(), context
    assert ours.errors == theirs.errors, context
    for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert (mine is None) == (other is None), context
        if other is None or mine is None:
            continue
        assert mine.token == other.token
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-5), context
        assert [v for _, v in mine.top] == pytest.approx([v for _, v in other.top], abs=1e-5), context
        # of equal ones at the end the reference takes any, and the kernel the lowest
        certain = {t for t, v in other.top if v > other.top[-1][1]}
        assert certain <= {t for t, _ in mine.top}, context


# --- the kernel on the CPU ----------------------------------------------------------------------------------------------------
@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_chooses_the_tokens_of_the_reference(shape, folder):
    rng, device = np.random.default_rng(sum(shape)), OnCpu(folder, *shape)
    for n, case in enumerate(CASES):
        vocabulary, temperature = (48, 1000)[n % 2], (0.0, 0.9)[n // 2 % 2]
        rows = [random_row(rng, vocabulary, options_of(case, vocabulary, temperature)) for _ in range(3)]
        logits = (rng.normal(size=(4, vocabulary)) * rng.choice([0.05, 1, 4], (4, 1))).astype(np.float32)
        same(device.sample(logits, [2, 0, 3], rows, seed=n), Sampler().sample(logits, [2, 0, 3], rows), case)


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_takes_any_options_together(shape, folder):
    rng, device = np.random.default_rng(sum(shape)), OnCpu(folder, *shape)
    for n in range(25):
        vocabulary = int(rng.choice([1, 7, 33, 400, 2000]))
        rows = [random_row(rng, vocabulary, any_options(rng, vocabulary)) for _ in range(2)]
        logits = (rng.normal(size=(2, vocabulary)) * rng.choice([0, 0.05, 1, 8])).astype(np.float32)
        same(device.sample(logits, [0, 1], rows, seed=n), Sampler().sample(logits, [0, 1], rows), [r.sampling for r in rows])


def extreme(vocabulary):
    """Rows of logits that are hard, float32 [R, V]; V at least 8."""
    rng = np.random.default_rng(8)
    lines = np.zeros((12, vocabulary), np.float32)
    lines[1] = -np.inf
    lines[2], lines[2, 5] = -np.inf, -3e38
    lines[3, 4] = np.nan
    lines[4, 6] = np.inf
    lines[5] = rng.integers(0, 3, vocabulary)
    lines[6] = rng.normal(size=vocabulary) * 1e30
    lines[7] = -0.0
    lines[7, 1:3] = 0.0
    lines[8], lines[8, : vocabulary // 2] = rng.normal(size=vocabulary), -np.inf
    lines[9] = rng.normal(size=vocabulary) * 1e-38
    lines[10] = np.linspace(-30, 0, vocabulary)
    lines[11], lines[11, 3] = -1e4, -np.nan
    return lines


EXTREME = [{}, {"temperature": 1.0}, {"temperature": 1e-30}, {"temperature": 1e30}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5},
           {"temperature": 1.0, "typical_p": 0.5}, {"temperature": 0.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 2.0},
           {"temperature": 1.0, "bad_words": [[3], [1, 2]]}]  # fmt: skip


@compiled
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_the_kernel_on_extreme_rows(shape, folder):
    logits, device = extreme(600), OnCpu(folder, *shape)
    for options in EXTREME:
        rows = [Row(Sampling(**options), [3, 3, 1], 1, seed=i) for i in range(len(logits))]
        same(device.sample(logits, range(len(logits)), rows), Sampler().sample(logits, range(len(logits)), rows), options)


@compiled
def test_the_kernel_goes_on_from_its_own_tokens(folder):
    """Several steps without the host are as many single ones: positions, counts and histories advance, also of a token that is new."""
    rng, vocabulary, device = np.random.default_rng(4), 30, OnCpu(folder, 2)
    options = {"temperature": 1.2, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "no_repeat_ngram": 2, "bad_words": [[2, 3], [4, 5, 6]], "min_new_tokens": 6, "stop_tokens": [1, 2]}
    kinds = [{}, {"temperature": 1.0}, options, {**options, "temperature": 0.0, "logprobs": 2}, {"presence_penalty": 3.0}]
    rows = [random_row(rng, vocabulary, o, 8) for o in kinds]
    rows.append(Row(Sampling(temperature=1, no_repeat_ngram=1, stop_tokens=[]), list(range(27)), 5, seed=3))  # three tokens are left, then none
    lines = (rng.normal(size=(6, len(rows), vocabulary)) * 2).astype(np.float32)
    device.load(rows, vocabulary, steps=6)
    fed = np.full(len(rows), -77, np.int32)
    told, dead = [], set()
    for logits in lines:
        device.enqueue(np.ascontiguousarray(logits), fed)
        told.append(fed.copy())
    for step, got in enumerate(device.samples()):
        want = Sampler().sample(lines[step], range(len(rows)), rows)
        for i, row in enumerate(rows):
            if i in dead:
                assert got.tokens[i] == -1
                continue
            assert got.tokens[i] == want.tokens[i]
            assert got.errors[i] == want.errors[i]
            assert told[step][i] == max(0, want.tokens[i]), "what the model reads is always a token"
            row.tokens.append(int(got.tokens[i]))
            dead |= {i} if got.tokens[i] < 0 else set()
    assert dead == {5}
    assert device.states()["length"][:5].tolist() == [14] * 5
    device.enqueue(lines[0], fed)
    assert (fed == told[-1]).all()
    with pytest.raises(RewriteError, match="7 steps were done; it was loaded for 6"):
        device.samples()


@compiled
def test_log_probabilities_for_beams(folder):
    rng, vocabulary, device = np.random.default_rng(4), 50, OnCpu(folder, 4)
    logits = rng.normal(size=(5, vocabulary)).astype(np.float32)
    logits[3, 2] = np.nan
    kinds = [{}, {"repetition_penalty": 1.3, "no_repeat_ngram": 2}, {"allowed": lambda tokens: [3, 4]}, {}, {"allowed": lambda tokens: [7], "bad_words": [[7]]}]
    rows = [random_row(rng, vocabulary, o, 8) for o in kinds]
    out = np.full((5, vocabulary), np.nan, np.float32)
    device.load(rows, vocabulary, out=out)
    device.enqueue(logits, np.zeros(5, np.int64))
    want, errors = Sampler().log_probabilities(logits, range(5), rows)
    assert device.samples()[0].errors == errors
    good = [0, 1, 2, 4]
    assert (np.isfinite(out[good]) == np.isfinite(want[good])).all()
    np.testing.assert_allclose(out[good], want[good], rtol=2e-6, atol=2e-6)


@compiled
def test_sixteen_bits_are_widened(folder):
    rng = np.random.default_rng(4)
    exact = (rng.normal(size=(2, 101)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    bits = (exact.view(np.uint32) >> 16).astype(np.uint16)
    rows = [random_row(rng, 101, {"temperature": t, "top_k": 9, "logprobs": 4}) for t in (0.0, 1.0)]
    same(OnCpu(folder, 2, bits=16).sample(bits, [1, 0], rows), Sampler().sample(exact, [1, 0], rows))


# --- the host's part -------------------------------------------------------------------------------------------------------------
def test_the_device_says_what_it_cannot_do():
    assert supports(Row(Sampling(temperature=1, top_k=3, logprobs=MOST_LOGPROBS, no_repeat_ngram=3, bad_words=[[1, 2]]), [1], 1)) is None
    for options, words in (({"allowed": lambda tokens: [1]}, "function on the host"), ({"beams": 3}, "3 beams"), ({"logprobs": 65}, "logprobs is 65; the device finds at most 64")):
        assert words in supports(Row(Sampling(**options), [1], 1))


def test_a_hook_ends_its_own_row_only():
    def broken(tokens):
        raise KeyError("state")

    rows = [Row(Sampling(allowed=hook), [7, 8], 1) for hook in (broken, lambda tokens: [], lambda tokens: [50], lambda tokens: [0, 3])]
    masks, errors = cuda_sampling.asked(rows, 9)
    reference = Sampler().sample(np.zeros((1, 9), np.float32), [0] * 4, rows).errors
    assert errors == reference
    assert errors[3] is None
    assert np.nonzero(masks[3])[0].tolist() == [0, 3]


def test_where_hooks_end_all_rows_there_are_no_tokens_but_errors():
    rows = [Row(Sampling(allowed=lambda tokens: []), [7, 8], 1) for _ in range(2)]
    _, errors = cuda_sampling.asked(rows, 9)
    made, lists, records = cuda_sampling.pack(rows, 1, [None] * 2, cuda_sampling.template, cuda_sampling.Past)
    samples = cuda_sampling.unpack(lists[records:].view(np.int32), made, errors)[0]
    assert samples.tokens.tolist() == [-1, -1]
    assert samples.errors == Sampler().sample(np.zeros((1, 9), np.float32), [0, 0], rows).errors


def test_lists_have_room_for_the_steps_to_come():
    s = Sampling(repetition_penalty=2.0, no_repeat_ngram=2, logit_bias={4: 0.5}, bad_words=[[1], [2, 3]], stop_tokens=[1], min_new_tokens=3, logprobs=2)
    table, lists, first = pack([Row(Sampling(), [1], 1), Row(s, [5, 9, 5, 4], 2, seed=2**64 - 1, choice=3)], 3, [None, None], template, Past)
    words, row = lists.view(np.int32), table[1]
    assert [int(row[n]) for n in ("length", "prompt", "choice", "seed", "steps", "seen_count", "bias_count", "word_count", "stop_count")] == [4, 2, 3, 2**64 - 1, 3, 3, 1, 1, 1]
    assert words[row["seen"] // 4 :][:12].reshape(6, 2).tolist() == [[4, 1], [5, 1], [9, 0], [0, 0], [0, 0], [0, 0]]
    assert words[row["history"] // 4 :][:7].tolist() == [5, 9, 5, 4, 0, 0, 0]
    assert words[row["words"] // 4 :][:4].tolist() == [2, 2, 2, 3], "[1] is a stop token, so no bad word"
    assert words[row["bias"] // 4 :][:1].tolist() == [4]
    assert not any(table[0][name] for name in ("seen", "history", "words", "bias", "stops", "mask"))
    assert table["record"].tolist() == [first, first + 4]
    assert len(lists) - first == 4 * (8 + 16), "steps and 3 tokens of 2 rows; 3 times 5 words, made a multiple of 4"
    assert all(table[1][name] % 16 == 0 for name in cuda_sampling.LISTS if name != "record")
    assert unpack(words[first // 4 :], table, [None, None]) == []


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_known_past_only_takes_in_what_is_new(penalty):
    rng = np.random.default_rng(0)
    row = Row(Sampling(repetition_penalty=penalty, presence_penalty=1), rng.integers(0, 30, 20).tolist(), 7)
    known = Past(row)
    for count in (0, 1, 5, 400, 3, 300):
        row.tokens += rng.integers(0, 90, count).tolist()
        known.follow()
        fresh = Past(row)
        assert known.history(2).tolist() == fresh.history(2).tolist() == [*row.tokens, 0, 0]
        assert known.counts(0).reshape(-1, 2)[np.argsort(known.counts(0)[::2])].tolist() == fresh.counts(0).reshape(-1, 2).tolist()
        assert len(known.counts(3)) == 2 * (len(known.place) + 3)


def test_blocks_share_a_row_so_that_it_fits():
    assert ROW.itemsize == 184
    for vocabulary in (1, 7, 2048, 32000, 50257, 128256, 262144, LARGEST_VOCABULARY):
        for rows in (1, 16, 17, 64):
            threads, ranks, part = shares(vocabulary, rows)
            assert ranks * part >= vocabulary
            assert part % 8 == 0
            assert HEAD + 4 * part <= 227 << 10
            assert threads in (512, 1024)
    assert shares(128256, 64)[0] == 512
    assert shares(7, 1)[1] == 1


# --- on a GPU --------------------------------------------------------------------------------------------------------------------
MIXED = [{}, *[{"temperature": 1.0, **CASES[case]} for case in CASES], {"temperature": 0.7, "top_k": 50}, {"temperature": 1.0, "top_p": 0.9}, {"logprobs": 5}]


def margin(logits, row):
    """How near the reference was to another token: the difference of the best two values of its draw, or logits."""
    line = logits.astype(np.float32)[None].copy()
    process(line[0], row)
    if row.sampling.temperature == 0:
        values = np.sort(line[0])
        return float(values[-1] - values[-2])
    scores, tokens = restrict(line, [row.sampling])
    noise = np.log(exponentials_of_all(logits.shape[-1], np.array([len(row.tokens)]), np.array([row.choice]), np.array([row.seed], np.uint64)))[0]
    values = np.sort(scores[0] - (noise if tokens is None else noise[tokens[0]]))
    return float(values[-1] - values[-2])


def differing(ours, theirs, logits, rows):
    """Rows whose token is another one, with the margin of the draw."""
    assert ours.errors == theirs.errors
    return [(i, rows[i].sampling, margin(logits[i], rows[i])) for i in np.nonzero(ours.tokens != theirs.tokens)[0]]


@gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("vocabulary", [1, 7, 48, 1001, 32000, 128256, 262144, LARGEST_VOCABULARY])
def test_tokens_on_the_gpu_are_those_of_the_reference(vocabulary, dtype):
    import cupy

    rng, sampler, found, total = np.random.default_rng(vocabulary), cuda_sampling.CudaSampler(), [], 0
    for count in (1, 3, 20) if vocabulary > 100_000 else (1, 9, 64):
        rows = [random_row(rng, vocabulary, any_options(rng, vocabulary)) for _ in range(count)]
        rows += [random_row(rng, vocabulary, options_of(case, vocabulary, 0.9)) for case in CASES] if count == 9 else []
        logits = (rng.normal(size=(len(rows), vocabulary)) * rng.choice([0.05, 1, 3, 8], (len(rows), 1))).astype(dtype)
        wide = logits.astype(np.float32)
        on_gpu = cupy.asarray(logits)
        got, want = sampler.sample(on_gpu, range(len(rows)), rows), Sampler().sample(wide, range(len(rows)), rows)
        assert on_gpu.get().tobytes() == logits.tobytes(), "the logits stay as they are"
        different = differing(got, want, wide, rows)
        found, total = found + different, total + len(rows)
        keep = [i for i in range(len(rows)) if i not in {i for i, _, _ in different}]
        same(Samples(got.tokens[keep], [got.errors[i] for i in keep], [got.logprobs[i] for i in keep]),
             Samples(want.tokens[keep], [want.errors[i] for i in keep], [want.logprobs[i] for i in keep]))  # fmt: skip
        backwards = [int(i) for i in rng.permutation(len(rows))]
        again = sampler.sample(cupy.asarray(logits), backwards, [rows[i] for i in backwards]).tokens
        assert again.tolist() == got.tokens[backwards].tolist(), "another place, the same token"
    print(f"{vocabulary} {dtype}: {len(found)} of {total} differ: {found}")
    assert all(near < 1e-5 or s.top_p != 1 or s.typical_p != 1 for _, s, near in found)
    assert len(found) <= 1 + total // 50


@gpu
@pytest.mark.parametrize("vocabulary", [600, 40_000])
def test_extreme_rows_on_the_gpu(vocabulary):
    import cupy

    logits, sampler = extreme(vocabulary), cuda_sampling.CudaSampler()
    for options in EXTREME:
        rows = [Row(Sampling(**options), [3, 3, 1], 1, seed=i) for i in range(len(logits))]
        got, want = sampler.sample(cupy.asarray(logits), range(len(logits)), rows), Sampler().sample(logits, range(len(logits)), rows)
        assert got.errors == want.errors, options
        assert not [d for d in differing(got, want, logits, rows) if d[2] > 1e-5], options


@gpu
def test_a_token_depends_on_no_other_row():
    import cupy

    rng, vocabulary, sampler = np.random.default_rng(6), 128256, cuda_sampling.CudaSampler()
    rows = [random_row(rng, vocabulary, MIXED[i % len(MIXED)] | {"allowed": None}) for i in range(64)]
    logits = cupy.asarray((rng.normal(size=(64, vocabulary)) * 2).astype(np.float32))
    whole = sampler.sample(logits, range(64), rows).tokens
    assert (whole >= 0).all()
    for i in range(64):
        assert sampler.sample(logits, [i], [rows[i]]).tokens.tolist() == [whole[i]], rows[i].sampling
    for _ in range(5):
        order = rng.permutation(64)[: rng.integers(2, 64)]
        assert sampler.sample(logits, order.tolist(), [rows[i] for i in order]).tokens.tolist() == whole[order].tolist()


@gpu
@pytest.mark.parametrize("vocabulary", [48, 20_000])
@pytest.mark.parametrize("case", CASES)
def test_a_million_draws_on_the_gpu_have_the_distribution(case, vocabulary):
    import draws_on_gpu

    _, p, impossible = draws_on_gpu.statistic(case, 1_000_000, vocabulary)
    assert impossible == 0
    assert p > 1e-4


@gpu
@pytest.mark.parametrize("wide", [np.int32, np.int64])
def test_a_captured_step_goes_on_by_itself(wide):
    import cupy

    rng, vocabulary, steps = np.random.default_rng(7), 50_257, 12
    rows = [random_row(rng, vocabulary, any_options(rng, vocabulary), 30) for _ in range(17)]
    table = cupy.asarray((rng.normal(size=(64, vocabulary)) * 2).astype(np.float32))  # the logits after a token
    state = cuda_sampling.CudaSampler().state(32, vocabulary)
    tokens, logits = cupy.full(32, 5, wide), cupy.empty((32, vocabulary), np.float32)
    poisoned = cupy.full(32, -9, wide)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        state.load(rows, steps)
        stream.begin_capture()
        cupy.take(table, tokens % 64, axis=0, out=logits)
        state.enqueue(logits, tokens)
        graph = stream.end_capture()
        for turn in range(3):  # the same graph, other contents
            rows = [dataclasses.replace(row, tokens=list(row.tokens), seed=row.seed // (turn + 1)) for row in rows[: 17 - 5 * turn]]
            state.load(rows, steps)
            tokens[...] = poisoned
            tokens[: len(rows)] = 5
            for _ in range(steps):
                graph.launch()
            got = state.samples()
            last = tokens.get()
            assert len(got) == steps
            assert (last[len(rows) :] == -9).all(), "seats without a row stay as they are"
            fed, dead = np.full(len(rows), 5), set()
            for step in got:
                want = Sampler().sample(table.get()[fed % 64], range(len(rows)), rows)
                for i, row in enumerate(rows):
                    if i not in dead:
                        assert step.tokens[i] == want.tokens[i], (row.sampling, margin(table.get()[fed[i] % 64], row))
                    dead |= {i} if step.tokens[i] < 0 else set()
                    row.tokens.append(int(step.tokens[i]))
                    fed[i] = max(0, int(step.tokens[i]))
            assert (last[: len(rows)] == fed).all()


@gpu
def test_log_probabilities_on_the_gpu():
    import cupy

    rng, vocabulary = np.random.default_rng(4), 32000
    logits = rng.normal(size=(5, vocabulary)).astype(np.float32)
    logits[3, 2] = np.nan
    kinds = [{}, {"repetition_penalty": 1.3, "no_repeat_ngram": 2}, {"allowed": lambda tokens: [3, 4]}, {}, {"allowed": lambda tokens: [7], "bad_words": [[7]]}]
    rows = [random_row(rng, vocabulary, o, 8) for o in kinds]
    got, errors = cuda_sampling.CudaSampler().log_probabilities(cupy.asarray(logits), range(5), rows)
    want, reasons = Sampler().log_probabilities(logits, range(5), rows)
    assert errors == reasons
    np.testing.assert_allclose(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]], rtol=2e-6, atol=4e-6)


@gpu
def test_what_the_gpu_refuses():
    import cupy

    sampler = cuda_sampling.CudaSampler()
    state = sampler.state(2, 100)
    logits, tokens = cupy.zeros((3, 100), np.float32), cupy.zeros(2, np.int64)
    for call, words in (
        (lambda: sampler.state(1, LARGEST_VOCABULARY + 1), f"the device takes 1 to {LARGEST_VOCABULARY}"),
        (lambda: state.load([Row(Sampling(), [1], 1)] * 3), "3 rows; it has 2 seats"),
        (lambda: state.load([Row(Sampling(beams=2), [1], 1)], 4), "for 4 steps: beam search"),
        (lambda: state.enqueue(logits.astype(np.float64), tokens), "logits are float64"),
        (lambda: state.enqueue(logits[:, :50], tokens), r"packed float32, float16, bfloat16 \[N, 100\]"),
        (lambda: state.enqueue(logits, cupy.zeros(3, np.int64)), "R at most 2"),
        (lambda: state.enqueue(logits, tokens.astype(np.float32)), "tokens are float32"),
    ):
        with pytest.raises(RewriteError, match=words):
            call()
    many = Sampler().sample(np.arange(300, dtype=np.float32)[None], [0], [Row(Sampling(logprobs=200), [1], 1)])
    got = sampler.sample(cupy.arange(300, dtype=np.float32)[None], [0], [Row(Sampling(logprobs=200), [1], 1)])
    assert got.logprobs[0].top == many.logprobs[0].top, "more than the device finds come from the host"
