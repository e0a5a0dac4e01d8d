"""ThinK and its store against a slow transcription of the card: channels, what a step reads, bytes, turns."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.cache import DenseStore, LayerCache
from foveate.cache.persist import load, save
from foveate.cache.pruned import ChannelStore
from foveate.errors import CacheError, ConfigError
from foveate.kernels.dispatch import attend
from foveate.kv import KV
from foveate.methods.base import Selection
from foveate.methods.think import ThinK
from foveate.recipe import Recipe
from foveate.registry import parse
from foveate.scores import channels as channels_module
from foveate.scores.channels import importance
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES

SMALL = "think:ratio=0.4,window=16,tail_size=8"


def slow_channels(q, k, ratio):
    """The card for one kv head: its query heads' window q [r][w, D] and its kept keys k [M, D]; outer products and all."""
    d = k.shape[1]
    score = []
    for c in range(d):
        per_head = [float(torch.outer(rows[:, c], k[:, c]).double().pow(2).sum()) for rows in q]
        score.append(sum(per_head) / len(per_head))
    dropped = sorted(range(d), key=lambda c: (score[c], -c))[: int(d * ratio)]
    return sorted(set(range(d)) - set(dropped))


def step(drive, tensors, lo, hi=None):
    return drive(*(t[:, :, lo : hi or lo + 1] for t in tensors))


