"""Strided antidiagonals: one product at 1 / stride of the cost of q . k that still meets every query and every key.

Xu et al. 2025, "XAttention: Block Sparse Attention with Antidiagonal Scoring" (arXiv 2503.16428).

Positions are cut into tiles of `stride` from position 0. Tile a of the queries, last row first, against tile c of the
keys, first key first, is one dot product of stride * D numbers: the sum of the antidiagonal of that square of logits.
A vertical line of the attention map meets it in every square, a slash line too, with one exception: with an even stride,
a line of one even distance passes between the pairs (neighbouring distances are met, and an odd stride meets all). A lone
pair off the antidiagonal is not seen. In the squares on the diagonal some keys come after their query, so scores there
are optimistic.

Cost per query head, for N rows over N keys: N^2 D / stride FLOPs (below the diagonal alone) in the dtype of q, and about
12 bytes for each of the N^2 / (2 stride^2) numbers (16 bits twice, fp32 twice). 32 heads of 128 at 128K tokens and stride
16 make 4.4 TFLOP and 13 GB, where dense attention needs 140 TFLOP. Products in bf16 leave the mean logit rounded to
three digits; a kernel holds them in fp32 and stores 4 bytes for every block / stride of these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists
from ..kv import KV
from ..select import top_p
from . import fused
from .keys import BUDGET, pieces, read_keys
from .pooled import causal_blocks

WIDE = 1 << 26  # numbers a GPU holds at a time; less would leave it waiting for the host


class Piece(NamedTuple):
    """Mass of the key blocks 0.. for the query blocks lo..hi of this call and the kv heads g0..g1.

    Attributes:
        mass: fp32 `[B, g1 - g0, r, hi - lo, nk]`, nk = blocks up to the last of these query blocks; 0 beyond the diagonal.
    """

    g0: int
    g1: int
    lo: int
    hi: int
    mass: Tensor


def block_mass(
    q: Tensor,
    kv: KV,
    stride: int,
    block: int,
    *,
    start: int,
    scale: float,
    softcap: float | None = None,
    budget: int | None = None,
) -> Iterator[Piece]:
    """Estimated attention mass of every causal block of `block` x `block` pairs, in pieces of bounded memory.

    The mean logit of each antidiagonal goes through a softmax over the tiles of a row, and the probabilities of a block's
    tiles are added up: each of its block / stride rows of tiles gives 1. With stride 1 this is the exact mass.

    Args:
        q: `[B, H, N, D]`, rows at the positions from `start` on. kv: entries in text order, start + N of them or more.
        stride: a divisor of `block`. budget: numbers held at a time, by default what suits the device.

    A tile that begins before `start` or ends after the last row lacks some of its products, which count as 0; rows of
    tiles without any query give nothing.
    """
    (b, h, n, d), g = q.shape, kv.shape[1]
    r, m, per = h // g, start + n, block // stride
    first, offset, cells = start // block, start % block, -(-m // stride)
    nq = -(-(n + offset) // block)
    kernels = fused.rows(q)
    if kernels is not None and kernels.masses(q, stride, block, first + nq):
        wide = first + nq
        for g0, g1 in pieces(g, b * r * nq * per * wide, budget or kernels.HELD):
            keys = read_keys(kv, g0, g1)[:, :, :m].to(q.dtype)
            some = q[:, g0 * r : g1 * r]
            for lo, hi in pieces(nq, b * (g1 - g0) * r * per * wide, budget or kernels.HELD):
                args = stride, block, first + lo, first + hi
                mass = kernels.block_mass(some, keys, *args, start=start, scale=scale, softcap=softcap)
                yield Piece(g0, g1, lo, hi, mass.unflatten(1, (g1 - g0, r)))
        return
    budget = budget or (WIDE if q.is_cuda else BUDGET)
    acc = torch.promote_types(q.dtype, torch.float32)
    heads = q.unflatten(1, (g, r))
    for g0, g1 in pieces(g, b * m * d, budget):
        keys = read_keys(kv, g0, g1)[:, :, :m].to(q.dtype)
        keys = pad(keys, (0, 0, 0, -m % stride)) if m % stride else keys
        keys = keys.unflatten(2, (cells, stride)).flatten(3).transpose(-1, -2)  # [B, g, stride * D, cells]
        for lo, hi in pieces(nq, b * (g1 - g0) * r * per * cells, budget):
            begin, end = max(0, lo * block - offset), min(n, hi * block - offset)
            before, after = begin + offset - lo * block, hi * block - offset - end  # rows of the grid without a query
            rows = pad(heads[:, g0:g1, :, begin:end] * (scale / stride), (0, 0, before, after))
            rows = rows.unflatten(3, (-1, stride)).flip(4).flatten(4)  # [B, g, r, tiles, stride * D]
            seen = min(cells, (first + hi) * per)
            x = (rows.flatten(2, 3) @ keys[..., :seen]).unflatten(2, (r, -1))
            if softcap:
                x = softcap * torch.tanh(x / softcap)
            clear = (first + lo) * per  # cells that every row of this piece sees
            tile = torch.arange(clear, (first + hi) * per, device=q.device)
            x[..., clear:].masked_fill_(tile[: seen - clear] > tile[:, None], float("-inf"))
            p = x.softmax(-1, dtype=acc)
            p[..., : before // stride, :] = 0
            p[..., p.shape[3] - after // stride :, :] = 0
            p = p.unflatten(3, (-1, per)).sum(4)
            p = pad(p, (0, -seen % per)) if seen % per else p
            yield Piece(g0, g1, lo, hi, p.unflatten(-1, (-1, per)).sum(-1))


def keep_share(mass: Tensor, share: float | Tensor, first: int) -> Tensor:
    """The blocks of each row that hold `share` of its mass, highest first; the first and the diagonal one count first.

    Args:
        mass: `[..., nq, nk]`, the rows from query block number `first` on. share: a number or a tensor `[..., nq | 1]`.

    Returns:
        bool like `mass`; nothing beyond the diagonal.
    """
    (nq, nk), device = mass.shape[-2:], mass.device
    valid = causal_blocks(nq, nk, first, device)
    column, row = torch.arange(nk, device=device), torch.arange(first, first + nq, device=device)[:, None]
    return top_p(mass, share, valid=valid, forced=(column == 0) | (column == row))


def share_lists(
    mass: Tensor, share: float | Tensor, first: int, block: int, *, group: bool = False
) -> tuple[Tensor, Tensor]:
    """`keep_share` as lists: first keys of these blocks, int32 `[B, Hl, nq, nk]` ascending, and counts `[B, Hl, nq]`.

    Args:
        mass: `[B, g, r, nq, nk]`. share: a number, or a tensor `[g, r, 1]`.
        group: the r heads of a kv head get the union of their blocks (Hl = g), else Hl = g r.

    Rows are padded beyond their count with anything in range.
    """
    g, r = mass.shape[1:3]
    kernels = fused.rows(mass[..., :1])  # rows of blocks are no head dim
    if kernels is not None and mass.shape[-1] <= kernels.BLOCKS:
        score, each = mass.flatten(1, 2).contiguous(), share.flatten() if isinstance(share, Tensor) else share
        return kernels.row_lists(score, each, first, block, block, lists=g if group else g * r)  # type: ignore[no-any-return]
    keep = keep_share(mass, share, first)
    index, count = lists.compact((keep.any(2, keepdim=True) if group else keep).flatten(1, 2))
    return index * block, count
