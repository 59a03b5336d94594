"""One step of a generator: the tokens of many sequences packed one after the other, and where their keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Batch:
    """T new tokens of B sequences; R of the tokens are those whose logits are wanted.

    tokens int64 [T]; positions int64 [T], each in its own sequence; slots int32 [T], block * block size + offset where the
    key and value of each token are stored; block_tables int32 [B, M]; query_starts int32 [B + 1], where the tokens of each
    sequence begin, and T; context_lengths int32 [B], keys of each sequence with the new ones; logit_rows int64 [R], indices
    of tokens. Prefill, a chunk of it and decoding differ in nothing but how many tokens a sequence has.
    """

    tokens: Array
    positions: Array
    slots: Array
    block_tables: Array
    query_starts: Array
    context_lengths: Array
    logit_rows: Array
