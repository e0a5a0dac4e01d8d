"""How alike the rows of blocks are, and scores of pooled blocks where query and key blocks differ in size.

What is computed is `scores/similarity.py` and `pooled.block_logits`; `estimate_rows_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import LOG2E, _logits


@triton.jit(do_not_specialize=["n", "offset"])
def similarity(
    x, centre, out, n, offset, heads, x_sb, x_sh, x_sn,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,  # rows of a block; rows read at a time
    CENTRE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Squared length of the mean of each block's normalised rows, fp32 `[B * heads, blocks]`. grid: (blocks, B * heads).

    The grid is that of `block_means`. With CENTRE, fp32 `[B * heads, D]` is taken off every row first.
    """
    block = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    x += (h // heads).to(tl.int64) * x_sb + (h % heads).to(tl.int64) * x_sh
    first = block * BLOCK - offset
    total = tl.zeros([D_PAD], tl.float32)
    for c in tl.static_range(0, BLOCK, ROWS):
        row = first + c + i
        ok = ((row >= 0) & (row < n) & (c + i < BLOCK))[:, None] & (d < D)[None, :]
        v = tl.load(x + row.to(tl.int64)[:, None] * x_sn + d[None, :], mask=ok, other=0.0).to(tl.float32)
        if CENTRE:
            v = tl.where(ok, v - tl.load(centre + h * D + d, mask=d < D, other=0.0)[None, :], 0.0)
        size = tl.sqrt(tl.sum(v * v, 1))
        total += tl.sum(v / tl.maximum(size, 1e-12)[:, None], 0)
    count = tl.minimum(first + BLOCK, n) - tl.maximum(first, 0)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + h.to(tl.int64) * tl.num_programs(0) + block, tl.sum(mean * mean))


@triton.jit(do_not_specialize=["nq", "nk", "first"])
def visible_logits(
    q, k, out, scale, softcap, nq, nk, first,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,  # rows, key blocks, channels of one product
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Scores of pooled queries against pooled keys, fp32 `[B * H, nq, nk]`. grid: (tiles of keys, tiles of rows, B * H).

    q fp32 `[B * H, nq, D]`, k fp32 `[B * G, nk, D]`. Tiles that no row sees are not written; row r is block first + r of
    BLOCK_Q positions and sees what begins before its end.
    """
    c = tl.program_id(0) * KEYS
    if c * BLOCK_K >= (first + tl.minimum(nq, (tl.program_id(1) + 1) * TILE)) * BLOCK_Q:
        return
    h = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    j = c + tl.arange(0, KEYS)
    d = tl.arange(0, PART)
    q += h * nq * D
    k += h // GROUP * nk * D
    s = tl.zeros([TILE, KEYS], tl.float32)
    for e in tl.static_range(0, D_PAD, PART):
        ok = (e + d < D)[None, :]
        qt = tl.load(q + row[:, None] * D + (e + d)[None, :], mask=ok & (row < nq)[:, None], other=0.0)
        kt = tl.load(k + j[:, None] * D + (e + d)[None, :], mask=ok & (j < nk)[:, None], other=0.0)
        s = tl.dot(qt, tl.trans(kt), s, input_precision="tf32x3")  # the accuracy of fp32
    if CAP:
        s = _logits(s, scale * LOG2E, softcap, s, CAP, False) / LOG2E
    else:
        s = s * scale
    at = (h * nq + row)[:, None] * nk + j[None, :]
    tl.store(out + at, s, mask=(row < nq)[:, None] & (j < nk)[None, :])
