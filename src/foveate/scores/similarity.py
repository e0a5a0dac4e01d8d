"""How alike the vectors of a block are: whether one mean may stand for all of them.

Zhang et al. 2025, "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference"
(arXiv 2502.18137).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..kv import KV
from ..lists import compact
from ..select import top_k, top_p
from . import fused
from .keys import pieces, read_keys
from .pooled import block_logits, block_pool


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
    if n and (kernels := fused.rows(x)) is not None:
        return kernels.self_similarity(x, block, offset, centre)  # type: ignore[no-any-return]
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
    if kv.kind == "dense":  # nothing is gathered
        return self_similarity(kv.k[:, :, :m], block, centre=True)
    parts = [self_similarity(read_keys(kv, lo, hi)[:, :, :m], block, centre=True) for lo, hi in pieces(g, 2 * b * m * d)]
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Trust:
    """Rules of `trusted_lists`.

    Attributes:
        share: of the mass that a row keeps, a number or `[H, 1, 1]`. topk: in its place a fraction of the visible blocks.
        rows: bool `[B, H, nq]`, query blocks that choose; the others take all they see.
        keys: bool `[B, H, nk]`, key blocks that compete; the others are always in.
        block_q, block_k: positions of a query block and of a key block.
    """

    share: float | Tensor
    topk: float | None
    rows: Tensor
    keys: Tensor
    block_q: int
    block_k: int


def list_cost(qbar: Tensor, nk: int) -> int:
    """Numbers that `trusted_lists` holds per query block of qbar `[B, H, nq, D]`, in units of `keys.pieces`."""
    b, h = qbar.shape[:2]
    return 8 * b * h * nk if _kernels(qbar, nk) is None else b * h * nk // 8  # kernels: one a pair, and half a GiB


def trusted_lists(
    qbar: Tensor, kbar: Tensor, trust: Trust, lo: int, hi: int, *,
    first: int, scale: float, softcap: float | None, lists: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Key blocks of the query blocks lo..hi by pooled attention, where a block is alike enough for its mean to count.

    Args:
        qbar: pooled queries `[B, H, nq, D]`, the first one block number `first`. kbar: pooled keys `[B, G, nk, D]`.
        lists: Hl, H or a divisor: neighbouring heads unite.

    Returns:
        First keys of the blocks, int32 `[B, Hl, hi - lo, nk]` ascending, padded with the row's last; counts. The first
        block and those that meet the rows' own positions are always in and count first; one block at least is chosen.
    """
    nk, t = kbar.shape[2], trust
    at = torch.arange(first + lo, first + hi, device=qbar.device)[:, None]
    begin = torch.arange(nk, device=qbar.device) * t.block_k
    seen = begin < (at + 1) * t.block_q
    room = None if t.topk is None else (t.topk * seen.sum(-1)).long().clamp(min=1)  # floor
    some, rows = qbar[:, :, lo:hi], t.rows[:, :, lo:hi]
    if (kernels := _kernels(qbar, nk)) is not None:
        score = kernels.visible_logits(some, kbar, scale, softcap, first + lo, t.block_q, t.block_k)
        share = t.share.flatten() if isinstance(t.share, Tensor) else float(t.share)
        keep = None if room is None else room.to(torch.int32)
        rules = dict(lists=lists, logits=room is None, keep=keep, alike=t.keys, trusted=rows)
        return kernels.row_lists(score, share, first + lo, t.block_q, t.block_k, **rules)  # type: ignore[no-any-return]
    score = block_logits(some, kbar, scale, softcap)
    keys = t.keys[:, :, None]
    forced = (begin == 0) | (seen & (begin + t.block_k > at * t.block_q))
    valid = seen & keys
    if room is not None:
        best = top_k(score, room.expand(score.shape[:-1]), valid=valid, forced=forced)
    else:
        prob = score.masked_fill(~valid, float("-inf")).softmax(-1).nan_to_num(0.0)  # no trusted key: no mass
        p = t.share[..., 0].expand(score.shape[:-1]) if isinstance(t.share, Tensor) else t.share
        best = top_p(prob, p, valid=valid, forced=forced, least=1)
    keep = (best | ~keys | ~rows[..., None] | forced) & seen
    index, count = compact(keep.unflatten(1, (lists, -1)).any(2))
    return index * t.block_k, count


def _kernels(qbar: Tensor, nk: int) -> ModuleType | None:
    kernels = fused.rows(qbar)
    return kernels if kernels is not None and nk <= kernels.BLOCKS else None
