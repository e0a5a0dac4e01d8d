"""The second launch of long rows: choose among what `list_entries` of `select_entries_long.py` listed, one program a row.

One multiprocessor does this, so what counts is instructions a key. Entries lie in lines of 4, which a thread reads at once,
and a part's list begins with a line of its own: which part an entry is of is looked up once a line. The threshold is
searched with two guesses a round, where the numbers of keys so far say that it should be, and now and then at the thirds,
which bounds the rounds whatever the keys: 5 or 6 rounds for normal scores where thirds alone take 8 or 9.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .paging import NEWEST
from .select_entries import _guesses, _keys, _pad, _reach, _size

LINE = tl.constexpr(4)  # entries that a thread reads at once


@triton.jit(do_not_specialize=["parts", "keep"])
def choose_listed(
    score, length, bounds, sizes, spots, keys, out, count, m, parts, keep, region, lists, groups, sink, recent,
    LATE: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr,  # at least parts, a power of two
    HELD: tl.constexpr,  # numbers held at once, below 1 << 15; more are read in every round of the search
    EARLY: tl.constexpr,  # as in `list_entries`
):  # fmt: skip
    """The `keep` best entries of each row from what `list_entries` left. grid: (B * lists,).

    out int32 `[B * lists, keep]`, ascending, padded with the row's last; count int32 `[B * lists]`.
    """
    row = tl.program_id(0)
    c = tl.arange(0, PARTS)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    size = tl.load(sizes + row.to(tl.int64) * parts + c, mask=c < parts, other=0)  # waits for no length
    low = tl.load(bounds + row).to(tl.uint32, bitcast=True)
    n = _size(length, row, lists, groups, m)
    k = tl.minimum(keep, n)
    score += row.to(tl.int64) * m
    out += row.to(tl.int64) * keep
    spots += row.to(tl.int64) * parts * region
    keys += row.to(tl.int64) * parts * region
    size = tl.where(c * PART < n, size, 0)
    lines = (size + LINE - 1) // LINE
    start = tl.cumsum(lines, 0) - lines
    total = tl.sum(lines, 0)
    reach = tl.sum(size, 0)  # keys that reach low
    listed = (reach >= k) & (tl.max(size, 0) <= region)
    if not listed:
        total = tl.cdiv(n, LINE)
        reach = n
        low = tl.full([], 1, tl.uint32)
    above = tl.minimum(sink + recent, n)  # keys above high: those that are forced
    if above >= k:
        low = tl.full([], NEWEST, tl.uint32)
        reach = above
        above = 0
    turn = 0
    if listed & (total * LINE <= HELD):
        spot, x, key = _listed(spots, keys, start, 0, total, region, HELD, PART, PARTS)
        high = tl.max(key + 1) - 1  # of those that are not forced, which become 0
        while (low < high) & (reach > k):
            a, z = _next_guesses(low, high, reach, above, k, turn)
            found = _reach(key, a, z)
            low, high, reach, above = _between(low, high, reach, above, a, z, found & 0xFFFF, found >> 16, k)
            turn += 1
        if reach > k:
            key, _ = _first_ties(key, low, k - above, reach - above, 0, LATE)
        _write(out, spot, x, key, low, 0)
    elif n > 0:  # more than is held, or the row itself
        high = tl.full([], NEWEST - 1, tl.uint32)
        while (low < high) & (reach > k):
            a, z = _next_guesses(low, high, reach, above, k, turn)
            reach_a = 0
            reach_z = 0
            for first in range(0, total, HELD // LINE):
                _, _, key = _piece(
                    score, spots, keys, start, first, total, n, sink, recent, region, listed, HELD, PART, PARTS
                )
                found = _reach(key, a, z)
                reach_a += found & 0xFFFF
                reach_z += found >> 16
            low, high, reach, above = _between(low, high, reach, above, a, z, reach_a, reach_z, k)
            turn += 1
        kept = 0
        seen = 0
        for first in range(0, total, HELD // LINE):
            spot, x, key = _piece(
                score, spots, keys, start, first, total, n, sink, recent, region, listed, HELD, PART, PARTS
            )
            key, seen = _first_ties(key, low, k - above, reach - above, seen, LATE)
            kept += _write(out, spot, x, key, low, kept)
    _pad(out, k, keep, n)
    tl.store(count + row, k)


@triton.jit
def _next_guesses(low, high, reach, above, k, turn):
    """Two keys, a <= z, that cut what lies above low and not above high. low < high.

    reach keys reach low, more than k; above lie above high, fewer than k. Were the others spread evenly, the k-th would be
    about where the guesses are. They are denser at low when the search begins, as scores are in the tail of most rows.
    """
    root = tl.rsqrt((reach - above).to(tl.float32))
    share = (reach - k).to(tl.float32) * root * root
    share_a = tl.where(turn == 0, 0.15 * share, tl.maximum(0.9 * share - 0.15 * root, 0.0))
    share_z = tl.where(turn == 0, 0.4 * share, tl.minimum(share + 0.15 * root, 1.0))
    steps = high - low - 1
    a = tl.minimum((share_a * steps.to(tl.float32)).to(tl.uint32), steps)
    z = tl.minimum((share_z * steps.to(tl.float32)).to(tl.uint32), steps)
    a, z = low + 1 + a, low + 1 + tl.maximum(a, z)
    third_a, third_z = _guesses(low, high)
    even = turn % 5 == 4
    return tl.where(even, third_a, a), tl.where(even, third_z, z)


@triton.jit
def _between(low, high, reach, above, a, z, reach_a, reach_z, k):
    """(low, high, keys that reach low, keys above high) once it is known how many keys reach the guesses.

    At least k reach low, fewer than k lie above high. The search ends where they meet, or k reach low.
    """
    up = reach_z >= k
    middle = reach_a >= k
    high = tl.where(up, high, tl.where(middle, z, a) - 1)
    above = tl.where(up, above, tl.where(middle, reach_z, reach_a))
    low = tl.where(up, z, tl.where(middle, a, low))
    return low, high, tl.where(up, reach_z, tl.where(middle, reach_a, reach)), above


@triton.jit
def _before(x):
    """Sums of all that come before each of x `[LINES]`: within a warp's 32, then over these, which are few."""
    ours = tl.reshape(x, [x.shape[0] // 32, 32])
    sums = tl.sum(ours, 1)
    return tl.reshape((tl.cumsum(sums, 0) - sums)[:, None] + tl.cumsum(ours, 1) - ours, [x.shape[0]])


@triton.jit
def _first_ties(key, low, room, ties, seen, LATE: tl.constexpr):
    """(keys of a piece, 0 for those at low beyond the first, or the last, `room` of `ties`; seen and those at low).

    seen: how many earlier pieces had.
    """
    tied = (key == low).to(tl.int32)
    line = tl.sum(tied, 1)
    rank = seen + _before(line)[:, None] + tl.cumsum(tied, 1)
    if LATE:
        rank += room - ties
    out = (tied > 0) & ((rank <= 0) | (rank > room))
    return tl.where(out, 0, key), seen + tl.sum(line, 0)


@triton.jit
def _write(out, spot, x, key, low, kept):
    """Write the entries spot + x of a piece whose keys reach low, after the `kept` of earlier pieces; how many there are."""
    take = (key >= low).to(tl.int32)
    line = tl.sum(take, 1)
    slot = kept + _before(line)[:, None] + tl.cumsum(take, 1) - 1
    # The mask is not `take`, of which every key's would be held in a register; low is 1 or more.
    tl.store(out + slot, spot[:, None] + x, mask=key > low - 1)
    return tl.sum(line, 0)


@triton.jit
def _listed(spots, keys, start, first, total, region, HELD: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """HELD of those listed, from line number `first` on: (starts of their parts `[HELD / LINE]`, entries counted from there
    int16 `[HELD / LINE, LINE]`, their keys, 0 for what is not there).

    start `[PARTS]`: the first line of each part, ascending. In every row of a matrix, so that a warp finds what it looks up
    in its own registers.
    """
    LINES: tl.constexpr = HELD // LINE
    row = tl.arange(0, LINES // PARTS)[:, None]
    line = first + row * PARTS + tl.arange(0, PARTS)[None, :]
    starts = tl.broadcast_to(start[None, :], [LINES // PARTS, PARTS])
    part = tl.zeros([LINES // PARTS, PARTS], tl.int32)
    step = PARTS // 2
    while step > 0:  # the last part that starts at this line or before
        middle = part + step
        part = tl.where(tl.gather(starts, middle, 1) <= line, middle, part)
        step = step // 2
    base = tl.reshape(part * (region // LINE) + line - tl.gather(starts, part, 1), [LINES])
    part = tl.reshape(part, [LINES])
    at = base[:, None] * LINE + tl.arange(0, LINE)[None, :]
    there = (first + tl.arange(0, LINES) < total)[:, None]
    key = tl.load(keys + at, mask=there, other=0)
    return part * PART, tl.load(spots + at, mask=there, other=0), key


@triton.jit
def _piece(score, spots, keys, start, first, total, n, sink, recent, region, listed, HELD: tl.constexpr,
           PART: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """What `_listed` gives, or if not `listed` the same of all the row's entries."""
    if listed:
        spot, x, key = _listed(spots, keys, start, first, total, region, HELD, PART, PARTS)
    else:
        spot = (first + tl.arange(0, HELD // LINE)) * LINE
        x = tl.zeros([HELD // LINE, LINE], tl.int16) + tl.arange(0, LINE)[None, :].to(tl.int16)
        key = _keys(score, spot[:, None] + x, n, sink, recent)
    return spot, x, key
