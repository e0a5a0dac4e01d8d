"""Attention mass that a few rows give each key, without the rows' probabilities in memory.

Two passes over K: `row_logsums` finds each row's log-sum-exp, keys split over programs; `key_mass` computes each tile of
probabilities again and reduces it over the rows. Every output element is owned by one program and added up in one order,
so equal calls give equal bits. Unlike those of `estimate_probe.py` the rows may stand anywhere and there are no distances.

What is computed is `row_mass` of `scores/window.py`; `estimate_window_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .estimate_probe import _scores
from .steps import FLOOR, _read


@triton.jit
def _size(length, at, m):
    """Entries of a kv head that exist."""
    size = m
    if length is not None:
        size = tl.minimum(tl.load(length + at).to(tl.int32), m)
    return size


@triton.jit(do_not_specialize=["m", "share", "splits", "rows", "nil"])
def row_logsums(
    q, k, q_pos, length, part, scale, softcap, m, share, splits, rows, nil,
    kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm,
    GROUP: tl.constexpr,  # query heads of a kv head: their rows are packed into tiles
    TILE: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of each packed row over one split of `share` keys, -inf where it sees none.

    grid: (ceil(GROUP * rows / TILE), splits, B * G): tiles of one kv head and split run together, so K leaves memory once.
    q_pos int64 `[B, rows]`, length int32 `[B, G]` or None. part fp32 `[B * G, GROUP, rows, splits]`.
    """
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    split = tl.program_id(1)
    b = (tl.program_id(2) // kv_heads).to(tl.int64)
    g = tl.program_id(2) % kv_heads
    live = row < GROUP * rows
    d = tl.arange(0, D_PAD)
    j = tl.arange(0, KEYS)
    head = (g * GROUP + row // rows).to(tl.int64)
    qt = _read(q, b * q_sb + head * q_sh + (row % rows).to(tl.int64) * q_sn, live, d, D, D_PAD, True)
    k += b * k_sb + g.to(tl.int64) * k_sg
    last = tl.load(q_pos + b * rows + row % rows, mask=live, other=-1).to(tl.int32) + nil  # nil is 0, see `walk.attend`
    end = tl.minimum(_size(length, tl.program_id(2), m), tl.max(last) + 1)
    top = tl.full([TILE], FLOOR, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    first = split * share
    for c in tl.range(first, tl.minimum(end, first + share), KEYS, num_stages=STAGES):
        kt = _read(k, (c + j).to(tl.int64) * k_sm, c + j < end, d, D, D_PAD, True)
        s = _scores(qt, kt, scale, softcap, CAP, FP32)
        s = tl.where(((c + j)[None, :] <= last[:, None]) & (c + j < end)[None, :], s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - high) + tl.sum(tl.exp2(s - high[:, None]), 1)
        top = high
    lse = tl.where(total == 0, float("-inf"), top + tl.log2(total))
    tl.store(part + (tl.program_id(2).to(tl.int64) * (GROUP * rows) + row) * splits + split, lse, mask=live)


@triton.jit(do_not_specialize=["m", "steps", "splits", "rows", "first", "nil"])
def key_mass(
    q, k, q_pos, length, part, weight, out, scale, softcap, m, steps, splits, rows, first, nil,
    heads, kv_heads, q_sb, q_sh, q_sn, k_sb, k_sg, k_sm,
    TILE: tl.constexpr, KEYS: tl.constexpr,
    SPLITS: tl.constexpr,  # at least splits
    MOST: tl.constexpr,  # the largest probability of any row instead of their sum
    D: tl.constexpr, D_PAD: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass by key of rows first .. first + TILE - 1, fp32 `[B, H, m]`. grid: (H, ceil(ceil(m / KEYS) / steps), B).

    part as `row_logsums` leaves it; weight fp32 `[rows]` or None: what the probabilities of each row are multiplied with.
    From the second tile of rows on, what is in `out` is reduced along.
    """
    h = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    g = h // (heads // kv_heads)
    i = first + tl.arange(0, TILE)
    j = tl.arange(0, KEYS)
    d = tl.arange(0, D_PAD)
    n = tl.arange(0, SPLITS)
    at = b * heads + h
    live = i < rows
    lse = tl.load(
        part + (at * rows + i[:, None]) * splits + n[None, :],
        mask=live[:, None] & (n < splits)[None, :], other=float("-inf"),
    )  # fmt: skip
    top = tl.max(lse, 1)
    sees = top > float("-inf")
    top = tl.where(sees, top, 0.0)
    lse = top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), 1))
    lse = tl.where(sees, lse, float("inf"))  # rows that see nothing or do not exist have no mass
    qt = _read(q, b * q_sb + h.to(tl.int64) * q_sh + i.to(tl.int64) * q_sn, live, d, D, D_PAD, True)
    k += b * k_sb + g.to(tl.int64) * k_sg
    out += at * m
    last = tl.load(q_pos + b * rows + i, mask=live, other=-1).to(tl.int32) + nil
    end = tl.minimum(_size(length, b * kv_heads + g, m), tl.max(last) + 1)
    factor = tl.full([TILE], 1.0, tl.float32)
    if weight is not None:
        factor = tl.load(weight + i, mask=live, other=0.0)
    begin = tl.program_id(1) * steps
    for t in tl.range(begin, tl.minimum(begin + steps, tl.cdiv(m, KEYS)), num_stages=STAGES):
        key = t * KEYS + j
        kt = _read(k, key.to(tl.int64) * k_sm, key < end, d, D, D_PAD, True)
        s = _scores(kt, qt, scale, softcap, CAP, FP32)  # a row a key: queries may be few
        seen = (key[:, None] <= last[None, :]) & (key < end)[:, None]
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0) * factor[None, :]
        if MOST:
            p = tl.where(live[None, :], p, float("-inf"))
            mass = tl.max(p, 1)
        else:
            mass = tl.sum(p, 1)
        if first > 0:
            before = tl.load(out + key, mask=key < m, other=0.0)
            mass = tl.maximum(mass, before) if MOST else mass + before
        tl.store(out + key, mass, mask=key < m)
