"""Read keys out of any KV storage, and cut work into pieces of bounded memory. Shared by the estimators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kv import KV

BUDGET = 1 << 24  # numbers an estimator holds at a time (64 MiB in fp32)
GPU_BUDGET = 1 << 28  # the same on a GPU (1 GiB): few rows of a long prompt at a time leave it idle


def read_keys(kv: KV, g0: int, g1: int) -> Tensor:
    """Keys of the kv heads g0..g1 as `[B, g1 - g0, M, D]`: a slice of dense storage, a gather from the others.

    Slots beyond `kv.len` hold anything.
    """
    if kv.kind == "dense":
        return kv.k[:, g0:g1]
    b, g, m, d, _ = kv.shape
    entries = torch.minimum(torch.arange(m, device=kv.device), (kv.lengths() - 1).clamp(min=0)[..., None])
    return kv.k.reshape(-1, d)[kv.rows(entries.expand(b, g, m))[:, g0:g1]]


def pieces(total: int, cost: int, budget: int = BUDGET) -> Iterator[tuple[int, int]]:
    """Ranges lo..hi over `total` items of `cost` numbers each, as long as the budget allows and at least one item."""
    step = max(1, budget // max(1, cost))
    for lo in range(0, total, step):
        yield lo, min(total, lo + step)
