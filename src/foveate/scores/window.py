"""Attention mass of chosen rows: how much the last queries of a prompt, or a draft's guess, look at each key.

Li et al. 2024, "SnapKV: LLM Knows What You Are Looking For Before Generation" (arXiv 2404.14469); Galim et al. 2025,
"Draft-based Approximate Inference for LLMs" (arXiv 2506.08373).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..kv import KV
from ..lists import repeat_heads
from . import fused
from .keys import pieces, read_keys


def row_mass(
    q: Tensor,
    kv: KV,
    q_pos: Tensor,
    *,
    reduce: str,
    weight: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Probability each entry receives from a row of q, reduced over the rows: fp32 `[B, H, M]`.

    The softmax of a row runs over all entries it sees (position <= its own). Keys are read piece by piece, twice where the
    scores of all keys do not fit at once; nothing waits for the device. On a GPU two kernels do this for dense storage, in
    tiles.

    Args:
        q: `[B, H, w, D]`. kv: a view of M entries; `kv.bias` is part of the logit. q_pos: int `[B, w]`, text positions.
        reduce: "max" or "sum" over the rows (a mean is the sum divided by w).
        weight: float `[w]`, what each row's probabilities are multiplied with first.
        lse: `[B, H, w]` over all visible entries where attention has returned it; computed here otherwise.
    """
    b, h, w, _ = q.shape
    if (kernels := fused.windows(q)) is not None and kernels.masses(q, kv):
        mass: Tensor = kernels.row_mass(q, kv, q_pos, reduce=reduce, weight=weight, scale=scale, softcap=softcap, lse=lse)
        return mass
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
    out = []
    for s in held or (logits(*r) for r in ranges):
        p = (s - top).exp()
        p = p if weight is None else p * weight.to(p)[:, None]
        out.append(p.amax(2) if reduce == "max" else p.sum(2))
    return torch.cat(out, -1)


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
    """`row_mass` summed over the rows of an observation window: fp32 `[B, H, M]`.

    exclude: bool `[B, G, M]`, entries whose mass is reported as 0; rows see them none the less.
    """
    out = row_mass(q, kv, q_pos, reduce="sum", scale=scale, softcap=softcap, lse=lse)
    if exclude is not None:
        out.unflatten(1, (exclude.shape[1], -1)).masked_fill_(exclude[:, :, None], 0.0)  # in place: M numbers a head
    return out


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
