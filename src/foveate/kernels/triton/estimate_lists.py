"""Lists of key blocks, one program a row of query blocks, and tiles that cover a list of distances.

Rows are held whole; `select.py` says what is chosen and `lists.py` what a list is. `estimate_launch.py` calls these
kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .estimate_select import FORCED, fraction, order, room_at, settled


@triton.jit
def _pack(chosen, j, out, width, scale, PAD: tl.constexpr):
    """Store the chosen numbers times `scale`, ascending, padded up to `width` with the last (0 if none); their count."""
    rank = tl.cumsum(chosen.to(tl.int32), 0)
    total = tl.sum(chosen.to(tl.int32))
    newest = tl.max(tl.where(chosen, j, 0))
    tl.store(out + rank - 1, j * scale, mask=chosen)
    for c in range(total, width, PAD):
        slot = c + tl.arange(0, PAD)
        tl.store(out + slot, newest * scale + tl.zeros([PAD], tl.int32), mask=slot < width)
    return total


@triton.jit(do_not_specialize=["nq", "nk", "first", "width", "p"])
def choose(
    score, keep, tiles, count, p, nq, nk, first, width, scale, sink,
    MASS: tl.constexpr, EVERY: tl.constexpr, DIAGONAL: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The best causal key blocks of each row of query blocks. grid: (nq, lists).

    score fp32 `[lists, nq, nk]`; row r sees blocks up to first + r. The first `sink` blocks, and with DIAGONAL the last
    visible one, are always in and count. top-k: keep int32 `[lists]`. MASS: the smallest set with a share of the row's
    mass, whose bits are p (all with EVERY). tiles int32 `[lists, nq, width]` of block numbers times `scale`, count int32
    `[lists, nq]`. The threshold is found bit by bit in registers.
    """
    r = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * nq + r
    n = tl.minimum(nk, first + r + 1)
    j = tl.arange(0, N)
    x = tl.load(score + row * nk + j, mask=j < n, other=float("-inf"))
    must = (j < n) & (j < sink)
    if DIAGONAL:
        must = must | (j == n - 1)
    key = tl.where(must, FORCED, order(x))
    key = tl.where(j < n, key, 0)
    if MASS:
        weight = tl.where(x > 0, x, 0.0).to(tl.float64)
        goal = fraction(p) * tl.sum(weight)
    else:
        weight = (j < n).to(tl.int32)
        goal = tl.minimum(tl.maximum(tl.load(keep + tl.program_id(1)), tl.sum(must.to(tl.int32))), n)
    edge = tl.zeros([], tl.uint32)
    bit = edge + 0x80000000
    while bit > 0:
        trial = edge | bit
        reach = tl.sum(tl.where(key >= trial, weight, 0))
        edge = tl.where(reach >= goal, trial, edge)
        bit = bit >> 1
    above = tl.sum(tl.where(key > edge, weight, 0))
    if MASS:
        room = room_at(edge, above, goal)
    else:
        room = goal - above
    tied = (key == edge) & (j < n) & (must == 0)
    chosen = must | (key > edge) | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    if EVERY:
        chosen = j < n
    tl.store(count + row, _pack(chosen, j, tiles + row * width, width, scale, N))


