"""The quantised store against a slow transcription of KIVI's card, entry by entry, and its bytes counted by hand."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.cache import DenseStore, LayerCache
from foveate.cache import codes as module
from foveate.cache.codes import pack, quantise, unpack
from foveate.cache.quantised import QuantisedStore
from foveate.errors import CacheError, ConfigError
from foveate.methods.base import Selection

NAN = float("nan")


def slow_group(x, bits):
    """The card for one group of numbers, fp32 `[n]`."""
    low, high = x.min(), x.max()
    scale = (high - low) / (2**bits - 1)
    return x if scale == 0 else torch.round(((x - low) / scale).clamp(0, 2**bits - 1)) * scale + low


def slow_head(k, v, quantised_at, bits, group, residual):
    """What a head with keys k `[n, D]` and values v reads once `quantised_at` of its tokens were settled."""
    k, v = k.clone(), v.clone()
    for lo in range(0, quantised_at // residual * residual, group):
        for c in range(k.shape[1]):
            k[lo : lo + group, c] = slow_group(k[lo : lo + group, c], bits)
    near = max(n for n in range(1, min(group, v.shape[1]) + 1) if v.shape[1] % n == 0)
    for t in range(max(0, quantised_at - residual)):
        for lo in range(0, v.shape[1], near):
            v[t, lo : lo + near] = slow_group(v[t, lo : lo + near], bits)
    return k, v


class Model:
    """The raw tokens of each row and how many of them were there when the store last quantised."""

    def __init__(self, b, g, d, dv, bits, group, residual, seed=0):
        self.rule, self.gen = (bits, group, residual), torch.Generator().manual_seed(seed)
        self.k, self.v = torch.zeros(b, g, 0, d), torch.zeros(b, g, 0, dv)
        self.store = QuantisedStore.empty(self.k, self.v, bits, None, group, residual)
        self.rows = [(torch.zeros(g, 0, d), torch.zeros(g, 0, dv)) for _ in range(b)]
        self.settled = [0] * b

    def append(self, counts, side="left"):
        b, n = len(self.rows), max(counts)
        k = torch.randn(b, *self.k.shape[1:2], n, self.k.shape[3], generator=self.gen)
        v = torch.randn(b, *self.v.shape[1:2], n, self.v.shape[3], generator=self.gen)
        valid = torch.zeros(b, n, dtype=torch.bool)
        for i, c in enumerate(counts):
            valid[i, n - c :] = side == "left"
            valid[i, :c] |= side == "right"
        if n == 1:
            self.settled = [r[0].shape[1] for r in self.rows]
        seen = [r[0].shape[1] for r in self.rows]
        new = [(k[i][:, valid[i]], v[i][:, valid[i]]) for i in range(b)]
        self.rows = [tuple(torch.cat(p, 1) for p in zip(a, c, strict=True)) for a, c in zip(self.rows, new, strict=True)]
        dead = ~valid[:, None, :, None]
        whole = bool(valid.all())
        self.store.append(k.masked_fill(dead, NAN), v.masked_fill(dead, NAN), None if whole else valid, seen)

    def settle(self):
        index = torch.arange(self.store.count.most).expand(len(self.rows), self.k.shape[1], -1)
        assert self.store.select(Selection(index, torch.tensor(self.store.lens))) is self.store
        self.settled = [r[0].shape[1] for r in self.rows]

    def check(self, store=None, order=None):
        store = store or self.store
        kv, order = store.view(), order or range(len(self.rows))
        assert store.lens == [[self.rows[i][0].shape[1]] * self.k.shape[1] for i in order]
        for b, i in enumerate(order):
            for g in range(self.k.shape[1]):
                n = store.lens[b][g]
                assert int(kv.lengths()[b, g]) == n
                k, v = slow_head(self.rows[i][0][g], self.rows[i][1][g], self.settled[i], *self.rule)
                torch.testing.assert_close(kv.k[b, g, :n], k, atol=2e-6, rtol=1e-6)
                torch.testing.assert_close(kv.v[b, g, :n], v, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("by", ["token", "channel"])
def test_error_of_half_a_step(dtype, bits, by):
    """|x - x^| <= scale / 2 and the rounding of the result; equal numbers come back exactly; every code is in use."""
    x = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)).to(dtype) * 5 + 20
    x[0, 0] = 1.5
    codes = module.Codes(x, bits, 16, by)
    codes.push(x, module.Rows([64, 64], x.device))
    out = torch.empty_like(x)
    codes.read(out)
    assert torch.equal(out[0, 0], x[0, 0])
    scale = codes.scale[:, :, : 64 // codes.unit].expand(2, 3, 4, 16, 32).reshape(x.shape) if by == "token" else (
        codes.scale[:, :, :64].expand(2, 3, 64, 2, 16).reshape(x.shape))  # fmt: skip
    slack = out.float().abs() * torch.finfo(dtype).eps
    assert bool(((out.float() - x.float()).abs() <= scale.float() / 2 + slack).all())
    used = quantise(x[1:].unflatten(2, (-1, 16)), bits, 3)[0]
    top = 2**bits - 1 - int(bits == 8 and dtype == torch.bfloat16)  # a scale rounded up to 8 bits reaches a step less far
    assert used.unique().tolist() == list(range(2**bits)) and int(used.float().amax(3).min()) == top


def test_a_channel_of_large_keys_does_not_spoil_the_others():
    x = torch.randn(1, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 100
    codes = module.Codes(x, 4, 32, "token")
    codes.push(x, module.Rows([64], x.device))
    out = torch.empty_like(x)
    codes.read(out)
    error = (out - x).abs().amax((0, 1, 2))
    others = torch.arange(32) != 5
    assert float(error[5]) > 1 and float(error[others].max()) < 0.25


def test_tiny_ranges_and_zeros():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.zeros(1, 1, 4, 8, dtype=dtype)
        x[..., 0] = torch.finfo(dtype).smallest_normal / 4
        codes, scale, low = quantise(x, 2, 2)
        assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
        assert float((codes * scale + low - x).abs().max()) <= float(scale.max()) / 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_bytes_come_back(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 7, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape[-1] == 24 * bits // 8 and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, bits, torch.empty(2, 3, 7, 24)), codes.float())
    assert torch.equal(unpack(packed, bits, torch.empty(2, 3, 7, 48, dtype=torch.float16)[..., ::2]), codes.half())


@pytest.mark.parametrize("bits,d,dv", [(2, 8, 12), (4, 6, 8), (8, 5, 3)])
def test_prompt_steps_turn_steps(bits, d, dv):
    """Rows of different length, padding on either side, over several boundaries of the residual part."""
    model = Model(3, 2, d, dv, bits, 4, 8)
    model.append([21, 3, 9])
    model.check()
    for i in range(10):
        model.append([1, 1, 1])
        if i % 3 == 0:
            model.check()
    model.append([5, 0, 11], "right")
    model.append([4, 2, 7])
    model.check()
    for _ in range(3):
        model.append([1, 1, 1])
    model.check()
    model.append([9, 9, 9])
    model.settle()
    model.check()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.booleans()), min_size=1, max_size=5), st.integers(0, 99))
def test_any_sequence(calls, seed):
    model = Model(2, 1, 4, 4, 4, 2, 4, seed)
    for a, c, settle in calls:
        model.append([a, c], "right" if a % 2 else "left")
        if settle:
            model.settle()
        model.append([1, 1])
    model.check()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_by_one_is_bulk(bits):
    """Growing over the boundaries equals quantising the same tokens at once, byte by byte."""
    gen = torch.Generator().manual_seed(1)
    k, v = torch.randn(1, 2, 150, 16, generator=gen), torch.randn(1, 2, 150, 8, generator=gen)
    bulk, single = (QuantisedStore.empty(k, v, bits, None, 8, 16) for _ in range(2))
    bulk.append(k, v, None, [0])
    for i in range(150):
        single.append(k[:, :, i : i + 1], v[:, :, i : i + 1], None, [i])
    bulk.settle()
    single.settle()
    a, b = bulk.state(), single.state()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(bulk.view().k, single.view().k) and torch.equal(bulk.view().v, single.view().v)
    assert a["k.done"].tolist() == [144] and a["v.done"].tolist() == [134]


def test_pieces_change_nothing(monkeypatch):
    k = torch.randn(2, 2, 100, 8, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 100, dtype=torch.bool)
    valid[1, :33] = False
    stores = []
    for size in (1 << 24, 200):
        monkeypatch.setattr(module, "PIECE", size)
        stores.append(QuantisedStore.empty(k, k, 4, None, 4, 8))
        stores[-1].append(k, k, valid, [0, 0])
        stores[-1].settle()
    a, b = (s.state() for s in stores)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("even", [True, False])
def test_sixteen_bits_are_a_dense_store(even):
    k = torch.randn(2, 2, 60, 8, generator=torch.Generator().manual_seed(3)).half()
    valid = None if even else torch.arange(50).expand(2, 50) >= torch.tensor([[0], [17]])
    dense, store = DenseStore.empty(k, k), QuantisedStore.empty(k, k, 16, None, 4, 8)
    stores = [dense, store]
    seen = [50, 50 if even else 33]
    for s in stores:
        s.append(k[:, :, :50], k[:, :, :50], valid, [0, 0])
        for i in range(50, 60):
            s.append(k[:, :, i : i + 1], k[:, :, i : i + 1], None, [n + i - 50 for n in seen])
        s.truncate(13)
        s.append(k[:, :, :5], k[:, :, :5], None, [n - 3 for n in seen])
        s.append(k[:, :, :1], k[:, :, :1], None, [n + 2 for n in seen])
    a, b = dense.view().to_dense(), store.view().to_dense()
    assert store.values.packed.done.most > 0 and dense.lens == store.lens
    assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)


@pytest.mark.parametrize("bits,share", [(2, 0.18), (4, 0.30), (8, 0.55)])
def test_bytes_by_hand(bits, share):
    """One head of 64 channels in fp16, 8192 tokens: codes, two numbers a group, 128 values in full, and room for 128."""
    k = torch.randn(1, 1, 8192, 64, generator=torch.Generator().manual_seed(4)).half()
    store = QuantisedStore.empty(k, k, bits, None, 64, 128)
    store.append(k, k, None, [0])
    assert store.nbytes == 2 * 8192 * 64 * 2  # the prompt attends to itself in full precision
    prompt = [weakref.ref(side.tail) for side in (store.keys, store.values)]
    store.settle()
    assert [ref() for ref in prompt] == [None, None]  # nobody holds it any more
    code, params = 64 * bits // 8, 2 * 2
    keys = (8192 + 128) * code + (8192 + 128) // 64 * 64 * params
    values = (8064 + 128) * code + (8064 + 128) * 1 * params + 128 * 64 * 2
    assert store.nbytes == keys + values
    assert store.nbytes <= share * 2 * 8192 * 64 * 2
    held = sum(t.untyped_storage().nbytes() for t in store._tensors().values())
    assert held == store.nbytes  # no view into a larger buffer keeps the prompt alive
    store.view()
    store.append(k[:, :, :1], k[:, :, :1], None, [8192])
    assert store.nbytes == keys + values + 2 * 64 * 2


def test_views_stay_what_they_were():
    model = Model(2, 1, 4, 4, 8, 2, 4)
    model.append([9, 6])
    views = []
    for _ in range(8):
        kv = model.store.view()
        views.append((kv, kv.to_dense(), kv.lengths().clone()))
        model.append([1, 1])
    for kv, was, n in views:
        now = kv.to_dense()
        assert torch.equal(now.k, was.k) and torch.equal(now.v, was.v) and torch.equal(kv.lengths(), n)


def test_rollback_is_exact_or_refused():
    """Tokens that are still in full precision can go; a token that has pushed others into the codes cannot."""
    model = Model(2, 2, 4, 4, 4, 4, 8)
    model.append([21, 13])
    model.append([1, 1])
    twin = model.store.fork()
    model.append([5, 5])  # a draft, not settled
    model.store.truncate(5)
    new = torch.randn(2, 2, 1, 4, generator=torch.Generator().manual_seed(5))
    for s in (model.store, twin):
        s.append(new, new, None, [22, 14])
    a, b = model.store.state(), twin.state()
    assert all(torch.equal(a[name], b[name]) for name in a)
    model.store.truncate(1)  # the newest token alone: nothing was quantised for it
    for _ in range(3):
        model.store.append(new, new, None, [22, 14])
    before = model.store.state()
    with pytest.raises(CacheError, match="full precision is gone"):
        model.store.truncate(3)
    with pytest.raises(CacheError, match="expected 0 to"):
        model.store.truncate(99)
    after = model.store.state()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reorder_fork_and_save():
    model = Model(3, 2, 8, 4, 4, 4, 8)
    model.append([21, 3, 9])
    assert bool(model.store.keys.tail.isnan().any())  # padding, which is nobody's and must not be saved
    assert all(bool(torch.isfinite(t).all()) for t in model.store.state().values())
    for _ in range(6):
        model.append([1, 1, 1])
    store = model.store.fork()
    store.reorder(torch.tensor([2, 0, 0, 1]))
    model.check(store, [2, 0, 0, 1])
    loaded = QuantisedStore.restore({n: t.clone() for n, t in store.state().items()})
    model.check(loaded, [2, 0, 0, 1])
    k, v = torch.ones(4, 2, 1, 8), torch.ones(4, 2, 1, 4)
    for _ in range(9):  # both go on alike, over boundaries
        store.append(k, v, None, [n[0] for n in store.lens])
        loaded.append(k, v, None, [n[0] for n in loaded.lens])
    a, b = store.state(), loaded.state()
    assert all(torch.equal(a[name], b[name]) for name in a)
    model.check()  # the original never noticed
    for t in model.store.fork()._tensors().values():
        t.zero_()
    model.check()


def test_evict_before_quantising():
    """A policy that selects at the prompt's end drops first, then what stays is quantised, positions beside it."""
    gen = torch.Generator().manual_seed(6)
    k, v = torch.randn(2, 2, 40, 8, generator=gen), torch.randn(2, 2, 40, 8, generator=gen)
    store = QuantisedStore.empty(k, v, 4, None, 4, 8).append(k, v, None, [0, 0])
    index = torch.stack([torch.randperm(40, generator=gen)[:20].sort().values for _ in range(4)]).view(2, 2, 20)
    bias = torch.randn(2, 2, 20, generator=gen)
    store = store.select(Selection(index, torch.tensor([[20, 20], [13, 13]]), bias))
    want = QuantisedStore.empty(k, v, 4, None, 4, 8)
    valid = torch.arange(20).expand(2, 20) < torch.tensor([[20], [13]])
    pick = index[..., None].expand(-1, -1, -1, 8)
    want.append(k.gather(2, pick), v.gather(2, pick), valid, [0, 0]).settle()
    new = torch.randn(2, 2, 3, 8, generator=gen)
    for s in (store, want):
        s.append(new, new, None, [40, 40])
    a, b = store.view().to_dense(), want.view().to_dense()
    assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)
    assert store.lens == [[23, 23], [16, 16]] and not store.positions_true
    assert torch.equal(a.pos[0, :, :20], index[0].int()) and a.pos[0, 0, 20:].tolist() == [40, 41, 42]
    assert torch.equal(a.pos[1, :, :13], index[1, :, :13].int()) and a.pos[1, 0, 13:16].tolist() == [40, 41, 42]
    assert torch.equal(a.bias[0, :, :20], bias[0]) and a.bias[1, 0, 13:16].tolist() == [0, 0, 0]
    loaded = QuantisedStore.restore(store.state())
    assert torch.equal(loaded.view().to_dense().bias[1, :, :16], a.bias[1, :, :16])
    with pytest.raises(CacheError, match="evicted"):
        store.truncate(1)


