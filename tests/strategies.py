"""Hypothesis strategies for attention calls: random layouts of every mixture over KV views of every storage.

`cases()` draws a whole call. Sizes are small and fit no block; seeds fill the tensors, so that examples shrink well.

    @given(cases())
    def test(case):
        out = attend(case.q, case.kv, case.layout, softcap=case.softcap)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.kv import KV
from foveate.layout import Layout

GROUPS = (1, 2, 3, 4, 8)  # query heads per kv head
STORAGES = ("dense", "paged", "ragged")
PARTS = ("rule", "tiles", "entries", "factored")


@dataclass(frozen=True)
class Case:
    """One attention call. `untouched` bool `[B, G, M]`: entries that no row of the kv head's queries may see."""

    q: Tensor
    kv: KV
    layout: Layout
    softcap: float | None

    @property
    def untouched(self) -> Tensor:
        b, g, m, _, _ = self.kv.shape
        mask = self.layout.to_mask(self.kv)
        return ~mask.view(b, g, -1, *mask.shape[2:]).any(3).any(2)

    def double(self) -> Case:
        """The same call in fp64."""
        bias = None if self.kv.bias is None else self.kv.bias.double()
        kv = replace(self.kv, k=self.kv.k.double(), v=self.kv.v.double(), bias=bias)
        return replace(self, q=self.q.double(), kv=kv)


def generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))


