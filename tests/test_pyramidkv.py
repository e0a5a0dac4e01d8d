"""PyramidKV: the schedule of its card, and SnapKV's selection under each layer's budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.errors import CacheError, ConfigError
from foveate.methods.pyramidkv import PyramidKV
from foveate.registry import parse
from tests.drive import Drive, oracle, qkv
from tests.fidelity import CASES
from tests.models import tiny, tokens


def slow_votes(q, k, window, kernel, pooling, reduce, scale):
    """The card of SnapKV in fp64 and loops over heads: `[G, N - window]`, q and k `[1, H|G, N, D]`."""
    h, n, g = q.shape[1], q.shape[2], k.shape[1]
    out = []
    for j in range(g):
        heads = []
        for i in range(j * h // g, (j + 1) * h // g):
            s = q[0, i, n - window :].double() @ k[0, j].double().T * scale
            late = torch.arange(n)[None] > torch.arange(n - window, n)[:, None]
            heads.append(s.masked_fill(late, float("-inf")).softmax(-1)[:, : n - window].sum(0))
        a = torch.stack(heads)
        a = {"mean": a.mean(0), "max": a.amax(0), "sum": a.sum(0)}[reduce]
        pooled = []
        for e in range(len(a)):
            near = a[max(0, e - kernel // 2) : e + kernel // 2 + 1]
            pooled.append(near.sum() / kernel if pooling == "avg" else near.max())
        out.append(torch.stack(pooled))
    return torch.stack(out)


def same_choice(got, want, score):
    """Two lists of entries, equal but for those whose scores agree to rounding (max pooling makes many exact ties)."""
    assert len(got) == len(want) == len(set(got))
    a, b = (sorted(float(score[e]) for e in kept if e < len(score)) for kept in (got, want))
    assert a == pytest.approx(b, rel=1e-4, abs=1e-7)


@settings(max_examples=200, deadline=None)
@given(
    layers=st.integers(1, 40),
    capacity=st.integers(40, 600),
    window=st.integers(1, 36),
    beta=st.floats(1, 50),
    length=st.integers(1, 3000),
)
def test_schedule(layers, capacity, window, beta, length):
    """Sum = layers * capacity, never rising, within a token of the card's line, and no layer asks for more than there is."""
    method = PyramidKV(capacity=capacity, window=window, beta=beta)
    got = method.budgets(layers, length)
    mean, there = capacity - window, max(0, length - window)
    assert all(a >= b for a, b in zip(got, got[1:], strict=False)) and all(0 <= b <= there for b in got)
    if length <= capacity:
        assert got == [there] * layers
        return
    low = mean / beta
    high = 2 * mean - low
    if high > there:
        high = there
        low = 2 * mean - high
    assert abs(sum(got) - layers * mean) <= 1
    if layers > 1:
        for i, b in enumerate(got):
            assert abs(b - (high - i * (high - low) / (layers - 1))) <= 1 + 1e-6


def test_schedule_by_hand():
    assert PyramidKV(capacity=108, window=8, beta=20.0).budgets(4, 10_000) == [195, 132, 68, 5]
    assert PyramidKV(capacity=108, window=8, beta=1.0).budgets(5, 10_000) == [100] * 5
    # Shorter than twice the capacity: the published code goes flat here, the card's line only gets flatter.
    assert PyramidKV(capacity=108, window=8, beta=20.0).budgets(3, 158) == [150, 100, 50]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layer", [0, 3])
