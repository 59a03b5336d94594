"""Philox4x32-10, the counter-based random numbers of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

A number depends on its key and counter alone, so that a kernel and NumPy draw the same ones in any order and any batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Array, Array, Array, Array]:
    """Four words for each counter of four words and key of two; all below 2^32, arrays or numbers of one broadcast shape.

    Returns uint64 arrays with values below 2^32.
    """
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    k, m = (np.asarray(word, np.uint64) for word in key)
    for number in range(ROUNDS):
        x, y = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        rounds = np.uint64(number)
        k_now, m_now = (k + rounds * np.uint64(WEYL[0])) & LOW, (m + rounds * np.uint64(WEYL[1])) & LOW
        a, b, c, d = (y >> HALF) ^ b ^ k_now, y & LOW, (x >> HALF) ^ d ^ m_now, x & LOW
    return a, b, c, d


def exponentials(tokens: Array, position: Array, choice: Array, seed: Array) -> Array:
    """Exponentially distributed numbers, float32, one for each token of a row; shape of `tokens` and `position` broadcast.

    Token t has word t % 4 of the counter (t // 4, position, choice, 0) under the key (low, high half of the seed). Of the
    word w it makes v = min((float32(w) + 0.5) / 2^32, 1 - 2^-24) and -log1p(-v), which is exact to one unit for small v, too.
    """
    tokens, position, choice, seed = (np.asarray(x, np.uint64) for x in (tokens, position, choice, seed))
    words = philox4x32((tokens >> np.uint64(2), position, choice, np.uint64(0)), (seed & LOW, seed >> HALF))
    word = np.choose((tokens & np.uint64(3)).astype(np.int64), words)
    return _exponential(word)


def exponentials_of_all(vocabulary: int, position: Array, choice: Array, seed: Array) -> Array:
    """The same for tokens 0 to vocabulary - 1 of each row, [R, vocabulary]; position, choice and seed are [R]."""
    position, choice, seed = (np.asarray(x, np.uint64)[:, None] for x in (position, choice, seed))
    calls = np.arange(-(-vocabulary // 4), dtype=np.uint64)[None]
    words = philox4x32((calls, position, choice, np.uint64(0)), (seed & LOW, seed >> HALF))
    return _exponential(np.stack(words, axis=-1).reshape(len(seed), -1)[:, :vocabulary])


def _exponential(word: Array) -> Array:
    v = np.minimum((word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    return -np.log1p(-v)  # type: ignore[no-any-return]
