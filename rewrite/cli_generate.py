"""The commands `rewrite generate` and `rewrite bench-generate`."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import click

from rewrite.cli_options import key_option, rules_option
from rewrite.errors import RewriteError

if TYPE_CHECKING:
    from rewrite.runtime.generator import Generator, Prompt

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

device_option = click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
memory_option = click.option("--kv-memory", metavar="SIZE", help="Memory of a rank for keys and values: 512M, 4G; if absent, a quarter of the free memory for all on a host, of a GPU's four fifths.")
budget_option = click.option("--token-budget", type=int, help="Most tokens of a step; longer prompts are read in chunks. 256 if absent, on a GPU 2048 or what the engines take.")


def parse_memory(text: str | None) -> int | None:
    """`512M`, `4GiB` or `1000000` in bytes. Raises RewriteError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)i?b?", text.strip().lower())
    if found is None:
        raise RewriteError(f"--kv-memory {text!r}: write a number of bytes, or with a unit, for example 512M or 4G")
    return int(float(found[1]) * UNITS[found[2]])


@click.command(short_help="Generate text with a plan.")
@click.argument("plan")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to continue, or to answer (repeatable: all in flight together).")
@click.option("--prompts", "file", metavar="FILE", help="File with a prompt a line.")
@click.option("--tokens", multiple=True, metavar="IDS", help="Token ids instead of text: 2,818,5279 (repeatable).")
@click.option("--chat/--no-chat", default=None, help="Put the prompt into the tokenizer's chat template; by default if there is one.")
@click.option("--system", metavar="TEXT", help="System message of a chat.")
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", default=0, help="Draw from the k likeliest tokens.")
@click.option("--top-p", default=1.0, help="Draw from the likeliest tokens of this probability together.")
@click.option("--min-p", default=0.0, help="Draw from tokens at least this probable, as a part of the likeliest one's probability.")
@click.option("--repetition-penalty", default=1.0)
@click.option("--stop", multiple=True, metavar="TEXT", help="End where the text has this (repeatable).")
@click.option("--n", default=1, help="So many outputs of each prompt.")
@click.option("--beams", default=1, help="Beam search of this width.")
@click.option("--seed", type=int, help="The same seed gives the same tokens.")
@click.option("--ignore-eos", is_flag=True, help="Go on where the model ends its text.")
@click.option("--world", type=click.IntRange(1, 1), help="1: compute all ranks of a plan for several in this process, in turn (docs/parallel.md).")
@device_option
@memory_option
@budget_option
@click.option("--stats", is_flag=True, help="Print tokens a second, latencies and the use of the cache, on standard error.")
@key_option
@rules_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def generate(plan: str, prompts: tuple[str, ...], file: str | None, tokens: tuple[str, ...], chat: bool | None, system: str | None, device: str, kv_memory: str | None,
             token_budget: int | None, stats: bool, as_json: bool, ignore_eos: bool, world: int | None, key: str | None, files: tuple[str, ...], **options: Any) -> None:  # fmt: skip
    """Generate text with PLAN, made of a decoder by `rewrite optimize --generate` and `rewrite build`.

    A single prompt's text is printed as it comes. A plan for several ranks is started by `mpirun -n N rewrite generate PLAN ...`, on GPUs
    one a rank.
    """
    from rewrite.registry import library
    from rewrite.runtime.communication import agree, connect, together
    from rewrite.runtime.generator import Generator
    from rewrite.runtime.plan import Plan

    options["stop"] = list(options["stop"])
    library(list(files))
    communicator = None if world == 1 else connect()
    with together(communicator):
        loaded, memory = Plan(plan, device=device, key=key), parse_memory(kv_memory)
        if communicator is not None:
            agree(communicator, loaded)
        elif loaded.manifest.world > 1 and world is None:
            raise RewriteError(f"{plan}: the plan is for {(n := loaded.manifest.world)} ranks; start them with `mpirun -n {n} rewrite generate ...`, or compute all in this process with --world 1")
        generator = Generator(loaded, kv_memory=memory, token_budget=token_budget, communicator=communicator)
        if communicator is not None and communicator.rank:
            generator.model.follow()
            return
        _generate(generator, prompts, file, tokens, chat, system, stats, as_json, ignore_eos, options)
        generator.model.stop()


def _generate(generator: Generator, prompts: tuple[str, ...], file: str | None, tokens: tuple[str, ...], chat: bool | None, system: str | None, stats: bool,
              as_json: bool, ignore_eos: bool, options: dict[str, Any]) -> None:  # fmt: skip
    texts = [*prompts, *(_lines(file) if file is not None else ())]
    given: list[Prompt] = [*(_chat(t, system) if _chats(generator, chat, system) else t for t in texts), *map(_ids, tokens)]
    if not given:
        raise RewriteError("generate: there is no prompt; give --prompt TEXT, --prompts FILE or --tokens IDS")
    if system is not None and not texts:
        raise RewriteError("--system: there is no --prompt that it could stand before; token ids are taken as they are")
    started = time.perf_counter()
    if len(given) == 1 and options["n"] == 1 and not as_json:
        _print_as_it_comes(generator, given[0], ignore_eos, options)
    else:
        made = generator.generate(given, ignore_eos=ignore_eos, **options)
        if as_json:
            choices = [[{"tokens": c.tokens, "text": c.text, "finished": c.finished, **({"error": c.error} if c.error else {})} for c in g.choices] for g in made]
            click.echo(json.dumps([{"prompt": g.prompt, "choices": c} for g, c in zip(made, choices, strict=True)], indent=1))
        else:
            labels = [*texts, *tokens]
            for label, generation in zip(labels, made, strict=True):
                for choice in generation.choices:
                    click.echo(f"{label} ->{choice.text}" if generator.has_tokenizer else f"{label} -> {','.join(map(str, choice.tokens))}")
        wrong = next((c.error for g in made for c in g.choices if c.error), None)
        if wrong:
            raise RewriteError(f"generate: {wrong}")
    if stats:
        _print_stats(generator, time.perf_counter() - started)


