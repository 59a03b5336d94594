"""Attentions and their masks as people write them in PyTorch, like `blocks.py`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from blocks import B, Block, D, E, G, H, S, given
from torch import nn

P = 5  # cached positions


class SelfAttention(nn.Module):
    """Projections around `attend(q, k, v, *extra)`, on [B, heads, S, E]."""

    def __init__(self, attend: Any, groups: int = H):
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
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * torch.linspace(0.5, 1.5, E).to(x.dtype)

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


# --- attention in other spellings -----------------------------------------------------------------------------------
def attend_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * E**-0.5, dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def attend_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend_eager(q, repeat_kv(k, H // G), repeat_kv(v, H // G))


def attend_bloom(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Heads folded into the batch for both products, but not for the softmax."""
    b, h, s, e = q.shape
    scores = torch.baddbmm(bias.repeat(b, 1, 1), q.reshape(b * h, s, e), k.reshape(b * h, -1, e).transpose(1, 2), beta=1.0, alpha=E**-0.5)
    weights = F.softmax(scores.view(b, h, s, -1), dim=-1).view(b * h, s, -1)
    return torch.bmm(weights, v.reshape(b * h, -1, e)).view(b, h, s, e)


def attend_repeated_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Key heads repeated while positions still come first."""

    def repeat(x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        b, t, g, e = x.shape
        return x[:, :, :, None, :].expand(b, t, g, H // g, e).reshape(b, t, H, e).transpose(1, 2)

    return attend_eager(q, repeat(k), repeat(v))


def attend_sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """gpt-oss: a column more in the softmax, dropped after it."""
    scores = torch.matmul(q, k.transpose(2, 3)) * E**-0.5
    sink = torch.linspace(-1, 1, H).to(q.dtype).reshape(1, H, 1, 1).expand(q.shape[0], H, q.shape[2], 1)
    return torch.matmul(torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1], v)


class MergedProjection(nn.Module):
    """Queries, keys and values from one product, cut by `cut`."""

    def __init__(self, cut: Any):
        super().__init__()
        self.qkv, self.o, self.cut = nn.Linear(D, 3 * H * E), nn.Linear(H * E, D), cut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.cut(self.qkv(x))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], H * E))


def cut_split(y: torch.Tensor) -> Any:
    """GPT-2"""
    return (part.view(*part.shape[:2], H, E).transpose(1, 2) for part in y.split(H * E, dim=2))


def cut_unbind(y: torch.Tensor) -> Any:
    """timm"""
    return y.reshape(*y.shape[:2], 3, H, E).permute(2, 0, 3, 1, 4).unbind(0)


# --- masks ----------------------------------------------------------------------------------------------------------
def masked(scores: torch.Tensor, keep: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.softmax(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), dim=-1), v)


def attend_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return masked(torch.matmul(q, k.transpose(2, 3)) * E**-0.5, keep, v)


def attend_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    return masked(torch.matmul(q, k.transpose(2, 3)) * E**-0.5, (j <= i) & (i - j < 3), v)


def attend_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """BERT before 2025: (1 - mask) * lowest"""
    low = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) / math.sqrt(E) + low, dim=-1), v)


def sdpa_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())


def sdpa_causal_padding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep & mask[:, None, None, :].bool())


def attend_two_fills(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = torch.matmul(q, k.transpose(2, 3)) * E**-0.5
    return masked(scores.masked_fill(~keep, torch.finfo(q.dtype).min), mask[:, None, None, :].bool(), v)


def attend_filled_and_added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """GPT-J, CodeGen: a triangle chooses, padding is added."""
    keep = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = torch.where(keep, torch.matmul(q, k.transpose(2, 3)) * E**-0.5, torch.finfo(q.dtype).min)
    return torch.matmul(torch.softmax(scores + mask, dim=-1), v)


def attend_two_added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) * E**-0.5 + bias + mask, dim=-1), v)


def attend_scaled_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Falcon scales its bias, too."""
    return torch.matmul(torch.softmax((torch.matmul(q, k.transpose(2, 3)) + bias) * E**-0.5 + mask, dim=-1), v)


def attend_unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """transformers' eager without a mask: one that hides nothing is made and added."""
    keep = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    mask = torch.where(keep, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) * E**-0.5 + mask, dim=-1), v)


