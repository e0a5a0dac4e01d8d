"""Every store against a model made of plain python lists, with NaN in every slot that nothing uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from foveate.cache import DenseStore, LayerCache, PagedStore, RaggedStore, RingStore
from foveate.cache.persist import STORES
from foveate.cache.select import apply
from foveate.errors import CacheError
from foveate.kv import KV
from foveate.methods.base import LayerState, Selection
from tests.drive import Drive, qkv

NAN = float("nan")


def tensors(ids, g, dtype=torch.float32):
    """Keys `[B, G, n, 3]` and values `[B, G, n, 2]` that spell out token ids `[B][n]` (-1: padding) and the head."""
    t = torch.tensor(ids)[:, None].expand(-1, g, -1)
    head = torch.arange(g)[None, :, None].expand_as(t)
    k = torch.stack([t // 16, t % 16, head], -1).to(dtype)
    v = torch.stack([-(t % 16), t // 16], -1).to(dtype)
    dead = (t < 0)[..., None]
    return k.masked_fill(dead, NAN), v.masked_fill(dead, NAN)


def contents(store):
    """[B][G] lists of (id, head, position, bias), in the order of the view."""
    kv = store.view()
    flat, pos = kv.to_dense(), kv.positions()
    out = []
    for b, row in enumerate(store.lens):
        out.append([])
        for g, n in enumerate(row):
            k, v = flat.k[b, g, :n].float(), flat.v[b, g, :n].float()
            ids = (k[:, 0] * 16 + k[:, 1]).tolist()
            assert ids == (v[:, 1] * 16 - v[:, 0]).tolist()
            assert (k[:, 2] == g).all()
            bias = [0.0] * n if kv.bias is None else kv.bias[b, g, :n].tolist()
            out[-1].append(list(zip((int(i) for i in ids), pos[b, g, :n].tolist(), bias, strict=True)))
    return out


def poison(store):
    """NaN into every slot that holds no entry of anyone."""
    if isinstance(store, RaggedStore):
        used = torch.zeros(store.k.shape[0], dtype=torch.bool)
        for starts, counts in zip(store.starts, store.counts, strict=True):
            for a, n in zip(starts, counts, strict=True):
                used[a : a + n] = True
        store.k[~used], store.v[~used] = NAN, NAN
    elif isinstance(store, PagedStore):
        pool = store.pool
        for t in (pool.k, pool.v):
            t[pool.idle] = NAN
        for row, counts in zip(store.pages, store.counts, strict=True):
            for pages, n in zip(row, counts, strict=True):
                if n % pool.page and pool.refs[pages[-1]] == 1:
                    pool.k[pages[-1], n % pool.page :], pool.v[pages[-1], n % pool.page :] = NAN, NAN
    else:
        for b, row in enumerate(store.lens):
            store.k[b, :, row[0] :], store.v[b, :, row[0] :] = NAN, NAN


class Pair:
    """A store and its model: entries [B][G] of (id, position, bias)."""

    def __init__(self, store, b, g):
        self.store, self.g = store, g
        self.entries = [[[] for _ in range(g)] for _ in range(b)]
        self.seen, self.ring, self.evicted = [0] * b, None, False

    def twin(self, store):
        out = Pair(store, 0, self.g)
        out.entries = [[list(h) for h in row] for row in self.entries]
        out.seen, out.ring, out.evicted = list(self.seen), self.ring, self.evicted
        return out

    def complete(self):
        return all([e[1] for e in h] == list(range(s)) for row, s in zip(self.entries, self.seen, strict=True) for h in row)

    def check(self):
        got = contents(self.store)
        if self.ring is not None:
            got = [[sorted(h, key=lambda e: e[1]) for h in row] for row in got]
        assert got == self.entries
        assert self.store.positions_true == (not self.evicted)
        if not isinstance(self.store, PagedStore):  # whose rows may share pages
            kept = sum(len(h) for row in self.entries for h in row)
            assert self.store.nbytes >= kept * 5 * self.store.view().k.element_size()


class Stores(RuleBasedStateMachine):
    @initialize(
        kind=st.sampled_from(["dense", "paged"]),
        b=st.integers(1, 3),
        g=st.integers(1, 2),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        evicted=st.booleans(),
    )
    def start(self, kind, b, g, dtype, evicted):
        self.dtype, self.next = dtype, 0
        k, v = tensors([[0]] * b, g, dtype)
        store = DenseStore.empty(k, v) if kind == "dense" else PagedStore.empty(k, v, page=4)
        self.pairs = [Pair(store, b, g)]
        self.append(0, [5] * b, "left")
        if evicted:  # a different number of weighted entries in every row and head
            self.keep(self.pairs[0], [[range((i + 2 * j) % 4 + 1) for j in range(g)] for i in range(b)], False, True)

    def pick(self, i):
        return self.pairs[i % len(self.pairs)]

    def append(self, i, keep, side):
        pair = self.pick(i)
        keep = [keep[b % len(keep)] for b in range(len(pair.entries))]
        n = max(keep)
        ids = []
        for b, m in enumerate(keep):
            new = [(self.next + j) % 250 for j in range(m)]
            self.next += m
            ids.append([-1] * (n - m) + new if side == "left" else new + [-1] * (n - m))
            at = len(ids) - 1
            for head in pair.entries[at]:
                head += [(t, pair.seen[b] + j, 0.0) for j, t in enumerate(new)]
        valid = None if min(keep) == n else torch.tensor(ids) >= 0
        k, v = tensors(ids, pair.g, self.dtype)
        old, before = pair.store.view(), None
        if pair.ring is None and old.capacity:
            before = old.to_dense().k.clone()
        poison(pair.store)
        pair.store = pair.store.append(k, v, valid, pair.seen)
        pair.seen = [s + m for s, m in zip(pair.seen, keep, strict=True)]
        if before is not None:  # a view handed out before stays what it was
            assert torch.equal(old.to_dense().k, before)
        if n > 1 or valid is not None:
            pair.ring = None
        if pair.ring is not None:
            sink, window = pair.ring
            for row, s in zip(pair.entries, pair.seen, strict=True):
                for head in row:
                    head[:] = [e for e in head if e[1] < sink or e[1] >= s - window]

    @rule(i=st.integers(0, 9))
    def append_one(self, i):
        self.append(i, [1], "left")

    @rule(i=st.integers(0, 9), n=st.integers(1, 9))
    def append_many(self, i, n):
        self.append(i, [n], "left")

    @rule(
        i=st.integers(0, 9),
        keep=st.lists(st.integers(0, 5), min_size=3, max_size=3),
        side=st.sampled_from(["left", "right"]),
    )
    def append_padded(self, i, keep, side):
        self.append(i, [max(1, keep[0]), *keep[1:]], side)

    @rule(i=st.integers(0, 9), data=st.data(), how=st.sampled_from(["even", "rows", "ragged"]), weigh=st.booleans())
    def select(self, i, data, how, weigh):
        pair = self.pick(i)
        lens = [[len(h) for h in row] for row in pair.entries]
        if pair.ring is not None or min(min(row) for row in lens) == 0:
            return
        same = data.draw(st.integers(1, min(min(row) for row in lens)))
        picks = []
        for row in lens:
            one = same if how == "even" else data.draw(st.integers(1, min(row)))
            counts = [data.draw(st.integers(0, n)) if how == "ragged" else one for n in row]
            picks.append([sorted(data.draw(st.permutations(range(n)))[:c]) for n, c in zip(row, counts, strict=True)])
        self.keep(pair, picks, how == "even", weigh)

    def keep(self, pair, picks, even, weigh):
        width = max(1, max(len(chosen) for row in picks for chosen in row))
        index = torch.zeros(len(picks), pair.g, width, dtype=torch.long)
        bias = torch.full((len(picks), pair.g, width), NAN)
        for b, row in enumerate(picks):
            for g, chosen in enumerate(row):
                extra = torch.arange(len(chosen)) % 3 * float(weigh)
                index[b, g, : len(chosen)], bias[b, g, : len(chosen)] = torch.tensor(chosen).long(), extra
                old = [pair.entries[b][g][e] for e in chosen]
                pair.entries[b][g] = [(t, p, w + x) for (t, p, w), x in zip(old, extra.tolist(), strict=True)]
        poison(pair.store)
        counts = torch.tensor([[len(chosen) for chosen in row] for row in picks])
        pair.store = pair.store.select(Selection(index, None if even else counts, bias if weigh else None))
        pair.evicted = True

    @rule(i=st.integers(0, 9), sink=st.integers(0, 2), window=st.integers(1, 6))
    def to_ring(self, i, sink, window):
        pair = self.pick(i)
        plain = all(e[2] == 0 for row in pair.entries for h in row for e in h)
        if pair.ring is not None or not pair.complete() or not plain or pair.store.view().bias is not None:
            return
        index = torch.zeros(len(pair.seen), pair.g, max(max(pair.seen), 1), dtype=torch.long)
        for b, s in enumerate(pair.seen):
            keep = [p for p in range(s) if p < sink or p >= s - window]
            index[b, :, : len(keep)] = torch.tensor(keep)
            for g in range(pair.g):
                pair.entries[b][g] = [pair.entries[b][g][p] for p in keep]
        counts = torch.tensor([[len(h) for h in row] for row in pair.entries])
        if int(counts.min()) == 0:
            return
        pair.store = pair.store.select(Selection(index[:, :, : int(counts.max())], counts, ring=(sink, window)))
        assert isinstance(pair.store, RingStore)
        pair.ring, pair.evicted = (sink, window), True

    @rule(i=st.integers(0, 9), n=st.integers(0, 6))
    def truncate(self, i, n):
        pair = self.pick(i)
        if pair.evicted or n > min(len(h) for row in pair.entries for h in row):
            with pytest.raises(CacheError, match="truncate"):
                pair.store.truncate(n)
            return
        pair.store.truncate(n)
        for row in pair.entries:
            for head in row:
                del head[len(head) - n :]
        pair.seen = [s - n for s in pair.seen]

    @rule(i=st.integers(0, 9), order=st.lists(st.integers(0, 9), min_size=1, max_size=3))
    def reorder(self, i, order):
        pair = self.pick(i)
        order = [o % len(pair.seen) for o in order]
        pair.store.reorder(torch.tensor(order))
        pair.entries = [[list(h) for h in pair.entries[o]] for o in order]
        pair.seen = [pair.seen[o] for o in order]

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(i=st.integers(0, 9))
    def fork(self, i):
        pair = self.pick(i)
        self.pairs.append(pair.twin(pair.store.fork()))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(i=st.integers(0, 9))
    def save_and_restore(self, i):
        pair = self.pick(i)
        copy = STORES[pair.store.kind].restore(pair.store.state())
        assert type(copy) is type(pair.store)
        self.pairs.append(pair.twin(copy))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(i=st.integers(0, 9))
    def drop(self, i):
        del self.pairs[i % len(self.pairs)]

    @invariant()
    def equal_to_the_model(self):
        for pair in getattr(self, "pairs", []):
            pair.check()
        pools = {id(p.store.pool): p.store.pool for p in getattr(self, "pairs", []) if isinstance(p.store, PagedStore)}
        for pool in pools.values():  # every page is idle or referenced as often as tables name it
            named = [0] * len(pool.refs)
            for p in self.pairs:
                if isinstance(p.store, PagedStore) and p.store.pool is pool:
                    for pages in (x for row in p.store.pages for x in row):
                        for page in pages:
                            named[page] += 1
            assert named == pool.refs and sorted(pool.idle) == [i for i, r in enumerate(named) if r == 0]


Stores.TestCase.settings = settings(
    max_examples=50, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStores = Stores.TestCase


def filled(kind, b=1, g=2, n=2000, d=8, keep=None):
    """A store of each kind with n entries seen, of which about `keep` are kept."""
    k = torch.arange(float(n))[None, None, :, None].expand(b, g, n, d).contiguous()
    store = PagedStore.empty(k, k) if kind == "paged" else DenseStore.empty(k, k)
    store = store.append(k, k, None, [0] * b)
    if kind == "ring":
        keep = keep or n // 2
        return store.select(Selection(torch.arange(n).expand(b, g, n), ring=(4, keep - 4)))
    if kind == "ragged":
        counts = torch.tensor([[keep or n, (keep or n) // 4]]).expand(b, g)
        return store.select(Selection(torch.arange(keep or n).expand(b, g, -1), counts))
    return store if keep is None else store.select(Selection(torch.arange(keep).expand(b, g, -1)))


@pytest.mark.parametrize("kind", ["dense", "paged", "ragged", "ring"])
def test_bytes_kept_are_bytes_held(kind):
    full = filled("dense").nbytes
    store = filled(kind, keep=200)
    assert isinstance(store, STORES[kind])
    kept = sum(sum(row) for row in store.lens) * 2 * 8 * 4
    assert kept <= store.nbytes <= kept * 1.3 + 2 * 2 * 8 * 4 * 130 * (kind == "ragged") and store.nbytes < full / 4
    flat = store.view()
    assert flat.k.untyped_storage().nbytes() + flat.v.untyped_storage().nbytes() <= store.nbytes


@pytest.mark.parametrize("kind", ["dense", "paged", "ragged", "ring"])
def test_growth_is_amortised(kind):
    """Fifteen hundred steps move the buffers a few times; every other step writes in place."""
    store = filled(kind)
    token = torch.full((1, 2, 1, 8), -1.0)
    place = lambda s: s.view().k.data_ptr()  # noqa: E731
    moves, last = 0, place(store)
    for t in range(1500):
        store = store.append(token, token, None, [2000 + t])
        moves, last = moves + (place(store) != last), place(store)
    assert moves <= (0 if kind == "ring" else 10)
    assert store.view().k.shape[0] and store.lens[0][0] == (1000 if kind == "ring" else 3500)


@pytest.mark.parametrize("kind", ["dense", "paged", "ragged"])
def test_a_view_builds_no_tensor_of_its_own(kind):
    """Lengths, tables and offsets are kept, not built again for each view."""
    store = filled(kind, b=2)
    if kind == "dense":
        store = store.append(torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8), torch.tensor([[1, 0], [1, 1]]).bool(), [0, 0])
    a, b = store.view(), store.view()
    assert a.len is b.len and a.len is not None and a.offsets is b.offsets
    assert a.table is None or a.table.data_ptr() == b.table.data_ptr()
    token = torch.zeros(2, 2, 1, 8)
    store = store.append(token, token, None, [2000, 2000])
    assert torch.equal(store.view().len, a.len + 1) and store.view().len is not a.len


def test_rows_of_a_reordered_cache_never_share_memory():
    """Three beams from one row go on with different tokens; so do the methods' states."""
    for kind in ("dense", "paged", "ragged", "ring"):
        store = filled(kind, b=2, n=60)
        store.reorder(torch.tensor([1, 1, 1]))
        for t in range(20):
            new = torch.arange(3.0)[:, None, None, None].expand(3, 2, 1, 8) * 1000 + t
            store = store.append(new, new, None, [60 + t] * 3)
        got = store.view()
        for b in range(3):
            row = got.row(b)
            at = (row.positions() >= 60) & row.exists()
            k = row.to_dense().k[at.expand(1, 2, -1)][:, 0]
            assert sorted(set(k.tolist())) == [1000.0 * b + t for t in range(20)], kind


