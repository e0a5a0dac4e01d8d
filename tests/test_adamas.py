"""Adamas against a slow transcription of its card, and the two-bit codes it stands on."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from foveate.cache import DenseStore, LayerCache, PagedStore
from foveate.cache.fixed import FixedDense, fix
from foveate.errors import ConfigError, ShapeError, UnsupportedError
from foveate.kv import KV
from foveate.methods.adamas import CODES, Adamas
from foveate.methods.base import AttnInput, State
from foveate.registry import parse
from foveate.scores import labels
from foveate.scores.labels import Codes, hadamard, popcount
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.prompts import listed

NAN = float("nan")
CPU = torch.device("cpu")


# ---------------------------------------------------------------------- slow transcription
@cache
def matrix(d):
    """Entry by entry: (-1)^(common bits of row and column) / sqrt(D)."""
    return torch.tensor([[(-1) ** bin(i & j).count("1") / math.sqrt(d) for j in range(d)] for i in range(d)]).double()


def slow_code(y, theta):
    return [sum(edge < v for edge in (-theta, 0.0, theta)) for v in y]


def deviation(rows):
    flat = [v for row in rows for v in row]
    mean = sum(flat) / len(flat)
    return math.sqrt(sum((v - mean) ** 2 for v in flat) / len(flat))


def slow_list(queries, keys, budget, theta, std):
    """Entries for the query heads [r, D] that share a list, over keys [M, D] of their kv head."""
    m = len(keys)
    queries, keys = ((t @ matrix(t.shape[1])).tolist() for t in (queries, keys))
    t_k = theta * deviation(keys[: labels.SAMPLE]) if std else theta
    codes = [slow_code(y, t_k) for y in keys]
    mine = [slow_code(y, theta * deviation([y]) if std else theta) for y in queries]
    far = [min(sum(abs(a - b) for a, b in zip(c, codes[j], strict=True)) for c in mine) for j in range(m)]
    ranked = sorted(range(m), key=lambda j: (j != m - 1, far[j], -j))  # own token, then the nearest, then the latest
    return sorted(ranked[:budget])


def plan(q, kv, step=0, state=None, **options):
    x = AttnInput(q, kv, "decode", 2, 4, 1 / math.sqrt(q.shape[-1]), step=step, q_pos=kv.lengths().amax(1)[:, None] - 1)
    return Adamas(**options).plan(x, state or State())


# ---------------------------------------------------------------------- the card
@pytest.mark.parametrize("options", [{}, dict(theta=0.7), dict(unit="std", theta=0.5, share="group")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_is_the_card(case, options):
    """Index by index, prompt and steps through the runtime."""
    q, k, v, _ = (t[:, :, :120].double() if isinstance(t, torch.Tensor) else t for t in case.make())
    text = ",".join(f"{n}={o}" for n, o in dict(budget=20, **options).items())
    drive = Drive(f"adamas:{text}", d=q.shape[-1])
    drive(*(t[:, :, :118] for t in (q, k, v)))
    for i in (118, 119):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    layout, r = drive.last[1], q.shape[1] // k.shape[1]
    layout.validate()
    group = options.get("share") == "group"
    for a in range(layout.entries.shape[1]):
        heads, g = (range(a * r, a * r + r), a) if group else ([a], a // r)
        want = slow_list(
            q[0, list(heads), 119],
            k[0, g],
            20,
            options.get("theta", 10.0),
            options.get("unit") == "std",
        )
        assert listed(layout.entries[0, a, 0], layout.entry_count[0, a, 0]) == want


@pytest.mark.parametrize("d", [1, 2, 16, 64, 128])
def test_the_matrix_is_orthonormal(d):
    w = hadamard(d)
    torch.testing.assert_close(w @ w.T, torch.eye(d, dtype=torch.float64))
    assert torch.allclose(w.abs(), torch.full((d, d), d**-0.5, dtype=torch.float64))
    q, k, _ = qkv(1, 1, 1, 4, d=d, dtype=torch.float64)
    torch.testing.assert_close((q @ w) @ (k @ w).transpose(-1, -2), q @ k.transpose(-1, -2))


def test_a_head_dim_that_is_no_power_of_two_is_refused():
    q, k, v = qkv(1, 2, 1, 40, d=24)
    with pytest.raises(UnsupportedError, match="power of two, got 24"):
        plan(q[:, :, -1:], KV.dense(k, v), budget=8)


def coded(codes_q, codes_k):
    """A Codes with these codes [D] of one query and of keys [M, D] put in by hand, and the distance it gives."""
    d = len(codes_q)
    held = Codes(d, 1.0, False, CPU)
    held.matrix = torch.eye(d, dtype=torch.float64)  # no turn: a value of each bucket gives its code
    value = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    held.update(KV.dense(*2 * (value[torch.tensor(codes_k)][None, None],)), 0)
    return held.distance(value[torch.tensor(codes_q)][None, None, None])[0, 0, 0]


def test_distance_of_all_sixteen_pairs():
    """The published kernel's plain popcounts of two bits give 3 for the codes 1 and 2."""
    for a in range(4):
        for b in range(4):
            got = coded([a] * 8, [[b] * 8, [a] * 8])
            assert got.tolist() == [8 * abs(a - b), 0], (a, b)
    x, kernel = 1 ^ 2, lambda x: bin(x & 0x5555).count("1") + 2 * bin(x & 0xAAAA).count("1")
    assert kernel(x) == 3  # what must not come back


