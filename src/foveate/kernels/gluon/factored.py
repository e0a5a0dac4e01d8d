"""Factored layouts for the kernel: diagonals and columns that all query blocks of a head share.

The kernel's tiles are 128 rows; the layout's blocks may be 64. The two halves of the rows then reach different keys at
one distance: the first half ends 64 positions earlier, so that what it reaches lies 64 further from the tile's end. The
tile therefore walks the union of both (`tiles`), and each half hides what it does not reach by a table of distances
(`cover`), which also hides columns that lie in a tile: both are per head, and nothing is stored per query block but a
plan of four numbers. A distance alone costs 128 keys a tile instead of 64, a run of them 64 more than its length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout
from ...lists import same_lead
from .prepare import BLOCK_Q, Work

WIDTH = 64  # keys of a diagonal's tile
W = tl.constexpr(WIDTH)
FAR = tl.constexpr(1 << 30)
CHUNK = 32


@triton.jit
def reach_kernel(diagonals, counts, tiles, tile_counts, cover, sb, sh, cb, ch, HL, T, SIZE, LAG: tl.constexpr,
                 CHUNK: tl.constexpr):  # fmt: skip
    """One program a list: 1 in `cover` at every distance that a diagonal reaches; twice the distances of the union.

    A run of diagonals gets one tile more at its far end (LAG), for the half of the rows that ends LAG earlier.
    """
    pid = tl.program_id(0)
    b = pid // HL
    head = pid % HL
    row = diagonals + b.to(tl.int64) * sb + head.to(tl.int64) * sh
    count = tl.load(counts + b * cb + head * ch)
    tiles += pid.to(tl.int64) * T
    cover += pid.to(tl.int64) * SIZE
    lane = tl.arange(0, CHUNK)
    written = 0
    for lo in range(0, count, CHUNK):
        i = lo + lane
        d = tl.load(row + i, mask=i < count, other=0)
        after = tl.load(row + i + 1, mask=i + 1 < count, other=FAR)
        extra = (i < count) & (LAG > 0) & (after > d + W)
        size = (i < count).to(tl.int32) + extra.to(tl.int32)
        at = written + tl.cumsum(size, 0) - size
        tl.store(tiles + at, 2 * d, mask=i < count)
        tl.store(tiles + at + 1, 2 * (d + W), mask=extra)
        x = d[:, None] + 1 + tl.arange(0, W)[None, :]
        one = tl.full([CHUNK, W], 1, tl.uint8)
        tl.store(cover + x, one, mask=(i < count)[:, None] & (x < SIZE))
        written += tl.sum(size, 0)
    tl.store(tile_counts + pid, written)


@triton.jit
def partial_kernel(tiles, tile_counts, cover, T, SIZE, LAG: tl.constexpr, CHUNK: tl.constexpr):
    """Program (list, chunk): takes 1 from the words of tiles with a key that a half of the rows does not reach, or that a
    nearer tile owns. A neighbour's word gives its distance whether or not its own program has been here."""
    pid = tl.program_id(0)
    i = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    used = i < tl.load(tile_counts + pid)
    tiles += pid.to(tl.int64) * T
    cover += pid.to(tl.int64) * SIZE
    word = tl.load(tiles + i, mask=used, other=0)
    d = (word + 1) >> 1
    before = (tl.load(tiles + i - 1, mask=used & (i > 0), other=-FAR) + 1) >> 1
    x = d[:, None] + 1 + tl.arange(0, W)[None, :]
    late = tl.load(cover + x, mask=used[:, None] & (x < SIZE), other=0).to(tl.int32)
    early = tl.load(cover + x - LAG, mask=used[:, None] & (x >= LAG) & (x - LAG < SIZE), other=0).to(tl.int32)
    whole = (tl.min(late * early, 1) > 0) & (before + W <= d)
    tl.store(tiles + i, word - 1, mask=used & (whole == 0))


