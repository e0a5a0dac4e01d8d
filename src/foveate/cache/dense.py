"""DenseStore: one preallocated rectangle. Appending writes in place; growth copies rarely, never once a step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CacheError
from ..kv import KV
from ..methods.base import Selection
from .store import Store

GROW = 1.125  # capacity over need when it grows
SLACK = 128  # and at least this many free entries


class DenseStore:
    """Keys `[B, G, capacity, D]`, values `[B, G, capacity, Dv]`, the same number of entries for all heads of a row."""

    def __init__(self, k: Tensor, v: Tensor, lens: list[int], pos: Tensor | None = None, bias: Tensor | None = None):
        self.k, self.v, self.count, self.pos, self.bias = k, v, list(lens), pos, bias

    @staticmethod
    def empty(k: Tensor, v: Tensor) -> DenseStore:
        """An empty store for rows, heads, widths and dtypes like those of k and v."""
        return DenseStore(k[:, :, :0], v[:, :, :0], [0] * k.shape[0])

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

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None, seen: list[int]) -> Store:
        n = k.shape[2]
        keep = [n] * k.shape[0] if valid is None else valid.sum(-1).tolist()
        self._reserve(max(c + m for c, m in zip(self.count, keep, strict=True)))
        if len(set(self.count)) == 1 and all(m == n for m in keep):
            lo = self.count[0]
            self._write((slice(None), slice(None), slice(lo, lo + n)), k, v, seen, None)
        else:
            for b, (lo, m) in enumerate(zip(self.count, keep, strict=True)):
                real = slice(None) if m == n else valid[b]  # type: ignore[index]
                at = (slice(b, b + 1), slice(None), slice(lo, lo + m))
                self._write(at, k[b : b + 1, :, real], v[b : b + 1, :, real], seen[b : b + 1], b)
        self.count = [c + m for c, m in zip(self.count, keep, strict=True)]
        return self

    def _write(self, at: tuple[slice, slice, slice], k: Tensor, v: Tensor, seen: list[int], row: int | None) -> None:
        self.k[at], self.v[at] = k, v
        if self.pos is not None:
            steps = torch.arange(k.shape[2], dtype=self.pos.dtype, device=k.device)
            self.pos[at] = torch.tensor(seen, dtype=self.pos.dtype, device=k.device)[:, None, None] + steps
        if self.bias is not None:
            self.bias[at] = 0

    def _reserve(self, need: int) -> None:
        cap = self.k.shape[2]
        if need <= cap:
            return
        size = max(int(need * GROW), need + SLACK)
        used = max(self.count)

        def grow(t: Tensor) -> Tensor:
            out = t.new_empty(*t.shape[:2], size, *t.shape[3:])
            out[:, :, :used] = t[:, :, :used]
            return out

        self.k, self.v = grow(self.k), grow(self.v)
        self.pos = None if self.pos is None else grow(self.pos)
        self.bias = None if self.bias is None else grow(self.bias)

    def view(self) -> KV:
        m = max(self.count)
        even = len(set(self.count)) == 1
        lens = None
        if not even:
            lens = torch.tensor(self.lens, dtype=torch.int32, device=self.k.device)
        cut = {name: t[:, :, :m] for name in ("pos", "bias") if (t := getattr(self, name)) is not None}
        return KV(self.k[:, :, :m], self.v[:, :, :m], "dense", m, len=lens, **cut)

    def select(self, selection: Selection) -> Store:
        from .select import apply

        return apply(self.view(), selection)

    def truncate(self, n: int) -> None:
        if self.pos is not None:
            raise CacheError("truncate: entries were evicted since; the dropped ones cannot be brought back")
        if n < 0 or any(c < n for c in self.count):
            raise CacheError(f"truncate: expected 0 to {min(self.count)} entries, got {n}")
        self.count = [c - n for c in self.count]

    def reorder(self, index: Tensor) -> None:
        rows = index.to(self.k.device)
        for name in ("k", "v", "pos", "bias"):
            t = getattr(self, name)
            if t is not None:
                setattr(self, name, t.index_select(0, rows))
        self.count = [self.count[i] for i in index.tolist()]

    def fork(self) -> DenseStore:
        copy = [None if t is None else t.clone() for t in (self.k, self.v, self.pos, self.bias)]
        return DenseStore(copy[0], copy[1], self.count, copy[2], copy[3])  # type: ignore[arg-type]

    def state(self) -> dict[str, Tensor]:
        m = max(self.count)
        out = {"k": self.k[:, :, :m], "v": self.v[:, :, :m], "count": torch.tensor(self.count)}
        for name in ("pos", "bias"):
            if (t := getattr(self, name)) is not None:
                out[name] = t[:, :, :m]
        return {key: t.contiguous() for key, t in out.items()}

    @staticmethod
    def restore(state: dict[str, Tensor]) -> DenseStore:
        """The inverse of `state`."""
        return DenseStore(state["k"], state["v"], state["count"].tolist(), state.get("pos"), state.get("bias"))
