"""Launches of the decode kernels of `paging.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

from ...kv import KV
from ...layout import Layout
from ..relaunch import Arguments
from ..relaunch import launch as again
from . import append as append_kernel
from . import arrivals, paging
from .config import config, device, power_of_2

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # read when the kernels were decorated, as Triton does
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIM = 256
CHUNK, PER_WARP = 16384, 1024  # pages that a program, and each of its warps, holds at once when it selects
PAGES, STEPS, WARPS, STAGES = 64, 8, 4, 3  # of score_pages: pages of a step (32 KB at D 128), most steps of a program
SHARE, MORE = 4, 0  # of attend_tiles: programs a multiprocessor, stages beside those of config.py
ENTRIES, ENTRY_SHARE, ENTRY_WARPS, ENTRY_STAGES = 64, 2, 4, 3  # of attend_entries: those of a step (32 KB at D 128), ..


def usable(t: Tensor) -> bool:
    """Whether these kernels compute on tensors like t `[..., D]`: its device, dtype and head dim."""
    if t.dtype not in DTYPES or t.shape[-1] > HEAD_DIM:
        return False
    if t.device.type != "cuda":
        return INTERPRET and t.dtype != torch.bfloat16  # Triton's interpreter computes bf16 wrongly
    return t.dtype != torch.bfloat16 or has_bf16(t.device.index)


@functools.cache
def has_bf16(index: int | None) -> bool:
    """Whether this CUDA device multiplies bf16; asked once, since torch takes microseconds to answer."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _pad(d: int) -> int:
    return max(16, power_of_2(d))


# ---------------------------------------------------------------------- a token, page bounds
def appends(k: Tensor, v: Tensor) -> bool:
    """Whether `append` writes caches like these, `[B, G, size, D]`."""
    return usable(k) and usable(v) and k.dtype == v.dtype and k.stride(-1) == v.stride(-1) == 1


def append(
    new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, now: Tensor, seen: Tensor, pages: tuple[Tensor, Tensor, int] | None
) -> Tensor:
    """Write one token of every row and count it. Returns the new lengths, int32 `[B, G]`, a tensor of its own.

    Args:
        new_k, new_v: `[B, G, 1, D]`, in the dtype of k and v. k, v: `[B, G, size, D]` with room for it, as `appends`
            accepts them.
        now: int32 `[B, G]`, entries so far. seen: int64 `[B]`. Both contiguous; they count the token afterwards.
        pages: (bounds `[B, G, rows, 2D]`, entries they cover int `[B, G]`, entries a page) to bring up to date, contiguous.
    """
    b, g, _, d = k.shape
    dv = v.shape[-1]
    new_k, new_v = (t if t.stride(-1) == 1 else t.contiguous() for t in (new_k, new_v))
    said = torch.empty_like(now)
    data, covered, width = (None, None, 1) if pages is None else pages
    append_kernel.append_token[(b * g,)](
        new_k, new_v, k, v, now, seen, said, data, covered,
        g, new_k.stride(0), new_k.stride(1), new_v.stride(0), new_v.stride(1),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), 0 if data is None else data.shape[2],
        WIDTH=width, WIDTH_PAD=power_of_2(width), D=d, D_PAD=_pad(d), DV=dv, DV_PAD=_pad(dv), num_warps=4,
    )  # fmt: skip
    return said


