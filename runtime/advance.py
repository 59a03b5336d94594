"""The batch after one in which each sequence got its next token: what the kernel `advance` (plugins/decoding.cu) does on the GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rewrite.runtime.batch import Batch

Array = np.ndarray[Any, Any]


def advance(batch: Batch, tokens: Array, block_size: int) -> Batch:
    """The next step of sequences with one token each, which reads `tokens` int64 [T], one position on; block_tables have the blocks for it.

    A sequence whose slot is -1 is padding and stays as it is.
    """
    real = batch.slots >= 0
    positions = batch.positions + real
    columns = np.minimum(positions // block_size, batch.block_tables.shape[1] - 1)
    slots = batch.block_tables[np.arange(len(positions)), columns] * block_size + positions % block_size
    return dataclasses.replace(
        batch, tokens=np.where(real, tokens, batch.tokens), positions=positions, slots=np.where(real, slots, -1).astype(np.int32),
        context_lengths=batch.context_lengths + real.astype(np.int32),
    )  # fmt: skip
