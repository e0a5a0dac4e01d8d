"""Which drafted tokens stand: exact matching, or rejection sampling that leaves the target's distribution untouched.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192).
"""

from __future__ import annotations

import torch
from torch import Tensor


def match(drafted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy: drafted tokens stand as long as they are the target's.

    Args:
        drafted: int64 `[B, k]`. target: int64 `[B, k + 1]`, the target's choice at each drafted position and after.

    Returns:
        (accepted int64 `[B]`, 0 to k; tokens int64 `[B, k + 1]`, of which the first accepted + 1 count).
    """
    same = (drafted == target[:, :-1]).long()
    return same.cumprod(1).sum(1), target


def reject(drafted: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Sampling: token x stands with probability min(1, p(x) / q(x)); the first that falls is drawn anew from the
    normalised max(p - q, 0), and after a draft that stands whole one more token is drawn from p.

    Args:
        drafted: int64 `[B, k]`, each drawn from its row of q. q: fp32 `[B, k, V]`, the probabilities they were really
            drawn from. p: fp32 `[B, k + 1, V]`, the target's.

    Returns:
        As `match`. The first accepted + 1 tokens, continued by samples of the target, are samples of the target.
    """
    b, k = drafted.shape
    of = drafted[..., None]
    ratio = p[:, :k].gather(-1, of)[..., 0] / q.gather(-1, of)[..., 0]
    stands = torch.rand(b, k, device=p.device) < ratio
    accepted = stands.long().cumprod(1).sum(1)
    left = (p[:, :k] - q).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p[:, :k])  # p equals q up to rounding
    at = torch.cat([left, p[:, k:]], 1)[torch.arange(b, device=p.device), accepted]  # [B, V]
    anew = torch.multinomial(at, 1)
    tokens = torch.cat([drafted, anew], 1)
    return accepted, tokens.scatter(1, accepted[:, None], anew)
