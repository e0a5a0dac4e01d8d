"""Learned gates: block attention predicted from queries and keys that were pooled before their rotation.

Gao et al. 2024, "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs" (arXiv 2410.13276). A gate maps pooled
features to the head dimension, rotates them to the position of the first token of their block, and multiplies. Beside
it stand the maps it is trained and judged on: what full attention holds per pair of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import ConfigError
from ..kv import KV
from ..lists import repeat_heads
from ..select import above, top_k
from .keys import pieces
from .pooled import block_pool, causal_blocks

if TYPE_CHECKING:
    from ..methods.base import Rope

POOLS = ("max", "min", "mean")  # of keys, side by side in this order; queries are averaged


@dataclass(frozen=True)
class Gate:
    """The weights of one layer's gate.

    Attributes:
        key: fp32 `[Hk, 3D, D]`, from the pooled maxima, minima and means of a block of keys.
        query: fp32 `[Hq, D, D]`, from the mean of a block of queries, or None: that mean is used as it is.
    Hk and Hq are H, G or a divisor of G (weights that heads share).
    """

    key: Tensor
    query: Tensor | None = None

    def check(self, heads: int, groups: int, width: int) -> None:
        """ConfigError unless these weights fit H = `heads`, G = `groups`, D = `width`."""
        for name, w, features in (("key", self.key, len(POOLS) * width), ("query", self.query, width)):
            if w is None:
                continue
            fits = w.dim() == 3 and w.shape[1:] == (features, width) and w.shape[0] > 0
            if not fits or (w.shape[0] != heads and groups % w.shape[0]):
                raise ConfigError(
                    f"gate: expected {name} weights [{heads} or a divisor of {groups}, {features}, {width}] "
                    f"for this model, got {list(w.shape)}"
                )

    def queries(self, mean: Tensor, rope: Rope, first: int, block: int) -> Tensor:
        """Pooled queries `[B, H, nq, D]`, the first one block number `first` -> the gate's, same shape."""
        return _turn(mean if self.query is None else _project(mean, self.query), rope, first, block)

    def keys(self, features: Tensor, rope: Rope, block: int) -> Tensor:
        """Features `[B, G, nk, 3D]` of the blocks 0.. -> the gate's keys `[B, G or H, nk, D]`."""
        return _turn(_project(features, self.key), rope, 0, block)


def _project(x: Tensor, w: Tensor) -> Tensor:
    """`[B, heads, n, F]` times `[Hw, F, D]`; whichever has fewer heads is repeated."""
    heads = max(x.shape[1], w.shape[0])
    return repeat_heads(x, heads) @ w.repeat_interleave(heads // w.shape[0], 0)


def _turn(x: Tensor, rope: Rope, first: int, block: int) -> Tensor:
    pos = torch.arange(first, first + x.shape[2], device=x.device)[None] * block
    return rope.rotate(x, pos.expand(x.shape[0], -1))


def query_means(q: Tensor, rope: Rope, block: int, start: int) -> Tensor:
    """Rotated queries `[1, H, N, D]`, the first one at position `start` -> unrotated block means, fp32 `[1, H, nq, D]`."""
    (b, h, n, d), offset = q.shape, start % block
    out = []
    for lo, hi in pieces(-(-(n + offset) // block), 4 * b * h * block * d):
        a, z = max(0, lo * block - offset), min(n, hi * block - offset)
        raw = rope.unrotate(q[:, :, a:z].float(), torch.arange(start + a, start + z, device=q.device)[None])
        out.append(block_pool(raw, block, offset=(start + a) % block))
    return torch.cat(out, 2)


def key_features(kv: KV, rope: Rope, block: int, m: int, first: int = 0) -> Tensor:
    """Features of the key blocks `first`.. of the first m entries of a view in text order: fp32 `[1, G, n, 3D]`.

    Keys are turned back to what they were before rotation. A partial last block is pooled over the keys it has.
    """
    b, g, _, d, _ = kv.shape
    out = [torch.zeros(b, g, 0, len(POOLS) * d, device=kv.device)]
    for lo, hi in pieces(-(-m // block) - first, 4 * b * g * block * d):
        at = torch.arange((first + lo) * block, min(m, (first + hi) * block), device=kv.device)
        if kv.kind == "dense":
            k = kv.k[:, :, (first + lo) * block : min(m, (first + hi) * block)]
        else:
            k = kv.k.reshape(-1, d)[kv.rows(at.expand(b, g, -1))]
        raw = rope.unrotate(k.float(), at[None])
        out.append(torch.cat([block_pool(raw, block, kind) for kind in POOLS], -1))
    return torch.cat(out, 2)


def choose(prob: Tensor, first: int, *, threshold: float, keep: int | None, dense_rows: int = 0) -> Tensor:
    """Blocks of each row of the gate's probabilities `[..., nq, nk]`: bool of the same shape.

    Args:
        first: number of query block 0. threshold: least probability of a block, without `keep`.
        keep: blocks of a row, the most probable ones, forced ones counted.
        dense_rows: so many last rows keep every causal block. The first and the diagonal block are always kept.
    """
    nq, nk = prob.shape[-2:]
    seen = causal_blocks(nq, nk, first, prob.device)
    key, row = torch.arange(nk, device=prob.device), torch.arange(first, first + nq, device=prob.device)[:, None]
    forced = (key == 0) | (key == row) | (row >= first + nq - dense_rows)
    if keep is not None:
        return top_k(prob, keep, valid=seen, forced=forced)
    return above(prob, threshold, valid=seen, forced=forced)


def block_map(q: Tensor, kv: KV, block: int, kind: str, *, scale: float, softcap: float | None = None) -> Tensor:
    """What full causal attention holds per pair of blocks: fp32 `[B, H, nq, nk]`.

    For q `[B, H, N, D]` and the first N entries of a view in text order (a whole prompt). kind "max": the largest
    probability of a pair, "sum": the mass, summed over the rows of the block. Rows go in pieces of bounded memory.
    """
    b, h, n, d = q.shape
    g, count = kv.shape[1], -(-n // block)
    r, acc = h // g, torch.promote_types(q.dtype, torch.float32)
    at = torch.arange(n, device=q.device)
    heads = []
    for g0, g1 in pieces(g, 3 * b * r * block * n):
        if kv.kind == "dense":
            k = kv.k[:, g0:g1, :n]
        else:
            k = kv.k.reshape(-1, d)[kv.rows(at.expand(b, g, n))[:, g0:g1]]
        k = k.to(acc).transpose(-1, -2)[:, :, None]
        rows = []
        for lo, hi in pieces(count, 3 * b * (g1 - g0) * r * block * n):
            mine = slice(lo * block, min(n, hi * block))
            s = (q[:, g0 * r : g1 * r, mine].to(acc) * scale).unflatten(1, (g1 - g0, r)) @ k
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            p = s.masked_fill_(at > at[mine, None], float("-inf")).softmax(-1).flatten(1, 2)
            p = pad(p, (0, count * block - n)).unflatten(-1, (count, block))
            rows.append(block_pool(p.amax(-1) if kind == "max" else p.sum(-1), block, kind))
        heads.append(torch.cat(rows, 2))
    return torch.cat(heads, 1)
