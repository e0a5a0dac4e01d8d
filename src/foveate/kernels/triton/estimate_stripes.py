"""The highest logit of rows near by, and single keys whose logit with mean queries reaches a limit, as bits.

`anchor_peaks` is attention's first product over near keys without the rest of it. `stripe_bits` packs the mean queries of a
group's blocks, of several heads, into the rows of one product with all far keys; of its numbers a bit a key and head leaves
the registers, 32 keys a word.

What is computed is `scores/stripes.py`; `estimate_stripes_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .estimate_lowbit import _either
from .steps import LOG2E, _logits, _product, _read


@triton.jit(do_not_specialize=["m", "n", "start", "first"])
def anchor_peaks(
    q, k, out, scale, softcap, m, n, start, first, init, local,
    kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,  # rows of a block, blocks of a group
    KEYS: tl.constexpr,  # keys of a step, a divisor of BLOCK
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean over a block's rows of their highest logit among near keys: fp32 `[B * H, nq]`. grid: (nq, B * H).

    q `[B, H, n, D]`, the positions from `start` on; program i serves block first + i. k `[B, G, m, D]`. Near are the first
    init blocks and those from `local` blocks before the block's group on. scale is not negative.
    """
    h = tl.program_id(1)
    b = (h // (kv_heads * GROUP)).to(tl.int64)
    block = first + tl.program_id(0)
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, KEYS)
    d = tl.arange(0, D_PAD)
    pos = block * BLOCK + i
    row = pos - start
    live = (row >= 0) & (row < n)
    q += b * q_sb + (h % (kv_heads * GROUP)).to(tl.int64) * q_sh
    k += b * k_sb + (h // GROUP % kv_heads).to(tl.int64) * k_sg
    qt = _read(q, row.to(tl.int64) * q_sn, live, d, D, D_PAD, True)
    begin = tl.maximum(block // STEP * STEP - local, 0) * BLOCK
    far = tl.minimum(init * BLOCK, begin) // KEYS  # steps over the first keys, then those from `begin` to the block
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for s in tl.range(0, far + (block * BLOCK - begin) // KEYS, num_stages=STAGES):
        c = tl.where(s < far, s * KEYS, begin + (s - far) * KEYS)
        kt = _read(k, (c + j).to(tl.int64) * k_sm, c + j < m, d, D, D_PAD, D < D_PAD)
        best = tl.maximum(best, tl.max(_product(qt, kt, FP32), 1))
    for c in range(0, BLOCK, KEYS):  # the block itself
        key = block * BLOCK + c + j
        kt = _read(k, key.to(tl.int64) * k_sm, key < m, d, D, D_PAD, True)
        x = tl.where(key[None, :] <= pos[:, None], _product(qt, kt, FP32), float("-inf"))
        best = tl.maximum(best, tl.max(x, 1))
    if CAP:
        best = _logits(best, scale * LOG2E, softcap, best, CAP, False) / LOG2E
    else:
        best = best * scale
    count = tl.sum(live.to(tl.int32))
    mean = tl.sum(tl.where(live, best, 0.0)) / tl.maximum(count, 1).to(tl.float32)
    tl.store(out + h.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), mean)


@triton.jit(do_not_specialize=["m", "nq", "first", "group0", "many"])
def stripe_bits(
    mean, limit, k, words, softcap, m, nq, first, group0, many, init, local, span,
    kv_heads, k_sb, k_sg, k_sm,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    HEADS: tl.constexpr, STEP_PAD: tl.constexpr,  # heads and blocks of a product, each a power of two
    KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Bits of keys that any block of a group takes: int32 `[B * H, groups, many]`. grid: (spans, groups, B * G * parts).

    mean `[B * H, nq, D]`, times the scale, of the blocks from number `first` on; limit fp32 `[B * H, nq]`; group i is number
    group0 + i. Far keys are those from block init to `local` blocks before the group. A program looks at `span` keys, a
    multiple of KEYS, for HEADS of a kv head's heads. Bits of the first keys are 0, those beyond the last far key anything.
    """
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    group = group0 + tl.program_id(1)
    end = (group * STEP - local) * BLOCK
    begin = tl.program_id(0) * span
    if begin >= end:
        return
    unit = tl.program_id(2) // PARTS
    b = (unit // kv_heads).to(tl.int64)
    ROWS: tl.constexpr = HEADS * STEP_PAD
    i = tl.arange(0, ROWS)
    j = tl.arange(0, KEYS)
    d = tl.arange(0, D_PAD)
    head = tl.program_id(2) % PARTS * HEADS + i // STEP_PAD
    block = group * STEP + i % STEP_PAD - first
    live = (head < GROUP) & (i % STEP_PAD < STEP) & (block >= 0) & (block < nq)
    at = (unit.to(tl.int64) * GROUP + head) * nq + block
    qt = _read(mean, at * D, live, d, D, D_PAD, True)
    least = tl.load(limit + at, mask=live, other=float("inf"))
    k += b * k_sb + (unit % kv_heads).to(tl.int64) * k_sg
    lane = tl.arange(0, HEADS)
    head = tl.program_id(2) % PARTS * HEADS + lane
    row = (unit.to(tl.int64) * GROUP + head) * tl.num_programs(1) + tl.program_id(1)
    number = tl.arange(0, KEYS // 32)
    out = words + row[:, None] * many + number[None, :]
    for c in tl.range(begin, tl.minimum(begin + span, end), KEYS, num_stages=STAGES):
        key = c + j
        kt = _read(k, key.to(tl.int64) * k_sm, key < m, d, D, D_PAD, True)
        x = _product(qt, kt, FP32)
        if CAP:
            x = _logits(x, LOG2E, softcap, x, CAP, False) / LOG2E
        hit = (x >= least[:, None]) & (key >= init * BLOCK)[None, :]
        bit = tl.where(hit, tl.full([1, 1], 1, tl.int32) << (j % 32)[None, :], 0)
        word = tl.sum(tl.reshape(bit, [ROWS, KEYS // 32, 32]), 2)  # each bit comes once
        word = tl.reduce(tl.reshape(word, [HEADS, STEP_PAD, KEYS // 32]), 1, _either)
        tl.store(out + c // 32, word, mask=((head < GROUP)[:, None]) & (c // 32 + number < many)[None, :])
