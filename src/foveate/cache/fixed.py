"""Stores whose lengths live on the device, so that a captured decode step can be replayed over them.

An ordinary store tells kernels its length through shapes and offsets that the host computes; a captured graph cannot see
those change. Here every view has the same shapes, one token is written where tensors say, and entries are dropped in place.
Where graphs outlive it (`stays`), several tokens are written and rolled back in place too; who captures that says `wide`.
The host counts along, and whoever replays a graph says so (`replayed`). `fix` makes one from an ordinary store, where there
is one for its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from ..scores import fused
from ..scores.keys import BUDGET, GPU_BUDGET, pieces
from .dense import DenseStore
from .ragged import RaggedStore
from .ring import RingStore
from .select import check
from .store import SLACK, Store, room

if TYPE_CHECKING:
    from ..scores.bounds import Bounds


class Fixed:
    """What fixed stores have in common.

    Attributes:
        seen_now: int64 `[B]`, tokens seen by each row. full: no token fits any more. beside: page bounds of these entries,
            kept by a method, which a store may bring up to date while it writes a token; whoever knows both sets it.
        stays: graphs stay right after a call of several tokens and after rollbacks, so both happen in this memory, where the
            store can; whoever owns the graphs sets it. moved: something of the kind has happened.
        wide: views of a call of several tokens are those of a step, of one shape and with lengths on the device.
    """

    seen_now: Tensor
    beside: Bounds | None = None
    stays: bool = False
    moved: bool = False
    wide: bool = False

    @property
    def full(self) -> bool:
        raise NotImplementedError

    def phase(self) -> str:
        """What the host knows of the next step and a graph cannot see: steps that differ in it have graphs of their own."""
        return ""

    def takes(self, n: int) -> bool:
        """Whether n tokens of each row, and rollbacks, may be written into the memory and the lengths that graphs read."""
        return False

    def replayed(self, n: int = 1) -> None:
        """n more tokens of each row came in, written by a replayed graph; more than one only where `takes` says so."""
        raise NotImplementedError

    def counted(self) -> object:
        """What the host has counted; `recount` goes back to it."""
        raise NotImplementedError

    def recount(self, counted: object) -> None:
        raise NotImplementedError


def fix(store: Store | None, seen: list[int]) -> Store | None:
    """A fixed store with the entries of this one, which must not be used any more; None if its kind has none."""
    if isinstance(store, Fixed):
        return store  # type: ignore[return-value]
    make = _KINDS.get(type(store))
    return None if make is None else make(store, seen)


def fixable(store: Store | None) -> bool:
    """Whether `fix` has a fixed store for this one."""
    return isinstance(store, Fixed) or type(store) in _KINDS


class FixedDense(DenseStore, Fixed):
    """A rectangle with room for `size` entries. now: int32 `[B, G]`, entries that exist."""

    _said: Tensor | None = None  # a copy of `now` that the last append made, while it holds
    _several = False  # the last call brought several tokens: views are those of an ordinary store, unless `wide`

    def __init__(self, store: DenseStore, seen: list[int], size: int | None = None):
        used, have = max(store.count), store.k.shape[2]
        if size is None:
            size = have if have - used >= SLACK // 2 else used + room(used)
        if size < used:
            raise CacheError(f"size: expected room for {used} entries at least, got {size}")
        k, v, pos, bias = (t if t is None else _widen(t, used, size) for t in (store.k, store.v, store.pos, store.bias))
        assert k is not None and v is not None
        super().__init__(k, v, store.count, pos, bias)
        self.now = torch.tensor(self.lens, dtype=torch.int32, device=k.device)
        self.seen_now = torch.tensor(seen, dtype=torch.int64, device=k.device)

    @property
    def full(self) -> bool:
        return max(self.count) >= self.k.shape[2]

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        n = k.shape[2]
        if valid is not None or max(self.count) + n > self.k.shape[2] or not (n == 1 or self._writes()):
            return self.loose().append(k, v, valid, seen)
        tracked = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)  # kernels are not seen by autograd
        if not tracked and (kernels := self._kernels(n)) is not None:
            pages = None if self.beside is None or n > 1 else self.beside.joins(self.k)
            said = kernels.append(k, v, self.k, self.v, self.now, self.seen_now, pages)
            self.replayed(n)
            self._said = said
            if pages is not None and self.beside is not None:
                self.beside.joined(said)
            return self
        at = self.now[..., None].long()
        at = at if n == 1 else at + torch.arange(n, device=at.device)
        self.k.scatter_(2, at[..., None].expand_as(k), k)
        self.v.scatter_(2, at[..., None].expand_as(v), v)
        if self.pos is not None:
            self.pos.scatter_(2, at, _new(self.seen_now, self.pos, at))
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)
        self.now += n
        self.seen_now += n
        self.replayed(n)
        return self

    def takes(self, n: int) -> bool:
        return self._writes() and self.pos is None and max(self.count) + n <= self.k.shape[2]

    def _writes(self) -> bool:
        """Several tokens, and rollbacks, may be written into the lengths that graphs read."""
        return self.stays and (torch.is_inference_mode_enabled() or not self.now.is_inference())

    def _kernels(self, n: int) -> ModuleType | None:
        """What appends n tokens in one launch, where it serves: entries in text order without weights."""
        plain = self.pos is None and self.bias is None and (self.seen_now.is_contiguous() and self.now.is_contiguous())
        kernels = fused.pages(self.k) if plain else None
        if kernels is None or not kernels.appends(self.k, self.v):
            return None
        if n > 1:
            from ..kernels.triton import append_launch as several

            return several if n <= several.MOST else None
        return kernels

    def replayed(self, n: int = 1) -> None:
        self.count, self._said, self._several = [c + n for c in self.count], None, n > 1
        self.moved = self.moved or n > 1

    def counted(self) -> object:
        return list(self.count), self._several, self.moved

    def recount(self, counted: object) -> None:
        assert isinstance(counted, tuple)
        self.count, self._several, self.moved, self._said = *counted, None

    def loose(self) -> DenseStore:
        """The same entries as an ordinary store, which may grow; this one must not be used afterwards."""
        return DenseStore(self.k, self.v, self.count, self.pos, self.bias)

    def view(self) -> KV:
        # A copy of the lengths: views handed out earlier stay what they were.
        lens = self.now.clone() if self._said is None else self._said
        if self._several and not self.wide:
            m = max(self.count)
            k, v, pos, bias = (None if t is None else t[:, :, :m] for t in (self.k, self.v, self.pos, self.bias))
            assert k is not None and v is not None
            return KV(k, v, "dense", m, len=None if self.even else lens, pos=pos, bias=bias)
        return KV(self.k, self.v, "dense", self.k.shape[2], len=lens, pos=self.pos, bias=self.bias)

    def select(self, selection: Selection) -> Store:
        check(self.view(), selection)
        counts = selection.full_counts()
        rows = counts.tolist()
        wide = max(max(row) for row in rows)
        even = all(n == row[0] for row in rows for n in row)
        if self.pos is None or not even or not _stays(selection, self.bias) or self.k.shape[2] > 2 * (wide + SLACK):
            return self.loose().select(selection)
        index = selection.indices[:, :, :wide].long()
        for t in (self.k, self.v, self.pos):
            _pull(t, index)
        _pull_bias(self.bias, index, selection, counts)
        self.now.copy_(counts)
        self.count, self._said = [row[0] for row in rows], None
        return self

    def fork(self) -> DenseStore:
        return self.loose().fork()

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self._said = None
        if self._writes():
            self.now -= n
            self.seen_now -= n
            self.moved = True
            return
        # New tensors: graphs over the old ones are done with, since what methods remembered went with the entries.
        self.now, self.seen_now = self.now - n, self.seen_now - n

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        rows, self._said = index.to(self.k.device), None
        self.now, self.seen_now = self.now.index_select(0, rows), self.seen_now.index_select(0, rows)


class FixedRing(RingStore, Fixed):
    """A ring that is never full: slots come from `seen_now`."""

    def __init__(self, store: RingStore, seen: list[int]):
        super().__init__(store.k, store.v, store.pos, store.seen, store.sink, store.window)
        self.seen_now = torch.tensor(store.seen, dtype=torch.int64, device=store.k.device)

    @property
    def full(self) -> bool:
        return False

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        if k.shape[2] != 1 or valid is not None:
            return self.loose().append(k, v, valid, seen)
        p = self.seen_now
        slot = torch.where(p < self.sink, p, self.sink + (p - self.sink) % self.window)
        at = slot[:, None, None].expand(-1, k.shape[1], 1)
        self.k.scatter_(2, at[..., None].expand_as(k), k)
        self.v.scatter_(2, at[..., None].expand_as(v), v)
        self.pos.scatter_(2, at, _new(p, self.pos, at))
        self.seen_now += 1
        self.replayed()
        return self

    def replayed(self, n: int = 1) -> None:
        self.seen = [s + n for s in self.seen]

    def counted(self) -> object:
        return list(self.seen)

    def recount(self, counted: object) -> None:
        self.seen = list(counted)  # type: ignore[call-overload]

    def loose(self) -> RingStore:
        return RingStore(self.k, self.v, self.pos, self.seen, self.sink, self.window)

    def view(self) -> KV:
        size = self.sink + self.window
        held = self.seen_now.clamp(max=size).to(torch.int32)[:, None].expand(-1, self.k.shape[1]).contiguous()
        return KV(self.k, self.v, "dense", size, len=held, pos=self.pos)

    def fork(self) -> RingStore:
        return self.loose().fork()

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        self.seen_now = self.seen_now.index_select(0, index.to(self.k.device))


class FixedRagged(RaggedStore, Fixed):
    """Segments with the free slots they have; `pos` and `bias` are as wide as the longest segment can get."""

    def __init__(self, store: RaggedStore, seen: list[int]):
        self.__dict__.update(store.__dict__)
        if self.free < SLACK // 2:
            self._move(list(range(len(self.counts))), SLACK)
        self._len = self._len.clone()
        self.seen_now = torch.tensor(seen, dtype=torch.int64, device=self.k.device)
        self.size = max(max(row) for row in self.counts) + self.free
        self.pos = _widen(self.pos, self.pos.shape[2], max(self.size, self.pos.shape[2]))
        self.bias = None if self.bias is None else _widen(self.bias, self.bias.shape[2], self.pos.shape[2])

    @property
    def full(self) -> bool:
        return self.free < 1

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        if k.shape[2] != 1 or valid is not None or self.full:
            return self.loose().append(k, v, valid, seen)
        rows = (self._offsets + self._len).view(-1)
        self.k.index_copy_(0, rows, k.reshape(-1, k.shape[3]))
        self.v.index_copy_(0, rows, v.reshape(-1, v.shape[3]))
        at = self._len[..., None].long()
        self.pos.scatter_(2, at, _new(self.seen_now, self.pos, at))
        self._len += 1
        self.seen_now += 1
        self.replayed()
        return self

    def replayed(self, n: int = 1) -> None:
        self.counts = [[c + n for c in row] for row in self.counts]
        self.free -= n

    def counted(self) -> object:
        return [list(row) for row in self.counts], self.free

    def recount(self, counted: object) -> None:
        self.counts, self.free = counted  # type: ignore[misc]

    def loose(self) -> RaggedStore:
        out = object.__new__(RaggedStore)
        out.__dict__.update({n: t for n, t in self.__dict__.items() if n not in ("seen_now", "size", "beside")})
        return out

    def view(self) -> KV:
        m = self.size
        bias = None if self.bias is None else self.bias[:, :, :m]
        lens = self._len.clone()
        return KV(self.k, self.v, "ragged", m, len=lens, offsets=self._offsets, pos=self.pos[:, :, :m], bias=bias)

    def select(self, selection: Selection) -> Store:
        kv = self.view()
        check(kv, selection)
        counts = selection.full_counts()
        rows = counts.tolist()
        flat = [n for row in rows for n in row]
        slots = self.k.shape[0]
        if not _stays(selection, self.bias) or slots > 2 * (sum(flat) + SLACK * len(flat)):
            return self.loose().select(selection)
        index = selection.indices[:, :, : max(flat)].long()
        budget = BUDGET if index.device.type == "cpu" else GPU_BUDGET
        for lo, hi in pieces(index.shape[2], index[:, :, :1].numel() * (self.k.shape[1] + self.v.shape[1]), budget):
            at = torch.arange(lo, hi, device=index.device)
            live = (at < counts[..., None]) & (index[:, :, lo:hi] != at)  # the others are in their place
            here, there = kv.rows(index[:, :, lo:hi])[live], (self._offsets[..., None] + at)[live]
            self.k[there], self.v[there] = self.k[here], self.v[here]
        _pull(self.pos, index)
        _pull_bias(self.bias, index, selection, counts)
        self._len.copy_(counts)
        begins = [start for row in self.starts for start in row] + [slots]
        self.free = min(b - a - n for a, b, n in zip(begins, begins[1:], flat, strict=False))
        self.counts = rows
        return self

    def fork(self) -> RaggedStore:
        return self.loose().fork()

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        self._len = self._len.clone()
        self.seen_now = self.seen_now.index_select(0, index.to(self.k.device))
        self.size = self.pos.shape[2]


_KINDS: dict[type, Callable[..., Store]] = {DenseStore: FixedDense, RingStore: FixedRing, RaggedStore: FixedRagged}


def _widen(t: Tensor, used: int, size: int) -> Tensor:
    """`[B, G, size, ...]` with the first `used` entries of t, then zeros; t itself where it has that size already."""
    if t.shape[2] == size:
        t[:, :, used:] = 0
        return t
    out = t.new_zeros(*t.shape[:2], size, *t.shape[3:])
    out[:, :, :used] = t[:, :, :used]
    return out


def _stays(selection: Selection, bias: Tensor | None) -> bool:
    """The kept entries are stored as they were."""
    return selection.ring is None and selection.channels is None and (selection.bias is None or bias is not None)


def _pull(t: Tensor, index: Tensor) -> None:
    """Entries index int64 `[B, G, n]` of t `[B, G, size, ...]` to its front, in their place.

    Ascending numbers go to lower places, so pieces from the left never overwrite what a later one reads.
    """
    for lo, hi in pieces(index.shape[2], t[:, :, :1].numel()):
        piece = index[:, :, lo:hi]
        piece = piece[..., None].expand(*piece.shape, t.shape[3]) if t.dim() == 4 else piece
        t[:, :, lo:hi] = t.gather(2, piece)


def _pull_bias(bias: Tensor | None, index: Tensor, selection: Selection, counts: Tensor) -> None:
    """The same for weights, with those of the selection added; free slots hold 0."""
    if bias is None:
        return
    _pull(bias, index)
    if selection.bias is not None:
        bias[:, :, : index.shape[2]] += selection.bias[:, :, : index.shape[2]]
    bias.masked_fill_(torch.arange(bias.shape[2], device=bias.device) >= counts[..., None], 0.0)


def _new(seen: Tensor, like: Tensor, at: Tensor) -> Tensor:
    """Text positions of the n new tokens of each row, in the dtype of `like` and the shape of `at` `[B, G, n]`."""
    first, n = seen[:, None, None].to(like.dtype), at.shape[2]
    return (first if n == 1 else first + torch.arange(n, dtype=like.dtype, device=like.device)).expand_as(at)
