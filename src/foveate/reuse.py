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
        assert x.q_pos is not None
        old = state.layer.get(key)
        state.layer[key] = Held(layout, x.q_pos[:, -1:] + 1, x.step, _direction(x)).into(old)
        return layout

    def again(self, x: AttnInput, state: State, key: str) -> Layout:
        """The stored selection and every token appended since."""
        held: Held = state.layer[key]
        assert x.q_pos is not None
        since = x.q_pos[:, -1:] + 1 - held.length
        window = since if held.layout.window is None else held.layout.window + since
        return replace(held.layout, shape=x.shape, window=window.to(torch.int32), q_pos=x.layout_pos())

    def phase(self, step: int) -> str | None:
        """For `Method.phase`: the name of the captured step, or None where the device has a say."""
        if self.similarity is not None:
            return None
        return "select" if step % self.every == 0 else "reuse"


@dataclass(frozen=True)
class Held:
    """A selection and when it was made. It stays in the same memory, where captured steps read it.

    Attributes:
        layout: what was chosen. length: int `[B, 1]`, tokens seen then (a ring's length would stand still).
        step: the decode step. query: fp32 `[B, D]`, the mean of the queries.
    """

    layout: Layout
    length: Tensor
    step: int
    query: Tensor

    def into(self, old: object) -> Held:
        """This selection in the memory of an old one of its shape, which a graph may have recorded, or in its own."""
        if not isinstance(old, Held) or old.layout.meta() != self.layout.meta():
            return self.fork()
        pairs = list(zip(self._tensors(), old._tensors(), strict=True))
        if any((a is None) != (b is None) or (a is not None and a.shape != b.shape) for a, b in pairs):  # type: ignore[union-attr]
            return self.fork()
        for new, there in pairs:
            if new is not None and there is not None:
                there.copy_(new)
        return replace(old, step=self.step)

    def fork(self) -> Held:
        own = [None if t is None else t.clone() for t in self.layout.tensors()]
        layout = Layout.from_tensors(own, self.layout.meta())
        return replace(self, layout=layout, length=self.length.clone(), query=self.query.clone())

    def reorder(self, index: Tensor) -> None:
        """Beams change places: the rows of a selection are picked anew by the next step."""
        object.__setattr__(self, "step", 1 << 60)

    def _tensors(self) -> list[Tensor | None]:
        return [*self.layout.tensors(), self.length, self.query]


def _direction(x: AttnInput) -> Tensor:
    return x.q.float().mean((1, 2))
