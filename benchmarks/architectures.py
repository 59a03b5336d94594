"""Small models of many architectures with random weights, as something to export: what `coverage.py` measures.

Each is two layers deep and narrow; weights are amplified, so that a wrong scale, mask or bias shows in the outputs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers as hf

from rewrite.export.huggingface import as_flat
from rewrite.export.source import Source

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from exported import amplify

LAYERS, WIDTH, HEADS, INNER, VOCABULARY, POSITIONS = 2, 64, 4, 128, 100, 64
COMMON: dict[str, int] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
}  # fmt: skip
GROUPED: dict[str, int] = {**COMMON, "num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
IMAGE: dict[str, int] = {"image_size": 32, "patch_size": 8, "num_channels": 3}


@dataclass
class Architecture:
    """One row of the table: how the model is made, and how many attentions and MLPs it has by its configuration.

    `activation` is that of its MLPs, as the plugins call it; `gated` where there are two products before it.
    """

    name: str
    config: Callable[[], Any]
    activation: str = "gelu"
    gated: bool = False
    attentions: int = LAYERS
    mlps: int = LAYERS
    kind: str = "AutoModel"
    part: Callable[[Any], Source] = as_flat
    options: dict[str, Any] = field(default_factory=dict)

    def source(self, attention: str = "eager") -> Source:
        """The model with its wrapper, example inputs and dynamic dimensions."""
        torch.manual_seed(0)
        loader = getattr(hf, self.kind)
        make = loader.from_config if hasattr(loader, "from_config") else loader._from_config
        model = make(self.config(), attn_implementation=attention, **self.options).eval()
        amplify(model)
        fill(model)
        return self.part(model)


def fill(model: torch.nn.Module) -> None:
    """Random numbers where initialization leaves nothing but zeros (Swin's table of biases): a bias of zeros tests nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


# --- parts of encoder-decoder and two-tower models ----------------------------------------------------------------
class Encoder(torch.nn.Module):
    """The encoder of a text model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.get_encoder()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Decoder(torch.nn.Module):
    """The decoder of a text model, reading an encoder's result."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.get_decoder()

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask, use_cache=False
        ).last_hidden_state


class SpeechEncoder(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model.get_encoder()

    def forward(self, input_features: torch.Tensor) -> torch.Tensor:
        return self.model(input_features).last_hidden_state


class SpeechDecoder(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model.get_decoder()

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False).last_hidden_state


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def text_encoder(model: Any) -> Source:
    ids = _ids(2, 8)
    names = {0: "batch", 1: "sequence"}
    return Source(Encoder(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {"input_ids": names, "attention_mask": names}, ["last_hidden_state"], {"input_ids": VOCABULARY})


def text_decoder(model: Any) -> Source:
    ids, states = _ids(2, 6), torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    source = {0: "batch", 1: "source"}
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}, "encoder_hidden_states": source, "encoder_attention_mask": source}
    return Source(Decoder(model), inputs, dynamic, ["last_hidden_state"], {"input_ids": VOCABULARY})


def speech_encoder(model: Any) -> Source:
    frames = torch.randn(2, 16, 2 * POSITIONS, generator=torch.Generator().manual_seed(1))
    return Source(SpeechEncoder(model), {"input_features": frames}, {"input_features": {0: "batch"}}, ["last_hidden_state"])


def speech_decoder(model: Any) -> Source:
    inputs = {"input_ids": _ids(2, 6), "encoder_hidden_states": torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))}
    dynamic = {"input_ids": {0: "batch", 1: "sequence"}, "encoder_hidden_states": {0: "batch", 1: "source"}}
    return Source(SpeechDecoder(model), inputs, dynamic, ["last_hidden_state"], {"input_ids": VOCABULARY})


