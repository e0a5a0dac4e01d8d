"""XAttention: blocks ranked by the antidiagonals of their logits, as many as hold a share of the mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists, profile
from ..errors import ConfigError
from ..layout import Layout
from ..scores.antidiagonal import block_mass, keep_share, share_lists
from ..scores.pairs import WHOLE
from ._profiled import per_head
from .base import AttnInput, Method, State, option, shared
from .search import Knob, Search, Target


@dataclass(frozen=True)
class XAttention(Method):
    """Xu et al. 2025, "XAttention: Block Sparse Attention with Antidiagonal Scoring" (arXiv 2503.16428).

    Per block of `block` queries, the key blocks whose estimated mass reaches `threshold` of the row, highest first. The
    estimate adds up logits along antidiagonals of `stride` x `stride` squares and takes a softmax over squares, so a
    smaller stride sees more and costs more. The first key block and the diagonal one are always in, and count. `profile`
    names a folder that `foveate calibrate` wrote: a threshold per layer and head in place of `threshold`. `share`
    "group" gives the query heads of a kv head the union of their blocks. Differs from the published PyTorch code where
    that is wrong: later chunks of queries keep their columns, and the sink is the first key block, not the first row.
    """

    threshold: float = option(0.9, low=0, high=1, help="share of the estimated attention mass to reach")
    stride: int = option(16, low=1, help="side of the squares that antidiagonals cross, in tokens")
    block: int = option(128, low=16, help="tokens of a block of queries or keys")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "xattention"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"  # rows of a block are ranked together
    source: ClassVar[str] = "Xu et al. 2025, arXiv 2503.16428"
    # On SmolLM2-135M (1,450 tokens of essays, 5 layers, rows from 700 on) blocks of 64 computed 0.43 of the pairs for 0.88
    # of the attention mass, blocks of 128 0.52 for 0.89. Strides of 16 and 8 differ by 0.01 either way.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"stride": 8, "block": 64}}
    knob: ClassVar[Knob | None] = Knob("threshold", 0.05, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block % self.stride:
            raise ConfigError(f"xattention: stride expected a divisor of block={self.block}, got {self.stride}")
        found = profile.of(self.id, self.profile)
        if found is None:
            return
        for name in ("stride", "block"):
            if (made := found.options.get(name)) != getattr(self, name):
                raise ConfigError(f"xattention: profile was made with {name}={made}, but {name} is {getattr(self, name)}")
        if (table := found.tensors.get("threshold")) is None or table.dim() != 2:
            raise ConfigError(f"xattention: profile expected a tensor threshold [layers, heads] in {self.profile!r}")

    @property
    def min_length(self) -> int:
        """Up to two blocks, every block is forced."""
        return 2 * self.block + 1

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        m, size = x.start + x.q.shape[2], self.block
        if m < self.min_length:
            return None
        first, nk, hl = x.start // size, -(-m // size), x.groups if self.share == "group" else x.q.shape[1]
        tau = self._thresholds(x, state)
        # Beyond, every piece is cut to its longest list, which waits for the device.
        whole = x.q.shape[0] * hl * nk * nk <= WHOLE
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
        scores = block_mass(x.q, x.kv, self.stride, size, start=x.start, scale=x.scale, softcap=x.softcap)
        for g0, g1, lo, hi, mass in scores:
            some = tau[g0:g1] if isinstance(tau, Tensor) else tau
            index, count = share_lists(mass, some, first + lo, size, group=self.share == "group")
            parts.setdefault(g0, []).append((index if whole else lists.trim(index, count), count))
        wide = max(index.shape[-1] for row in parts.values() for index, _ in row)
        tiles = [_join([_widened(index, wide) for index, _ in row], 2) for row in parts.values()]
        counts = [_join([count for _, count in row], 2) for row in parts.values()]
        return Layout(
            x.shape,
            block_q=size,
            q_offset=x.offset(size),
            tile_width=size,
            q_pos=x.layout_pos(),
            tiles=_join(tiles, 1),
            tile_count=_join(counts, 1),
        )

    def search(self, target: Target) -> Search | None:
        """A threshold per head for mass, recall and density; for the loss of the output, one for all by the generic way."""
        if target.kind == "loss":
            return None
        from ._allocation import own_lists
        from .xattention_search import Steps, by_head

        if target.by_head:
            own_lists(self)
            return by_head(self, target)
        return Steps(self, target)

    def _keep(self, mass: Tensor, tau: float | Tensor, first: int) -> Tensor:
        """bool like `mass` `[..., nq, nk]`, the first row of which is query block number `first`."""
        return keep_share(mass, tau, first)

    def _thresholds(self, x: AttnInput, state: State) -> float | Tensor:
        """One for all heads, or those of this layer, `[G, r, 1]` on the device."""
        held = per_head(self.id, self.profile, "threshold", x, state)
        return self.threshold if held is None else held.view(x.groups, -1, 1)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)  # joining one part would copy it


def _widened(index: Tensor, wide: int) -> Tensor:
    return index if index.shape[-1] == wide else pad(index, (0, wide - index.shape[-1]))
