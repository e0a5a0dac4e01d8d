"""The backward pass in Gluon on a Hopper GPU: against fp64 autograd, against Triton's kernel, and how a call comes to it."""

from __future__ import annotations

import faulthandler
import math

import pytest
import torch

from foveate import attend
from foveate.kv import KV
from foveate.layout import Layout
from tests.gpu.test_backward import check, gradients, listed, maker
from tests.kernel_cases import Case

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")]
DEVICE = "cuda"
SECONDS = 120  # a test that takes longer hangs


@pytest.fixture(autouse=True)
def watchdog(monkeypatch):
    """A hang ends the process. Records the passes that went through Gluon."""
    from foveate.kernels.gluon import backward

    calls = []
    for name in ("run_keys", "run_queries"):
        real = getattr(backward, name)
        monkeypatch.setattr(backward, name, lambda *a, name=name, real=real: calls.append(name) or real(*a))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield calls
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def gluon(watchdog):
    yield
    assert "run_keys" in watchdog, "Triton's kernel ran"


def test_smallest(gluon):
    x = maker(128, h=1, g=1)
    check(Case(x.q(), x.dense(), Layout.dense(*x.shape())))


@pytest.mark.parametrize("block_q,width", [(128, 128), (128, 64), (64, 128), (256, 64), (256, 256)])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks(gluon, watchdog, block_q, width, d, dtype):
    check(listed(maker(777, dtype, d=d), block_q, width))
    assert ("run_queries" in watchdog) == (block_q == 128)


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("h,g,heads", [(4, 4, 4), (3, 1, 3), (8, 2, 2), (4, 1, 1), (6, 2, 3), (16, 1, 16)])
def test_groups_and_shared_lists(gluon, width, h, g, heads):
    check(listed(maker(600, h=h, g=g), 128, width, heads=heads, b=2))


@pytest.mark.parametrize("width", [128, 64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n,m", [(1, 1), (128, 128), (300, 900), (700, 400), (65, 4000)])
def test_lengths(gluon, width, causal, n, m):
    x = maker(n)
    check(listed(x, 128, width, 0.6, m, causal=causal))
    check(Case(x.q(), x.dense(m), Layout.dense(*x.shape(m=m), causal=causal)))


@pytest.mark.parametrize("offset", [1, 64, 127])
def test_a_chunk_that_starts_inside_a_block(gluon, offset):
    check(listed(maker(300), 128, 128, 0.6, m=400, q_offset=offset))


@pytest.mark.parametrize("width", [128, 64])
def test_a_key_block_that_every_row_names_and_many_that_none_does(gluon, width):
    x = maker(3000, h=8, g=1)
    mask = x.rand(1, 8, 24, -(-3000 // width)) < 0.05
    mask[..., 0] = True
    mask[:, :, 5] = True  # a query block that lists everything
    mask[..., 9:20] = False
    check(Case(x.q(), x.dense(), Layout.from_block_mask(mask, 3000, 3000, block_q=128, block_k=width)))
    check(Case(x.q(), x.dense(), Layout.from_block_mask(mask & False, 3000, 3000, block_q=128, block_k=width)))


def test_unaligned_and_overlapping_tiles(gluon):
    x = maker(200, h=2, g=1)
    tiles = x.tensor([[[[0, 70, 100, 200, 330], [10, 100, 164, 300, 480]]]])
    for width in (64, 128):
        layout = Layout.lists((1, 2, 200, 500), block_q=128, tile_width=width, tiles=tiles, tile_count=x.tensor([[[4, 5]]]))
        check(Case(x.q(), x.dense(500), layout))


def both(n, width, density, d=128, h=16, g=4):
    """(Gluon's, again, Triton's) dq, dk and dv of one call, too large for full scores."""
    from foveate.kernels.triton import backward as bw

    gen = torch.Generator(DEVICE).manual_seed(n + width)
    blocks, keys = -(-n // 128), -(-n // width)
    mask = torch.rand(1, h, blocks, keys, generator=gen, device=DEVICE) < density
    mask[..., 0] = True
    layout = Layout.from_block_mask(mask, n, n, block_q=128, block_k=width)
    q, k, v, dout = (torch.randn(1, x, n, d, generator=gen, device=DEVICE).bfloat16() for x in (h, g, g, h))
    dlse = torch.randn(1, h, n, generator=gen, device=DEVICE)
    out, lse = attend(q, (k, v), layout, return_lse=True)

    def call(tiles):
        dense, scale = KV.dense(k, v), 1 / math.sqrt(d)
        return bw.backward(dout, dlse, q, dense, layout, out, lse, scale=scale, softcap=0.0, tiles=tiles)[:3]

    return call(None), call(None), call(bw.config(q, d, width))


@pytest.mark.parametrize("n,width,density,d", [
    (16384, 128, 0.05, 128), (16384, 64, 0.05, 128), (8192 + 77, 128, 0.5, 128), (16384, 64, 0.1, 64), (16384, 128, 0.1, 64),
])  # fmt: skip
def test_long_lists_against_triton_and_from_run_to_run(gluon, n, width, density, d):
    ours, again, triton = both(n, width, density, d)
    for a, b, t in zip(ours, again, triton, strict=True):
        assert torch.equal(a, b), "differs from run to run"
        assert bool(torch.isfinite(a).all())
        assert float((a.float() - t.float()).norm()) <= 4e-3 * float(t.float().norm())
        worst = (a.float() - t.float()).abs().amax(-1) / t.float().norm(dim=-1).clamp(min=1e-3)
        assert float(worst.max()) <= 0.05, f"row {int(worst.argmax())}"


def test_many_runs_give_the_same_bits(gluon):
    for width in (128, 64):
        for _ in range(5):
            ours, again, _ = both(4096, width, 0.2)
            assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def test_cuda_graph(gluon):
    from foveate.kernels.triton import backward as bw

    case = listed(maker(1000), 128, 128)
    out, lse, _ = gradients(case, case.q, case.q[..., 0], torch.float64)
    args = (case.q, case.q[..., 0].float(), case.q, KV.dense(case.kv.k, case.kv.v), case.layout, out.bfloat16(), lse.float())
    run = lambda: bw.backward(*args, scale=1 / math.sqrt(128), softcap=0.0)[:3]  # noqa: E731
    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_strides(gluon):
    case = listed(maker(500, h=4, g=2), 128, 64)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.kv.k, case.kv.v))
    check(Case(q, KV.dense(k, v), case.layout))


def test_attend_comes_to_it(gluon):
    case = listed(maker(900, h=8, g=2), 128, 64)
    grads = []
    for name, dtype in ((None, torch.bfloat16), ("torch", torch.float64)):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        out, lse = attend(q, (k, v), case.layout, return_lse=True, backend=name)
        (out.double().square().sum() + lse.masked_fill(lse.isinf(), 0).double().sin().sum()).backward()
        grads.append([t.grad.double() for t in (q, k, v)])
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 1e-2 * float(b.norm())


def test_what_it_refuses_goes_to_triton(watchdog):
    check(listed(maker(500, d=96), 128, 128))
    check(listed(maker(500), 64, 64))
    check(listed(maker(500, torch.float32), 128, 128))
    assert not watchdog
