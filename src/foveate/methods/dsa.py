"""DeepSeek Sparse Attention: a learned indexer ranks all earlier tokens, all heads of a layer read the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import profile as profiles
from ..errors import ConfigError, UnsupportedError
from ..layout import Layout
from ..scores.entries import best_entries
from ..scores.indexer import Indexer, IndexKeys, flat
from ..scores.keys import BUDGET, GPU_BUDGET, pieces
from .base import AttnInput, Method, State, option

KEYS, INDEXER = "dsa.keys", "dsa.indexer"


@dataclass(frozen=True)
class DSA(Method):
    """DeepSeek-AI 2025, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention".

    An indexer of a few small heads scores every earlier token, sum_j w_j ReLU(q_j . k), and all attention heads of the
    layer read the `budget` tokens of the highest score, their own token among them; equal scores (ReLU makes many zeros)
    go to the lower position. `fp8` rounds the indexer's queries and keys to e4m3 after a Hadamard transform, with scales
    that are powers of two, which stores 132 bytes a token at a width of 128.

    The weights come from a `profile` whose tensors are `layer.N.q` [heads, width, Fq], `layer.N.k` [width, Fk],
    `layer.N.w` [heads, Fq] and, optionally, `layer.N.norm` [2, width], and whose options may hold `rope_dims` and `theta`.
    A published indexer reads the hidden state and a latent query; here it reads what attention is given: the queries
    and keys of all heads before rotation, side by side (F = heads * head dim) or their mean (F = head dim), so weights
    must be trained for that. There is no training here, and no latent (MLA) attention. The rotation is the half-split one
    that trained indexers expect, not the interleaved one of the published demo. The lists of a prompt of N tokens take 4 N
    * budget bytes, and scores of all pairs are computed, some rows at a time.
    """

    budget: int = option(2048, low=1, help="tokens a query reads")
    fp8: bool = option(True, help="round the indexer's queries and keys to e4m3")
    profile: str | None = option(None, help="folder with the trained weights of the indexer")

    id: ClassVar[str] = "dsa"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    share: ClassVar[str] = "group"
    needs: ClassVar[str] = "weights"
    source: ClassVar[str] = "DeepSeek-AI 2025, DeepSeek-V3.2-Exp technical report"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"budget": 512}}

    @property
    def min_length(self) -> int:
        return self.budget + 1

    def refuses(self, recipe: Any) -> str | None:
        if recipe.evicts:
            return f"it ranks whole tokens, and {recipe.cache.id} keeps other tokens for each kv head"
        return None

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        indexer = self._indexer(x, state)
        if x.rope is None:
            raise UnsupportedError("dsa: needs queries and keys before rotation, and this model's rotation is not available")
        if x.kv.pos is not None:
            raise UnsupportedError("dsa: expected a cache of all tokens, got one with evicted entries")
        m = x.start + x.q.shape[2] if x.phase == "prefill" else x.kv.capacity
        if m <= self.budget:
            return None
        keys = state.layer.setdefault(KEYS, IndexKeys())
        assert x.q_pos is not None
        with torch.no_grad():
            if x.phase == "decode":
                entries, count = best_entries(keys.rank(x, indexer, state.step), self.budget, length=x.kv.len)
                return Layout(x.shape, q_pos=x.layout_pos(), entries=entries[:, :, None], entry_count=count[:, :, None])
            keys.update(x, indexer)
            entries, count = self._best(x, x.q_pos, indexer, keys, m)
        return Layout(
            x.shape,
            q_pos=x.layout_pos(),
            entries=entries[:, None],
            entry_count=count[:, None],
        )

    def _best(self, x: AttnInput, pos: Tensor, indexer: Indexer, keys: IndexKeys, m: int) -> tuple[Tensor, Tensor]:
        """Tokens of each row of a prompt, int32 `[B, N, budget]`, ascending, and counts `[B, N]`, of its m tokens."""
        assert x.rope is not None
        (b, h, n, d), kernels = x.q.shape, keys.twin(x, indexer)
        entries = torch.empty(b, n, self.budget, dtype=torch.int32, device=x.device)
        count = torch.empty(b, n, dtype=torch.int32, device=x.device)
        size, budget = 4 * m, 4 * BUDGET  # what sorting scores in plain code takes
        if kernels is not None:
            size, budget = m + 4 * h * d + 8 * indexer.query[..., 0].numel(), GPU_BUDGET
        for lo, hi in pieces(n, b * size, budget):
            at = pos[:, lo:hi]
            q, w = indexer.queries(flat(x.q[:, :, lo:hi], at, x.rope, indexer.query.shape[2]), at)
            score = keys.score(q, w, at, m, kernels)
            entries[:, lo:hi], count[:, lo:hi] = best_entries(score, self.budget, length=at + 1)
        return entries, count

    def _indexer(self, x: AttnInput, state: State) -> Indexer:
        """This layer's weights on the device. ConfigError without a profile that fits."""
        held = state.run.setdefault(INDEXER, {})
        at = (self.profile, self.fp8, x.layer, x.device)
        if at in held:
            return held[at]  # type: ignore[no-any-return]
        profile = profiles.of(self.id, self.profile)
        if profile is None:
            raise ConfigError(
                "dsa: expected a profile with the weights of a trained indexer (layer.N.q, layer.N.k, layer.N.w), got none; "
                "give the folder as dsa:profile=FOLDER"
            )
        tensors: dict[str, Tensor] = {}
        for name in ("q", "k", "w", "norm"):
            t = profile.tensors.get(f"layer.{x.layer}.{name}")
            if t is None and name != "norm":
                raise ConfigError(f"dsa: expected 'layer.{x.layer}.{name}' in the profile {self.profile!r}, got none")
            if t is not None:
                tensors[name] = t.to(x.device, torch.float32)
        width = tensors["k"].shape[0]
        norm = tensors.get("norm", torch.stack([torch.ones(width), torch.zeros(width)]).to(x.device))
        rope, theta = int(profile.options.get("rope_dims", min(64, width))), float(profile.options.get("theta", 1e4))
        indexer = Indexer(tensors["q"], tensors["k"], tensors["w"], norm, rope, theta, self.fp8)
        indexer.check(x.q.shape[1], x.groups, x.q.shape[3])
        held[at] = indexer
        return indexer
