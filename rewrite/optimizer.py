"""The main entry: load, rewrite, verify."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from rewrite import sandbox
from rewrite.driver import Driver, all_graphs
from rewrite.errors import CheckFailed, RewriteError, Unfinished, blame
from rewrite.functions import FunctionTable
from rewrite.graph import Graph
from rewrite.model import Model, close_graph, load, open_graph, overridable
from rewrite.registry import TIERS, Library, Rule, library
from rewrite.report import Report
from rewrite.shapes import SymbolicShapes
from rewrite.validity import check_feeds, check_tolerance, no_tensor, unknown_operators
from rewrite.weights import external_size

LARGEST_RUN = 2 << 30  # bytes of external weights: a run holds those of both models in memory


@dataclass
class Result:
    """A rewritten model and what was done to it."""

    model: Model
    report: Report


def optimize(
    model: str | os.PathLike[str] | onnx.ModelProto | Model,
    *,
    rules: list[Rule | ModuleType | str | Path] | None = None,
    only: list[str] | None = None,
    verify: bool = True,
    explain: bool = False,
    inputs: list[dict[str, np.ndarray[Any, Any]]] | None = None,
    tolerance: float = 1e-4,
    bitwise: bool = False,
    generate: bool = False,
    block_size: int = 16,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> Result:
    """Rewrite a model with all known rules.

    Args:
        model: a path, a protobuf, or what `load` returned.
        rules: which rules to use beside the built-in ones and those of installed packages: rules, modules, or paths of
            Python files. None: all that this program declared with the decorator; an empty list: none of these.
        only: names of the rules to use; all if None.
        verify: check each distinct site, then the whole model against the original.
        explain: record near misses (slower).
        inputs: inputs for the check of the whole model, by input name; generated if None. The check is left out where
            the model has operators that ONNX Runtime does not know, or an input that is no tensor, and, unless inputs
            are given, where its external weights are over 2 GiB, because it takes more than twice their size in memory.
        tolerance: largest difference of the whole model's outputs, relative to the largest value of each.
        bitwise: use only rules declared exact, at sites whose check finds no bit changed (docs/numerics.md).
        generate: make a generator of a decoder that was exported without a cache: paged caches, packed tokens, logits
            where they are wanted. Then its logits, computed step by step, are compared with those of the whole texts.
        block_size: positions of a block of a generator's caches.
        tensor_parallel: split the model over so many ranks (docs/parallel.md): the result is still the whole model, and says
            what of it each rank has. Then all ranks, computed one after the other, are compared with the original.
        pipeline_parallel: cut the model into so many stages, each on ranks of its own (as many as `tensor_parallel` says).

    Returns:
        Result with the new model (the argument is not changed) and the report.

    Raises:
        RewriteError: bad input or a faulty rule, in one line.
        CheckFailed: the whole model differs from the original.
    """
    source = load(model)
    check_tolerance(tolerance)
    if isinstance(only, str):
        raise RewriteError("only: give a list of names of rules, also of a single one")
    if isinstance(inputs, Mapping):
        raise RewriteError("inputs: give a list of dictionaries, a run each, also for a single run")
    for feeds in inputs or ():
        check_feeds(source.proto, feeds)
    chosen = library(rules) if only is None else library(rules).select(only)
    if bitwise and not verify:
        raise RewriteError("bitwise: what is not verified is not known to be the same bit by bit; leave verification on")
    if generate and not 1 <= block_size <= 4096:
        raise RewriteError(f"generate: a block size of {block_size} makes no sense; use 1 to 4096, for example 16")
    if generate and (bitwise or inputs is not None):
        raise RewriteError("generate: a generator is checked on texts of its own; leave out bitwise and inputs")
    if not 1 <= tensor_parallel <= 1024 or (tensor_parallel > 1 and bitwise):
        raise RewriteError(f"tensor parallel: {tensor_parallel} ranks; use 2 to 1024, without bitwise, because sums over ranks round differently")
    if not 1 <= pipeline_parallel <= 1024 or (pipeline_parallel > 1 and bitwise):
        raise RewriteError(f"pipeline parallel: {pipeline_parallel} stages; use 2 to 1024, without bitwise, because products of parts of a batch round differently")
    ranks = tensor_parallel * pipeline_parallel
    if ranks > 1 and any(p.key == "rewrite.generator" for p in source.proto.metadata_props):
        raise RewriteError(f"{source.name}: it is a generator already; split the decoder it was made of, with generate and tensor_parallel or pipeline_parallel together")
    if any(p.key == "rewrite.shards" for p in source.proto.metadata_props):
        raise RewriteError(f"{source.name}: it is in shards already, and what its metadata say of it would no longer be right; rewrite the model that it was made of")
    result = apply_rules(source, chosen.exact() if bitwise else chosen, verify=verify, explain=explain, bitwise=bitwise)
    report = result.report
    if generate:
        result = _make_generator(source, result, library([]), verify, explain, ranks == 1, tolerance, block_size)
    if ranks > 1:
        return _split(source, result, tensor_parallel, pipeline_parallel, verify, inputs, tolerance)
    if generate:
        return result
    if verify and not report.sites:
        report.model_error = 0.0  # it is the same model
    elif verify and inputs is None and (size := external_size(source.external)) > LARGEST_RUN:
        report.not_run = f"its weights are {size / 2**30:.1f} GiB, more than the {LARGEST_RUN / 2**30:.0f} GiB up to which it is run unasked (--inputs FILE.npz runs it all the same)"
    elif verify and inputs is None and (odd := no_tensor(source.proto)):
        report.not_run = f"{odd}, and only tensors are generated"
    elif verify and not report.unknown:
        started = time.perf_counter()
        report.model_error = sandbox.compare(source, result.model, inputs, 0.0 if bitwise else tolerance, "give small inputs with --inputs FILE.npz, or leave the check out with --no-verify")
        if bitwise and report.model_error:
            raise CheckFailed(f"the rewritten model differs by {report.model_error:.1e} where --bitwise allows nothing")
        report.verify_seconds += time.perf_counter() - started
        report.seconds += time.perf_counter() - started
    return result


def _make_generator(source: Model, result: Result, known: Library, verify: bool, explain: bool, whole: bool, tolerance: float, block_size: int) -> Result:
    """The transform tier: what the rules left becomes a generator, and, unless it is no `whole` one yet, is compared with the original."""
    from rewrite.patterns.transform_generate import to_generator
    from rewrite.patterns.transform_turned import norms_by_heads, settle
    from rewrite.verify_generator import check_attentions, generator_of

    report, started = result.report, time.perf_counter()
    shapes, joins = (Library([r for r in known.rules if r.tier == tier], known.plugins) for tier in ("lift", "transform"))
    try:
        made = to_generator(result.model, lambda m: apply_rules(m, shapes, verify=verify and whole, explain=False).model, block_size)
        joined = apply_rules(norms_by_heads(made), joins, verify=verify, explain=explain)
    except (RewriteError, MemoryError):
        raise
    except Exception as error:  # as in `apply_rules`
        raise RewriteError(f"{source.name}: the model breaks ONNX's rules, or this is a bug in rewrite ({blame(error)}); `onnx.checker.check_model` tells which") from error
    report.seconds += time.perf_counter() - started
    made = settle(joined.model)
    report.take(joined.report)
    report.generator = generator_of(made.proto)
    report.operators_after, report.plugins, report.kinds = made.counts()
    size = made.proto.ByteSize() + external_size(made.external)
    if verify and whole and size > LARGEST_RUN:
        report.not_run = f"its weights are {size / 2**30:.1f} GiB, more than the {LARGEST_RUN / 2**30:.0f} GiB up to which a generator is run"
    if verify and whole:
        started = time.perf_counter()
        check_attentions(made.proto, known.plugins["PagedAttention"])
        if not report.not_run:
            report.model_error = sandbox.compare_generator(source, made, tolerance)
        report.verify_seconds += time.perf_counter() - started
        report.seconds += time.perf_counter() - started
    return Result(made, report)


def _split(source: Model, result: Result, world: int, stages: int, verify: bool, inputs: list[dict[str, np.ndarray[Any, Any]]] | None, tolerance: float) -> Result:
    """The model in shards and stages; as it is, and as all ranks compute it, compared with the original."""
    from rewrite.patterns.transform_pipeline import to_stages
    from rewrite.patterns.transform_shard import to_shards
    from rewrite.shards import all_ranks, describe_shards
    from rewrite.verify_generator import check_attentions

    report, started = result.report, time.perf_counter()
    try:
        made = result.model
        if world > 1:
            made, report.whole = to_shards(made, world)
        if stages > 1:
            made = to_stages(made, stages)
        together = all_ranks(made)
    except (RewriteError, MemoryError):
        raise
    except Exception as error:  # as in `apply_rules`
        raise RewriteError(f"{source.name}: the model breaks ONNX's rules, or this is a bug in rewrite ({blame(error)}); `onnx.checker.check_model` tells which") from error
    report.shards = describe_shards(made)
    report.operators_after, report.plugins, report.kinds = made.counts()
    report.seconds += time.perf_counter() - started
    size = made.proto.ByteSize() + external_size(made.external)
    if not verify:
        return Result(made, report)
    if size > LARGEST_RUN:
        report.not_run = f"its weights are {size / 2**30:.1f} GiB, more than the {LARGEST_RUN / 2**30:.0f} GiB up to which it is run"
        return Result(made, report)
    started = time.perf_counter()
    if report.generator is not None:
        check_attentions(made.proto, library([]).plugins["PagedAttention"])
    for model in (made, together):
        try:
            if report.generator is not None:
                worst = sandbox.compare_generator(source, model, tolerance)
            else:
                worst = sandbox.compare(source, model, inputs, tolerance, "give small inputs with --inputs FILE.npz, or leave the check out with --no-verify")
        except Unfinished:
            raise
        except RewriteError as error:  # of ONNX Runtime, where a rank's model does not fit together
            if model is made or isinstance(error, CheckFailed):
                raise
            raise RewriteError(f"{source.name}: cannot be split over {world} ranks: a part of it computes with the whole number of heads or the whole width ({str(error)[:200]})") from error
        report.model_error = max(report.model_error or 0.0, worst)
    report.verify_seconds += time.perf_counter() - started
    report.seconds += time.perf_counter() - started
    return Result(made, report)


def apply_rules(source: Model, rules: Library, *, verify: bool, explain: bool, bitwise: bool = False) -> Result:
    """Rewrite a model with these rules, each site verified or not; the model as a whole is not run.

    Raises RewriteError for a faulty rule or an inconsistent model.
    """
    try:
        with without_collector():
            return _apply_rules(source, rules, verify, explain, bitwise)
    except (RewriteError, MemoryError):
        raise
    except Exception as error:  # operators with too few inputs, attributes of a wrong type: no step checks all of ONNX's rules
        reason = f"the model breaks ONNX's rules, or this is a bug in rewrite ({blame(error)}); `onnx.checker.check_model` tells which"
        raise RewriteError(f"{source.name}: {reason}") from error


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """A graph is hundreds of thousands of objects that stay: each pass of Python's cycle collector would visit them all for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled and not gc.get_freeze_count():
            gc.freeze()  # and back: what was made meanwhile is old now, and the next pass, over what is young, leaves it alone
            gc.unfreeze()
        if enabled:
            gc.enable()


def _apply_rules(source: Model, rules: Library, verify: bool, explain: bool, bitwise: bool) -> Result:
    report = Report()
    report.start(rules.rules)
    started = time.perf_counter()
    imported = open_graph(source)
    table = FunctionTable(list(source.proto.functions))
    driver = Driver(rules, table, report, verify, explain, bitwise)
    inputs_too = overridable(source.proto)
    kinds: dict[Any, int] = {}
    graphs = [Graph(g, source.opset, imported.names, inputs_too, kinds) for g in all_graphs(imported.graph)]
    for graph in reversed(graphs):  # outer graphs first: inner ones read their values
        SymbolicShapes(graph).run()
    for tier in TIERS:
        for graph in graphs:
            driver.run(graph, tier)
    for graph in graphs:
        graph.sort()
    result = close_graph(imported, table.functions) if report.sites else source
    imported.release(driver.made)
    for graph in graphs:
        graph.release()
    report.seconds = time.perf_counter() - started
    report.operators_before, report.unknown = source.operators(), unknown_operators(source.proto)
    report.operators_after, report.plugins, report.kinds = result.counts()
    report.verified = verify
    return Result(result, report)
