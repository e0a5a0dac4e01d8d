"""Launches of `estimate_lowbit*.py`: bits of key blocks, and lists out of bits. Only `bit_lists` may wait for the device.

On Hopper `kernels/gluon/lowbit.py` takes the largest part, the logits, wherever it serves the call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..gluon import lowbit as hopper
from . import estimate_lowbit, estimate_lowbit_lists
from .config import config, device
from .estimate_launch import LOG2E, _index
from .estimate_rows_launch import _mean
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t

HELD = 1 << 24  # channels of integer keys that a piece holds (16 MiB): one kv head of 128 at 128K tokens
WHOLE = 1 << 24  # numbers of all lists (64 MiB) up to which they keep their full width, so that nothing waits
SIDES = (16, 32, 64, 128)  # rows of a query block
CHUNK = 1024  # places of a list that a program looks at together
MANY = 256  # keys of a tile, at most: integer keys are padded to a multiple
HOPPER = True  # whether Gluon's kernel may serve; measurements compare both


class Tile(NamedTuple):
    """Of the integer product: rows, keys, warps, stages."""

    rows: int
    keys: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=64)
def tile(index: int | None, width: int) -> Tile:
    """The largest tile of which two share a multiprocessor: one compares while the other multiplies. None: interpreter."""
    if index is None:
        return Tile(64, 64, 4, 1)
    shared, _ = device(index)
    for rows, keys, warps, stages in ((128, 128, 4, 3), (128, 128, 4, 2), (128, 64, 4, 2)):
        if 2 * (rows + keys * stages) * width <= 0.95 * shared:
            return Tile(rows, keys, warps, stages)
    return Tile(64, 64, 4, 2)


def selects(q: Tensor, k: Tensor, block_q: int, block_k: int, share: str) -> bool:
    """Whether `block_bits` computes this call: sizes that are powers of two, keys of the queries' dtype, integers."""
    fits = 8 <= block_k <= 64 and block_k & (block_k - 1) == 0
    return block_q in SIDES and fits and k.dtype == q.dtype and share != "exact"


def means(x: Tensor) -> Tensor:
    """Mean of all rows of x `[heads, n, D]`: fp32 `[heads, D]`."""
    return _mean(x[None])[0]


