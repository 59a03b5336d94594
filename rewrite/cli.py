"""The command `rewrite`. Exit codes: 0 done, 1 a check failed, 2 bad input (one line, nothing written), 130 interrupted, 141 the reader of its output is gone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

import click

import rewrite
from rewrite import sandbox
from rewrite.cli_generate import bench_generate, generate
from rewrite.cli_options import key_option, rules_option
from rewrite.cli_size import plan_size
from rewrite.errors import CheckFailed, RewriteError, interrupted

if TYPE_CHECKING:
    from rewrite.model import Model
    from rewrite.optimizer import Result
    from rewrite.registry import Plugin
    from rewrite.report import Report
    from rewrite.runtime.partition import Step, ValueType
    from rewrite.runtime.plan import Plan


class Commands(click.Group):
    """Turns errors, ours and those of click, into one line on standard error and their exit code."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # new in click 8.2
                raise
            self._tell(error)
            raise SystemExit(2) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return self._invoke(ctx)
        except RewriteError as error:
            self._say(str(error))
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            self._tell(error)
            ctx.exit(2)
        except MemoryError as error:
            self._say(f"out of memory{f' ({error})' if str(error) else ''}; a model needs about three times its size, and smaller sizes of its inputs less")
            ctx.exit(2)
        except KeyboardInterrupt:
            self._say("interrupted")
            ctx.exit(130)
        except BrokenPipeError:
            sys.stdout = None  # type: ignore[assignment]  # what it still holds would be tried once more
            ctx.exit(141)
        except OSError as error:
            if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            self._say(f"standard output cannot be written: {error.strerror}; make room, or send it elsewhere")
            sys.stdout = None  # type: ignore[assignment]
            ctx.exit(2)

    def _invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ImportError as error:
            if interrupted(error):
                raise error.__cause__ from None  # type: ignore[misc]
            raise

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], self.commands, 1)
            raise click.UsageError(f"there is no command '{args[0]}'" + (f"; did you mean '{close[0]}'?" if close else ""), ctx)
        return super().resolve_command(ctx, args)

    @staticmethod
    def _say(text: str) -> None:
        try:
            click.echo(f"rewrite: {text}", err=True)
        except OSError:  # nobody reads it, or its disk is full: the exit code is told all the same
            sys.stderr = None  # type: ignore[assignment]

    def _tell(self, error: click.UsageError) -> None:
        command = error.ctx.command_path if error.ctx is not None else "rewrite"
        text = " ".join(error.format_message().split()).rstrip(".")
        self._say(f"{text[:1].lower()}{text[1:]}; `{command} --help` shows how it is called")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(rewrite.__version__, prog_name="rewrite")
def main() -> None:
    """Rewrite ONNX models for TensorRT: fuse by pattern, prove each fusion, compile, run."""


only_option = click.option("--only", multiple=True, metavar="RULE", help="Use only this rule (repeatable).")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; numbers to the right. Piped output is not cut to a terminal's width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(re.fullmatch(r"[-+\d.,e%×]*( s| ms| MB| µs)?", r[i]) for r in rows)
        made.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))  # no markup: names of a model may look like it
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160, highlight=False)
    with console.capture() as shown:  # where nobody reads it, rich ends the program with an exit code of its own
        console.print(made)
    click.echo(shown.get(), nl=False)


def _kinds(model: Model) -> dict[str, str]:
    """The dtype of each input that has to be given, by NumPy's name; that of strings is object."""
    import onnx

    initial = {i.name for i in model.proto.graph.initializer}
    needed = [i for i in model.proto.graph.input if i.name not in initial]
    return {i.name: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type).name if i.type.tensor_type.elem_type else "" for i in needed}


def _load_inputs(files: tuple[str, ...], model: Model) -> list[dict[str, Any]] | None:
    """The inputs of each file, checked against what the model takes; None if there is no file."""
    from rewrite.validity import check_feeds

    loaded = []
    for file in files:
        feeds = load_feeds(file, _kinds(model))
        try:
            check_feeds(model.proto, feeds)
        except RewriteError as error:
            raise RewriteError(f"{file}: {error}") from error
        loaded.append(feeds)
    return loaded or None


