"""MoA: every head has a sink and a sliding window whose width grows with the text by a rule of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import profile as profiles
from ..errors import ConfigError
from ..layout import Layout, Part, Parts
from ..lists import compact, trim
from ._cut import counted, mark
from .base import AttnInput, Method, Selection, State, option, shared

if TYPE_CHECKING:
    from .moa_search import Spans
    from .search import Target

RULES = "moa.rules"


@dataclass(frozen=True)
class MoA(Method):
    """Fu et al. 2024, "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression" (arXiv 2406.14909).

    In a text of n tokens a head sees the first `sink` positions and the alpha + beta n newest ones, `block` at least.
    A `profile` (`foveate calibrate moa --target density=0.5`) gives alpha and beta of each head, chosen so that the
    predicted loss is lowest while the mean density stays below the target at every length looked at. Without one, every
    head gets the width that keeps `density` of the causal pairs of a prompt. As a cache policy each kv head keeps what
    the widest window of its query heads can still reach; entries gather for `slack` decode steps before they go.

    n is the length at the end of the call, so windows grow while text is generated; the published code fixes them at
    the prompt plus the tokens that will be asked for, which nobody knows here. What a window has left it never reaches
    again (beta <= 1), so evicting is exact. `share` "group" gives the query heads of a kv head the widest of their
    windows. `alpha_step`, `betas` and `rules` (distinct rules of a layer) bound what the search considers.
    """

    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    density: float = option(0.5, low=0, high=1, help="share of the causal pairs computed without a profile")
    sink: int = option(64, low=0, help="first tokens of the text, always included")
    block: int = option(64, low=1, help="fewest newest tokens a head sees")
    slack: int = option(256, low=1, help="decode steps from one eviction to the next")
    share: str = shared()  # type: ignore[misc]
    alpha_step: int = option(1024, low=1, help="tokens between the alphas that the search tries")
    betas: int = option(9, low=2, help="values of beta that the search tries")
    rules: int = option(2, low=1, high=2, help="different rules in a layer, at most, in the search")

    id: ClassVar[str] = "moa"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "cache")
    selection: ClassVar[str] = "prompt"  # the width of a row's window depends on how long the prompt is
    needs: ClassVar[str] = "profile"
    source: ClassVar[str] = "Fu et al. 2024, arXiv 2406.14909"
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"density": 0.25}}

    def search(self, target: Target) -> Spans:
        from .moa_search import Spans

        return Spans(self, target)

    def plan(self, x: AttnInput, state: State) -> Layout | Parts:
        block = 128 if x.phase == "prefill" else 1
        window = self._windows(x, state, x.q.shape[1])
        if self.share == "group":
            window = window.unflatten(1, (x.groups, -1)).amax(2)
        kv = counted(x, state, self) if x.phase == "decode" else None
        layout = Layout.static(
            x.shape,
            sink=self.sink,
            window=window,
            block_q=block,
            q_offset=x.offset(block) if x.phase == "prefill" else 0,
            q_pos=x.layout_pos() if kv is None else None,
            device=x.device,
            validate=False,
        )
        return layout if kv is None else Parts((Part(layout, kv=kv),))

    def compress(self, x: AttnInput, state: State) -> Selection:
        mark(x, state, self)
        return self._reachable(x, state, None)  # there may be no query to count heads by

    def evict(self, x: AttnInput, state: State) -> Selection | None:
        return self._reachable(x, state, x.q.shape[1]) if self.evicts(x.step) else None

    def evicts(self, step: int) -> bool:
        return (step + 1) % self.slack == 0

    def phase(self, step: int) -> str | None:
        return "step"

    def _reachable(self, x: AttnInput, state: State, heads: int | None) -> Selection:
        """The entries that a kv head's widest window, or its sink, holds after this call."""
        window = self._windows(x, state, heads).unflatten(1, (x.groups, -1)).amax(2)[..., None]
        pos = x.kv.positions()
        keep = x.kv.exists() & ((pos < self.sink) | (pos >= self._length(x)[..., None] - window))
        index, count = compact(keep)
        return Selection(trim(index, count).long(), count.long())

    def _windows(self, x: AttnInput, state: State, heads: int | None) -> Tensor:
        """int32 `[B, H]`: keys that each head's window holds at the end of this call, the query itself included.

        With `heads` None as many heads as the profile has, or one per kv head."""
        held = state.run.setdefault(RULES, {})
        at = (self, x.layer, heads)
        if at not in held:
            alpha, beta = self.rule(x.layer, x.layers, heads or x.groups, check=heads is not None)
            held[at] = alpha.to(x.device), beta.to(x.device)
        alpha, beta = held[at]
        return (alpha + beta * self._length(x)).floor().clamp(min=self.block).to(torch.int32)

    def _length(self, x: AttnInput) -> Tensor:
        """int64 `[B, 1]`: tokens of each row at the end of this call."""
        if x.phase == "decode":
            assert x.q_pos is not None
            return x.q_pos[:, -1:] + 1
        return torch.full((1, 1), x.start + x.q.shape[2], device=x.device)

    def rule(self, layer: int, layers: int, heads: int, check: bool = True) -> tuple[Tensor, Tensor]:
        """(alpha, beta) of the heads of a layer, fp32 `[heads]` twice, on the CPU; without `check` as many as there are."""
        profile = profiles.of(self.id, self.profile)
        if profile is None:  # a window of beta n keys holds 1 - (1 - beta)^2 of the causal pairs of n tokens
            return torch.zeros(heads), torch.full((heads,), 1 - math.sqrt(1 - self.density))
        out = []
        for name in ("alpha", "beta"):
            t = profile.tensors.get(name)
            if t is None or t.dim() != 2 or t.shape[0] != layers or (check and t.shape[1] != heads):
                got = "nothing" if t is None else str(list(t.shape))
                raise ConfigError(f"moa: expected {name} [{layers}, {heads}] in the profile {self.profile!r}, got {got}")
            out.append(t[layer].float())
        return out[0], out[1]
