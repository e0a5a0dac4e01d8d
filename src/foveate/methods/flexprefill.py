"""FlexPrefill: per head and prompt, block-wise or vertical-slash, with as many blocks as the attention mass asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import profile
from ..errors import ConfigError
from ..layout import Layout
from ..scores.heads import head_blocks
from ..scores.pairs import union
from ..scores.pooled import block_pool, pool_keys
from ..scores.probes import last_queries
from ._profiled import per_head
from .base import AttnInput, Method, State, option, shared
from .search import Knob, Search, Target

SETTINGS = ("block", "tau", "min_budget", "max_budget")  # what a gamma goes with


@dataclass(frozen=True)
class FlexPrefill(Method):
    """Lai et al. 2025, "FlexPrefill: A Context-Aware Sparse Attention Mechanism" (arXiv 2502.20766).

    The last `block` queries are computed exactly. Per head:
    - as many key columns and distances as hold `gamma` of their probability (at least `min_budget` tokens, at most
      `max_budget`) become block columns and block diagonals of the `block` x `block` grid;
    - where the same queries, pooled, predict the same distribution over key blocks (Jensen-Shannon distance below
      `tau`), pooled blocks are trusted: the head takes the block pairs of all rows that hold `gamma` of the pooled
      attention, beside `min_budget` of columns and diagonals ("query-aware").

    The first block column and the block diagonal are always in. `profile` names a folder that `foveate calibrate` wrote
    for a target of mass: a gamma per layer and head in place of `gamma`; the choice by `tau` stays. `share` "group" gives
    the query heads of a kv head the union of their blocks. Differs from the published code in three points, all towards
    its paper: distances are pooled to block diagonals by the share of rows that meet them there, both selections reach
    gamma (the code's query-aware one stops short of it), and tokens become blocks by `block`, with one more diagonal
    because a run of distances always ends inside another one.
    """

    gamma: float = option(0.9, low=0, high=1, help="share of the estimated attention mass to reach")
    tau: float = option(0.1, low=0, help="Jensen-Shannon distance below which pooled blocks are trusted")
    min_budget: int = option(1024, low=1, help="fewest tokens of key columns and of distances")
    max_budget: int | None = option(None, low=1, help="most tokens of key columns and of distances; none: all")
    block: int = option(128, low=16, help="tokens of a block of queries or keys")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "flexprefill"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Lai et al. 2025, arXiv 2502.20766"
    knob: ClassVar[Knob | None] = Knob("gamma", 0.3, 0.999)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"gamma": 0.9, "min_budget": 512}}

    def __post_init__(self) -> None:
        super().__post_init__()
        found = profile.of(self.id, self.profile)
        if found is None:
            return
        for name in SETTINGS:
            if (made := found.options.get(name)) != getattr(self, name):
                raise ConfigError(f"flexprefill: profile was made with {name}={made}, but {name} is {getattr(self, name)}")
        if (table := found.tensors.get("gamma")) is None or table.dim() != 2:
            raise ConfigError(f"flexprefill: profile expected a tensor gamma [layers, heads] in {self.profile!r}")

    @property
    def min_length(self) -> int:
        """Up to two blocks, or the least budget, every block is forced anyway."""
        return max(2 * self.block, -(-self.min_budget // self.block) * self.block) + 1

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        m, size = x.start + x.q.shape[2], self.block
        if m < self.min_length:
            return None
        offset, nk, gamma = x.offset(size), -(-m // size), self._gamma(x, state)
        probe = last_queries(x.q, x.kv, size, scale=x.scale, softcap=x.softcap)
        kbar = pool_keys(x.kv, size)[:, :, :nk]
        most = nk if self.max_budget is None else min(-(-self.max_budget // size), nk)
        col, diag, aware = head_blocks(
            probe,
            x.q[:, :, -size:].mean(2, dtype=kbar.dtype),
            kbar,
            m,
            gamma,
            tau=self.tau,
            least=min(-(-self.min_budget // size), most),
            most=most,
            block=size,
            scale=x.scale,
            softcap=x.softcap,
        )
        qbar = block_pool(x.q, size, offset=offset)
        tiles, count = union(
            col,
            diag,
            qbar,
            kbar,
            aware if self.tau > 0 else None,
            gamma,
            first=x.start // size,
            block=size,
            scale=x.scale,
            softcap=x.softcap,
            group=self.share == "group",
        )
        return Layout(
            x.shape,
            block_q=size,
            q_offset=offset,
            tile_width=size,
            q_pos=x.layout_pos(),
            tiles=tiles,
            tile_count=count,
        )

    def search(self, target: Target) -> Search | None:
        """A gamma per head for mass; for anything else one for all by the generic way."""
        if not target.by_head:
            return None
        from ._allocation import own_lists
        from .flexprefill_search import by_head

        own_lists(self)
        return by_head(self, target)

    def _gamma(self, x: AttnInput, state: State) -> float | Tensor:
        """One for all heads, or those of this layer, fp64 `[1, H]` on the device."""
        held = per_head(self.id, self.profile, "gamma", x, state, torch.float64)
        return self.gamma if held is None else held[None]