# --- export -------------------------------------------------------------------------------------------------------
@main.command(short_help="Export a PyTorch model to ONNX.")
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where to write the ONNX model.")
@click.option("--opset", default=20, show_default=True, help="ONNX opset; 20 is what PyTorch's exporters get right.")
@click.option("--exporter", type=click.Choice(["dynamo", "torchscript"]), default="dynamo", show_default=True)
@click.option("--attention", type=click.Choice(["eager", "sdpa"]), default="eager", show_default=True, help="Attention of a Hugging Face model.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with PyTorch at several shapes and paddings.")
@click.option("--no-weights", "hollow", is_flag=True, help="Of a directory with config.json alone: the graph, its weights a sparse file of zeros, for plan-size.")
@json_option
def export(source: str, output: str, opset: int, exporter: str, attention: str, verify: bool, hollow: bool, as_json: bool) -> None:
    """Export SOURCE to ONNX with dynamic batch and sequence.

    SOURCE is a local Hugging Face directory, a GGUF file (as float32), or MODULE:CALLABLE, a function without arguments that returns
    (torch.nn.Module, example inputs) or (torch.nn.Module, example inputs, dynamic shapes).
    """
    from rewrite.files import check_apart, check_target

    check_target(output)
    check_apart(output, [("the source", source)])
    with progress() as say:
        say("loading PyTorch")
        from rewrite.export.torch_export import export as run
        from rewrite.export.torch_export import load_callable

        if hollow:
            from rewrite.export.hollow import load_hollow

            loaded, verify = load_hollow(source, attention=attention), False
        elif os.path.isdir(source):
            say("loading the model")
            from rewrite.export.huggingface import load_directory

            loaded = load_directory(source, attention=attention)
        elif source.endswith(".gguf"):
            say("loading the model")
            from rewrite.export.huggingface import load_gguf

            loaded = load_gguf(source, attention=attention)
        else:
            loaded = load_callable(source)
        done = run(loaded, output, opset=opset, exporter=exporter, verify=verify, progress=say)
    if as_json:
        click.echo(json.dumps({"path": output, "opset": opset, "exporter": exporter, "error": done.error, "shapes": done.shapes}, indent=1))
        return
    if done.error is None:
        click.echo(f"NOT compared with PyTorch ({'--no-weights' if hollow else '--no-verify'})")
    else:
        sizes = "; ".join(", ".join(f"{n} {size}" for n, size in s.items()) for s in done.shapes) or "the example's sizes"
        click.echo(f"equal to PyTorch: largest relative difference {done.error:.1e}, at {sizes}")
    click.echo(f"written to {output}")


# --- optimize -----------------------------------------------------------------------------------------------------
def _plugin_key(name: str) -> str:
    name = name.lower().replace("_", "")
    return name.removeprefix("fused")


def parse_expectation(text: str) -> tuple[str, str, int]:
    """`attention=6`, `matmul_act>=12`, `matmul_act:gelu=6` as (name, comparison, count). Raises RewriteError for anything else."""
    found = re.fullmatch(r"([A-Za-z_]\w*(?::\w+)?)(=|>=|<=)(\d+)", text)
    if found is None:
        raise RewriteError(f"--expect {text!r}: write NAME=COUNT, NAME>=COUNT or NAME<=COUNT, for example attention=6")
    return found[1], found[2], int(found[3])


