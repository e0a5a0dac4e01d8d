"""Recycled Attention: full attention now and then, and between those steps the tokens that it looked at."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from ..errors import ConfigError
from ..layout import NO_LIMIT, Layout
from ..lists import compact
from ..scores import fused
from ..scores.observed import best, group_probabilities
from ..scores.window import pool
from .base import AttnInput, Method, State, option

TOKENS = "recycled_attention.tokens"


@dataclass(frozen=True)
class RecycledAttention(Method):
    """Xu et al. 2024, "Recycled Attention: Efficient inference for long-context language models" (arXiv 2411.05787),
    later named RefreshKV.

    Decode. A full step attends to everything and keeps, per layer and kv head, the tokens its query looks at most:
    probabilities, the maximum of the query heads, maxima over `kernel` neighbours, the best `budget` of them (None: the
    share `fraction` of the row's tokens). A partial step attends to those and to all tokens since, and each token since
    takes the place of the weakest one, so the set never grows. Every `stride` steps a row decides: a full step if the
    cosine between its query (mean over heads) and that of its last full step is below `tau`, at once if `tau` is None
    or the prompt has just ended. Nothing is dropped from the cache.

    Rows of a batch decide for themselves, on the device, so that steps can be captured; for that the probabilities are
    computed at every `stride`-th step, used or not. Differs from the paper: the first decode step is a full one, where
    the paper starts from what the last token of the prompt looked at.
    """

    budget: int | None = option(None, low=1, help="tokens a query reads between full steps; none: by fraction")
    fraction: float = option(0.125, low=0, high=1, help="fraction of the tokens read between full steps")
    stride: int = option(10, low=1, help="decode steps between two decisions on a full one")
    tau: float | None = option(0.85, help="query cosine below which a step is full; none: always")
    kernel: int = option(7, low=1, help="neighbouring tokens pooled together, an odd number")

    id: ClassVar[str] = "recycled_attention"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Xu et al. 2024, arXiv 2411.05787"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "qwen2": {"tau": 0.95},
        "fixed": {"tau": None, "stride": 50},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ConfigError(f"recycled_attention: kernel expected an odd number, got {self.kernel}")

    @property
    def min_length(self) -> int:
        return 0 if self.budget is None else self.budget + 1

    def phase(self, step: int) -> str | None:
        if step == 0:
            return "full"
        return "reuse" if step % self.stride else "check"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if self.fraction == 1 if self.budget is None else x.kv.capacity <= self.budget:
            return None
        held: Recycled | None = state.layer.get(TOKENS)
        if held is None or held.begin.shape[0] != x.q.shape[0] or x.step == 0 or x.step < held.step:
            state.layer[TOKENS] = self._select(x).into(held)
            return None
        if x.step % self.stride:
            return held.layout(x)
        if self.tau is None:
            state.layer[TOKENS] = self._select(x).into(held)
            return None
        full = cosine_similarity(_direction(x), held.query, dim=-1) < self.tau  # [B]
        layout = held.layout(x, full)
        state.layer[TOKENS] = self._select(x).where(full, held).into(held)
        return layout

    def _select(self, x: AttnInput) -> Recycled:
        """What the queries of this step look at."""
        assert x.q_pos is not None
        score = group_probabilities(x.q, x.kv, x.q_pos, scale=x.scale, softcap=x.softcap)
        score = pool(score, self.kernel, "max")
        plain = x.kv.bias is None  # the first entries exist
        valid = None if plain else x.kv.exists()
        have = x.kv.lengths() if valid is None else valid.sum(-1)  # [B, G]
        if self.budget is None:
            # In fp64 as on the host: a set larger than its list would push the newest token out of `extend`.
            width, limit = int(x.kv.capacity * self.fraction), (have.double() * self.fraction).long().clamp(min=1)
        else:
            width, limit = self.budget, torch.full_like(have, self.budget)
        entries, rank, count = best(score, max(1, width), valid=valid, length=have if plain else None)
        there = torch.arange(entries.shape[-1], device=x.device) < count[..., None]
        return Recycled(entries, torch.where(there, rank, NO_LIMIT), limit, x.q_pos[:, 0] + 1, _direction(x), x.step)


@dataclass(frozen=True)
class Recycled:
    """What the last full step of each row looked at. It stays in the same memory, where captured steps read it.

    Attributes:
        entries: int32 `[B, G, K]`, ascending. rank: int32 `[B, G, K]`, 0 for the best one, NO_LIMIT for padding.
        limit: int64 `[B, G]`, the size of the set. begin: int64 `[B]`, the position after that of the full step's token.
        query: `[B, D]`, the mean of its query heads. step: the decode step of the last selection.
    """

    entries: Tensor
    rank: Tensor
    limit: Tensor
    begin: Tensor
    query: Tensor
    step: int

    def layout(self, x: AttnInput, full: Tensor | None = None) -> Layout:
        """The set of this step: all tokens since the selection, and the best of the others. Rows of `full` `[B]`: all."""
        assert x.q_pos is not None
        if x.kv.pos is None and (kernels := fused.kept(x.q)) is not None:  # entries are positions: tokens join the list
            entries, count = kernels.extend(self.entries, self.begin, x.q_pos, 1, rank=self.rank, limit=self.limit)
            window = None if full is None else full[:, None].to(torch.int32) * NO_LIMIT
            return Layout(x.shape, window=window, entries=entries[:, :, None], entry_count=count[:, :, None])
        since = (x.q_pos[:, 0] + 1 - self.begin).clamp(min=1)[:, None]  # [B, 1]; this token included
        left = self.limit - since + 1
        window = torch.minimum(since, self.limit + 1)
        if full is not None:
            left = left.masked_fill(full[:, None], 0)
            window = window.masked_fill(full[:, None], NO_LIMIT)
        slots, count = compact(self.rank < left[..., None])
        return Layout(
            x.shape,
            q_pos=x.layout_pos(),
            window=window.to(torch.int32),
            entries=self.entries.gather(-1, slots.long())[:, :, None],
            entry_count=count[:, :, None],
        )

    # ------------------------------------------------------------------ a value of `state.layer`
    def where(self, rows: Tensor, old: Recycled) -> Recycled:
        """This selection for the rows `[B]` where it is due, the old one for the others."""
        wide = max(self.entries.shape[-1], old.entries.shape[-1])
        new, old = (replace(t, entries=_widen(t.entries, wide, 0), rank=_widen(t.rank, wide, NO_LIMIT)) for t in (self, old))
        pick = {n: torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for n, a, b in new._pairs(old)}
        return replace(self, **pick)

    def into(self, old: Recycled | None) -> Recycled:
        """This selection in the memory of an old one of its shape, or in its own."""
        if old is None or any(a.shape != b.shape or a.dtype != b.dtype for _, a, b in self._pairs(old)):
            return self
        for _, new, there in self._pairs(old):
            there.copy_(new)
        return replace(old, step=self.step)

    def fork(self) -> Recycled:
        return replace(self, **{n: a.clone() for n, a, _ in self._pairs(self)})

    def reorder(self, index: Tensor) -> None:
        for name, t, _ in self._pairs(self):
            object.__setattr__(self, name, t.index_select(0, index.to(t.device)))

    def _pairs(self, other: Recycled) -> list[tuple[str, Tensor, Tensor]]:
        return [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "step"]


def _widen(t: Tensor, wide: int, fill: int) -> Tensor:
    return t if t.shape[-1] == wide else pad(t, (0, wide - t.shape[-1]), value=fill)


def _direction(x: AttnInput) -> Tensor:
    """fp32 `[B, D]`, the mean of a row's query heads, rotated as they are."""
    return x.q.float().mean((1, 2))
