"""Quantised stores and what attention over their codes must give, for the interpreter and for a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.cache.fixed import fix
from foveate.cache.pruned import ChannelStore
from foveate.cache.quantised import QuantisedStore
from foveate.kernels.dispatch import attend
from foveate.layout import Layout
from foveate.methods.base import Selection
from foveate.packed import PackedKV
from foveate.scores.bounds import Bounds
from foveate.scores.labels import Channels, Codes

# (bits, value bits, group, residual), head dims of keys and values, query heads of a kv head
CASES = [
    ((4, None, 32, 64), 64, 64, 4),
    ((4, None, 64, 64), 128, 128, 8),
    ((2, None, 32, 32), 64, 32, 1),
    ((8, 4, 64, 64), 32, 64, 3),
    ((4, 8, 8, 16), 24, 40, 2),  # groups smaller than a step, widths that are no powers of two
    ((2, 2, 4, 8), 16, 96, 2),  # more groups of a token's channels than the kernel serves: plain code
]
ODD = ((4, 4, 8, 16), 24, 40, 2)  # channels of a byte's parts that are no powers of two, on both sides
ROWS = [(150, 150), (130, 70)]
FOLDS = (130, 190)  # the second row turns 8 to 64 keys into codes within a few steps


def store_of(rule, d, dv, rows, dtype, device, evicted=False, seed=0):
    """A store of 2 rows and 2 kv heads that has quantised, and a function that draws n more entries."""
    gen = torch.Generator().manual_seed(seed)

    def new(n):
        return tuple(torch.randn(2, 2, n, w, generator=gen).to(device, dtype) for w in (d, dv))

    n = max(rows)
    valid = (torch.arange(n) >= torch.tensor([[n - r] for r in rows])).to(device)
    store = QuantisedStore.empty(*new(0), *rule).append(*new(n), None if min(rows) == n else valid, [0, 0])
    if evicted:
        index = torch.arange(0, n, 2).expand(2, 2, -1).to(device)
        bias = torch.randn(2, 2, (n + 1) // 2, generator=gen).to(device)
        bias[:, :, 5:9] = float("-inf")
        store = store.select(Selection(index, torch.tensor([[r // 2] * 2 for r in rows], device=device), bias))
    return store, new


@torch.no_grad()
def check(store, heads, tolerance, q_pos=None, seed=0):
    """Attention over the codes equals the oracle's over the dense copy, and makes no copy."""
    kv = store.view()
    assert isinstance(kv, PackedKV)
    d = kv.shape[3]
    q = torch.randn(2, 2 * heads, 1, d, generator=torch.Generator().manual_seed(seed)).to(kv.device, kv.dtype)
    plan = Layout.dense(2, 2 * heads, 1, kv.capacity, q_pos=q_pos)
    got = attend(q, kv, plan, return_lse=True, backend="packed")
    assert not kv.made
    dense = kv.to_dense()
    want = attend(q, dense, plan, return_lse=True, backend="reference")
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], want[1], atol=tolerance, rtol=tolerance)
    return got[0]


def check_steps(case, rows, dtype, device, fixed, evicted, tolerance, steps=2):
    rule, d, dv, heads = case
    store, new = store_of(rule, d, dv, rows, dtype, device, evicted)
    seen = list(rows)
    if fixed:
        store = fix(store, seen)
    for i in range(steps):
        store = store.append(*new(1), None, seen)
        seen = [s + 1 for s in seen]
        at = torch.tensor([[s - 1] for s in seen], device=device) if evicted else None
        check(store, heads, tolerance, at, i)


# ---------------------------------------------------------------------- lists
# (entries of a tile, 1 for single entries; lists: "head", "group" or "one"; of every row its own)
LISTS = [
    (64, "group", True),
    (32, "head", True),
    (16, "group", False),
    (64, "one", True),
    (1, "head", True),
    (20, "group", True),
]


