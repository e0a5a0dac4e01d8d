"""Attention mass by key on a GPU: against fp64, the choices of the plain code, little memory, equal runs, no waiting."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    from foveate.scores import votes, window
    from foveate.select import top_k
    from tests import estimate_window_cases as cases
    from tests.estimate_cases import plain

GPU = dict(device="cuda")


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("name", ["bfloat16", "float16"])  # fp32 is left to torch on CUDA, see `masses`
@pytest.mark.parametrize("shape", [
    (1, 32, 8, 5000, 64, 128),
    (2, 6, 2, 2777, 32, 64),
    (1, 8, 1, 3001, 100, 96),
    (1, 4, 4, 1000, 300, 128),
    (3, 16, 2, 4000, 1, 128),
    (1, 4, 2, 700, 17, 256),
])  # fmt: skip
def test_mass(shape, name):
    cases.check(*shape, dtype=getattr(torch, name), tolerance=2e-4, **GPU)


@pytest.mark.parametrize("options", [
    dict(reduce="max"),
    dict(weighted=True, softcap=5.0),
    dict(reduce="max", weighted=True),
    dict(known=True),
    dict(lengths=(3000, 2000, 1999, 70), shift=3),
    dict(shift=2980),  # some rows see a few keys, others none
], ids=str)  # fmt: skip
@pytest.mark.parametrize("rows", [16, 90])
def test_options(options, rows):
    if "lengths" in options and rows > 67:
        options = options | dict(lengths=(3000, 2000, 1999, 170))
    cases.check(2, 8, 2, 3000, rows, 128, dtype=torch.bfloat16, tolerance=2e-4, **options, **GPU)


def test_long_window_holds_little_memory_and_repeats():
    """64K keys: equal runs, and nothing of the size of rows x keys beside the result."""
    q, kv, q_pos = cases.problem(1, 32, 8, 1 << 16, 64, 128, dtype=torch.bfloat16, **GPU)
    call = lambda: window.window_mass(q, kv, q_pos, scale=0.1)  # noqa: E731
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = call()
    held = torch.cuda.max_memory_allocated() - before
    assert held < first.numel() * 4 + 2**21, held
    assert all(torch.equal(first, call()) for _ in range(10))


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_votes_choose_what_the_plain_code_chooses(pooling):
    q, kv, q_pos = cases.problem(1, 8, 2, 6000, 64, 128, dtype=torch.bfloat16, **GPU)
    how = dict(kernel=7, pooling=pooling, reduce="mean", scale=128**-0.5)
    got, recent = votes.window_votes(q, kv, q_pos, 64, **how)
    with plain():
        want, same = votes.window_votes(q.float(), kv, q_pos, 64, **how)
    assert torch.equal(recent, same)
    mine, theirs = (top_k(s, 512, valid=~recent) for s in (got, want))
    assert float((mine ^ theirs).sum()) / float(theirs.sum()) < 2e-2  # scores that tie to within rounding


def test_waits_for_nothing():
    q, kv, q_pos = cases.problem(1, 8, 2, 3000, 64, 128, dtype=torch.bfloat16, **GPU)
    how = dict(kernel=5, pooling="avg", reduce="mean", scale=0.1)
    want, _ = votes.window_votes(q, kv, q_pos, 64, **how)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, _ = votes.window_votes(q, kv, q_pos, 64, **how)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(got, want)
