"""The Gluon backend on a Hopper GPU, against the oracle in fp64 on the same inputs. A hang ends the process."""

from __future__ import annotations

import faulthandler
import math

import pytest
import torch

from foveate import attend
from foveate.errors import UnsupportedError
from foveate.kernels import gluon, reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
DEVICE = "cuda"
SECONDS = 120  # a test that takes longer hangs


@pytest.fixture(autouse=True)
def watchdog():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def inputs(b, h, g, n, m, d, dtype=torch.bfloat16, seed=0):
    gen = torch.Generator(DEVICE).manual_seed(seed)
    shapes = ((h, n), (g, m), (g, m))
    return tuple(torch.randn(b, x, y, d, generator=gen, device=DEVICE).to(dtype) for x, y in shapes)


def lists(b, hl, h, n, m, width, density, causal=True, seed=0, local=True):
    """Random aligned tiles; the block of the last visible key and the first one always (`local`). Unused slots are junk."""
    gen = torch.Generator(DEVICE).manual_seed(seed)
    nq, nk = -(-n // 128), -(-m // width)
    mask = torch.rand(b, hl, nq, nk, generator=gen, device=DEVICE) < density
    last = torch.arange(nq, device=DEVICE) * 128 + 127 + m - n
    start = torch.arange(nk, device=DEVICE) * width
    if causal:
        mask &= start <= last[:, None]
    if local:
        mask |= (start <= last[:, None]) & (start > last[:, None] - 128 - width)
        mask[..., 0] = True
    layout = Layout.from_block_mask(mask, n, m, block_q=128, block_k=width, heads=h, causal=causal)
    unused = torch.arange(layout.tiles.shape[-1], device=DEVICE) >= layout.tile_count[..., None]
    layout.tiles.masked_fill_(unused, 1 << 28)
    return layout


def poisoned(q, k, v, layout, scale=None, grid=None):
    """The kernel on outputs full of NaN, so that an element nobody writes shows."""
    from foveate.kernels.gluon import launch, prepare

    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"), device=DEVICE)
    work = prepare.prepare(layout, q.device)
    args, options = launch.arguments(q, k, v, out, lse, layout, work, scale or 1 / math.sqrt(q.shape[-1]))
    tiles = launch.grid(q, work)
    grid = grid or torch.cuda.get_device_properties(q.device).multi_processor_count
    launch.attend_kernel[(min(tiles, grid),)](*args, **options)
    torch.cuda.synchronize()
    return out, lse


def assert_close(out, lse, want, want_lse, dtype):
    assert bool(torch.isfinite(out).all())
    dead = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), dead) and bool((out[dead] == 0).all())
    torch.testing.assert_close(lse[~dead].double(), want_lse[~dead], atol=2e-5, rtol=2e-5)
    norm = float(want.norm())
    if norm > 0:
        limit = 4e-3 if dtype == torch.bfloat16 else 1e-3
        assert float((out.double() - want).norm()) <= limit * norm
        assert float((out.double() - want).abs().max()) <= 12 * limit * float(want.abs().max())


def check(layout, g, d, dtype=torch.bfloat16):
    b, h, n, m = layout.shape
    q, k, v = inputs(b, h, g, n, m, d, dtype)
    out, lse = poisoned(q, k, v, layout)
    scale = 1 / math.sqrt(d)
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    assert_close(out, lse, want, want_lse, dtype)


