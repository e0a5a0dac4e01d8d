"""Recycled Attention: whole generations of one layer against a slow transcription of its card."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput, State
from foveate.methods.recycled_attention import TOKENS, RecycledAttention
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores import keys as score_keys
from foveate.scores.observed import best, row_logits
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.models import tiny, tokens
from tests.test_graphs import dry, said


class Card:
    """C_p of one layer as the card keeps it: per kv head a list of tokens, the weakest first."""

    def __init__(self, q, k, scale, size, stride, tau, kernel):
        self.q, self.k, self.scale, self.size = q.double(), k.double(), scale, size
        self.stride, self.tau, self.half = stride, tau, kernel // 2
        self.query = None

    def mean(self, i):
        return self.q[0, :, i].mean(0)

    def full(self, i):
        g, r = self.k.shape[1], self.q.shape[1] // self.k.shape[1]
        self.lists, self.query = [], self.mean(i)
        for a in range(g):
            p = torch.stack([(self.k[0, a, : i + 1] @ self.q[0, a * r + j, i] * self.scale).softmax(-1) for j in range(r)])
            p = p.amax(0).tolist()
            pooled = [max(p[max(0, j - self.half) : j + self.half + 1]) for j in range(i + 1)]
            order = sorted(range(i + 1), key=lambda j: (-pooled[j], j))[: self.size]
            self.lists.append(order[::-1])

    def step(self, number, i):
        """The sets of decode step `number`, whose token is i; None for a full step."""
        due = self.query is None
        if not due and number % self.stride == 0:
            alike = torch.cosine_similarity(self.mean(i), self.query, dim=0)
            due = self.tau is None or bool(alike < self.tau)
        if due:
            self.full(i)
            return None
        seen = [sorted({*one, i}) for one in self.lists]
        for one in self.lists:
            one.append(i)
            if len(one) > self.size:
                one.pop(0)
        return seen


def named(x, plan):
    mask = plan.to_mask(x.kv)[0, :, 0]
    return [mask[a].nonzero().flatten().tolist() for a in range(mask.shape[0])]


def drive(text, tensors, start, d=16):
    """Prefill `start` tokens, then a step for each of the others; yields (number, position, drive, output)."""
    q, k, v = tensors
    one = Drive(Recipe.of(text), d=d)
    one(*(t[:, :, :start] for t in (q, k, v)))
    for number, i in enumerate(range(start, q.shape[2])):
        yield number, i, one, one(*(t[:, :, i : i + 1] for t in (q, k, v)))


# ---------------------------------------------------------------------- the card
@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection(case, tau):
    q, k, v, _ = case.make()
    text = f"recycled_attention:budget=20,stride=4,tau={str(tau).lower()}"
    card, r, partial = Card(q, k, case.scale, 20, 4, tau, 7), q.shape[1] // k.shape[1], 0
    for number, i, one, _ in drive(text, (q, k, v), 287, d=q.shape[-1]):
        x, plan, _ = one.last
        want = card.step(number, i)
        if want is None:
            assert bool(plan.to_mask(x.kv).all())
        else:
            partial += 1
            assert named(x, plan) == [want[a // r] for a in range(q.shape[1])]
    assert partial >= 9 and (tau is None or case.name in ("flat", "diagonal", "blocks") or partial > 9)  # kept at a check


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1)])
def test_budget_of_everything_and_refreshing_always_are_dense(h, g):
    tensors = qkv(1, h, g, 40)
    q, k, v = tensors
    for text in ("budget=60", "fraction=1.0", "budget=5,stride=1,tau=1.5", "budget=5,stride=1,tau=none"):
        for _, i, _, out in drive(f"recycled_attention:{text}", tensors, 37):
            want = oracle(q[:, :, : i + 1], (k[:, :, : i + 1], v[:, :, : i + 1]))[:, :, -1:]
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_the_set_keeps_its_size():
    """budget + the token itself after every partial step, also when more tokens came than the budget has places."""
    for number, i, one, _ in drive("recycled_attention:budget=6,stride=30,tau=none", qkv(1, 4, 2, 60), 40):
        x, plan, _ = one.last
        if number:
            rows = named(x, plan)
            assert all(len(row) == 7 for row in rows)
            assert all(set(range(max(41, i - 5), i + 1)) <= set(row) for row in rows)  # tokens since the full step
    assert number == 19


def test_the_default_budget_is_a_share_of_the_tokens():
    for number, i, one, _ in drive("recycled_attention:stride=10,tau=none", qkv(1, 4, 2, 85), 79):
        if number:
            assert all(len(row) == 11 for row in named(*one.last[:2]))  # 80 // 8 and the token itself


def test_a_needle_that_becomes_relevant_is_seen_at_the_next_full_step():
    q, k, v = (0.1 * t for t in qkv(1, 4, 2, 80))
    q[..., 3] = k[..., 3] = 0
    k[:, :, 11, 3] = 9.0
    q[:, :, 66:, 3] = 9.0
    for number, i, one, _ in drive("recycled_attention:budget=8,stride=5,tau=none", (q, k, v), 60):
        x, plan, _ = one.last
        if number % 5:  # the full step of token 65 did not know yet, that of token 70 does
            assert all((11 in row) == (i > 70) for row in named(x, plan))


def test_nothing_leaves_the_cache():
    q, k, v = qkv(1, 4, 2, 70)
    for *_, one, _ in drive("recycled_attention:budget=6,stride=4", (q, k, v), 50):
        pass
    kept = one.cache.store.view()
    assert torch.equal(kept.k[:, :, :70], k) and torch.equal(kept.v[:, :, :70], v) and not one.cache.evicted


def test_maxima_are_taken_over_heads_before_neighbours():
    """Two heads with peaks side by side: the pooled maximum is the larger one for all neighbours (not a sum or mean)."""
    q, k = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 50, 4)
    q[0, 0, 0, 0] = q[0, 1, 0, 1] = 1.0
    k[0, 0, 10, 0], k[0, 0, 30, 1] = 9.0, 6.0
    x = AttnInput(q, KV.dense(k, k), "decode", 0, 1, 1.0, q_pos=torch.tensor([[49]]))
    state = State()
    assert RecycledAttention(budget=10, kernel=7).plan(x, state) is None
    held = state.layer[TOKENS]
    assert held.entries[0, 0].tolist() == [*range(7, 14), 27, 28, 29] and held.rank[0, 0].tolist() == list(range(10))


# ---------------------------------------------------------------------- batches and the cache's operations
def test_rows_decide_for_themselves():
    """One row's query turns around, the other one's stays: the first row takes a full step, the second does not."""
    q, k, v = qkv(2, 4, 2, 60)
    q[1, :, 50:] = q[1, :, 50:51]
    q[0, :, 50:] = torch.where(torch.arange(10)[:, None] < 4, q[0, :, 50:51], -q[0, :, 50:51])
    text = "recycled_attention:budget=8,stride=4,tau=0.9"
    both = list(drive(text, (q, k, v), 50))
    masks = [plan.to_mask(x.kv)[:, 0, 0].sum(-1).tolist() for x, plan, _ in both[0][2].watch.calls[1:]]
    assert masks[0] == [51, 51] and masks[4] == [55, 9] and masks[5] == [9, 9] and masks[8] == [9, 9]
    for b in range(2):
        alone = list(drive(text, tuple(t[b : b + 1] for t in (q, k, v)), 50))
        for (*_, got), (*_, want) in zip(both, alone, strict=True):
            torch.testing.assert_close(got[b : b + 1], want, atol=1e-5, rtol=1e-5)


def test_rows_of_any_length():
    """Slots beyond a row's end hold NaN, and capacity is no length."""
    lens, method = (37, 3, 60), RecycledAttention(budget=8, stride=4)
    q, k, v = qkv(3, 4, 2, 64)
    batch, alone = State(), [State() for _ in lens]
    for step in range(4):
        now = torch.tensor(lens) + step
        bad = torch.arange(64) >= now[:, None]
        kb, vb = (t.masked_fill(bad[:, None, :, None], float("nan")) for t in (k, v))
        kv = KV.dense(kb, vb, len=now[:, None].expand(3, 2).int())
        x = AttnInput(q[:, :, step : step + 1], kv, "decode", 0, 1, 0.25, step=step, q_pos=now[:, None] - 1)
        got = (method.plan(x, batch) or Layout.dense(*x.shape)).to_mask(kv)
        for i, n in enumerate(now.tolist()):
            kv = KV.dense(k[i : i + 1, :, :n], v[i : i + 1, :, :n])
            x = AttnInput(
                q[i : i + 1, :, step : step + 1], kv, "decode", 0, 1, 0.25, step=step, q_pos=torch.tensor([[n - 1]])
            )
            want = (method.plan(x, alone[i]) or Layout.dense(*x.shape)).to_mask(kv)
            assert torch.equal(got[i : i + 1, ..., :n], want) and not got[i, ..., n:].any()


