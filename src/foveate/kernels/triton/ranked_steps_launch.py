"""Launches of `ranked_steps.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import arrivals, ranked_steps
from .config import device
from .paging_launch import _pad, _tight, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

KEYS, SHARE, WARPS, STAGES = 32, 3, 4, 2  # tokens of a step; programs a multiprocessor; of a program: warps, stages
Table = tuple[Tensor, Tensor]


def turn_step(q: Tensor, kv: KV, raw: Tensor, plain: Table, to: Table, partner: Tensor) -> tuple[Tensor, Tensor]:
    """(queries at the voters' position, fp32 `[B, H, 1, D]`; at the list's last place, in their dtype); and `raw` `[B, G,
    room, D]` gets the newest key of each row before its rotation.

    Args:
        q: `[B, H, 1, D]`. kv: dense, in text order. partner: int32 `[D]`, the channel that each one turns with.
        plain: fp32 `[B, 1, D]` twice, contiguous: what own channels and their partners are multiplied with to undo the
            rotation. to: `[B, 2, D]` twice: to stand where votes are given, and at the last place.
    """
    (b, h, _, d), g = q.shape, kv.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k))
    voter = torch.empty(b, h, 1, d, dtype=torch.float32, device=q.device)
    placed = torch.empty(b, h, 1, d, dtype=q.dtype, device=q.device)
    ranked_steps.turn_step[(b * (h + g),)](
        q, k, _tight(kv.len), raw, *plain, *to, partner, voter, placed, kv.capacity,
        h, g, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), raw.shape[2],
        D=d, D_PAD=_pad(d), num_warps=1,
    )  # fmt: skip
    return voter, placed


def attend(
    q: Tensor, raw: Tensor, v: Tensor, tokens: Tensor, count: Tensor, table: Table, partner: Tensor, *, scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[B, H, 1, Dv]`, lse fp32 `[B, H, 1]`): queries at the last place of a list, its tokens at 0, 1, ... in it.

    Args:
        q: `[B, H, 1, D]`, contiguous, as `turn_step` leaves it. raw: `[B, G, room, D]`, contiguous, keys before rotation.
        v: `[B, G, M, Dv]`. tokens: int32 `[B, n]`, the first count `[B]` of a row count.
        table: fp32 `[n, D]` twice: `Turns.asked`. partner: int32 `[D]`.
        scale: above 0.
    """
    (b, h, _, d), (g, room), (m, dv), n = q.shape, raw.shape[1:3], v.shape[2:], tokens.shape[1]
    v = v if v.stride(-1) == 1 else v.contiguous()
    cores = device(q.device.index if q.device.type == "cuda" else None)[1]
    keys = KEYS if q.element_size() < 4 and max(_pad(d), _pad(dv)) <= 128 else KEYS // 2
    steps = -(-n // keys)
    share = -(-steps // max(1, min(steps, SHARE * cores // (b * g))))  # steps of a program
    splits = -(-steps // share)
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    part = part_lse = arrived = None
    if splits > 1:
        slots = b * h * splits
        part = torch.empty(slots * (dv + 1), dtype=torch.float32, device=q.device)
        part_lse, arrived = part[slots * dv :], arrivals.counters(b * g, part)
    pack = triton.next_power_of_2(h // g)
    ranked_steps.attend_ranked[(splits, b * g)](
        q, raw, v, tokens.contiguous(), count.contiguous(), *table, partner, out, lse, part, part_lse, arrived,
        scale * math.log2(math.e), softcap or 0.0, n, m, splits, g, room, v.stride(0), v.stride(1), v.stride(2),
        KEYS=keys, PACK=h // g, PACK_PAD=pack, TILE=_pad(h // g), D=d, D_PAD=_pad(d), DV=dv, DV_PAD=_pad(dv),
        CAP=bool(softcap), FP32=q.dtype == torch.float32, CHUNK=arrivals.chunk(pack, _pad(dv), WARPS),
        STAGES=STAGES if q.element_size() < 4 else 1,  # wide keys of fp32 are more than a small device can hold twice
        num_warps=WARPS,
    )  # fmt: skip
    return out, lse
