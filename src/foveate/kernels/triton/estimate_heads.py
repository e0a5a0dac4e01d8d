"""From a probe's mass to block columns and block diagonals of each head: two launches instead of many small ones.

What is computed is `scores/heads.py`; `estimate_heads_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .estimate_rows_lists import _best
from .steps import LOG2E, _logits


@triton.jit(do_not_specialize=["m"])
def pool_probe(
    columns, diagonals, mean, k, out, scale, softcap, share, m, heads, kv_heads, x_sh, k_sg,
    BLOCK: tl.constexpr, PAD: tl.constexpr,  # tokens of a block; at least BLOCK
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Four numbers a block, fp32 `[4, B * heads, blocks]`. grid: (blocks, B * heads).

    The mass of its keys and, of the distances in it, what joins blocks that many blocks apart and one more apart, all times
    `share`; and the logit of the mean query with its mean key. columns, diagonals fp32, x_sh numbers a head, the first m
    count; mean fp32 `[B * heads, D]`; k fp32 with k_sg numbers a kv head.
    """
    block = tl.program_id(0)
    h = tl.program_id(1)
    i = tl.arange(0, PAD)
    d = tl.arange(0, D_PAD)
    at = block * BLOCK + i
    ok = (i < BLOCK) & (at < m)
    near = tl.load(diagonals + h.to(tl.int64) * x_sh + at, mask=ok, other=0.0)
    over = i.to(tl.float32) / BLOCK
    mass = tl.sum(tl.load(columns + h.to(tl.int64) * x_sh + at, mask=ok, other=0.0) * share)
    bg = h // heads * kv_heads + h % heads * kv_heads // heads
    q = tl.load(mean + h * D + d, mask=d < D, other=0.0) * scale
    s = tl.sum(q * tl.load(k + bg.to(tl.int64) * k_sg + block * D + d, mask=d < D, other=0.0))
    if CAP:
        s = _logits(s, LOG2E, softcap, s, CAP, False) / LOG2E
    rows = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    out += h.to(tl.int64) * tl.num_programs(0) + block
    tl.store(out, mass)
    tl.store(out + rows, tl.sum(near * share * (1 - over)))
    tl.store(out + 2 * rows, tl.sum(near * share * over))
    tl.store(out + 3 * rows, s)


@triton.jit
def _log_ratio(p, mix):
    """p log(p / mix), 0 where p is."""
    return tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0) / mix), 0.0)


@triton.jit(do_not_specialize=["nk", "tau", "least", "most"])
def choose_heads(
    pooled, many, columns, diagonals, aware, tau, nk, least, most, BLOCK: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Block columns and block diagonals of each head, int8 `[B * H, nk]` twice, and aware int8 `[B * H]`. grid: (B * H,).

    pooled as `pool_probe` leaves it. many int32 `[2, B * H]`: keys, and distances, that hold enough mass; they ask for that
    many tokens of blocks and one, or two, more, between `least` and `most`, and the first block is always in. A head is
    aware if the softmax of its logits is nearer than tau to its mass (Jensen-Shannon): it gets `least`.
    """
    h = tl.program_id(0)
    heads = tl.num_programs(0)
    j = tl.arange(0, N)
    valid = j < nk
    at = pooled + h.to(tl.int64) * nk + j
    step = heads.to(tl.int64) * nk
    mass = tl.load(at, mask=valid, other=0.0)
    s = tl.load(at + 3 * step, mask=valid, other=float("-inf"))
    p = tl.exp(s - tl.max(s))
    p = p / tl.sum(p)
    mix = tl.maximum((p + mass) * 0.5, 1.1754943508222875e-38)
    distance = tl.sqrt(tl.maximum(tl.sum(_log_ratio(p, mix) + _log_ratio(mass, mix)) * 0.5, 0.0))
    trusts = distance < tau
    tl.store(aware + h, trusts.to(tl.int8))
    must = j == 0
    need = tl.minimum(tl.maximum(tl.load(many + h) // BLOCK + 1, least), most)
    chosen = _best(mass, valid, must, 0.0, tl.where(trusts, least, need), j, True, N)
    tl.store(columns + h.to(tl.int64) * nk + j, chosen.to(tl.int8), mask=valid)
    far = tl.load(at + 2 * step - 1, mask=valid & (j > 0), other=0.0)
    mass = tl.load(at + step, mask=valid, other=0.0) + far
    need = tl.minimum(tl.maximum(tl.load(many + heads + h) // BLOCK + 2, least), most)
    chosen = _best(mass, valid, must, 0.0, tl.where(trusts, least, need), j, True, N)
    tl.store(diagonals + h.to(tl.int64) * nk + j, chosen.to(tl.int8), mask=valid)
