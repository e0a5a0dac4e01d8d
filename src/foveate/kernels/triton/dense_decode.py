"""One query or a few a row over all its entries: a decode step of dense attention, at the speed of the memory.

A fixed number of programs, as many as the device runs at once, share all keys of all rows and kv heads evenly: the steps of
all rows lie one after the other, and a program takes a stretch of them, which may begin in the middle of one row and end in
another. So rows of any length keep the whole device busy, and lengths are read on the device only: a step can be captured in
a CUDA graph and replayed while the cache grows. Programs that share a row merge as `arrivals.py` says.

The queries of a few new tokens (drafts to be verified) share a tile with those of the other heads of their kv head, so that
keys and values are read once for all of them; a token does not see those behind it. There is more to merge then than one
program should: a second launch does it.

This is the split over keys of Dao et al. 2023, "Flash-Decoding", with the even stretches of Osama et al. 2023, "Stream-K"
(arXiv 2301.03598). `dense_decode_launch.py` calls the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arrivals import gather, leave, merge, put
from .steps import BIG, FLOOR, LN2, _fold, _logits, _product, _read


@triton.jit
def _step(
    qt, k, v, pos, bias, key, end, newest, k_sm, v_sm, d, dv, m, l, acc, scale, softcap,
    NEW: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAP: tl.constexpr, FP32: tl.constexpr,
):  # fmt: skip
    """Entries `key` `[KEYS]` of one row and kv head, below `end`, into the running softmax. newest: the last position that
    the query sees; of several new tokens `[TILE]`, by query."""
    BIAS: tl.constexpr = bias is not None
    ok = key < end
    weight = m
    if BIAS:
        weight = tl.load(bias + key, mask=ok, other=0.0).to(tl.float32)
        ok = ok & (weight > float("-inf"))
    at = key
    if pos is not None:
        at = tl.load(pos + key, mask=ok, other=0).to(tl.int32)
        ok = ok & (at <= (newest if NEW == 1 else tl.max(newest)))
    kt = _read(k, key * k_sm, ok, d, D, D_PAD, True)
    s = _logits(_product(qt, kt, FP32), scale, softcap, weight, CAP, BIAS)
    if NEW == 1:
        s = tl.where(ok[None, :], s, float("-inf"))
    else:
        s = tl.where(ok[None, :] & (at[None, :] <= newest[:, None]), s, float("-inf"))
    vt = _read(v, key * v_sm, ok, dv, DV, DV_PAD, True)
    return _fold(s, vt, m, l, acc, scale, (not CAP) and (not BIAS), FP32)


@triton.jit
def _rows(
    length, q_pos, pos, every, capacity, rows, kv_heads, qp_sb,
    NEW: tl.constexpr, KEYS: tl.constexpr, ROWS_PAD: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """(entries of each row `[ROWS_PAD]`, where its steps end in the steps of all rows, one row after the other).

    A row without entries has one step, which writes its zeros.
    """
    here = every < rows
    size = tl.zeros([ROWS_PAD], tl.int32) + capacity
    if length is not None:
        size = tl.minimum(tl.load(length + every, mask=here, other=0).to(tl.int32), capacity)
    if q_pos is not None and CAUSAL and pos is None and NEW == 1:
        qp = tl.load(q_pos + every // kv_heads * qp_sb, mask=here, other=0).to(tl.int32)
        size = tl.minimum(size, qp + 1)
    size = tl.maximum(size, 0)
    return size, tl.cumsum(tl.where(here, tl.maximum(tl.cdiv(size, KEYS), 1), 0), 0)


@triton.jit(do_not_specialize=["capacity", "rows", "least", "nil"])
def attend_dense(
    q, k, v, out, lse, part, part_lse, arrived, length, offsets, pos, q_pos, bias,
    scale, softcap, capacity, rows, least, nil, kv_heads,
    q_sb, q_sh, q_sn, k_sb, k_sg, k_sm, v_sb, v_sg, v_sm, qp_sb, qp_sn,
    KEYS: tl.constexpr,  # keys of a step
    ROWS_PAD: tl.constexpr,  # B * G, rounded up to a power of two; at least 32, so that few batches are compiled for
    NEW: tl.constexpr,  # tokens of the call
    PACK: tl.constexpr, PACK_PAD: tl.constexpr, TILE: tl.constexpr,  # queries of a kv head; a power of two; at least 16
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, CAP: tl.constexpr, FP32: tl.constexpr, SHARED: tl.constexpr, CHUNK: tl.constexpr,
    LSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grid: (programs,). A row is one kv head of one batch row; out `[rows, PACK, DV]`, lse `[rows, PACK]` (natural log).
    Queries lie head by head, the NEW tokens of a head together.

    length int `[rows]`, pos int and bias `[rows, capacity]`, q_pos int `[B, NEW]`, offsets int64 `[rows]` (ragged storage):
    or None. least: fewest steps of a program. nil: 0, see `walk.attend`. SHARED: programs share rows; part
    `[programs + rows, PACK, DV]`, part_lse and, for one token, the counters `arrived` `[rows]` are those of `arrivals.py`,
    the slot of program p in row i being p + i.
    """
    p = tl.program_id(0)
    every = tl.arange(0, ROWS_PAD)
    size, ends = _rows(length, q_pos, pos, every, capacity, rows, kv_heads, qp_sb, NEW, KEYS, ROWS_PAD, CAUSAL)
    total = tl.max(ends)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), least)
    at = p * share
    stop = tl.minimum(at + share, total)
    r = tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    i = tl.arange(0, KEYS)
    while at < stop:
        # ---- the row in which the stretch goes on
        row = tl.sum((ends <= at).to(tl.int32))
        begin = tl.max(tl.where(ends <= at, ends, 0))
        close = tl.min(tl.where(ends > at, ends, BIG))
        n = tl.sum(tl.where(every == row, size, 0))
        b = (row // kv_heads).to(tl.int64)
        g = (row % kv_heads).to(tl.int64)
        if offsets is not None:
            start = tl.load(offsets + row).to(tl.int64)
            k_row = k + start * k_sm
            v_row = v + start * v_sm
        else:
            k_row = k + b * k_sb + g * k_sg
            v_row = v + b * v_sb + g * v_sg
        pos_row = pos
        newest = n - 1
        if pos is not None:
            pos_row = pos + row.to(tl.int64) * capacity
            newest = tl.zeros([], tl.int32) + BIG
            if CAUSAL:
                newest = n - 1
                if q_pos is not None:
                    newest = tl.load(q_pos + b * qp_sb).to(tl.int32)
        if NEW > 1:
            newest = tl.zeros([TILE], tl.int32) + BIG
            if CAUSAL:
                newest = n - NEW + r % NEW + nil
                if q_pos is not None:
                    newest = tl.load(q_pos + b * qp_sb + r % NEW * qp_sn).to(tl.int32) + nil
        bias_row = bias
        if bias is not None:
            bias_row = bias + row.to(tl.int64) * capacity
        if NEW == 1:
            q_at = b * q_sb + (g * PACK + r) * q_sh
        else:
            q_at = b * q_sb + (g * (PACK // NEW) + r // NEW) * q_sh + (r % NEW).to(tl.int64) * q_sn
        qt = _read(q, q_at, r < PACK, d, D, D_PAD, True)
        m = tl.full([TILE], FLOOR, tl.float32)
        l = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, DV_PAD], tl.float32)
        # ---- its steps
        last = tl.minimum(stop, close) - begin
        for t in tl.range(at - begin, last, num_stages=STAGES):
            m, l, acc = _step(
                qt, k_row, v_row, pos_row, bias_row, t * KEYS + i, n, newest, k_sm, v_sm, d, dv, m, l, acc, scale, softcap,
                NEW, D, D_PAD, DV, DV_PAD, CAP, FP32,
            )  # fmt: skip
        # ---- out, or to the others of this row
        first = begin // share
        parts = (close - 1) // share - first + 1
        if SHARED and NEW > 1 and parts > 1:
            put(part, part_lse, (p + row).to(tl.int64), acc, m, l, r, dv, PACK, DV)
        elif SHARED and NEW == 1 and parts > 1:
            if leave(part, part_lse, p + row, arrived + row, parts, acc, m, l, r, dv, PACK, DV):
                merge(
                    part, part_lse, first + row, parts, arrived + row, out, lse, row * PACK, PACK, PACK_PAD,
                    DV, DV_PAD, CHUNK, 3, LSE,
                )  # fmt: skip
        else:
            some = l > 0
            spot = row.to(tl.int64) * PACK + r
            x = acc / tl.where(some, l, 1.0)[:, None]
            to = out + spot[:, None] * DV + dv[None, :]
            tl.store(to, x.to(out.dtype.element_ty), mask=(r < PACK)[:, None] & (dv < DV)[None, :])
            if LSE:
                y = tl.where(some, (m + tl.log2(tl.where(some, l, 1.0))) * LN2, float("-inf"))
                tl.store(lse + spot, y, mask=r < PACK)
        at = begin + last


@triton.jit(do_not_specialize=["capacity", "rows", "least", "programs"])
def merge_dense(
    out, lse, part, part_lse, length, q_pos, pos, capacity, rows, least, programs, kv_heads, qp_sb,
    KEYS: tl.constexpr, ROWS_PAD: tl.constexpr, NEW: tl.constexpr, PACK: tl.constexpr,
    PIECE: tl.constexpr,  # queries of a program
    DV: tl.constexpr, DV_PAD: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Merge what the programs of `attend_dense` found where several shared a row. grid: (rows, ceil(PACK / PIECE)).

    Constants and lengths are those of that launch, and so are the stretches of its programs.
    """
    row = tl.program_id(0)
    every = tl.arange(0, ROWS_PAD)
    _, ends = _rows(length, q_pos, pos, every, capacity, rows, kv_heads, qp_sb, NEW, KEYS, ROWS_PAD, CAUSAL)
    share = tl.maximum(tl.cdiv(tl.max(ends), programs), least)
    begin = tl.max(tl.where(every < row, ends, 0))
    close = tl.sum(tl.where(every == row, ends, 0))
    first = begin // share
    parts = (close - 1) // share - first + 1
    if parts > 1:
        gather(
            part, part_lse, first + row, parts, out, lse, row * PACK, tl.program_id(1) * PIECE, PACK, PIECE,
            DV, DV_PAD, CHUNK, 2, LSE,
        )  # fmt: skip
