"""DeepSeek Sparse Attention against a slow transcription of its card: the indexer, its keys beside a cache, top-k."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

import foveate
from foveate.bench import breakeven
from foveate.cache import DenseStore
from foveate.cache.fixed import FixedDense
from foveate.errors import ConfigError, UnsupportedError
from foveate.kv import KV
from foveate.methods.base import AttnInput, State
from foveate.methods.dsa import DSA, KEYS
from foveate.profile import Profile, load
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores.indexer import hadamard, round8, scores
from tests.drive import Drive, Rotary, oracle, qkv
from tests.fidelity import CASES, planned
from tests.indexers import random_profile
from tests.models import tiny, tokens
from tests.test_graphs import dry, said

NAN = float("nan")


# ---------------------------------------------------------------------- the card, slowly
def slow_turn(x, pos, rope, theta):
    """Half-split rotation of the first `rope` dims of one vector."""
    y = x.clone()
    for i in range(rope // 2):
        a = pos * theta ** (-2 * i / rope)
        c, s = math.cos(a), math.sin(a)
        y[i], y[i + rope // 2] = x[i] * c - x[i + rope // 2] * s, x[i + rope // 2] * c + x[i] * s
    return y


@cache
def slow_hadamard(n):
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]) / math.sqrt(n)


def slow_e4m3(x):
    """Hadamard by its matrix, then e4m3 with a power of two as scale: (rounded, scale)."""
    x = slow_hadamard(len(x)) @ x
    scale = 2.0 ** math.ceil(math.log2(max(float(x.abs().max()), 1e-4) / 448))
    return (x / scale).to(torch.float8_e4m3fn).float(), scale


def slow_scores(q, k, rope, weights, turn, theta, rows, fp8):
    """I[t][s] for the rows t: q [H, N, D], k [G, N, D] rotated."""
    n, d = q.shape[1], q.shape[2]
    wq, wk, ww, norm = weights
    pos = torch.arange(n)[None]
    raw_q, raw_k = rope.unrotate(q[None], pos)[0], rope.unrotate(k[None], pos)[0]

    def feature(x, t, width):
        return x[:, t].mean(0) if width == d else torch.cat([*x[:, t]])

    keys = []
    for s in range(n):
        y = wk @ feature(raw_k, s, wk.shape[1])
        y = (y - y.mean()) / math.sqrt(float(y.var(unbiased=False)) + 1e-6) * norm[0] + norm[1]
        y = slow_turn(y, s, turn, theta)
        keys.append(slow_e4m3(y) if fp8 else (y, 1.0))
    out = {}
    for t in rows:
        f, w = feature(raw_q, t, wq.shape[2]), None
        w = ww @ f / math.sqrt(wq.shape[0]) / math.sqrt(wq.shape[1])
        heads = []
        for j in range(wq.shape[0]):
            y = slow_turn(wq[j] @ f, t, turn, theta)
            heads.append(slow_e4m3(y) if fp8 else (y, 1.0))
        total = torch.zeros(t + 1)
        for j, (y, s) in enumerate(heads):
            total += w[j] * s * (torch.stack([ks for ks, _ in keys[: t + 1]]) @ y).clamp(min=0)
        out[t] = (total * torch.tensor([scale for _, scale in keys[: t + 1]])).tolist()
    return out


def slow_top(score, k):
    own = len(score) - 1
    rest = sorted(range(own), key=lambda s: (-score[s], s))[: k - 1]
    return sorted([*rest, own])


def weights_of(path, layer=2):
    t = load(path).tensors
    return [t[f"layer.{layer}.{n}"] for n in ("q", "k", "w", "norm")]


def listed(layout, row):
    assert layout.entries.shape[1] == 1  # one set for all heads
    return layout.entries[0, 0, row, : layout.entry_count[0, 0, row]].tolist()


def agree(got, score, k):
    """The set is the slow one, or differs only where scores are equal up to rounding."""
    want = slow_top(score, k)
    assert got == sorted(set(got)) and len(got) == len(want) and len(score) - 1 in got
    size = max(1e-6, max(abs(s) for s in score))
    a, b = (sorted(score[e] for e in set(x) - set(y)) for x, y in ((got, want), (want, got)))
    assert all(abs(x - y) < 1e-5 * size for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_selection(case, fp8):
    q, k, _, rope = case.make()
    h, g, n, d = q.shape[1], k.shape[1], q.shape[2], q.shape[3]
    path = random_profile(h, g, d)
    rows = [0, 39, 40, 41, 150, 299]
    score = slow_scores(q[0], k[0], rope, weights_of(path), 4, 1e4, rows, fp8)
    layout = planned(f"prefill=dsa:budget=40,fp8={str(fp8).lower()},profile={path}", case)
    layout.validate()
    for t in rows:
        agree(listed(layout, t), score[t], 40)
    cuts = (0, 37, 201)
    parts = planned(f"prefill=dsa:budget=40,fp8={str(fp8).lower()},profile={path}", case, cuts[1:])
    for part, lo in zip(parts, cuts, strict=True):
        assert part.full == (lo == 0)  # 37 tokens are fewer than the budget
        for t in [t for t in rows if lo <= t < lo + part.shape[2] and not part.full]:
            agree(listed(part, t - lo), score[t], 40)
    assert n == 300


@pytest.mark.parametrize("h,g", [(1, 1), (3, 1), (4, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("storage", ["dense", "paged"])
def test_decode_of_rows_of_different_length(h, g, storage):
    """Each step of each row; logical entries over pages give what they give over a rectangle."""
    lens, d = (70, 41), 16
    path = random_profile(h, g, d, theta=500.0)
    q, k, v = qkv(2, h, g, 80)
    drive = Drive(Recipe(decode=f"dsa:budget=24,fp8=false,profile={path}", storage=storage))
    valid = torch.arange(70) >= 70 - torch.tensor(lens)[:, None]
    bad = [t[:, :, :70].masked_fill(~valid[:, None, :, None], NAN) for t in (q, k, v)]
    drive(*bad, valid=valid)
    for i in range(70, 75):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        x, layout, out = drive.last
        layout.validate()
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
    for b, n in enumerate(lens):
        real = [torch.cat([t[b, :, 70 - n : 70], t[b, :, 70:75]], 1) for t in (q, k)]
        score = slow_scores(*real, drive.info.rope, weights_of(path), 4, 500.0, [n + 4], False)
        agree(layout.entries[b, 0, 0, : layout.entry_count[b, 0, 0]].tolist(), score[n + 4], 24)


def test_full_budget_is_dense():
    q, k, v = qkv(1, 4, 2, 60)
    path = random_profile(4, 2, 16)
    for phase, n in (("prefill", 60), ("decode", 1)):
        x = AttnInput(q[:, :, 60 - n :], KV.dense(k, v), phase, 0, 4, 0.25, start=60 - n, rope=Rotary(16))
        assert DSA(budget=60, profile=path).plan(x, State()) is None


# ---------------------------------------------------------------------- the indexer
def test_scores_do_not_change_under_hadamard_on_both_sides():
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 5, 3, 32, generator=gen), torch.randn(1, 50, 32, generator=gen)
    w = torch.randn(1, 5, 3, generator=gen)
    torch.testing.assert_close(scores(hadamard(q), w, hadamard(k)), scores(q, w, k), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hadamard(hadamard(q)), q, atol=1e-5, rtol=1e-5)
    one = torch.cat([scores(q[:, t : t + 1], w[:, t : t + 1], k) for t in range(5)], 1)  # the path of decode
    torch.testing.assert_close(one, scores(q, w, k), atol=1e-4, rtol=1e-4)


def test_a_positive_scale_may_be_multiplied_into_keys_or_sums():
    gen = torch.Generator().manual_seed(1)
    q, k, w = (
        torch.randn(2, 1, 3, 8, generator=gen),
        torch.randn(2, 40, 8, generator=gen),
        torch.randn(2, 1, 3, generator=gen),
    )
    scale = torch.rand(2, 40, generator=gen) + 0.1
    torch.testing.assert_close(scores(q, w, k, scale), scores(q, w, k * scale[..., None]), atol=1e-5, rtol=1e-5)


def test_rounding():
    x = torch.cat([torch.randn(6, 16, generator=torch.Generator().manual_seed(2)) * 50, torch.zeros(1, 16)])
    y, scale = round8(x)
    assert torch.equal(scale.log2(), scale.log2().round())  # powers of two
    assert float(y.abs().max()) <= 448 and bool(torch.isfinite(y).all())
    assert float((y * scale[:, None] - x).abs().max()) <= float(x.abs().max()) / 16  # three bits of mantissa
    assert float(scale[-1]) == 2.0 ** math.ceil(math.log2(1e-4 / 448))


def test_scales_at_the_edge():
    """The least power of two that leaves no number above 448: exactly, on every device."""
    for power in range(-6, 8):
        edge = torch.tensor(448.0) * 2.0**power
        for x, want in ((edge, power), (edge.nextafter(torch.tensor(1e9)), power + 1), (edge.nextafter(-edge), power)):
            y, scale = round8(x[None])
            assert float(scale) == 2.0**want and float(y.abs()) <= 448


def test_negative_weights_and_ties():
    """No softmax: a negative weight pushes down. Zeros of ReLU go to the lower position, the query's own token is in."""
    q = torch.ones(1, 1, 1, 4)
    k = torch.tensor([[1.0] * 4, [-1.0] * 4, [-2.0] * 4, [3.0] * 4])[None]
    assert scores(q, -torch.ones(1, 1, 1), k)[0, 0].tolist() == [-4.0, 0.0, 0.0, -12.0]
    d = 4
    eye = torch.eye(d)
    path = random_profile(1, 1, d)
    tensors = dict(load(path).tensors)
    tensors |= {"layer.0.q": -eye[None], "layer.0.k": eye, "layer.0.w": torch.full((1, d), 1.0)}
    tensors["layer.0.norm"] = torch.stack([torch.ones(d), torch.zeros(d)])
    Profile("dsa", {"rope_dims": 0}, tensors).save(path)
    v = torch.ones(1, 1, 50, d).cumsum(-1)
    x = AttnInput(v[:, :, -1:], KV.dense(v, v), "decode", 0, 4, 0.5, q_pos=torch.tensor([[49]]), rope=Flat())
    layout = DSA(budget=6, fp8=False, profile=path).plan(x, State())
    assert layout.entries[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 49]