def check_names(expectations: list[tuple[str, str, int]], plugins: Mapping[str, Plugin], rules: set[str]) -> None:
    """Asked before the work. Raises RewriteError if an expectation names neither a plugin nor a rule, or what no node of its plugin can have."""
    import difflib

    known = {_plugin_key(p): plugin for p, plugin in plugins.items()}
    for name, _, _ in expectations:
        base, _, kind = name.partition(":")
        plugin = known.get(_plugin_key(base))
        if plugin is None and name not in rules:
            close = difflib.get_close_matches(base.lower(), sorted({*known, *rules}), 1)
            hint = f"did you mean '{close[0]}'?" if close else "`rewrite list` shows both"
            raise RewriteError(f"--expect {name}: {'no plugin' if kind else 'neither a plugin nor a rule'}; {hint}")
        if kind and plugin is not None and not any(isinstance(v, str) for v in plugin.attributes.values()):
            raise RewriteError(f"--expect {name}: plugin {plugin.name} has no attribute that is a name, as the activation of MatMulAct is; leave out ':{kind}'")
        if kind and plugin is not None and plugin.kinds and _plugin_key(kind) not in map(_plugin_key, plugin.kinds):
            near = difflib.get_close_matches(kind, plugin.kinds, 1)
            raise RewriteError(f"--expect {name}: plugin {plugin.name} has no form '{kind}'; " + (f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(plugin.kinds)}"))


def check_expectations(expectations: list[tuple[str, str, int]], report: Report, plugins: Collection[str]) -> list[str]:
    """What does not hold, a line each. A name is a plugin (`attention` for FusedAttention), one with the name that an
    attribute has (`matmul_act:gelu`), or a rule."""
    counts = {_plugin_key(p): 0 for p in plugins}
    for name, count in (report.plugins | report.kinds).items():
        counts[_plugin_key(name)] = count
    failures = []
    for name, comparison, wanted in expectations:
        key = _plugin_key(name)
        if _plugin_key(name.split(":")[0]) in counts:
            found = counts.get(key, 0)
        else:
            found = report.rules[name].applied if name in report.rules else 0
        holds = {"=": found == wanted, ">=": found >= wanted, "<=": found <= wanted}[comparison]
        if not holds:
            failures.append(f"expected {name}{comparison}{wanted}, found {found}")
    return failures


def _why_unexpected(result: Result, model: str, only: tuple[str, ...], names: list[str]) -> list[str]:
    """What may be the reason that an expectation of these names does not hold, a line each."""
    from rewrite.explain import explained

    left, misses = explained(result.model.proto, result.report)
    asked = [m for m in result.report.attempts if m.rule in names][:3]
    lines = list(dict.fromkeys([*map(str, left), *map(str, asked), *map(str, misses)]))[:10]
    lines = lines or [f"nothing else looks like a fusion; `rewrite explain {model}` tells what is fused, and with --rule RULE how near a rule comes"]
    return [f"only these rules were used: {', '.join(only)}", *lines] if only else lines


@main.command(short_help="Rewrite a model, verify it, write it.")
@click.argument("model")
@click.option("-o", "--output", metavar="FILE", help="Where to write the rewritten model.")
@rules_option
@only_option
@click.option("--expect", multiple=True, metavar="NAME=N", help="Fail (exit code 1) unless so many nodes were fused: attention=6, matmul_act:gelu>=6 (repeatable).")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check each fused site and the whole model.")
@click.option("--inputs", multiple=True, metavar="FILE", help=".npz with inputs by name, for the check of the whole model (repeatable); generated if absent.")
@click.option("--tolerance", default=1e-4, show_default=True, help="Largest relative difference of the whole model's outputs.")
@click.option("--bitwise", is_flag=True, help="Use only rules that change no bit of any result (docs/numerics.md).")
@click.option("--generate", "generator", is_flag=True, help="Make a generator of a decoder exported without a cache: paged caches, packed tokens, logits where they are wanted.")
@click.option("--block-size", default=16, show_default=True, help="Positions of a block of a generator's caches.")
@click.option("--tensor-parallel", default=1, metavar="N", help="Split the model over N ranks (docs/parallel.md); the file stays the whole model.")
@click.option("--pipeline-parallel", default=1, metavar="M", help="Cut the model into M stages, each on ranks of its own; with --tensor-parallel N, N for each.")
@click.option("--embed", is_flag=True, help="Put external weights into the file (models up to 2 GiB).")
@click.option("--report", "report_file", metavar="FILE", help="Write a JSON report: rules, matches, refusals, sites, times.")
@json_option
def optimize(model: str, output: str | None, files: tuple[str, ...], only: tuple[str, ...], expect: tuple[str, ...], verify: bool,
             inputs: tuple[str, ...], tolerance: float, bitwise: bool, generator: bool, block_size: int, tensor_parallel: int, pipeline_parallel: int, embed: bool,
             report_file: str | None, as_json: bool) -> None:  # fmt: skip
    """Rewrite MODEL with all rules, verify it, and write it to --output (which may be MODEL itself)."""
    sandbox.start()
    from rewrite.files import check_apart, check_target
    from rewrite.model import load
    from rewrite.optimizer import optimize as run
    from rewrite.registry import library

    expectations = [parse_expectation(e) for e in expect]
    for target in filter(None, (output, report_file)):
        check_target(target)
    known = library(files)
    check_names(expectations, known.plugins, {r.name for r in known.rules})
    source = load(model)
    read = [*(("a file of inputs", f) for f in inputs), *(("a rules file", f) for f in files)]
    if output:
        source.check_target(output, embed=embed)
        check_apart(output, read)
    if report_file:
        check_apart(report_file, [("the model", model), ("the output", output or model), *source.weight_files(output), *read])
    feeds = _load_inputs(inputs, source)
    result = run(
        source, rules=list(files), only=list(only) or None, verify=verify, inputs=feeds, tolerance=tolerance, explain=bool(expect), bitwise=bitwise,
        generate=generator, block_size=block_size, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel,
    )  # fmt: skip
    if not result.report.sites and not expect and not generator and tensor_parallel * pipeline_parallel == 1:  # the user will want to know why
        result = run(source, rules=list(files), only=list(only) or None, verify=verify, explain=True, bitwise=bitwise)
    report = result.report
    failures = check_expectations(expectations, report, known.plugins)

    def save() -> None:
        if not failures and output:
            result.model.save(output, embed=embed)

    if report_file:
        _write_json(report_file, report.as_json(), then=save)
    else:
        save()
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=1))
    else:
        print_report(report, model, output if not failures else None)
    if failures:
        lines = [*failures, *(f"  {line}" for line in _why_unexpected(result, model, only, [name for name, _, _ in expectations]))]
        raise CheckFailed("\n".join(lines) + ("\nnothing was written" if output else ""))
    if not as_json:
        print_unfused(result)


def _write_json(path: str, data: Any, then: Callable[[], None] = lambda: None) -> None:
    from rewrite.files import write_atomically

    write_atomically(path, lambda f: f.write((json.dumps(data, indent=1) + "\n").encode()), then)


