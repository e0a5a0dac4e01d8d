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
from ..scores import fused
from ..scores.entries import best_entries
from ..scores.observed import best, step_mass
from ..scores.window import group_reduce, window_mass
from ..select import top_k
from .base import AttnInput, LayerState, Method, State, option

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
    give none. `rows` None means draft + 1, the verification of a full draft. From step `draft` on, which no draft reaches,
    dense steps come at every draft + 1st, whatever was rolled back. All can be captured: a draft replays the step that makes
    the set and the one that uses it, from one verification to the next.
    """

    draft: int = option(8, low=1, help="decode steps that one set serves")
    ratio: float = option(0.05, low=0.0, high=1.0, help="fraction of the tokens that a query reads")
    least: int = option(128, low=1, help="fewest tokens a query reads")
    rows: int | None = option(None, low=1, help="queries of a pass that scores; none: draft + 1")
    warm: bool = option(False, help="take scores from prompts too")
    dense_layers: int = option(0, low=0, help="first layers, which stay dense")

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

    def phase(self, step: int) -> str | None:
        """The first step of a draft makes the set, the others use it. Later a dense step falls on the first or the last
        place of a round, by whether a pass came before."""
        if step < self.draft:
            return "draft" if step else "set"
        return {0: "first", self.draft: "last"}.get(step % (self.draft + 1), "between")

    def resumes(self, layer: int, rows: list[LayerState]) -> bool:
        seen = [row.get(SEEN) for row in rows]
        return layer < self.dense_layers or (bool(seen) and all(isinstance(s, Seen) and s.alive for s in seen))

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        old = state.layer.pop(SEEN, None)
        n = x.q.shape[2]
        if x.layer < self.dense_layers or (n > self.window and not self.warm):
            return
        assert x.q_pos is not None
        n = min(n, self.window)
        at = x.q_pos[:, -n:]
        known = None if lse is None else lse[:, :, -n:]  # of a verification inside a graph
        score = mean_mass(x.q[:, :, -n:], x.kv, at, scale=x.scale, softcap=x.softcap, lse=known)
        state.layer[SEEN] = Seen(at[:, :1], n - 1, score=score).into(old)

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        seen = [row.get(SEEN) for row in state.rows]
        for s in seen:
            if isinstance(s, Pass):
                s.step(x.step)
        if x.layer < self.dense_layers or x.kv.capacity <= self.least:
            return None
        held = state.layer.get(HELD)
        if x.step == 0 or not isinstance(held, Held) or not held.alive or self._missed(held, seen):
            held = self._take(x, state, seen)
        elif self._due(x.step, held):
            held = None
        if held is None:
            self._look(x, state)
            return None
        held.step(x.step)
        assert x.q_pos is not None
        more = max(self.window, self.draft + 1) + self.draft  # a pass and the drafts after it
        if x.kv.pos is None and held.above < more and (kernels := fused.kept(x.q)) is not None:  # tokens join the list
            entries, count = kernels.extend(held.index, held.first[:, 0], x.q_pos, more, used=held.count)
            return Layout(x.shape, entries=entries[:, :, None], entry_count=count[:, :, None])
        return Layout(
            x.shape,
            q_pos=x.layout_pos(),
            window=(x.q_pos[:, -1:] + 1 - held.first).to(torch.int32),
            entries=held.index[:, :, None].clone(),  # the next set takes its memory, and others may keep this plan
            entry_count=held.count[:, :, None].clone(),
        )

    @staticmethod
    def _missed(held: Held, seen: list[Any]) -> bool:
        """A pass came since the set whose age the host counts, maybe a replayed step's set, too: make it again."""
        return held.passes != _names(seen)

    def _due(self, step: int, held: Held) -> bool:
        """Whether a dense step makes the next set: by the tokens since the pass, later by the step's number alone."""
        if step < self.draft:
            return held.since >= self.draft
        return step % (self.draft + 1) == held.place

    # ------------------------------------------------------------------ making a set
    def _take(self, x: AttnInput, state: State, seen: list[Any]) -> Held | None:
        """The set that the last multi-token call gives, one row of the batch after the other; None if a row has none."""
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
        most = max(self.least, int(self.ratio * x.kv.capacity) + 1)
        plain = x.kv.pos is None and x.kv.bias is None  # each head takes as many of the best as it may
        if plain and (kernels := fused.kept(x.q)) is not None and most <= kernels.HELD:
            entries, there = best_entries(score, most, length=first, recent=0)
            how: dict[str, Any] = dict(ago=ago, ratio=self.ratio, least=self.least, capacity=x.kv.capacity)
            index, count = kernels.strongest(entries, there, score, first[:, 0], x.kv.len, x.q_pos[:, -1:], **how)
        else:
            length = x.q_pos[:, -1:] + 1 - ago  # [B, 1], text positions: the recent part counts tokens, kept or not
            budget = (self.ratio * (x.kv.lengths() - ago).double() - 1e-9).ceil().long().clamp(min=self.least)
            k = (budget - (length - first)).clamp(min=0)  # [B, G]
            if plain:
                entries, rank, there = best(score, most, length=first)
                slots, count = compact(
                    (rank < k[..., None]) & (torch.arange(rank.shape[-1], device=k.device) < there[..., None])
                )
                index = entries.gather(-1, slots.long())
            else:
                index, count = compact(top_k(score, k, valid=x.kv.exists() & (x.kv.positions() < first[..., None])))
        held = Held(first.clone(), above, since, index=index[..., :most].contiguous(), count=count)
        old = state.layer.get(HELD)
        held.sure, held.draft, held.passes = above, self.draft, _names([row.get(SEEN) for row in state.rows])
        if ago or x.step % (self.draft + 1) == self.draft:
            held.place = self.draft
        elif x.step and isinstance(old, Held):
            held.place = old.place  # recorded steps go by it
        held.number = x.step - 1 if ago else x.step  # a set that was taken serves this very step
        state.layer[HELD] = held = held.into(old)
        return held


