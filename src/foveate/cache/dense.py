"""DenseStore: one preallocated rectangle. Appending writes in place; growth copies rarely, never once a step."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .store import Store, new_positions, room


class DenseStore:
    """Keys `[B, G, capacity, D]`, values `[B, G, capacity, Dv]`, the same number of entries for all heads of a row."""

    kind: ClassVar[str] = "dense"

    def __init__(self, k: Tensor, v: Tensor, lens: list[int], pos: Tensor | None = None, bias: Tensor | None = None):
        self.k, self.v, self.count, self.pos, self.bias = k, v, list(lens), pos, bias
        self._len: Tensor | None = None  # int32 [B, G] that says `count`, made when a view first needs it

    @staticmethod
    def empty(k: Tensor, v: Tensor) -> DenseStore:
        """An empty store for rows, heads, widths and dtypes like those of k and v."""
        shape = (*k.shape[:2], 0)
        return DenseStore(k.new_empty(*shape, k.shape[3]), v.new_empty(*shape, v.shape[3]), [0] * k.shape[0])

    # ------------------------------------------------------------------ the contract
    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.pos, self.bias) if t is not None)

    @property
    def lens(self) -> list[list[int]]:
        return [[n] * self.k.shape[1] for n in self.count]

    @property
    def positions_true(self) -> bool:
        return self.pos is None

    @property
    def even(self) -> bool:
        """All rows have the same number of entries."""
        return self.count.count(self.count[0]) == len(self.count)

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        n = k.shape[2]
        keep = [n] * k.shape[0] if valid is None else valid.sum(-1).tolist()
        whole = keep.count(n) == len(keep)
        self._reserve(max(c + m for c, m in zip(self.count, keep, strict=True)))
        if whole and self.even:
            lo = self.count[0]
            self._write((slice(None), slice(None), slice(lo, lo + n)), k, v, seen)
        elif whole and n == 1:
            self._scatter(k, v, seen)
        else:
            for b, (lo, m) in enumerate(zip(self.count, keep, strict=True)):
                real = slice(None) if m == n else valid[b]  # type: ignore[index]
                at = (slice(b, b + 1), slice(None), slice(lo, lo + m))
                self._write(at, k[b : b + 1, :, real], v[b : b + 1, :, real], seen[b : b + 1])
        self.count = [c + m for c, m in zip(self.count, keep, strict=True)]
        self._len = self._len + n if whole and self._len is not None else None
        return self

    def _write(self, at: tuple[slice, slice, slice], k: Tensor, v: Tensor, seen: list[int]) -> None:
        self.k[at], self.v[at] = k, v
        if self.pos is not None:
            self.pos[at] = new_positions(seen, k.shape[2], self.pos)
        if self.bias is not None:
            self.bias[at] = 0

    def _scatter(self, k: Tensor, v: Tensor, seen: list[int]) -> None:
        """One entry for each row, at a place of its own."""
        at = self._lengths()[..., None].long()
        self.k.scatter_(2, at[..., None].expand_as(k), k)
        self.v.scatter_(2, at[..., None].expand_as(v), v)
        if self.pos is not None:
            new = torch.as_tensor(new_positions(seen, 1, self.pos), dtype=self.pos.dtype, device=self.pos.device)
            self.pos.scatter_(2, at, new.expand_as(at))
        if self.bias is not None:
            self.bias.scatter_(2, at, 0.0)

    def _lengths(self) -> Tensor:
        if self._len is None:
            self._len = torch.tensor(self.lens, dtype=torch.int32, device=self.k.device)
        return self._len

    def _reserve(self, need: int) -> None:
        if need <= self.k.shape[2]:
            return
        size, used = need + room(need), max(self.count)

        def grow(t: Tensor) -> Tensor:
            out = self._blank(t, size)
            out[:, :, :used] = t[:, :, :used]
            return out

        self.k, self.v = grow(self.k), grow(self.v)
        self.pos = None if self.pos is None else grow(self.pos)
        self.bias = None if self.bias is None else grow(self.bias)

    def _blank(self, t: Tensor, size: int) -> Tensor:
        """Room for `size` entries like those of t `[B, G, *, ...]`."""
        return t.new_empty(*t.shape[:2], size, *t.shape[3:])

    def view(self) -> KV:
        m = max(self.count)
        lens = None if self.even else self._lengths()
        pos = None if self.pos is None else self.pos[:, :, :m]
        bias = None if self.bias is None else self.bias[:, :, :m]
        return KV(self.k[:, :, :m], self.v[:, :, :m], "dense", m, len=lens, pos=pos, bias=bias)

    def select(self, selection: Selection) -> Store:
        from .select import apply

        return apply(self.view(), selection)

    def truncate(self, n: int) -> None:
        if self.pos is not None:
            raise CacheError("truncate: entries were evicted since; the dropped ones cannot be brought back")
        if n < 0 or any(c < n for c in self.count):
            raise CacheError(f"truncate: expected 0 to {min(self.count)} entries, got {n}")
        self.count = [c - n for c in self.count]
        self._len = None

    def reorder(self, index: Tensor) -> None:
        order = index.tolist()
        if order == list(range(len(self.count))):
            return
        rows = index.to(self.k.device)
        self.k, self.v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        self.pos = None if self.pos is None else self.pos.index_select(0, rows)
        self.bias = None if self.bias is None else self.bias.index_select(0, rows)
        self.count = [self.count[i] for i in order]
        self._len = None

    def fork(self) -> DenseStore:
        copy = [None if t is None else t.clone() for t in (self.k, self.v, self.pos, self.bias)]
        return DenseStore(copy[0], copy[1], self.count, copy[2], copy[3])  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        m = max(self.count)
        out = {"k": self.k[:, :, :m], "v": self.v[:, :, :m], "count": torch.tensor(self.count)}
        for name in ("pos", "bias"):
            if (t := getattr(self, name)) is not None:
                out[name] = t[:, :, :m]
        if self.even:
            return out
        lengths = torch.tensor(self.lens, device=self.k.device)  # a fixed store counts beside `_len`
        dead = torch.arange(m, device=self.k.device) >= lengths[..., None]  # whatever memory held is not saved
        blank = {name: dead[..., None] if t.dim() == 4 else dead for name, t in out.items() if name != "count"}
        return {name: t.masked_fill(blank[name], 0) if name in blank else t for name, t in out.items()}

    @staticmethod
    def restore(state: dict[str, Tensor]) -> DenseStore:
        """The inverse of `state`."""
        k, v, pos, bias = (state[n].clone() if n in state else None for n in ("k", "v", "pos", "bias"))
        assert k is not None and v is not None
        return DenseStore(k, v, state["count"].tolist(), pos, bias)
