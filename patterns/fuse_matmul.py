"""MatMul with bias, activation, gate and residual -> one node."""

from __future__ import annotations

from rewrite.pattern import any_of, attr
from rewrite.registry import rule


def _linear(op, x, w, b):
    """A linear layer as any exporter writes it; `trans` is bound by Gemm alone."""
    return any_of(op.MatMul(x, w) + b, op.Gemm(x, w, b, transA=0, transB=attr("trans"), alpha=1.0, beta=1.0), op.MatMul(x, w))


def _check_linear(w, b):
    if w.rank != 2:
        return f"the weight has shape {w.shape}, expected two dimensions: this is a product of two activations"
    if b is not None and b.rank != 1:
        return f"the bias has shape {b.shape}, expected one dimension"
    return None


@rule(priority=5)
class MatMulGelu:
    """gelu(x @ w + b)."""

    def pattern(op, x, w, b):
        return op.Gelu(_linear(op, x, w, b), approximate=attr("approximate"))

    check = _check_linear

    def replace(op, x, w, b, approximate, trans):
        activation = "gelu_tanh" if approximate == "tanh" else "gelu"
        return op.MatMulAct(x, w, b, activation=activation, trans_w=trans or None)


@rule(priority=5)
class MatMulRelu:
    """relu(x @ w + b)."""

    def pattern(op, x, w, b):
        return op.Relu(_linear(op, x, w, b))

    check = _check_linear

    def replace(op, x, w, b, trans):
        return op.MatMulAct(x, w, b, activation="relu", trans_w=trans or None)


@rule(priority=5)
class MatMulTanh:
    """tanh(x @ w + b): the pooler of BERT."""

    def pattern(op, x, w, b):
        return op.Tanh(_linear(op, x, w, b))

    check = _check_linear

    def replace(op, x, w, b, trans):
        return op.MatMulAct(x, w, b, activation="tanh", trans_w=trans or None)


@rule(priority=4)
class MatMulSwish:
    """swish(x @ w + b), where no gate follows."""

    def pattern(op, x, w, b):
        return op.Swish(_linear(op, x, w, b))

    def check(w, b, output):
        if any(u.op == "Mul" for u in output.graph.consumers(output.tensor)):
            return "a gate follows; GatedMatMulAct takes it"
        return _check_linear(w, b)

    def replace(op, x, w, b, trans):
        return op.MatMulAct(x, w, b, activation="swish", trans_w=trans or None)


def _check_gated(w_gate, w_up, b_gate, b_up):
    return _check_linear(w_gate, b_gate) or _check_linear(w_up, b_up)


@rule(priority=6)
class SwiGlu:
    """swish(x @ w_gate) * (x @ w_up)."""

    def pattern(op, x, w_gate, w_up, b_gate, b_up):
        return op.Swish(any_of(op.MatMul(x, w_gate) + b_gate, op.MatMul(x, w_gate))) * any_of(op.MatMul(x, w_up) + b_up, op.MatMul(x, w_up))

    check = _check_gated

    def replace(op, x, w_gate, w_up, b_gate, b_up):
        return op.GatedMatMulAct(x, w_gate, w_up, b_gate, b_up, activation="swish")


@rule(priority=6)
class GeGlu:
    """gelu(x @ w_gate) * (x @ w_up)."""

    def pattern(op, x, w_gate, w_up, b_gate, b_up):
        gate = any_of(op.MatMul(x, w_gate) + b_gate, op.MatMul(x, w_gate))
        return op.Gelu(gate, approximate=attr("approximate")) * any_of(op.MatMul(x, w_up) + b_up, op.MatMul(x, w_up))

    check = _check_gated

    def replace(op, x, w_gate, w_up, b_gate, b_up, approximate):
        return op.GatedMatMulAct(x, w_gate, w_up, b_gate, b_up, activation="gelu_tanh" if approximate == "tanh" else "gelu")


@rule
class MatMulResidual:
    """x @ w + b + residual."""

    def pattern(op, x, w, b, residual):
        return any_of(op.MatMul(x, w) + b + residual, op.MatMul(x, w) + residual)

    def check(x, w, b, residual, output):
        reason = _check_linear(w, b)
        if reason:
            return reason
        if residual.shape is None or residual.shape != output.shape or residual.rank < 2:
            return f"the residual has shape {residual.shape}, the sum {output.shape}; expected equal ones"
        return None

    def replace(op, x, w, b, residual):
        return op.MatMulAct(x, w, b, residual)
