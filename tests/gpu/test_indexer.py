"""Lightning indexers on a GPU: scores and lists against fp64 and plain code, CUDA graphs, uneven batches, equal runs."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.kernels.triton import indexer_launch
    from foveate.kernels.triton import select_entries_launch as chosen
    from foveate.kv import KV
    from foveate.methods.base import AttnInput, State
    from foveate.scores import indexer as law
    from tests import indexer_cases as cases
    from tests.gpu import capturing
    from tests.indexers import random_profile

    SHAPES = cases.SHAPES
else:
    SHAPES = []

# query heads of a kv head, D, heads of the indexer, its width, dims it rotates, features: mean of all heads or all of them
MORE = [(4, 128, 64, 128, 64, True), (8, 128, 4, 128, 64, False), (5, 96, 9, 64, 32, False), (16, 64, 128, 128, 128, True)]
LENGTHS = [((1500, 1500), (70, 70)), ((20000, 20000), (16385, 16385)), None]
CUDA = "cuda"
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------------- parts
@pytest.mark.parametrize("native", [True, False])
def test_codes(native, monkeypatch):
    """By the device's own conversion and by arithmetic."""
    if native and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no e4m3")
    monkeypatch.setattr(indexer_launch, "_native", lambda device: native)
    cases.check_codes(CUDA)
    cases.check_ties(chosen.best_entries, CUDA)


def test_rounding():
    cases.check_rounding(CUDA)


@pytest.mark.parametrize("heads,width,lens,m", [
    (3, 32, (150, 7), 150), (4, 128, (30001, 129), 30001), (64, 128, (131072, 131071), 131072), (20, 64, None, 4097),
    (128, 128, None, 5000), (33, 16, (1000, 1), 1000),
])  # fmt: skip
def test_score(heads, width, lens, m):
    reached = cases.check_score(heads, width, lens, m, CUDA)
    assert reached > 1e-5  # a bound that could not be missed would say nothing


@pytest.mark.parametrize("heads,width,n,start", [
    (3, 32, 100, 65), (64, 128, 1000, 0), (4, 128, 333, 20000), (100, 16, 257, 1),
])  # fmt: skip
def test_prompt(heads, width, n, start):
    cases.check_prompt(heads, width, n, start, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lists_of_a_prompt(dtype):
    """Two chunks; what plain code chooses, but for scores within rounding of the last that got in."""
    q, kv = cases.problem(4, 128, None, "dense", dtype, CUDA)
    gen = torch.Generator().manual_seed(4)
    draw = lambda h: torch.randn(1, h, 5000, 128, generator=gen).to(CUDA, dtype)  # noqa: E731
    q, k, dsa = draw(8), draw(2), cases.method(q, kv, heads=16, width=128, budget=512)

    def told():
        state, rope, out = State(), cases.rope_of(128, CUDA), []
        for lo, hi in ((0, 3000), (3000, 5000)):
            pos = torch.arange(lo, hi, device=CUDA)[None]
            view = KV.dense(k[:, :, :hi], k[:, :, :hi])
            out.append(dsa.plan(AttnInput(q[:, :, lo:hi], view, "prefill", 2, 4, 0.1, lo, q_pos=pos, rope=rope), state))
        return out

    got = told()
    with cases.plain():
        want = told()
    for a, b in zip(got, want, strict=True):
        a.validate()
        assert torch.equal(a.entry_count, b.entry_count)
        assert float((a.entries != b.entries).any(-1).float().mean()) < 0.02  # rows with any difference
        short = a.entry_count[0, 0] < 512
        assert torch.equal(a.entries[0, 0][short], b.entries[0, 0][short])


@both
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("shape", [*SHAPES, *MORE], ids=str)
def test_rank(shape, kind, dtype):
    for lens in LENGTHS if kind == "dense" else LENGTHS[:2]:
        for rope in (cases.Rotary, cases.Pairs):
            cases.check_rank(shape, lens, kind, dtype, CUDA, rope=rope)


# ---------------------------------------------------------------------- steps
@both
@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("budget", [64, 2048])
def test_a_step(kind, dtype, budget):
    for lens in (((3000, 3000), (2100, 2100)), ((20000, 20000), (300, 300))):
        q, kv = cases.problem(4, 128, lens, kind, dtype, CUDA)
        dsa = cases.method(q, kv, heads=16, width=128, budget=budget)
        cases.check_step(dsa, q, kv, {torch.float32: 3e-5, torch.bfloat16: 2e-2}[dtype])


@both
def test_replays_of_the_host_part(dtype):
    q, kv = cases.problem(4, 128, ((9000, 9000), (700, 700)), "dense", dtype, CUDA)
    new = 2 * torch.randn(20, 2, 2, 128, generator=torch.Generator().manual_seed(9)).to(CUDA, dtype)
    cases.check_replays(cases.method(q, kv, heads=16, width=128, budget=512), q, kv, new, 4, 20)


@both
def test_in_a_cuda_graph(dtype):
    """Captured once, replayed while queries change and the cache grows and is rolled back: each list is that of a plan from
    all keys anew, but for tokens whose scores lie within rounding of the last that got in."""
    gen = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=gen).to(CUDA, dtype)  # noqa: E731
    q, k, v = draw(2, 8, 1, 128), draw(2, 2, 20000, 128), draw(2, 2, 20000, 128)
    length = torch.tensor([[19000, 19000], [900, 900]], dtype=torch.int32, device=CUDA)
    kv, state, rope = KV.dense(k, v, len=length), State(), cases.rope_of(128, CUDA)
    dsa, number = cases.method(q, kv, heads=16, width=128, budget=512), -1

    def step():
        layout = cases.step(dsa, q, kv, state, number, rope)
        return foveate.attend(q, kv, layout), layout

    def next_token():
        nonlocal number
        number += 1
        length.add_(int(number > 0))

    def change():
        q.copy_(draw(2, 8, 1, 128))
        for b in range(2):
            k[b, :, int(length[b, 0]) - 1] = 2 * draw(2, 128)

    def check(i):
        torch.testing.assert_close(out, foveate.attend(q, kv, layout), atol=0, rtol=0)
        if i % 4 == 0:
            fresh = cases.step(dsa, q, kv, State(), 0, rope)
            assert torch.equal(layout.entry_count, fresh.entry_count)
            assert all(len(a - b) <= 4 for a, b in zip(cases.chosen(layout), cases.chosen(fresh), strict=True))
        length.add_(1 if i % 5 else -2)  # what was rolled back is written over

    for _ in range(2):
        next_token()
        step()
    graph, (out, layout) = capturing.record(step, before=next_token)
    capturing.check_replays(graph, 40, change, check)