def check_rows(layout, g, d, rows=48, dtype=torch.bfloat16):
    """Sampled (batch row, head, query row) triples, for problems whose scores do not fit."""
    b, h, n, m = layout.shape
    q, k, v = inputs(b, h, g, n, m, d, dtype)
    out, lse = poisoned(q, k, v, layout)
    assert bool(torch.isfinite(out).all())
    gen = torch.Generator().manual_seed(1)
    picks = [[int(torch.randint(size, (1,), generator=gen)) for size in (b, h, n)] for _ in range(rows)]
    picks += [[0, 0, 0], [b - 1, h - 1, n - 1]]
    for i, head, row in picks:
        seen = torch.zeros(m, dtype=torch.bool, device=DEVICE)
        if layout.full:
            seen[:] = True
        else:
            at = (i if layout.tiles.shape[0] > 1 else 0, head * layout.tiles.shape[1] // h, row // 128)
            starts = layout.tiles[at][: int(layout.tile_count[at])].long()
            index = (starts[:, None] + torch.arange(layout.tile_width, device=DEVICE)).flatten()
            seen[index[index < m]] = True
        if layout.causal:
            seen[max(0, m - n + row + 1) :] = False
        s = (k[i, head * g // h, seen].double() @ q[i, head, row].double()) / math.sqrt(d)
        want = torch.softmax(s, 0) @ v[i, head * g // h, seen].double()
        assert abs(float(lse[i, head, row]) - float(torch.logsumexp(s, 0))) < 2e-4
        assert float((out[i, head, row].double() - want).norm()) <= 1e-2 * float(want.norm())


# ---------------------------------------------------------------------- small: every row against the oracle
def test_smallest():
    check(Layout.dense(1, 1, 128, 128), 1, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n,m", [(1, 1), (128, 128), (130, 130), (1000, 1000), (257, 1025), (100, 700), (300, 200)])
def test_dense(d, causal, n, m):
    check(Layout.dense(2, 4, n, m, causal=causal), 2, d)


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("h,g", [(4, 4), (4, 2), (8, 2), (8, 1), (6, 2)])
@pytest.mark.parametrize("n,m", [(512, 512), (777, 777), (300, 1111)])
def test_lists(width, d, h, g, n, m):
    for causal in (True, False):
        for hl in (h, g):
            check(lists(2, hl, h, n, m, width, 0.4, causal, seed=n + hl), g, d)


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("density", [1.0, 0.25, 0.05])
def test_densities_with_empty_rows(width, density):
    for local in (True, False):
        check(lists(1, 8, 8, 1500, 1500, width, density, seed=3, local=local), 2, 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    for width in (64, 128):
        check(lists(1, 4, 4, 700, 700, width, 0.5), 2, 64, dtype)


def test_one_list_for_the_batch():
    layout = lists(1, 2, 8, 600, 600, 128, 0.5)
    check(
        Layout((3, *layout.shape[1:]), block_q=128, tile_width=128, tiles=layout.tiles, tile_count=layout.tile_count), 2, 64
    )


def test_unaligned_overlapping_tiles():
    tiles = torch.tensor([[[[0, 70, 100, 200, 330], [10, 100, 164, 300, 480]]]], device=DEVICE)
    count = torch.tensor([[[4, 5]]], device=DEVICE)
    for width in (64, 128):
        check(Layout.lists((1, 1, 200, 500), block_q=128, tile_width=width, tiles=tiles, tile_count=count), 1, 128)


def test_one_row_owns_everything_and_one_key_block_in_every_row():
    mask = torch.zeros(1, 4, 16, 32, dtype=torch.bool, device=DEVICE)
    mask[:, :, 15] = True
    mask[:, :, :, 0] = True
    for hl in (4, 1):
        check(Layout.from_block_mask(mask[:, :hl], 2048, 2048, block_q=128, block_k=64, heads=4), 2, 128)


@pytest.mark.parametrize("scale", [0.0, -0.2, 3.0, 1e-6])
def test_any_scale(scale):
    q, k, v = inputs(1, 4, 2, 300, 300, 64)
    layout = lists(1, 4, 4, 300, 300, 64, 0.5)
    out, lse = attend(q, (k, v), layout, scale=scale, return_lse=True, backend="gluon")
    view = KV.dense(k.double(), v.double())
    want, want_lse, _ = reference.forward(q.double(), view, layout, scale=scale, softcap=0.0, want=Want(lse=True))
    assert_close(out, lse, want, want_lse, torch.bfloat16)


# ---------------------------------------------------------------------- larger: sampled rows
@pytest.mark.parametrize(
    "width,density,d", [(128, 1.0, 128), (128, 0.1, 128), (64, 0.1, 128), (64, 0.05, 64), (128, 0.25, 64)]
)
def test_long(width, density, d):
    check_rows(lists(1, 8, 8, 16384 + 77, 16384 + 77, width, density), 2, d)


def test_long_dense_and_chunk():
    check_rows(Layout.dense(1, 8, 16000, 16000), 2, 128)
    check_rows(Layout.dense(2, 4, 4096, 20001), 2, 64)


# ---------------------------------------------------------------------- how it behaves
@pytest.mark.parametrize("width", [128, 64])
def test_bit_equal_whatever_the_grid(width):
    layout = lists(2, 8, 8, 3000, 3000, width, 0.3)
    q, k, v = inputs(2, 8, 2, 3000, 3000, 128)
    first = poisoned(q, k, v, layout)
    for grid in (None, None, None, 1, 7, 64):
        again = poisoned(q, k, v, layout, grid=grid)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_keys_outside_touched_tiles_do_not_matter():
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool, device=DEVICE)
    mask[..., 0] = mask[..., 2] = True
    layout = Layout.from_block_mask(mask, 512, 512, block_q=128, block_k=128)
    q, k, v = inputs(1, 4, 2, 512, 512, 64)
    clean = poisoned(q, k, v, layout)
    k[:, :, 128:256] = v[:, :, 128:256] = float("nan")
    dirty = poisoned(q, k, v, layout)
    # blocks 0 and 1 touch tile 0; tile 2 is in their future and is not read either
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_strided_inputs():
    layout = lists(2, 4, 4, 500, 500, 64, 0.5)
    q, k, v = inputs(2, 4, 2, 500, 500, 64)
    want = attend(q, (k, v), layout, backend="gluon")
    rows_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # [B, N, H, D] in memory
    fused = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1)  # one projection's output
    cut = [t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in fused.split([256, 128, 128], -1)]
    odd = [torch.nn.functional.pad(t, (0, 3))[..., :64] for t in (q, k, v)]  # rows of 67: a copy
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)]
    for a, b, c in (rows_first, cut, odd, turned):
        assert torch.equal(attend(a, (b, c), layout, backend="gluon"), want)


def test_gradients_come_from_elsewhere():
    layout = lists(1, 4, 4, 300, 300, 64, 0.5)
    q, k, v = (t.requires_grad_() for t in inputs(1, 4, 2, 300, 300, 64))
    attend(q, (k, v), layout, backend="gluon").float().square().sum().backward()
    got = [t.grad.double() for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    attend(wide[0], (wide[1], wide[2]), layout, backend="torch").square().sum().backward()
    for a, t in zip(got, wide, strict=True):
        assert float((a - t.grad).norm()) <= 2e-2 * float(t.grad.norm())


def test_cuda_graph():
    layout = lists(1, 4, 4, 1000, 1000, 128, 0.4)
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


def test_refuses_what_it_cannot_do():
    q, k, v = inputs(1, 4, 2, 256, 256, 64)
    assert gluon.supports(q, KV.dense(k, v), Layout.dense(1, 4, 256, 256), Want()) is None
    with pytest.raises(UnsupportedError, match="not strides"):
        attend(q, (k, v), Layout.static((1, 4, 256, 256), sink=4, stride=3, device=DEVICE), backend="gluon")