class Flat:
    def rotate(self, x, pos):
        return x

    unrotate = rotate


# ---------------------------------------------------------------------- keys beside the cache
@pytest.mark.parametrize("fp8", [False, True])
def test_keys_follow_the_cache(fp8):
    """Rollbacks, forks and reorders: the next steps are those of a cache that never saw anything else."""
    q, k, v = qkv(2, 4, 2, 140)
    recipe = f"dsa:budget=12,fp8={str(fp8).lower()},profile={random_profile(4, 2, 16)}"
    valid = torch.arange(40) >= torch.tensor([[0], [13]])

    def walk(drive, steps, rows=slice(None)):
        return [drive(*(t[rows, :, i : i + 1] for t in (q, k, v))) for i in steps]

    for mask in (None, valid) if fp8 else (valid,):
        a, b = Drive(recipe), Drive(recipe)
        for drive in (a, b):
            drive(*(t[:, :, :40] for t in (q, k, v)), valid=mask)
            walk(drive, range(40, 43))
        walk(a, range(110, 115))
        a.cache.truncate(5)
        fork = Drive(recipe)
        fork.cache = a.cache.fork()
        walk(a, range(120, 124))
        for x, y in zip(walk(fork, range(43, 46)), walk(b, range(43, 46)), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        for drive in (fork, b):
            drive.cache.reorder(torch.tensor([1, 0]))
        swapped = [1, 0]
        for x, y in zip(walk(fork, range(46, 48), swapped), walk(b, range(46, 48), swapped), strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        fresh = Drive(recipe)
        fresh(*(t[swapped][:, :, :40] for t in (q, k, v)), valid=None if mask is None else mask[swapped])
        walk(fresh, range(40, 48), swapped)
        torch.testing.assert_close(b.last[1].entries, fresh.last[1].entries)


def test_forks_and_second_turns():
    """A fork and its original go different ways without seeing each other; a second prompt part comes between steps."""
    q, k, v = qkv(2, 2, 1, 60)
    recipe = f"dsa:budget=6,fp8=false,profile={random_profile(2, 1, 16)}"
    valid = torch.arange(20) >= torch.tensor([[0], [7]])

    def walk(drive, *ways):
        for lo, hi in ways:
            out = drive(*(t[:, :, lo:hi] for t in (q, k, v)), valid=valid if lo == 0 else None)
        return out

    a, fork = Drive(recipe), Drive(recipe)
    start, left, right = ((0, 20), (20, 21)), ((30, 31), (31, 32), (32, 39), (39, 40)), ((50, 51), (51, 52), (52, 53))
    walk(a, *start)
    fork.cache = a.cache.fork()
    walk(a, *left[:2])
    after = walk(fork, *right)
    torch.testing.assert_close(after, walk(Drive(recipe), *start, *right), atol=1e-6, rtol=1e-6)
    whole = Drive(recipe)  # the same tokens as one prompt: every key is computed at the first step
    text = [torch.cat([t[:, :, lo:hi] for lo, hi in (*start, *left[:3])], 2) for t in (q, k, v)]
    whole(*text, valid=torch.nn.functional.pad(valid, (0, text[0].shape[2] - 20), value=True))
    torch.testing.assert_close(walk(a, *left[2:]), walk(whole, left[3]), atol=1e-6, rtol=1e-6)
    fork.cache.reorder(torch.tensor([1, 0]))
    swap = [t.flip(0) for t in (q, k, v)]
    fresh = Drive(recipe)
    walk(fresh, *start, *right)
    want = fresh(*(t[:, :, 53:54] for t in (q, k, v))).flip(0)
    torch.testing.assert_close(fork(*(t[:, :, 53:54] for t in swap)), want, atol=1e-6, rtol=1e-6)


def test_a_prompt_rolled_back():
    """Keys of a prompt's chunks are remembered; those that were rolled back are computed again."""
    q, k, v = qkv(1, 2, 1, 60)
    recipe = f"dsa:budget=6,profile={random_profile(2, 1, 16)}"
    a, b = Drive(recipe), Drive(recipe)
    a(*(t[:, :, :40] for t in (q, k, v)))
    a.cache.truncate(15)
    b(*(t[:, :, :25] for t in (q, k, v)))
    for drive in (a, b):
        out = drive(*(t[:, :, 45:60] for t in (q, k, v)))
    assert torch.equal(a.last[1].entries, b.last[1].entries) and torch.equal(out, a.last[2])


def test_a_rollback_below_the_budget():
    """Steps within the budget compute no keys: the first one above it, after a roll-back and a call of several tokens, has
    the number that follows the last one's, and needs the keys of all that came since."""
    budget, rows = 50, torch.arange(48) >= torch.tensor([[5], [0]])
    recipe = f"decode=dsa:budget={budget},profile={random_profile(4, 2, 16)}"
    old, new = qkv(2, n=60), qkv(2, n=60, seed=1)
    a, b = Drive(recipe), Drive(recipe)
    a(*(t[:, :, :48] for t in old), valid=rows)
    for i in range(48, 52):
        a(*(t[:, :, i : i + 1] for t in old))
    a.cache.truncate(8)
    a(*(t[:, :, 44:46] for t in new))
    for i in range(46, 50):
        a(*(t[:, :, i : i + 1] for t in new))
    mixed = [torch.cat([s[:, :, :44], t[:, :, 44:]], 2) for s, t in zip(old, new, strict=True)]
    b(*(t[:, :, :50] for t in mixed), valid=torch.arange(50) >= torch.tensor([[5], [0]]))
    for i in range(50, 60):
        outs = [drive(*(t[:, :, i : i + 1] for t in new)) for drive in (a, b)]
        assert torch.equal(*outs), i


def counting(compute, sizes):
    """`compute`, which also notes for how many entries it was called."""

    def call(kv, rope, entries, indexer):
        sizes.append(entries.shape[1])
        compute(kv, rope, entries, indexer)

    return call


def test_a_step_computes_the_key_of_its_token_alone():
    """Over a fixed store too, whose lengths are on the device and whose spare room is NaN."""
    q, k, v = qkv(1, 4, 2, 120)
    path = random_profile(4, 2, 16)
    store = DenseStore.empty(k, v).append(k[:, :, :100], v[:, :, :100], None, [0])
    fixed = FixedDense(store.fork(), [100], 200)
    fixed.k[:, :, 100:] = NAN
    method, plans = DSA(budget=24, fp8=False, profile=path), []
    for s in (store, fixed):
        state, sizes = State(), []
        for i in range(100, 106):
            s = s.append(k[:, :, i : i + 1], v[:, :, i : i + 1], None, [i])
            x = AttnInput(q[:, :, i : i + 1], s.view(), "decode", 2, 4, 0.25, step=i - 100, q_pos=torch.tensor([[i]]))
            x.rope = Rotary(16)
            keys = state.layer.get(KEYS)
            if keys is not None:
                keys._compute = counting(keys._compute, sizes)
            layout = method.plan(x, state)
            if keys is not None:
                del keys._compute
        assert sizes == [1] * 5
        plans.append(layout.to_mask(s.view())[0, :, 0, :106])
    assert torch.equal(*plans)


def test_bytes_of_a_token():
    """132 bytes at a width of 128: a byte each and a scale."""
    q, k, v = qkv(1, 2, 1, 3000, d=64)
    path = random_profile(2, 1, 64, width=128, rope=64)
    drive = Drive(f"decode=dsa:budget=64,profile={path}", d=64)
    drive(*(t[:, :, :40] for t in (q, k, v)))
    for i in range(40, 66):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    keys = drive.cache.batch[KEYS]
    assert keys.nbytes == keys.data.shape[1] * 132


# ---------------------------------------------------------------------- graphs, errors
def test_captured_steps_are_the_steps():
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    recipe = f"dsa:budget=20,profile={random_profile(4, 2, 16)}"
    with foveate.use(model, recipe):
        want = said(model, ids, mask, 12)
    handle = dry(model, recipe)
    got = said(model, ids, mask, 12)
    assert torch.equal(got, want) and handle.graphs.replays >= 8 and not handle.notes
    handle.remove()


def test_break_even_lengths_need_no_profile(monkeypatch):
    """Random weights stand in, for all lengths the same; the result is that of the method as it was asked for."""
    own, made, save = random_profile(2, 1, 16), [], Profile.save
    monkeypatch.setattr(Profile, "save", lambda self, path: made.append(self.tensors["layer.1.q"].shape) or save(self, path))
    monkeypatch.setattr(breakeven, "LEAST", 0.0)
    small = dict(lengths=[24, 40], shape=breakeven.Shape(2, 1, 16, torch.float32, 2), device="cpu", rounds=1)
    data = breakeven.run(["decode=dsa:budget=20"], **small)
    assert data["notes"] == [] and made == [(64, 128, 16)]
    assert [(r["params"]["n"], r["params"]["method"]) for r in data["rows"]] == [
        (n, "dsa:budget=20,fp8=True,profile=None") for n in (40, 24)
    ]
    assert 0.3 < data["rows"][0]["density"] < 0.6  # 20 of 40 tokens and a few steps more
    assert "decode=dsa" in breakeven.DECODE
    assert breakeven.run([f"decode=dsa:budget=20,profile={own}"], **small)["notes"] == [] and len(made) == 1


def test_options_and_errors(tmp_path):
    assert parse("dsa@8k") == DSA(budget=512) and DSA().budget == 2048 and DSA().fp8
    with pytest.raises(ConfigError, match="budget expected >= 1, got 0"):
        parse("dsa:budget=0")
    with pytest.raises(ConfigError, match="ranks whole tokens, and snapkv keeps other tokens for each kv head"):
        Recipe.of("dsa+cache=snapkv")
    q, k, v = qkv(1, 4, 2, 60)
    x = AttnInput(q, KV.dense(k, v), "prefill", 2, 4, 0.25, rope=Rotary(16), q_pos=torch.arange(60)[None])
    with pytest.raises(ConfigError, match="expected a profile with the weights of a trained indexer"):
        DSA(budget=8).plan(x, State())
    good = random_profile(4, 2, 16)
    with pytest.raises(UnsupportedError, match="rotation is not available"):
        x.rope = None
        DSA(budget=8, profile=good).plan(x, State())
    x.rope = Rotary(16)

    def broken(options=None, drop=(), **tensors):
        path = str(tmp_path / f"p{len(list(tmp_path.iterdir()))}")
        mine = {n: t for n, t in load(good).tensors.items() if n not in drop} | {
            f"layer.2.{n}": t for n, t in tensors.items()
        }
        Profile("dsa", options or {"rope_dims": 4}, mine).save(path)
        return DSA(budget=8, profile=path).plan(x, State())

    with pytest.raises(ConfigError, match=r"expected 'layer\.2\.w' in the profile"):
        broken(drop=("layer.2.w",))
    with pytest.raises(
        ConfigError, match=r"expected q weights \[3, 8, 64\] or \[3, 8, 16\] for this model, got \[3, 8, 63\]"
    ):
        broken(q=torch.zeros(3, 8, 63))
    with pytest.raises(ConfigError, match=r"expected w weights \[3, 64\] for this model, got \[2, 64\]"):
        broken(w=torch.zeros(2, 64))
    with pytest.raises(ConfigError, match="rope_dims expected an even number between 0 and 8, got 10"):
        broken({"rope_dims": 10})
    with pytest.raises(ConfigError, match="fp8 expected a width that is a power of two up to 128, got 12"):
        broken(q=torch.zeros(3, 12, 64), k=torch.zeros(12, 32), norm=torch.zeros(2, 12))
