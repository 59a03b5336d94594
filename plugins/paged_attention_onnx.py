"""PagedAttention in ONNX operators: the body of its model-local function, which runs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser

from rewrite.plugins.paged_attention import PagedAttention

PARAMETERS = [name.rstrip("?") for name in PagedAttention.inputs]

# The caches as rows of positions, one row longer, into which goes what is stored nowhere; attention token by token, each
# over all positions that the table of its sequence could hold. Slow, and meant to be read.
BODY = """
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    many = Constant <value = int64[1] {{9223372036854775807}}> ()
    {prepared}
    scalar0 = Constant <value_int = 0> ()
    scalar1 = Constant <value_int = 1> ()
    key_rows_shape = Constant <value = int64[3] {{-1, {kv_heads}, {size}}}> ()
    value_rows_shape = Constant <value = int64[3] {{-1, {kv_heads}, {value_size}}}> ()
    slot = Cast <to = 7> (slots)
    starts = Cast <to = 7> (query_starts)
    lengths = Cast <to = 7> (context_lengths)
    tables = Cast <to = 7> (block_tables)

    key_rows = Reshape (key_cache, key_rows_shape)
    value_rows = Reshape (value_cache, value_rows_shape)
    rows_shape = Shape (key_rows)
    rows = Gather (rows_shape, zero)
    nowhere = Less (slot, zero)
    place = Where (nowhere, rows, slot)
    places = Unsqueeze (place, one)
    key_spare = Slice (key_rows, zero, one, zero)
    value_spare = Slice (value_rows, zero, one, zero)
    key_room = Concat <axis = 0> (key_rows, key_spare)
    value_room = Concat <axis = 0> (value_rows, value_spare)
    k_turned = Transpose <perm = [0, 2, 1, 3]> ({k})
    v_turned = Transpose <perm = [0, 2, 1, 3]> (v)
    k_rows = Reshape (k_turned, key_rows_shape)
    v_rows = Reshape (v_turned, value_rows_shape)
    key_written = ScatterND (key_room, places, k_rows)
    value_written = ScatterND (value_room, places, v_rows)
    key_kept = Slice (key_written, zero, rows, zero)
    value_kept = Slice (value_written, zero, rows, zero)
    key_shape = Shape (key_cache)
    value_shape = Shape (value_cache)
    keys = Reshape (key_kept, key_shape)
    values = Reshape (value_kept, value_shape)

    tokens_shape = Shape (slots)
    tokens = Squeeze (tokens_shape, zero)
    token = Range (scalar0, tokens, scalar1)
    ends = Slice (starts, one, many, zero)
    token_column = Unsqueeze (token, one)
    past = GreaterOrEqual (token_column, ends)
    past_number = Cast <to = 7> (past)
    sequence = ReduceSum <keepdims = 0> (past_number, one)
    sequences = Shape (lengths)
    last_sequence = Sub (sequences, one)
    owner = Min (sequence, last_sequence)
    owned = Less (sequence, sequences)
    own_length = Gather (lengths, owner)
    own_end = Gather (ends, owner)
    left = Sub (own_end, token)
    position = Sub (own_length, left)

    blocks = Gather (key_shape, zero)
    last_block = Sub (blocks, one)
    below = Min (tables, last_block)
    allowed = Max (below, zero)
    own_table = Gather (allowed, owner)
    own_key_blocks = Gather (keys, own_table)
    own_value_blocks = Gather (values, own_table)
    paged_keys_shape = Constant <value = int64[4] {{0, -1, {kv_heads}, {size}}}> ()
    paged_values_shape = Constant <value = int64[4] {{0, -1, {kv_heads}, {value_size}}}> ()
    own_keys = Reshape (own_key_blocks, paged_keys_shape)
    own_values = Reshape (own_value_blocks, paged_values_shape)
    keys_turned = Transpose <perm = [0, 2, 3, 1]> (own_keys)
    values_turned = Transpose <perm = [0, 2, 1, 3]> (own_values)
    queries_shape = Constant <value = int64[4] {{-1, {kv_heads}, {repeats}, {size}}}> ()
    q_turned = Transpose <perm = [0, 2, 1, 3]> ({q})
    queries = Reshape (q_turned, queries_shape)
    wide_queries = Cast <to = {wide}> (queries)
    wide_keys = Cast <to = {wide}> (keys_turned)
    wide_values = Cast <to = {wide}> (values_turned)
    product = MatMul (wide_queries, wide_keys)
    scale = Constant <value = {kind} {{{scale}}}> ()
    scores = Mul (product, scale)
    {cap}
    room_shape = Shape (own_keys)
    room_size = Gather (room_shape, one)
    room = Squeeze (room_size, zero)
    other = Range (scalar0, room, scalar1)
    position_column = Unsqueeze (position, one)
    distance = Sub (position_column, other)
    before = GreaterOrEqual (distance, zero)
    {near}
    owned_column = Unsqueeze (owned, one)
    seen = And (near, owned_column)
    middle = Constant <value = int64[2] {{1, 2}}> ()
    mask = Unsqueeze (seen, middle)
    hidden = Constant <value = {kind} {{-1}}> ()
    masked = Where (mask, capped, hidden)
    soft = Softmax <axis = -1> (masked)
    empty = IsNaN (soft)
    nothing = Constant <value = {kind} {{0}}> ()
    weights = Where (empty, nothing, soft)
    mixed = MatMul (weights, wide_values)
    narrow = Cast <to = {narrow}> (mixed)
    result_shape = Constant <value = int64[4] {{1, -1, {heads}, {value_size}}}> ()
    result = Reshape (narrow, result_shape)
    y = Transpose <perm = [0, 2, 1, 3]> (result)