def test_runs_are_equal_and_wait_for_nothing():
    q, kv = cases.problem(4, 128, ((19000, 19000), (17000, 17000)), "dense", torch.bfloat16, CUDA)
    dsa, state, rope = cases.method(q, kv, heads=16, width=128, budget=512), State(), cases.rope_of(128, CUDA)
    cases.step(dsa, q, kv, state, 0, rope)
    first = cases.step(dsa, q, kv, state, 1, rope)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plans = [cases.step(dsa, q, kv, state, 2 + i, rope) for i in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(plan.entries, first.entries) for plan in plans)


def test_launches_of_a_step():
    """Beside attention at most ten kernels a layer, once the step's rotation is known."""
    q, kv = cases.problem(4, 128, ((131000, 131000),), "dense", torch.bfloat16, CUDA)
    dsa, state, rope = cases.method(q, kv, heads=16, width=128, budget=2048), State(), cases.rope_of(128, CUDA)
    for i in range(3):
        cases.step(dsa, q, kv, state, i, rope)
    x = cases.view(q, kv, 3, rope)
    dsa.plan(x, state)  # the first layer of a step, which also turns unit vectors
    state.layer[cases.KEYS].step = 2
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        dsa.plan(x, state)
        torch.cuda.synchronize()
    names = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert {"project", "round_rows", "score_tokens"} <= set(names) and len(names) <= 10, names


def test_long_caches_hold_little_memory():
    """Of 128K tokens: their scores, and what the choice holds; plain code makes floats of all codes."""
    q, kv = cases.problem(4, 128, ((1 << 17, 1 << 17),), "dense", torch.bfloat16, CUDA)
    which, rope = cases.indexer(8, 2, 128, 64, 128, 64, True, CUDA), cases.rope_of(128, CUDA)
    keys = law.IndexKeys()
    keys.update(cases.view(q, kv, 0, rope), which)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    keys.rank(cases.view(q, kv, 1, rope), which, {})
    assert torch.cuda.max_memory_allocated() - before < 4 << 20


@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_replays_its_steps(rows):
    net = capturing.small().config
    heads, groups = net.num_attention_heads, net.num_key_value_heads
    capturing.check_model(f"dsa:budget=64,profile={random_profile(heads, groups, 64, 8, 64, 32)}", rows)
