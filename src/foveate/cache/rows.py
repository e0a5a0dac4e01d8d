"""Entries of batch rows of different length in one rectangle `[B, G, n, ...]`: each row's first ones exist.

Where all rows are equally long everything is a slice. Where they are not, indices come from counts on the device, which
are carried along instead of copied from the host at every step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Rows:
    """One number per batch row, on the host (`host`) and, once something asked for it, on the device."""

    def __init__(self, host: list[int], device: torch.device, there: Tensor | None = None):
        self.host, self.device, self._there = list(host), device, there

    @property
    def even(self) -> bool:
        """All rows have the same number."""
        return self.host.count(self.host[0]) == len(self.host)

    @property
    def most(self) -> int:
        return max(self.host)

    def there(self) -> Tensor:
        """int64 `[B]` on the device; never written again."""
        if self._there is None:
            self._there = torch.tensor(self.host, device=self.device)
        return self._there

    def map(self, f: Callable[[Any], Any]) -> Rows:
        """f of every number; f must do the same to an int and to a tensor of them."""
        return Rows([int(f(n)) for n in self.host], self.device, None if self._there is None else f(self._there))

    def __add__(self, other: Rows) -> Rows:
        return self._with(other, operator.add)

    def __sub__(self, other: Rows) -> Rows:
        return self._with(other, operator.sub)

    def _with(self, other: Rows, op: Callable[[Any, Any], Any]) -> Rows:
        host = [op(a, b) for a, b in zip(self.host, other.host, strict=True)]
        if self._there is None:
            return Rows(host, self.device)
        return Rows(host, self.device, op(self._there, other.host[0] if other.even else other.there()))

    def reorder(self, index: Tensor) -> Rows:
        return Rows([self.host[i] for i in index.tolist()], self.device)


def front(t: Tensor, valid: Tensor | None, counts: list[int]) -> Tensor:
    """Each row's valid entries (bool `[B, n]`) moved to the front; t `[B, G, n, ...]` itself where none is padding."""
    if valid is None or min(counts) == t.shape[2]:
        return t
    return _pick(t, (~valid).byte().sort(dim=-1, stable=True).indices[:, : max(counts)])


def join(a: Tensor, na: Rows, b: Tensor, nb: Rows) -> Tensor:
    """The first na entries of a `[B, G, *, ...]`, then the first nb of b, row by row; always a copy."""
    if na.even and nb.even:
        return torch.cat([a[:, :, : na.most], b[:, :, : nb.most]], 2)
    width, gap = (na + nb).most, a.shape[2]
    t = torch.arange(width, device=a.device)
    old = na.there()[:, None]
    return _pick(torch.cat([a, b], 2), torch.where(t < old, t, gap + t - old).clamp(max=gap + b.shape[2] - 1))


def drop(t: Tensor, count: Rows, gone: Rows) -> Tensor:
    """t `[B, G, *, ...]` without the first `gone` of each row's `count` entries; a copy."""
    left = (count - gone).most
    if gone.even:
        return t[:, :, gone.most : gone.most + left].clone()
    index = torch.arange(left, device=t.device) + gone.there()[:, None]
    return _pick(t, index.clamp(max=t.shape[2] - 1))


def put(buffer: Tensor, at: Rows, new: Tensor, counts: Rows, first: int = 0) -> None:
    """Write new `[B, G, n, ...]` into the buffer, from entry at[b] + first on.

    `new` holds entries first .. first + n of an addition of counts[b]; those beyond it go to the buffer's last slot,
    which must be free where rows differ.
    """
    n = new.shape[2]
    if at.even and counts.even:
        lo, size = at.most + first, min(n, counts.most - first)
        buffer[:, :, lo : lo + size] = new[:, :, :size]
        return
    t = torch.arange(first, first + n, device=new.device)
    slot = torch.where(t < counts.there()[:, None], at.there()[:, None] + t, buffer.shape[2] - 1)
    buffer.scatter_(2, _wide(slot, new), new)


def blank(t: Tensor, counts: Rows) -> Tensor:
    """The first max(counts) entries of t `[B, G, *, ...]`, zero where a row has fewer: nothing else is ever saved."""
    t = t[:, :, : counts.most]
    if counts.even:
        return t
    dead = torch.arange(t.shape[2], device=t.device) >= counts.there()[:, None]
    return t.masked_fill(dead.view(dead.shape[0], 1, -1, *[1] * (t.dim() - 3)), 0)


def _wide(index: Tensor, like: Tensor) -> Tensor:
    """An index `[B, n]` in the shape of like `[B, G, *, ...]`, n entries wide."""
    b, n = index.shape
    return index.view(b, 1, n, *[1] * (like.dim() - 3)).expand(b, like.shape[1], n, *like.shape[3:])


def _pick(t: Tensor, index: Tensor) -> Tensor:
    return t.gather(2, _wide(index, t))
