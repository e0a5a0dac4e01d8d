"""The kernels of the backward pass over per-token lists; see `tokens_backward.py` for how they go together.

q, dout, k, v are contiguous here. lse2 (lse * log2(e), +inf where a row sees nothing) and delta are fp32 `[B, H, N]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernels import BITS, MASK, _dot, _reach
from .steps import BIG, LOG2E
from .tokens_bits import BITS as WORD_BITS
from .tokens_bits import MASK as WORD_MASK
from .tokens_kernels import _ends


@triton.jit
def delta_kernel(out, dout, lse, dlse, lse2, delta, total, ROWS: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """lse2 and delta = rowsum(dout * out) - dlse of all rows. grid: (rows / ROWS,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, DV_PAD)
    ok = (row < total)[:, None] & (e < DV)[None, :]
    x = tl.load(out + row[:, None] * DV + e[None, :], mask=ok, other=0.0).to(tl.float32)
    y = tl.load(dout + row[:, None] * DV + e[None, :], mask=ok, other=0.0).to(tl.float32)
    s = tl.load(lse + row, mask=row < total, other=float("-inf"))
    tl.store(lse2 + row, tl.where(s > float("-inf"), s * LOG2E, float("inf")), mask=row < total)
    tl.store(delta + row, tl.sum(x * y, 1) - tl.load(dlse + row, mask=row < total, other=0.0), mask=row < total)


