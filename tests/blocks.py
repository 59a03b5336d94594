"""Building blocks of transformers as people write them in PyTorch, and their export to ONNX: material of the tests.

Where a block is known from a model in `transformers`, its forward pass is spelled as there. Every entry of `BLOCKS`
makes a module and its example inputs, with dimension 0 (batch) and 1 (positions) of rank-3 inputs dynamic.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import nn

B, S, D, H, G, E = 2, 6, 32, 4, 2, 8  # batch, positions, width, query heads, key heads, size of a head


class Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


class Mlp(nn.Module):
    """down(activation(up(x))), the residual optional."""

    def __init__(self, activation: Any, residual: bool = False, bias: bool = True):
        super().__init__()
        self.up, self.down = nn.Linear(D, 3 * D, bias=bias), nn.Linear(3 * D, D, bias=bias)
        self.activation, self.residual = activation, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(self.activation(self.up(x)))
        return x + y if self.residual else y


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class GatedMlp(nn.Module):
    def __init__(self, activation: Any, bias: bool = False):
        super().__init__()
        self.gate, self.up = nn.Linear(D, 3 * D, bias=bias), nn.Linear(D, 3 * D, bias=bias)
        self.down = nn.Linear(3 * D, D, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Phi3Mlp(nn.Module):
    """Gate and up projection in one matrix; `swapped` has the gate in the second half, as ModernBERT's kin do."""

    def __init__(self, activation: Any, bias: bool = False, swapped: bool = False):
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 6 * D, bias=bias), nn.Linear(3 * D, D, bias=bias)
        self.activation, self.swapped = activation, swapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.swapped:
            gate, up = up, gate
        return self.down(up * self.activation(gate))


class SlicedMlp(Phi3Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.gate_up(x)
        return self.down(self.activation(both[..., : 3 * D]) * both[..., 3 * D :])


# --- norms --------------------------------------------------------------------------------------------------------
class LlamaNorm(nn.Module):
    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(D) + 0.5), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class GemmaNorm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)


class SqrtNorm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps))


class PlainNorm(nn.Module):
    """No weight, as Llama 4's q/k norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class HandLayerNorm(nn.Module):
    def __init__(self, form: str = "var"):
        super().__init__()
        self.weight, self.bias, self.form = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.rand(D)), form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.form == "var":
            return self.weight * (x - mean) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) + self.bias
        centred = x - mean
        variance = centred.pow(2).mean(-1, keepdim=True)
        return self.weight * (centred * torch.rsqrt(variance + 1e-5)) + self.bias


class ResidualNorm(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x + y
        return self.norm(total), total


# --- rotary -------------------------------------------------------------------------------------------------------
def rotate_half(x: torch.Tensor) -> torch.Tensor:
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rope_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (x * cos) + (rotate_half(x) * sin)


def rope_partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    r = cos.shape[-1]
    return torch.cat([(x[..., :r] * cos) + (rotate_half(x[..., :r]) * sin), x[..., r:]], dim=-1)


def rope_chunk(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """gpt-oss: cos and sin of half the size."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_every_two(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[:, :, :, ::2], x[:, :, :, 1::2]
    return torch.stack((-x2, x1), dim=-1).flatten(-2)


def rope_gptj(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """GPT-J: x [B, S, H, E], cos and sin [B, S, E / 2]."""
    sin = torch.repeat_interleave(sin[:, :, None, :], 2, 3)
    cos = torch.repeat_interleave(cos[:, :, None, :], 2, 3)
    return (x * cos) + (rotate_every_two(x) * sin)


def rope_cohere(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x1, x2 = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-x2, x1], dim=-1).flatten(-2) * sin


def rope_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Meta's Llama without complex numbers: pairs by reshape, cos and sin of half the size."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


# --- attention ----------------------------------------------------------------------------------------------------
class SelfAttention(nn.Module):
    """Projections around `attend(q, k, v, *extra)`, on [B, heads, S, E]."""

    def __init__(self, attend: Any, groups: int = H, flat: bool = False):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(D, H * E), nn.Linear(D, groups * E), nn.Linear(D, groups * E)
        self.o, self.attend, self.groups = nn.Linear(H * E, D), attend, groups

    def forward(self, x: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, H, E).transpose(1, 2)
        k = self.k(x).view(b, s, self.groups, E).transpose(1, 2)
        v = self.v(x).view(b, s, self.groups, E).transpose(1, 2)
        return self.o(self.attend(q, k, v, *extra).transpose(1, 2).reshape(b, s, H * E))


class CrossAttention(SelfAttention):
    def forward(self, x: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        memory, extra = extra[0], extra[1:]
        b, s, _ = x.shape
        t = memory.shape[1]
        q = self.q(x).view(b, s, H, E).transpose(1, 2)
        k = self.k(memory).view(b, t, self.groups, E).transpose(1, 2)
        v = self.v(memory).view(b, t, self.groups, E).transpose(1, 2)
        return self.o(self.attend(q, k, v, *extra).transpose(1, 2).reshape(b, s, H * E))


def attend_eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) * E**-0.5, dim=-1), v)


