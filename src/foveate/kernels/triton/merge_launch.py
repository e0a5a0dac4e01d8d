"""Launch of the kernel of `merge.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import merge as kernel
from .paging_launch import _pad, usable

MOST = 3  # parts in one launch


def why_not(parts: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """The reason this kernel does not put these parts (out `[B, H, N, D]`, lse `[B, H, N]`) together, or None."""
    if not 2 <= len(parts) <= MOST:
        return f"{len(parts)} parts, 2 to {MOST} in one launch"
    first = parts[0][0]
    if first.dim() != 4 or any(out.dtype != first.dtype or out.shape != first.shape for out, _ in parts):
        return "outputs of other shapes or dtypes"
    if any(lse.shape != first.shape[:3] for _, lse in parts):
        return "log-sum-exps of another shape than their outputs'"
    if any(lse.dtype != torch.float32 for _, lse in parts):
        return "log-sum-exps that are not fp32"
    if torch.is_grad_enabled() and any(t.requires_grad for part in parts for t in part):
        return "gradients are asked for"
    return None if usable(first) else f"{first.dtype} on {first.device.type}"


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`combine.merge` of two or three parts, weights in fp32, rounded once."""
    outs = [out for out, _ in parts]
    if outs[0].stride(-1) != 1 or any(out.stride() != outs[0].stride() for out in outs):
        outs = [out.contiguous() for out in outs]
    lses = [lse.contiguous() for _, lse in parts]
    b, h, n, d = outs[0].shape
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    rows = 32 if d > 64 else 64
    kernel.merge[(-(-n // rows), h, b)](
        outs[0], outs[1], outs[-1], lses[0], lses[1], lses[-1], out, lse, n, h,
        *outs[0].stride()[:3], *out.stride()[:3], PARTS=len(outs), ROWS=rows, D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip
    return out, lse