@triton.jit
def _dq_steps(
    q, kt, vt, dout, lse2, delta, part, ids, n, key, live, pos, scale, SHARE, SLOTS, N,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CUT: tl.constexpr, CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial dq of n entries over one key block, all of whose keys every one sees unless CUT."""
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    r = tl.arange(0, ROWS)
    head = r % HEADS
    for c in tl.range(0, n, ROWS // HEADS, num_stages=STAGES):
        entry = c + r // HEADS
        ok = (entry < n) & (head < SHARE)
        word = tl.load(ids + entry, mask=ok, other=0)
        token = word >> WORD_BITS
        at = head * N + token
        qt = tl.load(q + (at * D)[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        do = tl.load(dout + (at * DV)[:, None] + e[None, :], mask=ok[:, None] & (e < DV)[None, :], other=0.0)
        s2 = tl.load(lse2 + at, mask=ok, other=float("inf"))
        t = tl.load(delta + at, mask=ok, other=0.0)
        p = tl.exp2(_dot(qt, kt.T, None, FP32) * (scale * LOG2E) - s2[:, None])
        if CUT:
            seen = live[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= (pos + token)[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (_dot(do, vt.T, None, FP32) - t[:, None])
        o = _dot(ds, kt, None, FP32) * scale
        at = (token * SLOTS + (word & WORD_MASK)) * SHARE + head
        tl.store(part + (at * D)[:, None] + d[None, :], o.to(part.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["number", "max_items", "first", "NK"])
def dq_partial_kernel(
    q, k, v, dout, lse2, delta, part, ids, items, plan,
    scale, LISTS, SHARE, G, H, number, max_items, first, size, NK, N, M, SLOTS,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, LONGEST: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of the tokens that name one key block, as partial results (see `partial_kernel`)."""
    pid = tl.program_id(0)
    items += (number * max_items + pid) * 3
    row = tl.load(items)  # together with `plan`, not behind it
    begin = tl.load(items + 1)
    end = tl.load(items + 2)
    if pid >= tl.load(plan + number):
        return
    lead = row // NK
    b = (lead // LISTS).to(tl.int64)
    head0 = (lead % LISTS) * SHARE
    g = (lead % LISTS) * G // LISTS
    key0 = (row % NK) * WIDTH
    key = key0 + tl.arange(0, WIDTH)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    ids += begin
    n = end - begin
    pos = M - N + first
    low, high = _ends(ids, n, LONGEST)
    live = key < M
    whole = key0 + WIDTH <= M
    if CAUSAL:  # as in `partial_kernel`
        live = live & (key <= pos + high)
        whole = whole & (key0 + WIDTH - 1 <= pos + low)
    far = ((b * G + g) * M + key)[:, None]
    kt = tl.load(k + far * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    vt = tl.load(v + far * DV + e[None, :], mask=live[:, None] & (e < DV)[None, :], other=0.0)
    base = (b * H + head0) * N + first
    q += base * D
    dout += base * DV
    lse2 += base
    delta += base
    part += lead.to(tl.int64) * size * SLOTS * SHARE * D
    if whole:
        _dq_steps(q, kt, vt, dout, lse2, delta, part, ids, n, key, live, pos, scale, SHARE, SLOTS, N, ROWS, HEADS, D, D_PAD,
                  DV, DV_PAD, False, False, FP32, STAGES)  # fmt: skip
    else:
        _dq_steps(q, kt, vt, dout, lse2, delta, part, ids, n, key, live, pos, scale, SHARE, SLOTS, N, ROWS, HEADS, D, D_PAD,
                  DV, DV_PAD, True, CAUSAL, FP32, STAGES)  # fmt: skip


@triton.jit(do_not_specialize=["tile0", "tiles_all", "first", "rows", "width"])
def dq_walk_kernel(
    q, k, v, dout, lse2, delta, part, tiles, count, shared, shared_count,
    scale, LISTS, SHARE, G, H, HL, tile0, tiles_all, first, rows, size, N, M, SLOTS, width, sb, st, sq, cb, ch, cq,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, T_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of one tile of tokens over the blocks they share, into their last slot (see `walk_kernel`)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    lead = tl.program_id(1)
    at = lead.to(tl.int64) * tiles_all + tile0 + tile
    front = tl.load(shared_count + at * 2)
    back = tl.load(shared_count + at * 2 + 1)
    if front + back == 0:
        return
    shared += at * width
    b = (lead // LISTS).to(tl.int64)
    head0 = (lead % LISTS) * SHARE
    g = (lead % LISTS) * G // LISTS
    list_head = (head0 * HL // H).to(tl.int64)
    r = tl.arange(0, ROWS)
    head = r % HEADS
    inner = tile * (ROWS // HEADS) + r // HEADS
    row = first + inner
    live = (inner < rows) & (head < SHARE)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    i = tl.arange(0, T_PAD)[None, :]
    n = tl.load(count + b * cb + list_head * ch + row * cq, mask=live, other=0)
    tiles += b * sb + list_head * st
    start = tl.load(tiles + row.to(tl.int64)[:, None] * sq + i, mask=live[:, None] & (i < n[:, None]), other=BIG)
    at = (b * H + head0 + head) * N + row
    qt = tl.load(q + at[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    do = tl.load(dout + at[:, None] * DV + e[None, :], mask=live[:, None] & (e < DV)[None, :], other=0.0)
    s2 = tl.load(lse2 + at, mask=live, other=float("inf"))
    t = tl.load(delta + at, mask=live, other=0.0)
    k += (b * G + g) * M * D
    v += (b * G + g) * M * DV
    scale2 = scale * LOG2E
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for j in tl.range(0, front, num_stages=STAGES):
        key0 = tl.load(shared + j) * WIDTH
        key = key0 + tl.arange(0, WIDTH)
        far = key.to(tl.int64)[:, None]
        kt = tl.load(k + far * D + d[None, :], mask=(key < M)[:, None] & (d < D)[None, :], other=0.0)
        vt = tl.load(v + far * DV + e[None, :], mask=(key < M)[:, None] & (e < DV)[None, :], other=0.0)
        hit = tl.max((start == key0).to(tl.int32), 1)
        seen = (hit > 0)[:, None] & (key < M)[None, :]
        p = tl.where(seen, tl.exp2(_dot(qt, kt.T, None, FP32) * scale2 - s2[:, None]), 0.0)
        acc = _dot(p * (_dot(do, vt.T, None, FP32) - t[:, None]), kt, acc, FP32)
    for j in tl.range(0, back, num_stages=1):
        key0 = tl.load(shared + width - 1 - j) * WIDTH
        key = key0 + tl.arange(0, WIDTH)
        stop = tl.max(tl.where(start <= key0, start, -BIG), 1) + WIDTH
        after = tl.min(tl.where(start > key0, start, BIG), 1)
        seen = (key[None, :] < stop[:, None]) | (key[None, :] >= after[:, None])
        seen = seen & (key < M)[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= (M - N + row)[:, None])
        some = tl.max(seen.to(tl.int32), 0) > 0  # keys that no row sees may hold anything, NaN included
        far = key.to(tl.int64)[:, None]
        kt = tl.load(k + far * D + d[None, :], mask=some[:, None] & (d < D)[None, :], other=0.0)
        vt = tl.load(v + far * DV + e[None, :], mask=some[:, None] & (e < DV)[None, :], other=0.0)
        p = tl.where(seen, tl.exp2(_dot(qt, kt.T, None, FP32) * scale2 - s2[:, None]), 0.0)
        acc = _dot(p * (_dot(do, vt.T, None, FP32) - t[:, None]), kt, acc, FP32)
    at = ((lead.to(tl.int64) * size + inner) * SLOTS + SLOTS - 1) * SHARE + head
    acc = acc * scale
    tl.store(part + at[:, None] * D + d[None, :], acc.to(part.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _words(ids, at, end, r, head, SHARE, HEADS: tl.constexpr):
    """Words of list entries from `at` on for rows r of a step, heads of an entry beside each other; 0 behind the end."""
    return tl.load(ids + at + r // HEADS, mask=(at + r // HEADS < end) & (head < SHARE), other=0)


@triton.jit
def _rows(q, dout, lse2, delta, at, ok, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr):
    """q `[ROWS, D_PAD]`, dout `[ROWS, DV_PAD]`, lse2 and delta `[ROWS]` of rows `at`."""
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    qt = tl.load(q + (at * D)[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
    do = tl.load(dout + (at * DV)[:, None] + e[None, :], mask=ok[:, None] & (e < DV)[None, :], other=0.0)
    s2 = tl.load(lse2 + at, mask=ok, other=float("inf"))
    return qt, do, s2, tl.load(delta + at, mask=ok, other=0.0)


@triton.jit
def dkdv_rows_kernel(
    q, k, v, dout, lse2, delta, dk, dv, part, tiles, count, ids, offset, counts, cuts, items, plan,
    scale, LISTS, SHARE, G, H, HL, N, M, NK, max_items, sb, st, sq, cb, ch, cq,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, T_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys, or of one item of them: `backward_kernels.dkdv_kernel` for rows that are gathered one by one.

    LISTS: lists of a kv head. grid: (max_items + B * G * NK,). List words are loaded a step ahead by hand: within the loop
    they would take one of Triton's stages, and rows would be asked for only behind the step before.
    """
    STEP: tl.constexpr = ROWS // HEADS
    pid = tl.program_id(0)
    cut = pid < max_items
    made = tl.load(plan + 1)
    block = tl.where(cut, tl.load(items + pid, mask=pid < made, other=0), tl.maximum(pid - max_items, 0))
    if tl.where(cut, pid >= made, tl.load(cuts + block * 2 + 1) > 0):
        return
    begin = 0
    whole = tl.load(counts + block * 3 + 1)
    end = tl.load(counts + block * 3 + 2)
    if cut:
        length = tl.load(plan)
        begin = (pid - tl.load(cuts + block * 2)) * length
        end = tl.minimum(end, begin + length)
    whole = tl.minimum(tl.maximum(whole, begin), end)
    ids += tl.load(offset + block)
    lead = (block // NK).to(tl.int64)  # b * G + kv head
    key0 = (block % NK) * KEYS
    b = lead // G
    head0 = (lead % G) * (LISTS * SHARE)
    key = key0 + tl.arange(0, KEYS)
    ok_key = key < M
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    far = (lead * M + key)[:, None]
    kt = tl.load(k + far * D + d[None, :], mask=ok_key[:, None] & (d < D)[None, :], other=0.0)
    vt = tl.load(v + far * DV + e[None, :], mask=ok_key[:, None] & (e < DV)[None, :], other=0.0)
    base = (b * H + head0) * N
    q += base * D
    dout += base * DV
    lse2 += base
    delta += base
    scale2 = scale * LOG2E
    acc_k = tl.zeros([KEYS, D_PAD], tl.float32)
    acc_v = tl.zeros([KEYS, DV_PAD], tl.float32)
    r = tl.arange(0, ROWS)
    head = r % HEADS
    word = _words(ids, begin, whole, r, head, SHARE, HEADS)
    for c in tl.range(begin, whole, STEP, num_stages=STAGES):
        ok = (c + r // HEADS < whole) & (head < SHARE)
        token = word & MASK
        at = ((word >> BITS) * SHARE + head) * N + token  # 32 bits hold the rows of one kv head
        qt, do, s2, t = _rows(q, dout, lse2, delta, at, ok, D, D_PAD, DV, DV_PAD)
        seen = ok_key[:, None]
        if CAUSAL:
            seen = seen & (key[:, None] <= (M - N + token)[None, :])
        s = _dot(kt, qt.T, None, FP32)
        dp = _dot(vt, do.T, None, FP32)
        p = tl.where(seen, tl.exp2(s * scale2 - s2[None, :]), 0.0)
        acc_v = _dot(p, do, acc_v, FP32)
        # The derivative is cut as well: a key that no row sees may hold NaN.
        acc_k = _dot(tl.where(seen, p * (dp - t[None, :]), 0.0), qt, acc_k, FP32)
        word = _words(ids, c + STEP, whole, r, head, SHARE, HEADS)
    for c in range(whole, end):  # a part of the block is named: one token at a time, under its own bounds
        one = tl.load(ids + c)
        token = one & MASK
        list_head = (head0 + (one >> BITS) * SHARE) * HL // H
        n = tl.load(count + b * cb + list_head * ch + token * cq)
        line = tiles + b * sb + list_head * st + token.to(tl.int64) * sq
        stop, after = _reach(line, n, key0, WIDTH, T_PAD)
        ok = r < SHARE
        at = ((one >> BITS) * SHARE + r) * N + token
        qt, do, s2, t = _rows(q, dout, lse2, delta, at, ok, D, D_PAD, DV, DV_PAD)
        seen = (ok_key & ((key < stop) | (key >= after)))[:, None]
        if CAUSAL:
            seen = seen & (key[:, None] <= M - N + token)
        p = tl.where(seen, tl.exp2(_dot(kt, qt.T, None, FP32) * scale2 - s2[None, :]), 0.0)
        ds = tl.where(seen, p * (_dot(vt, do.T, None, FP32) - t[None, :]), 0.0)
        acc_v = _dot(p, do, acc_v, FP32)
        acc_k = _dot(ds, qt, acc_k, FP32)
    acc_k = acc_k * scale
    i = tl.arange(0, KEYS)
    if cut:
        at = (pid.to(tl.int64) * KEYS + i)[:, None] * (D_PAD + DV_PAD)
        tl.store(part + at + d[None, :], acc_k)
        tl.store(part + at + D_PAD + e[None, :], acc_v)
    else:
        tl.store(dk + far * D + d[None, :], acc_k.to(dk.dtype.element_ty), mask=ok_key[:, None] & (d < D)[None, :])
        tl.store(dv + far * DV + e[None, :], acc_v.to(dv.dtype.element_ty), mask=ok_key[:, None] & (e < DV)[None, :])