def everything(store):
    b, g = len(store.lens), len(store.lens[0])
    return torch.arange(store.count.most).expand(b, g, -1), torch.tensor(store.lens)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_the_cards_channels(case, ratio):
    q, k, v, _ = case.make()
    d, r = q.shape[3], q.shape[1] // k.shape[1]
    drive = Drive(f"think:ratio={ratio},tail_size=32", d=d)
    step(drive, (q, k, v), 0, 299)
    step(drive, (q, k, v), 299)
    got = drive.cache.store.channels
    assert got.shape[2] == d - int(d * ratio)
    for g in range(k.shape[1]):
        assert got[0, g].tolist() == slow_channels(q[0, g * r : (g + 1) * r, 299 - 32 : 299], k[0, g, :299], ratio)


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_rows_of_different_length_and_steps(h, g):
    """Padding counts in no norm; a step attends to keys with gaps but the newest ones; the scale is that of all channels."""
    lens, n = (60, 41, 20), 60
    q, k, v = qkv(3, h, g, n + 12, seed=1)
    valid = torch.arange(n).expand(3, n) >= n - torch.tensor(lens)[:, None]
    drive = Drive(SMALL)
    drive(*(t[:, :, :n].masked_fill(~valid[:, None, :, None], float("nan")) for t in (q, k, v)), valid=valid)
    outs = [step(drive, (q, k, v), t) for t in range(n, n + 12)]
    for b, m in enumerate(lens):
        real = slice(n - m, n)
        for i in range(h):
            head = i * g // h
            mine = [q[b, j, real][-16:] for j in range(h) if j * g // h == head]
            keep = slow_channels(mine, k[b, head, real], 0.4)
            gone = [c for c in range(16) if c not in keep]
            keys, values = k[b, head, n - m :].clone(), v[b, head, n - m :]
            keys[: m - 8, gone] = 0
            for t, out in enumerate(outs):
                size = m + t + 1
                p = torch.softmax(keys[:size] @ q[b, i, n + t] / math.sqrt(16), 0)
                torch.testing.assert_close(out[b, i, 0], p @ values[:size], atol=1e-5, rtol=1e-5)


def test_zero_filled_equals_gathered():
    """Queries cut to the kept channels over the narrow keys, then the whole tail: one softmax gives the same."""
    q, k, v = qkv(1, 6, 2, 101, seed=2)
    drive = Drive(SMALL)
    step(drive, (q, k, v), 0, 100)
    out = step(drive, (q, k, v), 100)
    store = drive.cache.store
    assert store.few.shape == (1, 2, 92, 10) and store.held.host == [9]
    for i in range(6):
        g, row = i // 3, q[0, i, 100]
        narrow = store.few[0, g] @ row[store.channels[0, g].long()]
        whole = store.tail[0, g, :9] @ row
        p = torch.softmax(torch.cat([narrow, whole]) / math.sqrt(16), 0)
        torch.testing.assert_close(out[0, i, 0], p @ v[0, g], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [[5], [5, 2]])
def test_nothing_new_since_pruning(rows):
    """A store that keeps no recent keys whole, read before the next token: there is no second softmax."""
    q, k, v = (t[:, :, -5:] for t in qkv(len(rows), 4, 2, 6, seed=3))
    valid = torch.arange(5) >= torch.tensor([[5 - n] for n in rows])
    store = ChannelStore.empty(k[:, :, :0], v[:, :, :0], 0).append(k, v, valid, [0] * len(rows))
    index, channels = torch.arange(5).expand(len(rows), 2, 5), torch.arange(0, 16, 2).expand(len(rows), 2, 8)
    kv = store.select(Selection(index, torch.tensor([[n, n] for n in rows]), channels=channels)).view()
    got = attend(q[:, :, -1:], kv, return_lse=True)
    assert not kv.made
    for x, y in zip(got, attend(q[:, :, -1:], kv.to_dense(), return_lse=True, backend="reference"), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_no_ratio_is_dense():
    q, k, v = qkv(2, 4, 2, 82, seed=3)
    drive = Drive("think:ratio=0.05")  # int(16 * 0.05) = 0 channels
    step(drive, (q, k, v), 0, 80)
    want = oracle(q, (k, v))
    for t in (80, 81):
        torch.testing.assert_close(step(drive, (q, k, v), t), want[:, :, t : t + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["keys", "queries"])
def test_zero_channels_go_first_and_change_nothing(where):
    q, k, v = qkv(1, 4, 2, 80, seed=4)
    idle = [[1, 4, 7, 9, 12, 13], [0, 2, 3, 8, 11, 15]]  # int(16 * 0.4) = 6
    for g, gone in enumerate(idle):
        for c in gone:
            if where == "keys":
                k[:, g, :, c] = 0
            else:
                q[:, 2 * g : 2 * g + 2, :, c] = 0
    drive = Drive(SMALL)
    step(drive, (q, k, v), 0, 79)
    out = step(drive, (q, k, v), 79)
    torch.testing.assert_close(out, oracle(q, (k, v))[:, :, 79:], atol=1e-6, rtol=1e-6)
    for g, gone in enumerate(idle):
        assert sorted(set(range(16)) - set(drive.cache.store.channels[0, g].tolist())) == gone


def test_importance(monkeypatch):
    """In pieces or at once; identical query heads equal one; hidden and uncounted entries do not matter."""
    q, k, v = qkv(2, 6, 2, 50, seed=5)
    index = torch.arange(50).expand(2, 2, 50)
    counts = torch.tensor([[50, 50], [31, 31]])
    whole = importance(q, KV.dense(k, v), index, counts)
    for b, n in ((0, 50), (1, 31)):
        want = torch.stack([q[b, 3 * g : 3 * g + 3].pow(2).mean((0, 1)) * k[b, g, :n].pow(2).mean(0) for g in range(2)])
        torch.testing.assert_close(whole[b], want)
    few = channels_module.pieces
    monkeypatch.setattr(channels_module, "pieces", lambda total, cost: few(total, cost, 7 * cost))
    torch.testing.assert_close(importance(q, KV.dense(k, v), index, counts), whole)
    same = q[:, ::3].repeat_interleave(3, 1)
    torch.testing.assert_close(
        importance(same, KV.dense(k, v), index, counts), importance(q[:, ::3], KV.dense(k, v), index, counts)
    )
    bias = torch.zeros(2, 2, 50)
    bias[1, :, 31:] = float("-inf")
    bad = k.clone()
    bad[1, :, 31:] = float("nan")
    hidden = importance(q, KV.dense(bad, v, bias=bias), index, torch.full((2, 2), 50))
    torch.testing.assert_close(hidden * torch.tensor([1, 50 / 31])[:, None, None], whole)


def test_after_snapkv():
    """With a capacity, tokens are SnapKV's; then channels are chosen on the kept keys, and the newest stay whole."""
    tensors = qkv(2, 4, 2, 152, seed=6)
    both, tokens = Drive("think:capacity=48,window=16,tail_size=8"), Drive("snapkv:capacity=48,window=16")
    for d in (both, tokens):
        step(d, tensors, 0, 150)
        step(d, tensors, 150)
    store, other = both.cache.store, tokens.cache.store
    assert torch.equal(store.view().positions(), other.view().positions()) and both.cache.evicted
    assert store.done.host == [40, 40] and store.lens == other.lens == [[49, 49], [49, 49]]
    k = other.view().k
    for b in range(2):
        for g in range(2):
            keep = slow_channels(tensors[0][b, 2 * g : 2 * g + 2, 134:150], k[b, g, :48], 0.4)
            assert store.channels[b, g].tolist() == keep
            want = k[b, g].clone()
            want[:40, [c for c in range(16) if c not in keep]] = 0
            assert torch.equal(store.view().k[b, g], want)
    assert torch.equal(store.view().v, other.view().v)
    with pytest.raises(CacheError, match="evicted"):
        both.cache.truncate(1)


def test_bytes_by_hand():
    """D' channels of all keys but the newest, whole values, channel numbers, and room for 128 tokens."""
    k = torch.randn(1, 3, 4096, 64).half()
    layer = LayerCache()
    layer.append(k, k, storage=ThinK().storage())
    few = torch.arange(39).expand(1, 3, 39)  # 64 - int(64 * 0.4)
    keep = Selection(torch.arange(4096).expand(1, 3, 4096), channels=few)
    layer.select(keep, [keep])
    per_head = (4096 - 32) * 39 + (32 + 1 + 128) * 64 + (4096 + 1 + 128) * 64
    assert layer.nbytes == 3 * (2 * per_head + 2 * 39)
    assert layer.nbytes < 0.84 * 2 * 3 * 4096 * 64 * 2
    held = sum(t.untyped_storage().nbytes() for t in layer.store._tensors().values())
    assert held == layer.nbytes  # nothing keeps the whole keys alive
    assert not layer.evicted
    for i in range(128):
        layer.append(k[:, :, :1], k[:, :, :1])
    assert layer.nbytes == 3 * (2 * per_head + 2 * 39)


def test_a_second_turn_keeps_the_channels():
    """New tokens are whole until the next step; then they lose the channels the first prompt chose."""
    q, k, v = qkv(1, 4, 2, 130, seed=7)
    q[:, :, 60:] = q[:, :, 60:] * torch.linspace(0, 9, 16)  # the second prompt would choose otherwise
    drive = Drive(SMALL)
    step(drive, (q, k, v), 0, 60)
    for t in range(60, 65):
        step(drive, (q, k, v), t)
    first = drive.cache.store.channels.clone()
    step(drive, (q, k, v), 65, 120)
    assert torch.equal(drive.last[0].kv.k[:, :, 52:], k[:, :, 52:120])
    step(drive, (q, k, v), 120)
    store = drive.cache.store
    assert torch.equal(store.channels, first) and store.done.host == [112] and store.lens == [[121, 121]]
    for g in range(2):
        want = k[0, g, :121].clone()
        want[:112, [c for c in range(16) if c not in first[0, g].tolist()]] = 0
        assert torch.equal(store.view().k[0, g], want)
    other = Drive(SMALL)
    step(other, (q, k, v), 0, 120)
    step(other, (q, k, v), 120)
    assert not torch.equal(other.cache.store.channels, first)


def test_copies_and_saved_caches(tmp_path):
    tensors = qkv(3, 4, 2, 90, seed=8)
    valid = torch.arange(60).expand(3, 60) >= torch.tensor([[0], [25], [11]])
    drive, fork, order = Drive(SMALL), Drive(SMALL), torch.tensor([2, 0, 0])
    drive(*(t[:, :, :60] for t in tensors), valid=valid)
    for t in range(60, 64):
        step(drive, tensors, t)
    fork.cache = drive.cache.fork()
    fork.cache.reorder(order)
    for t in range(64, 75):
        want = step(drive, tensors, t)
        got = step(fork, [x[order] for x in tensors], t)
        torch.testing.assert_close(got, want[order], atol=1e-6, rtol=1e-6)
    assert save(tmp_path / "c", [fork.cache], "m", SMALL) == []
    loaded = Drive(SMALL)
    (loaded.cache,) = load(tmp_path / "c", "m")
    assert loaded.cache.store.kind == "channels" and loaded.cache.nbytes <= fork.cache.nbytes
    for t in range(75, 90):
        assert torch.equal(step(loaded, tensors, t), step(fork, tensors, t))
    kept = drive.cache.store.view().to_dense().k.clone()
    for t in drive.cache.store.fork()._tensors().values():
        t.zero_()
    assert torch.equal(drive.cache.store.view().to_dense().k, kept)


def test_rollback():
    tensors = qkv(1, 4, 2, 80, seed=9)
    a, b = Drive(SMALL), Drive(SMALL)
    for d in (a, b):
        step(d, tensors, 0, 50)
        step(d, tensors, 50)
    for t in range(51, 56):
        step(a, tensors, t)
    a.cache.truncate(5)
    assert torch.equal(step(a, tensors, 60), step(b, tensors, 60))
    with pytest.raises(CacheError, match="key channels are gone"):
        a.cache.truncate(3)
    assert a.cache.seen == [52]
    fresh = Drive(SMALL)
    step(fresh, tensors, 0, 50)
    fresh.cache.truncate(20)  # before anything was chosen
    assert fresh.cache.store.lens == [[30, 30]]


def test_tokens_evicted_from_a_pruned_store():
    """A selection without channels leaves what is pruned pruned and the rest whole, whatever the heads keep."""
    k = torch.randn(2, 2, 30, 6, generator=torch.Generator().manual_seed(10))
    store = ChannelStore.empty(k, k, tail=10).append(k, k, None, [0, 0])
    few = torch.tensor([[[0, 3], [1, 5]], [[2, 4], [0, 1]]])
    store = store.select(Selection(*everything(store), channels=few))
    before = store.view()
    dense = DenseStore(before.k.clone(), before.v.clone(), [30, 30])
    index = torch.stack(
        [torch.randperm(30, generator=torch.Generator().manual_seed(i))[:15].sort().values for i in range(4)]
    )
    keep = Selection(index.view(2, 2, 15), torch.tensor([[15, 15], [9, 9]]), torch.randn(2, 2, 15))
    a, b = store.select(keep), dense.select(keep)
    for s in (a, b):
        s.append(k[:, :, :1], k[:, :, :1], None, [30, 30])
    for name in ("k", "v", "pos", "bias"):
        x, y = (getattr(s.view().to_dense(), name) for s in (a, b))
        assert torch.equal(x[0], y[0]) and torch.equal(x[1, :, :10], y[1, :, :10])
    want = [[int((index.view(2, 2, 15)[i, j, :n] < 20).sum()) for j in range(2)] for i, n in enumerate((15, 9))]
    assert a.done.host == [min(w) for w in want]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"channels": torch.tensor([[[0, 9]]])}, "between 0 and 5"),
        ({"channels": torch.tensor([[[3, 3]]])}, "ascending"),
        ({"channels": torch.zeros(1, 2, 1).long()}, r"\[B, G, D'\] = \[1, 1, 1 to 6\], got \[1, 2, 1\]"),
        ({"ring": (1, 3)}, "no ring"),
        ({"counts": torch.tensor([[9]])}, "between 0 and 8"),
    ],
)
def test_bad_selections(options, message):
    k = torch.randn(1, 1, 8, 6)
    store = ChannelStore.empty(k, k).append(k, k, None, [0])
    with pytest.raises(CacheError, match=message):
        store.select(Selection(torch.arange(8).expand(1, 1, 8), **options))
    two = ChannelStore.empty(k.expand(1, 2, 8, 6), k.expand(1, 2, 8, 6)).append(
        k.expand(1, 2, 8, 6), k.expand(1, 2, 8, 6), None, [0]
    )
    with pytest.raises(CacheError, match="for all kv heads"):
        two.select(Selection(torch.arange(8).expand(1, 2, 8), torch.tensor([[8, 5]])))