@pytest.mark.parametrize(
    "selection,message",
    [
        (Selection(torch.arange(9).expand(1, 2, 9)), "evict before"),
        (Selection(torch.arange(9).expand(1, 2, 9), torch.tensor([[9, 3]])), "for all kv heads"),
        (Selection(torch.arange(9).expand(1, 2, 9), ring=(1, 8)), "ring"),
        (Selection(torch.arange(20).expand(1, 2, 20), channels=torch.zeros(1, 2, 1)), "channels"),
    ],
)
def test_selections_it_cannot_serve(selection, message):
    k = torch.randn(1, 2, 20, 8)
    store = QuantisedStore.empty(k, k, 4, None, 4, 8).append(k, k, None, [0])
    store.settle()
    before = store.view()
    with pytest.raises(CacheError, match=message):
        store.select(selection)
    assert torch.equal(store.view().k, before.k)


def test_bad_options():
    k = torch.randn(1, 1, 1, 6)
    for options, message in [
        ((3, None, 4, 8), "bits: expected 2, 4, 8 or 16, got 3"),
        ((4, 5, 4, 8), "bits: expected 2, 4, 8 or 16, got 5"),
        ((2, None, 4, 8), "6 channels does not fill whole bytes at 2 bits"),
        ((4, None, 3, 8), "multiple of group = 3, got 8"),
    ]:
        with pytest.raises(ConfigError, match=message):
            QuantisedStore.empty(k, k, *options)


def test_in_a_layer_cache():
    """By name, with options, from an empty layer; lengths, truncation and bytes through the cache."""
    layer = LayerCache()
    k = torch.randn(1, 2, 30, 8)
    layer.append(k, k, storage={"kind": "quantised", "bits": 8, "group": 4, "residual": 8})
    assert layer.store.kind == "quantised" and layer.store.rule == (8, 8, 4, 8)
    layer.truncate(4)
    assert layer.seen == [26] and layer.store.lens == [[26, 26]] and layer.nbytes == layer.store.nbytes
