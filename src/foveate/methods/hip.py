"""HiP: a tree search over key blocks finds the keys of each query block, in prefill and in decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..lists import compact, repeat_heads, sort_unique
from ..reuse import Refresh
from ..scores.keys import BUDGET, GPU_BUDGET, pieces
from ..scores.tree import REPRESENTATIVES, Stage, depth, descend, descend_rows, prune
from .base import AttnInput, Method, State, option, shared

LIST = "hip.list"


@dataclass(frozen=True)
class HiP(Method):
    """Lee et al. 2024, "A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically
    Pruned Attention" (arXiv 2406.09827), with the constants of version 1.1 of its code.

    Every row sees the first `sink` and the `window` newest tokens. Between them each block of `block_q` rows searches
    for about `k` more keys: k // block_k groups of key blocks are halved again and again, every half is judged by the
    largest logit of one block of `block_k` keys (its `representative`) with every `stride`-th query, and the better
    half of all halves goes on. A decode step searches with its one query; its list serves `refresh` steps. Layers below
    `dense_layers` stay dense. `tile` widens what was found to aligned tiles of that many keys, which kernels read
    faster and which may be much more than k; None reads the blocks as they are. `share` "group" gives the query heads
    of a kv head one search, by their highest logit.

    `stages` is the search of version 1.2 (InfiniteHiP, Lee et al. 2025, arXiv 2502.08910) instead, without its extension
    of positions: "256x4/32x4x32768/8x1x8192" cuts all keys into chunks of 256, of which a binary search finds the best
    key by the means of 4 queries; the best 32768 keys are cut into chunks of 32, the best 8192 of these into chunks of
    `block_k` = 8, and the best k stay. Its first stage looks at every chunk: N x M / 64 products for chunks of 256. All
    stages are refreshed together. A binary search, too, may miss a single key.

    A bump of logits at least 1 / groups of the range wide is found; a single important key may be missed. Differs from
    the published code in two points: a list that is used again widens the window by its age, so that no key falls out
    of both, and an evicted cache, whose entries need not stand in order, is searched whole and anew in every step.
    """

    k: int = option(512, low=1, help="keys that a search finds for a query block")
    block_q: int = option(64, low=1, help="queries of a block")
    block_k: int = option(2, low=1, help="keys of a block")
    stride: int = option(2, low=1, help="every so many-th query of a block judges")
    sink: int = option(16, low=0, help="first tokens of the text, always included")
    window: int = option(256, low=1, help="newest tokens, always included")
    refresh: int = option(8, low=1, help="decode steps that one list serves")
    dense_layers: int = option(3, low=0, help="first layers, which stay dense")
    tile: int | None = option(None, low=1, help="keys of the tiles read; none: blocks as they are")
    representative: str = option("center", choices=REPRESENTATIVES, help="key block that stands for a half in the search")
    stages: str | None = option(None, help="stages of the search of version 1.2; none: version 1.1")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "hip"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    selection: ClassVar[str] = "prompt"  # the rows of a block search together
    source: ClassVar[str] = "Lee et al. 2024, arXiv 2406.09827"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "ruler": {"k": 2048, "sink": 128, "window": 1024},
        "infinite": {
            "stages": "256x4/32x4x32768/8x1x8192",
            "k": 2048,
            "block_k": 8,
            "sink": 256,
            "window": 1024,
            "dense_layers": 4,
        },
    }

    @property
    def min_length(self) -> int:
        """Version 1.0 keeps rows dense up to the N that solves N = 3 (log2(N / 2k) + 1) k, which is 9.9 k."""
        return 10 * self.k if self.stages is None else max(8192, self.k)  # 1.2: dense below 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None and self.tile % self.block_k:
            raise ConfigError(f"hip: tile expected a multiple of block_k = {self.block_k}, got {self.tile}")
        if self.k < self.block_k:
            raise ConfigError(f"hip: k expected at least block_k = {self.block_k}, got {self.k}")
        if self.stages is not None:
            self._check_stages(self.stages)

    def _check_stages(self, text: str) -> None:
        """A ConfigError unless every stage cuts whole chunks of the one before, down to block_k."""
        form = "expected CHUNKxSTRIDE, then /CHUNKxSTRIDExKEEP for each further stage"
        parts = [p.split("x") for p in text.split("/")]
        lengths = [len(p) for p in parts]
        if not all(n.isdecimal() and int(n) for p in parts for n in p) or lengths != [2] + [3] * (len(parts) - 1):
            raise ConfigError(f"hip: stages {form}, got {text!r}")
        found = self.steps
        for before, after in zip(found, found[1:], strict=False):
            if before.chunk % after.chunk or after.keep < before.chunk:
                raise ConfigError(f"hip: stages expected chunks that divide {before.chunk} and keep that many, got {text!r}")
        if found[-1].chunk != self.block_k or any(self.block_q % stage.stride for stage in found):
            wanted = f"a last chunk of block_k = {self.block_k} and strides that divide block_q = {self.block_q}"
            raise ConfigError(f"hip: stages expected {wanted}, got {text!r}")

    @property
    def steps(self) -> tuple[Stage, ...]:
        """The stages of version 1.2, none for the tree."""
        return tuple(Stage(*map(int, p.split("x"))) for p in self.stages.split("/")) if self.stages else ()

    @property
    def groups(self) -> int:
        """Key blocks that a search keeps."""
        return self.k // self.block_k

    @property
    def width(self) -> int:
        """Keys of a tile of the layout."""
        return self.tile or self.block_k

    def phase(self, step: int) -> str | None:
        return Refresh(self.refresh).phase(step)

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        many = x.start + x.q.shape[2] if x.phase == "prefill" else x.kv.capacity  # a view may be a longer row's
        if x.layer < self.dense_layers or many <= self.sink + self.window + self.k:
            return None
        return self._prefill(x) if x.phase == "prefill" else self._decode(x, state)

    # ------------------------------------------------------------------ prefill
    def _prefill(self, x: AttnInput) -> Layout:
        n, size, step = x.q.shape[2], self.block_q, 1 if self.stages else self.stride
        last = x.start + n - 1
        block = torch.arange(x.start // size, last // size + 1, device=x.device)
        ends = ((block + 1) * size).clamp(max=last + 1) - self.window
        if (lists := self._fused(x, ends[None, None], size, step)) is not None:
            return self._layout(x, *lists)
        rows = block[:, None] * size + torch.arange(0, size, step, device=x.device)
        rows = rows.clamp(x.start, last)  # [nq, s]: a block that lies partly outside this call searches with what it has
        many = max(1, last + 1 - self.window)
        keys = 2 * self.groups * self.block_k  # that a search looks at together
        if self.stages:
            chunk = self.steps[0].chunk
            keys = 4 * max([-(-many // chunk)] + [stage.keep // stage.chunk for stage in self.steps])
        per = x.q.shape[1] * keys * (x.q.shape[3] + rows.shape[1])  # numbers for a block of rows, all heads together
        found = []
        for lo, hi in pieces(len(block), per, BUDGET if x.device.type == "cpu" else GPU_BUDGET):
            q = x.q[:, :, rows[lo:hi] - x.start]  # [1, H, nq, s, D]
            found.append(self._search(x, q, rows[None, None, lo:hi], ends[None, None, lo:hi], many))
        tiles, count = (torch.cat(t, 2) for t in zip(*found, strict=True))
        return self._layout(x, tiles, count)

    # ------------------------------------------------------------------ decode
    def _decode(self, x: AttnInput, state: State) -> Layout:
        assert x.q_pos is not None
        policy = Refresh(self.refresh)
        if x.kv.pos is None and not policy.due(x, state, LIST):
            return policy.again(x, state, LIST)  # its window reaches back to where the search ended
        ends = x.kv.lengths()[..., None]  # [B, G, 1]
        if x.kv.pos is None:
            ends = ends - self.window
        found = self._fused(x, ends.expand(-1, -1, x.q.shape[2]), 1, 1)
        found = found or self._search(x, x.q[:, :, :, None], x.q_pos[:, None, :, None], ends, x.kv.capacity)
        return policy.keep(x, state, LIST, self._layout(x, *found))

    # ------------------------------------------------------------------ both
    def _fused(self, x: AttnInput, ends: Tensor, size: int, step: int) -> tuple[Tensor, Tensor] | None:
        """What `_search` finds for all blocks of `size` rows of the call, where a kernel does it; ends `[1|B, 1|G, n]`."""
        if self.stages or x.kv.pos is not None:
            return None
        return descend_rows(
            x.q,
            x.kv,
            ends,
            start=x.start if x.phase == "prefill" else 0,
            q_pos=None if x.phase == "prefill" else x.q_pos,
            size=size,
            step=step,
            first=self.sink // self.block_k,
            keep=self.groups,
            block=self.block_k,
            tile=self.width,
            lists=x.groups if self.share == "group" else x.q.shape[1],
            representative=self.representative,
            scale=x.scale,
            softcap=x.softcap,
        )

    def _search(self, x: AttnInput, q: Tensor, q_pos: Tensor, ends: Tensor, many: int) -> tuple[Tensor, Tensor]:
        """First keys of the tiles found before entries `ends` `[B, 1|G, n]`: int32 `[B, Hl, n, T]`, and their counts.

        q `[B, H, n, s, D]` and its positions `[B, 1, n, s]` are n searches of s queries a head; no end is beyond `many`.
        """
        sink = 0 if x.kv.pos is not None else self.sink
        if ends.shape[1] != 1 and self.share == "head":
            ends = repeat_heads(ends, q.shape[1])
        if self.share == "group":  # the heads of a kv head are more queries of one search
            q = q.unflatten(1, (x.groups, -1)).movedim(2, 3).flatten(3, 4)
            q_pos = q_pos.repeat(1, 1, 1, q.shape[3] // q_pos.shape[3])
        soft: dict[str, Any] = {"scale": x.scale, "softcap": x.softcap}
        if self.stages:
            steps = self.steps if x.phase == "prefill" else tuple(s._replace(stride=1) for s in self.steps)
            start, live = prune(q, q_pos, x.kv, ends, steps, begin=sink, many=many, keep=self.k, **soft)
        else:
            first = sink // self.block_k
            blocks = (-(-ends // self.block_k) - first).clamp(min=0)
            levels = depth(max(-(-many // self.block_k) - first, 1), self.groups)
            tree: dict[str, Any] = dict(
                keep=self.groups, block=self.block_k, levels=levels, representative=self.representative
            )
            start, live = descend(q, q_pos, x.kv, torch.full_like(blocks, first), blocks, **tree, **soft)
        order, count = compact(live)
        tiles = start.gather(-1, order.long()) * self.block_k // self.width
        if self.width > self.block_k:
            tiles, count = sort_unique(tiles, count)
        return (tiles * self.width).to(torch.int32), count

    def _layout(self, x: AttnInput, tiles: Tensor, count: Tensor) -> Layout:
        block = self.block_q if x.phase == "prefill" else 1
        sink, window = (torch.full((1, 1), n, dtype=torch.int32, device=x.device) for n in (self.sink, self.window))
        return Layout(
            x.shape,
            block_q=block,
            q_offset=x.offset(block),
            tile_width=self.width,
            q_pos=x.layout_pos(),
            sink=sink,
            window=window,
            tiles=tiles,
            tile_count=count,
        )
