"""MatMul with bias, activation, gate and residual -> one node; plugin kernels own every product with a constant weight.

Why the residual belongs to the product and there is no plugin for "residual + norm": a GEMM reads the residual in its
epilogue for free and the norm then reads one tensor (4 transfers of the activations in all, against 5 with a fused
Add + norm). Where the Add follows no product (Gemma's norms after the sublayers), TensorRT fuses it with both norms
around it in one segment; a plugin there would cut that segment in two.
"""

from __future__ import annotations

from rewrite.pattern import any_of, attr, tag
from rewrite.patterns.halves import check_cut, cuts
from rewrite.registry import rule

FLOATS = ("float16", "bfloat16", "float32", "float64")


def _linear(op, x, w, b, trans="trans"):
    """A linear layer as any exporter writes it; `trans`: the weight is stored [N, K], by Gemm or a tied embedding."""
    gemm = {"transA": 0, "transB": attr(trans), "alpha": 1.0, "beta": 1.0}
    turned = tag(op.MatMul(x, op.Transpose(w, perm=[1, 0])), **{trans: 1})
    plain = op.MatMul(x, w)
    return any_of(turned + b, plain + b, op.Gemm(x, w, b, **gemm), op.Gemm(x, w, **gemm), turned, plain)


def _quick(alpha):
    """1.702, as any float type stores it"""
    return isinstance(alpha, float) and abs(alpha - 1.702) < 2e-3


def _act(op, x, among=("gelu", "relu", "swish", "sigmoid", "tanh")):
    """An activation; which one is noted as `activation`."""
    forms = {
        "gelu": [tag(op.Gelu(x, approximate="none"), activation="gelu"), tag(op.Gelu(x, approximate="tanh"), activation="gelu_tanh")],
        "relu": [tag(op.Relu(x), activation="relu")],
        "swish": [tag(op.Swish(x, alpha=1.0), activation="swish"), tag(op.Swish(x, alpha=_quick), activation="quick_gelu")],
        "sigmoid": [tag(op.Sigmoid(x), activation="sigmoid")],
        "tanh": [tag(op.Tanh(x), activation="tanh")],
    }
    return any_of(*(form for name in among for form in forms[name]))


def check_weight(w, b, trans):
    """None if `w` is a constant matrix of floats and `b`, if there, a vector of a number for each of its features; else the reason why not."""
    if w.rank != 2:
        return f"the weight '{w.name}' has shape {w.shape}, expected two dimensions"
    if not w.is_weight:
        return f"the weight '{w.name}' is computed from the inputs: this is a product of two activations"
    if w.dtype not in FLOATS:
        return f"the weight '{w.name}' is {w.dtype}, supported: {', '.join(FLOATS)}"
    if b is not None and b.rank != 1:
        return f"the bias '{b.name}' has shape {b.shape}, expected one dimension"
    features = w.shape[0 if trans else 1]
    if b is not None and b.shape[0] != features:
        return f"the bias '{b.name}' has shape {b.shape}, expected [{features}], one for each feature of the weight"
    return None


def _check_residual(residual, output):
    if residual.shape is None or residual.shape != output.shape or residual.rank < 2:
        return f"the residual has shape {residual.shape}, the sum {output.shape}; expected equal ones"
    return None


@rule(priority=5)
class LinearActivation:
    """activation(x @ w + b): gelu, quick gelu, relu, swish, sigmoid, tanh."""

    def pattern(op, x, w, b):
        return _act(op, _linear(op, x, w, b))

    def check(w, b, trans):
        return check_weight(w, b, trans)

    def replace(op, x, w, b, activation, trans):
        return op.MatMulAct(x, w, b, activation=activation, trans_w=trans or None)


@rule(priority=6)
class LinearSquaredRelu:
    """relu(x @ w + b)^2; before the rule that would take the relu alone."""

    def pattern(op, x, w, b):
        return op.Pow(op.Relu(_linear(op, x, w, b)), 2.0)

    def check(w, b, trans):
        return check_weight(w, b, trans)

    def replace(op, x, w, b, trans):
        return op.MatMulAct(x, w, b, activation="relu2", trans_w=trans or None)


@rule(priority=6)
class LinearActivationResidual:
    """activation(x @ w + b) + residual: the residual joins after the activation."""

    def pattern(op, x, w, b, residual):
        return _act(op, _linear(op, x, w, b)) + residual

    def check(w, b, residual, output, trans):
        return check_weight(w, b, trans) or _check_residual(residual, output)

    def replace(op, x, w, b, residual, activation, trans):
        return op.MatMulAct(x, w, b, residual, activation=activation, trans_w=trans or None)


