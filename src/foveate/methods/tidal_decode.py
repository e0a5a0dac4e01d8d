"""TidalDecode: two layers attend to everything and choose tokens, the layers between them use that choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..lists import compact, repeat_heads
from ..scores.exact import top_keys
from .base import AttnInput, Method, State, option, shared
from .search import Knob

TOKENS = "tidal_decode.tokens"


@dataclass(frozen=True)
class TidalDecode(Method):
    """Yang et al. 2024, "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention"
    (arXiv 2410.05076).

    Decode. Layers before `start` are dense. Layer `start` and layer `reselect` are dense too, and each of them chooses
    the `budget` tokens of highest logit per query head; every layer in between and after attends to the latest choice
    of the same step alone. Nothing is carried over to the next step. The best `reselect` is a constant of the model
    that a sweep on a retrieval task finds; 13 is that of Llama-3-8B, None never chooses a second time. `share="group"`
    gives the query heads of a kv head one list, by their probabilities, summed.

    Differs from the published code: the token itself is always part of a choice, kv heads may be shared, and where a
    layer keeps the model's own sliding window the next layer without one takes its place. In a cache with dropped
    entries a choice means text positions, and a layer uses those that it still has. The paper's cache correction, which
    runs generated tokens again with dense attention, is a matter of the generation loop and not part of the method.
    """

    start: int = option(2, low=0, help="first layer that chooses, counted from 0")
    reselect: int | None = option(13, low=1, help="layer that chooses again; none: no layer")
    budget: int = option(256, low=1, help="tokens a query reads in sparse layers")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "tidal_decode"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    source: ClassVar[str] = "Yang et al. 2024, arXiv 2410.05076"
    knob: ClassVar[Knob | None] = Knob("budget", 32, 65536, log=True, whole=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"budget": 512}, "long": {"budget": 4096}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reselect is not None and self.reselect <= self.start:
            raise ConfigError(f"tidal_decode: reselect expected above start = {self.start}, got {self.reselect}")

    @property
    def min_length(self) -> int:
        return self.budget + 1

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if x.layer < self.start or x.kv.capacity <= self.budget:
            return None
        chosen: Chosen | None = state.step.get(TOKENS)
        if chosen is None or self._selects(x, chosen):
            state.step[TOKENS] = self._choose(x)
            return None
        return chosen.layout(x)

    def _selects(self, x: AttnInput, last: Chosen) -> bool:
        """Whether this layer chooses anew: it is the first at or after `reselect`, or has other heads than the last."""
        late = self.reselect is not None and last.layer < self.reselect <= x.layer
        return late or last.heads != (x.q.shape[1], x.groups)

    def _choose(self, x: AttnInput) -> Chosen:
        assert x.q_pos is not None
        group = self.share == "group"
        entries, count = top_keys(x.q, x.kv, x.q_pos, self.budget, group=group, scale=x.scale, softcap=x.softcap)
        entries, count = entries[:, :, 0], count[:, :, 0]
        if x.kv.pos is None:
            return Chosen(entries, count, x.layer, (x.q.shape[1], x.groups))
        pos = repeat_heads(x.kv.positions(), entries.shape[1]).gather(2, entries.long())
        return Chosen(pos, count, x.layer, (x.q.shape[1], x.groups))


@dataclass(frozen=True)
class Chosen:
    """The choice of one layer: text positions `[B, Hl, k]`, padded beyond `count` `[B, Hl]`, and who made it."""

    pos: Tensor
    count: Tensor
    layer: int
    heads: tuple[int, int]

    def layout(self, x: AttnInput) -> Layout:
        """These tokens as entries of a layer."""
        if x.kv.pos is None:  # an entry's number is its position
            entries, count = self.pos.to(torch.int32)[:, :, None], self.count[:, :, None]
            return Layout(x.shape, q_pos=x.layout_pos(), entries=entries, entry_count=count)
        k = self.pos.shape[-1]
        there = torch.arange(k, device=x.device) < self.count[..., None]
        ordered = torch.where(there, self.pos, 1 << 40).sort(-1).values  # a ring stands in no order of position
        have = repeat_heads(x.kv.positions(), ordered.shape[1]).contiguous()
        slot = torch.searchsorted(ordered, have).clamp(max=k - 1)
        found = (ordered.gather(-1, slot) == have) & repeat_heads(x.kv.exists(), ordered.shape[1])
        entries, count = compact(found)
        own = torch.ones(1, 1, dtype=torch.int32, device=x.device)
        entries, count = entries[:, :, None, :k], count[:, :, None].clamp(max=k)
        return Layout(x.shape, q_pos=x.layout_pos(), window=own, entries=entries, entry_count=count)
