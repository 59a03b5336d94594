"""The text generator: prompts in, tokens and text out; whole, as they come, many at once, from the command line."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from decoder import BY_RANGE, POSITIONS, VOCABULARY, WINDOW, decoder
from greedy import greedy

import rewrite
from rewrite.cli import main
from rewrite.cli_generate import parse_memory
from rewrite.errors import RewriteError
from rewrite.runtime.bench_generate import measure
from rewrite.runtime.generator import Choice
from rewrite.runtime.plan_model import PlanModel

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]
LENGTHS = (1, 3, 8, 5, 17, 2, 24, 11)
TEMPLATE = """{% if messages[0]['content'] == 'w9' %}{{ raise_exception('not w9') }}{% endif %}
{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer of whole words, as transformers writes it, with a chat template."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["<eos>", "user", "system", *WORDS])}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    target = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", chat_template=TEMPLATE).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def plans(tmp_path_factory, folder):
    """The same model as a plan for token ids, and as one for text whose token 0 ends it."""
    target = tmp_path_factory.mktemp("plans")
    model = rewrite.optimize(decoder(positions=BY_RANGE), generate=True, block_size=4).model
    rewrite.build(model, target / "ids", engines=False)
    entry = model.proto.metadata_props.add()
    entry.key, entry.value = "rewrite.eos", "[0]"
    rewrite.build(model, target / "text", engines=False, tokenizer=folder)
    return target


