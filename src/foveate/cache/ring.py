"""RingStore: `sink` first entries and a ring of the `window` most recent ones, in constant memory.

Attention is invariant to the order of keys, so the ring is never rotated back; `pos` says where each entry belongs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .dense import DenseStore
from .store import Store


class RingStore:
    """Slot of text position p: p for a sink, sink + (p - sink) % window otherwise. Tensors `[B, G, sink + window, ...]`."""

    kind: ClassVar[str] = "ring"

    def __init__(self, k: Tensor, v: Tensor, pos: Tensor, seen: list[int], sink: int, window: int):
        self.k, self.v, self.pos, self.seen, self.sink, self.window = k, v, pos, list(seen), sink, window
        self._len: Tensor | None = None  # int32 [B, G], only while rows differ

    @staticmethod
    def build(k: Tensor, v: Tensor, pos: Tensor, selection: Selection) -> RingStore:
        """From entries `[B, G, n, ...]` with their text positions; each row's first `counts` entries exist.

        Needs all of the first `sink` and last `window` positions of each row; what else is given is dropped.
        """
        assert selection.ring is not None
        sink, window = selection.ring
        b, g, n = k.shape[:3]
        size = sink + window
        counts = selection.full_counts()
        live = torch.arange(n, device=k.device) < counts[..., None]
        last = torch.where(live, pos, -1).amax((1, 2))
        p = pos.long()
        slot = torch.where(p < sink, p, sink + (p - sink) % window)
        slot = torch.where(live & ((p < sink) | (p > (last[:, None, None] - window))), slot, size)
        held = (slot < size).sum(-1)
        want = (last.long() + 1).clamp(max=size)[:, None].expand(b, g)
        if not torch.equal(held, want):
            row, head = (held != want).nonzero()[0].tolist()
            raise CacheError(
                f"selection: a ring of {sink} + {window} needs {int(want[row, head])} entries of row {row}, "
                f"kv head {head}, got {int(held[row, head])}"
            )

        def place(t: Tensor) -> Tensor:
            out = t.new_zeros(b, g, size + 1, *t.shape[3:])
            index = slot.view(b, g, n, *([1] * (t.dim() - 3))).expand_as(t)
            return out.scatter_(2, index, t)[:, :, :size].contiguous()

        return RingStore(place(k), place(v), place(pos), (last + 1).tolist(), sink, window)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.pos))

    @property
    def lens(self) -> list[list[int]]:
        return [[min(s, self.sink + self.window)] * self.k.shape[1] for s in self.seen]

    @property
    def positions_true(self) -> bool:
        return False

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        if k.shape[2] > 1 or (valid is not None and not bool(valid.all())):
            # a new turn: keep everything until the next compression
            return self._unrolled().append(k, v, valid, seen)
        slots = [p if p < self.sink else self.sink + (p - self.sink) % self.window for p in self.seen]
        if len(set(self.seen)) == 1:
            at = slots[0]
            self.k[:, :, at], self.v[:, :, at], self.pos[:, :, at] = k[:, :, 0], v[:, :, 0], self.seen[0]
        else:
            for b, at in enumerate(slots):
                self.k[b, :, at], self.v[b, :, at], self.pos[b, :, at] = k[b, :, 0], v[b, :, 0], self.seen[b]
        self.seen = [s + 1 for s in self.seen]
        self._len = None
        return self

    def _unrolled(self) -> DenseStore:
        """The same entries in text order."""
        count = [n[0] for n in self.lens]
        k, v, pos = self.k.clone(), self.v.clone(), self.pos.clone()
        for b, n in enumerate(count):
            order = self.pos[b, 0, :n].argsort()
            k[b, :, :n], v[b, :, :n], pos[b, :, :n] = self.k[b][:, order], self.v[b][:, order], self.pos[b][:, order]
        return DenseStore(k, v, count, pos)

    def view(self) -> KV:
        held = [min(s, self.sink + self.window) for s in self.seen]
        m = max(held)
        if min(held) == m:
            self._len = None
        elif self._len is None:
            self._len = torch.tensor(self.lens, dtype=torch.int32, device=self.k.device)
        return KV(self.k[:, :, :m], self.v[:, :, :m], "dense", m, len=self._len, pos=self.pos[:, :, :m])

    def select(self, selection: Selection) -> Store:
        from .select import apply

        return apply(self.view(), selection)

    def truncate(self, n: int) -> None:
        raise CacheError("truncate: a ring overwrites its oldest entries; what they held cannot be brought back")

    def reorder(self, index: Tensor) -> None:
        rows = index.to(self.k.device)
        self.k, self.v, self.pos = (t.index_select(0, rows) for t in (self.k, self.v, self.pos))
        self.seen = [self.seen[i] for i in index.tolist()]
        self._len = None

    def fork(self) -> RingStore:
        return RingStore(self.k.clone(), self.v.clone(), self.pos.clone(), self.seen, self.sink, self.window)

    def state(self) -> dict[str, Tensor]:
        rule = torch.tensor([self.sink, self.window])
        return {"k": self.k, "v": self.v, "pos": self.pos, "seen": torch.tensor(self.seen), "ring": rule}

    @staticmethod
    def restore(state: dict[str, Tensor]) -> RingStore:
        """The inverse of `state`."""
        sink, window = state["ring"].tolist()
        k, v, pos = (state[n].clone() for n in ("k", "v", "pos"))
        return RingStore(k, v, pos, state["seen"].tolist(), sink, window)
