"""AnchorAttention's search for a target of mass by head: a theta each."""

from __future__ import annotations

import math
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
    from .anchor_attention import AnchorAttention

# Natural-log units below the anchor: from no key beyond the first and the local ones to all of them.
THETAS = (-math.inf, *(float(i) for i in range(0, 19)), math.inf)
GRID = ("block", "step", "init", "local")  # what a theta goes with


def by_head(method: AnchorAttention, target: Target) -> Allocation:
    """A theta each, which the paper leaves at one number for all heads. Layers that were not shown keep the method's own."""

    def found(thetas: Sequence[float], choice: Tensor) -> Found:
        theta = torch.tensor([*thetas, method.theta], dtype=torch.float32)[choice]
        report = {"dense heads": int(((choice >= 0) & (theta == math.inf)).sum())}
        return Found({name: getattr(method, name) for name in GRID}, {"theta": theta}, report)

    def plan(x: AttnInput, theta: float) -> Layout | None:
        return replace(method, theta=theta, profile=None).plan(x, State())

    return Allocation(target, Ladder(method.id, lambda length: THETAS, plan, found))
