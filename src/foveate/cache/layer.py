"""LayerCache: one layer's store, the methods' state beside it, and what the lazy compression needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheError
from ..methods.base import LayerState, Selection
from .dense import DenseStore
from .fixed import Fixed
from .offload import OffloadStore
from .paged import PagedStore
from .pruned import ChannelStore
from .quantised import QuantisedStore
from .store import Store, last_positions

DENSE = {"kind": "dense"}
STORAGE: dict[str, Callable[..., Store]] = {
    "dense": DenseStore.empty,
    "paged": PagedStore.empty,
    "quantised": QuantisedStore.empty,
    "channels": ChannelStore.empty,
    "offload": OffloadStore.empty,
}


class LayerCache:
    """Attributes:
    store: the entries, or None before the first append.
    seen: real tokens each row has seen, evicted ones included (the next token's text position).
    rows: per row, the state of prefill and compress. batch: the state of decode, over all rows.
    tails: per row, the last queries of the prompt `[1, H, t, D]`, saved for `compress`.
    pending: a multi-token call came since the last compression. fresh: tokens that came since then, padding included.
    evicted: entries were dropped.
    steps: single-token calls since the last call of several tokens.
    """

    def __init__(self) -> None:
        self.store: Store | None = None
        self.seen: list[int] = []
        self.rows: list[LayerState] = []
        self.batch = LayerState()
        self.tails: list[Tensor | None] = []
        self.pending = False
        self.fresh = 0
        self.evicted = False
        self.steps = 0

    def append(
        self,
        k: Tensor,
        v: Tensor,
        valid: Tensor | None = None,
        counts: list[int] | None = None,
        storage: Mapping[str, Any] = DENSE,
    ) -> None:
        """Store new entries k, v `[B, G, n, D]`, padding (`valid` False) left out. `storage`: the store's kind and
        options, read at the first call."""
        b, n = k.shape[0], k.shape[2]
        if self.store is None:
            options = dict(storage)
            self.store = STORAGE[options.pop("kind")](k, v, **options)
            self.seen = [0] * b
            self.rows = [LayerState() for _ in range(b)]
            self.tails = [None] * b
        if len(self.seen) != b:
            raise CacheError(f"k: expected {len(self.seen)} batch rows like the cache, got {b}")
        if counts is None:
            counts = [n] * b if valid is None else valid.sum(-1).tolist()
        self.store = self.store.append(k, v, valid, self.seen)
        self.fresh = (self.fresh if self.pending else 0) + n
        self.seen = [s + c for s, c in zip(self.seen, counts, strict=True)]

    def positions(self, n: int, device: torch.device) -> Tensor:
        """int64 `[B, n]`: the text positions of the last n tokens of each row."""
        if isinstance(self.store, Fixed):
            return self.store.seen_now[:, None] - n + torch.arange(n, device=device)
        return last_positions(self.seen, n, device)

    @property
    def nbytes(self) -> int:
        """Bytes the allocator gave for entries and side arrays."""
        return 0 if self.store is None else self.store.nbytes

    def save_tail(self, row: int, q: Tensor, rows: int) -> None:
        """Keep the last `rows` queries of a row, across chunks. q `[1, H, n, D]`."""
        if rows <= 0:
            return
        from torch import cat

        old = self.tails[row]
        joined = q[:, :, -rows:] if old is None else cat([old, q[:, :, -rows:]], 2)
        self.tails[row] = joined[:, :, -rows:].clone()

    def select(self, keep: Selection, rows: list[Selection]) -> None:
        """Keep only these entries (`keep` for all rows, `rows` one by one); the others are gone.

        A row that keeps all entries keeps its memory too: they ascend, so each has its number still. What decode steps
        remember goes in any case: they read it from the stored keys, which may be others now (quantised, pruned).
        """
        assert self.store is not None
        before = self.store.lens
        self.store = self.store.select(keep)
        moved = [keep.ring is not None or old != new for old, new in zip(before, self.store.lens, strict=True)]
        self.evicted = self.evicted or any(moved)
        for state, selection, fewer in zip(self.rows, rows, moved, strict=True):
            if fewer:
                state.keep(selection)
        self.batch.keep(keep)
        self.tails = [None] * len(self.tails)

    def forget(self) -> None:
        """Drop what methods remembered beside the entries (another recipe takes over)."""
        self.rows = [LayerState() for _ in self.rows]
        self.batch = LayerState()
        self.tails = [None] * len(self.tails)

    def truncate(self, n: int) -> None:
        """Forget the last n tokens. Raises CacheError once entries were evicted: the result would not be exact."""
        if self.evicted:
            raise CacheError(
                "this cache has evicted entries, so it cannot be rolled back exactly; "
                "use a recipe without a cache policy for assisted or speculative decoding"
            )
        if self.store is None:
            return
        self.store.truncate(n)
        self.seen = [s - n for s in self.seen]
        self.fresh = max(0, self.fresh - n)
        self.pending = self.pending and self.fresh > 0  # else all that a compression would look at is gone again
        for state in (*self.rows, self.batch):
            state.passed(self.steps - 1)
            state.truncate(n)
        self.tails = [None if t is None or t.shape[2] <= n else t[:, :, : t.shape[2] - n] for t in self.tails]

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the old row index[b]. Rows never share mutable state afterwards."""
        if self.store is None:
            return
        self.store.reorder(index)
        order = index.tolist()
        self.seen = [self.seen[i] for i in order]
        self.rows = [self.rows[i].fork() for i in order]
        self.tails = [self.tails[i] for i in order]
        self.batch.reorder(index)

    def fork(self) -> LayerCache:
        """An independent copy, for asking several questions about one context."""
        out = LayerCache()
        out.store = None if self.store is None else self.store.fork()
        out.seen, out.pending, out.evicted, out.steps = list(self.seen), self.pending, self.evicted, self.steps
        out.fresh = self.fresh
        out.rows, out.batch, out.tails = [r.fork() for r in self.rows], self.batch.fork(), list(self.tails)
        return out
