"""TokenSelect: lists and outputs against a slow transcription of its card."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.errors import ConfigError, UnsupportedError
from foveate.kv import KV
from foveate.methods import token_select
from foveate.methods.base import AttnInput, State
from foveate.methods.token_select import KEYS, Held, TokenSelect
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.raw_keys import raw_keys
from foveate.scores.turns import Turns
from tests.drive import Drive, Rotary, oracle, qkv
from tests.fidelity import CASES, planned
from tests.models import generate, tiny, tokens
from tests.prompts import call, listed
from tests.test_graphs import Strict, dry, said

SMALL = "token_select:sink=4,local=16,budget=24,chunk=16"


def turn(x, at, freq):
    """Vectors `[n, D]` rotated from positions 0 to `at` `[n]`."""
    a = torch.as_tensor(at, dtype=torch.float64)[:, None] * freq.double()
    x1, x2 = x.double().chunk(2, -1)
    return torch.cat([x1 * a.cos() - x2 * a.sin(), x2 * a.cos() + x1 * a.sin()], -1)


def slow_list(method, q, k, first, rows, freq):
    """S of the card for the rows first..first + rows of q `[1, H, M, D]`, the newest of them the last token."""
    h, g, end = q.shape[1], k.shape[1], first + rows
    if method.total >= end:
        return list(range(end))
    w = torch.zeros(end, dtype=torch.float64)
    low, high = method.sink, end - method.local
    for a in range(h):
        own = torch.arange(rows)
        plain = turn(q[0, a, first:end], -(first + own), freq)  # away from their own positions
        mean = turn(plain, method.local + own, freq).mean(0)  # to the fixed distance
        s = turn(k[0, a // (h // g), low:high], -torch.arange(low, high), freq) @ mean
        w[low:high] += (s * method.temperature).softmax(0)
    left = (method.pool - 1) // 2
    pooled = [max(w[max(0, j - left) : j - left + method.pool].tolist()) for j in range(end)]
    best = sorted(range(low, high), key=lambda j: (-pooled[j], j))[: method.budget]
    return sorted([*range(low), *best, *range(high, end)])


def slow_row(q, k, v, seen, i, scale, freq):
    """The output `[H, D]` of row i on the tokens `seen`, which ends with those of its chunk; positions are ranks."""
    h, g = q.shape[1], k.shape[1]
    mine = [j for j in seen if j <= i]
    out = []
    for a in range(h):
        query = turn(turn(q[0, a, i : i + 1], [-i], freq), [mine.index(i)], freq)[0]
        keys = turn(turn(k[0, a // (h // g), mine], [-j for j in mine], freq), list(range(len(mine))), freq)
        out.append((keys @ query * scale).softmax(0) @ v[0, a // (h // g), mine].double())
    return torch.stack(out)


def slow_prompt(method, q, k, freq, cuts=()):
    """Lists of all chunks of a prompt, cut by `cuts` into calls."""
    out, edges = [], (0, *cuts, q.shape[2])
    for a, b in zip(edges, edges[1:], strict=False):
        for block in range(a // method.chunk, -(-b // method.chunk)):
            r0, r1 = max(a, block * method.chunk), min(b, (block + 1) * method.chunk)
            out.append((slow_list(method, q[:, :, :r1], k[:, :, :r1], r0, r1 - r0, freq), r0, r1))
    return out


def lists(layout):
    return [listed(layout.entries[0, 0, i], layout.entry_count[0, 0, i]) for i in range(layout.num_blocks)]


# ---------------------------------------------------------------------- the card
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_of_a_prompt(case):
    q, k, _, rope = case.make()
    text = "token_select:sink=4,local=64,budget=40,chunk=64,pool=3,temperature=0.1"
    got = lists(planned(text, case))
    assert got == [one for one, *_ in slow_prompt(parse(text), q, k, rope.freq)]


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("peaked", "smollm2-3")], ids=str)
def test_selection_of_chunked_prompts(case):
    """Calls that end inside a chunk: its rows so far share a list, which their own mean chose."""
    q, k, _, rope = case.make()
    text = "token_select:sink=4,local=64,budget=40,chunk=64"
    got = [
        one
        for layout in planned(text, case, chunks=(150, 192, 230))
        for one in (lists(layout) if not layout.full else [None])
    ]
    want = [one for one, *_ in slow_prompt(parse(text), q, k, rope.freq, (150, 192, 230))]
    assert got == want


@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_of_decode_steps(case):
    q, k, v, rope = case.make()
    text = "token_select:sink=4,local=30,budget=20,chunk=16,pool=4"
    drive = Drive(Recipe.of(f"prefill=dense+decode={text}"), d=q.shape[-1])
    object.__setattr__(drive.info, "rope", rope)
    drive(*(t[:, :, :297] for t in (q, k, v)))
    for i in range(297, 300):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        assert lists(drive.last[1]) == [slow_list(parse(text), q[:, :, : i + 1], k[:, :, : i + 1], i, 1, rope.freq)]


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1)])
def test_outputs_count_positions_inside_the_list(h, g):
    q, k, v = qkv(1, h, g, 75)
    method, freq = parse(SMALL), Rotary(16).freq
    drive = Drive(Recipe.of(SMALL))
    out = drive(*(t[:, :, :73] for t in (q, k, v)))
    for seen, r0, r1 in slow_prompt(method, q[:, :, :73], k[:, :, :73], freq)[3:]:
        for i in (r0, r1 - 1):
            want = slow_row(q, k, v, seen, i, 0.25, freq)
            torch.testing.assert_close(out[0, :, i].double(), want, atol=1e-5, rtol=1e-4)
    for i in (73, 74):
        out = drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        seen = slow_list(method, q[:, :, : i + 1], k[:, :, : i + 1], i, 1, freq)
        assert len(seen) == 44
        torch.testing.assert_close(out[0, :, 0].double(), slow_row(q, k, v, seen, i, 0.25, freq), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1)])
def test_budget_of_everything_is_dense_with_normal_positions(h, g):
    """Also where a row of the batch is shorter than the list and another is not."""
    q, k, v = qkv(2, h, g, 72)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, :40] = False
    drive = Drive(Recipe.of(SMALL))
    drive(*(t[:, :, :70] for t in (q, k, v)), valid=valid)
    for i in (70, 71):
        out = drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        assert not drive.last[1].full
        want = oracle(q[1:, :, 40 : i + 1], (k[1:, :, 40 : i + 1], v[1:, :, 40 : i + 1]))[:, :, -1:]
        torch.testing.assert_close(out[1:], want, atol=1e-5, rtol=1e-5)
    drive = Drive(Recipe.of("token_select:budget=60,sink=4,local=16,chunk=16"))
    want = oracle(q, (k, v))
    torch.testing.assert_close(drive(q, k, v), want, atol=1e-5, rtol=1e-5)


def test_no_position_reaches_the_length_of_the_list():
    """The model's rotation is never asked for a larger one to rotate to: a text may exceed the model's range."""

    class Spy(Rotary):
        top = 0

        def rotate(self, x, pos):
            self.top = max(self.top, int(pos.max()))
            return super().rotate(x, pos)

    for text in (SMALL, SMALL + ",theta=0.5,refresh=3"):
        spy, (q, k, v) = Spy(16), qkv(1, 4, 2, 160)
        drive = Drive(Recipe.of(text))
        object.__setattr__(drive.info, "rope", spy)
        drive(*(t[:, :, :150] for t in (q, k, v)))
        for i in range(150, 160):
            drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        assert 40 <= spy.top < 44 + (3 if "theta" in text else 0)
    assert Recipe.of("token_select").extends and not Recipe.of("token_select:positions=text").extends


@pytest.mark.parametrize("steady", [True, False])
def test_tables_of_a_step(steady):
    """Factors of places and of where the rows stand; a rotation that changes with the longest position it is asked for is
    asked for each kind alone."""

    asked = []

    class Spy(Rotary):
        def rotate(self, x, pos):
            asked.append(pos.shape[-1])
            return super().rotate(x, pos)

    rope, (q, k, v) = Spy(16), qkv(2, 4, 2, 1)
    rope.steady = steady
    x = AttnInput(q, KV.dense(k, v), "decode", 0, 1, 1.0, q_pos=torch.tensor([[50], [7]]), rope=rope)
    turns = Turns.of(x, {}, "tables")
    asked.clear()
    own, other = turns.asked(9)
    assert asked == ([11] if steady else [9, 2]) and turns.asked(9)[0] is own
    partner = turns.partner.long()
    for row, pos in [(0, 0), (8, 8), (9, 50), (10, 7)]:
        want = rope.rotate(k[:1], torch.tensor([[pos]]))[0, :, 0]
        torch.testing.assert_close(k[0, :, 0] * own[row] + k[0, :, 0, partner] * other[row, partner], want)


def test_votes():
    """They sum to H; a constant added to one head's scores changes nothing; one head that is sure beats all others."""
    method = TokenSelect(sink=4, local=16, budget=8, chunk=16)
    score = torch.randn(2, 6, 80, generator=torch.Generator().manual_seed(0))
    length = torch.tensor([80, 60])
    vote = method.votes(score, length)
    torch.testing.assert_close(vote.sum(-1), torch.full((2,), 6.0))
    assert (vote[0, :4] == 0).all() and (vote[0, 64:] == 0).all() and (vote[1, 44:] == 0).all() and vote[1, 43] > 0
    moved = score.clone()
    moved[:, 2] += 30.0
    torch.testing.assert_close(method.votes(moved, length), vote)
    score *= 0.01
    score[:, 5, 33] = 40.0
    assert (method.votes(score, length).argmax(-1) == 33).all()
    few = method.votes(score, torch.tensor([20, 12]))  # no candidates
    assert (few == 0).all()


