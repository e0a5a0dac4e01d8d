"""Dense layouts on PyTorch's own scaled_dot_product_attention: the baseline, and the fall-back when nothing is dropped."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..kv import KV
from ..layout import Layout
from .base import Want

NAME = "sdpa"
ROWS = 1024  # rows of queries that share one boolean mask when the queries are not square with the keys


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if not layout.full:
        return "it computes dense layouts only"
    if kv.kind != "dense":
        return f"it reads dense storage, not {kv.kind}"
    if kv.len is not None or kv.bias is not None:
        return "rows of different length or entry weights need a mask of N x M"
    if layout.causal and not _sees_all_before(kv, layout):
        return "positions are not entry numbers"
    if want.lse or want.mass or want.softcap:
        return "it returns neither lse nor mass and has no softcap"
    if q.dtype == torch.float64 and q.device.type == "cuda":
        return "no fp64 kernel"
    return None


def _sees_all_before(kv: KV, layout: Layout) -> bool:
    """Row i sees exactly the entries up to M - N + i. Asked of the data where that costs no synchronisation."""
    _, _, n, m = layout.shape
    if layout.q_pos is None and kv.pos is None:
        return True
    if kv.device.type != "cpu" or torch.compiler.is_compiling() or (n > 1 and kv.pos is not None):
        return False
    if kv.pos is None:
        assert layout.q_pos is not None
        return bool((layout.q_pos == torch.arange(m - n, m)).all())
    newest = layout.query_positions(kv)  # one row, of which every entry must lie behind
    return bool((kv.pos <= newest).all())


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    k, v = kv.k, kv.v
    b, h, n, d = q.shape
    g, m = k.shape[1], k.shape[2]
    if n == 1 or not layout.causal:
        if h != g and q.device.type == "cpu":  # the r heads of a group as r query rows: K and V are read once
            packed = q.reshape(b, g, (h // g) * n, d)
            out = scaled_dot_product_attention(packed, k, v, scale=scale)
            return out.reshape(b, h, n, v.shape[-1]), None, None
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=h != g), None, None
    if n == m:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=h != g), None, None
    out = q.new_empty(b, h, n, v.shape[-1])
    for lo in range(0, n, ROWS):
        hi = min(n, lo + ROWS)
        end = m - n + hi  # no row of this piece sees a key beyond
        if end <= 0:
            out[:, :, lo:hi] = 0
            continue
        rows = torch.arange(m - n + lo, end, device=q.device)
        mask = torch.arange(end, device=q.device) <= rows[:, None]
        piece = scaled_dot_product_attention(
            q[:, :, lo:hi], k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale, enable_gqa=h != g
        )
        out[:, :, lo:hi] = piece if m >= n else piece.masked_fill(~mask.any(-1)[:, None], 0)
    return out, None, None