def listed(kv, heads, width, lists, own, q_pos=None, seed=0, share=0.4):
    """A layout of random tiles that begin anywhere, some of which overlap, or of single entries; some lists are short."""
    b, g, m, _, _ = kv.shape
    gen = torch.Generator().manual_seed(seed)
    rows, hl = b if own else 1, {"head": g * heads, "group": g, "one": 1}[lists]
    last = kv.lengths().cpu().amax(1)[:rows]  # of the longest row where rows share a list
    n = min(max(2, int(share * m / width)), int(last.min()))
    start = torch.stack(
        [torch.stack([torch.randperm(int(x), generator=gen)[:n].sort()[0] for _ in range(hl)]) for x in last]
    )
    count = torch.randint(1, n + 1, (rows, hl), generator=gen)
    count[0, 0] = n
    names = ("entries", "entry_count") if width == 1 else ("tiles", "tile_count")
    parts = {name: t.int().to(kv.device)[:, :, None] for name, t in zip(names, (start, count), strict=True)}
    return Layout((b, g * heads, 1, m), tile_width=width, q_pos=q_pos, **parts)


@torch.no_grad()
def check_lists(store, heads, which, tolerance, q_pos=None, seed=0):
    """Attention over listed codes equals the oracle's over the dense copy of a list, and makes no copy."""
    kv = store.view()
    plan = listed(kv, heads, *which, q_pos=q_pos, seed=seed)
    d = kv.shape[3]
    q = torch.randn(2, 2 * heads, 1, d, generator=torch.Generator().manual_seed(seed)).to(kv.device, kv.dtype)
    got = attend(q, kv, plan, return_lse=True)
    assert not kv.made
    want = attend(q, kv.to_dense(), plan, return_lse=True, backend="reference")
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], want[1], atol=tolerance, rtol=tolerance)
    return got[0]


# (sink, window), for all heads or a number for each query head; (stride, entries of a block) or None; as in LISTS, or None
RULES = [
    (4, 20, None, None),
    (70, (33, 2**30, 1, 60), None, None),  # one window reaches all there is
    ((0, 3, 64, 500), 0, None, None),
    (5, 37, ((3, 0, 2, 1), 16), None),
    (40, (1, 20, 90, 500), (5, 12), None),
    (20, 40, None, (16, "head", True)),
    ((0, 30, 90, 3), (2**30, 40, 1, 7), None, (32, "group", False)),
    (3, 9, None, (1, "head", True)),
    (0, 2**30, None, (20, "one", True)),
    (None, (60, 5, 2**30, 0), None, (1, "group", True)),
]


def ruled(kv, heads, rule, q_pos=None, seed=0):
    """A layout with a rule of this kind. Heads take numbers in turn."""
    sink, window, stride, lists = rule
    b, g, m, _, _ = kv.shape
    h = g * heads

    def each(x):
        x = x if isinstance(x, tuple) else (x,)
        return torch.tensor([[x[i % len(x)] for i in range(h if len(x) > 1 else 1)]], dtype=torch.int32, device=kv.device)

    plan = Layout((b, h, 1, m), q_pos=q_pos)
    if lists is not None:
        plan = listed(kv, heads, *lists, q_pos=q_pos, seed=seed, share=0.2)
    plan = replace(plan, sink=None if sink is None else each(sink), window=each(window))
    if stride is not None:
        step = each(stride[0])
        plan = replace(plan, stride=step, phase=(step - 1).clamp(min=0), tile_width=stride[1])
    return plan


@torch.no_grad()
def check_rule(store, heads, rule, tolerance, seed=0, back=None):
    """Attention under a rule equals the oracle's over the dense copy, and makes no copy; the query may stand `back` tokens
    before the last one."""
    kv = store.view()
    q_pos = None if back is None else kv.lengths()[:, :1] - 1 - back
    plan, d = ruled(kv, heads, rule, q_pos, seed), kv.shape[3]
    q = torch.randn(2, 2 * heads, 1, d, generator=torch.Generator().manual_seed(seed)).to(kv.device, kv.dtype)
    got = attend(q, kv, plan, return_lse=True, backend="packed")
    assert not kv.made
    want = attend(q, kv.to_dense(), plan, return_lse=True, backend="reference")
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], want[1], atol=tolerance, rtol=tolerance)


