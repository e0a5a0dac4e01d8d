"""The probability that a few new tokens give each key, averaged over them and over the query heads of a kv head, in one
pass over the keys.

The rows' log-sum-exp is known: dense attention of these tokens has returned it. So each tile of probabilities is computed
once and added up where it is; the queries of all heads of a kv head share a tile, and keys are read once for all of them.

What is computed is `mean_mass` of `methods/pillar_attn.py`; `estimate_few_launch.py` calls the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import LOG2E, _logits, _product, _read


@triton.jit(do_not_specialize=["m", "steps", "nil"])
def mean_mass(
    q, k, q_pos, length, lse, out, scale, softcap, m, steps, nil, kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm,
    GROUP: tl.constexpr, NEW: tl.constexpr,  # query heads of a kv head, tokens
    TILE: tl.constexpr, KEYS: tl.constexpr,  # at least GROUP * NEW; keys of a step
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out fp32 `[B * G, m]`, 0 for keys nobody sees. grid: (ceil(ceil(m / KEYS) / steps), B * G).

    q_pos int64 `[B, NEW]`, ascending by one; length int32 `[B, G]` or None; lse fp32 `[B, H, NEW]` (natural log). The mean
    over tokens is over those that can see the key. nil: 0, see `walk.attend`.
    """
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    g = (row % kv_heads).to(tl.int64)
    r = tl.arange(0, TILE)
    live = r < GROUP * NEW
    token = r % NEW
    head = g * GROUP + r // NEW
    d = tl.arange(0, D_PAD)
    j = tl.arange(0, KEYS)
    qt = _read(q, b * q_sb + head * q_sh + token.to(tl.int64) * q_sn, live, d, D, D_PAD, True)
    last = tl.load(q_pos + b * NEW + token, mask=live, other=-1).to(tl.int32) + nil
    total = tl.load(lse + (b * kv_heads + g) * (GROUP * NEW) + r, mask=live, other=float("-inf"))
    total = tl.where(total > float("-inf"), total * LOG2E, float("inf"))  # who sees nothing gives nothing
    newest = tl.max(last)
    end = tl.minimum(m, newest + 1)
    if length is not None:
        end = tl.minimum(end, tl.load(length + row).to(tl.int32))
    k += b * k_sb + g * k_sg
    out += row.to(tl.int64) * m
    begin = tl.program_id(0) * steps
    for t in tl.range(begin, tl.minimum(begin + steps, tl.cdiv(m, KEYS)), num_stages=STAGES):
        key = t * KEYS + j
        kt = _read(k, key.to(tl.int64) * k_sm, key < end, d, D, D_PAD, True)
        s = _product(kt, qt, FP32)  # a row a key
        s = _logits(s, scale, softcap, s, CAP, False) if CAP else s * scale
        seen = (key[:, None] <= last[None, :]) & (key < end)[:, None]
        mass = tl.sum(tl.where(seen, tl.exp2(s - total[None, :]), 0.0), 1)
        sees = tl.minimum(tl.maximum(newest + 1 - key, 1), NEW)
        tl.store(out + key, mass / (sees * GROUP).to(tl.float32), mask=key < m)
