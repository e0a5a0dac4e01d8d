"""Attention of chosen rows to the keys before them, reduced over the rows: what a draft's guess looks at in a prompt.

Galim et al. 2025, "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..lists import repeat_heads
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
) -> Tensor:
    """Probability each entry receives from a row of q, reduced over the rows: fp32 `[B, H, M]`.

    Args:
        q: `[B, H, w, D]`. kv: a view of M entries; `kv.bias` is part of the logit. q_pos: int `[B, w]`, text positions.
        reduce: "max" or "sum" over the rows (a mean is the sum divided by w).
        weight: float `[w]`, what each row's probabilities are multiplied with first.

    The softmax of a row runs over all entries it sees (position <= its own). Keys are read piece by piece, twice where
    the scores of all keys do not fit at once; nothing waits for the device.
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
    lse = torch.stack([s.logsumexp(-1) for s in held or (logits(*r) for r in ranges)]).logsumexp(0)
    top = torch.where(torch.isfinite(lse), lse, 0.0)[..., None]  # rows that see nothing give nothing
    out = []
    for s in held or (logits(*r) for r in ranges):
        p = (s - top).exp()
        p = p if weight is None else p * weight.to(p)[:, None]
        out.append(p.amax(2) if reduce == "max" else p.sum(2))
    return torch.cat(out, -1)
