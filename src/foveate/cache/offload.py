"""OffloadStore: keys and values in host memory, whatever device computes. What a step reads goes to the device.

On the CPU it is a `DenseStore` with room set aside. With another device, planning a decode step takes place on the host,
next to the keys, and `fetch` copies the entries its plan names, and no others, to the device in one piece. What the last
step fetched stays there (`Near`), so that only what is named anew is copied, from pinned memory and without a wait of the
host. `whole` lends a layer's entries to the device for a prompt.

A layer whose plan is dense needs everything. While one is computed, the next one's entries follow on a stream of their
own (`follow`), if its last step was dense too, and the host waits for neither. That needs pinned memory, which what grows
under a model on a GPU is as long as half of the free memory is left.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import lists
from ..errors import CacheError, ConfigError, ShapeError
from ..kv import KV
from ..layout import Layout, Parts
from ..methods.base import Selection
from .dense import DenseStore
from .store import Store

HOST = torch.device("cpu")
NONE = 1 << 62  # no entry has this number


class OffloadStore(DenseStore):
    """A rectangle in host memory: keys `[B, G, capacity, D]`, values `[B, G, capacity, Dv]`; see `DenseStore`.

    `reserve` tokens fit before it grows for the first time. An operating system gives memory when it is written, so a
    reserve costs nothing before; growth needs the old and the new rectangle at once.
    """

    kind: ClassVar[str] = "offload"

    def __init__(self, k: Tensor, v: Tensor, lens: list[int], pos: Tensor | None = None, bias: Tensor | None = None):
        super().__init__(k, v, lens, pos, bias)
        self.near, self.pins = Near(), False

    @property
    def nbytes(self) -> int:
        """As of every store; PyTorch rounds pinned memory up to a power of two."""
        given = [t.numel() * t.element_size() for t in (self.k, self.v, self.pos, self.bias) if t is not None]
        return sum(given) if not self.k.is_pinned() else sum(map(_rounded, given[:2])) + sum(given[2:])

    def _blank(self, t: Tensor, size: int) -> Tensor:
        shape = (*t.shape[:2], size, *t.shape[3:])
        if self.pins and t.dim() == 4:
            need = _rounded(t.shape[0] * t.shape[1] * size * t.shape[3] * t.element_size())
            with contextlib.suppress(RuntimeError, ValueError):  # no more of it, or nobody knows
                if 2 * need <= os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
                    return torch.empty(shape, dtype=t.dtype, pin_memory=True)
        return t.new_empty(shape)

    @staticmethod
    def empty(k: Tensor, v: Tensor, reserve: int = 0) -> OffloadStore:
        """An empty store for rows, heads, widths and dtypes like those of k and v `[B, G, n, D]`, on any device."""
        if reserve < 0:
            raise ConfigError(f"offload: reserve expected >= 0 tokens, got {reserve}")
        shape = (*k.shape[:2], reserve)
        keys, values = (torch.empty(*shape, t.shape[3], dtype=t.dtype, device=HOST) for t in (k, v))
        return OffloadStore(keys, values, [0] * k.shape[0])

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        self.pins = k.device.type == "cuda"
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

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.near.clear()  # other entries will have these numbers

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        self.near.clear()

    def fork(self) -> OffloadStore:
        k, v = (self._blank(t, t.shape[2]).copy_(t) for t in (self.k, self.v))  # pinned where growth is
        pos, bias = (None if t is None else t.clone() for t in (self.pos, self.bias))
        out = OffloadStore(k, v, list(self.count), pos, bias)
        out.pins = self.pins
        return out

    @staticmethod
    def restore(state: dict[str, Tensor]) -> OffloadStore:
        """The inverse of `state`."""
        return OffloadStore._of(DenseStore.restore({name: t.to(HOST) for name, t in state.items()}))

    @staticmethod
    def _of(store: DenseStore) -> OffloadStore:
        return OffloadStore(store.k, store.v, store.count, store.pos, store.bias)


# ---------------------------------------------------------------------- from the host to the device
class Near:
    """The entries that the last step fetched, on the device: most of them are named again by the next one.

    Attributes:
        names: int64 `[B, U, C]` on the host, entries of each list, ascending, padded with a number beyond all entries.
        k, v: `[B, U, C, D]` and `[B, U, C, Dv]` on the device. copied: entries that came from the host so far.
        whole: the last step needed every entry. ahead: those on their way for the next one: keys, values, how many of
            each row are among them, and the event after which they are there.
    """

    def __init__(self) -> None:
        self.names: Tensor | None = None
        self.k: Tensor
        self.v: Tensor
        self.copied, self.whole = 0, False
        self.ahead: tuple[Tensor, Tensor, int, Any] | None = None

    def send(self, store: OffloadStore, device: torch.device | str) -> None:
        """Begin to copy all entries; nobody waits."""
        if self.ahead is not None or min(store.count) == 0:
            return
        side = _side(device)
        with contextlib.nullcontext() if side is None else torch.cuda.stream(side):
            k, v = (t.to(device, non_blocking=side is not None, copy=True) for t in (store.k, store.v))
            self.ahead = k, v, min(store.count), None if side is None else side.record_event()

    def lend(self, kv: KV, device: torch.device | str) -> KV:
        """All entries of a view of the store, with those that were sent ahead."""
        ahead, self.ahead, self.whole = self.ahead, None, True
        if ahead is None or ahead[0].shape[2] < kv.capacity or ahead[0].device.type != torch.device(device).type:
            return whole(kv, device)
        k, v, n, event = ahead
        if event is not None:
            now = torch.cuda.current_stream(k.device)
            now.wait_event(event)
            for t in (k, v):
                t.record_stream(now)
        for there, t in ((k, kv.k), (v, kv.v)):
            there[:, :, n : kv.capacity] = _send(t[:, :, n:].contiguous(), device)
        rest = whole(replace(kv, k=kv.k[:, :, :0], v=kv.v[:, :, :0]), device)
        return replace(rest, k=k[:, :, : kv.capacity], v=v[:, :, : kv.capacity])

    def clear(self) -> None:
        self.names = self.ahead = None
        self.__dict__.pop("k", None)
        self.__dict__.pop("v", None)

    def fetch(self, kv: KV, entries: Tensor, count: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Keys `[B, U, C, D]` and values of entries int64 `[B, U, C]`, the first `count` `[B, U]` of each list, on `device`.

        U is a multiple of the kv heads of `kv`, which lies on the host; lists are ascending. Padding has no meaning.
        """
        b, u, c = entries.shape
        live = torch.arange(c) < count[..., None]
        names = entries.masked_fill(~live, NONE)
        old = self.names
        if old is not None and (old.shape[:2] != (b, u) or self.k.device.type != torch.device(device).type):
            old = None
        if old is None or old.shape[2] == 0:
            got = self._copy(kv, entries, device)
            self.copied += int(count.sum())
        else:
            at = torch.searchsorted(old, names).clamp(max=old.shape[2] - 1)
            known = live & (old.gather(2, at) == names)
            fresh = live & ~known
            wide = int(fresh.sum(-1).max())
            where = torch.where(known, at, old.shape[2] + fresh.cumsum(-1) - 1).masked_fill(~live, 0)
            near: tuple[Tensor, ...] = (self.k, self.v)
            if wide:
                order = fresh.byte().sort(dim=-1, descending=True, stable=True).indices[..., :wide]
                more = self._copy(kv, entries.gather(2, order), device)
                near = tuple(torch.cat(pair, 2) for pair in zip(near, more, strict=True))
                self.copied += int(fresh.sum())
            index = _send(where, device)[..., None]
            got = tuple(t.gather(2, index.expand(b, u, c, t.shape[3])) for t in near)
        self.names, self.k, self.v = names, got[0], got[1]
        return self.k, self.v

    @staticmethod
    def _copy(kv: KV, entries: Tensor, device: torch.device | str) -> tuple[Tensor, ...]:
        b, u, _ = entries.shape
        parts = kv.gather(entries.reshape(b, kv.shape[1], -1))  # the lists of a kv head side by side
        return tuple(_send(t.reshape(b, u, -1, t.shape[-1]), device) for t in parts)


