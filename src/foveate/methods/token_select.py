"""TokenSelect: the heads of a layer vote for tokens, and attention counts positions inside what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool1d, pad

from ..errors import ConfigError, UnsupportedError
from ..kernels.dispatch import attend
from ..kv import KV
from ..layout import Layout
from ..scores import fused
from ..scores.entries import best_entries
from ..scores.keys import BUDGET, GPU_BUDGET, pieces
from ..scores.pooled import block_pool
from ..scores.raw_keys import RawKeys, group_logits, raw_keys, raw_queries
from ..scores.rotation import moved
from ..scores.turns import Turns
from ..select import top_indices
from .base import AttnInput, Method, Rope, State, option
from .search import Knob

KEYS, TOKENS = "token_select.keys", "token_select.tokens"
TURNS, QUERY = "token_select.turns", "token_select.query"  # of a step: rotations of all layers, the queries of each


@dataclass(frozen=True)
class TokenSelect(Method):
    """Wu et al. 2024, "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
    Token-Level KV Cache Selection" (arXiv 2411.02886).

    One list of tokens per layer for all heads: the first `sink`, the newest `local` and the `budget` that win a vote.
    Keys before their rotation meet the query as if all were `local` tokens away; each head gives its softmax over them
    (times `temperature`, 1 as published), the sums, after maxima over `pool` neighbours, rank the tokens. A prompt goes in
    chunks of `chunk` rows that share a list, chosen by their mean query. `positions` "rank" counts positions inside the
    list, so that none exceeds its length and a text may be longer than the model's range; "text" leaves them, for texts
    within it, and saves a second rotation. With `theta` a decode step uses the last list again while the cosine between
    their queries is at least that, for at most `refresh` tokens; each row decides for itself, on the device.

    Up to sink + budget + local tokens a row is dense. Keys before rotation are kept beside the cache while decoding, which
    takes half of its memory again. Differs from the published code: query head h votes with kv head h // g, votes are
    fp32, a list that is used again covers every token since it was made, and lists of prompt chunks are always made anew.
    """

    sink: int = option(128, low=0, help="first tokens of the text, always included")
    local: int = option(512, low=1, help="newest tokens, always included")
    budget: int = option(2048, low=1, help="tokens a query reads that won the vote")
    chunk: int = option(512, low=1, help="prompt rows that share a list")
    pool: int = option(1, low=1, help="neighbouring tokens pooled together")
    temperature: float = option(1.0, low=0, help="factor on the logits of a vote")
    theta: float | None = option(None, low=-1, high=1, help="query cosine that reuses a list; none: never")
    refresh: int = option(64, low=1, help="most tokens that one list serves")
    positions: str = option("rank", choices=("rank", "text"), help="positions counted inside the list, or those of the text")

    id: ClassVar[str] = "token_select"
    roles: ClassVar[tuple[str, ...]] = ("prefill", "decode")
    selection: ClassVar[str] = "prompt"  # rows of a chunk share the list that their mean chose
    share: ClassVar[str] = "group"
    source: ClassVar[str] = "Wu et al. 2024, arXiv 2411.02886"
    knob: ClassVar[Knob | None] = Knob("budget", 32, 65536, log=True, whole=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "8k": {"sink": 64, "local": 256, "budget": 704, "chunk": 256},
        "cached": {"theta": 0.9},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local < self.chunk:
            raise ConfigError(f"token_select: local expected at least chunk = {self.chunk} (own tokens), got {self.local}")

    @property
    def extends(self) -> bool:  # type: ignore[override]
        return self.positions == "rank"

    @property
    def total(self) -> int:
        """Tokens of a list."""
        return self.sink + self.budget + self.local

    @property
    def min_length(self) -> int:
        return self.total + 1

    def phase(self, step: int) -> str | None:
        return "first" if step == 0 else "step"

    def refuses(self, recipe: Any) -> str | None:
        if recipe.evicts and recipe.decode == self:
            return "all heads share one list of tokens, so it needs a cache that keeps every entry"
        return None

    # ------------------------------------------------------------------ which tokens
    def plan(self, x: AttnInput, state: State) -> Layout | None:
        if x.phase == "prefill":
            return self._prompt(x) if x.start + x.q.shape[2] > self.total else None
        if x.kv.pos is not None or x.kv.capacity <= self.total:
            return None
        tokens, count = self._step(x, state)
        return Layout(x.shape, q_pos=x.layout_pos(), entries=tokens[:, None, None], entry_count=count[:, None, None])

    def _prompt(self, x: AttnInput) -> Layout:
        """A list per chunk of rows, `[1, 1, chunks, total]`."""
        rope, (_, h, n, _), offset = _rope(x), x.q.shape, x.offset(self.chunk)
        blocks, end = -(-(n + offset) // self.chunk), x.start + n
        keys, pos = raw_keys(x.kv, rope), _pos(x)
        tokens, counts = [], []
        cost = h * (3 * end + 6 * self.chunk * x.q.shape[3])
        for lo, hi in pieces(blocks, cost, BUDGET if x.device.type == "cpu" else GPU_BUDGET):
            first, last = _rows(lo, self.chunk, offset, n)[0], _rows(hi - 1, self.chunk, offset, n)[1]
            head = offset if lo == 0 else 0  # rows of this piece's first block that lie before the call
            query = self._summary(raw_queries(x.q[:, :, first:last], rope, pos[:, first:last]), rope, head)
            length = x.start + (torch.arange(lo + 1, hi + 1, device=x.device) * self.chunk - offset).clamp(max=n)
            some, many = self._list(group_logits(query, keys[:, :, :end])[0].transpose(0, 1), length)
            tokens.append(some)
            counts.append(many)
        return Layout(
            x.shape,
            block_q=self.chunk,
            q_offset=offset,
            q_pos=x.layout_pos(),
            entries=torch.cat(tokens)[None, None],
            entry_count=torch.cat(counts)[None, None],
        )

    def _summary(self, plain: Tensor, rope: Rope, offset: int = 0) -> Tensor:
        """Per chunk the mean of its queries, turned to positions local, local + 1, ...: `[B, H, chunks, D]`.

        plain: queries `[B, H, n, D]` before rotation; `offset` rows of the first chunk lie before them.
        """
        row = torch.arange(offset, offset + plain.shape[2], device=plain.device)
        start = (row // self.chunk * self.chunk).clamp(min=offset)  # a chunk cut in two counts from its first row here
        return block_pool(rope.rotate(plain, (self.local + row - start).expand(len(plain), -1)), self.chunk, offset=offset)

    def votes(self, score: Tensor, length: Tensor) -> Tensor:
        """Votes `[R, M]` of scores `[R, H, M]` for rows with `length` `[R]` tokens; 0 outside the candidates.

        The votes of a row sum to H, or to 0 where it has no candidates.
        """
        at = torch.arange(score.shape[-1], device=score.device)
        free = (at >= self.sink) & (at < length[:, None] - self.local)  # [R, M]
        vote = (score * self.temperature).masked_fill(~free[:, None], float("-inf")).softmax(-1).sum(1)
        return torch.where(free, vote, 0.0)

    def _list(self, score: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int32 `[R, min(total, M)]`, ascending, and counts `[R]`."""
        vote = self._pooled(self.votes(score, length))
        at = torch.arange(vote.shape[-1], device=vote.device)
        forced = (at < self.sink) | (at >= length[:, None] - self.local)
        return top_indices(vote, self.total, valid=at < length[:, None], forced=forced)

    def _pooled(self, vote: Tensor) -> Tensor:
        """Votes `[R, M]`, each the highest of its neighbours'."""
        if self.pool == 1:
            return vote
        left = (self.pool - 1) // 2
        return max_pool1d(pad(vote, (left, self.pool - 1 - left)), self.pool, stride=1)

    # ------------------------------------------------------------------ a decode step
    def _step(self, x: AttnInput, state: State) -> tuple[Tensor, Tensor]:
        """The list of this step: tokens `[B, total or a few more]`, counts `[B]`."""
        rope, pos = _rope(x), _pos(x)
        keys: RawKeys = state.layer.setdefault(KEYS, RawKeys())
        if (found := self._fused(x, keys, state)) is not None:
            return found
        raw = keys.update(x)
        query = self._summary(raw_queries(x.q, rope, pos), rope)
        if self.theta is None:
            return self._list(group_logits(query, raw)[:, :, 0], pos[:, 0] + 1)
        held = self._held(x, state)
        if held is None:
            due = torch.ones(len(pos), dtype=torch.bool, device=pos.device)
        else:
            alike = cosine_similarity(query.float().flatten(1), held.query.float().flatten(1), dim=-1) >= self.theta
            due = ~alike | (pos[:, 0] - held.pos > self.refresh)
        if held is None or not _may_look(x) or bool(due.any()):  # each row for itself: its neighbours change nothing
            tokens, count = self._list(group_logits(query, raw)[:, :, 0], pos[:, 0] + 1)
            new = Held(pad(tokens, (0, self.refresh)), count, pos[:, 0], query, x.step)
            held = state.layer[TOKENS] = new.where(due, held).into(state.layer.get(TOKENS))
        return held.now(pos[:, 0], x.kv.capacity)

    def _held(self, x: AttnInput, state: State) -> Held | None:
        """The lists that this step may use again, or None: all are made anew."""
        held: Held | None = state.layer.get(TOKENS)
        if held is None or held.pos.shape[0] != len(x.q) or x.step == 0 or x.step < held.step:
            return None
        return held

    def _fused(self, x: AttnInput, keys: RawKeys, state: State) -> tuple[Tensor, Tensor] | None:
        """The list of a step by kernels that read the keys once; None where there are none for it."""
        kernels, steps = fused.votes(x.q), fused.ranked(x.q)
        if kernels is None or steps is None or not kernels.reads(x.q, x.kv):
            return None
        if (turns := Turns.of(x, state.step, TURNS)) is None:
            return None
        raw, pos = keys.update(x, newest=False), _pos(x)
        assert keys.data is not None
        length, held = x.kv.len, None
        if self.theta is None:
            last = self.total - 1 if self.positions == "rank" else None
            common = (x.q, x.kv, pos, keys.data, turns.asked(self.total), turns.partner)
            voter, query = steps.turn_step(*common, near=self.local, last=last)
        else:  # rows that use their list again have length 0: all that follows returns at once
            first, wide = self._held(x, state) is None, self.total + self.refresh
            if first:
                state.layer[TOKENS] = Held.empty(x.q, wide, x.step).into(state.layer.get(TOKENS))
            held = state.layer[TOKENS]
            common = (x.q, x.kv, pos, keys.data, turns.asked(wide), turns.partner)
            voter, query, length, now = steps.decide(
                *common, (held.query, held.pos, held.count), near=self.local, total=self.total, theta=self.theta,
                refresh=self.refresh, first=first,
            )  # fmt: skip
        vote = kernels.votes(voter, raw, length, lists=1, first=self.sink, tail=self.local, scale=self.temperature)
        vote = self._pooled(vote[:, 0])[:, None]
        tokens, count = best_entries(vote, self.total, length=length, sink=self.sink, recent=self.local)
        state.step[f"{QUERY} {x.layer}"] = query
        if held is None:
            return tokens[:, 0], count[:, 0]
        steps.keep(tokens[:, 0], length, now, held.tokens, held.pos, held.count)
        return held.tokens, now

    # ------------------------------------------------------------------ attention with positions inside the list
    def attend(self, x: AttnInput, plan: Layout, state: State) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(out, lse, None): the tokens of a list stand at 0, 1, ..., the rows at the last of these places."""
        how: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, backend=x.backend, return_lse=True)
        if self.positions == "text" or plan.entries is None:
            out, lse = attend(x.q, x.kv, plan, **how)
            return out, lse, None
        assert plan.entry_count is not None
        if x.phase == "decode":
            query = state.step.pop(f"{QUERY} {x.layer}", None)
            if query is not None and x.backend in (None, "auto", "triton") and x.scale > 0:
                return (*self._placed(x, query, plan.entries[:, 0, 0], plan.entry_count[:, 0, 0], state), None)
            return (*self._ranked(x, x.q, _pos(x), plan.entries[:, 0, 0], plan.entry_count[:, 0, 0], how), None)
        return (*self._chunks(x, plan, how), None)

    def _placed(self, x: AttnInput, query: Tensor, tokens: Tensor, count: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """`_ranked` for a step whose queries `[B, H, 1, D]` stand at the last place: keys come from before rotation."""
        kernels, turns = fused.ranked(x.q), Turns.of(x, state.step, TURNS)
        assert kernels is not None and turns is not None
        raw, table = state.layer[KEYS].data, turns.asked(tokens.shape[1])
        how = dict(scale=x.scale, softcap=x.softcap, halves=turns.halves)
        return kernels.attend(query, raw, x.kv.v, tokens, count, table, turns.partner, **how)  # type: ignore[no-any-return]

    def _chunks(self, x: AttnInput, plan: Layout, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A prompt: chunks of all their rows with lists of full length as one batch, as many as memory allows, and those at
        the beginning and the end alone."""
        assert plan.entries is not None
        (_, h, n, d), blocks, pos = x.q.shape, plan.num_blocks, _pos(x)
        rows = [_rows(block, self.chunk, plan.q_offset, n) for block in range(blocks)]
        many = [min(self.total, x.start + r1) for _, r1 in rows]  # the host knows how long a list is
        wide = plan.entries.shape[-1]
        full = [b for b in range(blocks) if rows[b][1] - rows[b][0] == self.chunk and many[b] == wide]
        lo, hi = (full[0], full[-1] + 1) if full else (blocks, blocks)  # without gaps: what is not full is first or last
        cost = 6 * x.groups * wide * d + 4 * h * self.chunk * d
        batches = pieces(hi - lo, cost, BUDGET if x.device.type == "cpu" else GPU_BUDGET)
        runs = [(lo + a, lo + z) for a, z in batches]
        runs = [(b, b + 1) for b in range(lo)] + runs + [(b, b + 1) for b in range(hi, blocks)]
        outs, lses = [], []
        for a, z in runs:
            r0, r1 = rows[a][0], rows[z - 1][1]
            tokens = plan.entries[0, 0, a:z, : many[a]]
            q = x.q[0, :, r0:r1].unflatten(1, (z - a, -1)).transpose(0, 1)  # [blocks, H, rows, D]
            out, lse = self._ranked(x, q, pos[0, r0:r1].unflatten(0, (z - a, -1)), tokens, None, how)
            outs.append(out.transpose(0, 1).flatten(1, 2))
            lses.append(lse.transpose(0, 1).flatten(1, 2))
        return torch.cat(outs, 1)[None], torch.cat(lses, 1)[None]

    def _ranked(
        self, x: AttnInput, q: Tensor, pos: Tensor, tokens: Tensor, count: Tensor | None, how: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Queries `[B, H, n, D]` that stand at `pos` `[B, n]`, on tokens `[B, L]`, the rows' own the last of them.

        Rows of the batch are those of the call, or chunks of its only one.
        """
        rope, (b, wide), n, lead = _rope(x), tokens.shape, q.shape[2], len(x.q)
        every = tokens.view(lead, 1, -1).expand(lead, x.groups, -1)
        k, v = (t.unflatten(2, (-1, wide)).transpose(1, 2).flatten(0, 1) for t in x.kv.gather(every))
        place = torch.arange(wide, device=x.device).expand(b, wide)
        k = moved(k, rope, tokens.long(), place)
        if count is None:
            return attend(moved(q, rope, pos, place[:, wide - n :]), (k, v), None, **how)  # type: ignore[return-value]
        kv = KV.dense(k, v, len=count[:, None].expand(b, x.groups).contiguous())
        q = moved(q, rope, pos, count[:, None].long() - 1)
        return attend(q, kv, Layout.dense(b, q.shape[1], 1, wide), **how)  # type: ignore[return-value]


@dataclass
class Held:
    """The last list of each row. It stays in the same memory, where captured steps read it.

    Attributes:
        tokens: int32 `[B, L]`, with room for those since. count: int32 `[B]`, without them. pos: int64 `[B]` and query `[B,
            H, 1, D]`: what it was made for. step: of the newest, as far as the host knows.
    """

    tokens: Tensor
    count: Tensor
    pos: Tensor
    query: Tensor
    step: int

    @staticmethod
    def empty(query: Tensor, wide: int, step: int) -> Held:
        b = len(query)
        make = lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device=query.device)  # noqa: E731
        pos, query = make(b, dtype=torch.int64), make(*query.shape, dtype=torch.float32)
        return Held(make(b, wide, dtype=torch.int32), make(b, dtype=torch.int32), pos, query, step)

    def now(self, pos: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """The lists and every token since."""
        after = torch.arange(self.tokens.shape[-1], device=pos.device) - self.count[:, None]
        new = (self.pos[:, None] + 1 + after).clamp(max=m - 1)
        return torch.where(after < 0, self.tokens, new).to(torch.int32), (self.count + pos - self.pos).to(torch.int32)

    def where(self, rows: Tensor, old: Held | None) -> Held:
        """These lists for the rows `[B]`, the old ones for the others."""
        if old is None:
            return self
        pairs = zip(self._tensors(), old._tensors(), strict=True)
        return self._with([torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs])

    def into(self, old: Held | None) -> Held:
        """These lists in the memory of old ones of their shape, or in their own."""
        if old is None or any(a.shape != b.shape for a, b in zip(self._tensors(), old._tensors(), strict=True)):
            return self.fork()
        for new, there in zip(self._tensors(), old._tensors(), strict=True):
            there.copy_(new)
        return self._with(old._tensors())

    def fork(self) -> Held:
        return self._with([t.clone() for t in self._tensors()])

    def reorder(self, index: Tensor) -> None:
        at = index.to(self.pos.device)
        self.tokens, self.count, self.pos, self.query = (t.index_select(0, at) for t in self._tensors())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.tokens, self.count, self.pos, self.query

    def _with(self, tensors: Sequence[Tensor]) -> Held:
        tokens, count, pos, query = tensors
        return Held(tokens, count, pos, query, self.step)


def _may_look(x: AttnInput) -> bool:
    """Whether this step may wait for the device, which saves the scores that no row needs: not while it is captured."""
    return not (x.q.is_cuda and torch.cuda.is_current_stream_capturing())


def _rows(block: int, size: int, offset: int, n: int) -> tuple[int, int]:
    """Rows of this call that lie in a block of the grid."""
    return max(0, block * size - offset), min(n, (block + 1) * size - offset)


def _pos(x: AttnInput) -> Tensor:
    """int64 `[B, N]`, true positions of the query rows."""
    if x.q_pos is not None:
        return x.q_pos
    return torch.arange(x.start, x.start + x.q.shape[2], device=x.device).expand(x.q.shape[0], -1)


def _rope(x: AttnInput) -> Rope:
    if x.rope is None:
        raise UnsupportedError("token_select: needs the model's rotation to score keys before it, and none was found")
    return x.rope
