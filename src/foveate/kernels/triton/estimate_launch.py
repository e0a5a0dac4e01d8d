"""Launches of the estimators of `estimate_*.py`: shapes in, a few numbers out, nothing that waits for the device."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...kv import KV
from . import estimate_blocks, estimate_lists, estimate_probe, estimate_select
from .config import device
from .paging_launch import _pad, usable

__all__ = ["usable"]  # whether these kernels compute on tensors like t: its device, dtype and head dim

LOG2E = math.log2(math.e)
PROBE_ROWS = 128  # most probe rows of a head: a tile of keys is as wide
TILE, PART = 64, 32  # of score_blocks: blocks of a side, channels of one product
BLOCKS = 8192  # most key blocks of a row: it is held whole
CHUNK, ENTRIES, CHUNKS = 256, 4096, 128  # of narrow: entries of a step, least entries and most number of chunks
MERGE = 1024  # distances that merge_diagonals holds at once
SHARE = 4  # programs a multiprocessor, where work is split


# ---------------------------------------------------------------------- the probe
def probes(q: Tensor, kv: KV, rows: int) -> bool:
    """Whether `last_queries` computes this call: dense keys of one length, without weights, and tiles that fit."""
    d = _pad(q.shape[-1])
    plain = kv.kind == "dense" and kv.len is None and kv.bias is None and kv.k.dtype == q.dtype
    if q.dtype == torch.float32 and q.device.type == "cuda":  # Triton 3.6 wants 256 KB of shared memory for it
        return False
    return plain and 1 <= rows <= PROBE_ROWS and _probe_stages(_index(q), _pad(rows), d, q.element_size()) > 0


@functools.lru_cache(maxsize=64)
def _probe_stages(index: int | None, rows: int, d: int, size: int) -> int:
    """Stages of the loop over keys: what fits beside the queries and the sheared tile; 0 if nothing does.

    Two programs of few rows share a multiprocessor: one computes while the other waits.
    """
    shared, _ = device(index)
    for stages, programs in ((3, 2), (2, 2), (3, 1), (2, 1), (1, 1)):
        if (rows + stages * PROBE_ROWS) * d * size + rows * PROBE_ROWS * 4 <= 0.99 * shared / programs:
            return stages
    return 0


def last_queries(
    q: Tensor, kv: KV, rows: int, scale: float, softcap: float | None, far: tuple[Tensor, Tensor, int] | None = None
) -> Tensor:
    """Mass by key and by distance of the last `rows` rows of q `[B, H, N, D]`: fp32 `[2, B, H, M]`.

    For calls that `probes` accepts. Scratch is a number per row and split. far: `rows` queries `[B, H, rows, D]`, keys
    `[B, G, >= edge, D]` and `edge`, a multiple of PROBE_ROWS: entries before it are these keys, met by these queries.
    """
    b, h, n, d = q.shape
    _, g, m, _, _ = kv.shape
    r, size = h // g, q.element_size()
    q = q[:, :, n - rows :]
    q2, k2, edge = (q, kv.k, 0) if far is None else far
    assert edge % PROBE_ROWS == 0, edge
    q, k, q2, k2 = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, kv.k, q2, k2))
    index = _index(q)
    cores = device(index)[1]
    stages = _probe_stages(index, _pad(rows), _pad(d), size)
    tile = max(16, min(128 if size < 4 else 64, triton.next_power_of_2(r * rows)))
    keys = 64  # twice as many would fit, and take the registers of a second program
    units, blocks = -(-r * rows // tile), -(-m // keys)
    share = -(-blocks // max(1, min(blocks, SHARE * cores // (units * b * g), 64)))
    splits = -(-blocks // share)
    part = torch.empty(b * h * rows * splits, dtype=torch.float32, device=q.device)
    strides = [step for t in (q, k, q2, k2) for step in t.stride()[:3]]
    same = dict(TWO=far is not None, D=d, D_PAD=_pad(d), CAP=bool(softcap), FP32=size == 4, STAGES=stages)
    cap = softcap or 1.0
    estimate_probe.row_sums[(units, splits, b * g)](
        q, k, part, scale * LOG2E, cap, m, share * keys, splits, q2, k2, edge, g, *strides,
        ROWS=rows, GROUP=r, TILE=tile, KEYS=keys, num_warps=8 if tile == 128 else 4, **same,
    )  # fmt: skip
    out = torch.empty(2, b, h, m, dtype=torch.float32, device=q.device)
    blocks = -(-m // PROBE_ROWS)
    steps = max(1, -(-blocks * h * b // (SHARE * cores)))
    estimate_probe.row_mass[(h, -(-blocks // steps), b)](
        q, k, part, out[0], out[1], scale * LOG2E, cap, m, steps, splits, 0, q2, k2, edge, h, g, *strides,
        ROWS=rows, ROWS_PAD=_pad(rows), KEYS=PROBE_ROWS, SPLITS=triton.next_power_of_2(splits),
        num_warps=8 if _pad(rows) == 128 else 4, **same,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------- thresholds of long rows
@dataclass
class Search:
    """Scratch of eight phases over score `[rows, n]`, and what `settled` needs to read it."""

    part: Tensor
    edges: Tensor
    aboves: Tensor
    targets: Tensor
    chunks: int

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.part, self.edges, self.aboves, self.targets

    @property
    def pad(self) -> int:
        return triton.next_power_of_2(self.chunks)


def _search(score: Tensor, p: float | Tensor, keep: Tensor | None, forced: Tensor | None, live: Tensor | None) -> Search:
    """p may have a number a row `[rows]`; a share of 1 is all of it, which no sum decides."""
    rows, n = score.shape
    each = isinstance(p, Tensor)
    if isinstance(p, Tensor):
        p = torch.where(p >= 1, math.inf, p.double()).contiguous()
    entries = max(ENTRIES, triton.next_power_of_2(-(-n // CHUNKS)))
    chunks = -(-n // entries)
    both = torch.empty((8 * chunks * 16 + 8 + 1) * rows, dtype=torch.float64, device=score.device)
    part, aboves, targets = both.split([8 * rows * chunks * 16, 8 * rows, rows])
    edges = torch.empty(8 * rows, dtype=torch.int32, device=score.device)
    work = Search(part, edges, aboves, targets, chunks)
    for phase in range(8):
        estimate_select.narrow[(chunks, rows)](
            score, score if live is None else live, *work.state, work.edges if keep is None else keep,
            work.edges if forced is None else forced, rows, n, chunks, phase, entries // CHUNK,
            0 if isinstance(p, Tensor) else _bits(p), p if isinstance(p, Tensor) else score,
            MASS=keep is None, EACH=each, ALL_LIVE=live is None, CHUNK=CHUNK, CHUNKS=work.pad, num_warps=8,
        )  # fmt: skip
    return work


def top_entries(score: Tensor, keep: tuple[int, ...], forced: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best entries of two halves of rows, each half a list of its own width.

    Args:
        score: fp32 `[2, B, Hl, n]`, contiguous. keep, forced: of each head, for the first half, then for the second:
            entries to keep; how many first entries are kept whatever their score (part of keep, or more).

    Returns:
        For each half int32 `[B, Hl, widest]`, ascending, padded with the row's last, and counts int32 `[B, Hl]`.
    """
    _, b, heads, n = score.shape
    rows = 2 * b * heads
    most = [min(n, max(k, f)) for k, f in zip(keep, forced, strict=True)]
    wide = max(most[:heads]), max(most[heads:])
    spread = lambda x: (x[:heads] * b) + (x[heads:] * b)  # noqa: E731
    keeps, musts = (numbers(score.device, spread(x)) for x in (keep, forced))
    flat = score.view(rows, n)
    work = _search(flat, 0.0, keeps, musts, None)
    index = torch.empty(rows // 2 * sum(wide), dtype=torch.int32, device=score.device)
    count = torch.empty(rows, dtype=torch.int32, device=score.device)
    estimate_select.take[(rows,)](
        flat, *work.state, keeps, musts, index, count, rows, n, work.chunks, rows // 2, *wide,
        CHUNK=4096, CHUNKS=work.pad, num_warps=8,
    )  # fmt: skip
    a, c = (t.view(b, heads, -1) for t in index.split([rows // 2 * w for w in wide]))
    first, second = count.view(2, b, heads)
    return a, first, c, second


def mass_counts(score: Tensor, p: float | Tensor) -> Tensor:
    """Entries in the smallest set of each row of fp32 `[..., n]` that reaches the share p of its mass: int32 `[...]`.

    p: one number, or one a row, of a shape that expands to `[...]`.
    """
    n = score.shape[-1]
    if isinstance(p, Tensor):
        p = p.expand(score.shape[:-1]).flatten()
    elif p >= 1:
        return torch.full(score.shape[:-1], n, dtype=torch.int32, device=score.device)
    flat = score.reshape(-1, n)
    work = _search(flat, p, None, None, None)
    count = torch.empty(flat.shape[0], dtype=torch.int32, device=score.device)
    estimate_select.count_mass[(flat.shape[0],)](
        flat, *work.state, count, flat.shape[0], n, work.chunks, CHUNK=4096, CHUNKS=work.pad, num_warps=8
    )
    return count.view(score.shape[:-1])


def merge_diagonals(d: Tensor, count: Tensor, reach: int, tile: int) -> tuple[Tensor, Tensor]:
    """`lists.merge_diagonals` of ascending distances int32 `[B, Hl, S]`; nothing is trimmed. tile >= reach."""
    d, count = d.contiguous(), count.contiguous()
    tiles, many = torch.empty_like(d), torch.empty_like(count)
    estimate_lists.merge_tiles[(count.numel(),)](
        d, count, tiles, many, d.shape[-1], REACH=reach, TILE=tile, CHUNK=MERGE, num_warps=4
    )
    return tiles, many


# ---------------------------------------------------------------------- blocks
def block_means(x: Tensor, block: int, offset: int = 0) -> Tensor:
    """Means of x `[B, heads, n, D]` over blocks of rows: `pooled.block_pool(x, block, offset=offset)`."""
    b, h, n, d = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    blocks = -(-(n + offset) // block)
    out = torch.empty(b, h, blocks, d, dtype=torch.float32, device=x.device)
    estimate_blocks.block_means[(blocks, b * h)](
        x, out, n, offset, h, x.stride(0), x.stride(1), x.stride(2),
        BLOCK=block, ROWS=min(64, triton.next_power_of_2(block)), D=d, D_PAD=_pad(d), num_warps=4,
    )  # fmt: skip
    return out


def block_scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, first: int, *,
    softmax: bool, group: bool = False, live: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scores of pooled queries against the causal key blocks, or with `softmax` probabilities: fp32 `[B, Hl, nq, nk]`.

    q fp32 `[B, H, nq, D]`, k fp32 `[B, G, nk, D]`; `group` takes the highest score of a group's heads. Without softmax
    what lies beyond the causal blocks is not written, nor are heads where `live` int8 `[B, H]` is 0.
    """
    b, h, nq, d = q.shape
    g, nk = k.shape[1], k.shape[2]
    q = q.contiguous()
    if k.stride() != (k.stride(0), k.stride(1), d, 1) or k.stride(0) != g * k.stride(1):
        k = k.contiguous()
    lists = g if group else h
    out = torch.empty(b, lists, nq, nk, dtype=torch.float32, device=q.device)
    estimate_blocks.score_blocks[(-(-nq // TILE), lists, b)](
        q, k, out, out if live is None else live, scale, softcap or 1.0, nq, nk, first, lists, g, k.stride(1),
        GROUP=h // lists, TILE=TILE, KEYS=TILE, PART=min(PART, _pad(d)), D=d, D_PAD=_pad(d),
        SOFTMAX=softmax, CAP=bool(softcap), ALL_LIVE=live is None, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


def top_blocks(score: Tensor, first: int, scale: int, *, keep: tuple[int, ...] = (), p: float | None = None,
               sink: int = 1, diagonal: bool = True) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per row of query blocks the best causal key blocks, times `scale`: int32 `[B, Hl, nq, width]`, counts `[B, Hl, nq]`.

    Args:
        score: fp32 `[B, Hl, nq, nk]`, contiguous; row r sees the key blocks up to first + r.
        keep: blocks of each list's rows. p: instead of it the share of the row's mass; then width is nk.
        sink, diagonal: the first blocks and the last visible one are always in.
    """
    b, heads, nq, nk = score.shape
    width = nk if p is not None else min(nk, max(*keep, sink + diagonal))
    keeps = numbers(score.device, (keep or (0,) * heads) * b)
    tiles = torch.empty(b, heads, nq, width, dtype=torch.int32, device=score.device)
    count = torch.empty(b, heads, nq, dtype=torch.int32, device=score.device)
    estimate_lists.choose[(nq, b * heads)](
        score, keeps, tiles, count, _bits(p or 0.0), nq, nk, first, width, scale, sink,
        MASS=p is not None, EVERY=p is not None and p >= 1, DIAGONAL=diagonal, N=triton.next_power_of_2(nk),
        num_warps=_row_warps(nk),
    )  # fmt: skip
    return tiles, count


def pair_lists(
    columns: Tensor, diagonals: Tensor, live: Tensor, prob: Tensor | None, p: float | Tensor, first: int, scale: int,
    nq: int, *, lists: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Union of block columns, block diagonals and the pairs of live heads with a share p of all rows' mass.

    Args:
        columns, diagonals, live: bool `[B, H, nk]` twice and `[B, H]`. prob: fp32 `[B, H, nq, nk]`, contiguous, zero
            beyond the causal blocks, of live heads; None: no head is. p: one number, or one a head `[1 or B, H]`.
        lists: Hl, H or a divisor: neighbouring heads unite.

    Returns:
        int32 `[B, Hl, nq, nk]`, block numbers times `scale`, ascending, padded with the row's last, and counts.
    """
    b, h, nk = columns.shape
    rows, group, warps = b * h, h // lists, _row_warps(nk)
    columns, diagonals, live = (t.contiguous().view(torch.int8) for t in (columns, diagonals, live))
    pad = triton.next_power_of_2(nk)
    tiles = torch.empty(b, lists, nq, nk, dtype=torch.int32, device=columns.device)
    count = torch.empty(b, lists, nq, dtype=torch.int32, device=columns.device)
    if isinstance(p, Tensor):
        p = p.expand(b, h).flatten()
    every = prob is None or (not isinstance(p, Tensor) and p >= 1)
    ties, chunks, wide = count, 1, 1
    state: tuple[Tensor, ...] = (count,) * 4
    if not every:
        assert prob is not None
        work = _search(prob.view(rows, nq * nk), p, None, None, live)
        state, chunks, wide = work.state, work.chunks, work.pad
        ties = torch.empty(b, h, nq, dtype=torch.int32, device=columns.device)
        estimate_lists.count_ties[(nq, rows)](
            prob, live, *state, ties, rows, nq, nk, chunks, N=pad, CHUNKS=wide, num_warps=warps
        )
        ties = ties.cumsum(-1, dtype=torch.int32)
    estimate_lists.unite[(nq, b * lists)](
        columns, diagonals, live, columns if prob is None else prob, *state, ties, tiles, count,
        rows, nq, nk, first, nk, scale, chunks,
        GROUP=group, PAIRS=prob is not None, EVERY=every, N=pad, CHUNKS=wide, num_warps=warps,
    )  # fmt: skip
    return tiles, count


# ---------------------------------------------------------------------- small things
@functools.lru_cache(maxsize=256)
def numbers(where: torch.device, values: tuple[int, ...]) -> Tensor:
    """int32 on the device, kept: a copy to it would wait, and could not be part of a CUDA graph."""
    return torch.tensor(values, dtype=torch.int32, device=where)


def _bits(p: float) -> int:
    """The 64 bits of a number: kernels take floats in fp32 only."""
    return int(struct.unpack("q", struct.pack("d", p))[0])


def _row_warps(n: int) -> int:
    return 1 if n <= 512 else min(16, max(2, triton.next_power_of_2(n) // 512))


def _index(t: Tensor) -> int | None:
    return t.device.index if t.device.type == "cuda" else None
