"""Put partial softmaxes together. lse is the natural log; an empty row is out 0 and lse -inf, and stays neutral."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over the disjoint union of the parts' keys.

    Args:
        parts: pairs (out `[..., Dv]`, lse fp32 `[...]`), each out normalised over its own keys.

    Returns:
        (out, lse) in the dtype of the first out and fp32 (fp64 if any lse is). Differentiable in every out and lse.
    """
    if len(parts) == 1:
        return parts[0]
    weights, lse = join_lse([part for _, part in parts])
    out = sum(o.to(w.dtype) * w[..., None] for (o, _), w in zip(parts, weights, strict=True))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), lse


def join_lse(lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(share of each part `[parts, ...]`, lse of them all `[...]`); shares of a row without any key are 0, not NaN."""
    stacked = torch.stack([lse if lse.dtype == torch.float64 else lse.float() for lse in lses])
    top = stacked.amax(0).detach()
    top = torch.where(torch.isfinite(top), top, 0.0)  # rows no part has a key for
    weights = torch.exp(stacked - top)
    total = weights.sum(0)
    alive = total > 0
    safe = torch.where(alive, total, 1.0)
    return weights / safe, torch.where(alive, top + torch.log(safe), float("-inf"))


def sink_logit(out: Tensor, lse: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
    """Add one key with value 0 and this logit (`[H]`, learned attention sinks as in gpt-oss; 0 gives softmax1).

    out `[B, H, N, Dv]`, lse `[B, H, N]`. The returned lse includes the extra key.
    """
    z = logit.to(lse.dtype).view(1, -1, 1).expand_as(lse)
    keep = torch.sigmoid(lse - z)
    return (out * keep[..., None]).to(out.dtype), torch.logaddexp(lse, z)
