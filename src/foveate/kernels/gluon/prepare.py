"""From a Layout to what the kernel reads: the lists as they are, a plan of a few int32 per row, and a tile counter.

One small launch, no host synchronisation. The lists themselves are not copied: the kernel walks them where they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layout import Layout
from ...lists import same_lead
from ..relaunch import Arguments
from ..relaunch import launch as again

BLOCK_Q = 128


@dataclass(frozen=True)
class Work:
    """Arguments of the kernel that come from the layout.

    Attributes:
        counter: int32 `[1]`, 0: tiles handed out.
        tiles: int32 `[B|1, Hl, R, T]`, last axis contiguous (dense layouts and rules: unread).
        plan: int32 `[B|1, Hl, NQ, 2]`, a row for every tile: entries that hold a visible key; steps, from the last entry on,
            that need a mask. With columns `[.., 4]`: .., columns that some row sees, whole steps of them that every row
            sees. Of a rule `[B|1, Hl, 1, 2]`: window, sink.
        share: query heads served by one list.
        columns: int32 `[B|1, Hl, R, C]`, last axis contiguous, or None.
        width: keys of a list entry, 128, 64 or 32; a step takes 128. rule: the plan holds a rule.
        block: rows of a tile in one head, 128 or 64; a tile of 64-row blocks takes two heads.
        group: tiles that a row of lists serves, one after another: R = ceil((ahead + NQ) / group).
        ahead: of a chunk that begins inside a query block, tiles of that block before its first one.
        cover, lag: of factored layouts (`factored.py`; lists are then shared by all query blocks), uint8 `[B|1, Hl, ..]`, 1
            at the distances that a diagonal reaches; how much earlier than the tile its first 64 rows end.
    """

    counter: Tensor
    tiles: Tensor
    plan: Tensor
    share: int
    columns: Tensor | None = None
    width: int = BLOCK_Q
    rule: bool = False
    block: int = BLOCK_Q
    group: int = 1
    ahead: int = 0
    cover: Tensor | None = None
    lag: int = 0

    def strides(self) -> tuple[int, ...]:
        """Of batch row, list and row of lists in `tiles`, of a batch row in rows of `plan`, and of batch row, list and
        row of lists in `columns` (0: shared)."""
        many = int(self.plan.shape[0] > 1)
        hl, nq = self.plan.shape[1:3]
        of = [0, 0, 0] if self.columns is None else self.columns.stride()[:3]
        sb, sh, sq = self.tiles.stride()[:3]
        return many * sb, sh, sq, many * hl * nq, many * of[0], of[1], of[2]


@triton.jit
def seen_tiles(row, count, common, close, WIDTH: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """(entries of a list that some row of a tile sees; how many of them, the last ones, fill no step of SPAN keys and are a
    masked one of their own; how many of the steps before that need a mask).

    An entry needs a mask if a row must not see one of its keys, or if the next entry begins inside it and owns them; so do
    all after the first such.

    common, close: keys before `common` are seen by every row, keys from `close` on by none.
    """
    used = 0
    bare = count  # entries before the first that needs a mask
    for lo in range(0, count, CHUNK):
        i = lo + tl.arange(0, CHUNK)
        start = tl.load(row + i, mask=i < count, other=2147483647)
        after = tl.load(row + i + 1, mask=i + 1 < count, other=2147483647)
        live = start < close
        used += tl.sum(live.to(tl.int32), 0)
        partial = live & ((start > common - WIDTH) | (after - start < WIDTH))
        bare = tl.minimum(bare, tl.min(tl.where(partial, i, count), 0))
    hidden = tl.maximum(used - bare, 0)
    FILL: tl.constexpr = SPAN // WIDTH
    odd = used % FILL
    return used, odd, (tl.maximum(hidden - odd, 0) + FILL - 1) // FILL


@triton.jit(do_not_specialize=["HL", "NQ", "N", "M", "group", "ahead", "halvings"])
def plan_kernel(tiles, counts, cols, col_counts, plan, counter, sb, sh, sq, cb, ch, cq, eb, eh, eq, fb, fh, fq, HL, NQ, N, M,
                group, ahead, halvings, WIDTH: tl.constexpr, CAUSAL: tl.constexpr, COLS: tl.constexpr,
                BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """One program a tile of a list. Entries that no row of this tile sees (its list may serve later ones, too) are not used.

    Columns (COLS): those that no row sees are not used, and whole steps of 128 that every row sees need no mask. Both
    numbers come from a search by halves (2 ** halvings is more than the columns of any list): a list that serves many
    tiles is long.
    """
    pid = tl.program_id(0)
    block = pid % NQ
    head = (pid // NQ) % HL
    b = pid // (NQ * HL)
    line = (block + ahead) // group  # the row of lists that serves this tile
    row = tiles + b.to(tl.int64) * sb + head.to(tl.int64) * sh + line.to(tl.int64) * sq
    count = tl.load(counts + b.to(tl.int64) * cb + head * ch + line * cq)
    common = M  # keys before it are seen by every row of the tile, keys from `close` on by none
    close = M
    if CAUSAL:
        common = tl.minimum(M - N + block * BLOCK + 1, M)
        close = M - N + tl.minimum(block * BLOCK + BLOCK, N)
    used, odd, steps = seen_tiles(row, count, common, close, WIDTH, 128, CHUNK)
    steps = (odd > 0).to(tl.int32) + steps
    PLAN: tl.constexpr = 4 if COLS else 2
    tl.store(plan + pid * PLAN, used)
    tl.store(plan + pid * PLAN + 1, tl.maximum(steps, 1))
    if COLS:
        row = cols + b.to(tl.int64) * eb + head.to(tl.int64) * eh + line.to(tl.int64) * eq
        count = tl.load(col_counts + b.to(tl.int64) * fb + head * fh + line * fq)
        lane = tl.arange(0, 2)  # how many keys lie before `close`, and before `common`
        limit = tl.where(lane == 0, close, common)
        low = lane * 0
        high = low + count
        for _ in range(0, halvings):
            open = low < high
            middle = (low + high) >> 1
            before = tl.load(row + middle, mask=open, other=0) < limit
            low = tl.where(open & before, middle + 1, low)
            high = tl.where(open & (before == 0), middle, high)
        tl.store(plan + pid * PLAN + 2 + lane, tl.where(lane == 0, low, low // 128))
    if pid == 0:
        tl.store(counter, 0)


def prepare(layout: Layout, device: torch.device) -> Work:
    """The kernel's view of a layout that `supports` accepted. Launches one kernel (dense, rule: one or two tiny ones)."""
    _, h, n, m = layout.shape
    if layout.full or layout.has_rule:
        zero = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=device)
        return Work(zero, zero, zero, 1) if layout.full else rule(layout, zero)
    if layout.diagonals is not None or layout.columns is not None:
        from .factored import factored

        return factored(layout, device)
    tiles, counts, columns, column_counts = lists(layout)
    b, hl, _ = counts.shape
    cols = columns is not None
    block = tile_rows(layout)
    nq = -(-n // block)
    plan = torch.empty((b, hl, nq, 4 if cols else 2), dtype=torch.int32, device=device)
    width = BLOCK_Q if layout.tiles is None else layout.tile_width
    counter = torch.empty(1, dtype=torch.int32, device=device)
    group, ahead = layout.block_q // block, layout.q_offset // block
    work = Work(counter, tiles, plan, h // hl, columns, width, block=block, group=group, ahead=ahead)
    columns, column_counts = (columns, column_counts) if cols else (tiles, counts)
    assert columns is not None and column_counts is not None
    tensors = tiles, counts, columns, column_counts, plan, counter

    def build() -> Arguments:
        strides = *tiles.stride()[:3], *counts.stride(), *columns.stride()[:3], *column_counts.stride()
        args = [*tensors, *strides, hl, nq, n, m, group, ahead, columns.shape[-1].bit_length()]
        options = dict(WIDTH=width, CAUSAL=layout.causal, COLS=cols, BLOCK=block, CHUNK=128, num_warps=1)
        return (b * hl * nq,), args, options

    again(plan_kernel, tensors, (n, m, width, block, group, ahead, layout.causal, cols), build)
    return work


def tile_rows(layout: Layout) -> int:
    """Rows of a head that a tile of the kernel takes of a layout of lists: 128, or all 64 of a query block."""
    return BLOCK_Q if layout.block_q % BLOCK_Q == 0 else layout.block_q


def rule(layout: Layout, zero: Tensor) -> Work:
    """A layout that is a window and a sink and nothing else; either may be absent."""
    none = zero.view(1, 1)
    window, sink = (none if t is None else t for t in (layout.window, layout.sink))
    plan = torch.stack(same_lead(window, sink), -1)[:, :, None]
    return Work(zero, zero, plan, layout.shape[1] // plan.shape[1], rule=True)


def lists(layout: Layout) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(tiles, counts, columns, column counts) of a layout of tiles, single keys or both, with one leading shape."""
    tiles, counts, columns, column_counts = layout.tiles, layout.tile_count, layout.entries, layout.entry_count
    if columns is None or column_counts is None:
        assert tiles is not None and counts is not None
        return _row(tiles), counts, None, None
    if tiles is None or counts is None:
        counts = torch.zeros_like(column_counts)
        tiles = counts[..., None]
    tiles, counts, columns, column_counts = same_lead(tiles, counts, columns, column_counts)
    return _row(tiles), counts, _row(columns), column_counts


def _row(index: Tensor) -> Tensor:
    """`index` with a contiguous last axis that holds something."""
    if index.shape[-1] == 0:
        return index.new_zeros((*index.shape[:-1], 1))
    return index if index.stride(-1) == 1 else index.contiguous()