def prompts():
    rng = np.random.default_rng(3)
    return [[int(t) for t in rng.integers(0, VOCABULARY, n)] for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(plans):
    """One by one, by a plain loop."""
    model = PlanModel(rewrite.Plan(plans / "ids"), 1 << 20)
    return [greedy(model, [p], 20, chunk=64)[0] for p in prompts()]


def test_the_expected_texts_differ(expected):
    assert len({tuple(t) for t in expected}) == len(LENGTHS)
    assert len({t for text in expected for t in text}) > 15


@pytest.mark.parametrize("options", [{}, {"token_budget": 7}, {"seats": 2}, {"kv_memory": 12 * 4 * 2 * 16 * 4}, {"reuse": False}], ids=str)
def test_together_as_one_by_one(plans, expected, options):
    """Chunks, few seats, a cache so small that texts wait and are preempted: the tokens are the same."""
    generator = rewrite.Generator(plans / "ids", **{"kv_memory": 1 << 20, **options})
    made = generator.generate(prompts(), max_new_tokens=20)
    assert [g.tokens for g in made] == expected
    assert [g.prompt for g in made] == prompts()
    assert {g.choices[0].finished for g in made} == {"length"}
    generator.scheduler.pool.check()
    assert generator.scheduler.pool.used == 0
    if "kv_memory" in options:
        assert generator.model.blocks == 12
        assert generator.stats()["preempted"] > 0
    assert generator.generate(prompts()[6], max_new_tokens=20)[0].tokens == expected[6]  # alone and in chunks: steps that want no logits


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A plan whose only layer looks 5 tokens back: blocks before the window are given back."""
    result = rewrite.optimize(decoder(attention=WINDOW), generate=True, block_size=2)
    assert result.report.generator["layers"][0]["window"] == 5
    return rewrite.build(result.model, tmp_path_factory.mktemp("windowed") / "plan", engines=False)


@pytest.mark.parametrize("kind", ["whole", "windowed"])
def test_random_schedules_change_no_token(plans, windowed, kind):
    """Random budgets, seats, sizes of the cache, arrivals, priorities and cancellations: each text is as it is alone."""
    plan = windowed if kind == "windowed" else rewrite.Plan(plans / "ids")
    fewest = 12  # blocks of 4 hold the longest text; of 2 the windows of several, so that nobody is ever thrown out
    alone, texts = rewrite.Generator(plan, kv_memory=1 << 20, reuse=False), {}
    preempted = reused = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        blocks = int(rng.integers(fewest, 2 * fewest))
        options = {"token_budget": int(rng.integers(4, 40)), "seats": int(rng.integers(3, 9)), "reuse": bool(rng.integers(2))}
        generator = rewrite.Generator(plan, kv_memory=blocks * alone.model.block_bytes, **options)
        start = rng.integers(0, VOCABULARY, 12).tolist()
        choices, left, cancelled = {}, 10, set()
        while left or generator.scheduler.unfinished:
            if left and rng.random() < 0.8:
                prompt = tuple(start[: rng.integers(0, 13)] + rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist())
                choice = Choice()
                number = generator.add(generator.request(prompt, None, True, {"max_new_tokens": int(rng.integers(1, 25))}), choice.add)
                choices[number] = prompt, choice
                left -= 1
            if choices and rng.random() < 0.05:
                number = int(rng.choice(list(choices)))
                cancelled.add(number)
                generator.cancel(number)
            generator.step()
            generator.scheduler.pool.check()
        assert generator.scheduler.pool.used == 0
        for number, (prompt, choice) in choices.items():
            if prompt not in texts:
                texts[prompt] = alone.generate(prompt, max_new_tokens=24)[0].tokens
            assert choice.tokens == texts[prompt][: len(choice.tokens)]
            assert choice.finished == "length" or number in cancelled
        preempted += generator.scheduler.metrics.preempted
        reused += generator.scheduler.metrics.reused_tokens
    assert preempted > 3 or kind == "windowed"
    assert reused > 50


def test_a_prefix_is_computed_once(plans):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    first = generator.generate(prompts()[6], max_new_tokens=5)
    assert generator.stats()["reused_tokens"] == 0
    assert generator.generate(prompts()[6], max_new_tokens=5) == first
    assert generator.stats()["reused_tokens"] == 20  # whole blocks of the 24


def test_a_stream_is_what_generate_returns(plans, expected):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)

    async def one(prompt):
        return [t async for output in generator.stream(prompt, max_new_tokens=20) for t in output.tokens]

    async def everything():
        return await asyncio.gather(*map(one, prompts()))

    assert asyncio.run(everything()) == expected
    assert generator.stats()["steps"] < 60  # in flight together: one by one it were 160
    assert [t for output in generator.iterate(prompts()[2], max_new_tokens=20) for t in output.tokens] == expected[2]


def test_threads_share_a_generator(plans, expected):
    generator, found = rewrite.Generator(plans / "ids", kv_memory=1 << 20), {}

    def work(i):
        found[i] = generator.generate(prompts()[i], max_new_tokens=20)[0].tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(LENGTHS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(LENGTHS))] == expected


def test_who_stops_listening_gives_the_blocks_back(plans):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    outputs = generator.iterate(prompts()[4], max_new_tokens=50)
    next(outputs)
    assert generator.scheduler.pool.used > 0
    outputs.close()
    assert generator.scheduler.pool.used == 0

    async def one():
        async for _ in generator.stream(prompts()[4], max_new_tokens=50):
            break

    asyncio.run(one())
    generator.scheduler.pool.check()
    assert generator.scheduler.pool.used == 0


def test_a_stream_that_is_cancelled_while_its_prompt_is_read_leaves_nothing(plans, monkeypatch):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    request, reading = generator.request, threading.Event()

    def slow(*given):
        reading.set()
        time.sleep(0.1)
        return request(*given)

    monkeypatch.setattr(generator, "request", slow)

    async def one():
        task = asyncio.ensure_future(anext(generator.stream(prompts()[4], max_new_tokens=50)))
        await asyncio.to_thread(reading.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(one())  # waits for its threads
    generator.step()
    assert generator.scheduler.metrics.cancelled == generator.scheduler.metrics.added == 1
    assert (generator.scheduler.unfinished, generator.scheduler.pool.used) == (0, 0)


def test_a_listener_that_is_gone_takes_nothing_from_the_others(plans, expected):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20, lookahead=4)
    loop = asyncio.new_event_loop()
    stream = generator.stream(prompts()[4], max_new_tokens=50)
    loop.run_until_complete(anext(stream))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()  # its streams were not
    heard: list[int] = []

    def deaf(output):
        if heard:
            raise ConnectionError("nobody there")
        heard.append(output.request)

    number = generator.add(generator.request(prompts()[2], None, False, {"max_new_tokens": 20}), deaf)
    found, errors = [], []
    generator.add(generator.request(prompts()[5], None, False, {"max_new_tokens": 20}), lambda output: found.extend(output.tokens))
    while generator.scheduler.unfinished:
        try:
            generator.step()
        except ConnectionError as error:
            errors.append(str(error))
    assert (found, heard, errors) == (expected[5], [number], ["nobody there"])
    assert generator.scheduler.metrics.cancelled == 2
    assert (generator.scheduler.pool.used, generator._sinks) == (0, {})


def test_who_finds_its_request_over_has_all_outputs(plans):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    there = []  # whether other threads see the request as under way while its last output is handed over
    number = generator.add(generator.request([1, 2], None, False, {"max_new_tokens": 3}), lambda output: there.append(output.request in generator._sinks))
    while number in generator._sinks:
        generator.step()
    assert there == [True, True, True]


def test_hooks_and_the_collector_may_cancel_in_the_middle_of_a_step(plans, expected):
    """An iterator that nobody holds any more is closed wherever Python collects, perhaps by the thread that is in a step."""
    generator, cycle = rewrite.Generator(plans / "ids", kv_memory=1 << 20), []
    cycle += [cycle, generator.iterate(prompts()[4], max_new_tokens=50)]
    next(cycle[1])
    numbers, heard = [], []
    for i in (2, 5):
        number = generator.add(generator.request(prompts()[i], None, True, {"max_new_tokens": 20}), lambda output: (heard.append(output.request), generator.cancel(numbers[0])))
        numbers.append(number)
    del cycle

    def hook(tokens):
        gc.collect()
        generator.cancel(numbers[1])
        return range(int(generator.stats()["added"]), VOCABULARY)

    done = []
    work = threading.Thread(target=lambda: done.extend(generator.generate(prompts()[0], max_new_tokens=4, allowed=hook)[0].tokens), daemon=True)
    work.start()
    work.join(10)
    assert (len(done), set(heard)) == (4, {numbers[0]})
    assert generator.stats()["cancelled"] == 3
    generator.step()
    assert (generator.scheduler.pool.used, generator.scheduler.unfinished) == (0, 0)


def test_a_hook_that_generates_is_told_so(plans, expected):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    other, made = rewrite.Generator(plans / "ids", kv_memory=1 << 20), []

    def work():
        for asked in (other, generator):
            made.append(generator.generate(prompts()[2], max_new_tokens=3, allowed=lambda tokens, g=asked: g.generate(prompts()[2], max_new_tokens=1)[0].tokens)[0].choices[0])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    assert made[0].tokens == expected[2][:1] * 3
    assert "called by a hook or a sink of the same generator" in made[1].error


def test_the_end_of_text_ends_it(plans, expected):
    """Token 0 is the end: what comes after it in the text without end is not generated."""
    generator = rewrite.Generator(plans / "text", kv_memory=1 << 20)
    made = generator.generate(prompts(), max_new_tokens=20)
    for generation, whole in zip(made, expected, strict=True):
        end = whole.index(0) + 1 if 0 in whole else 20
        assert generation.tokens == whole[:end]
        assert generation.choices[0].finished == ("stop" if 0 in whole else "length")
    assert [g.tokens for g in generator.generate(prompts(), max_new_tokens=20, ignore_eos=True)] == expected


def test_a_text_that_is_no_number_harms_no_other(tmp_path, expected):
    """Token 7 is NaN: its text ends with an error, and neither who is in flight with it nor who gets its blocks notices."""
    model = decoder(positions=BY_RANGE)
    table = next(i for i in model.graph.initializer if i.name == "table")
    values = onnx.numpy_helper.to_array(table).copy()
    values[7] = np.nan
    table.CopyFrom(onnx.numpy_helper.from_array(values, "table"))
    plan = rewrite.build(rewrite.optimize(model, generate=True, block_size=4, verify=False).model, tmp_path / "plan", engines=False, verify=False)
    generator = rewrite.Generator(plan, kv_memory=1 << 20)
    whole = [i for i, (prompt, text) in enumerate(zip(prompts(), expected, strict=True)) if 7 not in prompt + text]
    assert len(whole) > 3
    for given in (prompts(), list(reversed(prompts()))):
        made = generator.generate([[7, 7, 7, 7, 7], *given], max_new_tokens=20)
        assert "no token is possible" in made[0].choices[0].error
        assert all(made[1 + i].tokens == expected[prompts().index(given[i])] for i in range(8) if prompts().index(given[i]) in whole)


def test_text_in_and_out(plans):
    generator = rewrite.Generator(plans / "text", kv_memory=1 << 20)
    by_text = generator.generate("w1 w5 w9", max_new_tokens=6, ignore_eos=True)[0]
    assert by_text.prompt == [4, 8, 12]
    by_ids = generator.generate([4, 8, 12], max_new_tokens=6, ignore_eos=True)[0]
    assert by_ids.tokens == by_text.tokens
    assert by_text.text == " " + generator.tokenizer.decode(by_text.tokens)  # the prompt and the text make one text
    chat = generator.generate([{"role": "user", "content": "w1 w5"}], max_new_tokens=2)[0]
    assert chat.prompt == [1, 4, 8, 10]
    pieces = [o.text for o in generator.iterate("w1 w5 w9", max_new_tokens=6, ignore_eos=True)]
    assert "".join(pieces) == by_text.text
    assert len(pieces) == 6


FIRST_PROMPTS = """
import sys, threading
import rewrite
assert "transformers" not in sys.modules
generators = [rewrite.Generator(sys.argv[1], kv_memory=1 << 20) for _ in range(2)]
together, made = threading.Barrier(6), []

def work(generator):
    together.wait()
    made.append(generator.generate("w1 w2", max_new_tokens=2)[0].tokens)

threads = [threading.Thread(target=work, args=(generators[i % 2],)) for i in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(made) == 6 and made[1:] == made[:-1], made
"""


def test_the_first_prompts_may_come_from_several_threads(plans):
    done = subprocess.run([sys.executable, "-c", FIRST_PROMPTS, str(plans / "text")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("text", ["", "a\nb"])
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(plans, monkeypatch, text):
    def fail(*_, **__):
        raise AssertionError(text)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(RewriteError, match=r"tokenizer: the tokenizer cannot be loaded: AssertionError:"):
        rewrite.Generator(plans / "text", kv_memory=1 << 20).generate("w1")


def test_options_reach_the_sampler(plans):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    options = {"max_new_tokens": 12, "temperature": 40.0, "seed": 5, "n": 3, "logprobs": 2}
    made = generator.generate([4, 8], rewrite.Sampling(top_k=20), **options)[0]
    again = generator.generate([[9, 9, 9], [4, 8]], rewrite.Sampling(top_k=20), **options)[1]
    assert [c.tokens for c in made.choices] == [c.tokens for c in again.choices]
    assert len({tuple(c.tokens) for c in made.choices}) == 3
    assert len(made.choices[0].logprobs) == 12
    beams = generator.generate([4, 8], beams=3, n=2, max_new_tokens=5)[0].choices
    assert beams[0].score >= beams[1].score


WRONG = [
    ([[]], {}, "the prompt is empty"),
    ([[1, VOCABULARY]], {}, f"the prompt has token {VOCABULARY}"),
    ([[1]], {"temprature": 1}, "there is no option 'temprature'"),
    ([[1]], {"temperature": -1}, "temperature"),
    ([[1]], {"stop": None}, "stop is None; it has to be a list of strings"),
    ([[1]], {"stop": ["."]}, "build the plan with --tokenizer"),
    ([[1]], {"bad_words": [None]}, r"bad_words is \[None\]; it has to be a list of lists"),
    ([[1]], {"temperature": 10**400}, "it has to be a number at least 0"),
    ([[1]], {"logit_bias": {1: 10**400}}, "its values have to be finite in float32"),
    ([[1]], {"logit_bias": {1: 1e39}}, "its values have to be finite in float32"),
    ([[1]], {"max_new_tokens": POSITIONS}, f"are more than the model's {POSITIONS}"),
    (["words"], {}, "the plan has no tokenizer"),
    (5, {}, "a prompt is a text"),
    ([None], {}, "a prompt is a text"),
    ([[1], 5], {}, "a prompt is a text"),
    ([1, None], {}, "the prompt has to be a list of tokens"),
    ([[1], [1] * 200], {}, "are more than the model's"),
]


@pytest.mark.parametrize(("given", "reason"), [
    ([{"role": "user", "content": "w9"}], "chat template does not take these messages: TemplateError: not w9"),
    ([{"role": "user", "content": "w1"}, "w2"], "a dialogue holds messages"), ([[1, {"role": "user", "content": "w1"}]], "a dialogue holds messages"), (b"w1", "is bytes"),
])  # fmt: skip
def test_what_is_no_dialogue_is_refused(plans, given, reason):
    with pytest.raises(RewriteError, match=reason):
        rewrite.Generator(plans / "text", kv_memory=1 << 20).generate(given)


@pytest.mark.parametrize(("given", "options", "reason"), WRONG, ids=[w[2] for w in WRONG])
def test_what_cannot_be_served_is_refused(plans, given, options, reason):
    generator = rewrite.Generator(plans / "ids", kv_memory=1 << 20)
    with pytest.raises(RewriteError, match=reason):
        generator.generate(given, **options)
    assert generator.scheduler.pool.used == 0
    assert generator.scheduler.unfinished <= 1  # the notice that the first was cancelled


@pytest.mark.parametrize("option", ["kv_memory", "token_budget", "seats", "lookahead"])
@pytest.mark.parametrize("value", ["4G", 2e6])
def test_sizes_are_whole_numbers(plans, option, value):
    with pytest.raises(RewriteError, match=f"Generator: {option} is .*; it has to be a whole number"):
        rewrite.Generator(plans / "ids", **{option: value})


def test_a_plan_that_generates_no_text(tmp_path):
    plan = rewrite.build(rewrite.optimize(decoder()).model, tmp_path / "plan", engines=False)
    with pytest.raises(RewriteError, match="not a text generator"):
        rewrite.Generator(plan)


def test_a_plan_runs_without_touching_its_inputs(plans):
    """`Plan.run` takes caches as inputs and gives new ones; only the generator's own are updated in place."""
    plan = rewrite.Plan(plans / "ids")
    caches = {n: np.zeros((3, 4, 2, 8), np.float32) for n in ("key_cache_0", "value_cache_0")}
    feeds = {
        "input_ids": np.array([[1, 2]]), "position_ids": np.array([[0, 1]]), "slots": np.array([4, 5], np.int32), "block_tables": np.array([[1]], np.int32),
        "query_starts": np.array([0, 2], np.int32), "context_lengths": np.array([2], np.int32), "logit_rows": np.array([1]),
    }  # fmt: skip
    results = plan.run({**feeds, **caches})
    assert not caches["key_cache_0"].any()
    assert results["keys_0"][1, :2].all()
    assert not results["keys_0"][[0, 2]].any()
    assert results["logits"].shape == (1, VOCABULARY)


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command(plans, tmp_path):
    shown = call("generate", plans / "text", "--prompt", "w1 w5 w9", "--max-new-tokens", 6, "--ignore-eos", "--no-chat", "--kv-memory", "1M", "--stats")
    generator = rewrite.Generator(plans / "text", kv_memory=1 << 20)
    text = generator.generate("w1 w5 w9", max_new_tokens=6, ignore_eos=True)[0].text
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"w1 w5 w9{text}\n"
    assert text.startswith(" ")
    assert "6 tokens in" in shown.stderr
    (tmp_path / "prompts").write_text("w1 w5\n\nw2\n")
    made = json.loads(call("generate", plans / "text", "--prompts", tmp_path / "prompts", "--tokens", "4,5", "--system", "w3", "--max-new-tokens", 2, "--kv-memory", "1M", "--json").stdout)
    assert [m["prompt"] for m in made] == [[2, 6, 1, 4, 8, 10], [2, 6, 1, 5, 10], [4, 5]]
    assert call("generate", plans / "ids", "--tokens", "4,5", "--max-new-tokens", 2, "--kv-memory", "1M").stdout.count(",") == 1


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--tokens", "a"], "write whole numbers"), ([], "there is no prompt"), (["--prompt", "w1"], "no tokenizer"), (["--tokens", "1", "--kv-memory", "much"], "write a number of bytes"),
    (["--tokens", "1", "--kv-memory", "10"], "a block of keys and values takes"), (["--tokens", "1", "--device", "cuda"], "device cuda needs CuPy"),
    (["--tokens", "1", "--system", "w2"], "there is no --prompt that it could stand before"), (["--tokens", "1", "--stop", "."], "build the plan with --tokenizer"),
    (["--prompts", "none"], "cannot be read"), (["--tokens", "-5"], "the prompt has token -5"),
    (["--tokens", "1", "--kv-memory", "4000000G"], "of the 4096000000 MiB asked for; give less with --kv-memory"),
    (["--tokens", "1", "--n", "100000"], "n is 100000; it has to be a whole number, at least 1 and at most 1024"),
])  # fmt: skip
def test_wrong_calls_are_one_line(plans, arguments, reason):
    shown = call("generate", plans / "ids", *arguments)
    assert shown.exit_code == 2
    assert reason in shown.stderr
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(("arguments", "reason"), [
    (["--prompt", "\udcff w1"], "character 1 is no text"),
    (["--prompt", "w1", "--system", "w2\udcff"], "character 3 is no text"),
    (["--prompt", "w1", "--system", "w9"], "TemplateError: not w9"), (["--prompt", "w1", "--no-chat", "--temperature", -1], "temperature is -1.0"),
    (["--tokens", "-5"], "the prompt has token -5"), (["--prompt", "", "--no-chat"], "the prompt is empty"),
])  # fmt: skip
def test_a_refused_prompt_is_not_echoed(plans, arguments, reason):
    shown = call("generate", plans / "text", *arguments, "--kv-memory", "1M")
    assert (shown.exit_code, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert reason in shown.stderr


@pytest.mark.parametrize("closed", [True, False])
def test_output_that_cannot_be_written_is_one_line(plans, closed):
    """A full disk; and a standard output that is not there, which nobody misses."""
    command = [sys.executable, "-m", "rewrite.cli", "generate", str(plans / "ids"), "--tokens", "1,2", "--max-new-tokens", "4", "--kv-memory", "1M"]
    shell = ["sh", "-c", 'exec "$@" ' + (">&-" if closed else "> /dev/full"), "sh"]
    done = subprocess.run([*shell, *command], stderr=subprocess.PIPE, text=True, timeout=60)
    line = "rewrite: standard output cannot be written: No space left on device; make room, or send it elsewhere\n"
    assert (done.returncode, done.stderr) == ((0, "") if closed else (2, line))


def test_a_file_of_prompts_may_begin_with_a_byte_order_mark(plans, tmp_path):
    told = []
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / name).write_text("w1 w2\nw3\n", encoding=encoding)
        told.append(CliRunner().invoke(main, ["generate", str(plans / "text"), "--prompts", str(tmp_path / name), "--no-chat", "--max-new-tokens", "4", "--kv-memory", "1M"]).stdout)
    assert told[0] == told[1]
    assert told[0].startswith("w1 w2 ->")


