"""Launches of `thinned.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ...layout import Layout
from ...packed import PackedKV, Thinned
from . import arrivals, thinned
from .config import config, device
from .paging_launch import _pad, listed, usable

SHARE = 4  # programs a multiprocessor
HEADS, FEW = 64, 16  # most query heads of a kv head; of fp32, whose products hold them twice

__all__ = ["attend", "serves", "update", "usable"]


def serves(q: Tensor, packed: Thinned) -> bool:
    """Whether `attend` computes on these entries: device, dtype, head dims."""
    tail, v = packed.tail, packed.v
    same = q.dtype == packed.few.dtype == tail.dtype == v.dtype
    return same and usable(q) and usable(v) and q.shape[1] // v.shape[1] <= (FEW if q.element_size() == 4 else HEADS)


def attend(
    q: Tensor, kv: PackedKV, packed: Thinned, layout: Layout, bias: Tensor | None, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """out `[B, H, 1, Dv]` and lse `[B, H, 1]` or None over the listed entries of `kv`.

    For what `serves` and `kernels.packed.supports` accept. bias fp32 `[B, G, M]` is added to logits.
    """
    b, h, _, d = q.shape
    _, g, m, _, dv = kv.shape
    tiles, count, width = listed(layout)
    assert tiles is not None and count is not None
    if scale < 0:  # the kernel scales the maximum of a row
        q, scale = -q, -scale
    few = packed.few if packed.wide is None else packed.wide
    q, few, tail, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, few, packed.tail, packed.v))
    lists, n, narrow, wide = tiles.shape[1], tiles.shape[-1], packed.few.shape[3], few.shape[3]
    units = max(lists, g)
    pack = triton.next_power_of_2(h // units)
    shared, cores = device(q.device.index if q.device.type == "cuda" else None)
    cfg = config(shared, _pad(h // units), _pad(d), _pad(dv), q.element_size(), 1)
    keys = min(cfg.keys, 32)  # a step with old and recent keys holds three blocks
    splits = max(1, min(SHARE * cores // (b * units), -(-n * width // (2 * keys)), 128))
    out = torch.empty(b, h, 1, dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(b, h, 1, dtype=torch.float32, device=q.device) if want_lse else None
    part = part_lse = arrived = None
    if splits > 1:
        part = torch.empty(b * h * splits * (dv + 1), dtype=torch.float32, device=q.device)
        part_lse, arrived = part[b * h * splits * dv :], arrivals.counters(b * units, part)
    thinned.attend_thinned[(splits, b * units)](
        q, out, lse, part, part_lse, arrived, few, packed.channels.contiguous(), tail, v, packed.done,
        None if kv.len is None else kv.len.contiguous(), None if bias is None else bias.contiguous(),
        tiles.contiguous(), count.contiguous(), max(scale, 1e-30) * math.log2(math.e), m,
        units, g, lists, lists if tiles.shape[0] > 1 else 0, n, q.stride(0), q.stride(1),
        *few.stride()[:3], *tail.stride()[:3], *v.stride()[:3],
        F=narrow, WIDE=wide, F_PAD=_pad(wide), D=d, D_PAD=_pad(d), DV=dv, DV_PAD=_pad(dv), WIDTH=width,
        PACK=h // units, PACK_PAD=pack, TILE=_pad(h // units), KEYS=keys, SPLITS=splits,
        CHUNK=arrivals.chunk(pack, _pad(dv), cfg.warps), BIAS=bias is not None, LSE=want_lse,
        FP32=q.dtype == torch.float32, STAGES=cfg.stages, num_warps=cfg.warps, num_stages=cfg.stages,
    )  # fmt: skip
    return out, lse


def update(kv: PackedKV, data: Tensor, width: int, covered: Tensor | int) -> None:
    """`paging_launch.update` for keys without some of their channels, of which no layer is put together."""
    x = kv.packed
    assert isinstance(x, Thinned)
    (b, g, m, d, _), here, narrow = kv.shape, isinstance(covered, Tensor), x.few.shape[3]
    few, tail = (t if t.stride(-1) == 1 else t.contiguous() for t in (x.few, x.tail))
    thinned.bounds_of_thinned[(b * g,)](
        few, x.channels.contiguous(), tail, x.done, covered if here else None,
        kv.len.contiguous() if here and kv.len is not None else None, data, 0 if here else covered, m,
        g, data.shape[2], *few.stride()[:3], *tail.stride()[:3],
        WIDTH=width, WIDTH_PAD=triton.next_power_of_2(width), F=narrow, F_PAD=_pad(narrow), D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip
