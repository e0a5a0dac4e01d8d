"""Antidiagonals and lists of rows on a GPU: mass against fp64, exact choices, the plans of the plain code, no waiting."""

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
    from foveate.scores.antidiagonal import block_mass
    from tests import estimate_rows_cases as cases
    from tests.estimate_cases import differing, peaked, plain, planned_in_a_graph, rounded

# inputs of half precision are exact in fp32: what differs is the order of sums and exp2. fp32 runs on three tf32 products.
TOLERANCE = {"bfloat16": 3e-4, "float16": 3e-4, "float32": 5e-4}
GPU = dict(device="cuda")


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------------- estimates
@pytest.mark.parametrize("name", TOLERANCE)
@pytest.mark.parametrize("shape,softcap", [
    ((1, 8, 2, 4096, 0, 128, 16, 128), None),
    ((1, 4, 4, 4001, 1500, 128, 8, 64), None),
    ((2, 8, 2, 3000, 2777, 64, 16, 64), 9.0),
    ((1, 6, 2, 2500, 0, 96, 8, 128), None),
    ((1, 4, 1, 8000, 7999, 64, 16, 128), None),
    ((1, 4, 1, 1000, 0, 128, 128, 128), None),  # a cell a block
])  # fmt: skip
def test_mass(shape, softcap, name):
    cases.check_mass(*shape, softcap=softcap, dtype=getattr(torch, name), tolerance=TOLERANCE[name], **GPU)


def test_mass_in_pieces_and_again():
    """Pieces of kv heads and of query blocks; equal calls give equal bits."""
    shape = (1, 8, 2, 3900, 300, 128, 16, 128)
    for budget in (30_000, 5_000):
        assert cases.check_mass(*shape, dtype=torch.bfloat16, tolerance=3e-4, budget=budget, **GPU) > 1
    x = peaked(8, 2, 4000, 128, dtype=torch.bfloat16, **GPU)
    first, *rest = (next(block_mass(x.q, x.kv, 16, 128, start=0, scale=x.scale)).mass for _ in range(5))
    assert all(torch.equal(first, again) for again in rest)


@pytest.mark.parametrize("name", TOLERANCE)
def test_similarity(name):
    for d in (64, 96, 128):
        for n, block, offset in ((2000, 64, 0), (1000, 128, 5), (500, 48, 40), (3, 128, 127)):
            cases.check_similarity(2, 3, n, d, block, offset, dtype=getattr(torch, name), **GPU)


@pytest.mark.parametrize("sizes", [(128, 64), (64, 128), (64, 64)])
def test_logits(sizes):
    for d, softcap in ((64, None), (128, 9.0), (96, None)):
        cases.check_logits(8, 2, 150, 1 + 180 * sizes[0] // sizes[1], d, 30, *sizes, softcap=softcap, tolerance=3e-4, **GPU)


# ---------------------------------------------------------------------- lists
@pytest.mark.parametrize("first,nq", [(0, 1), (0, 200), (700, 90), (2500, 3)])
def test_lists(first, nq):
    mass = torch.rand(2, 4, nq, first + nq, generator=torch.Generator().manual_seed(nq)).cuda() ** 20
    mass[0, 2], mass[0, 3] = rounded(mass[0, 2], 8), 0.25  # ties, also of zeros
    for groups in (1, 2, 4):
        each = torch.tensor([0.0, 0.5, 0.9, 1.0]).cuda().view(groups, -1, 1)
        for share in (0.0, 0.3, 0.9, 1.0, each):
            cases.check_lists(mass, share, first, groups)


@pytest.mark.parametrize("sizes", [(128, 64), (64, 64), (64, 128)])
@pytest.mark.parametrize("first,nq", [(0, 130), (900, 40)])
def test_trust(first, nq, sizes):
    score = cases.spread(1, 4, nq, -(-(first + nq) * sizes[0] // sizes[1]), **GPU)
    each = torch.tensor([0.2, 0.0, 0.6, 1.0], dtype=torch.float64).cuda()
    for share in (0.0, 0.6, 0.9, 1.0, each):
        assert 0 < cases.check_trust(score, share, None, first, *sizes, 2, slack=2) <= 1
    for topk in (0.0, 0.4, 1.0):
        cases.check_trust(score, 0.0, topk, first, *sizes, 2)


# ---------------------------------------------------------------------- whole plans
PLANS = [
    "xattention:threshold=0.8",
    "xattention:threshold=0.8,share=group",
    "xattention@8k",
    "xattention:threshold=1.0",
    "spargeattn@8k",
    "spargeattn@8k:share=group",
    "spargeattn:cdf=0.9,theta=0.0156",
    "spargeattn@topk",
]


def exact(x):
    """The same call in fp32, of the same numbers: the plain code's products in bf16 are rounded, which shifts choices."""
    return replace(x, q=x.q.float(), kv=KV.dense(x.kv.k.float(), x.kv.v.float()))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("start", [0, 1500])
def test_plans(name, start):
    """bf16 inputs with peaks; scores that tie to within rounding may go either way, and such a tie is a few pairs."""
    method = parse(name)
    x = peaked(8, 2, 5000, 128, start, dtype=torch.bfloat16, **GPU)
    got = method.plan(x, State())
    got.validate()
    with plain():
        want = method.plan(exact(x), State()).to_mask()
    mine = got.to_mask()
    assert float((mine ^ want).sum()) / float((mine | want).sum()) < 4e-3
    assert differing(method, x) < 3e-2  # products in bf16 keep three digits


@pytest.mark.parametrize("name", PLANS)
def test_planning_waits_for_nothing(name):
    """torch reports every synchronisation as an error here; a CUDA graph holds the plan."""
    method = parse(name)
    x = peaked(8, 2, 4000, 128, dtype=torch.bfloat16, **GPU)
    want, got = planned_in_a_graph(method, x)
    assert torch.equal(got.to_mask(), want.to_mask())
