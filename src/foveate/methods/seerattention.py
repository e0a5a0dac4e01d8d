"""SeerAttention: a small learned gate per layer predicts which blocks hold attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import profile as profiles
from ..errors import ConfigError, UnsupportedError
from ..layout import Layout
from ..lists import compact, trim
from ..scores.gates import Gate, choose, key_features, query_means
from ..scores.keys import BUDGET, pieces
from ..scores.pooled import block_logits, block_softmax
from .base import AttnInput, Method, State, option, shared

if TYPE_CHECKING:
    from .search import Target
    from .seerattention_search import Distillation

FEATURES, GATE = "seerattention.keys", "seerattention.gate"
THRESHOLD = 5e-4  # the lower end of the range the authors evaluate


@dataclass(frozen=True)
class SeerAttention(Method):
    """Gao et al. 2024, "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (arXiv 2410.13276).

    Means of blocks of queries and maxima, minima and means of blocks of keys, all before rotation, go through the
    learned maps of a `profile` (`foveate calibrate seerattention` distils it) and are rotated to the first position of
    their block. A row of query blocks takes the key blocks of at least `threshold` gate probability; or, if given, the
    best `budget` tokens, or as many as make `ratio` of the causal blocks. A threshold means something else at another
    length (2048 blocks have 5e-4 on average). `threshold` None reads the one the calibration chose, 5e-4 without.

    Differs from the published code: the first and the diagonal block are always in (a row may not lose its own
    tokens), gates have the head dimension of the model, a probability equal to the threshold is kept, and chunks of a
    prompt work, from pooled keys that are remembered beside the cache. `last_block_dense` (the last two rows of blocks,
    of every chunk) makes the lists as wide as the prompt. `share` "group": a block counts by its highest probability
    among the query heads of a kv head. `epochs`, `rate` and `query_map` (a map of the queries too) are the training's.
    """

    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    threshold: float | None = option(None, low=0, high=1, help="least gate probability of a block; none: the profile's")
    ratio: float | None = option(None, low=0, high=1, help="share of the causal blocks read, instead of a threshold")
    budget: int | None = option(None, low=1, help="tokens a query reads, instead of a threshold")
    block: int = option(64, low=16, help="tokens of a block of queries or keys")
    last_block_dense: bool = option(True, help="last two rows of blocks stay dense")
    share: str = shared()  # type: ignore[misc]
    epochs: int = option(30, low=1, help="passes over the texts in training")
    rate: float = option(1e-3, low=0, help="learning rate of the training")
    query_map: bool = option(False, help="train a map of the queries too")

    id: ClassVar[str] = "seerattention"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"
    needs: ClassVar[str] = "weights"
    source: ClassVar[str] = "Gao et al. 2024, arXiv 2410.13276"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"budget": 1024}}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("threshold", "ratio", "budget") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConfigError(f"seerattention: expected one of threshold, ratio and budget, got {' and '.join(given)}")

    @property
    def min_length(self) -> int:
        """Up to so many blocks, the first, the diagonal and the dense rows are all there is."""
        return (4 if self.last_block_dense else 2) * self.block + 1

    def search(self, target: Target) -> Distillation:
        from .seerattention_search import Distillation

        return Distillation(self, target)

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        gate, threshold = self._gate(x, state)
        if gate is None:
            return None
        if x.rope is None:
            raise UnsupportedError(
                "seerattention: needs queries and keys before rotation, and this model's rotation is not available (x.rope)"
            )
        m, size = x.start + x.q.shape[2], self.block
        if m < self.min_length:
            return None
        first = x.start // size
        q = gate.queries(query_means(x.q, x.rope, size, x.start), x.rope, first, size)
        k = gate.keys(self._features(x, state, m), x.rope, size)
        tiles, count = self._blocks(q, k, x.groups, first, threshold)
        return Layout(
            x.shape,
            block_q=size,
            q_offset=x.offset(size),
            tile_width=size,
            q_pos=x.layout_pos(),
            tiles=tiles,
            tile_count=count,
        )

    def _gate(self, x: AttnInput, state: State) -> tuple[Gate | None, float]:
        """This layer's weights, on the device, or None where the profile has none, and the threshold."""
        profile = profiles.of(self.id, self.profile)
        if profile is None:
            raise ConfigError(
                "seerattention: expected a profile with trained gates, got none; make one with "
                "`foveate calibrate seerattention --model MODEL --out FOLDER` and give it as seerattention:profile=FOLDER"
            )
        made = profile.options.get("block", self.block)
        if made != self.block:
            raise ConfigError(f"seerattention: block expected {made} like the profile {self.profile!r}, got {self.block}")
        threshold = self.threshold if self.threshold is not None else profile.options.get("threshold", THRESHOLD)
        held = state.run.setdefault(GATE, {})
        at = (self.profile, x.layer)
        if at not in held:
            key, query = (profile.tensors.get(f"layer.{x.layer}.{n}") for n in ("k", "q"))
            if key is None:
                if not any(name.startswith("layer.") for name in profile.tensors):
                    raise ConfigError(f"seerattention: expected gates in the profile {self.profile!r}, got none")
                x.note("seerattention: its profile has no gates for some layers; they run dense")
                return None, threshold
            gate = Gate(*(None if t is None else t.to(x.device, torch.float32) for t in (key, query)))  # type: ignore[arg-type]
            gate.check(x.q.shape[1], x.groups, x.q.shape[3])
            held[at] = gate
        return held[at], float(threshold)

    def _features(self, x: AttnInput, state: State, m: int) -> Tensor:
        """Features of all key blocks, `[1, G, ceil(m / block), 3D]`; whole blocks are pooled once and remembered."""
        assert x.rope is not None
        known = state.layer.get(FEATURES)
        fresh = key_features(x.kv, x.rope, self.block, m, 0 if known is None else known.shape[2])
        every = fresh if known is None else torch.cat([known, fresh], 2)
        state.layer[FEATURES] = every[:, :, : m // self.block]  # truncating the cache drops them
        return every

    def _blocks(self, q: Tensor, k: Tensor, groups: int, first: int, threshold: float) -> tuple[Tensor, Tensor]:
        """Tiles int32 `[B, Hl, nq, T]` and counts from the gate's queries `[B, H, nq, D]` and keys `[B, G or H, nk, D]`."""
        (b, h, nq, d), nk = q.shape, k.shape[2]
        r, s, group = h // groups, k.shape[1] // groups, self.share == "group"
        keep = self._keep(nk, first)
        tiles, counts = [], []
        for g0, g1 in pieces(groups, 8 * b * r * nq * nk, 8 * BUDGET):
            rows = []
            for lo, hi in pieces(nq, 8 * b * (g1 - g0) * r * nk, 8 * BUDGET):
                logits = block_logits(q[:, g0 * r : g1 * r, lo:hi], k[:, g0 * s : g1 * s], 1 / math.sqrt(d))
                prob = block_softmax(logits, first + lo)
                if group:
                    prob = prob.unflatten(1, (-1, r)).amax(2)
                last = min(hi - lo, max(0, hi - max(0, nq - 2))) if self.last_block_dense else 0
                mask = choose(prob, first + lo, threshold=threshold, keep=keep, dense_rows=last)
                index, count = compact(mask)
                if keep is not None and not last:
                    index = index[..., : max(keep, 2)]  # the first and the diagonal block come on top of one
                elif not self.last_block_dense:
                    index = trim(index, count)
                rows.append((index * self.block, count))
            tiles.append(_joined([t for t, _ in rows], 2))
            counts.append(torch.cat([c for _, c in rows], 2))
        return _joined(tiles, 1), torch.cat(counts, 1)

    def _keep(self, nk: int, first: int) -> int | None:
        """Blocks of a row, or None: the threshold decides.

        The rows a..n that keep k >= a blocks leave out (n - k)^2 of n^2 - a^2 twice; where k < a every row keeps k.
        """
        if self.budget is not None:
            return max(1, self.budget // self.block)
        if self.ratio is not None:
            a = first / nk
            share = 1 - math.sqrt((1 - self.ratio) * (1 - a * a))  # k / n
            return max(1, int((share if share >= a else self.ratio * (1 + a) / 2) * nk))
        return None


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    """Lists of different width side by side; padding repeats nothing, counts say how far a row goes."""
    if len(parts) == 1:
        return parts[0]
    wide = max(t.shape[-1] for t in parts)
    return torch.cat([pad(t, (0, wide - t.shape[-1])) for t in parts], axis)
