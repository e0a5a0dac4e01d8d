"""MInference's offline search: per head the pattern and sizes whose output comes closest to dense at one kernel cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..counts import block_spans, list_width, tight
from ..errors import ConfigError
from ..layout import Layout
from ..lists import BUDGET, expand_at
from ..scores.kept import Sampled
from .base import AttnInput, State
from .search import Found, Target

if TYPE_CHECKING:
    from ._allocation import Allocation
    from .minference import Entry, MInference

LENGTH = 30_000  # tokens of the published sample, to which the sizes below belong
GRID: tuple[Entry, ...] = (
    ("vertical_slash", 30, 2048),
    ("vertical_slash", 100, 1800),
    ("vertical_slash", 500, 1500),
    ("vertical_slash", 3000, 200),
    ("a_shape", 1024, 4096),
    ("block_sparse", 100, 0),
)
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the published sizes
FINE = (1 / 16, 1 / 8, *SCALES)  # where every head has a cost of its own
DENSE = 1 << 24  # distances of a head that sees every key
BLOCKS = 1.25  # price of a pair in lists of 64 rows beside diagonals: 1 / 470 TFLOP/s against 1 / 590 (h200_private)
LEVELS = 256  # costs that are tried for the target
TILE = 64


def candidates(length: int, scales: tuple[float, ...] = SCALES) -> tuple[Entry, ...]:
    """The published grid, scaled to prompts of `length` tokens and to several costs."""
    out: dict[Entry, None] = {}
    for scale in scales:
        for name, a, b in GRID:
            one, two = (max(1, round(n * scale * length / LENGTH)) for n in (a, b))
            out[(name, one, two if b else 0)] = None
    return tuple(out)


class KernelAware:
    """The procedure of Jiang et al. 2024, section 3.2, towards a target.

    Every candidate runs on every head as it will be served: same probe, same softmax scale, same forced keys. Its cost
    is what the kernel computes, tiles and columns of every row block counted, so candidates of one cost are compared,
    not of one nominal sparsity. A head takes the candidate of at most that cost whose output differs least from dense
    (relative L1; the first of the grid where several do), and keeps it under its own name: the published code stores a
    winning A-shape or block-sparse head as vertical-slash. The cost, one for all heads, is the least that holds a recall
    or loss target in the mean over heads, or the largest within a density target.
    """

    passes = 1
    wants_grad = False

    def __init__(self, method: MInference, target: Target):
        self.method, self.target = method, target
        self.length = 0  # of the first prompt, to which the grid is scaled
        self.sums = torch.zeros(0)  # [layers, heads, candidates, (recall, loss, cost)]
        self.seen = torch.zeros(0)  # [layers], calls added

    def see(self, x: AttnInput, out: Tensor, grad: Tensor | None) -> None:
        from .minference import MInference

        if not self.length:
            self.length = x.q.shape[2]
            self.sums = torch.zeros(x.layers, x.q.shape[1], len(candidates(self.length)), 3, dtype=torch.float64)
            self.seen = torch.zeros(x.layers, dtype=torch.int64)
        assert x.q_pos is not None
        dense = Sampled(x.q, x.kv, x.q_pos, scale=x.scale, softcap=x.softcap, seed=x.layer)
        visible = float(x.dense().pairs(x.kv).sum()) / x.q.shape[1]
        plain = MInference(last_q=self.method.last_q, sink=self.method.sink, local=self.method.local)
        for i, (name, a, b) in enumerate(candidates(self.length)):
            layout = _of(plain, (name, a, b)).plan(x, State())
            assert isinstance(layout, Layout)
            recall, loss = dense.judge(layout)
            figures = torch.stack([recall.double(), loss.double(), kernel_cost(layout).double() / visible], -1)
            self.sums[x.layer, :, i] += figures.cpu()
        self.seen[x.layer] += 1

    def end_pass(self) -> None:
        pass

    def finish(self) -> Found:
        from .minference import PATTERNS as names

        mean = self.sums / self.seen.clamp(min=1)[:, None, None, None]
        asked = self.seen > 0
        if not bool(asked.any()):
            raise ConfigError("minference: the search was shown no layer")
        figures = mean[asked]  # [layers seen, heads, candidates, 3]
        cost = figures[..., 2]
        level, choice = self._level(figures)
        grid = candidates(self.length)
        fallback = (0, self.method.columns, self.method.diagonals)
        plan = torch.tensor(fallback).expand(*self.sums.shape[:2], 3).clone()
        plan[asked] = torch.tensor([[names.index(n), a, b] for n, a, b in grid])[choice]
        recall, loss, paid = _mean(figures, choice)
        counts = {n: int((plan[asked][..., 0] == i).sum()) for i, n in enumerate(names)}
        report = dict(recall=recall, loss=loss, computed=paid, level=level, heads=counts, least_cost=float(cost.min()))
        return Found(tensors={"pattern": plan[..., 0].contiguous(), "sizes": plan[..., 1:].contiguous()}, report=report)

    def _level(self, figures: Tensor) -> tuple[float, Tensor]:
        """The cost chosen for all heads, and the candidate of each `[layers, heads]` under it."""
        cost = figures[..., 2]
        low, high = float(cost.min()), float(cost.max())
        best: tuple[float, Tensor] | None = None
        for i in range(LEVELS):
            level = low * (high / low) ** (i / (LEVELS - 1)) * (1 + 1e-9)
            choice = choose(figures, level)
            recall, loss, paid = _mean(figures, choice)
            if self.target.kind == "density":
                if best is None or paid <= self.target.value:
                    best = (level, choice)
            else:
                best = (level, choice)
                holds = recall >= self.target.value if self.target.kind == "recall" else loss <= self.target.value
                if holds:
                    break
        assert best is not None
        return best

    def state(self) -> dict[str, Tensor]:
        return {"sums": self.sums, "seen": self.seen, "length": torch.tensor([self.length])}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.sums, self.seen, self.length = state["sums"].clone(), state["seen"].clone(), int(state["length"])


def by_head(method: MInference, target: Target) -> Allocation:
    """The search for a target of mass by head: the published space, to finer costs, and a head that sees everything.

    A-shape is not in it: vertical-slash has first keys and nearest distances too, and a layout that mixes rules and lists
    runs on no fast kernel.
    """
    from ._allocation import Allocation, Ladder
    from .minference import PATTERNS

    def settings(length: int) -> list[Entry]:
        known = [(name, a, b) for name, a, b in candidates(length, FINE) if name != "a_shape" and max(a, b) < length]
        return [*known, ("vertical_slash", 0, DENSE)]

    def plan(x: AttnInput, entry: Entry) -> Layout:
        got = _of(method, entry).plan(x, State())
        assert isinstance(got, Layout)
        return got

    def found(entries: Sequence[Entry], choice: Tensor) -> Found:
        table = torch.tensor([[PATTERNS.index(name), a, b] for name, a, b in entries])
        table = torch.cat([table, torch.tensor([[0, method.columns, method.diagonals]])])  # -1: not shown
        pattern, *sizes = table[choice].unbind(-1)
        shown = choice >= 0
        heads = {n: int((shown & (pattern == i)).sum()) for i, n in enumerate(PATTERNS)}
        report = {"heads": heads, "dense heads": int((shown & (sizes[1] == DENSE)).sum())}
        return Found(tensors={"pattern": pattern.contiguous(), "sizes": torch.stack(sizes, -1)}, report=report)

    return Allocation(target, Ladder(method.id, settings, plan, found, lambda e: BLOCKS if e[0] == "block_sparse" else 1.0))


def _of(method: MInference, entry: Entry) -> MInference:
    """This method with one pattern of these sizes for all heads."""
    name, a, b = entry
    sizes = {"vertical_slash": ("columns", "diagonals"), "a_shape": ("init", "recent"), "block_sparse": ("blocks",)}
    given: dict[str, Any] = dict(zip(sizes[name], (a, b), strict=False))
    return replace(method, pattern=name, profile=None, starting_layer=0, **given)


def choose(figures: Tensor, level: float) -> Tensor:
    """int64 `[layers, heads]`: of (recall, loss, cost) `[layers, heads, candidates, 3]` the least loss with a cost of at
    most `level`; the cheapest candidate where none is."""
    loss, cost = figures[..., 1], figures[..., 2]
    fits = cost <= level
    fits = torch.where(fits.any(-1, keepdim=True), fits, cost == cost.amin(-1, keepdim=True))
    return loss.masked_fill(~fits, float("inf")).argmin(-1)


def _mean(figures: Tensor, choice: Tensor) -> list[float]:
    """[recall, loss, cost] of the chosen candidates, mean over layers and heads."""
    return figures.gather(2, choice[..., None, None].expand(-1, -1, -1, 3)).mean((0, 1, 2)).tolist()  # type: ignore[no-any-return]


def kernel_cost(layout: Layout, most: int = 0) -> Tensor:
    """int64 `[H]`: pairs a kernel computes for each head of a layout with B = 1. Lists as `Layout.computed` counts them
    (for every row whole tiles, and one key for each column that no tile of its block covers, visible or not); a rule
    alone counts the 64 x 64 blocks it touches. `most`: count that many query blocks, evenly spread, and scale up."""
    h = layout.shape[1]
    if layout.has_rule or layout.full:
        return layout.to_block_mask(TILE, TILE)[0].sum((-1, -2)) * TILE * TILE
    total = torch.zeros(h, dtype=torch.int64, device=layout.device)
    layout = tight(layout)
    blocks = torch.arange(layout.num_blocks, device=layout.device)
    if 0 < most < layout.num_blocks:
        blocks = (2 * blocks[:most] + 1) * layout.num_blocks // (2 * most)
    for some in blocks.split(max(1, BUDGET // list_width(layout))):
        rows = expand_at(layout, some)
        r0, r1 = block_spans(layout, some)
        keys = (rows.stop > rows.start).sum(-1) * layout.tile_width + rows.live.sum(-1)
        total = total + (keys * (r1 - r0)).sum(-1)[0]
    return total * layout.num_blocks // len(blocks)
