"""Applying rules to a graph until nothing changes, each change verified before it is made.

Policy for overlaps: tiers in order (lift, fuse, transform); within a tier rules of higher priority first, at every
node; rules of one priority node by node in topological order, at one node in the order of their declaration. The first
verified match wins, and its nodes are gone for the others. Readers of what changed are visited again. A rule that keeps firing is a loop: it is
stopped with an error that names it.
"""

from __future__ import annotations

import hashlib
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from rewrite import pattern as P
from rewrite.builder import GraphBuilder
from rewrite.errors import RewriteError, blame
from rewrite.functions import Body, CaptureError, FunctionTable, Signature, capture, fingerprint, given, numbered
from rewrite.graph import DOMAIN, Graph, canonical, describe, dtype_name, reads
from rewrite.match import BoundValue, Match, interior_use
from rewrite.matcher import Matcher
from rewrite.model import module_scope
from rewrite.nodes import Node, Variable
from rewrite.registry import Library, Rule
from rewrite.report import NearMiss, Report, Site, common_scope
from rewrite.shapes import is_named
from rewrite.trace import Trace
from rewrite.verify import TOLERANCE, Spec, Verdict, check_site, reference_runner, run_function, spec_of
from rewrite.worklist import Worklist

BROUGHT = 1 << 20  # elements: a constant that a replacement brings along is checked as it is, up to this size