def test_a_model_that_is_fused_already_becomes_a_generator(tmp_path):
    rewrite.optimize(decoder()).model.save(tmp_path / "fused.onnx")
    shown = call("optimize", tmp_path / "fused.onnx", "--generate", "-o", tmp_path / "made.onnx")
    assert shown.exit_code == 0
    assert "verified against the original, texts in ragged steps" in shown.stdout
    assert "unchanged" not in shown.stdout
    rewrite.Generator(rewrite.build(tmp_path / "made.onnx", tmp_path / "plan", engines=False), kv_memory=1 << 20)


def test_an_end_of_text_beyond_the_vocabulary_ends_nothing(tmp_path, plans, expected):
    """Small models that keep the configuration of a large one."""
    model = rewrite.optimize(decoder(positions=BY_RANGE), generate=True).model
    entry = model.proto.metadata_props.add()
    entry.key, entry.value = "rewrite.eos", f"[{VOCABULARY}, 50256]"
    generator = rewrite.Generator(rewrite.build(model, tmp_path / "plan", engines=False), kv_memory=1 << 20)
    assert generator.eos == ()
    assert len(generator.generate([1, 2, 3], max_new_tokens=5)[0].tokens) == 5


def test_engines_do_not_bound_what_runs_on_the_cpu(tmp_path, monkeypatch):
    """A plan with engines is built for at most 512 blocks; a pool has as many as there is memory for."""
    model = rewrite.optimize(decoder(positions=BY_RANGE), generate=True).model
    plan = rewrite.build(model, tmp_path / "plan", engines=False, profile="blocks=1:2:4,tokens=1:2:3")
    monkeypatch.setattr(rewrite.Plan, "has_engines", True)
    generator = rewrite.Generator(plan, kv_memory=1 << 20)
    assert generator.model.blocks > 4
    assert len(generator.generate([1, 2, 3, 4, 5, 6, 7, 8], max_new_tokens=5)[0].tokens) == 5