def attend_divided(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(E), dim=-1), v)


def attend_scaled_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q * E**-0.5, k.transpose(2, 3)), dim=-1), v)


def attend_unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """T5: no scale, a learned bias of relative positions is added to the scores."""
    scores = torch.matmul(q, k.transpose(3, 2)) + bias
    return torch.matmul(nn.functional.softmax(scores.float(), dim=-1).type_as(scores), v)


def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    b, g, s, e = x.shape
    return x[:, :, None, :, :].expand(b, g, n, s, e).reshape(b, g * n, s, e)


def attend_gemma2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = repeat_kv(k, H // G), repeat_kv(v, H // G)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    scores = torch.tanh(scores / 50.0) * 50.0
    scores = scores + mask
    return torch.matmul(nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def attend_interleaved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend_eager(q, k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1))


def attend_masked_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(E)
    return torch.matmul(scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1), v)


def attend_normed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * torch.linspace(0.5, 1.5, E)

    return attend_eager(norm(q), norm(k), v)


def sdpa(**options: Any) -> Any:
    return lambda q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options)


class Mha(nn.Module):
    """nn.MultiheadAttention; with `weights` it takes the path through baddbmm and bmm on [B * H, S, E]."""

    def __init__(self, weights: bool, batch_first: bool = True):
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(D, H, batch_first=batch_first), weights

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        memory = x if memory is None else memory
        return self.attention(x, memory, memory, attn_mask=mask, need_weights=self.weights)[0]