def update(kv: KV, data: Tensor, width: int, covered: Tensor | int) -> None:
    """Bring bounds up to date with the entries of `kv` from `covered` on.

    Args:
        kv: dense or paged. data: `[B, G, rows, 2D]`, contiguous, with room for all pages of `kv`.
        width: keys of a page of bounds.
        covered: entries of each row covered so far: int `[B, G]`, contiguous, overwritten with `kv.len`, which must be
            there; or a number for all rows of a view without `len`.
    """
    b, g, m, d, _ = kv.shape
    k = kv.k if kv.k.stride(-1) == 1 else kv.k.contiguous()
    here = isinstance(covered, Tensor)
    s0, sg, sm, page, per = _storage(k, kv)
    paging.update_bounds[(b * g,)](
        k, _tight(kv.table), covered if here else None, _tight(kv.len) if here else None, data, 0 if here else covered, m,
        g, s0, sg, sm, per, data.shape[2],
        PAGE=page, WIDTH=width, WIDTH_PAD=power_of_2(width), D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip


def score(q: Tensor, data: Tensor, pages: int, width: int, length: Tensor | None, *, group: bool) -> Tensor:
    """Upper bounds of the logits in each page, fp32, unscaled: `[B, G, pages]`, or `[B, H, pages]` without `group`.

    q `[B, H, 1, D]`, data `[B, G, rows, 2D]` as `scores.bounds.Bounds` stores it, length int `[B, G]` or None. Pages
    beyond a row's length have no meaning.
    """
    b, h, _, d = q.shape
    g, rows = data.shape[1], data.shape[2]
    r = h // g
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(b, g if group else h, pages, dtype=torch.float32, device=q.device)
    index = q.device.index if q.device.type == "cuda" else None
    step, stages, cores = _score_plan(index, _pad(d), _pad(r), q.element_size())
    blocks = -(-pages // step)
    steps = max(1, min(STEPS, blocks * b * g // (2 * cores)))
    paging.score_pages[(-(-blocks // steps), b * g)](
        q, data, _tight(length), out, pages, steps, g, q.stride(0), q.stride(1), rows,
        WIDTH=width, GROUP=r, GROUP_PAD=_pad(r), D=d, D_PAD=_pad(d), PAGES=step,
        REDUCE=group, FP32=q.dtype == torch.float32, STAGES=stages, num_warps=WARPS,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def _score_plan(index: int | None, d: int, group: int, size: int) -> tuple[int, int, int]:
    """(pages of a step, stages, multiprocessors): what fits the memory that one program may have."""
    shared, cores = device(index)
    pages, stages = PAGES, STAGES if size < 4 else 1
    while 2 * d * size * (pages * stages + group) > 0.9 * shared and (stages > 1 or pages > 16):
        pages, stages = (pages, stages - 1) if stages > 1 else (pages // 2, stages)
    return pages, stages, cores


def select(scores: Tensor, keep: int, width: int, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """First entries of the `keep` best pages of each row, the newest page among them.

    scores fp32 `[B, Hl, pages]`, contiguous; length int `[B, G]` or None. Returns int32 `[B, Hl, min(keep, pages)]`,
    ascending and padded with the row's last, and counts int32 `[B, Hl]`: `select.top_indices` times `width`.
    """
    b, heads, pages = scores.shape
    keep = min(keep, pages)
    tiles = torch.empty(b, heads, keep, dtype=torch.int32, device=scores.device)
    count = torch.empty(b, heads, dtype=torch.int32, device=scores.device)
    chunk = min(CHUNK, max(256, power_of_2(pages)))
    each = 1 if length is None else heads // length.shape[1]
    paging.select_pages[(b * heads,)](
        scores, _tight(length), tiles, count, pages, keep, each,
        WIDTH=width, CHUNK=chunk, MANY=pages > chunk, num_warps=min(32, max(4, chunk // PER_WARP)),
    )  # fmt: skip
    return tiles, count


# ---------------------------------------------------------------------- attention
def serves(q: Tensor, kv: KV, layout: Layout, softcap: float) -> bool:
    """Whether `attend` computes this call: one query a row over tiles of 16, 32, .. keys, or single entries, and no more."""
    x, (tiles, _, width) = layout, listed(layout)
    return (
        q.shape[2] == 1
        and tiles is not None
        and (x.tiles is None or x.entries is None)
        and x.block_q == 1
        and (width >= 16 or x.tiles is None)
        and width & (width - 1) == 0
        and softcap == 0
        and kv.kind != "ragged"
        and kv.bias is None
        and kv.pos is None
        and x.q_pos is None
        and x.diagonals is None
        and x.columns is None
        and not x.has_rule
        and tiles.shape[-1] > 0
        and (tiles.shape[1] % kv.shape[1] == 0 or kv.shape[1] % tiles.shape[1] == 0)
    )


def listed(layout: Layout) -> tuple[Tensor | None, Tensor | None, int]:
    """(tiles, their counts, their width) of a layout with tiles or single entries, which are tiles of one key."""
    if layout.tiles is None:
        return layout.entries, layout.entry_count, 1
    return layout.tiles, layout.tile_count, layout.tile_width


def attend(q: Tensor, kv: KV, layout: Layout, scale: float, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, 1, Dv]` and lse `[B, H, 1]` or None, for a call that `serves` accepts and a scale above 0."""
    b, h, _, d = q.shape
    _, g, m, _, dv = kv.shape
    tiles, count, width = listed(layout)
    assert tiles is not None and count is not None
    lists, n = tiles.shape[1], tiles.shape[-1]
    units = max(lists, g)
    index, rows, pack, tile = q.device.index if q.device.type == "cuda" else None, b * units, h // units, _pad(h // units)
    if width == 1:
        splits, keys, stages = _entries_plan(index, rows, n, d, dv, q.element_size())
        warps = ENTRY_WARPS
    else:
        splits, keys, warps, stages = _plan(index, rows, n * width, tile, d, dv, q.element_size(), kv.kind == "paged")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k, kv.v))
    k_s0, k_sg, k_sm, page, per = _storage(k, kv)
    v_s0, v_sg, v_sm, _, _ = _storage(v, kv)
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device) if want_lse else None
    part = part_lse = arrived = None
    if splits > 1:
        part = torch.empty(b * h * splits * (dv + 1), dtype=torch.float32, device=q.device)
        part_lse, arrived = part[b * h * splits * dv :], arrivals.counters(rows, part)
    power = power_of_2(pack)
    tensors = (q, k, v, out, lse, part, part_lse, arrived, *(_tight(t) for t in (tiles, count, kv.len, kv.table)))

    def build() -> Arguments:
        log2, own = max(scale, 1e-30) * math.log2(math.e), lists if tiles.shape[0] > 1 else 0
        sizes = (units, g, lists, own, n, q.stride(0), q.stride(1), k_s0, k_sg, k_sm, v_s0, v_sg, v_sm, per)
        chunk = arrivals.chunk(power, _pad(dv), warps)
        same = dict(
            KEYS=keys, PACK=pack, PACK_PAD=power, TILE=tile, PAGE=page, D=d, D_PAD=_pad(d), DV=dv, DV_PAD=_pad(dv),
            FP32=q.dtype == torch.float32, LSE=want_lse, STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if width == 1:  # of whose programs two or three run on a multiprocessor: there is room for twice as many words
            options = dict(SHARED=splits > 1, CHUNK=min(32, 2 * chunk), **same)
            return (splits, rows), [*tensors, log2, m, splits, *sizes], options
        return (splits, rows), [*tensors, log2, m, *sizes], dict(WIDTH=width, SPLITS=splits, CHUNK=chunk, **same)

    kernel = paging.attend_entries if width == 1 else paging.attend_tiles
    again(kernel, tensors, (scale, m, g, width, page, splits, keys, warps, stages), build)
    return out, lse


@functools.lru_cache(maxsize=256)
def _entries_plan(index: int | None, rows: int, n: int, d: int, dv: int, size: int) -> tuple[int, int, int]:
    """(splits, entries of a step, stages) for `rows` lists of n single entries: programs of as many steps each, at least as
    many as are asked for at once, and no more programs than the device runs together. What they found is merged by one."""
    shared, cores = device(index)
    wide = max(_pad(d), _pad(dv))
    keys, stages = (ENTRIES if wide <= 128 else ENTRIES // 2) // (1 + (size == 4)), ENTRY_STAGES
    keys = max(16, min(keys, power_of_2(n)))
    while (2 * keys * (stages - 1) + 16) * wide * size > 0.9 * shared and (stages > 2 or keys > 16):
        keys, stages = (keys, stages - 1) if stages > 2 else (keys // 2, stages)
    steps = -(-n // keys)
    share = -(-steps // max(1, min(ENTRY_SHARE * cores // rows, 128)))  # steps of a program
    share = max(share, min(steps, stages - 1))
    return -(-steps // share), keys, stages


@functools.lru_cache(maxsize=256)
def _plan(
    index: int | None, rows: int, listed: int, tile: int, d: int, dv: int, size: int, paged: bool
) -> tuple[int, int, int, int]:
    """(splits, keys, warps, stages) for `rows` lists of `listed` keys: SHARE programs a multiprocessor."""
    shared, cores = device(index)
    cfg = config(shared, tile, _pad(d), _pad(dv), size, 1 + paged)
    splits = max(1, min(SHARE * cores // rows, -(-listed // cfg.keys), 128))
    return splits, cfg.keys, cfg.warps, cfg.stages + MORE


def _storage(t: Tensor, kv: KV) -> tuple[int, int, int, int, int]:
    """(stride of a row or page, of a kv head, of an entry, keys of a page, pages of a table) of keys or values."""
    if kv.kind == "dense":
        return t.stride(0), t.stride(1), t.stride(2), 0, 0
    assert kv.table is not None
    return t.stride(0), 0, t.stride(1), t.shape[1], kv.table.shape[2]


def _tight(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
