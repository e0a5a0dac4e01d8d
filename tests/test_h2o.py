"""H2O against slow transcriptions of its card: sums over the prompt, one eviction a token, the version with slots."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import ConfigError
from foveate.kv import KV
from foveate.methods.h2o import H2O, SUMS, Sums
from foveate.registry import parse
from foveate.scores import mass as mass_module
from foveate.scores.mass import column_mass, row_lse
from foveate.scores.window import group_reduce
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES


def probabilities(q, k, scale):
    """fp64 `[H, N, N]`, causal, q and k `[1, H|G, N, D]`."""
    h, n = q.shape[1], q.shape[2]
    s = q[0].double() @ k[0].double().repeat_interleave(h // k.shape[1], 0).transpose(-1, -2) * scale
    return s.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def heaviest(acc, heavy, recent):
    """The card: of the entries (number -> sum) the heaviest before the recent ones, ties to the newer, and the recent."""
    order = sorted(acc)
    old = sorted(order[: len(order) - recent], key=lambda j: (-acc[j], -j))
    return sorted(old[:heavy] + order[len(order) - recent :])


def kept(drive, g):
    kv = drive.cache.store.view()
    return kv.positions()[0, g, : int(kv.lengths()[0, g])].tolist()


def run(recipe, q, k, v, prompt):
    drive = Drive(recipe, d=q.shape[-1])
    drive(*(t[:, :, :prompt] for t in (q, k, v)))
    for i in range(prompt, q.shape[2]):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    return drive


# ---------------------------------------------------------------------- sums of the prompt
@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1), (6, 2)])
@pytest.mark.parametrize("start", [0, 37])
def test_column_mass_is_explicit(h, g, start, monkeypatch):
    """N != M, in many pieces, with and without the lse."""
    q, k, v = qkv(1, h, g, 90, seed=h)
    monkeypatch.setattr(mass_module, "BUDGET", 9000)
    want = probabilities(q, k, 0.25)[:, start:].sum(1)
    pos = torch.arange(start, 90)[None]
    kv = KV.dense(k, v)
    got = column_mass(q[:, :, start:], kv, pos, scale=0.25)
    torch.testing.assert_close(got[0].double(), want, atol=1e-4, rtol=1e-5)
    lse = row_lse(q[:, :, start:], kv, pos, scale=0.25)
    again = column_mass(q[:, :, start:], kv, pos, scale=0.25, lse=lse)
    torch.testing.assert_close(again[0].double(), want, atol=1e-4, rtol=1e-5)
    assert got.sum(-1)[0].tolist() == pytest.approx([90 - start] * h, rel=1e-5)


def test_column_mass_of_a_cache_with_gaps():
    """Positions with gaps, weights, lengths per head, NaN beyond them, a softcap: the oracle's own scores."""
    from foveate.kernels import reference
    from foveate.layout import Layout

    q, k, v = qkv(2, 4, 2, 40)
    lens = torch.tensor([[40, 33], [38, 40]], dtype=torch.int32)
    dead = ~(torch.arange(40) < lens[..., None])[..., None]
    pos = (torch.arange(40) * 2).expand(2, 2, 40)
    bias = torch.randn(2, 2, 40, generator=torch.Generator().manual_seed(1))
    kv = KV.dense(k.masked_fill(dead, float("nan")), v.masked_fill(dead, float("nan")), lens, pos, bias)
    at = torch.arange(7, 87, 2).expand(2, 40)
    s, mask, _, _ = reference.scores(q, kv, Layout.dense(2, 4, 40, 40, q_pos=at), 0.3, 4.0)
    want = s.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)
    torch.testing.assert_close(column_mass(q, kv, at, scale=0.3, softcap=4.0), want, atol=1e-5, rtol=1e-5)


