"""ThinK: after the prompt, each kv head drops the key channels that its last queries use least."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..scores.channels import importance
from .base import AttnInput, Method, Selection, State, option
from .snapkv import SnapKV


@dataclass(frozen=True)
class ThinK(Method):
    """Xu et al. 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning" (arXiv 2407.21018).

    The contribution of channel c to the scores has Frobenius norm ||q_c|| * ||k_c||, over the last `window` queries
    (averaged over the query heads of a group, squared) and the kept keys. int(D * ratio) channels with the least go,
    for all entries of a kv head but the newest `tail_size`; values and tokens that come later are whole. With
    `capacity`, SnapKV (average pooling over 5) first keeps that many entries, as the paper's scripts do; without it
    every token stays. The channels of the first prompt hold for the whole conversation: later prompts lose the same
    ones. Saves about half of `ratio` of the bytes. Dense decode steps, and steps over listed pages or entries or under a
    rule, multiply the channels that are left; prompts, and methods that score raw keys, read a copy of one layer's keys
    with zeros in the gaps.
    The published code stores one copy of the keys for each query head and gathers correctly for one batch row only.
    """

    ratio: float = option(0.4, low=0.0, high=0.99, help="fraction of the key channels that is dropped")
    window: int = option(32, low=1, help="last queries of the prompt, which rate the channels")
    tail_size: int = option(32, low=1, help="newest tokens whose keys stay whole")
    capacity: int | None = option(None, low=2, help="entries a kv head keeps; none: all")

    id: ClassVar[str] = "think"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    together: ClassVar[bool] = True
    source: ClassVar[str] = "Xu et al. 2024, arXiv 2407.21018"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"snapkv": {"capacity": 512}, "8k": {"capacity": 1024}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity is not None and self.capacity < self.window + 4:
            raise ConfigError(f"think: capacity expected at least window + 4 sinks = {self.window + 4}, got {self.capacity}")

    @property
    def tail(self) -> int:
        return self.window

    @property
    def keeps_all(self) -> bool:
        return self.capacity is None

    def refuses(self, recipe: Any) -> str | None:
        if recipe.storage == "dense":
            return None
        return f"it stores a part of the key channels, which storage={recipe.storage!r} cannot"

    def storage(self) -> dict[str, Any]:
        return {"kind": "channels", "tail": self.tail_size}

    @cached_property
    def _tokens(self) -> SnapKV | None:
        """What chooses tokens before channels."""
        return None if self.capacity is None else SnapKV(window=self.window, capacity=self.capacity)

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        kept = None if self._tokens is None else self._tokens.compress(x, state)
        d = x.kv.k.shape[-1]
        pruned = int(d * self.ratio)
        if pruned == 0:
            return kept
        if kept is None:
            kept = Selection(torch.arange(x.kv.capacity, device=x.device).expand(len(x.q), x.groups, -1))
        if x.q.shape[2] == 0:
            x.note("think: no prompt queries were saved with this cache; channels are chosen by their keys alone")
        channels = self._channels(x, kept, d - pruned)
        return Selection(kept.indices, kept.counts, kept.bias, channels=channels)

    def _channels(self, x: AttnInput, kept: Selection, few: int) -> Tensor:
        """int64 `[B, G, few]`: the channels that stay, ascending; equal ones stay by number."""
        score = importance(x.q, x.kv, kept.indices, kept.full_counts())
        return score.sort(dim=-1, descending=True, stable=True).indices[..., :few].sort(-1).values
