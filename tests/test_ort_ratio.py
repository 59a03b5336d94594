"""Rewriting costs users of plain ONNX Runtime nothing: the functions of plugin nodes are inlined when a model is loaded.

Measured is CPU time, of two threads that sleep rather than spin: unlike the time on the clock, it hardly depends on the
other tests that run on the same cores. `benchmarks/ort_ratio.py` measures both.
"""

from __future__ import annotations

import statistics
import time

import exported
import onnxruntime
import pytest

import rewrite
from rewrite.export.compare import make_inputs

ROUNDS = 15


def runner(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def ratio(before, after, feeds):
    """Of the medians of the CPU times of the two, run in turn."""
    sessions, times = (runner(before), runner(after)), ([], [])
    for turn in range(ROUNDS + 2):
        for which in (0, 1) if turn % 2 else (1, 0):
            started = time.process_time()
            sessions[which].run(None, feeds)
            times[which].append(time.process_time() - started)
    return statistics.median(times[1][2:]) / statistics.median(times[0][2:])


@pytest.mark.parametrize("exporter", [("dynamo", 20), ("torchscript", 18)], ids=["dynamo20", "torchscript18"])
def test_minilm_takes_no_longer(exporter):
    original = rewrite.load(exported.exported("minilm", *exporter))
    rewritten = rewrite.optimize(original, verify=False).model
    assert rewritten.plugin_nodes()["FusedAttention"] == 6
    feeds = {n: t.numpy() for n, t in make_inputs(exported.source("minilm", "eager", True), {"batch": 8, "sequence": 128}, "right", 0).items()}
    assert ratio(original, rewritten, feeds) <= 1.05
