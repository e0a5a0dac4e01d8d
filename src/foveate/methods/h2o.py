"""H2O: the cache keeps the entries that received most attention so far and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..lists import compact, trim
from ..scores.mass import column_mass
from ..scores.observed import step_mass
from ..scores.window import group_reduce
from ..select import top_k
from .base import AttnInput, LayerState, Method, Selection, State, option

SUMS, MASS, LENGTH = "h2o", "h2o.mass", "h2o.length"


@dataclass(frozen=True)
class H2O(Method):
    """Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv
    2306.14048).

    Every entry carries the probability that all queries so far have paid it, those of the prompt included. After the
    prompt the `heavy` entries with the largest sum and the `recent` newest ones stay; numbers that are not given are
    `heavy_ratio` and `recent_ratio` of the prompt. While decoding each step adds its probabilities and the budget stays
    what it was: entries gather for `slack` steps before the lightest go (1: one a token, as published), since dropping
    copies what stays. Sums of the query heads of a kv head are reduced by `reduce`; equal ones keep the newer entry.
    `norm` "mean" divides a sum by the number of queries that could see the entry; raw sums favour early ones.

    Costs a second product of the prompt's queries and keys, N * N / 2 * D multiply-adds a query head, and one of the
    query with what is kept in each step. They are those of dense attention, whatever the recipe's other methods leave
    out, and need no kernel that returns probabilities. A rollback where nothing was evicted forgets the sums.
    """

    heavy: int | None = option(None, low=0, help="entries kept for their attention; none: by heavy_ratio")
    recent: int | None = option(None, low=1, help="newest entries kept; none: by recent_ratio")
    heavy_ratio: float = option(0.1, low=0.0, high=1.0, help="heavy entries as a fraction of the prompt")
    recent_ratio: float = option(0.1, low=0.0, high=1.0, help="recent entries as a fraction of the prompt")
    slack: int = option(64, low=1, help="decode steps from one eviction to the next")
    norm: str = option("sum", choices=("sum", "mean"), help="sum of an entry's probabilities, or mean over its queries")
    reduce: str = option("mean", choices=("mean", "max", "sum"), help="how query heads of a kv head are joined")

    id: ClassVar[str] = "h2o"
    roles: ClassVar[tuple[str, ...]] = ("cache",)
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"heavy": 512, "recent": 512},
        "summary": {"heavy": 1024, "recent": 1024},
        "stream": {"heavy": 48, "recent": 2000},
    }

    def budget(self, length: int) -> tuple[int, int]:
        """(heavy, recent) entries that stay of a prompt of `length` tokens."""
        heavy = int(self.heavy_ratio * length + 1e-6) if self.heavy is None else self.heavy
        recent = max(1, int(self.recent_ratio * length + 1e-6)) if self.recent is None else self.recent
        return heavy, recent

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        assert x.q_pos is not None
        how: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap)
        if x.phase == "prefill":
            got = group_reduce(column_mass(x.q, x.kv, x.q_pos, **how), x.groups, self.reduce)
        else:
            got = step_mass(x.q, x.kv, x.q_pos, self.reduce, **how)
        rows = [state.layer] if x.phase == "prefill" else state.rows
        for row in rows:
            if _sums(row) is None:
                row[SUMS] = Sums(got[:1, :, :0])
        Sums.add([row[SUMS] for row in rows], got)

    def compress(self, x: AttnInput, state: State) -> Selection | None:
        if (sums := _sums(state.layer)) is None:
            x.note("h2o: this cache was filled without it, so it has no sums of attention; every entry is kept")
            return None
        sums.length = x.start + x.q.shape[2]
        return self._keep(x, [sums], torch.tensor([[sums.length - 1]], device=x.device))

    def evict(self, x: AttnInput, state: State) -> Selection | None:
        sums = [_sums(row) for row in state.rows]
        if not self.evicts(x.step):
            return None
        if any(s is None or s.length is None for s in sums):  # nothing that the budget could be a ratio of
            x.note("h2o: no prompt came, or a rollback forgot its sums of attention; entries are kept until the next one")
            return None
        assert x.q_pos is not None
        return self._keep(x, sums, x.q_pos)

    def evicts(self, step: int) -> bool:
        return (step + 1) % self.slack == 0

    def phase(self, step: int) -> str | None:
        return "step"

    def _keep(self, x: AttnInput, sums: list[Any], now: Tensor) -> Selection | None:
        """What stays of each row; None if nothing goes. now: int `[B, 1]`, the newest position."""
        budgets = [self.budget(s.length) for s in sums]
        if x.kv.capacity <= min(sum(b) for b in budgets):
            return None
        heavy, recent = torch.tensor(budgets, device=x.device).unbind(1)
        length, exists = x.kv.lengths(), x.kv.exists()
        if not bool((length > (heavy + recent)[:, None]).any()):
            return None
        near = exists & (torch.arange(x.kv.capacity, device=x.device) >= (length - recent[:, None])[..., None])
        mass = [s.mass[:, :, : x.kv.capacity] for s in sums]
        score = mass[0] if len(mass) == 1 else torch.cat(mass)
        if self.norm == "mean":
            score = score / (now[..., None] + 1 - x.kv.positions()).clamp(min=1)
        budget = (heavy + recent)[:, None].expand(length.shape)
        # `top_k` breaks ties towards the lower number: turned round, towards the newer entry.
        keep = top_k(score.flip(-1), budget, valid=exists.flip(-1), forced=near.flip(-1)).flip(-1)
        index, count = compact(keep)
        return Selection(trim(index, count).long(), count.long())


def _sums(row: LayerState) -> Sums | None:
    """The sums of a batch row; out of a file they come as tensors."""
    if MASS in row:
        length = int(row.pop(LENGTH))
        row[SUMS] = Sums(row.pop(MASS), None if length < 0 else length)
    return row.get(SUMS)


class Sums:
    """What a row's entries have received so far: mass fp32 `[1, G, M]` in the order of the cache.

    Attributes:
        length: tokens of the prompt when it was last compressed, which fixes the budget, or None.
        steady: the last call brought no wider view, as over stores of captured steps: `mass` stays in its memory.
    """

    def __init__(self, mass: Tensor, length: int | None = None):
        self.mass, self.length, self.steady = mass, length, False

    def saved(self) -> dict[str, Tensor]:
        return {MASS: self.mass, LENGTH: torch.tensor(-1 if self.length is None else self.length)}

    @staticmethod
    def add(rows: list[Sums], more: Tensor) -> None:
        """One row each of more `[B, G, M]`; entries that are new begin with nothing."""
        m = more.shape[2]
        for s in rows:
            s.steady = s.mass.shape[2] >= m
            if not s.steady:
                s.mass = pad(s.mass, (0, m - s.mass.shape[2]))
        torch._foreach_add_([s.mass[:, :, :m] for s in rows], list(more.split(1)))

    def keep(self, selection: Selection) -> None:
        """The cache keeps only these entries: what the others received is forgotten."""
        index = selection.indices.long()
        used = torch.arange(index.shape[2], device=index.device) < selection.full_counts()[..., None]
        mass = self.mass.gather(2, index).masked_fill(~used, 0.0)
        if self.steady:
            self.mass.zero_()[:, :, : index.shape[2]] = mass
        else:
            self.mass = mass
