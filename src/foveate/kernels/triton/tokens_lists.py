"""Lists of a chunk of tokens turned round on the device: who reads a key block, and what neighbouring tokens share.

Every token has a list of its own (`block_q` 1). For the tokens of one chunk this builds, in four launches without
atomics and without host synchronisation,

- shared lists: per tile of neighbouring tokens the key blocks that at least `least` of them name. The tile walks them
  together, so their keys are read once. Blocks that a tile of the layout names only in part go there as well;
- inverse lists: per key block all other (token, slot) pairs that name it, ascending, cut into items of equal length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout

ODD = 255  # in the table: a token names a part of the block, or the whole of it through tiles that are not aligned
SLOTS = 254  # longest list of a token
LANES = 512  # list slots that a program of `mark_kernel` reads
CHUNK = 1024


@dataclass(frozen=True)
class Heads:
    """How heads, lists and kv heads go together. A lead is one list: (b * G + g) * lists + list.

    Attributes:
        leads: lists of all batch rows and kv heads. lists: of a kv head. share: query heads that follow one list.
        h, g: query and kv heads.
    """

    leads: int
    lists: int
    share: int
    h: int
    g: int


@dataclass(frozen=True)
class TokenLists:
    """Shared and inverse lists of tokens first .. first + rows. NK: key blocks that these tokens may see.

    Attributes:
        table: uint8 `[leads, NK, size]`, slot + 1 of the tokens whose block is left to the inverse lists, else 0.
        shared: int32 `[leads, tiles, width]`, block numbers: those without any cut ascend from the front, those that
            causality or a tile's edge cuts follow from the back.
        shared_count: int32 `[leads, tiles, 2]`, numbers of both.
        ids: int32 `[leads * NK, size]`, token of the chunk * (slots + 1) + slot, ascending.
        counts: int32 `[leads * NK]`, used ids. items: int32 `[max_items, 2]`, (row of ids, piece of it).
        plan: int32 `[1]`, items in use.
        first, rows, size: first token, tokens, tokens of a whole chunk (a multiple of the tile).
        blocks, max_items, tile: NK, bound of the items, tokens of a tile.
    """

    table: Tensor
    shared: Tensor
    shared_count: Tensor
    ids: Tensor
    counts: Tensor
    items: Tensor
    plan: Tensor
    first: int
    rows: int
    size: int
    blocks: int
    max_items: int
    tile: int


@triton.jit(do_not_specialize=["first", "rows", "NK"])
def mark_kernel(tiles, count, table, sb, st, sq, cb, ch, cq, LISTS, SHARE, H, HL, first, rows, size, NK, N, M, T,
                WIDTH: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, T_PAD: tl.constexpr,
                ODD: tl.constexpr):  # fmt: skip
    """table `[leads, NK, size]` from 0: slot + 1 of whole aligned tiles, ODD of others. grid: (rows / ROWS, leads).

    LISTS: lists of a batch row. Of an aligned tile and a piece of another in one block the aligned tile stands, since
    it names the whole block; the barrier puts its mark last.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lead = tl.program_id(1)
    b = (lead // LISTS).to(tl.int64)
    head = (lead % LISTS) * SHARE * HL // H
    token = first + row
    n = tl.load(count + b * cb + head * ch + token * cq, mask=row < rows, other=0)
    i = tl.arange(0, T_PAD)[None, :]
    used = (i < n[:, None]) & (i < T)
    at = tiles + b * sb + head.to(tl.int64) * st + token.to(tl.int64)[:, None] * sq + i
    start = tl.load(at, mask=used, other=0)
    block = start // WIDTH
    last = tl.zeros([ROWS], tl.int32) + NK - 1  # last block that a token sees
    if CAUSAL:
        pos = M - N + token
        last = tl.where(pos < 0, -1, tl.minimum(last, pos // WIDTH))
    table += lead.to(tl.int64) * NK * size
    mark = table + block.to(tl.int64) * size + row[:, None]
    odd = used & (start % WIDTH != 0)
    value = tl.zeros([ROWS, T_PAD], tl.int32) + ODD
    tl.store(mark, value.to(tl.uint8), mask=odd & (block <= last[:, None]))
    tl.store(mark + size, value.to(tl.uint8), mask=odd & (block + 1 <= last[:, None]))
    tl.debug_barrier()
    value = tl.zeros([ROWS, T_PAD], tl.int32) + i + 1
    tl.store(mark, value.to(tl.uint8), mask=used & (start % WIDTH == 0) & (block <= last[:, None]))


@triton.jit(do_not_specialize=["first", "NK", "width"])
def share_kernel(table, shared, shared_count, first, size, NK, N, M, width, least, WIDTH: tl.constexpr,
                 CAUSAL: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, ODD: tl.constexpr):  # fmt: skip
    """Moves blocks that `least` tokens of a tile name, and those marked ODD, to the shared lists. grid: (tiles, leads)."""
    tile = tl.program_id(0)
    lead = tl.program_id(1).to(tl.int64)
    at = lead * tl.num_programs(0) + tile
    shared += at * width
    token = tl.arange(0, TILE)
    table += lead * NK * size + tile * TILE
    lo = M - N + first + tile * TILE
    limit = NK
    if CAUSAL:
        limit = tl.minimum(NK, tl.maximum(lo + TILE - 1, 0) // WIDTH + 1)
    front = 0
    back = 0
    for c in range(0, limit, CHUNK):
        j = c + tl.arange(0, CHUNK)
        here = table + j.to(tl.int64)[:, None] * size + token[None, :]
        x = tl.load(here, mask=(j < limit)[:, None], other=0).to(tl.int32)
        odd = tl.max((x == ODD).to(tl.int32), 1)
        both = tl.where((tl.sum((x > 0).to(tl.int32), 1) >= least) | (odd > 0), 1, 0)
        cut = odd > 0
        if CAUSAL:
            cut = cut | (j * WIDTH + WIDTH - 1 > lo)
        a = tl.where(cut, 0, both)
        o = tl.where(cut, both, 0)
        tl.store(shared + front + tl.cumsum(a, 0) - a, j, mask=a > 0)
        tl.store(shared + width - 1 - (back + tl.cumsum(o, 0) - o), j, mask=o > 0)
        tl.store(here, tl.zeros([CHUNK, TILE], tl.uint8), mask=(both > 0)[:, None] & (x > 0))
        front += tl.sum(a)
        back += tl.sum(o)
    tl.store(shared_count + at * 2, front)
    tl.store(shared_count + at * 2 + 1, back)


@triton.jit(do_not_specialize=["first"])
def fill_kernel(table, ids, counts, first, size, N, M, SLOTS, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """ids and counts of one key block; the table is 0 behind the last token. grid: (NK, leads)."""
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    table += row.to(tl.int64) * size
    ids += row.to(tl.int64) * size
    begin = 0
    if CAUSAL:  # no token before this one sees the block
        begin = tl.maximum(tl.program_id(0) * WIDTH - (M - N) - first, 0) // CHUNK * CHUNK
    n = 0
    for c in range(begin, size, CHUNK):
        i = c + tl.arange(0, CHUNK)
        x = tl.load(table + i, mask=i < size, other=0).to(tl.int32)
        there = (x > 0).to(tl.int32)
        tl.store(ids + n + tl.cumsum(there, 0) - there, i * SLOTS + x - 1, mask=x > 0)
        n += tl.sum(there)
    tl.store(counts + row, n)


@triton.jit(do_not_specialize=["K"])
def plan_kernel(counts, items, plan, K, PIECE: tl.constexpr, CHUNK: tl.constexpr):
    """Cuts all rows of ids into items of at most PIECE entries. One program."""
    made = 0
    for c in range(0, K, CHUNK):
        i = c + tl.arange(0, CHUNK)
        pieces = (tl.load(counts + i, mask=i < K, other=0) + PIECE - 1) // PIECE
        begin = made + tl.cumsum(pieces, 0) - pieces
        for p in range(0, tl.max(pieces)):
            tl.store(items + (begin + p) * 2, i, mask=p < pieces)
            tl.store(items + (begin + p) * 2 + 1, tl.zeros([CHUNK], tl.int32) + p, mask=p < pieces)
        made += tl.sum(pieces)
    tl.store(plan, made)


def heads_of(layout: Layout, g: int) -> Heads:
    """How the lists of a layout spread over g kv heads."""
    assert layout.tiles is not None
    b, h, _, _ = layout.shape
    given = layout.tiles.shape[1]
    lists = given // g if given % g == 0 else 1 if g % given == 0 else h // g
    return Heads(b * g * lists, lists, h // (g * lists), h, g)


def build(
    layout: Layout, heads: Heads, first: int, rows: int, size: int, *, tile: int, least: int, piece: int
) -> TokenLists:
    """Lists of tokens first .. first + rows.

    Args:
        layout: tiles only, `block_q` 1, `tile_width` a power of two, at most SLOTS tiles a token.
        size: room for tokens, a multiple of `tile`, at least `rows`.
        tile: neighbouring tokens that walk shared blocks together, a power of two.
        least: tokens of a tile that must name a block to share it; 1 shares all, more than `tile` none.
        piece: entries of an item.
    """
    tiles, count = layout.tiles, layout.tile_count
    assert tiles is not None and count is not None
    _, _, n, m = layout.shape
    width, slots = layout.tile_width, tiles.shape[-1]
    if tiles.stride(-1) != 1:
        tiles = tiles.contiguous()
    seen = max(0, min(m, m - n + first + rows)) if layout.causal else m
    nk = max(1, -(-seen // width))
    k = heads.leads * nk
    reach = min(nk, 2 * tile * slots)
    number = -(-rows // tile)
    max_items = -(-heads.leads * rows * slots // piece) + k

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=tiles.device)

    table = torch.zeros(heads.leads, nk, size, dtype=torch.uint8, device=tiles.device)
    shared, shared_count = empty(heads.leads, number, reach), empty(heads.leads, number, 2)
    ids, counts, items, plan = empty(k, size), empty(k), empty(max_items, 2), empty(1)
    many = tiles.shape[0] > 1
    pad = max(16, triton.next_power_of_2(slots))
    step = max(1, LANES // pad)
    mark_kernel[(-(-rows // step), heads.leads)](
        tiles, count, table, tiles.stride(0) * many, *tiles.stride()[1:3], count.stride(0) * many, *count.stride()[1:],
        heads.g * heads.lists, heads.share, heads.h, tiles.shape[1], first, rows, size, nk, n, m, slots,
        WIDTH=width, CAUSAL=layout.causal, ROWS=step, T_PAD=pad, ODD=ODD, num_warps=4,
    )  # fmt: skip
    share_kernel[(number, heads.leads)](
        table, shared, shared_count, first, size, nk, n, m, reach, least,
        WIDTH=width, CAUSAL=layout.causal, TILE=tile, CHUNK=max(16, 1024 // tile), ODD=ODD, num_warps=4,
    )  # fmt: skip
    fill_kernel[(nk, heads.leads)](
        table, ids, counts, first, size, n, m, slots + 1,
        WIDTH=width, CAUSAL=layout.causal, CHUNK=min(CHUNK, max(16, triton.next_power_of_2(size))), num_warps=4,
    )  # fmt: skip
    plan_kernel[(1,)](counts, items, plan, k, PIECE=piece, CHUNK=CHUNK, num_warps=8)
    return TokenLists(table, shared, shared_count, ids, counts, items, plan, first, rows, size, nk, max_items, tile)
