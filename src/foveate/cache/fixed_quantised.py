"""FixedQuantised: a quantised store whose lengths live on the device, so that captured steps can be replayed over it.

Recent entries are rings: entry e of the keys is in slot e % residual, of the values in slot e % (residual + 1). A step
quantises the value whose slot the new one takes. Keys are quantised when a row's ring is full, which the host knows:
such a step is a `phase` of its own, in which the other rows quantise what they have to a place nobody reads yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..packed import Coded, CodedPair, PackedKV
from ..scores import fused
from . import fixed
from .codes import pack, quantise
from .fixed import Fixed
from .quantised import QuantisedStore, Side
from .rows import Rows
from .store import Store, room


class Ring:
    """Keys or values of a fixed store: the last `width` entries, and codes with room for `size` and for as many spare ones.

    Tensors are those of `Coded`. since: int64 `[B]`, entries that were coded when this was made: never coded again. `known`
    says the same on the host. A side at 16 bits that was rolled back has more of them than the rule says.
    """

    def __init__(self, side: Side, width: int, size: int):
        p, done, held = side.packed, side.packed.done, side.held
        self.bits, self.group, self.by, self.unit, self.width, self.size = p.bits, p.group, p.by, p.unit, width, size
        self.codes, self.scale, self.low = p.codes, p.scale, p.low
        for name, t in p.tensors().items():
            n, used = -(-(size + width) // (1 if name == "codes" else p.unit)), p.count(name).most
            wide = t.new_zeros(*t.shape[:2], n, *t.shape[3:])
            wide[:, :, :used] = t[:, :, :used]
            setattr(self, name, wide)
        self.since, self.known = done.there().clone(), done.host
        self.tail = side.tail.new_zeros(*side.tail.shape[:2], width, side.tail.shape[3])
        i = torch.arange(held.most, device=self.tail.device)
        real = (i < held.there()[:, None])[:, None, :, None]
        recent = side.tail[:, :, : held.most].masked_fill(~real, 0)
        self._put(self.tail, (done.there()[:, None] + i) % width, recent)

    def tensors(self) -> dict[str, Tensor]:
        few = {} if self.bits == 16 else {"scale": self.scale, "low": self.low}
        return {"codes": self.codes, **few, "tail": self.tail}

    def write(self, new: Tensor, now: Tensor) -> None:
        """new `[B, G, 1, D]` becomes entry now `[B]`."""
        self._put(self.tail, (now % self.width)[:, None], new)

    def code_oldest(self, now: Tensor) -> None:
        """Quantise the entry whose slot entry `now` is about to take, unless it does not exist or is coded."""
        slot, old = (now % self.width)[:, None], now - self.width
        at = torch.where(old >= self.since, old, self.size)[:, None]
        self._code(_pick(self.tail, slot), at, at)

    def code_all(self, now: Tensor) -> None:
        """Quantise the ring. Of a row whose ring is not full these are the places of entries still to come."""
        first = (now - 1).clamp(min=0) // self.width * self.width
        index = torch.arange(self.width, device=now.device)
        units = torch.where(first >= self.since, first, self.size)[:, None] // self.unit + index[: self.width // self.unit]
        at = first[:, None] + index
        self._code(self.tail, torch.where(at >= self.since[:, None], at, self.size + index), units)

    def _code(self, x: Tensor, at: Tensor, units: Tensor) -> None:
        if self.bits == 16:
            self._put(self.codes, at, x)
            return
        grouped = x.unflatten(2, (-1, self.group)) if self.by == "token" else x.unflatten(3, (-1, self.group))
        codes, scale, low = quantise(grouped, self.bits, 3 if self.by == "token" else 4)
        self._put(self.codes, at, pack(codes.reshape(x.shape), self.bits))
        self._put(self.scale, units, scale)
        self._put(self.low, units, low)

    @staticmethod
    def _put(t: Tensor, at: Tensor, new: Tensor) -> None:
        b, n = at.shape
        index = at.view(b, 1, n, *[1] * (t.dim() - 3)).expand(b, t.shape[1], n, *t.shape[3:])
        t.scatter_(2, index, new)

    def coded(self, done: Tensor) -> Coded:
        return Coded(self.codes, self.scale, self.low, self.tail, done, self.bits, self.group, self.by, self.width)

    def whole(self, m: int, done: Tensor, length: Tensor) -> Tensor:
        """`[B, G, m, D]`, the first `length` `[B]` entries of each row."""
        if self.bits < 16:
            return self.coded(done).whole(m, length)
        out = torch.cat([self.codes[:, :, :m], self.tail[:, :, :1]], 2)
        e = done[:, None] + torch.arange(self.width, device=done.device)
        self._put(out, torch.where(e < length[:, None], e, m), _pick(self.tail, e % self.width))
        return out[:, :, :m]

    def loose(self, side: Side, done: Rows, count: Rows) -> None:
        """Give everything to an ordinary side."""
        for name, t in self.tensors().items():
            if name != "tail":
                setattr(side.packed, name, t)
        side.packed.done, side.held = done, count - done
        e = done.there()[:, None] + torch.arange(side.held.most, device=self.tail.device)
        side.tail = _pick(self.tail, e % self.width)


class FixedQuantised(QuantisedStore, Fixed):
    """Room for `size` entries. now: int64 `[B]`, entries that exist; settled: `[B]`, how many when it last quantised; each:
    int32 `[B, G]`, `now` for every kv head. fresh: what a view needs of them, if the launch that appended has left it."""

    fresh: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(self, store: QuantisedStore, seen: list[int]):
        store.settle()
        self.rule, self.count, self.calm = store.rule, store.count, store.count
        residual, used = self.rule[3], store.count.most
        self.size = -(-(used + room(used)) // residual) * residual
        self.near = (Ring(store.keys, residual, self.size), Ring(store.values, residual + 1, self.size))
        device = store.keys.tail.device
        self.now = torch.tensor(store.count.host, device=device)
        self.settled = self.now.clone()
        self.each = self.now.int()[:, None].expand(store.keys.tail.shape[:2]).contiguous()
        self.seen_now = torch.tensor(seen, device=device)
        self.pos, self.bias = (None if t is None else fixed._widen(t, used, self.size) for t in (store.pos, store.bias))

    @property
    def full(self) -> bool:
        return self.count.most >= self.size

    @property
    def folds(self) -> bool:
        """The next token finds a row whose ring of keys is full."""
        new = zip(self.count.host, self.calm.host, strict=True)
        return any(n != calm and n % self.rule[3] == 0 for n, calm in new)

    def phase(self) -> str:
        return "fold" if self.folds else ""

    @property
    def lens(self) -> list[list[int]]:
        return [[n] * self.near[0].tail.shape[1] for n in self.count.host]

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        if k.shape[2] != 1 or valid is not None or self.full:
            return self.loose().append(k, v, valid, seen)
        keys, values = self.near
        if self.folds:
            keys.code_all(self.now)
        at = self.now[:, None, None].expand(-1, k.shape[1], 1)
        if self.pos is not None:
            self.pos.scatter_(2, at, fixed._new(self.seen_now, self.pos, at))
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)
        kernels, fresh = fused.codes(k), None
        if kernels is not None and kernels.serves(k, v, keys, values):
            fresh = kernels.append(k, v, keys, values, self.each, self.now, self.settled, self.seen_now)
        else:
            values.code_oldest(self.now)
            keys.write(k, self.now)
            values.write(v, self.now)
            self.settled.copy_(self.now)
            self.now += 1
            self.seen_now += 1
            self.each += 1
        self.replayed()
        self.fresh = fresh
        return self

    def replayed(self, n: int = 1) -> None:
        assert n == 1  # `takes` says so
        self.fresh = None
        self.calm, self.count = self.count, Rows([n + 1 for n in self.count.host], self.count.device)

    def counted(self) -> object:
        return self.calm, self.count

    def recount(self, counted: object) -> None:
        self.fresh = None
        self.calm, self.count = counted  # type: ignore[misc]

    def view(self) -> KV:
        (keys, values), r, m = self.near, self.rule[3], self.size
        fresh, self.fresh = self.fresh, None  # in a graph its memory is used again after the step
        if fresh is None:
            done = torch.maximum(self.settled // r * r, keys.since), torch.maximum(self.settled - r, values.since)
            fresh = self.each.clone(), *done
        lens, k_done, v_done = fresh

        def make() -> tuple[Tensor, Tensor]:
            now = lens[:, 0].long()
            return keys.whole(m, k_done, now), values.whole(m, v_done, now)

        if 16 in self.rule[:2]:
            return KV(*make(), "dense", m, len=lens, pos=self.pos, bias=self.bias)
        pair = CodedPair(keys.coded(k_done), values.coded(v_done), r + 1)
        return PackedKV.over(pair, make, keys.tail, values.tail.shape[3], m, len=lens, pos=self.pos, bias=self.bias)

    def loose(self) -> QuantisedStore:
        """The same entries as an ordinary store; this one must not be used afterwards."""
        keys, values = self.near
        out = QuantisedStore(keys.tail, values.tail, *self.rule)
        r = self.rule[3]
        out.count = Rows(self.count.host, self.count.device)
        calm = Rows(self.calm.host, self.count.device)
        for ring, side, rule in ((keys, out.keys, lambda n: n // r * r), (values, out.values, lambda n: n - r)):
            done = [max(rule(n), known) for n, known in zip(calm.host, ring.known, strict=True)]
            ring.loose(side, Rows(done, calm.device), out.count)
        most = out.count.most
        out.pos, out.bias = (None if t is None else t[:, :, :most].clone() for t in (self.pos, self.bias))
        return out

    def settle(self) -> None:
        """Nothing to do: a step quantises by itself."""

    def select(self, selection):  # type: ignore[no-untyped-def]
        return self.loose().select(selection)

    def fork(self) -> QuantisedStore:
        return self.loose().fork()

    def state(self) -> dict[str, Tensor]:
        return self.loose().state()

    def truncate(self, n: int) -> None:
        self._again(self.loose(), n)

    def reorder(self, index: Tensor) -> None:
        store = self.loose()
        store.reorder(index)
        self._become(store, self.seen_now.index_select(0, index.to(self.seen_now.device)))

    def _again(self, store: QuantisedStore, n: int) -> None:
        store.truncate(n)
        self._become(store, self.seen_now - n)

    def _become(self, store: QuantisedStore, seen_now: Tensor) -> None:
        """New tensors: graphs over the old ones are done with."""
        self.__init__(store, [0] * len(store.count.host))  # type: ignore[misc]
        self.seen_now = seen_now

    def _tensors(self) -> dict[str, Tensor]:
        out = {f"{s}.{n}": t for s, ring in zip("kv", self.near, strict=True) for n, t in ring.tensors().items()}
        return {**out, **{n: t for n in ("pos", "bias") if (t := getattr(self, n)) is not None}}


def _pick(t: Tensor, index: Tensor) -> Tensor:
    """Entries `[B, n]` of t `[B, G, *, ...]`, the same for all kv heads."""
    b, n = index.shape
    return t.gather(2, index.view(b, 1, n, *[1] * (t.dim() - 3)).expand(b, t.shape[1], n, *t.shape[3:]))


fixed._KINDS[QuantisedStore] = FixedQuantised
