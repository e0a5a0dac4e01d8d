"""How alike the vectors of a block are: whether one mean may stand for all of them.

Zhang et al. 2025, "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference"
(arXiv 2502.18137).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..kv import KV
from .keys import pieces, read_keys
from .pooled import block_pool


def self_similarity(x: Tensor, block: int, *, offset: int = 0, centre: bool = False) -> Tensor:
    """The mean of the cosines of all pairs of a block, a vector with itself included: between 0 and 1.

    It is the squared length of the mean of the normalised vectors, so no pair is formed. A vector of zeros is like
    nothing, itself included.

    Args:
        x: `[B, heads, n, D]`. block, offset: the grid of `pooled.block_pool`.
        centre: the mean of all n rows is taken off first. No softmax over such keys sees the difference, and what all of
            them share no longer makes them alike.

    Returns:
        `[B, heads, ceil((n + offset) / block)]`, fp32 (fp64 for fp64). Heads go in pieces of bounded memory; nothing waits
        for the device.
    """
    b, h, n, d = x.shape
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = []
    for lo, hi in pieces(h, 2 * b * n * d):
        some = x[:, lo:hi].to(acc)
        if centre:
            some = some - some.mean(2, keepdim=True)
        out.append(block_pool(normalize(some, dim=-1), block, offset=offset).square().sum(-1))
    return torch.cat(out, 1)


def key_similarity(kv: KV, m: int, block: int) -> Tensor:
    """`self_similarity`, centred, of the first m keys of a view in text order: `[B, G, ceil(m / block)]`."""
    b, g, _, d, _ = kv.shape
    parts = [self_similarity(read_keys(kv, lo, hi)[:, :, :m], block, centre=True) for lo, hi in pieces(g, 2 * b * m * d)]
    return torch.cat(parts, 1)