"""


# Queries and keys before all else, in float32 or float64: x is q or k.
NORM = """
    {x}_wide = Cast <to = {wide}> ({x})
    {x}_square = Mul ({x}_wide, {x}_wide)
    {x}_sum = ReduceSum <keepdims = 1> ({x}_square, last)
    {x}_mean = Div ({x}_sum, count)
    {x}_more = Add ({x}_mean, epsilon)
    {x}_root = Sqrt ({x}_more)
    {x}_even = Div ({x}_wide, {x}_root)
    {x}_factor = Cast <to = {wide}> ({x}_scale)
    {x}_scaled = Mul ({x}_even, {x}_factor)
    {x}_normal = Cast <to = {narrow}> ({x}_scaled)
"""
TURN = """
    {x}_float = Cast <to = {wide}> ({of})
    {x}_part = Slice ({x}_float, zero, turned, three)
    {x}_first = Slice ({x}_part, {first})
    {x}_second = Slice ({x}_part, {second})
    {x}_minus = Neg ({x}_second)
    {join}
    {x}_straight = Mul ({x}_part, cos_all)
    {x}_across = Mul ({x}_across_part, sin_all)
    {x}_both = Add ({x}_straight, {x}_across)
    {x}_done = Cast <to = {narrow}> ({x}_both)
    {x}_kept = Slice ({of}, turned, many, three)
    {x}_turned_all = Concat <axis = -1> ({x}_done, {x}_kept)
"""
HALVES = "{x}_across_part = Concat <axis = -1> ({x}_minus, {x}_first)"
PAIRS = """{x}_minus_column = Unsqueeze ({x}_minus, last)
    {x}_first_column = Unsqueeze ({x}_first, last)
    {x}_pairs = Concat <axis = -1> ({x}_minus_column, {x}_first_column)
    {x}_part_shape = Shape ({x}_part)
    {x}_across_part = Reshape ({x}_pairs, {x}_part_shape)"""
ANGLES = """
    {of}_wide = Cast <to = {wide}> ({of})
    {of}_flat = Reshape ({of}_wide, angles_shape)
    {repeated}
    {of}_all = Reshape ({of}_repeated, all_angles_shape)
