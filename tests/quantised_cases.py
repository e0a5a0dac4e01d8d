"""Quantised stores and what attention over their codes must give, for the interpreter and for a GPU."""

from __future__ import annotations

import torch

from foveate.cache.fixed import fix
from foveate.cache.quantised import QuantisedStore
from foveate.kernels.dispatch import attend
from foveate.layout import Layout
from foveate.methods.base import Selection
from foveate.packed import PackedKV
from foveate.scores.bounds import Bounds

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
