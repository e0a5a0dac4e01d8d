"""The `torch` backend: any layout, any storage, any device, in plain PyTorch, forward and backward.

Memory beyond the result is bounded by the constants in `chunks.py` and `rows.py`, whatever the layout. On the CPU gathered
blocks go to PyTorch's own flash attention, which returns the lse and takes a mask; everything else is two batched products.
Dense layouts and sinks with windows over dense storage are read in place, in slices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..combine import merge
from ..kv import KV
from ..layout import Layout
from . import torch_decode
from .base import Want
from .chunks import Chunk, Segment, Work
from .flash import flash, serves
from .rows import Rows

NAME = "torch"
BAND = 256  # query rows that share one slice of a static rule


def supports(q: Tensor, kv: KV, layout: Layout, want: Want) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes fp16, bf16, fp32 and fp64, not {q.dtype}"
    return None


def tiling(layout: Layout) -> tuple[int, int] | None:
    return None


def forward(
    q: Tensor, kv: KV, layout: Layout, *, scale: float, softcap: float, want: Want
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    b, h, n, _ = q.shape
    fused = not softcap and serves(q, kv.v)
    if fused and not want.mass and (done := _direct(q, kv, layout, scale)) is not None:
        return done[0], done[1] if want.lse else None, None
    out = q.new_zeros(b * h * n, kv.v.shape[-1])
    lse = torch.full((b * h * n,), float("-inf"), dtype=_acc(q), device=q.device)
    rows = Rows(q)
    if kv.k.numel():
        for chunk in Work(kv, layout, fused).chunks():
            x = chunk.read(rows)
            parts = [_fused(x, s, scale) if fused else _plain(x, s, scale, softcap) for s in chunk.segments()]
            o, part = merge(parts)
            at = chunk.row_numbers().flatten()
            out.index_copy_(0, at, o.reshape(-1, o.shape[-1]).to(out.dtype))
            lse.index_copy_(0, at, part.reshape(-1))
    lse = lse.view(b, h, n)
    received = mass(q, kv, layout, lse, scale=scale, softcap=softcap) if want.mass else None
    return out.view(b, h, n, -1), lse if want.lse else None, received


def _direct(q: Tensor, kv: KV, layout: Layout, scale: float) -> tuple[Tensor, Tensor] | None:
    """What needs no chunks: static rules and dense layouts over dense storage in slices, and decode."""
    if (rule := _bands(kv, layout)) is not None:
        return _banded(q, kv, layout, rule, scale)
    return torch_decode.attend(q, kv, layout, scale) if layout.shape[2] == 1 and kv.k.numel() else None


def _acc(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------- one segment of a chunk
def _fused(q: Tensor, s: Segment, scale: float) -> tuple[Tensor, Tensor]:
    """out `[I, P, R, Dv]` and lse `[I, P, R]` of queries `[I, P, R, D]` on one segment."""
    i, p, r, d = q.shape
    if s.seen.shape[1] == 1:  # one mask for all rows: the heads of the unit are more rows
        q = q.reshape(i, 1, p * r, d)
    k, v = (t[:, None].expand(-1, q.shape[1], -1, -1) for t in (s.k, s.v))
    out, lse = flash(q, k, v, s.seen[:, None], s.bias, scale)
    return out.reshape(i, p, r, -1), lse.reshape(i, p, r)


def _plain(q: Tensor, s: Segment, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    i, p, r, _ = q.shape
    logits, _ = _logits(q, s, scale, softcap)
    lse = logits.logsumexp(-1)
    prob = torch.exp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    out = prob.flatten(1, 2) @ s.v.to(prob.dtype)
    return out.view(i, p, r, -1), lse


def _logits(q: Tensor, s: Segment, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Logits `[I, P, R, W]`, -inf where unseen, and the derivative of the softcap (None without one)."""
    i, p, r, _ = q.shape
    acc = _acc(q)
    x = (q.to(acc).flatten(1, 2) @ s.k.to(acc).transpose(1, 2)).view(i, p, r, -1) * scale
    slope: Tensor | None = None
    if softcap:
        t = torch.tanh(x / softcap)
        x, slope = softcap * t, 1 - t * t
    if s.bias is not None:
        x = x + s.bias.to(acc)[:, None, None]
    return x.masked_fill(~s.seen[:, None], float("-inf")), slope