def test_selection_is_the_card(case, layer):
    q, k, v, _ = case.make()
    drive = Drive("pyramidkv:capacity=60,beta=5", d=q.shape[-1], layer=layer)
    drive(q, k, v)
    drive(*(t[:, :, -1:] for t in (q, k, v)))
    budget = PyramidKV(capacity=60, beta=5.0).budgets(4, 300)[layer]
    score = slow_votes(q, k, 8, 7, "max", "mean", case.scale)
    kv = drive.cache.store.view()
    for j in range(k.shape[1]):
        rest = sorted(range(4, 292), key=lambda e: (-float(score[j, e]), e))
        want = [0, 1, 2, 3, *rest[: budget - 4], *range(292, 300)]
        got = kv.positions()[0, j, :-1].tolist()
        assert got == sorted(got) and got[:4] == [0, 1, 2, 3] and got[-8:] == list(range(292, 300))
        same_choice(got, want, score[j])


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (4, 1), (8, 1)])
def test_layers_keep_less_and_less(h, g):
    """Uniform inside a layer, different between layers; every layer counts the same tokens seen."""
    q, k, v = qkv(1, h, g, 203)
    sizes = []
    for layer in range(4):
        drive = Drive("pyramidkv:capacity=48,beta=8", layer=layer)
        for a, b in ((0, 64), (64, 128), (128, 200), (200, 201), (201, 202)):
            drive(*(t[:, :, a:b] for t in (q, k, v)))
        lens = drive.cache.store.lens[0]
        assert len(set(lens)) == 1 and drive.cache.seen == [202] and int(drive.last[0].q_pos) == 201
        sizes.append(lens[0] - 2)
        x, plan, out = drive.last
        torch.testing.assert_close(out, oracle(x.q, x.kv, plan), atol=1e-5, rtol=1e-5)
    assert sizes == [8 + b for b in PyramidKV(capacity=48, beta=8.0).budgets(4, 200)] and sum(sizes) == 4 * 48
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


def test_chunks_and_the_whole_end_in_the_same_cache():
    q, k, v = qkv(1, 4, 2, 151)
    whole, chunks = Drive("pyramidkv:capacity=48"), Drive("pyramidkv:capacity=48")
    for a, b in ((0, 150), (150, 151)):
        whole(*(t[:, :, a:b] for t in (q, k, v)))
    for a, b in ((0, 70), (70, 147), (147, 150), (150, 151)):
        chunks(*(t[:, :, a:b] for t in (q, k, v)))
    assert torch.equal(whole.cache.store.view().positions(), chunks.cache.store.view().positions())


def test_short_prompts_and_missing_queries():
    q, k, v = qkv(1, 4, 2, 101)
    drive = Drive("pyramidkv:capacity=100")
    for a, b in ((0, 100), (100, 101)):
        drive(*(t[:, :, a:b] for t in (q, k, v)))
    assert drive.cache.store.lens == [[101, 101]] and not drive.cache.evicted
    drive = Drive("pyramidkv:capacity=50")
    drive(*(t[:, :, :100] for t in (q, k, v)))
    drive.cache.forget()
    drive(*(t[:, :, 100:] for t in (q, k, v)))
    assert drive.cache.store.lens == [[101, 101]] and any("no prompt queries" in t for t in drive.notes)


def test_a_rollback_that_is_refused_changes_nothing():
    """The first layers keep everything and could be rolled back, the last ones could not."""
    model, ids = tiny(), tokens(1, 60)
    with foveate.use(model, "cache=pyramidkv:window=8,sink=0,capacity=40,beta=20"), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        kept = [layer.cache.evicted for layer in cache.layers]
        assert not kept[0] and kept[-1]
        with pytest.raises(CacheError, match="evicted"):
            cache.crop(-1)
        assert [layer.cache.seen for layer in cache.layers] == [[61]] * 3 and not cache.broken
        assert {layer.columns for layer in cache.layers} == {61}


def test_options():
    assert parse("pyramidkv") == PyramidKV(window=8, capacity=2048, beta=20.0, kernel=7, pooling="max")
    for text, message in (
        ("pyramidkv:kernel=4", "kernel expected an odd number, got 4"),
        ("pyramidkv:window=64,capacity=60", "capacity expected at least window"),
        ("pyramidkv:beta=0.5", "beta expected >= 1"),
        ("pyramidkv:pooling=mean", "one of avg, max"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(text)


def test_a_layer_with_less_than_its_sinks_keeps_them():
    q, k, v = qkv(1, 4, 2, 101)
    drive = Drive("cache=pyramidkv:window=8,capacity=16,beta=20,sink=4", layers=8, layer=7)
    drive(*(t[:, :, :100] for t in (q, k, v)))
    drive(*(t[:, :, 100:] for t in (q, k, v)))
    assert drive.cache.store.view().positions()[0].tolist() == [[0, 1, 2, 3, *range(92, 101)]] * 2
