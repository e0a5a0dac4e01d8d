"""FlashAttention-4 as a backend on a Hopper GPU, against fp64 on the same inputs. A hang ends the process.

Each kind of kernel is compiled at its first call, which takes several seconds.
"""

from __future__ import annotations

import faulthandler

import pytest
import torch

from foveate import attend
from foveate.errors import UnsupportedError
from foveate.kernels import dispatch, fa4
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from tests.gpu.test_backward import gradients
from tests.kernel_cases import Case, Maker, poison

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
WHY = "needs a Hopper GPU" if not HOPPER else fa4.missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY is not None, reason=WHY or "")]
DEVICE = "cuda"
SECONDS = 240  # a test that takes longer hangs


@pytest.fixture(autouse=True)
def watchdog():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def listed(n, m=None, d=128, h=8, g=2, heads=None, b=1, width=128, block_q=128, density=0.4, causal=True, dtype=None):
    """Random aligned blocks; the second query block of every list is empty, unused slots are junk."""
    x, m = Maker(n, d=d, h=h, g=g, dtype=dtype or torch.bfloat16, device=DEVICE), m or n
    mask = x.rand(b, heads or h, -(-n // block_q), -(-m // width)) < density
    mask[:, :, 1:2] = False
    layout = Layout.from_block_mask(mask, n, m, block_q=block_q, block_k=width, heads=h, causal=causal)
    unused = torch.arange(layout.tiles.shape[-1], device=DEVICE) >= layout.tile_count[..., None]
    layout.tiles.masked_fill_(unused, 1 << 28)
    return Case(x.q(b=b), x.dense(m, b=b), layout)


def check(case: Case, backward: bool = True, again: int = 2):
    """Errors of at most twice those of PyTorch in the precision of the inputs, lse within 1e-4, empty rows 0 and -inf."""
    assert fa4.supports(case.q, case.kv, case.layout, Want(lse=True)) is None
    gen = torch.Generator(DEVICE).manual_seed(1)
    dout = torch.randn(case.q.shape, generator=gen, device=DEVICE).to(case.q.dtype)
    dlse = torch.randn(case.q.shape[:3], generator=gen, device=DEVICE)
    out, lse, want = gradients(case, dout, dlse, torch.float64)
    plain_out, _, plain = gradients(case, dout, dlse, case.q.dtype)
    dead = lse.isneginf()
    for _ in range(again):
        with poison():
            got, got_lse, _ = fa4.forward(case.q, case.kv, case.layout, scale=case.scale, softcap=0.0, want=Want(lse=True))
        assert bool(torch.isfinite(got).all()) and torch.equal(got_lse.isneginf(), dead) and bool((got[dead] == 0).all())
        torch.testing.assert_close(got_lse[~dead].double(), lse[~dead], atol=1e-4, rtol=1e-5)
        off, slack = (float((x.double() - out).abs().max()) for x in (got, plain_out))
        assert off <= 2 * slack + 1e-5, f"out is off by {off}, PyTorch by {slack}"
    if not backward:
        return
    assert fa4.backward_supports(case.q, case.kv, case.layout, 0.0) is None
    for _ in range(again):
        with poison():
            grads = fa4.backward(
                dout, dlse, case.q, case.kv, case.layout, got, got_lse, scale=case.scale, softcap=0.0
            )[:3]  # fmt: skip
        for name, a, b, p in zip(("dq", "dk", "dv"), grads, want, plain, strict=True):
            assert bool(torch.isfinite(a).all()), f"{name} was not written"
            off, slack = float((a.double() - b).abs().max()), float((p - b).abs().max())
            assert off <= 2 * slack + 1e-5, f"{name} is off by {off}, PyTorch by {slack}"


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("n", [1024, 777, 129])
def test_lists_with_empty_rows_and_odd_lengths(n, d):
    check(listed(n, d=d))


@pytest.mark.parametrize("n,m", [(300, 1000), (256, 2048), (640, 701)])
def test_rows_that_are_the_last_of_the_keys(n, m):
    check(listed(n, m))


@pytest.mark.parametrize("n,m", [(512, 512), (500, 333), (700, 1027)])
def test_not_causal(n, m):
    check(listed(n, m, causal=False))


@pytest.mark.parametrize("n", [1024, 900])
def test_key_blocks_of_64(n):
    case = listed(n, width=64)
    check(case, backward=False)
    assert "blocks of 128 keys" in (fa4.backward_supports(case.q, case.kv, case.layout, 0.0) or "")


@pytest.mark.parametrize("heads,h,g,b", [(1, 8, 2, 2), (2, 8, 2, 1), (4, 4, 4, 2), (3, 3, 1, 1)])
def test_groups_and_shared_lists(heads, h, g, b):
    check(listed(600, h=h, g=g, heads=heads, b=b))


def test_query_blocks_of_256_and_fp16():
    check(listed(1100, block_q=256))
    check(listed(640, dtype=torch.float16))


@pytest.mark.parametrize("n,m,causal", [(777, 777, True), (300, 1000, True), (512, 700, False)])
def test_dense(n, m, causal):
    x = Maker(n, d=128, h=8, g=2, dtype=torch.bfloat16, device=DEVICE)
    check(Case(x.q(), x.dense(m), Layout.dense(1, 8, n, m, causal=causal)))


def test_strided_inputs_and_other_scales():
    case = listed(640)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.q, case.kv.k, case.kv.v))
    for scale in (case.scale, -case.scale, 0.0):
        want, want_lse, _ = dispatch.backend("reference").forward(
            q.double(), KV.dense(k.double(), v.double()), case.layout, scale=scale, softcap=0.0, want=Want(lse=True)
        )
        out, lse, _ = fa4.forward(q, KV.dense(k, v), case.layout, scale=scale, softcap=0.0, want=Want(lse=True))
        torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


