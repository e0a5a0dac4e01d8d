"""Dense decode in one launch on a GPU: against the oracle, in CUDA graphs, on two streams; counters that end at 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
if torch.cuda.is_available():
    import foveate
    from foveate.cache.dense import DenseStore
    from foveate.cache.fixed import FixedDense
    from foveate.kernels.triton import arrivals, paging_launch
    from foveate.kernels.triton import dense_decode_launch as kernels
    from foveate.layout import Layout
    from tests import paging_cases
    from tests.dense_decode_cases import at_rest, check, oracle, problem

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HALF = torch.bfloat16
SHAPES = [(4, 128, HALF), (4, 128, torch.float32), (4, 128, torch.float16), (7, 64, HALF), (1, 96, HALF), (16, 128, HALF)]
# Lengths of rows and kv heads: short, odd, none, one long row beside short ones, more rows than programs.
LENGTHS = {
    "one entry": ((1, 1),),
    "odd": ((1023, 1025), (63, 65)),
    "none": ((0, 3), (0, 0)),
    "uneven": ((30011, 29999), (7, 7), (1, 300), (0, 64)),
    "many rows": tuple((13 * i % 200, 7 * i % 330) for i in range(200)),
}


@pytest.fixture(autouse=True)
def however_short(monkeypatch):
    for name in ("ROOM", "ROOM_FEW"):
        monkeypatch.setattr(kernels, name, 0)


def make(lens, *args, **more):
    return problem(lens, *args, device="cuda", **more)


def run(q, kv, layout, lse=True):
    return kernels.attend(q, kv, layout, q.shape[-1] ** -0.5, 0.0, lse)


def captured(call):
    """(graph, what `call` returned in it), after a call outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.parametrize("lens", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("r,d,dtype", SHAPES)
def test_lengths_and_shapes(r, d, lens, dtype):
    check(*make(lens, r, d, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("lens", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("n,r,d,dtype", [
    (9, 4, 128, HALF), (2, 4, 128, HALF), (5, 4, 128, HALF), (17, 4, 128, HALF), (16, 8, 128, HALF), (9, 7, 64, HALF),
    (32, 1, 96, HALF), (9, 4, 128, torch.float32), (17, 4, 128, torch.float32), (9, 4, 128, torch.float16),
    (9, 2, 256, HALF), (32, 4, 256, HALF),
])  # fmt: skip
def test_a_few_tokens(n, r, d, dtype, lens):
    check(*make(lens, r, d, dtype=dtype, n=n), TOLERANCE[dtype])


def test_a_few_tokens_with_weights_positions_segments_and_softcap():
    for more in ({"pos": True}, {"bias": True}, {"bias": True, "pos": True, "kind": "ragged"}):
        for dtype in (torch.float32, HALF):
            check(*make(LENGTHS["uneven"], 4, 128, dtype=dtype, n=9, **more), TOLERANCE[dtype])
    check(*make(LENGTHS["odd"], 4, 64, 40, dtype=HALF, n=6), TOLERANCE[HALF], softcap=20.0)


def test_rows_of_queries_have_masks_of_their_own():
    """Sixteen tokens of one head begin at a multiple of 16: rows 8 to 15 must not get the mask of rows 0 to 7."""
    for n, length in ((16, 4096), (16, 4097), (8, 512), (32, 8192)):
        q, kv, layout = make(((length, length),), 1, 128, dtype=HALF, n=n)
        kv.v[:, :, :length] = 0
        kv.v[:, :, length - n : length] = torch.eye(n, 128, device="cuda", dtype=HALF)[None, None] * 1e3
        out, _ = check(q, kv, layout, 2e-1)
        ahead = torch.triu(torch.ones(n, n, device="cuda", dtype=torch.bool), 1)
        assert not bool(out[..., :n].float()[:, :, ahead].any())


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("more", [{"pos": True}, {"bias": True, "pos": True, "kind": "ragged"}], ids=str)
def test_weights_positions_segments(more, dtype):
    for lens in (LENGTHS["odd"], LENGTHS["uneven"]):
        check(*make(lens, 4, 128, dtype=dtype, **more), TOLERANCE[dtype])
    check(*make(LENGTHS["odd"], 4, 64, 40, dtype=dtype, **more), TOLERANCE[dtype], softcap=20.0)


@pytest.mark.parametrize("n", [131072, 131071, 100001])
@pytest.mark.parametrize("b,h,g,d,new", [
    (1, 32, 8, 128, 1), (1, 14, 2, 64, 1), (2, 16, 1, 128, 1), (1, 32, 8, 128, 9), (1, 32, 8, 128, 17), (2, 16, 2, 64, 4),
])  # fmt: skip
def test_long_rows(b, h, g, d, new, n):
    """Merges of up to 264 parts. Values differ by where they stand, so that a part left out or counted twice shows."""
    gen = torch.Generator("cuda").manual_seed(n)
    draw = lambda *s: torch.randn(*s, device="cuda", generator=gen).to(HALF)  # noqa: E731
    q, k, v = draw(b, h, new, d), draw(b, g, n + 500, d), draw(b, g, n + 500, d)
    v += torch.linspace(-4, 4, n + 500, device="cuda").to(HALF)[:, None]
    k[:, :, n:], v[:, :, n:] = float("nan"), float("nan")
    length = torch.full((b, g), n, dtype=torch.int32, device="cuda")
    kv = foveate.KV.dense(k, v, len=length)
    layout = Layout.dense(b, h, new, n + 500)
    want = oracle(q, replace(kv, k=k.nan_to_num(), v=v.nan_to_num()), layout)
    out, _ = check(q, kv, layout, 2e-2, want=want)
    assert float((out.float() - want[0]).abs().mean()) < 2e-3
    cut = foveate.KV.dense(k[:, :, :n], v[:, :, :n])
    check(q, cut, Layout.dense(b, h, new, n), 2e-2, want=want)


@pytest.mark.parametrize("share,stages,step,least", [(1, 4, 16384, 1), (4, 3, 8192, 1), (2, 3, 32768, 2), (8, 4, 4096, 3)])
def test_other_constants(monkeypatch, share, stages, step, least):
    for name, value in (("SHARE", share), ("STAGES", stages), ("STEP", step), ("LEAST", least)):
        monkeypatch.setattr(kernels, name, value)
    kernels._plan.cache_clear()
    try:
        for lens in LENGTHS.values():
            check(*make(lens, 4, 128, dtype=HALF), TOLERANCE[HALF])
    finally:
        kernels._plan.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("n", [1, 9])
def test_replays_while_the_cache_grows(dtype, n):
    """1,000 replays of one graph: each equals a fresh call to the bit, and the counters are 0 after them."""
    q, kv, layout = make(((3000, 3000), (1, 1), (900, 950)), 4, 128, dtype=dtype, room=1100, n=n)
    kv.k.nan_to_num_(0.3), kv.v.nan_to_num_(0.7)  # what a step would have written
    graph, (out, lse) = captured(lambda: run(q, kv, layout))
    for i in range(1000):
        kv.len.add_(1)
        graph.replay()
        if i % 50 == 0:
            want, want_lse = run(q, kv, layout)
            assert torch.equal(out, want) and torch.equal(lse, want_lse)
    check(q, kv, layout, TOLERANCE[dtype])
    assert n > 1 or len(arrivals._captured) > 0
    at_rest()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_few_tokens_into_a_store(dtype):
    """Recorded once, replayed over changing tokens and rollbacks: entries and lengths are those of plain PyTorch."""
    gen = torch.Generator("cuda").manual_seed(1)
    draw = lambda n: [torch.randn(3, 2, n, d, device="cuda", generator=gen).to(dtype) for d in (128, 96)]  # noqa: E731
    valid = torch.arange(50, device="cuda") >= torch.tensor([[0], [17], [49]], device="cuda")
    first = DenseStore.empty(*draw(0)).append(*draw(50), valid, [0] * 3)
    ours, other = (FixedDense(first.fork(), [50, 33, 1], 700) for _ in range(2))
    ours.stays = other.stays = True
    ours.wide = other.wide = True
    other._kernels = lambda n: None
    k, v = draw(9)
    for store in (ours, other):
        store.append(k, v, None, [0] * 3)
    counted, graph = ours.counted(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ours.append(k, v, None, [0] * 3)
        view = ours.view()
    ours.recount(counted)
    for i in range(60):
        for t, fresh in zip((k, v), draw(9), strict=True):
            t.copy_(fresh)
        graph.replay()
        ours.replayed(9)
        other.append(k, v, None, [0] * 3)
        a, b = ours.view(), other.view()
        assert torch.equal(view.len, a.len) and torch.equal(a.len, b.len) and torch.equal(ours.seen_now, other.seen_now)
        assert ours.count == other.count and a.len.tolist() == [[n] * 2 for n in ours.count]
        assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)
        for store in (ours, other):
            store.truncate(i % 10)


def test_runs_are_equal():
    """Whoever comes last merges: the order of the parts is that of the slots."""
    q, kv, layout = make(((50000, 49000), (7, 900)), 4, 128, dtype=HALF)
    first = run(q, kv, layout)
    for _ in range(200):
        again = run(q, kv, layout)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    at_rest()


def test_two_streams_have_counters_of_their_own():
    """Launches that overlap: eager ones on two streams, replays of two graphs, and a graph beside eager launches."""
    problems = [make(((40000, 40000), (9, 30000)), 4, 128, dtype=HALF, seed=i) for i in range(2)]
    wants = [run(*p) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    graphs = [captured(lambda p=p: [run(*p) for _ in range(3)]) for p in problems]
    torch.cuda.synchronize()
    held = [t.data_ptr() for t in [*arrivals._streams.values(), *arrivals._captured.values()]]
    assert len(set(held)) == len(held)
    for _ in range(30):
        results = []
        for stream, p, (graph, _) in zip(streams, problems, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                results.append([run(*p) for _ in range(4)])
        torch.cuda.synchronize()
        for want, eager, (_, replayed) in zip(wants, results, graphs, strict=True):
            for got in (*eager, *replayed):
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    at_rest()


def test_a_capture_without_a_call_before(monkeypatch):
    """No counters are ready: the graph brings some that each replay clears."""
    monkeypatch.setattr(arrivals, "_pools", {})
    monkeypatch.setattr(arrivals, "_captured", {})
    q, kv, layout = make(((5000, 5000),), 4, 128, dtype=HALF)
    want = run(q, kv, layout)
    arrivals._pools.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(q, kv, layout)
    assert not arrivals._captured
    for _ in range(20):
        got[0].zero_()
        graph.replay()
        assert torch.equal(got[0], want[0])


def test_memory_that_is_used_again_brings_its_counters():
    """Launches of a graph that get the same memory for their parts share counters: eight take those of one or two."""
    q, kv, layout = make(((5000, 5000),), 4, 128, dtype=HALF)
    before, graphs = len(arrivals._captured), 6
    for _ in range(graphs):
        graph, _ = captured(lambda: [run(q, kv, layout) for _ in range(8)])
        graph.replay()
        torch.cuda.synchronize()
        del graph
    assert len(arrivals._captured) - before <= 2 * graphs
    at_rest()


def test_auto_takes_it_where_lengths_are_on_the_device(monkeypatch):
    taken = []
    inner = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *a: taken.append(1) or inner(*a))
    q, kv, layout = make(((3000, 3000), (900, 900)), 4, 128, dtype=HALF)
    out = foveate.attend(q, kv)
    torch.testing.assert_close(out.float(), oracle(q, kv, layout)[0], atol=2e-2, rtol=0)
    assert taken == [1]
    foveate.attend(q, (kv.k.nan_to_num(), kv.v.nan_to_num()))  # PyTorch's flash kernel
    assert taken == [1]
    monkeypatch.undo()
    inner = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *a: taken.append(2) or inner(*a))
    for n, served in ((60000, [1]), (66000, [1, 2])):  # with little to read the general kernel is faster
        q, kv, layout = make(((n, n // 2),), 4, 128, dtype=HALF)
        torch.testing.assert_close(foveate.attend(q, kv).float(), oracle(q, kv, layout)[0], atol=2e-2, rtol=0)
        assert taken == served


def test_nothing_waits():
    q, kv, layout = make(((3000, 3000), (900, 900)), 4, 128, dtype=HALF)
    run(q, kv, layout)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            run(q, kv, layout)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("page,heads", [(16, 2), (64, 2), (16, 8)])
def test_pages_merge_in_graphs_on_two_streams(page, heads):
    """The same merge in the kernel over pages, 1,000 replays beside eager launches: equal bits, counters at 0."""
    q, kv = paging_cases.problem(4, 128, ((9000, 9000), (700, 700)), "dense", HALF, device="cuda")
    tiles, count = paging_cases.random_tiles(kv, heads, page, 40, seed=page)
    want, want_lse = paging_cases.check_attend(q, kv, tiles, count, page, 2e-2)
    layout = Layout((2, 8, 1, kv.capacity), tile_width=page, tiles=tiles, tile_count=count)
    call = lambda: paging_launch.attend(q, kv, layout, 128**-0.5, True)  # noqa: E731
    graph, (out, lse) = captured(call)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for i in range(1000):
        with torch.cuda.stream(side):
            graph.replay()
        eager = call()
        if i % 50 == 0:
            torch.cuda.synchronize()
            for a, b in ((out, want), (lse, want_lse), (eager[0], want), (eager[1], want_lse)):
                assert torch.equal(a, b)
    torch.cuda.synchronize()
    at_rest()