@pytest.mark.parametrize("d", [1, 4, 8, 16, 32, 64, 128])
def test_distance_is_l1_for_words_of_every_size(d):
    gen = torch.Generator().manual_seed(d)
    codes = torch.randint(0, 4, (50, d), generator=gen)
    far = coded(codes[0].tolist(), codes.tolist())
    assert far.dtype == torch.int16
    assert torch.equal(far.long(), (codes - codes[0]).abs().sum(-1))
    assert int(far[0]) == 0


def test_popcount():
    gen = torch.Generator().manual_seed(0)
    for width, dtype in labels.WORDS.items():
        info = torch.iinfo(dtype)
        x = torch.randint(info.min, info.max, (200,), generator=gen, dtype=dtype)
        x = torch.cat([x, torch.tensor([info.min, info.max, 0], dtype=dtype)])
        assert popcount(x).tolist() == [bin(v & (2**width - 1)).count("1") for v in x.tolist()]


def test_memory_is_a_quarter_byte_a_channel():
    _, k, v = qkv(1, 2, 2, 1000, d=128)
    codes = Codes(128, 10.0, False, CPU)
    codes.update(KV.dense(k, v), 0)
    assert codes.data[0].shape[-1] * codes.data[0].element_size() == 32
    assert codes.nbytes <= 2 * 32 * (1000 + 128)
    assert codes.nbytes < 0.1 * (k.numel() * 4)


def test_a_key_of_the_query_code_ranks_first():
    q, k, v = qkv(1, 2, 1, 300, d=64)
    k[:, :, 123] = q[:, 0, -1] * 1.01  # the same side of each threshold but one hair
    layout = plan(q[:, :, -1:], KV.dense(k, v), budget=2, theta=0.7)
    assert 123 in layout.entries[0, 0, 0].tolist()


def test_ties_go_to_the_later_token():
    q, k, v = qkv(1, 2, 1, 60)
    k[:] = k[:, :, :1]
    layout = plan(q[:, :, -1:], KV.dense(k, v), budget=5)
    assert layout.entries[0, :, 0].tolist() == [[55, 56, 57, 58, 59]] * 2


def recall(codes_keys, q, k, budget):
    top = codes_keys.topk(budget, -1).indices
    best = (q @ k.transpose(-1, -2))[0, 0, 0].topk(budget).indices
    return len(set(top.tolist()) & set(best.tolist())) / budget


def test_recall_grows_with_the_budget_and_stays_above_chance():
    got = []
    for budget in (16, 64, 256):
        each = []
        for seed in range(4):
            q, k, v = qkv(1, 1, 1, 1024, d=64, seed=seed)
            codes = Codes(64, 0.8, True, CPU)
            codes.update(KV.dense(k, v), 0)
            each.append(recall(-codes.distance(q[:, :, -1:])[0, 0, 0].float(), q[:, :, -1:], k, budget))
        got.append(sum(each) / 4)
    assert got == sorted(got) and got[0] > 20 * 16 / 1024 and got[2] > 2 * 256 / 1024  # of chance


def test_the_transform_spreads_outliers():
    """Channels far larger than the others cost codes of the raw channels their recall, and these next to none."""
    plain, without = [], []
    for seed in range(6):
        q, k, v = qkv(1, 1, 1, 1024, d=64, seed=seed)
        scale = torch.ones(64)
        scale[:3] = 12.0
        q, k = q * scale, k * scale
        for out, turn in ((plain, True), (without, False)):
            codes = Codes(64, 0.8, True, CPU)
            if not turn:
                codes.matrix = torch.eye(64, dtype=torch.float64)
            codes.update(KV.dense(k, v), 0)
            out.append(recall(-codes.distance(q[:, :, -1:])[0, 0, 0].float(), q[:, :, -1:], k, 64))
    assert sum(plain) > 1.3 * sum(without)


