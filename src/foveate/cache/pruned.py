"""ChannelStore: older keys with a part of their channels, recent keys whole, values whole."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from ..packed import PackedKV, Thinned
from .rows import Rows, blank, front, join, put
from .select import check as check
from .store import SLACK, Store, room


class ChannelStore:
    """The cache of ThinK (Xu et al. 2024, arXiv 2407.21018).

    few: keys `[B, G, P, D']` of the first `done` entries of each row, with the channels `channels` int16 `[B, G, D']`.
    tail: keys `[B, G, *, D]` of the others. v: values `[B, G, *, Dv]` of all. A selection with `channels` prunes every
    entry but the last `dense` of each row; what comes later is whole until the next one. The first set of channels
    stays: what older entries have lost could not be brought back for another.

    `view` is a `PackedKV`: dense steps and those over a rule or lists multiply the channels that are left, everything else
    scatters the pruned keys into zeros, a dense copy for as long as the attention call lasts. Rows may differ in length,
    the kv heads of a row may not.
    """

    kind: ClassVar[str] = "channels"

    def __init__(self, tail: Tensor, v: Tensor, count: Rows, dense: int):
        b, g, _, d = tail.shape
        self.tail, self.v, self.count, self.dense = tail, v, count, dense
        self.few, self.channels = tail.new_empty(b, g, 0, d), torch.empty(b, g, 0, dtype=torch.int16, device=tail.device)
        self.done = Rows([0] * b, tail.device)
        self.base = [0] * b  # entries of each row when channels were last chosen: no further back can it be rolled
        self.pos: Tensor | None = None
        self.bias: Tensor | None = None

    @staticmethod
    def empty(k: Tensor, v: Tensor, tail: int = 32) -> ChannelStore:
        """Without entries, for rows, heads, widths and dtypes like those of k and v. tail: entries left whole."""
        shape = (*k.shape[:2], 0)
        none = Rows([0] * k.shape[0], k.device)
        return ChannelStore(k.new_empty(*shape, k.shape[3]), v.new_empty(*shape, v.shape[3]), none, tail)

    # ------------------------------------------------------------------ the contract
    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def lens(self) -> list[list[int]]:
        return [[n] * self.v.shape[1] for n in self.count.host]

    @property
    def positions_true(self) -> bool:
        return self.pos is None

    @property
    def held(self) -> Rows:
        """Entries of each row whose keys are whole."""
        return self.count - self.done

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        b, g, n, _ = k.shape
        counts = Rows([n] * b if valid is None else valid.sum(-1).tolist(), k.device)
        if self.pos is not None:
            first = Rows(seen, k.device).there()[:, None, None]
            new = (first + torch.arange(counts.most, device=k.device)).expand(b, g, -1)
            self.pos = join(self.pos, self.count, new.to(self.pos.dtype), counts)
        if self.bias is not None:
            self.bias = join(self.bias, self.count, self.bias.new_zeros(b, g, counts.most), counts)
        held, need = self.held, (self.count + counts).most
        extra = room(need) if n > 1 else SLACK  # each step copies the keys anyway: growing often costs little more
        self.tail = _grown(self.tail, held.most, (held + counts).most, extra)
        self.v = _grown(self.v, self.count.most, need, extra)
        put(self.tail, held, front(k, valid, counts.host), counts)
        put(self.v, self.count, front(v, valid, counts.host), counts)
        self.count = self.count + counts
        return self

    def view(self) -> KV:
        m, done, held = self.count.most, self.done, self.held
        few, channels, tail, v = self.few, self.channels.long(), self.tail[:, :, : held.most], self.v[:, :, :m]
        b, g, _, d = tail.shape
        lens = None if self.count.even else self.count.there().int()[:, None].expand(b, g).contiguous()
        if done.most == 0:
            return KV(tail, v, "dense", m, len=lens, pos=self.pos, bias=self.bias)

        def make() -> tuple[Tensor, Tensor]:
            out = tail.new_zeros(b, g, m + (0 if done.even and held.even else 1), d)
            out[:, :, : few.shape[2]].scatter_(3, channels[:, :, None].expand_as(few), few)
            put(out, done, tail, held)
            return out[:, :, :m], v

        packed = Thinned(few, channels, tail, v, done.there(), done.most if done.even else None)
        return PackedKV.over(packed, make, tail, v.shape[3], m, len=lens, pos=self.pos, bias=self.bias)

    def select(self, selection: Selection) -> Store:
        """Drop what is not selected and, if the selection names channels, prune all but the newest entries."""
        kv = self.view()
        check(kv, selection)
        counts = selection.full_counts().tolist()
        if selection.ring is not None or any(row.count(row[0]) < len(row) for row in counts):
            raise CacheError("selection: a store of pruned keys keeps the same number of entries for all kv heads, no ring")
        channels = self._channels(selection)
        count = Rows([row[0] for row in counts], kv.device)
        index = selection.indices.long()[:, :, : count.most]
        if selection.channels is None:
            old = self.done.there()[:, None, None]  # what is pruned stays so; the rest stays whole
            live = torch.arange(count.most, device=kv.device) < count.there()[:, None, None]
            done = Rows(((index < old) & live).sum(-1).amin(1).tolist(), kv.device)
        else:
            done = count.map(lambda n: (n - self.dense) * (n > self.dense))
        if counts != self.lens or selection.bias is not None:
            bias = None if selection.bias is None else selection.bias[:, :, : index.shape[2]].float()
            if kv.bias is not None:
                past = kv.bias.gather(2, index)
                bias = past if bias is None else past + bias
            self.pos, self.bias = kv.positions().gather(2, index).int(), bias
        k, v = kv.gather(index)
        few = k[:, :, : done.most].gather(3, channels[:, :, None].expand(-1, -1, done.most, -1))
        self.few, self.channels, self.done, self.count = blank(few, done), channels.to(torch.int16), done, count
        most = self.held.most
        self.tail = _grown(_behind(k, done, self.held), most, most + 1, SLACK)
        self.v = _grown(v, count.most, count.most + 1, SLACK)
        self.base = count.host
        return self

    def _channels(self, selection: Selection) -> Tensor:
        """int64 `[B, G, D']`: the set in use from now on. Raises CacheError for one that does not fit the keys."""
        b, g, _, d = self.tail.shape
        new = selection.channels
        if new is not None:
            if new.dim() != 3 or tuple(new.shape[:2]) != (b, g) or not 0 < new.shape[2] <= d:
                raise CacheError(f"channels: expected [B, G, D'] = [{b}, {g}, 1 to {d}], got {list(new.shape)}")
            if bool((new < 0).any() | (new >= d).any() | (new[..., 1:] <= new[..., :-1]).any()):
                raise CacheError(f"channels: expected ascending channels between 0 and {d - 1} without repeats")
        if self.done.most or new is None:
            return self.channels.long()
        return new.long()

    def truncate(self, n: int) -> None:
        """Raises CacheError if entries go that were there when the channels were chosen."""
        if self.pos is not None:
            raise CacheError("truncate: entries were evicted since; the dropped ones cannot be brought back")
        if n < 0 or min(self.count.host) < n:
            raise CacheError(f"truncate: expected 0 to {min(self.count.host)} entries, got {n}")
        left = self.count.map(lambda c: c - n)
        if any(a < b for a, b in zip(left.host, self.base, strict=True)):
            raise CacheError(f"truncate: {n} entries reach back to those whose key channels are gone")
        self.count = left

    def reorder(self, index: Tensor) -> None:
        order = index.tolist()
        if order == list(range(len(self.base))):
            return
        rows = index.to(self.v.device)
        for name, t in self._tensors().items():
            setattr(self, name, t.index_select(0, rows))
        self.count, self.done = self.count.reorder(index), self.done.reorder(index)
        self.base = [self.base[i] for i in order]

    def fork(self) -> ChannelStore:
        out = ChannelStore(self.tail, self.v, self.count, self.dense)
        out.done, out.base = self.done, list(self.base)
        for name, t in self._tensors().items():
            setattr(out, name, t.clone())
        return out

    def state(self) -> dict[str, Tensor]:
        counts = {"tail": self.held, "few": self.done}
        out = {n: t if n == "channels" else blank(t, counts.get(n, self.count)) for n, t in self._tensors().items()}
        rows = {"count": self.count.host, "done": self.done.host, "base": self.base, "dense": [self.dense]}
        return {**out, **{n: torch.tensor(x) for n, x in rows.items()}}

    @staticmethod
    def restore(state: dict[str, Tensor]) -> ChannelStore:
        """The inverse of `state`."""
        device = state["v"].device
        out = ChannelStore(state["tail"], state["v"], Rows(state["count"].tolist(), device), int(state["dense"][0]))
        out.done, out.base = Rows(state["done"].tolist(), device), state["base"].tolist()
        for name in ("tail", "few", "v", "channels", "pos", "bias"):
            if name in state:
                setattr(out, name, state[name].clone())
        return out

    def _tensors(self) -> dict[str, Tensor]:
        names = ("tail", "few", "v", "channels", "pos", "bias")
        return {n: t for n in names if (t := getattr(self, n)) is not None}


def _grown(t: Tensor, used: int, need: int, extra: int) -> Tensor:
    """t `[B, G, *, ...]` itself if `need` entries and a spare slot fit, else a larger copy of its first `used`."""
    if need < t.shape[2]:
        return t
    out = t.new_zeros(*t.shape[:2], need + extra, *t.shape[3:])
    out[:, :, :used] = t[:, :, :used]
    return out


def _behind(k: Tensor, done: Rows, held: Rows) -> Tensor:
    """The `held` entries of each row of k behind its first `done`."""
    if done.even:
        return k[:, :, done.most : done.most + held.most]
    index = (done.there()[:, None] + torch.arange(held.most, device=k.device)).clamp(max=k.shape[2] - 1)
    return k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
