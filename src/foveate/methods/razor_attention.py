"""RazorAttention: a few heads keep the whole cache, the others sinks, a window, and one entry for all they dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import profile as profiles
from ..errors import ConfigError
from ..kv import KV
from ..layout import Layout, Part, Parts
from ..lists import compact, trim
from ..scores.keys import pieces
from .base import AttnInput, Method, Selection, State, option

if TYPE_CHECKING:
    from .razor_attention_search import EchoSearch
    from .search import Target

FOLDED, ROLES = "razor_attention.folded", "razor_attention.roles"


@dataclass(frozen=True)
class RazorAttention(Method):
    """Tang et al. 2024, "RazorAttention: Efficient KV Cache Compression Through Retrieval Heads" (arXiv 2407.15891).

    Retrieval heads keep everything. They are the share `induction` of all kv heads that look most at what followed an
    earlier occurrence of the token, and the share `echo` that look most at the occurrence itself; `profile` holds both
    scores (`foveate calibrate razor_attention`; shares of 0 and 0, or a share of 1, need none). After a prompt of N
    tokens the other heads keep the first `sink` positions and max(`window`, `fraction` * N) newest ones. What they drop
    becomes one entry, its mean key and value, counted as often as it has members (log n on its logit; the vendor's code
    counts it once). While decoding, entries gather for `slack` steps before they join the mean; the published ring lets
    each join when it leaves the window, and `slack` = 1 does that.

    The mean entry lies beside the cache, so this method must also plan prefill and decode, as it does by default;
    as `cache` alone it cuts without it, and `compensate` = false always does.
    """

    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    induction: float = option(0.14, low=0.0, high=1.0, help="share of kv heads kept whole by induction score")
    echo: float = option(0.01, low=0.0, high=1.0, help="share of kv heads kept whole by echo score")
    sink: int = option(4, low=0, help="first tokens the other heads keep")
    window: int = option(4000, low=1, help="fewest newest tokens the other heads keep")
    fraction: float = option(0.2, low=0.0, high=1.0, help="fraction of the prompt the other heads keep, its newest")
    compensate: bool = option(True, help="one mean entry stands for what was dropped")
    slack: int = option(256, low=1, help="decode steps from one eviction to the next")

    id: ClassVar[str] = "razor_attention"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode", "cache")
    selection: ClassVar[str] = "prompt"
    share: ClassVar[str] = "group"
    needs: ClassVar[str] = "profile"
    source: ClassVar[str] = "Tang et al. 2024, arXiv 2407.15891"
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"window": 512},
        "vendor": {"window": 251, "fraction": 0.0},
    }

    def refuses(self, recipe: Any) -> str | None:
        others = [m.id for m in (recipe.prefill, recipe.decode) if m is not None and m != self]
        if recipe.cache == self and self.compensate and others:
            return f"{others[0]} does not attend to the entry for what was dropped; set compensate=false"
        return None

    def search(self, target: Target) -> EchoSearch:
        """Scores of all heads; the quotas are options, so the target's number has no meaning here."""
        from .razor_attention_search import EchoSearch

        return EchoSearch()

    # ------------------------------------------------------------------ attention
    def plan(self, x: AttnInput, state: State) -> Parts | None:
        rows = [state.layer] if x.phase == "prefill" else state.rows
        self._local(x, state)  # what is missing is said before the prompt is read
        if not self.compensate or not any(FOLDED in row for row in rows):
            return None
        k, v, n, _ = self._folded(x, rows)
        dtype = x.kv.dtype
        mean = KV.dense(k[:, :, None].to(dtype), v[:, :, None].to(dtype), bias=n.log()[..., None])
        b, h, count, _ = x.q.shape
        one = Layout.dense(b, h, count, 1, q_pos=x.q_pos)  # it stands at position 0: everyone sees it
        return Parts((Part(x.dense()), Part(one, kv=mean)))

    # ------------------------------------------------------------------ the cache
    def compress(self, x: AttnInput, state: State) -> Selection | None:
        if not any(self._local(x, state)[0]):
            return None
        seen = x.start + x.q.shape[2]
        return self._fold(x, state, [state.layer], torch.tensor([seen], device=x.device))

    def evict(self, x: AttnInput, state: State) -> Selection | None:
        if not self.evicts(x.step) or not any(self._local(x, state)[0]) or x.kv.capacity <= self.sink + self.window:
            return None
        assert x.q_pos is not None
        return self._fold(x, state, state.rows, x.q_pos[:, 0] + 1)

    def evicts(self, step: int) -> bool:
        return (step + 1) % self.slack == 0

    def phase(self, step: int) -> str | None:
        return "step"

    def _fold(self, x: AttnInput, state: State, rows: list[Any], end: Tensor) -> Selection | None:
        """Move what left the windows of local heads into their means. end `[B]`: tokens seen."""
        for row in (r for r in rows if FOLDED in r):
            row[FOLDED] = row[FOLDED].as_subclass(Folded)  # a loaded cache brings a plain tensor
        _, _, n, window = held = self._folded(x, rows)
        asked = (self.fraction * end + 1e-6).floor().clamp(min=self.window)[:, None].expand(n.shape)
        # While decoding the window stays what it was when a row first dropped something.
        window = torch.where((window > 0) & (x.phase == "decode"), window, asked)
        pos, exists, local = x.kv.positions(), x.kv.exists(), self._local(x, state)[1]
        drop = exists & local[:, None] & (pos >= self.sink) & (pos < (end[:, None] - window)[..., None])
        index, count = compact(drop)
        index = trim(index, count).long()
        if not bool(count.any()):
            return None
        self._join(x, rows, held[0], held[1], n, window, index, count)
        index, count = compact(exists & ~drop)
        return Selection(trim(index, count).long(), count.long())

    def _join(self, x: AttnInput, rows: list[Any], *held: Tensor) -> None:
        """Entries `index` `[B, G, K]`, the first `count` of each, join the means k and v of n members."""
        k, v, n, window, index, count = held
        sums = [torch.zeros_like(k), torch.zeros_like(v)]
        for lo, hi in pieces(index.shape[2], k.numel() + v.numel()):
            live = (torch.arange(lo, hi, device=x.device) < count[..., None])[..., None]
            for total, t in zip(sums, x.kv.gather(index[:, :, lo:hi]), strict=True):
                total += t.float().masked_fill(~live, 0.0).sum(2)
        size = (n + count)[..., None]
        k, v = ((t * n[..., None] + s) / size.clamp(min=1.0) for t, s in zip((k, v), sums, strict=True))
        began = size.amax(1, keepdim=True) > 0
        packed = torch.cat([k, v, size, torch.where(began, window[..., None], 0.0)], -1)
        for i, row in enumerate(rows):
            new = packed[i : i + 1]
            if FOLDED in row:
                row[FOLDED].as_subclass(Tensor).copy_(new)  # in place: captured steps read it
            else:
                row[FOLDED] = new.clone().as_subclass(Folded)

    def _folded(self, x: AttnInput, rows: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each kv head, fp32: mean key `[B, G, D]`, mean value `[B, G, Dv]`, members `[B, G]`, window `[B, G]` or 0."""
        _, g, _, d, dv = x.kv.shape
        none = torch.zeros(1, g, d + dv + 2, device=x.device)
        held = [row[FOLDED].as_subclass(Tensor) if FOLDED in row else none for row in rows]
        k, v, n, window = (held[0] if len(held) == 1 else torch.cat(held)).split([d, dv, 1, 1], -1)
        return k, v, n[..., 0], window[..., 0]

    # ------------------------------------------------------------------ which heads are local
    def _local(self, x: AttnInput, state: State) -> tuple[list[bool], Tensor]:
        """Of each kv head of this layer, on the host and as bool `[G]` on the device of x; made once a generation."""
        held = state.run.setdefault(ROLES, {})
        at = (self, x.layers, x.groups, x.device)
        if at not in held:
            local = ~self.retrieval(x.layers, x.groups)
            held[at] = local.tolist(), local.to(x.device)
        lists, masks = held[at]
        return lists[x.layer], masks[x.layer]

    def retrieval(self, layers: int, groups: int) -> Tensor:
        """bool `[layers, kv heads]`: the heads that keep everything. ConfigError without the scores this needs."""
        if max(self.induction, self.echo) in (0.0, 1.0):
            return torch.full((layers, groups), max(self.induction, self.echo) == 1.0)
        found = profiles.of(self.id, self.profile)
        if found is None:
            raise ConfigError(
                f"razor_attention: induction={self.induction:g} and echo={self.echo:g} need scores of the heads; make them "
                "with foveate calibrate razor_attention --out FOLDER and give profile=FOLDER"
            )
        out = torch.zeros(layers, groups, dtype=torch.bool)
        for name, share in (("induction", self.induction), ("echo", self.echo)):
            score = found.tensors.get(name)
            if score is None or tuple(score.shape) != (layers, groups):
                got = "nothing" if score is None else list(score.shape)
                raise ConfigError(
                    f"razor_attention: profile expected {name} [layers, kv heads] = {[layers, groups]}, got {got}"
                )
            out |= best(score, share)
        return out


def best(score: Tensor, share: float) -> Tensor:
    """bool like score: the share of heads with the highest scores, rounded up, ties going to the lower layer and head.

    Heads that were never scored (NaN: layers with the model's own sliding window) count as none and are not among them.
    """
    flat = score.flatten()
    known = ~flat.isnan()
    count = math.ceil(share * int(known.sum()) - 1e-9)
    out = torch.zeros_like(known)
    out[torch.where(known, flat, float("-inf")).argsort(descending=True, stable=True)[:count]] = True
    return out.view(score.shape)


class Folded(Tensor):
    """Mean key, mean value, members and window of each kv head, fp32 `[1, G, D + Dv + 2]`: what local heads have dropped.

    A tensor, so that it is saved with the cache; it refers to no entry, so what the cache keeps does not concern it.
    """

    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def keep(self, selection: Selection) -> None:
        return None

    def fork(self) -> Folded:
        return self.clone().as_subclass(Folded)
