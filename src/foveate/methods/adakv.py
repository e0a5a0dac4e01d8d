"""AdaKV: SnapKV's votes compared over the heads of a layer, so that each kv head keeps as much as it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..lists import compact
from ..select import top_k
from ._voting import Voting
from .base import AttnInput, Selection, State, option


@dataclass(frozen=True)
class AdaKV(Voting):
    """Feng et al. 2024, "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference"
    (arXiv 2407.11550).

    Entries before the window are ranked as in SnapKV (`window`, `kernel`, `pooling`, `reduce`), but over all kv heads of
    the layer at once. A head's share of the best ones is its budget, mixed with the mean as a safeguard: (1 - floor) of
    its share plus `floor` of the mean, so no head falls below that. Each head then keeps its own best, its window and
    the first `sink` positions. `capacity` is the mean over the heads of what stays, window and sinks included (the paper
    runs 128 to 1024), and the sum over the heads is exact. `weigh` multiplies a head's scores by the share of its mass
    that its own best entries hold. The cache becomes ragged, so memory falls by what is dropped.
    """

    window: int = option(32, low=1, help="last prompt tokens, which vote and always stay")
    capacity: int = option(1024, low=2, help="entries a kv head keeps, mean over the heads")
    floor: float = option(0.2, low=0.0, high=1.0, help="part of the mean budget that every head gets")
    kernel: int = option(7, low=1, help="neighbouring tokens pooled together, an odd number")
    pooling: str = option("max", choices=("avg", "max"), help="how neighbouring scores are pooled: mean or maximum")
    reduce: str = option("mean", choices=("mean", "max", "sum"), help="how query heads of a kv head are joined")
    sink: int = option(4, low=0, help="first tokens of the text, always included")
    weigh: bool = option(False, help="weigh a head's scores by the mass its best hold")

    id: ClassVar[str] = "adakv"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Feng et al. 2024, arXiv 2407.11550"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"capacity": 768},
        "small": {"capacity": 128},
        "longbench": {"window": 8},
    }

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        most, rows = self.capacity * x.groups, len(x.q)
        if x.kv.capacity <= self.capacity or (x.kv.len is not None and int(x.kv.len.sum()) <= most * rows):
            return None  # the device is asked only where the lengths of heads differ
        if (votes := self.votes(x)) is None:
            return None
        (score, recent), exists = votes, x.kv.exists()
        sinks = exists & ~recent & (x.kv.positions() < self.sink)
        budget = share_out(
            score, self.capacity - self.window, self.floor, valid=exists & ~recent, forced=sinks, weigh=self.weigh
        )
        index, count = compact(top_k(score, budget + recent.sum(-1), valid=exists, forced=sinks | recent))
        mean = self.capacity - self.window  # a head that wins everything; rounding may give it one more
        least, widest = self.window + self.sink, (1 - self.floor) * x.groups * mean + self.floor * mean
        return Selection(index[..., : max(least, self.window + int(widest) + 2)].long(), count.long())


def share_out(score: Tensor, k: int, floor: float, *, valid: Tensor, forced: Tensor, weigh: bool = False) -> Tensor:
    """int64 `[B, G]`: how many of the G * k entries of a layer each kv head may keep.

    Args:
        score: `[B, G, M]`, comparable over the heads. k: mean budget. floor: share of the mean that every head gets.
        valid: bool, what may be kept; forced: bool, kept in any case and counted.
        weigh: multiply a head's scores by the share of its mass that its own k best hold.

    The sum is G * k where there are that many. Equal scores give the heads equal budgets: ties go to the lower entry
    number, then to the lower head.
    """
    b, g, m = score.shape
    if weigh:
        mass = score.masked_fill(~valid, 0.0)
        own = torch.where(top_k(score, k, valid=valid, forced=forced), mass, 0.0).sum(-1, keepdim=True)
        score = score * (own / mass.sum(-1, keepdim=True).clamp(min=1e-20))
    flat = (t.transpose(1, 2).flatten(1) for t in (score, valid, forced))
    every, live, must = flat
    best = top_k(every, g * k, valid=live, forced=must).view(b, m, g)
    exact = (1 - floor) * best.sum(1).double() + floor * k  # [B, G]
    budget = (exact + 1e-9).floor()
    left = exact.sum(-1, keepdim=True).round() - budget.sum(-1, keepdim=True)
    rank = (budget - exact).argsort(dim=-1, stable=True).argsort(-1)  # 0: the head that rounding took most from
    return (budget + (rank < left)).long()