def _probabilities(
    q: Tensor, s: Segment, lse: Tensor, fresh: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None]:
    """Probabilities `[I, P, R, W]` for a known lse `[I, P, R]`, 0 on repeated rows, and the slope of the softcap."""
    logits, slope = _logits(q, s, scale, softcap)
    prob = torch.exp(logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None])
    return prob.masked_fill(~(s.seen & fresh[..., None])[:, None], 0), slope


def _walk(kv: KV, layout: Layout, q: Tensor) -> Iterator[tuple[Chunk, Tensor]]:
    rows = Rows(q)
    if kv.k.numel():
        for chunk in Work(kv, layout, fused=False).chunks():
            yield chunk, chunk.read(rows)


def mass(q: Tensor, kv: KV, layout: Layout, lse: Tensor, *, scale: float, softcap: float) -> Tensor:
    """Probability each entry receives, summed over rows: fp32 `[B, H, M]`.

    A pass of its own, since probabilities need the final lse `[B, H, N]`; with that of several merged parts, it gives
    this part's share of their common softmax.
    """
    b, h, _, m = layout.shape
    total = torch.zeros(b * h * m, dtype=torch.float32, device=q.device)
    for chunk, x in _walk(kv, layout, q):
        known = lse.flatten()[chunk.row_numbers()]
        row = (chunk.batch[:, None] * h + chunk.heads)[..., None] * m
        for s in chunk.segments():
            prob, _ = _probabilities(x, s, known, chunk.fresh, scale, softcap)
            total.index_add_(0, (row + s.entries[:, None]).flatten(), prob.sum(2).flatten().float())
    return total.view(b, h, m)