class Bmm(nn.Module):
    """Attention of fairseq's kin (OPT, BART before 2024): heads folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape

        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(b, s, H, E).transpose(1, 2).reshape(b * H, s, E)

        scores = torch.bmm(heads(self.q(x) * E**-0.5), heads(self.k(x)).transpose(1, 2))
        scores = (scores.view(b, H, s, s) + mask).view(b * H, s, s)
        y = torch.bmm(F.softmax(scores, dim=-1), heads(self.v(x)))
        return self.o(y.view(b, H, s, E).transpose(1, 2).reshape(b, s, D))


def _x() -> torch.Tensor:
    return torch.randn(B, S, D)


def _heads() -> torch.Tensor:
    return torch.randn(B, H, S, E)


def _turn(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(B, S, size) * 6
    return angle.cos(), angle.sin()


def _bool_mask() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()[None, None].repeat(B, 1, 1, 1)


def _float_mask() -> torch.Tensor:
    return torch.where(_bool_mask(), 0.0, -1e9)


BLOCKS: dict[str, Any] = {
    "gelu": lambda: (Call(F.gelu), (_x(),)),
    "gelu_tanh": lambda: (Call(lambda x: F.gelu(x, approximate="tanh")), (_x(),)),
    "gelu_new": lambda: (Call(gelu_new), (_x(),)),
    "silu": lambda: (Call(F.silu), (_x(),)),
    "mlp_gelu": lambda: (Mlp(nn.GELU()), (_x(),)),
    "mlp_gelu_new": lambda: (Mlp(gelu_new, residual=True), (_x(),)),
    "mlp_relu": lambda: (Mlp(nn.ReLU(), residual=True), (_x(),)),
    "mlp_silu": lambda: (Mlp(nn.SiLU(), bias=False), (_x(),)),
    "swiglu": lambda: (GatedMlp(nn.SiLU()), (_x(),)),
    "geglu": lambda: (GatedMlp(nn.GELU(), bias=True), (_x(),)),
    "geglu_tanh": lambda: (GatedMlp(nn.GELU(approximate="tanh")), (_x(),)),
    "phi3_mlp": lambda: (Phi3Mlp(nn.SiLU()), (_x(),)),
    "phi3_mlp_bias": lambda: (Phi3Mlp(nn.GELU(), bias=True), (_x(),)),
    "phi3_mlp_swapped": lambda: (Phi3Mlp(nn.SiLU(), swapped=True), (_x(),)),
    "sliced_mlp": lambda: (SlicedMlp(nn.GELU()), (_x(),)),
    "llama_norm": lambda: (LlamaNorm(), (_x(),)),
    "gemma_norm": lambda: (GemmaNorm(), (_x(),)),
    "sqrt_norm": lambda: (SqrtNorm(), (_x(),)),
    "plain_norm": lambda: (PlainNorm(), (_x(),)),
    "torch_rms_norm": lambda: (nn.RMSNorm(D, eps=1e-6), (_x(),)),
    "layer_norm": lambda: (nn.LayerNorm(D), (_x(),)),
    "layer_norm_no_bias": lambda: (nn.LayerNorm(D, bias=False), (_x(),)),
    "layer_norm_no_weight": lambda: (nn.LayerNorm(D, elementwise_affine=False), (_x(),)),
    "hand_layer_norm": lambda: (HandLayerNorm(), (_x(),)),
    "hand_layer_norm_pow": lambda: (HandLayerNorm("pow"), (_x(),)),
    "residual_rms_norm": lambda: (ResidualNorm(LlamaNorm()), (_x(), _x())),
    "rope_halves": lambda: (Call(rope_halves), (_heads(), *_turn(E))),
    "rope_partial": lambda: (Call(rope_partial), (_heads(), *_turn(E // 2))),
    "rope_chunk": lambda: (Call(rope_chunk), (_heads(), *_turn(E // 2))),
    "rope_gptj": lambda: (Call(rope_gptj), (_heads().transpose(1, 2), *_turn(E // 2))),
    "rope_cohere": lambda: (Call(rope_cohere), (_heads(), *_turn(E))),
    "rope_pairs": lambda: (Call(rope_pairs), (_heads(), *_turn(E // 2))),
    "eager": lambda: (SelfAttention(attend_eager), (_x(),)),
    "divided": lambda: (SelfAttention(attend_divided), (_x(),)),
    "scaled_query": lambda: (SelfAttention(attend_scaled_query), (_x(),)),
    "t5": lambda: (SelfAttention(attend_unscaled), (_x(), torch.randn(1, H, S, S))),
    "gemma2": lambda: (SelfAttention(attend_gemma2, G), (_x(), _float_mask())),
    "repeat_interleave": lambda: (SelfAttention(attend_interleaved, G), (_x(),)),
    "masked_fill": lambda: (SelfAttention(attend_masked_fill), (_x(), _bool_mask())),
    "normed": lambda: (SelfAttention(attend_normed), (_x(),)),
    "sdpa": lambda: (SelfAttention(sdpa()), (_x(),)),
    "sdpa_bool": lambda: (SelfAttention(sdpa()), (_x(), _bool_mask())),
    "sdpa_float": lambda: (SelfAttention(sdpa()), (_x(), _float_mask())),
    "sdpa_scale": lambda: (SelfAttention(sdpa(scale=0.25)), (_x(),)),
    "sdpa_causal": lambda: (SelfAttention(sdpa(is_causal=True)), (_x(),)),
    "sdpa_gqa": lambda: (SelfAttention(sdpa(enable_gqa=True), G), (_x(),)),
    "cross": lambda: (CrossAttention(sdpa()), (_x(), torch.randn(B, S + 3, D))),
    "cross_eager": lambda: (CrossAttention(attend_eager), (_x(), torch.randn(B, S + 3, D))),
    "mha": lambda: (Mha(False), (_x(),)),
    "mha_weights": lambda: (Mha(True), (_x(),)),
    "mha_cross": lambda: (Mha(True), (_x(), torch.randn(B, S + 3, D))),
    "mha_masked": lambda: (Mha(True), (_x(), _x(), torch.triu(torch.full((S, S), -1e9), 1))),
    "mha_batch_second": lambda: (Mha(True, batch_first=False), (_x(),)),
    "bmm": lambda: (Bmm(), (_x(), _float_mask())),
    "encoder_layer": lambda: (nn.TransformerEncoderLayer(D, H, 3 * D, batch_first=True, activation="gelu"), (_x(),)),
    "encoder_layer_norm_first": lambda: (nn.TransformerEncoderLayer(D, H, 3 * D, batch_first=True, norm_first=True), (_x(),)),
    "decoder_layer": lambda: (nn.TransformerDecoderLayer(D, H, 3 * D, batch_first=True), (_x(), torch.randn(B, S + 3, D))),
}


def export(name: str, exporter: str, dynamic: bool = True) -> onnx.ModelProto:
    """Export a block: `exporter` is "dyn18" (dynamo, opset 18), "ts17" (TorchScript) and so on."""
    torch.manual_seed(0)
    module, inputs = BLOCKS[name]()
    module = module.eval()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 1.0)  # biases of nn.MultiheadAttention start at zero
    opset = int(exporter.lstrip("dynts"))
    stream = io.BytesIO()
    names = [f"in{i}" for i in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter.startswith("ts"):
            axes = {n: _axes(x) for n, x in zip(names, inputs, strict=True)} if dynamic else {}
            torch.onnx.export(module, inputs, stream, opset_version=opset, dynamo=False, input_names=names, dynamic_axes=axes)
            return onnx.load_model_from_string(stream.getvalue())
        shapes = tuple(_axes(x) for x in inputs) if dynamic else None
        if isinstance(module, (Call, SelfAttention)) and shapes is not None:
            shapes = (shapes,) if isinstance(module, Call) else (shapes[0], shapes[1:]) if len(shapes) > 1 else shapes
        program = torch.onnx.export(module, inputs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False, input_names=names)
        return program.model_proto


def _axes(x: torch.Tensor) -> dict[int, str]:
    """Names of the dynamic dimensions of an input: batch and positions, wherever their sizes stand."""
    sizes = {B: "batch", S: "seq", S + 3: "memory"}
    return {i: sizes[n] if i in (0, 1, 2, 3) else "" for i, n in enumerate(x.shape) if n in sizes and (i == 0 or n != B)}
