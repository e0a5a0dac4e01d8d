"""From a Layout to what the kernel reads: the lists as they are, a plan of two int32 per row, and a tile counter.

One small launch, no host synchronisation. The lists themselves are not copied: the kernel walks them backwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout

BLOCK_Q = 128


@dataclass(frozen=True)
class Work:
    """Arguments of the kernel that come from the layout.

    Attributes:
        counter: int32 `[1]`, 0: tiles handed out.
        tiles: int32 `[B|1, Hl, NQ, T]`, last axis contiguous (dense layouts: unread).
        plan: int32 `[B|1, Hl, NQ, 2]`: entries that hold a visible key; steps, from the last entry on, that need a mask.
        share: query heads served by one list.
    """

    counter: Tensor
    tiles: Tensor
    plan: Tensor
    share: int

    def strides(self) -> tuple[int, int, int, int]:
        """Of batch row, list and query block in `tiles`, and of a batch row in pairs of `plan` (0: shared)."""
        b, hl, nq, _ = self.plan.shape
        sb, sh, sq = self.tiles.stride()[:3]
        return (sb, sh, sq, hl * nq) if b > 1 else (0, sh, sq, 0)


@triton.jit
def plan_kernel(tiles, counts, plan, counter, sb, sh, sq, cb, ch, cq, HL, NQ, N, M,
                WIDTH: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One program a list. A step holds 128 // WIDTH entries; in an odd list the last entry is a step of its own."""
    pid = tl.program_id(0)
    block = pid % NQ
    head = (pid // NQ) % HL
    b = pid // (NQ * HL)
    row = tiles + b.to(tl.int64) * sb + head.to(tl.int64) * sh + block.to(tl.int64) * sq
    count = tl.load(counts + b.to(tl.int64) * cb + head * ch + block * cq)
    common = M  # keys before it are seen by every row of the block, keys from `close` on by none
    close = M
    if CAUSAL:
        common = tl.minimum(M - N + block * 128 + 1, M)
        close = M - N + tl.minimum(block * 128 + 128, N)
    lane = tl.arange(0, CHUNK)
    used = 0
    bare = count  # entries before the first that needs a mask
    for lo in range(0, count, CHUNK):
        i = lo + lane
        start = tl.load(row + i, mask=i < count, other=2147483647)
        after = tl.load(row + i + 1, mask=i + 1 < count, other=2147483647)
        live = start < close
        used += tl.sum(live.to(tl.int32), 0)
        partial = live & ((start > common - WIDTH) | (after - start < WIDTH))
        bare = tl.minimum(bare, tl.min(tl.where(partial, i, count), 0))
    hidden = tl.maximum(used - bare, 0)
    if WIDTH == 64:
        odd = used & 1
        steps = tl.where(odd == 1, 1 + hidden // 2, (hidden + 1) // 2)
    else:
        steps = hidden
    tl.store(plan + pid * 2, used)
    tl.store(plan + pid * 2 + 1, tl.maximum(steps, 1))
    if pid == 0:
        tl.store(counter, 0)


def prepare(layout: Layout, device: torch.device) -> Work:
    """The kernel's view of a layout that `supports` accepted. Launches one kernel (dense: one memset)."""
    _, h, n, m = layout.shape
    if layout.full:
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=device)
        return Work(zero, zero, zero, 1)
    tiles, counts = layout.tiles, layout.tile_count
    assert tiles is not None and counts is not None
    if tiles.shape[-1] == 0:
        tiles = tiles.new_zeros((*tiles.shape[:-1], 1))
    if tiles.stride(-1) != 1:
        tiles = tiles.contiguous()
    b, hl, nq = counts.shape
    plan = torch.empty((b, hl, nq, 2), dtype=torch.int32, device=device)
    work = Work(torch.empty(1, dtype=torch.int32, device=device), tiles, plan, h // hl)
    plan_kernel[(b * hl * nq,)](
        tiles, counts, plan, work.counter, *tiles.stride()[:3], *counts.stride(), hl, nq, n, m,
        WIDTH=layout.tile_width, CAUSAL=layout.causal, CHUNK=128, num_warps=1,
    )  # fmt: skip
    return work
