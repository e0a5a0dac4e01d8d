"""Drafts as replayed graphs from one verification to the next, without a device: captures are counted, tokens are dense."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate import payoff, speculate
from foveate.cache import fixed
from foveate.cache import store as cache_store
from foveate.cache.dense import DenseStore
from foveate.cache.fixed import FixedDense, fix
from foveate.methods.base import Selection
from foveate.methods.pillar_attn import HELD, SEEN
from tests.models import tiny, tokens
from tests.test_graphs import Strict

PILLAR = "pillar_attn:draft=4,ratio=0.2,least=12"


class Counts(Strict):
    """Keeps the decode step of every step that was recorded, and the tokens of every call of a few."""

    def __init__(self, handle):
        super().__init__(handle)
        self.recorded, self.stores, self.verified = [], [], []

    def record(self, cache, held):
        if (n := held.ids.shape[1]) > 1:
            self.verified.append(n)
        else:
            self.recorded.append(cache.layers[0].cache.steps)
            self.stores.append([id(s) for s in held.stores])
        return super().record(cache, held)


def counting(model, recipe, **options):
    handle = foveate.apply(model, recipe, **options)
    handle.graphs = Counts(handle)
    handle.graphs.install()
    return handle


def run(model, ids, mask=None, new=32, **options):
    options = dict(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None) | options
    return model.generate(ids, attention_mask=mask, **options)


def ragged(rows, n=45):
    ids = tokens(rows, n)
    mask = torch.ones_like(ids)
    mask[-1, : 17 * (rows > 1)] = 0
    return ids * mask, mask


# ---------------------------------------------------------------------- the loop
@pytest.mark.parametrize("family,recipe,rows", [
    ("qwen3", PILLAR, 2), ("gemma3_text", PILLAR, 1), ("llama", "pillar_attn:draft=4,ratio=0.2,least=12,dense_layers=1", 1),
])  # fmt: skip
@torch.no_grad()
def test_captures_end_with_the_third_cycle(family, recipe, rows):
    """Two graphs serve all drafts: the step that makes the set and the one that uses it. The first cycle has no scores yet,
    so its graph goes with them; then each is run once and recorded once, and everything behind is replayed. Of verifications
    the third is recorded."""
    model, (ids, mask) = tiny(family), ragged(rows)
    want, plain = run(model, ids, mask), speculate.Stats()
    with foveate.use(model, recipe):
        run(model, ids, mask, custom_generate=speculate.generate, stats=plain)
    handle = counting(model, recipe)
    graphs, marks, cycle = handle.graphs, [], speculate.loop.Loop._cycle

    def watched(self, *args):
        out = cycle(self, *args)
        marks.append((len(graphs.recorded), graphs.replays, graphs.calls.replays))
        return out

    stats = speculate.Stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculate.loop.Loop, "_cycle", watched)
        got = run(model, ids, mask, custom_generate=speculate.generate, stats=stats)
    assert torch.equal(got, want) and not [note for note in handle.notes if "captured" in note]
    assert (stats.cycles, stats.accepted) == (plain.cycles, plain.accepted) and stats.cycles >= 7  # the same sets
    assert [m[0] for m in marks[:3]] == [1, 2, 3] and marks[-1][0] == 3  # captures after each cycle
    assert graphs.recorded == [2, 2, 0]
    replayed = [b[1] - a[1] for a, b in zip(marks[2:], marks[3:], strict=False)]
    assert len(replayed) >= 4 and all(n == 4 for n in replayed[:-4] or replayed[:1])  # the last cycles draft less
    assert graphs.verified[:1] == [5] and [m[2] for m in marks[:5]] == [0, 0, 1, 2, 3] and not graphs.verified.count(5) > 1
    handle.remove()


@torch.no_grad()
def test_any_method_that_has_a_word_on_it_and_no_other():
    """A dense draft is accepted whole and captured once; quest remembers bounds, and its graphs end with each call."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 45)
    want = run(model, ids)
    for recipe, again in (("dense", 0), ("decode=quest:page=4,budget=8,dense_layers=0", 3)):
        handle, stats = counting(model, recipe), speculate.Stats()
        got = run(model, ids, custom_generate=speculate.generate, draft=4, stats=stats)
        assert torch.equal(got, want) and stats.cycles >= 6 and (again or stats.rate == 1)
        recorded = handle.graphs.recorded
        assert len(recorded) > again and (again or len(recorded) == 1)
        assert set(recorded) == {2}  # step 0 is a call's own, step 1 ran with all its kernels
        handle.remove()


