"""One key per chunk and query head that says what the chunk's own queries look for in it.

Lu et al. 2024, "LongHeads: Multi-Head Attention is Secretly a Long Context Processor" (arXiv 2402.10685).

A chunk of `size` tokens, rotated as if it stood at 0..size - 1, attends to itself without a causal mask; the mean of its
outputs attends once more to its keys, and what comes out, a mixture of keys, stands for the chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import UnsupportedError
from ..lists import repeat_heads
from .keys import BUDGET, GPU_BUDGET, pieces
from .rotation import moved

if TYPE_CHECKING:
    from ..methods.base import AttnInput


def summarise(
    q: Tensor, k: Tensor, v: Tensor, known: Tensor, there: Tensor, *, scale: float, softcap: float | None
) -> Tensor:
    """Chunk keys `[B, H, n, D]`, fp32 (fp64 for fp64).

    Args:
        q: `[B, H, n, size, D]`, k, v: `[B, G, n, size, D]`, q and k rotated at 0..size - 1 of their chunk.
        known: bool `[B, n, size]`, queries that are known; the mean is over them. Without any, the key is the mean key.
        there: bool `[B, n, size]`, keys that exist. What is not known or not there may hold anything.
    """
    h = q.shape[1]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(acc).masked_fill(~known[:, None, ..., None], 0.0)
    key, value = (repeat_heads(t.to(acc).masked_fill(~there[:, None, ..., None], 0.0), h) for t in (k, v))

    def attend(rows: Tensor, to: Tensor) -> Tensor:
        s = rows @ key.transpose(-1, -2) * scale
        s = softcap * torch.tanh(s / softcap) if softcap else s
        return s.masked_fill(~there[:, None, :, None], torch.finfo(acc).min).softmax(-1) @ to

    out = attend(query, value).masked_fill(~known[:, None, ..., None], 0.0)
    mean = out.sum(3, keepdim=True) / known.sum(-1).clamp(min=1)[:, None, :, None, None]
    return attend(mean, key)[:, :, :, 0]


class ChunkKeys:
    """The chunk keys of a layer, brought up to date by prompts (`add`) and by decode steps (`step`).

    Beside them the queries of the last two chunks are kept, by position, since a chunk that ends later needs those of
    its beginning; so a roll-back of up to a chunk is exact. Queries that are unknown (rolled back further, or of tokens
    that the method never saw) are left out of their chunk's mean. A chunk that is not complete has a preliminary key.
    It lives in `state.layer` and follows its cache.

    Attributes:
        size: tokens of a chunk. data: `[B, H, room, D]`. done: tokens covered by `add`. call: the last call it covered.
        recent: `[B, H, 2 size, D]`, queries rotated at their place in their chunk. at: int64 `[B, 2 size]`, their
            positions, -1 for none. steps, gone: decode steps and tokens rolled back since `add`. rolled: a rollback came.
    """

    def __init__(self, size: int):
        self.size = size
        self.data: Tensor | None = None
        self.recent: Tensor | None = None
        self.at: Tensor | None = None
        self.done = self.steps = self.gone = 0
        self.call: tuple[int, int] | None = None
        self.rolled = False

    def add(self, x: AttnInput) -> None:
        """Cover a prefill call (one row of the batch); a second time for the same call does nothing."""
        assert x.q_pos is not None and x.rope is not None
        n, size = x.q.shape[2], self.size
        end = x.start + n
        if self.call == (x.start, end):
            return
        fresh = self.data is None
        self._begin(x, -(-end // size))
        assert self.data is not None and self.recent is not None and self.at is not None
        low = (0 if fresh else min(self.done, x.start)) // size  # of tokens that were never seen only keys are known
        cost = 4 * x.q.shape[1] * size * (size + 3 * x.q.shape[3])
        for lo, hi in pieces(-(-end // size) - low, cost, BUDGET if x.device.type == "cpu" else GPU_BUDGET):
            a, z = (low + lo) * size, min((low + hi) * size, end)
            query, known = self._queries(x, a, (hi - lo) * size)
            self.data[:, :, low + lo : low + hi] = self._keys(x, query, known, a, z, hi - lo)
        last = torch.arange(max(x.start, end - 2 * size), end, device=x.device)
        rows = x.q[:, :, max(0, n - 2 * size) :]
        self.recent[:, :, last % (2 * size)] = moved(rows, x.rope, last[None], last[None] % size)
        self.at[:, last % (2 * size)] = last
        self.done, self.steps, self.gone, self.call = end, 0, 0, (x.start, end)
        self._forget(end)

    def step(self, x: AttnInput, skip: bool = False, write: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Cover a decode step: keep its queries and renew the key of each row's newest complete chunk, unless `skip`.

        A chunk's key must be renewed while its queries are kept: within `size` steps after it ends. `write` stores the
        step's queries and positions in `recent` and `at` in place of the plain lines.
        """
        assert x.q_pos is not None and x.rope is not None
        self._begin(x, -(-x.kv.capacity // self.size))
        assert self.data is not None and self.recent is not None and self.at is not None
        pos, size = x.q_pos, self.size  # [B, 1]
        if write is None:
            slot = pos % (2 * size)
            rotated = moved(x.q, x.rope, pos, pos % size)
            self.recent.scatter_(2, slot[:, None, :, None].expand_as(rotated), rotated)
            self.at.scatter_(1, slot, pos)
        else:
            write(self.recent, self.at)
        if skip:
            return
        chunk = ((pos + 1) // size - 1).clamp(min=0)  # [B, 1]
        place = chunk * size + torch.arange(size, device=x.device)  # [B, size]
        there = place <= pos
        entries = torch.minimum(place, pos)
        slots = place % (2 * size)
        known = (self.at.gather(1, slots) == place) & there
        query = self.recent.gather(2, slots[:, None, :, None].expand(*self.recent.shape[:2], size, self.recent.shape[3]))
        k, v = x.kv.gather(entries[:, None].expand(-1, x.groups, -1))
        k = moved(k, x.rope, entries, entries % size)
        query, k, v = (t[:, :, None] for t in (query, k, v))
        new = summarise(query, k, v, known[:, None], there[:, None], scale=x.scale, softcap=x.softcap)
        self.data.scatter_(2, chunk[:, None, :, None].expand_as(new), new.to(self.data.dtype))

    @staticmethod
    def stack(rows: list[ChunkKeys | None], x: AttnInput, size: int) -> ChunkKeys:
        """Those of a batch in decode from those of its rows after their prompts; rows without any have mean keys."""
        out = ChunkKeys(size)
        out._begin(x, -(-x.kv.capacity // size))
        assert out.data is not None and out.recent is not None and out.at is not None
        # After steps that nobody watched, chunks behind the prompt have no keys either.
        if x.step or not rows or any(row is None or row.data is None for row in rows):
            out._mean_keys(x)
        for i, row in enumerate(rows):
            if row is not None and row.data is not None and row.recent is not None and row.at is not None:
                wide = min(-(-row.done // size), out.data.shape[2])
                out.data[i, :, :wide] = row.data[0, :, :wide]
                out.recent[i], out.at[i] = row.recent[0], row.at[0]
        return out

    def outlived(self, rows: list[ChunkKeys | None]) -> bool:
        """Whether a prompt came after a rollback of these keys of a batch: the steps behind it did not ask for them, below a
        length gate, until now."""
        return self.rolled and any(row is not None and row.call is not None for row in rows)

    # ------------------------------------------------------------------ with the cache
    def truncate(self, n: int) -> None:
        """Keys behind the new end are written again before they are read; queries may not be, so they are forgotten."""
        self.call, self.rolled = None, True
        self.gone += n
        if self.done:  # of one row
            self._forget(self.done + self.steps - self.gone)

    def passed(self, number: int) -> None:
        self.steps = number + 1

    def fork(self) -> ChunkKeys:
        out = copy.copy(self)
        out.data, out.recent, out.at = (None if t is None else t.clone() for t in (self.data, self.recent, self.at))
        return out

    def reorder(self, index: Tensor) -> None:
        for name in ("data", "recent", "at"):
            if (t := getattr(self, name)) is not None:
                setattr(self, name, t.index_select(0, index.to(t.device)))

    # ------------------------------------------------------------------ inside
    def _forget(self, end: int) -> None:
        """Queries from position `end` on are of a text that is no more: other tokens may stand there, of queries unknown."""
        if self.at is not None:
            self.at = self.at.masked_fill(self.at >= end, -1)  # a roll-back may not write to a tensor of inference mode

    def _begin(self, x: AttnInput, chunks: int) -> None:
        """Make room for so many chunks."""
        b, h, _, d = x.q.shape
        if x.kv.shape[4] != d:
            raise UnsupportedError(f"chunk keys: expected values as wide as keys ({d}), got {x.kv.shape[4]}")
        if self.recent is None or self.at is None:
            self.recent = x.q.new_zeros(b, h, 2 * self.size, d)
            self.at = torch.full((b, 2 * self.size), -1, device=x.device)
        if self.data is None:
            self.data = x.q.new_zeros(b, h, chunks + 4, d)
        elif self.data.shape[2] < chunks:
            self.data = pad(self.data, (0, 0, 0, chunks + max(4, chunks // 8) - self.data.shape[2]))

    def _queries(self, x: AttnInput, a: int, n: int) -> tuple[Tensor, Tensor]:
        """Queries of positions a..a + n, rotated at their place in their chunk: `[1, H, n, D]`, and which are known."""
        assert self.recent is not None and self.at is not None and x.rope is not None
        place = torch.arange(a, a + n, device=x.device)
        slots = place % (2 * self.size)
        end = x.start + x.q.shape[2]
        out = x.q.new_zeros(1, x.q.shape[1], n, x.q.shape[3])
        known = torch.zeros(1, n, dtype=torch.bool, device=x.device)
        old = max(0, min(n, x.start - a))  # before this call: what is remembered of it
        out[:, :, :old] = self.recent[:, :, slots[:old]]
        known[:, :old] = self.at[:, slots[:old]] == place[:old]
        lo, hi = max(a, x.start), min(a + n, end)
        if hi > lo:
            here = place[None, lo - a : hi - a]
            out[:, :, lo - a : hi - a] = moved(x.q[:, :, lo - x.start : hi - x.start], x.rope, here, here % self.size)
            known[:, lo - a : hi - a] = True
        return out, known

    def _keys(self, x: AttnInput, query: Tensor, known: Tensor, a: int, z: int, chunks: int) -> Tensor:
        """Keys of `chunks` chunks from position a on, of which entries up to z exist (one row in text order)."""
        assert x.rope is not None
        place = torch.arange(a, a + chunks * self.size, device=x.device)
        entries = place.clamp(max=z - 1)[None]
        k, v = x.kv.gather(entries[:, None].expand(1, x.groups, -1))
        k = moved(k, x.rope, entries, entries % self.size)
        q, k, v = (t.unflatten(2, (chunks, self.size)) for t in (query, k, v))
        known, there = (t.unflatten(1, (chunks, self.size)) for t in (known, (place < z)[None]))
        return summarise(q, k, v, known, there, scale=x.scale, softcap=x.softcap).to(x.q.dtype)

    def _mean_keys(self, x: AttnInput) -> None:
        """Keys of chunks whose queries nobody saw: the mean of their keys, each rotated at its place."""
        assert self.data is not None and x.rope is not None
        m, h, size = x.kv.capacity, x.q.shape[1], self.size
        lengths = x.kv.lengths()[:, :1]
        b, chunks = len(lengths), -(-m // size)
        budget = BUDGET if x.device.type == "cpu" else GPU_BUDGET
        for lo, hi in pieces(chunks, 6 * b * x.groups * size * x.q.shape[3], budget):
            place = torch.arange(lo * size, hi * size, device=x.device)
            entries = torch.minimum(place.expand(b, -1), lengths - 1)
            k = moved(x.kv.gather(entries[:, None].expand(b, x.groups, -1))[0], x.rope, entries, entries % size)
            there = (place < lengths)[:, None, :, None]
            total = k.float().masked_fill(~there, 0.0).unflatten(2, (hi - lo, size)).sum(3)
            mean = total / there.unflatten(2, (hi - lo, size)).sum(3).clamp(min=1)
            self.data[:, :, lo:hi] = repeat_heads(mean, h).to(self.data.dtype)
