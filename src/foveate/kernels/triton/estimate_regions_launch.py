"""Launches of the kernel of `estimate_regions.py`: once to count, once to write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import estimate_regions
from .paging_launch import usable

__all__ = ["usable"]  # whether this kernel computes where tensors like t are

CHUNK = 1024  # key blocks, or keys, of a step


def split_regions(
    keys: Tensor, many: Tensor, touched: Tensor, first: int, blocks: int, block: int, each: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tiles int32 `[B, Hl, blocks, widest]`, counts `[B, Hl, blocks]`, entries and counts of the three regions.

    Slots beyond a count are 0. Waits for the device once, for the widths.

    Args:
        keys: int32 `[chunks, B, Hl, V]`, ascending, and many int32 `[chunks, B, Hl]`, of each chunk of query blocks.
        touched: bool `[chunks, B, Hl, more than first + blocks]`, distances in blocks that are named.
        first, blocks: the query blocks. block: their rows, and a tile's keys. each: blocks of a chunk.
    """
    lead = keys.shape[1:3]
    rows = lead.numel()
    keys, many, marks = keys.contiguous(), many.to(torch.int32).contiguous(), touched.contiguous().view(torch.int8)
    count = torch.empty(6, rows, blocks, dtype=torch.int32, device=keys.device)
    lists = [count] * 6  # nothing is written to them

    def launch(wide: list[int], write: bool) -> None:
        sizes: Any = (first, blocks, each, marks.shape[-1], keys.shape[-1], *wide)
        estimate_regions.split_regions[(blocks, rows)](
            keys, many, marks, count, *lists, *sizes, BLOCK=block, CHUNK=CHUNK, WRITE=write, num_warps=4
        )

    launch([0] * 6, False)
    wide = count.flatten(1).amax(1).clamp(min=1).tolist()
    lists = [torch.zeros(rows, blocks, w, dtype=torch.int32, device=keys.device) for w in wide]
    launch(wide, True)
    lists, counts = ([t.view(*lead, *t.shape[1:]) for t in some] for some in (lists, count))
    return [(lists[i], counts[i], lists[3 + i], counts[3 + i]) for i in range(3)]