def every_expert(model: Any) -> Source:
    """A mixture whose experts all compute all tokens, weighted by the router: what an export without loops can do."""
    kind = next(type(m) for m in model.modules() if type(m).__name__.endswith("Experts"))

    def forward(self: Any, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(states)
        for i in range(self.num_experts):
            gate, up = torch.nn.functional.linear(states, self.gate_up_proj[i]).chunk(2, dim=-1)
            weight = (weights * (chosen == i)).sum(-1, keepdim=True)
            total = total + weight * torch.nn.functional.linear(self.act_fn(gate) * up, self.down_proj[i])
        return total

    for module in model.modules():
        if isinstance(module, kind):
            module.forward = MethodType(forward, module)
    return as_flat(model)


# --- configurations -----------------------------------------------------------------------------------------------
def _made(kind: str, base: dict[str, int], **more: Any) -> Callable[[], Any]:
    """The configuration class `kind` with those of the sizes that it knows, and `more`."""

    def make() -> Any:
        cls = getattr(hf, kind)
        known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__annotations__", {})) | set(cls.attribute_map)
        return cls(**{k: v for k, v in base.items() if k in known}, **more)

    return make


BART = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER,
}  # fmt: skip
BART_TEXT = {**BART, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
SPEECH = {
    **BART, "vocab_size": VOCABULARY, "num_mel_bins": 16, "max_source_positions": POSITIONS, "max_target_positions": POSITIONS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "begin_suppress_tokens": None,
}  # fmt: skip
T5 = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": INNER, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCABULARY, "dropout_rate": 0.0}
CAUSAL = "AutoModelForCausalLM"
SLIDING = ["sliding_attention", "full_attention"]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP_VISION = {k: v for k, v in COMMON.items() if k not in ("vocab_size", "max_position_embeddings")}

ARCHITECTURES = [
    Architecture("BERT", _made("BertConfig", COMMON)),
    Architecture("RoBERTa", _made("RobertaConfig", {**COMMON, "max_position_embeddings": 66})),
    Architecture("DistilBERT", _made("DistilBertConfig", {}, dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=INNER, vocab_size=VOCABULARY, max_position_embeddings=POSITIONS)),
    Architecture("ALBERT", _made("AlbertConfig", COMMON, embedding_size=32), "gelu_tanh"),
    Architecture("DeBERTa-v2", _made("DebertaV2Config", COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True)),
    Architecture("ELECTRA", _made("ElectraConfig", COMMON, embedding_size=32)),
    Architecture("MPNet", _made("MPNetConfig", {**COMMON, "max_position_embeddings": 66})),
    Architecture("ModernBERT", _made("ModernBertConfig", COMMON, local_attention=4, global_attn_every_n_layers=2, pad_token_id=0), "gelu", True),
    Architecture("GPT-2", _made("GPT2Config", {}, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY, n_positions=POSITIONS), "gelu_tanh", kind=CAUSAL),
    Architecture("GPT-NeoX", _made("GPTNeoXConfig", COMMON), kind=CAUSAL),
    Architecture("GPT-J", _made("GPTJConfig", {}, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, rotary_dim=8, vocab_size=VOCABULARY, n_positions=POSITIONS), "gelu_tanh", kind=CAUSAL),
    Architecture("OPT", _made("OPTConfig", COMMON, ffn_dim=INNER, word_embed_proj_dim=WIDTH), "relu", kind=CAUSAL),
    Architecture("BLOOM", _made("BloomConfig", {}, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=VOCABULARY), "gelu_tanh", kind=CAUSAL),
    Architecture("Falcon (rotary)", _made("FalconConfig", COMMON, new_decoder_architecture=False, multi_query=True, parallel_attn=True, alibi=False), kind=CAUSAL),
    Architecture("Falcon (ALiBi)", _made("FalconConfig", COMMON, new_decoder_architecture=False, multi_query=False, parallel_attn=False, alibi=True, bias=True), kind=CAUSAL),
    Architecture("Llama", _made("LlamaConfig", GROUPED), "swish", True, kind=CAUSAL),
    Architecture("Mistral", _made("MistralConfig", GROUPED, sliding_window=4), "swish", True, kind=CAUSAL),
    Architecture("Mixtral", _made("MixtralConfig", GROUPED, num_local_experts=2, num_experts_per_tok=1), "swish", True, mlps=2 * LAYERS, kind=CAUSAL, part=every_expert),
    Architecture("Qwen2", _made("Qwen2Config", GROUPED), "swish", True, kind=CAUSAL),
    Architecture("Qwen3", _made("Qwen3Config", GROUPED), "swish", True, kind=CAUSAL),
    Architecture("Gemma 2", _made("Gemma2Config", GROUPED, sliding_window=4, layer_types=SLIDING, query_pre_attn_scalar=16), "gelu_tanh", True, kind=CAUSAL),
    Architecture("Gemma 3", _made("Gemma3TextConfig", GROUPED, sliding_window=4, layer_types=SLIDING), "gelu_tanh", True, kind=CAUSAL),
    Architecture("Phi", _made("PhiConfig", COMMON), "gelu_tanh", kind=CAUSAL),
    Architecture("Phi-3", _made("Phi3Config", GROUPED, **TOKENS), "swish", True, kind=CAUSAL),
    Architecture("StarCoder2", _made("Starcoder2Config", GROUPED), "gelu_tanh", kind=CAUSAL),
    Architecture("Nemotron", _made("NemotronConfig", GROUPED), "relu2", kind=CAUSAL),
    Architecture("GLM", _made("GlmConfig", GROUPED, **TOKENS), "swish", True, kind=CAUSAL),
    Architecture("OLMo 2", _made("Olmo2Config", GROUPED, **TOKENS), "swish", True, kind=CAUSAL),
    Architecture("T5 encoder", lambda: hf.T5Config(**T5), "relu", part=text_encoder),
    Architecture("T5 decoder", lambda: hf.T5Config(**T5), "relu", attentions=2 * LAYERS, part=text_decoder),
    Architecture("T5 1.1 encoder", lambda: hf.T5Config(**T5, feed_forward_proj="gated-gelu"), "gelu_tanh", True, part=text_encoder),
    Architecture("BART encoder", lambda: hf.BartConfig(**BART_TEXT), part=text_encoder),
    Architecture("BART decoder", lambda: hf.BartConfig(**BART_TEXT), attentions=2 * LAYERS, part=text_decoder),
    Architecture("Whisper encoder", lambda: hf.WhisperConfig(**SPEECH), part=speech_encoder),
    Architecture("Whisper decoder", lambda: hf.WhisperConfig(**SPEECH), attentions=2 * LAYERS, part=speech_decoder),
    Architecture("ViT", _made("ViTConfig", COMMON, **IMAGE)),
    Architecture("DeiT", _made("DeiTConfig", COMMON, **IMAGE)),
    Architecture("DINOv2", _made("Dinov2Config", COMMON, **IMAGE, mlp_ratio=2)),
    Architecture("Swin", lambda: hf.SwinConfig(image_size=32, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4), attentions=4, mlps=4),
    Architecture("CLIP text", _made("CLIPTextConfig", COMMON, **TOKENS), "quick_gelu", kind="CLIPTextModel"),
    Architecture("CLIP vision", _made("CLIPVisionConfig", CLIP_VISION, **IMAGE), "quick_gelu", kind="CLIPVisionModel"),
    Architecture("SigLIP vision", _made("SiglipVisionConfig", CLIP_VISION, **IMAGE), "gelu_tanh", kind="SiglipVisionModel"),
]  # fmt: skip
