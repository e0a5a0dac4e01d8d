"""Keys and values in host memory: the store, what a step fetches, and a million tokens."""

from __future__ import annotations

import os
import time

import pytest
import torch

from foveate.cache import DenseStore, LayerCache, PagedStore, RaggedStore
from foveate.cache import layer as layers
from foveate.cache.offload import OffloadStore, bring, fetch, fetch_parts, follow, whole
from foveate.errors import CacheError, ConfigError, ShapeError
from foveate.kernels.dispatch import attend
from foveate.kv import KV
from foveate.layout import Layout, Part, Parts
from foveate.methods.base import Selection
from foveate.recipe import Recipe
from tests.drive import Drive, qkv

NAN = float("nan")
PEAK = 1 << 20  # bytes in the unit of a process's peak memory below


def offloaded(recipe, monkeypatch, **options):
    """A drive whose store is the offloaded one."""
    monkeypatch.setitem(layers.STORAGE, "offload", lambda k, v: OffloadStore.empty(k, v, **options))
    recipe = Recipe.of(recipe)
    object.__setattr__(recipe, "storage", "offload")
    return Drive(recipe)


# ---------------------------------------------------------------------- the store
@pytest.mark.parametrize(
    "text",
    [
        "dense",
        "quest:budget=32,dense_layers=0",
        "double_sparsity:budget=24",
        "adamas:budget=24",
        "dense+cache=snapkv:window=8,capacity=40",
    ],
)
@pytest.mark.parametrize("reserve", [0, 130])
def test_every_recipe_runs_on_it(text, reserve, monkeypatch):
    """Prompt with padding, steps, a second turn: bit for bit what the plain store gives."""
    q, k, v = qkv(2, 4, 2, 200)
    a, b = Drive(Recipe.of(text)), offloaded(text, monkeypatch, reserve=reserve)
    valid = torch.arange(120) >= torch.tensor([[0], [31]])
    for d in (a, b):
        d(*(t[:, :, :120] for t in (q, k, v)), valid=valid)
    spans = [(i, i + 1) for i in range(120, 126)] + [(126, 150)] + [(i, i + 1) for i in range(150, 153)]
    for lo, hi in spans:
        got = [d(*(t[:, :, lo:hi] for t in (q, k, v))) for d in (a, b)]
        assert torch.equal(*got)
    assert isinstance(b.cache.store, OffloadStore) and b.cache.store.lens == a.cache.store.lens


def test_room_is_set_aside():
    _, k, v = qkv(1, 2, 2, 100)
    store = OffloadStore.empty(k, v, reserve=5000).append(k, v, None, [0])
    at = store.k.data_ptr(), store.v.data_ptr()
    for i in range(20):
        store = store.append(k[:, :, :90], v[:, :, :90], None, [100 + 90 * i])
    assert (store.k.data_ptr(), store.v.data_ptr()) == at and store.lens == [[1900] * 2]
    assert store.nbytes == 2 * 2 * 5000 * 16 * 4
    store = store.append(*(t.repeat(1, 1, 40, 1) for t in (k, v)), None, [1900])
    assert store.lens == [[5900] * 2] and torch.equal(store.view().k[:, :, 100:190], k[:, :, :90])


def test_operations_keep_the_kind(tmp_path):
    _, k, v = qkv(2, 2, 2, 60)
    store = OffloadStore.empty(k, v).append(k, v, None, [0, 0])
    other = store.fork()
    other.k.zero_()
    assert isinstance(other, OffloadStore) and torch.equal(store.view().k, k)
    store.truncate(5)
    store.reorder(torch.tensor([1, 0]))
    assert torch.equal(store.view().k, k[[1, 0], :, :55])
    back = OffloadStore.restore(store.state())
    assert isinstance(back, OffloadStore) and torch.equal(back.view().v, store.view().v)
    index = torch.arange(0, 50, 2).expand(2, 2, -1)
    kept = store.select(Selection(index))
    assert isinstance(kept, OffloadStore) and torch.equal(kept.view().k, store.view().k[:, :, 0:50:2])
    with pytest.raises(CacheError, match="one rectangle, this one needs storage 'ragged'"):
        store.select(Selection(index, torch.tensor([[25, 3], [25, 4]])))
    with pytest.raises(ConfigError, match="reserve expected >= 0"):
        OffloadStore.empty(k, v, reserve=-1)


