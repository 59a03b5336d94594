"""Plans without weights, to be measured where nobody can download or export: graph, engines and a weights file that is a hole of the right size.

    python benchmarks/hollow_plans.py --only tiny:1,tiny:2,8b:1,8b:2,70b:2 -o two_gpus.tar.xz      (4 minutes, no GPU; about 1 MB)

Each plan is made as a user makes it (`rewrite export --no-weights`, optimize, build), but for its weights and their digests. Beside it lies what
`ranks_decode.py` must know to put random values on the devices that do not depend on the number of ranks: the slices of each weight, and the
values of those that are not parameters. Such a plan loads nowhere else: its digests are wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import llamas
import torch

import rewrite
from rewrite.export.hollow import load_hollow
from rewrite.export.torch_export import export
from rewrite.runtime import rank_model, seal, weights
from rewrite.shards import shards_of

SHAPES = {**llamas.SHAPES, "tiny": replace(llamas.SHAPES["tiny"], vocabulary=1024), "70b": llamas.Shape(80, 8192, 64, 8, 128, 28672, 128256, False)}
TOKENS, ROWS = 2048, 64  # of a step, at most


def write_hole(file: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """`weights.write` without the weights."""
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": weights.NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.file.truncate(8 + len(text) + end)


@contextmanager
def nothing_read() -> Iterator[None]:
    """Plans built meanwhile have holes for weights."""
    with ExitStack() as stack:
        for owner, name, other in (
            (weights, "write", write_hole), (seal.Writer, "digests", lambda self: ["0" * 64]), (rank_model, "RankModels", partial(rank_model.RankModels, hollow=True)),
            (rank_model, "_equal", lambda a, b: a.shape == b.shape),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, other))
        yield


def make_plan(source: Path, world: int, target: Path) -> None:
    """`target` from an exported graph, for so many ranks, and `target`.json beside it."""
    model = rewrite.optimize(source, generate=True, tensor_parallel=world, verify=False).model
    with nothing_read():
        plan = rewrite.build(model, target, profile=f"tokens=1:64:{TOKENS},rows=1:8:{ROWS}", verify=False)
    shards = shards_of(model.proto)
    slices = {} if shards is None else {name: [part.axis, part.sections] for name, part in shards.weights.items()}
    types, values = plan.types_of(0), {}
    for tensor in model.proto.graph.initializer:
        if tensor.name in types and types[tensor.name].dtype == "float32":
            values[tensor.name] = weights.tensor_array(tensor, model.folder).astype(float).reshape(-1).tolist()
    unknown = [n for n, kind in types.items() if kind.dtype == "float32" and n not in values]
    assert not unknown, unknown
    target.with_suffix(".json").write_text(json.dumps({"world": world, "slices": slices, "values": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="tiny:1,tiny:2,8b:1,8b:2,70b:2", help="model:ranks")
    parser.add_argument("--graphs", type=Path, help="folder in which exported graphs are kept, NAME.onnx")
    parser.add_argument("-o", "--output", type=Path, default=Path("two_gpus.tar.xz"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graphs, plans = options.graphs or Path(folder, "graphs"), Path(folder, "plans")
        graphs.mkdir(exist_ok=True)
        plans.mkdir()
        for name, world in (entry.split(":") for entry in options.only.split(",")):
            started, graph = time.monotonic(), graphs / f"{name}.onnx"
            if not graph.exists():
                SHAPES[name].config(torch.bfloat16).save_pretrained(graphs / name)
                export(load_hollow(graphs / name), graph, verify=False)
            make_plan(graph, int(world), plans / f"{name}-{world}")
            print(f"{name}, {world} ranks: {time.monotonic() - started:.0f} s", flush=True)
        subprocess.run(["tar", "-S", "-C", str(plans), "-cJf", str(options.output.absolute()), "."], check=True)
        print(f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
