"""AnchorAttention: first and local keys for all rows, and single keys that come close to the best of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import lists
from ..errors import ConfigError
from ..layout import Layout
from ..profile import of
from ..scores.stripes import anchors, stripes
from ._allocation import own_lists
from ._profiled import per_head
from .anchor_attention_search import GRID, by_head
from .base import AttnInput, Method, State, option, shared
from .search import Knob, Search, Target


@dataclass(frozen=True)
class AnchorAttention(Method):
    """Zhang et al. 2025, "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity" (arXiv 2505.23520).

    Groups of `step` blocks of `block` rows share their keys. Every row sees the first `init` blocks, and its past from
    `local` blocks before its group on; its highest logit there is its anchor. Of the keys between, a group takes those
    whose logit with the mean query of any of its blocks, plus `theta`, reaches the mean anchor of that block. `theta` is in
    natural-log units and so depends on the range of a model's logits; infinity makes attention dense, minus infinity
    leaves first and local keys. `profile` names a folder of `foveate calibrate --target mass=...`: a theta per layer and
    head in place of `theta`. `share` "group" gives the query heads of a kv head the union of their keys. Differs from
    the published kernels: the regions are disjoint and leave no gap (those count some keys twice and lose the block
    before a group), one softmax runs over all keys, and a last partial group is sparse too.
    """

    theta: float = option(12.0, help="how far below the anchor logits may be, natural log")
    block: int = option(128, low=16, help="tokens of a block of queries or keys")
    step: int = option(16, low=1, help="blocks of rows that share their keys")
    init: int = option(1, low=1, help="first blocks of keys, always included")
    local: int = option(1, low=0, help="blocks before a group of rows, always included")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "anchor_attention"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"  # rows of a group share their keys
    apart: ClassVar[bool] = True  # lists have room for all keys
    source: ClassVar[str] = "Zhang et al. 2025, arXiv 2505.23520"
    # Groups of 2,048 rows make a third of a prompt of 7,000 tokens local. On SmolLM2-135M (1,450 tokens of essays, 5 layers,
    # rows from 700 on) theta = 12 computes 0.89 of the pairs, 6 computes 0.53 for 0.95 of the attention mass, of which first
    # and local keys, whose part falls with the length, are 0.49.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"step": 4, "theta": 6.0}}
    knob: ClassVar[Knob | None] = Knob("theta", -8.0, 24.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (found := of(self.id, self.profile)) is None:
            return
        for name in GRID:
            if (made := found.options.get(name)) != getattr(self, name):
                have = getattr(self, name)
                raise ConfigError(f"anchor_attention: profile was made with {name}={made}, but {name} is {have}")
        if (table := found.tensors.get("theta")) is None or table.dim() != 2:
            raise ConfigError(f"anchor_attention: profile expected a tensor theta [layers, heads] in {self.profile!r}")

    @property
    def min_length(self) -> int:
        """Groups that begin so early have no key between the first and the local ones."""
        groups = -(-(self.init + self.local + 1) // self.step)
        return groups * self.step * self.block + 1

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        m, rows = x.start + x.q.shape[2], self.step * self.block
        if m < self.min_length:
            return None
        grid: dict[str, Any] = dict(start=x.start, block=self.block, step=self.step, init=self.init, local=self.local)
        grid.update(scale=x.scale, softcap=x.softcap)
        limit = anchors(x.q, x.kv, **grid) - self._theta(x, state)
        entries, many = stripes(x.q, x.kv, limit, group=self.share == "group", **grid)
        tiles, count = self._near(x.start // rows, -(-m // rows), -(-m // self.block), x.device)
        return Layout(
            x.shape,
            block_q=rows,
            q_offset=x.offset(rows),
            tile_width=self.block,
            q_pos=x.layout_pos(),
            tiles=tiles * self.block,
            tile_count=count,
            entries=entries,
            entry_count=many,
        )

    def search(self, target: Target) -> Search | None:
        """A theta per head for mass by head; for other targets one for all heads by the generic way."""
        if not target.by_head:
            return None
        own_lists(self)
        return by_head(self, target)

    def _theta(self, x: AttnInput, state: State) -> float | Tensor:
        """One for all heads, or those of this layer, fp32 `[H, 1]` on the device."""
        held = per_head(self.id, self.profile, "theta", x, state)
        return self.theta if held is None else held[:, None]

    def _near(self, first: int, end: int, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers of the near key blocks of the groups first..end, those after a row's own included: `[1, 1, groups, T]`."""
        start = torch.arange(first, end, device=device)[:, None] * self.step
        number = torch.arange(blocks, device=device)
        near = (number < self.init) | ((number >= start - self.local) & (number < start + self.step))
        index, count = lists.compact(near[None, None])
        return index[..., : self.init + self.local + self.step].contiguous(), count
