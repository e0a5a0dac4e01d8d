"""Quest: pages ranked by an upper bound of their logits, built from the largest and smallest key of each page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import Layout
from ..scores.bounds import Bounds
from ..select import top_indices
from .base import AttnInput, Method, State, option, shared
from .search import Knob


@dataclass(frozen=True)
class Quest(Method):
    """Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv 2406.10774).

    A decode query attends to the budget // page pages with the highest bound sum_d max(q_d max_d, q_d min_d). The page
    that holds the newest entry is always one of them. `share="group"` ranks by the highest bound of the query heads
    that share a kv head, so that keys are read once. The first `dense_layers` layers stay dense.
    """

    page: int = option(16, low=1, help="tokens of a page")
    budget: int = option(2048, low=1, help="tokens a query reads")
    dense_layers: int = option(2, low=0, help="first layers, which stay dense")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "quest"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    source: ClassVar[str] = "Tang et al. 2024, arXiv 2406.10774"
    knob: ClassVar[Knob | None] = Knob("budget", 32, 65536, log=True, whole=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"budget": 1024}}

    @property
    def min_length(self) -> int:
        return self.budget

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        keep, pages = max(1, self.budget // self.page), -(-x.kv.capacity // self.page)
        if x.layer < self.dense_layers or pages <= keep:
            return None
        bounds = state.layer.get("quest.bounds")
        if bounds is None or bounds.page != self.page:
            bounds = state.layer["quest.bounds"] = Bounds(self.page)
        bounds.update(x.kv)
        if x.kv.bias is None and x.kv.pos is None:
            tiles, count = bounds.top(x.q, x.kv, keep, group=self.share == "group")
        else:
            tiles, count = self._among_evicted(bounds, x, keep, pages)
        return Layout(
            x.shape,
            tile_width=self.page,
            q_pos=x.layout_pos(),
            tiles=tiles[:, :, None],
            tile_count=count[:, :, None],
        )

    def _among_evicted(self, bounds: Bounds, x: AttnInput, keep: int, pages: int) -> tuple[Tensor, Tensor]:
        """`Bounds.top` where entries carry weights or stand in no order of position."""
        score, valid = bounds.score(x.q), None  # [B, G, r, pages]
        if x.kv.bias is not None:  # bounds of logits with their entry weights
            top = self._page_bias(x.kv.bias, pages)
            score, valid = score.float() * x.scale + top[:, :, None], (top > float("-inf"))[:, :, None]
        if self.share == "group":
            score = score.amax(2, keepdim=True)
        number = torch.arange(pages, device=x.device)
        forced = number == pages - 1
        if x.kv.len is not None:
            last = (x.kv.lengths() - 1)[:, :, None, None] // self.page
            inside, forced = number <= last, number == last
            valid = inside if valid is None else valid & inside
        if x.kv.pos is not None:  # a ring writes its newest entry anywhere
            assert x.q_pos is not None
            newest = (x.kv.pos == x.q_pos[:, None]) & x.kv.exists()
            forced = number == newest.int().argmax(-1)[:, :, None, None] // self.page
        forced = forced.expand(score.shape).flatten(1, 2)
        valid = None if valid is None else valid.expand(score.shape).flatten(1, 2)
        index, count = top_indices(score.flatten(1, 2), keep, valid=valid, forced=forced)
        return index * self.page, count

    def _page_bias(self, bias: Tensor, pages: int) -> Tensor:
        """The highest entry bias of each page, `[B, G, pages]`."""
        bias = pad(bias.float(), (0, pages * self.page - bias.shape[2]), value=float("-inf"))
        return bias.unflatten(2, (pages, self.page)).amax(3)
