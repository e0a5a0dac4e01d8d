"""Blocks pooled to means and scored against each other, without copies of q and k in fp32.

What is computed is `scores/pooled.py`; `estimate_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import FLOOR, LOG2E, _logits, _read


@triton.jit(do_not_specialize=["n", "offset"])
def block_means(
    x, out, n, offset, heads, x_sb, x_sh, x_sn,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,  # rows of a block; rows read at a time
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Mean of the rows that each block has, fp32 `[B * heads, blocks, D]`. grid: (blocks, B * heads).

    The first block begins `offset` rows before x. A block without rows is 0.
    """
    block = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    i = tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    x += b * x_sb + h * x_sh
    first = block * BLOCK - offset
    total = tl.zeros([D_PAD], tl.float32)
    for c in tl.static_range(0, BLOCK, ROWS):
        row = first + c + i
        ok = (row >= 0) & (row < n) & (c + i < BLOCK)
        total += tl.sum(_read(x, row.to(tl.int64) * x_sn, ok, d, D, D_PAD, True).to(tl.float32), 0)
    count = tl.minimum(first + BLOCK, n) - tl.maximum(first, 0)
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block
    tl.store(out + at * D + d, total / tl.maximum(count, 1).to(tl.float32), mask=d < D)


@triton.jit(do_not_specialize=["nq", "nk", "first"])
def score_blocks(
    q, k, out, live, scale, softcap, nq, nk, first, heads, kv_heads, k_sg,
    GROUP: tl.constexpr,  # heads whose highest score counts: 1, or all of a kv head
    TILE: tl.constexpr, KEYS: tl.constexpr, PART: tl.constexpr,  # channels of one product
    D: tl.constexpr, D_PAD: tl.constexpr,
    SOFTMAX: tl.constexpr, CAP: tl.constexpr, ALL_LIVE: tl.constexpr,
):  # fmt: skip
    """Scores of pooled queries against the causal key blocks, fp32 `[B * heads, nq, nk]`. grid: (ceil(nq / TILE), heads, B).

    q fp32 `[B, heads * GROUP, nq, D]`, k fp32 `[B, G, >= nk, D]` with k_sg numbers a kv head. Row r sees the key blocks up
    to first + r. With SOFTMAX the scores become probabilities in a second walk over what this program has just written,
    and blocks beyond are 0; without it they are not written. `live` int8 `[B * heads]`: heads that are asked for.
    """
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    at = b * heads + h
    if not ALL_LIVE:  # noqa: SIM102
        if tl.load(live + at) == 0:
            return
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.arange(0, PART)
    j = tl.arange(0, KEYS)
    last = tl.minimum(first + row, nk - 1)
    q += at * GROUP * nq * D
    k += (b * kv_heads + h * kv_heads // heads) * k_sg
    out += at * nq * nk
    high = tl.full([TILE], FLOOR, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    end = tl.minimum(nk, first + (tl.program_id(0) + 1) * TILE)
    for c in range(0, end, KEYS):
        best = tl.full([TILE, KEYS], float("-inf"), tl.float32)
        for r in range(GROUP):
            s = tl.zeros([TILE, KEYS], tl.float32)
            for e in tl.static_range(0, D_PAD, PART):
                at_q = row.to(tl.int64)[:, None] * D + (e + d)[None, :]
                at_k = (c + j).to(tl.int64)[:, None] * D + (e + d)[None, :]
                ok = (e + d < D)[None, :]
                qt = tl.load(q + r * nq * D + at_q, mask=ok & (row < nq)[:, None], other=0.0)
                kt = tl.load(k + at_k, mask=ok & (c + j < nk)[:, None], other=0.0)
                s = tl.dot(qt, tl.trans(kt), s, input_precision="tf32x3")  # the accuracy of fp32
            if CAP:
                s = _logits(s, scale * LOG2E, softcap, s, CAP, False) / LOG2E
            else:
                s = s * scale
            best = tl.maximum(best, s)
        seen = (c + j)[None, :] <= last[:, None]
        spot = out + row.to(tl.int64)[:, None] * nk + (c + j)[None, :]
        tl.store(spot, best, mask=seen & (row < nq)[:, None])
        if SOFTMAX:
            best = tl.where(seen, best, float("-inf"))
            new = tl.maximum(high, tl.max(best, 1))
            total = total * tl.exp2((high - new) * LOG2E) + tl.sum(tl.exp2((best - new[:, None]) * LOG2E), 1)
            high = new
    if SOFTMAX:
        tl.debug_barrier()  # other warps of this program wrote some of what is read below
        for c in range(0, nk, KEYS):
            spot = out + row.to(tl.int64)[:, None] * nk + (c + j)[None, :]
            seen = ((c + j)[None, :] <= last[:, None]) & (row < nq)[:, None]
            s = tl.load(spot, mask=seen, other=float("-inf"))
            p = tl.exp2((s - high[:, None]) * LOG2E) / total[:, None]
            tl.store(spot, p, mask=(c + j < nk)[None, :] & (row < nq)[:, None])
