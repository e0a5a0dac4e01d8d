"""Every logit from 4-bit numbers, against a bar of each row; what leaves the device's registers is a bit a pair of blocks.

`quantise_keys` makes integers of keys, `local_sums` the exact mass that a row's bar is relative to, and `low_bits` compares:
an integer product whose result is scaled, reduced to the best key of each block and turned into a bit where it stands.
Bits of 32 key blocks are a word. Queries are made integers inside the last kernel, which reads them once.

What is computed is `scores/lowbit.py`; `estimate_lowbit_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import FLOOR, LN2, _logits, _product, _read

BIG = tl.constexpr(1e30)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken off again it rounds to the nearest even integer


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _levels(x, peak, TOP: tl.constexpr):
    """(levels of x `[n, D]` as fp32, fp32 step `[n]`): `low_bit` of `scores/lowbit.py` before it multiplies by the step."""
    step = tl.div_rn(peak, tl.full(peak.shape, TOP, tl.float32))
    step = tl.where(step > 0, step, 1.0)
    y = (tl.div_rn(x, tl.broadcast_to(step[:, None], x.shape)) + ROUND) - ROUND
    return tl.minimum(tl.maximum(y, -TOP), TOP), step


@triton.jit
def _local(block, sink, window, segment, BLOCK: tl.constexpr):
    """First key of the local region of a query block: `Grid.local`."""
    rest = block * BLOCK - window - sink
    return tl.where(rest >= 0, sink + tl.maximum(rest, 0) // segment * segment, 0)


@triton.jit(do_not_specialize=["m"])
def quantise_keys(
    k, centre, mean, ints, steps, extra, scale, m, k_sg, k_sm, wide,
    GROUP: tl.constexpr,  # query heads of a kv head
    KEYS: tl.constexpr, FRAGMENT: tl.constexpr, TOP: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr,  # channels, and bytes of a row of ints
):  # fmt: skip
    """Levels int8 or e4m3 `[g, wide, WIDTH]`, steps fp32 `[g, wide]` and products with mean queries. grid: (wide / KEYS, g).

    k `[g, m, D]`, less centre fp32 `[g, D]`. mean fp32 `[g, GROUP, D]`: extra fp32 `[g, GROUP, wide]` is its product with
    the key before rounding, times scale, over the key's step. Keys from m on and channels from D on are zeros.
    """
    g = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, WIDTH)
    ok = (j < m)[:, None] & (d < D)[None, :]
    x = tl.load(k + g * k_sg + j.to(tl.int64)[:, None] * k_sm + d[None, :], mask=ok, other=0.0).to(tl.float32)
    x = tl.where(ok, x - tl.load(centre + g * D + d, mask=d < D, other=0.0)[None, :], 0.0)
    peak = tl.max(tl.abs(x), 1)
    if FRAGMENT:  # keys of one floor((j mod 8) / 2) in each 32 share a step
        p = tl.max(tl.reshape(peak, [KEYS // 32, 4, 4, 2]), 3, keep_dims=True)
        p = tl.broadcast_to(tl.max(p, 1, keep_dims=True), [KEYS // 32, 4, 4, 2])
        peak = tl.reshape(p, [KEYS])
    y, step = _levels(x, peak, TOP)
    at = g * wide + j
    tl.store(ints + at[:, None] * WIDTH + d[None, :], y.to(ints.dtype.element_ty))
    tl.store(steps + at, step)
    for e in range(GROUP):
        head = g * GROUP + e
        q = tl.load(mean + head * D + d, mask=d < D, other=0.0)
        tl.store(extra + head * wide + j, tl.sum(x * q[None, :], 1) * scale / step)


@triton.jit
def _mass(
    qt, k, c, stop, pos, top, total, scale, softcap, k_sm, d,
    KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """One step of a running sum of exp2 over the keys c, c + 1 ... before `stop` that rows see."""
    key = c + tl.arange(0, KEYS)
    kt = _read(k, key.to(tl.int64) * k_sm, key < stop, d, D, D_PAD, True)
    s = _product(qt, kt, FP32)
    if CAP:
        s = _logits(s, scale, softcap, s, CAP, False)
    else:
        s = s * scale
    s = tl.where((key < stop)[None, :] & (key[None, :] <= pos[:, None]), s, float("-inf"))
    high = tl.maximum(top, tl.max(s, 1))
    return high, total * tl.exp2(top - high) + tl.sum(tl.exp2(s - high[:, None]), 1)


@triton.jit(do_not_specialize=["m", "n", "start", "first"])
def local_sums(
    q, k, centre, lse, scale, softcap, m, n, start, first, sink, window, segment,
    q_sh, q_sn, k_sg, k_sm,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (natural) of each row over its sink and local keys: fp32 `[heads, nq * BLOCK]`. grid: (nq, heads).

    q `[heads, n, D]`, positions from `start` on; program i serves query block first + i. k `[g, m, D]`, less centre fp32
    `[g, D]`, which is taken off the result instead of the keys: it adds the same to all logits of a row. CAP: there is none.
    scale holds log2(e). Rows that are not there get something finite.
    """
    h = tl.program_id(1).to(tl.int64)
    g = h // GROUP
    block = first + tl.program_id(0)
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, D_PAD)
    pos = block * BLOCK + i
    row = pos - start
    qt = _read(q, h * q_sh + row.to(tl.int64) * q_sn, (row >= 0) & (row < n), d, D, D_PAD, True)
    k += g * k_sg
    local = _local(block, sink, window, segment, BLOCK)
    top = tl.full([BLOCK], FLOOR, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    apart = tl.where(local > 0, sink, 0)  # else the local region holds the sink too
    for c in tl.range(0, apart, KEYS, num_stages=1):
        top, total = _mass(
            qt, k, c, apart, pos, top, total, scale, softcap, k_sm, d, KEYS, D, D_PAD, CAP, FP32
        )  # fmt: skip
    for c in tl.range(local, tl.minimum((block + 1) * BLOCK, m), KEYS, num_stages=STAGES):
        top, total = _mass(qt, k, c, m, pos, top, total, scale, softcap, k_sm, d, KEYS, D, D_PAD, CAP, FP32)
    out = top + tl.log2(total)
    if not CAP:
        shift = tl.load(centre + g * D + d, mask=d < D, other=0.0)
        out -= tl.sum(qt.to(tl.float32) * shift[None, :], 1) * scale
    tl.store(lse + (h * tl.num_programs(0) + tl.program_id(0)) * BLOCK + i, out * LN2)


@triton.jit(do_not_specialize=["n", "start", "first", "nq", "many"])
def low_bits(
    q, mean, bar, ints, steps, extra, words, scale, n, start, first, nq, many, sink, window, segment,
    q_sh, q_sn, wide,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr,  # rows of a program, a multiple of BLOCK; keys of a step, of BLOCK_K
    FRAGMENT: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Bits of key blocks in which any row's estimate is above its bar: int32 `[heads, nq, many]`. grid: (tiles, heads).

    q `[heads, n, D]`, less mean fp32 `[heads, D]`; bar fp32 `[heads, nq * BLOCK]`; keys as `quantise_keys` leaves them.
    Bit j % 32 of word j // 32 is key block j. Words beyond the last local region of a tile are not written, and bits from
    a row's own local region on are anything.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # long ones first
    h = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, TILE)
    j = tl.arange(0, KEYS)
    d = tl.arange(0, WIDTH)
    PER: tl.constexpr = TILE // BLOCK
    UNIT: tl.constexpr = BLOCK_K if BLOCK_K < 32 else 32
    unit = tl.arange(0, KEYS // UNIT)
    two = 2 * tl.arange(0, 4)
    row = (first + tile * PER) * BLOCK + i - start
    ok = ((row >= 0) & (row < n))[:, None] & (d < D)[None, :]
    x = tl.load(q + h * q_sh + row.to(tl.int64)[:, None] * q_sn + d[None, :], mask=ok, other=0.0).to(tl.float32)
    x = tl.where(ok, x - tl.load(mean + h * D + d, mask=d < D, other=0.0)[None, :], 0.0)
    peak = tl.max(tl.abs(x), 1)
    if FRAGMENT:  # rows t and t + 8 of each 16 share a step
        p = tl.max(tl.reshape(peak, [TILE // 16, 2, 8]), 1, keep_dims=True)
        peak = tl.reshape(tl.broadcast_to(p, [TILE // 16, 2, 8]), [TILE])
    y, step = _levels(x, peak, TOP)
    y = y.to(tl.int8)
    step *= scale
    line = tile * TILE + i
    least = tl.load(bar + h * nq * BLOCK + line, mask=line < nq * BLOCK, other=BIG)
    ints += h // GROUP * wide * WIDTH
    steps += h // GROUP * wide
    extra += h * wide
    last = tl.minimum((tile + 1) * PER, nq) - 1
    far = _local(first + last, sink, window, segment, BLOCK)
    part = tl.arange(0, PER)
    out = words + (h * nq + tile * PER + part) * many
    word = tl.zeros([TILE, 4], tl.int32)
    for c in tl.range(0, far, KEYS, num_stages=STAGES):
        kt = tl.load(ints + (c + j)[:, None] * WIDTH + d[None, :])
        s = tl.dot(y, tl.trans(kt), out_dtype=tl.int32).to(tl.float32)
        s = s * step[:, None] + tl.load(extra + c + j)[None, :]
        if not FRAGMENT:
            s = s * tl.load(steps + c + j)[None, :]
        # The keys that a thread holds of each 32 are those of one floor((j mod 8) / 2): the best of them costs no exchange.
        high = tl.max(tl.max(tl.reshape(s, [TILE, KEYS // UNIT, UNIT // 8, 4, 2]), 4), 2)
        if FRAGMENT:  # they share a step
            at = (c + unit * UNIT) // 32 * 32
            high = high * tl.load(steps + at[:, None] + two[None, :])[None, :, :]
        bit = tl.full([KEYS // UNIT], 1, tl.int32) << ((c + unit * UNIT) // BLOCK_K % 32)
        found = tl.where(high > least[:, None, None], bit[None, :, None], 0)
        word = word | tl.reduce(found, 1, _either)
        if ((c + KEYS) % (32 * BLOCK_K) == 0) | (c + KEYS >= far):  # rows meet once a word, not at each step
            some = tl.reduce(tl.reshape(word, [PER, BLOCK * 4]), 1, _either)
            tl.store(out + c // (32 * BLOCK_K), some, mask=tile * PER + part < nq)
            word = tl.zeros([TILE, 4], tl.int32)
