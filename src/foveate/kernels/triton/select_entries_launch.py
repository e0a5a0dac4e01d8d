"""Launches of `select_entries*.py`: the kernels behind `scores.entries.best_entries`. Nothing waits for the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from . import select_entries as kernels
from . import select_entries_long as long
from .paging_launch import INTERPRET, _has_bf16

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int32)
ONE = 4096  # entries of a row that one program takes
FEW = 512  # of a long row, up to so many entries are chosen through the peaks of blocks: on an H200 128 of 128K in 32 rows
# take 21 us so and about 70 by digits, 1,024 about 80 either way, 2,048 of a single row 160 and about 60
HELD = 16384  # numbers that a program chooses from at most
PEAKS = 2048  # entries that a program of block_peaks reduces
CHUNKS = (2048, 8192)  # entries of a program where many share a row: fewer entries, or more than MANY in all rows
MANY = 1 << 20


def usable(t: Tensor) -> bool:
    """Whether these kernels rank scores like t: its device and dtype."""
    if t.dtype not in DTYPES:
        return False
    if t.device.type != "cuda":
        return INTERPRET and t.dtype != torch.bfloat16
    return t.dtype != torch.bfloat16 or _has_bf16(t.device.index)


def best_entries(
    score: Tensor, keep: int, *, length: Tensor | None = None, sink: int = 0, recent: int = 1, late: bool = False
) -> tuple[Tensor, Tensor]:
    """What `scores.entries.best_entries` gives."""
    b, lists, m = score.shape
    keep, rows = min(keep, m), b * lists
    score, length = score.contiguous(), None if length is None else length.contiguous()
    groups = lists if length is None else length.shape[1]
    out = torch.empty(b, lists, keep, dtype=torch.int32, device=score.device)
    count = torch.empty(b, lists, dtype=torch.int32, device=score.device)
    given = (lists, groups, sink, recent)
    if m <= ONE:
        _choose(rows, m, score, length, None, None, out, count, m, m, keep, *given, SOURCE="scores", WIDTH=1, LATE=late)
        return out, count
    width = _width(m, keep)
    blocks = -(-m // width)
    if keep <= FEW and blocks <= HELD and keep * width <= HELD:
        peaks = torch.empty(rows, blocks, dtype=torch.int32, device=score.device)
        listed, found = torch.empty_like(out), torch.empty_like(count)
        kernels.block_peaks[(-(-m // PEAKS), rows)](
            score, length, peaks, m, blocks, *given, WIDTH=width, CHUNK=PEAKS, num_warps=4
        )
        how = {"WIDTH": width, "LATE": late}
        _choose(rows, blocks, peaks, length, None, None, listed, found, m, blocks, keep, *given, SOURCE="peaks", **how)
        _choose(rows, keep * width, score, length, listed, found, out, count, m, m, keep, *given, SOURCE="listed", **how)
        return out, count
    chunk = CHUNKS[rows * m > MANY]
    chunks, warps = -(-m // chunk), max(1, chunk // (32 * long.PER.value))
    make = functools.partial(torch.empty, device=score.device)
    bins = torch.zeros(rows, 3, long.BINS.value, dtype=torch.int32, device=score.device)
    state, has = make(rows, 2, 4, dtype=torch.int32), make(rows, chunks, dtype=torch.int32)
    lead = make(rows, chunks, 2, long.LAST.value, dtype=torch.int16)
    shared = score.device.type != "cpu" and torch.version.hip is None
    options = {"num_warps": warps, **({"maxnreg": 64} if shared and warps == 16 else {})}  # two programs a multiprocessor
    wide = score.dtype.itemsize == 4
    for stage in range(3):
        long.count_digit[(chunks, rows)](
            score, length, bins, state, has, lead, m, chunks, keep, *given,
            STAGE=stage, WIDE=wide, CHUNK=chunk, SHARED=shared, **options,
        )  # fmt: skip
    long.write_chunks[(chunks, rows)](
        score, length, bins, state, has, lead, out, count, m, chunks, keep, *given,
        LATE=late, WIDE=wide, CHUNK=chunk, CHUNKS=max(32, triton.next_power_of_2(chunks)), **options,
    )  # fmt: skip
    return out, count


def _choose(rows: int, total: int, *args: Any, **options: Any) -> None:
    """Launch `choose` for rows of at most `total` numbers."""
    chunk = max(256, triton.next_power_of_2(total))
    kernels.choose[(rows,)](*args, CHUNK=chunk, num_warps=min(32, max(4, chunk // 512)), **options)


@functools.lru_cache(maxsize=64)
def _width(m: int, keep: int) -> int:
    """Entries of a block, so that the two choices have about as many numbers each."""
    width = 2
    while width < 64 and keep * width * width * 2 < m:
        width *= 2
    return width
