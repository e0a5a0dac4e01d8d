"""Lists that serve several tiles of rows, chunks that begin at a later one, tiles of 32 keys: Gluon forward against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate import attend
from foveate.bench import workloads
from foveate.kernels import gluon
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from tests.gpu.test_gluon import DEVICE, HOPPER, check, inputs, poisoned, watchdog  # noqa: F401
from tests.gpu.test_gluon_columns import check_blocks, listed, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
HEADS = [(4, 4), (4, 2), (8, 2), (8, 1)]
SHAPES = [(512, 512), (777, 777), (300, 1111), (500, 200)]


def tiles_of(layout):
    return replace(layout, entries=None, entry_count=None)


def keys_of(layout):
    return replace(layout, tiles=None, tile_count=None, tile_width=1)


def narrow(*args, **more):
    """Lists of tiles of 32 keys."""
    return tiles_of(listed(*args, width=32, **more))


# ---------------------------------------------------------------------- groups of rows
def test_smallest():
    tiles = torch.tensor([[[[0, 128]]]], device=DEVICE, dtype=torch.int32)
    check(Layout.lists((1, 1, 256, 256), block_q=256, tile_width=128, tiles=tiles), 1, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rows", [384, 2048])
@pytest.mark.parametrize("h,g", HEADS)
@pytest.mark.parametrize("n,m", SHAPES)
def test_groups(d, rows, h, g, n, m):
    for causal in (True, False) if d == 64 else (True,):  # every variant takes seconds to compile
        for hl, width, columns in ((h, 128, 300), (g, 64, 40), (1, 128, 128)):
            layout = listed(2, h, hl, n, m, rows=rows, width=width, causal=causal, columns=columns, seed=n + hl)
            check(layout, g, d)
            check(tiles_of(layout), g, d)
            check(keys_of(layout), g, d)


def test_groups_fp16():
    check(listed(1, 4, 4, 700, 700, rows=256), 2, 64, torch.float16)


@pytest.mark.parametrize("n,d", [(16384 + 77, 128), (16384, 64)])
def test_groups_long(n, d):
    made = workloads.tiles_and_columns(4, n, tiles=60, columns=3000, block=2048, device=DEVICE)
    check_blocks(made, 2, d)


@pytest.mark.parametrize("offset", [0, 384])
def test_groups_bit_equal_whatever_the_grid(offset):
    same_bits(listed(2, 8, 2, 2000, 2000, rows=512, width=128, columns=500, offset=offset))


def test_keys_that_a_group_does_not_name_do_not_matter():
    """NaN in every key outside listed tiles and columns, the rows of the buffer behind M included."""
    h, n, m, d = 4, 700, 900, 128
    layout = listed(1, h, h, n, m, rows=384, columns=100, share=0.2, seed=4)
    unseen(layout, layout.to_mask().any(2), 64, n, m, d)


def unseen(layout, touched, width, n, m, d):
    """The result does not change when keys of no listed tile (read whole), that are `touched` by no row, are NaN."""
    h = layout.shape[1]
    q, k, v = inputs(1, h, h, n, m, d)
    clean = poisoned(q, k, v, layout)
    for start in range(0, m, width):
        touched[:, :, start : start + width] |= (layout.tiles == start).flatten(2).any(-1)[..., None]
    assert bool((~touched).any())
    store = [torch.full((1, h, m + 128, d), float("nan"), device=DEVICE, dtype=q.dtype) for _ in range(2)]
    for s, t in zip(store, (k, v), strict=True):
        s[:, :, :m] = t.masked_fill(~touched[..., None], float("nan"))
    dirty = poisoned(q, *(s[:, :, :m] for s in store), layout)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


# ---------------------------------------------------------------------- chunks that begin at a later tile of a query block
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rows,offset", [(256, 128), (384, 256), (2048, 1152)])
def test_chunks(d, rows, offset):
    for n, m in ((300, 1000), (1, 600), (513, 513)):
        for width in (64, 128, 32):
            layout = listed(2, 8, 2, n, m, rows=rows, width=width, columns=200, offset=offset, seed=n)
            for one in (tiles_of(layout), *((layout, keys_of(layout)) if width > 32 else ())):
                assert one.q_offset == offset
                check(one, 2, d)


def test_a_chunk_inside_a_tile_is_refused():
    """TMA cannot store a part of a tile's rows: stores that began before row 0 were illegal instructions."""
    q, k, v = inputs(1, 4, 2, 200, 500, 64)
    for rows, offset in ((128, 1), (128, 127), (256, 200)):
        layout = listed(1, 4, 4, 200, 500, rows=rows, offset=offset)
        assert f"multiple of 128, not {offset}" in str(gluon.supports(q, KV.dense(k, v), layout, Want()))
        out, lse = attend(q, (k, v), layout, return_lse=True)  # another backend's
        assert bool(torch.isfinite(out).all())
    assert gluon.supports(q, KV.dense(k, v), listed(1, 4, 4, 200, 500, rows=256, offset=128), Want()) is None


