"""The examples do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, timeout=300):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=timeout, env=environment)


def test_the_custom_fusion_is_fused_verified_compiled_and_run():
    source = (EXAMPLES / "custom_fusion.py").read_text().splitlines()
    assert len(source) <= 60
    done = run("custom_fusion.py")
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip()
    assert "'MatMulSquaredRelu': 1" in line
    assert float(line.rsplit(" ", 1)[1]) < 1e-5


@pytest.mark.parametrize(("plant", "reason"), [("np.maximum(x @ w, 0) ** 2", "np.maximum(x @ w, 0) ** 2 * 1.001"), ("x @ w, 0", "x @ w, 1e-3")])
def test_a_wrong_reference_in_it_is_caught(tmp_path, plant, reason):
    """The example's claim that sites are checked: with a planted bug nothing is fused."""
    source = (EXAMPLES / "custom_fusion.py").read_text()
    assert plant in source
    (tmp_path / "wrong.py").write_text(source.replace(plant, reason))
    done = run(str(tmp_path / "wrong.py"))
    assert "MatMulSquaredRelu" not in done.stdout
