"""What a step of attention is made of, in every kernel here: rows read, products, logits, the running softmax, its end.

Scores are in units of log 2: `scale` holds log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e38)  # running maximum of a row that has seen nothing; finite, so that no inf - inf arises
BIG = tl.constexpr(1 << 30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _read(base, offset, ok, d, D: tl.constexpr, PAD: tl.constexpr, MASK: tl.constexpr):
    """Rows `[KEYS, PAD]` at element offsets; rows that are not ok read as zero, whatever lies there."""
    at = base + offset[:, None] + d[None, :]
    if MASK:
        if D < PAD:
            return tl.load(at, mask=ok[:, None] & (d[None, :] < D), other=0.0)
        return tl.load(at, mask=ok[:, None], other=0.0)
    if D < PAD:
        return tl.load(at, mask=d[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def _offsets(key, table, s0, sm, t0, tm, PAGE: tl.constexpr):
    """Element offsets of keys in the storages of k (strides s0 of a page, sm of a row) and of v (t0, tm)."""
    if PAGE > 0:
        number = tl.load(table + key // PAGE).to(tl.int64)
        slot = (key % PAGE).to(tl.int64)
        return number * s0 + slot * sm, number * t0 + slot * tm
    return key.to(tl.int64) * sm, key.to(tl.int64) * tm


@triton.jit
def _logits(s, scale, softcap, weight, CAP: tl.constexpr, BIAS: tl.constexpr):
    """Raw products -> logits in units of log 2. Without cap and bias the factor is left to `_fold` (one FMA)."""
    if CAP:
        t = tl.exp2(s * (scale * 2 / softcap))  # scale holds log2(e): this is exp(2 x) of x = logit / cap
        s = softcap * LOG2E * (1 - 2 / (t + 1))
    elif BIAS:
        s = s * scale
    if BIAS:
        s = s + weight[None, :] * LOG2E
    return s


@triton.jit
def _fold(s, v, m, l, acc, scale, PLAIN: tl.constexpr, FP32: tl.constexpr):
    """One step of the online softmax."""
    if PLAIN:
        top = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - top[:, None])
    else:
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - top[:, None])
    shrink = tl.exp2(m - top)
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if FP32:  # three tf32 products: the accuracy of fp32 at the speed of the matrix units
        acc = tl.dot(p, v, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(p.to(v.dtype), v, acc)
    return top, l, acc


@triton.jit
def _product(q, k, FP32: tl.constexpr):
    if FP32:  # three tf32 products: the accuracy of fp32 at the speed of the matrix units
        return tl.dot(q, tl.trans(k), input_precision="tf32x3")
    return tl.dot(q, tl.trans(k))


@triton.jit
def _finish(out, lse, at, live, dv, there, acc, m, l, DV: tl.constexpr, LSE: tl.constexpr):
    """Divide by the sums and store rows `at` `[TILE]` of out `[rows, DV]` and, with LSE, of lse `[rows]` (natural log).

    Rows that saw nothing are 0 and -inf. live `[TILE]`, there: which rows, and channels dv, are stored.
    """
    some = l > 0
    acc = acc / tl.where(some, l, 1.0)[:, None]
    tl.store(out + at[:, None] * DV + dv[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & there[None, :])
    if LSE:
        tl.store(lse + at, tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * LN2, float("-inf")), mask=live)
