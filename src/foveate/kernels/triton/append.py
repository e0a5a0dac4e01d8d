"""One token of every row into a dense cache: key, value, length and the bounds of the page it joins, in one launch; or a
few tokens, without bounds.

Everything a step changes in a layer's cache before attention reads it. Lengths are read and written on the device, so the
launch can be captured in a CUDA graph. `paging_launch.py` calls it, for a few tokens `append_launch.py`; page bounds are
those of `paging.update_bounds`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .steps import _read


@triton.jit
def append_token(
    new_k, new_v, k, v, now, seen, said, data, covered,
    groups, nk_s0, nk_sg, nv_s0, nv_sg, k_s0, k_sg, k_sm, v_s0, v_sg, v_sm, data_rows,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,  # keys of a page of bounds
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Write the new key and value of a row and kv head behind its entries. grid: (B * G,).

    new_k, new_v `[B, G, 1, D]`; k, v `[B, G, size, D]`. now int32 `[B, G]`, entries before, becomes one more, also written
    to `said`; seen int64 `[B]` becomes one more. data `[B, G, rows, 2D]` (None: no bounds) is brought up to date from
    `covered` `[B, G]` on, which becomes the new length. Pages are read whole, as `update_bounds` does; the new key comes
    from its registers, since the program's own write may not be visible to its reads yet.
    """
    row = tl.program_id(0)
    b = (row // groups).to(tl.int64)
    g = (row % groups).to(tl.int64)
    at = tl.load(now + row)
    before = tl.load(seen + b)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    key = tl.load(new_k + b * nk_s0 + g * nk_sg + d, mask=d < D, other=0.0)
    value = tl.load(new_v + b * nv_s0 + g * nv_sg + dv, mask=dv < DV, other=0.0)
    k += b * k_s0 + g * k_sg
    v += b * v_s0 + g * v_sg
    tl.store(k + at.to(tl.int64) * k_sm + d, key, mask=d < D)
    tl.store(v + at.to(tl.int64) * v_sm + dv, value, mask=dv < DV)
    if data is not None:
        was = tl.load(covered + row).to(tl.int32)
        i = tl.arange(0, WIDTH_PAD)
        data += row.to(tl.int64) * data_rows * (2 * D)
        for page in range(was // WIDTH, at // WIDTH + 1):
            entry = page * WIDTH + i
            old = (i < WIDTH) & (entry < at)
            here = old | ((i < WIDTH) & (entry == at))
            x = _read(k, tl.where(old, entry, 0).to(tl.int64) * k_sm, old, d, D, D_PAD, True)
            x = tl.where((entry == at)[:, None], key[None, :], x).to(tl.float32)
            high = tl.max(tl.where(here[:, None], x, float("-inf")), 0)
            low = tl.min(tl.where(here[:, None], x, float("inf")), 0)
            to = data + page * (2 * D) + d
            tl.store(to, high.to(data.dtype.element_ty), mask=d < D)
            tl.store(to + D, low.to(data.dtype.element_ty), mask=d < D)
    tl.debug_barrier()  # every warp has read the counts before one of them writes them
    if data is not None:
        tl.store(covered + row, (at + 1).to(covered.dtype.element_ty))
    tl.store(now + row, at + 1)
    tl.store(said + row, at + 1)
    if g == 0:
        tl.store(seen + b, before + 1)


@triton.jit
def append_tokens(
    new_k, new_v, k, v, now, seen, said,
    groups, nk_s0, nk_sg, nk_sn, nv_s0, nv_sg, nv_sn, k_s0, k_sg, k_sm, v_s0, v_sg, v_sm,
    NEW: tl.constexpr, NEW_PAD: tl.constexpr,  # tokens of a row
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """The same for new_k, new_v `[B, G, NEW, D]`, every row having as many, without bounds. grid: (B * G,)."""
    row = tl.program_id(0)
    b = (row // groups).to(tl.int64)
    g = (row % groups).to(tl.int64)
    at = tl.load(now + row)
    before = tl.load(seen + b)
    i = tl.arange(0, NEW_PAD)
    real = (i < NEW)[:, None]
    to = (at + i).to(tl.int64)
    d = tl.arange(0, D_PAD)
    dv = tl.arange(0, DV_PAD)
    key = _read(new_k + b * nk_s0 + g * nk_sg, i.to(tl.int64) * nk_sn, i < NEW, d, D, D_PAD, True)
    value = _read(new_v + b * nv_s0 + g * nv_sg, i.to(tl.int64) * nv_sn, i < NEW, dv, DV, DV_PAD, True)
    k += b * k_s0 + g * k_sg
    v += b * v_s0 + g * v_sg
    tl.store(k + to[:, None] * k_sm + d[None, :], key, mask=real & (d < D)[None, :])
    tl.store(v + to[:, None] * v_sm + dv[None, :], value, mask=real & (dv < DV)[None, :])
    tl.debug_barrier()  # every warp has read the counts before one of them writes them
    tl.store(now + row, at + NEW)
    tl.store(said + row, at + NEW)
    if g == 0:
        tl.store(seen + b, before + NEW)
