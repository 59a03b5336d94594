"""What a model needs on given GPUs, before there is one: memory of a rank, bytes of a step, sums between ranks, and how long a step may take.

Everything follows from the graph: each call's operands give its bytes and operations, and a call takes as long as the slower of the two
at the device's measured rates, at least as long as a small kernel. Nothing is computed and no weight is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from rewrite.errors import RewriteError
from rewrite.model import Model, load
from rewrite.registry import Library, library
from rewrite.runtime.calls import Call, Part, Value, calls_of_model, calls_of_plan, lives
from rewrite.runtime.cuda import plan_arena
from rewrite.runtime.devices import LAUNCH_US, STREAM_SHARE, Device
from rewrite.runtime.partition import ValueType
from rewrite.runtime.plan import Plan
from rewrite.runtime.rank_model import RankModels, local_generator
from rewrite.shards import shards_of, weights_of_rank
from rewrite.verify_generator import generator_of

COLLECTIVES = ("AllReduce", "AllGather")
HOST = 8  # GPUs of a host, unless the user says otherwise
CONTEXT = 4096  # tokens of a text, likewise, if the model takes so many


@dataclass
class Sized:
    """A model or plan in parts, one for each stage, of `world` ranks each; `generator` is what a rank's runtime knows, None if it generates no text."""

    name: str
    parts: list[Part]
    world: int
    generator: dict[str, Any] | None
    sent: list[list[Value]]  # what a rank of each stage sends to the next
    named: set[str]  # dimensions of the inputs
    note: str = ""


def open_sized(path: str | os.PathLike[str], world: int | None, stages: int | None, gpus: int, host: int) -> Sized:
    """Read a model, rewritten or not, or a plan, split as asked for or as it is.

    Raises RewriteError if it cannot be split so, or is split otherwise.
    """
    if os.path.isdir(path):
        plan = Plan(path)
        _agree(str(path), plan.manifest.ranks_of_stage, plan.manifest.stages, world, stages, gpus)
        return _of_plan(plan)
    model, note = load(path), ""
    if not model.plugin_nodes():
        model, note = _rewritten(model)
    shards = shards_of(model.proto)
    if shards is not None:
        _agree(model.name, shards.world, shards.stages, world, stages, gpus)
        return _of_model(model, note)
    world, stages = _shape(world, stages, gpus, host)
    return _of_model(_split(model, world, stages), note)


def _shape(world: int | None, stages: int | None, gpus: int, host: int) -> tuple[int, int]:
    """Ranks of a stage and stages: what is not said follows, tensor parallelism first, as far as one host goes."""
    if world is None:
        world = gpus // stages if stages is not None and gpus % stages == 0 else math.gcd(gpus, host)
    stages = stages if stages is not None else max(1, gpus // world)
    if world * stages != gpus:
        raise RewriteError(f"plan-size: {world} ranks of a stage times {stages} stages are {world * stages}, and there are {gpus} GPUs; make both fit --gpus")
    return world, stages


def _agree(name: str, has_world: int, has_stages: int, world: int | None, stages: int | None, gpus: int) -> None:
    if (world or has_world, stages or has_stages, gpus) != (has_world, has_stages, has_world * has_stages):
        made = f"{has_stages} stages of {has_world} ranks" if has_stages > 1 else f"{has_world} ranks" if has_world > 1 else "one rank"
        raise RewriteError(f"{name}: it is made for {made}; give as many --gpus, or the model that it was made of")


def _rewritten(model: Model) -> tuple[Model, str]:
    """By all rules, and as a generator if it can be one; else with the reason why not."""
    from rewrite.optimizer import apply_rules
    from rewrite.patterns.transform_generate import to_generator

    known = library([])
    model = apply_rules(model, known, verify=False, explain=False).model
    lifts = Library([r for r in known.rules if r.tier == "lift"], known.plugins)
    try:
        return to_generator(model, lambda m: apply_rules(m, lifts, verify=False, explain=False).model), ""
    except RewriteError as reason:
        return model, f"estimated on whole sequences, because it is no text generator: {reason}"


def _split(model: Model, world: int, stages: int) -> Model:
    from rewrite.patterns.transform_pipeline import to_stages
    from rewrite.patterns.transform_shard import to_shards

    if world > 1:
        model, _ = to_shards(model, world)
    return to_stages(model, stages) if stages > 1 else model


def _of_model(model: Model, note: str) -> Sized:
    generator, plugins = generator_of(model.proto), library([]).plugins
    named = {d.dim_param for i in model.proto.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param}
    if shards_of(model.proto) is None:
        read = {n for node in model.proto.graph.node for n in node.input}
        sizes = [math.prod(i.dims) * _itemsize(i.data_type) for i in model.proto.graph.initializer if i.name in read and i.data_type != onnx.TensorProto.INT64]
        return Sized(model.name, [Part(calls_of_model(model, plugins), sum(sizes))], 1, generator, [], named, note)
    models = RankModels(model, hollow=True)
    parts, sent = [], []
    for index, stage in enumerate(models.stages):
        local, _ = models.make(index * models.shards.world)
        parts.append(Part(calls_of_model(local, plugins), sum(weights_of_rank(model, models.shards, stage).values())))
        sent.append([_value(m.sent, models.types[m.received].type.tensor_type) for m in stage.sends])
    return Sized(model.name, parts, models.shards.world, None if generator is None else local_generator(generator, model), sent, named, note)


def _of_plan(plan: Plan) -> Sized:
    manifest, world = plan.manifest, plan.manifest.ranks_of_stage
    parts = [calls_of_plan(plan, stage * world) for stage in range(manifest.stages)]
    sent: list[list[Value]] = [[] for _ in parts]
    for step in manifest.steps:
        if step.name == "Send":
            sent[step.stage].append(Value(step.inputs[0], manifest.values[step.inputs[0]]))
    for part in parts:
        part.calls = [c for c in part.calls if c.name not in ("Send", "Recv")]
    named = {d for v in plan.inputs.values() for d in v.shape if isinstance(d, str)}
    return Sized(str(plan.directory), parts, world, manifest.generator, sent, named)


def _value(name: str, kind: onnx.TypeProto.Tensor) -> Value:
    return Value(name, ValueType(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)))


