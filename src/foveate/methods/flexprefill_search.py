"""FlexPrefill's search for a target of mass by head: a gamma each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import Layout
from ._allocation import SHARES, Allocation, Ladder
from .base import AttnInput, State
from .flexprefill import SETTINGS
from .search import Found, Target

if TYPE_CHECKING:
    from .flexprefill import FlexPrefill


def by_head(method: FlexPrefill, target: Target) -> Allocation:
    """A gamma each, which the paper leaves at one number for all heads. Layers that were not shown keep the method's own."""

    def found(shares: Sequence[float], choice: Tensor) -> Found:
        gamma = torch.tensor([*shares, method.gamma], dtype=torch.float32)[choice]  # -1: not shown
        return Found({name: getattr(method, name) for name in SETTINGS}, {"gamma": gamma})

    def plan(x: AttnInput, share: float) -> Layout | None:
        return replace(method, gamma=share, profile=None).plan(x, State())

    return Allocation(target, Ladder(method.id, lambda length: SHARES, plan, found))