def local_sums(
    q: Tensor, k: Tensor, centre: Tensor | None, sizes: tuple[int, int, int, int], *,
    start: int, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """`lowbit.anchor_lse` of all rows: fp32 `[heads, nq * block_q]`, anything finite where there is no row.

    Args:
        q: `[heads, n, D]`, the positions from `start` on. k: `[g, m, D]`. centre: fp32 `[g, D]`, taken off the keys unless
            there is a softcap. sizes: rows of a query block, then sink, window and segment, in tokens.
    """
    (h, n, d), (g, m, _) = q.shape, k.shape
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    block, *spans = sizes
    first, nq = start // block, (start + n - 1) // block - start // block + 1
    lse = torch.empty(h, nq * block, dtype=torch.float32, device=q.device)
    size = q.element_size()
    c = config(device(_index(q))[0], block, _pad(d), _pad(d), size, None)
    keys = min(64, c.keys)
    estimate_lowbit.local_sums[(nq, h)](
        q, k, lse if centre is None else centre, lse, scale * LOG2E, softcap or 1.0, m, n, start, first, *spans,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        GROUP=h // g, BLOCK=block, KEYS=keys, D=d, D_PAD=_pad(d), CAP=bool(softcap), FP32=size == 4,
        STAGES=c.stages, num_warps=8 if block == 128 else 4, num_stages=c.stages,
    )  # fmt: skip
    return lse


class Keys(NamedTuple):
    """Integer keys `[g, wide, W]` (int8, or e4m3 of the same numbers), their steps fp32 `[g, wide]`, and the exact products
    of the unrounded keys with the mean queries, times the scale, over the step: fp32 `[heads, wide]`. Padded with zeros."""

    ints: Tensor
    steps: Tensor
    extra: Tensor


def quantised(
    k: Tensor, centre: Tensor | None, mean: Tensor, *, scale: float, share: str, bits: int,
    dtype: torch.dtype = torch.int8,
) -> Keys:  # fmt: skip
    """Keys `[g, m, D]`, less centre fp32 `[g, D]`, on 2^bits - 1 levels; mean fp32 `[heads, D]`. share: not "exact"."""
    (g, m, d), h = k.shape, mean.shape[0]
    k = k if k.stride(-1) == 1 else k.contiguous()
    width, wide = _width(d), -(-m // MANY) * MANY
    ints = torch.empty(g, wide, width, dtype=dtype, device=k.device)
    steps = torch.empty(g, wide, dtype=torch.float32, device=k.device)
    extra = torch.empty(h, wide, dtype=torch.float32, device=k.device)
    centre = torch.zeros(g, d, device=k.device) if centre is None else centre
    estimate_lowbit.quantise_keys[(wide // 64, g)](
        k, centre, mean, ints, steps, extra, scale, m, k.stride(0), k.stride(1), wide,
        GROUP=h // g, KEYS=64, FRAGMENT=share == "fragment", TOP=2 ** (bits - 1) - 1, D=d, WIDTH=width, num_warps=4,
    )  # fmt: skip
    return Keys(ints, steps, extra)


def _width(d: int) -> int:
    """Channels of integer keys."""
    return max(32, _pad(d))


def block_bits(
    q: Tensor, k: Tensor, centre: Tensor | None, mean: Tensor, bar: Tensor, words: Tensor,
    sizes: tuple[int, int, int, int], block_k: int, *, start: int, scale: float, share: str, bits: int,
) -> None:  # fmt: skip
    """Write a bit for each pair of blocks in which the estimate of any row is above its bar.

    Args:
        q, k, sizes, start: as in `local_sums`. centre: fp32 `[g, D]` or None. mean: fp32 `[heads, D]` of the queries.
        bar: fp32 `[heads, nq * block_q]`, finite. words: int32 `[heads, nq, many]`, contiguous, zeros; what lies in a row's
            local region or beyond stays as it is, or is anything.
    """
    (h, n, d), block, *spans = q.shape, *sizes
    q = q if q.stride(-1) == 1 else q.contiguous()
    first, nq, width = start // block, words.shape[1], _width(d)
    served = HOPPER and hopper.why_not(q, width, block, block_k, share) is None
    dtype = hopper.levels(bits) if served else torch.int8
    keys = quantised(k, centre, mean, scale=scale, share=share, bits=bits, dtype=dtype)
    if served:
        hopper.run(q, mean, bar, keys, words, sizes=sizes, start=start, scale=scale, bits=bits)
        return
    t = tile(_index(q), width)
    rows = max(t.rows, block)
    estimate_lowbit.low_bits[(-(-nq * block // rows), h)](
        q, mean, bar, *keys, words, scale, n, start, first, nq, words.shape[2], *spans,
        q.stride(0), q.stride(1), keys.ints.shape[1],
        GROUP=h // k.shape[0], BLOCK=block, BLOCK_K=block_k, TILE=rows, KEYS=t.keys, FRAGMENT=share == "fragment",
        TOP=2 ** (bits - 1) - 1, D=d, WIDTH=width, STAGES=t.stages, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip


# ---------------------------------------------------------------------- lists out of bits
def bit_lists(words: Tensor, spans: Tensor, lists: int, width: int, unit: int) -> tuple[Tensor, Tensor]:
    """Places that are in, times `unit`, ascending: int32 `[B, lists, rows, W]` padded with the row's last, counts.

    Args:
        words: int32 `[B, H, rows, many]`, contiguous, 32 places a word. spans: int32 `[rows, 3]`: places before the first
            number are in, up to the second those with a bit, then all up to the third.
        lists: H or a divisor: neighbouring heads unite. width: the most places of a row. W is that, or where so many
            numbers are not to be held, the longest list, for which this waits for the device once.
    """
    b, h, rows, many = words.shape
    same = dict(GROUP=h // lists, CHUNK=CHUNK, num_warps=4)
    count = torch.empty(b, lists, rows, dtype=torch.int32, device=words.device)
    if b * lists * rows * width > WHOLE:
        estimate_lowbit_lists.count_bits[(rows, b * lists)](words, spans, count, rows, many, **same)
        width = max(1, int(count.max()))
    index = torch.empty(b, lists, rows, width, dtype=torch.int32, device=words.device)
    estimate_lowbit_lists.bit_lists[(rows, b * lists)](words, spans, index, count, rows, many, width, unit, **same)
    return index, count
