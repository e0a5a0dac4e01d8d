"""PillarAttn: decode steps attend to the tokens that the last full pass of several queries looked at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kv import KV
from ..layout import Layout
from ..lists import compact
from ..scores.window import group_reduce, window_mass
from ..select import top_k
from .base import AttnInput, Method, State, option

SEEN, HELD = "pillar_attn.seen", "pillar_attn.held"


@dataclass(frozen=True)
class PillarAttn(Method):
    """Zhao et al. 2025, "Accelerating Large-Scale Reasoning Model Inference with Sparse Self-Speculative Decoding"
    (arXiv 2512.01278).

    A full pass over a few queries, a verification, gives each key the mean probability over the query heads of its kv
    head and over these queries. Decode steps after it attend to the keys with the highest mean before the pass and to
    everything from its first query on; both together are max(least, ratio * M) of M tokens. The set is made once, at
    the first step, and serves `draft` steps. Then, without a verification (plain generation), a step is dense and its
    own query's probabilities make the next set. Inside `foveate.speculate.generate` the passes are the verifications,
    and the output is that of dense attention.

    After a prompt no scores exist, and the first step is dense (published: the whole first cycle). With `warm` the last
    `rows` queries of any multi-token call give scores; without it calls of more than `rows` tokens count as prompts and
    give none. `rows` None means draft + 1, the verification of a full draft.
    """

    draft: int = option(8, low=1)
    ratio: float = option(0.05, low=0.0, high=1.0)
    least: int = option(128, low=1)
    rows: int | None = option(None, low=1)
    warm: bool = option(False)
    dense_layers: int = option(0, low=0)

    id: ClassVar[str] = "pillar_attn"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Zhao et al. 2025, arXiv 2512.01278"
    observes: ClassVar[tuple[str, ...]] = ("prefill",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"ratio": 0.1}, "paper": {"least": 192}}

    @property
    def min_length(self) -> int:
        return self.least + 1

    @property
    def window(self) -> int:
        """Most queries of a pass that are looked at."""
        return self.draft + 1 if self.rows is None else self.rows

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        state.layer.pop(SEEN, None)
        n = x.q.shape[2]
        if x.layer < self.dense_layers or (n > self.window and not self.warm):
            return
        assert x.q_pos is not None
        n = min(n, self.window)
        at = x.q_pos[:, -n:]
        score = mean_mass(x.q[:, :, -n:], x.kv, at, scale=x.scale, softcap=x.softcap)
        state.layer[SEEN] = Seen(at[:, :1], n - 1, score=score)

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        seen = [row.get(SEEN) for row in state.rows]
        for s in seen:
            if isinstance(s, Pass):
                s.step()
        if x.layer < self.dense_layers or x.kv.capacity <= self.least:
            return None
        held = state.layer.get(HELD)
        if x.step == 0 or not isinstance(held, Held) or not held.alive:
            held = self._take(x, state, seen)
        if held is None or held.since >= self.draft:
            self._look(x, state)
            return None
        held.step()
        assert x.q_pos is not None
        return Layout(
            x.shape,
            q_pos=x.layout_pos(),
            window=(x.q_pos[:, -1:] + 1 - held.first).to(torch.int32),
            entries=held.index[:, :, None],
            entry_count=held.count[:, :, None],
        )

    # ------------------------------------------------------------------ making a set
    def _take(self, x: AttnInput, state: State, seen: list[Any]) -> Held | None:
        """The set that the last multi-token call gives, one row of the batch after the other; None if a row has none."""
        state.layer.pop(HELD, None)
        rows = [s for s in seen if isinstance(s, Seen) and s.alive and s.since <= self.draft]
        if not rows or len(rows) < len(seen):
            return None
        m = x.kv.capacity
        score = torch.cat([pad(s.score, (0, m - s.score.shape[-1])) for s in rows])  # or cut, after a rollback
        first, above, since = torch.cat([s.first for s in rows]), min(s.above for s in rows), rows[0].since
        return self._select(x, state, score, first, above - 1, since - 1, since)  # this step is counted again

    def _look(self, x: AttnInput, state: State) -> None:
        """A dense step: its query's probabilities make the next set."""
        assert x.q_pos is not None
        score = mean_mass(x.q, x.kv, x.q_pos, scale=x.scale, softcap=x.softcap)
        self._select(x, state, score, x.q_pos[:, :1], 0, 0, 0)

    def _select(self, x: AttnInput, state: State, score: Tensor, first: Tensor, above: int, since: int, ago: int) -> Held:
        """The best entries before position `first` `[B, 1]`: as many as the budget leaves beside the tokens from `first`
        on. Both go by the cache as it was `ago` tokens earlier, right after the pass."""
        assert x.q_pos is not None
        length = x.q_pos[:, -1:] + 1 - ago  # [B, 1], text positions: the recent part counts tokens, kept or not
        budget = (self.ratio * (x.kv.lengths() - ago).double() - 1e-9).ceil().long().clamp(min=self.least)
        k = (budget - (length - first)).clamp(min=0)  # [B, G]
        free = x.kv.exists() & (x.kv.positions() < first[..., None])
        index, count = compact(top_k(score, k, valid=free))
        most = max(self.least, int(self.ratio * x.kv.capacity) + 1)
        held = Held(first, above, since, index=index[..., :most].contiguous(), count=count)
        state.layer[HELD] = held
        return held


def mean_mass(q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Mean probability of each entry over the query heads of its kv head and the rows that can see it: fp32 `[B, G, M]`.

    q `[B, H, N, D]` at text positions q_pos int `[B, N]`. An entry no row sees has 0.
    """
    mass = group_reduce(window_mass(q, kv, q_pos, scale=scale, softcap=softcap), kv.shape[1], "mean")
    last = q_pos[:, -1:, None] + 1  # rows stand at consecutive positions
    return mass / (last - kv.positions()).clamp(1, q.shape[2])


@dataclass
class Pass:
    """A full pass over a few queries, and what a rollback leaves of it.

    Attributes:
        first: int64 `[B, 1]`, position of its first query. above: tokens in the cache after that one.
        since: tokens appended after the pass. alive: False once a rollback has taken the first query.
    """

    first: Tensor
    above: int
    since: int = 0
    alive: bool = True

    def step(self) -> None:
        """One more token is in the cache."""
        self.above, self.since = self.above + 1, self.since + 1

    def truncate(self, n: int) -> None:
        self.above, self.since = self.above - n, max(0, self.since - n)
        self.alive = self.alive and self.above >= 0

    def fork(self) -> Self:
        return replace(self)


@dataclass
class Seen(Pass):
    """The last queries of one row's multi-token call. score: fp32 `[1, G, M]`, what they looked at."""

    score: Tensor = field(kw_only=True)


@dataclass
class Held(Pass):
    """The set in use. index: int32 `[B, G, C]`, entries. count: int32 `[B, G]`."""

    index: Tensor = field(kw_only=True)
    count: Tensor = field(kw_only=True)

    def reorder(self, index: Tensor) -> None:
        index = index.to(self.index.device)
        self.index, self.count, self.first = (t.index_select(0, index) for t in (self.index, self.count, self.first))
