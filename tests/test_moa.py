"""MoA's windows and caches, and its search: influence, densities and the assignment against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods import moa_search
from foveate.methods.base import AttnInput
from foveate.methods.moa import MoA
from foveate.methods.moa_search import assign, by_distance, candidates, density, front, influence
from foveate.methods.search import Target
from foveate.profile import Profile
from foveate.registry import parse
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, planned
from tests.profiles import folder

RULES = torch.tensor([[0, 0.125], [0, 0.5], [-40, 1.0], [30, 0.125], [0, 1.0], [0, 0.25], [10, 0.25], [50, 0.0]])


@pytest.fixture(scope="module")
def profile():
    """Four layers of up to eight heads, each head with another rule."""
    return {h: folder(Profile("moa", tensors=tables(h))) for h in (2, 4, 6, 8, 9)}


def tables(heads, layers=4):
    rule = torch.stack([RULES[torch.arange(i, i + heads) % len(RULES)] for i in range(layers)])
    return {"alpha": rule[..., 0].clone(), "beta": rule[..., 1].clone()}


def slow_mask(alpha, beta, n, rows, sink, block):
    """The card's step 7 in a loop: which of n keys a head sees from each of the rows."""
    width = max(block, math.floor(alpha + beta * n))
    return torch.tensor([[j <= i and (j < sink or i - j < width) for j in range(n)] for i in rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case, profile):
    h = case.make()[0].shape[1]
    plan = planned(f"moa:profile={profile[h]},sink=16,block=16", case)
    rule = [tables(h)[n][2].tolist() for n in ("alpha", "beta")]
    want = torch.stack([slow_mask(a, b, 300, range(300), 16, 16) for a, b in zip(*rule, strict=True)])
    assert torch.equal(plan.to_mask()[0], want)


@pytest.mark.parametrize("h,g", [(2, 2), (6, 2), (4, 1), (8, 1)])
def test_chunks_follow_the_length_so_far(h, g, profile):
    """N != M: a chunk has the windows of the text up to its end, and so has every decode step."""
    q, k, v = qkv(1, h, g, 203)
    drive = Drive(f"prefill=moa:profile={profile[h]},sink=4,block=8+decode=moa:profile={profile[h]},sink=4,block=8")
    cuts = [0, 37, 100, 200, 201, 202, 203]
    rule = [tables(h)[n][2].tolist() for n in ("alpha", "beta")]
    for a, b in itertools.pairwise(cuts):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
        x, plan, out = drive.last
        want = torch.stack([slow_mask(*r, b, range(a, b), 4, 8) for r in zip(*rule, strict=True)])
        assert torch.equal(plan.to_mask(x.kv)[0], want)
        torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("h,g", [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("slack", [1, 5])
@pytest.mark.parametrize("share", ["head", "group"])
def test_evicting_is_exact(h, g, slack, share, profile):
    """The cache that drops what windows have left gives what a masked dense step gives, and stays small."""
    q, k, v = qkv(2, h, g, 160)
    text = f"moa:profile={profile[h]},sink=4,block=8,share={share}"
    small, whole = Drive(f"{text},slack={slack}"), Drive(f"prefill={text}+decode={text}")
    lens = (100, 71)
    valid = torch.arange(100) < torch.tensor(lens)[:, None]
    for d in (small, whole):
        d(*(t[:, :, :100] for t in (q, k, v)), valid=valid)
    alpha, beta = (tables(h)[n][2] for n in ("alpha", "beta"))
    for t in range(100, 150):
        step = [t_[:, :, t : t + 1] for t_ in (q, k, v)]
        a, b = small(*step), whole(*step)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for row, n in enumerate(lens):
            now = n + t - 99
            wide = (alpha + beta * now).floor().clamp(min=8).unflatten(0, (g, -1)).amax(1)
            most = (wide + 4).clamp(max=now)
            kept = small.cache.store.view().exists()[row].sum(-1)
            assert ((kept >= most - 1) & (kept <= most + slack + 1)).all()
    assert small.cache.evicted == (h != 8)  # one of these eight heads sees everything


def test_a_second_turn_on_an_evicted_cache(profile):
    q, k, v = qkv(1, 4, 2, 200)
    text = f"moa:profile={profile[4]},sink=4,block=8"
    small, whole = Drive(f"{text},slack=1"), Drive(f"prefill={text}+decode={text}")
    for a, b in ((0, 100), (100, 101), (101, 102), (102, 150), (150, 151)):
        outs = [d(*(t[:, :, a:b] for t in (q, k, v))) for d in (small, whole)]
        if b - a == 1:
            torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
        x, plan, _ = small.last
        assert isinstance(plan.window, torch.Tensor) and int(x.q_pos[0, -1]) == b - 1  # its own rule, not dense


def test_dense_at_the_end_of_the_scale():
    q, k, v = qkv(1, 4, 2, 150)
    drive = Drive("moa:density=1.0,slack=1")
    for a, b in ((0, 140), (140, 141), (141, 142)):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
        x, plan, _ = drive.last
        assert plan.to_mask(x.kv).sum() == 4 * sum(range(a + 1, b + 1))
    assert not drive.cache.evicted


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_uniform_density(share):
    """Without a profile windows hold the published default, or what is asked for, of the causal pairs."""
    q, k, v = qkv(1, 2, 1, 800)
    drive = Drive(f"moa:density={share},sink=0,block=1")
    drive(q, k, v)
    assert abs(drive.last[1].density() - share) < 2e-3
    assert MoA().density == 0.5 and MoA().sink == MoA().block == 64


def test_what_it_needs(profile):
    q, k, v = qkv(1, 4, 2, 100)
    with pytest.raises(ConfigError, match=r"expected alpha \[4, 4\] in the profile .* got \[4, 6\]"):
        Drive(f"moa:profile={profile[6]}")(q, k, v)
    empty = folder(Profile("moa", tensors={"alpha": torch.zeros(4, 4)}))
    with pytest.raises(ConfigError, match=r"expected beta \[4, 4\] .* got nothing"):
        Drive(f"moa:profile={empty}")(q, k, v)
    with pytest.raises(ConfigError, match="was made for quest, expected one for moa"):
        Drive(f"moa:profile={folder(Profile('quest'))}")(q, k, v)
    for text, match in (("density=1.5", "density expected between"), ("rules=3", "rules expected"), ("block=0", ">= 1")):
        with pytest.raises(ConfigError, match=match):
            parse(f"moa:{text}")
    with pytest.raises(ConfigError, match=r"expects density=.*got recall"):
        MoA().search(Target("recall", 0.9))
    search = MoA().search(Target("density", 0.5))
    with pytest.raises(ConfigError, match="needs the gradient"):
        search.see(seen(q, k, v), q, None)
    with pytest.raises(ConfigError, match="expected prompts"):
        search.finish()


# ---------------------------------------------------------------------- influence
def seen(q, k, v, layer=0, layers=1):
    n = q.shape[2]
    return AttnInput(q, KV.dense(k, v), "prefill", layer, layers, 1 / math.sqrt(q.shape[3]), 0, q_pos=torch.arange(n)[None])


@pytest.mark.parametrize("loud", [1.0, 2.5])
def test_influence_is_the_change_of_the_masked_row(loud):
    """|E_ij| = |g . (A' - A)| with the row renormalised without j, to 1e-12 in fp64; row 0 is |A g|; blocks sum it."""
    n, block = 23, 5
    q, k, v = qkv(1, 4, 2, n, d=8, dv=6, dtype=torch.float64)
    q = q * loud
    grad = torch.randn(1, 4, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fine = influence(q, KV.dense(k, v), grad, 1, scale=0.3, eps=0.0)
    want = torch.zeros(4, n, n, dtype=torch.float64)
    for h in range(4):
        for i in range(n):
            a = (k[0, h // 2, : i + 1] @ q[0, h, i] * 0.3).softmax(0)
            g = v[0, h // 2, : i + 1] @ grad[0, h, i]
            for j in range(i + 1):
                rest = a.clone()
                rest[j] = 0
                change = g @ (rest / rest.sum() - a) if i else -a[0] * g[0]
                want[h, i, j] = abs(change)
    assert (fine[0] - want).abs().max() < 1e-12
    coarse = influence(q, KV.dense(k, v), grad, block, scale=0.3, eps=0.0)[0]
    for i in range(5):
        for j in range(5):
            mine = want[:, i * block : (i + 1) * block, j * block : (j + 1) * block].sum((1, 2))
            torch.testing.assert_close(coarse[:, i, j], mine, atol=1e-12, rtol=1e-10)


def test_influence_predicts_the_loss():
    """To first order: a tiny loss gradient, one pair masked, the loss moves by E."""
    q, k, v = qkv(1, 1, 1, 30, dtype=torch.float64)
    w = torch.randn(1, 1, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    e = influence(q, KV.dense(k, v), w, 1, scale=0.25, eps=0.0)[0, 0]
    s = (q @ k.transpose(-1, -2) * 0.25)[0, 0].masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf"))
    base = ((s.softmax(-1) @ v[0, 0]) * w[0, 0]).sum()
    for i, j in ((5, 2), (29, 0), (12, 12)):
        masked = s.clone()
        masked[i, j] = float("-inf")
        loss = ((masked.softmax(-1) @ v[0, 0]) * w[0, 0]).sum()
        assert abs(abs(float(loss - base)) - float(e[i, j])) < 1e-12


def test_influence_in_pieces_and_with_a_dominant_key(monkeypatch):
    q, k, v = qkv(1, 6, 2, 70)
    grad = torch.randn(1, 6, 70, 16, generator=torch.Generator().manual_seed(0))
    want = influence(q, KV.dense(k, v), grad, 16, scale=0.25)
    from foveate.scores.keys import pieces

    monkeypatch.setattr(moa_search, "pieces", lambda n, cost: pieces(n, cost, 1))
    torch.testing.assert_close(influence(q, KV.dense(k, v), grad, 16, scale=0.25), want, atol=1e-5, rtol=1e-4)
    loud = influence((q * 200).bfloat16(), KV.dense(k.bfloat16(), v.bfloat16()), grad.bfloat16(), 16, scale=0.25)
    assert loud.dtype == torch.float32 and bool(torch.isfinite(loud).all())


def test_by_distance_leaves_the_sink_out():
    e = torch.rand(2, 6, 6)
    got = by_distance(e, 1)
    for d in range(6):
        want = sum((e[:, i, i - d] for i in range(6) if i - d >= 1), torch.zeros(2))
        torch.testing.assert_close(got[:, d], want)


# ---------------------------------------------------------------------- rules, densities, assignment
def test_candidates_are_the_published_ones():
    rules = candidates(2048, 8192, 1024, 9)
    plan = [(0, 0.125), (0, 0.625), (0, 0.75), (0, 0.25), (0, 0.875), (-1024, 1.0), (0, 0.5), (0, 0.375), (1024, 0.125)]
    have = {tuple(r) for r in rules.tolist()}
    assert set(plan) <= have and (0.0, 1.0) in have
    for a, b in have:
        assert a + b * 2048 > 0 and a + b * 8192 <= 8192 and a % 1024 == 0 and -2048 <= a <= 8192


@pytest.mark.parametrize("n,sink,block", [(100, 0, 1), (333, 4, 16), (64, 64, 64)])
def test_density_counts_what_runs(n, sink, block):
    rules = RULES.double()
    got = density(rules, n, sink, block)
    for (a, b), d in zip(rules.tolist(), got.tolist(), strict=True):
        assert d == pytest.approx(float(slow_mask(a, b, n, range(n), sink, block).sum() / (n * (n + 1) / 2)))


def brute(loss, dens, bound, most):
    """Every assignment of rules to heads."""
    layers, heads, n = loss.shape
    best = math.inf
    for pick in itertools.product(range(n), repeat=layers * heads):
        rows = torch.tensor(pick).view(layers, heads)
        if any(len(set(r.tolist())) > most for r in rows) or (dens[rows].mean((0, 1)) > bound + 1e-9).any():
            continue
        best = min(best, float(loss.gather(-1, rows[..., None]).sum()))
    return best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), bound=st.sampled_from([0.3, 0.5, 0.8]), most=st.sampled_from([1, 2]))
@pytest.mark.parametrize("layers,heads,n", [(1, 3, 4), (3, 1, 4), (2, 2, 3)])
def test_assignment_matches_brute_force(layers, heads, n, seed, bound, most):
    gen = torch.Generator().manual_seed(seed)
    loss = torch.rand(layers, heads, n, generator=gen, dtype=torch.float64)
    dens = torch.rand(n, 2, generator=gen, dtype=torch.float64)
    dens[0] = 0.05  # one rule always fits
    got = assign(loss, dens, bound, most)
    assert (dens[got].mean((0, 1)) <= bound + 1e-9).all()
    assert all(len(set(r.tolist())) <= most for r in got)
    assert float(loss.gather(-1, got[..., None]).sum()) == pytest.approx(brute(loss, dens, bound, most), abs=1e-9)


def test_thinning_keeps_the_bound(monkeypatch):
    """Many heads and rules, few states: still within the density at every length, and hardly dearer."""
    gen = torch.Generator().manual_seed(4)
    rules = candidates(500, 2000, 250, 9)
    dens = torch.stack([density(rules, n, 16, 16) for n in (500, 1000, 2000, 4000)], -1)
    loss = (torch.rand(3, 3, 1, generator=gen) * (1 - dens.mean(1)) ** (1 + 3 * torch.rand(3, 3, 1, generator=gen))).double()
    fine = assign(loss, dens, 0.5, 2)
    monkeypatch.setattr(moa_search, "STATES", 8)
    rough = assign(loss, dens, 0.5, 2)
    a, b = (float(loss.gather(-1, c[..., None]).sum()) for c in (fine, rough))
    assert all((dens[c].mean((0, 1)) <= 0.5 + 1e-9).all() for c in (fine, rough))
    uniform = [int(i) for i in (dens.amax(1) <= 0.5).nonzero()[:, 0]]
    assert b <= 1.05 * a and a < 0.95 * min(float(loss[..., i].sum()) for i in uniform)
    with pytest.raises(ConfigError, match="expects density >="):
        assign(loss, dens, 0.01, 2)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 40), c=st.integers(1, 3), seed=st.integers(0, 99))
def test_front(n, c, seed):
    """States that nothing beats in everything, each figure once."""
    gen = torch.Generator().manual_seed(seed)
    cost, used = torch.randint(0, 6, (n,), generator=gen).double(), torch.randint(0, 6, (n, c), generator=gen).double()
    got = front(cost, used, torch.ones(c).double()).tolist()
    figures = [(float(cost[i]), *used[i].tolist()) for i in range(n)]
    want = {f for f in figures if not any(o != f and all(x <= y for x, y in zip(o, f, strict=True)) for o in figures)}
    assert sorted(figures[i] for i in got) == sorted(want)


# ---------------------------------------------------------------------- the whole search
def story(n, far, seed, h=4, d=16):
    """Heads below `far` look a third of the text back, the others at their neighbour."""
    gen = torch.Generator().manual_seed(seed)
    code = torch.randn(1, 1, n, d, generator=gen)
    k, q = 2 * code, torch.empty(1, h, n, d)
    for i in range(h):
        q[:, i : i + 1] = 4 * torch.roll(code, n // 3 if i < far else 1, 2)
    v, grad = (torch.randn(1, heads, n, d, generator=gen) for heads in (1, h))
    return q, k.expand(1, 1, n, d).clone(), v, grad


def searched(steps, bound=0.5, stop=None):
    method = MoA(block=16, sink=16, alpha_step=32)
    search = method.search(Target("density", bound))
    for at, (n, layer, seed) in enumerate(steps):
        if at == stop:
            state, search = search.state(), method.search(Target("density", bound))
            search.resume({name: t.clone() for name, t in state.items()})
        q, k, v, grad = story(n, 2 if layer else 1, seed)
        search.see(seen(q, k, v, layer, 2), q, grad)
    search.end_pass()
    return search.finish()


STEPS = [(n, layer, seed) for seed, n in enumerate((160, 320, 330, 160)) for layer in (0, 1)]


def test_the_search_gives_wide_windows_to_those_who_look_far():
    found = searched(STEPS)
    width = found.tensors["alpha"] + found.tensors["beta"] * 320
    assert (width[0, :1] > 110).all() and (width[1, :2] > 110).all()
    assert width[0, 1:].max() < 110 and width[1, 2:].max() < 110
    assert max(found.report["density"]) <= 0.5 and found.report["lengths"] == [160, 330, 660]
    assert all(
        len({(float(a), float(b)) for a, b in zip(*r, strict=True)}) <= 2 for r in zip(*found.tensors.values(), strict=True)
    )
    drive = Drive(
        f"prefill=moa:profile={folder(Profile('moa', found.options, found.tensors))},block=16,sink=16", layers=2, layer=1
    )
    q, k, v, _ = story(320, 2, 9)
    own = drive(q, k, v)
    even = Drive("prefill=moa:density=0.5,block=16,sink=16")(q, k, v)
    want = oracle(q, (k, v))
    assert (own - want).abs().mean() < 0.25 * (even - want).abs().mean()


def test_all_density_is_dense_and_resumed_is_the_same():
    whole = searched(STEPS, 1.0)
    lost = whole.report["loss"]
    assert all(x < 1e-6 for x in lost)
    a, b = searched(STEPS), searched(STEPS, stop=4)
    assert a.report == b.report and all(torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def test_layers_with_a_window_of_their_own_are_left_out():
    search = MoA(block=16, sink=16, alpha_step=32).search(Target("density", 0.4))
    q, k, v, grad = story(160, 2, 0)
    search.see(replace(seen(q, k, v, 0, 2), window=32), q, grad)
    search.see(seen(q, k, v, 1, 2), q, grad)
    found = search.finish()
    assert (
        found.tensors["alpha"].shape == (2, 4)
        and bool((found.tensors["beta"][0] == 1).all())
        and sum(c for *_, c in found.report["rules"]) == 4
    )