@triton.jit(do_not_specialize=["nq", "nk", "chunks"])
def count_ties(
    prob, live, part, edges, aboves, targets, ties, heads, nq, nk, chunks, N: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Entries of each row that equal their head's threshold; 0 for heads that are not live. grid: (nq, heads).

    prob fp32 `[heads, nq, nk]`, searched as heads rows of nq * nk by `narrow`; ties int32 `[heads, nq]`.
    """
    h = tl.program_id(1)
    row = h.to(tl.int64) * nq + tl.program_id(0)
    if tl.load(live + h) == 0:
        tl.store(ties + row, 0)
        return
    edge, above, target = settled(
        part, edges, aboves, targets, h, heads, chunks, 8 + h * 0, 0.0, ties, ties, nk, True, CHUNKS
    )
    j = tl.arange(0, N)
    key = order(tl.load(prob + row * nk + j, mask=j < nk, other=0.0))
    tl.store(ties + row, tl.sum(((key == edge) & (j < nk)).to(tl.int32)))


@triton.jit(do_not_specialize=["nq", "nk", "first", "width", "chunks"])
def unite(
    columns, diagonals, live, prob, part, edges, aboves, targets, ties, tiles, count,
    heads, nq, nk, first, width, scale, chunks,
    GROUP: tl.constexpr, PAIRS: tl.constexpr, EVERY: tl.constexpr, N: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Union of block columns, block diagonals and, for live heads, the best pairs. grid: (nq, lists).

    columns, diagonals int8 `[heads, nk]`, by block and by distance in blocks, for GROUP heads a list. prob and the
    threshold as in `count_ties`; ties int32 `[heads, nq]`: entries up to and including a row that equal the threshold, of
    which the first ones of a head are taken. EVERY takes all pairs of live heads.
    """
    r = tl.program_id(0)
    n = tl.minimum(nk, first + r + 1)
    j = tl.arange(0, N)
    chosen = j < 0
    for e in tl.static_range(GROUP):
        h = tl.program_id(1) * GROUP + e
        col = tl.load(columns + h * nk + j, mask=j < n, other=0)
        gap = first + r - j
        diag = tl.load(diagonals + h * nk + gap, mask=(j < n) & (gap < nk), other=0)
        chosen = chosen | (col != 0) | (diag != 0)
        if PAIRS:  # noqa: SIM102
            if tl.load(live + h) != 0:
                if EVERY:
                    chosen = chosen | (j < n)
                else:
                    edge, above, target = settled(
                        part, edges, aboves, targets, h, heads, chunks, 8 + h * 0, 0.0, ties, ties, nk, True, CHUNKS
                    )
                    row = h.to(tl.int64) * nq + r
                    key = order(tl.load(prob + row * nk + j, mask=j < n, other=0.0))
                    key = tl.where(j < n, key, 0)
                    tied = (key == edge) & (j < n)
                    rank = tl.cumsum(tied.to(tl.int32), 0)
                    before = tl.load(ties + row) - tl.max(rank)
                    chosen = chosen | (key > edge) | (tied & (before + rank <= room_at(edge, above, target)))
    at = tl.program_id(1).to(tl.int64) * nq + r
    tl.store(count + at, _pack(chosen & (j < n), j, tiles + at * width, width, scale, N))


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["width"])
def merge_tiles(
    distance, count, tiles, tile_count, width, REACH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """`lists.merge_diagonals` of ascending, different distances: int32 `[rows, width]` in and out. grid: (rows,).

    A distance d covers d .. d + REACH - 1. A run of covered places is cut into tiles of TILE >= REACH from its near end, so
    that what a distance adds to its run holds the start of one tile at most: there are never more tiles than distances.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.load(count + row)
    distance += row * width
    tiles += row * width
    kept = 0
    began = -1
    final = 0
    for c in range(0, n, CHUNK):
        i = c + tl.arange(0, CHUNK)
        d = tl.load(distance + i, mask=i < n, other=0)
        before = tl.load(distance + i - 1, mask=(i > 0) & (i < n), other=-REACH - 1)
        begins = (d > before + REACH) & (i < n)
        run = tl.associative_scan(tl.where(begins, d, -1), 0, _later)
        run = tl.maximum(run, began)
        new = tl.where(begins, d, before + REACH)  # first place that this distance adds
        start = run + (new - run + TILE - 1) // TILE * TILE
        chosen = (start < d + REACH) & (i < n)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(tiles + kept + rank - 1, start, mask=chosen)
        final = tl.maximum(final, tl.max(tl.where(chosen, start, 0)))
        kept += tl.sum(chosen.to(tl.int32))
        began = tl.max(run)
    for c in range(kept, width, CHUNK):
        i = c + tl.arange(0, CHUNK)
        tl.store(tiles + i, final + tl.zeros([CHUNK], tl.int32), mask=i < width)
    tl.store(tile_count + row, kept)
