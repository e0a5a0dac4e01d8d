"""Attention mass of an observation window: how much the last queries of a prompt look at each key.

Li et al. 2024, "SnapKV: LLM Knows What You Are Looking For Before Generation" (arXiv 2404.14469).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..kv import KV
from ..lists import repeat_heads
from .keys import pieces, read_keys


def window_mass(
    q: Tensor,
    kv: KV,
    q_pos: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """Probability each entry receives from the rows of q, summed over them: fp32 `[B, H, M]`.

    The softmax of a row runs over all entries it sees (position <= its own), also over those in `exclude`.

    Args:
        q: `[B, H, w, D]`, the last queries. q_pos: int `[B, w]`, their text positions.
        lse: `[B, H, w]` over all visible entries where attention has returned it; computed here otherwise.
        exclude: bool `[B, G, M]`, entries whose mass is reported as 0.
    """
    b, h, w, _ = q.shape
    exists, pos, keys = kv.exists(), kv.positions(), read_keys(kv, 0, kv.shape[1])
    grouped = q.float().unflatten(1, (kv.shape[1], -1))
    ranges = list(pieces(kv.capacity, b * h * w))

    def logits(lo: int, hi: int) -> Tensor:
        s = (grouped @ keys[:, :, None, lo:hi].float().transpose(-1, -2)).flatten(1, 2) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if kv.bias is not None:
            s = s + repeat_heads(kv.bias[:, :, lo:hi].float(), h)[:, :, None]
        seen = exists[:, :, None, lo:hi] & (pos[:, :, None, lo:hi] <= q_pos[:, None, :, None])
        return s.masked_fill(~repeat_heads(seen, h), float("-inf"))

    held = [logits(*ranges[0])] if len(ranges) == 1 else None  # one piece is computed once
    if lse is None:
        lse = torch.stack([s.logsumexp(-1) for s in held or (logits(*r) for r in ranges)]).logsumexp(0)
    top = torch.where(torch.isfinite(lse), lse.float(), 0.0)[..., None]  # rows that see nothing give nothing
    out = torch.cat([(s - top).exp().sum(2) for s in held or (logits(*r) for r in ranges)], -1)
    return out if exclude is None else out.masked_fill(repeat_heads(exclude, h), 0.0)


def group_reduce(score: Tensor, groups: int, how: str) -> Tensor:
    """`[B, H, M]` -> `[B, G, M]`: mean, max or sum over the query heads that share a kv head."""
    x = score.unflatten(1, (groups, -1))
    if how == "mean":
        return x.mean(2)
    return x.amax(2) if how == "max" else x.sum(2)


def pool(score: Tensor, kernel: int, how: str) -> Tensor:
    """Pool along the last axis with stride 1 and an odd kernel; "avg" counts zeros beyond both ends, "max" nothing."""
    if how == "max":
        return max_pool1d(score, kernel, stride=1, padding=kernel // 2)
    return avg_pool1d(score, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