def _lines(file: str) -> list[str]:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            return [line.rstrip("\n") for line in stream if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RewriteError(f"--prompts {file}: cannot be read as text: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error


def _ids(text: str) -> list[int]:
    try:
        return [int(t) for t in text.replace(",", " ").split()]
    except ValueError as error:
        raise RewriteError(f"--tokens {text!r}: write whole numbers, for example 2,818,5279") from error


def _chats(generator: Generator, chat: bool | None, system: str | None) -> bool:
    if chat is None and generator.has_tokenizer:
        chat = generator.tokenizer.has_chat_template
    if system is not None and not chat:
        raise RewriteError("--system: the prompt is plain text, which has no system message; the tokenizer has no chat template, or --no-chat was given")
    return bool(chat)


def _chat(text: str, system: str | None) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": text}]


def _print_as_it_comes(generator: Generator, prompt: Prompt, ignore_eos: bool, options: dict[str, Any]) -> None:
    shown, separator = prompt if isinstance(prompt, str) else "", ""
    for output in generator.iterate(prompt, ignore_eos=ignore_eos, **options):
        click.echo(shown, nl=False)  # not before: a prompt or an option that is refused has its line for itself
        shown = ""
        if output.error:
            click.echo()
            raise RewriteError(f"generate: {output.error}")
        if generator.has_tokenizer:
            click.echo(output.text, nl=False)
        elif output.tokens:
            click.echo(separator + ",".join(map(str, output.tokens)), nl=False)
            separator = ","
    click.echo()


def _print_stats(generator: Generator, seconds: float) -> None:
    s, model = generator.stats(), generator.model
    click.echo(f"{s['generated_tokens']:.0f} tokens in {seconds:.1f} s, {s['generated_tokens'] / seconds:.1f} a second; {s['steps']:.0f} steps", err=True)
    if "between_p50" in s:
        click.echo(f"to the first token {1e3 * s['first_token_p50']:.0f} ms; between tokens {1e3 * s['between_p50']:.0f} ms (median), {1e3 * s['between_p95']:.0f} ms (95 %)", err=True)
    pool = model.blocks * model.block_bytes / 2**20
    click.echo(f"keys and values: {model.blocks} blocks of {model.block_size}, {pool:.0f} MiB; at most {100 * s['cache_peak']:.1f} % used; {s['reused_tokens']:.0f} tokens found again", err=True)


@click.command(name="bench-generate", short_help="Measure the speed of a plan that generates text.")
@click.argument("plan")
@click.option("--batch", default=1, show_default=True, help="Texts in flight.")
@click.option("--prompt-length", default=64, show_default=True, help="Tokens of each prompt.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens to generate for each.")
@click.option("--repeat", default=3, show_default=True, help="Runs, of which the median is told.")
@device_option
@memory_option
@budget_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def bench_generate(plan: str, batch: int, prompt_length: int, new_tokens: int, repeat: int, device: str, kv_memory: str | None, token_budget: int | None, as_json: bool) -> None:
    """Measure PLAN on random prompts: reading them, then one token of each a step, beside what the memory allows. Of a plan for several ranks
    the figures of the memory are those of one: start it by `mpirun -n N rewrite bench-generate PLAN ...`.
    """
    from rewrite.runtime.bench_generate import measure
    from rewrite.runtime.communication import agree, connect, together
    from rewrite.runtime.plan import Plan

    if min(batch, prompt_length, new_tokens - 1, repeat) < 1:
        raise RewriteError("bench-generate: --batch, --prompt-length and --repeat must be at least 1, --new-tokens at least 2")
    communicator = connect()
    with together(communicator):
        loaded = Plan(plan, device=device)
        if communicator is not None:
            agree(communicator, loaded)
        found = measure(loaded, batch, prompt_length, new_tokens, repeat, device, parse_memory(kv_memory), token_budget, communicator)
    if not found:
        return
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    click.echo(f"prompts: {batch} x {prompt_length} tokens in {found['prefill_ms']:.1f} ms, {found['prefill_tokens_per_second']:.0f} tokens a second")
    share = 100 * found["decode_gb_per_second"] / found["memory_gb_per_second"]
    speed = f"{found['decode_gb_per_second']:.1f} GB/s of weights, {share:.0f} % of {found['memory_gb_per_second']:.1f} measured"
    click.echo(f"tokens: {found['decode_tokens_per_second']:.1f} a second | {found['decode_ms']:.2f} ms a step | {speed}")
