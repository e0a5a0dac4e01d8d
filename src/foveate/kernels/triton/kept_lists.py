"""A list of entries that was chosen some steps ago, and the tokens since: what a step attends to, ascending, in one launch.

Entries may have ranks: of a set of fixed size each newer token takes the place of the weakest one. A list is cut among
programs; each counts by itself how many entries before its own stay, so none waits for another. `extend` is called by
`methods/recycled_attention.py` and `methods/pillar_attn.py`. `strongest` cuts a list to what PillarAttn's budget leaves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paging_launch import usable

__all__ = ["usable"]  # whether these kernels compute beside tensors like t: its device, dtype and head dim

CHUNK = 2048  # entries of a program
HELD = 16384  # most entries of a list for `strongest`, whose program holds a row
TOP_BIT = tl.constexpr(-0x80000000)


@triton.jit(do_not_specialize=["n", "wide"])
def extend_lists(
    entries, used, rank, limit, begin, q_pos, out, count, n, wide, kv_heads, qp_sb,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """grid: (ceil(n / CHUNK), B * G). out int32 `[B * G, wide]`, padded with the newest token; count int32 `[B * G]`.

    entries int32 `[B * G, n]`; begin int64 `[B]`, the first token that follows them; q_pos int64 `[B]`, the newest. Either
    used int32 `[B * G]`, how many stay; or rank int32 `[B * G, n]` and limit int64 `[B * G]`: of the set's `limit` entries
    those of rank limit - tokens + 1 and worse go (for more than limit + 1 tokens all, and the oldest tokens).
    """
    row = tl.program_id(1)
    b = row // kv_heads
    newest = tl.load(q_pos + b * qp_sb).to(tl.int32)
    since = newest - tl.load(begin + b).to(tl.int32) + 1
    at = row.to(tl.int64) * n
    out += row.to(tl.int64) * wide
    i = tl.arange(0, CHUNK)
    first = tl.program_id(0) * CHUNK
    ok = first + i < n
    x = tl.load(entries + at + first + i, mask=ok, other=0)
    if rank is not None:
        since = tl.maximum(since, 1)
        size = tl.load(limit + row).to(tl.int32)
        left = size - since + 1
        since = tl.minimum(since, size + 1)
        seen = tl.zeros([CHUNK], tl.int32)
        for c in tl.range(0, first, CHUNK, num_stages=4):
            seen += (tl.load(rank + at + c + i) < left).to(tl.int32)
        before = tl.sum(seen)
        stays = ok & (tl.load(rank + at + first + i, mask=ok, other=0) < left)
        slot = before + tl.cumsum(stays.to(tl.int32), 0) - 1
        kept = before + tl.sum(stays.to(tl.int32))
    else:
        kept = tl.minimum(tl.load(used + row).to(tl.int32), n)
        stays = first + i < kept
        slot = first + i
    tl.store(out + slot, x, mask=stays & (slot < wide))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        for c in range(kept, wide, CHUNK):
            j = c + i
            token = tl.minimum(newest - since + 1 + (j - kept), newest)
            tl.store(out + j, token, mask=j < wide)
        tl.store(count + row, tl.minimum(kept + since, wide))


def extend(
    entries: Tensor, begin: Tensor, q_pos: Tensor, more: int, *, used: Tensor | None = None, rank: Tensor | None = None,
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(int32 `[B, G, K + more]`, ascending, padded with the newest token; counts int32 `[B, G]`).

    Args:
        entries: int32 `[B, G, K]`, ascending, each below begin. begin: int64 `[B]`, the first token that follows them.
        q_pos: int64 `[B, 1]`, the newest token. more: tokens there is room for.
        used: int32 `[B, G]`, how many of each list count; or rank int32 `[B, G, K]` (0 the best) and limit int64 `[B, G]`
            (at most K): with the tokens since, a set keeps `limit` members and the newest token.
    """
    b, g, n = entries.shape
    out = torch.empty(b, g, n + more, dtype=torch.int32, device=entries.device)
    count = torch.empty(b, g, dtype=torch.int32, device=entries.device)
    used, rank, limit = (None if t is None else t.contiguous() for t in (used, rank, limit))
    extend_lists[(max(1, -(-n // CHUNK)), b * g)](
        entries.contiguous(), used, rank, limit, begin.contiguous(), q_pos, out, count, n, n + more, g, q_pos.stride(0),
        CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    return out, count


@triton.jit(do_not_specialize=["n", "wide", "m", "ago", "least", "capacity"])
def strongest_of_lists(
    entries, used, score, begin, q_pos, length, out, count, n, m, wide, ago, least, capacity, kv_heads, qp_sb, score_sr,
    RATIO: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """grid: (B * G,). out int32 `[B * G, wide]`, padded with its last entry (0 if there is none); count int32 `[B * G]`.

    entries int32 `[B * G, n]`, ascending, the first used int32 `[B * G]` of a row count, n <= CHUNK; score fp32, a row of m
    every score_sr numbers. begin int64 `[B]`, q_pos int64 `[B]`, length int `[B * G]` or None: capacity. The entries that
    stay are the max(least, RATIO * tokens) less those from begin on, both as they were `ago` tokens earlier; of equal scores
    the lower entries. A threshold is searched between the lowest and the highest key, two guesses a round.
    """
    row = tl.program_id(0)
    b = row // kv_heads
    i = tl.arange(0, CHUNK)
    have = tl.minimum(tl.load(used + row).to(tl.int32), n)
    e = tl.load(entries + row.to(tl.int64) * n + i, mask=i < n, other=0)
    tokens = capacity
    if length is not None:
        tokens = tl.load(length + row).to(tl.int32)
    recent = tl.load(q_pos + b * qp_sb) + 1 - ago - tl.load(begin + b)
    ok = i < have
    x = tl.load(score + row.to(tl.int64) * score_sr + tl.where((e >= 0) & (e < m), e, 0), mask=ok, other=0.0)
    budget = tl.ceil((tokens - ago).to(tl.float64) * tl.full([], RATIO, tl.float64) - 1e-9).to(tl.int64)
    k = tl.minimum(tl.maximum(tl.maximum(budget, least) - recent, 0), have).to(tl.int32)
    x = tl.where(x == 0, 0.0, x)
    x = tl.where(x == x, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | TOP_BIT)).to(tl.uint32, bitcast=True)
    key = tl.where(ok, key, 0)
    low = tl.min(tl.where(ok, key, 0xFFFFFFFF))
    high = tl.max(key)
    high = tl.where(k < have, high, low)
    while low < high:  # at least k keys reach low, fewer than k lie above high: cut what is between in three
        third = (high - low) // 3
        a = low + third + 1
        z = high - third
        reach = tl.sum((key >= a).to(tl.int32) | ((key >= z).to(tl.int32) << 16))
        reach_a = reach & 0xFFFF
        reach_z = reach >> 16
        below = tl.where(reach_a > k, z - 1, tl.where(reach_a == k, a, a - 1))  # exactly k reach it: the search is over
        high = tl.where(reach_z > k, high, tl.where(reach_z == k, z, below))
        low = tl.where(reach_z >= k, z, tl.where(reach_a >= k, a, low))
    better = (key > low) & (i < k * CHUNK)  # none if none stays
    tied = ok & (key == low)
    both = tl.cumsum((better.to(tl.int32) << 16) | tied.to(tl.int32), 0)
    room = k - tl.sum(better.to(tl.int32))
    take = better | (tied & ((both & 0xFFFF) <= room))
    slot = (both >> 16) + tl.minimum(both & 0xFFFF, room) - 1
    out += row.to(tl.int64) * wide
    tl.store(out + slot, e, mask=take)
    last = tl.max(tl.where(take, e, 0))
    for c in range(k, wide, CHUNK):
        tl.store(out + c + i, last + tl.zeros([CHUNK], tl.int32), mask=c + i < wide)
    tl.store(count + row, k)


def strongest(
    entries: Tensor, used: Tensor, score: Tensor, begin: Tensor, length: Tensor | None, q_pos: Tensor, *, ago: int,
    ratio: float, least: int, capacity: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(int32 `[B, G, K]`, ascending, padded with a row's last entry; counts int32 `[B, G]`): the entries of highest score.

    Args:
        entries: int32 `[B, G, K]`, ascending, K <= HELD; used: int32 `[B, G]`, how many of a row count.
        score: fp32 `[B, G, M]`; of equal ones the lower entry is better. begin: int64 `[B]`, the first token that stays
            unasked. length: int `[B, G]`, tokens of a row, or None: capacity. q_pos: int64 `[B, 1]`, the newest.
        ago, ratio, least: max(least, ratio * tokens) entries stay, less those from begin on, as it was `ago` tokens earlier.
    """
    b, g, n = entries.shape
    score = score if score.stride(-1) == 1 and score.stride(0) == g * score.stride(1) else score.contiguous()
    out = torch.empty(b, g, n, dtype=torch.int32, device=entries.device)
    count = torch.empty(b, g, dtype=torch.int32, device=entries.device)
    chunk = max(128, triton.next_power_of_2(n))
    strongest_of_lists[(b * g,)](
        entries.contiguous(), used.contiguous(), score, begin.contiguous(), q_pos,
        None if length is None else length.contiguous(), out, count,
        n, score.shape[2], n, ago, least, capacity, g, q_pos.stride(0), score.stride(1),
        RATIO=ratio, CHUNK=chunk, num_warps=min(32, max(4, chunk // 512)),
    )  # fmt: skip
    return out, count