def test_the_cache_keeps_the_keys_as_they_are():
    q, k, v = qkv(1, 4, 2, 80)
    drive = Drive("adamas:budget=16")
    drive(*(t[:, :, :79] for t in (q, k, v)))
    drive(*(t[:, :, 79:] for t in (q, k, v)))
    assert torch.equal(drive.cache.store.view().k, k)


# ---------------------------------------------------------------------- beside the cache
def rows_of(held):
    return [t[:, :, : held.done] for t in held.data]


@pytest.mark.parametrize("spread", [False, True])
def test_appended_one_by_one_or_at_once(spread):
    _, k, v = qkv(2, 2, 2, 90)
    bulk, single = Codes(16, 0.7, spread, CPU), Codes(16, 0.7, spread, CPU)
    bulk.update(KV.dense(k, v), 0)
    for i in range(1, 91):
        single.update(KV.dense(k[:, :, :i], v[:, :, :i]), i - 1)
    assert torch.equal(*(rows_of(c)[0] for c in (bulk, single)))


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("kind", ["dense", "paged", "fixed"])
def test_rows_of_any_length_and_rollback(kind, spread):
    """Prompt with padding, steps, rollback, steps: the codes that exist are those of the keys, slot by slot."""
    lens = (70, 33, 95)
    _, k, v = qkv(3, 4, 2, 130)
    store = (PagedStore.empty(k, v, 8) if kind == "paged" else DenseStore.empty(k, v)).append(
        k[:, :, :95], v[:, :, :95], torch.arange(95) < torch.tensor(lens)[:, None], [0] * 3
    )
    if kind == "fixed":
        store.k[1, :, 33:] = NAN
        store = fix(store, list(lens))
        assert isinstance(store, FixedDense)
    codes, seen = Codes(16, 0.7, spread, CPU), list(lens)

    def check():
        kv = store.view()
        fresh = Codes(16, 0.7, spread, CPU)
        fresh.update(kv, 0)
        live = kv.exists()[..., None]
        want, got = (c.data[0][:, :, : kv.capacity].masked_fill(~live, 0) for c in (fresh, codes))
        assert torch.equal(want, got)

    def step(i, number):
        nonlocal store
        store = store.append(k[:, :, i : i + 1], v[:, :, i : i + 1], None, seen)
        seen[:] = [s + 1 for s in seen]
        codes.update(store.view(), number)
        check()

    for number, i in enumerate(range(95, 103)):
        step(i, number)
    for n in (1, 5):
        store.truncate(n)
        codes.truncate(n)
        seen[:] = [s - n for s in seen]
        for number, i in enumerate(range(110, 113), 1):
            step(i, number)


def test_steps_read_one_key_of_each_row(monkeypatch):
    """A step of a settled cache encodes one entry, whatever the length, and never asks the device for a value."""
    lens, (_, k, v) = (70, 80), qkv(2, 4, 2, 100)
    store = DenseStore.empty(k, v).append(
        k[:, :, :80], v[:, :, :80], torch.arange(80) < torch.tensor(lens)[:, None], [0] * 2
    )
    codes = Codes(16, 0.7, True, CPU)
    store = store.append(k[:, :, 80:81], v[:, :, 80:81], None, list(lens))
    codes.update(store.view(), 0)
    widths, encode = [], codes.encode
    monkeypatch.setattr(codes, "encode", lambda k: widths.append(k.shape[2]) or encode(k))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: pytest.fail("looked at the device"))
    monkeypatch.setattr(torch.Tensor, "item", lambda t: pytest.fail("looked at the device"))
    for i in range(1, 6):
        store = store.append(k[:, :, 80 + i : 81 + i], v[:, :, 80 + i : 81 + i], None, [n + i for n in lens])
        codes.update(store.view(), i)
    assert widths == [1] * 5


