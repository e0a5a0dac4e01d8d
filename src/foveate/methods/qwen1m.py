"""Qwen2.5-1M: dual chunk attention beyond the model's positions, with vertical-slash selection in every chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import profile as profiles
from ..errors import ConfigError, UnsupportedError
from ..kernels.dispatch import attend
from ..kv import KV
from ..layout import Layout, Part, Parts
from ..scores import fused
from ..scores.dual_chunk import AtOnce, Choice, Chunks, Lists, by_regions, cut, only, probes, ranges, side_by_side
from ..scores.probes import factored, last_queries, vote
from ..scores.rotation import moved
from ..scores.turns import Turns
from .base import AttnInput, Method, Rope, State, option, shared

CHUNKS, TURNS = "qwen1m.chunks", "qwen1m.turns"
TRIVIAL = 30  # the smallest published number of columns: no more than the sink, so 100 are added


@dataclass(frozen=True)
class Qwen1M(Method):
    """Yang et al. 2025, "Qwen2.5-1M Technical Report" (arXiv 2501.15383), with the positions of An et al. 2024 (DCA).

    Positions: chunks of `chunk - local` tokens. Distances are true inside a chunk and up to `local` + 1 over one
    boundary; none exceeds `chunk`, so a model reads far beyond the length it was trained on. Up to `chunk` tokens
    nothing changes. With `original` (the trained length) logits of row i gain f^2, f = max(1, 0.1 ln((i + 1) /
    original) + 1).

    Prompts of more than `threshold` tokens are sparse (`sparse=false`: never, dual chunk attention alone). The
    `last_q` last queries of each chunk vote for `columns` keys and `diagonals` distances, `sink` first keys and `near`
    distances among them, as in MInference; 30 columns count as 130. `profile` names the sizes per head that the
    refinement (`search`) found: both sizes grow by `step` until a head's recall meets the target. Decode is dense.

    Differs from the published code: f follows each row's own length instead of the prompt's, so chunked prefill and
    decode agree with the whole prompt; beyond one chunk distances become tiles of a grid aligned to the chunks, a few
    more keys than the published unaligned ones (up to twice for a lone distance), while up to one chunk they are those,
    as in `minference`; empty lists stay empty. `share` "group" lets the heads of a kv head vote together.
    """

    chunk: int = option(8192, low=2, help="largest distance in tokens; chunks are local tokens shorter")
    local: int = option(1024, low=1, help="tokens over a chunk boundary with true distances")
    threshold: int = option(32768, low=0, help="longest prompt that computes all pairs, in tokens")
    sparse: bool = option(True, help="leave out pairs of longer prompts")
    columns: int = option(1000, low=0, help="key columns a head reads in a chunk")
    diagonals: int = option(6096, low=0, help="distances a head reads in a chunk")
    sink: int = option(30, low=1, help="first tokens of the text, always included")
    near: int = option(100, low=1, help="nearest distances, always included")
    last_q: int = option(64, low=1, help="last queries of a chunk, which vote")
    block: int = option(64, low=1, help="tokens of a block of queries or keys")
    original: int | None = option(None, low=1, help="trained length in tokens, beyond which logits grow; none: never")
    step: int = option(2048, low=1, help="how much the search adds to both sizes")
    profile: str | None = option(None, help="folder that `foveate calibrate` wrote")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "qwen1m"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Yang et al. 2025, arXiv 2501.15383"
    extends: ClassVar[bool] = True
    apart: ClassVar[bool] = True  # a plan of a long prompt has three outputs
    whole_text: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "1m": {"chunk": 262144, "local": 8192, "original": 262144},
        "8k": {"threshold": 2048, "columns": 800, "diagonals": 100},
        # Plain dual chunk attention for a model of 8,192 positions; the block is the one that GPU kernels are made for.
        "dca": {"chunk": 7040, "local": 1024, "sparse": False, "block": 128},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local >= self.chunk:
            raise ConfigError(f"qwen1m: local expected below chunk = {self.chunk}, got {self.local}")
        if (self.chunk - self.local) % self.block:
            raise ConfigError(
                f"qwen1m: chunk - local expected a multiple of block = {self.block}, got {self.chunk - self.local}"
            )

    @property
    def min_length(self) -> int:
        """Up to `chunk` tokens positions are the true ones, up to `threshold` nothing is dropped, up to `original` the
        temperature is 1."""
        least = min(self.chunk, self.threshold) if self.sparse else self.chunk
        return (least if self.original is None else min(least, self.original)) + 1

    @property
    def grid(self) -> Chunks:
        return Chunks(self.chunk, self.local)

    def plan(self, x: AttnInput, state: State) -> Layout | Parts | None:
        if x.phase == "decode":
            return self._decode(x, state)
        grid, m = self.grid, x.start + x.q.shape[2]
        sparse, warm = self.sparse and m > self.threshold, self._warm(m)
        if m <= grid.exact and not sparse:
            return Parts((Part(x.dense(), q=self._tempered(x)),)) if warm else None
        q = self._tempered(x) if warm else x.q
        if sparse and m <= grid.length:
            layout = self._one_chunk(x, q)
            return Parts((Part(layout, q=q),)) if warm else layout
        last = (m - 1) // grid.length  # chunk of the newest row
        # The keys of all chunks that some row sees as far ones.
        far = grid.far(x.kv, (last - 1) * grid.length, _rope(x)) if last >= 2 else None
        first, blocks = x.start // self.block, -(-m // self.block) - x.start // self.block
        if sparse:
            found = self._selected(x, q, far)
        else:
            found = ranges(first, blocks, self.block, grid.length, x.device)
        parts = [Part(self._layout(x, found["intra"]), q=q if warm else None)]
        if last >= 1:
            moves = m > grid.exact
            query = moved(q, _rope(x), x.positions(), grid.succ(x.positions())) if moves else q
            parts.append(Part(self._layout(x, found["succ"]), q=query if moves or warm else None))
        if far is not None:
            query = moved(q, _rope(x), x.positions(), torch.full_like(x.positions(), grid.inter))
            parts.append(Part(self._layout(x, found["inter"], far), q=query, kv=far))
        return parts[0].layout if len(parts) == 1 and not warm else Parts(tuple(parts))

    def search(self, target: Any) -> Any:
        from .qwen1m_search import Refinement

        return Refinement(self, target)

    # ------------------------------------------------------------------ prefill
    def _selected(self, x: AttnInput, q: Tensor, far: KV | None) -> dict[str, Lists]:
        """Lists of the three regions for all query blocks, chunk by chunk of queries."""
        n, kv, (columns, diagonals) = x.q.shape[2], x.kv.to_dense(), self._sizes(x)
        seen = probes(q, x.positions(), kv, far, self.grid, x.rope, x.start, self.last_q, **self._probing(x))
        chosen: list[Choice] = [vote(each, end, columns, diagonals, sink=self.sink, local=self.near) for end, each in seen]
        first = x.start // self.block
        return by_regions(chosen, first, -(-(x.start + n) // self.block) - first, self.block, self.grid.length)

    def _one_chunk(self, x: AttnInput, q: Tensor) -> Layout:
        """Where all positions are the true ones and every row has one vote, the vote itself is the layout."""
        m = x.start + x.q.shape[2]
        seen = last_queries(q, cut(x.kv.to_dense(), 0, m), self.last_q, **self._probing(x))
        chosen = vote(seen, m, *self._sizes(x), sink=self.sink, local=self.near)
        grid: dict[str, Any] = dict(block_q=self.block, tile_width=self.block, q_offset=x.offset(self.block))
        layout, most = factored(x.shape, chosen, q_pos=x.layout_pos(), **grid), 2 * (m // self.block + 2)
        assert layout.diagonals is not None  # cut to the most tiles there can be: a run of distances is at least as long
        return replace(layout, diagonals=layout.diagonals[..., :most].contiguous())

    def _probing(self, x: AttnInput) -> dict[str, Any]:
        return dict(scale=x.scale, softcap=x.softcap, reduce="max" if self.share == "group" else "none")

    def _layout(self, x: AttnInput, found: Lists, far: KV | None = None) -> Layout:
        b, h, n, m = x.shape
        tiles, tile_count, entries, entry_count = found
        alone = entries.shape[-1] == 0
        return Layout(
            (b, h, n, m if far is None else far.capacity),
            causal=far is None,  # all far keys are in the past of every row that lists them
            block_q=self.block,
            q_offset=x.offset(self.block),
            tile_width=self.block,
            q_pos=x.layout_pos() if far is None else None,
            tiles=tiles,
            tile_count=tile_count,
            entries=None if alone else entries,
            entry_count=None if alone else entry_count,
        )

    def _sizes(self, x: AttnInput) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Columns and diagonals of each list."""
        heads = x.groups if self.share == "group" else x.q.shape[1]
        found = profiles.of(self.id, self.profile)
        if found is None:
            both = [[self.columns] * heads, [self.diagonals] * heads]
        else:
            both = []
            for name in ("columns", "diagonals"):
                t = found.tensors.get(name)
                want = [x.layers, x.all_lists(heads)]
                if t is None or list(t.shape) != want:
                    got = "nothing" if t is None else str(list(t.shape))
                    raise ConfigError(f"qwen1m: profile expected {name} of shape {want}, got {got}")
                both.append(x.own_lists(t[x.layer]).tolist())
        columns = (max(n + 100 if n == TRIVIAL else n, self.sink) for n in both[0])
        return tuple(columns), tuple(max(n, self.near) for n in both[1])

    # ------------------------------------------------------------------ decode: one partial softmax per chunk of keys
    def phase(self, step: int) -> str | None:
        return "step"

    def _decode(self, x: AttnInput, state: State) -> Parts | None:
        grid, m = self.grid, x.kv.capacity
        moved_about = x.kv.pos is not None  # entries in no order of position, or fewer than were seen
        if not moved_about and m <= grid.exact and not self._warm(m):
            return None
        longest = m
        if moved_about:  # one look at the device per step, not per layer
            if "qwen1m.longest" not in state.step:
                state.step["qwen1m.longest"] = int(x.positions().max()) + 1
            longest = state.step["qwen1m.longest"]
        q = self._tempered(x) if self._warm(longest) else x.q
        joint = self._joint(x, q, state)
        return Parts(self._by_chunk(x, q, longest)) if joint is None else AtOnce(lambda: self._by_chunk(x, q, m), joint)

    def _by_chunk(self, x: AttnInput, q: Tensor, longest: int) -> tuple[Part, ...]:
        grid, (b, h, _, m), rope, pos = self.grid, x.shape, _rope(x), x.positions()
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        plain = rope.unrotate(q.to(acc), pos)
        whole = x.kv.pos is not None or (x.kv.kind == "paged" and grid.length % x.kv.k.shape[1] != 0)
        parts = []
        for number in range(-(-longest // grid.length)):
            lo, hi = number * grid.length, (number + 1) * grid.length
            kv = only(x.kv, lo, hi) if whole else cut(x.kv, lo, min(hi, m))
            query = rope.rotate(plain, grid.towards(pos, number)).to(q.dtype)
            parts.append(Part(Layout.dense(b, h, 1, kv.capacity, causal=False), q=query, kv=kv))
        return tuple(parts)

    def _joint(self, x: AttnInput, q: Tensor, state: State) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """All chunks in one call of attention, as batch rows with a query each, where kernels turn queries and join results.

        What the layers of a step share is made by the first: where its queries stand, and where its chunks lie.
        """
        rope, pos, kernels, turning = _rope(x), x.positions(), fused.chunks(q), fused.turns(q)
        tracked = torch.is_grad_enabled() and (q.requires_grad or x.kv.requires_grad)
        if kernels is None or turning is None or tracked or not getattr(rope, "steady", True):
            return None
        kv = side_by_side(x.kv, self.grid.length, pos, state.step.setdefault(CHUNKS, {}))
        if kv is None or (turns := Turns.of(x, state.step, TURNS)) is None:
            return None
        (b, h, _, d), chunks = q.shape, kv.shape[0] // len(q)
        there = f"{self.chunk} {self.local} {chunks}"
        table = turns.to(there, lambda: self.grid.towards(pos, torch.arange(chunks, device=x.device)))

        def joint(**how: Any) -> tuple[Tensor, Tensor]:
            query = q.new_empty(b, h, chunks, d)
            turning.turn(q.expand(-1, -1, chunks, -1), *table, turns.partner, query)
            query = query.transpose(1, 2).reshape(b * chunks, h, 1, d)
            out, lse = attend(query, kv, Layout.dense(b * chunks, h, 1, kv.capacity, causal=False), return_lse=True, **how)
            return kernels.join_chunks(out.view(b, chunks * h, 1, -1), lse.view(b, -1, 1), chunks, h)  # type: ignore[no-any-return]

        return joint

    # ------------------------------------------------------------------ temperature
    def _warm(self, length: int) -> bool:
        return self.original is not None and length > self.original

    def _tempered(self, x: AttnInput) -> Tensor:
        """Queries times f^2 of their own length."""
        assert self.original is not None
        f = 1 + 0.1 * ((x.positions() + 1).float() / self.original).log().clamp(min=0)
        return (x.q * (f * f)[:, None, :, None]).to(x.q.dtype)


def _rope(x: AttnInput) -> Rope:
    if x.rope is None:
        raise UnsupportedError("qwen1m: needs the model's rotation to move queries to other positions; none was found")
    return x.rope
