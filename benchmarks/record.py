"""What every result in `results/` carries: date, commit, device, versions and the command that made it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{os.cpu_count()} x {model}"


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit that was measured, with `-dirty` if files other than results and pages differ from it; "" outside a checkout."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
    clean = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ":/", ":!/benchmarks/results", ":!/docs"], cwd=RESULTS.parent, capture_output=True, check=False)
    return found + "-dirty" if clean.returncode == 1 else found


def write(name: str, device: str, packages: Mapping[str, str], data: Any) -> Path:
    """Write `results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join(["python", *(os.path.relpath(a, Path(__file__).parent.parent) if os.path.exists(a) else a for a in sys.argv)])
    path.write_text(json.dumps({"date": now, "commit": commit(), "device": device, "versions": dict(packages), "command": command, "results": data}, indent=1) + "\n")
    return path
