"""Stripes: single keys that a group of query rows shares, found against the highest logit near by as an anchor.

Zhang et al. 2025, "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity" (arXiv 2505.23520).

Positions are cut into blocks, and `step` blocks make a group. The near keys of a row are the first `init` blocks and those
from `local` blocks before its group to itself; the others before its group are far, and stripes are chosen among them.

Cost per query head of N rows over N keys, in the dtype of q. Anchors: N (init + local + step / 2) block numbers, each D
multiply-adds and about 4 bytes (written, read once). Stripes: N^2 / (2 block) numbers, each D multiply-adds and about 10
bytes. 32 heads of 128 at 128K tokens, blocks of 128, groups of 16: 1.4 TFLOP and 22 GB, then 0.6 TFLOP and 21 GB.
Kernels keep these numbers in registers and write a bit for each far key of a group (33 MB there).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists
from ..kv import KV
from . import fused
from .antidiagonal import WIDE
from .keys import BUDGET, pieces, read_keys
from .pooled import block_pool


def anchors(
    q: Tensor,
    kv: KV,
    *,
    start: int,
    block: int,
    step: int,
    init: int,
    local: int,
    scale: float,
    softcap: float | None = None,
    budget: int | None = None,
) -> Tensor:
    """Mean over the rows of each query block of their highest logit among near keys: fp32 `[B, H, nq]`.

    Args:
        q: `[B, H, N, D]`, rows at the positions from `start` on. kv: entries in text order, start + N of them or more.
        budget: numbers held at a time, by default what suits the device.
    """
    (b, h, n, d), g, device = q.shape, kv.shape[1], q.device
    r, m, first, offset = h // g, start + n, start // block, start % block
    kernels = fused.stripes(q)
    if kernels is not None and kernels.finds(block, step, kv.k):
        grid = dict(start=start, block=block, step=step, init=init, local=local, scale=scale, softcap=softcap)
        found = [kernels.anchors(q[:, g0 * r : g1 * r], k, **grid) for g0, g1, k in _keys(kv, m, q)]
        return found[0] if len(found) == 1 else torch.cat(found, 1)
    nq = -(-(n + offset) // block)
    nk, far = first + nq, min(init * block, m)
    budget = budget or (WIDE if q.is_cuda else BUDGET)
    heads, out = q.unflatten(1, (g, r)), []
    for g0, g1 in pieces(g, b * (r * n + m) * d, budget):
        keys = read_keys(kv, g0, g1)[:, :, :m].to(q.dtype)
        head = keys[:, :, None, :far].transpose(-1, -2)
        keys = pad(keys, (0, 0, local * block, nk * block - m))
        rows = pad(heads[:, g0:g1] * scale, (0, 0, offset, nq * block - offset - n))
        rows = rows.unflatten(3, (nq, block)).transpose(2, 3)  # [B, g, nq, r, block, D]
        top = torch.empty(rows.shape[:-1], dtype=q.dtype, device=device)
        for t in range(step):  # all groups' block number t at once: their near keys are windows of one length
            mine = slice((t - first) % step, nq, step)
            if mine.start >= nq:
                continue
            length, number = (local + t + 1) * block, (first + mine.start) // step
            windows = keys.unfold(2, length, step * block)[:, :, number:]  # [B, g, groups, D, length]
            some, best = rows[:, :, mine], top[:, :, mine]
            for lo, hi in pieces(some.shape[2], b * (g1 - g0) * r * block * (length + far), budget):
                x = some[:, :, lo:hi].flatten(3, 4)
                group = torch.arange(number + lo, number + hi, device=device)[:, None]
                near = (x @ windows[:, :, lo:hi]).unflatten(3, (r, block))
                at = torch.arange(block, device=device)
                near[..., length - block :].masked_fill_(at > at[:, None], float("-inf"))
                if (number + lo) * step < local:  # windows that begin before the prompt
                    position = (group * step - local) * block + torch.arange(length, device=device)
                    near.masked_fill_((position < 0)[:, None, None], float("-inf"))
                peak = near.amax(-1)
                if far:
                    sink = (x @ head).unflatten(3, (r, block))
                    if (number + lo) * step < init:  # rows among the first keys
                        row = (group * step + t) * block + at
                        ahead = torch.arange(far, device=device) > row[..., None]
                        sink.masked_fill_(ahead[:, None], float("-inf"))
                    peak = torch.maximum(peak, sink.amax(-1))
                best[:, :, lo:hi] = peak
        out.append(top.transpose(2, 3))
    top = torch.cat(out, 1).flatten(1, 2).to(torch.promote_types(q.dtype, torch.float32))  # [B, H, nq, block]
    if softcap:
        top = softcap * torch.tanh(top / softcap)
    return block_pool(top.flatten(2)[:, :, offset : offset + n, None], block, offset=offset)[..., 0]


def stripes(
    q: Tensor,
    kv: KV,
    limit: Tensor,
    *,
    start: int,
    block: int,
    step: int,
    init: int,
    local: int,
    scale: float,
    softcap: float | None = None,
    group: bool = False,
    budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Far keys whose logit with the mean query of any block of a group reaches that block's limit.

    Args:
        q, kv, start: as in `anchors`. limit: `[B, H, nq]`, one per query block.
        group: the heads of a kv head share the union of their keys (Hl = G), else Hl = H.

    Returns:
        (int32 `[B, Hl, groups, C]`, ascending, padded with anything in range; counts int32 `[B, Hl, groups]`). Waits for the
        device once a piece of memory; kernels once, and not at all up to 32K tokens of 32 heads.
    """
    (b, h, n, d), g, device = q.shape, kv.shape[1], q.device
    r, first, offset = h // g, start // block, start % block
    nq, group0 = -(-(n + offset) // block), start // (step * block)
    groups = -(-(first + nq) // step) - group0
    budget = budget or (WIDE if q.is_cuda else BUDGET)
    mean = (block_pool(q, block, offset=offset) * scale).to(q.dtype)
    kernels = fused.stripes(q)
    if kernels is not None and kernels.finds(block, step, kv.k):
        grid = dict(first=first, block=block, step=step, init=init, local=local, softcap=softcap)
        bits = []
        for g0, g1, k in _keys(kv, start + n, q):
            heads = slice(g0 * r, g1 * r)
            bits.append(kernels.stripe_bits(mean[:, heads], limit[:, heads], k, groups, **grid))
        words = bits[0] if len(bits) == 1 else torch.cat(bits, 1)
        end = ((torch.arange(group0, group0 + groups, device=device) * step - local) * block).clamp(min=0)
        spans = torch.stack([torch.zeros_like(end), end, end], 1).int()
        most = max(1, ((group0 + groups - 1) * step - local) * block)
        return kernels.bit_lists(words, spans, g if group else h, most, 1)  # type: ignore[no-any-return]
    before, after = first - group0 * step, (group0 + groups) * step - first - nq  # blocks of these groups without a row
    mean = pad(mean, (0, 0, before, after)).unflatten(1, (g, r)).unflatten(3, (groups, step))
    limit = pad(limit, (before, after), value=float("inf")).unflatten(1, (g, r)).unflatten(3, (groups, step))
    low, most = init * block, max(0, ((group0 + groups - 1) * step - local - init) * block)  # far keys of the last group
    index: list[list[Tensor]] = []
    counts: list[list[Tensor]] = []
    for g0, g1 in pieces(g, b * most * d, budget):
        keys = read_keys(kv, g0, g1)[:, :, low : low + most].to(q.dtype).transpose(-1, -2)
        index.append([])
        counts.append([])
        for lo, hi in pieces(groups, b * (g1 - g0) * r * step * max(1, most), budget):
            seen = max(0, ((group0 + hi - 1) * step - local - init) * block)
            x = (mean[:, g0:g1, :, lo:hi].flatten(2, 4) @ keys[..., :seen]).unflatten(2, (r, hi - lo, step))
            if softcap:
                x = softcap * torch.tanh(x / softcap)
            hit = (x >= limit[:, g0:g1, :, lo:hi, :, None]).any(4)  # [B, g, r, groups, keys]
            if group:
                hit = hit.any(2, keepdim=True)
            end = (torch.arange(group0 + lo, group0 + hi, device=device) * step - local) * block - low
            hit = hit & (torch.arange(seen, device=device) < end[:, None])
            found, count = lists.compact(hit.flatten(1, 2))
            index[-1].append(lists.trim(found, count) + low if seen else pad(found, (0, 1)))
            counts[-1].append(count)
    wide = max(t.shape[-1] for row in index for t in row)
    each = [torch.cat([pad(t, (0, wide - t.shape[-1])) for t in row], 2) for row in index]
    return torch.cat(each, 1), torch.cat([torch.cat(row, 2) for row in counts], 1)


def _keys(kv: KV, m: int, q: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The first m keys in the dtype of q, for kernels: (g0, g1, `[B, g1 - g0, m, D]`), views where the storage allows it."""
    b, g, _, d, _ = kv.shape
    there = kv.kind == "dense" and kv.k.dtype == q.dtype
    for g0, g1 in pieces(g, 1 if there else b * m * d):
        yield g0, g1, read_keys(kv, g0, g1)[:, :, :m].to(q.dtype)
