"""What the last queries of a call look at, exactly: mass per key and mass per distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import lists
from ..errors import ConfigError
from ..kv import KV
from ..layout import Layout
from ..select import top_k, top_p
from . import fused
from .keys import BUDGET, pieces, read_keys

REDUCE = ("none", "max", "sum")


@dataclass(frozen=True)
class Probe:
    """Softmax probabilities of `rows` probe rows, summed.

    Attributes:
        columns: fp32 `[B, Hl, M]`, by entry. diagonals: fp32 `[B, Hl, M]`, by distance position(query) - entry.
        rows: probe rows, so that each head's columns (and diagonals) sum to `rows`. Hl is H, or G if reduced.
    """

    columns: Tensor
    diagonals: Tensor
    rows: int


@dataclass(frozen=True)
class Far:
    """Keys in place of the first `end` entries of a view, and the queries as they stand for those.

    Attributes:
        q: `[B, H, N, D]`. k: `[B, G, end or more, D]`.
    """

    q: Tensor
    k: Tensor
    end: int


def last_queries(
    q: Tensor,
    kv: KV,
    rows: int,
    *,
    scale: float,
    softcap: float | None = None,
    reduce: str = "none",
    budget: int = BUDGET,
    far: Far | None = None,
) -> Probe:
    """Probe with the last min(rows, N) queries against all entries, causally.

    The queries are the last N positions before `kv.len` and positions are entry numbers (nothing evicted), so a later
    chunk of a prompt (M > N) is probed at its true distances. Costs rows * M * D multiply-adds a head; holds about
    `budget` numbers, whatever M. On a GPU two kernels do this for dense storage and up to 128 rows, in tiles.

    Args:
        q: `[B, H, N, D]`. kv: a view of M >= N entries, G kv heads; `kv.bias` is added to the logits.
        reduce: over the query heads of a group: "none", "max" (what any head needs) or "sum".
        far: the first entries where they are other keys, which meet the queries elsewhere.
    """
    if reduce not in REDUCE:
        raise ConfigError(f"reduce: expected one of {', '.join(REDUCE)}, got {reduce!r}")
    b, h, n, d = q.shape
    _, g, m, _, _ = kv.shape
    r, rows = h // g, min(rows, n)
    kernels = fused.estimates(q)
    if kernels is not None and kernels.probes(q, kv, rows) and (far is None or far.end % kernels.PROBE_ROWS == 0):
        other = None if far is None else (far.q[:, :, n - rows :], far.k, far.end)
        both = kernels.last_queries(q, kv, rows, scale, softcap, other).unflatten(2, (g, r))
        return Probe(_group(both[0], reduce), _group(both[1], reduce), rows)
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    end = 0 if far is None else far.end
    sides = [(t[:, :, n - rows :].to(acc) * scale).view(b, g, r, rows, d) for t in ([] if far is None else [far.q]) + [q]]
    ends = kv.lengths()
    columns = torch.zeros(b, g, r, m, dtype=acc, device=q.device)
    diagonals = torch.zeros_like(columns)
    entry = torch.arange(m, device=q.device)
    for g0, g1 in pieces(g, b * r * rows * m, budget):
        keys = ([] if far is None else [far.k[:, g0:g1, :end]]) + [read_keys(kv, g0, g1)[:, :, end:]]
        keys = [k.to(acc).transpose(-1, -2) for k in keys]  # [B, g, D, M], or two that make M together
        for lo, hi in pieces(rows, b * (g1 - g0) * r * m, budget):
            parts = [t[:, g0:g1, :, lo:hi].reshape(b, g1 - g0, -1, d) @ k for t, k in zip(sides, keys, strict=True)]
            s = (parts[0] if far is None else torch.cat(parts, -1)).view(b, g1 - g0, r, hi - lo, m)
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            if kv.bias is not None:
                s = s + kv.bias[:, g0:g1, None, None].to(acc)
            last = ends[:, g0:g1, None, None] - rows + torch.arange(lo, hi, device=q.device)[:, None]  # [B, g, rows, 1]
            # Without ragged lengths every row of this piece sees the entries before `clear`: only a corner is masked.
            clear = m - rows + lo if kv.len is None else 0
            s[..., clear:].masked_fill_((entry[clear:] > last)[:, :, None], float("-inf"))
            p = s.softmax(-1)
            columns[:, g0:g1] += p.sum(-2)
            by_offset = _diagonal_sums(p)
            at = (ends[:, g0:g1, None] - rows + hi - entry).clamp(0, m)  # [B, g, M]
            diagonals[:, g0:g1] += by_offset.gather(-1, at[:, :, None].expand(-1, -1, r, -1))
    return Probe(_group(columns, reduce), _group(diagonals, reduce), rows)


def vote(
    probe: Probe, m: int, columns: tuple[int, ...], diagonals: tuple[int, ...], *, sink: int, local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The keys and the distances with the most mass of each head, among the first m.

    Args:
        columns, diagonals: how many of each, for each of the probe's Hl heads.
        sink, local: the first keys, and the nearest distances, are always in and count towards these numbers.

    Returns:
        (keys, counts, distances, counts): int32 `[B, Hl, most]`, ascending, padded with the row's last, and int32
        `[B, Hl]`, twice. Equal mass goes to the lower number. Nothing waits for the device.
    """
    x = probe.columns
    if m == x.shape[-1] and (kernels := fused.estimates(x[..., :1])) is not None:
        forced = (min(sink, m),) * len(columns) + (min(local, m),) * len(diagonals)
        return kernels.top_entries(torch.stack((x, probe.diagonals)), columns + diagonals, forced)
    at = torch.arange(x.shape[-1], device=x.device)
    out: list[Tensor] = []
    for score, sizes, least in ((x, columns, sink), (probe.diagonals, diagonals, local)):
        wide = max(max(sizes), least)
        k = wide if wide == min(sizes) else torch.tensor(sizes, device=x.device)
        index, count = lists.compact(top_k(score, k, valid=at < m, forced=at < least))
        out += [index[..., :wide], count]
    return out[0], out[1], out[2], out[3]