def test_fork_and_reorder():
    q, k, v = qkv(2, 4, 2, 71)
    a = Drive("adamas:budget=16,unit=std,theta=0.5")
    a(*(t[:, :, :70] for t in (q, k, v)))
    a(*(t[:, :, 70:] for t in (q, k, v)))
    b = Drive("adamas:budget=16,unit=std,theta=0.5")
    b.cache = a.cache.fork()
    b.cache.reorder(torch.tensor([1, 1]))
    new = qkv(2, 4, 2, 1, seed=5)
    first = a(*new)
    assert a.cache.batch[CODES].data[0] is not b.cache.batch[CODES].data[0]
    second = b(*(t[[1, 1]] for t in new))
    torch.testing.assert_close(second[0], first[1])
    torch.testing.assert_close(second[1], first[1])
    with pytest.raises(ShapeError, match="rows and kv heads"):
        a.cache.batch[CODES].update(KV.dense(k[:1], v[:1]), 1)


@pytest.mark.parametrize("policy", ["snapkv:window=16,capacity=100", "streaming_llm:sink=4,window=92"])
@pytest.mark.parametrize("text", ["adamas:budget=24,theta=0.7", "double_sparsity:budget=24,bits=4"])
def test_on_an_evicted_cache(policy, text):
    """Two turns and steps, each the oracle on the reported list, which names the newest entry and none twice."""
    q, k, v = qkv(2, 4, 2, 215)
    drive = Drive(f"{text}+cache={policy}")
    valid = torch.arange(150) >= torch.tensor([[0], [30]])
    drive(*(t[:, :, :150] for t in (q, k, v)), valid=valid)
    for i in range(150, 165):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    drive(*(t[:, :, 175:190] for t in (q, k, v)))
    for i in range(190, 200):
        drive(*(t[:, :, i : i + 1] for t in (q, k, v)))
    steps = [c for c in drive.watch.calls if c[0].phase == "decode"]
    assert drive.cache.evicted and len(steps) == 25
    for x, layout, out in steps:
        layout.validate()
        assert int(layout.entry_count.max()) == 24
        torch.testing.assert_close(out, oracle(x.q, x.kv, layout), atol=1e-5, rtol=1e-5)
        newest = (x.kv.positions() == x.q_pos[:, :, None]) & x.kv.exists()
        assert bool((layout.to_mask(x.kv)[:, :, 0] & newest.repeat_interleave(2, 1)).any(-1).all())
        fresh = Drive(f"{text}+cache={policy}").recipe.decode.plan(
            AttnInput(x.q, x.kv, "decode", 2, 4, x.scale, q_pos=x.q_pos), State()
        )
        if text.startswith("adamas"):  # thresholds are numbers, so codes do not depend on what was dropped
            assert torch.equal(fresh.to_mask(x.kv), layout.to_mask(x.kv))


def test_hidden_entries_are_never_listed():
    q, k, v = qkv(1, 2, 1, 100)
    bias = torch.zeros(1, 1, 100)
    bias[..., 10:90] = float("-inf")
    mask = plan(q[:, :, -1:], KV.dense(k, v, bias=bias), budget=15).to_mask()
    assert not mask[..., 10:90].any() and (mask.sum(-1) == 15).all()


def test_pieces_change_nothing(monkeypatch):
    q, k, v = qkv(1, 4, 2, 90)
    want = plan(q[:, :, -1:], KV.dense(k, v), budget=12, theta=0.7)
    monkeypatch.setattr("foveate.scores.keys.BUDGET", 700)
    monkeypatch.setattr(labels, "pieces", lambda total, cost: ((i, min(i + 7, total)) for i in range(0, total, 7)))
    assert torch.equal(plan(q[:, :, -1:], KV.dense(k, v), budget=12, theta=0.7).to_mask(), want.to_mask())


def test_options():
    assert parse("adamas@8k") == Adamas(budget=256, unit="std", theta=0.5)
    assert (Adamas().theta, Adamas().budget, Adamas().dense_layers) == (10.0, 128, 2)
    assert Adamas().phase(3) == "step" and Adamas(unit="std").phase(3) == "step"
    q, k, v = qkv(1, 2, 1, 40)
    assert plan(q[:, :, -1:], KV.dense(k, v), budget=40) is None
    x = AttnInput(q[:, :, -1:], KV.dense(k, v), "decode", 1, 4, 0.25, q_pos=torch.tensor([[39]]))
    assert Adamas(budget=8).plan(x, State()) is None and LayerCache().batch == {}
    for text, what in (
        ("adamas:budget=0", "budget expected >= 1"),
        ("adamas:theta=-1", "theta expected >= 0"),
        ("adamas:unit=sigma", "unit expected one of absolute, std"),
        ("adamas:share=vote", "share expected one of"),
        ("adamas:dense_layers=-1", "dense_layers expected >= 0"),
    ):
        with pytest.raises(ConfigError, match=what):
            parse(text)
