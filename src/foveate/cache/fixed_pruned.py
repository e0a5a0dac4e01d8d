"""FixedChannels: a store of pruned keys whose lengths live on the device, so that captured steps can be replayed over it.

Nothing is pruned while decoding: new keys are whole and go to the tail, behind the `done` entries that have lost channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kv import KV
from ..methods.base import Selection
from ..packed import PackedKV, Thinned
from . import fixed
from .fixed import Fixed
from .pruned import ChannelStore
from .rows import Rows
from .store import Store, room


class FixedChannels(ChannelStore, Fixed):
    """Room for `size` entries of the longest row. now: int64 `[B]`, entries that exist.

    spaced: `[B, G, P, W]`, the pruned keys `few` with zeros behind them: `wide` of `packed.Thinned`.
    """

    def __init__(self, store: ChannelStore, seen: list[int]):
        self.__dict__.update(store.__dict__)
        used, held = store.count.most, store.held.most
        self.size = used + room(used)
        whole = held + self.size - used  # the longest tail may be that of another row than the longest one
        self.tail = fixed._widen(store.tail, held, whole)
        self.v = fixed._widen(store.v, used, self.size)
        self.pos, self.bias = (None if t is None else fixed._widen(t, used, self.size) for t in (store.pos, store.bias))
        self._settle()
        self.now = torch.tensor(store.count.host, device=self.v.device)
        self.seen_now = torch.tensor(seen, device=self.v.device)

    def _settle(self) -> None:
        """What follows from the pruned keys and does not change while decoding."""
        self.index, self.behind, width = self.channels.long(), self.done.there(), self.few.shape[3]
        more = -width % (16 // self.few.element_size())
        self.spaced = pad(self.few, (0, more)) if more else self.few
        self.few = self.spaced[..., :width]  # one tensor for both

    @property
    def full(self) -> bool:
        return self.count.most >= self.size

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        if k.shape[2] != 1 or valid is not None or self.full:
            return self.loose().append(k, v, valid, seen)
        at = self.now[:, None, None].expand(-1, k.shape[1], 1)
        self.tail.scatter_(2, (at - self.behind[:, None, None])[..., None].expand_as(k), k)
        self.v.scatter_(2, at[..., None].expand_as(v), v)
        if self.pos is not None:
            self.pos.scatter_(2, at, fixed._new(self.seen_now, self.pos, at))
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)
        self.now += 1
        self.seen_now += 1
        self.replayed()
        return self

    def replayed(self, n: int = 1) -> None:
        self.count = Rows([c + n for c in self.count.host], self.count.device)

    def counted(self) -> object:
        return self.count

    def recount(self, counted: object) -> None:
        self.count = counted  # type: ignore[assignment]

    def view(self) -> KV:
        few, wide, index, behind, tail, v, m = self.few, self.spaced, self.index, self.behind, self.tail, self.v, self.size
        now, (b, g, t, d) = self.now.clone(), tail.shape
        lens = now.int()[:, None].expand(b, g).contiguous()
        if self.done.most == 0:
            return KV(tail[:, :, :m], v, "dense", m, len=lens, pos=self.pos, bias=self.bias)

        def make() -> tuple[Tensor, Tensor]:
            out = tail.new_zeros(b, g, m + 1, d)
            out[:, :, : few.shape[2]].scatter_(3, index[:, :, None].expand_as(few), few)
            e = behind[:, None] + torch.arange(t, device=tail.device)
            spot = torch.where(e < now[:, None], e, m)  # what does not exist goes to the spare slot
            out.scatter_(2, spot[:, None, :, None].expand(b, g, t, d), tail)
            return out[:, :, :m], v

        packed = Thinned(few, index, tail, v, behind, self.done.most if self.done.even else None, wide)
        return PackedKV.over(packed, make, tail, v.shape[3], m, len=lens, pos=self.pos, bias=self.bias)

    def loose(self) -> ChannelStore:
        """The same entries as an ordinary store; this one must not be used afterwards."""
        out = ChannelStore(self.tail, self.v, self.count, self.dense)
        names = ("few", "channels", "done", "base")
        out.__dict__.update({name: getattr(self, name) for name in names})
        most = self.count.most
        out.pos, out.bias = (None if t is None else t[:, :, :most].clone() for t in (self.pos, self.bias))
        return out

    def select(self, selection: Selection) -> Store:
        return self.loose().select(selection)

    def fork(self) -> ChannelStore:
        return self.loose().fork()

    def state(self) -> dict[str, Tensor]:
        return self.loose().state()

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.now, self.seen_now = self.now - n, self.seen_now - n

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        rows = index.to(self.v.device)
        self.now, self.seen_now = self.now.index_select(0, rows), self.seen_now.index_select(0, rows)
        self._settle()


fixed._KINDS[ChannelStore] = FixedChannels
