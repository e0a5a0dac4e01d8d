"""True scores of every key, in pieces of bounded memory: the best any selection of a given size can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kv import KV
from ..lists import repeat_heads
from ..select import top_indices
from . import fused
from .entries import best_entries
from .keys import BUDGET, GPU_BUDGET, pieces, read_keys
from .pooled import block_pool


def top_keys(
    q: Tensor,
    kv: KV,
    q_pos: Tensor,
    k: int,
    *,
    block: int = 1,
    offset: int = 0,
    group: bool = False,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per block of query rows the k entries with the highest exact score, the rows' own tokens always among them.

    A list of one row of one head ranks by the logit. A list that several rows or heads share ranks by their
    probabilities, summed, so that it holds the most attention mass of all lists of its size.

    Args:
        q: `[B, H, N, D]`. kv: a view of M entries; `kv.bias` is part of the logit. q_pos: int64 `[B, N]`.
        k: entries of a list, at least `block`.
        block: rows that share a list. offset: rows of the first block that lie before q.
        group: the query heads of a kv head share a list (Hl = G), else Hl = H.

    Returns:
        int32 `[B, Hl, blocks, min(k, M)]`, ascending, padded with anything in range; counts int32 `[B, Hl, blocks]`.
        Costs N * M * D multiply-adds a head; nothing waits for the device. A decode step has kernels for
        it on a GPU, which read the keys once.
    """
    (b, h, n, _), (g, m) = q.shape, kv.shape[1:3]
    r, blocks = h // g, -(-(n + offset) // block)
    if n == 1 and (kernels := fused.votes(q)) is not None and kernels.reads(q, kv):
        how: dict[str, Any] = dict(scale=scale, softcap=softcap)
        if group and r > 1:
            score = kernels.votes(q, kv.k, kv.len, q_pos, lists=g, **how)
        else:
            score = kernels.logits(q, kv.k, kv.len, q_pos, **how)
        index, count = best_entries(score, k, length=q_pos + 1 if kv.len is None else kv.len)
        return index[:, :, None], count[:, :, None]
    budget = BUDGET if q.device.type == "cpu" else GPU_BUDGET
    exists, pos = kv.exists(), kv.positions()
    # Where entries stand in the order of their positions, what a piece of rows cannot see yet need not be scored.
    ordered = kv.pos is None and kv.len is None
    tiles, counts = [], []
    for g0, g1 in pieces(g, 6 * b * r * block * m, budget):
        keys = read_keys(kv, g0, g1)
        some, many = [], []
        for lo, hi in pieces(blocks, 6 * b * (g1 - g0) * r * block * m, budget):
            first, last = max(0, lo * block - offset), min(n, hi * block - offset)
            stop = m - n + last if ordered else m
            rows = q[:, g0 * r : g1 * r, first:last]
            at = q_pos[:, None, first:last, None]  # [B, 1, rows, 1]
            seen = exists[:, g0:g1, None, :stop] & (pos[:, g0:g1, None, :stop] <= at)
            own = seen & (pos[:, g0:g1, None, :stop] == at)
            bias = None if kv.bias is None else kv.bias[:, g0:g1, :stop]
            score = _logits(rows, keys[:, :, :stop], bias, scale, softcap)
            if block > 1 or (group and r > 1):
                score = score.masked_fill(~repeat_heads(seen, score.shape[1]), float("-inf")).softmax(-1)
            if group:
                score = score.unflatten(1, (g1 - g0, r)).sum(2)
            if block > 1:
                head = offset if lo == 0 else 0  # rows of this piece's first block that lie before q
                score = block_pool(score, block, "sum", offset=head)
                seen, own = (block_pool(t.to(score.dtype), block, "max", offset=head) > 0 for t in (seen, own))
            seen, own = (repeat_heads(t, score.shape[1]) for t in (seen, own))
            index, count = top_indices(score, k, valid=seen, forced=own)
            some.append(pad(index, (0, min(k, m) - index.shape[-1])))
            many.append(count)
        tiles.append(torch.cat(some, 2))
        counts.append(torch.cat(many, 2))
    return torch.cat(tiles, 1), torch.cat(counts, 1)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """fp32 (fp64 for fp64) `[B, H, n, M]` of q `[B, H, n, D]` and k `[B, G, M, D]`."""
    b, h, n, d = q.shape
    g, acc = k.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    s = (q.to(acc) * scale).reshape(b, g, h // g * n, d) @ k.to(acc).transpose(-1, -2)
    s = s.view(b, h, n, -1)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s if bias is None else s + repeat_heads(bias.to(acc), h)[:, :, None]
