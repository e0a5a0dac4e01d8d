"""Dense attention: the baseline, through the same caches and the same adapter as every method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..layout import Layout
from .base import AttnInput, LayerState, Method, State


@dataclass(frozen=True)
class Dense(Method):
    """Every visible pair (Vaswani et al. 2017, "Attention Is All You Need")."""

    id: ClassVar[str] = "dense"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "cache")
    share: ClassVar[str] = "group"
    evicted_ok: ClassVar[bool] = True
    source: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"

    @property
    def default_roles(self) -> tuple[str, ...]:
        return ("prefill", "decode")  # a cache that keeps everything is what a recipe has without a policy

    @property
    def keeps_all(self) -> bool:
        return True

    def phase(self, step: int) -> str | None:
        return "step"

    def resumes(self, layer: int, rows: list[LayerState]) -> bool:
        return True

    def plan(self, x: AttnInput, state: State) -> Layout:
        return x.dense()