"""
REPEATED = {
    "all": "{of}_repeated = Identity ({of}_flat)",
    "halves": "{of}_repeated = Concat <axis = -1> ({of}_flat, {of}_flat)",
    "pairs": "{of}_column = Unsqueeze ({of}_flat, last)\n    {of}_repeated = Concat <axis = -1> ({of}_column, {of}_column)",
}


def _prepared(attributes: Mapping[str, Any], angles: int, norm: bool, kind: str, wide: int, narrow: int) -> tuple[str, dict[str, str]]:
    """Text that normalizes and turns q and k, and what they are called then."""
    size, names = int(attributes["size"]), {"q": "q", "k": "k"}
    turned, interleaved = int(attributes.get("turned") or 0) or size, bool(attributes.get("interleaved"))
    text = "last = Constant <value = int64[1] {-1}> ()"
    if norm:
        text += f"\n    count = Constant <value = {kind} {{{size}}}> ()\n    epsilon = Constant <value = {kind} {{{float(attributes.get('epsilon', 1e-6))!r}}}> ()"
        text += "".join(NORM.format(x=x, wide=wide, narrow=narrow) for x in names)
        names = {x: f"{x}_normal" for x in names}
    if angles:
        numbers = {"turned": [turned], "half": [turned // 2], "three": [3], "angles_shape": [1, 1, -1, angles], "all_angles_shape": [1, 1, -1, turned]}
        text += "".join(f"\n    {n} = Constant <value = int64[{len(v)}] {{{', '.join(map(str, v))}}}> ()" for n, v in numbers.items())
        repeated = REPEATED["all" if angles == turned else "pairs" if interleaved else "halves"]
        text += "".join(ANGLES.format(of=of, wide=wide, repeated=repeated.format(of=of)) for of in ("cos", "sin"))
        first, second = ("zero, turned, three, two", "one, turned, three, two") if interleaved else ("zero, half, three", "half, turned, three")
        join = PAIRS if interleaved else HALVES
        text += "".join(TURN.format(x=x, of=of, wide=wide, narrow=narrow, first=first, second=second, join=join.format(x=x)) for x, of in names.items())
        names = {x: f"{x}_turned_all" for x in names}
    return text if norm or angles else "", names


def body(attributes: Mapping[str, Any], value_size: int, dtype: Any, opset: int, angles: int = 0, norm: bool = False) -> onnx.FunctionProto:
    """The function that computes a PagedAttention of these attributes, values [.., value_size] and dtype, at an opset of at least 13.

    `angles`: cosines and sines a token, 0 if there are none; `norm`: whether queries and keys are normalized first.
    """
    double = np.dtype(dtype) == np.float64
    softcap, window = float(attributes.get("softcap") or 0.0), int(attributes.get("window") or 0)
    kind = "double" if double else "float"
    wide = onnx.TensorProto.DOUBLE if double else onnx.TensorProto.FLOAT
    cap = (
        f"cap = Constant <value = {kind} {{{softcap!r}}}> ()\n    divided = Div (scores, cap)\n    bent = Tanh (divided)\n    capped = Mul (bent, cap)"
        if softcap
        else "capped = Identity (scores)"
    )
    narrow = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    prepared, names = _prepared(attributes, angles, norm, kind, wide, narrow)
    near = f"window = Constant <value = int64[1] {{{window}}}> ()\n    within = Less (distance, window)\n    near = And (before, within)" if window else "near = Identity (before)"
    text = BODY.format(
        heads=attributes["heads"], kv_heads=attributes["kv_heads"], repeats=attributes["heads"] // attributes["kv_heads"], size=attributes["size"], value_size=value_size,
        scale=repr(float(attributes["scale"])), kind=kind, wide=wide, narrow=narrow, cap=cap, near=near, prepared=prepared, **names,
    )  # fmt: skip
    inputs = ", ".join(PARAMETERS[: 13 if norm else 11 if angles else 9])
    function = onnx.parser.parse_function(f'<opset_import: ["" : {opset}], domain: "rewrite"> PagedAttention ({inputs}) => (y, keys, values) {{ {text} }}')
    function.attribute.extend(sorted(attributes))
    for node in function.node:
        if node.op_type == "Constant" and node.output[0] == "hidden":
            node.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.asarray(-np.inf, np.float64 if double else np.float32)))
    return function
