"""Vectors turned from one position to another: one read and one write of each, in place of two rotations in fp32.

What is computed is `scores/rotation.py`; `rotate_launch.py` calls this kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def turn(
    x, own, other, partner, out, n, heads, x_sb, x_sh, x_sn, o_sb, o_sh, t_sb,
    ROWS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """out[r, d] = x[r, d] * own[r, d] + x[r, partner[d]] * other[r, d]. grid: (heads, ceil(n / ROWS), B).

    own, other fp32 `[n, D]`, t_sb numbers apart in the batch (0: one for all rows); partner int32 `[D]`. Heads run together,
    so that the tables leave memory once.
    """
    b = tl.program_id(2).to(tl.int64)
    h = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    ok = (row < n)[:, None] & (d < D)[None, :]
    at = b * t_sb + row.to(tl.int64)[:, None] * D + d[None, :]
    pair = tl.load(partner + d, mask=d < D, other=0)
    x += b * x_sb + h * x_sh + row.to(tl.int64)[:, None] * x_sn
    mine = tl.load(x + d[None, :], mask=ok, other=0.0).to(tl.float32)
    theirs = tl.load(x + pair[None, :], mask=ok, other=0.0).to(tl.float32)
    y = mine * tl.load(own + at, mask=ok, other=0.0) + theirs * tl.load(other + at, mask=ok, other=0.0)
    tl.store(out + b * o_sb + h * o_sh + row.to(tl.int64)[:, None] * D + d[None, :], y, mask=ok)
