"""Parts: several partial softmaxes that make one result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from . import checks
from .errors import LayoutError
from .kv import KV

if TYPE_CHECKING:
    from .layout import Layout


@dataclass(frozen=True)
class Part:
    """One partial softmax: a layout over its own views of queries and keys (None: those of the call).

    `gate` `[B, H, N]` multiplies this part's output under combine="gated". `scale` overrides the softmax scale.
    """

    layout: Layout
    q: Tensor | None = None
    kv: KV | None = None
    gate: Tensor | None = None
    scale: float | None = None


@dataclass(frozen=True)
class Parts:
    """Several partial softmaxes: under "lse" one softmax over their disjoint union, under "gated" a weighted sum.

    Under "lse" the parts must be disjoint or carry entry weights (`KV.bias`); `validate` checks the first for parts
    that read the same view.
    """

    parts: tuple[Part, ...]
    combine: str = "lse"
    joint: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None  # computes all parts at once: `dual_chunk.AtOnce`

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if self.combine not in ("lse", "gated"):
            raise LayoutError(f"combine: expected 'lse' or 'gated', got {self.combine!r}")
        if not self.parts:
            raise LayoutError("parts: expected at least one part, got none")
        rows = self.parts[0].layout.shape[:3]
        for i, part in enumerate(self.parts):
            if part.layout.shape[:3] != rows:
                raise LayoutError(f"parts: expected [B, H, N] = {list(rows)} in part {i}, got {list(part.layout.shape[:3])}")
            if self.combine == "gated" and part.gate is None:
                raise LayoutError(f"parts: combine='gated' expects a gate on every part, part {i} has none")

    def validate(self) -> None:
        """Raise LayoutError if a part is wrong, or if two parts of an "lse" combination name one pair of one view
        (time N x M, memory a few rows of it)."""
        for part in self.parts:
            part.layout.validate()
        if self.combine != "lse":
            return
        views: dict[int, list[tuple[int, Part]]] = {}
        for i, part in enumerate(self.parts):
            views.setdefault(id(part.kv), []).append((i, part))
        for same in views.values():
            checks.disjoint([(i, part.layout) for i, part in same], same[0][1].kv)
