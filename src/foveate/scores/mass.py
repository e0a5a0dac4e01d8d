"""Attention mass of each key over all rows of a prompt, and each row's log-sum-exp, in pieces of bounded memory.

The column sums of Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference" (arXiv 2306.14048).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kv import KV
from ..lists import repeat_heads
from .keys import BUDGET, GPU_BUDGET, pieces, read_keys


def column_mass(
    q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None, lse: Tensor | None = None
) -> Tensor:
    """Probability each entry receives from the rows of q, summed over them: fp32 `[B, H, M]`.

    Args:
        q: `[B, H, N, D]`. kv: a view of M entries; `kv.bias` is part of the logit. q_pos: int `[B, N]`, text positions.
        lse: `[B, H, N]` over all visible entries where dense attention has returned it. Without it each row's own
            softmax costs one more reduction over scores that are there anyway, and whatever the prompt's plan left out
            has its mass too.

    Costs the products of queries and keys once more, N * M * D multiply-adds a head (half of that where entries stand in
    the order of their positions); nothing waits for the device.
    """
    b, h, _, _ = q.shape
    out = torch.zeros(b, h, kv.capacity, dtype=torch.float32, device=q.device)
    for heads, rows, s in _scores(q, kv, q_pos, scale, softcap):
        row = s.logsumexp(-1) if lse is None else lse[:, heads, rows].to(s.dtype)
        row = torch.where(torch.isfinite(row), row, 0.0)  # rows that see nothing give nothing
        out[:, heads, : s.shape[-1]] += s.sub_(row[..., None]).exp_().sum(2).float()
    return out


def row_lse(q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Log-sum-exp of each row over the entries it sees: fp32 `[B, H, N]`, -inf where it sees none. Costs as above."""
    out = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for heads, rows, s in _scores(q, kv, q_pos, scale, softcap):
        out[:, heads, rows] = s.logsumexp(-1).float()
    return out


def _scores(q: Tensor, kv: KV, q_pos: Tensor, scale: float, softcap: float | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """(query heads, rows, logits `[B, heads, rows, stop]` with -inf for what a row does not see), piece by piece."""
    (b, h, n, d), (g, m) = q.shape, kv.shape[1:3]
    r = h // g
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    budget = BUDGET if q.device.type == "cpu" else GPU_BUDGET
    exists, pos = kv.exists(), kv.positions()
    # Where entries stand in the order of their positions, what a piece of rows cannot see yet need not be scored.
    ordered = kv.pos is None and kv.len is None
    for g0, g1 in pieces(g, 2 * b * r * m * 64, budget):  # rows at a time before heads at a time
        keys = read_keys(kv, g0, g1).to(acc).transpose(-1, -2)
        for lo, hi in pieces(n, 2 * b * (g1 - g0) * r * m, budget):
            stop = m - n + hi if ordered else m
            x = (q[:, g0 * r : g1 * r, lo:hi].to(acc) * scale).reshape(b, g1 - g0, r * (hi - lo), d)
            s = (x @ keys[..., :stop]).view(b, (g1 - g0) * r, hi - lo, stop)
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            if kv.bias is not None:
                s = s + repeat_heads(kv.bias[:, g0:g1, :stop].to(acc), s.shape[1])[:, :, None]
            seen = exists[:, g0:g1, None, :stop] & (pos[:, g0:g1, None, :stop] <= q_pos[:, None, lo:hi, None])
            s = s.masked_fill(~repeat_heads(seen, s.shape[1]), float("-inf"))
            yield slice(g0 * r, g1 * r), slice(lo, hi), s