def test_attend_by_name_differentiates_with_it(monkeypatch):
    calls, real = [], fa4.backward
    monkeypatch.setattr(fa4, "backward", lambda *a, **k: calls.append(1) or real(*a, **k))
    case = listed(900)
    grads = []
    for name, dtype in (("fa4", torch.bfloat16), ("torch", torch.float64)):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        out, lse = attend(q, (k, v), case.layout, return_lse=True, backend=name)
        (out.double().square().sum() + lse.masked_fill(lse.isinf(), 0).double().sin().sum()).backward()
        grads.append([t.grad.double() for t in (q, k, v)])
    assert len(calls) == 1
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 1e-2 * float(b.norm())


@pytest.mark.parametrize("with_lse", [False, True])
def test_long_dense_training_takes_it(monkeypatch, with_lse):
    calls, real = [], fa4.backward
    monkeypatch.setattr(fa4, "backward", lambda *a, **k: calls.append(1) or real(*a, **k))
    x = Maker(fa4.PAYS, d=128, h=2, g=1, dtype=torch.bfloat16, device=DEVICE)
    case = Case(x.q(), x.dense(), Layout.dense(1, 2, fa4.PAYS, fa4.PAYS))
    grads = []
    for name in (None, "sdpa"):
        q, k, v = (t.detach().clone().requires_grad_() for t in (case.q, case.kv.k, case.kv.v))
        out = attend(q, (k, v), return_lse=with_lse and name is None, backend=name)
        (out[0] if isinstance(out, tuple) else out).backward(case.q)
        grads.append([t.grad.double() for t in (q, k, v)])
    assert len(calls) == 1
    for a, b in zip(*grads, strict=True):
        assert float((a - b).norm()) <= 2e-2 * float(b.norm())


def test_auto_leaves_lists_to_our_own_kernels():
    case = listed(1024, density=0.9)
    module = dispatch._backward_module(case.q, case.kv, case.layout, 0.0, "auto")
    assert module is not fa4 and dispatch._backward_module(case.q, case.kv, case.layout, 0.0, "fa4") is fa4


def test_tiles_off_the_grid_are_refused():
    case = listed(700)
    case.layout.tiles[0, 3, 3, 0] += 64
    with pytest.raises(UnsupportedError, match="grid of 128 keys"):
        attend(case.q, case.kv, case.layout, backend="fa4")
