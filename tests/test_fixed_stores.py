"""Fixed forms of the quantised, the pruned and the ragged store: step by step what the ordinary stores give."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.cache.dense import DenseStore
from foveate.cache.fixed import Fixed, fix
from foveate.cache.pruned import ChannelStore
from foveate.cache.quantised import QuantisedStore
from foveate.errors import CacheError
from foveate.kernels import packed
from foveate.kernels.dispatch import attend, explain
from foveate.layout import Layout
from foveate.lists import compact
from foveate.methods.base import Selection
from foveate.packed import PackedKV
from foveate.scores.keys import pieces
from tests.models import generate, tiny, tokens
from tests.test_graphs import Strict


def draws(seed=0, d=8, dv=8, b=2, g=2, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return lambda n: (torch.randn(b, g, n, d, generator=gen).to(dtype), torch.randn(b, g, n, dv, generator=gen).to(dtype))


def same(a, b):
    """Two views of the same entries, whatever lies beyond them."""
    for r in range(a.shape[0]):
        n = int(a.lengths()[r, 0])
        assert int(b.lengths()[r, 0]) == n
        for x, y in ((a.k, b.k), (a.v, b.v)):
            torch.testing.assert_close(x[r, :, :n], y[r, :, :n], atol=1e-6, rtol=1e-6)  # an FMA more or less
        if a.bias is not None:
            assert torch.equal(a.bias[r, :, :n].float(), b.bias[r, :, :n].float())
        if a.pos is not None:
            assert torch.equal(a.positions()[r, :, :n], b.positions()[r, :, :n])


def quantised(rule, rows, evicted=False, **more):
    new = draws(**more)
    n = max(rows)
    valid = torch.arange(n) >= torch.tensor([[n - r] for r in rows])
    store = QuantisedStore.empty(*new(0), *rule)
    store.append(*new(n), None if min(rows) == n else valid, [0] * len(rows))
    if evicted:
        index = torch.arange(0, n, 2).expand(2, 2, -1)
        store = store.select(Selection(index, torch.tensor([[r // 2] * 2 for r in rows]), torch.randn(2, 2, (n + 1) // 2)))
    return store, new


RULES = [(4, None, 4, 8), (2, 8, 8, 8), (8, 4, 4, 4), (16, 4, 4, 8), (4, 16, 4, 8)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "rows,evicted", [((21, 21), False), ((20, 13), False), ((20, 13), True), ((3, 8), False), ((16, 24), True)]
)
def test_a_fixed_quantised_store_is_the_store(rule, rows, evicted):
    """Views and codes of both at every step over several folds, then everything else one can ask of it."""
    store, new = quantised(rule, rows, evicted)
    twin = fix(store.fork(), list(rows))
    assert isinstance(twin, Fixed)
    seen, phases = list(rows), set()
    for _ in range(20):
        k, v = new(1)
        phases.add(twin.phase())
        store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
        seen = [s + 1 for s in seen]
        assert isinstance(twin, Fixed) and twin.lens == store.lens and twin.seen_now.tolist() == seen
        same(store.view(), twin.view())
    assert phases == {"", "fold"}
    a, b = store.state(), twin.state()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    twin.reorder(torch.tensor([1, 0]))
    store.reorder(torch.tensor([1, 0]))
    for _ in range(9):
        k, v = new(1)
        store, twin = store.append(k, v, None, seen[::-1]), twin.append(k, v, None, seen[::-1])
        seen = [s + 1 for s in seen]
        same(store.view(), twin.view())
    if not evicted:
        store.truncate(1)
        twin.truncate(1)
        for _ in range(9):
            k, v = new(1)
            store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
            same(store.view(), twin.view())
        assert isinstance(twin, Fixed)
        if rule[0] < 16:
            with pytest.raises(CacheError, match="full precision is gone"):
                twin.truncate(8)
    k, v = new(5)  # a turn of several tokens ends it
    store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
    assert not isinstance(twin, Fixed)
    same(store.view(), twin.view())


@pytest.mark.parametrize("rule", RULES[:3])
@pytest.mark.parametrize("rows", [(41, 41), (40, 13)])
@pytest.mark.parametrize("form", ["ordinary", "fixed"])
@pytest.mark.parametrize("evicted", [False, True])
@torch.no_grad()
def test_attention_over_codes_is_attention_over_the_copy(rule, rows, form, evicted, monkeypatch):
    monkeypatch.setattr(packed, "BUDGET", 500)  # pieces of a few groups
    store, new = quantised(rule, rows, evicted)
    seen = list(rows)
    if form == "fixed":
        store = fix(store, seen)
    q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))
    served = 0
    for _ in range(12):
        store = store.append(*new(1), None, seen)
        seen = [s + 1 for s in seen]
        kv = store.view()
        at = torch.tensor([[s - 1] for s in seen]) if evicted else None
        plan = Layout.dense(2, 4, 1, kv.capacity, q_pos=at)
        got = attend(q, kv, plan, return_lse=True)
        if isinstance(kv, PackedKV):
            assert not kv.made and explain(q, kv, plan)[0].reason is None  # no copy was made
            served += 1
        want = attend(q, kv.to_dense(), plan, return_lse=True, backend="reference")
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
    assert served > 2


def test_a_view_stays_what_it_was():
    store, new = quantised((4, None, 4, 8), (21, 13))
    store.append(*new(1), None, [21, 13])
    kv, want = store.view(), store.fork().view().to_dense()
    for i in range(20):
        store.append(*new(1), None, [22 + i, 14 + i])
    assert not kv.made
    got = kv.to_dense()
    assert torch.equal(got.k, want.k) and torch.equal(got.v, want.v)


@torch.no_grad()
def test_what_packed_views_do_not_serve():
    store, new = quantised((4, None, 4, 8), (41, 41))
    kv = store.append(*new(1), None, [41, 41]).view()
    q = torch.randn(2, 4, 1, 8)
    plan = Layout.static((2, 4, 1, 42), window=9, block_q=1, causal=False)
    assert explain(q, kv, plan)[0].reason == "it serves a rule of causal attention"
    want = attend(q, kv.to_dense(), plan, backend="reference")
    torch.testing.assert_close(attend(q, kv, plan), want, atol=2e-6, rtol=1e-5)
    assert explain(q, kv)[0].reason.startswith("keys and values are unpacked already")


@pytest.mark.parametrize(
    "recipe",
    [
        "dense+cache=kivi:bits=4,group=4,residual=16",
        "dense+cache=kivi:bits=8,group=8,residual=8",
        "decode=quest:page=8,budget=32,dense_layers=1,share=group+cache=kivi:bits=8,group=8,residual=8",
    ],
)
def test_recorded_steps_of_kivi(recipe):
    """Two graphs, one of them for the steps that quantise keys, right at every later step, rows of different length."""
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with foveate.use(model, recipe):
        want = generate(model, ids, mask, max_new_tokens=60, min_new_tokens=60)
    handle = foveate.apply(model, recipe)
    handle.graphs = Strict(handle)
    handle.graphs.install()
    got = generate(model, ids, mask, max_new_tokens=60, min_new_tokens=60)
    few = "quest" in recipe  # on a CPU the lengths beside its bounds move, and a step that runs as it is ends the graphs
    assert handle.graphs.replays > (40 if few else 50) and not handle.notes
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    handle.remove()


# ---------------------------------------------------------------------- dropping in place
@pytest.mark.parametrize("kind", ["dense", "ragged"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_fixed_store_drops_in_place(kind, weights, monkeypatch):
    """Evictions between steps: the entries of the ordinary store, in the tensors that graphs know, views as they were."""
    monkeypatch.setattr(pieces, "__defaults__", (300,))  # a few entries at a time
    new, gen = draws(seed=4), torch.Generator().manual_seed(9)
    k, v = new(60)
    store, seen = DenseStore.empty(k, v).append(k, v, None, [0, 0]), [60, 60]

    def drop():
        lens = torch.tensor(store.lens)
        m = int(lens.max())
        live = torch.arange(m) < lens[..., None]
        gone = live & (torch.rand(2, 2, m, generator=gen) < 0.2)
        if kind == "dense":
            gone = gone[:, :1].expand_as(gone)
        index, count = compact(live & ~gone)
        bias = torch.randn(2, 2, m, generator=gen) if weights else None
        return Selection(index.long(), count.long(), bias)

    store = store.select(drop())
    twin = fix(store.fork(), seen)
    assert isinstance(twin, Fixed) and twin.kind == kind
    known = lambda: (twin.k, twin.v, twin.pos, twin.seen_now, twin.now if kind == "dense" else twin._len)  # noqa: E731
    places = [t.data_ptr() for t in known()]
    for i in range(24):
        k, v = new(1)
        store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
        seen = [s + 1 for s in seen]
        if i % 5 == 4:
            selection = drop()
            before, held, lens = twin.view(), twin.view().len.clone(), torch.tensor(twin.lens)
            free = getattr(twin, "free", 0)
            store, twin = store.select(selection), twin.select(selection)
            assert torch.equal(before.len, held)
            assert kind == "dense" or twin.free >= free + int((lens - torch.tensor(twin.lens)).min())
        assert isinstance(twin, Fixed) and twin.lens == store.lens and not twin.full
        a, b = store.view(), twin.view()
        a, b = a.to_dense(), b.to_dense()
        for x, y in ((a.k, b.k), (a.v, b.v), (a.positions(), b.positions()), (a.bias, b.bias)):
            if x is not None:
                live = a.exists()
                assert torch.equal(x[live], y[:, :, : x.shape[2]][live])
    assert places == [t.data_ptr() for t in known()]
    while not twin.full:  # as many tokens as it says, none into a neighbour's place
        k, v = new(1)
        store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
        seen = [s + 1 for s in seen]
    live = store.view().to_dense().exists()
    assert torch.equal(store.view().to_dense().k[live], twin.view().to_dense().k[:, :, : live.shape[2]][live])
    store, twin = store.append(*new(1), None, seen), twin.append(*new(1), None, seen)
    assert not isinstance(twin, Fixed) and twin.lens == store.lens
    one = Selection(torch.arange(1).expand(2, 2, 1), bias=torch.zeros(2, 2, 1) if weights else None)
    assert not isinstance(fix(twin, seen).select(one), Fixed)  # so little is kept that its memory is given back


# ---------------------------------------------------------------------- pruned keys
def pruned(rows, evicted=False):
    new = draws(seed=2)
    n = max(rows)
    valid = torch.arange(n) >= torch.tensor([[n - r] for r in rows])
    store = ChannelStore.empty(*new(0), tail=5).append(*new(n), None if min(rows) == n else valid, [0] * len(rows))
    channels = torch.stack([torch.randperm(8)[:5].sort().values for _ in range(4)]).view(2, 2, 5)
    index, counts, bias = torch.arange(n).expand(2, 2, -1), torch.tensor([[r] * 2 for r in rows]), None
    if evicted:
        index, counts, bias = index[:, :, ::2], counts // 2, torch.randn(2, 2, (n + 1) // 2)
    return store.select(Selection(index, counts, bias, channels=channels)), new


@pytest.mark.parametrize("rows", [(21, 21), (30, 13)])
@pytest.mark.parametrize("evicted", [False, True])
@torch.no_grad()
def test_a_fixed_store_of_pruned_keys_is_the_store(rows, evicted):
    """Views at every step, attention without a copy, and everything else one can ask of it."""
    store, new = pruned(rows, evicted)
    twin, seen = fix(store.fork(), list(rows)), list(rows)
    assert isinstance(twin, Fixed)
    q = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(1))

    def step():
        nonlocal store, twin, seen
        k, v = new(1)
        store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
        seen = [s + 1 for s in seen]
        assert isinstance(twin, Fixed) and twin.lens == store.lens and twin.seen_now.tolist() == seen
        at = torch.tensor([[s - 1] for s in seen]) if evicted else None
        for kv in (store.view(), twin.view()):
            plan = Layout.dense(2, 4, 1, kv.capacity, q_pos=at)
            got = attend(q, kv, plan, return_lse=True)
            assert isinstance(kv, PackedKV) and not kv.made
            want = attend(q, kv.to_dense(), plan, return_lse=True, backend="reference")
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)
        same(store.view(), twin.view())

    for _ in range(6):
        step()
    a, b = store.state(), twin.state()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for s in (store, twin):
        s.reorder(torch.tensor([1, 0]))
    seen = seen[::-1]
    step()
    if not evicted:
        for s in (store, twin):
            s.truncate(3)
        seen = [s - 3 for s in seen]
        step()
        with pytest.raises(CacheError, match="key channels are gone"):
            twin.truncate(9)
    k, v = new(5)
    store, twin = store.append(k, v, None, seen), twin.append(k, v, None, seen)
    assert not isinstance(twin, Fixed)
    same(store.view(), twin.view())


@pytest.mark.parametrize(
    "recipe", ["dense+cache=think:window=16,tail_size=8", "dense+cache=think:window=8,tail_size=8,capacity=40"]
)
def test_recorded_steps_of_think(recipe):
    model, ids = tiny(), tokens(2, 70)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    run = lambda: generate(model, ids, mask, max_new_tokens=30, min_new_tokens=30)  # noqa: E731
    with foveate.use(model, recipe):
        want = run()
    handle = foveate.apply(model, recipe)
    handle.graphs = Strict(handle)
    handle.graphs.install()
    got = run()
    assert handle.graphs.replays > 20 and not handle.notes
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    handle.remove()
