"""What each channel of the keys contributes to the scores of some queries (ThinK, arXiv 2407.21018)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from .keys import pieces


def importance(q: Tensor, kv: KV, entries: Tensor, counts: Tensor) -> Tensor:
    """fp32 `[B, G, D]`: the squared Frobenius norm of channel c's part of the scores, up to a factor for each kv head.

    ||q_c k_c^T||_F^2 = ||q_c||^2 ||k_c||^2, so no product of queries and keys is needed.

    Args:
        q: `[B, H, w, D]`, averaged over the query heads of a group; without rows (w = 0) the keys alone count.
        entries: `[B, G, n]`, numbers of the entries that count, `counts` `[B, G]` of them; hidden ones (bias -inf) do not.
    """
    b, g, _, d, _ = kv.shape
    n = entries.shape[2]
    total = torch.zeros(b, g, d, device=q.device)
    exists = kv.exists()
    for lo, hi in pieces(n, b * g * d):
        part = entries[:, :, lo:hi].long()
        k, _ = kv.gather(part)
        real = exists.gather(2, part) & (torch.arange(lo, hi, device=q.device) < counts[..., None])
        total += k.float().masked_fill(~real[..., None], 0).square().sum(2)
    total = total / counts[..., None].clamp(min=1)
    if q.shape[2] == 0:
        return total
    used = q.float().square().mean(2).view(b, g, -1, d).mean(2)
    return total * used