def test_sums_count_the_queries():
    """Sum over keys of acc = queries processed, while nothing is evicted; whole, in chunks, and through decode steps."""
    q, k, v = qkv(1, 6, 2, 80)
    for cuts in ((0, 70), (0, 31, 64, 70)):
        drive = Drive("h2o:heavy=100,recent=10")
        for a, b in zip(cuts, cuts[1:], strict=False):
            drive(*(t[:, :, a:b] for t in (q, k, v)))
        for i in range(70, 80):
            drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        mass = drive.cache.rows[0][SUMS].mass
        assert mass.sum(-1)[0].tolist() == pytest.approx([80.0, 80.0], rel=1e-5)
        want = group_reduce(probabilities(q, k, 0.25).sum(1)[None], 2, "mean")
        torch.testing.assert_close(mass.double(), want, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------- the selection
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("norm", ["sum", "mean"])
def test_selection_is_the_card(case, norm):
    """After the prompt, index by index; each kept set may differ only where two sums agree to rounding."""
    q, k, v, _ = case.make()
    n, g = 300, k.shape[1]
    drive = run(f"h2o:norm={norm}", *(torch.cat([t, t[:, :, -1:]], 2) for t in (q, k, v)), n)
    acc = group_reduce(probabilities(q, k, case.scale).sum(1)[None], g, "mean")[0]
    if norm == "mean":
        acc = acc / (n - torch.arange(n))
    for j in range(g):
        got, want = kept(drive, j)[:-1], heaviest(dict(enumerate(acc[j].tolist())), 30, 30)
        assert len(got) == 60 and got[-30:] == list(range(270, 300))
        odd = set(got) ^ set(want)
        edge = sorted(float(acc[j, e]) for e in want[:30])[0] if odd else 0.0
        assert all(float(acc[j, e]) == pytest.approx(edge, rel=1e-5) for e in odd)


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1), (6, 2)])
def test_one_eviction_a_token_equals_the_slots(h, g):
    """The published in-place layout: hitters and a ring; the leaving ring entry takes the lightest hitter's slot or goes."""
    heavy, recent, prompt, n = 6, 5, 40, 75
    q, k, v = qkv(1, h, g, n, seed=3)
    q = q * 2
    drive = Drive(f"h2o:heavy={heavy},recent={recent},slack=1", d=16)
    drive(*(t[:, :, :prompt] for t in (q, k, v)))
    p = probabilities(q[:, :, :prompt], k[:, :, :prompt], 0.25).sum(1).view(g, h // g, -1).mean(1)
    slots = []
    for j in range(g):
        first = heaviest(dict(enumerate(p[j].tolist())), heavy, recent)
        slots.append(([(e, float(p[j, e])) for e in first[:heavy]], [(e, float(p[j, e])) for e in first[heavy:]]))
    for t in range(prompt, n):
        drive(*(x[:, :, t : t + 1] for x in (q, k, v)))
        for j in range(g):
            hit, ring = slots[j]
            names = [e for e, _ in hit + ring] + [t]
            rows = q[0, j * (h // g) : (j + 1) * (h // g), t].double()
            prob = (rows @ k[0, j, names].double().T * 0.25).softmax(-1).mean(0).tolist()
            all_ = [(e, a + b) for (e, a), b in zip([*hit, *ring, (t, 0.0)], prob, strict=True)]
            hit, leaving, ring = all_[:heavy], all_[heavy], all_[heavy + 1 :]
            victim = min(range(heavy), key=lambda i: (hit[i][1], hit[i][0]))
            if leaving[1] >= hit[victim][1]:
                hit[victim] = leaving
            slots[j] = (hit, ring)
            assert kept(drive, j) == sorted(e for e, _ in hit + ring)


def test_a_slack_lets_entries_gather():
    q, k, v = qkv(1, 4, 2, 130)
    drive = Drive("h2o:heavy=10,recent=10,slack=8")
    drive(*(t[:, :, :100] for t in (q, k, v)))
    sizes = []
    for i in range(100, 130):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        sizes.append(drive.cache.store.lens[0][0])
        assert kept(drive, 0)[-10:] == list(range(i - 9, i + 1))
        assert drive.cache.rows[0][SUMS].mass.shape[2] == sizes[-1]
    assert sizes[:9] == [21, 22, 23, 24, 25, 26, 27, 20, 21] and max(sizes) == 27


def test_a_heavy_key_survives_a_thousand_steps():
    q, k, v = (t * 0.1 for t in qkv(1, 2, 1, 1101, d=8))
    q[..., 3] = 4.0
    k[..., 3] = 0.0
    k[:, :, 41, 3] = 8.0
    drive = run("h2o:heavy=8,recent=8,slack=64", q, k, v, 100)
    assert 41 in kept(drive, 0) and drive.cache.store.lens[0][0] <= 16 + 64
    assert kept(drive, 0)[-8:] == list(range(1093, 1101))


def test_ties_prefer_the_newer():
    q, k, v = qkv(1, 2, 1, 30)
    drive = Drive("h2o:heavy=4,recent=2")
    drive(q, k * 0, v)
    drive.cache.rows[0][SUMS] = Sums(torch.ones(1, 1, 30))
    drive(q[:, :, :1], k[:, :, :1], v[:, :, :1])
    assert kept(drive, 0) == [24, 25, 26, 27, 28, 29, 30]


def test_rows_of_a_batch_have_their_own_budgets():
    """Ratios of each row's own prompt; a short row beside a long one evicts as alone."""
    q, k, v = qkv(2, 4, 2, 124)
    valid = torch.ones(2, 120, dtype=torch.bool)
    valid[1, :60] = False
    recipe = "h2o:heavy_ratio=0.2,recent_ratio=0.1,slack=2"
    both = Drive(recipe)
    both(*(t[:, :, :120] for t in (q, k, v)), valid=valid)
    alone = [Drive(recipe), Drive(recipe)]
    alone[0](*(t[:1, :, :120] for t in (q, k, v)))
    alone[1](*(t[1:, :, 60:120] for t in (q, k, v)))
    for i in range(120, 124):
        both(*(t[:, :, i : i + 1] for t in (q, k, v)))
        for b, one in enumerate(alone):
            one(*(t[b : b + 1, :, i : i + 1] for t in (q, k, v)))
    assert both.cache.store.lens == [alone[0].cache.store.lens[0], alone[1].cache.store.lens[0]] == [[36, 36], [18, 18]]
    torch.testing.assert_close(both.last[2][1:], alone[1].last[2], atol=1e-5, rtol=1e-5)
    for i, one in enumerate(alone):
        want = one.cache.rows[0][SUMS].mass
        torch.testing.assert_close(both.cache.rows[i][SUMS].mass[..., : want.shape[2]], want, atol=1e-5, rtol=1e-5)


def test_sums_follow_forks_and_beams():
    q, k, v = qkv(2, 4, 2, 60)
    drive = Drive("h2o:heavy=12,recent=8,slack=4")
    drive(*(t[:, :, :50] for t in (q, k, v)))
    drive(*(t[:, :, 50:51] for t in (q, k, v)))
    copy = drive.cache.fork()
    before = drive.cache.rows[1][SUMS].mass.clone()
    drive.cache.reorder(torch.tensor([1, 1]))
    assert torch.equal(drive.cache.rows[0][SUMS].mass, before)
    drive(*(t[:, :, 51:52] for t in (q, k, v)))
    assert torch.equal(copy.rows[1][SUMS].mass, before) and not torch.equal(drive.cache.rows[1][SUMS].mass[..., :21], before)


def test_a_second_turn_goes_on_with_the_sums():
    """What decode has added is there when a new prompt part comes, and the budget follows the longer text."""
    q, k, v = qkv(1, 4, 2, 120)
    drive = Drive("h2o:heavy_ratio=0.1,recent_ratio=0.1,slack=4")
    drive(*(t[:, :, :60] for t in (q, k, v)))
    for i in range(60, 66):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    before = float(drive.cache.rows[0][SUMS].mass.sum())
    drive(*(t[:, :, 66:110] for t in (q, k, v)))
    assert float(drive.cache.rows[0][SUMS].mass.sum()) == pytest.approx(before + 2 * 44, rel=1e-4)
    drive(*(t[:, :, 110:111] for t in (q, k, v)))
    assert drive.cache.store.lens[0] == [23, 23] and kept(drive, 0)[-12:] == list(range(99, 111))


def test_output_and_memory():
    """Decode is exact attention over what is left; bytes fall by what is dropped and stay there."""
    q, k, v = qkv(1, 4, 2, 2300)
    drive = Drive("h2o", backend="torch")
    drive(*(t[:, :, :2048] for t in (q, k, v)))
    full = drive.cache.nbytes
    for i in range(2048, 2300):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    assert drive.cache.nbytes < 0.4 * full and drive.cache.store.lens[0][0] < 408 + 64
    x, plan, out = drive.last
    torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)


def test_without_sums_everything_stays():
    q, k, v = qkv(1, 4, 2, 60)
    drive = Drive("h2o:heavy=4,recent=4")
    drive(*(t[:, :, :59] for t in (q, k, v)))
    drive.cache.forget()
    drive(*(t[:, :, 59:] for t in (q, k, v)))
    assert drive.cache.store.lens == [[60, 60]] and any("no sums of attention" in t for t in drive.notes)


def test_options():
    assert parse("h2o").budget(1000) == (100, 100) and parse("h2o@summary").budget(9) == (1024, 1024)
    assert H2O(heavy=0, recent_ratio=0.0).budget(50) == (0, 1)
    for text, message in (
        ("h2o:heavy=-1", "heavy expected >= 0"),
        ("h2o:recent=0", "recent expected >= 1"),
        ("h2o:heavy_ratio=2", "heavy_ratio expected between 0"),
        ("h2o:slack=0", "slack expected >= 1"),
        ("h2o:norm=max", "one of sum, mean"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(text)


def test_a_rollback_that_forgets_the_sums_says_so():
    """Within the budget nothing was evicted, so tokens may go; then nothing is dropped any more, which a note tells."""
    tensors = qkv(1, 4, 2, 50)
    drive = Drive("cache=h2o:heavy=20,recent=20,slack=1")
    drive(*(t[:, :, :20] for t in tensors))
    for i in range(20, 25):
        drive(*(t[:, :, i : i + 1] for t in tensors))
    assert not drive.notes
    drive.cache.truncate(2)
    for i in range(25, 50):
        drive(*(t[:, :, i : i + 1] for t in tensors))
    assert drive.cache.store.lens == [[48, 48]] and any("rollback" in t for t in drive.notes)
