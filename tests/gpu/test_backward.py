"""The Triton backward pass on a GPU, against fp64 autograd on the same inputs, and how `attend` comes to it."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import attend
from foveate.kernels import dispatch
from foveate.kv import KV
from foveate.layout import Layout
from foveate.lists import repeat_heads
from tests.kernel_cases import Case, Maker, poison

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # test_demands.py checks its own logic without a GPU


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def gradients(case: Case, dout, dlse, dtype):
    """Autograd through the full scores, in one precision throughout, but for the softmax in fp32 or better."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
    h = q.shape[1]
    mask = case.layout.to_mask(case.kv)
    dead = ~mask.any(-1)
    s = (q @ repeat_heads(k, h).transpose(-1, -2)).to(torch.promote_types(dtype, torch.float32)) * case.scale
    s = s.masked_fill(~mask, float("-inf")).masked_fill(dead[..., None], 0)
    p = torch.softmax(s, -1).masked_fill(dead[..., None], 0).to(dtype)
    out, lse = p @ repeat_heads(v, h), s.logsumexp(-1).masked_fill(dead, 0)
    grads = torch.autograd.grad([out, lse], (q, k, v), [dout.to(out.dtype), dlse.to(lse.dtype)])
    return out.detach(), lse.detach().masked_fill(dead, float("-inf")), [g.double() for g in grads]


def check(case: Case, tiles=None):
    """Errors of at most twice those of PyTorch in the precision of the inputs; NaN in keys that no row sees."""
    from foveate.kernels.triton import backward as bw

    assert bw.backward_supports(case.q, case.kv, case.layout, 0.0) is None
    gen = torch.Generator(DEVICE).manual_seed(1)
    dout = torch.randn(*case.q.shape[:3], case.kv.shape[4], generator=gen, device=DEVICE).to(case.q.dtype)
    dlse = torch.randn(*case.q.shape[:3], generator=gen, device=DEVICE)
    out, lse, want = gradients(case, dout, dlse, torch.float64)
    plain = gradients(case, dout, dlse, case.q.dtype)[2]
    dirty = case.poisoned()
    runs = []
    for _ in range(2):
        with poison():
            runs.append(bw.backward(
                dout, dlse, dirty.q, dirty.kv, case.layout, out.to(case.q.dtype), lse.float(), scale=case.scale, softcap=0.0,
                tiles=tiles,
            )[:3])  # fmt: skip
    for name, a, again, b, p in zip(("dq", "dk", "dv"), *runs, want, plain, strict=True):
        assert torch.equal(a, again), f"{name} differs from run to run"
        assert bool(torch.isfinite(a).all()), f"{name} was not written, or NaN reached it"
        slack = 3e-5 * float(b.abs().max()) if a.dtype == torch.float32 else 2 * float((p - b).abs().max())
        off = float((a.double() - b).abs().max())
        assert off <= slack + 1e-5, f"{name} is off by {off}, PyTorch by {slack / 2}"
    assert bool((runs[0][1][dirty.kv.k.isnan()] == 0).all()) and bool((runs[0][2][dirty.kv.v.isnan()] == 0).all())


def maker(n, dtype=torch.bfloat16, **more):
    return Maker(n, dtype=dtype, device=DEVICE, **{"d": 128, **more})


def listed(x: Maker, block_q, width, density=0.4, m=None, b=1, **more) -> Case:
    m = x.n if m is None else m
    return Case(x.q(b=b), x.dense(m, b=b), x.blocks(density, block_q, width, m=m, b=b, **more))


@pytest.mark.parametrize("block_q,width", [(128, 128), (128, 64), (64, 64), (16, 16), (256, 256), (128, 32)])
@pytest.mark.parametrize("d", [64, 128])
def test_blocks(block_q, width, d):
    check(listed(maker(777, d=d), block_q, width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(dtype):
    check(listed(maker(500, dtype), 128, 64))
    check(listed(maker(500, dtype, d=64), 128, 128))


@pytest.mark.parametrize("h,g,heads", [(4, 4, 4), (3, 1, 3), (8, 2, 2), (4, 1, 1), (6, 2, 3)])
def test_groups_and_shared_lists(h, g, heads):
    check(listed(maker(600, h=h, g=g), 128, 64, heads=heads, b=2))


@pytest.mark.parametrize("n,m", [(1, 1), (128, 128), (300, 900), (700, 400)])
def test_lengths(n, m):
    for causal in (True, False):
        x = maker(n)
        check(listed(x, 128, 128, 0.6, m, causal=causal))
        check(Case(x.q(), x.dense(m), Layout.dense(*x.shape(m=m), causal=causal)))


def test_narrow_tiles():
    from foveate.kernels.triton import backward as bw

    check(listed(maker(600), 128, 128), bw.NARROW)
    check(listed(maker(600), 128, 64), bw.NARROW)


def test_a_key_block_that_every_row_names():
    x = maker(3000, h=8, g=1)
    mask = x.rand(1, 8, 24, 47) < 0.1
    mask[..., 0] = True
    check(Case(x.q(), x.dense(), Layout.from_block_mask(mask, 3000, 3000, block_q=128, block_k=64)))


def test_unaligned_and_overlapping_tiles():
    x = maker(200, h=2, g=1)
    tiles = x.tensor([[[[0, 70, 100, 200, 330], [10, 100, 164, 300, 480]]]])
    for width in (64, 128):
        layout = Layout.lists((1, 2, 200, 500), block_q=128, tile_width=width, tiles=tiles, tile_count=x.tensor([[[4, 5]]]))
        check(Case(x.q(), x.dense(500), layout))


def test_attend_differentiates_block_lists_with_it(monkeypatch):
    from foveate.kernels.triton import backward as bw

    calls, real = [], bw.backward
    monkeypatch.setattr(bw, "backward", lambda *a, **k: calls.append(1) or real(*a, **k))
    case = listed(maker(900, h=8, g=2), 128, 128)
    grads = []
    for name, dtype in ((None, torch.bfloat16), ("torch", torch.float64)):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        out, lse = attend(q, (k, v), case.layout, return_lse=True, backend=name)
        (out.double().square().sum() + lse.masked_fill(lse.isinf(), 0).double().sin().sum()).backward()
        grads.append([t.grad.double() for t in (q, k, v)])
        assert len(calls) == 1
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 1e-2 * float(b.norm())


def test_what_it_refuses_goes_to_torch():
    x = maker(64, d=64)
    layout = Layout.static(x.shape(), sink=4, window=16, device=DEVICE)
    for name in ("auto", "triton", "torch"):
        module = dispatch._backward_module(x.q(), x.dense(), layout, 0.0, name)
        assert module is dispatch.torch_gather


def test_cuda_graph_and_no_synchronisation():
    from foveate.kernels.triton import backward as bw

    case = listed(maker(1000), 128, 128)
    out, lse, _ = gradients(case, case.q, case.q[..., 0], torch.float64)
    args = (case.q, case.q[..., 0].float(), case.q, KV.dense(case.kv.k, case.kv.v), case.layout, out.bfloat16(), lse.float())
    run = lambda: bw.backward(*args, scale=1 / math.sqrt(128), softcap=0.0)[:3]  # noqa: E731
    want = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
