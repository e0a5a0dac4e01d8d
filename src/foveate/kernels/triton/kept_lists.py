"""A list of entries that was chosen some steps ago, and the tokens since: what a step attends to, ascending, in one launch.

Entries may have ranks: of a set of fixed size each newer token takes the place of the weakest one. A list is cut among
programs; each counts by itself how many entries before its own stay, so none waits for another. `extend` is called by
`methods/recycled_attention.py` and `methods/pillar_attn.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paging_launch import usable

__all__ = ["usable"]  # whether these kernels compute beside tensors like t: its device, dtype and head dim

CHUNK = 2048  # entries of a program


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
