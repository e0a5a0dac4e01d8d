"""Voted keys and distances to lists of each query block, cut by region: one program a block and head, all in one walk.

What is computed is `by_region` of `scores/dual_chunk.py`; `estimate_regions_launch.py` calls this kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _put(chosen, value, out, kept, WRITE: tl.constexpr):
    """Store the chosen values behind the `kept` ones; how many there are now."""
    n = chosen.to(tl.int32)
    if WRITE:
        tl.store(out + kept + tl.cumsum(n, 0) - 1, value, mask=chosen)
    return kept + tl.sum(n)


@triton.jit
def _tiles(touched, row, lo, hi, out, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WRITE: tl.constexpr):
    """The key blocks lo .. hi - 1 at a touched distance from `row`, as first entries; their count."""
    kept = 0
    for c in range(lo, hi, CHUNK):
        j = c + tl.arange(0, CHUNK)
        on = tl.load(touched + row - j, mask=j < hi, other=0) != 0
        kept = _put(on, j * BLOCK, out, kept, WRITE)
    return kept


@triton.jit(do_not_specialize=["first", "blocks", "reach", "width", "w0", "w1", "w2", "w3", "w4", "w5"])
def split_regions(
    keys, many, touched, count, tiles0, tiles1, tiles2, entries0, entries1, entries2,
    first, blocks, each, reach, width, w0, w1, w2, w3, w4, w5,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Tiles and entries of the own chunk, the one before and all before that. grid: (blocks, rows).

    A chunk has `each` blocks; the first query block is number `first`. keys int32 `[chunks, rows, width]`, ascending, and
    many int32 `[chunks, rows]`: those of each chunk of queries. touched int8 `[chunks, rows, reach]`: distances in blocks.
    A region's tiles int32 `[rows, blocks, w0 (w1, w2)]`, its entries w3 (w4, w5) wide, count int32 `[6, rows, blocks]`:
    only these without WRITE.
    """
    at = tl.program_id(1).to(tl.int64) * blocks + tl.program_id(0)
    row = first + tl.program_id(0)
    own = row // each * each
    before = tl.maximum(own - each, 0)
    list_of = (row // each - first // each).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    touched += list_of * reach
    keys += list_of * width
    a = _tiles(touched, row, own, row + 1, tiles0 + at * w0, BLOCK, CHUNK, WRITE)
    b = _tiles(touched, row, before, own, tiles1 + at * w1, BLOCK, CHUNK, WRITE)
    c = _tiles(touched, row, 0, before, tiles2 + at * w2, BLOCK, CHUNK, WRITE)
    d = 0
    e = 0
    f = 0
    total = tl.load(many + list_of)
    for lo in range(0, total, CHUNK):
        i = lo + tl.arange(0, CHUNK)
        key = tl.load(keys + i, mask=i < total, other=0)
        block = key // BLOCK
        there = (i < total) & (block <= row)
        alone = there & (tl.load(touched + row - block, mask=there, other=1) == 0)
        d = _put(alone & (block >= own), key, entries0 + at * w3, d, WRITE)
        e = _put(alone & (block >= before) & (block < own), key, entries1 + at * w4, e, WRITE)
        f = _put(alone & (block < before), key, entries2 + at * w5, f, WRITE)
    if not WRITE:
        step = tl.num_programs(1).to(tl.int64) * blocks
        tl.store(count + at, a)
        tl.store(count + step + at, b)
        tl.store(count + 2 * step + at, c)
        tl.store(count + 3 * step + at, d)
        tl.store(count + 4 * step + at, e)
        tl.store(count + 5 * step + at, f)