def _itemsize(element: int) -> int:
    return int(onnx.helper.tensor_dtype_to_np_dtype(element).itemsize)


# --- one step ---------------------------------------------------------------------------------------------------------
def plan_size(path: str | os.PathLike[str], device: Device, gpus: int = 1, *, tensor_parallel: int | None = None, pipeline_parallel: int | None = None, batch: int = 1, context: int | None = None,
              tokens: int = 1, host: int = HOST) -> dict[str, Any]:  # fmt: skip
    """What one step takes in which each of `batch` texts, of `context` tokens by then (None: 4096, or as many as the model takes), gets `tokens` new ones.

    Of a model that generates no text a step is `batch` sequences of `context` tokens. `host` is how many GPUs a host has.
    Returns plain data: bytes and microseconds of each stage and of all. Raises RewriteError for numbers that make no sense.
    """
    for what, number in (("batch", batch), ("context", CONTEXT if context is None else context), ("tokens", tokens), ("gpus-per-host", host)):
        if number < 1:
            raise RewriteError(f"plan-size: --{what} is {number}; give 1 or more")
    sized = open_sized(path, tensor_parallel, pipeline_parallel, gpus, host)
    limit = sized.generator["positions"] if sized.generator is not None else None
    context = context or min(CONTEXT, limit or CONTEXT)
    if tokens > context:
        raise RewriteError(f"plan-size: {tokens} new tokens of {context} make no sense; give less --tokens, or more --context")
    if limit is not None and context > limit:
        raise RewriteError(f"{sized.name}: it was made for {limit} positions, and --context is {context}; give less")
    sizes = _sizes(sized, batch, context, tokens)
    try:
        stages = [_stage(sized, index, device, sizes, batch, context, tokens, host) for index in range(len(sized.parts))]
    except KeyError as error:
        raise RewriteError(f"{sized.name}: the size of '{error.args[0]}' does not follow from the sizes of its inputs; plan-size needs a graph whose shapes do") from error
    step = sum(s["us"] + s["send_us"] for s in stages)
    made = batch * (tokens if sized.generator is not None else context)
    least = sum((s["read"]["weights"] + s["read"]["kv"]) / device.bandwidth / 1e3 for s in stages)
    return {
        "model": sized.name, "note": sized.note, "device": {"name": device.name, "memory": device.memory, "gb_per_s": device.bandwidth, "tflops_16bit": device.rate16, "source": device.source},
        "gpus": gpus, "tensor_parallel": sized.world, "pipeline_parallel": len(sized.parts), "gpus_per_host": host, "batch": batch, "context": context, "new_tokens": made,
        "stages": stages, "fits": all(s["memory"]["total"] <= device.memory for s in stages), "step_us": step, "tokens_per_second": made / step * 1e6, "share_of_bandwidth": least / step,
        "share_of_rate": sum(s["operations"] for s in stages) / device.rate16 / 1e6 / step,
    }  # fmt: skip


