"""Views of entries that a store keeps packed. Attention that can reads them as they are; others read `k` and `v`.

Two packings: `Coded` (2, 4 or 8 bits a number, a recent part as it came) and `Thinned` (a part of the key channels). A
`PackedKV` is a `KV` like any other, whose dense keys and values are made once something asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kv import KV


def unpack(packed: Tensor, bits: int, out: Tensor) -> Tensor:
    """Bytes `[..., W]` as numbers, written into out `[..., D]` of any dtype: byte j holds channels j, j + W, j + 2W, ..."""
    wide = packed.shape[-1]
    for i in range(8 // bits):
        out[..., i * wide : (i + 1) * wide] = (packed >> (bits * i)) & (2**bits - 1) if bits < 8 else packed
    return out


@dataclass(frozen=True)
class Coded:
    """Keys or values whose older part is quantised.

    Attributes:
        codes: uint8 `[B, G, C, D * bits / 8]`. scale, low: one per group, in the dtype of the entries,
            `[B, G, C / group, 1, D]` for groups of tokens (by "token"), `[B, G, C, D / group, 1]` for groups of channels
            (by "channel").
        done: int64 `[B]`, entries that are in codes. tail: `[B, G, T, D]`, the others: entry e is in slot e - done, or
            e % ring where `ring` > 0 (then T = ring).
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    tail: Tensor
    done: Tensor
    bits: int
    group: int
    by: str
    ring: int = 0

    def read(self, lo: int, hi: int, out: Tensor) -> Tensor:
        """Entries lo..hi as codes have them, into out `[B, G, hi - lo, D]`; for groups of tokens both are multiples of
        `group`. What was never coded has no meaning."""
        unpack(self.codes[:, :, lo:hi], self.bits, out)
        if self.by == "token":
            rows, wide = slice(lo // self.group, hi // self.group), out.unflatten(2, (-1, self.group))
        else:
            rows, wide = slice(lo, hi), out.unflatten(3, (-1, self.group))
        torch.addcmul(self.low[:, :, rows], wide, self.scale[:, :, rows], out=wide)  # one rounding, not two
        return out

    def piece(self, lo: int, hi: int) -> Tensor:
        """Entries lo..hi of the codes `[B, G, hi - lo, D]`, see `read`."""
        return self.read(lo, hi, self.tail.new_empty(*self.tail.shape[:2], hi - lo, self.tail.shape[3]))

    def at(self, entries: Tensor) -> Tensor:
        """`[B, G, n, D]`: entries int64 `[B, n]`, or `[B, G, n]` where kv heads differ, coded or not; those that do not
        exist have no meaning."""
        done = self.done.view(-1, *[1] * (entries.dim() - 1))
        slot = entries % self.ring if self.ring else (entries - done).clamp(0, max(0, self.tail.shape[2] - 1))
        coded = self.codes.shape[2]
        if self.tail.shape[2] == 0:
            late = self.tail.new_zeros(*self.tail.shape[:2], entries.shape[-1], self.tail.shape[3])
        else:
            late = _pick(self.tail, slot)
        if coded == 0:
            return late
        e = entries.clamp(0, coded - 1)
        out = unpack(_pick(self.codes, e), self.bits, torch.empty_like(late))
        if self.by == "token":
            few = (e // self.group).clamp(max=self.scale.shape[2] - 1)
            torch.addcmul(_pick(self.low[:, :, :, 0], few), out, _pick(self.scale[:, :, :, 0], few), out=out)
        else:
            wide = out.unflatten(3, (-1, self.group))
            torch.addcmul(_pick(self.low, e), wide, _pick(self.scale, e), out=wide)
        old = entries < done
        return torch.where((old if old.dim() == 3 else old[:, None])[..., None], out, late)

    def whole(self, m: int, length: Tensor) -> Tensor:
        """`[B, G, m, D]`, the first `length` int64 `[B]` entries of each row; the others have no meaning."""
        b, g, t, d = self.tail.shape
        out = self.tail.new_zeros(b, g, m + 1, d)
        coded = min(m, self.codes.shape[2])
        if self.by == "token":
            coded = coded // self.group * self.group
        self.read(0, coded, out[:, :, :coded])
        e = self.done[:, None] + torch.arange(t, device=out.device)
        new = _pick(self.tail, e % self.ring) if self.ring else self.tail
        spot = torch.where(e < length[:, None], e, m)  # what does not exist goes to the spare slot
        out.scatter_(2, spot[:, None, :, None].expand(b, g, t, d), new)
        return out[:, :, :m]


@dataclass(frozen=True)
class CodedPair:
    """Keys and values of a quantised store. No key is coded later than its value: `values.done` <= `keys.done`.

    recent: no row has more than this many entries beyond `values.done`.
    """

    keys: Coded
    values: Coded
    recent: int


@dataclass(frozen=True)
class Thinned:
    """Keys whose older part has a part of its channels, values whole.

    Attributes:
        few: `[B, G, P, D']`, keys of the first `done` entries of each row, of the channels int64 `[B, G, D']`.
        tail: `[B, G, T, D]`, the others: entry e is in slot e - done. v: `[B, G, M, Dv]`.
        done: int64 `[B]`. even: P where all rows have done = P, else None.
        wide: `[B, G, P, W]`, `few` and zeros behind its channels, where there is such a tensor: of rows that fill whole
            16 bytes kernels load as many at once.
    """

    few: Tensor
    channels: Tensor
    tail: Tensor
    v: Tensor
    done: Tensor
    even: int | None
    wide: Tensor | None = None

    def at(self, entries: Tensor) -> Tensor:
        """Keys `[B, G, n, D]` of entries int64 `[B, G, n]`, 0 in the channels they have lost; see `Coded.at`."""
        done, held = self.done[:, None, None], self.tail.shape[2]
        out = self.tail.new_zeros(*entries.shape, self.tail.shape[3])
        if self.few.shape[2]:
            old = _pick(self.few, entries.clamp(max=self.few.shape[2] - 1))
            out.scatter_(3, self.channels[:, :, None].expand_as(old), old)
        if held == 0:
            return out
        return torch.where((entries < done)[..., None], out, _pick(self.tail, (entries - done).clamp(0, held - 1)))


class PackedKV(KV):
    """A dense view of packed entries. `k` and `v` are made by `make` when first read, and kept with the view.

    Attributes:
        packed: how the entries are stored, or None for a copy with keys and values of its own.
    """

    packed: CodedPair | Thinned | None = None
    _make: Callable[[], tuple[Tensor, Tensor]] | None = None
    _like: tuple[tuple[int, int, int, int, int], torch.device, torch.dtype]

    @staticmethod
    def over(
        packed: CodedPair | Thinned,
        make: Callable[[], tuple[Tensor, Tensor]],
        like: Tensor,
        dv: int,
        capacity: int,
        len: Tensor | None = None,
        pos: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> PackedKV:
        """make: dense keys `[B, G, capacity, D]` and values. like: any tensor `[B, G, *, D]` of their dtype and device."""
        out = object.__new__(PackedKV)
        b, g, _, d = like.shape
        fields = {
            "kind": "dense",
            "capacity": capacity,
            "len": len,
            "table": None,
            "offsets": None,
            "pos": pos,
            "bias": bias,
        }
        fields |= {"packed": packed, "_make": make, "_like": ((b, g, capacity, d, dv), like.device, like.dtype)}
        for name, value in fields.items():
            object.__setattr__(out, name, value)
        return out

    def __getattr__(self, name: str) -> Any:  # of what is not there yet
        if name not in ("k", "v") or self._make is None:
            raise AttributeError(name)
        for part, t in zip(("k", "v"), self._make(), strict=True):
            object.__setattr__(self, part, t)
        return self.__dict__[name]

    @property
    def made(self) -> bool:
        """Dense keys and values exist already."""
        return "k" in self.__dict__

    def keys_at(self, entries: Tensor) -> Tensor:
        """Keys `[B, G, n, D]` of entries `[B, G, n]`, which exist: what is read, and no more, is unpacked."""
        if self.made or self.packed is None:
            return self.k.gather(2, entries.long()[..., None].expand(*entries.shape, self.shape[3]))
        keys = self.packed if isinstance(self.packed, Thinned) else self.packed.keys
        return keys.at(entries.long())

    def newest(self) -> Tensor:
        """Keys `[B, G, 1, D]` of the last entry of each row, as a step of one token has brought it: such a key is packed no
        earlier than the next step. For views whose last entry came so; the kv heads of a row are of one length."""
        assert self.packed is not None
        keys = self.packed if isinstance(self.packed, Thinned) else self.packed.keys
        last = self.lengths()[:, :1] - 1
        ring = 0 if isinstance(keys, Thinned) else keys.ring
        return _pick(keys.tail, last % ring if ring else (last - keys.done[:, None]).clamp(min=0))

    def gather(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        if self.made or self.packed is None:
            return super().gather(entries)
        p, entries = self.packed, entries.long()
        return self.keys_at(entries), _pick(p.v, entries) if isinstance(p, Thinned) else p.values.at(entries)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self._like[0] if self._make is not None else super().shape

    @property
    def device(self) -> torch.device:
        return self._like[1] if self._make is not None else super().device

    @property
    def dtype(self) -> torch.dtype:
        return self._like[2] if self._make is not None else super().dtype

    @property
    def requires_grad(self) -> bool:
        if self.made or self.packed is None:
            return super().requires_grad
        p = self.packed
        parts = [p] if isinstance(p, Thinned) else [p.keys, p.values]
        held = [t for part in parts for t in vars(part).values() if isinstance(t, Tensor)]
        return any(t is not None and t.requires_grad for t in (*held, self.bias))


def _pick(t: Tensor, index: Tensor) -> Tensor:
    """Entries `[B, n]` of t `[B, G, *, ...]`, the same for all kv heads, or `[B, G, n]`."""
    (b, g, m), n = t.shape[:3], index.shape[-1]
    index = index.view(b, -1, n)
    if t.device.type != "cpu":
        return t.gather(2, index.view(b, -1, n, *[1] * (t.dim() - 3)).expand(b, g, n, *t.shape[3:]))
    row, head = (torch.arange(x, device=t.device) for x in (b, g))  # here whole rows are copied at a time
    row, head = row.view(b, 1, 1), head.view(1, g, 1)
    if not t.is_contiguous():
        return t[row, head, index]
    return t.flatten(0, 2).index_select(0, (index + (row * g + head) * m).flatten()).view(b, g, n, *t.shape[3:])