def test_a_chunk_writes_nothing_but_its_rows():
    """The rows of every head before and after those of the chunk stay as they are."""
    from foveate.kernels.gluon import launch, prepare

    q, k, v = inputs(1, 4, 2, 200, 500, 64)
    layout = listed(1, 4, 4, 200, 500, rows=256, offset=128, holes=False)
    store = torch.full((1, 4, 400, 64), 7.0, device=DEVICE, dtype=q.dtype)
    out, lse = store[:, :, 100:300], torch.full((1, 4, 200), 7.0, device=DEVICE)
    args, options = launch.arguments(q, k, v, out, lse, layout, prepare.prepare(layout, q.device), 0.125)
    launch.attend_kernel[(4,)](*args, **options)
    want = poisoned(q, k, v, layout)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert bool((store[:, :, :100] == 7).all()) and bool((store[:, :, 300:] == 7).all())


# ---------------------------------------------------------------------- tiles of 32 keys
def test_smallest_narrow():
    for tiles in ([0], [0, 32], [0, 32, 64], [0, 32, 64, 96], [0, 64, 96, 128, 160]):
        index = torch.tensor([[[tiles]]], device=DEVICE, dtype=torch.int32)
        check(Layout.lists((1, 1, 128, 192), block_q=128, tile_width=32, tiles=index), 1, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("h,g", HEADS)
@pytest.mark.parametrize("n,m", [*SHAPES, (70, 600)])
def test_tiles_of_32(d, h, g, n, m):
    for causal in (True, False) if d == 64 else (True,):
        for hl, rows in ((h, 128), (g, 128), (1, 256), *(((g, 64), (1, 64)) if h // g % 2 == 0 else ())):
            check(narrow(2, h, hl, n, m, rows=rows, causal=causal, share=0.4, seed=n + hl), g, d)


@pytest.mark.parametrize("d", [64, 128])
def test_any_number_of_tiles_wherever_they_begin(d):
    """Lists of 0 to 15 tiles that overlap or are named twice."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    tiles = torch.randint(0, 60, (1, 16, 2, 15), generator=gen, device=DEVICE).cumsum(-1).int()
    tiles[..., 1], tiles[..., 7] = tiles[..., 0], tiles[..., 6]
    count = torch.arange(16, device=DEVICE, dtype=torch.int32).view(1, 16, 1).expand(1, 16, 2).contiguous()
    shape = (1, 16, 200, 920)
    check(Layout.lists(shape, block_q=128, tile_width=32, tiles=tiles, tile_count=count, validate=False), 4, d)


@pytest.mark.parametrize("n,d,rows", [(16384 + 77, 128, 128), (16384, 64, 64)])
def test_narrow_long(n, d, rows):
    made = workloads.random_blocks(2, n, density=0.1, block_q=rows, block_k=32, device=DEVICE)
    check_blocks(replace(made, shape=(1, 4, n, n)), 2, d)


@pytest.mark.parametrize("rows", [128, 64])
def test_narrow_bit_equal_whatever_the_grid(rows):
    same_bits(narrow(2, 8, 2, 2000, 2000, rows=rows))


def test_keys_that_no_narrow_tile_names_do_not_matter():
    layout = narrow(1, 4, 4, 400, 900, share=0.1, seed=4)
    unseen(layout, torch.zeros(1, 4, 900, dtype=torch.bool, device=DEVICE), 32, 400, 900, 128)


def test_cuda_graph():
    for layout in (narrow(1, 4, 4, 1000, 1000), listed(1, 4, 4, 1000, 1000, rows=512, offset=256)):
        q, k, v = inputs(1, 4, 2, 1000, 1000, 128)
        attend(q, (k, v), layout, backend="gluon")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, (k, v), layout, backend="gluon")
        for t, new in zip((q, k, v), inputs(1, 4, 2, 1000, 1000, 128, seed=1), strict=True):
            t.copy_(new)
        graph.replay()
        assert torch.equal(out, attend(q, (k, v), layout, backend="gluon"))


# ---------------------------------------------------------------------- what methods plan
@pytest.mark.parametrize("recipe", ["anchor", "anchor group", "sale group", "sale 128"])
def test_what_methods_plan(recipe):
    from foveate.methods.anchor_attention import AnchorAttention
    from foveate.methods.base import AttnInput, State
    from foveate.methods.sale import SALE

    method = {
        "anchor": AnchorAttention(theta=2.0, step=4),
        "anchor group": AnchorAttention(theta=2.0, step=4, share="group"),
        "sale group": SALE(tau=0.01, share="group"),
        "sale 128": SALE(tau=0.01, block_q=128),
    }[recipe]
    for start, n in ((0, 5000), (3328, 1672)):
        q, k, v = inputs(1, 8, 2, n, 5000, 128)
        layout = method.plan(AttnInput(q, KV.dense(k, v), "prefill", 0, 1, 128**-0.5, start=start), State())
        assert layout is not None and layout.q_offset == start % layout.block_q
        assert gluon.supports(q, KV.dense(k, v), layout, Want()) is None
        check_blocks(layout, 2, 128)
