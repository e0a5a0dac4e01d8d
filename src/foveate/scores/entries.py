"""The best single entries of a row: which tokens of a cache a decode step attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..select import top_indices
from . import fused
from .labels import newest


def best_entries(
    score: Tensor, keep: int, *, length: Tensor | None = None, sink: int = 0, recent: int = 1, late: bool = False
) -> tuple[Tensor, Tensor]:
    """The `keep` entries of highest score of each row, its first `sink` and last `recent` ones among them.

    Args:
        score: `[B, R, M]`, any real dtype, ranked as fp32; NaN ranks last. R lists share the G kv heads evenly, or G the R.
        keep: at least sink + recent.
        length: int `[B, G]`, entries that exist, read on the device; None: all M. A list of several kv heads goes by the
            first of them. Scores from there on have no meaning.
        late: equal scores go to the later entry instead of the earlier one.

    Returns:
        (int32 `[B, R, min(keep, M)]` ascending, padded with the row's last; counts int32 `[B, R]`, min(keep, length)).
    """
    if (kernels := fused.entries(score)) is not None:
        return kernels.best_entries(  # type: ignore[no-any-return]
            score, keep, length=length, sink=sink, recent=recent, late=late
        )
    m = score.shape[-1]
    number, valid = torch.arange(m, device=score.device), None
    forced = (number < sink) | (number >= m - recent)
    if length is not None:
        rows, groups = score.shape[1], length.shape[1]
        n = length[:, torch.arange(rows, device=length.device) * groups // rows, None]
        valid, forced = number < n, (number < sink) | ((number >= n - recent) & (number < n))
    if not late:
        return top_indices(score, keep, valid=valid, forced=forced)
    turned = (None if t is None else t.flip(-1) for t in (valid, forced))
    valid, forced = turned  # type: ignore[assignment]
    index, count = top_indices(score.flip(-1), keep, valid=valid, forced=forced)
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    index = m - 1 - index
    last = torch.where(used, index, 0).amax(-1, keepdim=True)
    return torch.where(used, index, m).sort(-1).values.minimum(last), count


def best_tokens(score: Tensor, kv: KV, keep: int, *, group: bool, recent: bool = False) -> tuple[Tensor, Tensor]:
    """`best_entries` of any view, also one in no order of position or with hidden entries; the newest one is among them.

    Args:
        score: `[B, G, r, M]`, ranked as fp32; `group` ranks by the highest of the r query heads.
        recent: equal scores go to the later entry, else to the earlier one.

    Returns:
        (int32 `[B, G or H, min(keep, M)]`, ascending, padded with anything in range; counts int32 `[B, G or H]`).
    """
    r, m = score.shape[2:]
    score = score.amax(2) if group else score.flatten(1, 2)
    number, valid = torch.arange(m, device=score.device), None
    forced = number == m - 1
    if not (kv.len is None and kv.pos is None and kv.bias is None):
        valid, forced = kv.exists(), number == newest(kv)[..., None]
        if not group and r > 1:
            valid, forced = (t.repeat_interleave(r, 1) for t in (valid, forced))
    if not recent:
        return top_indices(score, keep, valid=valid, forced=forced)
    index, count = top_indices(score.flip(-1), keep, valid=None if valid is None else valid.flip(-1), forced=forced.flip(-1))
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    return torch.where(used, m - 1 - index, m - 1).sort(-1).values, count
