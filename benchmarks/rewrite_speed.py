"""Seconds to load, rewrite and save transformer graphs of 1k, 10k and 100k nodes, beside other ONNX optimizers, in one run.

    python benchmarks/rewrite_speed.py [--sizes 1000 10000] [--timeout 120] [--peers-python PYTHON]

Each engine runs in a child process of its own, on the same file, one after the other; engines that are not installed for
`--peers-python` (this Python, if not given) are left out and named. Times are processor seconds and wall seconds: where
the machine is shared, the former are what to compare. Our own time is without numeric verification, which no peer does.

The rows with five rules compare matching and replacing alone, on what each engine matches on. What comes before counts as
load there: for ours reading, type inference, the graph and the sizes that follow from its shapes, for onnxscript reading and
its intermediate representation, without inference; what comes after counts as save: for ours also the plugins' functions.
With these, ours takes longer than onnxscript for five rules. In the row `rewrite` all of it but reading counts as rewriting.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENGINES = ["rewrite", "rewrite, five rules", "onnxscript, five rules", "onnxscript rewriter", "onnxscript optimizer", "onnxslim", "onnxsim", "onnxoptimizer", "onnxruntime extended"]
PACKAGES = ("onnx", "onnxscript", "onnxslim", "onnxsim", "onnxoptimizer", "onnxruntime")


# --- in the child: each engine as (load, rewrite, save), imports first so that they are not timed -------------------
def _rewrite() -> tuple[Callable[..., Any], ...]:
    from rewrite.model import load
    from rewrite.optimizer import optimize
    from rewrite.registry import library

    library([])
    return load, lambda m: optimize(m, rules=[], verify=False).model, lambda m, path: m.save(path)


def _rewrite_five() -> tuple[Callable[..., Any], ...]:
    from five_rules import OURS

    from rewrite.driver import Driver, all_graphs
    from rewrite.functions import FunctionTable
    from rewrite.graph import Graph
    from rewrite.model import close_graph, load, open_graph
    from rewrite.optimizer import without_collector
    from rewrite.registry import library
    from rewrite.report import Report
    from rewrite.shapes import SymbolicShapes

    rules = library(OURS).select([r.name for r in OURS])

    def opened(path: str) -> Any:
        model = load(path)
        imported = open_graph(model)
        graphs = [Graph(g, model.opset, imported.names) for g in all_graphs(imported.graph)]
        for graph in graphs:
            SymbolicShapes(graph).run()
        return imported, graphs

    def run(state: Any) -> Any:
        imported, graphs = state
        report, table = Report(), FunctionTable([])
        report.start(rules.rules)
        driver = Driver(rules, table, report, verify=False, explain=False)
        with without_collector():
            for graph in graphs:
                driver.run(graph, "fuse")
                graph.sort()
        return imported, table, driver

    return opened, run, lambda s, path: close_graph(s[0], s[1].functions).save(path)


def _onnxscript_five() -> tuple[Callable[..., Any], ...]:
    import onnx
    from five_rules import theirs
    from onnxscript import ir

    rules = theirs()

    def run(model: Any) -> Any:
        rules.apply_to_model(model)
        return model

    return lambda path: ir.serde.deserialize_model(onnx.load(path)), run, lambda m, path: onnx.save(ir.serde.serialize_model(m), path)


def _with_onnx(run: Callable[[Any], Any]) -> tuple[Callable[..., Any], ...]:
    import onnx

    return onnx.load, run, onnx.save


def _onnxscript_rewriter() -> tuple[Callable[..., Any], ...]:
    from onnxscript import rewriter

    return _with_onnx(rewriter.rewrite)


def _onnxscript_optimizer() -> tuple[Callable[..., Any], ...]:
    from onnxscript import optimizer

    return _with_onnx(optimizer.optimize)


def _onnxslim() -> tuple[Callable[..., Any], ...]:
    import onnxslim

    return _with_onnx(onnxslim.slim)


def _onnxsim() -> tuple[Callable[..., Any], ...]:
    import onnxsim

    return _with_onnx(lambda m: onnxsim.simplify(m)[0])


def _onnxoptimizer() -> tuple[Callable[..., Any], ...]:
    import onnxoptimizer

    return _with_onnx(onnxoptimizer.optimize)


def _onnxruntime() -> tuple[Callable[..., Any], ...]:
    """Reading, optimizing and writing are one call: all of it counts as rewriting."""
    import onnxruntime as ort

    def run(path: str) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{path}.ort.onnx"
        options.log_severity_level = 4
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    return lambda path: path, run, lambda m, path: None


ADAPTERS = dict(zip(ENGINES, [_rewrite, _rewrite_five, _onnxscript_five, _onnxscript_rewriter, _onnxscript_optimizer, _onnxslim, _onnxsim, _onnxoptimizer, _onnxruntime], strict=True))


def child(engine: str, path: str) -> None:
    """Run one engine on one file; prints one line of JSON."""
    load, rewrite, save = ADAPTERS[engine]()
    found: dict[str, Any] = {}
    value: Any = path
    for step, run in (("load", load), ("rewrite", rewrite), ("save", lambda m: save(m, f"{path}.out.onnx"))):
        wall, cpu = time.perf_counter(), time.process_time()
        value = run(value)
        found[step] = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps(found))


# --- in the parent ------------------------------------------------------------------------------------------------
def measure(engine: str, path: Path, python: str, timeout: float) -> dict[str, Any]:
    """One engine on one file in a process of its own; `failed` says why there are no times."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    limited = ["prlimit", f"--cpu={timeout:.0f}", python, __file__, "--child", engine, str(path)]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"failed": f"over {timeout:.0f} s"}
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is not None:
        return dict(json.loads(line.removeprefix("RESULT ")))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"failed": "not installed" if last.startswith("ModuleNotFoundError: No module named") else last[:120]}


