"""Mutated model files: whatever is in a file, `rewrite` ends with a model or one RewriteError, in time and in memory.

    python tests/mutated_files.py --count 100000 [--start SEED] [--record]

runs each mutant in a child process that may use 2 GiB and 10 seconds for it, and prints what happened how often. `--record`
writes the counts to benchmarks/results/mutated_files.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from random_graphs import make_case

import rewrite
from rewrite.validity import all_nodes, tensors

SECONDS, MEMORY, BATCH = 10, 2 << 30, 200
WEIGHTS, SIZE = "w.bin", 1 << 16  # the file of external data beside each mutant, all zeros


def mutant(seed: int) -> bytes:
    """The bytes of a small random model, changed; the same seed gives the same bytes."""
    rng = np.random.default_rng([seed, 3])
    model = make_case(int(rng.integers(40))).model
    for grow in GROWTHS.values():
        if rng.random() < 0.3:
            grow(model, rng)
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


def add_external(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Numeric initializers lie in the file of weights, and one that is too large to be read at once."""
    offset = 0
    for tensor in model.graph.initializer:
        size = len(onnx.numpy_helper.to_array(tensor).tobytes())
        if tensor.data_type == onnx.TensorProto.STRING or offset + size > SIZE // 2:
            continue
        kind, dims, name = tensor.data_type, list(tensor.dims), tensor.name
        tensor.Clear()
        tensor.MergeFrom(_outside(name, kind, dims, offset, size))
        offset += size
    model.graph.initializer.append(_outside("large", onnx.TensorProto.FLOAT, [SIZE // 8], SIZE // 2, SIZE // 2))
    model.graph.node.append(onnx.helper.make_node("Neg", ["large"], ["large_neg"]))


def _outside(name: str, kind: int, dims: list[int], offset: int, size: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=dims, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def add_function(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A node is a call of a function, which calls another, which is that node."""
    node = model.graph.node[int(rng.integers(len(model.graph.node)))]
    inner, names = onnx.NodeProto(), [f"i{n}" if v else "" for n, v in enumerate(node.input)]
    inner.CopyFrom(node)
    inner.input[:], inner.output[:] = names, [f"o{n}" for n in range(len(node.output))]
    opsets = [*model.opset_import, onnx.helper.make_opsetid("local", 1)]
    read = list(dict.fromkeys(filter(None, names)))
    call = onnx.helper.make_node("Inner", read, list(inner.output), domain="local")
    for name, made in (("Inner", inner), ("Outer", call)):
        model.functions.append(onnx.helper.make_function("local", name, read, list(inner.output), [made], opsets))
    given = [v for v in node.input if v]
    del node.attribute[:]
    node.op_type, node.domain, node.input[:] = "Outer", "local", given
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    model.ir_version = max(8, model.ir_version)


def add_sparse(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A sparse initializer, and a Constant that is one."""
    for name in ("sparse", "sparse_constant"):
        values = onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
        made = onnx.helper.make_sparse_tensor(values, onnx.helper.make_tensor(f"{name}_indices", onnx.TensorProto.INT64, [2], [0, 3]), [4])
        if name == "sparse":
            model.graph.sparse_initializer.append(made)
        else:
            model.graph.node.append(onnx.helper.make_node("Constant", [], [name], sparse_value=made))
        model.graph.node.append(onnx.helper.make_node("Neg", [name], [f"{name}_neg"]))


def add_branches(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """An If in an If, which read a value of the graphs around them."""
    outer = str(rng.choice([v for n in model.graph.node for v in n.output if v]))
    made = [onnx.helper.make_node("Identity", [outer], ["if_0"])]
    for depth in range(1, 3):
        graphs = [onnx.helper.make_graph([onnx.NodeProto.FromString(n.SerializeToString()) for n in made], f"g{depth}", [], [onnx.ValueInfoProto(name=f"if_{depth - 1}")]) for _ in range(2)]
        condition = onnx.helper.make_node("Constant", [], [f"condition_{depth}"], value=onnx.helper.make_tensor("c", onnx.TensorProto.BOOL, [], [True]))
        made = [condition, onnx.helper.make_node("If", [f"condition_{depth}"], [f"if_{depth}"], then_branch=graphs[0], else_branch=graphs[1])]
    model.graph.node.extend(made)


GROWTHS = {"external": add_external, "function": add_function, "sparse": add_sparse, "branches": add_branches}


def mutate_growth(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """One change of a reference to external data, a function, or a sparse tensor, if there is any."""
    outside = [e for t in tensors(model) for e in t.external_data]
    sparse = [*model.graph.sparse_initializer, *(a.sparse_tensor for n in model.graph.node for a in n.attribute if a.HasField("sparse_tensor"))]
    kind = int(rng.integers(3))
    if kind == 0 and outside:
        entry = outside[int(rng.integers(len(outside)))]
        if rng.random() < 0.3:
            entry.key = str(rng.choice(["location", "offset", "length", "checksum", "basepath", ""]))
        else:
            entry.value = str(rng.choice(["../w.bin", "/dev/zero", "", "m.onnx", "-1", str(SIZE), str(2**63), str(2**70), "1e3", "0", "3"]))
    elif kind == 1 and model.functions:
        function = model.functions[int(rng.integers(len(model.functions)))]
        choice = int(rng.integers(6))
        if choice == 0 and function.input:
            del function.input[int(rng.integers(len(function.input)))]
        elif choice == 1:
            function.output.append(str(rng.choice(["missing", "o0", "i0"])))
        elif choice == 2:
            function.name = str(rng.choice(["Inner", "Outer", "MatMul", ""]))
        elif choice == 3:
            function.domain = str(rng.choice(["", "rewrite", "local2"]))
        elif choice == 4:
            function.node[0].op_type, function.node[0].domain = "Outer", "local"
        else:
            del function.opset_import[:]
    elif kind == 2 and sparse:
        one = sparse[int(rng.integers(len(sparse)))]
        choice = int(rng.integers(4))
        if choice == 0:
            one.dims[:] = [int(rng.choice([0, -1, 1, 2**40, 2**63 - 1]))]
        elif choice == 1:
            one.indices.int64_data[:] = [int(i) for i in rng.choice([-1, 0, 3, 4, 2**62], int(rng.integers(0, 4)))]
        elif choice == 2:
            one.values.dims[:] = [int(d) for d in rng.choice([0, 1, 2, 2**40], int(rng.integers(0, 3)))]
        else:
            one.indices.data_type = int(rng.integers(0, 30))


def mutate_structure(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """One change that keeps the file a protobuf."""
    if rng.random() < 0.3:
        return mutate_growth(model, rng)
    graph = model.graph
    nodes = [*all_nodes(graph), *(n for f in model.functions for n in f.node)]
    if not nodes or not graph.node:
        return
    node = nodes[int(rng.integers(len(nodes)))]
    values = [v for n in nodes for v in (*n.input, *n.output)] or ["missing"]
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
                (Path(folder) / WEIGHTS).write_bytes(bytes(SIZE))
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
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/mutated_files.json")
    arguments = parser.parse_args()
    started, counts = time.perf_counter(), Counter[str]()
    for seed, outcome in outcomes(range(arguments.start, arguments.start + arguments.count)):
        good = outcome in ("rewritten", "refused")
        counts[outcome if good else "problem"] += 1
        if not good:
            print(seed, outcome, flush=True)
    seconds = time.perf_counter() - started
    print(f"{sum(counts.values())} mutants in {seconds:.0f} s: {dict(counts)}")
    if arguments.record:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        import record

        good = {k: n for k, n in sorted(counts.items()) if k != "problem"}
        data = {"mutants": sum(counts.values()), "seconds": round(seconds), "outcomes": good, "problems": counts["problem"]}
        print(record.write("mutated_files", record.cpu(), record.versions("onnx", "onnxruntime", "onnx-graphsurgeon"), data))
    raise SystemExit(1 if counts["problem"] else 0)


if __name__ == "__main__":
    main()
