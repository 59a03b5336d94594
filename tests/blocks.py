"""Building blocks of transformers as people write them in PyTorch: material of `benchmarks/forms.py` and the tests.

Where a block is known from a model in `transformers`, its forward pass is spelled as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

B, S, D, H, G, E = 2, 6, 32, 4, 2, 8  # batch, positions, width, query heads, key heads, size of a head


class Block(NamedTuple):
    """What it computes, a function that makes a module and its example inputs, and the operators that it should become
    besides those that only move data; activations and layouts stand for the attributes of plugin nodes."""

    what: str
    make: Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
    goal: dict[str, int]


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


def gelu_python(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_bloom(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    return torch.square(F.relu(x))


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class Linear(nn.Module):
    """after(x @ w + b), and what is made of it with x."""

    def __init__(self, after: Any, bias: bool = True):
        super().__init__()
        self.linear, self.after = nn.Linear(D, D, bias=bias), after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.linear(x), x)


class Conv1d(nn.Module):
    """GPT-2's: the weight as [in, out], all positions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, 3 * D) * 0.2), nn.Parameter(torch.rand(3 * D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 3 * D)


class Tied(nn.Module):
    """The logits of a language model whose embedding is its last weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3 * D, D)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.linear(torch.tanh(self.table(ids)), self.table.weight)


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


class GluMlp(Phi3Mlp):
    """PyTorch's own gated linear unit: a * sigmoid(b)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.glu(self.gate_up(x), dim=-1))


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