def python_for(engine: str, peers: str) -> str:
    """Our own engine and ONNX Runtime run in this Python, others in the peers' one if they are there."""
    module = engine.split()[0].rstrip(",")
    if module in ("rewrite", "onnxruntime") or "five" in engine:
        return sys.executable
    there = subprocess.run([peers, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"], check=False).returncode == 0
    return peers if there else sys.executable


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'graph':>6} {'nodes':>7}  {'engine':<22} {'load':>8} {'rewrite':>8} {'save':>8} {'rewrite cpu':>12} {'us/node':>8} {'peak MB':>8}")
    for row in rows:
        head = f"{row['kind']:>6} {row['nodes']:>7}  {row['engine']:<22}"
        if "failed" in row:
            print(f"{head} {row['failed']}")
            continue
        times = " ".join(f"{row[s]['seconds']:>8.2f}" for s in ("load", "rewrite", "save"))
        print(f"{head} {times} {row['rewrite']['cpu']:>12.2f} {1e6 * row['rewrite']['cpu'] / row['nodes']:>8.1f} {row['peak_mb']:>8.0f}")


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How the time for rewriting grows from each size to the next, and how it compares with each peer."""
    found: dict[str, float] = {}
    cpu = {(r["kind"], r["size"], r["engine"]): r["rewrite"]["cpu"] for r in rows if "failed" not in r}
    for (kind, size, engine), seconds in cpu.items():
        if engine == "rewrite" and (kind, size * 10, engine) in cpu:
            found[f"{kind}: time({size * 10}) / time({size})"] = cpu[kind, size * 10, engine] / seconds
        peer = "rewrite, five rules" if "five rules" in engine else "rewrite"
        if not engine.startswith("rewrite") and (kind, size, peer) in cpu:
            found[f"{kind} {size}: {engine} / {peer}"] = seconds / cpu[kind, size, peer]
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> bool:
    """Seconds over nodes, both logarithmic; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({r["kind"] for r in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False, sharey=True)
    for axis, kind in zip(axes[0], kinds, strict=True):
        for engine in ENGINES:
            points = [(r["nodes"], r["rewrite"]["cpu"]) for r in rows if r["kind"] == kind and r["engine"] == engine and "failed" not in r]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=engine, linewidth=2.5 if engine == "rewrite" else 1)
        axis.set(xscale="log", yscale="log", xlabel="nodes", title=f"{kind}-like")
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("processor seconds to rewrite")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return True


def page(found: dict[str, Any]) -> str:
    """docs/rewrite_speed.md from what `record.write` wrote."""
    lines = ["# How long rewriting takes", "", "Generated by `python benchmarks/rewrite_speed.py --page` from `benchmarks/results/rewrite_speed.json`.", ""]
    lines += [f"Date {found['date']}, {found['device']}, " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()) + ".", ""]
    lines += [*(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    lines += ["| graph | nodes | engine | load s | rewrite s | save s | rewrite, processor s | us a node | peak MB |", "|---|---|---|---|---|---|---|---|---|"]
    for row in found["results"]["rows"]:
        head = f"| {row['kind']} | {row['nodes']} | {row['engine']} |"
        if "failed" in row:
            lines.append(f"{head} {row['failed']} | | | | | |")
            continue
        times = " | ".join(f"{row[s]['seconds']:.2f}" for s in ("load", "rewrite", "save"))
        lines.append(f"{head} {times} | {row['rewrite']['cpu']:.2f} | {1e6 * row['rewrite']['cpu'] / row['nodes']:.0f} | {row['peak_mb']:.0f} |")
    lines += ["", "![seconds over nodes](../benchmarks/results/rewrite_speed.png)", "", "Ratios of processor seconds for rewriting:", ""]
    return "\n".join([*lines, *(f"- {k}: {v:.1f}" for k, v in found["results"]["ratios"].items()), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10000, 100000])
    parser.add_argument("--kinds", nargs="+", default=["llama", "bert"])
    parser.add_argument("--timeout", type=float, default=120, help="processor seconds that an engine may take on one file")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--peers-python", default=sys.executable, help="Python that has the peers installed")
    parser.add_argument("--page", action="store_true", help="write docs/rewrite_speed.md from the last results, measure nothing")
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    if arguments.page:
        HERE.parent.joinpath("docs", "rewrite_speed.md").write_text(page(json.loads((HERE / "results" / "rewrite_speed.json").read_text())))
        return
    import graphs
    import onnx
    import record

    rows: list[dict[str, Any]] = []
    slow: dict[tuple[str, str], str] = {}  # engines that ran out of time, or would with ten times as many nodes, are not tried on larger graphs
    late: dict[tuple[str, str], str] = {}
    pythons = {e: python_for(e, arguments.peers_python) for e in arguments.engines}
    with tempfile.TemporaryDirectory() as folder:
        for size in sorted(arguments.sizes):
            slow, late = {**late, **slow}, {}
            for kind in arguments.kinds:
                path = Path(folder, f"{kind}.onnx")
                model = graphs.model(graphs.nodes_for(size, kind), kind)
                count = len(model.graph.node)
                onnx.save(model, path)
                del model
                for engine in arguments.engines:
                    known = slow.get((kind, engine))
                    result = measure(engine, path, pythons[engine], arguments.timeout) if known is None else {"failed": known}
                    if known is None and result.get("failed", "").startswith("over "):
                        slow[kind, engine] = f"{result['failed']} for {count} nodes"
                    elif "rewrite" in result and 10 * result["rewrite"]["cpu"] > arguments.timeout:
                        late[kind, engine] = f"not tried: {result['rewrite']['cpu']:.0f} s for {count} nodes, and {arguments.timeout:.0f} s allowed"
                    rows.append({"kind": kind, "size": size, "nodes": count, "engine": engine, **result})
                    show(rows[-1:])
    print()
    show(rows)
    found = ratios(rows)
    print("\n" + "\n".join(f"{k}: {v:.1f}" for k, v in found.items()))
    versions = record.versions(*PACKAGES)
    for package in PACKAGES:
        if versions[package] == "not installed":
            told = subprocess.run([arguments.peers_python, "-c", f"from importlib.metadata import version; print(version('{package}'))"], capture_output=True, text=True)
            versions[package] = told.stdout.strip() or "not installed"
    path = record.write("rewrite_speed", record.cpu(), versions, {"load_average": os.getloadavg(), "rows": rows, "ratios": found})
    drawn = plot(rows, path.with_suffix(".png"))
    print(f"\nwritten to {path}" + (f" and {path.with_suffix('.png').name}" if drawn else "; no plot: matplotlib is not installed"))


if __name__ == "__main__":
    main()
