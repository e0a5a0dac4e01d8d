"""The last rows of a prompt against all keys: softmax mass by key and by distance, without the matrix in memory.

Two passes over K. `row_sums` finds each row's log-sum-exp, keys split over programs. `row_mass` computes each tile of
probabilities again, sums it over rows into columns, shears it (row i moves by i) and sums that into diagonals. Every
output element is owned by one program and added up in one order, so equal calls give equal bits.

Keys before `edge` may be others than those after it, and meet the rows as they stand for them (TWO: `k2`, `q2`): methods
that re-assign positions ask both in one softmax. `edge` lies between two tiles.

What is computed is `scores/probes.py`; `estimate_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import FLOOR, _logits, _product, _read


@triton.jit
def _scores(qt, kt, scale, softcap, CAP: tl.constexpr, FP32: tl.constexpr):
    """Logits in units of log 2, `[rows, keys]`; scale holds log2(e)."""
    s = _product(qt, kt, FP32)
    if CAP:
        return _logits(s, scale, softcap, s, CAP, False)
    return s * scale


@triton.jit
def _add(top, total, qt, k, k_sm, c, m, last, scale, softcap, KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
         CAP: tl.constexpr, FP32: tl.constexpr):  # fmt: skip
    """Running maximum and sum of the rows with the keys c .. c + KEYS - 1."""
    j = tl.arange(0, KEYS)
    kt = _read(k, (c + j).to(tl.int64) * k_sm, c + j < m, tl.arange(0, D_PAD), D, D_PAD, True)
    s = _scores(qt, kt, scale, softcap, CAP, FP32)
    s = tl.where((c + j)[None, :] <= last[:, None], s, float("-inf"))
    high = tl.maximum(top, tl.max(s, 1))
    return high, total * tl.exp2(top - high) + tl.sum(tl.exp2(s - high[:, None]), 1)


@triton.jit(do_not_specialize=["m", "share", "splits", "edge"])
def row_sums(
    q, k, part, scale, softcap, m, share, splits, q2, k2, edge,
    kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm, q2_sb, q2_sh, q2_sn, k2_sb, k2_sg, k2_sm,
    ROWS: tl.constexpr,  # probe rows of a head
    GROUP: tl.constexpr,  # query heads of a kv head: their rows are packed into tiles
    TILE: tl.constexpr, KEYS: tl.constexpr, TWO: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of each packed row over one split of `share` keys.

    grid: (ceil(GROUP * ROWS / TILE), splits, B * G): tiles of one kv head and split run together, so K leaves memory
    once. q points at the first probe row; row i sees the keys up to m - ROWS + i. part fp32 `[B * G, GROUP, ROWS, splits]`.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    split = tl.program_id(1)
    b = (tl.program_id(2) // kv_heads).to(tl.int64)
    g = tl.program_id(2) % kv_heads
    live = row < GROUP * ROWS
    d = tl.arange(0, D_PAD)
    head = (g * GROUP + row // ROWS).to(tl.int64)
    spot = (row % ROWS).to(tl.int64)
    last = m - ROWS + row % ROWS
    top = tl.full([TILE], FLOOR, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    first = split * share
    stop = tl.minimum(m, first + share)
    if TWO:
        q2t = _read(q2, b * q2_sb + head * q2_sh + spot * q2_sn, live, d, D, D_PAD, True)
        k2 += b * k2_sb + g.to(tl.int64) * k2_sg
        for c in tl.range(first, tl.minimum(stop, edge), KEYS, num_stages=STAGES):
            top, total = _add(top, total, q2t, k2, k2_sm, c, m, last, scale, softcap, KEYS, D, D_PAD, CAP, FP32)
        first = tl.maximum(first, edge)
    qt = _read(q, b * q_sb + head * q_sh + spot * q_sn, live, d, D, D_PAD, True)
    k += b * k_sb + g.to(tl.int64) * k_sg
    for c in tl.range(first, stop, KEYS, num_stages=STAGES):
        top, total = _add(top, total, qt, k, k_sm, c, m, last, scale, softcap, KEYS, D, D_PAD, CAP, FP32)
    lse = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    tl.store(part + (tl.program_id(2).to(tl.int64) * (GROUP * ROWS) + row) * splits + split, lse, mask=live)


@triton.jit
def _mass(carry, t, nil, c, m, lse, qt, k, k_sm, columns, diagonals, scale, softcap, ROWS: tl.constexpr,
          ROWS_PAD: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr,
          FP32: tl.constexpr):  # fmt: skip
    """Columns and diagonals of the tile of keys from c on, number t on the way down; what it hands to the next one."""
    i = tl.arange(0, ROWS_PAD)
    j = tl.arange(0, KEYS)
    kt = _read(k, (c + j).to(tl.int64) * k_sm, c + j < m, tl.arange(0, D_PAD), D, D_PAD, True)
    s = _scores(qt, kt, scale, softcap, CAP, FP32)
    p = tl.where((c + j)[None, :] <= (m - ROWS + i)[:, None], tl.exp2(s - lse[:, None]), 0.0)
    mine = t > 0
    tl.store(columns + c + j, tl.sum(p, 0), mask=(c + j < m) & mine)
    moved = j[None, :] + (i + t * nil)[:, None]  # nil is 0: or else the compiler keeps these numbers in registers
    wrapped = moved >= KEYS
    p = tl.gather(p, moved % KEYS, 1)
    far = m - ROWS - c - j
    near = tl.sum(tl.where(wrapped, 0.0, p), 0) + carry
    tl.store(diagonals + far, near, mask=(far >= 0) & mine)
    return tl.sum(tl.where(wrapped, p, 0.0), 0)


@triton.jit(do_not_specialize=["m", "steps", "splits", "nil", "edge"])
def row_mass(
    q, k, part, columns, diagonals, scale, softcap, m, steps, splits, nil, q2, k2, edge,
    heads, kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm, q2_sb, q2_sh, q2_sn, k2_sb, k2_sg, k2_sm,
    ROWS: tl.constexpr, ROWS_PAD: tl.constexpr, KEYS: tl.constexpr, TWO: tl.constexpr,  # ROWS_PAD <= KEYS
    SPLITS: tl.constexpr,  # at least splits
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass by key and by distance, fp32 `[B, H, m]` twice. grid: (H, ceil(ceil(m / KEYS) / steps), B).

    A tile of keys from c on, row i moved by i places: place x holds distance m - ROWS - c - x, or KEYS more where the
    row has wrapped around. Walking down, the wrapped part of a tile belongs to the distances of the next one. One more
    tile than a program owns gives it the wrapped part it starts with; the tile at 0 hands over the farthest distances.
    """
    h = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    g = h // (heads // kv_heads)
    i = tl.arange(0, ROWS_PAD)
    j = tl.arange(0, KEYS)
    d = tl.arange(0, D_PAD)
    n = tl.arange(0, SPLITS)
    at = b * heads + h
    lse = tl.load(
        part + (at * ROWS + i[:, None]) * splits + n[None, :],
        mask=(i < ROWS)[:, None] & (n < splits)[None, :], other=float("-inf"),
    )  # fmt: skip
    top = tl.max(lse, 1)
    top = tl.where(i < ROWS, top, 0.0)
    lse = top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), 1))
    lse = tl.where(i < ROWS, lse, float("inf"))  # rows that do not exist have no mass
    qt = _read(q, b * q_sb + h.to(tl.int64) * q_sh + i.to(tl.int64) * q_sn, i < ROWS, d, D, D_PAD, True)
    k += b * k_sb + g.to(tl.int64) * k_sg
    columns += at * m
    diagonals += at * m
    begin = tl.program_id(1) * steps
    end = tl.minimum(begin + steps, tl.cdiv(m, KEYS))
    carry = tl.zeros([KEYS], tl.float32)
    close = end - begin + 1
    if TWO:
        close = tl.minimum(tl.maximum(end + 1 - edge // KEYS, 0), end - begin + 1)
    for t in tl.range(0, close, num_stages=STAGES):
        carry = _mass(carry, t, nil, (end - t) * KEYS, m, lse, qt, k, k_sm, columns, diagonals, scale, softcap, ROWS,
                      ROWS_PAD, KEYS, D, D_PAD, CAP, FP32)  # fmt: skip
    if TWO:
        q2t = _read(q2, b * q2_sb + h.to(tl.int64) * q2_sh + i.to(tl.int64) * q2_sn, i < ROWS, d, D, D_PAD, True)
        k2 += b * k2_sb + g.to(tl.int64) * k2_sg
        for t in tl.range(close, end - begin + 1, num_stages=STAGES):
            carry = _mass(carry, t, nil, (end - t) * KEYS, m, lse, q2t, k2, k2_sm, columns, diagonals, scale, softcap, ROWS,
                          ROWS_PAD, KEYS, D, D_PAD, CAP, FP32)  # fmt: skip
    if begin == 0:
        far = m - ROWS + KEYS - j
        tl.store(diagonals + far, carry, mask=(far >= 0) & (far < m))
