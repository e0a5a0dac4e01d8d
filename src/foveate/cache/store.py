"""The contract of a store: entries of every batch row and kv head, appended, selected, truncated, forked, counted.

Operations that may change the kind of storage (append, select) return the store to use from then on. Lengths are
known to the host: `lens[b][g]`. A store never infers text positions from lengths once something was evicted.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..kv import KV
from ..methods.base import Selection


class Store(Protocol):
    """Keys and values of one layer. All tensors are `[B, G, ...]`."""

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
        """Keep only these entries; the memory of the others is freed."""

    def truncate(self, n: int) -> None:
        """Forget the last n entries of every row (nothing may have been evicted)."""

    def reorder(self, index: Tensor) -> None:
        """Row b becomes the old row index[b] (beams; also repeats and subsets)."""

    def fork(self) -> Store:
        """An independent copy."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that describe the contents, for saving; `restore` of the class is the inverse."""
