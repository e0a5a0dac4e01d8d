"""SnapKV against a slow transcription of its card, and the window mass it votes with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import ConfigError
from foveate.kernels import reference
from foveate.kernels.base import Want
from foveate.kv import KV
from foveate.layout import Layout
from foveate.methods.base import AttnInput, State
from foveate.methods.snapkv import SnapKV
from foveate.registry import parse
from foveate.scores import window as window_module
from foveate.scores.window import group_reduce, pool, window_mass
from tests.drive import Drive, qkv

few = settings(max_examples=30, deadline=None)
INF = float("inf")


def slow_selection(q, k, window, capacity, kernel, pooling, reduce, sink):
    """The card for one kv head: its query heads' last `window` rows q [r][w][D] and its keys k [N][D]."""
    n, d = len(k), len(k[0])
    if n <= capacity:
        return list(range(n))
    votes = [[] for _ in range(n - window)]
    for head in q:
        column = [0.0] * n
        for i, row in enumerate(head):
            t = n - len(head) + i
            z = [sum(a * b for a, b in zip(row, k[j], strict=True)) / math.sqrt(d) for j in range(t + 1)]
            top = max(z)
            e = [math.exp(x - top) for x in z]
            for j in range(t + 1):
                column[j] += e[j] / sum(e)
        for j in range(n - window):
            votes[j].append(column[j])
    one = {"mean": lambda x: sum(x) / len(x), "sum": sum, "max": max}[reduce]
    a = [one(v) for v in votes]
    pooled = []
    for j in range(len(a)):
        near = [a[i] if 0 <= i < len(a) else None for i in range(j - kernel // 2, j + kernel // 2 + 1)]
        if pooling == "avg":
            pooled.append(sum(x or 0.0 for x in near) / kernel)
        else:
            pooled.append(max(x for x in near if x is not None))
    kept = list(range(sink))
    ranked = sorted(range(sink, len(pooled)), key=lambda j: (-pooled[j], j))
    return sorted([*kept, *ranked[: capacity - window - sink], *range(n - window, n)])


def compress(q, k, rows=None, kv=None, note=lambda text: None, **options):
    """The selection of a prompt whose queries and keys are given whole."""
    method = SnapKV(**options)
    n = k.shape[2]
    rows = min(method.tail, n) if rows is None else rows
    pos = torch.arange(n - rows, n)[None]
    kv = KV.dense(k, k) if kv is None else kv
    x = AttnInput(q[:, :, n - rows :], kv, "prefill", 2, 4, 1 / math.sqrt(q.shape[-1]), n - rows, q_pos=pos, note=note)
    return method.compress(x, State())


def lists(selection):
    counts = selection.full_counts()
    return [selection.indices[0, g, : counts[0, g]].tolist() for g in range(counts.shape[1])]


@few
@given(
    h=st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 2)]),
    n=st.integers(1, 60),
    window=st.integers(1, 6),
    extra=st.integers(1, 20),
    kernel=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["avg", "max"]),
    reduce=st.sampled_from(["mean", "max", "sum"]),
    sink=st.sampled_from([0, 4]),
    seed=st.integers(0, 99),
)
def test_selection_is_the_card(h, n, window, extra, kernel, pooling, reduce, sink, seed):
    (h, g), capacity = h, window + sink + extra
    q, k, _ = qkv(1, h, g, n, d=6, seed=seed)
    q, k = q.double(), k.double()
    options = dict(window=window, capacity=capacity, kernel=kernel, pooling=pooling, reduce=reduce, sink=sink)
    got = compress(q.float(), k.float(), **options)
    want = [
        slow_selection(q[0, j * (h // g) : (j + 1) * (h // g), n - min(window, n) :].tolist(), k[0, j].tolist(), **options)
        for j in range(g)
    ]
    if got is None:
        assert n <= capacity
    elif pooling == "avg" or kernel == 1:
        assert lists(got) == want
    else:  # max pooling makes exact ties of what rounds differently: compare what the ranking sees
        q32, k32 = q.float().double(), k.float().double()
        pos = torch.arange(n - window, n)[None]
        kv = KV.dense(k32, k32)
        mass = window_mass(q32[:, :, -window:], kv, pos, scale=1 / math.sqrt(6))[..., : n - window]
        score = pool(group_reduce(mass, g, reduce), kernel, pooling)[0]
        for j, (a, b) in enumerate(zip(lists(got), want, strict=True)):
            inner = [[float(score[j, e]) for e in kept if e < n - window] for kept in (a, b)]
            assert sorted(inner[0]) == pytest.approx(sorted(inner[1]), abs=1e-6)
            assert a[-window:] == b[-window:] and a[:sink] == b[:sink] and len(a) == len(set(a)) == capacity


@few
@given(
    n=st.integers(1, 50), w=st.integers(1, 8), seed=st.integers(0, 99), kind=st.sampled_from(["dense", "paged", "ragged"])
)
def test_window_mass_is_the_softmax(n, w, seed, kind):
    """Over any storage with poisoned slots, entry weights, positions with gaps; also from the lse of attention."""
    w = min(w, n)
    q, k, v = qkv(2, 4, 2, n, d=6, seed=seed)
    lens = torch.tensor([[n, max(w, n - 3)], [max(w, n - 1), n]], dtype=torch.int32)
    live = torch.arange(n) < lens[..., None]
    k, v = (t.masked_fill(~live[..., None], float("nan")) for t in (k, v))
    pos = torch.arange(n).expand(2, 2, n) * 2
    bias = torch.randn(2, 2, n, generator=torch.Generator().manual_seed(seed))
    q_pos = torch.arange(n - w, n).expand(2, w) * 2
    dense = KV.dense(k, v, lens, pos, bias)
    if kind == "paged":
        pad = -n % 4
        pages = [torch.nn.functional.pad(t, (0, 0, 0, pad), value=float("nan")).reshape(-1, 4, 6) for t in (k, v)]
        table = torch.arange(pages[0].shape[0], dtype=torch.int32).view(2, 2, -1)
        kv = KV(*pages, "paged", n, len=lens, table=table, pos=pos, bias=bias)
    elif kind == "ragged":
        kv = KV.ragged(k.reshape(-1, 6), v.reshape(-1, 6), torch.arange(4).view(2, 2) * n, lens, n, pos, bias)
    else:
        kv = dense
    layout = Layout.dense(2, 4, w, n, q_pos=q_pos)
    rows = q[:, :, n - w :]
    s, mask, _, _ = reference.scores(rows, dense, layout, 0.3, 5.0)
    p = s.masked_fill(~mask, -INF).softmax(-1).nan_to_num(0.0).sum(2)
    got = window_mass(rows, kv, q_pos, scale=0.3, softcap=5.0)
    torch.testing.assert_close(got, p, atol=1e-5, rtol=1e-5)
    lse = reference.forward(rows, dense, layout, scale=0.3, softcap=5.0, want=Want(lse=True))[1]
    torch.testing.assert_close(window_mass(rows, kv, q_pos, scale=0.3, softcap=5.0, lse=lse), p, atol=1e-5, rtol=1e-5)


def test_window_mass_in_pieces(monkeypatch):
    """Long prompts are read piece by piece: same sums, and excluded entries report 0 but stay in the softmax."""
    q, k, v = qkv(1, 4, 2, 70)
    pos = torch.arange(62, 70)[None]
    kv = KV.dense(k, v)
    whole = window_mass(q[:, :, 62:], kv, pos, scale=0.25)
    sizes = []

    def small(total, cost):
        for lo in range(0, total, 16):
            sizes.append(min(total, lo + 16) - lo)
            yield lo, min(total, lo + 16)

    monkeypatch.setattr(window_module, "pieces", small)
    torch.testing.assert_close(window_mass(q[:, :, 62:], kv, pos, scale=0.25), whole, atol=1e-6, rtol=1e-6)
    assert sizes == [16, 16, 16, 16, 6]
    late = (torch.arange(70) >= 62).expand(1, 2, 70)
    got = window_mass(q[:, :, 62:], kv, pos, scale=0.25, exclude=late)
    torch.testing.assert_close(got[..., :62], whole[..., :62], atol=1e-6, rtol=1e-6)
    assert bool((got[..., 62:] == 0).all())
    assert float(whole.sum()) == pytest.approx(4 * 8, rel=1e-5)


def test_tova_is_the_window_of_one():
    """w = 1, p = 1 and a mean over all heads gives TOVA's score: the last row's probability."""
    q, k, v = qkv(1, 6, 1, 40)
    pos = torch.tensor([[39]])
    mass = group_reduce(window_mass(q[:, :, 39:], KV.dense(k, v), pos, scale=0.25), 1, "mean")
    p = (q[:, :, 39:].double() @ k.double().transpose(-1, -2) * 0.25).softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(mass[:, 0].double(), p, atol=1e-6, rtol=1e-6)
    assert torch.equal(pool(mass, 1, "avg"), mass)


def test_heads_commute_and_identical_heads_are_one():
    q, k, _ = qkv(1, 4, 2, 80)
    options = dict(window=8, capacity=30)
    a = lists(compress(q, k, **options))
    b = lists(compress(q[:, [2, 3, 0, 1]], k[:, [1, 0]], **options))
    assert a == b[::-1]
    for reduce in ("mean", "max", "sum"):
        twice = compress(q[:, [0, 0, 0, 2, 2, 2]], k, reduce=reduce, **options)
        once = compress(q[:, [0, 2]], k, reduce=reduce, **options)
        assert lists(twice) == lists(once)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_needle_and_its_neighbours(pooling):
    q, k, _ = (t * 0.1 for t in qkv(1, 4, 2, 200))
    q[:, :, -16:, 0] = k[:, :, 77, 0] = 8.0
    kept = lists(compress(q, k, window=16, capacity=60, kernel=7, pooling=pooling))
    assert all(set(range(74, 81)) <= set(row) for row in kept)


def test_short_prompts_stay_whole_and_windows_stay():
    q, k, v = qkv(1, 4, 2, 50)
    assert compress(q, k, window=8, capacity=50) is None
    kept = lists(compress(q, k, window=8, capacity=49))
    assert all(len(row) == 49 and row[-8:] == list(range(42, 50)) and row[:4] == [0, 1, 2, 3] for row in kept)


def test_the_cache_after_it():
    """Kept entries are the prompt's own, in order; new tokens join at their text positions; bytes are freed."""
    q, k, v = qkv(2, 4, 2, 160)
    drive, dense = Drive("snapkv:window=16,capacity=48"), Drive("dense")
    for d in (drive, dense):
        d(*(t[:, :, :150] for t in (q, k, v)))
    before = drive.cache.nbytes
    for i in range(150, 160):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    kv = drive.cache.store.view()
    pos = kv.positions()
    assert kv.capacity == 58 and bool((pos[..., 1:] > pos[..., :-1]).all())
    assert pos[0, 0, -26:].tolist() == list(range(134, 160)) and drive.cache.seen == [160, 160]
    for b in range(2):
        for g in range(2):
            assert torch.equal(kv.k[b, g], k[b, g, pos[b, g]]) and torch.equal(kv.v[b, g], v[b, g, pos[b, g]])
    x = drive.watch.calls[-1][0]
    assert x.q_pos.tolist() == [[159], [159]]
    assert drive.cache.nbytes < before


def test_the_lazy_compression_sees_the_whole_prompt():
    """In chunks or in one piece, padded or not: the same entries, from the row's own last queries."""
    q, k, v = qkv(1, 4, 2, 151)
    whole, chunks, padded = (Drive("snapkv:window=16,capacity=48") for _ in range(3))
    whole(*(t[:, :, :150] for t in (q, k, v)))
    for a, b in ((0, 70), (70, 141), (141, 150)):  # the last chunk is shorter than the window
        chunks(*(t[:, :, a:b] for t in (q, k, v)))
    bad = [torch.nn.functional.pad(t[:, :, :150], (0, 0, 9, 0), value=float("nan")) for t in (q, k, v)]
    padded(*bad, valid=torch.arange(159)[None] >= 9)
    for d in (whole, chunks, padded):
        d(*(t[:, :, 150:] for t in (q, k, v)))
    pos = [d.cache.store.view().positions() for d in (whole, chunks, padded)]
    assert torch.equal(pos[0], pos[1]) and torch.equal(pos[0], pos[2])
    want = lists(compress(q[:, :, :150], k[:, :, :150], window=16, capacity=48))
    assert pos[0][0, :, :-1].tolist() == want


def test_again_after_a_second_turn():
    """Kept entries and the new turn compete again; a turn shorter than the window votes with the rows it has."""
    q, k, v = qkv(1, 4, 2, 180)
    drive = Drive("snapkv:window=16,capacity=48")
    drive(*(t[:, :, :150] for t in (q, k, v)))
    drive(*(t[:, :, 150:151] for t in (q, k, v)))
    drive(*(t[:, :, 151:160] for t in (q, k, v)))
    drive(*(t[:, :, 160:161] for t in (q, k, v)))
    pos = drive.cache.store.view().positions()
    assert pos.shape[2] == 49 and pos[0, 0, -17:].tolist() == list(range(144, 161))
    assert pos[0, :, :4].tolist() == [[0, 1, 2, 3]] * 2 and bool((pos[..., 1:] > pos[..., :-1]).all())


def test_without_saved_queries_everything_stays():
    notes = []
    q, k, _ = qkv(1, 4, 2, 80)
    assert compress(q, k, rows=0, note=notes.append, window=8, capacity=30) is None
    assert len(notes) == 1 and "no prompt queries" in notes[0]


def test_heads_of_different_length():
    """A cache whose kv heads kept different numbers: each head has its own window and capacity."""
    q, k, _ = qkv(1, 4, 2, 80)
    lens = torch.tensor([[80, 40]], dtype=torch.int32)
    poisoned = k.masked_fill(~(torch.arange(80) < lens[..., None])[..., None], float("nan"))
    got = lists(compress(q, k, kv=KV.dense(poisoned, poisoned, lens), window=8, capacity=44))
    assert len(got[0]) == 44 and got[0] == lists(compress(q, k, window=8, capacity=44))[0]
    assert got[1] == list(range(40))


def test_options():
    assert parse("snapkv") == SnapKV(window=64, capacity=320, kernel=5, pooling="avg")
    assert parse("snapkv@8k").capacity == 1024
    for text, message in (
        ("snapkv:kernel=4", "odd"),
        ("snapkv:window=64,capacity=60", "at least window"),
        ("snapkv:pooling=mean", "one of avg, max"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(text)


def test_saved_queries_are_the_last_ones():
    """Compression takes them for the queries of the last positions: those before generated tokens are not, and those of
    rolled-back tokens are gone, the ones before them are not."""
    q, k, v = qkv(1, 4, 2, 120)
    drive, at = Drive("cache=snapkv:window=8,capacity=60"), 0
    for n in (40, *[1] * 5, 3):  # the prompt stays whole; five steps; a short question
        drive(*(t[:, :, at : at + n] for t in (q, k, v)))
        at += n
    assert torch.equal(drive.cache.tails[0], q[:, :, 45:48])
    drive(*(t[:, :, 48:110] for t in (q, k, v)))
    drive.cache.truncate(2)
    assert torch.equal(drive.cache.tails[0], q[:, :, 102:108])
    drive(*(t[:, :, 108:109] for t in (q, k, v)))
    assert drive.cache.store.lens == [[61, 61]] and not drive.notes