@pytest.mark.parametrize("fraction,size", [(0.29, 28), (0.125, 12)])
def test_a_share_is_rounded_alike_on_host_and_device(fraction, size):
    """In fp32 0.29 of 100 tokens would be 29, of a list of 28."""
    q, k, v = qkv(1, 4, 2, 100)
    x = AttnInput(q[:, :, -1:], KV.dense(k, v), "decode", 2, 4, 0.25, q_pos=torch.tensor([[99]]))
    found = RecycledAttention(fraction=fraction)._select(x)
    assert found.entries.shape[-1] == size and found.limit.tolist() == [[size] * 2]


def test_rollback_fork_and_reorder():
    text, (q, k, v) = "recycled_attention:budget=8,stride=20,tau=none", qkv(2, 4, 2, 70)

    def steps(one, a, b):
        return [one(*(t[:, :, i : i + 1] for t in (q, k, v))) for i in range(a, b)]

    one = Drive(Recipe.of(text))
    one(*(t[:, :, :50] for t in (q, k, v)))
    steps(one, 50, 55)
    other = Drive(Recipe.of(text))
    other.cache = one.cache.fork()
    want = steps(one, 55, 58)
    for a, b in zip(steps(other, 55, 58), want, strict=True):
        assert torch.equal(a, b)
    other.cache.reorder(torch.tensor([1, 0]))
    x = Drive(Recipe.of(text))
    swapped = [t.flip(0) for t in (q, k, v)]
    x(*(t[:, :, :50] for t in swapped))
    for i in range(50, 58):
        x(*(t[:, :, i : i + 1] for t in swapped))
    both = [d(*(t[:, :, 58:59] for t in swapped)) for d in (other, x)]
    torch.testing.assert_close(*both, atol=1e-6, rtol=1e-6)
    one.cache.truncate(4)
    steps(one, 54, 55)
    assert one.last[1].full  # after a rollback the next step is a full one


