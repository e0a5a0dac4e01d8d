"""SnapKV: the last queries of the prompt vote on which prompt entries each kv head keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..lists import compact
from ..select import top_k
from ._voting import Voting
from .base import AttnInput, Selection, State, option


@dataclass(frozen=True)
class SnapKV(Voting):
    """Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469).

    The attention of the last `window` queries is summed over them, reduced over the query heads of a group, pooled
    along the keys (`pooling` with an odd `kernel`), and the best entries are kept. `capacity` counts what stays, the
    window's own entries and the first `sink` positions, which are always kept, included. A prompt of at most
    `capacity` entries stays whole. The prompt's last window must contain the question.
    """

    window: int = option(64, low=1, help="last prompt tokens, which vote and always stay")
    capacity: int = option(320, low=2, help="entries a kv head keeps")
    kernel: int = option(5, low=1, help="neighbouring tokens pooled together, an odd number")
    pooling: str = option("avg", choices=("avg", "max"), help="how neighbouring scores are pooled: mean or maximum")
    reduce: str = option("mean", choices=("mean", "max", "sum"), help="how query heads of a kv head are joined")
    sink: int = option(4, low=0, help="first tokens of the text, always included")

    id: ClassVar[str] = "snapkv"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"window": 32, "capacity": 1024, "kernel": 7, "pooling": "max"},
        "longbench": {"window": 32, "capacity": 2048, "kernel": 7, "pooling": "max"},
    }

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        if x.kv.longest() <= self.capacity:
            return None
        if (votes := self.votes(x)) is None:
            return None
        (score, recent), exists = votes, x.kv.exists()
        keep = exists & (recent | (x.kv.positions() < self.sink))
        index, count = compact(top_k(score, self.capacity, valid=exists, forced=keep))
        return Selection(index[..., : self.capacity].long(), count.long())