@pytest.mark.parametrize("kind", ["dense", "paged", "ragged", "ring"])
@pytest.mark.parametrize("how", ["fork", "restore"])
def test_copies_are_independent(kind, how):
    """Both write to the slot after the last entry; a plain cache also rolls back and writes over what it held."""
    store = filled(kind, n=60, keep=60 if kind == "ragged" else None)
    store = store.append(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), None, [60])
    other = store.fork() if how == "fork" else type(store).restore(store.state())
    want = contents_by_position(store)
    seen = [61]
    if store.positions_true:
        other.truncate(5)
        seen = [56]
    token = torch.full((1, 2, 1, 8), 7.0)
    for t in range(3):
        other = other.append(token, token, None, [seen[0] + t])
    assert contents_by_position(store) == want
    store = store.append(token * 2, token * 2, None, [61])
    assert contents_by_position(other)[0][seen[0]] == 7.0 and contents_by_position(store)[0][61] == 14.0


def contents_by_position(store):
    """Per kv head {position: first key channel} of row 0."""
    kv = store.view()
    flat, pos = kv.to_dense(), kv.positions()
    return [
        dict(zip(pos[0, g, :n].tolist(), flat.k[0, g, :n, 0].tolist(), strict=True)) for g, n in enumerate(store.lens[0])
    ]