def test_each_head_votes_with_its_own_keys():
    """The published kernel reads kv head h mod G; here it is h // g. Only the first kv head holds what heads 0, 1 seek."""
    q, k, v = (0.01 * t for t in qkv(1, 4, 2, 90))
    q[:, :2, -1, 7] = 30.0  # the axis that turns slowest
    k[:, 0, 40, 7] = 30.0
    k[:, 1, 20, 7] = -30.0
    k[:, 1, 50, 7] = 30.0
    drive = Drive(Recipe.of("prefill=dense+decode=token_select:sink=4,local=16,budget=1,chunk=16"))
    drive(*(t[:, :, :89] for t in (q, k, v)))
    drive(*(t[:, :, 89:] for t in (q, k, v)))
    assert lists(drive.last[1]) == [[0, 1, 2, 3, 40, *range(74, 90)]]


@pytest.mark.parametrize("pool", [2, 5])
def test_pooling_keeps_neighbours(pool):
    method = TokenSelect(sink=2, local=8, budget=pool, chunk=8, pool=pool)
    score = torch.zeros(1, 2, 60)
    score[..., 30] = 20.0
    tokens_, count = method._list(score, torch.tensor([60]))
    left = (pool - 1) // 2
    want = range(30 - (pool - 1 - left), 30 + left + 1)
    assert listed(tokens_[0], count[0]) == [0, 1, *want, *range(52, 60)]


