"""Queries and keys at other positions than their own: what methods with re-assigned positions attend with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import fused
from .keys import GPU_BUDGET, pieces

if TYPE_CHECKING:
    from ..methods.base import Rope

Pairs = tuple[Tensor, Tensor]  # int32 [D]: the channel that each one turns with; bool [D]: the first ones of their pairs
SMALL = 1 << 18  # numbers of x up to which two plain rotations cost no more than finding one
_PAIRS: WeakKeyDictionary[Rope, dict[tuple[int, torch.device], Pairs | None]] = WeakKeyDictionary()


def moved(x: Tensor, rope: Rope, old: Tensor, new: Tensor) -> Tensor:
    """x `[B, heads, n, D]`, rotated at positions `old` `[B, n]`, as if it were rotated at `new` `[B, n]`.

    Both rotations run in fp32 (fp64 for fp64) and the result is rounded once to the dtype of x. Heads go in pieces of
    bounded memory. A model whose angles are fp32 products carries their error of about position * 1e-7 radians along.
    On a GPU the two become one rotation, found once for all heads, which a kernel carries out in one pass over x; but
    not where x needs a gradient.
    """
    old, new = old.expand(max(len(old), len(new)), -1), new.expand(max(len(old), len(new)), -1)
    return _turned(x, rope, lambda y, at: rope.rotate(rope.unrotate(y, old[:, at]), new[:, at]), len(old), x.dtype)


def unrotated(x: Tensor, rope: Rope, pos: Tensor, dtype: torch.dtype) -> Tensor:
    """x `[B, heads, n, D]` with its rotation at `pos` `[B, n]` undone, rounded once to `dtype`. Computed as in `moved`."""
    return _turned(x, rope, lambda y, at: rope.unrotate(y, pos[:, at]), len(pos), dtype)


def _turned(x: Tensor, rope: Rope, turn: Callable[[Tensor, slice], Tensor], batch: int, dtype: torch.dtype) -> Tensor:
    """`turn` of x; it takes heads of x, or what stands for all of them, and which of the n positions they are."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, heads, n, d = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    plain = x.numel() <= SMALL or (x.requires_grad and torch.is_grad_enabled())
    if not plain and (kernels := fused.turns(x)) is not None and (pairs := channels(rope, x)) is not None:
        for lo, hi in pieces(n, 12 * batch * d, GPU_BUDGET // 4):
            own, other = pair_tables(turn, slice(lo, hi), batch, pairs)
            kernels.turn(x[:, :, lo:hi], own, other, pairs[0], out[:, :, lo:hi])
        return out
    for lo, hi in pieces(heads, 4 * b * n * d):  # a rotation holds about four copies
        out[:, lo:hi] = turn(x[:, lo:hi].to(acc), slice(0, n)).to(dtype)
    return out


def channels(rope: Rope, x: Tensor) -> Pairs | None:
    """Which channels of vectors like x `[..., D]` the rotation turns together, or None if it does not turn pairs.

    Families differ in that: halves, neighbours, a part of the width. It is read off the unit vectors, turned to position
    1, once for a rotation: the device is asked then and never again. A channel that is not turned is its own partner.
    Both channels of a pair must turn alike, as (c, s) and (-s, c) do.
    """
    known, key = _PAIRS.setdefault(rope, {}), (x.shape[-1], x.device)
    if key not in known:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # a captured step cannot ask
        d = x.shape[-1]
        unit = torch.eye(d, device=x.device)
        turned = rope.rotate(unit[None, None], torch.ones(1, d, dtype=torch.int64, device=x.device))[0, 0]
        turned = turned.cpu()
        mixed = (turned != 0) & (unit.cpu() == 0)  # [from, to]
        partner = torch.where(mixed.any(0), mixed.int().argmax(0), torch.arange(d))
        first = partner >= torch.arange(d)
        own, other = turned.diagonal(), turned.gather(1, partner[:, None])[:, 0]
        alike = torch.equal(own, own[partner]) and torch.equal(other, torch.where(mixed.any(0), -other, other)[partner])
        alone = bool((mixed.sum(0) <= 1).all()) and torch.equal(partner[partner], torch.arange(d)) and alike
        known[key] = (partner.to(x.device, torch.int32), first.to(x.device)) if alone else None
    return known[key]


def pair_tables(turn: Callable[[Tensor, slice], Tensor], at: slice, batch: int, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """What a vector, and its partners, are multiplied with at these positions: fp32 `[batch, n, D]` twice.

    The first channels of all pairs are turned together, as one vector of ones and zeros: c of each stays where it was, s
    comes to its partner. The second channels turn alike.
    """
    partner, first = pairs
    n, d = at.stop - at.start, len(first)
    turned = turn(first.float().expand(batch, 1, n, d).contiguous(), at).float()[:, 0]
    there = turned[..., partner]
    lone = partner == torch.arange(d, device=first.device)
    other = torch.where(first, -there, turned).masked_fill(lone, 0.0)
    return torch.where(first, turned, there), other
