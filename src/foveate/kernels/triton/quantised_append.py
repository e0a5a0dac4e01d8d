"""One step's new entry into the rings of a fixed quantised store, and the value that leaves its ring into codes.

What `codes.quantise` and `codes.pack` do to one value a row and kv head, in one launch instead of two dozen. And the bounds
of the page that the new key joins, from the keys that attention will read: those of `paging.update_bounds`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...packed import CodedPair, PackedKV
from .paging_launch import _pad, usable
from .quantised_decode import _begin, _channels, _coded, _late

HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: added and taken away, it rounds a small fp32 number, ties to even

__all__ = ["append", "append_codes", "bounds_of_codes", "serves", "update", "usable"]


@triton.jit(do_not_specialize=["size", "rows", "few"])
def append_codes(
    k, v, k_tail, v_tail, codes, scale, low, each, now, settled, seen, k_since, since, said, k_done, v_done,
    size, rows, few, kv_heads, k_sb, k_sg, v_sb, v_sg,
    RESIDUAL: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, N_PAD: tl.constexpr,
    W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    TINY: tl.constexpr,  # the smallest scale
):  # fmt: skip
    """A row and kv head a program. grid: (B * G,).

    k, v `[B, G, 1, D]`; each int32 `[B, G]`, entries so far, counts the new one, as now, settled and seen int64 `[B]` do,
    which no program reads but the one that writes them. said `[B, G]`, k_done and v_done `[B]` are what `packed.Coded` wants
    of the step; k_since and since int64 `[B]`; tails `[B, G, RESIDUAL, D]` and `[B, G, RESIDUAL + 1, DV]`; codes
    `[B, G, rows, W]`, scale and low `[B, G, few, DV / GROUP]`, whose place `size` nobody reads.
    """
    row = tl.program_id(0)
    b = row // kv_heads
    g = row % kv_heads
    wide = row.to(tl.int64)
    n = tl.load(each + row)
    born = tl.load(since + b).to(tl.int32)
    most: tl.constexpr = 2**BITS - 1
    count: tl.constexpr = DV // GROUP
    d = tl.arange(0, D_PAD)
    new = tl.load(k + b.to(tl.int64) * k_sb + g.to(tl.int64) * k_sg + d, mask=d < D)
    tl.store(k_tail + (wide * RESIDUAL + n % RESIDUAL) * D + d, new, mask=d < D)
    v_tail += (wide * (RESIDUAL + 1) + n % (RESIDUAL + 1)) * DV
    old = n - RESIDUAL - 1
    at = tl.where(old >= born, old, size)
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
    tl.store(each + row, n + 1)
    tl.store(said + row, n + 1)
    if g == 0:
        tl.store(now + b, (n + 1).to(tl.int64))
        tl.store(settled + b, n.to(tl.int64))
        tl.store(seen + b, tl.load(seen + b) + 1)
        tl.store(k_done + b, tl.maximum(n // RESIDUAL * RESIDUAL, tl.load(k_since + b).to(tl.int32)).to(tl.int64))
        tl.store(v_done + b, tl.maximum(n - RESIDUAL, born).to(tl.int64))


def serves(k: Tensor, v: Tensor, keys: Any, values: Any) -> bool:
    """Whether `append` serves these new entries and rings (`cache.fixed_quantised.Ring`)."""
    same = k.dtype == keys.tail.dtype == v.dtype == values.tail.dtype
    return same and usable(k) and usable(v) and values.bits <= 8 and k.stride(-1) == 1 and v.stride(-1) == 1


def append(
    k: Tensor, v: Tensor, keys: Any, values: Any, each: Tensor, now: Tensor, settled: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One entry of each row: k, v `[B, G, 1, D]` into the rings, the value whose slot it takes into codes, and the counts of
    `FixedQuantised`. Returns tensors of their own: int32 `[B, G]` entries, int64 `[B]` keys and values that are coded."""
    b, g, _, d = k.shape
    dv, w, group = v.shape[3], values.codes.shape[3], values.group
    said, (k_done, v_done) = torch.empty_like(each), torch.empty(2, b, dtype=torch.int64, device=k.device)
    append_codes[(b * g,)](
        k, v, keys.tail, values.tail, values.codes, values.scale, values.low, each, now, settled, seen, keys.since,
        values.since, said, k_done, v_done,
        values.size, values.codes.shape[2], values.scale.shape[2], g, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        RESIDUAL=keys.width, BITS=values.bits, GROUP=group, GROUP_PAD=triton.next_power_of_2(group),
        N_PAD=triton.next_power_of_2(dv // group), W=w, W_PAD=triton.next_power_of_2(w), D=d, D_PAD=_pad(d),
        DV=dv, DV_PAD=_pad(dv), TINY=torch.finfo(v.dtype).tiny, num_warps=1,
    )  # fmt: skip
    return said, k_done, v_done


@triton.jit(do_not_specialize=["covered_n", "size_n", "rows", "few", "tail_rows", "ring"])
def bounds_of_codes(
    codes, scale, low, tail, done, covered, coded, length, data, covered_n, size_n,
    kv_heads, data_rows, rows, few, tail_rows, ring,
    WIDTH: tl.constexpr, KEYS: tl.constexpr,  # entries of a page of bounds, and of a step over one
    BITS: tl.constexpr, GROUP: tl.constexpr, W: tl.constexpr, W_PAD: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Bounds of the pages that hold entries from `covered` on, as `paging.update_bounds` makes them, and of those whose keys
    have become codes since `coded` said how many were. grid: (B * G,).

    Keys are those of `packed.Coded`, contiguous; done int64 `[B]`; coded int32 `[B, G]`, which this brings up to date.
    """
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    size = size_n
    if length is not None:
        size = tl.load(length + row).to(tl.int32)
    was = covered_n
    if covered is not None:
        was = tl.load(covered + row).to(tl.int32)
    old = tl.load(done + row // kv_heads).to(tl.int32)
    before = tl.load(coded + row)
    tl.debug_barrier()  # every warp has read both before one of them writes them below
    was = tl.where(before == old, was, tl.minimum(was, tl.minimum(before, old)))
    codes, scale, low, tail = _begin(codes, scale, low, tail, wide, rows, few, tail_rows, W, D, D)
    c, c_ok = _channels(BITS, W, W_PAD)
    data += wide * data_rows * (2 * D)
    for page in range(was // WIDTH, tl.cdiv(size, WIDTH)):
        high = tl.full([8 // BITS * W_PAD], float("-inf"), tl.float32)
        bottom = tl.full([8 // BITS * W_PAD], float("inf"), tl.float32)
        for part in range(0, WIDTH, KEYS):
            i = part + tl.arange(0, KEYS)
            key = page * WIDTH + i
            ok = (i < WIDTH) & (key < size)
            late = ok & (key >= old)
            x = _late(tail, key, late, old, ring, c, c_ok, D)
            if page * WIDTH + part < old:
                there = ok & (key < old)
                y = _coded(
                    codes, scale, low, tail, key, there, c, c_ok, KEYS, BITS, W, W_PAD, GROUP, D, True, False, True
                )  # fmt: skip
                x = tl.where(late[:, None], x, y)
            x = x.to(tl.float32)
            high = tl.maximum(high, tl.max(tl.where(ok[:, None], x, float("-inf")), 0))
            bottom = tl.minimum(bottom, tl.min(tl.where(ok[:, None], x, float("inf")), 0))
        at = data + page * (2 * D) + c
        tl.store(at, high.to(data.dtype.element_ty), mask=c_ok)
        tl.store(at + D, bottom.to(data.dtype.element_ty), mask=c_ok)
    tl.store(coded + row, old)
    if covered is not None:
        tl.store(covered + row, size.to(covered.dtype.element_ty))


def update(kv: PackedKV, data: Tensor, width: int, covered: Tensor | int, coded: Tensor) -> None:
    """`paging_launch.update` for keys in codes, of which it unpacks those of the pages that changed. coded: int32 `[B, G]`,
    contiguous, how many keys were codes at the last call; brought up to date."""
    assert isinstance(kv.packed, CodedPair)
    (b, g, m, d, _), x = kv.shape, kv.packed.keys
    here, w = isinstance(covered, Tensor), x.codes.shape[3]
    bounds_of_codes[(b * g,)](
        *(t.contiguous() for t in (x.codes, x.scale, x.low, x.tail)), x.done, covered if here else None, coded,
        kv.len.contiguous() if here and kv.len is not None else None, data, 0 if here else covered, m,
        g, data.shape[2], x.codes.shape[2], x.scale.shape[2], x.tail.shape[2], x.ring,
        WIDTH=width, KEYS=min(32, triton.next_power_of_2(width)), BITS=x.bits, GROUP=x.group, W=w,
        W_PAD=triton.next_power_of_2(w), D=d, num_warps=4,
    )  # fmt: skip
