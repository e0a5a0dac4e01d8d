"""The best single entries of a row, exactly: short rows, and few entries of long ones; `select_entries_long.py` does others.

A short row is held in registers. Of a long one, the k best entries lie in the k blocks of best peak: each block before that
of an entry brings one entry that ranks before it, with the same rule for ties. So `block_peaks` reduces blocks of a few
entries in parallel, `choose` finds the k best blocks and then, among their entries alone, the k best. Lengths are read on
the device, lists are ascending, and nothing depends on the order in which programs run. Keys are uint32 that rank as scores
do: forced entries are `NEWEST`, what does not exist is 0.

What is computed is `scores/entries.py`; `select_entries_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .paging import NEWEST, TOP_BIT


@triton.jit
def _size(length, row, lists, groups, m):
    """Entries that exist in row number `row` of B * lists."""
    n = m
    if length is not None:
        at = (row // lists) * groups + (row % lists) * groups // lists
        n = tl.minimum(tl.load(length + at).to(tl.int32), m)
    return n


@triton.jit
def _keys(score, i, n, sink, recent, SHIFT: tl.constexpr = 15):
    """Keys of the entries i, from their scores. Whole numbers of 16 bits stand SHIFT bits up: 15, and the upper 22 bits tell
    them apart, as those of other scores of 16 bits; 0, and the range is so small that few guesses find a threshold."""
    ok = i < n
    x = tl.load(score + i, mask=ok, other=0)
    if x.dtype == tl.int16:
        key = (x.to(tl.int32) + 32769).to(tl.uint32, bitcast=True) << SHIFT
    else:
        x = x.to(tl.float32)
        x = tl.where(x == 0, 0.0, x)
        x = tl.where(x == x, x, float("-inf"))
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | TOP_BIT)).to(tl.uint32, bitcast=True)
    key = tl.where((i < sink) | (i >= n - recent), NEWEST, key)
    return tl.where(ok, key, 0)


@triton.jit(do_not_specialize=["m", "blocks"])
def block_peaks(
    score, length, peaks, m, blocks, lists, groups, sink, recent,
    WIDTH: tl.constexpr,  # entries of a block
    CHUNK: tl.constexpr,  # entries of a program
):  # fmt: skip
    """Highest key of each block. grid: (ceil(M / CHUNK), B * lists). peaks int32 `[B * lists, blocks]`, keys bit by bit."""
    row = tl.program_id(1)
    n = _size(length, row, lists, groups, m)
    first = tl.program_id(0) * CHUNK
    if first < n:
        key = _keys(score + row.to(tl.int64) * m, first + tl.arange(0, CHUNK), n, sink, recent, 0)
        top = tl.max(tl.reshape(key, [CHUNK // WIDTH, WIDTH]), 1)
        block = first // WIDTH + tl.arange(0, CHUNK // WIDTH)
        tl.store(peaks + row.to(tl.int64) * blocks + block, top.to(tl.int32, bitcast=True), mask=block < blocks)


@triton.jit(do_not_specialize=["m", "stride"])
def choose(
    source, length, listed, listed_count, out, count, m, stride, keep, lists, groups, sink, recent,
    SOURCE: tl.constexpr,  # "scores", "peaks" of blocks, or scores of the "listed" blocks
    WIDTH: tl.constexpr,  # entries of a block
    LATE: tl.constexpr,  # equal keys go to the later number
    CHUNK: tl.constexpr,  # at least the numbers there are to choose from
):  # fmt: skip
    """The `keep` best entries, or blocks, of each row. grid: (B * lists,).

    source `[B * lists, stride]`; listed int32 `[B * lists, keep]` with counts. out int32 `[B * lists, keep]`, ascending,
    padded with the row's last; count int32 `[B * lists]`. The threshold is searched as in `paging.select_pages`.
    """
    row = tl.program_id(0)
    n = _size(length, row, lists, groups, m)
    source += row.to(tl.int64) * stride
    out += row.to(tl.int64) * keep
    there = n
    i = tl.arange(0, CHUNK)
    if SOURCE == "peaks":
        there = tl.cdiv(n, WIDTH)
        key = tl.load(source + i, mask=i < there, other=0).to(tl.uint32, bitcast=True)
    else:
        if SOURCE == "listed":
            ok = i < tl.load(listed_count + row) * WIDTH
            block = tl.load(listed + row.to(tl.int64) * keep + i // WIDTH, mask=ok, other=0)
            i = tl.where(ok, block * WIDTH + i % WIDTH, n)
        key = _keys(source, i, n, sink, recent, 0)
    k = tl.minimum(keep, there)
    low = tl.min(tl.where(key > 0, key, NEWEST))
    high = tl.max(tl.where(key == NEWEST, 0, key))  # of those that are not forced
    forced = tl.sum((key == NEWEST).to(tl.int32))
    low = tl.where(k > forced, low, NEWEST)
    high = tl.where(k > forced, tl.where(k < there, high, low), NEWEST)
    while low < high:  # at least k keys reach low, fewer than k lie above high: cut what is between in three
        third = (high - low) // 3
        a = low + third + 1
        z = high - third
        reach = tl.sum((key >= a).to(tl.int32) | ((key >= z).to(tl.int32) << 16))
        reach_a = reach & 0xFFFF
        reach_z = reach >> 16
        below = tl.where(reach_a > k, z - 1, tl.where(reach_a == k, a, a - 1))  # exactly k reach it: the search is over
        high = tl.where(reach_z > k, high, tl.where(reach_z == k, z, below))
        low = tl.where(reach_z >= k, z, tl.where(reach_a >= k, a, low))
    better = key > low
    tied = (key == low) & (key > 0)
    both = tl.cumsum((better.to(tl.int32) << 16) | tied.to(tl.int32), 0)  # two sums in one; CHUNK is below 1 << 15
    room = k - tl.sum(better.to(tl.int32))
    rank = both & 0xFFFF
    if LATE:
        rank += room - tl.sum(tied.to(tl.int32))
    take = better | (tied & (rank > 0) & (rank <= room))
    slot = (both >> 16) + tl.minimum(tl.maximum(rank, 0), room) - 1
    tl.store(out + slot, i, mask=take)
    for c in range(k, keep, 128):  # a row of fewer numbers than `keep` gives all it has
        j = c + tl.arange(0, 128)
        tl.store(out + j, tl.zeros([128], tl.int32) + tl.maximum(there - 1, 0), mask=j < keep)
    tl.store(count + row, k)