class Driver:
    """One run of a library of rules over one model's graphs."""

    def __init__(self, library: Library, table: FunctionTable, report: Report, verify: bool, explain: bool, bitwise: bool = False):
        self.library, self.table, self.report = library, table, report
        self.verify, self.explain, self.bitwise = verify, explain, bitwise
        self.verdicts: dict[str, Verdict] = {}
        self.made: list[Node] = []  # every new node
        self._plugin_nodes: dict[tuple[Any, ...], list[Node]] = {}  # new ones, by operator and inputs
        self._signatures: dict[tuple[Any, ...], Signature] = {}  # of plugin nodes, by what of them it depends on
        self._fired: Counter[tuple[Any, ...]] = Counter()
        self._rejected = False  # the last attempt failed because the replacement does not compute the same
        self._blocked = False  # the last attempt failed only because a value inside the match has another reader

    def run(self, graph: Graph, tier: str) -> None:
        """Apply the rules of one tier to one graph until none matches."""
        graph.functions, self._builder = self.table.functions, GraphBuilder(graph, self.library.plugins)
        worklist = Worklist(graph, [r for r in self.library.rules if r.tier == tier], everything=self.explain)
        changes, limit = 0, 10 * len(graph.nodes) + 1000
        for node, rules in worklist:
            for rule in rules:
                if not self.explain and not all(map(graph.counts.get, rule.required)):
                    continue
                touched = self._try(graph, rule, node)
                if self._blocked:
                    worklist.block(node)
                if touched is None:
                    continue
                changes += 1
                if changes > limit:
                    raise RewriteError(_loop(rule, node))
                worklist.revisit(touched, [n for n in touched if n.metadata is not None] or touched)
                break

    # --- one rule at one node ------------------------------------------------------------------------------------
    def _try(self, graph: Graph, rule: Rule, node: Node) -> list[Node] | None:
        started = time.perf_counter()
        stats = self.report.rules[rule.name]
        touched: list[Node] | None = None
        covered: list[Node] = []
        bound: dict[str, Any] = {}
        self._blocked = self._rejected = False
        matches, refusal = (Matcher(graph, rule.pattern).at(node), "") if rule.find is None else self._found(graph, rule, node)
        for match in matches:
            bound = _bound(match)
            reason = self._refusal(rule, match, bound)
            covered = match.nodes
            if not reason:
                stats.matches += 1
                outrun = self._outrun(graph, rule, match) if self.explain else []
                outcome = self._apply(graph, rule, match, bound, node)
                if isinstance(outcome, list):
                    touched = outcome
                    self.report.outrun += outrun
                    break
                refusal = outcome
            elif not self._rejected:
                refusal = reason
        if touched is None and self._rejected:
            stats.rejected += 1
            self.report.missed(NearMiss(rule.name, describe(node), "replacement", "", refusal, _told(bound), covered=list(map(describe, covered))))
        elif touched is None and refusal:
            stats.refusals += 1
            self.report.missed(NearMiss(rule.name, describe(node), "check", "", refusal, _told(bound), covered=list(map(describe, covered))))
        elif touched is None and self.explain and rule.find is None and (trace := _nearest(graph, rule, node)).depth > 0:
            size = sum(map(P.size, rule.pattern))
            self.report.missed(NearMiss(rule.name, describe(node), trace.part, trace.node, trace.reason, trace.bound, trace.depth, size, trace.covered))
        stats.seconds += time.perf_counter() - started
        return touched

    def _outrun(self, graph: Graph, rule: Rule, match: Match) -> list[NearMiss]:
        """The rules that fit at a node of this match as well, but come after the rule that now takes it."""
        found, blocked = [], self._blocked
        for node in match.nodes:
            for other in self.library.rules:
                if other is rule or other.tier != rule.tier or other.find is not None or node.canonical not in other.roots:
                    continue
                for fit in Matcher(graph, other.pattern).at(node):
                    if not self._refusal(other, fit, bound := _bound(fit)):
                        why = f"priority {rule.priority} against {other.priority}" if rule.priority != other.priority else "it was declared first, or its place in the graph comes first"
                        reason = f"rule '{rule.name}' took it before ({why}); --only {other.name} leaves it to this rule"
                        found.append(NearMiss(other.name, describe(node), "outrun", "", reason, _told(bound), covered=list(map(describe, fit.nodes))))
                        break
        self._blocked = blocked
        return found

    def _found(self, graph: Graph, rule: Rule, node: Node) -> tuple[Iterable[Match], str]:
        """Where a rule that finds its matches itself fits at a node; else nothing, and the reason that it gives."""
        assert rule.find is not None
        try:
            found = rule.find(graph, node)
        except Exception as error:
            raise RewriteError(f"rule '{rule.name}' ({rule.source}): its find fails at {describe(node)}: {blame(error)}") from error
        return ([found], "") if isinstance(found, Match) else ([], found or "")

    def _refusal(self, rule: Rule, match: Match, bound: dict[str, Any]) -> str:
        reason = interior_use(match) or (_runs_back(match) if len(match.outputs) > 1 else None)
        self._blocked = self._blocked or reason is not None
        if reason is None and rule.check is not None:
            try:
                reason = rule.call(rule.check, bound)
            except Exception as error:
                raise RewriteError(f"rule '{rule.name}' ({rule.source}): its check fails at {describe(match.nodes[0])}: {blame(error)}") from error
            if reason is not None and not isinstance(reason, str):
                raise RewriteError(f"rule '{rule.name}' ({rule.source}): its check returned {reason!r}; return None to accept a match, or the reason to refuse it")
        return reason or ""

    def _apply(self, graph: Graph, rule: Rule, match: Match, bound: dict[str, Any], anchor: Node) -> list[Node] | str:
        """Replace the match; returns the nodes to visit again, or the reason why the replacement was rejected."""
        op = self._builder
        op._begin(anchor)
        try:
            result = rule.call(rule.replace, bound, op)
        except RewriteError as error:
            graph.discard(op._made)
            raise RewriteError(f"rule '{rule.name}' ({rule.source}): {error}") from error
        except Exception as error:
            graph.discard(op._made)
            raise RewriteError(f"rule '{rule.name}' ({rule.source}): its replacement fails at {describe(anchor)}: {blame(error)}") from error
        made, returned = op._made, result if isinstance(result, tuple) else (result,)
        results = [r.tensor for r in returned if isinstance(r, BoundValue)]
        if len(results) < len(returned):
            graph.discard(made)
            raise RewriteError(f"rule '{rule.name}' ({rule.source}): its replacement returned {result!r} at {describe(anchor)}; return the value of op.Name(...), or a tuple of such values")
        try:
            site = self._site(graph, rule, match, made, results)
        except CaptureError as error:
            graph.discard(made)
            return str(error)
        except RewriteError as error:
            site = f"cannot be verified: {error}"
        if isinstance(site, str):
            graph.discard(made)
            self._rejected = True
            return site
        self._stop_loop(graph, rule, match, anchor, site.outputs)
        made, results = self._share(graph, made, results)
        self.report.add(site)
        return self._commit(graph, match, made, results, rule, site.where)

    def _stop_loop(self, graph: Graph, rule: Rule, match: Match, anchor: Node, computed: list[str]) -> None:
        """A rule that finds again and again what it replaced before, on the same values, will find it for ever."""
        key: tuple[Any, ...] = (rule.name, *computed)
        if key not in self._fired:
            self._fired[key] = 1
            return
        values = [_identity(graph, v) for v in match.bindings.values()]
        nodes = [(n.canonical, [(k, repr(v)) for k, v in n.attrs.items() if not isinstance(v, (gs.Tensor, gs.Graph))]) for n in match.nodes]
        key = (*key, repr(values), repr(nodes))
        self._fired[key] += 1
        if self._fired[key] > 2:
            raise RewriteError(_loop(rule, anchor))

    def _share(self, graph: Graph, made: list[Node], results: list[gs.Tensor]) -> tuple[list[Node], list[gs.Tensor]]:
        """An equal plugin node that exists already stands for the new one: exporters compute a mask anew for each layer."""
        if len(made) != 1 or made[0].domain != DOMAIN:
            return made, results
        node = made[0]
        key = (graph, node.canonical, *[t.name and id(t) for t in node.inputs])
        alike = self._plugin_nodes.get(key)
        if alike is None:
            self._plugin_nodes[key] = [node]
            return made, results
        old = next((n for n in alike if not n.dead and repr(sorted(n.attrs.items())) == repr(sorted(node.attrs.items()))), None)
        if old is None:
            alike.append(node)
            return made, results
        graph.discard(made)
        return [], list(old.outputs)

    def _site(self, graph: Graph, rule: Rule, match: Match, made: list[Node], results: list[gs.Tensor]) -> Site | str:
        """Check the replacement; on success the new plugin node calls its function."""
        if len(results) != len(match.outputs):
            return f"the pattern has {len(match.outputs)} outputs, the replacement {len(results)}"
        for old, new in zip(match.outputs, results, strict=True):
            if (new.dtype is not None or new.shape is not None) and (changed := _type_change(old, new)):
                return changed
        own = ""
        for node in made:
            own = own or (node.op if node.domain == DOMAIN else "")
        site = Site(rule.name, own, [t.name for t in match.outputs], list(map(describe, match.nodes)), where=_module(match.nodes))
        reason = self._plugin_site(graph, rule, match, made, results, site) if own else self._plain_site(graph, match, made, results, site)
        return reason or site

    def _plugin_site(self, graph: Graph, rule: Rule, match: Match, made: list[Node], results: list[gs.Tensor], site: Site) -> str:
        node = made[0]
        if len(made) != 1 or not all(map(operator.is_, node.outputs, results)) or len(node.outputs) != len(results):
            raise RewriteError(f"rule '{rule.name}': a replacement is either one plugin node or standard nodes only, its results in order")
        form = (node.op, len(node.inputs), len(results), *node.attrs)
        signature = self._signatures.get(form)
        if signature is None:
            signature = self._signatures[form] = self._signature(rule, node)
        # Inputs keep their places: one that this body does not read is still a parameter of the function.
        body = capture(graph, match.nodes, signature, node.inputs, match.outputs, match.dims)
        site.attributes, site.note = dict(node.attrs), match.note
        if self.verify:
            plugin, inputs = self.library.plugins[node.op], given(signature.inputs, node.inputs)
            names = {id(t): n for n, t in inputs.items()}
            key = f"{body.digest}|{site.attributes}|{[(n, str(t.dtype), t.shape) for n, t in inputs.items()]}"
            run = reference_runner(plugin, {n: _written(v) for n, v in site.attributes.items()}, [names[id(t)] if t.name else "" for t in node.inputs])
            verdict = self._verdict(key, graph, body.function, inputs, run, plugin.tolerance, plugin.sample, match.shapes)
            site.error, site.reduced = verdict.error, verdict.reduced
            if not verdict.ok:
                return f"plugin {plugin.name} differs from the subgraph it would replace: {verdict.reason}"
        node.op = body.called = body.called or self.table.add(body.function, body.digest)
        return ""

    def _signature(self, rule: Rule, node: Node) -> Signature:
        """That of the function which a plugin node calls; raises RewriteError if the plugin does not take what it is given."""
        plugin = self.library.plugins[node.op]
        unknown = sorted(node.attrs.keys() - plugin.attributes.keys())
        if unknown or len(node.inputs) > len(plugin.inputs):
            raise RewriteError(f"rule '{rule.name}': plugin {plugin.name} takes {list(plugin.inputs)} and attributes {list(plugin.attributes)}, not {unknown or len(node.inputs)}")
        return Signature(plugin.name, tuple(plugin.parameters[: len(node.inputs)]), plugin.outputs[: len(node.outputs)], tuple(sorted(node.attrs)))

    def _plain_site(self, graph: Graph, match: Match, made: list[Node], results: list[gs.Tensor], site: Site) -> str:
        bound = [t for v in match.bindings.values() for t in (v if isinstance(v, list) else [v])]
        leaves = [t for t in bound if isinstance(t, gs.Tensor) and not t.is_empty() and graph.constant(t) is None]
        read = list({id(t): t for t in leaves}.values())
        form = numbered("Site", len(read), len(results))
        inputs = dict(zip(form.inputs, read, strict=True))
        before = capture(graph, match.nodes, form, read, match.outputs)
        names = {id(t): n for n, t in inputs.items()}
        if not made and any(id(r) in names for r in results):
            nodes = [onnx.helper.make_node("Identity", [names[id(r)]], [n]) for r, n in zip(results, form.outputs, strict=True)]
            function = onnx.helper.make_function(DOMAIN, form.name, form.inputs, form.outputs, nodes, before.function.opset_import)
            after = Body(function, fingerprint(function))
        else:
            after = capture(graph, made, form, read, results)
        if not self.verify:
            return ""
        needed = self.table.needed_by(after.function)
        key = f"{before.digest}|{after.digest}|{[(str(t.dtype), t.shape) for t in inputs.values()]}"

        def run(arrays: dict[str, np.ndarray]) -> list[Any]:
            return run_function(after.function, needed, arrays)

        verdict = self._verdict(key, graph, before.function, inputs, run, TOLERANCE, None, contents=_target_shapes(match))
        site.error, site.reduced = verdict.error, verdict.reduced
        return "" if verdict.ok else f"the replacement differs: {verdict.reason}"

    def _verdict(self, key: str, graph: Graph, body: onnx.FunctionProto, inputs: dict[str, gs.Tensor], run: Callable[..., list[Any]],
                 tolerance: Any, sample: Callable[..., Any] | None, shapes: dict[int, tuple[Any, ...]] | None = None,
                 contents: dict[int, tuple[Any, ...]] | None = None) -> Verdict:  # fmt: skip
        read = {n for node in body.node for n in node.input}
        brought = {n: graph.constant(t, BROUGHT) for n, t in inputs.items() if n not in read}
        key += "".join(f"|{n}:{hash(a.tobytes())}" for n, a in brought.items() if a is not None)
        if key not in self.verdicts:
            specs: list[Spec] = [spec_of(n, t, (contents or {}).get(id(t)), brought.get(n)) for n, t in inputs.items()]
            specs = [replace(s, shape=(shapes or {}).get(id(t), s.shape)) for s, t in zip(specs, inputs.values(), strict=True)]
            started = time.perf_counter()
            self.verdicts[key] = check_site(body, self.table.needed_by(body), specs, run, tolerance, sample, self.bitwise)
            self.report.verify_seconds += time.perf_counter() - started
        return self.verdicts[key]

    def _commit(self, graph: Graph, match: Match, made: list[Node], results: list[gs.Tensor], rule: Rule, scope: str) -> list[Node]:
        touched = dict.fromkeys(made)
        origins = [o for n in match.nodes for o in (n.metadata["rewrite.from"].split(" ") if n.metadata else [n.name or n.outputs[0].name])]  # nodes of the model itself
        metadata = {"rewrite.rule": rule.name, "rewrite.from": " ".join(dict.fromkeys(origins))}
        for node in made:
            node.scope, node.metadata = scope, metadata
        self.made += made
        inside = match.nodes
        for old, new in zip(match.outputs, results, strict=True):
            touched.update(dict.fromkeys(graph.consumers(old)))
            producer, maker = graph.producer(old), graph.producer(new)
            if producer is not None and producer not in inside:
                inside = [*inside, producer]
            if maker in made and producer is not None:
                graph.shuffled = graph.shuffled or maker.position != producer.position
                graph.hand_over(old, producer, maker, new)
            else:
                self._alias(graph, old, new, metadata, touched)
        graph.remove_dead(inside)
        return list(touched)

    def _alias(self, graph: Graph, old: gs.Tensor, new: gs.Tensor, metadata: dict[str, str], touched: dict[Node, None]) -> None:
        """The old value is another existing value: its readers read that one."""
        touched.update(dict.fromkeys(graph.replace_uses(old, new)))
        if id(old) in graph.needed:
            producer = graph.producer(old)
            assert producer is not None
            node = Node("Identity", graph.fresh(f"{old.name}_identity"), {}, [new], [Variable(graph.fresh(f"{old.name}_tmp"))])
            graph.add(node, producer)
            node.scope, node.metadata = "", metadata
            self.made.append(node)
            graph.hand_over(old, producer, node, node.outputs[0])


