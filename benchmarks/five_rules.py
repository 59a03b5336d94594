"""Five fusions in the pattern languages of rewrite and of onnxscript, for the graphs of `graphs.py`: the same, side by side.

`OURS` are rules of rewrite; `theirs()` are onnxscript's, operands in the very order that the graphs have: its best case, as
trying the other order, too, multiplies its rules. Ours always try both.
"""

from __future__ import annotations

from typing import Any

import rewrite


@rewrite.rule
class FiveGelu:
    """x * (0.5 * (erf(x / sqrt 2) + 1)) -> Gelu."""

    def pattern(op, x):
        return x * (0.5 * (op.Erf(op.Div(x, 1.4142135)) + 1.0))

    def replace(op, x):
        return op.Gelu(x)


@rewrite.rule
class FiveSwish:
    """x * sigmoid(x) -> Swish."""

    def pattern(op, x):
        return x * op.Sigmoid(x)

    def replace(op, x):
        return op.Swish(x)


@rewrite.rule
class FiveRmsNorm:
    """scale * (x / sqrt(mean(x^2) + epsilon)) -> RMSNormalization."""

    def pattern(op, x, scale):
        mean = op.ReduceMean(op.Pow(x, 2.0), [-1], keepdims=1)
        return scale * (x * op.Reciprocal(op.Sqrt(mean + rewrite.scalar("epsilon"))))

    def replace(op, x, scale, epsilon):
        return op.RMSNormalization(x, scale, axis=-1, epsilon=epsilon)


@rewrite.rule
class FiveAttention:
    """softmax(q @ k^T * scale + mask) @ v -> FusedAttention."""

    def pattern(op, q, k, v, mask):
        scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])) * rewrite.scalar("scale")
        return op.MatMul(op.Softmax(scores + mask, axis=-1), v)

    def replace(op, q, k, v, mask, scale):
        return op.FusedAttention(q, k, v, mask, scale=scale)


@rewrite.rule
class FiveLinear:
    """x @ w + bias -> MatMulAct."""

    def pattern(op, x, w, bias):
        return op.MatMul(x, w) + bias

    def check(w, bias):
        return None if w.rank == 2 and bias.rank == 1 else "no matrix and vector"

    def replace(op, x, w, bias):
        return op.MatMulAct(x, w, bias)


OURS = [FiveGelu, FiveSwish, FiveRmsNorm, FiveAttention, FiveLinear]


def theirs() -> Any:
    """The same as a rule set of onnxscript."""
    from onnxscript.rewriter import pattern

    def gelu(op: Any, x: Any) -> Any:
        return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, 1.4142135)), 1.0)))

    def swish(op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rms_norm(op: Any, x: Any, scale: Any, axes: Any, epsilon: Any) -> Any:
        return op.Mul(scale, op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(op.ReduceMean(op.Pow(x, 2.0), axes, keepdims=1), epsilon)))))

    def is_norm(context: Any, axes: Any, epsilon: Any, **_: Any) -> bool:
        return axes.const_value is not None and axes.const_value.numpy().tolist() == [-1] and epsilon.const_value is not None

    def attention(op: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any) -> Any:
        scores = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), scale)
        return op.MatMul(op.Softmax(op.Add(scores, mask), axis=-1), v)

    def linear(op: Any, x: Any, w: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, w), bias)

    def is_linear(context: Any, w: Any, bias: Any, **_: Any) -> bool:
        return w.shape is not None and bias.shape is not None and w.shape.rank() == 2 and bias.shape.rank() == 1

    def number(value: Any) -> float:
        return float(value.const_value.numpy())

    rules = [
        pattern.RewriteRule(gelu, lambda op, x: op.Gelu(x, _domain="rewrite")),
        pattern.RewriteRule(swish, lambda op, x: op.Swish(x, _domain="rewrite")),
        pattern.RewriteRule(rms_norm, lambda op, x, scale, axes, epsilon: op.RMSNormalization(x, scale, axis=-1, epsilon=number(epsilon), _domain="rewrite"), is_norm),
        pattern.RewriteRule(attention, lambda op, q, k, v, mask, scale: op.FusedAttention(q, k, v, mask, scale=number(scale), _domain="rewrite")),
        pattern.RewriteRule(linear, lambda op, x, w, bias: op.MatMulAct(x, w, bias, _domain="rewrite"), is_linear),
    ]
    return pattern.RewriteRuleSet(rules)
