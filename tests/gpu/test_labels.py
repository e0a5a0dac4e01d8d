"""Labels and codes on a GPU: scores, steps, CUDA graphs, uneven batches, equal runs."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.kernels.triton import labels_launch
    from foveate.kv import KV
    from foveate.methods.adamas import Adamas
    from foveate.methods.base import State
    from foveate.methods.double_sparsity import DoubleSparsity
    from foveate.scores import entries
    from tests import label_cases as cases
    from tests.gpu import capturing

    LABELS, CODES = cases.LABELS, cases.CODES
    METHODS = [
        DoubleSparsity(budget=256, dense_layers=0),
        DoubleSparsity(budget=100, dense_layers=0, group_factor=4, bits=16, share="group"),
        DoubleSparsity(budget=64, dense_layers=0, group_factor=1, bits=4),
        Adamas(budget=128, dense_layers=0, theta=1.0),
        Adamas(budget=64, dense_layers=0, unit="std", theta=0.5, share="group"),
    ]
else:
    LABELS, CODES, METHODS = [], [], []

LENGTHS = [((1500, 1500), (70, 70)), ((640, 81), (90, 1280)), None]
MORE = [(4, 128, 64, 2), (4, 128, 60, 2), (3, 128, 48, 4), (5, 128, 64, 8), (16, 128, 32, 16), (4, 256, 128, 8)]
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
storages = pytest.mark.parametrize("kind", ["dense", "paged"])


@both
@storages
@pytest.mark.parametrize("r,d,n,bits", [*LABELS, *MORE])
def test_channels(r, d, n, bits, kind, dtype):
    for lens in LENGTHS if kind == "dense" else LENGTHS[:2]:
        q, kv = cases.problem(r, d, lens, kind, dtype, "cuda", seed=bits)
        for group in (False, True):
            cases.check_labels(cases.channels(d, n, bits, device="cuda"), q, kv, group, 1e-3)
            cases.check_labels(cases.channels(d, n, bits, learnt=True), q, kv, group, 1e-3)


@both
@storages
@pytest.mark.parametrize("r,d,spread", [*CODES, (16, 128, False)])
def test_codes(r, d, spread, kind, dtype):
    for lens in LENGTHS if kind == "dense" else LENGTHS[:2]:
        q, kv = cases.problem(r, d, lens, kind, dtype, "cuda", seed=d)
        for group in (False, True):
            cases.check_labels(cases.codes(d, spread, "cuda"), q, kv, group, 0)


@both
@storages
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.describe())
def test_a_step(method, kind, dtype):
    for lens in (LENGTHS[0], ((20000, 19991), (300, 17000))):
        q, kv = cases.problem(4, 128, lens, kind, dtype, "cuda")
        cases.check_step(method, q, kv, TOLERANCE[dtype])


@both
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.describe())
def test_in_a_cuda_graph(method, dtype):
    """Captured once, replayed while queries change and the cache grows: each replay equals a plan from all keys anew."""
    gen = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=gen).to("cuda", dtype)  # noqa: E731
    q, k, v = draw(2, 8, 1, 128), draw(2, 2, 20000, 128), draw(2, 2, 20000, 128)
    length = torch.tensor([[19000, 19000], [900, 900]], dtype=torch.int32, device="cuda")
    kv = KV.dense(k, v, len=length)
    state, number = State(), 0

    def step():
        layout = cases.step(method, q, kv, state, number)
        return foveate.attend(q, kv, layout), layout

    step()
    length += 1
    number = 1
    graph, (out, layout) = capturing.record(step)

    def change():
        q.copy_(draw(2, 8, 1, 128))
        for b in range(2):
            k[b, :, int(length[b, 0])] = 2 * draw(2, 128)
        length.add_(1)

    def check(i):
        plan = cases.step(method, q, kv, State(), 0)
        assert torch.equal(layout.entries, plan.entries) and torch.equal(layout.entry_count, plan.entry_count)
        assert torch.equal(out, foveate.attend(q, kv, plan))

    capturing.check_replays(graph, 40, change, check, every=4)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.describe())
def test_runs_are_equal_and_wait_for_nothing(method):
    q, kv = cases.problem(4, 128, ((19000, 19000), (17000, 17000)), "dense", torch.bfloat16, "cuda")
    state = State()
    cases.step(method, q, kv, state, 0)
    first = cases.step(method, q, kv, state, 1)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plans = [cases.step(method, q, kv, state, 2) for _ in range(10)]
        outs = [foveate.attend(q, kv, plan) for plan in plans]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(torch.equal(plan.entries, first.entries) for plan in plans)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_the_choice_is_that_of_the_papers_up_to_near_ties():
    """Against the plain code from end to end in fp32: what differs are entries whose scores are within rounding."""
    q, kv = cases.problem(4, 128, ((9000, 9000), (8000, 8000)), "dense", torch.float32, "cuda")
    for method in METHODS:
        ours = cases.step(method, q, kv, State(), 0)
        off = lambda t: None  # noqa: E731
        with cases.patch.object(entries.fused, "entries", off), cases.patch.object(entries.fused, "labels", off):
            other = cases.step(method, q, kv, State(), 0)
        a, b = ours.to_mask(kv), other.to_mask(kv)
        assert int((a != b).sum()) <= (0 if isinstance(method, Adamas) else 4) * 16


@pytest.mark.parametrize("recipe", ["double_sparsity", "adamas:unit=std,theta=0.5"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_replays_its_steps(recipe, rows):
    recipe += (":" if ":" not in recipe else ",") + "budget=64,dense_layers=0"
    capturing.check_model(recipe, rows)


def test_unserved_head_dims_fall_back():
    q, kv = cases.problem(4, 256, LENGTHS[0], "dense", torch.bfloat16, "cuda")
    assert not labels_launch.serves_codes(256)
    layout = cases.step(METHODS[3], q, kv, State(), 0)
    assert layout.entries.shape == (2, 8, 1, 128)
