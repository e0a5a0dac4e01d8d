"""What a `Layout` means: expansion to per-block lists, counts, masks and conversions. Used through `Layout`'s methods.

Nothing here allocates N x M except `to_mask` and what says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import LayoutError
from .kv import KV

if TYPE_CHECKING:
    from .layout import Layout


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


def sort_unique(index: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows `[B, Hl, n]` sorted ascending with duplicates dropped: (int32 rows, int32 counts)."""
    n = index.shape[-1]
    x = index.to(torch.int32)
    big = torch.iinfo(torch.int32).max
    if count is not None:
        x = torch.where(torch.arange(n, device=x.device) < count[..., None], x, big)
    x = x.sort(-1).values
    first = pad(x[..., 1:] != x[..., :-1], (1, 0), value=True) & (x != big)
    order, c = compact(first)
    return torch.gather(x, -1, order.long()).masked_fill(~(c[..., None] > 0), 0), c


def merge_diagonals(d: Tensor, count: Tensor | None, m: int, block_q: int, width: int) -> tuple[Tensor, Tensor]:
    """Distances `[B, Hl, S]` in 0..m -> tile distances, ascending, covering the same keys or a few more.

    A block of rows that ends before position e reaches distance d at the keys [e-d-block_q, e-d). Seen from e, that is
    the interval (d, d + block_q] of distances x = e - key. The union of these intervals is cut, run by run, into tiles
    of `width`; the last of a run overshoots towards the past and may reach into the next one, whose stop then gives way.
    """
    s = d.shape[-1]
    used = torch.ones_like(d, dtype=torch.bool) if count is None else torch.arange(s, device=d.device) < count[..., None]
    size = m + block_q + 1
    d = torch.where(used, d.long().clamp(0, m), size - 1)
    edge = torch.zeros((*d.shape[:-1], size + block_q), dtype=torch.int32, device=d.device)
    one = torch.ones_like(d, dtype=torch.int32)
    edge.scatter_add_(-1, d, one).scatter_add_(-1, d + block_q, -one)
    cover = (edge.cumsum(-1) > 0)[..., : size - 1]  # cover[x]: the interval (x, x + 1] is reached
    x = torch.arange(size - 1, device=d.device)
    begin = cover & ~pad(cover[..., :-1], (1, 0), value=False)
    run = torch.where(begin, x, -1).cummax(-1).values
    index, n = compact(cover & ((x - run) % width == 0))
    return trim(index, n), n


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
    """Position just after the last row of each query block, counted as if positions were entry numbers: `[Bl, nb]`."""
    _, _, n, m = layout.shape
    first = (m - n - layout.q_offset) if layout.q_pos is None else (layout.q_pos[:, :1].long() - layout.q_offset)
    ends = first + (blocks + 1) * layout.block_q
    return ends[None] if ends.dim() == 1 else ends


