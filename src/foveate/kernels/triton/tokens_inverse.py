"""Inverse lists of tokens for dk and dv: what `inverse.py` builds for any layout, for lists of single tokens in a fifth of
the memory and, by design, of the time.

The bits of `tokens_bits.py` say who names a key block, the counts in front of them where each entry goes; no table of
bytes is written and read over again. Entries of a key block: whole ones first, then those that name a part of it, each
class list by list and ascending.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout
from . import inverse
from .inverse import LIST_BITS, InverseLists
from .inverse import plan_kernel as cuts_kernel
from .labels import _ones
from .tokens_bits import _last, mark_kernel, scan_kernel
from .tokens_lists import COLUMNS, DEEP, ENTRIES, ROW_CHUNK, WORD, Heads, listed, warps

SCRATCH = 256 << 20  # bytes of bits and counts that are in use at once


@triton.jit
def _put(ids, items, counts, offset, cuts, plan, row, rank, word, hit):
    """Entry `rank` of the list of a key block; the first one of an item also names the block to it."""
    tl.store(ids + tl.load(offset + row, mask=hit, other=0) + rank, word, mask=hit)
    length = tl.load(plan)
    opens = hit & (rank % length == 0) & (tl.load(cuts + row * 2 + 1, mask=hit, other=0) > 0)
    tl.store(items + tl.load(cuts + row * 2, mask=opens, other=0) + rank // length, row, mask=opens)


@triton.jit(do_not_specialize=["lead0", "NK"])
def entries_kernel(tiles, count, bits, odd, base, base_odd, counts, offset, cuts, plan, ids, items, sb, st, sq, cb, ch, cq,
                   LISTS, SHARE, H, HL, lead0, lists, NK, N, M, T, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
                   LIST: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """ids and items of the tokens of one span, of list lead0 + y. grid: (spans, leads).

    Of an aligned tile and a piece of another in one block the aligned tile stands, since it names the whole block.
    """
    span = tl.program_id(0)
    lead = tl.program_id(1) + lead0
    token = span * 32 + tl.arange(0, 32)
    b = (lead // LISTS).to(tl.int64)
    head = (lead % LISTS) * SHARE * HL // H
    n = tl.load(count + b * cb + head * ch + token * cq, mask=token < N, other=0)
    tiles += b * sb + head.to(tl.int64) * st + token.to(tl.int64)[:, None] * sq
    last = _last(token, N, M, NK, WIDTH, CAUSAL)[:, None]
    at = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + span) * NK
    bits += at
    odd += at
    base += at
    base_odd += at
    row = lead // lists * NK
    one = tl.full([32, LIST], 1, tl.int32) << tl.arange(0, 32)[:, None]
    entry = ((lead % lists) << BITS) | token[:, None]
    for c in range(0, T, LIST):
        i = (c + tl.arange(0, LIST))[None, :]
        used = (i < n[:, None]) & (i < T)
        start = tl.load(tiles + i, mask=used, other=0)
        block = start // WIDTH
        hit = used & (start % WIDTH == 0) & (block <= last)
        x = tl.load(bits + block, mask=hit, other=0)
        rank = tl.load(base + block, mask=hit, other=0) + _ones(x & (one - 1))
        _put(ids, items, counts, offset, cuts, plan, row + block, rank, entry, hit)
        loose = used & (start % WIDTH != 0)
        if tl.max(tl.max(loose.to(tl.int32), 1), 0) > 0:
            for k in tl.static_range(2):  # such a tile lies in two blocks
                block = start // WIDTH + k
                hit = loose & (block <= last)
                x = tl.load(bits + block, mask=hit, other=0)
                hit = hit & ((x & one) == 0)
                y = tl.load(odd + block, mask=hit, other=0) & ~x
                rank = tl.load(base_odd + block, mask=hit, other=0) + _ones(y & (one - 1))
                rank += tl.load(counts + (row + block) * 3 + 1, mask=hit, other=0)
                _put(ids, items, counts, offset, cuts, plan, row + block, rank, entry, hit)


def build(layout: Layout, heads: Heads, cores: int) -> InverseLists:
    """Inverse lists of a layout with `block_q` 1 and tiles alone (last stride 1), for key blocks as wide as a tile.

    heads: as `tokens_lists.heads_of` gives them. cores: multiprocessors to balance for.
    """
    tiles = layout.tiles
    assert tiles is not None
    b, _, n, m = layout.shape
    slots, lists = tiles.shape[-1], heads.lists
    kv_heads, nk, spans = b * heads.g, -(-m // layout.tile_width), -(-n // WORD)
    k, rows, shares = kv_heads * nk, lists * n, inverse.SHARES * cores
    max_items = 0 if rows <= inverse.SHORTEST else min(2 * shares, k * -(-rows // inverse.SHORTEST))

    def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=tiles.device)

    # one word more than entries, since the walk looks one entry ahead
    ids, items = empty(kv_heads * rows * min(nk, 2 * slots) + 1), empty(max(1, max_items))
    offset, counts, cuts, plan = empty(k, dtype=torch.int64), empty(k, 3), empty(k, 2), empty(2)
    step = max(1, min(kv_heads, SCRATCH // (16 * lists * spans * nk)))  # kv heads at once
    bits, odd, base, base_odd = empty(4, step * lists, spans, nk)
    loose = empty(step * lists, spans)
    plain, few = listed(layout, heads), 16 if slots <= 16 else WORD
    places = dict(first=0, rows=n, NK=nk, N=n, M=m, WIDTH=layout.tile_width, CAUSAL=layout.causal, SPAN=WORD)

    def mark(first: int) -> int:
        """Bits and counts of the kv heads from `first` on; gives their lists."""
        here = min(step, kv_heads - first)
        mark_kernel[(spans, here * lists)](
            bits=bits, odd=odd, loose=loose, shared=plan, shared_count=plan, lead0=first * lists, first=0, rows=n, NK=nk,
            width=0, least=1, SPAN=WORD, LIST=few, TILE=0, ZERO=ENTRIES, CHUNK=16, num_warps=4, **plain,
        )  # fmt: skip
        scan_kernel[(-(-nk // COLUMNS), here, 1)](
            bits, odd, loose, base, base_odd, counts[first * nk :], spans=spans, total=lists * spans, per=lists * spans,
            COLUMNS=COLUMNS, DEEP=DEEP, ODD=True, num_warps=4, **places,
        )  # fmt: skip
        return here * lists

    made = [mark(first) for first in range(0, kv_heads, step)]
    cuts_kernel[(1,)](
        counts, offset, cuts, plan, k, shares, SHORTEST=inverse.SHORTEST,
        CHUNK=min(ROW_CHUNK, max(16, triton.next_power_of_2(k))), num_warps=8,
    )  # fmt: skip
    for i, first in enumerate(range(0, kv_heads, step)):
        entries_kernel[(spans, made[i] if len(made) == 1 else mark(first))](
            bits=bits, odd=odd, base=base, base_odd=base_odd, counts=counts, offset=offset, cuts=cuts, plan=plan, ids=ids,
            items=items, lead0=first * lists, lists=lists, NK=nk, LIST=few, BITS=LIST_BITS, num_warps=warps(WORD * few),
            **plain,
        )  # fmt: skip
    return InverseLists(ids, offset, counts, cuts, items, plan, layout.tile_width, nk, lists, heads.share, max_items)