def attend_alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    slopes = torch.tensor([2.0**-n for n in range(1, H + 1)]).reshape(H, 1, 1).to(q.dtype)
    return masked(torch.matmul(q, k.transpose(2, 3)) * E**-0.5 + slopes * (j - i), j <= i, v)


class CausalBuffer(SelfAttention):
    """nanoGPT: a triangle kept as a buffer, cut to size."""

    def __init__(self) -> None:
        super().__init__(self.attend_buffer)
        self.register_buffer("triangle", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def attend_buffer(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) * (1.0 / math.sqrt(E))
        scores = scores.masked_fill(self.triangle[:, :, : q.shape[2], : q.shape[2]] == 0, float("-inf"))
        return torch.matmul(F.softmax(scores, dim=-1), v)


def attend_cached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor) -> torch.Tensor:
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    i, j = torch.arange(q.shape[2])[:, None] + past_k.shape[2], torch.arange(k.shape[2])[None]
    return masked(torch.matmul(q, k.transpose(2, 3)) * E**-0.5, j <= i, v)


def _bool_mask() -> torch.Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()[None, None].repeat(B, 1, 1, 1)


def _float_mask() -> torch.Tensor:
    return torch.where(_bool_mask(), 0.0, -6e4)


def _padding() -> torch.Tensor:
    return (torch.arange(S)[None] < torch.tensor([[S], [S - 2]])).long()


def _self(attend: Any, *extra: Any, groups: int = H) -> Any:
    return lambda: (SelfAttention(attend, groups), (given(), *(make() for make in extra)))


