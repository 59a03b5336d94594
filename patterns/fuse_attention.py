"""MatMul - scale - mask - Softmax - MatMul -> FusedAttention."""

from __future__ import annotations

from rewrite.pattern import any_of, attr, ints, maybe, scalar
from rewrite.registry import rule
from rewrite.shapes import is_named


def _repeated(op, k, name):
    """Key or value heads repeated for their query heads, or as they are (`StaticRepeat` brings other spellings to this)."""
    return any_of(op.Reshape(op.Expand(op.Unsqueeze(k, [2]), ints(f"{name}_expand")), ints(f"{name}_shape")), k)


def _keys(op, k):
    """Keys, transposed; a scale may stand on either side of the transpose."""
    repeated = _repeated(op, k, "k")
    scaled = any_of(repeated * scalar("k_scale"), repeated)
    turned = any_of(op.Transpose(scaled, perm=[0, 1, 3, 2]), op.Transpose(scaled, perm=[0, 2, 1]))
    return any_of(turned * scalar("kt_scale"), turned)


def _check_mask(q, k, mask):
    """None if the mask, as far as sizes are known, is broadcast to the scores, and not they to it, which kernels do not do; else the reason."""
    scores = [*q.shape[:-1], k.shape[-2]]
    if mask is not None and any(s == 1 and m != 1 and is_named(m) for s, m in zip(scores[::-1], (mask.shape or [])[::-1], strict=False)):
        return f"the mask has shape {mask.shape}, the scores have {scores}; expected a mask that is broadcast to the scores"
    return None


@rule(priority=10)
class Attention:
    """softmax(scale * q @ k^T + mask) @ v with its scales, masks, soft cap, grouped heads and NaN guard."""

    def pattern(op, q, k, v, mask):
        scores = op.MatMul(any_of(q * scalar("q_scale"), q), _keys(op, k))
        scores = any_of(scores * scalar("s_scale"), scores)
        capped = any_of(op.Tanh(scores * scalar("cap_in")) * scalar("cap_out"), scores)
        masked = any_of(
            op.Where(op.Not(mask), scalar("fill"), capped),
            op.Where(mask, capped, scalar("fill")),
            op.Where(mask, scalar("drop_fill"), capped),
            capped + mask,
            capped,
        )
        weights = maybe(op.Cast, maybe(op.Cast, op.Softmax(maybe(op.Cast, masked), axis=attr("axis"))))  # TorchScript, fp16: to float32 and back
        guarded = any_of(op.Where(op.IsNaN(weights), scalar("guard"), weights), weights)
        return op.MatMul(guarded, _repeated(op, v, "v"))

    def check(q, k, v, mask, guard, axis):
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.rank not in (3, 4) or x.rank != q.rank:
                return f"{name} has shape {x.shape}, expected [batch, heads, positions, size], or [batch, positions, size] for q, k and v"
        if axis not in (-1, q.rank - 1):
            return f"the softmax is over axis {axis} of {q.rank}, not over the last"
        if mask is not None and (mask.rank is None or mask.rank > q.rank):
            return f"the mask has shape {mask.shape}, expected at most {q.rank} dimensions"
        if guard not in (None, 0.0):
            return f"NaN becomes {guard}, not 0"
        batches = [x.shape[0] for x in (q, k, v)]
        if 1 in batches and any(b not in (1, None) for b in batches):
            return f"q, k and v have batches of {', '.join(map(str, batches))}, expected the same for all"
        if q.rank == 3:
            return _check_mask(q, k, mask)
        heads, groups, values = q.shape[1], k.shape[1], v.shape[1]
        if groups != values or not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
            return f"{heads} query heads, {groups} key heads and {values} value heads do not go together"
        return _check_mask(q, k, mask)

    def replace(op, q, k, v, mask, q_scale, k_scale, kt_scale, s_scale, cap_in, cap_out, fill, drop_fill, guard):
        scale = 1.0
        for factor in (q_scale, k_scale, kt_scale, s_scale):
            scale *= 1.0 if factor is None else factor
        if cap_in is not None:
            scale *= cap_in * cap_out
        value = drop_fill if drop_fill is not None else fill
        return op.FusedAttention(
            q, k, v, mask, scale=scale, softcap=cap_out, fill=value, drop=None if drop_fill is None else 1, zero_masked=None if guard is None else 1
        )


def _unbounded(window):
    """No window: before opset 25 there is no such attribute."""
    return window in (None, -1)


@rule(priority=10)
class NativeAttention:
    """ONNX's own Attention (opset 23), where it is plain: no cache, four dimensions."""

    def pattern(op, q, k, v, mask):
        plain = {"is_causal": attr("causal"), "scale": attr("scale"), "softcap": attr("softcap"), "left_window_size": _unbounded, "right_window_size": _unbounded}
        return any_of(op.Attention(q, k, v, mask, **plain), op.Attention(q, k, v, **plain))

    def check(q, k, v, mask):
        if q.rank != 4 or k.rank != 4 or v.rank != 4:
            return f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}; expected four dimensions"
        if not isinstance(q.shape[-1], int):
            return f"the size of each head is not known: q has shape {q.shape}"
        return _check_mask(q, k, mask)

    def replace(op, q, k, v, mask, scale, softcap, causal):
        boolean = mask is not None and mask.dtype == "bool"
        return op.FusedAttention(
            q, k, v, mask, scale=scale or float(q.shape[-1]) ** -0.5, softcap=softcap or None, fill=float("-inf") if boolean else None,
            zero_masked=1 if boolean else None, causal=causal or None,
        )  # fmt: skip
