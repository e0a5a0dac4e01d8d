"""OffloadStore: keys and values in host memory, whatever device computes. What a step reads goes to the device.

On the CPU it is a `DenseStore` with room set aside. With another device, planning a decode step takes place on the host,
next to the keys, and `fetch` copies the entries its plan names, and no others, to the device in one piece; `whole` lends
a layer's entries to the device for a prompt. Version 1: sink and recent entries are fetched like all others, and copies
wait for each other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .. import lists
from ..errors import CacheError, ConfigError, ShapeError
from ..kv import KV
from ..layout import Layout
from ..methods.base import Selection
from .dense import DenseStore
from .store import Store

HOST = torch.device("cpu")


class OffloadStore(DenseStore):
    """A rectangle in host memory: keys `[B, G, capacity, D]`, values `[B, G, capacity, Dv]`; see `DenseStore`.

    `reserve` tokens fit before it grows for the first time. An operating system gives memory when it is written, so a
    reserve costs nothing before; growth needs the old and the new rectangle at once.
    """

    kind: ClassVar[str] = "offload"

    @staticmethod
    def empty(k: Tensor, v: Tensor, reserve: int = 0) -> OffloadStore:
        """An empty store for rows, heads, widths and dtypes like those of k and v `[B, G, n, D]`, on any device."""
        if reserve < 0:
            raise ConfigError(f"offload: reserve expected >= 0 tokens, got {reserve}")
        shape = (*k.shape[:2], reserve)
        keys, values = (torch.empty(*shape, t.shape[3], dtype=t.dtype, device=HOST) for t in (k, v))
        return OffloadStore(keys, values, [0] * k.shape[0])

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        return super().append(k.to(HOST), v.to(HOST), None if valid is None else valid.to(HOST), seen)

    def select(self, selection: Selection) -> Store:
        """Keep only these entries. CacheError where heads of a row keep different numbers: those want ragged storage."""
        keep = replace(
            selection,
            indices=selection.indices.to(HOST),
            counts=None if selection.counts is None else selection.counts.to(HOST),
            bias=None if selection.bias is None else selection.bias.to(HOST),
        )
        store = super().select(keep)
        if type(store) is not DenseStore:
            raise CacheError(f"selection: storage 'offload' holds one rectangle, this one needs storage {store.kind!r}")
        return self._of(store)

    def fork(self) -> OffloadStore:
        return self._of(super().fork())

    @staticmethod
    def restore(state: dict[str, Tensor]) -> OffloadStore:
        """The inverse of `state`."""
        return OffloadStore._of(DenseStore.restore({name: t.to(HOST) for name, t in state.items()}))

    @staticmethod
    def _of(store: DenseStore) -> OffloadStore:
        return OffloadStore(store.k, store.v, store.count, store.pos, store.bias)


# ---------------------------------------------------------------------- from the host to the device
def whole(kv: KV, device: torch.device | str) -> KV:
    """All entries of a view on `device`: for a prompt, whose layer holds them no longer than it computes."""
    names = ("k", "v", "len", "table", "offsets", "pos", "bias")
    return replace(kv, **{name: t.to(device) for name in names if (t := getattr(kv, name)) is not None})


def fetch(kv: KV, layout: Layout, device: torch.device | str) -> tuple[KV, Layout]:
    """The entries that a plan of one query a row names, and a layout that sees all of them.

    Attention of the same queries over the two results is that over `kv` and `layout`. The new view has a kv head for each
    list (one for each query head, where these have their own, so that shared lists copy less) and its entries' true
    positions; what is copied is its capacity times D and Dv. Dense layouts and several queries lend the whole view.

    Args:
        kv: any view on the host. layout: a plan over it, its tensors on the host. device: where to attend.
    """
    b, h, n, m = layout.shape
    if m != kv.capacity or b != kv.shape[0]:
        raise ShapeError(f"layout: expected [B, M] = {[kv.shape[0], kv.capacity]} like the view, got {[b, m]}")
    if layout.full or n != 1:
        return whole(kv, device), layout.to(device)
    entries, count = _named(kv, layout)
    g, units = kv.shape[1], entries.shape[1]
    entries, count = (t.expand(b, *t.shape[1:]) for t in (entries, count))
    entries, count = (lists.repeat_heads(t, g if g % units == 0 else units) for t in (entries, count))
    units = entries.shape[1]
    if units % g:
        entries, count = (lists.repeat_heads(t, h) for t in (entries, count))
        units = h
    near = entries.reshape(b, g, -1)  # the lists of a kv head side by side
    k, v = (t.reshape(b, units, -1, t.shape[-1]) for t in kv.gather(near))
    pos, bias = (None if t is None else t.gather(2, near).view(entries.shape) for t in (kv.positions(), kv.bias))
    at = layout.query_positions(kv)[..., 0].amax(1, keepdim=True)
    seen = KV.dense(k, v, len=count.to(torch.int32), pos=pos, bias=bias)
    return whole(seen, device), Layout.dense(b, h, 1, seen.capacity, causal=layout.causal, q_pos=at).to(device)


def _named(kv: KV, layout: Layout) -> tuple[Tensor, Tensor]:
    """Entries int64 `[B, Hl, C]` that a one-row layout names, each once, ascending, and counts `[B, Hl]`; what does not
    exist or lies ahead of the query is left out. Padded with entry 0."""
    m = kv.capacity
    if layout.has_rule:  # looks at every position; lists beside it are in the mask too
        mask = layout.to_mask(kv)[:, :, 0]
        entries = torch.where(mask, torch.arange(m, device=mask.device), m)
        return _packed(entries, m)
    rows = lists.expand(layout, 0, 1)
    start, stop, entries, live = lists.same_lead(rows.start, rows.stop, rows.entries, rows.live)
    tile = start[:, :, 0, :, None] + torch.arange(layout.tile_width, device=start.device)
    tile = torch.where(tile < stop[:, :, 0, :, None], tile, m).flatten(2)
    entries = torch.cat([tile, torch.where(live, entries, m)[:, :, 0]], -1).expand(kv.shape[0], -1, -1)
    end = kv.lengths()
    if end.shape[1] % entries.shape[1] == 0:  # lists that kv heads of other lengths share
        entries = lists.repeat_heads(entries, end.shape[1])
    heads = torch.arange(entries.shape[1], device=end.device) * end.shape[1] // entries.shape[1]
    return _packed(torch.where(entries < end[:, heads, None], entries, m), m)


def _packed(entries: Tensor, none: int) -> tuple[Tensor, Tensor]:
    """Rows in order, without repeats and without `none`, cut to the longest."""
    entries = entries.sort(-1).values
    again = torch.cat([torch.zeros_like(entries[..., :1], dtype=torch.bool), entries[..., 1:] == entries[..., :-1]], -1)
    entries = entries.masked_fill(again, none).sort(-1).values
    count = (entries < none).sum(-1)
    entries = entries[..., : max(1, int(count.max()))]
    return torch.where(entries < none, entries, 0), count
