"""Inverse lists for the backward pass over keys: which rows of lists name a block of keys, built on the device.

A CSR over (batch row, kv head, key block): five launches, no host synchronisation, the same bits on every run. Blocks
that many rows name (a first block that every row reads) are cut into items of about equal length, so that no program
owns far more work than others; their number is bounded whatever the lists hold, because an item is no shorter than a
fixed share of all entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout

LIST_BITS = 24  # an id is list number << LIST_BITS | query block
SHORTEST = 32  # entries of the shortest item a block is cut into
SHARES = 2  # an item holds at least total / (SHARES * cores) entries
SCRATCH = 256 << 20  # bytes of the table of named blocks that are in use at once
CHUNK = 1024


@dataclass(frozen=True)
class InverseLists:
    """Who reads a key block. K = batch * kv_heads * key_blocks, key block k of (b, g) in row (b * G + g) * blocks + k.

    Attributes:
        ids: int32 `[capacity]`, `list << 24 | query block`, lists counted within the kv head. Per key block first the
            free entries (every row of the query block sees every key of the key block), then those that causality alone
            cuts, then those whose list names a part of the key block; each class ascends. Entries that no row sees are
            left out.
        offset: int64 `[K]`, where a key block begins in `ids`.
        counts: int32 `[K, 3]`: free entries, those and the ones cut by causality, all entries.
        cuts: int32 `[K, 2]`: first item of this key block, number of its items (0: it is not cut).
        items: int32 `[max_items]`: the key block of each item; unused slots hold anything.
        plan: int32 `[2]`: entries of an item, number of items.
        keys, key_blocks: keys of a block, blocks of a kv head.
        lists, share: lists of a kv head, query heads that follow one list.
        max_items: bound of the number of items, known to the host.
    """

    ids: Tensor
    offset: Tensor
    counts: Tensor
    cuts: Tensor
    items: Tensor
    plan: Tensor
    keys: int
    key_blocks: int
    lists: int
    share: int
    max_items: int


@triton.jit
def mark_kernel(tiles, count, named, first, sb, st, sq, cb, ch, cq, G, LISTS, SHARE, H, HL, NQ, NK,
                WIDTH: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """named `[B * G, NK, LISTS * NQ]` from 0: 1 where a list row names keys of a block, 2 where one tile holds it whole.

    One program a list row. Of two tiles of a row that reach into one block only one writes, or both write 1: the
    keys from the first start inside a block up to its end are all named, since a tile is no narrower than a block.
    """
    row = tl.program_id(0) % (LISTS * NQ)
    lead = tl.program_id(0) // (LISTS * NQ) + first
    b = (lead // G).to(tl.int64)
    head = ((lead % G * LISTS + row // NQ) * SHARE * HL) // H  # the list that serves these query heads
    src = tiles + b * sb + head.to(tl.int64) * st + (row % NQ).to(tl.int64) * sq
    n = tl.load(count + b * cb + head * ch + (row % NQ) * cq)
    named += (tl.program_id(0) // (LISTS * NQ)).to(tl.int64) * NK * (LISTS * NQ) + row
    for c in range(0, n, CHUNK):
        i = c + tl.arange(0, CHUNK)
        start = tl.load(src + i, mask=i < n, other=0)
        before = tl.load(src + i - 1, mask=(i < n) & (i > 0), other=-WIDTH)
        for x in tl.static_range(WIDTH // KEYS + 1):
            block = start // KEYS + x
            end = (block + 1) * KEYS
            there = (i < n) & (block * KEYS < start + WIDTH) & (block < NK)
            whole = (start <= block * KEYS) & (start + WIDTH >= end)
            tl.store(
                named + block.to(tl.int64) * (LISTS * NQ), tl.where(whole, 2, 1).to(tl.uint8),
                mask=there & (whole | (before + WIDTH < end)),
            )  # fmt: skip


@triton.jit
def _classes(named, i, k, NQ, ROWS, N, M, q_offset, KEYS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
             FULL: tl.constexpr):  # fmt: skip
    """int32 (free, cut by causality alone, named in part) of list rows i for key block k: at most one of them is 1."""
    mark = tl.where(i < ROWS, 2, 0)
    if not FULL:
        mark = tl.load(named + i, mask=i < ROWS, other=0).to(tl.int32)
    below = mark > 0
    if CAUSAL:
        row = (i % NQ) * BLOCK - q_offset
        mark = tl.where(k * KEYS <= M - N + tl.minimum(row + BLOCK, N) - 1, mark, 0)
        below = k * KEYS + KEYS - 1 <= M - N + tl.maximum(row, 0)
    whole = (mark == 2).to(tl.int32)
    free = whole * below.to(tl.int32)
    return free, whole - free, (mark == 1).to(tl.int32)


@triton.jit
def count_kernel(named, counts, first, NQ, ROWS, NK, N, M, q_offset, KEYS: tl.constexpr, BLOCK: tl.constexpr,
                 CAUSAL: tl.constexpr, FULL: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """counts `[B * G * NK, 3]`. grid: (NK, leads)."""
    k = tl.program_id(0)
    here = tl.program_id(1).to(tl.int64) * NK + k
    free = tl.zeros([CHUNK], tl.int32)
    whole = tl.zeros([CHUNK], tl.int32)
    used = tl.zeros([CHUNK], tl.int32)
    for lo in range(0, ROWS, CHUNK):
        i = lo + tl.arange(0, CHUNK)
        a, c, o = _classes(named + here * ROWS, i, k, NQ, ROWS, N, M, q_offset, KEYS, BLOCK, CAUSAL, FULL)
        free += a
        whole += a + c
        used += a + c + o
    at = counts + ((tl.program_id(1) + first).to(tl.int64) * NK + k) * 3
    tl.store(at, tl.sum(free))
    tl.store(at + 1, tl.sum(whole))
    tl.store(at + 2, tl.sum(used))


@triton.jit
def plan_kernel(counts, offset, cuts, plan, K, shares, SHORTEST: tl.constexpr, CHUNK: tl.constexpr):
    """Prefix sums over all key blocks, and how long blocks are cut. One program."""
    lane = tl.arange(0, CHUNK)
    total = tl.zeros([], tl.int64)
    for c in range(0, K, CHUNK):
        i = c + lane
        used = tl.load(counts + i * 3 + 2, mask=i < K, other=0).to(tl.int64)
        tl.store(offset + i, total + tl.cumsum(used, 0) - used, mask=i < K)
        total += tl.sum(used)
    size = tl.maximum((total + shares - 1) // shares, SHORTEST).to(tl.int32)
    items = 0
    for c in range(0, K, CHUNK):
        i = c + lane
        used = tl.load(counts + i * 3 + 2, mask=i < K, other=0)
        pieces = tl.where(used > size, (used + size - 1) // size, 0)
        tl.store(cuts + i * 2, items + tl.cumsum(pieces, 0) - pieces, mask=i < K)
        tl.store(cuts + i * 2 + 1, pieces, mask=i < K)
        items += tl.sum(pieces)
    tl.store(plan, size)
    tl.store(plan + 1, items)


@triton.jit
def fill_kernel(named, counts, offset, cuts, ids, items, first, NQ, ROWS, NK, N, M, q_offset, KEYS: tl.constexpr,
                BLOCK: tl.constexpr, CAUSAL: tl.constexpr, FULL: tl.constexpr, BITS: tl.constexpr,
                CHUNK: tl.constexpr):  # fmt: skip
    """Writes the entries and the items of one key block. grid: (NK, leads)."""
    k = tl.program_id(0)
    here = tl.program_id(1).to(tl.int64) * NK + k
    key = (tl.program_id(1) + first).to(tl.int64) * NK + k
    ids += tl.load(offset + key)
    free = 0
    cut = tl.load(counts + key * 3)
    other = tl.load(counts + key * 3 + 1)
    for lo in range(0, ROWS, CHUNK):
        i = lo + tl.arange(0, CHUNK)
        a, c, o = _classes(named + here * ROWS, i, k, NQ, ROWS, N, M, q_offset, KEYS, BLOCK, CAUSAL, FULL)
        word = ((i // NQ) << BITS) | (i % NQ)
        tl.store(ids + free + tl.cumsum(a, 0) - a, word, mask=a > 0)
        tl.store(ids + cut + tl.cumsum(c, 0) - c, word, mask=c > 0)
        tl.store(ids + other + tl.cumsum(o, 0) - o, word, mask=o > 0)
        free += tl.sum(a)
        cut += tl.sum(c)
        other += tl.sum(o)
    begin = tl.load(cuts + key * 2)
    pieces = tl.load(cuts + key * 2 + 1)
    for c in range(0, pieces, CHUNK):
        i = c + tl.arange(0, CHUNK)
        tl.store(items + begin + i, key.to(tl.int32), mask=i < pieces)


def lists_per_head(layout: Layout, g: int) -> tuple[int, int]:
    """(lists of a kv head, query heads that follow one of them) as the backward pass walks a layout."""
    h = layout.shape[1]
    if layout.tiles is None:
        return h // g, 1
    given = layout.tiles.shape[1]
    lists = given // g if given % g == 0 else 1 if g % given == 0 else h // g
    return lists, h // (g * lists)


def build(layout: Layout, g: int, keys: int, cores: int, device: torch.device) -> InverseLists:
    """Inverse lists of a layout of tiles only, or of a dense one, for key blocks of `keys` keys.

    Args:
        layout: tiles of any alignment, overlapping or not, `tile_width` a multiple of `keys`; or `full`.
        g: kv heads. cores: multiprocessors to balance for.
    """
    b, h, n, m = layout.shape
    lists, share = lists_per_head(layout, g)
    nq, nk, leads = layout.num_blocks, -(-m // keys), b * g
    rows, k = lists * nq, leads * nk
    tiles, count = layout.tiles, layout.tile_count
    if tiles is not None and tiles.stride(-1) != 1:
        tiles = tiles.contiguous()
    width = 0 if tiles is None else tiles.shape[-1]
    reach = nk if tiles is None else min(nk, width * (layout.tile_width // keys + 1))
    shares = SHARES * cores
    max_items = 0 if rows <= SHORTEST else min(2 * shares, k * -(-rows // SHORTEST))

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    # one word more than entries, since the walk looks one entry ahead
    ids, items = empty(leads * rows * reach + 1), empty(max(1, max_items))
    offset, counts, cuts, plan = empty(k, dtype=torch.int64), empty(k, 3), empty(k, 2), empty(2)
    plain = dict(
        NQ=nq, ROWS=rows, NK=nk, N=n, M=m, q_offset=layout.q_offset, KEYS=keys, BLOCK=layout.block_q,
        CAUSAL=layout.causal, FULL=tiles is None, CHUNK=min(CHUNK, max(16, triton.next_power_of_2(rows))), num_warps=4,
    )  # fmt: skip
    step = leads if tiles is None else max(1, min(leads, SCRATCH // (nk * rows)))
    table: Tensor | None = None

    def named(first: int) -> Tensor:
        """The table of the kv heads from `first` on."""
        nonlocal table
        if tiles is None or count is None:
            return plan
        if table is not None and step == leads:
            return table
        here = min(step, leads - first)
        table = torch.zeros(here * nk * rows, dtype=torch.uint8, device=device)
        many = tiles.shape[0] > 1
        mark_kernel[(here * rows,)](
            tiles, count, table, first, tiles.stride(0) * many, *tiles.stride()[1:3], count.stride(0) * many,
            *count.stride()[1:], g, lists, share, h, tiles.shape[1], nq, nk,
            WIDTH=layout.tile_width, KEYS=keys, CHUNK=min(128, max(16, triton.next_power_of_2(width))), num_warps=1,
        )  # fmt: skip
        return table

    for lead in range(0, leads, step):
        count_kernel[(nk, min(step, leads - lead))](named(lead), counts, lead, **plain)
    plan_kernel[(1,)](counts, offset, cuts, plan, k, shares, SHORTEST=SHORTEST, CHUNK=CHUNK, num_warps=4)
    for lead in range(0, leads, step):
        fill_kernel[(nk, min(step, leads - lead))](
            named(lead), counts, offset, cuts, ids, items, lead, BITS=LIST_BITS, **plain
        )
    return InverseLists(ids, offset, counts, cuts, items, plan, keys, nk, lists, share, max_items)


def refused(layout: Layout, g: int) -> str | None:
    """The reason inverse lists cannot be built for this layout."""
    lists, _ = lists_per_head(layout, g)
    if lists >= 1 << (31 - LIST_BITS) or layout.num_blocks >= 1 << LIST_BITS:
        return f"{lists} lists a kv head of {layout.num_blocks} query blocks are more than its ids hold"
    if math.prod(layout.shape[:2]) * layout.num_blocks >= 1 << 31:
        return "more query blocks than one launch has programs"
    return None
