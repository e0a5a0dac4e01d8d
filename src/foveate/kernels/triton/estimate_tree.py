"""A tree search over key blocks for each block of queries: one program walks down all levels of a search.

What is computed is `descend` of `scores/tree.py`; `estimate_tree_launch.py` calls this kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .estimate_lists import _pack
from .estimate_probe import _scores
from .estimate_select import order
from .steps import BIG, LOG2E, _read


@triton.jit
def _best(key, goal):
    """The highest threshold that at least `goal` keys reach, found bit by bit; done once exactly `goal` reach it."""
    edge = tl.zeros([], tl.uint32)
    bit = edge + 0x80000000
    while bit > 0:
        trial = edge | bit
        reach = tl.sum((key >= trial).to(tl.int32))
        edge = tl.where(reach >= goal, trial, edge)
        bit = tl.where(reach == goal, edge - edge, bit >> 1)
    return edge


@triton.jit
def _halves(words, c, least, keep):
    """(first blocks, sizes) of the two halves of each range; halves of ranges that are none are empty."""
    whole = tl.load(words + c // 2, mask=c < 2 * keep, other=0)
    width = tl.where(c < 2 * keep, least + (whole & 1), 0)
    left = width // 2
    right = c % 2 == 1
    return (whole >> 1) + tl.where(right, left, 0), tl.where(right, width - left, left)


@triton.jit(do_not_specialize=["nq", "n_rows", "start", "first_block", "first", "searches", "nil"])
def descend(
    q, k, length, q_pos, ends, words, scores, tiles, count,
    scale, softcap, m, nq, n_rows, start, first_block, first, searches, nil,
    lists, kv_heads, keep, size, step, end_sb, end_div, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm,
    ROWS: tl.constexpr,  # queries of a search and head: every step-th of a block of `size` rows
    GROUP: tl.constexpr,  # heads of a list
    ROWS_PAD: tl.constexpr,  # at least ROWS * GROUP
    KEYS: tl.constexpr,  # keys of a product
    BLOCK: tl.constexpr,  # keys of a block
    WIDTH: tl.constexpr,  # keys of a tile of the lists: a multiple of BLOCK
    HALF: tl.constexpr,  # at least keep, and half of KEYS
    WHERE: tl.constexpr,  # representative: 0 the centre of a range, 1 its first block, 2 its last
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """First keys of the tiles that each search finds: int32 `[B, lists, nq, keep]`, ascending, counts. grid: (programs,).

    Search n of a list has the rows of block first_block + n on a grid from position 0; a row outside the call, which begins
    at position `start`, is replaced by the nearest one inside. ends int32 `[B or 1, lists / end_div, nq]`: entries
    first * BLOCK .. end - 1 are searched. length int32 `[B, G]` or None; q_pos int64 `[B, n_rows]`, or None for positions
    start, start + 1, .. . words int32 `[programs, 3 * HALF]` and scores fp32 `[programs, 2 * HALF]` are scratch.

    The ranges of a level differ in size by one block at most, and so do their halves. A range is a word: its first block
    times two, plus one where it is a block larger than the `least` one.
    """
    words += tl.program_id(0) * (3 * HALF)
    spots = words + HALF
    scores += tl.program_id(0) * (2 * HALF)
    i = tl.arange(0, ROWS_PAD)
    d = tl.arange(0, D_PAD)
    j = tl.arange(0, KEYS)
    c = tl.arange(0, 2 * HALF)
    g = tl.arange(0, HALF)
    units = lists // kv_heads
    for x in range(tl.program_id(0), searches, tl.num_programs(0)):
        # The lists of a kv head run beside each other, so that they find its keys in the cache; late blocks, which see
        # the most keys, run first.
        n = nq - 1 - x // units % nq
        bg = x // units // nq
        b = (bg // kv_heads).to(tl.int64)
        kv_head = bg % kv_heads
        here = kv_head * units + x % units
        live = i < ROWS * GROUP
        row = tl.minimum(tl.maximum((first_block + n) * size + i % ROWS * step - start, 0), n_rows - 1)
        head = here * GROUP + i // ROWS
        qt = _read(q, b * q_sb + head.to(tl.int64) * q_sh + row.to(tl.int64) * q_sn, live, d, D, D_PAD, True)
        if q_pos is not None:
            at_q = tl.load(q_pos + b * n_rows + row, mask=live, other=-1).to(tl.int32)
        else:
            at_q = tl.where(live, start + row, -1)
        at_q += nil  # 0, as in `walk.attend`: keeps a comparison from being taken for constant over rows
        total = m
        if length is not None:
            total = tl.minimum(tl.load(length + bg).to(tl.int32), m)
        base = k + b * k_sb + kv_head.to(tl.int64) * k_sg

        end = tl.load(ends + b * end_sb + (here // end_div) * nq + n)
        blocks = tl.maximum((end + BLOCK - 1) // BLOCK - first, 0)
        least = blocks // keep
        most = tl.cdiv(blocks, keep)
        if most > 1:
            rest = blocks % keep  # blocks * g // keep = least * g + rest * g // keep, which stays in 32 bits
            low = rest * g // keep
            word = (first + least * g + low) * 2 + (rest * (g + 1) // keep - low)
        else:  # every block is a range; those that exist come first
            word = (first + g) * 2 + ((g < blocks) & (least == 0)).to(tl.int32)
        tl.debug_barrier()  # the search before this one has read its words
        tl.store(words + g, word, mask=g < keep)
        tl.debug_barrier()

        while most > 1:
            spot, width = _halves(words, c, least, keep)
            valid = width > 0
            if WHERE == 0:
                spot += width // 2
            if WHERE == 2:
                spot += width - 1
            tl.store(spots + c, tl.where(valid, spot, -1))
            tl.debug_barrier()
            for e in tl.range(0, 2 * keep, KEYS // BLOCK, num_stages=STAGES):
                key = tl.load(spots + e + j // BLOCK) * BLOCK + j % BLOCK
                ok = (key >= 0) & (key < total)
                near = tl.minimum(tl.maximum(key, 0), total - 1)  # a key that exists, in place of a mask of loads
                kt = _read(base, near.to(tl.int64) * k_sm, ok, d, D, D_PAD, False)
                s = _scores(kt, qt, scale * LOG2E, softcap, CAP, FP32)  # a row a key: queries may be few
                seen = tl.where(ok, key, BIG)[:, None] <= at_q[None, :]  # one number a key to hand over, not two
                best = tl.max(tl.where(seen, s, float("-inf")), 1)
                if BLOCK > 1:
                    best = tl.max(tl.reshape(best, [KEYS // BLOCK, BLOCK]), 1)
                o = e + tl.arange(0, KEYS // BLOCK)
                tl.store(scores + o, best, mask=o < 2 * keep)
            tl.debug_barrier()
            first_of, width = _halves(words, c, least, keep)  # once more: kept, they would take the loop's registers
            valid = width > 0
            rank = order(tl.load(scores + c, mask=c < 2 * keep, other=float("-inf")))
            rank = tl.where(valid, rank, 0)
            goal = tl.minimum(tl.sum(valid.to(tl.int32)), keep)
            edge = _best(rank, goal)
            above = rank > edge
            tied = (rank == edge) & valid
            room = goal - tl.sum(above.to(tl.int32))
            chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
            slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
            least = least // 2
            most = (most + 1) // 2
            tl.store(words + slot, first_of * 2 + (width - least), mask=chosen)
            tl.store(words + g, tl.zeros([HALF], tl.int32), mask=(g >= goal) & (g < keep))  # only where least is 0
            tl.debug_barrier()

        word = tl.load(words + g, mask=g < keep, other=0)
        before = tl.load(words + g - 1, mask=(g > 0) & (g < keep), other=-1)
        tile = (word >> 1) * BLOCK // WIDTH
        new = (g == 0) | (tile != (before >> 1) * BLOCK // WIDTH)
        found = new & (least + (word & 1) > 0) & (g < keep)
        at = (b * lists + here) * nq + n
        tl.store(count + at, _pack(found, tile, tiles + at * keep, keep, WIDTH, HALF))