def _written(value: Any) -> Any:
    """An attribute as a file holds it: floats in single precision, those beyond it infinite."""
    if isinstance(value, (list, tuple)):
        return [_written(v) for v in value]
    with np.errstate(over="ignore"):
        return float(np.float32(value)) if isinstance(value, float) else value


def _nearest(graph: Graph, rule: Rule, node: Node) -> Trace:
    """How near the rule comes at a node at which it does not match."""
    trace = Trace()
    for _ in Matcher(graph, rule.pattern, trace).at(node):
        pass
    return trace


def _module(nodes: list[Node]) -> str:
    """The PyTorch module that these nodes came from."""
    scopes = [n.scope if n.scope is not None else _scope(n) for n in nodes]
    return common_scope(scopes) if any(scopes) else ""


def _scope(node: Node) -> str:
    assert node.source is not None
    node.scope = module_scope(node.source)
    return node.scope


def _loop(rule: Rule, node: Node) -> str:
    where = describe(node)[:100]  # names of what was made of what was made grow
    return f"rule '{rule.name}' ({rule.source}) keeps changing the graph at {where}: a pattern matches again what replaced it; add a check that refuses it"


def _identity(graph: Graph, value: Any) -> Any:
    if not isinstance(value, gs.Tensor):
        return [_identity(graph, v) for v in value] if isinstance(value, list) else value
    if isinstance(value, gs.Constant) and not isinstance(value._values, np.ndarray):
        return value.name  # of the model: no rule made it, so its name is its own
    array = graph.constant(value)
    return value.name if array is None else (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())