def test_selections_with_channels_elsewhere():
    k = torch.randn(2, 1, 8, 6)
    chosen = Selection(torch.arange(8).expand(2, 1, 8), channels=torch.zeros(2, 1, 1).long())
    with pytest.raises(CacheError, match="keeps whole keys"):
        DenseStore.empty(k, k).append(k, k, None, [0, 0]).select(chosen)
    again = Selection.stack([chosen.row(0), chosen.row(1)])
    assert torch.equal(again.channels, chosen.channels)
    with pytest.raises(CacheError, match="same number of key channels"):
        Selection.stack([chosen.row(0), Selection(chosen.row(1).indices)])


def test_a_cache_without_saved_queries():
    """A cache filled under another recipe: the keys alone choose, and the user is told."""
    tensors = qkv(1, 4, 2, 61, seed=11)
    drive = Drive(SMALL)
    drive.cache.append(*(t[:, :, :60] for t in tensors[1:]), storage=drive.recipe.stored)
    drive.cache.pending = True
    step(drive, tensors, 60)
    assert "think: no prompt queries were saved with this cache; channels are chosen by their keys alone" in drive.notes
    keys = tensors[1][0, :, :60].pow(2).mean(1)
    want = keys.topk(10, -1).indices.sort(-1).values
    assert torch.equal(drive.cache.store.channels[0].long(), want)


def test_bad_hyperparameters():
    for text, message in [
        ("think:ratio=1.0", "think: ratio expected between 0.0 and 0.99, got 1.0"),
        ("think:window=0", "think: window expected >= 1, got 0"),
        ("think:tail_size=0", "think: tail_size expected >= 1, got 0"),
        ("think:capacity=20", "think: capacity expected at least window \\+ 4 sinks = 36, got 20"),
        ("think:rho=0.4", "unknown hyperparameter 'rho'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(text)
    for storage in ("paged", "offload"):
        with pytest.raises(ConfigError, match=f"storage='{storage}' cannot"):
            Recipe(cache=ThinK(), storage=storage)
    assert ThinK() == ThinK(ratio=0.4, window=32, tail_size=32, capacity=None)
