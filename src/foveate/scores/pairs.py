"""Lists of blocks from what several scores chose: block columns, block diagonals, and pairs by pooled attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists
from ..select import top_p
from . import fused
from .keys import pieces
from .pooled import block_logits, block_softmax, causal_blocks

WHOLE = 1 << 26  # pairs of blocks that a GPU holds at once (256 MiB of scores): beyond, lists are trimmed to what is kept


def union(
    columns: Tensor,
    diagonals: Tensor,
    qbar: Tensor,
    kbar: Tensor,
    aware: Tensor | None,
    share: float | Tensor,
    *,
    first: int,
    block: int,
    scale: float,
    softcap: float | None,
    group: bool,
) -> tuple[Tensor, Tensor]:
    """Per block of queries, the causal blocks of these columns and diagonals, and of the best pairs of some heads.

    Args:
        columns: bool `[B, H, nk]`, key blocks. diagonals: bool `[B, H, nk]`, distances in blocks.
        qbar, kbar: pooled queries `[B, H, nq, D]`, the first one block number `first`, and keys `[B, G, nk, D]`.
        aware: bool `[B, H]`, heads that also take the pairs that hold `share` of their pooled attention; None: no head.
        share: one number, or one a head `[1 or B, H]`.
        block: rows of a block. group: the heads of a kv head share the union of their lists (Hl = G), else Hl = H.

    Returns:
        First keys of these blocks, int32 `[B, Hl, nq, width]`, ascending, padded with the row's last; counts int32
        `[B, Hl, nq]`. In PyTorch it waits for the device once a piece of memory, on a GPU up to `WHOLE` pairs never.
    """
    (b, h, nq, _), (g, nk), device = qbar.shape, kbar.shape[1:3], qbar.device
    r, pairs = h // g, b * (h // g) * nq * nk
    kernels = fused.estimates(qbar)
    if kernels is not None and nk > kernels.BLOCKS:
        kernels = None
    work = list(pieces(g, 8 * pairs) if kernels is None else pieces(g, pairs, WHOLE))  # sorting holds eight numbers a pair
    causal = causal_blocks(nq, nk, first, device)
    gap = (torch.arange(first, first + nq, device=device)[:, None] - torch.arange(nk, device=device)).clamp(min=0)
    tiles, counts = [], []
    for lo, hi in work:
        heads, hl = slice(lo * r, hi * r), (hi - lo) * (1 if group else r)
        args = qbar[:, heads], kbar[:, lo:hi], scale, softcap
        part = share[:, heads] if isinstance(share, Tensor) else share
        if kernels is not None:
            live = torch.zeros_like(columns[:, heads, 0]) if aware is None else aware[:, heads]
            prob = None
            if aware is not None:
                prob = kernels.block_scores(*args, first, softmax=True, live=live.contiguous().view(torch.int8))
            some = columns[:, heads], diagonals[:, heads], live, prob
            index, count = kernels.pair_lists(*some, part, first, block, nq, lists=hl)
            tiles.append(index if len(work) == 1 else lists.trim(index, count))
        else:
            keep = (columns[:, heads, None, :] | diagonals[:, heads][..., gap]) & causal
            # Sorting every pair of blocks is the dear part: worth one look whether any head asks for it.
            if aware is not None and bool(aware[:, heads].any()):
                prob = block_softmax(block_logits(*args), first)
                best = top_p(prob.flatten(-2), part, valid=causal.flatten()).view(keep.shape)
                keep = keep | (best & aware[:, heads, None, None])
            index, count = lists.compact(keep.unflatten(1, (hl, -1)).any(2))
            tiles.append(lists.trim(index, count) * block)
        counts.append(count)
    if len(work) == 1:  # joining one part would copy it
        return tiles[0], counts[0]
    wide = max(t.shape[-1] for t in tiles)
    return torch.cat([pad(t, (0, wide - t.shape[-1])) for t in tiles], 1), torch.cat(counts, 1)