def print_report(report: Report, model: str, output: str | None) -> None:
    """The outcome for people: rules that fired, operators before and after, and what was verified."""
    from rewrite.report import largest_error, summarize_scopes

    rows = []
    for name, stats in report.rules.items():
        for note in dict.fromkeys(s.note for s in report.sites if s.rule == name):
            sites = [s for s in report.sites if s.rule == name and s.note == note]
            becomes = (sites[0].plugin or "(plain)") + (f": {note}" if note else "")
            rows.append([stats.tier, name, becomes, str(len(sites)), largest_error(sites) if report.verified else "-", summarize_scopes([s.where for s in sites])])
    if rows:
        table("", ["tier", "rule", "becomes", "sites", "largest error", "where"], rows)
    before, after = sum(report.operators_before.values()), sum(report.operators_after.values())
    click.echo(f"\n{model}: {before} operators -> {after}, in {report.seconds - report.verify_seconds:.1f} s" if rows else f"{model}: {before} operators")
    if report.generator is not None:
        from rewrite.patterns.transform_generate import describe_generator

        click.echo(describe_generator(report.generator))
    if report.shards:
        click.echo(report.shards)
        for line in report.whole:
            click.echo(f"whole on each rank: {line}")
    for miss in report.rejected:
        click.echo(str(miss))
    for operator, nodes in report.unknown.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        click.echo(f"kept as it is: {operator} '{nodes[0]}'{more}, an operator that neither ONNX nor ONNX Runtime knows")
    click.echo(_what_was_verified(report))
    if output:
        click.echo(f"written to {output}")


def _what_was_verified(report: Report) -> str:
    if not report.sites and report.generator is None:
        return "No rule matched; the model is unchanged."
    if not report.verified:
        return "NOT verified (--no-verify)"
    if report.not_run and report.generator is not None:
        return f"each site verified; the generator was NOT run: {report.not_run}"
    if report.generator is not None:
        return f"verified against the original, texts in ragged steps: largest relative difference of a logit {report.model_error:.1e}"
    if report.not_run:
        return f"each site verified; the whole model was NOT run: {report.not_run}"
    if report.model_error is None:
        return "each site verified; the whole model was not run, because of the unknown operators"
    return f"verified against the original: largest relative difference {report.model_error:.1e}"


def print_unfused(result: Result) -> None:
    """What looks like a fusion and is none: in full if nothing was fused, else how to ask."""
    from rewrite.explain import unfused

    left = unfused(result.model.proto, result.report)
    if not left:
        return
    if result.report.sites:
        kinds = ", ".join(f"{n} × {k}" for k, n in Counter(u.kind for u in left).items())
        click.echo(f"not fused: {kinds}; `rewrite explain` tells why")
        return
    click.echo()
    table("Not fused", ["looks like", "at", "nearest rule", "why not"], [[u.kind, u.node, u.rule or "-", u.reason] for u in left])


@main.command(short_help="Tell what is not fused, and why.")
@click.argument("model")
@click.option("--rule", "rule_name", metavar="RULE", help="Every place where this rule came near, however little.")
@click.option("--node", metavar="NAME", help="What every rule says of this node, by its name in the graph.")
@rules_option
@json_option
def explain(model: str, rule_name: str | None, node: str | None, files: tuple[str, ...], as_json: bool) -> None:
    """Tell what is fused in MODEL, what looks like a fusion and is none, and why.

    MODEL may be rewritten already or not; nothing is written.
    """
    from dataclasses import asdict

    sandbox.start()
    from rewrite.explain import explained
    from rewrite.model import load
    from rewrite.optimizer import apply_rules
    from rewrite.registry import library, unknown_rule
    from rewrite.validity import all_nodes

    source = load(model)
    if node is not None and node not in {n.name or o for graph in (source.proto.graph, *source.proto.functions) for n in all_nodes(graph) for o in n.output}:
        raise RewriteError(f"{model}: it has no node '{node}'; `rewrite inspect {model} --steps` lists them")
    result = apply_rules(source, library(files), verify=True, explain=True)
    report = result.report
    if rule_name is not None and rule_name not in report.rules:
        raise RewriteError(unknown_rule(rule_name, report.rules))
    asked = rule_name is not None or node is not None

    def concerns(rule: str, *nodes: str) -> bool:
        return rule_name in (None, rule) and (node is None or any(n.endswith(f"'{node}'") for n in nodes))

    taken = [s for s in report.sites if concerns(s.rule, *s.nodes)]
    left, misses = explained(result.model.proto, report)
    left = [u for u in left if rule_name is None and concerns(u.rule, u.node)]
    if asked:
        misses = [m for m in report.attempts if concerns(m.rule, m.at, m.node, *m.covered)]
    if as_json:
        click.echo(json.dumps({"fused": [asdict(s) for s in taken], "unfused": [asdict(u) for u in left], "near_misses": [asdict(m) for m in misses]}, indent=1))
        return
    if taken:
        rows = Counter((s.rule, s.plugin or "(plain)") for s in taken)
        table("Fused", ["rule", "becomes", "sites"], [[rule, plugin, str(n)] for (rule, plugin), n in rows.items()])
    if left:
        click.echo()
        table("Not fused", ["looks like", "at", "nearest rule", "why not"], [[u.kind, u.node, u.rule or "-", u.reason] for u in left])
    if misses:
        click.echo()
        lines = [[m.rule, m.at, m.why(), *([m.there()] if asked else [])] for m in misses]
        table("Near misses" if left or asked else "Other near misses", ["rule", "at", "why not", *(["what is there"] if asked else [])], lines)
    if not left and not misses:
        of = "".join((f" of rule '{rule_name}'" if rule_name else "", f" at node '{node}'" if node else ""))
        nothing = "" if taken else "nothing more is fused; " if source.plugin_nodes() else "nothing fused; "
        click.echo(f"{nothing}no near miss{of}")


