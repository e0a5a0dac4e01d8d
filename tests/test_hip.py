"""HiP against a slow transcription of its card."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.hip import HiP
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.tree import depth, descend
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, planned

SMALL = dict(k=32, block_k=2, window=20, sink=4, dense_layers=0)


def text(**options):
    return "hip:" + ",".join(f"{k}={v}" for k, v in options.items())


def search(m, blocks, first, keep, size, rows):
    """One search with loops: sorted block numbers. rows: (position, logits of its query by key); card, steps 2 to 4."""
    look = lambda a, s: {"center": a + s // 2, "first": a, "last": a + max(s - 1, 0)}  # noqa: E731
    groups = [(first + blocks * g // keep, first + blocks * (g + 1) // keep) for g in range(keep)]
    groups = [(a, b) for a, b in groups if b > a]
    while any(b - a > 1 for a, b in groups):
        halves = []
        for a, b in groups:
            mid = a + (b - a) // 2
            halves += [(x, y) for x, y in ((a, mid), (mid, b)) if y > x]
        score = []
        for a, b in halves:
            at = look(a, b - a)[m.representative]
            seen = [logit[j] for p, logit in rows for j in range(at * size, min((at + 1) * size, len(logit))) if j <= p]
            score.append(max(seen, default=-math.inf))
        order = sorted(range(len(halves)), key=lambda i: (-score[i], i))[:keep]
        groups = [halves[i] for i in sorted(order)]
    return [a for a, _ in groups]


def transcribe(m, q, k, start=0):
    """[head][block] -> sorted first keys, for q [1, H, N, D] at positions start.., k [1, G, M, D]."""
    h, n, r = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    out = []
    for head in range(k.shape[1] if m.share == "group" else h):
        mine = range(head * r, head * r + r) if m.share == "group" else [head]
        logits = {x: (q[0, x] @ k[0, x // r].T).tolist() for x in mine}
        lists = []
        for i in range(start // m.block_q, (start + n - 1) // m.block_q + 1):
            lo, hi = max(start, i * m.block_q), min(start + n, (i + 1) * m.block_q)
            at = {min(max(p, lo), hi - 1) for p in range(i * m.block_q, (i + 1) * m.block_q, m.stride)}
            rows = [(p, logits[x][p - start]) for p in sorted(at) for x in mine]
            first = m.sink // m.block_k
            blocks = max(0, -(-(hi - m.window) // m.block_k) - first)
            found = search(m, blocks, first, m.groups, m.block_k, rows)
            width = m.tile or m.block_k
            lists.append(sorted({b * m.block_k // width * width for b in found}))
        out.append(lists)
    return out


def lists_of(layout):
    t, c = layout.tiles[0].tolist(), layout.tile_count[0].tolist()
    return [[row[:n] for row, n in zip(rows, counts, strict=True)] for rows, counts in zip(t, c, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"share": "group", "tile": 16, "k": 24, "block_k": 8}], ids=["head", "group"])
def test_selection(case, options):
    """Index by index, on whole prompts whose last block is partial."""
    m = HiP(**SMALL | options)
    q, k, _, _ = case.make()
    layout = planned(text(**SMALL | options), case)
    layout.validate()
    assert (layout.block_q, layout.tile_width) == (64, m.tile or m.block_k)
    assert lists_of(layout) == transcribe(m, q.double(), k.double())


@pytest.mark.parametrize("options", [{"representative": "first"}, {"representative": "last", "stride": 8, "k": 30}])
def test_selection_of_variants(options):
    q, k, _, _ = CASES[0].make()
    assert lists_of(planned(text(**SMALL | options), CASES[0])) == transcribe(HiP(**SMALL | options), q, k)


@pytest.mark.parametrize("h,g,start,n", [(1, 1, 128, 100), (3, 1, 131, 3), (4, 1, 100, 77), (8, 1, 131, 1), (4, 2, 64, 70)])
@pytest.mark.parametrize("share", ["head", "group"])
def test_chunks_and_groups(h, g, start, n, share):
    """A chunk, also one inside a block, is planned at its true positions."""
    q, k, v = qkv(1, h, g, start + n)
    m = HiP(**SMALL, share=share)
    x = AttnInput(q[:, :, start:], KV.dense(k, v), "prefill", 3, 4, 0.25, start=start)
    layout = m.plan(x, State())
    layout.validate()
    assert lists_of(layout) == transcribe(m, x.q, k, start)


def test_chunks_of_whole_blocks_change_nothing():
    q, k, v = qkv(1, 2, 1, 200)
    whole, parts = Drive(text(**SMALL)), Drive(text(**SMALL))
    want = whole(q, k, v)
    got = [parts(*(t[:, :, a:b] for t in (q, k, v))) for a, b in ((0, 64), (64, 128), (128, 200))]
    torch.testing.assert_close(torch.cat(got, 2), want, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- version 1.2
STAGED = SMALL | dict(k=64, block_k=8, stages="32x4/16x4x160/8x1x96")


def best_met(logits, a, b):
    """Binary search for the best key of a..b: the larger logit of all keys it compares. logits: of each mean query."""
    at = lambda j: max(row[j] for row in logits)  # noqa: E731
    met = []
    while b - a > 1:
        mid = a + (b - a) // 2
        left, right = at(a + (mid - a) // 2), at(mid + (b - mid) // 2)
        met += [left, right]
        a, b = (a, mid) if left >= right else (mid, b)
    return max(met) if met else at(a)


def transcribe_stages(m, q, k, start=0):
    """[head][block] -> sorted first keys, for query rows that all see every candidate (window >= block)."""
    n, r = q.shape[2], q.shape[1] // k.shape[1]
    stages = [tuple(map(int, p.split("x"))) for p in m.stages.split("/")]
    out = []
    for head in range(q.shape[1]):
        lists = []
        for i in range(start // m.block_q, (start + n - 1) // m.block_q + 1):
            at = [min(max(p, start), start + n - 1) - start for p in range(i * m.block_q, (i + 1) * m.block_q)]
            end = min(start + n, (i + 1) * m.block_q) - m.window
            ranges = [
                (a, min(a + stages[0][0], end)) for a in range(m.sink // stages[0][0] * stages[0][0], end, stages[0][0])
            ]
            for s, (chunk, stride, *_) in enumerate(stages):
                ranges = [(a, min(a + chunk, y)) for x, y in ranges for a in range(x, y, chunk)]
                means = q[0, head, at].unflatten(0, (-1, stride)).mean(1)
                logits = (means @ k[0, head // r].T).tolist()
                score = [best_met(logits, a, b) for a, b in ranges]
                keep = (stages[s + 1][2] if s + 1 < len(stages) else m.k) // chunk
                order = sorted(range(len(ranges)), key=lambda t: (-score[t], t))[:keep]
                ranges = [ranges[t] for t in sorted(order)]
            lists.append([a for a, _ in ranges])
        out.append(lists)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_in_stages(case):
    options = STAGED | {"window": 64}
    q, k, _, _ = case.make()
    layout = planned(text(**options), case)
    layout.validate()
    assert layout.tile_width == 8 and lists_of(layout) == transcribe_stages(HiP(**options), q.double(), k.double())


@pytest.mark.parametrize("h,g,start,n", [(3, 1, 192, 100), (8, 1, 203, 1), (4, 2, 150, 130)])
def test_stages_on_chunks(h, g, start, n):
    options = STAGED | {"window": 64}
    q, k, v = qkv(1, h, g, start + n)
    x = AttnInput(q[:, :, start:], KV.dense(k, v), "prefill", 3, 4, 0.25, start=start)
    assert lists_of(HiP(**options).plan(x, State())) == transcribe_stages(HiP(**options), x.q, k, start)


def test_stages_with_room_are_dense_and_decode_is_the_oracle():
    q, k, v = qkv(1, 4, 2, 310)
    for options in ({}, {"share": "group"}, {"k": 240, "stages": "32x4/8x2x300"}):
        drive = Drive(text(**STAGED | options))
        drive(*(t[:, :, :300] for t in (q, k, v)))
        for i in range(300, 310):
            drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        for x, layout, out in drive.watch.calls:
            layout.validate()
            assert layout.tiles.shape[1] == (2 if "share" in options else 4)
            torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
    x, layout, _ = drive.watch.calls[0]
    rows = layout.to_mask()[:, :, :256]
    assert bool((rows == torch.ones(256, 300, dtype=torch.bool).tril()).all())


def test_rising_logits_are_followed_through_the_stages():
    """A binary search finds the peak of logits that rise towards it, wherever it lies."""
    for at in range(20, 270, 13):
        k = torch.zeros(1, 1, 300, 16)
        k[0, 0, :, 0] = -(torch.arange(300) - at).abs().float() * 0.1
        q = torch.zeros(1, 1, 300, 16)
        q[..., 0] = 1.0
        x = AttnInput(q, KV.dense(k, k), "prefill", 3, 4, 0.25)
        assert at // 8 * 8 in lists_of(HiP(**STAGED | {"k": 8}).plan(x, State()))[0][-1]


# ---------------------------------------------------------------------- the search itself
def one(score, keep, size=1, **options):
    """Blocks that a search of one query keeps, where key j has the logit score[j]."""
    t = -(-len(score) // size)
    k = torch.tensor(score, dtype=torch.float64).view(1, 1, -1, 1)
    q, zero = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.int64)
    levels = options.pop("levels", depth(t, keep))
    at = zero[..., None] + len(score)
    found, live = descend(q, at, KV.dense(k, k), zero, zero + t, keep=keep, block=size, levels=levels, scale=1.0, **options)
    return found[live].tolist()


@pytest.mark.parametrize("t", range(1, 9))
def test_a_short_range_comes_back_whole(t):
    assert one([float(-j) for j in range(t)], keep=8) == list(range(t))
    assert one([float(-j) for j in range(t)], keep=8, levels=3) == list(range(t))  # of a neighbour with a longer range


def test_constant_groups_give_the_exact_top_k():
    gen = torch.Generator().manual_seed(1)
    for levels in (1, 2, 3, 4):
        score = torch.randperm(16, generator=gen).double().repeat_interleave(2**levels)
        found = one(score.tolist(), keep=16)
        assert len(set(found)) == 16 and found == sorted(found)
        assert score[found].sum() == score.topk(16).values.sum()


@pytest.mark.parametrize("t,keep", [(100, 8), (129, 8), (127, 5), (64, 8), (9, 8), (37, 36)])
def test_ranges_of_any_length(t, keep):
    """Every search ends with single blocks after ceil(log2(T / m)) levels (one more by rounding), none twice."""
    gen = torch.Generator().manual_seed(t)
    score = torch.randn(t, generator=gen).tolist()
    assert math.ceil(math.log2(t / keep)) <= depth(t, keep) <= math.ceil(math.log2(t / keep)) + 1
    found = one(score, keep)
    assert len(found) == keep and found == sorted(set(found)) and found[0] >= 0 and found[-1] < t
    assert found == one(score, keep, levels=depth(t, keep) + 2)  # levels to spare change nothing
    assert search(HiP(), t, 0, keep, 1, [(t, score)]) == found


def test_a_wide_bump_is_found_and_a_needle_may_be_missed():
    t, keep = 256, 8
    for at in range(0, t - 2 * t // keep, 7):
        score = [0.0] * t
        for j in range(at, at + 2 * t // keep):
            score[j] = 5.0 if j % 2 else 4.0
        assert all(at <= j < at + 2 * t // keep for j in one(score, keep))
    lost = 0
    for at in range(t):
        score = [float(j % 7) for j in range(t)]
        score[at] = 50.0
        lost += at not in one(score, keep)
    assert lost > t // 2  # expected: locality is the method's assumption


def test_representatives():
    score = [0.0] * 8 + [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]
    assert 11 not in one(score, 2, representative="first")
    assert 11 in one(score, 2, representative="last")


# ---------------------------------------------------------------------- decode
def steps(drive, q, k, v, a, b):
    for i in range(a, b):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    return [c for c in drive.watch.calls if c[0].phase == "decode"]


def test_decode_searches_with_its_query():
    q, k, v = qkv(1, 4, 2, 210)
    m = HiP(**SMALL, refresh=1)
    drive = Drive(text(**SMALL, refresh=1))
    drive(*(t[:, :, :200] for t in (q, k, v)))
    for x, layout, out in steps(drive, q, k, v, 200, 210):
        layout.validate()
        n = x.kv.capacity
        for h in range(4):
            rows = [(n, (x.kv.k[0, h // 2] @ x.q[0, h, 0]).tolist())]
            want = search(m, -(-(n - m.window) // m.block_k) - 2, 2, m.groups, 2, rows)
            assert [t // 2 for t in lists_of(layout)[h][0]] == want
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)


def test_a_list_is_used_again_and_nothing_falls_between():
    """Three steps share a search; the window reaches back to where that search ended."""
    q, k, v = qkv(2, 4, 2, 220)
    valid = torch.arange(200) >= torch.tensor([[0], [31]])
    drive = Drive(text(**SMALL, refresh=3))
    drive(*(t[:, :, :200] for t in (q, k, v)), valid=valid)
    got = steps(drive, q, k, v, 200, 209)
    for i, (x, layout, _) in enumerate(got):
        assert torch.equal(layout.tiles, got[i - i % 3][1].tiles)
        assert set(layout.window.flatten().tolist()) == {20 + i % 3}
        want = x.q_pos[:, 0] - 20 - i % 3  # the newest key outside the window was a candidate of the search
        assert (want < got[i - i % 3][0].kv.lengths()[:, 0] - 20).all()
    assert any(not torch.equal(got[i][1].tiles, got[i - 3][1].tiles) for i in range(3, 9))


def test_a_list_does_not_outlive_what_it_was_made_for():
    """Another turn of many tokens, a rollback and another batch row start a new search."""
    q, k, v = qkv(1, 4, 2, 260)
    drive = Drive(text(**SMALL, refresh=50))
    drive(*(t[:, :, :200] for t in (q, k, v)))
    first = steps(drive, q, k, v, 200, 202)[-1][1]
    drive(*(t[:, :, 202:257] for t in (q, k, v)))
    second = steps(drive, q, k, v, 257, 258)[-1][1]
    assert second.window.tolist() == [[20]] and not torch.equal(first.tiles, second.tiles)
    assert "hip.list" in drive.cache.batch
    drive.cache.truncate(1)
    assert "hip.list" not in drive.cache.batch
    state = State()
    for dense in (HiP(**SMALL, refresh=50), HiP(**SMALL | {"k": 16}, refresh=50)):
        x = AttnInput(q[:, :, -1:], KV.dense(k, v), "decode", 3, 4, 0.25, q_pos=torch.tensor([[259]]))
        assert int(dense.plan(x, state).tile_count.max()) == dense.groups


@pytest.mark.parametrize("storage", ["dense", "paged"])
@pytest.mark.parametrize("turn", [2, 17, 55])
def test_a_turn_of_any_length_starts_a_new_search(turn, storage):
    """Its query is another one; whether pages have room for it must not matter."""
    q, k, v = qkv(1, 4, 2, 260)
    drive = Drive(replace(Recipe.of(text(**SMALL, refresh=50)), storage=storage))
    drive(*(t[:, :, :200] for t in (q, k, v)))
    first = steps(drive, q, k, v, 200, 202)[-1][1]
    drive(*(t[:, :, 202 : 202 + turn] for t in (q, k, v)))
    second = steps(drive, q, k, v, 202 + turn, 203 + turn)[-1][1]
    assert second.window.tolist() == [[20]] and not torch.equal(first.tiles, second.tiles)


@pytest.mark.parametrize("cache", ["snapkv:window=16,capacity=100", "streaming_llm:sink=4,window=92"])
def test_on_an_evicted_cache(cache):
    """Entries stand in no order there: the whole cache is searched, every step."""
    q, k, v = qkv(1, 4, 2, 220)
    drive = Drive(f"prefill=dense+decode={text(**SMALL, refresh=8)}+cache={cache}")
    drive(*(t[:, :, :150] for t in (q, k, v)))
    for x, layout, out in steps(drive, q, k, v, 150, 190):
        assert not layout.full and layout.window.tolist() == [[20]]  # made in this step
        layout.validate()
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
        newest = (x.kv.positions() == x.q_pos[:, :, None]) & x.kv.exists()
        assert bool((layout.to_mask(x.kv)[:, :, 0] & newest.repeat_interleave(2, 1)).any(-1).all())


def test_entry_weights_count():
    """A block whose entries carry a high bias wins; one of -inf never does."""
    q, k, v = qkv(1, 2, 1, 200)
    bias = torch.zeros(1, 1, 200)
    bias[..., 60:80] = 1e4
    bias[..., 100:180] = float("-inf")
    x = AttnInput(q[:, :, -1:], KV.dense(k, v, bias=bias), "decode", 3, 4, 0.25, q_pos=torch.tensor([[199]]))
    for row in lists_of(HiP(**SMALL | {"k": 20}).plan(x, State())):
        assert sum(60 <= e < 80 for e in row[0]) >= 8 and not any(100 <= e < 180 for e in row[0])


def test_paged_and_ragged_storage():
    q, k, v = qkv(1, 4, 2, 192)
    x = AttnInput(q[:, :, -1:], KV.dense(k, v), "decode", 3, 4, 0.25, q_pos=torch.tensor([[191]]))
    want = HiP(**SMALL).plan(x, State())
    gen = torch.Generator().manual_seed(3)
    table = torch.randperm(24, generator=gen).view(1, 2, 12).int()
    pools = []
    for t in (k, v):
        pool = torch.full((24, 16, t.shape[-1]), float("nan"))
        pool[table.flatten().long()] = t.reshape(24, 16, -1)
        pools.append(pool)
    length = torch.full((1, 2), 192, dtype=torch.int32)
    paged = KV.paged(*pools, table, length)
    ragged = KV.ragged(k.reshape(-1, 16), v.reshape(-1, 16), torch.tensor([[0, 192]]), length, 192)
    for kv in (paged, ragged):
        got = HiP(**SMALL).plan(AttnInput(x.q, kv, "decode", 3, 4, 0.25, q_pos=x.q_pos), State())
        assert lists_of(got) == lists_of(want)


def test_dense_where_it_must_be():
    q, k, v = qkv(1, 4, 2, 300)
    x = lambda n, layer=3: AttnInput(q[:, :, :n], KV.dense(k[:, :, :n], v[:, :, :n]), "prefill", layer, 4, 0.25)  # noqa: E731
    assert HiP(**SMALL).plan(x(56), State()) is None and HiP(**SMALL).plan(x(57), State()) is not None
    assert HiP(**SMALL | {"dense_layers": 3}).plan(x(300, 2), State()) is None
    mask = HiP(**SMALL | {"k": 232}).plan(x(300), State()).to_mask()
    assert bool((mask[:, :, :256] == torch.ones(256, 300, dtype=torch.bool).tril()).all())  # all candidates fit in k
    assert not bool((mask == torch.ones(300, 300, dtype=torch.bool).tril()).all())


@pytest.mark.parametrize("n", [33, 35, 36])
def test_a_longer_row_beside_it_changes_no_plan_of_a_prompt(n):
    """Dense up to sink + window + k tokens of its own, not of the view that pages of a batch have."""
    q, k, v = qkv(2, 4, 2, 50)
    valid = torch.arange(50) >= torch.tensor([[50 - n], [0]])
    text = "prefill=hip:k=10,block_q=16,block_k=4,sink=5,window=20,dense_layers=0"
    alone, beside = Drive(text), Drive(replace(Recipe.of(text), storage="paged"))
    alone(*(t[:1, :, 50 - n :] for t in (q, k, v)))
    beside(q, k, v, valid)
    (a, one, _), (b, other, _) = alone.last, beside.watch.calls[0]
    assert b.kv.kind == "paged" and b.kv.capacity == 50 and one.full == other.full == (n <= 35)
    assert torch.equal(one.to_mask(a.kv), other.to_mask(b.kv)[..., :n])


def test_options():
    m = parse("hip")
    want = dict(k=512, block_q=64, block_k=2, stride=2, sink=16, window=256, refresh=8, dense_layers=3, tile=None)
    assert {name: getattr(m, name) for name in want} == want and (m.representative, m.share) == ("center", "head")
    assert m.min_length == 5120 and abs(3 * (math.log2(9.94 / 2) + 1) - 9.94) < 0.01
    assert parse("hip@ruler").k == 2048
    assert (
        parse("hip@infinite").steps == ((256, 4, 0), (32, 4, 32768), (8, 1, 8192))
        and parse("hip@infinite").min_length == 8192
    )
    for stages in ("8x1x4", "32x4/8", "32x4/0x1x64", "axb", "32x4/24x1x64", "32x4/8x1x16", "32x4", "32x3/8x1x64"):
        with pytest.raises(ConfigError, match="hip: stages expected"):
            HiP(block_k=8, stages=stages)
    for bad in ("hip:k=0", "hip:k=2,block_k=4", "hip:tile=3", "hip:representative=random", "hip:window=0", "hip:refresh=0"):
        with pytest.raises(ConfigError, match="hip"):
            parse(bad)