# ---------------------------------------------------------------------- backward
def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    kv: KV,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients (dq, dk, dv, dbias | None) in the shapes and dtypes of q, k, v and bias; dk and dv in the storage's shape.

    dout `[B, H, N, Dv]` and dlse `[B, H, N]` are the gradients of both outputs. Probabilities are computed again, chunk
    by chunk; sums are fp32 (fp64 for fp64).
    """
    acc = _acc(q)
    g, m = kv.shape[1], kv.capacity
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=acc, device=q.device) for t in (kv.k, kv.v))
    db = None if kv.bias is None else torch.zeros(kv.bias.shape, dtype=acc, device=q.device)
    flat_q, flat_k, flat_v = (t.view(-1, t.shape[-1]) for t in (dq, dk, dv))
    outs, douts = Rows(out), Rows(dout)
    for chunk, x in _walk(kv, layout, q):
        at = chunk.row_numbers()
        known, do = lse.flatten()[at], chunk.read(douts).to(acc)
        drop = ~chunk.fresh[:, None, :, None]
        do = do.masked_fill(drop, 0)
        # d lse / d logit is the probability too, so its gradient is one more constant of the row.
        delta = (do * chunk.read(outs).to(acc)).sum(-1) - dlse.flatten()[at].to(acc)
        xs, ds_rows = x.to(acc).flatten(1, 2), do.flatten(1, 2)
        dx = torch.zeros_like(xs)
        for s in chunk.segments():
            prob, slope = _probabilities(x, s, known, chunk.fresh, scale, softcap)
            dp = (ds_rows @ s.v.to(acc).transpose(1, 2)).view_as(prob)
            dlogit = torch.where(prob > 0, prob * (dp - delta[..., None]), 0)
            rows = s.chunk.work.storage.number(chunk.batch, chunk.group, s.entries).flatten()
            flat_v.index_add_(0, rows, (prob.flatten(1, 2).transpose(1, 2) @ ds_rows).flatten(0, 1))
            if db is not None:
                entry = (chunk.batch * g + chunk.group)[:, None] * m + s.entries
                db.view(-1).index_add_(0, entry.flatten(), dlogit.sum((1, 2)).flatten())
            dlogit = (dlogit if slope is None else dlogit * slope).flatten(1, 2)
            dx += dlogit @ s.k.to(acc)
            flat_k.index_add_(0, rows, (dlogit.transpose(1, 2) @ xs).flatten(0, 1), alpha=scale)
        flat_q.index_add_(0, at.flatten(), dx.flatten(0, 1), alpha=scale)
    dbias = None if db is None or kv.bias is None else db.to(kv.bias.dtype)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dbias


# ---------------------------------------------------------------------- slices instead of gathers
def _bands(kv: KV, layout: Layout) -> tuple[int, int] | None:
    """(sink, window) of a call that can be read in slices: dense storage, all entries, one rule for all heads."""
    if kv.kind != "dense" or layout.has_lists or layout.stride is not None:
        return None
    if kv.len is not None or kv.pos is not None or kv.bias is not None or layout.q_pos is not None or not layout.causal:
        return None
    m, n = kv.capacity, layout.shape[2]
    if layout.full:
        return (0, m) if m >= n else None
    if any(t is not None and t.numel() > 1 for t in (layout.sink, layout.window)) or m < n:
        return None
    sink, window = (0 if t is None else int(t) for t in (layout.sink, layout.window))
    return (min(sink, m), min(window, m)) if sink or window else None


def _banded(q: Tensor, kv: KV, layout: Layout, rule: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Query rows band by band against views of K and V; heads of a group share them through a stride of 0."""
    b, h, n, _ = q.shape
    g, m = kv.shape[1], kv.capacity
    out = q.new_empty(b, h, n, kv.v.shape[-1])
    lse = torch.empty(b, h, n, dtype=_acc(q))
    sink, window = rule
    band = n if layout.full else BAND
    for i in range(b):
        grouped, og, lg = (t[i].unflatten(0, (g, h // g)) for t in (q, out, lse))
        for r0 in range(0, n, band):
            r1 = min(n, r0 + band)
            first, last = m - n + r0, m - n + r1
            x = grouped[:, :, r0:r1]
            done: list[tuple[Tensor, Tensor]] = []
            for a, z, edge in _pieces(sink, window, first, last):
                if a >= z:
                    continue
                k, v = (t[i, :, None, a:z].expand(-1, h // g, -1, -1) for t in (kv.k, kv.v))
                seen: Tensor | None = None
                if edge and not layout.full:
                    pos, at = torch.arange(a, z), torch.arange(first, last)[:, None]
                    seen = (((pos < sink) | (pos > at - window)) & (pos <= at))[None, None]
                if n == 1:  # the heads of a group as rows of one query: K is read once
                    o, part = flash(x.transpose(1, 2), k[:, :1], v[:, :1], None, None, scale)
                    done.append((o.transpose(1, 2), part.transpose(1, 2)))
                else:
                    done.append(flash(x, k, v, seen, None, scale, causal=edge and layout.full))
            og[:, :, r0:r1], lg[:, :, r0:r1] = merge(done)
    return out, lse


def _pieces(sink: int, window: int, first: int, last: int) -> list[tuple[int, int, bool]]:
    """Key ranges (start, stop, edge) that queries at positions first..last-1 read; all of them see all but the edges."""
    if window >= last:  # plain causal attention; its edge is kept square
        return [(0, first, False), (first, last, True)] if last - first > 1 else [(0, last, False)]
    near = min(sink, first + 1)
    lo = max(near, first - window + 1)
    hi = min(max(lo, last - window), first + 1)
    if last - lo <= 4 * BAND and last - first > 1:  # short: one call with a mask
        return [(0, near, False), (lo, last, True)] if lo > near else [(0, last, True)]
    return [(0, near, False), (lo, hi, True), (hi, first + 1, False), (first + 1, last, True)]