@main.command(short_help="Write a model without plugins.")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where to write the model without plugins.")
def unfuse(model: str, output: str) -> None:
    """Write MODEL without plugins: each is replaced by the subgraph it stands for."""
    sandbox.start()
    from rewrite.files import check_target
    from rewrite.functions import unfuse as run
    from rewrite.model import Model, load

    check_target(output)
    source = load(model)
    result = Model(run(source.proto), source.folder, source.name, source.external)
    result.save(output)
    click.echo(f"{model}: {sum(source.plugin_nodes().values())} plugin nodes unfused; written to {output}")


@main.command("list", short_help="List rules and plugins.")
@rules_option
@json_option
@click.option("--markdown", "as_page", is_flag=True, help="Print a page with every pattern (docs/rules.md).")
def list_(files: tuple[str, ...], as_json: bool, as_page: bool) -> None:
    """List the rules, in the order in which they are tried, and the plugins."""
    from rewrite.registry import library

    found = library(files)
    if as_page:
        from rewrite.listing import markdown

        click.echo(markdown(found), nl=False)
        return
    rules = [{"name": r.name, "tier": r.tier, "doc": r.doc.split("\n")[0], "source": r.source} for r in found.rules]
    plugins = [{"name": p.name, "doc": p.doc.split("\n")[0], "source": p.source} for p in found.plugins.values()]
    if as_json:
        click.echo(json.dumps({"rules": rules, "plugins": plugins}, indent=1))
        return
    table("Rules", ["tier", "rule", "what"], [[r["tier"], r["name"], r["doc"]] for r in rules])
    click.echo()
    table("Plugins", ["plugin", "what"], [[p["name"], p["doc"]] for p in plugins])


@main.command(short_help="Compare the outputs of two models.")
@click.argument("first")
@click.argument("second")
@click.option("--inputs", multiple=True, metavar="FILE", help=".npz with inputs (repeatable); generated if absent.")
@click.option("--tolerance", default=1e-4, show_default=True, help="Largest relative difference allowed.")
def verify(first: str, second: str, inputs: tuple[str, ...], tolerance: float) -> None:
    """Compare the outputs of two models on the same inputs; exit code 1 if they differ."""
    sandbox.start()
    from rewrite.model import load
    from rewrite.validity import check_tolerance

    check_tolerance(tolerance)
    one, other = load(first), load(second)
    error = sandbox.compare(one, other, _load_inputs(inputs, one), tolerance)
    click.echo(f"equal: largest relative difference {error:.1e} (allowed {tolerance:.0e})")


