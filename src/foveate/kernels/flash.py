"""PyTorch's own CPU flash attention, which returns the lse and takes a mask. One place that knows its habits."""

from __future__ import annotations

import torch
from torch import Tensor

_OP = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def serves(q: Tensor, v: Tensor) -> bool:
    """It is there, on this device, and the head dims of q and v are equal."""
    return _OP is not None and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def flash(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """out `[I, P, R, D]` and lse `[I, P, R]` (fp32, or fp64 for fp64; natural log) of q `[I, P, R, D]`, k, v `[I, P, W, D]`.

    seen: bool `[I|1, 1, R|1, W]` or None for all; bias: `[I, W]` or None. k and v may be expanded along P. Rows that
    see nothing give 0 and -inf: the kernel itself gives 0 for both. causal: square, counted from the first key.
    """
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask: Tensor | None = None
    if seen is not None and (bias is not None or not bool(seen.all())):
        if bias is None:
            mask = torch.zeros(seen.shape, dtype=acc).masked_fill_(~seen, float("-inf"))
        else:
            mask = torch.where(seen, bias.to(acc)[:, None, None], float("-inf"))
    out, lse = _OP(q, k, v, attn_mask=mask, scale=scale, is_causal=causal)  # type: ignore[misc]
    if mask is not None and seen is not None:
        blind = ~seen.any(-1)
        if bool(blind.any()):
            lse, out = lse.masked_fill(blind, float("-inf")), out.masked_fill(blind[..., None], 0)
    return out, lse