def expand(layout: Layout, lo: int, hi: int) -> RowLists:
    """Lists of the query blocks lo..hi, factored parts expanded. Costs memory for these blocks only."""
    m, w, dev = layout.shape[3], layout.tile_width, layout.device
    blocks = torch.arange(lo, hi, device=dev)
    starts: list[Tensor] = []
    stops: list[Tensor] = []
    singles: list[Tensor] = []
    lives: list[Tensor] = []
    if layout.tiles is not None:
        a = layout.tiles[:, :, lo:hi].long()
        nxt = pad(a[..., 1:], (0, 1), value=m)
        count = layout.tile_count[:, :, lo:hi, None]  # type: ignore[index]
        used = torch.arange(a.shape[-1], device=dev) < count
        last = torch.arange(a.shape[-1], device=dev) == count - 1
        b = torch.minimum(a + w, torch.where(last, m, nxt)).clamp(max=m)
        starts.append(a)
        stops.append(torch.where(used, b, a))
    if layout.diagonals is not None:
        e = block_ends(layout, blocks)[:, None, :, None]  # [Bl, 1, nb, 1]
        d = layout.diagonals.long()[:, :, None, :]
        b = torch.minimum(e - d, e - pad(d[..., :-1], (1, 0), value=-w) - w)
        used = (torch.arange(d.shape[-1], device=dev) < layout.diagonal_count[..., None, None]).expand(  # type: ignore[index]
            *torch.broadcast_shapes(b.shape, d.shape)
        )
        a = (e - d - w).clamp(0, m).expand(used.shape)
        starts.append(a)
        stops.append(torch.where(used, b.clamp(0, m).expand(used.shape), a))
    if layout.entries is not None:
        e_ = layout.entries[:, :, lo:hi].long()
        singles.append(e_)
        lives.append(torch.arange(e_.shape[-1], device=dev) < layout.entry_count[:, :, lo:hi, None])  # type: ignore[index]
    if layout.columns is not None:
        c = layout.columns.long()[:, :, None, :]
        ok = torch.arange(c.shape[-1], device=dev) < layout.column_count[..., None, None]  # type: ignore[index]
        c, ok = torch.broadcast_tensors(c, ok)
        c = c.expand(-1, -1, hi - lo, -1)
        ok = ok.expand(c.shape)
        if layout.diagonals is not None:
            ends = block_ends(layout, blocks)[:, None, :, None]
            x = ends - c  # distance interval (d, d + w] <-> covered
            d = layout.diagonals.long()
            d = torch.where(torch.arange(d.shape[-1], device=dev) < layout.diagonal_count[..., None], d, 2**40)  # type: ignore[index]
            bl = max(x.shape[0], d.shape[0])
            x = x.expand(bl, -1, -1, -1)
            flat = x.reshape(bl, x.shape[1], -1).contiguous()
            d = d.expand(bl, x.shape[1], -1).contiguous()
            at = torch.searchsorted(d, flat) - 1  # last d strictly below x
            near = torch.gather(d, -1, at.clamp(min=0))
            hit = ((at >= 0) & (flat - near <= w)).view(x.shape)
            c, ok = c.expand(x.shape), ok.expand(x.shape) & ~hit
        ok = ok & (c < m)
        singles.append(c)
        lives.append(ok)
    shape = (1, 1, hi - lo, 0)
    none = torch.zeros(shape, dtype=torch.long, device=dev)
    return RowLists(_join(starts, none), _join(stops, none), _join(singles, none), _join(lives, none.to(torch.bool)))


def _join(parts: list[Tensor], none: Tensor) -> Tensor:
    if not parts:
        return none
    if len(parts) == 1:
        return parts[0]
    b = max(p.shape[0] for p in parts)
    h = max(p.shape[1] for p in parts)
    return torch.cat([repeat_heads(p, h).expand(b, -1, -1, -1) for p in parts], -1)


