"""Launches of `quantised_decode.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...packed import CodedPair, PackedKV
from . import quantised_decode, walk
from .config import device
from .paging_launch import _pad, usable

SHARE, KEYS, WARPS, STAGES = 4, 32, 4, 3  # programs a multiprocessor, keys of a step; of a program
HEADS = 64  # most query heads of a kv head
FEW = quantised_decode.FEW.value  # most groups of a token's channels


def serves(q: Tensor, packed: CodedPair) -> bool:
    """Whether `attend` computes on these codes: device, dtype, widths, and bits of both sides."""
    keys, values = packed.keys, packed.values
    return (
        usable(q)
        and usable(values.tail)
        and q.dtype == keys.tail.dtype == values.tail.dtype
        and keys.by == "token"
        and values.by == "channel"
        and max(keys.bits, values.bits) <= 8
        and values.tail.shape[3] <= values.group * FEW  # a scale for every channel came out wrong on Triton 3.6 (H100)
        and q.shape[1] // keys.tail.shape[1] <= HEADS
        and max(x.codes.shape[2] * x.tail.shape[3] for x in (keys, values)) < 1 << 31
    )


def attend(
    q: Tensor, kv: PackedKV, packed: CodedPair, bias: Tensor | None, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, 1, Dv]` and lse `[B, H, 1]` or None over all entries of `kv`; bias fp32 `[B, G, M]` is added to logits."""
    b, h, _, d = q.shape
    _, g, m, _, dv = kv.shape
    keys, values = packed.keys, packed.values
    if scale < 0:  # the kernel scales the maximum of a row
        q, scale = -q, -scale
    q = q if q.stride(-1) == 1 else q.contiguous()
    length = kv.len if kv.len is not None else torch.full((b, g), m, dtype=torch.int32, device=q.device)
    step = KEYS
    _, cores = device(q.device.index if q.device.type == "cuda" else None)
    splits = max(1, min(SHARE * cores // (b * g), -(-m // (2 * step)), 128))
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device) if want_lse else None
    part, part_lse = out, lse
    if splits > 1:
        both = torch.empty(b * h * splits * (dv + 1), dtype=torch.float32, device=q.device)
        part, part_lse = both, both[b * h * splits * dv :]
    sides, numbers, shapes = described(packed)
    quantised_decode.attend_codes[(splits, b * g)](
        q, part, part_lse, *sides[0], *sides[1],
        keys.done, values.done, length.contiguous(), None if bias is None else bias.contiguous(),
        max(scale, 1e-30) * math.log2(math.e), m, g, q.stride(0), q.stride(1), *numbers[0], *numbers[1],
        *shapes[0], d, *shapes[1], dv,
        PACK=h // g, TILE=_pad(h // g), KEYS=step, SPLITS=splits, BIAS=bias is not None, LSE=want_lse or splits > 1,
        FP32=q.dtype == torch.float32, STAGES=STAGES, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if splits > 1:
        walk.reduce_splits[(b * h,)](
            part, part_lse, out, lse, splits, triton.next_power_of_2(splits), dv, _pad(dv), want_lse, num_warps=4
        )
    return out, lse


def described(
    packed: CodedPair,
) -> tuple[list[list[Tensor]], list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    """Of keys and of values: (tensors, slots of a kv head, (bits, group, bytes of an entry, the same padded))."""
    both = (packed.keys, packed.values)
    sides = [[t.contiguous() for t in (x.codes, x.scale, x.low, x.tail)] for x in both]
    numbers = [(x.codes.shape[2], x.scale.shape[2], x.tail.shape[2], x.ring) for x in both]
    padded = [int(triton.next_power_of_2(max(16 * x.bits // 8, x.codes.shape[3]))) for x in both]
    shapes = [(x.bits, x.group, x.codes.shape[3], n) for x, n in zip(both, padded, strict=True)]
    return sides, numbers, shapes