def test_a_fork_of_pages_copies_only_what_it_writes():
    store = filled("paged", n=1000)
    before = store.nbytes
    forks = [store.fork() for _ in range(5)]
    token = torch.zeros(1, 2, 1, 8)
    for i, f in enumerate(forks):
        f.append(token + i, token + i, None, [1000])
    assert all(torch.equal(f.view().to_dense().k[:, :, 1000], (token + i)[:, :, 0]) for i, f in enumerate(forks))
    assert store.lens == [[1000, 1000]] and store.nbytes <= before * 1.2
    pages = len(store.pool.refs) - len(store.pool.idle)
    del forks, f
    assert len(store.pool.refs) - len(store.pool.idle) == pages - 10  # two heads of five forks gave their page back


def test_select_on_a_ring_names_entries_of_its_view():
    store = filled("ring", n=50, keep=12)
    view = store.view()
    index = torch.tensor([1, 5, 9]).expand(1, 2, 3)
    got = store.select(Selection(index))
    want = view.positions().gather(2, index)
    assert torch.equal(got.view().positions(), want)
    assert torch.equal(got.view().k[..., 0].long(), want)


def test_compress_again_after_a_turn():
    """Ring, a turn of several tokens, ring again: what is kept are the sinks and the newest window."""
    store = filled("ring", n=50, keep=12)
    new = torch.arange(50.0, 57.0)[None, None, :, None].expand(1, 2, 7, 8)
    store = store.append(new, new, None, [50])
    assert isinstance(store, DenseStore) and store.lens == [[19, 19]]
    pos = store.view().positions()[0, 0].tolist()
    assert pos == [0, 1, 2, 3, *range(42, 57)]
    index = torch.tensor([*range(4), *range(11, 19)]).expand(1, 2, -1)
    store = store.select(Selection(index, ring=(4, 8)))
    assert isinstance(store, RingStore)
    assert sorted(store.view().positions()[0, 0].tolist()) == [0, 1, 2, 3, *range(49, 57)]


