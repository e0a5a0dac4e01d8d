"""Dual chunk attention: where queries and keys stand so that no distance exceeds a chunk, and lists cut by region.

An et al. 2024, "Training-Free Long-Context Scaling of Large Language Models" (arXiv 2402.17463), as used by
Yang et al. 2025, "Qwen2.5-1M Technical Report" (arXiv 2501.15383).

The text is cut into chunks of L = size - local tokens. A query of chunk C reads three regions: the keys of its own chunk
("intra"), those of chunk C - 1 ("succ") and all before ("inter"). Keys of all regions count as standing at j mod L.
The cache keeps keys rotated at their true position j, so intra queries stay what they are, succ queries move, and for
inter either the keys move (prefill: once for all rows) or the query does, once per key chunk (decode).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists
from ..kv import KV
from ..layout import Part, Parts
from . import fused
from .keys import BUDGET, GPU_BUDGET, pieces
from .probes import Far, Probe, last_queries
from .rotation import moved

if TYPE_CHECKING:
    from ..methods.base import Rope

REGIONS = ("intra", "succ", "inter")
Lists = tuple[Tensor, Tensor, Tensor, Tensor]  # tile starts, counts, entries, counts, as in `Layout`
Choice = tuple[Tensor, Tensor, Tensor, Tensor]  # keys, counts, distances, counts, as `probes.vote` gives them


@dataclass(frozen=True)
class Chunks:
    """The positions of dual chunk attention. size: c_s, the largest distance. local: how far over a boundary distances
    stay true."""

    size: int
    local: int

    @property
    def length(self) -> int:
        """L, tokens of a chunk."""
        return self.size - self.local

    @property
    def inter(self) -> int:
        """The position of every query towards chunks before the last one, counted from the start of each of them."""
        return min(2 * self.length - 1, self.size)

    @property
    def exact(self) -> int:
        """Up to this many tokens every distance is the true one."""
        return self.size if 2 * self.local <= self.size else self.length

    def succ(self, pos: Tensor) -> Tensor:
        """Where queries at `pos` stand for keys of the chunk before theirs that are rotated at true positions."""
        return torch.minimum(pos, (pos // self.length - 1) * self.length + self.size)

    def towards(self, pos: Tensor, chunk: int | Tensor) -> Tensor:
        """Where queries at `pos` stand for the keys of chunk number `chunk` that are rotated at true positions; of several
        chunks, `[chunks]` and pos `[B, 1]`, `[B, chunks]`."""
        own = pos // self.length
        near = torch.where(own == chunk, pos, self.succ(pos))
        return torch.where(own > chunk + 1, chunk * self.length + self.inter, near)

    def far(self, kv: KV, end: int, rope: Rope) -> KV:
        """Entries 0..end of a view in text order, as a dense copy whose keys are rotated at j mod L."""
        flat = cut(kv.to_dense(), 0, end)
        at = torch.arange(end, device=kv.device).expand(flat.shape[0], end)
        return replace(flat, k=moved(flat.k, rope, at, at % self.length))


def cut(kv: KV, lo: int, hi: int) -> KV:
    """Entries lo..hi of a view without positions of its own, nothing copied. Of pages only whole ones: lo % page == 0."""
    parts = {n: t[:, :, lo:hi] for n in ("bias",) if (t := getattr(kv, n)) is not None}
    length = None if kv.len is None else (kv.len - lo).clamp(0, hi - lo)
    if kv.kind == "dense":
        return replace(kv, k=kv.k[:, :, lo:hi], v=kv.v[:, :, lo:hi], capacity=hi - lo, len=length, **parts)
    if kv.kind == "ragged":
        assert kv.offsets is not None
        return replace(kv, offsets=kv.offsets + lo, capacity=hi - lo, len=length, **parts)
    assert kv.table is not None
    page = kv.k.shape[1]
    table = kv.table[:, :, lo // page : -(-hi // page)]
    wide = table.shape[2] * page
    if "bias" in parts:
        parts["bias"] = pad(parts["bias"], (0, wide - (hi - lo)))
    return replace(kv, table=table, capacity=wide, len=length, **parts)


def only(kv: KV, lo: int, hi: int) -> KV:
    """All entries of a view, those outside text positions lo..hi hidden: where entries stand in no order."""
    pos = kv.positions()
    bias = torch.zeros(pos.shape, device=kv.device) if kv.bias is None else kv.bias
    return replace(kv, bias=bias.masked_fill((pos < lo) | (pos >= hi), float("-inf")))


# ---------------------------------------------------------------------- all chunks of a decode step at once
class AtOnce(Parts):
    """Parts that one call computes together: `joint(scale=, softcap=, backend=)` gives (out, lse fp32) of all of them. The
    parts themselves, which `make` gives, are made where something asks for them."""

    def __init__(self, make: Callable[[], tuple[Part, ...]], joint: Callable[..., tuple[Tensor, Tensor]]):
        for name, value in (("make", make), ("joint", joint), ("combine", "lse")):
            object.__setattr__(self, name, value)

    @cached_property
    def parts(self) -> tuple[Part, ...]:  # type: ignore[override]
        return self.make()  # type: ignore[attr-defined,no-any-return]


def side_by_side(kv: KV, length: int, pos: Tensor, shared: dict[Any, Any]) -> KV | None:
    """Chunks of `length` entries as batch rows of their own, `[B * chunks, G]`, nothing copied: a ragged view of dense
    storage, whose last chunk may have no room to be whole. None where storage has no such view.

    Args:
        kv: the view of a decode step, in text order. pos: int64 `[B, 1]`, where its queries stand, the last entries.
        shared: keeps offsets and lengths, which are those of all layers of a step.
    """
    if type(kv) is not KV or kv.kind != "dense" or kv.pos is not None or kv.bias is not None:
        return None
    (b, g, m), flat, steps = kv.shape[:3], [], set()
    for t in (kv.k, kv.v):
        wide = t.stride(2)
        apart = [n if size > 1 else 0 for n, size in zip(t.stride()[:2], (b, g), strict=True)]
        if t.stride(3) != 1 or wide < 1 or any(n % wide for n in apart):
            return None
        row, head = (n // wide for n in apart)
        flat.append(t.as_strided(((b - 1) * row + (g - 1) * head + m, t.shape[3]), (wide, 1)))
        steps.add((row, head))
    if len(steps) > 1:
        return None
    if (key := (b, g, m, length, kv.device, *steps)) not in shared:
        (row, head), device = steps.pop(), kv.device
        first = torch.arange(-(-m // length), device=device)[:, None] * length  # [chunks, 1]
        begin = torch.arange(b, device=device)[:, None, None] * row + torch.arange(g, device=device) * head
        have = (pos[..., None] + 1 - first).clamp(0, length).to(torch.int32)  # [B, chunks, 1]
        shared[key] = (begin + first).flatten(0, 1), have.expand(-1, -1, g).flatten(0, 1).contiguous()
    offsets, have = shared[key]
    return KV.ragged(flat[0], flat[1], offsets, have, min(length, m))


# ---------------------------------------------------------------------- the probes of chunks of queries
def probes(
    q: Tensor, pos: Tensor, kv: KV, far: KV | None, grid: Chunks, rope: Rope | None, start: int, rows: int, **how: object
) -> Iterator[tuple[int, Probe]]:
    """What the last queries of each chunk look at, by text position and by distance, with continuous positions.

    "Critical" positions: towards the chunk before, the true distance i - j; towards earlier ones u + c_s - j mod L,
    not cut off, so that a diagonal stays one in every chunk.

    Args:
        q: `[B, H, N, D]`, rotated at `pos` `[B, N]`, which begin at `start`. kv: dense, in text order.
        far: `Chunks.far` of the entries before the last two chunks. None where there is no chunk before those.
        rows: queries of a chunk that are asked. how: scale, softcap and reduce of `last_queries`.

    Gives (text position after a chunk's last query, its probe over the entries before it), chunk by chunk.
    """
    n, length = q.shape[2], grid.length
    q, edges = q.detach(), range(start // length * length, start + n, length)
    stops = [min(n, edge + length - start) for edge in edges]
    some = [slice(max(0, edge - start, stop - rows), stop) for edge, stop in zip(edges, stops, strict=True)]
    there: Sequence[Tensor | None] = [None] * len(some)
    if far is not None:  # where all these rows stand for far keys, in one go
        assert rope is not None
        at = torch.cat([pos[:, part] for part in some], 1)
        turned = moved(torch.cat([q[:, :, part] for part in some], 2), rope, at, at % length + grid.size)
        there = turned.split([part.stop - part.start for part in some], 2)
    for edge, part, turn in zip(edges, some, there, strict=True):
        end, before = start + part.stop, edge - length
        other = None if far is None or turn is None or before <= 0 else Far(turn, far.k.detach(), before)
        yield end, last_queries(q[:, :, part], cut(kv, 0, end), rows, far=other, **how)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- lists
def ranges(first: int, blocks: int, block: int, length: int, device: torch.device) -> dict[str, Lists]:
    """Every key of every region, as tiles of `block` keys for the query blocks first..first + blocks (aligned grids)."""
    each = length // block
    row = torch.arange(first, first + blocks, device=device)
    own = row // each * each
    last = (first + blocks - 1) // each * each
    none = torch.zeros(1, 1, blocks, 0, dtype=torch.int32, device=device)
    out = {}
    for name, lo, hi, width in (
        ("intra", own, row + 1, min(each, first + blocks)),
        ("succ", (own - each).clamp(min=0), own, each),
        ("inter", torch.zeros_like(own), (own - each).clamp(min=0), max(1, last - each)),
    ):
        count = hi - lo
        step = torch.minimum(torch.arange(width, device=device), (count - 1).clamp(min=0)[:, None])
        tiles = ((lo[:, None] + step) * block).int()
        out[name] = (tiles[None, None], count.int()[None, None], none, none.sum(-1, dtype=torch.int32))
    return out


def by_regions(chosen: Sequence[Choice], first: int, blocks: int, block: int, length: int) -> dict[str, Lists]:
    """Lists of the query blocks first..first + blocks, of one chunk after another, for each one's voted keys and distances.

    A distance d joins a block of queries with the key blocks d // block and, unless it is a multiple, one more before
    it; those are the tiles. Keys inside a tile of their row, and those of later blocks, are dropped. On a GPU a kernel
    makes all lists and the device is waited for once; elsewhere it is once per chunk and piece of memory.
    """
    each = length // block
    if (kernels := fused.regions(chosen[0][0].new_empty(1, dtype=torch.float32))) is not None:
        keys, many, distances, count = (torch.stack(_widened(t)) for t in zip(*chosen, strict=True))
        marks = touched(distances, count, block, first + blocks)
        return dict(zip(REGIONS, kernels.split_regions(keys, many, marks, first, blocks, block, each), strict=True))
    parts, lo = [], first
    for some in chosen:
        hi = min(first + blocks, (lo // each + 1) * each)
        parts.append(by_region(some, lo, hi - lo, block, length))
        lo = hi
    return {name: join([part[name] for part in parts], 2) for name in REGIONS}


def _widened(some: Sequence[Tensor]) -> list[Tensor]:
    wide = max(t.shape[-1] for t in some)
    return [pad(t, (0, wide - t.shape[-1])) for t in some]


def touched(distances: Tensor, count: Tensor, block: int, blocks: int) -> Tensor:
    """Which distances in blocks hold one of the distances `[..., S]`: bool `[..., blocks + 2]`, the last means nothing."""
    used = lists.used_slots(distances, count)
    out = torch.zeros(*distances.shape[:-1], blocks + 2, dtype=torch.bool, device=distances.device)
    for extra in (0, block - 1):
        where = torch.where(used, (distances + extra) // block, blocks + 1).clamp(max=blocks + 1)
        out.scatter_(-1, where.long(), True)
    return out


def by_region(chosen: Choice, first: int, blocks: int, block: int, length: int) -> dict[str, Lists]:
    """`by_regions` of query blocks of one chunk, without kernels. Waits for the device once per piece of memory."""
    keys, many, distances, count = chosen
    b, heads, device = keys.shape[0], keys.shape[1], keys.device
    nk = first + blocks
    edge = first * block // length * length  # where the own chunk begins
    bounds = {"intra": (edge, nk * block), "succ": (max(0, edge - length), edge), "inter": (0, max(0, edge - length))}
    marks = touched(distances, count, block, nk)
    gap = torch.arange(first, nk, device=device)[:, None] - torch.arange(nk, device=device)
    live = lists.used_slots(keys, many)
    parts: dict[str, list[Lists]] = {name: [] for name in bounds}
    budget = BUDGET if device.type == "cpu" else GPU_BUDGET
    for lo, hi in pieces(heads, 8 * b * blocks * (nk + keys.shape[-1]), budget):
        on = marks[:, lo:hi][..., gap.clamp(min=0)] & (gap >= 0)  # [B, heads, blocks, nk]
        key = keys[:, lo:hi, None].expand(-1, -1, blocks, -1)
        place = (key // block).long()
        past = place <= torch.arange(first, nk, device=device)[:, None]
        alone = live[:, lo:hi, None] & past & ~on.gather(-1, place)
        some = [
            (*lists.compact(on[..., start // block : stop // block]), *lists.compact(alone & (key >= start) & (key < stop)))
            for start, stop in bounds.values()
        ]
        widest = torch.stack([torch.stack([c.amax() for c in four[1::2]]) for four in some]).clamp(min=1)
        for name, (tiles, tile_count, slots, entry_count), wide in zip(bounds, some, widest.tolist(), strict=True):  # waits
            tiles, slots = tiles[..., : wide[0]].contiguous(), slots[..., : wide[1]].long()
            parts[name].append((tiles * block + bounds[name][0], tile_count, key.gather(-1, slots), entry_count))
    return {name: join(some, 1) for name, some in parts.items()}


def join(some: Sequence[Lists], dim: int) -> Lists:
    """Lists of several heads (dim 1) or of several runs of query blocks (dim 2) as one, padded to the widest."""
    if len(some) == 1:
        return some[0]
    out = []
    for slot in range(4):
        tensors = [one[slot] for one in some]
        if slot % 2 == 0:
            wide = max(t.shape[-1] for t in tensors)
            tensors = [pad(t, (0, wide - t.shape[-1])) for t in tensors]
        out.append(torch.cat(tensors, dim))
    return out[0], out[1], out[2], out[3]
