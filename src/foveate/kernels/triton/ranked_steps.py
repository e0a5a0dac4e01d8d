"""A decode step over a list of tokens that count their positions inside the list (TokenSelect), in two launches.

`turn_step` turns the step's queries and its newest key; `attend_ranked` attends. A listed key has to be rotated to its place
in the list first. Where channels of the first half turn with those of the second, both halves are loaded and turned in
registers, with half of a row of the table. Else its logit with a query is a sum over channels in which partners change
places as well in the one as in the other: the key's channels as they are stored meet the query's channels, times one factor
of the place, and the query's partner channels, times another. Keys are read once, where they lie; no turned copy is written.

`ranked_steps_launch.py` calls these kernels; partial results are merged as `arrivals.py` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrivals import leave, merge
from .steps import FLOOR, LN2, _fold, _logits, _product, _read


@triton.jit
def _turned(x, own, other, partner, d, ok):
    """x[d] * own[d] + x[partner[d]] * other[d], fp32, of one vector: see `rotate.turn`."""
    pair = tl.load(partner + d, mask=ok, other=0)
    mine = tl.load(x + d, mask=ok, other=0.0).to(tl.float32)
    theirs = tl.load(x + pair, mask=ok, other=0.0).to(tl.float32)
    return mine * tl.load(own + d, mask=ok, other=0.0) + theirs * tl.load(other + d, mask=ok, other=0.0)


@triton.jit
def _undo(own, other, at, pair, d, ok):
    """What undoes the rotation in row `at` of a table (`Turns.asked`): factors of a channel and of its partner for the
    channel, then of the partner and of the channel for the partner. Each pair is turned by a matrix of two rows."""
    a = tl.load(own + at + d, mask=ok, other=1.0)
    c = tl.load(own + at + pair, mask=ok, other=1.0)
    to_d = tl.load(other + at + pair, mask=ok, other=0.0)
    to_pair = tl.load(other + at + d, mask=ok, other=0.0)
    size = a * c - to_d * to_pair  # not 1 where a family scales its tables (YaRN); a channel alone is its own partner
    return c / size, -to_d / size, a / size, -to_pair / size


@triton.jit
def _onward(own, other, at, pair, d, ok, a, z, c, w):
    """Factors of a channel and its partner that undo a rotation, `_undo`'s a, z, c, w, and carry out that of row `at`."""
    mine = tl.load(own + at + d, mask=ok, other=0.0)
    theirs = tl.load(other + at + pair, mask=ok, other=0.0)
    return mine * a + theirs * w, mine * z + theirs * c


