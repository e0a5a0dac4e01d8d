"""The kernels of the backward pass: dq over lists, dk and dv over inverse lists, and the sum of cut key blocks.

Both passes have a loop without masks, one for what causality alone cuts, and one for everything else, where keys that
no row sees are kept out of every product: they may hold NaN. Descriptors read what lies outside a tensor as zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .inverse import LIST_BITS
from .steps import BIG, LOG2E
from .walk_lists import _survey

MASK = tl.constexpr((1 << LIST_BITS) - 1)
BITS = tl.constexpr(LIST_BITS)


@triton.jit
def _dot(a, b, acc, FP32: tl.constexpr):
    """a @ b (+ acc). fp32 goes through three tf32 products: its accuracy at the speed of the matrix units."""
    if FP32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return tl.dot(a.to(b.dtype), b, acc)


@triton.jit
def _block(desc, b, h, row, ROWS: tl.constexpr, D: tl.constexpr):
    """Rows `[ROWS, D]` of `[B, H, N, D]`; what lies outside reads as zero."""
    return desc.load([b, h, row, 0]).reshape([ROWS, D])


@triton.jit
def dq_kernel(
    q, k, v, out, dout, lse, dlse, dq, lse2, delta, tiles, count,
    scale, H, G, HL, N, M, NB, q_offset, sb, st, sq, cb, ch, cq,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FULL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dq of ROWS query rows of one head, and for the other pass lse2 = lse * log2(e) and delta on the padded grid.

    q, k, v, dout: descriptors. lse2, delta `[B * H, NB * BLOCK]` hold +inf and 0 in rows that see nothing. scale: of
    the softmax; logits are taken in units of log 2. grid: (B * H * NB * BLOCK // ROWS,), head by head so
    that keys stay in the cache, last (under causality longest) query blocks first.
    """
    PARTS: tl.constexpr = BLOCK // ROWS
    INNER: tl.constexpr = WIDTH // KEYS
    pid = tl.program_id(0)
    part = NB * PARTS - 1 - pid % (NB * PARTS)
    b = pid // (NB * PARTS) // H
    head = pid // (NB * PARTS) % H
    block = part // PARTS
    kv_head = head // (H // G)
    grid_row = part * ROWS
    first = grid_row - q_offset
    i = tl.arange(0, ROWS)
    row = first + i
    live = (row >= 0) & (row < N)
    at = (b * H + head).to(tl.int64) * N + row
    dv = tl.arange(0, DV_PAD)
    x = tl.load(out + at[:, None] * DV + dv[None, :], mask=live[:, None] & (dv[None, :] < DV), other=0.0).to(tl.float32)
    do = _block(dout, b, head, first, ROWS, DV_PAD)
    t = tl.sum(x * do.to(tl.float32), 1) - tl.load(dlse + at, mask=live, other=0.0)
    s2 = tl.load(lse + at, mask=live, other=float("-inf"))
    s2 = tl.where(s2 > float("-inf"), s2 * LOG2E, float("inf"))
    padded = (b * H + head).to(tl.int64) * (NB * BLOCK) + grid_row + i
    tl.store(lse2 + padded, s2)
    tl.store(delta + padded, t)

    qt = _block(q, b, head, first, ROWS, D_PAD)
    pos = M - N + row
    lo = M - N + tl.maximum(first, 0)  # positions of this program's first and last row
    hi = M - N + tl.minimum(first + ROWS, N) - 1
    if not CAUSAL:
        lo = first * 0 + M
        hi = first * 0 + M
    if FULL:
        free = tl.maximum(tl.minimum(lo + 1, M), 0) // KEYS
        used = tl.maximum(tl.minimum(hi + 1, M) + KEYS - 1, 0) // KEYS
        near = tl.maximum(tl.minimum(hi + 1, M), 0) // KEYS
    else:
        list_head = head * HL // H
        tiles += b.to(tl.int64) * sb + list_head.to(tl.int64) * st + block.to(tl.int64) * sq
        n = tl.load(count + b.to(tl.int64) * cb + list_head * ch + block * cq)
        _, free, used = _survey(tiles, n, 0, tl.minimum(lo + 1, M), tl.minimum(hi + 1, M), WIDTH, CHUNK)
        near = free
        if CAUSAL:
            _, near, _ = _survey(tiles, n, 0, tl.minimum(hi + 1, M), tl.minimum(hi + 1, M), WIDTH, CHUNK)
        free *= INNER
        near *= INNER
        used *= INNER
    scale2 = scale * LOG2E
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    ahead = 0  # first key of the tile to come, so that no copy waits for its address
    if not FULL:
        ahead = tl.load(tiles, mask=free > 0, other=0)
    for j in tl.range(0, free, num_stages=STAGES):
        if FULL:
            key0 = j * KEYS
        else:
            key0 = ahead + (j % INNER) * KEYS
            ahead = tl.load(tiles + tl.minimum(j + 1, free - 1) // INNER)
        kt = _block(k, b, kv_head, key0, KEYS, D_PAD)
        vt = _block(v, b, kv_head, key0, KEYS, DV_PAD)
        s = _dot(qt, kt.T, None, FP32)
        dp = _dot(do, vt.T, None, FP32)
        p = tl.exp2(s * scale2 - s2[:, None])
        acc = _dot(p * (dp - t[:, None]), kt, acc, FP32)
    if CAUSAL:  # whole tiles of which every key is seen by some row
        for j in tl.range(free, near, num_stages=STAGES):
            if FULL:
                key0 = j * KEYS
            else:
                key0 = tl.load(tiles + j // INNER) + (j % INNER) * KEYS
            kt = _block(k, b, kv_head, key0, KEYS, D_PAD)
            vt = _block(v, b, kv_head, key0, KEYS, DV_PAD)
            s = _dot(qt, kt.T, None, FP32)
            dp = _dot(do, vt.T, None, FP32)
            seen = (key0 + tl.arange(0, KEYS))[None, :] <= pos[:, None]
            p = tl.where(seen, tl.exp2(s * scale2 - s2[:, None]), 0.0)
            acc = _dot(p * (dp - t[:, None]), kt, acc, FP32)
    for j in tl.range(near, used, num_stages=1):
        stop = M
        if FULL:
            key0 = j * KEYS
        else:
            key0 = tl.load(tiles + j // INNER) + (j % INNER) * KEYS
            if j // INNER + 1 < n:
                stop = tl.minimum(tl.load(tiles + j // INNER + 1), M)
        key = key0 + tl.arange(0, KEYS)
        some = key < tl.minimum(stop, hi + 1)
        # Keys that no row sees may hold anything, NaN included.
        kt = tl.where(some[:, None], _block(k, b, kv_head, key0, KEYS, D_PAD), 0.0)
        vt = tl.where(some[:, None], _block(v, b, kv_head, key0, KEYS, DV_PAD), 0.0)
        seen = some[None, :]
        if CAUSAL:
            seen = seen & (key[None, :] <= pos[:, None])
        p = tl.where(seen, tl.exp2(_dot(qt, kt.T, None, FP32) * scale2 - s2[:, None]), 0.0)
        dp = _dot(do, vt.T, None, FP32)
        acc = _dot(p * (dp - t[:, None]), kt, acc, FP32)
    d = tl.arange(0, D_PAD)
    acc = acc * scale
    tl.store(dq + at[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty), mask=live[:, None] & (d[None, :] < D))


@triton.jit
def _reach(row, n, key0, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """(stop, start): of a block at key0 a list row names the keys below stop and those from start on."""
    last = -BIG
    after = BIG + 0
    for c in range(0, n, CHUNK):
        i = c + tl.arange(0, CHUNK)
        x = tl.load(row + i, mask=i < n, other=BIG)
        last = tl.maximum(last, tl.max(tl.where(x <= key0, x, -BIG)))
        after = tl.minimum(after, tl.min(tl.where(x > key0, x, BIG)))
    return last + WIDTH, after


@triton.jit
def _place(word, j, BLOCK: tl.constexpr, ROWS: tl.constexpr, SHARE: tl.constexpr):
    """(query head within the group, first row on the padded grid) of step j, whose entry of the inverse lists is `word`."""
    parts: tl.constexpr = BLOCK // ROWS
    head = (word >> BITS) * SHARE + (j % (parts * SHARE)) // parts
    return head, (word & MASK) * BLOCK + (j % parts) * ROWS


@triton.jit
def dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv, part, tiles, count, ids, offset, counts, cuts, items, plan,
    scale, H, G, HL, N, M, NB, NK, max_items, q_offset, sb, st, sq, cb, ch, cq,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, SHARE: tl.constexpr,
    LISTS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FULL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dk and dv of KEYS keys of one kv head, or of one item of them as fp32 in `part` `[items, KEYS, D_PAD + DV_PAD]`.

    Products are transposed (keys are rows), so that probabilities stay in registers for the second product.
    grid: (max_items + B * G * NK,): items first, then head by head (see `dq_kernel`) from the first key block on.
    """
    INNER: tl.constexpr = BLOCK // ROWS * SHARE
    pid = tl.program_id(0)
    cut = pid < max_items
    made = tl.load(plan + 1)
    key = tl.where(cut, tl.load(items + pid, mask=pid < made, other=0), tl.maximum(pid - max_items, 0))
    if tl.where(cut, pid >= made, tl.load(cuts + key * 2 + 1) > 0):
        return
    begin = 0
    free = tl.load(counts + key * 3)
    whole = tl.load(counts + key * 3 + 1)
    end = tl.load(counts + key * 3 + 2)
    if cut:
        size = tl.load(plan)
        begin = (pid - tl.load(cuts + key * 2)) * size
        end = tl.minimum(end, begin + size)
    free = tl.minimum(tl.maximum(free, begin), end)
    whole = tl.minimum(tl.maximum(whole, begin), end)
    ids += tl.load(offset + key)
    lead = key // NK
    key0 = (key % NK) * KEYS
    b = lead // G
    kv_head = lead % G
    head0 = kv_head * (LISTS * SHARE)
    padded = NB * BLOCK
    stats = (b * H + head0).to(tl.int64) * padded
    lse2 += stats
    delta += stats

    kt = _block(k, b, kv_head, key0, KEYS, D_PAD)
    vt = _block(v, b, kv_head, key0, KEYS, DV_PAD)
    scale2 = scale * LOG2E
    acc_k = tl.zeros([KEYS, D_PAD], tl.float32)
    acc_v = tl.zeros([KEYS, DV_PAD], tl.float32)
    i = tl.arange(0, ROWS)
    ahead = tl.load(ids + begin)  # of the step to come, so that no copy waits for its address
    for j in tl.range(begin * INNER, free * INNER, num_stages=STAGES):
        word = ahead
        ahead = tl.load(ids + (j + 1) // INNER)
        head, grid_row = _place(word, j, BLOCK, ROWS, SHARE)
        qt = _block(q, b, head0 + head, grid_row - q_offset, ROWS, D_PAD)
        do = _block(dout, b, head0 + head, grid_row - q_offset, ROWS, DV_PAD)
        at = head.to(tl.int64) * padded + grid_row + i
        s2 = tl.load(lse2 + at)
        t = tl.load(delta + at)
        s = _dot(kt, qt.T, None, FP32)
        dp = _dot(vt, do.T, None, FP32)
        p = tl.exp2(s * scale2 - s2[None, :])
        acc_v = _dot(p, do, acc_v, FP32)
        acc_k = _dot(p * (dp - t[None, :]), qt, acc_k, FP32)
    where = key0 + tl.arange(0, KEYS)
    if CAUSAL:
        ahead = tl.load(ids + free)
        for j in tl.range(free * INNER, whole * INNER, num_stages=2):
            word = ahead
            ahead = tl.load(ids + (j + 1) // INNER)
            head, grid_row = _place(word, j, BLOCK, ROWS, SHARE)
            qt = _block(q, b, head0 + head, grid_row - q_offset, ROWS, D_PAD)
            do = _block(dout, b, head0 + head, grid_row - q_offset, ROWS, DV_PAD)
            at = head.to(tl.int64) * padded + grid_row + i
            s2 = tl.load(lse2 + at)
            t = tl.load(delta + at)
            s = _dot(kt, qt.T, None, FP32)
            dp = _dot(vt, do.T, None, FP32)
            # The derivative is cut as well: a key that no row sees may hold NaN.
            seen = where[:, None] <= (M - N - q_offset + grid_row + i)[None, :]
            p = tl.where(seen, tl.exp2(s * scale2 - s2[None, :]), 0.0)
            acc_v = _dot(p, do, acc_v, FP32)
            acc_k = _dot(tl.where(seen, p * (dp - t[None, :]), 0.0), qt, acc_k, FP32)
    for j in tl.range(whole * INNER, end * INNER, num_stages=1):
        word = tl.load(ids + j // INNER)
        head, grid_row = _place(word, j, BLOCK, ROWS, SHARE)
        qt = _block(q, b, head0 + head, grid_row - q_offset, ROWS, D_PAD)
        do = _block(dout, b, head0 + head, grid_row - q_offset, ROWS, DV_PAD)
        at = head.to(tl.int64) * padded + grid_row + i
        s2 = tl.load(lse2 + at)
        t = tl.load(delta + at)
        seen = (where < M)[:, None]
        if not FULL:
            list_head = (head0 + head) * HL // H
            block = word & MASK
            line = tiles + b.to(tl.int64) * sb + list_head.to(tl.int64) * st + block.to(tl.int64) * sq
            n = tl.load(count + b.to(tl.int64) * cb + list_head * ch + block * cq)
            stop, start = _reach(line, n, key0, WIDTH, CHUNK)
            seen = seen & ((where < stop) | (where >= start))[:, None]
        if CAUSAL:
            seen = seen & (where[:, None] <= (M - N - q_offset + grid_row + i)[None, :])
        p = tl.where(seen, tl.exp2(_dot(kt, qt.T, None, FP32) * scale2 - s2[None, :]), 0.0)
        ds = tl.where(seen, p * (_dot(vt, do.T, None, FP32) - t[None, :]), 0.0)
        acc_v = _dot(p, do, acc_v, FP32)
        acc_k = _dot(ds, qt, acc_k, FP32)
    acc_k = acc_k * scale
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    r = tl.arange(0, KEYS)
    if cut:
        at = (pid.to(tl.int64) * KEYS + r)[:, None] * (D_PAD + DV_PAD)
        tl.store(part + at + d[None, :], acc_k)
        tl.store(part + at + D_PAD + e[None, :], acc_v)
    else:
        at = (lead.to(tl.int64) * M + key0 + r)[:, None]
        ok = (key0 + r < M)[:, None]
        tl.store(dk + at * D + d[None, :], acc_k.to(dk.dtype.element_ty), mask=ok & (d[None, :] < D))
        tl.store(dv + at * DV + e[None, :], acc_v.to(dv.dtype.element_ty), mask=ok & (e[None, :] < DV))


@triton.jit
def join_kernel(
    part, cuts, items, plan, dk, dv, NK, M, ROWS: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Adds the items of a cut key block in order. grid: (max_items, KEYS // ROWS); one item of a block does it."""
    pid = tl.program_id(0)
    made = pid < tl.load(plan + 1)
    key = tl.load(items + pid, mask=made, other=0)
    if (made & (tl.load(cuts + key * 2) == pid)) == 0:
        return
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    acc_k = tl.zeros([ROWS, D_PAD], tl.float32)
    acc_v = tl.zeros([ROWS, DV_PAD], tl.float32)
    for x in range(0, tl.load(cuts + key * 2 + 1)):
        at = ((pid + x).to(tl.int64) * KEYS + r)[:, None] * (D_PAD + DV_PAD)
        acc_k += tl.load(part + at + d[None, :])
        acc_v += tl.load(part + at + D_PAD + e[None, :])
    at = ((key // NK).to(tl.int64) * M + (key % NK) * KEYS + r)[:, None]
    ok = ((key % NK) * KEYS + r < M)[:, None]
    tl.store(dk + at * D + d[None, :], acc_k.to(dk.dtype.element_ty), mask=ok & (d[None, :] < D))
    tl.store(dv + at * DV + e[None, :], acc_v.to(dv.dtype.element_ty), mask=ok & (e[None, :] < DV))
