"""What one query per row looks at: exact logits and probabilities of all entries, and the order of the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..lists import repeat_heads
from ..select import top_indices
from . import fused
from .entries import best_entries
from .keys import pieces, read_keys
from .window import group_reduce, window_mass


def row_logits(q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Logits `[B, H, M]` of one query per row, fp32 (fp64 for fp64); -inf for entries the query does not see.

    Args:
        q: `[B, H, 1, D]`. q_pos: int64 `[B, 1]`. kv: any view of M entries; `kv.bias` is part of the logit, and what
            lies beyond `kv.len` never matters, NaN included.

    Keys are read kv head by kv head and piece by piece, so that a copy of them in fp32 stays small. Nothing waits for
    the device.
    """
    (b, h, _, d), (g, m) = q.shape, kv.shape[1:3]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q[:, :, 0].to(acc) * scale).view(b, g, h // g, d)
    out = torch.empty(b, h, m, dtype=acc, device=q.device)
    by_group = out.view(b, g, h // g, m)
    for g0, g1 in pieces(g, b * m * d):
        keys = read_keys(kv, g0, g1)
        for lo, hi in pieces(m, b * (g1 - g0) * d):
            by_group[:, g0:g1, :, lo:hi] = rows[:, g0:g1] @ keys[:, :, lo:hi].to(acc).transpose(-1, -2)
    if softcap:
        out = softcap * torch.tanh(out / softcap)
    if kv.bias is not None:
        out = out + repeat_heads(kv.bias.to(acc), h)
    seen = kv.exists() & (kv.positions() <= q_pos[:, :, None])
    return out.masked_fill(~repeat_heads(seen, h), float("-inf"))


def row_probabilities(q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """The softmax of `row_logits`: `[B, H, M]`, exactly 0 for entries the query does not see."""
    return row_logits(q, kv, q_pos, scale=scale, softcap=softcap).softmax(-1)


def step_mass(q: Tensor, kv: KV, q_pos: Tensor, how: str, *, scale: float, softcap: float | None = None) -> Tensor:
    """`window_mass` of a decode step's query, which sees every entry that exists, reduced over the query heads of a kv head
    ("mean", "max" or "sum"): fp32 `[B, G, M]`. On a GPU two kernels that read the keys once."""
    h, g = q.shape[1], kv.shape[1]
    if (kernels := fused.votes(q)) is not None and kernels.reads(q, kv, anywhere=True):
        mass: Tensor = kernels.votes(q, kv.k, kv.len, lists=g, most=how == "max", scale=scale, softcap=softcap)
        return mass / (h // g) if how == "mean" and h > g else mass
    return group_reduce(window_mass(q, kv, q_pos, scale=scale, softcap=softcap), g, how)


def group_probabilities(q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """The highest of `row_probabilities` of the query heads of each kv head: `[B, G, M]`. Kernels as for `step_mass`."""
    if (kernels := fused.votes(q)) is not None and kernels.reads(q, kv):
        found: Tensor = kernels.votes(q, kv.k, kv.len, q_pos, lists=kv.shape[1], most=True, scale=scale, softcap=softcap)
        return found
    return group_reduce(row_probabilities(q, kv, q_pos, scale=scale, softcap=softcap), kv.shape[1], "max")


def best(
    score: Tensor, k: int, *, valid: Tensor | None = None, length: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k entries of highest score and which of them is how good: what lets a list shrink from its weak end.

    Args:
        score: `[..., n]`. valid: bool that broadcasts to it, entries that exist. Equal scores: the lower entry is better.
        length: int `[B, G]` in place of `valid`, for scores `[B, G, n]`: the first entries exist.

    Returns:
        (int32 `[..., min(k, n)]` entries ascending, padded with the row's last; int32 of that shape, the rank of each
        entry, 0 for the best, padding behind all others; counts int32 `[...]`).
    """
    if length is not None:
        index, count = best_entries(score, k, length=length, recent=0)
    else:
        index, count = top_indices(score, k, valid=None if valid is None else valid.expand(score.shape))
    there = torch.arange(index.shape[-1], device=score.device) < count[..., None]
    order = score.gather(-1, index.long()).masked_fill(~there, float("-inf")).argsort(stable=True, dim=-1, descending=True)
    place = torch.arange(index.shape[-1], dtype=torch.int32, device=score.device).expand(index.shape)
    return index, torch.empty_like(index).scatter_(-1, order, place), count
