"""What SnapKV and the policies that build on it share: the last queries of a prompt vote on its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..scores.votes import window_votes
from .base import AttnInput, Method


@dataclass(frozen=True)
class Voting(Method):
    """A cache policy with the options `window`, `capacity`, `kernel`, `pooling`, `reduce` and `sink`; its file gives their
    defaults. `capacity` counts what stays, window and sinks included."""

    together: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kernel, capacity = self.kernel, self.capacity  # type: ignore[attr-defined]
        least = self.window + self.sink  # type: ignore[attr-defined]
        if kernel % 2 == 0:
            raise ConfigError(f"{self.id}: kernel expected an odd number, got {kernel}")
        if capacity < least:
            raise ConfigError(f"{self.id}: capacity expected at least window + sink = {least}, got {capacity}")

    @property
    def tail(self) -> int:
        return self.window  # type: ignore[attr-defined, no-any-return]

    def votes(self, x: AttnInput) -> tuple[Tensor, Tensor] | None:
        """(score fp32 `[B, G, M]`, bool `[B, G, M]`: the window, not ranked); None, with a note, where no queries are."""
        if x.q.shape[2] == 0:
            x.note(f"{self.id}: no prompt queries were saved with this cache; every entry is kept")
            return None
        assert x.q_pos is not None
        how = {n: getattr(self, n) for n in ("kernel", "pooling", "reduce")}
        return window_votes(x.q, x.kv, x.q_pos, self.tail, scale=x.scale, softcap=x.softcap, **how)
