"""LServe: streaming heads beside heads that pick pages by bounds on smaller pages, re-selected every few steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import profile as profiles
from ..errors import ConfigError
from ..layout import NO_LIMIT, Layout
from ..lists import repeat_heads
from ..reuse import Held, Refresh
from ..scores import fused
from ..scores.bounds import Bounds
from ..select import top_indices
from .base import AttnInput, Method, State, option, shared
from .duo_attention import lowest
from .search import Knob

BOUNDS, PAGES = "lserve.bounds", "lserve.pages"


@dataclass(frozen=True)
class LServe(Method):
    """Yang et al. 2025, "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention" (arXiv 2502.14866).

    The share `sparsity` of the kv heads, those with the lowest gates of a `profile` (`foveate calibrate duo_attention`
    makes it), streams: a query sees the first `sink` keys and the newest `window`, in a prompt the newest
    `prefill_window`. `assign="even"` takes every so many-th head instead, which measures speed and nothing else. The other
    heads see all of a prompt; a decode step reads budget // page pages of `page` keys (at least 3), the newest among
    them, ranked by the highest bound of the `logical` small pages inside. Every `refresh` steps pages are chosen anew.
    `share="group"` gives the query heads of a kv head one list, by their highest bound.

    Differs from the published code: pages begun since a selection join it, rows of a batch have their own last page,
    and an evicted cache is ranked anew in every step. The bounds of streaming heads are kept too, for steps without
    branches. Streaming entries stay stored unless the recipe says `cache=duo_attention` with the same profile, sink and
    window; the int8 or int4 cache of the paper is a matter of storage and not part of the method.
    """

    sparsity: float = option(0.5, low=0.0, high=1.0, help="share of the kv heads that stream")
    page: int = option(64, low=1, help="tokens of a page")
    logical: int = option(16, low=1, help="tokens of the small pages that have bounds")
    budget: int = option(4096, low=1, help="tokens a query reads in heads that do not stream")
    refresh: int = option(4, low=1, help="decode steps that one list serves")
    sink: int = option(128, low=0, help="first tokens a streaming head sees")
    window: int = option(256, low=1, help="newest tokens a streaming head sees in decode")
    prefill_window: int = option(8192, low=1, help="newest tokens a streaming head sees in a prompt")
    profile: str | None = option(None, help="folder that `foveate calibrate duo_attention` wrote")
    assign: str = option("gates", choices=("gates", "even"), help="streaming heads by their gates, or evenly spread")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "lserve"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    needs: ClassVar[str] = "profile"
    source: ClassVar[str] = "Yang et al. 2025, arXiv 2502.14866"
    knob: ClassVar[Knob | None] = Knob("budget", 32, 65536, log=True, whole=True)
    evicted_ok: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"budget": 1024, "prefill_window": 1024}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page % self.logical:
            raise ConfigError(f"lserve: logical expected a divisor of page = {self.page}, got {self.logical}")

    @property
    def keep(self) -> int:
        """Pages a decode step reads, the newest included."""
        return max(3, self.budget // self.page)

    @property
    def min_length(self) -> int:
        """Below it no head drops anything."""
        return self.budget if self.sparsity == 0 else min(self.budget, self.sink + self.window)

    def phase(self, step: int) -> str | None:
        return Refresh(self.refresh).phase(step)

    # ------------------------------------------------------------------ the plan
    def plan(self, x: AttnInput, state: State) -> Layout | None:
        streams, mask = self._heads(x, state)
        if x.phase == "prefill":
            return self._rule(x, mask, self.prefill_window) if any(streams) else None
        plain = x.kv.pos is None and x.kv.bias is None  # entries in text order
        fits = self.sink % self.page == 0 and self.window % self.page == 0
        near = plain and fits and x.kv.capacity > self.sink + self.window
        if all(streams):
            return self._near(x, state) if near else self._rule(x, mask, self.window)
        if -(-x.kv.capacity // self.page) <= self.keep:
            return self._rule(x, mask, self.window) if any(streams) else None
        tiles, count = self._chosen(x, state) if plain else self._ranked(x, state)
        if any(streams):
            of_list = mask[None, :: x.q.shape[1] // tiles.shape[1]]  # [1, Hl]
            if not near:
                count = torch.where(of_list, 0, count)
                sink, window = (torch.where(mask[None], n, 0).to(torch.int32) for n in (self.sink, self.window))
                return self._layout(x, tiles, count, sink=sink, window=window)
            other = self._near(x, state)
            assert other.tiles is not None and other.tile_count is not None
            wide = max(tiles.shape[-1], other.tiles.shape[-1])
            a, b = (pad(t, (0, wide - t.shape[-1])) for t in (other.tiles[:, :, 0], tiles))
            tiles = torch.where(of_list[..., None], a, b)
            count = torch.where(of_list, other.tile_count[:, :, 0], count)
        return self._layout(x, tiles, count)

    def _layout(self, x: AttnInput, tiles: Tensor, count: Tensor, **rule: Tensor) -> Layout:
        lists: dict[str, Any] = {"tiles": tiles[:, :, None], "tile_count": count[:, :, None], "tile_width": self.page}
        return Layout(x.shape, q_pos=x.layout_pos(), **lists, **rule)

    def _rule(self, x: AttnInput, mask: Tensor, window: int) -> Layout:
        """Streaming heads see the sink and a window, the others everything."""
        block = 128 if x.phase == "prefill" else 1
        return Layout.static(
            x.shape,
            sink=torch.where(mask, self.sink, 0),
            window=torch.where(mask, window, NO_LIMIT),
            block_q=block,
            q_offset=x.offset(block) if x.phase == "prefill" else 0,
            q_pos=x.layout_pos(),
            device=x.device,
            validate=False,
        )

    def _near(self, x: AttnInput, state: State) -> Layout:
        """Sink and window as tiles that begin anywhere, `[B, 1, 1, n]`, which kernels read faster than a rule.

        The same for all layers of a step. A row shorter than both reads all it has.
        """
        if "lserve.near" not in state.step:
            far, ends = self.sink // self.page, x.kv.lengths()[:, :1, None]  # [B, 1, 1]
            tile = torch.arange(far + self.window // self.page, device=x.device) * self.page
            late = ends - (self.sink + self.window)
            tiles = torch.where((tile >= self.sink) & (late > 0), tile + late, tile).to(torch.int32)
            state.step["lserve.near"] = tiles, torch.full_like(tiles[..., 0], tile.numel())
        tiles, count = state.step["lserve.near"]
        return self._layout(x, tiles, count)

    # ------------------------------------------------------------------ pages
    def _chosen(self, x: AttnInput, state: State) -> tuple[Tensor, Tensor]:
        """First entries of the pages chosen at this step or an earlier one, and of the pages begun since.

        int32 `[B, Hl, T]` and counts `[B, Hl]`. Slots behind a list number the pages after its last one, so that only the
        count grows. The list stays in the same memory: captured steps read what another captured step wrote.
        """
        policy = Refresh(self.refresh)
        heads = x.q.shape[1] if self.share == "head" else x.groups
        newest = (repeat_heads(x.kv.lengths(), heads) - 1).to(torch.int32) // self.page  # [B, Hl]
        if policy.due(x, state, PAGES):
            bounds = self._bounds(x, state)
            tiles, count = self._best(x, bounds)
            slots = self.keep + -(-(self.refresh - 1) // self.page)
            after = torch.arange(slots, device=x.device) - count[..., None]  # slots behind the list, from 0
            tiles = pad(tiles, (0, slots - tiles.shape[-1]))
            tiles = torch.where(after < 0, tiles, (newest[..., None] + 1 + after) * self.page).to(torch.int32)
            state.layer[PAGES] = Pages(self._layout(x, tiles, count), newest, x.step, newest).into(state.layer.get(PAGES))
            return tiles, count
        tiles, count, then = state.layer[PAGES].parts
        return tiles[:, :, 0].clone(), count[:, :, 0] + newest - then

    def _bounds(self, x: AttnInput, state: State) -> Bounds:
        bounds = state.layer.get(BOUNDS)
        if bounds is None or bounds.page != self.logical:
            bounds = state.layer[BOUNDS] = Bounds(self.logical)
        bounds.update(x.kv)
        return bounds

    def _best(self, x: AttnInput, bounds: Bounds) -> tuple[Tensor, Tensor]:
        """The pages of highest bound in text order, the newest among them: int32 `[B, Hl, keep]`, counts `[B, Hl]`."""
        group, kernels, m = self.share == "group", fused.pages(x.q), x.kv.capacity
        if kernels is not None:
            assert bounds.data is not None
            score = kernels.score(x.q, bounds.data, -(-m // self.logical), self.logical, x.kv.len, group=group)
            return kernels.select(self._of_pages(score).contiguous(), self.keep, self.page, x.kv.len)
        score = bounds.score(x.q)  # [B, G, r, logical pages]
        score = self._of_pages(score.amax(2) if group else score.flatten(1, 2))
        last = repeat_heads((x.kv.lengths() - 1) // self.page, score.shape[1])[..., None]
        number = torch.arange(score.shape[-1], device=x.device)
        index, count = top_indices(score, self.keep, valid=number <= last, forced=number == last)
        return index * self.page, count

    def _of_pages(self, score: Tensor) -> Tensor:
        """The highest of the scores inside each page. Small pages without entries lie in the newest page, which is kept."""
        per = self.page // self.logical
        return pad(score, (0, -score.shape[-1] % per), value=float("-inf")).unflatten(-1, (-1, per)).amax(-1)

    def _ranked(self, x: AttnInput, state: State) -> tuple[Tensor, Tensor]:
        """`_best` where entries carry weights or stand in no order of position: nothing is reused."""
        score = self._bounds(x, state).score(x.q).float() * x.scale  # [B, G, r, small pages]
        there = x.kv.exists()
        bias = torch.zeros_like(there, dtype=torch.float32) if x.kv.bias is None else x.kv.bias.float()
        bias = pad(bias.masked_fill(~there, float("-inf")), (0, -bias.shape[-1] % self.logical), value=float("-inf"))
        bias = bias.unflatten(2, (-1, self.logical)).amax(3)[:, :, None]  # [B, G, 1, small pages]
        score = torch.where(bias > float("-inf"), score + bias, float("-inf"))
        assert x.q_pos is not None
        newest = (x.kv.positions() == x.q_pos[:, None]) & there
        score = self._of_pages(score.amax(2, keepdim=True) if self.share == "group" else score)
        forced = torch.arange(score.shape[-1], device=x.device) == newest.int().argmax(-1)[:, :, None, None] // self.page
        forced = forced.expand(score.shape).flatten(1, 2)
        score = score.flatten(1, 2)
        index, count = top_indices(score, self.keep, valid=forced | (score > float("-inf")), forced=forced)
        return index * self.page, count

    # ------------------------------------------------------------------ which heads stream
    def _heads(self, x: AttnInput, state: State) -> tuple[list[bool], Tensor]:
        """Of each kv head of this layer whether it streams, and bool `[H]` on the device."""
        key = f"{self.describe()} {x.layers} {x.groups} {x.q.shape[1]} {x.device}"
        if key not in state.run:
            streams = self.streaming(x.layers, x.groups)
            state.run[key] = streams.tolist(), repeat_heads(streams, x.q.shape[1]).to(x.device)
        lists, masks = state.run[key]
        return lists[x.layer], masks[x.layer]

    def streaming(self, layers: int, groups: int) -> Tensor:
        """bool `[layers, kv heads]`: the heads that stream. Raises ConfigError without the gates this needs."""
        if self.sparsity in (0, 1):
            return torch.full((layers, groups), bool(self.sparsity))
        if self.assign == "even":
            number = torch.arange(layers * groups + 1, dtype=torch.float64) * self.sparsity
            return (number.floor()[1:] > number.floor()[:-1]).view(layers, groups)
        found = profiles.of("duo_attention", self.profile)
        if found is None:
            raise ConfigError(
                f"lserve: sparsity={self.sparsity:g} needs gates; make them with foveate calibrate duo_attention "
                "--out FOLDER and give profile=FOLDER"
            )
        gates = found.tensors.get("gates")
        if gates is None or tuple(gates.shape) != (layers, groups):
            got = "none" if gates is None else list(gates.shape)
            raise ConfigError(f"lserve: profile expected gates [layers, kv heads] = {[layers, groups]}, got {got}")
        return lowest(gates, self.sparsity)


@dataclass(frozen=True)
class Pages(Held):
    """Chosen pages: a layout of them, the newest page of each list, int32 `[B, Hl]`, as `length`; no query is needed."""

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tiles `[B, Hl, 1, T]`, their counts `[B, Hl, 1]`, the newest page `[B, Hl]` when they were chosen."""
        assert self.layout.tiles is not None and self.layout.tile_count is not None
        return self.layout.tiles, self.layout.tile_count, self.length

    def into(self, old: object) -> Pages:
        """This selection in the memory of an old one of its shape, which a graph may have recorded, or in its own."""
        if not isinstance(old, Pages) or any(a.shape != b.shape for a, b in zip(self.parts, old.parts, strict=True)):
            return self.fork()
        for new, there in zip(self.parts, old.parts, strict=True):
            there.copy_(new)
        return replace(old, step=self.step)

    def fork(self) -> Pages:
        tiles, count, newest = (t.clone() for t in self.parts)
        return replace(self, layout=replace(self.layout, tiles=tiles, tile_count=count), length=newest, query=newest)
