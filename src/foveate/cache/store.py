"""The contract of a store: entries of every batch row and kv head, appended, selected, truncated, forked, counted.

Operations that may change the kind of storage (append, select) return the store to use from then on. Lengths are
known to the host: `lens[b][g]`. A store never infers text positions from lengths once something was evicted.

A view handed out earlier stays what it was after an append (a ring alone overwrites entries): writes land beyond its
`len`, and the length tensors of a view are never written again.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..kv import KV
from ..methods.base import Selection

SLACK = 128  # free entries a store leaves at least when it grows


def room(need: int) -> int:
    """Free entries beyond `need` when a store grows: an eighth, so that growth copies rarely and never once a step."""
    return max(need // 8, SLACK)


class Store(Protocol):
    """Keys and values of one layer. All tensors are `[B, G, ...]`."""

    kind: ClassVar[str]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys, values and side arrays, slack included."""

    @property
    def lens(self) -> list[list[int]]:
        """Entries that exist, per row and kv head."""

    @property
    def positions_true(self) -> bool:
        """Entry numbers are text positions: nothing was evicted or reordered."""

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        """Store k, v `[B, G, n, D]`; `valid` bool `[B, n]` leaves padding out; `seen[b]` tokens came before."""

    def view(self) -> KV:
        """What attention reads, all rows."""

    def select(self, selection: Selection) -> Store:
        """Keep only these entries of the view; the memory of the others is freed."""

    def truncate(self, n: int) -> None:
        """Forget the last n entries of every row (nothing may have been evicted)."""

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the old row index[b] (beams; also repeats and subsets)."""

    def fork(self) -> Store:
        """An independent copy."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that describe the contents, for saving; they may share memory with the store."""

    @staticmethod
    def restore(state: dict[str, Tensor]) -> Store:
        """The inverse of `state`; the new store shares no memory with it."""


def new_positions(seen: list[int], n: int, like: Tensor) -> Tensor | int:
    """Text positions of n new entries per row in the dtype of `like`, to broadcast over `[B, G, n]`."""
    same = len(set(seen)) == 1
    if same and n == 1:
        return seen[0]
    first = seen[0] if same else torch.tensor(seen, dtype=like.dtype, device=like.device)[:, None, None]
    return first + torch.arange(n, dtype=like.dtype, device=like.device)


def last_positions(seen: list[int], n: int, device: torch.device) -> Tensor:
    """int64 `[B, n]`: the text positions of the last n tokens of rows that have seen `seen` tokens."""
    if seen.count(seen[0]) == len(seen):
        return torch.arange(seen[0] - n, seen[0], device=device).expand(len(seen), n)
    return torch.tensor(seen, device=device)[:, None] - n + torch.arange(n, device=device)


def longest(store: Store) -> int:
    """Entries of the longest row and kv head, as the host counts them."""
    return max(n for row in store.lens for n in row)


def pack(kv: KV) -> dict[str, Tensor]:
    """The existing entries of a view, segment after segment in (b, g) order, without a gap.

    k `[T, D]`, v `[T, Dv]`, counts int64 `[B, G]`, and pos `[T]`, bias `[T]` where the view has them.
    """
    counts = kv.lengths()
    b, g, m, _, _ = kv.shape
    entries = torch.arange(m, device=kv.device).expand(b, g, m)
    live = entries < counts[..., None]
    k, v = take(kv, entries, live)
    out = {"k": k, "v": v, "counts": counts}
    for name in ("pos", "bias"):
        if (t := getattr(kv, name)) is not None:
            out[name] = t[live]
    return out


def take(kv: KV, entries: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[T, D]` and values `[T, Dv]` of those entries `[B, G, n]` that are live, in (b, g, n) order."""
    if kv.kind == "dense":  # a strided rectangle: index it as it is, flattening would copy it
        b, g, _ = live.nonzero(as_tuple=True)
        e = entries[live].long()
        return kv.k[b, g, e], kv.v[b, g, e]
    rows = kv.rows(entries)[live]
    k, v = kv.flat()
    return k[rows], v[rows]
