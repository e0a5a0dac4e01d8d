"""The oracle: masked softmax in fp32 (fp64 for fp64 inputs), N x M memory. Small problems and tests only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..layout import Layout
from ..lists import repeat_heads
from .base import Want

NAME = "reference"
LIMIT = 1 << 28  # scores it is willing to hold


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    b, h, n, m = layout.shape
    if b * h * n * m > LIMIT:
        return f"reference holds every score: {b}x{h}x{n}x{m} is more than {LIMIT}"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def scores(q: Tensor, kv: KV, layout: Layout, scale: float, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits with bias, mask, keys, values), all `[B, H, ...]` in the accumulation dtype."""
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    h = q.shape[1]
    flat = kv.to_dense()
    k, v = repeat_heads(flat.k.to(acc), h), repeat_heads(flat.v.to(acc), h)
    s = (q.to(acc) @ k.transpose(-1, -2)) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if kv.bias is not None:
        s = s + repeat_heads(kv.bias.to(acc), h)[..., None, :]
    return s, layout.to_mask(kv), k, v


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    s, mask, _, v = scores(q, kv, layout, scale, softcap)
    s = s.masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(s, -1)
    p = torch.where(mask, torch.exp(s - lse[..., None].clamp(min=torch.finfo(s.dtype).min)), 0.0)
    # A value that no row of this head sees must not matter, be it NaN: 0 * NaN is NaN.
    v = v.masked_fill(~mask.any(-2)[..., None], 0)
    return (p @ v).to(q.dtype), lse, p.sum(-2).float()
