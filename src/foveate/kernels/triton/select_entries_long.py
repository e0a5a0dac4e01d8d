"""The best single entries of long rows, exactly, by the digits of their keys: many programs share a row, none waits.

A key (uint32, `select_entries._keys`) has digits of 11, 11 and 10 bits. Three launches of `count_digit` find those of the
k-th best key one after the other: programs count the digits of their own keys in shared memory and add them to the row's
bins, and the next launch walks the bins from the top. The search is over once all keys that share the digits so far are
wanted. The last launch also notes what each chunk of a row has, so that `write_chunks` knows where a chunk's entries go.
Sums of integers do not depend on the order of programs, and lists are ascending.

What is computed is `scores/entries.py`; `select_entries_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .select_entries import _keys, _size

BINS = tl.constexpr(2048)
LAST = tl.constexpr(1024)  # of the third digit
PER = tl.constexpr(16)  # keys a thread


def _shared_counts(per: int, bins: int) -> str:
    """PTX that counts digits ($per..) in shared memory and reads the bins at places ($2 per..) into $0.. on.

    Triton's own histogram of 2,048 bins takes over 200 instructions for 32 keys; this adds once a key.
    """
    at = lambda name: f"setp.lt.u32 here, {name}, {bins}; mad.lo.u32 at, {name}, 4, base;"  # noqa: E731
    digits, places = ([f"${per * part + j}" for j in range(per)] for part in (1, 2))
    lines = [f".shared .align 4 .b32 bins[{bins}];", ".reg .pred here;", ".reg .b32 base, at;", "mov.u32 base, bins;"]
    lines += [f"{at(p)} @here st.shared.b32 [at], 0;" for p in places]
    lines += ["bar.sync 0;"]
    lines += [f"{at(d)} @here red.shared.add.u32 [at], 1;" for d in digits]
    lines += ["bar.sync 0;"]
    lines += [f"{at(p)} mov.b32 ${j}, 0; @here ld.shared.b32 ${j}, [at];" for j, p in enumerate(places)]
    return "\n".join(["{", *lines, "}"])


COUNTS = tl.constexpr(_shared_counts(PER.value, BINS.value))
REGISTERS = tl.constexpr(",".join(["=&r"] * PER.value + ["r"] * 2 * PER.value))


@triton.jit
def _walk(bins, want):
    """(the bin, from the top, in which `want` keys are reached; keys above it; keys in it). bins int32 `[BINS]`."""
    place = tl.arange(0, BINS)
    count = tl.load(bins + (place ^ (BINS - 1)))
    reach = tl.cumsum(count, 0)
    short = reach < want
    above = tl.max(tl.where(short, reach, 0), 0)
    passed = tl.minimum(tl.sum(short.to(tl.int32), 0), BINS - 1)
    inside = tl.sum(tl.where(place == passed, count, 0), 0)
    return passed ^ (BINS - 1), above, inside


@triton.jit
def _edge(bins, state, k, STAGE: tl.constexpr, WIDE: tl.constexpr):
    """What is known when STAGE digits are counted: (the digits; how many bits follow them; keys above; keys with them).

    bins int32 `[3, BINS]` of a row; state int32 `[2, 4]`, what was known after one and two digits.
    """
    if STAGE == 1:
        digits, above, inside = _walk(bins, k)
        rest = tl.full([], 21, tl.int32)
    else:
        known = state + (STAGE - 2) * 4
        digits = tl.load(known)
        rest = tl.load(known + 1)
        above = tl.load(known + 2)
        inside = tl.load(known + 3)
        more_digits = above + inside > k  # else all of these keys are wanted, and no digit was counted since
        if STAGE == 3:
            more_digits &= WIDE
        if more_digits:
            digit, more, inside_now = _walk(bins + (STAGE - 1) * BINS, k - above)
            width: tl.constexpr = 11 if STAGE == 2 else 10
            digits = (digits << width) | digit
            rest = rest - width
            above += more
            inside = inside_now
    return digits, rest, above, inside


@triton.jit
def _sides(key, digits, rest):
    """(keys above the edge, keys at it)."""
    part = key >> rest.to(tl.uint32)
    digits = digits.to(tl.uint32, bitcast=True)
    return (part > digits) & (key > 0), (part == digits) & (key > 0)


@triton.jit
def _count(digit, alike, CHUNK: tl.constexpr, SHARED: tl.constexpr):
    """(bins, how many keys each has), the bins from 0 on and perhaps more than BINS, which have none."""
    if SHARED:
        place = tl.arange(0, CHUNK)
        digit = tl.where(alike, digit, BINS)
        count = tl.inline_asm_elementwise(COUNTS, REGISTERS, [digit, place], dtype=tl.int32, is_pure=False, pack=PER)
    else:
        place = tl.arange(0, BINS)
        count = tl.histogram(digit, BINS, mask=alike)
    return place, count


@triton.jit(do_not_specialize=["m", "chunks"])
def count_digit(
    score, length, bins, state, has, lead, m, chunks, keep, lists, groups, sink, recent,
    STAGE: tl.constexpr,  # digits that are known
    WIDE: tl.constexpr,  # scores of 32 bits; keys of others differ in two digits
    CHUNK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Count digit STAGE of the keys that share the digits before it. grid: (chunks = ceil(M / CHUNK), B * lists).

    score `[B * lists, M]`; bins int32 `[B * lists, 3, BINS]`, zero before the first stage; state int32 `[B * lists, 2, 4]`.
    The last stage writes has int32 `[B * lists, chunks]`, keys above two digits << 16 | keys with them, and lead int16
    `[B * lists, chunks, 2, LAST]`, of the latter those whose third is LAST - 1 - i, or at least that, if the search goes on.
    SHARED counts by PTX (PER keys a thread, CHUNK at least BINS), else Triton's histogram does.
    """
    row = tl.program_id(1)
    n = _size(length, row, lists, groups, m)
    first = tl.program_id(0) * CHUNK
    bins += row.to(tl.int64) * (3 * BINS)
    state += row.to(tl.int64) * 8
    k = tl.minimum(keep, n)
    key = _keys(score + row.to(tl.int64) * m, first + tl.arange(0, CHUNK), n, sink, recent)
    left = first < n
    alike = key > 0
    digit = key >> 21
    if STAGE > 0:
        digits, rest, above, inside = _edge(bins, state, k, STAGE, WIDE)
        if tl.program_id(0) == 0:
            known = state + (STAGE - 1) * 4
            tl.store(known, digits)
            tl.store(known + 1, rest)
            tl.store(known + 2, above)
            tl.store(known + 3, inside)
        left = left & (above + inside > k)
        better, alike = _sides(key, digits, rest)
        digit = (key >> 10) & (BINS - 1)
        if STAGE == 2:
            digit = (key & (LAST - 1)) ^ (LAST - 1)  # from the top, for `lead`
            chunk = row.to(tl.int64) * chunks + tl.program_id(0)
            left &= WIDE
            tl.store(has + chunk, tl.sum((better.to(tl.int32) << 16) | alike.to(tl.int32), 0))
    if left:
        place, count = _count(digit.to(tl.int32), alike, CHUNK, SHARED)
        bins += STAGE * BINS
        if STAGE < 2:
            tl.atomic_add(bins + place, count, mask=count > 0, sem="relaxed")
        else:  # read again from memory: with one use of its result in one layout, Triton does not repeat the PTX
            own = lead + chunk * (2 * LAST)
            tl.store(own + place, count.to(tl.int16), mask=place < LAST)
            tl.debug_barrier()
            turned = tl.arange(0, LAST)
            count = tl.load(own + turned).to(tl.int32)
            tl.store(own + LAST + turned, tl.cumsum(count, 0).to(tl.int16))
            tl.atomic_add(bins + (turned ^ (LAST - 1)), count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["m", "chunks"])
