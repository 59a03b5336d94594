"""What a user of PyTorch has for text generation on a GPU: torch.compile around a static cache, and transformers' own ways.

Each measurement takes prompts int64 [B, P] and how many tokens come after them, and returns seconds and greedy tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer


@dataclass
class Timing:
    """Seconds a step, each the mean of one run, seconds to the first token of each run, and the tokens of the last run."""

    steps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def step(self) -> float:
        return statistics.median(self.steps)

    @property
    def prefill(self) -> float:
        return statistics.median(self.first)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load(directory: Any, device: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").eval().to(device)


class Repeated:
    """A function without arguments as one CUDA graph, warmed up; without a GPU just the function. Its outputs have fixed places."""

    def __init__(self, function: Callable[[], Any]):
        if not torch.cuda.is_available():
            self.result, self.run = function(), function
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = function()
        self.run = graph.replay


# --- torch.compile -----------------------------------------------------------------------------------------------
# How a step attends to its static cache:
#   sdpa     as in the documentation of transformers: StaticCache, scaled_dot_product_attention with a mask
#   grouped  products in which the heads of a group share their keys, written so that the compiler repeats nothing
#   flex     flex_attention with a block mask, as gpt-fast has it: split over the keys
# The last two have a cache whose layers share one position, as gpt-fast has it.
KINDS = ("sdpa", "grouped", "flex")


class Kept(StaticLayer):  # type: ignore[misc]
    """Keys and values of all positions of one layer, the new ones stored at `at` int64 [tokens], which all layers share."""

    def __init__(self, length: int, at: torch.Tensor):
        super().__init__(length)
        self.at = at

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values


def grouped(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scaling: float, **_: Any) -> tuple[torch.Tensor, None]:
    """One token each: q [B, H, 1, D], k and v [B, G, S, D], mask bool [1, 1, 1, S]."""
    batch, heads, _, size = q.shape
    q = q.view(batch, k.shape[1], heads // k.shape[1], size)
    weights = torch.softmax((q @ k.mT).float() * scaling + torch.where(mask, 0.0, -torch.inf), -1)
    return (weights.to(v.dtype) @ v).view(batch, 1, heads, size), None


def flex(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any) -> tuple[torch.Tensor, None]:
    return flex_attention(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None


def causal(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, scaling: float, **_: Any) -> tuple[torch.Tensor, None]:
    """A whole prompt without a mask tensor, so that PyTorch may take its fastest kernel."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None


for function in (grouped, flex, causal):
    transformers.AttentionInterface.register(function.__name__, function)


