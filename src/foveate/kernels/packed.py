"""The `packed` backend: decode over all or listed entries that a store keeps packed, without unpacking a layer first.

Considered for views of `PackedKV` only. Quantised entries go to Triton kernels on a GPU (`triton/quantised_launch.py`,
`triton/quantised_lists_launch.py`); the forms below, the law, unpack pieces of bounded size. Pruned keys become two
softmaxes, one over the channels that older keys still have; where entries are listed, only those are put together, or on a
GPU met where they lie (`triton/thinned_launch.py`). A rule is listed first (`packed_rules.py`).
"""

from __future__ import annotations

import importlib
import math
import os
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kv import KV
from ..layout import Layout
from ..lists import RULE_FIELDS, repeat_heads
from ..packed import CodedPair, PackedKV, Thinned
from . import packed_rules
from .base import Want
from .join import joined

NAME = "packed"
BUDGET = 1 << 22  # numbers unpacked at a time: keys and values of a piece stay near the processor


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if not isinstance(kv, PackedKV) or kv.packed is None:
        return "entries are stored as they are"
    if kv.made:
        return "keys and values are unpacked already: a plan that reads raw keys, as scores of all keys do, unpacks them"
    if q.shape[2] != 1:
        return "it serves one query a row"
    if not layout.full and (why := _unlisted(q, kv, layout)) is not None:
        return why
    if want.mass or want.grad or want.softcap:
        return "it returns no mass, has no gradient and no softcap"
    return None


def _unlisted(q: Tensor, kv: PackedKV, layout: Layout) -> str | None:
    """Why it does not serve this layout of one query a row, which is not dense."""
    if layout.diagonals is not None or layout.columns is not None:
        return "it serves no diagonals and columns, only a rule and listed tiles or entries"
    x = layout.entries if layout.tiles is None else layout.tiles
    if layout.tiles is not None and layout.entries is not None:
        return "it serves either tiles or single entries"
    if layout.has_rule:
        if (why := packed_rules.why_not(layout, kv)) is not None:
            return why
        if _lists(q, kv) is None:
            if q.device.type == "cuda":  # whose lists are as long as the capacity
                return "it serves a rule where a kernel serves lists, and there is none for these entries"
            if packed_rules.reach(layout) > packed_rules.MOST:
                return f"without a kernel it serves a rule that names up to {packed_rules.MOST:.0%} of all entries"
    elif x is None:
        return "it serves a rule, tiles or single entries"
    if x is not None and (layout.num_blocks != 1 or x.shape[-1] == 0):
        return "it serves lists of one query, with a place for a tile or entry"
    named, groups = (x, *(getattr(layout, name) for name in RULE_FIELDS)), kv.shape[1]
    lists = math.lcm(*(t.shape[1] for t in named if t is not None))
    if lists % groups and groups % lists:
        return f"it serves a list for several kv heads or for heads of one, not {lists} lists for {groups} kv heads"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    assert isinstance(kv, PackedKV) and kv.packed is not None
    bias, packed = visible(kv, layout), kv.packed
    if not layout.full:
        kernels = _lists(q, kv)
        rules = packed_rules if kernels is None else _kernel(q, "rule_lists")
        assert rules is not None
        parts = rules.listed(layout, kv) if layout.has_rule else [layout]
        if kernels is None:
            return *joined([_listed(q, kv, part, bias, scale) for part in parts]), None
        lse = want.lse or len(parts) > 1
        done = [kernels.attend(q, kv, packed, part, bias, scale, lse) for part in parts]
        return *(done[0] if len(done) == 1 else joined(done)), None
    if isinstance(packed, Thinned):
        return *_thinned(q, kv, packed, bias, scale), None
    if (codes := _kernel(q)) is not None and codes.serves(q, packed):
        return *codes.attend(q, kv, packed, bias, scale, want.lse), None
    return *_coded(q, kv, packed, bias, scale), None


