"""Lists of key blocks from scores of every row of query blocks, where heads, blocks and rows have rules of their own.

`choose_rows` is `estimate_lists.choose` with more to say: query and key blocks of different sizes, a share for each head,
key blocks and rows whose scores are not to be trusted, and the union of the heads of a list. `estimate_rows_launch.py`
calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .estimate_lists import _pack
from .estimate_select import FORCED, fraction, order, room_at
from .steps import LOG2E


@triton.jit
def _best(x, valid, must, share, keep, j, BEST: tl.constexpr, N: tl.constexpr):
    """The valid entries that hold `share` of the mass of a row, or with BEST the `keep` highest; `must` counts first.

    `select.top_p` and `select.top_k`; the threshold is found bit by bit in registers.
    """
    key = tl.where(must, FORCED, order(x))
    key = tl.where(valid, key, 0)
    if BEST:
        weight = valid.to(tl.int32)
        goal = tl.minimum(tl.maximum(keep, tl.sum(must.to(tl.int32))), tl.sum(weight))
    else:
        weight = tl.where(valid & (x > 0), x, 0.0).to(tl.float64)
        goal = share * tl.sum(weight)
    edge = tl.zeros([], tl.uint32)
    bit = edge + 0x80000000
    while bit > 0:
        trial = edge | bit
        reach = tl.sum(tl.where(key >= trial, weight, 0))
        edge = tl.where(reach >= goal, trial, edge)
        bit = bit >> 1
    above = tl.sum(tl.where(key > edge, weight, 0))
    if BEST:
        room = goal - above
    else:
        room = room_at(edge, above, goal)
    tied = (key == edge) & valid & (must == 0)
    chosen = must | (valid & (key > edge)) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    if not BEST:
        chosen = chosen | (valid & (tl.zeros([N], tl.float64) + share >= 1))
    return chosen


@triton.jit(do_not_specialize=["nq", "nk", "first", "p"])
def choose_rows(
    score, alike, trusted, shares, keep, tiles, count, p, nq, nk, first, heads,
    GROUP: tl.constexpr,  # heads of a list
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LOGITS: tl.constexpr,  # scores are logits: their softmax is the mass
    BEST: tl.constexpr,  # a number of blocks, not a share
    GATED: tl.constexpr,  # alike and trusted are there
    EACH: tl.constexpr,  # each head has its share
    N: tl.constexpr,
):  # fmt: skip
    """First keys of the blocks of each row of query blocks, int32 `[lists, nq, nk]`, counts. grid: (nq, lists).

    score fp32 `[B * H, nq, nk]`, read where row r, block first + r of BLOCK_Q positions, sees a block: one that begins
    before its end. The first block and those that meet the row's own positions are always in and count first.
    alike int8 `[B * H, nk]`: other blocks compete with none and are always in. trusted int8 `[B * H, nq]`: other rows take
    all. shares fp64 `[heads]`, or p: the bits of one share. keep int32 `[nq]`. With GATED a row takes one block at least.
    """
    r = tl.program_id(0)
    i = first + r
    j = tl.arange(0, N)
    seen = (j < nk) & (j * BLOCK_K < (i + 1) * BLOCK_Q)
    forced = seen & ((j == 0) | ((j + 1) * BLOCK_K > i * BLOCK_Q))
    union = forced.to(tl.int32)
    many = 0
    if BEST:
        many = tl.load(keep + r)
    for e in range(GROUP):
        h = (tl.program_id(1) * GROUP + e).to(tl.int64)
        share = fraction(p)
        if EACH:
            share = tl.load(shares + h % heads)
        x = tl.load(score + (h * nq + r) * nk + j, mask=seen, other=float("-inf"))
        valid = seen
        if GATED:
            valid = seen & (tl.load(alike + h * nk + j, mask=seen, other=0) != 0)
        x = tl.where(valid, x, float("-inf"))
        if LOGITS:
            high = tl.max(x)
            x = tl.where(valid, tl.exp2((x - tl.where(high == float("-inf"), 0.0, high)) * LOG2E), 0.0)
            x = x / tl.maximum(tl.sum(x), 1e-37)
        must = forced & valid
        chosen = _best(x, valid, must, share, many, j, BEST, N)
        if GATED:
            top = valid & (x == tl.max(tl.where(valid, x, float("-inf"))))
            lone = tl.sum(must.to(tl.int32)) == 0
            chosen = chosen | (lone & top & (tl.cumsum(top.to(tl.int32), 0) == 1))
            chosen = chosen | (seen & (valid == 0)) | (seen & (tl.load(trusted + h * nq + r) == 0))
        union = union | chosen.to(tl.int32)
    at = tl.program_id(1).to(tl.int64) * nq + r
    tl.store(count + at, _pack(union != 0, j, tiles + at * nk, nk, BLOCK_K, N))
