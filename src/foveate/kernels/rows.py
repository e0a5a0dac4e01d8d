"""Rows of strided tensors and of a KV view's storage by number: what `chunks.py` gathers, into memory that is used again."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from ..kv import KV

GATHERED = 1 << 21  # elements of keys and values gathered at one time


class Rows:
    """A strided tensor `[..., D]` as numbered rows, never copied (a slice of a larger buffer stays one)."""

    def __init__(self, t: Tensor):
        t = t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
        lead = t.stride()[:-1]
        unit = math.gcd(*lead) or 1
        self.strides = [s // unit for s in lead]
        last = sum((n - 1) * s for n, s in zip(t.shape[:-1], self.strides, strict=True))
        self.flat = t.as_strided((last + 1, t.shape[-1]), (unit, 1))

    def __call__(self, *index: Tensor, scratch: str | None = None) -> Tensor:
        """Rows at broadcast index tensors, one for each leading dimension. `scratch`: see `take`."""
        return self.take(_number(index, self.strides), scratch)

    def take(self, at: Tensor, scratch: str | None = None) -> Tensor:
        """Rows of these numbers `[...]` as `[..., D]`; into the buffer of this name, valid until its next use."""
        out = None if scratch is None else _scratch(scratch, at.numel(), self.flat)
        return torch.index_select(self.flat, 0, at.flatten(), out=out).view(*at.shape, -1)


_buffers = threading.local()


def _scratch(name: str, rows: int, like: Tensor) -> Tensor | None:
    """A reused `[rows, D]` buffer of this thread on the CPU, at most 4 x GATHERED elements.

    A fresh block of megabytes is a page fault every 4 KB: gathering into one costs up to ten times the gather itself.
    """
    size = rows * like.shape[1]
    if like.device.type != "cpu" or size > 4 * GATHERED:
        return None
    key = f"{name} {like.dtype}"
    buffer: Tensor | None = getattr(_buffers, key, None)
    if buffer is None or len(buffer) < size:
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=like.dtype)
        setattr(_buffers, key, buffer)
    return buffer[:size].view(rows, -1)


def _number(index: tuple[Tensor, ...], strides: list[int]) -> Tensor:
    at = index[0] * strides[0]
    for i, s in zip(index[1:], strides[1:], strict=True):
        at = at + i * s
    return at


class Storage:
    """Reads entries of a KV view by (batch row, kv head, entry) and numbers the rows of its storage."""

    def __init__(self, kv: KV):
        self.kv, self.k, self.v = kv, Rows(kv.k), Rows(kv.v)
        shape = kv.k.shape[:-1]
        self.strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]

    def _where(self, b: Tensor, g: Tensor, entries: Tensor) -> tuple[Tensor, ...]:
        kv = self.kv
        if kv.kind == "dense":
            return b[:, None], g[:, None], entries
        if kv.kind == "ragged":
            return ((kv.offsets[b, g, None].long() + entries).clamp(max=kv.k.shape[0] - 1),)  # type: ignore[index]
        page = kv.k.shape[1]
        pages = kv.table[b, g].long().gather(1, entries // page)  # type: ignore[index]
        return pages.clamp(0, kv.k.shape[0] - 1), entries % page

    def gather(self, b: Tensor, g: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[I, W, D]` and values `[I, W, Dv]` of entries `[I, W]`, valid until the next gather."""
        at = self._where(b, g, entries)
        return self.k(*at, scratch="k"), self.v(*at, scratch="v")

    def number(self, b: Tensor, g: Tensor, entries: Tensor) -> Tensor:
        """Row numbers `[I, W]` in a contiguous copy of the storage: where gradients are added."""
        return _number(self._where(b, g, entries), self.strides)
