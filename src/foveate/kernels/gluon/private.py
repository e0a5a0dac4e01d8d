"""Lists of 64-row blocks that each head has for itself: what `private_kernel.py` reads of them, its launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout
from ..relaunch import Arguments
from ..relaunch import launch as again
from .launch import DTYPES, _descriptor, _multiprocessors, opened
from .prepare import lists, seen_tiles
from .private_kernel import private_kernel
from .shim import shared_layout

STAGES = {128: 3, 64: 6}  # ring entries of a consumer by D: what shared memory holds


@dataclass(frozen=True)
class Private:
    """Arguments of the kernel that come from the layout.

    Attributes:
        counter: int32 `[1]`, 0: tiles handed out beyond the first of each consumer.
        tiles: int32 `[B|1, Hl, NQ, T]`, last axis contiguous.
        plan: int32 `[B|1, Hl, NQ, 2]`: tiles that hold a visible key; steps of 64 keys, from the last tile on, that need a
            mask.
            With columns `[.., 4]`: .., columns that some row sees, whole steps of 64 of them that every row sees.
        columns: int32 `[B|1, Hl, NQ, C]`, last axis contiguous, or None.
        width: keys of a tile, 64 or 32.
    """

    counter: Tensor
    tiles: Tensor
    plan: Tensor
    columns: Tensor | None = None
    width: int = 64


@triton.jit
def plan_kernel(tiles, counts, cols, col_counts, plan, counter, sb, sh, sq, cb, ch, cq, eb, eh, eq, fb, fh, fq, HL, NQ, N, M,
                skew, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One program a list: what the rows of its block see of it."""
    pid = tl.program_id(0)
    block = pid % NQ
    head = (pid // NQ) % HL
    b = pid // (NQ * HL)
    row = tiles + b.to(tl.int64) * sb + head.to(tl.int64) * sh + block.to(tl.int64) * sq
    count = tl.load(counts + b.to(tl.int64) * cb + head * ch + block * cq)
    common = M  # keys before it are seen by every row of the block, keys from `close` on by none
    close = M
    if CAUSAL:
        first = block * 64 - skew
        common = tl.minimum(M - N + tl.maximum(first, 0) + 1, M)
        close = M - N + tl.minimum(first + 64, N)
    used, odd, steps = seen_tiles(row, count, common, close, WIDTH, 64, CHUNK)
    PLAN: tl.constexpr = 4 if COLS else 2
    tl.store(plan + pid * PLAN, used)
    tl.store(plan + pid * PLAN + 1, odd + steps)  # at most one tile is odd
    if COLS:
        row = cols + b.to(tl.int64) * eb + head.to(tl.int64) * eh + block.to(tl.int64) * eq
        count = tl.load(col_counts + b.to(tl.int64) * fb + head * fh + block * fq)
        lane = tl.arange(0, CHUNK)
        seen = 0
        whole = 0
        for lo in range(0, count, CHUNK):
            key = tl.load(row + lo + lane, mask=lo + lane < count, other=2147483647)
            seen += tl.sum((key < close).to(tl.int32), 0)
            whole += tl.sum((key < common).to(tl.int32), 0)
        tl.store(plan + pid * PLAN + 2, seen)
        tl.store(plan + pid * PLAN + 3, whole // 64)
    if pid == 0:
        tl.store(counter, 0)


def prepare(layout: Layout, device: torch.device) -> Private:
    """The kernel's view of a layout in blocks of 64 rows: tiles of 64 keys, single keys or both, or tiles of 32 keys. One
    launch, no host synchronisation, no copy (unless tiles and columns have leading shapes of their own)."""
    tiles, counts, columns, column_counts = lists(layout)
    _, _, n, m = layout.shape
    b, hl, nq = counts.shape
    cols = columns is not None
    plan = torch.empty((b, hl, nq, 4 if cols else 2), dtype=torch.int32, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device)
    width = 64 if layout.tiles is None else layout.tile_width
    work = Private(counter, tiles, plan, columns, width)
    columns, column_counts = (columns, column_counts) if cols else (tiles, counts)
    assert columns is not None and column_counts is not None
    tensors = tiles, counts, columns, column_counts, plan, counter

    def build() -> Arguments:
        strides = *tiles.stride()[:3], *counts.stride(), *columns.stride()[:3], *column_counts.stride()
        args = [*tensors, *strides, hl, nq, n, m, layout.q_offset]
        return (b * hl * nq,), args, dict(WIDTH=width, CAUSAL=layout.causal, COLS=cols, CHUNK=128, num_warps=1)

    again(plan_kernel, tensors, (n, m, width, layout.q_offset, layout.causal, cols), build)
    return work


def run(q: Tensor, k: Tensor, v: Tensor, layout: Layout, work: Private, scale: float) -> tuple[Tensor, Tensor]:
    """(out with the strides of q, lse fp32 `[B, H, N]`). `work` is fresh from `prepare`: its counter is 0."""
    q, k, v, out, lse, scale = opened(q, k, v, scale)
    tensors = q, k, v, out, lse, work.counter, work.tiles, work.plan, work.columns

    def build() -> Arguments:
        ctas = min(grid(q, layout), _multiprocessors(q.device))
        return (ctas,), *arguments(q, k, v, out, lse, layout, work, scale)

    again(private_kernel, tensors, (layout.causal, layout.q_offset, layout.num_blocks, scale, work.width), build)
    return out, lse


def grid(q: Tensor, layout: Layout) -> int:
    """The most CTAs that have work: two tiles of 64 rows each."""
    return -(-q.shape[0] * q.shape[1] * layout.num_blocks // 2)


def arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, work: Private, scale: float
) -> tuple[list[Any], dict[str, Any]]:
    """(positional arguments, constexpr arguments and launch options) of `private_kernel`, for `readable` tensors."""
    b, h, n, d = q.shape
    g, m = k.shape[1], k.shape[2]
    hl, nq = work.plan.shape[1:3]
    many = int(work.plan.shape[0] > 1)  # 0: all batch rows share the lists
    cols = work.columns is not None
    columns = work.tiles if work.columns is None else work.columns
    steps = [s // 8 for t in (k, v) for s in t.stride()[:3]] if cols else [0] * 6  # 16 bytes: what a thread copies
    (sb, *tile_steps), (cb, *column_steps) = work.tiles.stride()[:3], columns.stride()[:3]
    block, keys = [1, 1, 64, d], [1, 1, 64, d] if work.width == 64 else [1, 1, work.width, 64]
    args = [
        _descriptor(q, block), _descriptor(k, keys), _descriptor(v, keys), out, lse, work.counter, work.tiles, work.plan,
        columns, k, v, many * sb, *tile_steps, many * hl, many * cb, *column_steps, *steps,
        *(s // 8 for s in out.stride()[:3]), h // hl, scale * math.log2(math.e), b * h * nq, h, g, nq, n, m, layout.q_offset,
    ]  # fmt: skip
    options = dict(
        FLAT=shared_layout(block[2:], DTYPES[q.dtype]), CAUSAL=layout.causal, COLS=cols, WIDTH=work.width, D=d,
        STAGES=STAGES[d], FEEDERS=2 if cols else 1, num_warps=4, maxnreg=168, enable_fp_fusion=True,
    )  # fmt: skip
    return args, options
