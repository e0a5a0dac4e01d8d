"""RetrievalAttention against a slow transcription of its card, and the graph it searches (with faiss)."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch

from foveate.errors import ConfigError, UnsupportedError
from foveate.methods import retrieval_attention
from foveate.methods.retrieval_attention import INDEX, SEEN, RetrievalAttention, Seen
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.graph import Graph, co_attended
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.prompts import listed

needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
SMALL = "sink=4,recent=16,budget=10,update=8"


@pytest.fixture
def low(monkeypatch):
    """Graphs of short prompts too."""
    monkeypatch.setattr(retrieval_attention, "LEAST", 16)


def slow_list(q, keys, sink, recent, budget, update):
    """The card with an exact search: static part, and the best of the rest, for one query [D] over keys [M, D]."""
    m = len(keys)
    end = sink
    while end + update <= m - recent:
        end += update
    static = {j for j in range(m) if j < sink or j >= end}
    score = {j: sum(a * b for a, b in zip(q, keys[j], strict=True)) for j in range(m) if j not in static}
    best = sorted(score, key=lambda j: (-score[j], j))[:budget]
    return sorted(static | set(best))


def fed(recipe, q, k, v, prompt, stop=None):
    """A drive after a prompt and single steps up to `stop` tokens."""
    drive = Drive(recipe, d=q.shape[-1])
    stop = q.shape[2] if stop is None else stop
    drive(*(t[:, :, :prompt] for t in (q, k, v)))
    for i in range(prompt, stop):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    return drive


def lists(layout, b=0):
    return [listed(layout.entries[b, h, 0], layout.entry_count[b, h, 0]) for h in range(layout.shape[1])]


@pytest.mark.parametrize("index", ["flat", pytest.param("graph,breadth=512", marks=needs_faiss)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case, index, low):
    """Index by index at every step; a graph whose search holds more candidates than there are keys is exact."""
    q, k, v, _ = (t[:, :, :120] if isinstance(t, torch.Tensor) else t for t in case.make())
    drive = fed(f"retrieval_attention:index={index},{SMALL}", q, k, v, 100)
    r, missed, total = q.shape[1] // k.shape[1], 0, 0
    for x, layout, _ in drive.watch.calls[1:]:
        layout.validate()
        m = x.kv.capacity
        for h, got in enumerate(lists(layout)):
            want = slow_list(q[0, h, m - 1].double().tolist(), k[0, h // r, :m].double().tolist(), 4, 16, 10, 8)
            missed, total = missed + len(set(want) - set(got)), total + len(want)
            assert len(got) == len(want)
            if index == "flat":
                assert got == want
    assert missed == 0 or (index != "flat" and missed < 0.01 * total)  # keys without any way to them
    assert bool(drive.cache.batch[INDEX].graphs) == (index != "flat")


@pytest.mark.parametrize("h,g", [(3, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("index", ["flat", pytest.param("graph", marks=needs_faiss)])
def test_retrieving_everything_is_dense(h, g, index, low):
    q, k, v = qkv(2, h, g, 150)
    # a budget of all keys that are indexed, without the dense way out of a short row
    drive = fed(f"retrieval_attention:index={index},sink=4,recent=16,budget=128,update=8", q, k, v, 149)
    x, layout, out = drive.last
    assert not layout.full and bool((layout.entry_count == 150).all())
    torch.testing.assert_close(out, oracle(q, (k, v))[:, :, 149:], atol=1e-5, rtol=1e-5)


def test_every_entry_is_static_or_indexed_once():
    """Whatever the length: W and the index together are all tokens, and recent ones stay until they are indexed."""
    method = RetrievalAttention(index="flat", sink=4, recent=16, update=8)
    for m in range(1, 200):
        end = method.end(m)
        assert end >= 4 and (end == 4 or 16 <= m - end < 16 + 8)
        assert end == method.end(m + 1) or end + 8 == method.end(m + 1)


@pytest.mark.parametrize("index", ["flat", pytest.param("graph", marks=needs_faiss)])
def test_rows_of_different_length(index, low):
    """Left padding; each row finds what it finds alone."""
    q, k, v = qkv(2, 4, 2, 153)
    valid = torch.arange(150) >= torch.tensor([[0], [49]])
    recipe = f"retrieval_attention:index={index},{SMALL},breadth=512"
    both = Drive(recipe)
    both(*(t[:, :, :150] for t in (q, k, v)), valid=valid)
    alone = Drive(recipe)
    alone(*(t[1:, :, 49:150] for t in (q, k, v)))
    for i in range(150, 153):
        both(*(t[:, :, i : i + 1] for t in (q, k, v)))
        alone(*(t[1:, :, i : i + 1] for t in (q, k, v)))
    assert lists(both.last[1], 1) == lists(alone.last[1], 0)
    torch.testing.assert_close(both.last[2][1:], alone.last[2], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- the prompt's queries
def test_queries_of_chunks_are_those_of_the_whole():
    q = torch.arange(1000.0)[None, :, None].expand(4, -1, 2)
    whole = Seen()
    whole.add(q, 100)
    for cuts in ((0, 1, 2, 500, 1000), (0, 333, 334, 1000)):
        parts = Seen()
        for a, b in zip(cuts, cuts[1:], strict=False):
            parts.add(q[:, a:b], 100)
        assert torch.equal(parts.q, whole.q)
    assert whole.q[0, :, 0].tolist() == list(range(0, 1000, 16)) and whole.step == 16
    assert whole.of(2)[0].shape == (2 * 63, 2)


def test_only_a_graph_keeps_queries():
    q, k, v = qkv(1, 4, 2, 60)
    for text, kept in (("index=graph", True), ("index=graph,aware=false", False), ("index=flat", False)):
        drive = Drive(f"retrieval_attention:{text},queries=20")
        drive(q, k, v)
        assert (SEEN in drive.cache.rows[0]) == kept
    assert Drive("retrieval_attention:index=graph").recipe.decode.phase(3) is None
    drive = Drive("retrieval_attention:queries=20")
    drive(q, k, v)
    assert drive.cache.rows[0][SEEN].q.shape == (4, 8, 16)  # 10 rows of 2 heads at most


# ---------------------------------------------------------------------- the graph
def test_edges_are_those_of_queries():
    """Against loops: pairs (best, other) and neighbours in rank, both ways, the most frequent first."""
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(40, 8, generator=gen, dtype=torch.float64), torch.randn(60, 8, generator=gen, dtype=torch.float64)
    seen: dict[tuple[int, int], int] = {}
    for row in (q @ k.T).tolist():
        top = sorted(range(60), key=lambda j: -row[j])[:6]
        for a, b in [*((top[0], b) for b in top[1:]), *zip(top[1:], top[2:], strict=False)]:
            for pair in ((a, b), (b, a)):
                seen[pair] = seen.get(pair, 0) + 1
    got = co_attended(q, k, 6, 5)
    for a in range(60):
        want = sorted((b for s, b in seen if s == a), key=lambda b: (-seen[a, b], b))[:5]
        assert got[a].tolist() == want + [-1] * (5 - len(want))


def shifted(n, d, seed):
    """Queries far from all keys, as of a model: their mean lies where no key is, and they come in topics."""
    gen = torch.Generator().manual_seed(7)
    keys, away = torch.randn(n, d, generator=gen), torch.randn(1, d, generator=gen)
    topics, turn = torch.randn(30, d, generator=gen), torch.randn(d, d, generator=gen) / d**0.5
    gen = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 30, (500,), generator=gen)
    return keys, torch.randn(500, d, generator=gen) @ turn + topics[which] + 10 * away / away.norm()


@needs_faiss
def test_edges_of_queries_find_more_at_the_same_cost():
    """Recall of the exact top 30 of unseen queries against the keys visited: the key-only graph visits more for less."""
    import faiss

    n, d = 3000, 32
    keys, old = shifted(n, d, 1)
    new = shifted(n, d, 2)[1][:100]
    best = (new @ keys.T).topk(30).indices
    curves = {}
    for name, queries in (("aware", old), ("plain", None)):
        graph = Graph(keys, queries, links=8, reach=16)
        points = []
        for breadth in (30, 45, 60, 90, 130, 200):
            faiss.cvar.hnsw_stats.reset()
            score, index = graph.search(new, 30, breadth)
            torch.testing.assert_close(score, (new @ keys.T).gather(1, index), atol=1e-3, rtol=1e-4)
            hits = [len(set(a.tolist()) & set(b.tolist())) / 30 for a, b in zip(index, best, strict=True)]
            points.append((faiss.cvar.hnsw_stats.ndis / len(new), float(np.mean(hits))))
        curves[name] = tuple(np.array(points).T)
    visits = np.linspace(curves["plain"][0][0], curves["aware"][0][-1], 8)
    aware, plain = (np.interp(visits, *curves[name]) for name in ("aware", "plain"))
    assert (aware >= plain - 0.005).all() and (aware - plain).mean() > 0.01
    assert curves["aware"][1][-1] > 0.9 and curves["aware"][0][0] < 0.3 * n


@needs_faiss
def test_graph_edges_are_valid_and_keep_their_number():
    import faiss

    keys, queries = shifted(400, 16, 1)
    graph = Graph(keys, queries, links=4, reach=8)
    hnsw = graph.index.hnsw
    edges, first = (faiss.vector_to_array(t) for t in (hnsw.neighbors, hnsw.offsets))
    near = co_attended(queries, keys, 8, 4)
    for i in range(400):
        mine = edges[first[i] : first[i] + 8].tolist()
        live = [e for e in mine if e >= 0]
        assert mine == live + [-1] * (8 - len(live)) and len(set(live)) == len(live) and max(live) < 400
        want = [e for e in near[i].tolist() if e >= 0]
        assert live[: len(want)] == want
    assert graph.nbytes >= 400 * (16 * 4 + 8 * 4)
    assert Graph(keys[:1], queries, links=4, reach=8).search(queries[:2], 3, 8)[1].tolist() == [[0, -1, -1]] * 2


# ---------------------------------------------------------------------- beside the cache
@needs_faiss
def test_graphs_grow_by_doubling(low):
    q, k, v = qkv(1, 4, 2, 150)
    sizes = []
    drive = Drive(f"retrieval_attention:{SMALL}")
    drive(*(t[:, :, :60] for t in (q, k, v)))
    for i in range(60, 150):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        sizes.append(drive.cache.batch[INDEX].graphs[0][0].size)
    assert sorted(set(sizes)) == [40, 80] and sizes == sorted(sizes)


@needs_faiss
@pytest.mark.parametrize("back", [3, 60])
def test_rollback_never_finds_keys_that_are_gone(back, low):
    """After a rollback into the index, other tokens, a second turn: as if the first ones had never been."""
    q, k, v = qkv(1, 4, 2, 300)
    one, two = (Drive(f"retrieval_attention:{SMALL},breadth=512") for _ in range(2))
    one(*(t[:, :, :100] for t in (q, k, v)))
    for i in range(100, 103):
        one(*(t[:, :, i : i + 1] for t in (q, k, v)))
    one.cache.truncate(back)
    left = 103 - back
    two(*(t[:, :, : min(left, 100)] for t in (q, k, v)))
    for i in range(100, left):
        two(*(t[:, :, i : i + 1] for t in (q, k, v)))
    for d in (one, two):
        d(*(t[:, :, 200:270] for t in (q, k, v)))
        for i in range(270, 274):
            d(*(t[:, :, i : i + 1] for t in (q, k, v)))
        assert d.cache.batch[INDEX].graphs[0][0].size >= 40
    assert lists(one.last[1]) == lists(two.last[1])


@needs_faiss
def test_the_recent_window_may_reach_into_a_graph(low):
    """A short rollback moves the window's begin before the graph's end: no entry twice, and those of a full scan."""
    q, k, v = qkv(1, 4, 2, 120)
    one, two = (Drive(f"retrieval_attention:{SMALL},breadth=512,index={i}") for i in ("graph", "flat"))
    for d in (one, two):
        d(*(t[:, :, :100] for t in (q, k, v)))
        for i in range(100, 103):
            d(*(t[:, :, i : i + 1] for t in (q, k, v)))
        d.cache.truncate(8)
        for i in range(110, 114):
            d(*(t[:, :, i : i + 1] for t in (q, k, v)))
            d.last[1].validate()
    for a, b in zip(one.watch.calls, two.watch.calls, strict=True):
        assert a[1].full or lists(a[1]) == lists(b[1])


def test_a_search_may_find_too_few(low, monkeypatch):
    """What a graph cannot reach is left out of the list; nothing stands in for it."""

    class Poor:
        def __init__(self, keys, queries, **how):
            self.size = len(keys)

        def search(self, q, k, breadth):
            score, index = torch.full((len(q), k), float("-inf")), torch.full((len(q), k), -1)
            score[:, :2], index[:, :2] = torch.tensor([2.0, 1.0]), torch.tensor([7, 3])
            return score, index

    monkeypatch.setattr(retrieval_attention, "Graph", Poor)
    q, k, v = qkv(1, 4, 2, 101)
    _, layout, out = fed(f"retrieval_attention:{SMALL}", q, k, v, 100).last
    assert lists(layout) == [[0, 1, 2, 3, 7, 11, *range(84, 101)]] * 4
    torch.testing.assert_close(out, oracle(q[:, :, 100:], (k, v), layout), atol=1e-5, rtol=1e-5)


@needs_faiss
def test_beams_and_forks(low):
    q, k, v = qkv(2, 4, 2, 121)
    a = fed(f"retrieval_attention:{SMALL},breadth=512", q, k, v, 120)
    b = Drive(f"retrieval_attention:{SMALL},breadth=512")
    b.cache = a.cache.fork()
    b.cache.reorder(torch.tensor([1, 1]))
    new = qkv(2, 4, 2, 1, seed=5)
    first, second = a(*new), b(*(t[[1, 1]] for t in new))
    torch.testing.assert_close(second[0], first[1])
    torch.testing.assert_close(second[1], first[1])
    b.cache.truncate(80)
    assert b.cache.batch[INDEX].graphs[0] == [] and a.cache.batch[INDEX].graphs[0]


# ---------------------------------------------------------------------- options
def test_without_faiss_there_is_one_clear_error(low, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    q, k, v = qkv(1, 4, 2, 100)
    with pytest.raises(UnsupportedError, match=r"install foveate\[ann\], or give index='flat'"):
        fed(f"retrieval_attention:{SMALL}", q, k, v, 99)
    fed(f"retrieval_attention:{SMALL},index=flat", q, k, v, 99)


def test_options():
    assert parse("retrieval_attention@8k") == RetrievalAttention(sink=64, recent=256, update=256)
    first = RetrievalAttention()
    assert (first.sink, first.recent, first.budget, first.status) == (128, 512, 100, "experimental")
    for text, what in (
        ("recent=0", "recent expected >= 1"),
        ("budget=0", "budget expected >= 1"),
        ("index=ivf", "index expected one of graph, flat"),
        ("links=1", "links expected >= 2"),
        ("reach=1", "reach expected >= 2"),
        ("update=0", "update expected >= 1"),
        ("aware=1", "aware expected bool"),
    ):
        with pytest.raises(ConfigError, match=what):
            parse(f"retrieval_attention:{text}")
    with pytest.raises(ConfigError, match="which a cache policy drops or moves"):
        Recipe.of("retrieval_attention+cache=snapkv")
