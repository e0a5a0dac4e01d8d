"""One decode step over listed entries of which older keys have a part of their channels, and bounds of pages of them.

A query meets an old key in the channels that are left, which lie side by side in memory, and a recent one in all: what a
key has lost is neither read nor multiplied (Xu et al. 2024, "ThinK", arXiv 2407.21018; `packed.Thinned` says how keys lie in
memory). The walk over a list is that of `quantised_lists.py`. `thinned_launch.py` calls the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrivals import leave, merge
from .quantised_lists import _clear, _keys
from .steps import FLOOR, _finish, _fold, _logits, _product, _read


@triton.jit(do_not_specialize=["capacity", "tiles_n"])
def attend_thinned(
    q, out, lse, part, part_lse, arrived, few, channels, tail, v, done, length, bias, tiles, tile_count,
    scale, capacity, units, kv_heads, lists, tiles_sb, tiles_n, q_sb, q_sh,
    few_sb, few_sg, few_sm, tail_sb, tail_sg, tail_sm, v_sb, v_sg, v_sm,
    F: tl.constexpr, WIDE: tl.constexpr, F_PAD: tl.constexpr,  # channels of an old key; with the zeros behind them
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    WIDTH: tl.constexpr,  # entries of a tile
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # heads that share a list; a power of two; at least 16
    KEYS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, LSE: tl.constexpr,
    FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query a row over its listed tiles. grid: (SPLITS, B * units), a unit being PACK query heads of one list.

    few `[B, G, P, WIDE]`, channels int64 `[B, G, F]`, tail `[B, G, T, D]` and done int64 `[B]` are those of
    `packed.Thinned`; bias fp32 `[B, G, capacity]` or None. Tiles, partial results and counters as `paging.attend_tiles` has
    them.
    """
    split = tl.program_id(0)
    b = tl.program_id(1) // units
    unit = tl.program_id(1) % units
    g = unit * kv_heads // units
    row = unit * lists // units
    if tiles_sb > 0:
        row += b * lists
    used = tl.load(tile_count + row)
    tiles += row.to(tl.int64) * tiles_n
    wide = (b * kv_heads + g).to(tl.int64)
    size = capacity
    if length is not None:
        size = tl.minimum(tl.load(length + wide).to(tl.int32), capacity)
    end = tl.minimum(tl.load(done + b).to(tl.int32), size)
    few += b.to(tl.int64) * few_sb + g.to(tl.int64) * few_sg
    tail += b.to(tl.int64) * tail_sb + g.to(tl.int64) * tail_sg
    v += b.to(tl.int64) * v_sb + g.to(tl.int64) * v_sg
    if BIAS:
        bias += wide * capacity
    f = tl.arange(0, F_PAD)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    c = tl.load(channels + wide * F + f, mask=f < F, other=0)
    r = tl.arange(0, TILE)
    head = unit * PACK + r
    at = b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
    thin = tl.load(q + at[:, None] + c[None, :], mask=(r < PACK)[:, None] & (f < F)[None, :], other=0.0)
    m = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, DV_PAD], tl.float32)
    steps = tl.cdiv(used * WIDTH, KEYS)
    share = tl.maximum(tl.cdiv(steps, SPLITS), 1)
    first = split * share
    last = tl.minimum(steps, first + share)
    clear = _clear(tiles, used, first, last, end, WIDTH, KEYS)
    for t in tl.range(first, clear, num_stages=STAGES):
        key, ok = _keys(tiles, t, used, end, WIDTH, KEYS)
        kt = _read(few, key.to(tl.int64) * few_sm, ok, f, WIDE, F_PAD, True)
        vt = _read(v, key.to(tl.int64) * v_sm, ok, dv, DV, DV_PAD, True)
        s = _product(thin, kt, FP32)
        if BIAS:
            s = _logits(s, scale, 0.0, tl.load(bias + key, mask=ok, other=0.0), False, True)
        s = tl.where(ok[None, :], s, float("-inf"))
        m, l, acc = _fold(s, vt, m, l, acc, scale, not BIAS, FP32)
    qt = _read(q, at, r < PACK, d, D, D_PAD, True)
    for t in tl.range(tl.maximum(first, clear), last, num_stages=1):
        key, ok = _keys(tiles, t, used, size, WIDTH, KEYS)
        late = ok & (key >= end)
        kt = _read(few, key.to(tl.int64) * few_sm, ok & (key < end), f, WIDE, F_PAD, True)
        s = _product(thin, kt, FP32)
        whole = _read(tail, (key - end).to(tl.int64) * tail_sm, late, d, D, D_PAD, True)
        s += _product(qt, whole, FP32)  # rows of the other kind read as zero
        vt = _read(v, key.to(tl.int64) * v_sm, ok, dv, DV, DV_PAD, True)
        if BIAS:
            s = _logits(s, scale, 0.0, tl.load(bias + key, mask=ok, other=0.0), False, True)
        s = tl.where(ok[None, :], s, float("-inf"))
        m, l, acc = _fold(s, vt, m, l, acc, scale, not BIAS, FP32)
    spot = tl.program_id(1)
    if SPLITS > 1:
        parts = tl.maximum(tl.cdiv(steps, share), 1)
        if split < parts:  # noqa: SIM102  (`and` would leave a part before it asks)
            if leave(part, part_lse, spot * SPLITS + split, arrived + spot, parts, acc, m, l, r, dv, PACK, DV):
                merge(
                    part, part_lse, spot * SPLITS, parts, arrived + spot, out, lse, spot * PACK, PACK, PACK_PAD, DV, DV_PAD,
                    CHUNK, 1, LSE,
                )  # fmt: skip
    else:
        _finish(out, lse, spot.to(tl.int64) * PACK + r, r < PACK, dv, dv < DV, acc, m, l, DV, LSE)