def write_chunks(
    score, length, bins, state, has, lead, out, count, m, chunks, keep, lists, groups, sink, recent,
    LATE: tl.constexpr,  # equal keys go to the later entry
    WIDE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Write the entries that each chunk gives. grid: (chunks, B * lists).

    out int32 `[B * lists, keep]`, ascending, padded with the last one; count int32 `[B * lists]`. CHUNKS: `chunks` or more.
    """
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    n = _size(length, row, lists, groups, m)
    k = tl.minimum(keep, n)
    first = chunk * CHUNK
    i = first + tl.arange(0, CHUNK)
    key = _keys(score + row.to(tl.int64) * m, i, n, sink, recent)
    out += row.to(tl.int64) * keep
    if chunk == 0:
        tl.store(count + row, k)
    if (first + CHUNK > k) & (first < keep):  # a row that is shorter than its list gives all it has, so n - 1 is the last
        tl.store(out + i, tl.zeros([CHUNK], tl.int32) + tl.maximum(n - 1, 0), mask=(i >= k) & (i < keep))
    if first < n:
        bins += row.to(tl.int64) * (3 * BINS)
        digits, rest, above, inside = _edge(bins, state + row.to(tl.int64) * 8, k, 3, WIDE)
        c = tl.arange(0, CHUNKS)
        earlier = c < chunk
        at = row.to(tl.int64) * chunks + c
        both = tl.load(has + at, mask=earlier, other=0)
        better_before = both >> 16
        tied_before = both & 0xFFFF
        if rest == 0:  # a third digit was counted
            turned = (digits & (LAST - 1)) ^ (LAST - 1)
            reached = lead + at * (2 * LAST) + LAST + turned
            reach = tl.load(reached, mask=earlier, other=0).to(tl.int32)
            more = tl.load(reached - 1, mask=c < tl.where(turned > 0, chunk, 0), other=0).to(tl.int32)
            better_before += more
            tied_before = reach - more
        kept = tl.sum(better_before, 0)
        room = k - above
        before = tl.sum(tied_before, 0)
        if LATE:  # equal keys that are left out before the first that is taken
            before -= inside - room
        better, tied = _sides(key, digits, rest)
        ranks = tl.cumsum((better.to(tl.int32) << 16) | tied.to(tl.int32), 0)  # two sums in one; CHUNK is below 1 << 15
        rank = before + (ranks & 0xFFFF)
        take = better | (tied & (rank > 0) & (rank <= room))
        slot = kept + (ranks >> 16) + tl.minimum(tl.maximum(rank, 0), room) - 1
        tl.store(out + slot, i, mask=take)