def _sizes(sized: Sized, batch: int, context: int, tokens: int) -> dict[str, int]:
    if sized.generator is None:
        first = sorted(n for n in sized.named if "batch" in n.lower())[:1]
        return {n: batch if n in first else context for n in sized.named}
    block = sized.generator["block_size"]
    blocks = -(-context // block)
    return {"tokens": batch * tokens, "rows": batch, "sequences": batch, "starts": batch + 1, "table": blocks, "blocks": batch * blocks}


def _stage(sized: Sized, index: int, device: Device, sizes: Mapping[str, int], batch: int, context: int, tokens: int, host: int) -> dict[str, Any]:
    part, first = sized.parts[index], index * sized.world
    layers = [] if sized.generator is None else [layer for layer in sized.generator["layers"] if layer.get("stage", 0) == index]
    block = 1 if sized.generator is None else sized.generator["block_size"]
    caches = {layer[k] for layer in layers for k in ("key_cache", "value_cache", "keys", "values")}
    held = batch * -(-context // block) * block * sum(_position_bytes(layer) for layer in layers)
    costs = [_cost(c, sizes, caches, batch, context, tokens) for c in part.calls]
    hosts = -(-sized.world // host)
    sums = [(c.name, c.outputs[0].bytes(sizes) if c.name == "AllGather" else c.inputs[0].bytes(sizes)) for c in part.calls if c.name in COLLECTIVES and sized.world > 1]
    told = sum(device.sum_us(size, sized.world, hosts) if name == "AllReduce" else device.join_us(size, sized.world, hosts) for name, size in sums)
    times = [max(LAUNCH_US, c.bytes / (device.bandwidth * STREAM_SHARE) / 1e3, c.operations / (device.rate16 if c.narrow else device.rate32) / 1e6) for c in costs]
    values = {v.name: v.bytes(sizes) for c in part.calls for v in (*c.inputs, *c.outputs) if v.name not in caches}
    _, arena = plan_arena(values, lives(part.calls, caches))
    sent = sum(v.bytes(sizes) for v in sized.sent[index]) if index < len(sized.sent) else 0
    crosses = any(rank // host != (rank + sized.world) // host for rank in range(first, first + sized.world))
    memory = {"weights": part.weights, "kv": held, "activations": arena, "total": part.weights + held + arena}
    return {
        "stage": index, "ranks": [first, first + sized.world - 1], "memory": memory, "calls": len(part.calls),
        "read": {"weights": sum(c.weights for c in costs), "kv": sum(c.kv for c in costs), "activations": sum(c.values for c in costs)}, "operations": sum(c.operations for c in costs),
        "collectives": {"count": len(sums), "bytes": sum(size for _, size in sums), "us": told}, "us": sum(times) + told,
        "sent_bytes": sent, "send_us": device.send_us(sent, 2 if crosses else 1) if sent else 0.0,
    }  # fmt: skip


@dataclass
class Cost:
    """Of one call: bytes of weights, of keys and values, of other values; operations; whether it computes with 16-bit floats."""

    weights: int
    kv: int
    values: int
    operations: float
    narrow: bool

    @property
    def bytes(self) -> int:
        return self.weights + self.kv + self.values


def _position_bytes(layer: Mapping[str, Any]) -> int:
    """Bytes of the key and the value of one token in one layer."""
    return int(layer["kv_heads"] * (layer["size"] + layer["value_size"]) * np.dtype(layer["dtype"]).itemsize)


def _cost(call: Call, sizes: Mapping[str, int], caches: set[str], batch: int, context: int, tokens: int) -> Cost:
    weights = sum(v.bytes(sizes) for v in (*call.weights, *call.rows))
    values = sum(v.bytes(sizes) for v in (*call.inputs, *call.outputs) if v.name not in caches)
    kv, operations = 0, 0.0
    if call.name == "PagedAttention":
        cached = [v for v in call.inputs if v.name in caches]
        seen = min(context, call.attributes.get("window") or context)
        kv = batch * min(context, seen + tokens - 1) * sum(math.prod(d for d in v.kind.shape[2:] if isinstance(d, int)) * v.kind.numpy.itemsize for v in cached)
        pairs = sum(min(seen, context - tokens + 1 + i) for i in range(tokens)) if tokens <= 65536 else tokens * seen
        operations = 2.0 * batch * pairs * sum(v.elements(sizes) for v in (call.inputs[0], call.outputs[0])) / (batch * tokens)
    elif call.name == "FusedAttention":
        middle = call.inputs[1].kind.shape[1:-1]  # keys, and perhaps heads, which are fewer
        keys = max(Value("keys", ValueType("int8", (d,))).elements(sizes) for d in middle)
        operations = 2.0 * keys * (call.inputs[0].elements(sizes) + call.outputs[0].elements(sizes))
    elif call.name in ("MatMulAct", "GatedMatMulAct"):
        columns = call.outputs[0].kind.shape[-1]
        lines = call.outputs[0].elements(sizes) // (columns if isinstance(columns, int) else 1)
        operations = 2.0 * lines * sum(w.elements(sizes) for w in call.weights if len(w.kind.shape) == 2)
    else:
        rows = sizes["tokens"] if "tokens" in sizes else math.prod(sizes.values())
        operations = 2.0 * rows * sum(v.elements(sizes) for v in call.products)
    kinds = [v.kind.numpy.itemsize for v in (*call.weights, *call.inputs) if v.kind.numpy.kind in "fV"]
    return Cost(weights, kv, values, operations, bool(kinds) and max(kinds) == 2)
