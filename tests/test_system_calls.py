"""Every system call with which `optimize` and `build` write fails in turn: `system_calls.py` with strace, for some minutes."""

from __future__ import annotations

import shutil

import pytest
from system_calls import HOW, attempts


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
def test_every_system_call_fails_in_turn(tmp_path):
    counts, problems = attempts(tmp_path)
    assert not problems, "\n".join(problems)
    assert sum(counts.values()) >= 400
    for how in HOW:
        assert {key.split()[1] for key in counts if key.endswith(how)} >= {"write", "copy_file_range", "fsync", "close", "rename", "renameat2", "mkdir", "openat"}
