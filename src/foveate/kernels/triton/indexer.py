"""A lightning indexer: in a decode step its queries and the newest key are made, and all tokens scored by their codes.

DeepSeek-AI 2025, "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention". What is computed is
`scores/indexer.py` with fp8; `indexer_launch.py` calls this. Three launches: `project` multiplies weights by queries and the
newest key, all turned back to before the model's rotation, `round_rows` turns, transforms and rounds what came out and
stores the key, `score_tokens` reads codes and scales of all tokens once. Lengths are read on the device. The newest token
is chosen whatever its score. For a prompt `score_rows` scores some queries at a time.

Numbers of e4m3 are numbers of fp16, so that products are exact; they are summed in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again it rounds to the nearest even integer


# ---------------------------------------------------------------------- e4m3
@triton.jit
def _code(y):
    """int32, the e4m3 code nearest to fp32 numbers of magnitude 448 at most; ties to even."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = tl.abs(y) < 0.015625  # multiples of 2^-9 below 2^-6
    code = tl.where(small, ((tl.where(small, tl.abs(y), 0.0) * 512.0 + ROUND) - ROUND).to(tl.int32), code)
    return code | ((bits >> 24) & 128)


@triton.jit
def _number(code):
    """fp16, what codes stand for (int16 or int32): fp16 has the same bits seven places up, and a bias higher by 8."""
    bits = ((code & 127) << 7) | ((code & 128) << 8)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0


