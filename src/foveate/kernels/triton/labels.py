"""Labels of keys in a decode step: the newest key's is written, and every key scored by the label beside it.

A label is read once per kv head, the query heads of a group share it. Lengths are read on the device, so that a step can
be captured in a CUDA graph. The newest entry is chosen whatever its score, so a launch may write its label and score the
others at once.

What is computed is `scores/labels.py`: `score_channels` is `Channels.score` (Yang et al. 2024, arXiv 2408.07092),
`code_rows` and `near_codes` are `Codes.distance` (Yan et al. 2025, arXiv 2510.18413). `labels_launch.py` calls them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import _offsets

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again it rounds to the nearest even integer


@triton.jit
def _spot(k, table, row, groups, at, k_s0, k_sg, k_sm, table_width, PAGE: tl.constexpr):
    """Address of the key of entry `at` of a row and kv head."""
    if PAGE > 0:
        offset, _ = _offsets(at, table + row * table_width, k_s0, k_sm, k_s0, k_sm, PAGE)
        return k + offset
    b = (row // groups).to(tl.int64)
    return k + b * k_s0 + (row % groups).to(tl.int64) * k_sg + at.to(tl.int64) * k_sm


@triton.jit
def _level(x, low, step, TOP: tl.constexpr):
    """Levels 0 .. TOP of numbers in fp32, as `labels.quantise` rounds them."""
    y = (tl.div_rn(x - low, step) + ROUND) - ROUND
    y = tl.where(y == y, y, 0.0)  # infinite numbers have no level
    return tl.minimum(tl.maximum(y, 0.0), TOP)


@triton.jit
def _step(low, high, TOP: tl.constexpr):
    return tl.div_rn(high - low, tl.full(high.shape, TOP, tl.float32))


@triton.jit
def _label(
    key, channels, labels, scales, at, w,
    R: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, WORDS_PAD: tl.constexpr,
):  # fmt: skip
    """Make the label of one key and store it as that of entry `at`."""
    if BITS == 16:
        c = tl.load(channels + w, mask=w < R, other=0)
        tl.store(labels + at * WORDS + w, tl.load(key + c, mask=w < R, other=0.0), mask=w < R)
    else:
        low = tl.full([1], float("inf"), tl.float32)
        high = tl.full([1], float("-inf"), tl.float32)
        for j in tl.static_range(PER):
            ok = w * PER + j < R
            c = tl.load(channels + w * PER + j, mask=ok, other=0)
            x = tl.load(key + c, mask=ok, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.min(tl.where(ok, x, float("inf")), 0))
            high = tl.maximum(high, tl.max(tl.where(ok, x, float("-inf")), 0))
        kind = scales.dtype.element_ty
        step = _step(low, high, TOP).to(kind).to(tl.float32)  # minimum and step count as they are stored
        low = low.to(kind).to(tl.float32)
        step = tl.where(step > 0, step, 1.0)
        word = tl.zeros([WORDS_PAD], tl.int32)
        for j in tl.static_range(PER):
            ok = w * PER + j < R
            c = tl.load(channels + w * PER + j, mask=ok, other=0)
            x = tl.load(key + c, mask=ok, other=0.0).to(tl.float32)
            level = _level(x, low, tl.broadcast_to(step, x.shape), TOP)
            word |= tl.where(ok, level, 0.0).to(tl.int32) << (j * BITS)
        tl.store(labels + at * WORDS + w, word.to(tl.uint8), mask=w < WORDS)
        one = tl.arange(0, 2)
        tl.store(scales + at * 2 + one, tl.where(one == 0, low, step).to(kind))


@triton.jit(do_not_specialize=["m", "steps"])
def score_channels(
    q, k, table, channels, labels, scales, length, out, m, steps,
    groups, q_sb, q_sh, k_s0, k_sg, k_sm, table_width, channels_sb, rows,
    PAGE: tl.constexpr,  # keys of a storage page, 0 for dense storage
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,  # query heads of a kv head; at least one more column than heads
    R: tl.constexpr, BITS: tl.constexpr,  # channels of a label, bits of a channel; 16: as they are
    WORDS: tl.constexpr, WORDS_PAD: tl.constexpr,  # numbers of a stored label
    KEYS: tl.constexpr, REDUCE: tl.constexpr, APPEND: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """q . k on the channels of labels. grid: (ceil(m / (KEYS * steps)), B * G).

    q `[B, H, 1, D]`; channels int64 `[B or 1, G, R]`; labels `[B, G, rows, WORDS]` with scales `[B, G, rows, 2]` (minimum
    and step; None at 16 bits). out fp32 `[B, G, GROUP, m]`, or `[B, G, m]` with the highest of the group if REDUCE; what
    lies beyond a row's length keeps what was there. APPEND: the newest entry's label is made from its key first.

    Levels a, b stand for low + step * level: q . k = low_k sum(q) + step_k (low_q sum(b) + step_q sum(a b)), where sums of
    integers are exact. A column of ones beside the queries gives sum(b).
    """
    row = tl.program_id(1)
    b = (row // groups).to(tl.int64)
    g = (row % groups).to(tl.int64)
    TOP: tl.constexpr = (1 << BITS) - 1 if BITS < 16 else 1
    PER: tl.constexpr = 8 // BITS if BITS < 16 else 1
    n = m
    if length is not None:
        n = tl.minimum(tl.load(length + row).to(tl.int32), m)
    w = tl.arange(0, WORDS_PAD)
    h = tl.arange(0, GROUP_PAD)
    i = tl.arange(0, KEYS)
    channels += b * channels_sb + g * R
    labels += row.to(tl.int64) * rows * WORDS
    query = q + b * q_sb + (g * GROUP + h) * q_sh
    if BITS < 16:
        scales += row.to(tl.int64) * rows * 2
    if APPEND:  # noqa: SIM102 (known when compiled, unlike the next)
        if (tl.program_id(0) == 0) & (n > 0):
            key = _spot(k, table, row, groups, n - 1, k_s0, k_sg, k_sm, table_width, PAGE)
            _label(key, channels, labels, scales, (n - 1).to(tl.int64), w, R, BITS, TOP, PER, WORDS, WORDS_PAD)
    heads = (h < GROUP)[None, :]
    if BITS < 16:
        low_q = tl.full([GROUP_PAD], float("inf"), tl.float32)
        high_q = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        for j in tl.static_range(PER):
            ok = w * PER + j < R
            c = tl.load(channels + w * PER + j, mask=ok, other=0)
            x = tl.load(query[None, :] + c[:, None], mask=ok[:, None] & heads, other=0.0).to(tl.float32)
            low_q = tl.minimum(low_q, tl.min(tl.where(ok[:, None], x, float("inf")), 0))
            high_q = tl.maximum(high_q, tl.max(tl.where(ok[:, None], x, float("-inf")), 0))
        step_q = _step(low_q, high_q, TOP)
        step_q = tl.where(step_q > 0, step_q, 1.0)
        sum_a = tl.zeros([GROUP_PAD], tl.float32)
        for j in tl.static_range(PER):
            a = _query(query, channels, low_q, step_q, w, h, j, R, PER, TOP, GROUP, GROUP_PAD, WORDS_PAD)
            sum_a += tl.sum(a.to(tl.float32), 0)
        sum_q = R * low_q + step_q * sum_a
        a0 = _query(query, channels, low_q, step_q, w, h, 0, R, PER, TOP, GROUP, GROUP_PAD, WORDS_PAD)
        if PER > 1:
            a1 = _query(query, channels, low_q, step_q, w, h, 1, R, PER, TOP, GROUP, GROUP_PAD, WORDS_PAD)
        if PER > 2:
            a2 = _query(query, channels, low_q, step_q, w, h, 2, R, PER, TOP, GROUP, GROUP_PAD, WORDS_PAD)
            a3 = _query(query, channels, low_q, step_q, w, h, 3, R, PER, TOP, GROUP, GROUP_PAD, WORDS_PAD)
    else:
        c = tl.load(channels + w, mask=w < R, other=0)
        qt = tl.load(query[None, :] + c[:, None], mask=(w < R)[:, None] & heads, other=0.0)
    first = tl.program_id(0) * KEYS * steps
    for p in tl.range(first, tl.minimum(first + KEYS * steps, n), KEYS):
        entry = p + i
        live = entry < n
        spot = entry.to(tl.int64)
        label = tl.load(labels + spot[:, None] * WORDS + w[None, :], mask=live[:, None] & (w < WORDS)[None, :], other=0)
        if BITS < 16:
            s = tl.dot(_half(label, 0, BITS, TOP), a0)
            if PER > 1:
                s = tl.dot(_half(label, 1, BITS, TOP), a1, s)
            if PER > 2:
                s = tl.dot(_half(label, 2, BITS, TOP), a2, s)
                s = tl.dot(_half(label, 3, BITS, TOP), a3, s)
            if BITS < 8:
                s -= 1024.0 * sum_a[None, :]
            sum_b = tl.sum(tl.where((h == GROUP)[None, :], s, 0.0), 1)
            low_k = tl.load(scales + spot * 2, mask=live, other=0.0).to(tl.float32)
            step_k = tl.load(scales + spot * 2 + 1, mask=live, other=0.0).to(tl.float32)
            s = low_k[:, None] * sum_q[None, :] + step_k[:, None] * (low_q[None, :] * sum_b[:, None] + step_q[None, :] * s)
        elif FP32:
            s = tl.dot(label, qt, input_precision="ieee")
        else:
            s = tl.dot(label, qt)
        if REDUCE:
            s = tl.max(tl.where(heads, s, float("-inf")), 1)
            tl.store(out + row.to(tl.int64) * m + entry, s, mask=live)
        else:
            to = (row.to(tl.int64) * GROUP + h[None, :]) * m + entry[:, None]
            tl.store(out + to, s, mask=live[:, None] & heads)


@triton.jit
def _query(
    query, channels, low, step, w, h, j, R: tl.constexpr, PER: tl.constexpr, TOP: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, WORDS_PAD: tl.constexpr,
):  # fmt: skip
    """fp16 `[WORDS_PAD, GROUP_PAD]`: levels of the queries on every PER-th channel from j on, ones beside the last head."""
    ok = w * PER + j < R
    c = tl.load(channels + w * PER + j, mask=ok, other=0)
    x = tl.load(query[None, :] + c[:, None], mask=ok[:, None] & (h < GROUP)[None, :], other=0.0).to(tl.float32)
    level = _level(x, low[None, :], tl.broadcast_to(step[None, :], x.shape), TOP)
    level = tl.where((h == GROUP)[None, :], 1.0, level)
    return tl.where(ok[:, None], level, 0.0).to(tl.float16)


@triton.jit
def _half(label, j: tl.constexpr, BITS: tl.constexpr, TOP: tl.constexpr):
    """fp16 levels at place j of each byte; below 8 bits 1024 more, for a level is then the lowest bits of a number."""
    level = (label >> (j * BITS)) & TOP
    if BITS < 8:  # a conversion would take longer than the product
        return (level.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    return level.to(tl.float16)


# ---------------------------------------------------------------------- two-bit codes
@triton.jit
def _ones(x):
    """Bits that are set in each int32; compilers know this form as one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _bits(bit, ROWS: tl.constexpr, D: tl.constexpr):
    """int32 `[ROWS, D / 32]` of bits `[ROWS, D]`, lowest first."""
    place = tl.arange(0, 32)
    return tl.sum(tl.reshape(bit.to(tl.int32), [ROWS, D // 32, 32]) << place[None, None, :], 2)


@triton.jit(do_not_specialize=["m"])
def code_rows(
    q, k, table, data, edges, length, mine, theta, m,
    groups, q_sb, q_sh, k_s0, k_sg, k_sm, table_width, edges_sb, rows,
    PAGE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    APPEND: tl.constexpr, SPREAD: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Codes of the queries of a kv head, and (APPEND) of the newest key, which go into the cache's. grid: (B * G,).

    data int32 `[B, G, rows, 2 * D / 32]`, high bits before low ones; mine likewise `[B, H, 2 * D / 32]`. theta: the outer
    threshold, or with SPREAD that of a query is theta times its standard deviation and that of a key edges fp32
    `[B or 1, G]`. The Hadamard matrix is made of signs here and the root of D divided out afterwards.
    """
    row = tl.program_id(0)
    b = (row // groups).to(tl.int64)
    g = (row % groups).to(tl.int64)
    n = m
    if length is not None:
        n = tl.minimum(tl.load(length + row).to(tl.int32), m)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D)
    x = tl.load(q + b * q_sb + (g * GROUP + r[:, None]) * q_sh + d[None, :], mask=(r < GROUP)[:, None], other=0.0)
    if APPEND:
        key = _spot(k, table, row, groups, tl.maximum(n - 1, 0), k_s0, k_sg, k_sm, table_width, PAGE)
        x = tl.where((r == GROUP)[:, None], tl.load(key + d)[None, :], x)
    common = d[:, None] & d[None, :]
    sign = tl.where((_ones(common) & 1) == 1, -1.0, 1.0).to(x.dtype)
    if FP32:
        turned = tl.dot(x, sign, input_precision="ieee")
    else:
        turned = tl.dot(x, sign)
    turned = turned * (1.0 / tl.sqrt(tl.full([1, 1], D, tl.float32)))
    edge = tl.zeros([ROWS], tl.float32) + theta
    if SPREAD:
        mean = tl.sum(turned, 1) / D
        apart = turned - mean[:, None]
        edge = tl.where(r == GROUP, tl.load(edges + b * edges_sb + g), tl.sqrt(tl.sum(apart * apart, 1) / D) * theta)
    high = turned > 0
    low = (turned > edge[:, None]) | ((turned > -edge[:, None]) & (turned <= 0))
    WORDS: tl.constexpr = D // 32
    w = tl.arange(0, WORDS)
    high = _bits(high, ROWS, D)
    low = _bits(low, ROWS, D)
    to = mine + ((row * GROUP + r) * (2 * WORDS))[:, None] + w[None, :]
    tl.store(to, high, mask=(r < GROUP)[:, None])
    tl.store(to + WORDS, low, mask=(r < GROUP)[:, None])
    if APPEND:
        new = (r == tl.where(n > 0, GROUP, -1))[:, None]
        to = (
            data
            + (row.to(tl.int64) * rows + tl.maximum(n - 1, 0)) * (2 * WORDS)
            + w[None, :]
            + tl.zeros([ROWS, 1], tl.int32)
        )
        tl.store(to, high, mask=new)
        tl.store(to + WORDS, low, mask=new)


@triton.jit(do_not_specialize=["m", "steps"])
def near_codes(
    mine, data, length, out, m, steps, rows,
    GROUP: tl.constexpr, WORDS: tl.constexpr, KEYS: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """Minus the sum over channels of |code of q - code of k|. grid: (ceil(m / (KEYS * steps)), B * G).

    mine int32 `[B, H, 2 * WORDS]`, data `[B, G, rows, 2 * WORDS]` as `code_rows` writes them. out int16 `[B, G, GROUP, m]`,
    or `[B, G, m]` with the nearest of the group if REDUCE. A difference from 0 to 3 is two bits: odd if the low bits differ,
    2 or more if the high ones do, unless the codes are 1 and 2.
    """
    row = tl.program_id(1)
    n = m
    if length is not None:
        n = tl.minimum(tl.load(length + row).to(tl.int32), m)
    w = tl.arange(0, WORDS)
    i = tl.arange(0, KEYS)
    mine += row.to(tl.int64) * GROUP * (2 * WORDS)
    data += row.to(tl.int64) * rows * (2 * WORDS)
    out += row.to(tl.int64) * m * (1 if REDUCE else GROUP)
    first = tl.program_id(0) * KEYS * steps
    for p in tl.range(first, tl.minimum(first + KEYS * steps, n), KEYS):
        key = p + i
        ok = key < n
        at = data + key.to(tl.int64)[:, None] * (2 * WORDS) + w[None, :]
        high = tl.load(at, mask=ok[:, None], other=0)
        low = tl.load(at + WORDS, mask=ok[:, None], other=0)
        middle = high ^ low  # codes 1 and 2, which differ in both bits and are 1 apart
        least = tl.full([KEYS], 32767, tl.int32)  # the highest of negated sums makes ptxas forget the sign (4 and 16 heads)
        for e in tl.static_range(GROUP):
            high_q = tl.load(mine + e * 2 * WORDS + w)[None, :]
            low_q = tl.load(mine + e * 2 * WORDS + WORDS + w)[None, :]
            odd = low ^ low_q
            far = (high ^ high_q) & ~(odd & middle)
            apart = tl.sum(_ones(odd), 1) + 2 * tl.sum(_ones(far), 1)
            if REDUCE:
                least = tl.minimum(least, apart)
            else:
                tl.store(out + e * m + key, (0 - apart).to(tl.int16), mask=ok)
        if REDUCE:
            tl.store(out + key, (0 - least).to(tl.int16), mask=ok)
