"""The best single entries of long rows, exactly, in two launches: list the few that may be among them, choose among those.

A sample of a row, one entry of each of as many equal stretches, says which score a little more than `keep` entries should
reach: the bound. Its place in a stretch is scattered, so whatever the order of the scores, the number of entries that reach
a given score varies in the sample no more than in one drawn at random. `list_entries` lists what reaches the bound, part by
part; all programs of a row find the same bound. `select_entries_listed.py` chooses among what is listed, or if fewer than
`keep` reach the bound, or a list overflows, among the whole row: slow and exact. Nothing depends on the order of programs,
nothing waits.

Odds of a row that has to be gone through: if a sample should hold s of the `keep` best, the bound is what s + 4 sqrt(s) + 5
of the sample reach. A Poisson number exceeds that 3 times in 100,000 at worst (s above 1,000), once in 100,000 at s 64.

What is computed is `scores/entries.py`; `select_entries_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .paging import NEWEST
from .select_entries import _guesses, _key, _keys, _narrow, _reach, _size


@triton.jit
def _bound(score, n, k, sink, recent, SAMPLE: tl.constexpr):
    """A key that most probably k of the row's n entries reach, and not many more. 0 < n."""
    GROUPS: tl.constexpr = SAMPLE // 32
    width = tl.cdiv(n, SAMPLE)
    i = tl.arange(0, SAMPLE)
    mixed = i.to(tl.uint32, bitcast=True) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    mixed = (mixed ^ (mixed >> 13)) >> 16
    place = ((mixed * width.to(tl.uint32)) >> 16).to(tl.int32)  # below width, which is below 1 << 16
    stretch = i // 32 + (i % 32) * GROUPS  # 32 numbers side by side, a warp's, come from all over the row
    key = _keys(score, stretch * width + place, n, sink, recent)
    share = k.to(tl.float32) / width
    want = tl.where(width > 1, share + 4.0 * tl.sqrt(share) + 5.0, k.to(tl.float32)).to(tl.int32)
    both = tl.sum((key > 0).to(tl.int32) | ((key == NEWEST).to(tl.int32) << 16))
    peak = tl.min(tl.max(tl.reshape(key, [GROUPS, 32]), 1))  # at least one of each group reaches it
    low = tl.where(want <= GROUPS, tl.maximum(peak, 1), 1)
    high = tl.max(tl.where(key == NEWEST, 0, key))  # of those that are not forced
    low = tl.where((both >> 16) >= want, NEWEST, low)
    if (k >= n) | (want >= (both & 0xFFFF)):
        low = tl.full([], 1, tl.uint32)
        high = low
    while low < high:
        a, z = _guesses(low, high)
        reach = _reach(key, a, z)
        low, high = _narrow(low, high, a, z, reach & 0xFFFF, reach >> 16, want, want // 16)
    return low


@triton.jit
def _level(score, bound):
    """What a score has to reach for its key to reach the bound; whether all scores do."""
    if score.dtype.element_ty == tl.int16:
        level = tl.where(bound == NEWEST, 1 << 16, bound.to(tl.int32, bitcast=True) - 32769)
        everything = bound <= 1
    else:
        bits = tl.where(bound >= 0x80000000, bound ^ 0x80000000, bound ^ NEWEST)
        level = bits.to(tl.float32, bitcast=True)  # of NEWEST a NaN, which nothing reaches
        everything = bound <= 0x007FFFFF  # the key of -inf, which a NaN ranks as
    return level, everything


@triton.jit
def _below(count):
    """uint32 with the lowest `count` bits set: none below 0, all above 32."""
    some = tl.full(count.shape, 1, tl.uint32) << tl.minimum(tl.maximum(count, 0), 31).to(tl.uint32)
    return tl.where(count > 31, NEWEST, some - 1)


@triton.jit
def _fetch(score, at, stop, m, STEP: tl.constexpr):
    """Scores of STEP entries from `at` on, 32 a line. The mask knows nothing of lengths, which leaves loads of 16 bytes."""
    i = at + tl.arange(0, STEP // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    return tl.load(score + i, mask=i < tl.where(at < stop, m, 0), other=0)


@triton.jit
def _mark(x, score, bits, at, stop, m, n, sink, recent, bound, STEP: tl.constexpr):
    """Write a bit for each entry from `at` to `stop`, whether its key reaches the bound. x: `_fetch` of the first ones.

    bits uint32: that of the entries 32 w .. 32 w + 31 at place w.
    """
    level, everything = _level(score, bound)
    line = tl.arange(0, STEP // 32)
    j = tl.arange(0, 32)[None, :]
    weight = tl.full([1, 32], 1, tl.uint32) << j.to(tl.uint32)
    while at < stop:
        following = _fetch(score, at + STEP, stop, m, STEP)
        if x.dtype == tl.int16:
            reach = x.to(tl.int32) >= level
        else:
            reach = x.to(tl.float32) >= level
        word = tl.sum(tl.where(reach, weight, 0), 1)
        word = tl.where(everything, NEWEST, word)  # all bits
        if (at < sink) | (at + STEP > n - recent):
            i = at + line * 32
            word = (word | _below(sink - i) | (_below(n - recent - i) ^ NEWEST)) & _below(n - i)
        tl.store(bits + at // 32 + line, word)
        x = following
        at += STEP


@triton.jit
def _ones(word):
    """How many bits are set in each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["parts", "keep", "one"])
def list_entries(
    score, length, bounds, sizes, spots, keys, bits, m, parts, keep, region, one, lists, groups, sink, recent,
    LATE: tl.constexpr,  # of equal keys the later entries are listed
    SAMPLE: tl.constexpr,
    PART: tl.constexpr,  # entries of a part, at most 1 << 15
    STEP: tl.constexpr,  # entries that are looked at together
    EARLY: tl.constexpr,  # whether `choose_listed` is launched so that it may start, and wait, while this runs
):  # fmt: skip
    """List what reaches the bound, part by part. grid: (parts = ceil(M / PART), B * lists).

    score `[B * lists, M]`. bounds int32 `[B * lists]`; sizes int32 `[B * lists, parts]`, entries listed; spots int16
    `[B * lists, parts, region]`, these counted from the start of the part, ascending; keys uint32 of the same shape, theirs,
    then zeros up to a multiple of 4; bits uint32 `[B * lists, parts, 2, PART / 32]`, scratch. A part with many lists all
    above the bound and of those at it the first, or the last, `keep` and up to 31 others; if there is no room for these, it
    says how many there were. Parts beyond a row's length keep what was there. region: a multiple of 4.
    one: 1, which the compiler must not know: words that lie side by side are then read by threads side by side, which write
    their entries without moving them first.
    """
    WORDS: tl.constexpr = PART // 32
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    n = _size(length, row, lists, groups, m)
    first = tl.program_id(0) * PART
    if first < n:
        score += row.to(tl.int64) * m
        stop = tl.minimum(first + PART, n)
        x = _fetch(score, first, stop, m, STEP)  # on its way while the bound is found
        bound = _bound(score, n, tl.minimum(keep, n), sink, recent, SAMPLE)
        if first == 0:
            tl.store(bounds + row, bound.to(tl.int32, bitcast=True))
        place = row.to(tl.int64) * parts + tl.program_id(0)
        bits += place * (2 * WORDS)
        _mark(x, score, bits - first // 32, first, stop, m, n, sink, recent, bound, STEP)
        tl.debug_barrier()  # a word is read by another thread than wrote it
        w = tl.arange(0, WORDS)
        word = tl.load(bits + w * one, mask=first + w * 32 < n, other=0)
        have = _ones(word)
        size = tl.sum(have, 0)
        if size > tl.minimum(region, keep + 64):  # all of one score, most likely
            x = _fetch(score, first, stop, m, STEP)
            _mark(x, score, bits + WORDS - first // 32, first, stop, m, n, sink, recent, bound + 1, STEP)
            tl.debug_barrier()
            better = tl.load(bits + WORDS + w * one, mask=first + w * 32 < n, other=0)
            tied = word ^ better
            ties = _ones(tied)
            before = tl.cumsum(ties, 0) - ties
            if LATE:
                before = tl.sum(ties, 0) - ties - before
            word = better | tl.where(before < keep, tied, 0)
            have = _ones(word)
            size = tl.sum(have, 0)
        spots += place * region
        keys += place * region
        pad = size + tl.arange(0, 4)
        tl.store(keys + pad, tl.zeros([4], tl.uint32), mask=(pad < region) & (pad < (size + 3) // 4 * 4))
        slot = tl.cumsum(have, 0) - have
        left = tl.max(have, 0)
        i = w * 32 + _lowest(word)
        x = tl.load(score + first + i, mask=word > 0, other=0)
        while left > 0:
            rest = word & (word - 1)
            following = w * 32 + _lowest(rest)
            y = tl.load(score + first + following, mask=rest > 0, other=0)  # on its way while the one before is written
            here = (word > 0) & (slot < region)
            tl.store(spots + slot, i.to(tl.int16), mask=here)
            tl.store(keys + slot, _key(x, first + i, n, sink, recent), mask=here)
            word, i, x = rest, following, y
            slot += 1
            left -= 1
        tl.store(sizes + place, size)


@triton.jit
def _lowest(word):
    """Number of the lowest bit that is set: the exponent of what it stands for. -127 without one."""
    bit = word & ((word ^ NEWEST) + 1)
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