@triton.jit(do_not_specialize=["m", "n", "near", "last"])
def turn_step(
    q, k, q_pos, length, raw, own, other, partner, voter, placed, m, n, near, last,
    heads, kv_heads, q_sb, q_sh, k_sb, k_sg, k_sm, qp_sb, raw_rows,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The queries and the newest key of a decode step at other positions. grid: (B * (H + G),).

    own, other fp32 `[n + B, D]`, a table of `Turns.asked`: n places, then where each row stands, int64 q_pos `[B]`. voter
    fp32 `[B, H, D]`, queries at position near; placed `[B, H, D]` in the dtype of q (None: not wanted), at the smaller of
    their own position and last; raw `[B, G, raw_rows, D]` gets the newest key of each row, its rotation undone.
    """
    row = tl.program_id(0)
    b = (row // (heads + kv_heads)).to(tl.int64)
    h = row % (heads + kv_heads)
    d = tl.arange(0, D_PAD)
    ok = d < D
    pair = tl.load(partner + d, mask=ok, other=0)
    newest = m - 1
    if h < heads:
        x = q + b * q_sb + h.to(tl.int64) * q_sh
    else:
        g = (h - heads).to(tl.int64)
        if length is not None:
            newest = tl.maximum(tl.load(length + b * kv_heads + g).to(tl.int32) - 1, 0)
        x = k + b * k_sb + g * k_sg + newest.to(tl.int64) * k_sm
    mine = tl.load(x + d, mask=ok, other=0.0).to(tl.float32)
    theirs = tl.load(x + pair, mask=ok, other=0.0).to(tl.float32)
    a, z, c, w = _undo(own, other, (n + b) * D, pair, d, ok)
    if h < heads:
        at = (b * heads + h) * D + d
        turn, turn_other = _onward(own, other, near.to(tl.int64) * D, pair, d, ok, a, z, c, w)
        tl.store(voter + at, mine * turn + theirs * turn_other, mask=ok)
        if placed is not None:
            to = tl.minimum(tl.load(q_pos + b * qp_sb), last) * D
            turn, turn_other = _onward(own, other, to, pair, d, ok, a, z, c, w)
            tl.store(placed + at, (mine * turn + theirs * turn_other).to(placed.dtype.element_ty), mask=ok)
    else:
        g = (h - heads).to(tl.int64)
        at = ((b * kv_heads + g) * raw_rows + newest) * D + d
        tl.store(raw + at, (mine * a + theirs * z).to(raw.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["n", "m", "splits"])
def attend_ranked(
    q, raw, v, tokens, count, own, other, partner, out, lse, part, part_lse, arrived,
    scale, softcap, n, m, splits, kv_heads, raw_rows, v_sb, v_sg, v_sm,
    KEYS: tl.constexpr,  # tokens of a step
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # query heads of a kv head; a power of two; at least 16
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAP: tl.constexpr, FP32: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    HALVES: tl.constexpr,  # partners are D / 2 apart and D is D_PAD
):  # fmt: skip
    """grid: (splits, B * G). q `[B, H, D]` stands at the last place; tokens int32 `[B, n]`, count int32 `[B]`. What follows
    a list in its row names entries that exist. Program s takes the steps s, s + splits, ..; a step's tokens are asked for a
    step ahead, so that the loop finds no list to follow and Triton asks for all it reads at once (`paging.attend_entries`).

    raw `[B, G, raw_rows, D]` before rotation, v `[B, G, m, DV]`; own, other fp32, a row a place: what channels of a key
    there are multiplied with to meet the query's own and its partner channels. out `[B, H, DV]`, lse fp32 `[B, H]`; part
    and part_lse have a slot for each program.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    g = (row % kv_heads).to(tl.int64)
    i = tl.arange(0, KEYS)
    tokens += b * n
    token = tl.load(tokens + split * KEYS + i, mask=split * KEYS + i < n, other=-1)
    size = tl.minimum(tl.load(count + b).to(tl.int32), n)
    r = tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    q += (row.to(tl.int64) * PACK + r)[:, None] * D
    e = tl.arange(0, D_PAD // 2)
    if HALVES:
        live = (r < PACK)[:, None] & (e < D)[None, :]
        mine = tl.load(q + e[None, :], mask=live, other=0.0)
        theirs = tl.load(q + D // 2 + e[None, :], mask=live, other=0.0)
    else:
        pair = tl.load(partner + d, mask=d < D, other=0)
        live = (r < PACK)[:, None] & (d < D)[None, :]
        mine = tl.load(q + d[None, :], mask=live, other=0.0)
        theirs = tl.load(q + pair[None, :], mask=live, other=0.0)
    raw += row.to(tl.int64) * raw_rows * D
    v += b * v_sb + g * v_sg
    top = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DV_PAD], tl.float32)
    for c in tl.range(split * KEYS, n, splits * KEYS, num_stages=STAGES):
        place = c + i
        ok = (token >= 0) & (token < m)  # not size: keys are asked for while the count is still on its way
        token = tl.where(ok, token, 0).to(tl.int64)
        if HALVES:  # (c, s) turns the one, (-s, c) the other
            one = _read(raw, token * D, ok, e, D, D, True).to(tl.float32)
            two = _read(raw + D // 2, token * D, ok, e, D, D, True).to(tl.float32)
            cos = _read(own, place * D, ok, e, D, D, True)
            sin = _read(other, place * D, ok, e, D, D, True)
            first = (one * cos - two * sin).to(raw.dtype.element_ty)
            second = (two * cos + one * sin).to(raw.dtype.element_ty)
        else:
            key = _read(raw, token * D, ok, d, D, D_PAD, True).to(tl.float32)
            first = (key * _read(own, place * D, ok, d, D, D_PAD, True)).to(raw.dtype.element_ty)
            second = (key * _read(other, place * D, ok, d, D, D_PAD, True)).to(raw.dtype.element_ty)
        s = _product(mine, first, FP32) + _product(theirs, second, FP32)
        listed = ok & (place < size)
        s = tl.where(listed[None, :], _logits(s, scale, softcap, l, CAP, False), float("-inf"))
        vt = _read(v, token * v_sm, ok, dv, DV, DV_PAD, True)
        token = tl.load(tokens + place + splits * KEYS, mask=place + splits * KEYS < n, other=-1)
        top, l, acc = _fold(s, vt, top, l, acc, scale, not CAP, FP32)
    if part is not None:
        if leave(part, part_lse, row * splits + split, arrived + row, splits, acc, top, l, r, dv, PACK, DV):
            merge(
                part, part_lse, row * splits, splits, arrived + row, out, lse, row * PACK, PACK, PACK_PAD, DV, DV_PAD, CHUNK,
                1, True,
            )  # fmt: skip
    else:
        some = l > 0
        at = row.to(tl.int64) * PACK + r
        y = acc / tl.where(some, l, 1.0)[:, None]
        live = (r < PACK)[:, None] & (dv < DV)[None, :]
        tl.store(out + at[:, None] * DV + dv[None, :], y.to(out.dtype.element_ty), mask=live)
        y = tl.where(some, (top + tl.log2(tl.where(some, l, 1.0))) * LN2, float("-inf"))
        tl.store(lse + at, y, mask=r < PACK)
