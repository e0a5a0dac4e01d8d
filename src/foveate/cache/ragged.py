"""RaggedStore: as many entries per row and kv head as were kept, in one flat buffer, so that bytes kept are bytes held."""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .store import Store, new_positions, pack, room, take


class RaggedStore:
    """Flat keys `[T, D]` and values `[T, Dv]`, one segment per row and kv head with free slots behind it.

    Appending writes into the free slots; when they are used up, all segments move to new buffers with slots for an
    eighth of the mean segment, so that a step costs the same however long the cache is. Text positions (int32) and
    biases (fp32) stay rectangles `[B, G, longest]`, as a `KV` has them; free slots of the bias hold 0.
    """

    kind: ClassVar[str] = "ragged"

    def __init__(self, k: Tensor, v: Tensor, counts: list[list[int]], pos: Tensor, bias: Tensor | None = None):
        """From packed entries (see `pack`): k `[T, D]`, v `[T, Dv]`, pos and bias `[T]`."""
        self.counts = [list(row) for row in counts]
        g, wide = len(counts[0]), max(max(row) for row in counts)
        flat = [n for row in counts for n in row]
        live = torch.arange(wide, device=k.device) < torch.tensor(counts, device=k.device)[..., None]

        def spread(t: Tensor) -> Tensor:
            return torch.zeros(len(counts), g, wide, dtype=t.dtype, device=t.device).masked_scatter_(live, t)

        self.k, self.v = k, v
        self.pos = spread(pos.int())
        self.bias = None if bias is None else spread(bias)
        begin = list(accumulate(flat, initial=0))
        self.starts = [begin[b * g : (b + 1) * g] for b in range(len(counts))]
        self.free = 0  # slots behind every segment, at least
        self._offsets: Tensor
        self._len: Tensor
        self._move(list(range(len(counts))), 0)

    @staticmethod
    def build(kv: KV, selection: Selection, pos: Tensor, bias: Tensor | None) -> RaggedStore:
        """From the selected entries of a view, whose positions and biases are `[B, G, K]` like the indices."""
        counts = selection.full_counts()
        live = torch.arange(selection.indices.shape[2], device=counts.device) < counts[..., None]
        k, v = take(kv, selection.indices, live)
        return RaggedStore(k, v, counts.tolist(), pos[live], None if bias is None else bias[live])

    # ------------------------------------------------------------------ the contract
    @property
    def nbytes(self) -> int:
        index = (self._offsets, self._len)
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.pos, self.bias, *index) if t is not None)

    @property
    def lens(self) -> list[list[int]]:
        return [list(row) for row in self.counts]

    @property
    def positions_true(self) -> bool:
        return False

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        n = k.shape[2]
        keep = [n] * k.shape[0] if valid is None else valid.sum(-1).tolist()
        most = max(keep)
        if most > self.free:
            self._move(list(range(len(keep))), most)
        if n == 1 and min(keep) == 1:
            rows = (self._offsets + self._len).view(-1)
            self.k.index_copy_(0, rows, k.reshape(-1, k.shape[3]))
            self.v.index_copy_(0, rows, v.reshape(-1, v.shape[3]))
            at = self._len[..., None].long()
            new = torch.as_tensor(new_positions(seen, 1, self.pos), dtype=self.pos.dtype, device=self.pos.device)
            self.pos.scatter_(2, at, new.expand_as(at))
            self._len = self._len + 1
        else:
            for b, m in enumerate(keep):
                real = slice(None) if m == n else valid[b]  # type: ignore[index]
                for g, (start, c) in enumerate(zip(self.starts[b], self.counts[b], strict=True)):
                    self.k[start + c : start + c + m] = k[b, g, real]
                    self.v[start + c : start + c + m] = v[b, g, real]
                    self.pos[b, g, c : c + m] = torch.arange(seen[b], seen[b] + m, device=self.pos.device)
            self._len = self._len + torch.tensor(keep, dtype=torch.int32, device=self._len.device)[:, None]
        self.counts = [[c + m for c in row] for row, m in zip(self.counts, keep, strict=True)]
        self.free -= most
        return self

    def _move(self, rows: list[int], need: int) -> None:
        """The segments of these rows, in this order, to new buffers with at least `need` free slots behind each."""
        counts = [self.counts[b] for b in rows]
        g, total = len(counts[0]), sum(sum(row) for row in counts)
        free = need + room(total // (len(rows) * g))
        size, wide = total + free * len(rows) * g, max(max(row) for row in counts)

        def widen(t: Tensor) -> Tensor:
            out = t.new_zeros(len(rows), g, wide + free)
            out[:, :, :wide] = t[rows, :, :wide]
            return out

        k, v = self.k.new_empty(size, self.k.shape[1]), self.v.new_empty(size, self.v.shape[1])
        starts, at = [], 0
        for b, row in zip(rows, counts, strict=True):
            starts.append([0] * g)
            for i, (old, n) in enumerate(zip(self.starts[b], row, strict=True)):
                k[at : at + n], v[at : at + n] = self.k[old : old + n], self.v[old : old + n]
                starts[-1][i] = at
                at += n + free
        self.k, self.v, self.pos = k, v, widen(self.pos)
        self.bias = None if self.bias is None else widen(self.bias)
        self.counts, self.starts, self.free = [list(row) for row in counts], starts, free
        self._offsets = torch.tensor(starts, dtype=torch.int64, device=k.device)
        self._len = torch.tensor(counts, dtype=torch.int32, device=k.device)

    def view(self) -> KV:
        m = max(max(row) for row in self.counts)
        bias = None if self.bias is None else self.bias[:, :, :m]
        return KV(self.k, self.v, "ragged", m, len=self._len, offsets=self._offsets, pos=self.pos[:, :, :m], bias=bias)

    def select(self, selection: Selection) -> Store:
        from .select import apply

        return apply(self.view(), selection)

    def truncate(self, n: int) -> None:
        raise CacheError("truncate: entries were evicted since; the dropped ones cannot be brought back")

    def reorder(self, index: Tensor) -> None:
        order = index.tolist()
        if order != list(range(len(self.counts))):
            self._move(order, 0)

    def fork(self) -> RaggedStore:
        out = object.__new__(RaggedStore)
        out.__dict__.update(self.__dict__)
        out.k, out.v, out.pos, out._len = self.k.clone(), self.v.clone(), self.pos.clone(), self._len.clone()
        out.bias = None if self.bias is None else self.bias.clone()
        return out

    def state(self) -> dict[str, Tensor]:
        return pack(self.view())

    @staticmethod
    def restore(state: dict[str, Tensor]) -> RaggedStore:
        """The inverse of `state`."""
        return RaggedStore(state["k"], state["v"], state["counts"].tolist(), state["pos"], state.get("bias"))
