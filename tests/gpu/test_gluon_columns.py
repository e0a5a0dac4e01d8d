"""Tiles with single keys, rules, 64-row blocks and factored layouts in the Gluon forward, on a Hopper GPU, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate import attend
from foveate.bench import workloads
from foveate.kernels import gluon, reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from tests.gpu.test_gluon import DEVICE, HOPPER, assert_close, check, inputs, poisoned, watchdog  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]


def listed(b, h, hl, n, m, *, rows=128, width=64, causal=True, share=0.3, columns=200, seed=0, holes=True,
           offset=0):  # fmt: skip
    """Random tiles and single keys per query block, the keys drawn where tiles lie too (`Layout.lists` drops those).

    `holes`: some lists are empty, some have no tiles, some no columns. Unused slots hold junk.
    """
    gen = torch.Generator(DEVICE).manual_seed(seed)
    nq = -(-(n + offset) // rows)
    mask = torch.rand(b, hl, nq, -(-m // width), generator=gen, device=DEVICE) < share
    picked = torch.rand(b, hl, nq, m, generator=gen, device=DEVICE) < columns / m
    if holes:
        mask[:, ::2, 0], picked[:, ::2, 0] = False, False
        mask[..., -1, :] &= torch.rand(b, hl, 1, generator=gen, device=DEVICE) < 0.5
        picked[:, -1, -1] = False
    grid = dict(block_q=rows, heads=h, causal=causal, q_offset=offset)
    tiles = Layout.from_block_mask(mask, n, m, block_k=width, **grid)
    keys = Layout.from_block_mask(picked, n, m, block_k=1, **grid)
    layout = Layout.lists(
        (b, h, n, m), block_q=rows, tile_width=width, tiles=tiles.tiles, tile_count=tiles.tile_count, entries=keys.tiles,
        entry_count=keys.tile_count, causal=causal, q_offset=offset,
    )  # fmt: skip
    for index, count in ((layout.tiles, layout.tile_count), (layout.entries, layout.entry_count)):
        index.masked_fill_(torch.arange(index.shape[-1], device=DEVICE) >= count[..., None], 1 << 28)
    return layout


def check_blocks(layout, g, d, blocks=12):
    """Sampled query blocks of sampled heads against fp64, for problems whose scores do not fit."""
    b, h, n, m = layout.shape
    q, k, v = inputs(b, h, g, n, m, d)
    out, lse = poisoned(q, k, v, layout)
    assert bool(torch.isfinite(out).all())
    gen = torch.Generator().manual_seed(1)
    rows = min(layout.block_q, 128)
    many = -(-n // rows)
    for i in range(blocks):
        head = int(torch.randint(h, (1,), generator=gen)) if i else h - 1
        block = int(torch.randint(many, (1,), generator=gen)) if i else many - 1
        at = torch.arange(block * rows, min(n, (block + 1) * rows), device=DEVICE)
        seen = layout.to_mask(rows=at)[0, head] if h * m * rows < 1 << 31 else one_head(layout, head).to_mask(rows=at)[0, 0]
        kk, vv = (t[0, head * g // h].double() for t in (k, v))
        s = (q[0, head, at].double() @ kk.T / math.sqrt(d)).masked_fill(~seen, float("-inf"))
        want_lse = torch.logsumexp(s, -1)
        want = torch.softmax(s, -1).nan_to_num() @ vv
        assert_close(out[0, head, at], lse[0, head, at], want, want_lse, torch.bfloat16)


def one_head(layout, head):
    def cut(t):
        return None if t is None else t[:, head * t.shape[1] // layout.shape[1]][:, None]

    b, _, n, m = layout.shape
    names = ("tiles", "tile_count", "entries", "entry_count", "diagonals", "diagonal_count", "columns", "column_count",
             "sink", "window")  # fmt: skip
    return replace(layout, shape=(b, 1, n, m), **{name: cut(getattr(layout, name)) for name in names})


# ---------------------------------------------------------------------- tiles with columns
def test_smallest():
    entries = torch.arange(0, 128, 2, device=DEVICE, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    check(Layout.lists((1, 1, 128, 128), block_q=128, entries=entries), 1, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("h,g", [(4, 4), (4, 2), (8, 2), (8, 1)])
@pytest.mark.parametrize("n,m", [(512, 512), (777, 777), (300, 1111), (500, 200)])
def test_tiles_and_columns(d, width, h, g, n, m):
    for causal in (True, False):
        for hl, columns in ((h, 40), (g, 400), (1, 128)):
            check(listed(2, h, hl, n, m, width=width, causal=causal, columns=columns, seed=n + hl), g, d)


def test_columns_alone():
    for d in (64, 128):
        layout = listed(1, 4, 4, 600, 1500, columns=700)
        check(replace(layout, tiles=None, tile_count=None, tile_width=1), 2, d)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 256, 257])
def test_whole_and_broken_steps(count):
    gen = torch.Generator(DEVICE).manual_seed(count)
    keys = torch.rand(1, 2, 3, 900, generator=gen, device=DEVICE).topk(count, -1).indices.sort(-1).values
    check(Layout.lists((1, 2, 384, 1284), block_q=128, entries=keys), 1, 128)


def test_fp16():
    check(listed(1, 4, 4, 700, 700), 2, 64, torch.float16)


@pytest.mark.parametrize("n,d", [(16384 + 77, 128), (16384, 64)])
def test_long(n, d):
    check_blocks(workloads.tiles_and_columns(4, n, block=128, device=DEVICE), 2, d)


def test_dropped_duplicates_count_once():
    """Every key that a tile holds is named as an entry too: the result is that of the tiles."""
    mask = torch.rand(1, 4, 4, 8, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)) < 0.6
    tiles = Layout.from_block_mask(mask, 512, 512, block_q=128, block_k=64)
    keys = Layout.from_block_mask(mask.repeat_interleave(64, -1), 512, 512, block_q=128, block_k=1)
    both = Layout.lists(
        (1, 4, 512, 512), block_q=128, tile_width=64, tiles=tiles.tiles, tile_count=tiles.tile_count, entries=keys.tiles,
        entry_count=keys.tile_count,
    )  # fmt: skip
    assert int(both.entry_count.sum()) == 0
    check(both, 2, 128)
    q, k, v = inputs(1, 4, 2, 512, 512, 128)
    torch.testing.assert_close(poisoned(q, k, v, both)[0], poisoned(q, k, v, tiles)[0], atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("rows", [128, 64])
def test_bit_equal_whatever_the_grid(rows):
    same_bits(listed(2, 8, 2, 2000, 2000, rows=rows, columns=500))


def same_bits(layout):
    """Equal bits at repeated runs and on grids of other sizes."""
    q, k, v = inputs(*layout.shape[:2], 2, *layout.shape[2:], 128)
    first = poisoned(q, k, v, layout)
    for grid in (None, None, None, None, 1, 7, 64):
        again = poisoned(q, k, v, layout, grid=grid)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_keys_that_nothing_names_do_not_matter():
    """NaN in every key outside listed tiles and columns, the rows of the buffer behind M included."""
    b, h, g, n, m, d = 1, 4, 4, 400, 900, 128
    layout = listed(b, h, h, n, m, columns=100, share=0.2, seed=4)
    q, k, v = inputs(b, h, g, n, m, d)
    clean = poisoned(q, k, v, layout)
    touched = layout.to_mask().any(2)
    for start in range(0, m, 64):  # tiles are read whole
        touched[:, :, start : start + 64] |= (layout.tiles == start).flatten(2).any(-1)[..., None]
    assert bool((~touched).any()) and bool((layout.tile_count == 0).any())
    store = [torch.full((b, g, m + 128, d), float("nan"), device=DEVICE, dtype=q.dtype) for _ in range(2)]
    for s, t in zip(store, (k, v), strict=True):
        s[:, :, :m] = t.masked_fill(~touched[..., None], float("nan"))
    dirty = poisoned(q, *(s[:, :, :m] for s in store), layout)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_strided_keys():
    layout = listed(2, 4, 4, 500, 500)
    q, k, v = inputs(2, 4, 2, 500, 500, 64)
    want = attend(q, (k, v), layout, backend="gluon")
    rows_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    wide = [torch.nn.functional.pad(t, (0, 8))[..., :64] for t in (q, k, v)]  # rows of 72: a multiple of 8, not of 16
    odd = [torch.nn.functional.pad(t, (0, 3))[..., :64] for t in (q, k, v)]
    for a, b, c in (rows_first, wide, odd):
        assert torch.equal(attend(a, (b, c), layout, backend="gluon"), want)


def test_cuda_graph():
    layout = listed(1, 4, 4, 1000, 1000)
    q, k, v = inputs(1, 4, 2, 1000, 1000, 128)
    attend(q, (k, v), layout, backend="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, (k, v), layout, backend="gluon")
    for t, new in zip((q, k, v), inputs(1, 4, 2, 1000, 1000, 128, seed=1), strict=True):
        t.copy_(new)
    graph.replay()
    assert torch.equal(out, attend(q, (k, v), layout, backend="gluon"))


# ---------------------------------------------------------------------- blocks of 64 rows, two heads a tile
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("h,g,hl", [(4, 2, 2), (8, 1, 1), (8, 1, 4), (4, 1, 1)])
@pytest.mark.parametrize("n,m", [(512, 512), (333, 333), (70, 600), (300, 100)])
def test_rows_of_64(d, h, g, hl, n, m):
    for causal in (True, False):
        layout = listed(2, h, hl, n, m, rows=64, causal=causal, columns=150, seed=n)
        check(layout, g, d)
        check(replace(layout, entries=None, entry_count=None), g, d)


def test_rows_of_64_long():
    layout = workloads.tiles_and_columns(2, 8192 + 5, block=64, tiles=40, columns=300, device=DEVICE)
    check_blocks(replace(layout, shape=(1, 8, *layout.shape[2:])), 2, 128)


# ---------------------------------------------------------------------- rules
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("n,m", [(700, 700), (200, 1513), (300, 170), (1024, 1024)])
def test_rules(d, n, m):
    for sink, window in ((4, 64), (0, 200), (130, 1), (300, 128), (5, 0), (0, 0), (1, 1 << 30), (2000, 7), (64, 512)):
        check(Layout.static((2, 4, n, m), sink=sink, window=window, device=DEVICE), 2, d)


def test_rules_per_head_and_row():
    sink = torch.tensor([[0, 200], [3, 1]], device=DEVICE)
    window = torch.tensor([[300, 20, 0, 128]], device=DEVICE)
    check(Layout.static((2, 4, 900, 1640), sink=sink, window=window, device=DEVICE), 2, 128)


def test_rules_long_and_bit_equal():
    layout = Layout.static((1, 8, 16384 + 77, 16384 + 77), sink=64, window=2048, device=DEVICE)
    check_blocks(layout, 2, 128)
    q, k, v = inputs(1, 8, 2, 16384 + 77, 16384 + 77, 128)
    first = poisoned(q, k, v, layout)
    for grid in (None, 1 << 4):
        assert torch.equal(first[0], poisoned(q, k, v, layout, grid=grid)[0])


def test_chosen_by_auto():
    q, k, v = inputs(1, 4, 2, 256, 256, 64)
    for layout in (listed(1, 4, 4, 256, 256), Layout.static((1, 4, 256, 256), sink=4, window=64, device=DEVICE)):
        assert gluon.supports(q, KV.dense(k, v), layout, Want()) is None
        out = attend(q, (k, v), layout)
        view = KV.dense(k.double(), v.double())
        want, _, _ = reference.forward(q.double(), view, layout, scale=1 / 8, softcap=0.0, want=Want())
        assert float((out.double() - want).norm()) <= 4e-3 * float(want.norm())


# ---------------------------------------------------------------------- diagonals + columns shared by all rows of a head
def factored(b, h, hl, n, m, *, rows=64, distances=12, columns=60, seed=0, holes=True):
    """Random distances, 0 in every other list, and columns drawn anywhere. `holes`: one list has no distances, some no
    columns. Unused slots hold junk."""
    gen = torch.Generator(DEVICE).manual_seed(seed)
    d = torch.rand(b, hl, m, generator=gen, device=DEVICE).topk(distances, -1).indices
    d[:, ::2, 0] = 0
    c = torch.rand(b, hl, m, generator=gen, device=DEVICE).topk(columns, -1).indices
    many, few = (torch.full((b, hl), x, dtype=torch.int32, device=DEVICE) for x in (distances, columns))
    if holes and hl > 1:
        many[-1, 0], few[:, -1] = 0, 0
    layout = Layout.factored((b, h, n, m), diagonals=d, diagonal_count=many, columns=c, column_count=few, block_q=rows)
    for index, count in ((layout.diagonals, layout.diagonal_count), (layout.columns, layout.column_count)):
        index.masked_fill_(torch.arange(index.shape[-1], device=DEVICE) >= count[..., None], 1 << 28)
    return layout


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("h,g", [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("n,m", [(512, 512), (777, 777), (300, 1111), (500, 200), (1024, 4096)])
def test_diagonals_and_columns(d, rows, h, g, n, m):
    for hl, distances, columns in ((h, 3, 150), (g, 20, 40), (1, 60, 128)):
        check(factored(2, h, hl, n, m, rows=rows, distances=distances, columns=columns, seed=n + hl), g, d)


@pytest.mark.parametrize("rows", [64, 128])
def test_parts_of_a_factored_layout_alone(rows):
    both = factored(1, 4, 4, 600, 900, rows=rows, holes=False)
    check(replace(both, columns=None, column_count=None), 2, 128)
    check(replace(both, diagonals=None, diagonal_count=None), 2, 128)
    check(replace(both, columns=both.columns[:, :1], column_count=both.column_count[:, :1]), 2, 64)


@pytest.mark.parametrize("rows", [64, 128])
def test_all_distances_are_dense(rows):
    every = torch.arange(0, 1024, 64, device=DEVICE).expand(1, 4, -1)
    layout = Layout.factored((1, 4, 1000, 1000), diagonals=every, columns=every[..., :5] + 7, block_q=rows)
    q, k, v = inputs(1, 4, 2, 1000, 1000, 128)
    dense, dense_lse = poisoned(q, k, v, Layout.dense(1, 4, 1000, 1000))
    out, lse = poisoned(q, k, v, layout)
    torch.testing.assert_close(out, dense, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(lse, dense_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("n,d,distances", [(16384 + 77, 128, 6000), (16384, 64, 300), (16384 - 70, 128, 60)])
def test_factored_long(rows, n, d, distances):
    check_blocks(factored(1, 4, 4, n, n, rows=rows, distances=distances, columns=1500, holes=False), 2, d)


@pytest.mark.parametrize("rows", [64, 128])
def test_factored_bit_equal_whatever_the_grid(rows):
    same_bits(factored(2, 8, 8, 2000, 2000, rows=rows, distances=30, columns=500))


def test_keys_that_no_block_names_do_not_matter():
    """NaN in every key outside diagonals and columns, the rows of the buffer behind M included."""
    b, h, g, n, m, d = 1, 4, 4, 384, 900, 128
    layout = factored(b, h, h, n, m, distances=4, columns=30, seed=4)
    q, k, v = inputs(b, h, g, n, m, d)
    clean = poisoned(q, k, v, layout)
    named = replace(layout, causal=False).to_mask().any(2)  # a tile is read whole, also by rows before its last keys
    assert bool((~named).any())
    store = [torch.full((b, g, m + 128, d), float("nan"), device=DEVICE, dtype=q.dtype) for _ in range(2)]
    for s, t in zip(store, (k, v), strict=True):
        s[:, :, :m] = t.masked_fill(~named[..., None], float("nan"))
    dirty = poisoned(q, *(s[:, :, :m] for s in store), layout)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_factored_cuda_graph():
    layout = factored(1, 4, 4, 1000, 1000)
    q, k, v = inputs(1, 4, 2, 1000, 1000, 128)
    attend(q, (k, v), layout, backend="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, (k, v), layout, backend="gluon")
    for t, new in zip((q, k, v), inputs(1, 4, 2, 1000, 1000, 128, seed=1), strict=True):
        t.copy_(new)
    graph.replay()
    assert torch.equal(out, attend(q, (k, v), layout, backend="gluon"))


@pytest.mark.parametrize("share", ["head", "group"])
def test_what_minference_plans(share):
    from foveate.methods.base import AttnInput, State
    from foveate.methods.minference import MInference

    q, k, v = inputs(1, 8, 2, 5000, 5000, 128)
    method = MInference(columns=200, diagonals=300, share=share)
    layout = method.plan(AttnInput(q, KV.dense(k, v), "prefill", 0, 1, 128**-0.5), State())
    assert layout.diagonals is not None and gluon.supports(q, KV.dense(k, v), layout, Want()) is None
    check_blocks(layout, 2, 128)
