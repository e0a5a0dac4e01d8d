"""SALE's search for a target of mass by head. The paper's own, for an error, is `sale.Halving`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layout import Layout
from ._allocation import Allocation, Ladder
from .base import AttnInput, State
from .search import Found, Target

if TYPE_CHECKING:
    from .sale import SALE

TAUS = (*(2.0**-i for i in range(14)), 0.0)  # from one that leaves sink and window to dense


def by_head(method: SALE, target: Target) -> Allocation:
    """A threshold each. Layers that were not shown keep the method's own."""

    def found(taus: Sequence[float], choice: Tensor) -> Found:
        tau = torch.tensor([*taus, method.tau], dtype=torch.float32)[choice]
        return Found(tensors={"tau": tau}, report={"dense_heads": float((tau == 0).float().mean())})

    def plan(x: AttnInput, tau: float) -> Layout | None:
        return replace(method, tau=tau, profile=None).plan(x, State())

    return Allocation(target, Ladder(method.id, lambda length: TAUS, plan, found))
