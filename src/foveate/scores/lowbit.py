"""Every logit, estimated from 4-bit queries and keys, against the mass that sink and local keys already hold.

Ji et al. 2025, "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling"
(arXiv 2505.24179).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists
from ..kv import KV
from . import fused
from .keys import BUDGET, GPU_BUDGET, pieces, read_keys

SHARES = ("fragment", "token", "exact")
KEYS = 4096  # keys that a piece of work looks at together, about
BIG = 1e30  # instead of infinity, which a product would turn into NaN


@dataclass(frozen=True)
class Grid:
    """Blocks and what is computed in any case, in tokens; `sink` and `segment` are multiples of `block_k`."""

    block_q: int
    block_k: int
    sink: int
    window: int
    segment: int

    def local(self, block: Tensor) -> Tensor:
        """First key of the local region of query blocks: at least `window` keys before the block, and what lies between
        the sink and it is a whole number of segments (none: the region begins at key 0)."""
        rest = block * self.block_q - self.window - self.sink
        return torch.where(rest >= 0, self.sink + rest // self.segment * self.segment, 0)


def low_bit(x: Tensor, peak: Tensor, bits: int) -> Tensor:
    """x `[..., n, D]` rounded to the nearest of 2^bits - 1 equally spaced levels from -peak to peak `[..., n]`."""
    top = 2 ** (bits - 1) - 1
    step = (peak / top)[..., None]
    step = torch.where(step > 0, step, 1)  # a group of zeros
    return (x / step).round().clamp(-top, top) * step


def query_peaks(x: Tensor, share: str) -> Tensor:
    """Largest magnitude `[..., n]` by row of `[..., n, D]`; "fragment": by rows t and t + 8 of each 16 together, as they
    meet in a fragment of a matrix product. n is then a multiple of 16."""
    peak = x.abs().amax(-1)
    return _together(peak, (2, 8), (-2,)) if share == "fragment" else peak


def key_peaks(x: Tensor, share: str) -> Tensor:
    """The same for keys; "fragment": by keys of one floor((j mod 8) / 2) in each 32 together, four groups of eight."""
    peak = x.abs().amax(-1)
    return _together(peak, (4, 4, 2), (-3, -1)) if share == "fragment" else peak


def _together(peak: Tensor, shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    n = peak.shape[-1]
    tiles = pad(peak, (0, -n % math.prod(shape))).unflatten(-1, (-1, *shape))
    return tiles.amax(dims, keepdim=True).expand(tiles.shape).flatten(-1 - len(shape))[..., :n]


def relative_blocks(
    q: Tensor,
    kv: KV,
    log_tau: Tensor,
    grid: Grid,
    *,
    start: int,
    scale: float,
    softcap: float | None = None,
    share: str = "fragment",
    bits: int = 4,
    group: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per block of queries the sink, the local region, and the key blocks between them that hold a large logit.

    Large: exp(logit) > tau times the sum of exp(logit) over the sink and local keys of that row, which are computed
    exactly. The logit is estimated from queries and keys of `bits` bits (`share` "exact": as they are), both without their
    means, and the exact product of the mean query with the key; the mean key adds the same to all logits of a row. Under
    a softcap it would not, so the key mean stays in.

    Args:
        q: `[1, H, N, D]`, at positions start..start + N - 1. kv: in text order, its first start + N entries are read.
        log_tau: `[H]`, -inf keeps every block.
        share: which rows have one step of quantisation together (`SHARES`).
        group: the heads of a kv head share the union of their lists (Hl = G), else Hl = H.

    Returns:
        First keys of these blocks, int32 `[1, Hl, nq, T]`, ascending, padded with the row's last; counts int32
        `[1, Hl, nq]`. Costs N x M products and holds a bounded piece of them, kernels a bit for each pair of blocks. Waits
        for the device once a piece of rows; kernels once, and not at all up to 32K tokens.
    """
    kernels = fused.lowbit(q)
    if kernels is not None and kernels.selects(q, kv.k, grid.block_q, grid.block_k, share):
        return _by_bits(kernels, q, kv, log_tau, grid, start, scale, softcap, share, bits, group)
    (_, h, n, d), g, bq = q.shape, kv.shape[1], grid.block_q
    r, m, first = h // g, start + n, start // bq
    nq, acc = (m - 1) // bq - first + 1, torch.promote_types(q.dtype, torch.float32)
    budget = BUDGET if q.device.type == "cpu" else GPU_BUDGET
    out = []
    for g0, g1 in pieces(g, m * (3 * d + 2 * r), budget):
        heads = slice(g0 * r, g1 * r)
        k = read_keys(kv, g0, g1)[0, :, :m].to(acc)
        k = k if softcap else k - k.mean(1, keepdim=True)
        mean = q[0, heads].mean(1, dtype=acc).unflatten(0, (g1 - g0, r))
        rough = k if share == "exact" else low_bit(k, key_peaks(k, share), bits)
        # The product with the mean query and the threshold of a row ride along as further channels.
        right = torch.cat([rough, k @ mean.transpose(-1, -2), torch.ones_like(k[..., :1])], -1).transpose(-1, -2)
        cost = r * bq * (3 * d + min(m, KEYS) + 2 * (grid.window + grid.segment + grid.sink + bq))
        mine = []
        for lo, hi in pieces(nq, (g1 - g0) * cost, budget):
            block = torch.arange(first + lo, first + hi, device=q.device)
            pos = (block[:, None] * bq + torch.arange(bq, device=q.device)).flatten()
            begin, end = (first + lo) * bq - start, (first + hi) * bq - start  # rows of q; the grid may reach beyond both
            rows = q[0, heads, max(0, begin) : end].to(acc).unflatten(0, (g1 - g0, r))
            rows = pad(rows, (0, 0, max(0, -begin), max(0, end - n)))
            real = (pos >= start) & (pos < m)
            lse = anchor_lse(rows, k, block, grid, scale, softcap).flatten(-2)
            bar = _bar(lse, log_tau[heads].to(acc).view(-1, r, 1), real, softcap)
            rows = torch.where(real[:, None], rows - mean[:, :, None], 0)
            rows = rows if share == "exact" else low_bit(rows, query_peaks(rows, share), bits)
            which = torch.eye(r, dtype=acc, device=q.device)[:, None].expand(g1 - g0, r, len(pos), r)
            left = torch.cat([rows * scale, which * scale, -bar[..., None]], -1).flatten(1, 2)
            keep = _blocks(left, right, block, grid, first + hi - 1, m, budget)
            index, count = lists.compact(keep.any(1) if group else keep.flatten(0, 1))
            mine.append((lists.trim(index, count) * grid.block_k, count))
        out.append(_join(mine, 1))
    tiles, counts = _join(out, 0)
    return tiles[None], counts[None]


