"""RingStore: `sink` first entries and a ring of the `window` most recent ones, in constant memory.

Attention is invariant to the order of keys, so the ring is never rotated back; `pos` says where each entry belongs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .dense import DenseStore
from .store import Store


class RingStore:
    """Slot of text position p: p for a sink, sink + (p - sink) % window otherwise. Tensors `[B, G, sink + window, ...]`."""

    def __init__(self, k: Tensor, v: Tensor, pos: Tensor, seen: list[int], sink: int, window: int):
        self.k, self.v, self.pos, self.seen, self.sink, self.window = k, v, pos, list(seen), sink, window

    @staticmethod
    def build(k: Tensor, v: Tensor, pos: Tensor, selection: Selection) -> RingStore:
        """From entries `[B, G, n, ...]` with their text positions; each row's first `counts` entries exist."""
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
        if k.shape[2] > 1:  # a new turn: keep everything until the next compression
            return self._unrolled().append(k, v, valid, seen)
        if valid is not None and not bool(valid.all()):
            raise CacheError("valid: a single-token step expects a real token in every row")
        for b, p in enumerate(self.seen):
            at = p if p < self.sink else self.sink + (p - self.sink) % self.window
            self.k[b, :, at], self.v[b, :, at], self.pos[b, :, at] = k[b, :, 0], v[b, :, 0], p
        self.seen = [s + 1 for s in self.seen]
        return self

    def _unrolled(self) -> DenseStore:
        count = [n[0] for n in self.lens]
        k, v, pos = self.k.clone(), self.v.clone(), self.pos.clone()
        for b, s in enumerate(self.seen):  # text order, so that entries ascend with position
            order = self.pos[b, 0, : count[b]].argsort()
            k[b, :, : count[b]], v[b, :, : count[b]] = self.k[b][:, order], self.v[b][:, order]
            pos[b, :, : count[b]] = self.pos[b][:, order]
            assert s >= count[b]
        return DenseStore(k, v, count, pos)

    def view(self) -> KV:
        size = self.sink + self.window
        short = any(s < size for s in self.seen)
        lens = torch.tensor(self.lens, dtype=torch.int32, device=self.k.device) if short else None
        return KV(self.k, self.v, "dense", size, len=lens, pos=self.pos)

    def select(self, selection: Selection) -> Store:
        from .select import apply

        return apply(self._unrolled().view(), selection)

    def truncate(self, n: int) -> None:
        raise CacheError("truncate: a ring overwrites its oldest entries; what they held cannot be brought back")

    def reorder(self, index: Tensor) -> None:
        rows = index.to(self.k.device)
        self.k, self.v, self.pos = (t.index_select(0, rows) for t in (self.k, self.v, self.pos))
        self.seen = [self.seen[i] for i in index.tolist()]

    def fork(self) -> RingStore:
        return RingStore(self.k.clone(), self.v.clone(), self.pos.clone(), self.seen, self.sink, self.window)

    def state(self) -> dict[str, Tensor]:
        rule = torch.tensor([self.sink, self.window])
        return {"k": self.k, "v": self.v, "pos": self.pos, "seen": torch.tensor(self.seen), "ring": rule}

    @staticmethod
    def restore(state: dict[str, Tensor]) -> RingStore:
        """The inverse of `state`."""
        sink, window = state["ring"].tolist()
        return RingStore(state["k"], state["v"], state["pos"], state["seen"].tolist(), sink, window)
