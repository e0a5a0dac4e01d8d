"""Two or three partial softmaxes put together in one pass: every output is read once and the whole is written once.

What is computed is `combine.merge`; `merge_launch.py` calls this kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weight(lse, top, at, ok):
    """exp(lse - top) of one part; a row without any key counts 0, in all parts too."""
    part = tl.load(lse + at, mask=ok, other=float("-inf"))
    return tl.where(part == float("-inf"), 0.0, tl.exp(part - top))


@triton.jit(do_not_specialize=["n"])
def merge(
    o0, o1, o2, l0, l1, l2, out, lse, n, heads, o_sb, o_sh, o_sn, w_sb, w_sh, w_sn,
    PARTS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """grid: (ceil(n / ROWS), heads, B). o0..o2 share the strides o_s*; l0..l2 and lse are `[B, H, n]` without gaps."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    ok = row < n
    at = (b * heads + h) * n + row
    top = tl.maximum(tl.load(l0 + at, mask=ok, other=float("-inf")), tl.load(l1 + at, mask=ok, other=float("-inf")))
    if PARTS == 3:
        top = tl.maximum(top, tl.load(l2 + at, mask=ok, other=float("-inf")))
    place = b * o_sb + h * o_sh + row.to(tl.int64)[:, None] * o_sn + d[None, :]
    live = ok[:, None] & (d < D)[None, :]
    weight = _weight(l0, top, at, ok)
    total = weight
    y = tl.load(o0 + place, mask=live, other=0.0).to(tl.float32) * weight[:, None]
    weight = _weight(l1, top, at, ok)
    total += weight
    y += tl.load(o1 + place, mask=live, other=0.0).to(tl.float32) * weight[:, None]
    if PARTS == 3:
        weight = _weight(l2, top, at, ok)
        total += weight
        y += tl.load(o2 + place, mask=live, other=0.0).to(tl.float32) * weight[:, None]
    some = total > 0.0
    y = y / tl.where(some, total, 1.0)[:, None]
    tl.store(out + b * w_sb + h * w_sh + row.to(tl.int64)[:, None] * w_sn + d[None, :], y, mask=live)
    tl.store(lse + at, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=ok)