def _bar(lse: Tensor, log_tau: Tensor, real: Tensor, softcap: float | None) -> Tensor:
    """What an estimate must exceed, `[..., rows]`, finite; BIG for rows that are not real."""
    bar = lse + log_tau
    if softcap:  # the estimate is not capped: compare it with what the cap maps to the threshold
        bar = softcap * torch.atanh((bar / softcap).clamp(-1, 1))  # infinite where the cap is never or always above
    return torch.where(real, bar, BIG).clamp(-BIG, BIG)


def _by_bits(
    kernels: ModuleType,
    q: Tensor,
    kv: KV,
    log_tau: Tensor,
    grid: Grid,
    start: int,
    scale: float,
    softcap: float | None,
    share: str,
    bits: int,
    group: bool,
) -> tuple[Tensor, Tensor]:
    """`relative_blocks` with kernels: a bit for each pair of blocks (32 MiB for 32 heads at 128K), then lists of them."""
    (_, h, n, d), g, bq, bk = q.shape, kv.shape[1], grid.block_q, grid.block_k
    r, m, first = h // g, start + n, start // bq
    block = torch.arange(first, (m - 1) // bq + 1, device=q.device)
    end = ((block + 1) * bq).clamp(max=m)
    widest = -(-m // bk)
    words = torch.zeros(1, h, len(block), -(-widest // 32), dtype=torch.int32, device=q.device)
    pos = torch.arange(first * bq, first * bq + len(block) * bq, device=q.device)
    real, sizes = (pos >= start) & (pos < m), (bq, grid.sink, grid.window, grid.segment)
    mean = kernels.means(q[0])
    for g0, g1 in pieces(g, m * d, kernels.HELD):
        heads = slice(g0 * r, g1 * r)
        k, some = read_keys(kv, g0, g1)[0, :, :m], q[0, heads]
        centre = None if softcap else kernels.means(k)
        lse = kernels.local_sums(some, k, centre, sizes, start=start, scale=scale, softcap=softcap)
        bar = _bar(lse, log_tau[heads, None].float(), real, softcap)
        args = dict(start=start, scale=scale, share=share, bits=bits)
        kernels.block_bits(some, k, centre, mean[heads], bar, words[0, heads], sizes, bk, **args)
    local = grid.local(block)
    spans = torch.stack([torch.full_like(end, grid.sink).minimum(local), local, end + bk - 1], 1) // bk
    return kernels.bit_lists(words, spans.int(), g if group else h, widest, bk)  # type: ignore[no-any-return]


def _join(parts: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    wide = max(t.shape[-1] for t, _ in parts)
    return torch.cat([pad(t, (0, wide - t.shape[-1])) for t, _ in parts], dim), torch.cat([c for _, c in parts], dim)


def _blocks(left: Tensor, right: Tensor, block: Tensor, grid: Grid, last: int, m: int, budget: int) -> Tensor:
    """bool `[g, r, nb, nk]`: sink, local, and blocks where any row of left `[g, r * nb * block_q, C]` has a positive
    product with any key of right `[g, C, m]`. The query blocks `block` `[nb]` end with number `last`."""
    (g, rows, _), bk, nb = left.shape, grid.block_k, len(block)
    r, nk = rows // (nb * grid.block_q), -(-min(m, (last + 1) * grid.block_q) // bk)
    number, local = torch.arange(nk, device=left.device) * bk, grid.local(block)[:, None]
    keep = torch.zeros(g, r, nb, nk, dtype=torch.bool, device=left.device)
    reach = max(0, last * grid.block_q - grid.window) // bk  # blocks beyond are local for every row
    for lo, hi in pieces(reach, g * rows * bk, budget):
        s = (left @ right[..., lo * bk : hi * bk]).view(g, r, nb, grid.block_q, hi - lo, bk)
        keep[..., lo:hi] = s.amax((3, 5)) > 0
    return (keep | (number < grid.sink) | (number >= local)) & (number < (block[:, None] + 1) * grid.block_q)


def anchor_lse(q: Tensor, k: Tensor, block: Tensor, grid: Grid, scale: float, softcap: float | None) -> Tensor:
    """Log-sum-exp of each row over its sink and local keys, `[g, r, nb, block_q]`.

    Args:
        q: `[g, r, nb * block_q, D]`, rows of the query blocks numbered `block` `[nb]`. k: `[g, m, D]`.
    """
    m, bq = k.shape[1], grid.block_q
    local = grid.local(block)
    wide = min(m, grid.window + max(grid.segment, grid.sink) + bq)
    at = local[:, None] + torch.arange(wide, device=q.device)
    pos = block[:, None] * bq + torch.arange(bq, device=q.device)
    q = q.unflatten(2, (-1, bq))
    near = q @ k[:, at.clamp(max=m - 1)].transpose(-1, -2)[:, None]  # [g, r, nb, block_q, wide]
    far = (q.flatten(2, 3) @ k[:, None, : grid.sink].transpose(-1, -2)).unflatten(2, (-1, bq))
    s = torch.cat([far, near], -1) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    apart = (local > 0)[:, None, None].expand(-1, bq, far.shape[-1])  # else the local region holds the sink too
    seen = torch.cat([apart, at[:, None] <= pos[..., None]], -1)
    return s.masked_fill(~seen, float("-inf")).logsumexp(-1)