def pruned(rows, d, dv, few, dtype, device, fixed=True, seed=0):
    """A store of 2 rows and 2 kv heads whose older keys have `few` of d channels, two steps after it was pruned."""
    gen = torch.Generator().manual_seed(seed)

    def new(n):
        return tuple(torch.randn(2, 2, n, w, generator=gen).to(device, dtype) for w in (d, dv))

    n = max(rows)
    valid = (torch.arange(n) >= torch.tensor([[n - r] for r in rows])).to(device)
    store = ChannelStore.empty(*new(0), tail=21).append(*new(n), None if min(rows) == n else valid, [0, 0])
    channels = torch.stack([torch.randperm(d, generator=gen)[:few].sort()[0] for _ in range(4)]).view(2, 2, few)
    index = torch.arange(n, device=device).expand(2, 2, -1)
    store = store.select(Selection(index, torch.tensor([[r, r] for r in rows], device=device), channels=channels.to(device)))
    store = fix(store, list(rows)) if fixed else store
    for i in range(2):
        store = store.append(*new(1), None, [r + i for r in rows])
    return store, new


def stepped(case, rows, dtype, device, fixed, evicted, seed=0):
    """(store, text position of the next query or None) after two steps."""
    rule, d, dv, _ = case
    store, new = store_of(rule, d, dv, rows, dtype, device, evicted, seed)
    store = fix(store, list(rows)) if fixed else store
    for i in range(2):
        store = store.append(*new(1), None, [r + i for r in rows])
    return store, torch.tensor([[r + 1] for r in rows], device=device) if evicted else None


@torch.no_grad()
def check_bounds(case, rows, dtype, device, page):
    """Page bounds kept over codes, step by step, are those of the dense copy; nothing is unpacked for them."""
    rule, d, dv, _ = case
    store, new = store_of(rule, d, dv, rows, dtype, device)
    store = fix(store.append(*new(1), None, list(rows)), [r + 1 for r in rows])
    bounds = Bounds(page)
    for i in range(5):
        store = store.append(*new(1), None, [r + 1 + i for r in rows])
        kv = store.view()
        bounds.update(kv)
        assert not kv.made
        dense = Bounds(page)
        dense.update(kv.to_dense())
        live = torch.arange(dense.data.shape[2], device=device) * page < kv.lengths()[..., None]
        got, want = bounds.data[:, :, : live.shape[2]][live], dense.data[live]  # one rounding or two where keys are unpacked
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def check_pruned_bounds(rows, dtype, device, page):
    """Page bounds kept over pruned keys, step by step and from a roll-back on, are those of the dense copy, bit for bit."""
    store, new = pruned(rows, 24, 40, 9, dtype, device)
    bounds = Bounds(page)
    for i in range(5):
        store = store.append(*new(1), None, [r + 2 + i for r in rows])
        kv = store.view()
        if i == 3:
            bounds.truncate(30)  # pages with pruned keys are read again
        bounds.update(kv)
        assert not kv.made
        dense = Bounds(page)
        dense.update(kv.to_dense())
        live = torch.arange(dense.data.shape[2], device=device) * page < kv.lengths()[..., None]
        assert torch.equal(bounds.data[:, :, : live.shape[2]][live], dense.data[live])