def test_a_rectangle_or_ragged():
    kv = KV.dense(torch.randn(2, 2, 10, 4), torch.randn(2, 2, 10, 4))
    index = torch.arange(10).expand(2, 2, 10)
    assert isinstance(apply(kv, Selection(index)), DenseStore)
    assert isinstance(apply(kv, Selection(index, torch.tensor([[10, 10], [9, 9]]))), DenseStore)
    assert isinstance(apply(kv, Selection(index, torch.tensor([[10, 10], [3, 3]]))), RaggedStore)
    assert isinstance(apply(kv, Selection(index, torch.tensor([[10, 9], [10, 9]]))), RaggedStore)


@pytest.mark.parametrize(
    "selection,message",
    [
        (Selection(torch.zeros(1, 3, 2, dtype=torch.long)), r"\[B, G\] = \[1, 2\]"),
        (Selection(torch.tensor([[[0, 0], [0, 1]]])), "ascending"),
        (Selection(torch.tensor([[[3, 1], [0, 1]]])), "ascending"),
        (Selection(torch.tensor([[[0, 9], [0, 1]]])), "between 0 and 4"),
        (Selection(torch.tensor([[[-1, 1], [0, 1]]])), "between 0 and 4"),
        (Selection(torch.tensor([[[0, 4], [0, 1]]])), "beyond the length"),
        (Selection(torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[3, 1]])), "counts"),
        (Selection(torch.tensor([[[0, 1], [0, 1]]]), bias=torch.zeros(1, 2, 3)), "bias"),
        (Selection(torch.tensor([[[0, 3], [0, 3]]]), ring=(1, 2)), "needs 3 entries of row 0"),
        (Selection(torch.tensor([[[0, 1], [0, 1]]]), bias=torch.zeros(1, 2, 2), ring=(1, 2)), "no entry weights"),
    ],
)
def test_bad_selections(selection, message):
    kv = KV.dense(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), len=torch.tensor([[4, 5]], dtype=torch.int32))
    with pytest.raises(CacheError, match=message):
        apply(kv, selection)


