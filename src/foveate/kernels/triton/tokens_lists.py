"""Lists of tokens turned round on the device: who reads a key block, and what neighbouring tokens share.

Every token has a list of its own (`block_q` 1). Tokens go through in chunks; for several chunks at once this builds, in
four launches and without host synchronisation,

- shared lists: per tile of neighbouring tokens the key blocks that at least `least` of them name. The tile walks them
  together, so their keys are read once. Blocks that a tile of the layout names only in part go there as well;
- inverse lists: per chunk and key block all other (token, slot) pairs that name it, ascending, cut into items of about
  equal length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...layout import Layout
from .tokens_bits import fill_kernel, mark_kernel, plan_kernel, scan_kernel

SLOTS = 254  # longest list of a token
WORD = 32  # tokens of a word of bits
ENTRIES = 1024  # list entries, or words of bits, that a program holds at once
COLUMNS, DEEP = 32, 64  # key blocks and spans that `scan_kernel` holds at once
ROW_CHUNK = 4096  # key blocks that `plan_kernel` holds at once
ITEM = 3  # words of an item


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
    """Shared and inverse lists of some chunks. NK: key blocks that these tokens may see; K = leads * NK.

    Attributes:
        shared: int32 `[leads, tiles, width]`, block numbers: those without any cut ascend from the front, those that
            causality or a tile's edge cuts follow from the back. Tiles of all chunks, `size / tile` a chunk.
        shared_count: int32 `[leads, tiles, 2]`, numbers of both.
        ids: int32 `[chunks * room]`, token of the chunk << 8 | slot, ascending within a list.
        counts, offset: int32 `[chunks, K]`, entries of a key block and where they begin in `ids`.
        items: int32 `[chunks, max_items, 3]`, (lead * NK + key block, where its ids begin, where they end).
        plan: int32 `[chunks]`, items in use.
        present: int32 `[leads, tokens, words]`, bit s of a token: its slot s gets a partial result, of a block or, in
            the last slot, of its tile. Tokens of all chunks, rounded up to spans.
        chunks: (first token, tokens) of each chunk. size: tokens of a whole one (a multiple of the tile).
        blocks, max_items, tile: NK, bound of the items of a chunk, tokens of a tile.
    """

    shared: Tensor
    shared_count: Tensor
    ids: Tensor
    counts: Tensor
    offset: Tensor
    items: Tensor
    plan: Tensor
    present: Tensor
    chunks: list[tuple[int, int]]
    size: int
    blocks: int
    max_items: int
    tile: int


def heads_of(layout: Layout, g: int) -> Heads:
    """How the lists of a layout spread over g kv heads."""
    assert layout.tiles is not None
    b, h, _, _ = layout.shape
    given = layout.tiles.shape[1]
    lists = given // g if given % g == 0 else 1 if g % given == 0 else h // g
    return Heads(b * g * lists, lists, h // (g * lists), h, g)


def listed(layout: Layout, heads: Heads) -> dict[str, object]:
    """What all kernels that read the lists of a layout (last stride 1) take of it."""
    tiles, count = layout.tiles, layout.tile_count
    assert tiles is not None and count is not None
    many = tiles.shape[0] > 1
    s, c = tiles.stride(), count.stride()
    return dict(
        tiles=tiles, count=count, sb=s[0] * many, st=s[1], sq=s[2], cb=c[0] * many, ch=c[1], cq=c[2],
        LISTS=heads.g * heads.lists, SHARE=heads.share, H=heads.h, HL=tiles.shape[1], N=layout.shape[2], M=layout.shape[3],
        T=tiles.shape[-1], WIDTH=layout.tile_width, CAUSAL=layout.causal,
    )  # fmt: skip


def slot_words(slots: int) -> int:
    """Words of `present` for tokens of so many list slots and that of shared blocks."""
    return slots // WORD + 1


def warps(entries: int) -> int:
    """Warps of a program that holds so many list entries: four entries a thread."""
    return min(16, max(4, entries // (4 * 32)))


def reach(layout: Layout, tile: int, blocks: int) -> int:
    """Most blocks that a tile of tokens can share."""
    assert layout.tiles is not None
    return min(blocks, 2 * tile * layout.tiles.shape[-1])


def token_bytes(layout: Layout, heads: Heads, tile: int) -> int:
    """About how many bytes the lists of a token take, those of all heads together."""
    assert layout.tiles is not None
    blocks, slots = -(-layout.shape[3] // layout.tile_width), layout.tiles.shape[-1]
    return heads.leads * (blocks // 4 + 4 * (slots + slot_words(slots) + reach(layout, tile, blocks) // tile + 1))


def build(
    layout: Layout, heads: Heads, chunks: list[tuple[int, int]], size: int, *, tile: int, least: int, piece: int, step: int
) -> TokenLists:
    """Lists of some chunks that follow each other.

    Args:
        layout: tiles only, last stride 1, `block_q` 1, `tile_width` a power of two, at most SLOTS tiles a token.
        chunks: (first token, tokens) of each. size: tokens of all but the last, a multiple of 32 and of `tile`.
        tile: neighbouring tokens that walk shared blocks together, a power of two.
        least: tokens of a tile that must name a block to share it; 1 shares all, more than `tile` none.
        piece, step: entries of the longest item, those that its kernel takes at once.
    """
    tiles = layout.tiles
    assert tiles is not None
    _, _, n, m = layout.shape
    first, rows = chunks[0][0], sum(r for _, r in chunks)
    slots, words = tiles.shape[-1], slot_words(tiles.shape[-1])
    seen = max(0, min(m, m - n + first + rows)) if layout.causal else m
    nk = max(1, -(-seen // layout.tile_width))
    k = heads.leads * nk
    span = max(WORD, tile)
    spans, per = -(-rows // span), size // span
    width = reach(layout, tile, nk)
    max_items = -(-heads.leads * min(size, rows) * slots // piece) + k
    room = heads.leads * min(size, rows) * slots

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=tiles.device)

    bits, base = empty(2, heads.leads, spans, nk, span // WORD)
    shared, shared_count = empty(heads.leads, spans * (span // tile), width), empty(heads.leads, spans * (span // tile), 2)
    counts, offset, begin = empty(3, len(chunks), k)
    ids, items, plan = empty(len(chunks) * room), empty(len(chunks), max_items, ITEM), empty(len(chunks))
    present, loose = empty(heads.leads, spans * span, words), empty(heads.leads, spans)
    plain = listed(layout, heads) | dict(first=first, rows=rows, NK=nk, SPAN=span)
    few = 16 if slots <= 16 else WORD
    mark_kernel[(spans, heads.leads)](
        bits=bits, odd=base, loose=loose, shared=shared, shared_count=shared_count, lead0=0, width=width, least=least,
        TILE=tile, LIST=few, ZERO=ENTRIES, CHUNK=min(triton.next_power_of_2(max(16, nk)), ENTRIES * tile // span),
        num_warps=4, **plain,
    )  # fmt: skip
    places = dict(first=first, rows=rows, NK=nk, N=n, M=m, WIDTH=layout.tile_width, CAUSAL=layout.causal, SPAN=span)
    scan_kernel[(-(-nk // COLUMNS), heads.leads, len(chunks))](
        bits, base, loose, base, base, counts, spans=spans, total=spans, per=per, COLUMNS=COLUMNS, DEEP=DEEP, ODD=False,
        num_warps=4, **places,
    )  # fmt: skip
    pieces = dict(PIECE=piece, STEP=step)
    plan_kernel[(len(chunks),)](
        counts, offset, begin, plan, k, room, CHUNK=min(ROW_CHUNK, triton.next_power_of_2(max(16, k))), num_warps=8, **pieces
    )
    fill_kernel[(spans, heads.leads)](
        bits=bits, base=base, counts=counts, offset=offset, begin=begin, ids=ids, items=items, present=present, size=size,
        max_items=max_items, LIST=few, SLOT_WORDS=words, num_warps=warps(span * few), **pieces, **plain,
    )  # fmt: skip
    return TokenLists(shared, shared_count, ids, counts, offset, items, plan, present, chunks, size, nk, max_items, tile)