@rule(priority=7)
class GatedLinear:
    """activation(x @ w_gate + b_gate) * (x @ w_up + b_up): SwiGLU, GeGLU and their kin."""

    def pattern(op, x, w_gate, w_up, b_gate, b_up):
        gate = _act(op, _linear(op, x, w_gate, b_gate, "trans_gate"), ("swish", "gelu", "relu", "sigmoid"))
        return gate * _linear(op, x, w_up, b_up, "trans_up")

    def check(w_gate, w_up, b_gate, b_up, trans_gate, trans_up):
        if (trans_gate or 0) != (trans_up or 0):
            return "one of the two weights is stored transposed, the other is not"
        if w_gate.shape != w_up.shape:
            return f"the weights have shapes {w_gate.shape} and {w_up.shape}, expected equal ones"
        return check_weight(w_gate, b_gate, trans_gate) or check_weight(w_up, b_up, trans_up)

    def replace(op, x, w_gate, w_up, b_gate, b_up, activation, trans_gate):
        return op.GatedMatMulAct(x, w_gate, w_up, b_gate, b_up, activation=activation, trans_w=trans_gate or None)


@rule(priority=7)
class MergedGatedLinear:
    """activation(gate) * up with gate and up, in either order, the halves of one product x @ w + b (Phi-3)."""

    def pattern(op, x, w, b):
        both = _linear(op, x, w, b)
        forms = []
        for first, second in cuts(op, both):
            forms.append(tag(_act(op, first, ("swish", "gelu", "relu", "sigmoid")) * second, merged="gate_up"))
            forms.append(tag(first * _act(op, second, ("swish", "gelu", "relu", "sigmoid")), merged="up_gate"))
        return any_of(*forms)

    def check(w, b, output, trans, sizes, axis, axes, first_end, second_start, second_end):
        reason = check_weight(w, b, trans)
        if reason:
            return reason
        width = w.shape[0 if trans else 1]
        if output.rank is None or 2 * output.shape[-1] != width:
            return f"the output has shape {output.shape}, expected {width // 2} in its last dimension: half of the weight's {width}"
        return check_cut(output.rank, width, width // 2, sizes, axis, axes, first_end, second_start, second_end)

    def replace(op, x, w, b, activation, merged, trans):
        return op.GatedMatMulAct(x, w, None, b, activation=activation, merged=merged, trans_w=trans or None)


@rule(priority=1)
class LinearBiasResidual:
    """x @ w + b + residual, added up in any order."""

    def pattern(op, x, w, b, residual):
        return any_of(tag(op.MatMul(x, op.Transpose(w, perm=[1, 0])), trans=1), op.MatMul(x, w)) + b + residual

    def check(w, b, residual, output, trans):
        return check_weight(w, b, trans) or _check_residual(residual, output)

    def replace(op, x, w, b, residual, trans):
        return op.MatMulAct(x, w, b, residual, trans_w=trans or None)


@rule
class LinearResidual:
    """x @ w + residual, and Gemm + residual."""

    def pattern(op, x, w, b, residual):
        return _linear(op, x, w, b) + residual

    def check(w, b, residual, output, trans):
        return check_weight(w, b, trans) or _check_residual(residual, output)

    def replace(op, x, w, b, residual, trans):
        return op.MatMulAct(x, w, b, residual, trans_w=trans or None)


@rule(priority=-5)
class LinearBias:
    """x @ w + b where nothing else joins: plugin kernels own every product with a constant weight."""

    def pattern(op, x, w, b):
        return any_of(tag(op.MatMul(x, op.Transpose(w, perm=[1, 0])), trans=1), op.MatMul(x, w)) + b

    def check(w, b, trans):
        return check_weight(w, b, trans)

    def replace(op, x, w, b, trans):
        return op.MatMulAct(x, w, b, trans_w=trans or None)


@rule(priority=-6)
class Linear:
    """x @ w without a bias, and Gemm."""

    def pattern(op, x, w, b):
        return _linear(op, x, w, b)

    def check(w, b, trans):
        return check_weight(w, b, trans)

    def replace(op, x, w, b, trans):
        return op.MatMulAct(x, w, b, trans_w=trans or None)
