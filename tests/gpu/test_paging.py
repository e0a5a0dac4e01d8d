"""The decode kernels over pages on a GPU: exact choice, attention against the oracle, CUDA graphs, equal runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.kernels.triton import paging_launch as kernels
    from foveate.kv import KV
    from foveate.methods.base import AttnInput, State
    from foveate.methods.quest import Quest
    from foveate.scores.bounds import Bounds
    from tests import paging_cases as cases
    from tests.gpu import capturing
    from tests.paging_cases import problem

SIZES = [(1, 16, 64), (3, 16, 64), (4, 64, 64), (8, 16, 128), (4, 16, 128), (2, 32, 96), (16, 64, 128)]
LENGTHS = [None, ((1500, 1500), (7, 7)), ((640, 31), (1, 1280))]
# fp32 products run on three tf32 ones (attention) or exactly (scores); half inputs are exact, sums and outputs round
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
storages = pytest.mark.parametrize("kind", ["dense", "paged"])


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def make(r, d, lens, kind, dtype, **more):
    return problem(r, d, lens, kind, dtype, device="cuda", **more)


@both
@pytest.mark.parametrize("r,page,d", SIZES)
def test_scores(r, page, d, dtype):
    for lens in LENGTHS:
        cases.check_score(*make(r, d, lens, "dense", dtype), page, 1e-4)


@pytest.mark.parametrize("pages", [1, 5, 300, 2048, 8192, 16384, 40000])
def test_selection(pages):
    """Ties, NaN, odd numbers and lengths, against `top_indices`."""
    gen = torch.Generator().manual_seed(pages)
    x = torch.randn(4, 8, pages, generator=gen)
    x[0] = (x[0] * 2).round() / 2
    x[1, 0, ::3], x[1, 1], x[1, 2] = float("nan"), 0.0, float("-inf")
    x[1, 1, ::2] = -0.0
    x[1, 3, ::2], x[1, 4, ::5] = 0.0, float("inf")
    length = torch.randint(1, pages * 16 + 1, (4, 8), generator=gen, dtype=torch.int32)
    length[0, 0] = 0
    for keep in (1, 32, 128, 2000):
        cases.check_select(x.cuda(), keep, 16, None)
        cases.check_select(x.cuda(), keep, 16, length.cuda())


@both
@storages
@pytest.mark.parametrize("page", [1, 6, 16, 64, 128])
def test_update(kind, page, dtype):
    q, kv = make(1, 128, ((1500, 70), (33, 1)), kind, dtype)
    want, live = cases.plain(kv, page).data, cases.live_pages(kv, page)
    data = want.clone()
    covered = torch.tensor([[1400, 69], [0, 0]], device="cuda")
    stale = (torch.arange(live.shape[2], device="cuda") >= (covered // page)[..., None]) & live
    data[:, :, : live.shape[2]][stale] = float("nan")
    kernels.update(kv, data, page, covered)
    assert torch.equal(data[:, :, : live.shape[2]][live], want[:, :, : live.shape[2]][live])
    assert torch.equal(covered, kv.len.long())


def test_selection_is_the_same_every_time():
    """Rows of 8,192 pages with ties, many programs at once."""
    gen = torch.Generator().manual_seed(3)
    score = (torch.randn(8, 8, 8192, generator=gen) * 4).round().cuda() / 4
    length = torch.randint(1, 8192 * 16 + 1, (8, 8), generator=gen, dtype=torch.int32).cuda()
    tiles, count = kernels.select(score, 128, 16, length)
    for _ in range(50):
        again, number = kernels.select(score, 128, 16, length)
        assert torch.equal(again, tiles) and torch.equal(number, count)


@both
@pytest.mark.parametrize("page,d,dv", [(1, 64, 64), (16, 128, 128), (6, 96, 40), (64, 128, 128)])
def test_append(page, d, dv, dtype):
    """A token in one launch: the store and the bounds of the plain code, lengths that are no multiples of the page."""
    cases.check_append(page, d, dv, dtype, steps=70, device="cuda")


@pytest.mark.parametrize("page", [6, 16])
def test_append_after_the_cache_changed(page):
    cases.check_changes(page, device="cuda")


@both
def test_a_captured_append(dtype):
    """Recorded once, replayed over changing tokens: store, lengths and bounds follow those of the plain code."""
    ours, other, bounds, draw = cases.stores(16, 128, 128, dtype, "cuda")
    cases.step(ours, other, *draw(1))
    k, v = draw(1)
    ours.append(k, v, None, [0, 0]), other.append(k, v, None, [0, 0])
    counted = ours.counted()

    def append():
        ours.append(k, v, None, [0, 0])
        view = ours.view()
        bounds.update(view)  # launches nothing
        return view

    def change():
        for held, new in zip((k, v), draw(1), strict=True):
            held.copy_(new)
        other.append(k, v, None, [0, 0])

    def check(i):
        ours.replayed()
        assert torch.equal(view.len, other.now)
        if i % 7 == 0:
            cases.same(ours, other, bounds)

    graph, view = capturing.record(append, warm=False)
    ours.recount(counted)
    capturing.check_replays(graph, 70, change, check)


@both
@storages
@pytest.mark.parametrize("r,page,d", SIZES)
def test_attention(r, page, d, kind, dtype):
    for lens in LENGTHS[1:]:
        q, kv = make(r, d, lens, kind, dtype)
        for heads in {2, 2 * r}:
            for overlap in (False, True):
                tiles = cases.random_tiles(kv, heads, page, 40, seed=r, overlap=overlap)
                cases.check_attend(q, kv, *tiles, page, TOLERANCE[dtype])


@both
@storages
@pytest.mark.parametrize("r,page,d", SIZES)
def test_attention_over_entries(r, page, d, kind, dtype):
    for lens in LENGTHS[1:]:
        q, kv = make(r, d, lens, kind, dtype)
        for heads, rows in ((1, 1), (1, None), (2, None), (2 * r, None)):
            for n in (1, 50, 700):
                entries = cases.random_entries(kv, heads, n, seed=r, rows=rows)
                first, _ = cases.check_attend(q, kv, *entries, 1, TOLERANCE[dtype])
                assert torch.equal(first, cases.check_attend(q, kv, *entries, 1, TOLERANCE[dtype])[0])


@both
def test_attention_over_many_entries(dtype):
    """Programs of one to many steps; what they found is merged in one order, whoever comes last."""
    q, kv = make(4, 128, ((9000, 7000),), "dense", dtype)
    for heads, n in ((1, 2048), (8, 128), (8, 1024), (2, 6571)):
        entries = cases.random_entries(kv, heads, n, seed=n)
        first, _ = cases.check_attend(q, kv, *entries, 1, TOLERANCE[dtype])
        for _ in range(20):
            assert torch.equal(first, kernels.attend(q, kv, cases.listed(q, kv, *entries, 1), 128**-0.5, True)[0])


@both
@pytest.mark.parametrize("share", ["group", "head"])
@storages
def test_a_step_of_quest(kind, share, dtype):
    """bf16 keys give bounds that are exact, so the choice is that of fp32 scores unless two nearly tie: seeds without."""
    q, kv = make(4, 128, ((1500, 1500), (7, 7)), kind, dtype)
    cases.check_quest(q, kv, 16, 256, TOLERANCE[dtype], share)


def planned(q, kv, page, state):
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), q_pos=kv.lengths().amax(1)[:, None] - 1)

    def step():
        layout = Quest(page=page, budget=256, share="group").plan(x, state)
        return foveate.attend(q, kv, layout), layout

    return step


@both
@pytest.mark.parametrize("page", [16, 64])
def test_in_a_cuda_graph(page, dtype):
    """Captured once, replayed while queries change and the cache grows: each replay equals a fresh eager step."""
    gen = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=gen).to("cuda", dtype)  # noqa: E731
    q, k, v = draw(2, 8, 1, 128), draw(2, 2, 2000, 128), draw(2, 2, 2000, 128)
    length = torch.tensor([[1500, 1500], [900, 900]], dtype=torch.int32, device="cuda")
    kv = KV.dense(k, v, len=length)
    step = planned(q, kv, page, State())
    step()  # fills the bounds
    graph, (out, layout) = capturing.record(step)

    def change():
        q.copy_(draw(2, 8, 1, 128))
        for b in range(2):
            k[b, :, int(length[b, 0])] = 2 * draw(2, 128)
        length.add_(1)

    def check(i):
        want, plan = planned(q, kv, page, State())()
        assert torch.equal(layout.tiles, plan.tiles) and torch.equal(layout.tile_count, plan.tile_count)
        assert torch.equal(out, want)

    capturing.check_replays(graph, 70, change, check)


@both
def test_runs_are_equal(dtype):
    q, kv = make(4, 128, ((9000, 9000), (7000, 7000)), "dense", dtype)
    step = planned(q, kv, 16, State())
    first, layout = step()
    for _ in range(20):
        again, plan = step()
        assert torch.equal(first, again) and torch.equal(layout.tiles, plan.tiles)


def test_a_steady_step_waits_for_nothing():
    """Equal lengths, dense storage: torch reports every synchronisation as an error here."""
    q, kv = make(4, 128, None, "dense", torch.bfloat16)
    bounds = Bounds(16)
    views = [replace(kv, k=kv.k[:, :, :n], v=kv.v[:, :, :n], capacity=n) for n in range(100, 150)]
    state = State()
    planned(q, views[0], 16, state)()
    bounds.update(views[0])
    inputs = [AttnInput(q, view, "decode", 2, 4, 0.1, q_pos=None) for view in views]
    method = Quest(page=16, budget=64, share="group")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in inputs:
            foveate.attend(q, x.kv, method.plan(x, state))
    finally:
        torch.cuda.set_sync_debug_mode(before)
