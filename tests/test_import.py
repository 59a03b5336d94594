"""Importing the package is quick and pulls in nothing heavy; neither does asking the command for help."""

from __future__ import annotations

import statistics
import subprocess
import sys

HEAVY = ("torch", "tensorrt", "tensorrt_rtx", "onnx", "onnxruntime", "onnx_graphsurgeon", "numpy", "rich", "click", "rewrite.patterns", "rewrite.plugins", "rewrite.registry")


def test_import_takes_less_than_a_fifth_of_a_second():
    code = "import time; started = time.perf_counter(); import rewrite; print(time.perf_counter() - started)"
    times = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) for _ in range(5)]
    assert statistics.median(times) < 0.2, times


def test_import_loads_nothing_heavy():
    code = f"import sys, rewrite; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_help_needs_neither_onnx_nor_torch():
    code = "import sys\nfrom rewrite.cli import main\nmain(['--help'], standalone_mode=False)\nprint([m for m in ('torch', 'onnx', 'onnxruntime', 'tensorrt_rtx') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "[]"


def test_every_public_name_is_there():
    import rewrite

    for name in rewrite.__all__:
        assert getattr(rewrite, name) is not None
    assert set(rewrite.__all__) <= set(dir(rewrite))


def test_a_name_that_is_not_there():
    code = "import rewrite; rewrite.nonsense"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "module 'rewrite' has no attribute 'nonsense'" in done.stderr
