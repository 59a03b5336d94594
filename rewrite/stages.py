"""A model in stages, one after the other on ranks of their own: what belongs to each, as the model's Send and Recv nodes tell.

In the file Send and Recv change nothing. A stage computes what its outputs and its Send nodes need, back to its Recv nodes; what
depends on inputs alone (positions, masks) is computed by each stage that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx

from rewrite.graph import DOMAIN
from rewrite.model import base_name


@dataclass(frozen=True)
class Message:
    """A value on its way from one stage to a later one: its name there and here."""

    source: int
    target: int
    sent: str
    received: str


@dataclass
class Stage:
    """The nodes of a stage in order, which outputs of the model it makes, and its messages in the order in which all stages take them."""

    nodes: list[onnx.NodeProto]
    outputs: list[str]
    sends: list[Message]
    receives: list[Message]

    @property
    def reads(self) -> set[str]:
        """What the stage takes from outside or has as weights, and what it makes."""
        return {n for node in self.nodes for n in node.input if n} | set(self.outputs) | {m.sent for m in self.sends}


def kind(node: onnx.NodeProto) -> str:
    """The operator of a node of ours, "" of any other."""
    return base_name(node) if node.domain == DOMAIN else ""


def ends(node: onnx.NodeProto) -> tuple[int, int]:
    """From which stage to which a Send or Recv goes. Raises ValueError if it does not say."""
    found = {a.name: a.i for a in node.attribute}
    if not 0 <= found.get("source", -1) < found.get("target", -1):
        raise ValueError(f"{node.op_type} '{node.name}' does not say from which stage to which later one it goes")
    return found["source"], found["target"]


def stages_of(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str], count: int) -> list[Stage]:
    """The stages of a model with these nodes, in order, and outputs. Raises ValueError if its Send and Recv nodes are not those of so many."""
    sends = {n.output[0]: n for n in nodes if kind(n) == "Send"}
    messages: list[Message] = []
    made: dict[str, int] = {}  # of each value the latest stage that has part in it
    for node in nodes:
        stage = max((made.get(name, 0) for name in node.input), default=0)
        if kind(node) == "Recv":
            if node.input[0] not in sends or ends(sends[node.input[0]]) != ends(node) or ends(node)[1] >= count:
                raise ValueError(f"{node.op_type} '{node.name}' has no Send of its own")
            stage = ends(node)[1]
            messages.append(Message(*ends(node), sends[node.input[0]].input[0], node.output[0]))
        made.update(dict.fromkeys(node.output, stage))
    messages.sort(key=lambda m: (m.source, m.target, m.sent))
    found = []
    for stage in range(count):
        mine = [m for m in messages if m.source == stage]
        own = [o for o in outputs if made.get(o, 0) == stage]
        found.append(_stage(nodes, stage, own, mine, [m for m in messages if m.target == stage]))
    return found


def _stage(nodes: Sequence[onnx.NodeProto], stage: int, outputs: list[str], sends: list[Message], receives: list[Message]) -> Stage:
    wanted, kept = {*outputs, *(m.sent for m in sends)}, []
    for node in reversed(nodes):
        if not wanted.intersection(node.output) or kind(node) == "Send":
            continue
        if kind(node) == "Recv":
            if ends(node)[1] != stage:
                raise ValueError(f"stage {stage} reads '{node.output[0]}', which another one receives")
            continue
        kept.append(node)
        wanted.update(node.input)
    return Stage(kept[::-1], outputs, sends, [m for m in receives if m.received in wanted])
