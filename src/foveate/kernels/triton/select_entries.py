"""The best single entries of a short row, exactly, in one program; `select_entries_long.py` does long rows.

A threshold that `keep` entries reach is searched among keys held in registers, and a prefix sum packs what lies above it and
the first that tie with it. Lengths are read on the device, lists are ascending. Keys are uint32 that rank as scores do:
forced entries are `NEWEST`, what does not exist is 0.

What is computed is `scores/entries.py`; `select_entries_launch.py` calls this kernel.
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
def _key(x, i, n, sink, recent):
    """Keys of the entries i, from their scores x."""
    if x.dtype == tl.int16:  # a range so small that few guesses find a threshold
        key = (x.to(tl.int32) + 32769).to(tl.uint32, bitcast=True)
    else:
        x = x.to(tl.float32)
        x = tl.where(x == 0, 0.0, x)
        x = tl.where(x == x, x, float("-inf"))
        bits = x.to(tl.int32, bitcast=True)
        key = (bits ^ ((bits >> 31) | TOP_BIT)).to(tl.uint32, bitcast=True)
    key = tl.where((i < sink) | (i >= n - recent), NEWEST, key)
    return tl.where(i < n, key, 0)


@triton.jit
def _keys(score, i, n, sink, recent):
    return _key(tl.load(score + i, mask=i < n, other=0), i, n, sink, recent)


@triton.jit
def _guesses(low, high):
    """Two keys that cut what lies above low and not above high in three."""
    third = (high - low) // 3
    return low + third + 1, high - third


@triton.jit
def _narrow(low, high, a, z, reach_a, reach_z, k, slack):
    """(low, high) once it is known how many keys reach the guesses. At least k reach low, fewer than k lie above high;
    they meet where at most k + slack reach low."""
    below = tl.where(reach_a > k + slack, z - 1, tl.where(reach_a >= k, a, a - 1))
    high = tl.where(reach_z > k + slack, high, tl.where(reach_z >= k, z, below))
    return tl.where(reach_z >= k, z, tl.where(reach_a >= k, a, low)), high


@triton.jit
def _reach(key, a, z):
    """How many keys reach each guess, in the lower and the upper 16 bits. Fewer than 1 << 15 keys."""
    return tl.sum((key >= a).to(tl.int32) | ((key >= z).to(tl.int32) << 16))


@triton.jit
def choose(
    score, length, out, count, m, keep, lists, groups, sink, recent,
    LATE: tl.constexpr,  # equal keys go to the later entry
    CHUNK: tl.constexpr,  # at least m
):  # fmt: skip
    """The `keep` best entries of each row. grid: (B * lists,).

    score `[B * lists, m]`. out int32 `[B * lists, keep]`, ascending, padded with the row's last; count int32 `[B * lists]`.
    """
    row = tl.program_id(0)
    n = _size(length, row, lists, groups, m)
    out += row.to(tl.int64) * keep
    i = tl.arange(0, CHUNK)
    key = _key(tl.load(score + row.to(tl.int64) * m + i, mask=i < m, other=0), i, n, sink, recent)  # 16 bytes a load
    k = tl.minimum(keep, n)
    low = tl.min(tl.where(key > 0, key, NEWEST))
    high = tl.max(tl.where(key == NEWEST, 0, key))  # of those that are not forced
    forced = tl.sum((key == NEWEST).to(tl.int32))
    low = tl.where(k > forced, low, NEWEST)
    high = tl.where(k > forced, tl.where(k < n, high, low), NEWEST)
    while low < high:
        a, z = _guesses(low, high)
        reach = _reach(key, a, z)
        low, high = _narrow(low, high, a, z, reach & 0xFFFF, reach >> 16, k, 0)
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
    _pad(out, k, keep, n)
    tl.store(count + row, k)


@triton.jit
def _pad(out, k, keep, n):
    """A row of fewer entries than `keep` gives all it has, so its last is n - 1."""
    for c in range(k, keep, 128):
        j = c + tl.arange(0, 128)
        tl.store(out + j, tl.zeros([128], tl.int32) + tl.maximum(n - 1, 0), mask=j < keep)