@torch.no_grad()
def check_labels(kind, coded, rows, dtype, device, tolerance):
    """Labels that kernels keep beside packed keys, and their scores, are those of plain code beside the dense copy.

    kind: bits of a channel, or "codes".
    """
    gen = torch.Generator().manual_seed(3)
    store, new = stored(coded, rows, dtype, device)
    table = torch.stack([torch.randperm(32, generator=gen)[:12] for _ in range(2)]).to(device)
    ours, other = (
        Codes(32, 0.5, False, torch.device(device)) if kind == "codes" else Channels(12, kind, table) for _ in "ab"
    )
    other._kernels = lambda q, kv: None
    for i in range(4):
        store = store.append(*new(1), None, [r + 2 + i for r in rows])
        kv, q = store.view(), torch.randn(2, 6, 1, 32, generator=gen).to(device, dtype)
        got = ours.rank(q, kv, i, group=i % 2 > 0)
        assert not kv.made and ours._kernels(q, kv) is not None
        want = other.rank(q, kv.to_dense(), i, group=i % 2 > 0)
        live = torch.arange(kv.capacity, device=device) < kv.lengths()[..., None]
        for a, b in zip(ours.data, other.data, strict=True):
            assert torch.equal(a[:, :, : kv.capacity][live], b[:, :, : kv.capacity][live])
        old = torch.arange(kv.capacity, device=device) < kv.lengths()[..., None] - 1
        old = old.repeat_interleave(got.shape[1] // 2, 1)
        torch.testing.assert_close(got[old].double(), want[old].double(), atol=tolerance, rtol=1e-5)


def stored(coded, rows, dtype, device):
    """A fixed store of keys in codes or of pruned ones, two steps old, head dims 32 and 24; and what draws new entries."""
    if not coded:
        return pruned(rows, 32, 24, 9, dtype, device)
    store, new = store_of((4, 4, 8, 16), 32, 24, rows, dtype, device)
    store = fix(store, list(rows))
    for i in range(2):
        store = store.append(*new(1), None, [r + i for r in rows])
    return store, new


def check_replays(text, rows, monkeypatch):
    """A model on a GPU over packed entries: replayed steps are the steps, and none puts a dense copy together.

    Bit for bit the steps over the same fixed stores, none of them captured: the same kernels on the same numbers. Stores
    that grow add in another order, and now and then that puts a number on the border of two codes, or of two pages, on the
    other side: they are compared while no code has come of a token of these steps (keys fold in groups of 32 and more,
    the prompt leaves room for 4; the values that fold first are the prompt's), and afterwards most logits.
    """
    import foveate  # here: interpreter tests need no models
    from foveate.adapters.graphs import Captured
    from tests.models import generate, tiny, tokens

    class Cold(set):
        """Phases that ran, none of which counts: each step runs as it is."""

        def __contains__(self, phase):
            return False

    model = tiny(num_hidden_layers=3, hidden_size=256, head_dim=64, max_position_embeddings=4096).to("cuda", torch.float32)
    ids = tokens(rows, 700).cuda()
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :133] = 0
    seen, make = [], PackedKV.__getattr__
    monkeypatch.setattr(PackedKV, "__getattr__", lambda kv, name: seen.append(name) or make(kv, name))

    def run(graphs=True):
        with foveate.use(model, text, graphs=graphs) as handle:
            out = generate(model, ids, mask, max_new_tokens=80, min_new_tokens=80)
            return torch.stack(out.logits), handle.graphs.replays if graphs else 0, handle.notes

    loose, _, _ = run(graphs=False)
    got, replays, notes = run()
    assert replays >= 40, notes
    begin = Captured.__init__
    monkeypatch.setattr(Captured, "__init__", lambda held, *args: begin(held, *args) or setattr(held, "warm", Cold()))
    want, replays, _ = run()
    assert replays == 0 and not {"k", "v"} & set(seen)
    assert torch.equal(got, want), ((got - want).abs().amax((1, 2)) > 0).nonzero()[0]  # the first step that differs
    far = (got - loose).abs()
    late = (far > 2e-3).float().mean()
    assert far[:4].max() < 2e-3 and far.median() < 1e-3 and late < 5e-2, (far[:4].max(), far.median(), late)
