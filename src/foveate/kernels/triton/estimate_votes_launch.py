"""Launches of the kernels of `estimate_votes.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import estimate_votes
from .config import device
from .estimate_launch import LOG2E, SHARE, _index
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

KEYS, WARPS, STAGES = 128, 4, 3  # of `row_scores`: keys of a step of 16 bits (32 KB at D 128), warps, most stages
SPLITS = 64  # most programs that share the keys of a kv head
VOTES, LINES, READ = 1024, 8, 3  # of `row_votes`: most keys of a program, heads of a step, stages
STAY = 24 << 20  # bytes of logits that may claim a place in the L2 cache, which is 50 MB on Hopper


def reads(q: Tensor, kv: KV, anywhere: bool = False) -> bool:
    """Whether `logits` and `votes` compute this call: one query a row, dense keys in text order, without weights.

    q has the dtype of the keys, or is fp32. anywhere: a row sees every entry that exists, so no order is needed.
    """
    plain = kv.kind == "dense" and (anywhere or kv.pos is None) and kv.bias is None and usable(kv.k)
    same = q.dtype == kv.k.dtype or q.dtype == torch.float32
    return plain and same and q.shape[2] == 1 and q.shape[1] <= 128 and q.shape[-1] == kv.k.shape[-1]


def logits(
    q: Tensor, k: Tensor, length: Tensor | None, q_pos: Tensor | None = None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Logits in base 2 (times log2(e), so that they rank as the true ones do), fp32 `[B, H, M]`.

    Args:
        q: `[B, H, 1, D]`, in the dtype of k or fp32, which keeps its precision. k: `[B, G, M, D]`.
        length: int `[B, G]`, entries that exist, or None: all. q_pos: int `[B, 1]`, positions in text order, or None: a row
            sees all that exists. What a row does not see has no meaning.
    """
    return _scores(q, k, length, q_pos, 0, 0, scale, softcap, False)[0]


def votes(
    q: Tensor, k: Tensor, length: Tensor | None, q_pos: Tensor | None = None, *, lists: int, most: bool = False,
    first: int = 0, tail: int = 0, scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Probabilities of the heads of each list, added up, or the largest of them (`most`): fp32 `[B, lists, M]`.

    Args:
        q, k, length, q_pos: as for `logits`. lists: a divisor of H; neighbouring heads share a list.
        first, tail: the softmax runs without the first entries and the newest ones before the end of what a row sees; they
            get 0, as what it does not see.
    """
    b, h = q.shape[:2]
    g, m = k.shape[1:3]
    score, part = _scores(q, k, length, q_pos, first, tail, scale, softcap, True)
    out = torch.empty(b, lists, m, dtype=torch.float32, device=q.device)
    lines, keys = min(LINES, triton.next_power_of_2(h // lists)), VOTES
    while keys > 128 and -(-m // keys) * b * lists < device(_index(q))[1]:
        keys //= 2
    estimate_votes.row_votes[(-(-m // keys), b * lists)](
        score, part, _flat(length), _flat(q_pos), out, m, part.shape[1], first, tail, lists, g,
        HEADS=h // lists, LINES=lines, KEYS=keys, SPLITS=triton.next_power_of_2(part.shape[1]), MOST=most, STAGES=READ,
        num_warps=keys // 128,
    )  # fmt: skip
    return out


def _scores(
    q: Tensor, k: Tensor, length: Tensor | None, q_pos: Tensor | None, first: int, tail: int, scale: float,
    softcap: float | None, lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logits in base 2 `[B, H, M]`, their log-sum-exps `[B * H, splits]`)."""
    (b, h, _, d), (g, m) = q.shape, k.shape[1:3]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    size, split = k.element_size(), q.dtype != k.dtype
    keys, share, splits, stages = _plan(_index(q), b * g, m, _pad(d), size)
    score = torch.empty(b, h, m, dtype=torch.float32, device=q.device)
    part = torch.empty(b * h, splits, dtype=torch.float32, device=q.device)
    group = max(4 if split else 16, triton.next_power_of_2(h // g))
    estimate_votes.row_scores[(splits, b * g)](
        q, k, _flat(length), _flat(q_pos), score, part,
        scale / softcap if softcap else scale * LOG2E, (softcap or 1.0) * LOG2E, m, share, splits, first, tail,
        g, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2),
        GROUP=h // g, GROUP_PAD=group, PARTS=4 if split else 1, KEYS=keys, D=d, D_PAD=_pad(d),
        CAP=bool(softcap), FP32=size == 4, LSE=lse, STAGES=stages, STAY=score.nbytes <= STAY, num_warps=WARPS,
    )  # fmt: skip
    return score, part


@functools.lru_cache(maxsize=256)
def _plan(index: int | None, rows: int, m: int, d: int, size: int) -> tuple[int, int, int, int]:
    """(keys of a step, keys of a program, programs of a kv head, stages): two programs share a multiprocessor."""
    shared, cores = device(index)
    keys = KEYS if size < 4 else KEYS // 4
    while keys > 16 and 2 * keys * d * size > 0.45 * shared:
        keys //= 2
    stages = max(1, min(STAGES, int(0.45 * shared / (keys * d * size))))
    blocks = -(-m // keys)
    share = -(-blocks // max(1, min(blocks, SHARE * cores // rows, SPLITS)))
    return keys, share * keys, -(-blocks // share), stages


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
