"""Launches of `estimate_stripes.py`: anchors of query blocks, bits of far keys, lists of them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import estimate_stripes
from .config import config, device
from .estimate_launch import _index
from .estimate_lowbit_launch import bit_lists
from .paging_launch import _pad, usable

__all__ = ["bit_lists", "usable"]

BLOCKS = (16, 32, 64, 128)  # rows of a block
ROWS = 128  # most mean queries of a product
SPAN = 2048  # keys that a program looks at


def finds(block: int, step: int, k: Tensor) -> bool:
    """Whether these kernels compute a call: blocks and groups whose rows fit a product; k of half precision or fp32."""
    return block in BLOCKS and step <= ROWS and usable(k)


def anchors(
    q: Tensor, k: Tensor, *, start: int, block: int, step: int, init: int, local: int, scale: float, softcap: float | None
) -> Tensor:
    """`stripes.anchors` of q `[B, H, n, D]`, k `[B, G, m, D]`: fp32 `[B, H, nq]`."""
    (b, h, n, d), (g, m) = q.shape, k.shape[1:3]
    if scale < 0:  # the kernel scales the maximum of a row
        q, scale = -q, -scale
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    first, size = start // block, q.element_size()
    nq = (start + n - 1) // block - first + 1
    out = torch.empty(b, h, nq, dtype=torch.float32, device=q.device)
    c = config(device(_index(q))[0], block, _pad(d), _pad(d), size, None)
    estimate_stripes.anchor_peaks[(nq, b * h)](
        q, k, out, scale, softcap or 1.0, m, n, start, first, init, local,
        g, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        GROUP=h // g, BLOCK=block, STEP=step, KEYS=min(c.keys, block), D=d, D_PAD=_pad(d), CAP=bool(softcap),
        FP32=size == 4, STAGES=c.stages, num_warps=8 if block == 128 else 4, num_stages=c.stages,
    )  # fmt: skip
    return out


def stripe_bits(
    mean: Tensor, limit: Tensor, k: Tensor, groups: int, *,
    first: int, block: int, step: int, init: int, local: int, softcap: float | None,
) -> Tensor:  # fmt: skip
    """A bit for each far key that a block of a group takes: int32 `[B, H, groups, words]`, the last group's far keys wide.

    mean `[B, H, nq, D]`, in k's dtype and times the scale, of the blocks from number `first` on; limit fp32 `[B, H, nq]`.
    k `[B, G, m, D]`. Words beyond a group's far keys are anything.
    """
    (b, h, nq, d), (g, m) = mean.shape, k.shape[1:3]
    r, group0, size = h // g, first // step, k.element_size()
    k = k if k.stride(-1) == 1 else k.contiguous()
    most = max(0, ((group0 + groups - 1) * step - local) * block)
    many = max(1, -(-most // 32))
    words = torch.empty(b, h, groups, many, dtype=torch.int32, device=k.device)
    wide = triton.next_power_of_2(step)
    heads = max(1, min(triton.next_power_of_2(r), ROWS // wide))
    wide = max(wide, 16 // heads)
    c = config(device(_index(k))[0], heads * wide, _pad(d), _pad(d), size, None)
    keys = max(32, c.keys)
    if most > 0:
        estimate_stripes.stripe_bits[(-(-most // SPAN), groups, b * g * -(-r // heads))](
            mean.contiguous(), limit.contiguous(), k, words, softcap or 1.0, m, nq, first, group0, many, init, local, SPAN,
            g, k.stride(0), k.stride(1), k.stride(2),
            GROUP=r, BLOCK=block, STEP=step, HEADS=heads, STEP_PAD=wide, KEYS=keys, D=d, D_PAD=_pad(d),
            CAP=bool(softcap), FP32=size == 4, STAGES=c.stages, num_warps=4, num_stages=c.stages,
        )  # fmt: skip
    return words