@torch.no_grad()
def test_a_store_that_grows_is_captured_anew(monkeypatch):
    """No room for a draft and its verification: the entries move to a larger store, and graphs are recorded once more."""
    for module in (cache_store, fixed):
        monkeypatch.setattr(module, "SLACK", 30)
    model, ids = tiny(num_hidden_layers=2), tokens(1, 60)
    want = run(model, ids, new=75)
    handle, stats = counting(model, PILLAR), speculate.Stats()
    got = run(model, ids, new=75, custom_generate=speculate.generate, stats=stats)
    assert torch.equal(got, want) and stats.cycles > 14
    places = {tuple(s) for s in handle.graphs.stores}
    assert 2 <= len(places) <= 3 and len(handle.graphs.recorded) <= 1 + 2 * len(places)
    assert 2 <= handle.graphs.verified.count(5) <= len(places) and handle.graphs.calls.replays >= 4
    handle.remove()


@torch.no_grad()
def test_sampled_drafts_are_replayed():
    """With the same random numbers, drafts from graphs give the tokens of drafts without."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 45)
    out = []
    for make in (foveate.apply, counting):
        handle = make(model, PILLAR)
        torch.manual_seed(5)
        out.append(run(model, ids, new=36, do_sample=True, temperature=1.3, custom_generate=speculate.generate))
        if make is counting:
            assert len(handle.graphs.recorded) == 3 and handle.graphs.replays > 30
        handle.remove()
    assert torch.equal(*out)


# ---------------------------------------------------------------------- rollbacks by hand
def cycles(model, ids, back, turns=None, keep=0):
    """Logits of every call, of a verification the last `keep` (5 is a reason to capture it): drafts of 4, a verification of
    5, of which the last `back[i]` tokens go."""
    out = [model(ids, use_cache=True)]
    cache = out[0].past_key_values
    more = tokens(1, 5 * len(back), seed=3).to(ids.device)
    for i, r in enumerate(back):
        if turns and i in turns:
            turns[i](model, cache)
        for t in range(4):
            out.append(model(input_ids=more[:, 5 * i + t : 5 * i + t + 1], past_key_values=cache, use_cache=True))
        cache.crop(-4)
        new = more[:, 5 * i : 5 * i + 5]
        out.append(model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=keep))
        if r:
            cache.crop(-r)
    return torch.cat([o.logits[0, -max(1, keep) :] for o in out]), cache


def remembered(cache):
    """What the host knows of a cache, but for what a replayed step does not tell it and where it lies."""
    layer = cache.layers[1]
    held, seen = layer.cache, layer.cache.rows[0].get(SEEN)
    row = None if seen is None else (seen.first.tolist(), seen.above, seen.since, seen.alive, seen.number)
    return layer.columns, held.seen, held.steps, held.pending, held.fresh, held.store.lens, row


BACKS = [(0, 1, 2, 3, 4, 0, 4, 4), (5, 5, 0, 5, 2, 6, 1, 9)]


@pytest.mark.parametrize("backs,keep", [(BACKS[0], 5), (BACKS[1], 5), (BACKS[1], 0)])
@torch.no_grad()
def test_rollbacks_of_every_length(backs, keep):
    """5 takes the whole verification back and with it the scores, 6 and 9 some of what came before."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 60)
    with foveate.use(model, PILLAR):
        want, plain = cycles(model, ids, backs, keep=keep)
    handle = counting(model, PILLAR)
    got, cache = cycles(model, ids, backs, keep=keep)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert handle.graphs.replays >= 8 and handle.graphs.calls.replays == (6 if keep else 0)
    store = cache.layers[1].cache.store
    assert store.now.tolist() == [[n] * 2 for n in store.count] and store.seen_now.tolist() == cache.seen
    assert remembered(cache) == remembered(plain)
    handle.remove()


