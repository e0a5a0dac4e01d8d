"""Exact top-k: the keys with the highest true logits. What every estimator is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from ..layout import Layout
from ..scores.exact import top_keys
from .base import AttnInput, Method, State, option, shared
from .search import Knob


@dataclass(frozen=True)
class TopKExact(Method):
    """The decode method of "A Preliminary Study on the Promises and Challenges of Native Top-k Sparse Attention".

    Every query attends to the `budget` visible keys with the highest logits, its own token among them, and every other
    key is left out of the softmax. The logits are exact, so this reads all keys and saves no time: it is the upper bound
    of what a selection of that size can keep, and the selection that models trained with top-k attention use. `block`
    rows of a prompt, on the grid that starts at position 0, may share one list, the keys with the most probability summed
    over these rows; with `share="group"` the query heads of a kv head share it as well. Both maximise the attention
    mass of the set, which needs the softmax of every row. Equal scores go to the lower entry, so no list is ever longer
    than the budget.

    The lists of a prompt of N tokens take 4 N * budget / block bytes a head: at 128K tokens choose a block of 64 or more.
    """

    budget: int = option(2048, low=1, help="tokens a query reads")
    block: int = option(1, low=1, help="prompt rows that share a list")
    dense_layers: int = option(0, low=0, help="first layers, which stay dense")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "topk_exact"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    source: ClassVar[str] = "A Preliminary Study on the Promises and Challenges of Native Top-k Sparse Attention, 2025"
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"budget": 512}, "blocks": {"budget": 2048, "block": 64}}
    knob: ClassVar[Knob | None] = Knob("budget", 16, 1 << 17, more=True, log=True, whole=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget < self.block:
            raise ConfigError(f"topk_exact: budget expected at least block = {self.block} (own tokens), got {self.budget}")

    @property
    def min_length(self) -> int:
        return self.budget + 1

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if x.layer < self.dense_layers or x.kv.capacity <= self.budget:
            return None
        assert x.q_pos is not None
        block = self.block if x.phase == "prefill" else 1
        entries, count = top_keys(
            x.q,
            x.kv,
            x.q_pos,
            self.budget,
            block=block,
            offset=x.offset(block),
            group=self.share == "group",
            scale=x.scale,
            softcap=x.softcap,
        )
        return Layout(
            x.shape,
            block_q=block,
            q_offset=x.offset(block),
            q_pos=x.layout_pos(),
            entries=entries,
            entry_count=count,
        )
