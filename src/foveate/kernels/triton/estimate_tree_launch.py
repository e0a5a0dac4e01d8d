"""Launch of the tree search of `estimate_tree.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import estimate_tree
from .config import device
from .estimate_launch import _index
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

KEEP = 2048  # most ranges of a search: two halves of each are held at once
ROWS = 128  # most queries of a search
KEYS = 64  # of a product, in fp32 half as many
WHERE = {"center": 0, "first": 1, "last": 2}


def descents(q: Tensor, kv: KV, rows: int, keep: int, block: int) -> bool:
    """Whether `descend` computes this call: dense keys at their own positions, without weights, and tiles that fit."""
    plain = kv.kind == "dense" and kv.pos is None and kv.bias is None and kv.k.dtype == q.dtype
    fits = rows <= ROWS and keep <= KEEP and block <= KEYS // 2 and block & (block - 1) == 0
    return plain and fits and _shape(_index(q), _pad(rows), keep, _pad(q.shape[-1]), q.element_size())[0] > 0


@functools.lru_cache(maxsize=64)
def _shape(index: int | None, rows: int, keep: int, d: int, size: int) -> tuple[int, int, int | None]:
    """(stages of the loop over keys, programs of a multiprocessor, registers a thread); no stages where nothing fits.

    Some programs choose while others read. Two of the stages find keys, the others hold them. Three programs of four warps
    leave 168 registers a thread, which suffice for small searches.
    """
    shared, _ = device(index)
    small = rows <= 32 and keep <= 256 and size < 4
    for stages, programs in ((5, 3), (5, 2), (4, 2), (5, 1), (4, 1)):
        used = (rows + (stages - 2) * (KEYS if size < 4 else KEYS // 2)) * d * size * (1 if size < 4 else 2) + 2048
        if (programs < 3 or small) and used <= 0.99 * shared / programs:
            return stages, programs, 168 if programs == 3 else None
    return 0, 0, None


def descend(
    q: Tensor, kv: KV, ends: Tensor, *, start: int, q_pos: Tensor | None, size: int, step: int, first: int, keep: int,
    block: int, tile: int, lists: int, representative: str, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """First keys of the tiles that hold the found blocks: int32 `[B, Hl, n, keep]`, ascending, and counts `[B, Hl, n]`.

    For calls that `descents` accepts; arguments as in `tree.descend_rows`.
    """
    b, h, rows, d = q.shape
    g, m, nq = kv.shape[1], kv.shape[2], ends.shape[-1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k))
    ends = ends.to(torch.int32).contiguous()
    many, each = -(-size // step), h // lists
    searches, half = b * lists * nq, max(KEYS // 2, triton.next_power_of_2(keep))
    stages, programs, most = _shape(_index(q), _pad(many * each), keep, _pad(d), q.element_size())
    keys = KEYS if q.element_size() < 4 else KEYS // 2
    programs = min(searches, programs * device(_index(q))[1])
    words = torch.empty(programs * 3 * half, dtype=torch.int32, device=q.device)
    scores = torch.empty(programs * 2 * half, dtype=torch.float32, device=q.device)
    tiles = torch.empty(b, lists, nq, keep, dtype=torch.int32, device=q.device)
    count = torch.empty(b, lists, nq, dtype=torch.int32, device=q.device)
    estimate_tree.descend[(programs,)](
        q, k, None if kv.len is None else kv.len.contiguous(), None if q_pos is None else q_pos.contiguous(), ends,
        words, scores, tiles, count, scale, softcap or 1.0, m, nq, rows, start, start // size, first, searches, 0,
        lists, g, keep, size, step, ends.stride(0) if ends.shape[0] > 1 else 0, lists // ends.shape[1],
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        ROWS=many, GROUP=each, ROWS_PAD=_pad(many * each), KEYS=keys, BLOCK=block, WIDTH=tile, HALF=half,
        WHERE=WHERE[representative], D=d, D_PAD=_pad(d), CAP=bool(softcap), FP32=q.element_size() == 4, STAGES=stages,
        num_warps=4, maxnreg=most,
    )  # fmt: skip
    return tiles, count
