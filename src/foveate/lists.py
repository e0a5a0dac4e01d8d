"""What a `Layout` means: rows of indices, their expansion to key ranges per query block, and masks.

`counts.py` counts pairs and blocks, `convert.py` holds conversions and mixing. All are used through `Layout`'s methods.
Nothing here allocates N x M except `to_mask` without `rows`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import LayoutError
from .kv import KV

if TYPE_CHECKING:
    from .layout import Layout

BUDGET = 1 << 20  # index elements or mask cells that one chunk of work may hold
FAR = 2**40  # beyond every entry number
NO_LIMIT = 2**30  # a window nothing is older than
RULE_FIELDS = ("sink", "window", "stride", "phase")
INDEX_FIELDS = {  # each index tensor and its counts
    "tiles": "tile_count",
    "entries": "entry_count",
    "diagonals": "diagonal_count",
    "columns": "column_count",
}


# ---------------------------------------------------------------------- small tools on rows of indices
def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of True along the last axis, ascending and packed to the left: (int32 `[..., n]`, counts int32 `[...]`).

    Rows are padded with their own last index (0 if empty). Keeps the full width, so nothing waits for the device.
    """
    n = mask.shape[-1]
    rank = mask.cumsum(-1, dtype=torch.int32)
    count = rank[..., -1] if n else mask.sum(-1, dtype=torch.int32)
    slot = torch.where(mask, rank - 1, n).long()
    index = torch.arange(n, dtype=torch.int32, device=mask.device).expand(mask.shape)
    out = torch.zeros((*mask.shape[:-1], n + 1), dtype=torch.int32, device=mask.device).scatter_(-1, slot, index)[..., :n]
    used = torch.arange(n, device=mask.device) < count[..., None]
    return torch.where(used, out, out.amax(-1, keepdim=True) if n else out), count


def trim(index: Tensor, count: Tensor) -> Tensor:
    """Cut padded rows to the longest count (one host synchronisation; memory then follows what is kept)."""
    return index[..., : max(1, int(count.max()))].contiguous() if count.numel() else index


def used_slots(index: Tensor, count: Tensor) -> Tensor:
    """bool like `index`: slots below the row's count."""
    return torch.arange(index.shape[-1], device=index.device) < count[..., None]


