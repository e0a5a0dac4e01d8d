"""Queries and keys at other positions than their own: what methods with re-assigned positions attend with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .keys import pieces

if TYPE_CHECKING:
    from ..methods.base import Rope


def moved(x: Tensor, rope: Rope, old: Tensor, new: Tensor) -> Tensor:
    """x `[B, heads, n, D]`, rotated at positions `old` `[B, n]`, as if it were rotated at `new` `[B, n]`.

    Both rotations run in fp32 (fp64 for fp64) and the result is rounded once to the dtype of x. Heads go in pieces of
    bounded memory. A model whose angles are fp32 products carries their error of about position * 1e-7 radians along.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    b, heads, n, d = x.shape
    out = torch.empty_like(x)
    for lo, hi in pieces(heads, 4 * b * n * d):  # a rotation holds about four copies
        out[:, lo:hi] = rope.rotate(rope.unrotate(x[:, lo:hi].to(acc), old), new).to(x.dtype)
    return out
