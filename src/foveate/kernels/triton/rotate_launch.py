"""Launch of the kernel of `rotate.py`."""

from __future__ import annotations

from torch import Tensor

from . import rotate
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether this kernel computes on tensors like t: its device, dtype and head dim

ROWS = 32  # of a program


def turn(x: Tensor, own: Tensor, other: Tensor, partner: Tensor, out: Tensor) -> None:
    """Write x `[B, heads, n, D]` times `own` plus its partners times `other` to `out` of the same shape, rounded once.

    own, other: fp32 `[B or 1, n, D]`, contiguous. partner: int32 `[D]`. out: rows of D numbers without gaps.
    """
    b, heads, n, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    apart = n * d if own.shape[0] > 1 else 0
    rotate.turn[(heads, -(-n // ROWS), b)](
        x, own, other, partner, out, n, heads, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), apart,
        ROWS=ROWS, D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip
