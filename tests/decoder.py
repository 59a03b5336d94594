"""A small decoder in ONNX text, to be made a generator: every part can be another one, and one may be wrong."""

from __future__ import annotations

import numpy as np
import onnx
from conftest import parse

VOCABULARY, WIDTH, HEADS, KEY_HEADS, SIZE, POSITIONS = 60, 16, 4, 2, 8, 80
PARTS = {
    "inputs": "int64[batch, sequence] input_ids",
    "outputs": f"float[batch, sequence, {VOCABULARY}] logits",
    "positions": "x = Identity(e)",
    "before": "h = Identity(x)",
    "products": "qf = MatMul(h, wq) kf = MatMul(h, wk) vf = MatMul(h, wv)",
    "heads": "q4 = Reshape(qf, query_shape) k4 = Reshape(kf, key_shape) v4 = Reshape(vf, key_shape)",
    "attention": "a = Attention<is_causal = 1, scale = 0.4>(q, k, v)",
    "after": "r = Identity(s)",
    "head": "logits = MatMul(r, head)",
}


def decoder(opset: int = 23, tokens: str = "input_ids", **parts: str) -> onnx.ModelProto:
    """`tokens` is the name of the input. Embedding -> `positions` -> `before` -> attention with grouped heads, residual -> `after` -> `head`."""
    p = {**PARTS, **parts}
    text = f"""({p["inputs"]}) => ({p["outputs"]}) {{
        e = Gather(table, input_ids)
        {p["positions"]}
        {p["before"]}
        {p["products"]}
        {p["heads"]}
        q = Transpose<perm = [0, 2, 1, 3]>(q4) k = Transpose<perm = [0, 2, 1, 3]>(k4) v = Transpose<perm = [0, 2, 1, 3]>(v4)
        {p["attention"]}
        t = Transpose<perm = [0, 2, 1, 3]>(a)
        f = Reshape(t, flat)
        o = MatMul(f, wo)
        s = Add(x, o)
        {p["after"]}
        {p["head"]}
    }}""".replace("input_ids", tokens)
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    weights = {
        "table": weight(VOCABULARY, WIDTH), "wq": weight(WIDTH, HEADS * SIZE), "wk": weight(WIDTH, KEY_HEADS * SIZE), "wv": weight(WIDTH, KEY_HEADS * SIZE),
        "wo": weight(HEADS * SIZE, WIDTH), "head": weight(WIDTH, VOCABULARY), "places": weight(POSITIONS, WIDTH), "rows": weight(1, POSITIONS, WIDTH),
        "query_shape": np.array([0, 0, HEADS, SIZE]), "key_shape": np.array([0, 0, KEY_HEADS, SIZE]), "flat": np.array([0, 0, HEADS * SIZE]),
        "zero": np.array(0), "one": np.array(1), "two": np.array(2), "first": np.array([0]), "second": np.array([1]), "third": np.array([2]), "last": np.array([-1]),
        "zeros": np.zeros(WIDTH, np.float32), "ones": np.ones(WIDTH, np.float32),
        "merged_weight": weight(WIDTH, (HEADS + 2 * KEY_HEADS) * SIZE), "merged_sizes": np.array([HEADS, KEY_HEADS, KEY_HEADS]) * SIZE,
        "merged_groups": np.array([0, 0, KEY_HEADS, HEADS // KEY_HEADS + 2, SIZE]), "group_parts": np.array([HEADS // KEY_HEADS, 1, 1]),
    }  # fmt: skip
    return parse(text, opset, **{n: w for n, w in weights.items() if n in text})


COUNT = "shape = Shape(input_ids) count1 = Gather(shape, second) count = Squeeze(count1, first)"
BY_RANGE = f"{COUNT} p = Range(zero, count, one) w = Gather(places, p) x = Add(e, w)"
BY_SLICE = f"{COUNT} w = Slice(rows, first, count1, second) x = Add(e, w)"
WINDOW = f"""{COUNT} i = Range(zero, count, one) column = Unsqueeze(i, second) distance = Sub(column, i) five = Constant<value = int64[1] {{5}}>()
    before = GreaterOrEqual(distance, zero) near = Less(distance, five) seen = And(before, near) a = Attention<scale = 0.4>(q, k, v, seen)"""
BY_INPUT = "w = Gather(places, position_ids) x = Add(e, w)"
BY_MASK = "c = CumSum(attention_mask, one) m = Mul(c, attention_mask) p = Sub(m, one) g = Add(p, two) w = Gather(places, g) x = Add(e, w)"