# ---------------------------------------------------------------------- what a step fetches
def plans(b, h, g, m):
    """Layouts of one query a row: lists of tiles and of entries, shared and not, overlapping, beside a rule, dense."""
    gen = torch.Generator().manual_seed(0)
    some = lambda heads, n: torch.rand(b, heads, 1, m, generator=gen).topk(n, -1).indices.sort(-1).values  # noqa: E731
    shape, few = (b, h, 1, m), torch.randint(1, 7, (b, g, 1), generator=gen)
    yield "tiles", Layout.lists(shape, block_q=1, tile_width=4, tiles=some(g, 6), tile_count=few)
    yield "entries of heads", Layout.lists(shape, block_q=1, tile_width=1, entries=some(h, 6))
    yield "one list", Layout(shape, tiles=some(1, 3)[:1].int(), tile_count=torch.full((1, 1, 1), 3).int(), tile_width=8)
    lists = dict(tiles=some(g, 3).int(), tile_count=torch.full((b, g, 1), 3).int(), tile_width=16)
    yield (
        "entries inside tiles",
        Layout(shape, **lists, entries=some(g, 12).int(), entry_count=torch.full((b, g, 1), 12).int()),
    )
    yield "a rule", Layout.static(shape, sink=3, window=9, block_q=1)
    yield "a rule and a stride", Layout.static(shape, sink=3, window=9, stride=3, stride_block=4, block_q=1)
    yield "both", Layout.lists(shape, sink=3, window=5, block_q=1, tile_width=4, tiles=some(g, 6), tile_count=few)
    yield "dense", Layout.dense(*shape)


@pytest.mark.parametrize("h,g", [(2, 2), (3, 1), (8, 2)])
@pytest.mark.parametrize("kind", ["dense", "paged", "ragged"])
def test_a_fetched_step_is_the_step(h, g, kind):
    """Output and lse over what was fetched equal those over the whole view, for rows of different length."""
    b, m, lens = 2, 80, torch.tensor([[80] * g, [55] * g])
    q, k, v = qkv(b, h, g, m)
    fill = torch.arange(m) < lens[:, :1]
    if kind == "ragged":
        every = Selection(torch.arange(m).expand(b, g, m), lens)
        kv = RaggedStore.build(KV.dense(k, v), every, torch.arange(m).expand(b, g, m).int(), None).view()
        at = lens[:, :1] - 1
    else:
        store = (PagedStore.empty(k, v, 8) if kind == "paged" else OffloadStore.empty(k, v)).append(k, v, fill, [0, 0])
        if kind == "dense":
            store.k[1, :, 55:], store.v[1, :, 55:] = NAN, NAN
        kv, at = store.view(), None
    for name, layout in plans(b, h, g, m):
        layout = layout if at is None else Layout(**{**layout.__dict__, "q_pos": at})
        near, plan = fetch(kv, layout, "cpu")
        want = attend(q[:, :, -1:], kv, layout, return_lse=True, backend="reference")
        got = attend(q[:, :, -1:], near, plan, return_lse=True, backend="reference")
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5, msg=name)
        if name not in ("dense", "a rule and a stride"):
            assert near.capacity <= 60 and int(near.lengths().max()) == near.capacity, name
            assert int(near.lengths().sum()) * (h // near.shape[1]) == int(layout.to_mask(kv).sum()), name  # each key once


def test_weights_and_hidden_entries_come_along():
    q, k, v = qkv(1, 4, 2, 60)
    bias = torch.randn(1, 2, 60, generator=torch.Generator().manual_seed(1))
    bias[..., 20:30] = float("-inf")
    pos = torch.arange(60).mul(2).expand(1, 2, 60)
    kv = KV.dense(k, v, pos=pos, bias=bias)
    layout = Layout.lists(
        (1, 4, 1, 60),
        block_q=1,
        tile_width=8,
        tiles=torch.tensor([0, 16, 24, 48]).expand(1, 2, 1, 4),
        q_pos=torch.tensor([[105]]),
    )
    near, plan = fetch(kv, layout, "cpu")
    want, got = attend(q[:, :, -1:], kv, layout), attend(q[:, :, -1:], near, plan)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, attend(q[:, :, -1:], KV.dense(near.k, near.v, len=near.len, pos=near.pos), plan))