# ---------------------------------------------------------------------- reuse
def cached(theta, q, k, v, start, refresh=64):
    drive = Drive(Recipe.of(f"prefill=dense+decode={SMALL},theta={theta},refresh={refresh}"))
    drive(*(t[:, :, :start] for t in (q, k, v)))
    for i in range(start, q.shape[2]):
        out = drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        yield i, drive, out


def test_a_list_that_is_used_again_covers_tokens_since():
    """The gap of the published cache: tokens that leave the local window after the selection stay in the list."""
    q, k, v = qkv(1, 4, 2, 100)
    rope = Rotary(16)
    same = rope.unrotate(q[:, :, 70:71], torch.tensor([[70]]))
    q[:, :, 70:] = rope.rotate(same.expand(-1, -1, 30, -1), torch.arange(70, 100)[None])  # the same query again and again
    first = None
    for i, drive, out in cached(0.9, q, k, v, 70, refresh=20):
        got = lists(drive.last[1])[0]
        if i in (70, 91):
            first, at = got, i
            assert len(got) == 44 and got == slow_list(parse(SMALL), q[:, :, : i + 1], k[:, :, : i + 1], i, 1, rope.freq)
        assert got == [*first, *range(at + 1, i + 1)]
        if i in (90, 99):
            want = slow_row(q, k, v, got, i, 0.25, rope.freq)
            torch.testing.assert_close(out[0, :, 0].double(), want, atol=1e-5, rtol=1e-4)


