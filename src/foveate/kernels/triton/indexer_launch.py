"""Launches of `indexer.py`: scores of all tokens by a lightning indexer, in a decode step after storing the newest key."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import indexer as kernels
from . import paging_launch
from .config import device
from .labels_launch import _steps
from .paging_launch import _storage, _tight

__all__ = ["rank", "score_prompt", "serves", "usable"]
PART, COLUMNS = 4096, 2048  # weights that a program of project holds at once, and those of one row
ROWS, COLS, PROMPT_WARPS = 64, 128, 4  # of score_rows: queries and tokens of a program
SHARE, STAGES = 4, 3  # of score_tokens: programs a multiprocessor, steps under way
NEEDS = 96 << 10  # bytes of shared memory of score_rows: not on Turing


def usable(t: Tensor) -> bool:
    """Whether these kernels compute on tensors like t: its device, dtype and head dim."""
    return paging_launch.usable(t) and (t.device.type != "cuda" or device(t.device.index)[0] >= NEEDS)


def serves(heads: int, width: int) -> bool:
    """Whether these kernels know an indexer of this many heads and this width, a power of two."""
    return heads <= 128 and 16 <= width <= 128


def rank(
    q: Tensor, kv: KV, weights: tuple[Tensor, ...], back: tuple[Tensor, ...], turn: Tensor, data: Tensor, scale: Tensor,
    *, eps: float, floor: float, append: bool,
) -> Tensor:  # fmt: skip
    """Scores fp32 `[B, 1, M]` of all tokens, as `indexer.scores` gives them with fp8, up to the order of sums.

    Args:
        q: `[B, H, 1, D]`. kv: dense or paged, in text order; its keys are read with append only.
        weights: an indexer's query, key, weight and norm, contiguous fp32.
        back: how the newest token is turned back to before the model's rotation: factors of own channels and of partners,
            fp32 `[B, 1, D]`, and the partners, int32 `[D]` (`turns.Turns`).
        turn: fp32 `[B, 2, half]`, the indexer's cosines and sines there.
        data: uint8 `[B, room, DI]` with scale fp32 `[B, room]`, contiguous, room for all of kv.
        eps: of the keys' LayerNorm. floor: the least magnitude that a scale is made for.
        append: make and store the newest token's key first. Entries beyond a row's length have no meaning.
    """
    rows = products(q, kv, weights, back, append)
    hi, di = weights[0].shape[:2]
    mine, factors = rounded(rows, hi, di, kv, weights[3], turn, data, scale, eps, floor, append)
    return score(mine, factors, data, scale, kv)


def products(q: Tensor, kv: KV, weights: tuple[Tensor, ...], back: tuple[Tensor, ...], append: bool) -> Tensor:
    """fp32 `[B, HI * DI + HI + DI]`: queries, their weights and (append, else anything) the newest key, as projected."""
    query, key, weight, _ = weights
    own, other, partner = back
    (b, h, _, d), g, m = q.shape, kv.shape[1], kv.capacity
    (hi, di, fq), fk = query.shape, key.shape[1]
    q = q if q.stride(-1) == 1 else q.contiguous()
    k, table, s0, sg, sm, page, per = q, None, 0, 0, 0, 0, 0
    if append:
        k, table = kv.k if kv.k.stride(-1) == 1 else kv.k.contiguous(), _tight(kv.table)
        s0, sg, sm, page, per = _storage(k, kv)
    rows = torch.empty(b, hi * di + hi + di, dtype=torch.float32, device=q.device)
    tall, wide = _block(fq)
    tall_k, wide_k = _block(fk)
    tiles = -(-hi * di // tall) + -(-hi // tall) + (-(-di // tall_k) if append else 0)
    kernels.project[(tiles, b)](
        q, k, table, _tight(kv.len), _tight(own), _tight(other), partner, query, weight, key, rows, m,
        q.stride(0), q.stride(1), s0, sg, sm, per,
        HEADS=h, GROUPS=g, D=d, PAGE=page, HI=hi, DI=di, MEAN_Q=fq == d, MEAN_K=fk == d,
        TALL=tall, WIDE=wide, TALL_K=tall_k, WIDE_K=wide_k, num_warps=4,
    )  # fmt: skip
    return rows


def rounded(
    rows: Tensor, hi: int, di: int, kv: KV, norm: Tensor, turn: Tensor, data: Tensor, scale: Tensor,
    eps: float, floor: float, append: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Of what `products` gives: queries fp16 `[B, HI, DI]` and their weights fp32 `[B, HI]`; the newest key goes to data."""
    b = rows.shape[0]
    mine = torch.empty(b, hi, di, dtype=torch.float16, device=rows.device)
    factors = torch.empty(b, hi, dtype=torch.float32, device=rows.device)
    kernels.round_rows[(hi + append, b)](
        rows, norm, turn, _tight(kv.len), mine, factors, data, scale, kv.capacity, data.shape[1], kv.shape[1],
        di**-0.5, (hi * di) ** -0.5, eps, floor,
        HI=hi, DI=di, HALF=turn.shape[2], APPEND=append, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return mine, factors


def score(mine: Tensor, factors: Tensor, data: Tensor, scale: Tensor, kv: KV) -> Tensor:
    """Scores fp32 `[B, 1, M]` of the queries that `rounded` gives."""
    (b, hi, di), m = mine.shape, kv.capacity
    out = torch.empty(b, 1, m, dtype=torch.float32, device=mine.device)
    pad = max(16, triton.next_power_of_2(hi))
    keys = 128 if pad <= 32 else 64
    blocks, steps = _steps(mine, m, keys, b, SHARE)
    kernels.score_tokens[(blocks, b)](
        mine, factors, data, scale, _tight(kv.len), out, m, data.shape[1], steps, kv.shape[1],
        HI=hi, HI_PAD=pad, DI=di, KEYS=keys, NATIVE=_native(mine.device),
        num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    return out


def score_prompt(q: Tensor, w: Tensor, data: Tensor, scale: Tensor, pos: Tensor, m: int) -> Tensor:
    """Scores fp32 `[B, n, m]` of n queries, as `indexer.scores` gives them up to the order of sums.

    Args:
        q: `[B, n, HI, DI]`, numbers that e4m3 holds. w: fp32 `[B, n, HI]`. data, scale: as those of `rank`.
        pos: int64 `[B, n]`, where queries stand; what comes after has no meaning.
    """
    b, n, hi, di = q.shape
    out = torch.empty(b, n, m, dtype=torch.float32, device=q.device)
    kernels.score_rows[(-(-m // COLS), -(-n // ROWS), b)](
        q.half().contiguous(), w.contiguous(), data, scale, pos.contiguous(), out, n, m, data.shape[1],
        HI=hi, DI=di, ROWS=ROWS, KEYS=COLS, NATIVE=_native(q.device), num_warps=PROMPT_WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out


def _block(features: int) -> tuple[int, int]:
    """(rows, columns) of weights that a program holds at once."""
    wide = min(COLUMNS, triton.next_power_of_2(features))
    return max(1, PART // wide), wide


@functools.cache
def _native(device: torch.device) -> bool:
    """Whether the device converts e4m3 by itself."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)
