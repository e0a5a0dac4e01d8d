"""Conversions of a `Layout` from and to other formats, its inverse for backward passes, and mixing by head.

Used through `Layout`'s methods; `cls` is Layout itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .counts import list_width, tight, to_block_mask
from .errors import LayoutError
from .lists import BUDGET, INDEX_FIELDS, NO_LIMIT, RULE_FIELDS, compact, expand, repeat_heads, same_lead, used_slots

if TYPE_CHECKING:
    from .layout import Layout


# ---------------------------------------------------------------------- CSR
def to_csr(layout: Layout) -> tuple[Tensor, Tensor]:
    b, h, _, _ = layout.shape
    others = [n for n in ("entries", "diagonals", "columns") if getattr(layout, n) is not None]
    if layout.tiles is None or others or layout.has_rule:
        have = ", ".join((["tiles"] if layout.tiles is not None else []) + others + ["a rule"] * layout.has_rule) or "none"
        raise LayoutError(f"to_csr: expected a layout of tiles only, got {have}")
    used = used_slots(layout.tiles, layout.tile_count)  # type: ignore[arg-type]
    if bool((used & (layout.tiles % layout.tile_width != 0)).any()):
        raise LayoutError(f"to_csr: expected tiles aligned to {layout.tile_width}")
    tiles = repeat_heads(layout.tiles, h).expand(b, -1, -1, -1)
    used = repeat_heads(used, h).expand(b, -1, -1, -1)
    indptr = pad(used.sum(-1).flatten().cumsum(0), (1, 0))
    return indptr, (tiles[used] // layout.tile_width).to(torch.int32)


def from_csr(
    cls: Any, indptr: Tensor, ids: Tensor, shape: tuple[int, ...], block_q: int, block_k: int, **plain: Any
) -> Layout:
    b, h, n, _ = shape
    nq = -(-(n + plain.get("q_offset", 0)) // block_q)
    if indptr.dim() != 1 or indptr.numel() != b * h * nq + 1:
        raise LayoutError(f"indptr: expected B*H*nq + 1 = {b * h * nq + 1} row pointers, got {list(indptr.shape)}")
    count = indptr[1:] - indptr[:-1]
    if int(indptr[0]) != 0 or bool((count < 0).any()) or int(indptr[-1]) != ids.numel():
        raise LayoutError(
            f"indptr: expected pointers that rise from 0 to the {ids.numel()} ids, got {indptr.tolist()[:8]}..."
        )
    width = max(1, int(count.max()))
    at = indptr[:-1, None] + torch.arange(width, device=ids.device)
    used = torch.arange(width, device=ids.device) < count[:, None]
    tiles = torch.zeros(at.shape, dtype=torch.int32, device=ids.device)
    tiles[used] = (ids * block_k).to(torch.int32)
    return cls(
        tuple(shape),
        block_q=block_q,
        tile_width=block_k,
        tiles=tiles.view(b, h, nq, width),
        tile_count=count.to(torch.int32).view(b, h, nq),
        **plain,
    )


# ---------------------------------------------------------------------- torch BlockMask
def from_torch_block_mask(cls: Any, bm: Any, h: int, causal: bool) -> Layout:
    (n, m), (bq, bk) = bm.seq_lengths, bm.BLOCK_SIZE
    nk = -(-m // bk)
    mask = torch.zeros(*bm.kv_num_blocks.shape, nk + 1, dtype=torch.bool, device=bm.kv_num_blocks.device)
    for num, idx in ((bm.kv_num_blocks, bm.kv_indices), (bm.full_kv_num_blocks, bm.full_kv_indices)):
        if num is not None:
            mask.scatter_(-1, torch.where(used_slots(idx, num), idx, nk).long(), True)
    return cls.from_block_mask(mask[..., :nk], n, m, block_q=bq, block_k=bk, heads=h, causal=causal)


def to_torch_block_mask(layout: Layout, block: int) -> object:
    from torch.nn.attention.flex_attention import BlockMask

    _, _, n, m = layout.shape
    index, count = compact(to_block_mask(layout, block, block))
    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=block, mask_mod=mask_mod(layout), seq_lengths=(n, m))


def mask_mod(layout: Layout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`mask_mod(b, h, q, k)` for FlexAttention, exact: the rule is evaluated and lists are searched, so that it holds
    the lists themselves and nothing of size N x M. For default positions (`kv.pos` and `kv.len` None)."""
    _, heads, n, m = layout.shape
    first = None if layout.q_pos is None else layout.q_pos.long()

    def pick(t: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (b if t.shape[0] > 1 else torch.zeros_like(b)), h * t.shape[1] // heads

    def last_at_most(t: Tensor, count: Tensor, lead: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        """Binary search in the row t[lead]: (its last value <= x, whether there is one)."""
        lo, hi = torch.zeros_like(x), count[lead].long()  # values below lo are <= x, those from hi on are not
        for _ in range(t.shape[-1].bit_length()):
            mid = (lo + hi) // 2
            up = (lo < hi) & (t[(*lead, mid.clamp(max=t.shape[-1] - 1))] <= x)
            lo, hi = torch.where(up, mid + 1, lo), torch.where(up, hi, mid)
        return t[(*lead, (lo - 1).clamp(min=0))], lo > 0

    def exact(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = m - n + q if first is None else first[b, q]
        visible = (k <= at) if layout.causal else (k >= 0)
        if layout.full:
            return visible
        named = k < 0
        blk = (q + layout.q_offset) // layout.block_q
        w = layout.tile_width

        def rule(t: Tensor) -> Tensor:
            return t[pick(t, b, h)]

        if layout.sink is not None:
            named = named | (k < rule(layout.sink))
        if layout.window is not None:
            near = at - k < rule(layout.window)
            named = named | (near if layout.causal else near & (k - at < rule(layout.window)))
        if layout.stride is not None:
            step = rule(layout.stride)
            phase = rule(layout.phase) if layout.phase is not None else torch.zeros_like(step)
            named = named | ((step > 0) & ((k // w) % step.clamp(min=1) == phase % step.clamp(min=1)))
        if layout.tiles is not None:
            near, there = last_at_most(layout.tiles, layout.tile_count, (*pick(layout.tiles, b, h), blk), k)  # type: ignore[arg-type]
            named = named | (there & (k - near < w))
        if layout.entries is not None:
            near, there = last_at_most(layout.entries, layout.entry_count, (*pick(layout.entries, b, h), blk), k)  # type: ignore[arg-type]
            named = named | (there & (near == k))
        if layout.diagonals is not None:
            start = m - n if first is None else first[b, 0]
            x = start - layout.q_offset + (blk + 1) * layout.block_q - 1 - k
            near, there = last_at_most(layout.diagonals, layout.diagonal_count, pick(layout.diagonals, b, h), x)  # type: ignore[arg-type]
            named = named | (there & (x - near < w))
        if layout.columns is not None:
            near, there = last_at_most(layout.columns, layout.column_count, pick(layout.columns, b, h), k)  # type: ignore[arg-type]
            named = named | (there & (near == k))
        return named & visible

    return exact


# ---------------------------------------------------------------------- inverse
@dataclass(frozen=True)
class Inverse:
    """Who reads a key: per list head and aligned key tile, the query blocks that list a key of it, ascending.

    Attributes:
        indptr: int64 `[Bl * Hl * num_tiles + 1]`, ids: int32, query block numbers, rows in order (b, list head, tile).
        num_tiles: key tiles of `tile_width` keys, ceil(M / tile_width).
        lead: (Bl, Hl) of the lists: 1 or B, and a divisor of H.
        entry_indptr, entry_ids: the same for single keys, `[Bl * Hl * M + 1]`, or None without entries and columns.
    """

    indptr: Tensor
    ids: Tensor
    num_tiles: int
    lead: tuple[int, int]
    entry_indptr: Tensor | None = None
    entry_ids: Tensor | None = None


def inverse(layout: Layout) -> Inverse:
    """Stable sorts of (key tile, query block) pairs, some query blocks at a time: deterministic on every device."""
    m, w, nq = layout.shape[3], layout.tile_width, layout.num_blocks
    nk = -(-m // w)
    tiles: list[tuple[Tensor, Tensor]] = []
    singles: list[tuple[Tensor, Tensor]] = []
    lead = (1, 1)
    layout = tight(layout)
    step = max(1, BUDGET // list_width(layout))
    for lo in range(0, nq if layout.has_lists else 0, step):
        hi = min(nq, lo + step)
        start, stop, entries, live = same_lead(*vars(expand(layout, lo, hi)).values())
        lead = (start.shape[0], start.shape[1])
        head = torch.arange(lead[0] * lead[1], device=layout.device).view(*lead, 1, 1)
        block = torch.arange(lo, hi, device=layout.device)[:, None]
        there, low, high = stop > start, start // w, (stop - 1) // w
        # A range is at most one tile wide, so it reaches into one or two key tiles; two ranges of a block may share one.
        low, high = (head * nk + t for t in (low, high))
        pair = torch.cat([low[there], high[there & (high > low)]])
        blk = torch.cat([block.expand_as(low)[there], block.expand_as(low)[there & (high > low)]])
        code = torch.unique(pair * nq + blk)
        tiles.append((code // nq, code % nq))
        if entries.shape[-1]:
            singles.append(((head * m + entries)[live], block.expand_as(entries)[live]))
    none = torch.zeros(0, dtype=torch.long, device=layout.device)
    rows = lead[0] * lead[1]
    indptr, ids = _by_key(tiles or [(none, none)], rows * nk, nq)
    out = Inverse(indptr, ids, nk, lead)
    if singles:
        indptr, ids = _by_key(singles, rows * m, nq)
        out = replace(out, entry_indptr=indptr, entry_ids=ids)
    return out


def _by_key(pairs: list[tuple[Tensor, Tensor]], size: int, nq: int) -> tuple[Tensor, Tensor]:
    """CSR by key of distinct (key, query block) pairs."""
    key, block = (torch.cat(t) for t in zip(*pairs, strict=True))
    order = torch.argsort(key * nq + block)
    return pad(torch.bincount(key, minlength=size).cumsum(0), (1, 0)), block[order].to(torch.int32)


# ---------------------------------------------------------------------- mixing
def by_head(mask: Tensor, a: Layout, b: Layout) -> Layout:
    bn, h, n, m = a.shape
    if a.shape != b.shape or a.causal != b.causal:
        raise LayoutError(f"by_head: expected one shape and causality, got {a.shape}, {a.causal} and {b.shape}, {b.causal}")
    if mask.dim() not in (1, 2) or mask.shape[-1] != h or (mask.dim() == 2 and mask.shape[0] not in (1, bn)):
        raise LayoutError(f"mask: expected [H] or [B, H] = [{bn}, {h}], got {list(mask.shape)}")
    if a.q_pos is not b.q_pos and (a.q_pos is None or b.q_pos is None or not torch.equal(a.q_pos, b.q_pos)):
        raise LayoutError("by_head: expected the same q_pos on both sides")
    if a.full and b.full:
        return a
    device = (b if a.full else a).device  # a full layout holds no tensors
    mask = mask.to(device, torch.bool).view(-1, h)
    sides = [_as_rule(side, device) for side in (a, b)]
    block_q, q_offset, tile_width = _one_grid(sides)
    out: dict[str, Tensor] = {}
    for name in RULE_FIELDS:
        x, y = (getattr(side, name) for side in sides)
        if x is not None or y is not None:
            off = torch.zeros(1, 1, dtype=torch.int32, device=device)
            x, y = (repeat_heads(off if t is None else t, h) for t in (x, y))
            out[name] = torch.where(mask, x, y)
    for name, count in INDEX_FIELDS.items():
        pairs = [(getattr(side, name), getattr(side, count)) for side in sides]
        like = next((p for p in pairs if p[0] is not None), None)
        if like is None:
            continue
        (x, cx), (y, cy) = ((torch.zeros_like(like[0]), torch.zeros_like(like[1])) if p[0] is None else p for p in pairs)
        width = max(x.shape[-1], y.shape[-1])
        x, y = (repeat_heads(pad(t, (0, width - t.shape[-1])), h) for t in (x, y))
        cx, cy = (repeat_heads(t, h) for t in (cx, cy))
        pick = mask.view(*mask.shape, *[1] * (x.dim() - 2))
        out[name], out[count] = torch.where(pick, x, y), torch.where(pick[..., 0], cx, cy)
    plain = dict(causal=a.causal, block_q=block_q, q_offset=q_offset, tile_width=tile_width, q_pos=a.q_pos)
    return type(a)(a.shape, **plain, **out)


def _as_rule(side: Layout, device: torch.device) -> Layout:
    """A full side as a window without limit, so that it can stand beside rules and lists."""
    if not side.full:
        return side
    return replace(side, full=False, window=torch.full((1, 1), NO_LIMIT, dtype=torch.int32, device=device))


def _one_grid(sides: list[Layout]) -> tuple[int, int, int]:
    """(block_q, q_offset, tile_width) that serves both sides. A rule alone follows any grid of query blocks, lists fix
    it; tiles, diagonals and strides fix the width of a key tile."""
    listed = [side for side in sides if side.has_lists]
    grid = {(side.block_q, side.q_offset) for side in listed}
    width = {s.tile_width for s in sides if s.tiles is not None or s.diagonals is not None or s.stride is not None}
    if len(grid) > 1:
        raise LayoutError(f"by_head: expected one grid of query blocks, got (block_q, q_offset) = {sorted(grid)}")
    if len(width) > 1:
        raise LayoutError(f"by_head: expected one tile_width for tiles, diagonals and strides, got {sorted(width)}")
    side = max(listed or sides, key=lambda s: s.block_q)
    return side.block_q, side.q_offset, width.pop() if width else side.tile_width
