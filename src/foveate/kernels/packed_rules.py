"""A static rule of one query a row as listed tiles, which attention over packed entries serves.

Sink and window are two runs of entries, a stride is every so many-th tile, and what a layout lists beside them is cut where
they are. The tiles are made on the device from its lengths, so that a captured step finds those of its own length; on a GPU
`triton/rule_lists.py` does it in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from ..lists import same_lead, used_slots

WIDTH = 64  # entries of a tile, where the layout names none
MOST = 0.25  # of all entries: on a CPU a rule that names more is cheaper over a dense copy (measured at 8K: 0.1 to 0.3)


def why_not(layout: Layout, kv: KV) -> str | None:
    """The reason `listed` does not serve this layout, which has a rule, or None."""
    if kv.pos is not None:
        return "it serves a rule over entries in text order, not where some were evicted"
    if not layout.causal:
        return "it serves a rule of causal attention"
    if layout.stride is not None and (layout.tiles is not None or layout.entries is not None):
        return "it serves a stride without lists beside it"
    return None


def reach(layout: Layout) -> float:
    """About the share of all entries that the longest list of this layout names. Waits for the device of the layout."""
    m, seen = layout.shape[3], 0.0
    for t in (layout.sink, layout.window):
        seen += 0 if t is None else int(t.max())
    if layout.stride is not None:
        seen += m / max(1, int(torch.where(layout.stride > 0, layout.stride, m).min()))
    for count, width in ((layout.tile_count, layout.tile_width), (layout.entry_count, 1)):
        seen += 0 if count is None else int(count.max()) * width
    return seen / m


def listed(layout: Layout, kv: KV) -> list[Layout]:
    """Layouts with the pairs of this one, each once: tiles, and the single entries that the rule does not name.

    For what `why_not` accepts; kv heads of a row are of one length. Tiles ascend, and the first may begin before entry 0: a
    sink ends where a tile does.
    """
    b, h, _, m = layout.shape
    end = _end(layout, kv)
    nothing = torch.zeros(1, 1, dtype=torch.int32, device=end.device)
    sink, window = (nothing if t is None else t for t in (layout.sink, layout.window))
    sink, window, end = same_lead(sink, window, end)
    sink = torch.minimum(sink, end)
    begin = torch.maximum(end - window, sink)
    if layout.entries is not None:
        assert layout.entry_count is not None
        index, used = layout.entries[:, :, 0], used_slots(layout.entries[:, :, 0], layout.entry_count[:, :, 0])
        width, some = 1, _between(index, used, sink, begin, 1)
    elif layout.tiles is not None:
        assert layout.tile_count is not None
        index, used = layout.tiles[:, :, 0], used_slots(layout.tiles[:, :, 0], layout.tile_count[:, :, 0])
        width, some = layout.tile_width, _between(index, used, sink, begin, layout.tile_width)
    elif layout.stride is not None:
        width = layout.tile_width
        stride, phase = same_lead(layout.stride, nothing if layout.phase is None else layout.phase)
        step = stride.clamp(min=1)[..., None]
        number = phase[..., None] % step + step * torch.arange(-(-m // width), dtype=torch.int32, device=end.device)
        index, used = number * width, stride[..., None] > 0
        some = _between(index, used, sink, begin, width)
    else:
        width, some = WIDTH, None
    grid = dict(q_pos=layout.q_pos)
    if some is not None and width == 1:
        entries, count = some
        alone = Layout((b, h, 1, m), entries=entries[:, :, None], entry_count=count[:, :, None], **grid)
        return [_tiles(layout, sink, begin, end, None, WIDTH), alone]
    return [_tiles(layout, sink, begin, end, some, width)]


def slots_of(layout: Layout, width: int) -> int:
    """Slots for the tiles of a rule, whatever numbers it has on the device, and for those that are listed beside it.

    Runs and the tiles of a grid lie side by side, and each run may end with a part of a tile.
    """
    return -(-layout.shape[3] // width) + 3 + (0 if layout.tiles is None else layout.tiles.shape[-1])


def _end(layout: Layout, kv: KV) -> Tensor:
    """int32 `[B|1, 1]`: one more than the entry that each row's query is."""
    if layout.q_pos is not None:
        return layout.q_pos[:, :1].to(torch.int32) + 1
    if kv.len is not None:
        return kv.len[:, :1].to(torch.int32)
    return torch.full((1, 1), kv.capacity, dtype=torch.int32, device=kv.device)


def _between(index: Tensor, used: Tensor, sink: Tensor, begin: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Tiles of a list `[B|1, Hl, T]` that reach beyond the sink and begin before the window: (they, how many).

    One that reaches into the sink begins later than the sink's last tile, which stops there, as it would stop at a window.
    """
    index, used, low, high = same_lead(index, used.expand(index.shape), sink[..., None], begin[..., None])
    first = (used & (index + width <= low)).sum(-1, dtype=torch.int32)
    count = (used & (index + width > low) & (index < high)).sum(-1, dtype=torch.int32)
    slot = first[..., None] + torch.arange(index.shape[-1], dtype=torch.int32, device=index.device)
    return index.gather(-1, slot.clamp(max=index.shape[-1] - 1).long()), count


def _tiles(
    layout: Layout, sink: Tensor, begin: Tensor, end: Tensor, some: tuple[Tensor, Tensor] | None, width: int
) -> Layout:
    """The entries before `sink`, tiles that begin before `begin`, and the entries from there to `end`, in one list."""
    b, h, _, m = layout.shape
    sink, begin, end = (t[..., None] for t in (sink, begin, end))
    if some is None:
        sink, begin, end = same_lead(sink, begin, end)
        count = torch.zeros_like(sink)
    else:
        middle, count, sink, begin, end = same_lead(some[0], some[1][..., None], sink, begin, end)
    early = -(-sink // width)
    slot = torch.arange(slots_of(layout, width), dtype=torch.int32, device=end.device)
    tiles = torch.where(slot < early, sink - (early - slot) * width, begin + (slot - early - count) * width)
    if some is not None:
        place = (slot - early).clamp(0, middle.shape[-1] - 1).long()
        tiles = torch.where((slot >= early) & (slot < early + count), middle.gather(-1, place), tiles)
    count = (early + count + -(-(end - begin) // width))[..., 0]
    if end.device.type == "cpu":  # nobody waits for it
        tiles = tiles[..., : max(1, int(count.max()))]
    return Layout(
        (b, h, 1, m),
        q_pos=layout.q_pos,
        tile_width=width,
        tiles=tiles[:, :, None].to(torch.int32),
        tile_count=count[:, :, None].to(torch.int32),
    )
