"""Logits summed along antidiagonals, as one product over stride * D channels, and the mass of blocks from them.

`antidiagonals` is a matrix product that reads rows where they lie: step t of a tile of queries is the row `stride - 1 - t`
of every stride, of a tile of keys the row t. It keeps no cell: what it stores is the log-sum-exp of each row over the cells
of one key block, which is all that the softmax over the row needs later, so that programs are independent and the product
is computed once. `block_sums` turns these into mass.

What is computed is `scores/antidiagonal.py`; `estimate_rows_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import _logits


@triton.jit(do_not_specialize=["m", "n", "start", "tile0", "rows", "nk"])
def antidiagonals(
    q, k, part, scale, softcap, m, n, start, tile0, rows, nk,
    kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm,
    GROUP: tl.constexpr,  # query heads of a kv head: their rows take turns in a tile
    STRIDE: tl.constexpr, PER: tl.constexpr,  # positions of a cell, cells of a block
    TILE: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,  # rows, cells of keys, channels of one product
    SWEEP: tl.constexpr,  # tiles of rows that walk over the keys together
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of each row of cells over each key block: part fp32 `[B * G, rows, GROUP, nk]`.

    grid: (tiles of rows * tiles of keys, B * G). Row i is cell tile0 + i of the queries and sees the cells of keys up to
    that one. q `[B, H, n, D]` holds the positions from `start` on, k `[B, G, m, D]` those from 0; products with positions
    that are not there count as 0. scale holds log2(e) and 1 / STRIDE. Blocks beyond a row's last are not written, or -inf.
    """
    tiles = tl.cdiv(rows * GROUP, TILE)
    steps = tl.cdiv(tile0 + rows, KEYS)
    # Neighbouring programs share a few tiles of rows and of keys, so that both stay in the cache.
    sweep = tl.program_id(0) // (SWEEP * steps)
    many = tl.minimum(tiles - sweep * SWEEP, SWEEP)
    place = tl.program_id(0) % (SWEEP * steps)
    tile = sweep * SWEEP + place % many
    c = place // many * KEYS
    if c > tile0 + tl.minimum((tile + 1) * TILE - 1, rows * GROUP - 1) // GROUP:
        return
    unit = tl.program_id(1)
    b = (unit // kv_heads).to(tl.int64)
    g = unit % kv_heads
    row = tile * TILE + tl.arange(0, TILE)
    live = row < rows * GROUP
    cell = tile0 + row // GROUP
    head = (g * GROUP + row % GROUP).to(tl.int64)
    last = cell * STRIDE + STRIDE - 1 - start  # row of q that the first step reads
    d = tl.arange(0, PART)
    j = c + tl.arange(0, KEYS)
    q += b * q_sb
    k += b * k_sb + g.to(tl.int64) * k_sg
    at_q = head * q_sh + last.to(tl.int64) * q_sn
    at_k = (j * STRIDE).to(tl.int64) * k_sm
    PARTS: tl.constexpr = D_PAD // PART
    s = tl.zeros([TILE, KEYS], tl.float32)
    for step in tl.range(0, STRIDE * PARTS, num_stages=STAGES):
        t = step // PARTS
        e = step % PARTS * PART + d
        ok_q = (live & (last - t >= 0) & (last - t < n))[:, None]
        ok_k = (j * STRIDE + t < m)[:, None]
        if D < D_PAD:
            ok_q = ok_q & (e < D)[None, :]
            ok_k = ok_k & (e < D)[None, :]
        qt = tl.load(q + (at_q - t * q_sn)[:, None] + e[None, :], mask=ok_q, other=0.0)
        kt = tl.load(k + (at_k + t * k_sm)[:, None] + e[None, :], mask=ok_k, other=0.0)
        if FP32:  # three tf32 products: the accuracy of fp32
            s = tl.dot(qt, tl.trans(kt), s, input_precision="tf32x3")
        else:
            s = tl.dot(qt, tl.trans(kt), s)
    if CAP:
        s = _logits(s, scale, softcap, s, CAP, False)
    else:
        s = s * scale
    s = tl.where(j[None, :] <= cell[:, None], s, float("-inf"))
    if PER > 1:
        x = tl.reshape(s, [TILE, KEYS // PER, PER])
        high = tl.max(x, 2)
        base = tl.where(high == float("-inf"), 0.0, high)
        total = tl.sum(tl.exp2(x - base[:, :, None]), 2)
        s = tl.where(high == float("-inf"), high, base + tl.log2(tl.maximum(total, 1.0)))  # a maximum adds 1 to its sum
    block = c // PER + tl.arange(0, KEYS // PER)
    at = unit.to(tl.int64) * rows * GROUP + row
    tl.store(part + at[:, None] * nk + block[None, :], s, mask=live[:, None] & (block < nk)[None, :])


@triton.jit(do_not_specialize=["first", "begin", "end", "nq", "nk"])
def block_sums(
    part, mass, first, begin, end, nq, nk,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, PER: tl.constexpr,
    AT: tl.constexpr,  # rows of cells held at once, a divisor of PER
    N: tl.constexpr,
):  # fmt: skip
    """Softmax of each row of cells over its blocks, added up over the rows of a query block. grid: (nq, B * H).

    part as `antidiagonals` leaves it, from the first row of cells of block `first` on; mass fp32 `[B * H, nq, nk]`, 0 beyond
    the diagonal. Cells without a position in [begin, end) give nothing.
    """
    i = tl.program_id(0)
    h = tl.program_id(1)
    j = tl.arange(0, N)
    seen = (j <= first + i) & (j < nk)
    start = ((h // GROUP).to(tl.int64) * nq + i) * PER * GROUP + h % GROUP
    total = tl.zeros([N], tl.float32)
    for c in tl.static_range(0, PER, AT):
        t = c + tl.arange(0, AT)
        x = tl.load(part + (start + t * GROUP)[:, None] * nk + j[None, :], mask=seen[None, :], other=float("-inf"))
        p = tl.exp2(x - tl.max(x, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        cell = (first + i) * PER + t
        there = ((cell + 1) * STRIDE > begin) & (cell * STRIDE < end)
        total += tl.sum(tl.where(there[:, None], p, 0.0), 0)
    at = h.to(tl.int64) * nq + i
    tl.store(mass + at * nk + j, total, mask=j < nk)
