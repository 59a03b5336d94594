"""Building blocks exported by PyTorch itself: what each becomes, verified site by site and as a whole."""

from __future__ import annotations

import logging

import onnx
import pytest

import rewrite

torch = pytest.importorskip("torch")
import blocks  # noqa: E402  (needs torch)

ATTENTION = {"FusedAttention": 1, "MatMulAct": 4}

# What is left of a block (nn.MultiheadAttention ends in a transpose, so a residual cannot join its last product) besides operators that only move data.
EXPECTED = {
    "gelu": {"Gelu": 1},
    "gelu_tanh": {"Gelu": 1},
    "gelu_new": {"Gelu": 1},
    "silu": {"Swish": 1},
    "mlp_gelu": {"MatMulAct": 2, "gelu": 1},
    "mlp_gelu_new": {"MatMulAct": 2, "gelu_tanh": 1},
    "mlp_relu": {"MatMulAct": 2, "relu": 1},
    "mlp_silu": {"MatMulAct": 2, "swish": 1},
    "swiglu": {"GatedMatMulAct": 1, "swish": 1, "MatMulAct": 1},
    "geglu": {"GatedMatMulAct": 1, "gelu": 1, "MatMulAct": 1},
    "geglu_tanh": {"GatedMatMulAct": 1, "gelu_tanh": 1, "MatMulAct": 1},
    "phi3_mlp": {"GatedMatMulAct": 1, "swish": 1, "gate_up": 1, "MatMulAct": 1},
    "phi3_mlp_bias": {"GatedMatMulAct": 1, "gelu": 1, "gate_up": 1, "MatMulAct": 1},
    "phi3_mlp_swapped": {"GatedMatMulAct": 1, "swish": 1, "up_gate": 1, "MatMulAct": 1},
    "sliced_mlp": {"GatedMatMulAct": 1, "gelu": 1, "gate_up": 1, "MatMulAct": 1},
    "llama_norm": {"RMSNormalization": 1},
    "gemma_norm": {"RMSNormalization": 1},
    "sqrt_norm": {"RMSNormalization": 1},
    "plain_norm": {"RMSNormalization": 1},
    "torch_rms_norm": {"RMSNormalization": 1},
    "layer_norm": {"LayerNormalization": 1},
    "layer_norm_no_bias": {"LayerNormalization": 1},
    "layer_norm_no_weight": {"LayerNormalization": 1},
    "hand_layer_norm": {"LayerNormalization": 1},
    "hand_layer_norm_pow": {"LayerNormalization": 1},
    "residual_rms_norm": {"RMSNormalization": 1, "Add": 1},
    "rope_halves": {"Rotary": 1},
    "rope_partial": {"Rotary": 1},
    "rope_chunk": {"Rotary": 1},
    "rope_gptj": {"Rotary": 1},
    "rope_cohere": {"Rotary": 1},
    "rope_pairs": {"Rotary": 1},
    "eager": ATTENTION,
    "divided": ATTENTION,
    "scaled_query": ATTENTION,
    "t5": ATTENTION,
    "gemma2": ATTENTION,
    "repeat_interleave": ATTENTION,
    "masked_fill": ATTENTION,
    "normed": {**ATTENTION, "RMSNormalization": 2},
    "sdpa": ATTENTION,
    "sdpa_float": ATTENTION,
    "sdpa_scale": ATTENTION,
    "sdpa_gqa": ATTENTION,
    "cross": ATTENTION,
    "cross_eager": ATTENTION,
    "bmm": {**ATTENTION, "Mul": 1},
    "mha": {"FusedAttention": 1, "MatMulAct": 2},
    "mha_weights": {"FusedAttention": 1, "MatMulAct": 2},
    "mha_cross": {"FusedAttention": 1, "MatMulAct": 3},
    "mha_masked": {"FusedAttention": 1, "MatMulAct": 3},
    "mha_batch_second": {"FusedAttention": 1, "MatMulAct": 2},
    "encoder_layer": {"FusedAttention": 1, "MatMulAct": 4, "gelu": 1, "LayerNormalization": 2, "Add": 1},
    "encoder_layer_norm_first": {"FusedAttention": 1, "MatMulAct": 4, "relu": 1, "LayerNormalization": 2, "Add": 1},
    "decoder_layer": {"FusedAttention": 2, "MatMulAct": 7, "relu": 1, "LayerNormalization": 3, "Add": 2},
}

# The dynamo exporter takes about a second for each; TorchScript takes none.
DYN18 = ["mlp_gelu_new", "phi3_mlp", "gemma_norm", "torch_rms_norm", "hand_layer_norm", "rope_partial", "rope_pairs", "rope_gptj", "gemma2", "sdpa"]
DYN18 += ["sdpa_gqa", "bmm", "mha_cross", "mha_masked", "decoder_layer"]
DYN20 = ["geglu", "encoder_layer_norm_first"]
DYN23 = ["hand_layer_norm_pow", "normed", "sdpa_float", "encoder_layer"]
FIXED_SIZES = {"mha", "mha_weights", "mha_cross", "mha_masked", "mha_batch_second"}  # TorchScript bakes B * H into nn.MultiheadAttention
NOT_IN_TORCHSCRIPT = {"torch_rms_norm", "sdpa_gqa", "encoder_layer", "encoder_layer_norm_first", "decoder_layer"}

CASES = [(n, "ts17") for n in EXPECTED if n not in NOT_IN_TORCHSCRIPT]
CASES += [(n, "dyn18") for n in DYN18] + [(n, "dyn20") for n in DYN20] + [(n, "dyn23") for n in DYN23]
MOVES = {"Reshape", "Transpose", "Gather", "Concat", "Shape", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Tile", "Cast"}


def inventory(model: onnx.ModelProto) -> dict[str, int]:
    """Operators that compute something, and the activations and layouts that plugin nodes name in their attributes."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        names = [node.op_type.split("_")[0]] + [a.s.decode() for a in node.attribute if a.name in ("activation", "merged")]
        for name in names:
            if name not in MOVES and name != "Constant":
                found[name] = found.get(name, 0) + 1
    return found


@pytest.mark.parametrize(("block", "exporter"), CASES, ids=[f"{b}-{e}" for b, e in CASES])
def test_block(block, exporter):
    logging.disable(logging.ERROR)
    try:
        model = blocks.export(block, exporter, dynamic=exporter[0] == "d" or block not in FIXED_SIZES)
    finally:
        logging.disable(logging.NOTSET)
    result = rewrite.optimize(model)
    assert inventory(result.model.proto) == EXPECTED[block]
    assert result.report.verified
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert not [n for n in rewrite.unfuse(result.model.proto).graph.node if n.domain == "rewrite"]