def repeat_heads(t: Tensor, h: int) -> Tensor:
    """`[B, Hl, ...]` -> `[B, h, ...]`: head i reads list i * Hl // h."""
    return t if t.shape[1] == h else t.repeat_interleave(h // t.shape[1], 1)


def drop_covered(layout: Layout) -> tuple[Tensor, Tensor]:
    """`entries` without those that lie inside a tile of the same row: (entries, counts)."""
    rows = expand(replace(layout, entries=None, entry_count=None), 0, layout.num_blocks)
    h = max(layout.tiles.shape[1], layout.entries.shape[1])  # type: ignore[union-attr]
    b = max(layout.tiles.shape[0], layout.entries.shape[0])  # type: ignore[union-attr]
    start, stop = (repeat_heads(t, h).expand(b, -1, -1, -1) for t in (rows.start, rows.stop))
    e = repeat_heads(layout.entries.long(), h).expand(b, -1, -1, -1)  # type: ignore[union-attr]
    used = torch.arange(e.shape[-1], device=e.device) < repeat_heads(layout.entry_count, h)[..., None]  # type: ignore[arg-type]
    big = torch.where(stop > start, start, 2**40).contiguous()
    at = torch.searchsorted(big, e.contiguous(), right=True) - 1
    inside = (at >= 0) & (torch.gather(stop, -1, at.clamp(min=0)) > e)
    order, count = compact(used & ~inside)
    return torch.gather(e, -1, order.long()).to(torch.int32), count


# ---------------------------------------------------------------------- the rule
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


def to_mask(layout: Layout, kv: KV | None = None) -> Tensor:
    b, h, n, m = layout.shape
    dev = layout.device if kv is None else kv.device
    qp = layout.query_positions(kv).to(dev)  # [B, G|1, N]
    qp = repeat_heads(qp.expand(b, -1, -1), h)[..., None]
    if kv is None:
        kp = torch.arange(m, device=dev).expand(b, 1, m)
        exists = torch.ones(b, 1, m, dtype=torch.bool, device=dev)
    else:
        kp, exists = kv.positions(), kv.exists()
    kp = repeat_heads(kp, h)[..., None, :]
    allowed = repeat_heads(exists, h)[..., None, :].expand(b, h, n, m)
    if layout.causal:
        allowed = allowed & (kp <= qp)
    if layout.full:
        return allowed.clone()
    named = torch.zeros(b, h, n, m, dtype=torch.bool, device=dev)
    rule = rule_mask(layout, qp, kp)
    if rule is not None:
        named |= rule
    if layout.has_lists:
        key = torch.arange(m, device=dev)
        for blk in range(layout.num_blocks):
            r0, r1 = block_rows(layout, blk)
            rows = expand(layout, blk, blk + 1)
            hit = torch.zeros(*rows.start.shape[:2], m, dtype=torch.bool, device=dev)
            for t in range(rows.start.shape[-1]):
                hit |= (key >= rows.start[:, :, 0, t, None]) & (key < rows.stop[:, :, 0, t, None])
            if rows.entries.shape[-1]:
                bl, hl = torch.broadcast_shapes(rows.entries.shape[:2], rows.start.shape[:2])
                one = torch.zeros(*rows.entries.shape[:2], m + 1, dtype=torch.bool, device=dev)
                one.scatter_(2, torch.where(rows.live, rows.entries, m)[:, :, 0], True)
                hit = hit.expand(bl, hl, m) | one[..., :m]
            named[:, :, r0:r1] |= repeat_heads(hit, h)[:, :, None]
    return named & allowed


def block_rows(layout: Layout, blk: int) -> tuple[int, int]:
    """Rows [r0, r1) of this call that lie in query block `blk`."""
    r0 = max(0, blk * layout.block_q - layout.q_offset)
    return r0, min(layout.shape[2], (blk + 1) * layout.block_q - layout.q_offset)


# ---------------------------------------------------------------------- counting
def visible_pairs(layout: Layout) -> int:
    """Pairs of one head that dense attention computes."""
    _, _, n, m = layout.shape
    if not layout.causal:
        return n * m
    if layout.q_pos is not None:
        return int((layout.q_pos[0].long() + 1).clamp(max=m).sum())
    return n * (m - n) + n * (n + 1) // 2 if m >= n else m * (m + 1) // 2


def count_pairs(layout: Layout) -> Tensor:
    """int64 `[B, H]`. Closed form over the lists where there is one, a mask otherwise (decode, odd mixtures)."""
    b, h, n, m = layout.shape
    simple = layout.causal and layout.stride is None
    if layout.full:
        return torch.full((b, h), visible_pairs(layout), dtype=torch.int64)
    if not simple or n * m <= 1 << 16:
        return to_mask(layout).sum((-1, -2))
    dev = layout.device
    q_pos = torch.arange(m - n, m, device=dev)[None] if layout.q_pos is None else layout.q_pos.to(dev).long()
    sink = layout.sink.long() if layout.sink is not None else torch.zeros(1, 1, dtype=torch.long, device=dev)
    window = layout.window.long() if layout.window is not None else torch.zeros(1, 1, dtype=torch.long, device=dev)
    sink, window = torch.broadcast_tensors(sink, window)
    seen = q_pos[:, None, :] + 1
    s, w = torch.minimum(sink[..., None], seen), torch.minimum(window[..., None], seen)
    total = (s + w - (s - (seen - w)).clamp(min=0)).sum(-1)  # [Bl, Hl]
    step = max(1, (1 << 22) // max(1, _width(layout)))
    for lo in range(0, layout.num_blocks if layout.has_lists else 0, step):
        hi = min(layout.num_blocks, lo + step)
        rows = expand(layout, lo, hi)
        r0 = torch.tensor([block_rows(layout, i)[0] for i in range(lo, hi)], device=dev)
        r1 = torch.tensor([block_rows(layout, i)[1] for i in range(lo, hi)], device=dev)
        first = q_pos[:, r0][:, None, :, None]
        num = (r1 - r0)[None, None, :, None]
        for a, z in ((rows.start, rows.stop), (rows.entries, rows.entries + rows.live.long())):
            if not a.shape[-1]:
                continue
            hl = torch.broadcast_shapes(a.shape[:2], sink.shape[:2])[1]
            sk, wn = (repeat_heads(x, hl)[..., None, None] for x in (sink, window))
            a, z = repeat_heads(a, hl), repeat_heads(z, hl)
            a = torch.maximum(a, sk)
            y0 = first + 1 - wn - a
            span = (z - a).clamp(min=0)
            got = (_ramp(y0 + num - 1, span) - _ramp(y0 - 1, span)).sum((-1, -2))
            th = torch.broadcast_shapes(total.shape, got.shape)[1]
            total = repeat_heads(total, th) + repeat_heads(got, th)
    return repeat_heads(total, h).expand(b, h)


def _ramp(y: Tensor, w: Tensor) -> Tensor:
    """Sum of min(max(t, 0), w) over t <= y."""
    y = y.clamp(min=0)
    low = torch.minimum(y, w)
    return low * (low + 1) // 2 + (y - low) * w


def _width(layout: Layout) -> int:
    index = [getattr(layout, n) for n in ("tiles", "entries", "diagonals", "columns")]
    return sum(t.shape[1] * t.shape[-1] for t in index if t is not None)


def computed_pairs(layout: Layout, tiling: tuple[int, int] | None) -> int:
    """Pairs computed over all batch rows and heads by a kernel with this tiling (None: walks the lists as they are)."""
    b, h, n, m = layout.shape
    if layout.full:
        return visible_pairs(layout) * b * h
    if tiling is not None:
        bq, bk = tiling
        touched = layout.to_block_mask(bq, bk)
        return int(touched.sum()) * bq * bk
    total = 0
    step = max(1, (1 << 22) // max(1, _width(layout)))
    for lo in range(0, layout.num_blocks if layout.has_lists else 0, step):
        hi = min(layout.num_blocks, lo + step)
        rows = expand(layout, lo, hi)
        num = torch.tensor(
            [block_rows(layout, i)[1] - block_rows(layout, i)[0] for i in range(lo, hi)], device=layout.device
        )
        for t in ((rows.stop > rows.start).long() * layout.tile_width, rows.live.long()):
            if t.shape[-1]:
                total += int((t.sum(-1) * num).sum()) * (b // t.shape[0]) * (h // t.shape[1])
    if layout.has_rule:
        total += int(count_pairs(replace(layout, **{k: None for k in _LIST_FIELDS})).sum())
    return total


_LIST_FIELDS = (
    "tiles", "tile_count", "entries", "entry_count", "diagonals", "diagonal_count", "columns", "column_count",
)  # fmt: skip


# ---------------------------------------------------------------------- conversions
def to_block_mask(layout: Layout, block_q: int, block_k: int) -> Tensor:
    b, h, n, m = layout.shape
    dev = layout.device
    nq, nk = -(-n // block_q), -(-m // block_k)
    out = torch.zeros(b, h, nq, nk, dtype=torch.bool, device=dev)
    q_pos = (torch.arange(m - n, m, device=dev)[None] if layout.q_pos is None else layout.q_pos.to(dev).long()).expand(b, n)
    edge = torch.arange(nq, device=dev) * block_q
    first, last = q_pos[:, edge], q_pos[:, (edge + block_q - 1).clamp(max=n - 1)]
    kb = torch.arange(nk, device=dev) * block_k
    allowed = (kb <= last[..., None])[:, None] if layout.causal else torch.ones(1, 1, nq, nk, dtype=torch.bool, device=dev)
    if layout.full:
        return (out | allowed) & True
    if layout.has_rule:
        if layout.stride is not None or not layout.causal:
            mask = to_mask(replace(layout, **{k: None for k in _LIST_FIELDS}))
            mask = pad(mask, (0, nk * block_k - m, 0, nq * block_q - n))
            out |= mask.view(b, h, nq, block_q, nk, block_k).any(-1).any(3)
        else:
            zero = torch.zeros(1, 1, dtype=torch.long, device=dev)
            sink = repeat_heads((layout.sink if layout.sink is not None else zero).long(), h)[..., None, None]
            window = repeat_heads((layout.window if layout.window is not None else zero).long(), h)[..., None, None]
            near = (kb + block_k - 1 > (first[:, None, :, None] - window)) & (window > 0)
            out |= ((kb < sink) | near) & allowed
    for blk in range(layout.num_blocks if layout.has_lists else 0):
        r0, r1 = block_rows(layout, blk)
        rows = expand(layout, blk, blk + 1)
        hit = torch.zeros(
            *torch.broadcast_shapes(rows.start.shape[:2], rows.entries.shape[:2]), nk + 1, dtype=torch.bool, device=dev
        )
        if rows.start.shape[-1]:
            live = rows.stop > rows.start
            for j in range(-(-layout.tile_width // block_k) + 1):
                at = rows.start + j * block_k
                at = torch.where(at // block_k <= (rows.stop - 1) // block_k, at // block_k, nk)
                hit.scatter_(2, torch.where(live, at, nk)[:, :, 0].expand(*hit.shape[:2], -1), True)
        if rows.entries.shape[-1]:
            hit.scatter_(2, torch.where(rows.live, rows.entries // block_k, nk)[:, :, 0].expand(*hit.shape[:2], -1), True)
        for qb in range(r0 // block_q, (r1 - 1) // block_q + 1):
            out[:, :, qb] |= repeat_heads(hit[..., :nk], h)
    return out & allowed


def to_csr(layout: Layout) -> tuple[Tensor, Tensor]:
    b, h, _, _ = layout.shape
    if layout.tiles is None or layout.entries is not None or layout.diagonals is not None or layout.has_rule:
        raise LayoutError("to_csr: expected a layout of tiles only")
    used = torch.arange(layout.tiles.shape[-1], device=layout.device) < layout.tile_count[..., None]  # type: ignore[index]
    if bool((used & (layout.tiles % layout.tile_width != 0)).any()):
        raise LayoutError(f"to_csr: expected tiles aligned to {layout.tile_width}")
    tiles = repeat_heads(layout.tiles, h).expand(b, -1, -1, -1)
    used = repeat_heads(used, h).expand(b, -1, -1, -1)
    indptr = pad(used.sum(-1).flatten().cumsum(0), (1, 0))
    return indptr, (tiles[used] // layout.tile_width).to(torch.int32)


def csr_to_lists(cls: Any, indptr: Tensor, ids: Tensor, shape: tuple[int, ...], block_q: int, block_k: int) -> Layout:
    b, h, n, _ = shape
    nq = -(-n // block_q)
    if indptr.numel() != b * h * nq + 1:
        raise LayoutError(f"indptr: expected B*H*nq + 1 = {b * h * nq + 1} row pointers, got {indptr.numel()}")
    count = (indptr[1:] - indptr[:-1]).to(torch.int32)
    width = max(1, int(count.max()))
    at = indptr[:-1, None] + torch.arange(width, device=ids.device)
    tiles = ids[at.clamp(max=max(0, ids.numel() - 1))] * block_k if ids.numel() else torch.zeros_like(at)
    tiles = torch.where(torch.arange(width, device=ids.device) < count[:, None], tiles, 0)
    return cls(
        tuple(shape),
        block_q=block_q,
        tile_width=block_k,
        tiles=tiles.view(b, h, nq, width).to(torch.int32),
        tile_count=count.view(b, h, nq),
    )


def from_torch_block_mask(cls: Any, bm: Any, h: int, causal: bool) -> Layout:
    (n, m), (bq, bk) = bm.seq_lengths, bm.BLOCK_SIZE
    nk = -(-m // bk)
    mask = torch.zeros(*bm.kv_num_blocks.shape, nk + 1, dtype=torch.bool, device=bm.kv_num_blocks.device)
    for num, idx in ((bm.kv_num_blocks, bm.kv_indices), (bm.full_kv_num_blocks, bm.full_kv_indices)):
        if num is not None:
            used = torch.arange(idx.shape[-1], device=idx.device) < num[..., None]
            mask.scatter_(-1, torch.where(used, idx, nk).long(), True)
    return cls.from_block_mask(mask[..., :nk], n, m, block_q=bq, block_k=bk, heads=h, causal=causal)


def to_torch_block_mask(layout: Layout, block: int) -> object:
    from torch.nn.attention.flex_attention import BlockMask

    touched = to_block_mask(layout, block, block)
    dense = to_mask(layout)

    def exact(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return dense[b, h, q, k]

    index, count = compact(touched)
    _, _, n, m = layout.shape
    return BlockMask.from_kv_blocks(count, index, BLOCK_SIZE=block, mask_mod=exact, seq_lengths=(n, m))


@dataclass(frozen=True)
class Inverse:
    """CSC of a tile layout: query blocks of every key tile, ascending. indptr int64 `[B*H*nk + 1]`, ids int32."""

    indptr: Tensor
    ids: Tensor
    num_tiles: int


def inverse(layout: Layout) -> Inverse:
    """Stable counting sort of (tile, query block) pairs; tiles must be aligned. Deterministic."""
    indptr, ids = to_csr(layout)
    b, h, _, m = layout.shape
    nq, nk = layout.num_blocks, -(-m // layout.tile_width)
    row = torch.repeat_interleave(torch.arange(b * h * nq, device=ids.device), indptr[1:] - indptr[:-1])
    key = (row // nq) * nk + ids.long()
    order = torch.argsort(key, stable=True)
    count = torch.bincount(key, minlength=b * h * nk)
    return Inverse(pad(count.cumsum(0), (1, 0)), (row[order] % nq).to(torch.int32), nk)


def by_head(mask: Tensor, a: Layout, b: Layout) -> Layout:
    """One layout whose heads come from `a` where mask is True and from `b` elsewhere."""
    if a.shape != b.shape or a.causal != b.causal:
        raise LayoutError(f"by_head: expected one shape and causality, got {a.shape} and {b.shape}")
    bn, h, n, m = a.shape
    mask = (mask if mask.dim() == 2 else mask[None]).to(torch.bool)
    if mask.shape[1] != h or mask.shape[0] not in (1, bn):
        raise LayoutError(f"mask: expected [H] or [B, H] = [{bn}, {h}], got {list(mask.shape)}")
    from .layout import NO_LIMIT, Layout

    sides = []
    for side in (a, b):
        if side.full:  # "everything" as a rule, so that it can stand beside lists
            window = torch.full((1, 1), NO_LIMIT, dtype=torch.int32, device=mask.device)
            side = Layout(side.shape, causal=side.causal, q_pos=side.q_pos, window=window)
        sides.append(side)
    gridded = [s for s in sides if s.has_lists] or sides[:1]
    grid = {(s.block_q, s.q_offset, s.tile_width) for s in gridded}
    if len(grid) > 1:
        raise LayoutError(f"by_head: expected one grid (block_q, q_offset, tile_width), got {sorted(grid)}")
    block_q, q_offset, tile_width = grid.pop()
    if any(s.stride is not None and s.tile_width != tile_width for s in sides):
        raise LayoutError("by_head: expected the stride's key block to equal tile_width")
    out: dict[str, Tensor | None] = {}
    for name in ("sink", "window", "stride", "phase"):
        x, y = (getattr(s, name) for s in sides)
        if x is None and y is None:
            continue
        zero = torch.zeros(1, 1, dtype=torch.int32, device=mask.device)
        x, y = (repeat_heads(zero if t is None else t, h) for t in (x, y))
        out[name] = torch.where(mask, x, y)
    for name, count in (
        ("tiles", "tile_count"), ("entries", "entry_count"), ("diagonals", "diagonal_count"), ("columns", "column_count")
    ):  # fmt: skip
        x, y = (getattr(s, name) for s in sides)
        if x is None and y is None:
            continue
        cx, cy = (getattr(s, count) for s in sides)
        like, clike = (x, cx) if x is not None else (y, cy)
        x, cx = (torch.zeros_like(like), torch.zeros_like(clike)) if x is None else (x, cx)
        y, cy = (torch.zeros_like(like), torch.zeros_like(clike)) if y is None else (y, cy)
        width = max(x.shape[-1], y.shape[-1])
        x, y = (repeat_heads(pad(t, (0, width - t.shape[-1])), h) for t in (x, y))
        cx, cy = (repeat_heads(t, h) for t in (cx, cy))
        pick = mask.view(*mask.shape, *([1] * (x.dim() - 2)))
        out[name] = torch.where(pick, x, y)
        out[count] = torch.where(pick[..., 0], cx, cy)
    return Layout(a.shape, causal=a.causal, block_q=block_q, q_offset=q_offset, tile_width=tile_width, q_pos=a.q_pos, **out)
