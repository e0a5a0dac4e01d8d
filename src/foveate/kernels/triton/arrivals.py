"""The last of several programs to finish merges what all of them found: one launch where there were two.

Programs that share a row of queries leave partial results and count themselves in the row's counter. Whoever finds that it
is the last sets the counter back to 0 and merges, in the order of the slots: which program that is changes from run to run,
the result does not. Counters are 0 between launches, so nothing has to clear them.

A counter must not serve two launches that run at the same time. Launches on one stream never do: they share the counters of
the stream. A captured launch can be replayed on any stream, beside replays of other graphs, so it gets counters of its own,
found by the address of its partial results: where the allocator of graphs gives two launches the same memory, they cannot
run at the same time either, and where memory is used again after a graph is gone, so are its counters.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from .steps import FLOOR, LN2

POOL = 1 << 18  # counters for captured launches, made at once: 1 MiB
APART = 32  # counters of two launches lie this far apart: a line of the L2 cache

_lock = threading.Lock()
_streams: dict[tuple[int | None, int], Tensor] = {}
_pools: dict[int | None, tuple[Tensor, int]] = {}  # device -> (counters, how many are given away)
_captured: dict[tuple[int | None, int, int], Tensor] = {}  # (device, address, number) -> counters, part of a pool


def counters(n: int, part: Tensor) -> Tensor:
    """At least n int32 counters, all 0, for a launch on the current stream that keeps its partial results in `part`."""
    device = part.device
    if device.type != "cuda":
        return _of_stream((None, 0), n, part)
    if torch.cuda.is_current_stream_capturing():
        return _of_capture(n, part)
    _prepare(part)
    return _of_stream((device.index, torch.cuda.current_stream(device).cuda_stream), n, part)


def _of_stream(key: tuple[int | None, int], n: int, part: Tensor) -> Tensor:
    held = _streams.get(key)
    if held is None or held.shape[0] < n:  # launches before this one are done with the old counters when it runs
        held = _streams[key] = _zeros(max(1024, n), part)
    return held


def _zeros(n: int, part: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(n, dtype=torch.int32, device=part.device)


def _prepare(part: Tensor) -> None:
    """Have counters for captures ready: made outside of one, cleared before anything can be replayed."""
    index = part.device.index
    if _ready(index):
        return
    with _lock:
        if _ready(index):  # another thread was faster
            return
        pool = _zeros(POOL, part)
        # Once a process, and when half of a pool is given away: to 4,096 captured launches of up to 32 rows, for example.
        torch.cuda.current_stream(part.device).synchronize()
        _pools[index] = pool, 0


def _ready(index: int | None) -> bool:
    return index in _pools and _pools[index][1] <= POOL // 2


def _of_capture(n: int, part: Tensor) -> Tensor:
    index, size = part.device.index, -(-n // APART) * APART
    key = index, part.data_ptr(), size
    with _lock:
        if (held := _captured.get(key)) is not None:
            return held
        pool, used = _pools.get(index, (None, 0))
        if pool is None or used + size > POOL:
            return _zeros(n, part)  # memory of the graph, cleared by each replay: one node more
        _pools[index] = pool, used + size
        _captured[key] = pool[used : used + size]
        return _captured[key]


@triton.jit
def put(part, part_lse, slot, acc, m, l, r, dv, PACK: tl.constexpr, DV: tl.constexpr):
    """Store a partial result.

    acc `[TILE, DV_PAD]` is not yet divided by l; m and l `[TILE]` are in units of log 2, as is part_lse fp32 `[slots, PACK]`
    (-inf for rows that saw nothing). part is fp32 `[slots, PACK, DV]`.
    """
    some = l > 0
    at = slot.to(tl.int64) * PACK + r
    live = r < PACK
    x = acc / tl.where(some, l, 1.0)[:, None]
    tl.store(part + at[:, None] * DV + dv[None, :], x, mask=live[:, None] & (dv < DV)[None, :])
    tl.store(part_lse + at, tl.where(some, m + tl.log2(tl.where(some, l, 1.0)), float("-inf")), mask=live)


@triton.jit
def leave(part, part_lse, slot, arrived, n, acc, m, l, r, dv, PACK: tl.constexpr, DV: tl.constexpr):
    """Store a partial result and count this program; whether it is the last of n. arrived: the row's counter.

    Tensors as `put` describes them.
    """
    put(part, part_lse, slot, acc, m, l, r, dv, PACK, DV)
    tl.debug_barrier()  # every warp has stored before one of them says so
    before = tl.atomic_add(arrived, 1, sem="acq_rel")
    return before == n - 1


@triton.jit
def merge(part, part_lse, slot, n, arrived, out, lse, row, PACK: tl.constexpr, PACK_PAD: tl.constexpr,
          DV: tl.constexpr, DV_PAD: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
          LSE: tl.constexpr):  # fmt: skip
    """`gather` of all PACK queries, by the last program of a row."""
    tl.store(arrived, 0)
    gather(part, part_lse, slot, n, out, lse, row, 0, PACK, PACK_PAD, DV, DV_PAD, CHUNK, STAGES, LSE)


@triton.jit
def gather(part, part_lse, slot, n, out, lse, row, begin, PACK: tl.constexpr, PIECE: tl.constexpr,
           DV: tl.constexpr, DV_PAD: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
           LSE: tl.constexpr):  # fmt: skip
    """PIECE queries of PACK, from number `begin` on, from n slots, `slot` being the first.

    They are rows row + begin .. of out `[rows, DV]` and lse `[rows]` (natural log). PIECE: a power of two. STAGES: more than
    1 reads ahead, at the price of about 20 registers.

    Each of CHUNK lanes has a softmax of its own over every CHUNK-th slot, and they meet once, at the end: a step asks for
    its numbers in one go and exchanges nothing between warps but the weights.
    """
    r = begin + tl.arange(0, PIECE)
    dv = tl.arange(0, DV_PAD)
    i = tl.arange(0, CHUNK)
    live = r < PACK
    top = tl.full([CHUNK, PIECE], FLOOR, tl.float32)
    total = tl.zeros([CHUNK, PIECE], tl.float32)
    acc = tl.zeros([CHUNK, PIECE, DV_PAD], tl.float32)
    for c in tl.range(0, n, CHUNK, num_stages=STAGES):
        at = (slot + c + i).to(tl.int64)[:, None] * PACK + r[None, :]
        ok = (c + i < n)[:, None] & live[None, :]
        # Not through the L1 cache, which other multiprocessors do not write to.
        w = tl.load(part_lse + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
        x = tl.load(
            part + at[:, :, None] * DV + dv[None, None, :],
            mask=ok[:, :, None] & (dv < DV)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        high = tl.maximum(top, w)
        w = tl.exp2(w - high)
        shrink = tl.exp2(top - high)
        total = total * shrink + w
        acc = acc * shrink[:, :, None] + x * w[:, :, None]
        top = high
    high = tl.max(top, 0)
    w = tl.exp2(top - high[None, :])
    total = tl.sum(total * w, 0)
    some = total > 0
    acc = tl.sum(acc * w[:, :, None], 0) / tl.where(some, total, 1.0)[:, None]
    at = (row + r).to(tl.int64)
    tl.store(out + at[:, None] * DV + dv[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (dv < DV)[None, :])
    if LSE:
        y = tl.where(some, (high + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
        tl.store(lse + at, y, mask=live)


def chunk(pack: int, dv: int, warps: int = 4) -> int:
    """Slots that a program of so many warps merges at once, for padded sizes: 32 words of each thread's registers.

    With 64 a program of `paging.attend_tiles` has 165 registers, and a multiprocessor no room for four.
    """
    return max(2, min(32, 32 * warps * 32 // (pack * dv)))
