"""Layouts on one portable Triton kernel: prefill and decode, dense, paged and ragged storage, any part of a layout.

The kernel (`walk.attend`) reads lists as they are: tiles of any width, single entries, diagonals expanded in the kernel.
Columns beside diagonals are compacted per query block first, in pieces of at most `SCRATCH` bytes. When a call has too
few tiles of query rows to fill the device (decode), several programs share one tile's keys and a second kernel reduces
them. Nothing waits for the device. Query heads that share their lists share a tile, so that K and V are read once per kv
head. Three kinds of calls take shorter ways: one query a row over nothing but tiles (Quest and its kin) `paging.py`, one
query a row over everything where that is much `dense_decode.py`, and lists of tiles for every single one of many query
rows (NSA and its kin) `tokens.py`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from ...kv import KV
from ...layout import RULE_FIELDS, Layout
from ..base import Want
from . import dense_decode_launch, paging_launch, tokens, walk, walk_lists
from .config import config, device, power_of_2, rows_limit

NAME = "triton"
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read when the kernels were decorated, as Triton does
SCRATCH = 128 << 20  # bytes of compacted columns in flight
LIST_FIELDS = ("tiles", "diagonals", "entries", "columns")
HEAD_DIM = 256


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if want.mass:
        return "it does not return the mass of entries"
    if q.device.type != "cuda" and not INTERPRET:
        return f"it needs a CUDA device, not {q.device.type} (set TRITON_INTERPRET=1 to test it on the CPU)"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {q.dtype}"
    if q.dtype == torch.bfloat16:
        if INTERPRET:
            return "Triton's interpreter computes bf16 wrongly"
        if not paging_launch.has_bf16(q.device.index):
            return "bf16 needs compute capability 8.0"
    if max(kv.shape[3:]) > HEAD_DIM:
        return f"head dims up to {HEAD_DIM}, not {max(kv.shape[3:])}"
    if kv.capacity >= 1 << 29:
        return f"capacities below {1 << 29} entries, not {kv.capacity}"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    b, h, n, d = q.shape
    _, g, m, _, dv = kv.shape
    if scale < 0:  # the kernel scales the maximum of a row, which needs a scale above 0
        q, scale = -q, -scale
    if dense_decode_launch.why_not(q, kv, layout) is None:
        return *dense_decode_launch.attend(q, kv, layout, scale, softcap, want.lse), None
    if paging_launch.serves(q, kv, layout, softcap):
        return *paging_launch.attend(q, kv, layout, scale, want.lse), None
    if tokens.serves(q, kv, layout, softcap):
        return *tokens.attend(q, kv, layout, scale, want.lse), None
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k, kv.v))
    d_pad, dv_pad = (max(16, power_of_2(x)) for x in (d, dv))
    shared, cores = device(q.device.index if q.device.type == "cuda" else None)

    # A grid of blocks only matters to lists; without them blocks are as the kernel likes them.
    limit = rows_limit(shared, max(d_pad, dv_pad), q.element_size())
    block, q_offset = (layout.block_q, layout.q_offset) if layout.has_lists else (limit, 0)
    rows = min(limit, power_of_2(min(block, n + q_offset)))
    pack = _pack(layout, h, g, rows, limit)
    tile = max(16, rows * power_of_2(pack))
    parts = -(-min(block, n + q_offset) // rows)
    blocks = -(-(n + q_offset) // block)
    programs = blocks * parts * b * (h // pack)
    small = tile < 64  # bound by memory: several programs a multiprocessor hide its latency
    hops = int(layout.has_lists) + int(kv.kind == "paged")
    cfg = config(shared, tile, d_pad, dv_pad, q.element_size(), hops if small else None)
    splits = _splits(layout, cfg.keys, (4 if small else 1) * cores // programs)

    out = torch.empty(b, h, n, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=q.device) if want.lse else None
    if splits > 1:
        part = torch.empty(b, h, n, splits, dv, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(b, h, n, splits, dtype=torch.float32, device=q.device)
    q_pos = None if layout.q_pos is None else layout.q_pos.expand(b, n)
    args: dict[str, Any] = dict(
        q=q, k=k, v=v, out=part if splits > 1 else out, lse=part_lse if splits > 1 else lse,
        q_pos=q_pos, qp_sb=q_pos.stride(0) if q_pos is not None else 0,
        length=_tight(kv.len), pos=_tight(kv.pos), bias=None if kv.bias is None else _tight(kv.bias.detach()),
        table=_tight(kv.table), offsets=_tight(kv.offsets), table_width=kv.table.shape[2] if kv.table is not None else 0,
        scale=max(scale, 1e-30) * math.log2(math.e), softcap=softcap,
        heads=h, kv_heads=g, n_rows=n, capacity=m, q_offset=q_offset, end0=m - n - q_offset, num_blocks=blocks, nil=0,
        q_sb=q.stride(0), q_sh=q.stride(1), q_sn=q.stride(2),
        **_strides("k", kv.kind, k), **_strides("v", kv.kind, v),
        BLOCK=block, PARTS=parts, ROWS=rows, PACK=pack, TILE=tile, KEYS=cfg.keys, WIDTH=layout.tile_width,
        PAGE=k.shape[1] if kv.kind == "paged" else 0, D=d, D_PAD=d_pad, DV=dv, DV_PAD=dv_pad,
        CAUSAL=layout.causal, FULL=layout.full, RULE=layout.has_rule, CAP=softcap > 0, FP32=q.dtype == torch.float32,
        SPLITS=splits, LSE=want.lse or splits > 1, STAGES=cfg.stages, MASKED_STAGES=cfg.stages if small else 1,
        num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip
    if q_pos is not None and q_pos.stride(-1) != 1:
        args.update(q_pos=q_pos.contiguous(), qp_sb=n)
    for name in RULE_FIELDS:
        t = _tight(getattr(layout, name))
        args[name] = t
        args[f"{name}_sb"], args[f"{name}_div"] = (0, 1) if t is None else _lead(t, h, 1)
    for name in LIST_FIELDS:
        args.update(_list(layout, name, h, blocks))
    args["columns_blocks"] = 1
    step = blocks
    beside = layout.columns is not None and layout.diagonals is not None
    if beside:
        lead, step = _beside(layout, b, h, blocks)
    for first in range(0, blocks, step):
        here = min(step, blocks - first)
        args["first_block"] = first
        if beside:
            _compact(layout, args, lead, first, here, h)
        walk.attend[(here * parts, b * (h // pack), splits)](**args)
    if splits > 1:
        walk.reduce_splits[(b * h * n,)](
            part, part_lse, out, lse, splits, power_of_2(splits), dv, dv_pad, want.lse, num_warps=4
        )
    return out, lse, None


# ---------------------------------------------------------------------- arguments of a launch
def _tight(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _lead(t: Tensor, h: int, rows: int) -> tuple[int, int]:
    """(rows of lists from one batch row to the next, query heads that share a list) of an index tensor."""
    return (t.shape[1] * rows if t.shape[0] > 1 else 0), h // t.shape[1]


def _strides(name: str, kind: str, t: Tensor) -> dict[str, int]:
    s0, sg = {"dense": t.stride()[:2], "paged": (t.stride(0), 0), "ragged": (0, 0)}[kind]
    return {f"{name}_s0": s0, f"{name}_sg": sg, f"{name}_sm": t.stride(-2)}


def _chunk(width: int) -> int:
    return min(1024, max(16, power_of_2(width)))


def _list(layout: Layout, name: str, h: int, blocks: int) -> dict[str, Any]:
    count = {"tiles": "tile_count", "diagonals": "diagonal_count", "entries": "entry_count", "columns": "column_count"}[name]
    index, used = _tight(getattr(layout, name)), _tight(getattr(layout, count))
    there = index is not None and index.shape[-1] > 0
    per = blocks if name in ("tiles", "entries") else 1
    sb, div = _lead(index, h, per) if there else (0, 1)  # type: ignore[arg-type]
    return {
        name: index if there else None, count: used if there else None, f"{name}_sb": sb, f"{name}_div": div,
        f"{name}_n": index.shape[-1] if there else 0,  # type: ignore[union-attr]
        f"{name.upper()}_CHUNK": _chunk(index.shape[-1]) if there else 0,  # type: ignore[union-attr]
    }  # fmt: skip


def _pack(layout: Layout, h: int, g: int, rows: int, limit: int) -> int:
    """Query heads that can share a tile: a divisor of the group, when all lists are per kv head (or shared by more)."""
    for name in (*LIST_FIELDS, *RULE_FIELDS):
        t = getattr(layout, name)
        if t is not None and g % t.shape[1]:
            return 1
    group = h // g
    fits = [p for p in range(1, group + 1) if group % p == 0 and rows * power_of_2(p) <= max(16, limit)]
    return max(fits, default=1)


def _splits(layout: Layout, keys: int, room: int) -> int:
    """Programs that share a tile's keys: up to `room`, with at least two steps each.

    What a static rule names is known to the device alone; its bound is the capacity.
    """
    width = {n: getattr(layout, n).shape[-1] for n in LIST_FIELDS if getattr(layout, n) is not None}
    reach = sum(n * (layout.tile_width if name in ("tiles", "diagonals") else 1) for name, n in width.items())
    if layout.full or layout.has_rule:
        reach = layout.shape[3]
    return max(1, min(room, -(-min(reach, layout.shape[3]) // (2 * keys)), 128))


# ---------------------------------------------------------------------- columns beside diagonals
def _beside(layout: Layout, b: int, h: int, blocks: int) -> tuple[tuple[int, int], int]:
    """((B', H') of the compacted columns, query blocks of one launch)."""
    c, d = layout.columns, layout.diagonals
    assert c is not None and d is not None
    batch = b if layout.q_pos is not None else max(c.shape[0], d.shape[0])
    lists = math.lcm(c.shape[1], d.shape[1])
    lists = lists if h % lists == 0 else h
    each = batch * lists * c.shape[-1] * 4
    return (batch, lists), max(1, min(blocks, SCRATCH // max(1, each)))


def _compact(layout: Layout, args: dict[str, Any], lead: tuple[int, int], first: int, here: int, h: int) -> None:
    """Fill the columns of `args` with what no diagonal covers in blocks first .. first + here."""
    batch, lists = lead
    columns, diagonals = _tight(layout.columns), _tight(layout.diagonals)
    assert columns is not None and diagonals is not None
    width = columns.shape[-1]
    if width == 0 or diagonals.shape[-1] == 0:
        return
    out = torch.empty(batch, lists, here, width, dtype=torch.int32, device=columns.device)
    count = torch.empty(batch, lists, here, dtype=torch.int32, device=columns.device)
    walk_lists.compact_columns[(here, batch * lists)](
        columns, _tight(layout.column_count), diagonals, _tight(layout.diagonal_count), args["q_pos"], out, count,
        layout.shape[3], args["q_offset"], first, args["end0"], args["qp_sb"],
        *_lead(columns, lists, 1), width, *_lead(diagonals, lists, 1), diagonals.shape[-1], lists,
        BLOCK=args["BLOCK"], WIDTH=layout.tile_width, CHUNK=min(256, _chunk(width)),
        ROUNDS=diagonals.shape[-1].bit_length(), num_warps=4,
    )  # fmt: skip
    args.update(columns=out, column_count=count, columns_blocks=here)
    args["columns_sb"], args["columns_div"] = (lists * here if batch > 1 else 0), h // lists
    args["COLUMNS_CHUNK"] = _chunk(width)
