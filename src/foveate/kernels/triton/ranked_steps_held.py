"""A step that may use the last list of tokens again (TokenSelect's selection cache): the device decides, nobody waits.

`decide` compares the step's queries with those that the held list was chosen for, row by row. Rows whose list is due get
the number of their tokens, all others 0: with such lengths the programs of scores, votes and the choice
(`estimate_votes.py`, `select_entries*.py`) return at once, so that one captured step serves both cases. `keep` puts what was
chosen where the list is held, or the tokens since the choice behind it. `ranked_steps_launch.py` calls these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ranked_steps import _onward, _undo


@triton.jit(do_not_specialize=["m", "n", "near", "total", "refresh"])
def decide(
    q, k, q_pos, length, raw, own, other, partner, held_query, held_pos, held_count, voter, placed, look, count,
    theta, m, n, near, total, refresh, kv_heads, q_sb, q_sh, k_sb, k_sg, k_sm, qp_sb, raw_rows,
    HEADS: tl.constexpr, LINES: tl.constexpr,  # query heads; how many of them are held at once
    GROUPS_PAD: tl.constexpr,  # at least kv_heads
    D: tl.constexpr, D_PAD: tl.constexpr,
    FIRST: tl.constexpr,  # nothing is held yet: every list is due
):  # fmt: skip
    """What `ranked_steps.turn_step` does, and whether a row's list is due. grid: (B,).

    A list is due if the cosine between voter fp32 `[B, HEADS, D]` and held_query, all heads as one vector, is not at least
    theta, or more than `refresh` tokens came since. Then held_query, held_pos int64 `[B]` and held_count int32 `[B]` (at
    most `total` tokens) become those of this step.

    look int32 `[B, kv_heads]`: tokens of the row, or 0: its list is used again. count int32 `[B]`: tokens of this step's
    list. placed `[B, HEADS, D]`: queries at the last of them. Other tensors are those of `turn_step`.
    """
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, LINES)
    g = tl.arange(0, GROUPS_PAD)
    d = tl.arange(0, D_PAD)
    ok = d < D
    pair = tl.load(partner + d, mask=ok, other=0)
    now = tl.load(q_pos + b * qp_sb)
    if not FIRST:
        chosen = tl.load(held_pos + b)
        had = tl.load(held_count + b)
    a, z, c, w = _undo(own, other, (n + b) * D, pair, d, ok)
    # ---- the newest keys
    newest = tl.full([GROUPS_PAD], 0, tl.int32) + (m - 1)
    if length is not None:
        newest = tl.maximum(tl.load(length + b * kv_heads + g, mask=g < kv_heads, other=1).to(tl.int32) - 1, 0)
    live = (g < kv_heads)[:, None] & ok[None, :]
    x = k + b * k_sb + (g.to(tl.int64) * k_sg + newest.to(tl.int64) * k_sm)[:, None]
    mine = tl.load(x + d[None, :], mask=live, other=0.0).to(tl.float32)
    theirs = tl.load(x + pair[None, :], mask=live, other=0.0).to(tl.float32)
    plain = mine * a[None, :] + theirs * z[None, :]
    to = ((b * kv_heads + g) * raw_rows + newest)[:, None] * D + d[None, :]
    stored = live
    # ---- queries where votes are given: back to position 0 and from there on, as one turn
    turn, turn_other = _onward(own, other, near.to(tl.int64) * D, pair, d, ok, a, z, c, w)
    both = tl.zeros([LINES, D_PAD], tl.float32)
    new = tl.zeros([LINES, D_PAD], tl.float32)
    old = tl.zeros([LINES, D_PAD], tl.float32)
    for first in tl.static_range(0, HEADS, LINES):
        h = first + i
        live = (h < HEADS)[:, None] & ok[None, :]
        at = (b * HEADS + h)[:, None] * D + d[None, :]
        x = q + b * q_sb + h.to(tl.int64)[:, None] * q_sh
        mine = tl.load(x + d[None, :], mask=live, other=0.0).to(tl.float32)
        theirs = tl.load(x + pair[None, :], mask=live, other=0.0).to(tl.float32)
        y = mine * turn[None, :] + theirs * turn_other[None, :]
        if not FIRST:
            was = tl.load(held_query + at, mask=live, other=0.0)
        if first == 0:  # behind the loads, which would wait for a store in front of them
            tl.store(raw + to, plain.to(raw.dtype.element_ty), mask=stored)
        tl.store(voter + at, y, mask=live)
        if not FIRST:
            both += y * was
            new += y * y
            old += was * was
    # ---- the decision
    size = tl.minimum(now + 1, m).to(tl.int32)
    kept = tl.minimum(size, total)
    if FIRST:
        due = size >= 0
        entries = kept
    else:
        norm = tl.sqrt(tl.sum(tl.sum(new, 1), 0)) * tl.sqrt(tl.sum(tl.sum(old, 1), 0))
        alike = tl.sum(tl.sum(both, 1), 0) / tl.maximum(norm, 1e-16) >= theta  # false for NaN
        since = (now - chosen).to(tl.int32)
        due = (alike == 0) | (since > refresh)
        entries = tl.where(due, kept, had + since)
    tl.debug_barrier()  # every warp has read what was held before one of them writes it
    tl.store(count + b, entries)
    seen = tl.zeros([GROUPS_PAD], tl.int32) + tl.where(due, size, 0)
    tl.store(look + b * kv_heads + g, seen, mask=g < kv_heads)
    if due:
        tl.store(held_pos + b, now)
        tl.store(held_count + b, kept)
    # ---- queries at the last place
    place, place_other = _onward(own, other, (entries - 1).to(tl.int64) * D, pair, d, ok, a, z, c, w)
    for first in tl.static_range(0, HEADS, LINES):
        h = first + i
        live = (h < HEADS)[:, None] & ok[None, :]
        at = (b * HEADS + h)[:, None] * D + d[None, :]
        x = q + b * q_sb + h.to(tl.int64)[:, None] * q_sh
        mine = tl.load(x + d[None, :], mask=live, other=0.0).to(tl.float32)
        theirs = tl.load(x + pair[None, :], mask=live, other=0.0).to(tl.float32)
        if due:
            tl.store(held_query + at, mine * turn[None, :] + theirs * turn_other[None, :], mask=live)
        y = mine * place[None, :] + theirs * place_other[None, :]
        tl.store(placed + at, y.to(placed.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n", "wide"])
def keep(
    chosen, look, count, held_tokens, held_pos, held_count, n, wide, kv_heads,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of this step where it is held. grid: (ceil(wide / CHUNK), B).

    held_tokens int32 `[B, wide]`: of a row whose list was due (look above 0) what was chosen, int32 `[B, n]`, its last
    number behind it; of others the tokens after held_pos from place held_count on, up to the count of this step.
    """
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    if tl.load(look + b * kv_heads) > 0:
        token = tl.load(chosen + b * n + tl.minimum(place, n - 1))
        tl.store(held_tokens + b * wide + place, token, mask=place < wide)
    else:
        have = tl.load(held_count + b)
        token = tl.load(held_pos + b).to(tl.int32) + 1 + place - have
        new = (place >= have) & (place < tl.load(count + b)) & (place < wide)
        tl.store(held_tokens + b * wide + place, token, mask=new)