@torch.no_grad()
def test_what_ends_the_graphs():
    """A rollback in the middle of a draft, a fork, and a long second turn, which gives no scores."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 60)
    longer, step = tokens(1, 9, seed=8), tokens(1, 1, seed=9)
    seen = []

    def middle(model, cache):
        for n in (1, 3):
            model(input_ids=step, past_key_values=cache, use_cache=True)
            model(input_ids=step, past_key_values=cache, use_cache=True)
            cache.crop(-n)  # 3: also the last token of the verification
            seen.append(model(input_ids=step, past_key_values=cache, use_cache=True).logits[:, -1])
        cache.crop(-2)

    say = lambda m, c, ids: seen.append(m(input_ids=ids, past_key_values=c, use_cache=True).logits[:, -1])  # noqa: E731
    turns = {4: middle, 5: lambda m, c: say(m, c, longer), 6: lambda m, c: say(m, c.fork(), step)}
    backs = (1, 2, 0, 3, 1, 2, 0, 1, 3)
    with foveate.use(model, PILLAR):
        want = torch.cat([cycles(model, ids, backs, turns, keep=5)[0], *seen])
    handle = counting(model, PILLAR)
    seen.clear()
    got, _ = cycles(model, ids, backs, turns, keep=5)
    torch.testing.assert_close(torch.cat([got, *seen]), want, atol=1e-4, rtol=1e-4)
    assert handle.graphs.replays >= 12 and handle.graphs.calls.replays >= 4 and not handle.graphs.calls.failed
    handle.remove()


@torch.no_grad()
def test_the_age_of_a_set_that_a_replay_made():
    """The host saw a set of an older and longer pass; the one in use is of a short pass, which a rollback takes whole."""
    model, ids = tiny(num_hidden_layers=2), tokens(1, 60)
    more, text = tokens(1, 12, seed=3), "pillar_attn:draft=4,rows=12,ratio=0.2,least=12"

    def talk():
        cache = model(ids, use_cache=True).past_key_values
        say = lambda ids: model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]  # noqa: E731
        for n in (12, 12, 2):
            for t in range(4):
                say(more[:, t : t + 1])
            cache.crop(-4)
            say(more[:, :n])
        out = [say(more[:, :1]), say(more[:, 1:2])]
        cache.crop(-4)
        return torch.cat([*out, *(say(more[:, t : t + 1]) for t in range(3))])

    with foveate.use(model, text):
        want = talk()
    handle = counting(model, text)
    torch.testing.assert_close(talk(), want, atol=1e-4, rtol=1e-4)
    assert handle.graphs.recorded[:3] == [2, 2, 0] and handle.graphs.replays >= 8
    handle.remove()


@pytest.mark.parametrize("backs", [(1, 2), (2,), (3,)])
@torch.no_grad()
def test_a_rollback_past_a_dense_step_that_was_replayed(backs):
    """Rounds of 4: step 16 makes the set by a replay, and the host saw the one of step 8. (1, 2): a step between the two."""
    model, ids, new, text = tiny(num_hidden_layers=2), tokens(1, 60), tokens(1, 40, seed=3), "pillar_attn:draft=3,least=8"

    def talk():
        cache, out = model(ids, use_cache=True).past_key_values, []

        def say(a, b):
            for t in range(a, b):
                out.append(model(input_ids=new[:, t : t + 1], past_key_values=cache, use_cache=True).logits[:, -1])

        say(0, 18)
        for n in backs:
            cache.crop(-n)
            say(18, 19)
        say(19, 23)
        return torch.cat(out)

    with foveate.use(model, text):
        want = talk()
    handle = counting(model, text)
    torch.testing.assert_close(talk(), want, atol=1e-4, rtol=1e-4)
    assert handle.graphs.recorded[:4] == [2, 6, 7, 8] and handle.graphs.replays >= 10
    handle.remove()


@torch.no_grad()
def test_a_gate_that_opens_within_a_draft(monkeypatch):
    """The first step of a draft is dense, so nothing makes a set; the graph of an earlier draft would use that one's."""
    for module in ("runtime", "adapters.graphs"):
        monkeypatch.setattr(f"foveate.{module}.pay_off", lambda *a: payoff.PayOff(70, "of this test"))
    model, ids, backs = tiny(num_hidden_layers=2), tokens(1, 60), (0, 4, 4, 4, 4, 4, 4, 4)  # from 65 on one token a cycle
    with foveate.use(model, PILLAR, gate=True):
        want, _ = cycles(model, ids, backs)
    handle = counting(model, PILLAR, gate=True)
    got, _ = cycles(model, ids, backs)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert handle.graphs.replays >= 6
    handle.remove()