def _runs_back(match: Match) -> str | None:
    """Why a match of several outputs may not become one node: one of its inputs is computed from an output."""
    graph, inside = match.graph, set(match.nodes)
    leaves = [t for v in match.bindings.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, gs.Tensor)]
    outputs = {id(t) for t in match.outputs}
    first = -1.0 if graph.shuffled else min(n.position for n in match.nodes)
    stack, seen = list(leaves), set(map(id, leaves))
    while stack:
        tensor = stack.pop()
        if id(tensor) in outputs:
            return f"its output '{tensor.name}' is needed to compute one of its inputs"
        node = graph.producer(tensor)
        if node is None or node in inside or node.position < first:
            continue
        above = [t for t in reads(node) if id(t) not in seen]
        seen.update(map(id, above))
        stack += above
    return None


def _type_change(old: gs.Tensor, new: gs.Tensor) -> str:
    """Why `new` cannot stand for `old`, by dtype and shape, as far as both are known; "" if it can."""
    if old.dtype is not None and new.dtype is not None and dtype_name(old.dtype) != dtype_name(new.dtype):
        return f"the replacement of '{old.name}' is {dtype_name(new.dtype)} instead of {dtype_name(old.dtype)}"
    if old.shape is None or new.shape is None:
        return ""
    differ = len(old.shape) != len(new.shape) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(old.shape, new.shape, strict=True))
    return f"the replacement of '{old.name}' has shape {list(new.shape)} instead of {list(old.shape)}" if differ else ""


