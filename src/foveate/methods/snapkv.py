"""SnapKV: the last queries of the prompt vote on which prompt entries each kv head keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import ConfigError
from ..lists import compact, trim
from ..scores.window import group_reduce, pool, window_mass
from ..select import top_k
from .base import AttnInput, Method, Selection, State, option


@dataclass(frozen=True)
class SnapKV(Method):
    """Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469).

    The attention of the last `window` queries is summed over them, reduced over the query heads of a group, pooled
    along the keys (`pooling` with an odd `kernel`), and the best entries are kept. `capacity` counts what stays, the
    window's own entries and the first `sink` positions, which are always kept, included. A prompt of at most
    `capacity` entries stays whole. The prompt's last window must contain the question.
    """

    window: int = option(64, low=1)
    capacity: int = option(320, low=2)
    kernel: int = option(5, low=1)
    pooling: str = option("avg", choices=("avg", "max"))
    reduce: str = option("mean", choices=("mean", "max", "sum"))
    sink: int = option(4, low=0)

    id: ClassVar[str] = "snapkv"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"capacity": 1024, "kernel": 7, "pooling": "max"},
        "longbench": {"window": 32, "capacity": 2048, "kernel": 7, "pooling": "max"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ConfigError(f"snapkv: kernel expected an odd number, got {self.kernel}")
        if self.capacity < self.window + self.sink:
            raise ConfigError(
                f"snapkv: capacity expected at least window + sink = {self.window + self.sink}, got {self.capacity}"
            )

    @property
    def tail(self) -> int:
        return self.window

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        length = x.kv.lengths()
        if int(length.max()) <= self.capacity:
            return None
        if x.q.shape[2] == 0:
            x.note("snapkv: no prompt queries were saved with this cache; every entry is kept")
            return None
        assert x.q_pos is not None
        exists = x.kv.exists()
        recent = exists & (torch.arange(x.kv.capacity, device=x.device) >= length[..., None] - self.window)
        mass = window_mass(x.q, x.kv, x.q_pos, scale=x.scale, softcap=x.softcap, exclude=recent)
        votes = group_reduce(mass, x.groups, self.reduce)
        score = pool(votes, self.kernel, self.pooling)
        keep = recent | (x.kv.positions() < self.sink)
        index, count = compact(top_k(score, self.capacity, valid=exists, forced=keep & exists))
        return Selection(trim(index, count).long(), count.long())
