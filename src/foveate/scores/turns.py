"""Rotations of a decode step as factors of channels: found once for all layers that turn alike, applied in one pass.

A rotation turns pairs of channels, so each channel of a turned vector is itself times one number plus its partner times
another. Every layer of a step stands at the same position; what takes twenty small launches is done by the first of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .rotation import Pairs, channels, pair_tables

if TYPE_CHECKING:
    from ..methods.base import AttnInput, Rope

Table = tuple[Tensor, Tensor]
_HALVES = WeakTensorKeyDictionary()  # partners of a rotation -> `Turns.halves`


@dataclass(frozen=True)
class Turns:
    """How vectors of this step's positions are turned.

    Attributes:
        rope: the rotation. pos: int64 `[B, 1]`, where the step's queries and newest keys stand. pairs: which channels turn
            together. held: tables made so far in this forward, by name.
    """

    rope: Rope
    pos: Tensor
    pairs: Pairs
    held: dict[Any, Table]

    @staticmethod
    def of(x: AttnInput, shared: dict[str, Any], name: str) -> Turns | None:
        """Those of a decode step, shared in `state.step` under `name`; None where channels do not turn in pairs."""
        assert x.rope is not None and x.q_pos is not None
        if (pairs := channels(x.rope, x.q)) is None:
            return None
        # Each layer has a rotation of its own, over the same module: equal parts turn alike.
        held = shared.setdefault(name, {}).setdefault((type(x.rope), *vars(x.rope).values()), {})
        return Turns(x.rope, x.q_pos, pairs, held)

    @property
    def partner(self) -> Tensor:
        return self.pairs[0]

    @property
    def halves(self) -> bool:
        """Whether each channel of the first half turns with the one as far in the second: the device is asked once for a
        rotation, and never while a step is captured."""
        if self.partner not in _HALVES:
            if self.partner.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            half = len(self.partner) // 2
            _HALVES[self.partner] = self.partner.tolist() == [*range(half, 2 * half), *range(half)]
        return bool(_HALVES[self.partner])

    def table(self, name: str, make: Callable[[Tensor, slice], Tensor], n: int) -> Table:
        """Factors `[B, n, D]` of own channels and of partners, fp32, for the rotation that `make` carries out on vectors
        `[B, 1, n, D]`; made once in a forward."""
        if name not in self.held:
            self.held[name] = pair_tables(make, slice(0, n), len(self.pos), self.pairs)
        return self.held[name]

    def plain(self) -> Table:
        """To position 0: `[B, 1, D]`."""
        return self.table("plain", lambda y, _: self.rope.unrotate(y, self.pos), 1)

    def to(self, name: str, new: Callable[[], Tensor]) -> Table:
        """To the positions `[B, n]` that `new` gives, from where the step stands: `[B, n, D]`."""
        if name not in self.held:  # small launches add up, and most layers need none
            there = new()
            n = there.shape[1]

            def turn(y: Tensor, _: slice) -> Tensor:
                return self.rope.rotate(self.rope.unrotate(y, self.pos.expand(-1, n)), there)

            self.table(name, turn, n)
        return self.held[name]

    def asked(self, n: int) -> Table:
        """From position 0 to 0, 1, .., n - 1 and to where each row of the batch stands, nothing turned: factors `[n + B, D]`
        of a key's channels where they meet the query's own channels, and where they meet its partner channels. All that
        a step turns is found from them: see `kernels/triton/ranked_steps.py`."""
        if ("asked", n) not in self.held:
            parts = [torch.arange(n, device=self.pos.device)[None], self.pos.reshape(1, -1)]
            if getattr(self.rope, "steady", True):  # else angles depend on the longest position that is asked for
                parts = [torch.cat(parts, 1)]
            tables = [self._turned(at) for at in parts]
            own, other = (torch.cat(t, 1)[0] if len(t) > 1 else t[0][0] for t in zip(*tables, strict=True))
            self.held["asked", n] = own.contiguous(), other.index_select(-1, self.partner)
        return self.held["asked", n]

    def _turned(self, at: Tensor) -> Table:
        """From position 0 to the positions `[1, n]`: `[1, n, D]`."""
        return pair_tables(lambda y, _: self.rope.rotate(y, at), slice(0, at.shape[1]), 1, self.pairs)
