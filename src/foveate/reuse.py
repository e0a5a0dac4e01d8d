"""When a decode method selects anew, and how it uses an old selection: one policy for all methods that reuse one.

A selection is kept as a layout, with the lengths it was made for. Used again, it is that layout and all tokens appended
since, as a window: they are never missing from it, whatever the policy. It lives in `state.layer`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .layout import Layout
from .methods.base import AttnInput, State


@dataclass(frozen=True)
class Refresh:
    """Select anew at the first use and then at every step that meets a condition.

    Attributes:
        every: at every step whose number is a multiple of this (1: at every step).
        similarity: also when the cosine between this step's query and the selection's, mean over heads and rows, falls
            below this (None: never); needs one look at the device.
    """

    every: int = 1
    similarity: float | None = None

    def due(self, x: AttnInput, state: State, key: str) -> bool:
        """Whether this step must select anew. Steps reuse what `keep` stored under `key`."""
        held = state.layer.get(key)
        if held is None or not isinstance(held, Held) or held.layout.shape[0] != x.q.shape[0]:
            return True
        if x.step % self.every == 0 or x.step < held.step:
            return True
        if self.similarity is None:
            return False
        return bool(cosine_similarity(_direction(x), held.query, dim=-1).mean() < self.similarity)

    def keep(self, x: AttnInput, state: State, key: str, layout: Layout) -> Layout:
        """Store the selection of this step and return it."""
        state.layer[key] = Held(layout, x.kv.lengths()[:, :1], x.step, _direction(x))
        return layout

    def again(self, x: AttnInput, state: State, key: str) -> Layout:
        """The stored selection and every token appended since."""
        held: Held = state.layer[key]
        since = x.kv.lengths()[:, :1] - held.length
        window = since if held.layout.window is None else held.layout.window + since
        return replace(held.layout, shape=x.shape, window=window.to(torch.int32), q_pos=x.layout_pos())

    def phase(self, step: int) -> str | None:
        """For `Method.phase`: the name of the captured step, or None where the device has a say."""
        if self.similarity is not None:
            return None
        return "select" if step % self.every == 0 else "reuse"


@dataclass(frozen=True)
class Held:
    """A selection: its layout, the lengths `[B, 1]` it was made for, the step, and the mean query `[B, D]` (fp32)."""

    layout: Layout
    length: Tensor
    step: int
    query: Tensor

    def reorder(self, index: Tensor) -> None:
        """Beams change places: the rows of a selection are picked anew by the next step."""
        object.__setattr__(self, "step", 1 << 60)

    def fork(self) -> Held:
        return replace(self)


def _direction(x: AttnInput) -> Tensor:
    return x.q.float().mean((1, 2))
