"""A decode step over a list of tokens that count their positions inside the list (TokenSelect), in two launches.

`turn_step` turns the step's queries and its newest key; `attend_ranked` attends. A listed key would have to be rotated to
its place in the list first. Its logit with a query is a sum over channels in which partners change places as well in the one
as in the other: the key's channels as they are stored meet the query's channels, times one factor of the place, and the
query's partner channels, times another. So keys are read once, where they lie, in whole rows, and no turned copy is written:
two small products instead of one.

`ranked_steps_launch.py` calls these kernels; partial results are merged as `arrivals.py` says.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrivals import leave, merge
from .walk import FLOOR, LN2, _fold, _logits, _product, _read


@triton.jit
def _turned(x, own, other, partner, d, ok):
    """x[d] * own[d] + x[partner[d]] * other[d], fp32, of one vector: see `rotate.turn`."""
    pair = tl.load(partner + d, mask=ok, other=0)
    mine = tl.load(x + d, mask=ok, other=0.0).to(tl.float32)
    theirs = tl.load(x + pair, mask=ok, other=0.0).to(tl.float32)
    return mine * tl.load(own + d, mask=ok, other=0.0) + theirs * tl.load(other + d, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["m"])
def turn_step(
    q, k, length, raw, plain, plain_other, to, to_other, partner, voter, placed, m,
    heads, kv_heads, q_sb, q_sh, k_sb, k_sg, k_sm, raw_rows,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """The queries and the newest key of a decode step at other positions. grid: (B * (H + G),).

    plain fp32 `[B, 1, D]`, what own channels are multiplied with to undo the rotation; to `[B, 2, D]`, to stand at the
    voters' position and at the last place of the list; beside each what their partners are. voter fp32 `[B, H, D]`, placed
    `[B, H, D]` in the dtype of q; raw `[B, G, raw_rows, D]` gets the newest key of each row, its rotation undone.
    """
    row = tl.program_id(0)
    b = (row // (heads + kv_heads)).to(tl.int64)
    h = row % (heads + kv_heads)
    d = tl.arange(0, D_PAD)
    ok = d < D
    if h < heads:
        x = q + b * q_sb + h.to(tl.int64) * q_sh
        at = (b * heads + h) * D + d
        near = 2 * b * D
        tl.store(voter + at, _turned(x, to + near, to_other + near, partner, d, ok), mask=ok)
        y = _turned(x, to + near + D, to_other + near + D, partner, d, ok)
        tl.store(placed + at, y.to(placed.dtype.element_ty), mask=ok)
    else:
        g = (h - heads).to(tl.int64)
        newest = m - 1
        if length is not None:
            newest = tl.maximum(tl.load(length + b * kv_heads + g).to(tl.int32) - 1, 0)
        x = k + b * k_sb + g * k_sg + newest.to(tl.int64) * k_sm
        y = _turned(x, plain + b * D, plain_other + b * D, partner, d, ok)
        tl.store(raw + ((b * kv_heads + g) * raw_rows + newest) * D + d, y.to(raw.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["n", "m", "splits"])
def attend_ranked(
    q, raw, v, tokens, count, own, other, partner, out, lse, part, part_lse, arrived,
    scale, softcap, n, m, splits, kv_heads, raw_rows, v_sb, v_sg, v_sm,
    KEYS: tl.constexpr,  # tokens of a step
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # query heads of a kv head; a power of two; at least 16
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAP: tl.constexpr, FP32: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid: (splits, B * G). q `[B, H, D]` stands at the last place; tokens int32 `[B, n]`, count int32 `[B]`.

    raw `[B, G, raw_rows, D]` before rotation, v `[B, G, m, DV]`; own, other fp32 `[n, D]`: what channels of a key at a place
    are multiplied with to meet the query's own and its partner channels. out `[B, H, DV]`, lse fp32 `[B, H]`; part and
    part_lse have a slot for each program.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    g = (row % kv_heads).to(tl.int64)
    size = tl.minimum(tl.load(count + b).to(tl.int32), n)
    r = tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    i = tl.arange(0, KEYS)
    pair = tl.load(partner + d, mask=d < D, other=0)
    q += (row.to(tl.int64) * PACK + r)[:, None] * D
    live = (r < PACK)[:, None] & (d < D)[None, :]
    mine = tl.load(q + d[None, :], mask=live, other=0.0)
    theirs = tl.load(q + pair[None, :], mask=live, other=0.0)
    raw += row.to(tl.int64) * raw_rows * D
    v += b * v_sb + g * v_sg
    top = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DV_PAD], tl.float32)
    for c in tl.range(split * KEYS, size, splits * KEYS, num_stages=STAGES):
        place = c + i
        ok = place < size
        token = tl.load(tokens + b * n + place, mask=ok, other=0)
        ok = ok & (token >= 0) & (token < m)
        token = tl.where(ok, token, 0).to(tl.int64)
        key = _read(raw, token * D, ok, d, D, D_PAD, True).to(tl.float32)
        first = (key * _read(own, place * D, ok, d, D, D_PAD, True)).to(raw.dtype.element_ty)
        second = (key * _read(other, place * D, ok, d, D, D_PAD, True)).to(raw.dtype.element_ty)
        s = _product(mine, first, FP32) + _product(theirs, second, FP32)
        s = tl.where(ok[None, :], _logits(s, scale, softcap, l, CAP, False), float("-inf"))
        vt = _read(v, token * v_sm, ok, dv, DV, DV_PAD, True)
        top, l, acc = _fold(s, vt, top, l, acc, scale, not CAP, FP32)
    if part is not None:
        if leave(part, part_lse, row * splits + split, arrived + row, splits, acc, top, l, r, dv, PACK, DV):
            merge(
                part, part_lse, row * splits, splits, arrived + row, out, lse, row * PACK, PACK, PACK_PAD, DV, DV_PAD, CHUNK,
                3, True,
            )  # fmt: skip
    else:
        some = l > 0
        at = row.to(tl.int64) * PACK + r
        y = acc / tl.where(some, l, 1.0)[:, None]
        live = (r < PACK)[:, None] & (dv < DV)[None, :]
        tl.store(out + at[:, None] * DV + dv[None, :], y.to(out.dtype.element_ty), mask=live)
        y = tl.where(some, (top + tl.log2(tl.where(some, l, 1.0))) * LN2, float("-inf"))
        tl.store(lse + at, y, mask=r < PACK)
