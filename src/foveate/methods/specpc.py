"""SpecPC: prompt tokens ranked by the attention of a small draft model, before the target sees any of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from ..errors import ConfigError
from ..scores.window import row_mass
from .base import AttnInput, Method, State, option

PROMPT, SCORE = "specpc.prompt", "specpc.score"


@dataclass(frozen=True)
class SpecPC(Method):
    """Galim et al. 2025, "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), SpecPC.

    The draft side of prompt compression: a recipe for the draft model that computes dense attention and watches it, and
    the rule that turns what it saw into kept positions; `foveate.speculate.compress_prompt` runs both. The last `window`
    prompt tokens, weighted linearly from 0 to 1, and `lookahead` - 1 generated tokens, with weight 1, are the queries of
    all layers from `first_layer` on. A prompt token scores the highest probability that any of them, in any head and
    layer, gives it (`reduce="sum"`: their sum), pooled over `pool` tokens. The best bring their `neighbors` nearest
    tokens along, most important first, until `capacity` tokens are together, the last `window` and the first `prefix`
    ones (a system prompt; the published code protects none) included. The defaults are those for a draft of
    Llama-3.2-1B; preset "qwen" is for Qwen2.5-0.5B.
    """

    capacity: int = option(2048, low=1, help="prompt tokens that stay")
    window: int = option(64, low=1, help="last prompt tokens, which vote and always stay")
    prefix: int = option(0, low=0, help="first tokens of the text, always included")
    pool: int = option(32, low=1, help="neighbouring tokens pooled together")
    neighbors: int = option(32, low=1, help="nearest tokens that a chosen one brings along")
    pooling: str = option("max", choices=("avg", "max"), help="how neighbouring scores are pooled: mean or maximum")
    reduce: str = option("max", choices=("max", "sum"), help="how the scores of queries, heads and layers are joined")
    lookahead: int = option(1, low=1, help="tokens the draft looks ahead; 1: none generated")
    first_layer: int = option(8, low=0, help="first layer that votes, counted from 0")
    weighted: bool = option(True, help="give later queries of the window more weight")

    id: ClassVar[str] = "specpc"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Galim et al. 2025, arXiv 2506.08373"
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"qwen": {"pool": 64, "neighbors": 64}, "8k": {"capacity": 1024}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity < self.window + self.prefix:
            raise ConfigError(
                f"specpc: capacity expected at least window + prefix = {self.window + self.prefix}, got {self.capacity}"
            )

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        """Add this call's window rows, or its generated token, to `state.run`: the score of the prompt, fp32 `[N]`."""
        prompt = state.run.get(PROMPT)
        if prompt is None or x.layer < self.first_layer:
            return
        n, weight = x.q.shape[2], None
        start = x.start if x.phase == "prefill" else prompt  # a generated token stands behind the prompt
        at = max(0, prompt - self.window - start)
        if at >= n:
            return
        if start < prompt and self.weighted and self.window > 1:
            weight = torch.arange(start + at, start + n, device=x.device) - (prompt - self.window)
            weight = weight / (self.window - 1)
        assert x.q_pos is not None
        rows, pos = x.q[:, :, at:], x.q_pos[:, at:]
        got = row_mass(rows, x.kv, pos, reduce=self.reduce, weight=weight, scale=x.scale, softcap=x.softcap)[0, :, :prompt]
        got = pad(got.amax(0) if self.reduce == "max" else got.sum(0), (0, prompt - got.shape[-1]))
        old = state.run.get(SCORE)
        if old is not None:
            got = torch.maximum(old, got) if self.reduce == "max" else old + got
        state.run[SCORE] = got

    def pick(self, score: Tensor) -> Tensor:
        """Positions to keep, int64 ascending, of a prompt whose tokens score `score` `[N]`; at most `capacity`.

        A larger capacity keeps a superset, since what is kept is a prefix of one order: protected tokens, then the
        neighbourhoods of the best. Equal scores go to the earlier token.
        """
        n, k = score.shape[-1], self.capacity
        if n <= k:
            return torch.arange(n, device=score.device)
        before = (self.pool - 1) // 2
        room = pad(score.float()[None], (before, self.pool - 1 - before))
        pooled = (max_pool1d if self.pooling == "max" else avg_pool1d)(room, self.pool, 1)[0]
        best = pooled.argsort(descending=True, stable=True)[:k]
        offsets = torch.arange(self.neighbors, device=score.device) - (self.neighbors - 1) // 2
        near = (best[:, None] + offsets).clamp(0, n - 1).flatten()
        own = torch.arange(n, device=score.device)
        order = torch.cat([own[n - self.window :], own[: self.prefix], near])
        place = torch.arange(len(order), device=score.device)
        turn = torch.full((n,), len(order), device=score.device).scatter_reduce(0, order, place, "amin")
        return turn.argsort(stable=True)[:k].sort().values
