"""Lists out of bits: 32 places a word, one program a row. Rows of any length; the union of heads is an "or" of words.

Used for key blocks (`estimate_lowbit_launch.py`) and for single keys (`estimate_stripes_launch.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chosen(words, spans, r, at, c, rows, many, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Which of the places c .. c + CHUNK - 1 are in: (bool `[CHUNK]`, the places)."""
    j = c + tl.arange(0, CHUNK)
    sure = tl.load(spans + 3 * r)
    free = tl.load(spans + 3 * r + 1)
    end = tl.load(spans + 3 * r + 2)
    word = tl.zeros([CHUNK], tl.int32)
    for e in range(GROUP):
        row = (at * GROUP + e) * rows + r
        word = word | tl.load(words + row * many + j // 32, mask=(j >= sure) & (j < free), other=0)
    hit = ((word >> (j % 32)) & 1) != 0
    return ((j < sure) | (hit & (j < free)) | (j >= free)) & (j < end), j


@triton.jit(do_not_specialize=["rows", "many"])
def count_bits(words, spans, count, rows, many, GROUP: tl.constexpr, CHUNK: tl.constexpr):
    """Length of each list, int32 `[lists, rows]`. grid: (rows, lists). Arguments as in `bit_lists`."""
    r = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64)
    total = tl.zeros([], tl.int32)
    for c in range(0, tl.load(spans + 3 * r + 2), CHUNK):
        chosen, _ = _chosen(words, spans, r, at, c, rows, many, GROUP, CHUNK)
        total += tl.sum(chosen.to(tl.int32))
    tl.store(count + at * rows + r, total)


@triton.jit(do_not_specialize=["rows", "many", "width"])
def bit_lists(
    words, spans, index, count, rows, many, width, unit,
    GROUP: tl.constexpr,  # neighbouring heads that share a list
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Places that are in, times `unit`, ascending: index int32 `[lists, rows, width]`, count. grid: (rows, lists).

    words int32 `[lists * GROUP, rows, many]`. spans int32 `[rows, 3]`, ascending: places before the first are in, then up
    to the second those whose bit is set in any head, then all up to the third, and none beyond. Only words of the second
    kind are read. Padded with the row's last, 0 if there is none; width is the longest list or more.
    """
    r = tl.program_id(0)
    at = tl.program_id(1).to(tl.int64)
    index += (at * rows + r) * width
    kept = tl.zeros([], tl.int32)
    newest = tl.zeros([], tl.int32)
    for c in range(0, tl.load(spans + 3 * r + 2), CHUNK):
        chosen, j = _chosen(words, spans, r, at, c, rows, many, GROUP, CHUNK)
        rank = tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(index + kept + rank - 1, j * unit, mask=chosen)
        kept += tl.sum(chosen.to(tl.int32))
        newest = tl.maximum(newest, tl.max(tl.where(chosen, j, 0)))
    for c in range(kept, width, CHUNK):
        slot = c + tl.arange(0, CHUNK)
        tl.store(index + slot, newest * unit + tl.zeros([CHUNK], tl.int32), mask=slot < width)
    tl.store(count + at * rows + r, kept)