@pytest.mark.parametrize(
    "recipe", ["dense", "quest:budget=48", "quest:budget=32+snapkv:window=16,capacity=48", "expected_attention:ratio=0.5"]
)
def test_pages_from_prompt_to_answer(recipe):
    """Methods meet a paged cache with rows of different length: the same outputs as over rectangles, two turns long."""
    q, k, v = qkv(2, 4, 2, 190)
    drives = [Drive(recipe), Drive(recipe)]
    cache = drives[1].cache
    cache.store, cache.seen, cache.tails = PagedStore.empty(k, v, 8), [0, 0], [None, None]
    cache.rows = [LayerState(), LayerState()]
    valid = torch.arange(150) >= torch.tensor([[0], [37]])
    bad = [t[:, :, :150].masked_fill(~valid[:, None, :, None], NAN) for t in (q, k, v)]
    a, b = (d(*bad, valid=valid) for d in drives)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for lo, hi in [*((i, i + 1) for i in range(150, 170)), (170, 180), *((i, i + 1) for i in range(180, 190))]:
        a, b = (d(*(t[:, :, lo:hi] for t in (q, k, v))) for d in drives)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    kinds = [d.cache.store.kind for d in drives]
    assert kinds[1] == "paged" and kinds[0] in ("dense", "ragged") and drives[0].cache.store.lens == cache.store.lens


def test_layer_cache_counts_and_refuses():
    layer = LayerCache()
    k = torch.randn(2, 2, 3, 4)
    layer.append(k, k, torch.tensor([[True, True, True], [False, True, True]]))
    assert layer.seen == [3, 2] and layer.store.lens == [[3, 3], [2, 2]]
    with pytest.raises(CacheError, match="batch rows"):
        layer.append(k[:1], k[:1])
    layer.truncate(1)
    assert layer.seen == [2, 1]
    layer.reorder(torch.tensor([1, 1]))
    assert layer.seen == [1, 1] and layer.store.lens == [[1, 1], [1, 1]]
