"""Thresholds of long rows of scores, found four bits at a time by many programs, and the lists that follow from them.

A row's threshold is the highest number that at least k entries reach (top-k), or that entries holding a share p of the
row's mass reach (top-p). `narrow` runs eight times. Each run sums, for the sixteen next digits, what reaches them, chunk
by chunk; the next run (or the kernel that uses the threshold) adds the chunks up in order and settles the digit. Counts
and masses are fp64, nothing is atomic, so the choice is that of `select.top_k` and `select.top_p`, ties included, and the
same in every run. `estimate_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORCED = tl.constexpr(0xFFFFFFFF)  # above the ordered bits of every float
TOP_BIT = tl.constexpr(-0x80000000)
DIGITS = tl.constexpr(16)
PHASES = tl.constexpr(8)


@triton.jit
def order(x):
    """uint32 keys that rank as the floats do; NaN ranks as -inf, -0 as 0."""
    x = tl.where(x == 0, 0.0, x)
    x = tl.where(x == x, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | TOP_BIT)).to(tl.uint32, bitcast=True)


@triton.jit
def value(key):
    """The float of a key that stands for a number >= 0; 0 for the others."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def room_at(key, above, target):
    """Entries of one positive value that a row of mass `above` still needs to reach `target` (fp64)."""
    x = value(key).to(tl.float64)
    need = tl.where(x > 0, (target - above) / tl.where(x > 0, x, 1.0), 0.0)
    whole = tl.minimum(tl.maximum(need, 0.0), 2147483000.0).to(tl.int32)
    return whole + (whole.to(tl.float64) < need).to(tl.int32)


@triton.jit
def settled(
    part, edges, aboves, targets, row, rows, chunks, phase, p, keep, forced, n,
    MASS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """(key of a row's threshold so far, what lies above it, what must be reached), once `phase` phases have run."""
    c = tl.arange(0, CHUNKS)
    x = tl.arange(0, DIGITS)
    at = ((phase - 1) * rows + row).to(tl.int64)
    sums = tl.load(
        part + (at * chunks + c[:, None]) * DIGITS + x[None, :], mask=(c < chunks)[:, None] & (x >= 0)[None, :], other=0.0
    )
    reach = tl.sum(sums, 0)
    edge = tl.zeros([], tl.uint32)
    above = tl.zeros([], tl.float64)
    target = tl.zeros([], tl.float64)
    if phase > 1:
        edge = tl.load(edges + at).to(tl.uint32, bitcast=True)
        above = tl.load(aboves + at)
        target = tl.load(targets + row)
    elif MASS:
        target = p * tl.sum(tl.where(x == 0, reach, 0.0))
    else:
        least = tl.load(forced + row)
        target = tl.minimum(tl.maximum(tl.load(keep + row), least), n).to(tl.float64)
    digit = tl.maximum(tl.sum((reach >= target).to(tl.int32)) - 1, 0)
    above = tl.where(digit < DIGITS - 1, tl.sum(tl.where(x == digit + 1, reach, 0.0)), above)
    edge = edge | (digit.to(tl.uint32) << (32 - 4 * phase).to(tl.uint32))
    return edge, above, target


@triton.jit
def fraction(bits):
    """The fp64 number whose bits an argument holds; as an argument it would come in fp32 and shift thresholds."""
    return (tl.zeros([], tl.int64) + bits).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["phase", "steps", "n", "chunks", "p"])
