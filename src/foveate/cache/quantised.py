"""QuantisedStore: old entries in 8, 4 or 2 bits (see `codes.py`), recent ones as they came.

The layout of KIVI (Liu et al. 2024, arXiv 2402.02750): a group of keys is `group` consecutive tokens of one channel, so
that channels of large keys do not spoil the others; a group of values is `group` consecutive channels of one token.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CacheError, ConfigError
from ..kv import KV
from ..methods.base import Selection
from ..packed import Coded, CodedPair, PackedKV
from .codes import Codes
from .rows import Rows, blank, drop, front, join, put
from .select import check as check
from .store import Store


class Side:
    """Keys or values: what is quantised and, behind it, a tail `[B, G, *, D]` of `held` entries in full precision."""

    def __init__(self, like: Tensor, bits: int, group: int, by: str):
        self.packed = Codes(like, bits, group, by)
        self.tail = like.new_empty(*like.shape[:2], 0, like.shape[3])
        self.held = Rows([0] * like.shape[0], like.device)

    def add(self, new: Tensor, counts: Rows) -> None:
        self.tail = join(self.tail, self.held, new, counts)
        self.held = self.held + counts

    def settle(self, target: Rows) -> None:
        """Quantise the oldest of the tail until `target` entries of each row are."""
        moved = (target - self.packed.done).map(lambda n: n * (n > 0))
        if moved.most == 0:
            return
        self.packed.push(self.tail, moved)
        self.tail = drop(self.tail, self.held, moved)
        self.held = self.held - moved

    def view(self) -> Tensor:
        """`[B, G, m, D]`, all entries; a new tensor once something is quantised."""
        done, held = self.packed.done, self.held
        m = (done + held).most
        if done.most == 0:
            return self.tail[:, :, :m]
        spare = 0 if done.even and held.even else 1
        out = self.tail.new_empty(*self.tail.shape[:2], m + spare, self.tail.shape[3])
        self.packed.read(out)
        put(out, done, self.tail[:, :, : held.most], held)
        return out[:, :, :m]

    def still(self) -> Side:
        """What is stored now, whatever is added later: entries already coded are never written again."""
        out = copy.copy(self)
        out.packed = copy.copy(self.packed)
        return out

    def coded(self) -> Coded:
        """The same for attention over codes."""
        p = self.packed
        tail = self.tail[:, :, : self.held.most]
        return Coded(p.codes, p.scale, p.low, tail, p.done.there(), p.bits, p.group, p.by)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.packed.tensors(), "tail": self.tail}

    def count(self, name: str) -> Rows:
        return self.held if name == "tail" else self.packed.count(name)

    def set(self, name: str, t: Tensor) -> None:
        setattr(self if name == "tail" else self.packed, name, t)


class QuantisedStore:
    """Keys and values whose older part is quantised. Of a row of n entries, floor(n / residual) * residual keys and
    n - residual values are; the others, and every token of a prompt until it is over, are as they came.

    Quantising happens before a single token is appended and when a policy selects, never inside a prompt: so a prompt
    attends to itself exactly, whole or in chunks, and token by token gives what the prompt at once gives. `view` is a
    `PackedKV`: dense steps and those over a rule or lists read codes, everything else a dense copy in the entries' dtype,
    one layer's worth of memory for as long as the attention call lasts.

    Rows may differ in length, the kv heads of a row may not. Entries can be evicted only before they are quantised.
    """

    kind: ClassVar[str] = "quantised"

    def __init__(self, k: Tensor, v: Tensor, bits: int, value_bits: int, group: int, residual: int):
        """Empty, for rows, heads, widths and dtypes like those of k and v. bits: 2, 4, 8, or 16 for none. Groups of values
        are as large as divides their width, at most `group`. Raises ConfigError for widths that do not fill bytes."""
        for name, t, n in (("k", k, bits), ("v", v, value_bits)):
            if n not in (2, 4, 8, 16):
                raise ConfigError(f"bits: expected 2, 4, 8 or 16, got {n}")
            if n < 16 and t.shape[3] * n % 8:
                raise ConfigError(f"{name}: a width of {t.shape[3]} channels does not fill whole bytes at {n} bits each")
        if residual % group:
            raise ConfigError(f"residual: expected a multiple of group = {group}, got {residual}")
        near = next(n for n in range(min(group, v.shape[3]), 0, -1) if v.shape[3] % n == 0)
        self.rule = (bits, value_bits, group, residual)
        self.keys, self.values = Side(k, bits, group, "token"), Side(v, value_bits, near, "channel")
        self.count = Rows([0] * k.shape[0], k.device)
        self.pos: Tensor | None = None
        self.bias: Tensor | None = None

    @staticmethod
    def empty(
        k: Tensor, v: Tensor, bits: int = 2, value_bits: int | None = None, group: int = 32, residual: int = 128
    ) -> QuantisedStore:
        return QuantisedStore(k, v, bits, bits if value_bits is None else value_bits, group, residual)

    # ------------------------------------------------------------------ the contract
    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def lens(self) -> list[list[int]]:
        return [[n] * self.keys.tail.shape[1] for n in self.count.host]

    @property
    def positions_true(self) -> bool:
        return self.pos is None

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        b, g, n, _ = k.shape
        counts = Rows([n] * b if valid is None else valid.sum(-1).tolist(), k.device)
        if n == 1:
            self.settle()
        if self.pos is not None:
            first = Rows(seen, k.device).there()[:, None, None]
            new = (first + torch.arange(counts.most, device=k.device)).expand(b, g, -1)
            self.pos = join(self.pos, self.count, new.to(self.pos.dtype), counts)
        if self.bias is not None:
            self.bias = join(self.bias, self.count, self.bias.new_zeros(b, g, counts.most), counts)
        self.keys.add(front(k, valid, counts.host), counts)
        self.values.add(front(v, valid, counts.host), counts)
        self.count = self.count + counts
        return self

    def settle(self) -> None:
        """Quantise what the rule says; doing it again changes nothing."""
        for side, target in self._targets(self.count):
            side.settle(target)

    def _targets(self, count: Rows) -> tuple[tuple[Side, Rows], tuple[Side, Rows]]:
        r = self.rule[3]
        return (self.keys, count.map(lambda n: n // r * r)), (self.values, count.map(lambda n: (n - r) * (n > r)))

    def view(self) -> KV:
        like, m = self.keys.tail, self.count.most
        lens = None
        if not self.count.even:
            lens = self.count.there().int()[:, None].expand(like.shape[:2]).contiguous()
        if 16 in self.rule[:2] or self.values.packed.done.most == 0:
            return KV(self.keys.view(), self.values.view(), "dense", m, len=lens, pos=self.pos, bias=self.bias)
        keys, values = self.keys.still(), self.values.still()
        pair = CodedPair(keys.coded(), values.coded(), values.held.most)
        make = lambda: (keys.view(), values.view())  # noqa: E731
        return PackedKV.over(pair, make, like, self.values.tail.shape[3], m, len=lens, pos=self.pos, bias=self.bias)

    def select(self, selection: Selection) -> Store:
        """Quantise, after dropping the entries that are not selected, none of which may be quantised already."""
        counts = selection.full_counts().tolist()
        if selection.ring is not None or selection.channels is not None:
            raise CacheError("selection: a quantised store keeps neither a ring nor a part of the channels")
        if counts == self.lens and selection.bias is None:
            self.settle()
            return self
        if any(row.count(row[0]) < len(row) for row in counts):
            raise CacheError("selection: a quantised store keeps the same number of entries for all kv heads of a row")
        if self.keys.packed.done.most or self.values.packed.done.most:
            raise CacheError("selection: these entries are quantised in groups of tokens; evict before that happens")
        kv = self.view()
        check(kv, selection)
        index = selection.indices.long()[:, :, : max(row[0] for row in counts)]
        bias = None if selection.bias is None else selection.bias[:, :, : index.shape[2]].float()
        if kv.bias is not None:
            old = kv.bias.gather(2, index)
            bias = old if bias is None else old + bias
        self.pos, self.bias = kv.positions().gather(2, index).int(), bias
        self.keys.tail, self.values.tail = kv.gather(index)
        self.count = self.keys.held = self.values.held = Rows([row[0] for row in counts], kv.device)
        self.settle()
        return self

    def truncate(self, n: int) -> None:
        """Raises CacheError where an entry that would be in full precision without these n is quantised already."""
        if self.pos is not None:
            raise CacheError("truncate: entries were evicted since; the dropped ones cannot be brought back")
        if n < 0 or min(self.count.host) < n:
            raise CacheError(f"truncate: expected 0 to {min(self.count.host)} entries, got {n}")
        left = self.count.map(lambda c: c - n)
        for side, target in self._targets(left):
            done = side.packed.done
            if side.packed.bits < 16 and any(d > t for d, t in zip(done.host, target.host, strict=True)):
                raise CacheError(f"truncate: {n} entries reach back to quantised ones, whose full precision is gone")
        for side in (self.keys, self.values):
            done = side.packed.done
            kept = [min(d, c) for d, c in zip(done.host, left.host, strict=True)]
            side.packed.done = done if kept == done.host else Rows(kept, left.device)
            side.held = left - side.packed.done
        self.count = left

    def reorder(self, index: Tensor) -> None:
        if index.tolist() == list(range(len(self.count.host))):
            return
        rows = index.to(self.keys.tail.device)
        self._load({n: t.index_select(0, rows) for n, t in self._tensors().items()})
        self.count = self.count.reorder(index)
        for side in (self.keys, self.values):
            side.held, side.packed.done = side.held.reorder(index), side.packed.done.reorder(index)

    def fork(self) -> QuantisedStore:
        out = QuantisedStore(self.keys.tail, self.values.tail, *self.rule)
        out.count = self.count
        for mine, other in ((out.keys, self.keys), (out.values, self.values)):
            mine.held, mine.packed.done = other.held, other.packed.done
        out._load(self._tensors())
        return out

    def state(self) -> dict[str, Tensor]:
        out = {"rule": torch.tensor(self.rule), "count": torch.tensor(self.count.host)}
        for name, t in self._tensors().items():
            side, part = self._place(name)
            out[name] = blank(t, self.count if side is None else side.count(part))
        for name, side in (("k.done", self.keys), ("v.done", self.values)):
            out[name] = torch.tensor(side.packed.done.host)
        return out

    @staticmethod
    def restore(state: dict[str, Tensor]) -> QuantisedStore:
        """The inverse of `state`."""
        k, v = state["k.tail"], state["v.tail"]
        out = QuantisedStore(k, v, *state["rule"].tolist())
        out.count = Rows(state["count"].tolist(), k.device)
        for name, side in (("k.done", out.keys), ("v.done", out.values)):
            side.packed.done = Rows(state[name].tolist(), k.device)
            side.held = out.count - side.packed.done
        out._load({n: t for n, t in state.items() if n not in ("rule", "count", "k.done", "v.done")})
        return out

    # ------------------------------------------------------------------ all tensors by name
    def _tensors(self) -> dict[str, Tensor]:
        out = {f"{s}.{n}": t for s, side in (("k", self.keys), ("v", self.values)) for n, t in side.tensors().items()}
        return {**out, **{n: t for n in ("pos", "bias") if (t := getattr(self, n)) is not None}}

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Copies of these become the store's own."""
        for name, t in tensors.items():
            side, part = self._place(name)
            if side is None:
                setattr(self, part, t.clone())
            else:
                side.set(part, t.clone())

    def _place(self, name: str) -> tuple[Side | None, str]:
        """Whose tensor this is (None: the store's own), and its name there."""
        side, _, part = name.rpartition(".")
        return {"k": self.keys, "v": self.values}.get(side), part
