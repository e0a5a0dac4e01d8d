"""What `walk.attend` asks of lists: which run needs no mask, where the keys of a step lie. And, made before it, columns
without those that diagonals cover."""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import BIG


@triton.jit
def _survey(row, n, lo, hi, end, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Of n ascending starts: (first tile of the free run, one past its last, tiles that begin before `end`).

    A tile is free when it lies in [lo, hi); none is when two tiles of the row overlap.
    """
    below = 0
    within = 0
    seen = 0
    clash = 0
    i = tl.arange(0, CHUNK)
    for c in range(0, n, CHUNK):
        x = tl.load(row + c + i, mask=c + i < n, other=BIG)
        below += tl.sum((x < lo).to(tl.int32))
        within += tl.sum((x + WIDTH <= hi).to(tl.int32))
        seen += tl.sum((x < end).to(tl.int32))
        if WIDTH > 1:
            after = tl.load(row + c + i + 1, mask=c + i + 1 < n, other=2 * BIG - 1)
            clash = tl.maximum(clash, tl.max((after - x < WIDTH).to(tl.int32)))
    within = tl.where(clash > 0, below, tl.maximum(below, within))
    return below, within, seen


@triton.jit
def _survey_diagonals(row, n, e, lo, hi, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """The same for tiles [e - d - WIDTH, e - d) of n ascending distances: keys run backwards from e."""
    below = 0
    within = 0
    seen = 0
    clash = 0
    i = tl.arange(0, CHUNK)
    for c in range(0, n, CHUNK):
        d = tl.load(row + c + i, mask=c + i < n, other=BIG)
        below += tl.sum(((e - d > hi) & (c + i < n)).to(tl.int32))
        within += tl.sum((e - d - WIDTH >= lo).to(tl.int32))
        seen += tl.sum((e - d > 0).to(tl.int32))
        after = tl.load(row + c + i + 1, mask=c + i + 1 < n, other=2 * BIG - 1)
        clash = tl.maximum(clash, tl.max((after - d < WIDTH).to(tl.int32)))
    within = tl.where(clash > 0, below, tl.maximum(below, within))
    return below, within, seen


@triton.jit
def _starts(row, flat, mine, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """Per key of a step that begins at position `flat` of a list of tiles: the number listed for its tile, its offset."""
    i = tl.arange(0, KEYS)
    flat = tl.where(mine, flat, 0)
    if WIDTH % KEYS == 0:  # the whole step lies in one tile: one load instead of one a key
        return tl.load(row + flat // WIDTH) + tl.zeros([KEYS], tl.int32), flat % WIDTH + i
    if WIDTH * 2 == KEYS:  # two tiles
        second = tl.load(row + flat // WIDTH + tl.where(mine, 1, 0))
        return tl.where(i < WIDTH, tl.load(row + flat // WIDTH), second), i % WIDTH
    return tl.load(row + (flat + i) // WIDTH, mask=i < tl.where(mine, KEYS, 0), other=0), (flat + i) % WIDTH


@triton.jit
def _listed(row, spot, rows, used, cut, skip, WIDTH: tl.constexpr):
    """(key, stop) at a spot of the masked sequence of a list, as numbers; stop is 0 beyond the sequence's end."""
    spot = tl.zeros([], tl.int32) + spot
    flat = spot + tl.where(spot >= cut, skip, 0)
    which = tl.where(spot < rows, flat // WIDTH, 0)
    stop = tl.load(row + tl.maximum(tl.minimum(which + 1, used - 1), 0))
    stop = tl.where(which + 1 < used, stop, BIG)
    return tl.load(row + which) + flat % WIDTH, tl.where(spot < rows, stop, 0)


@triton.jit
def compact_columns(
    columns, column_count, diagonals, diagonal_count, q_pos, out, out_count,
    capacity, q_offset, first_block, end0, qp_sb,
    columns_sb, columns_div, columns_n, diagonals_sb, diagonals_div, diagonals_n, heads,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Per query block the columns that no diagonal of the block covers. grid: (blocks, B' * H').

    out `[B', H', blocks, columns_n]`, ascending; ROUNDS halvings find a diagonal among diagonals_n.
    """
    x = tl.program_id(0)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = tl.program_id(1) % heads
    at = b * columns_sb + h // columns_div
    columns += at * columns_n
    n = tl.load(column_count + at)
    at = b * diagonals_sb + h // diagonals_div
    diagonals += at * diagonals_n
    n_diagonals = tl.load(diagonal_count + at)
    e = end0
    if q_pos is not None:
        e = tl.load(q_pos + b * qp_sb).to(tl.int32) - q_offset
    e += (first_block + x + 1) * BLOCK
    mine = (b * heads + h) * tl.num_programs(0) + x
    out += mine * columns_n
    i = tl.arange(0, CHUNK)
    kept = 0
    for c in range(0, n, CHUNK):
        used = c + i < n
        key = tl.load(columns + c + i, mask=used, other=0)
        reach = e - key  # a diagonal d covers it when d < reach <= d + WIDTH
        lo = tl.zeros([CHUNK], tl.int32)  # diagonals with d < reach, by halving
        hi = tl.zeros([CHUNK], tl.int32) + n_diagonals
        for _ in tl.static_range(ROUNDS):
            mid = (lo + hi) // 2
            less = tl.load(diagonals + mid, mask=mid < hi, other=BIG) < reach
            lo = tl.where(less & (mid < hi), mid + 1, lo)
            hi = tl.where(less, hi, mid)
        near = tl.load(diagonals + lo - 1, mask=lo > 0, other=-BIG)
        keep = (used & (reach - near > WIDTH) & (key < capacity)).to(tl.int32)
        tl.store(out + kept + tl.cumsum(keep, 0) - 1, key, mask=keep > 0)
        kept += tl.sum(keep)
    tl.store(out_count + mine, kept)