def test_a_generator_is_measured_otherwise(plans):
    shown = call("bench", plans / "ids")
    assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)
    assert "rewrite bench-generate" in shown.stderr


def test_a_tokenizer_is_for_generators(tmp_path, folder):
    with pytest.raises(RewriteError, match="no use for a tokenizer"):
        rewrite.build(rewrite.optimize(decoder()).model, tmp_path / "plan", engines=False, tokenizer=folder)
    assert not (tmp_path / "plan").exists()


def test_bench_generate(plans):
    found = measure(plans / "ids", batch=3, prompt_length=10, new_tokens=6, repeat=2, kv_memory=1 << 20)
    assert found["decode_ms"] > 0
    assert found["decode_tokens_per_second"] == pytest.approx(3000 / found["decode_ms"])
    assert found["weight_bytes"] == 4 * (16 * 32 + 2 * 16 * 16 + 32 * 16 + 16 * VOCABULARY)
    shown = call("bench-generate", plans / "ids", "--new-tokens", 4, "--prompt-length", 8, "--repeat", 1, "--kv-memory", "1M")
    assert "% of" in shown.output
    assert call("bench-generate", plans / "ids", "--kv-memory", "1K").exit_code == 2


@pytest.mark.parametrize("sizes", [{"batch": 8, "prompt_length": 30, "new_tokens": 2, "token_budget": 32}, {"batch": 12, "prompt_length": 3, "new_tokens": 4, "token_budget": 5}], ids=str)
def test_bench_generate_wants_all_texts_in_flight(plans, sizes):
    """The first ends before the last is read; fewer seats than texts."""
    with pytest.raises(RewriteError, match="no step made a token of each of the"):
        measure(plans / "ids", **sizes, repeat=1, kv_memory=1 << 20)


def test_memory_sizes():
    assert [parse_memory(t) for t in (None, "100", "2K", "1.5M", "4GiB", "3gb")] == [None, 100, 2048, 3 << 19, 4 << 30, 3 << 30]
