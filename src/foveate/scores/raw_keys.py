"""Queries and keys before the model's rotation; keys are kept beside a layer's cache while decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kv import KV
from .keys import pieces, read_keys
from .rotation import unrotated

if TYPE_CHECKING:
    from ..methods.base import AttnInput, Rope


def raw_queries(q: Tensor, rope: Rope, pos: Tensor) -> Tensor:
    """Queries `[B, H, n, D]` that are rotated at `pos` `[B, n]`, their rotation undone: fp32 (fp64 for fp64)."""
    return unrotated(q, rope, pos, torch.float64 if q.dtype == torch.float64 else torch.float32)


def raw_keys(kv: KV, rope: Rope) -> Tensor:
    """Keys `[B, G, M, D]` of a view in text order, their rotation undone in fp32 and rounded once to their dtype.

    Heads go in pieces of bounded memory. Entries beyond `kv.len` hold anything.
    """
    b, g, m, d, _ = kv.shape
    at = torch.arange(m, device=kv.device)[None]
    if kv.kind == "dense":
        return unrotated(kv.k, rope, at, kv.k.dtype)
    out = torch.empty(b, g, m, d, dtype=kv.k.dtype, device=kv.device)
    for lo, hi in pieces(g, 4 * b * m * d):
        out[:, lo:hi] = unrotated(read_keys(kv, lo, hi), rope, at, out.dtype)
    return out


def group_logits(q: Tensor, keys: Tensor) -> Tensor:
    """q . k, unscaled: fp32 (fp64 for fp64) `[B, H, n, M]` of q `[B, H, n, D]` and keys `[B, G, M, D]`, in pieces."""
    (b, h, n, d), (g, m) = q.shape, keys.shape[1:3]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.to(acc).reshape(b, g, h // g * n, d)
    out = torch.empty(b, g, h // g * n, m, dtype=acc, device=q.device)
    for lo, hi in pieces(m, b * g * d):
        out[..., lo:hi] = rows @ keys[:, :, lo:hi].to(acc).transpose(-1, -2)
    return out.view(b, h, n, m)


class RawKeys:
    """`raw_keys` of a layer, brought up to date by one entry per decode step.

    The first step after a prompt or a roll-back, and any step that does not follow the last one, reads all keys; every
    other one only the newest of each row. It takes as much memory as the keys and lives in
    `state.layer`. Nothing waits for the device.

    Attributes:
        data: `[B, G, room, D]`. step: the decode step of the last update, -1: the next one reads all keys.
    """

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.step = -1

    def update(self, x: AttnInput, newest: bool = True) -> Tensor:
        """Cover the view of this decode step, which must be in text order. Returns keys `[B, G, M, D]`.

        Without `newest` the caller writes the newest entry of each row to `data` itself.
        """
        assert x.rope is not None and x.q_pos is not None
        m, lead = x.kv.capacity, x.kv.shape[:2]
        if self.data is None or tuple(self.data.shape[:2]) != lead or x.step == 0 or x.step != self.step + 1:
            # Into the old memory where it is large enough: a captured step may have recorded it.
            self._reserve(x.kv, m)
            assert self.data is not None
            self.data[:, :, :m] = raw_keys(x.kv, x.rope)
        else:
            self._reserve(x.kv, m)
            if newest:
                at = (x.kv.lengths() - 1).clamp(min=0)[..., None]  # [B, G, 1]
                acc = torch.float64 if x.kv.k.dtype == torch.float64 else torch.float32
                key = x.rope.unrotate(x.kv.gather(at)[0].to(acc), x.q_pos).to(x.kv.k.dtype)
                self.data.scatter_(2, at[..., None].expand_as(key), key)
        self.step = x.step
        return self.data[:, :, :m]

    # ------------------------------------------------------------------ with the cache
    def truncate(self, n: int) -> None:
        """The next step reads all keys. Numbers of steps begin anew after a call of several tokens, and the first steps may
        run without the method: one that seems to follow the last update need not."""
        self.step = -1

    def fork(self) -> RawKeys:
        out = RawKeys()
        out.data, out.step = None if self.data is None else self.data.clone(), self.step
        return out

    def reorder(self, index: Tensor) -> None:
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))

    def _reserve(self, kv: KV, m: int) -> None:
        b, g, _, d, _ = kv.shape
        old = self.data
        if old is not None and tuple(old.shape[:2]) == (b, g) and old.shape[2] >= m:
            return
        self.data = kv.k.new_zeros(b, g, m + max(64, m // 8), d)
        if old is not None and tuple(old.shape[:2]) == (b, g):
            self.data[:, :, : old.shape[2]] = old
