"""Launches of the kernels of `estimate_heads.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import estimate_heads
from .estimate_launch import BLOCKS, _row_warps
from .paging_launch import _pad, usable

__all__ = ["BLOCKS", "usable"]  # most key blocks of a head; whether these kernels compute on tensors like t


def head_blocks(
    columns: Tensor, diagonals: Tensor, rows: int, m: int, many: Tensor, mean: Tensor, kbar: Tensor, *,
    tau: float, least: int, most: int, block: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `heads.head_blocks` returns: bool `[B, H, nk]` twice and `[B, H]`; nk <= BLOCKS.

    columns, diagonals: mass of `rows` rows, fp32 `[B, H, M]`. many: integers `[2, B, H]`. mean fp32 `[B, H, D]`.
    """
    (b, h, wide), (g, nk, d) = columns.shape, kbar.shape[1:]
    columns, diagonals, kbar, mean = (t.contiguous() for t in (columns, diagonals, kbar, mean))
    pooled = torch.empty(4, b * h, nk, dtype=torch.float32, device=columns.device)
    estimate_heads.pool_probe[(nk, b * h)](
        columns, diagonals, mean, kbar, pooled, scale, softcap or 1.0, 1 / rows, m, h, g, wide, nk * d,
        BLOCK=block, PAD=triton.next_power_of_2(block), D=d, D_PAD=_pad(d), CAP=bool(softcap), num_warps=1,
    )  # fmt: skip
    col, diag = (torch.empty(b, h, nk, dtype=torch.int8, device=columns.device) for _ in range(2))
    aware = torch.empty(b, h, dtype=torch.int8, device=columns.device)
    estimate_heads.choose_heads[(b * h,)](
        pooled, many.to(torch.int32).contiguous(), col, diag, aware, tau, nk, least, most,
        BLOCK=block, N=triton.next_power_of_2(nk), num_warps=_row_warps(nk),
    )  # fmt: skip
    return col.view(torch.bool), diag.view(torch.bool), aware.view(torch.bool)
