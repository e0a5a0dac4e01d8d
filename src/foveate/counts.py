"""How much a `Layout` names and how much a kernel computes for it: pairs, blocks, densities. Exact, never N x M memory.

Two ways lead to every figure. While positions are entry numbers and query rows are consecutive (`in_text_order`: prefill
and decode over a cache that lost nothing, whatever the lengths of its rows), closed forms walk the lists. Otherwise
(evicted entries, an entry bias, permuted queries) masks of a few rows at a time are summed: time N x M, memory a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import LayoutError
from .kv import KV
from .lists import BUDGET, FAR, INDEX_FIELDS, expand, repeat_heads, same_lead, to_mask, trim

if TYPE_CHECKING:
    from .layout import Layout


def in_text_order(layout: Layout, kv: KV | None) -> bool:
    """Entry numbers are positions and query rows are consecutive (one synchronisation where `q_pos` is given)."""
    if kv is not None and (kv.pos is not None or kv.bias is not None):
        return False
    return layout.q_pos is None or bool((layout.q_pos[:, 1:] - layout.q_pos[:, :-1] == 1).all())


def frame(layout: Layout, kv: KV | None) -> tuple[Tensor, Tensor]:
    """int64 `[B|1, G|1]`: position of this call's first query row, and entries that exist. For `in_text_order`."""
    _, _, n, m = layout.shape
    length = torch.full((1, 1), m, device=layout.device) if kv is None or kv.len is None else kv.lengths().to(layout.device)
    first = length - n if layout.q_pos is None else layout.q_pos[:, :1].long()
    return first, length