def test_what_is_fetched_is_small_and_shared_lists_once():
    q, k, v = qkv(1, 8, 2, 4096)
    kv = OffloadStore.empty(k, v).append(k, v, None, [0]).view()
    for lists, heads in ((2, 2), (8, 8)):
        entries = torch.arange(0, 4096, 128).expand(1, lists, 1, 32)
        near, _ = fetch(kv, Layout.lists((1, 8, 1, 4096), block_q=1, tile_width=1, entries=entries), "cpu")
        assert near.k.shape == (1, heads, 32, 16) and near.nbytes < 0.2 * kv.nbytes


def test_prompts_borrow_the_whole_view():
    q, k, v = qkv(2, 4, 2, 30)
    store = PagedStore.empty(k, v, 8).append(k, v, None, [0, 0])
    kv = store.view()
    near, plan = fetch(kv, Layout.dense(2, 4, 5, 30), "cpu")
    assert plan.full and near.kind == "paged" and torch.equal(near.to_dense().k, kv.to_dense().k)
    assert torch.equal(whole(kv, "cpu").to_dense().v, v)
    with pytest.raises(ShapeError, match=r"expected \[B, M\] = \[2, 30\]"):
        fetch(kv, Layout.dense(2, 4, 1, 29), "cpu")


def test_a_device_without_memory_takes_what_is_fetched():
    """The `meta` device stands for another one: new entries come from there, and plans send theirs there."""
    k, v = (torch.empty(1, 2, 1, 16, device="meta") for _ in range(2))
    assert OffloadStore.empty(k, v).k.device.type == "cpu"
    _, k, v = qkv(1, 4, 2, 64)
    kv = OffloadStore.empty(k, v).append(k, v, None, [0]).view()
    near, plan = fetch(kv, Layout.static((1, 4, 1, 64), sink=2, window=8, block_q=1), "meta")
    assert near.k.device.type == near.len.device.type == near.pos.device.type == "meta" and near.k.shape == (1, 4, 10, 16)
    assert plan.q_pos.device.type == "meta" and whole(kv, "meta").v.device.type == "meta"


