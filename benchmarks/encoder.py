"""Encoders on the GPU: our plan against TensorRT alone and PyTorch, in one run.

    python benchmarks/encoder.py                      the whole grid (about 8 minutes on an H200)
    python benchmarks/encoder.py --models minilm --batches 1,8 --lengths 32,128

Shapes of MiniLM, BERT-base and BERT-large, random weights, float16, one added mask. TensorRT alone compiles the
un-rewritten ONNX with its weights as constants, for each shape statically, and runs it in a CUDA graph. PyTorch runs
the same layers written with scaled_dot_product_attention: eager in a CUDA graph, and torch.compile (max-autotune).
Times are medians of the GPU time of one inference, inputs on the device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import cupy
import graphs
import numpy as np
import onnx
import record

import rewrite
from rewrite.runtime import engine
from rewrite.runtime.profile import Profile

MODELS = {"minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072), "bert-large": (24, 1024, 16, 4096)}  # layers, width, heads, hidden


def model(name: str) -> onnx.ModelProto:
    layers, width, heads, hidden = MODELS[name]
    return graphs.half(graphs.model(layers, "bert", width, heads, heads, hidden))


def operations(name: str, batch: int, length: int) -> float:
    """Floating-point operations of one inference: products and attention."""
    layers, width, _, hidden = MODELS[name]
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


def feeds(name: str, batch: int, length: int) -> dict[str, Any]:
    _, width, heads, _ = MODELS[name]
    rng = np.random.default_rng(0)
    mask = np.zeros((batch, 1, length, length), np.float16)
    mask[..., length - length // 8 :] = -10000  # an eighth of the keys is padding
    return {"x": rng.standard_normal((batch, length, width)).astype(np.float16), "mask": mask, "angles": np.zeros((batch, 1, length, width // heads), np.float16)}


def ours(plan: rewrite.Plan, inputs: dict[str, Any]) -> tuple[float, np.ndarray]:
    result = plan.run(inputs)["y"]
    executor = plan.executor
    frame = executor.frame(plan.check(inputs))  # type: ignore[attr-defined]
    return median_us(lambda: frame.graph.launch(executor.stream), executor.stream), result  # type: ignore[attr-defined]


def tensorrt_alone(proto: onnx.ModelProto, inputs: dict[str, Any]) -> tuple[float, np.ndarray]:
    trt = engine.tensorrt()
    shapes = {i.name: tuple(inputs[i.name].shape) for i in proto.graph.input}
    static = onnx.ModelProto()
    static.CopyFrom(proto)
    for value in static.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = size
    loaded = trt.Runtime(engine.logger()).deserialize_cuda_engine(engine.build_engine(static, shapes, Profile({})))
    context = engine.execution_context(loaded)
    stream = cupy.cuda.Stream(non_blocking=True)
    arrays = {n: cupy.asarray(a) for n, a in inputs.items()}
    arrays["y"] = cupy.full(inputs["x"].shape, np.nan, np.float16)
    for index in range(loaded.num_io_tensors):
        name = loaded.get_tensor_name(index)
        context.set_tensor_address(name, int(arrays[name].data.ptr))
    for _ in range(2):
        context.execute_async_v3(stream.ptr)
    stream.synchronize()
    stream.begin_capture()
    context.execute_async_v3(stream.ptr)
    graph = stream.end_capture()
    return median_us(lambda: graph.launch(stream), stream), cupy.asnumpy(arrays["y"])


def pytorch(proto: onnx.ModelProto, name: str, inputs: dict[str, Any], compiled: bool) -> tuple[float, np.ndarray]:
    import torch
    import torch.nn.functional as F

    layers, width, heads, _ = MODELS[name]
    tensors = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()).cuda() for i in proto.graph.initializer if i.name.startswith("weight")}
    each = len(tensors) // layers
    weights = list(tensors.values())

    class Layer(torch.nn.Module):
        def __init__(self, w: list[Any]):
            super().__init__()
            self.w = torch.nn.ParameterList([torch.nn.Parameter(t.T.contiguous() if t.dim() == 2 else t, requires_grad=False) for t in w])

        def forward(self, x: Any, mask: Any) -> Any:
            w, (batch, length, _) = self.w, x.shape
            q, k, v = (F.linear(x, w[2 * i], w[2 * i + 1]).view(batch, length, heads, -1).transpose(1, 2) for i in range(3))
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25).transpose(1, 2).reshape(batch, length, width)
            x = F.layer_norm(F.linear(a, w[6], w[7]) + x, (width,), w[8], w[9])
            return F.layer_norm(F.linear(F.gelu(F.linear(x, w[10], w[11])), w[12], w[13]) + x, (width,), w[14], w[15])

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(weights[i * each : (i + 1) * each]) for i in range(layers)])

        def forward(self, x: Any, mask: Any) -> Any:
            for layer in self.layers:
                x = layer(x, mask)
            return x

    encoder = Encoder().eval()
    x, mask = torch.from_numpy(inputs["x"]).cuda(), torch.from_numpy(inputs["mask"]).cuda()
    with torch.no_grad():
        run = torch.compile(encoder, mode="max-autotune-no-cudagraphs", dynamic=False) if compiled else encoder
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run(x, mask)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = run(x, mask)
        with torch.cuda.stream(stream):
            time = median_us(graph.replay, cupy.cuda.ExternalStream(stream.cuda_stream))
    return time, y.cpu().numpy()


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b.astype(np.float64)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1,8,32,128")
    parser.add_argument("--lengths", default="32,128,512")
    parser.add_argument("--torch", choices=["none", "eager", "compile"], default="eager")
    parser.add_argument("--output", default="encoder")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{'model':10} {'batch':>5} {'length':>6} {'ours µs':>9} {'TFLOP/s':>8} {'TensorRT':>9} {'torch':>9} {'compile':>9} {'vs TRT':>7} {'vs torch':>8} {'error':>8}")
    for name in options.models.split(","):
        proto = model(name)
        with tempfile.TemporaryDirectory() as folder:
            fused = rewrite.optimize(proto, verify=False).model
            rewrite.build(fused, Path(folder) / "p", profile="batch=1:32:128,seq=1:128:512", verify=False)
            plan = rewrite.Plan(Path(folder) / "p", device="cuda")
            for batch, length in itertools.product(map(int, options.batches.split(",")), map(int, options.lengths.split(","))):
                inputs = feeds(name, batch, length)
                row: dict[str, Any] = {"model": name, "batch": batch, "length": length}
                row["ours_us"], got = ours(plan, inputs)
                row["tensorrt_us"], want = tensorrt_alone(proto, inputs)
                row["difference"] = difference(got, want)
                if options.torch != "none":
                    row["torch_us"], other = pytorch(proto, name, inputs, False)
                    row["torch_difference"] = difference(got, other)
                if options.torch == "compile":
                    row["compile_us"], _ = pytorch(proto, name, inputs, True)
                row["tflops"] = operations(name, batch, length) / row["ours_us"] / 1e6
                rows.append(row)
                us = [f"{row[k]:9.1f}" if k in row else f"{'-':>9}" for k in ("tensorrt_us", "torch_us", "compile_us")]
                best = min((row[k] for k in ("torch_us", "compile_us") if k in row), default=float("nan"))
                mine = row["ours_us"]
                print(f"{name:10} {batch:5} {length:6} {mine:9.1f} {row['tflops']:8.1f} {' '.join(us)} {row['tensorrt_us'] / mine:7.2f} {best / mine:8.2f} {row['difference']:8.1e}", flush=True)
    ratios = [r["tensorrt_us"] / r["ours_us"] for r in rows]
    print(f"against TensorRT alone: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    versions = record.versions("onnx", "cupy-cuda13x", "torch", "nvidia-cudnn-frontend") | {"tensorrt": engine.version()}
    path = record.write(options.output, device, versions, rows)
    print(json.dumps({"written": str(path)}))


if __name__ == "__main__":
    main()
