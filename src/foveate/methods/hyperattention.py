"""HyperAttention: queries and keys sorted by an angular hash meet in blocks; sampled keys stand for all the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..combine import merge
from ..kernels.dispatch import attend
from ..kv import KV
from ..layout import Layout, Part, Parts
from ..scores.keys import read_keys
from ..scores.lsh import Squares, buckets, directions, pair_up
from .base import AttnInput, Method, State, option

Result = tuple[Tensor, Tensor]  # out `[..., Dv]` and lse `[...]`


@dataclass(frozen=True)
class Hashed(Parts):
    """The plan of one call. Its only part is the exact one; the rest is in `before` and `levels`.

    Attributes:
        length: L, rows of a segment, within which attention is exact. The rows of the call are 2^len(levels) segments,
            the last ones filled up with rows that nothing sees.
        before: one square of all rows on all keys before them, or None.
        levels: for j = 0, 1, ... the squares of every second run of L 2^j rows on the run before it.
    """

    length: int = 0
    before: Squares | None = None
    levels: tuple[Squares, ...] = ()

    def to_mask(self, kv: KV | None = None) -> Tensor:
        """bool `[B, H, N, M]`: the keys that each row computes, in blocks or as samples. For tests; costs N x M."""
        layout = self.parts[0].layout
        b, h, n, m = layout.shape
        rows = self.length << len(self.levels)
        at = torch.arange(rows, device=layout.device)
        near = (at[:, None] // self.length == at // self.length) & (at[:, None] >= at)
        out = near.repeat(b, h, 1, 1)
        for j, squares in enumerate(self.levels):
            for i, one in enumerate(squares.to_mask().unflatten(0, (b, -1)).unbind(1)):
                first = (self.length << j) * 2 * i
                out[:, :, first + one.shape[2] : first + 2 * one.shape[2], first : first + one.shape[2]] |= one
        out = out[:, :, :n, :n]
        out = out if self.before is None else torch.cat([self.before.to_mask(), out], -1)
        return pad(out, (0, m - out.shape[-1]))  # pages not filled yet


@dataclass(frozen=True)
class HyperAttention(Method):
    """Han et al. 2023, "HyperAttention: Long-context Attention in Near-Linear Time" (arXiv 2310.05869).

    The prompt is halved until pieces have at most `min_seq_len` tokens; these are exact. At every halving the second half
    looks back at the first through one square: queries and keys are sorted by the side of `planes` random hyperplanes
    they lie on, in Gray-code order, and meet in blocks of `block` sorted keys; `samples` keys drawn at random, with
    replacement and for each head, stand with weight (keys / samples) for all the others. A later chunk of a prompt sees
    what came before it as one such square, so chunks should be long. `seed` fixes hyperplanes and samples, which
    depend on the layer, on the first position, and on nothing else; gradients are those of the sampled estimator. The
    first `dense_layers` layers stay dense.

    Differs from the published code where that contradicts the paper: keys that fill up the last block are never
    seen, a sample inside the row's own block is never counted again, and buckets next to each other really differ
    in one bit (the code applies the Gray code where its inverse belongs). An odd prompt is filled up once and not
    at every halving, which moves the cuts by a few tokens.
    """

    block: int = option(256, low=1, help="tokens of a block, once sorted")
    samples: int = option(256, low=0, help="sampled keys that stand for all others")
    planes: int = option(7, low=1, high=16, help="random hyperplanes of the hash")
    min_seq_len: int = option(4096, low=1, help="most tokens of a piece that is exact")
    dense_layers: int = option(0, low=0, help="first layers, which stay dense")
    seed: int = option(0, low=0, high=(1 << 32) - 1, help="seed of the hyperplanes and the samples")

    id: ClassVar[str] = "hyperattention"
    roles: ClassVar[tuple[str, ...]] = ("prefill",)
    selection: ClassVar[str] = "prompt"
    source: ClassVar[str] = "Han et al. 2023, arXiv 2310.05869"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"8k": {"min_seq_len": 1024, "block": 128, "samples": 128}}

    @property
    def min_length(self) -> int:
        return self.min_seq_len + 1

    def refuses(self, recipe: Any) -> str | None:
        wants = [m.id for m in recipe.methods if "mass" in m.sees and "prefill" in m.observes]
        return f"{wants[0]} wants the attention mass of the prompt, which weighted samples do not have" if wants else None

    # ------------------------------------------------------------------ what is computed
    def plan(self, x: AttnInput, state: State) -> Hashed | None:
        n, start = x.q.shape[2], x.start
        if x.layer < self.dense_layers or start + n <= self.min_seq_len or x.kv.bias is not None or x.kv.pos is not None:
            return None
        depth = (-(-n // self.min_seq_len) - 1).bit_length()
        length = -(-n // (1 << depth))
        planes = directions(x.q.shape[3], self.planes, self.seed)
        # A generator on the CPU reads 32 bits of its seed: all three must be in them.
        gen = torch.Generator().manual_seed(crc32(f"{self.seed} {x.layer} {start}".encode()))
        keys = read_keys(x.kv, 0, x.groups)[:, :, : start + n]
        q, k = buckets(x.q, planes), buckets(keys, planes)
        draw: tuple[int, int, torch.Generator] = (self.block, self.samples, gen)
        before = pair_up(q, k[:, :, :start], *draw) if start else None
        # Rows that fill up the last segments come last in every order, and lie behind every key of a real row.
        fill, last = (length << depth) - n, 1 << self.planes
        q, k = pad(q, (0, fill), value=last), pad(k[:, :, start:], (0, fill), value=last)
        levels = []
        for j in range(depth):
            back, ahead = _halves(k[..., None], length << j)[0], _halves(q[..., None], length << j)[1]
            levels.append(pair_up(ahead[..., 0], back[..., 0], *draw))
        exact = Layout.lists(
            x.shape,
            block_q=length,
            tile_width=length,
            tiles=start + torch.arange(-(-n // length), device=x.device)[None, None, :, None] * length,
            q_pos=x.layout_pos(),
            validate=False,
        )
        return Hashed((Part(exact, kv=x.kv),), length=length, before=before, levels=tuple(levels))

    # ------------------------------------------------------------------ the arithmetic
    def attend(self, x: AttnInput, plan: Layout | Parts, state: State) -> tuple[Tensor, Tensor, None]:
        """(out `[B, H, N, Dv]`, lse `[B, H, N]`, None). Differentiable in queries, keys and values."""
        if not isinstance(plan, Hashed):
            out, lse = attend(x.q, x.kv, plan, scale=x.scale, softcap=x.softcap, return_lse=True, backend=x.backend)
            return out, lse, None
        n, start = x.q.shape[2], x.start
        kv = x.kv if x.kv.kind == "dense" else x.kv.to_dense()
        k, v = kv.k[:, :, : start + n], kv.v[:, :, : start + n]
        fill = (plan.length << len(plan.levels)) - n
        q, kn, vn = (pad(t, (0, 0, 0, fill)) for t in (x.q, k[:, :, start:], v[:, :, start:]))
        got = self._exact(x, q, kn, vn, plan.length)
        for j, squares in enumerate(plan.levels):
            size = plan.length << j
            far = self._squares(x, _halves(q, size)[1], _halves(kn, size)[0], _halves(vn, size)[0], squares)
            got = _merge_second(got, far, size)
        out, lse = got[0][:, :, :n], got[1][:, :, :n]
        if plan.before is not None:
            far = self._squares(x, x.q, k[:, :, :start], v[:, :, :start], plan.before)
            out, lse = merge([(out, lse), far])
        return out, lse, None

    def _exact(self, x: AttnInput, q: Tensor, k: Tensor, v: Tensor, length: int) -> Result:
        """Causal attention within each run of `length` rows."""
        q, k, v = (_runs(t, length) for t in (q, k, v))
        layout = Layout.dense(len(q), q.shape[1], length, length)
        out, lse = attend(q, (k, v), layout, scale=x.scale, softcap=x.softcap, return_lse=True, backend=x.backend)
        return _joined(out, x.q.shape[0]), _joined(lse[..., None], x.q.shape[0])[..., 0]

    def _squares(self, x: AttnInput, q: Tensor, k: Tensor, v: Tensor, squares: Squares) -> Result:
        """Queries `[S, H, nq, D]` on keys `[S, G, nk, D]`: the blocks of the sorted order, and the samples beside them."""
        (s, h, nq, _), nk, m = q.shape, k.shape[2], squares.samples.shape[-1]
        options: dict[str, Any] = dict(scale=x.scale, softcap=x.softcap, return_lse=True, backend=x.backend)
        q = _take(q, squares.queries)
        tiles = squares.met[None, None, :, None] * squares.width
        grid: dict[str, Any] = dict(block_q=squares.rows, causal=False, validate=False)
        near = Layout.lists((s, h, nq, nk), tile_width=squares.width, tiles=tiles, **grid)
        results = [attend(q, (_take(k, squares.keys), _take(v, squares.keys)), near, **options)]
        if m:
            entries, count = squares.others()
            chosen = squares.sampled()
            far = Layout.lists((s, h, nq, m), entries=entries, entry_count=count, **grid)
            out, lse = attend(q, (_take(k, chosen), _take(v, chosen)), far, **options)
            results.append((out, lse + math.log(nk / m)))
        out, lse = merge(results)
        at = squares.queries.argsort(-1)
        return _take(out, at), lse.gather(-1, at)


# ---------------------------------------------------------------------- runs of rows as batch rows
def _runs(t: Tensor, size: int) -> Tensor:
    """`[B, heads, runs * size, ...]` -> `[B * runs, heads, size, ...]`."""
    return t.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def _joined(t: Tensor, b: int) -> Tensor:
    """The inverse of `_runs` for b batch rows."""
    return t.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)


def _halves(t: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second of every two runs of `size` rows, each as `_runs`."""
    both = _runs(t, 2 * size)
    return both[:, :, :size], both[:, :, size:]


def _merge_second(all_rows: Result, far: Result, size: int) -> Result:
    """Merge `far`, results of every second run of `size` rows, into those of all rows."""
    out, lse = all_rows
    (o1, o2), (l1, l2) = _halves(out, size), _halves(lse[..., None], size)
    o2, merged = merge([(o2, l2[..., 0]), far])
    b = out.shape[0]
    return _joined(torch.cat([o1, o2], 2), b), _joined(torch.cat([l1[..., 0], merged], 2)[..., None], b)[..., 0]


def _take(t: Tensor, index: Tensor) -> Tensor:
    """Rows `index` `[S, H, n]` of t `[S, G, N, D]`, for each head of its kv head: `[S, H, n, D]`."""
    if t.shape[1] == index.shape[1]:
        return t.gather(2, index[..., None].expand(*index.shape, t.shape[-1]))
    r = index.shape[1] // t.shape[1]
    flat = index.unflatten(1, (-1, r)).flatten(2)
    return t.gather(2, flat[..., None].expand(*flat.shape, t.shape[-1])).reshape(*index.shape, t.shape[-1])