@triton.jit
def factored_plan_kernel(tiles, tile_counts, cols, col_counts, plan, counter, eb, eh, fb, fh, HL, NQ, T, N, M,
                         BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One program a list and query block: (tiles that hold a key some row sees, tiles before the first of those, columns
    that some row sees, 0)."""
    pid = tl.program_id(0)
    block = pid % NQ
    lead = pid // NQ
    b = lead // HL
    head = lead % HL
    end = M - N + block * BLOCK + BLOCK
    close = M - N + tl.minimum(block * BLOCK + BLOCK, N)  # keys from here on are seen by no row
    lane = tl.arange(0, CHUNK)
    row = tiles + lead.to(tl.int64) * T
    count = tl.load(tile_counts + lead)
    skip = 0
    stop = 0
    for lo in range(0, count, CHUNK):
        i = lo + lane
        d = (tl.load(row + i, mask=i < count, other=0) + 1) >> 1
        skip += tl.sum(((i < count) & (end - d - W >= close)).to(tl.int32), 0)
        stop += tl.sum(((i < count) & (end - d > 0)).to(tl.int32), 0)
    row = cols + b.to(tl.int64) * eb + head.to(tl.int64) * eh
    count = tl.load(col_counts + b * fb + head * fh)
    seen = 0
    for lo in range(0, count, CHUNK):
        key = tl.load(row + lo + lane, mask=lo + lane < count, other=FAR)
        seen += tl.sum((key < close).to(tl.int32), 0)
    plan += pid.to(tl.int64) * 4
    tl.store(plan, tl.maximum(stop - skip, 0))
    tl.store(plan + 1, skip)
    tl.store(plan + 2, seen)
    tl.store(plan + 3, 0)
    if pid == 0:
        tl.store(counter, 0)


def factored(layout: Layout, device: torch.device) -> Work:
    """The kernel's view of diagonals + columns: one memset and three small launches, scratch of M bytes a list."""
    _, h, n, m = layout.shape
    diagonals, counts, columns, column_counts = parts(layout)
    b, hl = counts.shape
    nq, lag, size = -(-n // BLOCK_Q), BLOCK_Q - layout.block_q, m + BLOCK_Q + 1
    most = diagonals.shape[-1] * (2 if lag else 1)
    tiles = torch.empty((b, hl, most + 1), dtype=torch.int32, device=device)
    tile_counts = torch.empty((b, hl), dtype=torch.int32, device=device)
    cover = torch.zeros((b, hl, size), dtype=torch.uint8, device=device)
    plan = torch.empty((b, hl, nq, 4), dtype=torch.int32, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device)
    reach_kernel[(b * hl,)](
        diagonals, counts, tiles, tile_counts, cover, *diagonals.stride()[:2], *counts.stride(), hl, most + 1, size, LAG=lag,
        CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    partial_kernel[(b * hl, -(-most // CHUNK))](tiles, tile_counts, cover, most + 1, size, LAG=lag, CHUNK=CHUNK, num_warps=4)
    factored_plan_kernel[(b * hl * nq,)](
        tiles, tile_counts, columns, column_counts, plan, counter, *columns.stride()[:2], *column_counts.stride(), hl, nq,
        most + 1, n, m, BLOCK=BLOCK_Q, CHUNK=128, num_warps=1,
    )  # fmt: skip
    return Work(counter, shared(tiles, nq), plan, h // hl, shared(columns, nq), WIDTH, cover=cover, lag=lag)


def shared(t: Tensor, nq: int) -> Tensor:
    """`[B, Hl, T]` seen as `[B, Hl, nq, T]`: one list for all query blocks."""
    return t[:, :, None].expand(-1, -1, nq, -1)


def parts(layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(diagonals, counts, columns, counts) `[B, Hl, ..]`, `[B, Hl]` with one leading shape; an absent part is empty."""
    pairs = []
    for index, count in ((layout.diagonals, layout.diagonal_count), (layout.columns, layout.column_count)):
        if index is None or count is None or index.shape[-1] == 0:
            count = torch.zeros((1, 1), dtype=torch.int32, device=layout.device)
            index = count[..., None]
        pairs += [index if index.stride(-1) == 1 else index.contiguous(), count]
    diagonals, counts, columns, column_counts = same_lead(*pairs)
    return diagonals, counts, columns, column_counts