def factored(shape: tuple[int, int, int, int], chosen: tuple[Tensor, Tensor, Tensor, Tensor], **grid: Any) -> Layout:
    """The layout of `vote`'s keys and distances; close distances become one tile. `grid`: as in `Layout.factored`."""
    keys, many, distances, count = chosen
    if (kernels := fused.estimates(keys.new_empty(1, 1, dtype=torch.float32))) is None:
        parts: dict[str, Any] = dict(columns=keys, column_count=many, diagonals=distances, diagonal_count=count)
        return Layout.factored(shape, validate=False, **parts, **grid)
    distances, count = kernels.merge_diagonals(distances, count, grid["block_q"], grid["tile_width"])
    return Layout(shape, columns=keys, column_count=many, diagonals=distances, diagonal_count=count, **grid)


def needed(probe: Probe, m: int, share: float | Tensor) -> tuple[Tensor, Tensor]:
    """How many of the first m keys, and of the distances, hold `share` (one, or `[1 or B, Hl]`) of their mass: integers
    `[B, Hl]` twice."""
    x = probe.columns
    if m == x.shape[-1] and (kernels := fused.estimates(x[..., :1])) is not None:
        both = kernels.mass_counts(torch.stack((x, probe.diagonals)), share)
        return both[0], both[1]
    return top_p(x[..., :m], share).sum(-1), top_p(probe.diagonals[..., :m], share).sum(-1)


def _diagonal_sums(p: Tensor) -> Tensor:
    """`[..., L, M]` -> `[..., M + 1]`: at c the sum over rows i of p[i, c - L + i].

    With L zeros in front, row i of a matrix W = L + M wide, read from flat index i * (W + 1), is shifted by i.
    """
    rows, m = p.shape[-2:]
    return pad(p, (rows, 0)).flatten(-2).unfold(-1, m + 1, rows + m + 1).sum(-2)


def _group(x: Tensor, reduce: str) -> Tensor:
    if reduce == "none":
        return x.flatten(1, 2)
    return x.amax(2) if reduce == "max" else x.sum(2)
