"""What LongHeads does in a decode step beside scores, a choice and attention, in three launches.

`turn_queries` remembers a step's queries at their place in their chunk and undoes their rotation; `place_queries` makes a
query for each chunk of a list, turned to where it stands as seen from there; `join_chunks` puts the chunks' partial results
together. One program a query head, and a part of its list. `chunk_steps_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ranked_steps import _turned


@triton.jit(do_not_specialize=["chunks"])
def turn_queries(
    q, q_pos, plain, plain_other, ahead, ahead_other, partner, bare, recent, at, have, heads, chunks, q_sb, q_sh, qp_sb,
    SIZE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """grid: (B * H,). bare fp32 `[B, H, D]`: queries before rotation. have int32 `[B]`: chunks up to the query's own.

    plain fp32 `[B, 1, D]` undoes the rotation, ahead `[B, chunks, D]` turns to the place in the chunk (and so many chunks
    further); beside each what their partners are. recent `[B, H, 2 SIZE, D]` gets the query turned to its place, at int64
    `[B, 2 SIZE]` its position.
    """
    row = tl.program_id(0)
    b = (row // heads).to(tl.int64)
    h = (row % heads).to(tl.int64)
    d = tl.arange(0, D_PAD)
    ok = d < D
    pos = tl.load(q_pos + b * qp_sb)
    slot = pos % (2 * SIZE)
    x = q + b * q_sb + h * q_sh
    tl.store(bare + row.to(tl.int64) * D + d, _turned(x, plain + b * D, plain_other + b * D, partner, d, ok), mask=ok)
    y = _turned(x, ahead + b * chunks * D, ahead_other + b * chunks * D, partner, d, ok)
    tl.store(recent + (row.to(tl.int64) * (2 * SIZE) + slot) * D + d, y.to(recent.dtype.element_ty), mask=ok)
    if h == 0:
        tl.store(at + b * (2 * SIZE) + slot, pos)
        tl.store(have + b, (pos // SIZE + 1).to(tl.int32))


@triton.jit(do_not_specialize=["chunks", "keep"])
def place_queries(
    q, tiles, count, ahead, ahead_other, partner, out, start, used, heads, lists, chunks, keep, q_sb, q_sh,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """grid: (ceil(keep / SLOTS), B * H). out `[B, lists, keep, H / lists, D]` in the dtype of q.

    tiles int32 `[B, lists, keep]`, first entries of chunks, ascending; count int32 `[B, lists]`. start int32 `[B, lists,
    keep]`: each chunk's tile; used int32 `[B, lists, keep]`: 1, or 0 behind a list.
    """
    row = tl.program_id(1)
    b = (row // heads).to(tl.int64)
    h = row % heads
    d = tl.arange(0, D_PAD)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    here = slot < keep
    per = heads // lists
    line = b * lists + h // per
    n = tl.load(count + line)
    tile = tl.load(tiles + line * keep + slot, mask=here, other=0)
    far = tl.minimum(tl.maximum(n - 1 - slot, 0) + tile // SIZE, chunks - 1)  # from the text's first chunk to the query's
    x = q + b * q_sb + h.to(tl.int64) * q_sh
    ok = d < D
    mine = tl.load(x + d, mask=ok, other=0.0).to(tl.float32)
    theirs = tl.load(x + tl.load(partner + d, mask=ok, other=0), mask=ok, other=0.0).to(tl.float32)
    table = (b * chunks + far)[:, None] * D + d[None, :]
    ok = here[:, None] & ok[None, :]
    y = mine[None, :] * tl.load(ahead + table, mask=ok, other=0.0)
    y += theirs[None, :] * tl.load(ahead_other + table, mask=ok, other=0.0)
    at = line * keep + slot
    tl.store(out + (at * per + h % per)[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=ok)
    if h % per == 0:
        tl.store(start + at, tile, mask=here)
        tl.store(used + at, (slot < n).to(tl.int32), mask=here)


@triton.jit(do_not_specialize=["keep", "per"])
def join_chunks(
    part, part_lse, out, lse, keep, per,
    KEEP: tl.constexpr,  # at least keep
    SLOTS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """grid: (B * H,). part `[B * lists, keep, per, DV]` and part_lse fp32 `[B * lists, keep, per]` (natural log, -inf where
    nothing is), a list being that of `per` heads."""
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, KEEP)
    first = row // per * keep * per + row % per
    w = tl.load(part_lse + first + every * per, mask=every < keep, other=float("-inf"))
    top = tl.max(w)
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(tl.exp(w - top))
    i = tl.arange(0, SLOTS)
    dv = tl.arange(0, DV_PAD)
    acc = tl.zeros([SLOTS, DV_PAD], tl.float32)
    for c in range(0, keep, SLOTS):
        here = c + i < keep
        at = first + (c + i) * per
        weight = tl.exp(tl.load(part_lse + at, mask=here, other=float("-inf")) - top)
        ok = (here & (weight > 0.0))[:, None] & (dv < DV)[None, :]
        x = tl.load(part + at[:, None] * DV + dv[None, :], mask=ok, other=0.0)
        acc += weight[:, None] * x.to(tl.float32)
    y = tl.sum(acc, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * DV + dv, y.to(out.dtype.element_ty), mask=dv < DV)
    tl.store(lse + row, tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf")))
