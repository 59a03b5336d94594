"""The nodes of a model in shards in ONNX operators: bodies that hold for any number of heads and any width, whole or a rank's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx.parser

# Operators from p to y; constants are cast to its type.
ACTIVATIONS = {
    "none": "y = Identity (p)",
    "relu": "y = Relu (p)",
    "relu2": "r = Relu (p) y = Mul (r, r)",
    "tanh": "y = Tanh (p)",
    "sigmoid": "y = Sigmoid (p)",
    "swish": "s = Sigmoid (p) y = Mul (p, s)",
    "quick_gelu": "c = Constant <value = float {1.702}> () d = CastLike (c, p) e = Mul (p, d) s = Sigmoid (e) y = Mul (p, s)",
    "gelu": """c = Constant <value = float {0.7071067811865476}> () d = CastLike (c, p) e = Mul (p, d) f = Erf (e)
        g = Constant <value = float {1.0}> () h = CastLike (g, p) i = Add (f, h) j = Constant <value = float {0.5}> () k = CastLike (j, p) l = Mul (p, k) y = Mul (l, i)""",
    "gelu_tanh": """a = Constant <value = float {0.044715}> () b = CastLike (a, p) c = Mul (p, p) d = Mul (c, p) e = Mul (d, b) f = Add (p, e)
        n = Constant <value = float {0.7978845608028654}> () o = CastLike (n, p) q = Mul (f, o) t = Tanh (q)
        g = Constant <value = float {1.0}> () h = CastLike (g, p) i = Add (t, h) j = Constant <value = float {0.5}> () k = CastLike (j, p) l = Mul (p, k) y = Mul (l, i)""",
}


def _function(name: str, inputs: Sequence[str], text: str, attributes: Sequence[str], opset: int) -> onnx.FunctionProto:
    made = onnx.parser.parse_function(f'<opset_import: ["" : {opset}], domain: "rewrite"> {name} ({", ".join(inputs)}) => (y) {{ {text} }}')
    made.attribute.extend(sorted(attributes))
    return made


def product(inputs: Sequence[str], attributes: Mapping[str, Any], opset: int) -> onnx.FunctionProto:
    """MatMulAct with these of its inputs ("" for one that is absent at the end or between) and attributes."""
    weight = "m = Transpose <perm = [1, 0]> (w)" if attributes.get("trans_w") else "m = Identity (w)"
    bias = "p = Add (z, bias)" if "bias" in inputs else "p = Identity (z)"
    body = ACTIVATIONS[str(attributes.get("activation", "none"))]
    if "residual" in inputs:
        body = body.replace("y = ", "activated = ") + " y = Add (activated, residual)"
    return _function("MatMulAct", _named(inputs, ("x", "w", "bias", "residual")), f"{weight} z = MatMul (x, m) {bias} {body}", list(attributes), opset)


def gated_product(inputs: Sequence[str], attributes: Mapping[str, Any], opset: int) -> onnx.FunctionProto:
    """GatedMatMulAct with these of its inputs and attributes."""
    turn = "Transpose <perm = [1, 0]>" if attributes.get("trans_w") else "Identity"
    text = f"m = {turn} (w_gate) z = MatMul (x, m) " + ("gate = Add (z, bias_gate) " if "bias_gate" in inputs else "gate = Identity (z) ")
    merged = str(attributes.get("merged", "none"))
    if merged == "none":
        text += f"m_up = {turn} (w_up) z_up = MatMul (x, m_up) p = Identity (gate) " + ("up = Add (z_up, bias_up) " if "bias_up" in inputs else "up = Identity (z_up) ")
    else:
        outputs = "p, up" if merged == "gate_up" else "up, p"
        count = ", num_outputs = 2" if opset >= 18 else ""
        text += f"{outputs} = Split <axis = -1{count}> (gate) "
    text += ACTIVATIONS[str(attributes.get("activation", "swish"))].replace("y = ", "activated = ") + " y = Mul (activated, up)"
    return _function("GatedMatMulAct", _named(inputs, ("x", "w_gate", "w_up", "bias_gate", "bias_up")), text, list(attributes), opset)


def _named(inputs: Sequence[str], order: Sequence[str]) -> list[str]:
    """The parameters up to the last one given."""
    return list(order[: max(order.index(i) for i in inputs if i) + 1])


def all_reduce(inputs: Sequence[str], opset: int) -> onnx.FunctionProto:
    """AllReduce of one rank: what is added to the sum."""
    text = ("s = Add (x, bias) " if "bias" in inputs else "s = Identity (x) ") + ("y = Add (s, residual)" if "residual" in inputs else "y = Identity (s)")
    return _function("AllReduce", _named(inputs, ("x", "bias", "residual")), text, [], opset)


def all_gather(world: int, opset: int) -> onnx.FunctionProto:
    """AllGather where all ranks had the same: of one rank the value itself, of more as often as there are ranks, which has the right shape."""
    return _function("AllGather", ["x"], f"y = Concat <axis = -1> ({', '.join(['x'] * world)})", [], opset)


def rotary(attributes: Mapping[str, Any], shape: Sequence[Any], angles: Sequence[Any], opset: int) -> onnx.FunctionProto:
    """Rotary in pairs, of x of this shape (its last size known) and cos and sin of that, for any number of heads."""
    rank, whole, each = len(shape), int(shape[-1]), int(angles[-1])
    size = int(attributes.get("size", 0)) or whole

    def numbers(name: str, *values: int) -> str:
        return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()\n"

    text = numbers("zero", 0) + numbers("one", 1) + numbers("two", 2) + numbers("last", -1) + numbers("end", size) + numbers("whole", whole) + numbers("flat", *[0] * (rank - 1), size)
    text += "part = Slice (x, zero, end, last)\n" if size < whole else "part = Identity (x)\n"
    for name in ("cos", "sin"):
        now = name
        if rank == 4 and len(angles) == 3:
            text += f"{name}_h = Unsqueeze ({now}, one)\n"
            now = f"{name}_h"
        if 2 * each == size:
            text += numbers(f"{name}_flat", *[0] * (max(len(angles), rank if now.endswith("_h") else 0) - 1), size)
            text += f"{name}_u = Unsqueeze ({now}, last) {name}_t = Concat <axis = -1> ({name}_u, {name}_u) {name}_r = Reshape ({name}_t, {name}_flat)\n"
            now = f"{name}_r"
        text += f"{name}_turn = Identity ({now})\n"
    text += """even = Slice (part, zero, end, last, two) odd = Slice (part, one, end, last, two) back = Neg (odd)
        first = Unsqueeze (back, last) second = Unsqueeze (even, last) pairs = Concat <axis = -1> (first, second) turned = Reshape (pairs, flat)
        a = Mul (part, cos_turn) b = Mul (turned, sin_turn)\n"""
    text += "c = Add (a, b) kept = Slice (x, end, whole, last) y = Concat <axis = -1> (c, kept)" if size < whole else "y = Add (a, b)"
    return _function("Rotary", ["x", "cos", "sin"], text, list(attributes), opset)


def message(kind: str, opset: int) -> onnx.FunctionProto:
    """Send and Recv: the value itself."""
    return _function(kind, ["x"], "y = Identity (x)", ["source", "target"], opset)


def attention(heads: int, kv_heads: int, mask: str, attributes: Mapping[str, Any], opset: int) -> onnx.FunctionProto:
    """FusedAttention of so many heads. `mask` is "", "bool" or "float"."""
    a = {"scale": 1.0, "softcap": 0.0, "fill": 0.0, "drop": 0, "zero_masked": 0, "causal": 0, **attributes}

    def constant(name: str, value: float) -> str:
        return f"{name}_wide = Constant <value = float {{{value!r}}}> () {name} = CastLike ({name}_wide, q)\n"

    text = f"""
        zero = Constant <value = int64[1] {{0}}> () one = Constant <value = int64[1] {{1}}> () two = Constant <value = int64[1] {{2}}> () three = Constant <value = int64[1] {{3}}> ()
        groups = Constant <value = int64[2] {{{kv_heads}, {heads // kv_heads}}}> () all = Constant <value = int64[1] {{{heads}}}> ()
        shape_q = Shape (q) shape_k = Shape (k) shape_v = Shape (v)
        batch = Slice (shape_q, zero, one, zero) rows = Gather (shape_q, two) size = Gather (shape_q, three) keys = Gather (shape_k, two) size_v = Gather (shape_v, three)
        q_shape = Concat <axis = 0> (batch, groups, rows, size) q5 = Reshape (q, q_shape)
        kt = Transpose <perm = [0, 1, 3, 2]> (k) k5 = Unsqueeze (kt, two) v5 = Unsqueeze (v, two)
        product5 = MatMul (q5, k5) s_shape = Concat <axis = 0> (batch, all, rows, keys) product = Reshape (product5, s_shape)
        {constant("scale", a["scale"])} scores = Mul (product, scale)
        """
    now = "scores"
    if a["softcap"]:
        text += f"{constant('cap', a['softcap'])} divided = Div (scores, cap) bent = Tanh (divided) capped = Mul (bent, cap)\n"
        now = "capped"
    if mask == "bool":
        text += f"{constant('fill', 0.0)} masked = Where ({'mask, fill, ' + now if a['drop'] else 'mask, ' + now + ', fill'})\n"
        now = "masked"
    elif mask:
        text += f"masked = Add ({now}, mask)\n"
        now = "masked"
    if a["causal"]:
        text += f"""scalar0 = Constant <value_int = 0> () scalar1 = Constant <value_int = 1> () r = Squeeze (rows, zero) c = Squeeze (keys, zero)
            i = Range (scalar0, r, scalar1) j = Range (scalar0, c, scalar1) column = Unsqueeze (i, one) seen = LessOrEqual (j, column)
            least = Constant <value = float {{-1}}> () hidden = CastLike (least, q) causal_scores = Where (seen, {now}, hidden)\n"""
        now = "causal_scores"
    text += f"soft = Softmax <axis = -1> ({now})\n"
    soft = "soft"
    if a["zero_masked"]:
        text += f"empty = IsNaN (soft) {constant('nothing', 0.0)} kept = Where (empty, nothing, soft)\n"
        soft = "kept"
    text += f"""w_shape = Concat <axis = 0> (batch, groups, rows, keys) w5 = Reshape ({soft}, w_shape) y5 = MatMul (w5, v5)
        y_shape = Concat <axis = 0> (batch, all, rows, size_v) y = Reshape (y5, y_shape)"""
    function = _function("FusedAttention", ["q", "k", "v", *(["mask"] if mask else [])], text, list(attributes), opset)
    for node in function.node:
        if node.op_type == "Constant" and node.output[0] in ("least", "fill_wide"):
            value = -float("inf") if node.output[0] == "least" else float(a["fill"])
            node.attribute[0].t.CopyFrom(onnx.helper.make_tensor("value", onnx.TensorProto.FLOAT, [], [value]))
    return function
