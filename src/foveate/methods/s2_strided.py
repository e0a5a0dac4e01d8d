"""S2-Attention: every head sees a local band and every stride-th block, each kv head another residue of blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layout import Layout
from .base import AttnInput, Method, State, option, shared

MOST = 1 << 26  # numbers in lists (256 MiB); beyond, the kernel expands the rule itself


@dataclass(frozen=True)
class S2Strided(Method):
    """Lin et al. 2024, "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads"
    (arXiv 2407.17678), the pattern of Phi-3-small.

    On blocks of `block` tokens, a row of block I sees the `local` newest blocks up to I, and every block J with
    (J + h * a + offset) % stride == 0, where a = max(1, stride // heads) and h counts kv heads (`share="group"`, as
    published) or query heads (`share="head"`). The columns are absolute, so a block that a head has left behind is never
    needed again. The last `dense_heads` of them, and every `dense_every`-th layer, stay dense; `homo` gives all heads
    one phase. Models are trained with this pattern; one that was not wants its first tokens, `sink`.

    The shards cover the whole context only if as many heads as `stride` differ; a note says when they do not. Differs from
    the published code in two points: a comes from the number of heads that phases run over, not always from the query
    heads, which leaves blocks unseen that could be covered, and dense heads are not counted, since they need no shard.
    """

    block: int = option(64, low=16, help="tokens of a block of queries or keys")
    local: int = option(32, low=1, help="newest blocks, always included")
    stride: int = option(8, low=1, help="blocks from one seen block to the next")
    offset: int = option(0, low=0, help="shift of the seen blocks, in blocks")
    homo: bool = option(False, help="give all heads the same blocks")
    dense_heads: int = option(0, low=0, help="last heads, which stay dense")
    dense_every: int | None = option(None, low=1, help="every so many-th layer stays dense; none: no layer")
    sink: int = option(0, low=0, help="first tokens of the text, always included")
    share: str = shared("group")  # type: ignore[misc]

    id: ClassVar[str] = "s2_strided"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    source: ClassVar[str] = "Lin et al. 2024, arXiv 2407.17678"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"local": 8, "stride": 8, "sink": 16, "share": "head"},
        "phi3": {"local": 16, "stride": 8, "dense_every": 2},
    }

    @property
    def min_length(self) -> int:
        """Below this the local band is everything."""
        return self.local * self.block + 1

    def phase(self, step: int) -> str | None:
        return "step"

    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if self.dense_every is not None and (x.layer + 1) % self.dense_every == 0:
            return None
        stride, phase = self.shards(x.groups if self.share == "group" else x.q.shape[1], x)
        rule: dict[str, Any] = dict(sink=self.sink, stride=stride, phase=phase, stride_block=self.block)
        if x.phase == "decode":  # one row: the band is a window that begins where its oldest block does
            assert x.q_pos is not None
            window = x.q_pos % self.block + 1 + (self.local - 1) * self.block
            return self._rule(x, 1, window=window, **rule)
        rows = -(-(x.q.shape[2] + x.offset(self.block)) // self.block)
        if self.sink == 0 and (lists := self._lists(x, rows, stride, phase)) is not None:
            return lists
        tiles, count = self._band(x, rows)
        return replace(self._rule(x, self.block, **rule), tiles=tiles, tile_count=count)

    def shards(self, heads: int, x: AttnInput) -> tuple[Tensor, Tensor]:
        """(stride, phase) int32 `[heads]`: head i sees block J if J % stride == phase. A note if blocks stay unseen."""
        sparse = max(0, heads - self.dense_heads)
        number = torch.arange(heads, dtype=torch.int32, device=x.device)
        step = 0 if self.homo else max(1, self.stride // max(1, sparse))
        stride = torch.where(number < sparse, self.stride, 1).to(torch.int32)
        phases = 1 if self.homo else min(sparse, self.stride)
        if self.dense_heads == 0 and phases < self.stride:
            x.note(
                f"s2_strided: {heads} heads have {phases} phases of {self.stride}; far blocks of the other phases are "
                "seen by no head of a layer (a smaller stride, share=head or dense_heads would see them)"
            )
        return stride, torch.remainder(-(number * step + self.offset), stride)

    def _rule(self, x: AttnInput, block_q: int, **rule: Any) -> Layout:
        grid: dict[str, Any] = dict(block_q=block_q, q_offset=x.offset(block_q), q_pos=x.layout_pos())
        return Layout.static(x.shape, device=x.device, validate=False, **grid, **rule)

    def _lists(self, x: AttnInput, rows: int, stride: Tensor, phase: Tensor) -> Layout | None:
        """The same blocks as lists, which the fastest kernels read; None where they would not be small."""
        size, first = self.block, x.start // self.block
        least = 1 if self.dense_heads else self.stride
        width = max(0, (first + rows - 1 - self.local) // least + 1) + min(self.local, first + rows)
        if len(stride) * rows * width > MOST:
            return None
        number = first + torch.arange(rows, dtype=torch.int32, device=x.device)
        step, begin = stride[:, None], phase[:, None]
        far = (torch.div(number - self.local - begin, step, rounding_mode="floor") + 1).clamp(min=0)[..., None]
        band = (number + 1).clamp(max=self.local)
        slot = torch.arange(width, dtype=torch.int32, device=x.device)
        near = (number + 1 - band)[:, None] + slot - far
        tiles = torch.where(slot < far, begin[..., None] + slot * step[..., None], near)
        return Layout(
            x.shape,
            block_q=size,
            q_offset=x.offset(size),
            tile_width=size,
            q_pos=x.layout_pos(),
            tiles=(torch.minimum(tiles, number[:, None]) * size)[None],
            tile_count=(far[..., 0] + band).to(torch.int32)[None],
        )

    def _band(self, x: AttnInput, rows: int) -> tuple[Tensor, Tensor]:
        """The `local` newest blocks of each of `rows` query blocks: first keys int32 `[1, 1, rows, T]` and counts."""
        number = x.start // self.block + torch.arange(rows, dtype=torch.int32, device=x.device)
        count = (number + 1).clamp(max=self.local)
        width = min(self.local, x.start // self.block + rows)
        slot = torch.arange(width, dtype=torch.int32, device=x.device)
        tiles = torch.minimum((number + 1 - count)[:, None] + slot, number[:, None]) * self.block
        return tiles[None, None], count[None, None]
