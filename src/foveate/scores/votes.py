"""Votes of a prompt's last queries: what SnapKV, PyramidKV and AdaKV rank entries by.

Li et al. 2024, "SnapKV: LLM Knows What You Are Looking For Before Generation" (arXiv 2404.14469).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from .window import group_reduce, pool, window_mass


def window_votes(
    q: Tensor,
    kv: KV,
    q_pos: Tensor,
    window: int,
    *,
    kernel: int,
    pooling: str,
    reduce: str,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(score fp32 `[B, G, M]`, bool `[B, G, M]`: the last `window` entries of each head, which are not ranked).

    The mass the rows of q `[B, H, w, D]` (text positions q_pos int `[B, w]`) give each entry before the window, reduced
    over the query heads of a group ("mean", "max" or "sum") and pooled along the keys with an odd `kernel` ("avg" or
    "max"). Entries of the window take part in the softmax and score 0.
    """
    recent = kv.exists() & (torch.arange(kv.capacity, device=kv.device) >= kv.lengths()[..., None] - window)
    mass = window_mass(q, kv, q_pos, scale=scale, softcap=softcap, exclude=recent)
    return pool(group_reduce(mass, kv.shape[1], reduce), kernel, pooling), recent
