"""Layouts against a slow model of Python sets (tests/layout_model.py), million-token layouts, and bad input."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.errors import FoveateError, LayoutError
from foveate.kv import KV
from foveate.layout import Layout, Part, Parts
from tests.layout_model import Model, layouts, shapes, subsets, views

quick = settings(deadline=None, max_examples=25)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def blocks_of(mask: torch.Tensor, bq: int, bk: int, offset: int = 0) -> torch.Tensor:
    """Blocks of a mask that hold True, by loops."""
    b, h, n, m = mask.shape
    out = torch.zeros(b, h, -(-(n + offset) // bq), -(-m // bk), dtype=torch.bool)
    for i in range(n):
        for j in range(0, m, bk):
            out[:, :, (i + offset) // bq, j // bk] |= mask[:, :, i, j : j + bk].any(-1)
    return out


# ---------------------------------------------------------------------- meaning
@quick
@given(layouts())
def test_mask(pair):
    layout, model = pair
    layout.validate()
    assert torch.equal(layout.to_mask(), model.mask())


@quick
@given(layouts(consecutive=False), st.data())
def test_mask_over_a_view(pair, data):
    """Ragged lengths, positions apart from entry numbers, hidden entries, permuted queries."""
    layout, model = pair
    b, h, _, m = layout.shape
    kv = data.draw(views(b, h, m))
    assert torch.equal(layout.to_mask(kv), model.mask(kv))


@quick
@given(layouts(), st.data())
def test_rows_of_a_mask(pair, data):
    """Any rows, in any order and repeated, equal those of the whole mask, with and without a view."""
    layout, _ = pair
    b, h, n, m = layout.shape
    rows = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)), dtype=torch.int64)
    kv = data.draw(st.one_of(st.none(), views(b, h, m)))
    assert torch.equal(layout.to_mask(kv, rows=rows), layout.to_mask(kv)[:, :, rows])


@settings(deadline=None, max_examples=80)
@given(layouts(kinds=("full", "rule", "lists", "lists", "factored", "mixed")), st.data())
def test_pairs_and_density(pair, data):
    layout, model = pair
    b, h, _, m = layout.shape
    for kv in (None, data.draw(views(b, h, m))):
        mask, visible = model.mask(kv), model.mask(kv, everything=True)
        assert torch.equal(layout.pairs(kv), mask.sum((-1, -2)))
        assert torch.equal(layout.visible(kv), visible.sum((-1, -2)))
        assert layout.density(kv) == pytest.approx(int(mask.sum()) / max(1, int(visible.sum())))


@quick
@given(layouts(consecutive=False))
def test_pairs_of_permuted_queries(pair):
    layout, model = pair
    assert torch.equal(layout.pairs(), model.mask().sum((-1, -2)))


@quick
@given(layouts(), st.integers(1, 6), st.integers(1, 7), st.data())
def test_blocks(pair, bq, bk, data):
    layout, model = pair
    b, h, _, m = layout.shape
    offset = data.draw(st.integers(0, bq - 1))
    assert torch.equal(layout.to_block_mask(bq, bk, q_offset=offset), blocks_of(model.mask(), bq, bk, offset))
    kv = data.draw(views(b, h, m))
    assert torch.equal(layout.to_block_mask(bq, bk, kv, offset), blocks_of(model.mask(kv), bq, bk, offset))


@quick
@given(layouts(kinds=("rule", "lists", "factored", "mixed")), st.integers(1, 6), st.integers(1, 7))
def test_computed_on_a_grid(pair, bq, bk):
    """Every touched block counts the rows and keys that exist in it; the grid stands where the query blocks do."""
    layout, model = pair
    _, _, n, m = layout.shape
    offset = layout.q_offset % bq if layout.has_lists else 0
    total = 0
    for _, _, i, j in blocks_of(model.mask(), bq, bk, offset).nonzero().tolist():
        rows = [r for r in range(n) if (r + offset) // bq == i]
        total += len(rows) * len(range(j * bk, min(m, (j + 1) * bk)))
    assert layout.computed((bq, bk)) == total
    visible = int(model.mask(everything=True).sum())
    assert layout.density_computed((bq, bk)) == pytest.approx(total / max(1, visible))


@quick
@given(layouts(kinds=("rule", "lists", "factored", "mixed")))
def test_computed_as_listed(pair):
    """Without a grid: whole tiles and single keys for every row of their block, and the pairs of the rule."""
    layout, model = pair
    b, h, n, m = layout.shape
    total = 0
    for i in range(b):
        for j in range(h):
            for blk in range(model.num_blocks):
                owned, tiles = set(), 0
                for keys in reversed(model.tile_keys(i, j, blk)) if model.heads[i][j].tiles else model.tile_keys(i, j, blk):
                    tiles += bool(keys - owned)  # one that a nearer tile covers is not walked
                    owned |= keys
                total += (tiles * model.width + len(model.single_keys(i, j, blk))) * len(model.rows_of(blk))
            head = model.heads[i][j]
            head.tiles = head.entries = head.diagonals = None
            head.columns = []
    total += int(model.mask().sum()) if layout.has_rule else 0
    assert layout.computed() == total


def test_dense_is_the_unit():
    layout = Layout.dense(2, 4, 37, 50)
    assert layout.density() == layout.density_computed() == layout.density_computed((16, 16)) == 1.0
    assert torch.equal(layout.to_mask(), torch.ones(37, 50).tril(13).bool().expand(2, 4, 37, 50))


def test_decode_density_is_entries_read_over_entries_there():
    """One query per row over ragged lengths: 8 of 100 entries in one row, 8 of 40 in the other."""
    k = torch.zeros(2, 2, 100, 4)
    kv = KV.dense(k, k, len=torch.tensor([[100, 100], [40, 40]]))
    entries = torch.arange(0, 32, 4, dtype=torch.int32).expand(2, 2, 1, 8)
    layout = Layout.lists((2, 4, 1, 100), block_q=1, entries=entries)
    assert layout.density(kv) == pytest.approx(16 / 140)
    assert layout.density_computed(kv=kv) == pytest.approx(16 / 140)
    assert layout.density_computed((1, 16), kv) == pytest.approx(2 * 32 / 140)  # entries 0..28 lie in two pages of 16
    evicted = KV.dense(k, k, pos=(torch.arange(100) * 7).expand(2, 2, 100))
    window = Layout.static((2, 4, 1, 100), window=70, block_q=1, q_pos=torch.full((2, 1), 99 * 7))
    assert window.density(evicted) == pytest.approx(0.1)


# ---------------------------------------------------------------------- factored
@quick
@given(shapes(), st.data())
def test_factored_is_the_union_of_its_definition(shape, data):
    """Rows of a block reach a distance d at [e-d-block_q, e-d); re-cutting keeps all of it and adds less than a tile
    per run, at the older end of the run."""
    b, h, n, m = shape
    block_q, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    offset = data.draw(st.integers(0, block_q - 1))
    number = st.integers(0, m - 1)
    d, c = data.draw(st.lists(number, max_size=6)), data.draw(st.lists(number, max_size=6))
    index = [torch.tensor(x, dtype=torch.int64).view(1, 1, -1) for x in (d, c)]
    layout = Layout.factored(shape, diagonals=index[0], columns=index[1], block_q=block_q, tile_width=width, q_offset=offset)
    layout.validate()
    mask = layout.to_mask()
    for i in range(n):
        q = m - n + i
        e = m - n - offset + ((i + offset) // block_q + 1) * block_q
        reach = {e - 1 - x for far in d for x in range(far, far + block_q)}
        must = {k for k in reach | set(c) if 0 <= k <= min(q, m - 1)}
        got = set(mask[0, 0, i].nonzero()[:, 0].tolist())
        assert must <= got
        for k in got - must:  # a few keys older than the end of a run
            assert any(x in reach for x in range(k + 1, k + width))
    if width == 1:
        assert layout.nbytes <= 4 * (2 + m + block_q + len(c) + 2)


@quick
@given(shapes(), st.data())
def test_factored_ignores_order_and_repeats(shape, data):
    m = shape[3]
    d = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=8))
    c = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=8))
    sizes = dict(block_q=data.draw(st.integers(1, 5)), tile_width=data.draw(st.integers(1, 5)))
    tidy = [torch.tensor(sorted(set(x))).view(1, 1, -1) for x in (d, c)]
    wild = [torch.tensor(x + x[:2]).view(1, 1, -1) for x in (d, c)]
    a = Layout.factored(shape, diagonals=tidy[0], columns=tidy[1], **sizes)
    b = Layout.factored(shape, diagonals=wild[0], columns=wild[1], **sizes)
    assert torch.equal(a.to_mask(), b.to_mask())
    assert torch.equal(a.pairs(), b.pairs())


# ---------------------------------------------------------------------- chunks
@quick
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_chunk_has_the_rows_of_the_whole(m, block_q, width, data):
    """The same rules and lists, asked for the last rows only (M > N), name the same pairs; no grid shifts."""
    start = data.draw(st.integers(0, m - 1))
    n = m - start
    first = start // block_q
    nq = -(-m // block_q)
    _, tiles, tile_count = data.draw(subsets((1, 2, nq), m, 4))
    _, entries, entry_count = data.draw(subsets((1, 1, nq), m, 4))
    diagonals = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=4))).view(1, 1, -1)
    columns = torch.tensor(data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=4))).view(1, 1, -1)

    def build(rows, offset, lo):
        shape, grid = (1, 2, rows, m), dict(block_q=block_q, q_offset=offset)
        yield Layout.static(shape, sink=2, window=5, stride=3, phase=1, stride_block=width, **grid)
        yield Layout.factored(shape, diagonals=diagonals, columns=columns, tile_width=width, **grid)
        yield Layout.lists(
            shape,
            tiles=tiles[:, :, lo:],
            tile_count=tile_count[:, :, lo:],
            entries=entries[:, :, lo:],
            entry_count=entry_count[:, :, lo:],
            tile_width=width,
            **grid,
        )

    for whole, chunk in zip(build(m, 0, 0), build(n, start % block_q, first), strict=True):
        want = whole.to_mask()[:, :, start:]
        assert torch.equal(chunk.to_mask(), want)
        assert torch.equal(chunk.pairs(), want.sum((-1, -2)))


# ---------------------------------------------------------------------- conversions
@quick
@given(layouts())
def test_tensors_and_meta(pair):
    layout, model = pair
    again = Layout.from_tensors(layout.tensors(), layout.meta())
    assert again.meta() == layout.meta()
    assert all(a is b for a, b in zip(again.tensors(), layout.tensors(), strict=True))
    assert torch.equal(again.to("cpu").to_mask(), model.mask())


@pytest.mark.parametrize("n, m", [(3, 1), (5, 2), (4, 3)])
def test_the_share_of_more_rows_than_keys(n, m):
    """Rows before the first key see nothing; of the m (m + 1) / 2 visible pairs a tile over everything names all."""
    made = Layout.from_csr(torch.tensor([0, 1]), torch.tensor([0]), (1, 1, n, m), block_q=n, block_k=m)
    assert made.share == 1000


@quick
@given(shapes(), st.data())
def test_block_mask_and_csr(shape, data):
    b, h, n, m = shape
    bq, bk = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    offset, causal = data.draw(st.integers(0, bq - 1)), data.draw(st.booleans())
    nq, nk = -(-(n + offset) // bq), -(-m // bk)
    bits = data.draw(st.lists(st.booleans(), min_size=b * h * nq * nk, max_size=b * h * nq * nk))
    blocks = torch.tensor(bits).view(b, h, nq, nk)
    layout = Layout.from_block_mask(blocks, n, m, block_q=bq, block_k=bk, q_offset=offset, causal=causal)
    layout.validate()
    rows = (torch.arange(n) + offset) // bq
    want = blocks[:, :, rows].repeat_interleave(bk, -1)[..., :m]
    if causal:
        want = want & torch.ones(n, m).tril(m - n).bool()
    assert torch.equal(layout.to_mask(), want)
    indptr, ids = layout.to_csr()
    count = blocks.sum(-1).flatten()
    assert indptr.tolist() == [0, *count.cumsum(0).tolist()]
    assert ids.tolist() == blocks.nonzero()[:, 3].tolist()
    again = Layout.from_csr(indptr, ids, shape, block_q=bq, block_k=bk, causal=causal, q_offset=offset)
    assert torch.equal(again.to_mask(), want)
    if not causal:
        assert torch.equal(layout.to_block_mask(bq, bk, q_offset=offset), blocks)


@quick
@given(layouts(), st.sampled_from([1, 3, 8]))
def test_torch_block_mask(pair, block):
    """The mask_mod is exact for every pair, the blocks hold every named pair, and the way back keeps the blocks."""
    layout, model = pair
    b, h, n, m = layout.shape
    want = model.mask()
    bm = layout.to_torch_block_mask(block)
    at = torch.meshgrid(*(torch.arange(s) for s in (b, h, n, m)), indexing="ij")
    assert torch.equal(bm.mask_mod(*at), want)
    assert torch.equal(bm.to_dense().bool(), blocks_of(want, block, block))
    back = Layout.from_torch_block_mask(bm, h, causal=False)
    assert torch.equal(back.to_block_mask(block, block), blocks_of(want, block, block))


def test_torch_block_mask_under_vmap():
    """FlexAttention maps the mask_mod over scalars."""
    from torch.nn.attention.flex_attention import create_mask

    columns = torch.tensor([[[3, 17]]])
    layout = Layout.factored((1, 2, 40, 64), diagonals=torch.tensor([[[0, 30]]]), columns=columns, block_q=8, tile_width=8)
    bm = layout.to_torch_block_mask(16)
    assert torch.equal(create_mask(bm.mask_mod, 1, 2, 40, 64, device="cpu"), layout.to_mask())


@quick
@given(layouts(kinds=("lists", "factored", "mixed", "rule", "full")))
def test_inverse(pair):
    """Per list head, key tile and single key: exactly the query blocks that read it, ascending, each once."""
    layout, model = pair
    b, h, _, m = layout.shape
    inv = layout.inverse()
    bl, hl = inv.lead
    w = layout.tile_width
    assert inv.num_tiles == -(-m // w) and len(inv.indptr) == bl * hl * inv.num_tiles + 1
    for i in range(b):
        for j in range(h):
            row = (i if bl > 1 else 0) * hl + j * hl // h
            tiles = [set().union(*model.tile_keys(i, j, blk)) for blk in range(model.num_blocks)]
            for t in range(inv.num_tiles):
                at = row * inv.num_tiles + t
                want = [blk for blk, keys in enumerate(tiles) if any(k // w == t for k in keys)]
                assert inv.ids[inv.indptr[at] : inv.indptr[at + 1]].tolist() == want
            singles = [model.single_keys(i, j, blk) for blk in range(model.num_blocks)]
            if inv.entry_indptr is None:
                assert not any(singles)
                continue
            for key in range(m):
                at = row * m + key
                want = [blk for blk, keys in enumerate(singles) if key in keys]
                assert inv.entry_ids[inv.entry_indptr[at] : inv.entry_indptr[at + 1]].tolist() == want


# ---------------------------------------------------------------------- mixing
@quick
@given(shapes(), st.data())
def test_by_head(shape, data):
    """Heads of either side keep their meaning, per batch row too; full sides and shared lists included."""
    b, h, n, m = shape
    q, w = dict(block_q=4), 5
    nq = -(-n // 4)
    _, tiles, count = data.draw(subsets((1, 1, nq), m, 3))
    sides = [
        Layout.dense(*shape),
        Layout.static(shape, sink=2, window=torch.arange(1, h + 1), block_q=64),
        Layout.static(shape, stride=2, stride_block=w),
        Layout.lists(shape, tiles=tiles, tile_count=count, tile_width=w, **q),
        Layout.factored(shape, diagonals=torch.tensor([[[m // 2]]]), columns=torch.tensor([[[0]]]), tile_width=w, **q),
    ]
    x, y = data.draw(st.permutations(sides))[:2]
    lead = data.draw(st.sampled_from([(h,), (1, h), (b, h)]))
    size = math.prod(lead)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(lead)
    mixed = Layout.by_head(mask, x, y)
    mixed.validate()
    want = torch.where(mask.view(-1, h)[..., None, None], x.to_mask(), y.to_mask())
    assert torch.equal(mixed.to_mask(), want)
    assert torch.equal(mixed.pairs(), want.sum((-1, -2)))


def test_by_head_refuses_what_does_not_fit():
    shape, mask = (1, 2, 20, 20), torch.tensor([True, False])
    tiles = torch.zeros(1, 1, 5, 1, dtype=torch.int32)
    a = Layout.lists(shape, tiles=tiles, block_q=4, tile_width=4)
    cases = [
        (Layout.lists(shape, tiles=tiles[:, :, :3], block_q=8, tile_width=4), mask, "one grid of query blocks"),
        (Layout.lists(shape, tiles=tiles, block_q=4, tile_width=2), mask, "one tile_width"),
        (Layout.static(shape, stride=2, stride_block=8), mask, "one tile_width"),
        (Layout.dense(1, 2, 20, 21), mask, "one shape"),
        (Layout.dense(1, 2, 20, 20, causal=False), mask, "causality"),
        (Layout.dense(1, 2, 20, 20, q_pos=torch.arange(20)[None]), mask, "q_pos"),
        (Layout.dense(1, 2, 20, 20), torch.tensor([True]), "mask: expected"),
    ]
    for b, m, message in cases:
        with pytest.raises(LayoutError, match=message):
            Layout.by_head(m, a, b)


# ---------------------------------------------------------------------- a million tokens
M = 1 << 20


def test_a_million_token_factored_layout_is_kilobytes_a_head():
    gen = torch.Generator().manual_seed(0)
    h = 2
    diagonals = torch.cat([torch.arange(16)[None].expand(h, -1) * 64, torch.randint(0, M, (h, 100), generator=gen)], 1)[None]
    columns = torch.randint(0, M, (1, h, 100), generator=gen)
    with Largest() as made:
        layout = Layout.factored((1, h, M, M), diagonals=diagonals, columns=columns)
    assert layout.nbytes <= h * 4096
    assert made.bytes <= h * 20 * (M + 200)
    began = time.perf_counter()
    with Largest() as made:
        density, computed = layout.density(), layout.density_computed()
        rows = torch.tensor([5, 700_001, M - 1])
        mask = layout.to_mask(rows=rows)
    assert time.perf_counter() - began < 60
    assert made.bytes <= 64 << 20
    assert 1e-4 < density <= computed < 0.05
    assert mask.shape == (1, h, 3, M)
    for i, q in enumerate(rows.tolist()):
        e = (q // 64 + 1) * 64
        keys = {e - 1 - x for d in diagonals[0, 0].tolist() for x in range(d, d + 64)} | set(columns[0, 0].tolist())
        got = set(mask[0, 0, i].nonzero()[:, 0].tolist())
        must = {k for k in keys if 0 <= k <= q}
        assert must <= got and len(got) <= 1.3 * len(must) + 64  # two neighbouring distances may share a wider run


def test_a_million_token_block_list_is_in_proportion_to_what_it_keeps():
    nb, keep = M // 1024, 10  # blocks of 1024 x 1024, one percent of them
    gen = torch.Generator().manual_seed(0)
    row = torch.arange(nb)
    blocks = (torch.randint(0, 1 << 30, (nb, keep), generator=gen) % (row[:, None] + 1)).sort(-1).values
    first = torch.nn.functional.pad(blocks[:, 1:] != blocks[:, :-1], (1, 0), value=True)
    mask = torch.zeros(nb, nb, dtype=torch.bool).scatter_(1, blocks, True)
    index = torch.stack(
        [torch.nn.functional.pad(b[f], (0, keep - int(f.sum()))) for b, f in zip(blocks, first, strict=True)]
    )
    with Largest() as made:
        layout = Layout.lists(
            (1, 32, M, M),
            tiles=(index * 1024).view(1, 1, nb, keep),
            tile_count=first.sum(-1).view(1, 1, nb),
            block_q=1024,
            tile_width=1024,
        )
        pairs = layout.pairs()
        computed = layout.density_computed((1024, 1024))
    assert layout.nbytes == 4 * nb * (keep + 1)
    assert made.bytes <= 64 << 20
    diagonal = int(mask.diagonal().sum())
    want = (int(mask.sum()) - diagonal) * 1024**2 + diagonal * (1024 * 1025 // 2)
    assert pairs.tolist() == [[want] * 32]
    assert computed == pytest.approx(int(mask.sum()) * 1024**2 / (M * (M + 1) / 2))


def test_128k_blocks_without_n_times_m():
    """A mixture of everything at 128K: block structure and density in seconds and a few megabytes at a time."""
    m, h = 1 << 17, 2
    gen = torch.Generator().manual_seed(0)
    layout = Layout.by_head(
        torch.tensor([True, False]),
        Layout.factored(
            (1, h, m, m),
            diagonals=torch.randint(0, m, (1, h, 500), generator=gen),
            columns=torch.randint(0, m, (1, h, 500), generator=gen),
        ),
        Layout.static((1, h, m, m), sink=4, window=1020, block_q=64),
    )
    began = time.perf_counter()
    with Largest() as made:
        named, computed = layout.density(), layout.density_computed((128, 128))
    assert time.perf_counter() - began < 60
    assert 0 < named < computed < 1
    assert made.bytes <= 64 << 20


# ---------------------------------------------------------------------- bad input
def _lists(**change):
    parts = dict(
        tiles=torch.tensor([0, 4, 8]).expand(1, 2, 5, 3),
        entries=torch.tensor([1, 5, 19]).expand(1, 1, 5, 3),
        block_q=4,
        tile_width=2,
    )
    return Layout.lists((2, 4, 20, 20), **(parts | change))


def _with(at: tuple[int, ...], value: int, like: tuple[int, ...] = (1, 2, 5, 3), row=(0, 4, 8)) -> torch.Tensor:
    t = torch.tensor(row).expand(like).clone()
    t[at] = value
    return t


WRONG_LISTS = {
    "out of range": (
        dict(tiles=_with((0, 1, 3, 2), 20)),
        "tiles: index 20 is outside 0 to 19 .*head 1, query block 3, slot 2",
    ),
    "negative": (dict(tiles=_with((0, 0, 4, 0), -1)), r"tiles: index -1 is outside .*head 0, query block 4, slot 0"),
    "unsorted": (dict(tiles=_with((0, 1, 2, 1), 9)), r"tiles: index 8 is not ascending .*head 1, query block 2, slot 2"),
    "duplicated": (
        dict(entries=_with((0, 0, 1, 1), 1, (1, 1, 5, 3), (1, 5, 19))),
        r"entries: index 1 is duplicated .*batch row 0, head 0, query block 1, slot 1",
    ),
    "count beyond the width": (
        dict(tile_count=torch.full((1, 2, 5), 3).index_fill(2, torch.tensor([4]), 4)),
        r"tiles: expected counts of 0 to the width 3, got 4 \(batch row 0, head 0, query block 4\)",
    ),
    "negative count": (dict(entry_count=torch.full((1, 1, 5), -1)), r"entries: expected counts .* got -1"),
    "shape of counts": (
        dict(tile_count=torch.ones(1, 2, 4)),
        r"tiles: expected counts of shape .*5\], got .*4\]",
    ),
    "blocks": (dict(tiles=torch.zeros(1, 2, 6, 1, dtype=torch.int32)), "tiles: expected 5 query blocks, got 6"),
    "heads": (dict(tiles=torch.zeros(1, 3, 5, 1, dtype=torch.int32)), "tiles: expected .*a divisor of 4"),
    "batch": (dict(tiles=torch.zeros(3, 2, 5, 1, dtype=torch.int32)), "tiles: expected .*1 or 2"),
    "dims": (dict(entries=torch.zeros(1, 2, 5, dtype=torch.int32)), "entries: expected 4 dimensions"),
    "floats": (dict(tiles=torch.zeros(1, 2, 5, 1)), "tiles: expected integers"),
    "negative window": (dict(window=-1), "window: expected a whole number >= 0, got -1"),
    "negative windows": (
        dict(window=torch.tensor([[3, -2]])),
        r"window: .* >= 0, got -2 \(batch row 0, head 1\)",
    ),
    "negative sink": (dict(sink=torch.tensor([-5])), "sink: expected numbers >= 0, got -5"),
    "block_q": (dict(block_q=0), "block_q >= 1"),
    "tile_width": (dict(tile_width=0), "tile_width >= 1"),
    "q_offset": (dict(q_offset=4), "q_offset < block_q"),
    "q_pos": (dict(q_pos=torch.arange(20)), "q_pos: expected int"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_wrong_lists(case):
    change, message = WRONG_LISTS[case]
    with pytest.raises(LayoutError, match=message):
        _lists(**change)


def test_wrong_rules_and_factors():
    shape = (1, 2, 10, 10)
    d, c = torch.tensor([[[0, 3]]]), torch.tensor([[[1, 9]]])
    for name in ("sink", "window", "stride", "phase"):
        with pytest.raises(LayoutError, match=f"{name}: expected a whole number >= 0, got -3"):
            Layout.static(shape, **{name: -3})
        with pytest.raises(LayoutError, match=rf"{name}: expected numbers >= 0, got -7 \(batch row 0, head 1\)"):
            Layout.static(shape, **{name: torch.tensor([1, -7])})
    with pytest.raises(LayoutError, match=r"window: expected a whole number >= 0, got 16\.5"):
        Layout.static(shape, window=16.5)
    for wrong in ((2, 10, 10), (1, 2, 0, 10), (1, 2, 10.0, 10)):
        with pytest.raises(LayoutError, match="shape: expected four whole numbers B, H, N, M >= 1"):
            Layout.static(wrong, window=4)
    for change, message in (
        (dict(columns=c - 2), r"columns: index -1 is outside 0 to 9 \(batch row 0, head 0, slot 0\)"),
        (dict(diagonals=d + 7), r"diagonals: index 10 is outside 0 to 9 \(batch row 0, head 0, slot 1\)"),
        (dict(diagonal_count=torch.tensor([[3]])), "diagonals: expected counts of 0 to the width 2, got 3"),
        (dict(column_count=torch.tensor([3])), "columns: expected counts of shape"),
    ):
        with pytest.raises(LayoutError, match=message):
            Layout.factored(shape, **(dict(diagonals=d, columns=c) | change))
    with pytest.raises(LayoutError, match="shape: expected four whole numbers B, H, N, M >= 1"):
        Layout.dense(1, 2, 0, 10).validate()
    with pytest.raises(LayoutError, match="rows: expected query rows 0 to 9"):
        Layout.dense(*shape).to_mask(rows=torch.tensor([10]))
    with pytest.raises(LayoutError, match="rows: expected int64"):
        Layout.dense(*shape).to_mask(rows=torch.ones(10, dtype=torch.bool))


def test_wrong_conversions():
    blocks = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    with pytest.raises(LayoutError, match=r"mask: expected \[3, 3\] blocks of 4 x 4, got \[3, 2\]"):
        Layout.from_block_mask(blocks[..., :2], 10, 10, block_q=4, block_k=4)
    with pytest.raises(LayoutError, match="mask: expected bool"):
        Layout.from_block_mask(blocks.float(), 10, 10, block_q=4, block_k=4)
    indptr, ids = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0])
    grid = dict(block_q=8, block_k=4)
    for wrong, blocks_of_rows, message in (
        (indptr[:2], ids, "indptr: expected B.H.nq . 1 = 3"),
        (torch.tensor([0, 3, 2]), ids, "indptr: expected pointers that rise"),
        (indptr, ids[:2], "indptr: expected pointers that rise"),
        (indptr, torch.tensor([1, 0, 0]), "tiles: index 0 is not ascending"),
        (indptr, torch.tensor([0, 0, 0]), "tiles: index 0 is duplicated"),
        (indptr, torch.tensor([0, 9, 0]), "tiles: index 36 is outside 0 to 15"),
    ):
        with pytest.raises(LayoutError, match=message):
            Layout.from_csr(wrong, blocks_of_rows, (1, 1, 16, 16), **grid)
    with pytest.raises(LayoutError, match="to_csr: expected a layout of tiles only, got a rule"):
        Layout.static((1, 1, 4, 4), window=2).to_csr()
    with pytest.raises(LayoutError, match="aligned to 4"):
        Layout.lists((1, 1, 8, 8), tiles=torch.tensor([[[[3]]]]), block_q=8, tile_width=4).to_csr()
    for grid in ((0, 4, None, 0), (4, 0, None, 0), (4, 4, None, 4)):
        with pytest.raises(LayoutError, match="block_q, block_k >= 1"):
            Layout.dense(1, 1, 8, 8).to_block_mask(*grid)


def test_overlapping_tiles_and_covered_entries_are_legal_in_a_users_lists():
    """The later tile owns shared keys, entries inside a tile are dropped: every key counts once."""
    layout = _lists(tiles=_with((0, 0, 0, 1), 1), tile_width=3)
    layout.validate()
    assert layout.to_mask()[0, 0, 3].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert layout.entry_count[0, :, 0].tolist() == [2, 1]  # 1 lies in [0, 3); 5 in [4, 7), which head 0 lost in block 0
    assert torch.equal(layout.pairs(), layout.to_mask().sum((-1, -2)))


def test_validate_finds_what_names_a_key_twice():
    from dataclasses import replace

    layout = _lists(tile_width=3, entries=None)
    twice = replace(
        layout, entries=torch.tensor([5, 19]).expand(1, 1, 5, 2).int(), entry_count=torch.full((1, 1, 5), 2).int()
    )
    with pytest.raises(LayoutError, match=r"an entry lies inside a tile .*\(batch row 0, head 0, query block 0, slot 0"):
        twice.validate()
    both = replace(layout, columns=torch.tensor([[[0, 1]]]).int(), column_count=torch.tensor([[2]]).int())
    with pytest.raises(LayoutError, match=r"not both \(batch row 0, head 0\)"):
        both.validate()


def test_parts():
    shape = (1, 2, 12, 12)
    near, sink = Layout.static(shape, window=4), Layout.static(shape, sink=2)
    with pytest.raises(LayoutError, match=r"part 1 names a pair .*\(batch row 0, head 0, query 0, key 0\)"):
        Parts((Part(near), Part(sink))).validate()
    tiles = Layout.lists(shape, tiles=torch.tensor([[[[8]]]]), block_q=12, tile_width=4)
    Parts([Part(sink), Part(tiles)]).validate()
    with pytest.raises(LayoutError, match=r"part 2 names a pair .*head 0, query 0, key 0"):
        Parts((Part(sink), Part(tiles), Part(near))).validate()
    k = torch.zeros(1, 1, 12, 4)
    a, b = KV.dense(k, k), KV.dense(k, k)
    Parts((Part(near, kv=a), Part(near, kv=b))).validate()  # other keys
    with pytest.raises(LayoutError, match="names a pair"):
        Parts((Part(near, kv=a), Part(sink, kv=a))).validate()
    gate = torch.ones(1, 2, 12)
    Parts((Part(near, gate=gate), Part(sink, gate=gate)), combine="gated").validate()
    with pytest.raises(LayoutError, match="a gate on every part, part 1 has none"):
        Parts((Part(near, gate=gate), Part(sink)), combine="gated")
    with pytest.raises(LayoutError, match="'lse' or 'gated', got 'sum'"):
        Parts((Part(near),), combine="sum")
    with pytest.raises(LayoutError, match="at least one"):
        Parts(())
    with pytest.raises(LayoutError, match=r"\[B, H, N\] = \[1, 2, 12\] in part 1, got \[1, 2, 11\]"):
        Parts((Part(near), Part(Layout.dense(1, 2, 11, 12))))
    with pytest.raises(LayoutError, match="part 1 over the same view, got 13"):
        Parts((Part(near), Part(Layout.dense(1, 2, 12, 13)))).validate()
    with pytest.raises(LayoutError, match="tiles: index"):
        wrong = Layout((1, 2, 12, 12), block_q=12, tiles=torch.tensor([[[[12]]]]), tile_count=torch.ones(1, 1, 1).int())
        Parts((Part(wrong),)).validate()
    assert issubclass(LayoutError, FoveateError) and issubclass(FoveateError, ValueError)


def test_the_model_itself():
    """A case small enough to check by eye: block 1 holds rows 1 and 2, ends before position 4 and reads key 0, and
    distance 1 with its rows: keys 1 and 2."""
    layout = Layout.factored(
        (1, 1, 3, 4), diagonals=torch.tensor([[[1]]]), columns=torch.tensor([[[0]]]), block_q=2, tile_width=2, q_offset=1
    )
    from tests.layout_model import Head

    model = Model((1, 1, 3, 4), [[Head(diagonals=[1], columns=[0])]], block_q=2, q_offset=1, width=2)
    want = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]).bool()
    assert torch.equal(model.mask()[0, 0], want) and torch.equal(layout.to_mask()[0, 0], want)
