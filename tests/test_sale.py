"""SALE against a slow transcription of its card."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods import sale
from foveate.methods.base import AttnInput, State
from foveate.methods.sale import SALE
from foveate.methods.search import Target
from foveate.profile import Profile
from foveate.registry import parse
from foveate.scores import lowbit
from foveate.scores.lowbit import key_peaks, low_bit, query_peaks
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES, planned

SMALL = dict(tau=0.3, window=32, segment=64)
EXACT = SMALL | {"quant": "exact"}


def text(**options):
    return "sale:" + ",".join(f"{k}={v}" for k, v in options.items())


def rounded(x, names):
    """Rows of x with one step of quantisation for rows of the same name."""
    peak: dict = {}
    for name, top in zip(names, x.abs().amax(1).tolist(), strict=True):
        peak[name] = max(peak.get(name, 0.0), top)
    step = torch.tensor([peak[name] / 7 or 1.0 for name in names], dtype=x.dtype)[:, None]
    return (x / step).round() * step


def local_begin(m, i):
    """The last key that leaves `window` keys before block i, and whole segments after the sink; 0 if there is none."""
    begin = i * m.block_q - m.window
    while begin >= m.sink and (begin - m.sink) % m.segment:
        begin -= 1
    return begin if begin >= m.sink else 0


def relative(m, q, k, start, head, softcap=None):
    """(fp64 [N, M] estimated logits minus the log-sum-exp of sink and local keys, exact logits minus the same)."""
    r = q.shape[1] // k.shape[1]
    q, k = q[0, head].double(), k[0, head // r].double()
    scale, at = 1 / math.sqrt(q.shape[1]), range(start, start + len(q))
    k = k if softcap else k - k.mean(0)
    fine, rough = q - q.mean(0), k
    if m.quant == "fragment":
        fine = rounded(fine, [(p // 16, p % 8) for p in at])
        rough = rounded(k, [(j // 32, j % 8 // 2) for j in range(len(k))])
    elif m.quant == "token":
        fine, rough = rounded(fine, list(at)), rounded(k, list(range(len(k))))
    cap = (lambda s: softcap * torch.tanh(s / softcap)) if softcap else (lambda s: s)
    exact, guess = cap(scale * (q @ k.T)), cap(scale * (fine @ rough.T + q.mean(0) @ k.T))
    key, row = torch.arange(len(k)), torch.tensor(list(at))[:, None]
    begin = torch.tensor([local_begin(m, p // m.block_q) for p in at])[:, None]
    seen = ((key < m.sink) | (key >= begin)) & (key <= row)
    lse = exact.masked_fill(~seen, -math.inf).logsumexp(1, keepdim=True)
    return guess - lse, exact - lse


def transcribe(m, q, k, start=0, softcap=None):
    """[head][block] -> sorted first keys."""
    h, n = q.shape[1:3]
    out = []
    for head in range(h):
        guess, _ = relative(m, q, k, start, head, softcap)
        lists = []
        for i in range(start // m.block_q, (start + n - 1) // m.block_q + 1):
            lo, hi = max(start, i * m.block_q), min(start + n, (i + 1) * m.block_q)
            begin, mine = local_begin(m, i), []
            for j in range(0, hi, m.block_k):
                large = guess[lo - start : hi - start, j : j + m.block_k].exp() > m.tau
                if j < m.sink or j >= begin or bool(large.any()):
                    mine.append(j)
            lists.append(mine)
        out.append(lists)
    if m.share == "group":
        r = h // k.shape[1]
        out = [[sorted(set().union(*some)) for some in zip(*out[a : a + r], strict=True)] for a in range(0, h, r)]
    return out


def lists_of(layout):
    t, c = layout.tiles[0].tolist(), layout.tile_count[0].tolist()
    return [[row[:n] for row, n in zip(rows, counts, strict=True)] for rows, counts in zip(t, c, strict=True)]


def call(q, k, v, start=0, **options):
    return AttnInput(q[:, :, start:], KV.dense(k, v), "prefill", 0, 2, 1 / math.sqrt(q.shape[-1]), start=start, **options)


def plan(x, **options):
    return SALE(**options).plan(x, State())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"quant": "token", "tau": 0.02, "share": "group"}, {"quant": "exact", "tau": 0.1}])
def test_selection(case, options):
    """Index by index, on whole prompts whose last block is partial."""
    q, k, _, _ = case.make()
    layout = planned(text(**SMALL | options), case)
    layout.validate()
    assert (layout.block_q, layout.tile_width) == (64, 32)
    assert lists_of(layout) == transcribe(SALE(**SMALL | options), q, k)


@pytest.mark.parametrize("h,g,start,n", [(1, 1, 128, 100), (3, 1, 203, 3), (4, 1, 150, 77), (8, 1, 203, 1), (4, 2, 64, 190)])
def test_chunks_and_groups(h, g, start, n):
    """A chunk, also one inside a block, is planned at its true positions."""
    q, k, v = qkv(1, h, g, start + n)
    x = call(q, k, v, start)
    layout = plan(x, **SMALL)
    layout.validate()
    assert lists_of(layout) == transcribe(SALE(**SMALL), x.q, k, start)


def test_pieces_change_nothing(monkeypatch):
    """However little memory a piece of work may hold."""
    q, k, v = qkv(1, 6, 2, 333)
    want = plan(call(q, k, v, 30), **SMALL)
    calls = []

    def small(total, cost, budget):
        calls.append(total)
        return [(i, i + 1) for i in range(total)]

    monkeypatch.setattr(lowbit, "pieces", small)
    got = plan(call(q, k, v, 30), **SMALL)
    assert len(calls) > 10 and lists_of(got) == lists_of(want)


# ---------------------------------------------------------------------- the card's tests that must hold
def test_without_quantisation_and_threshold_it_is_dense():
    q, k, v = qkv(1, 4, 2, 300)
    x = call(q, k, v)
    layout = SALE(**EXACT).layout(x, torch.zeros(4))
    assert bool((layout.to_mask() == torch.ones(300, 300, dtype=torch.bool).tril()).all())
    assert plan(x, **SMALL | {"tau": 0.0}) is None and plan(x, **SMALL | {"tau": 0.9e-5}) is None


def test_every_dropped_pair_is_small():
    q, k, v = qkv(1, 4, 2, 300)
    mask = plan(call(q, k, v), **EXACT).to_mask()
    causal = torch.ones(300, 300, dtype=torch.bool).tril()
    for head in range(4):
        _, exact = relative(SALE(**EXACT), q, k, 0, head)
        dropped = causal & ~mask[0, head]
        assert bool(dropped.any()) and float(exact[dropped].exp().max()) <= 0.3 + 1e-6


@pytest.mark.parametrize("quant", ["fragment", "exact"])
def test_a_constant_in_all_keys_changes_nothing(quant):
    q, k, v = qkv(1, 4, 2, 300)
    shift = torch.linspace(-20, 20, 16)
    a, b = Drive(text(**SMALL, quant=quant)), Drive(text(**SMALL, quant=quant))
    torch.testing.assert_close(a(q, k, v), b(q, k + shift, v), atol=2e-4, rtol=1e-4)
    assert lists_of(a.last[1]) == lists_of(b.last[1])


@pytest.mark.parametrize("share", ["fragment", "token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_error_of_the_estimate(share, bits):
    """Each of the two roundings moves a channel by at most half a step; shared steps cover all rows that share them."""
    q, k, _ = qkv(1, 1, 1, 96)
    q, k = q[0, 0], k[0, 0]
    qp, kp = query_peaks(q, share), key_peaks(k, share)
    assert bool((qp >= q.abs().amax(-1)).all()) and bool((kp >= k.abs().amax(-1)).all())
    rough, fine = low_bit(k, kp, bits), low_bit(q, qp, bits)
    half = 2 * (2 ** (bits - 1) - 1)
    error = (fine @ rough.T - q @ k.T).abs()
    bound = q.abs().sum(-1, keepdim=True) * kp / half + qp[:, None] / half * rough.abs().sum(-1)
    assert bool((error <= bound + 1e-5).all()) and float(error.max()) > float(bound.max()) / 100


def test_fragments_share_steps():
    """Rows t and t + 8 of 16; keys of one floor((j mod 8) / 2) in 32."""
    x = torch.zeros(64, 1)
    x[3], x[11], x[16 + 5] = 1.0, 4.0, 2.0
    peak = query_peaks(x, "fragment")
    assert {i: float(p) for i, p in enumerate(peak) if p > 0} == {3: 4.0, 11: 4.0, 21: 2.0, 29: 2.0}
    x = torch.zeros(50, 1)
    x[5], x[33] = 3.0, -2.0
    peak = key_peaks(x, "fragment")
    want = {j: 3.0 for j in range(32) if j % 8 in (4, 5)} | {j: 2.0 for j in range(32, 50) if j % 8 in (0, 1)}
    assert {j: float(p) for j, p in enumerate(peak) if p > 0} == want


def test_what_is_always_in():
    q, k, v = qkv(1, 4, 2, 300)
    mask = plan(call(q * 0.01, k, v), tau=0.9, window=40, segment=32, quant="exact").to_mask()
    assert int((~mask).sum()) > 300 * 299 // 2 * 4
    for i in range(300):
        assert bool(mask[:, :, i, : min(i + 1, 32)].all()) and bool(mask[:, :, i, max(0, i // 64 * 64 - 40) : i + 1].all())


@pytest.mark.parametrize("at", [32, 63, 64, 100])
def test_one_needle_of_one_row_is_found(at):
    """A pair that no pooled estimate would see: one key, one query."""
    q, k, v = (t * 0.1 for t in qkv(1, 4, 2, 300))
    k[:, :, at, 3] = q[:, :, 261, 3] = 9.0
    layout = plan(call(q, k, v), **SMALL | {"tau": 0.9})
    for rows in lists_of(layout):
        assert at // 32 * 32 in rows[4] and len(rows[4]) < 10 and not {32, 64, 96} & set(rows[3]) - {at // 32 * 32}


def test_a_smaller_tau_keeps_a_superset():
    q, k, v = qkv(1, 4, 2, 300)
    masks = [plan(call(q, k, v), **SMALL | {"tau": tau}).to_mask() for tau in (0.6, 0.3, 0.2, 0.1, 1e-3)]
    for few, more in zip(masks, masks[1:], strict=False):
        assert not bool((few & ~more).any())
    assert len({int(m.sum()) for m in masks}) >= 4


def test_softcap_and_zeros():
    """Under a softcap the mean key does not cancel and the threshold is compared before the cap."""
    q, k, v = (3 * t for t in qkv(1, 4, 2, 300))
    for tau in (0.02, 0.3):
        x = call(q, k + 1.0, v, softcap=5.0)
        m = SALE(**EXACT | {"tau": tau})
        assert lists_of(m.plan(x, State())) == transcribe(m, q, k + 1.0, softcap=5.0)
    zero = plan(call(q * 0, k * 0, v), **SMALL)
    assert [len(rows) for rows in lists_of(zero)[0]] == [2, 4, 4, 4, 4]  # sink, and the local 128 keys of each block


def test_where_it_runs_dense():
    q, k, v = qkv(1, 4, 2, 300)
    cut = lambda n: call(q[:, :, :n], k[:, :, :n], v[:, :, :n])  # noqa: E731
    assert plan(cut(128), **SMALL) is None and plan(cut(129), **SMALL) is not None
    weighted = AttnInput(q, KV.dense(k, v, bias=torch.zeros(1, 2, 300)), "prefill", 0, 2, 0.25)
    assert plan(weighted, **SMALL) is None


# ---------------------------------------------------------------------- thresholds per head
def test_profile(tmp_path):
    q, k, v = qkv(1, 4, 2, 300)
    x = call(q, k, v)
    tau = torch.tensor([[0.3, 0.0, 0.05, 9e-6], [1.0, 1.0, 1.0, 1.0]])
    path = str(Profile("sale", tensors={"tau": tau}).save(tmp_path / "good"))
    got = lists_of(plan(x, **SMALL | {"profile": path}))
    for head, t in enumerate(tau[0].tolist()):
        same = plan(x, **SMALL | {"tau": t})
        whole = [list(range(0, min(300, 64 * i + 64), 32)) for i in range(5)]
        assert got[head] == (whole if same is None else lists_of(same)[head])
    for name, profile in (("few", Profile("sale", tensors={"tau": tau[:, :3]})), ("none", Profile("sale"))):
        with pytest.raises(ConfigError, match=r"sale: profile expected a tensor tau of shape .* = \[2, 4\], got"):
            plan(x, **SMALL | {"profile": str(profile.save(tmp_path / name))})
    with pytest.raises(ConfigError, match="made for quest, expected one for sale"):
        plan(x, **SMALL | {"profile": str(Profile("quest").save(tmp_path / "other"))})


def test_search_halves_until_the_error_is_small():
    q, k, v = qkv(1, 4, 2, 300)
    q[:, 0] *= 0.01  # a head of even attention loses most
    x = call(q, k, v)
    out = oracle(q, (k, v))
    method = SALE(window=32, segment=64, theta=0.4)
    search = method.search(Target("loss", 0.05))

    def error(head, tau):
        got = oracle(q, (k, v), method.layout(x, torch.full((4,), tau)))
        return float((got - out)[:, head].abs().sum()), float(out[:, head].abs().sum())

    search.see(x, out, None)
    tau = search.state()["tau"]
    assert tau.shape == (2, 4) and bool((tau[1] == method.tau).all())  # not shown: as without a profile
    for head, t in enumerate(tau[0].tolist()):
        bad, size = error(head, t)
        assert bad < min(0.05 * size, 0.4 * 300)
        if t < sale.START:
            bad, size = error(head, 2 * t if t else 2 * sale.FLOOR * 0.62)
            assert t in [0.0] + [sale.START / 2**i for i in range(1, 7)] and bad >= min(0.05 * size, 0.4 * 300)
    tight = method.search(Target("loss", 1e-9))
    tight.see(x, out, None)
    assert bool((tight.state()["tau"][0] <= tau[0]).all()) and bool((tight.state()["tau"][0] == 0).any())
    again = method.search(Target("loss", 0.9))
    again.resume(tight.state())
    again.see(x, out, None)  # an easier prompt never raises a threshold
    assert torch.equal(again.finish().tensors["tau"], tight.finish().tensors["tau"])
    assert tight.finish().report["dense_heads"] == float((tight.state()["tau"] == 0).float().mean())
    assert method.search(Target("recall", 0.9)) is None and SALE.knob.name == "tau"


def test_search_gives_up_at_the_floor():
    """A head whose dropped blocks hold little, but more than the target allows, at every threshold: it becomes dense."""
    q, k, v = qkv(1, 4, 2, 300)
    k[:, 1, :, 0] = 0.0
    k[:, 1, :32, 0] = 5.0
    q[:, 2] = torch.eye(16)[0] * 8.0  # logits 10 at the sink and 0 elsewhere: below 1e-5 of the sink's mass
    method = SALE(window=32, segment=64)
    search = method.search(Target("loss", 3e-5))
    x = call(q, k, v)
    search.see(x, oracle(q, (k, v)), None)
    assert float(search.finish().tensors["tau"][0, 2]) == 0.0
    rows = lists_of(method.layout(x, torch.full((4,), 1.01 * sale.DENSE)))[2]
    assert rows[4] == [0, 224, 256, 288]


def test_options():
    m = parse("sale")
    assert (m.block_q, m.block_k, m.sink, m.segment, m.tau, m.bits, m.quant) == (64, 32, 32, 128, 0.004, 4, "fragment")
    assert m.min_length == 1025 and parse("sale@8k").window == 128
    for bad in ("sale:tau=-1", "sale:sink=20", "sale:segment=100", "sale:block_q=40", "sale:bits=1", "sale:quant=int4"):
        with pytest.raises(ConfigError, match="sale"):
            parse(bad)