def test_a_query_that_turns_away_selects_anew():
    q, k, v = qkv(1, 4, 2, 84)
    with_cache = [(lists(d.last[1]), out) for _, d, out in cached(0.9, q, k, v, 70)]  # random queries are never alike
    without = [(lists(d.last[1]), out) for _, d, out in cached("none", q, k, v, 70)]
    for (a, x), (b, y) in zip(with_cache, without, strict=True):
        assert a == b and torch.allclose(x, y, atol=1e-6)


def test_rows_reuse_for_themselves():
    q, k, v = qkv(2, 4, 2, 80)
    rope = Rotary(16)
    same = rope.unrotate(q[1:, :, 70:71], torch.tensor([[70]]))
    q[1:, :, 70:] = rope.rotate(same.expand(-1, -1, 10, -1), torch.arange(70, 80)[None])
    both = [out for *_, out in cached(0.9, q, k, v, 70)]
    for b in range(2):
        alone = [out for *_, out in cached(0.9, *(t[b : b + 1] for t in (q, k, v)), 70)]
        for x, y in zip(both, alone, strict=True):
            torch.testing.assert_close(x[b : b + 1], y, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------- with the cache
def test_raw_keys_follow_the_cache():
    """After steps, a roll-back, a fork and a change of rows: what all keys from scratch would give."""
    q, k, v = qkv(2, 4, 2, 130)
    drive = Drive(Recipe.of(f"prefill=dense+decode={SMALL}"))

    def check(one):
        x = one.last[0]
        held = one.cache.batch[KEYS].data[:, :, : x.kv.capacity]
        torch.testing.assert_close(held, raw_keys(x.kv, one.info.rope), atol=1e-5, rtol=1e-5)

    def steps(one, a, b):
        for i in range(a, b):
            one(*(t[:, :, i : i + 1] for t in (q, k, v)))
            check(one)

    drive(*(t[:, :, :60] for t in (q, k, v)))
    steps(drive, 60, 70)
    drive.cache.truncate(5)
    steps(drive, 100, 103)
    other = Drive(drive.recipe)
    other.cache = drive.cache.fork()
    steps(drive, 103, 106)
    other.cache.reorder(torch.tensor([1, 0]))
    steps(other, 110, 113)
    drive(*(t[:, :, 20:50] for t in (q, k, v)))  # a second question
    steps(drive, 50, 52)


def test_raw_keys_of_a_text_that_was_replaced_while_rows_were_short():
    """Dense steps in between do not ask for the keys, and the first that does has the number after the last one's."""
    q, k, v = qkv(1, 4, 2, 80)
    drive = Drive(Recipe.of(f"prefill=dense+decode={SMALL}"))
    drive(*(t[:, :, :40] for t in (q, k, v)))
    for i in range(40, 46):  # rows of up to 44 tokens are dense
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    assert drive.cache.batch[KEYS].step == 5
    drive.cache.truncate(10)
    drive(*(t[:, :, 60:62] for t in (q, k, v)))
    for i in range(62, 69):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    x = drive.last[0]
    assert x.step == 6 and x.kv.capacity == 45
    held = drive.cache.batch[KEYS].data[:, :, :45]
    torch.testing.assert_close(held, raw_keys(x.kv, drive.info.rope), atol=1e-5, rtol=1e-5)


def test_captured_steps():
    model, ids = tiny(), tokens(2, 50)
    recipe = "prefill=dense+decode=token_select:sink=4,local=16,budget=12,chunk=16"
    with foveate.use(model, recipe):
        want = said(model, ids)
    handle = dry(model, recipe)
    assert torch.equal(said(model, ids), want) and handle.graphs.replays >= 4 and not handle.notes
    handle.remove()
    assert TokenSelect().phase(0) == "first" and TokenSelect().phase(7) == "step"


@pytest.mark.parametrize("positions", ["rank", "text"])
def test_a_captured_step_decides_on_the_device(positions, monkeypatch):
    """One recorded step serves rows that choose anew and rows that use their list again, and what it holds stays where it
    is: the logits of plain steps, which may look."""
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    recipe = (
        f"prefill=dense+decode=token_select:sink=4,local=16,budget=12,chunk=16,theta=0.2,refresh=5,positions={positions}"
    )
    steps = dict(max_new_tokens=60, min_new_tokens=60)
    with foveate.use(model, recipe):
        want = generate(model, ids, mask, **steps)
    due, where = [], Held.where
    monkeypatch.setattr(token_select, "_may_look", lambda x: False)
    monkeypatch.setattr(Held, "where", lambda self, rows, old: due.append(rows.tolist()) or where(self, rows, old))
    handle = foveate.apply(model, recipe)
    handle.graphs = Strict(handle)
    handle.graphs.install()
    got = generate(model, ids, mask, **steps)
    assert handle.graphs.replays > 50 and not handle.notes
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    assert len(due) == 59 * model.config.num_hidden_layers  # no step looked
    share = torch.tensor(due[12:], dtype=torch.float32).mean(0)
    assert ((share > 0.05) & (share < 0.95)).all() and [True, False] in due and [False, True] in due
    handle.remove()
    assert parse("token_select@cached").phase(0) == "first" and parse("token_select@cached").phase(7) == "step"


def test_pieces_change_nothing(monkeypatch):
    q, k, v = qkv(1, 4, 2, 150)
    x = call(q, k, v, 37)
    x.rope, method = Rotary(16), parse(SMALL)
    whole = lists(method.plan(x, State()))
    monkeypatch.setattr(token_select, "pieces", lambda total, *_: ((i, i + 1) for i in range(total)))
    assert lists(method.plan(x, State())) == whole and len(whole) == 8


def test_chunks_are_attended_as_a_batch(monkeypatch):
    """Whole chunks with lists of full length together, or a few of them at a time: the same as each alone."""
    q, k, v = qkv(1, 4, 2, 150)
    x = call(q, k, v, 21)
    x.rope, method, calls = Rotary(16), parse(SMALL), []
    ranked = TokenSelect._ranked

    def counted(self, x, q, *rest):
        calls.append(tuple(q.shape[::2]))
        return ranked(self, x, q, *rest)

    monkeypatch.setattr(TokenSelect, "_ranked", counted)
    plan, got = method.plan(x, State()), []
    for step in (9, 1, 2):
        monkeypatch.setattr(
            token_select, "pieces", lambda n, *_, step=step: [(i, min(n, i + step)) for i in range(0, n, step)]
        )
        got.append(method.attend(x, plan, State())[:2])
        if step == 9:
            assert calls == [(1, 11), (7, 16), (1, 6)]  # rows 21..31, seven chunks, the last rows
    for out, lse in got[1:]:
        torch.testing.assert_close(out, got[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, got[0][1], atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="needs a cache that keeps every entry"):
        Recipe.of("token_select+cache=snapkv")
    assert Recipe.of("prefill=token_select+cache=snapkv").evicts  # what a prompt reads is still all there
    x = call(*qkv(1, 4, 2, 60))
    with pytest.raises(UnsupportedError, match="needs the model's rotation"):
        parse(SMALL).plan(x, State())


@pytest.mark.parametrize(
    "text,message",
    [
        ("token_select:sink=-1", "sink expected >= 0, got -1"),
        ("token_select:budget=0", "budget expected >= 1, got 0"),
        ("token_select:local=64", "local expected at least chunk = 512"),
        ("token_select:pool=0", "pool expected >= 1, got 0"),
        ("token_select:theta=2", "theta expected between -1 and 1, got 2"),
        ("token_select:positions=page", "positions expected one of rank, text"),
        ("token_select:budgt=4", "did you mean 'budget'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
