"""AdaKV: budgets of its card against a slow transcription, ragged caches, and the memory they free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import ConfigError
from foveate.methods.adakv import AdaKV, share_out
from foveate.registry import parse
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.test_pyramidkv import same_choice, slow_votes


def slow_budgets(score, k, floor):
    """The card on scores `[G][n]`: the best G * k of all heads, counted, mixed with the mean; whole numbers that sum up."""
    g = len(score)
    every = sorted(((-s, e, j) for j, row in enumerate(score) for e, s in enumerate(row)))
    count = [0] * g
    for _, _, j in every[: g * k]:
        count[j] += 1
    exact = [(1 - floor) * c + floor * k for c in count]
    out = [int(x + 1e-9) for x in exact]
    most = sorted(range(g), key=lambda j: (out[j] - exact[j], j))
    for j in most[: round(sum(exact)) - sum(out)]:
        out[j] += 1
    return out


def share(score, k, floor, **more):
    score = torch.tensor(score, dtype=torch.float64)[None]
    yes = torch.ones_like(score, dtype=torch.bool)
    return share_out(score, k, floor, valid=yes, forced=~yes, **more)[0].tolist()


@settings(max_examples=100, deadline=None)
@given(g=st.integers(1, 6), n=st.integers(5, 40), k=st.integers(1, 12), floor=st.floats(0, 1), seed=st.integers(0, 99))
def test_budgets(g, n, k, floor, seed):
    """Sum = G * k, floor respected, as in the transcription."""
    k = min(k, n)
    gen = torch.Generator().manual_seed(seed)
    score = (torch.randn(g, n, generator=gen) * torch.arange(1, g + 1)[:, None]).exp().tolist()
    got = share(score, k, floor)
    assert sum(got) == g * k and min(got) >= int(floor * k) and got == slow_budgets(score, k, floor)


def test_budgets_by_hand():
    score = [[9.0, 8, 7, 6, 5], [4.0, 1, 1, 1, 1], [3.0, 2, 0, 0, 0]]
    assert share(score, 2, 0.0) == [5, 1, 0]
    assert share(score, 2, 1.0) == [2, 2, 2]
    assert share(score, 2, 0.5) == [4, 1, 1]  # 3.5, 1.5, 1: the token that rounding left goes to the first of two halves
    for equal in ([[1.0, 3, 2, 5]] * 3, [[1.0] * 4] * 3):  # equal scores over heads give equal budgets, ties included
        assert share(equal, 2, 0.2) == [2, 2, 2]
    # A head whose mass lies in a few entries is worth more than one whose own best hold little of it.
    flat = [[0.4] * 10, [0.5, 0.5, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01]]
    assert share(flat, 2, 0.0) == [2, 2] and share([[0.45] * 10, [0.44, 0.44, *[0.0] * 8]], 2, 0.0, weigh=False) == [4, 0]
    assert share([[0.45] * 10, [0.44, 0.44, *[0.0] * 8]], 2, 0.0, weigh=True) == [2, 2]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("floor", [0.2, 0.0])
def test_selection_is_the_card(case, floor):
    q, k, v, _ = case.make()
    g = k.shape[1]
    drive = Drive(f"adakv:capacity=80,window=16,sink=0,kernel=1,floor={floor}", d=q.shape[-1])
    drive(q, k, v)
    drive(*(t[:, :, -1:] for t in (q, k, v)))
    score = slow_votes(q, k, 16, 1, "max", "mean", case.scale)
    budgets = slow_budgets(score.tolist(), 64, floor)
    lens = drive.cache.store.lens[0]
    assert lens == [b + 17 for b in budgets] and sum(lens) == g * 81
    kv = drive.cache.store.view()
    for j in range(g):
        got = kv.positions()[0, j, : lens[j] - 1].tolist()
        best = sorted(range(284), key=lambda e: (-float(score[j, e]), e))[: budgets[j]]
        assert got == sorted(got) and got[-16:] == list(range(284, 300))
        same_choice(got, [*best, *range(284, 300)], score[j])


def test_heads_do_differ():
    """One head looks at many keys, the other at one: the first keeps more, and a flat budget would lose its keys."""
    q, k, v = qkv(1, 2, 2, 301)
    q[:, 0], k[:, 1] = q[:, 0] * 0.1, k[:, 1] * 0.1
    q[:, 1], k[:, 1, 50] = 0.3, 9.0
    drive = Drive("adakv:capacity=80,window=16,kernel=1")
    drive(*(t[:, :, :300] for t in (q, k, v)))
    drive(*(t[:, :, 300:] for t in (q, k, v)))
    lens = drive.cache.store.lens[0]
    assert lens[0] > 1.5 * lens[1] and lens[1] >= 17 + int(0.2 * 64) and sum(lens) == 2 * 81
    assert 50 in drive.cache.store.view().positions()[0, 1, : lens[1]].tolist()


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 1), (8, 2), (6, 3)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ragged_decode_is_masked_dense_decode(h, g, backend):
    """In chunks too; sinks and window protected; kept entries are the prompt's own."""
    q, k, v = qkv(1, h, g, 206)
    drive = Drive("adakv:window=16,capacity=48", backend=backend)
    for a, b in ((0, 64), (64, 197), (197, 200), *((i, i + 1) for i in range(200, 206))):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    x, _, out = drive.last
    lens, pos = x.kv.lengths()[0].tolist(), x.kv.positions()[0]
    mask = torch.zeros(g, 206, dtype=torch.bool)
    for j in range(g):
        mask[j, pos[j, : lens[j]]] = True
        assert pos[j, :4].tolist() == [0, 1, 2, 3] and pos[j, lens[j] - 22 : lens[j]].tolist() == list(range(184, 206))
    s = x.q[0] @ k[0].repeat_interleave(h // g, 0).transpose(-1, -2) / 4
    p = s.masked_fill(~mask.repeat_interleave(h // g, 0)[:, None], float("-inf")).softmax(-1)
    torch.testing.assert_close(out[0], p @ v[0].repeat_interleave(h // g, 0), atol=1e-5, rtol=1e-5)
    assert sum(lens) == g * (48 + 6)


def test_rows_of_a_batch():
    """Padding, and a row that stays whole beside one that does not."""
    q, k, v = qkv(2, 4, 2, 153)
    valid = torch.ones(2, 150, dtype=torch.bool)
    valid[1, :110] = False
    both = Drive("adakv:window=16,capacity=48")
    both(*(t[:, :, :150].masked_fill(~valid[:, None, :, None], float("nan")) for t in (q, k, v)), valid=valid)
    alone = [Drive("adakv:window=16,capacity=48") for _ in range(2)]
    alone[0](*(t[:1, :, :150] for t in (q, k, v)))
    alone[1](*(t[1:, :, 110:150] for t in (q, k, v)))
    for i in range(150, 153):
        got = both(*(t[:, :, i : i + 1] for t in (q, k, v)))
        for b in range(2):
            one = alone[b](*(t[b : b + 1, :, i : i + 1] for t in (q, k, v)))
            torch.testing.assert_close(got[b : b + 1], one, atol=1e-5, rtol=1e-5)
    assert both.cache.store.lens == [a.cache.store.lens[0] for a in alone] and both.cache.store.lens[1] == [43, 43]


def test_a_second_turn():
    """Ragged heads and a new prompt part compete again for the same total."""
    q, k, v = qkv(1, 6, 3, 260)
    drive = Drive("adakv:window=16,capacity=48")
    for a, b in ((0, 150), (150, 151), (151, 200), (200, 201)):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    assert sum(drive.cache.store.lens[0]) == 3 * 49
    x, plan, out = drive.last
    torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)


def test_memory_falls_by_what_is_dropped():
    """Half of 8K tokens: at least 40 % of the bytes are freed, and stay freed through 200 decode steps."""
    q, k, v = qkv(1, 8, 4, 8393, d=32, seed=1)
    q[:, :2] *= 3  # heads that need less than others
    drive = Drive("adakv:capacity=4096", d=32, backend="torch")
    drive.cache.append(k[:, :, :8192], v[:, :, :8192])
    drive.cache.save_tail(0, q[:, :, :8192], 32)
    drive.cache.pending = True
    before, real = drive.cache.nbytes, storage(drive.cache.store)
    drive.watch.attended = lambda x, plan, out: None  # it would keep a copy of every view
    for i in range(8192, 8393):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
        if i in (8192, 8392):
            assert drive.cache.store.kind == "ragged" and len(set(drive.cache.store.lens[0])) > 1
            assert drive.cache.nbytes <= 0.6 * before and storage(drive.cache.store) <= 0.6 * real
            assert sum(drive.cache.store.lens[0]) == 4 * (4096 + i - 8191)


def storage(store):
    """Bytes of the tensors a store really holds, whole allocations."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in vars(store).values() if torch.is_tensor(t)}
    return sum(held.values())


def test_short_prompts_and_missing_queries():
    q, k, v = qkv(1, 4, 2, 101)
    drive = Drive("adakv:capacity=100")
    for a, b in ((0, 100), (100, 101)):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    assert drive.cache.store.lens == [[101, 101]] and not drive.cache.evicted
    drive = Drive("adakv:capacity=50")
    drive(*(t[:, :, :100] for t in (q, k, v)))
    drive.cache.forget()
    drive(*(t[:, :, 100:] for t in (q, k, v)))
    assert drive.cache.store.lens == [[101, 101]] and any("no prompt queries" in t for t in drive.notes)


def test_options():
    assert parse("adakv") == AdaKV(window=32, floor=0.2, kernel=7, pooling="max")
    for text, message in (
        ("adakv:kernel=2", "kernel expected an odd number, got 2"),
        ("adakv:window=64,capacity=60", "capacity expected at least window"),
        ("adakv:floor=1.5", "floor expected between 0"),
        ("adakv:reduce=min", "one of mean, max, sum"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(text)
