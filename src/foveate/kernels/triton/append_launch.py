"""The launch of `append.append_tokens`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import append as append_kernel
from .paging_launch import _pad

MOST = 32  # tokens of a call: one program writes those of a row and kv head


def append(new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, now: Tensor, seen: Tensor, pages: None = None) -> Tensor:
    """Write n tokens of every row and count them. Returns the new lengths, int32 `[B, G]`, a tensor of its own.

    Args:
        new_k, new_v: `[B, G, n, D]`, n at most MOST, in the dtype of k and v. k, v: `[B, G, size, D]` with room for them, as
            `paging_launch.appends` accepts them.
        now: int32 `[B, G]`, entries so far. seen: int64 `[B]`. Both contiguous; they count the tokens afterwards.
        pages: None: bounds are left to whoever keeps them.
    """
    b, g, _, d = k.shape
    n, dv = new_k.shape[2], v.shape[-1]
    new_k, new_v = (t if t.stride(-1) == 1 else t.contiguous() for t in (new_k, new_v))
    said = torch.empty_like(now)
    append_kernel.append_tokens[(b * g,)](
        new_k, new_v, k, v, now, seen, said,
        g, *new_k.stride()[:3], *new_v.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        NEW=n, NEW_PAD=triton.next_power_of_2(n), D=d, D_PAD=_pad(d), DV=dv, DV_PAD=_pad(dv), num_warps=4,
    )  # fmt: skip
    return said
