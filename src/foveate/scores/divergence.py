"""How far two distributions are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon distance over the last axis, natural log: symmetric, between 0 and sqrt(ln 2).

    Args:
        p, q: `[..., n]`, non-negative, each row sums to one. Zeros are fine (0 log 0 = 0).

    Returns:
        `[...]`, the square root of the divergence, fp32 (fp64 for fp64).
    """
    dtype = torch.promote_types(torch.promote_types(p.dtype, q.dtype), torch.float32)
    p, q = p.to(dtype), q.to(dtype)
    mix = ((p + q) / 2).clamp(min=torch.finfo(dtype).tiny)  # p / mix never exceeds 2, and 0 / 0 never happens
    total = (torch.xlogy(p, p / mix) + torch.xlogy(q, q / mix)).sum(-1) / 2
    return total.clamp(min=0).sqrt()