@st.composite
def kvs(
    draw: st.DrawFn, b: int, g: int, m: int, d: int, dv: int, *, storages: tuple[str, ...] = STORAGES, plain: bool = False
) -> KV:
    """A view of b x g segments of up to m entries. `plain`: no len, pos or bias. What lies beyond `len` is NaN."""
    gen = generator(draw)
    k, v = torch.randn(b, g, m, d, generator=gen), torch.randn(b, g, m, dv, generator=gen)
    if plain:
        return KV.dense(k, v)
    kind = draw(st.sampled_from(storages))
    lens = torch.randint(0, m + 1, (b, g), generator=gen, dtype=torch.int32)
    if draw(st.booleans()):
        lens = torch.full_like(lens, m)
    pos = None
    if draw(st.booleans()):  # what an eviction leaves: ascending positions with holes
        pos = torch.stack([torch.randperm(2 * m, generator=gen)[:m].sort().values for _ in range(b * g)]).view(b, g, m).int()
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(b, g, m, generator=gen)
        bias[torch.rand(b, g, m, generator=gen) < 0.1] = float("-inf")
    beyond = (torch.arange(m) >= lens[..., None])[..., None]
    k, v = k.masked_fill(beyond, float("nan")), v.masked_fill(beyond, float("nan"))
    if kind == "dense":
        size = m + draw(st.integers(0, 3))  # a slice of a larger buffer, as a growing cache hands it out
        big = [torch.full((b, g, size, t.shape[-1]), float("nan")) for t in (k, v)]
        for buffer, t in zip(big, (k, v), strict=True):
            buffer[:, :, :m] = t
        whole = bool((lens == m).all()) and draw(st.booleans())
        return KV.dense(big[0][:, :, :m], big[1][:, :, :m], len=None if whole else lens, pos=pos, bias=bias)
    if kind == "paged":
        page = draw(st.sampled_from([p for p in (1, 2, 3, 5, 8) if m % p == 0]))
        count = b * g * (m // page)
        order = torch.randperm(count + 2, generator=gen)[:count]
        pools = [torch.full((count + 2, page, t.shape[-1]), float("nan")) for t in (k, v)]
        for pool, t in zip(pools, (k, v), strict=True):
            pool[order] = t.reshape(count, page, -1)
        return KV.paged(*pools, order.view(b, g, -1).int(), lens, pos=pos, bias=bias)
    gap = 2
    flat = [torch.full((b * g * (m + gap), t.shape[-1]), float("nan")) for t in (k, v)]
    starts = torch.randperm(b * g, generator=gen).view(b, g) * (m + gap)
    for i in range(b):
        for j in range(g):
            for buffer, t in zip(flat, (k, v), strict=True):
                buffer[starts[i, j] : starts[i, j] + int(lens[i, j])] = t[i, j, : int(lens[i, j])]
    return KV.ragged(*flat, starts, lens, m, pos=pos, bias=bias)


@st.composite
def layouts(
    draw: st.DrawFn, shape: tuple[int, int, int, int], *, kv: KV | None = None, parts: tuple[str, ...] = PARTS
) -> Layout:
    """A layout of this shape with any mixture of parts (`factored` stands beside the rule only, and only for views
    whose entry numbers are positions)."""
    b, h, n, m = shape
    gen = generator(draw)
    causal = draw(st.booleans())
    moved = kv is not None and kv.pos is not None
    q_pos = None
    if moved or draw(st.integers(0, 3)) == 0:
        top = 2 * m if moved else m
        q_pos = torch.stack([torch.randperm(top + n, generator=gen)[:n].sort().values for _ in range(b)])
    if draw(st.integers(0, 5)) == 0:
        return Layout.dense(*shape, causal=causal, q_pos=q_pos)
    chosen = draw(st.sets(st.sampled_from(parts), min_size=0, max_size=3))
    if "factored" in chosen and not moved:
        chosen, causal = chosen & {"factored", "rule"}, True
        if q_pos is not None:  # rows of a block follow one another
            q_pos = q_pos[:, :1] + torch.arange(n)
    else:
        chosen = chosen - {"factored"}
    block_q = draw(st.integers(1, n + 2))
    offset = draw(st.integers(0, block_q - 1))
    width = draw(st.integers(1, 6))

    def lead() -> tuple[int, int]:
        return draw(st.sampled_from((1, b))), draw(st.sampled_from([x for x in range(1, h + 1) if h % x == 0]))

    layout = Layout(shape, causal=causal, block_q=block_q, q_offset=offset, tile_width=width, q_pos=q_pos)
    blocks = layout.num_blocks
    if "factored" in chosen:
        d = torch.randint(0, m, (*lead(), draw(st.integers(1, 3))), generator=gen)
        c = torch.randint(0, m, (*lead(), draw(st.integers(1, 4))), generator=gen)
        layout = Layout.factored(
            shape, diagonals=d, columns=c, block_q=block_q, q_offset=offset, tile_width=width, q_pos=q_pos
        )
    tiles = entries = None
    if "tiles" in chosen:
        tiles = _rows(gen, (*lead(), blocks), m, draw(st.integers(1, 4)))
    if "entries" in chosen:
        entries = _rows(gen, (*lead(), blocks), m, draw(st.integers(1, 5)))
    if tiles is not None or entries is not None:
        plain = dict(block_q=block_q, q_offset=offset, tile_width=width, q_pos=q_pos, causal=causal)
        tile_count, entry_count = (
            None if t is None else torch.randint(0, t.shape[-1] + 1, t.shape[:-1], generator=gen) for t in (tiles, entries)
        )
        layout = Layout.lists(
            shape, tiles=tiles, tile_count=tile_count, entries=entries, entry_count=entry_count, **plain
        )  # fmt: skip
    if "rule" in chosen:
        rule = {}
        for name in draw(st.sets(st.sampled_from(("sink", "window", "stride")))):
            rule[name] = torch.randint(0, 7, lead(), generator=gen, dtype=torch.int32)
        if "stride" in rule:
            rule["phase"] = torch.randint(0, 3, lead(), generator=gen, dtype=torch.int32)
        layout = replace(layout, **rule)
    layout.validate()
    return layout


def _rows(gen: torch.Generator, lead: tuple[int, ...], m: int, width: int) -> Tensor:
    """Ascending rows of different numbers below m."""
    width = min(width, m)
    return torch.rand(*lead, m, generator=gen).topk(width, -1).indices.sort(-1).values.int()


@st.composite
def cases(
    draw: st.DrawFn, *, storages: tuple[str, ...] = STORAGES, parts: tuple[str, ...] = PARTS, plain: bool = False
) -> Case:
    """A call: B 1 or 2, G 1 to 3, groups of GROUPS, up to 21 rows and 24 entries, Dv often other than D."""
    b, g = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2, 3)))
    h = g * draw(st.sampled_from(GROUPS))
    n, m = draw(st.sampled_from((1, 1, 2, 5, 13, 21))), draw(st.sampled_from((1, 3, 10, 17, 24)))
    d = draw(st.sampled_from((4, 8)))
    dv = draw(st.sampled_from((d, d, 3)))
    kv = draw(kvs(b, g, m, d, dv, storages=storages, plain=plain))
    q = torch.randn(b, h, n, d, generator=generator(draw)) * 2
    layout = draw(layouts((b, h, n, m), kv=kv, parts=parts))
    return Case(q, kv, layout, draw(st.sampled_from((None, None, 1.5))))
