"""Tree searches for key blocks: judge a range of keys by a few of them, keep the best ranges, look closer.

`descend`: halve ranges, look at one block of each half. Lee et al. 2024, "A Training-free Sub-quadratic Cost Transformer
Model Serving Framework With Hierarchically Pruned Attention" (arXiv 2406.09827).
`prune`: stages of ever smaller ranges, each judged by a binary search for its best key. Lee et al. 2025, "InfiniteHiP:
Extending Language Model Context Up to 3 Million Tokens on a Single GPU" (arXiv 2502.08910).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kv import KV
from ..lists import repeat_heads
from ..packed import PackedKV
from ..select import top_indices
from . import fused

REPRESENTATIVES = ("center", "first", "last")


def depth(blocks: int, keep: int) -> int:
    """Halvings until each of `keep` groups that share `blocks` key blocks is a single block."""
    return (-(-blocks // keep) - 1).bit_length()


def take_keys(kv: KV, entries: Tensor) -> Tensor:
    """Keys of entries int64 `[B, G, ...]`, 0 <= entry < M, out of any storage: `[B, G, ..., D]`."""
    b, g = entries.shape[:2]
    if isinstance(kv, PackedKV) and kv.device.type == "cpu":  # on a GPU to unpack a layer costs less than many launches
        return kv.keys_at(entries.flatten(2)).unflatten(2, entries.shape[2:])
    if kv.kind != "dense":
        return kv.flat()[0][kv.rows(entries)]
    lead = (1,) * (entries.dim() - 2)
    row = torch.arange(b, device=entries.device).view(b, 1, *lead)
    return kv.k[row, torch.arange(g, device=entries.device).view(1, g, *lead), entries]


def descend(
    q: Tensor,
    q_pos: Tensor,
    kv: KV,
    first: Tensor,
    blocks: Tensor,
    *,
    keep: int,
    block: int,
    levels: int,
    scale: float,
    softcap: float | None = None,
    representative: str = "center",
) -> tuple[Tensor, Tensor]:
    """The (about) `keep` best of `blocks` key blocks for each search, by their largest logit.

    The range is cut into `keep` groups. Each level splits every group at its middle, scores one block of each half (its
    representative) by the largest logit of any query with any of its keys that the query sees, and keeps the `keep`
    best halves. Equal scores go to the lower block. A range of up to `keep` blocks comes back whole, whatever it scores.

    Args:
        q: `[B, Hl, n, s, D]`, the s queries of each of n searches of each list; Hl is a multiple of G.
        q_pos: int64 `[B, 1, n, s]`, their text positions, for causality.
        first, blocks: int64, broadcast to `[B, Hl, n]`: number of the first searched block, and how many there are.
        levels: `depth` of the longest range; shorter ones are done earlier and stay as they are.

    Returns:
        (int64 `[B, Hl, n, keep]` block numbers, ascending among those that count, live bool of the same shape).
        Holds about 2 * keep * block * (D + s) numbers for each of B * Hl * n searches; nothing waits for the device.
    """
    lead = q.shape[:3]
    g = torch.arange(keep, device=q.device)
    first, blocks = first.expand(lead)[..., None], blocks.expand(lead)[..., None]
    start = first + blocks * g // keep
    size = first + blocks * (g + 1) // keep - start
    for _ in range(levels):
        left = size // 2
        start = torch.stack([start, start + left], -1).flatten(-2)  # halves side by side, so that starts ascend
        size = torch.stack([left, size - left], -1).flatten(-2)
        at = start + {"center": size // 2, "first": 0 * size, "last": (size - 1).clamp(min=0)}[representative]
        score = block_maxima(q, q_pos, kv, at, block=block, scale=scale, softcap=softcap)
        index, count = top_indices(score, keep, valid=size > 0)
        start, size = start.gather(-1, index.long()), size.gather(-1, index.long())
        size = torch.where(g < count[..., None], size, 0)
    return start, size > 0


def descend_rows(
    q: Tensor,
    kv: KV,
    ends: Tensor,
    *,
    start: int,
    q_pos: Tensor | None,
    size: int,
    step: int,
    first: int,
    keep: int,
    block: int,
    tile: int,
    lists: int,
    representative: str,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`descend` for each block of `size` rows of a call, where a kernel computes it straight from q; else None.

    Args:
        q: `[B, H, N, D]`, rows from position `start` on. Each search has every `step`-th row of a block of the grid from
            position 0; of a row outside the call it takes the nearest one inside. H / lists neighbouring heads search
            together.
        ends: int `[B or 1, E, n]` for the n blocks of the call, E a divisor of `lists`: blocks from number `first` up to
            the one with entry end - 1 are searched.
        q_pos: int64 `[B, N]`, text positions of the rows; None: start, start + 1, ..
        tile: keys of an aligned tile, a multiple of `block`: what is found is widened to whole tiles, each listed once.
        keep, block, representative: as in `descend`.

    Returns:
        (first keys of the tiles, int32 `[B, lists, n, keep]`, ascending, padded with the last; counts int32). Needs a few
        MiB beside them; nothing waits for the device.
    """
    rows = -(-size // step) * (q.shape[1] // lists)
    if (kernels := fused.trees(q)) is None or not kernels.descents(q, kv, rows, keep, block):
        return None
    tree = dict(size=size, step=step, first=first, keep=keep, block=block, tile=tile, lists=lists)
    how = dict(representative=representative, scale=scale, softcap=softcap)
    found: tuple[Tensor, Tensor] = kernels.descend(q, kv, ends, start=start, q_pos=q_pos, **tree, **how)
    return found


def block_maxima(
    q: Tensor, q_pos: Tensor, kv: KV, blocks: Tensor, *, block: int, scale: float, softcap: float | None = None
) -> Tensor:
    """The largest logit of any query with any key of a block: fp32 `[B, Hl, n, c]`, -inf where no query sees a key.

    Args:
        q: `[B, Hl, n, s, D]`. q_pos: int64 `[B, 1, n, s]`. blocks: int64 `[B, Hl, n, c]`, numbers of key blocks.
    """
    b, hl, n, _, _ = q.shape
    groups = kv.shape[1]
    entries = (blocks[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)  # [B, Hl, n, c * block]
    ends = repeat_heads(kv.lengths(), hl)[:, :, None, None]
    inside = entries < ends
    entries = torch.minimum(entries, (ends - 1).clamp(min=0))

    def of(x: Tensor) -> Tensor:
        """An entry tensor `[B, G, M]` at these entries."""
        return x.gather(2, entries.reshape(b, groups, -1)).view(entries.shape)

    keys = take_keys(kv, entries.unflatten(1, (groups, -1))).flatten(1, 2)
    acc = torch.promote_types(q.dtype, torch.float32)
    s = (q.to(acc) * scale) @ keys.to(acc).transpose(-1, -2)  # [B, Hl, n, s, c * block]
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if kv.bias is not None:
        s = s + of(kv.bias.to(acc))[..., None, :]
    pos = entries if kv.pos is None else of(kv.positions())
    seen = inside[..., None, :] & (pos[..., None, :] <= q_pos[..., None])
    return s.masked_fill(~seen, float("-inf")).amax(-2).unflatten(-1, (-1, block)).amax(-1)


class Stage(NamedTuple):
    """Ranges of `chunk` keys, scored by the means of `stride` queries, among the best `keep` keys of the stage before."""

    chunk: int
    stride: int
    keep: int = 0  # 0 in the first stage: all keys


def prune(
    q: Tensor,
    q_pos: Tensor,
    kv: KV,
    ends: Tensor,
    stages: tuple[Stage, ...],
    *,
    begin: int,
    many: int,
    keep: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunks of the last stage that hold the best keys, about `keep` keys for each search.

    Each stage cuts what the one before kept into its chunks (on a grid from entry 0), looks for the best key of each by
    `scout` and keeps the best chunks. Equal scores go to the lower chunk.

    Args:
        q, q_pos: as in `descend`; every stride divides the number of queries s.
        ends: int64, broadcasts to `[B, Hl, n]`: entries begin..ends - 1 are searched, ends <= many.
        stages: at least one; each chunk divides the one before, and the `keep` of a stage counts whole chunks before it.

    Returns:
        (int64 `[B, Hl, n, c]` chunk numbers, ascending among those that count, live bool of the same shape). Holds about
        4 * c * (D + s) numbers for the c chunks of each search; nothing waits for the device.
    """
    lead, ends = q.shape[:3], ends.expand(q.shape[:3])[..., None]
    chunk = stages[0].chunk
    number = torch.arange(begin // chunk, max(begin // chunk + 1, -(-many // chunk)), device=q.device).expand(*lead, -1)
    live = number * chunk < ends
    for i, stage in enumerate(stages):
        if i:
            ratio = chunk // stage.chunk
            number = (number[..., None] * ratio + torch.arange(ratio, device=q.device)).flatten(-2)
            chunk = stage.chunk
            live = live.repeat_interleave(ratio, -1) & (number * chunk < ends)
        mean = q.unflatten(3, (-1, stage.stride)).mean(4, dtype=torch.promote_types(q.dtype, torch.float32))
        size = torch.where(live, (ends - number * chunk).clamp(0, chunk), 0)
        newest = q_pos.unflatten(3, (-1, stage.stride)).amax(4)
        score = scout(mean, newest, kv, number * chunk, size, levels=depth(chunk, 1), scale=scale, softcap=softcap)
        left = keep if i + 1 == len(stages) else stages[i + 1].keep
        index, count = top_indices(score, max(1, left // chunk), valid=live)
        number = number.gather(-1, index.long())
        live = torch.arange(index.shape[-1], device=q.device) < count[..., None]
    return number, live


def scout(
    q: Tensor, q_pos: Tensor, kv: KV, start: Tensor, size: Tensor, *, levels: int, scale: float, softcap: float | None = None
) -> Tensor:
    """The best logit that a binary search meets in each range of entries: fp32 `[B, Hl, n, c]`.

    It compares the keys in the middle of both halves and goes on in the better one (the first, of equals) until one key
    is left: two keys a level, `levels` = ceil(log2(longest range)).

    Args:
        q, q_pos: as in `descend`. start, size: int64 `[B, Hl, n, c]`, the ranges.
    """
    best = block_maxima(q, q_pos, kv, start, block=1, scale=scale, softcap=softcap) if not levels else None
    for _ in range(levels):
        half = size // 2
        at = torch.stack([start + half // 2, start + half + (size - half) // 2], -1).flatten(-2)
        both = block_maxima(q, q_pos, kv, at, block=1, scale=scale, softcap=softcap).unflatten(-1, (-1, 2))
        best = both.amax(-1) if best is None else torch.maximum(best, both.amax(-1))
        right = (both[..., 1] > both[..., 0]) | (half == 0)
        start, size = torch.where(right, start + half, start), torch.where(right, size - half, half)
    assert best is not None
    return best
