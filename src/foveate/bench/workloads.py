"""Seeded layouts for benchmarks: random blocks, tiles with columns, and a workload shaped like real attention.

All are causal, made on the device they are used on, one head at a time, so that no N x M exists; a seed gives the same
layout on one kind of device.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import lists
from ..errors import ConfigError
from ..layout import Layout

# Shares of the computed blocks of `realistic`: what a trained model's heads are made of.
SHARES = {"sink": 0.05, "local": 0.3, "columns": 0.25, "diagonals": 0.2, "clusters": 0.2}


def random_blocks(
    h: int,
    n: int,
    density: float,
    *,
    block_q: int = 128,
    block_k: int = 128,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Layout:
    """Each visible block with probability `density`, a list per head; the diagonal and the first block are forced."""
    nq, nk = -(-n // block_q), -(-n // block_k)
    gen = torch.Generator(device=device).manual_seed(seed)
    visible, diagonal = _visible(n, block_q, block_k, device)
    keep = (torch.rand(h, nq, nk, device=device, generator=gen) < density) & visible | diagonal
    keep[:, :, 0] = True
    return _blocks(keep, n, block_q, block_k)


def tiles_and_columns(
    h: int,
    n: int,
    *,
    tiles: int = 96,
    columns: int = 900,
    block: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Layout:
    """Per block of rows, `tiles` random key tiles of 64 with the diagonal among them and `columns` single keys between.

    Early blocks have fewer of both: no more than their past holds.
    """
    gen = torch.Generator(device=device).manual_seed(seed)
    width = 64
    nq, nk = -(-n // block), -(-n // width)
    visible, diagonal = _visible(n, block, width, device)
    start = torch.arange(nq, device=device)[:, None] * block
    rows = []
    for _ in range(h):
        score = torch.rand(nq, nk, device=device, generator=gen).masked_fill(~visible, -1).masked_fill(diagonal, 2)
        best = score.topk(min(tiles, nk), -1)
        keep = torch.zeros_like(visible).scatter_(-1, best.indices, best.values >= 0)
        index, count = lists.compact(keep)
        draw = (torch.rand(nq, 3 * columns, device=device, generator=gen) * start).to(torch.int32)
        drawn, used = lists.sort_unique(draw[None, None])
        one = Layout.lists(
            (1, 1, n, n), block_q=block, tile_width=width, validate=False,
            tiles=(index * width)[None, None, :, :tiles], tile_count=count[None, None],
            entries=drawn, entry_count=used * (start[:, 0] > 0),
        )  # fmt: skip
        assert one.entries is not None and one.entry_count is not None
        left = one.entry_count[..., None].clamp(min=columns)  # evenly spaced picks where more than `columns` are left
        pick = (torch.arange(columns, device=device) * left) // columns
        rows.append((one.tiles, one.tile_count, one.entries.gather(-1, pick), one.entry_count.clamp(max=columns)))
    index, count, entries, used = (torch.cat(parts, 1).contiguous() for parts in zip(*rows, strict=True))  # type: ignore[arg-type]
    return Layout(
        (1, h, n, n), block_q=block, tile_width=width, tiles=index, tile_count=count, entries=entries, entry_count=used
    )


def diagonals_and_columns(
    h: int,
    n: int,
    *,
    diagonals: int = 96,
    columns: int = 900,
    block: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Layout:
    """The factored form: tile distances, the nearest among them, and columns, both shared by all rows of a head."""
    gen = torch.Generator(device=device).manual_seed(seed)
    distance = torch.rand(h, -(-n // block), device=device, generator=gen)
    distance[:, 0] = 2
    d = distance.topk(min(diagonals, distance.shape[1]), -1).indices.sort(-1).values * block
    c = torch.rand(h, n, device=device, generator=gen).topk(min(columns, n), -1).indices
    c, used = lists.sort_unique(c[None])
    full = torch.full((1, h), d.shape[-1], dtype=torch.int32, device=device)
    return Layout(
        (1, h, n, n),
        block_q=block,
        tile_width=block,
        diagonals=d[None].int(),
        diagonal_count=full,
        columns=c,
        column_count=used,
    )


def realistic(
    h: int, n: int, density: float, *, shares: dict[str, float] | None = None, block_q: int = 128, block_k: int = 128,
    seed: int = 0, device: torch.device | str = "cpu",
) -> Layout:  # fmt: skip
    """Sink, local window, columns, diagonals and clusters in stated shares of `density`, own lists per head.

    Neighbouring query blocks share most of their lists: columns and diagonals last for the whole prompt (each row block
    drops one in ten), clusters are rectangles of about 16 query blocks. Overlaps make the density a little smaller.
    """
    shares = SHARES if shares is None else shares
    if set(shares) != set(SHARES):
        raise ConfigError(f"shares: expected the keys {', '.join(SHARES)}, got {', '.join(shares)}")
    nq, nk = -(-n // block_q), -(-n // block_k)
    visible, diagonal = _visible(n, block_q, block_k, device)
    gen = torch.Generator(device=device).manual_seed(seed)
    total = float(visible.sum()) * density
    budget = {name: total * share for name, share in shares.items()}
    i = torch.arange(nq, device=device)[:, None] * block_q // block_k
    j = torch.arange(nk, device=device)[None]
    rand = lambda *s: torch.rand(*s, device=device, generator=gen)  # noqa: E731
    first = round(budget["sink"] / nq)
    near = round(budget["local"] / nq)
    per_line = nq / 2 * 0.9  # blocks of a column or diagonal at a random place, one in ten of them dropped
    keep = torch.zeros(h, nq, nk, dtype=torch.bool, device=device)
    for head in range(h):
        keep[head] = (j < first) | ((i - j) < near)
        at = rand(nk).topk(min(nk, round(budget["columns"] / per_line))).indices
        keep[head, :, at] |= rand(nq, len(at)) < 0.9
        far = rand(nk).topk(min(nk, round(budget["diagonals"] / per_line))).indices
        line = torch.zeros(2 * nk, dtype=torch.bool, device=device)
        line[far] = True
        keep[head] |= line[(i - j).clamp(min=-nk)] & (i >= j) & (rand(nq, nk) < 0.9)
        size = max(1, min(16, nq // 4))
        for _ in range(round(budget["clusters"] / (size * size))):
            r, c = (
                (rand(2) * torch.tensor([nq - size + 1, nk - size + 1], device=device)).long().sort(descending=True).values
            )
            rows = (i >= r * block_q // block_k) & (i < (r + size) * block_q // block_k)
            keep[head] |= rows & (j >= c) & (j < c + size)
    keep &= visible
    keep |= diagonal
    keep[:, :, 0] = True
    return _blocks(keep, n, block_q, block_k)


def pages(
    b: int, h: int, g: int, m: int, *, page: int = 64, budget: int = 2048, seed: int = 0, device: torch.device | str = "cpu"
) -> Layout:
    """A decode step: per kv head random pages that hold `budget` tokens, the first and the last page among them."""
    gen = torch.Generator(device=device).manual_seed(seed)
    score = torch.rand(b, g, 1, -(-m // page), device=device, generator=gen)
    score[..., 0] = score[..., -1] = 2
    index = score.topk(min(budget // page, score.shape[-1]), -1).indices.sort(-1).values * page
    return Layout.lists((b, h, 1, m), block_q=1, tile_width=page, tiles=index, validate=False)


def _visible(n: int, block_q: int, block_k: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(blocks with a visible pair, blocks the diagonal crosses), bool `[nq, nk]`."""
    i = torch.arange(-(-n // block_q), device=device)[:, None] * block_q
    j = torch.arange(-(-n // block_k), device=device)[None] * block_k
    visible = j <= i + block_q - 1
    return visible, visible & (j + block_k - 1 >= i)


def _blocks(keep: Tensor, n: int, block_q: int, block_k: int) -> Layout:
    layout = Layout.from_block_mask(keep[None], n, n, block_q=block_q, block_k=block_k)
    assert layout.tiles is not None and layout.tile_count is not None
    return replace(layout, tiles=lists.trim(layout.tiles, layout.tile_count))