@torch.no_grad()
def test_sets_and_scores_stay_in_their_memory():
    model, ids = tiny(num_hidden_layers=2), tokens(1, 60)
    places = []
    turns = {i: lambda m, c: places.append(places_of(c)) for i in range(3, 8)}

    def places_of(cache):
        layer = cache.layers[1].cache
        held, seen = layer.batch[HELD], layer.rows[0][SEEN]
        copies.append((held.index.clone(), seen.score.clone()))
        twin = cache.fork().layers[1].cache
        for a, b in ((twin.batch[HELD].index, held.index), (twin.rows[0][SEEN].score, seen.score)):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
        return [t.data_ptr() for t in (held.index, held.count, held.first, seen.score, seen.first)]

    copies = []
    handle = counting(model, PILLAR)
    cycles(model, ids, (1,) * 8, turns)
    assert len(places) == 5 and all(p == places[0] for p in places)
    assert not torch.equal(copies[0][0], copies[-1][0]) and not torch.equal(copies[0][1], copies[-1][1])
    handle.remove()


# ---------------------------------------------------------------------- the store
@pytest.mark.parametrize("rows,evicted", [((21, 21), False), ((20, 13), False), ((22, 14), True)])
def test_a_store_that_stays_is_the_ordinary_store(rows, evicted):
    """Several tokens, single ones and rollbacks in place: views, counts and saved states are those of an ordinary store."""
    gen = torch.Generator().manual_seed(1)
    new = lambda n: (torch.randn(2, 2, n, 8, generator=gen), torch.randn(2, 2, n, 4, generator=gen))  # noqa: E731
    n = max(rows)
    valid = torch.arange(n) >= torch.tensor([[n - r] for r in rows])
    store = DenseStore.empty(*new(0)).append(*new(n), None if min(rows) == n else valid, [0, 0])
    if evicted:  # as many entries of each row
        store = store.select(Selection(torch.arange(0, 14, 2).expand(2, 2, -1), bias=torch.randn(2, 2, 7)))
    twin, seen = fix(store.fork(), list(rows)), list(rows)
    assert isinstance(twin, FixedDense)
    twin.stays = True
    kept = (twin.k, twin.v, twin.now, twin.seen_now)
    before = None
    for size, back in ((1, 0), (9, 3), (1, 1), (5, 5), (2, 7), (1, 0), (1, 0), (9, 0)):
        k, v = new(size)
        store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
        seen = [s + size for s in seen]
        if back and not evicted:
            store.truncate(back)
            twin.truncate(back)
            seen = [s - back for s in seen]
        assert twin.lens == store.lens and twin.seen_now.tolist() == seen
        assert twin.now.tolist() == store.lens and twin.moved == (size > 1 or (back > 0 and not evicted))
        a, b = store.view(), twin.view()
        for r, length in enumerate(store.count):
            for x, y in ((a.k, b.k), (a.v, b.v)):
                assert torch.equal(x[r, :, :length], y[r, :, :length])
            assert torch.equal(a.positions()[r, :, :length], b.positions()[r, :, :length])
            assert a.bias is None or torch.equal(a.bias[r, :, :length], b.bias[r, :, :length])
        assert b.capacity == (twin.k.shape[2] if size == 1 else max(store.count))
        assert (b.len is None) == (size > 1 and store.even)
        if before is not None:
            assert torch.equal(before[0], before[1])  # lengths that a view took are never written
        before = None if b.len is None else (b.len, b.len.clone())
        twin.moved = False
    assert all(x is y for x, y in zip(kept, (twin.k, twin.v, twin.now, twin.seen_now), strict=True))
    s, t = store.state(), twin.state()
    assert s.keys() == t.keys() and all(torch.equal(s[name], t[name]) for name in s)
    big = new(twin.k.shape[2])
    assert type(twin.append(*big, None, seen)) is DenseStore  # no room: an ordinary store, which grows


def test_a_store_that_does_not_stay_is_left_as_it_was():
    new = lambda n: (torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8))  # noqa: E731
    twin = fix(DenseStore.empty(*new(0)).append(*new(10), None, [0]), [10])
    now = twin.now
    twin.truncate(2)
    assert twin.now is not now and not twin.moved and type(twin.append(*new(3), None, [8])) is DenseStore
    with torch.inference_mode():
        held = fix(DenseStore.empty(*new(0)).append(*new(10), None, [0]), [10])
    held.stays = True
    held.truncate(1)  # outside: lengths made inside cannot be written
    assert held.now.tolist() == [[9, 9]] and not held.moved