def _bound(match: Match) -> dict[str, Any]:
    """Bindings as rules see them."""
    graph = match.graph
    bindings = {k: BoundValue(graph, v) if isinstance(v, gs.Tensor) else _wrapped(graph, v) for k, v in match.bindings.items()}
    bindings["output"] = BoundValue(graph, match.outputs[0])
    return bindings


def _told(bound: dict[str, Any]) -> dict[str, str]:
    """What the variables of a match stand for, as text; those that stand for nothing left out."""
    values = {n: [v.name for v in value] if isinstance(value, list) and value and isinstance(value[0], BoundValue) else value for n, value in bound.items() if n != "output"}
    return {n: v.name if isinstance(v, BoundValue) else str(v) for n, v in values.items() if v is not None}


def _wrapped(graph: Graph, value: Any) -> Any:
    if isinstance(value, gs.Tensor):
        return BoundValue(graph, value)
    return [_wrapped(graph, v) for v in value] if isinstance(value, list) and value and isinstance(value[0], gs.Tensor) else value


def _target_shapes(match: Match) -> dict[int, tuple[Any, ...]]:
    """Values of target-shape operands, as far as the shapes they lead to are known."""
    shapes = {}
    for node in match.nodes:
        if canonical(node) in ("Reshape", "Expand") and node.outputs[0].shape is not None:
            dims = [d if is_named(d) else -1 for d in node.outputs[0].shape]
            if dims.count(-1) <= (canonical(node) == "Reshape"):
                shapes[id(node.inputs[1])] = tuple(dims)
    return shapes


def all_graphs(graph: gs.Graph) -> Iterable[gs.Graph]:
    """The graph and those inside its If, Loop and Scan nodes, innermost first."""
    for inner in (g for n in graph.nodes if n.holds_graphs for g in n.subgraphs()):
        yield from all_graphs(inner)
    yield graph
