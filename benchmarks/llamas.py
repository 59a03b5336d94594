"""Llamas with random weights as Hugging Face directories, what a step of theirs must read, and the way from there to a plan.

    python benchmarks/llamas.py 1b,8b .graphs        generators without weights, for `--graphs .graphs` of other benchmarks: where the
                                                     GPU is, exporting may be slow, and such a file is small (1 MB for 8b)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from safetensors import safe_open

STD = 0.02  # of the weights, as transformers initializes them
PRODUCTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # in the order of a layer
FLOATS = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT)
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # of safetensors


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: `size` is that of a head, `tied` says that the table of words is the head, too."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    size: int
    hidden: int
    vocabulary: int
    tied: bool

    def config(self, dtype: torch.dtype) -> transformers.LlamaConfig:
        """As Meta publishes them, rotary embedding included."""
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0 if self.tied else 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, head_dim=self.size, max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=self.tied, bos_token_id=0, eos_token_id=1,
            rope_parameters=rope, architectures=["LlamaForCausalLM"], dtype=str(dtype).removeprefix("torch."),
        )  # fmt: skip

    @property
    def layer_parameters(self) -> int:
        """Of the products of one layer and its two norms."""
        return self.width * self.size * 2 * (self.heads + self.kv_heads) + 3 * self.width * self.hidden + 2 * self.width

    def step_bytes(self, batch: int, context: int, item: int = 2) -> int:
        """Bytes that one token for each of `batch` texts cannot do without: all weights, rows of the table, keys and values of `context` positions."""
        weights = self.layers * self.layer_parameters + self.width + self.vocabulary * self.width
        table = 0 if self.tied else batch * self.width
        return item * (weights + table + batch * context * self.layers * 2 * self.kv_heads * self.size)

    def prompt_operations(self, length: int) -> float:
        """Floating-point operations of the products and attentions of a prompt, logits of its last token alone."""
        products = 2 * length * self.layers * (self.layer_parameters - 2 * self.width) + 2 * self.vocabulary * self.width
        return products + self.layers * 2 * self.heads * self.size * length * (length + 1)


SHAPES = {
    "tiny": Shape(2, 256, 8, 2, 32, 512, 1000, False),
    "1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, False),
}


def make_directory(shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Path:
    """Write config.json and random weights, a file a layer; the numbers are drawn on `device`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config(dtype)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():  # tied ones once
        layer = name.split(".")[2] if name.startswith("model.layers.") else name
        files.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda item: _write(folder / item[1][0], item[1][1], dtype, device, item[0]), enumerate(files.items())))
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write(path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, device: str, seed: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in shapes.items():
        length = math.prod(size) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(size), "data_offsets": [end, end + length]}
        end += length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = torch.Generator(device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in shapes.values():
            drawn = torch.empty(size, dtype=dtype, device=device)
            drawn = drawn.fill_(1) if len(size) == 1 else drawn.normal_(0, STD, generator=random)
            file.write(memoryview(drawn.cpu().view(torch.uint8).numpy()).cast("B"))


class Stages:
    """Seconds of each stage, printed as they end."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        print(f"  {self.label}: {name} {self.seconds[name]:.1f} s", flush=True)


def make_graph(shape: Shape, file: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The generator of a Llama without its weights: only the ONNX file, which `put_weights` completes."""
    import rewrite
    from rewrite.export.hollow import load_hollow
    from rewrite.export.torch_export import export

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape.config(dtype).save_pretrained(folder)
        export(load_hollow(folder), folder / file.name, verify=False)
        rewrite.optimize(folder / file.name, generate=True, verify=False).model.save(folder / "generator.onnx")
        shutil.copyfile(folder / "generator.onnx", file)


def put_weights(graph: Path, directory: Path, target: Path) -> None:
    """Complete a file of `make_graph` with the weights of `directory`: `target`, and beside it the file that its weights are in.

    Exporters turn the matrix of each product around; those have no names but are in the order of the model.
    """
    model = onnx.load(graph, load_external_data=False)
    floats = [t for t in model.graph.initializer if t.data_type in FLOATS and not t.name.endswith("inv_freq")]
    names = {t.name: t.name.removeprefix("model.") for t in floats if t.name.startswith("model.")}
    turned = [t.name for t in floats if t.name not in names and len(t.dims) == 2]
    files = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    head = "lm_head.weight" if "lm_head.weight" in files else "model.embed_tokens.weight"
    products = [f"model.layers.{n}.{p}.weight" for n in range(len(turned) // len(PRODUCTS)) for p in PRODUCTS]
    names |= dict(zip(turned, [*products, head], strict=True))
    target.parent.mkdir(parents=True, exist_ok=True)

    def put(tensor: onnx.TensorProto) -> None:
        name = names[tensor.name]
        with safe_open(directory / files[name], "pt") as file:
            value = file.get_tensor(name)
        value = (value.T if tensor.name in turned else value).contiguous()
        assert tuple(value.shape) == tuple(tensor.dims), f"{tensor.name} {list(tensor.dims)} is not {name} {list(value.shape)}"
        data = value.cpu().view(torch.uint8).numpy()
        places = {e.key: e.value for e in tensor.external_data}
        if not places:
            tensor.raw_data = data.tobytes()
            return
        with open(os.open(target.parent / places["location"], os.O_RDWR | os.O_CREAT), "r+b") as file:
            file.seek(int(places["offset"]))
            file.write(memoryview(data).cast("B"))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(put, (t for t in floats if t.name in names)))
    onnx.save(model, target)


def make_plan(directory: Path, folder: Path, tokens: int, rows: int, engines: bool = True, graph: Path | None = None) -> dict[str, float]:
    """`folder/plan` from a Hugging Face directory, as a user makes it but for the checks, which run on the CPU (an older ONNX Runtime has no bfloat16 there).

    `tokens` and `rows` of logits are the most of a step; `graph`: a file of `make_graph`, so that nothing is exported. Returns the seconds of each stage. Meant for a process of its own.
    """
    import rewrite

    stages = Stages("plan")
    if graph is None:
        from rewrite.export.huggingface import load_directory
        from rewrite.export.torch_export import export

        with stages("load"):
            source = load_directory(directory)
        with stages("export"):
            export(source, folder / "model.onnx", verify=False)
        del source
        with stages("optimize"):
            model = rewrite.optimize(folder / "model.onnx", generate=True, verify=False).model
    else:
        with stages("weights"):
            put_weights(graph, directory, folder / "weights" / "generator.onnx")
        model = rewrite.load(folder / "weights" / "generator.onnx")
    with stages("build"):
        profile = f"tokens=1:{min(64, tokens)}:{tokens},rows=1:{min(8, rows)}:{rows}" if engines else None
        rewrite.build(model, folder / "plan", engines=engines, profile=profile, verify=False)
    for file in (folder / "model.onnx", folder / "model.onnx.data"):
        file.unlink(missing_ok=True)
    shutil.rmtree(folder / "weights", ignore_errors=True)
    return stages.seconds


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        make_graph(SHAPES[name], Path(sys.argv[2], f"{name}.onnx"))
