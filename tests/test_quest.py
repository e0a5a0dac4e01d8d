"""Quest against a slow transcription of its card, and the page bounds it stands on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.cache import DenseStore, PagedStore
from foveate.errors import ConfigError, ShapeError
from foveate.kv import KV
from foveate.lists import compact
from foveate.methods.base import AttnInput, State
from foveate.methods.quest import Quest
from foveate.registry import parse
from foveate.scores.bounds import Bounds
from foveate.select import top_indices, top_k
from tests.drive import Drive, oracle, qkv

few = settings(max_examples=30, deadline=None)
NAN = float("nan")


def slow_pages(q, keys, budget, page, current=None):
    """The card, for one query [D] and the keys [M, D] of its kv head: page numbers, ascending.

    `current` is the page of the newest key, the last one wherever keys are in text order.
    """
    pages = [keys[a : a + page] for a in range(0, len(keys), page)]
    room = max(1, budget // page)
    if len(pages) <= room:
        return list(range(len(pages)))
    bound = []
    for p in pages:
        top, low = [max(c) for c in zip(*p, strict=True)], [min(c) for c in zip(*p, strict=True)]
        bound.append(sum(max(x * t, x * s) for x, t, s in zip(q, top, low, strict=True)))
    current = len(pages) - 1 if current is None else current
    ranked = sorted((u for u in range(len(pages)) if u != current), key=lambda u: (-bound[u], u))
    return sorted([*ranked[: room - 1], current])


def plan(q, kv, **options):
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), q_pos=kv.lengths().amax(1)[:, None] - 1)
    return Quest(**options).plan(x, State())


def named_pages(layout, page):
    """[B][H] lists of page numbers."""
    h = layout.shape[1]
    tiles = layout.tiles.repeat_interleave(h // layout.tiles.shape[1], 1)
    count = layout.tile_count.repeat_interleave(h // layout.tile_count.shape[1], 1)
    return [[[t // page for t in tiles[b, i, 0, : count[b, i, 0]].tolist()] for i in range(h)] for b in range(len(tiles))]


@few
@given(
    h=st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 2)]),
    lens=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    page=st.sampled_from([1, 3, 8, 16]),
    budget=st.integers(1, 60),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["dense", "paged"]),
)
def test_selection_is_the_card(h, lens, page, budget, seed, kind):
    """Index by index, per query head, for rows of different length over any storage; unused slots are NaN."""
    (h, g), b, m = h, len(lens), max(lens)
    q, k, v = qkv(b, h, g, m, d=6, seed=seed)
    store = (PagedStore.empty(k, v, 8) if kind == "paged" else DenseStore.empty(k, v)).append(
        k, v, torch.arange(m) < torch.tensor(lens)[:, None], [0] * b
    )
    if kind == "dense":
        for i, n in enumerate(lens):
            store.k[i, :, n:] = NAN
    got = plan(q[:, :, -1:], store.view(), page=page, budget=budget)
    want = [
        [slow_pages(q[i, j, -1].tolist(), k[i, j // (h // g), :n].tolist(), budget, page) for j in range(h)]
        for i, n in enumerate(lens)
    ]
    if got is None:
        assert all(pages == list(range(-(-n // page))) for row, n in zip(want, lens, strict=True) for pages in row)
    else:
        got.validate()
        assert named_pages(got, page) == want


@few
@given(m=st.integers(1, 70), page=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99), r=st.sampled_from([1, 4]))
def test_bounds_hold(m, page, seed, r):
    """The bound of a page is at least the logit of each of its keys; with one key a page it is that logit."""
    q, k, _ = qkv(2, 2 * r, 2, m, d=8, seed=seed)
    bounds = Bounds(page)
    bounds.update(KV.dense(k, k))
    score = bounds.score(q[:, :, -1:])
    exact = torch.einsum("bgrd,bgmd->bgrm", q[:, :, -1].unflatten(1, (2, r)), k)
    for u in range(-(-m // page)):
        top = exact[..., u * page : (u + 1) * page].amax(-1)
        assert (score[..., u] >= top - 1e-5).all()
    if page == 1:
        torch.testing.assert_close(score, exact, atol=1e-5, rtol=1e-5)


def fresh(kv, page):
    out = Bounds(page)
    out.update(kv)
    return out


def same(bounds, kv, page):
    """Incremental metadata equals metadata computed anew, on every page that has entries."""
    want = fresh(kv, page)
    live = torch.arange(-(-kv.capacity // page)) * page < kv.lengths()[..., None]
    a, b = (x.data[:, :, : live.shape[2]][live] for x in (bounds, want))
    return torch.equal(a, b)


@few
@given(data=st.data(), kind=st.sampled_from(["dense", "paged"]), page=st.sampled_from([1, 4, 16]), b=st.integers(1, 3))
def test_incremental_bounds(data, kind, page, b):
    """Appends of any size, rollbacks, forks and reorders, in any order, equal metadata computed from the keys."""
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    make = lambda n: torch.randn(b, 2, n, 4, generator=gen)  # noqa: E731
    k = make(9)
    store = (PagedStore.empty(k, k, 8) if kind == "paged" else DenseStore.empty(k, k)).append(k, k, None, [0] * b)
    bounds = fresh(store.view(), page)
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["one", "one", "many", "padded", "truncate", "fork", "reorder", "idle"]))
        n = {"one": 1, "many": data.draw(st.integers(1, 20)), "padded": 6}.get(what, 0)
        if n:
            valid = None
            if what == "padded":
                keep = torch.tensor([data.draw(st.integers(0, 6)) for _ in range(b)])
                valid = torch.arange(6) >= 6 - keep[:, None]
            k = make(n) if valid is None else make(n).masked_fill(~valid[:, None, :, None], NAN)
            store = store.append(k, k, valid, [0] * b)
        elif what == "truncate":
            n = data.draw(st.integers(0, min(min(row) for row in store.lens) - 1))
            store.truncate(n)
            bounds.truncate(n)
            k = make(1)  # what comes after a rollback overwrites what was there
            store = store.append(k, k, None, [0] * b)
        elif what == "fork":
            other = bounds.fork()
            other.data.fill_(NAN)
        elif what == "reorder":
            index = torch.tensor([data.draw(st.integers(0, b - 1)) for _ in range(b)])
            store.reorder(index)
            bounds.reorder(index)
        bounds.update(store.view())
        assert same(bounds, store.view(), page)


def test_a_decode_step_reads_only_the_last_page():
    """Keys before it can be anything by then."""
    k = torch.randn(1, 2, 100, 4)
    store = DenseStore.empty(k, k).append(k, k, None, [0])
    bounds, want = fresh(store.view(), 16), fresh(store.view(), 16)
    store.k[:, :, :96] = NAN
    for t in range(40):
        store = store.append(k[:, :, t : t + 1], k[:, :, t : t + 1], None, [100 + t])
        bounds.update(store.view())
    assert bool(torch.isfinite(bounds.data[:, :, : -(-140 // 16)]).all())
    assert torch.equal(bounds.data[:, :, :6], want.data[:, :, :6])
    with pytest.raises(ShapeError, match="rows and kv heads"):
        bounds.update(KV.dense(k[:, :1], k[:, :1]))


@few
@given(data=st.data(), n=st.integers(1, 30), k=st.integers(1, 12), seed=st.integers(0, 999))
def test_top_indices_is_top_k(data, n, k, seed):
    gen = torch.Generator().manual_seed(seed)
    score = (torch.randn(2, 3, n, generator=gen) * 2).round() / 2  # many ties
    score[0, 0] = data.draw(st.sampled_from([NAN, 0.0, -0.0, float("-inf")]))
    valid = torch.rand(2, 3, n, generator=gen) > 0.3 if data.draw(st.booleans()) else None
    forced = torch.arange(n) == data.draw(st.integers(0, n - 1)) if data.draw(st.booleans()) else None
    index, count = compact(top_k(score, k, valid=valid, forced=forced))
    got, got_count = top_indices(score, k, valid=valid, forced=forced)
    assert torch.equal(got_count, count) and torch.equal(got, index[..., : got.shape[-1]]) and got.shape[-1] == min(k, n)


@pytest.mark.parametrize("share", ["head", "group"])
def test_sharing(share):
    """Per query head by default; a group shares the pages of its highest bounds."""
    q, k, v = qkv(1, 8, 2, 200)
    layout = plan(q[:, :, -1:], KV.dense(k, v), budget=64, share=share)
    assert layout.tiles.shape[1] == (8 if share == "head" else 2)
    if share == "group":
        bounds = fresh(KV.dense(k, v), 16)
        score = bounds.score(q[:, :, -1:]).amax(2)
        for g in range(2):
            best = set(score[0, g, :-1].topk(3).indices.tolist()) | {12}
            assert set(named_pages(layout, 16)[0][g * 4]) == best


def test_dense_layers_and_short_caches():
    q, k, v = qkv(1, 4, 2, 130)
    x = AttnInput(q[:, :, -1:], KV.dense(k, v), "decode", 1, 4, 0.25)
    assert Quest(budget=64).plan(x, State()) is None  # one of the first two layers
    assert Quest(budget=64, dense_layers=0).plan(x, State()) is not None
    assert plan(q[:, :, -1:], KV.dense(k, v), budget=144) is None  # nine pages for 130 entries
    assert plan(q[:, :, -1:], KV.dense(k, v), budget=143) is not None


def test_budget_is_kept():
    for m in (65, 80, 200, 333):
        q, k, v = qkv(2, 6, 2, m)
        mask = plan(q[:, :, -1:], KV.dense(k, v), budget=64).to_mask()
        assert int(mask.sum(-1).max()) <= 64 and bool(mask[..., -1].all())


@pytest.mark.parametrize("cache", ["snapkv:window=16,capacity=100", "streaming_llm:sink=4,window=92"])
@pytest.mark.parametrize("b", [1, 2])
def test_on_an_evicted_cache(cache, b):
    """Pages hold entries, not text positions: two turns and fifty steps, each the oracle on the reported layout."""
    q, k, v = qkv(b, 4, 2, 300)
    drive = Drive(f"quest:budget=48+cache={cache}")
    valid = torch.arange(150) >= torch.tensor([[0], [30]])[:b]
    drive(*(t[:, :, :150] for t in (q, k, v)), valid=valid)
    for i in range(150, 175):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    drive(*(t[:, :, 175:190] for t in (q, k, v)))
    for i in range(190, 215):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    assert drive.cache.evicted
    steps = [c for c in drive.watch.calls if c[0].phase == "decode"]
    assert len(steps) == 50
    for x, layout, out in steps:
        assert not layout.full
        layout.validate()
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
        newest = (x.kv.positions() == x.q_pos[:, :, None]) & x.kv.exists()
        assert bool((layout.to_mask(x.kv)[:, :, 0] & newest.repeat_interleave(2, 1)).any(-1).all())
        for i, row in enumerate(named_pages(layout, 16)):
            for j, pages in enumerate(row):
                keys = x.kv.k[i, j // 2, : int(x.kv.lengths()[i, j // 2])].tolist()
                last = int(newest[i, j // 2].nonzero()) // 16
                assert pages == slow_pages(x.q[i, j, 0].tolist(), keys, 48, 16, last)


def test_entry_weights_count():
    """A page whose entries carry a high bias wins; entries of -inf never do."""
    q, k, v = qkv(1, 2, 1, 160, d=4)
    bias = torch.zeros(1, 1, 160)
    bias[0, 0, 37] = 1e4
    bias[0, 0, 48:144] = float("-inf")
    layout = plan(q[:, :, -1:], KV.dense(k, v, bias=bias), budget=48)
    for pages in named_pages(layout, 16)[0]:
        assert 2 in pages and 9 in pages and not set(pages) & set(range(3, 9))


def test_options():
    assert parse("quest@8k") == Quest(budget=1024) and (Quest().page, Quest().dense_layers) == (16, 2)
    for text in ("quest:page=0", "quest:share=row", "quest:budget=many"):
        with pytest.raises(ConfigError, match="quest"):
            parse(text)