@triton.jit(do_not_specialize=["covered_n", "size_n"])
def bounds_of_thinned(
    few, channels, tail, done, covered, length, data, covered_n, size_n,
    kv_heads, data_rows, few_sb, few_sg, few_sm, tail_sb, tail_sg, tail_sm,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,  # entries of a page of bounds
    F: tl.constexpr, F_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Bounds of the pages that hold entries from `covered` on, as `paging.update_bounds` makes them. grid: (B * G,).

    Keys as `attend_thinned` has them: 0 in the channels that they have lost.
    """
    row = tl.program_id(0)
    b = (row // kv_heads).to(tl.int64)
    g = (row % kv_heads).to(tl.int64)
    size = size_n
    if length is not None:
        size = tl.load(length + row).to(tl.int32)
    was = covered_n
    if covered is not None:
        was = tl.load(covered + row).to(tl.int32)
        tl.debug_barrier()  # every warp has read it before one of them writes it below
    end = tl.load(done + b).to(tl.int32)
    few += b * few_sb + g * few_sg
    tail += b * tail_sb + g * tail_sg
    data += row.to(tl.int64) * data_rows * (2 * D)
    i = tl.arange(0, WIDTH_PAD)
    f = tl.arange(0, F_PAD)
    d = tl.arange(0, D_PAD)
    c = tl.load(channels + row.to(tl.int64) * F + f, mask=f < F, other=0)
    for page in range(was // WIDTH, tl.cdiv(size, WIDTH)):
        key = page * WIDTH + i
        ok = (i < WIDTH) & (key < size)
        late = ok & (key >= end)
        slot = (key - end).to(tl.int64) * tail_sm
        x = _read(tail, slot, late, d, D, D_PAD, True).to(tl.float32)  # zero for old keys
        high = tl.max(tl.where(ok[:, None], x, float("-inf")), 0)
        low = tl.min(tl.where(ok[:, None], x, float("inf")), 0)
        at = data + page * (2 * D)
        tl.store(at + d, high.to(data.dtype.element_ty), mask=d < D)
        tl.store(at + D + d, low.to(data.dtype.element_ty), mask=d < D)
        if page * WIDTH < end:  # the channels that old keys have, once more
            tl.debug_barrier()  # what lies there now is written
            y = _read(few, key.to(tl.int64) * few_sm, ok & (key < end), f, F, F_PAD, True)
            z = tl.load(tail + slot[:, None] + c[None, :], mask=late[:, None] & (f < F)[None, :], other=0.0)
            y = tl.where(late[:, None], z, y).to(tl.float32)
            top = tl.max(tl.where(ok[:, None], y, float("-inf")), 0)
            bottom = tl.min(tl.where(ok[:, None], y, float("inf")), 0)
            tl.store(at + c, top.to(data.dtype.element_ty), mask=f < F)
            tl.store(at + D + c, bottom.to(data.dtype.element_ty), mask=f < F)
    if covered is not None:
        tl.store(covered + row, size.to(covered.dtype.element_ty))