def visible(kv: KV, layout: Layout) -> Tensor | None:
    """fp32 `[B, G, M]`: what is added to logits, -inf for entries ahead of the query; None for nothing."""
    bias = None if kv.bias is None else kv.bias.float()
    if not layout.causal or (layout.q_pos is None and kv.pos is None):
        return bias
    ahead = kv.positions() > layout.query_positions(kv)[..., :1]
    none = torch.zeros((), device=kv.device) if bias is None else bias
    return torch.where(ahead, float("-inf"), none)


def _lists(q: Tensor, kv: PackedKV) -> ModuleType | None:
    """The kernel over lists of these entries, where it serves."""
    coded = isinstance(kv.packed, CodedPair)
    kernels = _kernel(q, "quantised_launch" if coded else "thinned_launch")
    if kernels is None or not kernels.serves(q, kv.packed):
        return None
    return _kernel(q, "quantised_lists_launch") if coded else kernels


def _kernel(q: Tensor, name: str = "quantised_launch") -> ModuleType | None:
    """These launches, where there is a device for them."""
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return None
    try:
        return importlib.import_module(f".triton.{name}", __package__)
    except ImportError:
        return None


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
    return joined(parts)


def _listed(q: Tensor, kv: PackedKV, layout: Layout, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmaxes over pieces of the lists, each over the entries it names, gathered."""
    b, g, m, d, dv = kv.shape
    tiles, count, width = layout.tiles, layout.tile_count, layout.tile_width
    if tiles is None:
        tiles, count, width = layout.entries, layout.entry_count, 1
    assert tiles is not None and count is not None
    units, n = max(tiles.shape[1], g), tiles.shape[-1]
    start = tiles[:, :, 0].long().expand(b, -1, -1)  # [B, lists, n]
    used = torch.arange(n, device=q.device) < count[:, :, :1]
    stop = torch.full_like(start, m)
    stop[:, :, :-1] = torch.where(used[:, :, 1:], start[:, :, 1:], m)
    start, stop, used = (repeat_heads(t.expand(b, -1, -1), units) for t in (start, stop, used))
    size = repeat_heads(kv.lengths(), units)[..., None, None]
    parts, step = [], max(1, BUDGET // (b * units * width * (d + dv)))
    for lo in range(0, n, step):
        hi = min(lo + step, n)
        key = start[:, :, lo:hi, None] + torch.arange(width, device=q.device)
        ok = used[:, :, lo:hi, None] & (key >= 0) & (key < stop[:, :, lo:hi, None]) & (key < size)
        key, ok = torch.where(ok, key, 0).view(b, g, -1), ok.reshape(b, units, -1)
        k, v = (t.reshape(b, units, ok.shape[2], -1) for t in kv.gather(key))
        weight = torch.zeros((), device=q.device) if bias is None else bias.gather(2, key).view(ok.shape)
        near = torch.where(ok, weight, float("-inf"))
        parts.append(_dense(q, k, v, torch.full((b,), ok.shape[2], device=q.device), near, scale))
    return joined(parts)


def _thinned(q: Tensor, kv: KV, packed: Thinned, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    b, h, _, d = q.shape
    g, m, few, t = kv.shape[1], kv.capacity, packed.few.shape[2], packed.tail.shape[2]
    keys = packed.few if packed.wide is None else packed.wide
    x = q.view(b, g, h // g, d)
    thin = x.gather(3, packed.channels[:, :, None].expand(b, g, h // g, -1)).view(b, h, 1, -1)
    thin = pad(thin, (0, keys.shape[3] - thin.shape[3]))
    length, done = kv.lengths()[:, 0], packed.done
    old = None if bias is None else bias[:, :, :few]
    parts = [_dense(thin, keys, packed.v[:, :, :few], done, old, scale)]
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
    return joined(parts)


def _dense(q: Tensor, k: Tensor, v: Tensor, length: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One query a row over the first `length` int64 `[B]` of these entries (0 for less): out and lse."""
    from .dispatch import attend

    b, g, n, _ = k.shape
    size = length.clamp(0, n).int()[:, None].expand(b, g).contiguous()
    plan = Layout.dense(b, q.shape[1], 1, n, causal=False)
    out, lse = attend(q, KV(k, v, "dense", n, len=size, bias=bias), plan, scale=scale, return_lse=True)
    return out, lse