def block_spans(layout: Layout, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [r0, r1) of this call in each of the query blocks."""
    r0 = (blocks * layout.block_q - layout.q_offset).clamp(min=0)
    return r0, ((blocks + 1) * layout.block_q - layout.q_offset).clamp(max=layout.shape[2])


def without_lists(layout: Layout) -> Layout:
    """The static rule alone."""
    return replace(layout, **dict.fromkeys([*INDEX_FIELDS, *INDEX_FIELDS.values()]))


def tight(layout: Layout) -> Layout:
    """The same lists without columns of padding (one synchronisation for each)."""
    cut = {name: trim(t, getattr(layout, n)) for name, n in INDEX_FIELDS.items() if (t := getattr(layout, name)) is not None}
    return replace(layout, **cut)


def list_width(layout: Layout) -> int:
    """Index elements of one query block, over batch rows and list heads (at least 1)."""
    index = [t for name in INDEX_FIELDS if (t := getattr(layout, name)) is not None]
    return max(1, sum(t.shape[0] * t.shape[1] * t.shape[-1] for t in index))


# ---------------------------------------------------------------------- pairs
def visible_pairs(layout: Layout, kv: KV | None = None) -> Tensor:
    """int64 `[B, H]`: pairs that dense attention would compute."""
    b, h, n, m = layout.shape
    if not in_text_order(layout, kv):
        return _masked_pairs(replace(layout, full=True), kv)
    first, length = same_lead(*frame(layout, kv))
    if not layout.causal:
        seen = n * length
    else:
        seen = _ramp(first + n, length) - _ramp(first, length)
    return repeat_heads(seen, h).expand(b, h)


def count_pairs(layout: Layout, kv: KV | None = None) -> Tensor:
    """int64 `[B, H]`: pairs the layout names and the query may see."""
    b, h, _, _ = layout.shape
    if layout.full:
        return visible_pairs(layout, kv)
    if not in_text_order(layout, kv):
        return _masked_pairs(layout, kv)
    return repeat_heads(_rule_pairs(layout, kv), h) + _listed_pairs(layout, kv).expand(b, h)


def _masked_pairs(layout: Layout, kv: KV | None) -> Tensor:
    b, h, n, m = layout.shape
    step = max(1, BUDGET // (b * h * m))
    rows = torch.arange(n, device=layout.device if kv is None else kv.device)
    return torch.stack([to_mask(layout, kv, part).sum((-1, -2)) for part in rows.split(step)]).sum(0)


def _ramp(y: Tensor, w: Tensor) -> Tensor:
    """Sum of min(max(t, 0), w) over t <= y."""
    y = y.clamp(min=0)
    low = torch.minimum(y, w)
    return low * (low + 1) // 2 + (y - low) * w


class _Rule:
    """The static rule of a layout as int64 `[B|1, Hl, 1, 1]` numbers, absent parts switched off."""

    def __init__(self, layout: Layout):
        zero = torch.zeros(1, 1, dtype=torch.long, device=layout.device)
        parts = [getattr(layout, name) for name in ("sink", "window", "stride", "phase")]
        lead = same_lead(*(zero if t is None else t.long() for t in parts))
        self.sink, self.window, self.stride, phase = (t[..., None, None] for t in lead)
        self.phase = phase % self.stride.clamp(min=1)
        self.width = layout.tile_width
        self.strided = layout.stride is not None

    def heads(self, h: int) -> _Rule:
        """The same rule for h heads."""
        out = object.__new__(_Rule)
        out.width, out.strided = self.width, self.strided
        for name in ("sink", "window", "stride", "phase"):
            setattr(out, name, repeat_heads(getattr(self, name), h))
        return out

    def strides_below(self, y: Tensor) -> Tensor:
        """Keys below y that the stride names."""
        period = self.stride.clamp(min=1) * self.width
        rest = (y % period - self.phase * self.width).clamp(min=0).clamp(max=self.width)
        return torch.where(self.stride > 0, y // period * self.width + rest, 0)

    def on_stride(self, key: Tensor) -> Tensor:
        return (self.stride > 0) & ((key // self.width) % self.stride.clamp(min=1) == self.phase)


def _rule_pairs(layout: Layout, kv: KV | None) -> Tensor:
    """int64 `[B|1, Hl]`: visible pairs the rule names, row by row in closed form."""
    n = layout.shape[2]
    if not layout.has_rule:
        return torch.zeros(1, 1, dtype=torch.long, device=layout.device)
    rule = _Rule(layout)
    first, length, like = (t[..., None, None] for t in same_lead(*frame(layout, kv), rule.sink[..., 0, 0]))
    rule = rule.heads(like.shape[1])
    total = torch.zeros(like.shape[:2], dtype=torch.long, device=layout.device)
    for rows in torch.arange(n, device=layout.device).split(max(1, BUDGET // like.numel())):
        q = first + rows  # [B|1, Hl, 1, R]
        end = torch.minimum((q + 1).clamp(min=0), length) if layout.causal else length.expand_as(q)
        near = torch.where(rule.window > 0, q + 1 - rule.window, 0)
        far = torch.where(rule.window > 0, end if layout.causal else q + rule.window, 0)
        near, far = (torch.minimum(t.clamp(min=0), end) for t in (near, far))
        sink = torch.minimum(rule.sink, end)
        near, far = torch.maximum(near, sink), torch.maximum(far, sink)
        seen = sink + far - near
        if rule.strided:
            for a, z in ((sink, near), (far, end)):  # the gaps that sink and window leave
                seen = seen + rule.strides_below(z) - rule.strides_below(a)
        total = total + seen.sum((-1, -2))
    return total


def _listed_pairs(layout: Layout, kv: KV | None) -> Tensor:
    """int64 `[B|1, H]`: visible pairs in lists that the rule does not name."""
    rule, h = _Rule(layout), layout.shape[1]
    layout = tight(layout)
    q0, length = (t[..., None, None] for t in same_lead(*frame(layout, kv)))
    out = torch.zeros(1, h, dtype=torch.long, device=layout.device)
    step = max(1, BUDGET // list_width(layout))
    for lo in range(0, layout.num_blocks if layout.has_lists else 0, step):
        hi = min(layout.num_blocks, lo + step)
        rows = expand(layout, lo, hi)
        r0, r1 = block_spans(layout, torch.arange(lo, hi, device=layout.device))
        for a, z in ((rows.start, rows.stop), (rows.entries, rows.entries + rows.live.long())):
            if a.shape[-1]:
                a, z, first, limit, _ = same_lead(a, z, q0 + r0[:, None], length, rule.sink)
                rule = rule.heads(a.shape[1])
                got = _outside(rule, layout.causal, a, torch.minimum(z, limit), first, (r1 - r0)[:, None])
                out = out + repeat_heads(got, h)
    return out


def _outside(rule: _Rule, causal: bool, a: Tensor, z: Tensor, first: Tensor, num: Tensor) -> Tensor:
    """int64 `[B|1, Hl]`: pairs of the ranges [a, z) with the rows first .. first + num - 1 of their block that are
    visible and not named by the rule."""
    a = torch.maximum(a, rule.sink)
    if rule.strided:  # a range is at most one stride block wide, so it reaches into two of them
        cut = torch.minimum((a // rule.width + 1) * rule.width, z)
        a, z = torch.cat([a, cut], -1), torch.cat([cut, z], -1)
        z = torch.where(rule.on_stride(a), a, z)
    span = (z - a).clamp(min=0)
    total = (span.sum(-1) * num[:, 0]).sum(-1)
    # Nearly every range lies before the window of all rows of its block. The others are looked at one by one.
    old = first + 1 - rule.window  # keys below are older than the window of the first row, and visible
    at = ((z > old) & (z > a)).nonzero(as_tuple=True)
    if not causal:
        at = tuple(t[rule.window.expand_as(first)[at[0], at[1], 0, 0] > 0] for t in at)
    start, width, rows = a[at], span[at], num[at[2], 0]

    def below(y: Tensor) -> Tensor:
        """Sum over rows r of the keys of the range below y + r."""
        y = y.expand(*a.shape[:3], 1)[at[0], at[1], at[2], 0] - start
        return _ramp(y + rows - 1, width) - _ramp(y - 1, width)

    hidden = (width * rows if causal else below(first + rule.window)) - below(old)
    lead = a.shape[1]
    return total - torch.zeros(total.numel(), dtype=torch.long, device=a.device).index_add_(
        0, at[0] * lead + at[1], hidden
    ).view_as(total)


# ---------------------------------------------------------------------- blocks
def computed_pairs(layout: Layout, tiling: tuple[int, int] | None = None, kv: KV | None = None) -> int:
    b, h, n, m = layout.shape
    if layout.full:
        return int(visible_pairs(layout, kv).sum())
    if tiling is not None:
        bq, bk = tiling
        offset = layout.q_offset % bq if layout.has_lists else 0
        rows = torch.bincount((torch.arange(n, device=layout.device) + offset) // bq)  # rows of each row block
        keys = torch.bincount(torch.arange(m, device=layout.device) // bk)
        total = 0
        for lo, touched in _touched(layout, bq, bk, kv, offset):
            cells = (touched.long() * keys).sum(-1) * rows[lo : lo + touched.shape[2]]
            total += int(cells.sum()) * (b // touched.shape[0]) * (h // touched.shape[1])
        return total
    total = 0
    layout = tight(layout)
    step = max(1, BUDGET // list_width(layout))
    for lo in range(0, layout.num_blocks if layout.has_lists else 0, step):
        hi = min(layout.num_blocks, lo + step)
        lists = expand(layout, lo, hi)
        r0, r1 = block_spans(layout, torch.arange(lo, hi, device=layout.device))
        for keys in ((lists.stop > lists.start).sum(-1) * layout.tile_width, lists.live.sum(-1)):
            total += int((keys * (r1 - r0)).sum()) * (b // keys.shape[0]) * (h // keys.shape[1])
    if layout.has_rule:
        total += int(count_pairs(without_lists(layout), kv).sum())
    return total


def to_block_mask(layout: Layout, block_q: int, block_k: int, kv: KV | None = None, q_offset: int = 0) -> Tensor:
    b, h, _, _ = layout.shape
    if block_q < 1 or block_k < 1 or not 0 <= q_offset < block_q:
        raise LayoutError(
            f"expected block_q, block_k >= 1 and 0 <= q_offset < block_q, got {block_q}, {block_k} and {q_offset}"
        )
    parts = [repeat_heads(t, h).expand(b, -1, -1, -1) for _, t in _touched(layout, block_q, block_k, kv, q_offset)]
    return torch.cat(parts, 2).contiguous()


def _touched(layout: Layout, bq: int, bk: int, kv: KV | None, offset: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces (first row block, bool `[B|1, Hl, some, nk]`) of the block mask, in order."""
    b, h, n, m = layout.shape
    nq, nk = -(-(n + offset) // bq), -(-m // bk)
    plain = in_text_order(layout, kv)
    if plain:
        layout = tight(layout)
        cost = max(b * h * (nk + 1), list_width(layout) * max(1, bq // layout.block_q))
    else:
        cost = b * h * m * bq
    step = max(1, BUDGET // cost)
    for lo in range(0, nq, step):
        hi = min(nq, lo + step)
        if not plain:
            yield lo, _touched_by_mask(layout, bq, bk, kv, lo, hi, offset)
            continue
        edges = (torch.arange(lo, hi + 1, device=layout.device) * bq - offset).clamp(0, n)
        out = _touched_by_rule(layout, bk, edges, kv)
        if layout.has_lists:
            out, listed = same_lead(out, _touched_by_lists(layout, bk, edges, kv))
            out = out | listed
        yield lo, out


def _touched_by_mask(layout: Layout, bq: int, bk: int, kv: KV | None, lo: int, hi: int, offset: int) -> Tensor:
    """Row blocks lo..hi from the mask of their rows."""
    b, h, n, m = layout.shape
    device = layout.device if kv is None else kv.device
    rows = torch.arange(lo * bq, hi * bq, device=device) - offset
    real = (rows >= 0) & (rows < n)
    mask = to_mask(layout, kv, rows.clamp(0, n - 1)) & real[:, None]
    return pad(mask, (0, -m % bk)).view(b, h, hi - lo, bq, -1, bk).any(-1).any(3)


def _touched_by_rule(layout: Layout, bk: int, edges: Tensor, kv: KV | None) -> Tensor:
    """Key blocks in which a row edges[i] .. edges[i + 1] - 1 sees a key by the rule (or any key, for full)."""
    m, rule = layout.shape[3], _Rule(layout)
    q0, length, like = same_lead(*(t[..., None, None] for t in frame(layout, kv)), rule.sink)
    rule = rule.heads(like.shape[1])
    first, last = q0 + edges[:-1, None], q0 + edges[1:, None] - 1  # [B|1, Hl, some, 1]
    kb = torch.arange(-(-m // bk), device=layout.device) * bk
    end = torch.minimum(kb + bk, length) - 1  # last key of each block
    limit = torch.minimum(last, length - 1) if layout.causal else (length - 1).expand_as(last)  # last key that a row sees
    seen = kb <= limit
    if layout.full:
        return seen
    near = (rule.window > 0) & (end > first - rule.window)
    if not layout.causal:
        near = near & (kb < last + rule.window)
    out = seen & ((kb < rule.sink) | near)
    if rule.strided:
        key = torch.arange(m, device=layout.device)
        hit = torch.where(rule.on_stride(key), key, FAR)
        out = out | (pad(hit, (0, -m % bk), value=FAR).unflatten(-1, (-1, bk)).amin(-1) <= limit)
    return out


def _touched_by_lists(layout: Layout, bk: int, edges: Tensor, kv: KV | None) -> Tensor:
    """The same for lists: every key range marks the row blocks that its own query block overlaps."""
    some, nk = len(edges) - 1, -(-layout.shape[3] // bk)
    top, bottom = int(edges[0]), int(edges[-1])
    b0, b1 = (top + layout.q_offset) // layout.block_q, (bottom - 1 + layout.q_offset) // layout.block_q + 1
    rows = expand(layout, b0, b1)
    r0, r1 = block_spans(layout, torch.arange(b0, b1, device=layout.device))
    r0, r1 = r0.clamp(min=top), r1.clamp(max=bottom)
    low, high = (torch.searchsorted(edges, r, right=True) - 1 for r in (r0, r1 - 1))  # row blocks of its first, last row
    start = torch.cat(same_lead(rows.start, rows.entries), -1)
    stop = torch.cat(same_lead(rows.stop, rows.entries + rows.live.long()), -1)
    start, stop, q0, length = same_lead(start, stop, *(t[..., None, None] for t in frame(layout, kv)))
    stop = torch.minimum(stop, length)
    edge = torch.zeros(*start.shape[:2], some * (nk + 1) + 1, dtype=torch.int32, device=layout.device)
    for j in range(int((high - low).max()) + 1):
        at = torch.minimum(low + j, high)
        z = stop
        if layout.causal:  # only keys that its last row in this row block may see
            z = torch.minimum(stop, q0 + torch.minimum(edges[at + 1], r1)[:, None])
        one = ((low + j <= high)[:, None] & (z > start)).int()
        line = at[:, None] * (nk + 1)
        for mark, sign in ((line + start // bk, one), (line + (z - 1) // bk + 1, -one)):
            edge.scatter_add_(-1, torch.where(one > 0, mark, edge.shape[-1] - 1).flatten(2), sign.flatten(2))
    return edge[..., :-1].unflatten(-1, (some, nk + 1)).cumsum(-1, dtype=torch.int32)[..., :nk] > 0