# ---------------------------------------------------------------------- products with weights
@triton.jit
def _places(h, table, row, at, s0, sh, sm, table_width, PAGE: tl.constexpr):
    """Offsets of the vectors of heads h at entry `at`; row: the first of these heads in the table."""
    if PAGE > 0:
        number = tl.load(table + (row + h) * table_width + at // PAGE).to(tl.int64)
        return number * s0 + (at % PAGE).to(tl.int64) * sm
    return h.to(tl.int64) * sh + at.to(tl.int64) * sm


@triton.jit
def _products(
    x, table, row, at, s0, sh, sm, table_width, own, other, partner, weight, out, first,
    HEADS: tl.constexpr, D: tl.constexpr, MEAN: tl.constexpr,  # features are the mean of heads, else all of them
    ROWS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """out `[ROWS]` from `first` on, TALL of them: weight fp32 `[ROWS, F]` times features of the vectors of heads."""
    COLUMNS: tl.constexpr = D if MEAN else HEADS * D
    STEP: tl.constexpr = 8 if HEADS <= 8 else 32
    r = first + tl.arange(0, TALL)
    rows = (r < ROWS)[:, None]
    total = tl.zeros([TALL, WIDE], tl.float32)
    for lo in range(0, COLUMNS, WIDE):
        c = lo + tl.arange(0, WIDE)
        ok = c < COLUMNS
        w = tl.load(weight + r.to(tl.int64)[:, None] * COLUMNS + c[None, :], mask=rows & ok[None, :], other=0.0)
        d = c % D
        pair = tl.load(partner + d)
        if MEAN:
            mine = tl.zeros([WIDE], tl.float32)
            theirs = tl.zeros([WIDE], tl.float32)
            for h0 in range(0, HEADS, STEP):
                h = h0 + tl.arange(0, STEP)
                live = (h < HEADS)[:, None] & ok[None, :]
                spot = x + _places(tl.minimum(h, HEADS - 1), table, row, at, s0, sh, sm, table_width, PAGE)[:, None]
                mine += tl.sum(tl.load(spot + d[None, :], mask=live, other=0.0).to(tl.float32), 0)
                theirs += tl.sum(tl.load(spot + pair[None, :], mask=live, other=0.0).to(tl.float32), 0)
            mine /= HEADS
            theirs /= HEADS
        else:
            spot = x + _places(tl.minimum(c // D, HEADS - 1), table, row, at, s0, sh, sm, table_width, PAGE)
            mine = tl.load(spot + d, mask=ok, other=0.0).to(tl.float32)
            theirs = tl.load(spot + pair, mask=ok, other=0.0).to(tl.float32)
        feature = mine * tl.load(own + d) + theirs * tl.load(other + d)
        total += w * feature[None, :]
    tl.store(out + r, tl.sum(total, 1), mask=r < ROWS)


@triton.jit(do_not_specialize=["m"])
def project(
    q, k, table, length, own, other, partner, query, weight, key, out, m,
    q_sb, q_sh, k_s0, k_sg, k_sm, table_width,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    HI: tl.constexpr, DI: tl.constexpr, MEAN_Q: tl.constexpr, MEAN_K: tl.constexpr,
    TALL: tl.constexpr, WIDE: tl.constexpr, TALL_K: tl.constexpr, WIDE_K: tl.constexpr,
):  # fmt: skip
    """Weights times features. grid: (ceil(HI * DI / TALL) + ceil(HI / TALL) [+ ceil(DI / TALL_K): the newest key too], B).

    q `[B, H, 1, D]`; own and other fp32 `[B, D]`, what a channel and its partner (int32 `[D]`) are multiplied with to undo
    the model's rotation; query fp32 `[HI, DI, Fq]`, weight `[HI, Fq]`, key `[DI, Fk]`. out fp32 `[B, HI * DI + HI + DI]`:
    theirs in this order.
    """
    b = tl.program_id(1)
    tile = tl.program_id(0)
    FIRST: tl.constexpr = (HI * DI + TALL - 1) // TALL
    SECOND: tl.constexpr = FIRST + (HI + TALL - 1) // TALL
    own += b * D
    other += b * D
    out += b * (HI * DI + HI + DI)
    x = q + b.to(tl.int64) * q_sb
    if tile < FIRST:
        _products(x, table, 0, b, 0, q_sh, 0, 0, own, other, partner, query, out, tile * TALL,
                  HEADS, D, MEAN_Q, HI * DI, TALL, WIDE, 0)  # fmt: skip
    elif tile < SECOND:
        _products(x, table, 0, b, 0, q_sh, 0, 0, own, other, partner, weight, out + HI * DI, (tile - FIRST) * TALL,
                  HEADS, D, MEAN_Q, HI, TALL, WIDE, 0)  # fmt: skip
    else:
        n = m
        if length is not None:
            n = tl.minimum(tl.load(length + b * GROUPS).to(tl.int32), m)
        y = k
        if PAGE == 0:
            y += b.to(tl.int64) * k_s0
        at = tl.maximum(n - 1, 0)
        _products(y, table, b * GROUPS, at, k_s0, k_sg, k_sm, table_width, own, other, partner, key, out + HI * DI + HI,
                  (tile - SECOND) * TALL_K, GROUPS, D, MEAN_K, DI, TALL_K, WIDE_K, PAGE)  # fmt: skip


# ---------------------------------------------------------------------- queries, the newest key
@triton.jit(do_not_specialize=["m", "room"])
def round_rows(
    rows, norm, turn, length, mine, weights, data, scales, m, room, groups, root, factor, eps, floor,
    HI: tl.constexpr, DI: tl.constexpr, HALF: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """Turn, transform and round what `project` wrote. grid: (HI, or HI + 1 with the newest key (APPEND); B).

    turn fp32 `[B, 2, HALF]`, cosines and sines of the rotated dims; norm fp32 `[2, DI]`. mine fp16 `[B, HI, DI]` and weights
    fp32 `[B, HI]`, scales included; data uint8 `[B, room, DI]` and scales fp32 `[B, room]`, those of all keys. root: DI to
    the power of -1/2; factor: HI * DI to that of -1/2.
    """
    j = tl.program_id(0)
    b = tl.program_id(1)
    i = tl.arange(0, DI)
    other = tl.where(i < HALF, i + HALF, tl.where(i < 2 * HALF, i - HALF, i))
    rows += b * (HI * DI + HI + DI)
    start = tl.where(j < HI, j * DI, HI * DI + HI)
    x = tl.load(rows + start + i)
    y = tl.load(rows + start + other)
    if APPEND:  # noqa: SIM102 (known when compiled, unlike the next)
        if j == HI:
            mean = tl.sum(x, 0) / DI
            x -= mean
            y -= mean
            spread = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DI + eps)
            x = x * spread * tl.load(norm + i) + tl.load(norm + DI + i)
            y = y * spread * tl.load(norm + other) + tl.load(norm + DI + other)
    if HALF > 0:
        turn += b * (2 * HALF) + i % HALF
        c = tl.load(turn, mask=i < 2 * HALF, other=1.0)
        s = tl.load(turn + HALF, mask=i < 2 * HALF, other=0.0)
        x = x * c + tl.where(i < HALF, -y, y) * s
    for e in tl.static_range(7):
        if (1 << e) < DI:
            y = tl.gather(x, i ^ (1 << e), 0)
            x = tl.where((i & (1 << e)) == 0, x + y, y - x)
    x *= root
    most = tl.maximum(tl.max(tl.abs(x), 0), floor)
    power = ((most.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8  # of the least scale that brings it down to 448
    scale = (power << 23).to(tl.float32, bitcast=True)
    code = _code(x * ((254 - power) << 23).to(tl.float32, bitcast=True))
    if j < HI:
        tl.store(mine + (b * HI + j) * DI + i, _number(code))
        tl.store(weights + b * HI + j, tl.load(rows + HI * DI + j) * factor * scale)
    elif APPEND:
        n = m
        if length is not None:
            n = tl.minimum(tl.load(length + b * groups).to(tl.int32), m)
        if n > 0:
            at = b.to(tl.int64) * room + n - 1
            tl.store(data + at * DI + i, code.to(tl.uint8))
            tl.store(scales + at, scale)


# ---------------------------------------------------------------------- scores
@triton.jit
def _keys(data, entry, end, i, DI: tl.constexpr, NATIVE: tl.constexpr):
    """Keys of some entries by their codes, fp16 `[KEYS, DI]`."""
    code = tl.load(data + entry.to(tl.int64)[:, None] * DI + i[None, :], mask=(entry < end)[:, None], other=0)
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return _number(code.to(tl.int16))


@triton.jit(do_not_specialize=["m", "room", "steps"])
def score_tokens(
    mine, weights, data, scales, length, out, m, room, steps, groups,
    HI: tl.constexpr, HI_PAD: tl.constexpr, DI: tl.constexpr, KEYS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Sum over heads of w ReLU(q . k), times the key's scale. grid: (ceil(m / (KEYS * steps)), B).

    out fp32 `[B, m]`; what lies beyond a row's length keeps what was there. NATIVE: the device knows e4m3.
    """
    b = tl.program_id(1)
    n = m
    if length is not None:
        n = tl.minimum(tl.load(length + b * groups).to(tl.int32), m)
    i = tl.arange(0, DI)
    j = tl.arange(0, HI_PAD)
    q = tl.load(mine + (b * HI + j[None, :]) * DI + i[:, None], mask=(j < HI)[None, :], other=0.0)
    w = tl.load(weights + b * HI + j, mask=j < HI, other=0.0)
    data += b.to(tl.int64) * room * DI
    scales += b.to(tl.int64) * room
    out += b.to(tl.int64) * m
    first = tl.program_id(0) * KEYS * steps
    end = tl.minimum(first + KEYS * steps, n)
    entry = first + tl.arange(0, KEYS)
    ahead = tl.load(scales + entry, mask=entry < end, other=0.0)
    for p in tl.range(first, end, KEYS):
        entry = p + tl.arange(0, KEYS)
        scale = ahead
        ahead = tl.load(scales + entry + KEYS, mask=entry + KEYS < end, other=0.0)
        s = tl.dot(_keys(data, entry, end, i, DI, NATIVE), q)
        s = tl.sum(tl.where(s < 0, 0.0, s) * w[None, :], 1)
        tl.store(out + entry, s * scale, mask=entry < end)


@triton.jit(do_not_specialize=["n", "m", "room"])
def score_rows(
    mine, weights, data, scales, pos, out, n, m, room,
    HI: tl.constexpr, DI: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The same for n queries a row, each of the tokens up to its own. grid: (ceil(m / KEYS), ceil(n / ROWS), B).

    mine fp16 `[B, n, HI, DI]`, weights fp32 `[B, n, HI]`, pos int64 `[B, n]`. out fp32 `[B, n, m]`; what lies beyond the
    queries of a program keeps what was there.
    """
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, DI)
    top = tl.program_id(1) * ROWS
    row = tl.arange(0, ROWS)
    live = row < n - top
    pos += b * n + top
    first = tl.program_id(0) * KEYS
    if first <= tl.max(tl.load(pos + row, mask=live, other=-1), 0):
        entry = tl.arange(0, KEYS)
        left = m - first
        k = tl.trans(_keys(data + (b * room + first) * DI, entry, left, i, DI, NATIVE))
        queries = mine + (b * n + top) * (HI * DI) + (row[:, None] * (HI * DI) + i[None, :])
        factors = weights + (b * n + top) * HI + row * HI
        total = tl.zeros([ROWS, KEYS], tl.float32)
        ahead = tl.load(factors, mask=live, other=0.0)
        for j in tl.range(0, HI):
            q = tl.load(queries + j * DI, mask=live[:, None], other=0.0)
            w = ahead
            ahead = tl.load(factors + j + 1, mask=live & (j + 1 < HI), other=0.0)
            s = tl.dot(q, k)
            total += tl.where(s < 0, 0.0, s) * w[:, None]
        scale = tl.load(scales + b * room + first + entry, mask=entry < left, other=0.0)
        out += (b * n + top) * m + first
        tl.store(
            out + (row[:, None] * m + entry[None, :]), total * scale[None, :], mask=live[:, None] & (entry < left)[None, :]
        )
