"""Decode for the `torch` backend on the CPU: one query a row, in a handful of tensor operations.

Lists over pages or entries become one gather and one call of PyTorch's flash attention over all rows and heads; dense
layouts are read in place. `attend` returns None for what it does not cover (rules beside lists, weights, overlapping
tiles, entries ahead of the query): the chunks of `torch_gather.py` serve that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from .flash import flash
from .rows import Rows

Result = tuple[Tensor, Tensor]


def attend(q: Tensor, kv: KV, layout: Layout, scale: float) -> Result | None:
    """out `[B, H, 1, Dv]` and lse `[B, H, 1]` for a layout of lists per block or a dense one; None otherwise."""
    if kv.bias is not None or layout.diagonals is not None or layout.columns is not None:
        return None
    if layout.has_rule:
        return None if layout.has_lists or kv.kind != "dense" or kv.pos is None else _ruled(q, kv, layout, scale)
    limit = _limit(kv, layout)
    if limit is None:
        return None
    return _dense(q, kv, limit, scale) if layout.full else _listed(q, kv, layout, limit, scale)


def _limit(kv: KV, layout: Layout) -> Tensor | None:
    """int64 `[B, G|1]`: the query sees exactly the entries below. None where visible entries are not a prefix."""
    b, g, m, _, _ = kv.shape
    end = torch.full((b, 1), m) if kv.len is None else kv.len.long()
    if not layout.causal or (layout.q_pos is None and kv.pos is None):
        return end
    at = layout.query_positions(kv)[..., 0]
    if kv.pos is None:
        return torch.minimum(end, at + 1)
    ahead = kv.pos > at[..., None]
    if kv.len is not None:
        ahead = ahead & (torch.arange(m) < end[..., None])
    return None if bool(ahead.any()) else end


def _dense(q: Tensor, kv: KV, limit: Tensor, scale: float) -> Result | None:
    if kv.kind != "dense":
        return None
    b, h, _, _ = q.shape
    g = kv.shape[1]
    ends = limit.tolist()
    if any(len(set(row)) > 1 or row[0] < 1 for row in ends):
        return None
    x = q.reshape(b, g, h // g, -1)  # the heads of a group as rows of one query: K and V are read once
    done = []
    lo = 0
    while lo < b:  # rows of one length together
        hi = lo + 1
        while hi < b and ends[hi] == ends[lo]:
            hi += 1
        k, v = (t[lo:hi, :, : ends[lo][0]] for t in (kv.k, kv.v))
        done.append(flash(x[lo:hi], k, v, None, None, scale))
        lo = hi
    out, lse = (t[0] if len(t) == 1 else torch.cat(t) for t in zip(*done, strict=True))
    return out.reshape(b, h, 1, -1), lse.reshape(b, h, 1)


def _ruled(q: Tensor, kv: KV, layout: Layout, scale: float) -> Result | None:
    """A rule over entries in no order of position (a ring, an evicted cache): often all of them satisfy it."""
    b, h, _, _ = q.shape
    g, m = kv.shape[1], kv.capacity
    n = m if kv.len is None else int(kv.len.max())
    if kv.len is not None and int(kv.len.min()) < n:  # what lies beyond a row's entries may be NaN: the chunks skip it
        return None
    seen = layout.to_mask(kv).view(b, g, h // g, m)[..., :n]
    k, v = kv.k[:, :, :n], kv.v[:, :, :n]
    out, lse = flash(q.reshape(b, g, h // g, -1), k, v, None if bool(seen.all()) else seen, None, scale)
    return out.reshape(b, h, 1, -1), lse.reshape(b, h, 1)


def _listed(q: Tensor, kv: KV, layout: Layout, limit: Tensor, scale: float) -> Result | None:
    b, h, _, _ = q.shape
    g, m = kv.shape[1], kv.capacity
    found = [_slots(t, c, w, m) for t, c, w in _lists(layout)]
    if not found or any(f is None for f in found):
        return None
    parts = [f for f in found if f is not None]
    if len(parts) > 1 and len({p[0].shape[:2] for p in parts}) > 1:
        return None
    entries = parts[0][0] if len(parts) == 1 else torch.cat([p[0] for p in parts], -1)
    units = entries.shape[1]
    if units % g:
        if g % units:
            return None
        entries, units = entries.repeat_interleave(g // units, 1), g
    e = entries.view(entries.shape[0], g, units // g, -1)
    if all(p[1] is None for p in parts) and kv.len is None and layout.q_pos is None and int(e.max()) < m:
        seen: Tensor | None = None
    else:
        seen = e < limit[..., None, None]
        used = [torch.ones_like(p[0], dtype=torch.bool) if p[1] is None else p[1] for p in parts]
        mask = torch.cat(used, -1)
        mask = mask if mask.shape[1] == units else mask.repeat_interleave(units // mask.shape[1], 1)
        seen = seen & mask.view(mask.shape[0], g, units // g, -1)
        if not bool(seen[..., 0].all()):  # a list that starts with nothing: leave it to the chunks
            return None
        e = torch.where(seen, e, e[..., :1])  # what is not seen is not read
    k, v = (t.view(b * units, 1, -1, t.shape[-1]) for t in _read(kv, e.expand(b, -1, -1, -1)))
    seen = None if seen is None else seen.expand(b, -1, -1, -1).reshape(b * units, 1, 1, -1)
    out, lse = flash(q.reshape(b * units, 1, h // units, -1), k, v, seen, None, scale)
    return out.reshape(b, h, 1, -1), lse.reshape(b, h, 1)


def _lists(layout: Layout) -> list[tuple[Tensor, Tensor, int]]:
    out = []
    if layout.tiles is not None and layout.tile_count is not None:
        out.append((layout.tiles[:, :, 0], layout.tile_count[:, :, 0], layout.tile_width))
    if layout.entries is not None and layout.entry_count is not None:
        out.append((layout.entries[:, :, 0], layout.entry_count[:, :, 0], 1))
    return out


def _slots(index: Tensor, count: Tensor, width: int, m: int) -> tuple[Tensor, Tensor | None] | None:
    """(entries int64 `[B|1, Hl, n * width]`, used or None for all) of lists `[B|1, Hl, n]`; None if tiles overlap."""
    longest, shortest = int(count.max()), int(count.min())
    if longest == 0:
        return None
    a = index[..., :longest].long()
    used = None if shortest == longest else torch.arange(longest) < count[..., None]
    if width > 1:
        close = a[..., 1:] - a[..., :-1] < width
        if bool((close if used is None else close & used[..., 1:]).any()):
            return None
        a = (a[..., None] + torch.arange(width)).flatten(2)
        used = None if used is None else used.repeat_interleave(width, -1)
    return a, used


def _read(kv: KV, e: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of entries `[B, G, s, W]` as rows, gathered from storage in place."""
    k, v = Rows(kv.k), Rows(kv.v)
    if kv.kind == "dense":
        b, g = e.shape[:2]
        first = torch.arange(b)[:, None], torch.arange(g)

        def at(rows: Rows) -> Tensor:
            base = first[0] * rows.strides[0] + first[1] * rows.strides[1]
            step = rows.strides[2]
            return base[..., None, None] + (e if step == 1 else e * step)

        here = at(k)
        return k.take(here, "k"), v.take(here if k.strides == v.strides else at(v), "v")
    if kv.kind == "ragged":
        index: tuple[Tensor, ...] = (kv.offsets.long()[..., None, None] + e,)  # type: ignore[union-attr]
    else:
        page = kv.k.shape[1]
        pages = kv.table.long().gather(2, (e // page).flatten(2)).view(e.shape)  # type: ignore[union-attr]
        index = (pages, e % page)
    return k(*index, scratch="k"), v(*index, scratch="v")