# --- plans --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Say on standard error what is being done: in place on a terminal, a line each elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stderr, highlight=False)  # this stream, even while an exporter's own output is hushed
    if not console.is_terminal:
        yield lambda line: click.echo(line, err=True)
        return
    with console.status("") as status:
        yield lambda line: status.update(line)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they would kill, end what is done meanwhile as Ctrl-C does: what is half written is removed."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    mine = threading.current_thread() is threading.main_thread()
    replaced = [n for n in (signal.SIGTERM, signal.SIGHUP) if mine and signal.getsignal(n) == signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


@main.command(short_help="Compile a model into a plan.")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="DIR", help="Directory of the plan; an older plan there is replaced.")
@click.option("--profile", multiple=True, metavar="SIZES", help="Sizes of the named dimensions: batch=1:8:32,seq=1:128:512 (smallest, best, largest; repeatable).")
@click.option("--engines/--no-engines", default=True, show_default=True, help="Compile with TensorRT; without, the plan runs on the CPU alone.")
@click.option("--tune", is_flag=True, help="Time the kernels for each step on this machine's GPU and keep the fastest.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Run the plan on the CPU and compare it with MODEL.")
@click.option("--tolerance", default=1e-4, show_default=True, help="Largest relative difference of the plan's outputs.")
@click.option("--tokenizer", metavar="DIR", help="Of a text generator: the folder of its tokenizer; by default the one that the model was exported with.")
@click.option("--sign-key", metavar="FILE", help="Sign the plan with this key (else with that of $REWRITE_PLAN_KEY, if set).")
@rules_option
@json_option
def build(
    model: str, output: str, profile: tuple[str, ...], engines: bool, tune: bool, verify: bool, tolerance: float, tokenizer: str | None, sign_key: str | None,
    files: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Compile MODEL (rewritten or not) into a plan: TensorRT engines between plugin nodes, weights, a manifest."""
    import time

    sandbox.start()
    from rewrite.registry import library
    from rewrite.runtime.build import build as run

    library(list(files))
    started = time.perf_counter()
    with ended_by_signals(), progress() as say:
        sizes = ",".join(profile) or None
        plan = run(model, output, profile=sizes, engines=engines, verify=verify, tolerance=tolerance, tokenizer=tokenizer, tune=tune, sign_key=sign_key, progress=say)
    if as_json:
        click.echo(plan.manifest.to_json(), nl=False)
        return
    print_plan(plan, False)
    click.echo(f"\n{'verified against the model' if verify else 'NOT verified (--no-verify)'}; built in {time.perf_counter() - started:.1f} s; written to {output}")


def print_plan(plan: Plan, steps: bool) -> None:
    """A plan for people: what built it, its inputs, its segments and plugins, and, if asked for, each step."""
    manifest = plan.manifest
    sizes = ", ".join(f"{what} {plan.bytes_of(what) / 1e6:.2f} MB" for what in ("weights", "engines", "segments"))
    click.echo(f"{plan.directory}: {manifest.model}, built {manifest.created} by {', '.join(f'{k} {v}' for k, v in manifest.versions.items())}{'; signed' if plan.signed else ''}")
    click.echo(f"inputs: {', '.join(f'{n} {v.dtype}{list(v.shape)}' for n, v in manifest.inputs.items())}".replace("'", ""))
    click.echo(f"profile (smallest:best:largest): {manifest.profile}; {sizes}\n")
    if manifest.generator is not None:
        from rewrite.patterns.transform_generate import describe_generator

        click.echo(f"{describe_generator(manifest.generator)}; {'with' if manifest.generator.get('tokenizer') else 'without'} a tokenizer\n")
    if manifest.world > 1:
        stages = f" in {manifest.stages} stages" if manifest.stages > 1 else ""
        how = f": start them with `mpirun -n {manifest.world} rewrite generate {plan.directory} ...`" if manifest.generator is not None else ""
        click.echo(f"for {manifest.world} ranks{stages}{how}\n")
    rows = []
    for key in dict.fromkeys(s.name for s in manifest.steps if s.kind == "segment"):
        uses = [s for s in manifest.steps if s.name == key]
        engine, nodes = manifest.files.get(f"engines/{key}.engine"), uses[0].nodes
        place = nodes[0] if len(nodes) == 1 else f"{nodes[0]} ... {nodes[-1]}"
        rows.append([key, place, str(len(nodes)), str(len(uses)), f"{engine[0] / 1e6:.2f}" if engine else "-"])
    table("", ["segment", "first found at", "nodes", "used", "engine MB"], rows)
    calls: dict[tuple[str, str], int] = {}
    for step in manifest.steps:
        if step.kind == "plugin":
            key_ = (step.name, ", ".join(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in step.attributes.items() if k != "layer"))
            calls[key_] = calls.get(key_, 0) + 1
    if calls:
        click.echo()
        table("", ["plugin", "attributes", "calls"], [[name, attributes, str(n)] for (name, attributes), n in calls.items()])
    if manifest.tuning:
        click.echo()
        rows = []
        for call, times in manifest.tuning.items():
            first, *others = sorted(times, key=times.__getitem__)
            rows.append([call, first, f"{times[first]:.1f}", ", ".join(f"{n} {times[n]:.1f}" for n in others)])
        table(f"kernels, timed on {manifest.versions.get('tuned on', '?')}", ["call", "fastest", "µs", "others, µs"], rows)
    if steps:
        click.echo()
        best = {n: r[1] for n, r in manifest.profile.ranges.items()}
        rows = [[str(i), s.name, " ".join(n or "-" for n in s.inputs), " ".join(s.outputs), *_made(s, manifest.values, best)] for i, s in enumerate(manifest.steps)]
        table("", ["step", "calls", "inputs", "outputs", "of shape", "MB at best"], rows)


def _made(step: Step, values: Mapping[str, ValueType], sizes: Mapping[str, int]) -> list[str]:
    """The shapes of what a step makes, and its megabytes at these sizes of the named dimensions; "?" if they do not follow."""
    import math

    from rewrite.verify import resolve

    def unknown() -> int:
        raise KeyError

    kinds = [values[n] for n in step.outputs]
    shapes = " ".join(f"{k.dtype}{list(k.shape)}" for k in kinds).replace("'", "")
    try:
        return [shapes, f"{sum(math.prod(resolve(d, dict(sizes), unknown) for d in k.shape) * k.numpy.itemsize for k in kinds) / 1e6:.3f}"]
    except KeyError:
        return [shapes, "?"]


@main.command(short_help="Show what is in a plan or a model.")
@click.argument("path")
@click.option("--steps", is_flag=True, help="Of a plan: each step. Of a model: each node, as Polygraphy shows layers.")
@click.option("--attributes", is_flag=True, help="Show the attributes of nodes.")
@click.option("--segment", metavar="KEY", help="Of a plan: the nodes of this segment.")
@click.option("--check", is_flag=True, help="Of a plan: compare every file with its SHA-256, the weights included.")
@key_option
@json_option
def inspect(path: str, steps: bool, attributes: bool, segment: str | None, check: bool, key: str | None, as_json: bool) -> None:
    """Show what is in PATH, a plan or a model (by Polygraphy)."""
    if not os.path.isdir(path):
        sandbox.start()
    import onnx

    from rewrite.model import load

    if not os.path.isdir(path):
        model = load(path)
        if segment is not None or check or key is not None:
            raise RewriteError(f"{path}: a model; --segment, --check and --key are for plans, which `rewrite build` makes")
        if as_json:
            click.echo(json.dumps({"opset": model.opset, "operators": model.operators(), "plugins": model.plugin_nodes()}, indent=1))
            return
        click.echo(polygraphy_text(model.proto, steps or attributes, attributes))
        if model.plugin_nodes():
            click.echo("\nplugin nodes: " + ", ".join(f"{n} {c}" for n, c in model.plugin_nodes().items()))
        return
    from rewrite.runtime.plan import Plan

    if segment is not None and as_json:
        raise RewriteError(f"{path}: --segment shows text alone; leave --json out")
    plan = Plan(path, key=key)
    if check:
        _ = plan.weights  # compared when they are wanted
    if segment is not None:
        if f"segments/{segment}.onnx" not in plan.manifest.files:
            raise RewriteError(f"{path}: it has no segment {segment!r}; `rewrite inspect {path}` lists them")
        click.echo(polygraphy_text(onnx.load_model_from_string(plan.segment(segment)), True, attributes))
    elif as_json:
        click.echo(plan.manifest.to_json(), nl=False)
    else:
        print_plan(plan, steps)


def polygraphy_text(proto: Any, layers: bool, attributes: bool) -> str:
    from polygraphy.backend.onnx.util import str_from_onnx
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.ERROR
    return str(str_from_onnx(proto, show_layers=layers, show_attrs=attributes, show_weights=False))


def load_feeds(file: str, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Arrays by input name: of an .npz file, or the only input as an .npy file. Raises RewriteError if it is neither.

    `kinds` are the dtypes of the inputs, for what such files have no word for: bfloat16, which NumPy writes as bytes, and strings.
    """
    import ml_dtypes
    import numpy as np

    def read(name: str, array: Any) -> Any:
        kind = kinds.get(name, "")
        if array.dtype.kind == "V" and array.dtype.names is None and hasattr(ml_dtypes, kind):
            own = np.dtype(getattr(ml_dtypes, kind))
            return array.view(own) if array.dtype.itemsize == own.itemsize else array
        return array.astype(object) if array.dtype.kind == "U" and kind == "object" else array

    try:
        data = np.load(file, allow_pickle=False)
        if isinstance(data, np.ndarray):
            if len(kinds) != 1:
                raise RewriteError(f"{file}: an .npy file holds one array, but there are {len(kinds)} inputs ({', '.join(kinds)}); give an .npz file")
            return {name: read(name, data) for name in kinds}
        with data:
            return {name: read(name, data[name]) for name in data.files}
    except RewriteError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each have their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no NumPy file, or holds Python objects"
        raise RewriteError(f"{file}: not a readable .npz or .npy file of arrays ({reason})") from error


def save_arrays(file: BinaryIO, arrays: Mapping[str, Any]) -> None:
    """An .npz file: `numpy.savez` takes no array of the name 'file'. Strings are written as text."""
    import zipfile

    import numpy as np

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, array.astype(str) if array.dtype.kind == "O" else array, allow_pickle=False)


