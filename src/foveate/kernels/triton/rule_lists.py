"""A static rule of one query a row as listed tiles, in one launch: what `kernels/packed_rules.py` says, list by list.

Every number is read on the device, so that a captured step finds the tiles of its own length. Slots behind a list's count
stay as they were.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from ...lists import RULE_FIELDS
from ..packed_rules import WIDTH, slots_of
from .paging_launch import listed as named
from .steps import BIG

CHUNK = 256  # slots that a program looks at, or fills, at once


@triton.jit
def _of(t, b, l, lists, n, own):
    """The number that list `l` of row `b` finds in a tensor `[B|1, n]`."""
    return tl.load(t + b * own + l * n // lists).to(tl.int32)


@triton.jit(do_not_specialize=["capacity", "lists", "slots", "listed", "pos_sb", "len_sb"])
def rule_tiles(
    sink, window, stride, phase, index, index_count, q_pos, length, tiles, tile_count, moved, moved_count,
    capacity, lists, slots, listed, pos_sb, len_sb,
    sink_n, sink_own, window_n, window_own, stride_n, stride_own, phase_n, phase_own, index_n, index_own,
    WIDTH: tl.constexpr, LISTED: tl.constexpr,  # entries of a tile; of what is listed beside the rule, 1 for single entries
    CHUNK: tl.constexpr,
):  # fmt: skip
    """grid: (B|1 * lists,). Rules int32 `[B|1, *_n]`, or None for a part that there is not; *_own: *_n where rows differ.

    index int32 `[B|1, index_n, listed]` with counts. tiles int32 `[B|1, lists, slots]` and counts; moved `[B|1, lists,
    listed]` and counts: the single entries that the rule does not name.
    """
    row = tl.program_id(0)
    b = row // lists
    l = row % lists
    end = capacity
    if q_pos is not None:
        end = tl.load(q_pos + b * pos_sb).to(tl.int32) + 1
    elif length is not None:
        end = tl.load(length + b * len_sb).to(tl.int32)
    low = end * 0
    if sink is not None:
        low = tl.minimum(_of(sink, b, l, lists, sink_n, sink_own), end)
    begin = end
    if window is not None:
        begin = end - _of(window, b, l, lists, window_n, window_own)
    begin = tl.maximum(begin, low)
    i = tl.arange(0, CHUNK)
    first = end * 0  # of the tiles in the middle
    many = end * 0
    step = end * 0
    at = end * 0
    if stride is not None:
        step = _of(stride, b, l, lists, stride_n, stride_own)
        there = step > 0
        step = tl.maximum(step, 1)
        if phase is not None:
            at = _of(phase, b, l, lists, phase_n, phase_own) % step
        first = tl.cdiv(tl.maximum(low // WIDTH - at, 0), step)
        many = tl.where(there, tl.maximum(tl.cdiv(tl.maximum(tl.cdiv(begin, WIDTH) - at, 0), step) - first, 0), 0)
    if index is not None:
        spot = b * index_own + l * index_n // lists
        used = tl.load(index_count + spot)
        index += spot.to(tl.int64) * listed
        for c in range(0, used, CHUNK):
            start = tl.load(index + c + i, mask=c + i < used, other=BIG)
            first += tl.sum((start + LISTED <= low).to(tl.int32))
            many += tl.sum(((start + LISTED > low) & (start < begin)).to(tl.int32))
        if LISTED == 1:
            moved += row.to(tl.int64) * listed
            for c in range(0, many, CHUNK):
                here = c + i < many
                tl.store(moved + c + i, tl.load(index + first + c + i, mask=here, other=0), mask=here)
            tl.store(moved_count + row, many)
            many = end * 0
    early = tl.cdiv(low, WIDTH)
    count = early + many + tl.cdiv(end - begin, WIDTH)
    tiles += row.to(tl.int64) * slots
    for c in range(0, count, CHUNK):
        slot = c + i
        tile = tl.where(slot < early, low - (early - slot) * WIDTH, begin + (slot - early - many) * WIDTH)
        here = (slot >= early) & (slot < early + many)
        if stride is not None:
            tile = tl.where(here, (at + (first + slot - early) * step) * WIDTH, tile)
        if index is not None and LISTED > 1:
            tile = tl.where(here, tl.load(index + first + slot - early, mask=here, other=0), tile)
        tl.store(tiles + slot, tile, mask=slot < count)
    tl.store(tile_count + row, count)


def listed(layout: Layout, kv: KV) -> list[Layout]:
    """What `packed_rules.listed` gives, in one launch."""
    b, h, _, m = layout.shape
    index, count, wide = named(layout)
    each = {name: t for name in RULE_FIELDS if (t := getattr(layout, name)) is not None}
    length = None if layout.q_pos is not None else kv.len
    leads = [*each.values()] if index is None else [*each.values(), index]
    lists = math.lcm(*(t.shape[1] for t in leads))
    end = layout.q_pos if length is None else length
    batch = max([t.shape[0] for t in leads] + ([] if end is None else [end.shape[0]]))
    wide = 0 if index is None else wide
    width = layout.tile_width if wide > 1 or layout.stride is not None else WIDTH
    slots, n = slots_of(layout, width), 0 if index is None else index.shape[-1]
    ints: dict[str, Any] = dict(dtype=torch.int32, device=kv.device)
    tiles, tile_count = torch.empty(batch, lists, 1, slots, **ints), torch.empty(batch, lists, 1, **ints)
    moved = moved_count = None
    if wide == 1:
        moved, moved_count = torch.empty(batch, lists, 1, n, **ints), torch.empty(batch, lists, 1, **ints)
    rules = [None if (t := each.get(name)) is None else t.contiguous() for name in RULE_FIELDS]
    rule_tiles[(batch * lists,)](
        *rules, None if index is None else index.contiguous(), None if count is None else count.contiguous(),
        layout.q_pos, length, tiles, tile_count, moved, moved_count,
        m, lists, slots, n, _rows(layout.q_pos), _rows(length), *(x for t in (*rules, index) for x in _lead(t)),
        WIDTH=width, LISTED=wide, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    out = [Layout((b, h, 1, m), q_pos=layout.q_pos, tile_width=width, tiles=tiles, tile_count=tile_count)]
    if moved is not None:
        out.append(Layout((b, h, 1, m), q_pos=layout.q_pos, entries=moved, entry_count=moved_count))
    return out


def _lead(t: Tensor | None) -> tuple[int, int]:
    """(lists of a row, numbers from one row's to the next)."""
    return (1, 0) if t is None else (t.shape[1], t.shape[1] if t.shape[0] > 1 else 0)


def _rows(t: Tensor | None) -> int:
    return 0 if t is None or t.shape[0] == 1 else t.stride(0)
