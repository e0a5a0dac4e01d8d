"""The kernels of attention over per-token lists: partial results by key block and by tile of tokens, and their sum.

Partial results of one token lie together, `[leads, tokens, slots + 1, heads]`, their lse in units of log 2: whoever computes
one writes the rows of all query heads of the list at once, whoever adds them reads one run of memory. The last slot is that
of the blocks which neighbouring tokens share. Which slots of a token are written, its lists say (`TokenLists.present`); the
others hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import BIG, FLOOR, LN2, _product
from .tokens_bits import BITS, MASK


@triton.jit
def _times(p, v, FP32: tl.constexpr):
    if FP32:
        return tl.dot(p, v, input_precision="tf32x3")
    return tl.dot(p.to(v.dtype), v)


@triton.jit
def _ends(ids, n, LONGEST: tl.constexpr):
    """The first and the last token of n ascending ids. It asks for all of them: the steps then find them in L1."""
    i = tl.arange(0, LONGEST)
    word = tl.load(ids + i, mask=i < n, other=0)
    return tl.min(tl.where(i < n, word, BIG), 0) >> BITS, tl.max(word, 0) >> BITS


@triton.jit
def _steps(
    q, kt, vt, part, part_lse, ids, n, key, live, pos, scale, SHARE, SLOTS, q_sh, q_sn,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CUT: tl.constexpr, CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial results of n entries over one key block, all of whose keys every one sees unless CUT."""
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    r = tl.arange(0, ROWS)
    head = r % HEADS
    for c in tl.range(0, n, ROWS // HEADS, num_stages=STAGES):
        entry = c + r // HEADS
        ok = (entry < n) & (head < SHARE)
        word = tl.load(ids + entry, mask=ok, other=0)
        token = word >> BITS
        at = head * q_sh + token * q_sn  # 32 bits hold what a chunk spans
        qt = tl.load(q + at[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        s = _product(qt, kt, FP32)
        if CUT:
            seen = live[None, :]
            if CAUSAL:
                seen = seen & (key[None, :] <= (pos + token)[:, None])
            s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(tl.max(s, 1) * scale, FLOOR)
        p = tl.exp2(s * scale - top[:, None])
        total = tl.sum(p, 1)
        o = _times(p, vt, FP32) * (1.0 / total)[:, None]
        at = (token * SLOTS + (word & MASK)) * SHARE + head
        tl.store(part_lse + at, top + tl.log2(total), mask=ok)
        tl.store(part + at[:, None] * DV + e[None, :], o.to(part.dtype.element_ty), mask=ok[:, None] & (e < DV)[None, :])


@triton.jit(do_not_specialize=["number", "max_items", "first", "NK"])
def partial_kernel(
    q, k, v, part, part_lse, ids, items, plan,
    scale, LISTS, SHARE, G, number, max_items, first, size, NK, N, M, SLOTS,
    q_sb, q_sh, q_sn, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, LONGEST: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One item of chunk `number`: the tokens that name one key block, whose keys stay in place. grid: (max_items,).

    part `[leads, size, SLOTS, SHARE, DV]` gets normalised outputs, part_lse `[leads, size, SLOTS, SHARE]` their lse. A
    step is ROWS / HEADS tokens times HEADS (SHARE rounded up) query heads. LISTS: lists of a batch row.
    """
    pid = tl.program_id(0)
    items += (number * max_items + pid) * 3
    row = tl.load(items)  # together with `plan`, not behind it
    begin = tl.load(items + 1)
    end = tl.load(items + 2)
    if pid >= tl.load(plan + number):
        return
    lead = row // NK
    key0 = (row % NK) * WIDTH
    b = (lead // LISTS).to(tl.int64)
    head0 = (lead % LISTS) * SHARE
    g = ((lead % LISTS) * G // LISTS).to(tl.int64)
    key = key0 + tl.arange(0, WIDTH)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    ids += begin
    n = end - begin
    pos = M - N + first
    low, high = _ends(ids, n, LONGEST)
    live = key < M
    whole = key0 + WIDTH <= M
    if CAUSAL:  # the last entry sees most, the first one least; what no row sees may hold anything, NaN included
        live = live & (key <= pos + high)
        whole = whole & (key0 + WIDTH - 1 <= pos + low)
    kt = tl.load(
        k + b * k_sb + g * k_sg + key.to(tl.int64)[:, None] * k_sm + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    vt = tl.load(
        v + b * v_sb + g * v_sg + key.to(tl.int64)[:, None] * v_sm + e[None, :],
        mask=live[:, None] & (e < DV)[None, :],
        other=0.0,
    )
    q += b * q_sb + head0.to(tl.int64) * q_sh + first.to(tl.int64) * q_sn
    part += lead.to(tl.int64) * size * SLOTS * SHARE * DV
    part_lse += lead.to(tl.int64) * size * SLOTS * SHARE
    if whole:
        _steps(q, kt, vt, part, part_lse, ids, n, key, live, pos, scale, SHARE, SLOTS, q_sh, q_sn, ROWS, HEADS, D, D_PAD, DV,
               DV_PAD, False, False, FP32, STAGES)  # fmt: skip
    else:
        _steps(q, kt, vt, part, part_lse, ids, n, key, live, pos, scale, SHARE, SLOTS, q_sh, q_sn, ROWS, HEADS, D, D_PAD, DV,
               DV_PAD, True, CAUSAL, FP32, STAGES)  # fmt: skip


@triton.jit
def _fold(s, v, m, l, acc, scale, FP32: tl.constexpr):
    top = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - top[:, None])
    shrink = tl.exp2(m - top)
    return top, l * shrink + tl.sum(p, 1), acc * shrink[:, None] + _times(p, v, FP32)


@triton.jit(do_not_specialize=["tile0", "tiles_all", "first", "rows", "width"])
def walk_kernel(
    q, k, v, part, part_lse, tiles, count, shared, shared_count,
    scale, LISTS, SHARE, G, H, HL, tile0, tiles_all, first, rows, size, N, M, SLOTS, width,
    q_sb, q_sh, q_sn, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm, sb, st, sq, cb, ch, cq,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, T_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS / HEADS tokens over the blocks they share, into their last slot. grid: (tiles of a chunk, leads).

    tile0: the first tile of this chunk among the `tiles_all` of its lists. A tile that shares nothing writes nothing.
    """
    STEP: tl.constexpr = ROWS // HEADS
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
    g = ((lead % LISTS) * G // LISTS).to(tl.int64)
    list_head = (head0 * HL // H).to(tl.int64)
    r = tl.arange(0, ROWS)
    head = r % HEADS
    inner = tile * STEP + r // HEADS  # token of the chunk
    row = first + inner
    live = (inner < rows) & (head < SHARE)
    d = tl.arange(0, D_PAD)
    e = tl.arange(0, DV_PAD)
    i = tl.arange(0, T_PAD)[None, :]
    n = tl.load(count + b * cb + list_head * ch + row * cq, mask=live, other=0)
    start = tl.load(
        tiles + b * sb + list_head * st + row.to(tl.int64)[:, None] * sq + i,
        mask=live[:, None] & (i < n[:, None]),
        other=BIG,
    )
    qt = tl.load(
        q + b * q_sb + (head0 + head).to(tl.int64)[:, None] * q_sh + row.to(tl.int64)[:, None] * q_sn + d[None, :],
        mask=live[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    k += b * k_sb + g * k_sg
    v += b * v_sb + g * v_sg
    m = tl.full([ROWS], FLOOR, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    for j in tl.range(0, front, num_stages=STAGES):  # whole blocks, which a row sees in full or not at all
        key0 = tl.load(shared + j) * WIDTH
        key = key0 + tl.arange(0, WIDTH)
        far = key.to(tl.int64)[:, None]
        kt = tl.load(k + far * k_sm + d[None, :], mask=(key < M)[:, None] & (d < D)[None, :], other=0.0)
        vt = tl.load(v + far * v_sm + e[None, :], mask=(key < M)[:, None] & (e < DV)[None, :], other=0.0)
        hit = tl.max((start == key0).to(tl.int32), 1)
        seen = (hit > 0)[:, None] & (key < M)[None, :]
        m, l, acc = _fold(tl.where(seen, _product(qt, kt, FP32), float("-inf")), vt, m, l, acc, scale, FP32)
    for j in tl.range(0, back, num_stages=1):
        key0 = tl.load(shared + width - 1 - j) * WIDTH
        key = key0 + tl.arange(0, WIDTH)
        # Of this block a row names the keys below `stop` and those from `after` on.
        stop = tl.max(tl.where(start <= key0, start, -BIG), 1) + WIDTH
        after = tl.min(tl.where(start > key0, start, BIG), 1)
        seen = (key[None, :] < stop[:, None]) | (key[None, :] >= after[:, None])
        seen = seen & (key < M)[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= (M - N + row)[:, None])
        some = tl.max(seen.to(tl.int32), 0) > 0  # keys that no row sees may hold anything, NaN included
        far = key.to(tl.int64)[:, None]
        kt = tl.load(k + far * k_sm + d[None, :], mask=some[:, None] & (d < D)[None, :], other=0.0)
        vt = tl.load(v + far * v_sm + e[None, :], mask=some[:, None] & (e < DV)[None, :], other=0.0)
        m, l, acc = _fold(tl.where(seen, _product(qt, kt, FP32), float("-inf")), vt, m, l, acc, scale, FP32)
    some = l > 0
    l = tl.where(some, l, 1.0)
    at = ((lead.to(tl.int64) * size + inner) * SLOTS + SLOTS - 1) * SHARE + head
    acc = acc * (1.0 / l)[:, None]
    tl.store(part + at[:, None] * DV + e[None, :], acc.to(part.dtype.element_ty), mask=live[:, None] & (e < DV)[None, :])
    tl.store(part_lse + at, tl.where(some, m + tl.log2(l), float("-inf")), mask=live)


@triton.jit(do_not_specialize=["start", "tokens", "first", "rows"])
def merge_kernel(
    part, part_lse, present, out, lse, LISTS, SHARE, H, start, tokens, first, rows, size, N, SLOTS,
    ROWS: tl.constexpr, HEADS: tl.constexpr, SLOTS_PAD: tl.constexpr, SLOT_WORDS: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, LSE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Adds the partial results of ROWS / HEADS tokens. grid: (tokens / (ROWS / HEADS), leads).

    With SUM as they are, without part_lse; else as parts of one softmax, whose weights take the place of part_lse: loaded
    again row by row they need no exchange between threads, and the loop no barrier. start: the first token of this chunk
    among the `tokens` of its lists, whose `present` names the slots that are written. out `[B, H, N, DV]`, lse `[B, H, N]`.
    """
    lead = tl.program_id(1)
    r = tl.arange(0, ROWS)
    head = r % HEADS
    inner = tl.program_id(0) * (ROWS // HEADS) + r // HEADS
    live = (inner < rows) & (head < SHARE)
    e = tl.arange(0, DV_PAD)
    spot = (lead.to(tl.int64) * size + inner) * SLOTS * SHARE + head
    present += (lead.to(tl.int64) * tokens + start + inner) * SLOT_WORDS
    top = tl.full([ROWS], FLOOR, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    if not SUM:
        i = tl.arange(0, SLOTS_PAD)[None, :]
        ok = live[:, None] & (i < SLOTS)
        bits = tl.load(present[:, None] + i // 32, mask=ok, other=0)
        x = tl.load(part_lse + spot[:, None] + i * SHARE, mask=((bits >> (i % 32)) & 1) > 0, other=float("-inf"))
        top = tl.maximum(tl.max(x, 1), FLOOR)
        x = tl.exp2(x - top[:, None])
        l = tl.sum(x, 1)
        tl.store(part_lse + spot[:, None] + i * SHARE, x, mask=ok)
        tl.debug_barrier()
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    slots = tl.where(live, SLOTS, 0)
    for c in range(0, SLOTS, 2):
        for t in tl.static_range(2):  # two slots, so that more loads are under way
            at = spot + (c + t) * SHARE
            if SUM:
                bits = tl.load(present + (c + t) // 32, mask=slots > c + t, other=0)
                there = ((bits >> ((c + t) % 32)) & 1) > 0
            else:
                w = tl.load(part_lse + at, mask=slots > c + t, other=0.0)
                there = w > 0
            to = part + at[:, None] * DV + e[None, :]
            y = tl.load(to, mask=there[:, None] & (e < DV)[None, :], other=0.0, eviction_policy="evict_first")
            if SUM:
                acc += y.to(tl.float32)
            else:
                acc += y.to(tl.float32) * w[:, None]
    some = l > 0
    l = tl.where(some, l, 1.0)
    at = ((lead // LISTS).to(tl.int64) * H + (lead % LISTS) * SHARE + head) * N + first + inner
    if not SUM:
        acc = acc * (1.0 / l)[:, None]
    tl.store(out + at[:, None] * DV + e[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (e < DV)[None, :])
    if LSE:
        tl.store(lse + at, tl.where(some, (top + tl.log2(l)) * LN2, float("-inf")), mask=live)
