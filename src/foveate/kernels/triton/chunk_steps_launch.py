"""Launches of `chunk_steps.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import chunk_steps
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

SLOTS = 16  # chunks of a list that a program holds at once
Table = tuple[Tensor, Tensor]


def turn_queries(
    q: Tensor, q_pos: Tensor, plain: Table, ahead: Table, partner: Tensor, recent: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """(queries before their rotation, fp32 `[B, H, 1, D]`; int32 `[B, 1]`, chunks up to the one the query stands in).

    Args:
        q: `[B, H, 1, D]`. q_pos: int64 `[B, 1]`. partner: int32 `[D]`, the channel that each one turns with.
        plain: fp32 `[B, 1, D]` twice, contiguous: what own channels and their partners are multiplied with to undo the
            rotation. ahead: `[B, chunks, D]` twice: to stand at their place in their chunk, plus 0, 1, .. chunks.
        recent: `[B, H, 2 size, D]`, contiguous, gets the queries at their place in their chunk; at: int64 `[B, 2 size]`,
            contiguous, their positions. Both by position modulo 2 size.
    """
    b, h, _, d = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    bare = torch.empty(b, h, 1, d, dtype=torch.float32, device=q.device)
    have = torch.empty(b, 1, dtype=torch.int32, device=q.device)
    chunk_steps.turn_queries[(b * h,)](
        q, q_pos, *plain, *ahead, partner, bare, recent, at, have, h, ahead[0].shape[1], q.stride(0), q.stride(1),
        q_pos.stride(0), SIZE=at.shape[1] // 2, D=d, D_PAD=_pad(d), num_warps=1,
    )  # fmt: skip
    return bare, have


def place_queries(
    q: Tensor, tiles: Tensor, count: Tensor, size: int, ahead: Table, partner: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A query for each chunk of its list, turned to where it stands as seen from there: `[B, H * keep, 1, D]`, list by list,
    chunk by chunk, and the heads of a list side by side; the chunk's first entry, int32 `[B, Hl * keep, 1, 1]`; 1, or 0
    behind the list, int32 `[B, Hl * keep, 1]`.

    Args:
        q: `[B, H, 1, D]`. tiles: int32 `[B, Hl, keep]`, first entries of chunks of `size` tokens, ascending, the query's own
            the last of count int32 `[B, Hl]`. ahead, partner: as for `turn_queries`.
    """
    (b, h, _, d), (lists, keep) = q.shape, tiles.shape[1:]
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(b, h * keep, 1, d, dtype=q.dtype, device=q.device)
    start = torch.empty(b, lists * keep, 1, 1, dtype=torch.int32, device=q.device)
    used = torch.empty(b, lists * keep, 1, dtype=torch.int32, device=q.device)
    chunk_steps.place_queries[(-(-keep // SLOTS), b * h)](
        q, tiles.contiguous(), count.contiguous(), *ahead, partner, out, start, used, h, lists, ahead[0].shape[1], keep,
        q.stride(0), q.stride(1), SIZE=size, SLOTS=SLOTS, D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip
    return out, start, used


def join_chunks(part: Tensor, part_lse: Tensor, keep: int, per: int) -> tuple[Tensor, Tensor]:
    """(out `[B, H, 1, Dv]`, lse fp32 `[B, H, 1]`): one softmax over the chunks of each head, `per` of which share a list.

    part: `[B, H * keep, 1, Dv]`; part_lse: fp32 `[B, H * keep, 1]`, natural log; in the order of `place_queries`.
    """
    b, h, dv = part.shape[0], part.shape[1] // keep, part.shape[3]
    out = torch.empty(b, h, 1, dv, dtype=part.dtype, device=part.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=part.device)
    chunk_steps.join_chunks[(b * h,)](
        part.contiguous(), part_lse.contiguous(), out, lse, keep, per,
        KEEP=triton.next_power_of_2(keep), SLOTS=SLOTS, DV=dv, DV_PAD=_pad(dv), num_warps=4,
    )  # fmt: skip
    return out, lse
