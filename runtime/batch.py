"""One step of the model: which tokens are computed, where their keys and values go, whose logits are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Batch:
    """T new tokens of B sequences, packed without padding; all arrays are NumPy.

    tokens          int64 [T]
    positions       int64 [T]     of each token in its own sequence
    slots           int32 [T]     block * block_size + offset: where the token's key and value are written
    block_tables    int32 [B, M]  blocks of each sequence in order; entries that no query can see are 0
    query_starts    int32 [B+1]   tokens of sequence b: query_starts[b] to query_starts[b+1]
    context_lengths int32 [B]     keys of each sequence, the new ones included
    logit_rows      int64 [R]     tokens (indices into T) whose logits are computed
    """

    tokens: Array
    positions: Array
    slots: Array
    block_tables: Array
    query_starts: Array
    context_lengths: Array
    logit_rows: Array
