"""The setting of every head that keeps a share of the attention mass with the fewest computed pairs in all.

What the offline searches of several methods share when their target is "mass=" (`Target.by_head`). The searches of their
papers hold every head to one cost or to one error; where heads differ much, as a head of induction and one that looks at
everything do, either spends most pairs on heads that gain nothing by them. This one spends where a pair brings the most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from .base import AttnInput
from .minference_search import kernel_cost
from .search import Found, Target

SHARES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)  # of mass, as thresholds
BLOCKS = 64  # query blocks on which the cost of diagonals and columns is counted


@dataclass(frozen=True)
class Ladder:
    """What a method can set for a single head, and what becomes of the choice.

    Attributes:
        method: registry id. settings: of prompts of that many tokens, in any order; the same for every call.
        plan: the layout of a call under one setting for all heads; None is dense.
        found: of (settings, index of each head's setting int64 `[layers, H]`, -1 in layers that were not shown).
        price: of a setting, what a pair costs that its kernel computes, where settings run on kernels of different speed.
    """

    method: str
    settings: Callable[[int], Sequence[Any]]
    plan: Callable[[AttnInput, Any], Layout | None]
    found: Callable[[Sequence[Any], Tensor], Found]
    price: Callable[[Any], float] = lambda setting: 1.0


class Allocation:
    """A search (see `search.Search`): mass and cost of each setting on each head, then the cheapest choice for a mean mass.

    Mass is exp(lse_sparse - lse_dense) of every row, by the kernels that will serve; cost is the pairs that a kernel
    computes over those that the head sees, times the price of the setting. Holds a number per layer, head and setting; a
    call costs one plan and one attention a setting. Choices lie on the lower hull of each head's (mass, cost): from the
    cheapest settings on, the step that costs least for the mass it brings is taken until the mean over heads holds the
    target.
    """

    passes = 1
    wants_grad = False

    def __init__(self, target: Target, ladder: Ladder):
        self.target, self.ladder = target, ladder
        self.settings: Sequence[Any] = ()
        self.length = 0  # of the first prompt
        self.sums = torch.zeros(0)  # fp64 [layers, H, settings, (mass, pairs computed)]
        self.seen = torch.zeros(0)  # int64 [layers], calls added

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        from ..kernels.dispatch import attend

        if not self.length:
            self._begin(x.q.shape[2])
            self.sums = torch.zeros(x.layers, x.q.shape[1], len(self.settings), 2, dtype=torch.float64)
            self.seen = torch.zeros(x.layers, dtype=torch.int64)
        how = dict(scale=x.scale, softcap=x.softcap, return_lse=True)
        full = attend(x.q, x.kv, None, **how)[1]  # type: ignore[arg-type]
        visible = x.dense().visible(x.kv)[0].cpu()
        for i, setting in enumerate(self.settings):
            layout = self.ladder.plan(x, setting)
            if layout is None:
                figures = torch.ones(x.q.shape[1], 2, dtype=torch.float64)
            else:
                lse = attend(x.q, x.kv, layout, **how)[1]  # type: ignore[arg-type]
                mass = (lse - full).exp().clamp(max=1.0).double().mean((0, 2))
                figures = torch.stack([mass.cpu(), computed(layout).cpu() / visible], -1)
            self.sums[x.layer, :, i] += figures
        self.seen[x.layer] += 1

    def _begin(self, length: int) -> None:
        self.length, self.settings = length, tuple(self.ladder.settings(length))

    def end_pass(self) -> None:
        return None

    def aim(self, value: float) -> None:
        """Another mass for the next `finish`; nothing needs to be seen again."""
        self.target = replace(self.target, value=value)

    def finish(self) -> Found:
        asked = self.seen > 0
        if not bool(asked.any()):
            raise ConfigError(f"{self.ladder.method}: the search was shown no layer")
        mass, pairs = (self.sums[asked] / self.seen[asked][:, None, None, None]).flatten(0, 1).unbind(-1)
        price = torch.tensor([self.ladder.price(s) for s in self.settings], dtype=torch.float64)
        taken = allocate(mass, pairs * price, self.target.value)
        choice = torch.full(self.sums.shape[:2], -1, dtype=torch.int64)
        choice[asked] = taken.view(-1, choice.shape[1])
        kept, paid = (float(t.gather(1, taken[:, None]).mean()) for t in (mass, pairs))
        found = self.ladder.found(self.settings, choice)
        report = dict(recall=kept, computed=paid, holds=kept >= self.target.value, least=float(pairs.min(-1).values.mean()))
        return replace(found, report=found.report | report)

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "seen": self.seen, "length": torch.tensor([self.length])}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.sums, self.seen = state["sums"].clone(), state["seen"].clone()
        if length := int(state["length"]):
            self._begin(length)


def allocate(mass: Tensor, cost: Tensor, value: float) -> Tensor:
    """int64 `[heads]`: of mass and cost `[heads, settings]` the choice with the least total cost whose mean mass is `value`,
    to one step of the hulls; the most mass where no choice reaches it."""
    steps: list[tuple[float, int, int, int]] = []  # (cost of a unit of mass, head, place on its hull, setting)
    taken = torch.zeros(len(mass), dtype=torch.int64)
    for head in range(len(mass)):
        hull = lower_hull(mass[head].tolist(), cost[head].tolist())
        taken[head] = hull[0]
        for place, (a, b) in enumerate(zip(hull, hull[1:], strict=False)):
            slope = float((cost[head, b] - cost[head, a]) / (mass[head, b] - mass[head, a]))
            steps.append((slope, head, place, b))
    held = float(mass.gather(1, taken[:, None]).sum())
    for _, head, _, setting in sorted(steps):  # slopes of one head ascend, so its steps come in their order
        if held / len(mass) >= value:
            break
        held += float(mass[head, setting] - mass[head, taken[head]])
        taken[head] = setting
    return taken


def lower_hull(mass: Sequence[float], cost: Sequence[float]) -> list[int]:
    """Settings on the lower hull of cost over mass, from the cheapest (of those the one with the most mass) up."""
    hull: list[int] = []
    for i in sorted(range(len(mass)), key=lambda i: (cost[i], -mass[i])):
        if hull and mass[i] <= mass[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]  # b lies above the line from a to i: it is never the best
            if (cost[b] - cost[a]) * (mass[i] - mass[a]) < (cost[i] - cost[a]) * (mass[b] - mass[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def computed(layout: Layout) -> Tensor:
    """fp64 `[H]`: pairs a kernel computes for each head of a layout with B = 1 (see `kernel_cost`)."""
    if layout.full:
        return layout.visible()[0].double()
    if layout.has_rule or layout.diagonals is not None or layout.columns is not None:
        return kernel_cost(layout, BLOCKS).double()
    h, rows = layout.shape[1], torch.full((layout.num_blocks,), layout.block_q, device=layout.device)
    rows[0] -= layout.q_offset
    rows[-1] -= layout.num_blocks * layout.block_q - layout.q_offset - layout.shape[2]
    total = torch.zeros(h, dtype=torch.float64, device=layout.device)
    for count, width in ((layout.tile_count, layout.tile_width), (layout.entry_count, 1)):
        if count is not None:
            total += width * (count[0] * rows).sum(-1, dtype=torch.float64).repeat_interleave(h // count.shape[1])
    return total


def own_lists(method: Any) -> None:
    """ConfigError if query heads share lists: they have no setting of their own."""
    if method.share == "group":
        raise ConfigError(f"{method.id}: target mass= chooses for single heads, expected share='head', got 'group'")
