"""Launches of `estimate_rows*.py`: antidiagonal mass, similarity of blocks, lists of rows. Nothing waits for the device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import estimate_rows, estimate_rows_lists, estimate_rows_pooled
from .config import device
from .estimate_launch import BLOCKS, LOG2E, _bits, _index, block_means
from .paging_launch import _pad, usable

__all__ = ["BLOCKS", "usable"]  # most key blocks of a row; whether these kernels compute on tensors like t

HELD = 1 << 27  # log-sum-exps that block_mass holds at a time (512 MiB)
CELLS = 64  # most cells of a block
AT = 8192  # numbers that block_sums holds at a time, if a row has no more
CENTRE = 1024  # rows of a block of the means that the mean of all rows is made of


class Tile(NamedTuple):
    """Of a product: rows, cells of keys and channels of a step, warps, stages."""

    rows: int
    keys: int
    part: int
    warps: int
    stages: int


@functools.lru_cache(maxsize=64)
def tile(index: int | None, d: int, size: int) -> Tile:
    """The largest tile whose stages fit; for head dim d (padded) of `size` bytes. index None: the interpreter."""
    if index is None:
        return Tile(16, 32, min(16, d), 4, 1)
    shared, _ = device(index)
    part = min(64 if size < 4 else 32, d)
    sizes = ((128, 256, 8, 4), (128, 256, 8, 3), (128, 128, 8, 3), (64, 128, 4, 3), (64, 64, 4, 2))
    for rows, keys, warps, stages in sizes:
        if size < 4 and (rows + keys) * part * size * stages <= 0.9 * shared:
            return Tile(rows, keys, part, warps, stages)
    return Tile(64, 64, part, 4, 2)


# ---------------------------------------------------------------------- antidiagonals
def masses(q: Tensor, stride: int, block: int, nk: int) -> bool:
    """Whether `block_mass` computes this call: blocks of 1, 2, 4 ... 64 cells, and rows of at most `BLOCKS` blocks."""
    per = block // stride
    return per <= CELLS and per & (per - 1) == 0 and nk <= BLOCKS


def block_mass(
    q: Tensor, k: Tensor, stride: int, block: int, lo: int, hi: int, *,
    start: int, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """Antidiagonal mass of the causal key blocks for the query blocks of the numbers lo..hi: fp32 `[B, H, hi - lo, hi]`.

    Args:
        q: `[B, H, n, D]`, the positions from `start` on. k: `[B, G, m, D]`, m >= start + n, later keys don't count.

    For calls that `masses` accepts. Scratch is block / stride numbers per pair of blocks.
    """
    (b, h, n, d), g = q.shape, k.shape[1]
    r, m, per, nq = h // g, start + n, block // stride, hi - lo
    nk = min(hi, -(-m // block))
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    rows, cells = nq * per, -(-m // stride)
    t = tile(_index(q), _pad(d), q.element_size())
    keys = max(t.keys, per)
    part = torch.empty(b * g, rows * r, nk, dtype=torch.float32, device=q.device)
    steps = -(-hi * per // keys)
    estimate_rows.antidiagonals[(-(-rows * r // t.rows) * steps, b * g)](
        q, k, part, scale * LOG2E / stride, softcap or 1.0, m, n, start, lo * per, rows, nk,
        g, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        GROUP=r, STRIDE=stride, PER=per, TILE=t.rows, KEYS=keys, PART=t.part, SWEEP=8,
        D=d, D_PAD=_pad(d), CAP=bool(softcap), FP32=q.element_size() == 4, STAGES=t.stages,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    mass = torch.empty(b, h, nq, nk, dtype=torch.float32, device=q.device)
    wide = triton.next_power_of_2(nk)
    at = max(1, min(per, AT // wide))
    estimate_rows.block_sums[(nq, b * h)](
        part, mass, lo, start, min(m, cells * stride), nq, nk,
        GROUP=r, STRIDE=stride, PER=per, AT=at, N=wide, num_warps=min(16, max(1, at * wide // 1024)),
    )  # fmt: skip
    return mass


# ---------------------------------------------------------------------- pooled blocks
def self_similarity(x: Tensor, block: int, offset: int, centre: bool) -> Tensor:
    """`similarity.self_similarity` of x `[B, heads, n, D]`: fp32 `[B, heads, blocks]`."""
    b, h, n, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = -(-(n + offset) // block)
    out = torch.empty(b, h, blocks, dtype=torch.float32, device=x.device)
    estimate_rows_pooled.similarity[(blocks, b * h)](
        x, _mean(x) if centre else out, out, n, offset, h, x.stride(0), x.stride(1), x.stride(2),
        BLOCK=block, ROWS=min(32, triton.next_power_of_2(block)), CENTRE=centre, D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip
    return out


def _mean(x: Tensor) -> Tensor:
    """The mean over all rows of x `[B, heads, n, D]`: fp32 `[B, heads, D]`."""
    n = x.shape[2]
    means = block_means(x, CENTRE)
    begin = torch.arange(0, n, CENTRE, device=x.device)
    return (means * ((n - begin).clamp(max=CENTRE) / n)[:, None]).sum(2)


def visible_logits(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, first: int, block_q: int, block_k: int
) -> Tensor:
    """`pooled.block_logits` of the key blocks that rows see, fp32 `[B, H, nq, nk]`; anything at the others.

    q fp32 `[B, H, nq, D]`, the first one block number `first` of block_q positions; k fp32 `[B, G, nk, D]`.
    """
    (b, h, nq, d), (g, nk) = q.shape, k.shape[1:3]
    out = torch.empty(b, h, nq, nk, dtype=torch.float32, device=q.device)
    rows, keys = (16, 16) if _index(q) is None else (64, 64)
    estimate_rows_pooled.visible_logits[(-(-nk // keys), -(-nq // rows), b * h)](
        q.contiguous(), k.contiguous(), out, scale, softcap or 1.0, nq, nk, first,
        GROUP=h // g, BLOCK_Q=block_q, BLOCK_K=block_k, TILE=rows, KEYS=keys, PART=min(32, _pad(d)),
        D=d, D_PAD=_pad(d), CAP=bool(softcap), num_warps=4,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------- lists
def row_lists(
    score: Tensor, share: float | Tensor, first: int, block_q: int, block_k: int, *,
    lists: int, logits: bool = False, keep: Tensor | None = None,
    alike: Tensor | None = None, trusted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per row of query blocks the best visible key blocks, the first one and those of the row itself always in.

    Args:
        score: fp32 `[B, H, nq, nk]`, contiguous, of the query blocks from number `first` on: mass, or with `logits` what
            a softmax over the blocks that compete makes mass of.
        share: of a row's mass that is kept, a number or fp64 `[H]`. keep: int32 `[nq]`, in its place a number of blocks.
        lists: Hl, H or a divisor: neighbouring heads unite.
        alike: bool `[B, H, nk]`, key blocks that compete; the others are in. trusted: bool `[B, H, nq]`, rows that choose;
            the others take all. Given together, and then a row takes a block at least, by score.

    Returns:
        First keys of these blocks, int32 `[B, Hl, nq, nk]`, ascending, padded with the row's last; counts `[B, Hl, nq]`.
    """
    b, h, nq, nk = score.shape
    tiles = torch.empty(b, lists, nq, nk, dtype=torch.int32, device=score.device)
    count = torch.empty(b, lists, nq, dtype=torch.int32, device=score.device)
    gates = [tiles if t is None else t.contiguous().view(torch.int8) for t in (alike, trusted)]
    each = isinstance(share, Tensor)
    wide = triton.next_power_of_2(nk)
    shares = share.to(torch.float64).contiguous() if isinstance(share, Tensor) else tiles
    estimate_rows_lists.choose_rows[(nq, b * lists)](
        score, *gates, shares, tiles if keep is None else keep, tiles, count,
        0 if isinstance(share, Tensor) else _bits(share), nq, nk, first, h,
        GROUP=h // lists, BLOCK_Q=block_q, BLOCK_K=block_k, LOGITS=logits, BEST=keep is not None,
        GATED=alike is not None, EACH=each, N=wide, num_warps=min(16, max(1, wide // 256)),
    )  # fmt: skip
    return tiles, count
