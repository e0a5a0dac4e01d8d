"""Blocks pooled to one vector, and scores between pooled blocks: the cheapest look at where attention goes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import lists
from ..errors import ConfigError
from ..kv import KV
from ..select import top_k
from . import fused
from .keys import pieces, read_keys

_EMPTY = {"mean": 0.0, "sum": 0.0, "max": float("-inf"), "min": float("inf")}


def block_pool(x: Tensor, block: int, kind: str = "mean", *, offset: int = 0, valid: Tensor | None = None) -> Tensor:
    """Pool rows into blocks of a grid that is anchored at position 0.

    Args:
        x: `[..., n, D]`.
        block: rows in a block. kind: "mean", "max", "min" or "sum".
        offset: rows of the first block that lie before x (a chunk's `q_offset`); 0 <= offset < block.
        valid: bool, broadcasts to `[..., n]`; rows that count. Others may hold anything, NaN included.

    Returns:
        `[..., ceil((n + offset) / block), D]`, fp32 (fp64 for fp64). A partial block is pooled over the rows it has;
        a block without rows is 0 (mean, sum), -inf (max) or inf (min).
    """
    if kind not in _EMPTY:
        raise ConfigError(f"kind: expected one of {', '.join(_EMPTY)}, got {kind!r}")
    if not 0 <= offset < block:
        raise ConfigError(f"offset: expected 0 <= offset < block = {block}, got {offset}")
    if kind == "mean" and valid is None and x.dim() == 4 and x.numel() and (kernels := fused.estimates(x)) is not None:
        return kernels.block_means(x, block, offset)
    if valid is not None:
        x = torch.where(valid[..., None], x, _EMPTY[kind])
    if kind == "mean" and valid is not None:
        count = block_pool(valid[..., None].expand(*x.shape[:-1], 1).float(), block, "sum", offset=offset)
        return block_pool(x, block, "sum", offset=offset) / count.clamp(min=1)
    n = x.shape[-2]
    head = min(n, -offset % block)  # rows of a block that began before x
    tail = n - (n - head) % block
    # Full blocks are reduced in place of a padded copy of x: keys are large and only read here.
    parts = [
        x[..., :head, :].unsqueeze(-3),
        x[..., head:tail, :].unflatten(-2, (-1, block)) if tail > head else x[..., None, :0, :],
        x[..., tail:, :].unsqueeze(-3),
    ]
    return torch.cat([_reduce(p, kind) for p in parts if p.shape[-2]], -2)


def _reduce(x: Tensor, kind: str) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if kind == "sum":
        return x.sum(-2, dtype=acc)
    if kind == "mean":
        return x.mean(-2, dtype=acc)
    return (x.amax(-2) if kind == "max" else x.amin(-2)).to(acc)


def pool_keys(kv: KV, block: int, kind: str = "mean") -> Tensor:
    """Pooled keys of a view, `[B, G, ceil(M / block), D]` fp32; entries beyond `kv.len` don't count."""
    b, g, m, d, _ = kv.shape
    valid = None if kv.len is None else torch.arange(m, device=kv.device) < kv.lengths()[..., None]
    # Only storage that must be gathered, or masked, is copied, and then a few heads at a time.
    cost = 1 if kv.kind == "dense" and valid is None else b * m * d
    out = [
        block_pool(read_keys(kv, lo, hi), block, kind, valid=None if valid is None else valid[:, lo:hi])
        for lo, hi in pieces(g, cost)
    ]
    return torch.cat(out, 1)


def block_logits(q: Tensor, k: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Scores of pooled queries `[B, H, nq, D]` against pooled keys `[B, G, nk, D]`: fp32 `[B, H, nq, nk]`."""
    b, h, nq, d = q.shape
    g = k.shape[1]
    acc = torch.promote_types(k.dtype, torch.float32)
    rows = (q.to(acc) * scale).reshape(b, g, h // g * nq, d)  # the heads of a group as rows: k is not repeated
    s = (rows @ k.to(acc).transpose(-1, -2)).view(b, h, nq, -1)
    return softcap * torch.tanh(s / softcap) if softcap else s


def causal_blocks(nq: int, nk: int, first: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """bool `[nq, nk]`: key block number <= query block number, where query block 0 of this call is number `first`."""
    rows = torch.arange(first, first + nq, device=device)
    return torch.arange(nk, device=device) <= rows[:, None]


def block_softmax(logits: Tensor, first: int = 0) -> Tensor:
    """Probabilities over the causal key blocks of each row of `[..., nq, nk]`; exactly 0 on the others."""
    seen = causal_blocks(logits.shape[-2], logits.shape[-1], first, logits.device)
    return logits.masked_fill(~seen, float("-inf")).softmax(-1)


def top_blocks(
    qbar: Tensor, kbar: Tensor, keep: tuple[int, ...], *, first: int, block: int, group: bool = False
) -> tuple[Tensor, Tensor]:
    """Per block of queries the key blocks of highest score q . k, the first and the diagonal one among them.

    Args:
        qbar: pooled queries `[B, H, nq, D]`, the first one block number `first`. kbar: pooled keys `[B, G, nk, D]`.
        keep: blocks of a row, for each of the Hl lists. block: rows of a block.
        group: the heads of a kv head share a list (Hl = G) and rank by their highest score; else Hl = H.

    Returns:
        First entries of these blocks, int32 `[B, Hl, nq, widest]`, ascending, padded with the row's last; counts int32
        `[B, Hl, nq]`. Equal scores go to the lower block. Rows go in pieces of bounded memory; on a GPU two kernels do this
        and nothing waits for the device.
    """
    (b, h, nq, _), nk = qbar.shape, kbar.shape[2]
    kernels = fused.estimates(qbar)
    if kernels is not None and nk > kernels.BLOCKS:
        kernels = None
    cost = 8 * b * h * nk if kernels is None else b * h * nk // 16  # kernels hold one number a pair, and a GiB of them
    tiles, counts = [], []
    for lo, hi in pieces(nq, cost):
        some, at = qbar[:, :, lo:hi], first + lo
        if kernels is not None:
            score = kernels.block_scores(some, kbar, 1.0, None, at, softmax=False, group=group)
            index, count = kernels.top_blocks(score, at, block, keep=keep)
        else:
            index, count = _top_blocks(some, kbar, keep, at, group)
            index = index * block
        tiles.append(index)
        counts.append(count)
    if len(tiles) == 1:  # joining one part would copy it
        return tiles[0], counts[0]
    return torch.cat(tiles, 2), torch.cat(counts, 2)


def _top_blocks(qbar: Tensor, kbar: Tensor, keep: tuple[int, ...], first: int, group: bool) -> tuple[Tensor, Tensor]:
    nq, (g, nk), device = qbar.shape[2], kbar.shape[1:3], qbar.device
    wide = min(max(keep), nk)
    score = block_logits(qbar, kbar)
    if group:
        score = score.unflatten(1, (g, -1)).amax(2)
    number, row = torch.arange(nk, device=device), torch.arange(first, first + nq, device=device)[:, None]
    k = torch.tensor(keep, device=device).view(-1, 1).expand(*score.shape[:-1]) if min(keep) < wide else wide
    index, count = lists.compact(top_k(score, k, valid=number <= row, forced=(number == row) | (number == 0)))
    return index[..., : max(wide, 2)], count
