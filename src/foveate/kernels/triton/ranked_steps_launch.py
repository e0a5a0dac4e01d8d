"""Launches of `ranked_steps*.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import arrivals, ranked_steps, ranked_steps_held
from .config import device
from .paging_launch import INTERPRET, _pad, _tight, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

# Of `attend_ranked`: tokens of a step; programs a multiprocessor; of a program: warps, stages (one less is held at once).
KEYS, SHARE, WARPS, STAGES = 32, 2, 4, 3
COMPARED, KEPT = 4096, 1024  # numbers of queries that `decide` holds at once; tokens of a program of `keep`
Table = tuple[Tensor, Tensor]


def turn_step(
    q: Tensor, kv: KV, q_pos: Tensor, raw: Tensor, table: Table, partner: Tensor, *, near: int, last: int | None
) -> tuple[Tensor, Tensor | None]:
    """(queries at position near, fp32 `[B, H, 1, D]`; at the smaller of their own position and last, in their dtype, or
    None); and `raw` `[B, G, room, D]` gets the newest key of each row before its rotation.

    Args:
        q: `[B, H, 1, D]`. kv: dense, in text order. q_pos: int64 `[B, 1]`, where queries and newest keys stand.
        table: fp32 `[n + B, D]` twice, `Turns.asked` of more places than near and last. partner: int32 `[D]`, the channel
            that each one turns with.
    """
    (b, h, _, d), g = q.shape, kv.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k))
    voter = torch.empty(b, h, 1, d, dtype=torch.float32, device=q.device)
    placed = None if last is None else torch.empty(b, h, 1, d, dtype=q.dtype, device=q.device)
    ranked_steps.turn_step[(b * (h + g),)](
        q, k, q_pos, _tight(kv.len), raw, *table, partner, voter, placed, kv.capacity, len(table[0]) - b, near, last or 0,
        h, g, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), q_pos.stride(0), raw.shape[2],
        D=d, D_PAD=_pad(d), num_warps=1,
    )  # fmt: skip
    return voter, placed


def decide(
    q: Tensor, kv: KV, q_pos: Tensor, raw: Tensor, table: Table, partner: Tensor, held: tuple[Tensor, Tensor, Tensor], *,
    near: int, total: int, theta: float, refresh: int, first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `turn_step` does for a step that may use lists again: (queries at position near; queries at the last place of
    this step's list; look int32 `[B, G]`: tokens of a row whose list is due, 0: it is used again; tokens of the list, int32
    `[B]`). What is held of rows whose list is due becomes this step's.

    Args:
        q, kv, q_pos, raw, table, partner, near: as for `turn_step`; the table has at least total + refresh places.
        held: what each row's list was chosen for: queries fp32 `[B, H, 1, D]`, position int64 `[B]`, tokens int32 `[B]`,
            contiguous. first: nothing is held yet.
        total, theta, refresh: most tokens of a new list; the least cosine, and most tokens since, of one that is used again.
    """
    (b, h, _, d), g = q.shape, kv.shape[1]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k))
    make = functools.partial(torch.empty, device=q.device)
    voter, placed = make(b, h, 1, d, dtype=torch.float32), make(b, h, 1, d, dtype=q.dtype)
    look, count = make(b, g, dtype=torch.int32), make(b, dtype=torch.int32)
    lines = min(triton.next_power_of_2(h), max(1, COMPARED // _pad(d)))
    ranked_steps_held.decide[(b,)](
        q, k, q_pos, _tight(kv.len), raw, *table, partner, *held, voter, placed, look, count,
        theta, kv.capacity, len(table[0]) - b, near, total, refresh,
        g, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), q_pos.stride(0), raw.shape[2],
        HEADS=h, LINES=lines, GROUPS_PAD=triton.next_power_of_2(g), D=d, D_PAD=_pad(d), FIRST=first, num_warps=8,
    )  # fmt: skip
    return voter, placed, look, count


def keep(chosen: Tensor, look: Tensor, count: Tensor, tokens: Tensor, pos: Tensor, had: Tensor) -> None:
    """Bring held lists `tokens` int32 `[B, wide]`, contiguous, up to date: chosen int32 `[B, n]` for rows that were due
    (look, count: from `decide`), for others the tokens behind pos `[B]`, from place had `[B]` on."""
    b, wide = tokens.shape
    ranked_steps_held.keep[(-(-wide // KEPT), b)](
        chosen.contiguous(), look, count, tokens, pos, had, chosen.shape[1], wide, look.shape[1], CHUNK=KEPT, num_warps=4
    )


def attend(
    q: Tensor, raw: Tensor, v: Tensor, tokens: Tensor, count: Tensor, table: Table, partner: Tensor, *, scale: float,
    softcap: float | None, halves: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `[B, H, 1, Dv]`, lse fp32 `[B, H, 1]`): queries at the last place of a list, its tokens at 0, 1, ... in it.

    Args:
        q: `[B, H, 1, D]`, contiguous, as `turn_step` leaves it. raw: `[B, G, room, D]`, contiguous, keys before rotation.
        v: `[B, G, M, Dv]`. tokens: int32 `[B, n]`, the first count `[B]` of a row count.
        table: fp32, from row n on for others, twice: `Turns.asked`. partner: int32 `[D]`.
        scale: above 0. halves: whether partners are D / 2 apart; wrong results if said in error.
    """
    (b, h, _, d), (g, room), (m, dv), n = q.shape, raw.shape[1:3], v.shape[2:], tokens.shape[1]
    v = v if v.stride(-1) == 1 else v.contiguous()
    halves = halves and d == _pad(d) and d >= 32
    index = q.device.index if q.device.type == "cuda" else None
    splits, keys, stages = _plan(index, b * g, n, _pad(d), _pad(dv), q.element_size(), halves)
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device)
    part = part_lse = arrived = None
    if splits > 1:
        slots = b * h * splits
        part = torch.empty(slots * (dv + 1), dtype=torch.float32, device=q.device)
        part_lse, arrived = part[slots * dv :], arrivals.counters(b * g, part)
    pack = triton.next_power_of_2(h // g)
    ranked_steps.attend_ranked[(splits, b * g)](
        q, raw, v, tokens.contiguous(), count.contiguous(), *table, partner, out, lse, part, part_lse, arrived,
        scale * math.log2(math.e), softcap or 0.0, n, m, splits, g, room, v.stride(0), v.stride(1), v.stride(2),
        KEYS=keys, PACK=h // g, PACK_PAD=pack, TILE=_pad(h // g), D=d, D_PAD=_pad(d), DV=dv, DV_PAD=_pad(dv),
        CAP=bool(softcap), FP32=q.dtype == torch.float32, CHUNK=arrivals.chunk(pack, _pad(dv), WARPS),
        STAGES=stages, HALVES=halves, num_warps=WARPS, **_registers(),
    )  # fmt: skip
    return out, lse


def _registers() -> dict[str, int]:
    """A bound on the registers of a thread of `attend_ranked`: left alone, ptxas stops at 128 and puts words aside."""
    if INTERPRET or torch.version.hip is not None:
        return {}
    return {"maxnreg": min(168, (1 << 16) // (32 * WARPS * SHARE) // 8 * 8)}


@functools.lru_cache(maxsize=256)
def _plan(index: int | None, rows: int, n: int, d: int, dv: int, size: int, halves: bool) -> tuple[int, int, int]:
    """(programs of a row, tokens of a step, stages) of `attend_ranked` for padded head dims."""
    shared, cores = device(index)
    keys, stages = min(KEYS, max(16, triton.next_power_of_2(n))), STAGES if size < 4 else 1
    table = (4 if halves else 8) * d  # bytes of a place: both halves turn by the same numbers

    def held(keys: int, stages: int) -> int:
        return keys * ((d + dv) * size + table) * max(1, stages - 1) + 16 * (2 * d + dv) * size

    while held(keys, stages) > 0.9 * shared and (stages > 2 or keys > 16):
        keys, stages = (keys, stages - 1) if stages > 2 else (keys // 2, stages)
    steps = -(-n // keys)
    share = -(-steps // max(1, min(steps, SHARE * cores // rows)))  # steps of a program
    return -(-steps // share), keys, stages
