"""The Gluon kernel of private 64-row lists on a Hopper GPU, against the oracle in fp64. A hang ends the process."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import attend
from foveate.bench import workloads
from foveate.kernels import gluon, reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from tests.gpu.test_gluon import DEVICE, HOPPER, assert_close, inputs, watchdog  # noqa: F401
from tests.gpu.test_gluon_columns import listed, one_head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]


def lists(b, h, hl, n, m, **more):
    """Tiles per 64-row block, with single keys unless `columns=0`; unused slots hold junk, some lists nothing."""
    layout = listed(b, h, hl, n, m, rows=64, **more)
    if more.get("columns", 1):
        return layout
    return Layout.lists(
        layout.shape, block_q=64, tile_width=layout.tile_width, tiles=layout.tiles, tile_count=layout.tile_count,
        causal=layout.causal, q_offset=layout.q_offset, validate=False,
    )  # fmt: skip


def poisoned(q, k, v, layout, scale=None, grid=None):
    """The kernel on outputs full of NaN, so that an element nobody writes shows."""
    from foveate.kernels.gluon import private

    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"), device=DEVICE)
    work = private.prepare(layout, q.device)
    args, options = private.arguments(q, k, v, out, lse, layout, work, scale or 1 / math.sqrt(q.shape[-1]))
    most = grid or torch.cuda.get_device_properties(q.device).multi_processor_count
    built = private.private_kernel[(min(private.grid(q, layout), most),)](*args, **options)
    assert built.n_spills == 0
    torch.cuda.synchronize()
    return out, lse


def check(layout, g, d, dtype=torch.bfloat16, seed=0):
    b, h, n, m = layout.shape
    q, k, v = inputs(b, h, g, n, m, d, dtype, seed)
    out, lse = poisoned(q, k, v, layout)
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=1 / math.sqrt(d), softcap=0.0, want=Want(lse=True))
    assert_close(out, lse, want, want_lse, dtype)


def narrow(*args, **more):
    """Tiles of 32 keys per 64-row block."""
    return lists(*args, columns=0, width=32, **more)


# ---------------------------------------------------------------------- small: every row against the oracle
def test_smallest():
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE)
    check(Layout.from_block_mask(mask, 64, 64, block_q=64, block_k=64), 1, 128)


def test_smallest_with_columns():
    entries = torch.arange(0, 64, 2, device=DEVICE, dtype=torch.int32).expand(1, 1, 1, -1).contiguous()
    check(Layout.lists((1, 1, 64, 64), block_q=64, entries=entries), 1, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("h,g", [(4, 4), (8, 2), (8, 1), (3, 1)])
@pytest.mark.parametrize("n,m", [(1, 1), (64, 64), (130, 130), (777, 777), (300, 1111), (300, 200)])
@pytest.mark.parametrize("columns", [0, 150])
def test_lists(d, h, g, n, m, columns):
    for causal in (True, False):
        for seed, hl in enumerate((h, g)):
            check(lists(2, h, hl, n, m, causal=causal, columns=columns, seed=n + hl), g, d, seed=seed)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.03])
@pytest.mark.parametrize("columns", [0, 5, 700])
def test_densities(share, columns):
    for holes in (True, False):
        check(lists(1, 8, 8, 1500, 1500, share=share, columns=columns, holes=holes, seed=3), 2, 128)


@pytest.mark.parametrize("columns", [0, 100])
def test_dtypes(columns):
    for dtype in (torch.bfloat16, torch.float16):
        check(lists(1, 4, 4, 700, 700, share=0.5, columns=columns), 2, 64, dtype)


@pytest.mark.parametrize("offset", [1, 37, 63])
@pytest.mark.parametrize("columns", [0, 100])
def test_chunk_that_begins_inside_a_block(offset, columns):
    for n, m in ((20, 500), (200, 900), (128, 128 + offset)):
        check(lists(2, 4, 4, n, m, share=0.5, columns=columns, offset=offset, seed=offset), 2, 128)


def test_one_list_for_the_batch():
    one = lists(1, 6, 6, 600, 600, share=0.5, columns=80)
    check(
        Layout.lists(
            (3, 6, 600, 600), block_q=64, tile_width=64, tiles=one.tiles, tile_count=one.tile_count, entries=one.entries,
            entry_count=one.entry_count, validate=False,
        ), 2, 64,
    )  # fmt: skip


def test_unaligned_overlapping_tiles():
    tiles = torch.tensor([[[[0, 20, 64, 90, 300], [3, 64, 128, 250, 310], [7, 8, 1 << 20, 1, 1]]]], device=DEVICE)
    count = torch.tensor([[[5, 5, 2]]], device=DEVICE)
    check(Layout.lists((1, 1, 150, 350), block_q=64, tile_width=64, tiles=tiles, tile_count=count), 1, 128)


def test_columns_alone_and_nothing():
    check(lists(1, 4, 4, 500, 500, share=0.0, columns=200), 2, 128)
    check(lists(1, 4, 4, 500, 500, share=0.0, columns=0), 2, 128)


def test_one_row_of_blocks_owns_everything():
    mask = torch.zeros(1, 4, 32, 32, dtype=torch.bool, device=DEVICE)
    mask[:, :, 31] = True
    mask[:, :, :, 0] = True
    check(Layout.from_block_mask(mask, 2048, 2048, block_q=64, block_k=64), 2, 128)


# ---------------------------------------------------------------------- tiles of 32 keys
def test_smallest_narrow():
    for tiles in ([0], [32], [0, 32], [0, 32, 64], [0, 64, 96], [0, 32, 64, 96]):
        index = torch.tensor([[[tiles]]], device=DEVICE, dtype=torch.int32)
        check(Layout.lists((1, 1, 64, 128), block_q=64, tile_width=32, tiles=index), 1, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("h,g", [(4, 4), (8, 2), (3, 1)])
@pytest.mark.parametrize("n,m", [(1, 1), (64, 64), (130, 130), (777, 777), (300, 1111), (300, 200)])
def test_tiles_of_32(d, h, g, n, m):
    for causal in (True, False):
        for seed, hl in enumerate((h, g)):
            for share in (0.4, 0.05):
                check(narrow(2, h, hl, n, m, causal=causal, share=share, seed=n + hl), g, d, seed=seed)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.03])
def test_narrow_densities(share):
    for holes in (True, False):
        check(narrow(1, 8, 8, 1500, 1500, share=share, holes=holes, seed=3), 2, 128)
    check(narrow(1, 4, 4, 700, 700, share=share), 2, 64, torch.float16)


@pytest.mark.parametrize("d", [64, 128])
def test_any_number_of_tiles_wherever_they_begin(d):
    """Lists of 0 to 15 tiles that overlap or are named twice."""
    gen = torch.Generator(DEVICE).manual_seed(0)
    tiles = torch.randint(0, 60, (1, 16, 4, 15), generator=gen, device=DEVICE).cumsum(-1).int()
    tiles[..., 1], tiles[..., 7] = tiles[..., 0], tiles[..., 6]
    count = torch.arange(16, device=DEVICE, dtype=torch.int32).view(1, 16, 1).expand(1, 16, 4).contiguous()
    shape = (1, 16, 200, 920)
    check(Layout.lists(shape, block_q=64, tile_width=32, tiles=tiles, tile_count=count, validate=False), 4, d)


@pytest.mark.parametrize("offset", [1, 37, 63])
def test_narrow_chunk_that_begins_inside_a_block(offset):
    for n, m in ((20, 500), (200, 900), (128, 128 + offset)):
        check(narrow(2, 4, 4, n, m, share=0.5, offset=offset, seed=offset), 2, 128)


def test_keys_that_no_narrow_tile_names_do_not_matter():
    """NaN in every key outside listed tiles, the rows of the buffer behind M included."""
    h, n, m, d = 4, 400, 900, 128
    layout = narrow(1, h, h, n, m, share=0.1, seed=4)
    named = torch.zeros(1, h, m, dtype=torch.bool, device=DEVICE)
    for start in range(0, m, 32):
        named[:, :, start : start + 32] |= (layout.tiles == start).flatten(2).any(-1)[..., None]
    assert bool((~named).any())
    q, k, v = inputs(1, h, h, n, m, d)
    store = [torch.full((1, h, m + 128, d), float("nan"), device=DEVICE, dtype=q.dtype) for _ in range(2)]
    for s, t in zip(store, (k, v), strict=True):
        s[:, :, :m] = t.masked_fill(~named[..., None], float("nan"))
    clean, dirty = poisoned(q, k, v, layout), poisoned(q, *(s[:, :, :m] for s in store), layout)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("options", [{}, {"share": "group"}])
@pytest.mark.parametrize("start,n", [(0, 2500), (1300, 1200)])
def test_what_sale_plans(options, start, n):
    """Lists of each head as they are by default, of a group as they run where a chunk begins inside a block."""
    from foveate.methods.base import AttnInput, State
    from foveate.methods.sale import SALE

    q, k, v = inputs(1, 8, 2, n, 2500, 128)
    view = KV.dense(k, v)
    layout = SALE(tau=0.01, **options).plan(AttnInput(q, view, "prefill", 0, 1, 128**-0.5, start=start), State())
    assert layout is not None and (layout.block_q, layout.tile_width, layout.q_offset) == (64, 32, start % 64)
    assert gluon.supports(q, view, layout, Want()) is None
    check(layout, 2, 128)


# ---------------------------------------------------------------------- larger: sampled blocks
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("kind", ["blocks", "narrow", "realistic", "columns"])
def test_long(kind, d):
    n, h, g = 16384 + 77, 8, 2
    layout = {
        "blocks": lambda: workloads.random_blocks(h, n, 0.1, block_q=64, block_k=64, device=DEVICE),
        "narrow": lambda: workloads.random_blocks(h, n, 0.1, block_q=64, block_k=32, device=DEVICE),
        "realistic": lambda: workloads.realistic(h, n, 0.1, block_q=64, block_k=64, device=DEVICE),
        "columns": lambda: workloads.tiles_and_columns(h, n, device=DEVICE),
    }[kind]()
    q, k, v = inputs(1, h, g, n, n, d)
    out, lse = poisoned(q, k, v, layout)
    assert bool(torch.isfinite(out).all())
    gen = torch.Generator().manual_seed(1)
    for i in range(12):
        head = int(torch.randint(h, (1,), generator=gen)) if i else h - 1
        block = int(torch.randint(layout.num_blocks, (1,), generator=gen)) if i else layout.num_blocks - 1
        at = torch.arange(block * 64, min(n, block * 64 + 64), device=DEVICE)
        seen = one_head(layout, head).to_mask(rows=at)[0, 0]
        kk, vv = (t[0, head * g // h].double() for t in (k, v))
        s = (q[0, head, at].double() @ kk.T / math.sqrt(d)).masked_fill(~seen, float("-inf"))
        want = torch.softmax(s, -1).nan_to_num() @ vv
        assert_close(out[0, head, at], lse[0, head, at], want, torch.logsumexp(s, -1), torch.bfloat16)


# ---------------------------------------------------------------------- how it behaves
@pytest.mark.parametrize("columns,width", [(0, 64), (300, 64), (0, 32)])
def test_bit_equal_whatever_the_grid(columns, width):
    layout = lists(2, 8, 8, 3000, 3000, columns=columns, width=width)
    q, k, v = inputs(2, 8, 2, 3000, 3000, 128)
    first = poisoned(q, k, v, layout)
    for grid in (None, None, None, None, 1, 7, 64):
        again = poisoned(q, k, v, layout, grid=grid)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("columns", [False, True])
def test_keys_that_no_list_names_do_not_matter(columns):
    mask = torch.zeros(1, 3, 8, 8, dtype=torch.bool, device=DEVICE)
    mask[..., 0] = mask[..., 4] = True
    more = {"entries": torch.tensor([70, 81, 127, 320], device=DEVICE).expand(1, 3, 8, 4)} if columns else {}
    tiles = Layout.from_block_mask(mask, 512, 512, block_q=64, block_k=64)
    layout = Layout.lists(
        (1, 3, 512, 512), block_q=64, tile_width=64, tiles=tiles.tiles, tile_count=tiles.tile_count, **more
    )
    q, k, v = inputs(1, 3, 1, 512, 512, 64)
    buffers = [torch.full((1, 1, 700, 64), float("nan"), dtype=t.dtype, device=DEVICE) for t in (k, v)]
    named = list(range(64)) + list(range(256, 320)) + ([70, 81, 127, 320] if columns else [])
    for buffer, t in zip(buffers, (k, v), strict=True):
        buffer[:, :, named] = t[:, :, named]
    clean = poisoned(q, k, v, layout)
    dirty = poisoned(q, *(buffer[:, :, :512] for buffer in buffers), layout)  # beyond row 512 too
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("columns", [0, 60])
def test_strided_inputs(columns):
    layout = lists(2, 4, 4, 500, 500, columns=columns)
    q, k, v = inputs(2, 4, 2, 500, 500, 64)
    want = attend(q, (k, v), layout, backend="gluon")
    rows_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # [B, N, H, D] in memory
    fused = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1)  # one projection's output
    cut = [t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in fused.split([256, 128, 128], -1)]
    odd = [torch.nn.functional.pad(t, (0, 3))[..., :64] for t in (q, k, v)]  # rows of 67: a copy
    for a, b, c in (rows_first, cut, odd):
        assert torch.equal(attend(a, (b, c), layout, backend="gluon"), want)


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0])
def test_any_scale(scale):
    q, k, v = inputs(1, 4, 2, 300, 300, 64)
    layout = lists(1, 4, 4, 300, 300, columns=50)
    out, lse = attend(q, (k, v), layout, scale=scale, return_lse=True, backend="gluon")
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    assert_close(out, lse, want, want_lse, torch.bfloat16)


@pytest.mark.parametrize("columns,width", [(0, 64), (60, 64), (0, 32)])
def test_cuda_graph(columns, width):
    layout = lists(1, 4, 4, 1000, 1000, columns=columns, width=width)
    q, k, v = inputs(1, 4, 2, 1000, 1000, 128)
    attend(q, (k, v), layout, backend="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, (k, v), layout, backend="gluon")
    for seed in (1, 2):
        for t, new in zip((q, k, v), inputs(1, 4, 2, 1000, 1000, 128, seed=seed), strict=True):
            t.copy_(new)
        graph.replay()
        assert torch.equal(out, attend(q, (k, v), layout, backend="gluon"))


def test_what_is_served_and_what_is_not():
    q, k, v = inputs(1, 4, 2, 256, 256, 64)
    mask = torch.ones(1, 4, 4, 2, dtype=torch.bool, device=DEVICE)
    wide = Layout.from_block_mask(mask, 256, 256, block_q=64, block_k=128)
    assert "even number" in gluon.supports(q, KV.dense(k, v), wide, Want())
    for columns in (0, 50):
        assert gluon.supports(q, KV.dense(k, v), lists(1, 4, 4, 256, 256, columns=columns), Want()) is None
    assert gluon.supports(q, KV.dense(k, v), narrow(1, 4, 4, 256, 256), Want()) is None


@pytest.mark.parametrize("width", [64, 32])
def test_shared_lists_that_begin_inside_a_block(width):
    """Two heads a tile want row 0: these lists run here, one head a tile."""
    layout = lists(2, 8, 2, 200, 900, columns=0, width=width, share=0.5, offset=37)
    q, k, v = inputs(2, 8, 2, 200, 900, 128)
    assert gluon.supports(q, KV.dense(k, v), layout, Want()) is None
    out, lse = attend(q, (k, v), layout, return_lse=True, backend="gluon")
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=128**-0.5, softcap=0.0, want=Want(lse=True))
    assert_close(out, lse, want, want_lse, torch.bfloat16)
