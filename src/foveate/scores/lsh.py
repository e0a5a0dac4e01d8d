"""Angular hashing, and the squares of HyperAttention: queries and keys sorted by bucket, with sampled keys beside them.

Han et al. 2023, "HyperAttention: Long-context Attention in Near-Linear Time" (arXiv 2310.05869).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..lists import compact, repeat_heads
from .keys import pieces


def directions(d: int, count: int, seed: int) -> Tensor:
    """fp32 `[d, count]`, normal random hyperplanes; the same on every device."""
    return torch.randn(d, count, generator=torch.Generator().manual_seed(seed))


def gray_rank(code: Tensor) -> Tensor:
    """The place of each code (integers below 2^16) in the binary reflected order, where neighbours differ in one bit."""
    for shift in (1, 2, 4, 8):
        code = code ^ (code >> shift)
    return code


def buckets(x: Tensor, planes: Tensor) -> Tensor:
    """The bucket of each vector: int32 `[B, heads, n]` from x `[B, heads, n, D]` and planes `[D, r]`, r <= 16.

    Only the direction of x counts. Vectors on the same side of all planes share a bucket, and buckets next to each
    other differ in the side of one plane.
    """
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    planes = planes.to(x.device, acc)
    bit = 1 << torch.arange(planes.shape[1], dtype=torch.int32, device=x.device)
    out = []
    for lo, hi in pieces(x.shape[1], 2 * x.shape[0] * x.shape[2] * (x.shape[3] + planes.shape[1])):
        side = (x[:, lo:hi].detach().to(acc) @ planes) > 0
        out.append(gray_rank((side * bit).sum(-1, dtype=torch.int32)))
    return torch.cat(out, 1)


@dataclass(frozen=True)
class Squares:
    """S squares of nq queries and nk keys in which every query may see every key, as sorted blocks and sampled keys.

    Sorted query i is in block i // rows and sees the sorted keys of the block of `width` keys at the same share of their
    order (`met`). Beside them it sees those of its samples that lie in no such block: each stands for nk / m keys.

    Attributes:
        queries: int64 `[S, H, nq]`, keys: int64 `[S, G, nk]`: numbers within the square, in the order of their buckets.
        samples: int64 `[S, H, m]`, places in the sorted order of the keys, with repetition.
        rows, width: queries and keys of a block.
    """

    queries: Tensor
    keys: Tensor
    samples: Tensor
    rows: int
    width: int

    @property
    def blocks(self) -> int:
        """Blocks that hold queries."""
        return -(-self.queries.shape[-1] // self.rows)

    @property
    def met(self) -> Tensor:
        """int64 `[blocks]`: the block of keys that each block of queries sees, the one round the same share of the order.

        Where blocks of queries have few rows, both sides differ in how many there are, and equal numbers are other buckets.
        """
        nq, nk = self.queries.shape[-1], self.keys.shape[-1]
        centre = (2 * torch.arange(self.blocks, device=self.keys.device) + 1) * self.rows * nk // (2 * nq)
        return (centre // self.width).clamp(max=(nk - 1) // self.width)

    def others(self) -> tuple[Tensor, Tensor]:
        """Per block of queries the samples outside of its keys: int32 `[S, H, blocks, m]` ascending, counts."""
        return compact((self.samples // self.width)[:, :, None] != self.met[:, None])

    def sampled(self) -> Tensor:
        """int64 `[S, H, m]`: the numbers of the sampled keys within the square."""
        return repeat_heads(self.keys, self.samples.shape[1]).gather(-1, self.samples)

    def to_mask(self) -> Tensor:
        """bool `[S, H, nq, nk]`: the pairs of blocks and samples, by their numbers within the square. For tests."""
        (s, h, nq), nk, device = self.queries.shape, self.keys.shape[2], self.keys.device
        block = self.met[torch.arange(nq, device=device)[:, None] // self.rows]
        named = (torch.arange(nk, device=device) // self.width == block).repeat(s, h, 1, 1)
        named.scatter_(-1, self.samples[:, :, None].expand(-1, -1, nq, -1), True)
        keys = repeat_heads(self.keys, h)[:, :, None].expand(named.shape)
        named = torch.zeros_like(named).scatter_(-1, keys, named)
        return torch.zeros_like(named).scatter_(2, self.queries[..., None].expand(named.shape), named)


def pair_up(queries: Tensor, keys: Tensor, width: int, samples: int, gen: torch.Generator) -> Squares:
    """Sort the buckets of queries `[S, H, nq]` and keys `[S, G, nk]`, stably, and draw the samples.

    Keys are cut into blocks of `width`; a query block has as many rows as makes both sides have about the same number of
    blocks, which is `width` where nq == nk. With one block of keys nothing is left to sample.
    """
    (s, h, nq), nk = queries.shape, keys.shape[-1]
    drawn = torch.randint(nk, (s, h, samples if nk > width else 0), generator=gen).to(queries.device)
    order = [t.sort(dim=-1, stable=True).indices for t in (queries, keys)]
    return Squares(order[0], order[1], drawn, max(1, -(-nq * width // nk)), width)
