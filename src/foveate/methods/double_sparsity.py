"""Double Sparsity: every token scored with a few channels of its key, kept in few bits; exact attention on the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import profile as profiles
from ..errors import ConfigError
from ..layout import Layout
from ..scores.entries import best_entries, best_tokens
from ..scores.labels import Channels
from .base import AttnInput, Method, State, option, shared
from .double_sparsity_search import OutlierChannels
from .search import Target

LABELS, BITS = "double_sparsity.labels", (2, 4, 8, 16)


@dataclass(frozen=True)
class DoubleSparsity(Method):
    """Yang et al. 2024, "Post-Training Sparse Attention with Double Sparsity" (arXiv 2408.07092).

    A label of each key holds its D / `group_factor` most important channels in `bits` bits (16: as they are). A decode
    query, cut and rounded the same way, scores all labels; the `budget` best tokens of its head are attended exactly, its
    own token always among them, which the published code leaves to chance. `share="group"` ranks by the best of the query
    heads of a kv head. The first `dense_layers` layers stay dense.

    Channels come from a `profile`: `foveate calibrate double_sparsity` ranks them by the statistic `channel`, mean |q|,
    |k| or |q k| over a text. Query heads of a kv head share their labels, so they share channels: |q| and |q k| are summed
    over them. Without a profile each kv head takes the channels of the largest mean |k| of the first 64 entries, after the
    rotation: a guess, which a note tells; steps are captured once every row has these 64. The prefetch of a later layer's
    tokens from host memory is not part of the method here.
    """

    budget: int = option(1024, low=1, help="tokens a query reads")
    group_factor: int = option(2, low=1, help="key channels for each one that a label keeps")
    bits: int = option(2, low=2, high=16, help="bits of a label's element; 16: not rounded")
    channel: str = option("q", choices=("q", "k", "qk"), help="vectors whose size ranks the channels in calibration")
    dense_layers: int = option(2, low=0, help="first layers, which stay dense")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "double_sparsity"
    roles: ClassVar[tuple[str, ...]] = ("decode",)
    source: ClassVar[str] = "Yang et al. 2024, arXiv 2408.07092"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"budget": 512},
        "speed": {"budget": 256, "group_factor": 4, "bits": 16},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise ConfigError(f"double_sparsity: bits expected one of {', '.join(map(str, BITS))}, got {self.bits}")
        found = profiles.of(self.id, self.profile)
        made = self.channel if found is None else found.options.get("channel", self.channel)
        if made != self.channel:
            raise ConfigError(f"double_sparsity: channel expected {made!r} like the profile, got {self.channel!r}")

    @property
    def min_length(self) -> int:
        return self.budget + 1

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if x.layer < self.dense_layers or x.kv.capacity <= self.budget:
            return None
        labels = state.layer.get(LABELS)
        if not isinstance(labels, Channels):
            labels = state.layer[LABELS] = Channels(self._count(x), self.bits, self._table(x))
        group = self.share == "group"
        if x.kv.bias is None and x.kv.pos is None:
            entries, count = best_entries(labels.rank(x.q, x.kv, x.step, group=group), self.budget, length=x.kv.len)
        else:
            labels.update(x.kv, x.step)
            score = labels.score(x.q)
            if x.kv.bias is not None:
                score = score * x.scale + x.kv.bias.to(score.dtype)[:, :, None]
            entries, count = best_tokens(score, x.kv, self.budget, group=group)
        return Layout(x.shape, q_pos=x.layout_pos(), entries=entries[:, :, None], entry_count=count[:, :, None])

    def search(self, target: Target) -> OutlierChannels:
        return OutlierChannels(self)

    def _count(self, x: AttnInput) -> int:
        """Channels of a label."""
        d = x.q.shape[-1]
        if self.group_factor > d:
            raise ConfigError(f"double_sparsity: group_factor expected at most {d}, the head dim, got {self.group_factor}")
        return d // self.group_factor

    def _table(self, x: AttnInput) -> Tensor | None:
        """int64 `[G, r]`, the channels of this layer's labels by the profile; None without one."""
        found = profiles.of(self.id, self.profile)
        if found is None:
            x.note("double_sparsity: no profile; each kv head's channels are a guess from its first keys")
            return None
        want, order = (x.layers, x.groups, x.q.shape[-1]), found.tensors.get("channels")
        if order is None or tuple(order.shape) != want:
            got = "none" if order is None else list(order.shape)
            raise ConfigError(
                f"double_sparsity: profile expected channels [layers, kv heads, head dim] = {list(want)}, got {got}"
            )
        every = torch.arange(want[2]).expand(want)
        if not torch.equal(order.long().sort(-1).values, every):
            raise ConfigError("double_sparsity: profile expected an order of all channels for each kv head")
        return order[x.layer, :, : self._count(x)].long().to(x.device)