def compiled(function: Callable[..., Any], backend: str) -> Any:
    """max-autotune, but CUDA graphs are captured by hand: one for a whole step, whose inputs need no copies. `backend` is inductor, except in tests."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if backend == "inductor" else {"backend": backend}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


@contextmanager
def attending(model: Any, kind: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(kind)
    yield
    model.set_attn_implementation(before)


@torch.no_grad()
def decode(model: Any, prompts: torch.Tensor, new: int, kind: str, repeat: int = 3, backend: str = "inductor") -> Timing:
    """Steps of one token with a static cache of just the length that is needed; tokens stay on the device, the host only launches graphs."""
    (batch, length), device = prompts.shape, prompts.device
    shared = torch.arange(length, device=device)
    cache = StaticCache(config=model.config, max_cache_len=length + new) if kind == "sdpa" else Cache(layers=[Kept(length + new, shared) for _ in model.model.layers])
    with attending(model, "causal"):
        first = model(prompts, past_key_values=cache, position_ids=shared[None], use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    at = torch.full((1,), length, device=device)
    for layer in cache.layers:
        layer.at = at
    token, seen, columns = first.clone(), torch.zeros(batch, new, dtype=torch.int64, device=device), torch.arange(length + new, device=device)
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, length + new, length + new, device=device.type) if kind == "flex" else None

    def mask() -> Any:
        if blocks is None:
            return None if kind == "sdpa" else (columns <= at)[None, None, None]
        row = blocks[:, :, at // blocks.BLOCK_SIZE[0]]
        row.mask_mod = lambda b, h, q, k: q + at[0] >= k
        row.seq_lengths = (1, length + new)
        return row

    def step(token: torch.Tensor) -> torch.Tensor:
        logits = model(token, attention_mask=mask(), position_ids=at[None], past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

    run = compiled(step, backend)

    def again() -> None:
        token.copy_(run(token))
        seen.index_copy_(1, at - length, token)
        at.add_(1)

    def rewind() -> None:
        token.copy_(first)
        at.fill_(length)
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    timing = Timing()
    started = time.perf_counter()
    with attending(model, kind):
        rewind()
        graph = Repeated(again)
        synchronize()
        timing.compile_seconds = time.perf_counter() - started
        for _ in range(repeat):
            rewind()
            synchronize()
            started = time.perf_counter()
            for _ in range(new):
                graph.run()
            synchronize()
            timing.steps.append((time.perf_counter() - started) / new)
    timing.tokens = torch.cat([first, seen], 1).tolist()
    return timing


@torch.no_grad()
def prefill(model: Any, prompt: torch.Tensor, repeat: int = 10, backend: str = "inductor") -> Timing:
    """A whole prompt [1, P], its keys and values kept, and the first token."""
    positions = torch.arange(prompt.shape[1], device=prompt.device)
    cache = Cache(layers=[Kept(prompt.shape[1], positions) for _ in model.model.layers])

    def read(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, past_key_values=cache, use_cache=True, position_ids=positions[None], logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)  # type: ignore[no-any-return]

    timing = Timing()
    with attending(model, "causal"):
        read(prompt)  # the cache is there
        run = compiled(read, backend)
        started = time.perf_counter()
        graph = Repeated(lambda: run(prompt))
        synchronize()
        timing.compile_seconds = time.perf_counter() - started
        for _ in range(repeat):
            synchronize()
            started = time.perf_counter()
            graph.run()
            synchronize()
            timing.first.append(time.perf_counter() - started)
    timing.tokens = graph.result.tolist()
    return timing


# --- transformers ------------------------------------------------------------------------------------------------
def greedy(new: int, **options: Any) -> transformers.GenerationConfig:
    return transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=0, **options)


@torch.no_grad()
def generate(model: Any, prompts: torch.Tensor, new: int, repeat: int = 3) -> Timing:
    """`generate` with its static cache; on a GPU it compiles decoding (reduce-overhead) by itself. The time of the first token is taken off."""
    torch._dynamo.reset()
    length, mask, timing = prompts.shape[1], torch.ones_like(prompts), Timing()
    first, whole = (greedy(n, cache_implementation="static", max_cache_len=length + new + 1) for n in (1, new + 1))

    def seconds(options: transformers.GenerationConfig) -> float:
        synchronize()
        began = time.perf_counter()
        timing.tokens = model.generate(prompts, attention_mask=mask, generation_config=options)[:, length:].tolist()
        synchronize()
        return time.perf_counter() - began

    timing.compile_seconds = seconds(whole) + seconds(whole)  # CUDA graphs are recorded by the second
    for _ in range(repeat):
        timing.first.append(seconds(first))
        timing.steps.append((seconds(whole) - timing.first[-1]) / new)
    return timing


@contextmanager
def serving(model: Any, new: int, longest: int, texts: int, **options: Any) -> Iterator[Any]:
    """transformers' continuous batching, started and warmed up, with hints about the load as `generate_batch` gives them."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    hints = WorkloadHints(max_prompt_length=longest, max_generated_length=new, num_requests=texts)
    config = ContinuousBatchingConfig(allow_block_sharing=False, **options)
    with model.continuous_batching_context_manager(generation_config=greedy(new), continuous_batching_config=config, workload_hints=hints, block=True, timeout=5) as manager:
        yield manager


def finished(manager: Any) -> Any:
    """The next text that continuous batching has finished; None if there is none within a second."""
    result = manager.get_result(timeout=1)
    if result is None and not manager.is_running():
        raise RuntimeError("continuous batching stopped")
    if result is None or not result.is_finished():
        return None
    if result.error:
        raise RuntimeError(result.error)
    return result


def batched(manager: Any, prompts: list[list[int]], new: int, repeat: int = 2) -> Timing:
    """All prompts at once through continuous batching: the time from one token to the next while all of them decode."""
    timing = Timing()
    for turn in range(repeat + 1):  # the first warms up
        began = time.perf_counter()
        names = manager.add_requests(prompts, max_new_tokens=new + 1, record_timestamps=True)
        found: dict[str, Any] = {}
        while len(found) < len(names):
            if (result := finished(manager)) is not None:
                found[result.request_id] = result
        if not turn:
            continue
        times = [found[n].timestamps for n in names]
        all_began = max(t[0] for t in times)
        last = times[0]
        later = [t for t in last if t >= all_began]
        timing.first.append(all_began - began)
        timing.steps.append((later[-1] - later[0]) / (len(later) - 1))
        timing.tokens = [found[n].generated_tokens for n in names]
    return timing
