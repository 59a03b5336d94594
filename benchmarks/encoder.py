"""Encoders on the GPU: our plan against TensorRT alone and PyTorch, in one run.

    python benchmarks/encoder.py                                             the whole grid (about 8 minutes on an H100)
    python benchmarks/encoder.py --models minilm --batches 1,8 --lengths 32,128
    python benchmarks/encoder.py --compile bert-base:1x32,bert-base:32x128   torch.compile where asked for: a minute a shape

The models of `transformers` with random weights in the shapes of MiniLM, BERT-base and BERT-large, ViT-B, and one block of Llama
3.1 8B as prefill, exported by PyTorch at opset 20. An eighth of the tokens of a text is padding, on the right. TensorRT alone
compiles the un-rewritten export with its weights as constants, for each shape statically, and runs it in a CUDA graph. PyTorch runs
the same module with scaled_dot_product_attention in a CUDA graph, its mask made beforehand: eager, and torch.compile
(max-autotune). Times are medians of the GPU time of one inference, inputs on the device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import onnx
import record
import torch
import transformers
from kernel_speed import compile_all

import rewrite
from rewrite.export.source import Source
from rewrite.export.torch_export import export
from rewrite.plugins import cuda_attention, cuda_gemm
from rewrite.runtime import engine
from rewrite.runtime.profile import Profile

BERTS = {"minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072), "bert-large": (24, 1024, 16, 4096)}  # layers, width, heads, hidden
MODELS = (*BERTS, "vit-b", "llama-8b-block")
VOCABULARY = 2048  # of the texts: the table of words is read, not multiplied


class Text(torch.nn.Module):
    """The hidden states of a model of token ids, with or without a mask."""

    def __init__(self, model: Any, masked: bool):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        options = {"attention_mask": attention_mask} if self.masked else {"use_cache": False}
        return self.model(input_ids=input_ids, **options).last_hidden_state


class Image(torch.nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Any) -> Any:
        return self.model(pixel_values=pixel_values).last_hidden_state


def module(name: str, attention: str, dtype: str) -> torch.nn.Module:
    torch.manual_seed(0)
    common = {"attn_implementation": attention}
    if name in BERTS:
        layers, width, heads, hidden = BERTS[name]
        sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": hidden}
        made: Any = transformers.AutoModel.from_config(transformers.BertConfig(**sizes, vocab_size=VOCABULARY), add_pooling_layer=False, **common)
    elif name == "vit-b":
        made = transformers.AutoModel.from_config(transformers.ViTConfig(), add_pooling_layer=False, **common)
    else:
        sizes = {"num_hidden_layers": 1, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
        made = transformers.AutoModel.from_config(transformers.LlamaConfig(**sizes, vocab_size=VOCABULARY), **common)
    wrapped = Image(made) if name == "vit-b" else Text(made, name in BERTS)
    return wrapped.eval().to(getattr(torch, dtype))


def feeds(name: str, batch: int, length: int, dtype: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "vit-b":
        return {"pixel_values": torch.randn(batch, 3, 224, 224, generator=generator).to(getattr(torch, dtype))}
    ids = {"input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator)}
    if name in BERTS:
        ids["attention_mask"] = torch.ones(batch, length, dtype=torch.int64)
        ids["attention_mask"][:, length - length // 8 :] = 0
    return ids


def exported(name: str, dtype: str, folder: Path) -> Path:
    inputs = feeds(name, 2, 16, dtype)
    dynamic = {n: {0: "batch"} if n == "pixel_values" else {0: "batch", 1: "sequence"} for n in inputs}
    path = folder / f"{name}-{dtype}.onnx"
    export(Source(module(name, "eager", dtype), inputs, dynamic, ["y"], {}), path, opset=20, exporter="dynamo")
    return path


def prepare(name: str, dtype: str, folder: Path) -> tuple[Path, Path]:
    """The export of a model and our plan of it."""
    path, plan = exported(name, dtype, folder), folder / f"{name}-plan"
    ranges = "batch=1:32:128" + ("" if name == "vit-b" else ",sequence=1:128:512")
    rewrite.build(rewrite.optimize(path, verify=False).model, plan, profile=ranges, verify=False)
    return path, plan


def static_engine(path: Path, shapes: dict[str, tuple[int, ...]], target: Path) -> Path:
    """The un-rewritten export compiled by TensorRT for one shape, weights constant."""
    proto = onnx.load(path)
    for value in proto.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    target.write_bytes(engine.build_engine(proto, shapes, Profile({})))
    return target


def operations(name: str, batch: int, length: int) -> float:
    """Floating-point operations of the products and attentions of one inference."""
    if name == "llama-8b-block":
        width, hidden, keys = 4096, 14336, 1024
        return batch * length * (2 * (2 * width * width + 2 * width * keys + 3 * width * hidden) + 4 * length * width)
    layers, width, _, hidden = BERTS.get(name, (12, 768, 12, 3072))
    return layers * batch * length * (2 * (4 * width * width + 2 * width * hidden) + 4 * length * width)


def median_us(launch: Any, stream: Any, rounds: int = 30) -> float:
    """GPU time of one launch: medians over rounds of several launches between two events."""
    for _ in range(5):
        launch()
    stream.synchronize()
    times = []
    for _ in range(rounds):
        first, last = cupy.cuda.Event(), cupy.cuda.Event()
        first.record(stream)
        for _ in range(5):
            launch()
        last.record(stream)
        last.synchronize()
        times.append(cupy.cuda.get_elapsed_time(first, last) * 1e3 / 5)
    return statistics.median(times)


def variants(dtype: str) -> Iterator[tuple[Any, ...]]:
    """The kernels that these models may use, to be compiled by all processors at once."""
    layouts = [cuda_gemm.Shape("narrow", t, s) for t in cuda_gemm.NARROW for s in cuda_gemm.CLUSTERS if s <= t] + [cuda_gemm.Shape("wide", t) for t in cuda_gemm.WIDE]
    for activation, gated in (("none", False), ("gelu", False), ("swish", True)):
        yield from (cuda_gemm.variant(layout, dtype, activation, gated) for layout in layouts)
    for size in (32, 64, 128):
        for mask, rows, causal in ((0, True, False), (0, True, True), (2, True, False), (2, False, False)):
            yield from (cuda_attention.variant(cut, size, dtype, mask, rows, causal, False, True) for cut in cuda_attention.cuts(size, 90))


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """On the device, for CuPy."""
    return {n: cupy.asarray(t.float().numpy()).astype(np.dtype(str(t.dtype).removeprefix("torch."))) if t.is_floating_point() else cupy.asarray(t.numpy()) for n, t in inputs.items()}


def ours(plan: rewrite.Plan, inputs: dict[str, Any]) -> tuple[float, np.ndarray]:
    executor: Any = plan.executor
    executor.tune(inputs)
    (result,) = plan.run(inputs).values()
    frame = executor.frame(plan.check(inputs))
    return median_us(lambda: frame.graph.launch(executor.stream), executor.stream), cupy.asnumpy(result.astype(np.float32))


def tensorrt_alone(file: Path, inputs: dict[str, Any]) -> tuple[float, np.ndarray]:
    trt = engine.tensorrt()
    loaded = trt.Runtime(engine.logger()).deserialize_cuda_engine(file.read_bytes())
    file.unlink()
    context = engine.execution_context(loaded)
    stream = cupy.cuda.Stream(non_blocking=True)
    held = dict(inputs)
    for index in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(index)
        if name not in held:
            kind = np.float16 if loaded.get_tensor_dtype(name) == trt.float16 else np.dtype("bfloat16")
            held[name] = cupy.full(tuple(context.get_tensor_shape(name)), np.nan, kind)
            result = name
        context.set_tensor_address(name, int(held[name].data.ptr))
    for _ in range(2):
        context.execute_async_v3(stream.ptr)
    stream.synchronize()
    stream.begin_capture()
    context.execute_async_v3(stream.ptr)
    graph = stream.end_capture()
    return median_us(lambda: graph.launch(stream), stream), cupy.asnumpy(held[result].astype(np.float32))


@lru_cache(1)
def on_device(name: str, dtype: str) -> Any:
    return module(name, "sdpa", dtype).cuda()


def pytorch(name: str, inputs: dict[str, torch.Tensor], dtype: str, compiled: bool) -> tuple[float, np.ndarray]:
    run = on_device(name, dtype)
    held = {n: t.cuda() for n, t in inputs.items()}
    if "attention_mask" in held:  # as sdpa takes it; made once, outside of what is timed
        mask = held["attention_mask"].bool()[:, None, None]
        held["attention_mask"] = mask.expand(-1, 1, mask.shape[-1], -1).contiguous()
    with torch.no_grad():
        if compiled:
            run = torch.compile(run, mode="max-autotune-no-cudagraphs", dynamic=False)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(**held)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = run(**held)
        with torch.cuda.stream(stream):
            time = median_us(graph.replay, cupy.cuda.ExternalStream(stream.cuda_stream))
    return time, y.float().cpu().numpy()


def difference(a: np.ndarray, b: np.ndarray, inputs: dict[str, torch.Tensor]) -> float:
    """Largest difference at tokens that are no padding, relative to the largest value."""
    kept = inputs["attention_mask"].numpy() != 0 if "attention_mask" in inputs else slice(None)
    a, b = a[kept].astype(np.float64), b[kept].astype(np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--lengths", default="32,128,512")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--compile", default="", help="MODEL:BATCHxLENGTH,... where torch.compile runs, too")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--no-tensorrt", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further row after that")
    parser.add_argument("--output", default="encoder")
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    versions = record.versions("onnx", "cupy-cuda13x", "torch", "transformers") | {"tensorrt": engine.version()}
    print(f"{'model':14} {'batch':>5} {'length':>6} {'ours µs':>9} {'TFLOP/s':>8} {'TensorRT':>9} {'torch':>9} {'compile':>9} {'vs TRT':>7} {'vs torch':>8} {'error':>8}")
    names, grid = options.models.split(","), list(itertools.product(map(int, options.batches.split(",")), map(int, options.lengths.split(","))))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(6, context) as exporting, ProcessPoolExecutor(6, context) as building:
        folder = Path(temporary)
        prepared = {name: exporting.submit(prepare, name, options.dtype, folder) for name in names}
        compile_all(variants(options.dtype))
        print(f"kernels compiled after {time.monotonic() - started:.0f} s", flush=True)
        for name in names:
            path, directory = prepared[name].result()
            cells = [(b, 197) for b in sorted({b for b, _ in grid})] if name == "vit-b" else grid
            cells = [(b, s) for b, s in cells if name != "llama-8b-block" or b * s <= 16384]
            given = {cell: feeds(name, *cell, options.dtype) for cell in cells}
            engines = {}
            if not options.no_tensorrt:
                for (b, s), inputs in given.items():
                    engines[b, s] = building.submit(static_engine, path, {n: tuple(t.shape) for n, t in inputs.items()}, folder / f"{name}-{b}-{s}.engine")
            plan = rewrite.Plan(directory, device="cuda")
            print(f"{name}: ready after {time.monotonic() - started:.0f} s", flush=True)
            for (batch, length), inputs in given.items():
                if time.monotonic() - started > options.seconds:
                    print(f"{name} {batch} x {length}: left out, time is up")
                    continue
                row: dict[str, Any] = {"model": name, "dtype": options.dtype, "batch": batch, "length": length}
                row["ours_us"], got = ours(plan, arrays(inputs))
                row["launches"] = len(plan.executor.frame(plan.check(arrays(inputs))).launches)  # type: ignore[attr-defined]
                asked = {"tensorrt": not options.no_tensorrt, "torch": not options.no_torch, "compile": f"{name}:{batch}x{length}" in options.compile.split(",")}
                for peer in (p for p, wanted in asked.items() if wanted):
                    run = partial(tensorrt_alone, engines[batch, length].result(), arrays(inputs)) if peer == "tensorrt" else partial(pytorch, name, inputs, options.dtype, peer == "compile")
                    row[f"{peer}_us"], other = run()
                    row[f"{peer}_difference"] = difference(got, other, inputs)
                row["tflops"] = operations(name, batch, length) / row["ours_us"] / 1e6
                rows.append(row)
                us = [f"{row[k]:9.1f}" if k in row else f"{'-':>9}" for k in ("tensorrt_us", "torch_us", "compile_us")]
                against = [f"{row[k] / row['ours_us']:.2f}" if k in row else "-" for k in ("tensorrt_us", "torch_us")]
                worst = max((v for k, v in row.items() if k.endswith("difference")), default=0.0)
                print(f"{name:14} {batch:5} {length:6} {row['ours_us']:9.1f} {row['tflops']:8.1f} {' '.join(us)} {against[0]:>7} {against[1]:>8} {worst:8.1e}", flush=True)
                record.write(options.output, device, versions, rows)
            del plan
            on_device.cache_clear()
            for future in engines.values():
                future.cancel()
    for peer in ("tensorrt", "torch", "compile"):
        ratios = [r[f"{peer}_us"] / r["ours_us"] for r in rows if f"{peer}_us" in r]
        if ratios:
            print(f"against {peer}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}, most {max(ratios):.2f}, of {len(ratios)}")
    print(json.dumps({"written": str(record.write(options.output, device, versions, rows))}))


if __name__ == "__main__":
    main()