ATTENTION = {"FusedAttention": 1, "MatMulAct": 4}
KNOWN = {**ATTENTION, "AttentionMask": 1}
ONE = {"FusedAttention": 1, "MatMulAct": 2}
LAYER = {"FusedAttention": 1, "MatMulAct": 4, "LayerNormalization": 2, "Add": 1}
ATTENTIONS = {
    "eager": Block("softmax(q @ k^T * scale) @ v: transformers' eager", _self(attend_eager), ATTENTION),
    "divided": Block("softmax(q @ k^T / sqrt(size)) @ v", _self(attend_divided), ATTENTION),
    "scaled_query": Block("softmax((q * scale) @ k^T) @ v", _self(attend_scaled_query), ATTENTION),
    "einsum": Block("the products by einsum", _self(attend_einsum), ATTENTION),
    "t5": Block("no scale, a bias of relative positions added: T5", _self(attend_unscaled, lambda: given(1, H, S, S)), ATTENTION),
    "gemma2": Block("soft cap, mask added, softmax in float32: Gemma 2", lambda: (SelfAttention(attend_gemma2, G), (given(), _float_mask())), ATTENTION),
    "grouped": Block("key heads repeated by expand: Llama's repeat_kv", _self(attend_grouped, groups=G), ATTENTION),
    "repeat_interleave": Block("key heads repeated by repeat_interleave", _self(attend_interleaved, groups=G), ATTENTION),
    "masked_fill": Block("masked_fill with a given boolean mask", _self(attend_masked_fill, _bool_mask), ATTENTION),
    "normed": Block("queries and keys normed first: Qwen 3", _self(attend_normed), {**ATTENTION, "RMSNormalization": 2}),
    "sdpa": Block("scaled_dot_product_attention", _self(sdpa()), ATTENTION),
    "sdpa_bool": Block("the same, boolean mask given", _self(sdpa(), _bool_mask), ATTENTION),
    "sdpa_float": Block("the same, float mask given", _self(sdpa(), _float_mask), ATTENTION),
    "sdpa_scale": Block("the same, scale given", _self(sdpa(scale=0.25)), ATTENTION),
    "sdpa_gqa": Block("the same, enable_gqa", _self(sdpa(enable_gqa=True), groups=G), ATTENTION),
    "cross": Block("sdpa over another sequence", lambda: (CrossAttention(sdpa()), (given(), given(B, S + 3, D))), ATTENTION),
    "cross_eager": Block("eager over another sequence", lambda: (CrossAttention(attend_eager), (given(), given(B, S + 3, D))), ATTENTION),
    "qkv_split": Block("q, k, v from one product by split: GPT-2", lambda: (MergedProjection(cut_split), (given(),)), ONE),
    "qkv_unbind": Block("q, k, v from one product by permute and unbind: timm", lambda: (MergedProjection(cut_unbind), (given(),)), ONE),
    "bloom": Block("heads folded for the products alone, baddbmm: BLOOM", _self(attend_bloom, lambda: given(H, 1, S)), ATTENTION),
    "repeated_first": Block("key heads repeated before the transpose", _self(attend_repeated_first, groups=G), ATTENTION),
    "two_added": Block("a bias and a mask added", _self(attend_two_added, lambda: given(1, H, S, S), _float_mask), {**ATTENTION, "Add": 1}),
    "scaled_bias": Block("(scores + bias) * scale + mask: Falcon", _self(attend_scaled_bias, lambda: given(1, H, S, S), _float_mask), {**ATTENTION, "Mul": 1, "Add": 1}),
    "sinks": Block("a column of sinks in the softmax: gpt-oss", _self(attend_sinks), ATTENTION),
    "mha": Block("nn.MultiheadAttention", lambda: (Mha(False), (given(),)), ONE),
    "mha_weights": Block("the same, need_weights", lambda: (Mha(True), (given(),)), ONE),
    "mha_cross": Block("the same over another sequence", lambda: (Mha(True), (given(), given(B, S + 3, D))), {"FusedAttention": 1, "MatMulAct": 3}),
    "mha_masked": Block("the same with a float mask", lambda: (Mha(True), (given(), given(), torch.triu(torch.full((S, S), -6e4), 1))), {"FusedAttention": 1, "MatMulAct": 3}),
    "mha_batch_second": Block("the same with the batch second", lambda: (Mha(True, batch_first=False), (given(),)), ONE),
    "bmm": Block("heads folded into the batch, bmm, float mask: OPT, BART before 2024", lambda: (Bmm(), (given(), _float_mask())), {**ATTENTION, "Mul": 1}),
    "encoder_layer": Block(
        "nn.TransformerEncoderLayer, gelu", lambda: (nn.TransformerEncoderLayer(D, H, 3 * D, batch_first=True, activation="gelu"), (given(),)), {**LAYER, "gelu": 1}
    ),
    "encoder_layer_norm_first": Block(
        "the same, norm_first, relu", lambda: (nn.TransformerEncoderLayer(D, H, 3 * D, batch_first=True, norm_first=True), (given(),)), {**LAYER, "relu": 1}
    ),
    "decoder_layer": Block(
        "nn.TransformerDecoderLayer",
        lambda: (nn.TransformerDecoderLayer(D, H, 3 * D, batch_first=True), (given(), given(B, S + 3, D))),
        {"FusedAttention": 2, "MatMulAct": 7, "relu": 1, "LayerNormalization": 3, "Add": 2},
    ),
}
MASKS = {
    "causal": Block("tril of ones, masked_fill", _self(attend_causal), KNOWN),
    "causal_buffer": Block("tril kept as a buffer, cut to size: nanoGPT", lambda: (CausalBuffer(), (given(),)), KNOWN),
    "sdpa_causal": Block("sdpa(is_causal=True)", _self(sdpa(is_causal=True)), KNOWN),
    "window": Block("a sliding window by arange", _self(attend_window), KNOWN),
    "padding": Block("(1 - mask) * lowest, added: BERT", _self(attend_padding, _padding), KNOWN),
    "sdpa_padding": Block("sdpa with mask[:, None, None, :].bool()", _self(sdpa_padding, _padding), KNOWN),
    "sdpa_causal_padding": Block("sdpa with tril & padding", _self(sdpa_causal_padding, _padding), KNOWN),
    "cached": Block("causal over cached and new keys", _self(attend_cached, lambda: given(B, H, P, E), lambda: given(B, H, P, E)), KNOWN),
    "two_fills": Block("masked_fill by a triangle, then by padding", _self(attend_two_fills, _padding), KNOWN),
    "filled_and_added": Block("where(triangle, scores, lowest) + mask given: GPT-J", _self(attend_filled_and_added, _float_mask), ATTENTION),
    "unmasked": Block("a mask of ones made and added: transformers' eager without one", _self(attend_unmasked), ATTENTION),
    "alibi": Block("slopes * distance added, causal: ALiBi", _self(attend_alibi), KNOWN),
}
BLOCKS = {"attentions": ATTENTIONS, "masks": MASKS}
