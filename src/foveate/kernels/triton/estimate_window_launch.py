"""Launches of the kernels of `estimate_window.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import estimate_window
from .config import device
from .estimate_launch import LOG2E, SHARE, _index
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

ROWS = 64  # most rows of a tile of mass: more take the registers of a second program
TILES = 64  # most tiles of rows of a call
KEYS = 128  # of a tile of mass
SPLITS = 64  # most programs that share the keys of a row


def masses(q: Tensor, kv: KV) -> bool:
    """Whether `row_mass` computes this call: dense keys at their own positions, without weights, and tiles that fit."""
    plain = kv.kind == "dense" and kv.pos is None and kv.bias is None and kv.k.dtype == q.dtype
    rows = q.shape[2]
    if q.dtype == torch.float32 and q.device.type == "cuda":  # the parts of its tf32 products take the memory of two tiles
        return False
    return plain and 1 <= rows <= ROWS * TILES and _stages(_index(q), _tile(rows), _pad(q.shape[-1]), q.element_size()) > 0


def _tile(rows: int) -> int:
    return min(ROWS, _pad(rows))


@functools.lru_cache(maxsize=64)
def _stages(index: int | None, rows: int, d: int, size: int) -> int:
    """Stages of the loop over keys: what fits beside the queries; 0 if nothing does. Two programs share a multiprocessor."""
    shared, _ = device(index)
    for stages, programs in ((3, 2), (2, 2), (3, 1), (2, 1), (1, 1)):
        if (rows + stages * KEYS) * d * size + 4096 <= 0.99 * shared / programs:
            return stages
    return 0


def row_mass(
    q: Tensor, kv: KV, q_pos: Tensor, *, reduce: str, weight: Tensor | None, scale: float, softcap: float | None,
    lse: Tensor | None,
) -> Tensor:  # fmt: skip
    """What `window.row_mass` returns: fp32 `[B, H, M]`. For calls that `masses` accepts."""
    b, h, rows, d = q.shape
    _, g, m, _, _ = kv.shape
    r, size, index = h // g, q.element_size(), _index(q)
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k))
    q_pos = q_pos.expand(b, rows).contiguous()
    length = None if kv.len is None else kv.len.contiguous()
    cores = device(index)[1]
    stages = _stages(index, _tile(rows), _pad(d), size)
    strides = (q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2))
    same = dict(D=d, D_PAD=_pad(d), CAP=bool(softcap), FP32=size == 4, STAGES=stages)
    cap = softcap or 1.0
    if lse is None:
        tile = max(16, min(128 if size < 4 else 64, triton.next_power_of_2(r * rows)))
        keys = 64  # twice as many would take the registers of a second program
        units, blocks = -(-r * rows // tile), -(-m // keys)
        share = -(-blocks // max(1, min(blocks, SHARE * cores // (units * b * g), SPLITS)))
        splits = -(-blocks // share)
        part = torch.empty(b * h * rows * splits, dtype=torch.float32, device=q.device)
        estimate_window.row_logsums[(units, splits, b * g)](
            q, k, q_pos, length, part, scale * LOG2E, cap, m, share * keys, splits, rows, 0, g, *strides,
            GROUP=r, TILE=tile, KEYS=keys, num_warps=8 if tile == 128 else 4, **same,
        )  # fmt: skip
    else:
        part, splits = (lse.float() * LOG2E).contiguous(), 1
    out = torch.empty(b, h, m, dtype=torch.float32, device=q.device)
    weight = None if weight is None else weight.float().contiguous()
    blocks, tile = -(-m // KEYS), _tile(rows)
    steps = max(1, -(-blocks * h * b // (SHARE * cores)))
    for first in range(0, rows, tile):
        estimate_window.key_mass[(h, -(-blocks // steps), b)](
            q, k, q_pos, length, part, weight, out, scale * LOG2E, cap, m, steps, splits, rows, first, 0, h, g, *strides,
            TILE=tile, KEYS=KEYS, SPLITS=triton.next_power_of_2(splits), MOST=reduce == "max",
            num_warps=4, **same,
        )  # fmt: skip
    return out
