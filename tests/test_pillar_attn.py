"""PillarAttn against a slow transcription of its card: scores of a verification, the set, what a rollback leaves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.cache import LayerCache
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods.pillar_attn import HELD, SEEN, PillarAttn, mean_mass
from foveate.recipe import Recipe
from foveate.registry import parse
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.models import tiny, tokens
from tests.test_graphs import Strict, said

few = settings(max_examples=20, deadline=None)


def slow_scores(q, k, start):
    """The card's a_j: q [H, N, D] at positions start.., k [G, M, D] with M = start + N. [G][M] floats."""
    h, n, d = q.shape
    g, m, _ = k.shape
    out = []
    for j in range(g):
        rows = []
        for head in range(j * h // g, (j + 1) * h // g):
            for i in range(n):
                z = (k[j, : start + i + 1].double() @ q[head, i].double()) / math.sqrt(d)
                rows.append(torch.cat([z.softmax(0), torch.zeros(m - start - i - 1)]))
        total = torch.stack(rows).sum(0)
        out.append([float(total[e]) / (h // g * min(n, m - e)) for e in range(m)])
    return out


def slow_set(score, start, kept, ratio, least):
    """The card's set of one kv head after a verification at `start` whose cache was cut to `kept` tokens."""
    budget = max(least, math.ceil(ratio * kept - 1e-9))
    recent = kept - start  # accepted + 1
    ranked = sorted(range(start), key=lambda e: (-score[e], e))
    return sorted(ranked[: max(0, budget - recent)])


def chosen(layout):
    """[B][G] entry lists."""
    return [
        [layout.entries[b, j, 0, : layout.entry_count[b, j, 0]].tolist() for j in range(layout.entries.shape[1])]
        for b in range(layout.entries.shape[0])
    ]


def seen(layout, kv):
    """[B][H] of every entry a step attends to."""
    return [[row[0].nonzero().flatten().tolist() for row in batch] for batch in layout.to_mask(kv)]


def feed(drive, tensors, a, b):
    return drive(*(t[:, :, a:b] for t in tensors))


@few
@given(
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 1)]),
    start=st.integers(0, 60),
    n=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_scores_are_the_card(heads, start, n, seed):
    q, k, _ = qkv(1, *heads, start + n, d=8, seed=seed)
    pos = torch.arange(start, start + n)[None]
    got = mean_mass(q[:, :, start:], KV.dense(k, k), pos, scale=8**-0.5)[0]
    torch.testing.assert_close(got, torch.tensor(slow_scores(q[0, :, start:], k[0], start)), atol=1e-6, rtol=1e-5)
    visible = (start + n - torch.arange(start + n)).clamp(max=n)
    torch.testing.assert_close((got * visible).sum(-1), torch.full((heads[1],), float(n)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("rejected", [0, 3])
def test_selection_is_the_card(case, rejected):
    """Prompt, verification of 7 tokens of which some are rolled back, drafts: the set, index by index, every step."""
    q, k, v, _ = case.make()
    start, n, ratio, least = 251, 7, 0.1, 20
    drive = Drive(f"pillar_attn:draft=6,ratio={ratio},least={least}", d=q.shape[-1])
    feed(drive, (q, k, v), 0, start)
    feed(drive, (q, k, v), start, start + n)
    if rejected:
        drive.cache.truncate(rejected)
    score, kept = slow_scores(q[0, :, start : start + n], k[0], start), start + n - rejected
    want = [slow_set(s, start, kept, ratio, least) for s in score]
    for t in range(kept, kept + 6):
        out = feed(drive, (q, k, v), t, t + 1)
        x, layout, _ = drive.last
        layout.validate()
        assert chosen(layout) == [want]
        r = q.shape[1] // k.shape[1]
        assert seen(layout, x.kv)[0] == [want[h // r] + list(range(start, t + 1)) for h in range(q.shape[1])]
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
    size = max(least, math.ceil(ratio * kept - 1e-9))
    assert all(len(w) + kept - start == size for w in want)  # recent tokens are inside the budget


def test_a_prompt_gives_no_scores_and_a_dense_step_makes_the_first_set():
    tensors = qkv(1, 4, 2, 120)
    drive = Drive("pillar_attn:draft=3,ratio=0,least=30")
    feed(drive, tensors, 0, 100)
    full, sets = [], []
    for t in range(100, 109):
        feed(drive, tensors, t, t + 1)
        full.append(drive.last[1].full)
        sets.append(None if full[-1] else chosen(drive.last[1]))
    assert full == [True, False, False, False] * 2 + [True]
    x = drive.watch.calls[-2][0]
    score = slow_scores(tensors[0][0, :, 104:105], tensors[1][0, :, :105], 104)
    assert sets[-2] == [[slow_set(s, 104, 105, 0, 30) for s in score]]
    assert x.step == 7


def test_warm_looks_at_the_end_of_a_prompt_and_chunks_change_nothing():
    tensors = qkv(1, 4, 2, 120)
    sets = []
    for cuts in ((0, 100), (0, 64, 100), (0, 96, 100)):
        drive = Drive("pillar_attn:draft=3,rows=4,ratio=0,least=30,warm=true")
        for a, b in zip(cuts, cuts[1:], strict=False):
            feed(drive, tensors, a, b)
        feed(drive, tensors, 100, 101)
        sets.append(chosen(drive.last[1]))
    assert sets[0] == sets[1] == sets[2]
    score = slow_scores(tensors[0][0, :, 96:100], tensors[1][0, :, :100], 96)
    assert sets[0] == [[slow_set(s, 96, 100, 0, 30) for s in score]]


@pytest.mark.parametrize("warm", [False, True])
def test_captured_steps(warm):
    """Rounds begin with a dense step or end with one, by whether the prompt gave scores; both are recorded once."""
    model, ids = tiny(), tokens(2, 60)
    text = f"pillar_attn:draft=3,ratio=0.2,least=12,warm={str(warm).lower()}"
    with foveate.use(model, text):
        want = said(model, ids, steps=24)
    handle = foveate.apply(model, text)
    handle.graphs = Strict(handle)
    handle.graphs.install()
    assert torch.equal(said(model, ids, steps=24), want) and handle.graphs.replays >= 16 and not handle.notes
    handle.remove()
    method = parse("pillar_attn:draft=3")
    assert [method.phase(i) for i in range(9)] == [
        "set", "draft", "draft", "last", "first", "between", "between", "last", "first",
    ]  # fmt: skip


def test_later_rounds_go_by_the_number_of_the_step():
    """What a replayed step would do: a rollback changes what a set covers, not when the next one is due."""
    tensors = qkv(1, 4, 2, 140)
    drive, full = Drive("pillar_attn:draft=3,ratio=0,least=30"), []
    feed(drive, tensors, 0, 100)
    for step in range(13):
        if step in (6, 11):
            drive.cache.truncate(1)
        feed(drive, tensors, 100 + step, 101 + step)
        full.append(drive.last[1].full)
    assert [i for i, dense in enumerate(full) if dense] == [0, 4, 8, 12]


def test_a_rollback_past_the_pass_drops_its_scores():
    """The first query of a pass is a token that was accepted; without it nothing of the pass may be used."""
    tensors = qkv(1, 4, 2, 140)
    for cut, sparse in ((4, True), (5, False)):
        drive = Drive("pillar_attn:draft=4,ratio=0,least=30")
        feed(drive, tensors, 0, 100)
        feed(drive, tensors, 100, 105)
        drive.cache.truncate(cut)
        feed(drive, tensors, 110, 111)
        assert drive.last[1].full is not sparse
    for cut, sparse in ((2, True), (6, True), (7, False)):  # after two drafts
        drive = Drive("pillar_attn:draft=4,ratio=0,least=30")
        feed(drive, tensors, 0, 100)
        feed(drive, tensors, 100, 105)
        feed(drive, tensors, 105, 106)
        feed(drive, tensors, 106, 107)
        first = chosen(drive.last[1])
        drive.cache.truncate(cut)
        feed(drive, tensors, 110, 111)
        assert drive.last[1].full is not sparse
        if sparse:
            assert chosen(drive.last[1]) == first and drive.last[1].window.item() == 7 - cut + 1


def test_no_set_outlives_a_pass():
    """A set of a dense step, a pass, a first step that did not ask the method, as under a length gate: the pass counts."""
    tensors = qkv(1, 4, 2, 120)
    drive = Drive("pillar_attn:draft=3,ratio=0,least=30")
    feed(drive, tensors, 0, 100)
    feed(drive, tensors, 100, 101)
    feed(drive, tensors, 101, 105)
    own, drive.recipe = drive.recipe, Recipe.of("dense")
    feed(drive, tensors, 105, 106)
    drive.recipe = own
    feed(drive, tensors, 106, 107)
    score = slow_scores(tensors[0][0, :, 101:105], tensors[1][0, :, :105], 101)
    assert chosen(drive.last[1]) == [[slow_set(s, 101, 105, 0, 30) for s in score]]


def test_rows_of_different_length_equal_themselves_alone():
    """A batch whose second row is shorter: budgets and sets are each row's own."""
    q, k, v = qkv(2, 4, 2, 130)
    lens = (120, 71)
    drive = Drive("pillar_attn:draft=4,ratio=0.3,least=8")
    valid = torch.arange(120) >= 120 - torch.tensor(lens)[:, None]
    feed_all = [t[:, :, :120].masked_fill(~valid[:, None, :, None], float("nan")) for t in (q, k, v)]
    drive(*feed_all, valid=valid)
    feed(drive, (q, k, v), 120, 124)
    drive.cache.truncate(1)
    feed(drive, (q, k, v), 124, 125)
    for b, n in enumerate(lens):
        alone = Drive("pillar_attn:draft=4,ratio=0.3,least=8")
        one = [t[b : b + 1] for t in (q, k, v)]
        feed(alone, one, 120 - n, 120)
        feed(alone, one, 120, 124)
        alone.cache.truncate(1)
        feed(alone, one, 124, 125)
        assert chosen(alone.last[1]) == [chosen(drive.last[1])[b]]
        torch.testing.assert_close(drive.last[2][b : b + 1], alone.last[2])


def test_forks_and_reordered_rows_keep_their_sets():
    tensors = qkv(2, 4, 2, 130)
    drive = Drive("pillar_attn:draft=4,ratio=0,least=30")
    feed(drive, tensors, 0, 100)
    feed(drive, tensors, 100, 104)
    feed(drive, tensors, 104, 105)
    before = chosen(drive.last[1])
    fork: LayerCache = drive.cache.fork()
    fork.truncate(6)
    drive.cache.reorder(torch.tensor([1, 0]))
    feed(drive, tensors, 105, 106)
    assert chosen(drive.last[1]) == before[::-1]
    assert not fork.batch[HELD].alive and drive.cache.batch[HELD].alive
    assert all(row[SEEN].above == 5 for row in drive.cache.rows)


@pytest.mark.parametrize("storage", ["dense", "paged"])
def test_ratio_one_is_dense(storage):
    tensors = qkv(1, 6, 2, 90)
    drive = Drive(Recipe(decode="pillar_attn:ratio=1.0,least=1", storage=storage))
    feed(drive, tensors, 0, 70)
    feed(drive, tensors, 70, 75)
    for t in range(75, 83):
        out = feed(drive, tensors, t, t + 1)
        want = oracle(tensors[0][:, :, : t + 1], tuple(x[:, :, : t + 1] for x in tensors[1:]))[:, :, -1:]
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        assert not drive.last[1].full and drive.last[1].density(drive.last[0].kv) == 1.0


def test_after_an_eviction():
    """With a cache policy the set names entries that stayed, and the recent part goes by position."""
    tensors = qkv(1, 4, 2, 120)
    drive = Drive("decode=pillar_attn:draft=3,ratio=0,least=24+cache=snapkv:window=8,capacity=40")
    feed(drive, tensors, 0, 100)
    for t in range(100, 106):
        out = feed(drive, tensors, t, t + 1)
        x, layout, _ = drive.last
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
        if not layout.full:
            layout.validate()
            named = x.kv.positions()[0, 0][layout.to_mask(x.kv)[0, 0, 0]].tolist()
            newest = t - 100 if t < 104 else t - 104
            assert set(range(t - newest, t + 1)) <= set(named) and len(named) == 24 + newest


@pytest.mark.parametrize(
    "options,words",
    [({"ratio": 1.5}, "ratio"), ({"draft": 0}, "draft"), ({"least": 0}, "least"), ({"rows": 0}, "rows")],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=f"pillar_attn: {words} expected"):
        PillarAttn(**options)
