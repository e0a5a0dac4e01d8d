"""One decode query a row against every key: logits, and probabilities reduced over heads, without a copy of the keys.

`row_scores` reads the keys once, keys split over programs, and leaves the logits of each query head and a log-sum-exp per
split; `row_votes` turns these into probabilities and adds them up (or takes the largest) over the query heads of a list:
one, those of a kv head, or all. Keys are what a step pays for; logits are H numbers a key, in fp32, that stay in L2.

Every output element is owned by one program and added up in one order, so equal calls give equal bits.
`estimate_votes_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import FLOOR, _read


@triton.jit
def _last(length, q_pos, row, b, m, tail):
    """The end of what a row looks at: entries that exist, up to its own position, without the newest `tail`."""
    end = m
    if length is not None:
        end = tl.minimum(tl.load(length + row).to(tl.int32), m)
    if q_pos is not None:
        end = tl.minimum(end, tl.load(q_pos + b).to(tl.int32) + 1)
    return end - tail


@triton.jit(do_not_specialize=["m", "share", "splits", "first", "tail"])
def row_scores(
    q, k, length, q_pos, score, part, scale, softcap, m, share, splits, first, tail,
    kv_heads, q_sb, q_sh, k_sb, k_sg, k_sm,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,  # query heads of a kv head
    PARTS: tl.constexpr,  # 4: q is fp32 and meets keys of 16 bits as the sum of three numbers of their dtype; else 1
    KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    CAP: tl.constexpr, FP32: tl.constexpr, LSE: tl.constexpr, STAGES: tl.constexpr,
    STAY: tl.constexpr,  # logits are to stay in the L2 cache while the keys run through it
):  # fmt: skip
    """Logits (base 2) of one query a row over keys first .. end - tail. grid: (splits, B * G).

    score fp32 `[B, H, m]`, written in that range only. part fp32 `[B * H, splits]`: log-sum-exp (base 2) of a split of
    `share` keys, -inf where it has none, if LSE. length int `[B, G]` or None; q_pos int `[B]`, or None: a row sees all.
    """
    split = tl.program_id(0)
    row = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    g = row % kv_heads
    end = _last(length, q_pos, row, b, m, tail)
    i = tl.arange(0, GROUP_PAD * PARTS)
    h = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, D_PAD)
    j = tl.arange(0, KEYS)
    at = row.to(tl.int64) * GROUP + h
    head = (g * GROUP + i % GROUP_PAD).to(tl.int64)
    qt = _read(q, b * q_sb + head * q_sh, i % GROUP_PAD < GROUP, d, D, D_PAD, True)  # on its way while `end` is
    begin = split * share
    if begin >= end:  # a row that looks at nothing here costs next to nothing: `ranked_steps_held.py` counts on it
        if LSE:
            tl.store(part + at * splits + split, tl.full([GROUP_PAD], float("-inf"), tl.float32), mask=h < GROUP)
        return
    if PARTS > 1:
        high = qt.to(k.dtype.element_ty)
        rest = qt - high.to(tl.float32)
        middle = rest.to(k.dtype.element_ty)
        low = (rest - middle.to(tl.float32)).to(k.dtype.element_ty)
        which = (i // GROUP_PAD)[:, None]
        qt = tl.where(which == 0, high, tl.where(which == 1, middle, tl.where(which == 2, low, tl.zeros_like(low))))
    qt = tl.trans(qt)
    k += b * k_sb + g.to(tl.int64) * k_sg
    top = tl.full([KEYS, GROUP_PAD], FLOOR, tl.float32)
    total = tl.zeros([KEYS, GROUP_PAD], tl.float32)
    for c in tl.range(begin, tl.minimum(end, begin + share), KEYS, num_stages=STAGES):
        key = c + j
        kt = _read(k, key.to(tl.int64) * k_sm, key < end, d, D, D_PAD, True)
        if FP32:
            s = tl.dot(kt, qt, input_precision="ieee")
        else:
            s = tl.dot(kt, qt)
        if PARTS > 1:
            s = tl.sum(tl.reshape(s, (KEYS, PARTS, GROUP_PAD)), 1)
        s = s * scale
        if CAP:  # scale is that of the logit over the cap; softcap is in base 2
            s = softcap * (1 - 2 / (tl.exp2(2.8853900817779268 * s) + 1))
        ok = (key >= first) & (key < end)
        to = score + at[None, :] * m + key[:, None]
        if STAY:
            tl.store(to, s, mask=ok[:, None] & (h < GROUP)[None, :], eviction_policy="evict_last")
        else:
            tl.store(to, s, mask=ok[:, None] & (h < GROUP)[None, :])
        if LSE:
            s = tl.where(ok[:, None], s, float("-inf"))
            peak = tl.maximum(top, s)
            total = total * tl.exp2(top - peak) + tl.exp2(s - peak)
            top = peak
    if LSE:
        peak = tl.max(top, 0)
        some = tl.sum(total * tl.exp2(top - peak[None, :]), 0)
        lse = tl.where(some > 0, peak + tl.log2(tl.where(some > 0, some, 1.0)), float("-inf"))
        tl.store(part + at * splits + split, lse, mask=h < GROUP)


@triton.jit(do_not_specialize=["splits", "first", "tail"])
def row_votes(
    score, part, length, q_pos, out, m, splits, first, tail, lists, kv_heads,
    HEADS: tl.constexpr,  # query heads of a list
    LINES: tl.constexpr,  # heads of a step
    KEYS: tl.constexpr,  # 128 a warp: then no thread needs another one's numbers to reduce heads
    SPLITS: tl.constexpr,  # at least splits
    MOST: tl.constexpr,  # the largest probability of any head instead of their sum
    STAGES: tl.constexpr,
):  # fmt: skip
    """Probabilities reduced over the heads of a list, fp32 `[B, lists, m]`, 0 outside first .. end - tail.

    grid: (ceil(m / KEYS), B * lists). score and part as `row_scores` leaves them; a list goes by the length of its first kv
    head.
    """
    row = tl.program_id(1)
    b = row // lists
    end = _last(length, q_pos, b * kv_heads + (row % lists) * kv_heads // lists, b, m, tail)
    out += row.to(tl.int64) * m
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    if (tl.program_id(0) * KEYS >= end) | (tl.program_id(0) * KEYS + KEYS <= first):
        tl.store(out + key, tl.zeros([KEYS], tl.float32), mask=key < m)
        return
    n = tl.arange(0, SPLITS)
    vote = tl.zeros([KEYS], tl.float32)
    for line in tl.range(0, HEADS, LINES, num_stages=STAGES):
        h = line + tl.arange(0, LINES)
        at = row.to(tl.int64) * HEADS + h
        lse = tl.load(
            part + at[:, None] * splits + n[None, :], mask=(h < HEADS)[:, None] & (n < splits)[None, :], other=float("-inf")
        )
        # Not the mask of the votes: one that ends at any key would make it four times as many loads.
        s = tl.load(
            score + at[:, None] * m + key[None, :], mask=(key < m)[None, :] & (h < HEADS)[:, None], other=float("-inf")
        )
        top = tl.max(lse, 1)
        some = top > float("-inf")
        top = tl.where(some, top, 0.0)
        lse = top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), 1))
        lse = tl.where(some, lse, float("inf"))  # heads that see nothing or do not exist give nothing
        p = tl.where(some[:, None], tl.exp2(s - lse[:, None]), 0.0)
        if MOST:
            vote = tl.maximum(vote, tl.max(p, 0))
        else:
            vote += tl.sum(p, 0)
    ok = (key >= first) & (key < end)
    tl.store(out + key, tl.where(ok, vote, 0.0), mask=key < m)