@main.command(short_help="Run a plan or a model on arrays.")
@click.argument("path")
@click.option("--inputs", "file", required=True, metavar="FILE", help=".npz with the inputs by name, or .npy with the only one.")
@click.option("-o", "--output", metavar="FILE", help="Where to write the outputs, as .npz.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@key_option
@rules_option
def run(path: str, file: str, output: str | None, device: str, key: str | None, files: tuple[str, ...]) -> None:
    """Run PATH, a plan or (on the CPU) a model, on the arrays of a file."""
    if not os.path.isdir(path):
        sandbox.start()
    import numpy as np

    from rewrite.files import check_apart, check_outside, check_target, write_atomically
    from rewrite.model import load
    from rewrite.registry import library
    from rewrite.validity import check_feeds

    library(list(files))
    if output:
        check_target(output)
        check_apart(output, [("the model", path), ("the file of inputs", file)])
        check_outside(output, path)
    if os.path.isdir(path):
        from rewrite.runtime.plan import Plan

        plan = Plan(path, device=device, key=key)
        results = plan.run(load_feeds(file, {n: kind.dtype for n, kind in plan.inputs.items()}))
    elif device == "cuda":
        raise RewriteError(f"{path}: a model runs on the CPU; `rewrite build` makes a plan of it that runs on a GPU")
    else:
        model = load(path)
        feeds = load_feeds(file, _kinds(model))
        check_feeds(model.proto, feeds)
        results = sandbox.run(model, feeds)
    if output:
        write_atomically(output, lambda f: save_arrays(f, results))
    rows = []
    for name, array in results.items():
        numbers = array.size and array.dtype.kind in "fiuV"
        rows.append([name, str(array.dtype), str(list(array.shape)), *(f"{f(array.astype(np.float64)):.4g}" if numbers else "-" for f in (np.min, np.mean, np.max))])
    table("", ["output", "dtype", "shape", "min", "mean", "max"], rows)
    if output:
        click.echo(f"written to {output}")


@main.command(short_help="Measure a plan: the whole, and each part.")
@click.argument("plan")
@click.option("--size", metavar="SIZES", help="Sizes of the named dimensions, batch=8,seq=128; others as the profile calls best.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Runs before the measured ones.")
@click.option("--iterations", type=click.IntRange(1), default=50, show_default=True, help="Measured runs.")
@click.option("--json", "json_file", metavar="FILE", help="Write everything that was measured, each step included.")
@click.option("--trace", "trace_file", metavar="FILE", help="Write one run as a Chrome trace (chrome://tracing, ui.perfetto.dev).")
@key_option
@rules_option
def bench(plan: str, size: str | None, device: str, warmup: int, iterations: int, json_file: str | None, trace_file: str | None, key: str | None, files: tuple[str, ...]) -> None:
    """Measure PLAN, a plan's directory, on generated inputs: latency, throughput, each segment and plugin, against the machine's ceilings."""
    from rewrite.files import check_apart, check_outside, check_target
    from rewrite.registry import library
    from rewrite.runtime import bench as measure
    from rewrite.runtime.plan import Plan

    for target in filter(None, (json_file, trace_file)):
        check_target(target)
        check_outside(target, plan)
    if json_file and trace_file:
        check_apart(trace_file, [("the file of --json", json_file)])
    library(list(files))
    loaded = Plan(plan, device=device, key=key)
    report = measure.bench(loaded, measure.parse_sizes(size, loaded), warmup=warmup, iterations=iterations)
    print_bench(report)
    for path, data in ((json_file, report), (trace_file, measure.trace(report))):
        if path:
            _write_json(path, data)
            click.echo(f"written to {path}")


def print_bench(report: dict[str, Any]) -> None:
    """What was measured, for people: the whole, then the parts, those that take longest first."""
    memory, compute, dtype = report["ceilings"]["bytes_per_second"], report["ceilings"]["operations_per_second"], report["ceilings"]["dtype"]
    sizes = ", ".join(f"{n}={s}" for n, s in report["sizes"].items()) or "static shapes"
    click.echo(f"{report['plan']}: {report['model']} on {report['device']}; {sizes}; {report['iterations']} runs")
    click.echo(f"ceilings, measured now: {memory / 1e9:.0f} GB/s copying, {compute / 1e9:.0f} GFLOP/s in a {dtype} product\n")
    whole = report["whole"]
    ends = {"latency_us": f" | {whole['of_memory']:.0%} of the memory's, {whole['of_compute']:.0%} of the arithmetic's ceiling at p50", "call_us": ""}
    names = {"latency_us": "one run", "call_us": "with its inputs and outputs on the host"}
    for key in ("latency_us", "call_us") if report["enqueue_us"] is not None else ("latency_us",):
        click.echo(f"{names[key]}: " + ", ".join(f"{p} {report[key][p] / 1e3:.3f} ms" for p in ("p50", "p90", "p99")) + ends[key])
    if report["enqueue_us"] is not None:
        click.echo(f"enqueueing: {report['enqueue_us']:.1f} µs of the processor")
    click.echo(f"throughput: {report['runs_per_second']:.1f} runs/s, {report['items_per_second']:.1f} items/s\n")
    rows = []
    for part in report["parts"]:
        cells = [f"{part['bytes_per_second'] / 1e9:.1f}", f"{part['of_memory']:.0%}", f"{part['operations_per_second'] / 1e9:.1f}", f"{part['of_compute']:.0%}"]
        name = part["name"] if part["kind"] == "plugin" else f"segment {part['name']}"
        rows.append([name, str(part["calls"]), f"{part['us'] / 1e3:.3f} ms", f"{part['share']:.0%}", *cells])
    table("", ["part", "calls", "time", "share", "GB/s", "of memory", "GFLOP/s", "of compute"], rows)
# --- text ---------------------------------------------------------------------------------------------------------
main.add_command(generate)
main.add_command(bench_generate)
main.add_command(plan_size)


if __name__ == "__main__":
    main()
