"""A layout as chunks of work for plain PyTorch: few items at a time, each one's keys gathered once.

An *item* is one batch row, one *unit* and one group of query rows. A unit is the set of query heads that share both a
kv head and a list, so K and V are gathered once for all of them and never repeated. Its keys come in *slots*, sorted
into kinds: ranges of the static rule, tiles, single entries; each on the *edge*, where rows of the item differ in what
they see, or behind it, where only a mask shared by all rows is needed. A pair that both the rule and a list name is
counted in the rule's slot only, so that no set has to be built to count a key once.

Items are sorted by their number of slots before they are padded to a common width, and everything is bounded by the
constants below and in `rows.py`, whatever the layout: an item wider than they allow is walked in segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from ..lists import INDEX_FIELDS, RULE_FIELDS, compact, expand
from .rows import GATHERED, Rows, Storage

SCORES = 1 << 21  # scores, or entries of a mask, that exist at one time
ROWS = 128  # query rows of one item at most
WASTE = 1.25  # slots of a chunk over the slots its items need
LEAST = 32  # slots of a segment at least


@dataclass
class Chunk:
    """Items padded to one width, slots of the edge first and there those of the rule. `segments` walks the slots.

    Attributes:
        batch, unit, group: int64 `[I]`. rows: int64 `[I, R]`; an item with fewer rows repeats its last one.
        fresh: bool `[I, R]`, False on such repeats. q_pos: int64 `[I, R]`.
        entries, live: int64 and bool `[I, W]`. A slot that is not live names a live entry of its item, so that what
            lies in untouched storage is never read. empty: bool `[I]`, items without a live slot; None if none is.
        edge, ruled: the first slots, whose rows differ; the first of these, which belong to the rule.
    """

    work: Work
    batch: Tensor
    unit: Tensor
    group: Tensor
    rows: Tensor
    fresh: Tensor
    q_pos: Tensor
    entries: Tensor
    live: Tensor
    edge: int
    ruled: int
    empty: Tensor | None

    @property
    def heads(self) -> Tensor:
        """int64 `[I, P]`, the query heads of each item."""
        p = self.work.per
        return self.unit[:, None] * p + torch.arange(p, device=self.unit.device)

    def row_numbers(self) -> Tensor:
        """int64 `[I, P, R]`: rows of a contiguous `[B, H, N]`."""
        _, h, n, _ = self.work.layout.shape
        return ((self.batch[:, None] * h + self.heads)[..., None]) * n + self.rows[:, None]

    def read(self, t: Rows) -> Tensor:
        """`[I, P, R, D]` of a `[B, H, N, D]` tensor."""
        return t(self.batch[:, None, None], self.heads[..., None], self.rows[:, None])

    def segments(self) -> Iterator[Segment]:
        width, edge = self.entries.shape[1], self.edge
        step = self.work.segment(len(self.batch), self.rows.shape[1])
        for begin, end in ((0, edge), (edge, width)) if self.rows.shape[1] > 1 else ((0, width),):
            for lo in range(begin, end, step):
                yield self._segment(lo, min(end, lo + step))

    def _segment(self, lo: int, hi: int) -> Segment:
        work, kv = self.work, self.work.kv
        entries, live = self.entries[:, lo:hi], self.live[:, lo:hi]
        k, v = work.storage.gather(self.batch, self.group, entries)
        if self.empty is not None:  # nothing of these items is named; what was read in its place may be anything
            k, v = (t.masked_fill(self.empty[:, None, None], 0) for t in (k, v))
        seen = live[:, None]
        if lo < self.edge:
            seen = self._edge(seen, entries, lo, hi)
            if work.ruled and (kv.pos is not None or work.layout.q_pos is not None):
                gap = ~seen.any(1)  # between rows far apart lie entries that none of them sees
                if bool(gap.any()):
                    k, v = (t.masked_fill(gap[..., None], 0) for t in (k, v))
        bias = None if kv.bias is None else kv.bias.detach()[self.batch, self.group].gather(1, entries)
        return Segment(self, k, v, entries, seen, bias)

    def _edge(self, seen: Tensor, entries: Tensor, lo: int, hi: int) -> Tensor:
        """`seen` `[I, 1, W]` with what each row sees of it, `[I, R, W]`."""
        work = self.work
        pos = work.positions(self.batch, self.group, entries)[:, None]
        at = self.q_pos[..., None]
        rule = work.rule(self.batch, self.unit, at, at, pos)
        if rule is not None:
            slot = torch.arange(lo, hi, device=pos.device)
            by_list = (slot >= self.ruled) & (slot < self.edge)
            seen = seen & (rule ^ by_list if hi > self.ruled else rule)
            if hi > self.edge:  # one row: what lies behind the edge comes along
                seen = seen | (self.live[:, None, lo:hi] & (slot >= self.edge))
        return seen & (pos <= at) if work.layout.causal and self.rows.shape[1] > 1 else seen


@dataclass
class Segment:
    """Some slots of a chunk, gathered: valid until the next segment is asked for.

    seen: bool `[I, 1 or R, W]`; bias: `[I, W]` or None.
    """

    chunk: Chunk
    k: Tensor
    v: Tensor
    entries: Tensor
    seen: Tensor
    bias: Tensor | None


class Work:
    """Cuts an attention call into chunks. `fused`: the caller holds no scores, only a mask shared by an item's heads."""

    def __init__(self, kv: KV, layout: Layout, fused: bool):
        b, h, n, _ = layout.shape
        self.kv, self.layout, self.fused = kv, layout, fused
        self.storage = Storage(kv)
        tensors = [t for name in (*INDEX_FIELDS, *RULE_FIELDS) if (t := getattr(layout, name)) is not None]
        self.units = math.lcm(kv.shape[1], *(t.shape[1] for t in tensors))
        self.per = h // self.units
        self.lens = None if kv.len is None else kv.lengths()
        self.queries = layout.query_positions(kv).to(kv.device)
        # Rows that share a list, cut finer where they are many; without lists any grid will do.
        block, offset = (layout.block_q, layout.q_offset) if layout.has_lists else (n, 0)
        size = min(block, ROWS, n + offset)
        sub = -(-block // size)
        piece = torch.arange(-(-(n + offset) // block) * sub)
        first = (piece // sub) * block + (piece % sub) * size - offset
        last = torch.minimum(first + size, (piece // sub + 1) * block - offset).clamp(max=n)
        first = first.clamp(min=0)
        keep = last > first
        self.block, self.first, self.last = (t[keep].to(kv.device) for t in (piece // sub, first, last))
        self.size = size
        # The rule as two ranges of entries, or, where entries are not in the order of their positions, as a search.
        self.ruled = layout.full or layout.has_rule
        self.search = layout.has_rule and (kv.pos is not None or layout.stride is not None)

    def segment(self, items: int, rows: int) -> int:
        """Slots walked at one time."""
        held = items * rows * (1 if self.fused else self.per)
        return max(LEAST, min(SCORES // held, GATHERED // (items * (self.kv.shape[3] + self.kv.shape[4]))))

    def chunks(self) -> Iterator[Chunk]:
        b, _, _, m = self.layout.shape
        index = [t for name in INDEX_FIELDS if (t := getattr(self.layout, name)) is not None]
        width = sum(t.shape[-1] for t in index) + self.size + (m if self.search else 0)
        step = max(1, SCORES // (8 * width * b * self.units))
        for lo in range(0, len(self.first), step):
            yield from Items(self, lo, min(len(self.first), lo + step)).chunks()

    # ------------------------------------------------------------------ what an item sees
    def of(self, t: Tensor, batch: Tensor, unit: Tensor, *more: Tensor) -> Tensor:
        """Rows of a `[B|1, Hl, ...]` tensor, one for each item."""
        head = unit if t.shape[1] == self.units else unit * t.shape[1] // self.units
        return t[(batch if t.shape[0] > 1 else 0, head, *more)]

    def positions(self, batch: Tensor, group: Tensor, entries: Tensor) -> Tensor:
        return entries if self.kv.pos is None else self.kv.pos[batch, group].gather(1, entries).long()

    def rule(self, batch: Tensor, unit: Tensor, oldest: Tensor, newest: Tensor, pos: Tensor) -> Tensor | None:
        """The static rule without causality for queries between `oldest` and `newest`: for one query they are equal,
        for several it is the hull of what they see. Everything broadcasts with one item a row; None without a rule."""
        layout = self.layout
        if not layout.has_rule:
            return None
        sink, window, stride, phase = (
            None if t is None else self.of(t, batch, unit).long().view(-1, *[1] * (pos.dim() - 1))
            for t in (getattr(layout, name) for name in RULE_FIELDS)
        )
        out: Tensor | None = None
        if sink is not None:
            out = pos < sink
        if window is not None:
            near = pos > oldest - window
            if not layout.causal:
                near = near & (pos < newest + window)
            out = near if out is None else out | near
        if stride is not None:
            every = stride.clamp(min=1)
            hit = (stride > 0) & ((pos // layout.tile_width) % every == (0 if phase is None else phase) % every)
            out = hit if out is None else out | hit
        return out


@dataclass
class Kind:
    """Slots of one kind for all items: `entries` and `count` make them on demand. count: int64 `[I]` slots of each.

    Exactly one way is set: `first` `[I]` (a range of entries), `start` and `stop` `[I, T]` (tiles of `tile` keys),
    `single` `[I, C]`, or `touched` (entries a search finds).
    """

    count: Tensor
    edge: bool
    rule: bool = False
    first: Tensor | None = None
    start: Tensor | None = None
    stop: Tensor | None = None
    tile: int = 1
    single: Tensor | None = None
    touched: Callable[[Tensor | slice], Tensor] | None = None

    def slots(self, at: Tensor | slice, width: int) -> tuple[Tensor, Tensor]:
        """(entries, live) `[I, width]` of the items `at`."""
        if self.start is not None and self.stop is not None:
            tiles = width // self.tile
            e = self.start[at, :tiles, None] + torch.arange(self.tile, device=self.count.device)
            return e.flatten(1), (e < self.stop[at, :tiles, None]).flatten(1)
        slot = torch.arange(width, device=self.count.device)
        live = slot < self.count[at, None]
        if self.single is not None:
            return self.single[at, :width], live
        if self.first is not None:
            return self.first[at, None] + slot, live
        assert self.touched is not None
        item, entry = self.touched(at).nonzero(as_tuple=True)
        count = self.count[at]
        found = torch.zeros(len(count), width, dtype=torch.long, device=count.device)
        found[item, torch.arange(len(item), device=item.device) - (count.cumsum(0) - count)[item]] = entry
        return found, live


def _packed(used: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """(count `[I]`, *rows) with the used slots of each row `[I, n]` moved to the left, cut to the longest."""
    if bool(used.all()):
        return torch.full(used.shape[:1], used.shape[1], dtype=torch.long, device=used.device), *rows
    order, count = compact(used)
    order = order[:, : int(count.max())].long()
    return count.long(), *(t.gather(1, order) for t in rows)


class Items:
    """All items of the query pieces `lo..hi`: what kinds of slots each needs, and chunks of similar ones."""

    def __init__(self, work: Work, lo: int, hi: int):
        kv = work.kv
        b, _, _, m = work.layout.shape
        self.work = work
        number = torch.arange(b * work.units * (hi - lo), device=kv.device)
        piece = number % (hi - lo)
        self.unit, self.batch = number // (hi - lo) % work.units, number // ((hi - lo) * work.units)
        self.group = self.unit if kv.shape[1] == work.units else self.unit * kv.shape[1] // work.units
        first, last = work.first[lo:hi][piece, None], work.last[lo:hi][piece, None]
        steps = first + torch.arange(work.size, device=kv.device)
        self.rows, self.fresh = torch.minimum(steps, last - 1), steps < last
        group = self.group if work.queries.shape[1] > 1 else torch.zeros_like(self.group)
        self.q_pos = work.queries[self.batch[:, None], group[:, None], self.rows]
        self.oldest, self.newest = self.q_pos.amin(1), self.q_pos.amax(1)
        self.length = torch.full_like(number, m) if work.lens is None else work.lens[self.batch, self.group]
        self.kinds: list[Kind] = []
        ruled = self._rule_kinds() if work.ruled else None
        if work.layout.has_lists:
            self._list_kinds(lo, hi, piece, ruled)
        self.kinds = sorted((k for k in self.kinds if int(k.count.max())), key=lambda k: (not k.edge, not k.rule))

    def _rule_kinds(self) -> Tensor:
        """Ranges of entries that the rule reaches, or those a search finds. Returns how many, `[I]`."""
        work, layout = self.work, self.work.layout
        if work.search:
            count = self._touched(slice(None)).sum(1)
            self.kinds.append(Kind(count, True, rule=True, touched=self._touched))
            return count
        zero = torch.zeros_like(self.unit)
        end = self.length
        ordered = layout.causal and work.kv.pos is None  # positions are entry numbers: what lies ahead is cut off
        if ordered:
            end = torch.minimum(end, self.newest + 1).clamp(min=0)
        near, far, core = zero, zero, zero  # entries 0..near; then far.., of which all rows see core..tip
        if not layout.full:
            if layout.sink is not None:
                near = torch.minimum(work.of(layout.sink, self.batch, self.unit).long(), end)
            window = zero if layout.window is None else work.of(layout.window, self.batch, self.unit).long()
            if not layout.causal:
                end = torch.minimum(end, self.newest + window).clamp(min=0)
            far = torch.maximum(self.oldest - window + 1, near)
            core = torch.maximum(self.newest - window + 1, far)
            end = torch.where(window > 0, torch.maximum(end, far), far)
        tip = end
        if ordered:
            tip = torch.minimum(self.oldest + 1, end)
        elif layout.causal or not layout.full:
            tip = far
        tip = torch.maximum(tip, far)
        core = torch.minimum(core, tip)
        for first, stop, edge in ((zero, near, True), (far, core, True), (core, tip, False), (tip, end, True)):
            self.kinds.append(Kind(stop - first, edge, rule=True, first=first))
        return near + end - far

    def _list_kinds(self, lo: int, hi: int, piece: Tensor, ruled: Tensor | None) -> None:
        work, layout = self.work, self.work.layout
        at = work.block[lo:hi]
        low = int(at[0])
        rows = expand(layout, low, int(at[-1]) + 1)
        block = at[piece] - low
        ordered = layout.causal and work.kv.pos is None
        # Behind the edge lies what all rows see, unless the rule, which counts first, may differ from row to row.
        tip = self.oldest + 1 if ordered else torch.full_like(self.oldest, -1 if layout.causal else layout.shape[3])
        tip = (tip if ruled is None else tip.masked_fill(ruled > 0, -1))[:, None]
        if rows.start.shape[-1]:
            start, stop = (work.of(t, self.batch, self.unit, block) for t in (rows.start, rows.stop))
            if ordered:
                stop = torch.minimum(stop, self.newest[:, None] + 1)
            used, w = stop > start, layout.tile_width
            for edge in (True, False):
                count, a, z = _packed(used & ((stop > tip) == edge), start, stop)
                z = torch.where(torch.arange(a.shape[1], device=a.device) < count[:, None], z, a)
                self.kinds.append(Kind(count * w, edge, start=a, stop=z, tile=w))
        if rows.entries.shape[-1]:
            single, used = (work.of(t, self.batch, self.unit, block) for t in (rows.entries, rows.live))
            if ordered:
                used = used & (single <= self.newest[:, None])
            for edge in (True, False):
                count, single_ = _packed(used & ((single >= tip) == edge), single)
                self.kinds.append(Kind(count, edge, single=single_))

    def _touched(self, pick: Tensor | slice) -> Tensor:
        """bool `[I, M]`: entries the rule may reach from some row of these items."""
        work, m = self.work, self.work.layout.shape[3]
        batch, unit, group = self.batch[pick], self.unit[pick], self.group[pick]
        entries = torch.arange(m, device=batch.device).expand(len(batch), m)
        pos = work.positions(batch, group, entries)
        newest = self.newest[pick, None]
        hit = work.rule(batch, unit, self.oldest[pick, None], newest, pos)
        assert hit is not None
        hit = hit & (entries < self.length[pick, None])
        return hit & (pos <= newest) if work.layout.causal else hit

    # ------------------------------------------------------------------ chunks
    def chunks(self) -> Iterator[Chunk]:
        if not self.kinds:
            return
        costs = list(zip(*(k.count.tolist() for k in self.kinds), strict=True))
        widest = [max(c) for c in zip(*costs, strict=True)]
        if min(sum(c) for c in costs) * WASTE >= sum(widest) and self._fits(len(costs), sum(widest)):
            yield self._chunk(slice(None), widest)
            return
        order = sorted((i for i, c in enumerate(costs) if sum(c)), key=lambda i: sum(costs[i]))
        for group in self._groups(order, costs):
            wide = [max(costs[i][j] for i in group) for j in range(len(widest))]
            yield self._chunk(torch.tensor(group, device=self.unit.device), wide)

    def _fits(self, items: int, slots: int) -> bool:
        return items == 1 or slots <= self.work.segment(items, self.work.size)

    def _groups(self, order: list[int], costs: list[tuple[int, ...]]) -> Iterator[list[int]]:
        """Runs of the sorted items that fit the bounds and, padded to their widest, waste little."""
        group: list[int] = []
        widest, total = [0] * len(self.kinds), 0
        for i in order:
            wide = [max(a, c) for a, c in zip(widest, costs[i], strict=True)]
            items = len(group) + 1
            padded, real = items * sum(wide), total + sum(costs[i])
            if group and not (self._fits(items, sum(wide)) and padded <= WASTE * real + 64 * items):
                yield group
                group, wide, real = [], list(costs[i]), sum(costs[i])
            group.append(i)
            widest, total = wide, real
        if group:
            yield group

    def _chunk(self, at: Tensor | slice, widths: list[int]) -> Chunk:
        work = self.work
        batch, unit, group, newest = self.batch[at], self.unit[at], self.group[at], self.newest[at, None]
        pieces = [kind.slots(at, width) for kind, width in zip(self.kinds, widths, strict=True) if width]
        e, ok = (torch.cat(t, 1) if len(t) > 1 else t[0] for t in zip(*pieces, strict=True))
        edge, ruled = (
            sum(w for k, w in zip(self.kinds, widths, strict=True) if k.edge and (k.rule or not rule_only))
            for rule_only in (False, True)
        )
        if work.lens is not None:
            ok = ok & (e < self.length[at, None])
        e = e.clamp(0, work.layout.shape[3] - 1)
        if work.kv.bias is not None:
            ok = ok & (work.kv.bias.detach()[batch, group].gather(1, e) > float("-inf"))
        if work.layout.causal and work.kv.pos is not None:
            ok = ok & (work.positions(batch, group, e) <= newest)
        elif work.layout.causal:
            ok = ok & (e <= newest)
        empty: Tensor | None = None
        if not bool(ok.all()):
            stand_in = ok.to(torch.uint8).argmax(1, keepdim=True)
            empty = ~ok.gather(1, stand_in)[:, 0]
            e = torch.where(ok, e, e.gather(1, stand_in))
            empty = empty if bool(empty.any()) else None
        return Chunk(work, batch, unit, group, self.rows[at], self.fresh[at], self.q_pos[at], e, ok, edge, ruled, empty)
