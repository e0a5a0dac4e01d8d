"""FixedStore: a rectangle whose lengths live on the device, so that a captured decode step can be replayed over it.

A dense store tells kernels its length through shapes; a captured graph cannot see those change. Here every view has the
same shape, and appending one token writes where the length tensors say. The host counts along (`count`), and whoever
replays a graph tells it (`replayed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from .dense import DenseStore
from .store import Store


class FixedStore(DenseStore):
    """A `DenseStore` with room for `size` entries.

    Attributes:
        now: int32 `[B, G]`, entries that exist. seen_now: int64 `[B]`, tokens seen. Both count on the device.
    """

    def __init__(self, store: DenseStore, size: int, seen: list[int]):
        used = max(store.count)
        if size < used:
            raise CacheError(f"size: expected room for {used} entries at least, got {size}")

        def widen(t: Tensor | None) -> Tensor | None:
            if t is None or t.shape[2] == size:
                return t  # the store's slack is room enough: nothing is copied
            out = t.new_zeros(*t.shape[:2], size, *t.shape[3:])
            out[:, :, :used] = t[:, :, :used]
            return out

        k, v = widen(store.k), widen(store.v)
        assert k is not None and v is not None
        super().__init__(k, v, store.count, widen(store.pos), widen(store.bias))
        self.now = torch.tensor(self.lens, dtype=torch.int32, device=k.device)
        self.seen_now = torch.tensor(seen, dtype=torch.int64, device=k.device)

    @property
    def full(self) -> bool:
        """No token fits any more."""
        return max(self.count) >= self.k.shape[2]

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        if k.shape[2] != 1 or valid is not None or self.full:
            return self.loose().append(k, v, valid, seen)
        at = self.now[..., None].long()
        self.k.scatter_(2, at[..., None].expand_as(k), k)
        self.v.scatter_(2, at[..., None].expand_as(v), v)
        if self.pos is not None:
            self.pos.scatter_(2, at, self.seen_now[:, None, None].to(self.pos.dtype).expand_as(at))
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)
        self.now += 1
        self.seen_now += 1
        self.replayed()
        return self

    def replayed(self) -> None:
        """One more token came in, written by a replayed graph."""
        self.count = [c + 1 for c in self.count]

    def loose(self) -> DenseStore:
        """The same entries as an ordinary store, which may grow; this one must not be used afterwards."""
        return DenseStore(self.k, self.v, self.count, self.pos, self.bias)

    def view(self) -> KV:
        # A copy of the lengths: views handed out earlier stay what they were.
        return KV(self.k, self.v, "dense", self.k.shape[2], len=self.now.clone(), pos=self.pos, bias=self.bias)

    def fork(self) -> DenseStore:
        return self.loose().fork()

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.now -= n
        self.seen_now -= n

    def reorder(self, index: Tensor) -> None:
        super().reorder(index)
        rows = index.to(self.k.device)
        self.now, self.seen_now = self.now.index_select(0, rows), self.seen_now.index_select(0, rows)
