"""Shared by all tests: ONNX models from text, and the seeds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest


def parse(text: str, opset: int = 18, **initializers: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text `(inputs) => (outputs) { nodes }`, with initializers given as arrays."""
    graph = onnx.parser.parse_graph("g " + text)
    for name, array in initializers.items():
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def nodes(model: onnx.ModelProto) -> list[str]:
    """The operators of the main graph, in order, without constants."""
    return [f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in model.graph.node if n.op_type != "Constant"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
