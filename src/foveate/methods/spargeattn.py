"""SpargeAttn: pooled blocks chosen by cumulative mass, where a block is alike enough for its mean to speak for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..profile import Profile, of
from ..scores.keys import pieces
from ..scores.pooled import block_pool, pool_keys
from ..scores.similarity import Trust, key_similarity, list_cost, self_similarity, trusted_lists
from .base import AttnInput, Method, State, option, shared
from .search import Knob, Search, Target

Threshold = float | Tensor  # one for all heads, or [H, 1, 1]


@dataclass(frozen=True)
class SpargeAttn(Method):
    """Zhang et al. 2025, "SpargeAttention: Accurate and Training-free Sparse Attention Accelerating Any Model Inference"
    (arXiv 2502.18137).

    Mean query times mean key, and per block of queries the best key blocks that hold `cdf` of the softmax over them, or
    with `topk` that fraction of the visible ones. A block whose vectors have a mean cosine of `theta` or less (keys after
    their common mean is taken off) is not trusted: such a key block is computed for all rows and competes with none, and
    such a query block computes everything. The first key block and those on the diagonal are always in, counted first.
    `profile` names a folder of `foveate calibrate` with cdf and theta of each layer and head; `share` "group" gives the
    query heads of a kv head the union of their blocks.

    Differs from the published code, which forces no diagonal (rows may lose their own token, or all keys), does not mask
    inside diagonal blocks in some kernels, turns a row without trusted keys to NaN, and counts `topk` by the whole row, so
    that early rows keep everything. Not here: its kernel's skip of P V below a running maximum (lambda) and its int8
    products. Both change the arithmetic and name no pairs. In language models keys of 64 tokens are rarely alike: at the
    published theta nearly all is computed, so use the preset or a profile.
    """

    cdf: float = option(0.98, low=0, high=1, help="share of the estimated attention mass to reach")
    theta: float = option(0.6, help="mean cosine above which a block is trusted")
    topk: float | None = option(None, low=0, high=1, help="share of the visible blocks read, instead of cdf")
    block_q: int = option(128, low=16, help="queries of a block")
    block_k: int = option(64, low=16, help="keys of a block")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "spargeattn"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Zhang et al. 2025, arXiv 2502.18137"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "topk": {"topk": 0.5, "theta": -0.1},
        "8k": {"cdf": 0.9, "theta": -0.1},
    }
    knob: ClassVar[Knob | None] = Knob("cdf", 0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None and self.topk is not None:
            raise ConfigError("spargeattn: a profile holds cdf per head, expected no topk beside it")

    @property
    def min_length(self) -> int:
        """One block of queries sees nothing but forced blocks."""
        return self.block_q + 1

    def search(self, target: Target) -> Search | None:
        """The paper's search, for a relative L1 error ("loss"), and one by head for mass; others go to the generic one."""
        from ._allocation import own_lists
        from .spargeattn_search import SpargeSearch, by_head

        plain = replace(self, topk=None, profile=None)
        if target.by_head:
            own_lists(self)
            return by_head(plain, target)
        return SpargeSearch(plain, target.value) if target.kind == "loss" else None

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        return None if x.start + x.q.shape[2] < self.min_length else self.planned(x, *self.thresholds(x, state))

    def thresholds(self, x: AttnInput, state: State) -> tuple[Threshold, Threshold]:
        """(cdf, theta) of this layer: numbers, or from the profile one for each head `[H, 1, 1]`."""
        if (found := of(self.id, self.profile)) is None:
            return self.cdf, self.theta
        key = f"spargeattn.profile {self.profile} {x.device}"
        if key not in state.run:  # once per run: a copy to the device may wait for it
            state.run[key] = [t.to(x.device)[..., None, None] for t in self._profiled(found, [x.layers, x.q.shape[1]])]
        cdf, theta = state.run[key]
        return cdf[x.layer], theta[x.layer]

    def _profiled(self, found: Profile, want: list[int]) -> list[Tensor]:
        """cdf and theta, `[layers, H]` each."""
        for name in ("block_q", "block_k"):
            if (made := found.options.get(name, getattr(self, name))) != getattr(self, name):
                raise ConfigError(f"spargeattn: profile was made with {name}={made}, but {name} is {getattr(self, name)}")
        out = []
        for name in ("cdf", "theta"):
            if (got := found.tensors.get(name)) is None or list(got.shape) != want:
                have = "none" if got is None else list(got.shape)
                raise ConfigError(f"profile: expected {name} [layers, heads] = {want} in {self.profile!r}, got {have}")
            out.append(got)
        return out

    def planned(self, x: AttnInput, cdf: Threshold, theta: Threshold) -> Layout:
        """The layout under these thresholds."""
        b, h, g, m = x.q.shape[0], x.q.shape[1], x.groups, x.start + x.q.shape[2]
        offset, first, nk = x.offset(self.block_q), x.start // self.block_q, -(-m // self.block_k)
        qbar, kbar = block_pool(x.q, self.block_q, offset=offset), pool_keys(x.kv, self.block_k)[:, :, :nk]
        nq, lists = qbar.shape[2], g if self.share == "group" else h
        rows = (self_similarity(x.q, self.block_q, offset=offset)[..., None] > theta).expand(b, h, -1, 1)[..., 0]
        keys = key_similarity(x.kv, m, self.block_k).repeat_interleave(h // g, 1)[:, :, None] > theta
        trust = Trust(cdf, self.topk, rows, keys[:, :, 0], self.block_q, self.block_k)
        parts = [
            trusted_lists(qbar, kbar, trust, lo, hi, first=first, scale=x.scale, softcap=x.softcap, lists=lists)
            for lo, hi in pieces(nq, list_cost(qbar, nk))
        ]
        tiles, count = parts[0] if len(parts) == 1 else (torch.cat(some, 2) for some in zip(*parts, strict=True))
        return Layout(
            x.shape,
            block_q=self.block_q,
            q_offset=offset,
            tile_width=self.block_k,
            q_pos=x.layout_pos(),
            tiles=tiles,
            tile_count=count,
        )
