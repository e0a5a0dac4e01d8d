"""One step's new entry into the rings of a fixed quantised store, and the value that leaves its ring into codes.

What `codes.quantise` and `codes.pack` do to one value a row and kv head, in one launch instead of two dozen.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .paging_launch import _pad, usable

HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds a small fp32 number, ties to even

__all__ = ["append", "append_codes", "serves", "usable"]


@triton.jit(do_not_specialize=["size", "rows", "few"])
def append_codes(
    k, v, k_tail, v_tail, codes, scale, low, now, since,
    size, rows, few, kv_heads, k_sb, k_sg, v_sb, v_sg,
    RESIDUAL: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, N_PAD: tl.constexpr,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TINY: tl.constexpr,  # the smallest scale
):  # fmt: skip
    """A row and kv head a program. grid: (B * G,).

    k, v `[B, G, 1, D]`; now, since int64 `[B]`; tails `[B, G, RESIDUAL, D]` and `[B, G, RESIDUAL + 1, DV]`; codes
    `[B, G, rows, W]`, scale and low `[B, G, few, DV / GROUP]`, whose place `size` nobody reads.
    """
    row = tl.program_id(0)
    b = row // kv_heads
    g = row % kv_heads
    wide = row.to(tl.int64)
    n = tl.load(now + b).to(tl.int32)
    most: tl.constexpr = 2**BITS - 1
    count: tl.constexpr = DV // GROUP
    d = tl.arange(0, D_PAD)
    new = tl.load(k + b.to(tl.int64) * k_sb + g.to(tl.int64) * k_sg + d, mask=d < D)
    tl.store(k_tail + (wide * RESIDUAL + n % RESIDUAL) * D + d, new, mask=d < D)
    v_tail += (wide * (RESIDUAL + 1) + n % (RESIDUAL + 1)) * DV
    old = n - RESIDUAL - 1
    at = tl.where(old >= tl.load(since + b).to(tl.int32), old, size)
    scale += (wide * few + at) * count
    low += (wide * few + at) * count
    i = tl.arange(0, N_PAD)
    c = tl.arange(0, GROUP_PAD)
    ok = (i < count)[:, None] & (c < GROUP)[None, :]
    x = tl.load(v_tail + i[:, None] * GROUP + c[None, :], mask=ok, other=0.0).to(tl.float32)
    bottom = tl.min(tl.where(ok, x, float("inf")), 1)
    top = tl.max(tl.where(ok, x, float("-inf")), 1)
    step = tl.div_rn(top - bottom, tl.zeros_like(top) + most).to(scale.dtype.element_ty).to(tl.float32)
    tl.store(scale + i, tl.maximum(step, TINY).to(scale.dtype.element_ty), mask=i < count)
    tl.store(low + i, bottom.to(low.dtype.element_ty), mask=i < count)
    tl.debug_barrier()  # the other warps read them below
    j = tl.arange(0, W_PAD)
    byte = tl.zeros([W_PAD], tl.int32)
    for part in tl.static_range(8 // BITS):
        channel = part * W + j
        x = tl.load(v_tail + channel, mask=j < W, other=0.0).to(tl.float32)
        l = tl.load(low + channel // GROUP, mask=j < W, other=0.0).to(tl.float32)
        s = tl.load(scale + channel // GROUP, mask=j < W, other=1.0).to(tl.float32)
        y = tl.div_rn(x - l, s)
        y = tl.minimum(tl.maximum((y + HALF) - HALF, 0.0), most)
        byte = byte | (y.to(tl.int32) << (BITS * part))
    tl.store(codes + (wide * rows + at) * W + j, byte.to(tl.uint8), mask=j < W)
    tl.debug_barrier()  # the value that leaves has been read
    d = tl.arange(0, DV_PAD)
    new = tl.load(v + b.to(tl.int64) * v_sb + g.to(tl.int64) * v_sg + d, mask=d < DV)
    tl.store(v_tail + d, new, mask=d < DV)


def serves(k: Tensor, v: Tensor, keys: Any, values: Any) -> bool:
    """Whether `append` serves these new entries and rings (`cache.fixed_quantised.Ring`)."""
    same = k.dtype == keys.tail.dtype == v.dtype == values.tail.dtype
    return same and usable(k) and usable(v) and values.bits <= 8 and k.stride(-1) == 1 and v.stride(-1) == 1


def append(k: Tensor, v: Tensor, keys: Any, values: Any, now: Tensor) -> None:
    """Entry now int64 `[B]` of each row: k, v `[B, G, 1, D]` into the rings, the value whose slot it takes into codes."""
    b, g, _, d = k.shape
    dv, w, group = v.shape[3], values.codes.shape[3], values.group
    append_codes[(b * g,)](
        k, v, keys.tail, values.tail, values.codes, values.scale, values.low, now, values.since,
        values.size, values.codes.shape[2], values.scale.shape[2], g, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        RESIDUAL=keys.width, BITS=values.bits, GROUP=group, GROUP_PAD=triton.next_power_of_2(group),
        N_PAD=triton.next_power_of_2(dv // group), W=w, W_PAD=triton.next_power_of_2(w), D=d, D_PAD=_pad(d),
        DV=dv, DV_PAD=_pad(dv), TINY=torch.finfo(v.dtype).tiny, num_warps=1,
    )  # fmt: skip
