"""Launches of `select_entries*.py`: the kernels behind `scores.entries.best_entries`. Nothing waits for the device."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from . import select_entries as kernels
from . import select_entries_listed as listed
from . import select_entries_long as long
from .config import device
from .paging_launch import INTERPRET, has_bf16

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.int32)
ONE = 8192  # entries of a row that one program takes
PARTS = (4096, 32768)  # entries of a part of a long row: few enough for one program a multiprocessor, if that can be
STEP, WARPS = 8192, 16  # entries that list_entries looks at together; its warps
SAMPLES = (2048, 4096)  # entries of a sample: the larger one for more than FEW to choose, or rows of more than LONG
FEW, LONG = 1024, 1 << 18
HELD, KEYS = (1024, 16384), 512  # numbers that one program chooses from at once, at least and at most; those of a warp
EARLY = False  # the second launch starts while the first still runs, and waits for it on the device (Hopper and later)


def usable(t: Tensor) -> bool:
    """Whether these kernels rank scores like t: its device and dtype."""
    if t.dtype not in DTYPES:
        return False
    if t.device.type != "cuda":
        return INTERPRET and t.dtype != torch.bfloat16
    return t.dtype != torch.bfloat16 or has_bf16(t.device.index)


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
        chunk = max(256, triton.next_power_of_2(m))
        kernels.choose[(rows,)](
            score, length, out, count, m, keep, *given, LATE=late, CHUNK=chunk, num_warps=min(32, max(4, chunk // 512))
        )
        return out, count
    _, cores = device(score.device.index if score.device.type == "cuda" else None)
    sample = SAMPLES[keep > FEW or m > LONG]
    part = PARTS[0]
    while part < PARTS[1] and rows * -(-m // part) > cores:
        part *= 2
    parts = -(-m // part)
    expected, region = _expected(m, keep, sample, part)
    bounds, sizes = (torch.empty(shape, dtype=torch.int32, device=score.device) for shape in (rows, (rows, parts)))
    spots = torch.empty(rows, parts, region, dtype=torch.int16, device=score.device)
    keys = torch.empty(rows, parts, region, dtype=torch.uint32, device=score.device)
    bits = torch.empty(rows, parts, 2, part // 32, dtype=torch.uint32, device=score.device)
    long.list_entries[(parts, rows)](
        score, length, bounds, sizes, spots, keys, bits, m, parts, keep, region, 1, *given,
        LATE=late, SAMPLE=sample, PART=part, STEP=min(part, STEP), EARLY=EARLY, num_warps=WARPS,
    )  # fmt: skip
    across = max(32, triton.next_power_of_2(parts))  # of a warp, at least
    held = max(min(max(triton.next_power_of_2(expected), HELD[0]), HELD[1]), 4 * across)
    listed.choose_listed[(rows,)](
        score, length, bounds, sizes, spots, keys, out, count, m, parts, keep, region, *given,
        LATE=late, PART=part, PARTS=across, HELD=held, EARLY=EARLY,
        num_warps=min(32, max(8, held // KEYS)), **({"launch_pdl": True} if EARLY else {}),
    )  # fmt: skip
    return out, count


@functools.lru_cache(maxsize=64)
def _expected(m: int, keep: int, sample: int, part: int) -> tuple[int, int]:
    """(entries that are likely to reach the bound in a row of m of different scores, entries that a part can list).

    One row in ten has more than the first, and is then read in every round of the search.
    """
    width = -(-m // sample)
    share = keep / width
    want = share + 4 * math.sqrt(share) + 5  # as `select_entries_long._bound`; its search stops within a sixteenth
    expected = math.ceil((1.03 * want + 1.25 * math.sqrt(want)) * width)
    return expected, min(part, (expected * 5 // 4 + keep + 63) // 32 * 32)