def test_a_ring_whose_length_stands_still():
    """Another policy's ring overwrites entries in place: tokens since the selection are told by position."""
    text = "decode=recycled_attention:budget=6,stride=8,tau=none+cache=streaming_llm:sink=4,window=20"
    for number, i, one, out in drive(text, qkv(1, 4, 2, 80), 60):
        x, plan, _ = one.last
        mask, at = plan.to_mask(x.kv)[0, :, 0], x.kv.positions()[0, 0]
        since = i - 60 - number // 8 * 8
        assert all(set(range(i - since + (since > 0), i + 1)) <= set(at[row].tolist()) for row in mask)
        torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tau", ["none", "0.9"])
def test_captured_steps(tau):
    """Stores of fixed size give the tokens of ordinary steps, and selections stay in the memory a graph has seen."""
    model, ids = tiny(), tokens(2, 60)
    recipe = f"recycled_attention:budget=12,stride=2,tau={tau}"
    with foveate.use(model, recipe):
        want = said(model, ids)
    handle = dry(model, recipe)
    assert torch.equal(said(model, ids), want) and handle.graphs.replays >= 3 and not handle.notes
    handle.remove()
    method = RecycledAttention(stride=5)
    assert [method.phase(i) for i in (0, 1, 4, 5, 10)] == ["full", "reuse", "reuse", "check", "check"]


def test_selections_stay_in_their_memory():
    where = set()
    for *_, one, _ in drive("recycled_attention:budget=6,stride=2,tau=0.5", qkv(1, 4, 2, 60), 50):
        held = one.cache.batch[TOKENS]
        where.add(tuple(t.data_ptr() for _, t, _ in held._pairs(held)))
    assert len(where) == 1


# ---------------------------------------------------------------------- the shared scores
def test_row_logits_in_pieces(monkeypatch):
    q, k, v = qkv(2, 6, 3, 50, dtype=torch.float64)
    k[1, :, 31:] = float("nan")
    bias = torch.randn(2, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kv = KV.dense(k, v, len=torch.tensor([[50] * 3, [31] * 3], dtype=torch.int32), bias=bias)
    at = torch.tensor([[40], [30]])
    how = dict(scale=0.3, softcap=4.0)
    whole = row_logits(q[:, :, -1:], kv, at, **how)
    for b, h in ((0, 0), (1, 5)):
        z = 4.0 * torch.tanh(0.3 * (k[b, h // 2] @ q[b, h, -1]) / 4.0) + bias[b, h // 2]
        seen = torch.arange(50) <= at[b]
        torch.testing.assert_close(whole[b, h], torch.where(seen, z, float("-inf")))
    monkeypatch.setattr(score_keys, "BUDGET", 100)
    monkeypatch.setattr(score_keys.pieces, "__defaults__", (100,))
    torch.testing.assert_close(row_logits(q[:, :, -1:], kv, at, **how), whole, atol=1e-12, rtol=1e-12)


def test_best_breaks_ties_towards_the_lower_entry():
    score = torch.tensor([[1.0, 3.0, 3.0, 0.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0, 9.0, 9.0]])
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    index, rank, count = best(score, 3, valid=valid)
    assert index[0].tolist() == [1, 2, 5] and rank[0].tolist() == [0, 1, 2]
    assert count.tolist() == [3, 2] and index[1, :2].tolist() == [0, 1] and rank[1, :2].tolist() == [0, 1]


@pytest.mark.parametrize(
    "text,message",
    [
        ("recycled_attention:budget=0", "budget expected >= 1, got 0"),
        ("recycled_attention:fraction=1.5", "fraction expected between 0 and 1, got 1.5"),
        ("recycled_attention:stride=0", "stride expected >= 1, got 0"),
        ("recycled_attention:kernel=4", "kernel expected an odd number, got 4"),
        ("recycled_attention:tau=high", "tau expected float | None, got 'high'".replace("|", r"\|")),
        ("recycled_attention:strid=4", "did you mean 'stride'"),
    ],
)
def test_bad_options(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)
