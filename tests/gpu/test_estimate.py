"""The fused estimators on a GPU: mass against fp64, exact choices, the same plans as the plain code, no waiting."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.kernels.triton import estimate_launch as kernels
    from foveate.methods.base import State
    from foveate.registry import parse
    from foveate.scores.pooled import block_pool
    from foveate.scores.probes import last_queries
    from tests import estimate_cases as cases

# inputs of half precision are exact in fp32: what differs is the order of sums and exp2. fp32 runs on three tf32 products.
TOLERANCE = {"bfloat16": 2e-4, "float16": 2e-4, "float32": 5e-4}
GPU = dict(device="cuda")


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------------- the probe
@pytest.mark.parametrize("name", ["bfloat16", "float16"])  # fp32 is left to torch on CUDA, see `probes`
@pytest.mark.parametrize("shape,softcap", [
    ((1, 8, 2, 3000, 3000, 128, 64), None),
    ((1, 8, 2, 3000, 3000, 128, 128), None),
    ((2, 6, 2, 100, 2777, 64, 64), 5.0),
    ((1, 4, 4, 50, 1000, 96, 128), None),
    ((1, 2, 1, 1, 1, 128, 64), None),
])  # fmt: skip
def test_probe(shape, softcap, name):
    cases.check_probe(*shape, softcap=softcap, dtype=getattr(torch, name), tolerance=TOLERANCE[name], **GPU)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape,end", [((1, 8, 2, 3000, 3000, 128, 64), 1280), ((1, 8, 8, 900, 9000, 64, 128), 7168)])
def test_probe_over_keys_of_two_kinds(shape, end, name):
    """As qwen1m probes: keys before the last two chunks are moved ones, and meet moved queries."""
    cases.check_probe(*shape, dtype=getattr(torch, name), tolerance=TOLERANCE[name], end=end, **GPU)


def test_long_probe_holds_little_memory_and_repeats():
    """32K keys: equal runs, and nothing of the size of rows x keys beside the results."""
    x = cases.peaked(32, 8, 32768, 128, dtype=torch.bfloat16, **GPU)
    last_queries(x.q, x.kv, 128, scale=x.scale)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = last_queries(x.q, x.kv, 128, scale=x.scale)
    held = torch.cuda.max_memory_allocated() - before
    assert held < 3 * 32 * 32768 * 4, held  # columns, diagonals, a little
    for _ in range(10):
        again = last_queries(x.q, x.kv, 128, scale=x.scale)
        assert torch.equal(first.columns, again.columns) and torch.equal(first.diagonals, again.diagonals)
    with cases.plain():
        want = last_queries(x.q, x.kv, 128, scale=x.scale)
    torch.testing.assert_close(first.columns, want.columns, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(first.diagonals, want.diagonals, atol=2e-4, rtol=2e-4)


# ---------------------------------------------------------------------- choices
@pytest.mark.parametrize("n", [1, 700, 5000, 131072, 600001])
def test_entries(n):
    x = cases.draw(2, 2, 3, n, **GPU)
    x[1] = cases.rounded(x[1], 2)
    x[0, 0, 0, ::3], x[0, 0, 1], x[0, 1, 2] = float("nan"), -0.0, float("-inf")
    cases.check_entries(x, (5, 1000, 9, 3, 6096, 1), (3, 0, 30, 5, 100, 7))


@pytest.mark.parametrize("n", [1, 700, 131072])
def test_mass(n):
    x = torch.rand(5, n, generator=torch.Generator().manual_seed(n)).cuda() ** 20
    x[1], x[2], x[3] = cases.rounded(x[1], 4), 0.0, 1 / 3
    for p in (0.0, 0.4, 0.9, 0.99, 1.0, torch.tensor([0.99, 0.4, 1.0, 0.9, 1.0]).cuda()):
        cases.check_mass(x, p)


@pytest.mark.parametrize("many", [1, 50, 1000, 6096])
def test_merged_diagonals(many):
    for step in (1, 3, 21):
        cases.check_merge(131072, step, many, seed=step, **GPU)


@pytest.mark.parametrize("name", TOLERANCE)
def test_means(name):
    for d in (64, 96, 128):
        x = cases.draw(2, 3, 1000, d, dtype=getattr(torch, name), **GPU)
        for block, offset in ((64, 0), (128, 5), (48, 40), (128, 127)):
            got = kernels.block_means(x, block, offset)
            with cases.plain():
                torch.testing.assert_close(got, block_pool(x, block, offset=offset), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "nq,nk,first,softcap", [(5, 5, 0, None), (3, 90, 87, 3.0), (200, 200, 0, None), (600, 1100, 500, 9.0)]
)
def test_blocks(nq, nk, first, softcap):
    for d in (64, 128):
        prob = cases.check_scores(nq, nk, first, 8, 2, d, softcap, tolerance=2e-5, **GPU)
    for score in (prob, cases.rounded(prob, 512)):
        cases.check_choice(score, first, keep=(1, 2, 3, 100, 5, 60, 7, 8), block=64)
        for p in (0.0, 0.5, 0.9, 1.0):
            cases.check_choice(score, first, p=p, block=64)
            cases.check_pairs(score, first, p, 2, block=64)
        some = torch.tensor([[0.5, 1.0, 0.0, 0.9, 0.7, 0.99, 0.2, 0.8]]).cuda()
        cases.check_pairs(score, first, some, 2, block=64)


# ---------------------------------------------------------------------- whole plans
PLANS = [
    "minference:columns=100,diagonals=300",
    "minference:columns=100,diagonals=300,share=group",
    "minference:pattern=block_sparse,blocks=8",
    "minference:pattern=block_sparse,blocks=8,share=group",
    "minference:pattern=a_shape,init=64,recent=512",
    "qwen1m:chunk=4160,local=64,threshold=0,columns=100,diagonals=300",  # one chunk
    "flexprefill:min_budget=256",
    "flexprefill:min_budget=256,tau=0.0",
    "flexprefill:min_budget=256,tau=10.0",
    "flexprefill:min_budget=256,tau=10.0,share=group",
]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("start", [0, 1500])
def test_plans(name, start):
    """bf16 inputs with peaks; scores that tie to within rounding may go either way, and such a tie is a few pairs."""
    method = parse(name)
    x = cases.peaked(8, 2, 4000, 128, start, dtype=torch.bfloat16, **GPU)
    method.plan(x, State()).validate()
    assert cases.differing(method, x) < 2e-3


@pytest.mark.parametrize("name", PLANS)
def test_planning_waits_for_nothing(name):
    """torch reports every synchronisation as an error here; a CUDA graph holds the plan."""
    method = parse(name)
    x = cases.peaked(8, 2, 4000, 128, dtype=torch.bfloat16, **GPU)
    want, got = cases.planned_in_a_graph(method, x)
    assert torch.equal(got.to_mask(), want.to_mask())
