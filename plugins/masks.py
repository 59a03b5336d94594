"""Attention masks that are known by what they are: causal, key padding, sliding windows."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewrite.plugins.activations import Array
from rewrite.plugins.cuda_masks import attention_mask, view
from rewrite.registry import plugin

LAYOUTS = dict.fromkeys(f"{batch}{heads}{rows}T"[-n:] for n in (4, 3, 2) for batch in "B1" for heads in "1H" for rows in "S1")
TESTS = {"!=": np.not_equal, "==": np.equal, ">": np.greater}


def sample_padding(rng: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Array | None:
    """Key padding of zeros and ones: none in the first row, on the left, on the right, holes, everything."""
    if name != "padding":
        return None
    keep = np.ones(shape, bool)
    for row, kept in enumerate(keep):
        cut = int(rng.integers(0, len(kept) + 1)) if row else 0
        kind = row % 5
        if kind in (1, 2):
            kept[: cut if kind == 1 else None][cut if kind == 2 else 0 :] = False
        elif kind == 3:
            kept[:] = rng.random(len(kept)) < 0.6
        elif kind == 4:
            kept[:] = False
    return keep.astype(dtype)


@plugin
class AttentionMask:
    """The mask of an attention: which of the T keys each of the S queries sees.

    Inputs. `padding` [B, >=T], integer, boolean or float: a key is seen if its element compares (`test`: "!=", "=="
    or ">") with `against`; `binary` tells that only the elements 0 and 1 are allowed. `source`: any value from whose
    dimensions `batch_axis` and `query_axis` B and S are read, by default those of `padding`. `past`: a value whose
    dimension `past_axis` is the number of cached keys before the S new ones. T is past + S, or else the length of
    `padding`, or else S. Only the shapes of `source` and `past` are read.

    Query i stands at position i + T - S, so that the last query sees the last key (`align` "start": at position i).
    `causal`: it sees keys up to its own position. `window` w > 0: only keys less than w away. `unmask_empty`: a query
    that would see nothing sees every key.

    y has a dimension for each letter of `layout` (for example "B1ST", or "BHST" with `heads` equal ones). `dtype` "bool": True where the key is seen
    (where it is not, if `invert`). A float dtype: 0 where the key is seen, `fill` elsewhere; or, with `split` 1, `fill`
    where its position hides it, `padding_fill` where padding does and `both_fill` where both do.
    """

    inputs = ("padding?", "source?", "past?")
    attributes = {
        "causal": 0, "window": 0, "align": "end", "test": "!=", "against": 0.0, "binary": 0, "unmask_empty": 0,
        "layout": "B1ST", "heads": 1, "dtype": "bool", "invert": 0, "fill": 0.0, "split": 0, "padding_fill": 0.0, "both_fill": 0.0,
        "batch_axis": 0, "query_axis": 1, "past_axis": 2,
    }  # fmt: skip
    kinds = ("start", "float64", "float32", "float16", "bfloat16", *list(LAYOUTS)[1:])
    tolerance = dict.fromkeys(("bool", "float64", "float32", "float16", "bfloat16"), (0.0, 0.0))
    sample = sample_padding
    cuda = attention_mask
    view = view

    def reference(
        padding: Array | None = None, source: Array | None = None, past: Array | None = None, *, causal: int, window: int, align: str,
        test: str, against: float, binary: int, unmask_empty: int, layout: str, heads: int, dtype: str, invert: int, fill: float, split: int,
        padding_fill: float, both_fill: float, batch_axis: int, query_axis: int, past_axis: int,
    ) -> Array:  # fmt: skip
        sized = source if source is not None else padding
        assert sized is not None
        batch, queries = sized.shape[batch_axis], sized.shape[query_axis]
        keys = queries if padding is None else padding.shape[1]
        if past is not None:
            keys = past.shape[past_axis] + queries
        # `like` makes arrays of the inputs' kind: on a GPU this runs on CuPy's.
        rows, columns = np.arange(queries, like=sized), np.arange(keys, like=sized)
        distance = rows[:, None] + (keys - queries if align == "end" else 0) - columns
        near = distance >= 0 if causal else np.ones_like(distance, bool)
        if window:
            near = near & (np.abs(distance) < window)
        kept = np.ones((batch, keys), bool, like=sized) if padding is None else TESTS[test](padding[:batch, :keys], padding.dtype.type(against))
        near, kept = near[None, None], kept[:, None, None]
        seen = near & kept
        if unmask_empty:
            seen = seen | ~seen.any(-1, keepdims=True)
        if dtype == "bool":
            y = seen ^ bool(invert)
        else:
            hidden = np.where(near, padding_fill, np.where(kept, fill, both_fill)) if split else np.asarray(fill)
            y = np.where(seen, 0.0, hidden).astype(dtype)
        y = y[(0,) * (4 - len(layout))]
        y = y[tuple(slice(0, 1) if letter == "1" else slice(None) for letter in layout)]
        sizes = {"B": batch, "H": heads, "S": queries, "T": keys, "1": 1}
        return np.broadcast_to(y, [sizes[letter] for letter in layout])