def narrow(
    score, live, part, edges, aboves, targets, keep, forced, rows, n, chunks, phase, steps, p, shares,
    MASS: tl.constexpr, EACH: tl.constexpr, ALL_LIVE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Phase 0..7 of the search. grid: (chunks, rows); a chunk is CHUNK * steps entries of score fp32 `[rows, n]`.

    part fp64 `[8, rows, chunks, 16]`; edges int32 and aboves fp64 `[8, rows]`, targets fp64 `[rows]`, all scratch. keep and
    forced int32 `[rows]`: entries to keep, and how many first entries are kept whatever their score (top-k only). p: the
    bits of the share of the mass (top-p only); with EACH every row has its own in shares, fp64 `[rows]`.
    """
    row = tl.program_id(1)
    if not ALL_LIVE:  # noqa: SIM102
        if tl.load(live + row) == 0:
            return
    edge = tl.zeros([], tl.uint32)
    share = fraction(p)
    if EACH:
        share = tl.load(shares + row)
    if phase > 0:
        edge, above, target = settled(
            part, edges, aboves, targets, row, rows, chunks, phase, share, keep, forced, n, MASS, CHUNKS
        )
        if tl.program_id(0) == 0:
            at = (phase * rows + row).to(tl.int64)
            tl.store(edges + at, edge.to(tl.int32, bitcast=True))
            tl.store(aboves + at, above)
            if phase == 1:  # later phases read it, this one has computed it
                tl.store(targets + row, target)
    least = 0
    if not MASS:
        least = tl.load(forced + row)
    x = tl.arange(0, DIGITS)
    trial = edge | (x.to(tl.uint32) << (28 - 4 * phase).to(tl.uint32))
    score += row.to(tl.int64) * n
    total = tl.zeros([CHUNK, DIGITS], tl.float64)
    for s in range(steps):
        i = (tl.program_id(0) * steps + s) * CHUNK + tl.arange(0, CHUNK)
        v = tl.load(score + i, mask=i < n, other=0.0)
        key = order(v)
        if MASS:
            weight = tl.where(v > 0, v, 0.0).to(tl.float64)
        else:
            key = tl.where(i < least, FORCED, key)
            weight = (i < n).to(tl.float64)
        total += tl.where(key[:, None] >= trial[None, :], weight[:, None], 0.0)
    at = (phase * rows + row).to(tl.int64) * chunks + tl.program_id(0)
    tl.store(part + at * DIGITS + x, tl.sum(total, 0))


@triton.jit(do_not_specialize=["n", "chunks", "half", "width_a", "width_b"])
def take(
    score, part, edges, aboves, targets, keep, forced, index, count, rows, n, chunks, half, width_a, width_b,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The best entries of each row after eight phases, ascending. grid: (rows,).

    index int32: `[half, width_a]`, then `[rows - half, width_b]`; rows are padded with their last. count int32 `[rows]`.
    """
    row = tl.program_id(0)
    edge, above, target = settled(
        part, edges, aboves, targets, row, rows, chunks, 8 + row * 0, 0.0, keep, forced, n, False, CHUNKS
    )
    least = tl.load(forced + row)
    room = (target - above).to(tl.int32)
    width = tl.where(row < half, width_a, width_b)
    start = tl.where(row < half, row.to(tl.int64) * width_a, half.to(tl.int64) * width_a + (row - half) * width_b)
    score += row.to(tl.int64) * n
    kept = 0
    tied_before = 0
    newest = 0
    for c in range(0, n, CHUNK):
        i = c + tl.arange(0, CHUNK)
        key = order(tl.load(score + i, mask=i < n, other=0.0))
        key = tl.where(i < least, FORCED, key)
        better = (key > edge) & (i < n)
        tied = (key == edge) & (i < n)
        both = tl.cumsum((better.to(tl.int32) << 16) | tied.to(tl.int32), 0)  # two sums in one; CHUNK is below 1 << 15
        rank = tied_before + (both & 0xFFFF)
        chosen = better | (tied & (rank <= room))
        slot = kept + (both >> 16) + tl.minimum(rank, room) - 1
        tl.store(index + start + slot, i, mask=chosen)
        newest = tl.maximum(newest, tl.max(tl.where(chosen, i, 0)))
        kept += tl.sum(better.to(tl.int32))
        tied_before += tl.sum(tied.to(tl.int32))
    total = target.to(tl.int32)
    for c in range(total, width, 256):
        j = c + tl.arange(0, 256)
        tl.store(index + start + j, newest + tl.zeros([256], tl.int32), mask=j < width)
    tl.store(count + row, total)


@triton.jit(do_not_specialize=["n", "chunks"])
def count_mass(
    score, part, edges, aboves, targets, count, rows, n, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """How many entries the smallest set has that reaches the share p of each row's mass. grid: (rows,)."""
    row = tl.program_id(0)
    edge, above, target = settled(
        part, edges, aboves, targets, row, rows, chunks, 8 + row * 0, 0.0, count, count, n, True, CHUNKS
    )
    score += row.to(tl.int64) * n
    better = tl.zeros([CHUNK], tl.int32)
    tied = tl.zeros([CHUNK], tl.int32)
    for c in range(0, n, CHUNK):
        i = c + tl.arange(0, CHUNK)
        key = order(tl.load(score + i, mask=i < n, other=0.0))
        better += ((key > edge) & (i < n)).to(tl.int32)
        tied += ((key == edge) & (i < n)).to(tl.int32)
    tl.store(count + row, tl.sum(better) + tl.minimum(room_at(edge, above, target), tl.sum(tied)))
