"""Nodes and values of the graph that rules edit: onnx-graphsurgeon's own, quicker to make, with room for what the engine notes on them.

onnx-graphsurgeon keeps both ends of every edge in lists that update one another. Here they are plain lists, because only
`Graph` edits them; and what was asked for by the identity of a node in a dictionary is read from the node itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

DOMAIN = "rewrite"  # of plugin nodes, whose operators are named `Plugin`, `Plugin_2`, ...


class Node(gs.Node):  # type: ignore[misc]
    """A node of a graph that rules edit."""

    def __init__(self, op: str, name: str, attrs: dict[str, Any], inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], domain: str | None = None):
        self.op, self.name, self.attrs, self.domain = op, name, attrs, domain
        self.inputs, self.outputs = list(inputs), list(outputs)
        self.graph: Any = None  # the `rewrite.graph.Graph` that it lives in, none before it entered one and after it was removed
        self.dead = False  # it was removed
        self.position = 0.0  # its place in the graph; nodes of one place are in the order in which they entered
        # The operator's name as patterns write it: `Gelu` for ONNX's and for ours, `domain::Op` for others.
        self.canonical = op if not domain or domain == "ai.onnx" else op.split("_", 1)[0] if domain == DOMAIN else f"{domain}::{op}"
        self.source: onnx.NodeProto | None = None  # what it was read from
        self.rewired = False  # its inputs or outputs are no longer those of `source`
        self.holds_graphs = False  # as If, Loop and Scan do
        self.kind: int | str | None = None  # the same for nodes of equal operators and attributes, once asked for
        self.scope: str | None = ""  # the PyTorch module it came from, if the exporter tells; None if nobody has asked yet
        self.metadata: dict[str, str] | None = None  # of one that a rule made
        for tensor in inputs:  # list's own append: a tensor of onnx-graphsurgeon's making has lists that update one another
            list.append(tensor.outputs, self)
        for tensor in outputs:
            list.append(tensor.inputs, self)

    __setattr__ = object.__setattr__
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Variable(gs.Variable):  # type: ignore[misc]
    """A value that is computed, or an input of the graph."""

    def __init__(self, name: str, dtype: Any = None, shape: Any = None, type: str | None = "tensor_type"):
        self.name, self.dtype, self.shape, self.type = name, dtype, shape, type
        self.inputs: list[gs.Node] = []
        self.outputs: list[gs.Node] = []

    __setattr__ = object.__setattr__


class Constant(gs.Constant):  # type: ignore[misc]
    """A value that is known; that of an initializer stays in the model's protobuf until a rule asks for it."""

    dtype: Any = None  # plain attributes, where onnx-graphsurgeon asks the values each time
    shape: Any = None

    def __init__(self, name: str, values: LazyValues | np.ndarray[Any, Any], location: int | None = None):
        self.name, self._values, self.data_location, self._export_dtype = name, values, location, None
        self.dtype, self.shape = values.dtype, values.shape
        self.array: np.ndarray[Any, Any] | None = values if isinstance(values, np.ndarray) else None  # the values, once read
        self.kind: int | None = None  # the same for constants of equal values, once asked for
        self.inputs: list[gs.Node] = []
        self.outputs: list[gs.Node] = []

    __setattr__ = object.__setattr__


class Stored(LazyValues):  # type: ignore[misc]
    """The values of a tensor of the model, as they are stored in its protobuf."""

    def __init__(self, tensor: onnx.TensorProto, dtype: Any):
        self.tensor, self.dtype, self.shape = tensor, dtype, list(tensor.dims)
