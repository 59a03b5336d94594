"""The scheduler: no schedule changes a token or leaks a block, nobody starves, refusals are immediate, errors stay with their request."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from fake_model import VOCABULARY, Alone, FakeModel, decode, run_schedule

from rewrite.errors import RewriteError
from rewrite.runtime import scheduler as scheduling
from rewrite.runtime.kv_cache import BlockPool, BlockTable, CacheError, OutOfBlocks
from rewrite.runtime.requests import Output, Refused, Request
from rewrite.runtime.sampling import Sampling
from rewrite.runtime.scheduler import Scheduler


def served(blocks: int = 64, size: int = 4, window: int | None = None, **options) -> tuple[Scheduler, FakeModel]:
    model = FakeModel(blocks, size, window)
    return Scheduler(model, BlockPool(blocks, size, window), **options), model


def tokens_of(outputs: list[Output]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for output in outputs:
        found.setdefault((output.request, output.choice), []).extend(output.tokens)
    return found


def alone(request: Request, window: int | None = None) -> list[list[int]]:
    return [tokens for tokens, _, _ in Alone(window).generate(request)]


# Random schedules


@pytest.mark.parametrize("part", range(4))
def test_no_schedule_changes_a_token_or_leaks_a_block(part):
    counts = sum((run_schedule(seed) for seed in range(part * 15, part * 15 + 15)), start=run_schedule(1000 + part))
    assert counts["outputs"] > 100
    assert min(counts["preempted"], counts["copied"], counts["reused"], counts["cancelled"]) > 0


def shifted(*plan):
    batch, wanted = ARRAYS(*plan)
    batch.block_tables = np.roll(batch.block_tables, 1, axis=0)
    return batch, wanted


def believed(self, group):
    for sequence in group.sequences:
        if sequence.table is not None:
            sequence.commit(sequence.table.length - sequence.table.computed)
    PREEMPT(self, group)


def first_logits(*plan):
    batch, wanted = ARRAYS(*plan)
    return batch, [(group, [0] * len(at)) for group, at in wanted]


ARRAYS, PREEMPT, FREE, OPEN, COPIES = scheduling.arrays, Scheduler._preempt, BlockTable.free, BlockPool.open, BlockPool.take_copies
BUGS = {
    "copies are not made": (FakeModel, "copy_blocks", lambda self, pairs: None),
    "copies are forgotten": (BlockPool, "take_copies", lambda self: COPIES(self)[1:]),
    "block tables of another sequence": (scheduling, "arrays", shifted),
    "logits of another sequence": (scheduling, "arrays", first_logits),
    "a step that failed is taken for done": (Scheduler, "_preempt", believed),
    "a cancelled request keeps its blocks": (BlockTable, "free", lambda self: None if self.length % 7 == 3 else FREE(self)),
    "the last token is taken from the cache": (BlockPool, "open", lambda self, tokens: OPEN(self, [*tokens, 0])),
    "blocks are forgotten too early": (BlockPool, "first_visible", lambda self, length: 0 if self.window is None else max(0, length - self.window + 2) // self.block_size),
    "all choices draw the same": (scheduling.Group, "__init__", lambda self, job, row, table=None, init=scheduling.Group.__init__: (init(self, job, row, table), setattr(row, "choice", 0))[0]),
    "tokens of later steps are committed one too early": (scheduling.Sequence, "settle", lambda self: self.table.commit(self.row.tokens[self.table.computed + 1 :])),
    "nobody is preempted": (Scheduler, "_preempt_after", lambda self, group: False),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(monkeypatch, bug):
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises((AssertionError, CacheError, OutOfBlocks, IndexError, RuntimeError)):
        sum((run_schedule(seed) for seed in range(40)), start=Counter())


# What a step computes


def test_the_arrays_of_a_step():
    scheduler, model = served(size=4, token_budget=8)
    seen = []
    step = model.step
    model.step = lambda batch: (seen.append(batch), step(batch))[1]
    scheduler.add(Request([1, 2, 3, 4, 5], Sampling(max_new_tokens=3)))
    scheduler.add(Request([6, 7, 8, 9, 10], Sampling(max_new_tokens=2)))
    outputs = scheduler.step()
    first = seen[0]
    assert first.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert first.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert first.query_starts.tolist() == [0, 5, 8]
    assert first.context_lengths.tolist() == [5, 3]
    assert first.logit_rows.tolist() == [4], "the second prompt is not whole yet"
    (a, b), (c, _) = first.block_tables.tolist()
    assert first.slots.tolist() == [4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3, 4 * b, 4 * c, 4 * c + 1, 4 * c + 2]
    scheduler.step()
    second = seen[1]
    assert second.tokens.tolist() == [*outputs[0].tokens, 9, 10]
    assert second.positions.tolist() == [5, 3, 4]
    assert second.logit_rows.tolist() == [0, 2]
    assert second.context_lengths.tolist() == [6, 5]


def test_a_long_prompt_is_cut_and_stops_nobody():
    scheduler, model = served(token_budget=8)
    talking = scheduler.add(Request([1, 2], Sampling(max_new_tokens=30)))
    scheduler.step()
    long = scheduler.add(Request([3] * 50, Sampling(max_new_tokens=2)))
    for number in range(8):
        outputs = scheduler.step()
        assert [o.request for o in outputs] == [talking] + [long] * (number == 7), "50 tokens in chunks of 7, one output goes on"
    assert model.largest == 8


def test_prompts_that_start_alike_are_computed_once():
    scheduler, _ = served()
    prompt = [i % VOCABULARY for i in range(40)]
    list(scheduler.run())
    first = Request(prompt, Sampling(max_new_tokens=4))
    scheduler.add(first)
    got = tokens_of(list(scheduler.run()))
    before = scheduler.metrics.computed_tokens
    scheduler.add(first)
    again = tokens_of(list(scheduler.run()))
    assert list(got.values()) == list(again.values()) == [alone(first)[0]]
    assert scheduler.metrics.computed_tokens - before == 4 + 3, "the last of 10 blocks is computed, since its last logits are wanted"
    assert scheduler.metrics.reused_tokens == 36


def test_several_outputs_share_their_prompt():
    scheduler, _ = served()
    request = Request([1, 2, 3, 4, 5, 6], Sampling(temperature=1.0, seed=5, n=4, max_new_tokens=3))
    number = scheduler.add(request)
    outputs = scheduler.step()
    assert [(o.request, o.choice, len(o.tokens)) for o in outputs] == [(number, c, 1) for c in range(4)]
    assert scheduler.pool.used == 2
    outputs += list(scheduler.run())
    assert [tokens_of(outputs)[number, c] for c in range(4)] == alone(request)
    assert scheduler.metrics.computed_tokens == 6 + 4 * 2
    assert scheduler.metrics.copied_blocks == 3
    assert [o.done for o in outputs] == [False] * (len(outputs) - 1) + [True]


def test_beams_come_whole_and_the_best_first():
    scheduler, _ = served()
    request = Request([1, 2, 3], Sampling(beams=3, n=2, max_new_tokens=5, stop=["k"]), decode=decode)
    scheduler.add(request)
    outputs = list(scheduler.run())
    assert [(list(o.tokens), o.text, o.finished) for o in outputs] == Alone().generate(request)
    assert outputs[0].score >= outputs[1].score
    assert [o.done for o in outputs] == [False, True]


def test_several_steps_at_once_while_nobody_waits():
    scheduler, model = served(lookahead=4, token_budget=8)
    calls = []
    decoded = model.decode
    model.decode = lambda batch, rows, count, more: (calls.append((len(rows), count)), decoded(batch, rows, count, more))[1]
    stop = alone(Request([1, 2], Sampling(max_new_tokens=9)))[0][5]
    requests = [Request([1, 2], Sampling(max_new_tokens=9, stop_tokens=[stop])), Request([3, 4, 5], Sampling(max_new_tokens=12, temperature=1.0, seed=3))]
    numbers = [scheduler.add(request) for request in requests]
    outputs = list(scheduler.run())
    assert [tokens_of(outputs)[n, 0] for n in numbers] == [alone(r)[0] for r in requests]
    assert calls == [(2, 4), (2, 4), (1, 3)], "the first output ends in the middle of the second call"
    assert scheduler.metrics.steps == 1 + 4 + 4 + 3
    scheduler.pool.check()
    scheduler.add(Request([1, 2], Sampling(max_new_tokens=6)))
    scheduler.step()
    scheduler.add(Request([7] * 20, Sampling(max_new_tokens=2)))
    assert [len(o.tokens) for o in scheduler.step()] == [1], "a prompt comes in"
    assert len(calls) == 3
    list(scheduler.run())
    calls.clear()
    for options in ({"allowed": lambda tokens: range(VOCABULARY)}, {"beams": 2}):
        scheduler.add(Request([1, 2], Sampling(max_new_tokens=6, **options)))
        list(scheduler.run())
    assert calls == []


def test_several_steps_at_once_while_those_who_wait_find_no_seat():
    scheduler, model = served(lookahead=4, seats=2)
    calls = []
    decoded = model.decode
    model.decode = lambda batch, rows, count, more: (calls.append((len(rows), count)), decoded(batch, rows, count, more))[1]
    requests = [Request([n, 2], Sampling(max_new_tokens=9)) for n in range(3)]
    numbers = [scheduler.add(r) for r in requests]
    scheduler.step()
    outputs = []
    while len(outputs) < 2 or sum(len(o.tokens) for o in outputs) < 8:
        outputs += scheduler.step()
    assert sum(len(o.tokens) for o in outputs) == 8
    urgent = Request([5, 6], Sampling(max_new_tokens=3), priority=5)
    numbers.append(scheduler.add(urgent))
    outputs += scheduler.step()
    assert calls == [(2, 4)], "one who comes first takes a seat at once"
    outputs += scheduler.run()
    assert tokens_of(outputs)[numbers[3], 0] == alone(urgent)[0]
    scheduler.pool.check()


def test_what_is_under_way_ends_when_somebody_comes():
    """Steps that were begun are used, no more are begun, and then the newcomer is served; in between requests may end or be cancelled."""
    scheduler, model = served(lookahead=40, blocks=64, seats=4)
    model.random.randint = lambda low, high: 2
    steps, step = [], model.step
    model.step = lambda batch: (steps.append(len(batch.context_lengths)), step(batch))[1]
    requests = [Request([n, 2], Sampling(max_new_tokens=30)) for n in range(3)]
    numbers = [scheduler.add(r) for r in requests]
    outputs = scheduler.step()
    outputs += scheduler.step()
    assert len(steps) == 1 + 4, "while two steps are told, the next two are done"
    assert [len(o.tokens) for o in outputs] == [1, 1, 1, 2, 2, 2]
    assert scheduler.pool.used == 3 * scheduler.pool.blocks_for(31), "what the steps will write has its place"
    scheduler.cancel(numbers[1])
    late = Request([5, 6, 7], Sampling(max_new_tokens=4))
    numbers.append(scheduler.add(late))
    outputs += scheduler.step()
    assert len(steps) == 5
    outputs += scheduler.step()
    assert len(steps) == 6, "the newcomer's prompt, with those who are left"
    assert steps[-1] == 3
    scheduler.pool.check()
    outputs += scheduler.run()
    got = tokens_of(outputs)
    for number, request in zip(numbers, [*requests, late], strict=True):
        if number != numbers[1]:
            assert got[number, 0] == alone(request)[0]
    assert got[numbers[1], 0] == alone(requests[1])[0][:3]
    assert scheduler.pool.used == 0
    scheduler.pool.check()


def test_a_decoding_error_in_the_middle_of_several_steps_ends_its_output():
    scheduler, _ = served(lookahead=8, blocks=64)
    calls = []

    def failing(tokens):
        calls.append(len(tokens))
        if len(calls) == 7:  # twice for each token
            raise ValueError("no such character")
        return decode(tokens)

    bad, good = (Request([n, 2], Sampling(max_new_tokens=12), decode=d) for n, d in ((1, failing), (2, decode)))
    numbers = [scheduler.add(r) for r in (bad, good)]
    outputs = list(scheduler.run())
    assert tokens_of(outputs)[numbers[0], 0] == alone(bad)[0][:3]
    (end,) = [o for o in outputs if o.request == numbers[0] and o.done]
    assert (end.finished, "no such character" in end.error) == ("error", True)
    assert tokens_of(outputs)[numbers[1], 0] == alone(good)[0]
    assert scheduler.metrics.failed == scheduler.metrics.finished == 1


@pytest.mark.parametrize("beams", [2, 3])
def test_an_interrupt_while_the_texts_of_beams_are_made_does_not_search_on(beams):
    for first in range(VOCABULARY):
        scheduler, _ = served()
        calls = []

        def interrupted(tokens, calls=calls):
            calls.append(len(tokens))
            if len(calls) == 1:
                raise KeyboardInterrupt
            return decode(tokens)

        request = Request([first, 2, 3], Sampling(beams=beams, max_new_tokens=8, stop_tokens=range(6), length_penalty=3.0), decode=interrupted)
        scheduler.add(request)
        with pytest.raises(KeyboardInterrupt):
            list(scheduler.run())
        assert [(list(o.tokens), o.text, o.finished) for o in scheduler.run()] == Alone().search(request)
        assert scheduler.pool.used == 0


@pytest.mark.parametrize("lookahead", [1, 8])
@pytest.mark.parametrize("moment", range(1, 30, 4))
def test_an_interrupt_while_text_is_made_loses_no_token(lookahead, moment):
    scheduler, model = served(lookahead=lookahead, blocks=64)
    calls = []

    def interrupted(tokens):
        calls.append(len(tokens))
        if len(calls) == moment:
            raise KeyboardInterrupt
        return decode(tokens)

    requests = [Request([n, 2], Sampling(max_new_tokens=12, stop=["ab"], stop_tokens=[3]), decode=interrupted if n == 2 else decode) for n in (1, 2, 5, 6)]
    numbers = [scheduler.add(r) for r in requests]
    outputs, interrupts = [], 0
    while scheduler.unfinished:
        try:
            outputs += scheduler.step()
        except KeyboardInterrupt:
            interrupts += 1
        scheduler.pool.check()
        model.spoil(scheduler.pool._free)
    for number, request in zip(numbers, requests, strict=True):
        (tokens, text, _reason) = Alone().generate(request)[0]
        assert tokens_of(outputs)[number, 0] == tokens
        assert "".join(o.text for o in outputs if o.request == number) == text
    assert interrupts == (len(calls) >= moment)
    assert scheduler.pool.used == 0


def test_a_quarter_of_the_outputs_may_end_before_the_steps_do():
    scheduler, model = served(lookahead=8, blocks=64)
    calls = []
    decoded = model.decode
    model.decode = lambda batch, rows, count, more: (calls.append((len(rows), count)), decoded(batch, rows, count, more))[1]
    requests = [Request([n, 2], Sampling(max_new_tokens=4 if n == 1 else 20)) for n in range(5)]
    numbers = [scheduler.add(r) for r in requests]
    outputs = list(scheduler.run())
    assert [tokens_of(outputs)[n, 0] for n in numbers] == [alone(r)[0] for r in requests]
    assert calls[0] == (5, 8)
    scheduler.context, ends = 24, []
    model.decode = lambda batch, rows, count, more: (ends.append(int(batch.positions.max()) + count), decoded(batch, rows, count, more))[1]
    for n in range(5):
        scheduler.add(Request([n, 3], Sampling(max_new_tokens=5 if n == 1 else 22)) if n else Request([1] * 20, Sampling(max_new_tokens=4)))
    list(scheduler.run())
    assert ends[0] == 20 + 3, "no position past the model's last"
    assert max(ends) <= 24
    scheduler.pool.check()


def test_no_more_steps_at_once_than_there_are_blocks():
    scheduler, model = served(blocks=3, size=4, lookahead=8)
    calls = []
    decoded = model.decode
    model.decode = lambda batch, rows, count, more: (calls.append(count), decoded(batch, rows, count, more))[1]
    requests = [Request([1, 2], Sampling(max_new_tokens=10)), Request([3], Sampling(max_new_tokens=4))]
    numbers = [scheduler.add(request) for request in requests]
    outputs = list(scheduler.run())
    assert [tokens_of(outputs)[n, 0] for n in numbers] == [alone(r)[0] for r in requests]
    assert calls[0] == 3, "what the shorter output may have at most"
    assert scheduler.metrics.preempted == 0


def test_the_text_of_a_stop_token_and_of_a_stop_string_is_left_out():
    scheduler, _ = served()
    tokens = alone(Request([1, 2, 3], Sampling(max_new_tokens=12)))[0]
    text = decode(tokens)
    by_string = Request([1, 2, 3], Sampling(max_new_tokens=12, stop=[text[4:6]]), decode=decode)
    by_token = Request([1, 2, 3], Sampling(max_new_tokens=12, stop_tokens=[tokens[5]]), decode=decode)
    a, b = scheduler.add(by_string), scheduler.add(by_token)
    outputs = list(scheduler.run())
    assert "".join(o.text for o in outputs if o.request == a) == text[: text.index(text[4:6])]
    assert "".join(o.text for o in outputs if o.request == b) == text[: tokens.index(tokens[5])]
    assert {o.finished for o in outputs if o.done} == {"stop"}


def test_log_probabilities_come_with_the_tokens():
    scheduler, _ = served()
    scheduler.add(Request([1, 2], Sampling(max_new_tokens=3, logprobs=2)))
    outputs = list(scheduler.run())
    assert [(o.logprobs[0].token,) for o in outputs] == [o.tokens for o in outputs]
    assert all(o.logprobs[0].top[0] == (o.tokens[0], o.logprobs[0].logprob) for o in outputs), "greedy: the likeliest"


def test_seeds():
    scheduler, _ = served(blocks=300)
    drawn = [scheduler.add(Request([1, 2], Sampling(temperature=2.0, max_new_tokens=10))) for _ in range(4)]
    fixed = [scheduler.add(Request([1, 2], Sampling(temperature=2.0, max_new_tokens=10, seed=7))) for _ in range(2)]
    got = tokens_of(list(scheduler.run()))
    assert len({tuple(got[n, 0]) for n in drawn}) == 4, "without a seed, each request draws its own"
    assert got[fixed[0], 0] == got[fixed[1], 0]


# Who is served


def test_a_request_that_can_never_fit_is_refused_at_once_and_blocks_nobody():
    scheduler, _ = served(blocks=8, size=4)
    good = scheduler.add(Request([1, 2], Sampling(max_new_tokens=3)))
    with pytest.raises(Refused, match=r"30 tokens and 4 new ones need 9 blocks of the KV cache, which has 8; shorten it"):
        scheduler.add(Request([1] * 30, Sampling(max_new_tokens=4)))
    assert scheduler.metrics.refused == 1
    assert scheduler.unfinished == 1
    outputs = list(scheduler.run())
    assert outputs[-1].request == good
    assert len(outputs) == 3
    fits = Request([1] * 30, Sampling(max_new_tokens=3))  # the last token needs no slot
    scheduler.add(fits)
    assert list(tokens_of(list(scheduler.run())).values()) == alone(fits)


REFUSED = [
    (Request([]), "the prompt is empty"), (Request([1, VOCABULARY]), f"the prompt has token {VOCABULARY}; the model's tokens are 0 to {VOCABULARY - 1}"), (Request([-1]), "has token -1"),
    (Request([3, 2**70]), f"has token {2**70}"),
    (Request([1.5]), "whole numbers"), (Request(["a"]), "whole numbers"), (Request([1], Sampling(stop=["x"])), "stop strings need text; give Request.decode"),
    (Request([1], Sampling(beams=9)), "9 beams are more than the 8 sequences of a step"), (Request([1] * 90, Sampling(max_new_tokens=20)), "are more than the model's 100"),
    (Request([1], Sampling(stop_tokens=[99])), "stop_tokens names token 99"), (Request([1], Sampling(beams=8, max_new_tokens=60)), "need 120 blocks .* fewer beams"),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "message"), REFUSED)
def test_a_wrong_request_gives_one_clear_line(request_, message):
    scheduler, _ = served(context=100, seats=8)
    with pytest.raises(RewriteError, match=message) as error:
        scheduler.add(request_)
    assert "\n" not in str(error.value)
    assert scheduler.unfinished == 0


def test_a_scheduler_that_cannot_work_is_refused():
    model = FakeModel(8, 4)
    with pytest.raises(RewriteError, match="the pool has 9 blocks of 4 tokens, the model 8 of 4"):
        Scheduler(model, BlockPool(9, 4))
    with pytest.raises(RewriteError, match="the model 8 of 4"):
        Scheduler(model, BlockPool(8, 2))
    with pytest.raises(RewriteError, match="token_budget is 0; it has to be at least 1"):
        Scheduler(model, BlockPool(8, 4), token_budget=0)


def test_the_last_one_gives_way_when_blocks_run_out_and_no_token_changes():
    scheduler, _ = served(blocks=9, size=2, token_budget=16)
    requests = [Request([k, k + 1, k + 2], Sampling(max_new_tokens=12)) for k in range(3)]
    for request in requests:
        scheduler.add(request)
    outputs, used = [], []
    while scheduler.unfinished:
        outputs += scheduler.step()
        used.append(scheduler.pool.used)
        scheduler.pool.check()
    assert scheduler.metrics.preempted > 0
    assert max(used) == 9
    assert [tokens_of(outputs)[i, 0] for i in range(3)] == [alone(r)[0] for r in requests]
    assert [o.request for o in outputs if o.done] == [0, 1, 2], "in the order of arrival"


@pytest.mark.parametrize("budget", [1, 64])
def test_higher_priority_is_served_first_and_takes_the_place_of_a_running_one(budget):
    scheduler, _ = served(seats=1, token_budget=budget)
    low = scheduler.add(Request([1, 2], Sampling(max_new_tokens=20)))
    scheduler.step()
    scheduler.step()
    high = scheduler.add(Request([3, 4], Sampling(max_new_tokens=5), priority=1))
    outputs = list(scheduler.run())
    assert list(dict.fromkeys(o.request for o in outputs)) == [high, low]
    assert [o.request for o in outputs if o.done] == [high, low]
    assert scheduler.metrics.preempted == 1


def flood(scheduler: Scheduler, watched: int, request, steps: int) -> int | None:
    """In which step the watched request is done, if as many new ones come as can be served, and more."""
    for number in range(steps):
        while len(scheduler._waiting) < 5:
            scheduler.add(request())
        if any(o.request == watched and o.done for o in scheduler.step()):
            return number
    return None


@pytest.mark.parametrize("patience", [10, 40])
def test_no_priority_starves_under_overload(patience):
    scheduler, _ = served(blocks=12, token_budget=8, seats=2, patience=patience)
    watched = scheduler.add(Request([1, 2], Sampling(max_new_tokens=3)))
    done = flood(scheduler, watched, lambda: Request([3, 4], Sampling(max_new_tokens=4), priority=2), 200)
    assert done is not None
    assert done <= 2 * patience + 12


def test_without_patience_it_would_starve():
    """The test above can fail."""
    scheduler, _ = served(blocks=12, token_budget=8, seats=2, patience=10**9)
    watched = scheduler.add(Request([1, 2], Sampling(max_new_tokens=3)))
    assert flood(scheduler, watched, lambda: Request([3, 4], Sampling(max_new_tokens=4), priority=2), 200) is None


def test_a_large_request_is_not_passed_by_small_ones_for_ever():
    scheduler, _ = served(blocks=12, size=4, token_budget=16, seats=8)
    flood(scheduler, -1, lambda: Request([3, 4], Sampling(max_new_tokens=6)), 5)
    large = scheduler.add(Request([5] * 38, Sampling(max_new_tokens=4)))
    done = flood(scheduler, large, lambda: Request([3, 4], Sampling(max_new_tokens=6)), 200)
    assert done is not None
    assert done < 40


def test_equal_requests_are_served_in_the_order_of_arrival():
    scheduler, _ = served(blocks=10, size=2, token_budget=6, seats=3)
    rng = np.random.default_rng(0)
    for _ in range(60):
        scheduler.add(Request(rng.integers(0, VOCABULARY, int(rng.integers(1, 12))).tolist(), Sampling(max_new_tokens=int(rng.integers(1, 8)))))
    started = list(dict.fromkeys(o.request for o in scheduler.run()))
    assert started == sorted(started)


# What goes wrong


def test_a_cancelled_request_gives_its_blocks_back_at_once():
    scheduler, _ = served()
    number = scheduler.add(Request([1] * 10, Sampling(n=3, temperature=1.0, max_new_tokens=20)))
    waiting = scheduler.add(Request([2], Sampling(max_new_tokens=2)))
    scheduler.step()
    scheduler.step()
    assert scheduler.cancel(number)
    assert not scheduler.cancel(number)
    assert not scheduler.cancel(99)
    scheduler.pool.check()
    outputs = list(scheduler.run())
    ended = [o for o in outputs if o.request == number]
    assert [(o.choice, o.finished, o.tokens, o.done) for o in ended] == [(0, "cancelled", (), False), (1, "cancelled", (), False), (2, "cancelled", (), True)]
    assert any(o.done for o in outputs if o.request == waiting) or scheduler.metrics.finished == 1
    assert scheduler.pool.used == 0


def test_a_failing_step_loses_nothing():
    scheduler, model = served()
    request = Request([1, 2, 3, 4, 5, 6], Sampling(max_new_tokens=6))
    number = scheduler.add(request)
    outputs = scheduler.step()
    model.fails = 1.0
    for _ in range(3):
        with pytest.raises(ConnectionError):
            scheduler.step()
        scheduler.pool.check()
        assert scheduler.pool.used == 0
    model.fails = 0.0
    outputs += list(scheduler.run())
    assert tokens_of(outputs)[number, 0] == alone(request)[0]


def test_a_failing_sampler_loses_nothing():
    scheduler, _ = served()
    sampler = scheduler._sampler
    sample, search = sampler.sample, sampler.log_probabilities
    failed = []

    def broken(choose):
        def once(*inputs):
            if len(failed) % 3 < 2:
                failed.append(1)
                raise ConnectionError("no device")
            failed.append(0)
            return choose(*inputs)
        return once  # fmt: skip

    sampler.sample, sampler.log_probabilities = broken(sample), broken(search)
    requests = [Request([1, 2, 3], Sampling(max_new_tokens=5)), Request([4, 5], Sampling(temperature=1.0, n=3, seed=2, max_new_tokens=4)), Request([1, 2, 6], Sampling(beams=3, max_new_tokens=4))]
    numbers = [scheduler.add(request) for request in requests]
    outputs = []
    while scheduler.unfinished:
        try:
            outputs += scheduler.step()
        except ConnectionError:
            scheduler.pool.check()
    found = tokens_of(outputs)
    for number, request in zip(numbers, requests, strict=True):
        assert [found[number, c] for c in range(request.sampling.n)] == alone(request)
    assert sum(failed) > 10
    assert scheduler.pool.used == 0


def test_an_error_ends_its_own_request_only():
    scheduler, _model = served()

    def hook(tokens):
        if len(tokens) == 2:
            raise KeyError("no such state")
        return range(VOCABULARY)

    def no_text(tokens):
        raise UnicodeError("no such token")

    good = Request([1, 2], Sampling(max_new_tokens=5))
    wrong = [Request([1, 2], Sampling(max_new_tokens=5, allowed=hook)), Request([1, 2], decode=no_text),
             Request([1, 2], Sampling(beams=2, max_new_tokens=5, allowed=hook)), Request([1, 2], Sampling(beams=2, stop=["a"]), decode=no_text),
             Request([1, 2], Sampling(beams=2, max_new_tokens=5, allowed=hook)), Request([1, 2], Sampling(beams=2, max_new_tokens=3), decode=no_text)]  # fmt: skip
    numbers = [scheduler.add(request) for request in wrong]
    number = scheduler.add(good)
    outputs = list(scheduler.run())
    errors = {o.request: o.error for o in outputs if o.finished == "error"}
    for number_of, (start, end) in zip(numbers, [("allowed: test_scheduler.py:", "KeyError: 'no such state'"), ("decode: test_scheduler.py:", "no such token")] * 3, strict=True):
        assert errors[number_of].startswith(start)
        assert errors[number_of].endswith(end)
    assert tokens_of(outputs)[number, 0] == alone(good)[0]
    assert scheduler.metrics.failed == 6
    assert scheduler.pool.used == 0


def test_each_output_of_a_request_that_fails_says_so_and_the_request_counts_once():
    scheduler, _ = served()
    never = dict.fromkeys(range(VOCABULARY), -np.inf)
    late = Sampling(n=2, temperature=9.0, seed=3, max_new_tokens=9, stop_tokens=range(0, VOCABULARY, 2), allowed=lambda tokens: 1 // (len(tokens) < 2) and range(VOCABULARY))
    asked = {
        "all": Sampling(n=3, temperature=1.0, allowed=lambda tokens: 1 // 0), "beams": Sampling(n=3, beams=3, allowed=lambda tokens: 1 // 0),
        "none left": Sampling(n=2, beams=3, logit_bias=never), "one": late, "good": Sampling(n=2, beams=2, max_new_tokens=3),
    }  # fmt: skip
    numbers = {name: scheduler.add(Request([1, 2], sampling)) for name, sampling in asked.items()}
    outputs = list(scheduler.run())
    ends = {name: {o.choice: o.finished for o in outputs if o.request == number and o.finished} for name, number in numbers.items()}
    assert ends["all"] == ends["beams"] == dict.fromkeys(range(3), "error")
    assert ends["none left"] == dict.fromkeys(range(2), "error")
    assert sorted(ends["one"].values()) == ["error", "stop"]
    assert set(ends["good"].values()) == {"length"}
    assert Counter(o.request for o in outputs if o.done) == Counter(numbers.values())
    m = scheduler.metrics
    assert (m.failed, m.finished, m.added) == (4, 1, 5)
    assert scheduler.pool.used == 0


def test_logits_that_are_no_numbers_end_their_request_only():
    scheduler, model = served()
    step = model.step

    def spoiled(batch):
        logits = step(batch)
        logits[: len(logits) - 1] = np.nan
        return logits

    model.step = spoiled
    bad = [scheduler.add(Request([1, 2], Sampling(max_new_tokens=3))), scheduler.add(Request([1, 3], Sampling(max_new_tokens=3, beams=2)))]
    good = Request([1, 2, 4], Sampling(max_new_tokens=3))
    number = scheduler.add(good)
    outputs = list(scheduler.run())
    assert {o.request for o in outputs if o.error and "no token is possible" in o.error} == set(bad)
    assert tokens_of(outputs)[number, 0] == alone(good)[0]


# Metrics


def test_metrics():
    ticks = itertools.count()
    scheduler, _ = served(blocks=16, size=4, token_budget=8, clock=lambda: float(next(ticks)))
    scheduler.add(Request([1] * 12, Sampling(max_new_tokens=3)))  # added at 0, begun at 1, steps end at 2, 3, 4, 5
    list(scheduler.run())
    m = scheduler.metrics
    assert (m.steps, m.added, m.finished, m.prompt_tokens, m.computed_tokens, m.generated_tokens) == (4, 1, 1, 12, 14, 3)
    assert list(m.queue) == [1.0]
    assert list(m.first_token) == [3.0]
    assert list(m.between) == [1.0, 1.0]
    assert m.cache_used == 4 / 16 == m.cache_peak
    found = m.summary()
    assert found["between_p99"] == 1.0
    assert found["first_token_mean"] == 3.0
    assert "queue" not in found
    assert "between_mean" not in type(m)().summary()


@pytest.mark.slow
def test_what_scheduling_costs_beside_the_model():
    """Less than half a millisecond for 32 sequences; printed by `python tests/fake_model.py`, asserted loosely for loaded machines."""
    model = FakeModel(4096, 16)
    model.step = lambda batch: np.zeros((len(batch.logit_rows), VOCABULARY), np.float32)
    scheduler = Scheduler(model, BlockPool(4096, 16))
    for _ in range(32):
        scheduler.add(Request([1] * 14, Sampling(max_new_tokens=200)))
    scheduler.step()
    started = time.perf_counter()
    for _ in range(100):
        scheduler.step()
    assert (time.perf_counter() - started) / 100 < 0.005
