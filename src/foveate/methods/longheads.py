"""LongHeads: every head reads its own choice of chunks, put together as a text that fits the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..combine import merge
from ..errors import ConfigError, UnsupportedError
from ..kernels.dispatch import attend
from ..kv import KV
from ..layout import Layout
from ..scores import fused
from ..scores.chunk_keys import ChunkKeys
from ..scores.entries import best_entries
from ..scores.keys import BUDGET, GPU_BUDGET, pieces
from ..scores.pooled import block_pool
from ..scores.raw_keys import raw_queries
from ..scores.rotation import moved
from ..scores.turns import Turns
from ..select import top_indices
from .base import AttnInput, Method, Rope, State, option, shared

KEYS, TURNS = "longheads.keys", "longheads.turns"
Asked = tuple[Tensor, Tensor]  # queries before rotation, fp32 [B, H, 1, D]; chunks up to the query's own, int32 [B, 1]


@dataclass(frozen=True)
class LongHeads(Method):
    """Lu et al. 2024, "LongHeads: Multi-Head Attention is Secretly a Long Context Processor" (arXiv 2402.10685).

    The text is cut into chunks of `chunk` tokens. A query reads attention // chunk of them: the first, its own, the one
    before, and those whose chunk key (`scores.chunk_keys`) its head, before rotation, points at most; its own chunk
    ends with itself. The chosen chunks are joined in order and positions counted inside the result, so that none
    reaches `attention`, the length the model knows, whatever the text's; up to `attention` tokens a row is dense.
    `positions="text"` leaves positions as they are. `block` rows of a prompt share the choice of their mean query; 1, a
    choice per row, is what the paper evaluates, and 128 what GPUs can serve. `share="group"` gives the query heads of a
    kv head one list, by their highest score.

    Differs from the published code: prompts and decode steps follow one rule, in which a row sees its own token and the
    chunk before its own even where that ends with the row; padding has no part in a chunk key; kv heads may be shared.
    Chunk keys need the queries of a text. Chunks whose queries the method did not see, such as those generated between
    two prompts or rolled back by more than a chunk, have the mean of their keys instead.
    """

    chunk: int = option(256, low=1, help="tokens of a chunk")
    attention: int = option(4096, low=3, help="tokens a query reads, the length the model knows")
    block: int = option(128, low=1, help="prompt rows that share a list")
    positions: str = option("rank", choices=("rank", "text"), help="positions counted inside the list, or those of the text")
    share: str = shared()  # type: ignore[misc]

    id: ClassVar[str] = "longheads"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    selection: ClassVar[str] = "prompt"  # rows of a block share the choice of their mean
    observes: ClassVar[tuple[str, ...]] = ("prefill",)
    source: ClassVar[str] = "Lu et al. 2024, arXiv 2402.10685"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"chunk": 128, "attention": 1024},
        "paper": {"block": 1},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention % self.chunk or self.attention < 3 * self.chunk:
            raise ConfigError(
                f"longheads: attention expected a multiple of chunk = {self.chunk}, at least three of them, "
                f"got {self.attention}"
            )
        if self.chunk % self.block:
            raise ConfigError(f"longheads: block expected a divisor of chunk = {self.chunk}, got {self.block}")

    @property
    def extends(self) -> bool:  # type: ignore[override]
        return self.positions == "rank"

    @property
    def keep(self) -> int:
        """Chunks a row reads."""
        return self.attention // self.chunk

    @property
    def min_length(self) -> int:
        return self.attention + 1

    def phase(self, step: int) -> str | None:
        if step == 0:
            return "first"
        return "step" if step % self.chunk else "renew"

    def refuses(self, recipe: Any) -> str | None:
        if recipe.evicts and recipe.decode == self:
            return "chunks are runs of the text, so it needs a cache that keeps every entry"
        return None

    # ------------------------------------------------------------------ which chunks
    def plan(self, x: AttnInput, state: State) -> Layout | None:
        _rope(x)
        if x.kv.pos is not None:
            return None
        if x.phase == "decode":
            return self._step(x, *self._keys(x, state))
        if x.start + x.q.shape[2] <= self.attention:
            return None  # `observe` adds its chunk keys
        keys = self._row_keys(state)
        keys.add(x)
        return self._prompt(x, keys)

    def observe(self, x: AttnInput, out: Tensor, lse: Tensor | None, mass: Tensor | None, state: State) -> None:
        """Chunk keys of a prompt, whichever method has served it."""
        if x.kv.pos is None:
            _rope(x)
            self._row_keys(state).add(x)

    def _row_keys(self, state: State) -> ChunkKeys:
        held: ChunkKeys | None = state.layer.get(KEYS)
        if held is None or held.size != self.chunk:
            held = state.layer[KEYS] = ChunkKeys(self.chunk)
        return held

    def _keys(self, x: AttnInput, state: State) -> tuple[ChunkKeys, Asked | None]:
        """The chunk keys of all rows, this decode step included; what its queries ask them, where kernels find it."""
        held: ChunkKeys | None = state.layer.get(KEYS)
        rows = [row.get(KEYS) for row in state.rows]
        fits = held is not None and held.data is not None and held.size == self.chunk and len(held.data) == len(x.q)
        if held is None or not fits or x.step == 0 or held.outlived(rows):
            held = state.layer[KEYS] = ChunkKeys.stack(rows, x, self.chunk)
        # Where the host does not know whose chunk ends here, one step in `chunk` renews what ended since: a key is not asked
        # for before the chunk after it has ended too.
        skip = bool(x.kv.capacity % self.chunk if x.kv.len is None else x.step % self.chunk)
        if (turns := self._turns(x, state)) is None:
            held.step(x, skip=skip)
            return held, None
        kernels, asked = fused.chunks(x.q), []
        assert kernels is not None
        how = turns.plain(), self._ahead(x, turns), turns.partner
        held.step(x, skip, lambda recent, at: asked.append(kernels.turn_queries(x.q, x.positions(), *how, recent, at)))
        return held, asked[0]

    def _turns(self, x: AttnInput, state: State) -> Turns | None:
        """Rotations of this decode step that all layers share: on a GPU, where small launches are what it costs."""
        return None if fused.votes(x.q) is None else Turns.of(x, state.step, TURNS)

    def _ahead(self, x: AttnInput, turns: Turns) -> tuple[Tensor, Tensor]:
        """Factors `[B, chunks, D]` that turn this step's queries to their place in their chunk, plus 0, 1, .. chunks."""
        chunks = -(-x.kv.capacity // self.chunk)
        return turns.to("chunks", lambda: torch.arange(chunks, device=x.device) * self.chunk + x.positions() % self.chunk)

    def _prompt(self, x: AttnInput, keys: ChunkKeys) -> Layout:
        rope, (_, h, n, d), block = _rope(x), x.q.shape, self.block
        offset, per = x.offset(block), self.chunk // block
        first, blocks, chunks = x.start // block, -(-(n + offset) // block), -(-(x.start + n) // self.chunk)
        tiles, counts, pos = [], [], x.positions()
        for lo, hi in pieces(blocks, h * (6 * chunks + 6 * block * d), BUDGET if x.device.type == "cpu" else GPU_BUDGET):
            r0, r1 = max(0, lo * block - offset), min(n, hi * block - offset)
            mean = block_pool(raw_queries(x.q[:, :, r0:r1], rope, pos[:, r0:r1]), block, offset=offset if lo == 0 else 0)
            own = torch.arange(first + lo, first + hi, device=x.device) // per
            some, many = self._best(mean, keys, own, chunks, x.groups)
            tiles.append(pad(some, (0, self.keep - some.shape[-1])))
            counts.append(many)
        return self._layout(x, torch.cat(tiles, 2), torch.cat(counts, 2))

    def _step(self, x: AttnInput, keys: ChunkKeys, asked: Asked | None) -> Layout | None:
        if x.kv.capacity <= self.attention:
            return None
        chunks = -(-x.kv.capacity // self.chunk)
        if asked is None:
            own = x.positions()[:, None] // self.chunk  # [B, 1, 1]
            tiles, count = self._best(raw_queries(x.q, _rope(x), x.positions()), keys, own, chunks, x.groups)
            return self._layout(x, tiles, count)
        query, have = asked
        kernels = fused.votes(x.q)
        assert kernels is not None and keys.data is not None
        score = kernels.logits(query, keys.data[:, :, :chunks], None, scale=1.0)
        if self.share == "group":
            score = score.unflatten(1, (x.groups, -1)).amax(2)
        index, count = best_entries(score, self.keep, length=have, sink=1, recent=2)
        return self._layout(x, index[:, :, None] * self.chunk, count[:, :, None])

    def _best(self, q: Tensor, keys: ChunkKeys, own: Tensor, chunks: int, groups: int) -> tuple[Tensor, Tensor]:
        """First entries of the chunks that queries `[B, H, n, D]`, before rotation, of chunks `own` `[..., n]` read.

        int32 `[B, Hl, n, keep]`, ascending, and counts `[B, Hl, n]`.
        """
        assert keys.data is not None
        score = q @ keys.data[:, :, :chunks].to(q.dtype).transpose(-1, -2)
        if self.share == "group":
            score = score.unflatten(1, (groups, -1)).amax(2)
        number = torch.arange(chunks, device=q.device)
        forced = (number == 0) | ((number <= own[..., None]) & (number >= own[..., None] - 1))
        index, count = top_indices(score, self.keep, valid=number <= own[..., None], forced=forced)
        return index * self.chunk, count

    def _layout(self, x: AttnInput, tiles: Tensor, count: Tensor) -> Layout:
        block = self.block if x.phase == "prefill" else 1
        grid: dict[str, Any] = dict(block_q=block, q_offset=x.offset(block), q_pos=x.layout_pos())
        return Layout(x.shape, tile_width=self.chunk, tiles=tiles, tile_count=count, **grid)

    # ------------------------------------------------------------------ attention with positions inside the choice
    def attend(self, x: AttnInput, plan: Layout, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, None): the chosen chunks stand one behind the other, from position 0."""
        how: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, backend=x.backend, return_lse=True)
        if self.positions == "text" or plan.tiles is None:
            out, lse = attend(x.q, x.kv, plan, **how)
            return out, lse, None
        if x.phase == "prefill":
            return (*self._slots(x, plan, how), None)
        turns = self._turns(x, state) if getattr(x.rope, "steady", True) else None
        return (*(self._joined(x, plan, how) if turns is None else self._left(x, plan, turns, how)), None)

    def _slots(self, x: AttnInput, plan: Layout, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A prompt: the own chunks of all rows, then the ones before them in every list, and so on, merged.

        Keys are rotated once, each at its place in its chunk, and queries once per slot, as far from there as the slot
        is from the end. Memory: a copy of the keys and a few of the queries.
        """
        assert plan.tiles is not None and plan.tile_count is not None
        rope, pos = _rope(x), x.positions()
        kv = x.kv.to_dense()
        at = torch.arange(kv.capacity, device=x.device)[None]
        kv = replace(kv, k=moved(kv.k, rope, at, at % self.chunk))
        got: tuple[Tensor, Tensor] | None = None
        for back in range(min(self.keep, (x.start + x.q.shape[2] - 1) // self.chunk + 1)):
            slot = plan.tile_count - 1 - back  # [1, Hl, nq]
            tile = plan.tiles.gather(-1, slot.clamp(min=0)[..., None].long())
            layout = replace(plan, tiles=tile, tile_count=(slot >= 0).to(torch.int32))
            out, lse = attend(moved(x.q, rope, pos, back * self.chunk + pos % self.chunk), kv, layout, **how)
            part = (out if out.dtype == torch.float64 else out.float(), lse)
            got = part if got is None else merge([got, part])
        assert got is not None
        return got[0].to(x.q.dtype), got[1]

    def _left(self, x: AttnInput, plan: Layout, turns: Turns, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """`_joined` with the keys left where they are: what a rotation gives depends on distances alone, so for each chunk
        of its list a query is turned to where it stands as seen from there, and its chunks are merged."""
        assert plan.tiles is not None and plan.tile_count is not None
        (b, h), keep, kernels = x.q.shape[:2], plan.tiles.shape[-1], fused.chunks(x.q)
        assert kernels is not None
        lists, count = plan.tiles[:, :, 0], plan.tile_count[:, :, 0]
        q, tiles, used = kernels.place_queries(x.q, lists, count, self.chunk, self._ahead(x, turns), turns.partner)
        layout = Layout(
            (b, h * keep, 1, x.kv.capacity), q_pos=x.layout_pos(), tile_width=self.chunk, tiles=tiles, tile_count=used
        )
        out, lse = attend(q, x.kv, layout, **how)
        return kernels.join_chunks(out, lse, keep, h // lists.shape[1])  # type: ignore[no-any-return]

    def _joined(self, x: AttnInput, plan: Layout, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A decode step: the chosen chunks are gathered and rotated at their new positions."""
        assert plan.tiles is not None and plan.tile_count is not None
        rope, pos, (b, h) = _rope(x), x.positions(), x.q.shape[:2]
        tiles, count, heads = plan.tiles[:, :, 0].long(), plan.tile_count[:, :, 0].long(), plan.tiles.shape[1]
        entries = (tiles[..., None] + torch.arange(self.chunk, device=x.device)).flatten(2)  # [B, Hl, keep * chunk]
        entries = torch.minimum(entries, pos[:, None])
        k, v = (t.view(b, heads, -1, t.shape[-1]) for t in x.kv.gather(entries.view(b, x.groups, -1)))
        place = torch.arange(entries.shape[-1], device=x.device).expand(b * heads, -1)
        keys, at = k.flatten(0, 1)[:, None], entries.flatten(0, 1)  # every list has its own positions
        budget = BUDGET if x.device.type == "cpu" else GPU_BUDGET
        some = (slice(*ends) for ends in pieces(len(keys), 4 * keys[0].numel(), budget))
        k = torch.cat([moved(keys[i], rope, at[i], place[i]) for i in some]).view(k.shape)
        length = (count - 1) * self.chunk + pos % self.chunk + 1  # [B, Hl]; the same for all heads of a row
        kv = KV.dense(k, v, len=length.to(torch.int32))
        q = moved(x.q, rope, pos, length[:, :1] - 1)
        return attend(q, kv, Layout.dense(b, h, 1, kv.capacity), **how)  # type: ignore[return-value]


def _rope(x: AttnInput) -> Rope:
    if x.rope is None:
        raise UnsupportedError("longheads: needs the model's rotation to count positions anew, and none was found")
    return x.rope
