"""The `packed` backend: dense decode over entries that a store keeps packed, without unpacking a layer first.

Considered for views of `PackedKV` only. Quantised entries go to a Triton kernel on a GPU (`triton/quantised_launch.py`);
the form below, the law, unpacks pieces of bounded size. Pruned keys become two softmaxes, one over the channels that
older keys still have.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from ..combine import merge
from ..kv import KV
from ..layout import Layout
from ..packed import CodedPair, PackedKV, Thinned
from .base import Want

NAME = "packed"
BUDGET = 1 << 22  # numbers unpacked at a time: keys and values of a piece stay near the processor


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if not isinstance(kv, PackedKV) or kv.packed is None:
        return "entries are stored as they are"
    if kv.made:
        return "keys and values are unpacked already"
    if q.shape[2] != 1 or not layout.full:
        return "it serves one query a row over all entries"
    if want.mass or want.grad or want.softcap:
        return "it returns no mass, has no gradient and no softcap"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    assert isinstance(kv, PackedKV) and kv.packed is not None
    bias, packed = visible(kv, layout), kv.packed
    if isinstance(packed, Thinned):
        out, lse = _thinned(q, kv, packed, bias, scale)
        return out, lse, None
    if (fused := _kernel(q)) is not None and fused.serves(q, packed):
        return *fused.attend(q, kv, packed, bias, scale, want.lse), None
    out, lse = _coded(q, kv, packed, bias, scale)
    return out, lse, None


def visible(kv: KV, layout: Layout) -> Tensor | None:
    """fp32 `[B, G, M]`: what is added to logits, -inf for entries ahead of the query; None for nothing."""
    bias = None if kv.bias is None else kv.bias.float()
    if not layout.causal or (layout.q_pos is None and kv.pos is None):
        return bias
    ahead = kv.positions() > layout.query_positions(kv)[..., :1]
    none = torch.zeros((), device=kv.device) if bias is None else bias
    return torch.where(ahead, float("-inf"), none)


def _kernel(q: Tensor) -> ModuleType | None:
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return None
    try:
        from .triton import quantised_launch
    except ImportError:
        return None
    return quantised_launch


def _coded(q: Tensor, kv: KV, packed: CodedPair, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmaxes over pieces of what is coded on both sides, and over the entries whose values are not."""
    b, g, m, d, dv = kv.shape
    keys, values, group = packed.keys, packed.values, packed.keys.group
    length, done = kv.lengths()[:, 0], values.done
    most = min(m, keys.codes.shape[2], values.codes.shape[2])
    step = max(1, BUDGET // (b * g * (d + dv)) // group) * group
    parts = []
    for lo in range(0, most // group * group, step):
        hi = min(lo + step, most // group * group)
        near = None if bias is None else bias[:, :, lo:hi]
        parts.append(_dense(q, keys.piece(lo, hi), values.piece(lo, hi), done - lo, near, scale))
    # A row may have up to a group less one of coded entries beyond the last whole piece.
    rest = most // group * group
    late = done.clamp(max=rest)
    width = packed.recent + most - rest
    e = late[:, None] + torch.arange(width, device=q.device)
    near = None
    if bias is not None:
        near = bias.gather(2, e.clamp(max=m - 1)[:, None].expand(b, g, width))
    parts.append(_dense(q, keys.at(e), values.at(e), length - late, near, scale))
    return merge(parts)


def _thinned(q: Tensor, kv: KV, packed: Thinned, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    b, h, _, d = q.shape
    g, m, few, t = kv.shape[1], kv.capacity, packed.few.shape[2], packed.tail.shape[2]
    x = q.view(b, g, h // g, d)
    thin = x.gather(3, packed.channels[:, :, None].expand(b, g, h // g, -1)).view(b, h, 1, -1)
    length, done = kv.lengths()[:, 0], packed.done
    old = None if bias is None else bias[:, :, :few]
    parts = [_dense(thin, packed.few, packed.v[:, :, :few], done, old, scale)]
    if packed.even is not None:
        t = min(t, packed.v.shape[2] - packed.even)
    if t == 0:  # pruned to the last entry, and none is new
        return parts[0]
    if packed.even is not None:
        span = slice(packed.even, packed.even + t)
        v, near = packed.v[:, :, span], None if bias is None else bias[:, :, span]
    else:  # rows whose tails begin at different entries
        e = (done[:, None] + torch.arange(t, device=q.device)).clamp(max=m - 1)[:, None].expand(b, g, t)
        v = packed.v.gather(2, e[..., None].expand(b, g, t, packed.v.shape[3]))
        near = None if bias is None else bias.gather(2, e)
    parts.append(_dense(q, packed.tail[:, :, :t], v, length - done, near, scale))
    return merge(parts)


def _dense(q: Tensor, k: Tensor, v: Tensor, length: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One query a row over the first `length` int64 `[B]` of these entries (0 for less): out and lse."""
    from .dispatch import attend

    b, g, n, _ = k.shape
    size = length.clamp(0, n).int()[:, None].expand(b, g).contiguous()
    plan = Layout.dense(b, q.shape[1], 1, n, causal=False)
    out, lse = attend(q, KV(k, v, "dense", n, len=size, bias=bias), plan, scale=scale, return_lse=True)
    return out, lse