def sort_unique(index: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows `[B, Hl, n]` sorted ascending with duplicates dropped: (int32 rows, int32 counts)."""
    x = index.to(torch.int32)
    big = torch.iinfo(torch.int32).max
    if count is not None:
        x = torch.where(used_slots(x, count), x, big)
    x = x.sort(-1).values
    first = pad(x[..., 1:] != x[..., :-1], (1, 0), value=True) & (x != big)
    order, c = compact(first)
    return torch.gather(x, -1, order.long()).masked_fill(~(c[..., None] > 0), 0), c


def merge_diagonals(d: Tensor, count: Tensor | None, m: int, block_q: int, width: int) -> tuple[Tensor, Tensor]:
    """Distances `[B, Hl, S]` in 0..m-1 -> tile distances, ascending, covering the same keys or a few more.

    A block of rows that ends before position e reaches distance d at the keys [e-d-block_q, e-d). Seen from e, that is
    the interval (d, d + block_q] of distances x = e - key. The union of these intervals is cut, run by run, into tiles
    of `width`; the last of a run overshoots towards the past and may reach into the next one, whose stop then gives way.
    Time and scratch memory are O(M) per head, however many distances come (about 20 bytes a position and head);
    what is returned is O(tiles). One host synchronisation.
    """
    used = torch.ones_like(d, dtype=torch.bool) if count is None else used_slots(d, count)
    size = m + block_q + 1
    d = torch.where(used, d.long().clamp(0, m), size - 1)
    edge = torch.zeros((*d.shape[:-1], size + block_q), dtype=torch.int32, device=d.device)
    one = torch.ones_like(d, dtype=torch.int32)
    edge.scatter_add_(-1, d, one).scatter_add_(-1, d + block_q, -one)
    cover = (edge.cumsum(-1, dtype=torch.int32) > 0)[..., : size - 1]  # cover[x]: the interval (x, x + 1] is reached
    x = torch.arange(size - 1, dtype=torch.int32, device=d.device)
    begin = cover & ~pad(cover[..., :-1], (1, 0), value=False)
    run = torch.where(begin, x, -1).cummax(-1).values
    index, n = compact(cover & ((x - run) % width == 0))
    return trim(index, n), n


def repeat_heads(t: Tensor, h: int) -> Tensor:
    """`[B, Hl, ...]` -> `[B, h, ...]`: head i reads list i * Hl // h."""
    return t if t.shape[1] == h else t.repeat_interleave(h // t.shape[1], 1)


def same_lead(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors `[B|1, Hl, ...]` brought to one B and one Hl (the least common multiple of theirs)."""
    b, h = max(t.shape[0] for t in tensors), math.lcm(*(t.shape[1] for t in tensors))
    return tuple(repeat_heads(t, h).expand(b, *[-1] * (t.dim() - 1)) for t in tensors)


# ---------------------------------------------------------------------- expansion
@dataclass(frozen=True)
class RowLists:
    """Per query block the key ranges and single keys it reads: `[Bl, Hl, nb, T]` start and stop (empty where
    stop <= start), `[Bl, Hl, nb, C]` entries with `live` where one counts. Ranges and live entries are disjoint."""

    start: Tensor
    stop: Tensor
    entries: Tensor
    live: Tensor

    @property
    def empty(self) -> bool:
        return self.start.shape[-1] == 0 and self.entries.shape[-1] == 0


def block_ends(layout: Layout, blocks: Tensor) -> Tensor:
    """Position just after the last row of each query block, counted as if positions were entry numbers: `[Bl, nb]`.

    Diagonals count distances from here, so they need a view in text order whose positions are entry numbers.
    """
    _, _, n, m = layout.shape
    first = (m - n - layout.q_offset) if layout.q_pos is None else (layout.q_pos[:, :1].long() - layout.q_offset)
    ends = first + (blocks + 1) * layout.block_q
    return ends[None] if ends.dim() == 1 else ends


def expand(layout: Layout, lo: int, hi: int) -> RowLists:
    """Lists of the query blocks lo..hi, factored parts expanded. Costs memory for these blocks only."""
    return _expand(layout, slice(lo, hi), torch.arange(lo, hi, device=layout.device))


def expand_at(layout: Layout, blocks: Tensor) -> RowLists:
    """`expand` for any query blocks, int64 `[nb]`."""
    return _expand(layout, blocks, blocks)


def _expand(layout: Layout, pick: slice | Tensor, blocks: Tensor) -> RowLists:
    m, w, dev = layout.shape[3], layout.tile_width, layout.device
    ranges: list[tuple[Tensor, Tensor]] = []
    singles: list[tuple[Tensor, Tensor]] = []
    if layout.tiles is not None:
        assert layout.tile_count is not None
        a, count = layout.tiles[:, :, pick].long(), layout.tile_count[:, :, pick, None]
        slot = torch.arange(a.shape[-1], device=dev)
        limit = torch.where(slot == count - 1, m, pad(a[..., 1:], (0, 1), value=m))  # where the next tile starts
        stop = torch.minimum(a + w, limit).clamp(max=m)
        ranges.append((a, torch.where(slot < count, stop, a)))
    if layout.diagonals is not None:
        assert layout.diagonal_count is not None
        e = block_ends(layout, blocks)[:, None, :, None]  # [Bl, 1, nb, 1]
        d = layout.diagonals.long()[:, :, None]
        nearer = pad(d[..., :-1], (1, 0), value=-w)
        a, stop = torch.broadcast_tensors((e - d - w).clamp(0, m), torch.minimum(e - d, e - nearer - w).clamp(0, m))
        ranges.append((a, torch.where(used_slots(d, layout.diagonal_count[:, :, None]), stop, a)))
    if layout.entries is not None:
        assert layout.entry_count is not None
        x = layout.entries[:, :, pick].long()
        singles.append((x, used_slots(x, layout.entry_count[:, :, pick])))
    if layout.columns is not None:
        assert layout.column_count is not None
        c = layout.columns.long()
        ok = used_slots(c, layout.column_count) & (c < m)
        c, ok = (t[:, :, None].expand(-1, -1, len(blocks), -1) for t in (c, ok))
        if layout.diagonals is not None:
            c, ok, reached = same_lead(c, ok, _reached(layout, c, blocks))
            ok = ok & ~reached
        singles.append((c, ok))
    nothing = torch.zeros((1, 1, len(blocks), 0), dtype=torch.long, device=dev)
    start, stop = _join(ranges, (nothing, nothing))
    entries, live = _join(singles, (nothing, nothing.to(torch.bool)))
    return RowLists(start, stop, entries, live)


def _reached(layout: Layout, c: Tensor, blocks: Tensor) -> Tensor:
    """bool `[Bl, Hl, nb, C]`: columns c that lie inside a diagonal's tile of the block."""
    d = layout.diagonals.long()  # type: ignore[union-attr]
    d = torch.where(used_slots(d, layout.diagonal_count), d, FAR)  # type: ignore[arg-type]
    x = block_ends(layout, blocks)[:, None, :, None] - c  # the tile of d holds distances d < x <= d + w
    x, d = same_lead(x, d)
    d = d.contiguous()
    at = torch.searchsorted(d, x.flatten(2).contiguous()) - 1  # the last d below x
    near = torch.gather(d, -1, at.clamp(min=0)).view(x.shape)
    return (at.view(x.shape) >= 0) & (x - near <= layout.tile_width)


def _join(parts: list[tuple[Tensor, Tensor]], none: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not parts:
        return none
    if len(parts) == 1:
        return parts[0]
    first, second = (torch.cat(same_lead(*tensors), -1) for tensors in zip(*parts, strict=True))
    return first, second


def covered(layout: Layout) -> Tensor:
    """bool `[Bl, Hl, nq, C]`: used slots of `entries` whose key lies inside a tile of the same query block."""
    assert layout.entries is not None and layout.entry_count is not None
    rows = expand(replace(layout, entries=None, entry_count=None), 0, layout.num_blocks)
    start, stop, e, used = same_lead(
        rows.start, rows.stop, layout.entries.long(), used_slots(layout.entries, layout.entry_count)
    )
    if not start.shape[-1]:
        return torch.zeros_like(used)
    begin = torch.where(stop > start, start, FAR).contiguous()
    at = torch.searchsorted(begin, e.contiguous(), right=True) - 1
    return used & (at >= 0) & (torch.gather(stop, -1, at.clamp(min=0)) > e)


def drop_covered(layout: Layout) -> tuple[Tensor, Tensor]:
    """`entries` without those that lie inside a tile of the same row: (entries, counts)."""
    inside, e, used = same_lead(covered(layout), layout.entries, used_slots(layout.entries, layout.entry_count))  # type: ignore[arg-type]
    order, count = compact(used & ~inside)
    return torch.gather(e, -1, order.long()).to(torch.int32), count


# ---------------------------------------------------------------------- masks
def rule_mask(layout: Layout, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor | None:
    """Static rule on positions, broadcast over `[B, H, rows, keys]` without causality; None if there is no rule."""
    if not layout.has_rule:
        return None
    h = layout.shape[1]

    def of(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = repeat_heads(t, h)
        return (t if heads is None else t[:, heads])[..., None, None]

    sink, window, stride, phase = (of(getattr(layout, n)) for n in ("sink", "window", "stride", "phase"))
    out: Tensor | None = None
    if sink is not None:
        out = k_pos < sink
    if window is not None:
        near = (q_pos - k_pos) < window
        if not layout.causal:
            near = near & ((k_pos - q_pos) < window)
        out = near if out is None else out | near
    if stride is not None:
        step = stride.clamp(min=1)
        hit = (stride > 0) & ((k_pos // layout.tile_width) % step == (phase if phase is not None else 0) % step)
        out = hit if out is None else out | hit
    return out


def to_mask(layout: Layout, kv: KV | None = None, rows: Tensor | None = None) -> Tensor:
    b, h, n, m = layout.shape
    dev = layout.device if kv is None else kv.device
    rows = torch.arange(n, device=dev) if rows is None else _checked_rows(rows, n).to(dev)
    qp = layout.query_positions(kv).to(dev)[..., rows]  # [B, G|1, R]
    qp = repeat_heads(qp.expand(b, -1, -1), h)[..., None]
    if kv is None:
        kp, allowed = torch.arange(m, device=dev).expand(b, 1, m), torch.ones(b, 1, m, dtype=torch.bool, device=dev)
    else:
        kp, allowed = kv.positions(), kv.exists()
    kp = repeat_heads(kp, h)[..., None, :]
    allowed = repeat_heads(allowed, h)[..., None, :].expand(b, h, len(rows), m)
    if layout.causal:
        allowed = allowed & (kp <= qp)
    if layout.full:
        return allowed.clone()
    rule = rule_mask(layout, qp, kp)
    named = torch.zeros_like(allowed) if rule is None else rule.expand(b, h, len(rows), m).clone()
    if layout.has_lists:
        blocks, which = torch.unique((rows + layout.q_offset) // layout.block_q, return_inverse=True)
        step = max(1, BUDGET // (h * m))
        for lo in range(0, len(blocks), step):
            mine = ((which >= lo) & (which < lo + step)).nonzero()[:, 0]
            painted = paint(expand_at(layout, blocks[lo : lo + step].to(layout.device)), m).to(dev)
            named[:, :, mine] |= repeat_heads(painted, h)[:, :, which[mine] - lo]
    return named & allowed


def paint(rows: RowLists, m: int) -> Tensor:
    """bool `[Bl, Hl, nb, M]`: the keys that lists name, whatever is visible."""
    start, stop, entries, live = same_lead(rows.start, rows.stop, rows.entries, rows.live)
    edge = torch.zeros(*start.shape[:3], m + 1, dtype=torch.int32, device=start.device)
    there = (stop > start).int()
    edge.scatter_add_(-1, torch.where(there > 0, start, m), there)
    edge.scatter_add_(-1, torch.where(there > 0, stop, m), -there)
    hit = edge.cumsum(-1, dtype=torch.int32) > 0
    hit.scatter_(-1, torch.where(live, entries, m), True)
    return hit[..., :m]


def _checked_rows(rows: Tensor, n: int) -> Tensor:
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise LayoutError(f"rows: expected int64 [R], got {rows.dtype} {list(rows.shape)}")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < n:
        raise LayoutError(f"rows: expected query rows 0 to {n - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows.long()
