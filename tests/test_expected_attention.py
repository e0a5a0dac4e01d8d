"""Expected Attention against a slow transcription of its card."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import ConfigError, UnsupportedError
from foveate.kv import KV
from foveate.methods.base import AttnInput, LayerState, State
from foveate.methods.expected_attention import COUNT, MEAN, SPREAD, ExpectedAttention, gather, mean_rotation
from foveate.registry import parse
from tests.drive import Drive, Rotary, qkv

few = settings(max_examples=25, deadline=None)


def inputs(q, kv, start, rope, note=lambda text: None):
    n = q.shape[2]
    pos = torch.arange(start, start + n)[None]
    return AttnInput(q, kv, "prefill", 2, 4, 1 / math.sqrt(kv.shape[3]), start, q_pos=pos, rope=rope, note=note)


def compress(q, k, v, rope, cuts=None, note=lambda text: None, **options):
    """The selection after a prompt fed in chunks; q, k are rotated."""
    method, state = ExpectedAttention(**options), State()
    n = q.shape[2]
    cuts = [0, *(cuts or []), n]
    for a, b in zip(cuts, cuts[1:], strict=False):
        x = inputs(q[:, :, a:b], KV.dense(k[:, :, :b], v[:, :, :b]), a, rope)
        method.observe(x, x.q, None, None, state)
    x = inputs(q[:, :1, :0], KV.dense(k, v), n, rope, note)
    return method.compress(x, state)


def lists(selection):
    counts = selection.full_counts()
    return [selection.indices[0, g, : counts[0, g]].tolist() for g in range(counts.shape[1])]


def slow_scores(raw, k, v, rope, future, sink, covariance, value_norm, eps):
    """The card in fp64 for one kv head: raw queries [r, N, D], rotated keys [N, D], values [N, Dv]."""
    n, d = k.shape
    turns = []
    for p in range(n, n + future):  # R(p) as a matrix, column by column
        turns.append(rope.rotate(torch.eye(d, dtype=torch.double)[None, :, None], torch.tensor([[p]]))[0, :, 0].T)
    turn = torch.stack(turns).mean(0)
    total = torch.zeros(n - sink, dtype=torch.double)
    for head in raw:
        x = head[sink:]
        mu = x.mean(0)
        cov = (x - mu).T @ (x - mu) / len(x)
        mu, cov = turn @ mu, turn @ cov @ turn.T
        z = torch.stack(
            [mu @ k[j] / math.sqrt(d) + (k[j] @ cov @ k[j] / (2 * d) if covariance else 0) for j in range(sink, n)]
        )
        total += z.softmax(0)
    score = total / len(raw) + eps
    return score * v[sink:].norm(dim=-1) if value_norm else score


@few
@given(
    h=st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 2)]),
    n=st.integers(2, 40),
    capacity=st.integers(1, 20),
    sink=st.sampled_from([0, 1, 4]),
    covariance=st.booleans(),
    value_norm=st.booleans(),
    eps=st.sampled_from([0.0, 0.02]),
    cuts=st.sets(st.integers(1, 39), max_size=3),
    seed=st.integers(0, 99),
)
def test_selection_is_the_card(h, n, capacity, sink, covariance, value_norm, eps, cuts, seed):
    """Index by index, with the prompt read in any chunks."""
    h, g = h
    q, k, v = qkv(1, h, g, n, d=6, dv=5, seed=seed)
    rope = Rotary(6)
    pos = torch.arange(n)[None]
    options = dict(future=9, sink=sink, covariance=covariance, value_norm=value_norm, eps=eps)
    got = compress(rope.rotate(q, pos), k, v, rope, sorted(c for c in cuts if c < n), capacity=capacity, **options)
    keep = max(capacity, sink)
    if got is None:
        assert n <= keep
        return
    for j, kept in enumerate(lists(got)):
        heads = q[0, j * (h // g) : (j + 1) * (h // g)].double()
        score = slow_scores(heads, k[0, j].double(), v[0, j].double(), rope, **options)
        best = score.argsort(descending=True, stable=True)[: keep - sink] + sink
        assert kept == sorted([*range(sink), *best.tolist()])


@few
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_statistics_in_pieces(cuts, seed):
    """Mean and covariance gathered piece by piece equal those of all queries, also far from zero."""
    x = torch.randn(3, sum(cuts), 5, generator=torch.Generator().manual_seed(seed)) + 100.0
    stats = LayerState()
    for part in x.split(cuts, 1):
        gather(stats, part)
    y = x.double()
    mu = y.mean(1)
    cov = (y - mu[:, None]).transpose(1, 2) @ (y - mu[:, None]) / y.shape[1]
    assert float(stats[COUNT]) == sum(cuts)
    torch.testing.assert_close(stats[MEAN].double(), mu, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close((stats[SPREAD] / stats[COUNT]).double(), cov, atol=1e-3, rtol=1e-3)


def test_the_mean_rotation():
    rope = Rotary(8)
    turn = mean_rotation(rope, 100, 7, 8, torch.device("cpu"))
    x = torch.randn(3, 8)
    want = rope.rotate(x[None, :, None].expand(1, 3, 7, 8), torch.arange(100, 107)[None])[0].mean(1)
    torch.testing.assert_close(x @ turn, want, atol=1e-5, rtol=1e-5)


def test_monte_carlo():
    """For one fixed rotation, exp(z) is the mean of exp(q . k / sqrt D) over Gaussian queries, to sampling error."""
    gen = torch.Generator().manual_seed(3)
    d, n, rope = 4, 12, Rotary(4)
    mix = torch.randn(d, d, generator=gen)
    queries = torch.randn(1, 1, 200_000, d, generator=gen) @ mix + torch.randn(d, generator=gen)
    k = torch.randn(1, 1, n, d, generator=gen)
    state = State()
    gather(state.layer, queries[0])
    method = ExpectedAttention(capacity=2, future=1, sink=0, value_norm=False)
    x = inputs(queries[:, :1, :0], KV.dense(k, k), 50, rope)
    got = method.scores(x, state.layer, torch.ones(1, 1, n, dtype=torch.bool))[0, 0]
    turned = rope.rotate(queries, torch.full((1, 200_000), 50))
    mean = (turned[0, 0].double() @ k[0, 0].double().T / math.sqrt(d)).exp().mean(0)
    torch.testing.assert_close(got.double(), mean / mean.sum(), atol=2e-3, rtol=0.05)


def test_without_covariance_it_is_the_softmax_of_the_mean_query():
    q, k, v = qkv(1, 4, 2, 40)
    rope, state, method = Rotary(16), State(), ExpectedAttention(covariance=False, value_norm=False, sink=0, future=1)
    x = inputs(rope.rotate(q, torch.arange(40)[None]), KV.dense(k, v), 0, rope)
    method.observe(x, x.q, None, None, state)
    y = inputs(q[:, :1, :0], KV.dense(k, v), 40, rope)
    got = method.scores(y, state.layer, torch.ones(1, 2, 40, dtype=torch.bool))
    mean = rope.rotate(q.mean(2, keepdim=True), torch.tensor([[40]]))
    want = (mean @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).softmax(-1)[:, :, 0].unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_sinks_stay_and_the_ratio_counts_them():
    q, k, v = qkv(1, 4, 2, 100)
    k[:, :, :4] *= 0.0
    v[:, :, :4] *= 0.0  # nothing in their score would keep them
    rope = Rotary(16)
    kept = lists(compress(q, k, v, rope, ratio=0.9))
    assert all(len(row) == 10 and row[:4] == [0, 1, 2, 3] for row in kept)
    assert all(len(row) == 4 for row in lists(compress(q, k, v, rope, ratio=1.0)))
    assert compress(q, k, v, rope, ratio=0.0) is None and compress(q, k, v, rope, capacity=100) is None


def test_heads_of_different_length_and_poison():
    """Slots beyond a head's length may hold NaN; they are never kept and never matter."""
    q, k, v = qkv(1, 4, 2, 60)
    rope, method, state = Rotary(16), ExpectedAttention(capacity=20), State()
    x = inputs(q, KV.dense(k, v), 0, rope)
    method.observe(x, x.q, None, None, state)
    lens = torch.tensor([[60, 15]], dtype=torch.int32)
    bad = [t.masked_fill(~(torch.arange(60) < lens[..., None])[..., None], float("nan")) for t in (k, v)]
    got = lists(method.compress(inputs(q[:, :1, :0], KV.dense(*bad, lens), 60, rope), state))
    want = lists(method.compress(inputs(q[:, :1, :0], KV.dense(k, v), 60, rope), state))
    assert got[0] == want[0] and got[1] == list(range(15))


