"""LServe against a slow transcription of its card: pages, streaming heads, reuse, odd caches, graphs."""

from __future__ import annotations

import math

import pytest
import torch

import foveate
from foveate.cache.fixed import FixedDense
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.lserve import BOUNDS, PAGES, LServe
from foveate.methods.quest import Quest
from foveate.profile import Profile
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.bounds import Bounds
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.models import tiny, tokens
from tests.test_graphs import dry, said

NAN = float("nan")


# ---------------------------------------------------------------------- the card, slowly
def slow_pages(q, keys, page, logical, budget, current=None):
    """Page numbers of one query [D] over the keys [M, D] of its kv head."""
    pages = [keys[a : a + page] for a in range(0, len(keys), page)]
    room = max(3, budget // page)
    if len(pages) <= room:
        return list(range(len(pages)))
    score = []
    for p in pages:
        best = -math.inf
        for a in range(0, len(p), logical):
            small = p[a : a + logical]
            best = max(best, float(torch.maximum(q * small.amax(0), q * small.amin(0)).sum()))
        score.append(best)
    current = len(pages) - 1 if current is None else current
    ranked = sorted((u for u in range(len(pages)) if u != current), key=lambda u: (-score[u], u))
    return sorted([*ranked[: room - 1], current])


def slow_keys(m, streams, pages, page, sink, window):
    """The keys a head sees of m, given its pages."""
    if streams:
        return {j for j in range(m) if j < sink or j >= m - window}
    return {j for j in range(m) if j // page in pages}


def profile_of(folder, gates):
    return str(Profile("duo_attention", tensors={"gates": gates}).save(folder))


def seen(layout, kv):
    """[B][H] sets of entries."""
    mask = layout.to_mask(kv)[:, :, -1]
    return [[set(h.nonzero().flatten().tolist()) for h in row] for row in mask]


def plan(q, kv, state=None, step=0, **options):
    x = AttnInput(q, kv, "decode", 2, 4, 0.25, step=step, q_pos=(kv.lengths()[:, :1] - 1))
    return LServe(**({"sparsity": 0.0} | options)).plan(x, state or State())


# ---------------------------------------------------------------------- selection
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("share", ["head", "group"])
@pytest.mark.parametrize("sizes", [(16, 4, 16, 32), (16, 8, 5, 30)], ids=["tiles", "rule"])
def test_selection_and_reuse(case, share, sizes, tmp_path):
    """Index by index in every step; between selections the old pages and every page begun since."""
    page, logical, sink, window = sizes
    q, k, v, _ = case.make()
    h, g, n = q.shape[1], k.shape[1], q.shape[2]
    gates = torch.rand(4, g, generator=torch.Generator().manual_seed(1))
    gates[2] = torch.linspace(0.3, 0.6, g)
    path = profile_of(tmp_path, gates)
    streams = (gates < torch.quantile(gates.double().flatten(), 0.5))[2].tolist()
    recipe = f"decode=lserve:page={page},logical={logical},budget=64,refresh=6,sink={sink},window={window}"
    drive = Drive(f"{recipe},share={share},profile={path}", d=q.shape[-1])
    first = n - 16  # the fifth step begins a page
    drive(*(t[:, :, :first] for t in (q, k, v)))
    chosen = {}
    for i in range(first, first + 8):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        x, layout, _ = drive.last
        layout.validate()
        if (i - first) % 6 == 0:
            for j in range(h):
                at, r = j // (h // g), h // g
                heads = range(at * r, at * r + r) if share == "group" else [j]
                keys = k[0, at, : i + 1]
                if share == "head":
                    chosen[j] = set(slow_pages(q[0, j, i], keys, page, logical, 64))
                else:  # the highest bound of the group: rank by hand
                    chosen[j] = group_pages(q[0, list(heads), i], keys, page, logical, 64)
            at_selection = i // page
        for j, got in enumerate(seen(layout, x.kv)[0]):
            pages = chosen[j] | set(range(at_selection, i // page + 1))
            assert got == slow_keys(i + 1, streams[j // (h // g)], pages, page, sink, window), (i, j)


def group_pages(queries, keys, page, logical, budget):
    score = {}
    for u, a in enumerate(range(0, len(keys), page)):
        score[u] = max(
            float(torch.maximum(q * s.amax(0), q * s.amin(0)).sum())
            for q in queries
            for s in keys[a : a + page].split(logical)
        )
    last, room = len(score) - 1, max(3, budget // page)
    ranked = sorted((u for u in score if u != last), key=lambda u: (-score[u], u))
    return {*ranked[: room - 1], last}


@pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (4, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("lens", [(1,), (200,), (77, 200, 5), (129, 64)])
def test_rows_of_different_length(h, g, lens):
    """The published code takes the last page from the longest row. Unused slots are NaN; capacity exceeds lengths."""
    q, k, _ = qkv(len(lens), h, g, 260)
    for i, n in enumerate(lens):
        k[i, :, n:] = NAN
    kv = KV.dense(k, k, len=torch.tensor(lens, dtype=torch.int32)[:, None].expand(-1, g).contiguous())
    layout = plan(q[:, :, -1:], kv, page=16, logical=4, budget=64)
    layout.validate()
    got = seen(layout, kv)
    for i, n in enumerate(lens):
        for j in range(h):
            want = slow_pages(q[i, j, -1], k[i, j // (h // g), :n], 16, 4, 64)
            assert {e // 16 for e in got[i][j] if e < n} == set(want)
    assert bool(torch.isfinite(oracle(q[:, :, -1:], KV.dense(k, k.nan_to_num(), len=kv.len), layout)).all())


@pytest.mark.parametrize("page,logical", [(64, 16), (16, 16), (16, 1), (12, 3)])
def test_page_scores_bound_every_logit(page, logical):
    """b >= max q.k; small pages of one key make it exact; one small page a page makes it Quest."""
    q, k, _ = qkv(2, 4, 2, 301, d=8)
    bounds = Bounds(logical)
    bounds.update(KV.dense(k, k))
    method = LServe(sparsity=0.0, page=page, logical=logical)
    score = method._of_pages(bounds.score(q[:, :, -1:]).flatten(1, 2))
    exact = torch.einsum("bhd,bhmd->bhm", q[:, :, -1], k.repeat_interleave(2, 1))
    for u in range(-(-301 // page)):
        top = exact[..., u * page : (u + 1) * page].amax(-1)
        assert bool((score[..., u] >= top - 1e-5).all())
        if logical == 1:
            torch.testing.assert_close(score[..., u], top, atol=1e-5, rtol=1e-5)
    if logical == page:
        mine = plan(q[:, :, -1:], KV.dense(k, k), page=page, logical=page, budget=5 * page)
        x = AttnInput(q[:, :, -1:], KV.dense(k, k), "decode", 2, 4, 0.25)
        quest = Quest(page=page, budget=5 * page, dense_layers=0).plan(x, State())
        assert torch.equal(mine.to_mask(), quest.to_mask())


def test_small_pages_find_what_one_large_page_hides():
    """Two halves of a page, each far out on another axis, bound each other up in one page of bounds."""
    k = torch.zeros(1, 1, 640, 4)
    k[0, 0, 0:64:2, 0], k[0, 0, 1:64:2, 1] = 5.0, 5.0  # no key of page 0 has both
    k[0, 0, 320] = torch.tensor([4.0, 4.0, 0.0, 0.0])  # this key has
    q = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)
    for logical, best in ((1, 5), (64, 0)):
        pages = plan(q, KV.dense(k, k), page=64, logical=logical, budget=192).to_mask()[0, 0, 0].view(-1, 64).any(1)
        assert bool(pages[best])
        ranked = LServe(sparsity=0.0, logical=logical)
        bounds = Bounds(logical)
        bounds.update(KV.dense(k, k))
        assert int(ranked._of_pages(bounds.score(q).flatten(1, 2)).argmax()) == best


def test_full_budget_without_streaming_heads_is_dense():
    q, k, v = qkv(1, 4, 2, 250)
    method = LServe(sparsity=0.0, budget=256)
    for phase in ("prefill", "decode"):
        assert method.plan(AttnInput(q[:, :, -1:], KV.dense(k, v), phase, 0, 4, 0.25, start=249), State()) is None
    assert LServe(sparsity=0.0, page=16, budget=16).keep == 3  # never fewer than three pages


# ---------------------------------------------------------------------- streaming heads
@pytest.mark.parametrize("sink,window", [(16, 32), (0, 16), (5, 30), (40, 7)])
@pytest.mark.parametrize("lens", [(1,), (47,), (48,), (49,), (150,), (3, 150, 48, 47, 20, 15, 16)])
def test_streaming_heads_see_sink_and_window_for_any_length(sink, window, lens):
    q, k, _ = qkv(len(lens), 4, 2, 160)
    kv = KV.dense(k, k, len=torch.tensor(lens, dtype=torch.int32)[:, None].expand(-1, 2).contiguous())
    for one in (kv, KV.dense(k[:1, :, : lens[0]], k[:1, :, : lens[0]])):
        b = one.shape[0]
        layout = plan(q[:b, :, -1:], one, page=16, logical=4, sparsity=1.0, sink=sink, window=window)
        layout.validate()
        for i, n in enumerate(lens[:b]):
            want = {j for j in range(n) if j < sink or j >= n - window}
            assert all({e for e in got if e < n} == want for got in seen(layout, one)[i])


def test_streaming_ring_of_the_cache_never_drops_what_is_seen(tmp_path):
    """With duo_attention's cache of the same profile, memory is freed and no output changes."""
    gates = torch.tensor([[0.9, 0.1]] * 4)
    path = profile_of(tmp_path, gates)
    part = "lserve:page=16,logical=4,budget=64,refresh=1,sink=16,window=32,prefill_window=48,profile="
    plain = Drive(part + path)
    freed = Drive(part + path + f"+cache=duo_attention:sink=16,window=32,slack=5,profile={path}")
    q, k, v = qkv(1, 4, 2, 260)
    for drive in (plain, freed):
        drive(*(t[:, :, :200] for t in (q, k, v)))
    for i in range(200, 224):
        a, b = (drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for drive in (plain, freed))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    few = sum(freed.cache.store.lens[0])
    assert few <= 224 + 48 + 6 and plain.cache.store.lens == [[224, 224]]


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("start", [0, 60])
def test_prefill(h, g, start):
    """Streaming heads see the sink and the prompt's own window, the others everything; chunks, last partial block."""
    q, k, v = qkv(1, h, g, 151)
    method = LServe(sparsity=0.5, assign="even", sink=6, prefill_window=37)
    x = AttnInput(q[:, :, start:], KV.dense(k, v), "prefill", 1, 4, 0.25, start=start)
    layout = method.plan(x, State())
    streams = method.streaming(4, g)[1].tolist()
    assert any(streams)
    mask = layout.to_mask()[0]
    for j in range(h):
        for t in range(start, 151):
            want = [i <= t and (not streams[j // (h // g)] or i < 6 or t - i < 37) for i in range(151)]
            assert mask[j, t - start].tolist() == want


def test_a_layer_may_have_no_head_of_a_kind(tmp_path):
    """The quantile is the model's: layers 0 and 1 stream, 2 and 3 do not."""
    path = profile_of(tmp_path, torch.tensor([[0.1, 0.2], [0.3, 0.15], [0.8, 0.9], [0.7, 0.95]]))
    q, k, v = qkv(1, 4, 2, 300)
    for layer, streams in ((0, True), (3, False)):
        drive = Drive(f"lserve:page=16,logical=4,budget=64,sink=16,window=32,prefill_window=64,profile={path}", layer=layer)
        drive(*(t[:, :, :299] for t in (q, k, v)))
        drive(*(t[:, :, 299:] for t in (q, k, v)))
        x, layout, out = drive.last
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
        assert {len(s) for s in seen(layout, x.kv)[0]} == ({48} if streams else {48 + 300 % 16})
        assert drive.watch.calls[0][1].full != streams
        assert (BOUNDS in drive.cache.batch) != streams  # a layer of streaming heads keeps no bounds


def test_even_takes_the_share():
    for share in (0.25, 0.5, 0.6):
        got = LServe(sparsity=share, assign="even").streaming(8, 5)
        assert int(got.sum()) == int(40 * share)


# ---------------------------------------------------------------------- reuse
def test_refresh_one_selects_every_step_and_reuse_only_when_due():
    q, k, v = qkv(1, 4, 2, 330)
    every, some = (Drive(f"decode=lserve:sparsity=0,page=16,logical=4,budget=64,refresh={r}") for r in (1, 4))
    for drive in (every, some):
        drive(*(t[:, :, :290] for t in (q, k, v)))
    same = []
    for i in range(290, 306):
        for drive in (every, some):
            drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        same.append(torch.equal(*(d.last[1].to_mask() for d in (every, some))))
    assert all(same[::4]) and not all(same)


def test_pages_begun_since_the_selection_are_seen():
    """Pages of 2 and 9 steps of one selection: four and a half new pages, each token of them seen."""
    q, k, v = qkv(2, 4, 2, 140)
    drive = Drive("decode=lserve:sparsity=0,page=2,logical=1,budget=8,refresh=9")
    drive(*(t[:, :, :100] for t in (q, k, v)), valid=torch.arange(100) >= torch.tensor([[0], [41]]))
    for i in range(100, 122):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        x, layout, _ = drive.last
        layout.validate()
        for b, row in enumerate(seen(layout, x.kv)):
            n, since = int(x.kv.lengths()[b, 0]), (i - 100) % 9 + 1
            assert all(set(range(n - since, n)) <= keys for keys in row)
            assert all(len(keys) <= 8 + since + 1 for keys in row)


def test_a_selection_stays_in_its_memory():
    """A graph recorded for "reuse" reads what the graph for "select" writes, so the address must never change."""
    q, k, v = qkv(1, 4, 2, 200)
    drive = Drive("decode=lserve:sparsity=0,page=16,logical=4,budget=48,refresh=3")
    drive(*(t[:, :, :150] for t in (q, k, v)))
    where, lists = set(), []
    for i in range(150, 160):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        parts = drive.cache.batch[PAGES].parts
        where.add(tuple(t.data_ptr() for t in parts))
        lists.append((drive.last[1], drive.last[1].to_mask()))
    assert len(where) == 1
    assert all(torch.equal(layout.to_mask(), then) for layout, then in lists)  # plans given out stay what they were


def test_forks_and_rollbacks():
    q, k, v = qkv(1, 4, 2, 240)
    recipe = "decode=lserve:sparsity=0,page=8,logical=4,budget=48,refresh=4"

    def walk(drive, steps, sign=1.0):
        return [drive(*(sign * t[:, :, i : i + 1] for t in (q, k, v))) for i in steps]

    a, b = Drive(recipe), Drive(recipe)
    for drive in (a, b):
        drive(*(t[:, :, :180] for t in (q, k, v)))
        walk(drive, range(180, 186))
    fork = Drive(recipe)
    fork.cache = a.cache.fork()
    walk(a, range(186, 200), -1.0)  # the original selects other pages
    for x, y in zip(walk(fork, range(186, 200)), walk(b, range(186, 200)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)
    for drive in (fork, b):
        drive.cache.truncate(7)
    for x, y in zip(walk(fork, range(210, 216)), walk(b, range(210, 216)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)
    x, layout, _ = b.last
    assert int(layout.to_mask(x.kv)[0, 0, 0].sum()) <= 56
    b.cache.reorder(torch.tensor([0, 0]))
    wide = [torch.cat([t[:, :, 220:221], -t[:, :, 220:221]]) for t in (q, k, v)]
    out = b(*wide)
    torch.testing.assert_close(out, oracle(b.last[0].q, b.last[0].kv, b.last[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", ["sink=16,window=32", "sink=5,window=30"])
def test_pages_of_storage_are_another_matter(sizes):
    """Over paged storage, whose views have room for more than there is, rows of different length see what they see."""
    q, k, v = qkv(2, 4, 2, 170)
    part = f"decode=lserve:assign=even,page=8,logical=4,budget=40,refresh=3,{sizes}"
    dense, paged = Drive(part), Drive(Recipe(decode=part.removeprefix("decode="), storage="paged"))
    for drive in (dense, paged):
        drive(*(t[:, :, :150] for t in (q, k, v)), valid=torch.arange(150) >= torch.tensor([[0], [61]]))
    for i in range(150, 160):
        a, b = (drive(*(t[:, :, i : i + 1] for t in (q, k, v))) for drive in (dense, paged))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
        paged.last[1].validate()


@pytest.mark.parametrize("cache", ["snapkv:window=16,capacity=100", "streaming_llm:sink=4,window=92"])
@pytest.mark.parametrize("options", ["sparsity=0", "assign=even,sink=4,window=30"])
def test_on_an_evicted_cache(cache, options):
    """Pages hold entries; two turns, a ring included; every step is the oracle on the reported layout, newest key seen."""
    q, k, v = qkv(2, 4, 2, 300)
    drive = Drive(f"decode=lserve:{options},page=16,logical=4,budget=48+cache={cache}")
    drive(*(t[:, :, :150] for t in (q, k, v)), valid=torch.arange(150) >= torch.tensor([[0], [30]]))
    for lo, hi in ((150, 162), (190, 198)):
        for i in range(lo, hi):
            drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
            x, layout, out = drive.last
            layout.validate()
            torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
            newest = (x.kv.positions() == x.q_pos[:, :, None]) & x.kv.exists()
            assert bool((layout.to_mask(x.kv)[:, :, 0] & newest.repeat_interleave(2, 1)).any(-1).all())
            if options == "sparsity=0":
                for b, row in enumerate(seen(layout, x.kv)):
                    for j, got in enumerate(row):
                        n = int(x.kv.lengths()[b, j // 2])
                        last = int(newest[b, j // 2].nonzero()) // 16
                        want = slow_pages(x.q[b, j, 0], x.kv.k[b, j // 2, :n], 16, 4, 48, last)
                        assert {e // 16 for e in got} == set(want)
        if lo == 150:
            drive(*(t[:, :, 162:190] for t in (q, k, v)))
    assert drive.cache.evicted


def test_entry_weights_count():
    q, k, v = qkv(1, 2, 1, 160, d=4)
    bias = torch.zeros(1, 1, 160)
    bias[0, 0, 37] = 1e4
    bias[0, 0, 48:144] = float("-inf")
    for got in seen(plan(q[:, :, -1:], KV.dense(k, v, bias=bias), page=16, logical=4, budget=48), None)[0]:
        pages = {e // 16 for e in got}
        assert {2, 9} <= pages and not pages & set(range(3, 9))


# ---------------------------------------------------------------------- graphs, options
@pytest.mark.parametrize("options", ["sparsity=0", "assign=even,share=group", "assign=even,sink=3,window=21"])
def test_captured_steps_are_the_steps(options):
    """Without a device: phases "select" and "reuse" over fixed stores, whose capacity is more than any length."""
    recipe = f"lserve:page=8,logical=4,budget=32,refresh=3,sink=8,window=16,prefill_window=50,{options}"
    recipe = recipe.replace("sink=8,window=16,", "") if "sink=3" in options else recipe
    model, ids = tiny(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with foveate.use(model, recipe):
        want = said(model, ids, mask, 16)
    handle = dry(model, recipe)
    got = said(model, ids, mask, 16)
    assert torch.equal(got, want) and handle.graphs.replays >= 11 and not handle.notes
    assert [LServe(refresh=3).phase(i) for i in range(4)] == ["select", "reuse", "reuse", "select"]
    handle.remove()


def test_a_fixed_store_gives_the_same_plan():
    q, k, v = qkv(1, 4, 2, 200)
    from foveate.cache import DenseStore

    store = DenseStore.empty(k, v).append(k, v, None, [0])
    fixed = FixedDense(store.fork(), [200], 400)
    fixed.k[:, :, 200:] = NAN
    options = dict(page=16, logical=4, budget=64, sparsity=0.5, assign="even", sink=16, window=32)
    a, b = (plan(q[:, :, -1:], s.view(), **options) for s in (store, fixed))
    assert torch.equal(a.to_mask(), b.to_mask()[..., :200])


def test_options():
    assert parse("lserve@8k") == LServe(budget=1024, prefill_window=1024)
    d = LServe()
    assert (d.page, d.logical, d.budget, d.refresh, d.sparsity, d.sink, d.window, d.prefill_window) == (
        64, 16, 4096, 4, 0.5, 128, 256, 8192,
    )  # fmt: skip
    for text, why in (
        ("lserve:logical=24", "logical expected a divisor of page = 64, got 24"),
        ("lserve:page=0", "page expected >= 1, got 0"),
        ("lserve:sparsity=1.5", "sparsity expected between 0.0 and 1.0"),
        ("lserve:assign=random", "assign expected one of gates, even"),
        ("lserve:refresh=0", "refresh expected >= 1"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse(text)


def test_profiles(tmp_path):
    with pytest.raises(ConfigError, match="needs gates; make them with foveate calibrate duo_attention"):
        LServe().streaming(4, 2)
    path = profile_of(tmp_path / "a", torch.rand(3, 2))
    with pytest.raises(ConfigError, match=r"profile expected gates \[layers, kv heads\] = \[4, 2\], got \[3, 2\]"):
        LServe(profile=path).streaming(4, 2)
    Profile("moa").save(tmp_path / "b")
    with pytest.raises(ConfigError, match="made for moa, expected one for duo_attention"):
        LServe(profile=str(tmp_path / "b")).streaming(4, 2)
