"""The offline search of XAttention: a threshold per head, by dynamic programming over steps of ten percent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..scores.antidiagonal import block_mass
from .base import AttnInput, State
from .search import Found, Target

if TYPE_CHECKING:
    from ._allocation import Allocation
    from .xattention import XAttention

STEPS = 20  # a head's threshold is 0.9 to the power of 0..STEPS


class Steps:
    """How many steps of -10 % each head's threshold takes.

    Per head and step, the prompts give the share of the true attention mass that the blocks of that threshold hold, and
    the share of causal pairs in them. D[h][s] is the best total mass that the first h heads can keep while taking s steps
    together: D[h][s] = max over t of D[h - 1][s - t] + mass[h][t]. A target of recall takes the most steps whose mean
    mass still holds it, one of density the fewest whose mean density does. The paper's procedure measures the accuracy
    of the model where this one measures mass, which needs one pass and no task. Costs an exact product q . k a prompt.
    """

    passes = 1
    wants_grad = False

    def __init__(self, method: XAttention, target: Target):
        self.method, self.target = method, target
        self.sums: Tensor | None = None  # fp64 [2, layers, H, STEPS + 1]: mass and density, added up over prompts
        self.seen: Tensor | None = None  # int64 [layers], prompts

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        h, n, size = x.q.shape[1], x.q.shape[2], self.method.block
        if self.sums is None or self.seen is None:
            self.sums = torch.zeros(2, x.layers, h, STEPS + 1, dtype=torch.float64)
            self.seen = torch.zeros(x.layers, dtype=torch.int64)
        estimate, true = self._mass(x, x.q, self.method.stride), self._mass(x, x.q.float(), 1)
        pairs = _pairs(n, size, x.device)
        for step in range(STEPS + 1):
            keep = self.method._keep(estimate, 0.9**step, 0)
            got = torch.stack([torch.where(keep, t, 0).sum((-1, -2), dtype=torch.float64)[0] for t in (true, pairs)])
            total = torch.tensor([[n], [n * (n + 1) / 2]], dtype=torch.float64)
            self.sums[:, x.layer, :, step] += got.cpu() / total
        self.seen[x.layer] += 1

    def _mass(self, x: AttnInput, q: Tensor, stride: int) -> Tensor:
        """fp32 `[B, H, nq, nk]`."""
        size = self.method.block
        out = q.new_zeros(*q.shape[:2], *[-(-q.shape[2] // size)] * 2, dtype=torch.float32)
        by_group = out.unflatten(1, (x.groups, -1))
        for g0, g1, lo, hi, mass in block_mass(q, x.kv, stride, size, start=0, scale=x.scale, softcap=x.softcap):
            by_group[:, g0:g1, :, lo:hi, : mass.shape[-1]] = mass
        return out

    def end_pass(self) -> None:
        return None

    def finish(self) -> Found:
        if self.sums is None or self.seen is None or not bool(self.seen.any()):
            raise ConfigError("xattention: the search expected at least one prompt, got none")
        there = self.seen > 0
        mass, density = (self.sums[:, there] / self.seen[there][:, None, None]).flatten(1, 2)
        steps, report = self._allocate(mass, density)
        table = torch.full(self.sums.shape[1:3], self.method.threshold, dtype=torch.float32)
        table[there] = (0.9 ** steps.double()).float().view(-1, table.shape[1])
        options = {"stride": self.method.stride, "block": self.method.block}
        return Found(options, {"threshold": table}, report)

    def _allocate(self, mass: Tensor, density: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Steps of each head, int64 `[heads]`, from tables `[heads, STEPS + 1]`; and what they keep."""
        heads = mass.shape[0]
        best, cost = torch.full((2, heads * STEPS + 1), float("-inf"), dtype=torch.float64)
        best[0] = cost[0] = 0
        choice = torch.zeros(heads, heads * STEPS + 1, dtype=torch.int8)
        for h in range(heads):
            top, paid = torch.full_like(best, float("-inf")), torch.zeros_like(cost)
            for step in range(STEPS + 1):
                end = len(best) - step
                gain = best[:end] + mass[h, step]
                better = gain > top[step:]
                top[step:] = torch.where(better, gain, top[step:])
                paid[step:] = torch.where(better, cost[:end] + density[h, step], paid[step:])
                choice[h, step:][better] = step
            best, cost = top, paid
        if self.target.kind == "recall":
            fits = (best / heads >= self.target.value - 1e-12).nonzero().flatten()
            total = int(fits[-1]) if len(fits) else 0
        else:
            fits = (cost / heads <= self.target.value + 1e-12).nonzero().flatten()
            total = int(fits[0]) if len(fits) else len(best) - 1
        report = {"recall": float(best[total]) / heads, "density": float(cost[total]) / heads, "steps": total}
        steps = torch.zeros(heads, dtype=torch.int64)
        for h in reversed(range(heads)):
            steps[h] = choice[h, total]
            total -= int(steps[h])
        return steps, report

    def state(self) -> dict[str, Tensor]:
        return {} if self.sums is None or self.seen is None else {"sums": self.sums, "seen": self.seen}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.sums, self.seen = state.get("sums"), state.get("seen")


def by_head(method: XAttention, target: Target) -> Allocation:
    """The search for a target of mass by head: a threshold each, by what the blocks it chooses hold and cost."""
    from ._allocation import SHARES, Allocation, Ladder

    def found(shares: Sequence[float], choice: Tensor) -> Found:
        table = torch.tensor([*shares, method.threshold], dtype=torch.float32)[choice]  # -1: not shown
        return Found({"stride": method.stride, "block": method.block}, {"threshold": table})

    def plan(x: AttnInput, share: float) -> Layout | None:
        return replace(method, threshold=share, profile=None).plan(x, State())

    return Allocation(target, Ladder(method.id, lambda length: SHARES, plan, found))


def _pairs(n: int, size: int, device: torch.device) -> Tensor:
    """fp32 `[nq, nk]`: causal pairs in each block of a prompt of n tokens."""
    rows = (n - torch.arange(0, n, size, device=device)).clamp(max=size)
    return (rows[:, None] * rows).tril(-1).float() + (rows * (rows + 1) / 2).diag()