class T5Norm(LlamaNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


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
        normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
        if self.form == "plain":
            return normed
        return self.weight * normed if self.form == "no bias" else self.weight * normed + self.bias


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


def rope_angles(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Llama, from the product of positions and frequencies on."""
    both = torch.cat((angles, angles), dim=-1)
    return rope_halves(x, both.cos(), both.sin())


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


def given(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (B, S, D)))


def _heads() -> torch.Tensor:
    return torch.randn(B, H, S, E)


def _turn(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(B, S, size) * 6
    return angle.cos(), angle.sin()


def _of(function: Any) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    return lambda: (Call(function), (given(),))


def _rope(function: Any, size: int) -> Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    return lambda: (Call(function), (_heads(), *_turn(size)))


TWO = {"MatMulAct": 2}
GATED = {"GatedMatMulAct": 1, "MatMulAct": 1}

ACTIVATIONS = {
    "gelu": Block("F.gelu(x)", _of(F.gelu), {"Gelu": 1}),
    "gelu_python": Block("x * 0.5 * (1 + erf(x / sqrt(2)))", _of(gelu_python), {"Gelu": 1}),
    "gelu_tanh": Block('F.gelu(x, approximate="tanh")', _of(lambda x: F.gelu(x, approximate="tanh")), {"Gelu": 1}),
    "gelu_new": Block("0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))): GPT-2", _of(gelu_new), {"Gelu": 1}),
    "gelu_bloom": Block("x * 0.5 * (1 + tanh(0.79788456 * x * (1 + 0.044715 * x * x))): BLOOM", _of(gelu_bloom), {"Gelu": 1}),
    "quick_gelu": Block("x * sigmoid(1.702 * x): CLIP", _of(quick_gelu), {"Swish": 1}),
    "silu": Block("F.silu(x)", _of(F.silu), {"Swish": 1}),
    "relu_squared": Block("square(relu(x)): Nemotron", _of(relu_squared), {"Relu": 1, "Pow": 1}),
}
PRODUCTS = {
    "linear": Block("nn.Linear, 3 dimensions", lambda: (nn.Linear(D, 3 * D), (given(),)), {"MatMulAct": 1}),
    "linear_no_bias": Block("nn.Linear without bias", lambda: (nn.Linear(D, 3 * D, bias=False), (given(),)), {"MatMulAct": 1}),
    "linear_2d": Block("nn.Linear, 2 dimensions", lambda: (nn.Linear(D, 3 * D), (given(S, D),)), {"MatMulAct": 1}),
    "conv1d": Block("addmm on [-1, width]: GPT-2's Conv1D", lambda: (Conv1d(), (given(),)), {"MatMulAct": 1}),
    "tied": Block("logits with the weight of the embedding", lambda: (Tied(), (torch.arange(B * S).view(B, S),)), {"Tanh": 1, "MatMulAct": 1}),
    "residual": Block("x + linear(x)", lambda: (Linear(lambda y, x: x + y), (given(),)), {"MatMulAct": 1}),
    "residual_no_bias": Block("linear(x) + x, without bias", lambda: (Linear(lambda y, x: y + x, bias=False), (given(),)), {"MatMulAct": 1}),
    "activation_residual": Block("x + gelu(linear(x))", lambda: (Linear(lambda y, x: x + F.gelu(y)), (given(),)), {"MatMulAct": 1, "gelu": 1}),
    "mlp_gelu": Block("down(gelu(up(x)))", lambda: (Mlp(nn.GELU()), (given(),)), {**TWO, "gelu": 1}),
    "mlp_gelu_new": Block("x + down(gelu_new(up(x))): GPT-2", lambda: (Mlp(gelu_new, residual=True), (given(),)), {**TWO, "gelu_tanh": 1}),
    "mlp_quick_gelu": Block("down(quick_gelu(up(x))): CLIP", lambda: (Mlp(quick_gelu), (given(),)), {**TWO, "quick_gelu": 1}),
    "mlp_relu": Block("x + down(relu(up(x)))", lambda: (Mlp(nn.ReLU(), residual=True), (given(),)), {**TWO, "relu": 1}),
    "mlp_relu_squared": Block("down(square(relu(up(x)))): Nemotron", lambda: (Mlp(relu_squared, bias=False), (given(),)), {**TWO, "relu2": 1}),
    "mlp_silu": Block("down(silu(up(x))), no bias", lambda: (Mlp(nn.SiLU(), bias=False), (given(),)), {**TWO, "swish": 1}),
    "mlp_tanh": Block("down(tanh(up(x)))", lambda: (Mlp(nn.Tanh()), (given(),)), {**TWO, "tanh": 1}),
    "swiglu": Block("down(silu(gate(x)) * up(x)): Llama", lambda: (GatedMlp(nn.SiLU()), (given(),)), {**GATED, "swish": 1}),
    "geglu": Block("down(gelu(gate(x)) * up(x)), biases", lambda: (GatedMlp(nn.GELU(), bias=True), (given(),)), {**GATED, "gelu": 1}),
    "geglu_tanh": Block('down(gelu(gate(x), "tanh") * up(x)): Gemma', lambda: (GatedMlp(nn.GELU(approximate="tanh")), (given(),)), {**GATED, "gelu_tanh": 1}),
    "phi3_mlp": Block("gate, up = chunk(gate_up(x)); down(up * silu(gate)): Phi-3", lambda: (Phi3Mlp(nn.SiLU()), (given(),)), {**GATED, "swish": 1, "gate_up": 1}),
    "phi3_mlp_bias": Block("the same with gelu and biases", lambda: (Phi3Mlp(nn.GELU(), bias=True), (given(),)), {**GATED, "gelu": 1, "gate_up": 1}),
    "phi3_mlp_swapped": Block("the same with the gate in the second half", lambda: (Phi3Mlp(nn.SiLU(), swapped=True), (given(),)), {**GATED, "swish": 1, "up_gate": 1}),
    "sliced_mlp": Block("the same, cut by slices", lambda: (SlicedMlp(nn.GELU()), (given(),)), {**GATED, "gelu": 1, "gate_up": 1}),
    "glu_mlp": Block("down(F.glu(gate_up(x)))", lambda: (GluMlp(None), (given(),)), {**GATED, "sigmoid": 1, "up_gate": 1}),
}
RMS, LAYER = {"RMSNormalization": 1}, {"LayerNormalization": 1}
NORMS = {
    "llama_norm": Block("weight * (x * rsqrt(mean(x^2) + eps)), in float32: Llama", lambda: (LlamaNorm(), (given(),)), RMS),
    "gemma_norm": Block("x * rsqrt(mean(x^2) + eps) * (1 + weight), in float32: Gemma", lambda: (GemmaNorm(), (given(),)), RMS),
    "t5_norm": Block("weight * (x * rsqrt(mean(float(x)^2) + eps)): T5", lambda: (T5Norm(), (given(),)), RMS),
    "sqrt_norm": Block("weight * (x / sqrt(mean(x * x) + eps))", lambda: (SqrtNorm(), (given(),)), RMS),
    "plain_norm": Block("x * rsqrt(mean(x^2) + eps), no weight: Llama 4", lambda: (PlainNorm(), (given(),)), RMS),
    "torch_rms_norm": Block("nn.RMSNorm", lambda: (nn.RMSNorm(D, eps=1e-6), (given(),)), RMS),
    "layer_norm": Block("nn.LayerNorm", lambda: (nn.LayerNorm(D), (given(),)), LAYER),
    "layer_norm_no_bias": Block("nn.LayerNorm without bias", lambda: (nn.LayerNorm(D, bias=False), (given(),)), LAYER),
    "layer_norm_no_weight": Block("nn.LayerNorm without weight and bias", lambda: (nn.LayerNorm(D, elementwise_affine=False), (given(),)), LAYER),
    "hand_layer_norm": Block("weight * (x - mean) / sqrt(x.var() + eps) + bias", lambda: (HandLayerNorm(), (given(),)), LAYER),
    "hand_layer_norm_pow": Block("c = x - mean; weight * (c * rsqrt(mean(c^2) + eps)) + bias", lambda: (HandLayerNorm("pow"), (given(),)), LAYER),
    "hand_layer_norm_no_bias": Block("the same without bias", lambda: (HandLayerNorm("no bias"), (given(),)), LAYER),
    "hand_layer_norm_plain": Block("the same without weight and bias", lambda: (HandLayerNorm("plain"), (given(),)), LAYER),
    "residual_rms_norm": Block("t = x + y; llama_norm(t), t", lambda: (ResidualNorm(LlamaNorm()), (given(), given())), {**RMS, "Add": 1}),
}
ROTARY = {"Rotary": 1}
ROTATIONS = {
    "rope_halves": Block("x * cos + cat(-x2, x1) * sin: Llama", _rope(rope_halves, E), ROTARY),
    "rope_angles": Block("the same from angles: cat(f, f), cos, sin", lambda: (Call(rope_angles), (_heads(), torch.rand(B, S, E // 2) * 6)), {**ROTARY, "Cos": 1, "Sin": 1}),
    "rope_partial": Block("x * cos + cat(-x2, x1) * sin for the first half of each head: Phi, GPT-NeoX", _rope(rope_partial, E // 2), ROTARY),
    "rope_chunk": Block("cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin): gpt-oss", _rope(rope_chunk, E // 2), ROTARY),
    "rope_gptj": Block("x * cos + interleave(-odd, even) * sin, cos and sin repeated: GPT-J", lambda: (Call(rope_gptj), (given(B, S, H, E), *_turn(E // 2))), ROTARY),
    "rope_cohere": Block("the same, cos and sin given in full: Cohere", _rope(rope_cohere, E), ROTARY),
    "rope_pairs": Block("pairs by reshape, stack(a * cos - b * sin, a * sin + b * cos): Meta's Llama", _rope(rope_pairs, E // 2), ROTARY),
}
BLOCKS = {"activations": ACTIVATIONS, "products": PRODUCTS, "norms": NORMS, "rotary embeddings": ROTATIONS}
