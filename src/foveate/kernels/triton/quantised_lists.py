"""One decode step over listed tiles or single entries of a quantised store: what is not listed is not read.

The walk over a list is that of `paging.attend_tiles`, the blocks are those of `quantised_decode.py`: codes where both sides
are coded, then steps in which some of the entries are as they came. `quantised_lists_launch.py` calls the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrivals import leave, merge
from .quantised_decode import COUNTS, _begin, _channels, _coded, _late, _step
from .steps import BIG, FLOOR, _finish

LOOK = tl.constexpr(128)  # starts of tiles that a program looks at once


@triton.jit
def _keys(tiles, t, used, size, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Step t of a list: entries `[KEYS]` and which of them it names; see `layout.py` for tiles that overlap."""
    flat = t * KEYS + tl.arange(0, KEYS)
    if WIDTH % KEYS == 0:  # one tile: entries are neighbours
        which = t * KEYS // WIDTH
        start = tl.load(tiles + which, mask=which < used, other=-BIG)
        stop = tl.load(tiles + which + 1, mask=which + 1 < used, other=BIG)
        key = tl.maximum(start, 0) + flat % WIDTH
        return key, (key < tl.minimum(stop, size)) & (key < start + WIDTH)
    which = flat // WIDTH
    start = tl.load(tiles + which, mask=which < used, other=BIG)
    stop = tl.load(tiles + which + 1, mask=which + 1 < used, other=BIG)
    key = start + flat % WIDTH
    ok = (key >= 0) & (key < tl.minimum(stop, size))
    return tl.where(ok, key, 0), ok


@triton.jit
def _clear(tiles, used, first, last, end, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Steps of a list from `first` on that lie before entry `end` altogether, as the number of the one behind them, at most
    `last`: tiles ascend."""
    tile = first * KEYS // WIDTH
    stop = tl.minimum(tl.cdiv(last * KEYS, WIDTH), used)
    below = tile
    for c in range(tile, stop, LOOK):
        i = c + tl.arange(0, LOOK)
        start = tl.load(tiles + i, mask=i < stop, other=BIG)
        below += tl.sum((start <= end - WIDTH).to(tl.int32))
    return tl.where(below == stop, last, tl.minimum(last, below * WIDTH // KEYS))


@triton.jit(do_not_specialize=COUNTS)
def attend_listed(
    q, out, lse, part, part_lse, arrived,
    k_codes, k_scale, k_low, k_tail, v_codes, v_scale, v_low, v_tail,
    k_done, v_done, length, bias, tiles, tile_count,
    scale, capacity, units, kv_heads, lists, tiles_sb, tiles_n, q_sb, q_sh,
    k_rows, k_few, k_tail_rows, k_ring, v_rows, v_few, v_tail_rows, v_ring,  # slots of a kv head
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_W: tl.constexpr, K_W_PAD: tl.constexpr, D: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_W: tl.constexpr, V_W_PAD: tl.constexpr, DV: tl.constexpr,
    WIDTH: tl.constexpr,  # entries of a tile
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # heads that share a list; a power of two; at least 16
    KEYS: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, LSE: tl.constexpr,
    FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query a row over its listed tiles. grid: (SPLITS, B * units), a unit being PACK query heads of one list.

    Entries, lengths and bias are as `quantised_decode.attend_codes` has them; tiles, partial results and counters as
    `paging.attend_tiles` has them. Steps whose tiles end before v_done read codes alone.
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
    k_end = tl.load(k_done + b).to(tl.int32)
    v_end = tl.minimum(tl.load(v_done + b).to(tl.int32), size)
    k_codes, k_scale, k_low, k_tail = _begin(k_codes, k_scale, k_low, k_tail, wide, k_rows, k_few, k_tail_rows, K_W, D, D)
    v_codes, v_scale, v_low, v_tail = _begin(
        v_codes, v_scale, v_low, v_tail, wide, v_rows, v_few, v_tail_rows, V_W, DV // V_GROUP, DV
    )
    kc, kc_ok = _channels(K_BITS, K_W, K_W_PAD)
    vc, vc_ok = _channels(V_BITS, V_W, V_W_PAD)
    r = tl.arange(0, TILE)
    head = unit * PACK + r
    at = b.to(tl.int64) * q_sb + head.to(tl.int64) * q_sh
    qt = tl.load(q + at[:, None] + kc[None, :], mask=(r < PACK)[:, None] & kc_ok[None, :], other=0.0)
    m = tl.full([TILE], FLOOR, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, 8 // V_BITS * V_W_PAD], tl.float32)
    steps = tl.cdiv(used * WIDTH, KEYS)
    share = tl.maximum(tl.cdiv(steps, SPLITS), 1)
    first = split * share
    last = tl.minimum(steps, first + share)
    clear = _clear(tiles, used, first, last, v_end, WIDTH, KEYS)  # up to there all is coded on both sides
    RUN: tl.constexpr = WIDTH % KEYS == 0
    for t in tl.range(first, clear, num_stages=STAGES):
        key, ok = _keys(tiles, t, used, v_end, WIDTH, KEYS)
        kt = _coded(
            k_codes, k_scale, k_low, k_tail, key, ok, kc, kc_ok, KEYS, K_BITS, K_W, K_W_PAD, K_GROUP, D, True, False, RUN
        )
        vt = _coded(
            v_codes, v_scale, v_low, v_tail, key, ok, vc, vc_ok, KEYS, V_BITS, V_W, V_W_PAD, V_GROUP, DV, False, False
        )
        m, l, acc = _step(qt, kt, vt, key, ok, m, l, acc, scale, bias, wide * capacity, BIAS, FP32)
    for t in tl.range(tl.maximum(first, clear), last, num_stages=1):  # few: their memory is better spent above
        key, ok = _keys(tiles, t, used, size, WIDTH, KEYS)
        old = ok & (key < k_end)
        kt = _coded(
            k_codes, k_scale, k_low, k_tail, key, old, kc, kc_ok, KEYS, K_BITS, K_W, K_W_PAD, K_GROUP, D, True, False, RUN
        )
        kt = tl.where(old[:, None], kt, _late(k_tail, key, ok & (key >= k_end), k_end, k_ring, kc, kc_ok, D))
        old = ok & (key < v_end)
        vt = _coded(
            v_codes, v_scale, v_low, v_tail, key, old, vc, vc_ok, KEYS, V_BITS, V_W, V_W_PAD, V_GROUP, DV, False, False
        )
        vt = tl.where(old[:, None], vt, _late(v_tail, key, ok & (key >= v_end), v_end, v_ring, vc, vc_ok, DV))
        m, l, acc = _step(qt, kt, vt, key, ok, m, l, acc, scale, bias, wide * capacity, BIAS, FP32)
    spot = tl.program_id(1)
    if SPLITS > 1:
        parts = tl.maximum(tl.cdiv(steps, share), 1)
        DV_PAD: tl.constexpr = 8 // V_BITS * V_W_PAD
        vc = tl.where(vc_ok, vc, DV)
        if split < parts:  # noqa: SIM102  (`and` would leave a part before it asks)
            if leave(part, part_lse, spot * SPLITS + split, arrived + spot, parts, acc, m, l, r, vc, PACK, DV):
                merge(
                    part, part_lse, spot * SPLITS, parts, arrived + spot, out, lse, spot * PACK, PACK, PACK_PAD, DV, DV_PAD,
                    CHUNK, 1, LSE,
                )  # fmt: skip
    else:
        _finish(out, lse, spot.to(tl.int64) * PACK + r, r < PACK, vc, vc_ok, acc, m, l, DV, LSE)
