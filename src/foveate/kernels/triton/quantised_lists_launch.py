"""Launches of `quantised_lists.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...layout import Layout
from ...packed import CodedPair, PackedKV
from . import arrivals, quantised_lists
from .config import device
from .paging_launch import _pad, listed
from .quantised_launch import KEYS, STAGES, WARPS, described

SHARE = 4  # programs a multiprocessor


def attend(
    q: Tensor, kv: PackedKV, packed: CodedPair, layout: Layout, bias: Tensor | None, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, 1, Dv]` and lse `[B, H, 1]` or None over the listed entries of `kv`.

    For what `quantised_launch.serves` and `kernels.packed.supports` accept. bias fp32 `[B, G, M]` is added to logits.
    """
    b, h, _, d = q.shape
    _, g, m, _, dv = kv.shape
    tiles, count, width = listed(layout)
    assert tiles is not None and count is not None
    if scale < 0:  # the kernel scales the maximum of a row
        q, scale = -q, -scale
    q = q if q.stride(-1) == 1 else q.contiguous()
    lists, n = tiles.shape[1], tiles.shape[-1]
    units = max(lists, g)
    pack = triton.next_power_of_2(h // units)
    _, cores = device(q.device.index if q.device.type == "cuda" else None)
    splits = max(1, min(SHARE * cores // (b * units), -(-n * width // (2 * KEYS)), 128))
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device) if want_lse else None
    part = part_lse = arrived = None
    if splits > 1:
        part = torch.empty(b * h * splits * (dv + 1), dtype=torch.float32, device=q.device)
        part_lse, arrived = part[b * h * splits * dv :], arrivals.counters(b * units, part)
    sides, numbers, shapes = described(packed)
    wide = 8 // shapes[1][0] * shapes[1][3]  # values, padded
    quantised_lists.attend_listed[(splits, b * units)](
        q, out, lse, part, part_lse, arrived, *sides[0], *sides[1],
        packed.keys.done, packed.values.done, None if kv.len is None else kv.len.contiguous(),
        None if bias is None else bias.contiguous(), tiles.contiguous(), count.contiguous(),
        max(scale, 1e-30) * math.log2(math.e), m, units, g, lists, lists if tiles.shape[0] > 1 else 0, n,
        q.stride(0), q.stride(1), *numbers[0], *numbers[1], *shapes[0], d, *shapes[1], dv,
        WIDTH=width, PACK=h // units, PACK_PAD=pack, TILE=_pad(h // units), KEYS=KEYS, SPLITS=splits,
        CHUNK=arrivals.chunk(pack, wide, WARPS), BIAS=bias is not None, LSE=want_lse,
        FP32=q.dtype == torch.float32, STAGES=STAGES, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out, lse
