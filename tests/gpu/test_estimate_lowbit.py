"""4-bit logits, anchors and stripes on a GPU: exact integers, the plans of the plain code, no waiting, little memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.kv import KV
    from foveate.methods.base import State
    from foveate.registry import parse
    from tests import estimate_lowbit_cases as cases
    from tests.estimate_cases import peaked, plain, planned_in_a_graph
    from tests.estimate_lowbit_cases import Grid

    PUBLISHED = Grid(64, 32, 32, 256, 128)

# inputs of half precision are exact in fp32: what differs is the order of sums and exp2. fp32 runs on three tf32 products.
TOLERANCE = {"bfloat16": 3e-4, "float16": 3e-4, "float32": 5e-4}
GPU = dict(device="cuda")
ANCHORS = dict(block=128, step=16, init=1, local=1)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------------- 4-bit logits
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("share,bits", [("fragment", 4), ("token", 4), ("fragment", 8)])
def test_integer_keys(name, share, bits):
    for m, d in ((3000, 128), (777, 96), (65, 64)):
        cases.check_keys(2, 4, m, d, share, bits, dtype=getattr(torch, name), **GPU)


@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize(
    "sizes,softcap", [((64, 32, 32, 256, 128), None), ((128, 64, 64, 100, 64), None), ((16, 8, 0, 24, 40), 9.0)]
)
def test_sums(name, sizes, softcap):
    for m, start, d in ((2000, 0, 128), (1333, 700, 96)):
        how = dict(softcap=softcap, tolerance=TOLERANCE[name], dtype=getattr(torch, name))
        cases.check_sums(8, 2, m, start, d, Grid(*sizes), **how, **GPU)


BLOCKS = [
    ((8, 2, 4000, 0, 128), (64, 32, 32, 256, 128), 0.1, {}),
    ((8, 2, 3001, 1200, 64), (128, 64, 64, 100, 64), 0.3, {}),
    ((4, 4, 2500, 0, 96), (32, 16, 32, 64, 64), 0.3, {"share": "token", "group": True}),
    ((6, 2, 2000, 1999, 128), (64, 32, 32, 256, 128), 0.1, {"bits": 8}),
    ((4, 1, 2000, 0, 64), (16, 8, 16, 64, 64), 3.0, {"softcap": 20.0}),
    ((4, 2, 3000, 37, 96), (128, 32, 32, 100, 64), 0.3, {"bits": 5, "group": True}),
    ((4, 1, 2000, 0, 64), (16, 32, 32, 64, 64), 3.0, {"softcap": 20.0, "bits": 3}),
    ((3, 3, 2100, 1000, 72), (32, 32, 0, 0, 32), 30.0, {"dtype": torch.float16}),
]


@pytest.fixture(params=["gluon", "triton"])
def form(request, monkeypatch):
    """Which of the twins computes the logits; that of Gluon is left out where there is none."""
    monkeypatch.setattr(cases.low, "HOPPER", request.param == "gluon")
    if request.param == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    return request.param


@pytest.mark.parametrize("shape,sizes,tau,options", BLOCKS)
def test_blocks(shape, sizes, tau, options, form):
    """fp32: one list in two hundred may differ, where a number lies half-way between two levels."""
    h, _, m, start, _ = shape
    slack = 1 + h * (m - start) // sizes[0] // 200
    assert 0 < cases.check_blocks(*shape, Grid(*sizes), tau, slack=slack, **options, **GPU) < 1


@pytest.mark.parametrize("m", [256, 4096])
def test_the_largest_sums(m, form):
    """e4m3 products keep every bit of a sum of 128 products of levels up to 7."""
    assert 0.01 < cases.check_limit(cases.low.block_bits, m, **GPU) < 0.9


@pytest.mark.parametrize("shape,sizes", [
    ((8, 2, 9000, 0, 128), (64, 32, 32, 256, 128)),
    ((4, 1, 5000, 1777, 128), (128, 32, 64, 128, 64)),
    ((4, 4, 3333, 0, 96), (16, 32, 32, 64, 32)),
    ((4, 2, 70000, 69000, 64), (64, 32, 32, 256, 128)),
])  # fmt: skip
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_twins_agree(shape, sizes, bits, monkeypatch):
    """Gluon's lists are Triton's, number by number: one formula, in exact integers and the same roundings after them."""
    hopper = pytest.importorskip("foveate.kernels.gluon.lowbit")
    (h, g, m, start, d), grid = shape, Grid(*sizes)
    q, k = (torch.randn(1, x, m, d, dtype=torch.bfloat16, **GPU) for x in (h, g))
    k[:, :, m // 2] *= 5
    q = (q + k[:, :, m // 3].repeat_interleave(h // g, 1)[:, :, None])[:, :, start:]
    if (why := hopper.why_not(q[0], 128 if d > 64 else 64, grid.block_q, grid.block_k, "fragment")) is not None:
        pytest.skip(why)
    got = []
    for served in (True, False):
        monkeypatch.setattr(cases.low, "HOPPER", served)
        log_tau = torch.full((h,), 0.3, **GPU).log()
        got.append(cases.lowbit.relative_blocks(q, KV.dense(k, k), log_tau, grid, start=start, scale=d**-0.5, bits=bits))
    (index, count), (want, many) = got
    assert torch.equal(count, many) and torch.equal(index, want)
    assert int(count.min()) < int(count.max())


@pytest.mark.parametrize("shape", [(2, 8, 2, 100, 4096, 32), (1, 4, 1, 20, 70000, 1), (1, 3, 3, 7, 33, 16)])
def test_lists(shape, monkeypatch):
    cases.check_lists(*shape, **GPU)
    monkeypatch.setattr(cases.low, "WHOLE", 0)
    cases.check_lists(*shape, **GPU)


# ---------------------------------------------------------------------- anchors and stripes
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("shape,grid", [
    ((1, 8, 2, 4096, 0, 128), {}),
    ((2, 6, 2, 3001, 1333, 96), {"block": 64, "step": 4, "local": 3, "init": 5}),
    ((1, 4, 1, 5000, 4999, 64), {"softcap": 5.0}),
    ((1, 16, 1, 1500, 0, 64), {"block": 16, "step": 32, "local": 0}),  # more heads than a product has room for
])  # fmt: skip
def test_anchors_and_stripes(shape, grid, name):
    dtype = getattr(torch, name)
    cases.check_anchors(*shape, dtype=dtype, tolerance=TOLERANCE[name], **ANCHORS | grid, **GPU)
    if dtype == torch.float32:
        assert cases.check_stripes(*shape, slack=1, **ANCHORS | grid, **GPU) >= 0


# ---------------------------------------------------------------------- whole plans
PLANS = [
    "sale@8k",
    "sale:tau=0.05,share=group",
    "sale:tau=0.05,quant=token,bits=8",
    "anchor_attention@8k",
    "anchor_attention:theta=3,step=4,share=group",
    "anchor_attention:theta=inf,step=4",
]


def exact(x):
    """The same call in fp32, of the same numbers: the plain code's products in bf16 are rounded, which shifts choices."""
    return replace(x, q=x.q.float(), kv=KV.dense(x.kv.k.float(), x.kv.v.float()))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("start", [0, 1500])