def test_through_a_cache():
    """Padded, chunked and forked runs keep the same entries; a second turn compresses again."""
    q, k, v = qkv(1, 4, 2, 190)
    recipe = "expected_attention:capacity=48"
    whole, chunks, padded = (Drive(recipe) for _ in range(3))
    whole(*(t[:, :, :150] for t in (q, k, v)))
    for a, b in ((0, 2), (2, 77), (77, 150)):  # the first chunk lies within the sinks
        chunks(*(t[:, :, a:b] for t in (q, k, v)))
    bad = [torch.nn.functional.pad(t[:, :, :150], (0, 0, 0, 9), value=float("nan")) for t in (q, k, v)]
    padded(*bad, valid=torch.arange(159)[None] < 150)
    fork = Drive(recipe)
    fork.cache = whole.cache.fork()
    for d in (whole, chunks, padded, fork):
        d(*(t[:, :, 150:151] for t in (q, k, v)))
    pos = [d.cache.store.view().positions() for d in (whole, chunks, padded, fork)]
    assert pos[0].shape[2] == 49 and all(torch.equal(p, pos[0]) for p in pos)
    whole(*(t[:, :, 151:189] for t in (q, k, v)))
    whole(*(t[:, :, 189:] for t in (q, k, v)))
    again = whole.cache.store.view().positions()
    assert again.shape[2] == 49 and again[0, :, :4].tolist() == [[0, 1, 2, 3]] * 2


def test_what_it_needs():
    q, k, v = qkv(1, 4, 2, 60)
    drive = Drive("expected_attention:capacity=48")
    drive.info = type(drive.info)(2, 4, 0.25, rope=None, backend="reference")
    with pytest.raises(UnsupportedError, match="rotation is not available"):
        drive(q, k, v)
    notes = []
    x = inputs(q[:, :1, :0], KV.dense(k, v), 60, Rotary(16), notes.append)
    assert ExpectedAttention(capacity=48).compress(x, State()) is None
    assert len(notes) == 1 and "no prompt queries" in notes[0]
    assert parse("expected_attention@8k").capacity == 1024
    with pytest.raises(ConfigError, match="ratio expected between"):
        parse("expected_attention:ratio=1.5")