# ---------------------------------------------------------------------- a million tokens
def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from /proc")
def test_a_million_tokens(monkeypatch):
    """1,000 decode steps over 2^20 tokens: nothing grows, nothing of the cache is copied, and it is fast."""
    m, d = 1 << 20, 16
    drive = offloaded("quest:page=64,budget=1024,dense_layers=0", monkeypatch, reserve=m + 2000)
    drive.watch, drive.info = None, type(drive.info)(2, 4, 0.25)
    gen = torch.Generator().manual_seed(0)
    make = lambda *s: torch.randn(*s, generator=gen)  # noqa: E731
    for _ in range(16):
        drive.cache.append(*(make(1, 1, m // 16, d) for _ in "kv"), storage={"kind": "offload"})
    step = lambda: drive(make(1, 2, 1, d), *(make(1, 1, 1, d) for _ in "kv"))  # noqa: E731
    for _ in range(20):  # page bounds are built, scratch memory is there
        out = step()
    store: OffloadStore = drive.cache.store
    places, size, before, began = (store.k.data_ptr(), store.v.data_ptr()), store.nbytes, resident(), time.monotonic()
    peak = before
    for i in range(1000):
        out = step()
        if i % 50 == 0:
            peak = max(peak, resident())
    spent = time.monotonic() - began
    assert drive.cache.store is store and store.lens == [[m + 1020]]
    assert (store.k.data_ptr(), store.v.data_ptr()) == places and store.nbytes == size
    assert max(peak, resident()) - before < 16 * PEAK  # the cache is 130 times that
    assert torch.isfinite(out).all() and spent < 60


def test_layer_cache_takes_it(monkeypatch):
    monkeypatch.setitem(layers.STORAGE, "offload", OffloadStore.empty)
    cache, (_, k, v) = LayerCache(), qkv(1, 2, 2, 10)
    cache.append(k, v, storage={"kind": "offload", "reserve": 50})
    assert isinstance(cache.store, OffloadStore) and cache.store.k.shape[2] == 50
    assert isinstance(cache.fork().store, OffloadStore) and DenseStore.kind != OffloadStore.kind


# ---------------------------------------------------------------------- what stays on the device
def test_only_what_is_named_anew_is_copied():
    """Lists that change little from step to step, of growing and shrinking length, over a growing store."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = qkv(2, 4, 2, 120)
    store = OffloadStore.empty(k, v).append(k[:, :, :90], v[:, :, :90], None, [0, 0])
    named = 0
    for i in range(30):
        store = store.append(k[:, :, 90 + i : 91 + i], v[:, :, 90 + i : 91 + i], None, [90 + i] * 2)
        kv, heads = store.view(), 2 if i < 20 else 4
        scores = torch.zeros(2, heads, 1, kv.capacity)
        scores[..., : 40 + i % 7] = 2
        scores += torch.randn(scores.shape, generator=gen) * (1.0 if i % 5 else 0.0)
        entries = scores.topk(12, -1).indices.sort(-1).values
        count = torch.randint(1, 13, (2, heads, 1), generator=gen)
        layout = Layout.lists((2, 4, 1, kv.capacity), block_q=1, tile_width=1, entries=entries, entry_count=count)
        near, plan = fetch(kv, layout, "cpu", store.near)
        want = attend(q[:, :, -1:], kv, layout, return_lse=True, backend="reference")
        got = attend(q[:, :, -1:], near, plan, return_lse=True, backend="reference")
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
        named += int(count.sum())
    assert 0 < store.near.copied < 0.9 * named
    before = store.near.copied
    fetch(kv, layout, "cpu", store.near)
    assert store.near.copied == before  # the same lists again
    store.truncate(1)
    assert store.near.names is None
    store.append(-k[:, :, :1], -v[:, :, :1], None, [119] * 2)
    kv = store.view()
    assert torch.equal(fetch(kv, layout, "cpu", store.near)[0].k, fetch(kv, layout, "cpu")[0].k)


def test_several_softmaxes_are_fetched():
    q, k, v = qkv(2, 4, 2, 60)
    kv = OffloadStore.empty(k, v).append(k, v, None, [0, 0]).view()
    own = KV.dense(k[:, :, :3] * 2, v[:, :, :3])
    plan = Parts((Part(Layout.static((2, 4, 1, 60), sink=2, window=9, block_q=1)), Part(Layout.dense(2, 4, 1, 3), kv=own)))
    near = fetch_parts(kv, plan, "cpu")
    assert all(p.kv is not None for p in near.parts) and near.parts[0].kv.capacity == 11
    want = attend(q[:, :, -1:], kv, plan)
    torch.testing.assert_close(attend(q[:, :, -1:], near.parts[0].kv, near), want, atol=1e-6, rtol=1e-5)


def test_what_methods_remember_follows():
    """The `meta` device stands for the other one; subclasses of tensors and objects of methods stay what they are."""
    from foveate.methods.h2o import Sums
    from foveate.methods.razor_attention import Folded

    state = {"a": torch.ones(3), "b": [torch.ones(2), 5], "c": Sums(torch.ones(1, 2, 3), 7), "d": "text"}
    state["e"] = torch.ones(1, 2, 4).as_subclass(Folded)
    bring([state], torch.device("meta"))
    assert state["a"].is_meta and state["b"][0].is_meta and state["b"][1] == 5 and state["d"] == "text"
    assert state["c"].mass.is_meta and state["c"].length == 7 and type(state["e"]) is Folded
    assert state["e"].as_subclass(torch.Tensor).is_meta


def test_padding_is_nobody():
    """A list with padding, then entries that did not exist yet: none of them is taken for what the padding held."""
    q, k, v = qkv(1, 2, 2, 92)
    store = OffloadStore.empty(k, v).append(k[:, :, :90], v[:, :, :90], None, [0])
    lists = lambda m, e, n: Layout.lists(  # noqa: E731
        (1, 2, 1, m),
        block_q=1,
        tile_width=1,
        entries=torch.tensor(e).expand(1, 2, 1, -1),
        entry_count=torch.tensor(n).view(1, 2, 1),
    )
    fetch(store.view(), lists(90, [3, 5, 7], (3, 1)), "cpu", store.near)
    store = store.append(k[:, :, 90:], v[:, :, 90:], None, [90])
    plan = lists(92, [3, 90, 91], (3, 3))
    near, _ = fetch(store.view(), plan, "cpu", store.near)
    assert torch.equal(near.k, k[:, :, [3, 90, 91]]) and torch.equal(near.v, v[:, :, [3, 90, 91]])


def test_what_was_sent_ahead_is_lent():
    """The next layer's entries on their way while this one computes; what came since follows, what changed is not used."""
    _, k, v = qkv(2, 4, 2, 60)
    for rows in ((30, 30), (30, 21)):
        valid = torch.arange(30) >= torch.tensor([[30 - n] for n in rows])
        store = OffloadStore.empty(k, v).append(k[:, :, :30], v[:, :, :30], valid, [0, 0])
        near, seen = store.near, list(rows)
        for i in range(30, 36):
            near.send(store, "cpu")
            assert near.ahead is not None and near.ahead[0].data_ptr() != store.k.data_ptr()
            held, at = near.ahead[0], store.k.data_ptr()
            store = store.append(k[:, :, i : i + 1], v[:, :, i : i + 1], None, seen)
            seen = [s + 1 for s in seen]
            kv = store.view()
            got, plan = fetch(kv, Layout.dense(2, 4, 1, kv.capacity), "cpu", near)
            assert plan.full and near.whole and near.ahead is None
            assert (got.k.data_ptr() == held.data_ptr()) == (store.k.data_ptr() == at)  # unless the store grew
            for a, b in ((got.to_dense().k, kv.to_dense().k), (got.to_dense().v, kv.to_dense().v)):
                assert torch.equal(a, b)
    near.send(store, "cpu")
    store.truncate(3)
    assert near.ahead is None  # other entries will have these numbers
    near.send(store, "cpu")
    fetch(store.view(), Layout.static((2, 4, 1, store.view().capacity), window=4, block_q=1), "cpu", near)
    assert near.ahead is None and not near.whole


def test_the_layer_after_this_one_follows(monkeypatch):
    """Only from pinned memory, only where its last step was dense, and the first layer after the last."""
    _, k, v = qkv(1, 4, 2, 20)
    stores = {i: OffloadStore.empty(k, v).append(k, v, None, [0]) for i in range(3)}
    follow(stores, 0, torch.device("cpu"))
    assert stores[1].near.ahead is None
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    follow(stores, 0, torch.device("cpu"))
    assert stores[1].near.ahead is None  # it has not said that it needs everything
    for store in stores.values():
        fetch(store.view(), Layout.dense(1, 4, 1, 20), "cpu", store.near)
    for i in (0, 2):
        follow(stores, i, torch.device("cpu"))
    assert [s.near.ahead is not None for s in stores.values()] == [True, True, False]
    stores[0].k = stores[0].v = torch.empty(1, 2, 40, 16)  # 5,120 bytes, for which PyTorch pins 8,192
    assert stores[0].nbytes == 2 * 8192