def _rounded(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def follow(stores: Mapping[int, OffloadStore], layer: int, device: torch.device) -> None:
    """Send the entries of the layer after this one, if its last step needed all of them. stores: layer -> its store."""
    after = stores.get(layer + 1, stores[min(stores)])
    if after.k.is_pinned() and after.near.whole and after is not stores[layer]:
        after.near.send(after, device)


@functools.cache
def _side(device: torch.device | str) -> Any:
    """The stream on which entries follow, None where there are no streams."""
    return torch.cuda.Stream(device) if torch.device(device).type == "cuda" else None


def _send(t: Tensor, device: torch.device | str) -> Tensor:
    """t on the device. A GPU reads it from pinned memory when its stream gets there: the host goes on."""
    if torch.device(device).type != "cuda":
        return t.to(device)
    return t.pin_memory().to(device, non_blocking=True)


def bring(states: Iterable[Any], device: torch.device) -> None:
    """What methods remember in these dicts, on `device`: prompts run where the model is, decode steps beside the keys."""
    for state in states:
        for name in list(state):
            state[name] = _moved(state[name], device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device).as_subclass(type(value))
    if isinstance(value, dict):
        for name in list(value):
            value[name] = _moved(value[name], device)
    elif isinstance(value, (list, tuple)):
        return type(value)(_moved(part, device) for part in value)
    elif type(value).__module__.startswith("foveate.") and hasattr(value, "__dict__"):
        for name, part in vars(value).items():
            object.__setattr__(value, name, _moved(part, device))
    return value


def fetch_parts(kv: KV, parts: Parts, device: torch.device | str) -> Parts:
    """The same for several softmaxes: every part with keys, values and queries of its own on the device."""
    out = []
    for part in parts.parts:
        if part.kv is None:
            near, plan = fetch(kv, part.layout, device)
        else:
            near, plan = whole(part.kv, device), part.layout.to(device)
        q, gate = (None if t is None else t.to(device) for t in (part.q, part.gate))
        out.append(replace(part, layout=plan, kv=near, q=q, gate=gate))
    return replace(parts, parts=tuple(out))


def whole(kv: KV, device: torch.device | str) -> KV:
    """All entries of a view on `device`: for a prompt, whose layer holds them no longer than it computes."""
    names = ("k", "v", "len", "table", "offsets", "pos", "bias")
    return replace(kv, **{name: t.to(device) for name in names if (t := getattr(kv, name)) is not None})


def fetch(kv: KV, layout: Layout, device: torch.device | str, held: Near | None = None) -> tuple[KV, Layout]:
    """The entries that a plan of one query a row names, and a layout that sees all of them.

    Attention of the same queries over the two results is that over `kv` and `layout`. The new view has a kv head for each
    list (one for each query head, where these have their own, so that shared lists copy less) and its entries' true
    positions; what is copied is its capacity times D and Dv. Dense layouts and several queries lend the whole view.

    Args:
        kv: any view on the host. layout: a plan over it, its tensors on the host. device: where to attend.
        held: what the last step fetched of the same store, brought up to date.
    """
    b, h, n, m = layout.shape
    if m != kv.capacity or b != kv.shape[0]:
        raise ShapeError(f"layout: expected [B, M] = {[kv.shape[0], kv.capacity]} like the view, got {[b, m]}")
    if layout.full or n != 1:
        return whole(kv, device) if held is None else held.lend(kv, device), layout.to(device)
    if held is not None:
        held.whole, held.ahead = False, None
    entries, count = _named(kv, layout)
    g, units = kv.shape[1], entries.shape[1]
    entries, count = (t.expand(b, *t.shape[1:]) for t in (entries, count))
    entries, count = (lists.repeat_heads(t, g if g % units == 0 else units) for t in (entries, count))
    units = entries.shape[1]
    if units % g:
        entries, count = (lists.repeat_heads(t, h) for t in (entries, count))
        units = h
    near = entries.reshape(b, g, -1)  # the lists of a kv head side by side
    k, v = (Near() if held is None else held).fetch(kv, entries, count, device)
    pos, bias = (
        None if t is None else _send(t.gather(2, near).view(entries.shape), device) for t in (kv.positions(), kv.bias)
    )
    at = layout.query_positions(kv)[..., 0].amax(1, keepdim=True)
    seen = KV.dense(k, v, len=_send(count.to(torch.int32), device), pos=pos, bias=bias)
    return seen, Layout.dense(b, h, 1, seen.capacity, causal=layout.causal, q_pos=at).to(device)


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