def mean_mass(
    q: Tensor, kv: KV, q_pos: Tensor, *, scale: float, softcap: float | None = None, lse: Tensor | None = None
) -> Tensor:
    """Mean probability of each entry over the query heads of its kv head and the rows that can see it: fp32 `[B, G, M]`.

    q `[B, H, N, D]` at text positions q_pos int `[B, N]`. An entry no row sees has 0. lse `[B, H, N]`, where attention has
    returned it: on a GPU one kernel then reads the keys once.
    """
    if lse is not None and (kernels := fused.few(q)) is not None and kernels.reads(q, kv):
        found: Tensor = kernels.mean_mass(q, kv, q_pos, lse, scale=scale, softcap=softcap)
        return found
    if q.shape[2] == 1:  # it sees all there is
        return step_mass(q, kv, q_pos, "mean", scale=scale, softcap=softcap)
    mass = group_reduce(window_mass(q, kv, q_pos, scale=scale, softcap=softcap, lse=lse), kv.shape[1], "mean")
    last = q_pos[:, -1:, None] + 1  # rows stand at consecutive positions
    return mass / (last - kv.positions()).clamp(1, q.shape[2])


@dataclass
class Pass:
    """A full pass over a few queries, and what a rollback leaves of it.

    Attributes:
        first: int64 `[B, 1]`, position of its first query. above: tokens in the cache after that one.
        since: tokens appended after the pass. alive: False once a rollback has taken the first query.
        number: the last decode step that was counted.
    """

    first: Tensor
    above: int
    since: int = 0
    alive: bool = True
    number: int = -1

    def step(self, number: int) -> None:
        """The token of this decode step is in the cache, and those of steps before it that were replayed."""
        more, self.number = number - self.number, number
        self.above, self.since = self.above + more, self.since + more

    def passed(self, number: int) -> None:
        if number >= 0:  # a step came after the call of several tokens
            self.step(number)

    def truncate(self, n: int) -> None:
        self.above, self.since = self.above - n, max(0, self.since - n)
        self.alive = self.alive and self.above >= 0

    def fork(self) -> Self:
        return replace(self)


@dataclass
class Seen(Pass):
    """The last queries of one row's multi-token call.

    Attributes:
        score: fp32 `[1, G, M]`, what they looked at; once kept, with room behind M, zeros, for calls to come: captured steps
            find the next scores where these are.
        name: of this pass, like no other's.
    """

    score: Tensor = field(kw_only=True)
    name: object = field(default_factory=object, kw_only=True)

    def into(self, old: Any) -> Seen:
        """These scores in the memory of an old pass of the same row, or in new memory with room."""
        m, score = self.score.shape[-1], self.score
        if isinstance(old, Seen) and old.score.shape[-1] >= m and _takes(old.score[..., :m], score):
            first, kept = old.first, old.score
        else:
            first, kept = torch.empty_like(self.first), pad(score, (0, max(m // 8, 128)))
        kept[..., :m], kept[..., m:] = score, 0
        return replace(self, first=first.copy_(self.first), score=kept)

    def fork(self) -> Seen:
        return replace(self, first=self.first.clone(), score=self.score.clone())


@dataclass
class Held(Pass):
    """The set in use. index: int32 `[B, G, C]`, entries. count: int32 `[B, G]`. place: of a round's dense step, rounds
    being draft + 1 steps. sure: `above`, or less where a replayed dense step may have made the set anew. passes: names of
    the last passes before it, a row each, None where there was none."""

    index: Tensor = field(kw_only=True)
    count: Tensor = field(kw_only=True)
    sure: int = field(default=0, kw_only=True)
    place: int = field(default=0, kw_only=True)
    draft: int = field(default=1, kw_only=True)
    passes: list[object] = field(default_factory=list, kw_only=True)

    def step(self, number: int) -> None:
        self.sure += number - self.number
        super().step(number)

    def passed(self, number: int) -> None:
        super().passed(number)
        newest = number - (number - self.place) % (self.draft + 1)  # the last dense step
        if newest >= self.draft:
            self.sure = min(self.sure, number - newest)

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self.sure -= n
        self.alive = self.alive and self.sure >= 0

    def into(self, old: Any) -> Held:
        """This set in the memory of an old one of its shape, which captured steps read, or in its own."""
        names = ("first", "index", "count")
        if not isinstance(old, Held) or not all(_takes(getattr(old, n), getattr(self, n)) for n in names):
            return self
        for name in names:
            getattr(old, name).copy_(getattr(self, name))
        return replace(self, first=old.first, index=old.index, count=old.count)

    def fork(self) -> Held:
        return replace(self, first=self.first.clone(), index=self.index.clone(), count=self.count.clone())

    def reorder(self, index: Tensor) -> None:
        self.passes = [self.passes[i] for i in index.tolist()]
        index = index.to(self.index.device)
        self.index, self.count, self.first = (t.index_select(0, index) for t in (self.index, self.count, self.first))


def _names(seen: list[Any]) -> list[object]:
    return [getattr(s, "name", None) for s in seen]


def _takes(old: Tensor, new: Tensor) -> bool:
    """Whether `new` can be written over `old`."""
    like = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return like and (torch.is_inference_mode_enabled() or not old.is_inference())
