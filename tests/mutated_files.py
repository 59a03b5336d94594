"""Mutated model files: whatever is in a file, `rewrite` ends with a model or one RewriteError, in time and in memory.

    python tests/mutated_files.py --count 100000

runs each mutant in a child process that may use 2 GiB and 10 seconds for it, and prints what happened how often.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from random_graphs import make_case

import rewrite

SECONDS, MEMORY, BATCH = 10, 2 << 30, 200


def mutant(seed: int) -> bytes:
    """The bytes of a small random model, changed; the same seed gives the same bytes."""
    rng = np.random.default_rng([seed, 3])
    model = make_case(int(rng.integers(40))).model
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 4))):
            mutate_structure(model, rng)
        return model.SerializeToString()
    data = bytearray(model.SerializeToString())
    for _ in range(int(rng.integers(1, 6))):
        at, kind = int(rng.integers(len(data))), int(rng.integers(5))
        if kind == 0:
            data[at] = int(rng.integers(256))
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 9))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 33))]
        else:
            data[at : at + 5] = b"\xff\xff\xff\xff\x07"
    return bytes(data)


def mutate_structure(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """One change that keeps the file a protobuf."""
    graph = model.graph
    node = graph.node[int(rng.integers(len(graph.node)))]
    values = [v for n in graph.node for v in (*n.input, *n.output)]
    kind = int(rng.integers(12))
    if kind == 0 and node.input:
        node.input[int(rng.integers(len(node.input)))] = str(rng.choice([*values, "", "missing", "a\x00b"]))
    elif kind == 1:
        node.op_type = str(rng.choice(["Einsum", "If", "Loop", "Resize", "Reshape", "Gather", "NoSuch", "", graph.node[0].op_type, "MatMul", "Softmax", "Tile", "Expand", "Pad"]))
    elif kind == 2 and node.attribute:
        attribute = node.attribute[int(rng.integers(len(node.attribute)))]
        attribute.i, attribute.type = int(rng.choice([-(2**63), 2**63 - 1, -5, 99])), int(rng.integers(0, 12))
    elif kind == 3:
        del node.input[:]
    elif kind == 4:
        node.output.append(str(rng.choice(values)))
    elif kind == 5 and graph.initializer:
        tensor = graph.initializer[int(rng.integers(len(graph.initializer)))]
        tensor.dims.append(int(rng.choice([0, -1, 2**40, 2**63 - 1, 3])))
    elif kind == 6 and graph.initializer:
        graph.initializer[int(rng.integers(len(graph.initializer)))].data_type = int(rng.integers(0, 40))
    elif kind == 7 and graph.input:
        value = graph.input[int(rng.integers(len(graph.input)))].type.tensor_type
        for dim in value.shape.dim:
            dim.dim_param = str(rng.choice(["B", "a*", "((", "1//0", "x" * 1000, "2**99999999", "B-B"]))
    elif kind == 8 and graph.input:
        graph.input[int(rng.integers(len(graph.input)))].type.tensor_type.elem_type = int(rng.integers(0, 40))
    elif kind == 9:
        model.opset_import[0].version = int(rng.choice([1, 7, 13, 16, 22, 25, 26, 27, 2**40]))
    elif kind == 10:
        del graph.node[int(rng.integers(len(graph.node)))]
    else:
        node.domain = str(rng.choice(["rewrite", "com.microsoft", "ai.onnx", "x"]))


def attempt(path: Path, seed: int) -> str:
    """What becomes of one mutant: "rewritten", "refused", or what went wrong."""
    path.write_bytes(mutant(seed))
    signal.alarm(SECONDS)
    try:
        rewrite.optimize(path, rules=[], verify=False)
        return "rewritten"
    except rewrite.RewriteError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)


def outcomes(seeds: range) -> Iterator[tuple[int, str]]:
    """(seed, outcome) of each; a child that dies is named by the signal, and another goes on after it."""
    start = seeds.start
    while start < seeds.stop:
        stop = min(start + BATCH, seeds.stop)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY + (1 << 30), MEMORY + (1 << 30)))  # what the libraries map is not used
            with tempfile.TemporaryDirectory() as folder:
                for seed in range(start, stop):
                    os.write(write, f"{seed} {attempt(Path(folder) / 'm.onnx', seed)[:300]!r}\n".encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as stream:
            for line in stream:
                seed, _, text = line.partition(" ")
                start = int(seed) + 1
                yield int(seed), text.strip()[1:-1]
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            yield start, f"signal {signal.Signals(-code).name}"
            start += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    started, counts = time.perf_counter(), Counter[str]()
    for seed, outcome in outcomes(range(arguments.start, arguments.start + arguments.count)):
        good = outcome in ("rewritten", "refused")
        counts[outcome if good else "problem"] += 1
        if not good:
            print(seed, outcome, flush=True)
    print(f"{sum(counts.values())} mutants in {time.perf_counter() - started:.0f} s: {dict(counts)}")
    raise SystemExit(1 if counts["problem"] else 0)


if __name__ == "__main__":
    main()
