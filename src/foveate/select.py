"""How much to keep: top-k, top-p and thresholds over scores, with forced entries and deterministic ties.

Every function works on the last axis, row by row, and returns a bool mask of the scores' shape; `lists.compact` turns
it into indices and counts. `valid` says which entries exist, `forced` which of these are kept whatever their score
(sinks, the local window, the diagonal); both broadcast. Equal scores go to the lower index, NaN ranks last.
Nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(score: Tensor, k: int | Tensor, *, valid: Tensor | None = None, forced: Tensor | None = None) -> Tensor:
    """The k highest valid scores of each row.

    Args:
        score: `[..., n]`, any real dtype.
        k: entries to keep, one number or a tensor `[...]` (one per row).
        forced: kept first and counted in k; if more are forced than k, all of them stay.

    Returns:
        bool `[..., n]`. A row with fewer valid entries than k keeps them all.
    """
    key, live, must = _prepare(score, valid, forced)
    n = key.shape[-1]
    if n == 0:
        return live
    limit = torch.as_tensor(k, device=key.device).expand(key.shape[:-1]).long()
    left = (limit - must.sum(-1)).clamp(0, n)[..., None]
    free = live & ~must
    key = torch.where(free, key, float("-inf"))
    if isinstance(k, Tensor):
        order = key.sort(dim=-1, descending=True).values
    else:
        order = key.topk(min(max(int(k), 1), n), -1).values
    edge = order.gather(-1, (left - 1).clamp(0, order.shape[-1] - 1))  # the last score that still gets in
    above = free & (key > edge)
    tied = free & (key == edge)
    room = left - above.sum(-1, keepdim=True)
    return must | ((above | (tied & (tied.cumsum(-1) <= room))) & (left > 0))


def top_indices(
    score: Tensor, k: int, *, valid: Tensor | None = None, forced: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `lists.compact(top_k(score, k, ...))` gives, cut to width k, at the cost of one partial sort: for decode.

    Args:
        score: `[..., n]`, ranked as fp32. k: at least the number of forced entries of every row.

    Returns:
        (int32 `[..., min(k, n)]` ascending, padded with the row's last index; counts int32 `[...]`).
    """
    n = score.shape[-1]
    key = score.float()
    key = torch.where(key == key, key + 0.0, float("-inf"))  # no NaN, no negative zero
    bits = key.view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32  # integers that compare as the floats do
    order = order + torch.arange(n - 1, -1, -1, device=score.device)  # ties: the lower index is the larger key
    if forced is not None:
        order = torch.where(forced, torch.iinfo(torch.int64).max, order)
    if valid is not None:
        order = torch.where(valid, order, torch.iinfo(torch.int64).min)
    top = order.topk(min(k, n), -1, sorted=False)
    if valid is None:
        index = top.indices.sort(-1).values.to(torch.int32)
        return index, torch.full(index.shape[:-1], index.shape[-1], dtype=torch.int32, device=index.device)
    live = top.values > torch.iinfo(torch.int64).min
    count = live.sum(-1, dtype=torch.int32)
    index = torch.where(live, top.indices, n).sort(-1).values
    last = torch.where(live, top.indices, 0).amax(-1, keepdim=True)
    return torch.minimum(index, last).to(torch.int32), count


def top_p(
    prob: Tensor, p: float | Tensor, *, valid: Tensor | None = None, forced: Tensor | None = None, least: int = 0
) -> Tensor:
    """The smallest set, highest first, whose mass reaches p of the row's mass.

    Args:
        prob: `[..., n]`, non-negative; rows need not sum to one. Accumulated in fp64, so that the long tail of a row
            of many small numbers is not lost.
        p: fraction of the mass of the row's valid entries, one number or a tensor `[...]`; 1 or more keeps every
            valid entry (rounding must not decide what "all" means).
        forced: counted first: their mass is part of p.
        least: keep at least this many entries of each row (forced ones included), by score.

    Returns:
        bool `[..., n]`. A row without mass keeps its forced entries and `least`.
    """
    key, live, must = _prepare(prob, valid, forced)
    if key.shape[-1] == 0:
        return live
    mass = torch.where(live & (key > 0), key, 0).double()
    p = torch.as_tensor(p, device=key.device, dtype=torch.float64)[..., None]
    target = p * mass.sum(-1, keepdim=True)
    held = torch.where(must, mass, 0).sum(-1, keepdim=True)
    free = live & ~must
    order = torch.where(free, key, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    share = torch.where(free, mass, 0).gather(-1, order)
    before = held + share.cumsum(-1) - share  # mass already in when this entry's turn comes
    rank = torch.arange(key.shape[-1], device=key.device)
    take = (before < target) | (p >= 1) | (rank < least - must.sum(-1, keepdim=True))
    return must | (free & torch.zeros_like(live).scatter(-1, order, take))


def above(score: Tensor, tau: float | Tensor, *, valid: Tensor | None = None, forced: Tensor | None = None) -> Tensor:
    """Entries whose score is at least tau, one number or a tensor that broadcasts against `score`."""
    key, live, must = _prepare(score, valid, forced)
    return must | (live & (key >= tau))


def above_max(score: Tensor, ratio: float, *, valid: Tensor | None = None, forced: Tensor | None = None) -> Tensor:
    """Entries whose score is at least `ratio` times the highest valid score of their row (scores >= 0)."""
    key, live, must = _prepare(score, valid, forced)
    if key.shape[-1] == 0:
        return live
    peak = torch.where(live, key, float("-inf")).amax(-1, keepdim=True)
    return must | (live & (key >= ratio * peak))


def _prepare(score: Tensor, valid: Tensor | None, forced: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(scores as floats without NaN, valid as bool, forced and valid as bool), all of the scores' shape."""
    key = score if score.is_floating_point() else score.double()
    key = torch.where(key == key, key, float("-inf"))
    live = torch.ones_like(key, dtype=torch.bool) if valid is None else valid.expand(key.shape)
    must = torch.zeros_like(live) if forced is None else forced.expand(key.shape) & live
    return key, live, must
