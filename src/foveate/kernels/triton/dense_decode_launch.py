"""Launches of `dense_decode.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from . import arrivals, dense_decode
from .config import device, power_of_2
from .paging_launch import _pad, _tight, usable

SHARE, STAGES, WARPS = 2, 4, 4  # programs a multiprocessor; of a program: stages (one less is held at once), warps
STEP = 16384  # bytes of keys of a step: 64 keys at D 128
LEAST = 1  # fewest steps of a program
GROUP, ROWS = 16, 1024  # most query heads of a kv head, most kv heads of all rows
NEW, PACK = 32, 128  # most tokens of a call; where they are several, most queries of a kv head
PIECE = 4  # queries of a program that merges those of several tokens
# Least room of all rows together. On an H200 (H 32, G 8, D 128, bf16) the general kernel is faster at batch 1 over 8,192
# entries, 16.6 us against 28, and over 1,024, 7.8 against 10.5. This one is faster at 64 x 1,024, 74 us against 77, at
# 131,072, 142 against 148.5, at 8 x 32,768, 255 against 287, and where one of 8 rows is long and the others are short, 155
# against 434. Nothing between 8,192 and 65,536 was timed.
ROOM = 1 << 16
# The same for several tokens: of 9 the general kernel takes 290 us at 131,072, where this one takes 143, 45 against 34.5 at
# 16,384, 26 against 25 at 8,192; of 5 tokens, whose tile it fills better, 137 against 149, 31 against 36 and 22 against 26.
ROOM_FEW = 1 << 14


def why_not(q: Tensor, kv: KV, layout: Layout) -> str | None:
    """Why this call is not for `attend`, or None: a query a row, or a few, over everything, dense or ragged storage.

    Lengths are on the device, so what counts as little to read is the room for entries.
    """
    b, g = kv.shape[:2]
    n = q.shape[2]
    if n > NEW or not layout.full or layout.has_lists:
        return f"it computes up to {NEW} queries a row over all entries"
    if kv.kind == "paged":
        return "it does not read pages"
    if not usable(q) or not usable(kv.v):
        return "no kernel for this device, dtype or head dim"
    if q.shape[1] // g > GROUP:
        return f"at most {GROUP} query heads of a kv head, not {q.shape[1] // g}"
    if n > 1 and n * q.shape[1] // g > PACK:
        return f"at most {PACK} queries of a kv head in several tokens, not {n * q.shape[1] // g}"
    if n > 1:  # products of fp32 hold the queries twice; keys and values need the rest
        wide, size = _pad(max(q.shape[-1], kv.shape[-1])), q.element_size()
        shared = device(q.device.index if q.device.type == "cuda" else None)[0]
        if wide * _pad(n * q.shape[1] // g) * size * (1 + (size == 4)) > 0.6 * shared:
            return "the queries of a kv head do not fit a program's memory beside its keys"
    if b * g > ROWS:
        return f"at most {ROWS} kv heads of all rows, not {b * g}"
    if b * kv.capacity < (least := ROOM if n == 1 else ROOM_FEW):
        return f"at least {least:,} entries of room in all rows together, not {b * kv.capacity:,}"
    if kv.capacity * max(kv.k.stride(-2), kv.v.stride(-2)) >= 1 << 31:
        return "a row's storage is counted in 31 bits"
    return None


def attend(q: Tensor, kv: KV, layout: Layout, scale: float, softcap: float, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, N, Dv]` and lse `[B, H, N]` or None, for a call with no reason against it and a scale above 0."""
    b, h, n, d = q.shape
    _, g, m, _, dv = kv.shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k, kv.v))
    index = q.device.index if q.device.type == "cuda" else None
    hides = kv.bias is not None or kv.pos is not None
    queries = h // g * n
    tile, warps = _pad(queries), 8 if queries > 64 else WARPS
    keys, stages, programs = _plan(index, b * g, m, d, dv, q.element_size(), hides, tile)
    out = torch.empty(b, h, n, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=q.device) if want_lse else None
    part = part_lse = arrived = None
    if programs > 1:
        slots = (programs + b * g) * queries
        part = torch.empty(slots * (dv + 1), dtype=torch.float32, device=q.device)
        part_lse = part[slots * dv :]
        arrived = arrivals.counters(b * g, part) if n == 1 else None
    q_pos = None if layout.q_pos is None else layout.q_pos.expand(b, n)
    ragged = kv.kind == "ragged"
    k_s, v_s = ((0, 0, t.stride(-2)) if ragged else t.stride()[:3] for t in (k, v))
    q_s, qp_s = q.stride()[:3], (0, 0) if q_pos is None else q_pos.stride()
    pack, length, pos = power_of_2(queries), _tight(kv.len), _tight(kv.pos)
    same = dict(
        KEYS=keys, ROWS_PAD=max(32, power_of_2(b * g)), NEW=n, PACK=queries, DV=dv, DV_PAD=_pad(dv),
        CAUSAL=layout.causal, LSE=want_lse,
    )  # fmt: skip
    dense_decode.attend_dense[(programs,)](
        q, k, v, out, lse, part, part_lse, arrived, length, _tight(kv.offsets), pos, q_pos,
        None if kv.bias is None else _tight(kv.bias.detach()),
        max(scale, 1e-30) * math.log2(math.e), softcap, m, b * g, LEAST, 0, g, *q_s, *k_s, *v_s, *qp_s,
        PACK_PAD=pack, TILE=tile, D=d, D_PAD=_pad(d), CAP=softcap > 0, FP32=q.dtype == torch.float32,
        SHARED=programs > 1, CHUNK=arrivals.chunk(pack, _pad(dv), WARPS), STAGES=stages,
        num_warps=warps, num_stages=stages, **same,
    )  # fmt: skip
    if n > 1 and programs > 1:
        dense_decode.merge_dense[(b * g, -(-queries // PIECE))](
            out, lse, part, part_lse, length, q_pos, pos, m, b * g, LEAST, programs, g, qp_s[0],
            PIECE=PIECE, CHUNK=arrivals.chunk(PIECE, _pad(dv), WARPS), num_warps=WARPS, **same,
        )  # fmt: skip
    return out, lse


@functools.lru_cache(maxsize=256)
def _plan(
    index: int | None, rows: int, capacity: int, d: int, dv: int, size: int, hides: bool, tile: int
) -> tuple[int, int, int]:
    """(keys of a step, stages, programs): SHARE programs a multiprocessor whose steps fit its memory together, one where a
    program holds more than 64 queries."""
    shared, cores = device(index)
    share, wide, few = SHARE if tile <= 64 else 1, max(_pad(d), _pad(dv)), tile < 64
    keys = max(16, min(128, STEP // (wide * size)))
    stages = 3 if size == 4 else STAGES
    most = (0.95 if few else 0.99) * shared / share

    def held(stages: int, keys: int) -> int:
        """Bytes: with Hopper's products of 64 rows the step in use counts beside those on their way."""
        return (_pad(d) * tile + (stages - few) * keys * 2 * wide) * size

    while held(stages, keys) > most and (stages > 3 or keys > 16):
        stages, keys = (stages - 1, keys) if stages > 3 else (stages, keys // 2)
    programs = min(share * cores, rows * -(-capacity // keys))
    return keys, stages + hides, max(1, programs)  # a bias or positions take a stage before keys can be asked for
