"""The launch of `estimate_few.mean_mass`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...kv import KV
from . import estimate_few
from .config import device
from .paging_launch import _pad, usable

ROWS = 128  # most queries of a kv head
KEYS, STAGES, SHARE = 128, 3, 2  # keys of a step; programs a multiprocessor
LOG2E = 1.4426950408889634


def reads(q: Tensor, kv: KV) -> bool:
    """Whether `mean_mass` computes this call: dense keys at their own positions, without weights, and few queries."""
    plain = kv.kind == "dense" and kv.pos is None and kv.bias is None and kv.k.dtype == q.dtype
    if q.dtype == torch.float32 and q.device.type == "cuda":  # the parts of its products take the memory of two tiles
        return False
    return plain and usable(q) and q.shape[1] // kv.shape[1] * q.shape[2] <= ROWS


@functools.lru_cache(maxsize=64)
def _plan(index: int | None, rows: int, m: int, tile: int, d: int, size: int) -> tuple[int, int, int]:
    """(keys of a step, stages, steps of a program)."""
    shared, cores = device(index)
    keys, stages = KEYS, STAGES
    while (tile + stages * keys) * d * size > 0.95 * shared / SHARE and (stages > 1 or keys > 16):
        stages, keys = (stages - 1, keys) if stages > 2 or keys == 16 else (stages, keys // 2)
    return keys, stages, max(1, -(-m // keys) * rows // (2 * SHARE * cores))  # two rounds of programs


def mean_mass(q: Tensor, kv: KV, q_pos: Tensor, lse: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Mean probability of each entry over the query heads of its kv head and the rows that can see it: fp32 `[B, G, M]`.

    Args:
        q: `[B, H, n, D]`, a call that `reads` accepts. q_pos: int `[B, n]`, consecutive text positions.
        lse: fp32 `[B, H, n]`, natural log, over all entries that a row sees; -inf for one that sees none.
    """
    b, h, n, d = q.shape
    _, g, m, _, _ = kv.shape
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k))
    index = q.device.index if q.device.type == "cuda" else None
    tile, queries = _pad(h // g * n), h // g * n
    keys, stages, steps = _plan(index, b * g, m, tile, _pad(d), q.element_size())
    out = torch.empty(b, g, m, dtype=torch.float32, device=q.device)
    q_pos, lse, length = q_pos.expand(b, n).contiguous(), lse.float().contiguous(), kv.len
    blocks = -(-m // keys)
    estimate_few.mean_mass[(-(-blocks // steps), b * g)](
        q, k, q_pos, None if length is None else length.contiguous(), lse, out,
        scale * LOG2E, softcap or 1.0, m, steps, 0, g, *q.stride()[:3], *k.stride()[:3],
        GROUP=h // g, NEW=n, TILE=tile, KEYS=keys, D=d, D_PAD=_pad(d), CAP=bool(softcap), FP32=q.element_size() == 4,
        STAGES=stages, num_warps=8 if queries > 64 else 4,
    )  # fmt: skip
    return out