def test_plans(name, start):
    """bf16 inputs with peaks. Integer keys are exact; mean queries of stripes are rounded to bf16 as the plain code does,
    which moves single keys at the limit."""
    method = parse(name)
    x = peaked(8, 2, 5000, 128, start, dtype=torch.bfloat16, **GPU)
    got = method.plan(x, State())
    got.validate()
    with plain():
        want = method.plan(exact(x), State()).to_mask()
    mine = got.to_mask()
    assert float((mine ^ want).sum()) / float((mine | want).sum()) < 4e-3


@pytest.mark.parametrize("name", PLANS)
def test_planning_waits_for_nothing(name):
    """torch reports every synchronisation as an error here; a CUDA graph holds the plan, and equal calls give equal bits."""
    method = parse(name)
    x = peaked(8, 2, 4000, 128, dtype=torch.bfloat16, **GPU)
    want, got = planned_in_a_graph(method, x)
    assert torch.equal(got.to_mask(), want.to_mask())


@pytest.mark.parametrize("name", ["sale:share=group", "sale@8k", "anchor_attention"])
def test_memory_at_128k(name):
    """Beside the lists themselves a plan holds less than 15 % of the KV cache."""
    n, method = 1 << 17, parse(name)
    q, k = (torch.randn(1, h, n, 128, dtype=torch.bfloat16, **GPU) for h in (32, 8))
    x = replace(peaked(8, 2, 16, 128, **GPU), q=q, kv=KV.dense(k, k), q_pos=torch.arange(n, **GPU)[None])
    method.plan(x, State())
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layout = method.plan(x, State())
    torch.cuda.synchronize()
    held = torch.cuda.max_memory_allocated() - base - layout.nbytes
    assert held < 0.15 * 2 * k.numel() * k.element_size(), held
